//! A file system in memory, in which chosen operations are left pending.

use super::stream::Stream;
use machinefs::errno::Errno;
use machinefs::tree::ops::*;
use parking_lot::{Condvar, Mutex};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

/// SEEK_DATA and SEEK_HOLE from here lead back to the beginning.
pub const BACKWARDS: u64 = 4242;

pub enum Content {
    Directory(BTreeMap<Vec<u8>, NodeId>),
    File(Vec<u8>),
    Link(Vec<u8>),
    Special,
    Stream(Arc<Stream>),
}

pub struct Node {
    pub content: Content,
    pub attr: Attr,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub opened: Opened,
    pub attr_ttl: Duration,
    pub entry_ttl: Duration,
    pub holds: u64,
    parent: NodeId,
}

/// Which operation is left pending, and what becomes of it.
pub struct Plan {
    pub matches: Box<dyn Fn(&Op<'_>) -> bool + Send + Sync>,
    /// Answers at an interrupt.
    pub obeys: bool,
}

/// An operation that is left pending.
pub struct Pending {
    responder: Mutex<Option<Responder>>,
    obeys: bool,
    pub timed_out: Mutex<bool>,
    pub cancelled: Mutex<bool>,
}

impl Cancel for Pending {
    fn cancel(&self) {
        *self.cancelled.lock() = true;
        if self.obeys
            && let Some(responder) = self.responder.lock().take()
        {
            responder.respond(Err(Errno::EINTR));
        }
    }
}

impl Pending {
    /// Its deadline is over.
    pub fn expire(&self) {
        if let Some(responder) = self.responder.lock().take() {
            *self.timed_out.lock() = true;
            responder.respond(Err(Errno::ETIMEDOUT));
        }
    }
}

#[derive(Default)]
pub struct Fake {
    pub nodes: Mutex<HashMap<NodeId, Node>>,
    next: AtomicU64,
    plan: Mutex<Option<Plan>>,
    pub pending: Mutex<Vec<Arc<Pending>>>,
    changed: Condvar,
    pub transfers: AtomicUsize,
    pub open_handles: AtomicUsize,
}

impl Fake {
    pub fn new() -> Arc<Self> {
        let fake = Fake { next: AtomicU64::new(ROOT), ..Default::default() };
        fake.insert(ROOT, Content::Directory(BTreeMap::new()), libc::S_IFDIR | 0o755, Caller::default());
        Arc::new(fake)
    }

    fn insert(&self, parent: NodeId, content: Content, mode: u32, caller: Caller) -> NodeId {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let now = std::time::SystemTime::now().into();
        let size = match &content {
            Content::File(data) | Content::Link(data) => data.len() as u64,
            Content::Stream(_) => 1,
            _ => 0,
        };
        let attr = Attr {
            ino: id,
            size,
            mode,
            nlink: 1,
            uid: caller.uid,
            gid: caller.gid,
            atime: now,
            mtime: now,
            ctime: now,
            blksize: 4096,
            ..Attr::default()
        };
        let node = Node {
            content,
            attr,
            xattrs: BTreeMap::new(),
            opened: Opened::default(),
            attr_ttl: Duration::ZERO,
            entry_ttl: Duration::ZERO,
            holds: 0,
            parent,
        };
        self.nodes.lock().insert(id, node);
        id
    }

    /// Adds a name; gives its node.
    pub fn add(&self, parent: NodeId, name: &[u8], content: Content) -> NodeId {
        let mode = match &content {
            Content::Directory(_) => libc::S_IFDIR | 0o755,
            Content::Link(_) => libc::S_IFLNK | 0o777,
            Content::Special => libc::S_IFIFO | 0o644,
            _ => libc::S_IFREG | 0o644,
        };
        let id = self.insert(parent, content, mode, Caller::default());
        self.entries(parent, |entries| entries.insert(name.to_vec(), id)).unwrap();
        id
    }

    pub fn set(&self, node: NodeId, change: impl FnOnce(&mut Node)) {
        change(self.nodes.lock().get_mut(&node).unwrap());
    }

    /// The next operation that matches is left pending.
    pub fn plan(&self, plan: Plan) {
        *self.plan.lock() = Some(plan);
    }

    /// Waits until the planned operation has come.
    pub fn wait_pending(&self) -> Arc<Pending> {
        let mut pending = self.pending.lock();
        while pending.is_empty() {
            let timed_out = self.changed.wait_for(&mut pending, Duration::from_secs(20)).timed_out();
            assert!(!timed_out || !pending.is_empty(), "the planned operation never came");
        }
        pending[0].clone()
    }

    /// Answers everything that is pending.
    pub fn expire_all(&self) {
        let pending = self.pending.lock().clone();
        pending.iter().for_each(|pending| pending.expire());
    }

    fn leave_pending(&self, plan: Plan, mut responder: Responder) {
        let pending = Arc::new(Pending {
            responder: Mutex::new(None),
            obeys: plan.obeys,
            timed_out: Mutex::new(false),
            cancelled: Mutex::new(false),
        });
        let mut slot = pending.responder.lock();
        let interrupted = !responder.set_cancel(pending.clone());
        *pending.cancelled.lock() = interrupted;
        if interrupted && plan.obeys {
            responder.respond(Err(Errno::EINTR));
        } else {
            *slot = Some(responder);
        }
        drop(slot);
        self.pending.lock().push(pending);
        self.changed.notify_all();
    }

    fn entries<T>(
        &self,
        directory: NodeId,
        change: impl FnOnce(&mut BTreeMap<Vec<u8>, NodeId>) -> T,
    ) -> Result<T, Errno> {
        match self.nodes.lock().get_mut(&directory).map(|node| &mut node.content) {
            Some(Content::Directory(entries)) => Ok(change(entries)),
            Some(_) => Err(Errno::ENOTDIR),
            None => Err(Errno::ESTALE),
        }
    }

    fn child(&self, parent: NodeId, name: &[u8]) -> Result<NodeId, Errno> {
        match name {
            b"." => Ok(parent),
            b".." => self.nodes.lock().get(&parent).map(|node| node.parent).ok_or(Errno::ESTALE),
            _ => self.entries(parent, |entries| entries.get(name).copied())?.ok_or(Errno::ENOENT),
        }
    }

    fn make(&self, parent: NodeId, name: &[u8], content: Content, mode: u32, caller: Caller) -> Result<Entry, Errno> {
        if self.child(parent, name).is_ok() {
            return Err(Errno::EEXIST);
        }
        let id = self.insert(parent, content, mode, caller);
        self.entries(parent, |entries| entries.insert(name.to_vec(), id))?;
        self.entry(id)
    }

    fn entry(&self, id: NodeId) -> Result<Entry, Errno> {
        let mut nodes = self.nodes.lock();
        let node = nodes.get_mut(&id).ok_or(Errno::ENOENT)?;
        node.holds += 1;
        Ok(Entry { node: id, generation: 1, attr: node.attr, entry_ttl: node.entry_ttl, attr_ttl: node.attr_ttl })
    }

    fn node<T>(&self, id: NodeId, with: impl FnOnce(&mut Node) -> Result<T, Errno>) -> Result<T, Errno> {
        with(self.nodes.lock().get_mut(&id).ok_or(Errno::ESTALE)?)
    }

    fn file<T>(&self, id: NodeId, with: impl FnOnce(&mut Vec<u8>) -> T) -> Result<T, Errno> {
        self.node(id, |node| match &mut node.content {
            Content::File(data) => {
                let result = with(data);
                node.attr.size = data.len() as u64;
                Ok(result)
            }
            _ => Err(Errno::EINVAL),
        })
    }

    fn set_attr(&self, node: NodeId, set: SetAttr) -> Result<Answer, Errno> {
        if let Some(size) = set.size {
            match self.file(node, |data| data.resize(size as usize, 0)) {
                Err(Errno::EINVAL) => {}
                other => other?,
            }
        }
        self.node(node, |node| {
            let attr = &mut node.attr;
            attr.mode = set.mode.map_or(attr.mode, |mode| (attr.mode & libc::S_IFMT) | (mode & 0o7777));
            attr.uid = set.uid.unwrap_or(attr.uid);
            attr.gid = set.gid.unwrap_or(attr.gid);
            let at = |time: Option<SetTime>, old| match time {
                Some(SetTime::At(time)) => time,
                Some(SetTime::Now) => std::time::SystemTime::now().into(),
                None => old,
            };
            attr.atime = at(set.atime, attr.atime);
            attr.mtime = at(set.mtime, attr.mtime);
            Ok(Answer::Attr(*attr, node.attr_ttl))
        })
    }

    fn read_dir(&self, directory: NodeId, cookie: u64, max: usize, plus: bool, cost: fn(usize) -> usize) -> Answer {
        let names: Vec<(Vec<u8>, NodeId)> = self
            .entries(directory, |entries| entries.iter().map(|(name, id)| (name.clone(), *id)).collect())
            .unwrap_or_default();
        let mut room = max;
        let mut listing = Vec::new();
        for (index, (name, id)) in names.into_iter().enumerate().skip(cookie as usize) {
            let Some(left) = room.checked_sub(cost(name.len())) else { break };
            room = left;
            let kind = self.nodes.lock().get(&id).map_or(0, |node| (node.attr.mode >> 12) as u8);
            let entry = if plus { self.entry(id).ok() } else { None };
            listing.push(DirEntry { name: name.into(), ino: id, kind, cookie: index as u64 + 1, entry });
        }
        Answer::Dir(listing)
    }

    fn perform(&self, caller: Caller, op: Op<'_>) -> Result<Answer, Errno> {
        match op {
            Op::Lookup { parent, name } => self.entry(self.child(parent, name)?).map(Answer::Entry),
            Op::GetAttr { node, .. } => self.node(node, |node| Ok(Answer::Attr(node.attr, node.attr_ttl))),
            Op::SetAttr { node, set, .. } => self.set_attr(node, set),
            Op::ReadLink { node } => self.node(node, |node| match &node.content {
                Content::Link(target) => Ok(Answer::Data(target.clone())),
                _ => Err(Errno::EINVAL),
            }),
            Op::SymLink { parent, name, target } => {
                let mode = libc::S_IFLNK | 0o777;
                self.make(parent, name, Content::Link(target.to_vec()), mode, caller).map(Answer::Entry)
            }
            Op::MkNod { parent, name, mode, umask, .. } => {
                let content =
                    if mode & libc::S_IFMT == libc::S_IFREG { Content::File(Vec::new()) } else { Content::Special };
                self.make(parent, name, content, mode & !umask, caller).map(Answer::Entry)
            }
            Op::MkDir { parent, name, mode, umask } => {
                let mode = libc::S_IFDIR | (mode & !umask & 0o7777);
                self.make(parent, name, Content::Directory(BTreeMap::new()), mode, caller).map(Answer::Entry)
            }
            Op::Unlink { parent, name } | Op::RmDir { parent, name } => {
                self.entries(parent, |entries| entries.remove(name))?.ok_or(Errno::ENOENT).map(|_| Answer::Ok)
            }
            Op::Rename { parent, name, new_parent, new_name, flags } => {
                if flags & libc::RENAME_NOREPLACE != 0 && self.child(new_parent, new_name).is_ok() {
                    return Err(Errno::EEXIST);
                }
                let id = self.entries(parent, |entries| entries.remove(name))?.ok_or(Errno::ENOENT)?;
                self.entries(new_parent, |entries| entries.insert(new_name.to_vec(), id))?;
                Ok(Answer::Ok)
            }
            Op::Link { node, new_parent, new_name } => {
                self.entries(new_parent, |entries| entries.insert(new_name.to_vec(), node))?;
                self.entry(node).map(Answer::Entry)
            }
            Op::Open { node, flags, .. } => {
                if flags & libc::O_TRUNC as u32 != 0 {
                    self.file(node, Vec::clear)?;
                }
                self.open_handles.fetch_add(1, Ordering::SeqCst);
                self.node(node, |node| Ok(Answer::Opened(Opened { handle: 7, ..node.opened })))
            }
            Op::OpenDir { node, .. } => {
                self.open_handles.fetch_add(1, Ordering::SeqCst);
                self.node(node, |node| Ok(Answer::Opened(Opened { handle: 7, ..node.opened })))
            }
            Op::Create { parent, name, mode, umask, .. } => {
                let mode = libc::S_IFREG | (mode & !umask & 0o7777);
                let entry = self.make(parent, name, Content::File(Vec::new()), mode, caller)?;
                self.open_handles.fetch_add(1, Ordering::SeqCst);
                Ok(Answer::Created(entry, Opened { handle: 7, ..Opened::default() }))
            }
            Op::TmpFile { parent, mode, umask, .. } => {
                let mode = libc::S_IFREG | (mode & !umask & 0o7777);
                let id = self.insert(parent, Content::File(Vec::new()), mode, caller);
                self.set(id, |node| node.attr.nlink = 0);
                self.open_handles.fetch_add(1, Ordering::SeqCst);
                Ok(Answer::Created(self.entry(id)?, Opened { handle: 7, ..Opened::default() }))
            }
            Op::Read { node, offset, size, .. } => self.file(node, |data| {
                let rest = data.get(offset as usize..).unwrap_or_default();
                Answer::Data(rest.get(..size as usize).unwrap_or(rest).to_vec())
            }),
            Op::Write { node, offset, data: bytes, .. } => self.file(node, |data| {
                let end = offset as usize + bytes.len();
                if data.len() < end {
                    data.resize(end, 0);
                }
                data[offset as usize..end].copy_from_slice(bytes);
                Answer::Count(bytes.len() as u32)
            }),
            Op::Release { .. } | Op::ReleaseDir { .. } => {
                self.open_handles.fetch_sub(1, Ordering::SeqCst);
                Ok(Answer::Ok)
            }
            Op::Flush { .. } | Op::Fsync { .. } | Op::FsyncDir { .. } | Op::SyncFs { .. } | Op::SetLock { .. } => {
                Ok(Answer::Ok)
            }
            Op::ReadDir { node, cookie, max, plus, cost, .. } => Ok(self.read_dir(node, cookie, max, plus, cost)),
            Op::StatFs { .. } => Ok(Answer::StatFs(StatFs {
                blocks: 1000,
                bfree: 500,
                bavail: 400,
                files: 100,
                ffree: 50,
                bsize: 4096,
                frsize: 4096,
                namelen: 255,
            })),
            Op::GetXattr { node, name, .. } => {
                self.node(node, |node| node.xattrs.get(name).cloned().map(Answer::Data).ok_or(Errno::ENODATA))
            }
            Op::ListXattr { node, .. } => self.node(node, |node| {
                Ok(Answer::Data(node.xattrs.keys().flat_map(|name| [name.as_slice(), b"\0"].concat()).collect()))
            }),
            Op::SetXattr { node, name, value, .. } => self.node(node, |node| {
                node.xattrs.insert(name.to_vec(), value.to_vec());
                Ok(Answer::Ok)
            }),
            Op::RemoveXattr { node, name } => {
                self.node(node, |node| node.xattrs.remove(name).map(|_| Answer::Ok).ok_or(Errno::ENODATA))
            }
            Op::Fallocate { node, offset, len, .. } => self.file(node, |data| {
                let end = (offset + len) as usize;
                if data.len() < end {
                    data.resize(end, 0);
                }
                Answer::Ok
            }),
            Op::Seek { offset: BACKWARDS, .. } => Ok(Answer::Offset(0)),
            // Past the end there is nothing to find: without ENXIO, cp would ask for ever.
            Op::Seek { node, offset, whence, .. } => self.file(node, |data| match whence as i32 {
                _ if offset >= data.len() as u64 => Err(Errno::ENXIO),
                libc::SEEK_DATA => Ok(Answer::Offset(offset)),
                _ => Ok(Answer::Offset(data.len() as u64)),
            })?,
            Op::CopyRange { from, from_offset, to, to_offset, len, .. } => {
                let bytes = self.file(from, |data| {
                    let rest = data.get(from_offset as usize..).unwrap_or_default();
                    rest.get(..len as usize).unwrap_or(rest).to_vec()
                })?;
                self.file(to, |data| {
                    let end = to_offset as usize + bytes.len();
                    if data.len() < end {
                        data.resize(end, 0);
                    }
                    data[to_offset as usize..end].copy_from_slice(&bytes);
                    Answer::Count(bytes.len() as u32)
                })
            }
            Op::GetLock { lock, .. } => Ok(Answer::Lock(Lock { kind: libc::F_UNLCK as u32, ..lock })),
            Op::Poll { events, .. } => Ok(Answer::Ready(Ready(events & (libc::POLLIN | libc::POLLOUT) as u32))),
        }
    }

    fn stream_of(&self, op: &Op<'_>) -> Option<Arc<Stream>> {
        let (Op::Read { node, .. } | Op::Poll { node, .. }) = op else { return None };
        match &self.nodes.lock().get(node)?.content {
            Content::Stream(stream) => Some(stream.clone()),
            _ => None,
        }
    }
}

impl Files for Fake {
    fn dispatch(&self, caller: Caller, op: Op<'_>, responder: Responder) {
        if matches!(op, Op::Read { .. } | Op::Write { .. }) {
            self.transfers.fetch_add(1, Ordering::Relaxed);
        }
        let planned = {
            let mut plan = self.plan.lock();
            if plan.as_ref().is_some_and(|plan| (plan.matches)(&op)) { plan.take() } else { None }
        };
        if let Some(plan) = planned {
            return self.leave_pending(plan, responder);
        }
        if let Some(stream) = self.stream_of(&op) {
            return stream.dispatch(op, responder);
        }
        if let Op::GetXattr { name: b"user.panic", .. } = op {
            panic!("on purpose");
        }
        if let Op::GetXattr { name: b"user.forgotten", .. } = op {
            return;
        }
        if let Op::GetXattr { name: b"user.enosys", .. } = op {
            return responder.respond(Err(Errno::ENOSYS));
        }
        if let Op::GetXattr { name: b"user.wild", .. } = op {
            return responder.respond(Err(Errno(70_000)));
        }
        responder.respond(self.perform(caller, op));
    }

    fn forget(&self, node: NodeId, count: u64) {
        if let Some(node) = self.nodes.lock().get_mut(&node) {
            node.holds = node.holds.saturating_sub(count);
        }
    }
}
