//! Directories of the host and volumes in machines that run.
//!
//! A mount is copied from the host's ([`plan`]) and moved into the machine's mount namespace, so it is live in both
//! directions and goes with the machine. It is opened with the rights of the machine's owner, and its owners are mapped:
//! the machine's user acts as its owner, in the machine everybody else's files are nobody's. `mounts.json` tells the
//! mounts of this run; what a machine changed in a copy-on-write mount is in `mounts/` in its directory.

mod owner;
mod plan;

pub use owner::canonical_source;

use super::child::{self, in_child};
use super::run::io_error;
use super::{Inner, disk, userns};
use crate::volumes::Volumes;
use crate::{BackendError, MachineSpec, MountMode, MountSource, MountSpec, Owner, Running, Warning};
use plan::{From, Layer, Plan, UNMAPPED};
use rustix::process::{Gid, Uid};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

pub(super) const RECORD: &str = "mounts.json";
const LAYERS: &str = "mounts";

/// A mount of this run.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Made {
    target: PathBuf,
    /// Its number in the machine's mountinfo; `None`: it may not have come about.
    number: Option<u64>,
}

fn invalid(text: impl Into<String>) -> io::Error {
    let text: String = text.into();
    io::Error::new(io::ErrorKind::InvalidInput, text)
}

fn recorded(dir: &Path) -> io::Result<Vec<Made>> {
    match fs::read(dir.join(RECORD)) {
        Ok(text) => Ok(serde_json::from_slice(&text).unwrap_or_default()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(e),
    }
}

fn record(dir: &Path, made: &[Made]) -> io::Result<()> {
    disk::write_whole(&dir.join(RECORD), &serde_json::to_vec(made)?, false)
}

/// A target without `.` and doubled slashes. The machine's root and the kernel's directories cannot be one.
fn normal(target: &Path) -> io::Result<PathBuf> {
    let mut path = PathBuf::from("/");
    for part in target.components() {
        match part {
            Component::RootDir | Component::CurDir => {}
            Component::Normal(name) => path.push(name),
            _ => return Err(invalid("`..` in the target of a mount")),
        }
    }
    let closed = ["/proc", "/sys", "/dev", "/run/.machinefs"].iter().any(|c| path.starts_with(c));
    if !target.is_absolute() || path == Path::new("/") || closed {
        let text = format!("{} cannot be the target of a mount", target.display());
        return Err(invalid(text));
    }
    Ok(path)
}

/// Where a mount of that target is in a machine: without `.` and doubled slashes.
///
/// # Errors
/// `InvalidInput` where nothing can be mounted.
pub fn canonical_target(target: &Path) -> io::Result<PathBuf> {
    normal(target)
}

/// Where file systems of machinefs are mounted, whoever's they are: what is there must not be walked into by a daemon.
///
/// # Errors
/// Those of reading proc_pid_mountinfo(5).
pub fn own_mounts() -> io::Result<Vec<PathBuf>> {
    Ok(super::mountinfo::fuse_mounts_in(&fs::read("/proc/self/mountinfo")?, None))
}

/// Every step of the way to a target, with its last name.
fn steps(target: &Path) -> io::Result<Vec<(CString, CString)>> {
    let mut all = Vec::new();
    for path in target.ancestors() {
        if let Some(name) = path.file_name() {
            all.push((CString::new(path.as_os_str().as_bytes())?, CString::new(name.as_bytes())?));
        }
    }
    all.reverse();
    Ok(all)
}

/// A number in a machine's range of users.
fn in_range(base: u32, id: u32) -> io::Result<u32> {
    if id < userns::RANGE { Ok(base + id) } else { Err(invalid(format!("a machine has no user {id}"))) }
}

/// How a mount's owners are shown: on the host and in the machine.
fn map(owner: &Owner, base: u32, source: &MountSource) -> io::Result<std::os::fd::OwnedFd> {
    // Volumes have the machine's own numbers; root acts as all users.
    if owner.uid == 0 || matches!(source, MountSource::Volume(_)) {
        return userns::mapped(base);
    }
    let users = format!("{} {} 1\n", owner.uid, in_range(base, owner.guest_uid)?);
    let groups = format!("{} {} 1\n", owner.gid, in_range(base, owner.guest_gid)?);
    userns::mapped_as(&users, &groups)
}

impl Inner {
    /// Mounts what a machine has from its start on. `running` may not be recorded yet.
    pub(super) fn attach_all(
        &self,
        spec: &MachineSpec,
        running: &Running,
        base: Option<u32>,
    ) -> Result<Vec<Warning>, BackendError> {
        let mut warnings = Vec::new();
        for mount in &spec.mounts {
            warnings.extend(self.attach(spec, running, base, mount)?);
        }
        Ok(warnings)
    }

    /// Mounts in a machine that runs, which the caller holds.
    pub(super) fn attach(
        &self,
        spec: &MachineSpec,
        running: &Running,
        base: Option<u32>,
        mount: &MountSpec,
    ) -> Result<Vec<Warning>, BackendError> {
        let what = |more: &str| format!("mounting at {} in the machine{more}", mount.target.display());
        let failed = |error| {
            let (step, error) = child::plain(error);
            io_error(what(&if step.is_empty() { String::new() } else { format!(" ({step})") }))(error)
        };
        let target = normal(&mount.target).map_err(failed)?;
        let mut made = recorded(&spec.dir).map_err(failed)?;
        if made.iter().any(|m| m.target == target && m.number.is_some()) {
            return Err(failed(io::Error::from_raw_os_error(libc::EEXIST)));
        }
        let plan = self.plan(spec, running, base, mount, &target).map_err(failed)?;
        made.retain(|m| m.target != target);
        made.push(Made { target: target.clone(), number: None });
        record(&spec.dir, &made).map_err(failed)?;
        let work = || {
            // SAFETY: a plan makes system calls on what it holds, and allocates nothing.
            unsafe { in_child(|| plan.carry_out()) }
        };
        let done = self.with_disk(spec, work).map_err(failed)?;
        let number = match done {
            Ok(number) => number,
            Err(error) => {
                made.retain(|m| m.target != target);
                record(&spec.dir, &made).map_err(failed)?;
                return Err(failed(error));
            }
        };
        made.iter_mut().filter(|m| m.target == target).for_each(|m| m.number = Some(number & !UNMAPPED));
        record(&spec.dir, &made).map_err(failed)?;
        let mut warnings = Vec::new();
        if number & UNMAPPED != 0 {
            warnings.push(Warning(format!(
                "the file system of what is mounted at {} cannot map owners: all files in it show as nobody's, and the \
                 machine has only the rights that everybody has",
                target.display()
            )));
        }
        Ok(warnings)
    }

    fn plan<'a>(
        &self,
        spec: &MachineSpec,
        running: &'a Running,
        base: Option<u32>,
        mount: &MountSpec,
        target: &Path,
    ) -> io::Result<Plan<'a>> {
        let path = |path: &Path| CString::new(path.as_os_str().as_bytes()).map_err(io::Error::from);
        let volumes = Volumes::new(&self.options.state_dir);
        let all = self.fuse_mounts_of_all()?;
        let from = match &mount.source {
            MountSource::Volume(name) => {
                let open = volumes.open(name, &spec.owner)?;
                From::Open(open, path(&self.options.state_dir.join("volumes").join(name).join("data"))?)
            }
            MountSource::Host(source) => {
                let plain = source.components().all(|c| matches!(c, Component::RootDir | Component::Normal(_)));
                if !source.is_absolute() || !plain {
                    return Err(invalid("the source of a mount has to be an absolute path without `..`"));
                }
                // Nothing may be looked up there: the answer would have to come from this daemon.
                let below = |at: &&PathBuf| source.starts_with(at) || (self.maps.is_some() && at.starts_with(source));
                if let Some(at) = all.iter().find(below) {
                    return Err(invalid(format!("{} is of machinefs itself", at.display())));
                }
                From::Path(path(source)?)
            }
        };
        let layer = (mount.mode == MountMode::Cow).then(|| self.layer(spec, target)).transpose()?;
        let (acting, root) = match base {
            Some(base) => {
                ((in_range(base, spec.owner.guest_uid)?, in_range(base, spec.owner.guest_gid)?), (base, base))
            }
            None => ((0, 0), (0, 0)),
        };
        let numbers = |(uid, gid)| (Uid::from_raw(uid), Gid::from_raw(gid));
        Ok(Plan {
            from,
            mode: mount.mode,
            rights: owner::Rights::of(&spec.owner),
            idmap: base.map(|base| map(&spec.owner, base, &mount.source)).transpose()?,
            layer,
            machine: running.pidfd.as_fd(),
            is_user: self.maps.is_some(),
            acting: numbers(acting),
            root: numbers(root),
            fuse: self.fuse_mounts()?.iter().map(|at| path(at)).collect::<Result<_, _>>()?,
            target: steps(target)?,
        })
    }

    /// The directory for what the machine changes at a target. Kept until its destroy.
    fn layer(&self, spec: &MachineSpec, target: &Path) -> io::Result<Layer> {
        let digest = Sha256::digest(target.as_os_str().as_bytes());
        let name: String = digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        self.with_disk(spec, || {
            let dir = self.disk_dir(spec).join(LAYERS).join(name);
            for sub in ["lower", "work"] {
                fs::create_dir_all(dir.join(sub))?;
            }
            let is_new = match fs::create_dir(dir.join("upper")) {
                Ok(()) => true,
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => false,
                Err(e) => return Err(e),
            };
            Ok(Layer { dir: CString::new(dir.as_os_str().as_bytes())?, is_new })
        })?
    }

    /// Takes a mount off a machine that runs, which the caller holds.
    pub(super) fn detach(&self, spec: &MachineSpec, running: &Running, target: &Path) -> Result<(), BackendError> {
        let failed = |error| {
            let (step, error) = child::plain(error);
            let step = if step.is_empty() { step } else { format!(" ({step})") };
            io_error(format!("taking off the mount at {} in the machine{step}", target.display()))(error)
        };
        let target = normal(target).map_err(failed)?;
        let mut made = recorded(&spec.dir).map_err(failed)?;
        let Some(mount) = made.iter().find(|m| m.target == target) else { return Ok(()) };
        let text = fs::read(format!("/proc/{}/mountinfo", running.pid)).map_err(failed)?;
        // By its number: in the machine the directories above it may have been renamed.
        let found = mounts_in(&text).find(|(id, at)| match mount.number {
            Some(number) => *id == number,
            None => *at == target,
        });
        if let Some((number, at)) = found
            && let (Some(parent), Some(name)) = (at.parent(), at.file_name())
        {
            let parent = CString::new(parent.as_os_str().as_bytes()).map_err(|e| failed(e.into()))?;
            let name = CString::new(name.as_bytes()).map_err(|e| failed(e.into()))?;
            let (machine, is_user) = (running.pidfd.as_fd(), self.maps.is_some());
            // SAFETY: it makes system calls on what was prepared, and allocates nothing.
            unsafe { in_child(|| plan::take_off(machine, is_user, &parent, &name, number)) }.map_err(failed)?;
        }
        made.retain(|m| m.target != target);
        record(&spec.dir, &made).map_err(failed)
    }
}

/// Number and place of each mount of a mountinfo (proc_pid_mountinfo(5)).
fn mounts_in(mountinfo: &[u8]) -> impl Iterator<Item = (u64, PathBuf)> + '_ {
    mountinfo.split(|b| *b == b'\n').filter_map(|line| {
        let mut fields = line.split(|b| *b == b' ');
        let number = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
        let at = super::mountinfo::unescape(fields.nth(3)?);
        Some((number, PathBuf::from(<std::ffi::OsString as std::os::unix::ffi::OsStringExt>::from_vec(at))))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_made_plain_or_refused() {
        assert_eq!(normal(Path::new("//a/./b/")).unwrap(), Path::new("/a/b"));
        for bad in ["", "a", "/", "/..", "/a/../b", "/proc", "/proc/x", "/sys/fs", "/dev/shm", "/run/.machinefs/x"] {
            assert!(normal(Path::new(bad)).is_err(), "{bad}");
        }
        assert!(normal(Path::new("/process")).is_ok());
        let all = steps(Path::new("/a/b")).unwrap();
        assert_eq!(all, [(c"/a".into(), c"a".into()), (c"/a/b".into(), c"b".into())]);
    }

    #[test]
    fn mounts_are_told_by_number() {
        let all: Vec<_> = mounts_in(b"25 1 0:23 / /a\\040b rw - x y z\n7 1 0:1 /q / rw - x y z\n").collect();
        assert_eq!(all, [(25, PathBuf::from("/a b")), (7, PathBuf::from("/"))]);
    }
}
