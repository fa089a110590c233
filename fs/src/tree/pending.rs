//! Operations that wait: a read of a file that blocks, the attributes of `files` while its machine boots.
//!
//! What is waited for is a [`Source`]. The order is always: register with its watches, try, and only then rest; so no
//! wake-up is lost. A try may take bytes, and taken bytes are always delivered: an interrupt that comes during a try
//! ends the operation only if the try came to nothing. No lock is held while a source is tried or an answer is given.

use super::deadlines::{Deadlines, Expire};
use super::logs::LogRef;
use super::ops::{Answer, Cancel, PollWaker, Responder};
use crate::errno::Errno;
use crate::machine::Machine;
use crate::machine::input::Input;
use crate::machine::job::Job;
use crate::machine::watch::{Wake, WakeId, Watch};
use parking_lot::Mutex;
use std::sync::{Arc, Weak};
use std::time::Duration;

/// Result of an operation.
pub type Outcome = Result<Answer, Errno>;

/// Something with a [`Watch`], kept alive while one is registered with it.
#[derive(Clone)]
pub enum Watched {
    /// A machine's state.
    State(Arc<Machine>),
    /// A log.
    Log(LogRef),
    /// A job's output and end.
    Job(Arc<Job>),
    /// What a job reads.
    Input(Arc<Input>),
    /// A watch of its own.
    Other(Arc<Watch>),
}

impl Watched {
    fn watch(&self) -> &Watch {
        match self {
            Watched::State(machine) => machine.state_watch(),
            Watched::Log(log) => log.log().watch(),
            Watched::Job(job) => job.watch(),
            Watched::Input(input) => input.watch(),
            Watched::Other(watch) => watch,
        }
    }
}

/// Registrations with watches, taken back when this is dropped.
#[derive(Default)]
pub struct Registrations(Vec<(Watched, WakeId)>);

impl Registrations {
    /// Registers a waker with each.
    pub fn new(watched: Vec<Watched>, waker: &Arc<dyn Wake>) -> Registrations {
        Registrations(
            watched
                .into_iter()
                .map(|watched| {
                    let id = watched.watch().register(waker.clone());
                    (watched, id)
                })
                .collect(),
        )
    }

    fn covers(&self, watched: &[Watched]) -> bool {
        watched.len() == self.0.len()
            && watched.iter().zip(&self.0).all(|(one, (other, _))| std::ptr::eq(one.watch(), other.watch()))
    }
}

impl Drop for Registrations {
    fn drop(&mut self) {
        for (watched, id) in self.0.drain(..) {
            watched.watch().unregister(id);
        }
    }
}

/// Registers a poller: it is woken at the next change of any of these.
pub fn register_poller(watched: Vec<Watched>, poller: Arc<dyn PollWaker>) -> Registrations {
    struct Poller(Arc<dyn PollWaker>);
    impl Wake for Poller {
        fn wake(&self) {
            self.0.wake();
        }
    }
    let waker: Arc<dyn Wake> = Arc::new(Poller(poller));
    Registrations::new(watched, &waker)
}

/// What an operation waits for.
pub trait Source: Send + Sync {
    /// The result, if it is there now. May take what it gives: it will be delivered.
    fn attempt(&self) -> Option<Outcome>;

    /// What changes before `attempt` can succeed.
    fn watches(&self) -> Vec<Watched>;

    /// The result when the time is up.
    fn expired(&self) -> Outcome {
        Err(Errno::ETIMEDOUT)
    }
}

/// Answers as soon as the source has a result. `nonblocking`: EAGAIN instead of waiting.
pub fn answer(source: impl Source + 'static, responder: Responder, nonblocking: bool) {
    start(Box::new(source), responder, nonblocking, None);
}

/// Answers as soon as the source has a result, or with its `expired` when the time is up.
pub fn answer_within(source: impl Source + 'static, responder: Responder, limit: Duration, deadlines: &Deadlines) {
    start(Box::new(source), responder, false, Some((limit, deadlines)));
}

fn start(
    source: Box<dyn Source>,
    mut responder: Responder,
    nonblocking: bool,
    deadline: Option<(Duration, &Deadlines)>,
) {
    if let Some(outcome) = source.attempt() {
        return responder.respond(outcome);
    }
    if nonblocking {
        return responder.respond(Err(Errno::EAGAIN));
    }
    let pending = Arc::new_cyclic(|me| Pending {
        me: me.clone(),
        source,
        phase: Mutex::new(Phase::Trying { again: false, end: None }),
    });
    if !responder.set_cancel(pending.clone()) {
        return responder.respond(Err(Errno::EINTR));
    }
    if let Some((limit, deadlines)) = deadline {
        let expire: Weak<Pending> = pending.me.clone();
        deadlines.after(limit, expire);
    }
    pending.go_on(responder, Registrations::default());
}

#[derive(Clone, Copy)]
enum End {
    Interrupted,
    Expired,
}

enum Phase {
    Resting(Responder, Registrations),
    /// A thread tries; `again` and `end` are what came up meanwhile.
    Trying {
        again: bool,
        end: Option<End>,
    },
    Done,
}

struct Pending {
    me: Weak<Pending>,
    source: Box<dyn Source>,
    phase: Mutex<Phase>,
}

impl Pending {
    fn outcome(&self, end: End) -> Outcome {
        match end {
            End::Interrupted => Err(Errno::EINTR),
            End::Expired => self.source.expired(),
        }
    }

    /// Called by the thread that has made the phase `Trying`.
    fn go_on(&self, responder: Responder, mut registrations: Registrations) {
        let Some(me) = self.me.upgrade() else {
            return responder.respond(Err(Errno::EIO));
        };
        let waker: Arc<dyn Wake> = me;
        loop {
            // The old registrations are one-shot and may be spent.
            drop(std::mem::replace(&mut registrations, Registrations::new(self.source.watches(), &waker)));
            if let Some(outcome) = self.source.attempt() {
                *self.phase.lock() = Phase::Done;
                drop(registrations);
                return responder.respond(outcome);
            }
            // Another reader of the same open file may have moved it on to its next job since.
            if !registrations.covers(&self.source.watches()) {
                continue;
            }
            let mut phase = self.phase.lock();
            match &mut *phase {
                Phase::Trying { end: Some(end), .. } => {
                    let end = *end;
                    *phase = Phase::Done;
                    drop(phase);
                    drop(registrations);
                    return responder.respond(self.outcome(end));
                }
                Phase::Trying { again, .. } if *again => *again = false,
                _ => {
                    *phase = Phase::Resting(responder, registrations);
                    return;
                }
            }
        }
    }

    fn end(&self, why: End) {
        let mut phase = self.phase.lock();
        match std::mem::replace(&mut *phase, Phase::Done) {
            Phase::Resting(responder, registrations) => {
                drop(phase);
                drop(registrations);
                responder.respond(self.outcome(why));
            }
            Phase::Trying { again, end } => *phase = Phase::Trying { again, end: end.or(Some(why)) },
            Phase::Done => {}
        }
    }
}

impl Wake for Pending {
    fn wake(&self) {
        let mut phase = self.phase.lock();
        match std::mem::replace(&mut *phase, Phase::Done) {
            Phase::Resting(responder, registrations) => {
                *phase = Phase::Trying { again: false, end: None };
                drop(phase);
                self.go_on(responder, registrations);
            }
            Phase::Trying { end, .. } => *phase = Phase::Trying { again: true, end },
            Phase::Done => {}
        }
    }
}

impl Cancel for Pending {
    fn cancel(&self) {
        self.end(End::Interrupted);
    }
}

impl Expire for Pending {
    fn expire(&self) {
        self.end(End::Expired);
    }
}
