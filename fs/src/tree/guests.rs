//! Handing operations over to the files of guests. Nodes below `files` are the guest's own; `files` itself is a control
//! node that stands for the guest's root directory.

use super::guest::GuestFiles;
use super::node::GUEST_BIT;
use super::open::{Body, OpenTable, Seat};
use super::ops::{Answer, Attr, Caller, Cancel, DirEntry, Files, NodeId, Op, Respond, Responder};
use crate::errno::Errno;
use crate::machine::Machine;
use crate::machine::registry::Registry;
use dashmap::DashMap;
use std::sync::Arc;
use std::time::Duration;

/// The nodes that an operation is on.
pub fn nodes<'o>(op: &'o mut Op<'_>) -> (&'o mut NodeId, Option<&'o mut NodeId>) {
    match op {
        Op::Rename { parent, new_parent, .. } => (parent, Some(new_parent)),
        Op::Link { node, new_parent, .. } => (node, Some(new_parent)),
        Op::CopyRange { from, to, .. } => (from, Some(to)),
        Op::Lookup { parent: node, .. }
        | Op::SymLink { parent: node, .. }
        | Op::MkNod { parent: node, .. }
        | Op::MkDir { parent: node, .. }
        | Op::Unlink { parent: node, .. }
        | Op::RmDir { parent: node, .. }
        | Op::Create { parent: node, .. }
        | Op::TmpFile { parent: node, .. }
        | Op::GetAttr { node, .. }
        | Op::SetAttr { node, .. }
        | Op::ReadLink { node }
        | Op::Open { node, .. }
        | Op::Read { node, .. }
        | Op::Write { node, .. }
        | Op::Flush { node, .. }
        | Op::Release { node, .. }
        | Op::Fsync { node, .. }
        | Op::OpenDir { node, .. }
        | Op::ReadDir { node, .. }
        | Op::ReleaseDir { node, .. }
        | Op::FsyncDir { node, .. }
        | Op::StatFs { node }
        | Op::GetXattr { node, .. }
        | Op::ListXattr { node, .. }
        | Op::SetXattr { node, .. }
        | Op::RemoveXattr { node, .. }
        | Op::Fallocate { node, .. }
        | Op::Seek { node, .. }
        | Op::GetLock { node, .. }
        | Op::SetLock { node, .. }
        | Op::Poll { node, .. }
        | Op::SyncFs { node } => (node, None),
    }
}

/// Whether a node is a file in a guest.
pub fn is_guest(node: NodeId) -> bool {
    node & GUEST_BIT != 0
}

/// Finds guests by the nodes they gave out.
pub struct Guests {
    registry: Arc<Registry>,
    /// The machine of each boot whose files were given out, to tell "down" from "gone".
    slots: DashMap<u32, u32>,
}

impl Guests {
    /// Of these machines.
    pub fn new(registry: Arc<Registry>) -> Guests {
        Guests { registry, slots: DashMap::new() }
    }

    /// The files of a running machine.
    ///
    /// # Errors
    /// EHOSTDOWN or EHOSTUNREACH when its agent is not connected.
    pub fn of(&self, machine: &Machine) -> Result<Arc<GuestFiles>, Errno> {
        let files = machine.files().ok_or_else(|| machine.down_errno())?;
        let epoch = files.epoch();
        if !self.slots.contains_key(&epoch) {
            self.slots.retain(|_, slot| self.registry.by_slot(*slot).is_some());
            self.slots.insert(epoch, machine.slot());
        }
        Ok(files)
    }

    /// The slot of the machine that a node is in.
    pub fn slot_of(&self, node: NodeId) -> Option<u32> {
        self.slots.get(&GuestFiles::epoch_of(node)).map(|slot| *slot)
    }

    /// The files that a node is in.
    ///
    /// # Errors
    /// ESTALE when that boot of the machine is over, EHOSTDOWN or EHOSTUNREACH when the machine is down.
    pub fn by_node(&self, node: NodeId) -> Result<Arc<GuestFiles>, Errno> {
        let epoch = GuestFiles::epoch_of(node);
        if let Some(files) = self.registry.files_by_epoch(epoch) {
            return Ok(files);
        }
        let machine =
            self.slot_of(node).and_then(|slot| self.registry.by_slot(slot)).filter(|machine| !machine.is_destroyed());
        Err(match machine {
            Some(machine) if machine.files().is_none() => machine.down_errno(),
            _ => Errno::ESTALE,
        })
    }
}

/// Hands an operation on `files` over to the guest's root directory. `seat` is for a listing that it opens, `attr` what
/// `files` shows.
pub fn hand_over(
    table: &Arc<OpenTable>,
    files: Arc<GuestFiles>,
    caller: Caller,
    mut op: Op<'_>,
    files_node: Root,
    responder: Responder,
) {
    let root = files.root();
    let (first, second) = nodes(&mut op);
    for node in [Some(first), second].into_iter().flatten() {
        if *node == files_node.node {
            *node = root;
        }
    }
    let opening = match &op {
        Op::OpenDir { .. } => match table.seat(caller) {
            Ok(seat) => Some((table.clone(), files.clone(), seat)),
            Err(errno) => return responder.respond(Err(errno)),
        },
        _ => None,
    };
    files.dispatch(caller, op, Box::new(AsRoot { inner: responder, root: files_node, opening }));
}

/// What stands in for the guest's root directory.
#[derive(Clone, Copy)]
pub struct Root {
    /// The node of `files`.
    pub node: NodeId,
    /// The node of the machine's directory.
    pub parent: NodeId,
    /// Attributes of `files`.
    pub attr: Attr,
}

/// Makes the guest's answers about its root directory answers about `files`.
struct AsRoot {
    inner: Responder,
    root: Root,
    opening: Option<(Arc<OpenTable>, Arc<GuestFiles>, Seat)>,
}

impl Respond for AsRoot {
    fn respond(self: Box<Self>, answer: Result<Answer, Errno>) {
        let AsRoot { inner, root, opening } = *self;
        let answer = match (answer, opening) {
            (Ok(Answer::Opened(mut opened)), Some((table, files, seat))) => {
                opened.handle = table.insert(root.node, Body::GuestDir(files, opened.handle), seat);
                // The kernel would tell by the directory's times whether its copy is old; those of `files` are not
                // the guest's.
                opened.cache_dir = false;
                opened.keep_cache = false;
                Ok(Answer::Opened(opened))
            }
            (Ok(Answer::Attr(..)), _) => Ok(Answer::Attr(root.attr, Duration::ZERO)),
            (Ok(Answer::Dir(mut entries)), _) => {
                entries.iter_mut().for_each(|entry| patch(entry, root));
                Ok(Answer::Dir(entries))
            }
            (answer, _) => answer,
        };
        inner.respond(answer);
    }

    fn set_cancel(&mut self, cancel: Arc<dyn Cancel>) -> bool {
        self.inner.set_cancel(cancel)
    }
}

fn patch(entry: &mut DirEntry, root: Root) {
    match &*entry.name {
        b"." => entry.ino = root.node,
        b".." => entry.ino = root.parent,
        _ => {}
    }
}

/// Hands an operation by a handle of [`Body::GuestDir`] over to the guest that gave it.
pub fn by_handle(files: &Arc<GuestFiles>, handle: u64, caller: Caller, op: Op<'_>, root: Root, responder: Responder) {
    let node = files.root();
    let op = match op {
        Op::ReadDir { cookie, max, plus, cost, .. } => Op::ReadDir { node, handle, cookie, max, plus, cost },
        Op::ReleaseDir { .. } => Op::ReleaseDir { node, handle },
        Op::FsyncDir { data_only, .. } => Op::FsyncDir { node, handle, data_only },
        _ => return responder.respond(Err(Errno::EBADF)),
    };
    files.dispatch(caller, op, Box::new(AsRoot { inner: responder, root, opening: None }));
}
