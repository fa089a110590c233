//! The files of a guest: operations of the tree turned into requests to its agent, and the answers back.
//!
//! Nothing the agent says is taken as it is: names, nodes, attributes, sizes and pages are checked, and an answer
//! that cannot be is EHOSTUNREACH and counted ([`Link::lie`]).

mod acl;
mod attr;
mod dir;
mod fresh;
mod ids;
mod listing;
mod locks;
mod names;
mod open;
mod places;
mod request;
mod symlink;
mod xattr;

use super::cache::HostCache;
use super::ops::{Answer, Attr, Caller, Entry, Files, NodeId, Op, Ready, Responder};
use crate::errno::Errno;
use crate::link::Link;
use dir::DirHandle;
use fresh::Fresh;
use ids::Swap;
use machinefs_protocol::file::{self, ROOT};
use machinefs_protocol::message::Notice;
use parking_lot::Mutex;
use places::Nodes;
use request::Asking;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Longest name, in bytes.
const MAX_NAME: usize = 255;
/// How long the kernel may keep a symlink's name: [`places`] relies on its being looked up that often.
const SYMLINK_TTL: Duration = Duration::from_secs(1);
/// Bytes read at once, at most.
const MAX_READ: u32 = 1 << 20;
/// Bytes copied in one request, at most: few enough to end before the deadline.
const MAX_COPY: u64 = 32 << 20;
/// Set in our handles of directories, so that they are none of the agent's.
const DIR_HANDLE: u64 = 1 << 63;
/// Bytes of a directory's first page, which comes with the open.
const FIRST_PAGE: u32 = 64 * 1024;
/// Bytes of its other pages.
const NEXT_PAGE: u32 = 256 * 1024;
/// What a regular file is always ready for.
const READY: u32 = (libc::POLLIN | libc::POLLOUT | libc::POLLRDNORM | libc::POLLWRNORM) as u32;

/// How a guest's files are shown.
#[derive(Clone)]
pub struct GuestView {
    /// The machine's persisted number (24 bits), for inode numbers.
    pub slot: u32,
    /// This boot's number (23 bits), for nodes.
    pub epoch: u32,
    /// The machine's owner on the host.
    pub owner_uid: u32,
    /// The owner's group on the host.
    pub owner_gid: u32,
    /// User and group of the guest's default user, in the guest.
    pub default_user: (u32, u32),
    /// Swap the owner and the default user (`idmap=owner`); else numbers stay as they are.
    pub map_owner: bool,
    /// Inode number of the root.
    pub root_ino: u64,
    /// What the host's kernel remembers of guests.
    pub cache: Arc<HostCache>,
    /// Whether the machine is paused, and so cannot answer: EBUSY at once.
    pub paused: Arc<AtomicBool>,
}

/// The files of one guest in one boot. Its root directory is [`GuestFiles::root`].
pub struct GuestFiles {
    guest: Arc<Guest>,
}

struct Guest {
    link: Arc<Link>,
    view: GuestView,
    users: Swap,
    groups: Swap,
    nodes: Mutex<Nodes>,
    dirs: Mutex<HashMap<u64, Arc<DirHandle>>>,
    next_dir: AtomicU64,
    /// Nodes and the lock owners that (may) hold POSIX locks on them.
    locks: Mutex<HashSet<(u64, u64)>>,
    fresh: Mutex<Fresh>,
}

impl GuestFiles {
    /// The files behind a link.
    pub fn new(link: Arc<Link>, view: GuestView) -> GuestFiles {
        let swap = |owner, default| Swap { owner, default, trusted: view.owner_uid == 0, off: !view.map_owner };
        let users = swap(view.owner_uid, view.default_user.0);
        let groups = swap(view.owner_gid, view.default_user.1);
        let guest = Guest {
            link,
            view,
            users,
            groups,
            nodes: Mutex::default(),
            dirs: Mutex::default(),
            next_dir: AtomicU64::new(1),
            locks: Mutex::default(),
            fresh: Mutex::default(),
        };
        GuestFiles { guest: Arc::new(guest) }
    }

    /// The node of the guest's root directory.
    pub fn root(&self) -> NodeId {
        self.guest.node_id(ROOT)
    }

    /// This boot's number.
    pub fn epoch(&self) -> u32 {
        self.guest.view.epoch % ids::MAX_EPOCH
    }

    /// The boot that a guest's node is of.
    pub fn epoch_of(node: NodeId) -> u32 {
        ids::epoch_of(node)
    }
}

impl Files for GuestFiles {
    fn dispatch(&self, caller: Caller, op: Op<'_>, responder: Responder) {
        if self.guest.view.paused.load(Ordering::Acquire) && !leaves(&op) {
            return responder.respond(Err(Errno::EBUSY));
        }
        let asking = Asking { guest: &self.guest, caller, responder };
        if let Err((errno, responder)) = dispatch(asking, op) {
            responder.respond(Err(errno));
        }
    }

    fn forget(&self, node: NodeId, count: u64) {
        if let Ok(node) = self.guest.agent_node(node)
            && node != ROOT
        {
            self.guest.nodes.lock().forget(node, count);
            self.guest.link.notice(&Notice::Forget(vec![(node, count)]));
        }
    }
}

/// Whether it gives back what somebody holds, which also has to reach an agent that only answers later.
fn leaves(op: &Op<'_>) -> bool {
    match op {
        Op::Flush { .. } | Op::Release { .. } | Op::ReleaseDir { .. } => true,
        Op::SetLock { lock, .. } => lock.kind == libc::F_UNLCK as u32,
        _ => false,
    }
}

/// What could not even be asked: the responder comes back.
type Refused = (Errno, Responder);

fn dispatch(ask: Asking<'_>, op: Op<'_>) -> Result<(), Refused> {
    match op {
        Op::Lookup { parent, name } => ask.lookup(parent, name),
        Op::GetAttr { node, handle } => ask.getattr(node, handle),
        Op::SetAttr { node, handle, set } => ask.setattr(node, handle, &set),
        Op::ReadLink { node } => ask.readlink(node),
        Op::SymLink { parent, name, target } => ask.symlink(parent, name, target),
        Op::MkNod { parent, name, mode, umask, rdev } => ask.mknod(parent, name, mode, umask, rdev),
        Op::MkDir { parent, name, mode, umask } => ask.mkdir(parent, name, mode, umask),
        Op::Unlink { parent, name } => ask.remove(parent, name, false),
        Op::RmDir { parent, name } => ask.remove(parent, name, true),
        Op::Rename { parent, name, new_parent, new_name, flags } => {
            ask.rename((parent, name), (new_parent, new_name), flags)
        }
        Op::Link { node, new_parent, new_name } => ask.link(node, new_parent, new_name),
        Op::Open { node, flags, kill_suidgid } => ask.open(node, flags, kill_suidgid),
        Op::Create { parent, name, mode, umask, flags } => ask.create(parent, name, mode, umask, flags),
        Op::TmpFile { parent, mode, umask, flags } => ask.tmpfile(parent, mode, umask, flags),
        Op::Read { handle, offset, size, .. } => ask.read(handle, offset, size),
        Op::Write { handle, offset, data, kill_suidgid, .. } => ask.write(handle, offset, data, kill_suidgid),
        Op::Flush { node, handle, owner } => ask.flush(node, handle, owner),
        Op::Release { handle, owner, .. } => ask.release(handle, owner),
        Op::Fsync { handle, data_only, .. } => ask.fsync(handle, data_only),
        Op::OpenDir { node, .. } => ask.opendir(node),
        Op::ReadDir { handle, cookie, max, plus, cost, .. } => ask.readdir(handle, cookie, max, plus, cost),
        Op::ReleaseDir { handle, .. } => ask.releasedir(handle),
        Op::FsyncDir { handle, data_only, .. } => ask.fsyncdir(handle, data_only),
        Op::StatFs { node } => ask.statfs(node),
        Op::GetXattr { node, name, max } => ask.getxattr(node, name, max),
        Op::ListXattr { node, max } => ask.listxattr(node, max),
        Op::SetXattr { node, name, value, flags } => ask.setxattr(node, name, value, flags),
        Op::RemoveXattr { node, name } => ask.removexattr(node, name),
        Op::Fallocate { handle, offset, len, mode, .. } => ask.fallocate(handle, offset, len, mode),
        Op::Seek { handle, offset, whence, .. } => ask.seek(handle, offset, whence),
        Op::CopyRange { from_handle, from_offset, to_handle, to_offset, len, .. } => {
            ask.copy_range((from_handle, from_offset), (to_handle, to_offset), len)
        }
        Op::GetLock { handle, owner, lock, .. } => ask.getlock(handle, owner, lock),
        Op::SetLock { node, handle, owner, lock, flock, wait } => ask.setlock(node, handle, owner, lock, flock, wait),
        Op::Poll { events, .. } => {
            ask.responder.respond(Ok(Answer::Ready(Ready(events & READY))));
            Ok(())
        }
        Op::SyncFs { .. } => ask.syncfs(),
    }
}

impl Guest {
    fn node_id(&self, node: u64) -> NodeId {
        ids::node_id(self.view.epoch, node)
    }

    /// The agent's number; ESTALE for a node of another boot.
    fn agent_node(&self, node: NodeId) -> Result<u64, Errno> {
        ids::agent_node(self.view.epoch, node).filter(|&node| node >= ROOT).ok_or(Errno::ESTALE)
    }

    /// The agent said what cannot be.
    fn lie(&self, what: &str) -> Errno {
        self.link.lie(what);
        Errno::EHOSTUNREACH
    }

    fn attr(&self, node: u64, attr: &file::Attr) -> (Attr, Duration) {
        let ttl = if node == ROOT { Duration::ZERO } else { self.view.cache.ttl() };
        (attr::to_host(&self.view, self.users, self.groups, node, attr), ttl)
    }

    /// An entry that is given to the kernel, which then holds it; `place`: where it is.
    fn entry(&self, place: Option<(u64, &[u8])>, entry: &file::Entry) -> Result<Entry, Errno> {
        attr::check_entry(entry).map_err(|what| self.lie(what))?;
        let mut nodes = self.nodes.lock();
        match place {
            Some((parent, name)) => nodes.given(parent, name, entry, Instant::now()),
            None => nodes.seen(entry.node, &entry.attr),
        }
        drop(nodes);
        let (attr, attr_ttl) = self.attr(entry.node, &entry.attr);
        let link = entry.attr.mode & libc::S_IFMT == libc::S_IFLNK;
        let ttl = self.view.cache.ttl();
        let entry_ttl = if link { ttl.min(SYMLINK_TTL) } else { ttl };
        Ok(Entry { node: self.node_id(entry.node), generation: entry.generation, attr, entry_ttl, attr_ttl })
    }

    fn forget_all(&self, nodes: Vec<(u64, u64)>) {
        let nodes: Vec<_> = nodes.into_iter().filter(|&(node, _)| node != ROOT).collect();
        if !nodes.is_empty() {
            self.link.notice(&Notice::Forget(nodes));
        }
    }
}
