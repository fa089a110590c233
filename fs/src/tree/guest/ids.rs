//! Numbers of a guest and numbers of the host: nodes, inodes, users.

use super::super::ops::NodeId;
use machinefs_protocol::file::MAX_NODE;

/// Set in the node numbers of guests' files, and in their inode numbers.
const GUEST: u64 = 1 << 63;
/// Bits of a node that are the agent's.
const NODE_BITS: u32 = 40;
/// Bits of an inode number that are the agent's.
const INO_BITS: u32 = 39;
/// Boots that can be told apart in a node.
pub(super) const MAX_EPOCH: u32 = 1 << 23;
/// The user and the group that nobody is, see user_namespaces(7).
const NOBODY: u32 = 65534;

/// The node of a guest's file as the kernel holds it: the top bit, the boot, the agent's number.
pub(super) fn node_id(epoch: u32, node: u64) -> NodeId {
    GUEST | (u64::from(epoch % MAX_EPOCH) << NODE_BITS) | (node % MAX_NODE)
}

/// The boot in a node.
pub(super) fn epoch_of(node: NodeId) -> u32 {
    (node >> NODE_BITS) as u32 % MAX_EPOCH
}

/// The agent's number in a node; `None` when it is none of a guest of that boot.
pub(super) fn agent_node(epoch: u32, node: NodeId) -> Option<u64> {
    (node & GUEST != 0 && epoch_of(node) == epoch % MAX_EPOCH).then_some(node % MAX_NODE)
}

/// The inode number that programs see: the top bit, the machine's slot, the guest's number.
pub(super) fn ino(slot: u32, ino: u64) -> u64 {
    GUEST | (u64::from(slot) & 0xff_ffff) << INO_BITS | ino & ((1 << INO_BITS) - 1)
}

/// How numbers of one kind (users, or groups) are mapped: those of the machine's owner and of the guest's default
/// user are swapped. Host root acts as guest root.
#[derive(Clone, Copy, Debug)]
pub(super) struct Swap {
    pub owner: u32,
    pub default: u32,
    /// The machine belongs to the host's root: its files may show as root's.
    pub trusted: bool,
    /// `idmap=none`: numbers as they are.
    pub off: bool,
}

impl Swap {
    fn swap(self, id: u32, from: u32, to: u32) -> u32 {
        // Root on both sides stays root, so where the owner is root there is nothing to swap.
        if self.owner == 0 {
            id
        } else if id == from {
            to
        } else if id == to {
            from
        } else {
            id
        }
    }

    /// As the host shows it. What is no number at all (-1), and what would show as the host's root without being
    /// root's, is nobody's.
    pub fn to_host(self, id: u32) -> u32 {
        if id == u32::MAX {
            return NOBODY;
        }
        if self.off {
            return id;
        }
        match self.swap(id, self.default, self.owner) {
            0 if !self.trusted => NOBODY,
            id => id,
        }
    }

    /// As the guest has it.
    pub fn to_guest(self, id: u32) -> u32 {
        if self.off || id == 0 { id } else { self.swap(id, self.owner, self.default) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn swap(owner: u32, default: u32) -> Swap {
        Swap { owner, default, trusted: owner == 0, off: false }
    }

    #[test]
    fn node_and_epoch_come_back() {
        for (epoch, node) in [(0, 1), (7, 2), (MAX_EPOCH - 1, MAX_NODE - 1)] {
            let id = node_id(epoch, node);
            assert_eq!((epoch_of(id), agent_node(epoch, id)), (epoch, Some(node)));
            assert_eq!(agent_node(epoch + 1, id), None);
            assert_eq!(agent_node(epoch, id & !GUEST), None);
        }
    }

    #[test]
    fn inode_numbers_of_two_machines_differ() {
        assert_ne!(ino(1, 5), ino(2, 5));
        assert_ne!(ino(1, 5), ino(1, 6));
        assert_eq!(ino(0xff_ffff, (1 << 39) - 1), u64::MAX);
        assert_eq!(ino(1, 1 << 39 | 5), ino(1, 5), "a number too large cannot reach another machine's");
    }

    #[test]
    fn owner_and_default_user_are_swapped() {
        let map = swap(1000, 0);
        assert_eq!((map.to_host(0), map.to_guest(1000)), (1000, 0));
        assert_eq!((map.to_host(33), map.to_guest(33)), (33, 33));
        let map = swap(1000, 500);
        assert_eq!((map.to_host(500), map.to_guest(1000)), (1000, 500));
        assert_eq!((map.to_host(1000), map.to_guest(500)), (500, 1000));
    }

    #[test]
    fn nothing_of_a_guest_shows_as_the_hosts_root() {
        for map in [swap(1000, 0), swap(1000, 500), swap(1000, 1000)] {
            for id in [0, 500, 1000, 65534, u32::MAX] {
                assert_ne!(map.to_host(id), 0, "{map:?} {id}");
            }
            assert_eq!(map.to_guest(0), 0, "host root acts as guest root");
        }
        assert_eq!(swap(1000, 0).to_host(1000), NOBODY);
    }

    #[test]
    fn roots_own_machine_is_not_mapped() {
        let map = swap(0, 1000);
        assert_eq!((map.to_host(0), map.to_host(1000), map.to_guest(0), map.to_guest(1000)), (0, 1000, 0, 1000));
    }

    #[test]
    fn idmap_none_leaves_numbers() {
        let map = Swap { off: true, ..swap(1000, 0) };
        assert_eq!((map.to_host(0), map.to_host(1000), map.to_guest(1000)), (0, 1000, 1000));
        assert_eq!(map.to_host(u32::MAX), NOBODY, "-1 is no user");
    }
}
