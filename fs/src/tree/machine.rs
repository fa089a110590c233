//! `NAME/`: the files of a machine.

use super::content::Content;
use super::ctl::usage;
use super::logs::LogRef;
use super::node::Kind;
use crate::machine::output::Output;
use crate::machine::{Machine, VERBS};
use std::sync::Arc;
use std::time::SystemTime;

/// What is in a file of the directory, and when that last changed.
pub fn content(machine: &Arc<Machine>, kind: Kind) -> Option<(Content, SystemTime)> {
    let text = |text: String| Content::Text(text.into_bytes());
    let log = |log: fn(Arc<Machine>) -> LogRef| {
        let log = log(machine.clone());
        let modified = log.log().modified();
        (Content::Log(log), modified)
    };
    let jobs = machine.jobs();
    Some(match kind {
        Kind::Ctl => (Content::Ctl(machine.clone(), usage(VERBS).into_bytes()), machine.created()),
        Kind::MachineIgnore => (text(super::readme::machine_ignore()), machine.created()),
        Kind::Status => (text(format!("{}\n", machine.state().word())), machine.state_changed()),
        Kind::Info => (text(machine.info_text()), info_changed(machine)),
        Kind::InfoJson => (text(machine.info_json()), info_changed(machine)),
        Kind::Errors => log(LogRef::Errors),
        Kind::Events => log(LogRef::Events),
        Kind::Console => log(LogRef::Console),
        Kind::History => log(LogRef::History),
        Kind::Health => (Content::Health(machine.clone()), SystemTime::now()),
        Kind::Usage => (Content::Usage(machine.clone()), SystemTime::now()),
        Kind::Changes => (Content::Changes(machine.clone()), SystemTime::now()),
        Kind::Exec => (Content::Exec(machine.clone()), jobs.changed()),
        Kind::Out => match jobs.newest() {
            Some(job) => {
                let modified = job.modified();
                (Content::Output(job, Output::All), modified)
            }
            None => (Content::Text(Vec::new()), machine.created()),
        },
        Kind::Exit => match jobs.newest() {
            Some(job) => {
                let modified = job.modified();
                (Content::Exit(job), modified)
            }
            None => (Content::Text(Vec::new()), machine.created()),
        },
        _ => return super::wait::content(machine, kind).map(|content| (content, machine.state_changed())),
    })
}

fn info_changed(machine: &Machine) -> SystemTime {
    machine.state_changed().max(machine.config_changed())
}

/// Where `work` points: `files` and the working directory, relative to the machine's directory.
pub fn work_target(machine: &Machine) -> Vec<u8> {
    let mut target = b"files".to_vec();
    let dir = machine.workdir();
    // What the link is followed to is looked up in the guest's tree by the host's kernel: no way out by `..`.
    for part in dir.split(|byte| *byte == b'/').filter(|part| !matches!(*part, b"" | b"." | b"..")) {
        target.push(b'/');
        target.extend_from_slice(part);
    }
    target
}
