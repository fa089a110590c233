//! Attributes: reading and setting them, symlink targets, figures of a file system.

use super::FileService;
use super::inode::Inodes;
use super::nodes::Node;
use super::open::Handle;
use machinefs_protocol::file::{Attr, SetAttr, SetTime, StatFs, Time};
use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Statx, StatxFlags, StatxTimestamp, Timespec, Timestamps, UTIME_NOW,
    UTIME_OMIT, Uid, chmodat, chownat, fstatfs, ftruncate, readlinkat, statx, utimensat,
};
use rustix::io::Errno;
use rustix::path::DecInt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// Set user id, set group id, and execution by the group, of inode(7).
const S_ISUID: u32 = 0o4000;
const S_ISGID: u32 = 0o2000;
const S_IXGRP: u32 = 0o010;
/// All of a mode but the type.
pub(super) const PERMISSIONS: u32 = 0o7777;

/// The attributes of the file behind a descriptor of any kind, with its birth time.
pub(super) fn stat(fd: BorrowedFd<'_>) -> Result<Statx, Errno> {
    statx(fd, c"", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS | StatxFlags::BTIME)
}

/// The device a file lies on, as one number.
pub(super) fn device_of(stx: &Statx) -> u64 {
    u64::from(stx.stx_dev_major) << 32 | u64::from(stx.stx_dev_minor)
}

fn time_of(time: StatxTimestamp) -> Time {
    Time { secs: time.tv_sec, nanos: time.tv_nsec }
}

/// Attributes as the host wants them.
pub(super) fn attr_of(stx: &Statx, inodes: &Inodes) -> Attr {
    Attr {
        ino: inodes.number(device_of(stx), stx.stx_ino),
        size: stx.stx_size,
        blocks: stx.stx_blocks,
        atime: time_of(stx.stx_atime),
        mtime: time_of(stx.stx_mtime),
        ctime: time_of(stx.stx_ctime),
        mode: stx.stx_mode.into(),
        nlink: stx.stx_nlink,
        uid: stx.stx_uid,
        gid: stx.stx_gid,
        rdev: u64::from(stx.stx_rdev_major) << 32 | u64::from(stx.stx_rdev_minor),
        blksize: stx.stx_blksize,
    }
}

impl FileService {
    /// A descriptor of the node: its open handle's, if one is named (a deleted file may have nothing else).
    fn target(&self, id: u64, fh: Option<u64>) -> Result<(Arc<Node>, Arc<OwnedFd>), Errno> {
        if let Some(handle) = fh.and_then(|fh| self.handles.get(fh)) {
            let (node, fd) = match handle {
                Handle::File(file) => (file.node.clone(), file.fd.clone()),
                Handle::Dir(dir) => (dir.node.clone(), dir.fd.clone()),
            };
            return if node.id == id { Ok((node, fd)) } else { Err(Errno::BADF) };
        }
        if fh.is_some() {
            return Err(Errno::BADF);
        }
        let node = self.node(id)?;
        let fd = self.descriptor(&node)?;
        Ok((node, fd))
    }

    pub(super) fn get_attr(&self, id: u64, fh: Option<u64>) -> Result<Attr, Errno> {
        let (_, fd) = self.target(id, fh)?;
        Ok(attr_of(&stat(fd.as_fd())?, &self.inodes))
    }

    pub(super) fn set_attr(&self, id: u64, fh: Option<u64>, set: &SetAttr) -> Result<Attr, Errno> {
        let (node, fd) = self.target(id, fh)?;
        let times = times_of(set)?;
        if let Some(size) = set.size {
            self.truncate(&node, &fd, fh, size)?;
        }
        if set.uid.is_some() || set.gid.is_some() {
            // -1 means "leave it" to the kernel, and is nobody's number.
            if set.uid == Some(u32::MAX) || set.gid == Some(u32::MAX) {
                return Err(Errno::INVAL);
            }
            chownat(&fd, c"", set.uid.map(Uid::from_raw), set.gid.map(Gid::from_raw), AtFlags::EMPTY_PATH)?;
        }
        if let Some(mode) = set.mode {
            self.set_mode(&node, &fd, mode)?;
        } else if set.kill_suidgid {
            self.kill_suidgid(&node, &fd)?;
        }
        if let Some(times) = times {
            utimensat(&fd, c"", &times, AtFlags::EMPTY_PATH)?;
        }
        Ok(attr_of(&stat(fd.as_fd())?, &self.inodes))
    }

    fn truncate(&self, node: &Node, fd: &OwnedFd, fh: Option<u64>, size: u64) -> Result<(), Errno> {
        match node.kind {
            FileType::RegularFile => {}
            FileType::Directory => return Err(Errno::ISDIR),
            _ => return Err(Errno::INVAL),
        }
        if let Some(Handle::File(file)) = fh.and_then(|fh| self.handles.get(fh))
            && file.writable
        {
            return ftruncate(&file.fd, size);
        }
        ftruncate(self.reopen(fd, OFlags::WRONLY | OFlags::NONBLOCK)?, size)
    }

    pub(super) fn set_mode(&self, node: &Node, fd: &OwnedFd, mode: u32) -> Result<(), Errno> {
        // Older kernels let this through, with effects that differ between file systems.
        if node.kind == FileType::Symlink {
            return Err(Errno::OPNOTSUPP);
        }
        // By way of /proc, since fchmodat2(2) is young; the link leads to the file itself and nowhere else.
        chmodat(&self.proc_fd, DecInt::from_fd(fd), Mode::from_raw_mode(mode & PERMISSIONS), AtFlags::empty())
    }

    /// Does what the kernel does at a write by an ordinary user: set-user-id goes, and set-group-id where it means
    /// that and not mandatory locking. The kernel does not do it for us, since we are root.
    pub(super) fn kill_suidgid(&self, node: &Node, fd: &OwnedFd) -> Result<(), Errno> {
        if node.kind != FileType::RegularFile {
            return Ok(());
        }
        let mode = u32::from(stat(fd.as_fd())?.stx_mode) & PERMISSIONS;
        let mut kept = mode & !S_ISUID;
        if mode & S_IXGRP != 0 {
            kept &= !S_ISGID;
        }
        if kept == mode { Ok(()) } else { self.set_mode(node, fd, kept) }
    }

    pub(super) fn read_link(&self, id: u64) -> Result<Vec<u8>, Errno> {
        let node = self.node(id)?;
        if node.kind != FileType::Symlink {
            return Err(Errno::INVAL);
        }
        let fd = self.descriptor(&node)?;
        Ok(readlinkat(&fd, c"", Vec::with_capacity(256))?.into_bytes())
    }

    pub(super) fn stat_fs(&self, id: u64) -> Result<StatFs, Errno> {
        let node = self.node(id)?;
        let figures = fstatfs(self.descriptor(&node)?)?;
        let narrow = |value: i64| u32::try_from(value).unwrap_or(u32::MAX);
        // Old file systems leave f_frsize 0; the counts are then in f_bsize.
        let frsize = if figures.f_frsize > 0 { figures.f_frsize } else { figures.f_bsize };
        Ok(StatFs {
            blocks: figures.f_blocks,
            bfree: figures.f_bfree,
            bavail: figures.f_bavail,
            files: figures.f_files,
            ffree: figures.f_ffree,
            bsize: narrow(figures.f_bsize),
            frsize: narrow(frsize),
            namelen: narrow(figures.f_namelen),
        })
    }
}

/// The times to set; EINVAL for nanoseconds that are none (some of those mean something else to the kernel).
fn times_of(set: &SetAttr) -> Result<Option<Timestamps>, Errno> {
    if set.atime.is_none() && set.mtime.is_none() {
        return Ok(None);
    }
    let time = |time: Option<SetTime>| match time {
        None => Ok(Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT }),
        Some(SetTime::Now) => Ok(Timespec { tv_sec: 0, tv_nsec: UTIME_NOW }),
        Some(SetTime::At(Time { nanos: 1_000_000_000.., .. })) => Err(Errno::INVAL),
        Some(SetTime::At(Time { secs, nanos })) => Ok(Timespec { tv_sec: secs, tv_nsec: nanos.into() }),
    };
    Ok(Some(Timestamps { last_access: time(set.atime)?, last_modification: time(set.mtime)? }))
}
