//! Removal of what a guest made: trees of any depth, names of any bytes.

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, RenameFlags, openat, renameat_with, unlinkat};
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

const DIR: OFlags = OFlags::DIRECTORY.union(OFlags::RDONLY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Removes everything in `dir`, not `dir` itself; success when `dir` is not there.
///
/// Neither the stack nor the number of descriptors grows with the depth: a subdirectory that is not empty is first
/// moved up into `dir`, under a name of ours. Symbolic links are never followed.
pub(crate) fn remove_contents(dir: &Path) -> io::Result<()> {
    let top = match rustix::fs::open(dir, DIR, Mode::empty()) {
        Ok(top) => top,
        Err(rustix::io::Errno::NOENT) => return Ok(()),
        Err(e) => return Err(e.into()),
    };
    let mut serial = 0_u64;
    // Each pass empties the directories found in `dir`, which moves theirs up; the last pass finds nothing.
    loop {
        let mut found = false;
        for (name, is_dir) in entries(&top)? {
            found = true;
            if is_dir {
                empty(&top, &name, &mut serial)?;
            } else {
                unlink(&top, &name, AtFlags::empty())?;
            }
        }
        if !found {
            return Ok(());
        }
    }
}

fn empty(top: &OwnedFd, name: &CString, serial: &mut u64) -> io::Result<()> {
    if unlinkat(top, name, AtFlags::REMOVEDIR).is_ok() {
        return Ok(());
    }
    // Overlay's work directory has mode 0; its owner may have to change that first.
    let dir = match openat(top, name, DIR, Mode::empty()) {
        Err(rustix::io::Errno::ACCESS) => {
            rustix::fs::chmodat(top, name, Mode::RWXU, AtFlags::empty())?;
            openat(top, name, DIR, Mode::empty())?
        }
        other => other?,
    };
    for (child, is_dir) in entries(&dir)? {
        if !is_dir {
            unlink(&dir, &child, AtFlags::empty())?;
        } else if unlinkat(&dir, &child, AtFlags::REMOVEDIR).is_err() {
            move_up(&dir, &child, top, serial)?;
        }
    }
    drop(dir);
    unlink(top, name, AtFlags::REMOVEDIR)
}

fn move_up(from: &OwnedFd, child: &CString, top: &OwnedFd, serial: &mut u64) -> io::Result<()> {
    loop {
        let name = format!(".removed-{serial}");
        *serial += 1;
        match renameat_with(from, child, top, &name, RenameFlags::NOREPLACE) {
            Ok(()) => return Ok(()),
            Err(rustix::io::Errno::EXIST) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

fn unlink(at: &OwnedFd, name: &CString, flags: AtFlags) -> io::Result<()> {
    match unlinkat(at, name, flags) {
        Ok(()) | Err(rustix::io::Errno::NOENT) => Ok(()),
        Err(e) => Err(io::Error::new(io::Error::from(e).kind(), format!("{}: {e}", name.to_string_lossy()))),
    }
}

fn entries(dir: &OwnedFd) -> io::Result<Vec<(CString, bool)>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(dir.as_fd())? {
        let entry = entry?;
        let name = entry.file_name();
        if name.to_bytes() == b"." || name.to_bytes() == b".." {
            continue;
        }
        let is_dir = match entry.file_type() {
            FileType::Unknown => {
                let stat = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
                FileType::from_raw_mode(stat.st_mode) == FileType::Directory
            }
            kind => kind == FileType::Directory,
        };
        names.push((name.to_owned(), is_dir));
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn deep_and_odd_trees_go_and_links_are_not_followed() {
        let tmp = tempfile::tempdir().unwrap();
        let keep = tmp.path().join("keep");
        fs::create_dir(&keep).unwrap();
        fs::write(keep.join("file"), "x").unwrap();
        let dir = tmp.path().join("dir");
        fs::create_dir(&dir).unwrap();
        std::os::unix::fs::symlink(&keep, dir.join("link")).unwrap();
        fs::create_dir(dir.join(".removed-0")).unwrap();
        fs::write(dir.join(".removed-0/f"), "").unwrap();
        // Deeper than any path can name, and than a stack would bear.
        let mut at = rustix::fs::open(&dir, DIR, Mode::empty()).unwrap();
        for _ in 0..6_000 {
            rustix::fs::mkdirat(&at, "d", Mode::RWXU).unwrap();
            at = openat(&at, "d", DIR, Mode::empty()).unwrap();
        }
        drop(at);
        remove_contents(&dir).unwrap();
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
        assert!(keep.join("file").exists());
        remove_contents(&tmp.path().join("absent")).unwrap();
    }
}
