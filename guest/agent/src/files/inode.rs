//! Inode numbers for the host: 39 bits, made of the guest's device and inode numbers.
//!
//! The upper 7 bits are the device's index in order of first sight, the lower 32 the inode number. What does not fit
//! (inodes from 2^32 on, inode 0, devices after the 127th) shares the last index, where each file gets the next free
//! number and keeps it.

use parking_lot::{Mutex, RwLock};
use rustix::fs::fstatfs;
use std::collections::HashMap;
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::os::fd::BorrowedFd;

/// The device index of numbers that were handed out one by one.
const COUNTED: u64 = 127;
/// How many of those are remembered; the ones after are hashed, and may then meet.
const MAX_COUNTED: u64 = 4 << 20;
/// How many mounts are remembered to be steady or not.
const MAX_MOUNTS: usize = 4096;

/// File systems whose reads end only at the end of the file, by their number in statfs(2) (linux/magic.h). Others are
/// read until a read gives nothing.
const STEADY: [u64; 12] = [
    0xEF53,      // ext2, ext3, ext4
    0x5846_5342, // XFS
    0x9123_683E, // Btrfs
    0x0102_1994, // tmpfs
    0x8584_58F6, // ramfs
    0x794C_7630, // overlayfs
    0xE0F5_E1E2, // EROFS
    0x7371_7368, // squashfs
    0xF2F5_2010, // F2FS
    0xCA45_1A4E, // bcachefs
    0x4D44,      // FAT
    0x9660,      // ISO 9660
];

/// The numbers given so far.
pub(super) struct Inodes {
    devices: RwLock<HashMap<u64, u64>>,
    counted: Mutex<HashMap<(u64, u64), u64>>,
    steady: RwLock<HashMap<u64, bool>>,
    max_counted: u64,
}

impl Inodes {
    /// The device of the guest's root gets the index 0.
    pub(super) fn new(root_device: u64) -> Inodes {
        Inodes {
            devices: RwLock::new(HashMap::from([(root_device, 0)])),
            counted: Mutex::default(),
            steady: RwLock::default(),
            max_counted: MAX_COUNTED,
        }
    }

    /// The number of a file for the host; below [`machinefs_protocol::file::MAX_INO`].
    pub(super) fn number(&self, device: u64, ino: u64) -> u64 {
        if ino != 0
            && ino < 1 << 32
            && let Some(index) = self.index(device)
        {
            return index << 32 | ino;
        }
        COUNTED << 32 | self.count(device, ino)
    }

    fn index(&self, device: u64) -> Option<u64> {
        if let Some(&index) = self.devices.read().get(&device) {
            return Some(index);
        }
        let mut devices = self.devices.write();
        let next = devices.len() as u64;
        match devices.get(&device) {
            Some(&index) => Some(index),
            None if next < COUNTED => {
                devices.insert(device, next);
                Some(next)
            }
            None => None,
        }
    }

    fn count(&self, device: u64, ino: u64) -> u64 {
        let mut counted = self.counted.lock();
        if let Some(&number) = counted.get(&(device, ino)) {
            return number;
        }
        let next = counted.len() as u64 + 1;
        if next < self.max_counted {
            counted.insert((device, ino), next);
            return next;
        }
        let hash = BuildHasherDefault::<DefaultHasher>::default().hash_one((device, ino));
        self.max_counted + hash % ((1 << 32) - self.max_counted)
    }

    /// Whether a short read of a file on that mount means the end of the file. `fd` is any file on it.
    ///
    /// By mount, since a device number may be another file system's after an unmount.
    pub(super) fn is_steady(&self, mount: u64, fd: BorrowedFd<'_>) -> bool {
        if let Some(&steady) = self.steady.read().get(&mount) {
            return steady;
        }
        let Ok(figures) = fstatfs(fd) else { return false };
        let steady = STEADY.contains(&(figures.f_type as u64));
        let mut known = self.steady.write();
        if known.len() >= MAX_MOUNTS {
            known.clear();
        }
        known.insert(mount, steady);
        steady
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use machinefs_protocol::file::MAX_INO;
    use std::collections::HashSet;
    use std::os::fd::AsFd;

    #[test]
    fn numbers_are_distinct_and_stable() {
        let inodes = Inodes { max_counted: 1000, ..Inodes::new(7) };
        assert_eq!(inodes.number(7, 42), 42);
        let mut seen = HashSet::new();
        for device in 0..200 {
            for ino in [0, 1, 2, u64::from(u32::MAX), 1 << 32, u64::MAX] {
                let number = inodes.number(device, ino);
                assert!(number < MAX_INO && number != 0);
                assert!(seen.insert(number), "{device} {ino}");
                assert_eq!(inodes.number(device, ino), number);
            }
        }
    }

    #[test]
    fn past_the_bound_numbers_are_still_in_range_and_stable() {
        let inodes = Inodes { max_counted: 10, ..Inodes::new(0) };
        for ino in 0..100u64 {
            let number = inodes.number(0, (1 << 40) + ino);
            assert!((COUNTED << 32..MAX_INO).contains(&number));
            assert_eq!(inodes.number(0, (1 << 40) + ino), number);
        }
    }

    #[test]
    fn only_ordinary_file_systems_are_steady() {
        let inodes = Inodes::new(0);
        for (mount, path, steady) in [(1, "/proc/version", false), (2, "/sys/kernel", false), (3, "/dev/shm", true)] {
            let file = std::fs::File::open(path).unwrap();
            assert_eq!(inodes.is_steady(mount, file.as_fd()), steady, "{path}");
        }
    }
}
