//! Records of a log, and the arithmetic over them.

use super::LogError;
use crate::job::{RECORD_HEADER, Source, parse_record_header, record_header};

/// Largest offset a log may claim: additions of real lengths to it cannot overflow.
pub(super) const MAX_OFFSET: u64 = 1 << 62;
/// Length of a gap's body: the offset after it, and the bytes of stdout and stderr lost.
pub(super) const GAP_BODY: usize = 24;

/// Bytes of a job's two outputs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Of standard output (or the terminal).
    pub stdout: u64,
    /// Of standard error.
    pub stderr: u64,
}

impl Totals {
    /// What `filter` selects of them.
    pub fn of(self, filter: Filter) -> u64 {
        match filter {
            Filter::All => self.stdout + self.stderr,
            Filter::Stdout => self.stdout,
            Filter::Stderr => self.stderr,
        }
    }

    pub(super) fn add(&mut self, source: Source, bytes: u64) {
        match source {
            Source::Stdout => self.stdout += bytes,
            Source::Stderr => self.stderr += bytes,
            Source::Gap => {}
        }
    }

    pub(super) fn plus(self, other: Totals) -> Totals {
        Totals { stdout: self.stdout + other.stdout, stderr: self.stderr + other.stderr }
    }

    pub(super) fn minus(self, other: Totals) -> Totals {
        Totals { stdout: self.stdout.saturating_sub(other.stdout), stderr: self.stderr.saturating_sub(other.stderr) }
    }
}

/// Which of a job's outputs a reader wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    /// Both, in the order they came in.
    All,
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

impl Filter {
    pub(super) fn selects(self, source: Source) -> bool {
        match self {
            Filter::All => true,
            Filter::Stdout => source == Source::Stdout,
            Filter::Stderr => source == Source::Stderr,
        }
    }
}

/// The boundary before a record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Mark {
    /// Bytes of records stored before it, had none been dropped. Differs from `offset` by the gaps that came in from
    /// elsewhere, which are stored as records.
    pub(super) stored: u64,
    /// Its offset in the log.
    pub(super) offset: u64,
    /// Bytes the job had printed so far, lost ones included.
    pub(super) output: Totals,
}

impl Mark {
    /// The boundary after that record.
    pub(super) fn after(self, record: &Record) -> Mark {
        let mut next = self;
        next.stored += record.size();
        match record.gap {
            Some(gap) => {
                next.offset = gap.target;
                next.output = next.output.plus(gap.lost);
            }
            None => {
                next.offset += record.size();
                next.output.add(record.source, record.len as u64);
            }
        }
        next
    }
}

/// The body of a gap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Gap {
    pub(super) target: u64,
    pub(super) lost: Totals,
}

impl Gap {
    pub(super) fn parse(body: &[u8]) -> Option<Gap> {
        let words: &[u8; GAP_BODY] = body.try_into().ok()?;
        let word = |at: usize| words.get(at..at + 8).and_then(|w| w.try_into().ok()).map(u64::from_le_bytes);
        let gap = Gap { target: word(0)?, lost: Totals { stdout: word(8)?, stderr: word(16)? } };
        let limits = [gap.target, gap.lost.stdout, gap.lost.stderr];
        limits.iter().all(|value| *value <= MAX_OFFSET).then_some(gap)
    }

    pub(super) fn encode(self) -> [u8; RECORD_HEADER + GAP_BODY] {
        let mut out = [0; RECORD_HEADER + GAP_BODY];
        out[..4].copy_from_slice(&record_header(Source::Gap, GAP_BODY));
        out[4..12].copy_from_slice(&self.target.to_le_bytes());
        out[12..20].copy_from_slice(&self.lost.stdout.to_le_bytes());
        out[20..28].copy_from_slice(&self.lost.stderr.to_le_bytes());
        out
    }
}

/// A record's head: all of it but the bytes of output.
pub(super) struct Record {
    pub(super) source: Source,
    pub(super) len: usize,
    pub(super) gap: Option<Gap>,
}

impl Record {
    /// The record at the beginning of `bytes`; `None` while they do not hold its header (and a gap's body).
    pub(super) fn parse(bytes: &[u8]) -> Result<Option<Record>, LogError> {
        let Some(header) = bytes.first_chunk::<RECORD_HEADER>() else { return Ok(None) };
        let (source, len) = parse_record_header(*header).ok_or(LogError::Malformed("no such record"))?;
        if source != Source::Gap {
            return match len {
                0 => Err(LogError::Malformed("empty record")),
                _ => Ok(Some(Record { source, len, gap: None })),
            };
        }
        if len != GAP_BODY {
            return Err(LogError::Malformed("gap of a wrong length"));
        }
        let Some(body) = bytes.get(RECORD_HEADER..RECORD_HEADER + GAP_BODY) else { return Ok(None) };
        let gap = Gap::parse(body).ok_or(LogError::Malformed("gap of an impossible size"))?;
        Ok(Some(Record { source, len, gap: Some(gap) }))
    }

    pub(super) fn size(&self) -> u64 {
        (RECORD_HEADER + self.len) as u64
    }
}
