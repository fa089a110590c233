//! Locks against other owners and against processes of the guest.

use super::*;
use machinefs_protocol::file::Lock;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const READ: u32 = 0;
const WRITE: u32 = 1;
const UNLOCK: u32 = 2;
const END: u64 = i64::MAX as u64;

struct Flag(AtomicBool);

impl Cancelled for Flag {
    fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

fn lock_in(guest: &Guest, fh: u64, owner: u64, kind: u32, range: (u64, u64)) -> Result<(), FileError> {
    let lock = Lock { start: range.0, end: range.1, kind, pid: 0 };
    guest.ok(FileRequest::SetLock { fh, owner, lock, flock: false, wait: false })
}

fn conflict(guest: &Guest, fh: u64, owner: u64, kind: u32, range: (u64, u64)) -> Lock {
    let lock = Lock { start: range.0, end: range.1, kind, pid: 0 };
    match guest.call(FileRequest::GetLock { fh, owner, lock }).unwrap().0 {
        FileReply::Lock(lock) => lock,
        other => panic!("{other:?}"),
    }
}

/// What a process of the guest would meet: a lock of its own on the same file.
fn outside_lock(file: &std::fs::File, kind: libc::c_int) -> bool {
    let lock = libc::flock { l_type: kind as _, l_whence: libc::SEEK_SET as _, l_start: 0, l_len: 0, l_pid: 0 };
    // SAFETY: the pointer is to a live `struct flock`.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) == 0 }
}

#[test]
fn posix_locks_belong_to_owners() {
    let guest = Guest::new();
    let (entry, fh) = guest.create(ROOT, "file", O_RDWR).unwrap();
    let second = guest.open(entry.node, O_RDWR).unwrap();
    lock_in(&guest, fh, 1, WRITE, (0, 99)).unwrap();
    // The same owner meets no lock of its own, through whichever handle.
    lock_in(&guest, second, 1, WRITE, (50, 149)).unwrap();
    assert_eq!(errno(lock_in(&guest, fh, 2, WRITE, (149, 149))), Errno::AGAIN);
    assert_eq!(errno(lock_in(&guest, fh, 2, READ, (0, 0))), Errno::AGAIN);
    lock_in(&guest, fh, 2, WRITE, (150, END)).unwrap();
    assert_eq!(conflict(&guest, fh, 2, READ, (0, END)), Lock { start: 0, end: 149, kind: WRITE, pid: 0 });
    assert_eq!(conflict(&guest, fh, 3, WRITE, (200, 300)), Lock { start: 150, end: END, kind: WRITE, pid: 0 });
    assert_eq!(conflict(&guest, fh, 1, WRITE, (0, 149)).kind, UNLOCK);
    lock_in(&guest, fh, 1, UNLOCK, (10, 19)).unwrap();
    lock_in(&guest, fh, 2, READ, (10, 19)).unwrap();
    assert_eq!(errno(lock_in(&guest, fh, 2, READ, (9, 9))), Errno::AGAIN);
    // Any close by the owner ends them all.
    guest.ok(FileRequest::Flush { fh: second, owner: 1 }).unwrap();
    lock_in(&guest, fh, 2, WRITE, (0, u64::MAX)).unwrap();
    assert_eq!(errno(lock_in(&guest, fh, 1, READ, (0, 0))), Errno::AGAIN);
    for (kind, range) in [(3, (0, 1)), (READ, (5, 4)), (READ, (u64::MAX, u64::MAX))] {
        assert_eq!(errno(lock_in(&guest, fh, 1, kind, range)), Errno::INVAL);
    }
}

#[test]
fn locks_exclude_processes_of_the_guest() {
    let guest = Guest::new();
    let (entry, fh) = guest.create(ROOT, "file", O_RDWR).unwrap();
    let outside = std::fs::File::options().read(true).write(true).open(guest.path("file")).unwrap();
    assert!(outside_lock(&outside, libc::F_WRLCK));
    assert_eq!(errno(lock_in(&guest, fh, 1, READ, (0, 0))), Errno::AGAIN);
    assert_eq!(conflict(&guest, fh, 1, READ, (5, 5)), Lock { start: 0, end: END, kind: WRITE, pid: 0 });
    assert!(outside_lock(&outside, libc::F_UNLCK));
    lock_in(&guest, fh, 1, READ, (0, 0)).unwrap();
    assert!(!outside_lock(&outside, libc::F_WRLCK));
    // The last close ends what was never unlocked, whoever owned it.
    let second = guest.open(entry.node, O_RDONLY).unwrap();
    lock_in(&guest, second, 7, READ, (0, 0)).unwrap();
    guest.service.release(fh, 1);
    assert!(!outside_lock(&outside, libc::F_WRLCK));
    guest.service.release(second, 99);
    assert!(outside_lock(&outside, libc::F_WRLCK));
}

#[test]
fn read_locks_move_to_a_writable_descriptor() {
    let guest = Guest::new();
    let file = guest.file(ROOT, "file", b"");
    let read_only = guest.open(file.node, O_RDONLY).unwrap();
    lock_in(&guest, read_only, 1, READ, (0, 9)).unwrap();
    lock_in(&guest, read_only, 1, READ, (20, 29)).unwrap();
    lock_in(&guest, read_only, 1, UNLOCK, (5, 9)).unwrap();
    let writable = guest.open(file.node, O_RDWR).unwrap();
    lock_in(&guest, writable, 1, WRITE, (22, 23)).unwrap();
    let expect = [(0, READ), (4, READ), (5, UNLOCK), (20, READ), (22, WRITE), (24, READ), (30, UNLOCK)];
    for (byte, kind) in expect {
        assert_eq!(conflict(&guest, writable, 2, WRITE, (byte, byte)).kind, kind, "{byte}");
    }
}

#[test]
fn flock_belongs_to_the_handle() {
    let guest = Guest::new();
    let (entry, fh) = guest.create(ROOT, "file", O_RDWR).unwrap();
    let second = guest.open(entry.node, O_RDWR).unwrap();
    let flock = |fh, kind| {
        let lock = Lock { start: 0, end: END, kind, pid: 0 };
        guest.ok(FileRequest::SetLock { fh, owner: 1, lock, flock: true, wait: false })
    };
    flock(fh, READ).unwrap();
    flock(second, READ).unwrap();
    assert_eq!(errno(flock(second, WRITE)), Errno::AGAIN);
    flock(fh, UNLOCK).unwrap();
    flock(second, WRITE).unwrap();
    assert_eq!(errno(flock(fh, READ)), Errno::AGAIN);
    guest.service.release(second, 1);
    flock(fh, WRITE).unwrap();
    assert_eq!(errno(flock(fh, 9)), Errno::INVAL);
}

#[test]
fn waiting_ends_with_the_lock_or_with_a_cancel() {
    let guest = Guest::new();
    let (entry, fh) = guest.create(ROOT, "file", O_RDWR).unwrap();
    let second = guest.open(entry.node, O_RDWR).unwrap();
    for flock in [false, true] {
        let lock = Lock { start: 0, end: END, kind: WRITE, pid: 0 };
        let take = |fh, owner, cancel: &dyn Cancelled| {
            let request = FileRequest::SetLock { fh, owner, lock, flock, wait: true };
            guest.service.handle(&request, &[], cancel)
        };
        take(fh, 1, &Never).unwrap();
        let cancel = Flag(AtomicBool::new(false));
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| take(second, 2, &cancel));
            std::thread::sleep(Duration::from_millis(60));
            assert!(!waiter.is_finished());
            cancel.0.store(true, Ordering::Relaxed);
            assert_eq!(errno(waiter.join().unwrap()), Errno::INTR);
            let waiter = scope.spawn(|| take(second, 2, &Never));
            std::thread::sleep(Duration::from_millis(60));
            assert!(!waiter.is_finished());
            let unlock = Lock { kind: UNLOCK, ..lock };
            guest.ok(FileRequest::SetLock { fh, owner: 1, lock: unlock, flock, wait: false }).unwrap();
            waiter.join().unwrap().unwrap();
        });
        let unlock = Lock { kind: UNLOCK, ..lock };
        guest.ok(FileRequest::SetLock { fh: second, owner: 2, lock: unlock, flock, wait: false }).unwrap();
    }
}
