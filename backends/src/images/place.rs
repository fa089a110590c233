//! Where a path of the host leads, found without a step into a machinefs.
//!
//! A daemon that looks at a file below its own mount waits for itself, and a thread that waits there cannot be ended by
//! any signal (see docs/KERNEL-LOCKS.md). So each component is opened by itself with O_PATH, which asks no file system
//! that is mounted there for anything, and its mount is looked at before the next step.

use rustix::fs::{FileType, Mode, OFlags};
use std::collections::{HashSet, VecDeque};
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// As many symbolic links as the kernel follows (path_resolution(7)).
const MAX_LINKS: usize = 40;

/// The path without symbolic links, `.` and `..`.
///
/// # Errors
/// Those of open(2); EXDEV when it leads into a machinefs, ELOOP past 40 symbolic links.
pub(super) fn resolve(path: &Path) -> io::Result<PathBuf> {
    let ours = machinefs_mounts(&std::fs::read("/proc/self/mountinfo")?);
    let step = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let root = || rustix::fs::open("/", step | OFlags::DIRECTORY, Mode::empty());
    let (mut at, mut real, mut links) = (root()?, PathBuf::from("/"), 0);
    let mut left: VecDeque<OsString> = components(path.as_os_str()).collect();
    while let Some(name) = left.pop_front() {
        let next = rustix::fs::openat(&at, name.as_os_str(), step, Mode::empty())?;
        if ours.contains(&mount_id(&next)?) {
            return Err(io::Error::from_raw_os_error(libc::EXDEV));
        }
        if name == ".." {
            real.pop();
            at = next;
            continue;
        }
        if FileType::from_raw_mode(rustix::fs::fstat(&next)?.st_mode) == FileType::Symlink {
            links += 1;
            if links > MAX_LINKS {
                return Err(io::Error::from_raw_os_error(libc::ELOOP));
            }
            let target = OsString::from_vec(rustix::fs::readlinkat(&next, "", Vec::new())?.into_bytes());
            if target.as_bytes().first() == Some(&b'/') {
                (at, real) = (root()?, PathBuf::from("/"));
            }
            for component in components(&target).collect::<Vec<_>>().into_iter().rev() {
                left.push_front(component);
            }
            continue;
        }
        real.push(&name);
        at = next;
    }
    Ok(real)
}

fn components(path: &OsStr) -> impl Iterator<Item = OsString> + '_ {
    let parts = path.as_bytes().split(|byte| *byte == b'/').filter(|part| !matches!(*part, b"" | b"."));
    parts.map(|part| OsStr::from_bytes(part).to_os_string())
}

/// Ids of the mounts of the type fuse.machinefs, by a mountinfo (proc_pid_mountinfo(5)).
fn machinefs_mounts(mountinfo: &[u8]) -> HashSet<u64> {
    let id = |line: &[u8]| {
        let text = std::str::from_utf8(line).ok()?;
        let (mount, kind) = text.split_once(" - ")?;
        kind.starts_with("fuse.machinefs ").then_some(())?;
        mount.split(' ').next()?.parse().ok()
    };
    mountinfo.split(|byte| *byte == b'\n').filter_map(id).collect()
}

fn mount_id(fd: &OwnedFd) -> io::Result<u64> {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()))?;
    let id = info.lines().find_map(|line| line.strip_prefix("mnt_id:")?.trim().parse().ok());
    id.ok_or_else(|| io::Error::other("no mnt_id in fdinfo"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_lead_where_the_kernel_says() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().canonicalize().unwrap();
        std::fs::create_dir_all(base.join("a/b")).unwrap();
        for (link, target) in [("up", "a/b/.."), ("absolute", base.join("a").to_str().unwrap()), ("loop", "loop")] {
            std::os::unix::fs::symlink(target, base.join(link)).unwrap();
        }
        for path in ["a/./b", "up/b", "absolute/b/../b", "a/b/../../../../../../../../usr"] {
            let path = base.join(path);
            assert_eq!(resolve(&path).unwrap(), path.canonicalize().unwrap(), "{}", path.display());
        }
        assert_eq!(resolve(&base.join("loop")).unwrap_err().raw_os_error(), Some(libc::ELOOP));
        assert_eq!(resolve(&base.join("absent")).unwrap_err().raw_os_error(), Some(libc::ENOENT));
    }

    #[test]
    fn only_machinefs_counts() {
        let text =
            b"25 1 0:23 / /a\\040b rw shared:1 - fuse.machinefs machinefs rw\n26 1 0:24 / /c rw - ext4 /dev/x rw\n";
        assert_eq!(machinefs_mounts(text), HashSet::from([25]));
    }
}
