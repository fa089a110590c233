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
mod check;
mod console;
mod disk;
mod process;
mod remove;
mod run;
mod seccomp;
mod socket;
mod spec;
mod stage;
mod userns;

use crate::images::Store;
use crate::{Adopted, AgentStream, Backend, BackendError, Finding, MachineSpec, Running, Usage};
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
    /// Our own file system, detached from every mount namespace made here even before it shows in the mount table.
    pub mountpoint: Option<PathBuf>,
}

impl ContainerOptions {
    /// `crun`, with run files in /run/machinefs for root, and in the state directory for others.
    pub fn new(agent: PathBuf, state_dir: PathBuf) -> Self {
        let root = rustix::process::geteuid().is_root();
        let run_dir = if root { PathBuf::from("/run/machinefs") } else { state_dir.join("run") };
        Self { runtime: "crun".into(), agent, state_dir, run_dir, mountpoint: None }
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
            command.args(["-rf", "--one-file-system", "--", "upper", "upper.part", "work"]);
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

    async fn create(&self, spec: &MachineSpec) -> Result<(), BackendError> {
        self.hurry_groups();
        self.on_thread(spec, |inner, spec| {
            let _lock = held(spec)?;
            disk::prepare(spec, &inner.images, inner.base(spec)?).map(drop)
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

    fn can_pause(&self, spec: &MachineSpec) -> bool {
        self.inner.cgroups.freezer(&self.inner.name(spec)).is_some()
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
                return Ok(Adopted::Running(running));
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

/// Holds a machine whose directory has to be there.
fn held(spec: &MachineSpec) -> Result<fs::File, BackendError> {
    hold(&spec.dir)?.ok_or_else(|| BackendError::Io {
        what: format!("the directory of the machine {}, {}", spec.id, spec.dir.display()),
        source: io::ErrorKind::NotFound.into(),
    })
}
