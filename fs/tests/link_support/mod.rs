//! What the tests of the link and of the guest's files share: an agent that says what the test tells it to, and a host
//! that asks.

#![allow(dead_code, reason = "each test file uses its part")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

pub mod guest;
pub mod host;

use machinefs::link::{Link, LinkError, LinkEvents, LinkOptions};
use machinefs_protocol::frame::{FLAG_MORE, HEADER_LEN, Header, Kind, MAX_DATA, decode_meta, encode_meta};
use machinefs_protocol::message::{Event, Failure, Hello, Reply};
use parking_lot::Mutex;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

/// Longer than anything takes here: it only turns a hang into a failure.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// The session of every link here.
pub const SESSION: u128 = 42;

/// A frame as it came from the host.
pub struct Frame {
    pub header: Header,
    pub meta: Vec<u8>,
    pub data: Vec<u8>,
}

/// The agent's end of a stream: writes whatever it is told to.
pub struct Agent {
    pub stream: UnixStream,
    pub seq: u32,
}

impl Agent {
    /// The next frame of the host; `None` when the host has closed the stream.
    pub fn next(&mut self) -> Option<Frame> {
        let mut header = [0; HEADER_LEN];
        self.stream.read_exact(&mut header).ok()?;
        let header = Header::decode(&header).unwrap();
        let mut meta = vec![0; header.meta_len.into()];
        let mut data = vec![0; header.data_len as usize];
        self.stream.read_exact(&mut meta).ok()?;
        self.stream.read_exact(&mut data).ok()?;
        Some(Frame { header, meta, data })
    }

    /// The next request, whatever else comes before it. `None` at the end.
    pub fn next_request(&mut self) -> Option<Frame> {
        loop {
            let frame = self.next()?;
            if frame.header.kind == Kind::Request {
                return Some(frame);
            }
        }
    }

    /// Bytes as they are.
    pub fn raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// A frame with the sequence number that is due.
    pub fn frame(&mut self, kind: Kind, flags: u8, tag: u64, meta: &[u8], data: &[u8]) -> io::Result<()> {
        let (meta_len, data_len) = (meta.len() as u16, data.len() as u32);
        let header = Header { kind, flags, meta_len, data_len, seq: self.seq, deadline_ms: 0, tag };
        self.seq = self.seq.wrapping_add(1);
        let mut bytes = header.encode().to_vec();
        bytes.extend_from_slice(meta);
        bytes.extend_from_slice(data);
        self.raw(&bytes)
    }

    /// A message in a frame.
    pub fn message<M: serde::Serialize>(
        &mut self,
        kind: Kind,
        flags: u8,
        tag: u64,
        message: &M,
        data: &[u8],
    ) -> io::Result<()> {
        let mut meta = Vec::new();
        encode_meta(message, &mut meta).unwrap();
        self.frame(kind, flags, tag, &meta, data)
    }

    /// A reply with its body in as many frames as it takes.
    pub fn reply(&mut self, tag: u64, reply: &Reply, body: &[u8]) -> io::Result<()> {
        let mut chunks = body.chunks(MAX_DATA);
        let first = chunks.next().unwrap_or(&[]);
        let flags = |left: usize| if left > 0 { FLAG_MORE } else { 0 };
        self.message(Kind::Reply, flags(chunks.len()), tag, reply, first)?;
        while let Some(chunk) = chunks.next() {
            self.frame(Kind::Body, flags(chunks.len()), tag, &[], chunk)?;
        }
        Ok(())
    }

    pub fn failure(&mut self, tag: u64, errno: i32) -> io::Result<()> {
        self.message(Kind::Error, 0, tag, &Failure { errno, message: String::new() }, &[])
    }

    pub fn event(&mut self, event: &Event) -> io::Result<()> {
        self.message(Kind::Event, 0, 0, event, &[])
    }

    /// A hello that answers the host's.
    pub fn hello() -> Hello {
        Hello { version: 1, oldest: 1, features: 0, session: SESSION, boot: 7, build: "fake".into() }
    }
}

/// What is heard of a link.
pub type Heard = Receiver<Result<Event, LinkError>>;

/// What the agent said unasked, and the end of the link.
pub struct News {
    sender: Mutex<Sender<Result<Event, LinkError>>>,
}

impl LinkEvents for News {
    fn event(&self, event: Event) {
        // A test that does not listen has dropped its end.
        let _ = self.sender.lock().send(Ok(event));
    }

    fn lost(&self, reason: &LinkError) {
        let _ = self.sender.lock().send(Err(reason.clone()));
    }
}

/// A link and what is heard of it.
pub struct Host {
    pub link: Arc<Link>,
    pub news: Heard,
}

impl Host {
    /// Why the link ended. Waits for it.
    pub fn lost(&self) -> LinkError {
        loop {
            if let Err(reason) = self.news.recv_timeout(PATIENCE).expect("the link goes on") {
                return reason;
            }
        }
    }
}

/// How long one operation may take in these tests.
pub const OP_DEADLINE: Duration = Duration::from_millis(700);

/// A link to an agent that has said hello; `deadline` for one operation.
pub fn connect(deadline: Duration) -> (Host, Agent) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let thread = std::thread::spawn(move || {
        let mut agent = Agent { stream: theirs, seq: 0 };
        let hello = agent.next().unwrap();
        let theirs: Hello = decode_meta(&hello.meta).unwrap();
        assert_eq!((hello.header.kind, theirs.session), (Kind::Hello, SESSION));
        agent.message(Kind::Hello, 0, 0, &Agent::hello(), &[]).unwrap();
        agent
    });
    let (link, news) = open(ours, deadline);
    (Host { link: link.unwrap(), news }, thread.join().unwrap())
}

/// A link over any stream.
pub fn open(stream: UnixStream, deadline: Duration) -> (Result<Arc<Link>, LinkError>, Heard) {
    let (sender, news) = channel();
    let events = Arc::new(News { sender: Mutex::new(sender) });
    let options = LinkOptions { op_deadline: deadline, ..LinkOptions::new(SESSION, "test", events) };
    (Link::connect(stream, options), news)
}

/// Resident memory of this process, in bytes.
pub fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
}

/// Waits until something is so. The limit only turns a hang into a failure.
pub fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < PATIENCE, "never came: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
