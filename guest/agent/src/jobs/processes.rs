//! Finding and ending the descendants of a job.
//!
//! A process belongs to a job when it is in the session the job began, or descends from one that does. One that made a
//! session of its own and whose parents have all ended while nobody looked is not found: it is a daemon of the
//! machine, and ends with that.

use super::read_bounded;
use std::collections::HashMap;
use std::time::Duration;

/// A process, told from later ones of the same number by its start time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Process {
    pid: i32,
    parent: i32,
    session: i32,
    /// Clock ticks since boot.
    start: u64,
    /// Of itself and of children it waited for, in clock ticks.
    ticks: u64,
    rss_pages: u64,
    dead: bool,
}

/// Parses /proc/PID/stat, see proc_pid_stat(5). The name in it may hold anything, parentheses too.
fn parse(text: &[u8]) -> Option<Process> {
    let open = text.iter().position(|byte| *byte == b' ')?;
    let close = text.iter().rposition(|byte| *byte == b')')?;
    let pid = std::str::from_utf8(text.get(..open)?).ok()?.parse().ok()?;
    let rest = std::str::from_utf8(text.get(close + 1..)?).ok()?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    // The first of these is the third field of the manual page.
    let number = |field: usize| fields.get(field - 3)?.parse::<i64>().ok();
    let ticks = [14, 15, 16, 17].into_iter().filter_map(number).sum::<i64>();
    Some(Process {
        pid,
        parent: number(4)? as i32,
        session: number(6)? as i32,
        start: number(22)? as u64,
        ticks: ticks.max(0) as u64,
        rss_pages: number(24)?.max(0) as u64,
        dead: matches!(fields.first(), Some(&"Z" | &"X" | &"x")),
    })
}

fn process(pid: i32) -> Option<Process> {
    parse(&read_bounded(format!("/proc/{pid}/stat"), 4096).ok()?)
}

/// Processor time in microseconds, with that of waited-for children, and resident KiB of a running process.
pub fn usage(pid: i32) -> Option<(u64, u64)> {
    let found = process(pid)?;
    let per_second = rustix::param::clock_ticks_per_second().max(1);
    let page_kib = rustix::param::page_size() as u64 / 1024;
    Some((found.ticks * 1_000_000 / per_second, found.rss_pages * page_kib))
}

/// All processes that have not ended.
fn living() -> Vec<Process> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    entries
        .filter_map(|entry| process(entry.ok()?.file_name().to_str()?.parse().ok()?))
        .filter(|process| !process.dead)
        .collect()
}

/// The processes of one job.
#[derive(Debug)]
pub struct Descendants {
    session: i32,
    known: HashMap<i32, u64>,
}

impl Descendants {
    /// Those of the job whose first process is or was `leader`.
    pub fn of(leader: i32) -> Descendants {
        Descendants { session: leader, known: HashMap::new() }
    }

    /// Those of the agent itself: every process it ever made, as orphans come back to it.
    pub fn of_agent() -> Descendants {
        Descendants { session: i32::MIN, known: HashMap::new() }
    }

    /// Looks for new ones. Gives the number of those that live.
    pub fn refresh(&mut self) -> usize {
        let all = living();
        let mut found: HashMap<i32, u64> = all
            .iter()
            .filter(|p| p.session == self.session || self.known.get(&p.pid) == Some(&p.start))
            .map(|p| (p.pid, p.start))
            .collect();
        let own = std::process::id() as i32;
        found.remove(&own);
        let of_agent = self.session == i32::MIN;
        loop {
            let before = found.len();
            for p in &all {
                if p.pid != own && (found.contains_key(&p.parent) || (of_agent && p.parent == own)) {
                    found.insert(p.pid, p.start);
                }
            }
            if found.len() == before {
                break;
            }
        }
        self.known = found;
        self.known.len()
    }

    /// Sends a signal to all that were found.
    pub fn signal(&self, signal: i32) {
        for (pid, start) in &self.known {
            send(*pid, *start, signal);
        }
    }

    /// Kills all there are, also those that are made meanwhile. Whether none is left.
    pub fn kill(&mut self, rounds: u32) -> bool {
        for round in 0..rounds {
            if self.refresh() == 0 {
                return true;
            }
            self.signal(libc::SIGKILL);
            std::thread::sleep(Duration::from_micros(200 << round.min(6)));
        }
        self.refresh() == 0
    }
}

/// Sends a signal to the process of that number and start time, and to no later one of that number.
fn send(pid: i32, start: u64, signal: i32) {
    // SAFETY: no pointers. The descriptor is closed below.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) } as i32;
    if process(pid).is_none_or(|process| process.start != start) {
        close(fd);
        return;
    }
    // SAFETY: a null siginfo is allowed (pidfd_send_signal(2)).
    unsafe {
        if fd < 0 {
            // A kernel without pidfds.
            libc::kill(pid, signal);
        } else {
            libc::syscall(libc::SYS_pidfd_send_signal, fd, signal, std::ptr::null::<libc::siginfo_t>(), 0);
        }
    }
    close(fd);
}

fn close(fd: i32) {
    if fd >= 0 {
        // SAFETY: the descriptor was opened in `send` and nobody else knows it.
        unsafe {
            libc::close(fd);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_names() {
        let line = b"42 (a) R 1 (b) S 7 8 9 0 -1 4 1 0 0 0 10 20 30 40 20 0 1 0 12345 1000 77 1 2 3";
        let found = parse(line).unwrap();
        assert_eq!((found.pid, found.parent, found.session), (42, 7, 9));
        assert_eq!((found.start, found.ticks, found.rss_pages), (12345, 100, 77));
        for len in 0..line.len() {
            let _ = parse(&line[..len]);
        }
        assert_eq!(process(std::process::id() as i32).unwrap().pid, std::process::id() as i32);
    }
}
