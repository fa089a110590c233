//! Which pending request is ended by which interrupt, and which one is overdue.
//!
//! Several threads read requests, so an INTERRUPT can be read before the request that it names has been left pending:
//! such early ones are remembered for a while. Numbers of requests are never used twice, so one that is remembered in
//! vain does no harm.

use crate::tree::ops::Cancel;
use parking_lot::Mutex;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Pending requests are spread over this many locks.
const SHARDS: usize = 16;

/// Early interrupts that one shard remembers. Only those whose request is at this moment between its read and its
/// registration matter, and there are never more of these than reader threads.
const EARLY: usize = 64;

#[derive(Default)]
struct Shard {
    pending: HashMap<u64, Pending>,
    /// Interrupts of requests that are not in `pending`, with the time at which an answer is overdue.
    early: VecDeque<(u64, Instant)>,
}

struct Pending {
    /// What an interrupt calls; `None` once it has.
    cancel: Option<Arc<dyn Cancel>>,
    wait: Wait,
    /// When an interrupted request is overdue, if its caller is being killed.
    interrupt_due: Option<Instant>,
}

/// How long a request may be pending.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wait {
    /// The calling thread; 0 when it is not known.
    pub pid: u32,
    /// When it is overdue, whatever happens.
    pub until: Option<Instant>,
}

/// A request that has waited too long.
pub struct Overdue {
    /// Its number.
    pub unique: u64,
    /// A signal has come.
    pub interrupted: bool,
    /// To be told that nobody wants the answer any more. `None`: it was told, when the signal came.
    pub cancel: Option<Arc<dyn Cancel>>,
}

/// The pending requests that can be interrupted.
pub struct Interrupts {
    shards: [Mutex<Shard>; SHARDS],
    /// How long after its interrupt a request may still be pending whose caller is being killed.
    grace: Duration,
}

impl Interrupts {
    /// An empty table.
    pub fn new(grace: Duration) -> Self {
        Interrupts { shards: Default::default(), grace }
    }

    /// Ordinary requests have even numbers, so the lowest bit says nothing.
    fn shard(&self, unique: u64) -> &Mutex<Shard> {
        &self.shards[(unique >> 1) as usize % SHARDS]
    }

    /// A request is left pending. `false`: its interrupt has already come, and `cancel` will not be called.
    pub fn register(&self, unique: u64, cancel: Arc<dyn Cancel>, wait: Wait) -> bool {
        let mut shard = self.shard(unique).lock();
        let early = shard.early.iter().position(|(early, _)| *early == unique);
        let interrupt_due = early.and_then(|position| shard.early.remove(position)).map(|(_, due)| due);
        let cancel = interrupt_due.is_none().then_some(cancel);
        shard.pending.insert(unique, Pending { cancel, wait, interrupt_due });
        interrupt_due.is_none()
    }

    /// A request has its answer.
    pub fn finished(&self, unique: u64) {
        self.shard(unique).lock().pending.remove(&unique);
    }

    /// An interrupt has come: gives what to call, outside of any lock; or remembers it.
    pub fn interrupted(&self, unique: u64) -> Option<Arc<dyn Cancel>> {
        let due = Instant::now() + self.grace;
        let mut shard = self.shard(unique).lock();
        if let Some(pending) = shard.pending.get_mut(&unique) {
            pending.interrupt_due = Some(due);
            return pending.cancel.take();
        }
        if shard.early.len() == EARLY {
            shard.early.pop_front();
        }
        shard.early.push_back((unique, due));
        None
    }

    /// Takes out what is overdue at that time. A request whose caller goes on after a signal is not: it may be one that
    /// rightly takes long. Of the early interrupts most have long been answered.
    pub fn overdue(&self, now: Instant, being_killed: impl Fn(u32) -> bool) -> Vec<Overdue> {
        let is_due = |due: Option<Instant>| due.is_some_and(|due| due <= now);
        let mut overdue = Vec::new();
        for shard in &self.shards {
            let signalled = |(&unique, pending): (&u64, &Pending)| {
                is_due(pending.interrupt_due).then_some((unique, pending.wait.pid))
            };
            let signalled: Vec<(u64, u32)> = shard.lock().pending.iter().filter_map(signalled).collect();
            // Asks /proc, so not under the lock.
            let killed: Vec<u64> =
                signalled.into_iter().filter(|&(_, pid)| being_killed(pid)).map(|(unique, _)| unique).collect();
            let Shard { pending, early } = &mut *shard.lock();
            let late = pending.extract_if(|unique, pending| is_due(pending.wait.until) || killed.contains(unique));
            overdue.extend(late.map(|(unique, pending)| Overdue {
                unique,
                interrupted: pending.interrupt_due.is_some(),
                cancel: pending.cancel,
            }));
            while early.front().is_some_and(|&(_, due)| due <= now) {
                let early = early.pop_front().map(|(unique, _)| unique);
                overdue.extend(early.map(|unique| Overdue { unique, interrupted: true, cancel: None }));
            }
        }
        overdue
    }

    /// Everything that is still pending, when nobody waits for it any more.
    pub fn drain(&self) -> Vec<Arc<dyn Cancel>> {
        let take = |shard: &Mutex<Shard>| std::mem::take(&mut shard.lock().pending).into_values();
        self.shards.iter().flat_map(take).filter_map(|pending| pending.cancel).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[derive(Default)]
    struct Counting(AtomicUsize);

    impl Cancel for Counting {
        fn cancel(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn table() -> Interrupts {
        Interrupts::new(Duration::from_secs(10))
    }

    #[test]
    fn an_interrupt_ends_its_request_once() {
        let table = table();
        let counting = Arc::new(Counting::default());
        assert!(table.register(2, counting.clone(), Wait::default()));
        assert!(table.interrupted(4).is_none());
        table.interrupted(2).unwrap().cancel();
        assert!(table.interrupted(2).is_none());
        assert_eq!(counting.0.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn an_early_interrupt_is_remembered() {
        let table = table();
        assert!(table.interrupted(6).is_none());
        assert!(!table.register(6, Arc::new(Counting::default()), Wait::default()));
        assert!(table.register(8, Arc::new(Counting::default()), Wait::default()));
    }

    #[test]
    fn finished_requests_are_not_cancelled() {
        let table = table();
        assert!(table.register(2, Arc::new(Counting::default()), Wait::default()));
        table.finished(2);
        assert!(table.interrupted(2).is_none());
    }

    #[test]
    fn early_interrupts_take_bounded_memory() {
        let table = table();
        for unique in 0..100_000u64 {
            table.interrupted(unique * 2);
        }
        let kept: usize = table.shards.iter().map(|shard| shard.lock().early.len()).sum();
        assert_eq!(kept, SHARDS * EARLY);
        assert!(!table.register(199_998, Arc::new(Counting::default()), Wait::default()), "the newest are kept");
    }

    #[test]
    fn what_is_killed_or_past_its_limit_becomes_overdue_once() {
        let table = table();
        let now = Instant::now();
        let later = now + Duration::from_secs(60);
        let limited = Wait { pid: 1, until: Some(now + Duration::from_secs(5)) };
        let by = |pid| Wait { pid, until: None };
        for (unique, wait) in [(2, by(1)), (4, limited), (6, by(7)), (8, limited), (12, by(1))] {
            assert!(table.register(unique, Arc::new(Counting::default()), wait));
        }
        assert!(table.interrupted(6).is_some());
        assert!(table.interrupted(12).is_some());
        assert!(table.interrupted(10).is_none());
        table.finished(8);
        let killed = |pid| pid == 7;
        assert!(table.overdue(now, killed).is_empty());
        let overdue = table.overdue(later, killed);
        let mut overdue: Vec<_> =
            overdue.iter().map(|late| (late.unique, late.interrupted, late.cancel.is_some())).collect();
        overdue.sort_unstable();
        assert_eq!(overdue, [(4, false, true), (6, true, false), (10, true, false)]);
        assert!(table.overdue(later, killed).is_empty());
        let overdue = table.overdue(later, |_| true);
        assert_eq!(overdue.iter().map(|late| late.unique).collect::<Vec<_>>(), [12], "it is killed now");
        assert_eq!(table.drain().len(), 1);
    }
}
