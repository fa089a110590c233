//! Where a control node is: what its number stands for now, its attributes, its entries.

use super::content::Content;
use super::ghost::{Ghost, Ghosts};
use super::node::{Control, Kind};
use super::ops::{Attr, Caller, Entry, NodeId, ROOT};
use super::value::Setting;
use super::vars::{self, Holder};
use super::{config, jobs, machine, root, table, volumes};
use crate::errno::Errno;
use crate::machine::Machine;
use crate::machine::config::{ConfigKey, KEYS};
use crate::machine::job::Job;
use crate::machine::registry::Registry;
use crate::machine::templates::{self, Template};
use crate::machine::vars::VarKind;
use crate::machine::volumes::Volume;
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

/// Size of a machine's health text before it was ever asked for: `ok 00000.21ms`.
const HEALTH_SIZE: u64 = 14;

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
    /// `env/NAME`, `secrets/NAME`, `tags/NAME`; the kind is its node's.
    Var(Holder, VarKind, u32, Kind),
    /// A template's directory and the directories in it.
    Template(Arc<Template>, Kind),
    /// `config/KEY` of a template.
    TemplateKey(Arc<Template>, &'static ConfigKey),
    /// A volume's directory and what is in it.
    Volume(Volume, Kind),
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
        if control.slot == 0 && matches!(control.kind, Kind::Volume | Kind::VolumeInfo) {
            return volumes::resolve(self, control).ok_or(Errno::ENOENT);
        }
        if control.slot == 0 {
            return Ok(Place::Service(control.kind));
        }
        if control.slot >= templates::FIRST_SLOT {
            return self.resolve_in_template(control).ok_or(Errno::ENOENT);
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
            kind => match vars::of_kind(kind) {
                Some(var) => found_var(Holder::Machine(machine), var, control).ok_or(Errno::ENOENT),
                None => Ok(Place::Machine(machine, kind)),
            },
        }
    }

    fn resolve_in_template(&self, control: Control) -> Option<Place> {
        let template = self.registry.templates().by_slot(control.slot)?;
        match (control.kind, vars::of_kind(control.kind)) {
            (Kind::TemplateKey, _) => config::by_sub(control.sub).map(|key| Place::TemplateKey(template, key)),
            (_, Some(var)) => found_var(Holder::Template(template), var, control),
            (kind, None) => Some(Place::Template(template, kind)),
        }
    }

    /// The content of a file; `None` for directories, links, and what is in a ghost.
    pub fn content(&self, place: &Place) -> Option<(Content, SystemTime)> {
        match place {
            Place::Service(kind) => root::content(&self.registry, *kind),
            Place::Machine(machine, kind) => machine::content(machine, *kind),
            Place::Key(machine, key) => {
                Some((Content::Value(Setting::Key(machine.clone(), key)), machine.config_changed()))
            }
            Place::TemplateKey(template, key) => {
                Some((Content::Value(Setting::TemplateKey(template.clone(), key)), template.config_changed()))
            }
            Place::Var(holder, kind, id, _) => {
                Some((Content::Value(Setting::Var(holder.clone(), *kind, *id)), holder.vars().modified(*kind, *id)))
            }
            Place::Job(machine, job, kind) => jobs::content(machine, job, *kind),
            Place::Volume(volume, kind) => volumes::content(self, volume, *kind),
            Place::Template(..) | Place::Ghost(..) => None,
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
        let permissions = permissions | place.shown_to_all();
        let time = modified.into();
        Attr {
            ino: control.id(),
            size,
            blocks: if kind == Kind::JobStdin { 0 } else { size.div_ceil(512) },
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
            Place::Service(Kind::Templates) => {
                (self.registry.templates().list().len(), self.registry.templates().changed())
            }
            Place::Service(Kind::Volumes) => {
                let volumes = self.registry.volumes();
                (volumes.list().len(), volumes.changed())
            }
            Place::Service(_) => (0, self.registry.started()),
            Place::Volume(volume, _) => (0, volume.created),
            Place::Machine(machine, Kind::Jobs) => (machine.jobs().list().len(), machine.jobs().changed()),
            Place::Machine(machine, Kind::Config) => (0, machine.config_changed()),
            Place::Machine(machine, kind) if kind.vars().is_some() => (0, machine.vars().changed()),
            Place::Machine(machine, _) => (0, machine.created()),
            Place::Template(template, kind) if kind.vars().is_some() => (0, template.vars().changed()),
            Place::Template(template, _) => (0, template.config_changed()),
            Place::Job(_, job, _) => (0, job.modified()),
            Place::Key(..) | Place::TemplateKey(..) | Place::Var(..) | Place::Ghost(..) => (0, SystemTime::UNIX_EPOCH),
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
            (Place::Service(Kind::Templates), None) => {
                self.registry.templates().get(name).map(|template| Place::Template(template, Kind::Template))
            }
            (Place::Service(Kind::Volumes), None) => volumes::named(self, name),
            (Place::Volume(volume, _), Some(row)) => Some(Place::Volume(volume.clone(), row.kind)),
            (Place::Template(template, _), Some(row)) => Some(Place::Template(template.clone(), row.kind)),
            (Place::Template(template, Kind::TemplateConfig), None) => {
                config::by_name(name).map(|key| Place::TemplateKey(template.clone(), key))
            }
            (Place::Template(template, kind), None) => named_var(Holder::Template(template.clone()), *kind, name),
            (Place::Machine(machine, _), Some(row)) => Some(Place::Machine(machine.clone(), row.kind)),
            (Place::Machine(machine, Kind::Config), None) => {
                config::by_name(name).map(|key| Place::Key(machine.clone(), key))
            }
            (Place::Machine(machine, Kind::Jobs), None) => machine
                .jobs()
                .find(name)
                .filter(|job| jobs::node(machine.slot(), Kind::Job, job.number()).is_some())
                .map(|job| Place::Job(machine.clone(), job, Kind::Job)),
            (Place::Machine(machine, kind), None) => named_var(Holder::Machine(machine.clone()), *kind, name),
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
            Place::Service(_) | Place::Volume(..) => 0,
            Place::Machine(machine, _) | Place::Key(machine, _) | Place::Job(machine, ..) => machine.slot(),
            Place::Template(template, _) | Place::TemplateKey(template, _) => template.slot(),
            Place::Var(..) | Place::Ghost(..) => return Vec::new(),
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
                let later = machine.jobs().named_list().into_iter().filter(|(number, _)| *number > first);
                listed.extend(later.filter_map(|(number, name)| {
                    let node = jobs::node(slot, Kind::Job, number)?;
                    Some(Listed { name: name.into_bytes().into(), node, cookie: DYNAMIC + number })
                }));
            }
            Place::Service(Kind::Templates) => {
                // Slots of templates count down.
                let age = |template: &Template| u64::from(u32::MAX - template.slot());
                let mut later: Vec<Arc<Template>> = self.registry.templates().list();
                later.retain(|template| age(template) > first);
                later.sort_by_key(|template| age(template));
                listed.extend(later.into_iter().map(|template| Listed {
                    name: template.name().as_bytes().into(),
                    node: Control { slot: template.slot(), kind: Kind::Template, sub: 0 },
                    cookie: DYNAMIC + age(&template),
                }));
            }
            Place::Service(Kind::Volumes) => {
                let later = self.registry.volumes().list().into_iter().filter(|volume| u64::from(volume.id) > first);
                listed.extend(later.map(|volume| Listed {
                    node: volumes::node(&volume, Kind::Volume),
                    cookie: DYNAMIC + u64::from(volume.id),
                    name: volume.name.into_bytes().into(),
                }));
            }
            Place::Machine(machine, kind) if kind.vars().is_some() => {
                listed.extend(listed_vars(&Holder::Machine(machine.clone()), *kind, first));
            }
            Place::Template(template, kind) if kind.vars().is_some() => {
                listed.extend(listed_vars(&Holder::Template(template.clone()), *kind, first));
            }
            Place::Template(_, Kind::TemplateConfig) => {
                listed.extend((1..).zip(KEYS).filter(|(number, _)| *number > first).map(|(number, key)| Listed {
                    name: key.name.as_bytes().into(),
                    node: Control { kind: Kind::TemplateKey, ..config::node(slot, key) },
                    cookie: DYNAMIC + number,
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
            // Files of a job or volume have its number, and so has its directory; the directories above have none.
            Some(row) => {
                let is_numbered = matches!(row.parent, Kind::Job | Kind::Volume);
                Control { kind: row.parent, sub: if is_numbered { control.sub } else { 0 }, ..control }.id()
            }
            None => ROOT,
        }
    }
}

fn found_var(holder: Holder, var: VarKind, control: Control) -> Option<Place> {
    holder.vars().name(var, control.sub)?;
    Some(Place::Var(holder, var, control.sub, control.kind))
}

fn named_var(holder: Holder, directory: Kind, name: &[u8]) -> Option<Place> {
    let (var, kind) = directory.vars()?;
    let id = holder.vars().find(var, name)?;
    Some(Place::Var(holder, var, id, kind))
}

fn listed_vars(holder: &Holder, directory: Kind, after: u64) -> Vec<Listed> {
    let Some((var, _)) = directory.vars() else { return Vec::new() };
    let later = holder.vars().list(var).into_iter().filter(|(id, _)| u64::from(*id) > after);
    later
        .filter_map(|(id, name)| {
            let node = vars::node(holder.slot(), directory, id)?;
            Some(Listed { name: name.into_bytes().into(), node, cookie: DYNAMIC + u64::from(id) })
        })
        .collect()
}

/// In a ghost, whatever can have been listed before looks up.
fn ghost_entry(ghost: &Arc<Ghost>, parent: Control, name: &[u8]) -> Option<Place> {
    let slot = parent.slot;
    let control = match parent.kind {
        Kind::Config => config::by_name(name).map(|key| config::node(slot, key)),
        Kind::Jobs => jobs::parse_number(name).and_then(|number| jobs::node(slot, Kind::Job, number)),
        kind => kind.vars().map(|(_, kind)| Control { slot, kind, sub: super::node::hash28(name) }),
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
            Place::Var(holder, _, id, kind) => Control { slot: holder.slot(), kind: *kind, sub: *id },
            Place::Template(template, kind) => Control { slot: template.slot(), kind: *kind, sub: 0 },
            Place::TemplateKey(template, key) => {
                Control { kind: Kind::TemplateKey, ..config::node(template.slot(), key) }
            }
            Place::Volume(volume, kind) => volumes::node(volume, *kind),
            Place::Ghost(_, control) => *control,
        }
    }

    /// What it is.
    pub fn kind(&self) -> Kind {
        match self {
            Place::Service(kind) | Place::Machine(_, kind) | Place::Job(_, _, kind) => *kind,
            Place::Template(_, kind) | Place::Var(_, _, _, kind) | Place::Volume(_, kind) => *kind,
            Place::Key(..) => Kind::ConfigKey,
            Place::TemplateKey(..) => Kind::TemplateKey,
            Place::Ghost(_, control) => control.kind,
        }
    }

    /// The machine it is in; that of a ghost too.
    pub fn machine(&self) -> Option<&Arc<Machine>> {
        match self {
            Place::Service(_) | Place::Template(..) | Place::TemplateKey(..) | Place::Volume(..) => None,
            Place::Var(Holder::Machine(machine), ..) => Some(machine),
            Place::Var(Holder::Template(_), ..) => None,
            Place::Machine(machine, _) | Place::Key(machine, _) | Place::Job(machine, ..) => Some(machine),
            Place::Ghost(ghost, _) => Some(&ghost.machine),
        }
    }

    fn owner(&self, registry: &Registry) -> (u32, u32) {
        match self {
            Place::Template(template, _) | Place::TemplateKey(template, _) => template.owner(),
            Place::Var(holder, ..) => holder.owner(),
            Place::Volume(volume, _) => volume.owner,
            _ => self.machine().map_or_else(|| (registry.mount_uid(), registry.mount_gid()), |machine| machine.owner()),
        }
    }

    /// Permission bits beyond the table's: of a template that everybody may use, all but the secrets is shown.
    fn shown_to_all(&self) -> u32 {
        match self {
            Place::Template(template, kind) if template.is_public() && *kind != Kind::TemplateSecrets => 0o055,
            Place::TemplateKey(template, _) if template.is_public() => 0o044,
            Place::Var(Holder::Template(template), VarKind::Env, ..) if template.is_public() => 0o044,
            _ => 0,
        }
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
            Place::Var(..) | Place::Template(..) | Place::TemplateKey(..) | Place::Volume(..) => {
                (Duration::ZERO, Duration::ZERO)
            }
            Place::Machine(..) | Place::Key(..) | Place::Job(..) => (FIXED, Duration::ZERO),
        }
    }
}
