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
    /// When this layer answers in the place of the file system.
    due: Option<Instant>,
}

/// A request that has waited too long.
pub struct Overdue {
    /// Its number.
    pub unique: u64,
    /// To be told that nobody wants the answer any more. `None`: it was told, when a signal came.
    pub cancel: Option<Arc<dyn Cancel>>,
}

/// The pending requests that can be interrupted.
pub struct Interrupts {
    shards: [Mutex<Shard>; SHARDS],
    /// How long after its interrupt a request may still be pending.
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

    /// A request is left pending, until `due` at most. `false`: its interrupt has already come, and `cancel` will not
    /// be called.
    pub fn register(&self, unique: u64, cancel: Arc<dyn Cancel>, due: Option<Instant>) -> bool {
        let mut shard = self.shard(unique).lock();
        let early = shard.early.iter().position(|(early, _)| *early == unique);
        let pending = match early.and_then(|position| shard.early.remove(position)) {
            Some((_, due)) => Pending { cancel: None, due: Some(due) },
            None => Pending { cancel: Some(cancel), due },
        };
        shard.pending.insert(unique, pending);
        early.is_none()
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
            pending.due = Some(pending.due.map_or(due, |earlier| earlier.min(due)));
            return pending.cancel.take();
        }
        if shard.early.len() == EARLY {
            shard.early.pop_front();
        }
        shard.early.push_back((unique, due));
        None
    }

    /// Takes out what is overdue at that time. Of the early interrupts most have long been answered.
    pub fn overdue(&self, now: Instant) -> Vec<Overdue> {
        let mut overdue = Vec::new();
        for shard in &self.shards {
            let Shard { pending, early } = &mut *shard.lock();
            let late = pending.extract_if(|_, pending| pending.due.is_some_and(|due| due <= now));
            overdue.extend(late.map(|(unique, pending)| Overdue { unique, cancel: pending.cancel }));
            while early.front().is_some_and(|(_, due)| *due <= now) {
                overdue.extend(early.pop_front().map(|(unique, _)| Overdue { unique, cancel: None }));
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
        assert!(table.register(2, counting.clone(), None));
        assert!(table.interrupted(4).is_none());
        table.interrupted(2).unwrap().cancel();
        assert!(table.interrupted(2).is_none());
        assert_eq!(counting.0.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn an_early_interrupt_is_remembered() {
        let table = table();
        assert!(table.interrupted(6).is_none());
        assert!(!table.register(6, Arc::new(Counting::default()), None));
        assert!(table.register(8, Arc::new(Counting::default()), None));
    }

    #[test]
    fn finished_requests_are_not_cancelled() {
        let table = table();
        assert!(table.register(2, Arc::new(Counting::default()), None));
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
        assert!(!table.register(199_998, Arc::new(Counting::default()), None), "the newest are kept");
    }

    #[test]
    fn what_is_interrupted_or_past_its_limit_becomes_overdue_once() {
        let table = table();
        let now = Instant::now();
        let (limit, later) = (now + Duration::from_secs(5), now + Duration::from_secs(60));
        assert!(table.register(2, Arc::new(Counting::default()), None));
        assert!(table.register(4, Arc::new(Counting::default()), Some(limit)));
        assert!(table.register(6, Arc::new(Counting::default()), None));
        assert!(table.register(8, Arc::new(Counting::default()), Some(limit)));
        assert!(table.interrupted(6).is_some());
        assert!(table.interrupted(10).is_none());
        table.finished(8);
        assert!(table.overdue(now).is_empty());
        let mut overdue: Vec<_> =
            table.overdue(later).iter().map(|late| (late.unique, late.cancel.is_some())).collect();
        overdue.sort_unstable();
        assert_eq!(overdue, [(4, true), (6, false), (10, false)]);
        assert!(table.overdue(later).is_empty());
        assert_eq!(table.drain().len(), 1);
    }
}
