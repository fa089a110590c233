//! The jobs of a machine: given to the agent when it is there, kept when they have ended.

mod command;
mod keep;
mod start;
mod table;

use super::Machine;
use super::clone::CLONE;
use super::error::MachineError;
use super::job::{Job, Phase, Script};
use super::state::State;
use super::store::{self, JobRow, LogKind};
use crate::errno::Errno;
use crate::link::{Link, LinkError, RequestOptions};
use crate::tree::ops::Caller;
pub use command::JOB_VERBS;
use keep::keep;
use machinefs_protocol::frame::decode_meta;
use machinefs_protocol::job::{ExitReason, JobEnd, JobInfo};
use machinefs_protocol::message::Request;
use parking_lot::Mutex;
use start::{Long, attach, feed, forget, keep_and_start, start};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};
use table::{Table, surplus};

/// Jobs that may be unfinished at once.
const MOST_UNFINISHED: usize = 4096;
/// Largest number of a job.
const LAST_NUMBER: u64 = crate::tree::node::MAX_SUB;
/// What is written down as the end of a job that was removed, while the agent may still have it.
const REMOVED: &str = "removed";
/// What could not be written down is tried again after this, and then ever less often.
const RETRY: Duration = Duration::from_secs(1);
const LONGEST_RETRY: Duration = Duration::from_secs(30);
/// The name of the job that is a machine's main process.
pub(super) const MAIN: &str = "main";

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
            names: BTreeMap::new(),
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
            table.insert(job);
        }
    }

    fn machine(&self) -> Result<Arc<Machine>, MachineError> {
        self.machine.upgrade().ok_or_else(|| MachineError::down("the machine is gone"))
    }

    /// A text begins: the job has its number from now on. It is to be told to nobody before
    /// [`Machine::settled`] has said that the number is written down, so that no other job ever gets it.
    ///
    /// # Errors
    /// EHOSTDOWN when the machine is stopped, failed or lost; EBUSY when it is paused; EMFILE when too many are
    /// unfinished; EACCES; ENOSPC.
    pub fn begin(&self, caller: Caller) -> Result<Arc<Job>, MachineError> {
        self.begin_with(caller, |job| job)
    }

    /// As [`Jobs::begin`], with a name: an older job of that name is known by its number from now on.
    ///
    /// # Errors
    /// As [`Jobs::begin`].
    pub(super) fn begin_as(&self, caller: Caller, name: Option<&str>) -> Result<Arc<Job>, MachineError> {
        self.begin_with(caller, |job| job.named(name))
    }

    fn begin_with(&self, caller: Caller, with: impl FnOnce(Job) -> Job) -> Result<Arc<Job>, MachineError> {
        let machine = self.machine()?;
        machine.check_owner(caller)?;
        machine.used();
        machine.wake();
        if !machine.accepts_jobs() {
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
        let job = Arc::new(with(Job::new(number, caller.uid, &self.dir, machine.output_limit())));
        table.insert(job.clone());
        machine.shared.store.set_counter(&store::jobs_counter(machine.slot), number as i64);
        drop(table);
        // It may have gone to rest between the first look and this.
        machine.wake();
        Ok(job)
    }

    /// A job that is set up and started by hand, in a directory of that name. As with [`Jobs::begin`], it is to be told
    /// to nobody before it is written down.
    ///
    /// # Errors
    /// EINVAL for a name that it cannot have, EEXIST, and those of [`Jobs::begin`].
    pub fn prepare(&self, caller: Caller, name: &[u8]) -> Result<Arc<Job>, MachineError> {
        let name = valid_name(name)?;
        let machine = self.machine()?;
        machine.check_owner(caller)?;
        if self.find(name.as_bytes()).is_some() {
            return Err(MachineError::exists(format!("there is a job {name}")));
        }
        let job = self.begin_with(caller, |job| job.named(Some(name)).with_setup())?;
        self.put(&machine, &job);
        Ok(job)
    }

    /// Sets the program of a job that is being set up, and starts it.
    ///
    /// # Errors
    /// As [`Jobs::check_argv`].
    pub fn run_argv(&self, job: &Arc<Job>, value: &[u8]) -> Result<(), MachineError> {
        self.check_argv(job, value)?;
        let line = job.set_argv(value)?;
        // What goes wrong from here on shows in the job.
        self.submit(job, Script::Text(line), |_| {});
        Ok(())
    }

    /// Whether these arguments may be those of a job that is being set up.
    ///
    /// # Errors
    /// EBUSY when it has started, EINVAL, EPERM for a program that `allow_commands` does not list, EHOSTDOWN.
    pub fn check_argv(&self, job: &Arc<Job>, value: &[u8]) -> Result<(), MachineError> {
        let machine = self.machine()?;
        if !machine.accepts_jobs() {
            return Err(machine.down_error());
        }
        machine.allowed().check(&job.check_argv(value)?)
    }

    /// The text is complete: run it, at once or when the machine is up, but not before it is written down. `done` is
    /// called when it is, or when it cannot be, on another thread.
    pub fn submit(&self, job: &Arc<Job>, script: Script, done: impl FnOnce(Result<(), MachineError>) + Send + 'static) {
        let Ok(machine) = self.machine() else { return done(Err(MachineError::down("the machine is gone"))) };
        if let Err(error) = job.close_setup() {
            return done(Err(error));
        }
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
        self.end_unstarted(&machine, job, errno);
        let path = job.command_path();
        // Not there is what is wanted; any other failure goes with the machine's directory.
        machine.shared.runtime.spawn_blocking(move || drop(std::fs::remove_file(path)));
    }

    /// A complete text may not be run after all.
    fn refuse(&self, machine: &Arc<Machine>, job: &Arc<Job>, error: &MachineError) {
        machine.record_error("exec", error.errno(), &error.to_string(), &job.command_start());
        self.end_unstarted(machine, job, error.errno());
    }

    fn end_unstarted(&self, machine: &Arc<Machine>, job: &Arc<Job>, errno: Errno) {
        self.end_without_output(machine, job, ExitReason::NotStarted(errno.0));
    }

    fn end_without_output(&self, machine: &Arc<Machine>, job: &Arc<Job>, reason: ExitReason) {
        let end = JobEnd { reason, log_end: 0, cpu_micros: 0, max_rss_kib: 0, ended_ms: now_ms() };
        self.finish(machine, job, Phase::Ended(end));
    }

    /// The newest that a user gave, those that are being set up not counted; where there is none, the main process.
    pub fn newest(&self) -> Option<Arc<Job>> {
        let table = self.table.lock();
        let mut newest_first = table.jobs.values().rev();
        let of_user = |job: &&Arc<Job>| ![Some(MAIN), Some(CLONE)].contains(&job.name()) && !job.is_being_set_up();
        let given = newest_first.find(of_user);
        given.or_else(|| table.names.get(MAIN).and_then(|number| table.jobs.get(number))).cloned()
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

    /// Does this unless there are jobs that have not ended, those of a name not counted; none begins meanwhile.
    pub(super) fn unless_used(&self, besides: &str, act: impl FnOnce()) {
        let table = self.table.lock();
        if table.unfinished_besides(besides) == 0 {
            act();
        }
    }

    /// How many run or wait to, those of a name not counted.
    pub(super) fn unfinished_besides(&self, name: &str) -> usize {
        self.table.lock().unfinished_besides(name)
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
        // What it left behind goes too; one that runs is killed when the agent is to forget it.
        let link = self.table.lock().link.clone();
        if let Some(link) = link.filter(|_| job.is_done()) {
            let request = Request::JobSignal { job: number, signal: libc::SIGKILL, all: true };
            link.request(&request, &[], RequestOptions::within(link.op_deadline()), Box::new(|_| {}));
        }
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
            if !table.remove(number) {
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
        // Before any job starts. Without them another stream may do better.
        if let Err(error) = machine.give_secrets(link).await {
            tracing::warn!(machine = machine.id, %error, "the agent did not take the secrets");
            return link.close();
        }
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
                    feed(machine, link, &job);
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
            let job = Job::recovered(number, machine.owner.0, &self.dir, machine.output_limit(), info.started_ms);
            machine.shared.store.put_job(machine.slot, job.row());
            table.insert(Arc::new(job));
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

    /// Starts what was held back.
    pub(super) fn start_queued(&self, machine: &Arc<Machine>) {
        let (link, queued) = {
            let table = self.table.lock();
            let queued = table.jobs.values().filter(|job| job.phase() == Phase::Queued).cloned();
            (table.link.clone(), queued.collect::<Vec<_>>())
        };
        let Some(link) = link else { return };
        for job in queued {
            start(machine, &link, &job);
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
        machine.used();
        let ran = job.ran();
        machine.count_job(u64::try_from(ran.as_millis()).unwrap_or(u64::MAX));
        match (job.name(), job.exit()) {
            (Some(MAIN), Some(Ok(code))) => machine.main_ended(code, ran),
            (Some(CLONE), end) => machine.clone_ended(job, end.and_then(Result::ok)),
            _ => {}
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

/// A name that a job may have: as a machine's, with `.` and `_`; a number alone is one that was given to a script.
fn valid_name(name: &[u8]) -> Result<&str, MachineError> {
    let valid = |name: &&str| {
        name.len() <= 63
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
            && name.starts_with(|first: char| first.is_ascii_alphanumeric())
            && !name.bytes().all(|byte| byte.is_ascii_digit())
            && ![MAIN, CLONE].contains(name)
    };
    std::str::from_utf8(name).ok().filter(valid).ok_or_else(|| {
        MachineError::invalid(
            "a job's name is letters, digits, - _ and ., not a number alone, and neither main nor clone",
        )
    })
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}
