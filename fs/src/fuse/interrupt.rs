//! Which pending request is ended by which interrupt.
//!
//! Several threads read requests, so an INTERRUPT can be read before the request that it names has been left pending:
//! such early ones are remembered for a while. Numbers of requests are never used twice, so one that is remembered in
//! vain does no harm.

use crate::tree::ops::Cancel;
use parking_lot::Mutex;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

/// Pending requests are spread over this many locks.
const SHARDS: usize = 16;

/// Early interrupts that one shard remembers. Only those whose request is at this moment between its read and its
/// registration matter, and there are never more of these than reader threads.
const EARLY: usize = 64;

#[derive(Default)]
struct Shard {
    pending: HashMap<u64, Arc<dyn Cancel>>,
    early: VecDeque<u64>,
}

/// The pending requests that can be interrupted.
#[derive(Default)]
pub struct Interrupts {
    shards: [Mutex<Shard>; SHARDS],
}

impl Interrupts {
    /// Ordinary requests have even numbers, so the lowest bit says nothing.
    fn shard(&self, unique: u64) -> &Mutex<Shard> {
        &self.shards[(unique >> 1) as usize % SHARDS]
    }

    /// A request is left pending. `false`: its interrupt has already come, and nothing was registered.
    pub fn register(&self, unique: u64, cancel: Arc<dyn Cancel>) -> bool {
        let mut shard = self.shard(unique).lock();
        if let Some(position) = shard.early.iter().position(|&early| early == unique) {
            shard.early.remove(position);
            return false;
        }
        shard.pending.insert(unique, cancel);
        true
    }

    /// A request has its answer.
    pub fn finished(&self, unique: u64) {
        self.shard(unique).lock().pending.remove(&unique);
    }

    /// An interrupt has come: gives what to call, outside of any lock; or remembers it.
    pub fn interrupted(&self, unique: u64) -> Option<Arc<dyn Cancel>> {
        let mut shard = self.shard(unique).lock();
        if let Some(cancel) = shard.pending.remove(&unique) {
            return Some(cancel);
        }
        if shard.early.len() == EARLY {
            shard.early.pop_front();
        }
        shard.early.push_back(unique);
        None
    }

    /// Everything that is still pending, when nobody waits for it any more.
    pub fn drain(&self) -> Vec<Arc<dyn Cancel>> {
        self.shards.iter().flat_map(|shard| std::mem::take(&mut shard.lock().pending).into_values()).collect()
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

    #[test]
    fn an_interrupt_ends_its_request_once() {
        let table = Interrupts::default();
        let counting = Arc::new(Counting::default());
        assert!(table.register(2, counting.clone()));
        assert!(table.interrupted(4).is_none());
        table.interrupted(2).unwrap().cancel();
        assert!(table.interrupted(2).is_none());
        assert_eq!(counting.0.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn an_early_interrupt_is_remembered() {
        let table = Interrupts::default();
        assert!(table.interrupted(6).is_none());
        assert!(!table.register(6, Arc::new(Counting::default())));
        assert!(table.register(8, Arc::new(Counting::default())));
    }

    #[test]
    fn finished_requests_are_not_cancelled() {
        let table = Interrupts::default();
        assert!(table.register(2, Arc::new(Counting::default())));
        table.finished(2);
        assert!(table.interrupted(2).is_none());
    }

    #[test]
    fn early_interrupts_take_bounded_memory() {
        let table = Interrupts::default();
        for unique in 0..100_000u64 {
            table.interrupted(unique * 2);
        }
        let kept: usize = table.shards.iter().map(|shard| shard.lock().early.len()).sum();
        assert_eq!(kept, SHARDS * EARLY);
        assert!(!table.register(199_998, Arc::new(Counting::default())), "the newest are kept");
    }
}
