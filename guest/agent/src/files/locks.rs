//! Locks, taken in the guest's kernel, so that processes of host and guest exclude each other.
//!
//! A POSIX lock belongs to a process and a file. Here it is an open file description lock (fcntl(2)) on a descriptor
//! of its own for each pair of file and owner, which goes when that owner closes any descriptor of the file. A
//! flock(2) lock belongs to the open file, and is taken on the handle's descriptor.

use super::open::OpenFile;
use super::{Cancelled, FileService};
use machinefs_protocol::file::Lock;
use parking_lot::Mutex;
use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::io::Errno;
use std::collections::HashMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Kinds of locks in the protocol, which are Linux's numbers.
const F_RDLCK: u32 = 0;
const F_WRLCK: u32 = 1;
const F_UNLCK: u32 = 2;

/// The longest pause between two attempts at something another holds.
const LONGEST_PAUSE: Duration = Duration::from_millis(20);

/// Repeats what fails with EAGAIN, with growing pauses, up to so many times. EINTR when cancelled in between.
///
/// Waiting in the kernel would need a signal to end, which can come just before the wait begins.
pub(super) fn wait_for<T>(
    cancel: &dyn Cancelled,
    attempts: u32,
    mut attempt: impl FnMut() -> Result<T, Errno>,
) -> Result<T, Errno> {
    let mut pause = Duration::from_micros(500);
    let mut left = attempts;
    loop {
        match attempt() {
            Err(Errno::AGAIN) if left > 1 => {
                if cancel.is_cancelled() {
                    return Err(Errno::INTR);
                }
                std::thread::sleep(pause);
                pause = (pause * 2).min(LONGEST_PAUSE);
                // The count of waits without an end does not run out.
                left = if left == u32::MAX { left } else { left - 1 };
            }
            result => return result,
        }
    }
}

/// The descriptors that POSIX locks are on, by node and owner.
#[derive(Default)]
pub(super) struct LockTable {
    files: Mutex<HashMap<u64, OwnerFiles>>,
}

/// The owners that hold locks on a file, each with its descriptor.
type OwnerFiles = Vec<(u64, Arc<LockFile>)>;

/// What the POSIX locks of one owner on one file are on.
struct LockFile {
    fd: OwnedFd,
    writable: bool,
    /// On a descriptor that is not writable: the ranges that are locked, for another one to take over.
    read_ranges: Mutex<Vec<(i64, i64)>>,
}

impl LockTable {
    fn get(&self, node: u64, owner: u64) -> Option<Arc<LockFile>> {
        let files = self.files.lock();
        files.get(&node)?.iter().find(|(other, _)| *other == owner).map(|(_, file)| file.clone())
    }

    /// Adds the owner's descriptor, unless another worker was faster; with `over`, in the place of that one.
    fn add(&self, node: u64, owner: u64, file: LockFile, over: Option<&Arc<LockFile>>) -> Arc<LockFile> {
        let mut files = self.files.lock();
        let owners = files.entry(node).or_default();
        let file = Arc::new(file);
        match owners.iter_mut().find(|(other, _)| *other == owner) {
            Some((_, present)) if over.is_some_and(|over| Arc::ptr_eq(over, present)) => {
                *present = file.clone();
                file
            }
            Some((_, present)) => present.clone(),
            None => {
                owners.push((owner, file.clone()));
                file
            }
        }
    }

    /// Ends all locks of that owner on that node.
    pub(super) fn drop_owner(&self, node: u64, owner: u64) {
        let mut files = self.files.lock();
        let Some(owners) = files.get_mut(&node) else { return };
        let gone: Vec<_> = owners.extract_if(.., |(other, _)| *other == owner).collect();
        if owners.is_empty() {
            files.remove(&node);
        }
        drop(files);
        end_all(gone);
    }

    /// Ends all locks on that node.
    pub(super) fn drop_node(&self, node: u64) {
        let gone = self.files.lock().remove(&node);
        end_all(gone.unwrap_or_default());
    }

    pub(super) fn clear(&self) {
        let gone = std::mem::take(&mut *self.files.lock());
        gone.into_values().for_each(end_all);
    }
}

/// Unlocks explicitly: another worker may keep a descriptor open for a moment longer.
fn end_all(files: OwnerFiles) {
    for (_, file) in files {
        let _ = fcntl_lock(&file.fd, libc::F_OFD_SETLK, &mut range(F_UNLCK, 0, i64::MAX));
    }
}

/// The kernel's form of a lock on the bytes `start..=end`.
fn range(kind: u32, start: i64, end: i64) -> libc::flock {
    let l_type = match kind {
        F_RDLCK => libc::F_RDLCK,
        F_WRLCK => libc::F_WRLCK,
        _ => libc::F_UNLCK,
    };
    // A length of 0 is "to the end, wherever that goes".
    let l_len = if end == i64::MAX { 0 } else { end - start + 1 };
    libc::flock { l_type: l_type as _, l_whence: libc::SEEK_SET as _, l_start: start, l_len, l_pid: 0 }
}

/// First and last byte, as the kernel counts; EINVAL for what is no range or no kind of lock.
fn bounds(lock: &Lock) -> Result<(i64, i64), Errno> {
    let start = i64::try_from(lock.start).map_err(|_| Errno::INVAL)?;
    let end = i64::try_from(lock.end).unwrap_or(i64::MAX);
    if end < start || lock.kind > F_UNLCK { Err(Errno::INVAL) } else { Ok((start, end)) }
}

fn fcntl_lock(fd: &OwnedFd, command: libc::c_int, lock: &mut libc::flock) -> Result<(), Errno> {
    // SAFETY: the command takes a pointer to a `struct flock`, which outlives the call.
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), command, std::ptr::from_mut(lock)) };
    match result {
        0.. => Ok(()),
        // POSIX leaves the choice between the two.
        _ => Err(match super::identity::last_errno() {
            Errno::ACCESS => Errno::AGAIN,
            errno => errno,
        }),
    }
}

/// Cuts the bytes `start..=end` out of ranges.
fn cut_out(ranges: &mut Vec<(i64, i64)>, start: i64, end: i64) {
    let old = std::mem::take(ranges);
    for (first, last) in old {
        if last < start || first > end {
            ranges.push((first, last));
            continue;
        }
        if first < start {
            ranges.push((first, start - 1));
        }
        if last > end {
            ranges.push((end + 1, last));
        }
    }
}

impl FileService {
    pub(super) fn get_lock(&self, fh: u64, owner: u64, lock: &Lock) -> Result<Lock, Errno> {
        let file = self.file(fh)?;
        let (start, end) = bounds(lock)?;
        if lock.kind == F_UNLCK {
            return Err(Errno::INVAL);
        }
        let mut found = range(lock.kind, start, end);
        // Asked through the owner's own descriptor, its own locks do not count. Without one it has none.
        match self.locks.get(file.node.id, owner) {
            Some(own) => fcntl_lock(&own.fd, libc::F_OFD_GETLK, &mut found)?,
            None => fcntl_lock(&file.fd, libc::F_OFD_GETLK, &mut found)?,
        }
        let kind = match libc::c_int::from(found.l_type) {
            libc::F_RDLCK => F_RDLCK,
            libc::F_WRLCK => F_WRLCK,
            _ => return Ok(Lock { kind: F_UNLCK, pid: 0, ..*lock }),
        };
        let last = if found.l_len == 0 { i64::MAX } else { found.l_start.saturating_add(found.l_len - 1) };
        Ok(Lock {
            start: found.l_start.try_into().unwrap_or(0),
            end: last.try_into().unwrap_or(i64::MAX as u64),
            kind,
            // -1 for a lock that belongs to an open file.
            pid: found.l_pid.try_into().unwrap_or(0),
        })
    }

    pub(super) fn set_lock(
        &self,
        fh: u64,
        owner: u64,
        lock: &Lock,
        wait: bool,
        cancel: &dyn Cancelled,
    ) -> Result<(), Errno> {
        let file = self.file(fh)?;
        let (start, end) = bounds(lock)?;
        let locks = match self.locks.get(file.node.id, owner) {
            Some(locks) if lock.kind != F_WRLCK || locks.writable => locks,
            Some(locks) => self.upgrade(&file, owner, &locks)?,
            None if lock.kind == F_UNLCK => return Ok(()),
            None => {
                // Writable only when the handle is: opening for writing copies a file up from an overlay's lower layer.
                let opened = self.lock_file(&file, file.writable)?;
                self.locks.add(file.node.id, owner, opened, None)
            }
        };
        wait_for(cancel, if wait { u32::MAX } else { 1 }, || {
            fcntl_lock(&locks.fd, libc::F_OFD_SETLK, &mut range(lock.kind, start, end))
        })?;
        if !locks.writable {
            let mut ranges = locks.read_ranges.lock();
            cut_out(&mut ranges, start, end);
            if lock.kind == F_RDLCK {
                ranges.push((start, end));
            }
        }
        Ok(())
    }

    fn lock_file(&self, file: &OpenFile, writable: bool) -> Result<LockFile, Errno> {
        let access = if writable { OFlags::RDWR } else { OFlags::RDONLY };
        let fd = self.reopen(&file.fd, access | OFlags::NONBLOCK)?;
        Ok(LockFile { fd, writable, read_ranges: Mutex::default() })
    }

    /// Moves an owner's read locks to a descriptor that can take write locks too. Read locks of two descriptors do
    /// not exclude each other, so that nobody can come in between.
    fn upgrade(&self, file: &OpenFile, owner: u64, old: &Arc<LockFile>) -> Result<Arc<LockFile>, Errno> {
        let new = self.lock_file(file, true)?;
        let ranges = old.read_ranges.lock().clone();
        for (start, end) in ranges {
            fcntl_lock(&new.fd, libc::F_OFD_SETLK, &mut range(F_RDLCK, start, end))?;
        }
        let new = self.locks.add(file.node.id, owner, new, Some(old));
        fcntl_lock(&old.fd, libc::F_OFD_SETLK, &mut range(F_UNLCK, 0, i64::MAX))?;
        Ok(new)
    }

    /// flock(2) on the handle itself.
    pub(super) fn set_flock(&self, fh: u64, kind: u32, wait: bool, cancel: &dyn Cancelled) -> Result<(), Errno> {
        let file = self.file(fh)?;
        let operation = match kind {
            F_RDLCK => FlockOperation::NonBlockingLockShared,
            F_WRLCK => FlockOperation::NonBlockingLockExclusive,
            F_UNLCK => FlockOperation::NonBlockingUnlock,
            _ => return Err(Errno::INVAL),
        };
        file.flocked.store(true, Ordering::Relaxed);
        wait_for(cancel, if wait { u32::MAX } else { 1 }, || flock(&file.fd, operation))
    }

    /// A descriptor of the file was closed on the host: POSIX has all locks of that owner on it end.
    pub(super) fn flush(&self, fh: u64, owner: u64) -> Result<(), Errno> {
        let file = self.file(fh)?;
        self.locks.drop_owner(file.node.id, owner);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_cut() {
        let mut ranges = vec![(0, 9), (20, i64::MAX)];
        cut_out(&mut ranges, 5, 24);
        assert_eq!(ranges, [(0, 4), (25, i64::MAX)]);
        cut_out(&mut ranges, 2, 2);
        assert_eq!(ranges, [(0, 1), (3, 4), (25, i64::MAX)]);
        cut_out(&mut ranges, 0, i64::MAX);
        assert_eq!(ranges, []);
    }

    #[test]
    fn bounds_are_checked() {
        let lock = |start, end, kind| bounds(&Lock { start, end, kind, pid: 0 });
        assert_eq!(lock(0, u64::MAX, 1), Ok((0, i64::MAX)));
        assert_eq!(lock(5, i64::MAX as u64, 0), Ok((5, i64::MAX)));
        for (start, end, kind) in [(6, 5, 0), (u64::MAX, u64::MAX, 0), (0, 1, 3)] {
            assert_eq!(lock(start, end, kind), Err(Errno::INVAL));
        }
    }
}
