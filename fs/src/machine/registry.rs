//! The service: all machines, by name and by number.

use super::config::Config;
use super::error::MachineError;
use super::events::Events;
use super::jobs::Jobs;
use super::runner::{self, Begin};
use super::silence::Silence;
use super::state::State;
use super::store::{self, LogKind, MachineRow, Store};
use super::textlog::TextLog;
use super::watch::Watch;
use super::{LOG_LIMIT, LOG_LINES, Life, Machine, RunFacts, Verb, config};
use crate::tree::cache::HostCache;
use crate::tree::guest::GuestFiles;
use crate::tree::ops::Caller;
use dashmap::DashMap;
use machinefs_backends::Backend;
use parking_lot::{Mutex, RwLock};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};
use tokio::sync::mpsc;

/// Machines there may be at once, unless configured.
pub const DEFAULT_MAX_MACHINES: usize = 1000;
/// Node ids have room for so many boots in one life of the daemon.
const MAX_EPOCH: u32 = 1 << 23;

/// With less than this free, in bytes, no job is begun: those that run must be able to end.
const LEAST_FREE: u64 = 256 * 1024;

/// What the service is told at its start.
pub struct Options {
    /// Where machines and the database are kept.
    pub state_dir: PathBuf,
    /// Machines there may be at once.
    pub max_machines: usize,
    /// What `default` means, and the only one so far.
    pub backend: Arc<dyn Backend>,
}

/// What all machines share.
pub struct Shared {
    pub(super) store: Store,
    pub(super) runtime: tokio::runtime::Handle,
    pub(super) events: Events,
    cache: Arc<HostCache>,
    /// Random, one for each life of the daemon.
    pub(super) life: u64,
    pub(super) mount_uid: u32,
    options: Options,
    names: Mutex<BTreeMap<String, Arc<Machine>>>,
    slots: DashMap<u32, Arc<Machine>>,
    pub(super) epochs: DashMap<u32, Weak<GuestFiles>>,
    next_epoch: AtomicU32,
    uid_slots: Mutex<BTreeSet<u32>>,
    faults: Mutex<BTreeMap<String, String>>,
    changed: RwLock<SystemTime>,
}

impl Shared {
    pub(super) fn backend(&self) -> Arc<dyn Backend> {
        self.options.backend.clone()
    }

    /// What the host's kernel remembers of guests.
    pub(super) fn cache(&self) -> Arc<HostCache> {
        self.cache.clone()
    }

    pub(super) fn next_epoch(&self) -> u32 {
        // Dead ones are swept when a new one comes: there is one a boot.
        self.epochs.retain(|_, files| files.strong_count() > 0);
        self.next_epoch.fetch_add(1, Ordering::Relaxed) % MAX_EPOCH
    }

    /// Takes the machine's name off the listing; open files of it stay valid.
    pub(super) fn unlist(&self, machine: &Arc<Machine>) {
        let mut names = self.names.lock();
        let name = machine.name();
        if names.get(&name).is_some_and(|there| there.slot == machine.slot) {
            names.remove(&name);
            *self.changed.write() = SystemTime::now();
        }
    }

    /// Forgets a machine whose resources are gone.
    pub(super) fn forget(&self, machine: &Arc<Machine>) {
        self.slots.remove(&machine.slot);
        self.uid_slots.lock().remove(&machine.uid_slot);
    }

    /// Whether the disk of the state directory takes more.
    ///
    /// # Errors
    /// ENOSPC when it is as good as full.
    pub(super) fn check_space(&self) -> Result<(), MachineError> {
        let dir = &self.options.state_dir;
        // What cannot be asked shows when it is written.
        let Ok(disk) = rustix::fs::statvfs(dir) else { return Ok(()) };
        let blocks = if self.mount_uid == 0 { disk.f_bfree } else { disk.f_bavail };
        let free = blocks.saturating_mul(disk.f_frsize);
        if free >= LEAST_FREE {
            return Ok(());
        }
        Err(MachineError::no_space(format!(
            "the host's disk with {} is full ({} KiB free): remove something from it",
            dir.display(),
            free / 1024
        )))
    }

    /// Sets or clears a line of `.sys/health`.
    pub(super) fn fault(&self, subject: &str, fault: Option<&str>) {
        let mut faults = self.faults.lock();
        match fault {
            Some(text) => faults.insert(subject.to_string(), text.to_string()),
            None => faults.remove(subject),
        };
    }
}

/// The service.
pub struct Registry {
    shared: Arc<Shared>,
    started: SystemTime,
    /// Asked to end, by `shutdown` on the root's ctl.
    shutdown: tokio::sync::Notify,
}

type Done<T> = Box<dyn FnOnce(Result<T, MachineError>) + Send>;

/// The verbs of the root's `ctl`.
pub const VERBS: &[Verb] = &[
    Verb {
        name: "create",
        usage: "create NAME [KEY=VALUE…]",
        doc: "make a machine, as mkdir does, with a configuration",
    },
    Verb { name: "stop", usage: "stop all", doc: "stop all machines of yours" },
    Verb { name: "destroy", usage: "destroy all", doc: "destroy all machines of yours that are not protected" },
    Verb { name: "prune", usage: "prune", doc: "destroy your machines that are stopped, failed or lost" },
    Verb { name: "shutdown", usage: "shutdown", doc: "unmount and end the daemon; machines run on" },
];

/// Splits `key=value` words.
///
/// # Errors
/// EINVAL for a word without `=`.
pub(super) fn parse_pairs(words: &[String]) -> Result<Vec<(String, String)>, MachineError> {
    words
        .iter()
        .map(|word| match word.split_once('=') {
            Some((key, value)) if !key.is_empty() => Ok((key.to_string(), value.to_string())),
            _ => Err(MachineError::invalid(format!("\"{word}\" is not key=value"))),
        })
        .collect()
}

impl Registry {
    /// What the host's kernel remembers of guests.
    pub fn cache(&self) -> Arc<HostCache> {
        self.shared.cache()
    }

    /// Opens the state directory and takes up the machines in it. When it returns, the state of each is true.
    ///
    /// # Errors
    /// The state directory cannot be used.
    pub async fn open(options: Options) -> Result<Arc<Registry>, MachineError> {
        std::fs::create_dir_all(options.state_dir.join("machines"))
            .map_err(|error| MachineError::no_space(format!("cannot make {}: {error}", options.state_dir.display())))?;
        let (store, _thread) = Store::open(&options.state_dir.join("state.db"))?;
        let events = Events::load(store.clone())?;
        let rows = store.query(store::machines)?;
        let life = random()?;
        let shared = Arc::new(Shared {
            store,
            runtime: tokio::runtime::Handle::current(),
            events,
            cache: Arc::default(),
            life,
            mount_uid: rustix::process::geteuid().as_raw(),
            options,
            names: Mutex::default(),
            slots: DashMap::new(),
            epochs: DashMap::new(),
            next_epoch: AtomicU32::new(0),
            uid_slots: Mutex::default(),
            faults: Mutex::default(),
            changed: RwLock::new(SystemTime::now()),
        });
        let (known, mut all_known) = mpsc::channel(1);
        for row in rows {
            take_up(&shared, row, known.clone())?;
        }
        drop(known);
        while all_known.recv().await.is_some() {}
        shared.runtime.spawn(look_after(Arc::downgrade(&shared)));
        shared.events.say(0, "-", None, "started", &[("version", env!("CARGO_PKG_VERSION"))]);
        Ok(Arc::new(Registry { shared, started: SystemTime::now(), shutdown: tokio::sync::Notify::new() }))
    }

    /// Whether it can be a machine's name: `[A-Za-z0-9][A-Za-z0-9-]{0,62}`.
    pub fn valid_name(name: &[u8]) -> bool {
        name.len() <= 63
            && name.first().is_some_and(u8::is_ascii_alphanumeric)
            && name.iter().all(|byte| byte.is_ascii_alphanumeric() || *byte == b'-')
    }

    /// The machine of that name.
    pub fn get(&self, name: &[u8]) -> Option<Arc<Machine>> {
        self.shared.names.lock().get(std::str::from_utf8(name).ok()?).cloned()
    }

    /// The machine of that number, destroyed ones that are still being removed too.
    pub fn by_slot(&self, slot: u32) -> Option<Arc<Machine>> {
        self.shared.slots.get(&slot).map(|machine| machine.clone())
    }

    /// The guest's files of one boot.
    pub fn files_by_epoch(&self, epoch: u32) -> Option<Arc<GuestFiles>> {
        self.shared.epochs.get(&epoch).and_then(|files| files.upgrade())
    }

    /// All machines, in the order of their names.
    pub fn list(&self) -> Vec<Arc<Machine>> {
        self.shared.names.lock().values().cloned().collect()
    }

    /// Makes a machine and starts its life. `done` is called once that is written down, on another thread.
    pub fn create(
        &self,
        caller: Caller,
        name: &str,
        overrides: Vec<(String, String)>,
        done: Box<dyn FnOnce(Result<Arc<Machine>, MachineError>) + Send>,
    ) {
        let row = match self.reserve(caller, name, overrides) {
            Ok(row) => row,
            Err(error) => return done(Err(error)),
        };
        let (shared, written) = (self.shared.clone(), row.clone());
        let slot = Arc::new(AtomicU32::new(0));
        let given = slot.clone();
        self.shared.store.write_then(
            move |db| {
                given.store(store::insert_machine(db, &written)?, Ordering::SeqCst);
                Ok(())
            },
            move |result| {
                let row = MachineRow { slot: slot.load(Ordering::SeqCst), ..row };
                let made = result.and_then(|()| enter(&shared, row.clone(), Begin::Create, |_| {}));
                match &made {
                    Ok(machine) => machine.say("created", &[("uid", &row.uid.to_string())]),
                    Err(_) => {
                        shared.uid_slots.lock().remove(&row.uid_slot);
                    }
                }
                done(made);
            },
        );
    }

    /// Checks everything that can be checked before anything is made.
    fn reserve(
        &self,
        caller: Caller,
        name: &str,
        overrides: Vec<(String, String)>,
    ) -> Result<MachineRow, MachineError> {
        check_name(name)?;
        let mut config = Config::default();
        for (key, value) in &overrides {
            config.set(key, value)?;
        }
        // The daemon opens it with its own rights, not with the caller's.
        let is_trusted = caller.uid == 0 || caller.uid == self.shared.mount_uid;
        if !is_trusted && config.get("image") != Some("host") {
            return Err(MachineError::denied(
                "only root, or the user whose daemon this is, may boot from a path of the host: leave out image=, or \
                 run a machinefs of your own",
            ));
        }
        if config.get("isolation") == Some("vm") && self.shared.backend().isolation() != "vm" {
            return Err(MachineError::not_supported(
                "isolation=vm is asked for, and no backend here boots virtual machines: see machinefs check",
            ));
        }
        {
            let names = self.shared.names.lock();
            if names.contains_key(name) {
                return Err(MachineError::exists(format!("there is a machine {name} already")));
            }
            if names.len() >= self.shared.options.max_machines {
                return Err(MachineError::limit(format!(
                    "there are {} machines, the most this daemon allows (max_machines)",
                    names.len()
                )));
            }
        }
        let uid_slot = {
            let mut used = self.shared.uid_slots.lock();
            let free = (0..).find(|slot| !used.contains(slot)).unwrap_or(u32::MAX);
            used.insert(free);
            free
        };
        Ok(MachineRow {
            slot: 0,
            name: name.to_string(),
            uid: caller.uid,
            gid: caller.gid,
            created_ms: now_ms(),
            state: State::Creating.word().to_string(),
            uid_slot,
            config: config.overrides().map(|(key, value)| (key.to_string(), value.to_string())).collect(),
        })
    }

    /// Gives a machine another name. `done` as in [`Registry::create`].
    pub fn rename(
        &self,
        machine: &Arc<Machine>,
        new_name: &str,
        done: Box<dyn FnOnce(Result<(), MachineError>) + Send>,
    ) {
        let moved = check_name(new_name).and_then(|()| {
            let mut names = self.shared.names.lock();
            if names.contains_key(new_name) {
                return Err(MachineError::forbidden(format!("there is a machine {new_name} already")));
            }
            let mut name = machine.name.lock();
            if names.get(name.as_str()).is_none_or(|there| there.slot != machine.slot) {
                return Err(MachineError::not_found("the machine is gone"));
            }
            names.remove(name.as_str());
            names.insert(new_name.to_string(), machine.clone());
            Ok(std::mem::replace(&mut *name, new_name.to_string()))
        });
        let old = match moved {
            Ok(old) => old,
            Err(error) => return done(Err(error)),
        };
        *self.shared.changed.write() = SystemTime::now();
        machine.say("renamed", &[("from", &old)]);
        let (slot, name) = (machine.slot, new_name.to_string());
        self.shared.store.write_then(move |db| store::set_name(db, slot, &name), done);
    }

    /// A line of the root's `ctl`, split into words. `done` may be called before this returns.
    pub fn ctl(&self, caller: Caller, words: &[String], done: Done<()>) {
        let Some((verb, args)) = words.split_first() else { return done(Ok(())) };
        let Some(usage) = VERBS.iter().find(|known| known.name == verb) else {
            let names: Vec<&str> = VERBS.iter().map(|verb| verb.name).collect();
            return done(Err(MachineError::invalid(format!(
                "unknown control message \"{}\": the verbs are {}",
                words.join(" "),
                names.join(" ")
            ))));
        };
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        match (verb.as_str(), args.as_slice()) {
            ("create", [name, ..]) => match parse_pairs(&words[2..]) {
                Ok(pairs) => self.create(caller, name, pairs, Box::new(move |made| done(made.map(drop)))),
                Err(error) => done(Err(error)),
            },
            ("stop", ["all"]) => done(self.each(caller, |machine| machine.ctl(caller, &["stop".to_string()]))),
            ("destroy", ["all"]) => done(self.each(caller, |machine| {
                if machine.config_get("protect").as_deref() == Some("yes") { Ok(()) } else { machine.destroy(caller) }
            })),
            ("prune", []) => done(self.each(caller, |machine| match machine.state() {
                State::Stopped | State::Failed | State::Lost
                    if machine.config_get("protect").as_deref() != Some("yes") =>
                {
                    machine.destroy(caller)
                }
                _ => Ok(()),
            })),
            ("shutdown", []) if caller.uid == 0 || caller.uid == self.shared.mount_uid => {
                self.shutdown.notify_one();
                done(Ok(()));
            }
            ("shutdown", []) => done(Err(MachineError::denied("only who runs the daemon may shut it down"))),
            _ => done(Err(MachineError::invalid(format!("wrong words after {verb}: usage: {}", usage.usage)))),
        }
    }

    fn each(
        &self,
        caller: Caller,
        act: impl Fn(&Arc<Machine>) -> Result<(), MachineError>,
    ) -> Result<(), MachineError> {
        let mut result = Ok(());
        for machine in self.list() {
            if caller.uid == 0 || caller.uid == machine.owner.0 {
                // One that refuses does not save the others.
                result = result.and(act(&machine));
            }
        }
        result
    }

    /// Returns when `shutdown` was written to the root's ctl.
    pub async fn shutdown_asked(&self) {
        self.shutdown.notified().await;
    }

    /// Waits until everything is written down.
    pub async fn flush(&self) {
        if let Err(error) = self.shared.store.flush().await {
            tracing::error!(%error, "not everything could be written down");
        }
    }

    /// The events of all machines.
    pub fn events(&self) -> &TextLog {
        self.shared.events.all()
    }

    /// When a machine last came, went or changed its name.
    pub fn changed(&self) -> SystemTime {
        *self.shared.changed.read()
    }

    /// When a machine last came, went, or changed its name or state. Not the time of asking, though figures move all
    /// the time: tar would say that the file changed under it.
    pub fn last_change(&self) -> SystemTime {
        self.list().iter().map(|machine| machine.state_changed()).fold(self.changed(), SystemTime::max)
    }

    /// When the service started.
    pub fn started(&self) -> SystemTime {
        self.started
    }

    /// Who runs the daemon.
    pub fn mount_uid(&self) -> u32 {
        self.shared.mount_uid
    }

    /// The group of who runs the daemon.
    pub fn mount_gid(&self) -> u32 {
        rustix::process::getegid().as_raw()
    }

    /// `ok`, or one line a fault.
    pub fn health_text(&self) -> String {
        let mut lines: Vec<String> =
            self.shared.faults.lock().iter().map(|(subject, fault)| format!("{subject}: {fault}\n")).collect();
        lines.extend(self.shared.check_space().err().map(|error| format!("disk: {error}\n")));
        lines.extend(self.shared.store.fault().map(|fault| format!("store: {fault}\n")));
        if lines.is_empty() { "ok\n".into() } else { lines.concat() }
    }
}

/// Looks at each machine once a second, for as long as the service is there.
async fn look_after(shared: Weak<Shared>) {
    for second in 0.. {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let Some(shared) = shared.upgrade() else { return };
        let machines: Vec<Arc<Machine>> = shared.slots.iter().map(|entry| entry.value().clone()).collect();
        for machine in machines {
            machine.look_after(second);
        }
    }
}

fn check_name(name: &str) -> Result<(), MachineError> {
    if Registry::valid_name(name.as_bytes()) {
        return Ok(());
    }
    Err(MachineError::invalid(format!(
        "bad name \"{}\": letters, digits and -, beginning with a letter or digit, at most 63",
        name.escape_default()
    )))
}

fn random() -> Result<u64, MachineError> {
    let mut bytes = [0u8; 8];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .map_err(|error| MachineError::internal(format!("no random numbers: {error}")))?;
    Ok(u64::from_le_bytes(bytes))
}

fn now_ms() -> i64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_millis() as i64)
}

/// Makes the object of a machine that is written down, and starts its task.
fn enter(
    shared: &Arc<Shared>,
    row: MachineRow,
    begin: Begin,
    fill: impl FnOnce(&Arc<Machine>),
) -> Result<Arc<Machine>, MachineError> {
    let state = State::from_word(&row.state)
        .ok_or_else(|| MachineError::internal(format!("the database has a state \"{}\"", row.state)))?;
    let mut config = Config::default();
    for (key, value) in &row.config {
        if let Err(error) = config.set(key, value) {
            tracing::warn!(machine = row.name, %error, "a setting of an older build is ignored");
        }
    }
    let id = format!("m{}", row.slot);
    let dir = shared.options.state_dir.join("machines").join(&id);
    let jobs_dir = dir.join("jobs");
    std::fs::create_dir_all(&jobs_dir)
        .map_err(|error| MachineError::no_space(format!("cannot make {}: {error}", jobs_dir.display())))?;
    let (actions, queue) = mpsc::unbounded_channel();
    let machine = Arc::new_cyclic(|weak: &Weak<Machine>| Machine {
        slot: row.slot,
        id,
        owner: (row.uid, row.gid),
        created: SystemTime::UNIX_EPOCH + Duration::from_millis(row.created_ms.max(0) as u64),
        uid_slot: row.uid_slot,
        shared: shared.clone(),
        name: Mutex::new(row.name.clone()),
        life: Mutex::new(Life { state, changed: SystemTime::now(), why: String::new() }),
        state_watch: Watch::new(),
        config: Mutex::new((config, SystemTime::now())),
        guest: RwLock::new(None),
        run: Mutex::new(RunFacts::default()),
        run_number: AtomicU64::new(0),
        grace_ms: AtomicU64::new(10_000),
        paused: Arc::new((state == State::Paused).into()),
        silence: Silence::default(),
        seeking: AtomicU64::new(0),
        jobs: Jobs::new(weak.clone(), jobs_dir),
        dir,
        events: TextLog::new(LOG_LIMIT),
        console: TextLog::new(LOG_LIMIT),
        errors: TextLog::new(LOG_LIMIT),
        history: TextLog::new(LOG_LIMIT),
        actions,
    });
    {
        let mut names = shared.names.lock();
        if state != State::Destroyed {
            if names.contains_key(&row.name) {
                let slot = row.slot;
                shared.store.write(move |db| store::delete_machine(db, slot));
                return Err(MachineError::exists(format!("there is a machine {} already", row.name)));
            }
            names.insert(row.name, machine.clone());
            *shared.changed.write() = SystemTime::now();
        }
        shared.slots.insert(row.slot, machine.clone());
    }
    fill(&machine);
    shared.runtime.spawn(runner::run(machine.clone(), queue, begin));
    Ok(machine)
}

/// Takes up a machine after a restart.
fn take_up(shared: &Arc<Shared>, row: MachineRow, known: mpsc::Sender<()>) -> Result<(), MachineError> {
    shared.uid_slots.lock().insert(row.uid_slot);
    let slot = row.slot;
    let (jobs, last, events, errors, history) = shared.store.query(move |db| {
        Ok((
            store::jobs(db, slot)?,
            store::counter(db, &store::jobs_counter(slot))?,
            store::load_log(db, slot, LogKind::Event, LOG_LINES)?,
            store::load_log(db, slot, LogKind::Error, LOG_LINES)?,
            store::load_log(db, slot, LogKind::History, LOG_LINES)?,
        ))
    })?;
    let limit = row.config.iter().find(|(key, _)| key == "output_limit");
    let limit = limit.and_then(|(_, value)| config::parse_size(value).flatten()).unwrap_or(64 << 20);
    enter(shared, row, Begin::Adopt(known), move |machine| {
        machine.jobs.load(jobs, last.max(0) as u64, limit);
        for (log, lines) in [(&machine.events, events), (&machine.errors, errors), (&machine.history, history)] {
            for line in lines {
                log.append(format!("{line}\n").as_bytes());
            }
        }
    })
    .map(drop)
}
