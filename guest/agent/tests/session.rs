//! Connections, requests, cancellation, priority: the real agent over its socket.
#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use machinefs_protocol::file::{FileReply, FileRequest, Lock, Owner, ROOT, SetAttr};
use machinefs_protocol::frame::{FLAG_MORE, Kind, MAX_DATA, MAX_META, decode_meta};
use machinefs_protocol::job::{ExitReason, INITIAL_CREDIT, JobSpec};
use machinefs_protocol::joblog::Filter;
use machinefs_protocol::message::{Hello, Notice, Reply, Request};
use machinefs_protocol::{OLDEST_VERSION, VERSION};
use std::io::{Read, Write};
use std::time::Duration;
use support::*;

/// Finds a file of the host's file system through the agent.
fn find(client: &Client, path: &std::path::Path) -> u64 {
    let mut node = ROOT;
    for name in path.components().skip(1) {
        let name = std::os::unix::ffi::OsStrExt::as_bytes(name.as_os_str());
        let lookup = Request::File(FileRequest::Lookup { parent: node, name });
        let Ok((Reply::File(FileReply::Entry(entry)), _)) = client.call(&lookup, &[]) else { panic!("lookup") };
        node = entry.node;
    }
    node
}

/// Opens a file of the host's file system through the agent.
fn open(client: &Client, path: &std::path::Path, flags: i32) -> u64 {
    let node = find(client, path);
    let open = Request::File(FileRequest::Open { node, flags: flags as u32, kill_suidgid: false });
    match client.call(&open, &[]) {
        Ok((Reply::File(FileReply::Opened(fh)), _)) => fh,
        other => panic!("open: {other:?}"),
    }
}

fn lock(fh: u64, owner: u64, kind: u32, wait: bool) -> Request<'static> {
    let lock = Lock { start: 0, end: u64::MAX, kind, pid: 0 };
    Request::File(FileRequest::SetLock { fh, owner, lock, flock: false, wait })
}

#[test]
fn hello_and_facts() {
    let agent = Agent::start();
    let client = agent.client();
    assert_eq!((client.hello.version, client.hello.oldest), (VERSION, OLDEST_VERSION));
    assert_ne!(client.hello.boot, 0);
    client.ping();
    let Ok((Reply::Info(info), _)) = client.call(&Request::Info, &[]) else { panic!() };
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert_eq!(info.kernel, kernel.trim());
    assert!(!info.is_init && info.clock_nanos > 1_600_000_000_000_000_000);
    let (reply, log) = client.call(&Request::ReadLog, &[]).unwrap();
    assert_eq!(reply, Reply::Data);
    assert!(String::from_utf8(log).unwrap().contains("serves"), "the log is kept");
    assert_eq!(agent.client().hello.boot, client.hello.boot);
}

#[test]
fn other_versions_are_refused() {
    let mut agent = Agent::start();
    for (version, oldest) in [(VERSION + 5, VERSION + 1), (0, 0)] {
        let mut stream = agent.raw();
        stream.write_all(&frame(Kind::Hello, 0, 0, Some(&hello(version, oldest, 1)), &[])).unwrap();
        let answer = read_frame(&mut stream).unwrap();
        let theirs: Hello = decode_meta(&answer.meta).unwrap();
        assert_eq!((theirs.version, theirs.oldest), (VERSION, OLDEST_VERSION));
        assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0, "then it closes");
    }
    // A newer host that still speaks ours is welcome.
    let mut stream = agent.raw();
    stream.write_all(&frame(Kind::Hello, 0, 0, Some(&hello(VERSION + 9, VERSION, 3)), &[])).unwrap();
    let theirs: Hello = decode_meta(&read_frame(&mut stream).unwrap().meta).unwrap();
    assert_eq!(theirs.session, 3);
    assert!(agent.is_alive() && agent.log().contains("refused"));
}

#[test]
fn garbage_ends_the_connection_and_not_the_agent() {
    let mut agent = Agent::start();
    let mut state = 12345u64;
    let mut random = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u8
    };
    for round in 0..60 {
        let mut stream = agent.raw();
        if round % 2 == 1 {
            stream.write_all(&frame(Kind::Hello, 0, 0, Some(&hello(1, 1, 1)), &[])).unwrap();
            read_frame(&mut stream).unwrap();
        }
        let bytes: Vec<u8> = (0..(round * 7)).map(|_| random()).collect();
        let _ = stream.write_all(&bytes);
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let _ = stream.read_to_end(&mut Vec::new());
    }
    // Well-formed headers, wrong in one respect each.
    let ping = Request::Ping;
    let bad: Vec<(&str, Vec<u8>)> = vec![
        ("sequence", frame(Kind::Request, 7, 1, Some(&ping), &[])),
        ("direction", frame(Kind::Reply, 1, 1, Some(&Reply::Ok), &[])),
        ("second hello", frame(Kind::Hello, 1, 0, Some(&hello(1, 1, 1)), &[])),
        ("message", frame(Kind::Request, 1, 1, Some(&[0xffu8; 9]), &[])),
        ("notice", frame(Kind::Notice, 1, 1, Some(&[0xffu8; 9]), &[])),
        ("left over", frame(Kind::Request, 1, 1, Some(&(Request::Ping, 1u8)), &[])),
        ("body of nothing", frame(Kind::Body, 1, 9, None::<&()>, b"x")),
        ("size", {
            let mut bytes = frame(Kind::Request, 1, 1, Some(&ping), &[]);
            bytes[4..8].copy_from_slice(&(MAX_DATA as u32 + 1).to_le_bytes());
            bytes
        }),
        ("meta size", {
            let mut bytes = frame(Kind::Request, 1, 1, Some(&ping), &[]);
            bytes[2..4].copy_from_slice(&(MAX_META as u16 + 1).to_le_bytes());
            bytes
        }),
    ];
    for (what, bytes) in bad {
        let mut stream = agent.raw();
        stream.write_all(&frame(Kind::Hello, 0, 0, Some(&hello(1, 1, 1)), &[])).unwrap();
        read_frame(&mut stream).unwrap();
        stream.write_all(&bytes).unwrap();
        assert!(read_frame(&mut stream).is_none(), "{what}: the connection stays");
    }
    assert!(agent.is_alive());
    agent.client().ping();
}

#[test]
fn endless_bodies_are_refused() {
    let mut agent = Agent::start();
    let mut stream = agent.raw();
    stream.write_all(&frame(Kind::Hello, 0, 0, Some(&hello(1, 1, 1)), &[])).unwrap();
    read_frame(&mut stream).unwrap();
    let data = vec![0; MAX_DATA];
    stream.write_all(&frame_with(Kind::Request, FLAG_MORE, 1, 0, 1, Some(&Request::Ping), &data)).unwrap();
    let mut seq = 2;
    while stream.write_all(&frame_with(Kind::Body, FLAG_MORE, seq, 0, 1, None::<&()>, &data)).is_ok() {
        seq += 1;
        assert!(seq < 1000, "it takes bodies for ever");
    }
    assert!(agent.is_alive());
    assert!(agent.rss() < 100_000, "{} KiB", agent.rss());
    // Many requests with unfinished bodies count together.
    let client = agent.client();
    for tag in 1000..1300 {
        client.send_frame(Kind::Request, FLAG_MORE, 0, tag, Some(&Request::Ping), &data);
    }
    wait_until("closed", || client.call_closed());
    assert!(agent.rss() < 150_000, "{} KiB", agent.rss());
    agent.client().ping();
}

#[test]
fn a_newer_connection_replaces_the_older() {
    let agent = Agent::start();
    let old = agent.client();
    let file = agent.dir.path().join("file");
    std::fs::write(&file, "content").unwrap();
    let fh = open(&old, &file, libc::O_RDWR);
    let read = |client: &Client| client.call(&Request::File(FileRequest::Read { fh, offset: 0, size: 100 }), &[]);
    assert_eq!(read(&old).unwrap().1, b"content");
    let new = agent.client();
    wait_until("closed", || old.call_closed());
    assert_eq!(read(&new).unwrap().1, b"content", "the same session keeps its handles");
    let other = agent.client_of(2);
    wait_until("closed", || new.call_closed());
    assert_eq!(read(&other).unwrap_err().errno, libc::EBADF, "another session has none");
    other.ping();
}

#[test]
fn a_blocked_lock_is_cancelled() {
    let agent = Agent::start();
    let client = agent.client();
    let file = agent.dir.path().join("file");
    std::fs::write(&file, "x").unwrap();
    let (first, second) = (open(&client, &file, libc::O_RDWR), open(&client, &file, libc::O_RDWR));
    let write_lock = libc::F_WRLCK as u32;
    client.call(&lock(first, 1, write_lock, false), &[]).unwrap();
    assert_eq!(client.call(&lock(second, 2, write_lock, false), &[]).unwrap_err().errno, libc::EAGAIN);
    // More than there are threads, so that cancellations must be read while all are taken.
    let waiting: Vec<Pending> =
        (0..200).map(|owner| client.send(&lock(second, 10 + owner, write_lock, true), &[], 0)).collect();
    client.ping();
    assert!(waiting[0].wait_for(Duration::from_millis(50)).is_none(), "it does not wait");
    for pending in &waiting {
        client.cancel(pending.tag);
    }
    for pending in &waiting {
        assert_eq!(pending.wait().unwrap_err().errno, libc::EINTR);
    }
    // A cancel of what is answered already, and of what never was, does nothing.
    client.cancel(waiting[0].tag);
    client.cancel(123_456);
    let last = client.send(&lock(second, 3, write_lock, true), &[], 0);
    client.ping();
    client.call(&lock(first, 1, libc::F_UNLCK as u32, false), &[]).unwrap();
    assert!(last.wait().is_ok(), "a lock that becomes free is had");
}

#[test]
fn locks_waited_for_end_with_the_connection() {
    let agent = Agent::start();
    let client = agent.client();
    let file = agent.dir.path().join("file");
    std::fs::write(&file, "x").unwrap();
    let (first, second) = (open(&client, &file, libc::O_RDWR), open(&client, &file, libc::O_RDWR));
    let write_lock = libc::F_WRLCK as u32;
    client.call(&lock(first, 1, write_lock, false), &[]).unwrap();
    let waiting: Vec<Pending> =
        (0..20).map(|owner| client.send(&lock(second, 10 + owner, write_lock, true), &[], 0)).collect();
    client.ping();
    drop(client.stream.shutdown(std::net::Shutdown::Both));
    let client = agent.client();
    client.call(&lock(first, 1, libc::F_UNLCK as u32, false), &[]).unwrap();
    assert!(client.call(&lock(second, 2, write_lock, false), &[]).is_ok(), "no one of the older connection has it");
    drop(waiting);
}

#[test]
fn a_request_that_comes_too_late_is_not_begun() {
    let agent = Agent::start();
    let client = agent.client();
    // The body takes longer than the deadline.
    client.send_frame(Kind::Request, FLAG_MORE, 20, 77, Some(&Request::Ping), b"a");
    let route = client.route(77);
    std::thread::sleep(Duration::from_millis(60));
    client.send_frame(Kind::Body, 0, 0, 77, None::<&()>, b"b");
    assert_eq!(route.wait().unwrap_err().errno, libc::ETIMEDOUT);
    assert!(client.send(&Request::Ping, &[], 30_000).wait().is_ok());
}

#[test]
fn small_answers_do_not_wait_behind_large_ones() {
    let agent = Agent::start();
    let client = agent.client();
    let path = agent.dir.path().join("large");
    let content: Vec<u8> = (0..1u32 << 18).flat_map(u32::to_le_bytes).collect();
    std::fs::write(&path, &content).unwrap();
    let fh = open(&client, &path, libc::O_RDONLY);
    let reads: Vec<Pending> = (0..100)
        .map(|_| client.send(&Request::File(FileRequest::Read { fh, offset: 0, size: 1 << 20 }), &[], 0))
        .collect();
    client.ping();
    let done = reads.iter().filter(|read| read.has_answer()).count();
    assert!(done < 100, "the ping came after all of them");
    for read in reads {
        let (reply, body) = read.wait().unwrap();
        assert_eq!(reply, Reply::File(FileReply::Data));
        assert!(body == content, "a reply of several frames is whole");
    }
}

#[test]
fn bodies_of_several_frames_and_notices() {
    let agent = Agent::start();
    let client = agent.client();
    let path = agent.dir.path().join("file");
    std::fs::write(&path, "").unwrap();
    let fh = open(&client, &path, libc::O_RDWR);
    let content: Vec<u8> = (0..1u32 << 18).flat_map(u32::to_be_bytes).collect();
    let write = Request::File(FileRequest::Write { fh, offset: 0, kill_suidgid: false });
    let written = client.call(&write, &content).unwrap().0;
    assert_eq!(written, Reply::File(FileReply::Count(1 << 20)));
    assert!(std::fs::read(&path).unwrap() == content);
    client.notice(&Notice::Release { fh, owner: 0 });
    client.notice(&Notice::Forget(vec![(2, 1), (3, 1), (999, 7)]));
    client.notice(&Notice::ReleaseDir { fh: 4711 });
    let read = Request::File(FileRequest::Read { fh, offset: 0, size: 1 });
    assert_eq!(client.call(&read, &[]).unwrap_err().errno, libc::EBADF);
}

#[test]
fn many_requests_at_once() {
    let agent = Agent::start();
    let client = agent.client();
    let pending: Vec<Pending> =
        (0..5000).map(|_| client.send(&Request::File(FileRequest::GetAttr { node: ROOT, fh: None }), &[], 0)).collect();
    for pending in pending {
        assert!(matches!(pending.wait(), Ok((Reply::File(FileReply::Attr(_)), _))));
    }
    // A tag in use ends the connection.
    client.send_frame(Kind::Request, FLAG_MORE, 0, 1 << 40, Some(&Request::Ping), &[]);
    client.send_frame(Kind::Request, 0, 0, 1 << 40, Some(&Request::Ping), &[]);
    wait_until("closed", || client.call_closed());
}

/// A connection of the session past its handshake, without a thread that reads it.
fn unread(agent: &Agent, session: u128) -> std::os::unix::net::UnixStream {
    let mut stream = agent.raw();
    stream.write_all(&frame(Kind::Hello, 0, 0, Some(&hello(1, 1, session)), &[])).unwrap();
    assert_eq!(read_frame(&mut stream).unwrap().header.kind, Kind::Hello);
    stream
}

#[test]
fn a_stat_goes_before_eight_large_reads_that_wait() {
    let agent = Agent::start();
    let path = agent.dir.path().join("large");
    std::fs::write(&path, vec![7; 1 << 20]).unwrap();
    let fh = open(&agent.client(), &path, libc::O_RDONLY);
    let mut stream = unread(&agent, 1);
    for at in 0..8u32 {
        let read = Request::File(FileRequest::Read { fh, offset: 0, size: 1 << 20 });
        stream.write_all(&frame(Kind::Request, 1 + at, at.into(), Some(&read), &[])).unwrap();
    }
    // Their answers fill the socket, which nobody reads: they wait, each for its turn.
    std::thread::sleep(Duration::from_millis(300));
    let stat = Request::File(FileRequest::GetAttr { node: ROOT, fh: None });
    stream.write_all(&frame(Kind::Request, 9, 100, Some(&stat), &[])).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    let (mut before, mut bytes, mut order) = (0, 0, 0);
    while bytes < 8 << 20 {
        let frame = read_frame(&mut stream).unwrap();
        order += 1;
        if frame.header.tag == 100 {
            before = order;
        }
        bytes += frame.data.len();
    }
    assert!((1..=3).contains(&before), "the stat was frame {before} of {order}");
}

#[test]
fn a_stream_that_is_not_read_holds_up_nobody() {
    let agent = Agent::start();
    let client = agent.client();
    let large = JobSpec { output_limit: 64 << 20, ..spec() };
    client.start_spec(1, large.clone(), b"head -c 50000000 /dev/zero");
    let lazy = client.attach(1, 0);
    wait_until("the job's end", || client.job(1).end.is_some());
    for job in 2..5 {
        let (end, log) = client.run(job, large.clone(), "head -c 20000000 /dev/zero; exit 9");
        assert_eq!((end.reason, log.totals().stdout), (ExitReason::Code(9), 20_000_000));
        client.call(&Request::JobForget { job }, &[]).unwrap();
    }
    let mut sent = 0;
    while let Some(frame) = lazy.next_within(Duration::from_millis(100)) {
        sent += frame.data.len() as u64;
    }
    assert!(sent > INITIAL_CREDIT / 2 && sent <= INITIAL_CREDIT, "{sent} bytes without credit");
    assert!(agent.rss() < 64 * 1024, "{} KiB", agent.rss());
    // A second stream under the tag of one that goes on is refused.
    let again = client.route(lazy.tag);
    client.send_frame(Kind::Request, 0, 0, lazy.tag, Some(&Request::JobAttach { job: 1, offset: 0 }), &[]);
    assert_eq!(again.wait().unwrap_err().errno, libc::EEXIST);
    // A cancel ends it: its credit brings nothing more.
    client.cancel(lazy.tag);
    client.credit(lazy.tag, 1 << 20);
    client.ping();
    assert!(again.next_within(Duration::from_millis(200)).is_none());
}

#[test]
fn a_running_job_goes_on_over_connections() {
    let mut agent = Agent::start();
    let first = agent.client();
    let go = agent.dir.path().join("go");
    let script = format!("echo one; while ! test -e {}; do sleep 0.01; done; echo two; exit 77", go.display());
    let pid = first.start(1, script);
    let stream = first.attach(1, 0);
    let mut log = replica();
    log.append_records(&stream.next().unwrap().data).unwrap();
    first.stream.shutdown(std::net::Shutdown::Both).unwrap();
    drop(first);
    // Another life of the host: it learns of the job from the list, and reads on where it was.
    let second = agent.client_of(2);
    let info = second.job(1);
    assert!(info.pid == pid && info.end.is_none() && lives(pid as i32));
    assert_eq!(info.log_end, log.end());
    std::fs::write(&go, "").unwrap();
    wait_until("its end", || second.job(1).end.is_some());
    // It ends while no one is there to be told, too.
    drop(second.stream.shutdown(std::net::Shutdown::Both));
    let third = agent.client_of(3);
    let end = third.job(1).end.unwrap();
    let stream = third.attach(1, log.end());
    assert_eq!(third.follow(&stream, &mut log), end);
    assert_eq!((end.reason, stdout(&log).as_str()), (ExitReason::Code(77), "one\ntwo\n"));
    // From its very end there is nothing but the end.
    let stream = third.attach(1, log.end());
    assert_eq!(third.follow(&stream, &mut log), end);
    assert_eq!(output(&log, Filter::All).0, b"one\ntwo\n");
    assert!(agent.is_alive());
}

#[test]
fn silent_connections_are_in_nobodys_way() {
    let mut agent = Agent::start();
    let hello = frame(Kind::Hello, 0, 0, Some(&hello(1, 1, 1)), &[]);
    let silent: Vec<_> = (0..20)
        .map(|at| {
            let mut stream = agent.raw();
            stream.write_all(&hello[..at]).unwrap();
            stream
        })
        .collect();
    let mut half = unread(&agent, 1);
    let ping = frame(Kind::Request, 1, 1, Some(&Request::Ping), &[]);
    half.write_all(&ping[..ping.len() / 2]).unwrap();
    let client = agent.client();
    client.ping();
    assert_eq!(half.read(&mut [0; 1]).unwrap_or(0), 0, "it was replaced");
    drop(silent);
    // A host that asks and never reads: what it asked for is bounded, and the next connection is served.
    let read = Request::File(FileRequest::ReadDir { fh: 1, cookie: 0, max: 1 << 18, plus: true });
    let mut deaf = unread(&agent, 1);
    deaf.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
    let padding = vec![0; 200_000];
    let mut seq = 1;
    while seq < 2000 && deaf.write_all(&frame(Kind::Request, seq, seq.into(), Some(&read), &padding)).is_ok() {
        seq += 1;
    }
    assert!(agent.rss() < 200_000, "{} KiB", agent.rss());
    agent.client().ping();
    assert!(agent.is_alive());
}

#[test]
fn a_quick_request_that_is_stuck_holds_up_nobody() {
    let agent = Agent::start();
    let client = agent.client();
    let path = agent.dir.path().join("leased");
    std::fs::write(&path, "x").unwrap();
    let holder = std::fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    // SAFETY: no pointers; SIGIO would end this process when the lease is to be broken.
    let leased = unsafe {
        libc::signal(libc::SIGIO, libc::SIG_IGN);
        libc::fcntl(std::os::fd::AsRawFd::as_raw_fd(&holder), libc::F_SETLEASE, libc::F_WRLCK)
    };
    if leased < 0 {
        println!("skipped: no file leases here: {}", std::io::Error::last_os_error());
        return;
    }
    // Opening waits for the lease, one after the other on whoever reads.
    let node = find(&client, &path);
    let request = Request::File(FileRequest::Open { node, flags: libc::O_RDWR as u32, kill_suidgid: false });
    let stuck: Vec<Pending> = (0..20)
        .map(|_| {
            let pending = client.send(&request, &[], 0);
            client.ping();
            pending
        })
        .collect();
    assert!(stuck.iter().all(|pending| !pending.has_answer()), "it did not wait");
    for pending in stuck.iter().take(10) {
        client.cancel(pending.tag);
        assert_eq!(pending.wait().unwrap_err().errno, libc::EINTR);
    }
    drop(holder);
    for pending in stuck.iter().skip(10) {
        assert!(matches!(pending.wait(), Ok((Reply::File(FileReply::Opened(_)), _))));
    }
}

#[test]
fn data_of_no_stream_is_dropped() {
    let agent = Agent::start();
    let client = agent.client();
    let file = agent.dir.path().join("file");
    std::fs::write(&file, "x").unwrap();
    let (first, second) = (open(&client, &file, libc::O_RDWR), open(&client, &file, libc::O_RDWR));
    let write_lock = libc::F_WRLCK as u32;
    client.call(&lock(first, 1, write_lock, false), &[]).unwrap();
    let waiting: Vec<Pending> =
        (0..100).map(|owner| client.send(&lock(second, 10 + owner, write_lock, true), &[], 0)).collect();
    for pending in &waiting {
        for _ in 0..10 {
            client.send_frame(Kind::Data, 0, 0, pending.tag, None::<&()>, &[1; 200_000]);
        }
        // Whatever it is told.
        client.credit(pending.tag, u64::MAX);
    }
    client.ping();
    assert!(agent.rss() < 64 * 1024, "{} KiB", agent.rss());
    for pending in &waiting {
        for _ in 0..1000 {
            client.cancel(pending.tag);
        }
        assert_eq!(pending.wait().unwrap_err().errno, libc::EINTR);
    }
    client.ping();
    // Data before its request is complete is an offence.
    let (spec_len, body) = spec().start_body(b"true").unwrap();
    let start = Request::JobStart { job: 1, spec_len };
    client.send_frame(Kind::Request, FLAG_MORE, 0, 1 << 40, Some(&start), &body);
    client.send_frame(Kind::Data, 0, 0, 1 << 40, None::<&()>, b"early");
    wait_until("closed", || client.call_closed());
    assert!(agent.client().jobs().is_empty());
}

#[test]
fn unknown_nodes_and_handles_and_bad_names_are_errors() {
    let agent = Agent::start();
    let client = agent.client();
    let owner = Owner::default();
    let lock = Lock { start: 0, end: 1, kind: 1, pid: 0 };
    for number in [0, 2, 999, u64::from(u32::MAX), 1 << 40, u64::MAX] {
        let (node, parent, fh) = (number, number, number);
        let requests = [
            FileRequest::Lookup { parent, name: b"x" },
            FileRequest::GetAttr { node, fh: None },
            FileRequest::GetAttr { node, fh: Some(fh) },
            FileRequest::SetAttr { node, fh: Some(fh), set: SetAttr::default() },
            FileRequest::ReadLink { node },
            FileRequest::SymLink { parent, name: b"x", target: b"y", owner },
            FileRequest::MkNod { parent, name: b"x", mode: 0o100_644, umask: 0, rdev: 0, owner },
            FileRequest::MkDir { parent, name: b"x", mode: 0o755, umask: 0, owner },
            FileRequest::Unlink { parent, name: b"x" },
            FileRequest::RmDir { parent, name: b"x" },
            FileRequest::Rename { parent, name: b"x", new_parent: number, new_name: b"y", flags: 0 },
            FileRequest::Link { node, new_parent: number, new_name: b"x" },
            FileRequest::Open { node, flags: 0, kill_suidgid: false },
            FileRequest::Create { parent, name: b"x", mode: 0o644, umask: 0, flags: 2, owner },
            FileRequest::TmpFile { parent, mode: 0o644, umask: 0, flags: 2, owner },
            FileRequest::Read { fh, offset: 0, size: 1 },
            FileRequest::Write { fh, offset: 0, kill_suidgid: false },
            FileRequest::Flush { fh, owner: 1 },
            FileRequest::Fsync { fh, data_only: false },
            FileRequest::OpenDir { node, max: 4096, plus: true },
            FileRequest::ReadDir { fh, cookie: 0, max: 4096, plus: true },
            FileRequest::StatFs { node },
            FileRequest::GetXattr { node, name: b"user.x", max: 100 },
            FileRequest::ListXattr { node, max: 100 },
            FileRequest::SetXattr { node, name: b"user.x", flags: 0 },
            FileRequest::RemoveXattr { node, name: b"user.x" },
            FileRequest::Fallocate { fh, offset: 0, len: 1, mode: 0 },
            FileRequest::Seek { fh, offset: 0, whence: 3 },
            FileRequest::CopyRange { from: fh, from_offset: 0, to: fh, to_offset: 0, len: 1 },
            FileRequest::GetLock { fh, owner: 1, lock },
            FileRequest::SetLock { fh, owner: 1, lock, flock: false, wait: false },
        ];
        for request in requests {
            let text = format!("{request:?}");
            let errno = client.call(&Request::File(request), &[]).expect_err(&text).errno;
            assert!([libc::ESTALE, libc::EBADF, libc::ENOENT, libc::EINVAL].contains(&errno), "{text}: {errno}");
        }
        client.notice(&Notice::Forget(vec![(number, u64::MAX)]));
        client.notice(&Notice::Release { fh, owner: number });
        client.notice(&Notice::ReleaseDir { fh });
    }
    let long = [b'x'; 256];
    for name in [b"".as_slice(), b".", b"..", b"/", b"a/b", b"../etc", b"/etc/passwd", b"a\0b", &long] {
        let requests = [
            FileRequest::Lookup { parent: ROOT, name },
            FileRequest::MkDir { parent: ROOT, name, mode: 0o755, umask: 0, owner },
            FileRequest::Unlink { parent: ROOT, name },
            FileRequest::RmDir { parent: ROOT, name },
        ];
        for request in requests {
            let text = format!("{request:?}");
            let errno = client.call(&Request::File(request), &[]).expect_err(&text).errno;
            assert!([libc::EINVAL, libc::ENAMETOOLONG, libc::ENOENT].contains(&errno), "{text}: {errno}");
        }
    }
    let file = agent.dir.path().join("file");
    std::fs::write(&file, "content").unwrap();
    let fh = open(&client, &file, libc::O_RDWR);
    for request in [
        FileRequest::Read { fh, offset: 0, size: u32::MAX },
        FileRequest::Read { fh, offset: u64::MAX, size: 1 },
        FileRequest::Write { fh, offset: u64::MAX, kill_suidgid: false },
        FileRequest::Fallocate { fh, offset: u64::MAX, len: u64::MAX, mode: u32::MAX },
        FileRequest::Seek { fh, offset: u64::MAX, whence: 3 },
        FileRequest::Seek { fh, offset: 0, whence: u32::MAX },
        FileRequest::CopyRange { from: fh, from_offset: u64::MAX, to: fh, to_offset: 0, len: u64::MAX },
        FileRequest::SetLock {
            fh,
            owner: 1,
            lock: Lock { start: u64::MAX, end: 0, kind: u32::MAX, pid: 0 },
            flock: false,
            wait: false,
        },
    ] {
        let text = format!("{request:?}");
        assert!(client.call(&Request::File(request), b"x").is_err(), "{text}");
    }
    assert_eq!(std::fs::read(&file).unwrap(), b"content");
    client.ping();
}

#[test]
fn arguments() {
    let run =
        |args: &[&str]| std::process::Command::new(env!("CARGO_BIN_EXE_machinefs-agent")).args(args).output().unwrap();
    assert!(run(&["--version"]).status.success());
    assert_eq!(run(&[]).status.code(), Some(2));
    assert_eq!(run(&["serve", "x"]).status.code(), Some(2));
    let without_socket = run(&["serve"]);
    assert_eq!(without_socket.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&without_socket.stderr).contains("descriptor 3"));
}
