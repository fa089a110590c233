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
    /// Where in the job's log the stream is.
    at: u64,
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
    pub fn insert(&mut self, tag: Tag, job: u64, at: u64, sink: Arc<dyn StreamSink>) {
        let stream = Stream { job, sink: Some(sink), at, window: INITIAL_CREDIT, taken: 0 };
        self.map.insert(tag, stream);
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

    /// The host wants nothing more of that job.
    pub fn forget_job(&mut self, job: u64) {
        let tags: Vec<Tag> = self.map.iter().filter(|(_, stream)| stream.job == job).map(|(tag, _)| *tag).collect();
        for tag in tags {
            self.end(tag, false);
        }
    }

    /// The job has ended, and its log with it. A stream that is not there yet was attached while the news was on the
    /// way: it goes on, and the news comes again after it.
    pub fn job_ended(&mut self, job: u64, log_end: u64) {
        self.map.retain(|_, stream| stream.job != job || (stream.sink.is_some() && stream.at < log_end));
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
    pub fn taken(&mut self, tag: Tag, len: u64, moved: Moved) -> Option<u64> {
        let stream = self.map.get_mut(&tag).filter(|stream| stream.sink.is_some())?;
        stream.at = match moved {
            Moved::By(len) => stream.at.saturating_add(len),
            Moved::To(offset) => offset,
        };
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

/// How far records take a stream in its job's log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Moved {
    /// By so many bytes.
    By(u64),
    /// To that offset (there was a gap).
    To(u64),
}

/// Checks that these bytes are whole records, and nothing else; gives where they lead.
pub(super) fn check_records(mut bytes: &[u8]) -> Result<Moved, LinkError> {
    let mut moved = Moved::By(0);
    while !bytes.is_empty() {
        let record = bytes.split_first_chunk::<RECORD_HEADER>().and_then(|(header, rest)| {
            let (source, len) = parse_record_header(*header)?;
            let (body, rest) = rest.split_at_checked(len)?;
            let step = (RECORD_HEADER + len) as u64;
            let moved = match (source, moved) {
                (Source::Gap, _) if len != GAP_LEN => return None,
                (Source::Gap, _) => Moved::To(u64::from_le_bytes(*body.first_chunk()?)),
                (_, Moved::By(before)) => Moved::By(before + step),
                (_, Moved::To(offset)) => Moved::To(offset.saturating_add(step)),
            };
            Some((moved, rest))
        });
        (moved, bytes) = record.ok_or_else(|| LinkError::Lie("a stream is not made of records".into()))?;
    }
    Ok(moved)
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
        assert_eq!(check_records(&good).unwrap(), Moved::By(11));
        assert_eq!(check_records(&[]).unwrap(), Moved::By(0));
        let mut gap = good.clone();
        gap.extend_from_slice(&record_header(Source::Gap, GAP_LEN));
        gap.extend([1000u64, 7, 8].into_iter().flat_map(u64::to_le_bytes));
        gap.extend_from_slice(&good);
        assert_eq!(check_records(&gap).unwrap(), Moved::To(1011));
        assert!(check_records(&good[..5]).is_err(), "cut in the body");
        assert!(check_records(&good[..2]).is_err(), "cut in the header");
        assert!(check_records(&[0, 0, 0, 9]).is_err(), "no such source");
        assert!(check_records(&record_header(Source::Gap, 0)).is_err(), "a gap has a body");
    }
}
