//! The verbs of the root's `ctl`.

use super::error::MachineError;
use super::registry::Registry;
use super::state::State;
use super::{Machine, Verb};
use crate::tree::ops::Caller;
use std::sync::Arc;

type Done<T> = Box<dyn FnOnce(Result<T, MachineError>) + Send>;

/// The verbs of the root's `ctl`.
pub const VERBS: &[Verb] = &[
    Verb {
        name: "create",
        usage: "create NAME [KEY=VALUE…]",
        doc: "make a machine, as mkdir does, with a configuration; all of it or nothing",
    },
    Verb { name: "stop", usage: "stop all", doc: "stop all machines of yours; succeeds for those that are stopped" },
    Verb { name: "destroy", usage: "destroy all", doc: "destroy all machines of yours that are not protected" },
    Verb { name: "prune", usage: "prune", doc: "destroy your machines that are stopped, failed or lost" },
    Verb { name: "shutdown", usage: "shutdown", doc: "unmount and end the daemon; machines run on" },
];

/// Splits `key=value` words.
///
/// # Errors
/// EINVAL for a word without `=`.
pub(super) fn parse_pairs(words: &[String]) -> Result<Vec<(String, String)>, MachineError> {
    words
        .iter()
        .map(|word| match word.split_once('=') {
            Some((key, value)) if !key.is_empty() => Ok((key.to_string(), value.to_string())),
            _ => Err(MachineError::invalid(format!("\"{word}\" is not key=value"))),
        })
        .collect()
}

impl Registry {
    /// A line of the root's `ctl`, split into words. `done` may be called before this returns.
    pub fn ctl(&self, caller: Caller, words: &[String], done: Done<()>) {
        let Some((verb, args)) = words.split_first() else { return done(Ok(())) };
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        match (verb.as_str(), args.as_slice()) {
            ("create", [name, ..]) => match parse_pairs(&words[2..]) {
                Ok(pairs) => self.create(caller, name, pairs, Box::new(move |made| done(made.map(drop)))),
                Err(error) => done(Err(error)),
            },
            ("stop", ["all"]) => done(self.each(caller, |machine| machine.ctl(caller, &["stop".to_string()]))),
            ("destroy", ["all"]) => done(self.each(caller, |machine| {
                if machine.config_get("protect").as_deref() == Some("yes") { Ok(()) } else { machine.destroy(caller) }
            })),
            ("prune", []) => done(self.each(caller, |machine| match machine.state() {
                // What rests is in use, as far as its owner knows.
                State::Stopped | State::Failed | State::Lost
                    if !machine.is_idle() && machine.config_get("protect").as_deref() != Some("yes") =>
                {
                    machine.destroy(caller)
                }
                _ => Ok(()),
            })),
            ("shutdown", []) if caller.uid == 0 || caller.uid == self.shared.mount_uid => {
                self.shutdown.notify_one();
                done(Ok(()));
            }
            ("shutdown", []) => done(Err(MachineError::denied("only who runs the daemon may shut it down"))),
            _ => done(Err(super::verbs::wrong(VERBS, words))),
        }
    }

    fn each(
        &self,
        caller: Caller,
        act: impl Fn(&Arc<Machine>) -> Result<(), MachineError>,
    ) -> Result<(), MachineError> {
        // Root's too: what is another's is named one by one.
        let mine = self.list().into_iter().filter(|machine| caller.uid == machine.owner.0);
        // One that cannot be is no reason to leave out the others.
        let failed: Vec<MachineError> = mine.filter_map(|machine| act(&machine).err()).collect();
        failed.into_iter().next().map_or(Ok(()), Err)
    }
}
