//! The kernel's FUSE protocol as bytes: opcodes, flags and structures of `include/uapi/linux/fuse.h`, ABI 7.45
//! (Linux 6.18). All numbers are in the machine's own byte order.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Major version of the protocol.
pub const MAJOR: u32 = 7;
/// Newest minor version that this code knows.
pub const MINOR: u32 = 45;
/// First minor version whose kernel takes [`notify::INC_EPOCH`] (Linux 6.16).
pub const INC_EPOCH_MINOR: u32 = 44;
/// Oldest minor version that has all the structures as they are here (Linux 5.4).
pub const OLDEST_MINOR: u32 = 31;

macro_rules! opcodes {
    ($($(#[$doc:meta])* $name:ident = $number:literal,)*) => {
        /// What a request asks for.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[allow(missing_docs, reason = "the names are the kernel's")]
        pub enum Opcode {
            $($(#[$doc])* $name = $number,)*
        }

        impl Opcode {
            /// The opcode with that number, if it is one that we know.
            pub fn from_number(number: u32) -> Option<Self> {
                match number {
                    $($number => Some(Opcode::$name),)*
                    _ => None,
                }
            }
        }
    };
}

opcodes! {
    Lookup = 1,
    Forget = 2,
    GetAttr = 3,
    SetAttr = 4,
    ReadLink = 5,
    SymLink = 6,
    MkNod = 8,
    MkDir = 9,
    Unlink = 10,
    RmDir = 11,
    Rename = 12,
    Link = 13,
    Open = 14,
    Read = 15,
    Write = 16,
    StatFs = 17,
    Release = 18,
    Fsync = 20,
    SetXattr = 21,
    GetXattr = 22,
    ListXattr = 23,
    RemoveXattr = 24,
    Flush = 25,
    Init = 26,
    OpenDir = 27,
    ReadDir = 28,
    ReleaseDir = 29,
    FsyncDir = 30,
    GetLk = 31,
    SetLk = 32,
    SetLkW = 33,
    Access = 34,
    Create = 35,
    Interrupt = 36,
    BMap = 37,
    Destroy = 38,
    IoCtl = 39,
    Poll = 40,
    NotifyReply = 41,
    BatchForget = 42,
    Fallocate = 43,
    ReadDirPlus = 44,
    Rename2 = 45,
    LSeek = 46,
    CopyFileRange = 47,
    SetupMapping = 48,
    RemoveMapping = 49,
    SyncFs = 50,
    TmpFile = 51,
    Statx = 52,
    CopyFileRange64 = 53,
}

/// Flags of INIT, in both directions. Those from bit 32 on travel in `flags2`.
pub mod init {
    #![allow(missing_docs, reason = "the names are the kernel's")]
    pub const ASYNC_READ: u64 = 1 << 0;
    pub const POSIX_LOCKS: u64 = 1 << 1;
    pub const ATOMIC_O_TRUNC: u64 = 1 << 3;
    pub const EXPORT_SUPPORT: u64 = 1 << 4;
    pub const BIG_WRITES: u64 = 1 << 5;
    pub const DONT_MASK: u64 = 1 << 6;
    pub const FLOCK_LOCKS: u64 = 1 << 10;
    pub const AUTO_INVAL_DATA: u64 = 1 << 12;
    pub const DO_READDIRPLUS: u64 = 1 << 13;
    pub const READDIRPLUS_AUTO: u64 = 1 << 14;
    pub const ASYNC_DIO: u64 = 1 << 15;
    pub const WRITEBACK_CACHE: u64 = 1 << 16;
    pub const PARALLEL_DIROPS: u64 = 1 << 18;
    pub const ABORT_ERROR: u64 = 1 << 21;
    pub const MAX_PAGES: u64 = 1 << 22;
    pub const CACHE_SYMLINKS: u64 = 1 << 23;
    pub const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
    pub const INIT_EXT: u64 = 1 << 30;
    pub const HAS_EXPIRE_ONLY: u64 = 1 << 35;
    pub const DIRECT_IO_ALLOW_MMAP: u64 = 1 << 36;
    pub const HAS_RESEND: u64 = 1 << 39;
}

/// Flags of an answer to OPEN.
pub mod fopen {
    #![allow(missing_docs, reason = "the names are the kernel's")]
    pub const DIRECT_IO: u32 = 1 << 0;
    pub const KEEP_CACHE: u32 = 1 << 1;
    pub const CACHE_DIR: u32 = 1 << 3;
    pub const STREAM: u32 = 1 << 4;
    pub const NOFLUSH: u32 = 1 << 5;
    pub const PARALLEL_DIRECT_WRITES: u32 = 1 << 6;
}

/// Bits of [`SetAttrIn::valid`].
pub mod fattr {
    #![allow(missing_docs, reason = "the names are the kernel's")]
    pub const MODE: u32 = 1 << 0;
    pub const UID: u32 = 1 << 1;
    pub const GID: u32 = 1 << 2;
    pub const SIZE: u32 = 1 << 3;
    pub const ATIME: u32 = 1 << 4;
    pub const MTIME: u32 = 1 << 5;
    pub const FH: u32 = 1 << 6;
    pub const ATIME_NOW: u32 = 1 << 7;
    pub const MTIME_NOW: u32 = 1 << 8;
    pub const KILL_SUIDGID: u32 = 1 << 11;
}

/// `getattr_flags`: the handle is valid.
pub const GETATTR_FH: u32 = 1 << 0;
/// `open_flags` of OPEN: clear set-user-id and set-group-id.
pub const OPEN_KILL_SUIDGID: u32 = 1 << 0;
/// `read_flags`: the reader came by read(2), `lock_owner` is valid.
pub const READ_LOCKOWNER: u32 = 1 << 1;
/// `write_flags`: `lock_owner` is valid.
pub const WRITE_LOCKOWNER: u32 = 1 << 1;
/// `write_flags`: clear set-user-id and set-group-id.
pub const WRITE_KILL_SUIDGID: u32 = 1 << 2;
/// `fsync_flags`: data only.
pub const FSYNC_FDATASYNC: u32 = 1 << 0;
/// `lk_flags`: a lock of flock(2).
pub const LK_FLOCK: u32 = 1 << 0;
/// `flags` of POLL: the poller wants a notice.
pub const POLL_SCHEDULE_NOTIFY: u32 = 1 << 0;
/// `flags` of [`NotifyInvalEntryOut`]: look the name up again, but do not tear it down.
pub const EXPIRE_ONLY: u32 = 1 << 0;

/// Codes of notices, in the place of an error number.
pub mod notify {
    #![allow(missing_docs, reason = "the names are the kernel's")]
    pub const POLL: i32 = 1;
    pub const INVAL_INODE: i32 = 2;
    pub const INVAL_ENTRY: i32 = 3;
    pub const STORE: i32 = 4;
    pub const DELETE: i32 = 6;
    pub const INC_EPOCH: i32 = 8;
}

macro_rules! structures {
    ($($(#[$doc:meta])* $name:ident { $($field:ident: $kind:ty,)* })*) => {
        $(
            $(#[$doc])*
            #[repr(C)]
            #[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
            #[allow(missing_docs, reason = "the fields are the kernel's")]
            pub struct $name { $(pub $field: $kind,)* }
        )*
    };
}

structures! {
    /// Before every request.
    InHeader {
        len: u32, opcode: u32, unique: u64, node: u64, uid: u32, gid: u32, pid: u32,
        total_extlen: u16, padding: u16,
    }
    /// Before every answer and notice.
    OutHeader { len: u32, error: i32, unique: u64, }
    /// Attributes.
    AttrOut {
        ino: u64, size: u64, blocks: u64, atime: u64, mtime: u64, ctime: u64, atimensec: u32, mtimensec: u32,
        ctimensec: u32, mode: u32, nlink: u32, uid: u32, gid: u32, rdev: u32, blksize: u32, flags: u32,
    }
    /// Answer to LOOKUP and to whatever makes a name.
    EntryOut {
        node: u64, generation: u64, entry_valid: u64, attr_valid: u64, entry_valid_nsec: u32, attr_valid_nsec: u32,
        attr: AttrOut,
    }
    /// FORGET.
    ForgetIn { nlookup: u64, }
    /// BATCH_FORGET: `count` of [`ForgetOne`] follow.
    BatchForgetIn { count: u32, dummy: u32, }
    /// One node of a BATCH_FORGET.
    ForgetOne { node: u64, nlookup: u64, }
    /// GETATTR.
    GetAttrIn { getattr_flags: u32, dummy: u32, fh: u64, }
    /// Answer to GETATTR and SETATTR.
    GetAttrOut { attr_valid: u64, attr_valid_nsec: u32, dummy: u32, attr: AttrOut, }
    /// STATX.
    StatxIn { getattr_flags: u32, reserved: u32, fh: u64, sx_flags: u32, sx_mask: u32, }
    /// A time of STATX.
    StatxTime { secs: i64, nanos: u32, reserved: i32, }
    /// Attributes, as statx(2) has them.
    StatxAttr {
        mask: u32, blksize: u32, attributes: u64, nlink: u32, uid: u32, gid: u32, mode: u16, spare0: u16, ino: u64,
        size: u64, blocks: u64, attributes_mask: u64, atime: StatxTime, btime: StatxTime, ctime: StatxTime,
        mtime: StatxTime, rdev_major: u32, rdev_minor: u32, dev_major: u32, dev_minor: u32, spare2: [u64; 14],
    }
    /// Answer to STATX.
    StatxOut { attr_valid: u64, attr_valid_nsec: u32, flags: u32, spare: [u64; 2], stat: StatxAttr, }
    /// MKNOD; the name follows.
    MkNodIn { mode: u32, rdev: u32, umask: u32, padding: u32, }
    /// MKDIR; the name follows.
    MkDirIn { mode: u32, umask: u32, }
    /// RENAME; both names follow.
    RenameIn { new_dir: u64, }
    /// RENAME2; both names follow.
    Rename2In { new_dir: u64, flags: u32, padding: u32, }
    /// LINK; the new name follows.
    LinkIn { old_node: u64, }
    /// SETATTR.
    SetAttrIn {
        valid: u32, padding: u32, fh: u64, size: u64, lock_owner: u64, atime: u64, mtime: u64, ctime: u64,
        atimensec: u32, mtimensec: u32, ctimensec: u32, mode: u32, unused4: u32, uid: u32, gid: u32, unused5: u32,
    }
    /// OPEN, OPENDIR.
    OpenIn { flags: u32, open_flags: u32, }
    /// CREATE, TMPFILE; the name follows.
    CreateIn { flags: u32, mode: u32, umask: u32, open_flags: u32, }
    /// Answer to OPEN, OPENDIR; second part of the answer to CREATE.
    OpenOut { fh: u64, open_flags: u32, backing_id: i32, }
    /// RELEASE, RELEASEDIR.
    ReleaseIn { fh: u64, flags: u32, release_flags: u32, lock_owner: u64, }
    /// FLUSH.
    FlushIn { fh: u64, unused: u32, padding: u32, lock_owner: u64, }
    /// READ, READDIR, READDIRPLUS.
    ReadIn { fh: u64, offset: u64, size: u32, read_flags: u32, lock_owner: u64, flags: u32, padding: u32, }
    /// WRITE; the bytes follow.
    WriteIn { fh: u64, offset: u64, size: u32, write_flags: u32, lock_owner: u64, flags: u32, padding: u32, }
    /// Answer to WRITE and COPY_FILE_RANGE.
    WriteOut { size: u32, padding: u32, }
    /// Answer to STATFS.
    StatFsOut {
        blocks: u64, bfree: u64, bavail: u64, files: u64, ffree: u64, bsize: u32, namelen: u32, frsize: u32,
        padding: u32, spare: [u32; 6],
    }
    /// FSYNC, FSYNCDIR.
    FsyncIn { fh: u64, fsync_flags: u32, padding: u32, }
    /// SETXATTR without SETXATTR_EXT; name and value follow.
    SetXattrIn { size: u32, flags: u32, }
    /// GETXATTR (the name follows), LISTXATTR.
    GetXattrIn { size: u32, padding: u32, }
    /// Answer to GETXATTR and LISTXATTR that ask for the size.
    GetXattrOut { size: u32, padding: u32, }
    /// A lock.
    FileLock { start: u64, end: u64, kind: u32, pid: u32, }
    /// GETLK, SETLK, SETLKW.
    LkIn { fh: u64, owner: u64, lk: FileLock, lk_flags: u32, padding: u32, }
    /// Answer to GETLK.
    LkOut { lk: FileLock, }
    /// INIT, as far as every kernel sends it.
    InitIn { major: u32, minor: u32, max_readahead: u32, flags: u32, }
    /// Follows [`InitIn`] when it has the flag INIT_EXT.
    InitInExt { flags2: u32, unused: [u32; 11], }
    /// Answer to INIT.
    InitOut {
        major: u32, minor: u32, max_readahead: u32, flags: u32, max_background: u16, congestion_threshold: u16,
        max_write: u32, time_gran: u32, max_pages: u16, map_alignment: u16, flags2: u32, max_stack_depth: u32,
        request_timeout: u16, unused: [u16; 11],
    }
    /// INTERRUPT.
    InterruptIn { unique: u64, }
    /// POLL.
    PollIn { fh: u64, kh: u64, flags: u32, events: u32, }
    /// Answer to POLL.
    PollOut { revents: u32, padding: u32, }
    /// FALLOCATE.
    FallocateIn { fh: u64, offset: u64, length: u64, mode: u32, padding: u32, }
    /// LSEEK.
    LSeekIn { fh: u64, offset: u64, whence: u32, padding: u32, }
    /// Answer to LSEEK.
    LSeekOut { offset: u64, }
    /// COPY_FILE_RANGE and COPY_FILE_RANGE_64.
    CopyFileRangeIn {
        fh_in: u64, off_in: u64, node_out: u64, fh_out: u64, off_out: u64, len: u64, flags: u64,
    }
    /// Answer to COPY_FILE_RANGE_64.
    CopyFileRangeOut { bytes_copied: u64, }
    /// One entry of a listing; the name follows, and zeros up to a multiple of eight bytes.
    Dirent { ino: u64, off: u64, namelen: u32, kind: u32, }
    /// One entry of a listing with attributes; the name follows as after [`Dirent`].
    DirentPlus { entry: EntryOut, dirent: Dirent, }
    /// Notice: pollers of this kernel handle may look again.
    NotifyPollOut { kh: u64, }
    /// Notice: attributes and pages of a node are not right any more.
    NotifyInvalInodeOut { ino: u64, off: i64, len: i64, }
    /// Notice: a name is not right any more; the name and a NUL follow.
    NotifyInvalEntryOut { parent: u64, namelen: u32, flags: u32, }
    /// Notice: a name is gone; the name and a NUL follow.
    NotifyDeleteOut { parent: u64, child: u64, namelen: u32, padding: u32, }
    /// Notice: bytes for the page cache, which follow.
    NotifyStoreOut { node: u64, offset: u64, size: u32, padding: u32, }
}

/// Rounds up to the eight bytes at which records of a listing begin.
pub const fn align(len: usize) -> usize {
    (len + 7) & !7
}

/// Bytes that an entry of a plain listing takes.
pub fn dirent_cost(name_len: usize) -> usize {
    align(size_of::<Dirent>() + name_len)
}

/// Bytes that an entry of a listing with attributes takes.
pub fn dirent_plus_cost(name_len: usize) -> usize {
    align(size_of::<DirentPlus>() + name_len)
}

/// A device number as the kernel carries it in 32 bits (`new_encode_dev`), from `major << 32 | minor`.
pub fn encode_device(device: u64) -> u32 {
    let major = (device >> 32) as u32;
    let minor = device as u32;
    (minor & 0xff) | ((major & 0xfff) << 8) | ((minor & 0xfff00) << 12)
}

/// The reverse of [`encode_device`].
pub fn decode_device(encoded: u32) -> u64 {
    let major = (encoded >> 8) & 0xfff;
    let minor = (encoded & 0xff) | ((encoded >> 12) & 0xfff00);
    (u64::from(major) << 32) | u64::from(minor)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sizes that the kernel's header fixes; a structure that differs would shift every field after it.
    #[test]
    fn sizes_are_the_kernels() {
        assert_eq!(size_of::<InHeader>(), 40);
        assert_eq!(size_of::<OutHeader>(), 16);
        assert_eq!(size_of::<AttrOut>(), 88);
        assert_eq!(size_of::<EntryOut>(), 128);
        assert_eq!(size_of::<GetAttrOut>(), 104);
        assert_eq!(size_of::<StatxAttr>(), 256);
        assert_eq!(size_of::<StatxOut>(), 288);
        assert_eq!(size_of::<SetAttrIn>(), 88);
        assert_eq!(size_of::<ReadIn>(), 40);
        assert_eq!(size_of::<WriteIn>(), 40);
        assert_eq!(size_of::<StatFsOut>(), 80);
        assert_eq!(size_of::<LkIn>(), 48);
        assert_eq!(size_of::<InitIn>() + size_of::<InitInExt>(), 64);
        assert_eq!(size_of::<InitOut>(), 64);
        assert_eq!(size_of::<CopyFileRangeIn>(), 56);
        assert_eq!(size_of::<Dirent>(), 24);
        assert_eq!(size_of::<DirentPlus>(), 152);
    }

    #[test]
    fn device_numbers_survive_both_ways() {
        for device in [0, (8 << 32) | 1, (10 << 32) | 229, (0xfff << 32) | 0xfffff, (1 << 32) | 0x12345] {
            assert_eq!(decode_device(encode_device(device)), device);
        }
        assert_eq!(encode_device((1 << 32) | 3), 0x103, "/dev/null");
    }
}
