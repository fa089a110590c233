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
    pub another: CString,
    pub kept: CString,
    pub parallel: CString,
    pub elsewhere: CString,
    pub elsewhere_file: CString,
    pub elsewhere_new: CString,
    pub nodes: Nodes,
}

/// The nodes that some of the paths mean.
#[derive(Clone, Copy)]
pub struct Nodes {
    pub directory: NodeId,
    pub file: NodeId,
    pub direct: NodeId,
    pub stream: NodeId,
    pub kept: NodeId,
}

impl Paths {
    pub fn new(mount: &Mount, nodes: Nodes) -> Self {
        Paths {
            directory: mount.c_path("d"),
            file: mount.c_path("d/f"),
            other: mount.c_path("d/g"),
            direct: mount.c_path("d/direct"),
            stream: mount.c_path("d/stream"),
            link: mount.c_path("d/l"),
            sub: mount.c_path("d/sub"),
            new: mount.c_path("d/new"),
            another: mount.c_path("d/another"),
            kept: mount.c_path("d/kept"),
            parallel: mount.c_path("d/parallel"),
            elsewhere: mount.c_path("e"),
            elsewhere_file: mount.c_path("e/f"),
            elsewhere_new: mount.c_path("e/new"),
            nodes,
        }
    }
}

/// How a second client is held up by an operation that is pending.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Wait {
    /// Not at all.
    Free,
    /// It can be killed.
    Killable,
    /// A kill has no effect until the first operation is answered.
    Stuck,
}

/// How the first client waits for its own operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum First {
    /// For the answer; a signal sends INTERRUPT.
    Interruptible,
    /// For a page that the operation fills: no signal sends INTERRUPT, and only a fatal one ends the wait.
    Page,
    /// Not at all.
    Free,
}

/// What a second client does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Second {
    /// The same operation again.
    Same,
    /// stat, open and read of the file that the first client uses.
    Node,
    /// `ls -l` of the directory.
    List,
    /// Creates another name in the directory.
    Create,
}

impl Second {
    pub const ALL: [Second; 4] = [Second::Same, Second::Node, Second::List, Second::Create];
}

/// One operation.
pub struct Subject {
    pub name: &'static str,
    /// Which operation is left pending.
    pub matches: fn(&Op<'_>, Nodes) -> bool,
    /// What a client does; its value is an error number.
    pub run: fn(&Paths) -> i32,
    pub first: First,
    /// What second clients have to expect at most, in the order of [`Second::ALL`].
    pub second: [Wait; 4],
}

impl Subject {
    /// Whether the layer leaves it to a signal to end it, though it holds others up: it may rightly take long.
    pub fn may_take_long(&self) -> bool {
        matches!(self.name, "fsync" | "fsyncdir" | "copy_file_range" | "fallocate" | "write, direct" | "write, stream")
    }

    /// Whether the kernel knows the name already when the operation comes.
    pub fn warm(&self) -> bool {
        self.name.contains("known")
    }

    pub fn second(&self, second: Second, paths: &Paths) -> i32 {
        match second {
            Second::Same => (self.run)(paths),
            Second::Node => use_file(self.file(paths)),
            Second::List => list(&paths.directory, &[&paths.file, &paths.other, &paths.link, &paths.sub]),
            Second::Create => errno_of(open(&paths.another, libc::O_WRONLY | libc::O_CREAT).into()),
        }
    }

    fn file<'p>(&self, paths: &'p Paths) -> &'p CString {
        match self.name {
            name if name.contains("parallel") => &paths.parallel,
            name if name.contains("direct") => &paths.direct,
            name if name.contains("stream") => &paths.stream,
            name if name.contains("kept") => &paths.kept,
            "lookup" => &paths.other,
            "lookup of what is not" | "symlink" | "mknod" | "mkdir" | "create" => &paths.new,
            "readlink" => &paths.link,
            "rmdir" => &paths.sub,
            _ => &paths.file,
        }
    }
}

/// stat, open, read.
fn use_file(path: &CString) -> i32 {
    let mut data = std::mem::MaybeUninit::<libc::stat>::uninit();
    let mut buffer = [0u8; 16];
    // SAFETY: the path ends with a NUL, the buffers are as long as is said.
    unsafe {
        libc::stat(path.as_ptr(), data.as_mut_ptr());
        let fd = open(path, libc::O_RDONLY);
        libc::read(fd, buffer.as_mut_ptr().cast(), buffer.len());
        errno_of(libc::close(fd).into())
    }
}

/// `ls -l`.
fn list(directory: &CString, names: &[&CString]) -> i32 {
    let mut buffer = [0u64; 512];
    // SAFETY: the paths end with NULs, the buffers are as long as is said.
    unsafe {
        let fd = open(directory, libc::O_RDONLY | libc::O_DIRECTORY);
        while libc::syscall(libc::SYS_getdents64, fd, buffer.as_mut_ptr(), size_of_val(&buffer)) > 0 {}
        for name in names {
            let mut data = std::mem::MaybeUninit::<libc::stat>::uninit();
            libc::lstat(name.as_ptr(), data.as_mut_ptr());
        }
        errno_of(libc::close(fd).into())
    }
}

/// A round through another machine: every kind of lock of its directory and file is taken. Its value is an error
/// number.
pub fn use_another_machine(paths: &Paths) -> i32 {
    let result = list(&paths.elsewhere, &[&paths.elsewhere_file]);
    if result != 0 {
        return result;
    }
    for write in [true, false] {
        if transfer(&paths.elsewhere_file, write) < 0 {
            return errno_of(-1);
        }
    }
    let mut data = std::mem::MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: the paths end with NULs, the buffer is as long as is said.
    let results = unsafe {
        [
            libc::mkdir(paths.elsewhere_new.as_ptr(), 0o700),
            libc::rmdir(paths.elsewhere_new.as_ptr()),
            libc::chmod(paths.elsewhere_file.as_ptr(), 0o600),
            libc::statfs(paths.elsewhere.as_ptr(), data.as_mut_ptr()),
        ]
    };
    results.iter().map(|&result| errno_of(result.into())).max().unwrap_or(0)
}

fn open(path: &CString, flags: i32) -> i32 {
    // SAFETY: the path ends with a NUL.
    unsafe { libc::open(path.as_ptr(), flags, 0o644) }
}

/// Reads or writes 4096 bytes; gives the result of the system call.
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
    result as i32
}

fn lock(path: &CString, command: i32) -> i32 {
    let fd = open(path, libc::O_RDWR);
    let mut lock = libc::flock { l_type: libc::F_WRLCK as _, l_whence: 0, l_start: 0, l_len: 0, l_pid: 0 };
    // SAFETY: the pointer is to a live structure.
    unsafe { libc::fcntl(fd, command, &raw mut lock) }
}

const FREE: [Wait; 4] = [Free; 4];

macro_rules! subject {
    ($name:literal, $pattern:pat, $first:ident, $second:expr, |$paths:ident| $run:expr) => {
        subject!($name, _nodes => $pattern if true, $first, $second, |$paths| $run)
    };
    (
        $name:literal, $nodes:ident => $pattern:pat if $guard:expr, $first:ident, $second:expr,
        |$paths:ident| $run:expr
    ) => {
        Subject {
            name: $name,
            matches: |op, $nodes| matches!(op, $pattern if $guard),
            #[allow(unused_unsafe, reason = "some are calls of functions here")]
            // SAFETY: all paths end with NULs, all buffers are as long as is said.
            run: |$paths| errno_of(i64::from(unsafe { $run })),
            first: First::$first,
            second: $second,
        }
    };
}

use Wait::*;

/// All of them. The second clients' waits were measured on Linux 6.18.
pub static SUBJECTS: &[Subject] = &[
    subject!("lookup", Op::Lookup { name: b"g", .. }, Interruptible, [Stuck, Stuck, Stuck, Stuck], |p| {
        libc::access(p.other.as_ptr(), libc::F_OK)
    }),
    subject!("lookup, known name", Op::Lookup { name: b"g", .. }, Interruptible, FREE, |p| {
        libc::access(p.other.as_ptr(), libc::F_OK)
    }),
    subject!(
        "lookup of what is not",
        Op::Lookup { name: b"new", .. },
        Interruptible,
        [Stuck, Stuck, Free, Stuck],
        |p| libc::access(p.new.as_ptr(), libc::F_OK)
    ),
    subject!("getattr", n => Op::GetAttr { node, .. } if *node == n.file, Interruptible, FREE, |p| {
        let mut data = std::mem::MaybeUninit::<libc::stat>::uninit();
        libc::stat(p.file.as_ptr(), data.as_mut_ptr())
    }),
    subject!("statx (time of birth)", n => Op::GetAttr { node, .. } if *node == n.file, Interruptible, FREE, |p| {
        let mut data = std::mem::MaybeUninit::<libc::statx>::uninit();
        libc::statx(libc::AT_FDCWD, p.file.as_ptr(), 0, libc::STATX_BTIME, data.as_mut_ptr())
    }),
    subject!("getattr of the directory", n => Op::GetAttr { node, .. } if *node == n.directory, Interruptible, FREE, |p| {
        libc::access(p.file.as_ptr(), libc::F_OK)
    }),
    subject!("setattr (chmod)", Op::SetAttr { .. }, Interruptible, [Stuck, Free, Free, Free], |p| libc::chmod(
        p.file.as_ptr(),
        0o600
    )),
    subject!("setattr (truncate)", Op::SetAttr { .. }, Interruptible, [Stuck, Free, Free, Free], |p| libc::truncate(
        p.file.as_ptr(),
        1
    )),
    subject!("readlink", Op::ReadLink { .. }, Interruptible, [Stuck, Stuck, Free, Free], |p| {
        let mut buffer = [0; 100];
        libc::readlink(p.link.as_ptr(), buffer.as_mut_ptr(), 100) as i32
    }),
    subject!("symlink", Op::SymLink { .. }, Interruptible, [Stuck, Stuck, Killable, Stuck], |p| libc::symlink(
        c"t".as_ptr(),
        p.new.as_ptr()
    )),
    subject!("mknod", Op::MkNod { .. }, Interruptible, [Stuck, Stuck, Killable, Stuck], |p| libc::mknod(
        p.new.as_ptr(),
        libc::S_IFIFO | 0o600,
        0
    )),
    subject!("mkdir", Op::MkDir { .. }, Interruptible, [Stuck, Stuck, Killable, Stuck], |p| libc::mkdir(
        p.new.as_ptr(),
        0o700
    )),
    subject!("unlink", Op::Unlink { .. }, Interruptible, [Stuck, Free, Killable, Stuck], |p| libc::unlink(
        p.file.as_ptr()
    )),
    subject!("rmdir", Op::RmDir { .. }, Interruptible, [Stuck, Free, Killable, Stuck], |p| libc::rmdir(p.sub.as_ptr())),
    subject!("rename", Op::Rename { .. }, Interruptible, [Stuck, Free, Killable, Stuck], |p| libc::rename(
        p.file.as_ptr(),
        p.new.as_ptr()
    )),
    subject!("link", Op::Link { .. }, Interruptible, [Stuck, Free, Killable, Stuck], |p| libc::link(
        p.file.as_ptr(),
        p.new.as_ptr()
    )),
    subject!("open", Op::Open { .. }, Interruptible, FREE, |p| open(&p.file, libc::O_RDONLY)),
    subject!("open with truncation", Op::Open { .. }, Interruptible, FREE, |p| {
        open(&p.file, libc::O_WRONLY | libc::O_TRUNC)
    }),
    subject!("create", Op::Create { .. }, Interruptible, [Stuck, Stuck, Killable, Stuck], |p| open(
        &p.new,
        libc::O_WRONLY | libc::O_CREAT
    )),
    subject!("tmpfile", Op::TmpFile { .. }, Interruptible, FREE, |p| {
        open(&p.directory, libc::O_WRONLY | libc::O_TMPFILE)
    }),
    subject!("read, cached", n => Op::Read { node, .. } if *node == n.file, Page, [Stuck, Stuck, Free, Free], |p| transfer(&p.file, false)),
    subject!("read, direct", n => Op::Read { node, .. } if *node == n.direct, Interruptible, FREE, |p| {
        transfer(&p.direct, false)
    }),
    subject!("read, stream", n => Op::Read { node, .. } if *node == n.stream, Interruptible, FREE, |p| {
        transfer(&p.stream, false)
    }),
    subject!("read, cached, pages kept", n => Op::Read { node, .. } if *node == n.kept, Page, [Killable, Killable, Free, Free], |p| {
        transfer(&p.kept, false)
    }),
    subject!("read by sendfile", n => Op::Read { node, .. } if *node == n.file, Page, [Stuck, Stuck, Free, Free], |p| {
        let null = open(&CString::from(c"/dev/null"), libc::O_WRONLY);
        libc::sendfile(null, open(&p.file, libc::O_RDONLY), std::ptr::null_mut(), 4096) as i32
    }),
    subject!("read by mmap", n => Op::Read { node, .. } if *node == n.file, Page, [Stuck, Stuck, Free, Free], |p| {
        let fd = open(&p.file, libc::O_RDONLY);
        let page = libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ, libc::MAP_SHARED, fd, 0);
        page.cast::<u8>().read_volatile();
        0
    }),
    subject!("write, cached", Op::Write { .. }, Interruptible, [Stuck, Free, Free, Free], |p| transfer(&p.file, true)),
    subject!("write, direct", Op::Write { .. }, Interruptible, [Stuck, Free, Free, Free], |p| transfer(
        &p.direct, true
    )),
    subject!("write, direct, parallel", Op::Write { .. }, Interruptible, FREE, |p| transfer(&p.parallel, true)),
    subject!("write, stream", Op::Write { .. }, Interruptible, [Stuck, Free, Free, Free], |p| {
        transfer(&p.stream, true)
    }),
    subject!("flush", Op::Flush { .. }, Interruptible, FREE, |p| libc::close(open(&p.file, libc::O_WRONLY))),
    subject!("fsync", Op::Fsync { .. }, Interruptible, [Stuck, Free, Free, Free], |p| libc::fsync(open(
        &p.file,
        libc::O_WRONLY
    ))),
    subject!("release", Op::Release { .. }, Free, FREE, |p| libc::close(open(&p.file, libc::O_RDONLY))),
    subject!("opendir", Op::OpenDir { .. }, Interruptible, FREE, |p| open(
        &p.directory,
        libc::O_RDONLY | libc::O_DIRECTORY
    )),
    subject!("readdir", Op::ReadDir { .. }, Interruptible, [Free, Free, Free, Stuck], |p| {
        let mut buffer = [0u64; 512];
        let fd = open(&p.directory, libc::O_RDONLY | libc::O_DIRECTORY);
        libc::syscall(libc::SYS_getdents64, fd, buffer.as_mut_ptr(), 4096) as i32
    }),
    subject!("fsyncdir", Op::FsyncDir { .. }, Interruptible, [Stuck, Stuck, Killable, Stuck], |p| {
        libc::fsync(open(&p.directory, libc::O_RDONLY | libc::O_DIRECTORY))
    }),
    subject!("statfs", Op::StatFs { .. }, Interruptible, FREE, |p| {
        let mut data = std::mem::MaybeUninit::<libc::statfs>::uninit();
        libc::statfs(p.file.as_ptr(), data.as_mut_ptr())
    }),
    subject!("getxattr", Op::GetXattr { name: b"user.a", .. }, Interruptible, FREE, |p| {
        libc::getxattr(p.file.as_ptr(), c"user.a".as_ptr(), std::ptr::null_mut(), 0) as i32
    }),
    subject!("listxattr", Op::ListXattr { .. }, Interruptible, FREE, |p| {
        libc::listxattr(p.file.as_ptr(), std::ptr::null_mut(), 0) as i32
    }),
    subject!("setxattr", Op::SetXattr { .. }, Interruptible, [Stuck, Free, Free, Free], |p| {
        libc::setxattr(p.file.as_ptr(), c"user.b".as_ptr(), c"1".as_ptr().cast(), 1, 0)
    }),
    subject!("removexattr", Op::RemoveXattr { .. }, Interruptible, [Stuck, Free, Free, Free], |p| {
        libc::removexattr(p.file.as_ptr(), c"user.a".as_ptr())
    }),
    subject!("copy_file_range", Op::CopyRange { .. }, Interruptible, [Stuck, Free, Free, Free], |p| {
        let (from, to) = (open(&p.file, libc::O_RDONLY), open(&p.other, libc::O_WRONLY));
        libc::copy_file_range(from, std::ptr::null_mut(), to, std::ptr::null_mut(), 4096, 0) as i32
    }),
    subject!("fallocate", Op::Fallocate { .. }, Interruptible, [Stuck, Free, Free, Free], |p| {
        libc::fallocate(open(&p.file, libc::O_WRONLY), 0, 0, 10_000)
    }),
    subject!("lseek (SEEK_DATA)", Op::Seek { .. }, Interruptible, [Stuck, Free, Free, Free], |p| {
        libc::lseek(open(&p.file, libc::O_RDONLY), 0, libc::SEEK_DATA) as i32
    }),
    subject!("getlk", Op::GetLock { .. }, Interruptible, FREE, |p| lock(&p.file, libc::F_GETLK)),
    subject!("setlk", Op::SetLock { .. }, Interruptible, FREE, |p| lock(&p.file, libc::F_SETLK)),
    subject!("setlkw", Op::SetLock { .. }, Interruptible, FREE, |p| lock(&p.file, libc::F_SETLKW)),
    subject!("flock", Op::SetLock { .. }, Interruptible, FREE, |p| libc::flock(
        open(&p.file, libc::O_RDONLY),
        libc::LOCK_EX
    )),
    subject!("poll", Op::Poll { .. }, Interruptible, FREE, |p| {
        let mut polled = libc::pollfd { fd: open(&p.file, libc::O_RDONLY), events: libc::POLLIN, revents: 0 };
        libc::poll(&raw mut polled, 1, -1)
    }),
];
