//! What makes, moves and removes: machines by their directories, jobs by theirs, nothing else.

use super::node::Kind;
use super::ops::{Answer, Caller, NodeId, Op, ROOT, Responder};
use super::place::{Map, Place};
use super::root::check_free;
use crate::errno::Errno;
use crate::machine::Machine;
use crate::machine::error::MachineError;
use crate::machine::registry::Registry;
use std::sync::Arc;

/// mkdir(2).
pub fn mkdir(map: &Arc<Map>, caller: Caller, parent: &Place, name: &[u8], responder: Responder) {
    if parent.kind() != Kind::Root {
        return responder.respond(Err(Errno::EPERM));
    }
    if let Err(error) = check_free(&map.ghosts, name) {
        return responder.respond(Err(error.errno()));
    }
    let Ok(text) = std::str::from_utf8(name) else { return responder.respond(Err(Errno::EINVAL)) };
    if names_template(text) {
        return responder.respond(Err(Errno::ENOENT));
    }
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

/// Whether a name asks for a template, `TEMPLATE.rest`. There are none yet, so none is found.
fn names_template(name: &str) -> bool {
    let valid = |part: &str| Registry::valid_name(part.as_bytes());
    name.split_once('.').is_some_and(|(template, rest)| valid(template) && valid(rest))
}

fn may_command(machine: &Machine, caller: Caller) -> Result<(), Errno> {
    machine.check_owner(caller).map_err(|error| error.errno())
}

/// unlink(2): of a machine's `ctl` it destroys the machine and leaves a ghost; in a ghost it succeeds.
///
/// # Errors
/// EPERM for every other control file, and for a protected machine; ENOENT, EISDIR.
pub fn unlink(map: &Map, caller: Caller, parent: &Place, name: &[u8]) -> Result<(), Errno> {
    if let Place::Ghost(ghost, _) = parent {
        may_command(&ghost.machine, caller)?;
        ghost.removed(caller);
        return Ok(());
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
            Ok(())
        }
        _ => Err(Errno::EPERM),
    }
}

/// rmdir(2): of a machine it destroys the machine, of a job it kills and forgets the job; in a ghost and of a ghost it
/// succeeds. Fails with EPERM for every other directory, and for a protected machine; ENOENT, ENOTDIR.
pub fn rmdir(map: &Map, caller: Caller, parent: &Place, name: &[u8], responder: Responder) {
    match try_rmdir(map, caller, parent, name) {
        // A job that was removed must not be back after a crash.
        Ok(Some(machine)) => machine.settled(move |written| {
            responder.respond(written.map(|()| Answer::Ok).map_err(|error| error.errno()));
        }),
        done => responder.respond(done.map(|_| Answer::Ok)),
    }
}

/// Gives the machine whose job was removed.
fn try_rmdir(map: &Map, caller: Caller, parent: &Place, name: &[u8]) -> Result<Option<Arc<Machine>>, Errno> {
    if let Place::Ghost(ghost, _) = parent {
        may_command(&ghost.machine, caller)?;
        ghost.removed(caller);
        return Ok(None);
    }
    match map.lookup(parent, name, caller)? {
        Place::Ghost(ghost, _) => {
            may_command(&ghost.machine, caller)?;
            map.ghosts.remove(&ghost);
            Ok(None)
        }
        Place::Machine(machine, Kind::Machine) => machine.destroy(caller).map(|()| None).map_err(|error| {
            machine.record_error("rmdir", error.errno(), &error.to_string(), "rmdir");
            error.errno()
        }),
        Place::Job(machine, job, Kind::Job) => {
            may_command(&machine, caller)?;
            machine.jobs().remove(job.number()).map_err(|error| error.errno())?;
            Ok(Some(machine))
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
    if !Registry::valid_name(new_name) {
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
