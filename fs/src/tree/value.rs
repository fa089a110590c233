//! A file with one value, as in `config/`, `env/` and `tags/`: checked at each write, set when its text is complete.

use super::ops::{Answer, Caller, Responder};
use super::text::{Owner, Reason, Text, is_full_buffer, slice};
use super::vars::Holder;
use crate::errno::Errno;
use crate::machine::Machine;
use crate::machine::config::ConfigKey;
use crate::machine::error::MachineError;
use crate::machine::job::Job;
use crate::machine::setup::Field;
use crate::machine::templates::Template;
use crate::machine::vars::VarKind;
use parking_lot::Mutex;
use std::sync::Arc;
use zeroize::Zeroize;

/// What a value file is the value of.
#[derive(Clone)]
pub enum Setting {
    /// `config/KEY`
    Key(Arc<Machine>, &'static ConfigKey),
    /// `config/KEY` of a template
    TemplateKey(Arc<Template>, &'static ConfigKey),
    /// `jobs/JOB/cwd` and its like
    Job(Arc<Machine>, Arc<Job>, Field),
    /// `jobs/JOB/argv`
    Argv(Arc<Machine>, Arc<Job>),
    /// `env/NAME`, `secrets/NAME`, `tags/NAME`
    Var(Holder, VarKind, u32),
}

impl Setting {
    /// What a read gives.
    pub fn text(&self) -> Vec<u8> {
        match self {
            Setting::Key(machine, key) => line(machine.config_get(key.name)),
            Setting::TemplateKey(template, key) => line(template.config_get(key.name)),
            Setting::Job(_, job, field) => job.field(*field),
            Setting::Argv(_, job) => job.argv(),
            Setting::Var(Holder::Machine(machine), VarKind::Port, id) => line(machine.port_url(*id)),
            Setting::Var(Holder::Machine(machine), VarKind::Mount, id) => line(machine.mount_text(*id)),
            Setting::Var(holder, kind, id) => {
                holder.vars().value(*kind, *id).map(|value| [&value[..], b"\n"].concat()).unwrap_or_default()
            }
        }
    }

    fn check_owner(&self, caller: Caller) -> Result<(), MachineError> {
        match self {
            Setting::Key(machine, _) | Setting::Job(machine, ..) | Setting::Argv(machine, _) => {
                machine.check_owner(caller)
            }
            Setting::TemplateKey(template, _) => template.check_owner(caller),
            Setting::Var(holder, ..) => holder.check_owner(caller),
        }
    }

    fn check(&self, value: &[u8]) -> Result<(), MachineError> {
        match self {
            Setting::Key(machine, key) => machine.config_check(key.name, text(value)?),
            Setting::TemplateKey(template, key) => template.config_check(key.name, text(value)?),
            Setting::Job(_, job, field) => job.check_field(*field, value),
            Setting::Argv(machine, job) => machine.jobs().check_argv(job, value),
            Setting::Var(_, kind, _) => kind.check_value(value),
        }
    }

    fn set(&self, value: &[u8]) -> Result<(), MachineError> {
        match self {
            Setting::Key(machine, key) => machine.config_set(key.name, text(value)?),
            Setting::TemplateKey(template, key) => template.config_set(key.name, text(value)?),
            Setting::Job(machine, job, field) => machine.jobs().set_field(job, *field, value),
            Setting::Argv(machine, job) => machine.jobs().run_argv(job, value),
            Setting::Var(holder, kind, id) => holder.set(*kind, *id, value),
        }
    }

    /// Calls `done` once what was set is in force and written down, or could not be written.
    fn settled(&self, done: impl FnOnce(Result<(), MachineError>) + Send + 'static) {
        match self {
            Setting::Key(machine, _) | Setting::Job(machine, ..) | Setting::Argv(machine, _) => machine.settled(done),
            Setting::TemplateKey(template, _) => template.settled(done),
            Setting::Var(holder, kind, _) => holder.settled(*kind, done),
        }
    }

    /// Keeps a refusal for `errors`. What was written is shown for what is no secret.
    fn refused(&self, errno: Errno, message: &str, bytes: &[u8]) {
        let shown = || String::from_utf8_lossy(slice(bytes, 0, 200)).trim_end().to_string();
        match self {
            Setting::Key(machine, key) => {
                machine.record_error("config", errno, message, &format!("{}={}", key.name, shown()));
            }
            Setting::Job(machine, job, _) | Setting::Argv(machine, job) => {
                machine.record_error("job", errno, message, &format!("{}: {}", job.number(), shown()));
            }
            Setting::Var(Holder::Machine(machine), kind, id) => {
                let name = machine.vars().name(*kind, *id).unwrap_or_default();
                let value = if *kind == VarKind::Tag { shown() } else { "…".into() };
                machine.record_error("config", errno, message, &format!("{name}={value}"));
            }
            // A template has no `errors`: the reason is read where the value was written.
            Setting::TemplateKey(..) | Setting::Var(Holder::Template(_), ..) => {}
        }
    }
}

fn line(value: Option<String>) -> Vec<u8> {
    value.map(|value| format!("{value}\n").into_bytes()).unwrap_or_default()
}

fn text(value: &[u8]) -> Result<&str, MachineError> {
    std::str::from_utf8(value).map_err(|_| MachineError::invalid("the value is not UTF-8 text"))
}

/// An open value file.
pub struct ValueFile {
    setting: Setting,
    snapshot: Vec<u8>,
    text: Mutex<Text>,
    reason: Reason,
}

impl ValueFile {
    /// Opens the file.
    pub fn new(setting: Setting, text: Text) -> ValueFile {
        let snapshot = setting.text();
        ValueFile { setting, snapshot, text: Mutex::new(text), reason: Reason::default() }
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
        if let Err(error) = self.setting.check_owner(caller) {
            return Err(self.refuse(&mut text, owner, error.errno(), &error.to_string()));
        }
        if let Err(errno) = text.push(owner, data) {
            return Err(self.refuse(&mut text, owner, errno, "the value is too long"));
        }
        if !is_full_buffer(data.len())
            && let Err(error) = self.setting.check(value(text.bytes()))
        {
            return Err(self.refuse(&mut text, owner, error.errno(), &error.to_string()));
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
        let _reported = complete.map(|bytes| self.try_set(bytes));
    }

    /// Bytes at an offset: why the last write failed, else the value as it was at open.
    pub fn read(&self, offset: u64, max: usize) -> Vec<u8> {
        self.reason.read(offset, max).unwrap_or_else(|| slice(&self.snapshot, offset, max).to_vec())
    }

    fn set(&self, complete: Option<Vec<u8>>, responder: Responder) {
        let Some(bytes) = complete else { return responder.respond(Ok(Answer::Ok)) };
        if let Err(errno) = self.try_set(bytes) {
            return responder.respond(Err(errno));
        }
        // Who changes values in a loop waits for the disk here, and nobody else does.
        self.setting.settled(move |written| {
            responder.respond(written.map(|()| Answer::Ok).map_err(|error| error.errno()));
        });
    }

    fn try_set(&self, mut bytes: Vec<u8>) -> Result<(), Errno> {
        let set = self.setting.set(value(&bytes)).map_err(|error| {
            self.report(error.errno(), &error.to_string(), &bytes);
            error.errno()
        });
        // It may be a secret.
        bytes.zeroize();
        set
    }

    fn refuse(&self, text: &mut Text, owner: Owner, errno: Errno, message: &str) -> Errno {
        self.report(errno, message, text.bytes());
        text.refuse(owner, errno);
        errno
    }

    fn report(&self, errno: Errno, message: &str, bytes: &[u8]) {
        self.reason.set(message);
        self.setting.refused(errno, message, bytes);
    }
}

/// A value as it was written: one newline at the end is not part of it.
fn value(bytes: &[u8]) -> &[u8] {
    bytes.strip_suffix(b"\n").unwrap_or(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_newline_is_not_part_of_the_value() {
        assert_eq!(value(b"2G\n"), b"2G");
        assert_eq!(value(b"2G"), b"2G");
        assert_eq!(value(b"2G\n\n"), b"2G\n");
        assert_eq!(value(b"\n"), b"");
        assert!(text(b"\xff").is_err());
    }
}
