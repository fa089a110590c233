//! Machines: their life, configuration, jobs and logs. Knows backends and agents; knows nothing of the tree's names
//! or of FUSE.

pub mod changes;
pub mod clone;
mod command;
pub mod config;
mod enter;
pub mod error;
pub mod events;
pub mod forward;
mod info;
pub mod input;
pub mod job;
pub mod jobs;
mod keys;
mod life;
pub mod limits;
mod metrics;
pub mod mounts;
pub mod output;
mod ports;
pub mod registry;
pub mod root_verbs;
mod runner;
mod secrets;
mod settings;
pub mod setup;
mod signals;
mod silence;
pub mod state;
mod store;
pub mod templates;
pub mod textlog;
mod usage;
pub mod vars;
pub mod vault;
mod verbs;
pub mod volumes;
pub mod watch;

pub use verbs::VERBS;

use crate::errno::Errno;
use crate::link::{Link, RequestOptions};
use crate::tree::guest::GuestFiles;
use crate::tree::ops::Caller;
use config::Config;
use error::MachineError;
use events::stamp;
use jobs::Jobs;
use machinefs_backends::Backend;
use machinefs_protocol::message::{GuestInfo, Request};
use parking_lot::{Mutex, RwLock};
use registry::Shared;
use silence::Silence;
use state::{Action, Event, State, Step};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};
use store::LogKind;
use textlog::TextLog;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use vars::Vars;
use watch::Watch;

/// Bytes kept of a machine's `events`, `errors` and `history`, each, and of its `console`.
const LOG_LIMIT: usize = 256 * 1024;
/// Lines of these logs that are read back after a restart.
const LOG_LINES: u32 = 1000;

/// A verb of a `ctl` file.
pub struct Verb {
    /// The word.
    pub name: &'static str,
    /// The whole grammar.
    pub usage: &'static str,
    /// One line.
    pub doc: &'static str,
}

struct Life {
    state: State,
    changed: SystemTime,
    /// Why it is failed or lost, for those who wait.
    why: String,
    /// It is down, or going down, only because nobody used it: the next use wakes it.
    idle: bool,
    /// It was used while it was going down: it is to start again at once.
    wake: bool,
}

/// What is there while the agent answers.
struct Guest {
    link: Arc<Link>,
    files: Arc<GuestFiles>,
    info: GuestInfo,
}

/// Facts of the present or last run.
#[derive(Default)]
struct RunFacts {
    pid: u32,
    pidfd: Option<Arc<AsyncFd<OwnedFd>>>,
    started: Option<SystemTime>,
    facts: Vec<(String, String)>,
    warnings: Vec<String>,
    /// The configuration it was started with.
    config: Option<Config>,
}

/// A machine.
pub struct Machine {
    slot: u32,
    id: String,
    owner: (u32, u32),
    created: SystemTime,
    uid_slot: u32,
    dir: PathBuf,
    shared: Arc<Shared>,
    name: Mutex<String>,
    life: Mutex<Life>,
    state_watch: Watch,
    config: Mutex<(Config, SystemTime)>,
    guest: RwLock<Option<Guest>>,
    run: Mutex<RunFacts>,
    /// Counts the runs, so that news of an old one is not taken for news of this one.
    run_number: AtomicU64,
    /// How long a stop waits before it kills, in milliseconds.
    grace_ms: AtomicU64,
    /// Whether it is paused, for its files.
    paused: Arc<AtomicBool>,
    silence: Silence,
    /// The run whose agent is being sought, 0 for none.
    seeking: AtomicU64,
    /// It runs, and its agent is sought for the first time since the daemon began.
    adopting: AtomicBool,
    /// Jobs wait for the repository to be cloned.
    cloning: AtomicBool,
    jobs: Jobs,
    vars: Vars,
    delivery: secrets::Delivery,
    /// The template it was made from.
    template: String,
    /// When it was last used, in milliseconds since the service started.
    last_use: AtomicU64,
    /// Jobs that have ended, ever, and their milliseconds.
    ended_jobs: Mutex<(u64, u64)>,
    restarts: Mutex<life::Restarts>,
    ports: ports::Ports,
    mounts: mounts::Mounts,
    looks: changes::Looks,
    events: TextLog,
    console: TextLog,
    errors: TextLog,
    history: TextLog,
    actions: mpsc::UnboundedSender<Action>,
}

impl Machine {
    /// Its number: below [`templates::FIRST_SLOT`], never used again.
    pub fn slot(&self) -> u32 {
        self.slot
    }

    /// The backend's name for it.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The name of its directory.
    pub fn name(&self) -> String {
        self.name.lock().clone()
    }

    /// User and group it belongs to, on the host.
    pub fn owner(&self) -> (u32, u32) {
        self.owner
    }

    /// When it was made.
    pub fn created(&self) -> SystemTime {
        self.created
    }

    /// Where it is in its life.
    pub fn state(&self) -> State {
        self.life.lock().state
    }

    /// When that changed.
    pub fn state_changed(&self) -> SystemTime {
        self.life.lock().changed
    }

    /// Notified at each change of the state.
    pub fn state_watch(&self) -> &Watch {
        &self.state_watch
    }

    /// Whether the user has destroyed it.
    pub fn is_destroyed(&self) -> bool {
        self.state() == State::Destroyed
    }

    /// How long `files/` waits for a boot.
    pub fn boot_wait(&self) -> Duration {
        self.config.lock().0.time("boot_wait").unwrap_or(Duration::MAX)
    }

    /// Log of what happened to it.
    pub fn events(&self) -> &TextLog {
        &self.events
    }

    /// Boot and serial output.
    pub fn console(&self) -> &TextLog {
        &self.console
    }

    /// The last errors.
    pub fn errors(&self) -> &TextLog {
        &self.errors
    }

    /// One line a command.
    pub fn history(&self) -> &TextLog {
        &self.history
    }

    /// Its jobs.
    pub fn jobs(&self) -> &Jobs {
        &self.jobs
    }

    /// Its environment, secrets and tags.
    pub fn vars(&self) -> &Vars {
        &self.vars
    }

    /// The name of the template it was made from.
    pub fn template(&self) -> &str {
        &self.template
    }

    /// The guest's files, while the agent is connected.
    pub fn files(&self) -> Option<Arc<GuestFiles>> {
        self.guest.read().as_ref().map(|guest| guest.files.clone())
    }

    fn link(&self) -> Option<Arc<Link>> {
        self.guest.read().as_ref().map(|guest| guest.link.clone())
    }

    /// Why its files or jobs cannot be used now.
    pub fn down_errno(&self) -> Errno {
        let life = self.life.lock();
        match life.state {
            State::Running | State::Paused if !life.idle => Errno::EHOSTUNREACH,
            _ => Errno::EHOSTDOWN,
        }
    }

    /// The error for that, in words.
    pub fn down_error(&self) -> MachineError {
        let life = self.life.lock();
        match life.state {
            _ if life.idle => MachineError::down("nobody used it, and it rests: the next exec wakes it"),
            State::Running | State::Paused => MachineError::unreachable("its agent does not answer"),
            State::Failed | State::Lost => MachineError::down(format!(
                "the machine is {}: {}; read errors, then: echo start > ctl",
                life.state, life.why
            )),
            State::Creating | State::Booting => MachineError::down("the machine is still booting: read wait/running"),
            state => MachineError::down(format!("the machine is {state}: echo start > ctl")),
        }
    }

    /// Whether that user may command it.
    ///
    /// # Errors
    /// EACCES.
    pub fn check_owner(&self, caller: Caller) -> Result<(), MachineError> {
        if caller.uid == self.owner.0 || caller.uid == 0 || caller.uid == self.shared.mount_uid {
            return Ok(());
        }
        Err(MachineError::denied(format!("the machine belongs to user {}", self.owner.0)))
    }

    /// Removes it: at once for the user, behind that for good.
    ///
    /// # Errors
    /// EPERM when it is protected, EACCES when it is another user's.
    pub fn destroy(self: &Arc<Self>, caller: Caller) -> Result<(), MachineError> {
        self.check_owner(caller)?;
        if self.config.lock().0.flag("protect") {
            return Err(MachineError::forbidden("it is protected: echo no > config/protect"));
        }
        self.shared.unlist(self);
        // Destroy is refused in no state.
        let _ = self.fire(Event::Destroy);
        Ok(())
    }

    /// Feeds the state machine. The change is seen by everybody when this returns; its action follows behind.
    fn fire(self: &Arc<Self>, event: Event) -> Result<(), &'static str> {
        self.fire_because(event, "")
    }

    fn fire_because(self: &Arc<Self>, event: Event, why: &str) -> Result<(), &'static str> {
        self.fire_and_rest(event, why, false)
    }

    /// As [`Machine::fire_because`]; `idle`: it is down only until somebody uses it.
    fn fire_and_rest(self: &Arc<Self>, event: Event, why: &str, idle: bool) -> Result<(), &'static str> {
        if self.step(event, why, idle)? {
            self.wake_watchers();
        }
        Ok(())
    }

    /// Feeds the state machine and wakes nobody: for callers that hold a lock. Gives whether there is a change.
    fn step(&self, event: Event, why: &str, idle: bool) -> Result<bool, &'static str> {
        let mut life = self.life.lock();
        // Its end is on the way to what was begun, and no news; everything else is another beginning.
        let rests = idle || (life.idle && event == Event::Ended && life.state == State::Stopping);
        let (next, action) = match state::step(life.state, event) {
            Step::Go(next, action) => (next, action),
            Step::Stay => return Ok(false),
            Step::Refuse(help) => return Err(help),
        };
        let from = life.state;
        if next == State::Running {
            self.used();
        }
        life.state = next;
        self.paused.store(next == State::Paused, Ordering::Release);
        life.changed = SystemTime::now();
        life.why = why.to_string();
        if life.idle != rests {
            (life.idle, life.wake) = (rests, false);
            self.shared.store.set_idle(self.slot, rests);
        }
        if from != next {
            self.shared.store.set_state(self.slot, next.word());
            let mut details = vec![("from", from.word()), ("to", next.word())];
            if !why.is_empty() {
                details.push(("why", why));
            }
            // Within the lock, so that the lines stand in the order of the changes.
            self.shared.events.say_quietly(self.slot, &self.name(), Some(&self.events), "state", &details);
        }
        if action != Action::None {
            // The runner ends only after TearDown, and nothing leaves destroyed.
            let _ = self.actions.send(action);
        }
        Ok(true)
    }

    /// Whether its agent is on the way: it boots, or this daemon has just begun and takes it over.
    pub fn awaits_agent(&self) -> bool {
        self.state().is_booting() || self.adopting.load(Ordering::Acquire)
    }

    /// Wakes who waits for a change of the state.
    fn wake_watchers(self: &Arc<Self>) {
        self.shared.events.wake(Some(&self.events));
        self.state_watch.notify();
        self.follow_ports();
    }

    /// Adds a line to the machine's `events`: a verb and what it is about.
    pub fn say(&self, verb: &str, details: &[(&str, &str)]) {
        self.shared.events.say(self.slot, &self.name(), Some(&self.events), verb, details);
    }

    /// Records an error: time, verb, errno's name, message, the command quoted.
    pub fn record_error(&self, verb: &str, errno: Errno, message: &str, command: &str) {
        let line = format!(
            "{} {verb} {} {} {}",
            stamp(SystemTime::now()),
            errno.name(),
            events::quote(message),
            events::quote(command)
        );
        self.errors.append(format!("{line}\n").as_bytes());
        self.shared.store.log(self.slot, LogKind::Error, &line);
    }

    /// Calls `done`, on another thread, once everything that was changed so far is written down, or could not be.
    pub fn settled(&self, done: impl FnOnce(Result<(), MachineError>) + Send + 'static) {
        self.shared.store.settled(done);
    }

    /// Does on another thread what writes to the disk.
    pub fn on_disk(&self, work: impl FnOnce() + Send + 'static) {
        self.shared.runtime.spawn_blocking(work);
    }

    fn backend(&self) -> Arc<dyn Backend> {
        self.shared.backend()
    }

    /// A round trip to the agent: `ok 0.21ms`, or why not.
    pub fn health(self: &Arc<Self>, done: Box<dyn FnOnce(String) + Send>) {
        let Some(link) = self.link() else {
            done(format!("{}\n", self.down_error()));
            return;
        };
        self.shared.runtime.spawn(async move {
            done(match link.ping().await {
                Ok(time) => format!("ok {:08.2}ms\n", time.as_secs_f64() * 1e3),
                Err(error) => format!("the agent does not answer: {error}\n"),
            });
        });
    }

    /// Called each second: see [`silence`].
    fn look_after(&self, second: u64) {
        let link = self.link();
        let there = || link.as_ref().is_some_and(|link| link.is_responsive());
        if self.state() != State::Running {
            if self.silence.set(false).is_some() {
                self.shared.fault(&self.silence_subject(), None);
            }
            return;
        }
        let is_turn = (second + u64::from(self.slot)).is_multiple_of(silence::ASK_EVERY);
        if let Some(link) = link.as_ref().filter(|_| is_turn) {
            // What matters of the answer is that it comes: the link itself notes a silence.
            let options = RequestOptions::within(link.op_deadline());
            link.request(&Request::Ping, &[], options, Box::new(|_| {}));
        }
        self.told_of(self.silence.look(there()));
    }

    /// Of the line in `.sys/health`.
    fn silence_subject(&self) -> String {
        format!("{} agent", self.id)
    }

    fn told_of(&self, change: Option<bool>) {
        let Some(silent) = change else { return };
        let fault = "its agent does not answer; its jobs go on, and it is sought again; to end it: echo kill > ctl";
        self.shared
            .fault(&format!("{} agent", self.id), silent.then(|| format!("{}: {fault}", self.name())).as_deref());
        if silent {
            self.record_error("run", Errno::EHOSTUNREACH, "the agent did not answer", "");
        }
        self.say("agent", &[("answers", if silent { "no" } else { "yes" })]);
    }

    fn next_run(&self) -> u64 {
        self.run_number.fetch_add(1, Ordering::SeqCst) + 1
    }

    fn is_run(&self, number: u64) -> bool {
        self.run_number.load(Ordering::SeqCst) == number
    }
}
