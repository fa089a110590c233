//! The agent as process 1 of a machine of its own.
#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use machinefs_protocol::job::ExitReason;
use machinefs_protocol::message::{Reply, Request};
use std::process::Command;
use support::*;

/// An agent in process and network namespaces of its own, and its number outside of them.
fn machine() -> Option<(Agent, i32)> {
    let unshare = ["--pid", "--net", "--mount", "--fork", "--kill-child", "--mount-proc"];
    let works = Command::new("unshare").args(unshare).arg("true").output();
    if !works.is_ok_and(|output| output.status.success()) {
        println!("skipped: no process namespace can be made here");
        return None;
    }
    let mut command = Command::new("unshare");
    command.args(unshare).arg(env!("CARGO_BIN_EXE_machinefs-agent")).arg("init");
    let agent = Agent::start_with(command);
    let outside = agent.process.id();
    let mut pid = None;
    wait_until("the agent runs", || {
        let children = std::fs::read_to_string(format!("/proc/{outside}/task/{outside}/children")).unwrap_or_default();
        pid = children.split_whitespace().next().and_then(|pid| pid.parse().ok());
        pid.is_some()
    });
    Some((agent, pid?))
}

/// Numbers and states of the children of a process.
fn children(of: i32) -> Vec<(i32, char)> {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    let stats = entries.filter_map(|entry| {
        let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
        let stat = std::fs::read_to_string(entry.path().join("stat")).ok()?;
        let mut fields = stat.rsplit_once(") ")?.1.split(' ');
        let state = fields.next()?.chars().next()?;
        let parent: i32 = fields.next()?.parse().ok()?;
        (parent == of).then_some((pid, state))
    });
    stats.collect()
}

/// Ends the machine, the proper way.
fn shut_down(mut agent: Agent, client: &Client) {
    assert_eq!(client.call(&Request::Shutdown { grace_ms: 0 }, &[]).unwrap().0, Reply::Ok);
    wait_until("its end", || !agent.is_alive());
    assert!(agent.process.wait().unwrap().success());
}

#[test]
fn orphans_are_reaped() {
    let Some((agent, pid)) = machine() else { return };
    let client = agent.client();
    let Ok((Reply::Info(info), _)) = client.call(&Request::Info, &[]) else { panic!() };
    assert!(info.is_init);
    // Double-forked, in sessions of their own; some end before the job, some after.
    let script = "for i in $(seq 100); do (setsid sleep 0.0$((i % 10)) &); done; exit 12";
    for job in 0..5 {
        client.start(job, script);
    }
    for _ in 0..5 {
        assert_eq!(client.ended().1.reason, ExitReason::Code(12), "no orphan's end is taken for a job's");
    }
    wait_until("none left", || children(pid).is_empty());
    shut_down(agent, &client);
}

#[test]
fn loopback_works() {
    let Some((agent, _)) = machine() else { return };
    let client = agent.client();
    let (_, log) = client.run(1, spec(), "exec 3<>/dev/tcp/127.0.0.1/9");
    assert!(stderr(&log).contains("refused"), "{}", stderr(&log));
    shut_down(agent, &client);
}

#[test]
fn a_forgotten_job_takes_what_descends_from_it_along() {
    let Some((agent, pid)) = machine() else { return };
    let client = agent.client();
    // A parent that lives, a parent that is dead but was of the job's session, each with a session of its own below.
    let script = "setsid sh -c 'setsid sleep 1000 & sleep 1000' & (sleep 1000 &) ; echo ready; sleep 1000";
    client.start(1, script);
    let stream = client.attach(1, 0);
    assert!(stream.next().is_some());
    wait_until("all of them run", || count(pid) >= 5);
    client.call(&Request::JobForget { job: 1 }, &[]).unwrap();
    wait_until("none left", || count(pid) == 0);
    shut_down(agent, &client);
}

/// How many processes descend from that one.
fn count(of: i32) -> usize {
    children(of).iter().map(|(pid, _)| 1 + count(*pid)).sum()
}

#[test]
fn a_terminate_signal_ends_the_machine_in_order() {
    let Some((mut agent, pid)) = machine() else { return };
    let client = agent.client();
    client.start(1, "(setsid sleep 1000 &); trap 'echo bye; exit 8' TERM; echo ready; while :; do sleep 0.01; done");
    let stream = client.attach(1, 0);
    let mut log = replica();
    log.append_records(&stream.next().unwrap().data).unwrap();
    // SAFETY: the process is the agent this test started, and is not waited for.
    unsafe {
        libc::kill(pid, libc::SIGTERM);
    }
    let end = client.follow(&stream, &mut log);
    assert_eq!((end.reason, stdout(&log).as_str()), (ExitReason::Code(8), "ready\nbye\n"));
    wait_until("its end", || !agent.is_alive());
    assert!(agent.process.wait().unwrap().success());
}

#[test]
fn what_ignores_the_end_is_killed() {
    let Some((mut agent, _)) = machine() else { return };
    let client = agent.client();
    client.start(1, "trap '' TERM; (setsid sleep 1000 &); echo ready; while :; do sleep 0.01; done");
    let stream = client.attach(1, 0);
    assert!(stream.next().is_some());
    assert_eq!(client.call(&Request::Shutdown { grace_ms: 200 }, &[]).unwrap().0, Reply::Ok);
    assert_eq!(client.ended().1.reason, ExitReason::Signal(9));
    wait_until("its end", || !agent.is_alive());
    assert!(agent.process.wait().unwrap().success());
}

#[test]
fn fork_bombs_are_killed_whole() {
    let Some((agent, pid)) = machine() else { return };
    let client = agent.client();
    // It keeps itself going at a bounded number: each that ends is replaced by another.
    let script = "f() { sleep 0.01; f & exit; }; for i in 1 2 3 4 5 6 7 8; do f & done; echo ready; sleep 1000";
    client.start(1, script);
    let stream = client.attach(1, 0);
    assert!(stream.next().is_some());
    client.call(&Request::JobSignal { job: 1, signal: libc::SIGKILL, all: true }, &[]).unwrap();
    assert_eq!(client.ended().1.reason, ExitReason::Signal(9));
    wait_until("none left", || count(pid) == 0);
    shut_down(agent, &client);
}
