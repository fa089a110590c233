//! One connection with the kernel: what the threads that serve a mount share.

use super::abi::OutHeader;
use super::interrupt::Interrupts;
use super::mount::Patience;
use crate::errno::Errno;
use crate::tree::ops::{Answer, Cancel};
use crate::tree::ops::{Caller, Files, NodeId, Op, Respond};
use parking_lot::Mutex;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io;
use std::io::IoSlice;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;
use zerocopy::IntoBytes;

/// What one mount's threads share.
pub struct Connection {
    /// The descriptor that was mounted. Requests are read from it only where it cannot be cloned; notices go to it.
    device: Arc<OwnedFd>,
    /// Who answers.
    pub files: Arc<dyn Files>,
    /// Pending requests.
    pub interrupts: Interrupts,
    /// What the kernel never took.
    undelivered: Mutex<Vec<Undelivered>>,
    has_undelivered: AtomicBool,
    /// The readers' descriptors.
    channels: Mutex<Vec<Weak<OwnedFd>>>,
    /// How long an operation for which the kernel holds a lock may be pending.
    pub lock_limit: Duration,
}

/// Something that an answer would have given to the kernel, had the answer found its request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Undelivered {
    /// A hold on a node.
    Hold(NodeId),
    /// An open file.
    File(NodeId, u64),
    /// An open directory.
    Directory(NodeId, u64),
}

impl Connection {
    /// A connection over the mounted descriptor.
    pub fn new(device: Arc<OwnedFd>, files: Arc<dyn Files>, patience: Patience) -> Self {
        Connection {
            device,
            files,
            interrupts: Interrupts::new(patience.after_signal),
            undelivered: Mutex::default(),
            has_undelivered: AtomicBool::new(false),
            channels: Mutex::default(),
            lock_limit: patience.holding_lock,
        }
    }

    /// The descriptor that was mounted.
    pub fn device(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }

    /// Whether the file system is still mounted, or in use. (For poll(2) the device has an error when it is not.)
    pub fn is_connected(&self) -> bool {
        let mut polled = [rustix::event::PollFd::new(&self.device, rustix::event::PollFlags::empty())];
        let now = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
        io::retry_on_intr(|| rustix::event::poll(&mut polled, Some(&now))).is_ok_and(|errors| errors == 0)
    }

    /// Answers a request of which only the number is known. `false`: it has its answer already, or is aborted.
    pub fn send_error_anywhere(&self, unique: u64, errno: Errno) -> bool {
        let channels: Vec<_> = self.channels.lock().iter().filter_map(Weak::upgrade).collect();
        channels.iter().any(|fd| send(fd.as_fd(), unique, -errno.0, [&[], &[], &[]]).is_ok())
    }

    /// Remembers what is to be given back. It is not given back at once, because answers are given while the file
    /// system may hold its own locks.
    pub fn give_back_later(&self, undelivered: impl IntoIterator<Item = Undelivered>) {
        self.undelivered.lock().extend(undelivered);
        self.has_undelivered.store(true, Ordering::Release);
    }

    /// Gives back what the kernel never took. Called with no request at hand.
    pub fn give_back(&self) {
        if !self.has_undelivered.swap(false, Ordering::AcqRel) {
            return;
        }
        let undelivered = std::mem::take(&mut *self.undelivered.lock());
        for what in undelivered {
            guarded("give back", || match what {
                Undelivered::Hold(node) => self.files.forget(node, 1),
                Undelivered::File(node, handle) => {
                    self.files.dispatch(Caller::default(), Op::Release { node, handle, owner: 0 }, Box::new(Unheard))
                }
                Undelivered::Directory(node, handle) => {
                    self.files.dispatch(Caller::default(), Op::ReleaseDir { node, handle }, Box::new(Unheard))
                }
            });
        }
    }
}

/// Runs code of the file system; a panic in it is a defect, but it must not take the thread along: the responder that
/// it held answers EIO while it unwinds.
pub fn guarded(what: &str, run: impl FnOnce()) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(run)) {
        let message = panic
            .downcast_ref::<&str>()
            .copied()
            .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
            .unwrap_or("no message");
        tracing::error!(what, message, "defect: panic in the file system");
    }
}

/// A responder for operations whose answer nobody waits for.
struct Unheard;

impl Respond for Unheard {
    fn respond(self: Box<Self>, _answer: Result<Answer, Errno>) {}

    fn set_cancel(&mut self, _cancel: Arc<dyn Cancel>) -> bool {
        true
    }
}

/// One reader's descriptor. The kernel looks for the request of an answer only in the list of the descriptor through
/// which the request was read, so answers hold on to it.
pub struct Channel {
    fd: Arc<OwnedFd>,
    /// What all channels share.
    pub connection: Arc<Connection>,
}

impl Channel {
    /// A channel over a clone of the connection's descriptor, or over itself where it cannot be cloned.
    pub fn new(connection: Arc<Connection>) -> Self {
        let fd = match clone_device(connection.device()) {
            Ok(clone) => Arc::new(clone),
            Err(error) => {
                tracing::debug!(%error, "/dev/fuse cannot be cloned, readers share one descriptor");
                connection.device.clone()
            }
        };
        connection.channels.lock().push(Arc::downgrade(&fd));
        Channel { fd, connection }
    }

    /// Waits for a request. Gives its length.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        io::read(&*self.fd, buffer)
    }

    /// Writes one answer: a header and up to three parts.
    pub fn send(&self, unique: u64, error: i32, parts: [&[u8]; 3]) -> io::Result<()> {
        send(self.fd.as_fd(), unique, error, parts)
    }
}

/// Writes one message to the kernel: answer (with `unique`) or notice (`unique` 0, its code in `error`).
pub fn send(fd: BorrowedFd<'_>, unique: u64, error: i32, parts: [&[u8]; 3]) -> io::Result<()> {
    let [first, second, third] = parts;
    let length = size_of::<OutHeader>() + first.len() + second.len() + third.len();
    let header = OutHeader { len: u32::try_from(length).map_err(|_| io::Errno::TOOBIG)?, error, unique };
    let slices = [IoSlice::new(header.as_bytes()), IoSlice::new(first), IoSlice::new(second), IoSlice::new(third)];
    io::retry_on_intr(|| io::writev(fd, &slices)).map(|_| ())
}

/// `_IOR(229, 0, uint32_t)`: attaches a fresh descriptor of /dev/fuse to a connection (Linux 4.2).
const FUSE_DEV_IOC_CLONE: libc::c_ulong = 0x8004_e500;

fn clone_device(device: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    use rustix::fs::{Mode, OFlags};
    use std::os::fd::AsRawFd;
    let fresh = rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    let source = device.as_raw_fd() as u32;
    // SAFETY: both descriptors are open; the kernel only reads the four bytes that the pointer names.
    let result = unsafe { libc::ioctl(fresh.as_raw_fd(), FUSE_DEV_IOC_CLONE as _, &raw const source) };
    if result < 0 {
        return Err(io::Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(io::Errno::IO));
    }
    Ok(fresh)
}
