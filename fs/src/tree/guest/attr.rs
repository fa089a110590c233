//! Attributes: the guest's, checked, as the host shows them.

use super::super::ops;
use super::GuestView;
use super::ids::{Swap, ino};
use machinefs_protocol::file::{self, MAX_NODE, ROOT};

/// Longest file, in bytes: offsets are signed.
pub(super) const MAX_SIZE: u64 = i64::MAX as u64;
const NANOS: u32 = 1_000_000_000;

/// What is wrong with attributes, if anything.
pub(super) fn check(attr: &file::Attr) -> Result<(), &'static str> {
    match attr.mode & libc::S_IFMT {
        libc::S_IFREG
        | libc::S_IFDIR
        | libc::S_IFLNK
        | libc::S_IFIFO
        | libc::S_IFSOCK
        | libc::S_IFCHR
        | libc::S_IFBLK => {}
        _ => return Err("a file of no type"),
    }
    if attr.size > MAX_SIZE { Err("a file that is too large") } else { Ok(()) }
}

/// What is wrong with an entry, if anything.
pub(super) fn check_entry(entry: &file::Entry) -> Result<(), &'static str> {
    if entry.node < ROOT || entry.node >= MAX_NODE {
        return Err("a node out of range");
    }
    check(&entry.attr)
}

fn time(time: file::Time) -> ops::Timestamp {
    ops::Timestamp { secs: time.secs, nanos: if time.nanos < NANOS { time.nanos } else { 0 } }
}

/// The attributes as the host shows them. They were checked.
pub(super) fn to_host(view: &GuestView, users: Swap, groups: Swap, node: u64, attr: &file::Attr) -> ops::Attr {
    let blksize = if attr.blksize.is_power_of_two() { attr.blksize.clamp(512, 1 << 20) } else { 4096 };
    ops::Attr {
        ino: if node == ROOT { view.root_ino } else { ino(view.slot, attr.ino) },
        size: attr.size,
        blocks: attr.blocks.min(MAX_SIZE),
        atime: time(attr.atime),
        mtime: time(attr.mtime),
        ctime: time(attr.ctime),
        mode: attr.mode & (libc::S_IFMT | 0o7777),
        nlink: attr.nlink,
        uid: users.to_host(attr.uid),
        gid: groups.to_host(attr.gid),
        rdev: attr.rdev,
        blksize,
    }
}

/// What setattr changes, in the guest's numbers.
pub(super) fn set_to_guest(set: &ops::SetAttr, users: Swap, groups: Swap) -> file::SetAttr {
    let time = |time: ops::SetTime| match time {
        ops::SetTime::Now => file::SetTime::Now,
        ops::SetTime::At(at) => file::SetTime::At(file::Time { secs: at.secs, nanos: at.nanos }),
    };
    file::SetAttr {
        mode: set.mode,
        uid: set.uid.map(|uid| users.to_guest(uid)),
        gid: set.gid.map(|gid| groups.to_guest(gid)),
        size: set.size,
        atime: set.atime.map(time),
        mtime: set.mtime.map(time),
        kill_suidgid: set.kill_suidgid,
    }
}

/// Figures of the guest's file system, with nothing that programs could divide by zero.
pub(super) fn statfs(stat: &file::StatFs) -> ops::StatFs {
    let unit = |size: u32| if size == 0 { 4096 } else { size };
    ops::StatFs {
        blocks: stat.blocks,
        bfree: stat.bfree.min(stat.blocks),
        bavail: stat.bavail.min(stat.blocks),
        files: stat.files,
        ffree: stat.ffree,
        bsize: unit(stat.bsize),
        frsize: unit(stat.frsize),
        namelen: if stat.namelen == 0 { 255 } else { stat.namelen.min(255) },
    }
}
