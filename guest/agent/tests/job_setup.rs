//! What a job finds itself in: signals, limits, descriptors, its exit code, and where its output is kept.
#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use machinefs_protocol::file::{FileReply, FileRequest, Owner, ROOT};
use machinefs_protocol::job::{ExitReason, JobSpec};
use machinefs_protocol::joblog::Filter;
use machinefs_protocol::message::{Reply, Request};
use std::collections::HashMap;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;
use support::*;

fn argv(args: &[&str]) -> JobSpec {
    JobSpec { argv: args.iter().map(|arg| arg.as_bytes().to_vec()).collect(), ..spec() }
}

/// An agent that was started with odd signals, limits, descriptors and umask.
fn odd_agent() -> Agent {
    let mut command = Command::new(env!("CARGO_BIN_EXE_machinefs-agent"));
    command.arg("serve").env("LEAKED", "from the agent");
    // SAFETY: only async-signal-safe calls, on memory of their own.
    unsafe {
        command.pre_exec(|| {
            for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTSTP, libc::SIGCHLD, libc::SIGPIPE, 40] {
                libc::signal(signal, libc::SIG_IGN);
            }
            let mut set = std::mem::zeroed::<libc::sigset_t>();
            libc::sigfillset(&mut set);
            libc::sigprocmask(libc::SIG_SETMASK, &set, std::ptr::null_mut());
            let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
            libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit);
            limit.rlim_cur = 333;
            libc::setrlimit(libc::RLIMIT_NOFILE, &limit);
            libc::umask(0o077);
            // Two that are not closed by an execve(2).
            libc::dup2(0, 77);
            libc::dup2(0, 300);
            Ok(())
        });
    }
    Agent::start_with(command)
}

fn descriptors(agent: &Agent) -> Vec<(PathBuf, PathBuf)> {
    let dir = std::fs::read_dir(format!("/proc/{}/fd", agent.process.id())).unwrap();
    dir.flatten().filter_map(|entry| Some((entry.path(), std::fs::read_link(entry.path()).ok()?))).collect()
}

fn threads(agent: &Agent) -> usize {
    std::fs::read_dir(format!("/proc/{}/task", agent.process.id())).unwrap().count()
}

#[test]
fn an_environment_larger_than_a_message_and_lists_of_many_jobs() {
    let agent = Agent::start();
    let client = agent.client();
    let env = (0..5000).map(|i| format!("V{i}={i:060}").into_bytes()).collect();
    let (_, log) = client.run(1, JobSpec { env, ..spec() }, "echo $V0 $V4999");
    assert_eq!(stdout(&log).trim_end(), format!("{:060} {:060}", 0, 4999));
    let many = 3000u64;
    let missing = JobSpec { cwd: b"/no/such/directory".into(), ..spec() };
    let starts: Vec<Pending> = (2..many).map(|job| client.send_start(job, &missing, b"true")).collect();
    assert!(starts.iter().all(|start| start.wait().is_ok()));
    let jobs: Vec<u64> = client.jobs().iter().map(|info| info.job).collect();
    assert_eq!(jobs, (1..many).collect::<Vec<_>>());
    let (spec_len, body) = spec().start_body(b"true").unwrap();
    for wrong in [0, spec_len - 1, spec_len + 1, u32::MAX] {
        let refused = client.call(&Request::JobStart { job: many, spec_len: wrong }, &body);
        assert_eq!(refused.unwrap_err().errno, libc::EINVAL, "{wrong} for {spec_len}");
    }
    assert!(client.start_spec(many, spec(), b"true").1 > 0, "and nothing is left of what was refused");
}

#[test]
fn every_exit_code_and_every_signal() {
    let agent = Agent::start();
    let client = agent.client();
    let starts: Vec<Pending> =
        (0..256u64).map(|job| client.send_start(job, &spec(), format!("exit {job}").as_bytes())).collect();
    assert!(starts.iter().all(|start| matches!(start.wait(), Ok((Reply::Started { pid: 1.., .. }, _)))));
    let mut ends = HashMap::new();
    while ends.len() < 256 {
        let (job, end) = client.ended();
        assert!(ends.insert(job, end.reason).is_none(), "told twice");
    }
    assert!((0..256).all(|job| ends[&job] == ExitReason::Code(job as u8)));
    // All but those that stop a process or do nothing to it.
    let harmless = [libc::SIGCHLD, libc::SIGCONT, libc::SIGSTOP, libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU];
    let harmless = [harmless.as_slice(), &[libc::SIGURG, libc::SIGWINCH]].concat();
    for signal in (1..=64).filter(|signal| !harmless.contains(signal)) {
        let job = 1000 + signal as u64;
        let program = format!("ulimit -c 0; kill -{signal} $$; sleep 100");
        client.start_spec(job, argv(&["/bin/sh", "-c", &program]), b"");
        let (ended, end) = client.ended();
        assert_eq!((ended, end.reason), (job, ExitReason::Signal(signal as u8)));
        assert_eq!(i32::from(end.reason.code()), 128 + signal);
    }
}

#[test]
fn a_job_starts_as_if_from_a_fresh_login() {
    let agent = odd_agent();
    let client = agent.client();
    let (_, log) = client.run(1, argv(&["sed", "-nE", "/^(Sig(Blk|Ign)|Umask):/p", "/proc/self/status"]), "");
    let none = "0000000000000000";
    assert_eq!(stdout(&log), format!("Umask:\t0022\nSigBlk:\t{none}\nSigIgn:\t{none}\n"));
    let (_, log) = client.run(2, argv(&["/bin/sh", "-c", "ulimit -Sn; ulimit -Hn; echo \"<$LEAKED>\""]), "");
    let hard = std::fs::read_to_string("/proc/self/limits").unwrap();
    let hard = hard.lines().find(|line| line.starts_with("Max open files")).unwrap();
    let hard = hard.split_whitespace().nth(4).unwrap();
    assert_eq!(stdout(&log), format!("333\n{hard}\n<>\n"));
    let own = std::fs::read_to_string(format!("/proc/{}/limits", agent.process.id())).unwrap();
    let own = own.lines().find(|line| line.starts_with("Max open files")).unwrap();
    assert_eq!(own.split_whitespace().nth(3).unwrap(), hard, "the agent itself takes all it may");
    // Neither those the agent was given nor its own reach a job, whatever kind it is.
    let list = argv(&["ls", "/proc/self/fd"]);
    let kinds = [
        (list.clone(), "0\n1\n2\n3\n"),
        (JobSpec { stdin: true, ..list.clone() }, "0\n1\n2\n3\n"),
        (JobSpec { tty: Some((24, 80)), ..list }, "0  1  2  3\r\n"),
    ];
    for (at, (spec, expected)) in kinds.into_iter().enumerate() {
        let (_, log) = client.run(10 + at as u64, spec, "");
        assert_eq!(stdout(&log), expected);
    }
    for (at, script) in
        ["ls /proc/$$/fd".to_owned(), format!("ls /proc/$$/fd # {}", "x".repeat(100_000))].iter().enumerate()
    {
        let (_, log) = client.run(20 + at as u64, JobSpec { shell: b"sh".into(), ..spec() }, script);
        let mut open: Vec<u32> = stdout(&log).lines().map(|line| line.parse().unwrap()).collect();
        open.sort_unstable();
        // The shell itself has its script open, if that is a file.
        assert!(
            open.starts_with(&[0, 1, 2]) && open.len() <= 4 && !open.iter().any(|fd| [77, 300].contains(fd)),
            "{open:?}"
        );
    }
}

#[test]
fn the_file_service_and_jobs_have_their_own_umasks() {
    let agent = odd_agent();
    let client = agent.client();
    let dir = agent.dir.path();
    let mut node = ROOT;
    for name in dir.components().skip(1) {
        let lookup = Request::File(FileRequest::Lookup { parent: node, name: name.as_os_str().as_bytes() });
        let Ok((Reply::File(FileReply::Entry(entry)), _)) = client.call(&lookup, &[]) else { panic!("lookup") };
        node = entry.node;
    }
    let owner = Owner::default();
    let make = FileRequest::MkDir { parent: node, name: b"by-host", mode: 0o777, umask: 0o002, owner };
    client.call(&Request::File(make), &[]).unwrap();
    client.run(1, spec(), format!("mkdir {0}/by-job; : > {0}/by-job/file", dir.display()));
    let mode = |path: &str| std::fs::metadata(dir.join(path)).unwrap().permissions().mode() & 0o7777;
    assert_eq!((mode("by-host"), mode("by-job"), mode("by-job/file")), (0o775, 0o755, 0o644));
}

#[test]
fn a_large_log_is_in_a_bounded_file_without_a_name() {
    let agent = Agent::start();
    let client = agent.client();
    let before: Vec<PathBuf> = descriptors(&agent).into_iter().map(|(_, target)| target).collect();
    let small = client.start(1, "echo small; sleep 1000");
    let limit = 1 << 20;
    let script = "head -c 50000000 /dev/zero; echo; echo end; exec sleep 1000";
    client.start_spec(2, JobSpec { output_limit: limit, ..spec() }, script.as_bytes());
    let comm = || std::fs::read_to_string(format!("/proc/{}/comm", client.job(2).pid)).unwrap_or_default();
    wait_until("its output", || client.job(2).log_end > 50_000_000 && comm() == "sleep\n");
    let logs: Vec<(PathBuf, PathBuf)> = descriptors(&agent)
        .into_iter()
        .filter(|(_, target)| {
            let target = target.as_os_str().as_bytes();
            target.starts_with(b"/")
                && target.ends_with(b"(deleted)")
                && !before.iter().any(|b| b.as_os_str().as_bytes() == target)
        })
        .collect();
    assert_eq!(logs.len(), 1, "{logs:?}");
    let size = std::fs::metadata(&logs[0].0).unwrap().len();
    assert!(size > limit / 2 && size <= limit + 4096, "{size} bytes in {:?}", logs[0].1);
    assert!(agent.rss() < 64 * 1024, "{} KiB", agent.rss());
    client.call(&Request::JobSignal { job: 2, signal: libc::SIGKILL, all: false }, &[]).unwrap();
    let stream = client.attach(2, 0);
    let mut log = replica();
    client.follow(&stream, &mut log);
    let (kept, lost) = output(&log, Filter::Stdout);
    assert_eq!(kept.len() as u64 + lost, 50_000_005);
    assert!(lost > 0 && kept.ends_with(b"\0\nend\n"));
    client.call(&Request::JobForget { job: 2 }, &[]).unwrap();
    wait_until("the file gone", || !descriptors(&agent).iter().any(|(_, target)| *target == logs[0].1));
    assert!(lives(small as i32));
}

#[test]
fn a_thousand_jobs_leave_nothing_in_the_agent() {
    let agent = Agent::start();
    let client = agent.client();
    let one = |job: u64| {
        let fed = JobSpec { stdin: job.is_multiple_of(3), tty: job.is_multiple_of(5).then_some((24, 80)), ..spec() };
        client.start_spec(job, fed, b"head -c 100000 /dev/zero; exit 1");
        if job.is_multiple_of(3) {
            // It may have ended by now.
            let stream = client.send(&Request::JobStdin { job, offset: 0 }, &[], 0);
            if stream.wait().is_ok() {
                client.data(stream.tag, b"unread");
            }
        }
        let stream = client.attach(job, 0);
        let mut log = replica();
        assert_eq!(client.follow(&stream, &mut log).reason, ExitReason::Code(1));
        client.call(&Request::JobForget { job }, &[]).unwrap();
    };
    (0..150).for_each(one);
    let (open, running, size) = (descriptors(&agent).len(), threads(&agent), agent.rss());
    (1000..2000).for_each(one);
    assert!(client.jobs().is_empty());
    wait_until("descriptors closed", || descriptors(&agent).len() <= open);
    assert!(threads(&agent) <= running + 2, "{} threads after {running}", threads(&agent));
    assert!(agent.rss() < size + 4096, "{} KiB after {size}", agent.rss());
}

#[test]
fn a_hundred_jobs_at_once_leave_nothing_in_the_agent() {
    let agent = Agent::start();
    let client = agent.client();
    let round = |from: u64| {
        let jobs = from..from + 100;
        for job in jobs.clone() {
            let fed = JobSpec { stdin: true, tty: job.is_multiple_of(2).then_some((24, 80)), ..spec() };
            client.start_spec(job, fed, b"read line; exit 7");
        }
        assert!(client.jobs().iter().filter(|info| info.end.is_none()).count() == 100, "all of them wait");
        for job in jobs.clone() {
            let (stream, _) = client.open_stdin(job, 0);
            client.data(stream.tag, b"go\n");
        }
        for _ in jobs.clone() {
            assert_eq!(client.ended().1.reason, ExitReason::Code(7));
        }
        for job in jobs {
            client.call(&Request::JobForget { job }, &[]).unwrap();
        }
    };
    round(0);
    let (open, running, size) = (descriptors(&agent).len(), threads(&agent), agent.rss());
    (1..6).for_each(|at| round(1000 * at));
    wait_until("descriptors closed", || descriptors(&agent).len() <= open);
    // How many requests are executed at once is chance, and bounded: one thread a job would be 500 more.
    assert!(threads(&agent) <= running + 32, "{} threads after {running}", threads(&agent));
    assert!(agent.rss() < size + 4096, "{} KiB after {size}", agent.rss());
}

#[test]
fn forgotten_jobs_do_not_push_out_others() {
    let agent = Agent::start();
    let client = agent.client();
    client.start(1, "echo kept; exit 3");
    assert_eq!(client.ended().0, 1);
    // Each has a log in a file, of which there may be few.
    for job in 2..300 {
        client.start(job, "head -c 100000 /dev/zero");
        assert_eq!(client.ended().0, job);
        client.call(&Request::JobForget { job }, &[]).unwrap();
    }
    let stream = client.attach(1, 0);
    let mut log = replica();
    assert_eq!(client.follow(&stream, &mut log).reason, ExitReason::Code(3));
    assert_eq!(stdout(&log), "kept\n");
    // Those that nobody forgets are bounded; the oldest go.
    for job in 300..500 {
        client.start(job, "head -c 100000 /dev/zero");
        client.ended();
    }
    assert!(descriptors(&agent).len() < 180, "{} descriptors", descriptors(&agent).len());
    assert_eq!(client.call(&Request::JobAttach { job: 300, offset: 0 }, &[]).unwrap_err().errno, libc::ENOENT);
    assert!(client.job(499).end.is_some());
    assert!(client.events.recv_timeout(Duration::from_millis(50)).is_err());
}
