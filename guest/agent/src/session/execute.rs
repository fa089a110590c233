//! Executing one request.

use super::connection::{Connection, Work};
use super::requests::InFlight;
use crate::files::Cancelled;
use crate::jobs::{JobError, Kill, errno_text};
use machinefs_protocol::frame::{Kind, decode_meta, encode_meta};
use machinefs_protocol::job::JobSpec;
use machinefs_protocol::message::{Failure, Reply, Request};
use std::time::Duration;
use zeroize::Zeroize;

/// An answer: a message and a body.
type Answer = Result<(Reply, Vec<u8>), Failure>;

/// A failure of that errno and text.
pub fn failure(errno: i32, message: impl Into<String>) -> Failure {
    Failure { errno, message: message.into() }
}

impl From<JobError> for Failure {
    fn from(error: JobError) -> Failure {
        Failure { errno: error.errno(), message: error.to_string() }
    }
}

impl Connection {
    /// Executes a request on this thread and answers it.
    pub(super) fn execute(&self, work: &mut Work) {
        work.state.begin();
        let late = work.deadline_ms > 0 && work.arrived.elapsed() >= Duration::from_millis(u64::from(work.deadline_ms));
        let request = match decode_meta::<Request>(&work.meta) {
            Ok(request) => request,
            Err(error) => {
                work.state.finish();
                self.requests.remove(work.tag);
                return self.malformed(&error);
            }
        };
        let answer = if work.state.is_cancelled() {
            Err(failure(libc::EINTR, ""))
        } else if late {
            Err(failure(libc::ETIMEDOUT, ""))
        } else {
            self.perform(&request, &work.body, work.tag, &work.state)
        };
        work.state.finish();
        self.requests.remove(work.tag);
        self.answer(work.tag, &answer);
        self.afterwards(&request, work.tag, answer.is_ok());
        if matches!(request, Request::SetSecrets) {
            work.body.zeroize();
        }
    }

    fn perform(&self, request: &Request<'_>, body: &[u8], tag: u64, state: &InFlight) -> Answer {
        let jobs = self.server.jobs();
        let plain = |reply| Ok((reply, Vec::new()));
        match request {
            Request::Ping => {
                // Also asked before the host unmounts something here.
                self.server.files().trim();
                plain(Reply::Ok)
            }
            Request::File(request) => match self.server.files().handle(request, body, state) {
                Ok((reply, body)) => Ok((Reply::File(reply), body)),
                Err(error) => Err(error.into()),
            },
            Request::JobStart { job, spec_len } => {
                let (spec, script) = JobSpec::from_start_body(*spec_len, body)
                    .map_err(|error| failure(libc::EINVAL, format!("the job's description: {error}")))?;
                self.streams.hold(*job);
                let (pid, started_ms) = jobs.start(*job, &spec, script)?;
                plain(Reply::Started { pid, started_ms })
            }
            Request::JobStdin { job, offset } => {
                let stdin = jobs.get(*job)?.stdin.clone();
                let stdin = stdin.ok_or_else(|| failure(libc::ENOENT, format!("job {job} is fed no input")))?;
                let taken = self.streams.add_input(tag, stdin.clone());
                taken.map_err(|error| failure(error.errno(), error.to_string()))?;
                let begun = stdin.open(tag, self.streams.clone(), *offset).map_err(|error| {
                    self.streams.remove_input(tag);
                    failure(error.errno(), error.to_string())
                })?;
                plain(Reply::Stdin { offset: begun.offset, credit: begun.credit, ended: begun.ended })
            }
            Request::JobResize { job, rows, cols } => {
                jobs.get(*job)?.resize(*rows, *cols)?;
                plain(Reply::Ok)
            }
            Request::Connect { port } => {
                let connected = self.ports.connect(tag, *port, &self.writer, state);
                connected.map_err(|error| {
                    let errno = error.raw_os_error().unwrap_or(libc::EIO);
                    failure(errno, format!("port {port}: {}", errno_text(errno)))
                })?;
                plain(Reply::Ok)
            }
            Request::SetSecrets => {
                self.server.secrets().replace(body).map_err(|error| failure(libc::EINVAL, error.to_string()))?;
                plain(Reply::Ok)
            }
            Request::JobAttach { job, offset } => {
                let job = jobs.get(*job)?;
                job.cursor_at(*offset)?;
                self.streams.check(tag).map_err(|error| failure(error.errno(), error.to_string()))?;
                plain(Reply::Ok)
            }
            Request::JobSignal { job, signal, all } => {
                jobs.signal(*job, *signal, if *all { Kill::All } else { Kill::Group })?;
                plain(Reply::Ok)
            }
            Request::JobList => {
                let list = postcard::to_allocvec(&jobs.list());
                Ok((Reply::Jobs, list.map_err(|error| failure(libc::EOVERFLOW, error.to_string()))?))
            }
            Request::JobForget { job } => {
                jobs.forget(*job)?;
                plain(Reply::Ok)
            }
            Request::Info => plain(Reply::Info(crate::info::gather(&self.server))),
            Request::Shutdown { .. } => {
                jobs.close();
                plain(Reply::Ok)
            }
            Request::SetClock { unix_nanos } => {
                set_clock(*unix_nanos)?;
                plain(Reply::Ok)
            }
            Request::ReadLog => Ok((Reply::Data, crate::log::kept())),
        }
    }

    /// What has to come after the answer.
    fn afterwards(&self, request: &Request<'_>, tag: u64, succeeded: bool) {
        match request {
            Request::JobStart { job, .. } => self.streams.release(*job),
            Request::JobStdin { .. } if succeeded => {
                if let Some(stdin) = self.streams.input(tag) {
                    stdin.release(tag);
                }
            }
            Request::Connect { .. } if succeeded => self.ports.release(tag),
            Request::JobAttach { job, offset } if succeeded => {
                // Either may be gone by now: the job forgotten, or the offset's record dropped (then a gap follows).
                if let Ok(job) = self.server.jobs().get(*job)
                    && let Ok(cursor) = job.cursor_at(*offset)
                {
                    self.streams.attach(tag, job, cursor);
                }
            }
            Request::Shutdown { grace_ms } if succeeded => {
                self.server.shutdown(Duration::from_millis(u64::from(*grace_ms)));
            }
            _ => {}
        }
    }

    /// Writes an answer. A stream that fails is closed.
    pub(super) fn answer(&self, tag: u64, answer: &Answer) {
        let mut meta = Vec::with_capacity(128);
        let encoded = match answer {
            Ok((reply, _)) => encode_meta(reply, &mut meta).map(|_| Kind::Reply),
            Err(failure) => encode_meta(failure, &mut meta).map(|_| Kind::Error),
        };
        let kind = encoded.unwrap_or_else(|error| {
            // A message too long for its frame.
            let failure = failure(libc::EOVERFLOW, error.to_string());
            if encode_meta(&failure, &mut meta).is_err() {
                meta.clear();
            }
            Kind::Error
        });
        let body = match answer {
            Ok((_, body)) if kind == Kind::Reply => body.as_slice(),
            _ => &[],
        };
        if self.writer.send_with_body(kind, tag, &meta, body).is_err() {
            self.close();
        }
    }
}

fn set_clock(unix_nanos: u64) -> Result<(), Failure> {
    let time = rustix::time::Timespec {
        tv_sec: (unix_nanos / 1_000_000_000) as i64,
        tv_nsec: (unix_nanos % 1_000_000_000) as i64,
    };
    rustix::time::clock_settime(rustix::time::ClockId::Realtime, time)
        .map_err(|errno| failure(errno.raw_os_error(), "setting the clock"))
}
