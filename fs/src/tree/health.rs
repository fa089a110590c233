//! Opening `NAME/health` and `NAME/usage`: the agent or the backend is asked, and the open is answered when it is.

use super::asked::Asked;
use super::open::{Body, OpenTable, Seat, opened};
use super::ops::{Answer, NodeId, Responder};
use super::place::Map;
use crate::machine::Machine;
use std::sync::Arc;

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
    responder: Responder,
) {
    let Some(asked) = Asked::begin(responder, seat) else { return };
    let is_health = matches!(question, Question::Health);
    let (map, table, of_machine) = (map.clone(), table.clone(), machine.clone());
    let answered = Box::new(move |text: String| {
        asked.answer(|seat| {
            if is_health {
                map.note_health(&of_machine, text.len() as u64);
            }
            let handle = table.insert(node, Body::Text(text.into_bytes()), seat);
            Ok(Answer::Opened(opened(handle, false, false)))
        });
    });
    match question {
        Question::Health => machine.health(answered),
        Question::Usage => machine.usage(answered),
    }
}
