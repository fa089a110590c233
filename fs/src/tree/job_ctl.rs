//! `NAME/jobs/JOB/ctl`.

use super::ctl::{self, Commands, Done};
use super::ops::Caller;
use crate::errno::Errno;
use crate::machine::Machine;
use crate::machine::job::Job;
use crate::machine::jobs::JOB_VERBS;
use std::sync::Arc;

/// What a read of it gives.
pub fn usage() -> String {
    ctl::usage(JOB_VERBS)
}

/// Lines for a job.
pub struct JobCommands {
    /// Its machine.
    pub machine: Arc<Machine>,
    /// The job.
    pub job: Arc<Job>,
}

impl Commands for JobCommands {
    fn run(&self, caller: Caller, words: &[String], done: Done) {
        match self.machine.check_owner(caller) {
            Ok(()) => self.machine.jobs().command(&self.job, words, done),
            Err(error) => done(Err(error)),
        }
    }

    fn failed(&self, verb: &str, errno: Errno, message: &str, line: &str) {
        self.machine.record_error(verb, errno, message, line);
    }
}
