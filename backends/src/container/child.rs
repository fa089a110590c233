//! A child process that does a few system calls in other namespaces or with another user's rights, and ends. What a
//! thread of the daemon may not do (enter a user namespace) or cannot undo (leave a mount namespace) is done so.

use rustix::io::Errno;
use std::io;
use std::os::fd::AsRawFd;
use std::process::abort;

/// Which step failed, and how.
pub(super) type Failed = (&'static str, Errno);

/// Names the step of a result.
pub(super) trait Step<T> {
    fn step(self, what: &'static str) -> Result<T, Failed>;
}

impl<T> Step<T> for Result<T, Errno> {
    fn step(self, what: &'static str) -> Result<T, Failed> {
        self.map_err(|e| (what, e))
    }
}

/// Runs `work` in a forked child; its number is the answer.
///
/// # Safety
/// Between fork and end the child may only make direct system calls: other threads of the daemon may have held any lock,
/// the allocator's too. So `work` must not allocate, free or panic.
pub(super) unsafe fn in_child(work: impl FnOnce() -> Result<u64, Failed>) -> io::Result<u64> {
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    // SAFETY: a clone(2) with a null stack is a fork; what the child does is the caller's word, and what is below.
    let pid = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) };
    if pid == 0 {
        let (code, value, label) = match work() {
            Ok(value) => (0, value, ""),
            Err((label, error)) => (error.raw_os_error(), 0, label),
        };
        let mut message = [0_u8; 128];
        let parts = [&code.to_ne_bytes()[..], &value.to_ne_bytes()[..], label.as_bytes()];
        let bytes = parts.into_iter().flatten();
        let length = message.iter_mut().zip(bytes).map(|(to, from)| *to = *from).count();
        // SAFETY: system calls on a buffer of this stack. Its destructors are not for the child to run.
        unsafe {
            libc::write(write.as_raw_fd(), message.as_ptr().cast(), length);
            libc::syscall(libc::SYS_exit_group, 0);
        }
        abort();
    }
    drop(write);
    let Some(pid) = i32::try_from(pid).ok().filter(|p| *p > 0).and_then(rustix::process::Pid::from_raw) else {
        return Err(io::Error::last_os_error());
    };
    let mut message = Vec::new();
    let heard = io::Read::read_to_end(&mut std::fs::File::from(read), &mut message);
    rustix::io::retry_on_intr(|| rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty()))?;
    heard?;
    let code = message.get(..4).and_then(|c| c.try_into().ok()).map(i32::from_ne_bytes);
    let value = message.get(4..12).and_then(|v| v.try_into().ok()).map(u64::from_ne_bytes);
    match (code, value) {
        (Some(0), Some(value)) => Ok(value),
        (Some(code), _) => {
            let label = String::from_utf8_lossy(message.get(12..).unwrap_or_default()).into_owned();
            Err(Told { label, error: io::Error::from_raw_os_error(code) }.into())
        }
        _ => Err(io::Error::other("a child process ended without a word")),
    }
}

/// An error with the step it was in; the number is kept for [`errno`].
#[derive(Debug, thiserror::Error)]
#[error("{label}: {error}")]
struct Told {
    label: String,
    error: io::Error,
}

impl From<Told> for io::Error {
    fn from(told: Told) -> Self {
        Self::new(told.error.kind(), told)
    }
}

/// The number of an error of the system, also of one that came from a child.
pub(super) fn errno(error: &io::Error) -> Option<i32> {
    let inner = || error.get_ref()?.downcast_ref::<Told>()?.error.raw_os_error();
    error.raw_os_error().or_else(inner)
}

/// What a child said, as an error of the system without the step, so that its number is seen by all.
pub(super) fn plain(error: io::Error) -> (String, io::Error) {
    match errno(&error) {
        Some(code) => (error.to_string(), io::Error::from_raw_os_error(code)),
        None => (String::new(), error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_child_did_and_where_it_failed_is_told() {
        // SAFETY: constants.
        assert_eq!(unsafe { in_child(|| Ok(7)) }.unwrap(), 7);
        // SAFETY: constants.
        let error = unsafe { in_child(|| Err(("the second step", Errno::XDEV))) }.unwrap_err();
        assert_eq!(errno(&error), Some(libc::EXDEV));
        let (text, error) = plain(error);
        assert!(text.starts_with("the second step: "), "{text}");
        assert_eq!(error.raw_os_error(), Some(libc::EXDEV));
    }
}
