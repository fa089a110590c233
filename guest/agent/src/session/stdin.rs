//! What the host feeds to a job, on its way there.

use super::Streams;
use machinefs_protocol::job::STDIN_CREDIT;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::Arc;
use thiserror::Error;

/// A job's standard input. It outlives the links that it is fed over.
#[derive(Debug, Default)]
pub struct Stdin {
    state: Mutex<State>,
}

/// The part of a [`Stdin`] that its writer works on.
#[derive(Debug, Default)]
pub struct Pending {
    /// What is to be written, in order.
    pub chunks: VecDeque<Vec<u8>>,
    /// Bytes of the first chunk that are written.
    pub written: usize,
    /// The host said it was all.
    pub ended: bool,
    /// The last byte that was written.
    pub last: Option<u8>,
}

#[derive(Debug, Default)]
struct State {
    pending: Pending,
    /// Bytes that ever arrived.
    accepted: u64,
    /// Bytes of these that were written to the job.
    taken: u64,
    /// Who writes it to the job: a number of the job thread's, once there is one.
    writer: Option<u64>,
    over: Option<Over>,
    stream: Option<Stream>,
}

/// The stream it is fed over now.
#[derive(Debug)]
struct Stream {
    tag: u64,
    streams: Arc<Streams>,
    /// Its request is not answered yet: nothing may be said under its tag.
    held: bool,
    /// The host may send up to this byte.
    granted: u64,
}

/// How an input came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Over {
    /// The job got all of it and the end of file.
    Delivered,
    /// Nobody reads it any more.
    Unread,
}

/// The host sent more than its credit.
#[derive(Debug)]
pub struct CreditExceeded;

/// Why an input cannot be fed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum StdinError {
    /// See [`Over::Unread`].
    #[error("nobody reads the job's input any more")]
    Unread,
    /// There would be a hole.
    #[error("the bytes before that offset did not arrive")]
    Hole,
}

impl StdinError {
    /// The errno for it.
    pub fn errno(self) -> i32 {
        match self {
            StdinError::Unread => libc::EPIPE,
            StdinError::Hole => libc::EINVAL,
        }
    }
}

/// Where an input stands when a stream of it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Begun {
    /// Bytes that ever arrived.
    pub offset: u64,
    /// Bytes the host may send.
    pub credit: u64,
    /// The end has arrived too.
    pub ended: bool,
}

impl State {
    /// Grants what there is room for, and tells the stream of the end.
    fn tell(&mut self) {
        let Some(stream) = self.stream.as_mut().filter(|stream| !stream.held) else { return };
        let limit = self.taken + STDIN_CREDIT;
        if limit > stream.granted && !self.pending.ended && self.over.is_none() {
            stream.streams.give(stream.tag, limit - stream.granted);
            stream.granted = limit;
        }
        if let Some(over) = self.over {
            let errno = if over == Over::Unread { Some(libc::EPIPE) } else { None };
            stream.streams.finish(stream.tag, errno);
            self.stream = None;
        }
    }
}

impl Stdin {
    /// Feeds it over that stream from now on. Nothing is said there before [`Stdin::release`]. `offset` is the first
    /// byte the host still has.
    pub fn open(&self, tag: u64, streams: Arc<Streams>, offset: u64) -> Result<Begun, StdinError> {
        let mut state = self.state.lock();
        if state.over == Some(Over::Unread) {
            return Err(StdinError::Unread);
        }
        if offset > state.accepted {
            return Err(StdinError::Hole);
        }
        let ended = state.pending.ended;
        let granted = if ended { state.accepted } else { state.taken + STDIN_CREDIT };
        let begun = Begun { offset: state.accepted, credit: granted - state.accepted, ended };
        if let Some(older) = state.stream.replace(Stream { tag, streams, held: true, granted }) {
            older.streams.finish(older.tag, Some(libc::ECANCELED));
        }
        Ok(begun)
    }

    /// The request for that stream is answered.
    pub fn release(&self, tag: u64) {
        let mut state = self.state.lock();
        if let Some(stream) = state.stream.as_mut().filter(|stream| stream.tag == tag) {
            stream.held = false;
            state.tell();
        }
    }

    /// The host gives that stream up.
    pub fn withdraw(&self, tag: u64) {
        let mut state = self.state.lock();
        state.stream = state.stream.take().filter(|stream| stream.tag != tag);
    }

    /// Takes a frame of that stream; an empty one is the end. Gives the writer that is to be woken. What comes over a
    /// stream that was replaced, or after the end, is dropped.
    pub fn push(&self, tag: u64, data: Vec<u8>) -> Result<Option<u64>, CreditExceeded> {
        let mut state = self.state.lock();
        let granted = state.stream.as_ref().filter(|stream| stream.tag == tag).map(|stream| stream.granted);
        let Some(granted) = granted.filter(|_| state.over.is_none() && !state.pending.ended) else { return Ok(None) };
        if data.is_empty() {
            state.pending.ended = true;
            return Ok(state.writer);
        }
        let end = state.accepted + data.len() as u64;
        if end > granted {
            return Err(CreditExceeded);
        }
        state.accepted = end;
        state.pending.chunks.push_back(data);
        Ok(state.writer)
    }

    /// From now on that writer is woken.
    pub fn set_writer(&self, writer: u64) {
        self.state.lock().writer = Some(writer);
    }

    /// Writes: `work` does it, and gives how many bytes were taken, and whether it is over.
    pub fn write(&self, work: impl FnOnce(&mut Pending) -> (u64, Option<Over>)) {
        let mut state = self.state.lock();
        let (taken, over) = work(&mut state.pending);
        state.taken += taken;
        state.over = state.over.or(over);
        state.tell();
    }

    /// It is over; only the first such call counts.
    pub fn close(&self, over: Over) {
        let mut state = self.state.lock();
        state.over = state.over.or(Some(over));
        state.pending.chunks.clear();
        state.pending.written = 0;
        state.tell();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(stdin: &Stdin, count: u64) {
        stdin.write(|pending| {
            pending.chunks.clear();
            (count, None)
        });
    }

    #[test]
    fn an_input_goes_on_over_streams() {
        let stdin = Stdin::default();
        let streams = Arc::new(Streams::default());
        let open = |tag, offset| stdin.open(tag, streams.clone(), offset);
        assert_eq!(open(1, 0), Ok(Begun { offset: 0, credit: STDIN_CREDIT, ended: false }));
        stdin.release(1);
        assert!(stdin.push(1, vec![0; 100_000]).is_ok());
        assert_eq!(open(2, 100_001), Err(StdinError::Hole));
        // What is not read still counts.
        assert_eq!(open(2, 50_000), Ok(Begun { offset: 100_000, credit: STDIN_CREDIT - 100_000, ended: false }));
        stdin.release(2);
        assert!(stdin.push(1, vec![0; STDIN_CREDIT as usize]).is_ok(), "dropped");
        take(&stdin, 100_000);
        assert!(stdin.push(2, vec![0; STDIN_CREDIT as usize]).is_ok());
        assert!(stdin.push(2, vec![0]).is_err());
        take(&stdin, STDIN_CREDIT);
        assert!(stdin.push(2, Vec::new()).is_ok());
        assert_eq!(open(3, 0), Ok(Begun { offset: 100_000 + STDIN_CREDIT, credit: 0, ended: true }));
        stdin.close(Over::Unread);
        stdin.close(Over::Delivered);
        assert_eq!(open(4, 0), Err(StdinError::Unread));
    }
}
