//! The one thread that watches all jobs: their output, input, ends and time limits, and the agent's signals.
//!
//! A job ends when its first process has. The end is told once its output is at its end too, or, when a process it
//! left behind holds that open, [`DRAIN_TIME`] later with all that could be read by then. What a left-behind process
//! prints afterwards is read and dropped, so that it neither blocks nor dies of it.

use super::Jobs;
use super::input;
use super::job::Job;
use super::processes::{Descendants, Leader};
use crate::info::unix_millis;
use crate::session::Over;
use crate::system;
use machinefs_protocol::job::{ExitReason, JobEnd, MAX_RECORD, Source};
use rustix::buffer::spare_capacity;
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::io::Errno;
use std::collections::{BTreeSet, HashMap};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long output is waited for after a job's end.
const DRAIN_TIME: Duration = Duration::from_millis(100);
/// Time between SIGTERM and SIGKILL for a job past its time.
const TERM_TIME: Duration = Duration::from_secs(2);
/// How often a job past its time is looked at, whether all of it has ended.
const LOOK_TIME: Duration = Duration::from_millis(20);
/// Bytes read at most from an output that stays open after the end.
const MAX_DRAIN: usize = 16 * 1024 * 1024;

const WAKE: u64 = 0;
const SIGNALS: u64 = 1;
const FIRST: u64 = 2;

/// What other threads ask of this one.
pub enum Command {
    /// A job runs.
    Watch(Watch),
    /// A job of that id could not be started; its child may have been waited for.
    Discard(u64),
    /// There is input for that writer.
    Feed(u64),
}

/// A job that runs.
pub struct Watch {
    /// It.
    pub job: Arc<Job>,
    /// Its first process.
    pub pid: i32,
    /// Where its output comes from.
    pub output: Vec<(Source, OwnedFd)>,
    /// Where its input goes.
    pub input: Option<OwnedFd>,
    /// The job's end of its terminal, kept open until its first process has ended.
    pub held: Option<OwnedFd>,
}

/// How a process ended.
#[derive(Clone, Copy)]
struct Exit {
    status: i32,
    cpu_micros: u64,
    max_rss_kib: u64,
    ended_ms: u64,
}

struct Running {
    job: Arc<Job>,
    pid: i32,
    outputs: Vec<u64>,
    input: Option<u64>,
    held: Option<OwnedFd>,
    exit: Option<Exit>,
    /// When waiting for output ends, after the exit.
    drained_at: Option<Instant>,
    time: Time,
}

/// Where a job stands with its time limit.
enum Time {
    Unlimited,
    Until(Instant),
    /// It was told to end, and is killed then.
    Over {
        kill_at: Instant,
        descendants: Descendants,
    },
    Killed,
}

enum Channel {
    Output(u64, Source),
    Input(u64),
    /// Output of a process that outlived its job.
    Dropped,
}

/// The thread.
pub struct Reactor {
    jobs: Arc<Jobs>,
    epoll: OwnedFd,
    signals: OwnedFd,
    channels: HashMap<u64, (OwnedFd, Channel)>,
    running: HashMap<u64, Running>,
    /// Ends seen before the start was told of, by job id.
    early: HashMap<u64, Exit>,
    /// When to look at a job, by its id.
    timers: BTreeSet<(Instant, u64)>,
    next_token: u64,
    buffer: Vec<u8>,
}

impl Reactor {
    /// The signals must be blocked already, see [`system::prepare`].
    pub fn new(jobs: Arc<Jobs>) -> io::Result<Reactor> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let set = system::signal_set(&system::SIGNALS);
        // SAFETY: the set is initialised; the result is a new descriptor or -1.
        let signals = unsafe {
            match libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) {
                -1 => return Err(io::Error::last_os_error()),
                fd => OwnedFd::from_raw_fd(fd),
            }
        };
        epoll::add(&epoll, &jobs.wake, EventData::new_u64(WAKE), EventFlags::IN)?;
        epoll::add(&epoll, &signals, EventData::new_u64(SIGNALS), EventFlags::IN)?;
        Ok(Reactor {
            jobs,
            epoll,
            signals,
            channels: HashMap::new(),
            running: HashMap::new(),
            early: HashMap::new(),
            timers: BTreeSet::new(),
            next_token: FIRST,
            buffer: vec![0; MAX_RECORD],
        })
    }

    /// The thread's body. Calls `terminate` when the agent is asked to end by a signal.
    pub fn run(mut self, terminate: impl Fn()) {
        let mut events: Vec<Event> = Vec::with_capacity(64);
        loop {
            let wait = self.timers.first().map(|(at, _)| at.saturating_duration_since(Instant::now()));
            // Rounded up: waking before the time would make it a busy loop.
            let wait =
                wait.map(|wait| Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: i64::from(wait.subsec_nanos()) });
            events.clear();
            match epoll::wait(&self.epoll, spare_capacity(&mut events), wait.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => {
                    crate::log::line(format_args!("epoll: {errno}"));
                    std::thread::sleep(Duration::from_millis(10));
                }
            }
            for event in &events {
                match event.data.u64() {
                    WAKE => self.take_commands(),
                    SIGNALS => self.take_signals(&terminate),
                    token => self.channel_ready(token, event.flags),
                }
            }
            self.look_at_times();
        }
    }

    fn take_commands(&mut self) {
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.jobs.wake, &mut count);
        let commands = std::mem::take(&mut *self.jobs.commands.lock());
        for command in commands {
            match command {
                Command::Watch(watch) => self.watch(watch),
                Command::Discard(id) => {
                    self.early.remove(&id);
                }
                Command::Feed(token) => self.write_input(token),
            }
        }
    }

    fn watch(&mut self, watch: Watch) {
        let Watch { job, pid, output, input, held } = watch;
        let id = job.id;
        let time = match job.timeout {
            Some(timeout) => {
                let until = Instant::now() + timeout;
                self.timers.insert((until, id));
                Time::Until(until)
            }
            None => Time::Unlimited,
        };
        let mut outputs = Vec::new();
        for (source, fd) in output {
            outputs.extend(self.add_channel(fd, Channel::Output(id, source), EventFlags::IN));
        }
        let input = input.and_then(|fd| self.add_channel(fd, Channel::Input(id), EventFlags::empty()));
        let feeder = job.stdin.clone();
        let running = Running { job, pid, outputs, input, held, exit: None, drained_at: None, time };
        self.running.insert(id, running);
        if let (Some(token), Some(stdin)) = (input, feeder) {
            stdin.set_writer(token);
            self.write_input(token);
        }
        if let Some(exit) = self.early.remove(&id) {
            self.exited(id, exit);
        }
    }

    fn add_channel(&mut self, fd: OwnedFd, channel: Channel, flags: EventFlags) -> Option<u64> {
        let token = self.next_token;
        self.next_token += 1;
        if let Err(errno) = epoll::add(&self.epoll, &fd, EventData::new_u64(token), flags) {
            crate::log::line(format_args!("watching a job's output: {errno}"));
            return None;
        }
        self.channels.insert(token, (fd, channel));
        Some(token)
    }

    fn remove_channel(&mut self, token: u64) {
        if let Some((fd, channel)) = self.channels.remove(&token) {
            // A terminal's descriptor has a duplicate, which would keep it watched.
            let _ = epoll::delete(&self.epoll, &fd);
            let (Channel::Output(id, _) | Channel::Input(id)) = channel else { return };
            if let Some(running) = self.running.get_mut(&id) {
                running.outputs.retain(|other| *other != token);
                running.input = running.input.filter(|other| *other != token);
            }
        }
    }

    fn channel_ready(&mut self, token: u64, flags: EventFlags) {
        match self.channels.get(&token) {
            Some((_, Channel::Input(id))) if flags.intersects(EventFlags::ERR | EventFlags::HUP) => {
                // Nobody reads it any more.
                if let Some(job) = self.running.get(id).map(|running| running.job.clone()) {
                    self.close_input(token, &job, Over::Unread);
                }
            }
            Some((_, Channel::Input(_))) => self.write_input(token),
            Some((_, Channel::Output(id, _))) => {
                let id = *id;
                self.read_output(token);
                self.end_if_complete(id);
            }
            Some((_, Channel::Dropped)) => {
                self.read_output(token);
            }
            None => {}
        }
    }

    /// Reads once. Gives how many bytes there were: 0 when there are none now, or for ever (the channel is gone then).
    fn read_output(&mut self, token: u64) -> usize {
        let Some((fd, channel)) = self.channels.get(&token) else { return 0 };
        match rustix::io::read(fd, self.buffer.as_mut_slice()) {
            Err(Errno::AGAIN | Errno::INTR) => 0,
            // EIO is how a terminal says that nobody has it open any more.
            Ok(0) | Err(_) => {
                self.remove_channel(token);
                0
            }
            Ok(count) => {
                if let Channel::Output(id, source) = channel
                    && let Some(running) = self.running.get(id)
                {
                    running.job.append(*source, self.buffer.get(..count).unwrap_or_default());
                    self.jobs.has_output(&running.job);
                }
                count
            }
        }
    }

    /// Writes what there is for a job's input, as much as it takes now.
    fn write_input(&mut self, token: u64) {
        let Some((fd, Channel::Input(id))) = self.channels.get(&token) else { return };
        let Some(job) = self.running.get(id).map(|running| running.job.clone()) else { return };
        let Some(stdin) = &job.stdin else { return };
        let mut over = None;
        let mut blocked = false;
        stdin.write(|pending| {
            let taken;
            (taken, over, blocked) = input::write(fd, pending, job.terminal);
            // A pipe's end of file is its being closed: that comes first.
            (taken, over.filter(|over| *over == Over::Unread))
        });
        let flags = if blocked { EventFlags::OUT } else { EventFlags::empty() };
        let _ = epoll::modify(&self.epoll, fd, EventData::new_u64(token), flags);
        if let Some(over) = over {
            self.close_input(token, &job, over);
        }
    }

    fn close_input(&mut self, token: u64, job: &Job, over: Over) {
        self.remove_channel(token);
        if let Some(stdin) = &job.stdin {
            stdin.close(over);
        }
    }

    fn take_signals(&mut self, terminate: &impl Fn()) {
        const SIZE: usize = size_of::<libc::signalfd_siginfo>();
        let mut buffer = [0u8; SIZE * 8];
        let mut children = false;
        while let Ok(count) = rustix::io::read(&self.signals, &mut buffer) {
            for info in buffer.get(..count).unwrap_or_default().chunks_exact(SIZE) {
                // ssi_signo is the first field, see signalfd(2).
                let number = info.first_chunk::<4>().map_or(0, |bytes| u32::from_ne_bytes(*bytes));
                match number as i32 {
                    libc::SIGCHLD => children = true,
                    _ => terminate(),
                }
            }
            if count == 0 {
                break;
            }
        }
        if children {
            self.wait_for_dead();
        }
    }

    /// Waits for every dead child: jobs, children that failed to start, and orphans that have come to the agent.
    fn wait_for_dead(&mut self) {
        loop {
            // SAFETY: a zeroed siginfo is valid; waitid fills it in, and leaves the pid 0 when there is none.
            let pid = unsafe {
                let mut info: libc::siginfo_t = std::mem::zeroed();
                let options = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
                if libc::waitid(libc::P_ALL, 0, &mut info, options) < 0 {
                    return;
                }
                info.si_pid()
            };
            if pid <= 0 {
                return;
            }
            let jobs = self.jobs.clone();
            let mut children = jobs.children.lock();
            let mut status = 0;
            // SAFETY: a zeroed rusage is valid; both are valid for the call.
            let (waited, usage) = unsafe {
                let mut usage: libc::rusage = std::mem::zeroed();
                (libc::wait4(pid, &mut status, libc::WNOHANG, &mut usage), usage)
            };
            if waited != pid {
                return;
            }
            let job = children.remove(&pid);
            drop(children);
            if let Some(job) = job {
                let micros = |time: libc::timeval| time.tv_sec as u64 * 1_000_000 + time.tv_usec as u64;
                let exit = Exit {
                    status,
                    cpu_micros: micros(usage.ru_utime) + micros(usage.ru_stime),
                    max_rss_kib: usage.ru_maxrss.max(0) as u64,
                    ended_ms: unix_millis(),
                };
                self.exited(job.id, exit);
            }
        }
    }

    fn exited(&mut self, id: u64, exit: Exit) {
        let Some(running) = self.running.get_mut(&id) else {
            self.early.insert(id, exit);
            return;
        };
        let drained_at = Instant::now() + DRAIN_TIME;
        running.held = None;
        running.exit = Some(exit);
        running.drained_at = Some(drained_at);
        self.timers.insert((drained_at, id));
        self.drain(id);
        self.end_if_complete(id);
    }

    /// Reads what can be read of a job's output now.
    fn drain(&mut self, id: u64) {
        let outputs = self.running.get(&id).map(|running| running.outputs.clone()).unwrap_or_default();
        for token in outputs {
            let mut total = 0;
            loop {
                let count = self.read_output(token);
                total += count;
                if count == 0 || total > MAX_DRAIN {
                    break;
                }
            }
        }
    }

    /// Ends the job if its process is dead and its output complete, or waited for long enough.
    fn end_if_complete(&mut self, id: u64) {
        let Some(running) = self.running.get(&id) else { return };
        let (Some(exit), Some(drained_at)) = (running.exit, running.drained_at) else { return };
        let now = Instant::now();
        if !running.outputs.is_empty() && now < drained_at {
            return;
        }
        if let Time::Over { kill_at, .. } = &running.time
            && now < *kill_at
        {
            // The rest of a job past its time still may end by itself.
            return;
        }
        self.drain(id);
        let Some(running) = self.running.remove(&id) else { return };
        for token in running.outputs {
            if running.job.terminal {
                // With its last descriptor the terminal hangs up.
                self.remove_channel(token);
            } else if let Some((_, channel)) = self.channels.get_mut(&token) {
                *channel = Channel::Dropped;
            }
        }
        if let Some(token) = running.input {
            self.close_input(token, &running.job, Over::Unread);
        } else if let Some(stdin) = &running.job.stdin {
            stdin.close(Over::Unread);
        }
        let end = JobEnd {
            reason: self.reason(&running.job, exit.status, &running.time),
            log_end: running.job.log_end(),
            cpu_micros: exit.cpu_micros,
            max_rss_kib: exit.max_rss_kib,
            ended_ms: exit.ended_ms,
        };
        self.jobs.has_ended(&running.job, end);
    }

    fn reason(&self, job: &Job, status: i32, time: &Time) -> ExitReason {
        if matches!(time, Time::Over { .. } | Time::Killed) {
            return ExitReason::Timeout;
        }
        let reason = if libc::WIFSIGNALED(status) {
            ExitReason::Signal(libc::WTERMSIG(status) as u8)
        } else {
            ExitReason::Code(libc::WEXITSTATUS(status) as u8)
        };
        // A shell gives 137 for a child of its that was killed so.
        let killed = matches!(reason, ExitReason::Signal(9) | ExitReason::Code(137));
        if killed && self.jobs.oom_kills.count() > job.oom_kills { ExitReason::OutOfMemory } else { reason }
    }

    fn look_at_times(&mut self) {
        let now = Instant::now();
        while let Some((at, id)) = self.timers.first().copied() {
            if at > now {
                return;
            }
            self.timers.remove(&(at, id));
            self.look_at_time(id, now);
            self.end_if_complete(id);
        }
    }

    /// Goes on with a job's time limit, if it is due.
    fn look_at_time(&mut self, id: u64, now: Instant) {
        let Some(running) = self.running.get_mut(&id) else { return };
        match &mut running.time {
            Time::Until(until) if now >= *until && running.exit.is_none() => {
                let leader = Leader { pid: running.pid, lives: true };
                let group = running.job.group.clone();
                let mut descendants = Descendants::of(leader, self.jobs.mark(running.job.number()), group);
                descendants.refresh();
                descendants.signal(libc::SIGTERM);
                running.time = Time::Over { kill_at: now + TERM_TIME, descendants };
                self.timers.insert((now + LOOK_TIME, id));
            }
            Time::Over { kill_at, descendants } => {
                if descendants.refresh() == 0 {
                    running.time = Time::Killed;
                } else if now >= *kill_at {
                    // Those that multiply faster than they can be killed are tried again.
                    if descendants.kill(20) {
                        running.time = Time::Killed;
                    } else {
                        self.timers.insert((now + LOOK_TIME, id));
                    }
                } else {
                    self.timers.insert(((now + LOOK_TIME).min(*kill_at), id));
                }
            }
            _ => {}
        }
    }
}

impl std::fmt::Debug for Reactor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reactor").field("epoll", &self.epoll.as_raw_fd()).finish_non_exhaustive()
    }
}
