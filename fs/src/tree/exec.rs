//! `NAME/exec`: each text written to it is one job. Opened for reading and writing it is private: what is read is the
//! output of the texts written on this open file, job after job: the output to its end (a read of 0 bytes), then
//! `exit CODE`, then the next.

use super::ops::Caller;
use super::pending::Watched;
use super::stream::{OutputStream, Taken};
use super::text::{Owner, Reason, Text, is_full_buffer, slice};
use crate::errno::Errno;
use crate::machine::Machine;
use crate::machine::error::MachineError;
use crate::machine::job::Job;
use crate::machine::output::Output;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::Arc;

/// Jobs of one open file whose output may wait to be read.
const MAX_UNREAD: usize = 1000;

/// How much of a script is quoted in `errors`, in bytes.
const QUOTED: usize = 200;

/// An open `exec`.
pub struct ExecFile {
    machine: Arc<Machine>,
    private: bool,
    writing: Mutex<Writing>,
    reason: Reason,
    /// Never locked while a job is begun or submitted: that wakes readers, who lock it.
    reading: Mutex<Reading>,
}

struct Writing {
    text: Text,
    /// The job whose text is pending.
    job: Option<Arc<Job>>,
}

#[derive(Default)]
struct Reading {
    current: Option<Current>,
    next: VecDeque<Arc<Job>>,
}

struct Current {
    job: Arc<Job>,
    part: Part,
}

enum Part {
    Output(OutputStream),
    /// The line with the exit code, once it is known, and how much of it was given.
    Exit(Option<Vec<u8>>, usize),
}

impl ExecFile {
    /// `private`: opened for reading and writing.
    pub fn new(machine: Arc<Machine>, private: bool, text: Text) -> ExecFile {
        ExecFile {
            machine,
            private,
            writing: Mutex::new(Writing { text, job: None }),
            reason: Reason::default(),
            reading: Mutex::default(),
        }
    }

    /// Adds to the text. The first bytes of a text begin its job.
    ///
    /// # Errors
    /// EACCES for others than the owner, EPERM for what may not be run, EHOSTDOWN, EMFILE, E2BIG, ENOSPC; the reason can be read here and in
    /// `errors`.
    pub fn write(&self, caller: Caller, owner: Owner, data: &[u8]) -> Result<(), Errno> {
        let mut writing = self.writing.lock();
        writing.text.check()?;
        if data.is_empty() {
            return Ok(());
        }
        if writing.job.is_none() {
            let begun = self.machine.check_owner(caller).and_then(|()| self.check_unread());
            match begun.and_then(|()| self.machine.jobs().begin(caller)) {
                Ok(job) => writing.job = Some(job),
                Err(error) => return Err(self.refuse(&mut writing, owner, error.errno(), &error.to_string(), data)),
            }
        }
        // It may have gone down since the text began; errors must come from write.
        if !self.machine.accepts_jobs() {
            let error = self.machine.down_error();
            return Err(self.refuse(&mut writing, owner, error.errno(), &error.to_string(), data));
        }
        if let Err(errno) = writing.text.push(owner, data) {
            let message = match errno {
                Errno::E2BIG => "the script is longer than 16 MiB; nothing of it was run",
                _ => "too many unfinished scripts: the limit of pending text was reached",
            };
            return Err(self.refuse(&mut writing, owner, errno, message, data));
        }
        if !is_full_buffer(data.len())
            && let Err(error) = self.machine.check_command(writing.text.bytes())
        {
            return Err(self.refuse(&mut writing, owner, error.errno(), &error.to_string(), data));
        }
        self.reason.clear();
        Ok(())
    }

    fn check_unread(&self) -> Result<(), MachineError> {
        if self.private && self.reading.lock().next.len() >= MAX_UNREAD {
            return Err(MachineError::limit(format!("the output of {MAX_UNREAD} jobs is unread on this open file")));
        }
        Ok(())
    }

    fn refuse(&self, writing: &mut Writing, owner: Owner, errno: Errno, message: &str, data: &[u8]) -> Errno {
        let start = if writing.text.bytes().is_empty() { data } else { writing.text.bytes() };
        let command = String::from_utf8_lossy(slice(start, 0, QUOTED)).trim_end().to_string();
        if let Some(job) = writing.job.take() {
            self.machine.jobs().abandon(&job, errno, message);
        }
        writing.text.refuse(owner, errno);
        self.reason.set(message);
        self.machine.record_error("exec", errno, message, &command);
        errno
    }

    /// A descriptor was closed.
    pub fn flush(&self, owner: Owner) {
        let mut writing = self.writing.lock();
        if let Some(text) = writing.text.flush(owner) {
            self.submit(&mut writing, text);
        }
    }

    /// The text, if there is one, is complete.
    pub fn finish(&self) {
        let mut writing = self.writing.lock();
        if let Some(text) = writing.text.end() {
            self.submit(&mut writing, text);
        }
    }

    fn submit(&self, writing: &mut Writing, text: Vec<u8>) {
        let Some(job) = writing.job.take() else { return };
        if self.private {
            self.reading.lock().next.push_back(job.clone());
        }
        self.machine.jobs().submit(&job, text);
    }

    /// What comes before any output: why the last write failed.
    pub fn take_reason(&self, max: usize) -> Option<Vec<u8>> {
        self.reason.take(max)
    }

    /// Takes the next bytes.
    pub fn take(&self, max: usize) -> Taken {
        self.reading.lock().take(max)
    }

    /// Whether a read would not wait.
    pub fn ready(&self) -> bool {
        self.reason.is_set() || self.reading.lock().ready()
    }

    /// What changes before `take` gives something.
    pub fn watches(&self) -> Vec<Watched> {
        let mut reading = self.reading.lock();
        reading.advance();
        reading.current.iter().map(|current| Watched::Job(current.job.clone())).collect()
    }
}

impl Reading {
    fn advance(&mut self) {
        if self.current.is_none() {
            self.current = self.next.pop_front().map(|job| {
                let part = Part::Output(OutputStream::new(&job, Output::All));
                Current { job, part }
            });
        }
    }

    fn take(&mut self, max: usize) -> Taken {
        self.advance();
        // Nothing was written, or all of it was read.
        let Some(current) = &mut self.current else { return Some(Ok(Vec::new())) };
        match &mut current.part {
            Part::Output(output) => {
                let taken = output.take(max)?;
                if taken.as_ref().map_or(true, |data| data.is_empty()) {
                    current.part = Part::Exit(None, 0);
                }
                Some(taken)
            }
            Part::Exit(line, given) => {
                if line.is_none() {
                    match current.job.exit()? {
                        Ok(code) => *line = Some(format!("exit {code}\n").into_bytes()),
                        Err(error) => {
                            self.current = None;
                            return Some(Err(error.errno()));
                        }
                    }
                }
                let line = line.as_deref().unwrap_or_default();
                let part = slice(line, *given as u64, max).to_vec();
                *given += part.len();
                if *given >= line.len() {
                    self.current = None;
                }
                Some(Ok(part))
            }
        }
    }

    fn ready(&mut self) -> bool {
        self.advance();
        self.current.as_ref().is_none_or(|current| match &current.part {
            Part::Output(output) => output.ready(),
            Part::Exit(line, _) => line.is_some() || current.job.exit().is_some(),
        })
    }
}
