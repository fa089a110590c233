//! Messages: the meta part of frames. New variants are appended, never inserted (golden-bytes tests hold them).

use crate::file::{FileReply, FileRequest};
use crate::job::JobEnd;
use serde::{Deserialize, Serialize};

/// What each side says first. The guest answers the host's; each checks that the versions overlap.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Newest protocol version spoken.
    pub version: u32,
    /// Oldest protocol version spoken.
    pub oldest: u32,
    /// Bits of optional features; none yet.
    pub features: u64,
    /// Host: made anew for each life of the daemon's view of the machine (nodes and handles of an older session are
    /// dropped). Guest: the session it now serves.
    pub session: u128,
    /// Guest: made anew at each start of the agent. Host: 0.
    pub boot: u128,
    /// The build, for people.
    pub build: String,
}

/// What the host asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request<'a> {
    /// Is anybody there? Answer: [`Reply::Ok`].
    Ping,
    /// A file operation.
    #[serde(borrow)]
    File(FileRequest<'a>),
    /// Starts a job under the host's number. How, and the script if there is one, is in the body: see
    /// [`crate::job::JobSpec::start_body`]. Answer: [`Reply::Started`] once the program runs, or the errno; EEXIST when
    /// the number is taken (a retry after a lost link).
    JobStart {
        /// The host's number.
        job: u64,
        /// Bytes of the body that are the spec; the rest is the script.
        spec_len: u32,
    },
    /// Streams the job's log from that offset under this request's tag, until the job ended and all of it was sent.
    /// Answer: [`Reply::Ok`], at once. ENOENT when there is no such job.
    JobAttach {
        /// The job.
        job: u64,
        /// From which byte of its log on.
        offset: u64,
    },
    /// Sends a signal to the job's process group, or to all its processes; also to those that live on when its first
    /// process has ended. ESRCH when there are none. SIGKILL to all comes back when none is left. Answer:
    /// [`Reply::Ok`].
    JobSignal {
        /// The job.
        job: u64,
        /// The signal's number.
        signal: i32,
        /// To every descendant, not only the process group.
        all: bool,
    },
    /// Which jobs are there. Answer: [`Reply::Jobs`].
    JobList,
    /// The host has all it wants of this job: kills it if it runs, and drops its log. Answer: [`Reply::Ok`].
    JobForget {
        /// The job.
        job: u64,
    },
    /// Facts about the guest. Answer: [`Reply::Info`].
    Info,
    /// End the guest: SIGTERM to everything, SIGKILL after the grace, then the agent exits (and with it a container)
    /// or powers off. Answer: [`Reply::Ok`], before it begins.
    Shutdown {
        /// Milliseconds between SIGTERM and SIGKILL.
        grace_ms: u32,
    },
    /// Sets the guest's clock, nanoseconds since 1970. EPERM where it is the host's own. Answer: [`Reply::Ok`].
    SetClock {
        /// The time.
        unix_nanos: u64,
    },
    /// What the agent has logged since its start, bounded, in the body. Answer: [`Reply::Data`].
    ReadLog,
    /// Opens a stream for the job's standard input under this request's tag, in place of an earlier one (see
    /// [`crate::job`]). Answer: [`Reply::Stdin`]. ENOENT when there is no such job or it has no such input; EPIPE when
    /// nobody reads it any more; EINVAL when `offset` is past what was accepted.
    JobStdin {
        /// The job.
        job: u64,
        /// The first byte of the input that the host still has.
        offset: u64,
    },
    /// Sets the size of a job's terminal; its foreground processes get SIGWINCH. ENOTTY when it has none, ESRCH when
    /// it has ended. Answer: [`Reply::Ok`].
    JobResize {
        /// The job.
        job: u64,
        /// Rows.
        rows: u16,
        /// Columns.
        cols: u16,
    },
    /// Connects to a port of the guest's loopback, IPv4 before IPv6, and makes this tag a stream in both directions
    /// (see [`crate::port`]). Answer: [`Reply::Ok`], or the errno of connect(2).
    Connect {
        /// The TCP port.
        port: u16,
    },
    /// Replaces the machine's secrets by those in the body ([`crate::secret`]). The agent has them in its memory only.
    /// EINVAL when one cannot be an environment variable. Answer: [`Reply::Ok`].
    SetSecrets,
}

/// What the guest answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// Done.
    Ok,
    /// A file operation's answer.
    File(FileReply),
    /// The job runs.
    Started {
        /// Its first process, in the guest's numbering.
        pid: u32,
        /// Milliseconds since 1970, the guest's clock.
        started_ms: u64,
    },
    /// The jobs there are: a list of [`crate::job::JobInfo`] is in the body, at most [`crate::job::MAX_LIST`] bytes.
    Jobs,
    /// Facts about the guest.
    Info(GuestInfo),
    /// The bytes are in the body.
    Data,
    /// A job's input can be sent.
    Stdin {
        /// Bytes of it that were ever accepted: the next one to send.
        offset: u64,
        /// Bytes that may be sent before the first credit.
        credit: u64,
        /// Its end was accepted too: nothing is left to send.
        ended: bool,
    },
}

/// Facts about the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestInfo {
    /// The agent's version.
    pub version: String,
    /// uname -r.
    pub kernel: String,
    /// Host name.
    pub hostname: String,
    /// `PRETTY_NAME` of os-release(5).
    pub os: String,
    /// Seconds since the agent started.
    pub uptime_secs: u64,
    /// The guest's clock, nanoseconds since 1970.
    pub clock_nanos: u64,
    /// Network addresses, without loopback.
    pub addresses: Vec<String>,
    /// Whether the agent is process 1.
    pub is_init: bool,
    /// Uid and gid of the guest's default user.
    pub default_user: (u32, u32),
}

/// Why a request failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Linux errno, x86-64 numbers, 1 to 4095.
    pub errno: i32,
    /// For people; may be empty.
    pub message: String,
}

/// More bytes allowed on a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credit {
    /// Bytes.
    pub bytes: u64,
}

/// What the host says and wants no answer to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Notice {
    /// Gives up so many holds on each node.
    Forget(Vec<(u64, u64)>),
    /// Closes a file handle; `flock` locks of `owner` on it end.
    Release {
        /// The handle.
        fh: u64,
        /// The lock owner.
        owner: u64,
    },
    /// Closes a directory handle.
    ReleaseDir {
        /// The handle.
        fh: u64,
    },
}

/// What the guest says unasked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// A job ended and all streams of it have been sent to their end.
    JobEnded {
        /// The job.
        job: u64,
        /// How.
        end: JobEnd,
    },
}
