//! Which log a file shows.

use crate::machine::Machine;
use crate::machine::registry::Registry;
use crate::machine::textlog::TextLog;
use std::sync::Arc;

/// A log, with what keeps it alive.
#[derive(Clone)]
pub enum LogRef {
    /// Events of all machines.
    Service(Arc<Registry>),
    /// Events of a machine.
    Events(Arc<Machine>),
    /// Console of a machine.
    Console(Arc<Machine>),
    /// Errors of a machine.
    Errors(Arc<Machine>),
    /// History of a machine.
    History(Arc<Machine>),
}

impl LogRef {
    /// The log.
    pub fn log(&self) -> &TextLog {
        match self {
            LogRef::Service(registry) => registry.events(),
            LogRef::Events(machine) => machine.events(),
            LogRef::Console(machine) => machine.console(),
            LogRef::Errors(machine) => machine.errors(),
            LogRef::History(machine) => machine.history(),
        }
    }

    /// The machine whose end is the log's end.
    pub fn machine(&self) -> Option<&Arc<Machine>> {
        match self {
            LogRef::Service(_) => None,
            LogRef::Events(machine) | LogRef::Console(machine) | LogRef::Errors(machine) | LogRef::History(machine) => {
                Some(machine)
            }
        }
    }
}
