//! The identity of nodes where it is hardest: inside a user namespace, where files cannot be opened by handle, with
//! 20,000 descriptors, on 200,000 files. Everything is looked up, moved, unlinked while open, and forgotten; nodes
//! stay what they were, ESTALE comes only where a name is really lost, and in the end every descriptor is back.

// The helpers of a test fail like the test itself.
#![allow(clippy::unwrap_used, clippy::panic)]

use machinefs_agent::files::{Cancelled, FileError, FileService};
use machinefs_protocol::file::{Attr, DirEntry, DirPage, Entry, FileReply, FileRequest, ROOT};
use rustix::fs::{FileType, Mode, OFlags, mknodat, open};
use rustix::io::Errno;
use rustix::mount::MountFlags;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::UnshareFlags;
use std::collections::HashSet;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use tempfile::TempDir;

const DIRS: usize = 200;
const FILES: usize = 1000;
/// Set for the process that does the work: the directory to do it in.
const CHILD: &str = "MACHINEFS_TEST_NODE_IDENTITY";
const O_RDWR: u32 = 2;

struct Never;

impl Cancelled for Never {
    fn is_cancelled(&self) -> bool {
        false
    }
}

#[test]
fn two_hundred_thousand_files_in_a_user_namespace() {
    in_namespaces("two_hundred_thousand_files_in_a_user_namespace", UnshareFlags::NEWUSER, 20_000, in_memory, run);
}

#[test]
fn overlay_in_a_user_namespace() {
    let flags = UnshareFlags::NEWUSER | UnshareFlags::NEWNS;
    in_namespaces("overlay_in_a_user_namespace", flags, 64, tempfile::tempdir, run_on_overlay);
}

/// In memory unless TMPDIR says otherwise: ext4 looks long for an inode while many were deleted a moment ago.
fn in_memory() -> std::io::Result<TempDir> {
    let memory = Path::new("/dev/shm");
    if std::env::var_os("TMPDIR").is_none() && memory.is_dir() {
        return tempfile::tempdir_in(memory);
    }
    tempfile::tempdir()
}

/// Runs `work` on an empty directory, in a process of its own with new namespaces and few descriptors: this test
/// program once more, with only that test.
fn in_namespaces(
    test: &str,
    flags: UnshareFlags,
    descriptors: u64,
    directory: fn() -> std::io::Result<TempDir>,
    work: fn(&Path),
) {
    if let Some(dir) = std::env::var_os(CHILD) {
        return work(Path::new(&dir));
    }
    let dir = directory().unwrap();
    let uid_map = format!("0 {} 1\n", rustix::process::geteuid().as_raw());
    let gid_map = format!("0 {} 1\n", rustix::process::getegid().as_raw());
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", test, "--nocapture", "--test-threads=1"]);
    child.env(CHILD, dir.path());
    // SAFETY: only system calls, on memory that was made before the fork.
    unsafe {
        child.pre_exec(move || {
            rustix::thread::unshare_unsafe(flags)?;
            for (file, text) in [
                (c"/proc/self/setgroups", "deny"),
                (c"/proc/self/uid_map", uid_map.as_str()),
                (c"/proc/self/gid_map", gid_map.as_str()),
            ] {
                let file = open(file, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
                rustix::io::write(&file, text.as_bytes())?;
            }
            let maximum = getrlimit(Resource::Nofile).maximum.map_or(descriptors, |limit| limit.min(descriptors));
            setrlimit(Resource::Nofile, Rlimit { current: Some(maximum), maximum: Some(maximum) })?;
            Ok(())
        });
    }
    let status = match child.status() {
        Err(error) if matches!(error.raw_os_error(), Some(libc::EPERM | libc::ENOSPC | libc::EUSERS)) => {
            println!("skipped: no user namespace can be made here: {error}");
            return;
        }
        status => status.unwrap(),
    };
    assert!(status.success(), "{status}");
}

/// One of the files: where it is now, and what the host knows it as.
#[derive(Clone)]
struct File {
    dir: usize,
    name: String,
    node: u64,
    ino: u64,
}

struct World<'a> {
    service: &'a FileService,
    /// Name and node of each directory.
    dirs: Vec<(String, u64)>,
    files: Vec<File>,
    path: &'a Path,
}

impl World<'_> {
    fn call(&self, request: FileRequest<'_>) -> Result<(FileReply, Vec<u8>), FileError> {
        self.service.handle(&request, &[], &Never)
    }

    fn lookup(&self, parent: u64, name: &str) -> Result<Entry, FileError> {
        match self.call(FileRequest::Lookup { parent, name: name.as_bytes() })?.0 {
            FileReply::Entry(entry) => Ok(entry),
            other => panic!("{other:?}"),
        }
    }

    fn attr(&self, node: u64, fh: Option<u64>) -> Result<Attr, FileError> {
        match self.call(FileRequest::GetAttr { node, fh })?.0 {
            FileReply::Attr(attr) => Ok(attr),
            other => panic!("{other:?}"),
        }
    }

    fn stale(&self, node: u64) -> bool {
        self.attr(node, None) == Err(FileError(Errno::STALE))
    }

    fn rename(&self, from: (u64, &str), to: (u64, &str), flags: u32) {
        let (name, new_name) = (from.1.as_bytes(), to.1.as_bytes());
        self.call(FileRequest::Rename { parent: from.0, name, new_parent: to.0, new_name, flags }).unwrap();
    }

    /// Every node still is its file, asked for from four threads in an order that the cache does not like.
    fn check_all(&self) {
        std::thread::scope(|scope| {
            for part in 0..4 {
                scope.spawn(move || {
                    let count = self.files.len();
                    for i in (part..count).step_by(4) {
                        // 7,919 is a prime that does not divide the count: each file comes up once.
                        let file = &self.files[i * 7919 % count];
                        let attr = self.attr(file.node, None).unwrap();
                        assert_eq!((attr.ino, attr.nlink), (file.ino, 1), "{}/{}", self.dirs[file.dir].0, file.name);
                    }
                });
            }
        });
    }

    /// Uses so many other files that nothing of the directory is cached any more.
    fn flush_cache(&self, but: usize) {
        for file in self.files.iter().filter(|file| file.dir != but).take(20_000) {
            self.attr(file.node, None).unwrap();
        }
    }
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// An overlay that is mounted inside a user namespace gives handles without a generation, and its inode numbers are
/// used again at once: birth times tell its files apart, and must not tell a file from itself when it is copied up.
fn run_on_overlay(path: &Path) {
    for name in ["lower", "lower/dir", "upper", "work", "merged"] {
        std::fs::create_dir(path.join(name)).unwrap();
    }
    for name in ["file", "other", "dir/inner"] {
        std::fs::write(path.join("lower").join(name), "from below").unwrap();
    }
    for i in 0..200 {
        std::fs::write(path.join(format!("lower/x{i}")), "").unwrap();
    }
    let (merged, part) = (path.join("merged"), |name: &str| path.join(name).to_str().unwrap().to_owned());
    let data = format!("lowerdir={},upperdir={},workdir={}", part("lower"), part("upper"), part("work"));
    let data = std::ffi::CString::new(data).unwrap();
    let mounted = rustix::mount::mount("overlay", &merged, "overlay", MountFlags::empty(), data.as_c_str());
    if let Err(errno) = mounted {
        println!("skipped: no overlay can be mounted in a user namespace here: {errno}");
        return;
    }
    let root = open(&merged, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap();
    let service = FileService::new(root).unwrap();
    let world = World { service: &service, dirs: Vec::new(), files: Vec::new(), path: &merged };
    let evict = || {
        for i in 0..200 {
            world.lookup(ROOT, &format!("x{i}")).unwrap();
        }
    };
    let write = |node| {
        let FileReply::Opened(fh) =
            world.call(FileRequest::Open { node, flags: O_RDWR, kill_suidgid: false }).unwrap().0
        else {
            panic!()
        };
        service.handle(&FileRequest::Write { fh, offset: 0, kill_suidgid: false }, b"new", &Never).unwrap();
        service.release(fh, 0);
    };

    // Copied up: by us, and by the guest, where a directory may have been let go of in between.
    let file = world.lookup(ROOT, "file").unwrap();
    write(file.node);
    assert_eq!(world.lookup(ROOT, "file").unwrap().node, file.node);
    evict();
    assert_eq!(world.attr(file.node, None).unwrap().ino, file.attr.ino);
    let other = world.lookup(ROOT, "other").unwrap();
    std::fs::write(merged.join("other"), "new").unwrap();
    assert_eq!(world.lookup(ROOT, "other").unwrap().node, other.node);
    let dir = world.lookup(ROOT, "dir").unwrap();
    let inner = world.lookup(dir.node, "inner").unwrap();
    evict();
    std::fs::write(merged.join("dir/another"), "new").unwrap();
    evict();
    assert_eq!(world.lookup(ROOT, "dir").unwrap().node, dir.node);
    assert_eq!(world.attr(inner.node, None).unwrap().ino, inner.attr.ino);

    // Made anew by the guest, under the old name and (as ext4 does it) the old number.
    let mut reused = 0;
    for round in 0..20 {
        let name = format!("made-{round}");
        std::fs::write(merged.join(&name), "old").unwrap();
        let old = world.lookup(ROOT, &name).unwrap();
        evict();
        std::fs::remove_file(merged.join(&name)).unwrap();
        std::fs::write(merged.join(&name), "new").unwrap();
        assert!(world.stale(old.node));
        let new = world.lookup(ROOT, &name).unwrap();
        reused += usize::from(new.attr.ino == old.attr.ino);
        assert_ne!(new.node, old.node);
        assert!(world.stale(old.node));
        // Forgetting the one does not touch the other.
        service.forget(&[(old.node, 1)]);
        assert_eq!(world.lookup(ROOT, &name).unwrap().node, new.node);
        world.call(FileRequest::Unlink { parent: ROOT, name: name.as_bytes() }).unwrap();
        assert_eq!(world.attr(new.node, None).unwrap().nlink, 0);
        service.forget(&[(new.node, 2)]);
    }
    if reused == 0 {
        println!("skipped: telling files of one number apart: this file system gave no number twice");
    }
}

fn run(path: &Path) {
    for dir in 0..DIRS {
        let dir = path.join(format!("d{dir}"));
        std::fs::create_dir(&dir).unwrap();
        let dir = open(&dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap();
        for file in 0..FILES {
            mknodat(&dir, format!("f{file}"), FileType::RegularFile, Mode::RUSR | Mode::WUSR, 0).unwrap();
        }
    }
    let root = open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap();
    let service = FileService::new(root).unwrap();
    let start = descriptors();
    let limit = getrlimit(Resource::Nofile).current.unwrap() as usize;
    let most = start + (limit / 2).min(8192) + 8;

    let mut world = World { service: &service, dirs: Vec::new(), files: Vec::new(), path };
    look_everything_up(&mut world);
    assert!(descriptors() <= most);
    world.check_all();
    assert!(descriptors() <= most);
    list_everything(&world);
    move_inside(&mut world);
    world.check_all();
    let by_handle = move_outside(&mut world);
    unlink_while_open(&mut world, by_handle);
    assert!(world.files.is_empty());
    let dirs: Vec<_> = world.dirs.iter().map(|dir| (dir.1, u64::MAX)).collect();
    service.forget(&dirs);
    assert_eq!(descriptors(), start, "everything was forgotten, so every descriptor is back");
    // Old numbers mean nothing; the directories are still there, as new nodes.
    for (name, node) in &world.dirs {
        assert!(world.stale(*node));
        let entry = world.lookup(ROOT, name).unwrap();
        assert!(world.dirs.iter().all(|dir| dir.1 != entry.node));
        service.forget(&[(entry.node, 1)]);
    }
    assert_eq!(descriptors(), start);
}

fn look_everything_up(world: &mut World<'_>) {
    for dir in 0..DIRS {
        let name = format!("d{dir}");
        let node = world.lookup(ROOT, &name).unwrap().node;
        world.dirs.push((name, node));
        for file in 0..FILES {
            let name = format!("f{file}");
            let entry = world.lookup(node, &name).unwrap();
            world.files.push(File { dir, name, node: entry.node, ino: entry.attr.ino });
        }
    }
    let nodes: HashSet<_> = world.files.iter().map(|file| file.node).collect();
    let inodes: HashSet<_> = world.files.iter().map(|file| file.ino).collect();
    assert_eq!((nodes.len(), inodes.len()), (DIRS * FILES, DIRS * FILES));
}

/// Listings with attributes give the same nodes, and one hold each, which is given back.
fn list_everything(world: &World<'_>) {
    let known: HashSet<_> = world.files.iter().map(|file| (file.node, file.ino)).collect();
    let mut seen = 0;
    for (_, node) in &world.dirs {
        let mut holds = Vec::new();
        let mut cookie = 0;
        let mut take = |page: DirPage, mut body: &[u8]| {
            for _ in 0..page.count {
                let (entry, rest): (DirEntry<'_>, _) = postcard::take_from_bytes(body).unwrap();
                (body, cookie) = (rest, entry.cookie);
                if let Some(entry) = entry.entry {
                    assert!(known.contains(&(entry.node, entry.attr.ino)));
                    holds.push((entry.node, 1));
                }
            }
            (page.end, cookie)
        };
        let (FileReply::OpenedDir(fh, page), body) =
            world.call(FileRequest::OpenDir { node: *node, max: 64 << 10, plus: true }).unwrap()
        else {
            panic!()
        };
        let (mut end, mut cookie) = take(page, &body);
        while !end {
            let request = FileRequest::ReadDir { fh, cookie, max: 64 << 10, plus: true };
            let (FileReply::Dir(page), body) = world.call(request).unwrap() else { panic!() };
            (end, cookie) = take(page, &body);
        }
        world.service.release_dir(fh);
        seen += holds.len();
        world.service.forget(&holds);
    }
    assert_eq!(seen, DIRS * FILES);
}

/// Through the service: files to other directories, whole directories, exchanges.
fn move_inside(world: &mut World<'_>) {
    for index in (0..world.files.len()).step_by(10) {
        let file = world.files[index].clone();
        let to = (file.dir + 1) % DIRS;
        let name = format!("moved-{index}");
        world.rename((world.dirs[file.dir].1, &file.name), (world.dirs[to].1, &name), 0);
        (world.files[index].dir, world.files[index].name) = (to, name);
    }
    for index in (0..DIRS).step_by(4) {
        let name = format!("renamed-{index}");
        world.rename((ROOT, &world.dirs[index].0), (ROOT, &name), 0);
        world.dirs[index].0 = name;
    }
    for index in (5..world.files.len() - 5000).step_by(5000) {
        let (one, two) = (world.files[index].clone(), world.files[index + 5000].clone());
        let of = |file: &File| world.dirs[file.dir].1;
        world.rename((of(&one), &one.name), (of(&two), &two.name), 2);
        (world.files[index].dir, world.files[index].name) = (two.dir, two.name);
        (world.files[index + 5000].dir, world.files[index + 5000].name) = (one.dir, one.name);
    }
}

/// By a process of the guest, of which the service hears nothing. Gives whether handles can be opened after all.
fn move_outside(world: &mut World<'_>) -> bool {
    const DIR: usize = 7;
    let (old, node) = world.dirs[DIR].clone();
    let inside: Vec<_> = world.files.iter().filter(|file| file.dir == DIR).cloned().collect();
    world.flush_cache(DIR);
    std::fs::rename(world.path.join(&old), world.path.join("moved-outside")).unwrap();
    world.flush_cache(DIR);
    let by_handle = !world.stale(inside[0].node);
    if by_handle {
        println!("skipped: ESTALE after a move in the guest: files can be opened by handle in this user namespace");
    } else {
        assert!(inside.iter().all(|file| world.stale(file.node)));
        // Another file under the old name is not taken for the one that was there.
        std::fs::create_dir(world.path.join(&old)).unwrap();
        std::fs::write(world.path.join(&old).join(&inside[0].name), "another").unwrap();
        assert!(world.stale(inside[0].node));
        std::fs::remove_dir_all(world.path.join(&old)).unwrap();
    }
    // The host's kernel looks the path up again, and all that is below is found, as what it was.
    let found = world.lookup(ROOT, "moved-outside").unwrap();
    assert_eq!(found.node, node);
    world.dirs[DIR].0 = "moved-outside".to_owned();
    for file in &inside {
        assert_eq!(world.attr(file.node, None).unwrap().ino, file.ino);
    }
    by_handle
}

/// Every file is opened, unlinked, used, closed and forgotten, 4,000 at a time.
fn unlink_while_open(world: &mut World<'_>, by_handle: bool) {
    let before = descriptors();
    while !world.files.is_empty() {
        let batch = world.files.split_off(world.files.len().saturating_sub(4000));
        let mut handles = Vec::new();
        for (i, file) in batch.iter().enumerate() {
            let request = FileRequest::Open { node: file.node, flags: O_RDWR, kill_suidgid: false };
            let FileReply::Opened(fh) = world.call(request).unwrap().0 else { panic!() };
            handles.push(fh);
            let (dir, dir_node) = &world.dirs[file.dir];
            if i % 100 == 99 {
                std::fs::remove_file(world.path.join(dir).join(&file.name)).unwrap();
            } else {
                world.call(FileRequest::Unlink { parent: *dir_node, name: file.name.as_bytes() }).unwrap();
            }
        }
        for (file, &fh) in batch.iter().zip(&handles) {
            let written =
                world.service.handle(&FileRequest::Write { fh, offset: 0, kill_suidgid: false }, b"data", &Never);
            assert_eq!(written.unwrap().0, FileReply::Count(4));
            for fh in [Some(fh), None] {
                let attr = world.attr(file.node, fh).unwrap();
                assert_eq!((attr.ino, attr.nlink, attr.size), (file.ino, 0, 4));
            }
        }
        for (i, (file, &fh)) in batch.iter().zip(&handles).enumerate() {
            world.service.release(fh, 0);
            if i % 100 == 99 {
                continue;
            }
            // Closed but not forgotten: someone may have it open by O_PATH, or mapped.
            assert_eq!(world.attr(file.node, None).unwrap().ino, file.ino);
        }
        if world.files.len() > DIRS * FILES - 10_000 && !by_handle {
            let lost = &batch[99];
            world.flush_cache(usize::MAX);
            assert!(world.stale(lost.node), "removed by the guest, and closed");
        }
        let holds: Vec<_> = batch.iter().map(|file| (file.node, 1)).collect();
        world.service.forget(&holds);
        assert!(batch.iter().all(|file| world.stale(file.node)));
        assert!(descriptors() <= before + 8192);
    }
}
