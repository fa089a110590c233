//! Mounting and unmounting: by the kernel's mount interface where we may, else by fusermount3.

use super::{fusermount, mountinfo, stale};
use rustix::fd::{AsFd, AsRawFd, OwnedFd};
use rustix::fs::{Mode, OFlags};
use rustix::io;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, UnmountFlags};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Type of our file systems, as `/proc/mounts` shows it; updatedb and desktop tools can skip it by this.
pub const KIND: &str = "fuse.machinefs";
const SUBTYPE: &str = "machinefs";

/// How to mount.
#[derive(Clone, Debug)]
pub struct MountOptions {
    /// The directory.
    pub target: PathBuf,
    /// Whether other users may come in (what they may do there, the permissions say). `None`: yes when the mount is
    /// made by root. For other users /etc/fuse.conf must hold `user_allow_other`.
    pub allow_other: Option<bool>,
    /// Refuse to run programs from the mount.
    pub no_exec: bool,
    /// Threads that read requests. `None`: one for each CPU, at least two.
    pub readers: Option<usize>,
    /// KiB that the kernel reads ahead; needs root. `None`: the kernel's default of 128.
    pub read_ahead: Option<u32>,
    /// The kernel keeps the targets of symbolic links until it hears [`super::Notice::InvalidateInode`].
    pub cache_symlinks: bool,
    /// When this layer answers in the place of a file system that does not.
    pub patience: Patience,
}

/// The last resort against processes in state D: times after which this layer answers a request itself. A file system
/// that keeps to its own deadlines never sees it happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// After the interrupt of a request whose process is being killed: then EINTR. The process waits in D from the
    /// signal on.
    pub after_signal: std::time::Duration,
    /// After an operation during which the kernel holds a lock of a directory, file or page has come: then
    /// ETIMEDOUT. Others wait in D behind it.
    pub holding_lock: std::time::Duration,
}

impl Default for Patience {
    /// Twice and six times the 5 s that an operation has by default.
    fn default() -> Self {
        let seconds = std::time::Duration::from_secs;
        Patience { after_signal: seconds(10), holding_lock: seconds(30) }
    }
}

impl MountOptions {
    /// Defaults for a directory.
    pub fn new(target: impl Into<PathBuf>) -> Self {
        MountOptions {
            target: target.into(),
            allow_other: None,
            no_exec: false,
            readers: None,
            read_ahead: Some(1024),
            cache_symlinks: true,
            patience: Patience::default(),
        }
    }
}

/// Why a file system could not be mounted, unmounted or served. The messages say what to do.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the fields are what the message says")]
pub enum MountError {
    #[error(
        "there is no /dev/fuse: load the module with `modprobe fuse`, or give the container the device (--device /dev/fuse)"
    )]
    NoDevice,
    #[error("/dev/fuse may not be opened: let root run `chmod 0666 /dev/fuse`")]
    DeviceForbidden,
    #[error("mounting without root needs fusermount3: install the package fuse3")]
    NoFusermount,
    #[error("fusermount3 refused: {0}")]
    Fusermount(String),
    #[error("{0}: no such directory: make it first")]
    NoTarget(PathBuf),
    #[error("{0} is not a directory")]
    NotADirectory(PathBuf),
    #[error("{path}: {error}")]
    Target { path: PathBuf, error: std::io::Error },
    #[error("{0}: a machinefs is mounted there already: unmount it first (`machinefs umount`)")]
    AlreadyMounted(PathBuf),
    #[error("{0} is not empty, and the mount would hide what is in it: give an empty directory")]
    NotEmpty(PathBuf),
    #[error("{0}: no machinefs is mounted there")]
    NotOurs(PathBuf),
    #[error("{0}: another file system is mounted over ours: unmount that one first")]
    Covered(PathBuf),
    #[error("{0} is in use: end what uses it (`fuser -vm`), or unmount lazily")]
    Busy(PathBuf),
    #[error("the kernel speaks FUSE {major}.{minor}, at least 7.31 (Linux 5.4) is needed")]
    KernelTooOld { major: u32, minor: u32 },
    #[error("the kernel broke the FUSE protocol: {0}")]
    Protocol(&'static str),
    #[error("no more threads: {0}: raise the limit on processes (ulimit -u, pids.max)")]
    Threads(String),
    #[error("{call}: {error}")]
    System { call: &'static str, error: std::io::Error },
}

impl MountError {
    pub(super) fn system(call: &'static str, error: io::Errno) -> Self {
        MountError::System { call, error: error.into() }
    }
}

/// A file system that is mounted, and that nobody answers yet. Unmounts when it is dropped.
pub struct Mounted {
    parts: Option<(OwnedFd, Place, MountOptions)>,
}

impl Mounted {
    /// Answers INIT, and gives the parts and the kernel's minor version away: from here on dropping this does nothing.
    pub(super) fn negotiated(mut self) -> Result<(OwnedFd, Place, MountOptions, u32), MountError> {
        let Some((device, _, options)) = &self.parts else { return Err(MountError::Protocol("served twice")) };
        let minor = super::negotiate::negotiate(device.as_fd(), options)?;
        let (device, place, options) = self.parts.take().ok_or(MountError::Protocol("served twice"))?;
        Ok((device, place, options, minor))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Some((device, place, _)) = self.parts.take() {
            // First, so that nobody waits for answers that will not come.
            drop(device);
            if let Err(error) = place.unmount(true, true) {
                tracing::warn!(%error, "the file system stays mounted");
            }
        }
    }
}

/// Where our mount is.
#[derive(Clone, Debug)]
pub struct Place {
    id: u64,
    device: String,
    by_fusermount: bool,
}

/// Mounts a file system; [`Mounted::serve`] then answers for it. Until then whoever goes there waits.
///
/// # Errors
/// Each with a remedy: see [`MountError`].
pub fn mount(options: MountOptions) -> Result<Mounted, MountError> {
    let target = stale::resolve(&options.target)?;
    let mounts = mountinfo::read().map_err(|error| MountError::System { call: "/proc/self/mountinfo", error })?;
    if mountinfo::top(&mounts, &target).is_some_and(|mount| mount.kind == KIND) {
        return Err(MountError::AlreadyMounted(target));
    }
    match std::fs::read_dir(&target).map(|mut entries| entries.next().is_none()) {
        Ok(true) => {}
        Ok(false) => return Err(MountError::NotEmpty(target)),
        Err(error) => return Err(target_error(&target, error)),
    }
    warn_of_timeouts();
    let (device, id, by_fusermount) = match mount_directly(&target, &options)? {
        Some((device, id)) => (device, Some(id), false),
        None => (fusermount::mount(&target, &options)?, None, true),
    };
    let mounts = mountinfo::read().map_err(|error| MountError::System { call: "/proc/self/mountinfo", error })?;
    let mount = match id {
        Some(id) => mounts.iter().find(|mount| mount.id == id),
        None => mountinfo::top(&mounts, &target),
    };
    let mount =
        mount.filter(|mount| mount.kind == KIND).ok_or(MountError::Protocol("the mount is not in mountinfo"))?;
    let place = Place { id: mount.id, device: mount.device.clone(), by_fusermount };
    Ok(Mounted { parts: Some((device, place, options)) })
}

pub(super) fn target_error(path: &Path, error: std::io::Error) -> MountError {
    let path = path.to_path_buf();
    match error.kind() {
        std::io::ErrorKind::NotFound => MountError::NoTarget(path),
        std::io::ErrorKind::NotADirectory => MountError::NotADirectory(path),
        _ => MountError::Target { path, error },
    }
}

/// Mounts by the kernel's interface of file descriptors. `None`: we may not, fusermount3 has to.
fn mount_directly(target: &Path, options: &MountOptions) -> Result<Option<(OwnedFd, u64)>, MountError> {
    use rustix::mount;
    let context = match mount::fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC) {
        Ok(context) => context,
        Err(io::Errno::PERM) => return Ok(None),
        Err(io::Errno::NODEV) => return Err(MountError::NoDevice),
        Err(error) => return Err(MountError::system("fsopen", error)),
    };
    let device = match rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) {
        Ok(device) => device,
        Err(io::Errno::NOENT | io::Errno::NODEV | io::Errno::NXIO) => return Err(MountError::NoDevice),
        Err(io::Errno::ACCESS | io::Errno::PERM) => return Err(MountError::DeviceForbidden),
        Err(error) => return Err(MountError::system("open of /dev/fuse", error)),
    };
    let set = |key: &str, value: String| mount::fsconfig_set_string(context.as_fd(), key, value);
    let flag = |key: &str| mount::fsconfig_set_flag(context.as_fd(), key);
    let configure = || -> io::Result<()> {
        set("source", SUBTYPE.into())?;
        set("subtype", SUBTYPE.into())?;
        set("fd", device.as_raw_fd().to_string())?;
        set("rootmode", "40000".into())?;
        set("user_id", rustix::process::geteuid().as_raw().to_string())?;
        set("group_id", rustix::process::getegid().as_raw().to_string())?;
        flag("default_permissions")?;
        if options.allow_other.unwrap_or(true) {
            flag("allow_other")?;
        }
        mount::fsconfig_create(context.as_fd())
    };
    configure().map_err(|error| MountError::system("fsconfig", error))?;
    let mut attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
    if options.no_exec {
        attributes |= MountAttrFlags::MOUNT_ATTR_NOEXEC;
    }
    let tree = mount::fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)
        .map_err(|error| MountError::system("fsmount", error))?;
    let id = mount_id(&tree).map_err(|error| MountError::System { call: "/proc/self/fdinfo", error })?;
    mount::move_mount(tree.as_fd(), "", rustix::fs::CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(|error| MountError::system("move_mount", error))?;
    Ok(Some((device, id)))
}

/// The id of the mount that a descriptor is in. Asks nobody who may be dead or waiting.
pub(super) fn mount_id(fd: &OwnedFd) -> std::io::Result<u64> {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()))?;
    info.lines()
        .find_map(|line| line.strip_prefix("mnt_id:")?.trim().parse().ok())
        .ok_or_else(|| std::io::Error::other("no mnt_id in fdinfo"))
}

/// With a default time-out the kernel aborts the whole mount when one request is older, and ours may be (a blocked
/// read is).
fn warn_of_timeouts() {
    for name in ["default_request_timeout", "max_request_timeout"] {
        let path = format!("/proc/sys/fs/fuse/{name}");
        if let Ok(value) = std::fs::read_to_string(&path)
            && value.trim() != "0"
        {
            tracing::warn!(
                value = value.trim(),
                "fs.fuse.{name} is set: the kernel will abort the mount when a request takes so many seconds, as a \
                 blocked read does; set it to 0 (sysctl fs.fuse.{name}=0) and mount again"
            );
        }
    }
}

impl Place {
    /// Unmounts; see [`super::Session::unmount`]. `connected`: the kernel still sends us requests, so the mount is there.
    pub fn unmount(&self, lazy: bool, connected: bool) -> Result<(), MountError> {
        let mounts = mountinfo::read().map_err(|error| MountError::System { call: "/proc/self/mountinfo", error })?;
        let is_ours =
            |mount: &&mountinfo::Mount| mount.id == self.id && mount.device == self.device && mount.kind == KIND;
        let Some(ours) = mounts.iter().find(is_ours) else { return Ok(()) };
        // Numbers of mounts and devices are used again at once: it may be another's by now, who serves it.
        if !connected && !stale::is_dead(&ours.path)? {
            return Ok(());
        }
        if mountinfo::top(&mounts, &ours.path).is_none_or(|top| top.id != self.id) {
            return Err(MountError::Covered(ours.path.clone()));
        }
        unmount_at(&ours.path, self.id, lazy, self.by_fusermount)
    }

    /// Lets the kernel read that far ahead, in KiB. Best effort: needs root.
    pub fn set_read_ahead(&self, kib: u32) {
        let path = format!("/sys/class/bdi/{}/read_ahead_kb", self.device);
        if let Err(error) = std::fs::write(&path, kib.to_string()) {
            tracing::debug!(path, %error, "read-ahead stays as it is");
        }
    }
}

/// Unmounts the tree that is mounted at `path`, whoever serves it. With `lazy` also when files of it are in use.
///
/// # Errors
/// Nothing of ours is mounted there; it is in use ([`MountError::Busy`]).
pub fn unmount(path: &Path, lazy: bool) -> Result<(), MountError> {
    let path = super::stale::resolve(path)?;
    let mounts = mountinfo::read().map_err(|error| MountError::System { call: "/proc/self/mountinfo", error })?;
    let ours = mountinfo::top(&mounts, &path).filter(|mount| mount.kind == KIND);
    let ours = ours.ok_or_else(|| MountError::NotOurs(path.clone()))?;
    unmount_at(&path, ours.id, lazy, !rustix::process::geteuid().is_root())
}

/// Unmounts the mount with that id, which is at that path.
pub(super) fn unmount_at(path: &Path, id: u64, lazy: bool, by_fusermount: bool) -> Result<(), MountError> {
    if by_fusermount {
        return fusermount::unmount(path, lazy);
    }
    let result = if lazy {
        // By descriptor, so that it is this mount and no other. Opening asks the file system nothing.
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let root = rustix::fs::open(path, flags, Mode::empty()).map_err(|error| target_error(path, error.into()))?;
        if mount_id(&root).map_err(|error| MountError::System { call: "/proc/self/fdinfo", error })? != id {
            return Err(MountError::Covered(path.to_path_buf()));
        }
        rustix::mount::unmount(format!("/proc/self/fd/{}", root.as_raw_fd()), UnmountFlags::DETACH)
    } else {
        rustix::mount::unmount(path.as_os_str().as_bytes(), UnmountFlags::NOFOLLOW)
    };
    match result {
        Ok(()) => Ok(()),
        Err(io::Errno::BUSY) => Err(MountError::Busy(path.to_path_buf())),
        Err(io::Errno::PERM) => fusermount::unmount(path, lazy),
        Err(error) => Err(MountError::system("umount", error)),
    }
}
