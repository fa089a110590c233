//! What a daemon that was killed leaves behind: a mount whose every use fails with ENOTCONN.

use super::mount::{KIND, MountError, target_error, unmount_at};
use super::mountinfo;
use rustix::io;
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions};
use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Dead mounts of ours can lie on each other.
const DEEPEST: usize = 16;

/// How long a mount may take to show that somebody serves it.
const PATIENCE: rustix::time::Timespec = rustix::time::Timespec { tv_sec: 2, tv_nsec: 0 };

/// Takes away a mount of our type whose daemon is dead. Gives whether there was one. Whatever else is mounted there,
/// and a mount that somebody serves (or holds, without answering), stays.
///
/// # Errors
/// The directory cannot be reached, or the mount cannot be taken away.
pub fn replace_stale_mount(path: impl AsRef<Path>) -> Result<bool, MountError> {
    let path = resolve(path.as_ref())?;
    for depth in 0..DEEPEST {
        let mounts = mountinfo::read().map_err(|error| MountError::System { call: "/proc/self/mountinfo", error })?;
        let Some(mount) = mountinfo::top(&mounts, &path).filter(|mount| mount.kind == KIND) else {
            return Ok(depth > 0);
        };
        if !is_dead(&path)? {
            return Ok(depth > 0);
        }
        tracing::info!(path = %path.display(), id = mount.id, "unmounting what a dead daemon left");
        let by_fusermount = !rustix::process::geteuid().is_root();
        unmount_at(&path, mount.id, true, by_fusermount)?;
    }
    Ok(true)
}

/// The path without symbolic links and dots. Asks nothing of what is mounted at its end, which may be dead or may not
/// answer: readlink of a mount's root does not reach the file system.
pub fn resolve(path: &Path) -> Result<PathBuf, MountError> {
    let mut path = path.to_path_buf();
    // As many links as the kernel follows.
    for _ in 0..40 {
        let (Some(name), Some(parent)) = (path.file_name(), path.parent()) else {
            return std::fs::canonicalize(&path).map_err(|error| target_error(&path, error));
        };
        let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
        let parent = std::fs::canonicalize(parent).map_err(|error| target_error(&path, error))?;
        let here = parent.join(name);
        match rustix::fs::readlink(&here, Vec::new()) {
            Ok(target) => path = parent.join(std::ffi::OsStr::from_bytes(target.as_bytes())),
            Err(io::Errno::INVAL) => return Ok(here),
            Err(error) => return Err(target_error(&here, error.into())),
        }
    }
    Err(MountError::Target { path, error: io::Errno::LOOP.into() })
}

/// Whether the file system there says ENOTCONN. A child asks: if nobody answers (a stopped daemon), it is the child
/// that waits, and it can be killed.
pub(super) fn is_dead(path: &Path) -> Result<bool, MountError> {
    let path = CString::new(path.as_os_str().as_bytes())
        .map_err(|_| MountError::Target { path: path.to_path_buf(), error: io::Errno::INVAL.into() })?;
    // SAFETY: the child only calls statx and _exit, which may be called after a fork of a process with threads.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: the path ends with a NUL, the buffer is as large as the kernel fills it.
        unsafe {
            let mut buffer = std::mem::MaybeUninit::<libc::statx>::uninit();
            let flags = libc::AT_STATX_FORCE_SYNC | libc::AT_SYMLINK_NOFOLLOW;
            let result =
                libc::statx(libc::AT_FDCWD, path.as_ptr(), flags, libc::STATX_BASIC_STATS, buffer.as_mut_ptr());
            libc::_exit(if result < 0 && *libc::__errno_location() == libc::ENOTCONN { 1 } else { 0 });
        }
    }
    let Some(pid) = Pid::from_raw(child).filter(|_| child > 0) else {
        return Err(MountError::System { call: "fork", error: std::io::Error::last_os_error() });
    };
    let system = |call, error: io::Errno| MountError::system(call, error);
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty()).map_err(|error| system("pidfd_open", error))?;
    let mut polled = [rustix::event::PollFd::new(&pidfd, rustix::event::PollFlags::IN)];
    let ended = rustix::event::poll(&mut polled, Some(&PATIENCE)).map_err(|error| system("poll", error))? > 0;
    if !ended {
        let _ = rustix::process::kill_process(pid, Signal::KILL);
        // Collected when it ends, which a daemon that has taken its request can delay.
        std::thread::spawn(move || {
            let _ = rustix::process::waitpid(Some(pid), WaitOptions::empty());
        });
        return Ok(false);
    }
    let status = rustix::process::waitpid(Some(pid), WaitOptions::empty()).map_err(|error| system("waitpid", error))?;
    Ok(status.and_then(|(_, status)| status.exit_status()) == Some(1))
}
