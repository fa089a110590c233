//! Where the nodes are that the host's kernel holds: how deep a symlink lies, for its target's containment, and
//! which files are not what their size says.
//!
//! The kernel asks for a link's target by the link's node alone. How deep the link lies is then a matter of the
//! kernel's own tree, which follows from the entries it was given. A directory or a link may have been given at
//! several places (it was moved, or linked, or the guest lies): the shallowest of them counts, because a target with
//! too few `..` stays inside the guest, and one with too many leaves it.

use machinefs_protocol::file::{Attr, Entry, ROOT};
use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, RandomState};
use std::time::{Duration, Instant};

/// How long a place counts where something was known to be and is no more: until every lookup that was under way has
/// reached the kernel's tree.
const AFTERLIFE: Duration = Duration::from_secs(5);
/// How long a link's place counts without being looked up again. The kernel looks a link's name up before it asks
/// for its target, at least once a second ([`super::SYMLINK_TTL`]).
const LINK_MEMORY: Duration = Duration::from_secs(10);
/// Places remembered of one node; with more, it counts as lying right below the root.
const MAX_PLACES: usize = 8;
/// Directories looked at for one depth.
const MAX_STEPS: usize = 10_000;
/// Directories and links remembered; targets below others that need their depth are refused.
const MAX_NODES: usize = 1 << 20;
/// Files remembered whose size says nothing.
const MAX_LIVE: usize = 1 << 16;

/// One place of a node.
struct Place {
    parent: u64,
    /// A keyed hash of the name there.
    name: u64,
    /// Until when it counts though a later one is known; `None`: for good.
    until: Option<Instant>,
}

struct Node {
    holds: u64,
    link: bool,
    crowded: bool,
    /// The last is the newest, and always counts.
    places: Vec<Place>,
}

/// The nodes of one guest.
#[derive(Default)]
pub(super) struct Nodes {
    nodes: HashMap<u64, Node>,
    /// Which of them was last given under a name of a directory.
    names: HashMap<(u64, u64), u64>,
    /// Regular files without blocks: those of /proc and /sys, whose size is not that of their content.
    live: HashSet<u64>,
    hasher: RandomState,
}

impl Nodes {
    /// The kernel is given this entry.
    pub fn given(&mut self, parent: u64, name: &[u8], entry: &Entry, now: Instant) {
        self.seen(entry.node, &entry.attr);
        let link = entry.attr.mode & libc::S_IFMT == libc::S_IFLNK;
        if entry.node == ROOT || !(link || entry.attr.mode & libc::S_IFMT == libc::S_IFDIR) {
            return;
        }
        if self.nodes.len() >= MAX_NODES && !self.nodes.contains_key(&entry.node) {
            return;
        }
        let name = self.hasher.hash_one(name);
        let node = self.nodes.entry(entry.node).or_insert(Node { holds: 0, link, crowded: false, places: Vec::new() });
        node.holds = node.holds.saturating_add(1);
        node.link = link;
        if let Some(before) = self.names.insert((parent, name), entry.node)
            && before != entry.node
        {
            self.leave(before, parent, name, now);
        }
        self.arrive(entry.node, parent, name, now);
    }

    /// The kernel is shown these attributes.
    pub fn seen(&mut self, node: u64, attr: &Attr) {
        if attr.mode & libc::S_IFMT == libc::S_IFREG && attr.blocks == 0 {
            if self.live.len() < MAX_LIVE {
                self.live.insert(node);
            }
        } else {
            self.live.remove(&node);
        }
    }

    /// Whether the size of the file says nothing about its content.
    pub fn is_live(&self, node: u64) -> bool {
        self.live.contains(&node)
    }

    /// The kernel gives up holds.
    pub fn forget(&mut self, node: u64, count: u64) {
        let Some(known) = self.nodes.get_mut(&node) else {
            self.live.remove(&node);
            return;
        };
        known.holds = known.holds.saturating_sub(count);
        if known.holds > 0 {
            return;
        }
        for place in self.nodes.remove(&node).map(|known| known.places).unwrap_or_default() {
            let key = (place.parent, place.name);
            if self.names.get(&key) == Some(&node) {
                self.names.remove(&key);
            }
        }
    }

    /// There is no such name any more.
    pub fn gone(&mut self, parent: u64, name: &[u8], now: Instant) {
        let name = self.hasher.hash_one(name);
        if let Some(node) = self.names.remove(&(parent, name)) {
            self.leave(node, parent, name, now);
        }
    }

    /// The kernel has moved a name (and another back, when they were exchanged).
    pub fn renamed(&mut self, from: (u64, &[u8]), to: (u64, &[u8]), exchanged: bool, now: Instant) {
        let from = (from.0, self.hasher.hash_one(from.1));
        let to = (to.0, self.hasher.hash_one(to.1));
        let (moved, replaced) = (self.names.remove(&from), self.names.remove(&to));
        let back = if exchanged { replaced } else { None };
        for (node, old, new) in [(moved, from, to), (back, to, from)] {
            if let Some(node) = node {
                self.leave(node, old.0, old.1, now);
                self.names.insert(new, node);
                self.arrive(node, new.0, new.1, now);
            }
        }
    }

    /// How many directories lie between the guest's root and the directory a link is in; `None`: nobody knows.
    pub fn depth(&self, link: u64, now: Instant) -> Option<usize> {
        let mut level = Vec::new();
        self.parents(link, now, &mut level)?;
        let mut seen: HashSet<u64> = level.iter().copied().collect();
        let mut depth = 0;
        while !level.is_empty() && seen.len() < MAX_STEPS {
            if level.contains(&ROOT) {
                return Some(depth);
            }
            depth += 1;
            let mut above = Vec::new();
            for node in &level {
                self.parents(*node, now, &mut above)?;
            }
            above.retain(|node| seen.insert(*node));
            level = above;
        }
        None
    }

    /// How many directories and links are remembered.
    #[cfg(test)]
    fn len(&self) -> (usize, usize) {
        (self.nodes.len(), self.names.len())
    }

    fn parents(&self, node: u64, now: Instant, into: &mut Vec<u64>) -> Option<()> {
        let known = self.nodes.get(&node)?;
        if known.crowded {
            into.push(ROOT);
        }
        let (newest, older) = known.places.split_last()?;
        into.push(newest.parent);
        into.extend(older.iter().filter(|place| place.until.is_none_or(|until| until > now)).map(|place| place.parent));
        Some(())
    }

    fn arrive(&mut self, node: u64, parent: u64, name: u64, now: Instant) {
        let Some(known) = self.nodes.get_mut(&node) else { return };
        let until = known.link.then(|| now + LINK_MEMORY);
        known.places.retain(|place| {
            (place.parent, place.name) != (parent, name) && place.until.is_none_or(|until| until > now)
        });
        if known.places.len() >= MAX_PLACES {
            known.crowded = true;
            known.places.remove(0);
        }
        known.places.push(Place { parent, name, until });
    }

    fn leave(&mut self, node: u64, parent: u64, name: u64, now: Instant) {
        let Some(known) = self.nodes.get_mut(&node) else { return };
        for place in known.places.iter_mut().filter(|place| (place.parent, place.name) == (parent, name)) {
            place.until = Some(now + AFTERLIFE);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(node: u64, mode: u32) -> Entry {
        Entry { node, generation: 0, attr: Attr { mode, ..Attr::default() } }
    }

    fn dir(node: u64) -> Entry {
        entry(node, libc::S_IFDIR)
    }

    fn link(node: u64) -> Entry {
        entry(node, libc::S_IFLNK)
    }

    const LATER: Duration = Duration::from_secs(60);

    #[test]
    fn depth_counts_directories() {
        let (mut nodes, now) = (Nodes::default(), Instant::now());
        nodes.given(ROOT, b"l", &link(10), now);
        nodes.given(ROOT, b"a", &dir(2), now);
        nodes.given(2, b"b", &dir(3), now);
        nodes.given(3, b"l", &link(11), now);
        assert_eq!((nodes.depth(10, now), nodes.depth(11, now), nodes.depth(99, now)), (Some(0), Some(2), None));
    }

    #[test]
    fn the_shallowest_place_of_a_directory_counts() {
        let (mut nodes, now) = (Nodes::default(), Instant::now());
        nodes.given(ROOT, b"a", &dir(2), now);
        nodes.given(2, b"b", &dir(3), now);
        nodes.given(3, b"l", &link(10), now);
        nodes.given(ROOT, b"b", &dir(3), now);
        assert_eq!(nodes.depth(10, now), Some(1));
        nodes.given(2, b"b", &dir(3), now);
        assert_eq!(nodes.depth(10, now + LATER), Some(1), "it may still be at the other place");
        nodes.gone(ROOT, b"b", now);
        assert_eq!(nodes.depth(10, now), Some(1), "the kernel may not know yet");
        assert_eq!(nodes.depth(10, now + LATER), Some(2));
    }

    #[test]
    fn a_hard_linked_symlink_is_as_deep_as_its_shallowest_fresh_name() {
        let (mut nodes, now) = (Nodes::default(), Instant::now());
        nodes.given(ROOT, b"a", &dir(2), now);
        nodes.given(ROOT, b"l", &link(10), now);
        nodes.given(2, b"l", &link(10), now);
        assert_eq!(nodes.depth(10, now), Some(0));
        assert_eq!(nodes.depth(10, now + LATER), Some(1));
    }

    #[test]
    fn a_rename_on_the_host_moves_what_is_below() {
        let (mut nodes, now) = (Nodes::default(), Instant::now());
        nodes.given(ROOT, b"a", &dir(2), now);
        nodes.given(2, b"b", &dir(3), now);
        nodes.given(3, b"l", &link(10), now);
        nodes.renamed((2, b"b"), (ROOT, b"c"), false, now);
        assert_eq!(nodes.depth(10, now), Some(1), "shallower at once");
        nodes.renamed((ROOT, b"c"), (2, b"b"), false, now);
        assert_eq!(nodes.depth(10, now), Some(1), "deeper only when the kernel must know");
        assert_eq!(nodes.depth(10, now + LATER), Some(2));
    }

    #[test]
    fn an_exchange_moves_both() {
        let (mut nodes, now) = (Nodes::default(), Instant::now());
        nodes.given(ROOT, b"a", &dir(2), now);
        nodes.given(2, b"b", &dir(3), now);
        nodes.given(3, b"l", &link(10), now);
        nodes.given(ROOT, b"x", &dir(4), now);
        nodes.given(4, b"l", &link(11), now);
        nodes.renamed((2, b"b"), (ROOT, b"x"), true, now);
        let later = now + LATER;
        assert_eq!((nodes.depth(10, later), nodes.depth(11, later)), (Some(1), Some(2)));
    }

    #[test]
    fn a_circle_has_no_depth() {
        let (mut nodes, now) = (Nodes::default(), Instant::now());
        nodes.given(3, b"a", &dir(2), now);
        nodes.given(2, b"b", &dir(3), now);
        nodes.given(3, b"l", &link(10), now);
        assert_eq!(nodes.depth(10, now), None);
    }

    #[test]
    fn too_many_places_count_as_the_root() {
        let (mut nodes, now) = (Nodes::default(), Instant::now());
        nodes.given(ROOT, b"a", &dir(2), now);
        for i in 0..20u8 {
            nodes.given(2, &[i], &dir(3), now);
        }
        nodes.given(3, b"l", &link(10), now);
        assert_eq!(nodes.depth(10, now), Some(1));
    }

    #[test]
    fn nothing_is_left_of_what_was_forgotten() {
        let (mut nodes, now) = (Nodes::default(), Instant::now());
        nodes.given(ROOT, b"a", &dir(2), now);
        nodes.given(ROOT, b"a", &dir(2), now);
        nodes.given(ROOT, b"b", &dir(2), now);
        nodes.forget(2, 2);
        assert_eq!(nodes.len(), (1, 2));
        nodes.forget(2, 1);
        assert_eq!(nodes.len(), (0, 0));
        nodes.given(ROOT, b"p", &entry(5, libc::S_IFREG), now);
        assert!(nodes.is_live(5));
        nodes.forget(5, 1);
        assert!(!nodes.is_live(5));
    }
}
