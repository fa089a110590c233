//! From a node to a descriptor of its file, and from a descriptor to a node.
//!
//! In this order: a descriptor at hand (pinned, cached, or of an open handle); for directories, the file handle, where
//! this process may open one (not inside a user namespace); the last known name in the parent, which is resolved the
//! same way, and the identity of what is found there; the file handle. A file that is none of these is ESTALE, upon
//! which the host's kernel looks its path up again.
//!
//! The name comes before the handle for everything but directories because what is opened by handle may not be
//! connected to its directory, and watchers of that directory in the guest would then not hear of changes.

use super::FileService;
use super::attr::{attr_of, stat};
use super::identity::{Key, birth_of, mount_of, open_by_key};
use super::nodes::{Link, MAX_DEPTH, Node};
use machinefs_protocol::file::Entry;
use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, openat, openat2};
use rustix::io::Errno;
use rustix::path::DecInt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// The longest name, in bytes (`NAME_MAX`).
const NAME_MAX: usize = 255;

/// Refuses whatever is not the name of an entry: EINVAL, or ENAMETOOLONG.
pub(super) fn check_name(name: &[u8]) -> Result<(), Errno> {
    if name.len() > NAME_MAX {
        return Err(Errno::NAMETOOLONG);
    }
    if name.is_empty() || name == b"." || name == b".." || name.iter().any(|&byte| byte == b'/' || byte == 0) {
        return Err(Errno::INVAL);
    }
    Ok(())
}

impl FileService {
    /// The node of that number; ESTALE when the host does not hold it.
    pub(super) fn node(&self, id: u64) -> Result<Arc<Node>, Errno> {
        self.table.get(id).ok_or(Errno::STALE)
    }

    /// A directory node and a descriptor of it.
    pub(super) fn directory(&self, id: u64) -> Result<(Arc<Node>, Arc<OwnedFd>), Errno> {
        let node = self.node(id)?;
        if !node.is_dir() {
            return Err(Errno::NOTDIR);
        }
        let fd = self.descriptor(&node)?;
        Ok((node, fd))
    }

    /// A descriptor of the node's file. It may be `O_PATH` or open for anything: use it as a place, not for its data.
    pub(super) fn descriptor(&self, node: &Arc<Node>) -> Result<Arc<OwnedFd>, Errno> {
        let mut attempts = 0;
        loop {
            if let Some(fd) = at_hand(node) {
                return Ok(fd);
            }
            let before = node.link();
            let result = self.resolve(node);
            attempts += 1;
            // A rename by another worker may have come between reading the name and looking it up.
            if result.is_ok() || attempts == 3 || same_link(before.as_ref(), node.link().as_ref()) {
                return result;
            }
        }
    }

    fn resolve(&self, node: &Arc<Node>) -> Result<Arc<OwnedFd>, Errno> {
        let root = self.table.root();
        let root_fd = at_hand(root).ok_or(Errno::STALE)?;
        // Up, to the first directory that can be had directly.
        let mut steps: Vec<(Arc<Node>, Option<Link>)> = Vec::new();
        let mut current = node.clone();
        let mut base = loop {
            if let Some(fd) = at_hand(&current) {
                break fd;
            }
            if current.is_dir()
                && current.mount() == root.mount()
                && let Ok(fd) = self.open_by_handle(&self.root_dir, &current)
            {
                break self.keep(&current, fd);
            }
            let link = current.link();
            let parent = link.as_ref().map(|link| link.parent.clone());
            steps.push((current, link));
            match parent {
                Some(parent) if steps.len() < MAX_DEPTH => current = parent,
                Some(_) => return Err(Errno::STALE),
                // Without a name there is only the handle.
                None => break root_fd,
            }
        };
        // Down again, checking each step.
        while let Some((step, link)) = steps.pop() {
            let by_name = link.map_or(Err(Errno::STALE), |link| self.open_verified(&base, &link.name, &step));
            let fd = match by_name {
                Ok(fd) => fd,
                Err(Errno::STALE) => self.open_lost(&base, &step).map_err(|_| Errno::STALE)?,
                Err(errno) => return Err(errno),
            };
            base = self.keep(&step, fd);
        }
        Ok(base)
    }

    /// What the name now means in that directory, if it is that node; else ESTALE.
    fn open_verified(&self, dir: &OwnedFd, name: &[u8], node: &Node) -> Result<OwnedFd, Errno> {
        let fd = match self.open_name(dir.as_fd(), name) {
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Err(Errno::STALE),
            result => result?,
        };
        let key = self.identifier.key(fd.as_fd(), None)?;
        if key.as_bytes() == node.key() && key.birth == node.place().birth { Ok(fd) } else { Err(Errno::STALE) }
    }

    /// A file that is not where it was, by its handle. `near` is a directory that may be on its mount.
    fn open_lost(&self, near: &OwnedFd, node: &Node) -> Result<OwnedFd, Errno> {
        if node.mount() == self.table.root().mount() {
            return self.open_by_handle(&self.root_dir, node);
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let mount = self.with_room(|| openat(near, c".", flags, Mode::empty()))?;
        self.open_by_handle(&mount, node)
    }

    /// `mount` is open for reading: the kernel takes nothing less here.
    fn open_by_handle(&self, mount: &OwnedFd, node: &Node) -> Result<OwnedFd, Errno> {
        let allowed = if node.is_dir() { &self.dirs_by_handle } else { &self.files_by_handle };
        if !allowed.load(Ordering::Relaxed) {
            return Err(Errno::OPNOTSUPP);
        }
        let fd = match self.with_room(|| open_by_key(mount.as_fd(), node.key())) {
            Ok(fd) => fd,
            Err(errno) => {
                // ENOTDIR: newer kernels let a user namespace open directories only.
                let never = matches!(errno, Errno::PERM | Errno::NOTDIR | Errno::NOSYS);
                if never && node.mount() == self.table.root().mount() {
                    allowed.store(false, Ordering::Relaxed);
                }
                return Err(errno);
            }
        };
        // `mount` may have been of another mount than the node.
        if self.identifier.key(fd.as_fd(), None)?.as_bytes() == node.key() { Ok(fd) } else { Err(Errno::STALE) }
    }

    /// One name in a directory, without following it, and whatever is mounted there.
    pub(super) fn open_name(&self, dir: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd, Errno> {
        self.with_room(|| {
            openat2(
                dir,
                name,
                OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
                Mode::empty(),
                ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS,
            )
        })
    }

    /// Opens the file behind a descriptor anew. Only for regular files and directories: opening anything else acts.
    pub(super) fn reopen(&self, fd: &OwnedFd, flags: OFlags) -> Result<OwnedFd, Errno> {
        self.with_room(|| openat(&self.proc_fd, DecInt::from_fd(fd), flags | OFlags::CLOEXEC, Mode::empty()))
    }

    /// Repeats a call that ran out of descriptors once some of the cache have been given up.
    pub(super) fn with_room<T>(&self, call: impl Fn() -> Result<T, Errno>) -> Result<T, Errno> {
        match call() {
            Err(Errno::MFILE | Errno::NFILE) => {
                self.cache.give_way();
                call()
            }
            result => result,
        }
    }

    fn keep(&self, node: &Arc<Node>, fd: OwnedFd) -> Arc<OwnedFd> {
        let fd = Arc::new(fd);
        self.cache.put(node, fd.clone());
        fd
    }

    /// Looks a name up and holds what it means once more.
    pub(super) fn lookup(&self, parent: u64, name: &[u8]) -> Result<Entry, Errno> {
        check_name(name)?;
        let (dir, dir_fd) = self.directory(parent)?;
        Ok(self.hold_name(&dir, &dir_fd, name)?.1)
    }

    /// Holds what the name means in that directory once more.
    pub(super) fn hold_name(
        &self,
        dir: &Arc<Node>,
        dir_fd: &OwnedFd,
        name: &[u8],
    ) -> Result<(Arc<Node>, Entry, Arc<OwnedFd>), Errno> {
        let fd = Arc::new(self.open_name(dir_fd.as_fd(), name)?);
        let (node, entry) = self.hold(&fd, Some((dir, name)))?;
        self.cache.put(&node, fd.clone());
        Ok((node, entry, fd))
    }

    /// Holds the file behind a descriptor once more, as one seen under that name.
    pub(super) fn hold(
        &self,
        fd: &Arc<OwnedFd>,
        seen: Option<(&Arc<Node>, &[u8])>,
    ) -> Result<(Arc<Node>, Entry), Errno> {
        let stx = stat(fd.as_fd())?;
        let key = self.identifier.key(fd.as_fd(), Some(&stx))?;
        let steady = self.inodes.is_steady(mount_of(key.as_bytes()), fd.as_fd());
        if key.birth.is_some() {
            // Takes a node out of the way whose file is gone and whose number this file has now.
            self.find(&key);
        }
        let node = self.table.hold(&key, FileType::from_raw_mode(stx.stx_mode.into()), steady);
        if let Some((parent, name)) = seen {
            node.set_link(parent, name);
            if stx.stx_nlink == 0 && steady {
                // Deleted since its name was read: this descriptor is the last way to it.
                self.pin(&node, fd);
            } else if node.id != self.table.root().id {
                // It has a name (again), so it can be found without a pin.
                let pin = node.place().pin.take();
                if let Some(pin) = pin {
                    self.cache.put(&node, pin);
                }
            }
        }
        let entry = Entry { node: node.id, generation: node.generation, attr: attr_of(&stx, &self.inodes) };
        Ok((node, entry))
    }

    /// The living node of that file, if there is one.
    pub(super) fn find(&self, key: &Key) -> Option<Arc<Node>> {
        let node = self.table.find(key.as_bytes())?;
        if node.place().birth == key.birth {
            return Some(node);
        }
        // Either another file, or the same that an overlay has copied up; a descriptor from before knows.
        let now = at_hand(&node).and_then(|fd| stat(fd.as_fd()).ok());
        if now.is_some_and(|stx| stx.stx_nlink > 0 && birth_of(&stx) == key.birth) {
            node.place().birth = key.birth;
            return Some(node);
        }
        self.table.retire(&node);
        None
    }

    /// Keeps a way to a file that has no name any more, unless it has an open handle, which is one.
    pub(super) fn pin(&self, node: &Arc<Node>, fd: &Arc<OwnedFd>) {
        let mut place = node.place();
        if place.pin.is_none() && place.open.iter().all(|open| open.strong_count() == 0) {
            place.pin = Some(fd.clone());
        }
        let link = place.link.take();
        drop(place);
        drop(link);
    }

    /// The living node of the file that a name means, without holding it, and its descriptor.
    pub(super) fn peek(&self, dir: &OwnedFd, name: &[u8]) -> Result<(Arc<OwnedFd>, Key), Errno> {
        let fd = self.open_name(dir.as_fd(), name)?;
        let key = self.identifier.key(fd.as_fd(), None)?;
        Ok((Arc::new(fd), key))
    }
}

/// A descriptor of the node's file that is open already.
fn at_hand(node: &Node) -> Option<Arc<OwnedFd>> {
    let place = node.place();
    if let Some(fd) = &place.pin {
        return Some(fd.clone());
    }
    if let Some(fd) = &place.cached {
        node.used.store(true, Ordering::Relaxed);
        return Some(fd.clone());
    }
    place.open.iter().find_map(|open| open.upgrade())
}

fn same_link(a: Option<&Link>, b: Option<&Link>) -> bool {
    match (a, b) {
        (None, None) => true,
        (Some(a), Some(b)) => Arc::ptr_eq(&a.parent, &b.parent) && a.name == b.name,
        _ => false,
    }
}
