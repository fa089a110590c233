//! The thread that reads what the agent sends, checks it, and ends the requests it answers.

use super::error::LinkError;
use super::shared::Shared;
use super::stream::{Incoming, check_records};
use super::{Response, Tag};
use machinefs_protocol::frame::{FLAG_MORE, HEADER_LEN, Header, Kind, decode_meta};
use machinefs_protocol::message::{Event, Failure, Reply};
use std::collections::HashMap;
use std::io;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// Bytes read ahead: enough for a handful of small replies in one system call.
const BUFFER: usize = 16 * 1024;
/// What a reply with more to come may take before its bytes are there.
const AHEAD: usize = 1024 * 1024;
/// Bytes of replies that may have begun and not ended. An agent has some 64 threads, which write at most 1 MiB each.
const MAX_UNFINISHED: usize = 96 * 1024 * 1024;
/// Scratch space kept between frames.
const KEEP: usize = 16 * 1024;

/// Reads until the link ends.
pub(super) fn run(link: &Arc<Shared>) {
    // A panic of whoever gets an answer is a defect; the link must not stay without anybody who reads it.
    if catch_unwind(AssertUnwindSafe(|| read_all(link))).is_err() {
        tracing::error!(link = link.name, "defect: panic in the reader of a link");
        link.fail(LinkError::Lost("its reader has failed".into()));
    }
}

fn read_all(link: &Arc<Shared>) {
    let mut session = Session {
        link,
        input: Input { buffer: vec![0; BUFFER], start: 0, end: 0 },
        seq: 1,
        meta: Vec::new(),
        scratch: Vec::new(),
        unfinished: HashMap::new(),
        unfinished_bytes: 0,
    };
    loop {
        if let Err(error) = session.frame() {
            return link.fail(error);
        }
    }
}

/// A reply whose body is not complete.
struct Unfinished {
    reply: Reply,
    body: Vec<u8>,
    limit: usize,
}

struct Session<'a> {
    link: &'a Arc<Shared>,
    input: Input,
    seq: u32,
    meta: Vec<u8>,
    scratch: Vec<u8>,
    unfinished: HashMap<Tag, Unfinished>,
    /// Bytes of their bodies.
    unfinished_bytes: usize,
}

impl Session<'_> {
    fn frame(&mut self) -> Result<(), LinkError> {
        let bytes = self.input.header(self.link)?;
        let header = Header::decode(&bytes).map_err(|error| lie(&error))?;
        if header.seq != self.seq {
            return Err(lie(&format_args!("frame {} where {} was due", header.seq, self.seq)));
        }
        self.seq = self.seq.wrapping_add(1);
        self.meta.clear();
        self.meta.shrink_to(KEEP);
        self.scratch.clear();
        self.scratch.shrink_to(KEEP);
        self.input.read(self.link, &mut self.meta, header.meta_len.into())?;
        match header.kind {
            Kind::Reply => self.reply(&header),
            Kind::Error => self.failure(&header),
            Kind::Body => self.body(&header),
            Kind::Data => self.data(&header),
            Kind::Event => self.event(&header),
            Kind::Credit => {
                self.link.lie("credit for no stream");
                self.skip(header.data_len as usize)
            }
            kind @ (Kind::Hello | Kind::Request | Kind::Cancel | Kind::Notice) => {
                Err(lie(&format_args!("a frame of kind {kind:?}")))
            }
        }
    }

    fn reply(&mut self, header: &Header) -> Result<(), LinkError> {
        let reply: Reply = decode_meta(&self.meta).map_err(|error| lie(&error))?;
        let (tag, len, more) = (header.tag, header.data_len as usize, header.flags & FLAG_MORE != 0);
        if self.unfinished.contains_key(&tag) {
            return Err(lie(&"a second reply in the midst of the first"));
        }
        let Some((expect, limit)) = self.link.expected(tag) else { return self.stray(len, more) };
        if !expect.accepts(&reply) {
            let error = lie(&format_args!("a reply that is not {expect:?}"));
            if more {
                return Err(error);
            }
            self.link.lie(&error.to_string());
            self.skip(len)?;
            self.link.finish(tag, Err(error));
            return Ok(());
        }
        if len > limit || (more && len == 0) {
            return Err(lie(&format_args!("a body over the {limit} bytes that were asked for")));
        }
        let mut body = Vec::with_capacity(if more { limit.min(AHEAD).max(len) } else { len });
        self.input.read(self.link, &mut body, len)?;
        if more {
            self.unfinished.insert(tag, Unfinished { reply, body, limit });
            self.grown(len)?;
        } else {
            self.complete(tag, Response { reply, body });
        }
        Ok(())
    }

    fn body(&mut self, header: &Header) -> Result<(), LinkError> {
        let (tag, len, more) = (header.tag, header.data_len as usize, header.flags & FLAG_MORE != 0);
        let Some(unfinished) = self.unfinished.get_mut(&tag) else {
            return Err(lie(&"a body without a reply"));
        };
        if header.meta_len != 0 || unfinished.body.len() + len > unfinished.limit || (more && len == 0) {
            return Err(lie(&format_args!("a body over the {} bytes that were asked for", unfinished.limit)));
        }
        self.input.read(self.link, &mut unfinished.body, len)?;
        if more {
            return self.grown(len);
        }
        if let Some(Unfinished { reply, body, .. }) = self.unfinished.remove(&tag) {
            self.unfinished_bytes = self.unfinished_bytes.saturating_sub(body.len() - len);
            self.complete(tag, Response { reply, body });
        }
        Ok(())
    }

    /// The bodies that are not complete have `len` bytes more.
    fn grown(&mut self, len: usize) -> Result<(), LinkError> {
        self.unfinished_bytes += len;
        if self.unfinished_bytes > MAX_UNFINISHED { Err(lie(&"too many replies without an end")) } else { Ok(()) }
    }

    fn failure(&mut self, header: &Header) -> Result<(), LinkError> {
        let failure: Failure = decode_meta(&self.meta).map_err(|error| lie(&error))?;
        if header.data_len != 0 || header.flags & FLAG_MORE != 0 || self.unfinished.contains_key(&header.tag) {
            return Err(lie(&"a failure with a body"));
        }
        let error = LinkError::remote(failure.errno, &failure.message);
        if let LinkError::Lie(what) = &error {
            self.link.lie(what);
        }
        if self.link.finish(header.tag, Err(error.clone())) {
            return Ok(());
        }
        // A stream whose log cannot be read any more ends so.
        let sink = self.link.streams.lock().end(header.tag, true);
        match sink {
            Some(sink) => {
                tracing::warn!(link = self.link.name, %error, "a stream broke off");
                sink.lost();
            }
            None => self.link.lie("a failure of nothing that was asked"),
        }
        Ok(())
    }

    fn complete(&mut self, tag: Tag, response: Response) {
        if !self.link.finish(tag, Ok(response)) {
            self.link.lie("a reply to nothing that was asked");
        }
    }

    fn stray(&mut self, len: usize, more: bool) -> Result<(), LinkError> {
        if more {
            return Err(lie(&"a long reply to nothing that was asked"));
        }
        self.link.lie("a reply to nothing that was asked");
        self.skip(len)
    }

    fn data(&mut self, header: &Header) -> Result<(), LinkError> {
        let (tag, len) = (header.tag, header.data_len as usize);
        if header.meta_len != 0 {
            return Err(lie(&"a stream's data with a message"));
        }
        let incoming = self.link.streams.lock().incoming(tag, len as u64);
        let sink = match incoming {
            Incoming::Take(sink) => sink,
            Incoming::Drop => return self.skip(len),
            Incoming::Unknown => {
                self.link.lie("data of no stream");
                return self.skip(len);
            }
            Incoming::Flood => return Err(lie(&"more data on a stream than was granted")),
        };
        self.input.read(self.link, &mut self.scratch, len)?;
        let moved = check_records(&self.scratch)?;
        if let Err(error) = sink.records(&self.scratch) {
            tracing::debug!(link = self.link.name, %error, "a stream is ended");
            if self.link.streams.lock().end(tag, false).is_some() {
                self.link.send_cancel(tag);
            }
            return Ok(());
        }
        let grant = self.link.streams.lock().taken(tag, len as u64, moved);
        if let Some(bytes) = grant {
            self.link.send_credit(tag, bytes);
        }
        Ok(())
    }

    fn event(&mut self, header: &Header) -> Result<(), LinkError> {
        if header.data_len != 0 {
            return Err(lie(&"an event with a body"));
        }
        let event: Event = decode_meta(&self.meta).map_err(|error| lie(&error))?;
        match &event {
            Event::JobEnded { job, end } => self.link.streams.lock().job_ended(*job, end.log_end),
        }
        if let Some(events) = self.link.events() {
            events.event(event);
        }
        Ok(())
    }

    /// Reads and drops.
    fn skip(&mut self, mut len: usize) -> Result<(), LinkError> {
        while len > 0 {
            let now = len.min(KEEP);
            self.scratch.clear();
            self.input.read(self.link, &mut self.scratch, now)?;
            len -= now;
        }
        Ok(())
    }
}

fn lie(what: &dyn std::fmt::Display) -> LinkError {
    LinkError::Lie(what.to_string().into())
}

/// Buffered reading; what is large goes straight to where it belongs.
struct Input {
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

impl Input {
    fn header(&mut self, link: &Shared) -> Result<[u8; HEADER_LEN], LinkError> {
        while self.end - self.start < HEADER_LEN {
            if self.start == self.end {
                (self.start, self.end) = (0, 0);
            } else if self.start > BUFFER - HEADER_LEN {
                self.buffer.copy_within(self.start..self.end, 0);
                (self.start, self.end) = (0, self.end - self.start);
            }
            let space = self.buffer.get_mut(self.end..).unwrap_or(&mut []);
            self.end += receive(link, |socket| rustix::io::read(socket, &mut *space))?;
        }
        let header = self.buffer.get(self.start..).and_then(|bytes| bytes.first_chunk()).copied();
        self.start += HEADER_LEN;
        header.ok_or(LinkError::Closed)
    }

    /// Appends `len` bytes.
    fn read(&mut self, link: &Shared, into: &mut Vec<u8>, len: usize) -> Result<(), LinkError> {
        let ready = self.buffer.get(self.start..self.end).unwrap_or(&[]);
        let ready = ready.get(..len).unwrap_or(ready);
        into.extend_from_slice(ready);
        self.start += ready.len();
        let mut left = len - ready.len();
        into.reserve_exact(left);
        while left > 0 {
            let space = into.spare_capacity_mut();
            let space = space.get_mut(..left).unwrap_or(&mut []);
            let n = receive(link, |socket| rustix::io::read(socket, &mut *space).map(|(filled, _)| filled.len()))?;
            // SAFETY: read(2) has filled the first `n` bytes of the spare capacity, and `n` is at most `left`.
            unsafe { into.set_len(into.len() + n) };
            left -= n;
        }
        Ok(())
    }
}

/// One read that gives at least a byte; the end of the stream is an error.
fn receive(
    link: &Shared,
    mut read: impl FnMut(&UnixStream) -> Result<usize, rustix::io::Errno>,
) -> Result<usize, LinkError> {
    loop {
        match read(&link.socket) {
            Ok(0) => return Err(LinkError::Lost("it ended".into())),
            Ok(n) => {
                link.heard();
                return Ok(n);
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(LinkError::Lost(io::Error::from(error).to_string().into())),
        }
    }
}
