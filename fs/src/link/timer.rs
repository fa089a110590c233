//! One thread for all links: it watches the clock, and sockets that were full.
//!
//! Each link says when it next wants to be looked at ([`Shared::arm`]); a link that waits for nothing costs nothing.

use super::error::LinkError;
use super::shared::Shared;
use parking_lot::Mutex;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};
use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Instant;

/// Microseconds on the clock of this module.
pub(super) type Micros = u64;

/// "Not at all", as a time to wake.
pub(super) const NEVER: Micros = u64::MAX;

/// The key of the eventfd in the epoll set; links count from 1.
const WAKE: u64 = 0;

/// Now, in microseconds since the first call.
pub(super) fn now() -> Micros {
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_micros() as Micros
}

/// The thread and what it shares with the others.
pub(super) struct Timer {
    epoll: OwnedFd,
    wake: OwnedFd,
    links: Mutex<HashMap<u64, Weak<Shared>>>,
    /// When the thread wakes by itself.
    next: AtomicU64,
    ids: AtomicU64,
}

/// The one timer; started at the first use.
pub(super) fn timer() -> io::Result<&'static Timer> {
    static TIMER: Mutex<Option<&'static Timer>> = Mutex::new(None);
    let mut slot = TIMER.lock();
    if let Some(timer) = *slot {
        return Ok(timer);
    }
    let epoll = epoll::create(CreateFlags::CLOEXEC)?;
    let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    epoll::add(&epoll, &wake, EventData::new_u64(WAKE), EventFlags::IN)?;
    let timer: &'static Timer = Box::leak(Box::new(Timer {
        epoll,
        wake,
        links: Mutex::new(HashMap::new()),
        next: AtomicU64::new(NEVER),
        ids: AtomicU64::new(WAKE + 1),
    }));
    std::thread::Builder::new().name("link-timer".into()).spawn(move || timer.run())?;
    *slot = Some(timer);
    Ok(timer)
}

impl Timer {
    /// A number for a new link.
    pub fn new_id(&self) -> u64 {
        self.ids.fetch_add(1, SeqCst)
    }

    /// Looks after the link from now on.
    pub fn add(&self, link: &Arc<Shared>) {
        self.links.lock().insert(link.id, Arc::downgrade(link));
    }

    /// Does not look after it any more.
    pub fn remove(&self, link: &Shared) {
        self.links.lock().remove(&link.id);
        // Absent when the socket was never full.
        let _ = epoll::delete(&self.epoll, &link.socket);
    }

    /// Wakes the thread if it would sleep beyond that time.
    pub fn wake_by(&self, at: Micros) {
        if at < self.next.load(SeqCst) {
            // A full counter wakes as well.
            let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        }
    }

    /// Flushes the link's queue when its socket takes more.
    pub fn watch(&self, link: &Shared) -> io::Result<()> {
        let (data, flags) = (EventData::new_u64(link.id), EventFlags::OUT | EventFlags::ONESHOT);
        match epoll::modify(&self.epoll, &link.socket, data, flags) {
            Err(rustix::io::Errno::NOENT) => match epoll::add(&self.epoll, &link.socket, data, flags) {
                // Another thread was faster.
                Err(rustix::io::Errno::EXIST) => Ok(epoll::modify(&self.epoll, &link.socket, data, flags)?),
                other => Ok(other?),
            },
            other => Ok(other?),
        }
    }

    fn run(&self) {
        let mut events = Vec::with_capacity(64);
        loop {
            // The order matters: while `next` is NEVER everyone who arms a link writes the eventfd, so that a time
            // armed after the scan passed its link is not slept over.
            self.next.store(NEVER, SeqCst);
            let _ = rustix::io::read(&self.wake, &mut [0u8; 8]);
            let (due, next) = self.scan(now());
            let busy = !due.is_empty();
            for link in due {
                guarded(&link, Shared::tick);
            }
            let next = if busy { 0 } else { next };
            self.next.store(next, SeqCst);
            let timeout = (next != NEVER).then(|| {
                let micros = next.saturating_sub(now());
                Timespec { tv_sec: (micros / 1_000_000) as i64, tv_nsec: (micros % 1_000_000 * 1000) as i64 }
            });
            events.clear();
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), timeout.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    tracing::error!(%error, "the link timer cannot wait");
                    std::thread::sleep(std::time::Duration::from_millis(10));
                }
            }
            for event in &events {
                let id = event.data.u64();
                let link = self.links.lock().get(&id).and_then(Weak::upgrade);
                if let Some(link) = link {
                    guarded(&link, |link| link.flush());
                }
            }
        }
    }

    /// The links whose time has come, and when the next of the others wants to be looked at.
    fn scan(&self, now: Micros) -> (Vec<Arc<Shared>>, Micros) {
        // Nothing may be dropped below the lock: the last reference to a link takes it off this list.
        let mut links: Vec<Arc<Shared>> = self.links.lock().values().filter_map(Weak::upgrade).collect();
        let mut next = NEVER;
        links.retain(|link| {
            let at = link.wake_at.load(SeqCst);
            if at > now {
                next = next.min(at);
            }
            at <= now
        });
        (links, next)
    }
}

/// Runs what calls back to whoever asked. A panic there is a defect, and must not take the timer of all links along.
fn guarded(link: &Arc<Shared>, run: impl FnOnce(&Arc<Shared>)) {
    if catch_unwind(AssertUnwindSafe(|| run(link))).is_err() {
        tracing::error!(link = link.name, "defect: panic on the link timer");
        link.fail(LinkError::Lost("its timer has failed".into()));
    }
}
