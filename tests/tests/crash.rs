//! kill -9 of the daemon: machines and their commands go on, and the next daemon tells the truth about all of them.

use machinefs_tests::leftovers::{machines, mounts_below};
use machinefs_tests::{Daemon, each_user_alone, eventually, gate, scale};

each_user_alone! {
    /// Three machines and a running command: after the restart the output is complete, the exit code right, status true.
    fn with_three_machines_and_a_running_command(user) {
        let d = Daemon::start(user);
        let (a, b, c) = (d.running("a"), d.running("b"), d.running("c"));
        c.ctl("stop").ok();
        d.exec(&["cat", &c.path("wait/stopped")]).ok();
        let inits = (a.init(), b.init());
        let inode = d.exec(&["stat", "-c", "%i", &a.name, &a.path("files/root")]).ok().text();
        // It ends only after the crash: the file that ends it is written then.
        a.bash("echo 'i=0; until [ -e /root/end ]; do i=$((i+1)); echo line $i; sleep 0.01; done; echo $i > /root/count; exit 7' > $D/exec").ok();
        a.bash("head -n 20 $D/out | tail -n 1 | grep -qx 'line 20'").ok();
        // Another ends while there is no daemon at all.
        b.bash("echo 'echo before; until [ -e /root/gone ]; do sleep 0.01; done; sleep 0.5; echo after; exit 9' > $D/exec").ok();
        b.bash("read -r line < $D/out; test \"$line\" = before; touch $D/files/root/gone").ok();
        d.kill();
        std::thread::sleep(std::time::Duration::from_secs(1));
        d.boot();
        assert_eq!([a.status(), b.status(), c.status()], ["running", "running", "stopped"]);
        assert_eq!((a.init(), b.init()), inits, "adopted, not booted anew");
        assert_eq!(d.exec(&["stat", "-c", "%i", &a.name, &a.path("files/root")]).ok().text(), inode, "inode numbers");
        a.bash("touch $D/files/root/end").ok();
        a.bash("cat $D/out > $T/out; test \"$(cat $D/exit)\" = 7; seq -f 'line %g' $(cat $D/files/root/count) | cmp - $T/out").ok();
        assert_eq!(b.read("out"), "before\nafter\n");
        assert_eq!(b.read("exit"), "9\n");
        assert_eq!(a.guest("echo again"), "again");
        assert_eq!((a.jobs(), b.jobs()), (2, 1));
        c.ctl("start").ok();
        c.until_running();
    }
}

each_user_alone! {
    /// Killed over and over while commands run: none is lost, doubled or mistold.
    fn again_and_again(user) {
        let d = Daemon::start(user);
        let m = d.running("again");
        for round in 0..5 * scale() {
            m.bash(&format!("echo 'for i in $(seq 100); do echo {round} $i; sleep 0.01; done; exit 5' > $D/exec")).ok();
            d.crash();
            m.bash(&format!("cat $D/out > $T/out; test \"$(cat $D/exit)\" = 5; seq -f '{round} %g' 100 | cmp - $T/out")).ok();
        }
        assert_eq!(m.jobs(), 5 * scale());
    }
}

each_user_alone! {
    /// What ended while no daemon was there is not told as running: a machine whose init was killed.
    fn a_machine_that_ended_meanwhile(user) {
        if !machinefs_tests::user::am_root() {
            machinefs_tests::skip!("killing a machine's init needs root");
        }
        let d = Daemon::start(user);
        let m = d.running("dead");
        m.bash("echo 'echo printed; sleep 1000' > $D/exec; read -r line < $D/out").ok();
        let init = m.init();
        d.kill();
        // SAFETY: kill(2) has no memory effects; the process is the init of the test's own machine.
        assert_eq!(unsafe { libc::kill(init as i32, libc::SIGKILL) }, 0);
        assert!(eventually(10, || !std::path::Path::new(&format!("/proc/{init}")).exists()));
        d.boot();
        assert!(["stopped", "failed", "lost"].contains(&m.status().as_str()), "{}", m.status());
        // Its command has no exit code: an error, never a number.
        let exit = d.exec(&["cat", &m.path("exit")]);
        assert!(exit.code != 0 && exit.stdout.is_empty(), "{exit:?}");
        m.ctl("start").ok();
        m.until_running();
        m.guest("true");
    }
}

each_user_alone! {
    /// Killed in the middle of create, boot, stop and destroy: nothing leaks, and every machine can be used or destroyed.
    fn in_the_middle_of_everything(user) {
        let d: Daemon = gate::gated(user);
        let scripts = [
            ("create and boot", "mkdir ${D}x"),
            ("stop", "echo stop > $D/ctl"),
            ("kill", "echo kill > $D/ctl"),
            ("restart", "echo restart > $D/ctl"),
            ("destroy", "rmdir $D"),
        ];
        for (what, script) in scripts {
            // The moment differs from round to round, from before the operation has begun to after it is over.
            for delay in [0, 1, 3, 8, 20, 60].repeat(scale()) {
                let m = d.running("mid");
                let mut operation = m.spawn_bash(script);
                std::thread::sleep(std::time::Duration::from_millis(delay));
                d.kill();
                eventually(20, || operation.has_ended());
                drop(operation);
                d.boot();
                let listed = d.exec(&["ls"]).ok().text();
                for name in listed.lines().filter(|name| !["README", "ctl", "index", "index.json"].contains(name)) {
                    let settled = eventually(60, || {
                        let status = d.exec(&["cat", &format!("{name}/status")]);
                        status.code != 0 || ["running", "stopped", "failed", "lost"].contains(&status.text().as_str())
                    });
                    assert!(settled, "{what}, {delay} ms: {name} is {}", d.read(&format!("{name}/status")));
                    d.exec(&["rmdir", name]).ok();
                }
                let clean = eventually(30, || machines(&d.state).is_empty());
                assert!(clean, "{what}, {delay} ms: {:?}\n{}", machines(&d.state), d.log());
            }
        }
    }
}

each_user_alone! {
    /// Killed while a boot surely is under way (the runtime is held back): the machine is then truly what status says.
    fn in_the_middle_of_a_boot(user) {
        let d: Daemon = gate::gated(user);
        gate::close(&d);
        let m = d.machine("boot");
        m.bash("echo 'echo queued; exit 3' > $D/exec").ok();
        d.kill();
        d.boot();
        gate::open(&d);
        let settled = eventually(60, || ["running", "stopped", "failed"].contains(&m.status().as_str()));
        assert!(settled, "{}", m.status());
        if m.status() == "running" {
            m.guest("true");
        } else {
            m.ctl("start").ok();
            m.until_running();
            m.guest("true");
        }
    }
}

each_user_alone! {
    /// A stale mount, with a shell's working directory inside a machine, is replaced.
    fn with_a_working_directory_inside(user) {
        let d = Daemon::start(user);
        let m = d.running("cwd");
        let mut shell = m.spawn_bash("cd $D/files/root; touch inside; sleep 1000");
        assert!(eventually(20, || d.exec(&["test", "-e", &m.path("files/root/inside")]).code == 0));
        shell.until_blocked();
        d.crash();
        assert_eq!(mounts_below(&d.mount).len(), 1, "one mount, not one over a stale one: {:?}", mounts_below(&d.mount));
        assert_eq!(m.status(), "running");
        d.exec(&["ls", &m.path("files/root/inside")]).ok();
        assert!(!shell.has_ended());
    }
}

each_user_alone! {
    /// Blocked readers of a daemon that dies end with an error, at once.
    fn blocked_readers_end(user) {
        let d = Daemon::start(user);
        let m = d.running("blocked");
        m.bash("echo 'sleep 1000' > $D/exec").ok();
        let mut readers: Vec<_> = ["out", "exit", "wait/stopped"].map(|file| m.spawn(&["cat"], file)).into();
        for reader in &mut readers {
            reader.until_blocked();
        }
        d.kill();
        for reader in readers {
            reader.wait(20).fails();
        }
        d.boot();
    }
}

each_user_alone! {
    /// SIGTERM unmounts and leaves the machines running; the next daemon has them.
    fn sigterm_leaves_machines_running(user) {
        let d = Daemon::start(user);
        let m = d.running("term");
        let init = m.init();
        m.bash("echo 'sleep 1; echo through; exit 2' > $D/exec").ok();
        assert_eq!(d.end(libc::SIGTERM), 0, "{}", d.log());
        assert_eq!(mounts_below(&d.mount).len(), 0);
        assert!(std::path::Path::new(&format!("/proc/{init}")).exists());
        d.boot();
        assert_eq!(m.init(), init);
        assert_eq!(m.read("out"), "through\n");
        assert_eq!(m.read("exit"), "2\n");
    }
}

each_user_alone! {
    /// Two daemons on one state directory would tear down each other's machines: the second says so and ends.
    fn a_second_daemon_on_the_same_state(user) {
        let d = Daemon::start(user);
        let m = d.running("mine");
        let program = d.program().to_string_lossy().into_owned();
        let script = format!("mkdir $T/second; timeout 20 {program} mount $T/second --state-dir {}", d.state.display());
        let outcome = d.bash(&script).fails();
        assert!(outcome.code != 124 && outcome.words().contains("in use"), "{outcome:?}");
        m.guest("true");
    }
}
