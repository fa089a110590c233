//! Operations that are answered by whichever comes first: the result of what was asked of a machine, or an interrupt.

use super::ops::{Answer, Cancel, Responder};
use crate::errno::Errno;
use parking_lot::Mutex;
use std::sync::Arc;

/// Such an operation, and what is kept for its answer.
pub struct Asked<T>(Mutex<Option<(Responder, T)>>);

impl<T: Send + 'static> Asked<T> {
    /// From here on an interrupt is answered with EINTR. `None`: there was one already.
    pub fn begin(mut responder: Responder, kept: T) -> Option<Arc<Asked<T>>> {
        let asked = Arc::new(Asked(Mutex::new(None)));
        // Held until the responder is in it: an interrupt that comes in between waits for a moment.
        let mut inside = asked.0.lock();
        if !responder.set_cancel(asked.clone()) {
            drop(inside);
            responder.respond(Err(Errno::EINTR));
            return None;
        }
        *inside = Some((responder, kept));
        drop(inside);
        Some(asked)
    }

    /// Whether it still wants an answer.
    pub fn is_waiting(&self) -> bool {
        self.0.lock().is_some()
    }

    /// Answers, unless it was interrupted: then `result`, which may open something, is not made.
    pub fn answer(&self, result: impl FnOnce(T) -> Result<Answer, Errno>) {
        let waiting = self.0.lock().take();
        if let Some((responder, kept)) = waiting {
            responder.respond(result(kept));
        }
    }
}

impl<T: Send + 'static> Cancel for Asked<T> {
    fn cancel(&self) {
        self.answer(|_| Err(Errno::EINTR));
    }
}
