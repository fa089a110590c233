//! Signals to jobs, as process 1 of a machine: to the group, to all, to what tries to escape.
#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use machinefs_protocol::job::{ExitReason, JobSpec};
use machinefs_protocol::message::{Failure, Request};
use std::process::Command;
use std::time::Duration;
use support::*;

/// A control group for a machine, removed with the value.
struct Group(std::path::PathBuf);

impl Group {
    fn new() -> Option<Group> {
        let mounts = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(std::path::PathBuf::from);
        let mount = mounts.into_iter().find(|mount| mount.join("cgroup.procs").exists())?;
        // Below the group this runs in, which may be all that is allowed.
        let own = std::fs::read_to_string("/proc/self/cgroup").ok()?;
        let own = own.lines().find_map(|line| line.strip_prefix("0::/"))?;
        let path = mount.join(own).join(format!("machinefs-test-{}", std::process::id()));
        std::fs::create_dir(&path).ok()?;
        Some(Group(path))
    }

    /// The jobs' groups in it.
    fn jobs(&self) -> Vec<String> {
        let entries = std::fs::read_dir(&self.0).unwrap().flatten();
        entries.filter(|entry| entry.path().is_dir()).map(|entry| entry.file_name().into_string().unwrap()).collect()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = std::fs::write(self.0.join("cgroup.kill"), "1");
        for _ in 0..500 {
            for job in self.jobs() {
                let _ = std::fs::remove_dir(self.0.join(job));
            }
            if std::fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        println!("left behind: {}", self.0.display());
    }
}

#[test]
fn a_control_group_holds_what_clears_its_environment() {
    let Some(group) = Group::new() else {
        println!("skipped: no control group can be made here");
        return;
    };
    let procs = std::ffi::CString::new(group.0.join("cgroup.procs").to_str().unwrap()).unwrap();
    let Some(agent) = machine_with(|command| {
        // SAFETY: only async-signal-safe calls, on memory of their own.
        unsafe {
            std::os::unix::process::CommandExt::pre_exec(command, move || {
                let fd = libc::open(procs.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
                if libc::write(fd, c"0".as_ptr().cast(), 1) == 1 {
                    Ok(())
                } else {
                    Err(std::io::Error::last_os_error())
                }
            });
        }
    }) else {
        return;
    };
    let client = agent.client();
    let script = "setsid env -i sh -c 'setsid sleep 1000 & exit' & sleep 0.2; echo ready; exit 3";
    // As another user, whose environment the agent may not even read.
    for (job, user) in [(1, ""), (2, "4711")] {
        client.start_spec(job, JobSpec { user: user.into(), ..spec() }, script.as_bytes());
        assert_eq!(client.ended().1.reason, ExitReason::Code(3));
        assert_eq!(group.jobs().len(), 1, "{:?}", group.jobs());
        assert_eq!(others(&client, 1000 + job), 1);
        // The daemon goes on, also when its job is forgotten.
        client.call(&Request::JobForget { job }, &[]).unwrap();
        assert_eq!(signal(&client, job + 5, libc::SIGKILL, true).unwrap_err().errno, libc::ENOENT);
        signal(&client, job, 0, true).unwrap();
        signal(&client, job, libc::SIGKILL, true).unwrap();
        assert_eq!(others(&client, 2000 + job), 0);
        assert!(group.jobs().is_empty(), "{:?}", group.jobs());
    }
    client.start(3, "(setsid sleep 1000 &); sleep 1000");
    assert_eq!(group.jobs().len(), 1);
    client.call(&Request::JobForget { job: 3 }, &[]).unwrap();
    wait_until("its group is gone", || {
        // Groups that were not empty are looked at again with the next job.
        client.run(4, spec(), "true");
        client.call(&Request::JobForget { job: 4 }, &[]).unwrap();
        group.jobs().is_empty()
    });
    drop(agent);
}

/// An agent as process 1 of a process namespace of its own.
fn machine() -> Option<Agent> {
    machine_with(|_| {})
}

fn machine_with(prepare: impl FnOnce(&mut Command)) -> Option<Agent> {
    let unshare = ["--pid", "--mount", "--fork", "--kill-child", "--mount-proc"];
    let works = Command::new("unshare").args(unshare).arg("true").output();
    if !works.is_ok_and(|output| output.status.success()) {
        println!("skipped: no process namespace can be made here");
        return None;
    }
    let mut command = Command::new("unshare");
    command.args(unshare).arg(env!("CARGO_BIN_EXE_machinefs-agent")).arg("init");
    prepare(&mut command);
    Some(Agent::start_with(command))
}

fn signal(client: &Client, job: u64, signal: i32, all: bool) -> Result<(), Failure> {
    client.call(&Request::JobSignal { job, signal, all }, &[]).map(|_| ())
}

/// What a job prints that leaves nothing behind.
fn printed(client: &Client, job: u64, script: &str) -> String {
    let argv = ["sh", "-c", script].map(|arg| arg.as_bytes().to_vec());
    let (_, log) = client.run(job, JobSpec { argv: argv.into(), ..spec() }, "");
    client.call(&Request::JobForget { job }, &[]).unwrap();
    stdout(&log)
}

/// How many processes there are besides the agent and those that count them. `job` is a free number.
fn others(client: &Client, job: u64) -> usize {
    let script = "n=0; for p in /proc/[0-9]*; do readlink -q $p/exe >/dev/null && n=$((n+1)); done; echo $n";
    printed(client, job, script).trim().parse::<usize>().unwrap().saturating_sub(2)
}

#[test]
fn what_has_left_the_session_and_lost_its_parents_is_killed_too() {
    let Some(agent) = machine() else { return };
    let client = agent.client();
    // Forked twice with sessions of their own, and nobody between them and process 1 any more. The last one has no
    // environment left, but a parent that has.
    let script = "setsid sh -c 'setsid sh -c \"sleep 1000 & sleep 1000\" & exit' & \
                  setsid sh -c 'env -i sleep 1000 & sleep 1000' & sleep 0.3; echo ready; sleep 1000";
    client.start(1, script);
    let stream = client.attach(1, 0);
    assert!(stream.next().is_some());
    // Another job's are not its own.
    client.start(2, "setsid sh -c 'setsid sleep 1000 & exit' & exec sleep 1000");
    wait_until("all run", || others(&client, 1000) >= 7);
    signal(&client, 1, libc::SIGKILL, true).unwrap();
    assert_eq!(client.ended(), (1, client.job(1).end.unwrap()));
    assert_eq!(others(&client, 1001), 2, "none of the one, all of the other");
    assert_eq!(signal(&client, 1, libc::SIGKILL, true).unwrap_err().errno, libc::ESRCH);
    signal(&client, 2, libc::SIGTERM, true).unwrap();
    assert_eq!(client.ended().0, 2);
    wait_until("all gone", || others(&client, 1002) == 0);
}

#[test]
fn what_a_job_has_left_behind_can_still_be_reached() {
    let Some(agent) = machine() else { return };
    let client = agent.client();
    let trap = "trap 'echo got it; exit' USR1; echo ready; while :; do sleep 0.01; done";
    let file = agent.dir.path().join("heard");
    std::fs::write(agent.dir.path().join("trap"), trap).unwrap();
    let script = format!(
        "sh {0}/trap > {1} & setsid sleep 1000 & while ! grep -q ready {1}; do sleep 0.01; done; exit 5",
        agent.dir.path().display(),
        file.display()
    );
    client.start(1, script);
    assert_eq!(client.ended().1.reason, ExitReason::Code(5));
    // It may or may not have a sleep of its own at the moment.
    assert!((2..=3).contains(&others(&client, 1000)));
    // The group lives on without its leader; the daemon is not of it.
    signal(&client, 1, libc::SIGUSR1, false).unwrap();
    wait_until("it heard", || std::fs::read_to_string(&file).unwrap().contains("got it"));
    wait_until("the group is gone", || signal(&client, 1, 0, false).is_err());
    assert_eq!(signal(&client, 1, libc::SIGTERM, false).unwrap_err().errno, libc::ESRCH);
    // Also when the job itself is forgotten.
    client.call(&Request::JobForget { job: 1 }, &[]).unwrap();
    assert_eq!(signal(&client, 1, libc::SIGTERM, false).unwrap_err().errno, libc::ESRCH);
    signal(&client, 1, libc::SIGKILL, true).unwrap();
    assert_eq!(others(&client, 1001), 0);
    assert_eq!(signal(&client, 1, libc::SIGKILL, true).unwrap_err().errno, libc::ENOENT);
}

#[test]
fn a_fork_bomb_is_killed_whole() {
    let Some(agent) = machine() else { return };
    let client = agent.client();
    // It must not get loose, whatever fails here: it begins only under a limit that is seen to be set (dash has no
    // `ulimit -u`, so the shell is bash), and each of its processes ends by itself after a time.
    let script = "ulimit -u 300 && [ \"$(ulimit -u)\" = 300 ] || exit 99; export END=$((EPOCHSECONDS + 40)); \
                  export B='while [ $EPOCHSECONDS -lt $END ]; do setsid bash -c \"$B\" & sleep 0.01; done'; \
                  [ \"$END\" -gt 1000 ] && bash -c \"$B\" & sleep 60; exit 0";
    let bomb = |timeout_ms: u64| JobSpec { user: b"47110".into(), shell: b"bash".into(), timeout_ms, ..spec() };
    client.start_spec(1, bomb(0), script.as_bytes());
    wait_until("it grows", || others(&client, 1000) > 100);
    signal(&client, 1, libc::SIGKILL, true).unwrap();
    let mut ended = client.ended();
    while ended.0 != 1 {
        ended = client.ended();
    }
    assert_eq!(others(&client, 1001), 0);
    assert_eq!(ended.1.reason, ExitReason::Signal(9));
    // One past its time is, too.
    client.start_spec(2, bomb(300), script.as_bytes());
    while client.ended().0 != 2 {}
    wait_until("all gone", || others(&client, 1002) == 0);
    assert_eq!(client.job(2).end.unwrap().reason, ExitReason::Timeout);
}

#[test]
fn stopping_and_going_on() {
    let Some(agent) = machine() else { return };
    let client = agent.client();
    let pid = client.start(1, "setsid sh -c 'while :; do :; done' & while :; do :; done");
    wait_until("it runs", || client.job(1).cpu_micros > 10_000);
    signal(&client, 1, libc::SIGSTOP, true).unwrap();
    let state = || printed(&client, 10, &format!("cut -d' ' -f3 < /proc/{pid}/stat"));
    wait_until("it is stopped", || state() == "T\n");
    signal(&client, 1, libc::SIGCONT, true).unwrap();
    wait_until("it goes on", || state() == "R\n");
    client.call(&Request::JobForget { job: 1 }, &[]).unwrap();
    wait_until("all gone", || others(&client, 1000) == 0);
}
