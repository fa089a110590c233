//! Errors of the machine layer: a message that says what to do, and the errno it becomes.

use crate::errno::Errno;
use machinefs_backends::BackendError;
use std::fmt;

/// What kind of refusal it is; each is one errno (DESIGN.md 3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Bad grammar, unknown verb or key, bad value, bad name.
    Invalid,
    /// No such machine, template, job.
    NotFound,
    /// The name is taken.
    Exists,
    /// Not allowed to anybody (protected).
    Forbidden,
    /// Not the owner.
    Denied,
    /// Wrong state for that verb.
    Busy,
    /// Somebody has that port of the host.
    InUse,
    /// The machine is stopped, failed or gone.
    Down,
    /// It should be up, but its agent does not answer.
    Unreachable,
    /// Boot, or one operation, past its limit.
    TimedOut,
    /// The host ran out of something.
    NoSpace,
    /// A limit of ours was reached.
    Limit,
    /// A text is too long.
    TooBig,
    /// What one user may have is used up.
    Quota,
    /// This backend cannot do that.
    Unsupported,
    /// A defect of ours.
    Internal,
}

/// An error of the machine layer.
#[derive(Clone, Debug)]
pub struct MachineError {
    reason: Reason,
    message: String,
}

macro_rules! constructors {
    ($($name:ident $reason:ident)*) => {
        $(#[doc = concat!("An error for [`Reason::", stringify!($reason), "`].")]
        pub fn $name(message: impl Into<String>) -> MachineError {
            MachineError { reason: Reason::$reason, message: message.into() }
        })*
    };
}

impl MachineError {
    constructors! {
        invalid Invalid not_found NotFound exists Exists forbidden Forbidden denied Denied busy Busy in_use InUse down Down
        unreachable Unreachable timed_out TimedOut no_space NoSpace limit Limit too_big TooBig quota Quota not_supported Unsupported
        internal Internal
    }

    /// What kind it is.
    pub fn reason(&self) -> Reason {
        self.reason
    }

    /// What the kernel is told.
    pub fn errno(&self) -> Errno {
        match self.reason {
            Reason::Invalid => Errno::EINVAL,
            Reason::NotFound => Errno::ENOENT,
            Reason::Exists => Errno::EEXIST,
            Reason::Forbidden => Errno::EPERM,
            Reason::Denied => Errno::EACCES,
            Reason::Busy => Errno::EBUSY,
            Reason::InUse => Errno::EADDRINUSE,
            Reason::Down => Errno::EHOSTDOWN,
            Reason::Unreachable => Errno::EHOSTUNREACH,
            Reason::TimedOut => Errno::ETIMEDOUT,
            Reason::NoSpace => Errno::ENOSPC,
            Reason::Limit => Errno::EMFILE,
            Reason::TooBig => Errno::E2BIG,
            Reason::Quota => Errno::EDQUOT,
            Reason::Unsupported => Errno::EOPNOTSUPP,
            Reason::Internal => Errno::EIO,
        }
    }
}

impl fmt::Display for MachineError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for MachineError {}

impl From<BackendError> for MachineError {
    fn from(error: BackendError) -> MachineError {
        let message = error.to_string();
        let reason = match error {
            BackendError::Unsupported(_) => Reason::Unsupported,
            BackendError::Image { .. } => Reason::Invalid,
            BackendError::Missing { .. } => Reason::Unsupported,
            BackendError::Program { .. } | BackendError::Unavailable { .. } => Reason::Unreachable,
            BackendError::Unauthorized { .. } => Reason::Forbidden,
            BackendError::Exhausted { .. } => Reason::NoSpace,
            BackendError::Timeout(_) => Reason::TimedOut,
            BackendError::Io { ref source, .. } => match source.raw_os_error() {
                Some(libc::ENOSPC) => Reason::NoSpace,
                Some(libc::EMFILE | libc::ENFILE) => Reason::Limit,
                _ => Reason::Unreachable,
            },
        };
        MachineError { reason, message }
    }
}

impl From<rusqlite::Error> for MachineError {
    fn from(error: rusqlite::Error) -> MachineError {
        let reason = match error.sqlite_error_code() {
            Some(rusqlite::ErrorCode::DiskFull) => Reason::NoSpace,
            _ => Reason::Internal,
        };
        MachineError { reason, message: format!("the state database: {error}") }
    }
}
