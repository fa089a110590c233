//! What is in files: reading, writing, sizes, holes, copies, attributes, extended attributes.

use super::*;
use machinefs_protocol::file::{SetTime, Time};
use std::io::Write;

fn created(guest: &Guest, name: &str) -> (u64, u64) {
    let (entry, fh) = guest.create(ROOT, name, O_RDWR).unwrap();
    (entry.node, fh)
}

fn count(reply: Result<(FileReply, Vec<u8>), FileError>) -> Result<u32, FileError> {
    match reply?.0 {
        FileReply::Count(count) => Ok(count),
        other => panic!("{other:?}"),
    }
}

#[test]
fn reading_and_writing() {
    let guest = Guest::new();
    let (node, fh) = created(&guest, "file");
    let data: Vec<u8> = (0..1u32 << 20).map(|i| (i * 7 % 251) as u8).collect();
    assert_eq!(guest.write(fh, 0, &data).unwrap(), 1 << 20);
    assert_eq!(guest.read(fh, 0, 1 << 20).unwrap(), data);
    assert_eq!(guest.read(fh, 1000, 24).unwrap(), data[1000..1024]);
    assert_eq!(guest.read(fh, (1 << 20) - 3, 100).unwrap(), data[(1 << 20) - 3..]);
    assert_eq!(guest.read(fh, 1 << 20, 100).unwrap(), b"");
    assert_eq!(guest.read(fh, 0, 0).unwrap(), b"");
    assert_eq!(guest.write(fh, 5, b"").unwrap(), 0);
    assert_eq!(errno(guest.read(fh, 0, (1 << 20) + 1)), Errno::INVAL);
    assert_eq!(errno(guest.read(fh, u64::MAX - 5, 10)), Errno::INVAL);
    assert_eq!(errno(guest.write(fh, u64::MAX - 5, b"x")), Errno::FBIG);
    // Past 4 GiB, sparse.
    assert_eq!(guest.write(fh, 5 << 30, b"far").unwrap(), 3);
    assert_eq!(guest.read(fh, 5 << 30, 100).unwrap(), b"far");
    let attr = guest.attr(node).unwrap();
    assert_eq!(attr.size, (5 << 30) + 3);
    assert!(attr.blocks * 512 < 64 << 20);
    // Handles keep to what they were opened for.
    let read_only = guest.open(node, O_RDONLY).unwrap();
    assert_eq!(errno(guest.write(read_only, 0, b"x")), Errno::BADF);
    let write_only = guest.open(node, O_WRONLY).unwrap();
    assert_eq!(errno(guest.read(write_only, 0, 1)), Errno::BADF);
    for data_only in [false, true] {
        guest.ok(FileRequest::Fsync { fh, data_only }).unwrap();
    }
    guest.ok(FileRequest::SyncFs).unwrap();
}

#[test]
fn appending() {
    let guest = Guest::new();
    let (node, fh) = created(&guest, "file");
    guest.write(fh, 0, b"one").unwrap();
    let append = guest.open(node, O_WRONLY | O_APPEND).unwrap();
    let mut outside = std::fs::OpenOptions::new().append(true).open(guest.path("file")).unwrap();
    outside.write_all(b"two").unwrap();
    // The host's idea of the end is out of date.
    guest.write(append, 3, b"three").unwrap();
    assert_eq!(guest.content(node), b"onetwothree");
}

#[test]
fn create_opens_and_truncates_what_is_there() {
    let guest = Guest::new();
    let file = guest.file(ROOT, "file", b"content");
    assert_eq!(errno(guest.create(ROOT, "file", O_RDWR | O_EXCL)), Errno::EXIST);
    let (entry, fh) = guest.create(ROOT, "file", O_RDWR).unwrap();
    assert_eq!((entry.node, entry.attr.size), (file.node, 7));
    assert_eq!(guest.read(fh, 0, 10).unwrap(), b"content");
    let (entry, _) = guest.create(ROOT, "file", O_RDWR | O_TRUNC).unwrap();
    assert_eq!(entry.attr.size, 0);
    guest.write(fh, 0, b"again").unwrap();
    let truncating = guest.open(file.node, O_WRONLY | O_TRUNC).unwrap();
    assert_eq!(guest.attr(file.node).unwrap().size, 0);
    guest.service.release(truncating, 0);
    guest.mkdir(ROOT, "dir").unwrap();
    assert_eq!(errno(guest.create(ROOT, "dir", O_RDONLY)), Errno::ISDIR);
    // A failed create holds nothing.
    let dir = guest.lookup(ROOT, "dir").unwrap();
    guest.service.forget(&[(dir.node, 2)]);
    assert_eq!(errno(guest.attr(dir.node)), Errno::STALE);
}

#[test]
fn setting_attributes() {
    let guest = Guest::new();
    let (node, fh) = created(&guest, "file");
    guest.write(fh, 0, b"0123456789").unwrap();
    let none = SetAttr::default();
    for (fh, size) in [(None, 4), (Some(fh), 20), (None, 0)] {
        assert_eq!(guest.set(node, fh, SetAttr { size: Some(size), ..none }).unwrap().size, size);
    }
    let read_only = guest.open(node, O_RDONLY).unwrap();
    assert_eq!(guest.set(node, Some(read_only), SetAttr { size: Some(6), ..none }).unwrap().size, 6);
    assert_eq!(errno(guest.set(node, None, SetAttr { size: Some(u64::MAX), ..none })), Errno::INVAL);
    assert_eq!(guest.set(node, None, SetAttr { mode: Some(0o101755), ..none }).unwrap().mode, 0o101755);
    let owned = guest.set(node, None, SetAttr { uid: Some(12), gid: Some(34), ..none }).unwrap();
    assert_eq!((owned.uid, owned.gid), (12, 34));
    assert_eq!(guest.set(node, None, SetAttr { gid: Some(35), ..none }).unwrap().uid, 12);
    assert_eq!(errno(guest.set(node, None, SetAttr { uid: Some(u32::MAX), ..none })), Errno::INVAL);
    let (old, new) = (Time { secs: -5, nanos: 999_999_999 }, Time { secs: 1 << 33, nanos: 1 });
    let times = SetAttr { atime: Some(SetTime::At(old)), mtime: Some(SetTime::At(new)), ..none };
    let attr = guest.set(node, Some(fh), times).unwrap();
    assert_eq!((attr.atime, attr.mtime), (old, new));
    let attr = guest.set(node, None, SetAttr { mtime: Some(SetTime::Now), ..none }).unwrap();
    assert_eq!(attr.atime, old);
    assert!(attr.mtime.secs > 1_600_000_000 && attr.mtime.secs < 1 << 33);
    for nanos in [1_000_000_000, 0x3fff_ffff, 0x3fff_fffe] {
        let bad = SetAttr { atime: Some(SetTime::At(Time { secs: 0, nanos })), ..none };
        assert_eq!(errno(guest.set(node, None, bad)), Errno::INVAL);
    }
    // A symlink has an owner and times of its own, and no mode.
    let target = b"/nowhere";
    let link = guest.entry(FileRequest::SymLink { parent: ROOT, name: b"l", target, owner: ROOT_OWNER }).unwrap();
    let attr = guest.set(link.node, None, SetAttr { uid: Some(7), mtime: Some(SetTime::At(old)), ..none }).unwrap();
    assert_eq!((attr.uid, attr.mtime), (7, old));
    assert_eq!(errno(guest.set(link.node, None, SetAttr { mode: Some(0o600), ..none })), Errno::OPNOTSUPP);
    assert_eq!(errno(guest.set(ROOT, None, SetAttr { size: Some(0), ..none })), Errno::ISDIR);
    assert_eq!(guest.set(ROOT, None, SetAttr { mode: Some(0o711), ..none }).unwrap().mode & 0o7777, 0o711);
}

#[test]
fn set_user_id_goes_when_asked() {
    let guest = Guest::new();
    let (node, fh) = created(&guest, "file");
    let reset = |mode| guest.set(node, None, SetAttr { mode: Some(mode), ..SetAttr::default() }).unwrap();
    let mode = || guest.attr(node).unwrap().mode & 0o7777;
    for (before, after) in [(0o6755, 0o755), (0o4711, 0o711), (0o2745, 0o2745), (0o644, 0o644)] {
        reset(before);
        guest.write_kill(fh, 0, b"x", false).unwrap();
        assert_eq!(mode(), before);
        guest.write_kill(fh, 0, b"x", true).unwrap();
        assert_eq!(mode(), after);
        reset(before);
        let set = SetAttr { size: Some(1), kill_suidgid: true, ..SetAttr::default() };
        assert_eq!(guest.set(node, None, set).unwrap().mode & 0o7777, after);
        reset(before);
        guest.call(FileRequest::Open { node, flags: O_WRONLY | O_TRUNC, kill_suidgid: true }).unwrap();
        assert_eq!(mode(), after);
    }
    // A mode that is set at the same time is the one that counts.
    let set = SetAttr { mode: Some(0o4755), kill_suidgid: true, ..SetAttr::default() };
    assert_eq!(guest.set(node, None, set).unwrap().mode & 0o7777, 0o4755);
}

#[test]
fn extended_attributes() {
    let guest = Guest::new();
    let node = guest.file(ROOT, "file", b"").node;
    let set = |node, name: &[u8], value: &[u8], flags| {
        guest.service.handle(&FileRequest::SetXattr { node, name, flags }, value, &Never).map(|_| ())
    };
    let get = |name: &'static [u8], max| guest.call(FileRequest::GetXattr { node, name, max });
    set(node, b"user.one", b"value", 0).unwrap();
    set(node, b"user.\xff", &[0, 1, 255], 0).unwrap();
    set(node, b"user.empty", b"", 0).unwrap();
    assert_eq!(errno(set(node, b"user.one", b"x", 1)), Errno::EXIST);
    assert_eq!(errno(set(node, b"user.two", b"x", 2)), Errno::NODATA);
    assert_eq!(count(get(b"user.one", 0)).unwrap(), 5);
    assert_eq!(get(b"user.one", 5).unwrap().1, b"value");
    assert_eq!(get(b"user.one", u32::MAX).unwrap().1, b"value");
    assert_eq!(errno(get(b"user.one", 4)), Errno::RANGE);
    assert_eq!(get(b"user.\xff", 100).unwrap().1, [0, 1, 255]);
    assert_eq!(get(b"user.empty", 100).unwrap(), (FileReply::Data, Vec::new()));
    assert_eq!(errno(get(b"user.none", 100)), Errno::NODATA);
    assert_eq!(errno(get(b"user.a\0b", 100)), Errno::INVAL);
    let list = |max| guest.call(FileRequest::ListXattr { node, max });
    let size = count(list(0)).unwrap();
    let mut names: Vec<_> = list(size).unwrap().1.split(|&b| b == 0).map(<[u8]>::to_vec).collect();
    names.sort();
    assert_eq!(names, [&b""[..], b"user.empty", b"user.one", b"user.\xff"]);
    assert_eq!(errno(list(size - 1)), Errno::RANGE);
    guest.ok(FileRequest::RemoveXattr { node, name: b"user.one" }).unwrap();
    assert_eq!(errno(guest.ok(FileRequest::RemoveXattr { node, name: b"user.one" })), Errno::NODATA);
    // On the symlink itself: what it points to is not touched.
    let target = b"file";
    let link = guest.entry(FileRequest::SymLink { parent: ROOT, name: b"l", target, owner: ROOT_OWNER }).unwrap();
    assert_eq!(errno(set(link.node, b"user.one", b"x", 0)), Errno::PERM);
    assert_eq!(errno(get(b"user.one", 0)), Errno::NODATA);
    // A deleted file still has its attributes.
    guest.unlink(ROOT, "file").unwrap();
    guest.evict();
    assert_eq!(get(b"user.\xff", 100).unwrap().1, [0, 1, 255]);
}

#[test]
fn holes() {
    const KEEP_SIZE: u32 = 1;
    const PUNCH_HOLE: u32 = 2;
    let guest = Guest::new();
    let (node, fh) = created(&guest, "file");
    let fallocate = |offset, len, mode| guest.ok(FileRequest::Fallocate { fh, offset, len, mode });
    let seek = |offset, whence| match guest.call(FileRequest::Seek { fh, offset, whence })?.0 {
        FileReply::Offset(offset) => Ok(offset),
        other => panic!("{other:?}"),
    };
    fallocate(0, 1 << 20, 0).unwrap();
    assert_eq!(guest.attr(node).unwrap().size, 1 << 20);
    fallocate(1 << 20, 1 << 20, KEEP_SIZE).unwrap();
    let attr = guest.attr(node).unwrap();
    assert_eq!((attr.size, attr.blocks * 512 >= 2 << 20), (1 << 20, true));
    guest.write(fh, 0, &vec![1; 1 << 20]).unwrap();
    fallocate(64 << 10, 64 << 10, PUNCH_HOLE | KEEP_SIZE).unwrap();
    assert_eq!(guest.read(fh, 64 << 10, 64 << 10).unwrap(), vec![0; 64 << 10]);
    assert_eq!(seek(0, 4).unwrap(), 64 << 10);
    assert_eq!(seek(64 << 10, 3).unwrap(), 128 << 10);
    assert_eq!(errno(seek(2 << 20, 3)), Errno::NXIO);
    assert_eq!(errno(seek(u64::MAX, 3)), Errno::NXIO);
    assert_eq!(errno(seek(0, 0)), Errno::INVAL);
    assert_eq!(errno(fallocate(0, 0, 0)), Errno::INVAL);
    assert_eq!(errno(fallocate(u64::MAX, 1, 0)), Errno::INVAL);
    assert_eq!(errno(fallocate(0, 1, 1 << 31)), Errno::OPNOTSUPP);
}

#[test]
fn copies_stay_inside() {
    let guest = Guest::new();
    let (_, from) = created(&guest, "from");
    let (to_node, to) = created(&guest, "to");
    guest.write(from, 0, b"0123456789").unwrap();
    let copy = |from, from_offset, to, to_offset, len| {
        count(guest.call(FileRequest::CopyRange { from, from_offset, to, to_offset, len }))
    };
    assert_eq!(copy(from, 2, to, 1, 5).unwrap(), 5);
    assert_eq!(guest.content(to_node), b"\x0023456");
    assert_eq!(copy(from, 5, to, 0, 100).unwrap(), 5);
    assert_eq!(copy(from, 10, to, 0, 100).unwrap(), 0);
    assert_eq!(errno(copy(from, 0, from, 5, 6)), Errno::INVAL);
    assert_eq!(copy(from, 0, from, 10, 10).unwrap(), 10);
    assert_eq!(errno(copy(from, u64::MAX, to, 0, 1)), Errno::INVAL);
    let append = guest.open(to_node, O_WRONLY | O_APPEND).unwrap();
    assert_eq!(errno(copy(from, 0, append, 0, 1)), Errno::BADF);
}

/// Between file systems, and from files whose size says nothing.
#[test]
fn copies_by_hand() {
    let dir = tempfile::tempdir().unwrap();
    let mut big = std::fs::File::create(dir.path().join("big")).unwrap();
    big.write_all(&vec![7; 3 << 20]).unwrap();
    let guest = Guest { service: FileService::new(open_root(Path::new("/"))).unwrap(), dir };
    let walk = |path: &Path| {
        let names = path.components().skip(1);
        names.fold(ROOT, |node, name| guest.lookup(node, name.as_os_str().as_encoded_bytes()).unwrap().node)
    };
    let target_dir = walk(guest.dir.path());
    let (target, to) = guest.create(target_dir, "copy", O_RDWR).unwrap();
    let version = guest.open(walk(Path::new("/proc/version")), O_RDONLY).unwrap();
    let expected = std::fs::read("/proc/version").unwrap();
    let request = |from, len| FileRequest::CopyRange { from, from_offset: 0, to, to_offset: 0, len };
    assert_eq!(count(guest.call(request(version, 1 << 20))).unwrap() as usize, expected.len());
    assert_eq!(guest.content(target.node), expected);
    let named = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    std::fs::write(named.path(), vec![9; (2 << 20) + 5]).unwrap();
    let from = guest.open(walk(named.path()), O_RDONLY).unwrap();
    assert_eq!(count(guest.call(request(from, 100 << 20))).unwrap(), (2 << 20) + 5);
    assert_eq!(guest.attr(target.node).unwrap().size, (2 << 20) + 5);
    assert_eq!(count(guest.call(request(from, 7))).unwrap(), 7);
}

#[test]
fn figures_of_the_file_system() {
    let guest = Guest::new();
    let file = guest.file(ROOT, "file", b"");
    for node in [ROOT, file.node] {
        let FileReply::StatFs(figures) = guest.call(FileRequest::StatFs { node }).unwrap().0 else { panic!() };
        assert!(figures.blocks > 0 && figures.bfree <= figures.blocks && figures.frsize >= 512);
        assert!(figures.namelen >= 255);
    }
}
