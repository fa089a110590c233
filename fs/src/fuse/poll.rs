//! poll(2): what wakes the kernel's pollers.

use super::abi::{self, notify};
use super::connection::{Connection, send};
use crate::tree::ops::PollWaker;
use std::sync::Weak;
use zerocopy::IntoBytes;

/// Wakes those who poll one open file.
///
/// Other notices have a thread of their own, because the kernel takes locks of inodes and pages for them. This one
/// only takes a spinlock and wakes a wait queue (`fuse_notify_poll_wakeup`), so it is sent from where the change
/// happens, and cannot come late because another notice waits.
pub struct Waker {
    connection: Weak<Connection>,
    kh: u64,
}

impl Waker {
    /// For the open file that the kernel calls `kh`.
    pub fn new(connection: Weak<Connection>, kh: u64) -> Self {
        Waker { connection, kh }
    }
}

impl PollWaker for Waker {
    fn wake(&self) {
        let Some(connection) = self.connection.upgrade() else { return };
        let out = abi::NotifyPollOut { kh: self.kh };
        if let Err(error) = send(connection.device(), 0, notify::POLL, [out.as_bytes(), &[], &[]]) {
            tracing::debug!(kh = self.kh, %error, "nobody to wake");
        }
    }
}
