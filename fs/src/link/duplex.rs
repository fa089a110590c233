//! Streams on which the host sends: the input of a job, and connections to ports of the guest.
//!
//! Both sides keep to the credit of the other (see [`machinefs_protocol::job`] and [`machinefs_protocol::port`]). Who
//! sends keeps count of what it may; what it sends beyond that ends the link, on the agent's side.

use super::error::LinkError;
use super::out::{Class, Frame, SendError};
use super::shared::Shared;
use super::{Link, RequestOptions, Tag};
use machinefs_protocol::frame::{Header, Kind, MAX_DATA};
use machinefs_protocol::message::{Reply, Request};
use machinefs_protocol::port;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

/// Streams of this side's giving up whose last frames may still be on the way.
const MAX_DEAD: usize = 4096;

/// The agent tries so long to connect, and a little longer.
const CONNECT_DEADLINE: Duration = Duration::from_secs(15);

/// Hears of a stream. All of it is called on the link's reader thread, and must not block; [`DuplexSink::ended`] also
/// on the thread that asks.
pub trait DuplexSink: Send + Sync {
    /// The agent has taken the stream on.
    fn opened(&self, tag: Tag, reply: &Reply);

    /// Bytes, as they come; none: the agent's direction is at its end.
    fn data(&self, data: &[u8]);

    /// So many more bytes may be sent.
    fn credit(&self, bytes: u64);

    /// Nothing more is heard of it: both directions came to their end (`None`), or it failed. Called once.
    fn ended(&self, error: Option<LinkError>);
}

/// What a stream is to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Far {
    /// A job's input: the agent sends nothing but its end, which is the stream's.
    Input,
    /// A port: the stream ends when both directions have.
    Port,
}

struct Duplex {
    sink: Arc<dyn DuplexSink>,
    far: Far,
    /// Bytes the agent may still send.
    window: u64,
    host_ended: bool,
    agent_ended: bool,
}

/// The streams of a link in both directions.
#[derive(Default)]
pub(super) struct Duplexes {
    map: BTreeMap<Tag, Duplex>,
    /// Given up, newest last.
    dead: VecDeque<Tag>,
}

/// What a frame under a tag means.
pub(super) enum Heard {
    /// For this sink.
    Sink(Arc<dyn DuplexSink>),
    /// The same, and it was the last.
    Last(Arc<dyn DuplexSink>),
    /// For a stream that was given up.
    Dead,
    /// More than was granted.
    Flood,
    /// There is no such stream.
    Unknown,
}

impl Duplexes {
    /// `len` bytes come on the stream; none: its end.
    pub fn incoming(&mut self, tag: Tag, len: u64) -> Heard {
        let Some(duplex) = self.map.get_mut(&tag) else { return self.without(tag) };
        let Some(window) = duplex.window.checked_sub(len).filter(|_| !duplex.agent_ended) else { return Heard::Flood };
        duplex.window = window;
        if len > 0 {
            return Heard::Sink(duplex.sink.clone());
        }
        duplex.agent_ended = true;
        match duplex.far {
            Far::Port if !duplex.host_ended => Heard::Sink(duplex.sink.clone()),
            _ => self.remove(tag).map_or(Heard::Unknown, Heard::Last),
        }
    }

    /// Credit comes for the stream.
    pub fn credit(&self, tag: Tag) -> Heard {
        self.map.get(&tag).map_or_else(|| self.without(tag), |duplex| Heard::Sink(duplex.sink.clone()))
    }

    fn without(&self, tag: Tag) -> Heard {
        if self.dead.contains(&tag) { Heard::Dead } else { Heard::Unknown }
    }

    /// The agent has ended it: nothing more comes.
    pub fn remove(&mut self, tag: Tag) -> Option<Arc<dyn DuplexSink>> {
        self.map.remove(&tag).map(|duplex| duplex.sink)
    }

    /// This side gives it up: something may still come.
    fn give_up(&mut self, tag: Tag) -> Option<Arc<dyn DuplexSink>> {
        let sink = self.remove(tag)?;
        if self.dead.len() >= MAX_DEAD {
            self.dead.pop_front();
        }
        self.dead.push_back(tag);
        Some(sink)
    }

    /// Whether the stream is over with the end of the host's direction.
    fn end_host(&mut self, tag: Tag) -> Option<Arc<dyn DuplexSink>> {
        let duplex = self.map.get_mut(&tag)?;
        duplex.host_ended = true;
        if duplex.far == Far::Port && duplex.agent_ended { self.remove(tag) } else { None }
    }

    /// The link is lost.
    pub fn drain(&mut self) -> Vec<Arc<dyn DuplexSink>> {
        self.dead.clear();
        std::mem::take(&mut self.map).into_values().map(|duplex| duplex.sink).collect()
    }
}

impl Link {
    /// Opens a stream for a job's input. `offset`: the first byte of it that is still here. The answer, which
    /// [`DuplexSink::opened`] gets, says where to go on and how much may be sent.
    pub fn open_input(&self, job: u64, offset: u64, sink: Arc<dyn DuplexSink>) -> Tag {
        self.open(&Request::JobStdin { job, offset }, Far::Input, 0, self.op_deadline(), sink)
    }

    /// Connects to a TCP port of the guest's loopback. At first each side may send [`port::INITIAL_CREDIT`] bytes.
    pub fn open_port(&self, port: u16, sink: Arc<dyn DuplexSink>) -> Tag {
        self.open(&Request::Connect { port }, Far::Port, port::INITIAL_CREDIT, CONNECT_DEADLINE, sink)
    }

    fn open(&self, request: &Request<'_>, far: Far, window: u64, deadline: Duration, sink: Arc<dyn DuplexSink>) -> Tag {
        let tag = self.next_tag();
        let duplex = Duplex { sink: sink.clone(), far, window, host_ended: false, agent_ended: false };
        self.shared.duplexes.lock().map.insert(tag, duplex);
        let weak = Arc::downgrade(&self.shared);
        let done = Box::new(move |result: Result<super::Response, LinkError>| {
            let error = match result {
                Ok(response) => return sink.opened(tag, &response.reply),
                Err(error) => error,
            };
            // Unless it was refused, the agent may still take it on.
            let refused = matches!(error, LinkError::Remote { .. });
            let sink = weak.upgrade().and_then(|shared| {
                let mut duplexes = shared.duplexes.lock();
                if refused { duplexes.remove(tag) } else { duplexes.give_up(tag) }
            });
            // A lost link has told it already.
            if let Some(sink) = sink {
                sink.ended(Some(error));
            }
        });
        self.request_tagged(tag, request, &[], RequestOptions::within(deadline), done);
        tag
    }

    /// Sends bytes, which must be within the credit.
    ///
    /// # Errors
    /// [`LinkError::Overloaded`] when too much waits for the agent: the stream must be given up, for these bytes are
    /// lost. [`LinkError::Closed`] when there is no such stream.
    pub fn send_data(&self, tag: Tag, data: &[u8]) -> Result<(), LinkError> {
        if !self.shared.duplexes.lock().map.contains_key(&tag) {
            return Err(LinkError::Closed);
        }
        data.chunks(MAX_DATA).try_for_each(|chunk| self.shared.send_stream(tag, chunk))
    }

    /// The host's direction is at its end.
    ///
    /// # Errors
    /// As [`Link::send_data`].
    pub fn send_end(&self, tag: Tag) -> Result<(), LinkError> {
        if !self.shared.duplexes.lock().map.contains_key(&tag) {
            return Err(LinkError::Closed);
        }
        let sent = self.shared.send_stream(tag, &[]);
        let last = self.shared.duplexes.lock().end_host(tag);
        if let Some(sink) = last {
            sink.ended(None);
        }
        sent
    }

    /// Lets the agent send so many more bytes.
    pub fn grant(&self, tag: Tag, bytes: u64) {
        let open = {
            let mut duplexes = self.shared.duplexes.lock();
            let duplex = duplexes.map.get_mut(&tag).filter(|duplex| !duplex.agent_ended);
            duplex.map(|duplex| duplex.window = duplex.window.saturating_add(bytes)).is_some()
        };
        if open && bytes > 0 {
            self.shared.send_credit(tag, bytes);
        }
    }

    /// Gives a stream up; its sink hears no more of it (but for a call that is under way). A connection is reset; a
    /// job's input is not at its end.
    pub fn give_up(&self, tag: Tag) {
        let sink = self.shared.duplexes.lock().give_up(tag);
        if sink.is_some() {
            self.shared.send_cancel(tag);
        }
    }
}

impl Shared {
    fn send_stream(&self, tag: Tag, data: &[u8]) -> Result<(), LinkError> {
        let header = Header {
            kind: Kind::Data,
            flags: 0,
            meta_len: 0,
            data_len: data.len() as u32,
            seq: 0,
            deadline_ms: 0,
            tag,
        };
        match self.send(&[Frame { header, meta: &[], data, secret: false }], Class::Stream) {
            Ok(()) => Ok(()),
            Err(SendError::Full) => Err(LinkError::Overloaded),
            Err(SendError::Broken(error)) => {
                let error = LinkError::Lost(error.to_string().into());
                self.break_off(error.clone());
                Err(error)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Deaf;

    impl DuplexSink for Deaf {
        fn opened(&self, _tag: Tag, _reply: &Reply) {}
        fn data(&self, _data: &[u8]) {}
        fn credit(&self, _bytes: u64) {}
        fn ended(&self, _error: Option<LinkError>) {}
    }

    fn with(far: Far, window: u64) -> Duplexes {
        let duplex = Duplex { sink: Arc::new(Deaf), far, window, host_ended: false, agent_ended: false };
        let mut duplexes = Duplexes::default();
        duplexes.map.insert(1, duplex);
        duplexes
    }

    #[test]
    fn a_connection_ends_when_both_directions_have() {
        let mut duplexes = with(Far::Port, 10);
        assert!(matches!(duplexes.incoming(1, 10), Heard::Sink(_)));
        assert!(matches!(duplexes.incoming(1, 0), Heard::Sink(_)), "half closed");
        assert!(matches!(duplexes.incoming(1, 0), Heard::Flood), "after its end");
        assert!(duplexes.end_host(1).is_some());
        assert!(matches!(duplexes.incoming(1, 0), Heard::Unknown));
        let mut duplexes = with(Far::Port, 10);
        assert!(duplexes.end_host(1).is_none());
        assert!(matches!(duplexes.incoming(1, 0), Heard::Last(_)));
    }

    #[test]
    fn more_than_was_granted_is_a_flood() {
        assert!(matches!(with(Far::Port, 10).incoming(1, 11), Heard::Flood));
        assert!(matches!(with(Far::Input, 0).incoming(1, 1), Heard::Flood), "an input says nothing");
        assert!(matches!(with(Far::Input, 0).incoming(1, 0), Heard::Last(_)));
    }

    #[test]
    fn what_was_given_up_may_still_speak() {
        let mut duplexes = with(Far::Port, 10);
        assert!(duplexes.give_up(1).is_some());
        assert!(matches!(duplexes.incoming(1, 5), Heard::Dead));
        assert!(matches!(duplexes.credit(1), Heard::Dead));
        assert!(matches!(duplexes.credit(2), Heard::Unknown));
    }
}
