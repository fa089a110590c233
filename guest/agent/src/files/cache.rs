//! The bounded cache of `O_PATH` descriptors, one a node at most, with second chances instead of exact recency: a
//! use sets a flag on the node and takes no lock that others wait for.

use super::nodes::{Node, Shared};
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

/// Who has a cached descriptor, oldest first.
pub(super) struct DescriptorCache {
    /// Nodes that died leave their entry until it is passed.
    ring: Mutex<VecDeque<Weak<Node>>>,
    limit: usize,
    shared: Arc<Shared>,
}

impl DescriptorCache {
    pub(super) fn new(limit: usize, shared: Arc<Shared>) -> DescriptorCache {
        DescriptorCache { ring: Mutex::default(), limit, shared }
    }

    /// Keeps the descriptor with its node, and takes another's when there are too many.
    pub(super) fn put(&self, node: &Arc<Node>, fd: Arc<OwnedFd>) {
        let mut place = node.place();
        if place.cached.is_some() || place.pin.is_some() {
            node.used.store(true, Ordering::Relaxed);
            return;
        }
        place.cached = Some(fd);
        let known = std::mem::replace(&mut place.in_ring, true);
        self.shared.cached.fetch_add(1, Ordering::Relaxed);
        drop(place);
        if !known {
            let mut ring = self.ring.lock();
            ring.push_back(Arc::downgrade(node));
            if ring.len() > 2 * self.limit + 1024 {
                retain(&mut ring, |_| true);
            }
        }
        if self.shared.cached.load(Ordering::Relaxed) > self.limit {
            self.shrink_to(self.limit);
        }
    }

    /// Takes the node's descriptor out of the cache.
    pub(super) fn take(&self, node: &Node) -> Option<Arc<OwnedFd>> {
        let fd = node.place().cached.take();
        if fd.is_some() {
            self.shared.cached.fetch_sub(1, Ordering::Relaxed);
        }
        fd
    }

    /// Gives up a quarter of the descriptors, for something that needs them more.
    pub(super) fn give_way(&self) {
        self.shrink_to(self.shared.cached.load(Ordering::Relaxed) / 4 * 3);
    }

    /// Gives up the descriptors of all nodes for which `keep` does not hold.
    pub(super) fn retain(&self, keep: impl Fn(&Node) -> bool) {
        let gone = retain(&mut self.ring.lock(), keep);
        for node in gone {
            self.take(&node);
        }
    }

    fn shrink_to(&self, target: usize) {
        // Each node is passed twice at most: the first time may only clear its flag.
        let mut left = 2 * self.ring.lock().len();
        while left > 0 && self.shared.cached.load(Ordering::Relaxed) > target {
            left -= 1;
            let mut ring = self.ring.lock();
            let Some(entry) = ring.pop_front() else { return };
            let Some(node) = entry.upgrade() else { continue };
            if node.used.swap(false, Ordering::Relaxed) {
                ring.push_back(entry);
                drop(ring);
            } else {
                drop(ring);
                node.place().in_ring = false;
                self.take(&node);
            }
        }
    }
}

/// Takes the entries of dead nodes, of nodes that have no cached descriptor any more, and of those that are not to
/// be kept out of the ring. Gives the last.
fn retain(ring: &mut VecDeque<Weak<Node>>, keep: impl Fn(&Node) -> bool) -> Vec<Arc<Node>> {
    let mut gone = Vec::new();
    ring.retain(|entry| {
        let Some(node) = entry.upgrade() else { return false };
        let keep = keep(&node);
        let mut place = node.place();
        place.in_ring = keep && place.cached.is_some();
        let (stays, has_descriptor) = (place.in_ring, place.cached.is_some());
        drop(place);
        if !stays && has_descriptor {
            gone.push(node);
        }
        stays
    });
    gone
}
