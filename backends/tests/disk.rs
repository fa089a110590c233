//! What is mounted in machines, how their disks differ from their images, and how much they may hold; as root.

#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use machinefs_backends::container::canonical_source;
use machinefs_backends::volumes::Volumes;
use machinefs_backends::{Backend, BackendError, ChangeKind, MachineSpec, MountMode, MountSource, MountSpec, Owner};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use support::{Rig, leftovers};

/// A user of the host who need not be in its database.
const USER: u32 = 54321;

fn user() -> Owner {
    Owner { uid: USER, gid: USER, guest_uid: 0, guest_gid: 0 }
}

fn host(source: &Path, target: &str, mode: MountMode) -> MountSpec {
    MountSpec { source: MountSource::Host(source.into()), target: target.into(), mode }
}

fn errno(error: &BackendError) -> Option<i32> {
    match error {
        BackendError::Io { source, .. } => source.raw_os_error(),
        _ => None,
    }
}

/// A directory of that user's, with a file.
fn directory(rig: &Rig, name: &str) -> PathBuf {
    fs::set_permissions(rig.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let dir = rig.dir.path().join(name);
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("file"), "host\n").unwrap();
    for path in [dir.clone(), dir.join("file")] {
        chown(path, Some(USER), Some(USER)).unwrap();
    }
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o700)).unwrap();
    dir.canonicalize().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn mounts_are_live_in_both_directions() {
    need!(root);
    let rig = Rig::new();
    let source = directory(&rig, "src");
    let mut spec = MachineSpec { owner: user(), ..rig.spec("host") };
    spec.mounts = vec![host(&source, "/work/src", MountMode::Rw)];
    let running = rig.boot(&spec).await;
    assert_eq!(running.warnings, []);
    assert_eq!(
        rig.ok(&spec, "cat /work/src/file; stat -c %u:%g /work/src /work/src/file /work").await,
        "host\n0:0\n0:0\n0:0\n"
    );
    rig.ok(&spec, "echo guest > /work/src/new; mkdir /work/src/dir; chmod 4755 /work/src/new").await;
    let meta = fs::metadata(source.join("new")).unwrap();
    assert_eq!(
        (meta.uid(), meta.gid(), fs::read_to_string(source.join("new")).unwrap()),
        (USER, USER, "guest\n".into())
    );
    fs::write(source.join("dir/late"), "later\n").unwrap();
    assert_eq!(rig.ok(&spec, "cat /work/src/dir/late").await, "later\n");
    let options = rig.ok(&spec, "awk '$5 == \"/work/src\" {print $6}' /proc/self/mountinfo").await;
    assert!(options.contains("nosuid") && options.contains("nodev"), "{options}");

    // Somebody else's file in it is nobody's, and closed.
    fs::write(source.join("secret"), "root's").unwrap();
    fs::set_permissions(source.join("secret"), fs::Permissions::from_mode(0o600)).unwrap();
    assert_ne!(rig.run(&spec, "cat /work/src/secret").await.1, 0);
    assert_eq!(rig.ok(&spec, "stat -c %u /work/src/secret").await, "65534\n");

    // Beside it, in a machine that runs.
    let error = rig.backend.attach_mount(&spec, &spec.mounts[0]).await.unwrap_err();
    assert_eq!(errno(&error), Some(libc::EEXIST), "{error}");
    rig.backend.attach_mount(&spec, &host(&source, "/mnt/ro", MountMode::Ro)).await.unwrap();
    assert_eq!(rig.ok(&spec, "cat /mnt/ro/file").await, "host\n");
    assert!(rig.run(&spec, "touch /mnt/ro/x").await.0.contains("Read-only"));
    rig.backend.attach_mount(&spec, &host(&source, "/mnt/cow", MountMode::Cow)).await.unwrap();
    rig.ok(&spec, "cd /mnt/cow && rm file && echo mine > new && echo x > added").await;
    assert_eq!(rig.ok(&spec, "cat /mnt/cow/new; ls -A /mnt/cow").await, "mine\nadded\ndir\nnew\nsecret\n");
    assert_ne!(rig.run(&spec, "cat /mnt/cow/secret").await.1, 0, "a copy gives no more than the original");
    assert!(source.join("file").exists() && !source.join("added").exists());

    // A mount in use stays; its directory may have been renamed.
    let mut busy = rig.backend.connect(&spec).await.unwrap();
    std::io::Write::write_all(&mut busy, b"cd /mnt/ro && touch /tmp/in && sleep 1000\0").unwrap();
    support::eventually("a process in it", || support::futures_block(rig.run(&spec, "test -e /tmp/in")).1 == 0);
    let error = rig.backend.detach_mount(&spec, Path::new("/mnt/ro")).await.unwrap_err();
    assert_eq!(errno(&error), Some(libc::EBUSY), "{error}");
    rig.ok(&spec, "mv /work /moved && ln -s /usr /work").await;
    rig.backend.detach_mount(&spec, Path::new("/work/src")).await.unwrap();
    assert_eq!(
        rig.ok(&spec, "ls -A /moved/src; ls /usr | wc -l").await.lines().next(),
        rig.ok(&spec, "ls /usr | wc -l").await.lines().next()
    );
    rig.backend.detach_mount(&spec, Path::new("/work/src")).await.unwrap();
    rig.backend.detach_mount(&spec, Path::new("/usr")).await.unwrap();
    rig.ok(&spec, "ls /usr/bin/env").await;

    // What was copied on write is there at the next start; and a new daemon knows what is mounted.
    rig.backend.detach_mount(&spec, Path::new("/mnt/cow")).await.unwrap();
    assert_eq!(rig.ok(&spec, "ls -A /mnt/cow").await, "");
    rig.backend.attach_mount(&spec, &host(&source, "/mnt/cow", MountMode::Cow)).await.unwrap();
    assert_eq!(rig.ok(&spec, "cat /mnt/cow/new; test -e /mnt/cow/file || echo gone").await, "mine\ngone\n");
    rig.reopened().detach_mount(&spec, Path::new("/mnt/cow")).await.unwrap();
    rig.backend.kill(&spec).await.unwrap();
    // `/work` is a link of the machine's own now, and its mounts follow it: to the machine's /usr.
    rig.backend.start(&spec).await.unwrap();
    assert_eq!(rig.ok(&spec, "cat /usr/src/file").await, "host\n");
    assert!(!Path::new("/usr/src/file").exists());
    rig.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mount_gives_what_its_owner_has_and_leads_nowhere_else() {
    need!(root);
    let rig = Rig::new();
    let source = directory(&rig, "src");
    let spec = MachineSpec { owner: user(), ..rig.spec("host") };
    rig.boot(&spec).await;
    let closed = rig.dir.path().join("closed");
    fs::create_dir_all(closed.join("inside")).unwrap();
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o700)).unwrap();
    let readable = rig.dir.path().join("readable");
    fs::create_dir(&readable).unwrap();
    symlink(&closed, source.join("link")).unwrap();
    let cases = [
        (host(&closed, "/mnt/a", MountMode::Ro), libc::EACCES),
        (host(&closed.join("inside"), "/mnt/a", MountMode::Ro), libc::EACCES),
        (host(&readable, "/mnt/a", MountMode::Rw), libc::EACCES),
        (host(&source.join("link"), "/mnt/a", MountMode::Ro), libc::ELOOP),
        (host(&source.join("link/inside"), "/mnt/a", MountMode::Ro), libc::ELOOP),
        (host(&source.join("file"), "/mnt/a", MountMode::Ro), libc::ENOTDIR),
        (host(&source.join("absent"), "/mnt/a", MountMode::Ro), libc::ENOENT),
    ];
    for (mount, wanted) in &cases {
        let error = rig.backend.attach_mount(&spec, mount).await.unwrap_err();
        assert_eq!(errno(&error), Some(*wanted), "{mount:?}: {error}");
    }
    for (source, target) in
        [("relative", "/mnt/a"), ("/tmp/../etc", "/mnt/a"), ("/tmp", "/"), ("/tmp", "/proc/1"), ("/tmp", "/a/..")]
    {
        let error = rig.backend.attach_mount(&spec, &host(Path::new(source), target, MountMode::Ro)).await.unwrap_err();
        assert!(error.to_string().contains("mount") || error.to_string().contains("path"), "{error}");
    }
    rig.backend.attach_mount(&spec, &host(&readable, "/mnt/a", MountMode::Ro)).await.unwrap();
    // Links in the machine lead within the machine, and not to the kernel's files.
    rig.ok(&spec, "ln -s /root/deep /mnt/link; ln -s /proc/sys /mnt/kernel; ln -s ../../../../../../tmp /mnt/up; mkdir /root/deep").await;
    for target in ["/mnt/link/x/y", "/mnt/up/z"] {
        rig.backend.attach_mount(&spec, &host(&source, target, MountMode::Ro)).await.unwrap();
    }
    assert_eq!(rig.ok(&spec, "cat /root/deep/x/y/file /tmp/z/file; stat -c %u /root/deep/x").await, "host\nhost\n0\n");
    assert!(!Path::new("/tmp/z").exists() && !Path::new("/root/deep").exists());
    let error = rig.backend.attach_mount(&spec, &host(&source, "/mnt/kernel/x", MountMode::Ro)).await.unwrap_err();
    assert_eq!(errno(&error), Some(libc::EINVAL), "{error}");

    assert_eq!(canonical_source(&user(), &source.join("../src")).unwrap(), source);
    let error = canonical_source(&user(), &source.join("link/inside")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EACCES));
    assert_eq!(canonical_source(&user(), &source.join("file")).unwrap_err().raw_os_error(), Some(libc::ENOTDIR));
    rig.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn volumes_outlive_machines_and_are_their_owners() {
    need!(root);
    let rig = Rig::new();
    let volumes = Volumes::new(&rig.dir.path().join("state"));
    volumes.create("cache", USER, USER).unwrap();
    let volume = |target: &str| MountSpec {
        source: MountSource::Volume("cache".into()),
        target: target.into(),
        mode: MountMode::Rw,
    };
    let (one, two, other) = (rig.spec("host"), rig.spec("host"), rig.spec("host"));
    let one = MachineSpec { owner: user(), mounts: vec![volume("/cache")], ..one };
    let two = MachineSpec { owner: user(), mounts: vec![volume("/cache")], ..two };
    rig.boot(&one).await;
    rig.ok(&one, "echo kept > /cache/file; touch /cache/daemons; chown daemon:daemon /cache/daemons").await;
    rig.boot(&two).await;
    assert_eq!(rig.ok(&two, "cat /cache/file; stat -c %U /cache/daemons").await, "kept\ndaemon\n");
    rig.backend.destroy(&one).await.unwrap();
    rig.ok(&two, "cat /cache/file").await;
    let other = MachineSpec { owner: Owner { uid: USER + 1, gid: USER + 1, ..Owner::default() }, ..other };
    rig.boot(&other).await;
    let error = rig.backend.attach_mount(&other, &volume("/cache")).await.unwrap_err();
    assert!(
        matches!(&error, BackendError::Io { source, .. } if source.kind() == std::io::ErrorKind::PermissionDenied),
        "{error}"
    );
    rig.backend.destroy(&two).await.unwrap();
    volumes.remove("cache").unwrap();
    rig.finish().await;
}

async fn changes(rig: &Rig, spec: &MachineSpec) -> Vec<String> {
    let found = Arc::new(Mutex::new(Vec::new()));
    let all = Arc::clone(&found);
    let sink = Box::new(move |change: machinefs_backends::Change| {
        let from = change.moved_from.map(|f| format!(" from {}", String::from_utf8_lossy(&f))).unwrap_or_default();
        all.lock().unwrap().push(format!("{} {}{from}", change.kind.letter(), String::from_utf8_lossy(&change.path)));
        true
    });
    assert_eq!(rig.backend.changes(spec, sink).await.unwrap(), 0);
    std::mem::take(&mut *found.lock().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_are_told_against_the_image() {
    need!(root);
    let rig = Rig::new();
    let image = rig.dir.path().join("image");
    for dir in ["bin", "etc", "keep/sub", "gone", "fresh/inner", "replaced", "chmodded"] {
        fs::create_dir_all(image.join(dir)).unwrap();
    }
    for file in [
        "keep/a",
        "keep/a.txt",
        "keep/sub/x",
        "gone/1",
        "fresh/old",
        "fresh/both",
        "fresh/inner/z",
        "replaced/f",
        "plain",
    ] {
        fs::write(image.join(file), "image").unwrap();
    }
    let Some(busybox) = ["/bin/busybox", "/usr/bin/busybox"].into_iter().find(|p| Path::new(p).exists()) else {
        println!("skipped: busybox is not installed");
        return;
    };
    // With the libraries it wants, if it is not static.
    let wanted = std::process::Command::new("ldd").arg(busybox).output().unwrap();
    let wanted = String::from_utf8_lossy(&wanted.stdout).into_owned();
    for library in wanted.split_whitespace().filter(|word| word.starts_with('/')) {
        let to = image.join(&library[1..]);
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(library, to).unwrap();
    }
    fs::copy(busybox, image.join("bin/busybox")).unwrap();
    symlink("busybox", image.join("bin/sh")).unwrap();
    for spec in
        [rig.spec(image.to_str().unwrap()), MachineSpec { disk: Some(64 << 20), ..rig.spec(image.to_str().unwrap()) }]
    {
        rig.boot(&spec).await;
        let made = |l: &String| !["/dev", "/proc", "/sys", "/run"].iter().any(|p| l[2..].starts_with(p));
        let fresh: Vec<_> = changes(&rig, &spec).await.into_iter().filter(made).collect();
        assert_eq!(fresh, Vec::<String>::new(), "a fresh machine has no changes");
        rig.ok(
            &spec,
            "cd /; b=/bin/busybox; echo new > keep/sub/x; echo n > keep/sub/new; $b rm keep/a; $b rm -r gone; \
            $b rm -r fresh; $b mkdir -p fresh/inner; echo n > fresh/both; echo n > fresh/added; \
            $b rm -r replaced; echo file > replaced; $b chmod 700 chmodded; $b touch plain; \
            $b mkdir -p a/b; echo > a/b/c; echo > a.txt; $b ln -s x link; echo > $($b printf 'odd\\nname')",
        )
        .await;
        let wanted = "A /a, A /a/b, A /a/b/c, A /a.txt, M /chmodded, A /fresh/added, M /fresh/both, D /fresh/inner/z, D /fresh/old, \
            D /gone, D /keep/a, A /keep/sub/new, M /keep/sub/x, A /link, A /odd\nname, M /plain, M /replaced";
        let found: Vec<_> = changes(&rig, &spec).await.into_iter().filter(made).collect();
        assert_eq!(found.join(", "), wanted);
        rig.backend.kill(&spec).await.unwrap();
        let found: Vec<_> = changes(&rig, &spec).await.into_iter().filter(made).collect();
        assert_eq!(found.join(", "), wanted, "of a stopped machine");
    }
    // `host`: trees within the root are told in their places; and a sink that has enough is not asked again.
    let spec = rig.spec("host");
    rig.boot(&spec).await;
    rig.ok(&spec, "echo > /usr/local/added; rm /usr/bin/perl; echo > /zzz; echo > /aaa; python3 -B -c \"import os\nfor i in range(300): os.mkdir('d'); os.chdir('d')\"").await;
    let all = changes(&rig, &spec).await;
    let named: Vec<_> = all.iter().filter(|l| ["/aaa", "/usr", "/zzz"].iter().any(|p| l[2..].starts_with(p))).collect();
    assert_eq!(named, ["A /aaa", "D /usr/bin/perl", "A /usr/local/added", "A /zzz"]);
    assert!(all.iter().any(|l| l.ends_with(&"/d".repeat(300))));
    let mut count = 0;
    let counted = Arc::new(Mutex::new(0));
    let counter = Arc::clone(&counted);
    let sink = Box::new(move |change: machinefs_backends::Change| {
        count += 1;
        *counter.lock().unwrap() = count;
        assert!(change.kind <= ChangeKind::Deleted);
        count < 3
    });
    rig.backend.changes(&spec, sink).await.unwrap();
    assert_eq!(*counted.lock().unwrap(), 3);
    rig.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_holds_what_it_may_and_no_more() {
    need!(root);
    let rig = Rig::new();
    let mut spec = MachineSpec { disk: Some(48 << 20), ..rig.spec("host") };
    if !rig.backend.capabilities(&spec).disk_limit {
        println!("skipped: no loop devices or no mkfs.ext4");
        return;
    }
    let running = rig.boot(&spec).await;
    assert_eq!(running.warnings, []);
    assert!(running.facts.iter().any(|(k, v)| k == "disk_limit" && v == "50331648"));
    let (output, code) = rig.run(&spec, "dd if=/dev/zero of=/root/big bs=1M count=100 2>&1").await;
    assert!(code != 0 && output.contains("No space"), "{output}");
    let (output, code) = rig.run(&spec, "dd if=/dev/zero of=/usr/big bs=1M count=10 2>&1").await;
    assert!(code != 0 && output.contains("No space"), "all trees share it: {output}");
    let source = directory(&rig, "src");
    let cow = MountSpec { mode: MountMode::Cow, ..host(&source, "/mnt/cow", MountMode::Cow) };
    spec.owner = user();
    rig.ok(&spec, "rm /root/big; rm -f /usr/big; echo kept > /root/kept").await;
    rig.backend.attach_mount(&spec, &cow).await.unwrap();
    let (output, _) = rig.run(&spec, "dd if=/dev/zero of=/mnt/cow/big bs=1M count=100 2>&1; rm /mnt/cow/big").await;
    assert!(output.contains("No space"), "a copy-on-write mount is on it too: {output}");
    assert!(fs::metadata(spec.dir.join("disk.img")).unwrap().blocks() * 512 <= 50 << 20);
    rig.backend.kill(&spec).await.unwrap();
    assert!(
        !leftovers(&spec).iter().any(|l| l.starts_with("loop") || l.starts_with("mount")),
        "{:?}",
        leftovers(&spec)
    );
    // It may grow, and not shrink; a crash loses nothing of it.
    spec.disk = Some(96 << 20);
    let running = rig.backend.start(&spec).await.unwrap();
    assert_eq!(running.warnings, []);
    rig.ok(&spec, "cat /root/kept; dd if=/dev/zero of=/root/big bs=1M count=60 2>&1").await;
    rig.backend.kill(&spec).await.unwrap();
    spec.disk = Some(32 << 20);
    let running = rig.backend.start(&spec).await.unwrap();
    assert!(running.warnings[0].0.contains("cannot shrink"), "{:?}", running.warnings);
    // A machine that was made without one is told of it.
    let mut bare = rig.spec("host");
    rig.boot(&bare).await;
    rig.backend.kill(&bare).await.unwrap();
    bare.disk = Some(64 << 20);
    let running = rig.backend.start(&bare).await.unwrap();
    assert!(running.warnings[0].0.contains("disk=67108864 does not hold"), "{:?}", running.warnings);
    rig.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "the daemon that dies in killed_in_any_step_with_a_disk_and_mounts"]
async fn victim() {
    support::victim().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_in_any_step_with_a_disk_and_mounts() {
    need!(root);
    let rig = Rig::new();
    let source = directory(&rig, "src");
    support::kill_victims(&rig, 24, |spec| {
        spec.disk = Some(32 << 20);
        spec.owner = user();
        spec.mounts = vec![host(&source, "/mnt/cow", MountMode::Cow), host(&source, "/mnt/rw", MountMode::Rw)];
    })
    .await;
    rig.finish().await;
}
