//! The jobs of a machine: given to the agent when it is there, kept when they have ended.

use super::error::MachineError;
use super::job::{Job, Phase};
use super::store::{self, LogKind};
use super::{Machine, config};
use crate::errno::Errno;
use crate::link::{Link, LinkError, RequestOptions, StreamSink};
use crate::tree::ops::Caller;
use machinefs_protocol::frame::decode_meta;
use machinefs_protocol::job::{ExitReason, JobEnd, JobInfo, JobSpec};
use machinefs_protocol::message::{Reply, Request};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::SystemTime;

/// Finished jobs kept a machine.
const KEEP: usize = 100;
/// Bytes of finished jobs' output kept a machine.
const KEEP_BYTES: u64 = 256 << 20;
/// Jobs that may be unfinished at once.
const MOST_UNFINISHED: usize = 4096;
/// Output kept of a job where `output_limit` says `max`.
const LARGEST_OUTPUT: u64 = 1 << 40;

struct Table {
    jobs: BTreeMap<u64, Arc<Job>>,
    next: u64,
    /// The agent, when jobs can be given to it.
    link: Option<Arc<Link>>,
    unfinished: usize,
    changed: SystemTime,
}

/// The jobs of a machine.
pub struct Jobs {
    dir: PathBuf,
    table: Mutex<Table>,
    machine: Weak<Machine>,
}

impl Jobs {
    pub(super) fn new(machine: Weak<Machine>, dir: PathBuf) -> Jobs {
        let table = Table { jobs: BTreeMap::new(), next: 1, link: None, unfinished: 0, changed: SystemTime::now() };
        Jobs { dir, table: Mutex::new(table), machine }
    }

    /// Takes up the jobs that were written down.
    pub(super) fn load(&self, rows: Vec<store::JobRow>, limit: u64) {
        let mut table = self.table.lock();
        for row in rows {
            table.next = table.next.max(row.number + 1);
            let job = Arc::new(Job::load(row, &self.dir, limit));
            table.unfinished += usize::from(!job.is_done());
            table.jobs.insert(job.number(), job);
        }
    }

    fn machine(&self) -> Result<Arc<Machine>, MachineError> {
        self.machine.upgrade().ok_or_else(|| MachineError::down("the machine is gone"))
    }

    /// A text begins: the job has its number from now on.
    ///
    /// # Errors
    /// EHOSTDOWN when the machine is stopped, failed or lost; EMFILE when too many are unfinished; EACCES.
    pub fn begin(&self, caller: Caller) -> Result<Arc<Job>, MachineError> {
        let machine = self.machine()?;
        machine.check_owner(caller)?;
        if !machine.state().takes_jobs() {
            return Err(machine.down_error());
        }
        let mut table = self.table.lock();
        if table.unfinished >= MOST_UNFINISHED {
            return Err(MachineError::limit(format!("{MOST_UNFINISHED} jobs are unfinished: wait for some to end")));
        }
        let number = table.next;
        table.next += 1;
        table.unfinished += 1;
        table.changed = SystemTime::now();
        let job = Arc::new(Job::new(number, caller.uid, &self.dir, output_limit(&machine)));
        table.jobs.insert(number, job.clone());
        Ok(job)
    }

    /// The text is complete: run it, at once or when the machine is up.
    pub fn submit(&self, job: &Arc<Job>, text: Vec<u8>) {
        let Ok(machine) = self.machine() else { return };
        let long = text.len() > 4096;
        job.set_command(text);
        job.set_phase(Phase::Queued);
        let (slot, row) = (machine.slot, job.row());
        machine.shared.store.write(move |db| store::put_job(db, slot, &row));
        let link = self.table.lock().link.clone();
        match link {
            Some(link) => start(&machine, &link, job),
            // A machine that went down meanwhile ends it; one that boots starts it.
            None if !machine.state().takes_jobs() => self.lose(&machine, job, "the machine is down"),
            None => {}
        }
        if long {
            let job = job.clone();
            machine.shared.runtime.spawn_blocking(move || {
                if let Err(error) = job.spill_command() {
                    tracing::warn!(%error, "a long command stays in memory");
                }
            });
        }
    }

    /// The text was discarded: the job ends as one that could not be started.
    pub fn abandon(&self, job: &Arc<Job>, why: &str) {
        if let Ok(machine) = self.machine() {
            job.set_command(format!("# {why}").into_bytes());
            let end = JobEnd {
                reason: ExitReason::NotStarted(libc::E2BIG),
                log_end: 0,
                cpu_micros: 0,
                max_rss_kib: 0,
                ended_ms: now_ms(),
            };
            self.finish(&machine, job, Phase::Ended(end));
        }
    }

    /// The job with the highest number.
    pub fn newest(&self) -> Option<Arc<Job>> {
        self.table.lock().jobs.last_key_value().map(|(_, job)| job.clone())
    }

    /// The job of that number.
    pub fn get(&self, number: u64) -> Option<Arc<Job>> {
        self.table.lock().jobs.get(&number).cloned()
    }

    /// The numbers of the jobs there are, ascending.
    pub fn list(&self) -> Vec<u64> {
        self.table.lock().jobs.keys().copied().collect()
    }

    /// How many have not ended.
    pub fn unfinished(&self) -> usize {
        self.table.lock().unfinished
    }

    /// When a job was last added or removed.
    pub fn changed(&self) -> SystemTime {
        self.table.lock().changed
    }

    /// Kills the job if it runs, and forgets it.
    ///
    /// # Errors
    /// ENOENT when there is none.
    pub fn remove(&self, number: u64) -> Result<(), MachineError> {
        let machine = self.machine()?;
        let (job, link) = {
            let table = self.table.lock();
            let job = table.jobs.get(&number).cloned();
            (job.ok_or_else(|| MachineError::not_found(format!("no job {number}")))?, table.link.clone())
        };
        if !job.is_done() {
            self.lose(&machine, &job, "it was removed");
        }
        if let Some(link) = link {
            forget(&link, number);
        }
        self.drop_job(&machine, &job);
        Ok(())
    }

    fn drop_job(&self, machine: &Arc<Machine>, job: &Arc<Job>) {
        let (slot, number) = (machine.slot, job.number());
        {
            let mut table = self.table.lock();
            table.jobs.remove(&number);
            table.changed = SystemTime::now();
        }
        machine.shared.store.write(move |db| store::delete_job(db, slot, number));
        let job = job.clone();
        machine.shared.runtime.spawn_blocking(move || job.remove_files());
    }

    /// The agent answers: goes on with what it has, gives it what it does not know yet.
    pub(super) async fn connected(&self, machine: &Arc<Machine>, link: &Arc<Link>) {
        let answer = link.call(&Request::JobList, &[], RequestOptions::within(link.op_deadline())).await;
        let known = answer.and_then(|response| {
            decode_meta(&response.body).map_err(|error| LinkError::Lie(format!("a list of jobs: {error}").into()))
        });
        let known: Vec<JobInfo> = match known {
            Ok(known) => known,
            Err(error) => {
                tracing::warn!(machine = machine.id, %error, "the agent's jobs are not known");
                // Without the list no job can be given to it: another stream may do better.
                return link.close();
            }
        };
        let ours: Vec<Arc<Job>> = {
            let mut table = self.table.lock();
            table.link = Some(link.clone());
            table.jobs.values().filter(|job| !job.is_done()).cloned().collect()
        };
        for info in &known {
            if !ours.iter().any(|job| job.number() == info.job) {
                forget(link, info.job);
            }
        }
        for job in ours {
            let there = known.iter().find(|info| info.job == job.number());
            match (job.phase(), there) {
                (Phase::Writing, _) => {}
                (_, Some(info)) => {
                    job.set_phase(Phase::Starting);
                    job.set_started(info.pid, info.started_ms);
                    attach(machine, link, &job);
                    if let Some(end) = info.end {
                        self.ended(machine, info.job, end);
                    }
                }
                (Phase::Queued, None) => start(machine, link, &job),
                (_, None) => self.lose(machine, &job, "the agent does not know it"),
            }
        }
    }

    /// The agent is gone; jobs go on in the guest.
    pub(super) fn disconnected(&self) {
        self.table.lock().link = None;
    }

    /// The machine is gone, and its jobs with it.
    pub(super) fn machine_ended(&self, machine: &Arc<Machine>) {
        let unfinished: Vec<Arc<Job>> = {
            let mut table = self.table.lock();
            table.link = None;
            table.jobs.values().filter(|job| !job.is_done()).cloned().collect()
        };
        for job in unfinished {
            match job.phase() {
                // The writer will be told at its next write.
                Phase::Writing => {}
                Phase::Draining(end) => self.finish(machine, &job, Phase::Ended(end)),
                _ => self.lose(machine, &job, "the machine went down"),
            }
        }
    }

    /// The agent says how a job ended; its output may still be on the way.
    pub(super) fn ended(&self, machine: &Arc<Machine>, number: u64, end: JobEnd) {
        let Some(job) = self.get(number) else { return };
        if job.log_end() >= end.log_end {
            self.finish(machine, &job, Phase::Ended(end));
        } else {
            job.set_phase(Phase::Draining(end));
        }
    }

    fn lose(&self, machine: &Arc<Machine>, job: &Arc<Job>, why: &str) {
        self.finish(machine, job, Phase::Lost(why.to_string()));
    }

    fn finish(&self, machine: &Arc<Machine>, job: &Arc<Job>, phase: Phase) {
        // Before anybody can see that it has ended.
        machine.shared.cache().expire();
        if !job.finish(phase, |line| machine.history.append(format!("{line}\n").as_bytes())) {
            return;
        }
        let (surplus, link) = {
            let mut table = self.table.lock();
            table.unfinished = table.unfinished.saturating_sub(1);
            (surplus(&table), table.link.clone())
        };
        for old in surplus {
            self.drop_job(machine, &old);
        }
        let (machine, job) = (machine.clone(), job.clone());
        let runtime = machine.shared.runtime.clone();
        runtime.spawn_blocking(move || {
            if let Err(error) = job.save_log() {
                tracing::error!(machine = machine.id, job = job.number(), %error, "a job's output cannot be kept");
            }
            let (slot, row, line) = (machine.slot, job.row(), job.history_line());
            machine.shared.store.write_then(
                move |db| {
                    store::put_job(db, slot, &row)?;
                    store::append_log(db, slot, LogKind::History, &line)
                },
                // Only what is safe here may be forgotten there.
                move |written| {
                    if let (Ok(()), Some(link)) = (written, link) {
                        forget(&link, job.number());
                    }
                },
            );
        });
    }
}

/// The oldest finished jobs beyond what is kept.
fn surplus(table: &Table) -> Vec<Arc<Job>> {
    let finished: Vec<&Arc<Job>> = table.jobs.values().filter(|job| job.is_done()).collect();
    let (mut count, mut bytes) = (0, 0);
    let mut gone = Vec::new();
    for job in finished.into_iter().rev() {
        count += 1;
        bytes += job.disk();
        if count > KEEP || (bytes > KEEP_BYTES && count > 1) {
            gone.push(job.clone());
        }
    }
    gone
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

pub(super) fn output_limit(machine: &Machine) -> u64 {
    machine.config.lock().0.size("output_limit").unwrap_or(LARGEST_OUTPUT)
}

fn job_spec(config: &config::Config) -> JobSpec {
    let text = |name| config.given(name).map(|value| value.as_bytes().to_vec()).unwrap_or_default();
    // The working directory's default is the home of whoever the job runs as.
    let moved = config.overrides().any(|(name, _)| name == "workdir");
    JobSpec {
        shell: text("shell"),
        cwd: if moved { text("workdir") } else { Vec::new() },
        user: text("user"),
        timeout_ms: config
            .time("exec_timeout")
            .map_or(0, |time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX).max(1)),
        output_limit: config.size("output_limit").unwrap_or(LARGEST_OUTPUT),
        ..JobSpec::default()
    }
}

/// Gives a job to the agent.
fn start(machine: &Arc<Machine>, link: &Arc<Link>, job: &Arc<Job>) {
    if job.phase() != Phase::Queued || !job.set_phase(Phase::Starting) {
        return;
    }
    let spec = job_spec(&machine.config.lock().0);
    let (spec_len, body) = match spec.start_body(&job.command()) {
        Ok(start) => start,
        Err(error) => return machine.jobs.lose(machine, job, &format!("it cannot be started: {error}")),
    };
    let request = Request::JobStart { job: job.number(), spec_len };
    let (owner, there, started) = (machine.clone(), link.clone(), job.clone());
    link.request(
        &request,
        &body,
        RequestOptions::forever(),
        Box::new(move |answer| match answer.map(|response| response.reply) {
            Ok(Reply::Started { pid, started_ms }) => {
                started.set_started(pid, started_ms);
                attach(&owner, &there, &started);
            }
            Ok(_) => owner.jobs.lose(&owner, &started, "the agent gave a wrong answer"),
            Err(LinkError::Remote { errno: Errno::EEXIST, .. }) => attach(&owner, &there, &started),
            Err(error @ LinkError::Remote { .. }) => {
                tracing::warn!(machine = owner.id, job = started.number(), %error, "a job was refused");
                owner.jobs.lose(&owner, &started, &format!("the agent refused it: {error}"));
            }
            // The stream broke: whether it runs is asked when the agent is back, or the machine is lost.
            Err(_) => {}
        }),
    );
}

fn forget(link: &Arc<Link>, job: u64) {
    // Not knowing it is as good; a broken stream is followed by a comparison of both sides' jobs.
    link.request(&Request::JobForget { job }, &[], RequestOptions::forever(), Box::new(|_| {}));
}

/// Has the agent send a job's output, from where we are.
fn attach(machine: &Arc<Machine>, link: &Arc<Link>, job: &Arc<Job>) {
    let sink = Arc::new(Output { machine: Arc::downgrade(machine), job: job.clone() });
    link.attach(job.number(), job.log_end(), sink);
}

/// Takes a job's output from the agent's stream.
struct Output {
    machine: Weak<Machine>,
    job: Arc<Job>,
}

impl StreamSink for Output {
    fn records(&self, records: &[u8]) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        self.job.append(records)?;
        if let (Phase::Draining(end), Some(machine)) = (self.job.phase(), self.machine.upgrade()) {
            machine.jobs.ended(&machine, self.job.number(), end);
        }
        Ok(())
    }

    // The machine hears of a lost stream as a whole, and attaches anew.
    fn lost(&self) {}
}
