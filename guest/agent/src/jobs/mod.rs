//! The jobs: started for the host, watched by one thread ([`reactor`]), kept until the host forgets them.

mod cgroup;
mod command;
mod input;
mod job;
mod memory;
mod processes;
mod reactor;
mod script;
mod spawn;
mod start;
mod users;

pub use job::{Job, JobError, Kill, errno_text};
pub use reactor::Reactor;

use crate::secrets::Secrets;
use crate::session::Streams;
use cgroup::Groups;
use machinefs_protocol::job::{JobEnd, JobInfo, MAX_LIST};
use memory::OomKills;
use parking_lot::Mutex;
use processes::{Descendants, Leader};
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

/// The variable that marks a job's processes.
const MARK: &str = "MACHINEFS_MARK";
/// How often it is tried to kill all of a job's processes.
const KILL_ROUNDS: u32 = 100;
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
    secrets: Arc<Secrets>,
    groups: Arc<Groups>,
    boot: u128,
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
    /// No jobs yet, and the thread's body that will watch them. `boot` is this life of the agent.
    ///
    /// # Errors
    /// Those of the descriptors it needs.
    pub fn new(boot: u128, secrets: Arc<Secrets>) -> io::Result<(Arc<Jobs>, Reactor)> {
        let jobs = Arc::new(Jobs {
            table: Mutex::default(),
            children: Mutex::default(),
            commands: Mutex::default(),
            wake: rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            streams: Mutex::default(),
            oom_kills: OomKills::find(),
            secrets,
            groups: Groups::find(),
            boot,
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

    /// Sends a signal to a job's processes, also to those its first one has left behind. A forgotten job's are still
    /// known by their mark.
    ///
    /// # Errors
    /// [`JobError::NoJob`], [`JobError::Ended`], [`JobError::Stuck`], or the kernel's (EINVAL: no such signal).
    pub fn signal(&self, number: u64, signal: i32, to: Kill) -> Result<(), JobError> {
        if !(0..=64).contains(&signal) {
            return Err(JobError::Invalid("no such signal"));
        }
        match self.get(number) {
            Ok(job) => self.signal_job(&job, signal, to),
            Err(error) => {
                let mut left = Descendants::marked(self.mark(number), self.groups.leftover(number).map(Arc::new));
                if left.refresh() == 0 { Err(error) } else { finish_off(&mut left, number, signal, to) }
            }
        }
    }

    fn signal_job(&self, job: &Arc<Job>, signal: i32, to: Kill) -> Result<(), JobError> {
        let leader = {
            let children = self.children.lock();
            let pid = job.pid().filter(|pid| *pid > 0).ok_or(JobError::Ended(job.number()))?;
            let lives = children.get(&pid).is_some_and(|other| Arc::ptr_eq(other, job));
            if lives && matches!(to, Kill::Group) {
                // SAFETY: kill takes no pointer. The group is the job's: its leader is not waited for, under the lock.
                return match unsafe { libc::kill(-pid, signal) } {
                    0 => Ok(()),
                    _ => Err(JobError::io("the job's process group", &io::Error::last_os_error())),
                };
            }
            Leader { pid, lives }
        };
        let mut processes = Descendants::of(leader, self.mark(job.number()), job.group.clone());
        if processes.refresh() == 0 {
            return Err(JobError::Ended(job.number()));
        }
        finish_off(&mut processes, job.number(), signal, to)
    }

    /// What marks the processes of the job of that number, in their environment.
    fn mark(&self, number: u64) -> String {
        format!("{MARK}={:016x}-{number}", self.boot as u64)
    }

    /// Drops a job; one that runs is killed with all its descendants first. Daemons an ended one left behind go on.
    ///
    /// # Errors
    /// [`JobError::NoJob`].
    pub fn forget(&self, number: u64) -> Result<(), JobError> {
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
            let _ = self.signal_job(&job, libc::SIGKILL, Kill::All);
        }
        Ok(())
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

    /// There is something for that writer of an input, or the input's end.
    pub fn feed(&self, writer: Option<u64>) {
        if let Some(writer) = writer {
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
        self.groups.sweep();
        if !forgotten && let Some(streams) = &*self.streams.lock() {
            streams.ended(job.number(), end);
        }
    }

    fn next_id(&self) -> u64 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }
}

/// Sends a signal to what was found of a job, and to what it makes meanwhile.
fn finish_off(processes: &mut Descendants, job: u64, signal: i32, to: Kill) -> Result<(), JobError> {
    match to {
        Kill::Group if processes.signal_group(signal) => Ok(()),
        Kill::Group => Err(JobError::Ended(job)),
        Kill::All if signal == libc::SIGKILL && !processes.kill(KILL_ROUNDS) => Err(JobError::Stuck(job)),
        Kill::All if signal == libc::SIGKILL => Ok(()),
        Kill::All => {
            processes.signal(signal);
            Ok(())
        }
    }
}

/// Sends a signal to everything the jobs have started, also what ended ones left behind.
pub fn signal_all(signal: i32) {
    let mut descendants = Descendants::of_agent();
    if signal == libc::SIGKILL {
        descendants.kill(KILL_ROUNDS);
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
