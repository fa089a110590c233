//! One thread that ends operations whose time is up.

use parking_lot::{Condvar, Mutex};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// Something that can run out of time. Called on the thread of [`Deadlines`]; must be quick.
pub trait Expire: Send + Sync {
    /// The time is up.
    fn expire(&self);
}

struct Due {
    at: Instant,
    what: Weak<dyn Expire>,
}

impl PartialEq for Due {
    fn eq(&self, other: &Due) -> bool {
        self.at == other.at
    }
}

impl Eq for Due {}

impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Due) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Due {
    fn cmp(&self, other: &Due) -> std::cmp::Ordering {
        self.at.cmp(&other.at)
    }
}

#[derive(Default)]
struct Queue {
    due: BinaryHeap<Reverse<Due>>,
    stopped: bool,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
}

/// The queue of deadlines, and its thread, which ends with it.
pub struct Deadlines {
    shared: Arc<Shared>,
}

impl Deadlines {
    /// Starts the thread. Fails when the host gives no more threads.
    pub fn start() -> std::io::Result<Deadlines> {
        let shared = Arc::new(Shared::default());
        let of_thread = shared.clone();
        std::thread::Builder::new().name("deadlines".into()).spawn(move || of_thread.run())?;
        Ok(Deadlines { shared })
    }

    /// Expires `what` after `time`, if it is still there then.
    pub fn after(&self, time: Duration, what: Weak<dyn Expire>) {
        // A time too long for the clock never comes.
        let Some(at) = Instant::now().checked_add(time) else { return };
        self.shared.queue.lock().due.push(Reverse(Due { at, what }));
        self.shared.changed.notify_one();
    }
}

impl Drop for Deadlines {
    fn drop(&mut self) {
        self.shared.queue.lock().stopped = true;
        self.shared.changed.notify_one();
    }
}

impl Shared {
    fn run(&self) {
        let mut queue = self.queue.lock();
        while !queue.stopped {
            match queue.due.peek() {
                None => self.changed.wait(&mut queue),
                Some(Reverse(next)) if next.at > Instant::now() => {
                    let at = next.at;
                    self.changed.wait_until(&mut queue, at);
                }
                Some(_) => {
                    let due = queue.due.pop();
                    parking_lot::MutexGuard::unlocked(&mut queue, || {
                        if let Some(what) = due.and_then(|Reverse(due)| due.what.upgrade()) {
                            what.expire();
                        }
                    });
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    struct Send(Mutex<mpsc::Sender<u8>>, u8);

    impl Expire for Send {
        fn expire(&self) {
            let _ = self.0.lock().send(self.1);
        }
    }

    #[test]
    fn expires_in_order_and_forgets_what_is_gone() {
        let deadlines = Deadlines::start().unwrap();
        let (sender, receiver) = mpsc::channel();
        let make = |number| Arc::new(Send(Mutex::new(sender.clone()), number));
        let (first, second, gone) = (make(1), make(2), make(3));
        let second_weak: Weak<Send> = Arc::downgrade(&second);
        let first_weak: Weak<Send> = Arc::downgrade(&first);
        let gone_weak: Weak<Send> = Arc::downgrade(&gone);
        drop(gone);
        deadlines.after(Duration::from_millis(200), second_weak);
        deadlines.after(Duration::from_millis(1), gone_weak);
        deadlines.after(Duration::from_millis(10), first_weak);
        assert_eq!([receiver.recv().unwrap(), receiver.recv().unwrap()], [1, 2]);
    }
}
