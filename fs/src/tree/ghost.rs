//! What is left for a moment of a machine that was destroyed by unlinking its `ctl`, so that `rm -r` can go on to the
//! end: its names still look up, its directories list empty, any unlink and rmdir in it succeeds.
//!
//! The name stays reserved until the ghost's own rmdir, or [`RESERVED`]. An `rm -r` that was stopped for longer still
//! finds the ghost under the name, and not a machine that has it now: who has removed more in it than `ctl` is known
//! by its process.

use super::ops::Caller;
use crate::machine::Machine;
use dashmap::DashMap;
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// How long nobody else gets the name.
pub const RESERVED: Duration = Duration::from_secs(2);

/// How long a ghost is kept for the process that removes it, after its last step.
const KEPT: Duration = Duration::from_secs(60);

/// Ghosts at most; the oldest go first.
const MOST: usize = 10_000;

/// How long after it was refused to destroy a machine a process may not remove files in it.
const REFUSED: Duration = Duration::from_secs(10);

/// A destroyed machine.
pub struct Ghost {
    /// What it was.
    pub machine: Arc<Machine>,
    /// Its name when it was destroyed.
    pub name: Box<[u8]>,
    pid: u32,
    made: Instant,
    steps: Mutex<Steps>,
}

struct Steps {
    last: Instant,
    /// Whether more than `ctl` was removed: this is an `rm -r`, which will come to the rmdir.
    more: bool,
}

impl Ghost {
    fn is_reserved(&self) -> bool {
        self.made.elapsed() < RESERVED
    }

    /// Something in it was unlinked or removed.
    pub fn removed(&self, caller: Caller) {
        if caller.pid == self.pid {
            *self.steps.lock() = Steps { last: Instant::now(), more: true };
        }
    }
}

/// All ghosts.
#[derive(Default)]
pub struct Ghosts {
    by_slot: DashMap<u32, Arc<Ghost>>,
    /// How many there are: most of the time none, and then nothing is looked up.
    count: AtomicUsize,
    /// By process and slot.
    refused: DashMap<(u32, u32), Instant>,
    refusals: AtomicUsize,
}

impl Ghosts {
    /// A machine was destroyed by unlinking its `ctl`.
    pub fn add(&self, machine: &Arc<Machine>, name: &[u8], caller: Caller) {
        self.sweep();
        let now = Instant::now();
        let steps = Mutex::new(Steps { last: now, more: false });
        let ghost = Ghost { machine: machine.clone(), name: name.into(), pid: caller.pid, made: now, steps };
        self.by_slot.insert(machine.slot(), Arc::new(ghost));
        self.count.store(self.by_slot.len(), Ordering::Release);
    }

    fn is_empty(&self) -> bool {
        self.count.load(Ordering::Acquire) == 0
    }

    /// The ghost of a machine.
    pub fn by_slot(&self, slot: u32) -> Option<Arc<Ghost>> {
        if self.is_empty() { None } else { self.by_slot.get(&slot).map(|ghost| ghost.value().clone()) }
    }

    /// The ghost that this caller finds under a name; `taken`: a machine has the name now.
    pub fn find(&self, name: &[u8], caller: Caller, taken: bool) -> Option<Arc<Ghost>> {
        if self.is_empty() {
            return None;
        }
        let shows = |ghost: &Ghost| {
            let mine = ghost.pid != 0 && ghost.pid == caller.pid;
            let steps = ghost.steps.lock();
            let claimed = mine && steps.last.elapsed() < KEPT;
            if taken { claimed && steps.more } else { claimed || ghost.is_reserved() }
        };
        let all = self.by_slot.iter().filter(|ghost| *ghost.name == *name && shows(ghost));
        all.map(|ghost| ghost.value().clone()).max_by_key(|ghost| ghost.made)
    }

    /// Whether a name cannot be given to a machine now.
    pub fn is_reserved(&self, name: &[u8]) -> bool {
        !self.is_empty() && self.by_slot.iter().any(|ghost| *ghost.name == *name && ghost.is_reserved())
    }

    /// The ghost's own directory was removed: that was the end.
    pub fn remove(&self, ghost: &Ghost) {
        self.by_slot.remove(&ghost.machine.slot());
        self.count.store(self.by_slot.len(), Ordering::Release);
    }

    /// A process makes a machine of that name: it does not mean the ghost by it any more.
    pub fn forget_claim(&self, name: &[u8], caller: Caller) {
        if !self.is_empty() {
            self.by_slot.retain(|_, ghost| *ghost.name != *name || ghost.pid != caller.pid || ghost.is_reserved());
            self.count.store(self.by_slot.len(), Ordering::Release);
        }
    }

    fn sweep(&self) {
        self.by_slot.retain(|_, ghost| ghost.is_reserved() || ghost.steps.lock().last.elapsed() < KEPT);
        if self.by_slot.len() >= MOST {
            let oldest = self.by_slot.iter().min_by_key(|ghost| ghost.made).map(|ghost| *ghost.key());
            oldest.map(|slot| self.by_slot.remove(&slot));
        }
        self.count.store(self.by_slot.len(), Ordering::Release);
    }

    /// Destroying a machine by unlinking its `ctl` was refused. If that was an `rm -r`, it goes on to `files/`, and
    /// would empty the disk of a protected machine: it must not.
    pub fn refuse(&self, caller: Caller, slot: u32) {
        self.refused.retain(|_, since| since.elapsed() < REFUSED);
        self.refused.insert((caller.pid, slot), Instant::now());
        self.refusals.store(self.refused.len(), Ordering::Release);
    }

    /// Whether anybody was refused lately.
    pub fn any_refused(&self) -> bool {
        self.refusals.load(Ordering::Acquire) > 0
    }

    /// Whether this process is an `rm -r` of this machine that was refused; each question makes it so for a while
    /// longer.
    pub fn is_refused(&self, caller: Caller, slot: u32) -> bool {
        if !self.any_refused() {
            return false;
        }
        match self.refused.get_mut(&(caller.pid, slot)) {
            Some(mut since) if since.elapsed() < REFUSED => {
                *since = Instant::now();
                true
            }
            _ => false,
        }
    }
}
