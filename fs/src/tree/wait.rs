//! `NAME/wait/`: files whose reading waits for a state, or follows a log.

use super::content::Content;
use super::logs::LogRef;
use super::node::Kind;
use super::stream::Taken;
use crate::errno::Errno;
use crate::machine::Machine;
use crate::machine::state::State;
use std::sync::Arc;

/// A state that a reader waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// `wait/running`
    Running,
    /// `wait/stopped`
    Stopped,
}

impl Wanted {
    /// What a read gives in this state; `None`: it waits. Running is an error (EHOSTDOWN) when it cannot come by
    /// itself any more; stopped is any state in which the machine does not run and will not by itself, in its word.
    pub fn text(self, state: State) -> Taken {
        let word = || Ok(format!("{}\n", state.word()).into_bytes());
        match (self, state) {
            (Wanted::Running, State::Running) => Some(word()),
            (Wanted::Running, state) if state.may_become_running() => None,
            (Wanted::Running, _) => Some(Err(Errno::EHOSTDOWN)),
            (Wanted::Stopped, State::Stopped | State::Failed | State::Lost | State::Destroyed) => Some(word()),
            (Wanted::Stopped, _) => None,
        }
    }
}

/// What is in a file of the directory.
pub fn content(machine: &Arc<Machine>, kind: Kind) -> Option<Content> {
    match kind {
        Kind::WaitRunning => Some(Content::State(machine.clone(), Wanted::Running)),
        Kind::WaitStopped => Some(Content::State(machine.clone(), Wanted::Stopped)),
        Kind::WaitEvent => Some(Content::Follow(LogRef::Events(machine.clone()))),
        Kind::WaitConsole => Some(Content::Follow(LogRef::Console(machine.clone()))),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_state_is_waited_for_or_told() {
        let text = |word: &str| Some(Ok(format!("{word}\n").into_bytes()));
        assert_eq!(Wanted::Running.text(State::Running), text("running"));
        assert_eq!(Wanted::Running.text(State::Booting), None);
        for state in [State::Stopped, State::Failed, State::Lost, State::Destroyed] {
            assert_eq!(Wanted::Running.text(state), Some(Err(Errno::EHOSTDOWN)));
            assert_eq!(Wanted::Stopped.text(state), text(state.word()));
        }
        for state in [State::Creating, State::Booting, State::Running, State::Paused, State::Stopping] {
            assert_eq!(Wanted::Stopped.text(state), None);
        }
    }
}
