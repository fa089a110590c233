//! The last resort: nobody stays in state D because of a request that the file system has forgotten, and no process that
//! is being killed because of one whose interrupt the file system does not obey. docs/KERNEL-LOCKS.md says what waits for what.

use super::connection::{Connection, guarded};
use super::interrupt::Overdue;
use super::mount::Patience;
use crate::errno::Errno;
use crate::link::killed::being_killed;
use crate::tree::ops::Op;
use parking_lot::{Condvar, Mutex};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Looks for overdue requests at least so often.
const TICK: Duration = Duration::from_secs(1);

/// Whether the kernel holds a lock that is not given up by a kill while that operation is pending, so that it has to
/// end even if nobody interrupts it. Left out are those that may rightly take long and that a signal ends: locks,
/// fsync, blocking reads, copying and allocating inside of the guest.
pub fn holds_lock(op: &Op<'_>) -> bool {
    match op {
        Op::Lookup { .. }
        | Op::SetAttr { .. }
        | Op::ReadLink { .. }
        | Op::SymLink { .. }
        | Op::MkNod { .. }
        | Op::MkDir { .. }
        | Op::Unlink { .. }
        | Op::RmDir { .. }
        | Op::Rename { .. }
        | Op::Link { .. }
        | Op::Create { .. }
        | Op::ReadDir { .. }
        | Op::SetXattr { .. }
        | Op::RemoveXattr { .. }
        | Op::Seek { .. } => true,
        // For the page cache: the page is locked, and no signal interrupts a READ for it. Who comes by read(2) and
        // write(2) to a file without page cache may block as long as the file likes.
        Op::Read { owner, .. } | Op::Write { owner, .. } => owner.is_none(),
        Op::GetAttr { .. }
        | Op::Open { .. }
        | Op::TmpFile { .. }
        | Op::Flush { .. }
        | Op::Release { .. }
        | Op::Fsync { .. }
        | Op::OpenDir { .. }
        | Op::ReleaseDir { .. }
        | Op::FsyncDir { .. }
        | Op::StatFs { .. }
        | Op::GetXattr { .. }
        | Op::ListXattr { .. }
        | Op::Fallocate { .. }
        | Op::CopyRange { .. }
        | Op::GetLock { .. }
        | Op::SetLock { .. }
        | Op::Poll { .. }
        | Op::SyncFs { .. } => false,
    }
}

#[derive(Default)]
struct End {
    ended: Mutex<bool>,
    changed: Condvar,
}

/// The thread that looks. It ends when this is dropped.
pub struct Watch {
    end: Arc<End>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Starts it.
    pub fn start(connection: &Arc<Connection>, patience: Patience) -> std::io::Result<Self> {
        let end = Arc::<End>::default();
        let tick = TICK.min(patience.after_signal / 2).min(patience.holding_lock / 2);
        // Weak: the connection must be able to end while this thread sleeps.
        let (connection, until) = (Arc::downgrade(connection), end.clone());
        let thread =
            std::thread::Builder::new().name("fuse-watch".into()).spawn(move || look(&connection, &until, tick));
        Ok(Watch { end, thread: Some(thread?) })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        *self.end.ended.lock() = true;
        self.end.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn look(connection: &Weak<Connection>, end: &End, tick: Duration) {
    let mut ended = end.ended.lock();
    while !*ended {
        end.changed.wait_for(&mut ended, tick);
        let Some(connection) = connection.upgrade() else { break };
        for Overdue { unique, interrupted, cancel } in connection.interrupts.overdue(Instant::now(), being_killed) {
            // The kernel takes one answer: if the file system's comes at this moment, one of the two finds no request,
            // and what it would have given is given back.
            let errno = if interrupted { Errno::EINTR } else { Errno::ETIMEDOUT };
            if connection.send_error_anywhere(unique, errno) {
                tracing::error!(unique, %errno, "defect: a request is overdue, answered in its place");
            }
            if let Some(cancel) = cancel {
                guarded("cancel", || cancel.cancel());
            }
        }
        // Readers do it too, but not before the next request.
        connection.give_back();
    }
}
