//! How a machine's disk differs from its image: what is in its upper directories, each name looked up in the layers
//! below. Formats: "Overlay Filesystem" in the kernel's documentation.
//!
//! Only directories of descriptors are walked, never paths: the machine may run and rename what is being looked at. The
//! number of open descriptors does not grow with the depth; the memory holds the names of the directories on the way.

use crate::images::{Root, Tree};
use crate::{Change, ChangeKind, MachineSpec};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, Stat, fstat, open, openat, openat2, statat};
use rustix::io::Errno;
use std::cell::Cell;
use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{CString, OsStr};
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

const DIR: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// How many directories on the way are kept open; back to the others the way is `..`, checked.
const OPEN: usize = 64;

/// Takes a change; false when no more are wanted.
type Sink<'a> = dyn FnMut(Change) -> io::Result<bool> + 'a;

/// What a walk needs to know of the machine.
#[derive(Debug)]
pub(super) struct Walk<'a> {
    pub(super) spec: &'a MachineSpec,
    pub(super) root: &'a Root,
    /// The directory with `upper`.
    pub(super) disk: &'a Path,
    /// First number of the machine's users on the host; `None` for an ordinary user.
    pub(super) base: Option<u32>,
    /// Directories that could not be looked into.
    pub(super) closed: Cell<u64>,
}

/// A directory on the way.
struct Level {
    fd: Option<OwnedFd>,
    /// Device and inode.
    identity: (u64, u64),
    /// How long the path of this directory is.
    length: usize,
    /// Where its content is in the layers below, relative to them; `None`: nowhere.
    below: Option<PathBuf>,
    /// Is that content hidden by an opaque directory?
    hides: bool,
    /// What is still to be told of it, last first.
    names: Vec<(CString, Found)>,
}

/// What a name of a directory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    /// In the upper directory.
    Upper,
    /// In the layers below only, and hidden by an opaque directory.
    Hidden,
}

/// What is to be told of a name, and the directory to look into next.
#[derive(Default)]
struct Told {
    change: Option<(ChangeKind, Option<Vec<u8>>)>,
    inside: Option<(OwnedFd, Option<PathBuf>, bool)>,
}

impl Told {
    fn change(kind: ChangeKind) -> Self {
        Self { change: Some((kind, None)), inside: None }
    }
}

impl Level {
    fn new(fd: OwnedFd, length: usize, below: Option<PathBuf>, hides: bool, layers: &[OwnedFd]) -> io::Result<Self> {
        let mut names = BTreeMap::new();
        if let Some(path) = below.as_ref().filter(|_| hides) {
            names.extend(names_below(layers, path)?.into_iter().map(|name| (name, Found::Hidden)));
        }
        names.extend(names_of(&fd)?.into_iter().map(|name| (name, Found::Upper)));
        let stat = fstat(&fd)?;
        let names = names.into_iter().rev().collect();
        Ok(Self { fd: Some(fd), identity: (stat.st_dev, stat.st_ino), length, below, hides, names })
    }

    /// Opens this directory again, from one in it.
    fn reopen(&mut self, inner: &Self) -> io::Result<()> {
        let Some(inner) = &inner.fd else { return Err(Errno::STALE.into()) };
        let fd = openat(inner, "..", DIR, Mode::empty())?;
        let stat = fstat(&fd)?;
        if (stat.st_dev, stat.st_ino) != self.identity {
            // The machine moved what was being looked at.
            return Err(Errno::STALE.into());
        }
        self.fd = Some(fd);
        Ok(())
    }
}

impl Walk<'_> {
    /// Tells all changes until `sink` has enough.
    pub(super) fn run(&self, sink: &mut dyn FnMut(Change) -> bool) -> io::Result<()> {
        let mut trees: Vec<(Vec<u8>, &Tree)> = Vec::new();
        for tree in &self.root.trees {
            trees.push((if tree.at.is_empty() { Vec::new() } else { format!("/{}", tree.at).into_bytes() }, tree));
        }
        trees.sort_by(|(a, _), (b, _)| if before(a, b) { Ordering::Less } else { Ordering::Greater });
        let mut trees = trees.into_iter().peekable();
        let Some((_, first)) = trees.next() else { return Ok(()) };
        // The other trees are mounted in the root's: each is told where its place is in the order.
        let wants_more = self.tree(b"", first, &mut |change| {
            while let Some((at, tree)) = trees.next_if(|(at, _)| before(at, &change.path)) {
                if !self.tree(&at, tree, &mut |change| Ok(sink(change)))? {
                    return Ok(false);
                }
            }
            Ok(sink(change))
        })?;
        if wants_more {
            for (at, tree) in trees {
                if !self.tree(&at, tree, &mut |change| Ok(sink(change)))? {
                    break;
                }
            }
        }
        Ok(())
    }

    /// One tree; false when `sink` has enough.
    fn tree(&self, prefix: &[u8], tree: &Tree, sink: &mut Sink<'_>) -> io::Result<bool> {
        let top = match open(self.disk.join("upper").join(&tree.name), DIR, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::NOENT) => return Ok(true),
            Err(e) => return Err(e.into()),
        };
        let layers = tree.lower.iter().map(|path| open(path, DIR | OFlags::PATH, Mode::empty()));
        let layers = layers.collect::<Result<Vec<_>, _>>()?;
        let mut path = prefix.to_vec();
        let mut way = vec![Level::new(top, path.len(), Some(PathBuf::new()), false, &layers)?];
        while let Some(level) = way.last_mut() {
            path.truncate(level.length);
            let Some((name, found)) = level.names.pop() else {
                let ended = way.pop();
                if let (Some(ended), Some(parent)) = (ended, way.last_mut())
                    && parent.fd.is_none()
                {
                    parent.reopen(&ended)?;
                }
                continue;
            };
            path.push(b'/');
            path.extend_from_slice(name.as_bytes());
            let told = if found == Found::Hidden {
                Told::change(ChangeKind::Deleted)
            } else {
                self.look_at(level, &layers, prefix, &path, &name)?
            };
            if let Some((kind, moved_from)) = told.change
                && !sink(Change { kind, path: path.clone(), moved_from })?
            {
                return Ok(false);
            }
            if let Some((fd, below, hides)) = told.inside {
                way.push(Level::new(fd, path.len(), below, hides, &layers)?);
                if let Some(far) = way.len().checked_sub(OPEN + 1).and_then(|n| way.get_mut(n)) {
                    far.fd = None;
                }
            }
        }
        Ok(true)
    }

    /// What a name in an upper directory means.
    fn look_at(
        &self,
        level: &Level,
        layers: &[OwnedFd],
        prefix: &[u8],
        path: &[u8],
        name: &CString,
    ) -> io::Result<Told> {
        let Some(dir) = &level.fd else { return Ok(Told::default()) };
        let stat = match statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            // The machine runs, and has removed it meanwhile.
            Err(Errno::NOENT) => return Ok(Told::default()),
            Err(e) => return Err(e.into()),
        };
        let below_path = level.below.as_ref().map(|b| b.join(OsStr::from_bytes(name.as_bytes())));
        let below = below_path.as_ref().map(|path| look(layers, path)).transpose()?.flatten();
        let changed = if below.is_some() { ChangeKind::Modified } else { ChangeKind::Added };
        if is_whiteout(dir, name, &stat) {
            return Ok(if below.is_some() { Told::change(ChangeKind::Deleted) } else { Told::default() });
        }
        if !is_dir(&stat) {
            let is_ours = self.is_ours(path, dir, name, &stat);
            return Ok(if is_ours { Told::default() } else { Told::change(changed) });
        }
        let fd = match openat(dir, name, DIR, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(Told::default()),
            Err(Errno::ACCESS | Errno::PERM) => {
                self.closed.set(self.closed.get() + 1);
                return Ok(Told::change(changed));
            }
            Err(e) => return Err(e.into()),
        };
        let moved = attribute(&fd, "redirect").and_then(|to| redirected(level.below.as_deref(), &to));
        let is_opaque = attribute(&fd, "opaque").is_some_and(|v| v == b"y");
        let is_dir_below = below.as_ref().is_some_and(is_dir);
        let change = match &below {
            None => Some(ChangeKind::Added),
            Some(below) if !is_dir_below || moved.is_some() || self.differs(&stat, below) => Some(ChangeKind::Modified),
            Some(_) => None,
        };
        let moved_from = moved.as_ref().map(|to| [prefix, b"/", to.as_os_str().as_bytes()].concat());
        // What is in an opaque directory is not merged with what is below, however deep; it is still told by it.
        let hides = is_opaque || (level.hides && moved.is_none());
        let content = moved.or(below_path.filter(|_| is_dir_below));
        Ok(Told { change: change.map(|c| (c, moved_from)), inside: Some((fd, content, hides)) })
    }

    /// Is a directory's owner or are its permissions others than the image's?
    fn differs(&self, upper: &Stat, lower: &Stat) -> bool {
        let shown = |id: u32| match self.base {
            Some(base) => base + if id < super::userns::RANGE { id } else { 65534 },
            None => id,
        };
        let owner = self.base.is_some() && (upper.st_uid, upper.st_gid) != (shown(lower.st_uid), shown(lower.st_gid));
        owner || upper.st_mode != lower.st_mode
    }

    /// Is it a file that was made with the machine and is as it was made?
    fn is_ours(&self, path: &[u8], dir: &OwnedFd, name: &CString, stat: &Stat) -> bool {
        const MOST: i64 = 4096;
        let is_file = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile && stat.st_size <= MOST;
        let is_named = [&b"/etc/hostname"[..], b"/etc/hosts", b"/etc/resolv.conf"].contains(&path);
        if !is_file || !is_named {
            return false;
        }
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let Ok(fd) = openat(dir, name, flags, Mode::empty()) else { return false };
        let mut content = Vec::new();
        if io::Read::read_to_end(&mut io::Read::take(fs::File::from(fd), MOST as u64), &mut content).is_err() {
            return false;
        }
        super::etc::is_generated(path, &content, &self.spec.hostname)
    }
}

/// Does `one` come before `two`, by components?
fn before(one: &[u8], two: &[u8]) -> bool {
    one.split(|b| *b == b'/').lt(two.split(|b| *b == b'/'))
}

/// The value of an attribute of overlay's, as root has it or as an ordinary user.
fn attribute(fd: &OwnedFd, name: &str) -> Option<Vec<u8>> {
    ["trusted", "user"].into_iter().find_map(|class| {
        let mut value = vec![0; 4096];
        let length = rustix::fs::fgetxattr(fd, format!("{class}.overlay.{name}"), &mut value[..]).ok()?;
        value.truncate(length);
        Some(value)
    })
}

/// Where a directory's content is: an absolute path from the layer's root, or another name beside it.
fn redirected(parent: Option<&Path>, to: &[u8]) -> Option<PathBuf> {
    match to.strip_prefix(b"/") {
        Some(path) => Some(PathBuf::from(OsStr::from_bytes(path))),
        None => Some(parent?.join(OsStr::from_bytes(to))),
    }
}

/// A character device 0:0, or an empty file with the attribute `whiteout`.
fn is_whiteout(dir: &OwnedFd, name: &CString, stat: &Stat) -> bool {
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::CharacterDevice => stat.st_rdev == 0,
        FileType::RegularFile if stat.st_size == 0 => {
            let path = format!("/proc/self/fd/{}/{}", dir.as_raw_fd(), "");
            let path = [path.as_bytes(), name.as_bytes()].concat();
            let path = OsStr::from_bytes(&path);
            let mut none = [0_u8; 16];
            ["trusted.overlay.whiteout", "user.overlay.whiteout"]
                .into_iter()
                .any(|key| rustix::fs::lgetxattr(path, key, &mut none[..]).is_ok())
        }
        _ => false,
    }
}

fn beneath(layer: &OwnedFd, path: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    if path.as_os_str().is_empty() {
        return openat(layer, ".", flags, Mode::empty());
    }
    // What is mounted below a layer is not a part of the image.
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    openat2(layer, path, flags, Mode::empty(), resolve)
}

fn is_dir(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::Directory
}

fn names_of(dir: &OwnedFd) -> io::Result<BTreeSet<CString>> {
    let mut names = BTreeSet::new();
    for entry in Dir::read_from(dir)? {
        let name = entry?.file_name().to_owned();
        if name.as_bytes() != b"." && name.as_bytes() != b".." {
            names.insert(name);
        }
    }
    Ok(names)
}

/// The names in a directory of the layers, as one sees them through an overlay.
fn names_below(layers: &[OwnedFd], path: &Path) -> io::Result<BTreeSet<CString>> {
    let mut names = BTreeSet::new();
    for layer in layers {
        if let Ok(dir) = beneath(layer, path, DIR) {
            names.append(&mut names_of(&dir)?);
        }
    }
    let mut seen = BTreeSet::new();
    for name in names {
        if look(layers, &path.join(OsStr::from_bytes(name.as_bytes())))?.is_some() {
            seen.insert(name);
        }
    }
    Ok(seen)
}

/// What the layers below have at a path: the uppermost that has something decides.
fn look(lower: &[OwnedFd], path: &Path) -> io::Result<Option<Stat>> {
    let parents: Vec<&Path> = path.ancestors().skip(1).filter(|p| !p.as_os_str().is_empty()).collect();
    for layer in lower {
        let (parent, name) = (path.parent().unwrap_or(Path::new("")), path.file_name().unwrap_or_default());
        let name = CString::new(name.as_bytes())?;
        if let Ok(dir) = beneath(layer, parent, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC) {
            match statat(&dir, &name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) if is_whiteout(&dir, &name, &stat) => return Ok(None),
                Ok(stat) => return Ok(Some(stat)),
                Err(Errno::NOENT | Errno::NOTDIR | Errno::ACCESS) => {}
                Err(e) => return Err(e.into()),
            }
        }
        // A whiteout, a file or an opaque directory on the way hides what is in the layers below this one.
        for parent in &parents {
            let Ok(at) = beneath(layer, parent, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC) else { continue };
            let is_dir = fstat(&at).is_ok_and(|s| FileType::from_raw_mode(s.st_mode) == FileType::Directory);
            let is_opaque =
                is_dir && beneath(layer, parent, DIR).is_ok_and(|d| attribute(&d, "opaque").is_some_and(|v| v == b"y"));
            if !is_dir || is_opaque {
                return Ok(None);
            }
        }
    }
    Ok(None)
}
