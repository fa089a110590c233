//! What the kernel's mount tables tell.

use std::path::PathBuf;

/// Is there an overlay of a machine's in these mounts (proc_pid_mounts(5)) whose files have no handles?
pub(super) fn lacks_export(mounts: &str) -> bool {
    mounts.lines().map(|line| line.split(' ')).any(|mut fields| {
        let is_overlay = fields.next() == Some("machinefs") && fields.nth(1) == Some("overlay");
        is_overlay && !fields.next().unwrap_or_default().split(',').any(|option| option == "nfs_export=on")
    })
}

/// Where file systems of the type fuse.machinefs that `user`, or anybody, mounted are, by a mountinfo
/// (proc_pid_mountinfo(5)). Who mounted one is the kernel's word (mount.fuse(8), `user_id`).
pub(super) fn fuse_mounts_in(mountinfo: &[u8], user: Option<u32>) -> Vec<PathBuf> {
    use std::os::unix::ffi::OsStringExt;
    let owner = user.map(|user| format!("user_id={user}"));
    let mut found = Vec::new();
    for line in mountinfo.split(|b| *b == b'\n') {
        let fields: Vec<&[u8]> = line.split(|b| *b == b' ').collect();
        let rest = fields.iter().position(|f| *f == b"-").and_then(|i| fields.get(i + 1..)).unwrap_or_default();
        if let [b"fuse.machinefs", _, options] = rest
            && owner.as_ref().is_none_or(|o| options.split(|b| *b == b',').any(|option| option == o.as_bytes()))
            && let Some(at) = fields.get(4)
        {
            found.push(PathBuf::from(std::ffi::OsString::from_vec(unescape(at))));
        }
    }
    found
}

/// Undoes the octal escapes of mountinfo (`\040` for a space).
pub(super) fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        let code = tail.get(..3).and_then(|d| std::str::from_utf8(d).ok());
        match code.and_then(|d| u8::from_str_radix(d, 8).ok()) {
            Some(value) if byte == b'\\' => {
                out.push(value);
                rest = tail.get(3..).unwrap_or_default();
            }
            _ => {
                out.push(byte);
                rest = tail;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_of_machinefs_are_found_whatever_their_name() {
        let text = b"25 1 0:23 / /a\\040b rw shared:1 - fuse.machinefs machinefs rw,user_id=7,group_id=7\n\
            26 1 0:24 / /c rw - ext4 /dev/x rw\n27 1 0:25 / /d rw - fuse.machinefs x rw,user_id=77,allow_other\n";
        assert_eq!(fuse_mounts_in(text, Some(7)), [PathBuf::from("/a b")]);
        assert_eq!(fuse_mounts_in(text, Some(77)), [PathBuf::from("/d")]);
    }
}
