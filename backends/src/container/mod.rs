//! Machines as containers: namespaces, control groups, seccomp and an overlay root, run by an OCI runtime.
//!
//! One subject a file: [`stage`] makes the mount namespace a machine starts in, [`spec`] and [`seccomp`] describe it to
//! the runtime, [`run`] starts, finds and ends it, [`disk`] is what it writes, [`cgroup`], [`userns`] and [`process`]
//! are the kernel's side, [`check`] says what this host lacks.
//!
//! A machine leaves nothing by construction: its mounts exist only in its own mount namespace, its processes are one
//! pid namespace and one control group named after it, its files are in its directory.
//!
//! **Ordinary users.** Without root everything happens in a user namespace that holds the user as root and the ranges
//! of /etc/subuid and /etc/subgid as the others; id-mapped mounts are root's, so the host's files show as nobody's
//! there: the machine's root may add and remove, but not change them.

mod bpf;
mod cgroup;
mod changes;
mod check;
mod child;
mod console;
mod disk;
mod etc;
mod mountinfo;
mod mounts;
mod net;
mod process;
mod programs;
mod quota;
mod remove;
mod run;
mod seccomp;
mod socket;
mod spec;
mod stage;
mod userns;

use crate::images::Store;
use crate::{
    Adopted, AgentStream, Backend, BackendError, Capabilities, Change, Finding, ImageConfig, MachineSpec, MountSpec,
    OnProgress, Running, SnapshotMade, SnapshotSpec, Usage, Warning,
};
use async_trait::async_trait;
use run::{SOCKET, hold, io_error};
use sha2::{Digest, Sha256};
use std::fs::{self, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

pub use mounts::{canonical_source, canonical_target, own_mounts};
pub(crate) use remove::remove_contents;

/// How a [`ContainerBackend`] works.
#[derive(Clone, Debug)]
pub struct ContainerOptions {
    /// The OCI runtime: a name looked up in PATH, or a path. `crun` is what this is tested with; any that knows
    /// `run --detach --preserve-fds` works.
    pub runtime: PathBuf,
    /// The agent's binary; static, because it runs in any root.
    pub agent: PathBuf,
    /// Where images are unpacked (`images`), 0700; not below the mount.
    pub state_dir: PathBuf,
    /// Where the runtime's own state is and where roots are mounted, each in a mount namespace of its own. Everybody
    /// must be able to enter it, and all directories above. A tmpfs is best.
    pub run_dir: PathBuf,
    /// The host's resolv.conf(5): the name servers that machines with a network ask.
    pub resolv_conf: PathBuf,
    /// Our own file system, detached from every mount namespace made here even before it shows in the mount table.
    pub mountpoint: Option<PathBuf>,
}

impl ContainerOptions {
    /// `crun`, with run files in /run/machinefs for root, and in the state directory for others.
    pub fn new(agent: PathBuf, state_dir: PathBuf) -> Self {
        let root = rustix::process::geteuid().is_root();
        let run_dir = if root { PathBuf::from("/run/machinefs") } else { state_dir.join("run") };
        let resolv_conf = PathBuf::from("/etc/resolv.conf");
        Self { runtime: "crun".into(), agent, state_dir, run_dir, resolv_conf, mountpoint: None }
    }
}

/// The backend `container`.
#[derive(Clone, Debug)]
pub struct ContainerBackend {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    options: ContainerOptions,
    /// Tells machines of this daemon from those of another with other state.
    instance: String,
    images: Store,
    cgroups: cgroup::Cgroups,
    networks: net::Networks,
    /// An ordinary user's numbers; `None` for root.
    maps: Option<userns::Maps>,
    /// The seccomp profile as a program, in base64.
    filter: Option<String>,
}

impl ContainerBackend {
    /// Makes the directories it needs and looks at the host's control groups.
    ///
    /// # Errors
    /// When the directories cannot be made.
    pub fn new(options: ContainerOptions) -> Result<Self, BackendError> {
        let failed = |path: &Path| io_error(format!("making {}", path.display()));
        let private = |path: &Path| fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
        private(&options.state_dir).map_err(failed(&options.state_dir))?;
        let state_dir = options.state_dir.canonicalize().map_err(failed(&options.state_dir))?;
        let user = !rustix::process::geteuid().is_root();
        let images = Store::new(state_dir.join("images"), user).map_err(failed(&state_dir))?;
        let digest = Sha256::digest(state_dir.as_os_str().as_encoded_bytes());
        let instance: String = digest.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
        let inner = Inner {
            networks: net::Networks::new(&state_dir, &instance, options.resolv_conf.clone()),
            instance,
            images,
            cgroups: cgroup::Cgroups::detect().map_err(io_error("looking for control groups"))?,
            maps: user.then(userns::Maps::of_user),
            filter: seccomp::filter().map(|code| base64::Engine::encode(&base64::prelude::BASE64_STANDARD, code)),
            options: ContainerOptions { state_dir, ..options },
        };
        inner.make_run_dir().map_err(failed(&inner.options.run_dir))?;
        occupy_listen_fd().map_err(io_error("opening /dev/null"))?;
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Looks at the host's files for the image `host`, ahead of the first machine, which otherwise waits for it (half a
    /// second where the kernel has them in memory, some seconds where not). For a thread that may block.
    pub fn prepare(&self) {
        self.inner.images.prepare();
    }

    /// Has the control groups ready by the time the runtime comes to them. An ordinary user's runtime uses none.
    fn hurry_groups(&self) {
        if self.inner.maps.is_none() {
            let inner = Arc::clone(&self.inner);
            drop(tokio::task::spawn_blocking(move || inner.cgroups.hurry()));
        }
    }

    async fn on_thread<T: Send + 'static>(
        &self,
        spec: &MachineSpec,
        work: impl FnOnce(&Inner, &MachineSpec) -> Result<T, BackendError> + Send + 'static,
    ) -> Result<T, BackendError> {
        let (inner, spec) = (Arc::clone(&self.inner), spec.clone());
        let joined = tokio::task::spawn_blocking(move || work(&inner, &spec)).await;
        joined.map_err(|e| io_error("a thread of the container backend")(io::Error::other(e)))?
    }
}

/// Keeps the number that the agent's socket gets in the child out of use in this process, so that nothing the child
/// needs is there. Descriptors made here stay open for good; they are at most four.
fn occupy_listen_fd() -> io::Result<()> {
    static HELD: Mutex<Vec<OwnedFd>> = Mutex::new(Vec::new());
    let mut held = HELD.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        // SAFETY: F_GETFD on a number looks only whether it is open.
        if unsafe { libc::fcntl(machinefs_protocol::LISTEN_FD, libc::F_GETFD) } >= 0 {
            return Ok(());
        }
        held.push(fs::File::open("/dev/null")?.into());
    }
}

impl Inner {
    fn make_run_dir(&self) -> io::Result<()> {
        let run = &self.options.run_dir;
        let user = self.maps.is_some();
        let open = if user { 0o700 } else { 0o755 };
        for dir in [run.clone(), run.join("rootfs"), self.runtime_state()] {
            fs::DirBuilder::new().recursive(true).mode(open).create(&dir)?;
        }
        fs::set_permissions(self.runtime_state(), Permissions::from_mode(0o700))?;
        if !user {
            // A umask of the daemon's must not close these to the machines' roots.
            fs::set_permissions(run, Permissions::from_mode(0o755))?;
            fs::set_permissions(run.join("rootfs"), Permissions::from_mode(0o755))?;
            fs::OpenOptions::new().create(true).append(true).open(run.join("agent")).map(drop)?;
        }
        Ok(())
    }

    /// Where the runtime keeps what it knows (`--root`).
    fn runtime_state(&self) -> PathBuf {
        self.options.run_dir.join("runtime")
    }

    /// Where the machine's root is mounted, in a mount namespace of its own. The machine's root user must be able to
    /// come there, and its directory is closed to root's machines: so these have one place for all.
    fn rootfs(&self, spec: &MachineSpec) -> PathBuf {
        if self.maps.is_some() { spec.dir.join("rootfs") } else { self.options.run_dir.join("rootfs") }
    }

    /// Where the runtime finds the agent's binary, which may be in a directory closed to the machine's root as well.
    fn agent_mount(&self) -> PathBuf {
        if self.maps.is_some() { self.options.agent.clone() } else { self.options.run_dir.join("agent") }
    }

    fn runtime(&self) -> Command {
        let mut command = Command::new(&self.options.runtime);
        command.arg("--root").arg(self.runtime_state());
        if self.maps.is_some() && self.runtime_name().contains("crun") {
            command.arg("--cgroup-manager=disabled");
        }
        command.current_dir("/");
        command
    }

    fn runtime_name(&self) -> String {
        self.options.runtime.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    fn destroy(&self, spec: &MachineSpec) -> Result<(), BackendError> {
        let failed = || io_error(format!("removing {}", spec.dir.display()));
        let lock = hold(&spec.dir)?;
        self.clean(spec)?;
        if let Some(maps) = &self.maps
            && maps.has_range()
            && lock.is_some()
        {
            // Files of the machine's other users are not the user's own to remove, but their namespace's root's.
            let gate = run::Gate::new().map_err(failed())?;
            let mut stage = stage::Stage::default();
            gate.step(&mut stage).map_err(failed())?;
            stage.enter(&spec.dir).map_err(failed())?;
            let mut command = Command::new("rm");
            command.args(["-rf", "--one-file-system", "--", "upper", "upper.part", "work", "mounts"]);
            self.carry_out(command, stage, Some(gate)).map_err(|(e, _)| failed()(e))?;
        }
        remove::remove_contents(&spec.dir).map_err(failed())
    }
}

#[async_trait]
impl Backend for ContainerBackend {
    fn name(&self) -> &'static str {
        "container"
    }

    fn isolation(&self) -> &'static str {
        "namespaces"
    }

    async fn check(&self) -> Vec<Finding> {
        let inner = Arc::clone(&self.inner);
        tokio::task::spawn_blocking(move || inner.findings()).await.unwrap_or_default()
    }

    async fn create(&self, spec: &MachineSpec, _progress: OnProgress) -> Result<(), BackendError> {
        self.hurry_groups();
        self.on_thread(spec, |inner, spec| {
            let _lock = held(spec)?;
            inner.prepare(spec).map(drop)
        })
        .await
    }

    async fn start(&self, spec: &MachineSpec) -> Result<Running, BackendError> {
        self.hurry_groups();
        self.on_thread(spec, |inner, spec| {
            let lock = held(spec)?;
            inner.boot(spec, &lock)
        })
        .await
    }

    async fn connect(&self, spec: &MachineSpec) -> Result<AgentStream, BackendError> {
        // A connect to a unix socket that does not wait is too short for a thread of its own.
        socket::connect_at(&spec.dir, SOCKET)
            .map_err(io_error(format!("connecting to the agent of the machine {}", spec.id)))
    }

    async fn kill(&self, spec: &MachineSpec) -> Result<(), BackendError> {
        self.on_thread(spec, |inner, spec| {
            let _lock = hold(&spec.dir)?;
            inner.clean(spec)
        })
        .await
    }

    async fn destroy(&self, spec: &MachineSpec) -> Result<(), BackendError> {
        self.on_thread(spec, Inner::destroy).await
    }

    fn capabilities(&self, spec: &MachineSpec) -> Capabilities {
        let inner = &self.inner;
        Capabilities {
            pause: inner.cgroups.freezer(&inner.name(spec)).is_some(),
            mounts: true,
            changes: true,
            outgoing: match inner.maps {
                None => net::missing().is_none(),
                Some(_) => net::user::Program::find().is_some(),
            },
            disk_limit: inner.maps.is_none() && quota::missing().is_none(),
            snapshot: false,
            memory_snapshot: false,
        }
    }

    async fn pause(&self, spec: &MachineSpec) -> Result<(), BackendError> {
        self.freeze(spec, true).await
    }

    async fn resume(&self, spec: &MachineSpec) -> Result<(), BackendError> {
        self.freeze(spec, false).await
    }

    async fn adopt(&self, spec: &MachineSpec) -> Result<Adopted, BackendError> {
        self.on_thread(spec, |inner, spec| {
            let _lock = hold(&spec.dir)?;
            if let Some(running) = inner.find(spec)? {
                match inner.adopt_network(spec, &running) {
                    Ok(()) => return Ok(Adopted::Running(running)),
                    // It was about to end: the daemon before us had killed it.
                    Err(_) if run::ends_soon(&running) => {}
                    Err(e) => return Err(e),
                }
            }
            inner.clean(spec)?;
            Ok(Adopted::Stopped)
        })
        .await
    }

    async fn usage(&self, spec: &MachineSpec) -> Result<Usage, BackendError> {
        self.on_thread(spec, |inner, spec| {
            if inner.maps.is_none() {
                return Ok(inner.cgroups.usage(&inner.name(spec)));
            }
            let Some(running) = inner.find(spec)? else { return Ok(Usage::default()) };
            process::usage_of_namespace(running.pid)
                .map_err(io_error(format!("looking at the processes of the machine {}", spec.id)))
        })
        .await
    }

    async fn console(&self, spec: &MachineSpec) -> Result<Vec<u8>, BackendError> {
        self.on_thread(spec, |_, spec| {
            console::collect(&spec.dir).map_err(io_error(format!("reading the console of {}", spec.id)))
        })
        .await
    }

    async fn attach_mount(&self, spec: &MachineSpec, mount: &MountSpec) -> Result<Vec<Warning>, BackendError> {
        let mount = mount.clone();
        self.on_thread(spec, move |inner, spec| {
            let _lock = held(spec)?;
            let running = inner.find(spec)?.ok_or_else(|| not_running(spec))?;
            inner.attach(spec, &running, inner.base(spec)?, &mount)
        })
        .await
    }

    async fn detach_mount(&self, spec: &MachineSpec, target: &Path) -> Result<(), BackendError> {
        let target = target.to_owned();
        self.on_thread(spec, move |inner, spec| {
            let _lock = held(spec)?;
            match inner.find(spec)? {
                Some(running) => inner.detach(spec, &running, &target),
                None => Ok(()),
            }
        })
        .await
    }

    async fn changes(
        &self,
        spec: &MachineSpec,
        mut sink: Box<dyn FnMut(Change) -> bool + Send>,
    ) -> Result<u64, BackendError> {
        self.on_thread(spec, move |inner, spec| {
            let failed = || io_error(format!("looking at what changed in the machine {}", spec.id));
            // Not held: a long look must not stop anything else.
            let Some(root) = disk::recorded(&spec.dir).map_err(failed())? else { return Ok(0) };
            let (disk, base) = (inner.disk_dir(spec), inner.base(spec)?);
            let work = || {
                let walk = changes::Walk { spec, root: &root, disk: &disk, base, closed: std::cell::Cell::new(0) };
                walk.run(&mut *sink).map(|()| walk.closed.get())
            };
            inner.with_disk(spec, work).flatten().map_err(failed())
        })
        .await
    }

    async fn image_config(&self, _spec: &MachineSpec) -> Result<ImageConfig, BackendError> {
        Ok(ImageConfig::default())
    }

    async fn snapshot(&self, _spec: &MachineSpec, _snapshot: &SnapshotSpec) -> Result<SnapshotMade, BackendError> {
        Err(BackendError::Unsupported("a snapshot"))
    }

    async fn restore(&self, _spec: &MachineSpec) -> Result<(), BackendError> {
        Err(BackendError::Unsupported("a snapshot"))
    }

    async fn remove_snapshot(&self, _snapshot: &SnapshotSpec) -> Result<(), BackendError> {
        Err(BackendError::Unsupported("a snapshot"))
    }

    fn boot_timeout(&self) -> Duration {
        Duration::from_secs(30)
    }
}

impl ContainerBackend {
    async fn freeze(&self, spec: &MachineSpec, frozen: bool) -> Result<(), BackendError> {
        self.on_thread(spec, move |inner, spec| {
            let _lock = held(spec)?;
            let failed = io_error(format!("the freezer of the machine {}", spec.id));
            match inner.cgroups.freeze(&inner.name(spec), frozen).map_err(failed)? {
                true => Ok(()),
                false => Err(BackendError::Unsupported("pause (no freezer control group here)")),
            }
        })
        .await
    }
}

fn not_running(spec: &MachineSpec) -> BackendError {
    io_error(format!("the machine {} does not run", spec.id))(io::Error::from_raw_os_error(libc::EHOSTDOWN))
}

/// Holds a machine whose directory has to be there.
fn held(spec: &MachineSpec) -> Result<fs::File, BackendError> {
    hold(&spec.dir)?.ok_or_else(|| BackendError::Io {
        what: format!("the directory of the machine {}, {}", spec.id, spec.dir.display()),
        source: io::ErrorKind::NotFound.into(),
    })
}
