//! Directories of the host and volumes in a machine: `mounts/PATH`.
//!
//! What is to be mounted is written down before it is, with a mark that is taken off when it is so: after a crash of the
//! daemon in between, what is marked is taken off the machine and mounted anew. A machine that starts gets its mounts
//! from the backend; what was changed while it booted follows before its first job.

use super::Machine;
use super::error::{MachineError, Reason};
use super::vars::VarKind;
use crate::tree::words;
use machinefs_backends::container::{canonical_source, canonical_target, own_mounts};
use machinefs_backends::{BackendError, MachineSpec, MountMode, MountSource, MountSpec};
use serde::{Deserialize, Serialize};
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Whoever writes or removes is answered by then; the work goes on.
const DEADLINE: Duration = Duration::from_secs(5);

/// So often it is tried to take off what is in use: what somebody has just closed is in use for a moment.
const TRIES: u32 = 10;
/// Between two tries.
const PAUSE: Duration = Duration::from_millis(50);

/// Called with what came of it.
pub type Done = Box<dyn FnOnce(Result<(), MachineError>) + Send>;

/// What is written down of a mount.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    /// As the user wrote it.
    text: String,
    /// What it means; nothing was written yet if there is none.
    mount: Option<MountSpec>,
    /// Whether the machine has it so is not known.
    unsure: bool,
    /// It is being removed.
    going: bool,
}

/// The mounts of a machine.
#[derive(Default)]
pub(super) struct Mounts {
    /// Held while one changes.
    changing: tokio::sync::Mutex<()>,
    /// The machine runs and has what is written down; before that it will be looked at again.
    up: AtomicBool,
    /// It ran when the daemon started, and what became of it is not known yet.
    unknown: AtomicBool,
}

impl Mounts {
    /// Of a machine that is just entered. `unknown`: it may run.
    pub(super) fn new(unknown: bool) -> Mounts {
        Mounts { unknown: unknown.into(), ..Mounts::default() }
    }

    fn set_up(&self, up: bool) {
        self.up.store(up, Ordering::SeqCst);
        self.unknown.store(false, Ordering::SeqCst);
    }

    /// Until this is dropped nobody else changes them; it is known whether the machine is up.
    async fn change(&self) -> tokio::sync::MutexGuard<'_, ()> {
        loop {
            let one = self.changing.lock().await;
            if !self.unknown.load(Ordering::SeqCst) {
                return one;
            }
            drop(one);
            tokio::time::sleep(PAUSE).await;
        }
    }
}

/// Where a name of `mounts/` is in the machine: `%2F` is a slash and `%25` a percent sign, and each place has one name.
pub(super) fn target(name: &[u8]) -> Result<PathBuf, &'static str> {
    let name = std::str::from_utf8(name).map_err(|_| "it is not UTF-8")?;
    let path = name.replace("%2F", "/").replace("%25", "%");
    let encoded = path.replace('%', "%25").replace('/', "%2F");
    if encoded != name || path.contains('\0') {
        return Err("% is written %25, and / %2F");
    }
    if path.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return Err("a path from the machine's root, without . and .., and no slash at its beginning or end");
    }
    canonical_target(&Path::new("/").join(path)).map_err(|_| "nothing can be mounted there")
}

/// What was written: a path of the host or `volume:NAME`, and a mode.
fn parse(text: &str) -> Result<(MountSource, MountMode), MachineError> {
    let words = words::split(text.as_bytes()).map_err(|error| MachineError::invalid(error.to_string()))?;
    let (source, mode) = match words.as_slice() {
        [source] => (source, MountMode::Rw),
        [source, mode] => {
            let mode = match mode.as_str() {
                "ro" => MountMode::Ro,
                "rw" => MountMode::Rw,
                "cow" => MountMode::Cow,
                other => {
                    return Err(MachineError::invalid(format!("bad mode {}: ro, rw or cow", other.escape_default())));
                }
            };
            (source, mode)
        }
        _ => {
            return Err(MachineError::invalid(
                "not SOURCE [ro|rw|cow]: a directory of the host or volume:NAME; a path with blanks stands in 'quotes'",
            ));
        }
    };
    match source.strip_prefix("volume:") {
        Some(name) => Ok((MountSource::Volume(name.to_string()), mode)),
        None if Path::new(source).is_absolute() => Ok((MountSource::Host(source.into()), mode)),
        None => Err(MachineError::invalid("the path on the host has to begin with a slash")),
    }
}

/// An error of the host's files, in our words.
fn told(what: &str, error: &io::Error) -> MachineError {
    let words = |more: &str| format!("{what}: {}{more}", plain(error));
    match error.raw_os_error() {
        Some(libc::ENOENT) => MachineError::not_found(words("")),
        Some(libc::EACCES | libc::EPERM) => MachineError::denied(words(" to the machine's owner")),
        Some(libc::EBUSY) => MachineError::busy(words(": a process in the machine uses it")),
        Some(libc::EEXIST) => MachineError::exists(words(": something is mounted there already")),
        Some(libc::ENOSPC | libc::ENOMEM) => MachineError::no_space(words("")),
        Some(libc::EMFILE | libc::ENFILE) => MachineError::limit(words("")),
        _ => MachineError::invalid(words("")),
    }
}

/// The error's text without its number.
fn plain(error: &io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or_default().to_string()
}

fn of_backend(error: BackendError) -> MachineError {
    match &error {
        BackendError::Io { what, source } => told(what, source),
        _ => error.into(),
    }
}

/// The directory that a path means to the owner; for a thread that may block.
fn resolve(spec: &MachineSpec, path: &Path, is_user: bool) -> Result<PathBuf, MachineError> {
    let shown = path.display();
    let own = own_mounts().map_err(|error| told("/proc/self/mountinfo", &error))?;
    // Before anything is looked up there: the answer would have to come from this daemon.
    let is_ours = |path: &Path| own.iter().any(|at| path.starts_with(at) || (is_user && at.starts_with(path)));
    let refused = || MachineError::invalid(format!("{shown} is in machinefs itself, which cannot be mounted"));
    if is_ours(path) {
        return Err(refused());
    }
    let real = canonical_source(&spec.owner, path).map_err(|error| told(&shown.to_string(), &error))?;
    if is_ours(&real) {
        return Err(refused());
    }
    Ok(real)
}

impl Machine {
    fn mount_record(&self, id: u32) -> Record {
        let value = self.vars.value(VarKind::Mount, id).unwrap_or_default();
        serde_json::from_slice(&value).unwrap_or_default()
    }

    fn put_mount_record(&self, id: u32, record: &Record) -> Result<(), MachineError> {
        let value = serde_json::to_vec(record).map_err(|error| MachineError::internal(error.to_string()))?;
        self.vars.set(VarKind::Mount, id, &value)
    }

    fn mount_records(&self) -> Vec<(u32, PathBuf, Record)> {
        let named = self.vars.list(VarKind::Mount).into_iter();
        let mut all: Vec<_> =
            named.filter_map(|(id, name)| Some((id, target(name.as_bytes()).ok()?, self.mount_record(id)))).collect();
        // What is below another comes after it.
        all.sort_by(|(_, one, _), (_, other, _)| one.cmp(other));
        all
    }

    /// What a mount's file says: what was written to it.
    pub fn mount_text(&self, id: u32) -> Option<String> {
        Some(self.mount_record(id).text).filter(|text| !text.is_empty())
    }

    /// Whether a volume is mounted in it, or is to be.
    pub(super) fn has_volume(&self, name: &str) -> bool {
        let is_it = |mount: MountSpec| mount.source == MountSource::Volume(name.to_string());
        self.mount_records().into_iter().any(|(_, _, record)| record.mount.is_some_and(is_it))
    }

    /// What it is to have from its start on.
    pub(super) fn mount_specs(&self) -> Vec<MountSpec> {
        let all = self.mount_records().into_iter().filter(|(_, _, record)| !record.going);
        all.filter_map(|(_, _, record)| record.mount).collect()
    }

    /// Makes a place for a mount, with nothing mounted yet.
    ///
    /// # Errors
    /// EOPNOTSUPP, EINVAL for a bad name, EEXIST, EMFILE.
    pub fn add_mount(&self, name: &[u8]) -> Result<u32, MachineError> {
        self.check_mounts()?;
        self.vars.create(VarKind::Mount, name)
    }

    fn check_mounts(&self) -> Result<(), MachineError> {
        let backend = self.backend();
        if backend.capabilities(&self.spec()).mounts {
            return Ok(());
        }
        Err(MachineError::not_supported(format!("machines of {} have no mounts", backend.name())))
    }

    /// Mounts what a text says, now or at the next start. `done` is called when it is so; without `in_force`, it is
    /// only looked at.
    pub fn put_mount(self: &Arc<Self>, id: u32, text: Vec<u8>, in_force: bool, done: Done) {
        let machine = self.clone();
        self.answer_in_time(done, async move { machine.change_mount(id, &text, in_force).await });
    }

    /// Takes a mount off and forgets it.
    pub fn remove_mount(self: &Arc<Self>, id: u32, done: Done) {
        let machine = self.clone();
        self.answer_in_time(done, async move { machine.drop_mount(id).await });
    }

    fn answer_in_time(
        self: &Arc<Self>,
        done: Done,
        work: impl Future<Output = Result<(), MachineError>> + Send + 'static,
    ) {
        let (machine, runtime) = (self.clone(), self.shared.runtime.clone());
        runtime.clone().spawn(async move {
            let mut work = runtime.spawn(work);
            let ended = |result: Result<_, _>| {
                result.unwrap_or_else(|_| Err(MachineError::internal("the work on a mount ended half-way")))
            };
            match tokio::time::timeout(DEADLINE, &mut work).await {
                Ok(result) => done(ended(result)),
                Err(_) => {
                    done(Err(MachineError::timed_out("the host is still at it: read errors later")));
                    if let Err(error) = ended(work.await) {
                        machine.record_error("mount", error.errno(), &error.to_string(), "");
                    }
                }
            }
        });
    }

    async fn change_mount(self: &Arc<Self>, id: u32, text: &[u8], in_force: bool) -> Result<(), MachineError> {
        let text = std::str::from_utf8(text).map_err(|_| MachineError::invalid("not UTF-8 text"))?.trim();
        let (source, mode) = parse(text)?;
        self.check_mounts()?;
        let _one = self.mounts.change().await;
        let gone = || MachineError::not_found("the mount was removed");
        let name = self.vars.name(VarKind::Mount, id).ok_or_else(gone)?;
        let target = target(name.as_bytes()).map_err(MachineError::invalid)?;
        let shared = self.shared.clone();
        // No volume is removed between the look at it and the record of its use.
        let _volumes = match &source {
            MountSource::Volume(name) => {
                let held = shared.volumes.hold().await;
                shared.volumes.check_use(name, self.owner.0)?;
                Some(held)
            }
            MountSource::Host(_) => None,
        };
        let source = match source {
            MountSource::Host(path) => {
                let (spec, is_user) = (self.spec(), self.shared.mount_uid != 0);
                let resolved = tokio::task::spawn_blocking(move || resolve(&spec, &path, is_user)).await;
                MountSource::Host(resolved.map_err(|_| MachineError::internal("the look at a path ended half-way"))??)
            }
            volume => volume,
        };
        let mount = MountSpec { source, target, mode };
        let before = self.mount_record(id);
        let is_up = self.mounts.up.load(Ordering::SeqCst);
        let inside = self
            .mount_records()
            .into_iter()
            .find(|(other, at, record)| *other != id && record.mount.is_some() && at.starts_with(&mount.target));
        let same = before.mount.as_ref() == Some(&mount) && !before.unsure;
        if let Some((_, at, _)) = inside.filter(|_| is_up && !same) {
            return Err(MachineError::busy(format!(
                "it would hide what is mounted at {}: remove that first",
                at.display()
            )));
        }
        if !in_force {
            return Ok(());
        }
        let record = Record { text: text.to_string(), mount: Some(mount), unsure: !same, going: false };
        self.put_mount_record(id, &record)?;
        if same {
            return Ok(());
        }
        self.shared.store.flush().await?;
        if is_up && let Err(error) = self.exchange(before.mount.as_ref(), &record).await {
            // One that has ended meanwhile gets it at its next start.
            if self.mounts.up.load(Ordering::SeqCst) {
                self.put_mount_record(id, &before)?;
                return Err(error);
            }
        }
        self.put_mount_record(id, &Record { unsure: false, ..record })?;
        self.say("mount", &[("set", &name)]);
        Ok(())
    }

    /// Mounts one in place of another.
    async fn exchange(&self, before: Option<&MountSpec>, record: &Record) -> Result<(), MachineError> {
        if let Some(before) = before {
            self.take_off(&before.target).await?;
        }
        let Some(mount) = &record.mount else { return Ok(()) };
        let Err(error) = self.attach(mount).await else { return Ok(()) };
        if let Some(before) = before
            && let Err(error) = self.attach(before).await
        {
            self.record_error("mount", error.errno(), &error.to_string(), &before.target.display().to_string());
        }
        Err(error)
    }

    async fn attach(&self, mount: &MountSpec) -> Result<(), MachineError> {
        let warnings = self.backend().attach_mount(&self.spec(), mount).await.map_err(of_backend)?;
        for warning in warnings {
            let errno = crate::errno::Errno::EOPNOTSUPP;
            self.record_error("mount", errno, &warning.0, &mount.target.display().to_string());
        }
        Ok(())
    }

    async fn take_off(&self, target: &Path) -> Result<(), MachineError> {
        let (backend, spec) = (self.backend(), self.spec());
        let mut tries = 0;
        loop {
            let error = match backend.detach_mount(&spec, target).await {
                Ok(()) => return Ok(()),
                Err(error) => of_backend(error),
            };
            tries += 1;
            if error.reason() != Reason::Busy || tries > TRIES {
                return Err(error);
            }
            // It may be the agent itself that has a file there open: for our own sake, until it is asked or told.
            match self.link() {
                Some(link) if tries == 1 => drop(link.ping().await),
                _ => tokio::time::sleep(PAUSE).await,
            }
        }
    }

    async fn drop_mount(self: &Arc<Self>, id: u32) -> Result<(), MachineError> {
        let _one = self.mounts.change().await;
        let Some(name) = self.vars.name(VarKind::Mount, id) else { return Ok(()) };
        let before = self.mount_record(id);
        if let Some(mount) = &before.mount
            && self.mounts.up.load(Ordering::SeqCst)
        {
            self.put_mount_record(id, &Record { going: true, ..before.clone() })?;
            self.shared.store.flush().await?;
            if let Err(error) = self.take_off(&mount.target).await {
                self.put_mount_record(id, &before)?;
                self.record_error("mount", error.errno(), &error.to_string(), &format!("rm mounts/{name}"));
                return Err(error);
            }
        }
        self.vars.remove(VarKind::Mount, id);
        self.say("mount", &[("removed", &name)]);
        self.shared.store.flush().await
    }

    /// It is about to start: nothing is mounted, and so nothing is unsure.
    pub(super) fn mounts_begin(&self) {
        self.mounts.set_up(false);
        for (id, _, record) in self.mount_records() {
            if record.going {
                self.vars.remove(VarKind::Mount, id);
            } else if record.unsure {
                // What cannot be written down is tried again.
                let _ = self.put_mount_record(id, &Record { unsure: false, ..record });
            }
        }
    }

    /// It has started with these: what was changed meanwhile follows.
    pub(super) async fn mounts_up(&self, started: &[MountSpec]) {
        let _one = self.mounts.changing.lock().await;
        let wanted = self.mount_specs();
        for mount in started.iter().filter(|mount| !wanted.contains(mount)) {
            self.note_mount(mount, self.take_off(&mount.target).await);
        }
        for mount in wanted.iter().filter(|mount| !started.contains(mount)) {
            self.note_mount(mount, self.attach(mount).await);
        }
        self.mounts.set_up(true);
    }

    /// It runs since before the daemon: what was being changed when that ended is done again. `all`: it booted then, and
    /// what it has is not known.
    pub(super) async fn mounts_adopted(&self, all: bool) {
        let _one = self.mounts.changing.lock().await;
        for (id, target, record) in self.mount_records() {
            let Some(mount) = record.mount.clone().filter(|_| all || record.unsure || record.going) else { continue };
            let mut done = self.take_off(&target).await;
            if done.is_ok() && record.going {
                self.vars.remove(VarKind::Mount, id);
                continue;
            }
            if done.is_ok() {
                done = self.attach(&mount).await;
            }
            self.note_mount(&mount, done);
            // What cannot be written down is tried again.
            let _ = self.put_mount_record(id, &Record { unsure: false, going: false, ..record });
        }
        self.mounts.set_up(true);
    }

    /// It ends, and its mounts with it.
    pub(super) fn mounts_down(&self) {
        self.mounts.set_up(false);
    }

    fn note_mount(&self, mount: &MountSpec, done: Result<(), MachineError>) {
        if let Err(error) = done {
            self.record_error("mount", error.errno(), &error.to_string(), &mount.target.display().to_string());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_places() {
        for (name, place) in [("src", "/src"), ("home%2Fme", "/home/me"), ("a b", "/a b"), ("50%25", "/50%")] {
            assert_eq!(target(name.as_bytes()).unwrap(), Path::new(place));
        }
        for bad in ["", ".", "..", "%2Fsrc", "src%2F", "a%2F%2Fb", "a%2F..%2Fb", "50%", "%2f", "%41", "proc", "dev%2Fx"]
        {
            assert!(target(bad.as_bytes()).is_err(), "{bad}");
        }
        assert!(target(b"\xff").is_err());
        assert_eq!(target(b"a%252Fb").unwrap(), Path::new("/a%2Fb"), "it is not taken apart twice");
    }

    #[test]
    fn texts() {
        let host = |path: &str| MountSource::Host(path.into());
        assert_eq!(parse("/home/me/proj cow").unwrap(), (host("/home/me/proj"), MountMode::Cow));
        assert_eq!(parse("/p").unwrap(), (host("/p"), MountMode::Rw));
        assert_eq!(parse("'/my proj'  ro").unwrap(), (host("/my proj"), MountMode::Ro));
        assert_eq!(parse("volume:cache rw").unwrap(), (MountSource::Volume("cache".into()), MountMode::Rw));
        for bad in ["", "rw", "p rw", "/p x", "/p ro now", "'/p", "/p RO"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
