//! Opening `NAME/health` and `NAME/usage`: the agent or the backend is asked, and the open is answered when it is.

use super::open::{Body, OpenTable, Seat, opened};
use super::ops::{Answer, Cancel, NodeId, Responder};
use super::place::Map;
use crate::errno::Errno;
use crate::machine::Machine;
use parking_lot::Mutex;
use std::sync::Arc;

struct Opening(Mutex<Option<(Responder, Seat)>>);

impl Cancel for Opening {
    fn cancel(&self) {
        let waiting = self.0.lock().take();
        if let Some((responder, _)) = waiting {
            responder.respond(Err(Errno::EINTR));
        }
    }
}

/// What is asked.
pub enum Question {
    /// `health`, of the agent.
    Health,
    /// `usage`, of the backend.
    Usage,
}

/// Opens it: the text is what was answered.
pub fn open(
    map: &Arc<Map>,
    table: &Arc<OpenTable>,
    node: NodeId,
    machine: &Arc<Machine>,
    question: Question,
    seat: Seat,
    mut responder: Responder,
) {
    let opening = Arc::new(Opening(Mutex::new(None)));
    // Held until the responder is in it: an interrupt that comes in between waits for a moment.
    let mut waiting = opening.0.lock();
    if !responder.set_cancel(opening.clone()) {
        drop(waiting);
        return responder.respond(Err(Errno::EINTR));
    }
    *waiting = Some((responder, seat));
    drop(waiting);
    let is_health = matches!(question, Question::Health);
    let (map, table, of_machine) = (map.clone(), table.clone(), machine.clone());
    let answered = Box::new(move |text: String| {
        let waiting = opening.0.lock().take();
        // Nobody: the opener was interrupted, and there is no open file.
        let Some((responder, seat)) = waiting else { return };
        if is_health {
            map.note_health(&of_machine, text.len() as u64);
        }
        let handle = table.insert(node, Body::Text(text.into_bytes()), seat);
        responder.respond(Ok(Answer::Opened(opened(handle, false, false))));
    });
    match question {
        Question::Health => machine.health(answered),
        Question::Usage => machine.usage(answered),
    }
}
