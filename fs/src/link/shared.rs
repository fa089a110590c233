//! The state of a link: what is pending, and how each of it ends.

mod late;
mod overdue;

use super::duplex::Duplexes;
use super::error::LinkError;
use super::expect::{Expect, expectation};
use super::out::{Class, Frame, Out, SendError, Sent};
use super::stream::Streams;
use super::timer::{Micros, NEVER, Timer, now};
use super::{Done, Interrupt, LinkEvents, LinkOptions, RequestOptions, Response, Tag};
use late::unlock_of;
use machinefs_protocol::file::FileRequest;
use machinefs_protocol::frame::{FLAG_MORE, FrameError, Header, Kind, MAX_BODY, MAX_DATA, encode_meta};
use machinefs_protocol::message::{Notice, Request};
use parking_lot::Mutex;
use std::cell::Cell;
use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst};
use std::time::Duration;

/// Bytes of requests that may wait for an agent that does not take them.
const QUEUE_LIMIT: usize = 64 * 1024 * 1024;
/// Requests that may be unanswered at once, those given up included.
const MAX_PENDING: usize = 65_536;
/// How long an interrupted query may still be answered by the agent; also how often a killed caller is looked for.
const GRACE: Micros = 50_000;
/// How long forgets are collected.
const FORGET_DELAY: Micros = 5_000;
/// Forgets in one notice: at most 20 bytes each, so that they fit in a frame's meta.
const FORGET_BATCH: usize = 1024;
/// Nodes whose forgets may wait for an agent that takes nothing.
const MAX_FORGETS: usize = 1 << 20;
/// Lies before the session is ended.
const MAX_LIES: u32 = 1000;

/// A request that was sent and is not answered.
struct Pending {
    /// `None`: given up; a late answer is given back.
    done: Option<Done>,
    expect: Expect,
    limit: usize,
    deadline: Micros,
    /// A file operation: it fails when the agent is silent, even without a deadline.
    file: bool,
    interrupt: Interrupt,
    /// When to look again at an interrupted request.
    look_at: Micros,
    /// The lock that a late answer would have taken for nobody.
    unlock: Option<Box<FileRequest<'static>>>,
}

#[derive(Default)]
struct Table {
    map: HashMap<Tag, Pending>,
    /// Those that somebody still waits for.
    live: usize,
    closed: Option<LinkError>,
}

/// What the threads of a link share.
pub(super) struct Shared {
    pub id: u64,
    pub name: String,
    pub socket: UnixStream,
    timer: &'static Timer,
    out: Out,
    table: Mutex<Table>,
    pub streams: Mutex<Streams>,
    pub duplexes: Mutex<Duplexes>,
    forgets: Mutex<HashMap<u64, u64>>,
    events: Mutex<Option<Arc<dyn LinkEvents>>>,
    op_deadline: Micros,
    /// Since when nothing has come though something was waited for.
    quiet_since: AtomicU64,
    unresponsive: AtomicBool,
    pinging: AtomicBool,
    /// When the timer looks at this link.
    pub wake_at: AtomicU64,
    lies: AtomicU32,
    tags: AtomicU64,
    /// Why the reader is to end the link.
    broken: Mutex<Option<LinkError>>,
}

thread_local! {
    /// Where this thread encodes its messages.
    static META: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

impl Shared {
    pub fn new(timer: &'static Timer, socket: UnixStream, options: LinkOptions) -> Shared {
        Shared {
            id: timer.new_id(),
            name: options.name,
            socket,
            timer,
            out: Out::new(1, QUEUE_LIMIT),
            table: Mutex::default(),
            streams: Mutex::default(),
            duplexes: Mutex::default(),
            forgets: Mutex::default(),
            events: Mutex::new(Some(options.events)),
            op_deadline: micros(options.op_deadline),
            quiet_since: AtomicU64::new(now()),
            unresponsive: AtomicBool::new(false),
            pinging: AtomicBool::new(false),
            wake_at: AtomicU64::new(NEVER),
            lies: AtomicU32::new(0),
            tags: AtomicU64::new(first_tag()),
            broken: Mutex::default(),
        }
    }

    pub fn next_tag(&self) -> Tag {
        self.tags.fetch_add(1, SeqCst)
    }

    pub fn events(&self) -> Option<Arc<dyn LinkEvents>> {
        self.events.lock().clone()
    }

    pub fn is_responsive(&self) -> bool {
        !self.unresponsive.load(SeqCst) && self.table.lock().closed.is_none()
    }

    pub fn pending(&self) -> (usize, usize) {
        let table = self.table.lock();
        (table.live, table.map.len() - table.live)
    }

    pub fn queued(&self) -> usize {
        self.out.queued()
    }

    // --- sending ---------------------------------------------------------------------------------------------------

    /// Registers and sends a request. `done` is called exactly once; on this thread when it cannot be sent.
    pub fn request(
        self: &Arc<Self>,
        tag: Tag,
        request: &Request<'_>,
        body: &[u8],
        options: RequestOptions,
        done: Done,
    ) {
        if body.len() > MAX_BODY {
            return done(Err(LinkError::too_large(&FrameError::TooLarge { meta: 0, data: body.len() })));
        }
        let file = matches!(request, Request::File(_));
        let is_ping = matches!(request, Request::Ping);
        if file && self.unresponsive.load(SeqCst) {
            return done(Err(LinkError::Unresponsive));
        }
        let mut meta = META.take();
        let encoded = encode_meta(request, &mut meta);
        let meta_len = match encoded {
            Ok(len) => len,
            Err(error) => {
                META.set(meta);
                return done(Err(LinkError::too_large(&error)));
            }
        };
        let time = now();
        let (expect, limit) = expectation(request);
        let deadline = options.deadline.map_or(NEVER, |after| time.saturating_add(micros(after)));
        let pending = Pending {
            done: Some(done),
            expect,
            limit,
            deadline,
            file,
            interrupt: options.interrupt,
            look_at: NEVER,
            unlock: if options.unlock_if_late { unlock_of(request) } else { None },
        };
        if let Err((done, error)) = self.register(tag, pending, time, is_ping) {
            META.set(meta);
            return done(Err(error));
        }
        self.arm(deadline.min(time.saturating_add(self.ping_after())));
        let deadline_ms = options.deadline.map_or(0, |after| after.as_millis().clamp(1, u32::MAX.into()) as u32);
        let sent = self.send_request(tag, meta_len, &meta, deadline_ms, body, request);
        META.set(meta);
        match sent {
            Ok(()) => {}
            Err(SendError::Full) => self.end(tag, LinkError::Overloaded, true),
            Err(SendError::Broken(error)) => {
                let error = LinkError::Lost(error.to_string().into());
                self.break_off(error.clone());
                self.end(tag, error, true);
            }
        }
    }

    fn register(&self, tag: Tag, mut pending: Pending, time: Micros, ping: bool) -> Result<(), (Done, LinkError)> {
        let mut table = self.table.lock();
        let error = match &table.closed {
            Some(error) => error.clone(),
            None if table.map.len() >= MAX_PENDING && !ping => LinkError::Overloaded,
            None => {
                if table.live == 0 {
                    self.quiet_since.fetch_max(time, SeqCst);
                }
                table.live += 1;
                table.map.insert(tag, pending);
                return Ok(());
            }
        };
        drop(table);
        // `pending` was built with one.
        let done = pending.done.take().unwrap_or_else(|| Box::new(|_| {}));
        Err((done, error))
    }

    fn send_request(
        &self,
        tag: Tag,
        meta_len: u16,
        meta: &[u8],
        deadline_ms: u32,
        body: &[u8],
        request: &Request<'_>,
    ) -> Result<(), SendError> {
        let class = if matches!(request, Request::Ping) { Class::Control } else { Class::Request };
        let secret = matches!(request, Request::SetSecrets);
        let header = |kind, flags, meta_len, data: &[u8]| Header {
            kind,
            flags,
            meta_len,
            data_len: data.len() as u32,
            seq: 0,
            deadline_ms,
            tag,
        };
        if body.len() <= MAX_DATA {
            let frame = Frame { header: header(Kind::Request, 0, meta_len, body), meta, data: body, secret };
            return self.send(&[frame], class);
        }
        let mut chunks = body.chunks(MAX_DATA).peekable();
        let mut frames = Vec::with_capacity(body.len() / MAX_DATA + 1);
        while let Some(data) = chunks.next() {
            let flags = if chunks.peek().is_some() { FLAG_MORE } else { 0 };
            frames.push(if frames.is_empty() {
                Frame { header: header(Kind::Request, flags, meta_len, data), meta, data, secret }
            } else {
                Frame { header: header(Kind::Body, flags, 0, data), meta: &[], data, secret }
            });
        }
        self.send(&frames, class)
    }

    pub(super) fn send(&self, frames: &[Frame<'_>], class: Class) -> Result<(), SendError> {
        if self.out.send(&self.socket, frames, class)? == Sent::Waiting {
            self.watch();
        }
        Ok(())
    }

    fn watch(&self) {
        if self.out.needs_watch()
            && let Err(error) = self.timer.watch(self)
        {
            self.break_off(LinkError::Lost(error.to_string().into()));
        }
    }

    /// Sends a frame that no request waits for. When not even that can be queued, the link is lost.
    fn control<M: serde::Serialize>(&self, kind: Kind, tag: Tag, message: Option<&M>, class: Class) {
        let mut meta = META.take();
        let encoded = message.map_or(Ok(0), |message| encode_meta(message, &mut meta));
        let sent = match encoded {
            Ok(meta_len) => {
                let header = Header { kind, flags: 0, meta_len, data_len: 0, seq: 0, deadline_ms: 0, tag };
                let meta = meta.get(..meta_len as usize).unwrap_or(&[]);
                self.send(&[Frame { header, meta, data: &[], secret: false }], class)
            }
            Err(error) => {
                tracing::error!(link = self.name, %error, "a notice does not fit in a frame");
                Ok(())
            }
        };
        META.set(meta);
        match sent {
            Ok(()) => {}
            Err(SendError::Full) => self.break_off(LinkError::Lost("the agent takes nothing any more".into())),
            Err(SendError::Broken(error)) => self.break_off(LinkError::Lost(error.to_string().into())),
        }
    }

    pub fn send_cancel(&self, tag: Tag) {
        self.control::<()>(Kind::Cancel, tag, None, Class::Ordered);
    }

    pub fn send_credit(&self, tag: Tag, bytes: u64) {
        self.control(Kind::Credit, tag, Some(&machinefs_protocol::message::Credit { bytes }), Class::Control);
    }

    pub fn notice(&self, notice: &Notice) {
        if self.table.lock().closed.is_some() {
            return;
        }
        match notice {
            Notice::Forget(nodes) => self.forget(nodes),
            Notice::Release { .. } | Notice::ReleaseDir { .. } => {
                self.control(Kind::Notice, 0, Some(notice), Class::Ordered);
            }
        }
    }

    fn forget(&self, nodes: &[(u64, u64)]) {
        let (first, full, over) = {
            let mut forgets = self.forgets.lock();
            let first = forgets.is_empty();
            for &(node, count) in nodes {
                let held = forgets.entry(node).or_default();
                *held = held.saturating_add(count);
            }
            (first, forgets.len() >= FORGET_BATCH, forgets.len() > MAX_FORGETS)
        };
        if over {
            self.break_off(LinkError::Lost("the agent takes no forgets".into()));
        } else if full && self.out.queued() == 0 {
            self.flush_forgets();
        } else if first {
            self.arm(now() + FORGET_DELAY);
        }
    }

    /// Sends what was collected, as long as the socket takes it. Gives when to try again.
    pub fn flush_forgets(&self) -> Micros {
        loop {
            let batch: Vec<(u64, u64)> = {
                let mut forgets = self.forgets.lock();
                if forgets.is_empty() {
                    return NEVER;
                }
                if self.out.queued() > 0 {
                    return now() + 20 * FORGET_DELAY;
                }
                if forgets.len() <= FORGET_BATCH {
                    let all = forgets.drain().collect();
                    forgets.shrink_to(64);
                    all
                } else {
                    let nodes: Vec<u64> = forgets.keys().take(FORGET_BATCH).copied().collect();
                    nodes.into_iter().filter_map(|node| forgets.remove_entry(&node)).collect()
                }
            };
            self.control(Kind::Notice, 0, Some(&Notice::Forget(batch)), Class::Control);
        }
    }

    /// The socket takes more (called by the poller).
    pub fn flush(&self) {
        match self.out.flush(&self.socket) {
            Ok(Sent::Done) => {}
            Ok(Sent::Waiting) => self.watch(),
            Err(SendError::Broken(error)) => self.break_off(LinkError::Lost(error.to_string().into())),
            Err(SendError::Full) => {}
        }
    }

    // --- ending requests -------------------------------------------------------------------------------------------

    /// Ends a request early. `unsent`: it never left. Else the agent is told, and its answer is waited for as a debt.
    fn end(&self, tag: Tag, error: LinkError, unsent: bool) {
        let unsent = unsent || self.out.withdraw(tag);
        let done = {
            let mut table = self.table.lock();
            let Some(pending) = table.map.get_mut(&tag) else { return };
            let Some(done) = pending.done.take() else { return };
            table.live -= 1;
            if unsent {
                table.map.remove(&tag);
            }
            done
        };
        if !unsent {
            self.send_cancel(tag);
        }
        done(Err(error));
    }

    /// Whoever asked has been interrupted; see [`Interrupt`].
    pub fn cancel(&self, tag: Tag) {
        let interrupt = {
            let mut table = self.table.lock();
            let Some(pending) = table.map.get_mut(&tag) else { return };
            if pending.done.is_none() || pending.look_at != NEVER {
                return;
            }
            let wait = if matches!(pending.interrupt, Interrupt::Change { .. }) { 0 } else { GRACE };
            pending.look_at = now() + wait;
            self.arm(pending.look_at);
            pending.interrupt
        };
        match interrupt {
            Interrupt::Change { .. } => {}
            Interrupt::Query | Interrupt::Wait if self.out.withdraw(tag) => self.end(tag, LinkError::Interrupted, true),
            Interrupt::Query => {}
            Interrupt::Wait => self.send_cancel(tag),
        }
    }

    /// The bounds for the answer to a request, if that tag is waited for.
    pub fn expected(&self, tag: Tag) -> Option<(Expect, usize)> {
        self.table.lock().map.get(&tag).map(|pending| (pending.expect, pending.limit))
    }

    /// The agent's answer is complete. `false`: nothing was asked under that tag.
    pub fn finish(self: &Arc<Self>, tag: Tag, result: Result<Response, LinkError>) -> bool {
        let pending = {
            let mut table = self.table.lock();
            let Some(pending) = table.map.remove(&tag) else { return false };
            table.live -= usize::from(pending.done.is_some());
            pending
        };
        match (pending.done, result) {
            (Some(done), result) => done(result),
            (None, Ok(response)) => self.give_back(&response, pending.unlock),
            (None, Err(_)) => {}
        }
        true
    }

    /// The agent did what it may not. Too often, and the session ends.
    pub fn lie(&self, what: &str) {
        let lies = self.lies.fetch_add(1, SeqCst).saturating_add(1);
        if lies.is_power_of_two() {
            tracing::warn!(link = self.name, lies, "lying agent: {what}");
        }
        if lies >= MAX_LIES {
            self.fail(LinkError::Lie("too often".into()));
        }
    }

    /// The link cannot go on: its reader ends it, so that no thread of somebody else's has to.
    pub(super) fn break_off(&self, reason: LinkError) {
        self.broken.lock().get_or_insert(reason);
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    /// Ends the link: all that is pending fails now.
    pub fn fail(&self, reason: LinkError) {
        let reason = self.broken.lock().take().unwrap_or(reason);
        let pending = {
            let mut table = self.table.lock();
            if table.closed.is_some() {
                return;
            }
            table.closed = Some(reason.clone());
            table.live = 0;
            std::mem::take(&mut table.map)
        };
        if !matches!(reason, LinkError::Closed) {
            tracing::warn!(link = self.name, %reason, "link lost");
        }
        let _ = self.socket.shutdown(Shutdown::Both);
        self.timer.remove(self);
        self.out.clear();
        *self.forgets.lock() = HashMap::new();
        for done in pending.into_values().filter_map(|pending| pending.done) {
            done(Err(reason.clone()));
        }
        let sinks = self.streams.lock().drain();
        for sink in sinks {
            sink.lost();
        }
        let sinks = self.duplexes.lock().drain();
        for sink in sinks {
            sink.ended(Some(reason.clone()));
        }
        let events = self.events.lock().take();
        if let Some(events) = events {
            events.lost(&reason);
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.timer.remove(self);
    }
}

/// Where the tags of a link begin. The agent knows the input of a job by the tag of the request that started it, for as
/// long as the session lasts; a session outlives its links, so that two of them must not use the same tags.
fn first_tag() -> Tag {
    // Each `RandomState` has other keys. Half of the numbers, so that no link comes to the end of them.
    RandomState::new().hash_one(now()) >> 1 | 1
}

pub(super) fn micros(duration: Duration) -> Micros {
    duration.as_micros().min(u128::from(NEVER - 1)) as Micros
}
