//! Machines as containers, as root: life, limits, isolation, what is left over.

#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use machinefs_backends::{Adopted, Backend, BackendError, Level};
use std::fs;
use std::time::Duration;
use support::{Rig, eventually, futures_block, leftovers};

fn alive(running: &machinefs_backends::Running) -> bool {
    let mut fds = [rustix::event::PollFd::new(&running.pidfd, rustix::event::PollFlags::IN)];
    let none = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    rustix::event::poll(&mut fds, Some(&none)).unwrap() == 0
}

#[tokio::test(flavor = "multi_thread")]
async fn life_of_a_machine() {
    need!(root);
    let rig = Rig::new();
    let spec = rig.spec("host");
    assert!(rig.backend.connect(&spec).await.is_err(), "nothing listens before the start");
    let running = rig.boot(&spec).await;
    assert!(alive(&running));
    assert_eq!(rig.ok(&spec, "id -u; hostname; cat /etc/hostname").await, "0\ntesthost\ntesthost\n");
    assert_eq!(rig.ok(&spec, "cat /proc/1/comm").await, "agent\n");
    assert_eq!(rig.run(&spec, "exit 7").await.1, 7);
    eventually("the console", || {
        let text = fs::read(spec.dir.join("console.log")).unwrap_or_default();
        futures_block(rig.backend.console(&spec)).unwrap();
        String::from_utf8_lossy(&text).contains("stand-in agent is up")
    });
    let again = rig.backend.start(&spec).await.unwrap();
    assert_eq!(again.pid, running.pid, "start of a running machine is the same machine");
    rig.ok(&spec, "echo kept > /root/file; echo x > /usr/local/bin/added").await;

    rig.backend.kill(&spec).await.unwrap();
    assert!(!alive(&running));
    rig.backend.kill(&spec).await.unwrap();
    let left: Vec<_> = leftovers(&spec).into_iter().filter(|l| !l.starts_with("file")).collect();
    assert_eq!(left, Vec::<String>::new(), "a stopped machine has its disk only");

    let running = rig.backend.start(&spec).await.unwrap();
    assert!(alive(&running));
    assert_eq!(rig.ok(&spec, "cat /root/file /usr/local/bin/added").await, "kept\nx\n");
    // The guest's own end is seen, and a start after it works.
    rig.run(&spec, "true").await;
    rustix::process::pidfd_send_signal(&running.pidfd, rustix::process::Signal::KILL).unwrap();
    eventually("the end", || !alive(&running));
    rig.backend.start(&spec).await.unwrap();
    rig.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn isolation_is_what_is_promised() {
    need!(root);
    let rig = Rig::new();
    let spec = rig.spec("host");
    let running = rig.boot(&spec).await;
    for kind in ["user", "pid", "mnt", "net", "ipc", "uts", "cgroup"] {
        let ours = fs::read_link(format!("/proc/self/ns/{kind}")).unwrap();
        let theirs = fs::read_link(format!("/proc/{}/ns/{kind}", running.pid)).unwrap();
        assert_ne!(ours, theirs, "{kind}");
    }
    let status = rig.ok(&spec, "cat /proc/self/status").await;
    let field = |name: &str| status.lines().find_map(|l| l.strip_prefix(name)).unwrap_or_default().trim().to_owned();
    assert_eq!(field("Seccomp:"), "2");
    // Those of the list in spec.rs and no other: CHOWN 0, DAC_OVERRIDE 1, FOWNER 3, FSETID 4, KILL 5, SETGID 6, SETUID
    // 7, SETPCAP 8, NET_BIND_SERVICE 10, SYS_CHROOT 18, AUDIT_WRITE 29, SETFCAP 31.
    let allowed = [0, 1, 3, 4, 5, 6, 7, 8, 10, 18, 29, 31].into_iter().fold(0_u64, |all, bit| all | 1 << bit);
    for set in ["CapEff:", "CapPrm:", "CapBnd:"] {
        assert_eq!(u64::from_str_radix(&field(set), 16).unwrap(), allowed, "{set}");
    }
    assert_eq!(field("CapAmb:"), "0000000000000000");
    assert_eq!(field("CapInh:"), "0000000000000000");
    assert_eq!(field("NoNewPrivs:"), "0", "su and sudo work");
    assert_eq!(rig.ok(&spec, "cat /proc/self/uid_map").await.split_whitespace().nth(2), Some("65536"));
    // Refused with EPERM or ENOSYS by the filter, whatever the arguments.
    for command in
        ["unshare -r true", "unshare -m true", "mount -t tmpfs x /mnt", "nsenter -t 1 -m true", "chroot / umount /proc"]
    {
        let (output, code) = rig.run(&spec, command).await;
        assert_ne!(code, 0, "{command}: {output}");
    }
    let python = "import socket,ctypes,errno\n\
        def family(n):\n  try: socket.socket(n, socket.SOCK_STREAM); return 'made'\n  except OSError as e: return errno.errorcode[e.errno]\n\
        print(family(socket.AF_UNIX), family(40), family(38))\n\
        l=ctypes.CDLL(None, use_errno=True)\n\
        def call(n, *a):\n  r=l.syscall(n, *a); return 'ok' if r>=0 else errno.errorcode[ctypes.get_errno()]\n\
        print(call(425, 1, 0), call(248, 0, 0, 0, 0, 0), call(135, 0), call(135, 0x400000), call(39), call(5000))\n";
    if cfg!(target_arch = "x86_64") {
        let output = rig.ok(&spec, &format!("python3 -c \"{python}\"")).await;
        assert_eq!(output, "made ENOSYS ENOSYS\nEPERM EPERM ok ENOSYS ok ENOSYS\n");
    }
    // The host is out of sight.
    let mounts = rig.ok(&spec, "cat /proc/self/mountinfo").await;
    assert!(!mounts.contains("fuse.machinefs") && !mounts.contains(&spec.dir.display().to_string()), "{mounts}");
    let seen = rig.ok(&spec, "ls /proc | grep -c '^[0-9]*$'").await;
    assert!(seen.trim().parse::<u32>().unwrap() < 10, "only its own processes: {seen}");
    assert_eq!(rig.ok(&spec, "ls /sys/class/net").await, "lo\n");
    let loopback = "import socket as s\nl=s.create_server(('127.0.0.1',0)); c=s.create_connection(l.getsockname()); \
        l.accept()[0].send(b'up'); print(c.recv(9))";
    assert_eq!(rig.ok(&spec, &format!("python3 -c \"{loopback}\"")).await, "b'up'\n");
    let outside = "python3 -c \"import socket as s; s.create_connection(('192.0.2.1', 80), 5)\" 2>&1 | tail -1";
    assert!(rig.ok(&spec, outside).await.contains("unreachable"), "there is no way out");
    // The host's abstract sockets are in its network namespace, its kernel's log is its own.
    let name = format!("\0mfs-test-{}", std::process::id());
    let address =
        <std::os::unix::net::SocketAddr as std::os::linux::net::SocketAddrExt>::from_abstract_name(&name[1..]).unwrap();
    let _listener = std::os::unix::net::UnixListener::bind_addr(&address).unwrap();
    let abstract_socket =
        format!("python3 -c \"import socket as s; s.socket(s.AF_UNIX).connect('\\0{}')\" 2>&1 | tail -1", &name[1..]);
    assert!(rig.ok(&spec, &abstract_socket).await.contains("refused"));
    assert_ne!(rig.run(&spec, "dmesg").await.1, 0);
    let devices = rig
        .ok(
            &spec,
            "for f in $(find /dev); do test ! -L $f -a \\( -b $f -o -c $f \\) && echo $f; done | sort | tr '\\n' ' '",
        )
        .await;
    assert_eq!(devices, "/dev/full /dev/null /dev/pts/ptmx /dev/random /dev/tty /dev/urandom /dev/zero ");
    assert_eq!(
        rig.ok(&spec, "touch /sys/x /proc/sys/x 2>&1 | wc -l; ls -A /dev/mapper /dev/vda 2>&1 | grep -c No").await,
        "2\n2\n"
    );
    let limit = rig.ok(&spec, "ulimit -Hn; prlimit --core --noheadings --output=HARD 2>/dev/null || echo 1").await;
    let own = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum.unwrap_or(1 << 20).min(1 << 20);
    assert_eq!(
        limit.split_whitespace().collect::<Vec<_>>(),
        [&own.to_string(), "1"],
        "a core_pattern's program of the host is never run"
    );
    let score = fs::read_to_string(format!("/proc/{}/oom_score_adj", running.pid)).unwrap();
    assert!(score.trim().parse::<i32>().unwrap() >= 0);
    rig.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_hold_or_are_said_not_to() {
    need!(root);
    let rig = Rig::new();
    let mut spec = rig.spec("host");
    spec.cpus = Some(0.25);
    spec.memory = Some(64 << 20);
    spec.pids = Some(24);
    let running = rig.boot(&spec).await;
    let limits = running.facts.iter().find(|(k, _)| k == "limits").map(|(_, v)| v.clone()).unwrap_or_default();
    for (name, what) in [("cpu", "cpus="), ("memory", "memory="), ("pids", "pids=")] {
        let said = running.warnings.iter().any(|w| w.0.contains(what));
        assert_ne!(limits.split(' ').any(|l| l == name), said, "{name}: {limits} {:?}", running.warnings);
    }
    if limits.contains("memory") {
        let (output, code) = rig.run(&spec, "python3 -c 'x=bytearray(200<<20); print(1)'").await;
        assert_eq!((output.contains('1'), code), (false, 137), "{output}");
        let usage = rig.backend.usage(&spec).await.unwrap();
        assert!(usage.memory > 0 && usage.memory_peak <= 64 << 20 && usage.memory_peak > 32 << 20, "{usage:?}");
    }
    if limits.contains("pids") {
        let (output, _) = rig.run(&spec, "for i in $(seq 100); do sleep 20 & done; echo done").await;
        assert!(output.contains("fork") || output.contains("Resource"), "{output}");
        assert!(rig.backend.usage(&spec).await.unwrap().pids <= 24);
        rig.backend.kill(&spec).await.unwrap();
        rig.backend.start(&spec).await.unwrap();
    }
    if limits.contains("cpu") {
        let before = rig.backend.usage(&spec).await.unwrap().cpu_micros;
        let start = std::time::Instant::now();
        rig.run(&spec, "timeout 2 sh -c 'while :; do :; done'").await;
        let used = rig.backend.usage(&spec).await.unwrap().cpu_micros - before;
        let share = used as f64 / start.elapsed().as_micros() as f64;
        assert!(share < 0.5, "a quarter of a processor was allowed, {share} used");
    }
    rig.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pause_stops_and_resume_goes_on_and_a_paused_machine_can_be_killed() {
    need!(root);
    let rig = Rig::new();
    let spec = rig.spec("host");
    let running = rig.boot(&spec).await;
    match rig.backend.pause(&spec).await {
        Err(BackendError::Unsupported(why)) => println!("skipped: {why}"),
        other => {
            other.unwrap();
            rig.backend.pause(&spec).await.unwrap();
            let mut stream = rig.backend.connect(&spec).await.unwrap();
            std::io::Write::write_all(&mut stream, b"echo hello\0").unwrap();
            stream.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
            let mut byte = [0];
            assert!(std::io::Read::read(&mut stream, &mut byte).is_err(), "a frozen machine does not answer");
            rig.backend.resume(&spec).await.unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
            assert_eq!(std::io::Read::read(&mut stream, &mut byte).unwrap(), 1);
            rig.backend.pause(&spec).await.unwrap();
        }
    }
    rig.backend.kill(&spec).await.unwrap();
    assert!(!alive(&running));
    rig.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn machines_do_not_see_each_others_writes() {
    need!(root);
    let rig = Rig::new();
    let (one, two) = (rig.spec("host"), rig.spec("host"));
    tokio::join!(rig.boot(&one), rig.boot(&two));
    for (spec, text) in [(&one, "one"), (&two, "two")] {
        rig.ok(spec, &format!("echo {text} > /etc/motd; echo {text} > /usr/share/mine; rm /usr/bin/perl")).await;
    }
    assert_eq!(rig.ok(&one, "cat /etc/motd /usr/share/mine").await, "one\none\n");
    assert_eq!(rig.ok(&two, "cat /etc/motd /usr/share/mine").await, "two\ntwo\n");
    assert!(!std::path::Path::new("/usr/share/mine").exists() && std::path::Path::new("/usr/bin/perl").exists());
    let (a, b) = (fs::metadata(one.dir.join("upper/usr")).unwrap(), fs::metadata(two.dir.join("upper/usr")).unwrap());
    assert_ne!(std::os::unix::fs::MetadataExt::uid(&a), std::os::unix::fs::MetadataExt::uid(&b));
    rig.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_daemon_adopts_what_runs_and_cleans_what_does_not() {
    need!(root);
    let rig = Rig::new();
    let spec = rig.spec("host");
    let running = rig.boot(&spec).await;
    rig.ok(&spec, "echo there > /tmp/x").await;
    let fresh = rig.reopened();
    let Adopted::Running(adopted) = fresh.adopt(&spec).await.unwrap() else { panic!("it runs") };
    assert_eq!((adopted.pid, &adopted.facts), (running.pid, &running.facts));
    assert!(alive(&adopted));
    assert_eq!(rig.ok(&spec, "cat /tmp/x").await, "there\n");

    // A record of another process of that number is not believed.
    let path = spec.dir.join("run.json");
    let mut record: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    record["init"]["start"] = 1.into();
    fs::write(&path, record.to_string()).unwrap();
    assert!(matches!(rig.reopened().adopt(&spec).await.unwrap(), Adopted::Stopped));
    assert!(!alive(&running), "what cannot be adopted is ended");
    assert!(matches!(rig.reopened().adopt(&spec).await.unwrap(), Adopted::Stopped));
    rig.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_at_any_step_leaves_nothing_after_destroy() {
    need!(root);
    let rig = Rig::new();
    // Created only.
    let spec = rig.spec("host");
    rig.backend.create(&spec, std::sync::Arc::new(|_| {})).await.unwrap();
    rig.reopened().destroy(&spec).await.unwrap();
    assert_eq!(leftovers(&spec), Vec::<String>::new());
    // Started, and the daemon died before it wrote that down, with and without the runtime's own files.
    for lost in [&["run.json"][..], &["run.json", "pid"], &["run.json", "pid", "agent.sock", "bundle/config.json"]] {
        let spec = rig.spec("host");
        let running = rig.boot(&spec).await;
        for file in lost {
            fs::remove_file(spec.dir.join(file)).unwrap();
        }
        rig.reopened().destroy(&spec).await.unwrap();
        assert!(!alive(&running));
        assert_eq!(leftovers(&spec), Vec::<String>::new());
    }
    // Half a create.
    let spec = rig.spec("host");
    fs::create_dir_all(spec.dir.join("upper.part/etc")).unwrap();
    fs::create_dir_all(spec.dir.join("upper/root")).unwrap();
    fs::write(spec.dir.join("root.part"), "{").unwrap();
    rig.boot(&spec).await;
    rig.reopened().destroy(&spec).await.unwrap();
    assert_eq!(leftovers(&spec), Vec::<String>::new());
    rig.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "the daemon that dies in killed_in_any_step"]
async fn victim() {
    support::victim().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_in_any_step() {
    need!(root);
    let rig = Rig::new();
    support::kill_victims(&rig, 60, |_| ()).await;
    rig.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_console_and_disk_do_not_hold_the_host() {
    need!(root);
    let rig = Rig::new();
    let spec = rig.spec("host");
    let running = rig.boot(&spec).await;
    rig.run(&spec, "timeout 2 sh -c 'yes flood > /proc/1/fd/2'").await;
    assert!(rig.backend.console(&spec).await.unwrap().len() <= 512 << 10);
    assert!(alive(&running));
    rig.ok(&spec, "python3 -c \"import os\nfor i in range(3000): os.mkdir('d'); os.chdir('d')\"; chmod 0 /root; ln -s / /tmp/link").await;
    rig.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_say_what_is_wrong() {
    need!(root);
    let rig = Rig::new();
    for image in ["/nonexistent", "relative/path", "/", "/dev/null", "/etc/passwd"] {
        let spec = rig.spec(image);
        let error = rig.backend.create(&spec, std::sync::Arc::new(|_| {})).await.unwrap_err();
        assert!(matches!(error, BackendError::Image { .. }), "{image}: {error}");
        println!("{error}");
    }
    let spec = rig.spec("host");
    let options =
        machinefs_backends::container::ContainerOptions::new("/nonexistent/agent".into(), rig.dir.path().join("s2"));
    let backend = machinefs_backends::container::ContainerBackend::new(options).unwrap();
    backend.create(&spec, std::sync::Arc::new(|_| {})).await.unwrap();
    let error = backend.start(&spec).await.unwrap_err();
    println!("{error}");
    assert!(error.to_string().contains("/nonexistent/agent"), "{error}");
    let findings = backend.check().await;
    assert!(findings.iter().any(|f| f.subject == "agent" && f.level == Level::Missing && !f.remedy.is_empty()));
    for finding in rig.backend.check().await {
        println!("{finding:?}");
        assert_eq!(finding.level == Level::Ok, finding.remedy.is_empty());
        assert_ne!(finding.level, Level::Missing, "{finding:?}");
    }
    rig.finish().await;
}

/// Prints how long the steps of a machine's life take; asserts nothing about it.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement"]
async fn how_long_a_start_takes() {
    need!(root);
    let rig = Rig::new();
    let begin = std::time::Instant::now();
    rig.backend.prepare();
    println!("first look at the host's files: {:?}", begin.elapsed());
    let mut times = [const { Vec::new() }; 3];
    for _ in 0..40 {
        let spec = rig.spec("host");
        let begin = std::time::Instant::now();
        rig.backend.create(&spec, std::sync::Arc::new(|_| {})).await.unwrap();
        times[0].push(begin.elapsed());
        rig.backend.start(&spec).await.unwrap();
        drop(rig.backend.connect(&spec).await.unwrap());
        times[1].push(begin.elapsed());
        let begin = std::time::Instant::now();
        rig.backend.destroy(&spec).await.unwrap();
        times[2].push(begin.elapsed());
    }
    for (what, times) in ["create", "create to agent connected", "destroy"].iter().zip(&mut times) {
        times.sort();
        println!("{what}: least {:?}, median {:?}", times[0], times[times.len() / 2]);
    }
    rig.finish().await;
}
