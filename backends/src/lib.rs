//! What boots machines. A backend's only job is to boot one and hand back a byte stream to the agent in it;
//! everything above that stream is the same for all of them. Backends know nothing of the tree.

pub mod container;
pub mod images;
pub mod volumes;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;
use thiserror::Error;

/// What a backend needs to know of a machine. Everything in it is written down by the caller before the backend is
/// asked to make anything, so that [`Backend::adopt`] and [`Backend::destroy`] work after a crash at any point.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MachineSpec {
    /// The backend's name of the machine: `m` and a number that is never used again; never the user's name for it.
    pub id: String,
    /// A directory that is the machine's alone (exists, 0700, not below the mount): its disk, sockets, run files.
    pub dir: PathBuf,
    /// Image: `host`, an absolute path of a root directory, or of a tar of one.
    pub image: String,
    /// Processors; may be a fraction. `None`: no limit.
    pub cpus: Option<f64>,
    /// Memory in bytes. `None`: no limit.
    pub memory: Option<u64>,
    /// Processes. `None`: no limit.
    pub pids: Option<u64>,
    /// Host name in the guest.
    pub hostname: String,
    /// Which range of user numbers is the machine's: a small number, unique among the machines that exist. Its network
    /// address and the name of its interface come from it too.
    pub uid_slot: u32,
    /// What of the network it reaches.
    #[serde(default)]
    pub network: Network,
    /// What its own disk may hold, in bytes. `None`: no limit. Taken from its first start on; it may grow later.
    #[serde(default)]
    pub disk: Option<u64>,
    /// Whose it is on the host: mounts are made with this user's rights.
    #[serde(default)]
    pub owner: Owner,
    /// What is mounted in it at every start.
    #[serde(default)]
    pub mounts: Vec<MountSpec>,
    /// The snapshot that its disk begins as, in place of the image's content.
    #[serde(default)]
    pub from: Option<SnapshotSpec>,
    /// The next start goes on from the memory in `from`, where that has one, in place of a boot.
    #[serde(default)]
    pub resume: bool,
    /// A virtual machine's kernel on the host. `None`: the backend's.
    #[serde(default)]
    pub kernel: Option<PathBuf>,
    /// Added to a virtual machine's kernel command line.
    #[serde(default)]
    pub kernel_args: Option<String>,
}

/// A snapshot of a machine. It outlives the machine, and stays as long as a machine is made from it: the caller sees to
/// that, and removes none that a [`MachineSpec::from`] names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotSpec {
    /// The backend's name of it: `s` and a number that is never used again.
    pub id: String,
    /// A directory that is the snapshot's alone (exists, 0700, on the file system of the machines' directories).
    pub dir: PathBuf,
    /// The image of the machine that it was made of.
    pub image: String,
    /// The snapshot that this machine had begun as: it holds what this one does not.
    pub from: Option<Box<SnapshotSpec>>,
    /// The machine's range of user numbers, in which the files are owned.
    pub uid_slot: u32,
}

/// What [`Backend::snapshot`] has made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SnapshotMade {
    /// Its memory and processes are in it; otherwise only its disk is.
    pub memory: bool,
    /// Bytes that it takes on the host.
    pub bytes: u64,
}

/// What an image says of the machines made from it (the OCI image configuration, "config"); empty where it says nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageConfig {
    /// What identifies the image's content: `sha256:` and so on; empty for a directory, which has none.
    pub digest: String,
    /// Entrypoint.
    pub entrypoint: Vec<String>,
    /// Cmd.
    pub cmd: Vec<String>,
    /// Env: names and values.
    pub env: Vec<(String, String)>,
    /// User: `NAME`, `UID`, `UID:GID` …
    pub user: Option<String>,
    /// WorkingDir.
    pub workdir: Option<String>,
}

/// How far an image is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    /// What is being done: `pull`, `unpack`, `build`.
    pub step: &'static str,
    /// Bytes done.
    pub done: u64,
    /// Bytes in all, if it is known.
    pub total: Option<u64>,
}

/// Is told of progress; quick.
pub type OnProgress = std::sync::Arc<dyn Fn(Progress) + Send + Sync>;

/// What of the network a machine reaches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Network {
    /// Its own loopback.
    #[default]
    None,
    /// The internet and name servers, and neither the host, nor its neighbours, nor other machines. Nothing reaches it.
    Outgoing,
}

/// The user of the host that a machine belongs to, and who in the machine acts as that user on what is mounted there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// User number on the host.
    pub uid: u32,
    /// Main group on the host.
    pub gid: u32,
    /// User in the machine (its default user).
    pub guest_uid: u32,
    /// That user's group in the machine.
    pub guest_gid: u32,
}

/// A directory shown in a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountSpec {
    /// Of what.
    pub source: MountSource,
    /// Where in the machine: absolute. Symbolic links in it are followed within the machine; what is missing is made.
    pub target: PathBuf,
    /// How.
    pub mode: MountMode,
}

/// What a [`MountSpec`] shows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MountSource {
    /// A directory of the host: absolute and without symbolic links, see
    /// [`canonical_source`](container::canonical_source). What is mounted below it is not shown.
    Host(PathBuf),
    /// A volume, by name: see [`Volumes`](volumes::Volumes).
    Volume(String),
}

/// What a machine may do with what is mounted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MountMode {
    /// Read.
    Ro,
    /// Read and write.
    Rw,
    /// Read, and write for itself: what it changes stays in the machine.
    Cow,
}

/// What a backend can do with a machine, here and now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// [`Backend::pause`] and [`Backend::resume`].
    pub pause: bool,
    /// [`MachineSpec::mounts`], [`Backend::attach_mount`] and [`Backend::detach_mount`].
    pub mounts: bool,
    /// [`Backend::changes`].
    pub changes: bool,
    /// [`Network::Outgoing`].
    pub outgoing: bool,
    /// [`MachineSpec::disk`] is kept to.
    pub disk_limit: bool,
    /// [`Backend::snapshot`] and what goes with it.
    pub snapshot: bool,
    /// Snapshots of a machine that runs have its memory.
    pub memory_snapshot: bool,
}

/// One difference between a machine's disk and its image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// What was done.
    pub kind: ChangeKind,
    /// Where: absolute in the machine, any bytes.
    pub path: Vec<u8>,
    /// Of a directory that was moved: where it was in the image. The lines that follow below `path` say how its content
    /// differs from what was there.
    pub moved_from: Option<Vec<u8>>,
}

/// See [`Change`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ChangeKind {
    /// The image has nothing of that name.
    Added,
    /// The image has something of that name: its content or its attributes are others.
    Modified,
    /// The image has it, with all that is below.
    Deleted,
}

impl ChangeKind {
    /// `A`, `M` or `D`.
    pub fn letter(self) -> char {
        match self {
            Self::Added => 'A',
            Self::Modified => 'M',
            Self::Deleted => 'D',
        }
    }
}

/// A finding that does not stop a machine from booting but is to be told to the user (a limit that cannot be set).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning(pub String);

/// A machine that runs.
#[derive(Debug)]
pub struct Running {
    /// Process on the host whose end is the machine's end (the guest's init, the VMM).
    pub pid: u32,
    /// Readable (poll) when that process has ended; a pidfd.
    pub pidfd: OwnedFd,
    /// What the user should know.
    pub warnings: Vec<Warning>,
    /// Facts for `info`: key and value, no newlines (isolation, image digest, limits that hold …).
    pub facts: Vec<(String, String)>,
    /// It went on from a snapshot's memory: its processes are there, and its clock and names are of that time.
    pub resumed: bool,
}

/// What [`Backend::adopt`] found.
#[derive(Debug)]
pub enum Adopted {
    /// It still runs.
    Running(Running),
    /// It does not (any more); whatever was left of a run has been cleaned away, the disk is kept.
    Stopped,
}

/// Resources in use.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// Processor time, in microseconds.
    pub cpu_micros: u64,
    /// Memory now, in bytes.
    pub memory: u64,
    /// The most memory so far, in bytes, where it is known.
    pub memory_peak: u64,
    /// Processes now.
    pub pids: u64,
    /// Bytes on the machine's own disk, where that is cheap to know.
    pub disk: u64,
}

/// A line of `machinefs check`.
#[derive(Clone, Debug)]
pub struct Finding {
    /// What was looked at (`crun`, `id-mapped mounts`).
    pub subject: String,
    /// How it stands.
    pub level: Level,
    /// What was found.
    pub message: String,
    /// What to do about it; empty when all is well.
    pub remedy: String,
}

/// How bad a [`Finding`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// As it should be.
    Ok,
    /// Works, with less.
    Limited,
    /// The backend cannot run machines.
    Missing,
}

/// Why a backend could not do what it was asked.
#[derive(Debug, Error)]
pub enum BackendError {
    /// This backend has no such operation.
    #[error("{0} is not supported by this backend")]
    Unsupported(&'static str),
    /// The image is not there, not readable, or not an image.
    #[error("image {image}: {reason}")]
    Image {
        /// As the user named it.
        image: String,
        /// What is wrong with it, and what would be right.
        reason: String,
    },
    /// Something of the host is missing.
    #[error("{what}: {remedy}")]
    Missing {
        /// What.
        what: String,
        /// How to get it.
        remedy: String,
    },
    /// A program that was run (the OCI runtime) failed; its own words.
    #[error("{program}: {message}")]
    Program {
        /// Which.
        program: String,
        /// What it said.
        message: String,
    },
    /// Somebody far away (a registry, a provider) does not take our word for who we are.
    #[error("{what}: {remedy}")]
    Unauthorized {
        /// Who, and what was wanted.
        what: String,
        /// What to do about it.
        remedy: String,
    },
    /// Somebody far away does not answer, or cannot do it now.
    #[error("{what}: {reason}")]
    Unavailable {
        /// Who, and what was wanted.
        what: String,
        /// What was answered instead.
        reason: String,
    },
    /// A resource of the host ran out (disk, processes, memory).
    #[error("{what}: out of {resource}")]
    Exhausted {
        /// What was being done.
        what: String,
        /// What ran out.
        resource: String,
    },
    /// The guest or the VMM did not do something in time.
    #[error("{0} took too long")]
    Timeout(&'static str),
    /// A system call failed.
    #[error("{what}: {source}")]
    Io {
        /// What was being done, with the path.
        what: String,
        /// The error.
        source: std::io::Error,
    },
}

/// A stream to the agent: a connected socket (or a pair of a program's pipes as one).
pub type AgentStream = std::os::unix::net::UnixStream;

/// Boots machines of one kind.
///
/// Every operation is safe to repeat; `stop`, `kill` and `destroy` of what is not there succeed.
#[async_trait]
pub trait Backend: Send + Sync {
    /// The value of `config/backend` that chooses it.
    fn name(&self) -> &'static str;

    /// `namespaces` or `vm`: what stands between guest and host.
    fn isolation(&self) -> &'static str;

    /// What it needs of this host, and what of that is there.
    async fn check(&self) -> Vec<Finding>;

    /// Makes the machine's disk from its image (fetched and unpacked, if need be), or from the snapshot in
    /// [`MachineSpec::from`]. Idempotent.
    async fn create(&self, spec: &MachineSpec, progress: OnProgress) -> Result<(), BackendError>;

    /// What the image of a machine that was created says. Quick.
    async fn image_config(&self, spec: &MachineSpec) -> Result<ImageConfig, BackendError>;

    /// Boots it; returns when its agent can be connected to.
    async fn start(&self, spec: &MachineSpec) -> Result<Running, BackendError>;

    /// A stream to the agent. Fails at once when nothing listens.
    async fn connect(&self, spec: &MachineSpec) -> Result<AgentStream, BackendError>;

    /// Ends it without asking and waits for the end; cleans up what belongs to a run (mounts, cgroups, sockets). The
    /// polite way is the agent's, before.
    async fn kill(&self, spec: &MachineSpec) -> Result<(), BackendError>;

    /// Removes everything of it, running or not, also what a crash left half made.
    async fn destroy(&self, spec: &MachineSpec) -> Result<(), BackendError>;

    /// What can be done with this machine here. Quick: it is asked in the midst of a write.
    fn capabilities(&self, spec: &MachineSpec) -> Capabilities;

    /// Freezes it.
    async fn pause(&self, spec: &MachineSpec) -> Result<(), BackendError>;

    /// Undoes [`Backend::pause`].
    async fn resume(&self, spec: &MachineSpec) -> Result<(), BackendError>;

    /// After a restart of the daemon: does it still run?
    async fn adopt(&self, spec: &MachineSpec) -> Result<Adopted, BackendError>;

    /// What it uses. Quick: no walking of disks.
    async fn usage(&self, spec: &MachineSpec) -> Result<Usage, BackendError>;

    /// The last output of the machine's console as far as the host has it (boot messages, the runtime's words).
    async fn console(&self, spec: &MachineSpec) -> Result<Vec<u8>, BackendError>;

    /// Mounts in a machine that runs; it stays until the machine's end. The caller adds it to [`MachineSpec::mounts`] for
    /// the next start. What the user should know is in the answer.
    ///
    /// # Errors
    /// [`BackendError::Io`] with EACCES: the owner may not; ELOOP: a symbolic link in the source; EEXIST: something is
    /// mounted there by an earlier call; EINVAL: a target or source that cannot be.
    async fn attach_mount(&self, spec: &MachineSpec, mount: &MountSpec) -> Result<Vec<Warning>, BackendError>;

    /// Undoes [`Backend::attach_mount`], and what [`MachineSpec::mounts`] had mounted there. Success when nothing is.
    /// What was changed in a [`MountMode::Cow`] is kept until [`Backend::destroy`].
    ///
    /// # Errors
    /// [`BackendError::Io`] with EBUSY while a process in the machine uses it.
    async fn detach_mount(&self, spec: &MachineSpec, target: &Path) -> Result<(), BackendError>;

    /// How the machine's disk differs from its image, running or not: sorted by path, a directory before what is in it.
    /// The image is not walked. `sink` is called on a thread that may block. The answer: directories that could not be
    /// looked into (an ordinary user's daemon and other users' files), which are told as modified.
    async fn changes(
        &self,
        spec: &MachineSpec,
        sink: Box<dyn FnMut(Change) -> bool + Send>,
    ) -> Result<u64, BackendError>;

    /// Makes a snapshot of the machine as it is: running (it stands still meanwhile, and goes on), paused, or down. One
    /// that fails leaves nothing behind, and the machine as it was.
    async fn snapshot(&self, spec: &MachineSpec, snapshot: &SnapshotSpec) -> Result<SnapshotMade, BackendError>;

    /// Makes the disk of a machine that is down anew, as [`MachineSpec::from`] has it. Idempotent.
    async fn restore(&self, spec: &MachineSpec) -> Result<(), BackendError>;

    /// Removes what is in the snapshot's directory, also what a crash left half made.
    async fn remove_snapshot(&self, snapshot: &SnapshotSpec) -> Result<(), BackendError>;

    /// How long [`Backend::start`] may take at most unless the user says otherwise.
    fn boot_timeout(&self) -> Duration;
}
