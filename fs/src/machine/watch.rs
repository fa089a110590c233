//! What blocked readers and pollers wait on.

use parking_lot::Mutex;
use std::sync::Arc;

/// Something that wants to look again. Called on the thread that made the change; must be quick and must not block.
pub trait Wake: Send + Sync {
    /// Something changed.
    fn wake(&self);
}

/// Names one registration on one [`Watch`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WakeId(u64);

/// A list of wakers, each called once at the next change.
///
/// Register first, then look at the state: so no wake-up is lost between looking and waiting.
#[derive(Default)]
pub struct Watch {
    waiting: Mutex<Waiting>,
}

#[derive(Default)]
struct Waiting {
    last: u64,
    wakers: Vec<(WakeId, Arc<dyn Wake>)>,
}

impl Watch {
    /// A watch nobody waits on.
    pub fn new() -> Watch {
        Watch::default()
    }

    /// Calls the waker at the next [`Watch::notify`], once.
    pub fn register(&self, waker: Arc<dyn Wake>) -> WakeId {
        let mut waiting = self.waiting.lock();
        waiting.last += 1;
        let id = WakeId(waiting.last);
        waiting.wakers.push((id, waker));
        id
    }

    /// Takes a registration back; nothing happens if it has been used up.
    pub fn unregister(&self, id: WakeId) {
        self.waiting.lock().wakers.retain(|(other, _)| *other != id);
    }

    /// Calls all wakers. None of our locks is held while they run.
    pub fn notify(&self) {
        let taken = std::mem::take(&mut self.waiting.lock().wakers);
        for (_, waker) in taken {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    struct Counter(AtomicU32);
    impl Wake for Counter {
        fn wake(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn a_waker_is_called_once_and_only_while_registered() {
        let (watch, counter) = (Watch::new(), Arc::new(Counter(AtomicU32::new(0))));
        watch.register(counter.clone());
        let second = watch.register(counter.clone());
        watch.unregister(second);
        watch.notify();
        watch.notify();
        assert_eq!(counter.0.load(Ordering::SeqCst), 1);
    }
}
