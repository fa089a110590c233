//! The file service: the guest's file system as the host sees it.
//!
//! A *node* is the agent's number for one file of the guest, found by a lookup and held until it is forgotten as
//! often as it was looked up (as FUSE does it). Node [`ROOT`] is the guest's root and is never forgotten. A *file
//! handle* is the agent's number for an open file description. Both are only valid within one life of the agent.
//!
//! User and group numbers are the guest's: the host maps them.

use serde::{Deserialize, Serialize};

/// The node of the guest's root directory.
pub const ROOT: u64 = 1;
/// Node numbers stay below this (40 bits): the host packs them beside the machine's boot.
pub const MAX_NODE: u64 = 1 << 40;
/// [`Attr::ino`] stays below this (39 bits): the host packs it beside the machine's slot.
pub const MAX_INO: u64 = 1 << 39;

/// A point in time of a file: seconds since 1970 (may be negative) and nanoseconds below 10⁹.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Time {
    /// Seconds since the epoch.
    pub secs: i64,
    /// Nanoseconds within the second.
    pub nanos: u32,
}

/// The attributes of a node, as statx(2) gives them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attr {
    /// A number unique among the files of this guest, made of its device and inode; below [`MAX_INO`].
    pub ino: u64,
    /// Bytes.
    pub size: u64,
    /// Blocks of 512 bytes.
    pub blocks: u64,
    /// Last access.
    pub atime: Time,
    /// Last change of the content.
    pub mtime: Time,
    /// Last change of the inode.
    pub ctime: Time,
    /// Type and permissions (`S_IFMT` and the rest), see inode(7).
    pub mode: u32,
    /// Hard links.
    pub nlink: u32,
    /// Owner, in the guest.
    pub uid: u32,
    /// Group, in the guest.
    pub gid: u32,
    /// The device this node stands for: `major << 32 | minor`.
    pub rdev: u64,
    /// Preferred size of an operation, in bytes.
    pub blksize: u32,
}

/// What a lookup gives: a node, which the host now holds once more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The node's number; below [`MAX_NODE`].
    pub node: u64,
    /// Distinguishes files that had the same number, one after the other.
    pub generation: u64,
    /// Its attributes.
    pub attr: Attr,
}

/// A time to set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SetTime {
    /// The guest's clock.
    Now,
    /// This time.
    At(Time),
}

/// What to change of a node; `None` leaves it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetAttr {
    /// Permissions.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Truncate or extend to this size.
    pub size: Option<u64>,
    /// Access time.
    pub atime: Option<SetTime>,
    /// Modification time.
    pub mtime: Option<SetTime>,
    /// Clear the set-user-id and set-group-id bits (FUSE_HANDLE_KILLPRIV_V2).
    pub kill_suidgid: bool,
}

/// Who asks for a new file: it will belong to them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// User, in the guest.
    pub uid: u32,
    /// Group, in the guest.
    pub gid: u32,
}

/// A byte-range or whole-file lock, as in fcntl(2) and flock(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lock {
    /// First byte.
    pub start: u64,
    /// Last byte, inclusive; `u64::MAX` (or `i64::MAX`) is the end of the file.
    pub end: u64,
    /// `F_RDLCK` 0, `F_WRLCK` 1, `F_UNLCK` 2.
    pub kind: u32,
    /// The holder (answers only; 0 where it is not known).
    pub pid: u32,
}

/// One entry of a directory page. The page is a run of these, postcard-encoded, in the reply's body.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirEntry<'a> {
    /// Where the listing goes on after this entry.
    pub cookie: u64,
    /// As in [`Attr::ino`].
    pub ino: u64,
    /// `DT_…` of readdir(3).
    pub kind: u8,
    /// The name: 1 to 255 bytes, no `/`, no NUL. `.` and `..` are in the listing too, without an entry.
    #[serde(borrow, with = "serde_bytes")]
    pub name: &'a [u8],
    /// Present when attributes were asked for and could be had: the node is then held once more.
    pub entry: Option<Entry>,
}

/// A page of a directory; its entries are in the body.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirPage {
    /// How many entries the body holds.
    pub count: u32,
    /// Nothing comes after this page.
    pub end: bool,
}

/// Figures of a file system, as in statvfs(3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatFs {
    /// Blocks in all, of [`StatFs::frsize`] bytes.
    pub blocks: u64,
    /// Free blocks.
    pub bfree: u64,
    /// Free blocks for ordinary users.
    pub bavail: u64,
    /// Inodes in all.
    pub files: u64,
    /// Free inodes.
    pub ffree: u64,
    /// Preferred size of an operation, in bytes.
    pub bsize: u32,
    /// Unit of the block counts, in bytes.
    pub frsize: u32,
    /// Longest name, in bytes.
    pub namelen: u32,
}

/// An operation on the guest's files. Names are single components, without `/` or NUL, neither empty nor `.` or `..`
/// (except in [`FileRequest::Lookup`], where `..` is not allowed either: the host resolves it).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileRequest<'a> {
    /// Finds a name. Answer: [`FileReply::Entry`].
    Lookup {
        /// The directory.
        parent: u64,
        /// The name.
        #[serde(borrow, with = "serde_bytes")]
        name: &'a [u8],
    },
    /// Answer: [`FileReply::Attr`].
    GetAttr {
        /// The node.
        node: u64,
        /// An open handle of it, when the host has one (a deleted file has nothing else).
        fh: Option<u64>,
    },
    /// Answer: [`FileReply::Attr`].
    SetAttr {
        /// The node.
        node: u64,
        /// An open handle of it.
        fh: Option<u64>,
        /// What to change.
        set: SetAttr,
    },
    /// Answer: [`FileReply::Data`], the target in the body.
    ReadLink {
        /// The symlink.
        node: u64,
    },
    /// Answer: [`FileReply::Entry`].
    SymLink {
        /// The directory.
        parent: u64,
        /// The new name.
        #[serde(borrow, with = "serde_bytes")]
        name: &'a [u8],
        /// What it points to.
        #[serde(borrow, with = "serde_bytes")]
        target: &'a [u8],
        /// Whom it belongs to.
        owner: Owner,
    },
    /// Makes a file of any type but directory. Answer: [`FileReply::Entry`].
    MkNod {
        /// The directory.
        parent: u64,
        /// The new name.
        #[serde(borrow, with = "serde_bytes")]
        name: &'a [u8],
        /// Type and permissions, before the umask.
        mode: u32,
        /// The caller's umask (a default ACL of the directory overrides it).
        umask: u32,
        /// `major << 32 | minor`.
        rdev: u64,
        /// Whom it belongs to.
        owner: Owner,
    },
    /// Answer: [`FileReply::Entry`].
    MkDir {
        /// The directory.
        parent: u64,
        /// The new name.
        #[serde(borrow, with = "serde_bytes")]
        name: &'a [u8],
        /// Permissions, before the umask.
        mode: u32,
        /// The caller's umask.
        umask: u32,
        /// Whom it belongs to.
        owner: Owner,
    },
    /// Answer: [`FileReply::Ok`].
    Unlink {
        /// The directory.
        parent: u64,
        /// The name.
        #[serde(borrow, with = "serde_bytes")]
        name: &'a [u8],
    },
    /// Answer: [`FileReply::Ok`].
    RmDir {
        /// The directory.
        parent: u64,
        /// The name.
        #[serde(borrow, with = "serde_bytes")]
        name: &'a [u8],
    },
    /// renameat2(2). Answer: [`FileReply::Ok`].
    Rename {
        /// The directory it is in.
        parent: u64,
        /// Its name there.
        #[serde(borrow, with = "serde_bytes")]
        name: &'a [u8],
        /// The directory it goes to.
        new_parent: u64,
        /// Its name there.
        #[serde(borrow, with = "serde_bytes")]
        new_name: &'a [u8],
        /// `RENAME_NOREPLACE` 1, `RENAME_EXCHANGE` 2, `RENAME_WHITEOUT` 4.
        flags: u32,
    },
    /// A hard link. Answer: [`FileReply::Entry`].
    Link {
        /// The file.
        node: u64,
        /// The directory of the new name.
        new_parent: u64,
        /// The new name.
        #[serde(borrow, with = "serde_bytes")]
        new_name: &'a [u8],
    },
    /// Answer: [`FileReply::Opened`].
    Open {
        /// The file.
        node: u64,
        /// `O_…` flags of open(2), Linux x86-64 numbers; `O_CREAT`, `O_EXCL`, `O_NOCTTY` are ignored.
        flags: u32,
        /// Clear set-user-id and set-group-id when truncating.
        kill_suidgid: bool,
    },
    /// Creates (or opens, without `O_EXCL`) and opens. Answer: [`FileReply::Created`].
    Create {
        /// The directory.
        parent: u64,
        /// The name.
        #[serde(borrow, with = "serde_bytes")]
        name: &'a [u8],
        /// Permissions, before the umask.
        mode: u32,
        /// The caller's umask.
        umask: u32,
        /// `O_…` flags of open(2).
        flags: u32,
        /// Whom a new file belongs to.
        owner: Owner,
    },
    /// `O_TMPFILE`. Answer: [`FileReply::Created`].
    TmpFile {
        /// The directory.
        parent: u64,
        /// Permissions, before the umask.
        mode: u32,
        /// The caller's umask.
        umask: u32,
        /// `O_…` flags of open(2).
        flags: u32,
        /// Whom it belongs to.
        owner: Owner,
    },
    /// Answer: [`FileReply::Data`], the bytes in the body; fewer than asked means the end.
    Read {
        /// The open file.
        fh: u64,
        /// From which byte on.
        offset: u64,
        /// How many bytes at most; at most 1 MiB.
        size: u32,
    },
    /// The bytes are in the body. Answer: [`FileReply::Count`].
    Write {
        /// The open file.
        fh: u64,
        /// To which byte on; ignored for a file opened with `O_APPEND`.
        offset: u64,
        /// Clear set-user-id and set-group-id.
        kill_suidgid: bool,
    },
    /// A descriptor of the file was closed: POSIX locks of the owner end. Answer: [`FileReply::Ok`].
    Flush {
        /// The open file.
        fh: u64,
        /// The lock owner.
        owner: u64,
    },
    /// fsync(2), fdatasync(2); also of directories. Answer: [`FileReply::Ok`].
    Fsync {
        /// The open file or directory.
        fh: u64,
        /// Data only.
        data_only: bool,
    },
    /// Opens a directory and gives its first page with it. Answer: [`FileReply::OpenedDir`].
    OpenDir {
        /// The directory.
        node: u64,
        /// Bytes of entries at most.
        max: u32,
        /// With attributes (and nodes held).
        plus: bool,
    },
    /// The page after that cookie (0: the beginning). Answer: [`FileReply::Dir`].
    ReadDir {
        /// The open directory.
        fh: u64,
        /// Where to go on.
        cookie: u64,
        /// Bytes of entries at most; at most 256 KiB.
        max: u32,
        /// With attributes (and nodes held).
        plus: bool,
    },
    /// Answer: [`FileReply::StatFs`].
    StatFs {
        /// A node on it.
        node: u64,
    },
    /// Answer: [`FileReply::Data`]. ERANGE when the value is over `max`; `max` 0 asks for the size: [`FileReply::Count`].
    GetXattr {
        /// The node.
        node: u64,
        /// The attribute's name, with its namespace.
        #[serde(borrow, with = "serde_bytes")]
        name: &'a [u8],
        /// Bytes at most.
        max: u32,
    },
    /// As [`FileRequest::GetXattr`], the names each ended by NUL.
    ListXattr {
        /// The node.
        node: u64,
        /// Bytes at most.
        max: u32,
    },
    /// The value is in the body. Answer: [`FileReply::Ok`].
    SetXattr {
        /// The node.
        node: u64,
        /// The attribute's name.
        #[serde(borrow, with = "serde_bytes")]
        name: &'a [u8],
        /// `XATTR_CREATE` 1, `XATTR_REPLACE` 2.
        flags: u32,
    },
    /// Answer: [`FileReply::Ok`].
    RemoveXattr {
        /// The node.
        node: u64,
        /// The attribute's name.
        #[serde(borrow, with = "serde_bytes")]
        name: &'a [u8],
    },
    /// fallocate(2). Answer: [`FileReply::Ok`].
    Fallocate {
        /// The open file.
        fh: u64,
        /// From which byte on.
        offset: u64,
        /// How many bytes.
        len: u64,
        /// `FALLOC_FL_…`.
        mode: u32,
    },
    /// `SEEK_DATA` 3 and `SEEK_HOLE` 4 of lseek(2). Answer: [`FileReply::Offset`].
    Seek {
        /// The open file.
        fh: u64,
        /// From which byte on.
        offset: u64,
        /// 3 or 4.
        whence: u32,
    },
    /// copy_file_range(2) within the guest. Answer: [`FileReply::Count`].
    CopyRange {
        /// From this open file.
        from: u64,
        /// From this byte on.
        from_offset: u64,
        /// To this open file.
        to: u64,
        /// To this byte on.
        to_offset: u64,
        /// How many bytes at most.
        len: u64,
    },
    /// Who holds a lock that conflicts with this one. Answer: [`FileReply::Lock`].
    GetLock {
        /// The open file.
        fh: u64,
        /// The lock owner.
        owner: u64,
        /// The lock.
        lock: Lock,
    },
    /// Takes or gives up a lock. EAGAIN when it is taken and `wait` is false. Answer: [`FileReply::Ok`].
    SetLock {
        /// The open file.
        fh: u64,
        /// The lock owner.
        owner: u64,
        /// The lock.
        lock: Lock,
        /// flock(2), not fcntl(2).
        flock: bool,
        /// Wait until it is free (no deadline; ends on a cancel).
        wait: bool,
    },
    /// syncfs(2) of the root. Answer: [`FileReply::Ok`].
    SyncFs,
}

/// The answer to a [`FileRequest`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileReply {
    /// Done.
    Ok,
    /// A node.
    Entry(Entry),
    /// Attributes.
    Attr(Attr),
    /// The bytes are in the body.
    Data,
    /// A number of bytes (written, copied, or the size of an attribute).
    Count(u32),
    /// A place in the file.
    Offset(u64),
    /// An open file: its handle.
    Opened(u64),
    /// A new and open file: its node and handle.
    Created(Entry, u64),
    /// An open directory: its handle and the first page.
    OpenedDir(u64, DirPage),
    /// A page of a directory.
    Dir(DirPage),
    /// Figures of the file system.
    StatFs(StatFs),
    /// The conflicting lock, or one of kind `F_UNLCK`.
    Lock(Lock),
}
