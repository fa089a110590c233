//! Files that were just made here.
//!
//! Before the first write to a file the kernel asks for its capabilities (`security.capability`, with no room for the
//! value), to take them away. Of a file that was made a moment ago the answer is known, and a round trip to the guest
//! is a good part of what making a small file costs. Were it wrong, because the guest has given the file capabilities
//! in that moment, nothing would be lost: the guest's kernel takes them away at the write, too.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// What the kernel asks for.
pub const CAPABILITY: &[u8] = b"security.capability";
/// How long a file is new.
const NEW: Duration = Duration::from_millis(100);
/// Files that are remembered, at most: who makes files writes them one by one, or a few side by side.
const MOST: usize = 64;

/// The newest files, the newest last.
#[derive(Default)]
pub struct Fresh {
    files: VecDeque<(u64, Instant)>,
}

impl Fresh {
    /// A file was made.
    pub fn made(&mut self, node: u64) {
        if self.files.len() >= MOST {
            self.files.pop_front();
        }
        self.files.push_back((node, Instant::now()));
    }

    /// Whether the file is new and this was not asked before.
    pub fn is_first_write(&mut self, node: u64) -> bool {
        let Some(place) = self.files.iter().rposition(|&(made, _)| made == node) else { return false };
        self.files.remove(place).is_some_and(|(_, at)| at.elapsed() < NEW)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_file_is_asked_once() {
        let mut fresh = Fresh::default();
        fresh.made(7);
        assert!(fresh.is_first_write(7));
        assert!(!fresh.is_first_write(7));
        assert!(!fresh.is_first_write(8));
    }

    #[test]
    fn only_the_newest_are_remembered() {
        let mut fresh = Fresh::default();
        for node in 0..=MOST as u64 {
            fresh.made(node);
        }
        assert!(!fresh.is_first_write(0));
        assert!(fresh.is_first_write(MOST as u64));
    }

    #[test]
    fn a_file_does_not_stay_new() {
        let mut fresh = Fresh::default();
        fresh.files.push_back((7, Instant::now() - NEW));
        assert!(!fresh.is_first_write(7));
    }
}
