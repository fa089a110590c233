//! The service: all machines, by name and by number.

use super::config::Config;
use super::enter::{enter, take_up};
use super::error::MachineError;
use super::events::Events;
use super::limits::{Limits, Share};
use super::runner::Begin;
use super::state::State;
use super::store::{self, MachineRow, Store};
use super::templates::{DEFAULT, Template, Templates};
use super::textlog::TextLog;
use super::vars::{VarKind, VarRow};
use super::vault::Vault;
use super::volumes::Volumes;
use super::{Machine, config};
use crate::tree::cache::HostCache;
use crate::tree::guest::GuestFiles;
use crate::tree::ops::Caller;
use dashmap::DashMap;
use machinefs_backends::Backend;
use parking_lot::{Mutex, RwLock};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Instant, SystemTime};
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
    /// How much there may be.
    pub limits: Limits,
    /// Configuration that machines begin with, before any template: keys and values.
    pub defaults: Vec<(String, String)>,
    /// The key that secrets are sealed with.
    pub key_file: PathBuf,
    /// Where ports of guests listen on this host.
    pub ports_address: IpAddr,
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
    pub(super) options: Options,
    pub(super) templates: Templates,
    pub(super) vault: Arc<Vault>,
    pub(super) volumes: Arc<Volumes>,
    pub(super) started: Instant,
    /// Whether any machine can rest, or does: asked for every operation on files.
    pub(super) any_idle: AtomicBool,
    /// Held while a configuration changes.
    pub(super) changing: Mutex<()>,
    pub(super) counters: Counters,
    pub(super) names: Mutex<BTreeMap<String, Arc<Machine>>>,
    /// Machines that are being made: their names are taken, and they count.
    making: Mutex<BTreeMap<String, Share>>,
    pub(super) slots: DashMap<u32, Arc<Machine>>,
    pub(super) epochs: DashMap<u32, Weak<GuestFiles>>,
    next_epoch: AtomicU32,
    pub(super) uid_slots: Mutex<BTreeSet<u32>>,
    faults: Mutex<BTreeMap<String, String>>,
    pub(super) changed: RwLock<SystemTime>,
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

    /// Whether a machine that there is may have another share.
    pub(super) fn check_limits(&self, machine: &Machine, share: Share) -> Result<(), MachineError> {
        let machines: Vec<Arc<Machine>> = self.names.lock().values().cloned().collect();
        let others: Vec<Share> = machines
            .iter()
            .filter(|other| other.slot != machine.slot)
            .map(|other| other.share())
            .chain(self.making.lock().values().copied())
            .collect();
        self.options.limits.check(&others, share)
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

/// What the service has done since it started.
#[derive(Default)]
pub(super) struct Counters {
    pub(super) created: AtomicU64,
    pub(super) refused: AtomicU64,
    pub(super) jobs: AtomicU64,
    pub(super) job_millis: AtomicU64,
    pub(super) failed_boots: AtomicU64,
}

/// The service.
pub struct Registry {
    pub(super) shared: Arc<Shared>,
    started: SystemTime,
    /// Asked to end, by `shutdown` on the root's ctl.
    pub(super) shutdown: tokio::sync::Notify,
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
        let vault = Arc::new(Vault::new(options.key_file.clone()));
        let mount = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        for (key, value) in &options.defaults {
            config::known(key)?.check(value)?;
        }
        let shared = Arc::new(Shared {
            templates: Templates::load(store.clone(), vault.clone(), mount)?,
            volumes: Volumes::load(store.clone(), vault.clone(), &options.state_dir)?,
            vault,
            started: Instant::now(),
            any_idle: AtomicBool::new(true),
            changing: Mutex::default(),
            counters: Counters::default(),
            making: Mutex::default(),
            store,
            runtime: tokio::runtime::Handle::current(),
            events,
            cache: Arc::default(),
            life,
            mount_uid: mount.0,
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
        tokio::spawn(super::life::watch(Arc::downgrade(&shared)));
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
        let has_values = !overrides.is_empty();
        let row = match self.reserve(caller, name, overrides) {
            Ok(row) => row,
            Err(error) => {
                self.tell_refusal(caller, name, &error, has_values);
                return done(Err(error));
            }
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
                shared.making.lock().remove(&row.name);
                match &made {
                    Ok(machine) => {
                        shared.counters.created.fetch_add(1, Ordering::Relaxed);
                        machine.say("created", &[("uid", &row.uid.to_string()), ("template", &row.template)]);
                    }
                    Err(_) => {
                        shared.uid_slots.lock().remove(&row.uid_slot);
                    }
                }
                done(made);
            },
        );
    }

    /// mkdir has no room for a reason: it stands in `.sys/events`. That of a `create` with values can be read where it
    /// was written, and may quote a value, which is nobody else's business.
    fn tell_refusal(&self, caller: Caller, name: &str, error: &MachineError, has_values: bool) {
        self.shared.counters.refused.fetch_add(1, Ordering::Relaxed);
        // A name that cannot be one is not shown as one.
        let shown = if self.check_name(caller, name).is_ok() { name } else { "-" };
        let (uid, errno, why) = (caller.uid.to_string(), error.errno().name(), error.to_string());
        let mut details = vec![("uid", uid.as_str()), ("errno", &errno)];
        if !has_values {
            details.push(("why", &why));
        }
        self.shared.events.say(0, shown, None, "refused", &details);
    }

    fn check_name(&self, caller: Caller, name: &str) -> Result<(), MachineError> {
        self.shared.templates.for_name(caller, name).map(drop)
    }

    /// Checks everything that can be checked before anything is made.
    fn reserve(
        &self,
        caller: Caller,
        name: &str,
        overrides: Vec<(String, String)>,
    ) -> Result<MachineRow, MachineError> {
        let template = self.shared.templates.for_name(caller, name)?;
        let general = self.shared.templates.get(DEFAULT.as_bytes());
        // What comes later goes before: the daemon's file, the template default, the template, the arguments.
        let mut values: BTreeMap<&str, &str> = BTreeMap::new();
        values.extend(self.shared.options.defaults.iter().map(|(key, value)| (key.as_str(), value.as_str())));
        let of_templates: Vec<_> = general.iter().chain([&template]).map(|template| template.settings()).collect();
        for settings in &of_templates {
            values.extend(settings.iter().map(|(key, value)| (*key, value.as_str())));
        }
        values.extend(overrides.iter().map(|(key, value)| (key.as_str(), value.as_str())));
        let mut config = Config::default();
        let backend = self.shared.backend();
        for (key, value) in values {
            config.set(key, value)?.check_backend(backend.name(), value)?;
        }
        // The daemon opens it with its own rights, not with the caller's.
        let is_own_word = overrides.iter().any(|(key, _)| key == "image")
            || (!template.is_public() && template.settings().contains_key("image"));
        let is_trusted = caller.uid == 0 || caller.uid == self.shared.mount_uid || !is_own_word;
        if !is_trusted && config.get("image") != Some("host") {
            return Err(MachineError::denied(
                "only root, or the user whose daemon this is, may boot from a path of the host: leave out image=, or \
                 run a machinefs of your own",
            ));
        }
        if config.get("isolation") == Some("vm") && backend.isolation() != "vm" {
            return Err(MachineError::not_supported(
                "isolation=vm is asked for, and no backend here boots virtual machines: see machinefs check",
            ));
        }
        self.reserve_name(name, Share { uid: caller.uid, memory: config.size("memory") })?;
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
            template: template.name().to_string(),
            idle: false,
            jobs: (0, 0),
            vars: merged(caller, general.as_deref(), &template),
        })
    }

    fn reserve_name(&self, name: &str, share: Share) -> Result<(), MachineError> {
        let names = self.shared.names.lock();
        let mut making = self.shared.making.lock();
        if names.contains_key(name) || making.contains_key(name) {
            return Err(MachineError::exists(format!("there is a machine {name} already")));
        }
        let others: Vec<Share> =
            names.values().map(|machine| machine.share()).chain(making.values().copied()).collect();
        self.shared.options.limits.check(&others, share)?;
        making.insert(name.to_string(), share);
        Ok(())
    }

    /// Whether a machine may be called so: as any, or by its own template.
    pub fn valid_new_name(&self, machine: &Machine, name: &[u8]) -> bool {
        let rest = name.strip_prefix(machine.template.as_bytes()).and_then(|rest| rest.strip_prefix(b"."));
        Registry::valid_name(rest.unwrap_or(name))
    }

    /// The number of the last event.
    pub(super) fn last_event(&self) -> u64 {
        self.shared.events.last()
    }

    /// The templates.
    pub fn templates(&self) -> &Templates {
        &self.shared.templates
    }

    /// The volumes.
    pub fn volumes(&self) -> &Arc<Volumes> {
        &self.shared.volumes
    }

    /// Whether a machine can rest, or does.
    pub fn any_idle(&self) -> bool {
        self.shared.any_idle.load(Ordering::Relaxed)
    }

    /// Gives a machine another name. `done` as in [`Registry::create`].
    pub fn rename(
        &self,
        machine: &Arc<Machine>,
        new_name: &str,
        done: Box<dyn FnOnce(Result<(), MachineError>) + Send>,
    ) {
        let valid = if self.valid_new_name(machine, new_name.as_bytes()) {
            Ok(())
        } else {
            Err(MachineError::invalid(format!("bad name \"{}\"", new_name.escape_default())))
        };
        let moved = valid.and_then(|()| {
            let mut names = self.shared.names.lock();
            if names.contains_key(new_name) || self.shared.making.lock().contains_key(new_name) {
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

    /// Returns when `shutdown` was written to the root's ctl.
    pub async fn shutdown_asked(&self) {
        self.shutdown.notified().await;
    }

    /// Calls `done`, on another thread, once everything that was changed so far is written down, or could not be.
    pub fn settled(&self, done: impl FnOnce(Result<(), MachineError>) + Send + 'static) {
        self.shared.store.settled(done);
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

/// What a machine of this user has from its templates: of two of one name, that of its own template. Secrets are for
/// machines of the template's owner alone: another's could print them.
fn merged(caller: Caller, general: Option<&Template>, template: &Template) -> Vec<VarRow> {
    let mut all = BTreeMap::new();
    for source in general.into_iter().chain([template]) {
        let rows = source.vars().rows().into_iter();
        let shared = rows.filter(|row| row.kind != VarKind::Secret || source.is_of(caller));
        all.extend(shared.map(|row| ((row.kind, row.name.clone()), row)));
    }
    (1..).zip(all.into_values()).map(|(id, row)| VarRow { id, ..row }).collect()
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
