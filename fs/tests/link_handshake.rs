//! The first frames of a link, from an agent that lies.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod link_support;

use link_support::{Agent, OP_DEADLINE, SESSION, open};
use machinefs::errno::Errno;
use machinefs::link::LinkError;
use machinefs_protocol::frame::{Header, Kind};
use machinefs_protocol::message::Hello;
use std::os::unix::net::UnixStream;

/// What the host makes of an agent that says this instead of hello.
fn greeted(say: impl FnOnce(&mut Agent) + Send + 'static) -> LinkError {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let thread = std::thread::spawn(move || {
        let mut agent = Agent { stream: theirs, seq: 0 };
        agent.next().unwrap();
        say(&mut agent);
        // Until the host closes it.
        while agent.next().is_some() {}
    });
    let (link, _) = open(ours, OP_DEADLINE);
    let error = link.err().expect("no link should come of it");
    thread.join().unwrap();
    error
}

#[test]
fn a_handshake_of_lies_is_refused() {
    let header =
        |kind, meta_len, data_len| Header { kind, flags: 0, meta_len, data_len, seq: 0, deadline_ms: 0, tag: 0 };
    for (what, bytes) in [
        ("garbage", vec![0xff; 64]),
        ("4 GiB", header(Kind::Hello, 10, u32::MAX).encode().to_vec()),
        ("64 KiB of message", header(Kind::Hello, u16::MAX, 0).encode().to_vec()),
        ("another kind", header(Kind::Reply, 0, 0).encode().to_vec()),
        ("data", header(Kind::Hello, 0, 5).encode().to_vec()),
        ("no message", header(Kind::Hello, 0, 0).encode().to_vec()),
        ("a late frame", Header { seq: 1, ..header(Kind::Hello, 0, 0) }.encode().to_vec()),
    ] {
        let error = greeted(move |agent| agent.raw(&bytes).unwrap());
        assert!(matches!(error, LinkError::Lie(_)), "{what}: {error:?}");
        assert_eq!(error.errno(), Errno::EHOSTUNREACH);
    }
    let error = greeted(|agent| {
        let other = Hello { session: SESSION + 1, ..Agent::hello() };
        agent.message(Kind::Hello, 0, 0, &other, &[]).unwrap();
    });
    assert!(matches!(error, LinkError::Lie(_)), "another session: {error:?}");
}

#[test]
fn other_versions_are_named() {
    for (version, oldest) in [(0, 0), (9, 8)] {
        let error = greeted(move |agent| {
            let build = "\x1b[2Jvery\nold".repeat(100);
            agent.message(Kind::Hello, 0, 0, &Hello { version, oldest, build, ..Agent::hello() }, &[]).unwrap();
        });
        assert!(matches!(&error, LinkError::Version { version: v, .. } if *v == version), "{error:?}");
        let text = error.to_string();
        assert!(!text.contains(['\x1b', '\n']) && text.len() < 1000, "{text}");
    }
}

#[test]
fn a_silent_or_slow_handshake_ends() {
    let error = greeted(|_| {});
    assert!(matches!(error, LinkError::TimedOut), "{error:?}");
    let error = greeted(|agent| {
        // A byte now and then must not put the end off.
        let header = Header { kind: Kind::Hello, flags: 0, meta_len: 1, data_len: 0, seq: 0, deadline_ms: 0, tag: 0 };
        for byte in header.encode() {
            if agent.raw(&[byte]).is_err() {
                return;
            }
            std::thread::sleep(OP_DEADLINE / 4);
        }
    });
    assert!(matches!(error, LinkError::TimedOut), "{error:?}");
}
