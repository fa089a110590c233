//! `NAME/exec`: each text written to it is one job. Opened for reading and writing it is private: what is read is the
//! output of the texts written on this open file, job after job: the output to its end (a read of 0 bytes), then
//! `exit CODE`, then the next.

use super::ops::{Answer, Caller, Responder};
use super::pending::Watched;
use super::script::FiledScript;
use super::stream::{OutputStream, Taken};
use super::text::{Held, Owner, Reason, Text, is_full_buffer, slice};
use crate::errno::Errno;
use crate::machine::Machine;
use crate::machine::error::MachineError;
use crate::machine::job::{Job, Script};
use crate::machine::output::Output;
use crate::machine::watch::Watch;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::Arc;

/// Jobs of one open file whose output may wait to be read.
const MAX_UNREAD: usize = 1000;

/// Bytes of a script that is being written that are kept in memory.
const TEXT_IN_MEMORY: usize = 64 * 1024;

/// How much of a script is quoted in `errors`, in bytes.
const QUOTED: usize = 200;

/// What job a text is for.
pub enum Target {
    /// A new one.
    New {
        /// Opened for reading and writing: what is read is the output of these jobs.
        private: bool,
    },
    /// One that is being set up.
    Job(Arc<Job>),
}

/// An open `exec`, or `cmd` of a job that is being set up.
pub struct ExecFile {
    machine: Arc<Machine>,
    target: Target,
    writing: Mutex<Writing>,
    reason: Reason,
    /// Never locked while a job is begun or submitted: that wakes readers, who lock it.
    reading: Mutex<Reading>,
    /// Wakes when there is another job to read from: a poller that waits for one has none to watch.
    next: Arc<Watch>,
}

struct Writing {
    text: Text,
    /// The job whose text is pending.
    job: Option<Arc<Job>>,
    /// What of the text is not in memory any more.
    filed: Option<Arc<FiledScript>>,
}

impl Writing {
    fn spill(&mut self) -> Option<Arc<FiledScript>> {
        let job = self.job.as_ref()?;
        let script = self.filed.get_or_insert_with(|| Arc::new(FiledScript::new(job.command_path())));
        let (piece, held) = self.text.spill();
        script.add(piece, held);
        Some(script.clone())
    }
}

/// What is still to be done about a write.
struct TakenIn {
    /// Its job has just got its number.
    begins: bool,
    /// Goes to the disk.
    filed: Option<Arc<FiledScript>>,
}

/// A complete text.
struct Complete {
    job: Arc<Job>,
    text: Vec<u8>,
    filed: Option<Arc<FiledScript>>,
}

fn not_kept(error: &std::io::Error) -> MachineError {
    MachineError::no_space(format!("the script cannot be kept on the host's disk: {error}"))
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
    /// Opens it.
    pub fn new(machine: Arc<Machine>, target: Target, text: Text) -> ExecFile {
        ExecFile {
            machine,
            target,
            writing: Mutex::new(Writing { text, job: None, filed: None }),
            reason: Reason::default(),
            reading: Mutex::default(),
            next: Arc::default(),
        }
    }

    /// Adds to the text. The first bytes of a text begin its job, and are answered when its number is written down; a
    /// long text goes to the disk, and its bytes are answered when they are there.
    ///
    /// Fails with EACCES for others than the owner, EPERM for what may not be run, EHOSTDOWN, EMFILE, E2BIG, ENOSPC; the
    /// reason can be read here and in `errors`.
    pub fn write(self: &Arc<Self>, caller: Caller, owner: Owner, data: &[u8], responder: Responder) {
        let count = data.len() as u32;
        let taken = match self.take_in(caller, owner, data) {
            Ok(taken) => taken,
            Err(errno) => return responder.respond(Err(errno)),
        };
        let me = self.clone();
        let answer = move |result: Result<(), MachineError>| {
            responder.respond(match result {
                Ok(()) => Ok(Answer::Count(count)),
                Err(error) => {
                    let mut writing = me.writing.lock();
                    Err(me.refuse(&mut writing, owner, error.errno(), &error.to_string(), &[]))
                }
            });
        };
        let machine = self.machine.clone();
        let then = move |result: Result<(), MachineError>| match taken.filed {
            Some(script) if result.is_ok() => {
                machine.on_disk(move || answer(script.write_out().map_err(|error| not_kept(&error))));
            }
            _ => answer(result),
        };
        if taken.begins { self.machine.settled(then) } else { then(Ok(())) }
    }

    fn take_in(&self, caller: Caller, owner: Owner, data: &[u8]) -> Result<TakenIn, Errno> {
        let mut writing = self.writing.lock();
        writing.text.check()?;
        if data.is_empty() {
            return Ok(TakenIn { begins: false, filed: None });
        }
        let mut begins = false;
        if writing.job.is_none() {
            match self.machine.check_owner(caller).and_then(|()| self.begin(caller)) {
                Ok(job) => {
                    begins = matches!(self.target, Target::New { .. });
                    writing.job = Some(job);
                }
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
        // What may still go on in another write is looked at when it is complete.
        if let Err(error) = match &writing.filed {
            Some(_) => self.machine.check_command_length(writing.text.len() as u64),
            None if is_full_buffer(data.len()) => Ok(()),
            None => self.machine.check_command(writing.text.bytes()),
        } {
            return Err(self.refuse(&mut writing, owner, error.errno(), &error.to_string(), data));
        }
        self.reason.clear();
        let filed = if writing.text.bytes().len() > TEXT_IN_MEMORY { writing.spill() } else { None };
        Ok(TakenIn { begins, filed })
    }

    /// The job that a text is for.
    fn begin(&self, caller: Caller) -> Result<Arc<Job>, MachineError> {
        match &self.target {
            Target::New { private } => {
                if *private && self.reading.lock().next.len() >= MAX_UNREAD {
                    let what = format!("the output of {MAX_UNREAD} jobs is unread on this open file");
                    return Err(MachineError::limit(what));
                }
                self.machine.jobs().begin(caller)
            }
            Target::Job(job) => job.claim().map(|()| job.clone()),
        }
    }

    /// Its text is not run.
    fn give_up(&self, job: &Arc<Job>, errno: Errno, message: &str) {
        match self.target {
            Target::New { .. } => self.machine.jobs().abandon(job, errno, message),
            // It can be written again.
            Target::Job(_) => job.unclaim(),
        }
    }

    fn refuse(&self, writing: &mut Writing, owner: Owner, errno: Errno, message: &str, data: &[u8]) -> Errno {
        let filed = writing.filed.take().map(|filed| filed.described().0).unwrap_or_default();
        let known = [filed.as_slice(), writing.text.bytes(), data].into_iter().find(|bytes| !bytes.is_empty());
        let command = String::from_utf8_lossy(slice(known.unwrap_or_default(), 0, QUOTED)).trim_end().to_string();
        if let Some(job) = writing.job.take() {
            self.give_up(&job, errno, message);
        }
        writing.text.refuse(owner, errno);
        self.reason.set(message);
        self.machine.record_error("exec", errno, message, &command);
        errno
    }

    /// A descriptor was closed. A script that was complete with that is answered when it is written down.
    pub fn flush(self: &Arc<Self>, owner: Owner, responder: Responder) {
        let complete = {
            let mut writing = self.writing.lock();
            let text = writing.text.flush(owner);
            text.and_then(|text| self.complete(&mut writing, text))
        };
        self.submit(complete, move |result| responder.respond(result.map(|()| Answer::Ok)));
    }

    /// The text, if there is one, is complete; answers as [`ExecFile::flush`].
    pub fn finish(self: &Arc<Self>, responder: Responder) {
        self.end_then(move |result| responder.respond(result.map(|()| Answer::Ok)));
    }

    /// The same, with nobody to answer to: what becomes of it shows in its job.
    pub fn end(self: &Arc<Self>) {
        self.end_then(|_| {});
    }

    fn end_then(self: &Arc<Self>, done: impl FnOnce(Result<(), Errno>) + Send + 'static) {
        let complete = {
            let mut writing = self.writing.lock();
            let text = writing.text.end();
            text.and_then(|text| self.complete(&mut writing, text))
        };
        self.submit(complete, done);
    }

    fn complete(&self, writing: &mut Writing, text: Vec<u8>) -> Option<Complete> {
        let job = writing.job.take()?;
        if matches!(self.target, Target::New { private: true }) {
            self.reading.lock().next.push_back(job.clone());
        }
        let filed = writing.filed.take();
        if let Some(filed) = &filed {
            // The rest of it; no longer counted, and gone from memory in a moment.
            filed.add(text, Held::default());
            return Some(Complete { job, text: Vec::new(), filed: Some(filed.clone()) });
        }
        Some(Complete { job, text, filed })
    }

    fn submit(self: &Arc<Self>, complete: Option<Complete>, done: impl FnOnce(Result<(), Errno>) + Send + 'static) {
        let Some(Complete { job, text, filed }) = complete else { return done(Ok(())) };
        self.next.notify();
        let me = self.clone();
        let done = move |result: Result<(), MachineError>| {
            done(result.map_err(|error| {
                me.reason.set(&error.to_string());
                me.machine.record_error("exec", error.errno(), &error.to_string(), "");
                error.errno()
            }));
        };
        let Some(script) = filed else {
            return self.machine.jobs().submit(&job, Script::Text(text), done);
        };
        let file = self.clone();
        self.machine.on_disk(move || {
            let (start, len) = script.described();
            match script.write_out() {
                Ok(()) => file.machine.jobs().submit(&job, Script::File { start, len }, done),
                Err(error) => {
                    let error = not_kept(&error);
                    file.give_up(&job, error.errno(), &error.to_string());
                    done(Err(error));
                }
            }
        });
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
        let job = reading.current.iter().map(|current| Watched::Job(current.job.clone()));
        job.chain([Watched::Other(self.next.clone())]).collect()
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
