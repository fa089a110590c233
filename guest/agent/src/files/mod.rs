//! The file service: the guest's file system, for the host.
//!
//! It works on descriptors and single names, never on paths. Each subject has its file:
//!
//! - `identity`: what makes a file the same file · `nodes`: the files the host holds · `sharded`: their tables
//! - `resolve`: from a node to a descriptor and back · `cache`: the bounded cache of descriptors
//! - `attr`, `inode`: attributes, inode numbers · `dir`: listings · `xattr`
//! - `create`, `owner`, `remove`: names that come and go · `open`, `io`, `locks`: open files

mod attr;
mod cache;
mod create;
mod dir;
mod identity;
mod inode;
mod io;
mod locks;
mod nodes;
mod open;
mod owner;
mod remove;
mod resolve;
mod sharded;
#[cfg(test)]
mod tests;
mod xattr;

use cache::DescriptorCache;
use create::NewFile;
use identity::{Identifier, mount_of};
use inode::Inodes;
use locks::LockTable;
use machinefs_protocol::file::{FileReply, FileRequest};
use machinefs_protocol::message::Failure;
use nodes::Table;
use open::Handle;
use rustix::fs::{AtFlags, Mode, OFlags, open as open_path, openat};
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit, umask};
use sharded::Sharded;
use std::io as std_io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
use thiserror::Error;

/// Tells an operation that it is not wanted any more.
///
/// Operations that wait (locks, opens delayed by a lease, long copies) ask about every 20 ms and then fail with
/// EINTR. A system call that waits in the guest's kernel ends only by a signal, which is the caller's business (a
/// handler that does nothing, without `SA_RESTART`); it fails with EINTR too.
pub trait Cancelled: Sync {
    /// Whether the operation was given up. Never goes back to false for the same operation.
    fn is_cancelled(&self) -> bool;
}

/// Why a file operation failed: an errno of the guest's kernel, or of the checks before it.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("{0}")]
pub struct FileError(pub Errno);

impl FileError {
    /// The errno's number.
    pub fn errno(&self) -> i32 {
        self.0.raw_os_error()
    }
}

impl From<FileError> for Failure {
    fn from(error: FileError) -> Failure {
        Failure { errno: error.errno(), message: String::new() }
    }
}

/// At most so many descriptors are cached.
const MAX_CACHED: usize = 8192;
/// Descriptors that are left to the rest of the agent.
const RESERVED: usize = 512;

/// The guest's files. All methods may be called from many threads at once.
pub struct FileService {
    identifier: Identifier,
    table: Table,
    cache: DescriptorCache,
    inodes: Inodes,
    handles: Sharded<Handle>,
    next_handle: AtomicU64,
    /// How many handles are open, also those that only a running operation still uses.
    open_handles: Arc<AtomicUsize>,
    max_handles: usize,
    locks: LockTable,
    /// The root, open for reading: some calls do not take a descriptor that is a place only.
    root_dir: OwnedFd,
    /// /proc/self/fd: the way from a place to an open file.
    proc_fd: OwnedFd,
    /// Whether open_by_handle_at(2) may work on the root's mount: true until it is refused.
    dirs_by_handle: AtomicBool,
    files_by_handle: AtomicBool,
}

impl FileService {
    /// A service for the files below that directory. Needs /proc, and is meant to run as root.
    ///
    /// Sets the process's umask to 0, since modes come with the host's umask: whoever starts programs sets theirs.
    /// The numbers of descriptors kept and of handles follow from the soft `RLIMIT_NOFILE` at this moment.
    pub fn new(root: OwnedFd) -> std_io::Result<Self> {
        let files = getrlimit(Resource::Nofile).current.map_or(usize::MAX, |limit| limit as usize);
        let max_cached = (files / 2).min(MAX_CACHED);
        Self::with_limits(root, max_cached, (files - max_cached).saturating_sub(RESERVED.min(files / 8)))
    }

    fn with_limits(root: OwnedFd, max_cached: usize, max_handles: usize) -> std_io::Result<Self> {
        umask(Mode::empty());
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let proc_fd = open_path(c"/proc/self/fd", flags, Mode::empty())?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root_dir = openat(&root, c".", flags, Mode::empty())?;
        let identifier = Identifier::new();
        let stx = attr::stat(root.as_fd())?;
        let key = identifier.key(root.as_fd(), Some(&stx))?;
        let inodes = Inodes::new(attr::device_of(&stx));
        let steady = inodes.is_steady(mount_of(key.as_bytes()), root.as_fd());
        let table = Table::new(root, &key, steady);
        Ok(FileService {
            identifier,
            cache: DescriptorCache::new(max_cached.max(1), table.shared.clone()),
            table,
            inodes,
            handles: Sharded::new(),
            next_handle: AtomicU64::new(1),
            open_handles: Arc::default(),
            max_handles,
            locks: LockTable::default(),
            root_dir,
            proc_fd,
            dirs_by_handle: AtomicBool::new(true),
            files_by_handle: AtomicBool::new(true),
        })
    }

    /// Carries out one operation. `body` is what came with the request; the bytes of the answer come with the reply.
    pub fn handle(
        &self,
        request: &FileRequest<'_>,
        body: &[u8],
        cancel: &dyn Cancelled,
    ) -> Result<(FileReply, Vec<u8>), FileError> {
        self.dispatch(request, body, cancel).map_err(FileError)
    }

    fn dispatch(
        &self,
        request: &FileRequest<'_>,
        body: &[u8],
        cancel: &dyn Cancelled,
    ) -> Result<(FileReply, Vec<u8>), Errno> {
        let reply = match *request {
            FileRequest::Lookup { parent, name } => FileReply::Entry(self.lookup(parent, name)?),
            FileRequest::GetAttr { node, fh } => FileReply::Attr(self.get_attr(node, fh)?),
            FileRequest::SetAttr { node, fh, ref set } => FileReply::Attr(self.set_attr(node, fh, set)?),
            FileRequest::ReadLink { node } => return Ok((FileReply::Data, self.read_link(node)?)),
            FileRequest::SymLink { parent, name, target, owner } => {
                FileReply::Entry(self.symlink(NewFile { parent, name, mode: 0, umask: 0, owner }, target)?)
            }
            FileRequest::MkNod { parent, name, mode, umask, rdev, owner } => {
                FileReply::Entry(self.mknod(NewFile { parent, name, mode, umask, owner }, rdev)?)
            }
            FileRequest::MkDir { parent, name, mode, umask, owner } => {
                FileReply::Entry(self.mkdir(NewFile { parent, name, mode, umask, owner })?)
            }
            FileRequest::Unlink { parent, name } => done(self.unlink(parent, name, AtFlags::empty()))?,
            FileRequest::RmDir { parent, name } => done(self.unlink(parent, name, AtFlags::REMOVEDIR))?,
            FileRequest::Rename { parent, name, new_parent, new_name, flags } => {
                done(self.rename((parent, name), (new_parent, new_name), flags))?
            }
            FileRequest::Link { node, new_parent, new_name } => {
                FileReply::Entry(self.link(node, new_parent, new_name)?)
            }
            FileRequest::Open { node, flags, kill_suidgid } => {
                FileReply::Opened(self.open(node, flags, kill_suidgid, cancel)?)
            }
            FileRequest::Create { parent, name, mode, umask, flags, owner } => {
                let (entry, fh) = self.create(NewFile { parent, name, mode, umask, owner }, flags, cancel)?;
                FileReply::Created(entry, fh)
            }
            FileRequest::TmpFile { parent, mode, umask, flags, owner } => {
                let (entry, fh) = self.tmp_file(NewFile { parent, name: b"", mode, umask, owner }, flags)?;
                FileReply::Created(entry, fh)
            }
            FileRequest::Read { fh, offset, size } => return Ok((FileReply::Data, self.read(fh, offset, size)?)),
            FileRequest::Write { fh, offset, kill_suidgid } => {
                FileReply::Count(self.write(fh, offset, body, kill_suidgid)?)
            }
            FileRequest::Flush { fh, owner } => done(self.flush(fh, owner))?,
            FileRequest::Fsync { fh, data_only } => done(self.fsync(fh, data_only))?,
            FileRequest::OpenDir { node, max, plus } => {
                let (fh, page, entries) = self.open_dir(node, max, plus)?;
                return Ok((FileReply::OpenedDir(fh, page), entries));
            }
            FileRequest::ReadDir { fh, cookie, max, plus } => {
                let (page, entries) = self.read_dir(fh, cookie, max, plus)?;
                return Ok((FileReply::Dir(page), entries));
            }
            FileRequest::StatFs { node } => FileReply::StatFs(self.stat_fs(node)?),
            FileRequest::GetXattr { node, name, max } => return self.get_xattr(node, name, max),
            FileRequest::ListXattr { node, max } => return self.list_xattr(node, max),
            FileRequest::SetXattr { node, name, flags } => done(self.set_xattr(node, name, flags, body))?,
            FileRequest::RemoveXattr { node, name } => done(self.remove_xattr(node, name))?,
            FileRequest::Fallocate { fh, offset, len, mode } => done(self.fallocate(fh, offset, len, mode))?,
            FileRequest::Seek { fh, offset, whence } => FileReply::Offset(self.seek(fh, offset, whence)?),
            FileRequest::CopyRange { from, from_offset, to, to_offset, len } => {
                FileReply::Count(self.copy_range((from, from_offset), (to, to_offset), len, cancel)?)
            }
            FileRequest::GetLock { fh, owner, ref lock } => FileReply::Lock(self.get_lock(fh, owner, lock)?),
            FileRequest::SetLock { fh, ref lock, flock: true, wait, .. } => {
                done(self.set_flock(fh, lock.kind, wait, cancel))?
            }
            FileRequest::SetLock { fh, owner, ref lock, flock: false, wait } => {
                done(self.set_lock(fh, owner, lock, wait, cancel))?
            }
            FileRequest::SyncFs => done(self.sync_fs())?,
        };
        Ok((reply, Vec::new()))
    }

    /// Gives up holds: pairs of node and count.
    pub fn forget(&self, holds: &[(u64, u64)]) {
        for &(node, count) in holds {
            self.table.forget(node, count);
        }
    }

    /// A new session of the host: drops all nodes, handles and locks. Numbers are not used again.
    ///
    /// What an operation of the old session does after this call stays; call it once they have ended.
    pub fn reset(&self) {
        for fh in self.handles.ids() {
            match self.handles.get(fh) {
                Some(Handle::File(_)) => self.release(fh, 0),
                Some(Handle::Dir(_)) => self.release_dir(fh),
                None => {}
            }
        }
        self.locks.clear();
        self.table.clear();
    }

    /// Gives up the cached descriptors of mounts other than the root's, which would keep the guest from unmounting
    /// them (EBUSY). Cheap; called for each ping, so every few seconds.
    pub fn trim(&self) {
        let root = self.table.root().mount();
        self.cache.retain(|node| node.mount() == root);
    }
}

fn done(result: Result<(), Errno>) -> Result<FileReply, Errno> {
    result.map(|()| FileReply::Ok)
}
