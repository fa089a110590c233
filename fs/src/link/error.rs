//! Why a request to the agent failed, and which errno that is.

use crate::errno::Errno;
use machinefs_protocol::frame::FrameError;
use std::sync::Arc;
use thiserror::Error;

/// Why a request got no good answer, or why a link is no more. Cheap to clone: one lost link fails many requests.
#[derive(Clone, Debug, Error)]
pub enum LinkError {
    /// The agent says no. The number was checked: it is one that the kernel takes.
    #[error("{errno}{}{message}", if message.is_empty() { "" } else { ": " })]
    Remote {
        /// The guest's errno.
        errno: Errno,
        /// For people; may be empty. The guest wrote it: bounded, without control characters.
        message: Arc<str>,
    },
    /// The request's deadline passed.
    #[error("the agent did not answer in time")]
    TimedOut,
    /// Nothing at all has come from the agent for as long as one operation may take.
    #[error("the agent is silent")]
    Unresponsive,
    /// Whoever asked gave up (a signal).
    #[error("interrupted")]
    Interrupted,
    /// More is queued to the agent, or waited for from it, than the link may hold.
    #[error("too much is waiting for the agent")]
    Overloaded,
    /// The stream ended or broke.
    #[error("the stream to the agent is lost: {0}")]
    Lost(Arc<str>),
    /// This side closed the link.
    #[error("the link is closed")]
    Closed,
    /// The agent broke the protocol.
    #[error("the agent does not keep to the protocol: {0}")]
    Lie(Arc<str>),
    /// The two builds cannot talk to each other.
    #[error(
        "the agent ({build}) speaks protocol {oldest} to {version}, this daemon {} to {}: start the machine anew",
        machinefs_protocol::OLDEST_VERSION,
        machinefs_protocol::VERSION
    )]
    Version {
        /// Newest version of the agent.
        version: u32,
        /// Oldest version of the agent.
        oldest: u32,
        /// The agent's build.
        build: Arc<str>,
    },
    /// What was to be sent is over the protocol's limits.
    #[error("request too large: {0}")]
    TooLarge(Arc<str>),
}

impl LinkError {
    /// The errno a program sees. The one place where errors of the link become numbers.
    pub fn errno(&self) -> Errno {
        match self {
            LinkError::Remote { errno, .. } => *errno,
            LinkError::TimedOut => Errno::ETIMEDOUT,
            LinkError::Interrupted => Errno::EINTR,
            LinkError::Unresponsive
            | LinkError::Overloaded
            | LinkError::Lost(_)
            | LinkError::Closed
            | LinkError::Lie(_)
            | LinkError::Version { .. } => Errno::EHOSTUNREACH,
            LinkError::TooLarge(_) => Errno::E2BIG,
        }
    }

    /// What was to be sent does not fit.
    pub(super) fn too_large(error: &FrameError) -> LinkError {
        LinkError::TooLarge(error.to_string().into())
    }

    /// The agent's failure, checked. ENOSYS never passes: the kernel would remember it for the whole mount. Numbers
    /// from 512 on are refused by the kernel (fs/fuse/dev.c), and would leave the caller waiting.
    pub(super) fn remote(errno: i32, message: &str) -> LinkError {
        let errno = match errno {
            libc::ENOSYS => Errno::EOPNOTSUPP,
            1..=511 => Errno(errno),
            other => return LinkError::Lie(format!("errno {other}").into()),
        };
        LinkError::Remote { errno, message: clean(message, 512).into() }
    }
}

/// Text from the guest, made fit for a log line: at most `limit` characters, none that steers a terminal.
pub(super) fn clean(text: &str, limit: usize) -> String {
    text.chars().take(limit).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errnos_the_kernel_would_not_take_are_lies() {
        for errno in [0, -2, 512, 4096, i32::MIN, i32::MAX] {
            assert!(matches!(LinkError::remote(errno, ""), LinkError::Lie(_)), "{errno}");
            assert_eq!(LinkError::remote(errno, "").errno(), Errno::EHOSTUNREACH);
        }
        assert_eq!(LinkError::remote(libc::ENOENT, "").errno(), Errno::ENOENT);
    }

    #[test]
    fn enosys_never_passes() {
        assert_eq!(LinkError::remote(libc::ENOSYS, "").errno(), Errno::EOPNOTSUPP);
    }

    #[test]
    fn messages_are_cleaned() {
        let LinkError::Remote { message, .. } = LinkError::remote(1, &"\x1b[2J".repeat(1000)) else { unreachable!() };
        assert!(message.chars().count() <= 512 && !message.contains('\x1b'));
    }
}
