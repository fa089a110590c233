//! Opening `NAME/changes`: the machine's disk is looked at, and the open is answered when that is done.

use super::open::{Body, OpenTable, Seat, opened};
use super::ops::{Answer, Cancel, NodeId, Responder};
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

/// Opens it. An opener that is interrupted ends the look.
pub fn open(table: &Arc<OpenTable>, node: NodeId, machine: &Arc<Machine>, seat: Seat, mut responder: Responder) {
    let opening = Arc::new(Opening(Mutex::new(None)));
    // Held until the responder is in it: an interrupt that comes in between waits for a moment.
    let mut waiting = opening.0.lock();
    if !responder.set_cancel(opening.clone()) {
        drop(waiting);
        return responder.respond(Err(Errno::EINTR));
    }
    *waiting = Some((responder, seat));
    drop(waiting);
    let (table, asked) = (table.clone(), opening.clone());
    let done = Box::new(move |looked: Result<_, crate::machine::error::MachineError>| {
        let waiting = opening.0.lock().take();
        let Some((responder, seat)) = waiting else { return };
        responder.respond(match looked {
            Ok(look) => {
                let handle = table.insert(node, Body::Changes(look), seat);
                Ok(Answer::Opened(opened(handle, false, false)))
            }
            Err(error) => Err(error.errno()),
        });
    });
    machine.look_at_changes(move || asked.0.lock().is_some(), done);
}
