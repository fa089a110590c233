//! Requests that are not answered yet, and giving them up.

use crate::files::Cancelled;
use crate::system;
use parking_lot::{Condvar, Mutex};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// A request that was read and is not answered yet.
#[derive(Debug, Default)]
pub struct InFlight {
    cancelled: AtomicBool,
    phase: Mutex<Phase>,
}

#[derive(Debug, Default)]
enum Phase {
    #[default]
    Waiting,
    /// Executed by that thread.
    Running(libc::pid_t),
    Done,
}

impl Cancelled for InFlight {
    fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }
}

impl InFlight {
    /// The calling thread executes it from now on.
    pub fn begin(&self) {
        *self.phase.lock() = Phase::Running(system::thread_id());
    }

    /// It is executed; no signal reaches the thread on its behalf from now on.
    pub fn finish(&self) {
        *self.phase.lock() = Phase::Done;
    }

    /// Interrupts its thread if it has one. Whether it must be tried again: the signal may have come just before the
    /// system call began.
    fn interrupt(&self) -> bool {
        let phase = self.phase.lock();
        match *phase {
            Phase::Running(thread) => {
                system::interrupt(thread);
                true
            }
            Phase::Waiting | Phase::Done => false,
        }
    }
}

/// The requests of one connection.
#[derive(Debug, Default)]
pub struct Requests(Mutex<HashMap<u64, Arc<InFlight>>>);

impl Requests {
    /// Adds a request; `None` when one of that tag is still there.
    pub fn add(&self, tag: u64) -> Option<Arc<InFlight>> {
        match self.0.lock().entry(tag) {
            Entry::Occupied(_) => None,
            Entry::Vacant(vacant) => Some(vacant.insert(Arc::default()).clone()),
        }
    }

    /// Removes an executed request.
    pub fn remove(&self, tag: u64) {
        self.0.lock().remove(&tag);
    }

    /// Gives up the request of that tag, if it is still there.
    pub fn cancel(&self, tag: u64, interrupter: &Interrupter) {
        let request = self.0.lock().get(&tag).cloned();
        if let Some(request) = request {
            interrupter.cancel(request);
        }
    }

    /// Gives up all of them.
    pub fn cancel_all(&self, interrupter: &Interrupter) {
        let requests: Vec<_> = self.0.lock().values().cloned().collect();
        for request in requests {
            interrupter.cancel(request);
        }
    }
}

/// Interrupts the threads of cancelled requests until they are done.
#[derive(Debug, Default)]
pub struct Interrupter {
    pending: Mutex<Vec<Arc<InFlight>>>,
    wake: Condvar,
}

impl Interrupter {
    fn cancel(&self, request: Arc<InFlight>) {
        if request.cancelled.swap(true, Ordering::AcqRel) {
            return;
        }
        // A request that has not begun will look at the flag before it does.
        if request.interrupt() {
            self.pending.lock().push(request);
            self.wake.notify_one();
        }
    }

    /// The thread's body: never ends.
    pub fn run(&self) -> ! {
        let mut pause = Duration::from_millis(1);
        let mut pending = self.pending.lock();
        loop {
            if pending.is_empty() {
                self.wake.wait(&mut pending);
                pause = Duration::from_millis(1);
            }
            parking_lot::MutexGuard::unlocked(&mut pending, || std::thread::sleep(pause));
            pause = (pause * 2).min(Duration::from_millis(32));
            pending.retain(|request| request.interrupt());
        }
    }
}
