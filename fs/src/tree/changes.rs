//! Opening `NAME/changes`: the machine's disk is looked at, and the open is answered when that is done.

use super::asked::Asked;
use super::open::{Body, OpenTable, Seat, opened};
use super::ops::{Answer, NodeId, Responder};
use crate::machine::Machine;
use std::sync::Arc;

/// Opens it. An opener that is interrupted ends the look.
pub fn open(table: &Arc<OpenTable>, node: NodeId, machine: &Arc<Machine>, seat: Seat, responder: Responder) {
    let Some(asked) = Asked::begin(responder, seat) else { return };
    let (table, answered) = (table.clone(), asked.clone());
    let done = Box::new(move |looked: Result<_, crate::machine::error::MachineError>| {
        answered.answer(|seat| {
            let look = looked.map_err(|error| error.errno())?;
            let handle = table.insert(node, Body::Changes(look), seat);
            Ok(Answer::Opened(opened(handle, false, false)))
        });
    });
    machine.look_at_changes(move || asked.is_waiting(), done);
}
