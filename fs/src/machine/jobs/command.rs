//! The verbs of a job's `ctl`.

use super::super::error::MachineError;
use super::super::job::{Job, Phase};
use super::super::setup::Field;
use super::super::{Verb, signals, verbs};
use super::Jobs;
use crate::errno::Errno;
use crate::link::{Link, LinkError, RequestOptions};
use machinefs_protocol::job::ExitReason;
use machinefs_protocol::message::Request;
use std::sync::Arc;
use std::time::Duration;

/// The verbs of a job's `ctl`.
pub const JOB_VERBS: &[Verb] = &[
    Verb { name: "signal", usage: "signal NAME", doc: "send a signal (TERM, INT, 9 …) to its process group" },
    Verb {
        name: "kill",
        usage: "kill",
        doc: "end it and all its descendants, whatever they do; succeeds when it has ended",
    },
    Verb { name: "winsize", usage: "winsize ROWS COLUMNS", doc: "size of its terminal; also before the start" },
    Verb { name: "eof", usage: "eof", doc: "end its input" },
    Verb { name: "keep-stdin", usage: "keep-stdin", doc: "its input does not end when the last writer closes it" },
];

/// After this, a job that was just given to the agent is looked for again.
const STARTING: Duration = Duration::from_millis(20);

/// Called with what became of a command.
type Done = Box<dyn FnOnce(Result<(), MachineError>) + Send>;

impl Jobs {
    /// A line of a job's `ctl`, already split into words. `done` is called when it has been carried out, or not.
    pub fn command(&self, job: &Arc<Job>, words: &[String], done: Done) {
        let (verb, args) = words.split_first().map_or(("", &[][..]), |(verb, args)| (verb.as_str(), args));
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let input = job.input();
        let no_input = |_| MachineError::busy("it has no input: open stdin, or say keep-stdin, before the start");
        match (verb, args.as_slice()) {
            ("signal", [name]) => match signals::parse(name) {
                Some(signal) => {
                    self.ask(job, false, &Request::JobSignal { job: job.number(), signal, all: false }, done)
                }
                None => {
                    done(Err(MachineError::invalid(format!("unknown signal \"{name}\": a name as TERM, or a number"))))
                }
            },
            ("kill", []) => {
                let request = Request::JobSignal { job: job.number(), signal: libc::SIGKILL, all: true };
                self.ask(job, true, &request, done);
            }
            ("winsize", [rows, columns]) => match (rows.parse(), columns.parse()) {
                (Ok(rows @ 1..), Ok(cols @ 1..)) => self.resize(job, rows, cols, done),
                _ => done(Err(MachineError::invalid("rows and columns are numbers from 1 to 65535"))),
            },
            ("eof", []) => {
                if !job.is_being_set_up() {
                    input.end();
                    return done(Ok(()));
                }
                done(Err(MachineError::busy("the job has not started")));
            }
            ("keep-stdin", []) => done(input.keep_open().map_err(no_input)),
            _ => done(Err(verbs::wrong(JOB_VERBS, words))),
        }
    }

    fn resize(&self, job: &Arc<Job>, rows: u16, cols: u16, done: Done) {
        if job.is_being_set_up() {
            return done(job.set_field(Field::Tty, format!("{rows} {cols}").as_bytes()));
        }
        self.ask(job, false, &Request::JobResize { job: job.number(), rows, cols }, done);
    }

    /// Asks the agent. `ends`: that it has ended is what is wanted.
    fn ask(&self, job: &Arc<Job>, ends: bool, request: &Request<'static>, done: Done) {
        let machine = match self.machine() {
            Ok(machine) => machine,
            Err(error) => return done(Err(error)),
        };
        // Looked at before the request: the answer to its start may overtake the answer to this.
        let was_starting = job.phase() == Phase::Starting;
        let link = match self.link_for(job, ends) {
            Ok(Some(link)) => link,
            Ok(None) => return done(Ok(())),
            Err(error) => return done(Err(error)),
        };
        let (asked, again) = (job.clone(), request.clone());
        let answered = Box::new(move |answer: Result<crate::link::Response, LinkError>| {
            let unknown = matches!(answer, Err(LinkError::Remote { errno: Errno::ESRCH | Errno::ENOENT, .. }));
            // Its start was still on the way: it would run on behind this.
            if unknown && (asked.phase() == Phase::Starting || (was_starting && asked.phase() == Phase::Running)) {
                machine.shared.runtime.clone().spawn(async move {
                    tokio::time::sleep(STARTING).await;
                    machine.jobs.ask(&asked, ends, &again, done);
                });
                return;
            }
            done(match answer {
                Ok(_) => Ok(()),
                Err(_) if unknown && ends => Ok(()),
                Err(_) if unknown => Err(MachineError::busy("the job has ended")),
                Err(LinkError::Remote { errno: Errno::ENOTTY, .. }) => Err(MachineError::busy("it has no terminal")),
                Err(error) => Err(MachineError::unreachable(format!("the agent: {error}"))),
            });
        });
        link.request(request, &[], RequestOptions::within(link.op_deadline()), answered);
    }

    /// The agent that a job runs with; nobody where nothing is left to be done.
    fn link_for(&self, job: &Arc<Job>, ends: bool) -> Result<Option<Arc<Link>>, MachineError> {
        let machine = self.machine()?;
        match job.phase() {
            Phase::Writing => Err(MachineError::busy("the job has not started")),
            Phase::Queued if ends => {
                self.end_without_output(&machine, job, ExitReason::Signal(libc::SIGKILL as u8));
                Ok(None)
            }
            Phase::Queued => Err(MachineError::busy("the job waits for the machine")),
            Phase::Lost(why) if !ends => Err(MachineError::busy(format!("the job was lost: {why}"))),
            // What it has left behind may still be there.
            Phase::Ended(_) if !ends && !job.is_at_agent() => Err(MachineError::busy("the job has ended")),
            // With the machine, all that it left behind has gone.
            Phase::Ended(_) | Phase::Lost(_) if !machine.state().takes_jobs() => Ok(None),
            _ => {
                let link = self.table.lock().link.clone();
                link.map(Some).ok_or_else(|| machine.down_error())
            }
        }
    }

    /// Sets a value of a job that is being set up, and writes it down.
    ///
    /// # Errors
    /// EBUSY when it has started, EINVAL.
    pub fn set_field(&self, job: &Arc<Job>, field: Field, value: &[u8]) -> Result<(), MachineError> {
        job.set_field(field, value)?;
        let machine = self.machine()?;
        self.put(&machine, job);
        Ok(())
    }
}
