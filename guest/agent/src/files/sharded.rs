//! A map by number for many threads: the numbers are handed out one after the other, so their low bits spread them.

use parking_lot::RwLock;
use std::collections::HashMap;

/// How many locks a shared map is spread over.
pub(super) const SHARDS: usize = 32;

/// A map from numbers to values that are cheap to clone.
pub(super) struct Sharded<V> {
    shards: Box<[RwLock<HashMap<u64, V>>]>,
}

impl<V: Clone> Sharded<V> {
    pub(super) fn new() -> Sharded<V> {
        Sharded { shards: (0..SHARDS).map(|_| RwLock::default()).collect() }
    }

    fn shard(&self, id: u64) -> &RwLock<HashMap<u64, V>> {
        &self.shards[id as usize % SHARDS]
    }

    pub(super) fn get(&self, id: u64) -> Option<V> {
        self.shard(id).read().get(&id).cloned()
    }

    pub(super) fn insert(&self, id: u64, value: V) {
        let _replaced = self.shard(id).write().insert(id, value);
    }

    /// Takes the value out; it is dropped by the caller, outside of the lock.
    pub(super) fn remove(&self, id: u64) -> Option<V> {
        let mut map = self.shard(id).write();
        let value = map.remove(&id);
        // A storm of nodes should not leave its memory behind.
        if map.capacity() > 1024 && map.len() < map.capacity() / 8 {
            map.shrink_to_fit();
        }
        value
    }

    pub(super) fn values(&self) -> Vec<V> {
        self.shards.iter().flat_map(|shard| shard.read().values().cloned().collect::<Vec<_>>()).collect()
    }

    pub(super) fn ids(&self) -> Vec<u64> {
        self.shards.iter().flat_map(|shard| shard.read().keys().copied().collect::<Vec<_>>()).collect()
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.read().len()).sum()
    }
}
