//! The verbs of a machine's `ctl`.

use super::error::MachineError;
use super::state::{self, Event, State};
use super::{Machine, Verb, config};
use crate::tree::ops::Caller;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// The verbs of a machine's `ctl`.
pub const VERBS: &[Verb] = &[
    Verb { name: "start", usage: "start", doc: "boot it; succeeds when it runs already" },
    Verb {
        name: "stop",
        usage: "stop [GRACE]",
        doc: "ask it to end, kill it after GRACE (10s); succeeds when it is stopped",
    },
    Verb { name: "kill", usage: "kill", doc: "end it without asking; succeeds when it is stopped" },
    Verb { name: "restart", usage: "restart", doc: "stop and start; each one boots anew" },
    Verb { name: "pause", usage: "pause", doc: "freeze every process in it; succeeds when it is paused" },
    Verb { name: "resume", usage: "resume", doc: "undo pause; succeeds when it runs" },
    Verb { name: "destroy", usage: "destroy", doc: "remove it with its disk, as rmdir does" },
    Verb {
        name: "set",
        usage: "set KEY=VALUE…",
        doc: "change its configuration, as writing to config/KEY does; all of them or none",
    },
];

/// The error for a line that is none of these verbs, or has wrong words after one.
pub(super) fn wrong(verbs: &[Verb], words: &[String]) -> MachineError {
    let verb = words.first().map(String::as_str).unwrap_or_default();
    match verbs.iter().find(|known| known.name == verb) {
        Some(known) => MachineError::invalid(format!("wrong words after {verb}: usage: {}", known.usage)),
        None => {
            let names: Vec<&str> = verbs.iter().map(|verb| verb.name).collect();
            let line = words.join(" ");
            MachineError::invalid(format!("unknown control message \"{line}\": the verbs are {}", names.join(" ")))
        }
    }
}

impl Machine {
    /// A line of `ctl`, already split into words. Success means accepted.
    ///
    /// # Errors
    /// EINVAL for an unknown verb, too many or bad words; EBUSY in the wrong state; EACCES, EPERM.
    pub fn ctl(self: &Arc<Self>, caller: Caller, words: &[String]) -> Result<(), MachineError> {
        self.check_owner(caller)?;
        let Some((verb, args)) = words.split_first() else { return Ok(()) };
        let event = match (verb.as_str(), args) {
            ("start", []) => Event::Start,
            ("stop", []) => Event::Stop,
            ("stop", [grace]) => {
                let grace = config::parse_time(grace)
                    .flatten()
                    .ok_or_else(|| MachineError::invalid(format!("bad grace \"{grace}\": a time as 10s")))?;
                self.grace_ms.store(u64::try_from(grace.as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
                Event::Stop
            }
            ("kill", []) => Event::Kill,
            ("restart", []) => Event::Restart,
            ("pause", []) if self.state() == State::Running && !self.backend().capabilities(&self.spec()).pause => {
                return Err(MachineError::not_supported("this host has no freezer control group for the machine"));
            }
            ("pause", []) => Event::Pause,
            ("resume", []) => Event::Resume,
            ("destroy", []) => return self.destroy(caller),
            ("set", [_, ..]) => return self.set_many(args),
            _ => return Err(wrong(VERBS, words)),
        };
        self.fire(event).map_err(|help| state::refusal(verb, self.state(), help))?;
        // Who stops a machine that rests wants it stopped: nothing wakes it then but a start.
        self.end_rest(event);
        Ok(())
    }

    fn set_many(self: &Arc<Self>, args: &[String]) -> Result<(), MachineError> {
        self.config_set_all(&super::root_verbs::parse_pairs(args)?)
    }
}
