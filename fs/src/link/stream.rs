//! Job output as it comes in: whole records, with credit.

use super::error::LinkError;
use super::{StreamSink, Tag};
use machinefs_protocol::job::{INITIAL_CREDIT, RECORD_HEADER, Source, parse_record_header};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Bytes the sink has taken before they are granted again.
const GRANT: u64 = INITIAL_CREDIT / 8;
/// Streams given up by this side whose last data may still be on the way.
const MAX_DEAD: usize = 1024;
/// Body of a [`Source::Gap`] record: three numbers of 8 bytes.
const GAP_LEN: usize = 24;

struct Stream {
    job: u64,
    /// `None`: given up; what still comes is dropped.
    sink: Option<Arc<dyn StreamSink>>,
    /// The agent has answered the attach.
    answered: bool,
    /// Bytes the agent may still send.
    window: u64,
    /// Bytes taken and not granted again yet.
    taken: u64,
}

/// The streams of a link.
#[derive(Default)]
pub(super) struct Streams {
    map: BTreeMap<Tag, Stream>,
    dead: usize,
}

/// What to do with data that is announced.
pub(super) enum Incoming {
    Take(Arc<dyn StreamSink>),
    Drop,
    Unknown,
    /// More than was granted.
    Flood,
}

impl Streams {
    pub fn insert(&mut self, tag: Tag, job: u64, sink: Arc<dyn StreamSink>) {
        let stream = Stream { job, sink: Some(sink), answered: false, window: INITIAL_CREDIT, taken: 0 };
        self.map.insert(tag, stream);
    }

    /// The agent has agreed to the stream.
    pub fn answered(&mut self, tag: Tag) {
        if let Some(stream) = self.map.get_mut(&tag) {
            stream.answered = true;
        }
    }

    /// The stream ends; its sink, if it still had one. Unless it is `forgotten`, data of it may still come.
    pub fn end(&mut self, tag: Tag, forgotten: bool) -> Option<Arc<dyn StreamSink>> {
        let sink = self.map.get_mut(&tag)?.sink.take();
        self.dead += usize::from(sink.is_some());
        let gone = if forgotten {
            Some(tag)
        } else if self.dead > MAX_DEAD {
            self.map.iter().find(|(_, s)| s.sink.is_none()).map(|(tag, _)| *tag)
        } else {
            None
        };
        if let Some(gone) = gone {
            self.map.remove(&gone);
            self.dead -= 1;
        }
        sink
    }

    /// The job has ended, and all of its output was sent.
    pub fn job_ended(&mut self, job: u64) {
        self.map.retain(|_, stream| stream.job != job || !stream.answered);
        self.dead = self.map.values().filter(|stream| stream.sink.is_none()).count();
    }

    /// `len` bytes come on the stream.
    pub fn incoming(&mut self, tag: Tag, len: u64) -> Incoming {
        let Some(stream) = self.map.get_mut(&tag) else { return Incoming::Unknown };
        let Some(window) = stream.window.checked_sub(len) else { return Incoming::Flood };
        stream.window = window;
        stream.sink.clone().map_or(Incoming::Drop, Incoming::Take)
    }

    /// The sink has taken `len` bytes: how many to grant now, if any.
    pub fn taken(&mut self, tag: Tag, len: u64) -> Option<u64> {
        let stream = self.map.get_mut(&tag).filter(|stream| stream.sink.is_some())?;
        stream.taken += len;
        if stream.taken < GRANT {
            return None;
        }
        stream.window += stream.taken;
        Some(std::mem::take(&mut stream.taken))
    }

    /// The link is lost.
    pub fn drain(&mut self) -> Vec<Arc<dyn StreamSink>> {
        self.dead = 0;
        std::mem::take(&mut self.map).into_values().filter_map(|stream| stream.sink).collect()
    }
}

/// Whether these bytes are whole records, and nothing else.
pub(super) fn check_records(mut bytes: &[u8]) -> Result<(), LinkError> {
    while !bytes.is_empty() {
        let record = bytes.split_first_chunk::<RECORD_HEADER>().and_then(|(header, rest)| {
            let (source, len) = parse_record_header(*header)?;
            (source != Source::Gap || len == GAP_LEN).then_some(())?;
            rest.get(len..)
        });
        bytes = record.ok_or_else(|| LinkError::Lie("a stream is not made of records".into()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use machinefs_protocol::job::record_header;

    #[test]
    fn only_whole_records_pass() {
        let mut good = record_header(Source::Stdout, 3).to_vec();
        good.extend_from_slice(b"abc");
        good.extend_from_slice(&record_header(Source::Stderr, 0));
        assert!(check_records(&good).is_ok());
        assert!(check_records(&[]).is_ok());
        assert!(check_records(&good[..5]).is_err(), "cut in the body");
        assert!(check_records(&good[..2]).is_err(), "cut in the header");
        assert!(check_records(&[0, 0, 0, 9]).is_err(), "no such source");
        assert!(check_records(&record_header(Source::Gap, 0)).is_err(), "a gap has a body");
    }
}
