//! Handles: opening and closing files.

use super::dir::OpenDir;
use super::locks::wait_for;
use super::nodes::Node;
use super::{Cancelled, FileService};
use rustix::fs::{FileType, FlockOperation, OFlags, flock};
use rustix::io::Errno;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// What a handle's number stands for.
#[derive(Clone)]
pub(super) enum Handle {
    File(Arc<OpenFile>),
    Dir(Arc<OpenDir>),
}

/// An open regular file.
pub(super) struct OpenFile {
    pub(super) node: Arc<Node>,
    pub(super) fd: Arc<OwnedFd>,
    pub(super) writable: bool,
    /// Whether a flock(2) lock was ever asked for through it.
    pub(super) flocked: AtomicBool,
    _slot: Slot,
}

/// One of the handles there may be, for as long as it lives.
pub(super) struct Slot(Arc<AtomicUsize>);

impl Slot {
    pub(super) fn new(count: &Arc<AtomicUsize>) -> Slot {
        count.fetch_add(1, Ordering::Relaxed);
        Slot(count.clone())
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Of the host's flags, those that concern the guest's open file, and never one that would wait (`O_NONBLOCK`).
/// `O_DIRECT` goes: its alignment rules are for the host's buffers.
pub(super) fn io_flags(flags: u32) -> OFlags {
    let kept = OFlags::ACCMODE | OFlags::APPEND | OFlags::TRUNC | OFlags::SYNC | OFlags::DSYNC | OFlags::NOATIME;
    (OFlags::from_bits_retain(flags) & kept) | OFlags::NONBLOCK | OFlags::CLOEXEC
}

/// How often to try an open that a file lease delays: with the longest pause, a minute. The kernel breaks a lease
/// after 45 s (/proc/sys/fs/lease-break-time).
const LEASE_ATTEMPTS: u32 = 3000;

impl FileService {
    pub(super) fn open(&self, id: u64, flags: u32, kill_suidgid: bool, cancel: &dyn Cancelled) -> Result<u64, Errno> {
        self.open_node(&self.node(id)?, flags, kill_suidgid, cancel)
    }

    /// Opens a regular file. Nothing else is ever opened: FIFOs, sockets and devices act on the host's kernel.
    pub(super) fn open_node(
        &self,
        node: &Arc<Node>,
        flags: u32,
        kill_suidgid: bool,
        cancel: &dyn Cancelled,
    ) -> Result<u64, Errno> {
        match node.kind {
            FileType::RegularFile => {}
            FileType::Directory => return Err(Errno::ISDIR),
            FileType::Symlink => return Err(Errno::LOOP),
            FileType::CharacterDevice | FileType::BlockDevice => return Err(Errno::ACCESS),
            _ => return Err(Errno::NXIO),
        }
        self.check_room()?;
        let place = self.descriptor(node)?;
        let how = io_flags(flags);
        let fd = Arc::new(wait_for(cancel, LEASE_ATTEMPTS, || self.reopen(&place, how))?);
        if kill_suidgid && how.contains(OFlags::TRUNC) {
            self.kill_suidgid(node, &fd)?;
        }
        Ok(self.add_file(node.clone(), fd, flags))
    }

    /// EMFILE when there are as many handles as there may be.
    pub(super) fn check_room(&self) -> Result<(), Errno> {
        if self.open_handles.load(Ordering::Relaxed) < self.max_handles { Ok(()) } else { Err(Errno::MFILE) }
    }

    /// A handle for a descriptor that is open for reading or writing.
    pub(super) fn add_file(&self, node: Arc<Node>, fd: Arc<OwnedFd>, flags: u32) -> u64 {
        self.note_open(&node, &fd);
        let file = OpenFile {
            node,
            fd,
            writable: (flags & OFlags::ACCMODE.bits()) != OFlags::RDONLY.bits(),
            flocked: AtomicBool::new(false),
            _slot: Slot::new(&self.open_handles),
        };
        self.add_handle(Handle::File(Arc::new(file)))
    }

    pub(super) fn add_handle(&self, handle: Handle) -> u64 {
        let fh = self.next_handle.fetch_add(1, Ordering::Relaxed);
        self.handles.insert(fh, handle);
        fh
    }

    /// Lets the node be found by its open handle.
    pub(super) fn note_open(&self, node: &Node, fd: &Arc<OwnedFd>) {
        let mut place = node.place();
        place.open.retain(|open| open.strong_count() > 0);
        place.open.push(Arc::downgrade(fd));
    }

    /// The open file of that handle; EBADF.
    pub(super) fn file(&self, fh: u64) -> Result<Arc<OpenFile>, Errno> {
        match self.handles.get(fh) {
            Some(Handle::File(file)) => Ok(file),
            _ => Err(Errno::BADF),
        }
    }

    /// Closes a file handle: its flock(2) lock ends, and the POSIX locks of that owner on the file do.
    pub fn release(&self, fh: u64, owner: u64) {
        if self.file(fh).is_err() {
            return;
        }
        let Some(Handle::File(file)) = self.handles.remove(fh) else { return };
        if file.flocked.load(Ordering::Relaxed) {
            // Another worker may still be using the descriptor; the lock must not wait for it.
            let _ = flock(&file.fd, FlockOperation::Unlock);
        }
        self.locks.drop_owner(file.node.id, owner);
        self.closed(&file.node, &file.fd);
    }

    /// Closes a directory handle.
    pub fn release_dir(&self, fh: u64) {
        if let Some(Handle::Dir(_)) = self.handles.get(fh)
            && let Some(Handle::Dir(dir)) = self.handles.remove(fh)
        {
            self.closed(&dir.node, &dir.fd);
        }
    }

    /// A handle of the node with that descriptor is about to go.
    fn closed(&self, node: &Arc<Node>, fd: &Arc<OwnedFd>) {
        let mut place = node.place();
        place.open.retain(|open| open.strong_count() > 0 && !std::ptr::eq(open.as_ptr(), Arc::as_ptr(fd)));
        if !place.open.is_empty() {
            return;
        }
        let unreachable = place.link.is_none() && place.pin.is_none() && node.is_held();
        drop(place);
        self.locks.drop_node(node.id);
        if unreachable {
            // The handle was the only way to a file that has lost its name.
            let pin = self.cache.take(node).or_else(|| self.reopen(fd, OFlags::PATH).ok().map(Arc::new));
            node.place().pin = pin;
        }
    }
}
