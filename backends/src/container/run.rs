//! One run of a machine: how it is started, found again and ended.

use super::process::{self, Identity};
use super::spec::{Config, Input, Limits};
use super::stage::{Notes, Stage};
use super::{Inner, cgroup, console, disk, etc, mountinfo, mounts, net, quota, socket, userns};
use crate::images::Root;
use crate::{BackendError, MachineSpec, Network, Running, Warning};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// The agent's socket in the machine's directory.
pub(super) const SOCKET: &str = "agent.sock";
const RUN: &str = "run.json";
const PID: &str = "pid";
const LOCK: &str = "lock";
const BUNDLE: &str = "bundle";

/// How long the runtime may take for a thing that takes milliseconds.
const RUNTIME_LIMIT: Duration = Duration::from_secs(20);

/// How long another operation on the same machine, or a runtime that outlived the daemon, is waited for.
const LOCK_LIMIT: Duration = Duration::from_secs(25);

/// How long a killed machine may take to end. Long only where it has much memory to give back.
const END_LIMIT: Duration = Duration::from_secs(30);

/// `run.json`: what is needed to find a machine again.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    init: Identity,
    warnings: Vec<String>,
    facts: Vec<(String, String)>,
}

/// How long the end of a machine that only the runtime knew is waited for.
const UNRECORDED_LIMIT: Duration = Duration::from_secs(5);

pub(super) fn io_error(what: impl std::fmt::Display) -> impl FnOnce(io::Error) -> BackendError {
    let what = what.to_string();
    move |source| match source.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => BackendError::Exhausted { what, resource: "disk space".into() },
        Some(libc::ENOMEM) => BackendError::Exhausted { what, resource: "memory".into() },
        Some(libc::EMFILE | libc::ENFILE) => BackendError::Exhausted { what, resource: "open files".into() },
        _ => BackendError::Io { what, source },
    }
}

/// Holds a machine: one operation at a time, and none while a runtime is at work on it, also one that a daemon before
/// us started and did not live to see end (it inherited the lock).
pub(super) fn hold(dir: &Path) -> Result<Option<File>, BackendError> {
    let path = dir.join(LOCK);
    let file = match File::options().create(true).truncate(false).write(true).open(&path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(io_error(path.display())(e)),
    };
    let deadline = Instant::now() + LOCK_LIMIT;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(Some(file)),
            Err(fs::TryLockError::WouldBlock) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(2));
            }
            Err(fs::TryLockError::WouldBlock) => {
                return Err(BackendError::Timeout("another operation on this machine"));
            }
            Err(fs::TryLockError::Error(e)) => return Err(io_error(path.display())(e)),
        }
    }
}

fn read_record(dir: &Path) -> io::Result<Option<Record>> {
    match fs::read(dir.join(RUN)) {
        // A file that cannot be understood tells of no process; what it was about is found by its control group.
        Ok(text) => Ok(serde_json::from_slice(&text).ok()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

fn remove_file(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// Does its init end within a moment?
pub(super) fn ends_soon(running: &Running) -> bool {
    matches!(process::wait_end(running.pidfd.as_fd(), Duration::from_secs(2)), Ok(true))
}

impl Inner {
    /// The machine's name for the runtime and in the control groups: two daemons must not meet.
    pub(super) fn name(&self, spec: &MachineSpec) -> String {
        format!("{}-{}", self.instance, spec.id)
    }

    /// The machine if it runs, as it was recorded.
    pub(super) fn find(&self, spec: &MachineSpec) -> Result<Option<Running>, BackendError> {
        let failed = || io_error(format!("looking for the machine {}", spec.id));
        let Some(record) = read_record(&spec.dir).map_err(failed())? else { return Ok(None) };
        let Some(pidfd) = record.init.open().map_err(failed())? else { return Ok(None) };
        let warnings = record.warnings.into_iter().map(Warning).collect();
        Ok(Some(Running { pid: record.init.pid, pidfd, warnings, facts: record.facts, resumed: false }))
    }

    /// Boots the machine, which the caller holds.
    pub(super) fn boot(&self, spec: &MachineSpec, lock: &File) -> Result<Running, BackendError> {
        if let Some(running) = self.find(spec)? {
            return Ok(running);
        }
        self.clean(spec)?;
        // The host may change while the machine comes up, but not all the time.
        for _ in 0..3 {
            let base = self.base(spec)?;
            let (root, warnings) = self.prepare(spec)?;
            let launch = || self.launch(spec, &root, base, lock, warnings);
            let running = self.with_disk(spec, launch).map_err(io_error(format!("the disk of {}", spec.id)))??;
            if self.images.holds(spec, &root)? {
                return Ok(running);
            }
            drop(running);
            self.clean(spec)?;
        }
        Err(BackendError::Image {
            image: spec.image.clone(),
            reason: "the host's files keep changing (is a package being installed?); start it again".into(),
        })
    }

    pub(super) fn base(&self, spec: &MachineSpec) -> Result<Option<u32>, BackendError> {
        if self.maps.is_some() {
            return Ok(None);
        }
        userns::base(spec.uid_slot).map(Some).map_err(|_| BackendError::Exhausted {
            what: format!("a range of user numbers for the machine {}", spec.id),
            resource: "user numbers".into(),
        })
    }

    /// Makes the machine's disk what it is to be at this start; the machine does not run. What does not hold is told.
    pub(super) fn prepare(&self, spec: &MachineSpec) -> Result<(Root, Vec<Warning>), BackendError> {
        let base = self.base(spec)?;
        let failed = || io_error(format!("making the disk of the machine {}", spec.id));
        let warning = quota::prepare(spec, self.maps.is_some()).map_err(failed())?;
        let server = match self.maps {
            None => Some(net::NAME_SERVER),
            Some(_) => net::user::Program::find().map(net::user::Program::name_server),
        };
        let disk = self.disk_dir(spec);
        let work = || {
            let root = disk::prepare(spec, &disk, &self.images, base)?;
            if let Some(tree) = root.trees.iter().find(|t| t.at.is_empty()) {
                etc::resolv_conf(spec, &disk.join("upper").join(&tree.name), server, base).map_err(failed())?;
            }
            Ok(root)
        };
        let root = self.with_disk(spec, work).map_err(failed())??;
        Ok((root, warning.into_iter().collect()))
    }

    fn launch(
        &self,
        spec: &MachineSpec,
        root: &Root,
        base: Option<u32>,
        lock: &File,
        warnings: Vec<Warning>,
    ) -> Result<Running, BackendError> {
        let failed = |what: &str| io_error(format!("{what} for the machine {}", spec.id));
        let name = self.name(spec);
        let bundle = spec.dir.join(BUNDLE);
        fs::create_dir_all(&bundle).map_err(failed("making the bundle"))?;
        let can = |limit| base.is_some() && self.cgroups.can(limit).is_ok();
        let limits =
            Limits { cpu: can(cgroup::Limit::Cpu), memory: can(cgroup::Limit::Memory), pids: can(cgroup::Limit::Pids) };
        let rootfs = self.rootfs(spec);
        let agent = self.agent_mount();
        let input = Input {
            root: &rootfs,
            agent: &agent,
            uid_base: base,
            has_users: self.maps.as_ref().is_none_or(userns::Maps::has_range),
            cgroup: base.is_some().then(|| cgroup::Cgroups::path_for(&name)),
            limits,
            filter: self.filter.as_deref(),
        };
        let config = serde_json::to_vec(&Config::new(spec, &input)).map_err(|e| failed("describing it")(e.into()))?;
        fs::write(bundle.join("config.json"), config).map_err(failed("writing the bundle"))?;
        remove_file(&spec.dir.join(PID)).map_err(failed("removing an old pid file"))?;

        let before = console::collect(&spec.dir).map_err(failed("reading the console"))?.len();
        let console = console::open_fifo(&spec.dir, base.map(|b| (b, b))).map_err(failed("making the console"))?;
        let socket = socket::listen_at(&spec.dir, SOCKET).map_err(failed("making the agent's socket"))?;
        let mut stage = Stage::default();
        let userns = base.map(userns::mapped).transpose().map_err(failed("making a user namespace"))?;
        let gate = self.maps.is_some().then(Gate::new).transpose().map_err(failed("making pipes"))?;
        if let Some(gate) = &gate {
            gate.step(&mut stage).map_err(failed("preparing"))?;
        }
        self.set(&mut stage, spec, root, userns.as_ref()).map_err(failed("preparing its mounts"))?;
        stage.descriptor(lock.as_raw_fd(), lock.as_raw_fd()).map_err(failed("preparing"))?;
        stage.descriptor(socket.as_raw_fd(), machinefs_protocol::LISTEN_FD).map_err(failed("preparing"))?;

        let mut command = self.runtime();
        command.args(["run", "--detach", "--preserve-fds", "1", "--bundle"]).arg(&bundle);
        command.arg("--pid-file").arg(spec.dir.join(PID)).arg(&name);
        let output = || console.try_clone().map(Stdio::from);
        command.stdout(output().map_err(failed("passing the console"))?);
        command.stderr(output().map_err(failed("passing the console"))?);
        let said = |notes: &[String]| {
            let text = console::collect(&spec.dir).unwrap_or_default();
            let new = String::from_utf8_lossy(text.get(before.min(text.len())..).unwrap_or_default()).into_owned();
            let start = new.char_indices().rev().nth(2000).map_or(0, |(i, _)| i);
            let text = format!("{} {}", notes.join("; "), new.get(start..).unwrap_or_default());
            BackendError::Program { program: self.runtime_name(), message: text.trim().to_owned() }
        };
        // The host's side of the network takes a program of its own: meanwhile.
        let is_routed = spec.network == Network::Outgoing && self.maps.is_none();
        let (done, ready) = std::thread::scope(|scope| {
            let ready = is_routed.then(|| scope.spawn(|| self.networks.prepare()));
            let done = self.carry_out(command, stage, gate);
            let ready = ready.map(|r| r.join().unwrap_or_else(|_| Err(io::Error::other("a thread ended"))));
            (done, ready)
        });
        let (status, notes) = match done {
            Ok(done) => done,
            Err((error, notes)) if notes.is_empty() => return Err(failed("starting the runtime")(error)),
            Err((error, notes)) => return Err(failed(&notes.join("; "))(error)),
        };
        if !status.success() {
            let error = said(&notes);
            self.clean(spec)?;
            return Err(error);
        }
        drop(socket);
        let made = self.identify(spec, base, limits, root, warnings).and_then(|found| {
            let Some((mut running, init)) = found else { return Err(said(&notes)) };
            self.furnish(spec, base, &mut running, ready)?;
            let warnings = running.warnings.iter().map(|w| w.0.clone()).collect();
            let record = Record { init, warnings, facts: running.facts.clone() };
            let text = serde_json::to_vec(&record).map_err(|e| failed("recording it")(e.into()))?;
            // No process outlives a crash of the host.
            disk::write_whole(&spec.dir.join(RUN), &text, false).map_err(failed("recording it"))?;
            Ok(running)
        });
        if made.is_err() {
            self.clean(spec)?;
        }
        made
    }

    /// Gives a machine just started its network and its mounts, before anybody uses it.
    fn furnish(
        &self,
        spec: &MachineSpec,
        base: Option<u32>,
        running: &mut Running,
        ready: Option<io::Result<net::Ready>>,
    ) -> Result<(), BackendError> {
        let failed = || io_error(format!("the network of the machine {}", spec.id));
        let mut fact = |value: String| running.facts.push(("network".into(), value));
        match (spec.network, ready) {
            (Network::None, _) => fact("none".into()),
            (Network::Outgoing, Some(ready)) => {
                if let Some(program) = net::missing() {
                    return Err(BackendError::Missing {
                        what: format!("network=outgoing needs {program}"),
                        remedy: "apt-get install nftables".into(),
                    });
                }
                let ready = ready.map_err(failed())?;
                let netns = net::namespace_of(running.pid).map_err(failed())?;
                let users = (base.unwrap_or(0), userns::RANGE);
                let (netns, pidfd) = (netns.as_fd(), running.pidfd.as_fd());
                let address = self.networks.connect(&ready, spec.uid_slot, netns, users, pidfd).map_err(failed())?;
                fact("outgoing (IPv4)".into());
                running.facts.push(("address".into(), address.to_string()));
            }
            (Network::Outgoing, None) => {
                let program = net::user::Program::find().ok_or_else(|| BackendError::Missing {
                    what: "network=outgoing needs pasta or slirp4netns, and /dev/net/tun open to all".into(),
                    remedy: "apt-get install passt; as root: chmod 0666 /dev/net/tun".into(),
                })?;
                program.start(&spec.dir, running.pid).map_err(failed())?;
                fact(format!("outgoing (IPv4) by {}", program.name()));
                running.warnings.push(Warning(program.warning().into()));
            }
        }
        let warnings = self.attach_all(spec, running, base)?;
        running.warnings.extend(warnings);
        Ok(())
    }

    /// Goes on with what a daemon before us did for a machine that runs.
    pub(super) fn adopt_network(&self, spec: &MachineSpec, running: &Running) -> Result<(), BackendError> {
        let is_routed = self.maps.is_none() && running.facts.iter().any(|(key, _)| key == "address");
        if !is_routed {
            return Ok(());
        }
        let failed = || io_error(format!("the network of the machine {}", spec.id));
        let netns = net::namespace_of(running.pid).map_err(failed())?;
        self.networks.adopt(netns.as_fd(), running.pidfd.as_fd()).map_err(failed())
    }

    /// Finds the init of a machine just started.
    fn identify(
        &self,
        spec: &MachineSpec,
        base: Option<u32>,
        limits: Limits,
        root: &Root,
        mut warnings: Vec<Warning>,
    ) -> Result<Option<(Running, Identity)>, BackendError> {
        let failed = || io_error(format!("looking for the init of the machine {}", spec.id));
        let text = fs::read_to_string(spec.dir.join(PID)).map_err(failed())?;
        let pid = text.trim().parse().unwrap_or(0);
        let Some((pidfd, init)) = process::open_pid(pid).map_err(failed())? else { return Ok(None) };
        // It might have ended and its number been given away since the runtime wrote it down.
        if !is_machine(pid, base).map_err(failed())? {
            return Ok(None);
        }
        warnings.extend(match base {
            Some(_) => self.cgroups.warnings(spec),
            None => no_limits(spec),
        });
        let set = [("cpu", limits.cpu), ("memory", limits.memory), ("pids", limits.pids)];
        let set: Vec<_> = set.iter().filter(|(_, can)| *can).map(|(name, _)| *name).collect();
        let isolation = "user, pid, mount, net, ipc, uts and cgroup namespaces, seccomp";
        let mut facts = vec![
            ("runtime".to_owned(), self.runtime_name()),
            ("namespaces".to_owned(), isolation.to_owned()),
            ("image_digest".to_owned(), root.digest.clone()),
            ("limits".to_owned(), if set.is_empty() { "none".to_owned() } else { set.join(" ") }),
        ];
        facts.extend(base.map(|b| ("uid_range".to_owned(), format!("{b}+{}", userns::RANGE))));
        if quota::has_disk(spec) {
            facts.extend(spec.disk.map(|size| ("disk_limit".to_owned(), size.to_string())));
        }
        // The kernel may leave the options out without a word, as it does in a user namespace.
        let mounts = fs::read_to_string(format!("/proc/{pid}/mounts")).map_err(failed())?;
        if mountinfo::lacks_export(&mounts) {
            let text = "no: its overlays are mounted without index and nfs_export, so changes in it cannot be watched \
                        from the host, and inode numbers may change";
            facts.push(("file_handles".to_owned(), text.to_owned()));
        }
        Ok(Some((Running { pid, pidfd, warnings, facts, resumed: false }, init)))
    }

    /// Ends the run, if there is one, and removes what belonged to it. The caller holds the machine.
    pub(super) fn clean(&self, spec: &MachineSpec) -> Result<(), BackendError> {
        let failed = || io_error(format!("ending the machine {}", spec.id));
        let name = self.name(spec);
        if let Some(running) = self.find(spec)? {
            process::kill(running.pidfd.as_fd()).map_err(failed())?;
            // A frozen machine of v1 would not die.
            self.cgroups.freeze(&name, false).map_err(failed())?;
            if !process::wait_end(running.pidfd.as_fd(), END_LIMIT).map_err(failed())? {
                return Err(BackendError::Timeout("the end of the killed machine"));
            }
        }
        self.cgroups.kill(&name).map_err(failed())?;
        match self.maps {
            None => self.networks.disconnect(spec.uid_slot).map_err(failed())?,
            Some(_) => net::user::stop(&spec.dir).map_err(failed())?,
        }
        let left = self.unrecorded(spec).map_err(failed())?;
        let state = self.runtime_state().join(&name);
        // crun has nothing but that directory besides what is ended and removed here; and starting it is more than half
        // of the time a machine's end takes (MEASURED). Without a control group only the runtime knows the process.
        if state.exists() && !(self.runtime_name() == "crun" && self.maps.is_none()) {
            let mut command = self.runtime();
            command.args(["delete", "--force", &name]).stdout(Stdio::null()).stderr(Stdio::null());
            let mut stage = Stage::default();
            if let Some(v2) = self.cgroups.to_detach().filter(|_| self.maps.is_none()) {
                stage.mount_namespace().and_then(|()| stage.detach(v2)).map_err(failed())?;
            }
            // Its answer does not matter: what it left is removed here.
            if let Err((error, _)) = self.carry_out(command, stage, None) {
                tracing::debug!(%error, "the runtime's delete");
            }
        }
        if let Some(left) = left {
            process::wait_end(left.as_fd(), UNRECORDED_LIMIT).map_err(failed())?;
        }
        match fs::remove_dir_all(&state) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed()(e)),
            _ => {}
        }
        self.cgroups.remove(&name).map_err(failed())?;
        for file in [RUN, PID, SOCKET, mounts::RECORD] {
            remove_file(&spec.dir.join(file)).map_err(failed())?;
        }
        Ok(())
    }

    /// The init that the runtime wrote down and a daemon before us did not, of an ordinary user's machine: no control
    /// group tells when all in it have ended. Nothing is killed on the word of a number alone, so it is for waiting only.
    fn unrecorded(&self, spec: &MachineSpec) -> io::Result<Option<OwnedFd>> {
        if self.maps.is_none() {
            return Ok(None);
        }
        let text = fs::read_to_string(spec.dir.join(PID)).unwrap_or_default();
        let opened = process::open_pid(text.trim().parse().unwrap_or(0))?;
        Ok(opened.filter(|(_, id)| is_machine(id.pid, None).unwrap_or(false)).map(|(fd, _)| fd))
    }

    /// Runs a prepared command to its end.
    pub(super) fn carry_out(
        &self,
        mut command: Command,
        stage: Stage,
        gate: Option<Gate>,
    ) -> Result<(ExitStatus, Vec<String>), (io::Error, Vec<String>)> {
        let bare = |e| (e, Vec::new());
        let (notes, write) = Notes::pipe().map_err(bare)?;
        super::occupy_listen_fd().map_err(bare)?;
        stage.apply(&mut command, write.as_raw_fd());
        command.stdin(Stdio::null());
        let spawned = match (gate, &self.maps) {
            (Some(gate), Some(maps)) => std::thread::scope(|scope| {
                let opener = gate.opener(maps);
                let Ok(opener) = opener else { return Err(io::Error::other("no descriptors left")) };
                let opener = scope.spawn(opener);
                let spawned = command.spawn();
                drop(gate);
                match opener.join() {
                    // The child was told to give up, so there is nothing to wait for.
                    Ok(Err(error)) => Err(error),
                    _ => spawned,
                }
            }),
            _ => command.spawn(),
        };
        drop(write);
        let mut child = spawned.map_err(|e| (e, notes.lines()))?;
        let waited = process::open_pid(child.id()).and_then(|open| match open {
            Some((fd, _)) => process::wait_end(fd.as_fd(), RUNTIME_LIMIT),
            None => Ok(true),
        });
        if !matches!(waited, Ok(true)) {
            child.kill().map_err(bare)?;
        }
        let status = child.wait().map_err(bare)?;
        Ok((status, notes.lines()))
    }

    /// The mounts of a machine, as steps.
    fn set(&self, stage: &mut Stage, spec: &MachineSpec, root: &Root, userns: Option<&OwnedFd>) -> io::Result<()> {
        let rootfs = self.rootfs(spec);
        fs::create_dir_all(&rootfs)?;
        stage.mount_namespace()?;
        for at in self.fuse_mounts()? {
            stage.detach(&at)?;
        }
        match (self.cgroups.to_detach(), &self.maps) {
            (Some(v2), None) => stage.detach(v2)?,
            // No control group is made here; the runtime has to see no hybrid layout, that is all.
            (Some(_), Some(_)) => stage.cover(Path::new("/sys/fs/cgroup"))?,
            (None, _) => {}
        }
        stage.enter(&spec.dir)?;
        for tree in &root.trees {
            let mut lower = Vec::new();
            for (number, path) in tree.lower.iter().enumerate() {
                let at = format!("lower/{}-{number}", tree.name);
                self.lower(stage, &spec.dir, path, &at, userns)?;
                lower.push(at);
            }
            let disk = if quota::has_disk(spec) { "disk/" } else { "" };
            let (upper, work) = (format!("{disk}upper/{}", tree.name), format!("{disk}work/{}", tree.name));
            let below = (!tree.at.is_empty()).then_some(tree.at.as_str());
            stage.overlay(&lower, &upper, &work, &rootfs, below, self.maps.is_some())?;
        }
        let agent = self.agent_mount();
        if agent != self.options.agent {
            stage.attach(&self.options.agent, &agent, None)?;
        }
        Ok(())
    }

    /// A lower layer: with mapped owners a mount; else a link to the directory itself.
    fn lower(&self, stage: &mut Stage, dir: &Path, path: &Path, at: &str, userns: Option<&OwnedFd>) -> io::Result<()> {
        let full = dir.join(at);
        if let Some(parent) = full.parent() {
            fs::create_dir_all(parent)?;
        }
        match userns {
            Some(userns) => {
                if !full.is_dir() {
                    fs::create_dir(&full)?;
                }
                stage.attach(path, Path::new(at), Some(userns))
            }
            None => {
                remove_file(&full)?;
                std::os::unix::fs::symlink(path, &full)
            }
        }
    }

    /// Every mount of machinefs that is this user's: a mount namespace that kept one would keep the file system's
    /// connection alive after its unmount. The way to another user's may lead through file systems that never answer.
    pub(super) fn fuse_mounts(&self) -> io::Result<Vec<PathBuf>> {
        self.fuse_mounts_by(Some(rustix::process::geteuid().as_raw()))
    }

    /// The same of all users: for comparing names only.
    pub(super) fn fuse_mounts_of_all(&self) -> io::Result<Vec<PathBuf>> {
        self.fuse_mounts_by(None)
    }

    fn fuse_mounts_by(&self, user: Option<u32>) -> io::Result<Vec<PathBuf>> {
        let text = fs::read("/proc/self/mountinfo")?;
        let mut all: Vec<PathBuf> = mountinfo::fuse_mounts_in(&text, user);
        all.extend(self.options.mountpoint.clone().filter(|m| !all.contains(m)));
        Ok(all)
    }
}

/// Is this the init of a machine: number 1 of a pid namespace below ours, with the right user numbers?
fn is_machine(pid: u32, base: Option<u32>) -> io::Result<bool> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let inner = status.lines().find_map(|l| l.strip_prefix("NSpid:")).unwrap_or_default();
    let mut numbers = inner.split_whitespace();
    let is_init = numbers.clone().count() > 1 && numbers.next_back() == Some("1");
    let map = fs::read_to_string(format!("/proc/{pid}/uid_map"))?;
    let outside = map.split_whitespace().nth(1).and_then(|n| n.parse::<u32>().ok());
    Ok(is_init && base.is_none_or(|b| outside == Some(b)))
}

fn no_limits(spec: &MachineSpec) -> Vec<Warning> {
    let wanted = [
        spec.cpus.map(|c| format!("cpus={c}")),
        spec.memory.map(|m| format!("memory={m}")),
        spec.pids.map(|p| format!("pids={p}")),
    ];
    let text =
        |what| format!("the limit {what} does not hold: control groups are not delegated to ordinary users here");
    wanted.into_iter().flatten().map(|what| Warning(text(what))).collect()
}

/// How a child in its new user namespace waits for its maps.
#[derive(Debug)]
pub(super) struct Gate {
    ready: (OwnedFd, OwnedFd),
    go: (OwnedFd, OwnedFd),
}

impl Gate {
    pub(super) fn new() -> io::Result<Self> {
        super::occupy_listen_fd()?;
        let pipe = || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC);
        Ok(Self { ready: pipe()?, go: pipe()? })
    }

    /// Adds the step to a stage.
    pub(super) fn step(&self, stage: &mut Stage) -> io::Result<()> {
        stage.user_namespace(self.ready.1.as_raw_fd(), self.go.0.as_raw_fd())
    }

    /// What waits for the child (the thread that spawns it is held until it executes its program), writes its maps and
    /// lets it go on. Ends too when the child failed before it asked: all writing ends are closed then.
    fn opener<'a>(&self, maps: &'a userns::Maps) -> io::Result<impl FnOnce() -> io::Result<()> + Send + use<'a>> {
        let (ready, go) = (self.ready.0.try_clone()?, self.go.1.try_clone()?);
        Ok(move || {
            let mut pid = [0; 4];
            if rustix::io::retry_on_intr(|| rustix::io::read(&ready, &mut pid))? != pid.len() {
                return Ok(());
            }
            let written = maps.write_to(u32::from_ne_bytes(pid));
            // The child holds both ends of the pipe: it has to be told of a failure too.
            rustix::io::write(&go, if written.is_ok() { b"x" } else { b"-" })?;
            written
        })
    }
}
