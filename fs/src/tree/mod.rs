//! The tree: what is in `/sandboxes`, independent of FUSE or 9P.
//!
//! `table` says what there is; `root`, `sys`, `machine`, `wait`, `config` and `jobs` what is in the files of each
//! directory; `place` finds nodes; `change` makes, moves and removes; `open` and what it names reads and writes;
//! `guests` hands over to `guest` what is below `files`.

mod asked;
pub mod cache;
mod change;
mod changes;
mod config;
mod content;
mod ctl;
mod deadlines;
mod exec;
mod ghost;
pub mod guest;
mod guests;
mod health;
mod idle;
mod job_ctl;
mod job_input;
mod jobs;
mod logs;
mod machine;
pub mod node;
mod open;
pub mod ops;
mod pending;
mod place;
mod put;
mod readme;
mod root;
mod script;
mod stream;
mod sys;
mod table;
mod text;
mod value;
mod vars;
mod volumes;
mod wait;
pub mod words;

use crate::errno::Errno;
use crate::machine::Machine;
use crate::machine::registry::Registry;
use content::Content;
use ctl::CtlFile;
use deadlines::Deadlines;
use exec::{ExecFile, Target};
use guests::{Guests, Root, hand_over, is_guest, nodes};
use health::Question;
use job_input::InputFile;
use node::{Control, Kind};
use open::{Body, OpenTable, opened};
use ops::{Answer, Caller, DirEntry, Files, NodeId, Op, Ready, Responder, SetAttr, StatFs};
use pending::{Outcome, Source, Watched};
use place::{Map, Place};
use put::{PutFile, What};
use std::sync::Arc;
use std::time::Duration;
use value::{Setting, ValueFile};
use vars::Holder;

/// Longest name, as in Linux.
const NAME_MAX: u32 = 255;

/// The tree of a service.
pub struct Tree {
    map: Arc<Map>,
    table: Arc<OpenTable>,
    guests: Guests,
    deadlines: Deadlines,
}

impl Tree {
    /// The tree of this service.
    ///
    /// # Errors
    /// The host gives no thread for deadlines.
    pub fn new(registry: Arc<Registry>) -> std::io::Result<Tree> {
        Ok(Tree {
            map: Arc::new(Map::new(registry.clone())),
            table: Arc::new(OpenTable::default()),
            guests: Guests::new(registry),
            deadlines: Deadlines::start()?,
        })
    }

    /// The machine whose `files` a node is.
    fn files_of(&self, node: NodeId) -> Option<Arc<Machine>> {
        // Looked at before anything is resolved: this is asked for every operation.
        Control::from_id(node).filter(|control| control.kind == Kind::Files)?;
        match self.map.resolve(node) {
            Ok(Place::Machine(machine, Kind::Files)) => Some(machine),
            _ => None,
        }
    }

    fn root_of(&self, machine: &Arc<Machine>) -> Root {
        let place = Place::Machine(machine.clone(), Kind::Files);
        Root { node: place.control().id(), parent: self.map.parent(&place), attr: self.map.attr(&place) }
    }

    /// An operation on two nodes.
    fn dispatch_two(&self, caller: Caller, mut op: Op<'_>, responder: Responder) {
        let refusal = match op {
            Op::CopyRange { .. } => Errno::EINVAL,
            _ => Errno::EPERM,
        };
        if let Op::Rename { parent, name, new_parent, new_name, flags } = op
            && !is_guest(parent)
            && self.files_of(parent).is_none()
        {
            if is_guest(new_parent) {
                return responder.respond(Err(Errno::EPERM));
            }
            return change::rename(&self.map, caller, (parent, name), (new_parent, new_name), flags, responder);
        }
        let (one, other) = match nodes(&mut op) {
            (one, Some(other)) => (*one, *other),
            (one, None) => (*one, *one),
        };
        // A hard link to a directory, and a copy from one, are no more possible with `files` than elsewhere.
        let first_may_be_files = matches!(op, Op::Rename { .. });
        let side = |node: NodeId, may_be_files: bool| {
            if is_guest(node) {
                return self.guests.by_node(node);
            }
            let machine = self.files_of(node).filter(|_| may_be_files).ok_or(refusal)?;
            self.guests.of(&machine)
        };
        let copies = matches!(op, Op::CopyRange { .. });
        let found = side(one, first_may_be_files).and_then(|first| Ok((first, side(other, !copies)?)));
        match found {
            Err(errno) => responder.respond(Err(errno)),
            Ok((first, second)) if !Arc::ptr_eq(&first, &second) => responder.respond(Err(Errno::EXDEV)),
            Ok((files, _)) => match [one, other].into_iter().find_map(|node| self.files_of(node)) {
                Some(machine) => hand_over(&self.table, files, caller, op, self.root_of(&machine), responder),
                None => files.dispatch(caller, op, responder),
            },
        }
    }

    /// An operation on a file in a guest.
    fn dispatch_guest(&self, caller: Caller, node: NodeId, op: Op<'_>, responder: Responder) {
        if self.map.registry.any_idle()
            && let Some(machine) = self.guests.slot_of(node).and_then(|slot| self.map.registry.by_slot(slot))
            && let Err(errno) = use_machine(&machine, caller, &op)
        {
            return responder.respond(Err(errno));
        }
        if self.map.ghosts.any_refused()
            && let Some(slot) = self.guests.slot_of(node)
            && change::is_refused(&self.map, caller, slot, &op)
        {
            return responder.respond(Err(Errno::EPERM));
        }
        match self.guests.by_node(node) {
            Ok(files) => files.dispatch(caller, op, responder),
            // What is closed was closed with the guest.
            Err(_) if matches!(op, Op::Release { .. } | Op::ReleaseDir { .. }) => responder.respond(Ok(Answer::Ok)),
            Err(errno) => responder.respond(Err(errno)),
        }
    }

    /// An operation on `files`, the root directory of a guest.
    fn dispatch_files(&self, caller: Caller, machine: Arc<Machine>, op: Op<'_>, responder: Responder) {
        let node = Control::machine(machine.slot(), Kind::Files).id();
        match op {
            // The gate: the one place where a boot is waited for, since the kernel holds no lock here.
            Op::GetAttr { .. } => {
                if machine.is_idle() && idle::caller_writes(caller.pid) {
                    machine.wake();
                }
                let limit = machine.boot_wait();
                let gate = Gate { map: self.map.clone(), machine };
                pending::answer_within(gate, responder, limit, &self.deadlines);
            }
            // From memory: `ls -l` of a machine that is down, or whose agent hangs, is to work.
            Op::GetXattr { .. } | Op::ListXattr { .. } => self.dispatch_control(caller, node, op, responder),
            Op::StatFs { .. } if machine.files().is_none() => self.dispatch_control(caller, node, op, responder),
            Op::ReadDir { handle, .. } | Op::ReleaseDir { handle, .. } | Op::FsyncDir { handle, .. } => {
                let file = match op {
                    Op::ReleaseDir { .. } => self.table.remove(node, handle).ok_or(Errno::EBADF),
                    _ => self.table.get(node, handle),
                };
                match file.as_deref().map(|file| &file.body) {
                    Ok(Body::GuestDir(files, handle)) => {
                        guests::by_handle(files, *handle, caller, op, self.root_of(&machine), responder);
                    }
                    Ok(_) => responder.respond(Err(Errno::EBADF)),
                    Err(errno) => responder.respond(Err(*errno)),
                }
            }
            op => {
                if change::is_refused(&self.map, caller, machine.slot(), &op) {
                    return responder.respond(Err(Errno::EPERM));
                }
                if self.map.registry.any_idle()
                    && let Err(errno) = use_machine(&machine, caller, &op)
                {
                    return responder.respond(Err(errno));
                }
                match self.guests.of(&machine) {
                    Ok(files) => hand_over(&self.table, files, caller, op, self.root_of(&machine), responder),
                    Err(errno) => responder.respond(Err(errno)),
                }
            }
        }
    }

    /// An operation on a control node.
    fn dispatch_control(&self, caller: Caller, node: NodeId, op: Op<'_>, responder: Responder) {
        let map = &self.map;
        // By handle: the machine may be gone since.
        match op {
            Op::Read { handle, offset, size, flags, owner, .. } => {
                return match self.table.get(node, handle) {
                    Ok(file) => file.read(offset, size as usize, flags, owner, responder),
                    Err(errno) => responder.respond(Err(errno)),
                };
            }
            Op::Write { handle, data, flags, owner, .. } => {
                return match self.table.get(node, handle) {
                    Ok(file) => file.write(caller, data, flags, owner, responder),
                    Err(errno) => responder.respond(Err(errno)),
                };
            }
            Op::Flush { handle, owner, .. } => {
                return match self.table.get(node, handle) {
                    Ok(file) => file.flush(owner, responder),
                    Err(errno) => responder.respond(Err(errno)),
                };
            }
            Op::Fsync { handle, .. } => {
                return match self.table.get(node, handle) {
                    Ok(file) => file.finish(responder),
                    Err(errno) => responder.respond(Err(errno)),
                };
            }
            Op::Release { handle, .. } => {
                return match self.table.remove(node, handle) {
                    Some(file) => file.finish(responder),
                    None => responder.respond(Err(Errno::EBADF)),
                };
            }
            // A listing of `files` whose machine was destroyed meanwhile.
            Op::ReleaseDir { handle, .. } => {
                self.table.remove(node, handle);
                return responder.respond(Ok(Answer::Ok));
            }
            _ => {}
        }
        let place = match map.resolve(node) {
            Ok(place) => place,
            Err(errno) => return responder.respond(Err(errno)),
        };
        match op {
            Op::MkDir { name, .. } => change::mkdir(map, caller, &place, name, responder),
            Op::RmDir { name, .. } => change::rmdir(map, caller, &place, name, responder),
            Op::Open { flags, .. } => self.open(caller, node, &place, flags, responder),
            Op::Create { name, flags, .. } => self.create(caller, &place, name, flags, responder),
            Op::MkNod { name, mode, .. } if mode & libc::S_IFMT == libc::S_IFREG => {
                change::mknod(map, caller, &place, name, responder);
            }
            Op::Unlink { name, .. } => change::unlink(map, caller, &place, name, responder),
            op => responder.respond(self.answer(caller, node, &place, op)),
        }
    }

    /// Operations that are answered at once.
    fn answer(&self, caller: Caller, node: NodeId, place: &Place, op: Op<'_>) -> Outcome {
        let map = &self.map;
        match op {
            Op::Lookup { name, .. } => map.lookup(place, name, caller).map(|found| Answer::Entry(map.entry(&found))),
            Op::GetAttr { .. } => Ok(Answer::Attr(map.attr(place), place.ttl().1)),
            Op::SetAttr { set, .. } => {
                check_setattr(&set)?;
                Ok(Answer::Attr(map.attr(place), place.ttl().1))
            }
            Op::ReadLink { .. } => match place {
                Place::Machine(machine, Kind::Work) => Ok(Answer::Data(machine::work_target(machine))),
                Place::Ghost(ghost, control) if control.kind == Kind::Work => {
                    Ok(Answer::Data(machine::work_target(&ghost.machine)))
                }
                _ => Err(Errno::EINVAL),
            },
            Op::OpenDir { .. } if place.kind().is_dir() => Ok(Answer::Opened(ops::Opened::default())),
            Op::OpenDir { .. } => Err(Errno::ENOTDIR),
            Op::ReadDir { cookie, max, plus, cost, .. } => {
                if !place.kind().is_dir() {
                    return Err(Errno::ENOTDIR);
                }
                Ok(Answer::Dir(self.list(place, cookie, max, plus, cost)))
            }
            Op::FsyncDir { .. } | Op::SyncFs { .. } => Ok(Answer::Ok),
            Op::StatFs { .. } => Ok(Answer::StatFs(self.statfs())),
            Op::GetXattr { .. } | Op::RemoveXattr { .. } => Err(Errno::ENODATA),
            Op::ListXattr { max: 0, .. } => Ok(Answer::Count(0)),
            Op::ListXattr { .. } => Ok(Answer::Data(Vec::new())),
            Op::Seek { handle, offset, whence, .. } => self.seek(node, handle, offset, whence),
            Op::GetLock { lock, .. } => Ok(Answer::Lock(ops::Lock { kind: libc::F_UNLCK as u32, ..lock })),
            Op::SetLock { lock, .. } if lock.kind == libc::F_UNLCK as u32 => Ok(Answer::Ok),
            Op::SetXattr { .. } | Op::Fallocate { .. } | Op::SetLock { .. } => Err(Errno::EOPNOTSUPP),
            Op::MkNod { name, .. } | Op::SymLink { name, .. } => {
                Err(if map.lookup(place, name, caller).is_ok() { Errno::EEXIST } else { Errno::EPERM })
            }
            Op::TmpFile { .. } | Op::Rename { .. } | Op::Link { .. } => Err(Errno::EPERM),
            Op::CopyRange { .. } => Err(Errno::EINVAL),
            Op::Poll { handle, waker, .. } => match self.table.get(node, handle) {
                Ok(file) => Ok(Answer::Ready(file.poll(waker))),
                // Directories have no handle of ours, and never make anybody wait.
                Err(_) => Ok(Answer::Ready(Ready((libc::POLLIN | libc::POLLRDNORM) as u32))),
            },
            Op::Open { .. }
            | Op::Create { .. }
            | Op::MkDir { .. }
            | Op::RmDir { .. }
            | Op::Unlink { .. }
            | Op::Read { .. }
            | Op::Write { .. }
            | Op::Flush { .. }
            | Op::Fsync { .. }
            | Op::Release { .. }
            | Op::ReleaseDir { .. } => Err(Errno::EIO),
        }
    }

    fn open(&self, caller: Caller, node: NodeId, place: &Place, flags: u32, responder: Responder) {
        match self.try_open(caller, node, place, flags) {
            Ok(Opening::Done(answer)) => responder.respond(Ok(answer)),
            Ok(Opening::Look(machine, seat)) => changes::open(&self.table, node, &machine, seat, responder),
            Ok(Opening::Ask(machine, question, seat)) => {
                health::open(&self.map, &self.table, node, &machine, question, seat, responder);
            }
            Err(errno) => responder.respond(Err(errno)),
        }
    }

    fn try_open(&self, caller: Caller, node: NodeId, place: &Place, flags: u32) -> Result<Opening, Errno> {
        let kind = place.kind();
        if kind.is_dir() {
            return Err(Errno::EISDIR);
        }
        let (reads, writes) = match flags as i32 & libc::O_ACCMODE {
            libc::O_RDONLY => (true, flags & libc::O_TRUNC as u32 != 0),
            libc::O_WRONLY => (false, true),
            _ => (true, true),
        };
        // Root passes the kernel's check of permissions; what cannot be written cannot be opened for it.
        let mode = table::of(kind).map_or(0, |row| row.mode);
        if (reads && mode & 0o444 == 0) || (writes && mode & 0o222 == 0) {
            return Err(Errno::EACCES);
        }
        let (content, _) = self.map.content(place).ok_or(match place {
            Place::Ghost(..) => Errno::EHOSTDOWN,
            _ => Errno::ELOOP,
        })?;
        let seat = self.table.seat(caller)?;
        let (body, stream) = match (content, writes) {
            (Content::Health(machine), _) => return Ok(Opening::Ask(machine, Question::Health, seat)),
            (Content::Usage(machine), _) => return Ok(Opening::Ask(machine, Question::Usage, seat)),
            (Content::Changes(machine), _) => return Ok(Opening::Look(machine, seat)),
            (Content::RootCtl(usage), true) => {
                let commands =
                    root::RootCommands { registry: self.map.registry.clone(), ghosts: self.map.ghosts.clone() };
                (Body::Ctl(CtlFile::new(Box::new(commands), usage)), false)
            }
            (Content::Ctl(machine, usage), true) => (Body::Ctl(CtlFile::new(Box::new(machine), usage)), false),
            // A stream: a reader that waits must not hold the file position, which a writer would wait for in D.
            (Content::Exec(machine), true) => {
                (Body::Exec(Arc::new(ExecFile::new(machine, Target::New { private: reads }, seat.text()))), reads)
            }
            (Content::Command(machine, job), true) => {
                (Body::Exec(Arc::new(ExecFile::new(machine, Target::Job(job), seat.text()))), reads)
            }
            // A stream, so that the position is locked for nobody while a write waits.
            (Content::Input(machine, job), _) => (Body::Input(InputFile::open(machine, &job, caller)?), true),
            (Content::JobCtl(machine, job), true) => {
                let commands = job_ctl::JobCommands { machine, job };
                (Body::Ctl(CtlFile::new(Box::new(commands), job_ctl::usage().into_bytes())), false)
            }
            (Content::Value(Setting::Var(Holder::Machine(machine), kind, id)), true) if What::of(kind).is_some() => {
                let what = What::of(kind).ok_or(Errno::EIO)?;
                let snapshot = Setting::Var(Holder::Machine(machine.clone()), kind, id).text();
                (Body::Put(PutFile::new(machine, what, id, snapshot, seat.text())), false)
            }
            (Content::Value(setting), true) => (Body::Value(ValueFile::new(setting, seat.text())), false),
            (content, _) => open::reading(content).ok_or(Errno::EIO)?,
        };
        let parallel_direct_writes = matches!(body, Body::Input(_));
        let handle = self.table.insert(node, body, seat);
        let opened = ops::Opened { parallel_direct_writes, ..opened(handle, stream, writes) };
        Ok(Opening::Done(Answer::Opened(opened)))
    }

    /// Makes a file and opens it; one that somebody else has made meanwhile is opened, unless `flags` ask for a new one.
    fn create(&self, caller: Caller, parent: &Place, name: &[u8], flags: u32, responder: Responder) {
        let made = match change::create(&self.map, caller, parent, name) {
            Err(Errno::EEXIST) if flags & libc::O_EXCL as u32 == 0 => self.map.lookup(parent, name, caller),
            made => made,
        };
        let opened = made.and_then(|made| {
            let opening = self.try_open(caller, made.control().id(), &made, flags)?;
            Ok((made, opening))
        });
        match opened {
            Ok((made, Opening::Done(Answer::Opened(opened)))) => {
                let answer = Answer::Created(self.map.entry(&made), opened);
                change::answer_created(&self.map, responder, &made, answer);
            }
            Ok(_) => responder.respond(Err(Errno::EIO)),
            Err(errno) => responder.respond(Err(errno)),
        }
    }

    fn seek(&self, node: NodeId, handle: u64, offset: u64, whence: u32) -> Outcome {
        let size = self.table.get(node, handle)?.size();
        match whence as i32 {
            libc::SEEK_DATA | libc::SEEK_HOLE if offset >= size => Err(Errno::ENXIO),
            libc::SEEK_DATA => Ok(Answer::Offset(offset)),
            libc::SEEK_HOLE => Ok(Answer::Offset(size)),
            _ => Err(Errno::EINVAL),
        }
    }

    fn list(&self, place: &Place, cookie: u64, max: usize, plus: bool, cost: fn(usize) -> usize) -> Vec<DirEntry> {
        let dots = [(1, &b"."[..], place.control().id()), (2, &b".."[..], self.map.parent(place))];
        let is_ghost = matches!(place, Place::Ghost(..));
        // What was being listed when it became a ghost ends there.
        let dots = dots.into_iter().filter(|(number, ..)| *number > cookie);
        let dots = dots.map(|(cookie, name, ino)| DirEntry {
            name: name.into(),
            ino,
            kind: libc::DT_DIR,
            cookie,
            entry: None,
        });
        let listed = if is_ghost { Vec::new() } else { self.map.list(place, cookie) };
        let mut room = max;
        let mut fits = |name: &[u8]| {
            let left = room.checked_sub(cost(name.len()));
            room = left.unwrap_or(0);
            left.is_some()
        };
        let mut entries = Vec::new();
        for entry in dots {
            if !fits(&entry.name) {
                return entries;
            }
            entries.push(entry);
        }
        for listed in listed {
            if !fits(&listed.name) {
                break;
            }
            let ino = listed.node.id();
            // What is gone since it was listed is left out; without plus it is found missing later.
            let entry = match plus.then(|| self.map.resolve(ino)) {
                None => None,
                Some(Ok(place)) => Some(self.map.entry(&place)),
                Some(Err(_)) => continue,
            };
            let kind = listed.node.kind.dirent();
            entries.push(DirEntry { name: listed.name, ino, kind, cookie: listed.cookie, entry });
        }
        entries
    }

    /// Figures of the tree itself: no disk stands behind it, and nobody is to wait for one.
    fn statfs(&self) -> StatFs {
        let files = self.map.registry.list().len() as u64;
        StatFs { files, bsize: 4096, frsize: 4096, namelen: NAME_MAX, ..StatFs::default() }
    }
}

/// Notes that a machine's files are used. One that rests frozen is woken by writing, and by walking on the way to it;
/// its answer comes when it is thawed.
fn use_machine(machine: &Arc<Machine>, caller: Caller, op: &Op<'_>) -> Result<(), Errno> {
    if idle::is_use(op) {
        machine.used();
    }
    // What is closed is closed: the agent takes it when it is awake.
    let closes = matches!(op, Op::Release { .. } | Op::ReleaseDir { .. });
    if !machine.is_idle() || closes {
        return Ok(());
    }
    // Locks of what is closed by a process end with that, in the guest's kernel.
    if matches!(op, Op::Flush { .. }) || idle::writes(op) || idle::caller_writes(caller.pid) {
        machine.wake();
        return Ok(());
    }
    Err(Errno::EHOSTDOWN)
}

enum Opening {
    Done(Answer),
    Ask(Arc<Machine>, Question, open::Seat),
    /// At what differs from its image.
    Look(Arc<Machine>, open::Seat),
}

/// Truncation does nothing, since files end with what is written; times are accepted, for touch; the rest is ours.
fn check_setattr(set: &SetAttr) -> Result<(), Errno> {
    if set.mode.is_some() || set.uid.is_some() || set.gid.is_some() { Err(Errno::EPERM) } else { Ok(()) }
}

/// The attributes of `files`: they wait for the boot.
struct Gate {
    map: Arc<Map>,
    machine: Arc<Machine>,
}

impl Source for Gate {
    fn attempt(&self) -> Option<Outcome> {
        let boots = self.machine.awaits_agent() && self.machine.files().is_none();
        (!boots && !self.machine.is_waking()).then(|| self.expired())
    }

    fn watches(&self) -> Vec<Watched> {
        vec![Watched::State(self.machine.clone())]
    }

    fn expired(&self) -> Outcome {
        let place = Place::Machine(self.machine.clone(), Kind::Files);
        Ok(Answer::Attr(self.map.attr(&place), Duration::ZERO))
    }
}

impl Files for Tree {
    fn dispatch(&self, caller: Caller, mut op: Op<'_>, responder: Responder) {
        let (node, second) = nodes(&mut op);
        let node = *node;
        if second.is_some() {
            self.dispatch_two(caller, op, responder);
        } else if is_guest(node) {
            self.dispatch_guest(caller, node, op, responder);
        } else if let Some(machine) = self.files_of(node) {
            self.dispatch_files(caller, machine, op, responder);
        } else {
            self.dispatch_control(caller, node, op, responder);
        }
    }

    fn forget(&self, node: NodeId, count: u64) {
        // Control nodes are derived from their numbers: there is nothing to forget.
        if is_guest(node)
            && let Ok(files) = self.guests.by_node(node)
        {
            files.forget(node, count);
        }
    }
}
