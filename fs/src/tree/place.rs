//! Where a control node is: what its number stands for now, its attributes, its entries.

use super::content::Content;
use super::ghost::{Ghost, Ghosts};
use super::node::{Control, Kind};
use super::ops::{Attr, Caller, Entry, NodeId, ROOT};
use super::{config, jobs, machine, root, table};
use crate::errno::Errno;
use crate::machine::Machine;
use crate::machine::config::{ConfigKey, KEYS};
use crate::machine::job::Job;
use crate::machine::registry::Registry;
use dashmap::DashMap;
use parking_lot::Mutex;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// `st_blksize` of files that are written: stdio's buffer, so that a text comes in few writes.
const WRITE_BLOCK: u32 = 1 << 20;

/// `st_blksize` of all others.
const READ_BLOCK: u32 = 4096;

/// Cookies below this are `.`, `..` and the table's entries; those of users' things follow.
const DYNAMIC: u64 = 1 << 16;

/// How long what never changes may be remembered.
const FOREVER: Duration = Duration::from_secs(3600);

/// How long a fixed name in a machine may be remembered. Its directory's node is the machine's, not the name's, and is
/// never another's: neither a rename nor a destruction makes it wrong.
const FIXED: Duration = Duration::from_secs(1);

/// Size of a machine's health text before it was ever asked for: `ok 0.21ms`.
const HEALTH_SIZE: u64 = 10;

/// What a control node stands for.
#[derive(Clone)]
pub enum Place {
    /// The root directory and `.sys`.
    Service(Kind),
    /// A machine's directory and what there is once in it.
    Machine(Arc<Machine>, Kind),
    /// `config/KEY`
    Key(Arc<Machine>, &'static ConfigKey),
    /// A job's directory and what is in it.
    Job(Arc<Machine>, Arc<Job>, Kind),
    /// Anything in a ghost.
    Ghost(Arc<Ghost>, Control),
}

/// An entry of a listing, before it has attributes.
pub struct Listed {
    /// Its name.
    pub name: Box<[u8]>,
    /// Its node.
    pub node: Control,
    /// Where the listing goes on after it.
    pub cookie: u64,
}

/// What is needed to find places.
pub struct Map {
    /// The service.
    pub registry: Arc<Registry>,
    /// Destroyed machines that still show.
    pub ghosts: Arc<Ghosts>,
    /// Sizes of the last health texts, by slot.
    health_sizes: DashMap<u32, u64>,
    /// How many machines there were when one last came or went: each walk into the root asks.
    count: Mutex<Option<(SystemTime, usize)>>,
}

impl Map {
    /// Of this service.
    pub fn new(registry: Arc<Registry>) -> Map {
        Map { registry, ghosts: Arc::default(), health_sizes: DashMap::new(), count: Mutex::new(None) }
    }

    fn machine_count(&self) -> usize {
        let changed = self.registry.changed();
        let mut known = self.count.lock();
        match *known {
            Some((then, count)) if then == changed => count,
            _ => {
                let count = self.registry.list().len();
                *known = Some((changed, count));
                count
            }
        }
    }

    /// The place of a node.
    ///
    /// # Errors
    /// ENOENT when it is gone.
    pub fn resolve(&self, node: NodeId) -> Result<Place, Errno> {
        let control = Control::from_id(node).ok_or(Errno::ENOENT)?;
        if control.slot == 0 {
            return Ok(Place::Service(control.kind));
        }
        if let Some(ghost) = self.ghosts.by_slot(control.slot) {
            return Ok(Place::Ghost(ghost, control));
        }
        let machine = self.registry.by_slot(control.slot).filter(|machine| !machine.is_destroyed());
        let machine = machine.ok_or(Errno::ENOENT)?;
        match control.kind {
            Kind::ConfigKey => config::by_sub(control.sub).map(|key| Place::Key(machine, key)).ok_or(Errno::ENOENT),
            kind if kind == Kind::Job || table::of(kind).is_some_and(|row| row.parent == Kind::Job) => {
                let job = machine.jobs().get(u64::from(control.sub)).ok_or(Errno::ENOENT)?;
                Ok(Place::Job(machine, job, kind))
            }
            kind => Ok(Place::Machine(machine, kind)),
        }
    }

    /// The content of a file; `None` for directories, links, and what is in a ghost.
    pub fn content(&self, place: &Place) -> Option<(Content, SystemTime)> {
        match place {
            Place::Service(kind) => root::content(&self.registry, *kind),
            Place::Machine(machine, kind) => machine::content(machine, *kind),
            Place::Key(machine, key) => Some((Content::Value(machine.clone(), key), machine.config_changed())),
            Place::Job(_, job, kind) => jobs::content(job, *kind),
            Place::Ghost(..) => None,
        }
    }

    /// The attributes, generated: the size is that of what a read would give now.
    pub fn attr(&self, place: &Place) -> Attr {
        let control = place.control();
        let kind = control.kind;
        let (permissions, writable) =
            table::of(kind).map_or((0o1777, true), |row| (row.mode, row.mode & 0o222 != 0 && !row.kind.is_dir()));
        let (uid, gid) = place.owner(&self.registry);
        let (mut size, mut nlink, mut modified) = (0, 1, SystemTime::UNIX_EPOCH);
        let file_type = match kind.dirent() {
            libc::DT_DIR => {
                (nlink, modified) = self.directory_facts(place);
                libc::S_IFDIR
            }
            libc::DT_LNK => {
                if let Some(machine) = place.machine() {
                    size = machine::work_target(machine).len() as u64;
                    modified = machine.config_changed();
                }
                libc::S_IFLNK
            }
            _ => {
                if let Some((content, changed)) = self.content(place) {
                    size = content.size(|machine| self.health_size(machine));
                    modified = changed;
                }
                libc::S_IFREG
            }
        };
        // An rm that has a terminal asks before it removes what cannot be written: in a ghost there is nothing to ask.
        let permissions = if matches!(place, Place::Ghost(..)) { permissions | 0o200 } else { permissions };
        let time = modified.into();
        Attr {
            ino: control.id(),
            size,
            blocks: size.div_ceil(512),
            atime: time,
            mtime: time,
            ctime: time,
            mode: file_type | permissions,
            nlink,
            uid,
            gid,
            rdev: 0,
            blksize: if writable { WRITE_BLOCK } else { READ_BLOCK },
        }
    }

    fn health_size(&self, machine: &Machine) -> u64 {
        self.health_sizes.get(&machine.slot()).map_or(HEALTH_SIZE, |size| *size)
    }

    /// Remembers the size of a health text: fstat after open then says the size of what is read.
    pub fn note_health(&self, machine: &Machine, size: u64) {
        if self.health_sizes.len() > 10_000 {
            self.health_sizes.retain(|slot, _| self.registry.by_slot(*slot).is_some());
        }
        self.health_sizes.insert(machine.slot(), size);
    }

    /// Link count (2, and one for each directory in it) and time of change.
    fn directory_facts(&self, place: &Place) -> (u32, SystemTime) {
        let kind = place.kind();
        // find(1) takes 1 for "not known"; the guest is not asked for its root's count.
        if kind == Kind::Files {
            return (1, place.machine().map_or(SystemTime::UNIX_EPOCH, |machine| machine.state_changed()));
        }
        let fixed = table::entries(kind).filter(|(_, row)| row.kind.is_dir()).count();
        let (more, modified) = match place {
            Place::Service(Kind::Root) => (self.machine_count(), self.registry.changed()),
            Place::Service(_) => (0, self.registry.started()),
            Place::Machine(machine, Kind::Jobs) => (machine.jobs().list().len(), machine.jobs().changed()),
            Place::Machine(machine, Kind::Config) => (0, machine.config_changed()),
            Place::Machine(machine, _) => (0, machine.created()),
            Place::Job(_, job, _) => (0, job.modified()),
            Place::Key(..) | Place::Ghost(..) => (0, SystemTime::UNIX_EPOCH),
        };
        (u32::try_from(2 + fixed + more).unwrap_or(u32::MAX), modified)
    }

    /// The entry of a name in a directory.
    ///
    /// # Errors
    /// ENOTDIR, ENOENT.
    pub fn lookup(&self, parent: &Place, name: &[u8], caller: Caller) -> Result<Place, Errno> {
        let kind = parent.kind();
        if !kind.is_dir() {
            return Err(Errno::ENOTDIR);
        }
        let fixed = table::find(kind, name);
        let found = match (parent, fixed) {
            (Place::Service(_), Some(row)) => Some(Place::Service(row.kind)),
            (Place::Service(Kind::Root), None) => self.named(name, caller),
            (Place::Machine(machine, _), Some(row)) => Some(Place::Machine(machine.clone(), row.kind)),
            (Place::Machine(machine, Kind::Config), None) => {
                config::by_name(name).map(|key| Place::Key(machine.clone(), key))
            }
            (Place::Machine(machine, Kind::Jobs), None) => jobs::parse_number(name)
                .filter(|number| jobs::node(machine.slot(), Kind::Job, *number).is_some())
                .and_then(|number| machine.jobs().get(number))
                .map(|job| Place::Job(machine.clone(), job, Kind::Job)),
            (Place::Job(machine, job, _), Some(row)) => Some(Place::Job(machine.clone(), job.clone(), row.kind)),
            (Place::Ghost(ghost, control), Some(row)) => {
                Some(Place::Ghost(ghost.clone(), Control { kind: row.kind, ..*control }))
            }
            (Place::Ghost(ghost, control), None) => ghost_entry(ghost, *control, name),
            _ => None,
        };
        found.ok_or(Errno::ENOENT)
    }

    /// What a name in the root directory is to this caller: a machine, or the ghost that it is still removing.
    fn named(&self, name: &[u8], caller: Caller) -> Option<Place> {
        let machine = self.registry.get(name);
        match self.ghosts.find(name, caller, machine.is_some()) {
            Some(ghost) => {
                let control = Control::machine(ghost.machine.slot(), Kind::Machine);
                Some(Place::Ghost(ghost, control))
            }
            None => machine.map(|machine| Place::Machine(machine, Kind::Machine)),
        }
    }

    /// The entries of a directory after a cookie, without `.` and `..`. The order is that of cookies, which come from
    /// what the entries are: a listing is not confused by what comes and goes meanwhile.
    pub fn list(&self, place: &Place, after: u64) -> Vec<Listed> {
        let kind = place.kind();
        let slot = match place {
            Place::Service(_) => 0,
            Place::Machine(machine, _) | Place::Key(machine, _) | Place::Job(machine, ..) => machine.slot(),
            Place::Ghost(..) => return Vec::new(),
        };
        let sub = place.control().sub;
        let fixed = table::entries(kind).map(|(index, row)| {
            // The root's sub is its own; a job's files carry its number.
            let sub = if kind == Kind::Root { 0 } else { sub };
            Listed { name: row.name.as_bytes().into(), node: Control { slot, kind: row.kind, sub }, cookie: index + 3 }
        });
        let mut listed: Vec<Listed> = fixed.filter(|entry| entry.cookie > after).collect();
        let first = after.saturating_sub(DYNAMIC);
        match place {
            Place::Service(Kind::Root) => {
                let mut machines: Vec<Arc<Machine>> =
                    self.registry.list().into_iter().filter(|machine| u64::from(machine.slot()) > first).collect();
                machines.sort_by_key(|machine| machine.slot());
                listed.extend(machines.into_iter().map(|machine| Listed {
                    name: machine.name().into_bytes().into(),
                    node: Control::machine(machine.slot(), Kind::Machine),
                    cookie: DYNAMIC + u64::from(machine.slot()),
                }));
            }
            Place::Machine(machine, Kind::Jobs) => {
                let numbers = machine.jobs().list().into_iter().filter(|number| *number > first);
                listed.extend(numbers.filter_map(|number| {
                    let node = jobs::node(slot, Kind::Job, number)?;
                    let cookie = DYNAMIC + number;
                    Some(Listed { name: number.to_string().into_bytes().into(), node, cookie })
                }));
            }
            Place::Machine(_, Kind::Config) => {
                listed.extend((1..).zip(KEYS).filter(|(number, _)| *number > first).map(|(number, key)| Listed {
                    name: key.name.as_bytes().into(),
                    node: config::node(slot, key),
                    cookie: DYNAMIC + number,
                }));
            }
            _ => {}
        }
        listed
    }

    /// The answer to a lookup.
    pub fn entry(&self, place: &Place) -> Entry {
        let attr = self.attr(place);
        let (entry_ttl, attr_ttl) = place.ttl();
        // The kernel keeps the targets of links: another target is another inode of the same number.
        let generation = match place {
            Place::Machine(machine, Kind::Work) => u64::from(super::node::hash28(&machine::work_target(machine))),
            _ => 0,
        };
        Entry { node: attr.ino, generation, attr, entry_ttl, attr_ttl }
    }

    /// The node of `..`.
    pub fn parent(&self, place: &Place) -> NodeId {
        let control = place.control();
        match table::of(control.kind) {
            Some(row) if row.parent == Kind::Root => ROOT,
            // A job's files have its number, and so has its directory; the directories above have none.
            Some(row) => {
                Control { kind: row.parent, sub: if row.parent == Kind::Job { control.sub } else { 0 }, ..control }.id()
            }
            None => ROOT,
        }
    }
}

/// In a ghost, whatever can have been listed before looks up.
fn ghost_entry(ghost: &Arc<Ghost>, parent: Control, name: &[u8]) -> Option<Place> {
    let slot = parent.slot;
    let control = match parent.kind {
        Kind::Config => config::by_name(name).map(|key| config::node(slot, key)),
        Kind::Jobs => jobs::parse_number(name).and_then(|number| jobs::node(slot, Kind::Job, number)),
        _ => None,
    };
    control.map(|control| Place::Ghost(ghost.clone(), control))
}

impl Place {
    /// The node.
    pub fn control(&self) -> Control {
        match self {
            Place::Service(kind) => Control::service(*kind),
            Place::Machine(machine, kind) => Control::machine(machine.slot(), *kind),
            Place::Key(machine, key) => config::node(machine.slot(), key),
            // Numbers that do not fit are not looked up.
            Place::Job(machine, job, kind) => {
                Control { slot: machine.slot(), kind: *kind, sub: u32::try_from(job.number()).unwrap_or(u32::MAX) }
            }
            Place::Ghost(_, control) => *control,
        }
    }

    /// What it is.
    pub fn kind(&self) -> Kind {
        match self {
            Place::Service(kind) | Place::Machine(_, kind) | Place::Job(_, _, kind) => *kind,
            Place::Key(..) => Kind::ConfigKey,
            Place::Ghost(_, control) => control.kind,
        }
    }

    /// The machine it is in; that of a ghost too.
    pub fn machine(&self) -> Option<&Arc<Machine>> {
        match self {
            Place::Service(_) => None,
            Place::Machine(machine, _) | Place::Key(machine, _) | Place::Job(machine, ..) => Some(machine),
            Place::Ghost(ghost, _) => Some(&ghost.machine),
        }
    }

    fn owner(&self, registry: &Registry) -> (u32, u32) {
        self.machine().map_or_else(|| (registry.mount_uid(), registry.mount_gid()), |machine| machine.owner())
    }

    /// How long its name and its attributes may be remembered.
    pub fn ttl(&self) -> (Duration, Duration) {
        match self {
            Place::Service(Kind::Readme | Kind::Ignore | Kind::Version) => (FOREVER, FOREVER),
            Place::Service(_) => (FOREVER, Duration::ZERO),
            // Machines and jobs come, go and change names without the kernel's doing.
            Place::Machine(_, Kind::Machine | Kind::Work) | Place::Job(_, _, Kind::Job) | Place::Ghost(..) => {
                (Duration::ZERO, Duration::ZERO)
            }
            Place::Machine(..) | Place::Key(..) | Place::Job(..) => (FIXED, Duration::ZERO),
        }
    }
}
