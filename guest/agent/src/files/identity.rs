//! What makes two looks at a file looks at the same file: its file handle (name_to_handle_at(2)) and its mount.
//!
//! A handle holds the inode number and its generation, so that a new file under an old number is another file. It is
//! asked for with `AT_HANDLE_FID` (Linux 6.5), with which file systems that cannot be exported (procfs, sysfs) give
//! one too. Where there is none, device, inode and birth time stand for it.
//!
//! Some of those made-up handles have no generation: procfs, and an overlay that was mounted inside a user namespace,
//! whose inode numbers are used again at once. There the birth time ([`Key::birth`]) has to tell files apart. It is
//! not part of the key, since it changes when an overlay copies a file up, which is still the same file.

use super::attr::stat;
use rustix::fs::{AtFlags, FileType, OFlags, Statx, StatxFlags, statx};
use rustix::io::Errno;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};

/// `MAX_HANDLE_SZ` of linux/exportfs.h.
const MAX_HANDLE: usize = 128;
/// Bytes of a key before the handle: mount and type.
const PREFIX: usize = 12;
/// The type of a key that is no handle. The kernel's types are 1 to 255, with flags from bit 16 on.
const NO_HANDLE: i32 = -1;

/// `FILEID_INO64_GEN` of linux/exportfs.h with the flag of a handle that cannot be opened: 64 bits of inode number, 32
/// of generation.
const INO64_GEN: i32 = 0x81;
const INO64_GEN_LEN: usize = 12;

/// Accept handles that cannot be opened (Linux 6.5).
const AT_HANDLE_FID: u32 = 0x200;
/// Give the mount's 64-bit number, which is never used again (Linux 6.12).
const AT_HANDLE_MNT_ID_UNIQUE: u32 = 0x001;
/// Which combinations to try, best first.
const FLAGS: [u32; 3] = [AT_HANDLE_FID | AT_HANDLE_MNT_ID_UNIQUE, AT_HANDLE_FID, 0];

/// `struct file_handle` of name_to_handle_at(2), with room for any handle.
#[repr(C)]
struct RawHandle {
    bytes: u32,
    kind: i32,
    data: [u8; MAX_HANDLE],
}

/// The identity of a file, as bytes that are equal exactly when the file is the same: mount, handle type, handle.
#[derive(Clone, Copy)]
pub(super) struct Key {
    len: usize,
    bytes: [u8; PREFIX + MAX_HANDLE],
    /// When the file was made, where the bytes alone may come again for another file. Directories have none: one that
    /// was made anew under an old number may pass for the old one, and a working directory had better not be lost.
    pub(super) birth: Option<Birth>,
}

/// Seconds and nanoseconds since 1970.
pub(super) type Birth = (i64, u32);

/// When a file was made, where the file system tells.
pub(super) fn birth_of(stx: &Statx) -> Option<Birth> {
    let known = StatxFlags::from_bits_retain(stx.stx_mask).contains(StatxFlags::BTIME);
    known.then_some((stx.stx_btime.tv_sec, stx.stx_btime.tv_nsec))
}

/// The type in a mode.
fn type_of(stx: &Statx) -> u16 {
    stx.stx_mode & 0o170000
}

impl Key {
    fn new(mount: u64, kind: i32, handle: &[u8]) -> Key {
        let mut bytes = [0; PREFIX + MAX_HANDLE];
        bytes[..8].copy_from_slice(&mount.to_ne_bytes());
        bytes[8..PREFIX].copy_from_slice(&kind.to_ne_bytes());
        let len = handle.len().min(MAX_HANDLE);
        bytes[PREFIX..PREFIX + len].copy_from_slice(&handle[..len]);
        Key { len: PREFIX + len, bytes, birth: None }
    }

    /// Whether it is a made-up handle without a generation.
    fn is_weak(&self) -> bool {
        let (prefix, handle) = self.as_bytes().split_at_checked(PREFIX).unwrap_or_default();
        prefix.ends_with(&INO64_GEN.to_ne_bytes()) && handle.len() == INO64_GEN_LEN && handle.ends_with(&[0; 4])
    }

    /// The key with all that statx(2) tells to make up for a generation.
    fn strengthened(&self, stx: &Statx) -> Key {
        let mut handle = [0; INO64_GEN_LEN + 2];
        let (number, kind) = handle.split_at_mut(INO64_GEN_LEN);
        number.copy_from_slice(&self.bytes[PREFIX..PREFIX + INO64_GEN_LEN]);
        kind.copy_from_slice(&type_of(stx).to_ne_bytes());
        let birth = if type_of(stx) == FileType::Directory.as_raw_mode() as u16 { None } else { birth_of(stx) };
        Key { birth, ..Key::new(mount_of(&self.bytes), INO64_GEN, &handle) }
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}

/// The mount that a key lies on.
pub(super) fn mount_of(key: &[u8]) -> u64 {
    key.first_chunk().map_or(0, |bytes| u64::from_ne_bytes(*bytes))
}

/// Gives files their keys.
pub(super) struct Identifier {
    /// Index into [`FLAGS`] of what this kernel takes.
    level: AtomicU32,
}

impl Identifier {
    pub(super) fn new() -> Identifier {
        Identifier { level: AtomicU32::new(0) }
    }

    /// The key of the file behind a descriptor. `stx`, when the caller has it, saves a call where there are no handles.
    pub(super) fn key(&self, fd: BorrowedFd<'_>, stx: Option<&Statx>) -> Result<Key, Errno> {
        loop {
            let level = self.level.load(Ordering::Relaxed);
            let flags = FLAGS.get(level as usize).copied().unwrap_or_default();
            match name_to_handle(fd, flags) {
                Ok(key) if key.is_weak() => {
                    return Ok(match stx {
                        Some(stx) => key.strengthened(stx),
                        None => key.strengthened(&stat(fd)?),
                    });
                }
                Ok(key) => return Ok(key),
                // An older kernel does not know the flag. Threads that race here all come to the same level.
                Err(Errno::INVAL) if (level as usize) + 1 < FLAGS.len() => {
                    let _ = self.level.compare_exchange(level, level + 1, Ordering::Relaxed, Ordering::Relaxed);
                }
                Err(Errno::OPNOTSUPP | Errno::OVERFLOW | Errno::INVAL | Errno::NOSYS | Errno::PERM) => {
                    return by_number(fd, stx);
                }
                Err(errno) => return Err(errno),
            }
        }
    }
}

/// name_to_handle_at(2) of a descriptor itself.
fn name_to_handle(fd: BorrowedFd<'_>, flags: u32) -> Result<Key, Errno> {
    let mut handle = RawHandle { bytes: MAX_HANDLE as u32, kind: 0, data: [0; MAX_HANDLE] };
    // The kernel writes an int, or with AT_HANDLE_MNT_ID_UNIQUE all 64 bits.
    let mut mount: u64 = 0;
    // SAFETY: the path is a NUL-terminated string; `handle` has room for as many bytes as its first field says;
    // `mount` has room for the larger of the two forms; all of them outlive the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_name_to_handle_at,
            fd.as_raw_fd(),
            c"".as_ptr(),
            &raw mut handle,
            &raw mut mount,
            flags | libc::AT_EMPTY_PATH as u32,
        )
    };
    if result != 0 {
        return Err(last_errno());
    }
    let data = handle.data.get(..handle.bytes as usize).ok_or(Errno::OVERFLOW)?;
    Ok(Key::new(mount, handle.kind, data))
}

/// The key of a file on a file system without handles.
fn by_number(fd: BorrowedFd<'_>, stx: Option<&Statx>) -> Result<Key, Errno> {
    let wanted = StatxFlags::BASIC_STATS | StatxFlags::BTIME | StatxFlags::MNT_ID;
    let stx = match stx {
        Some(stx) if StatxFlags::from_bits_retain(stx.stx_mask).contains(wanted) => *stx,
        _ => statx(fd, c"", AtFlags::EMPTY_PATH, wanted)?,
    };
    let mut data = [0; 32];
    data[..4].copy_from_slice(&stx.stx_dev_major.to_ne_bytes());
    data[4..8].copy_from_slice(&stx.stx_dev_minor.to_ne_bytes());
    data[8..16].copy_from_slice(&stx.stx_ino.to_ne_bytes());
    // The type and the birth time, where there is one, tell a file from an earlier one of the same number.
    data[16..18].copy_from_slice(&type_of(&stx).to_ne_bytes());
    if let Some((secs, nanos)) = birth_of(&stx) {
        data[18..26].copy_from_slice(&secs.to_ne_bytes());
        data[26..30].copy_from_slice(&nanos.to_ne_bytes());
    }
    Ok(Key::new(stx.stx_mnt_id, NO_HANDLE, &data))
}

/// An `O_PATH` descriptor of the file with that key, by open_by_handle_at(2). `mount` is any open file of its mount.
///
/// EPERM where this process may not, ESTALE where the file is gone, EOPNOTSUPP where handles cannot be opened.
pub(super) fn open_by_key(mount: BorrowedFd<'_>, key: &[u8]) -> Result<OwnedFd, Errno> {
    let kind = key.get(8..PREFIX).and_then(|bytes| bytes.first_chunk()).map_or(NO_HANDLE, |b| i32::from_ne_bytes(*b));
    let data = key.get(PREFIX..).unwrap_or_default();
    if kind == NO_HANDLE || data.len() > MAX_HANDLE {
        return Err(Errno::OPNOTSUPP);
    }
    let mut handle = RawHandle { bytes: data.len() as u32, kind, data: [0; MAX_HANDLE] };
    handle.data[..data.len()].copy_from_slice(data);
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    // SAFETY: `handle` holds as many bytes as its first field says, and outlives the call.
    let result = unsafe {
        libc::syscall(libc::SYS_open_by_handle_at, mount.as_raw_fd(), &raw mut handle, flags.bits() as libc::c_int)
    };
    if result < 0 {
        return Err(last_errno());
    }
    // SAFETY: the kernel has just made this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(result as i32) })
}

/// The errno of the last failed libc call of this thread.
pub(super) fn last_errno() -> Errno {
    std::io::Error::last_os_error().raw_os_error().map_or(Errno::IO, Errno::from_raw_os_error)
}
