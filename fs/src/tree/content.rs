//! What is in a control file, whatever directory it is in.

use super::job_ctl;
use super::logs::LogRef;
use super::stream::exit_text;
use super::value::Setting;
use super::wait::Wanted;
use crate::machine::Machine;
use crate::machine::job::Job;
use crate::machine::output::Output;
use std::sync::Arc;

/// What stat shows of a job's input, which nobody can read: the kernel lets several write at once, so that nobody waits
/// for another in the kernel, only within a file's size. One write(2) is never longer.
pub const INPUT_SIZE: u64 = 1 << 31;

/// Content of a control file.
pub enum Content {
    /// A text, as it is now.
    Text(Vec<u8>),
    /// A log, which ends where it ends now.
    Log(LogRef),
    /// The text of a job; written, it starts the job.
    Command(Arc<Machine>, Arc<Job>),
    /// What a job reads.
    Input(Arc<Machine>, Arc<Job>),
    /// Commands for a job.
    JobCtl(Arc<Machine>, Arc<Job>),
    /// What a job prints; blocks while it runs.
    Output(Arc<Job>, Output),
    /// A job's exit code; blocks while it runs.
    Exit(Arc<Job>),
    /// Blocks until the machine is in a state.
    State(Arc<Machine>, Wanted),
    /// A log from now on; blocks.
    Follow(LogRef),
    /// What the agent says, asked at open.
    Health(Arc<Machine>),
    /// Commands for the service; the text is its usage.
    RootCtl(Vec<u8>),
    /// Commands for a machine; the text is its usage.
    Ctl(Arc<Machine>, Vec<u8>),
    /// Scripts to run.
    Exec(Arc<Machine>),
    /// What it uses, asked at open.
    Usage(Arc<Machine>),
    /// A value.
    Value(Setting),
    /// What differs from its image, looked at when it is opened.
    Changes(Arc<Machine>),
}

impl Content {
    /// The size that stat shows: what a read would give now, and at least 1 for what blocks, since `tar` and
    /// `busybox cat` do not read a file of size 0. `health`: the size of the machine's last health text.
    pub fn size(&self, health: impl FnOnce(&Machine) -> u64) -> u64 {
        match self {
            Content::Text(text) | Content::RootCtl(text) | Content::Ctl(_, text) => text.len() as u64,
            Content::Log(log) => log.log().len(),
            Content::Command(_, job) => job.command_len(),
            Content::Input(..) => INPUT_SIZE,
            Content::JobCtl(..) => job_ctl::usage().len() as u64,
            Content::Output(job, which) => {
                // Asked in this order: the length of a job that has ended is final.
                let done = job.is_done();
                let len = job.output_len(*which);
                if done { len } else { len.max(1) }
            }
            Content::Exit(job) => match exit_text(job) {
                Some(Ok(text)) => text.len() as u64,
                _ => 1,
            },
            Content::State(machine, wanted) => match wanted.text(machine.state()) {
                Some(Ok(text)) => text.len() as u64,
                _ => 1,
            },
            Content::Follow(_) => 1,
            Content::Health(machine) => health(machine),
            Content::Exec(_) => 0,
            Content::Usage(_) => Machine::usage_size(),
            Content::Value(setting) => setting.text().len() as u64,
            Content::Changes(machine) => machine.changes_size(),
        }
    }
}
