//! Which of the host's files a machine must not see, kept right while the host changes.
//!
//! A machine's root is root to the files of its image, also to those that ordinary users of the host cannot read. So
//! these are looked for, once, and hidden. After that every directory is watched with inotify(7): a file made, moved in
//! or changed in mode is looked at when the next machine starts, and nothing else is.

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, StatxFlags, openat, statx};
use std::collections::{BTreeSet, HashMap};
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, PoisonError};

/// What the host's watch has to tell us of a directory.
const EVENTS: WatchFlags = WatchFlags::CREATE
    .union(WatchFlags::MOVED_TO)
    .union(WatchFlags::MOVED_FROM)
    .union(WatchFlags::ATTRIB)
    .union(WatchFlags::ONLYDIR)
    .union(WatchFlags::DONT_FOLLOW)
    .union(WatchFlags::EXCL_UNLINK);

/// Threads that look; more do not help where the cache is warm, and the disk is the limit where it is not.
const THREADS: usize = 4;

/// The state of the trees of the host.
#[derive(Debug)]
pub(super) struct Scan {
    roots: Vec<PathBuf>,
    /// Those of the trees of which a machine must see nothing.
    pub(super) closed: BTreeSet<PathBuf>,
    /// Paths in the others that a machine must not see.
    pub(super) hidden: BTreeSet<PathBuf>,
    /// `None`: this host has not enough watches; then every look is a whole one.
    watch: Option<Watch>,
}

#[derive(Debug)]
struct Watch {
    fd: OwnedFd,
    dirs: HashMap<i32, PathBuf>,
}

/// One walk's shared state.
struct Walk {
    queue: Mutex<(Vec<PathBuf>, usize)>,
    wake: Condvar,
    found: Mutex<Found>,
}

#[derive(Default)]
struct Found {
    hidden: BTreeSet<PathBuf>,
    dirs: HashMap<i32, PathBuf>,
    no_watch: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How a machine may see a thing.
enum Sight {
    Plain,
    Directory,
    Hidden,
}

/// What an ordinary user may do with `name` in `dir` decides what a machine may see of it: a file must be readable by
/// others, a directory readable and searchable. Sockets, pipes and devices act on the host's programs and are hidden.
/// So is a mount point: what the mount covers is not for anyone to see, and the mount is not a part of the image.
fn sight(dir: impl AsFd, name: impl rustix::path::Arg) -> io::Result<Option<Sight>> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    let stat = match statx(dir, name, flags, StatxFlags::TYPE | StatxFlags::MODE) {
        Ok(stat) => stat,
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => return Ok(None),
        Err(rustix::io::Errno::ACCESS) => return Ok(Some(Sight::Hidden)),
        Err(e) => return Err(e.into()),
    };
    let mode = u32::from(stat.stx_mode);
    let sight = match FileType::from_raw_mode(mode) {
        _ if stat.stx_attributes.contains(rustix::fs::StatxAttributes::MOUNT_ROOT) => Sight::Hidden,
        FileType::Symlink => Sight::Plain,
        FileType::RegularFile if mode & 0o004 != 0 => Sight::Plain,
        FileType::Directory if mode & 0o005 == 0o005 => Sight::Directory,
        _ => Sight::Hidden,
    };
    Ok(Some(sight))
}

/// Those of `roots` that an ordinary user cannot read, or not come to: nothing in them is for a machine.
fn closed(roots: &[PathBuf]) -> BTreeSet<PathBuf> {
    let lacks = |path: &Path, bits: u32| !fs::metadata(path).is_ok_and(|m| m.mode() & bits == bits);
    let is_closed = |root: &&PathBuf| lacks(root, 0o005) || root.ancestors().skip(1).any(|above| lacks(above, 0o001));
    roots.iter().filter(is_closed).cloned().collect()
}

impl Scan {
    /// Looks at everything below `roots`.
    pub(super) fn new(roots: &[PathBuf]) -> io::Result<Self> {
        let fd = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).ok();
        let closed = closed(roots);
        let found = walk(roots.iter().filter(|r| !closed.contains(*r)).cloned().collect(), fd.as_ref())?;
        let watch = fd.filter(|_| !found.no_watch).map(|fd| Watch { fd, dirs: found.dirs });
        if watch.is_none() {
            tracing::warn!(
                "too few inotify watches to follow the host's files: each start looks at all of them \
                 (raise fs.inotify.max_user_watches)"
            );
        }
        Ok(Self { roots: roots.to_vec(), closed, hidden: found.hidden, watch })
    }

    /// All directories that are not hidden, where they are known.
    pub(super) fn directories(&self) -> impl Iterator<Item = &PathBuf> {
        self.watch.iter().flat_map(|watch| watch.dirs.values())
    }

    /// Brings it up to date; true when something had changed.
    pub(super) fn refresh(&mut self) -> io::Result<bool> {
        let Some(watch) = &self.watch.as_ref().filter(|_| closed(&self.roots) == self.closed) else {
            return self.renew();
        };
        let mut changed = Vec::new();
        let mut buffer = [MaybeUninit::uninit(); 16 * 1024];
        let mut reader = inotify::Reader::new(watch.fd.as_fd(), &mut buffer);
        loop {
            let event = match reader.next() {
                Ok(event) => event,
                Err(rustix::io::Errno::AGAIN) => break,
                Err(rustix::io::Errno::INTR) => continue,
                Err(e) => return Err(e.into()),
            };
            let flags = event.events();
            let moved_dir = flags.contains(ReadFlags::MOVED_FROM | ReadFlags::ISDIR);
            if flags.contains(ReadFlags::QUEUE_OVERFLOW) || moved_dir || flags.contains(ReadFlags::UNMOUNT) {
                return self.renew();
            }
            if flags.contains(ReadFlags::MOVED_FROM) {
                continue;
            }
            if let Some(dir) = watch.dirs.get(&event.wd()) {
                changed.push(match event.file_name() {
                    Some(name) => dir.join(OsStr::from_bytes(name.to_bytes())),
                    None => dir.clone(),
                });
            }
        }
        if changed.is_empty() {
            return Ok(false);
        }
        let before = (self.hidden.clone(), self.directories().count());
        changed.sort();
        changed.dedup();
        for path in changed {
            self.look(&path)?;
        }
        Ok(self.hidden != before.0 || self.directories().count() != before.1)
    }

    fn renew(&mut self) -> io::Result<bool> {
        let new = Self::new(&self.roots)?;
        *self = new;
        Ok(true)
    }

    fn look(&mut self, path: &Path) -> io::Result<()> {
        match sight(CWD, path)? {
            // A hidden path stays hidden when it goes: the name may come back.
            None => {}
            // A root is no entry of a directory that is looked at: that it can be mounted is all that counts.
            Some(Sight::Hidden) if !self.roots.iter().any(|r| r == path) => {
                self.hidden.insert(path.to_owned());
            }
            Some(Sight::Plain | Sight::Hidden) => {
                self.hidden.remove(path);
            }
            Some(Sight::Directory) => {
                self.hidden.remove(path);
                let found = walk(vec![path.to_owned()], self.watch.as_ref().map(|w| &w.fd))?;
                self.hidden.extend(found.hidden);
                match &mut self.watch {
                    Some(watch) if !found.no_watch => watch.dirs.extend(found.dirs),
                    watch => *watch = None,
                }
            }
        }
        Ok(())
    }
}

fn walk(roots: Vec<PathBuf>, watch: Option<&OwnedFd>) -> io::Result<Found> {
    let walk = Walk { queue: Mutex::new((roots, 0)), wake: Condvar::new(), found: Mutex::new(Found::default()) };
    let result = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(|| walk.work(watch))).collect();
        let join = |t: std::thread::ScopedJoinHandle<'_, io::Result<()>>| {
            t.join().unwrap_or_else(|_| Err(io::Error::other("a scanning thread ended early")))
        };
        threads.into_iter().map(join).fold(Ok(()), io::Result::and)
    });
    result?;
    Ok(walk.found.into_inner().unwrap_or_else(PoisonError::into_inner))
}

impl Walk {
    fn work(&self, watch: Option<&OwnedFd>) -> io::Result<()> {
        let mut found = Found::default();
        let mut result = Ok(());
        loop {
            let dir = {
                let mut queue = lock(&self.queue);
                loop {
                    if let Some(dir) = queue.0.pop() {
                        queue.1 += 1;
                        break dir;
                    }
                    if queue.1 == 0 {
                        self.wake.notify_all();
                        drop(queue);
                        self.add(found);
                        return result;
                    }
                    queue = self.wake.wait(queue).unwrap_or_else(PoisonError::into_inner);
                }
            };
            let mut below = Vec::new();
            if let Err(e) = directory(&dir, watch, &mut found, &mut below) {
                result = Err(io::Error::new(e.kind(), format!("{}: {e}", dir.display())));
            }
            let mut queue = lock(&self.queue);
            queue.0.append(&mut below);
            queue.1 -= 1;
            self.wake.notify_all();
        }
    }

    fn add(&self, found: Found) {
        let mut all = lock(&self.found);
        all.hidden.extend(found.hidden);
        all.dirs.extend(found.dirs);
        all.no_watch |= found.no_watch;
    }
}

fn directory(path: &Path, watch: Option<&OwnedFd>, found: &mut Found, below: &mut Vec<PathBuf>) -> io::Result<()> {
    // The watch comes first: what changes while the directory is read is looked at again.
    match watch.filter(|_| !found.no_watch).map(|watch| inotify::add_watch(watch, path, EVENTS)) {
        Some(Ok(number)) => {
            found.dirs.insert(number, path.to_owned());
        }
        Some(Err(rustix::io::Errno::NOENT)) => return Ok(()),
        Some(Err(rustix::io::Errno::NOSPC | rustix::io::Errno::NOMEM)) => found.no_watch = true,
        Some(Err(e)) => return Err(e.into()),
        None => {}
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let dir = match openat(CWD, path, flags, Mode::empty()) {
        Ok(dir) => dir,
        Err(rustix::io::Errno::NOENT) => return Ok(()),
        Err(e) => return Err(e.into()),
    };
    for entry in Dir::read_from(dir.as_fd())? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let full = || path.join(OsStr::from_bytes(name.to_bytes()));
        match sight(&dir, name)? {
            None | Some(Sight::Plain) => {}
            Some(Sight::Directory) => below.push(full()),
            Some(Sight::Hidden) => {
                found.hidden.insert(full());
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn what_others_cannot_read_is_hidden_also_when_it_comes_later() {
        let tmp = tempfile::tempdir().unwrap();
        let root = tmp.path().canonicalize().unwrap().join("root");
        fs::create_dir(&root).unwrap();
        let chmod = |p: &str, mode| fs::set_permissions(root.join(p), Permissions::from_mode(mode)).unwrap();
        fs::create_dir_all(root.join("a/b/c")).unwrap();
        for (name, mode) in [("a/open", 0o644), ("a/secret", 0o640), ("a/b/c/run", 0o711)] {
            fs::write(root.join(name), "x").unwrap();
            chmod(name, mode);
        }
        fs::create_dir(root.join("closed")).unwrap();
        fs::write(root.join("closed/open"), "x").unwrap();
        chmod("closed", 0o711);
        std::os::unix::fs::symlink("/etc/shadow", root.join("link")).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(root.join("socket")).unwrap();
        fs::set_permissions(tmp.path(), Permissions::from_mode(0o700)).unwrap();
        let mut scan = Scan::new(std::slice::from_ref(&root)).unwrap();
        assert_eq!((&scan.closed, scan.hidden.len()), (&BTreeSet::from([root.clone()]), 0), "nobody can come to it");
        fs::set_permissions(tmp.path(), Permissions::from_mode(0o711)).unwrap();
        assert!(scan.refresh().unwrap());
        assert_eq!(scan.closed, BTreeSet::new());
        let set = |names: &[&str]| names.iter().map(|n| root.join(n)).collect::<BTreeSet<_>>();
        assert_eq!(scan.hidden, set(&["a/secret", "a/b/c/run", "closed", "socket"]));
        assert!(!scan.refresh().unwrap());

        chmod("a/open", 0o600);
        chmod("closed", 0o755);
        fs::create_dir_all(root.join("new/deep")).unwrap();
        fs::write(root.join("new/deep/secret"), "x").unwrap();
        chmod("new/deep/secret", 0o600);
        assert!(scan.refresh().unwrap());
        assert_eq!(scan.hidden, set(&["a/secret", "a/open", "a/b/c/run", "socket", "new/deep/secret"]));

        chmod("new/deep", 0o750);
        fs::rename(root.join("a"), root.join("z")).unwrap();
        assert!(scan.refresh().unwrap());
        assert_eq!(scan.hidden, set(&["z/secret", "z/open", "z/b/c/run", "socket", "new/deep"]));

        fs::set_permissions(&root, Permissions::from_mode(0o750)).unwrap();
        assert!(scan.refresh().unwrap());
        assert_eq!(scan.closed, BTreeSet::from([root]));
    }
}
