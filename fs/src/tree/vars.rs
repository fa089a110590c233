//! `NAME/env`, `NAME/secrets`, `NAME/tags`, `NAME/ports`, `NAME/mounts`, and those of templates: files that users make, each with one value.

use super::node::{Control, Kind, MAX_SUB};
use super::ops::Caller;
use crate::machine::Machine;
use crate::machine::error::MachineError;
use crate::machine::templates::Template;
use crate::machine::vars::{VarKind, Vars};
use std::sync::Arc;

/// Whose they are.
#[derive(Clone)]
pub enum Holder {
    /// A machine's.
    Machine(Arc<Machine>),
    /// A template's.
    Template(Arc<Template>),
}

impl Holder {
    /// Its slot.
    pub fn slot(&self) -> u32 {
        match self {
            Holder::Machine(machine) => machine.slot(),
            Holder::Template(template) => template.slot(),
        }
    }

    /// All that it holds.
    pub fn vars(&self) -> &Vars {
        match self {
            Holder::Machine(machine) => machine.vars(),
            Holder::Template(template) => template.vars(),
        }
    }

    /// User and group it belongs to.
    pub fn owner(&self) -> (u32, u32) {
        match self {
            Holder::Machine(machine) => machine.owner(),
            Holder::Template(template) => template.owner(),
        }
    }

    /// Whether that user may change it.
    ///
    /// # Errors
    /// EACCES.
    pub fn check_owner(&self, caller: Caller) -> Result<(), MachineError> {
        match self {
            Holder::Machine(machine) => machine.check_owner(caller),
            Holder::Template(template) => template.check_owner(caller),
        }
    }

    /// Makes one, with an empty value.
    ///
    /// # Errors
    /// EACCES, EINVAL for a bad name, EEXIST, EMFILE.
    pub fn create(&self, caller: Caller, kind: VarKind, name: &[u8]) -> Result<u32, MachineError> {
        self.check_owner(caller)?;
        let made = match (self, kind) {
            (Holder::Machine(machine), VarKind::Port) => machine.open_port(caller, name),
            (Holder::Machine(machine), VarKind::Mount) => machine.add_mount(name),
            _ => self.vars().create(kind, name),
        };
        made.inspect_err(|error| {
            if let Holder::Machine(machine) = self {
                let shown = String::from_utf8_lossy(name);
                machine.record_error("create", error.errno(), &error.to_string(), &shown);
            }
        })
    }

    /// Sets a value. The event has its name only.
    ///
    /// # Errors
    /// Those of [`Vars::set`].
    pub fn set(&self, kind: VarKind, id: u32, value: &[u8]) -> Result<(), MachineError> {
        self.vars().set(kind, id, value)?;
        if let (Holder::Machine(machine), Some(name)) = (self, self.vars().name(kind, id)) {
            match kind {
                VarKind::Env => machine.say("env", &[("set", &name)]),
                VarKind::Secret => machine.say("secret", &[("set", &name)]),
                // Not its value: the log of all machines is open to everybody.
                VarKind::Tag => machine.say("tag", &[("set", &name)]),
                // They tell it themselves.
                VarKind::Port | VarKind::Mount | VarKind::Volume => {}
            }
        }
        Ok(())
    }

    /// Calls `done` once the last change of that kind is in force and written down, or could not be written: the next
    /// job has it. The agent of a machine is waited for as long as for one of its answers, at most.
    pub fn settled(&self, kind: VarKind, done: impl FnOnce(Result<(), MachineError>) + Send + 'static) {
        match self {
            Holder::Machine(machine) if kind == VarKind::Secret => {
                let owner = machine.clone();
                machine.secrets_changed(move || owner.settled(done));
            }
            Holder::Machine(machine) => machine.settled(done),
            Holder::Template(template) => template.settled(done),
        }
    }

    /// Removes one.
    ///
    /// # Errors
    /// EACCES.
    pub fn remove(&self, caller: Caller, kind: VarKind, id: u32) -> Result<(), MachineError> {
        self.check_owner(caller)?;
        if let (Holder::Machine(machine), VarKind::Port) = (self, kind) {
            machine.close_port(id);
            return Ok(());
        }
        let name = self.vars().name(kind, id);
        if let (true, Holder::Machine(machine), Some(name)) = (self.vars().remove(kind, id), self, name) {
            let verb = match kind {
                VarKind::Env => "env",
                VarKind::Secret => "secret",
                VarKind::Tag => "tag",
                VarKind::Port | VarKind::Mount | VarKind::Volume => return Ok(()),
            };
            machine.say(verb, &[("removed", &name)]);
        }
        Ok(())
    }
}

/// The node of one; `parent` is the directory it is in.
pub fn node(slot: u32, parent: Kind, id: u32) -> Option<Control> {
    let (_, kind) = parent.vars()?;
    (u64::from(id) <= MAX_SUB).then_some(Control { slot, kind, sub: id })
}

/// What a node of that kind is.
pub fn of_kind(kind: Kind) -> Option<VarKind> {
    Some(match kind {
        Kind::EnvVar | Kind::TemplateVar => VarKind::Env,
        Kind::Secret | Kind::TemplateSecret => VarKind::Secret,
        Kind::Tag => VarKind::Tag,
        Kind::Port => VarKind::Port,
        Kind::Mount => VarKind::Mount,
        _ => return None,
    })
}
