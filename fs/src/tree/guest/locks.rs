//! Locks, which are taken in the guest's kernel.

use super::super::ops::{Answer, Lock, NodeId};
use super::request::{Asking, ok};
use super::{Refused, attr};
use crate::link::{Interrupt, RequestOptions};
use machinefs_protocol::file::{self, FileReply, FileRequest};

/// `F_UNLCK` of fcntl(2).
const F_UNLCK: u32 = libc::F_UNLCK as u32;

fn to_guest(lock: Lock) -> file::Lock {
    file::Lock { start: lock.start, end: lock.end, kind: lock.kind, pid: 0 }
}

impl Asking<'_> {
    pub fn getlock(self, fh: u64, owner: u64, lock: Lock) -> Result<(), Refused> {
        let (options, lock) = (self.query(), to_guest(lock));
        self.send(FileRequest::GetLock { fh, owner, lock }, &[], options, |guest, reply, _| match reply {
            // Its holder's number is the guest's: it says nothing on the host.
            FileReply::Lock(file::Lock { start, end, kind, .. }) if kind <= F_UNLCK && start <= end => {
                Ok(Answer::Lock(Lock { start, end: end.min(attr::MAX_SIZE), kind, pid: 0 }))
            }
            _ => Err(guest.lie("a lock that is none")),
        });
        Ok(())
    }

    pub fn setlock(
        self,
        node: NodeId,
        fh: u64,
        owner: u64,
        lock: Lock,
        flock: bool,
        wait: bool,
    ) -> Result<(), Refused> {
        let node = ok!(self, self.guest.agent_node(node));
        let taken = lock.kind != F_UNLCK;
        // Remembered before it is known to succeed: a close must never leave a lock behind.
        let first = taken && !flock && self.guest.locks.lock().insert((node, owner));
        let options = RequestOptions {
            // A late grant may only be undone when there is no earlier lock that this would undo too.
            unlock_if_late: first || (taken && flock),
            ..if wait && taken { RequestOptions::forever().interrupt(Interrupt::Wait) } else { self.change() }
        };
        let lock = to_guest(lock);
        self.send_simple(FileRequest::SetLock { fh, owner, lock, flock, wait }, &[], options)
    }
}
