//! Nodes are files, not names: what happens when the guest moves them, when descriptors are evicted, when the host
//! lets go.

use super::*;
use std::collections::HashSet;
use std::process::Command;
use std::sync::atomic::Ordering;

#[test]
fn a_look_at_the_same_file_is_the_same_node() {
    let guest = Guest::new();
    let made = guest.file(ROOT, "file", b"");
    assert_eq!(guest.lookup(ROOT, "file").unwrap().node, made.node);
    // Held twice: once by create, once by lookup.
    guest.service.forget(&[(made.node, 1)]);
    assert!(guest.attr(made.node).is_ok());
    guest.service.forget(&[(made.node, 1)]);
    assert_eq!(errno(guest.attr(made.node)), Errno::STALE);
    let again = guest.lookup(ROOT, "file").unwrap();
    assert_eq!(again.attr.ino, made.attr.ino);
    guest.service.forget(&[(again.node, 99)]);
    assert_eq!(guest.service.table.held(), 0);
    assert_eq!(guest.service.table.living(), 1);
}

#[test]
fn a_new_file_under_an_old_name_is_a_new_node() {
    let guest = Guest::new();
    let mut nodes = HashSet::new();
    for _ in 0..50 {
        // ext4 uses the inode number again at once.
        let entry = guest.file(ROOT, "file", b"");
        assert!(nodes.insert(entry.node));
        guest.unlink(ROOT, "file").unwrap();
    }
    guest.evict();
    for node in &nodes {
        assert_eq!(guest.attr(*node).unwrap().nlink, 0);
    }
}

#[test]
fn moved_by_the_guest_without_handles() {
    let guest = Guest::without_handles(100);
    let dir = guest.mkdir(ROOT, "dir").unwrap();
    let file = guest.file(dir.node, "file", b"data");
    std::fs::rename(guest.path("dir"), guest.path("elsewhere")).unwrap();
    // Cached: the descriptor goes with the file.
    assert_eq!(guest.content(file.node), b"data");
    guest.evict();
    assert_eq!(errno(guest.attr(file.node)), Errno::STALE);
    assert_eq!(errno(guest.attr(dir.node)), Errno::STALE);
    assert_eq!(errno(guest.lookup(dir.node, "file")), Errno::STALE);
    // Another directory under the old name is not taken for it.
    std::fs::create_dir(guest.path("dir")).unwrap();
    std::fs::write(guest.path("dir/file"), "other").unwrap();
    assert_eq!(errno(guest.attr(file.node)), Errno::STALE);
    // As the host's kernel does upon ESTALE: look the path up again. All is found, as the same nodes.
    assert_eq!(guest.lookup(ROOT, "elsewhere").unwrap().node, dir.node);
    guest.evict();
    assert_eq!(guest.content(file.node), b"data");
    assert_ne!(guest.lookup(ROOT, "dir").unwrap().node, dir.node);
}

#[test]
fn moved_by_the_guest_and_found_by_handle() {
    let guest = Guest::new();
    let dir = guest.mkdir(ROOT, "dir").unwrap();
    let file = guest.file(dir.node, "file", b"data");
    std::fs::rename(guest.path("dir/file"), guest.path("moved")).unwrap();
    std::fs::rename(guest.path("dir"), guest.path("elsewhere")).unwrap();
    guest.evict();
    let found = guest.attr(dir.node);
    if !guest.service.dirs_by_handle.load(Ordering::Relaxed) {
        println!("skipped: files cannot be opened by handle here (CAP_DAC_READ_SEARCH)");
        return;
    }
    assert!(found.is_ok());
    assert_eq!(guest.content(file.node), b"data");
    assert!(guest.lookup(dir.node, "file").is_err());
    std::fs::remove_file(guest.path("moved")).unwrap();
    guest.evict();
    assert_eq!(errno(guest.attr(file.node)), Errno::STALE);
}

#[test]
fn open_and_unlinked() {
    let guest = Guest::without_handles(100);
    let (file, fh) = guest.create(ROOT, "file", O_RDWR).unwrap();
    guest.write(fh, 0, b"data").unwrap();
    guest.unlink(ROOT, "file").unwrap();
    guest.evict();
    assert_eq!(guest.attr(file.node).unwrap().nlink, 0);
    let second = guest.open(file.node, O_RDONLY).unwrap();
    assert_eq!(guest.read(second, 0, 10).unwrap(), b"data");
    let set = SetAttr { mode: Some(0o600), size: Some(2), ..SetAttr::default() };
    assert_eq!(guest.set(file.node, Some(fh), set).unwrap().size, 2);
    guest.service.release(fh, 0);
    guest.evict();
    assert_eq!(guest.attr(file.node).unwrap().size, 2);
    guest.service.release(second, 0);
    guest.evict();
    // Open for nobody, but still held.
    assert_eq!(guest.attr(file.node).unwrap().mode, 0o100600);
    guest.service.forget(&[(file.node, 1)]);
    assert_eq!(errno(guest.attr(file.node)), Errno::STALE);
    assert_eq!(guest.service.table.living(), 1);
}

#[test]
fn unlinked_by_the_guest_while_open() {
    let guest = Guest::without_handles(100);
    let (file, fh) = guest.create(ROOT, "file", O_RDWR).unwrap();
    std::fs::remove_file(guest.path("file")).unwrap();
    guest.evict();
    assert_eq!(guest.attr_of(FileRequest::GetAttr { node: file.node, fh: Some(fh) }).unwrap().nlink, 0);
    assert_eq!(guest.attr(file.node).unwrap().nlink, 0);
    guest.service.release(fh, 0);
    guest.evict();
    assert_eq!(errno(guest.attr(file.node)), Errno::STALE);
}

#[test]
fn deep_trees_are_resolved_and_dropped_without_recursion() {
    const DEPTH: usize = 3000;
    let guest = Guest::without_handles(10);
    let mut nodes = vec![ROOT];
    for _ in 0..DEPTH {
        let parent = *nodes.last().unwrap();
        nodes.push(guest.mkdir(parent, "d").unwrap().node);
    }
    guest.evict();
    let deepest = *nodes.last().unwrap();
    assert!(guest.attr(deepest).is_ok());
    // Parents are forgotten first; the child keeps them findable.
    let holds: Vec<_> = nodes[1..DEPTH].iter().map(|&node| (node, 1)).collect();
    guest.service.forget(&holds);
    guest.evict();
    assert_eq!(guest.service.table.held(), 1);
    assert!(guest.attr(deepest).is_ok());
    assert_eq!(guest.lookup(ROOT, "d").unwrap().node, nodes[1]);
    guest.service.forget(&[(nodes[1], 1)]);
    guest.service.forget(&[(deepest, 1)]);
    assert_eq!(guest.service.table.living(), 1);
}

#[test]
fn directories_that_swap_places_make_no_cycle() {
    let guest = Guest::without_handles(100);
    let a = guest.mkdir(ROOT, "a").unwrap();
    let b = guest.mkdir(a.node, "b").unwrap();
    // In the guest b goes up and a goes below it; the host sees the second only.
    std::fs::rename(guest.path("a/b"), guest.path("b")).unwrap();
    std::fs::rename(guest.path("a"), guest.path("b/a")).unwrap();
    assert_eq!(guest.lookup(b.node, "a").unwrap().node, a.node);
    guest.evict();
    assert_eq!(errno(guest.attr(a.node)), Errno::STALE);
    assert_eq!(errno(guest.attr(b.node)), Errno::STALE);
    assert_eq!(guest.lookup(ROOT, "b").unwrap().node, b.node);
    guest.evict();
    assert!(guest.attr(a.node).is_ok());
    guest.service.forget(&[(a.node, 9), (b.node, 9)]);
    assert_eq!(guest.service.table.living(), 1);
}

#[test]
fn the_cache_is_bounded_and_everything_is_closed_in_the_end() {
    // Alone in a process, where nobody else opens and closes.
    const ALONE: &str = "MACHINEFS_TEST_ALONE";
    if std::env::var_os(ALONE).is_none() {
        let mut alone = Command::new(std::env::current_exe().unwrap());
        alone.env(ALONE, "1").args(["--exact", "--test-threads=1"]);
        alone.arg(
            concat!(module_path!(), "::the_cache_is_bounded_and_everything_is_closed_in_the_end")
                .split_once("::")
                .unwrap()
                .1,
        );
        let output = alone.output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains("1 passed"), "{text}");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for i in 0..500 {
        std::fs::write(dir.path().join(format!("f{i}")), "x").unwrap();
    }
    let before = descriptors();
    let service = FileService::with_limits(open_root(dir.path()), 50, 20).unwrap();
    let guest = Guest { service, dir };
    let start = descriptors();
    let mut nodes = Vec::new();
    for i in 0..500 {
        nodes.push(guest.lookup(ROOT, format!("f{i}")).unwrap().node);
        assert!(descriptors() <= start + 50);
    }
    for &node in &nodes {
        assert_eq!(guest.attr(node).unwrap().size, 1);
        assert!(descriptors() <= start + 50);
    }
    let mut handles = Vec::new();
    for &node in &nodes[..20] {
        handles.push(guest.open(node, O_RDONLY).unwrap());
    }
    assert_eq!(errno(guest.open(nodes[30], O_RDONLY)), Errno::MFILE);
    assert_eq!(errno(guest.create(ROOT, "new", O_RDWR)), Errno::MFILE);
    assert!(!guest.path("new").exists());
    guest.service.release(handles.pop().unwrap(), 0);
    handles.push(guest.open(nodes[30], O_RDONLY).unwrap());
    for fh in handles {
        guest.service.release(fh, 0);
    }
    guest.service.forget(&nodes.iter().map(|&node| (node, 1)).collect::<Vec<_>>());
    assert_eq!(descriptors(), start);
    guest.lookup(ROOT, "f1").unwrap();
    let (_, _fh) = guest.create(ROOT, "new", O_RDWR).unwrap();
    guest.service.reset();
    assert_eq!(descriptors(), start);
    assert_eq!(guest.service.table.living(), 1);
    drop(guest);
    assert_eq!(descriptors(), before);
}

#[test]
fn after_a_reset_old_numbers_mean_nothing() {
    let guest = Guest::new();
    let (file, fh) = guest.create(ROOT, "file", O_RDWR).unwrap();
    guest.service.reset();
    assert_eq!(errno(guest.attr(file.node)), Errno::STALE);
    assert_eq!(errno(guest.read(fh, 0, 1)), Errno::BADF);
    let again = guest.lookup(ROOT, "file").unwrap();
    assert_ne!(again.node, file.node);
    assert_ne!(guest.open(again.node, O_RDONLY).unwrap(), fh);
}

/// The guest's own mounts are walked into, and what the kernel makes up there is read to its end.
#[test]
fn proc_and_sys_and_dev() {
    let dir = tempfile::tempdir().unwrap();
    let guest = Guest { service: FileService::new(open_root(Path::new("/"))).unwrap(), dir };
    let proc = guest.lookup(ROOT, "proc").unwrap();
    assert_ne!(proc.attr.ino >> 32, 0, "another device than the root's");
    let version = guest.lookup(proc.node, "version").unwrap();
    assert_eq!(version.attr.size, 0);
    assert_eq!(guest.content(version.node), std::fs::read("/proc/version").unwrap());
    // More than a page, which procfs gives in pieces.
    let kallsyms = guest.lookup(proc.node, "kallsyms").unwrap();
    assert_eq!(guest.content(kallsyms.node).len(), 1 << 20);
    let sys = guest.lookup(proc.node, "sys").unwrap();
    let kernel = guest.lookup(sys.node, "kernel").unwrap();
    guest.evict();
    guest.service.trim();
    let host = guest.lookup(kernel.node, "ostype").unwrap();
    assert_eq!(guest.content(host.node), b"Linux\n");
    // Magic links are links like any other.
    let own = guest.lookup(proc.node, "1").unwrap();
    let root = guest.lookup(own.node, "root").unwrap();
    assert_eq!(errno(guest.lookup(root.node, "etc")), Errno::NOTDIR);
    assert_eq!(errno(guest.open(root.node, O_RDONLY)), Errno::LOOP);
    let dev = guest.lookup(ROOT, "dev").unwrap();
    let zero = guest.lookup(dev.node, "zero").unwrap();
    assert_eq!(errno(guest.open(zero.node, O_RDONLY)), Errno::ACCESS);
    let sysfs = guest.lookup(ROOT, "sys").unwrap();
    let fs = guest.lookup(sysfs.node, "fs").unwrap();
    assert_eq!(guest.lookup(sysfs.node, "fs").unwrap().node, fs.node);
    guest.service.reset();
    assert_eq!(guest.service.table.living(), 1);
}

/// Many threads on the same few names, so that the table's races are run.
#[test]
fn many_threads() {
    let guest = Guest::without_handles(8);
    let dirs: Vec<_> = (0..4).map(|i| guest.mkdir(ROOT, format!("d{i}")).unwrap().node).collect();
    std::thread::scope(|scope| {
        for thread in 0..6u64 {
            let (guest, dirs) = (&guest, &dirs);
            scope.spawn(move || {
                let mut random = thread * 7919 + 1;
                for round in 0..800u64 {
                    random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    let pick = |shift: u32, of: u64| (random >> shift) % of;
                    let (dir, other) = (dirs[pick(20, 4) as usize], dirs[pick(24, 4) as usize]);
                    let name = format!("f{}", pick(28, 3));
                    let expected = [Errno::NOENT, Errno::STALE, Errno::EXIST];
                    let check = |result: Result<(), FileError>| {
                        if let Err(error) = result {
                            assert!(expected.contains(&error.0), "{error:?} {round}");
                        }
                    };
                    match pick(33, 5) {
                        0 => check(guest.create(dir, &name, O_RDWR).map(|(entry, fh)| {
                            guest.service.release(fh, 0);
                            guest.service.forget(&[(entry.node, 1)]);
                        })),
                        1 => check(guest.unlink(dir, &name)),
                        2 => check(guest.rename((dir, &name), (other, &name), 0)),
                        _ => check(guest.lookup(dir, &name).and_then(|entry| {
                            let attr = guest.attr(entry.node);
                            guest.service.forget(&[(entry.node, 1)]);
                            attr.map(|attr| assert_eq!(attr.ino, entry.attr.ino))
                        })),
                    }
                }
            });
        }
    });
    assert_eq!(guest.service.table.held(), 4);
    guest.service.reset();
    assert_eq!(guest.service.table.living(), 1);
}
