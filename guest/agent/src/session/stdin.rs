//! What the host feeds to a job, on its way there.

use machinefs_protocol::job::INITIAL_CREDIT;
use parking_lot::Mutex;
use std::collections::VecDeque;

/// The bytes of one job's standard input that it has not read yet.
#[derive(Debug, Default)]
pub struct Stdin {
    state: Mutex<StdinState>,
}

/// The state of a [`Stdin`].
#[derive(Debug, Default)]
pub struct StdinState {
    /// What is to be written, in order.
    pub chunks: VecDeque<Vec<u8>>,
    /// Bytes of the first chunk that are written.
    pub written: usize,
    /// Bytes that were received and not credited back.
    pub outstanding: u64,
    /// Who writes it to the job: a number of the job thread's, once there is one.
    pub writer: Option<u64>,
    /// The host said it was all.
    pub ended: bool,
    /// Nobody reads it any more: what arrives is dropped.
    pub closed: bool,
}

/// The host sent more than its credit.
#[derive(Debug)]
pub struct CreditExceeded;

impl Stdin {
    /// Takes a frame of the stream; an empty one is the end. Gives the bytes to credit back at once (those that are
    /// dropped because the job has closed its input).
    pub fn push(&self, data: Vec<u8>) -> Result<u64, CreditExceeded> {
        let mut state = self.state.lock();
        if data.is_empty() {
            state.ended = true;
            return Ok(0);
        }
        if state.closed || state.ended {
            return Ok(data.len() as u64);
        }
        state.outstanding += data.len() as u64;
        if state.outstanding > INITIAL_CREDIT {
            return Err(CreditExceeded);
        }
        state.chunks.push_back(data);
        Ok(0)
    }

    /// No more will come: the job reads the rest and then the end of file.
    pub fn end(&self) {
        self.state.lock().ended = true;
    }

    /// Nobody reads it any more. Gives the bytes to credit back.
    pub fn close(&self) -> u64 {
        let mut state = self.state.lock();
        state.closed = true;
        state.chunks.clear();
        state.written = 0;
        std::mem::take(&mut state.outstanding)
    }

    /// Whether nothing more can happen to it.
    pub fn is_over(&self) -> bool {
        let state = self.state.lock();
        state.closed && state.ended
    }

    /// Works on the state, under its lock.
    pub fn with<T>(&self, work: impl FnOnce(&mut StdinState) -> T) -> T {
        work(&mut self.state.lock())
    }
}
