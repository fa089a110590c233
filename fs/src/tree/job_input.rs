//! `NAME/jobs/JOB/stdin`: what is written goes to the job, as fast as it reads.

use super::ops::{Answer, Caller, Responder};
use super::pending::{self, Outcome, Source, Watched};
use crate::errno::Errno;
use crate::machine::Machine;
use crate::machine::input::Input;
use crate::machine::job::Job;
use std::sync::Arc;

/// An open `stdin`. With the last one, the input is at its end.
pub struct InputFile {
    machine: Arc<Machine>,
    input: Arc<Input>,
}

impl InputFile {
    /// Opens it.
    ///
    /// # Errors
    /// EACCES for others than the owner; EBUSY when the job has begun without an input; EPIPE when it reads no more.
    pub fn open(machine: Arc<Machine>, job: &Job, caller: Caller) -> Result<InputFile, Errno> {
        machine.check_owner(caller).map_err(|error| error.errno())?;
        let input = job.input().clone();
        if let Err(errno) = input.open() {
            let why = match errno {
                Errno::EBUSY => "the job has begun without an input: open stdin, or say keep-stdin, before the start",
                _ => "the job reads no more input",
            };
            machine.record_error("stdin", errno, why, "");
            return Err(errno);
        }
        Ok(InputFile { machine, input })
    }

    /// Writes as much as there is room for, and waits until there is some.
    pub fn write(&self, data: &[u8], nonblocking: bool, responder: Responder) {
        self.machine.used();
        // What can be taken at once is not copied for it.
        match self.input.write(data) {
            Some(taken) => responder.respond(taken.map(|count| Answer::Count(count as u32))),
            None => {
                let write = Write { input: self.input.clone(), data: data.to_vec() };
                pending::answer(write, responder, nonblocking);
            }
        }
    }

    /// Whether a write would not wait.
    pub fn ready(&self) -> bool {
        self.input.takes_more()
    }

    /// What changes before it would not.
    pub fn watches(&self) -> Vec<Watched> {
        vec![Watched::Input(self.input.clone())]
    }
}

impl Drop for InputFile {
    fn drop(&mut self) {
        self.input.close();
    }
}

/// A write that waits.
struct Write {
    input: Arc<Input>,
    data: Vec<u8>,
}

impl Source for Write {
    fn attempt(&self) -> Option<Outcome> {
        self.input.write(&self.data).map(|taken| taken.map(|count| Answer::Count(count as u32)))
    }

    fn watches(&self) -> Vec<Watched> {
        vec![Watched::Input(self.input.clone())]
    }
}
