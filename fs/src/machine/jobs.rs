//! The jobs of a machine: given to the agent when it is there, kept when they have ended.

use super::error::MachineError;
use super::job::{Job, Phase};
use super::store::{self, LogKind};
use super::{Machine, store_more};
use crate::errno::Errno;
use crate::link::{Link, LinkError, RequestOptions, StreamSink};
use crate::tree::ops::Caller;
use machinefs_protocol::job::{ExitReason, JobEnd, JobInfo};
use machinefs_protocol::message::{Reply, Request};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::SystemTime;
use zeroize::Zeroize;

/// Finished jobs kept a machine.
const KEEP: usize = 100;
/// Bytes of finished jobs' output kept a machine.
const KEEP_BYTES: u64 = 256 << 20;
/// Jobs that may be unfinished at once.
const MOST_UNFINISHED: usize = 4096;
/// The name of the job that is a machine's main process.
pub(super) const MAIN: &str = "main";

struct Table {
    jobs: BTreeMap<u64, Arc<Job>>,
    /// The newest of each name.
    names: BTreeMap<String, u64>,
    next: u64,
    /// The agent, when jobs can be given to it.
    link: Option<Arc<Link>>,
    unfinished: usize,
    changed: SystemTime,
}

impl Table {
    fn insert(&mut self, job: Arc<Job>) {
        if let Some(name) = job.name() {
            self.names.insert(name.to_string(), job.number());
        }
        self.jobs.insert(job.number(), job);
    }

    fn remove(&mut self, number: u64) {
        if let Some(job) = self.jobs.remove(&number)
            && self.goes_by_name(&job)
        {
            job.name().map(|name| self.names.remove(name));
        }
    }

    /// Whether its name is its own, and not a newer one's.
    fn goes_by_name(&self, job: &Job) -> bool {
        job.name().is_some_and(|name| self.names.get(name) == Some(&job.number()))
    }
}

/// The jobs of a machine.
pub struct Jobs {
    dir: PathBuf,
    table: Mutex<Table>,
    machine: Weak<Machine>,
}

impl Jobs {
    pub(super) fn new(machine: Weak<Machine>, dir: PathBuf) -> Jobs {
        let table = Table {
            jobs: BTreeMap::new(),
            names: BTreeMap::new(),
            next: 1,
            link: None,
            unfinished: 0,
            changed: SystemTime::now(),
        };
        Jobs { dir, table: Mutex::new(table), machine }
    }

    /// Takes up the jobs that were written down.
    pub(super) fn load(&self, rows: Vec<store::JobRow>, limit: u64) {
        let mut table = self.table.lock();
        for row in rows {
            table.next = table.next.max(row.number + 1);
            let job = Arc::new(Job::load(row, &self.dir, limit));
            table.unfinished += usize::from(!job.is_done());
            table.insert(job);
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
        self.begin_as(caller, None)
    }

    /// As [`Jobs::begin`], with a name: an older job of that name is known by its number from now on.
    ///
    /// # Errors
    /// As [`Jobs::begin`].
    pub(super) fn begin_as(&self, caller: Caller, name: Option<&str>) -> Result<Arc<Job>, MachineError> {
        let machine = self.machine()?;
        machine.check_owner(caller)?;
        machine.used();
        machine.wake();
        if !machine.accepts_jobs() {
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
        let job = Arc::new(Job::new(number, caller.uid, &self.dir, machine.output_limit()).named(name));
        table.insert(job.clone());
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
            None if !machine.accepts_jobs() => self.lose(&machine, job, "the machine is down"),
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
    pub fn abandon(&self, job: &Arc<Job>, errno: Errno, why: &str) {
        if let Ok(machine) = self.machine() {
            job.set_command(format!("# {why}").into_bytes());
            self.end_unstarted(&machine, job, errno);
        }
    }

    /// A complete text may not be run after all.
    fn refuse(&self, machine: &Arc<Machine>, job: &Arc<Job>, error: &MachineError) {
        let command = job.command();
        let shown = String::from_utf8_lossy(command.get(..200).unwrap_or(&command)).trim_end().to_string();
        machine.record_error("exec", error.errno(), &error.to_string(), &shown);
        self.end_unstarted(machine, job, error.errno());
    }

    fn end_unstarted(&self, machine: &Arc<Machine>, job: &Arc<Job>, errno: Errno) {
        let reason = ExitReason::NotStarted(errno.0);
        let end = JobEnd { reason, log_end: 0, cpu_micros: 0, max_rss_kib: 0, ended_ms: now_ms() };
        self.finish(machine, job, Phase::Ended(end));
    }

    /// The newest that a user gave; where there is none, the main process.
    pub fn newest(&self) -> Option<Arc<Job>> {
        let table = self.table.lock();
        let mut newest_first = table.jobs.values().rev();
        let given = newest_first.find(|job| job.name() != Some(MAIN));
        given.or_else(|| table.jobs.values().next_back()).cloned()
    }

    /// The job of that name or number; what has a name is not found by its number.
    pub fn find(&self, name: &[u8]) -> Option<Arc<Job>> {
        let name = std::str::from_utf8(name).ok()?;
        let table = self.table.lock();
        let named = table.names.get(name).copied();
        let number = named.or_else(|| name.parse().ok().filter(|number: &u64| number.to_string() == name))?;
        table.jobs.get(&number).filter(|job| named.is_some() || !table.goes_by_name(job)).cloned()
    }

    /// Numbers of the jobs there are, ascending, with the names of their directories.
    pub fn named_list(&self) -> Vec<(u64, String)> {
        let table = self.table.lock();
        let called = |job: &Arc<Job>| match job.name() {
            Some(name) if table.goes_by_name(job) => name.to_string(),
            _ => job.number().to_string(),
        };
        table.jobs.values().map(|job| (job.number(), called(job))).collect()
    }

    /// The job of that number.
    pub fn get(&self, number: u64) -> Option<Arc<Job>> {
        self.table.lock().jobs.get(&number).cloned()
    }

    /// The numbers of the jobs there are, ascending.
    pub fn list(&self) -> Vec<u64> {
        self.table.lock().jobs.keys().copied().collect()
    }

    /// How many have not ended, those of a name not counted.
    pub(super) fn unfinished_besides(&self, name: &str) -> usize {
        let table = self.table.lock();
        let named = table.names.get(name).and_then(|number| table.jobs.get(number)).is_some_and(|job| !job.is_done());
        table.unfinished.saturating_sub(usize::from(named))
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
            table.remove(number);
            table.changed = SystemTime::now();
        }
        machine.shared.store.write(move |db| store::delete_job(db, slot, number));
        let job = job.clone();
        machine.shared.runtime.spawn_blocking(move || job.remove_files());
    }

    /// The agent answers: goes on with what it has, gives it what it does not know yet.
    pub(super) async fn connected(&self, machine: &Arc<Machine>, link: &Arc<Link>) {
        let known: Vec<JobInfo> = match link.call(&Request::JobList, &[], RequestOptions::forever()).await {
            Ok(response) => match response.reply {
                Reply::Jobs(jobs) => jobs,
                _ => Vec::new(),
            },
            Err(error) => {
                tracing::warn!(machine = machine.id, %error, "the agent's jobs are not known");
                return;
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
                // Given while it went to rest: it runs when the machine is awake.
                Phase::Queued if machine.is_idle() => {}
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
        machine.used();
        let ran = job.ran();
        let millis = u64::try_from(ran.as_millis()).unwrap_or(u64::MAX);
        machine.count_job(millis);
        if let (Some(MAIN), Some(Ok(code))) = (job.name(), job.exit()) {
            machine.main_ended(code, ran);
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
                    store_more::add_job(db, slot, millis)?;
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

/// Gives a job to the agent.
fn start(machine: &Arc<Machine>, link: &Arc<Link>, job: &Arc<Job>) {
    if job.phase() != Phase::Queued || !job.set_phase(Phase::Starting) {
        return;
    }
    let (spec, body) = match machine.job_spec(job.command()) {
        Ok(spec) => spec,
        Err(error) => return machine.jobs.refuse(machine, job, &error),
    };
    let mut request = Request::JobStart { job: job.number(), spec };
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
    // Secrets are in it, and it is on its way.
    if let Request::JobStart { spec, .. } = &mut request {
        spec.env.iter_mut().for_each(Zeroize::zeroize);
    }
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
