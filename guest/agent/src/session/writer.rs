//! Writing frames: one lock, one writev(2) a frame, small frames before bulk.

use machinefs_protocol::frame::{FLAG_MORE, Header, Kind, MAX_DATA};
use parking_lot::{Condvar, Mutex};
use std::io::{self, IoSlice, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A frame up to this size does not wait behind larger ones, but for one that is being written.
const SMALL: usize = 16 * 1024;

/// The write half of a connection.
#[derive(Debug)]
pub struct Writer {
    stream: UnixStream,
    state: Mutex<State>,
    /// Senders of small frames that wait for the lock.
    small: AtomicUsize,
    /// Senders of bulk wait here while there are any.
    turn: Condvar,
}

#[derive(Debug)]
struct State {
    seq: u32,
    /// A frame was written in part: nothing can follow it.
    broken: bool,
}

impl Writer {
    /// A writer at the beginning of the stream.
    pub fn new(stream: UnixStream) -> Writer {
        Writer {
            stream,
            state: Mutex::new(State { seq: 0, broken: false }),
            small: AtomicUsize::new(0),
            turn: Condvar::new(),
        }
    }

    /// Writes one frame, of at most [`MAX_DATA`] bytes of data.
    ///
    /// # Errors
    /// Those of the stream. It is broken then.
    pub fn send(&self, kind: Kind, flags: u8, tag: u64, meta: &[u8], data: &[u8]) -> io::Result<()> {
        let mut state = if meta.len() + data.len() <= SMALL {
            self.small.fetch_add(1, Ordering::AcqRel);
            let state = self.state.lock();
            if self.small.fetch_sub(1, Ordering::AcqRel) == 1 {
                self.turn.notify_all();
            }
            state
        } else {
            let mut state = self.state.lock();
            while self.small.load(Ordering::Acquire) > 0 {
                self.turn.wait(&mut state);
            }
            state
        };
        if state.broken {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let header = Header {
            kind,
            flags,
            meta_len: meta.len() as u16,
            data_len: data.len() as u32,
            seq: state.seq,
            deadline_ms: 0,
            tag,
        };
        state.seq = state.seq.wrapping_add(1);
        let header = header.encode();
        let result = write_all(&self.stream, &mut [IoSlice::new(&header), IoSlice::new(meta), IoSlice::new(data)]);
        state.broken = result.is_err();
        result
    }

    /// Writes an answer with a body of any size, in as many frames as it takes. Other frames may come in between.
    ///
    /// # Errors
    /// Those of the stream.
    pub fn send_with_body(&self, kind: Kind, tag: u64, meta: &[u8], body: &[u8]) -> io::Result<()> {
        let (mut now, mut rest) = body.split_at(body.len().min(MAX_DATA));
        let more = |rest: &[u8]| if rest.is_empty() { 0 } else { FLAG_MORE };
        self.send(kind, more(rest), tag, meta, now)?;
        while !rest.is_empty() {
            (now, rest) = rest.split_at(rest.len().min(MAX_DATA));
            self.send(Kind::Body, more(rest), tag, &[], now)?;
        }
        Ok(())
    }
}

fn write_all(mut stream: &UnixStream, mut slices: &mut [IoSlice<'_>]) -> io::Result<()> {
    IoSlice::advance_slices(&mut slices, 0);
    while !slices.is_empty() {
        match stream.write_vectored(slices) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => IoSlice::advance_slices(&mut slices, count),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
