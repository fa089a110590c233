//! Machines: their life, configuration, jobs and logs. Knows backends and agents; knows nothing of the tree's names
//! or of FUSE.

pub mod config;
pub mod error;
pub mod events;
mod info;
pub mod job;
pub mod jobs;
pub mod output;
pub mod registry;
mod runner;
mod silence;
pub mod state;
mod store;
pub mod textlog;
pub mod watch;

use crate::errno::Errno;
use crate::link::{Link, RequestOptions};
use crate::tree::guest::GuestFiles;
use crate::tree::ops::Caller;
use config::Config;
use error::MachineError;
use events::stamp;
use jobs::Jobs;
use machinefs_backends::{Backend, MachineSpec};
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
    jobs: Jobs,
    events: TextLog,
    console: TextLog,
    errors: TextLog,
    history: TextLog,
    actions: mpsc::UnboundedSender<Action>,
}

/// The verbs of a machine's `ctl`.
pub const VERBS: &[Verb] = &[
    Verb { name: "start", usage: "start", doc: "boot it; succeeds when it runs already" },
    Verb {
        name: "stop",
        usage: "stop [GRACE]",
        doc: "ask it to end, kill it after GRACE (10s); succeeds when it is stopped",
    },
    Verb { name: "kill", usage: "kill", doc: "end it without asking" },
    Verb { name: "restart", usage: "restart", doc: "stop and start" },
    Verb { name: "pause", usage: "pause", doc: "freeze every process in it" },
    Verb { name: "resume", usage: "resume", doc: "undo pause" },
    Verb { name: "destroy", usage: "destroy", doc: "remove it with its disk, as rmdir does" },
    Verb { name: "set", usage: "set KEY=VALUE…", doc: "change its configuration, as writing to config/KEY does" },
];

impl Machine {
    /// Its number: below 2^24, never used again.
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

    /// The guest's files, while the agent is connected.
    pub fn files(&self) -> Option<Arc<GuestFiles>> {
        self.guest.read().as_ref().map(|guest| guest.files.clone())
    }

    fn link(&self) -> Option<Arc<Link>> {
        self.guest.read().as_ref().map(|guest| guest.link.clone())
    }

    /// Why its files or jobs cannot be used now.
    pub fn down_errno(&self) -> Errno {
        match self.state() {
            State::Running | State::Paused => Errno::EHOSTUNREACH,
            _ => Errno::EHOSTDOWN,
        }
    }

    /// The error for that, in words.
    pub fn down_error(&self) -> MachineError {
        let life = self.life.lock();
        match life.state {
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

    /// A line of `ctl`, already split into words. Success means accepted.
    ///
    /// # Errors
    /// EINVAL for an unknown verb, too many or bad words; EBUSY in the wrong state; EACCES, EPERM.
    pub fn ctl(self: &Arc<Self>, caller: Caller, words: &[String]) -> Result<(), MachineError> {
        self.check_owner(caller)?;
        let Some((verb, args)) = words.split_first() else { return Ok(()) };
        let usage = VERBS.iter().find(|known| known.name == verb);
        let Some(usage) = usage else {
            let names: Vec<&str> = VERBS.iter().map(|verb| verb.name).collect();
            return Err(MachineError::invalid(format!(
                "unknown control message \"{}\": the verbs are {}",
                words.join(" "),
                names.join(" ")
            )));
        };
        let event = match (verb.as_str(), args) {
            ("start", []) => Event::Start,
            ("stop", []) => Event::Stop,
            ("stop", [grace]) => {
                let grace = config::parse_time(grace)
                    .flatten()
                    .ok_or_else(|| MachineError::invalid(format!("bad grace \"{grace}\": a time as 10s")))?;
                self.grace_ms.store(u64::try_from(grace.as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
                Event::Stop
            }
            ("kill", []) => Event::Kill,
            ("restart", []) => Event::Restart,
            ("pause", []) if self.state() == State::Running && !self.backend().can_pause(&self.spec()) => {
                return Err(MachineError::not_supported("this host has no freezer control group for the machine"));
            }
            ("pause", []) => Event::Pause,
            ("resume", []) => Event::Resume,
            ("destroy", []) => return self.destroy(caller),
            ("set", [_, ..]) => return self.set_many(args),
            _ => return Err(MachineError::invalid(format!("wrong words after {verb}: usage: {}", usage.usage))),
        };
        self.fire(event).map_err(|help| state::refusal(verb, self.state(), help))
    }

    fn set_many(self: &Arc<Self>, args: &[String]) -> Result<(), MachineError> {
        let pairs = registry::parse_pairs(args)?;
        let mut trial = self.config.lock().0.clone();
        // All or nothing: a failed line has no effect.
        for (key, value) in &pairs {
            self.check_settable(key)?;
            trial.set(key, value)?;
        }
        for (key, value) in &pairs {
            self.config_set(key, value)?;
        }
        Ok(())
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
        {
            let mut life = self.life.lock();
            let (next, action) = match state::step(life.state, event) {
                Step::Go(next, action) => (next, action),
                Step::Stay => return Ok(()),
                Step::Refuse(help) => return Err(help),
            };
            let from = life.state;
            life.state = next;
            self.paused.store(next == State::Paused, Ordering::Release);
            life.changed = SystemTime::now();
            life.why = why.to_string();
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
        }
        self.shared.events.wake(Some(&self.events));
        self.state_watch.notify();
        Ok(())
    }

    fn say(&self, verb: &str, details: &[(&str, &str)]) {
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

    // ---- configuration ----

    /// The value of a key in force, as text.
    pub fn config_get(&self, key: &str) -> Option<String> {
        self.config.lock().0.get(key).map(str::to_string)
    }

    /// When the configuration was last changed.
    pub fn config_changed(&self) -> SystemTime {
        self.config.lock().1
    }

    fn check_settable(&self, name: &str) -> Result<(), MachineError> {
        let key = config::known(name)?;
        if key.applies == config::Applies::AtCreation {
            return Err(MachineError::busy(format!(
                "{name} can only be given when a machine is made: echo 'create NAME {name}=VALUE' > ../ctl"
            )));
        }
        Ok(())
    }

    /// Sets a key. One that waits for the next start is accepted, and pending in `info`.
    ///
    /// # Errors
    /// EINVAL for an unknown key or a bad value; EBUSY for a key that can only be given at creation.
    pub fn config_set(self: &Arc<Self>, name: &str, value: &str) -> Result<(), MachineError> {
        if self.config_get(name).as_deref() == Some(value) {
            return Ok(());
        }
        self.check_settable(name)?;
        {
            let mut config = self.config.lock();
            config.0.set(name, value)?;
            config.1 = SystemTime::now();
        }
        self.shared.store.set_config(self.slot, name, value);
        // Not its value: the log of all machines is open to everybody.
        self.say("config", &[("key", name)]);
        Ok(())
    }

    /// Checks a value without setting it.
    ///
    /// # Errors
    /// As [`Machine::config_set`].
    pub fn config_check(&self, name: &str, value: &str) -> Result<(), MachineError> {
        if self.config_get(name).as_deref() == Some(value) {
            return Ok(());
        }
        self.check_settable(name)?;
        config::known(name)?.check(value)
    }

    /// Where jobs start: an absolute path in the guest.
    pub fn workdir(&self) -> Vec<u8> {
        self.config_get("workdir").unwrap_or_default().into_bytes()
    }

    fn hostname(&self) -> String {
        self.config.lock().0.given("hostname").map_or_else(|| self.name(), str::to_string)
    }

    /// What the backend needs to know.
    fn spec(&self) -> MachineSpec {
        let config = self.config.lock().0.clone();
        MachineSpec {
            id: self.id.clone(),
            dir: self.dir.join("backend"),
            image: config.get("image").unwrap_or("host").to_string(),
            cpus: config.cpus(),
            memory: config.size("memory"),
            pids: config.count("pids"),
            hostname: self.hostname(),
            uid_slot: self.uid_slot,
        }
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
                Ok(time) => format!("ok {:.2}ms\n", time.as_secs_f64() * 1e3),
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
