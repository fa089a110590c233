//! Jobs: processes the user started, and their output.
//!
//! # The output log
//! What a job prints is kept as a *log*: records one after the other, each a header of 4 bytes and up to 64 KiB of
//! bytes. The header is little-endian: the low 24 bits are the length, the high 8 the [`Source`]. The order of the
//! records is the order in which the agent read them, so a log gives `out` (all), `stdout` and `stderr` (one source).
//! Offsets in a log count all of its bytes, headers included, from the job's start; the host keeps the same log with
//! the same offsets, which makes going on after a lost link a matter of one number.
//!
//! A log is bounded: past its limit, the first half and the last half stay. The missing middle is a *gap*; in the
//! stream it arrives as a record of [`Source::Gap`] whose body is three little-endian u64: the offset after the gap
//! (where the record that follows it really stands), the bytes of stdout lost, the bytes of stderr lost.
//!
//! # The stream
//! [`crate::message::Request::JobAttach`] starts [`crate::frame::Kind::Data`] frames under the request's tag: whole
//! records from the offset asked for. The host grants credit in bytes; the job's end comes as
//! [`crate::message::Event::JobEnded`] after the last of its output was sent on every stream of the job.
//!
//! # Standard input
//! [`crate::message::Request::JobStdin`] opens a stream in the other direction. The answer says how many bytes of the
//! job's input the agent has ever accepted: the host goes on from there, whatever links there were before, so nothing
//! is lost or doubled. The same answer has the first credit; more comes as [`crate::frame::Kind::Credit`] frames when
//! the job has read. An empty data frame is the end of file. The agent ends the stream with an empty data frame once
//! the end was handed to the job, or with an error under its tag: EPIPE when the job ended or closed its input before,
//! ECANCELED when another stream for the same input took its place.

use crate::frame::{FrameError, decode_meta};
use serde::{Deserialize, Serialize};

/// Size of a record's header, in bytes.
pub const RECORD_HEADER: usize = 4;
/// Largest body of a record, in bytes.
pub const MAX_RECORD: usize = 64 * 1024;
/// Largest encoded [`JobSpec`], in bytes: arguments and environment of a program may take 2 MiB by default (execve(2),
/// a quarter of the limit of the stack).
pub const MAX_SPEC: usize = 3 * 1024 * 1024;
/// Largest encoded list of jobs, in bytes.
pub const MAX_LIST: usize = 1024 * 1024;
/// Bytes a new stream may send before the first credit arrives.
pub const INITIAL_CREDIT: u64 = 4 * 1024 * 1024;
/// Bytes of input the agent keeps for a job that does not read it.
pub const STDIN_CREDIT: u64 = 256 * 1024;

/// Where a record's bytes came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[repr(u8)]
pub enum Source {
    /// The job's standard output (or its terminal).
    Stdout = 1,
    /// The job's standard error.
    Stderr = 2,
    /// Not output: a gap, see the module's text.
    Gap = 3,
}

/// Encodes the header of a record. `len` is at most [`MAX_RECORD`].
pub fn record_header(source: Source, len: usize) -> [u8; RECORD_HEADER] {
    ((source as u32) << 24 | (len as u32 & 0x00ff_ffff)).to_le_bytes()
}

/// Decodes the header of a record: its source and the length of its body. `None` when it is not one.
pub fn parse_record_header(header: [u8; RECORD_HEADER]) -> Option<(Source, usize)> {
    let word = u32::from_le_bytes(header);
    let source = match word >> 24 {
        1 => Source::Stdout,
        2 => Source::Stderr,
        3 => Source::Gap,
        _ => return None,
    };
    let len = (word & 0x00ff_ffff) as usize;
    (len <= MAX_RECORD).then_some((source, len))
}

/// How a job is started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobSpec {
    /// When empty, a script is run by `shell` (or by the interpreter its `#!` names); else the program and its
    /// arguments, looked up in the job's PATH.
    pub argv: Vec<Vec<u8>>,
    /// The shell for scripts; empty: bash where the guest has it, else sh.
    pub shell: Vec<u8>,
    /// Working directory; empty: the user's home. A missing one is an error.
    pub cwd: Vec<u8>,
    /// User name or number, `user[:group]` as docker has it; empty: root.
    pub user: Vec<u8>,
    /// `NAME=value`, added to the agent's own small environment (PATH, HOME, USER, SHELL, LANG, and for a terminal
    /// TERM) and to the machine's secrets.
    pub env: Vec<Vec<u8>>,
    /// Milliseconds after which the job and its descendants are killed; 0: never.
    pub timeout_ms: u64,
    /// Bytes of output kept in the guest.
    pub output_limit: u64,
    /// Rows and columns: the job gets a terminal of that size. All it prints is [`Source::Stdout`].
    pub tty: Option<(u16, u16)>,
    /// The job has an input that the host feeds; else it is /dev/null, or for a terminal nothing is ever typed.
    pub stdin: bool,
}

impl JobSpec {
    /// The body of a [`crate::message::Request::JobStart`], and the `spec_len` in its message: the encoded spec, then
    /// the script.
    ///
    /// # Errors
    /// [`FrameError::TooLarge`] when the spec is over [`MAX_SPEC`].
    pub fn start_body(&self, script: &[u8]) -> Result<(u32, Vec<u8>), FrameError> {
        let mut body = postcard::to_allocvec(self).map_err(|error| FrameError::Meta(error.to_string()))?;
        let len = body.len();
        if len > MAX_SPEC {
            return Err(FrameError::TooLarge { meta: len, data: script.len() });
        }
        body.reserve_exact(script.len());
        body.extend_from_slice(script);
        Ok((len as u32, body))
    }

    /// The other way round: the spec and the script of such a body.
    ///
    /// # Errors
    /// [`FrameError::TooLarge`] as above, [`FrameError::Meta`] when there is no spec of that length.
    pub fn from_start_body(spec_len: u32, body: &[u8]) -> Result<(JobSpec, &[u8]), FrameError> {
        let len = spec_len as usize;
        if len > MAX_SPEC {
            return Err(FrameError::TooLarge { meta: len, data: body.len() });
        }
        let (spec, script) =
            body.split_at_checked(len).ok_or_else(|| FrameError::Meta("a start cut short".to_string()))?;
        Ok((decode_meta(spec)?, script))
    }
}

/// How a job ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitReason {
    /// It ended by itself with this code.
    Code(u8),
    /// This signal killed it.
    Signal(u8),
    /// It ran past its time.
    Timeout,
    /// The kernel killed it for want of memory.
    OutOfMemory,
    /// It could not be started: the errno (ENOENT: no such program; EACCES: not executable …).
    NotStarted(i32),
    /// The agent lost track of it (it was restarted itself).
    Lost,
}

impl ExitReason {
    /// The number a shell would show: the code, 128 + the signal, 124 for a time-out, 127 and 126 for a program that
    /// is missing or cannot run.
    pub fn code(self) -> u8 {
        match self {
            ExitReason::Code(code) => code,
            ExitReason::Signal(signal) => 128u8.saturating_add(signal),
            ExitReason::Timeout => 124,
            ExitReason::OutOfMemory => 137,
            ExitReason::NotStarted(2) => 127,
            ExitReason::NotStarted(_) => 126,
            ExitReason::Lost => 125,
        }
    }
}

/// How a job ended, and what it took.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobEnd {
    /// Why.
    pub reason: ExitReason,
    /// Length of the whole log, headers included, in bytes: the host has all of it when it has read so far.
    pub log_end: u64,
    /// Processor time of the job and its waited-for children, in microseconds.
    pub cpu_micros: u64,
    /// Largest resident size, in KiB.
    pub max_rss_kib: u64,
    /// Milliseconds since 1970, the guest's clock, when it ended.
    pub ended_ms: u64,
}

/// A job the agent knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobInfo {
    /// The host's number for it.
    pub job: u64,
    /// Its first process, 0 when it has none any more.
    pub pid: u32,
    /// Milliseconds since 1970 when it started.
    pub started_ms: u64,
    /// Length of its log so far, in bytes.
    pub log_end: u64,
    /// Processor time so far, in microseconds.
    pub cpu_micros: u64,
    /// Resident size, in KiB.
    pub rss_kib: u64,
    /// How it ended, if it has.
    pub end: Option<JobEnd>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_start_is_a_spec_and_a_script() {
        // More than the message of a frame could hold.
        let env = (0..3000).map(|i| format!("VARIABLE_{i}={i:050}").into_bytes()).collect();
        let spec = JobSpec { env, timeout_ms: 7000, ..JobSpec::default() };
        for script in [&b""[..], b"echo \xff\0"] {
            let (len, body) = spec.start_body(script).unwrap();
            assert!(len as usize > crate::frame::MAX_META);
            assert_eq!(JobSpec::from_start_body(len, &body).unwrap(), (spec.clone(), script));
            assert!(JobSpec::from_start_body(len - 1, &body).is_err());
            assert!(JobSpec::from_start_body(len + 1, &body).is_err());
            assert!(JobSpec::from_start_body(u32::MAX, &body).is_err());
        }
        let large = JobSpec { env: vec![vec![b'x'; MAX_SPEC]], ..JobSpec::default() };
        assert!(matches!(large.start_body(b""), Err(FrameError::TooLarge { .. })));
    }
}
