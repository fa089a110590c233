//! `NAME/config/`: one value a file.

use super::node::{Control, Kind, hash28};
use crate::machine::config::{ConfigKey, KEYS};

/// The node of a key.
pub fn node(slot: u32, key: &ConfigKey) -> Control {
    Control { slot, kind: Kind::ConfigKey, sub: hash28(key.name.as_bytes()) }
}

/// The key whose node has this `sub`.
pub fn by_sub(sub: u32) -> Option<&'static ConfigKey> {
    KEYS.iter().find(|key| hash28(key.name.as_bytes()) == sub)
}

/// The key of that name.
pub fn by_name(name: &[u8]) -> Option<&'static ConfigKey> {
    KEYS.iter().find(|key| key.name.as_bytes() == name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn no_two_keys_share_a_node() {
        let subs: HashSet<u32> = KEYS.iter().map(|key| node(1, key).sub).collect();
        assert_eq!(subs.len(), KEYS.len());
        assert!(KEYS.iter().all(|key| by_sub(node(1, key).sub).is_some_and(|found| found.name == key.name)));
    }
}
