//! Directory pages.

use super::*;
use std::collections::{BTreeMap, BTreeSet};

fn open_dir(guest: &Guest, node: u64, max: u32, plus: bool) -> (u64, DirPage, Vec<Listed>) {
    match guest.call(FileRequest::OpenDir { node, max, plus }).unwrap() {
        (FileReply::OpenedDir(fh, page), body) => {
            assert!(body.len() <= max as usize);
            (fh, page, decode(page, &body))
        }
        other => panic!("{other:?}"),
    }
}

fn read_dir(guest: &Guest, fh: u64, cookie: u64, max: u32, plus: bool) -> (DirPage, Vec<Listed>) {
    match guest.call(FileRequest::ReadDir { fh, cookie, max, plus }).unwrap() {
        (FileReply::Dir(page), body) => {
            assert!(body.len() <= max as usize);
            (page, decode(page, &body))
        }
        other => panic!("{other:?}"),
    }
}

fn list(guest: &Guest, node: u64, max: u32, plus: bool) -> Vec<Listed> {
    let (fh, mut page, mut all) = open_dir(guest, node, max, plus);
    while !page.end {
        let (next, entries) = read_dir(guest, fh, all.last().unwrap().cookie, max, plus);
        page = next;
        all.extend(entries);
    }
    let (page, entries) = read_dir(guest, fh, all.last().unwrap().cookie, max, plus);
    assert!(page.end && entries.is_empty());
    guest.service.release_dir(fh);
    all
}

#[test]
fn a_small_directory() {
    let guest = Guest::new();
    let dir = guest.mkdir(ROOT, "dir").unwrap();
    let file = guest.file(ROOT, [0xff, b'f'], b"");
    let target = b"x";
    guest.entry(FileRequest::SymLink { parent: ROOT, name: b"link", target, owner: ROOT_OWNER }).unwrap();
    let (_, page, entries) = open_dir(&guest, ROOT, 4096, false);
    assert!(page.end);
    let by_name: BTreeMap<_, _> = entries.into_iter().map(|entry| (entry.name.clone(), entry)).collect();
    let names: Vec<_> = by_name.keys().map(Vec::as_slice).collect();
    assert_eq!(names, [&b"."[..], b"..", b"dir", b"link", b"\xfff"]);
    assert_eq!((by_name[&b"dir"[..]].ino, by_name[&b"dir"[..]].kind), (dir.attr.ino, libc::DT_DIR));
    assert_eq!((by_name[&b"\xfff"[..]].ino, by_name[&b"\xfff"[..]].kind), (file.attr.ino, libc::DT_REG));
    assert_eq!(by_name[&b"link"[..]].kind, libc::DT_LNK);
    assert_eq!(by_name[&b"."[..]].ino, guest.attr(ROOT).unwrap().ino);
    assert!(by_name.values().all(|entry| entry.entry.is_none()));
}

#[test]
fn a_page_with_attributes_holds_each_node_once() {
    let guest = Guest::new();
    let file = guest.file(ROOT, "file", b"content");
    guest.mkdir(ROOT, "dir").unwrap();
    for entry in list(&guest, ROOT, 4096, true) {
        let dots = entry.name == b"." || entry.name == b"..";
        assert_eq!(entry.entry.is_none(), dots);
        if entry.name == b"file" {
            assert_eq!(entry.entry.unwrap(), Entry { attr: guest.attr(file.node).unwrap(), ..file });
        }
    }
    guest.service.forget(&[(file.node, 1)]);
    assert!(guest.attr(file.node).is_ok());
    guest.service.forget(&[(file.node, 1)]);
    assert_eq!(errno(guest.attr(file.node)), Errno::STALE);
}

#[test]
fn many_entries_in_small_pages() {
    let guest = Guest::new();
    let long = "n".repeat(240);
    let expected: BTreeSet<Vec<u8>> = (0..700).map(|i| format!("{long}{i}").into_bytes()).collect();
    for name in &expected {
        std::fs::File::create(guest.path(std::str::from_utf8(name).unwrap())).unwrap();
    }
    for (max, plus) in [(300, false), (1000, true), (4096, false), (4096, true), (1 << 30, false), (1 << 30, true)] {
        let names: Vec<_> = list(&guest, ROOT, max, plus).into_iter().map(|entry| entry.name).collect();
        assert_eq!(names.len(), 702, "no entry twice");
        let names: BTreeSet<_> = names.into_iter().filter(|name| name.len() > 2).collect();
        assert_eq!(names, expected);
    }
    assert_eq!(errno(guest.call(FileRequest::OpenDir { node: ROOT, max: 10, plus: false })), Errno::INVAL);
    guest.service.reset();
    assert_eq!(guest.service.table.living(), 1);
}

#[test]
fn cookies_stay_good_in_a_directory_of_100_000() {
    let guest = Guest::new();
    let dir = open_root(guest.dir.path());
    for i in 0..100_000 {
        let name = format!("entry-{i}");
        rustix::fs::mknodat(&dir, name, rustix::fs::FileType::RegularFile, Mode::RUSR, 0).unwrap();
    }
    let (fh, first_page, first) = open_dir(&guest, ROOT, 64 << 10, false);
    assert!(!first_page.end);
    let mut all = first.clone();
    let mut page = first_page;
    let mut removed = 0;
    while !page.end {
        // What was listed goes, something comes: the rest of the listing does not care.
        for entry in all[removed..].iter().step_by(50) {
            if entry.name.len() > 2 {
                guest.unlink(ROOT, &entry.name).unwrap();
            }
        }
        removed = all.len();
        let (next, entries) = read_dir(&guest, fh, all.last().unwrap().cookie, 64 << 10, false);
        page = next;
        all.extend(entries);
    }
    let names: BTreeSet<_> = all.iter().map(|entry| entry.name.clone()).collect();
    assert_eq!((names.len(), all.len()), (100_002, 100_002));
    // Back to any place, on the same handle and on another.
    let middle = all.len() / 2;
    let (other, ..) = open_dir(&guest, ROOT, 4096, false);
    for handle in [fh, other] {
        let (_, again) = read_dir(&guest, handle, all[middle].cookie, 4096, false);
        let expected = all[middle + 1..].iter().map(|entry| &entry.name);
        let present: Vec<_> = expected.filter(|name| guest.lookup(ROOT, name).is_ok()).take(again.len()).collect();
        assert_eq!(again.iter().map(|entry| &entry.name).collect::<Vec<_>>(), present);
    }
    let (_, from_start) = read_dir(&guest, fh, 0, 64 << 10, false);
    assert!(from_start.len() > 1000);
    assert_eq!(errno(guest.call(FileRequest::ReadDir { fh, cookie: u64::MAX, max: 4096, plus: false })), Errno::INVAL);
}

#[test]
fn a_removed_directory_is_empty() {
    let guest = Guest::new();
    let dir = guest.mkdir(ROOT, "dir").unwrap();
    let (fh, ..) = open_dir(&guest, dir.node, 4096, false);
    guest.rmdir(ROOT, "dir").unwrap();
    let (page, entries) = read_dir(&guest, fh, 0, 4096, true);
    assert!(page.end && entries.is_empty());
    guest.ok(FileRequest::Fsync { fh, data_only: false }).unwrap();
    guest.evict();
    assert_eq!(guest.attr_of(FileRequest::GetAttr { node: dir.node, fh: Some(fh) }).unwrap().nlink, 0);
    let file = guest.file(ROOT, "file", b"");
    assert_eq!(errno(guest.call(FileRequest::OpenDir { node: file.node, max: 4096, plus: true })), Errno::NOTDIR);
}
