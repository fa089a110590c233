//! Names: what is refused, what passes as it is, and every way of making, moving and removing one.

use super::*;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, symlink};

const NOREPLACE: u32 = 1;
const EXCHANGE: u32 = 2;

#[test]
fn hostile_names_are_refused_everywhere() {
    let guest = Guest::new();
    let file = guest.file(ROOT, "file", b"");
    let long = [b'x'; 256];
    let bad: [(&[u8], Errno); 9] = [
        (b"", Errno::INVAL),
        (b".", Errno::INVAL),
        (b"..", Errno::INVAL),
        (b"/", Errno::INVAL),
        (b"a/b", Errno::INVAL),
        (b"/etc/passwd", Errno::INVAL),
        (b"../x", Errno::INVAL),
        (b"a\0b", Errno::INVAL),
        (&long, Errno::NAMETOOLONG),
    ];
    for (name, expected) in bad {
        let owner = ROOT_OWNER;
        let requests = [
            FileRequest::Lookup { parent: ROOT, name },
            FileRequest::MkDir { parent: ROOT, name, mode: 0o755, umask: 0, owner },
            FileRequest::MkNod { parent: ROOT, name, mode: 0o644, umask: 0, rdev: 0, owner },
            FileRequest::SymLink { parent: ROOT, name, target: b"t", owner },
            FileRequest::Create { parent: ROOT, name, mode: 0o644, umask: 0, flags: O_RDWR, owner },
            FileRequest::Unlink { parent: ROOT, name },
            FileRequest::RmDir { parent: ROOT, name },
            FileRequest::Rename { parent: ROOT, name, new_parent: ROOT, new_name: b"n", flags: 0 },
            FileRequest::Rename { parent: ROOT, name: b"file", new_parent: ROOT, new_name: name, flags: 0 },
            FileRequest::Link { node: file.node, new_parent: ROOT, new_name: name },
        ];
        for request in requests {
            assert_eq!(errno(guest.call(request.clone())), expected, "{request:?}");
        }
    }
    assert_eq!(std::fs::read_dir(guest.dir.path()).unwrap().count(), 1);
}

#[test]
fn names_are_bytes_of_any_kind() {
    let guest = Guest::new();
    let mut name: Vec<u8> = (1..=255).filter(|&byte| byte != b'/').collect();
    name.push(0xff);
    assert_eq!(name.len(), 255);
    guest.file(ROOT, &name, b"content");
    let found = guest.lookup(ROOT, &name).unwrap();
    assert_eq!(guest.content(found.node), b"content");
    assert!(guest.dir.path().join(OsStr::from_bytes(&name)).exists());
    let other = [0xfe_u8; 255];
    guest.rename((ROOT, &name), (ROOT, &other), 0).unwrap();
    assert_eq!(errno(guest.lookup(ROOT, &name)), Errno::NOENT);
    assert_eq!(guest.lookup(ROOT, other).unwrap().node, found.node);
    guest.unlink(ROOT, other).unwrap();
}

#[test]
fn unknown_nodes_and_handles() {
    let guest = Guest::new();
    for node in [0, 77, u64::MAX] {
        assert_eq!(errno(guest.lookup(node, "x")), Errno::STALE);
        assert_eq!(errno(guest.attr(node)), Errno::STALE);
    }
    assert_eq!(errno(guest.read(9, 0, 1)), Errno::BADF);
    assert_eq!(errno(guest.call(FileRequest::ReadDir { fh: 9, cookie: 0, max: 4096, plus: false })), Errno::BADF);
    assert_eq!(errno(guest.attr_of(FileRequest::GetAttr { node: ROOT, fh: Some(9) })), Errno::BADF);
    guest.service.release(9, 0);
    guest.service.release_dir(9);
    guest.service.forget(&[(0, 1), (ROOT, 5), (99, 1)]);
    assert!(guest.attr(ROOT).is_ok());
    // A handle belongs to its node and its kind.
    let (one, fh) = guest.create(ROOT, "one", O_RDWR).unwrap();
    let two = guest.file(ROOT, "two", b"");
    assert_eq!(errno(guest.attr_of(FileRequest::GetAttr { node: two.node, fh: Some(fh) })), Errno::BADF);
    guest.service.release_dir(fh);
    assert_eq!(guest.attr_of(FileRequest::GetAttr { node: one.node, fh: Some(fh) }).unwrap(), one.attr);
}

#[test]
fn hard_links_are_one_node() {
    let guest = Guest::new();
    let dir = guest.mkdir(ROOT, "dir").unwrap();
    let file = guest.file(ROOT, "a", b"data");
    let linked = guest.link(file.node, dir.node, "b").unwrap();
    assert_eq!((linked.node, linked.attr.nlink, linked.attr.ino), (file.node, 2, file.attr.ino));
    assert_eq!(guest.lookup(ROOT, "a").unwrap().node, file.node);
    assert_eq!(errno(guest.link(file.node, dir.node, "b")), Errno::EXIST);
    assert_eq!(errno(guest.link(dir.node, ROOT, "c")), Errno::PERM);
    guest.unlink(ROOT, "a").unwrap();
    guest.evict();
    // The remaining name was not the last one seen.
    assert_eq!(guest.attr(file.node).unwrap().nlink, 1);
    assert_eq!(guest.lookup(dir.node, "b").unwrap().node, file.node);
    // rename(2) between two names of one file does nothing.
    guest.link(file.node, ROOT, "c").unwrap();
    guest.rename((dir.node, "b"), (ROOT, "c"), 0).unwrap();
    assert_eq!(guest.lookup(dir.node, "b").unwrap().attr.nlink, 2);
}

#[test]
fn symlinks_are_never_followed() {
    let guest = Guest::new();
    let outside = tempfile::tempdir().unwrap();
    std::fs::write(outside.path().join("secret"), "s").unwrap();
    let target = outside.path().as_os_str().as_bytes();
    let made = guest.entry(FileRequest::SymLink { parent: ROOT, name: b"out", target, owner: ROOT_OWNER }).unwrap();
    assert_eq!(made.attr.mode & 0o170000, 0o120000);
    assert_eq!(guest.call(FileRequest::ReadLink { node: made.node }).unwrap().1, target);
    assert_eq!(errno(guest.lookup(made.node, "secret")), Errno::NOTDIR);
    assert_eq!(errno(guest.open(made.node, O_RDONLY)), Errno::LOOP);
    assert_eq!(errno(guest.create(made.node, "x", O_RDWR)), Errno::NOTDIR);
    assert_eq!(errno(guest.set(made.node, None, SetAttr { size: Some(0), ..SetAttr::default() })), Errno::INVAL);
    // A directory that the guest replaces by a symlink is not gone through.
    let dir = guest.mkdir(ROOT, "dir").unwrap();
    let inner = guest.file(dir.node, "secret", b"mine");
    std::fs::rename(guest.path("dir"), guest.path("moved")).unwrap();
    symlink(outside.path(), guest.path("dir")).unwrap();
    guest.evict();
    assert_ne!(guest.lookup(ROOT, "dir").unwrap().node, dir.node);
    assert_eq!(guest.content(inner.node), b"mine");
    // Creating over a symlink opens nothing.
    assert_eq!(errno(guest.create(ROOT, "out", O_RDWR)), Errno::LOOP);
    assert_eq!(errno(guest.create(ROOT, "out", O_RDWR | O_EXCL)), Errno::EXIST);
    let long = vec![b'x'; 4096];
    let request = FileRequest::SymLink { parent: ROOT, name: b"long", target: &long, owner: ROOT_OWNER };
    assert_eq!(errno(guest.entry(request)), Errno::NAMETOOLONG);
    let root_link = guest.call(FileRequest::ReadLink { node: ROOT });
    assert_eq!(errno(root_link), Errno::INVAL);
}

#[test]
fn special_files_are_made_and_never_opened() {
    let guest = Guest::new();
    let mknod = |name: &'static [u8], mode, rdev| {
        guest.entry(FileRequest::MkNod { parent: ROOT, name, mode, umask: 0o022, rdev, owner: ROOT_OWNER })
    };
    let fifo = mknod(b"fifo", 0o010666, 0).unwrap();
    let socket = mknod(b"socket", 0o140666, 0).unwrap();
    let zero = mknod(b"zero", 0o020666, 1 << 32 | 5).unwrap();
    let plain = mknod(b"plain", 0o100666, 0).unwrap();
    let untyped = mknod(b"untyped", 0o666, 0).unwrap();
    assert_eq!(fifo.attr.mode, 0o010644);
    assert_eq!(socket.attr.mode, 0o140644);
    assert_eq!((zero.attr.mode, zero.attr.rdev), (0o020644, 1 << 32 | 5));
    assert_eq!((plain.attr.mode, untyped.attr.mode), (0o100644, 0o100644));
    assert_eq!(errno(mknod(b"dir", 0o040755, 0)), Errno::PERM);
    assert_eq!(errno(mknod(b"link", 0o120777, 0)), Errno::INVAL);
    for flags in [O_RDONLY, O_WRONLY, O_RDWR] {
        assert_eq!(errno(guest.open(fifo.node, flags)), Errno::NXIO);
        assert_eq!(errno(guest.open(socket.node, flags)), Errno::NXIO);
        assert_eq!(errno(guest.open(zero.node, flags)), Errno::ACCESS);
        assert_eq!(errno(guest.create(ROOT, "fifo", flags)), Errno::NXIO);
        assert_eq!(errno(guest.create(ROOT, "zero", flags)), Errno::ACCESS);
    }
    assert_eq!(errno(guest.open(ROOT, O_RDONLY)), Errno::ISDIR);
    assert!(guest.open(plain.node, O_RDWR).is_ok());
}

#[test]
fn rename_moves_the_node() {
    let guest = Guest::without_handles(100);
    let dir = guest.mkdir(ROOT, "dir").unwrap();
    let other = guest.mkdir(ROOT, "other").unwrap();
    let file = guest.file(dir.node, "file", b"1");
    let over = guest.file(other.node, "over", b"2");
    let over_fh = guest.open(over.node, O_RDWR).unwrap();
    assert_eq!(errno(guest.rename((dir.node, "file"), (other.node, "over"), NOREPLACE)), Errno::EXIST);
    guest.rename((dir.node, "file"), (other.node, "over"), 0).unwrap();
    guest.evict();
    assert_eq!(guest.content(file.node), b"1");
    assert_eq!(guest.lookup(other.node, "over").unwrap().node, file.node);
    // The file that was replaced is still there for those who had it open.
    assert_eq!(guest.read(over_fh, 0, 10).unwrap(), b"2");
    guest.write(over_fh, 1, b"3").unwrap();
    assert_eq!(guest.attr(over.node).unwrap().nlink, 0);
    guest.service.release(over_fh, 0);
    guest.evict();
    assert_eq!(guest.attr(over.node).unwrap().size, 2);
    // A directory takes what is in it along.
    guest.rename((ROOT, "other"), (dir.node, "sub"), 0).unwrap();
    guest.evict();
    assert_eq!(guest.content(file.node), b"1");
    assert!(guest.path("dir/sub/over").exists());
    assert_eq!(errno(guest.rename((ROOT, "dir"), (other.node, "in"), 0)), Errno::INVAL);
    assert_eq!(errno(guest.rename((ROOT, "dir"), (ROOT, "x"), 1 << 30)), Errno::INVAL);
    assert_eq!(errno(guest.rename((ROOT, "none"), (ROOT, "x"), 0)), Errno::NOENT);
}

#[test]
fn exchange_swaps_two_nodes() {
    let guest = Guest::without_handles(100);
    let dir = guest.mkdir(ROOT, "dir").unwrap();
    let inner = guest.file(dir.node, "inner", b"i");
    let file = guest.file(ROOT, "file", b"f");
    assert_eq!(errno(guest.rename((ROOT, "file"), (ROOT, "none"), EXCHANGE)), Errno::NOENT);
    guest.rename((ROOT, "file"), (ROOT, "dir"), EXCHANGE).unwrap();
    guest.evict();
    assert_eq!(guest.content(inner.node), b"i");
    assert_eq!(guest.content(file.node), b"f");
    assert_eq!(guest.lookup(ROOT, "dir").unwrap().node, file.node);
    assert_eq!(guest.lookup(ROOT, "file").unwrap().node, dir.node);
}

#[test]
fn whiteout_leaves_a_device() {
    let guest = Guest::new();
    let file = guest.file(ROOT, "file", b"f");
    guest.rename((ROOT, "file"), (ROOT, "moved"), 4).unwrap();
    assert_eq!(guest.lookup(ROOT, "moved").unwrap().node, file.node);
    let left = guest.lookup(ROOT, "file").unwrap();
    assert_eq!((left.attr.mode & 0o170000, left.attr.rdev), (0o020000, 0));
}

#[test]
fn removing() {
    let guest = Guest::new();
    let dir = guest.mkdir(ROOT, "dir").unwrap();
    guest.file(dir.node, "file", b"");
    assert_eq!(errno(guest.rmdir(ROOT, "dir")), Errno::NOTEMPTY);
    assert_eq!(errno(guest.unlink(ROOT, "dir")), Errno::ISDIR);
    assert_eq!(errno(guest.rmdir(dir.node, "file")), Errno::NOTDIR);
    guest.unlink(dir.node, "file").unwrap();
    assert_eq!(errno(guest.unlink(dir.node, "file")), Errno::NOENT);
    guest.rmdir(ROOT, "dir").unwrap();
    guest.evict();
    // Someone may still be in it.
    assert_eq!(guest.attr(dir.node).unwrap().mode & 0o170000, 0o040000);
    assert_eq!(errno(guest.lookup(dir.node, "file")), Errno::NOENT);
    assert_eq!(errno(guest.create(dir.node, "new", O_RDWR)), Errno::NOENT);
}

#[test]
fn unnamed_files_can_be_given_a_name() {
    let guest = Guest::without_handles(100);
    let tmp = |flags| {
        let request = FileRequest::TmpFile { parent: ROOT, mode: 0o666, umask: 0o027, flags, owner: ROOT_OWNER };
        match guest.call(request).map(|reply| reply.0) {
            Ok(FileReply::Created(entry, fh)) => Ok((entry, fh)),
            Ok(other) => panic!("{other:?}"),
            Err(error) => Err(error),
        }
    };
    let (entry, fh) = tmp(O_RDWR).unwrap();
    assert_eq!((entry.attr.nlink, entry.attr.mode), (0, 0o100640));
    guest.write(fh, 0, b"tmp").unwrap();
    assert_eq!(std::fs::read_dir(guest.dir.path()).unwrap().count(), 0);
    assert_eq!(guest.attr(entry.node).unwrap().size, 3);
    guest.service.release(fh, 0);
    // Closed, but held: still the same file.
    guest.evict();
    assert_eq!(guest.attr(entry.node).unwrap().size, 3);
    let (second, second_fh) = tmp(O_RDWR).unwrap();
    guest.write(second_fh, 0, b"second").unwrap();
    let linked = guest.link(second.node, ROOT, "named").unwrap();
    assert_eq!((linked.node, linked.attr.nlink), (second.node, 1));
    guest.service.release(second_fh, 0);
    guest.evict();
    assert_eq!(guest.content(second.node), b"second");
    assert_eq!(std::fs::metadata(guest.path("named")).unwrap().size(), 6);
    let (third, third_fh) = tmp(O_RDWR | O_EXCL).unwrap();
    assert_eq!(errno(guest.link(third.node, ROOT, "never")), Errno::NOENT);
    guest.service.release(third_fh, 0);
    assert_eq!(errno(tmp(O_RDONLY)), Errno::INVAL);
}
