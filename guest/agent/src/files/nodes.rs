//! The nodes the host holds: which file each is, how often it is held, and where it was last seen.
//!
//! A node lives as long as anything needs it: the host (it is then in `by_id`), a child that names it as its parent,
//! or an open handle. While it lives, a look at the same file finds the same node.
//!
//! Locks are taken in this order: the ring of cached descriptors, `by_key`, `by_id`; a node's place may be taken
//! under the ring. No node may be dropped under `by_key`, since that takes it.

use super::identity::{Birth, Key, mount_of};
use super::sharded::{SHARDS, Sharded};
use machinefs_protocol::file::{MAX_NODE, ROOT};
use parking_lot::{Mutex, MutexGuard};
use rustix::fs::FileType;
use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

/// One file of the guest.
pub(super) struct Node {
    pub(super) id: u64,
    pub(super) generation: u64,
    /// Its type, which never changes.
    pub(super) kind: FileType,
    /// Whether its file system gives all that is asked for in one read, short of the end (procfs does not).
    pub(super) steady: bool,
    /// Set when its cached descriptor is used, cleared when the ring passes by.
    pub(super) used: AtomicBool,
    key: Arc<[u8]>,
    /// How often the host holds it. Changed only under the lock of its shard of `by_key`.
    lookups: AtomicU64,
    place: Mutex<Place>,
    shared: Weak<Shared>,
}

/// What is known of where a node is. Descriptors in here keep it findable whatever happens to its name.
#[derive(Default)]
pub(super) struct Place {
    /// The name it was last seen under; none once that name is gone.
    pub(super) link: Option<Link>,
    /// A cached descriptor; the ring may take it.
    pub(super) cached: Option<Arc<OwnedFd>>,
    /// Whether the ring has an entry for it, which there is once at most.
    pub(super) in_ring: bool,
    /// The only way to a file without a name; kept until the node goes.
    pub(super) pin: Option<Arc<OwnedFd>>,
    /// See [`Key::birth`].
    pub(super) birth: Option<Birth>,
    /// The descriptors of its open handles.
    pub(super) open: Vec<Weak<OwnedFd>>,
}

/// A name in a directory.
#[derive(Clone)]
pub(super) struct Link {
    pub(super) parent: Arc<Node>,
    pub(super) name: Box<[u8]>,
}

impl Node {
    pub(super) fn key(&self) -> &[u8] {
        &self.key
    }

    pub(super) fn mount(&self) -> u64 {
        mount_of(&self.key)
    }

    pub(super) fn is_dir(&self) -> bool {
        self.kind == FileType::Directory
    }

    pub(super) fn place(&self) -> MutexGuard<'_, Place> {
        self.place.lock()
    }

    pub(super) fn link(&self) -> Option<Link> {
        self.place.lock().link.clone()
    }

    /// Whether the host holds it at the moment.
    pub(super) fn is_held(&self) -> bool {
        self.lookups.load(Ordering::Relaxed) > 0
    }

    /// Records that the node was seen under this name.
    pub(super) fn set_link(self: &Arc<Node>, parent: &Arc<Node>, name: &[u8]) {
        if Arc::ptr_eq(self, parent) {
            return;
        }
        let mut place = self.place.lock();
        if let Some(link) = &place.link
            && Arc::ptr_eq(&link.parent, parent)
            && *link.name == *name
        {
            return;
        }
        let old = place.link.replace(Link { parent: parent.clone(), name: name.into() });
        drop(place);
        if old.is_some() && self.is_dir() {
            self.break_cycle(parent);
        }
    }

    /// Takes out the stale link, if any, that makes this directory an ancestor of its own new parent: directories
    /// that moved in the guest may have been seen in both orders.
    fn break_cycle(self: &Arc<Node>, parent: &Arc<Node>) {
        let mut current = parent.clone();
        for _ in 0..MAX_DEPTH {
            let place = current.place.lock();
            let Some(next) = place.link.as_ref().map(|link| link.parent.clone()) else { return };
            drop(place);
            if Arc::ptr_eq(&next, self) {
                let stale = current.place.lock().link.take();
                drop(stale);
                return;
            }
            current = next;
        }
    }
}

/// More directories below each other than this are taken for a cycle.
pub(super) const MAX_DEPTH: usize = 1 << 16;

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(shared) = self.shared.upgrade() {
            shared.unregister(self.id, &self.key);
            if self.place.get_mut().cached.is_some() {
                shared.cached.fetch_sub(1, Ordering::Relaxed);
            }
        }
        // The chain of parents is dropped in a loop: its length is the guest's choice, the stack's is not.
        let mut link = self.place.get_mut().link.take();
        while let Some(mut parent) = link.and_then(|link| Arc::into_inner(link.parent)) {
            link = parent.place.get_mut().link.take();
        }
    }
}

/// What nodes need of their table when they go.
pub(super) struct Shared {
    by_key: Box<[Mutex<KeyMap>]>,
    hasher: RandomState,
    /// How many nodes have a cached descriptor.
    pub(super) cached: AtomicUsize,
}

/// The number beside the reference tells whose entry it is once the node itself cannot be reached any more.
type KeyMap = HashMap<Arc<[u8]>, (u64, Weak<Node>)>;

impl Shared {
    fn shard(&self, key: &[u8]) -> &Mutex<KeyMap> {
        &self.by_key[self.hasher.hash_one(key) as usize % self.by_key.len()]
    }

    fn unregister(&self, id: u64, key: &[u8]) {
        let mut map = self.shard(key).lock();
        if map.get(key).is_some_and(|(owner, _)| *owner == id) {
            map.remove(key);
        }
    }
}

/// All nodes.
pub(super) struct Table {
    pub(super) shared: Arc<Shared>,
    by_id: Sharded<Arc<Node>>,
    root: Arc<Node>,
    /// The number of the next node; what is above [`MAX_NODE`] becomes its generation.
    next: AtomicU64,
}

impl Table {
    /// A table with the root directory, which is pinned by its descriptor.
    pub(super) fn new(root: OwnedFd, key: &Key, steady: bool) -> Table {
        let shared = Arc::new(Shared {
            by_key: (0..SHARDS).map(|_| Mutex::default()).collect(),
            hasher: RandomState::new(),
            cached: AtomicUsize::new(0),
        });
        let node = Arc::new(Node {
            id: ROOT,
            generation: 0,
            kind: FileType::Directory,
            steady,
            used: AtomicBool::new(false),
            key: key.as_bytes().into(),
            lookups: AtomicU64::new(1),
            place: Mutex::new(Place { pin: Some(Arc::new(root)), ..Place::default() }),
            shared: Arc::downgrade(&shared),
        });
        shared.shard(node.key()).lock().insert(node.key.clone(), (ROOT, Arc::downgrade(&node)));
        Table { shared, by_id: Sharded::new(), root: node, next: AtomicU64::new(ROOT + 1) }
    }

    pub(super) fn root(&self) -> &Arc<Node> {
        &self.root
    }

    /// The node of that number, if the host holds it.
    pub(super) fn get(&self, id: u64) -> Option<Arc<Node>> {
        if id == ROOT { Some(self.root.clone()) } else { self.by_id.get(id) }
    }

    /// The living node of that file, if there is one.
    pub(super) fn find(&self, key: &[u8]) -> Option<Arc<Node>> {
        self.shared.shard(key).lock().get(key).and_then(|(_, node)| node.upgrade())
    }

    /// The node of that file, which the host now holds once more.
    pub(super) fn hold(&self, key: &Key, kind: FileType, steady: bool) -> Arc<Node> {
        let birth = key.birth;
        let key = key.as_bytes();
        let mut map = self.shared.shard(key).lock();
        let node = match map.get(key).and_then(|(_, node)| node.upgrade()) {
            Some(node) => node,
            None => {
                let number = self.new_number();
                let key: Arc<[u8]> = key.into();
                let node = Arc::new(Node {
                    id: number % MAX_NODE,
                    generation: number / MAX_NODE,
                    kind,
                    steady,
                    used: AtomicBool::new(false),
                    key: key.clone(),
                    lookups: AtomicU64::new(0),
                    place: Mutex::new(Place { birth, ..Place::default() }),
                    shared: Arc::downgrade(&self.shared),
                });
                map.insert(key, (node.id, Arc::downgrade(&node)));
                node
            }
        };
        if node.lookups.fetch_add(1, Ordering::Relaxed) == 0 && node.id != ROOT {
            self.by_id.insert(node.id, node.clone());
        }
        node
    }

    /// The file is gone and its number another's: the node will not be found by its key any more.
    pub(super) fn retire(&self, node: &Node) {
        self.shared.unregister(node.id, node.key());
    }

    /// Gives up `count` holds on a node. More than there are is all of them.
    pub(super) fn forget(&self, id: u64, count: u64) {
        if id == ROOT {
            return;
        }
        let Some(node) = self.by_id.get(id) else { return };
        let map = self.shared.shard(node.key()).lock();
        let left = node.lookups.load(Ordering::Relaxed).saturating_sub(count);
        node.lookups.store(left, Ordering::Relaxed);
        let last = if left == 0 { self.by_id.remove(id) } else { None };
        drop(map);
        drop(last);
    }

    /// Gives up every hold on every node but the root.
    pub(super) fn clear(&self) {
        for node in self.by_id.values() {
            self.forget(node.id, u64::MAX);
        }
    }

    /// How many nodes the host holds, without the root.
    #[cfg(test)]
    pub(super) fn held(&self) -> usize {
        self.by_id.len()
    }

    /// How many nodes live, for whatever reason, with the root.
    #[cfg(test)]
    pub(super) fn living(&self) -> usize {
        self.shared.by_key.iter().map(|map| map.lock().len()).sum()
    }

    /// A number that is free: 2^40 are enough for decades, but a guest may also be busy for decades.
    fn new_number(&self) -> u64 {
        loop {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            let id = number % MAX_NODE;
            if id > ROOT && (number < MAX_NODE || self.by_id.get(id).is_none()) {
                return number;
            }
        }
    }
}
