//! A limit on what a machine's disk holds: its upper directories are on a file system of their own, ext4 in a sparse
//! file (`disk.img`) of the size allowed. It is mounted in mount namespaces that end with their use only; the loop device
//! frees itself when the last of them has ended. Needs root.

use super::Inner;
use super::programs;
use crate::{MachineSpec, Warning};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const IMAGE: &str = "disk.img";
const PART: &str = "disk.part";
const PLACE: &str = "disk";

/// The smallest disk, in bytes: ext4 and its journal take a part of it.
pub(super) const LEAST: u64 = 16 << 20;

/// `struct loop_info64` of linux/loop.h.
#[repr(C)]
struct LoopInfo {
    numbers: [u64; 5],
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config` of linux/loop.h.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

const LOOP_CONFIGURE: libc::Ioctl = 0x4c0a;
const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4c82;
const LO_FLAGS_AUTOCLEAR: u32 = 4;

/// Has this machine a disk of its own?
pub(super) fn has_disk(spec: &MachineSpec) -> bool {
    spec.dir.join(IMAGE).exists()
}

fn run(program: &str, arguments: &[&std::ffi::OsStr]) -> io::Result<()> {
    let mut command = Command::new(program);
    command.args(arguments).env("PATH", programs::path()).stdin(Stdio::null());
    let output = command.output().map_err(|e| io::Error::new(e.kind(), format!("{program}: {e}")))?;
    // fsck(8): 1 means that errors were corrected.
    let corrected = program == "e2fsck" && output.status.code() == Some(1);
    if output.status.success() || corrected {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(io::Error::other(format!("{program}: {text}")))
}

/// Makes the disk, or lets it grow, as `spec` has it; the machine does not run. What does not hold is the answer.
pub(super) fn prepare(spec: &MachineSpec, is_user: bool) -> io::Result<Option<Warning>> {
    let image = spec.dir.join(IMAGE);
    let not = |why: &str| Some(Warning(format!("the limit disk={} does not hold: {why}", spec.disk.unwrap_or(0))));
    let have = match fs::metadata(&image) {
        Ok(meta) => Some(meta.len()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => None,
        Err(e) => return Err(e),
    };
    let (size, have) = match (spec.disk, have) {
        (None, _) => return Ok(None),
        (Some(size), Some(have)) if size < have => {
            return Ok((size / 4096 != have / 4096)
                .then(|| not(&format!("the disk has {have} bytes and cannot shrink")))
                .flatten());
        }
        (Some(size), have) => (size / 4096 * 4096, have),
    };
    if size < LEAST {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("a disk has {LEAST} bytes at least")));
    }
    if is_user {
        return Ok(not("an ordinary user's daemon can mount no file system"));
    }
    match have {
        Some(have) if have == size => Ok(None),
        Some(_) => {
            // Not while it is mounted: of a machine that was killed it may be for a moment.
            if device_of(&image)?.is_some() {
                return Ok(not("the old disk is still in use; it grows at the next start"));
            }
            run("e2fsck", &["-f".as_ref(), "-p".as_ref(), image.as_os_str()])?;
            File::options().write(true).open(&image)?.set_len(size)?;
            run("resize2fs", &[image.as_os_str()])?;
            Ok(None)
        }
        None if spec.dir.join("upper").exists() => {
            Ok(not("the machine was made without one; a new machine keeps to it"))
        }
        None => match make(spec, size) {
            Ok(()) => Ok(None),
            Err(e) => {
                let part = spec.dir.join(PART);
                if part.exists() {
                    fs::remove_file(part)?;
                }
                Ok(not(&e.to_string()))
            }
        },
    }
}

fn make(spec: &MachineSpec, size: u64) -> io::Result<()> {
    if !Path::new("/dev/loop-control").exists() {
        return Err(io::Error::new(io::ErrorKind::NotFound, "this host has no loop devices"));
    }
    let part = spec.dir.join(PART);
    let file = File::options().create(true).truncate(true).write(true).mode(0o600).open(&part)?;
    file.set_len(size)?;
    let options = ["-q", "-F", "-m", "0", "-i", "8192", "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard"];
    let mut arguments: Vec<&std::ffi::OsStr> = options.iter().map(AsRef::as_ref).collect();
    arguments.push(part.as_os_str());
    run("mkfs.ext4", &arguments)?;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(spec.dir.join(PLACE))?;
    fs::rename(&part, spec.dir.join(IMAGE))
}

/// The loop device that has this file, if one has.
fn device_of(image: &Path) -> io::Result<Option<PathBuf>> {
    let image = image.canonicalize()?;
    for entry in fs::read_dir("/sys/block")? {
        let entry = entry?;
        let Ok(text) = fs::read(entry.path().join("loop/backing_file")) else { continue };
        let text = text.strip_suffix(b"\n").unwrap_or(&text);
        if text == image.as_os_str().as_encoded_bytes() {
            return Ok(Some(Path::new("/dev").join(entry.file_name())));
        }
    }
    Ok(None)
}

fn open_device(path: &Path) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?)
}

/// A loop device with this file: the one that has it, or a new one. It keeps it as long as it is open or mounted.
fn attach(image: &Path) -> io::Result<(OwnedFd, PathBuf)> {
    let file = File::options().read(true).write(true).open(image)?;
    for _ in 0..64 {
        if let Some(path) = device_of(image)? {
            let device = open_device(&path)?;
            // It may have let the file go before it was opened.
            if device_of(image)?.as_ref() == Some(&path) {
                return Ok((device, path));
            }
            continue;
        }
        let control = open_device(Path::new("/dev/loop-control"))?;
        // SAFETY: a request without an argument.
        let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
        if number < 0 {
            return Err(io::Error::last_os_error());
        }
        let path = PathBuf::from(format!("/dev/loop{number}"));
        let device = open_device(&path)?;
        let info = LoopInfo {
            numbers: [0; 5],
            number: 0,
            encrypt_type: 0,
            encrypt_key_size: 0,
            flags: LO_FLAGS_AUTOCLEAR,
            file_name: [0; 64],
            crypt_name: [0; 64],
            encrypt_key: [0; 32],
            init: [0; 2],
        };
        let fd = u32::try_from(file.as_raw_fd()).map_err(io::Error::other)?;
        let config = LoopConfig { fd, block_size: 0, info, reserved: [0; 8] };
        // SAFETY: a request with a structure of the size and layout that it wants, which lives.
        match unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) } {
            0 => return Ok((device, path)),
            // Another process was given the same free one.
            _ if io::Error::last_os_error().raw_os_error() == Some(libc::EBUSY) => {}
            _ => return Err(io::Error::last_os_error()),
        }
    }
    Err(io::Error::new(io::ErrorKind::ResourceBusy, "no loop device is to be had"))
}

impl Inner {
    /// Where the upper directories of a machine are; inside [`Inner::with_disk`] only.
    pub(super) fn disk_dir(&self, spec: &MachineSpec) -> PathBuf {
        if has_disk(spec) { spec.dir.join(PLACE) } else { spec.dir.clone() }
    }

    /// Does something that needs the machine's disk, and may start programs: on a thread that has it mounted where
    /// nobody else sees it. At once where the machine has no disk of its own.
    pub(super) fn with_disk<T: Send>(&self, spec: &MachineSpec, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        if !has_disk(spec) {
            return Ok(work());
        }
        let fuse = self.fuse_mounts()?;
        let runtime = tokio::runtime::Handle::try_current().ok();
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                let _inside = runtime.as_ref().map(tokio::runtime::Handle::enter);
                // SAFETY: the thread ends with this; nothing in it relies on the working directory, which it has to itself
                // from here on, or on descriptors, which stay shared.
                unsafe { unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS) }?;
                mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)?;
                for at in &fuse {
                    let _ = unmount(at, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
                }
                let (image, place) = (spec.dir.join(IMAGE), spec.dir.join(PLACE));
                {
                    // Two loop devices with one file would be two opinions of it.
                    let lock = File::open(&image)?;
                    lock.lock()?;
                    let (device, path) = attach(&image)?;
                    let flags = MountFlags::NODEV | MountFlags::NOSUID | MountFlags::NOATIME;
                    match mount(&path, &place, "ext4", flags, None) {
                        Err(Errno::NOENT) if !place.is_dir() => {
                            fs::DirBuilder::new().mode(0o700).create(&place)?;
                            mount(&path, &place, "ext4", flags, None)?;
                        }
                        // Done within the same already: it is there.
                        Err(Errno::BUSY) if is_mount(&place)? => {}
                        other => other?,
                    }
                    drop(device);
                }
                Ok(work())
            });
            thread.join().unwrap_or_else(|_| Err(io::Error::other("a thread ended")))
        })
    }
}

fn is_mount(place: &Path) -> io::Result<bool> {
    use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statx};
    let stat = statx(CWD, place, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::BASIC_STATS)?;
    Ok(stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

/// Why no disk can be limited here; `None`: it can.
pub(super) fn missing() -> Option<String> {
    let is_device = fs::metadata("/dev/loop-control").is_ok_and(|m| m.file_type().is_char_device());
    if !is_device {
        return Some("this host has no loop devices".into());
    }
    ["mkfs.ext4", "e2fsck", "resize2fs"]
        .into_iter()
        .find(|program| !programs::is_there(program))
        .map(|program| format!("{program} is not installed"))
}
