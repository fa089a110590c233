//! The agent as a plain process, and a small client of its protocol.
#![allow(clippy::unwrap_used, clippy::panic, dead_code)]

use machinefs_protocol::frame::{FLAG_MORE, HEADER_LEN, Header, Kind, MAX_DATA, decode_meta, encode_meta};
use machinefs_protocol::job::{JobEnd, JobInfo, JobSpec};
use machinefs_protocol::joblog::{Chunk, Cursor, Filter, JobLog, Totals};
use machinefs_protocol::message::{Credit, Event, Failure, Hello, Notice, Reply, Request};
use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Longer than anything here takes on a busy machine; a test that waits for it fails.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// An agent, killed with all its jobs when dropped.
pub struct Agent {
    pub process: Child,
    pub dir: tempfile::TempDir,
}

impl Agent {
    pub fn start() -> Agent {
        Agent::start_as(&["serve"])
    }

    pub fn start_as(args: &[&str]) -> Agent {
        let mut command = Command::new(env!("CARGO_BIN_EXE_machinefs-agent"));
        command.args(args);
        Agent::start_with(command)
    }

    pub fn start_with(mut command: Command) -> Agent {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("socket")).unwrap();
        let fd = listener.as_raw_fd();
        let log = std::fs::File::create(dir.path().join("log")).unwrap();
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        // SAFETY: dup2 and fcntl are async-signal-safe.
        unsafe {
            command.pre_exec(move || {
                let done = if fd == 3 { libc::fcntl(3, libc::F_SETFD, 0) } else { libc::dup2(fd, 3) };
                if done < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
            });
        }
        Agent { process: command.spawn().unwrap(), dir }
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    pub fn raw(&self) -> UnixStream {
        let stream = UnixStream::connect(self.socket()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    pub fn client(&self) -> Client {
        self.client_of(1)
    }

    pub fn client_of(&self, session: u128) -> Client {
        Client::new(self.raw(), session)
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap()
    }

    /// Resident size in KiB.
    pub fn rss(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    pub fn is_alive(&mut self) -> bool {
        self.process.try_wait().unwrap().is_none()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if self.is_alive() {
            // SAFETY: the process is our child and not waited for.
            unsafe {
                libc::kill(self.process.id() as i32, libc::SIGTERM);
            }
            for _ in 0..300 {
                if !self.is_alive() {
                    return;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
            let _ = self.process.kill();
            let _ = self.process.wait();
        }
    }
}

#[derive(Debug)]
pub struct Frame {
    pub header: Header,
    pub meta: Vec<u8>,
    pub data: Vec<u8>,
}

impl Frame {
    /// The errno of an error frame.
    pub fn errno(&self) -> i32 {
        assert_eq!(self.header.kind, Kind::Error);
        decode_meta::<Failure>(&self.meta).unwrap().errno
    }

    /// What a credit frame gives.
    pub fn credit(&self) -> u64 {
        assert_eq!(self.header.kind, Kind::Credit);
        decode_meta::<Credit>(&self.meta).unwrap().bytes
    }
}

/// Reads one frame; `None` when the other side closed.
pub fn read_frame(stream: &mut impl Read) -> Option<Frame> {
    let mut header = [0; HEADER_LEN];
    stream.read_exact(&mut header).ok()?;
    let header = Header::decode(&header).unwrap();
    let mut meta = vec![0; header.meta_len as usize];
    stream.read_exact(&mut meta).ok()?;
    let mut data = vec![0; header.data_len as usize];
    stream.read_exact(&mut data).ok()?;
    Some(Frame { header, meta, data })
}

/// A frame's bytes.
pub fn frame<T: serde::Serialize>(kind: Kind, seq: u32, tag: u64, message: Option<&T>, data: &[u8]) -> Vec<u8> {
    frame_with(kind, 0, seq, 0, tag, message, data)
}

pub fn frame_with<T: serde::Serialize>(
    kind: Kind,
    flags: u8,
    seq: u32,
    deadline_ms: u32,
    tag: u64,
    message: Option<&T>,
    data: &[u8],
) -> Vec<u8> {
    let mut meta = Vec::new();
    if let Some(message) = message {
        encode_meta(message, &mut meta).unwrap();
    }
    let header =
        Header { kind, flags, meta_len: meta.len() as u16, data_len: data.len() as u32, seq, deadline_ms, tag };
    [header.encode().as_slice(), &meta, data].concat()
}

pub fn hello(version: u32, oldest: u32, session: u128) -> Hello {
    Hello { version, oldest, features: 0, session, boot: 0, build: "test".into() }
}

type Routes = Arc<Mutex<Option<HashMap<u64, Sender<Frame>>>>>;

/// A connection past its handshake, with a thread that reads it.
pub struct Client {
    pub stream: UnixStream,
    pub hello: Hello,
    writer: Mutex<u32>,
    routes: Routes,
    pub events: Receiver<Event>,
    next_tag: AtomicU64,
    followed: Mutex<HashMap<u64, JobEnd>>,
}

/// A request that is under way.
pub struct Pending {
    pub tag: u64,
    frames: Receiver<Frame>,
    first: Mutex<Option<Frame>>,
    /// For a stream: whose.
    job: u64,
}

impl Pending {
    pub fn wait(&self) -> Result<(Reply, Vec<u8>), Failure> {
        self.wait_for(PATIENCE).expect("an answer in time")
    }

    pub fn wait_for(&self, patience: Duration) -> Option<Result<(Reply, Vec<u8>), Failure>> {
        let first = self.first.lock().unwrap().take();
        let mut frame = first.or_else(|| self.frames.recv_timeout(patience).ok())?;
        if frame.header.kind == Kind::Error {
            return Some(Err(decode_meta(&frame.meta).unwrap()));
        }
        assert_eq!(frame.header.kind, Kind::Reply);
        let reply: Reply = decode_meta(&frame.meta).unwrap();
        let mut body = std::mem::take(&mut frame.data);
        while frame.header.flags & FLAG_MORE != 0 {
            frame = self.frames.recv_timeout(PATIENCE).unwrap();
            assert_eq!(frame.header.kind, Kind::Body);
            body.extend_from_slice(&frame.data);
        }
        Some(Ok((reply, body)))
    }

    /// Whether a first frame of the answer is there; it is kept for `wait`.
    pub fn has_answer(&self) -> bool {
        let mut first = self.first.lock().unwrap();
        if first.is_none() {
            *first = self.frames.try_recv().ok();
        }
        first.is_some()
    }

    /// The next frame under this tag, if it comes in time.
    pub fn next_within(&self, patience: Duration) -> Option<Frame> {
        self.frames.recv_timeout(patience).ok()
    }

    /// The next frame under this tag; `None` when the connection is closed.
    pub fn next(&self) -> Option<Frame> {
        match self.frames.recv_timeout(PATIENCE) {
            Ok(frame) => Some(frame),
            Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => None,
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => panic!("no frame in time"),
        }
    }
}

impl Client {
    pub fn new(mut stream: UnixStream, session: u128) -> Client {
        stream.write_all(&frame(Kind::Hello, 0, 0, Some(&hello(1, 1, session)), &[])).unwrap();
        let first = read_frame(&mut stream).unwrap();
        assert_eq!((first.header.kind, first.header.seq), (Kind::Hello, 0));
        let hello: Hello = decode_meta(&first.meta).unwrap();
        assert_eq!(hello.session, session);
        stream.set_read_timeout(None).unwrap();
        let routes: Routes = Arc::new(Mutex::new(Some(HashMap::new())));
        let (event_sender, events) = channel();
        let theirs = routes.clone();
        let mut reader = stream.try_clone().unwrap();
        std::thread::spawn(move || {
            let mut seq = 1;
            while let Some(frame) = read_frame(&mut reader) {
                assert_eq!(frame.header.seq, seq);
                seq = seq.wrapping_add(1);
                if frame.header.kind == Kind::Event {
                    let _ = event_sender.send(decode_meta(&frame.meta).unwrap());
                } else if let Some(routes) = &*theirs.lock().unwrap()
                    && let Some(route) = routes.get(&frame.header.tag)
                {
                    let _ = route.send(frame);
                }
            }
            *theirs.lock().unwrap() = None;
        });
        let next_tag = AtomicU64::new(1);
        Client { stream, hello, writer: Mutex::new(1), routes, events, next_tag, followed: Mutex::default() }
    }

    pub fn send_frame<T: serde::Serialize>(
        &self,
        kind: Kind,
        flags: u8,
        deadline: u32,
        tag: u64,
        message: Option<&T>,
        data: &[u8],
    ) {
        let mut seq = self.writer.lock().unwrap();
        let bytes = frame_with(kind, flags, *seq, deadline, tag, message, data);
        *seq = seq.wrapping_add(1);
        let _ = (&self.stream).write_all(&bytes);
    }

    pub fn send(&self, request: &Request<'_>, body: &[u8], deadline: u32) -> Pending {
        let tag = self.next_tag.fetch_add(1, Ordering::Relaxed);
        let (sender, frames) = channel();
        if let Some(routes) = &mut *self.routes.lock().unwrap() {
            routes.insert(tag, sender);
        }
        let (mut now, mut rest) = body.split_at(body.len().min(MAX_DATA));
        let more = |rest: &[u8]| if rest.is_empty() { 0 } else { FLAG_MORE };
        self.send_frame(Kind::Request, more(rest), deadline, tag, Some(request), now);
        while !rest.is_empty() {
            (now, rest) = rest.split_at(rest.len().min(MAX_DATA));
            self.send_frame(Kind::Body, more(rest), 0, tag, None::<&()>, now);
        }
        Pending { tag, frames, first: Mutex::new(None), job: 0 }
    }

    pub fn call(&self, request: &Request<'_>, body: &[u8]) -> Result<(Reply, Vec<u8>), Failure> {
        self.send(request, body, 0).wait()
    }

    pub fn cancel(&self, tag: u64) {
        self.send_frame(Kind::Cancel, 0, 0, tag, None::<&()>, &[]);
    }

    pub fn notice(&self, notice: &Notice) {
        self.send_frame(Kind::Notice, 0, 0, 0, Some(notice), &[]);
    }

    pub fn credit(&self, tag: u64, bytes: u64) {
        self.send_frame(Kind::Credit, 0, 0, tag, Some(&Credit { bytes }), &[]);
    }

    /// Whether the agent has closed the connection.
    pub fn call_closed(&self) -> bool {
        self.routes.lock().unwrap().is_none()
    }

    /// What comes under a tag that was sent by hand.
    pub fn route(&self, tag: u64) -> Pending {
        let (sender, frames) = channel();
        if let Some(routes) = &mut *self.routes.lock().unwrap() {
            routes.insert(tag, sender);
        }
        Pending { tag, frames, first: Mutex::new(None), job: 0 }
    }

    pub fn ping(&self) {
        assert_eq!(self.call(&Request::Ping, &[]).unwrap().0, Reply::Ok);
    }

    /// Asks for a job.
    pub fn send_start(&self, job: u64, spec: &JobSpec, script: &[u8]) -> Pending {
        let (spec_len, body) = spec.start_body(script).unwrap();
        self.send(&Request::JobStart { job, spec_len }, &body, 0)
    }

    /// Opens a stream of a job's input, from that offset on.
    pub fn open_stdin(&self, job: u64, offset: u64) -> (Pending, (u64, u64, bool)) {
        let pending = self.send(&Request::JobStdin { job, offset }, &[], 0);
        match pending.wait() {
            Ok((Reply::Stdin { offset, credit, ended }, _)) => (pending, (offset, credit, ended)),
            other => panic!("stdin: {other:?}"),
        }
    }

    /// Sends data of a stream, without a look at its credit.
    pub fn data(&self, tag: u64, data: &[u8]) {
        self.send_frame(Kind::Data, 0, 0, tag, None::<&()>, data);
    }

    /// Starts a job; gives the start's pending request and the process.
    pub fn start_spec(&self, job: u64, spec: JobSpec, script: &[u8]) -> (Pending, u32) {
        let pending = self.send_start(job, &spec, script);
        match pending.wait() {
            Ok((Reply::Started { pid, .. }, _)) => (pending, pid),
            other => panic!("start: {other:?}"),
        }
    }

    pub fn start(&self, job: u64, script: impl AsRef<[u8]>) -> u32 {
        self.start_spec(job, spec(), script.as_ref()).1
    }

    pub fn attach(&self, job: u64, offset: u64) -> Pending {
        let mut pending = self.send(&Request::JobAttach { job, offset }, &[], 0);
        pending.job = job;
        assert_eq!(pending.wait().unwrap().0, Reply::Ok);
        pending
    }

    pub fn jobs(&self) -> Vec<JobInfo> {
        match self.call(&Request::JobList, &[]).unwrap() {
            (Reply::Jobs, list) => decode_meta(&list).unwrap(),
            other => panic!("{other:?}"),
        }
    }

    pub fn job(&self, job: u64) -> JobInfo {
        self.jobs().into_iter().find(|info| info.job == job).unwrap()
    }

    /// The next end of a job that was not followed.
    pub fn ended(&self) -> (u64, JobEnd) {
        loop {
            let Event::JobEnded { job, end } = self.events.recv_timeout(PATIENCE).expect("an end in time");
            if self.followed.lock().unwrap().get(&job) != Some(&end) {
                return (job, end);
            }
        }
    }

    /// Reads a stream into `log` until the job's end. That may be told twice: when the job ended before the stream
    /// began, and after the last of the stream.
    pub fn follow(&self, stream: &Pending, log: &mut JobLog) -> JobEnd {
        let mut ended = None;
        loop {
            if let Ok(Event::JobEnded { job, end }) = self.events.try_recv()
                && (self.followed.lock().unwrap().get(&job) != Some(&end) || stream.job == job)
            {
                assert_eq!(job, stream.job);
                ended = Some(end);
            }
            if let Some(end) = ended
                && log.end() == end.log_end
            {
                self.followed.lock().unwrap().insert(stream.job, end);
                return end;
            }
            if let Ok(frame) = stream.frames.recv_timeout(Duration::from_millis(5)) {
                assert_eq!(frame.header.kind, Kind::Data);
                log.append_records(&frame.data).unwrap();
                self.credit(stream.tag, frame.data.len() as u64);
            }
        }
    }

    /// Runs a job to its end.
    pub fn run(&self, job: u64, spec: JobSpec, script: impl AsRef<[u8]>) -> (JobEnd, JobLog) {
        self.start_spec(job, spec, script.as_ref());
        let stream = self.attach(job, 0);
        let mut log = replica();
        let end = self.follow(&stream, &mut log);
        (end, log)
    }
}

/// A job as most tests want it.
pub fn spec() -> JobSpec {
    JobSpec { output_limit: 1 << 20, ..JobSpec::default() }
}

/// The host's copy of a log.
pub fn replica() -> JobLog {
    JobLog::new(1 << 30, Box::new(tempfile::tempfile))
}

/// What was printed to one output, and what was lost of it.
pub fn output(log: &JobLog, filter: Filter) -> (Vec<u8>, u64) {
    let mut cursor = Cursor::start();
    let (mut all, mut lost) = (Vec::new(), Totals::default());
    loop {
        match log.read_source(&mut cursor, filter, 1 << 20).unwrap() {
            Chunk::Data(data) if data.is_empty() => return (all, lost.of(filter)),
            Chunk::Data(data) => all.extend(data),
            Chunk::Gap(gap) => {
                lost.stdout += gap.stdout;
                lost.stderr += gap.stderr;
            }
        }
    }
}

/// Standard output as text.
pub fn stdout(log: &JobLog) -> String {
    String::from_utf8(output(log, Filter::Stdout).0).unwrap()
}

/// Standard error as text.
pub fn stderr(log: &JobLog) -> String {
    String::from_utf8(output(log, Filter::Stderr).0).unwrap()
}

/// Waits for something to become true.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let until = std::time::Instant::now() + PATIENCE;
    while !condition() {
        assert!(std::time::Instant::now() < until, "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Whether a process of that number lives.
pub fn lives(pid: i32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !matches!(stat.rsplit(") ").next().and_then(|rest| rest.chars().next()), Some('Z' | 'X')))
}
