//! Reading a log.

use super::record::{GAP_BODY, Gap, Mark, Record};
use super::{Filter, JobLog, LogError, Totals};
use crate::job::{RECORD_HEADER, Source};

/// Bytes read from the store at a time.
const BLOCK: usize = 64 * 1024;

/// A reader's place in a log. It stays good while the log grows and drops records.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cursor {
    mark: Mark,
    /// The record at `mark` that was read in part: its source, its length, and how much of it was read.
    partial: Option<(Source, usize, usize)>,
}

impl Cursor {
    /// The beginning of the log.
    pub fn start() -> Cursor {
        Cursor::default()
    }

    /// Offset in the log of the record the cursor is at or in.
    pub fn offset(&self) -> u64 {
        self.mark.offset
    }

    /// Bytes of output before the cursor, lost ones included.
    pub fn output(&self) -> Totals {
        let mut output = self.mark.output;
        if let Some((source, _, read)) = self.partial {
            output.add(source, read as u64);
        }
        output
    }

    fn at(mark: Mark) -> Cursor {
        Cursor { mark, partial: None }
    }
}

/// What a reader of the output gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Chunk {
    /// Output; empty at the end of what there is now.
    Data(Vec<u8>),
    /// So much is missing here, past the log's limit. Never empty in what the reader selected.
    Gap(Totals),
}

impl JobLog {
    /// The cursor at an offset that [`Cursor::offset`] or [`JobLog::end`] once gave; `None` when no record begins
    /// there. What was dropped behind it is counted exactly where the offset is of a record still kept, and estimated
    /// in proportion where it is not.
    ///
    /// # Errors
    /// Those of reading the file.
    pub fn cursor_at(&self, offset: u64) -> Result<Option<Cursor>, LogError> {
        if offset == self.end.offset {
            return Ok(Some(Cursor::at(self.end)));
        }
        let (from, to) = match offset {
            _ if offset > self.end.offset => return Ok(None),
            _ if offset <= self.head.offset => (Mark::default(), self.head),
            _ if offset >= self.tail.offset => (self.tail, self.end),
            _ => return Ok(Some(Cursor::at(self.estimate(offset)))),
        };
        let mut mark = from;
        let mut block = vec![0; BLOCK.min((to.stored - from.stored) as usize)];
        while mark.offset < offset {
            let filled = block.get_mut(..BLOCK.min((to.stored - mark.stored) as usize)).unwrap_or_default();
            self.load_stored(mark.stored, filled)?;
            let mut at = 0;
            while mark.offset < offset {
                let Some(record) = Record::parse(filled.get(at..).unwrap_or_default())? else { break };
                at += record.size() as usize;
                mark = mark.after(&record);
            }
            if at == 0 || mark.stored > to.stored {
                return Err(LogError::Malformed("record cut short"));
            }
        }
        Ok((mark.offset == offset).then_some(Cursor::at(mark)))
    }

    /// A place among the dropped records.
    fn estimate(&self, offset: u64) -> Mark {
        let span = u128::from(self.tail.offset - self.head.offset).max(1);
        let past = u128::from(offset - self.head.offset);
        let part = |from: u64, to: u64| from + (u128::from(to.saturating_sub(from)) * past / span) as u64;
        Mark {
            stored: part(self.head.stored, self.tail.stored).max(self.head.stored),
            offset,
            output: Totals {
                stdout: part(self.head.output.stdout, self.tail.output.stdout),
                stderr: part(self.head.output.stderr, self.tail.output.stderr),
            },
        }
    }

    /// Whole records from the cursor on, at most `max` bytes of them; where records were dropped, a gap's record
    /// first. Empty at the end of what there is now, or when the next record alone is over `max` (never when `max` is
    /// at least 4 + [`MAX_RECORD`]). A cursor that was inside a record gets all of that record again.
    ///
    /// # Errors
    /// Those of reading the file.
    pub fn read_records(&self, cursor: &mut Cursor, max: usize) -> Result<Vec<u8>, LogError> {
        cursor.partial = None;
        if let Some(lost) = self.dropped_at(cursor) {
            let gap = Gap { target: self.tail.offset, lost };
            if max < RECORD_HEADER + GAP_BODY {
                return Ok(Vec::new());
            }
            *cursor = Cursor::at(self.tail);
            return Ok(gap.encode().to_vec());
        }
        let available = self.region_end(cursor.mark.stored) - cursor.mark.stored;
        let mut out = vec![0; available.min(max as u64) as usize];
        self.load_stored(cursor.mark.stored, &mut out)?;
        let mut len = 0;
        while let Some(record) = Record::parse(out.get(len..).unwrap_or_default())? {
            if out.len() - len < record.size() as usize {
                break;
            }
            len += record.size() as usize;
            cursor.mark = cursor.mark.after(&record);
        }
        out.truncate(len);
        Ok(out)
    }

    /// Output from the cursor on, at most `max` bytes; it may stop inside a record.
    ///
    /// # Errors
    /// Those of reading the file.
    pub fn read_source(&self, cursor: &mut Cursor, filter: Filter, max: usize) -> Result<Chunk, LogError> {
        let mut out = Vec::new();
        let mut block = Vec::new();
        while out.len() < max {
            if let Some(lost) = self.dropped_at(cursor) {
                if lost.of(filter) > 0 && !out.is_empty() {
                    break;
                }
                *cursor = Cursor::at(self.tail);
                if lost.of(filter) > 0 {
                    return Ok(Chunk::Gap(lost));
                }
                continue;
            }
            if let Some((source, len, read)) = cursor.partial {
                let take = (len - read).min(max - out.len());
                let before = out.len();
                out.resize(before + take, 0);
                let from = cursor.mark.stored + (RECORD_HEADER + read) as u64;
                self.load_stored(from, out.get_mut(before..).unwrap_or_default())?;
                if read + take == len {
                    *cursor = Cursor::at(cursor.mark.after(&Record { source, len, gap: None }));
                } else {
                    cursor.partial = Some((source, len, read + take));
                }
                continue;
            }
            let available = self.region_end(cursor.mark.stored) - cursor.mark.stored;
            if available == 0 {
                break;
            }
            let wanted = (max - out.len()).saturating_add(256).min(BLOCK);
            block.resize(available.min(wanted as u64) as usize, 0);
            self.load_stored(cursor.mark.stored, &mut block)?;
            if let Some(chunk) = self.walk(cursor, filter, max, &block, &mut out)? {
                return Ok(chunk);
            }
        }
        Ok(Chunk::Data(out))
    }

    /// Goes through a block of records at the cursor. Gives the chunk when it is complete.
    fn walk(
        &self,
        cursor: &mut Cursor,
        filter: Filter,
        max: usize,
        block: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<Option<Chunk>, LogError> {
        let mut at = 0;
        while out.len() < max {
            let Some(record) = Record::parse(block.get(at..).unwrap_or_default())? else {
                return match at {
                    0 => Err(LogError::Malformed("record cut short")),
                    _ => Ok(None),
                };
            };
            let next = cursor.mark.after(&record);
            if next.stored > self.region_end(cursor.mark.stored) {
                return Err(LogError::Malformed("record cut short"));
            }
            if let Some(gap) = record.gap {
                if gap.lost.of(filter) > 0 {
                    if out.is_empty() {
                        cursor.mark = next;
                        return Ok(Some(Chunk::Gap(gap.lost)));
                    }
                    return Ok(Some(Chunk::Data(std::mem::take(out))));
                }
            } else if filter.selects(record.source) {
                let body = block.get(at + RECORD_HEADER..at + RECORD_HEADER + record.len);
                match body.filter(|body| body.len() <= max - out.len()) {
                    Some(body) => out.extend_from_slice(body),
                    None => {
                        cursor.partial = Some((record.source, record.len, 0));
                        return Ok(None);
                    }
                }
            }
            cursor.mark = next;
            at += record.size() as usize;
            if at >= block.len() {
                break;
            }
        }
        Ok(None)
    }

    /// What was lost between the cursor and the last half, if it stands where records were dropped.
    fn dropped_at(&self, cursor: &Cursor) -> Option<Totals> {
        let stored = cursor.mark.stored;
        (stored >= self.head.stored && stored < self.tail.stored).then(|| self.tail.output.minus(cursor.output()))
    }

    fn region_end(&self, stored: u64) -> u64 {
        if stored < self.head.stored { self.head.stored } else { self.end.stored.max(stored) }
    }
}
