//! The bounded log of a job's output, kept by the agent and, as a replica, by the host. [`crate::job`] has the format.
//!
//! A log past its limit keeps its first and its last half. Both stand in one store: the first half from its beginning
//! on, the last half behind it as a ring, from which whole records are dropped. Small logs live in memory, larger ones
//! in a file that is asked for when it is needed, so the file never exceeds the limit by more than its header.
//!
//! The caller's lock guards a log: reading takes `&self`, so many readers with a [`Cursor`] each can go side by side.

mod read;
mod record;
mod saved;

pub use read::{Chunk, Cursor};
pub use record::{Filter, Totals};

use crate::job::{MAX_RECORD, RECORD_HEADER, Source, record_header};
use record::{GAP_BODY, MAX_OFFSET, Mark, Record};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use thiserror::Error;

/// A log keeps at least this many bytes, whatever limit was asked for.
pub const MIN_LIMIT: u64 = 4096;
/// A log of at most this many bytes stays in memory.
pub const MEMORY_LIMIT: usize = 64 * 1024;
/// Bytes at the beginning of a log's file that describe it; its records follow.
pub const FILE_HEADER: u64 = 256;

/// Opens the file of a log that outgrew its memory.
pub type Opener = Box<dyn Fn() -> io::Result<File> + Send + Sync>;

/// Why bytes are no records, or a file is no log.
#[derive(Debug, Error)]
pub enum LogError {
    /// The records or the file break the format.
    #[error("malformed log: {0}")]
    Malformed(&'static str),
    /// The file could not be read or written.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl From<LogError> for io::Error {
    fn from(error: LogError) -> Self {
        match error {
            LogError::Malformed(what) => io::Error::new(io::ErrorKind::InvalidData, what),
            LogError::Io(error) => error,
        }
    }
}

enum Store {
    Memory(Vec<u8>),
    File(File),
}

/// The log of one job's output.
pub struct JobLog {
    limit: u64,
    /// End of the first half; moves until that is full.
    head: Mark,
    /// Whether the first half is full.
    head_full: bool,
    /// First record kept of the last half.
    tail: Mark,
    end: Mark,
    /// Bytes lost in gaps that are stored as records, in the first half and in the last.
    head_gaps: Totals,
    tail_gaps: Totals,
    store: Store,
    opener: Opener,
    /// The file has a header, which is kept true from then on.
    saved: bool,
    /// Something could not be stored.
    storage_failed: bool,
}

impl std::fmt::Debug for JobLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("JobLog").field("limit", &self.limit).field("end", &self.end).finish_non_exhaustive()
    }
}

impl JobLog {
    /// An empty log that keeps at most `limit` bytes (at least [`MIN_LIMIT`]), headers of records included. `opener`
    /// is asked for an empty file, open for reading and writing, once the log outgrows [`MEMORY_LIMIT`].
    pub fn new(limit: u64, opener: Opener) -> JobLog {
        JobLog {
            limit: limit.clamp(MIN_LIMIT, MAX_OFFSET),
            head: Mark::default(),
            head_full: false,
            tail: Mark::default(),
            end: Mark::default(),
            head_gaps: Totals::default(),
            tail_gaps: Totals::default(),
            store: Store::Memory(Vec::new()),
            opener,
            saved: false,
            storage_failed: false,
        }
    }

    /// Length of the log so far, in bytes, headers and everything lost included.
    pub fn end(&self) -> u64 {
        self.end.offset
    }

    /// Bytes printed so far, lost ones included.
    pub fn totals(&self) -> Totals {
        self.end.output
    }

    /// Bytes printed that are not in the log any more, or never were.
    pub fn lost(&self) -> Totals {
        self.tail.output.minus(self.head.output).plus(self.head_gaps).plus(self.tail_gaps)
    }

    /// Whether something is lost because it could not be stored (the disk was full), and not for the limit.
    pub fn storage_failed(&self) -> bool {
        self.storage_failed
    }

    /// The most bytes it keeps.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// Bytes of memory its records take; 0 when they are in a file.
    pub fn memory(&self) -> usize {
        match &self.store {
            Store::Memory(bytes) => bytes.capacity(),
            Store::File(_) => 0,
        }
    }

    /// Whether its records are in a file.
    pub fn in_file(&self) -> bool {
        matches!(self.store, Store::File(_))
    }

    /// Adds output, as one record or several. What cannot be stored (the disk is full) counts as lost, so this never
    /// fails and a job is never held up. `source` [`Source::Gap`] is ignored.
    pub fn append(&mut self, source: Source, bytes: &[u8]) {
        if source == Source::Gap {
            return;
        }
        let piece = (self.tail_capacity() / 4).clamp(512, MAX_RECORD as u64) as usize;
        for body in bytes.chunks(piece) {
            let record = Record { source, len: body.len(), gap: None };
            self.push(&record, &record_header(source, body.len()), body);
        }
    }

    /// Adds records as [`JobLog::read_records`] gave them elsewhere, gaps included. All of them are checked before
    /// the first is taken.
    ///
    /// # Errors
    /// [`LogError::Malformed`], and nothing was added.
    pub fn append_records(&mut self, records: &[u8]) -> Result<(), LogError> {
        let mut rest = records;
        let mut mark = self.end;
        while !rest.is_empty() {
            let record = Record::parse(rest)?.ok_or(LogError::Malformed("record cut short"))?;
            if let Some(gap) = record.gap {
                let skipped = gap.target.checked_sub(mark.offset).ok_or(LogError::Malformed("gap backwards"))?;
                if gap.lost.stdout + gap.lost.stderr > skipped {
                    return Err(LogError::Malformed("gap that lost more than it skips"));
                }
            }
            mark = mark.after(&record);
            if mark.offset > MAX_OFFSET {
                return Err(LogError::Malformed("impossible offset"));
            }
            rest = rest.get(record.size() as usize..).ok_or(LogError::Malformed("record cut short"))?;
        }
        rest = records;
        while let Some(record) = Record::parse(rest)? {
            let (this, next) = rest.split_at_checked(record.size() as usize).unwrap_or((rest, &[]));
            let (header, body) = this.split_at_checked(RECORD_HEADER).unwrap_or((this, &[]));
            self.push(&record, header, body);
            rest = next;
        }
        Ok(())
    }

    fn head_capacity(&self) -> u64 {
        self.limit / 2
    }

    fn tail_capacity(&self) -> u64 {
        self.limit - self.head_capacity()
    }

    fn push(&mut self, record: &Record, header: &[u8], body: &[u8]) {
        let after = self.end.after(record);
        let lost = record.gap.map(|gap| gap.lost).unwrap_or_default();
        if !self.head_full {
            if after.stored <= self.head_capacity() && self.has_stored(header, body) {
                self.head_gaps = self.head_gaps.plus(lost);
                (self.head, self.tail, self.end) = (after, after, after);
                return;
            }
            self.head_full = true;
        }
        let fits = record.size() <= self.tail_capacity() && self.make_room(record.size()).is_ok();
        if fits && self.has_stored(header, body) {
            self.tail_gaps = self.tail_gaps.plus(lost);
        } else {
            (self.tail, self.tail_gaps) = (after, Totals::default());
            self.end = after;
            if self.saved {
                // A failing disk: the header stays as it was, and the next restart may find damaged records.
                let _ = self.write_header();
            }
        }
        self.end = after;
    }

    /// Drops records of the last half until one of that size fits.
    fn make_room(&mut self, size: u64) -> Result<(), LogError> {
        let before = self.tail;
        while self.end.stored + size - self.tail.stored > self.tail_capacity() {
            let mut header = [0; RECORD_HEADER + GAP_BODY];
            let available = (self.end.stored - self.tail.stored).min(header.len() as u64) as usize;
            let header = header.get_mut(..available).unwrap_or_default();
            self.load_stored(self.tail.stored, header)?;
            let record = Record::parse(header)?.ok_or(LogError::Malformed("record cut short"))?;
            if let Some(gap) = record.gap {
                self.tail_gaps = self.tail_gaps.minus(gap.lost);
            }
            self.tail = self.tail.after(&record);
        }
        // What the file's header calls kept must not be overwritten, should this process end in between.
        if self.saved && self.tail != before { self.write_header() } else { Ok(()) }
    }

    /// Where in the store a byte stands, and how many can be read or written from there before the ring turns.
    fn place(&self, stored: u64) -> (u64, u64) {
        if !self.head_full {
            return (stored, u64::MAX);
        }
        if stored < self.head.stored {
            return (stored, self.head.stored - stored);
        }
        let turn = (stored - self.head.stored) % self.tail_capacity();
        (self.head.stored + turn, self.tail_capacity() - turn)
    }

    /// Reads stored bytes; the caller keeps to what is kept.
    fn load_stored(&self, mut stored: u64, mut out: &mut [u8]) -> Result<(), LogError> {
        while !out.is_empty() {
            let (at, room) = self.place(stored);
            let (piece, rest) = out.split_at_mut(room.min(out.len() as u64) as usize);
            match &self.store {
                Store::File(file) => file.read_exact_at(piece, FILE_HEADER + at)?,
                Store::Memory(bytes) => {
                    let range = at as usize..at as usize + piece.len();
                    piece.copy_from_slice(bytes.get(range).ok_or(LogError::Malformed("record cut short"))?);
                }
            }
            stored += piece.len() as u64;
            out = rest;
        }
        Ok(())
    }

    fn has_stored(&mut self, header: &[u8], body: &[u8]) -> bool {
        let stored = self.store_record(header, body).is_ok();
        self.storage_failed |= !stored;
        stored
    }

    /// Writes a record at the end.
    fn store_record(&mut self, header: &[u8], body: &[u8]) -> Result<(), LogError> {
        if body.len() <= 4096 {
            // One write for a small record.
            let whole = [header, body].concat();
            return self.store_bytes(self.end.stored, &whole);
        }
        self.store_bytes(self.end.stored, header)?;
        self.store_bytes(self.end.stored + header.len() as u64, body)
    }

    fn store_bytes(&mut self, mut stored: u64, mut bytes: &[u8]) -> Result<(), LogError> {
        while !bytes.is_empty() {
            let (at, room) = self.place(stored);
            let (piece, rest) = bytes.split_at(room.min(bytes.len() as u64) as usize);
            let end = at as usize + piece.len();
            if end > MEMORY_LIMIT {
                self.move_to_file()?;
            }
            match &mut self.store {
                Store::File(file) => file.write_all_at(piece, FILE_HEADER + at)?,
                Store::Memory(memory) => {
                    if memory.len() < end {
                        memory.resize(end, 0);
                    }
                    memory.get_mut(at as usize..end).unwrap_or_default().copy_from_slice(piece);
                }
            }
            stored += piece.len() as u64;
            bytes = rest;
        }
        Ok(())
    }

    fn move_to_file(&mut self) -> Result<(), LogError> {
        if let Store::Memory(bytes) = &self.store {
            let file = (self.opener)()?;
            file.write_all_at(bytes, FILE_HEADER)?;
            self.store = Store::File(file);
        }
        Ok(())
    }
}
