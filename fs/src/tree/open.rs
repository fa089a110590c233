//! Open control files: the table of handles, and reading, writing, closing and polling by them.

use super::content::Content;
use super::ctl::CtlFile;
use super::exec::ExecFile;
use super::guest::GuestFiles;
use super::job_ctl;
use super::job_input::InputFile;
use super::logs::LogRef;
use super::ops::{Answer, Caller, NodeId, Opened, PollWaker, Ready, Responder};
use super::pending::{self, Outcome, Registrations, Source, Watched, register_poller};
use super::put::PutFile;
use super::stream::{Once, Stream, Taken, exit_text};
use super::text::{Owner, Text, slice};
use super::value::ValueFile;
use crate::errno::Errno;
use crate::machine::changes::Look;
use crate::machine::job::{CommandReader, Job};
use crate::machine::output::{Output, OutputReader};
use dashmap::DashMap;
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Control files that one user may have open.
const MAX_OPEN: usize = 16 * 1024;

const READABLE: u32 = (libc::POLLIN | libc::POLLRDNORM) as u32;
const WRITABLE: u32 = (libc::POLLOUT | libc::POLLWRNORM) as u32;

/// What an open file is.
pub enum Body {
    /// A text as it was at open.
    Text(Vec<u8>),
    /// A log, as it is when it is read.
    Log(LogRef),
    /// Output of a job that had ended at open.
    Finished(Arc<Job>, Output, Mutex<OutputReader>),
    /// What blocks.
    Stream(Mutex<Stream>),
    /// Commands.
    Ctl(Arc<CtlFile>),
    /// A value.
    Value(ValueFile),
    /// A value that is in force when it is written.
    Put(Arc<PutFile>),
    /// What differs from a machine's image.
    Changes(Look),
    /// Scripts.
    Exec(Arc<ExecFile>),
    /// The text of a job.
    Command(CommandReader),
    /// What a job reads.
    Input(InputFile),
    /// A listing of `files`: a handle of the guest's.
    GuestDir(Arc<GuestFiles>, u64),
}

/// An open control file.
pub struct OpenFile {
    node: NodeId,
    /// What it is.
    pub body: Body,
    poller: Mutex<Registrations>,
    _seat: Seat,
}

/// What a user has open.
#[derive(Default)]
struct Usage {
    open: AtomicUsize,
    pending: Arc<AtomicUsize>,
}

/// One open file in a user's count.
pub struct Seat(Arc<Usage>);

impl Seat {
    /// A text of this user's.
    pub fn text(&self) -> Text {
        Text::new(self.0.pending.clone())
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The open control files.
#[derive(Default)]
pub struct OpenTable {
    files: DashMap<u64, Arc<OpenFile>>,
    last: AtomicU64,
    users: DashMap<u32, Arc<Usage>>,
}

impl OpenTable {
    /// Counts an open file.
    ///
    /// # Errors
    /// EMFILE when the user has too many.
    pub fn seat(&self, caller: Caller) -> Result<Seat, Errno> {
        let usage = self.users.entry(caller.uid).or_default().value().clone();
        let before = usage.open.fetch_add(1, Ordering::Relaxed);
        // Counted already: dropping the seat takes it back.
        let seat = Seat(usage);
        if before < MAX_OPEN { Ok(seat) } else { Err(Errno::EMFILE) }
    }

    /// Keeps an open file; the handle is never used again.
    pub fn insert(&self, node: NodeId, body: Body, seat: Seat) -> u64 {
        let handle = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        let file = OpenFile { node, body, poller: Mutex::default(), _seat: seat };
        self.files.insert(handle, Arc::new(file));
        handle
    }

    /// The open file of a handle on a node.
    ///
    /// # Errors
    /// EBADF when there is none.
    pub fn get(&self, node: NodeId, handle: u64) -> Result<Arc<OpenFile>, Errno> {
        let file = self.files.get(&handle).map(|file| file.value().clone());
        file.filter(|file| file.node == node).ok_or(Errno::EBADF)
    }

    /// Takes the open file out of the table.
    pub fn remove(&self, node: NodeId, handle: u64) -> Option<Arc<OpenFile>> {
        self.files.remove_if(&handle, |_, file| file.node == node).map(|(_, file)| file)
    }
}

/// What opening a file for reading makes of its content, and whether it is a stream. `None`: it is not for this
/// function, since it takes writes or an agent's answer, or its file cannot be opened.
pub fn reading(content: Content) -> Option<(Body, bool)> {
    let now_or = |now: Taken, stream: Stream| match now {
        Some(Ok(text)) => (Body::Text(text), false),
        _ => (Body::Stream(Mutex::new(stream)), true),
    };
    Some(match content {
        Content::Command(_, job) => (Body::Command(job.command().ok()?), false),
        Content::JobCtl(..) => (Body::Text(job_ctl::usage().into_bytes()), false),
        Content::Text(text) | Content::RootCtl(text) | Content::Ctl(_, text) => (Body::Text(text), false),
        Content::Log(log) => (Body::Log(log), false),
        // A job that has ended has a true size and bytes at any offset: lseek and splice work.
        Content::Output(job, which) if job.is_done() => {
            let reader = Mutex::new(job.reader(which));
            (Body::Finished(job, which, reader), false)
        }
        Content::Output(job, which) => (Body::Stream(Mutex::new(Stream::output(&job, which))), true),
        Content::Exit(job) => now_or(exit_text(&job), Stream::Exit(job, Once::default())),
        Content::State(machine, wanted) => {
            now_or(wanted.text(machine.state()), Stream::State(machine, wanted, Once::default()))
        }
        Content::Follow(log) => (Body::Stream(Mutex::new(Stream::follow(log))), true),
        Content::Exec(_) => (Body::Text(Vec::new()), false),
        Content::Value(setting) => (Body::Text(setting.text()), false),
        Content::Health(_) | Content::Usage(_) | Content::Changes(_) | Content::Input(..) => return None,
    })
}

/// The answer to an open. Everything goes past the page cache; what hangs on closing is only what was written.
pub fn opened(handle: u64, stream: bool, writes: bool) -> Opened {
    Opened { handle, direct_io: true, stream, no_flush: !writes, ..Opened::default() }
}

/// A read that may wait.
struct StreamRead {
    file: Arc<OpenFile>,
    max: usize,
}

impl Source for StreamRead {
    fn attempt(&self) -> Option<Outcome> {
        let taken = match &self.file.body {
            Body::Stream(stream) => stream.lock().take(self.max),
            Body::Exec(exec) => exec.take(self.max),
            _ => Some(Err(Errno::EBADF)),
        };
        taken.map(|taken| taken.map(Answer::Data))
    }

    fn watches(&self) -> Vec<Watched> {
        self.file.watches()
    }
}

impl OpenFile {
    fn watches(&self) -> Vec<Watched> {
        match &self.body {
            Body::Stream(stream) => stream.lock().watches(),
            Body::Exec(exec) => exec.watches(),
            Body::Input(input) => input.watches(),
            _ => Vec::new(),
        }
    }

    /// Reads. `flags` are those of the open file now.
    pub fn read(self: Arc<Self>, offset: u64, max: usize, flags: u32, owner: Owner, responder: Responder) {
        let data = match &self.body {
            Body::Text(text) => Ok(slice(text, offset, max).to_vec()),
            Body::Log(log) => Ok(log.log().read_at(offset, max)),
            Body::Finished(_, _, reader) => reader.lock().read_at(offset, max).map_err(|error| error.errno()),
            Body::Ctl(ctl) => Ok(ctl.read(offset, max)),
            Body::Command(command) => command.read_at(offset, max).map_err(|error| error.errno()),
            // A read ends the text. Why it was refused, if it is, is what is read.
            Body::Value(value) => {
                value.end();
                Ok(value.read(offset, max))
            }
            Body::Put(value) => {
                value.end();
                Ok(value.read(offset, max))
            }
            Body::Changes(look) => look.read_at(offset, max).map_err(|error| error.errno()),
            // Splice and sendfile come through the page cache, without an owner: they would keep and repeat what
            // they read. With EINVAL their callers fall back to read(2).
            Body::Stream(_) | Body::Exec(_) if owner.is_none() => Err(Errno::EINVAL),
            Body::Stream(_) => return self.wait_to_read(max, flags, responder),
            Body::Exec(exec) => {
                exec.end();
                match exec.take_reason(max) {
                    Some(reason) => Ok(reason),
                    None => return self.wait_to_read(max, flags, responder),
                }
            }
            Body::GuestDir(..) => Err(Errno::EISDIR),
            Body::Input(_) => Err(Errno::EBADF),
        };
        responder.respond(data.map(Answer::Data));
    }

    fn wait_to_read(self: Arc<Self>, max: usize, flags: u32, responder: Responder) {
        if max == 0 {
            return responder.respond(Ok(Answer::Data(Vec::new())));
        }
        let nonblocking = flags & libc::O_NONBLOCK as u32 != 0;
        pending::answer(StreamRead { file: self, max }, responder, nonblocking);
    }

    /// Writes. There are no offsets. `flags` are those of the open file now.
    pub fn write(&self, caller: Caller, data: &[u8], flags: u32, owner: Owner, responder: Responder) {
        let written = match &self.body {
            Body::Ctl(ctl) => return ctl.write(caller, owner, data, responder),
            Body::Value(value) => value.write(caller, owner, data),
            Body::Put(value) => return value.write(caller, owner, data, responder),
            Body::Exec(exec) => return exec.write(caller, owner, data, responder),
            Body::Input(input) => return input.write(data, flags & libc::O_NONBLOCK as u32 != 0, responder),
            _ => Err(Errno::EBADF),
        };
        responder.respond(written.map(|()| Answer::Count(data.len() as u32)));
    }

    /// A descriptor was closed by the process with this lock owner.
    pub fn flush(&self, owner: u64, responder: Responder) {
        let flushed = match &self.body {
            Body::Ctl(ctl) => return ctl.flush(Some(owner), responder),
            Body::Value(value) => return value.flush(Some(owner), responder),
            Body::Put(value) => return value.flush(Some(owner), responder),
            Body::Exec(exec) => return exec.flush(Some(owner), responder),
            _ => Ok(()),
        };
        responder.respond(flushed.map(|()| Answer::Ok));
    }

    /// What was written is complete: fsync, or the last descriptor is gone.
    pub fn finish(&self, responder: Responder) {
        let finished = match &self.body {
            Body::Ctl(ctl) => return ctl.finish(responder),
            Body::Value(value) => return value.finish(responder),
            Body::Put(value) => return value.finish(responder),
            Body::Exec(exec) => return exec.finish(responder),
            _ => Ok(()),
        };
        responder.respond(finished.map(|()| Answer::Ok));
    }

    /// What is ready; with a waker, it is woken at the next change.
    pub fn poll(&self, waker: Option<Arc<dyn PollWaker>>) -> Ready {
        if let Some(waker) = waker {
            // Registered before the look, and in place of the last one: a poller asks again after each wake.
            let registrations = register_poller(self.watches(), waker);
            let last = std::mem::replace(&mut *self.poller.lock(), registrations);
            drop(last);
        }
        let readable = |ready: bool| if ready { READABLE } else { 0 };
        Ready(match &self.body {
            Body::Stream(stream) => readable(stream.lock().ready()),
            Body::Exec(exec) => WRITABLE | readable(exec.ready()),
            Body::Input(input) if input.ready() => WRITABLE,
            Body::Input(_) => 0,
            _ => READABLE | WRITABLE,
        })
    }

    /// Size, for SEEK_DATA and SEEK_HOLE.
    pub fn size(&self) -> u64 {
        match &self.body {
            Body::Text(text) => text.len() as u64,
            Body::Log(log) => log.log().len(),
            Body::Command(command) => command.size(),
            Body::Changes(look) => look.size(),
            Body::Finished(job, which, _) => job.output_len(*which),
            _ => 0,
        }
    }
}
