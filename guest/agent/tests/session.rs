//! Connections, requests, cancellation, priority: the real agent over its socket.
#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use machinefs_protocol::file::{FileReply, FileRequest, Lock, ROOT};
use machinefs_protocol::frame::{FLAG_MORE, Kind, MAX_DATA, MAX_META, decode_meta};
use machinefs_protocol::message::{Hello, Notice, Reply, Request};
use machinefs_protocol::{OLDEST_VERSION, VERSION};
use std::io::{Read, Write};
use std::time::Duration;
use support::*;

/// Opens a file of the host's file system through the agent.
fn open(client: &Client, path: &std::path::Path, flags: i32) -> u64 {
    let mut node = ROOT;
    for name in path.components().skip(1) {
        let name = std::os::unix::ffi::OsStrExt::as_bytes(name.as_os_str());
        let lookup = Request::File(FileRequest::Lookup { parent: node, name });
        let Ok((Reply::File(FileReply::Entry(entry)), _)) = client.call(&lookup, &[]) else { panic!("lookup") };
        node = entry.node;
    }
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
