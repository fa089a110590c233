//! The jobs of a machine: given to the agent when it is there, kept when they have ended.

use super::error::MachineError;
use super::job::{Job, Phase, Script};
use super::state::State;
use super::store::{self, JobRow, LogKind};
use super::{Machine, config};
use crate::errno::Errno;
use crate::link::{Link, LinkError, RequestOptions, StreamSink};
use crate::tree::ops::Caller;
use machinefs_protocol::frame::decode_meta;
use machinefs_protocol::job::{ExitReason, JobEnd, JobInfo, JobSpec};
use machinefs_protocol::message::{Reply, Request};
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

/// Finished jobs kept a machine.
const KEEP: usize = 100;
/// Bytes of finished jobs' output kept a machine.
const KEEP_BYTES: u64 = 256 << 20;
/// Jobs that may be unfinished at once.
const MOST_UNFINISHED: usize = 4096;
/// Largest number of a job.
const LAST_NUMBER: u64 = crate::tree::node::MAX_SUB;
/// What is written down as the end of a job that was removed, while the agent may still have it.
const REMOVED: &str = "removed";
/// What could not be written down is tried again after this, and then ever less often.
const RETRY: Duration = Duration::from_secs(1);
const LONGEST_RETRY: Duration = Duration::from_secs(30);
/// Output kept of a job where `output_limit` says `max`.
const LARGEST_OUTPUT: u64 = 1 << 40;

struct Table {
    jobs: BTreeMap<u64, Arc<Job>>,
    next: u64,
    /// The agent, when jobs can be given to it.
    link: Option<Arc<Link>>,
    unfinished: usize,
    changed: SystemTime,
    /// Removed jobs that the agent is still to forget.
    owed: BTreeSet<u64>,
}

/// Jobs with long texts go to the agent one after the other, so that only one text is in memory.
#[derive(Default)]
struct Long {
    busy: bool,
    waiting: VecDeque<Arc<Job>>,
}

/// The jobs of a machine.
pub struct Jobs {
    dir: PathBuf,
    table: Mutex<Table>,
    long: Mutex<Long>,
    machine: Weak<Machine>,
}

impl Jobs {
    pub(super) fn new(machine: Weak<Machine>, dir: PathBuf) -> Jobs {
        let table = Table {
            jobs: BTreeMap::new(),
            next: 1,
            link: None,
            unfinished: 0,
            changed: SystemTime::now(),
            owed: BTreeSet::new(),
        };
        Jobs { dir, table: Mutex::new(table), long: Mutex::default(), machine }
    }

    /// Takes up the jobs that were written down. `last` is the highest number that was given to one.
    pub(super) fn load(&self, rows: Vec<JobRow>, last: u64, limit: u64) {
        let mut table = self.table.lock();
        table.next = last.saturating_add(1);
        for row in rows {
            table.next = table.next.max(row.number.saturating_add(1));
            if row.end.as_deref() == Some(REMOVED) {
                table.owed.insert(row.number);
                continue;
            }
            let job = Arc::new(Job::load(row, &self.dir, limit));
            table.unfinished += usize::from(!job.is_done());
            table.jobs.insert(job.number(), job);
        }
    }

    fn machine(&self) -> Result<Arc<Machine>, MachineError> {
        self.machine.upgrade().ok_or_else(|| MachineError::down("the machine is gone"))
    }

    /// A text begins: the job has its number from now on. It is to be told to nobody before
    /// [`Machine::settled`] has said that the number is written down, so that no other job ever gets it.
    ///
    /// # Errors
    /// EHOSTDOWN when the machine is stopped, failed or lost; EBUSY when it is paused; EMFILE when too many are unfinished; EACCES; ENOSPC.
    pub fn begin(&self, caller: Caller) -> Result<Arc<Job>, MachineError> {
        let machine = self.machine()?;
        machine.check_owner(caller)?;
        if !machine.state().takes_jobs() {
            return Err(machine.down_error());
        }
        if machine.state() == State::Paused {
            return Err(MachineError::busy("the machine is paused: echo resume > ctl"));
        }
        machine.shared.check_space()?;
        let mut table = self.table.lock();
        if table.unfinished >= MOST_UNFINISHED {
            return Err(MachineError::limit(format!("{MOST_UNFINISHED} jobs are unfinished: wait for some to end")));
        }
        if table.next > LAST_NUMBER {
            return Err(MachineError::limit("all job numbers of this machine are used up"));
        }
        let number = table.next;
        table.next += 1;
        table.unfinished += 1;
        table.changed = SystemTime::now();
        let job = Arc::new(Job::new(number, caller.uid, &self.dir, output_limit(&machine)));
        table.jobs.insert(number, job.clone());
        machine.shared.store.set_counter(&store::jobs_counter(machine.slot), number as i64);
        Ok(job)
    }

    /// The text is complete: run it, at once or when the machine is up, but not before it is written down. `done` is
    /// called when it is, or when it cannot be, on another thread.
    pub fn submit(&self, job: &Arc<Job>, script: Script, done: impl FnOnce(Result<(), MachineError>) + Send + 'static) {
        let Ok(machine) = self.machine() else { return done(Err(MachineError::down("the machine is gone"))) };
        let job = job.clone();
        if !script.is_to_be_filed() {
            return keep_and_start(&machine, &job, script, done);
        }
        let runtime = machine.shared.runtime.clone();
        runtime.spawn_blocking(move || keep_and_start(&machine, &job, script, done));
    }

    /// The text was discarded: the job ends as one that could not be started.
    pub fn abandon(&self, job: &Arc<Job>, errno: Errno, why: &str) {
        let Ok(machine) = self.machine() else { return };
        // A line like this needs no file, and so cannot fail.
        let _ = job.keep_script(Script::Text(format!("# {why}").into_bytes()));
        let reason = ExitReason::NotStarted(errno.0);
        let end = JobEnd { reason, log_end: 0, cpu_micros: 0, max_rss_kib: 0, ended_ms: now_ms() };
        self.finish(&machine, job, Phase::Ended(end));
        let path = job.command_path();
        // Not there is what is wanted; any other failure goes with the machine's directory.
        machine.shared.runtime.spawn_blocking(move || drop(std::fs::remove_file(path)));
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
        let job = self.get(number).ok_or_else(|| MachineError::not_found(format!("no job {number}")))?;
        if !job.is_done() {
            self.lose(&machine, &job, "it was removed");
        }
        self.drop_job(&machine, &job);
        Ok(())
    }

    /// Writes a job down, unless it was removed.
    fn put(&self, machine: &Arc<Machine>, job: &Arc<Job>) -> bool {
        // Under the lock, so that what a removal writes comes after it.
        let table = self.table.lock();
        let there = table.jobs.contains_key(&job.number());
        if there {
            machine.shared.store.put_job(machine.slot, job.row());
        }
        there
    }

    fn drop_job(&self, machine: &Arc<Machine>, job: &Arc<Job>) {
        let number = job.number();
        {
            let mut table = self.table.lock();
            if table.jobs.remove(&number).is_none() {
                return;
            }
            table.changed = SystemTime::now();
            if job.is_at_agent() {
                // Else it would be found there one day, and be taken for one that was forgotten here by mistake.
                table.owed.insert(number);
                machine.shared.store.put_job(machine.slot, JobRow { end: Some(REMOVED.to_string()), ..job.row() });
            } else {
                machine.shared.store.delete_job(machine.slot, number);
            }
        }
        self.forget_there(machine, job);
        let job = job.clone();
        machine.shared.runtime.spawn_blocking(move || job.remove_files());
    }

    /// Has the agent forget a job that is over for us. Not answered, it is asked again when the agent is back.
    fn forget_there(&self, machine: &Arc<Machine>, job: &Arc<Job>) {
        let Some(link) = self.table.lock().link.clone() else { return };
        if job.is_at_agent() {
            let (owner, job) = (machine.clone(), job.clone());
            forget(&link, job.number(), move || {
                job.set_at_agent(false);
                owner.jobs.forgotten(&owner, job.number());
            });
        }
    }

    /// The agent has forgotten it.
    fn forgotten(&self, machine: &Arc<Machine>, number: u64) {
        if self.table.lock().owed.remove(&number) {
            machine.shared.store.delete_job(machine.slot, number);
        }
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
        let known: BTreeMap<u64, JobInfo> = known.into_iter().map(|info| (info.job, info)).collect();
        let (recovered, ours, over, owed) = {
            let mut table = self.table.lock();
            table.link = Some(link.clone());
            let recovered = self.recover(&mut table, machine, &known);
            let (over, ours): (Vec<_>, Vec<_>) = table.jobs.values().cloned().partition(|job| job.is_done());
            (recovered, ours, over, table.owed.clone())
        };
        if !recovered.is_empty() {
            let what = format!("{} jobs ran in the machine that were not written down: taken up", recovered.len());
            machine.record_error("adopt", Errno::ENOENT, &what, "");
        }
        for number in owed {
            if known.contains_key(&number) {
                let owner = machine.clone();
                forget(link, number, move || owner.jobs.forgotten(&owner, number));
            } else {
                self.forgotten(machine, number);
            }
        }
        for job in over {
            job.set_at_agent(known.contains_key(&job.number()));
            // What is not yet safe here is forgotten there once it is.
            if job.is_stored() {
                self.forget_there(machine, &job);
            }
        }
        for job in ours {
            match (job.phase(), known.get(&job.number())) {
                (Phase::Writing, _) => {}
                (_, Some(info)) => {
                    job.set_phase(Phase::Starting);
                    job.set_at_agent(true);
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

    /// Takes up what runs in the machine and is not known here: it may be important to somebody. Its text is not
    /// known. Gives the numbers.
    fn recover(&self, table: &mut Table, machine: &Arc<Machine>, known: &BTreeMap<u64, JobInfo>) -> Vec<u64> {
        let mut recovered = Vec::new();
        for info in known.values() {
            let number = info.job;
            if table.jobs.contains_key(&number) || table.owed.contains(&number) || !(1..=LAST_NUMBER).contains(&number)
            {
                continue;
            }
            // An agent may list anything: what is too much is left alone.
            if table.unfinished >= MOST_UNFINISHED {
                break;
            }
            let job = Job::recovered(number, machine.owner.0, &self.dir, output_limit(machine), info.started_ms);
            machine.shared.store.put_job(machine.slot, job.row());
            table.jobs.insert(number, Arc::new(job));
            table.unfinished += 1;
            table.next = table.next.max(number + 1);
            table.changed = SystemTime::now();
            recovered.push(number);
        }
        if !recovered.is_empty() {
            machine.shared.store.set_counter(&store::jobs_counter(machine.slot), table.next as i64 - 1);
        }
        recovered
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
            for number in std::mem::take(&mut table.owed) {
                machine.shared.store.delete_job(machine.slot, number);
            }
            for job in table.jobs.values() {
                job.set_at_agent(false);
            }
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
        let is_first = job.finish(phase, |line| {
            machine.history.append(format!("{line}\n").as_bytes());
            machine.shared.store.log(machine.slot, LogKind::History, line);
        });
        if !is_first {
            return;
        }
        let surplus = {
            let mut table = self.table.lock();
            table.unfinished = table.unfinished.saturating_sub(1);
            surplus(&table)
        };
        for old in surplus {
            self.drop_job(machine, &old);
        }
        // One that was removed meanwhile leaves nothing.
        if self.get(job.number()).is_some() {
            let (machine, job) = (machine.clone(), job.clone());
            machine.shared.runtime.clone().spawn(async move { keep(&machine, &job).await });
        }
    }
}

/// Writes down a job that has ended, output first. What fails is tried again: until then it is kept in memory.
async fn keep(machine: &Arc<Machine>, job: &Arc<Job>) {
    let there = || machine.jobs.get(job.number()).is_some();
    let mut pause = RETRY;
    let mut told = false;
    while there() {
        let saving = job.clone();
        let saved = match tokio::task::spawn_blocking(move || saving.save_log()).await {
            Ok(saved) => saved.map_err(|error| MachineError::no_space(format!("the host's spool: {error}"))),
            Err(_) => return,
        };
        let written = match saved {
            // Put again at each turn: only a row that is there says that the output is.
            Ok(()) if machine.jobs.put(machine, job) => machine.shared.store.flush().await,
            Ok(()) => return,
            Err(error) => Err(error),
        };
        match written {
            Ok(()) => {
                job.set_stored();
                // Only what is safe here may be forgotten there.
                return machine.jobs.forget_there(machine, job);
            }
            Err(error) if !told => {
                told = true;
                let what = format!("job {} cannot be written down yet: {error}", job.number());
                machine.record_error("job", error.errno(), &what, "");
            }
            Err(_) => {}
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_RETRY);
    }
}

/// Writes down a job whose text is complete, then starts it.
fn keep_and_start(
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
                Some(link) => start(&owner, &link, &job),
                // A machine that went down meanwhile ends it; one that boots starts it.
                None if !owner.state().takes_jobs() => owner.jobs.lose(&owner, &job, "the machine is down"),
                None => {}
            }
        }
        done(written);
    });
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
        timeout_secs: config.time("exec_timeout").map_or(0, |time| time.as_secs().clamp(1, u64::from(u32::MAX)) as u32),
        output_limit: config.size("output_limit").unwrap_or(LARGEST_OUTPUT),
        ..JobSpec::default()
    }
}

/// Gives a job to the agent: at once, or, with a long text, when its turn comes.
fn start(machine: &Arc<Machine>, link: &Arc<Link>, job: &Arc<Job>) {
    if job.command_in_file() {
        machine.jobs.long.lock().waiting.push_back(job.clone());
        start_long(machine);
    } else {
        send_start(machine, link, job, || {});
    }
}

/// Starts the next job with a long text, unless one is on its way.
fn start_long(machine: &Arc<Machine>) {
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

/// Sends a job to the agent. `sent` is called when that is over.
fn send_start(machine: &Arc<Machine>, link: &Arc<Link>, job: &Arc<Job>, sent: impl FnOnce() + Send + 'static) {
    if job.phase() != Phase::Queued || !job.set_phase(Phase::Starting) {
        return sent();
    }
    let spec = job_spec(&machine.config.lock().0);
    let body = spec.start_body(&[]).map_err(|error| error.to_string()).and_then(|(spec_len, mut body)| {
        job.add_command(&mut body).map_err(|error| format!("its script on the host: {error}"))?;
        Ok((spec_len, body))
    });
    let (spec_len, body) = match body {
        Ok(start) => start,
        Err(error) => {
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
                }
                Ok(_) => owner.jobs.lose(&owner, &started, "the agent gave a wrong answer"),
                Err(LinkError::Remote { errno: Errno::EEXIST, .. }) => attach(&owner, &there, &started),
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
fn forget(link: &Arc<Link>, job: u64, gone: impl FnOnce() + Send + 'static) {
    let done = Box::new(move |answer| {
        if matches!(answer, Ok(_) | Err(LinkError::Remote { errno: Errno::ENOENT, .. })) {
            gone();
        }
    });
    link.request(&Request::JobForget { job }, &[], RequestOptions::forever(), done);
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

    // The machine hears of a lost stream as a whole, and attaches anew.
    fn lost(&self) {}
}
