//! Notices to the kernel: what it remembers and should not any more.
//!
//! They have a thread of their own, because for some of them the kernel waits for the lock of a directory or of a
//! page, which a pending request may hold; a thread that answers requests would then wait for itself.

use super::abi::{self, notify};
use super::connection::{Connection, send};
use crate::tree::ops::NodeId;
use parking_lot::{Condvar, Mutex};
use rustix::fd::{AsRawFd, BorrowedFd};
use rustix::io;
use std::collections::VecDeque;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use zerocopy::IntoBytes;

/// Notices that may wait.
const CAPACITY: usize = 16 * 1024;

/// Bytes of [`Notice::Store`] that may wait.
const STORE_CAPACITY: usize = 16 * 1024 * 1024;

/// Something that the kernel should know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// Attributes are not right any more, nor are pages from `offset` on: `len` bytes of them, to the end with 0. A
    /// negative `offset` is attributes only.
    InvalidateInode {
        /// The node.
        node: NodeId,
        /// First byte that has changed.
        offset: i64,
        /// How many have.
        len: i64,
    },
    /// A name is not right any more.
    InvalidateEntry {
        /// The directory.
        parent: NodeId,
        /// The name.
        name: Box<[u8]>,
        /// Look it up again at the next use, but leave what is below it and mounted on it (Linux 6.2).
        expire_only: bool,
    },
    /// A name is gone; whoever watches the child with inotify hears of it.
    Delete {
        /// The directory.
        parent: NodeId,
        /// What the name was of.
        child: NodeId,
        /// The name.
        name: Box<[u8]>,
    },
    /// Content, for the page cache.
    Store {
        /// The node.
        node: NodeId,
        /// Where the bytes belong.
        offset: u64,
        /// The bytes, at most 1 MiB.
        data: Vec<u8>,
    },
}

/// Too many notices wait: the kernel is held up by a pending request. What the notice said is lost, so the caller has
/// to live with what the kernel remembers until its time is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("too many notices wait for the kernel")]
pub struct QueueFull;

#[derive(Default)]
struct Waiting {
    notices: VecDeque<Notice>,
    stored: usize,
    closed: bool,
}

#[derive(Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

/// Sends notices, from any thread; never blocks. Notices go out in the order in which they came.
#[derive(Clone)]
pub struct Notifier(Arc<Queue>);

impl Notifier {
    /// Queues a notice. After the end of the session it is dropped, because there is no kernel to tell.
    pub fn send(&self, notice: Notice) -> Result<(), QueueFull> {
        let mut waiting = self.0.waiting.lock();
        if waiting.closed {
            return Ok(());
        }
        let stored = waiting.stored + stored_bytes(&notice);
        if waiting.notices.len() == CAPACITY || stored > STORE_CAPACITY {
            return Err(QueueFull);
        }
        waiting.stored = stored;
        waiting.notices.push_back(notice);
        drop(waiting);
        self.0.changed.notify_one();
        Ok(())
    }

    /// No more notices: the thread ends after the one it is at.
    pub(super) fn close(&self) {
        let mut waiting = self.0.waiting.lock();
        waiting.closed = true;
        waiting.notices.clear();
        drop(waiting);
        self.0.changed.notify_one();
    }

    fn next(&self) -> Option<Notice> {
        let mut waiting = self.0.waiting.lock();
        loop {
            if waiting.closed {
                return None;
            }
            if let Some(notice) = waiting.notices.pop_front() {
                waiting.stored -= stored_bytes(&notice);
                return Some(notice);
            }
            self.0.changed.wait(&mut waiting);
        }
    }
}

fn stored_bytes(notice: &Notice) -> usize {
    match notice {
        Notice::Store { data, .. } => data.len(),
        _ => 0,
    }
}

/// Makes every name that the kernel remembers be looked up again at its next use, and its attributes with it.
///
/// The kernel only counts up a number for it (FUSE_NOTIFY_INC_EPOCH): unlike a [`Notice`] this takes no lock that a
/// pending request could hold, so it needs no thread.
#[derive(Clone)]
pub struct Expirer(Weak<Connection>);

impl Expirer {
    pub(super) fn new(connection: &Arc<Connection>, minor: u32) -> Option<Expirer> {
        (minor >= abi::INC_EPOCH_MINOR).then(|| Expirer(Arc::downgrade(connection)))
    }

    /// Does it; when this returns, the next use of a name asks. Does nothing after the end of the session.
    pub fn expire(&self) {
        let Some(connection) = self.0.upgrade() else { return };
        if let Err(error) = send(connection.device(), 0, notify::INC_EPOCH, [&[], &[], &[]]) {
            tracing::debug!(%error, "the kernel did not expire its names");
        }
    }
}

/// Starts the thread.
pub(super) fn start(connection: &Arc<Connection>) -> std::io::Result<(Notifier, JoinHandle<()>)> {
    let notifier = Notifier(Arc::default());
    let queue = notifier.clone();
    let number = connection.device().as_raw_fd();
    let (ready, is_ready) = std::sync::mpsc::sync_channel::<()>(1);
    let thread = std::thread::Builder::new().name("fuse-notify".into()).spawn(move || {
        keep_only(number);
        let _ = ready.send(());
        while let Some(notice) = queue.next() {
            // SAFETY: the descriptor was open when this thread began; since then the thread has a descriptor table of
            // its own, in which nobody closes it.
            let device = unsafe { BorrowedFd::borrow_raw(number) };
            match deliver(device, &notice) {
                // The kernel did not remember it.
                Ok(()) | Err(io::Errno::NOENT) => {}
                Err(io::Errno::NODEV | io::Errno::NOTCONN | io::Errno::PERM | io::Errno::CONNABORTED) => break,
                Err(error) => tracing::debug!(?notice, %error, "the kernel refused a notice"),
            }
        }
    })?;
    // The number must mean the device until the thread has its own table.
    let _ = is_ready.recv();
    Ok((notifier, thread))
}

/// Gives this thread a descriptor table of its own, with stdin, stdout, stderr and the device.
///
/// When the daemon is killed while the kernel holds this thread (waiting for a lock of a client's pending request),
/// the other threads end, and with them the readers' descriptors: that ends the requests read through them, the lock
/// becomes free, this thread ends too. With a shared table it would keep them open, and all would wait for ever.
fn keep_only(number: i32) {
    let number = number as libc::c_uint;
    let above = number.saturating_add(1);
    // SAFETY: takes no pointers. In the new table this thread uses none of the descriptors that are closed.
    let unshared = unsafe { libc::syscall(libc::SYS_close_range, above, libc::c_uint::MAX, CLOSE_RANGE_UNSHARE) };
    if unshared != 0 {
        tracing::debug!(error = %std::io::Error::last_os_error(), "the notifier shares the descriptor table");
        return;
    }
    if number > 3 {
        // SAFETY: as above; the table is this thread's own by now.
        unsafe { libc::syscall(libc::SYS_close_range, 3 as libc::c_uint, number - 1, 0 as libc::c_uint) };
    }
}

/// See close_range(2).
const CLOSE_RANGE_UNSHARE: libc::c_uint = 1 << 1;

fn deliver(device: BorrowedFd<'_>, notice: &Notice) -> io::Result<()> {
    match notice {
        Notice::InvalidateInode { node, offset, len } => {
            let out = abi::NotifyInvalInodeOut { ino: *node, off: *offset, len: *len };
            send(device, 0, notify::INVAL_INODE, [out.as_bytes(), &[], &[]])
        }
        Notice::InvalidateEntry { parent, name, expire_only } => {
            let flags = if *expire_only { abi::EXPIRE_ONLY } else { 0 };
            let out = abi::NotifyInvalEntryOut { parent: *parent, namelen: name.len() as u32, flags };
            send(device, 0, notify::INVAL_ENTRY, [out.as_bytes(), name, b"\0"])
        }
        Notice::Delete { parent, child, name } => {
            let out = abi::NotifyDeleteOut { parent: *parent, child: *child, namelen: name.len() as u32, padding: 0 };
            send(device, 0, notify::DELETE, [out.as_bytes(), name, b"\0"])
        }
        Notice::Store { node, offset, data } => {
            let out = abi::NotifyStoreOut { node: *node, offset: *offset, size: data.len() as u32, padding: 0 };
            send(device, 0, notify::STORE, [out.as_bytes(), data, &[]])
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_queue_is_bounded() {
        let notifier = Notifier(Arc::default());
        let notice = Notice::InvalidateInode { node: 1, offset: 0, len: 0 };
        for _ in 0..CAPACITY {
            assert_eq!(notifier.send(notice.clone()), Ok(()));
        }
        assert_eq!(notifier.send(notice.clone()), Err(QueueFull));
        assert_eq!(notifier.next(), Some(notice.clone()));
        assert_eq!(notifier.send(notice), Ok(()));
    }

    #[test]
    fn stored_bytes_are_bounded() {
        let notifier = Notifier(Arc::default());
        let store = || Notice::Store { node: 1, offset: 0, data: vec![0; STORE_CAPACITY / 2] };
        assert_eq!(notifier.send(store()), Ok(()));
        assert_eq!(notifier.send(store()), Ok(()));
        assert_eq!(notifier.send(store()), Err(QueueFull));
        assert!(notifier.next().is_some());
        assert_eq!(notifier.send(store()), Ok(()));
    }

    #[test]
    fn a_closed_queue_ends_its_thread() {
        let notifier = Notifier(Arc::default());
        let waiter = std::thread::spawn({
            let notifier = notifier.clone();
            move || notifier.next()
        });
        notifier.close();
        assert_eq!(waiter.join().unwrap(), None);
        assert_eq!(notifier.send(Notice::InvalidateInode { node: 1, offset: 0, len: 0 }), Ok(()));
    }
}
