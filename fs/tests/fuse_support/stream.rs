//! A file that blocks: bytes come from the test, one reader takes them.

use machinefs::errno::Errno;
use machinefs::tree::ops::*;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::{Arc, Weak};

#[derive(Default)]
pub struct Stream {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    bytes: VecDeque<u8>,
    ended: bool,
    waiting: Vec<Arc<Reading>>,
    wakers: Vec<Arc<dyn PollWaker>>,
    /// A read waits until this many bytes are there; those it has taken are its own.
    at_least: usize,
    reads: usize,
}

/// A read that waits, with the bytes that it has already taken.
struct Reading {
    stream: Weak<Stream>,
    state: Mutex<(Vec<u8>, usize, Option<Responder>)>,
}

impl Cancel for Reading {
    fn cancel(&self) {
        let stream = self.stream.upgrade().unwrap();
        let mut state = stream.state.lock();
        state.waiting.retain(|waiting| !std::ptr::eq(waiting.as_ref(), self));
        let (taken, _, responder) = &mut *self.state.lock();
        if let Some(responder) = responder.take() {
            responder.respond(if taken.is_empty() {
                Err(Errno::EINTR)
            } else {
                Ok(Answer::Data(std::mem::take(taken)))
            });
        }
    }
}

impl Stream {
    pub fn new(at_least: usize) -> Arc<Self> {
        let stream = Stream::default();
        stream.state.lock().at_least = at_least;
        Arc::new(stream)
    }

    pub fn push(&self, bytes: &[u8]) {
        let mut state = self.state.lock();
        state.bytes.extend(bytes);
        Self::advance(&mut state);
    }

    pub fn end(&self) {
        let mut state = self.state.lock();
        state.ended = true;
        Self::advance(&mut state);
    }

    pub fn readers(&self) -> usize {
        self.state.lock().waiting.len()
    }

    /// Reads that have come, in all.
    pub fn reads(&self) -> usize {
        self.state.lock().reads
    }

    pub fn pollers(&self) -> usize {
        self.state.lock().wakers.len()
    }

    /// Bytes that are not with any reader.
    pub fn left(&self) -> usize {
        self.state.lock().bytes.len()
    }

    fn advance(state: &mut State) {
        let State { bytes, ended, waiting, wakers, at_least, .. } = state;
        waiting.retain(|reading| {
            let (taken, size, responder) = &mut *reading.state.lock();
            let count = (*size - taken.len()).min(bytes.len());
            taken.extend(bytes.drain(..count));
            let done = *ended || taken.len() >= (*at_least).min(*size);
            if done && let Some(responder) = responder.take() {
                responder.respond(Ok(Answer::Data(std::mem::take(taken))));
            }
            !done
        });
        wakers.drain(..).for_each(|waker| waker.wake());
    }

    pub fn dispatch(self: &Arc<Self>, op: Op<'_>, mut responder: Responder) {
        let mut state = self.state.lock();
        match op {
            Op::Read { size, flags, .. } => {
                let ready = !state.bytes.is_empty() || state.ended;
                if !ready && flags & libc::O_NONBLOCK as u32 != 0 {
                    return responder.respond(Err(Errno::EAGAIN));
                }
                let reading = Arc::new(Reading {
                    stream: Arc::downgrade(self),
                    state: Mutex::new((Vec::new(), size as usize, None)),
                });
                if !responder.set_cancel(reading.clone()) {
                    return responder.respond(Err(Errno::EINTR));
                }
                reading.state.lock().2 = Some(responder);
                state.reads += 1;
                state.waiting.push(reading);
                Self::advance(&mut state);
            }
            Op::Poll { events, waker, .. } => {
                let ready = !state.bytes.is_empty() || state.ended;
                let bits = if ready { libc::POLLIN as u32 } else { 0 };
                state.wakers.extend(waker);
                responder.respond(Ok(Answer::Ready(Ready(bits & events))));
            }
            _ => responder.respond(Err(Errno::EIO)),
        }
    }
}
