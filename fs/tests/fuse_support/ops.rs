//! The operations that a client can cause, and what others wait for while one of them is pending.

use super::{Mount, errno_of};
use machinefs::tree::ops::{NodeId, Op};
use std::ffi::CString;

/// Paths in the mount, made before a client is forked, and the nodes that they mean.
pub struct Paths {
    pub directory: CString,
    pub file: CString,
    pub other: CString,
    pub direct: CString,
    pub stream: CString,
    pub link: CString,
    pub sub: CString,
    pub new: CString,
    pub directory_node: NodeId,
    pub file_node: NodeId,
    pub direct_node: NodeId,
    pub stream_node: NodeId,
}

impl Paths {
    pub fn new(mount: &Mount, [directory_node, file_node, direct_node, stream_node]: [NodeId; 4]) -> Self {
        Paths {
            directory: mount.c_path("d"),
            file: mount.c_path("d/f"),
            other: mount.c_path("d/g"),
            direct: mount.c_path("d/direct"),
            stream: mount.c_path("d/stream"),
            link: mount.c_path("d/l"),
            sub: mount.c_path("d/sub"),
            new: mount.c_path("d/new"),
            directory_node,
            file_node,
            direct_node,
            stream_node,
        }
    }
}

/// How a second client may at most be held up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    Never,
    Killable,
    Stuck,
}

type Matches = Box<dyn Fn(&Op<'_>) -> bool + Send + Sync>;

/// One operation.
pub struct Subject {
    pub name: &'static str,
    /// Which operation is left pending.
    pub matches: fn(&Paths) -> Matches,
    /// What a client does; its value is an error number.
    pub run: fn(&Paths) -> i32,
    /// Whether the client waits for it.
    pub waits: bool,
    /// What a second client that does the same has to expect.
    pub same: Wait,
    /// What `ls -l` of the directory has to expect.
    pub list: Wait,
}

fn open(path: &CString, flags: i32) -> i32 {
    // SAFETY: the path ends with a NUL.
    unsafe { libc::open(path.as_ptr(), flags, 0o644) }
}

/// Reads or writes 4096 bytes.
fn transfer(path: &CString, write: bool) -> i32 {
    let fd = open(path, libc::O_RDWR);
    let mut buffer = [0u8; 4096];
    // SAFETY: the buffer is as long as is said.
    let result = unsafe {
        if write {
            libc::write(fd, buffer.as_ptr().cast(), buffer.len())
        } else {
            libc::read(fd, buffer.as_mut_ptr().cast(), buffer.len())
        }
    };
    errno_of(result as i64)
}

fn lock(path: &CString, command: i32) -> i32 {
    let fd = open(path, libc::O_RDWR);
    let mut lock = libc::flock { l_type: libc::F_WRLCK as _, l_whence: 0, l_start: 0, l_len: 0, l_pid: 0 };
    // SAFETY: the pointer is to a live structure.
    errno_of(unsafe { libc::fcntl(fd, command, &raw mut lock) }.into())
}

macro_rules! subject {
    ($name:literal, $pattern:pat $(if $guard:expr)?, $waits:literal, $same:ident, $list:ident, |$paths:ident| $run:expr) => {
        subject!($name, _unused => $pattern $(if $guard)?, $waits, $same, $list, |$paths| $run)
    };
    ($name:literal, $p:ident => $pattern:pat $(if $guard:expr)?, $waits:literal, $same:ident, $list:ident, |$paths:ident| $run:expr) => {
        Subject {
            name: $name,
            matches: |$p| {
                #[allow(unused_variables, reason = "not every subject looks at all of them")]
                let (directory, file, direct, stream) =
                    ($p.directory_node, $p.file_node, $p.direct_node, $p.stream_node);
                Box::new(move |op| matches!(op, $pattern $(if $guard)?))
            },
            #[allow(unused_unsafe, reason = "some are calls of functions here")]
            // SAFETY: all paths end with NULs, all buffers are as long as is said.
            run: |$paths| errno_of(i64::from(unsafe { $run })),
            waits: $waits,
            same: Wait::$same,
            list: Wait::$list,
        }
    };
}

/// All of them. The last two columns are measured on Linux 6.18.
pub static SUBJECTS: &[Subject] = &[
    subject!("lookup", Op::Lookup { name: b"g", .. }, true, Stuck, Stuck, |p| {
        libc::access(p.other.as_ptr(), libc::F_OK)
    }),
    subject!("lookup of what is not", Op::Lookup { name: b"new", .. }, true, Stuck, Never, |p| {
        libc::access(p.new.as_ptr(), libc::F_OK)
    }),
    subject!("getattr", p => Op::GetAttr { node, .. } if *node == file, true, Never, Never, |p| {
        let mut data = std::mem::MaybeUninit::<libc::stat>::uninit();
        libc::stat(p.file.as_ptr(), data.as_mut_ptr())
    }),
    subject!("getattr of the directory", p => Op::GetAttr { node, .. } if *node == directory, true, Never, Never, |p| {
        libc::access(p.file.as_ptr(), libc::F_OK)
    }),
    subject!("setattr (chmod)", Op::SetAttr { .. }, true, Stuck, Never, |p| libc::chmod(p.file.as_ptr(), 0o600)),
    subject!("setattr (truncate)", Op::SetAttr { .. }, true, Stuck, Never, |p| libc::truncate(p.file.as_ptr(), 1)),
    subject!("readlink", Op::ReadLink { .. }, true, Stuck, Never, |p| {
        let mut buffer = [0; 100];
        libc::readlink(p.link.as_ptr(), buffer.as_mut_ptr(), 100) as i32
    }),
    subject!("symlink", Op::SymLink { .. }, true, Stuck, Stuck, |p| libc::symlink(c"t".as_ptr(), p.new.as_ptr())),
    subject!("mknod", Op::MkNod { .. }, true, Stuck, Stuck, |p| libc::mknod(p.new.as_ptr(), libc::S_IFIFO | 0o600, 0)),
    subject!("mkdir", Op::MkDir { .. }, true, Stuck, Stuck, |p| libc::mkdir(p.new.as_ptr(), 0o700)),
    subject!("unlink", Op::Unlink { .. }, true, Stuck, Stuck, |p| libc::unlink(p.file.as_ptr())),
    subject!("rmdir", Op::RmDir { .. }, true, Stuck, Stuck, |p| libc::rmdir(p.sub.as_ptr())),
    subject!("rename", Op::Rename { .. }, true, Stuck, Stuck, |p| libc::rename(p.file.as_ptr(), p.new.as_ptr())),
    subject!("link", Op::Link { .. }, true, Stuck, Stuck, |p| libc::link(p.file.as_ptr(), p.new.as_ptr())),
    subject!("open", Op::Open { .. }, true, Never, Never, |p| open(&p.file, libc::O_RDONLY)),
    subject!("open with truncation", Op::Open { .. }, true, Never, Never, |p| {
        open(&p.file, libc::O_WRONLY | libc::O_TRUNC)
    }),
    subject!("create", Op::Create { .. }, true, Stuck, Stuck, |p| open(&p.new, libc::O_WRONLY | libc::O_CREAT)),
    subject!("tmpfile", Op::TmpFile { .. }, true, Never, Never, |p| {
        open(&p.directory, libc::O_WRONLY | libc::O_TMPFILE)
    }),
    subject!("read, cached", p => Op::Read { node, .. } if *node == file, true, Stuck, Never, |p| transfer(&p.file, false)),
    subject!("read, direct", p => Op::Read { node, .. } if *node == direct, true, Never, Never, |p| {
        transfer(&p.direct, false)
    }),
    subject!("read, stream", p => Op::Read { node, .. } if *node == stream, true, Never, Never, |p| {
        transfer(&p.stream, false)
    }),
    subject!("read by sendfile", p => Op::Read { node, .. } if *node == file, true, Stuck, Never, |p| {
        let null = open(&CString::from(c"/dev/null"), libc::O_WRONLY);
        libc::sendfile(null, open(&p.file, libc::O_RDONLY), std::ptr::null_mut(), 4096) as i32
    }),
    subject!("read by mmap", p => Op::Read { node, .. } if *node == file, true, Stuck, Never, |p| {
        let fd = open(&p.file, libc::O_RDONLY);
        let page = libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ, libc::MAP_SHARED, fd, 0);
        i32::from(page.cast::<u8>().read_volatile()) * 0
    }),
    subject!("write, cached", Op::Write { .. }, true, Stuck, Never, |p| transfer(&p.file, true)),
    subject!("write, direct", Op::Write { .. }, true, Stuck, Never, |p| transfer(&p.direct, true)),
    subject!("flush", Op::Flush { .. }, true, Never, Never, |p| libc::close(open(&p.file, libc::O_WRONLY))),
    subject!("fsync", Op::Fsync { .. }, true, Stuck, Never, |p| libc::fsync(open(&p.file, libc::O_WRONLY))),
    subject!("release", Op::Release { .. }, false, Never, Never, |p| libc::close(open(&p.file, libc::O_RDONLY))),
    subject!("opendir", Op::OpenDir { .. }, true, Never, Never, |p| open(
        &p.directory,
        libc::O_RDONLY | libc::O_DIRECTORY
    )),
    subject!("readdir", Op::ReadDir { .. }, true, Never, Never, |p| {
        let mut buffer = [0u64; 512];
        let fd = open(&p.directory, libc::O_RDONLY | libc::O_DIRECTORY);
        libc::syscall(libc::SYS_getdents64, fd, buffer.as_mut_ptr(), 4096) as i32
    }),
    subject!("fsyncdir", Op::FsyncDir { .. }, true, Stuck, Stuck, |p| {
        libc::fsync(open(&p.directory, libc::O_RDONLY | libc::O_DIRECTORY))
    }),
    subject!("statfs", Op::StatFs { .. }, true, Never, Never, |p| {
        let mut data = std::mem::MaybeUninit::<libc::statfs>::uninit();
        libc::statfs(p.file.as_ptr(), data.as_mut_ptr())
    }),
    subject!("getxattr", Op::GetXattr { name: b"user.a", .. }, true, Never, Never, |p| {
        libc::getxattr(p.file.as_ptr(), c"user.a".as_ptr(), std::ptr::null_mut(), 0) as i32
    }),
    subject!("listxattr", Op::ListXattr { .. }, true, Never, Never, |p| {
        libc::listxattr(p.file.as_ptr(), std::ptr::null_mut(), 0) as i32
    }),
    subject!("setxattr", Op::SetXattr { .. }, true, Stuck, Never, |p| {
        libc::setxattr(p.file.as_ptr(), c"user.b".as_ptr(), c"1".as_ptr().cast(), 1, 0)
    }),
    subject!("removexattr", Op::RemoveXattr { .. }, true, Stuck, Never, |p| {
        libc::removexattr(p.file.as_ptr(), c"user.a".as_ptr())
    }),
    subject!("copy_file_range", Op::CopyRange { .. }, true, Stuck, Never, |p| {
        let (from, to) = (open(&p.file, libc::O_RDONLY), open(&p.other, libc::O_WRONLY));
        libc::copy_file_range(from, std::ptr::null_mut(), to, std::ptr::null_mut(), 4096, 0) as i32
    }),
    subject!("fallocate", Op::Fallocate { .. }, true, Stuck, Never, |p| {
        libc::fallocate(open(&p.file, libc::O_WRONLY), 0, 0, 10_000)
    }),
    subject!("lseek (SEEK_DATA)", Op::Seek { .. }, true, Stuck, Never, |p| {
        libc::lseek(open(&p.file, libc::O_RDONLY), 0, libc::SEEK_DATA) as i32
    }),
    subject!("getlk", Op::GetLock { .. }, true, Never, Never, |p| lock(&p.file, libc::F_GETLK)),
    subject!("setlk", Op::SetLock { .. }, true, Never, Never, |p| lock(&p.file, libc::F_SETLK)),
    subject!("setlkw", Op::SetLock { .. }, true, Never, Never, |p| lock(&p.file, libc::F_SETLKW)),
    subject!("flock", Op::SetLock { .. }, true, Never, Never, |p| libc::flock(
        open(&p.file, libc::O_RDONLY),
        libc::LOCK_EX
    )),
    subject!("poll", Op::Poll { .. }, true, Never, Never, |p| {
        let mut polled = libc::pollfd { fd: open(&p.file, libc::O_RDONLY), events: libc::POLLIN, revents: 0 };
        libc::poll(&raw mut polled, 1, -1)
    }),
];
