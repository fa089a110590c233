//! Volumes: directories that outlive machines, for `mounts/`. Their names and owners are written down among the named
//! things of the service itself; their files are the backend's business.

use super::error::MachineError;
use super::registry::Registry;
use super::store::{self, Store};
use super::vars::{VarKind, Vars};
use super::vault::Vault;
use crate::tree::ops::Caller;
use machinefs_backends::volumes::Volumes as Disk;
use serde::{Deserialize, Serialize};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::{Mutex, MutexGuard};

/// Volumes that one user may have.
const MOST: usize = 1000;
/// How long a removal waits for machines that were destroyed, and are still on their way out.
const PATIENCE: Duration = Duration::from_secs(4);

/// How far a volume is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Stage {
    Coming,
    There,
    Going,
}

/// What is written down of a volume.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Record {
    uid: u32,
    gid: u32,
    created_ms: u64,
    stage: Stage,
}

/// A volume.
#[derive(Clone, Debug)]
pub struct Volume {
    /// Its number, for inode numbers.
    pub id: u32,
    /// Its name.
    pub name: String,
    /// User and group it belongs to.
    pub owner: (u32, u32),
    /// When it was made.
    pub created: SystemTime,
}

/// The volumes of the service.
pub struct Volumes {
    all: Vars,
    disk: Disk,
    store: Store,
    changing: Mutex<()>,
}

fn failed(name: &str, error: &io::Error) -> MachineError {
    let message = format!("the volume {name}: {error}");
    match error.raw_os_error() {
        Some(libc::EMFILE | libc::ENFILE) => MachineError::limit(message),
        _ => MachineError::no_space(message),
    }
}

async fn on_thread<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

impl Volumes {
    /// As they were written down. What was half made or half removed when the daemon ended is removed behind.
    ///
    /// # Errors
    /// The store cannot be read.
    pub(super) fn load(store: Store, vault: Arc<Vault>, state_dir: &Path) -> Result<Arc<Volumes>, MachineError> {
        let rows = store.query(|db| store::vars(db, 0))?;
        let all = Vars::load(0, rows, store.clone(), vault);
        let volumes = Arc::new(Volumes { all, disk: Disk::new(state_dir), store, changing: Mutex::new(()) });
        for (id, name) in volumes.all.list(VarKind::Volume) {
            if volumes.record(id).is_none_or(|record| record.stage != Stage::There) {
                tokio::spawn(volumes.clone().clear(id, name));
            }
        }
        Ok(volumes)
    }

    fn record(&self, id: u32) -> Option<Record> {
        serde_json::from_slice(&self.all.value(VarKind::Volume, id)?).ok()
    }

    fn put(&self, id: u32, record: Record) -> Result<(), MachineError> {
        let value = serde_json::to_vec(&record).map_err(|error| MachineError::internal(error.to_string()))?;
        self.all.set(VarKind::Volume, id, &value)
    }

    fn volume(&self, id: u32, name: String) -> Option<Volume> {
        let record = self.record(id).filter(|record| record.stage == Stage::There)?;
        let created = SystemTime::UNIX_EPOCH + Duration::from_millis(record.created_ms);
        Some(Volume { id, name, owner: (record.uid, record.gid), created })
    }

    /// The volume of that name.
    pub fn get(&self, name: &[u8]) -> Option<Volume> {
        let id = self.all.find(VarKind::Volume, name)?;
        self.volume(id, String::from_utf8_lossy(name).into_owned())
    }

    /// The volume of that number.
    pub fn by_id(&self, id: u32) -> Option<Volume> {
        self.volume(id, self.all.name(VarKind::Volume, id)?)
    }

    /// All of them, in the order in which they were made.
    pub fn list(&self) -> Vec<Volume> {
        let all = self.all.list(VarKind::Volume).into_iter();
        all.filter_map(|(id, name)| self.volume(id, name)).collect()
    }

    /// When one last came or went.
    pub fn changed(&self) -> SystemTime {
        self.all.changed()
    }

    /// Until this is dropped, none comes or goes.
    pub(super) async fn hold(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().await
    }

    /// Whether that user may mount it.
    ///
    /// # Errors
    /// ENOENT, EACCES.
    pub(super) fn check_use(&self, name: &str, uid: u32) -> Result<(), MachineError> {
        let volume = self.get(name.as_bytes()).ok_or_else(|| {
            let shown = name.escape_default();
            MachineError::not_found(format!("there is no volume {shown}: mkdir .sys/volumes/{shown}"))
        })?;
        if uid == 0 || volume.owner.0 == uid {
            return Ok(());
        }
        Err(MachineError::denied(format!("the volume {name} belongs to user {}", volume.owner.0)))
    }

    async fn create(&self, caller: Caller, name: String) -> Result<Volume, MachineError> {
        let _one = self.changing.lock().await;
        let there = self.all.find(VarKind::Volume, name.as_bytes());
        if there.and_then(|id| self.record(id)).is_some_and(|record| record.stage != Stage::There) {
            return Err(MachineError::busy(format!("an older volume {name} is still being removed")));
        }
        if self.list().iter().filter(|volume| volume.owner.0 == caller.uid).count() >= MOST {
            return Err(MachineError::quota(format!("you have {MOST} volumes, which is the most")));
        }
        let id = self.all.create(VarKind::Volume, name.as_bytes())?;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let created_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
        let record = Record { uid: caller.uid, gid: caller.gid, created_ms, stage: Stage::Coming };
        let (disk, on_disk) = (self.disk.clone(), name.clone());
        // What is made is written down first, so that a crash leaks nothing.
        let made = async {
            self.put(id, record)?;
            self.store.flush().await?;
            let made = on_thread(move || disk.create(&on_disk, record.uid, record.gid)).await;
            made.map_err(|error| failed(&name, &error))?;
            self.put(id, Record { stage: Stage::There, ..record })?;
            self.store.flush().await
        };
        if let Err(error) = made.await {
            self.all.remove(VarKind::Volume, id);
            return Err(error);
        }
        self.volume(id, name).ok_or_else(|| MachineError::not_found("the volume is gone"))
    }

    /// Removes what there is of one, and then forgets it.
    async fn clear(self: Arc<Self>, id: u32, name: String) {
        let disk = self.disk.clone();
        let shown = name.clone();
        match on_thread(move || disk.remove(&name)).await {
            Ok(()) => drop(self.all.remove(VarKind::Volume, id)),
            // It is tried again when the daemon starts; its name is taken until then.
            Err(error) => tracing::error!(volume = shown, %error, "cannot be removed"),
        }
    }
}

impl Registry {
    /// Makes a volume of the caller's: `mkdir .sys/volumes/NAME`. `done` is called once it is there and written down.
    pub fn create_volume(
        &self,
        caller: Caller,
        name: &[u8],
        done: Box<dyn FnOnce(Result<Volume, MachineError>) + Send>,
    ) {
        if let Err(error) = VarKind::Volume.check_name(name) {
            return done(Err(error));
        }
        let (volumes, name) = (self.shared.volumes.clone(), String::from_utf8_lossy(name).into_owned());
        self.shared.runtime.spawn(async move { done(volumes.create(caller, name).await) });
    }

    /// Names of the machines that have a volume mounted, or are to.
    pub fn machines_with(&self, volume: &str) -> Vec<String> {
        let machines = self.list();
        machines.iter().filter(|machine| machine.has_volume(volume)).map(|machine| machine.name()).collect()
    }

    /// Removes a volume: gone when `done` is called, its files behind that.
    pub fn remove_volume(
        self: &Arc<Self>,
        caller: Caller,
        volume: Volume,
        done: Box<dyn FnOnce(Result<(), MachineError>) + Send>,
    ) {
        let registry = self.clone();
        self.shared.runtime.spawn(async move { done(registry.try_remove_volume(caller, volume).await) });
    }

    async fn try_remove_volume(&self, caller: Caller, volume: Volume) -> Result<(), MachineError> {
        if ![0, volume.owner.0, self.shared.mount_uid].contains(&caller.uid) {
            return Err(MachineError::denied(format!("the volume belongs to user {}", volume.owner.0)));
        }
        let volumes = &self.shared.volumes;
        let _one = volumes.hold().await;
        let Some(record) = volumes.record(volume.id).filter(|record| record.stage == Stage::There) else {
            return Err(MachineError::not_found("the volume is gone"));
        };
        let users = self.machines_with(&volume.name);
        if !users.is_empty() {
            return Err(MachineError::busy(format!("machines have it mounted: {}", users.join(" "))));
        }
        let end = tokio::time::Instant::now() + PATIENCE;
        while self.shared.slots.iter().any(|machine| machine.has_volume(&volume.name)) {
            if tokio::time::Instant::now() > end {
                return Err(MachineError::busy("a machine that had it mounted is still being removed"));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        volumes.put(volume.id, Record { stage: Stage::Going, ..record })?;
        volumes.store.flush().await?;
        self.shared.runtime.spawn(volumes.clone().clear(volume.id, volume.name));
        Ok(())
    }
}
