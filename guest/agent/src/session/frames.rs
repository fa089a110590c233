//! Reading frames.

use machinefs_protocol::frame::{FrameError, HEADER_LEN, Header};
use rustix::event::{PollFd, PollFlags};
use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use thiserror::Error;

/// Bytes read ahead at a time: many small frames come in one read(2).
const BUFFER: usize = 64 * 1024;

/// Why no frame could be read.
#[derive(Debug, Error)]
pub enum ReadError {
    /// The other side closed the stream between two frames.
    #[error("closed")]
    Closed,
    /// The stream broke, or ended inside a frame.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// What came is no frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
}

/// One frame.
#[derive(Debug)]
pub struct Frame {
    /// Its fixed part.
    pub header: Header,
    /// The encoded message.
    pub meta: Vec<u8>,
    /// The raw bytes.
    pub data: Vec<u8>,
}

/// The read half of a connection.
#[derive(Debug)]
pub struct FrameReader {
    stream: UnixStream,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    seq: u32,
}

impl FrameReader {
    /// A reader at the beginning of the stream.
    pub fn new(stream: UnixStream) -> FrameReader {
        FrameReader { stream, buffer: vec![0; BUFFER].into_boxed_slice(), start: 0, end: 0, seq: 0 }
    }

    /// Whether bytes of a next frame have been read already.
    pub fn has_more(&self) -> bool {
        self.start < self.end
    }

    /// The next frame. Waits for it.
    ///
    /// # Errors
    /// [`ReadError`]; the reader must not be used after one.
    pub fn read(&mut self) -> Result<Frame, ReadError> {
        let mut header = [0; HEADER_LEN];
        if !self.has_more() && self.fill()? == 0 {
            return Err(ReadError::Closed);
        }
        self.read_exact(&mut header)?;
        let header = Header::decode(&header)?;
        if header.seq != self.seq {
            return Err(FrameError::Sequence { got: header.seq, want: self.seq }.into());
        }
        self.seq = self.seq.wrapping_add(1);
        let meta = self.read_vec(usize::from(header.meta_len))?;
        let data = self.read_vec(header.data_len as usize)?;
        Ok(Frame { header, meta, data })
    }

    fn fill(&mut self) -> io::Result<usize> {
        self.start = 0;
        self.end = 0;
        // A thread that waits in read(2) on a unix socket is woken for nothing whenever the other side takes what this
        // side wrote (the kernel tells all who wait that there is room); one that waits in poll(2) is not. What poll
        // says does not matter: the read waits too.
        let _ = rustix::event::poll(&mut [PollFd::new(&self.stream, PollFlags::IN)], None);
        loop {
            match self.stream.read(&mut self.buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(count) => {
                    self.end = count;
                    return Ok(count);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Takes at most `wanted` bytes of what was read ahead.
    fn take(&mut self, wanted: usize) -> &[u8] {
        let count = wanted.min(self.end - self.start);
        let taken = self.buffer.get(self.start..self.start + count).unwrap_or_default();
        self.start += taken.len();
        taken
    }

    fn read_exact(&mut self, mut out: &mut [u8]) -> io::Result<()> {
        while !out.is_empty() {
            if !self.has_more() && self.fill()? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let taken = self.take(out.len());
            let count = taken.len();
            let (now, rest) = out.split_at_mut(count);
            now.copy_from_slice(taken);
            out = rest;
        }
        Ok(())
    }

    /// Reads so many bytes; what was not read ahead goes straight to its place.
    fn read_vec(&mut self, len: usize) -> io::Result<Vec<u8>> {
        let mut out = Vec::with_capacity(len);
        out.extend_from_slice(self.take(len));
        if out.len() < len && len - out.len() < BUFFER / 2 {
            let have = out.len();
            out.resize(len, 0);
            self.read_exact(out.get_mut(have..).unwrap_or_default())?;
        } else if out.len() < len {
            let missing = (len - out.len()) as u64;
            (&self.stream).take(missing).read_to_end(&mut out)?;
            if out.len() < len {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(out)
    }
}
