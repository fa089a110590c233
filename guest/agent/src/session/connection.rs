//! The threads of a connection.
//!
//! One thread at a time, the leader, reads frames. When it has read a request it hands the reading on, executes the
//! request itself and writes the answer: a request is never passed between threads. When all threads are taken, the
//! leader goes on reading (cancellations must always be read) and queues what it reads.
//!
//! Handing on costs a wake-up, more than most requests do. So for one that is usually quick, with nothing read behind
//! it, the leader only parks the read half, and takes it back afterwards. Meanwhile another thread, the watcher, looks
//! every [`TICK`] whether it is parked for the same request still; then it leads from there. The watcher sleeps when
//! there is nothing to do.

use super::frames::{Frame, FrameReader, ReadError};
use super::ports::Ports;
use super::requests::{InFlight, Requests};
use super::streams::Streams;
use super::writer::Writer;
use crate::server::Server;
use machinefs_protocol::file::FileRequest;
use machinefs_protocol::frame::{FLAG_MORE, FrameError, Kind, MAX_BODY, decode_meta};
use machinefs_protocol::message::{Credit, Notice, Request};
use parking_lot::{Condvar, Mutex};
use std::collections::{HashMap, VecDeque};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use thiserror::Error;

/// Threads that execute requests, at most; those that wait for a file lock come on top.
const MAX_THREADS: usize = 64;
/// Requests that wait for a file lock at the same time, at most.
const MAX_LOCK_WAITS: usize = 1024;
/// Threads kept when there is nothing to do.
const IDLE_THREADS: usize = 4;
/// How long a thread beyond those stays idle.
const IDLE_TIME: Duration = Duration::from_secs(5);
/// How long the read half may stay parked behind one request, at most twice.
const TICK: Duration = Duration::from_millis(2);
/// Bytes read or written up to which that is quick.
const QUICK_BYTES: usize = 32 * 1024;
/// Requests read and not begun, at most.
const MAX_QUEUE: usize = 16 * 1024;
/// Bytes of requests that are being received or waiting, at most.
const MAX_BYTES: usize = 64 * 1024 * 1024;
/// What a request takes besides its bytes, roughly.
const OVERHEAD: usize = 512;

/// A request, complete.
#[derive(Debug)]
pub struct Work {
    /// The request's tag.
    pub tag: u64,
    /// The encoded message.
    pub meta: Vec<u8>,
    /// Its body.
    pub body: Vec<u8>,
    /// Milliseconds it may wait, 0 for ever.
    pub deadline_ms: u32,
    /// When its first frame was read.
    pub arrived: Instant,
    /// Whether it was given up.
    pub state: Arc<InFlight>,
    pace: Pace,
}

/// How long a request is going to take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pace {
    /// Usually shorter than waking a thread.
    Quick,
    Ordinary,
    /// It may wait for a file lock, which has no deadline.
    LockWait,
}

impl Work {
    /// The memory it takes, in bytes.
    fn size(&self) -> usize {
        self.meta.len() + self.body.len() + OVERHEAD
    }
}

/// Why a connection is closed by us.
#[derive(Debug, Error)]
enum Violation {
    #[error("{0}")]
    Frame(#[from] FrameError),
    #[error("frame {0:?} from the host")]
    Direction(Kind),
    #[error("tag {0} is in use")]
    Tag(u64),
    #[error("body without a request, tag {0}")]
    Body(u64),
    #[error("data of a stream before the end of its request, tag {0}")]
    Early(u64),
    #[error("bodies over the limit")]
    TooMuch,
    #[error("stream {0}: more than its credit")]
    Credit(u64),
}

/// One connection of the host.
pub struct Connection {
    pub(super) server: Arc<Server>,
    pub(super) writer: Arc<Writer>,
    pub(super) requests: Requests,
    pub(super) streams: Arc<Streams>,
    pub(super) ports: Arc<Ports>,
    stream: UnixStream,
    pool: Mutex<Pool>,
    followers: Condvar,
    drained: Condvar,
    closed: AtomicBool,
}

struct Pool {
    /// The read half, while no thread leads.
    reader: Option<Box<Leader>>,
    /// Its last leader executes a request and comes back for it. The queue is empty then.
    parked: bool,
    /// How often it was parked.
    parkings: u64,
    /// A thread is the watcher.
    watched: bool,
    threads: usize,
    idle: usize,
    lock_waits: usize,
    queue: VecDeque<Work>,
    queued_bytes: usize,
}

/// The read half, and requests whose bodies are not complete.
struct Leader {
    reader: FrameReader,
    partial: HashMap<u64, Work>,
    partial_bytes: usize,
}

impl Connection {
    /// A connection past its handshake.
    pub fn new(server: Arc<Server>, stream: UnixStream, reader: FrameReader, writer: Writer) -> Arc<Connection> {
        let leader = Leader { reader, partial: HashMap::new(), partial_bytes: 0 };
        Arc::new(Connection {
            server,
            writer: Arc::new(writer),
            requests: Requests::default(),
            streams: Arc::default(),
            ports: Arc::default(),
            stream,
            pool: Mutex::new(Pool {
                reader: Some(Box::new(leader)),
                parked: false,
                parkings: 0,
                watched: false,
                threads: 0,
                idle: 0,
                lock_waits: 0,
                queue: VecDeque::new(),
                queued_bytes: 0,
            }),
            followers: Condvar::new(),
            drained: Condvar::new(),
            closed: AtomicBool::new(false),
        })
    }

    /// Its streams.
    pub fn streams(&self) -> &Arc<Streams> {
        &self.streams
    }

    /// Starts its threads.
    ///
    /// # Errors
    /// Those of making a thread.
    pub fn start(self: &Arc<Self>) -> std::io::Result<()> {
        let this = self.clone();
        std::thread::Builder::new().name("streams".into()).stack_size(256 * 1024).spawn(move || {
            if this.streams.run(&this.writer).is_err() {
                this.close();
            }
        })?;
        let mut pool = self.pool.lock();
        if !self.add_thread(&mut pool) {
            return Err(std::io::Error::other("no thread for the connection"));
        }
        Ok(())
    }

    /// Ends it: pending requests are given up, streams end. Returns at once.
    pub fn close(&self) {
        if self.closed.swap(true, Ordering::AcqRel) {
            return;
        }
        let _ = self.stream.shutdown(Shutdown::Both);
        self.streams.close();
        self.ports.close();
        self.requests.cancel_all(self.server.interrupter());
        let _pool = self.pool.lock();
        self.followers.notify_all();
    }

    /// Waits until no request of it is executed any more, but not longer than that.
    pub fn drain(&self, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        let mut pool = self.pool.lock();
        !self.drained.wait_while_until(&mut pool, |pool| pool.threads > 0, until).timed_out()
    }

    fn add_thread(self: &Arc<Self>, pool: &mut Pool) -> bool {
        let this = self.clone();
        let thread = std::thread::Builder::new().name("worker".into()).stack_size(512 * 1024);
        let made = thread.spawn(move || this.work()).is_ok();
        if made {
            pool.threads += 1;
        }
        made
    }

    /// A thread's body.
    fn work(self: &Arc<Self>) {
        let mut pool = self.pool.lock();
        // For the watcher: how often the read half had been parked at its last look.
        let mut looked: Option<u64> = None;
        loop {
            let stuck = looked == Some(pool.parkings);
            if !pool.queue.is_empty() || (pool.reader.is_some() && (stuck || !pool.parked)) {
                if looked.take().is_some() {
                    pool.watched = false;
                }
                if let Some(mut work) = pool.queue.pop_front() {
                    pool.queued_bytes -= work.size();
                    self.run(pool, &mut work);
                } else if let Some(leader) = pool.reader.take() {
                    pool.parked = false;
                    drop(pool);
                    self.lead(leader);
                } else {
                    drop(pool);
                }
                pool = self.pool.lock();
                continue;
            }
            if self.closed.load(Ordering::Acquire) {
                break;
            }
            if looked.is_some() && stuck {
                // Not parked since the last look: there is nothing to do.
                looked = None;
                pool.watched = false;
            } else if looked.is_some() || (pool.parked && !pool.watched) {
                looked = Some(pool.parkings);
                pool.watched = true;
            }
            pool.idle += 1;
            let time = if looked.is_some() { TICK } else { IDLE_TIME };
            let timed_out = self.followers.wait_for(&mut pool, time).timed_out();
            pool.idle -= 1;
            if timed_out && looked.is_none() && pool.idle >= IDLE_THREADS {
                break;
            }
        }
        pool.threads -= 1;
        if pool.threads == 0 {
            self.drained.notify_all();
        }
    }

    /// Executes a request, with the pool's lock given up meanwhile.
    fn run(self: &Arc<Self>, mut pool: parking_lot::MutexGuard<'_, Pool>, work: &mut Work) {
        if work.pace == Pace::LockWait {
            pool.lock_waits += 1;
            if !pool.queue.is_empty() && pool.idle == 0 && pool.threads < MAX_THREADS + pool.lock_waits {
                self.add_thread(&mut pool);
            }
        }
        drop(pool);
        self.execute(work);
        if work.pace == Pace::LockWait {
            self.pool.lock().lock_waits -= 1;
        }
    }

    /// Reads frames, until there is a request to execute and another thread to read on; executes it.
    fn lead(self: &Arc<Self>, mut leader: Box<Leader>) {
        loop {
            let mut work = match leader.reader.read() {
                Ok(frame) => match self.admit(&mut leader, frame) {
                    Ok(Some(work)) => work,
                    Ok(None) => continue,
                    Err(violation) => return self.violated(&violation),
                },
                Err(ReadError::Frame(error)) => return self.violated(&error.into()),
                Err(error) => {
                    if !self.closed.load(Ordering::Acquire) && !matches!(error, ReadError::Closed) {
                        crate::log::line(format_args!("connection lost: {error}"));
                    }
                    return self.close();
                }
            };
            let mut pool = self.pool.lock();
            let follower = pool.idle > 0;
            let alone = work.pace == Pace::Quick && !leader.reader.has_more() && pool.queue.is_empty();
            // A new thread finds the read half parked and becomes the watcher.
            if alone && (pool.watched || follower || (pool.threads < MAX_THREADS && self.add_thread(&mut pool))) {
                match self.execute_in_place(pool, leader, &mut work) {
                    Some(back) => leader = back,
                    None => return,
                }
                continue;
            }
            if work.pace == Pace::LockWait && pool.lock_waits >= MAX_LOCK_WAITS {
                drop(pool);
                self.refuse(&work, libc::ENOLCK);
                continue;
            }
            let waiting = pool.lock_waits + usize::from(work.pace == Pace::LockWait);
            if follower || (pool.threads < MAX_THREADS + waiting && self.add_thread(&mut pool)) {
                pool.reader = Some(leader);
                if follower {
                    self.followers.notify_one();
                }
                return self.run(pool, &mut work);
            }
            if pool.queue.len() >= MAX_QUEUE || pool.queued_bytes + work.size() > MAX_BYTES {
                drop(pool);
                self.refuse(&work, libc::EBUSY);
                continue;
            }
            pool.queued_bytes += work.size();
            pool.queue.push_back(work);
        }
    }

    /// Executes a request with the read half parked. Gives that back, unless another thread leads by now.
    fn execute_in_place(
        self: &Arc<Self>,
        mut pool: parking_lot::MutexGuard<'_, Pool>,
        leader: Box<Leader>,
        work: &mut Work,
    ) -> Option<Box<Leader>> {
        pool.reader = Some(leader);
        pool.parked = true;
        pool.parkings += 1;
        if !pool.watched {
            self.followers.notify_one();
        }
        drop(pool);
        self.execute(work);
        let mut pool = self.pool.lock();
        if !pool.parked {
            return None;
        }
        pool.parked = false;
        pool.reader.take()
    }

    fn refuse(&self, work: &Work, errno: i32) {
        work.state.finish();
        self.requests.remove(work.tag);
        self.answer(work.tag, &Err(super::execute::failure(errno, "too many requests at once")));
    }

    fn violated(&self, violation: &Violation) {
        crate::log::line(format_args!("connection closed: {violation}"));
        self.close();
    }

    /// Ends the connection because a message of it does not decode.
    pub(super) fn malformed(&self, error: &FrameError) {
        crate::log::line(format_args!("connection closed: {error}"));
        self.close();
    }

    /// Takes in a frame; gives a request once it is complete.
    fn admit(&self, leader: &mut Leader, frame: Frame) -> Result<Option<Work>, Violation> {
        let Frame { header, meta, data } = frame;
        let tag = header.tag;
        let more = header.flags & FLAG_MORE != 0;
        match header.kind {
            Kind::Request => {
                let state = self.requests.add(tag).ok_or(Violation::Tag(tag))?;
                let pace = pace(&meta, data.len());
                let (deadline_ms, arrived) = (header.deadline_ms, Instant::now());
                let work = Work { tag, meta, body: data, deadline_ms, arrived, state, pace };
                if !more {
                    return Ok(Some(work));
                }
                leader.partial_bytes += work.size();
                leader.partial.insert(tag, work);
                if leader.partial_bytes > MAX_BYTES { Err(Violation::TooMuch) } else { Ok(None) }
            }
            Kind::Body => {
                let work = leader.partial.get_mut(&tag).ok_or(Violation::Body(tag))?;
                leader.partial_bytes += data.len();
                if leader.partial_bytes > MAX_BYTES || work.body.len() + data.len() > MAX_BODY {
                    return Err(Violation::TooMuch);
                }
                work.body.extend_from_slice(&data);
                if more {
                    return Ok(None);
                }
                let work = leader.partial.remove(&tag);
                leader.partial_bytes -= work.as_ref().map_or(0, Work::size);
                Ok(work)
            }
            Kind::Cancel => {
                self.requests.cancel(tag, self.server.interrupter());
                self.streams.detach(tag);
                self.ports.reset(tag);
                Ok(None)
            }
            Kind::Credit => {
                let credit: Credit = decode_meta(&meta)?;
                self.streams.credit(tag, credit.bytes);
                self.ports.credit(tag, credit.bytes);
                Ok(None)
            }
            Kind::Data => {
                if leader.partial.contains_key(&tag) {
                    return Err(Violation::Early(tag));
                }
                // What comes for a stream that has ended meanwhile is dropped.
                if let Some(stdin) = self.streams.input(tag) {
                    let writer = stdin.push(tag, data).map_err(|_| Violation::Credit(tag))?;
                    self.server.jobs().feed(writer);
                } else if !self.ports.push(tag, data) {
                    return Err(Violation::Credit(tag));
                }
                Ok(None)
            }
            Kind::Notice => {
                self.notice(decode_meta(&meta)?);
                Ok(None)
            }
            kind @ (Kind::Hello | Kind::Reply | Kind::Error | Kind::Event) => Err(Violation::Direction(kind)),
        }
    }

    fn notice(&self, notice: Notice) {
        let files = self.server.files();
        match notice {
            Notice::Forget(holds) => files.forget(&holds),
            Notice::Release { fh, owner } => files.release(fh, owner),
            Notice::ReleaseDir { fh } => files.release_dir(fh),
        }
    }
}

/// How long a request with that much data is going to take.
fn pace(meta: &[u8], data: usize) -> Pace {
    use FileRequest as F;
    // Only short messages are decoded twice.
    if meta.len() > 600 || data > QUICK_BYTES {
        return Pace::Ordinary;
    }
    match decode_meta(meta) {
        Ok(Request::File(F::SetLock { wait: true, .. })) => Pace::LockWait,
        Ok(Request::File(F::Read { size, .. })) if size as usize > QUICK_BYTES => Pace::Ordinary,
        Ok(Request::File(
            F::Fsync { .. }
            | F::OpenDir { .. }
            | F::ReadDir { .. }
            | F::Fallocate { .. }
            | F::CopyRange { .. }
            | F::SyncFs,
        )) => Pace::Ordinary,
        Ok(Request::Ping | Request::File(_)) => Pace::Quick,
        _ => Pace::Ordinary,
    }
}
