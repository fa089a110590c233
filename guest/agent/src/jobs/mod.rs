//! The jobs: started for the host, watched by one thread ([`reactor`]), kept until the host forgets them.

mod command;
mod job;
mod memory;
mod processes;
mod reactor;
mod script;
mod spawn;
mod start;
mod users;

pub use job::{Job, JobError, Kill};
pub use reactor::Reactor;

use crate::session::{Stdin, Streams};
use machinefs_protocol::job::{JobEnd, JobInfo, MAX_LIST};
use memory::OomKills;
use parking_lot::Mutex;
use reactor::Command;
use rustix::event::EventfdFlags;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Ended jobs that are kept unforgotten, at most; the oldest go first.
const MAX_ENDED: usize = 10_000;
/// Bytes of memory the logs of ended jobs may take.
const MAX_ENDED_MEMORY: usize = 32 * 1024 * 1024;
/// Ended jobs with a log in a file, at most: each holds a descriptor.
const MAX_ENDED_FILES: usize = 128;

/// All jobs.
pub struct Jobs {
    table: Mutex<Table>,
    /// Processes nobody has waited for yet, by number. Who sends a signal to one of them holds the lock, so that the
    /// number cannot have passed to another process; who forks holds it until the child is in here.
    children: Mutex<HashMap<i32, Arc<Job>>>,
    commands: Mutex<Vec<Command>>,
    wake: OwnedFd,
    /// Whom to tell of output and ends.
    streams: Mutex<Option<Arc<Streams>>>,
    oom_kills: OomKills,
    next_id: AtomicU64,
}

#[derive(Default)]
struct Table {
    jobs: BTreeMap<u64, Arc<Job>>,
    /// Ended jobs, oldest first.
    ended: VecDeque<Ended>,
    memory: usize,
    files: usize,
    closed: bool,
}

struct Ended {
    job: Arc<Job>,
    memory: usize,
    in_file: bool,
}

impl Table {
    /// Keeps an ended job, at the cost of the oldest ones where there are too many.
    fn keep(&mut self, ended: Ended) {
        self.memory += ended.memory;
        self.files += usize::from(ended.in_file);
        self.ended.push_back(ended);
        while self.ended.len() > MAX_ENDED || self.memory > MAX_ENDED_MEMORY || self.files > MAX_ENDED_FILES {
            let Some(oldest) = self.ended.pop_front() else { break };
            self.uncount(&oldest);
            self.jobs.remove(&oldest.job.number());
        }
    }

    /// Drops a job if it has ended.
    fn forget(&mut self, job: &Arc<Job>) {
        let place = self.ended.iter().position(|ended| Arc::ptr_eq(&ended.job, job));
        if let Some(ended) = place.and_then(|place| self.ended.remove(place)) {
            self.uncount(&ended);
        }
    }

    fn uncount(&mut self, ended: &Ended) {
        self.memory -= ended.memory;
        self.files -= usize::from(ended.in_file);
    }
}

impl Jobs {
    /// No jobs yet, and the thread's body that will watch them.
    ///
    /// # Errors
    /// Those of the descriptors it needs.
    pub fn new() -> io::Result<(Arc<Jobs>, Reactor)> {
        let jobs = Arc::new(Jobs {
            table: Mutex::default(),
            children: Mutex::default(),
            commands: Mutex::default(),
            wake: rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            streams: Mutex::default(),
            oom_kills: OomKills::find(),
            next_id: AtomicU64::new(1),
        });
        let reactor = Reactor::new(jobs.clone())?;
        Ok((jobs, reactor))
    }

    /// From now on these streams are told of output and ends.
    pub fn tell(&self, streams: Arc<Streams>) {
        *self.streams.lock() = Some(streams);
    }

    /// Uid and gid of jobs that name no user.
    pub fn default_user(&self) -> (u32, u32) {
        users::find(Path::new("/etc"), b"").map_or((0, 0), |user| (user.uid, user.gid))
    }

    /// The job of that number.
    ///
    /// # Errors
    /// [`JobError::NoJob`].
    pub fn get(&self, number: u64) -> Result<Arc<Job>, JobError> {
        self.table.lock().jobs.get(&number).cloned().ok_or(JobError::NoJob(number))
    }

    /// What is known of the jobs, by number. As many as an answer may hold: all running ones first, then the newest.
    pub fn list(&self) -> Vec<JobInfo> {
        let jobs: Vec<Arc<Job>> = self.table.lock().jobs.values().cloned().collect();
        let (running, ended): (Vec<_>, Vec<_>) = jobs.into_iter().partition(|job| job.end().is_none());
        let mut room = MAX_LIST - 16;
        let mut list = Vec::new();
        for job in running.iter().chain(ended.iter().rev()) {
            let info = job.info();
            let size = postcard::experimental::serialized_size(&info).unwrap_or(MAX_LIST);
            if size > room {
                break;
            }
            room -= size;
            list.push(info);
        }
        list.sort_by_key(|info| info.job);
        list
    }

    /// Sends a signal to a running job.
    ///
    /// # Errors
    /// [`JobError::NoJob`], [`JobError::Ended`], or the kernel's (EINVAL: no such signal).
    pub fn signal(&self, number: u64, signal: i32, to: Kill) -> Result<(), JobError> {
        let job = self.get(number)?;
        if !(0..=64).contains(&signal) {
            return Err(JobError::Invalid("no such signal"));
        }
        self.signal_job(&job, signal, to)
    }

    fn signal_job(&self, job: &Arc<Job>, signal: i32, to: Kill) -> Result<(), JobError> {
        let pid = {
            let children = self.children.lock();
            let pid = job.pid().filter(|pid| children.get(pid).is_some_and(|other| Arc::ptr_eq(other, job)));
            let pid = pid.ok_or(JobError::Ended(job.number()))?;
            // SAFETY: kill takes no pointer. The group is the job's: its leader is not waited for, under the lock.
            if matches!(to, Kill::Group) && unsafe { libc::kill(-pid, signal) } < 0 {
                return Err(JobError::io("the job's process group", &io::Error::last_os_error()));
            }
            pid
        };
        if matches!(to, Kill::Descendants) {
            let mut descendants = processes::Descendants::of(pid);
            if signal == libc::SIGKILL {
                descendants.kill(100);
            } else {
                descendants.refresh();
                descendants.signal(signal);
            }
        }
        Ok(())
    }

    /// Drops a job; one that runs is killed with all its descendants first. Daemons an ended one left behind go on.
    /// Gives the tag its input came under, if it had one.
    ///
    /// # Errors
    /// [`JobError::NoJob`].
    pub fn forget(&self, number: u64) -> Result<Option<u64>, JobError> {
        let job = {
            let mut table = self.table.lock();
            let job = table.jobs.remove(&number).ok_or(JobError::NoJob(number))?;
            job.forget();
            table.forget(&job);
            job
        };
        if let Some(streams) = self.streams.lock().clone() {
            streams.forget(number);
        }
        if job.end().is_none() {
            let _ = self.signal_job(&job, libc::SIGKILL, Kill::Descendants);
        }
        Ok(job.stdin.as_ref().map(|(tag, _)| *tag))
    }

    /// From now on no more jobs are started.
    pub fn close(&self) {
        self.table.lock().closed = true;
    }

    /// Waits until the ends of all jobs are known, but not longer than that.
    pub fn wait_for_ends(&self, patience: Duration) {
        let until = Instant::now() + patience;
        while self.table.lock().jobs.values().any(|job| job.end().is_none()) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// There is something in that input, or its end.
    pub fn feed(&self, stdin: &Stdin) {
        if let Some(writer) = stdin.with(|state| state.writer) {
            self.command(Command::Feed(writer));
        }
    }

    /// Hands something to the job thread.
    fn command(&self, command: Command) {
        self.commands.lock().push(command);
        // Full means that it is awake anyhow.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// A job has new output.
    fn has_output(&self, job: &Job) {
        if let Some(streams) = &*self.streams.lock() {
            streams.output(job.number());
        }
    }

    /// A job's input was read.
    fn has_read(&self, tag: u64, bytes: u64) {
        if let Some(streams) = &*self.streams.lock() {
            streams.give(tag, bytes);
        }
    }

    /// A job has ended, its log is complete.
    fn has_ended(&self, job: &Arc<Job>, end: JobEnd) {
        job.set_end(end);
        let (memory, in_file) = job.log_size();
        let forgotten = {
            let mut table = self.table.lock();
            let forgotten = job.is_forgotten();
            if !forgotten {
                table.keep(Ended { job: job.clone(), memory, in_file });
            }
            forgotten
        };
        if !forgotten && let Some(streams) = &*self.streams.lock() {
            streams.ended(job.number(), end);
        }
    }

    fn next_id(&self) -> u64 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }
}

/// Sends a signal to everything the jobs have started, also what ended ones left behind.
pub fn signal_all(signal: i32) {
    let mut descendants = processes::Descendants::of_agent();
    if signal == libc::SIGKILL {
        descendants.kill(100);
    } else {
        descendants.refresh();
        descendants.signal(signal);
    }
}

/// Waits until the agent has no child processes, dead or alive; not longer than that. The job thread waits for the
/// dead ones. Orphans become children of the agent, so without any there is no other process of the agent's left.
pub fn wait_for_children(patience: Duration) -> bool {
    let until = Instant::now() + patience;
    loop {
        let options = rustix::process::WaitIdOptions::EXITED
            | rustix::process::WaitIdOptions::NOHANG
            | rustix::process::WaitIdOptions::NOWAIT;
        if matches!(rustix::process::waitid(rustix::process::WaitId::All, options), Err(rustix::io::Errno::CHILD)) {
            return true;
        }
        if Instant::now() >= until {
            return false;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The first `max` bytes of a file. Does not wait for a writer should there be a FIFO in its place.
///
/// # Errors
/// Those of opening and reading it.
pub fn read_bounded(path: impl AsRef<Path>, max: u64) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    file.take(max).read_to_end(&mut text)?;
    Ok(text)
}
