//! The life of a machine, as data: state × event → state and action.

use super::error::MachineError;
use std::fmt;

/// Where a machine is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// Its disk is being made.
    Creating,
    /// It starts.
    Booting,
    /// Its agent answers.
    Running,
    /// Frozen.
    Paused,
    /// It was asked to end.
    Stopping,
    /// It does not run; its disk is kept.
    Stopped,
    /// It could not come up; why is in `errors`.
    Failed,
    /// It was running and is gone, or its agent is.
    Lost,
    /// The user cannot see it any more; it is being torn down.
    Destroyed,
}

impl State {
    /// All states.
    pub const ALL: [State; 9] = [
        State::Creating,
        State::Booting,
        State::Running,
        State::Paused,
        State::Stopping,
        State::Stopped,
        State::Failed,
        State::Lost,
        State::Destroyed,
    ];

    /// The word of `status`.
    pub fn word(self) -> &'static str {
        match self {
            State::Creating => "creating",
            State::Booting => "booting",
            State::Running => "running",
            State::Paused => "paused",
            State::Stopping => "stopping",
            State::Stopped => "stopped",
            State::Failed => "failed",
            State::Lost => "lost",
            State::Destroyed => "destroyed",
        }
    }

    /// The state of that word.
    pub fn from_word(word: &str) -> Option<State> {
        State::ALL.into_iter().find(|state| state.word() == word)
    }

    /// Whether it is on its way up.
    pub fn is_booting(self) -> bool {
        matches!(self, State::Creating | State::Booting)
    }

    /// Whether `wait/running` can still succeed without anybody doing anything.
    pub fn may_become_running(self) -> bool {
        matches!(self, State::Creating | State::Booting | State::Running)
    }

    /// Whether a job may be given to it: it runs, or will by itself.
    pub fn takes_jobs(self) -> bool {
        matches!(self, State::Creating | State::Booting | State::Running | State::Paused)
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// What can happen to a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// `echo start`.
    Start,
    /// `echo stop`.
    Stop,
    /// `echo kill`.
    Kill,
    /// `echo restart`.
    Restart,
    /// `echo pause`.
    Pause,
    /// `echo resume`.
    Resume,
    /// `rmdir`, `echo destroy`.
    Destroy,
    /// Its disk is made, and it is to start.
    Prepared,
    /// Its disk is made, and that is all that was wanted.
    PreparedOnly,
    /// Its agent answers.
    Booted,
    /// It could not come up.
    BootFailed,
    /// Its first process (or VMM) has ended.
    Ended,
    /// Its agent cannot be reached any more, and reconnecting was given up.
    AgentLost,
    /// Freezing or thawing failed: it is as it was.
    PauseFailed,
}

impl Event {
    /// All events.
    pub const ALL: [Event; 14] = [
        Event::Start,
        Event::Stop,
        Event::Kill,
        Event::Restart,
        Event::Pause,
        Event::Resume,
        Event::Destroy,
        Event::Prepared,
        Event::PreparedOnly,
        Event::Booted,
        Event::BootFailed,
        Event::Ended,
        Event::AgentLost,
        Event::PauseFailed,
    ];
}

/// What is to be done about a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Nothing.
    None,
    /// Make the disk if it is not there, start, connect.
    Boot,
    /// Ask the guest to end; kill it after the grace.
    Shutdown,
    /// [`Action::Shutdown`], then [`Action::Boot`].
    Reboot,
    /// End it without asking, clean up after the run.
    Kill,
    /// Freeze.
    Pause,
    /// Thaw.
    Resume,
    /// Remove everything of it.
    TearDown,
}

/// What comes of an event in a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Go there and do that.
    Go(State, Action),
    /// It is so already, or it does not matter any more.
    Stay,
    /// Not in this state; the text says what would help.
    Refuse(&'static str),
}

/// The whole state machine.
pub fn step(state: State, event: Event) -> Step {
    use Action as A;
    use Event as E;
    use State as S;
    use Step::{Go, Refuse, Stay};
    match (event, state) {
        (_, S::Destroyed) => Stay,
        (E::Destroy, _) => Go(S::Destroyed, A::TearDown),

        (E::Start, S::Stopped | S::Failed | S::Lost) => Go(S::Booting, A::Boot),
        (E::Start, S::Creating | S::Booting | S::Running) => Stay,
        (E::Start, S::Paused) => Refuse("it is paused: resume it"),
        (E::Start, S::Stopping) => Refuse("it is still stopping: read wait/stopped first"),

        (E::Stop, S::Running | S::Paused) => Go(S::Stopping, A::Shutdown),
        (E::Stop | E::Kill, S::Creating | S::Booting | S::Lost) => Go(S::Stopping, A::Kill),
        (E::Stop, S::Stopping) => Stay,
        (E::Stop | E::Kill, S::Stopped | S::Failed) => Stay,
        (E::Kill, S::Running | S::Paused | S::Stopping) => Go(S::Stopping, A::Kill),

        (E::Restart, S::Running | S::Paused) => Go(S::Booting, A::Reboot),
        (E::Restart, S::Stopped | S::Failed | S::Lost) => Go(S::Booting, A::Boot),
        (E::Restart, S::Creating | S::Booting) => Refuse("it is still booting: read wait/running first"),
        (E::Restart, S::Stopping) => Refuse("it is still stopping: read wait/stopped first"),

        (E::Pause, S::Running) => Go(S::Paused, A::Pause),
        (E::Pause, S::Paused) => Stay,
        (E::Pause, _) => Refuse("only a running machine can be paused"),
        (E::Resume, S::Paused) => Go(S::Running, A::Resume),
        (E::Resume, S::Running) => Stay,
        (E::Resume, _) => Refuse("only a paused machine can be resumed"),

        (E::Prepared, S::Creating) => Go(S::Booting, A::None),
        (E::PreparedOnly, S::Creating) => Go(S::Stopped, A::None),
        (E::Prepared | E::PreparedOnly, _) => Stay,

        (E::Booted, S::Booting) => Go(S::Running, A::None),
        (E::Booted, _) => Stay,
        (E::BootFailed, S::Creating | S::Booting) => Go(S::Failed, A::Kill),
        (E::BootFailed, _) => Stay,

        (E::Ended, S::Running | S::Paused) => Go(S::Lost, A::Kill),
        (E::Ended, S::Stopping) => Go(S::Stopped, A::None),
        (E::Ended, S::Creating | S::Booting | S::Stopped | S::Failed | S::Lost) => Stay,
        (E::AgentLost, S::Running) => Go(S::Lost, A::Kill),
        (E::AgentLost, _) => Stay,
        (E::PauseFailed, S::Paused) => Go(S::Running, A::None),
        (E::PauseFailed, S::Running) => Go(S::Paused, A::None),
        (E::PauseFailed, _) => Stay,
    }
}

/// The error of a refused verb.
pub fn refusal(verb: &str, state: State, help: &str) -> MachineError {
    MachineError::busy(format!("cannot {verb}: the machine is {state}; {help}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pair_of_state_and_event_keeps_the_promises() {
        for state in State::ALL {
            for event in Event::ALL {
                match step(state, event) {
                    Step::Go(next, action) => {
                        assert_ne!(state, State::Destroyed, "nothing leaves destroyed ({event:?})");
                        assert!(next != state || action != Action::None, "{state} {event:?} goes nowhere");
                        assert_eq!(next == State::Destroyed, event == Event::Destroy, "{state} {event:?}");
                        if action == Action::Boot {
                            assert_eq!(next, State::Booting);
                        }
                        if next == State::Running {
                            assert!(matches!(event, Event::Booted | Event::Resume | Event::PauseFailed));
                        }
                    }
                    Step::Stay => {}
                    Step::Refuse(help) => {
                        let asked = matches!(event, Event::Start | Event::Restart | Event::Pause | Event::Resume);
                        assert!(asked, "only a user's verb is refused ({state} {event:?})");
                        assert!(!help.is_empty());
                    }
                }
            }
        }
    }

    #[test]
    fn verbs_that_say_what_is_so_already_succeed() {
        for (state, event) in [
            (State::Running, Event::Start),
            (State::Stopped, Event::Stop),
            (State::Stopped, Event::Kill),
            (State::Paused, Event::Pause),
            (State::Running, Event::Resume),
        ] {
            assert_eq!(step(state, event), Step::Stay);
        }
    }

    #[test]
    fn every_state_has_its_own_word() {
        for state in State::ALL {
            assert_eq!(State::from_word(state.word()), Some(state));
        }
        assert_eq!(State::from_word("unknown"), None);
    }
}
