//! A log in its file, for reopening it after a restart.

use super::record::{MAX_OFFSET, Mark};
use super::{FILE_HEADER, JobLog, LogError, MIN_LIMIT, Opener, Store, Totals};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

const MAGIC: &[u8; 8] = b"mfsjlog1";

impl JobLog {
    /// Makes the log readable by [`JobLog::load`] from its file as it is now. What is appended afterwards may
    /// only be in it after the next `save`; what is dropped meanwhile is left out of it at once.
    ///
    /// # Errors
    /// Those of opening and writing the file.
    pub fn save(&mut self) -> Result<(), LogError> {
        self.move_to_file()?;
        self.write_header()?;
        self.saved = true;
        Ok(())
    }

    pub(super) fn write_header(&self) -> Result<(), LogError> {
        let Store::File(file) = &self.store else { return Ok(()) };
        let mut out = Vec::with_capacity(FILE_HEADER as usize);
        out.extend_from_slice(MAGIC);
        let mut word = |value: u64| out.extend_from_slice(&value.to_le_bytes());
        word(self.limit);
        word(u64::from(self.head_full) | u64::from(self.storage_failed) << 1);
        for mark in [self.head, self.tail, self.end] {
            word(mark.stored);
            word(mark.offset);
            word(mark.output.stdout);
            word(mark.output.stderr);
        }
        for totals in [self.head_gaps, self.tail_gaps] {
            word(totals.stdout);
            word(totals.stderr);
        }
        let sum = checksum(&out);
        out.extend_from_slice(&sum.to_le_bytes());
        out.resize(FILE_HEADER as usize, 0);
        Ok(file.write_all_at(&out, 0)?)
    }

    /// The log that was last saved in that file, which must be open for writing too if it is to be appended to.
    ///
    /// # Errors
    /// [`LogError::Malformed`] when the file is no such log, or is shorter than the log says. Damage within the
    /// records shows as the same error when they are read.
    pub fn load(file: File) -> Result<JobLog, LogError> {
        const WORDS: usize = 18;
        let mut header = [0u8; 8 + WORDS * 8 + 8];
        file.read_exact_at(&mut header, 0).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => LogError::Malformed("no header"),
            _ => LogError::Io(error),
        })?;
        let (described, sum) = header.split_at(8 + WORDS * 8);
        let mut words = described.chunks_exact(8).skip(1).map(|word| word.try_into().map_or(0, u64::from_le_bytes));
        if !described.starts_with(MAGIC) || sum != checksum(described).to_le_bytes() {
            return Err(LogError::Malformed("no header"));
        }
        let mut word = || words.next().unwrap_or_default();
        let (limit, flags) = (word(), word());
        let (head_full, storage_failed) = (flags & 1 != 0, flags & 2 != 0);
        let mut mark = || Mark { stored: word(), offset: word(), output: Totals { stdout: word(), stderr: word() } };
        let (head, tail, end) = (mark(), mark(), mark());
        let mut totals = || Totals { stdout: word(), stderr: word() };
        let (head_gaps, tail_gaps) = (totals(), totals());
        let opener: Opener = Box::new(|| Err(io::Error::from(io::ErrorKind::Unsupported)));
        let store = Store::File(file);
        let saved = true;
        let log =
            JobLog { limit, head, head_full, tail, end, head_gaps, tail_gaps, store, opener, saved, storage_failed };
        log.check()?;
        Ok(log)
    }

    /// What the arithmetic above relies on.
    fn check(&self) -> Result<(), LogError> {
        let (head, tail, end) = (self.head, self.tail, self.end);
        let ordered = |a: Mark, b: Mark| {
            a.stored <= b.stored
                && a.offset <= b.offset
                && a.output.stdout <= b.output.stdout
                && a.output.stderr <= b.output.stderr
        };
        let small = |mark: Mark| {
            let Mark { stored, offset, output } = mark;
            [stored, offset, output.stdout, output.stderr].iter().all(|value| *value <= MAX_OFFSET)
        };
        let gaps = [self.head_gaps, self.tail_gaps];
        let good = (MIN_LIMIT..=MAX_OFFSET).contains(&self.limit)
            && [head, tail, end].into_iter().all(small)
            && gaps.iter().all(|gap| gap.stdout <= MAX_OFFSET && gap.stderr <= MAX_OFFSET)
            && ordered(head, tail)
            && ordered(tail, end)
            && head.stored <= self.head_capacity()
            && end.stored - tail.stored <= self.tail_capacity()
            && (self.head_full || (head == tail && tail == end));
        if !good {
            return Err(LogError::Malformed("impossible header"));
        }
        let Store::File(file) = &self.store else { return Ok(()) };
        let (at, room) = self.place(tail.stored);
        let kept = end.stored - tail.stored;
        let tail_end = if kept > room { head.stored + self.tail_capacity() } else { at + kept };
        let needed = if kept == 0 { head.stored } else { tail_end };
        if file.metadata()?.len() < FILE_HEADER + needed {
            return Err(LogError::Malformed("file cut short"));
        }
        Ok(())
    }
}

/// FNV-1a, enough to tell a torn header from a whole one.
fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}
