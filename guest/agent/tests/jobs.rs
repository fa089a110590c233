//! Jobs: how they start, what they print, how they end.
#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use machinefs_protocol::job::{ExitReason, INITIAL_CREDIT, JobSpec, Source, parse_record_header};
use machinefs_protocol::joblog::{Filter, JobLog};
use machinefs_protocol::message::{Reply, Request};
use std::collections::HashMap;
use std::time::{Duration, Instant};
use support::*;

fn argv(args: &[&str]) -> JobSpec {
    JobSpec { argv: args.iter().map(|arg| arg.as_bytes().to_vec()).collect(), ..spec() }
}

fn is_root() -> bool {
    // SAFETY: takes nothing and cannot fail.
    unsafe { libc::geteuid() == 0 }
}

#[test]
fn output_and_code() {
    let agent = Agent::start();
    let client = agent.client();
    let (end, log) = client.run(1, spec(), "echo out; echo err >&2; exit 3");
    assert_eq!(end.reason, ExitReason::Code(3));
    assert_eq!((stdout(&log).as_str(), stderr(&log).as_str()), ("out\n", "err\n"));
    let info = client.job(1);
    assert_eq!((info.pid, info.end), (0, Some(end)));
    assert!(end.ended_ms >= info.started_ms && info.started_ms > 1_600_000_000_000);
    // It can be read again, any number of times, each time to the end.
    for _ in 0..3 {
        let stream = client.attach(1, 0);
        let mut again = replica();
        assert_eq!(client.follow(&stream, &mut again), end);
        assert_eq!(stdout(&again), "out\n");
    }
    let taken = client.send_start(1, &spec(), b"true").wait();
    assert_eq!(taken.unwrap_err().errno, libc::EEXIST);
    client.call(&Request::JobForget { job: 1 }, &[]).unwrap();
    for request in [
        Request::JobForget { job: 1 },
        Request::JobAttach { job: 1, offset: 0 },
        Request::JobSignal { job: 1, signal: 9, all: false },
    ] {
        assert_eq!(client.call(&request, &[]).unwrap_err().errno, libc::ENOENT);
    }
    assert!(client.jobs().is_empty());
    assert_eq!(client.run(1, spec(), "exit 4").0.reason, ExitReason::Code(4), "a forgotten number is free");
}

#[test]
fn a_hundred_jobs_at_once_have_their_own_codes() {
    let agent = Agent::start();
    let client = agent.client();
    let starts: Vec<Pending> = (0..100u64)
        .map(|job| {
            // Half of them end at once, the others with orphans and children of their own.
            let script = if job % 2 == 0 {
                format!("exit {job}")
            } else {
                format!("(sleep 0.0{} & ) ; for i in 1 2 3; do /bin/true; done; exit {job}", job % 10)
            };
            client.send_start(job, &spec(), script.as_bytes())
        })
        .collect();
    for start in starts {
        assert!(matches!(start.wait(), Ok((Reply::Started { pid: 1.., .. }, _))));
    }
    let mut codes = HashMap::new();
    for _ in 0..100 {
        let (job, end) = client.ended();
        assert!(codes.insert(job, end.reason).is_none(), "told twice");
    }
    for job in 0..100 {
        assert_eq!(codes[&job], ExitReason::Code(job as u8));
    }
}

#[test]
fn bytes_are_exact() {
    let agent = Agent::start();
    let client = agent.client();
    let path = agent.dir.path().join("bytes");
    let bytes: Vec<u8> = (0..=255u8).cycle().take(700_001).collect();
    std::fs::write(&path, &bytes).unwrap();
    let (end, log) = client.run(1, argv(&["cat", path.to_str().unwrap()]), "");
    assert_eq!(end.reason, ExitReason::Code(0));
    assert!(output(&log, Filter::Stdout).0 == bytes);
    let mut limited = argv(&["/bin/sh", "-c", "printf 'a\\000\\377b'; printf '\\000' >&2"]);
    limited.output_limit = 0;
    let (_, log) = client.run(2, limited, "");
    assert_eq!(output(&log, Filter::Stdout).0, b"a\0\xffb");
    assert_eq!(output(&log, Filter::Stderr).0, b"\0");
}

#[test]
fn records_keep_the_order_of_both_outputs() {
    let agent = Agent::start();
    let client = agent.client();
    let script = "for i in 1 2 3 4 5; do echo o$i; sleep 0.05; echo e$i >&2; sleep 0.05; done";
    let (_, log) = client.run(1, spec(), script);
    let all = String::from_utf8(output(&log, Filter::All).0).unwrap();
    assert_eq!(all, "o1\ne1\no2\ne2\no3\ne3\no4\ne4\no5\ne5\n");
}

#[test]
fn much_output_with_a_slow_reader_is_bounded() {
    let agent = Agent::start();
    let client = agent.client();
    const TOTAL: u64 = 300 * 1000 * 1000;
    let mut limited = spec();
    limited.output_limit = 8 << 20;
    // Numbered lines, so that every piece shows where it belongs.
    let program = "awk 'BEGIN { for (i = 0; i < 30000000; i++) printf \"%09d\\n\", i }'";
    client.start_spec(1, limited, program.as_bytes());
    let stream = client.attach(1, 0);
    // The reader takes its first credit's worth, and then nothing until the job has ended.
    wait_until("the job's end", || client.job(1).end.is_some());
    let end = client.job(1).end.unwrap();
    assert_eq!(end.reason, ExitReason::Code(0), "an unread output blocks nobody");
    assert!(end.log_end > TOTAL);
    assert!(agent.rss() < 64 * 1024, "{} KiB", agent.rss());
    let mut log = replica();
    let mut received = 0;
    let mut gaps = 0;
    while log.end() < end.log_end {
        let frame = stream.next().unwrap();
        received += frame.data.len() as u64;
        let header = parse_record_header(*frame.data.first_chunk().unwrap()).unwrap();
        gaps += usize::from(header.0 == Source::Gap);
        log.append_records(&frame.data).unwrap();
        client.credit(stream.tag, frame.data.len() as u64);
    }
    assert_eq!(client.ended(), (1, end));
    assert_eq!((gaps, log.totals().stdout), (1, TOTAL));
    assert!(received <= (8 << 20) + INITIAL_CREDIT + (1 << 20), "{received} bytes were kept");
    let (bytes, lost) = output(&log, Filter::Stdout);
    assert_eq!(bytes.len() as u64 + lost, TOTAL);
    let gap = bytes.windows(10).enumerate().find(|(at, _)| {
        let line =
            |from: usize| std::str::from_utf8(&bytes[from..from + 9]).ok().and_then(|text| text.parse::<u64>().ok());
        at % 10 == 0 && line(*at) != Some(*at as u64 / 10)
    });
    let head = gap.map(|(at, _)| at as u64).unwrap();
    assert!(head >= (4 << 20) - 70_000, "the first half is there: {head}");
    assert!(bytes.ends_with(b"029999999\n") || bytes.ends_with(b"29999999\n"));
    // Counted from the end, the rest is whole too.
    let tail = bytes.len() as u64 - head;
    let line = |n: u64| format!("{n:09}\n");
    let whole: String = ((TOTAL - tail) / 10 + 2..TOTAL / 10).map(line).collect();
    assert!(bytes.ends_with(whole.as_bytes()));
}

#[test]
fn a_lost_link_loses_and_doubles_nothing() {
    let agent = Agent::start();
    let mut log = replica();
    let mut client = agent.client();
    let script = "i=0; while [ $i -lt 4000 ]; do echo line $i; echo error $i >&2; i=$((i+1)); done";
    let mut large = spec();
    large.output_limit = 64 << 20;
    client.start_spec(5, large, script.as_bytes());
    let mut ended = None;
    while ended.is_none() {
        let stream = client.attach(5, log.end());
        for _ in 0..30 {
            if let Some(frame) = stream.next_within(Duration::from_millis(20)) {
                log.append_records(&frame.data).unwrap();
            } else if let Some((_, end)) = client.job(5).end.map(|end| (5, end))
                && log.end() == end.log_end
            {
                ended = Some(end);
                break;
            }
        }
        // In the middle of whatever is under way.
        client.stream.shutdown(std::net::Shutdown::Both).unwrap();
        client = agent.client();
    }
    let expected: String = (0..4000).map(|i| format!("line {i}\n")).collect();
    let errors: String = (0..4000).map(|i| format!("error {i}\n")).collect();
    assert!(stdout(&log) == expected && stderr(&log) == errors);
    assert_eq!(ended.unwrap().reason, ExitReason::Code(0));
    let wrong = client.call(&Request::JobAttach { job: 5, offset: 1 }, &[]);
    assert_eq!(wrong.unwrap_err().errno, libc::EINVAL, "no record begins there");
    let wrong = client.call(&Request::JobAttach { job: 5, offset: u64::MAX }, &[]);
    assert_eq!(wrong.unwrap_err().errno, libc::EINVAL);
}

#[test]
fn several_readers_and_the_end_after_all_of_them() {
    let agent = Agent::start();
    let client = agent.client();
    let mut large = spec();
    large.output_limit = 64 << 20;
    client.start_spec(1, large, b"head -c 20000000 /dev/zero");
    let streams: Vec<Pending> = (0..5).map(|_| client.attach(1, 0)).collect();
    let mut logs: Vec<JobLog> = (0..5).map(|_| replica()).collect();
    wait_until("the job's end", || client.job(1).end.is_some());
    let end = client.job(1).end.unwrap();
    for (at, (stream, log)) in streams.iter().zip(&mut logs).enumerate() {
        assert!(client.events.try_recv().is_err(), "told before stream {at} was read");
        while log.end() < end.log_end {
            let frame = stream.next().unwrap();
            log.append_records(&frame.data).unwrap();
            client.credit(stream.tag, frame.data.len() as u64);
        }
        assert_eq!(log.totals().stdout, 20_000_000);
    }
    assert_eq!(client.ended(), (1, end));
}

#[test]
fn what_cannot_start_says_why() {
    let agent = Agent::start();
    let client = agent.client();
    let data = agent.dir.path().join("data");
    std::fs::write(&data, "text").unwrap();
    let cases: Vec<(JobSpec, &[u8], i32, &str)> = vec![
        (argv(&["no-such-program"]), b"", libc::ENOENT, "no-such-program: No such file"),
        (argv(&["/no/such/program"]), b"", libc::ENOENT, "/no/such/program: No such file"),
        (argv(&[data.to_str().unwrap()]), b"", libc::EACCES, "Permission denied"),
        (JobSpec { cwd: b"/no/such/directory".into(), ..spec() }, b"true", libc::ENOENT, "/no/such/directory"),
        (JobSpec { user: b"no-such-user".into(), ..spec() }, b"true", libc::EINVAL, "no-such-user"),
        (JobSpec { shell: b"no-such-shell".into(), ..spec() }, b"true", libc::ENOENT, "no-such-shell"),
        (JobSpec { env: vec![b"broken".into()], ..spec() }, b"true", libc::EINVAL, "environment"),
        (spec(), b"#!/no/such/interpreter -x\n", libc::ENOENT, "interpreter /no/such/interpreter is missing"),
    ];
    for (job, (spec, script, errno, text)) in cases.into_iter().enumerate() {
        let job = job as u64;
        assert_eq!(client.start_spec(job, spec, script).1, 0);
        assert_eq!(client.ended().1.reason, ExitReason::NotStarted(errno), "{text}");
        let stream = client.attach(job, 0);
        let mut log = replica();
        client.follow(&stream, &mut log);
        let message = stderr(&log);
        assert!(message.contains(text) && message.lines().count() == 1, "{message:?} instead of {text:?}");
    }
}

#[test]
fn scripts_of_every_kind() {
    let agent = Agent::start();
    let client = agent.client();
    let mut job = 0;
    let mut run = |spec: JobSpec, script: &[u8]| {
        job += 1;
        client.run(job, spec, script)
    };
    // Over what fits into an argument; the lines must all be run, the last one too.
    for size in [60_000, 70_000, 2 << 20, 16 << 20] {
        let mut script = b"n=0\n".to_vec();
        while script.len() < size {
            script.extend(format!(": '{}'\n", "x".repeat(4000)).bytes());
        }
        script.extend(b"echo $n whole\n");
        for shell in ["bash", "sh", ""] {
            let (end, log) = run(JobSpec { shell: shell.into(), ..spec() }, &script);
            assert_eq!((end.reason, stdout(&log).as_str()), (ExitReason::Code(0), "0 whole\n"), "{shell} {size}");
        }
    }
    let (end, log) = run(spec(), b"#!/bin/sh -e\necho \"$-\"\nfalse\necho not\n");
    assert_eq!(end.reason, ExitReason::Code(1));
    assert!(stdout(&log).contains('e') && !stdout(&log).contains("not"));
    let (end, log) = run(spec(), b"#!/usr/bin/env python3\nimport sys\nprint('from python'); sys.exit(7)\n");
    assert_eq!((end.reason, stdout(&log).as_str()), (ExitReason::Code(7), "from python\n"));
    // A script that reads itself sees what was sent, byte for byte.
    let mut own = b"#!/bin/sh\ncat \"$0\"; exit\n".to_vec();
    own.extend((0..=255u8).cycle().take(100_000));
    let (_, log) = run(spec(), &own);
    assert!(output(&log, Filter::Stdout).0 == own);
    let (_, log) = run(spec(), b"-f() { :; }; echo dash");
    assert!(!stderr(&log).contains("option"), "{}", stderr(&log));
    assert_eq!(run(spec(), b"").0.reason, ExitReason::Code(0));
    // No file is left, and none of the agent's descriptors is in the job.
    let (_, log) = run(argv(&["ls", "/proc/self/fd"]), b"");
    assert_eq!(stdout(&log), "0\n1\n2\n3\n");
    let left = |place: &str| {
        std::fs::read_dir(place)
            .map(|dir| {
                dir.flatten()
                    .filter(|entry| entry.file_name().to_string_lossy().contains(&format!(".{}-", agent.process.id())))
                    .count()
            })
            .unwrap_or(0)
    };
    assert_eq!(["/run/machinefs", "/tmp/machinefs", "/var/tmp/machinefs"].map(left), [0; 3]);
}

#[test]
fn surroundings() {
    let agent = Agent::start();
    let client = agent.client();
    let env = vec![b"A=1".to_vec(), b"A=2".into(), b"B=x=y".into(), b"LANG=C".into()];
    let script = "pwd; echo $HOME $USER $LOGNAME $LANG $A $B; umask; cat; ulimit -n; ps -o sid= -p $$ | tr -d ' '; echo $$; kill -PIPE $$";
    let (end, log) = client.run(1, JobSpec { env, user: b"0".into(), ..spec() }, script);
    let text = stdout(&log);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(end.reason, ExitReason::Signal(libc::SIGPIPE as u8), "signals are not ignored");
    let home = lines[0];
    assert_eq!(lines[1], format!("{home} root root C 2 x=y"));
    assert_eq!(lines[2], "0022");
    assert_eq!(lines[4], lines[5], "it leads its session");
    let (_, log) = client.run(2, JobSpec { cwd: b"/usr/lib".into(), ..spec() }, "pwd; cat /proc/self/oom_score_adj");
    assert!(stdout(&log).starts_with("/usr/lib\n0\n"), "{}", stdout(&log));
}

#[test]
fn users() {
    if !is_root() {
        println!("skipped: needs root");
        return;
    }
    let agent = Agent::start();
    let client = agent.client();
    let mut job = 0;
    let mut id = |user: &str| {
        job += 1;
        stdout(
            &client
                .run(
                    job,
                    JobSpec { user: user.into(), ..spec() },
                    "id -u; id -g; id -G; cat /proc/self/status | grep CapEff",
                )
                .1,
        )
    };
    assert_eq!(id("4711:4712"), "4711\n4712\n4712\nCapEff:\t0000000000000000\n");
    assert!(id("nobody").starts_with("65534\n65534\n65534\n"));
    assert!(id("daemon").starts_with("1\n1\n1\n"));
    // A script in a file is theirs to read and run.
    let script = "#!/bin/sh\nid -u\n";
    let (end, log) = client.run(100, JobSpec { user: b"4711".into(), ..spec() }, script);
    assert_eq!((end.reason, stdout(&log).as_str()), (ExitReason::Code(0), "4711\n"));
    let long = format!("id -u\n: {}\n", "x".repeat(100_000));
    let (_, log) = client.run(101, JobSpec { user: b"4711".into(), ..spec() }, long);
    assert_eq!(stdout(&log), "4711\n");
}

#[test]
fn signals() {
    let agent = Agent::start();
    let client = agent.client();
    client.start(1, "sleep 1000 & wait");
    client.call(&Request::JobSignal { job: 1, signal: libc::SIGTERM, all: false }, &[]).unwrap();
    assert_eq!(client.ended().1.reason, ExitReason::Signal(libc::SIGTERM as u8));
    let ended = client.call(&Request::JobSignal { job: 1, signal: libc::SIGTERM, all: false }, &[]);
    assert_eq!(ended.unwrap_err().errno, libc::ESRCH);
    client.start(2, "trap 'echo caught; exit 5' USR1; echo ready; while :; do sleep 0.01; done");
    let stream = client.attach(2, 0);
    let mut log = replica();
    log.append_records(&stream.next().unwrap().data).unwrap();
    client.call(&Request::JobSignal { job: 2, signal: libc::SIGUSR1, all: false }, &[]).unwrap();
    assert_eq!(client.follow(&stream, &mut log).reason, ExitReason::Code(5));
    assert_eq!(stdout(&log), "ready\ncaught\n");
    client.start(3, "kill -KILL $$");
    assert_eq!(client.ended().1.reason, ExitReason::Signal(9));
    client.start(4, "sleep 1000");
    let bad = client.call(&Request::JobSignal { job: 4, signal: 1000, all: false }, &[]);
    assert_eq!(bad.unwrap_err().errno, libc::EINVAL);
}

/// A job of several processes, in groups and sessions of their own; gives their numbers.
fn family(client: &Client, job: u64) -> Vec<i32> {
    let script = "setsid sh -c 'echo $$; trap \"\" TERM; sleep 1000 & echo $!; wait' & \
                  setsid sh -c 'echo $$; setsid sleep 1000 & echo $!; wait' & \
                  sleep 1000 & echo $!; (sleep 1000 & echo $!); echo $$; wait";
    client.start(job, script);
    let stream = client.attach(job, 0);
    let mut log = replica();
    while stdout(&log).lines().count() < 7 {
        log.append_records(&stream.next().unwrap().data).unwrap();
    }
    client.cancel(stream.tag);
    stdout(&log).lines().map(|line| line.parse().unwrap()).collect()
}

#[test]
fn all_descendants_are_killed() {
    let agent = Agent::start();
    let client = agent.client();
    let pids = family(&client, 1);
    assert!(pids.iter().all(|pid| lives(*pid)));
    client.call(&Request::JobSignal { job: 1, signal: libc::SIGKILL, all: true }, &[]).unwrap();
    assert_eq!(client.ended().1.reason, ExitReason::Signal(9));
    wait_until("all of them dead", || pids.iter().all(|pid| !lives(*pid)));
    let pids = family(&client, 2);
    client.call(&Request::JobForget { job: 2 }, &[]).unwrap();
    wait_until("all of them dead", || pids.iter().all(|pid| !lives(*pid)));
    assert!(client.jobs().iter().all(|info| info.job != 2));
    assert!(client.events.recv_timeout(Duration::from_millis(300)).is_err(), "a forgotten job has no end");
}

#[test]
fn a_time_limit_is_in_milliseconds_and_for_all_descendants() {
    let agent = Agent::start();
    let client = agent.client();
    let (end, _) = client.run(1, JobSpec { timeout_ms: 30_000, ..spec() }, "sleep 2");
    assert_eq!(end.reason, ExitReason::Code(0));
    let limited = JobSpec { timeout_ms: 1_000, ..spec() };
    client.start_spec(
        2,
        limited.clone(),
        b"trap '' TERM; setsid sleep 1000 & echo $!; echo $$; while :; do sleep 1; done",
    );
    let stream = client.attach(2, 0);
    let mut log = replica();
    let begun = Instant::now();
    let end = client.follow(&stream, &mut log);
    assert_eq!(end.reason, ExitReason::Timeout);
    assert!(begun.elapsed() >= Duration::from_millis(2500), "one that ignores SIGTERM has its two seconds");
    assert!(stdout(&log).lines().all(|pid| !lives(pid.parse().unwrap())));
    // One that heeds it ends by itself, with what it still prints.
    let (end, log) = client.run(3, limited, "trap 'echo bye; exit 0' TERM; while :; do sleep 0.01; done");
    assert_eq!((end.reason, stdout(&log).as_str()), (ExitReason::Timeout, "bye\n"));
}

#[test]
fn what_a_job_leaves_behind_goes_on() {
    let agent = Agent::start();
    let client = agent.client();
    let mark = agent.dir.path().join("mark");
    let script = format!(
        "(sleep 0.5; echo late; echo late; head -c 300000 /dev/zero; echo done > {}; sleep 1000) & echo $!; exit 6",
        mark.display()
    );
    let (end, log) = client.run(1, spec(), script);
    assert_eq!(end.reason, ExitReason::Code(6));
    let text = stdout(&log);
    let pid: i32 = text.trim().parse().unwrap();
    assert!(lives(pid), "the end is told though a process holds the output open");
    wait_until("it writes on", || mark.exists());
    assert_eq!(client.job(1).log_end, end.log_end, "an ended job's log does not grow");
    client.call(&Request::JobForget { job: 1 }, &[]).unwrap();
    assert!(lives(pid));
    // SAFETY: the process is one this test made.
    unsafe {
        libc::kill(pid, libc::SIGKILL);
    }
    // The agent waits for orphans.
    wait_until("no zombie", || !std::path::Path::new(&format!("/proc/{pid}")).exists());
}

#[test]
fn shutting_down() {
    let mut agent = Agent::start();
    let client = agent.client();
    let pids = family(&client, 1);
    client.start(2, "trap 'echo bye; exit 8' TERM; echo ready; while :; do sleep 0.01; done");
    let stream = client.attach(2, 0);
    let mut log = replica();
    log.append_records(&stream.next().unwrap().data).unwrap();
    assert_eq!(client.call(&Request::Shutdown { grace_ms: 500 }, &[]).unwrap().0, Reply::Ok);
    let refused = client.send_start(3, &spec(), b"true").wait();
    assert_eq!(refused.unwrap_err().errno, libc::ESHUTDOWN);
    let mut ends = HashMap::new();
    while ends.len() < 2 {
        let (job, end) = client.ended();
        ends.insert(job, end.reason);
    }
    assert_eq!(ends[&2], ExitReason::Code(8));
    while let Some(frame) = stream.next_within(Duration::from_millis(100)) {
        log.append_records(&frame.data).unwrap();
    }
    assert_eq!(stdout(&log), "ready\nbye\n");
    wait_until("its end", || !agent.is_alive());
    assert!(agent.process.wait().unwrap().success());
    assert!(pids.iter().all(|pid| !lives(*pid)), "what ignores SIGTERM is killed");
}

#[test]
fn processor_time_and_memory_are_told() {
    let agent = Agent::start();
    let client = agent.client();
    let (end, _) = client.run(1, spec(), "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done");
    assert!(end.cpu_micros > 1000 && end.max_rss_kib > 500, "{end:?}");
    let pid = client.start(2, "while :; do :; done");
    wait_until("time passes", || client.job(2).cpu_micros > 50_000);
    let info = client.job(2);
    assert!(info.pid == pid && info.rss_kib > 500 && info.end.is_none());
}
