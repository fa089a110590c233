//! One job: a command, its output and its end.

mod end;
mod prepare;
mod text;

use super::error::MachineError;
use super::events::stamp;
use super::input::Input;
use super::output::{Output, OutputReader, expected_sizes, new_log, open_log, sizes, which};
use super::setup::Setup;
use super::store::JobRow;
use super::watch::Watch;
use end::{format_end, parse_end, reason_text};
use machinefs_protocol::job::JobEnd;
use machinefs_protocol::joblog::{JobLog, LogError};
use parking_lot::Mutex;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use text::{COMMAND_HEAD, COMMAND_IN_MEMORY, Command, spool};
pub use text::{CommandReader, Script};

/// Where a job is in its life.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Phase {
    /// Its text is being written.
    Writing,
    /// It waits for the machine.
    Queued,
    /// It was given to the agent.
    Starting,
    /// It runs.
    Running,
    /// The agent said how it ended; some of its output is still on its way.
    Draining(JobEnd),
    /// It has ended.
    Ended(JobEnd),
    /// Its machine went away under it; why.
    Lost(String),
}

enum Log {
    Live(Arc<Mutex<JobLog>>),
    /// In its file, which is opened by who reads it.
    Saved,
}

struct Inner {
    phase: Phase,
    command: Command,
    log: Log,
    /// Lengths of the three readings. Beside the log, since its lock is held while it is written to the disk.
    sizes: [u64; 3],
    modified: SystemTime,
    pid: u32,
    started_ms: Option<u64>,
    /// Somebody is ending it.
    finishing: bool,
    /// Some output could not be kept on the host's disk; whether that is still to be told.
    storage_failure: Option<bool>,
    /// It ended, and all of it is written down.
    stored: bool,
    /// The agent knows it, or may.
    at_agent: bool,
    setup: Setup,
    /// Somebody writes the script of a job that is being set up.
    claimed: bool,
    /// Its text is complete.
    submitted: bool,
}

/// A job.
pub struct Job {
    number: u64,
    name: Option<String>,
    uid: u32,
    created: SystemTime,
    dir: PathBuf,
    inner: Mutex<Inner>,
    input: Arc<Input>,
    watch: Watch,
}

/// The last moment of the year 9999, in milliseconds since 1970: later ones have no form in RFC 3339, and a guest may
/// claim any.
const LATEST: u64 = 253_402_300_799_999;

fn in_millis(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

fn from_millis(millis: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_millis(millis.min(LATEST))
}

impl Job {
    /// A job whose text is about to be written. Its output goes to `dir`.
    pub(super) fn new(number: u64, uid: u32, dir: &Path, limit: u64) -> Job {
        let inner = Inner {
            phase: Phase::Writing,
            command: Command::default(),
            log: Log::Live(Arc::new(Mutex::new(new_log(dir, number, limit)))),
            sizes: [0; 3],
            modified: SystemTime::now(),
            pid: 0,
            started_ms: None,
            finishing: false,
            storage_failure: None,
            stored: false,
            at_agent: false,
            setup: Setup::default(),
            claimed: false,
            submitted: false,
        };
        let (dir, watch) = (dir.to_path_buf(), Watch::new());
        let (created, inner, input) = (SystemTime::now(), Mutex::new(inner), Arc::default());
        Job { number, name: None, uid, created, dir, inner, input, watch }
    }

    /// The same with a name of its own.
    pub(super) fn named(self, name: Option<&str>) -> Job {
        Job { name: name.map(str::to_string), ..self }
    }

    /// A job that was found in the machine.
    pub(super) fn recovered(number: u64, uid: u32, dir: &Path, limit: u64, started_ms: u64) -> Job {
        let job = Job::new(number, uid, dir, limit);
        {
            let mut inner = job.inner.lock();
            inner.phase = Phase::Queued;
            inner.at_agent = true;
            inner.submitted = true;
            inner.command = Command::whole(b"# found running in the machine; its text is not known\n".to_vec());
        }
        // Whether it has an input is not known: if so, it can be written to.
        Job { created: from_millis(started_ms), input: Arc::new(Input::of_running(true)), ..job }
    }

    /// A job as it was written down.
    pub(super) fn load(row: JobRow, dir: &Path, limit: u64) -> Job {
        let job = Job::new(row.number, row.uid, dir, limit).named(row.name.as_deref());
        let setup = Setup::from_row(&row.setup);
        // One that is still being set up is opened anew.
        let input = if setup.open { Input::default() } else { Input::of_running(setup.input) };
        {
            let mut inner = job.inner.lock();
            inner.started_ms = row.started_ms.map(|millis| millis as u64);
            inner.modified = from_millis(row.ended_ms.unwrap_or(row.created_ms) as u64);
            // A text in a file leaves that much of itself in the database, at least.
            let file = (row.command.len() >= COMMAND_HEAD)
                .then(|| std::fs::metadata(dir.join(format!("{}.cmd", row.number))).ok())
                .flatten();
            inner.command = match file {
                Some(file) => Command::filed(&row.command, file.len()),
                None => Command::whole(row.command),
            };
            inner.phase = match (&row.end, row.ended_ms) {
                (Some(end), Some(ended)) => parse_end(end, ended as u64, row.cpu_micros as u64, row.max_rss_kib as u64),
                _ if setup.open => Phase::Writing,
                _ => Phase::Queued,
            };
            inner.submitted = !setup.open;
            inner.setup = setup;
            inner.stored = matches!(inner.phase, Phase::Ended(_) | Phase::Lost(_));
            inner.at_agent = inner.phase == Phase::Queued;
            if inner.stored {
                let sizes = open_log(dir, row.number).and_then(|log| sizes(&log).map_err(io::Error::from));
                inner.log = Log::Saved;
                inner.sizes = sizes.unwrap_or([0; 3]);
            }
        }
        Job { created: from_millis(row.created_ms as u64), input: Arc::new(input), ..job }
    }

    /// Its number within the machine.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Its name, if it was given one: that of the newest with it is also its directory's.
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// How long it has run, once it has ended.
    pub(super) fn ran(&self) -> Duration {
        let inner = self.inner.lock();
        match &inner.phase {
            Phase::Ended(end) => {
                Duration::from_millis(end.ended_ms.saturating_sub(inner.started_ms.unwrap_or(end.ended_ms)))
            }
            _ => Duration::ZERO,
        }
    }

    /// Who gave it (a user of the host).
    pub fn caller_uid(&self) -> u32 {
        self.uid
    }

    /// When its first byte was written.
    pub fn created(&self) -> SystemTime {
        self.created
    }

    /// When something of it last changed.
    pub fn modified(&self) -> SystemTime {
        self.inner.lock().modified
    }

    /// Wakes on new output and on the end.
    pub fn watch(&self) -> &Watch {
        &self.watch
    }

    /// Length of its text, in bytes; 0 while that is being written.
    pub fn command_len(&self) -> u64 {
        self.inner.lock().command.len
    }

    /// A reader of its text. Opens a file.
    ///
    /// # Errors
    /// The host's spool cannot be read.
    pub fn command(&self) -> Result<CommandReader, MachineError> {
        let command = self.inner.lock().command.clone();
        if !command.in_file {
            return Ok(CommandReader::Text(command.head));
        }
        let file = File::open(self.command_path()).map_err(|error| spool(&error))?;
        Ok(CommandReader::File(file, command.len))
    }

    /// Where a long text of it is.
    pub fn command_path(&self) -> PathBuf {
        self.dir.join(format!("{}.cmd", self.number))
    }

    /// How its text begins, for `errors`.
    pub(super) fn command_start(&self) -> String {
        let inner = self.inner.lock();
        let head = inner.command.head.get(..200).unwrap_or(&inner.command.head);
        String::from_utf8_lossy(head).trim_end().to_string()
    }

    pub(super) fn command_in_file(&self) -> bool {
        self.inner.lock().command.in_file
    }

    /// Takes its text. Writes a long one to the disk: see [`Script::is_to_be_filed`].
    ///
    /// # Errors
    /// ENOSPC and others of the disk.
    pub(super) fn keep_script(&self, script: Script) -> io::Result<()> {
        let command = match script {
            Script::Text(text) if text.len() > COMMAND_IN_MEMORY => {
                std::fs::write(self.command_path(), &text)?;
                Command::filed(&text, text.len() as u64)
            }
            Script::Text(text) => Command::whole(text),
            Script::File { start, len } => Command::filed(&start, len),
        };
        self.inner.lock().command = command;
        Ok(())
    }

    /// Adds its text to the body of a request. Reads the disk where that is long.
    pub(super) fn add_command(&self, body: &mut Vec<u8>) -> io::Result<()> {
        let command = self.inner.lock().command.clone();
        if !command.in_file {
            body.extend_from_slice(&command.head);
            return Ok(());
        }
        let file = File::open(self.command_path())?;
        body.reserve_exact(usize::try_from(command.len).unwrap_or(usize::MAX));
        let read = file.take(command.len).read_to_end(body)?;
        if (read as u64) < command.len { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
    }

    /// Whether it has ended or was lost.
    pub fn is_done(&self) -> bool {
        matches!(self.inner.lock().phase, Phase::Ended(_) | Phase::Lost(_))
    }

    pub(super) fn phase(&self) -> Phase {
        self.inner.lock().phase.clone()
    }

    /// Moves it on, unless it has ended already.
    pub(super) fn set_phase(&self, phase: Phase) -> bool {
        {
            let mut inner = self.inner.lock();
            if inner.finishing || matches!(inner.phase, Phase::Ended(_) | Phase::Lost(_)) {
                return false;
            }
            inner.phase = phase;
            inner.modified = SystemTime::now();
        }
        self.watch.notify();
        true
    }

    /// Ends it, once: `history` gets its line before anybody can see that it has ended. Gives whether it was this call
    /// that ended it.
    pub(super) fn finish(&self, phase: Phase, history: impl FnOnce(&str)) -> bool {
        {
            let mut inner = self.inner.lock();
            if inner.finishing || matches!(inner.phase, Phase::Ended(_) | Phase::Lost(_)) {
                return false;
            }
            inner.finishing = true;
            inner.modified = SystemTime::now();
        }
        history(&self.history_line_of(&phase));
        self.inner.lock().phase = phase;
        self.input.job_ended();
        self.watch.notify();
        true
    }

    /// It was not given to the agent after all.
    pub(super) fn requeue(&self) {
        let mut inner = self.inner.lock();
        if inner.phase == Phase::Starting {
            inner.phase = Phase::Queued;
        }
        inner.at_agent = false;
    }

    /// Whether all of it is written down, so that the agent may forget it.
    pub(super) fn is_stored(&self) -> bool {
        self.inner.lock().stored
    }

    pub(super) fn set_stored(&self) {
        self.inner.lock().stored = true;
    }

    pub(super) fn is_at_agent(&self) -> bool {
        self.inner.lock().at_agent
    }

    pub(super) fn set_at_agent(&self, at_agent: bool) {
        self.inner.lock().at_agent = at_agent;
    }

    pub(super) fn set_started(&self, pid: u32, started_ms: u64) {
        let mut inner = self.inner.lock();
        inner.pid = pid;
        inner.started_ms = Some(started_ms.min(LATEST));
        if inner.phase == Phase::Starting {
            inner.phase = Phase::Running;
        }
    }

    /// `Some(0)`, `Some(137)` … once it has ended; an error when it was lost with its machine; `None` before.
    pub fn exit(&self) -> Option<Result<u8, MachineError>> {
        match &self.inner.lock().phase {
            Phase::Ended(end) => Some(Ok(end.reason.code())),
            Phase::Lost(why) => Some(Err(MachineError::down(format!("job {} was lost: {why}", self.number)))),
            _ => None,
        }
    }

    /// The lines of `status`.
    pub fn status_text(&self) -> String {
        let inner = self.inner.lock();
        let (state, reason) = match &inner.phase {
            Phase::Writing if inner.setup.open => ("setup", String::from("-")),
            Phase::Writing => ("writing", "-".into()),
            Phase::Queued => ("queued", "-".into()),
            Phase::Starting => ("starting", "-".into()),
            Phase::Running | Phase::Draining(_) => ("running", "-".into()),
            Phase::Ended(end) => ("exited", reason_text(end.reason)),
            Phase::Lost(why) => ("lost", why.clone()),
        };
        let started = inner.started_ms.map_or("-".into(), |millis| stamp(from_millis(millis)));
        let mut text = format!("state {state}\nreason {reason}\npid {}\nstarted {started}\n", inner.pid);
        if let Phase::Ended(end) = &inner.phase {
            let seconds = end.ended_ms.saturating_sub(inner.started_ms.unwrap_or(end.ended_ms)) as f64 / 1e3;
            text.push_str(&format!(
                "exit {}\nseconds {seconds:.3}\ncpu {:.6}\nrss {}K\n",
                end.reason.code(),
                end.cpu_micros as f64 / 1e6,
                end.max_rss_kib
            ));
        }
        text
    }

    // ---- output ----

    /// Where the log goes on, in log bytes.
    pub(super) fn log_end(&self) -> u64 {
        match self.live_log() {
            Some(log) => log.lock().end(),
            None => u64::MAX,
        }
    }

    fn live_log(&self) -> Option<Arc<Mutex<JobLog>>> {
        match &self.inner.lock().log {
            Log::Live(log) => Some(log.clone()),
            Log::Saved => None,
        }
    }

    /// Takes records from the agent.
    pub(super) fn append(&self, records: &[u8]) -> Result<(), LogError> {
        let Some(log) = self.live_log() else { return Ok(()) };
        let (sizes, failed) = {
            let mut log = log.lock();
            log.append_records(records)?;
            (expected_sizes(&log), log.storage_failed())
        };
        {
            let mut inner = self.inner.lock();
            if failed && inner.storage_failure.is_none() {
                inner.storage_failure = Some(true);
            }
            inner.sizes = sizes;
            inner.modified = SystemTime::now();
        }
        self.watch.notify();
        Ok(())
    }

    /// Whether output was lost for want of room on the host's disk: says so once.
    pub(super) fn take_storage_failure(&self) -> bool {
        self.inner.lock().storage_failure.as_mut().is_some_and(std::mem::take)
    }

    /// Puts the log into its file and frees the memory. Writes to the disk.
    pub(super) fn save_log(&self) -> Result<(), LogError> {
        let Some(log) = self.live_log() else { return Ok(()) };
        let sizes = {
            let mut log = log.lock();
            log.save()?;
            sizes(&log)?
        };
        let mut inner = self.inner.lock();
        inner.log = Log::Saved;
        inner.sizes = sizes;
        Ok(())
    }

    /// Bytes a reader would get by now.
    pub fn output_len(&self, output: Output) -> u64 {
        self.inner.lock().sizes[which(output)]
    }

    /// Bytes on the host's disk, about.
    pub(super) fn disk(&self) -> u64 {
        let inner = self.inner.lock();
        inner.sizes[which(Output::All)] + if inner.command.in_file { inner.command.len } else { 0 }
    }

    /// A private cursor, from the first byte.
    pub fn reader(self: &Arc<Self>, output: Output) -> OutputReader {
        OutputReader::new(self.clone(), output)
    }

    pub(super) fn open_log(&self) -> io::Result<Arc<Mutex<JobLog>>> {
        match self.live_log() {
            Some(log) => Ok(log),
            None => Ok(Arc::new(Mutex::new(open_log(&self.dir, self.number)?))),
        }
    }

    pub(super) fn row(&self) -> JobRow {
        let inner = self.inner.lock();
        self.row_of(&inner, &inner.phase)
    }

    fn row_of(&self, inner: &Inner, phase: &Phase) -> JobRow {
        let mut row = JobRow {
            number: self.number,
            uid: self.uid,
            created_ms: in_millis(self.created) as i64,
            started_ms: inner.started_ms.map(|millis| millis as i64),
            ended_ms: None,
            end: None,
            cpu_micros: 0,
            max_rss_kib: 0,
            command: inner.command.head.clone(),
            name: self.name.clone(),
            setup: inner.setup.to_row(),
        };
        match phase {
            Phase::Ended(end) => {
                row.ended_ms = Some(end.ended_ms.min(LATEST) as i64);
                row.end = Some(format_end(end.reason));
                row.cpu_micros = end.cpu_micros.min(i64::MAX as u64) as i64;
                row.max_rss_kib = end.max_rss_kib.min(i64::MAX as u64) as i64;
            }
            Phase::Lost(why) => {
                row.ended_ms = Some(in_millis(inner.modified) as i64);
                row.end = Some(format!("lost {why}"));
            }
            _ => {}
        }
        row
    }

    #[cfg(test)]
    fn history_line(&self) -> String {
        let phase = self.phase();
        self.history_line_of(&phase)
    }

    /// The line of `history` of a job that ends like this.
    fn history_line_of(&self, phase: &Phase) -> String {
        let row = self.row_of(&self.inner.lock(), phase);
        let started = row.started_ms.unwrap_or(row.created_ms);
        let seconds = row.ended_ms.unwrap_or(started).saturating_sub(started).max(0) as f64 / 1e3;
        let exit = match phase {
            Phase::Ended(end) => end.reason.code().to_string(),
            _ => "lost".to_string(),
        };
        let text = String::from_utf8_lossy(&row.command);
        let short: String = text.trim_end_matches('\n').chars().take(COMMAND_HEAD).collect();
        format!(
            "{} {} {seconds:.3} {exit} {} {}",
            self.number,
            stamp(from_millis(started as u64)),
            self.uid,
            super::events::quote(&short)
        )
    }

    pub(super) fn remove_files(&self) {
        for suffix in ["log", "cmd"] {
            // Not there is what is wanted; any other failure goes with the machine's directory.
            let _ = std::fs::remove_file(self.dir.join(format!("{}.{suffix}", self.number)));
        }
    }
}

#[cfg(test)]
mod tests;
