//! Files that block, each open one with a cursor of its own: output and exit code of a job, and what is in `wait/`.

use super::logs::LogRef;
use super::pending::Watched;
use super::wait::Wanted;
use crate::errno::Errno;
use crate::machine::Machine;
use crate::machine::job::Job;
use crate::machine::output::{Chunk, Output, OutputReader};
use crate::machine::textlog::LogCursor;
use std::sync::Arc;

/// How much is read ahead to see whether there is anything (poll), in bytes.
const PEEK: usize = 64 * 1024;

/// What a read gives: bytes (none at the end), or why it fails. `None`: nothing yet.
pub type Taken = Option<Result<Vec<u8>, Errno>>;

/// A cursor in something that grows.
pub enum Stream {
    /// What a job prints.
    Output(OutputStream),
    /// A job's exit code.
    Exit(Arc<Job>, Once),
    /// A machine's state.
    State(Arc<Machine>, Wanted, Once),
    /// What a log gets from now on.
    Follow(Follow),
}

impl Stream {
    /// Output of a job, from its first byte.
    pub fn output(job: &Arc<Job>, which: Output) -> Stream {
        Stream::Output(OutputStream::new(job, which))
    }

    /// A log, from now on.
    pub fn follow(log: LogRef) -> Stream {
        let cursor = log.log().follow();
        Stream::Follow(Follow { log, cursor, peeked: Vec::new() })
    }

    /// Takes up to `max` bytes.
    pub fn take(&mut self, max: usize) -> Taken {
        match self {
            Stream::Output(output) => output.take(max),
            Stream::Exit(job, once) => once.take(max, || exit_text(job)),
            Stream::State(machine, wanted, once) => once.take(max, || wanted.text(machine.state())),
            Stream::Follow(follow) => follow.take(max),
        }
    }

    /// Whether `take` would give something (or the end, or an error) now.
    pub fn ready(&mut self) -> bool {
        match self {
            Stream::Output(output) => output.ready(),
            Stream::Exit(job, once) => once.ready(|| exit_text(job)),
            Stream::State(machine, wanted, once) => once.ready(|| wanted.text(machine.state())),
            Stream::Follow(follow) => follow.ready(),
        }
    }

    /// What changes before `take` gives something.
    pub fn watches(&self) -> Vec<Watched> {
        match self {
            Stream::Output(output) => vec![Watched::Job(output.job.clone())],
            Stream::Exit(job, _) => vec![Watched::Job(job.clone())],
            Stream::State(machine, _, _) => vec![Watched::State(machine.clone())],
            Stream::Follow(follow) => std::iter::once(Watched::Log(follow.log.clone()))
                .chain(follow.log.machine().cloned().map(Watched::State))
                .collect(),
        }
    }
}

/// The text of `exit`: the number alone, or why there is none. `None` while the job runs.
pub fn exit_text(job: &Job) -> Taken {
    job.exit().map(|exit| exit.map(|code| format!("{code}\n").into_bytes()).map_err(|error| error.errno()))
}

/// Output of a job.
pub struct OutputStream {
    job: Arc<Job>,
    reader: OutputReader,
}

impl OutputStream {
    /// From the first byte.
    pub fn new(job: &Arc<Job>, which: Output) -> OutputStream {
        OutputStream { job: job.clone(), reader: job.reader(which) }
    }

    /// Takes up to `max` bytes, none at the end.
    pub fn take(&mut self, max: usize) -> Taken {
        match self.reader.next(max) {
            Ok(Chunk::Data(data)) => Some(Ok(data)),
            Ok(Chunk::Pending) => None,
            Ok(Chunk::End) => Some(Ok(Vec::new())),
            Err(error) => Some(Err(error.errno())),
        }
    }

    /// Whether `take` would give something now.
    pub fn ready(&self) -> bool {
        self.reader.is_ready()
    }
}

/// A log from the time it was opened.
pub struct Follow {
    log: LogRef,
    cursor: LogCursor,
    peeked: Vec<u8>,
}

impl Follow {
    fn take(&mut self, max: usize) -> Taken {
        if !self.peeked.is_empty() {
            return Some(Ok(take_front(&mut self.peeked, max)));
        }
        let data = self.cursor.next(max);
        if data.is_empty() && self.ended() {
            // What was written before the end may have come after the first look.
            return Some(Ok(self.cursor.next(max)));
        }
        (!data.is_empty()).then_some(Ok(data))
    }

    fn ready(&mut self) -> bool {
        if self.peeked.is_empty() {
            self.peeked = self.cursor.next(PEEK);
        }
        !self.peeked.is_empty() || self.ended()
    }

    fn ended(&self) -> bool {
        self.log.machine().is_some_and(|machine| machine.is_destroyed())
    }
}

/// A text that comes once, and is then there.
#[derive(Default)]
pub struct Once {
    text: Option<Vec<u8>>,
    given: usize,
}

impl Once {
    fn take(&mut self, max: usize, resolve: impl FnOnce() -> Taken) -> Taken {
        if self.text.is_none() {
            match resolve()? {
                Ok(text) => self.text = Some(text),
                Err(errno) => return Some(Err(errno)),
            }
        }
        let rest = self.text.as_deref().and_then(|text| text.get(self.given..)).unwrap_or_default();
        let part = rest.get(..max).unwrap_or(rest).to_vec();
        self.given += part.len();
        Some(Ok(part))
    }

    fn ready(&self, resolve: impl FnOnce() -> Taken) -> bool {
        self.text.is_some() || resolve().is_some()
    }
}

fn take_front(data: &mut Vec<u8>, max: usize) -> Vec<u8> {
    if data.len() <= max {
        return std::mem::take(data);
    }
    let rest = data.split_off(max);
    std::mem::replace(data, rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_comes_in_any_pieces_and_ends() {
        let mut once = Once::default();
        assert!(once.take(10, || None).is_none());
        assert!(!once.ready(|| None));
        assert_eq!(once.take(1, || Some(Ok(b"0\n".to_vec()))), Some(Ok(b"0".to_vec())));
        assert!(once.ready(|| None));
        assert_eq!(once.take(10, || None), Some(Ok(b"\n".to_vec())));
        assert_eq!(once.take(10, || None), Some(Ok(Vec::new())));
    }

    #[test]
    fn the_front_is_taken() {
        let mut data = b"abcdef".to_vec();
        assert_eq!(take_front(&mut data, 2), b"ab");
        assert_eq!(take_front(&mut data, 9), b"cdef");
        assert!(data.is_empty());
    }
}
