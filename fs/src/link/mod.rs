//! The host's end of the stream to the agent in a machine.
//!
//! A request is encoded and written on the thread that asks; its answer is decoded on the link's one reader thread,
//! which calls `done` there. So a file operation goes from the thread that read it from /dev/fuse to the agent, and
//! from the reader thread back to /dev/fuse. Nothing here blocks whoever asks: what the socket does not take waits
//! in a bounded queue that a poller empties (one thread for all links, which also keeps the deadlines).
//!
//! The agent is not trusted: what it sends is checked against what was asked, and no answer is waited for longer
//! than its deadline. A request that ends early is remembered until the agent answers it, so that what the late
//! answer would have left open in the guest is given back.

mod duplex;
mod error;
mod expect;
mod handshake;
pub(crate) mod killed;
mod out;
mod reader;
mod shared;
mod stream;
mod timer;

pub use duplex::DuplexSink;
pub use error::LinkError;

use machinefs_protocol::message::{Event, Hello, Notice, Reply, Request};
use rustix::net::sockopt::{set_socket_send_buffer_size, set_socket_send_buffer_size_force};
use shared::Shared;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Number of a request or stream of one link.
pub type Tag = u64;

/// What becomes of a request: called exactly once, on the link's reader thread, on the timer's thread, or on the
/// thread that asks. Must not block.
pub type Done = Box<dyn FnOnce(Result<Response, LinkError>) + Send>;

/// Stack of a reader thread, in bytes (address space; what is used of it is a few KiB).
const READER_STACK: usize = 256 * 1024;
/// Bytes the kernel may hold for an agent that is busy, so that whole writes leave in one call.
const SEND_BUFFER: usize = 2 * 1024 * 1024;

/// The agent's answer.
#[derive(Debug)]
pub struct Response {
    /// The message; always of the variant that the request asks for.
    pub reply: Reply,
    /// The bytes; never more than were asked for.
    pub body: Vec<u8>,
}

/// What an interrupt ([`Link::cancel`]) does to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interrupt {
    /// It changes nothing and is quick: the agent has 50 ms more to answer it, then it ends. (A harmless signal must
    /// not make a stat fail that would have been answered.)
    Query,
    /// It waits for something (a lock): the agent is asked to give up at once, and has 50 ms to say how it ended.
    Wait,
    /// It changes something: it ends early only when the caller is being killed, because nobody could tell else
    /// whether the change was made.
    Change {
        /// The calling thread; 0 when it is not known.
        pid: u32,
    },
}

/// How a request is sent.
#[derive(Clone, Copy, Debug)]
pub struct RequestOptions {
    /// After this time it fails with [`LinkError::TimedOut`]; `None`: never.
    pub deadline: Option<Duration>,
    /// What an interrupt does.
    pub interrupt: Interrupt,
    /// For a lock: give it up again if it is granted after the request has ended.
    pub unlock_if_late: bool,
}

impl RequestOptions {
    /// With a deadline.
    pub fn within(deadline: Duration) -> RequestOptions {
        RequestOptions { deadline: Some(deadline), ..RequestOptions::forever() }
    }

    /// Without a deadline.
    pub fn forever() -> RequestOptions {
        RequestOptions { deadline: None, interrupt: Interrupt::Wait, unlock_if_late: false }
    }

    /// The same with another interrupt policy.
    pub fn interrupt(self, interrupt: Interrupt) -> RequestOptions {
        RequestOptions { interrupt, ..self }
    }
}

impl From<Option<Duration>> for RequestOptions {
    /// With that deadline, or none.
    fn from(deadline: Option<Duration>) -> RequestOptions {
        RequestOptions { deadline, ..RequestOptions::forever() }
    }
}

/// Hears what the agent says unasked.
pub trait LinkEvents: Send + Sync {
    /// An event; called on the link's reader thread, in the order of the stream.
    fn event(&self, event: Event);

    /// The link is no more ([`LinkError::Closed`] after [`Link::close`]). Called once, after all that was pending has
    /// failed.
    fn lost(&self, reason: &LinkError);
}

/// Takes a job's output.
pub trait StreamSink: Send + Sync {
    /// Whole records of the job's log (see [`machinefs_protocol::job`]), in order; called on the link's reader thread.
    /// The agent may send more when this has returned.
    ///
    /// # Errors
    /// Any error ends the stream; [`StreamSink::lost`] is then not called.
    fn records(&self, records: &[u8]) -> Result<(), Box<dyn std::error::Error + Send + Sync>>;

    /// No more will come: the agent refused the stream, or the link is lost. Called at most once. (A stream that came
    /// to its end ends with [`Event::JobEnded`].)
    fn lost(&self);
}

/// What a link needs to know.
pub struct LinkOptions {
    /// The session: made anew for each view of the machine, see [`Hello::session`].
    pub session: u128,
    /// For logs.
    pub name: String,
    /// How long one operation may take; also the silence after which the agent counts as unresponsive, and the
    /// handshake's limit.
    pub op_deadline: Duration,
    /// Hears events and the end.
    pub events: Arc<dyn LinkEvents>,
}

impl LinkOptions {
    /// The usual deadline: 5 s.
    pub fn new(session: u128, name: impl Into<String>, events: Arc<dyn LinkEvents>) -> LinkOptions {
        LinkOptions { session, name: name.into(), op_deadline: Duration::from_secs(5), events }
    }
}

/// A link to an agent. Dropping it closes it.
pub struct Link {
    shared: Arc<Shared>,
    hello: Hello,
    op_deadline: Duration,
}

impl Link {
    /// Makes a link of a fresh stream: exchanges the versions, and starts the reader. Blocks, at most for
    /// `op_deadline`.
    ///
    /// # Errors
    /// [`LinkError::Version`] when the agent is too old or too new, [`LinkError::TimedOut`], [`LinkError::Lost`],
    /// [`LinkError::Lie`].
    pub fn connect(stream: UnixStream, options: LinkOptions) -> Result<Arc<Link>, LinkError> {
        let lost = |error: std::io::Error| LinkError::Lost(error.to_string().into());
        stream.set_nonblocking(false).map_err(lost)?;
        let op_deadline = options.op_deadline;
        let hello = handshake::handshake(&stream, options.session, op_deadline)?;
        // Without CAP_NET_ADMIN the kernel's limit (net.core.wmem_max) holds: slower, not wrong.
        if set_socket_send_buffer_size_force(&stream, SEND_BUFFER).is_err() {
            let _ = set_socket_send_buffer_size(&stream, SEND_BUFFER);
        }
        let timer = timer::timer().map_err(lost)?;
        let shared = Arc::new(Shared::new(timer, stream, options));
        timer.add(&shared);
        let reader = Arc::clone(&shared);
        let name: String = format!("link {}", shared.name).chars().filter(|c| *c != '\0').take(15).collect();
        std::thread::Builder::new()
            .name(name)
            .stack_size(READER_STACK)
            .spawn(move || reader::run(&reader))
            .map_err(lost)?;
        Ok(Arc::new(Link { shared, hello, op_deadline }))
    }

    /// What the agent said of itself. Its build is cleaned for logs.
    pub fn hello(&self) -> &Hello {
        &self.hello
    }

    /// How long one operation may take.
    pub fn op_deadline(&self) -> Duration {
        self.op_deadline
    }

    /// Sends a request; never blocks. A request that cannot be sent fails before this returns.
    pub fn request(&self, request: &Request<'_>, body: &[u8], options: impl Into<RequestOptions>, done: Done) -> Tag {
        let tag = self.next_tag();
        self.request_tagged(tag, request, body, options.into(), done);
        tag
    }

    /// A number for [`Link::request_tagged`].
    pub fn next_tag(&self) -> Tag {
        self.shared.next_tag()
    }

    /// As [`Link::request`], under a number that was taken before, so that whoever may cancel knows it beforehand. A
    /// cancel that comes before this call does nothing.
    pub fn request_tagged(&self, tag: Tag, request: &Request<'_>, body: &[u8], options: RequestOptions, done: Done) {
        if let Request::JobForget { job } = request {
            self.shared.streams.lock().forget_job(*job);
        }
        if matches!(request, Request::JobStart { .. }) {
            // A job may need the space of files that were deleted before it.
            self.shared.flush_forgets();
        }
        self.shared.request(tag, request, body, options, done);
    }

    /// Whoever asked has been interrupted: the request ends early, if its [`Interrupt`] allows it.
    pub fn cancel(&self, tag: Tag) {
        self.shared.cancel(tag);
    }

    /// Says something that is not answered. Forgets are collected for some milliseconds.
    pub fn notice(&self, notice: &Notice) {
        self.shared.notice(notice);
    }

    /// Streams a job's log from `offset` on to the sink.
    pub fn attach(&self, job: u64, offset: u64, sink: Arc<dyn StreamSink>) -> Tag {
        let tag = self.next_tag();
        self.shared.streams.lock().insert(tag, job, offset, sink);
        let weak = Arc::downgrade(&self.shared);
        let done = Box::new(move |result: Result<Response, LinkError>| {
            let Some(shared) = weak.upgrade() else { return };
            let Err(error) = result else { return };
            // Unless it was refused, its data may still come.
            let refused = matches!(error, LinkError::Remote { .. });
            let sink = shared.streams.lock().end(tag, refused);
            if let Some(sink) = sink {
                tracing::warn!(link = shared.name, job, %error, "no stream");
                sink.lost();
            }
        });
        let options = RequestOptions::within(self.op_deadline);
        self.request_tagged(tag, &Request::JobAttach { job, offset }, &[], options, done);
        tag
    }

    /// Ends a stream that was attached; its sink hears no more of it (but for a call that is under way).
    pub fn detach(&self, tag: Tag) {
        if self.shared.streams.lock().end(tag, false).is_some() {
            self.shared.send_cancel(tag);
        }
    }

    /// For asynchronous callers. Dropping the future cancels the request.
    ///
    /// # Errors
    /// Those of the request.
    pub async fn call(
        &self,
        request: &Request<'_>,
        body: &[u8],
        options: impl Into<RequestOptions>,
    ) -> Result<Response, LinkError> {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        let done = Box::new(move |result| {
            // Nobody waits any more: the answer is dropped.
            let _ = sender.send(result);
        });
        let tag = self.request(request, body, options, done);
        let mut guard = CancelOnDrop { shared: &self.shared, tag, armed: true };
        let result = receiver.await.unwrap_or(Err(LinkError::Closed));
        guard.armed = false;
        result
    }

    /// One round trip: how long it took.
    ///
    /// # Errors
    /// Those of the request.
    pub async fn ping(&self) -> Result<Duration, LinkError> {
        let start = Instant::now();
        self.call(&Request::Ping, &[], RequestOptions::within(self.op_deadline)).await?;
        Ok(start.elapsed())
    }

    /// `false` while the agent is silent, and after the link was lost.
    pub fn is_responsive(&self) -> bool {
        self.shared.is_responsive()
    }

    /// Requests that somebody waits for, and requests given up that the agent has not answered yet.
    pub fn pending(&self) -> (usize, usize) {
        self.shared.pending()
    }

    /// Bytes that wait for the agent to take them.
    pub fn queued(&self) -> usize {
        self.shared.queued()
    }

    /// Counts a lie that only whoever asked could see (a name with a slash …). Too many end the session.
    pub fn lie(&self, what: &str) {
        self.shared.lie(what);
    }

    /// Ends the link: all that is pending fails.
    pub fn close(&self) {
        self.shared.fail(LinkError::Closed);
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.close();
    }
}

struct CancelOnDrop<'a> {
    shared: &'a Arc<Shared>,
    tag: Tag,
    armed: bool,
}

impl Drop for CancelOnDrop<'_> {
    fn drop(&mut self) {
        if self.armed {
            self.shared.cancel(self.tag);
        }
    }
}
