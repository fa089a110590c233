//! Notices: what the kernel remembers, and forgets when it is told.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod fuse_support;

use fuse_support::fake::{Content, Fake};
use fuse_support::{Mount, eventually, shell};
use machinefs::fuse::Notice;
use machinefs::tree::ops::{NodeId, Opened, ROOT};
use std::time::Duration;

/// A mount with a file whose name, attributes and pages the kernel keeps for an hour.
fn cached() -> (Mount, NodeId) {
    let fake = Fake::new();
    let node = fake.add(ROOT, b"f", Content::File(b"old".to_vec()));
    fake.set(node, |node| {
        node.attr_ttl = Duration::from_secs(3600);
        node.entry_ttl = Duration::from_secs(3600);
        node.opened = Opened { keep_cache: true, ..Opened::default() };
    });
    (Mount::new(fake), node)
}

fn read(mount: &Mount) -> String {
    shell(&format!("cat '{}'", mount.path("f").display())).0
}

#[test]
fn pages_are_kept_until_the_inode_is_invalidated() {
    require_fuse!();
    let (mount, node) = cached();
    assert_eq!(read(&mount), "old");
    mount.fake.set(node, |node| node.content = Content::File(b"new".to_vec()));
    assert_eq!(read(&mount), "old");
    mount.session().notifier().send(Notice::InvalidateInode { node, offset: 0, len: 0 }).unwrap();
    eventually("new content", || read(&mount) == "new");
}

#[test]
fn names_are_kept_until_the_entry_is_invalidated() {
    require_fuse!();
    for expire_only in [false, true] {
        let (mount, _) = cached();
        assert_eq!(read(&mount), "old");
        mount.fake.set(ROOT, |root| root.content = Content::Directory(Default::default()));
        assert_eq!(read(&mount), "old");
        let notice = Notice::InvalidateEntry { parent: ROOT, name: b"f".as_slice().into(), expire_only };
        mount.session().notifier().send(notice).unwrap();
        eventually("no such file", || read(&mount).contains("No such file"));
    }
}

#[test]
fn a_deleted_name_is_gone() {
    require_fuse!();
    let (mount, node) = cached();
    assert_eq!(read(&mount), "old");
    mount.fake.set(ROOT, |root| root.content = Content::Directory(Default::default()));
    let notice = Notice::Delete { parent: ROOT, child: node, name: b"f".as_slice().into() };
    mount.session().notifier().send(notice).unwrap();
    eventually("no such file", || read(&mount).contains("No such file"));
}

#[test]
fn stored_content_is_read_without_asking() {
    require_fuse!();
    let (mount, node) = cached();
    assert_eq!(shell(&format!("stat -c %s '{}'", mount.path("f").display())).0, "3\n");
    mount.session().notifier().send(Notice::Store { node, offset: 0, data: b"pre".to_vec() }).unwrap();
    // The first read may be before the notice; its pages are then replaced.
    eventually("stored content", || read(&mount) == "pre");
    assert!(mount.fake.transfers.load(std::sync::atomic::Ordering::SeqCst) <= 1);
}

#[test]
fn unknown_nodes_and_names_do_no_harm() {
    require_fuse!();
    let (mount, node) = cached();
    let notifier = mount.session().notifier();
    for name in [b"nothing".as_slice(), &[0xff; 255]] {
        notifier.send(Notice::InvalidateEntry { parent: ROOT, name: name.into(), expire_only: false }).unwrap();
        notifier.send(Notice::Delete { parent: 77, child: 78, name: name.into() }).unwrap();
    }
    notifier.send(Notice::InvalidateInode { node: 999, offset: -1, len: 0 }).unwrap();
    notifier.send(Notice::InvalidateEntry { parent: ROOT, name: Box::default(), expire_only: false }).unwrap();
    mount.fake.set(node, |node| node.content = Content::File(b"new".to_vec()));
    notifier.send(Notice::InvalidateInode { node, offset: 0, len: 0 }).unwrap();
    eventually("new content", || read(&mount) == "new");
}
