//! What was acknowledged is kept: by a daemon that is killed, by a full disk, by an agent that is silent for a while.

use machinefs_tests::process::status_field;
use machinefs_tests::{Daemon, each_user_alone, eventually, skip, user};

/// What the daemon's memory stays below: 128 MiB.
const MEMORY_CAP_KIB: u64 = 128 * 1024;

each_user_alone! {
    /// A command that was read from goes on after kill -9, however busy the daemon was with writing things down.
    fn a_job_that_runs_while_the_store_is_busy(user) {
        let d = Daemon::start(user);
        let m = d.running("busy");
        for _ in 0..3 {
            // They end with the mount they work in.
            let mut busy: Vec<_> = (0..4)
                .map(|n| {
                    let write = "echo h$N-$i > $D/config/hostname && ! echo nonsense > $D/config/memory";
                    m.spawn_bash(&format!("N={n}; i=0; while {write}; do i=$((i+1)); done 2> /dev/null"))
                })
                .collect();
            std::thread::sleep(std::time::Duration::from_millis(500));
            let script = "cd /; echo important; until [ -e /root/end ]; do sleep 0.05; done; exit 7";
            m.bash(&format!("echo '{script}' > $D/exec; read -r line < $D/out; test \"$line\" = important")).ok();
            d.crash();
            assert!(busy.iter_mut().all(|writer| eventually(20, || writer.has_ended())));
            let job = m.bash("ls $D/jobs | sort -n | tail -n 1").ok().text();
            let status = m.read(&format!("jobs/{job}/status"));
            assert!(["state running", "state queued"].iter().any(|state| status.starts_with(state)), "{status}");
            m.bash("touch $D/files/root/end").ok();
            assert_eq!((m.read("out"), m.read("exit")), ("important\n".to_string(), "7\n".to_string()));
            m.bash("rm $D/files/root/end").ok();
        }
    }
}

each_user_alone! {
    /// The number of a job is never given to another, whether it was removed or never completed.
    fn numbers_are_not_used_again(user) {
        let d = Daemon::start(user);
        let m = d.running("numbers");
        for _ in 0..3 {
            m.guest("true");
        }
        m.bash("rmdir $D/jobs/3").ok();
        d.crash();
        assert_eq!(m.bash("ls $D/jobs").ok().text(), "1\n2");
        m.guest("true");
        assert_eq!(m.bash("ls $D/jobs").ok().text(), "1\n2\n4");
        // One that is still being written when the daemon dies.
        let mut writer = m.spawn_bash("exec 3> $D/exec; echo begun >&3; echo > $T/begun; sleep 1000 3>&3");
        assert!(eventually(20, || d.exec(&["test", "-e", &d.tmp().join("begun").to_string_lossy()]).code == 0));
        assert_eq!(m.bash("ls $D/jobs").ok().text(), "1\n2\n4\n5");
        d.kill();
        writer.signal(libc::SIGKILL);
        eventually(10, || writer.has_ended());
        drop(writer);
        d.boot();
        m.guest("true");
        assert_eq!(m.bash("ls $D/jobs | tail -n 1").ok().text(), "6");
        // One that ran and was removed is gone from the machine too, and stays removed.
        m.bash("echo 'echo up; exec sleep 4711' > $D/exec; read -r line < $D/out; rmdir $D/jobs/7").ok();
        d.crash();
        assert!(eventually(20, || m.run("pgrep -x sleep -a | grep 4711").1 != 0), "it runs on");
        assert_eq!(m.bash("ls -d $D/jobs/7 2> /dev/null || true").ok().text(), "");
    }
}

each_user_alone! {
    /// Long scripts are kept on the disk, not in memory: 20 of 15 MB each, before and after a restart.
    fn long_scripts_cost_no_memory(user) {
        let d = Daemon::start(user);
        let m = d.running("long");
        let script = "import sys\nfor n in range(20):\n    with open(f'{D}/exec', 'wb') as f:\n        f.write(b'echo %d; exit\\n' % n + b'#' * (15 << 20) + b'\\n')\n";
        m.python(script).ok();
        // The first ones are over the limit of what is kept of jobs that have ended.
        for n in 5..20 {
            assert_eq!(m.read(&format!("jobs/{}/out", n + 1)), format!("{n}\n"));
        }
        let long = "size = (15 << 20) + len('echo 19; exit\\n') + 1\npath = f'{D}/jobs/20/cmd'\nassert os.stat(path).st_size == size, os.stat(path)\nwith open(path, 'rb') as f: data = f.read()\nassert len(data) == size and data.startswith(b'echo 19; exit\\n###') and data.endswith(b'#\\n')\nassert os.stat(f'{D}/history').st_size < 100000\n";
        m.python(long).ok();
        let peak = status_field(d.pid(), "VmHWM").expect("VmHWM");
        println!("peak with 20 scripts of 15 MB: {peak} KiB");
        assert!(peak < MEMORY_CAP_KIB, "the daemon's peak is {peak} KiB");
        d.crash();
        m.python(long).ok();
        let peak = status_field(d.pid(), "VmHWM").expect("VmHWM");
        println!("peak after the restart: {peak} KiB");
        assert!(peak < MEMORY_CAP_KIB, "the daemon's peak is {peak} KiB");
        // What is kept of them is bounded as their output is: 256 MiB a machine.
        let kept = m.bash("ls $D/jobs | wc -l").ok().text();
        assert!(kept.trim().parse::<u64>().is_ok_and(|kept| kept <= 17), "{kept} jobs of 15 MB are kept");
    }
}

each_user_alone! {
    /// The state database does not grow with what was written and is not kept.
    fn values_written_over_and_over_do_not_fill_the_disk(user) {
        let d = Daemon::start(user);
        let m = d.running("values");
        m.python("for n in range(3000):\n    with open(f'{D}/config/workdir', 'w') as f: f.write('/' + str(n) + 'x' * 4000)\n").ok();
        let size: u64 = ["state.db", "state.db-wal"]
            .iter()
            .filter_map(|name| std::fs::metadata(d.state.join(name)).ok())
            .map(|file| file.len())
            .sum();
        println!("state.db and its log: {size} bytes");
        assert!(size < 12 << 20, "{size} bytes");
        d.crash();
        assert!(m.read("config/workdir").starts_with("/2999x"));
    }
}

/// A small tmpfs as a daemon's state directory, unmounted at the end.
struct SmallDisk(std::path::PathBuf);

impl SmallDisk {
    fn mount(path: &std::path::Path) -> SmallDisk {
        std::fs::create_dir_all(path).expect("a directory to mount on");
        let status =
            std::process::Command::new("mount").args(["-t", "tmpfs", "-o", "size=12m", "small"]).arg(path).status();
        assert!(status.is_ok_and(|status| status.success()), "mounting a tmpfs");
        SmallDisk(path.to_path_buf())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// On a full disk `exec` says so, the daemon survives, output says what is missing of it, and all is well when there is
/// space again.
#[test]
fn a_full_disk() {
    if !user::am_root() {
        skip!("mounting a small disk needs root");
    }
    let mut disk = None;
    let d = Daemon::start_with(machinefs_tests::User::Root, |base| {
        disk = Some(SmallDisk::mount(&base.join("state")));
        Vec::new()
    });
    let m = d.running("full");
    let ballast = d.state.join("ballast");
    let fill = || {
        let mut file = std::fs::OpenOptions::new().create(true).append(true).open(&ballast).expect("the ballast");
        while std::io::Write::write(&mut file, &[0; 4096]).is_ok_and(|n| n > 0) {}
    };
    assert_eq!(d.read(".sys/health"), "ok\n");
    m.bash("echo 'echo first; until [ -e /tmp/go ]; do sleep 0.05; done; head -c 2000000 /dev/zero; echo last; exit 3' > $D/exec; read -r line < $D/out").ok();
    m.bash("echo 'until [ -e /tmp/go ]; do sleep 0.05; done; exit 4' > $D/exec").ok();
    // The job is let go by a job, since the machine's own files are on the full disk.
    m.bash("echo 'sleep 3; : > /tmp/go' > $D/exec").ok();
    fill();
    let health = d.read(".sys/health");
    assert!(health.contains("full"), "{health}");
    m.bash("echo true > $D/exec").fails_with("No space left on device");
    m.bash("tail -n 1 $D/errors | grep ENOSPC").ok();
    assert_eq!(m.read("jobs/2/exit"), "4\n");
    assert_eq!(m.read("jobs/1/exit"), "3\n");
    let out = m.read("jobs/1/out");
    let text: String = out.chars().filter(|c| *c != '\0').collect();
    // The machine's own disk is on the same one.
    let reason = text.contains("the machine had no room for them") || text.contains("the host's disk was full");
    assert!(text.starts_with("first\n") && reason && !text.contains("output_limit"), "{text}");
    assert!(m.read("errors").contains("ENOSPC"), "{}", m.read("errors"));
    std::fs::remove_file(&ballast).expect("the ballast");
    assert!(eventually(60, || d.read(".sys/health") == "ok\n"), "{}", d.read(".sys/health"));
    assert_eq!(m.guest("echo again"), "again");
    // What ended while nothing could be written is written down now.
    m.bash("cat $D/jobs/3/exit").ok();
    std::thread::sleep(std::time::Duration::from_secs(4));
    d.crash();
    assert_eq!((m.read("jobs/1/exit"), m.read("jobs/2/exit")), ("3\n".to_string(), "4\n".to_string()));
    drop(m);
    d.end(libc::SIGTERM);
    drop(disk);
}

each_user_alone! {
    /// A silent agent is told as that, and not as the end of its machine; when it answers again all goes on, also when
    /// the daemon was restarted meanwhile.
    fn a_silent_agent(user) {
        if !user::am_root() {
            skip!("stopping a machine's init needs root");
        }
        let d = Daemon::start(user);
        let m = d.running("silent");
        m.bash("echo 'echo up; until [ -e /root/end ]; do sleep 0.05; done; exit 6' > $D/exec; read -r line < $D/out").ok();
        let init = m.init() as i32;
        let signal = |number| {
            // SAFETY: kill(2) has no memory effects; the process is the init of the test's own machine.
            assert_eq!(unsafe { libc::kill(init, number) }, 0);
        };
        signal(libc::SIGSTOP);
        assert!(eventually(60, || d.read(".sys/health").contains("does not answer")), "{}", d.read(".sys/health"));
        assert!(m.read("errors").contains("the agent did not answer"), "{}", m.read("errors"));
        assert_eq!(m.status(), "running");
        signal(libc::SIGCONT);
        assert!(eventually(60, || d.read(".sys/health") == "ok\n"), "{}", d.read(".sys/health"));
        signal(libc::SIGSTOP);
        d.crash();
        assert!(eventually(60, || d.read(".sys/health").contains("does not answer")), "{}", d.read(".sys/health"));
        let told = eventually(60, || m.read("errors").contains("the agent did not answer after the restart of the daemon"));
        assert!(told, "{}", m.read("errors"));
        assert_eq!(m.status(), "running");
        signal(libc::SIGCONT);
        assert!(eventually(60, || d.read(".sys/health") == "ok\n"), "{}", d.read(".sys/health"));
        assert!(eventually(60, || m.bash("touch $D/files/root/end").code == 0));
        assert_eq!((m.read("out"), m.read("exit")), ("up\n".to_string(), "6\n".to_string()));
        assert_eq!(m.init() as i32, init);
    }
}
