//! One job.

use super::cgroup::Group;
use super::processes;
use super::script::Script;
use crate::session::Stdin;
use machinefs_protocol::job::{JobEnd, JobInfo, Source, record_header};
use machinefs_protocol::joblog::{Cursor, JobLog, LogError};
use parking_lot::Mutex;
use rustix::fs::{MemfdFlags, Mode, OFlags};
use rustix::termios::Winsize;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use thiserror::Error;

/// Why something cannot be done with a job.
#[derive(Debug, Error)]
pub enum JobError {
    /// There is none of that number.
    #[error("no job {0}")]
    NoJob(u64),
    /// The number is taken.
    #[error("job {0} exists")]
    Exists(u64),
    /// It has no process any more, or none yet.
    #[error("job {0} does not run")]
    Ended(u64),
    /// Some of its processes did not end, though killed (they may be stuck in the kernel).
    #[error("processes of job {0} do not end")]
    Stuck(u64),
    /// The machine is being shut down.
    #[error("the machine is shutting down")]
    Closing,
    /// No record of its log begins at that offset.
    #[error("no record begins at offset {0}")]
    Offset(u64),
    /// The log cannot be read.
    #[error("reading the log: {0}")]
    Log(#[from] LogError),
    /// There is no such user or group.
    #[error("no user {0:?}")]
    NoUser(String),
    /// The job's description makes no sense.
    #[error("{0}")]
    Invalid(&'static str),
    /// What becomes a C string has a NUL in it.
    #[error("NUL byte in the {0}")]
    Nul(&'static str),
    /// The system refused something.
    #[error("{what}: {}", errno_text(*.errno))]
    System {
        /// What it was about.
        what: String,
        /// Why.
        errno: i32,
    },
}

impl JobError {
    /// A failed system call.
    pub fn io(what: impl Into<String>, error: &io::Error) -> JobError {
        JobError::System { what: what.into(), errno: error.raw_os_error().unwrap_or(libc::EIO) }
    }

    /// The errno for it.
    pub fn errno(&self) -> i32 {
        match self {
            JobError::NoJob(_) => libc::ENOENT,
            JobError::Exists(_) => libc::EEXIST,
            JobError::Ended(_) => libc::ESRCH,
            JobError::Stuck(_) => libc::EBUSY,
            JobError::Closing => libc::ESHUTDOWN,
            JobError::Log(_) => libc::EIO,
            JobError::NoUser(_) | JobError::Invalid(_) | JobError::Nul(_) | JobError::Offset(_) => libc::EINVAL,
            JobError::System { errno, .. } => *errno,
        }
    }
}

/// The words for an errno, as strerror(3) has them.
pub fn errno_text(errno: i32) -> String {
    let text = io::Error::from_raw_os_error(errno).to_string();
    match text.find(" (os error") {
        Some(end) => text.get(..end).unwrap_or_default().to_owned(),
        None => text,
    }
}

/// Which of a job's processes a signal goes to.
#[derive(Clone, Copy, Debug)]
pub enum Kill {
    /// The process group of the first one.
    Group,
    /// All of them, see [`processes::Descendants`].
    All,
}

/// A job.
#[derive(Debug)]
pub struct Job {
    number: u64,
    /// The agent's own number: the host may use its number again after a forget.
    pub(super) id: u64,
    log: Mutex<JobLog>,
    state: Mutex<State>,
    /// What the host feeds it.
    pub(crate) stdin: Option<Arc<Stdin>>,
    /// How long it may run.
    pub(super) timeout: Option<Duration>,
    pub(super) terminal: bool,
    /// The counter of the kernel's memory kills at its start.
    pub(super) oom_kills: u64,
    /// The control group of its processes, if it has one.
    pub(super) group: Option<Arc<Group>>,
}

#[derive(Debug, Default)]
struct State {
    pid: Option<i32>,
    started_ms: u64,
    end: Option<JobEnd>,
    forgotten: bool,
    /// Its script's file, for the time it runs.
    script: Option<Script>,
    /// The agent's end of its terminal, for the time it runs.
    terminal: Option<OwnedFd>,
}

/// What a new job is made of.
pub(super) struct NewJob {
    pub number: u64,
    pub id: u64,
    pub output_limit: u64,
    pub stdin: Option<Arc<Stdin>>,
    pub timeout: Option<Duration>,
    pub terminal: bool,
    pub oom_kills: u64,
    pub group: Option<Arc<Group>>,
}

impl Job {
    pub(super) fn new(new: NewJob) -> Job {
        Job {
            number: new.number,
            id: new.id,
            log: Mutex::new(JobLog::new(new.output_limit, Box::new(log_file))),
            state: Mutex::default(),
            stdin: new.stdin,
            timeout: new.timeout,
            terminal: new.terminal,
            oom_kills: new.oom_kills,
            group: new.group,
        }
    }

    /// The host's number for it.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// How it ended, if it has. Its log does not grow any more then.
    pub fn end(&self) -> Option<JobEnd> {
        self.state.lock().end
    }

    /// The place of that offset in its log.
    ///
    /// # Errors
    /// [`JobError::Offset`], [`JobError::Log`].
    pub fn cursor_at(&self, offset: u64) -> Result<Cursor, JobError> {
        self.log.lock().cursor_at(offset)?.ok_or(JobError::Offset(offset))
    }

    /// Records of its log, see [`JobLog::read_records`]; what follows a gap comes with it.
    ///
    /// # Errors
    /// Those of reading the log's file.
    pub fn read_records(&self, cursor: &mut Cursor, max: usize) -> Result<Vec<u8>, LogError> {
        let log = self.log.lock();
        let mut records = log.read_records(cursor, max)?;
        if records.starts_with(&record_header(Source::Gap, 24)) {
            records.extend(log.read_records(cursor, max - records.len())?);
        }
        Ok(records)
    }

    /// What is known of it.
    pub fn info(&self) -> JobInfo {
        let (pid, started_ms, end) = {
            let state = self.state.lock();
            (state.pid, state.started_ms, state.end)
        };
        let usage = pid.filter(|_| end.is_none()).and_then(processes::usage);
        let (cpu_micros, rss_kib) = usage.or(end.map(|end| (end.cpu_micros, 0))).unwrap_or_default();
        let log_end = self.log.lock().end();
        let pid = if end.is_some() { 0 } else { pid.unwrap_or_default() as u32 };
        JobInfo { job: self.number, pid, started_ms, log_end, cpu_micros, rss_kib, end }
    }

    pub(super) fn append(&self, source: Source, bytes: &[u8]) {
        self.log.lock().append(source, bytes);
    }

    pub(super) fn log_end(&self) -> u64 {
        self.log.lock().end()
    }

    /// Memory its log takes, and whether it has a file.
    pub(super) fn log_size(&self) -> (usize, bool) {
        let log = self.log.lock();
        (log.memory(), log.in_file())
    }

    pub(super) fn pid(&self) -> Option<i32> {
        self.state.lock().pid
    }

    /// It runs. `false` when it was forgotten meanwhile.
    pub(super) fn set_started(&self, pid: i32, started_ms: u64) -> bool {
        let mut state = self.state.lock();
        state.pid = Some(pid);
        state.started_ms = started_ms;
        !state.forgotten
    }

    /// Sets the size of its terminal.
    ///
    /// # Errors
    /// ENOTTY when it has none, [`JobError::Ended`].
    pub fn resize(&self, rows: u16, columns: u16) -> Result<(), JobError> {
        let what = || format!("the terminal of job {}", self.number);
        if !self.terminal {
            return Err(JobError::System { what: what(), errno: libc::ENOTTY });
        }
        let state = self.state.lock();
        let terminal = state.terminal.as_ref().ok_or(JobError::Ended(self.number))?;
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        rustix::termios::tcsetwinsize(terminal, size).map_err(|errno| JobError::io(what(), &errno.into()))
    }

    pub(super) fn keep_terminal(&self, terminal: Option<OwnedFd>) {
        self.state.lock().terminal = terminal;
    }

    pub(super) fn keep_script(&self, script: Option<Script>) {
        self.state.lock().script = script;
    }

    pub(super) fn set_end(&self, end: JobEnd) {
        let mut state = self.state.lock();
        state.end = Some(end);
        state.script = None;
        state.terminal = None;
    }

    pub(super) fn forget(&self) {
        self.state.lock().forgotten = true;
    }

    pub(super) fn is_forgotten(&self) -> bool {
        self.state.lock().forgotten
    }
}

/// A file without a name for a log: on a disk if there is a place, else in memory.
fn log_file() -> io::Result<File> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC | OFlags::EXCL;
    for place in ["/var/tmp", "/tmp", "/run", "/dev/shm"] {
        if let Ok(fd) = rustix::fs::open(place, flags, Mode::from_raw_mode(0o600)) {
            return Ok(File::from(fd));
        }
    }
    Ok(File::from(rustix::fs::memfd_create("joblog", MemfdFlags::CLOEXEC)?))
}
