//! A job's standard input: back pressure, links that are lost, its end.
#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use machinefs_protocol::frame::Kind;
use machinefs_protocol::job::{ExitReason, JobSpec, STDIN_CREDIT};
use machinefs_protocol::joblog::Filter;
use machinefs_protocol::message::Request;
use std::time::Duration;
use support::*;

fn fed(args: &[&str]) -> JobSpec {
    JobSpec { argv: args.iter().map(|arg| arg.as_bytes().to_vec()).collect(), stdin: true, ..spec() }
}

/// The byte of a long input at that place.
fn byte_at(at: u64) -> u8 {
    (at.wrapping_mul(2_654_435_761) >> 24) as u8
}

fn piece(from: u64, len: usize) -> Vec<u8> {
    (from..from + len as u64).map(byte_at).collect()
}

/// Waits until a stream has ended; gives the errno if it ended with one.
fn end_of(stream: &Pending) -> Option<i32> {
    loop {
        let frame = stream.next().unwrap();
        match frame.header.kind {
            Kind::Credit => {}
            Kind::Data => {
                assert!(frame.data.is_empty());
                return None;
            }
            Kind::Error => return Some(frame.errno()),
            kind => panic!("{kind:?}"),
        }
    }
}

#[test]
fn a_hundred_megabytes_through_a_job_with_back_pressure_both_ways() {
    const TOTAL: u64 = 100 << 20;
    let agent = Agent::start();
    let client = agent.client();
    client.start_spec(1, JobSpec { output_limit: 256 << 20, ..fed(&["cat"]) }, b"");
    let (start, (offset, credit, ended)) = client.open_stdin(1, 0);
    assert_eq!((offset, credit, ended), (0, STDIN_CREDIT, false));
    let output = client.attach(1, 0);
    let (mut sent, mut granted, mut read, mut end_sent) = (0u64, credit, 0u64, false);
    let mut log = replica();
    let mut most_rss = 0;
    while read < TOTAL {
        while sent < TOTAL && sent < granted {
            let len = (granted - sent).min(TOTAL - sent).min(100_000) as usize;
            client.data(start.tag, &piece(sent, len));
            sent += len as u64;
        }
        if sent == TOTAL && !end_sent {
            client.data(start.tag, &[]);
            end_sent = true;
        }
        while let Some(frame) = start.next_within(Duration::ZERO) {
            if frame.header.kind == Kind::Credit {
                granted += frame.credit();
                assert!(granted - sent <= STDIN_CREDIT, "never more on the way than that");
            }
        }
        if let Some(frame) = output.next_within(Duration::from_millis(2)) {
            log.append_records(&frame.data).unwrap();
            client.credit(output.tag, frame.data.len() as u64);
            read = log.totals().stdout;
        }
        most_rss = most_rss.max(agent.rss());
    }
    assert_eq!(client.follow(&output, &mut log).reason, ExitReason::Code(0));
    assert!(most_rss < 64 * 1024, "{most_rss} KiB");
    let (bytes, lost) = support::output(&log, Filter::Stdout);
    assert_eq!((bytes.len() as u64, lost), (TOTAL, 0));
    assert!(bytes.iter().zip(0..).all(|(byte, at)| *byte == byte_at(at)), "in order, nothing doubled");
}

#[test]
fn nothing_is_lost_or_doubled_over_lost_links_and_other_sessions() {
    const TOTAL: u64 = 5_000_000;
    let agent = Agent::start();
    let mut client = agent.client();
    client.start_spec(1, JobSpec { output_limit: 64 << 20, ..fed(&["cat"]) }, b"");
    // What the host knows to have arrived: it keeps the rest.
    let mut known = 0;
    for round in 2.. {
        let (stream, (offset, credit, ended)) = client.open_stdin(1, known);
        assert!(offset >= known && offset <= TOTAL && !ended);
        let (mut sent, mut granted) = (offset, offset + credit);
        known = offset;
        // A different number of pieces each time; the last ones may be lost with the link.
        for _ in 0..round % 17 + 5 {
            while let Some(frame) = stream.next_within(Duration::from_millis(if granted == sent { 20 } else { 0 })) {
                granted += frame.credit();
            }
            let len = (granted - sent).min(TOTAL - sent).min(30_011) as usize;
            if len > 0 {
                client.data(stream.tag, &piece(sent, len));
                sent += len as u64;
            }
        }
        if sent == TOTAL {
            client.data(stream.tag, &[]);
            assert_eq!(end_of(&stream), None);
            break;
        }
        client.stream.shutdown(std::net::Shutdown::Both).unwrap();
        client = agent.client_of(round);
    }
    let (_, (offset, _, ended)) = client.open_stdin(1, 0);
    assert_eq!((offset, ended), (TOTAL, true));
    let output = client.attach(1, 0);
    let mut log = replica();
    assert_eq!(client.follow(&output, &mut log).reason, ExitReason::Code(0));
    let (bytes, lost) = support::output(&log, Filter::Stdout);
    assert!(lost == 0 && bytes == piece(0, TOTAL as usize), "{} bytes", bytes.len());
}

#[test]
fn unread_input_ends_with_epipe() {
    let agent = Agent::start();
    let client = agent.client();
    // It ends without having read.
    client.start_spec(1, fed(&["sleep", "0.3"]), b"");
    let (stream, (_, credit, _)) = client.open_stdin(1, 0);
    client.data(stream.tag, &vec![0; credit as usize]);
    assert_eq!(end_of(&stream), Some(libc::EPIPE));
    client.ended();
    // What was on its way then is dropped, however much it is.
    for _ in 0..20 {
        client.data(stream.tag, &vec![0; credit as usize]);
    }
    client.ping();
    let refused = client.call(&Request::JobStdin { job: 1, offset: 0 }, &[]);
    assert_eq!(refused.unwrap_err().errno, libc::EPIPE);
    // It closes its input and goes on.
    client.start_spec(2, fed(&["sh", "-c", "sleep 0.3; exec <&-; sleep 1000"]), b"");
    let (stream, _) = client.open_stdin(2, 0);
    client.data(stream.tag, b"x");
    assert_eq!(end_of(&stream), Some(libc::EPIPE));
    assert!(client.job(2).end.is_none());
    // It reads a part.
    let (end, log) = {
        client.start_spec(3, fed(&["head", "-c", "5"]), b"");
        let (stream, _) = client.open_stdin(3, 0);
        client.data(stream.tag, &[b'a'; 100_000]);
        let output = client.attach(3, 0);
        let mut log = replica();
        (client.follow(&output, &mut log), log)
    };
    assert_eq!((end.reason, stdout(&log).as_str()), (ExitReason::Code(0), "aaaaa"));
    // Jobs that cannot start read nothing, and those without an input have none.
    client.start_spec(4, fed(&["/no/such/program"]), b"");
    let refused = client.call(&Request::JobStdin { job: 4, offset: 0 }, &[]);
    assert_eq!(refused.unwrap_err().errno, libc::EPIPE);
    client.start(5, "sleep 1000");
    for job in [5, 99] {
        let refused = client.call(&Request::JobStdin { job, offset: 0 }, &[]);
        assert_eq!(refused.unwrap_err().errno, libc::ENOENT);
    }
}

#[test]
fn the_end_of_file_waits_for_what_is_before_it() {
    let agent = Agent::start();
    let client = agent.client();
    client.start_spec(1, fed(&["sh", "-c", "sleep 0.3; cat | wc -c"]), b"");
    let (stream, _) = client.open_stdin(1, 0);
    client.data(stream.tag, &[b'x'; 200_000]);
    client.data(stream.tag, &[]);
    // Nothing comes after the end.
    client.data(stream.tag, b"more");
    assert_eq!(end_of(&stream), None);
    let output = client.attach(1, 0);
    let mut log = replica();
    client.follow(&output, &mut log);
    assert_eq!(stdout(&log).trim(), "200000");
    // An input that is at its end from the beginning, and one whose host never says anything.
    client.start_spec(2, fed(&["cat"]), b"");
    client.start_spec(3, fed(&["cat"]), b"");
    let (stream, _) = client.open_stdin(2, 0);
    client.data(stream.tag, &[]);
    assert_eq!(end_of(&stream), None);
    assert_eq!(client.ended().0, 2);
    assert!(client.job(3).end.is_none());
}

#[test]
fn a_second_stream_takes_the_place_of_the_first() {
    let agent = Agent::start();
    let client = agent.client();
    client.start_spec(1, fed(&["cat"]), b"");
    let (first, _) = client.open_stdin(1, 0);
    client.data(first.tag, b"one ");
    let hole = client.call(&Request::JobStdin { job: 1, offset: 1000 }, &[]);
    assert_eq!(hole.unwrap_err().errno, libc::EINVAL);
    let (second, (offset, ..)) = client.open_stdin(1, 0);
    assert_eq!(offset, 4);
    assert_eq!(end_of(&first), Some(libc::ECANCELED));
    client.data(first.tag, b"lost ");
    client.data(second.tag, b"two ");
    client.ping();
    // A stream that is given up ends nothing.
    client.cancel(second.tag);
    client.data(second.tag, b"lost too ");
    let (third, (offset, ..)) = client.open_stdin(1, 8);
    assert_eq!(offset, 8);
    client.data(third.tag, b"three");
    client.data(third.tag, &[]);
    let output = client.attach(1, 0);
    let mut log = replica();
    client.follow(&output, &mut log);
    assert_eq!(stdout(&log), "one two three");
}

#[test]
fn more_than_the_credit_ends_the_connection() {
    let agent = Agent::start();
    let client = agent.client();
    client.start_spec(1, fed(&["sleep", "1000"]), b"");
    let (stream, _) = client.open_stdin(1, 0);
    for _ in 0..5 {
        client.data(stream.tag, &[0; 100_000]);
    }
    wait_until("closed", || client.call_closed());
    assert!(agent.client().job(1).end.is_none(), "the job does not suffer");
}

#[test]
fn as_many_arguments_as_execve_takes() {
    let agent = Agent::start();
    let client = agent.client();
    // Over what fits into the message part of a frame by far.
    let mut large = fed(&["sh", "-c", "echo $#; echo $LAST", "sh"]);
    large.stdin = false;
    large.argv.extend((0..9_000).map(|at| format!("{at:0100}").into_bytes()));
    large.env = (0..3000).map(|at| format!("V{at}={}", "x".repeat(100)).into_bytes()).collect();
    large.env.push(b"LAST=there".to_vec());
    let (end, log) = client.run(1, large, "");
    assert_eq!((end.reason, stdout(&log).as_str()), (ExitReason::Code(0), "9000\nthere\n"));
    let mut over = fed(&["true"]);
    over.argv.extend((0..26).map(|_| vec![b'x'; 100_000]));
    client.start_spec(2, over, b"");
    assert_eq!(client.ended().1.reason, ExitReason::NotStarted(libc::E2BIG));
    // A body that is no description.
    for (spec_len, body) in [(5, b"abc".as_slice()), (3, b"\xff\xff\xff"), (u32::MAX, b"")] {
        let refused = client.call(&Request::JobStart { job: 3, spec_len }, body);
        assert_eq!(refused.unwrap_err().errno, libc::EINVAL);
    }
}
