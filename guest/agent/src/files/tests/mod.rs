//! The file service, called directly, on a directory of the real file system.

mod compare;
mod data;
mod identity;
mod listing;
mod locking;
mod names;
mod ownership;

use super::*;
use machinefs_protocol::file::{Attr, DirEntry, DirPage, Entry, Owner, ROOT, SetAttr};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// `F_UNLCK` and its like, and open flags, as the host sends them.
const O_RDONLY: u32 = 0;
const O_WRONLY: u32 = 1;
const O_RDWR: u32 = 2;
const O_EXCL: u32 = 0o200;
const O_TRUNC: u32 = 0o1000;
const O_APPEND: u32 = 0o2000;
const ROOT_OWNER: Owner = Owner { uid: 0, gid: 0 };

struct Never;

impl Cancelled for Never {
    fn is_cancelled(&self) -> bool {
        false
    }
}

/// A service on a temporary directory.
struct Guest {
    service: FileService,
    dir: TempDir,
}

fn errno<T: std::fmt::Debug>(result: Result<T, FileError>) -> Errno {
    result.unwrap_err().0
}

fn open_root(path: &Path) -> OwnedFd {
    open_path(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

impl Guest {
    fn new() -> Guest {
        let dir = tempfile::tempdir().unwrap();
        let service = FileService::new(open_root(dir.path())).unwrap();
        Guest { service, dir }
    }

    /// As in a user namespace: nothing can be opened by handle.
    fn without_handles(max_cached: usize) -> Guest {
        let dir = tempfile::tempdir().unwrap();
        let service = FileService::with_limits(open_root(dir.path()), max_cached, 1000).unwrap();
        service.dirs_by_handle.store(false, std::sync::atomic::Ordering::Relaxed);
        service.files_by_handle.store(false, std::sync::atomic::Ordering::Relaxed);
        Guest { service, dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn call(&self, request: FileRequest<'_>) -> Result<(FileReply, Vec<u8>), FileError> {
        self.service.handle(&request, &[], &Never)
    }

    fn ok(&self, request: FileRequest<'_>) -> Result<(), FileError> {
        match self.call(request)?.0 {
            FileReply::Ok => Ok(()),
            other => panic!("{other:?}"),
        }
    }

    fn entry(&self, request: FileRequest<'_>) -> Result<Entry, FileError> {
        match self.call(request)?.0 {
            FileReply::Entry(entry) => Ok(entry),
            other => panic!("{other:?}"),
        }
    }

    fn lookup(&self, parent: u64, name: impl AsRef<[u8]>) -> Result<Entry, FileError> {
        self.entry(FileRequest::Lookup { parent, name: name.as_ref() })
    }

    fn attr(&self, node: u64) -> Result<Attr, FileError> {
        self.attr_of(FileRequest::GetAttr { node, fh: None })
    }

    fn attr_of(&self, request: FileRequest<'_>) -> Result<Attr, FileError> {
        match self.call(request)?.0 {
            FileReply::Attr(attr) => Ok(attr),
            other => panic!("{other:?}"),
        }
    }

    fn set(&self, node: u64, fh: Option<u64>, set: SetAttr) -> Result<Attr, FileError> {
        self.attr_of(FileRequest::SetAttr { node, fh, set })
    }

    fn create(&self, parent: u64, name: impl AsRef<[u8]>, flags: u32) -> Result<(Entry, u64), FileError> {
        self.create_mode(parent, name.as_ref(), 0o644, 0, flags, ROOT_OWNER)
    }

    fn create_mode(
        &self,
        parent: u64,
        name: &[u8],
        mode: u32,
        umask: u32,
        flags: u32,
        owner: Owner,
    ) -> Result<(Entry, u64), FileError> {
        match self.call(FileRequest::Create { parent, name, mode, umask, flags, owner })?.0 {
            FileReply::Created(entry, fh) => Ok((entry, fh)),
            other => panic!("{other:?}"),
        }
    }

    fn mkdir(&self, parent: u64, name: impl AsRef<[u8]>) -> Result<Entry, FileError> {
        let name = name.as_ref();
        self.entry(FileRequest::MkDir { parent, name, mode: 0o755, umask: 0, owner: ROOT_OWNER })
    }

    fn open(&self, node: u64, flags: u32) -> Result<u64, FileError> {
        match self.call(FileRequest::Open { node, flags, kill_suidgid: false })?.0 {
            FileReply::Opened(fh) => Ok(fh),
            other => panic!("{other:?}"),
        }
    }

    fn read(&self, fh: u64, offset: u64, size: u32) -> Result<Vec<u8>, FileError> {
        Ok(self.call(FileRequest::Read { fh, offset, size })?.1)
    }

    fn write(&self, fh: u64, offset: u64, data: &[u8]) -> Result<u32, FileError> {
        self.write_kill(fh, offset, data, false)
    }

    fn write_kill(&self, fh: u64, offset: u64, data: &[u8], kill_suidgid: bool) -> Result<u32, FileError> {
        match self.service.handle(&FileRequest::Write { fh, offset, kill_suidgid }, data, &Never)?.0 {
            FileReply::Count(count) => Ok(count),
            other => panic!("{other:?}"),
        }
    }

    fn unlink(&self, parent: u64, name: impl AsRef<[u8]>) -> Result<(), FileError> {
        self.ok(FileRequest::Unlink { parent, name: name.as_ref() })
    }

    fn rmdir(&self, parent: u64, name: impl AsRef<[u8]>) -> Result<(), FileError> {
        self.ok(FileRequest::RmDir { parent, name: name.as_ref() })
    }

    fn rename(&self, from: (u64, impl AsRef<[u8]>), to: (u64, impl AsRef<[u8]>), flags: u32) -> Result<(), FileError> {
        let (name, new_name) = (from.1.as_ref(), to.1.as_ref());
        self.ok(FileRequest::Rename { parent: from.0, name, new_parent: to.0, new_name, flags })
    }

    fn link(&self, node: u64, new_parent: u64, new_name: impl AsRef<[u8]>) -> Result<Entry, FileError> {
        self.entry(FileRequest::Link { node, new_parent, new_name: new_name.as_ref() })
    }

    /// Makes a file with that content and closes it.
    fn file(&self, parent: u64, name: impl AsRef<[u8]>, content: &[u8]) -> Entry {
        let (entry, fh) = self.create(parent, name, O_RDWR).unwrap();
        assert_eq!(self.write(fh, 0, content).unwrap() as usize, content.len());
        self.service.release(fh, 0);
        entry
    }

    fn content(&self, node: u64) -> Vec<u8> {
        let fh = self.open(node, O_RDONLY).unwrap();
        let data = self.read(fh, 0, 1 << 20).unwrap();
        self.service.release(fh, 0);
        data
    }

    /// Gives up all cached descriptors.
    fn evict(&self) {
        self.service.cache.retain(|_| false);
    }
}

/// An entry of a page, by value.
#[derive(Clone, Debug)]
struct Listed {
    cookie: u64,
    ino: u64,
    kind: u8,
    name: Vec<u8>,
    entry: Option<Entry>,
}

fn decode(page: DirPage, mut body: &[u8]) -> Vec<Listed> {
    let mut listed = Vec::new();
    while !body.is_empty() {
        let (DirEntry { cookie, ino, kind, name, entry }, rest) = postcard::take_from_bytes(body).unwrap();
        listed.push(Listed { cookie, ino, kind, name: name.to_vec(), entry });
        body = rest;
    }
    assert_eq!(listed.len(), page.count as usize);
    listed
}

/// How many descriptors this process has open.
fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}
