//! Finding and ending the processes of a job.
//!
//! A process belongs to a job when it is in the job's control group, in the session the job began, when it has the job's mark in its environment, or
//! when it descends from one that does. So a daemon that has left the session and whose parents have ended is found by
//! its mark; without a control group, one that also cleared its environment is not: it is a daemon of the machine, and
//! ends with that. The marks of another user's processes can only be read with CAP_SYS_PTRACE (proc_pid_environ(5)).
//!
//! Only what descends from the agent is looked at. Orphans come back to the agent, so that is all it ever started.

use super::cgroup::Group;
use super::read_bounded;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

/// Longest environment that is searched for a mark, in bytes; execve(2) takes no more.
const MAX_ENVIRONMENT: u64 = 6 * 1024 * 1024;
/// How often new ones are looked for after those there were have been stopped or signalled.
const LOOKS: u32 = 20;

/// A process, told from later ones of the same number by its start time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Process {
    pid: i32,
    parent: i32,
    group: i32,
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
        group: number(5)? as i32,
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

/// All processes.
fn all() -> Vec<Process> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    entries.filter_map(|entry| process(entry.ok()?.file_name().to_str()?.parse().ok()?)).collect()
}

/// Those of `from`, and all that descends from them.
fn with_descendants(from: impl IntoIterator<Item = i32>, children: &HashMap<i32, Vec<i32>>) -> HashSet<i32> {
    let mut todo: Vec<i32> = from.into_iter().collect();
    let mut found = HashSet::new();
    while let Some(pid) = todo.pop() {
        if found.insert(pid) {
            todo.extend(children.get(&pid).into_iter().flatten());
        }
    }
    found
}

/// Whether a process has that entry in its environment.
fn has_variable(pid: i32, entry: &str) -> bool {
    let environment = read_bounded(format!("/proc/{pid}/environ"), MAX_ENVIRONMENT).unwrap_or_default();
    environment.split(|byte| *byte == 0).any(|other| other == entry.as_bytes())
}

/// A job's first process.
#[derive(Clone, Copy, Debug)]
pub struct Leader {
    /// Its number.
    pub pid: i32,
    /// It has not ended, or nobody has waited for it: its number is nobody else's.
    pub lives: bool,
}

/// The processes of one job, or of all.
#[derive(Debug)]
pub struct Descendants {
    leader: Option<Leader>,
    /// `NAME=value`. `None`: of all jobs.
    mark: Option<String>,
    group: Option<Arc<Group>>,
    /// What was found at the last look: start times by number.
    known: HashMap<i32, u64>,
    /// What has been seen to have no mark.
    unmarked: HashMap<i32, u64>,
}

impl Descendants {
    fn new(leader: Option<Leader>, mark: Option<String>, group: Option<Arc<Group>>) -> Descendants {
        Descendants { leader, mark, group, known: HashMap::new(), unmarked: HashMap::new() }
    }

    /// Those of the job with that first process, that mark and that control group.
    pub fn of(leader: Leader, mark: String, group: Option<Arc<Group>>) -> Descendants {
        Descendants::new(Some(leader), Some(mark), group)
    }

    /// Those of a job of which nothing is known but its mark, and its control group if there are processes in it.
    pub fn marked(mark: String, group: Option<Arc<Group>>) -> Descendants {
        Descendants::new(None, Some(mark), group)
    }

    /// Those of the agent itself: every process it ever made, as orphans come back to it.
    pub fn of_agent() -> Descendants {
        Descendants::new(None, None, None)
    }

    /// Looks for them. Gives the number of those that live.
    pub fn refresh(&mut self) -> usize {
        let all = all();
        let own = std::process::id() as i32;
        let mut children: HashMap<i32, Vec<i32>> = HashMap::new();
        for process in &all {
            children.entry(process.parent).or_default().push(process.pid);
        }
        let mut of_agent = with_descendants([own], &children);
        of_agent.remove(&own);
        let found = match self.mark.clone() {
            None => of_agent,
            Some(mark) => {
                let mine = all.iter().filter(|p| of_agent.contains(&p.pid) && !p.dead);
                let session = self.session(&all);
                let group: HashSet<i32> = self.group.iter().flat_map(|group| group.processes()).collect();
                let mut is_its =
                    |p: &Process| group.contains(&p.pid) || session == Some(p.session) || self.is_marked(p, &mark);
                let direct: Vec<i32> = mine.filter(|p| is_its(p)).map(|p| p.pid).collect();
                with_descendants(direct, &children)
            }
        };
        self.known = all.iter().filter(|p| !p.dead && found.contains(&p.pid)).map(|p| (p.pid, p.start)).collect();
        let there: HashSet<i32> = all.iter().map(|p| p.pid).collect();
        self.unmarked.retain(|pid, _| there.contains(pid));
        self.known.len()
    }

    /// The job's session, as long as its number cannot be another's.
    fn session(&self, all: &[Process]) -> Option<i32> {
        let leader = self.leader?;
        let reused = !leader.lives && all.iter().any(|p| p.pid == leader.pid);
        (!reused).then_some(leader.pid)
    }

    /// Whether a process was found before, or has the mark.
    fn is_marked(&mut self, process: &Process, mark: &str) -> bool {
        if self.known.get(&process.pid) == Some(&process.start) {
            return true;
        }
        if self.unmarked.get(&process.pid) == Some(&process.start) {
            return false;
        }
        let marked = has_variable(process.pid, mark);
        if !marked {
            self.unmarked.insert(process.pid, process.start);
        }
        marked
    }

    /// Sends a signal to all that were found, and to those they have made meanwhile.
    pub fn signal(&mut self, signal: i32) {
        let mut told: HashMap<i32, u64> = HashMap::new();
        for _ in 0..LOOKS {
            let new: Vec<(i32, u64)> =
                self.known.iter().map(|(pid, start)| (*pid, *start)).filter(|(p, s)| told.get(p) != Some(s)).collect();
            if new.is_empty() {
                return;
            }
            for (pid, start) in new {
                send(pid, start, signal);
                told.insert(pid, start);
            }
            self.refresh();
        }
    }

    /// Sends a signal to those of them that are in the process group of the job's first process. Whether there are any.
    pub fn signal_group(&mut self, signal: i32) -> bool {
        let Some(leader) = self.leader else { return false };
        let members: Vec<(i32, u64)> = self
            .known
            .iter()
            .map(|(pid, start)| (*pid, *start))
            .filter(|(pid, start)| process(*pid).is_some_and(|p| p.start == *start && p.group == leader.pid))
            .collect();
        for (pid, start) in &members {
            send(*pid, *start, signal);
        }
        !members.is_empty()
    }

    /// Kills all there are, also those that are made meanwhile: what has been stopped makes no more of them. Whether
    /// none is left.
    pub fn kill(&mut self, rounds: u32) -> bool {
        for round in 0..rounds {
            if let Some(group) = &self.group {
                group.kill();
            }
            if self.refresh() == 0 {
                return true;
            }
            self.signal(libc::SIGSTOP);
            for (pid, start) in &self.known {
                send(*pid, *start, libc::SIGKILL);
            }
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
        assert_eq!((found.pid, found.parent, found.group, found.session), (42, 7, 8, 9));
        assert_eq!((found.start, found.ticks, found.rss_pages), (12345, 100, 77));
        for len in 0..line.len() {
            let _ = parse(&line[..len]);
        }
        assert_eq!(process(std::process::id() as i32).unwrap().pid, std::process::id() as i32);
    }
}
