//! Whom new files belong to, and with which mode.

use super::*;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};

const ALICE: Owner = Owner { uid: 1234, gid: 2345 };

fn chmod(path: PathBuf, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

/// Makes one of each kind; gives name, user, group and mode.
fn one_of_each(guest: &Guest, parent: u64, umask: u32) -> Vec<(&'static str, u32, u32, u32)> {
    let owner = ALICE;
    let (created, fh) = guest.create_mode(parent, b"file", 0o666, umask, O_RDWR, owner).unwrap();
    guest.service.release(fh, 0);
    let request = FileRequest::TmpFile { parent, mode: 0o666, umask, flags: O_RDWR, owner };
    let FileReply::Created(tmp, _) = guest.call(request).unwrap().0 else { panic!() };
    let dir = guest.entry(FileRequest::MkDir { parent, name: b"dir", mode: 0o777, umask, owner }).unwrap();
    let fifo = FileRequest::MkNod { parent, name: b"fifo", mode: 0o010666, umask, rdev: 0, owner };
    let fifo = guest.entry(fifo).unwrap();
    let null = FileRequest::MkNod { parent, name: b"null", mode: 0o020666, umask, rdev: 1 << 32 | 3, owner };
    let null = guest.entry(null).unwrap();
    let link = guest.entry(FileRequest::SymLink { parent, name: b"link", target: b"t", owner }).unwrap();
    let all = [("file", created), ("tmp", tmp), ("dir", dir), ("fifo", fifo), ("null", null), ("link", link)];
    all.map(|(name, entry)| (name, entry.attr.uid, entry.attr.gid, entry.attr.mode & 0o7777)).to_vec()
}

#[test]
fn new_files_belong_to_the_caller() {
    let guest = Guest::new();
    let dir = guest.mkdir(ROOT, "d").unwrap();
    // Both where the owner may write, and where the kernel would refuse them: the host has decided already.
    for mode in [0o777, 0o700] {
        chmod(guest.path("d"), mode);
        for (name, uid, gid, mode) in one_of_each(&guest, dir.node, 0o027) {
            let expected = match name {
                "dir" => 0o750,
                "link" => 0o777,
                _ => 0o640,
            };
            assert_eq!((uid, gid, mode), (ALICE.uid, ALICE.gid, expected), "{name}");
        }
        for name in ["file", "fifo", "null", "link"] {
            guest.unlink(dir.node, name).unwrap();
        }
        guest.rmdir(dir.node, "dir").unwrap();
    }
    // The thread is itself again.
    std::fs::write(guest.path("own"), "").unwrap();
    let own = std::fs::metadata(guest.path("own")).unwrap();
    assert_eq!((own.uid(), own.gid()), (0, 0));
}

#[test]
fn what_is_there_keeps_its_owner() {
    let guest = Guest::new();
    guest.file(ROOT, "file", b"");
    let (entry, _) = guest.create_mode(ROOT, b"file", 0o600, 0, O_RDWR, ALICE).unwrap();
    assert_eq!((entry.attr.uid, entry.attr.mode & 0o777), (0, 0o644));
}

#[test]
fn directories_can_pass_their_group_on() {
    let guest = Guest::new();
    let dir = guest.mkdir(ROOT, "d").unwrap();
    chown(guest.path("d"), Some(0), Some(77)).unwrap();
    for mode in [0o2777, 0o2700] {
        chmod(guest.path("d"), mode);
        for (name, uid, gid, mode) in one_of_each(&guest, dir.node, 0o022) {
            assert_eq!((uid, gid), (ALICE.uid, 77), "{name}");
            assert_eq!(mode & 0o2000 != 0, name == "dir", "{name}");
        }
        for name in ["file", "fifo", "null", "link"] {
            guest.unlink(dir.node, name).unwrap();
        }
        guest.rmdir(dir.node, "dir").unwrap();
    }
}

#[test]
fn set_user_id_survives_a_change_of_owner() {
    let guest = Guest::new();
    let dir = guest.mkdir(ROOT, "d").unwrap();
    chmod(guest.path("d"), 0o700);
    let (entry, _) = guest.create_mode(dir.node, b"file", 0o4755, 0, O_RDWR, ALICE).unwrap();
    assert_eq!((entry.attr.uid, entry.attr.mode & 0o7777), (ALICE.uid, 0o4755));
}

#[test]
fn a_file_may_be_created_without_the_right_to_write_it() {
    let guest = Guest::new();
    chmod(guest.path("."), 0o777);
    let (entry, fh) = guest.create_mode(ROOT, b"file", 0o400, 0, O_RDWR | O_EXCL, ALICE).unwrap();
    assert_eq!(entry.attr.mode & 0o777, 0o400);
    assert_eq!(guest.write(fh, 0, b"x").unwrap(), 1);
}

#[test]
fn a_default_acl_takes_the_umasks_place() {
    let guest = Guest::new();
    let dir = guest.mkdir(ROOT, "d").unwrap();
    // Version 2; user::rwx, group::rwx, other::r-x (acl(5), linux/posix_acl_xattr.h).
    let mut acl = vec![2, 0, 0, 0];
    for (tag, permissions) in [(1_u16, 7_u16), (4, 7), (0x20, 5)] {
        acl.extend(tag.to_le_bytes());
        acl.extend(permissions.to_le_bytes());
        acl.extend(u32::MAX.to_le_bytes());
    }
    let request = FileRequest::SetXattr { node: dir.node, name: b"system.posix_acl_default", flags: 0 };
    match guest.service.handle(&request, &acl, &Never) {
        Err(FileError(Errno::OPNOTSUPP)) => {
            println!("skipped: the file system has no ACLs");
            return;
        }
        result => assert_eq!(result.unwrap().0, FileReply::Ok),
    }
    let (entry, _) = guest.create_mode(dir.node, b"file", 0o666, 0o077, O_RDWR, ALICE).unwrap();
    assert_eq!(entry.attr.mode & 0o777, 0o664);
    let made = FileRequest::MkDir { parent: dir.node, name: b"sub", mode: 0o777, umask: 0o077, owner: ALICE };
    assert_eq!(guest.entry(made).unwrap().attr.mode & 0o777, 0o775);
}
