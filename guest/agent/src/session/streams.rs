//! Streams of job output and input on one connection. One thread of their own sends for them: neither a job nor
//! another request waits for a slow reader.

use super::{Stdin, Writer};
use crate::jobs::{Job, errno_text};
use machinefs_protocol::frame::{Kind, MAX_DATA, encode_meta};
use machinefs_protocol::job::{INITIAL_CREDIT, JobEnd, MAX_RECORD, RECORD_HEADER};
use machinefs_protocol::joblog::{Cursor, LogError};
use machinefs_protocol::message::{Credit, Event, Failure};
use parking_lot::{Condvar, Mutex};
use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};
use thiserror::Error;

/// Streams of one connection, at most.
const MAX_STREAMS: usize = 16 * 1024;

/// A stream with less credit than this waits for more. The credit returns in full, so it will come.
const ENOUGH: usize = 2 * RECORD_HEADER + MAX_RECORD + 24;

/// Why a stream cannot begin.
#[derive(Debug, Error)]
pub enum StreamError {
    /// There is one under that tag.
    #[error("there is a stream of that number")]
    Taken,
    /// There are as many as there may be.
    #[error("too many streams at once")]
    TooMany,
}

impl StreamError {
    /// The errno for it.
    pub fn errno(&self) -> i32 {
        match self {
            StreamError::Taken => libc::EEXIST,
            StreamError::TooMany => libc::EMFILE,
        }
    }
}

/// The streams of one connection.
#[derive(Debug, Default)]
pub struct Streams {
    table: Mutex<Table>,
    wake: Condvar,
    idle: Condvar,
}

#[derive(Debug, Default)]
struct Table {
    streams: HashMap<u64, Stream>,
    by_job: HashMap<u64, Vec<u64>>,
    /// Tags of streams that may have something to send.
    ready: VecDeque<u64>,
    /// Ends of jobs to be told.
    events: VecDeque<(u64, JobEnd)>,
    /// Jobs whose start is not answered yet, and their ends if they have ended meanwhile.
    held: HashMap<u64, Option<JobEnd>>,
    /// Inputs of jobs, by the tags of their streams.
    inputs: HashMap<u64, Arc<Stdin>>,
    /// Credit to give to the host for what jobs have read, by tag.
    credits: HashMap<u64, u64>,
    /// Streams of input that have come to their end, and why if not by the host's will.
    finished: VecDeque<(u64, Option<i32>)>,
    sending: bool,
    closed: bool,
}

#[derive(Debug)]
struct Stream {
    job: Arc<Job>,
    cursor: Cursor,
    credit: u64,
    queued: bool,
}

/// What the thread does next.
enum Step {
    Credit(u64, u64),
    Finished(u64, Option<i32>),
    Event(u64, JobEnd),
    Stream { tag: u64, job: Arc<Job>, cursor: Cursor, credit: u64 },
}

impl Table {
    fn queue(&mut self, tag: u64) {
        if let Some(stream) = self.streams.get_mut(&tag)
            && !stream.queued
        {
            stream.queued = true;
            self.ready.push_back(tag);
        }
    }

    fn queue_job(&mut self, job: u64) -> bool {
        let tags = self.by_job.get(&job).cloned().unwrap_or_default();
        for tag in &tags {
            self.queue(*tag);
        }
        !tags.is_empty()
    }

    fn remove(&mut self, tag: u64) {
        let Some(stream) = self.streams.remove(&tag) else { return };
        let job = stream.job.number();
        if let Some(tags) = self.by_job.get_mut(&job) {
            tags.retain(|other| *other != tag);
            if tags.is_empty() {
                self.by_job.remove(&job);
            }
        }
    }

    fn ended(&mut self, job: u64, end: JobEnd) {
        if let Some(held) = self.held.get_mut(&job) {
            *held = Some(end);
        } else if !self.queue_job(job) {
            self.events.push_back((job, end));
        }
    }

    fn next(&mut self) -> Option<Step> {
        if let Some(tag) = self.credits.keys().next().copied() {
            return self.credits.remove(&tag).map(|bytes| Step::Credit(tag, bytes));
        }
        if let Some((tag, errno)) = self.finished.pop_front() {
            return Some(Step::Finished(tag, errno));
        }
        if let Some((job, end)) = self.events.pop_front() {
            return Some(Step::Event(job, end));
        }
        while let Some(tag) = self.ready.pop_front() {
            if let Some(stream) = self.streams.get_mut(&tag) {
                stream.queued = false;
                let Stream { job, cursor, credit, .. } = stream;
                return Some(Step::Stream { tag, job: job.clone(), cursor: *cursor, credit: *credit });
            }
        }
        None
    }
}

impl Streams {
    /// Whether a stream can begin under that tag.
    ///
    /// # Errors
    /// [`StreamError`].
    pub fn check(&self, tag: u64) -> Result<(), StreamError> {
        let table = self.table.lock();
        if table.streams.contains_key(&tag) || table.inputs.contains_key(&tag) {
            return Err(StreamError::Taken);
        }
        if table.streams.len() + table.inputs.len() >= MAX_STREAMS { Err(StreamError::TooMany) } else { Ok(()) }
    }

    /// Starts a stream of that job's log, unless the connection is closed or the tag was taken meanwhile.
    pub fn attach(&self, tag: u64, job: Arc<Job>, cursor: Cursor) {
        let mut table = self.table.lock();
        if table.closed || table.streams.contains_key(&tag) {
            return;
        }
        table.by_job.entry(job.number()).or_default().push(tag);
        table.streams.insert(tag, Stream { job, cursor, credit: INITIAL_CREDIT, queued: false });
        table.queue(tag);
        self.wake.notify_one();
    }

    /// The host gave credit.
    pub fn credit(&self, tag: u64, bytes: u64) {
        let mut table = self.table.lock();
        if let Some(stream) = table.streams.get_mut(&tag) {
            stream.credit = stream.credit.saturating_add(bytes);
            table.queue(tag);
            self.wake.notify_one();
        }
    }

    /// What comes under that tag from now on is for that input.
    ///
    /// # Errors
    /// [`StreamError`].
    pub fn add_input(&self, tag: u64, stdin: Arc<Stdin>) -> Result<(), StreamError> {
        self.check(tag)?;
        let mut table = self.table.lock();
        if !table.closed {
            table.inputs.insert(tag, stdin);
        }
        Ok(())
    }

    /// The input that is fed under that tag.
    pub fn input(&self, tag: u64) -> Option<Arc<Stdin>> {
        self.table.lock().inputs.get(&tag).cloned()
    }

    /// Nothing is fed under that tag any more.
    pub fn remove_input(&self, tag: u64) -> Option<Arc<Stdin>> {
        self.table.lock().inputs.remove(&tag)
    }

    /// A stream of input has come to its end; with an errno if that was not as the host wanted it.
    pub fn finish(&self, tag: u64, errno: Option<i32>) {
        let mut table = self.table.lock();
        if table.inputs.remove(&tag).is_some() {
            table.finished.push_back((tag, errno));
            self.wake.notify_one();
        }
    }

    /// Gives the host credit.
    pub fn give(&self, tag: u64, bytes: u64) {
        let mut table = self.table.lock();
        if bytes > 0 && !table.closed {
            *table.credits.entry(tag).or_default() += bytes;
            self.wake.notify_one();
        }
    }

    /// The host ends a stream.
    pub fn detach(&self, tag: u64) {
        self.table.lock().remove(tag);
        if let Some(stdin) = self.remove_input(tag) {
            stdin.withdraw(tag);
        }
    }

    /// The job has new output.
    pub fn output(&self, job: u64) {
        let mut table = self.table.lock();
        if table.queue_job(job) {
            self.wake.notify_one();
        }
    }

    /// The job ended; its log is complete.
    pub fn ended(&self, job: u64, end: JobEnd) {
        let mut table = self.table.lock();
        if !table.closed {
            table.ended(job, end);
            self.wake.notify_one();
        }
    }

    /// Keeps the job's end back until [`Streams::release`], so that the answer to its start comes first.
    pub fn hold(&self, job: u64) {
        self.table.lock().held.insert(job, None);
    }

    /// See [`Streams::hold`].
    pub fn release(&self, job: u64) {
        let mut table = self.table.lock();
        if let Some(Some(end)) = table.held.remove(&job) {
            table.ended(job, end);
            self.wake.notify_one();
        }
    }

    /// The job is forgotten: its streams end without a word.
    pub fn forget(&self, job: u64) {
        let mut table = self.table.lock();
        for tag in table.by_job.remove(&job).unwrap_or_default() {
            table.streams.remove(&tag);
        }
    }

    /// Ends the thread.
    pub fn close(&self) {
        // Dropped outside of the lock: with an input a job may go, and with that what it had on another connection.
        let _all = {
            let mut table = self.table.lock();
            self.wake.notify_all();
            std::mem::replace(&mut *table, Table { closed: true, ..Table::default() })
        };
    }

    /// Waits until all there is to send was sent, or the time is over. Streams without credit do not count.
    pub fn flush(&self, patience: Duration) {
        let until = Instant::now() + patience;
        let mut table = self.table.lock();
        let busy = |table: &mut Table| {
            !table.closed
                && (table.sending
                    || !table.credits.is_empty()
                    || !table.finished.is_empty()
                    || !table.events.is_empty()
                    || !table.ready.is_empty())
        };
        self.idle.wait_while_until(&mut table, busy, until);
    }

    /// The thread's body: ends with the connection.
    pub fn run(&self, writer: &Writer) -> io::Result<()> {
        let mut table = self.table.lock();
        loop {
            if table.closed {
                return Ok(());
            }
            table.sending = true;
            let Some(step) = table.next() else {
                table.sending = false;
                self.idle.notify_all();
                self.wake.wait(&mut table);
                continue;
            };
            drop(table);
            self.perform(step, writer)?;
            table = self.table.lock();
        }
    }

    fn perform(&self, step: Step, writer: &Writer) -> io::Result<()> {
        let mut meta = Vec::new();
        match step {
            Step::Credit(tag, bytes) => {
                encode_meta(&Credit { bytes }, &mut meta).map_err(io::Error::other)?;
                writer.send(Kind::Credit, 0, tag, &meta, &[])
            }
            Step::Finished(tag, None) => writer.send(Kind::Data, 0, tag, &[], &[]),
            Step::Finished(tag, Some(errno)) => {
                encode_meta(&Failure { errno, message: errno_text(errno) }, &mut meta).map_err(io::Error::other)?;
                writer.send(Kind::Error, 0, tag, &meta, &[])
            }
            Step::Event(job, end) => {
                encode_meta(&Event::JobEnded { job, end }, &mut meta).map_err(io::Error::other)?;
                writer.send(Kind::Event, 0, 0, &meta, &[])
            }
            Step::Stream { tag, job, mut cursor, credit } => {
                // Asked before the log is read: an ended job's log does not grow.
                let end = job.end();
                let max = usize::try_from(credit).unwrap_or(usize::MAX).min(MAX_DATA);
                // With less credit than a gap and a record may need, it would go from gap to gap, with no output.
                let records = if max < ENOUGH { Ok(Vec::new()) } else { job.read_records(&mut cursor, max) };
                let records = match records {
                    Ok(records) => records,
                    Err(error) => return self.fail(tag, &error, writer),
                };
                if !records.is_empty() {
                    writer.send(Kind::Data, 0, tag, &[], &records)?;
                }
                let mut table = self.table.lock();
                let Some(stream) = table.streams.get_mut(&tag) else { return Ok(()) };
                stream.cursor = cursor;
                stream.credit = stream.credit.saturating_sub(records.len() as u64);
                if !records.is_empty() {
                    table.queue(tag);
                } else if let Some(end) = end
                    && cursor.offset() >= end.log_end
                {
                    table.remove(tag);
                    if !table.by_job.contains_key(&job.number()) {
                        table.ended(job.number(), end);
                    }
                }
                Ok(())
            }
        }
    }

    /// A log that cannot be read ends its stream with an error under its tag.
    fn fail(&self, tag: u64, error: &LogError, writer: &Writer) -> io::Result<()> {
        self.table.lock().remove(tag);
        crate::log::line(format_args!("stream {tag}: {error}"));
        let mut meta = Vec::new();
        let failure = Failure { errno: libc::EIO, message: error.to_string() };
        encode_meta(&failure, &mut meta).map_err(io::Error::other)?;
        writer.send(Kind::Error, 0, tag, &meta, &[])
    }
}
