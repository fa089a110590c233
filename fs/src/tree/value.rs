//! A file with one value, as in `config/`: checked at each write, set when its text is complete.

use super::ops::{Answer, Caller, Responder};
use super::text::{Owner, Reason, Text, is_full_buffer, slice};
use crate::errno::Errno;
use crate::machine::Machine;
use crate::machine::config::ConfigKey;
use crate::machine::error::MachineError;
use parking_lot::Mutex;
use std::sync::Arc;

/// An open value file.
pub struct ValueFile {
    machine: Arc<Machine>,
    key: &'static ConfigKey,
    snapshot: Vec<u8>,
    text: Mutex<Text>,
    reason: Reason,
}

impl ValueFile {
    /// Opens the file of a key.
    pub fn new(machine: Arc<Machine>, key: &'static ConfigKey, text: Text) -> ValueFile {
        let snapshot = value_text(&machine, key);
        ValueFile { machine, key, snapshot, text: Mutex::new(text), reason: Reason::default() }
    }

    /// Adds to the value. What there is of it is checked, unless it looks like the first part of a longer one: errors
    /// must come from write, since shells drop those of close.
    ///
    /// # Errors
    /// EACCES, EINVAL, EBUSY, E2BIG, ENOSPC; the reason can be read here and in `errors`.
    pub fn write(&self, caller: Caller, owner: Owner, data: &[u8]) -> Result<(), Errno> {
        let mut text = self.text.lock();
        text.check()?;
        if data.is_empty() {
            return Ok(());
        }
        if let Err(error) = self.machine.check_owner(caller) {
            return Err(self.refuse(&mut text, owner, error.errno(), &error.to_string()));
        }
        if let Err(errno) = text.push(owner, data) {
            return Err(self.refuse(&mut text, owner, errno, "the value is too long"));
        }
        if !is_full_buffer(data.len()) {
            let checked = value(text.bytes()).and_then(|value| self.machine.config_check(self.key.name, value));
            if let Err(error) = checked {
                return Err(self.refuse(&mut text, owner, error.errno(), &error.to_string()));
            }
        }
        self.reason.clear();
        Ok(())
    }

    /// A descriptor was closed. A value that was complete with that is answered when it is written down.
    pub fn flush(&self, owner: Owner, responder: Responder) {
        let complete = self.text.lock().flush(owner);
        self.set(complete, responder);
    }

    /// The value, if one was written, is complete; answers as [`ValueFile::flush`].
    pub fn finish(&self, responder: Responder) {
        let complete = self.text.lock().end();
        self.set(complete, responder);
    }

    /// The same, with nobody to answer to: why it was refused can be read.
    pub fn end(&self) {
        let complete = self.text.lock().end();
        let _reported = complete.map(|bytes| self.try_set(&bytes));
    }

    /// Bytes at an offset: why the last write failed, else the value as it was at open.
    pub fn read(&self, offset: u64, max: usize) -> Vec<u8> {
        self.reason.read(offset, max).unwrap_or_else(|| slice(&self.snapshot, offset, max).to_vec())
    }

    fn set(&self, complete: Option<Vec<u8>>, responder: Responder) {
        let Some(bytes) = complete else { return responder.respond(Ok(Answer::Ok)) };
        if let Err(errno) = self.try_set(&bytes) {
            return responder.respond(Err(errno));
        }
        // Who changes values in a loop waits for the disk here, and nobody else does.
        self.machine.settled(move |written| {
            responder.respond(written.map(|()| Answer::Ok).map_err(|error| error.errno()));
        });
    }

    fn try_set(&self, bytes: &[u8]) -> Result<(), Errno> {
        value(bytes).and_then(|value| self.machine.config_set(self.key.name, value)).map_err(|error| {
            self.report(error.errno(), &error.to_string(), bytes);
            error.errno()
        })
    }

    fn refuse(&self, text: &mut Text, owner: Owner, errno: Errno, message: &str) -> Errno {
        self.report(errno, message, text.bytes());
        text.refuse(owner, errno);
        errno
    }

    fn report(&self, errno: Errno, message: &str, bytes: &[u8]) {
        let shown = String::from_utf8_lossy(slice(bytes, 0, 200)).trim_end().to_string();
        self.reason.set(message);
        self.machine.record_error("config", errno, message, &format!("{}={shown}", self.key.name));
    }
}

/// What a read of a key's file gives.
pub fn value_text(machine: &Machine, key: &ConfigKey) -> Vec<u8> {
    machine.config_get(key.name).map(|value| format!("{value}\n").into_bytes()).unwrap_or_default()
}

/// A value as it was written: one newline at the end is not part of it.
fn value(bytes: &[u8]) -> Result<&str, MachineError> {
    let bytes = bytes.strip_suffix(b"\n").unwrap_or(bytes);
    std::str::from_utf8(bytes).map_err(|_| MachineError::invalid("the value is not UTF-8 text"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_newline_is_not_part_of_the_value() {
        assert_eq!(value(b"2G\n").unwrap(), "2G");
        assert_eq!(value(b"2G").unwrap(), "2G");
        assert_eq!(value(b"2G\n\n").unwrap(), "2G\n");
        assert_eq!(value(b"\n").unwrap(), "");
        assert!(value(b"\xff\n").is_err());
    }
}
