//! What a machine goes through: booting, running, paused, stopped, failed.

use machinefs_tests::{Daemon, each_user, each_user_alone, gate};

each_user_alone! {
    /// mkdir returns while the boot goes on behind it; nothing of the mount waits for it, exec takes the job and queues.
    fn mkdir_does_not_wait_for_the_boot(user) {
        let d: Daemon = gate::gated(user);
        gate::close(&d);
        let m = d.machine("slow");
        assert!(["creating", "booting"].contains(&m.status().as_str()), "{}", m.status());
        // None of this could end if it waited: the gate is closed.
        d.bash("ls -l; stat no-such-name 2> /dev/null || true; cat index .sys/health > /dev/null").ok();
        let second = d.machine("second");
        m.bash("echo 'echo queued; exit 4' > $D/exec").ok();
        let mut waiter = m.spawn(&["cat"], "wait/running");
        let mut reader = m.spawn(&["cat"], "out");
        waiter.until_blocked();
        reader.until_blocked();
        gate::open(&d);
        waiter.wait(60).ok();
        assert_eq!(reader.wait(60).ok().text(), "queued");
        assert_eq!(m.read("exit"), "4\n");
        assert_eq!(m.status(), "running");
        second.until_running();
    }
}

each_user_alone! {
    /// `mkdir dev && cp -r src dev/files/root/` just works: the walk into files/ waits for the boot.
    fn files_wait_for_the_boot(user) {
        let d: Daemon = gate::gated(user);
        d.bash("mkdir $T/src; for i in $(seq 50); do echo $i > $T/src/$i; done").ok();
        gate::close(&d);
        let m = d.create("copy", "boot_wait=1m");
        let mut copy = m.spawn_bash("exec cp -r $T/src $D/files/root/");
        copy.until_blocked();
        gate::open(&d);
        copy.wait(60).ok();
        m.bash("diff -r $T/src $D/files/root/src").ok();
        assert_eq!(m.guest("ls /root/src | wc -l"), "50");
    }
}

each_user! {
    /// A boot that fails shows in status, errors and wait/running; exec and files say that the host is down.
    fn a_boot_that_fails(d) {
        let m = d.create("bad", "image=/no/such/image");
        d.exec(&["cat", &m.path("wait/running")]).fails();
        m.until_status("failed");
        let errors = m.read("errors");
        assert!(errors.contains("/no/such/image"), "{errors}");
        m.bash("echo true > $D/exec").fails_with("Host is down");
        m.bash("ls $D/files/").fails_with("Host is down");
        assert!(d.read("index").lines().any(|line| line.starts_with(&m.name) && line.contains("failed")));
        d.exec(&["rmdir", &m.name]).ok();
    }
}

each_user! {
    /// A machine that fails while somebody waits for it fails the wait.
    fn a_wait_that_can_no_longer_come_true(d) {
        let m = d.running("wait");
        m.ctl("stop").ok();
        d.exec(&["cat", &m.path("wait/stopped")]).ok();
        d.exec(&["cat", &m.path("wait/running")]).fails();
    }
}

each_user! {
    /// Stop and start: the disk is kept, exec and files on the stopped machine are "Host is down", reading is harmless.
    fn stop_and_start(d) {
        let m = d.running("stop");
        m.bash("echo kept > $D/files/root/kept").ok();
        m.ctl("stop").ok();
        d.exec(&["cat", &m.path("wait/stopped")]).ok();
        assert_eq!(m.status(), "stopped");
        m.bash("echo true > $D/exec").fails_with("Host is down");
        m.bash("ls $D/files/").fails_with("Host is down");
        m.bash("cat $D/files/root/kept").fails_with("Host is down");
        d.exec(&["ls", "-l", &m.name]).ok();
        assert_eq!(m.status(), "stopped", "reading wakes nothing");
        m.ctl("start").ok();
        m.until_running();
        assert_eq!(m.read("files/root/kept"), "kept\n");
        assert_eq!(m.guest("cat /root/kept"), "kept");
    }
}

each_user! {
    /// A stop asks the guest's processes first; a kill does not.
    fn stop_asks_and_kill_does_not(d) {
        for verb in ["stop", "kill"] {
            let m = d.running(verb);
            m.bash("echo 'trap \"echo asked; exit 0\" TERM; echo ready; while :; do sleep 0.1; done' > $D/exec").ok();
            m.bash("read -r line < $D/out; test \"$line\" = ready").ok();
            m.ctl(verb).ok();
            d.exec(&["cat", &m.path("wait/stopped")]).ok();
            if verb == "stop" {
                // What the shell says of its sleep, which was asked too, may stand between.
                let out = m.read("out");
                assert!(out.starts_with("ready\n") && out.ends_with("asked\n"), "{out}");
            } else {
                // Lost with the machine: what had arrived may be there, an answer to SIGTERM may not.
                let out = d.exec(&["cat", &m.path("out")]).text();
                assert!(!out.contains("asked"), "{out}");
            }
        }
    }
}

each_user! {
    /// Restart boots anew: another init, the same disk.
    fn restart(d) {
        let m = d.running("restart");
        let before = m.init();
        m.bash("echo kept > $D/files/root/kept").ok();
        m.ctl("restart").ok();
        let anew = machinefs_tests::eventually(40, || m.status() == "running" && m.info("pid") != before.to_string());
        assert!(anew, "{} {}", m.status(), m.read("errors"));
        assert_eq!(m.guest("cat /root/kept"), "kept");
    }
}

each_user! {
    /// Paused, nothing of the machine moves; resumed, it goes on. Where the host cannot freeze, the verb says so.
    fn pause_and_resume(d) {
        let m = d.running("pause");
        m.bash("echo 'i=0; while :; do i=$((i+1)); echo $i > /root/count; sleep 0.02; done' > $D/exec").ok();
        let started = machinefs_tests::eventually(20, || d.exec(&["test", "-s", &m.path("files/root/count")]).code == 0);
        assert!(started);
        let paused = m.ctl("pause");
        if paused.code != 0 {
            let errors = m.read("errors");
            assert!(errors.lines().last().is_some_and(|line| line.contains("pause")), "{errors}");
            machinefs_tests::skip_part!("this host cannot freeze machines: {}", errors.lines().last().unwrap_or_default());
            return;
        }
        m.until_status("paused");
        let tasks: Vec<_> = machinefs_tests::process::all_tasks().into_iter().filter(|task| task.pid == m.init()).collect();
        assert!(tasks.iter().all(|task| task.state != 'R'), "{tasks:?}");
        // It cannot answer, and says so at once.
        for script in ["ls $D/files/root", "cat $D/files/root/count", "echo x > $D/files/root/new", "echo true > $D/exec"] {
            let refused = m.bash(script).fails();
            assert!(refused.words().contains("busy"), "{script}: {refused:?}");
        }
        assert!(m.bash("echo true > $D/exec").code != 0 && m.read("errors").contains("echo resume > ctl"), "{}", m.read("errors"));
        m.ctl("resume").ok();
        m.until_status("running");
        let before = m.read("files/root/count");
        assert!(machinefs_tests::eventually(20, || m.read("files/root/count") != before), "it does not go on");
    }
}

each_user! {
    /// `create NAME key=value…` and `autostart=no`: configured first, started later; config reads back as written.
    fn create_and_configure(d) {
        let m = d.create("conf", "memory=512M autostart=no hostname=chosen");
        m.until_status("stopped");
        assert_eq!(m.read("config/memory"), "512M\n");
        m.bash("echo 768M > $D/config/memory").ok();
        assert_eq!(m.read("config/memory"), "768M\n");
        // What is read can be written back.
        m.bash("for f in $D/config/*; do value=$(cat $f); echo \"$value\" > $f; test \"$(cat $f)\" = \"$value\"; done").ok();
        m.ctl("start").ok();
        m.until_running();
        assert_eq!(m.guest("uname -n"), "chosen");
        // A change that waits for the next start is accepted, and shown as pending.
        m.bash("echo 1G > $D/config/memory").ok();
        assert!(m.read("info").lines().any(|line| line.contains("pending") && line.contains("memory")), "{}", m.read("info"));
    }
}

each_user! {
    /// Every change is an event: `seq time machine verb key=value…`; the log of the service has all of them.
    fn events(d) {
        let m = d.running("event");
        m.ctl("stop").ok();
        d.exec(&["cat", &m.path("wait/stopped")]).ok();
        let events = m.read("events");
        let mut last = 0u64;
        for line in events.lines() {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let number: u64 = fields[0].parse().unwrap_or_else(|_| panic!("{line}"));
            assert!(number > last, "{events}");
            last = number;
            assert!(fields.len() >= 4, "{line}");
        }
        assert!(events.lines().count() >= 2, "{events}");
        assert!(d.read(".sys/events").contains(&m.name));
    }
}

each_user! {
    /// wait/event streams what happens from now on.
    fn wait_event_streams(d) {
        let m = d.running("stream");
        let mut watcher = m.spawn_bash("while read -r line; do echo \"$line\"; case $line in *stop*) exit;; esac; done < $D/wait/event");
        watcher.until_blocked();
        m.ctl("stop").ok();
        assert!(watcher.wait(60).ok().text().contains("stop"));
    }
}

each_user! {
    /// `stop all` and `destroy all` are of the caller's machines; index says what there is. On a daemon of its own, since
    /// others test on the shared one.
    fn index_follows(d) {
        let m = d.running("index");
        let line = |text: &str| text.lines().find(|line| line.split_whitespace().next() == Some(&m.name)).map(String::from);
        let index = d.read("index");
        let found = line(&index).unwrap_or_else(|| panic!("{index}"));
        assert!(found.contains("running") && found.contains("container"), "{found}");
        d.exec(&["rmdir", &m.name]).ok();
        assert_eq!(line(&d.read("index")), None);
    }
}

each_user_alone! {
    /// `destroy all` to the top's ctl.
    fn destroy_all(user) {
        let d = Daemon::start(user);
        for _ in 0..3 {
            std::mem::forget(d.running("all"));
        }
        d.bash("echo 'stop all' > ctl; for m in */; do cat ${m}wait/stopped; test \"$(cat ${m}status)\" = stopped; done").ok();
        d.bash("echo 'destroy all' > ctl; set -- */; test \"$1\" = '*/'").ok();
    }
}

each_user! {
    /// Namespaces of its own: user, pid, mount, net, ipc, uts, cgroup; no network but loopback; few capabilities; seccomp.
    fn the_machine_is_contained(d) {
        let m = d.create("contained", "network=none");
        m.until_running();
        let ours = std::fs::read_dir("/proc/self/ns").expect("namespaces");
        for entry in ours.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if !["user", "pid", "mnt", "net", "ipc", "uts", "cgroup"].contains(&name.as_str()) {
                continue;
            }
            let here = std::fs::read_link(entry.path()).expect("a namespace").to_string_lossy().into_owned();
            assert_ne!(m.guest(&format!("readlink /proc/self/ns/{name}")), here, "the machine shares the host's {name} namespace");
        }
        assert_eq!(m.guest("cat /proc/1/comm"), "agent");
        assert_eq!(m.guest("ls /sys/class/net"), "lo");
        assert_eq!(m.guest("grep Seccomp: /proc/self/status | tr -dc 0-9"), "2");
        assert_eq!(m.guest("id -u"), "0");
        for forbidden in ["mount -t tmpfs none /mnt", "mknod /root/sda b 8 0", "chroot /proc/1/root/.. true && reboot", "dmesg"] {
            let (output, code) = m.run(&format!("{forbidden} 2>&1"));
            assert_ne!(code, 0, "{forbidden} is possible: {output}");
        }
    }
}

each_user! {
    /// The image `host` shows nothing that an ordinary user of the host cannot read: no home, no key, no socket.
    fn the_host_image_is_not_private(d) {
        let m = d.running("host");
        for path in ["/etc/shadow", "/root/.ssh", "/root/.bashrc", "/root/.cargo", "/home/mfstest", "/etc/ssh/ssh_host_ed25519_key",
            "/run/sshd", "/var/run/docker.sock", "/var/lib/containers", "/work", "/etc/machine-id.host"] {
            let (output, code) = m.run(&format!("cat {path} 2>/dev/null || ls -A {path} 2>/dev/null"));
            let secret = std::fs::read(path).ok().filter(|bytes| !bytes.is_empty());
            if let Some(secret) = secret {
                assert_ne!(output, String::from_utf8_lossy(&secret).trim_end(), "{path} of the host is in the machine");
            } else {
                assert!(code != 0 || output.is_empty() || path == "/etc/shadow", "{path}: {output}");
            }
        }
        // Nothing below /usr that only its owner may read is readable in the machine either.
        let hidden = d.bash("find /usr /opt -xdev -type f ! -perm -o=r 2>/dev/null | head -n 5").text();
        for path in hidden.lines() {
            let (_, code) = m.run(&format!("cat '{path}' > /dev/null 2>&1"));
            assert_ne!(code, 0, "{path} can be read in the machine");
        }
        assert_eq!(m.guest("cat /etc/passwd | grep -c ^root:"), "1");
        m.guest("python3 -c 'print(1)' && gcc --version > /dev/null && getent passwd root > /dev/null && dpkg -l bash > /dev/null");
    }
}

each_user! {
    /// Limits of memory and processes hold, or `errors` and `info` say that the host cannot set them.
    fn limits(d) {
        let m = d.create("limits", "memory=64M");
        m.until_running();
        let (output, code) = m.run("python3 -c 'x = bytearray(300 << 20); print(len(x))' 2>&1");
        if code == 0 {
            let told = m.read("errors") + &m.read("info");
            assert!(told.contains("memory") && (told.contains("limit") || told.contains("cgroup")), "{output}\n{told}");
            machinefs_tests::skip_part!("this host does not let this user limit memory, and the machine says so");
        } else {
            assert!(code == 137 || output.contains("MemoryError"), "{code} {output}");
        }
    }
}

each_user! {
    /// A time-out is in the unit that it says: a command of 10 s under 30 s succeeds; one past its time-out is killed
    /// with all it started, and its exit code is 124.
    fn exec_timeout(d) {
        let m = d.running("timeout");
        m.bash("echo 30s > $D/config/exec_timeout; echo 'sleep 10; echo slept' > $D/exec").ok();
        let mut long = m.spawn(&["cat"], "out");
        long.until_blocked();
        m.bash("echo 1s > $D/config/exec_timeout").ok();
        m.bash("exec 3<> $D/exec; echo 'sleep 1000 & sleep 1000' >&3; cat <&3; read -r _ code <&3; test \"$code\" = 124").ok();
        assert_eq!(m.read("jobs/2/exit"), "124\n");
        assert_eq!(long.wait(60).ok().text(), "slept");
        assert_eq!(m.read("jobs/1/exit"), "0\n");
        m.bash("echo none > $D/config/exec_timeout").ok();
        assert_eq!(m.guest("ps -e -o args= | grep -c '^sleep 1000' || true"), "0");
    }
}
