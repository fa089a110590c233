//! How a machine comes to be an object: when it was just made, and after a restart of the daemon.

use super::config::{self, Config};
use super::error::MachineError;
use super::jobs::Jobs;
use super::mounts::Mounts;
use super::registry::Shared;
use super::runner::{self, Begin};
use super::secrets::Delivery;
use super::silence::Silence;
use super::state::State;
use super::store::{self, LogKind, MachineRow};
use super::textlog::TextLog;
use super::vars::Vars;
use super::watch::Watch;
use super::{LOG_LIMIT, LOG_LINES, Life, Machine, RunFacts};
use parking_lot::{Mutex, RwLock};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};
use tokio::sync::mpsc;

/// Makes the object of a machine that is written down, and starts its task.
pub(super) fn enter(
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
    let may_run = matches!(begin, Begin::Adopt(_)) && matches!(state, State::Booting | State::Running | State::Paused);
    let machine = Arc::new_cyclic(|weak: &Weak<Machine>| Machine {
        slot: row.slot,
        id,
        owner: (row.uid, row.gid),
        created: SystemTime::UNIX_EPOCH + Duration::from_millis(row.created_ms.max(0) as u64),
        uid_slot: row.uid_slot,
        shared: shared.clone(),
        name: Mutex::new(row.name.clone()),
        life: Mutex::new(Life { state, changed: SystemTime::now(), why: String::new(), idle: row.idle, wake: false }),
        state_watch: Watch::new(),
        config: Mutex::new((config, SystemTime::now())),
        guest: RwLock::new(None),
        run: Mutex::new(RunFacts::default()),
        run_number: AtomicU64::new(0),
        grace_ms: AtomicU64::new(10_000),
        paused: Arc::new((state == State::Paused).into()),
        silence: Silence::default(),
        seeking: AtomicU64::new(0),
        adopting: AtomicBool::new(false),
        cloning: AtomicBool::new(false),
        jobs: Jobs::new(weak.clone(), jobs_dir),
        vars: Vars::load(row.slot, row.vars, shared.store.clone(), shared.vault.clone()),
        delivery: Delivery::default(),
        template: row.template,
        last_use: AtomicU64::new(shared.now()),
        ended_jobs: Mutex::new(row.jobs),
        restarts: Mutex::default(),
        ports: Default::default(),
        mounts: Mounts::new(may_run),
        looks: Default::default(),
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
    machine.follow_ports();
    shared.runtime.spawn(runner::run(machine.clone(), queue, begin));
    Ok(machine)
}

/// Takes up a machine after a restart.
pub(super) fn take_up(shared: &Arc<Shared>, row: MachineRow, known: mpsc::Sender<()>) -> Result<(), MachineError> {
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
