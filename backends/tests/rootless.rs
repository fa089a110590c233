//! The same as an ordinary user, without any privilege but newuidmap's and newgidmap's.

#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "support/outside.rs"]
mod outside;
mod support;

use machinefs_backends::{Adopted, Backend, MachineSpec, MountMode, MountSource, MountSpec, Network};
use outside::Outside;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;
use std::process::Command;
use support::{Rig, futures_block};

const USER: &str = "mfsbackend";

fn output(program: &str, args: &[&str]) -> (bool, String) {
    let output = Command::new(program).args(args).output();
    output
        .map_or((false, String::new()), |o| (o.status.success(), String::from_utf8_lossy(&o.stdout).trim().to_owned()))
}

/// The user that the tests are run as, made when it is not there, and then removed.
struct User {
    uid: u32,
    gid: u32,
    is_made: bool,
}

impl User {
    fn new() -> Option<Self> {
        let is_made = !output("id", &["-u", USER]).0 && output("useradd", &["-m", USER]).0;
        let subuid = fs::read_to_string("/etc/subuid").unwrap_or_default();
        if !subuid.lines().any(|l| l.starts_with(&format!("{USER}:"))) {
            output("usermod", &["--add-subuids", "200000-265535", "--add-subgids", "200000-265535", USER]);
        }
        let number = |flag| output("id", &[flag, USER]).1.parse().ok();
        Some(Self { uid: number("-u")?, gid: number("-g")?, is_made })
    }
}

impl Drop for User {
    fn drop(&mut self) {
        if self.is_made {
            output("userdel", &["-r", USER]);
        }
    }
}

#[test]
fn as_an_ordinary_user() {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: run it as root, which makes the user; or run the ignored tests as a user");
        return;
    }
    need!();
    if ["newuidmap", "setpriv"].into_iter().any(|p| !output("sh", &["-c", &format!("command -v {p}")]).0) {
        println!("skipped: newuidmap (uidmap) or setpriv (util-linux) is not installed");
        return;
    }
    let Some(user) = User::new() else {
        println!("skipped: the user {USER} cannot be made");
        return;
    };
    let (uid, gid) = (user.uid, user.gid);
    let dir = tempfile::Builder::new().prefix("mfs-user-").tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700)).unwrap();
    let test = dir.path().join("test");
    fs::copy(std::env::current_exe().unwrap(), &test).unwrap();
    let standin = dir.path().join("standin");
    support::build_agent(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/agent.c"), &standin);
    for path in [dir.path(), &test, &standin] {
        chown(path, Some(uid), Some(gid)).unwrap();
    }
    // In a network of its own, so that nothing of this host's is touched.
    let world = Outside::missing().is_none().then(Outside::new);
    let mut command = world.as_ref().map_or_else(|| Command::new("setpriv"), |world| world.on_host("setpriv"));
    if let Some(world) = &world {
        command.env("MFS_TEST_NEIGHBOUR", world.neighbour());
    }
    let status = command
        .args([&format!("--reuid={uid}"), &format!("--regid={gid}"), "--init-groups"])
        .arg(&test)
        .args(["--ignored", "--test-threads=1", "--nocapture"])
        .env("HOME", dir.path())
        .env("TMPDIR", dir.path())
        .env("MACHINEFS_TEST_STANDIN", &standin)
        .current_dir(dir.path())
        .status()
        .unwrap();
    assert!(status.success());
    let left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "only the two programs are left: {left:?}");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "run by as_an_ordinary_user"]
async fn machine_of_a_user() {
    if rustix::process::geteuid().is_root() {
        return;
    }
    let rig = Rig::new();
    for finding in rig.backend.check().await {
        println!("{finding:?}");
        assert_ne!(finding.level, machinefs_backends::Level::Missing, "{finding:?}");
    }
    let mut spec = rig.spec("host");
    spec.memory = Some(64 << 20);
    let running = rig.boot(&spec).await;
    println!("{:?} {:?}", running.warnings, running.facts);
    assert!(running.warnings.iter().any(|w| w.0.contains("memory=")), "what does not hold is said");
    assert_eq!(rig.ok(&spec, "id -u; hostname; cat /etc/hostname").await, "0\ntesthost\ntesthost\n");
    for kind in ["user", "pid", "mnt", "net", "ipc", "uts", "cgroup"] {
        let ours = fs::read_link(format!("/proc/self/ns/{kind}")).unwrap();
        let theirs = fs::read_link(format!("/proc/{}/ns/{kind}", running.pid)).unwrap();
        assert_ne!(ours, theirs, "{kind}");
    }
    let status = rig.ok(&spec, "cat /proc/self/status").await;
    assert!(status.contains("Seccomp:\t2"), "{status}");
    // Tools, and what root in the machine may do with the host's files.
    for tool in [
        "gcc --version",
        "git --version",
        "python3 -c 'print(1)'",
        "dpkg -l",
        "su daemon -s /bin/sh -c id || true",
        "printf 'int main(){return 0;}' > /tmp/a.c && gcc -o /tmp/a /tmp/a.c && /tmp/a",
        "echo x > /usr/local/bin/added && rm /usr/local/bin/added",
        "mkdir /usr/share/new && touch /usr/share/new/x",
        "rm /usr/share/common-licenses/BSD && echo mine > /usr/share/common-licenses/BSD",
        "rm -r /usr/share/doc",
        "cp --remove-destination /usr/bin/env /usr/bin/perl",
        "touch /tmp/f && chown daemon:mail /tmp/f && test $(stat -c %U:%G /tmp/f) = daemon:mail",
        "echo x >> /etc/motd",
        "ls /dev/pts /dev/shm",
    ] {
        rig.ok(&spec, tool).await;
    }
    let package = "set -e; mkdir -p /tmp/p/DEBIAN /tmp/p/usr/bin; cd /tmp; \
        printf 'Package: mfs-test\\nVersion: 1\\nArchitecture: all\\nMaintainer: t <t@example.org>\\nDescription: test\\n' > p/DEBIAN/control; \
        printf '#!/bin/sh\\necho installed\\n' > p/usr/bin/mfs-test; chmod 755 p/usr/bin/mfs-test; \
        dpkg-deb --build p p.deb >/dev/null; dpkg -i p.deb >/dev/null; mfs-test; dpkg -r mfs-test >/dev/null";
    assert_eq!(rig.ok(&spec, package).await, "installed\n");
    // Processor time is counted in ticks here, and for what lives or was waited for.
    let mut busy = rig.backend.connect(&spec).await.unwrap();
    busy.write_all(b"while :; do :; done\0").unwrap();
    let usage = || futures_block(rig.backend.usage(&spec)).unwrap();
    support::eventually("some use of a processor", || usage().cpu_micros > 0);
    let usage = usage();
    assert!(usage.memory > 0 && usage.pids >= 2, "{usage:?}");
    drop(busy);
    // Nothing private of the host.
    let closed = "find /usr /opt /var/lib/dpkg -xdev ! -type l \\( ! -perm -004 -o -type d ! -perm -005 \\) | head";
    let closed = rig.ok(&spec, closed).await;
    assert!(closed.lines().all(|l| l.starts_with("/var/lib/dpkg/")), "{closed}");
    assert_eq!(rig.ok(&spec, "ls -A /root /home").await, "/home:\n\n/root:\n");

    let fresh = rig.reopened();
    assert!(matches!(fresh.adopt(&spec).await.unwrap(), Adopted::Running(r) if r.pid == running.pid));
    rig.backend.kill(&spec).await.unwrap();
    rig.backend.start(&spec).await.unwrap();
    rig.ok(&spec, "test -e /usr/share/new/x && test $(stat -c %U /tmp/f) = daemon").await;

    // A directory of the user's own, and a tar.
    let image = rig.dir.path().join("image");
    fs::create_dir(&image).unwrap();
    fs::write(image.join("word"), "mine").unwrap();
    let archive = rig.dir.path().join("image.tar");
    assert!(output("tar", &["-C", image.to_str().unwrap(), "-cf", archive.to_str().unwrap(), "."]).0);
    for path in [&image, &archive] {
        let spec = rig.spec(path.to_str().unwrap());
        rig.boot(&spec).await;
        assert_eq!(rig.ok(&spec, "@read /word").await, "mine");
        rig.ok(&spec, "@write /word changed").await;
        assert_eq!(rig.ok(&spec, "@read /word").await, "changed");
    }
    assert_eq!(fs::read_to_string(image.join("word")).unwrap(), "mine");
    assert_eq!(fs::metadata(&image).unwrap().uid(), rustix::process::geteuid().as_raw());

    // The daemon dies before it wrote down what it started.
    let spec = rig.spec("host");
    let running = rig.boot(&spec).await;
    fs::remove_file(spec.dir.join("run.json")).unwrap();
    rig.reopened().destroy(&spec).await.unwrap();
    support::eventually("its end", || {
        let status = fs::read_to_string(format!("/proc/{}/status", running.pid)).unwrap_or_default();
        status.is_empty() || status.contains("State:\tZ")
    });
    rig.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "run by as_an_ordinary_user"]
async fn mounts_and_changes_of_a_user() {
    if rustix::process::geteuid().is_root() {
        return;
    }
    let rig = Rig::new();
    let source = rig.dir.path().canonicalize().unwrap().join("source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("file"), "host").unwrap();
    let mount =
        |target: &str, mode| MountSpec { source: MountSource::Host(source.clone()), target: target.into(), mode };
    let spec = MachineSpec { mounts: vec![mount("/mnt/rw", MountMode::Rw)], disk: Some(64 << 20), ..rig.spec("host") };
    let running = rig.boot(&spec).await;
    println!("{:?} {:?}", running.warnings, running.facts);
    assert!(running.warnings.iter().any(|w| w.0.contains("disk=67108864 does not hold")));
    assert!(running.facts.iter().any(|(key, _)| key == "file_handles"), "what cannot be watched is said");
    assert_eq!(rig.ok(&spec, "cat /mnt/rw/file; echo guest > /mnt/rw/new; stat -c %u /mnt/rw/file").await, "host0\n");
    assert_eq!(fs::metadata(source.join("new")).unwrap().uid(), rustix::process::geteuid().as_raw());
    fs::write(source.join("late"), "late").unwrap();
    assert_eq!(rig.ok(&spec, "cat /mnt/rw/late").await, "late");
    rig.backend.attach_mount(&spec, &mount("/mnt/ro", MountMode::Ro)).await.unwrap();
    assert!(rig.run(&spec, "touch /mnt/ro/x").await.0.contains("Read-only"));
    rig.backend.attach_mount(&spec, &mount("/mnt/cow", MountMode::Cow)).await.unwrap();
    rig.ok(&spec, "rm /mnt/cow/file; echo mine > /mnt/cow/new; cat /mnt/cow/late").await;
    assert!(source.join("file").exists() && fs::read_to_string(source.join("new")).unwrap() == "guest\n");
    let private = MountSpec { source: MountSource::Host("/root".into()), ..mount("/mnt/root", MountMode::Ro) };
    assert!(rig.backend.attach_mount(&spec, &private).await.is_err());
    for target in ["/mnt/rw", "/mnt/ro", "/mnt/cow"] {
        rig.backend.detach_mount(&spec, Path::new(target)).await.unwrap();
    }
    assert_eq!(rig.ok(&spec, "ls -A /mnt/rw /mnt/ro /mnt/cow | grep -v : | tr -d '\\n'").await, "");
    rig.ok(&spec, "echo > /usr/local/added; rm /usr/bin/perl; mkdir /srv/d").await;
    let found = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let all = std::sync::Arc::clone(&found);
    let sink = Box::new(move |change: machinefs_backends::Change| {
        all.lock().unwrap().push(format!("{} {}", change.kind.letter(), String::from_utf8_lossy(&change.path)));
        true
    });
    rig.backend.changes(&spec, sink).await.unwrap();
    let found = found.lock().unwrap().clone();
    let named: Vec<_> = found.iter().filter(|l| ["/srv", "/usr"].iter().any(|p| l[2..].starts_with(p))).collect();
    assert_eq!(named, ["A /srv/d", "D /usr/bin/perl", "A /usr/local/added"]);
    rig.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "run by as_an_ordinary_user"]
async fn network_of_a_user() {
    if rustix::process::geteuid().is_root() {
        return;
    }
    if std::env::var_os("MFS_TEST_NEIGHBOUR").is_none() {
        println!("skipped: there is no outside world of network namespaces");
        return;
    }
    let rig = Rig::new();
    let spec = MachineSpec { network: Network::Outgoing, ..rig.spec("host") };
    if !rig.backend.capabilities(&spec).outgoing {
        println!("skipped: neither pasta nor slirp4netns is installed");
        return;
    }
    let running = rig.boot(&spec).await;
    println!("{:?} {:?}", running.warnings, running.facts);
    assert!(running.warnings.iter().any(|w| w.0.contains("not filtered")), "what does not hold is said");
    let hear = |address: &str| {
        let text =
            format!("import socket; print(socket.create_connection(('{address}', 80), 3).recv(99).decode(), end='')");
        format!("python3 -c \"{text}\"")
    };
    assert_eq!(rig.ok(&spec, &hear(outside::INTERNET)).await, format!("net to {}\n", outside::HOST[0]));
    for closed in ["127.0.0.1", outside::HOST[0], outside::GATEWAY] {
        println!("{closed}: {:?}", rig.run(&spec, &format!("{} 2>&1 | tail -1", hear(closed))).await);
    }
    assert_ne!(rig.run(&spec, &hear("127.0.0.1")).await.1, 0, "the host's loopback is closed");
    rig.backend.kill(&spec).await.unwrap();
    let helper = |name: &str| {
        fs::read_dir("/proc").unwrap().flatten().any(|p| {
            let line = fs::read(p.path().join("cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).contains(name)
        })
    };
    assert!(!helper(&format!("{}/network.pid", spec.dir.display())), "what served the machine has ended");
    rig.backend.start(&spec).await.unwrap();
    rig.ok(&spec, &hear(outside::INTERNET)).await;
    rig.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "the daemon that dies in killed_in_any_step_of_a_user"]
async fn victim() {
    support::victim().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "run by as_an_ordinary_user"]
async fn killed_in_any_step_of_a_user() {
    if rustix::process::geteuid().is_root() {
        return;
    }
    let rig = Rig::new();
    support::kill_victims(&rig, 30, |_| ()).await;
    rig.finish().await;
}
