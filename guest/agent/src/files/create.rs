//! Everything that makes a new name: files of all types, directories, symlinks, hard links.

use super::attr::{PERMISSIONS, attr_of, stat};
use super::nodes::Node;
use super::open::io_flags;
use super::owner::create_as;
use super::resolve::check_name;
use super::xattr::proc_path;
use super::{Cancelled, FileService};
use machinefs_protocol::file::{Entry, Owner};
use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Uid, chownat, getxattr_query, linkat, makedev, mkdirat,
    mknodat, openat2, symlinkat,
};
use rustix::io::Errno;
use rustix::path::DecInt;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

/// Set group id: new entries of a directory with it belong to the directory's group.
const S_ISGID: u16 = 0o2000;
/// `S_IFMT` of inode(7).
const TYPE: u32 = 0o170000;

/// A new name and whom it belongs to.
#[derive(Clone, Copy)]
pub(super) struct NewFile<'a> {
    pub(super) parent: u64,
    pub(super) name: &'a [u8],
    pub(super) mode: u32,
    pub(super) umask: u32,
    pub(super) owner: Owner,
}

impl FileService {
    /// The mode for a creating call in that directory. The process's own umask is 0.
    ///
    /// A default ACL takes the umask's place (acl(5)); the kernel applies it, from the whole mode.
    fn masked(&self, dir: &OwnedFd, mode: u32, umask: u32) -> Mode {
        let mode = mode & PERMISSIONS;
        if mode & umask == 0 || getxattr_query(proc_path(dir), c"system.posix_acl_default").is_ok() {
            return Mode::from_raw_mode(mode);
        }
        Mode::from_raw_mode(mode & !umask)
    }

    pub(super) fn mkdir(&self, new: NewFile<'_>) -> Result<Entry, Errno> {
        check_name(new.name)?;
        let (dir, dir_fd) = self.directory(new.parent)?;
        let mode = self.masked(&dir_fd, new.mode, new.umask);
        let ((), as_root) = create_as(new.owner, || mkdirat(&dir_fd, new.name, mode))?;
        self.finish(&dir, &dir_fd, new.name, new.owner, as_root.then_some(mode), FileType::Directory)
    }

    pub(super) fn mknod(&self, new: NewFile<'_>, rdev: u64) -> Result<Entry, Errno> {
        check_name(new.name)?;
        let kind = match new.mode & TYPE {
            0 => FileType::RegularFile,
            bits => FileType::from_raw_mode(bits),
        };
        match kind {
            FileType::Directory => return Err(Errno::PERM),
            FileType::Symlink | FileType::Unknown => return Err(Errno::INVAL),
            _ => {}
        }
        let device = makedev((rdev >> 32) as u32, rdev as u32);
        let (dir, dir_fd) = self.directory(new.parent)?;
        let mode = self.masked(&dir_fd, new.mode, new.umask);
        let ((), as_root) = create_as(new.owner, || mknodat(&dir_fd, new.name, kind, mode, device))?;
        self.finish(&dir, &dir_fd, new.name, new.owner, as_root.then_some(mode), kind)
    }

    pub(super) fn symlink(&self, new: NewFile<'_>, target: &[u8]) -> Result<Entry, Errno> {
        check_name(new.name)?;
        let (dir, dir_fd) = self.directory(new.parent)?;
        let ((), as_root) = create_as(new.owner, || symlinkat(target, &dir_fd, new.name))?;
        let mode = as_root.then_some(Mode::empty());
        self.finish(&dir, &dir_fd, new.name, new.owner, mode, FileType::Symlink)
    }

    /// Holds what was just made; gives it away first when it was made as root (with that mode).
    fn finish(
        &self,
        dir: &Arc<Node>,
        dir_fd: &OwnedFd,
        name: &[u8],
        owner: Owner,
        as_root: Option<Mode>,
        kind: FileType,
    ) -> Result<Entry, Errno> {
        let (node, mut entry, fd) = self.hold_name(dir, dir_fd, name)?;
        if let Some(mode) = as_root {
            // Someone in the guest may have put another file under the name since.
            let ours = node.kind == kind && entry.attr.uid == 0 && (node.is_dir() || entry.attr.nlink == 1);
            if ours && let Err(errno) = self.give_to(&node, &fd, dir_fd, owner, mode) {
                self.table.forget(node.id, 1);
                return Err(errno);
            }
            entry.attr = attr_of(&stat(fd.as_fd())?, &self.inodes);
        }
        Ok(entry)
    }

    /// Gives a file that was made as root to its owner, as if they had made it.
    fn give_to(&self, node: &Node, fd: &OwnedFd, dir: &OwnedFd, owner: Owner, mode: Mode) -> Result<(), Errno> {
        let inherits = stat(dir.as_fd())?.stx_mode & S_ISGID != 0;
        let gid = (!inherits).then_some(Gid::from_raw(owner.gid));
        chownat(fd, c"", Some(Uid::from_raw(owner.uid)), gid, AtFlags::EMPTY_PATH)?;
        // A change of owner clears these.
        if node.kind == FileType::RegularFile && mode.intersects(Mode::SUID | Mode::SGID) {
            self.set_mode(node, fd, mode.as_raw_mode())?;
        }
        Ok(())
    }

    pub(super) fn link(&self, id: u64, parent: u64, name: &[u8]) -> Result<Entry, Errno> {
        check_name(name)?;
        let node = self.node(id)?;
        if node.is_dir() {
            return Err(Errno::PERM);
        }
        let fd = self.descriptor(&node)?;
        let (dir, dir_fd) = self.directory(parent)?;
        // AT_EMPTY_PATH would need CAP_DAC_READ_SEARCH; the link in /proc leads to the same file.
        linkat(&self.proc_fd, DecInt::from_fd(&fd), &dir_fd, name, AtFlags::SYMLINK_FOLLOW)?;
        Ok(self.hold(&fd, Some((&dir, name)))?.1)
    }

    /// Creates and opens; opens what is there already, unless `O_EXCL` is asked for.
    pub(super) fn create(&self, new: NewFile<'_>, flags: u32, cancel: &dyn Cancelled) -> Result<(Entry, u64), Errno> {
        check_name(new.name)?;
        self.check_room()?;
        let (dir, dir_fd) = self.directory(new.parent)?;
        let mode = self.masked(&dir_fd, new.mode, new.umask);
        // What is there already is opened by way of its node, which never opens a device or a FIFO.
        let how = io_flags(flags) | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
        let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        for _ in 0..3 {
            match create_as(new.owner, || self.with_room(|| openat2(&dir_fd, new.name, how, mode, resolve))) {
                Ok((fd, as_root)) => {
                    return self.opened(&dir_fd, fd, Some((&dir, new.name)), new.owner, as_root.then_some(mode), flags);
                }
                Err(Errno::EXIST) if !OFlags::from_bits_retain(flags).contains(OFlags::EXCL) => {}
                Err(errno) => return Err(errno),
            }
            let (node, mut entry, fd) = match self.hold_name(&dir, &dir_fd, new.name) {
                // Deleted in between.
                Err(Errno::NOENT) => continue,
                result => result?,
            };
            match self.open_node(&node, flags, false, cancel) {
                Ok(fh) => {
                    // O_TRUNC has changed it.
                    entry.attr = attr_of(&stat(fd.as_fd())?, &self.inodes);
                    return Ok((entry, fh));
                }
                Err(errno) => {
                    self.table.forget(node.id, 1);
                    return Err(errno);
                }
            }
        }
        Err(Errno::NOENT)
    }

    /// A file without a name, in the file system of that directory.
    pub(super) fn tmp_file(&self, new: NewFile<'_>, flags: u32) -> Result<(Entry, u64), Errno> {
        self.check_room()?;
        let (_, dir_fd) = self.directory(new.parent)?;
        let mode = self.masked(&dir_fd, new.mode, new.umask);
        // With O_EXCL it can never be linked (open(2)); here the flag has that meaning.
        let exclusive = OFlags::from_bits_retain(flags) & OFlags::EXCL;
        let how = (io_flags(flags) & !OFlags::TRUNC) | OFlags::TMPFILE | exclusive;
        let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let (fd, as_root) = create_as(new.owner, || self.with_room(|| openat2(&dir_fd, c".", how, mode, resolve)))?;
        self.opened(&dir_fd, fd, None, new.owner, as_root.then_some(mode), flags)
    }

    /// Holds a file that was just created and opened, and makes a handle of its descriptor.
    fn opened(
        &self,
        dir_fd: &OwnedFd,
        fd: OwnedFd,
        seen: Option<(&Arc<Node>, &[u8])>,
        owner: Owner,
        as_root: Option<Mode>,
        flags: u32,
    ) -> Result<(Entry, u64), Errno> {
        let fd = Arc::new(fd);
        let (node, mut entry) = self.hold(&fd, seen)?;
        if let Some(mode) = as_root {
            let given = self.give_to(&node, &fd, dir_fd, owner, mode).and_then(|()| stat(fd.as_fd()));
            match given {
                Ok(stx) => entry.attr = attr_of(&stx, &self.inodes),
                Err(errno) => {
                    self.table.forget(node.id, 1);
                    return Err(errno);
                }
            }
        }
        Ok((entry, self.add_file(node, fd, flags)))
    }
}
