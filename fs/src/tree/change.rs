//! What makes, moves and removes: machines, jobs and templates by their directories, variables by their files; nothing
//! else.

use super::node::Kind;
use super::ops::{Answer, Caller, NodeId, Op, ROOT, Responder};
use super::place::{Map, Place};
use super::root::check_free;
use super::vars::Holder;
use crate::errno::Errno;
use crate::machine::Machine;
use crate::machine::error::MachineError;
use crate::machine::vars::VarKind;
use std::sync::Arc;

/// mkdir(2).
pub fn mkdir(map: &Arc<Map>, caller: Caller, parent: &Place, name: &[u8], responder: Responder) {
    if let Place::Service(Kind::Templates) = parent {
        let made = map.registry.templates().create(caller, name);
        return match made {
            Ok(template) => {
                let place = Place::Template(template, Kind::Template);
                answer_when_settled(map, responder, Answer::Entry(map.entry(&place)));
            }
            Err(error) => responder.respond(Err(error.errno())),
        };
    }
    if let Place::Machine(machine, Kind::Jobs) = parent {
        return match machine.jobs().prepare(caller, name) {
            Ok(job) => {
                let place = Place::Job(machine.clone(), job, Kind::Job);
                answer_when_settled(map, responder, Answer::Entry(map.entry(&place)));
            }
            Err(error) => {
                let shown = String::from_utf8_lossy(name).into_owned();
                machine.record_error("mkdir", error.errno(), &error.to_string(), &format!("jobs/{shown}"));
                responder.respond(Err(error.errno()));
            }
        };
    }
    if let Place::Service(Kind::Volumes) = parent {
        return super::volumes::mkdir(map, caller, name, responder);
    }
    if parent.kind() != Kind::Root {
        return responder.respond(Err(Errno::EPERM));
    }
    if let Err(error) = check_free(&map.ghosts, name) {
        return responder.respond(Err(error.errno()));
    }
    let Ok(text) = std::str::from_utf8(name) else { return responder.respond(Err(Errno::EINVAL)) };
    map.ghosts.forget_claim(name, caller);
    let of_done = map.clone();
    map.registry.create(
        caller,
        text,
        Vec::new(),
        Box::new(move |made| {
            responder.respond(match made {
                Ok(machine) => Ok(Answer::Entry(of_done.entry(&Place::Machine(machine, Kind::Machine)))),
                Err(error) => Err(error.errno()),
            });
        }),
    );
}

/// mknod(2) of a regular file: as [`create`].
pub fn mknod(map: &Map, caller: Caller, parent: &Place, name: &[u8], responder: Responder) {
    match create(map, caller, parent, name) {
        Ok(place) => answer_created(map, responder, &place, Answer::Entry(map.entry(&place))),
        Err(errno) => responder.respond(Err(errno)),
    }
}

/// Answers when what was made is written down.
pub fn answer_created(map: &Map, responder: Responder, place: &Place, answer: Answer) {
    // The agent is waited for when it is closed: most likely it will have a value by then.
    if let Place::Var(Holder::Machine(machine), VarKind::Secret, ..) = place {
        machine.secrets_changed(|| {});
    }
    answer_when_settled(map, responder, answer);
}

/// open(2) with O_CREAT, and mknod(2) of a regular file: a variable, a secret or a tag, with an empty value.
///
/// # Errors
/// EINVAL for a name that it cannot have; EEXIST; EPERM where users make nothing.
pub fn create(map: &Map, caller: Caller, parent: &Place, name: &[u8]) -> Result<Place, Errno> {
    let holder = match parent {
        Place::Machine(machine, _) => Some(Holder::Machine(machine.clone())),
        Place::Template(template, _) => Some(Holder::Template(template.clone())),
        _ => None,
    };
    match (holder, parent.kind().vars()) {
        (Some(holder), Some((var, kind))) => {
            let id = holder.create(caller, var, name).map_err(|error| error.errno())?;
            Ok(Place::Var(holder, var, id, kind))
        }
        // The name is there (ctl of a machine made by somebody else a moment ago), or there is no such thing.
        _ => Err(if map.lookup(parent, name, caller).is_ok() { Errno::EEXIST } else { Errno::EPERM }),
    }
}

fn may_command(machine: &Machine, caller: Caller) -> Result<(), Errno> {
    machine.check_owner(caller).map_err(|error| error.errno())
}

/// What is told is written down: it must not be otherwise after a crash.
fn answer_when_settled(map: &Map, responder: Responder, answer: Answer) {
    map.registry.settled(move |written| {
        responder.respond(written.map(|()| answer).map_err(|error| error.errno()));
    });
}

/// What is still to be done before a removal is answered.
enum Removed {
    Nothing,
    /// It is written down first.
    WrittenDown,
    /// The same, of a variable: what runs next must not have it any more.
    Var(Holder, VarKind),
}

fn answer_removal(map: &Map, responder: Responder, removed: Result<Removed, Errno>) {
    match removed {
        Ok(Removed::Nothing) => responder.respond(Ok(Answer::Ok)),
        Ok(Removed::WrittenDown) => answer_when_settled(map, responder, Answer::Ok),
        Ok(Removed::Var(holder, kind)) => holder.settled(kind, move |written| {
            responder.respond(written.map(|()| Answer::Ok).map_err(|error| error.errno()));
        }),
        Err(errno) => responder.respond(Err(errno)),
    }
}

/// unlink(2): of a machine's `ctl` it destroys the machine and leaves a ghost; in a ghost it succeeds. Fails with EPERM
/// for every other control file that users do not make, and for a protected machine; ENOENT, EISDIR.
pub fn unlink(map: &Map, caller: Caller, parent: &Place, name: &[u8], responder: Responder) {
    // It may take the host a while.
    if let Ok(Place::Var(Holder::Machine(machine), VarKind::Mount, id, _)) = map.lookup(parent, name, caller) {
        if let Err(errno) = may_command(&machine, caller) {
            return responder.respond(Err(errno));
        }
        let done = Box::new(move |removed: Result<(), MachineError>| {
            responder.respond(removed.map(|()| Answer::Ok).map_err(|error| error.errno()));
        });
        return machine.remove_mount(id, done);
    }
    answer_removal(map, responder, try_unlink(map, caller, parent, name));
}

fn try_unlink(map: &Map, caller: Caller, parent: &Place, name: &[u8]) -> Result<Removed, Errno> {
    if let Place::Ghost(ghost, _) = parent {
        may_command(&ghost.machine, caller)?;
        ghost.removed(caller);
        return Ok(Removed::Nothing);
    }
    match map.lookup(parent, name, caller)? {
        place if place.kind().is_dir() => Err(Errno::EISDIR),
        Place::Machine(machine, Kind::Ctl) => {
            let called = machine.name();
            if let Err(error) = machine.destroy(caller) {
                map.ghosts.refuse(caller, machine.slot());
                machine.record_error("unlink", error.errno(), &error.to_string(), "rm ctl");
                return Err(error.errno());
            }
            map.ghosts.add(&machine, called.as_bytes(), caller);
            Ok(Removed::Nothing)
        }
        Place::Var(holder, kind, id, _) => {
            holder.remove(caller, kind, id).map_err(|error| error.errno())?;
            Ok(Removed::Var(holder, kind))
        }
        // rm -r of a template passes here: the value is taken back, and the template says nothing of the key any more.
        Place::TemplateKey(template, key) => {
            let taken_back = template.check_owner(caller).and_then(|()| template.config_set(key.name, "default"));
            taken_back.map(|()| Removed::WrittenDown).map_err(|error| error.errno())
        }
        _ => Err(Errno::EPERM),
    }
}

/// rmdir(2): of a machine it destroys the machine, of a job it kills and forgets the job; in a ghost and of a ghost it
/// succeeds. Fails with EPERM for every other directory, and for a protected machine; ENOENT, ENOTDIR.
pub fn rmdir(map: &Map, caller: Caller, parent: &Place, name: &[u8], responder: Responder) {
    if let Ok(Place::Volume(volume, Kind::Volume)) = map.lookup(parent, name, caller) {
        return super::volumes::rmdir(map, caller, volume, responder);
    }
    answer_removal(map, responder, try_rmdir(map, caller, parent, name));
}

fn try_rmdir(map: &Map, caller: Caller, parent: &Place, name: &[u8]) -> Result<Removed, Errno> {
    if let Place::Ghost(ghost, _) = parent {
        may_command(&ghost.machine, caller)?;
        ghost.removed(caller);
        return Ok(Removed::Nothing);
    }
    match map.lookup(parent, name, caller)? {
        Place::Ghost(ghost, _) => {
            may_command(&ghost.machine, caller)?;
            map.ghosts.remove(&ghost);
            Ok(Removed::Nothing)
        }
        Place::Machine(machine, Kind::Machine) => machine.destroy(caller).map(|()| Removed::Nothing).map_err(|error| {
            machine.record_error("rmdir", error.errno(), &error.to_string(), "rmdir");
            error.errno()
        }),
        // A job that was removed must not be back after a crash.
        Place::Job(machine, job, Kind::Job) => {
            may_command(&machine, caller)?;
            let removed = machine.jobs().remove(job.number()).map_err(|error| error.errno());
            removed.map(|()| Removed::WrittenDown)
        }
        Place::Template(template, Kind::Template) => {
            let removed = map.registry.templates().remove(caller, &template);
            removed.map(|()| Removed::WrittenDown).map_err(|error| error.errno())
        }
        // Emptied by rm -r on its way up; they go with the template.
        Place::Template(template, _) => {
            template.check_owner(caller).map(|()| Removed::Nothing).map_err(|error| error.errno())
        }
        place if place.kind().is_dir() => Err(Errno::EPERM),
        _ => Err(Errno::ENOTDIR),
    }
}

/// rename(2): of a machine to a free name in the root. Never EXDEV: mv would copy, and then remove.
pub fn rename(
    map: &Arc<Map>,
    caller: Caller,
    (parent, name): (NodeId, &[u8]),
    (new_parent, new_name): (NodeId, &[u8]),
    flags: u32,
    responder: Responder,
) {
    let machine = match check_rename(map, caller, (parent, name), (new_parent, new_name), flags) {
        Ok(machine) => machine,
        Err(errno) => return responder.respond(Err(errno)),
    };
    // Checked: a valid name is ASCII.
    let new_name = String::from_utf8_lossy(new_name).into_owned();
    let done = Box::new(move |renamed: Result<(), MachineError>| {
        responder.respond(renamed.map(|()| Answer::Ok).map_err(|error| error.errno()));
    });
    map.registry.rename(&machine, &new_name, done);
}

fn check_rename(
    map: &Map,
    caller: Caller,
    (parent, name): (NodeId, &[u8]),
    (new_parent, new_name): (NodeId, &[u8]),
    flags: u32,
) -> Result<Arc<Machine>, Errno> {
    if flags & !libc::RENAME_NOREPLACE != 0 {
        return Err(Errno::EINVAL);
    }
    let Place::Machine(machine, Kind::Machine) = map.lookup(&map.resolve(parent)?, name, caller)? else {
        return Err(Errno::EPERM);
    };
    if new_parent != ROOT {
        return Err(Errno::EPERM);
    }
    may_command(&machine, caller)?;
    if map.registry.get(new_name).is_some() || check_free(&map.ghosts, new_name).is_err() {
        return Err(if flags & libc::RENAME_NOREPLACE != 0 { Errno::EEXIST } else { Errno::EPERM });
    }
    if !map.registry.valid_new_name(&machine, new_name) {
        return Err(Errno::EINVAL);
    }
    Ok(machine)
}

/// Whether this in a machine's files is refused to this process: to remove anything, and to walk on through it, which
/// would take long and end in nothing else: see [`Ghosts::refuse`].
///
/// [`Ghosts::refuse`]: super::ghost::Ghosts::refuse
pub fn is_refused(map: &Map, caller: Caller, slot: u32, op: &Op<'_>) -> bool {
    let is_protected = |machine: Arc<Machine>| machine.config_get("protect").as_deref() == Some("yes");
    matches!(op, Op::Unlink { .. } | Op::RmDir { .. } | Op::OpenDir { .. })
        && map.ghosts.is_refused(caller, slot)
        && map.registry.by_slot(slot).is_some_and(is_protected)
}
