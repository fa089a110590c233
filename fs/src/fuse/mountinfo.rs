//! `/proc/self/mountinfo`: what is mounted where, see proc_pid_mountinfo(5).

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Its id; used again after it is gone.
    pub id: u64,
    /// The mount on which it lies.
    pub parent: u64,
    /// Device number of the file system, as `major:minor`.
    pub device: String,
    /// Where it is.
    pub path: PathBuf,
    /// Type of the file system, with its subtype.
    pub kind: String,
}

/// All mounts of this process's namespace.
pub fn read() -> std::io::Result<Vec<Mount>> {
    Ok(parse(&std::fs::read("/proc/self/mountinfo")?))
}

/// The mount that one sees at a path: the topmost of those that are exactly there.
pub fn top<'a>(mounts: &'a [Mount], path: &Path) -> Option<&'a Mount> {
    let here: Vec<&Mount> = mounts.iter().filter(|mount| mount.path == path).collect();
    here.iter().find(|mount| here.iter().all(|above| above.parent != mount.id || above.id == mount.id)).copied()
}

fn parse(bytes: &[u8]) -> Vec<Mount> {
    bytes.split(|&byte| byte == b'\n').filter_map(parse_line).collect()
}

fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|&byte| byte == b' ');
    let number = |field: &[u8]| std::str::from_utf8(field).ok()?.parse().ok();
    let id = number(fields.next()?)?;
    let parent = number(fields.next()?)?;
    let device = String::from_utf8(fields.next()?.to_vec()).ok()?;
    let _root = fields.next()?;
    let path = PathBuf::from(OsString::from_vec(unescape(fields.next()?)));
    let _options = fields.next()?;
    // Any number of optional fields, then a dash.
    fields.find(|field| field == b"-")?;
    let kind = String::from_utf8(unescape(fields.next()?)).ok()?;
    Some(Mount { id, parent, device, path, kind })
}

/// Blank, tab, newline and backslash are written as a backslash and three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, after)) = rest.split_first() {
        let octal = after.get(..3).filter(|_| byte == b'\\').and_then(|digits| {
            digits.iter().try_fold(0u8, |value, digit| match digit {
                b'0'..=b'7' => value.checked_mul(8)?.checked_add(digit - b'0'),
                _ => None,
            })
        });
        match octal {
            Some(value) => {
                out.push(value);
                rest = after.get(3..).unwrap_or_default();
            }
            None => {
                out.push(byte);
                rest = after;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLE: &[u8] = b"22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n\
        40 22 0:50 / /a\\040b\\134c rw,nosuid,nodev shared:7 master:2 - fuse.machinefs machinefs rw,user_id=0\n\
        41 40 0:51 / /a\\040b\\134c rw - tmpfs none rw\n\
        bad line\n";

    #[test]
    fn lines_are_parsed_and_paths_unescaped() {
        let mounts = parse(SAMPLE);
        assert_eq!(mounts.len(), 3);
        assert_eq!(mounts[1].path, Path::new("/a b\\c"));
        assert_eq!(mounts[1].kind, "fuse.machinefs");
        assert_eq!(mounts[1].device, "0:50");
    }

    #[test]
    fn the_topmost_of_stacked_mounts_counts() {
        let mounts = parse(SAMPLE);
        assert_eq!(top(&mounts, Path::new("/a b\\c")).unwrap().id, 41);
        assert_eq!(top(&mounts, Path::new("/")).unwrap().id, 22);
        assert_eq!(top(&mounts, Path::new("/none")), None);
    }

    #[test]
    fn the_running_system_is_read() {
        assert!(top(&read().unwrap(), Path::new("/")).is_some());
    }
}
