//! `bench-fuser SOURCE MOUNTPOINT`: shows a directory at another place, by the fuser crate, until it is unmounted.
//! What scripts/bench measures machinefs beside. One file system
//! only, and only the operations that the benchmark needs.

use fuser::*;
use rustix::fd::{BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use rustix::fs::{self, AtFlags, Mode, OFlags, Stat, Timespec, Timestamps};
use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::sync::{Arc, Mutex, RwLock};
use std::time::{Duration, SystemTime};

/// How long the kernel keeps names and attributes.
const TTL: Duration = Duration::from_secs(1);

/// Where an inode is: a name in a directory, which is held open as long as it is known.
#[derive(Clone)]
struct Node {
    parent: Arc<OwnedFd>,
    name: OsString,
    /// The inode's own descriptor, if it is a directory.
    directory: Option<Arc<OwnedFd>>,
    lookups: u64,
}

/// An entry of a listing: inode, type, name.
type Listed = (u64, FileType, OsString);

struct Passthrough {
    /// By number: the root's is 1, all others are those of the source.
    nodes: RwLock<HashMap<u64, Node>>,
    listings: Mutex<HashMap<u64, Arc<Vec<Listed>>>>,
}

type Result<T> = std::result::Result<T, Errno>;

fn errno(error: rustix::io::Errno) -> Errno {
    Errno::from_i32(error.raw_os_error())
}

/// The descriptor that was given to the kernel as a handle.
fn borrow(handle: FileHandle) -> BorrowedFd<'static> {
    // SAFETY: the kernel gives back the handles that open and create gave it, until it releases them.
    unsafe { BorrowedFd::borrow_raw(handle.0 as i32) }
}

fn kind(mode: u32) -> FileType {
    match mode & libc::S_IFMT {
        libc::S_IFDIR => FileType::Directory,
        libc::S_IFLNK => FileType::Symlink,
        _ => FileType::RegularFile,
    }
}

fn time(seconds: i64, nanoseconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::new(seconds.max(0) as u64, nanoseconds as u32)
}

fn attr(stat: &Stat) -> FileAttr {
    FileAttr {
        ino: INodeNo(stat.st_ino),
        size: stat.st_size as u64,
        blocks: stat.st_blocks as u64,
        atime: time(stat.st_atime, stat.st_atime_nsec),
        mtime: time(stat.st_mtime, stat.st_mtime_nsec),
        ctime: time(stat.st_ctime, stat.st_ctime_nsec),
        crtime: SystemTime::UNIX_EPOCH,
        kind: kind(stat.st_mode),
        perm: (stat.st_mode & 0o7777) as u16,
        nlink: stat.st_nlink as u32,
        uid: stat.st_uid,
        gid: stat.st_gid,
        rdev: stat.st_rdev as u32,
        blksize: stat.st_blksize as u32,
        flags: 0,
    }
}

impl Passthrough {
    fn new(source: &str) -> rustix::io::Result<Self> {
        let flags = OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC;
        let root = Arc::new(fs::open(source, flags, Mode::empty())?);
        let node = Node { parent: root.clone(), name: ".".into(), directory: Some(root), lookups: 1 };
        Ok(Passthrough { nodes: RwLock::new(HashMap::from([(1, node)])), listings: Mutex::default() })
    }

    fn node(&self, ino: INodeNo) -> Result<Node> {
        self.nodes.read().unwrap().get(&ino.0).cloned().ok_or(Errno::ESTALE)
    }

    fn directory(&self, ino: INodeNo) -> Result<Arc<OwnedFd>> {
        self.node(ino)?.directory.ok_or(Errno::ENOTDIR)
    }

    /// Looks a name up; the kernel then holds the inode once more.
    fn find(&self, parent: &Arc<OwnedFd>, name: &OsStr) -> Result<FileAttr> {
        let stat = fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW).map_err(errno)?;
        let mut nodes = self.nodes.write().unwrap();
        let new = || Node { parent: parent.clone(), name: name.to_os_string(), directory: None, lookups: 0 };
        let node = nodes.entry(stat.st_ino).or_insert_with(new);
        node.lookups += 1;
        if node.name != name || !Arc::ptr_eq(&node.parent, parent) {
            (node.parent, node.name) = (parent.clone(), name.to_os_string());
        }
        if stat.st_mode & libc::S_IFMT == libc::S_IFDIR && node.directory.is_none() {
            let flags = OFlags::DIRECTORY | OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            node.directory = Some(Arc::new(fs::openat(parent, name, flags, Mode::empty()).map_err(errno)?));
        }
        Ok(attr(&stat))
    }

    /// The kernel does not hold the inode that often any more.
    fn give_back(&self, ino: INodeNo, count: u64) {
        let mut nodes = self.nodes.write().unwrap();
        if let Some(node) = nodes.get_mut(&ino.0).filter(|_| ino != INodeNo::ROOT) {
            node.lookups = node.lookups.saturating_sub(count);
            if node.lookups == 0 {
                nodes.remove(&ino.0);
            }
        }
    }

    fn stat(&self, ino: INodeNo, handle: Option<FileHandle>) -> Result<FileAttr> {
        let stat = match handle {
            Some(handle) => fs::fstat(borrow(handle)),
            None => {
                let node = self.node(ino)?;
                fs::statat(&node.parent, &node.name, AtFlags::SYMLINK_NOFOLLOW)
            }
        };
        let mut attr = attr(&stat.map_err(errno)?);
        attr.ino = ino;
        Ok(attr)
    }

    fn list(&self, directory: INodeNo) -> Result<Vec<Listed>> {
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        let fd = fs::openat(self.directory(directory)?, ".", flags, Mode::empty()).map_err(errno)?;
        let entries = fs::Dir::new(fd).map_err(errno)?.map(|entry| {
            let entry = entry.map_err(errno)?;
            let kind = kind(entry.file_type().as_raw_mode());
            Ok((entry.ino(), kind, OsStr::from_bytes(entry.file_name().to_bytes()).to_os_string()))
        });
        entries.collect()
    }

    fn listing(&self, handle: FileHandle) -> Result<Arc<Vec<Listed>>> {
        self.listings.lock().unwrap().get(&handle.0).cloned().ok_or(Errno::EBADF)
    }

    fn set(&self, ino: INodeNo, handle: Option<FileHandle>, set: &Set) -> Result<FileAttr> {
        let node = self.node(ino)?;
        if let Some(mode) = set.mode {
            fs::chmodat(&node.parent, &node.name, Mode::from_raw_mode(mode), AtFlags::empty()).map_err(errno)?;
        }
        if let Some(size) = set.size {
            match handle {
                Some(handle) => fs::ftruncate(borrow(handle), size),
                None => fs::openat(&node.parent, &node.name, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
                    .and_then(|fd| fs::ftruncate(fd, size)),
            }
            .map_err(errno)?;
        }
        if set.atime.is_some() || set.mtime.is_some() {
            let times = Timestamps { last_access: timespec(set.atime), last_modification: timespec(set.mtime) };
            fs::utimensat(&node.parent, &node.name, &times, AtFlags::SYMLINK_NOFOLLOW).map_err(errno)?;
        }
        self.stat(ino, handle)
    }
}

struct Set {
    mode: Option<u32>,
    size: Option<u64>,
    atime: Option<TimeOrNow>,
    mtime: Option<TimeOrNow>,
}

fn timespec(time: Option<TimeOrNow>) -> Timespec {
    match time {
        None => Timespec { tv_sec: 0, tv_nsec: libc::UTIME_OMIT },
        Some(TimeOrNow::Now) => Timespec { tv_sec: 0, tv_nsec: libc::UTIME_NOW },
        Some(TimeOrNow::SpecificTime(time)) => {
            let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            Timespec { tv_sec: since.as_secs() as i64, tv_nsec: i64::from(since.subsec_nanos()) }
        }
    }
}

fn send_entry(reply: ReplyEntry, result: Result<FileAttr>) {
    match result {
        Ok(attr) => reply.entry(&TTL, &attr, Generation(0)),
        Err(error) => reply.error(error),
    }
}

fn send_attr(reply: ReplyAttr, result: Result<FileAttr>) {
    match result {
        Ok(attr) => reply.attr(&TTL, &attr),
        Err(error) => reply.error(error),
    }
}

fn send_empty(reply: ReplyEmpty, result: Result<()>) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(error),
    }
}

impl Filesystem for Passthrough {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        let wanted = InitFlags::FUSE_PARALLEL_DIROPS
            | InitFlags::FUSE_DO_READDIRPLUS
            | InitFlags::FUSE_READDIRPLUS_AUTO
            | InitFlags::FUSE_AUTO_INVAL_DATA
            | InitFlags::FUSE_ATOMIC_O_TRUNC
            | InitFlags::FUSE_CACHE_SYMLINKS;
        // What the kernel lacks is done without.
        let _ = config.add_capabilities(wanted & config.capabilities());
        let _ = config.set_max_write(1 << 20);
        let _ = config.set_max_background(64);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        send_entry(reply, self.directory(parent).and_then(|parent| self.find(&parent, name)));
    }

    fn forget(&self, _: &Request, ino: INodeNo, count: u64) {
        self.give_back(ino, count);
    }

    fn getattr(&self, _: &Request, ino: INodeNo, handle: Option<FileHandle>, reply: ReplyAttr) {
        send_attr(reply, self.stat(ino, handle));
    }

    #[rustfmt::skip] // else a line for each of its arguments
    fn setattr(
        &self, _: &Request, ino: INodeNo, mode: Option<u32>, _: Option<u32>, _: Option<u32>, size: Option<u64>,
        atime: Option<TimeOrNow>, mtime: Option<TimeOrNow>, _: Option<SystemTime>, handle: Option<FileHandle>,
        _: Option<SystemTime>, _: Option<SystemTime>, _: Option<SystemTime>, _: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        send_attr(reply, self.set(ino, handle, &Set { mode, size, atime, mtime }));
    }

    fn readlink(&self, _: &Request, ino: INodeNo, reply: ReplyData) {
        let read = |node: Node| fs::readlinkat(&node.parent, &node.name, Vec::new()).map_err(errno);
        match self.node(ino).and_then(read) {
            Ok(target) => reply.data(target.as_bytes()),
            Err(error) => reply.error(error),
        }
    }

    fn mkdir(&self, _: &Request, parent: INodeNo, name: &OsStr, mode: u32, _: u32, reply: ReplyEntry) {
        let make = |parent: Arc<OwnedFd>| {
            fs::mkdirat(&parent, name, Mode::from_raw_mode(mode)).map_err(errno)?;
            self.find(&parent, name)
        };
        send_entry(reply, self.directory(parent).and_then(make));
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let unlink = |parent| fs::unlinkat(parent, name, AtFlags::empty()).map_err(errno);
        send_empty(reply, self.directory(parent).and_then(unlink));
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let remove = |parent| fs::unlinkat(parent, name, AtFlags::REMOVEDIR).map_err(errno);
        send_empty(reply, self.directory(parent).and_then(remove));
    }

    fn open(&self, _: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let flags = OFlags::from_bits_retain(flags.0 as u32) & !OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let open = |node: Node| fs::openat(&node.parent, &node.name, flags, Mode::empty()).map_err(errno);
        match self.node(ino).and_then(open) {
            Ok(fd) => reply.opened(FileHandle(fd.into_raw_fd() as u64), FopenFlags::FOPEN_KEEP_CACHE),
            Err(error) => reply.error(error),
        }
    }

    fn create(&self, _: &Request, parent: INodeNo, name: &OsStr, mode: u32, _: u32, flags: i32, reply: ReplyCreate) {
        let create = || {
            let parent = self.directory(parent)?;
            let flags = OFlags::from_bits_retain(flags as u32) | OFlags::CREATE | OFlags::CLOEXEC;
            let fd = fs::openat(&parent, name, flags, Mode::from_raw_mode(mode)).map_err(errno)?;
            Ok((self.find(&parent, name)?, fd))
        };
        match create() {
            Ok((attr, fd)) => reply.created(
                &TTL,
                &attr,
                Generation(0),
                FileHandle(fd.into_raw_fd() as u64),
                FopenFlags::FOPEN_KEEP_CACHE,
            ),
            Err(error) => reply.error(error),
        }
    }

    #[rustfmt::skip] // else a line for each of its arguments
    fn read(
        &self, _: &Request, _: INodeNo, handle: FileHandle, offset: u64, size: u32, _: OpenFlags,
        _: Option<LockOwner>, reply: ReplyData,
    ) {
        let mut buffer = Vec::with_capacity(size as usize);
        match rustix::io::pread(borrow(handle), rustix::buffer::spare_capacity(&mut buffer), offset) {
            Ok(_) => reply.data(&buffer),
            Err(error) => reply.error(errno(error)),
        }
    }

    #[rustfmt::skip] // else a line for each of its arguments
    fn write(
        &self, _: &Request, _: INodeNo, handle: FileHandle, offset: u64, data: &[u8], _: WriteFlags, _: OpenFlags,
        _: Option<LockOwner>, reply: ReplyWrite,
    ) {
        match rustix::io::pwrite(borrow(handle), data, offset) {
            Ok(count) => reply.written(count as u32),
            Err(error) => reply.error(errno(error)),
        }
    }

    #[rustfmt::skip] // else a line for each of its arguments
    fn release(
        &self, _: &Request, _: INodeNo, handle: FileHandle, _: OpenFlags, _: Option<LockOwner>, _: bool,
        reply: ReplyEmpty,
    ) {
        // SAFETY: it comes once for each handle, and none of its uses comes after it.
        drop(unsafe { OwnedFd::from_raw_fd(handle.0 as i32) });
        reply.ok();
    }

    fn opendir(&self, _: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        match self.list(ino) {
            Ok(listing) => {
                let listing = Arc::new(listing);
                // The address of what the table keeps alive: nobody else's.
                let handle = Arc::as_ptr(&listing) as u64;
                self.listings.lock().unwrap().insert(handle, listing);
                reply.opened(FileHandle(handle), FopenFlags::empty());
            }
            Err(error) => reply.error(error),
        }
    }

    fn readdir(&self, _: &Request, _: INodeNo, handle: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let Ok(listing) = self.listing(handle) else { return reply.error(Errno::EBADF) };
        for (index, (ino, kind, name)) in listing.iter().enumerate().skip(offset as usize) {
            if reply.add(INodeNo(*ino), index as u64 + 1, *kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn readdirplus(&self, _: &Request, ino: INodeNo, handle: FileHandle, offset: u64, mut reply: ReplyDirectoryPlus) {
        let (Ok(listing), Ok(directory)) = (self.listing(handle), self.directory(ino)) else {
            return reply.error(Errno::EBADF);
        };
        for (index, (_, _, name)) in listing.iter().enumerate().skip(offset as usize) {
            let dots = name == "." || name == "..";
            let attr = if dots { self.stat(ino, None) } else { self.find(&directory, name) };
            // Gone since the listing was made.
            let Ok(attr) = attr else { continue };
            if reply.add(attr.ino, index as u64 + 1, name, &TTL, &attr, Generation(0)) {
                if !dots {
                    self.give_back(attr.ino, 1);
                }
                break;
            }
        }
        reply.ok();
    }

    fn releasedir(&self, _: &Request, _: INodeNo, handle: FileHandle, _: OpenFlags, reply: ReplyEmpty) {
        self.listings.lock().unwrap().remove(&handle.0);
        reply.ok();
    }
}

fn main() -> std::io::Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, source, target] = arguments.as_slice() else {
        return Err(std::io::Error::other("usage: bench-fuser SOURCE MOUNTPOINT"));
    };
    let mut config = Config::default();
    rustix::process::umask(Mode::empty());
    config.mount_options = vec![
        MountOption::FSName("bench-fuser".into()),
        MountOption::Subtype("bench-fuser".into()),
        MountOption::DefaultPermissions,
    ];
    config.acl = if rustix::process::geteuid().is_root() { SessionACL::All } else { SessionACL::Owner };
    config.n_threads = Some(std::thread::available_parallelism()?.get().max(2));
    config.clone_fd = true;
    fuser::mount(Passthrough::new(source)?, target, &config)
}
