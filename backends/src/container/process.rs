//! A process by its identity. A pid alone means nothing: the kernel gives it to another process as soon as the first
//! one is reaped. Here a process is its pid, the time it started and the boot of the host, and it is signalled and
//! waited for through a pidfd only.

use crate::Usage;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// A process that can be found again after a restart of the daemon (`run.json` in the machine's directory).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Identity {
    /// Its number.
    pub(super) pid: u32,
    /// When it started, in clock ticks since boot: field 22 of proc_pid_stat(5).
    pub(super) start: u64,
    /// Which boot of the host: /proc/sys/kernel/random/boot_id.
    pub(super) boot: String,
}

/// State letter and start time of a process; `None` when there is none of that number.
pub(super) fn stat(pid: u32) -> io::Result<Option<(char, u64)>> {
    let text = match fs::read(format!("/proc/{pid}/stat")) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
        Err(e) => return Err(e),
    };
    let text = String::from_utf8_lossy(&text);
    // The name in parentheses may hold anything, also parentheses: the fields begin after the last one.
    let fields = text.rsplit_once(") ").map_or("", |(_, rest)| rest);
    let mut fields = fields.split(' ');
    let state = fields.next().and_then(|f| f.chars().next());
    let start = fields.nth(18).and_then(|f| f.parse().ok());
    match (state, start) {
        (Some(state), Some(start)) => Ok(Some((state, start))),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, format!("/proc/{pid}/stat cannot be understood"))),
    }
}

/// What the processes in the pid namespace of `init` use together, where no control group counts it: processor time of
/// those that live and of those that were waited for, resident memory (shared pages count more than once).
pub(super) fn usage_of_namespace(init: u32) -> io::Result<Usage> {
    let namespace = fs::read_link(format!("/proc/{init}/ns/pid"))?;
    let tick = 1_000_000 / rustix::param::clock_ticks_per_second().max(1);
    let page = rustix::param::page_size() as u64;
    let mut usage = Usage::default();
    for entry in fs::read_dir("/proc")? {
        let path = entry?.path();
        if fs::read_link(path.join("ns/pid")).ok().as_ref() != Some(&namespace) {
            continue;
        }
        let text = fs::read(path.join("stat")).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).into_owned();
        let fields: Vec<u64> = text
            .rsplit_once(") ")
            .map(|(_, rest)| rest.split(' ').map(|f| f.trim().parse().unwrap_or(0)).collect())
            .unwrap_or_default();
        // Fields 14 to 17 (utime, stime, cutime, cstime) and 24 (rss); the state, field 3, is the first here.
        usage.cpu_micros += fields.iter().skip(11).take(4).sum::<u64>() * tick;
        usage.memory += fields.get(21).unwrap_or(&0) * page;
        usage.pids += 1;
    }
    Ok(usage)
}

/// The number of this boot of the host.
pub(super) fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// Opens a pidfd of `pid` and its identity, read after the pidfd pinned it; `None` when it has ended.
pub(super) fn open_pid(pid: u32) -> io::Result<Option<(OwnedFd, Identity)>> {
    let Some(raw) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return Ok(None) };
    let fd = match pidfd_open(raw, PidfdFlags::empty()) {
        Ok(fd) => fd,
        Err(rustix::io::Errno::SRCH | rustix::io::Errno::INVAL) => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    let Some((state, start)) = stat(pid)? else { return Ok(None) };
    // If the pinned process had ended before the file was read, the file may be about another one of that number.
    if matches!(state, 'Z' | 'X') || has_ended(fd.as_fd())? {
        return Ok(None);
    }
    Ok(Some((fd, Identity { pid, start, boot: boot_id()? })))
}

impl Identity {
    /// A pidfd of this very process; `None` when it has ended.
    pub(super) fn open(&self) -> io::Result<Option<OwnedFd>> {
        match open_pid(self.pid)? {
            Some((fd, found)) if found == *self => Ok(Some(fd)),
            _ => Ok(None),
        }
    }
}

/// Has the process of this pidfd ended?
pub(super) fn has_ended(pidfd: BorrowedFd<'_>) -> io::Result<bool> {
    wait_end(pidfd, Duration::ZERO)
}

/// Waits for the end of the process of this pidfd; false when the time is over.
pub(super) fn wait_end(pidfd: BorrowedFd<'_>, limit: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout =
            Timespec { tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX), tv_nsec: left.subsec_nanos().into() };
        let mut fds = [PollFd::from_borrowed_fd(pidfd, PollFlags::IN)];
        match poll(&mut fds, Some(&timeout)) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// SIGKILL; success when it has ended already.
pub(super) fn kill(pidfd: BorrowedFd<'_>) -> io::Result<()> {
    match pidfd_send_signal(pidfd, Signal::KILL) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_process_has_an_identity_that_is_found_again() {
        let (_, id) = open_pid(std::process::id()).unwrap().unwrap();
        assert!(id.open().unwrap().is_some());
        let other = Identity { start: id.start + 1, ..id.clone() };
        assert!(other.open().unwrap().is_none(), "another start time is another process");
        let other = Identity { boot: "x".into(), ..id };
        assert!(other.open().unwrap().is_none(), "another boot is another process");
    }

    #[test]
    fn end_of_a_child_is_seen() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let (fd, id) = open_pid(child.id()).unwrap().unwrap();
        assert!(!has_ended(fd.as_fd()).unwrap());
        kill(fd.as_fd()).unwrap();
        assert!(wait_end(fd.as_fd(), Duration::from_secs(10)).unwrap());
        assert!(id.open().unwrap().is_none(), "a zombie has ended");
        child.wait().unwrap();
    }
}
