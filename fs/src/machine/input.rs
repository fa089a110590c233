//! What is written to a job's `stdin`, on its way to the agent.
//!
//! Bytes are kept until the job has read them, so that nothing is lost with a link: the agent says how much it ever
//! accepted, and the rest is sent again. What is kept is bounded by the agent's credit; who writes more waits.

use super::watch::Watch;
use crate::errno::Errno;
use crate::link::{DuplexSink, Link, LinkError, Tag};
use machinefs_protocol::job::STDIN_CREDIT;
use machinefs_protocol::message::Reply;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::{Arc, Weak};

/// Bytes kept, at most.
const CAPACITY: usize = STDIN_CREDIT as usize;
/// Bytes sent at once.
const PIECE: usize = 64 * 1024;

/// The input of a job.
#[derive(Default)]
pub struct Input {
    state: Mutex<State>,
    watch: Watch,
}

#[derive(Default)]
struct State {
    /// Somebody has opened it, or said that it stays open: the job gets an input.
    wanted: bool,
    /// The job has begun without one.
    denied: bool,
    /// How many have it open.
    writers: usize,
    /// It does not end with its last writer.
    keep: bool,
    /// Its end was written.
    ended: bool,
    /// Nobody reads it any more.
    over: bool,
    kept: VecDeque<u8>,
    /// Where `kept` begins, in bytes of the input.
    base: u64,
    /// Up to where it was sent.
    sent: u64,
    /// Up to where it may be sent.
    allowed: u64,
    end_sent: bool,
    /// The agent has been asked how much it has.
    synced: bool,
    stream: Option<Stream>,
}

struct Stream {
    link: Weak<Link>,
    tag: Tag,
    again: Again,
}

/// Has [`Input::feed`] called again, later and on another thread.
pub type Again = Arc<dyn Fn() + Send + Sync>;

impl Input {
    /// Of a job that a daemon before this one has started: with an input, or without.
    pub fn of_running(wanted: bool) -> Input {
        // Its writers went with that daemon, without the job's being told that it is all.
        let state = State { wanted, denied: !wanted, ..State::default() };
        Input { state: Mutex::new(state), watch: Watch::new() }
    }

    /// Wakes when more can be written.
    pub fn watch(&self) -> &Watch {
        &self.watch
    }

    /// The job starts: whether it has an input. From now on that cannot change.
    pub fn settle(&self, terminal: bool) -> bool {
        let mut state = self.state.lock();
        state.wanted |= terminal;
        // A terminal's input is open until it is said to end.
        state.keep |= terminal;
        state.denied = !state.wanted;
        state.wanted
    }

    /// A writer comes.
    ///
    /// # Errors
    /// EBUSY when the job has begun without an input; EPIPE after its end, and when nobody reads it any more.
    pub fn open(&self) -> Result<(), Errno> {
        let mut state = self.state.lock();
        if state.denied {
            return Err(Errno::EBUSY);
        }
        if state.ended || state.over {
            return Err(Errno::EPIPE);
        }
        state.wanted = true;
        state.writers += 1;
        Ok(())
    }

    /// A writer goes: with the last one, the input is at its end, unless it is kept open.
    pub fn close(&self) {
        let ends = {
            let mut state = self.state.lock();
            state.writers = state.writers.saturating_sub(1);
            state.writers == 0 && !state.keep
        };
        if ends {
            self.end();
        }
    }

    /// It stays open when its last writer goes.
    ///
    /// # Errors
    /// EBUSY when the job has begun without an input.
    pub fn keep_open(&self) -> Result<(), Errno> {
        let mut state = self.state.lock();
        if state.denied {
            return Err(Errno::EBUSY);
        }
        state.wanted = true;
        state.keep = true;
        Ok(())
    }

    /// No more comes.
    pub fn end(&self) {
        {
            let mut state = self.state.lock();
            state.ended = true;
            state.pump();
        }
        self.watch.notify();
    }

    /// Nobody reads it any more: the job has ended.
    pub fn job_ended(&self) {
        {
            let mut state = self.state.lock();
            state.over = true;
            state.denied |= !state.wanted;
            state.kept = VecDeque::new();
            state.stream = None;
        }
        self.watch.notify();
    }

    /// Takes what there is room for. `None`: there is none.
    ///
    /// # Errors
    /// EPIPE.
    pub fn write(&self, data: &[u8]) -> Option<Result<usize, Errno>> {
        let mut state = self.state.lock();
        if state.over || state.ended {
            return Some(Err(Errno::EPIPE));
        }
        let room = CAPACITY.saturating_sub(state.kept.len());
        let part = data.get(..room.min(data.len())).unwrap_or(data);
        if part.is_empty() && !data.is_empty() {
            return None;
        }
        state.kept.extend(part);
        state.pump();
        Some(Ok(part.len()))
    }

    /// Whether [`Input::write`] would not wait.
    pub fn takes_more(&self) -> bool {
        let state = self.state.lock();
        state.over || state.ended || state.kept.len() < CAPACITY
    }

    /// Feeds the job over that link from now on. `again` is called when that has to be done anew though the link is
    /// there; it must not do it at once.
    pub fn feed(self: &Arc<Self>, link: &Arc<Link>, job: u64, again: Again) {
        let offset = {
            let mut state = self.state.lock();
            if !state.wanted || state.over {
                return;
            }
            state.stream = None;
            if state.synced { state.base } else { 0 }
        };
        let sink = Feed { input: self.clone(), link: Arc::downgrade(link), again };
        link.open_input(job, offset, Arc::new(sink));
    }
}

impl State {
    /// Where what is kept ends. The agent may claim any offset.
    fn end(&self) -> u64 {
        self.base.saturating_add(self.kept.len() as u64)
    }

    /// Sends what may be sent.
    fn pump(&mut self) {
        let Some(stream) = &self.stream else { return };
        let Some(link) = stream.link.upgrade() else { return };
        let (tag, again) = (stream.tag, stream.again.clone());
        let end = self.end();
        while self.sent < end.min(self.allowed) {
            let from = (self.sent - self.base) as usize;
            let len = PIECE.min((end.min(self.allowed) - self.sent) as usize);
            let piece = self.kept.make_contiguous().get(from..from + len).unwrap_or_default();
            if link.send_data(tag, piece).is_err() {
                // It is still here: it is sent over the next stream.
                self.stream = None;
                link.give_up(tag);
                return again();
            }
            self.sent = self.sent.saturating_add(len as u64);
        }
        if self.ended && !self.end_sent && self.sent == end {
            self.end_sent = link.send_end(tag).is_ok();
        }
    }

    /// The job has read up to there.
    fn read_up_to(&mut self, offset: u64) {
        let read = offset.min(self.sent).saturating_sub(self.base) as usize;
        self.kept.drain(..read.min(self.kept.len()));
        self.base = self.base.saturating_add(read as u64);
    }
}

struct Feed {
    input: Arc<Input>,
    link: Weak<Link>,
    again: Again,
}

impl DuplexSink for Feed {
    fn opened(&self, tag: Tag, reply: &Reply) {
        let Reply::Stdin { offset, credit, ended } = reply else { return };
        {
            let mut state = self.input.state.lock();
            if !state.synced {
                state.synced = true;
                // What was written here goes behind what an earlier daemon has sent.
                state.base = *offset;
            }
            let offset = (*offset).clamp(state.base, state.end());
            state.sent = offset;
            state.allowed = offset.saturating_add(*credit);
            state.end_sent = *ended;
            state.ended |= *ended;
            state.stream = Some(Stream { link: self.link.clone(), tag, again: self.again.clone() });
            state.pump();
        }
        self.input.watch.notify();
    }

    // The link lets no byte of an input's pass.
    fn data(&self, _data: &[u8]) {}

    fn credit(&self, bytes: u64) {
        {
            let mut state = self.input.state.lock();
            state.allowed = state.allowed.saturating_add(bytes);
            // The agent grants as much beyond what the job has read, always.
            let read = state.allowed.saturating_sub(STDIN_CREDIT);
            state.read_up_to(read);
            state.pump();
        }
        self.input.watch.notify();
    }

    fn ended(&self, error: Option<LinkError>) {
        let mut state = self.input.state.lock();
        state.stream = None;
        match error {
            None => state.over = true,
            Some(LinkError::Remote { errno: Errno::EPIPE | Errno::ENOENT, .. }) => state.over = true,
            // Another stream took its place, or the whole link is lost: whoever makes the next one goes on.
            Some(LinkError::Remote { .. } | LinkError::Lost(_) | LinkError::Closed | LinkError::Lie(_)) => return,
            Some(_) => {
                drop(state);
                return (self.again)();
            }
        }
        state.kept = VecDeque::new();
        drop(state);
        self.input.watch.notify();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_input_that_was_never_opened_is_none() {
        let input = Input::default();
        assert!(!input.settle(false));
        assert_eq!(input.open(), Err(Errno::EBUSY));
        assert_eq!(input.keep_open(), Err(Errno::EBUSY));
        assert!(Input::default().settle(true), "a terminal has one");
    }

    #[test]
    fn it_ends_with_its_last_writer() {
        let input = Input::default();
        input.open().unwrap();
        input.open().unwrap();
        input.close();
        assert_eq!(input.write(b"abc"), Some(Ok(3)));
        input.close();
        assert_eq!(input.write(b"d"), Some(Err(Errno::EPIPE)));
        assert_eq!(input.open(), Err(Errno::EPIPE));
        let kept = Input::default();
        kept.keep_open().unwrap();
        kept.open().unwrap();
        kept.close();
        kept.open().unwrap();
        assert_eq!(kept.write(b"abc"), Some(Ok(3)));
        kept.end();
        assert_eq!(kept.open(), Err(Errno::EPIPE));
    }

    #[test]
    fn what_is_not_read_is_bounded() {
        let input = Input::default();
        input.open().unwrap();
        assert_eq!(input.write(&vec![1; CAPACITY + 5]), Some(Ok(CAPACITY)));
        assert_eq!(input.write(b"x"), None);
        assert!(!input.takes_more());
        input.job_ended();
        assert!(input.takes_more());
        assert_eq!(input.write(b"x"), Some(Err(Errno::EPIPE)));
    }
}
