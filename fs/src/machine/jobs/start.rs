//! On its way to the agent: a job whose text is complete.

use super::super::Machine;
use super::super::command::{self, Allowed};
use super::super::error::MachineError;
use super::super::job::{Job, Phase, Script};
use super::RETRY;
use crate::errno::Errno;
use crate::link::{Link, LinkError, RequestOptions, StreamSink};
use machinefs_protocol::message::{Reply, Request};
use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Weak};

/// Jobs with long texts go to the agent one after the other, so that only one text is in memory.
#[derive(Default)]
pub(super) struct Long {
    busy: bool,
    waiting: VecDeque<Arc<Job>>,
}

/// Writes down a job whose text is complete, then starts it.
pub(super) fn keep_and_start(
    machine: &Arc<Machine>,
    job: &Arc<Job>,
    script: Script,
    done: impl FnOnce(Result<(), MachineError>) + Send + 'static,
) {
    let fail = |machine: &Arc<Machine>, job: &Arc<Job>, error: &MachineError| {
        machine.jobs.abandon(job, error.errno(), &format!("not run: {error}"));
    };
    if let Err(error) = job.keep_script(script) {
        let error = MachineError::no_space(format!("the script cannot be kept on the host: {error}"));
        fail(machine, job, &error);
        return done(Err(error));
    }
    machine.jobs.put(machine, job);
    let (owner, job) = (machine.clone(), job.clone());
    machine.shared.store.settled(move |written| {
        if let Err(error) = &written {
            fail(&owner, &job, error);
        } else if job.set_phase(Phase::Queued) {
            let link = owner.jobs.table.lock().link.clone();
            match link {
                // It goes to rest: the agent takes no more, and the job is for the next boot.
                _ if owner.is_idle() && !owner.state().takes_jobs() => owner.wake(),
                Some(link) => start(&owner, &link, &job),
                // A machine that went down meanwhile ends it; one that boots starts it.
                None if !owner.accepts_jobs() => owner.jobs.lose(&owner, &job, "the machine is down"),
                None => {}
            }
        }
        done(written);
    });
}

/// Gives a job to the agent: at once, or, with a long text, when its turn comes.
pub(super) fn start(machine: &Arc<Machine>, link: &Arc<Link>, job: &Arc<Job>) {
    // It stays queued, and is started behind the clone.
    if machine.holds_back(job) {
        return;
    }
    if job.command_in_file() {
        machine.jobs.long.lock().waiting.push_back(job.clone());
        start_long(machine);
    } else {
        send_start(machine, link, job, || {});
    }
}

/// Starts the next job with a long text, unless one is on its way.
pub(super) fn start_long(machine: &Arc<Machine>) {
    let next = {
        let mut long = machine.jobs.long.lock();
        let next = if long.busy { None } else { long.waiting.pop_front() };
        long.busy |= next.is_some();
        next
    };
    let Some(job) = next else { return };
    let owner = machine.clone();
    machine.shared.runtime.spawn_blocking(move || {
        let of_end = owner.clone();
        let end = move || {
            of_end.jobs.long.lock().busy = false;
            start_long(&of_end);
        };
        let link = owner.jobs.table.lock().link.clone();
        match link {
            Some(link) => send_start(&owner, &link, &job, end),
            // It stays queued, and comes again when the agent is back.
            None => end(),
        }
    });
}

/// Why a complete text is not run.
enum NoStart {
    /// It may not be.
    Refused(MachineError),
    /// It cannot be.
    Broken(String),
}

/// The body of the request that starts a job, and how much of it says how. Here, and nowhere else, a job gets its
/// program: what `allow_commands` has now is what counts.
fn start_body(machine: &Machine, job: &Job) -> Result<(u32, Vec<u8>), NoStart> {
    let script = |error: io::Error| NoStart::Broken(format!("its script on the host: {error}"));
    let allowed = machine.allowed();
    let setup = job.setup();
    let argv = if let Some(program) = setup.argv.first() {
        if !setup.own {
            allowed.check(program).map_err(NoStart::Refused)?;
        }
        Some(setup.argv.clone())
    } else if allowed == Allowed::All {
        None
    } else {
        let mut text = Vec::new();
        command::check_length(job.command_len()).map_err(NoStart::Refused)?;
        job.add_command(&mut text).map_err(script)?;
        allowed.split(&text).map_err(NoStart::Refused)?
    };
    let is_script = argv.is_none();
    let mut spec = machine.job_spec(argv.unwrap_or_default()).map_err(NoStart::Refused)?;
    setup.apply(&mut spec);
    if allowed != Allowed::All && setup.has_environment() {
        // It could make another program of a listed name.
        let error = MachineError::forbidden("with allow_commands set, a job has no environment of its own");
        return Err(NoStart::Refused(error));
    }
    let (spec_len, mut body) = spec.start_body(&[]).map_err(|error| NoStart::Broken(error.to_string()))?;
    if is_script {
        job.add_command(&mut body).map_err(script)?;
    }
    Ok((spec_len, body))
}

/// Sends a job to the agent. `sent` is called when that is over.
fn send_start(machine: &Arc<Machine>, link: &Arc<Link>, job: &Arc<Job>, sent: impl FnOnce() + Send + 'static) {
    if job.phase() != Phase::Queued || !job.set_phase(Phase::Starting) {
        return sent();
    }
    let (spec_len, body) = match start_body(machine, job) {
        Ok(start) => start,
        Err(NoStart::Refused(error)) => {
            machine.jobs.refuse(machine, job, &error);
            return sent();
        }
        Err(NoStart::Broken(error)) => {
            machine.jobs.lose(machine, job, &format!("it cannot be started: {error}"));
            return sent();
        }
    };
    job.set_at_agent(true);
    let request = Request::JobStart { job: job.number(), spec_len };
    let (owner, there, started) = (machine.clone(), link.clone(), job.clone());
    link.request(
        &request,
        &body,
        RequestOptions::forever(),
        Box::new(move |answer| {
            match answer.map(|response| response.reply) {
                Ok(Reply::Started { pid, started_ms }) => {
                    started.set_started(pid, started_ms);
                    attach(&owner, &there, &started);
                    feed(&owner, &there, &started);
                }
                Ok(_) => owner.jobs.lose(&owner, &started, "the agent gave a wrong answer"),
                Err(LinkError::Remote { errno: Errno::EEXIST, .. }) => {
                    attach(&owner, &there, &started);
                    feed(&owner, &there, &started);
                }
                Err(error @ LinkError::Remote { .. }) => {
                    tracing::warn!(machine = owner.id, job = started.number(), %error, "a job was refused");
                    owner.jobs.lose(&owner, &started, &format!("the agent refused it: {error}"));
                }
                // It never left: it is tried again.
                Err(LinkError::Overloaded) => {
                    started.requeue();
                    let owner = owner.clone();
                    owner.shared.runtime.clone().spawn(async move {
                        tokio::time::sleep(RETRY).await;
                        start(&owner, &there, &started);
                    });
                }
                // The stream broke: whether it runs is asked when the agent is back, or the machine is lost.
                Err(_) => {}
            }
            sent();
        }),
    );
}

/// Has the agent forget a job; `gone` is called when it has, or did not know it. A broken stream is followed by a
/// comparison of both sides' jobs.
pub(super) fn forget(link: &Arc<Link>, job: u64, gone: impl FnOnce() + Send + 'static) {
    let done = Box::new(move |answer| {
        if matches!(answer, Ok(_) | Err(LinkError::Remote { errno: Errno::ENOENT, .. })) {
            gone();
        }
    });
    link.request(&Request::JobForget { job }, &[], RequestOptions::forever(), done);
}

/// Has the agent send a job's output, from where we are.
pub(super) fn attach(machine: &Arc<Machine>, link: &Arc<Link>, job: &Arc<Job>) {
    let sink = Arc::new(Output { machine: Arc::downgrade(machine), link: Arc::downgrade(link), job: job.clone() });
    link.attach(job.number(), job.log_end(), sink);
}

/// Gives the agent what is written to a job's input, if it has one.
pub(super) fn feed(machine: &Arc<Machine>, link: &Arc<Link>, job: &Arc<Job>) {
    let (owner, there, fed) = (Arc::downgrade(machine), Arc::downgrade(link), Arc::downgrade(job));
    let again = move || {
        let (Some(owner), there, fed) = (owner.upgrade(), there.clone(), fed.clone()) else { return };
        owner.shared.runtime.clone().spawn(async move {
            tokio::time::sleep(RETRY).await;
            if let (Some(link), Some(job)) = (there.upgrade(), fed.upgrade()) {
                feed(&owner, &link, &job);
            }
        });
    };
    job.input().feed(link, job.number(), Arc::new(again));
}

/// Takes a job's output from the agent's stream.
struct Output {
    machine: Weak<Machine>,
    link: Weak<Link>,
    job: Arc<Job>,
}

impl StreamSink for Output {
    fn records(&self, records: &[u8]) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        self.job.append(records)?;
        if self.job.take_storage_failure()
            && let Some(machine) = self.machine.upgrade()
        {
            let what = format!("output of job {} is lost: the host's disk is full", self.job.number());
            machine.record_error("job", Errno::ENOSPC, &what, "");
        }
        if let (Phase::Draining(end), Some(machine)) = (self.job.phase(), self.machine.upgrade()) {
            machine.jobs.ended(&machine, self.job.number(), end);
        }
        Ok(())
    }

    // With a lost link, the machine attaches anew when it has another. An agent may also refuse one stream (it has no
    // process or memory left, in a fork bomb): then it is asked again.
    fn lost(&self) {
        let (Some(machine), there, job) = (self.machine.upgrade(), self.link.clone(), self.job.clone()) else { return };
        machine.shared.runtime.clone().spawn(async move {
            tokio::time::sleep(RETRY).await;
            let current = machine.jobs.table.lock().link.clone();
            if let Some(link) =
                there.upgrade().filter(|link| current.is_some_and(|current| Arc::ptr_eq(&current, link)))
                && !job.is_done()
            {
                attach(&machine, &link, &job);
            }
        });
    }
}
