//! A guest's files against an agent that lies in its answers: each lie is one errno, and nothing of it gets through.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod link_support;

use link_support::guest::{Act, DIR, FILE, LINK, attr, entry, page, serve};
use link_support::host::{ask, cost, files, list, lookup, start};
use link_support::{Host, OP_DEADLINE, PATIENCE, connect, resident, until};
use machinefs::errno::Errno;
use machinefs::tree::guest::GuestFiles;
use machinefs::tree::ops::{Answer, Files, Lock, NodeId, Op, SetAttr};
use machinefs_protocol::file::{Attr, DirPage, Entry, FileReply, FileRequest, MAX_NODE, ROOT, StatFs, Time};
use proptest::prelude::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The files of a guest that answers with `lie`.
fn guest(lie: impl FnMut(&FileRequest<'_>) -> Act + Send + 'static) -> (Host, Arc<GuestFiles>) {
    let (host, agent) = connect(OP_DEADLINE);
    let mut lie = lie;
    serve(agent, move |_, _, request| lie(request));
    let files = files(&host.link);
    (host, files)
}

fn look<'a>(files: &GuestFiles, name: &'a [u8]) -> Op<'a> {
    Op::Lookup { parent: files.root(), name }
}

fn file(files: &GuestFiles) -> NodeId {
    lookup(files, files.root(), b"f").unwrap()
}

// --- names and listings -----------------------------------------------------------------------------------------------

#[test]
fn names_that_are_none_never_get_through() {
    let long = vec![b'n'; 256];
    for name in [&b"/"[..], b"a/b", b"../x", b"/etc/passwd", b"nul\0", b"\0", b"", &long] {
        let bad = name.to_vec();
        let (_host, files) = guest(move |request| match request {
            FileRequest::OpenDir { .. } => {
                let (page, body) = page(&[(b"good", 1, Some(entry(FILE))), (&bad, 2, None)], true);
                Act::Say(FileReply::OpenedDir(7, page), body)
            }
            _ => Act::Honest,
        });
        assert_eq!(list(&files, files.root(), 10), Err(Errno::EHOSTUNREACH), "{name:?}");
    }
    for dots in [&b"."[..], b".."] {
        let (_host, files) = guest(move |request| match request {
            FileRequest::OpenDir { .. } => {
                let (page, body) = page(&[(dots, 1, Some(entry(DIR)))], true);
                Act::Say(FileReply::OpenedDir(7, page), body)
            }
            _ => Act::Honest,
        });
        assert_eq!(list(&files, files.root(), 10), Err(Errno::EHOSTUNREACH), "a node for {dots:?}");
    }
    let (_host, files) = guest(|request| match request {
        FileRequest::OpenDir { .. } => {
            let names: [(&[u8], u64, Option<Entry>); 4] =
                [(b".", 1, None), (b"..", 2, None), (b"\xff\n\x1b", 3, None), (&[b'n'; 255], 4, None)];
            let (page, body) = page(&names, true);
            Act::Say(FileReply::OpenedDir(7, page), body)
        }
        _ => Act::Honest,
    });
    assert_eq!(list(&files, files.root(), 10).unwrap().len(), 4, "any bytes are a name");
}

#[test]
fn pages_that_are_none_are_refused() {
    let good = page(&[(b"x", 1, None)], true).1;
    let huge = page(&[(b"x", u64::MAX, None)], true).1;
    let zero = page(&[(b"x", 0, None)], true).1;
    let node = page(&[(b"x", 1, Some(Entry { node: 0, ..entry(FILE) }))], true).1;
    let cases: [(&str, u32, Vec<u8>); 7] = [
        ("more entries than there are", u32::MAX, good.clone()),
        ("fewer", 0, good.clone()),
        ("garbage", 1, vec![0xff; 50]),
        ("nothing", 5, Vec::new()),
        ("a cookie that is no offset", 1, huge),
        ("a cookie that leads back to the beginning", 1, zero),
        ("a node that is none", 1, node),
    ];
    for (what, count, body) in cases {
        let (_host, files) = guest(move |request| match request {
            FileRequest::OpenDir { .. } => {
                Act::Say(FileReply::OpenedDir(7, DirPage { count, end: true }), body.clone())
            }
            _ => Act::Honest,
        });
        assert_eq!(list(&files, files.root(), 10), Err(Errno::EHOSTUNREACH), "{what}");
    }
}

#[test]
fn listings_that_go_round_in_circles_end() {
    // The same entry again and again.
    let (_host, files) = guest(|request| match request {
        FileRequest::OpenDir { .. } => {
            let (page, body) = page(&[(b"x", 5, None)], false);
            Act::Say(FileReply::OpenedDir(7, page), body)
        }
        FileRequest::ReadDir { .. } => {
            let (page, body) = page(&[(b"x", 5, None)], false);
            Act::Say(FileReply::Dir(page), body)
        }
        _ => Act::Honest,
    });
    assert!(list(&files, files.root(), 10).unwrap().len() <= 2);
    // A page that says it is not the last and holds nothing.
    let (_host, files) = guest(|request| match request {
        FileRequest::OpenDir { .. } => Act::Say(FileReply::OpenedDir(7, DirPage { count: 0, end: false }), Vec::new()),
        FileRequest::ReadDir { .. } => Act::Say(FileReply::Dir(DirPage { count: 0, end: false }), Vec::new()),
        _ => Act::Honest,
    });
    assert_eq!(list(&files, files.root(), 10).unwrap().len(), 0);
    // The same cookie twice in a page.
    let (_host, files) = guest(|request| match request {
        FileRequest::OpenDir { .. } => {
            let (page, body) = page(&[(b"x", 5, None), (b"y", 5, None), (b"z", 5, None)], false);
            Act::Say(FileReply::OpenedDir(7, page), body)
        }
        FileRequest::ReadDir { .. } => Act::Say(FileReply::Dir(DirPage { count: 0, end: false }), Vec::new()),
        _ => Act::Honest,
    });
    list(&files, files.root(), 10).unwrap();
}

#[test]
fn a_listing_without_end_takes_one_page_of_memory() {
    let next = AtomicU64::new(1);
    let (_host, files) = guest(move |request| {
        // 200 KiB of names a page, for ever; every second time the cookies go back.
        let names: Vec<([u8; 200], u64)> = (0..1000)
            .map(|_| ([b'n'; 200], next.fetch_add(1, Ordering::SeqCst)))
            .map(|(name, cookie)| (name, if cookie / 1000 % 2 == 0 { cookie } else { 1_000_000 - cookie }))
            .collect();
        let entries: Vec<(&[u8], u64, Option<Entry>)> =
            names.iter().map(|(name, cookie)| (&name[..], *cookie, Some(entry(FILE)))).collect();
        match request {
            FileRequest::OpenDir { .. } => {
                let (page, body) = page(&entries[..200], false);
                Act::Say(FileReply::OpenedDir(7, page), body)
            }
            FileRequest::ReadDir { .. } => {
                let (page, body) = page(&entries, false);
                Act::Say(FileReply::Dir(page), body)
            }
            _ => Act::Honest,
        }
    });
    let before = resident();
    let node = files.root();
    let Ok(Answer::Opened(opened)) = ask(&files, Op::OpenDir { node, flags: 0 }) else { panic!() };
    let (handle, mut cookie) = (opened.handle, 0);
    for _ in 0..2000 {
        match ask(&files, Op::ReadDir { node, handle, cookie, max: 100_000, plus: true, cost }) {
            Ok(Answer::Dir(entries)) => match entries.last() {
                Some(last) => cookie = last.cookie,
                None => break,
            },
            other => panic!("{other:?}"),
        }
    }
    assert!(resident() < before + (64 << 20), "memory grew");
    ask(&files, Op::ReleaseDir { node, handle }).unwrap();
}

// --- attributes and nodes ---------------------------------------------------------------------------------------------

#[test]
fn entries_and_attributes_that_cannot_be_are_refused() {
    let with = |change: fn(&mut Entry)| {
        let mut lie = entry(FILE);
        change(&mut lie);
        lie
    };
    for (what, lie) in [
        ("node 0", with(|entry| entry.node = 0)),
        ("a node over 40 bits", with(|entry| entry.node = MAX_NODE)),
        ("the largest node", with(|entry| entry.node = u64::MAX)),
        ("a size over an offset", with(|entry| entry.attr.size = 1 << 63)),
        ("the largest size", with(|entry| entry.attr.size = u64::MAX)),
        ("no type", with(|entry| entry.attr.mode = 0o644)),
        ("a type that is none", with(|entry| entry.attr.mode = libc::S_IFMT | 0o644)),
    ] {
        let (_host, files) = guest(move |request| match request {
            FileRequest::Lookup { name: b"lie", .. } => Act::Say(FileReply::Entry(lie), Vec::new()),
            FileRequest::GetAttr { .. } => Act::Say(FileReply::Attr(lie.attr), Vec::new()),
            FileRequest::OpenDir { .. } => {
                let (page, body) = page(&[(b"lie", 1, Some(lie))], true);
                Act::Say(FileReply::OpenedDir(7, page), body)
            }
            _ => Act::Honest,
        });
        assert_eq!(ask(&files, look(&files, b"lie")).unwrap_err(), Errno::EHOSTUNREACH, "{what}");
        assert_eq!(list(&files, files.root(), 10), Err(Errno::EHOSTUNREACH), "{what}, listed");
        if !what.contains("node") {
            let node = file(&files);
            assert_eq!(ask(&files, Op::GetAttr { node, handle: None }).unwrap_err(), Errno::EHOSTUNREACH, "{what}");
        }
        file(&files);
    }
}

#[test]
fn attributes_are_made_fit_for_the_host() {
    let (_host, files) = guest(|request| match request {
        FileRequest::GetAttr { .. } => {
            let wild = Attr {
                ino: u64::MAX,
                size: i64::MAX as u64,
                blocks: u64::MAX,
                mtime: Time { secs: i64::MIN, nanos: u32::MAX },
                mode: !libc::S_IFMT | libc::S_IFREG,
                uid: 0,
                gid: u32::MAX,
                rdev: u64::MAX,
                blksize: u32::MAX,
                nlink: 0,
                ..attr(FILE)
            };
            Act::Say(FileReply::Attr(wild), Vec::new())
        }
        FileRequest::StatFs { .. } => Act::Say(FileReply::StatFs(StatFs { bfree: 9, ..StatFs::default() }), Vec::new()),
        _ => Act::Honest,
    });
    let node = file(&files);
    let Ok(Answer::Attr(shown, _)) = ask(&files, Op::GetAttr { node, handle: None }) else { panic!() };
    assert_ne!((shown.uid, shown.gid), (0, 0), "root on the host");
    assert_eq!(shown.mode & !(libc::S_IFMT | 0o7777), 0);
    assert!(shown.blksize <= 1 << 20 && shown.mtime.nanos < 1_000_000_000);
    // The bits above are those of a guest and of this machine's slot.
    assert_eq!(shown.ino >> 39, 0x100_0001, "an inode number of another machine");
    let Ok(Answer::StatFs(figures)) = ask(&files, Op::StatFs { node }) else { panic!() };
    assert!(figures.bsize > 0 && figures.frsize > 0 && figures.namelen > 0 && figures.bfree == 0);
}

#[test]
fn nodes_of_others_are_not_taken() {
    let (_host, files) = guest(|_| Act::Honest);
    let other_boot = file(&files) ^ 1 << 40;
    for node in [0, 1, 2, other_boot, u64::MAX] {
        assert_eq!(ask(&files, Op::GetAttr { node, handle: None }).unwrap_err(), Errno::ESTALE, "{node:#x}");
        files.forget(node, u64::MAX);
    }
    for name in [&b""[..], b".", b"..", b"a/b", b"n\0", &[b'n'; 256]] {
        assert!(ask(&files, look(&files, name)).is_err());
    }
}

#[test]
fn new_files_of_another_type_are_refused() {
    let (_host, files) = guest(|request| match request {
        FileRequest::MkDir { .. } => Act::Say(FileReply::Entry(entry(LINK)), Vec::new()),
        FileRequest::SymLink { .. } => Act::Say(FileReply::Entry(entry(DIR)), Vec::new()),
        FileRequest::MkNod { .. } => Act::Say(FileReply::Entry(entry(LINK)), Vec::new()),
        FileRequest::Create { .. } | FileRequest::TmpFile { .. } => {
            Act::Say(FileReply::Created(entry(LINK), 5), Vec::new())
        }
        _ => Act::Honest,
    });
    let (parent, name) = (files.root(), &b"n"[..]);
    for op in [
        Op::MkDir { parent, name, mode: 0o755, umask: 0 },
        Op::SymLink { parent, name, target: b"x" },
        Op::MkNod { parent, name, mode: libc::S_IFREG, umask: 0, rdev: 0 },
        Op::Create { parent, name, mode: 0o644, umask: 0, flags: 2 },
        Op::TmpFile { parent, mode: 0o644, umask: 0, flags: 2 },
    ] {
        assert_eq!(ask(&files, op).unwrap_err(), Errno::EHOSTUNREACH);
    }
}

// --- open files ---------------------------------------------------------------------------------------------------------

#[test]
fn counts_and_places_beyond_what_was_asked_are_refused() {
    let (_host, files) = guest(|request| match request {
        FileRequest::Open { .. } => Act::Say(FileReply::Opened(1 << 63 | 5), Vec::new()),
        FileRequest::Write { .. } => Act::Say(FileReply::Count(6), Vec::new()),
        FileRequest::CopyRange { .. } => Act::Say(FileReply::Count(u32::MAX), Vec::new()),
        FileRequest::Seek { .. } => Act::Say(FileReply::Offset(u64::MAX), Vec::new()),
        FileRequest::GetXattr { .. } | FileRequest::ListXattr { .. } => Act::Say(FileReply::Count(1 << 20), Vec::new()),
        FileRequest::GetLock { .. } => {
            let lock = machinefs_protocol::file::Lock { start: 9, end: 3, kind: 7, pid: 1 };
            Act::Say(FileReply::Lock(lock), Vec::new())
        }
        _ => Act::Honest,
    });
    let node = file(&files);
    let lock = Lock { start: 0, end: 1, kind: 1, pid: 0 };
    let write = Op::Write { node, handle: 9, offset: 0, data: b"five!", flags: 0, owner: None, kill_suidgid: false };
    let (from, to) = (node, node);
    let copy = Op::CopyRange { from, from_handle: 9, from_offset: 0, to, to_handle: 9, to_offset: 9, len: 9 };
    for op in [
        Op::Open { node, flags: 0, kill_suidgid: false },
        write,
        copy,
        Op::Seek { node, handle: 9, offset: 0, whence: 3 },
        Op::GetXattr { node, name: b"user.x", max: 0 },
        Op::ListXattr { node, max: 0 },
        Op::GetLock { node, handle: 9, owner: 1, lock },
    ] {
        assert_eq!(ask(&files, op).unwrap_err(), Errno::EHOSTUNREACH);
    }
}

#[test]
fn reads_give_no_more_than_was_asked() {
    let (host, files) = guest(|request| match request {
        FileRequest::Read { size, .. } => Act::Say(FileReply::Data, vec![b'x'; *size as usize + 1]),
        _ => Act::Honest,
    });
    let node = file(&files);
    let read = Op::Read { node, handle: 9, offset: 0, size: 4096, flags: 0, owner: None };
    assert_eq!(ask(&files, read).unwrap_err(), Errno::EHOSTUNREACH);
    // That is no slip: nothing more is believed.
    host.lost();
    assert_eq!(ask(&files, look(&files, b"f")).unwrap_err(), Errno::EHOSTUNREACH);
}

#[test]
fn lists_of_attributes_that_are_none_are_refused() {
    let lists = [&b"user.a"[..], b"\0", b"user.a\0\0", b"user.a\0\0user.b\0", b"\0user.a\0"];
    for names in lists {
        let (_host, files) = guest(move |request| match request {
            FileRequest::ListXattr { .. } => Act::Say(FileReply::Data, names.to_vec()),
            _ => Act::Honest,
        });
        let node = file(&files);
        assert_eq!(ask(&files, Op::ListXattr { node, max: 1000 }).unwrap_err(), Errno::EHOSTUNREACH, "{names:?}");
    }
    let (_host, files) = guest(|request| match request {
        FileRequest::GetXattr { .. } => Act::Say(FileReply::Data, b"no acl".to_vec()),
        _ => Act::Honest,
    });
    let node = file(&files);
    let acl = Op::GetXattr { node, name: b"system.posix_acl_access", max: 1000 };
    assert_eq!(ask(&files, acl).unwrap_err(), Errno::EINVAL);
}

// --- symlinks -----------------------------------------------------------------------------------------------------------

/// What is shown of a link right below the root with that target.
fn target(target: Vec<u8>) -> Result<Vec<u8>, Errno> {
    let (_host, files) = guest(move |request| match request {
        FileRequest::ReadLink { .. } => Act::Say(FileReply::Data, target.clone()),
        _ => Act::Honest,
    });
    let node = lookup(&files, files.root(), b"l").unwrap();
    match ask(&files, Op::ReadLink { node })? {
        Answer::Data(shown) => Ok(shown),
        other => panic!("{other:?}"),
    }
}

#[test]
fn links_never_lead_out_of_the_guest() {
    for climbing in ["..", "../", "../etc/passwd", "./../x", "d/../../x", "d/d/../../../x", "//../..//x/../../y"] {
        match target(climbing.into()) {
            Err(errno) => assert_eq!(errno, Errno::EACCES, "{climbing}"),
            Ok(shown) => assert!(!shown.starts_with(b"/") && !shown.windows(2).any(|w| w == b".."), "{climbing}"),
        }
    }
    assert_eq!(target(b"/etc/passwd".to_vec()).unwrap(), b"etc/passwd");
    assert_eq!(target(b"/".to_vec()).unwrap(), b".");
    for none in [&b""[..], b"a\0b", b"\0"] {
        assert_eq!(target(none.to_vec()), Err(Errno::EHOSTUNREACH), "{none:?}");
    }
    assert_eq!(target(vec![b'x'; 5000]), Err(Errno::EHOSTUNREACH), "longer than a path");
}

#[test]
fn a_guest_cannot_talk_a_link_deeper_than_it_lies() {
    // A chain of directories d/d/d/…, in which the guest says of every link that it is the one at the top.
    let (_host, files) = guest(|request| match request {
        FileRequest::Lookup { parent, name: b"d" } => {
            Act::Say(FileReply::Entry(Entry { node: parent + 100, ..entry(DIR) }), Vec::new())
        }
        FileRequest::Lookup { name: b"l", .. } => Act::Say(FileReply::Entry(entry(LINK)), Vec::new()),
        FileRequest::ReadLink { .. } => Act::Say(FileReply::Data, b"../../x".to_vec()),
        _ => Act::Honest,
    });
    let mut parent = files.root();
    for _ in 0..5 {
        parent = lookup(&files, parent, b"d").unwrap();
    }
    let node = lookup(&files, parent, b"l").unwrap();
    let Ok(Answer::Data(shown)) = ask(&files, Op::ReadLink { node }) else { panic!("it lies deep enough") };
    assert_eq!(shown, b"../../x");
    let top = lookup(&files, files.root(), b"l").unwrap();
    assert_eq!(top, node, "one node at two places");
    assert_eq!(ask(&files, Op::ReadLink { node }).unwrap_err(), Errno::EACCES);
}

#[test]
fn the_root_below_itself_and_circles_do_not_hang() {
    let (_host, files) = guest(|request| match request {
        FileRequest::Lookup { name: b"up", .. } => Act::Say(FileReply::Entry(entry(ROOT)), Vec::new()),
        FileRequest::Lookup { parent, name: b"to" } => {
            Act::Say(FileReply::Entry(Entry { node: 10 + (parent + 1) % 2, ..entry(DIR) }), Vec::new())
        }
        FileRequest::Lookup { name: b"l", .. } => Act::Say(FileReply::Entry(entry(LINK)), Vec::new()),
        FileRequest::ReadLink { .. } => Act::Say(FileReply::Data, b"../x".to_vec()),
        _ => Act::Honest,
    });
    let up = lookup(&files, files.root(), b"up").unwrap();
    let mut node = lookup(&files, up, b"to").unwrap();
    for _ in 0..10 {
        node = lookup(&files, node, b"to").unwrap();
    }
    let link = lookup(&files, node, b"l").unwrap();
    // Any answer will do, but one has to come.
    let _ = ask(&files, Op::ReadLink { node: link });
    files.forget(up, u64::MAX);
    files.forget(node, u64::MAX);
}

// --- floods -------------------------------------------------------------------------------------------------------------

#[test]
fn an_agent_that_only_lies_loses_its_link() {
    let (host, files) = guest(|request| match request {
        FileRequest::Lookup { .. } => Act::Say(FileReply::Entry(Entry { node: 0, ..entry(FILE) }), Vec::new()),
        _ => Act::Honest,
    });
    let mut lies = 0;
    while host.link.is_responsive() {
        assert_eq!(ask(&files, look(&files, b"f")).unwrap_err(), Errno::EHOSTUNREACH);
        lies += 1;
        assert!(lies < 10_000);
    }
    host.lost();
}

#[test]
fn nodes_that_are_given_without_end_are_bounded() {
    let next = AtomicU64::new(1000);
    let (_host, files) = guest(move |request| match request {
        // Never the same directory twice, and files that look like those of /proc.
        FileRequest::Lookup { name, .. } => {
            let node = next.fetch_add(1, Ordering::SeqCst);
            let attr = Attr { blocks: 0, ..attr(if name == b"d" { DIR } else { FILE }) };
            Act::Say(FileReply::Entry(Entry { node, generation: 0, attr }), Vec::new())
        }
        _ => Act::Honest,
    });
    let before = resident();
    for _ in 0..50_000 {
        let node = lookup(&files, files.root(), b"d").unwrap();
        files.forget(node, 1);
        let node = lookup(&files, files.root(), b"p").unwrap();
        files.forget(node, 1);
    }
    assert!(resident() < before + (64 << 20), "memory grew");
}

#[test]
fn silence_is_one_deadline_for_each_operation() {
    let (host, files) = guest(|request| match request {
        FileRequest::Lookup { .. } => Act::Honest,
        _ => Act::Silence,
    });
    let node = file(&files);
    let (parent, name) = (files.root(), &b"n"[..]);
    let waiting: Vec<_> = [
        Op::GetAttr { node, handle: None },
        Op::SetAttr { node, handle: None, set: SetAttr::default() },
        Op::MkDir { parent, name, mode: 0o755, umask: 0 },
        Op::Unlink { parent, name },
        Op::Rename { parent, name, new_parent: parent, new_name: b"m", flags: 0 },
        Op::Read { node, handle: 9, offset: 0, size: 10, flags: 0, owner: None },
        Op::Write { node, handle: 9, offset: 0, data: b"x", flags: 0, owner: None, kill_suidgid: false },
        Op::OpenDir { node: parent, flags: 0 },
        Op::StatFs { node },
    ]
    .into_iter()
    .map(|op| start(&files, op))
    .collect();
    for answer in waiting {
        let errno = answer.recv_timeout(PATIENCE).expect("an operation hangs").unwrap_err();
        assert!([Errno::ETIMEDOUT, Errno::EHOSTUNREACH].contains(&errno), "{errno:?}");
    }
    // It is there all the same, and says so when it is asked.
    until("it answers", || host.link.is_responsive());
}

fn any_reply() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..200),
        (0u8..14, proptest::collection::vec(any::<u8>(), 0..80))
            .prop_map(|(variant, rest)| [&[1, variant], &rest[..]].concat()),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Whatever bytes an agent answers with, each operation gets one answer.
    #[test]
    fn any_bytes_are_an_answer(replies in proptest::collection::vec((any_reply(), proptest::collection::vec(any::<u8>(), 0..300)), 1..8)) {
        use machinefs_protocol::frame::Kind;
        let (host, mut agent) = connect(OP_DEADLINE);
        let files = files(&host.link);
        let root = files.root();
        let node = root + 1;
        let thread = std::thread::spawn(move || {
            for (meta, body) in replies {
                let Some(frame) = agent.next_request() else { return };
                if agent.frame(Kind::Reply, 0, frame.header.tag, &meta, &body).is_err() {
                    return;
                }
            }
        });
        let ops = || [
            Op::Lookup { parent: root, name: b"x" },
            Op::GetAttr { node, handle: None },
            Op::ReadLink { node },
            Op::OpenDir { node, flags: 0 },
            Op::Create { parent: root, name: b"x", mode: 0, umask: 0, flags: 0 },
            Op::Read { node, handle: 1, offset: 0, size: 100, flags: 0, owner: None },
            Op::ListXattr { node, max: 200 },
            Op::StatFs { node },
        ];
        let waiting: Vec<_> = ops().into_iter().map(|op| start(&files, op)).collect();
        thread.join().unwrap();
        host.link.close();
        for answer in waiting {
            // One, and not more than one.
            prop_assert!(answer.recv_timeout(PATIENCE).is_ok());
            prop_assert!(answer.recv_timeout(PATIENCE).is_err());
        }
    }
}
