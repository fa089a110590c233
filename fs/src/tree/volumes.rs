//! `.sys/volumes/`: directories that outlive machines.

use super::content::Content;
use super::node::{Control, Kind, MAX_SUB};
use super::ops::{Answer, Caller, Responder};
use super::place::{Map, Place};
use crate::machine::events::stamp;
use crate::machine::volumes::Volume;
use std::sync::Arc;
use std::time::SystemTime;

/// The node of a volume, or of what is in it.
pub fn node(volume: &Volume, kind: Kind) -> Control {
    Control { slot: 0, kind, sub: volume.id }
}

/// The place of a node.
pub fn resolve(map: &Map, control: Control) -> Option<Place> {
    map.registry.volumes().by_id(control.sub).map(|volume| Place::Volume(volume, control.kind))
}

/// The volume of a name.
pub fn named(map: &Map, name: &[u8]) -> Option<Place> {
    let volume = map.registry.volumes().get(name).filter(|volume| u64::from(volume.id) <= MAX_SUB)?;
    Some(Place::Volume(volume, Kind::Volume))
}

/// What is in a volume's files, and when that last changed.
pub fn content(map: &Map, volume: &Volume, kind: Kind) -> Option<(Content, SystemTime)> {
    let Kind::VolumeInfo = kind else { return None };
    let machines = map.registry.machines_with(&volume.name);
    let mut text = format!(
        "name {}\nuid {}\ngid {}\ncreated {}\n",
        volume.name,
        volume.owner.0,
        volume.owner.1,
        stamp(volume.created)
    );
    for machine in machines {
        text.push_str(&format!("machine {machine}\n"));
    }
    Some((Content::Text(text.into_bytes()), volume.created))
}

/// mkdir(2) in the directory of volumes.
pub fn mkdir(map: &Arc<Map>, caller: Caller, name: &[u8], responder: Responder) {
    let of_done = map.clone();
    map.registry.create_volume(
        caller,
        name,
        Box::new(move |made| {
            responder.respond(match made {
                Ok(volume) => Ok(Answer::Entry(of_done.entry(&Place::Volume(volume, Kind::Volume)))),
                Err(error) => Err(error.errno()),
            });
        }),
    );
}

/// rmdir(2) of a volume.
pub fn rmdir(map: &Map, caller: Caller, volume: Volume, responder: Responder) {
    let done = Box::new(move |removed: Result<(), crate::machine::error::MachineError>| {
        responder.respond(removed.map(|()| Answer::Ok).map_err(|error| error.errno()));
    });
    map.registry.remove_volume(caller, volume, done);
}
