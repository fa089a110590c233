//! Users and groups, read from passwd(5) and group(5) directly: a static program has no name service.

use super::{JobError, read_bounded};
use std::path::Path;

/// Largest passwd or group file that is read, in bytes.
const MAX_FILE: u64 = 16 * 1024 * 1024;

/// Who a job runs as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// User number.
    pub uid: u32,
    /// Group number.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// The name, or the number where there is none.
    pub name: Vec<u8>,
    /// Home directory.
    pub home: Vec<u8>,
    /// Login shell.
    pub shell: Vec<u8>,
}

/// Finds `user[:group]`, names or numbers, in the files below `etc`. Empty means root. With a group given there are
/// no supplementary groups, as docker has it. A number need not be in the files.
///
/// # Errors
/// [`JobError::NoUser`], or an unreadable file.
pub fn find(etc: &Path, wanted: &[u8]) -> Result<User, JobError> {
    let mut parts = wanted.splitn(2, |byte| *byte == b':');
    let name = parts.next().filter(|name| !name.is_empty()).unwrap_or(b"root");
    let group = parts.next();
    let unknown = || JobError::NoUser(String::from_utf8_lossy(wanted).into_owned());
    let passwd = read_or_empty(&etc.join("passwd"))?;
    let listed = lines(&passwd).find(|fields| field(fields, 0) == name);
    let listed = listed.or_else(|| {
        let uid = number(name)?;
        lines(&passwd).find(|fields| number(field(fields, 2)) == Some(uid))
    });
    let mut user = match &listed {
        Some(fields) => User {
            uid: number(field(fields, 2)).ok_or_else(unknown)?,
            gid: number(field(fields, 3)).ok_or_else(unknown)?,
            groups: Vec::new(),
            name: field(fields, 0).to_vec(),
            home: or(field(fields, 5), b"/"),
            shell: or(field(fields, 6), b"/bin/sh"),
        },
        None => {
            let uid = if name == b"root" { 0 } else { number(name).ok_or_else(unknown)? };
            let home = if uid == 0 { b"/root".as_slice() } else { b"/" };
            User { uid, gid: 0, groups: Vec::new(), name: name.to_vec(), home: home.into(), shell: b"/bin/sh".into() }
        }
    };
    let groups = read_or_empty(&etc.join("group"))?;
    if let Some(group) = group {
        let listed =
            lines(&groups).find(|fields| field(fields, 0) == group).and_then(|fields| number(field(&fields, 2)));
        user.gid = listed.or_else(|| number(group)).ok_or_else(unknown)?;
    } else if listed.is_some() {
        user.groups = lines(&groups)
            .filter(|fields| field(fields, 3).split(|byte| *byte == b',').any(|member| member == user.name))
            .filter_map(|fields| number(field(&fields, 2)))
            .collect();
    }
    if !user.groups.contains(&user.gid) {
        user.groups.push(user.gid);
    }
    Ok(user)
}

fn read_or_empty(path: &Path) -> Result<Vec<u8>, JobError> {
    match read_bounded(path, MAX_FILE) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        result => result.map_err(|error| JobError::io("the user database", &error)),
    }
}

fn lines(text: &[u8]) -> impl Iterator<Item = Vec<&[u8]>> {
    text.split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty() && !line.starts_with(b"#"))
        .map(|line| line.split(|byte| *byte == b':').collect())
}

fn field<'a>(fields: &[&'a [u8]], at: usize) -> &'a [u8] {
    fields.get(at).copied().unwrap_or_default()
}

/// A user or group number; the highest means "no change" to the kernel and is none.
fn number(text: &[u8]) -> Option<u32> {
    std::str::from_utf8(text).ok()?.parse().ok().filter(|number| *number != u32::MAX)
}

fn or(value: &[u8], default: &[u8]) -> Vec<u8> {
    if value.is_empty() { default.to_vec() } else { value.to_vec() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn etc() -> tempfile::TempDir {
        let etc = tempfile::tempdir().unwrap();
        let passwd = b"root:x:0:0:root:/root:/bin/bash\n# a comment\ndev:x:1000:1001:,,,:/home/dev:/bin/zsh\nbroken:x:no:1::/:\n\xff\xfe:x:7:7::/x:\n";
        std::fs::write(etc.path().join("passwd"), passwd).unwrap();
        std::fs::write(etc.path().join("group"), "root:x:0:\ndev:x:1001:\ndocker:x:999:other,dev\nsudo:x:27:dev\n")
            .unwrap();
        etc
    }

    fn find(wanted: &[u8]) -> Result<User, JobError> {
        super::find(etc().path(), wanted)
    }

    #[test]
    fn names_and_numbers() {
        let root = find(b"").unwrap();
        assert_eq!(
            (root.uid, root.gid, root.home.as_slice(), root.groups.as_slice()),
            (0, 0, b"/root".as_slice(), [0].as_slice())
        );
        let dev = find(b"dev").unwrap();
        assert_eq!((dev.uid, dev.gid, dev.shell.as_slice()), (1000, 1001, b"/bin/zsh".as_slice()));
        assert_eq!(dev.groups, [999, 27, 1001]);
        assert_eq!(find(b"1000").unwrap(), dev);
        let with_group = find(b"dev:sudo").unwrap();
        assert_eq!((with_group.gid, with_group.groups.as_slice()), (27, [27].as_slice()));
        assert_eq!(find(b"dev:4321").unwrap().gid, 4321);
        let number = find(b"4711").unwrap();
        assert_eq!((number.uid, number.gid, number.home.as_slice()), (4711, 0, b"/".as_slice()));
        assert_eq!(find(b"\xff\xfe").unwrap().uid, 7);
    }

    #[test]
    fn unknown_ones() {
        for wanted in [b"nobodyhere".as_slice(), b"dev:nogroup", b"broken", b"4294967295", b"-1", b"dev:"] {
            assert!(matches!(find(wanted), Err(JobError::NoUser(_))), "{wanted:?}");
        }
        let empty = tempfile::tempdir().unwrap();
        assert_eq!(super::find(empty.path(), b"").unwrap().home, b"/root");
        // A user database nobody ever writes into must not hold up the agent.
        let (fifo, mode) = (rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR);
        rustix::fs::mknodat(rustix::fs::CWD, empty.path().join("passwd"), fifo, mode, 0).unwrap();
        assert_eq!(super::find(empty.path(), b"").unwrap().home, b"/root");
    }
}
