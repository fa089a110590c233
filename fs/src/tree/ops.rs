//! The operations of the tree, as any front end (FUSE, 9P) asks for them.
//!
//! A front end turns bytes into an [`Op`], hands it to a [`Files`] with a [`Respond`], and turns the [`Answer`] into
//! bytes. Answers that are in memory come before [`Files::dispatch`] returns, on the same thread; the others come
//! later, from the thread that has them. `dispatch` itself never blocks.

use crate::errno::Errno;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// Number of a node, as the kernel holds it. The tree's root is [`ROOT`].
pub type NodeId = u64;

/// The root directory (FUSE_ROOT_ID).
pub const ROOT: NodeId = 1;

/// Who asks. All numbers are the host's.
#[derive(Clone, Copy, Debug, Default)]
pub struct Caller {
    /// Effective user.
    pub uid: u32,
    /// Effective group.
    pub gid: u32,
    /// Process (thread) that asks; 0 when it is not known.
    pub pid: u32,
}

/// A point in time: seconds since 1970, nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timestamp {
    /// Seconds since the epoch; may be negative.
    pub secs: i64,
    /// Nanoseconds, below 10⁹.
    pub nanos: u32,
}

impl From<SystemTime> for Timestamp {
    fn from(time: SystemTime) -> Self {
        match time.duration_since(SystemTime::UNIX_EPOCH) {
            Ok(after) => Timestamp { secs: after.as_secs() as i64, nanos: after.subsec_nanos() },
            Err(before) => Timestamp { secs: -(before.duration().as_secs() as i64) - 1, nanos: 0 },
        }
    }
}

/// Attributes of a node, as stat(2) shows them on the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attr {
    /// Inode number.
    pub ino: u64,
    /// Bytes.
    pub size: u64,
    /// Blocks of 512 bytes.
    pub blocks: u64,
    /// Last access.
    pub atime: Timestamp,
    /// Last change of the content.
    pub mtime: Timestamp,
    /// Last change of the inode.
    pub ctime: Timestamp,
    /// Type and permissions.
    pub mode: u32,
    /// Hard links.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// `major << 32 | minor`.
    pub rdev: u64,
    /// Preferred size of an operation, in bytes.
    pub blksize: u32,
}

/// What a lookup gives; the caller now holds the node once more.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// The node; 0 with a positive `entry_ttl` is "there is no such name, and that may be remembered".
    pub node: NodeId,
    /// Distinguishes files that had the same node number, one after the other.
    pub generation: u64,
    /// Its attributes.
    pub attr: Attr,
    /// How long the name may be remembered.
    pub entry_ttl: Duration,
    /// How long the attributes may be remembered.
    pub attr_ttl: Duration,
}

/// How an open file behaves; the meaning of the flags is that of FUSE's `FOPEN_…`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Opened {
    /// The tree's number for the open file.
    pub handle: u64,
    /// Reads and writes come here, not to the page cache.
    pub direct_io: bool,
    /// Pages of an earlier open are still right.
    pub keep_cache: bool,
    /// There is no offset: no lseek, and no lock on the file position.
    pub stream: bool,
    /// Several direct writes may run at once.
    pub parallel_direct_writes: bool,
    /// A listing may be kept by the kernel.
    pub cache_dir: bool,
    /// Closing needs no flush (nothing hangs on it).
    pub no_flush: bool,
}

/// A time to set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetTime {
    /// The clock of whoever keeps the file.
    Now,
    /// This time.
    At(Timestamp),
}

/// What setattr changes; `None` leaves it.
#[derive(Clone, Copy, Debug, Default)]
pub struct SetAttr {
    /// Permissions.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Size.
    pub size: Option<u64>,
    /// Access time.
    pub atime: Option<SetTime>,
    /// Modification time.
    pub mtime: Option<SetTime>,
    /// Clear set-user-id and set-group-id.
    pub kill_suidgid: bool,
}

/// A lock, as in fcntl(2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lock {
    /// First byte.
    pub start: u64,
    /// Last byte, inclusive.
    pub end: u64,
    /// `F_RDLCK`, `F_WRLCK` or `F_UNLCK`.
    pub kind: u32,
    /// Holder.
    pub pid: u32,
}

/// One entry of a directory listing.
#[derive(Clone, Debug)]
pub struct DirEntry {
    /// Name: bytes, not empty, no `/`, no NUL.
    pub name: Box<[u8]>,
    /// Inode number.
    pub ino: u64,
    /// `DT_…` of readdir(3).
    pub kind: u8,
    /// Where the listing goes on after this entry.
    pub cookie: u64,
    /// With a plus listing: the node, which the caller then holds once more.
    pub entry: Option<Entry>,
}

/// Figures of a file system, as in statvfs(3).
#[derive(Clone, Copy, Debug, Default)]
pub struct StatFs {
    /// Blocks in all, of `frsize` bytes.
    pub blocks: u64,
    /// Free blocks.
    pub bfree: u64,
    /// Free blocks for ordinary users.
    pub bavail: u64,
    /// Inodes in all.
    pub files: u64,
    /// Free inodes.
    pub ffree: u64,
    /// Preferred size of an operation.
    pub bsize: u32,
    /// Unit of the block counts.
    pub frsize: u32,
    /// Longest name.
    pub namelen: u32,
}

/// `poll(2)` bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ready(pub u32);

/// Wakes a poller, once: see [`Op::Poll`].
pub trait PollWaker: Send + Sync {
    /// Something may have become ready.
    fn wake(&self);
}

/// An operation. Borrowed names and data live in the front end's request buffer.
#[allow(missing_docs, reason = "fields are those of the system call each variant is named after")]
pub enum Op<'a> {
    Lookup {
        parent: NodeId,
        name: &'a [u8],
    },
    /// No answer is given to a forget; see [`Files::forget`].
    GetAttr {
        node: NodeId,
        handle: Option<u64>,
    },
    SetAttr {
        node: NodeId,
        handle: Option<u64>,
        set: SetAttr,
    },
    ReadLink {
        node: NodeId,
    },
    SymLink {
        parent: NodeId,
        name: &'a [u8],
        target: &'a [u8],
    },
    MkNod {
        parent: NodeId,
        name: &'a [u8],
        mode: u32,
        umask: u32,
        rdev: u64,
    },
    MkDir {
        parent: NodeId,
        name: &'a [u8],
        mode: u32,
        umask: u32,
    },
    Unlink {
        parent: NodeId,
        name: &'a [u8],
    },
    RmDir {
        parent: NodeId,
        name: &'a [u8],
    },
    Rename {
        parent: NodeId,
        name: &'a [u8],
        new_parent: NodeId,
        new_name: &'a [u8],
        flags: u32,
    },
    Link {
        node: NodeId,
        new_parent: NodeId,
        new_name: &'a [u8],
    },
    /// `flags` as in open(2).
    Open {
        node: NodeId,
        flags: u32,
        kill_suidgid: bool,
    },
    Create {
        parent: NodeId,
        name: &'a [u8],
        mode: u32,
        umask: u32,
        flags: u32,
    },
    TmpFile {
        parent: NodeId,
        mode: u32,
        umask: u32,
        flags: u32,
    },
    /// `owner` is the lock owner if the reader came by read(2) and not by the page cache (splice, sendfile, mmap).
    /// `flags` are those of the open file now (`O_NONBLOCK` may have changed).
    Read {
        node: NodeId,
        handle: u64,
        offset: u64,
        size: u32,
        flags: u32,
        owner: Option<u64>,
    },
    Write {
        node: NodeId,
        handle: u64,
        offset: u64,
        data: &'a [u8],
        flags: u32,
        owner: Option<u64>,
        kill_suidgid: bool,
    },
    Flush {
        node: NodeId,
        handle: u64,
        owner: u64,
    },
    /// The last descriptor of the open file is gone.
    Release {
        node: NodeId,
        handle: u64,
        owner: u64,
    },
    Fsync {
        node: NodeId,
        handle: u64,
        data_only: bool,
    },
    OpenDir {
        node: NodeId,
        flags: u32,
    },
    /// Entries that follow `cookie`; those whose sizes by `cost(name length)` fit in `max` together.
    ReadDir {
        node: NodeId,
        handle: u64,
        cookie: u64,
        max: usize,
        plus: bool,
        cost: fn(usize) -> usize,
    },
    ReleaseDir {
        node: NodeId,
        handle: u64,
    },
    FsyncDir {
        node: NodeId,
        handle: u64,
        data_only: bool,
    },
    StatFs {
        node: NodeId,
    },
    GetXattr {
        node: NodeId,
        name: &'a [u8],
        max: u32,
    },
    ListXattr {
        node: NodeId,
        max: u32,
    },
    SetXattr {
        node: NodeId,
        name: &'a [u8],
        value: &'a [u8],
        flags: u32,
    },
    RemoveXattr {
        node: NodeId,
        name: &'a [u8],
    },
    Fallocate {
        node: NodeId,
        handle: u64,
        offset: u64,
        len: u64,
        mode: u32,
    },
    Seek {
        node: NodeId,
        handle: u64,
        offset: u64,
        whence: u32,
    },
    CopyRange {
        from: NodeId,
        from_handle: u64,
        from_offset: u64,
        to: NodeId,
        to_handle: u64,
        to_offset: u64,
        len: u64,
    },
    GetLock {
        node: NodeId,
        handle: u64,
        owner: u64,
        lock: Lock,
    },
    SetLock {
        node: NodeId,
        handle: u64,
        owner: u64,
        lock: Lock,
        flock: bool,
        wait: bool,
    },
    /// Which of `events` are ready; with a waker, it is woken at the next change.
    Poll {
        node: NodeId,
        handle: u64,
        events: u32,
        waker: Option<Arc<dyn PollWaker>>,
    },
    SyncFs {
        node: NodeId,
    },
}

/// What an operation gives.
#[allow(missing_docs, reason = "named after the operations")]
#[derive(Debug)]
pub enum Answer {
    /// Done; nothing to say.
    Ok,
    Entry(Entry),
    Attr(Attr, Duration),
    Opened(Opened),
    Created(Entry, Opened),
    /// Bytes read, a link's target, an attribute's value.
    Data(Vec<u8>),
    /// Bytes written, or the size of an extended attribute when `max` was 0.
    Count(u32),
    Offset(u64),
    Dir(Vec<DirEntry>),
    StatFs(StatFs),
    Lock(Lock),
    Ready(Ready),
}

/// Ends a pending operation early: the caller does not want it any more (a signal). Must not block. The operation
/// is still answered exactly once: with EINTR, or with what it had come to (bytes taken are never lost).
pub trait Cancel: Send + Sync {
    /// Ask for the end.
    fn cancel(&self);
}

/// Where the answer goes: exactly one, through [`Respond::respond`]. A responder that is dropped unused answers EIO
/// and logs it as a defect.
pub trait Respond: Send {
    /// Gives the answer. May be called on any thread.
    fn respond(self: Box<Self>, answer: Result<Answer, Errno>);

    /// To be called once before an operation is left pending: what an interrupt of it calls. Returns `false` when
    /// the interrupt has already come; the operation should then be answered with EINTR at once where that is safe
    /// (`cancel` is not called for it any more).
    fn set_cancel(&mut self, cancel: Arc<dyn Cancel>) -> bool;
}

/// A responder on the heap, as it is kept while an operation is pending.
pub type Responder = Box<dyn Respond>;

/// What a front end serves.
pub trait Files: Send + Sync {
    /// Starts an operation; never blocks.
    fn dispatch(&self, caller: Caller, op: Op<'_>, responder: Responder);

    /// The front end gives up `count` holds on a node (from lookups, creations, plus listings). Never blocks.
    fn forget(&self, node: NodeId, count: u64);
}
