//! Files whose value is in force when its write returns: `ports/PORT`, `mounts/PATH`. What could not be done is told by
//! the write, since shells drop the errors of close. A text without a newline at its end may go on in another write: it
//! is looked at when it is written, and in force when its writer closes.

use super::asked::Asked;
use super::ops::{Answer, Caller, Responder};
use super::text::{Owner, Reason, Text, is_full_buffer, slice};
use crate::errno::Errno;
use crate::machine::Machine;
use crate::machine::error::MachineError;
use crate::machine::vars::VarKind;
use parking_lot::Mutex;
use std::sync::Arc;

/// What the file is of.
#[derive(Clone, Copy)]
pub enum What {
    /// A port of the guest.
    Port,
    /// A mount in the guest.
    Mount,
}

impl What {
    /// Of a named thing of a machine, if it is such a file.
    pub fn of(kind: VarKind) -> Option<What> {
        match kind {
            VarKind::Port => Some(What::Port),
            VarKind::Mount => Some(What::Mount),
            _ => None,
        }
    }
}

/// An open file of this kind.
pub struct PutFile {
    machine: Arc<Machine>,
    what: What,
    id: u32,
    snapshot: Vec<u8>,
    text: Mutex<Text>,
    /// The text that is in force, if it is of this open file.
    done: Mutex<Option<(Vec<u8>, Caller)>>,
    reason: Reason,
}

impl PutFile {
    /// Opens the file.
    pub fn new(machine: Arc<Machine>, what: What, id: u32, snapshot: Vec<u8>, text: Text) -> Arc<PutFile> {
        let (text, done) = (Mutex::new(text), Mutex::default());
        Arc::new(PutFile { machine, what, id, snapshot, text, done, reason: Reason::default() })
    }

    /// Adds to the value, and puts it in force if it ends with a newline.
    pub fn write(self: &Arc<Self>, caller: Caller, owner: Owner, data: &[u8], responder: Responder) {
        let count = data.len() as u32;
        match self.push(caller, owner, data) {
            Err(errno) => responder.respond(Err(errno)),
            Ok(None) => responder.respond(Ok(Answer::Count(count))),
            Ok(Some(bytes)) => {
                let Some(waiting) = Asked::begin(responder, ()) else { return };
                let (file, in_force) = (self.clone(), bytes.ends_with(b"\n"));
                self.put(caller, bytes.clone(), in_force, move |result| {
                    let answer = match result {
                        Ok(()) => {
                            file.reason.clear();
                            if in_force {
                                *file.done.lock() = Some((bytes, caller));
                            }
                            Ok(Answer::Count(count))
                        }
                        Err(error) => {
                            let mut text = file.text.lock();
                            file.report(error.errno(), &error.to_string(), &bytes);
                            text.refuse(owner, error.errno());
                            Err(error.errno())
                        }
                    };
                    waiting.answer(|()| answer);
                });
            }
        }
    }

    /// The text so far, if it is to be looked at.
    fn push(&self, caller: Caller, owner: Owner, data: &[u8]) -> Result<Option<Vec<u8>>, Errno> {
        let mut text = self.text.lock();
        text.check()?;
        if data.is_empty() {
            return Ok(None);
        }
        let refused = match self.machine.check_owner(caller) {
            Err(error) => Some((error.errno(), error.to_string())),
            Ok(()) => text.push(owner, data).err().map(|errno| (errno, "the text is too long".to_string())),
        };
        if let Some((errno, message)) = refused {
            self.report(errno, &message, text.bytes());
            text.refuse(owner, errno);
            return Err(errno);
        }
        self.done.lock().replace((Vec::new(), caller));
        Ok((!is_full_buffer(data.len())).then(|| text.bytes().to_vec()))
    }

    fn put(
        &self,
        caller: Caller,
        bytes: Vec<u8>,
        in_force: bool,
        done: impl FnOnce(Result<(), MachineError>) + Send + 'static,
    ) {
        match (self.what, in_force) {
            (What::Port, true) => done(self.machine.set_port(caller, self.id, &bytes)),
            (What::Port, false) => done(self.machine.check_port(&bytes)),
            (What::Mount, _) => self.machine.put_mount(self.id, bytes, in_force, Box::new(done)),
        }
    }

    /// A descriptor was closed: what is not in force yet is put in force. Answered when it is written down.
    pub fn flush(self: &Arc<Self>, owner: Owner, responder: Responder) {
        let complete = self.text.lock().flush(owner);
        self.complete(complete, Some(responder));
    }

    /// The text, if one was written, is complete; answers as [`PutFile::flush`].
    pub fn finish(self: &Arc<Self>, responder: Responder) {
        let complete = self.text.lock().end();
        self.complete(complete, Some(responder));
    }

    /// The same, with nobody to answer to.
    pub fn end(self: &Arc<Self>) {
        let complete = self.text.lock().end();
        self.complete(complete, None);
    }

    fn complete(self: &Arc<Self>, complete: Option<Vec<u8>>, responder: Option<Responder>) {
        let last = if complete.is_some() { self.done.lock().take() } else { None };
        let written = complete.zip(last);
        let Some((bytes, (done, caller))) = written else {
            if let Some(responder) = responder {
                responder.respond(Ok(Answer::Ok));
            }
            return;
        };
        let waiting = match responder.map(|responder| Asked::begin(responder, ())) {
            Some(None) => return,
            Some(Some(waiting)) => Some(waiting),
            None => None,
        };
        let answer = |waiting: Option<Arc<Asked<()>>>, result: Result<(), Errno>| {
            if let Some(waiting) = waiting {
                waiting.answer(|()| result.map(|()| Answer::Ok));
            }
        };
        let settle = move |machine: &Arc<Machine>, waiting| {
            machine.settled(move |written| answer(waiting, written.map_err(|error| error.errno())));
        };
        if done == bytes {
            return settle(&self.machine, waiting);
        }
        let file = self.clone();
        self.put(caller, bytes.clone(), true, move |result| match result {
            Ok(()) => settle(&file.machine, waiting),
            Err(error) => {
                file.report(error.errno(), &error.to_string(), &bytes);
                answer(waiting, Err(error.errno()));
            }
        });
    }

    /// Bytes at an offset: why the last write failed, else the value as it was at open.
    pub fn read(&self, offset: u64, max: usize) -> Vec<u8> {
        self.reason.read(offset, max).unwrap_or_else(|| slice(&self.snapshot, offset, max).to_vec())
    }

    fn report(&self, errno: Errno, message: &str, bytes: &[u8]) {
        let (verb, kind) = match self.what {
            What::Port => ("port", VarKind::Port),
            What::Mount => ("mount", VarKind::Mount),
        };
        let name = self.machine.vars().name(kind, self.id).unwrap_or_default();
        let shown = String::from_utf8_lossy(slice(bytes, 0, 200)).trim_end().to_string();
        self.reason.set(message);
        self.machine.record_error(verb, errno, message, &format!("{name}={shown}"));
    }
}
