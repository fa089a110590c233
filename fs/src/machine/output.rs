//! The output of a job: its log in memory or in a file, and the cursors that read it.

use super::error::MachineError;
use super::job::Job;
pub use machinefs_protocol::joblog::Filter as Output;
use machinefs_protocol::joblog::{self, Cursor, JobLog, LogError};
use parking_lot::Mutex;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

/// Place of a reading among the three.
pub(super) fn which(output: Output) -> usize {
    match output {
        Output::All => 0,
        Output::Stdout => 1,
        Output::Stderr => 2,
    }
}

/// The log of a job that starts.
pub(super) fn new_log(dir: &Path, number: u64, limit: u64) -> JobLog {
    let path = dir.join(format!("{number}.log"));
    JobLog::new(
        limit,
        Box::new(move || OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(0o600).open(&path)),
    )
}

/// The log of a job that has ended.
pub(super) fn open_log(dir: &Path, number: u64) -> io::Result<JobLog> {
    let file = File::open(dir.join(format!("{number}.log")))?;
    Ok(JobLog::load(file)?)
}

/// Lengths of the three readings of a log that grows: its gaps are taken for one.
pub(super) fn expected_sizes(log: &JobLog) -> [u64; 3] {
    [Output::All, Output::Stdout, Output::Stderr].map(|output| {
        let lost = log.lost().of(output);
        let mark = if lost == 0 { 0 } else { gap_text(log, lost).len() as u64 };
        log.totals().of(output).saturating_sub(lost) + mark
    })
}

/// Lengths of the three readings of a log that is complete. Reads all of it where it has gaps.
pub(super) fn sizes(log: &JobLog) -> Result<[u64; 3], LogError> {
    let mut sizes = [0; 3];
    for output in [Output::All, Output::Stdout, Output::Stderr] {
        if log.lost().of(output) == 0 {
            sizes[which(output)] = log.totals().of(output);
            continue;
        }
        let mut cursor = Cursor::start();
        loop {
            sizes[which(output)] += match log.read_source(&mut cursor, output, 1 << 20)? {
                joblog::Chunk::Data(bytes) if bytes.is_empty() => break,
                joblog::Chunk::Data(bytes) => bytes.len() as u64,
                joblog::Chunk::Gap(lost) => gap_text(log, lost.of(output)).len() as u64,
            };
        }
    }
    Ok(sizes)
}

/// What stands in the output where some of it was not kept.
fn gap_text(log: &JobLog, lost: u64) -> String {
    let why = if log.storage_failed() {
        "the host's disk was full"
    } else if log.end() <= log.limit() {
        "the machine had no room for them"
    } else {
        "see config/output_limit"
    };
    format!("\n[machinefs: {lost} bytes were not kept, {why}]\n")
}

/// What a read of a job's output gives.
#[derive(Debug, PartialEq, Eq)]
pub enum Chunk {
    /// Bytes; never empty.
    Data(Vec<u8>),
    /// Nothing yet.
    Pending,
    /// It has ended, and this was all.
    End,
}

/// A private cursor in a job's output.
pub struct OutputReader {
    job: Arc<Job>,
    log: Option<Arc<Mutex<JobLog>>>,
    output: Output,
    cursor: Cursor,
    /// The rest of the text that marks a gap.
    pending: Vec<u8>,
    /// Bytes given so far.
    position: u64,
}

impl OutputReader {
    /// From the first byte.
    pub(super) fn new(job: Arc<Job>, output: Output) -> OutputReader {
        OutputReader { job, log: None, output, cursor: Cursor::start(), pending: Vec::new(), position: 0 }
    }

    /// The next bytes. Reads a file at most (the page cache), never waits for the job.
    ///
    /// # Errors
    /// The spool on the host's disk cannot be read.
    pub fn next(&mut self, max: usize) -> Result<Chunk, MachineError> {
        if max == 0 {
            return Ok(Chunk::Pending);
        }
        if !self.pending.is_empty() {
            let rest = self.pending.split_off(max.min(self.pending.len()));
            let bytes = std::mem::replace(&mut self.pending, rest);
            return Ok(self.give(bytes));
        }
        // Asked before the log is read: what came before the end was in the log before that.
        let done = self.job.is_done();
        let spool = |error: &dyn std::fmt::Display| MachineError::no_space(format!("the host's spool: {error}"));
        let log = match &self.log {
            Some(log) => log.clone(),
            None => {
                let log = match self.job.open_log() {
                    Ok(log) => log,
                    // Nothing was ever saved of a job that was lost before it printed anything.
                    Err(error) if error.kind() == io::ErrorKind::NotFound && done => return Ok(Chunk::End),
                    Err(error) => return Err(spool(&error)),
                };
                self.log.insert(log).clone()
            }
        };
        let (chunk, gap) = {
            let log = log.lock();
            let chunk = log.read_source(&mut self.cursor, self.output, max).map_err(|error| spool(&error))?;
            let gap = match &chunk {
                joblog::Chunk::Gap(lost) => gap_text(&log, lost.of(self.output)),
                joblog::Chunk::Data(_) => String::new(),
            };
            (chunk, gap)
        };
        match chunk {
            joblog::Chunk::Data(bytes) if !bytes.is_empty() => Ok(self.give(bytes)),
            joblog::Chunk::Data(_) if done => Ok(Chunk::End),
            joblog::Chunk::Data(_) => Ok(Chunk::Pending),
            joblog::Chunk::Gap(_) => {
                self.pending = gap.into_bytes();
                self.next(max)
            }
        }
    }

    fn give(&mut self, bytes: Vec<u8>) -> Chunk {
        self.position += bytes.len() as u64;
        Chunk::Data(bytes)
    }

    /// Whether [`OutputReader::next`] would give bytes or the end.
    pub fn is_ready(&self) -> bool {
        !self.pending.is_empty() || self.job.is_done() || self.position < self.job.output_len(self.output)
    }

    /// The job it reads.
    pub fn job(&self) -> &Arc<Job> {
        &self.job
    }

    /// Bytes from an offset on, of a job that has ended; empty at the end.
    ///
    /// # Errors
    /// As [`OutputReader::next`].
    pub fn read_at(&mut self, offset: u64, max: usize) -> Result<Vec<u8>, MachineError> {
        if offset < self.position {
            *self = OutputReader { log: self.log.take(), ..self.job.reader(self.output) };
        }
        while self.position < offset {
            let skip = (offset - self.position).min(1 << 20) as usize;
            if !matches!(self.next(skip)?, Chunk::Data(_)) {
                return Ok(Vec::new());
            }
        }
        let mut found = Vec::new();
        while found.len() < max {
            match self.next(max - found.len())? {
                Chunk::Data(bytes) if found.is_empty() => found = bytes,
                Chunk::Data(bytes) => found.extend_from_slice(&bytes),
                Chunk::Pending | Chunk::End => break,
            }
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use machinefs_protocol::job::{Source, record_header};
    use std::sync::atomic::{AtomicBool, Ordering};

    #[test]
    fn a_gap_says_why() {
        let record = [&record_header(Source::Stdout, 60_000)[..], &vec![b'x'; 60_000]].concat();
        // Far from the limit: the file cannot be made at first.
        let dir = tempfile::tempdir().unwrap();
        let (path, full) = (dir.path().join("1.log"), Arc::new(AtomicBool::new(true)));
        let disk = full.clone();
        let mut log = JobLog::new(
            64 << 20,
            Box::new(move || {
                if disk.load(Ordering::SeqCst) {
                    return Err(io::ErrorKind::StorageFull.into());
                }
                OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path)
            }),
        );
        for round in 0..40 {
            full.store(round < 20, Ordering::SeqCst);
            log.append_records(&record).unwrap();
        }
        assert!(log.storage_failed());
        assert!(gap_text(&log, 1).contains("the host's disk was full"));
        log.save().unwrap();
        let again = open_log(dir.path(), 1).unwrap();
        assert!(again.storage_failed(), "known after a restart");
        assert_eq!(sizes(&again).unwrap(), sizes(&log).unwrap());

        let mut log = new_log(dir.path(), 2, 8192);
        log.append_records(&record).unwrap();
        assert!(gap_text(&log, 1).contains("output_limit"));
    }
}
