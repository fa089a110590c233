//! What goes out: straight into the socket while it takes it, else into a bounded queue, small frames first.
//!
//! A frame gets its sequence number at the moment it is given to the socket, because small frames overtake bulk.

use machinefs_protocol::frame::{HEADER_LEN, Header, Kind};
use parking_lot::Mutex;
use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg};
use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::os::unix::net::UnixStream;
use zeroize::Zeroize;

/// Frames up to this many bytes go before larger ones that wait.
const SMALL: usize = 8 * 1024;
/// Bytes of small frames given to the socket at once.
const BATCH: usize = 64 * 1024;
/// Bytes that control frames (cancel, credit, release, ping) may queue beyond the limit. An agent that takes not even
/// those is given up.
const CONTROL_EXTRA: usize = 4 * 1024 * 1024;

/// A frame that is to be sent; the sequence number in its header is filled in here.
pub(super) struct Frame<'a> {
    pub header: Header,
    pub meta: &'a [u8],
    pub data: &'a [u8],
    /// Copies of it are wiped before their memory is given back.
    pub secret: bool,
}

impl Frame<'_> {
    fn len(&self) -> usize {
        HEADER_LEN + self.meta.len() + self.data.len()
    }

    fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.len());
        bytes.extend_from_slice(&self.header.encode());
        bytes.extend_from_slice(self.meta);
        bytes.extend_from_slice(self.data);
        bytes
    }
}

/// How a frame is queued when the socket is full.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    /// A request with its body: counts against the limit.
    Request,
    /// A control frame: always taken, up to a second limit.
    Control,
    /// A control frame that must not overtake what was queued before it.
    Ordered,
    /// Data of a stream: in order, and counted against the limit.
    Stream,
}

/// What became of the frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sent {
    /// All of it is with the kernel.
    Done,
    /// Some of it waits: somebody must call [`Out::flush`] when the socket takes more.
    Waiting,
}

/// Why frames were not taken.
#[derive(Debug)]
pub(super) enum SendError {
    /// The queue is full.
    Full,
    /// The socket is broken.
    Broken(io::Error),
}

struct Queued {
    kind: Kind,
    tag: u64,
    bytes: Vec<u8>,
    secret: bool,
}

impl Drop for Queued {
    fn drop(&mut self) {
        if self.secret {
            self.bytes.zeroize();
        }
    }
}

#[derive(Default)]
struct State {
    seq: u32,
    /// The frames the socket has taken the beginning of: they must be ended before anything else.
    current: Vec<u8>,
    /// One of these frames is secret.
    current_secret: bool,
    sent: usize,
    small: VecDeque<Queued>,
    bulk: VecDeque<Queued>,
    /// Bytes in both queues and in `current`.
    queued: usize,
    /// The poller watches the socket for us.
    watched: bool,
}

/// The outgoing half of a link.
pub(super) struct Out {
    state: Mutex<State>,
    limit: usize,
}

impl Out {
    /// `seq` is the next frame's number; at most `limit` bytes wait.
    pub fn new(seq: u32, limit: usize) -> Out {
        Out { state: Mutex::new(State { seq, ..State::default() }), limit }
    }

    /// Sends the frames in this order, without blocking.
    pub fn send(&self, socket: &UnixStream, frames: &[Frame<'_>], class: Class) -> Result<Sent, SendError> {
        let mut state = self.state.lock();
        if state.idle() {
            return state.send_now(socket, frames);
        }
        let total: usize = frames.iter().map(Frame::len).sum();
        let limit = if matches!(class, Class::Request | Class::Stream) {
            self.limit
        } else {
            self.limit.saturating_add(CONTROL_EXTRA)
        };
        if state.queued.saturating_add(total) > limit {
            return Err(SendError::Full);
        }
        let bulk = match class {
            Class::Request => frames.len() > 1 || total > SMALL,
            Class::Control => false,
            Class::Ordered | Class::Stream => !state.bulk.is_empty(),
        };
        state.enqueue(frames, bulk);
        Ok(Sent::Waiting)
    }

    /// Gives the socket what waits, as far as it takes it.
    pub fn flush(&self, socket: &UnixStream) -> Result<Sent, SendError> {
        let mut state = self.state.lock();
        state.watched = false;
        state.flush(socket)
    }

    /// Takes a request whose first frame has not yet left out of the queue. `false`: it has (or there is none).
    pub fn withdraw(&self, tag: u64) -> bool {
        let mut state = self.state.lock();
        if state.idle() {
            return false;
        }
        let State { small, bulk, queued, .. } = &mut *state;
        for queue in [small, bulk] {
            if queue.iter().any(|q| q.tag == tag && q.kind == Kind::Request) {
                queue.retain(|q| {
                    let ours = q.tag == tag && matches!(q.kind, Kind::Request | Kind::Body);
                    if ours {
                        *queued -= q.bytes.len();
                    }
                    !ours
                });
                return true;
            }
        }
        false
    }

    /// Whether the poller has to be told to watch the socket; asked once for each time it must.
    pub fn needs_watch(&self) -> bool {
        let mut state = self.state.lock();
        !state.idle() && !std::mem::replace(&mut state.watched, true)
    }

    /// Bytes that wait.
    pub fn queued(&self) -> usize {
        self.state.lock().queued
    }

    /// Drops what waits.
    pub fn clear(&self) {
        let mut state = self.state.lock();
        state.drop_current();
        *state = State { seq: state.seq, ..State::default() };
    }
}

impl State {
    fn idle(&self) -> bool {
        self.queued == 0
    }

    fn enqueue(&mut self, frames: &[Frame<'_>], bulk: bool) {
        for frame in frames {
            let (kind, tag) = (frame.header.kind, frame.header.tag);
            let queued = Queued { kind, tag, bytes: frame.to_bytes(), secret: frame.secret };
            self.queued += queued.bytes.len();
            if bulk { self.bulk.push_back(queued) } else { self.small.push_back(queued) }
        }
    }

    /// Each frame in one call, from where its parts are; only what the socket does not take is copied.
    fn send_now(&mut self, socket: &UnixStream, frames: &[Frame<'_>]) -> Result<Sent, SendError> {
        for (i, frame) in frames.iter().enumerate() {
            let header = Header { seq: self.seq, ..frame.header }.encode();
            let taken = write(socket, &[&header, frame.meta, frame.data].map(IoSlice::new))?;
            if taken > 0 {
                self.seq = self.seq.wrapping_add(1);
            }
            if taken == frame.len() {
                continue;
            }
            let mut rest = i;
            if taken > 0 {
                self.current = [&header, frame.meta, frame.data].concat();
                self.current_secret = frame.secret;
                self.sent = taken;
                self.queued += frame.len() - taken;
                rest = i + 1;
            }
            let rest = frames.get(rest..).unwrap_or(&[]);
            let bulk = rest.len() > 1 || rest.iter().any(|f| f.len() > SMALL || f.header.kind == Kind::Body);
            self.enqueue(rest, bulk);
            return Ok(Sent::Waiting);
        }
        Ok(Sent::Done)
    }

    fn flush(&mut self, socket: &UnixStream) -> Result<Sent, SendError> {
        loop {
            while let Some(rest) = self.current.get(self.sent..).filter(|rest| !rest.is_empty()) {
                let n = write(socket, &[IoSlice::new(rest)])?;
                if n == 0 {
                    return Ok(Sent::Waiting);
                }
                self.sent += n;
                self.queued = self.queued.saturating_sub(n);
            }
            self.drop_current();
            if !self.refill() {
                self.current = Vec::new();
                self.queued = 0;
                return Ok(Sent::Done);
            }
        }
    }

    fn drop_current(&mut self) {
        if std::mem::take(&mut self.current_secret) {
            self.current.zeroize();
        }
        self.current.clear();
        self.sent = 0;
    }

    /// The next frames to send: a batch of small ones, else one of bulk.
    fn refill(&mut self) -> bool {
        while let Some(next) = self.small.front() {
            // A secret one goes alone: what grows is copied.
            let alone = next.secret || self.current_secret;
            if !self.current.is_empty() && (alone || self.current.len() + next.bytes.len() > BATCH) {
                break;
            }
            let Some(mut next) = self.small.pop_front() else { break };
            self.number(&mut next.bytes);
            if next.secret {
                self.take_over(&mut next);
            } else {
                self.current.append(&mut next.bytes);
            }
        }
        if self.current.is_empty()
            && let Some(mut next) = self.bulk.pop_front()
        {
            self.number(&mut next.bytes);
            self.take_over(&mut next);
        }
        !self.current.is_empty()
    }

    fn take_over(&mut self, frame: &mut Queued) {
        self.current = std::mem::take(&mut frame.bytes);
        self.current_secret = frame.secret;
    }

    fn number(&mut self, frame: &mut [u8]) {
        if let Some(place) = frame.get_mut(8..12) {
            place.copy_from_slice(&self.seq.to_le_bytes());
        }
        self.seq = self.seq.wrapping_add(1);
    }
}

/// Bytes the socket took; 0 when it is full.
fn write(socket: &UnixStream, slices: &[IoSlice<'_>]) -> Result<usize, SendError> {
    loop {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        match sendmsg(socket, slices, &mut SendAncillaryBuffer::default(), flags) {
            Ok(n) => return Ok(n),
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) => return Ok(0),
            // The kernel is short of memory for a moment: the poller tries again.
            Err(rustix::io::Errno::NOBUFS) => return Ok(0),
            Err(error) => return Err(SendError::Broken(error.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn frame(kind: Kind, tag: u64, data: &[u8]) -> Frame<'_> {
        let header = Header { kind, flags: 0, meta_len: 0, data_len: data.len() as u32, seq: 0, deadline_ms: 0, tag };
        Frame { header, meta: &[], data, secret: false }
    }

    /// Reads what arrives until `frames` frames are there; checks the sequence and gives (kind, tag, length).
    fn drain(out: &Out, near: &UnixStream, far: &mut UnixStream, frames: usize) -> Vec<(Kind, u64, usize)> {
        let (mut bytes, mut got) = (Vec::new(), Vec::new());
        let mut buffer = vec![0; 1 << 16];
        let mut seq = 0u32;
        while got.len() < frames {
            let n = far.read(&mut buffer).unwrap();
            assert!(n > 0);
            bytes.extend_from_slice(&buffer[..n]);
            out.flush(near).unwrap();
            while bytes.len() >= HEADER_LEN {
                let header = Header::decode(bytes[..HEADER_LEN].try_into().unwrap()).unwrap();
                let len = HEADER_LEN + header.data_len as usize;
                if bytes.len() < len {
                    break;
                }
                assert_eq!(header.seq, seq);
                assert!(bytes[HEADER_LEN..len].iter().all(|&b| u64::from(b) == header.tag), "bytes of another frame");
                seq += 1;
                got.push((header.kind, header.tag, header.data_len as usize));
                bytes.drain(..len);
            }
        }
        got
    }

    fn pair() -> (UnixStream, UnixStream) {
        let (near, far) = UnixStream::pair().unwrap();
        rustix::net::sockopt::set_socket_send_buffer_size(&near, 64 * 1024).unwrap();
        (near, far)
    }

    #[test]
    fn small_frames_overtake_bulk_but_never_cut_into_a_frame() {
        let (near, mut far) = pair();
        let out = Out::new(0, 64 << 20);
        let (one, two, three) = (vec![1u8; 200_000], vec![2u8; 200_000], vec![3u8; 10]);
        let sent = out.send(&near, &[frame(Kind::Request, 1, &one), frame(Kind::Body, 1, &one)], Class::Request);
        assert_eq!(sent.unwrap(), Sent::Waiting);
        out.send(&near, &[frame(Kind::Request, 2, &two)], Class::Request).unwrap();
        out.send(&near, &[frame(Kind::Request, 3, &three)], Class::Request).unwrap();
        let order: Vec<u64> = drain(&out, &near, &mut far, 4).into_iter().map(|(_, tag, _)| tag).collect();
        assert_eq!(order, [1, 3, 1, 2]);
        assert_eq!(out.queued(), 0);
    }

    #[test]
    fn secret_frames_arrive_whole_among_small_ones() {
        let (near, mut far) = pair();
        let out = Out::new(0, 64 << 20);
        let (one, small, secret) = (vec![1u8; 200_000], vec![2u8; 10], vec![3u8; 1000]);
        out.send(&near, &[frame(Kind::Request, 1, &one)], Class::Request).unwrap();
        out.send(&near, &[frame(Kind::Request, 2, &small)], Class::Request).unwrap();
        let hidden = Frame { secret: true, ..frame(Kind::Request, 3, &secret) };
        out.send(&near, &[hidden], Class::Request).unwrap();
        out.send(&near, &[frame(Kind::Request, 2, &small)], Class::Request).unwrap();
        let order: Vec<u64> = drain(&out, &near, &mut far, 4).into_iter().map(|(_, tag, _)| tag).collect();
        assert_eq!(order, [1, 2, 3, 2]);
        let state = out.state.lock();
        assert!(state.queued == 0 && !state.current_secret);
    }

    #[test]
    fn ordered_frames_stay_behind_bulk() {
        let (near, mut far) = pair();
        let out = Out::new(0, 64 << 20);
        let (one, two) = (vec![1u8; 200_000], vec![2u8; 10]);
        out.send(&near, &[frame(Kind::Request, 1, &one), frame(Kind::Body, 1, &one)], Class::Request).unwrap();
        out.send(&near, &[frame(Kind::Notice, 2, &two)], Class::Ordered).unwrap();
        let order: Vec<u64> = drain(&out, &near, &mut far, 3).into_iter().map(|(_, tag, _)| tag).collect();
        assert_eq!(order, [1, 1, 2]);
    }

    #[test]
    fn the_queue_is_bounded_and_control_still_passes() {
        let (near, _far) = pair();
        let out = Out::new(0, 1 << 20);
        let data = vec![7u8; 200_000];
        let mut taken = 0;
        while out.send(&near, &[frame(Kind::Request, 7, &data)], Class::Request).is_ok() {
            taken += 1;
            assert!(taken < 100);
        }
        assert!(out.queued() <= 1 << 20);
        assert!(out.send(&near, &[frame(Kind::Cancel, 7, &[])], Class::Control).is_ok());
        let mut extra = 0;
        while out.send(&near, &[frame(Kind::Credit, 7, &[7; 4096])], Class::Control).is_ok() {
            extra += 1;
            assert!(extra < 10_000);
        }
        assert!(out.queued() <= (1 << 20) + CONTROL_EXTRA);
    }

    #[test]
    fn what_has_not_left_can_be_withdrawn() {
        let (near, mut far) = pair();
        let out = Out::new(0, 64 << 20);
        let (one, two) = (vec![1u8; 250_000], vec![2u8; 250_000]);
        out.send(&near, &[frame(Kind::Request, 1, &one)], Class::Request).unwrap();
        out.send(&near, &[frame(Kind::Request, 2, &two), frame(Kind::Body, 2, &two)], Class::Request).unwrap();
        out.send(&near, &[frame(Kind::Request, 3, &[3; 9])], Class::Request).unwrap();
        assert!(!out.withdraw(1), "its beginning is in the socket");
        assert!(out.withdraw(2));
        assert!(!out.withdraw(2));
        let order: Vec<u64> = drain(&out, &near, &mut far, 2).into_iter().map(|(_, tag, _)| tag).collect();
        assert_eq!(order, [1, 3]);
        assert_eq!(out.queued(), 0);
    }
}
