//! `NAME/jobs/JOB/`: a job.

use super::content::Content;
use super::node::{Control, Kind, MAX_SUB};
use super::value::Setting;
use crate::machine::Machine;
use crate::machine::job::Job;
use crate::machine::output::Output;
use crate::machine::setup::Field;
use std::sync::Arc;
use std::time::SystemTime;

/// A node of a job; `None` for a number too large for node numbers (the 268-millionth job of a machine).
pub fn node(slot: u32, kind: Kind, number: u64) -> Option<Control> {
    (number <= MAX_SUB).then_some(Control { slot, kind, sub: number as u32 })
}

/// The job number that a name in `jobs/` stands for: decimal, as it is listed and in no other way.
pub fn parse_number(name: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(name).ok()?;
    let number: u64 = text.parse().ok()?;
    (number.to_string() == text).then_some(number)
}

/// What is in a file of a job, and when that last changed.
pub fn content(machine: &Arc<Machine>, job: &Arc<Job>, kind: Kind) -> Option<(Content, SystemTime)> {
    let output = |which| (Content::Output(job.clone(), which), job.modified());
    let value = |field| (Content::Value(Setting::Job(machine.clone(), job.clone(), field)), job.modified());
    Some(match kind {
        Kind::JobCmd => (Content::Command(machine.clone(), job.clone()), job.created()),
        Kind::JobArgv => (Content::Value(Setting::Argv(machine.clone(), job.clone())), job.modified()),
        Kind::JobCwd => value(Field::Cwd),
        Kind::JobEnv => value(Field::Env),
        Kind::JobUser => value(Field::User),
        Kind::JobTimeout => value(Field::Timeout),
        Kind::JobTty => value(Field::Tty),
        Kind::JobStdin => (Content::Input(machine.clone(), job.clone()), job.modified()),
        Kind::JobCtl => (Content::JobCtl(machine.clone(), job.clone()), job.created()),
        Kind::JobOut => output(Output::All),
        Kind::JobStdout => output(Output::Stdout),
        Kind::JobStderr => output(Output::Stderr),
        Kind::JobExit => (Content::Exit(job.clone()), job.modified()),
        Kind::JobStatus => (Content::Text(job.status_text().into_bytes()), job.modified()),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_has_one_name() {
        assert_eq!(parse_number(b"12"), Some(12));
        for name in [&b"012"[..], b"+12", b" 12", b"", b"12 ", b"99999999999999999999999", b"\xff"] {
            assert_eq!(parse_number(name), None);
        }
    }
}
