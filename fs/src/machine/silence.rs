//! Whether a machine's agent answers, as `.sys/health` and `errors` have it.
//!
//! Each second all running machines are looked at, and every few seconds an idle link is asked for a sign of life.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};

/// Seconds between two questions to the agent.
pub(super) const ASK_EVERY: u64 = 10;
/// So many looks must have found nobody, so that a link that is being renewed is no fault.
const LOOKS: u32 = 4;

/// What was found last.
#[derive(Default)]
pub(super) struct Silence {
    looks: AtomicU32,
    told: AtomicBool,
}

impl Silence {
    /// A look found the agent answering, or not. Gives the news, if there is any: whether it is silent.
    pub fn look(&self, answers: bool) -> Option<bool> {
        if answers {
            return self.set(false);
        }
        let looks = self.looks.fetch_add(1, Relaxed).saturating_add(1);
        if looks >= LOOKS { self.set(true) } else { None }
    }

    /// It is known.
    pub fn set(&self, silent: bool) -> Option<bool> {
        if !silent {
            self.looks.store(0, Relaxed);
        }
        (self.told.swap(silent, Relaxed) != silent).then_some(silent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_silence_is_no_news_and_a_long_one_is_told_once() {
        let silence = Silence::default();
        assert_eq!(silence.look(false), None);
        assert_eq!(silence.look(true), None);
        let news: Vec<Option<bool>> = (0..LOOKS + 3).map(|_| silence.look(false)).collect();
        assert_eq!(news.iter().filter(|news| **news == Some(true)).count(), 1);
        assert_eq!(silence.look(true), Some(false));
        assert_eq!(silence.look(true), None);
    }
}
