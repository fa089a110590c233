//! Jobs with a terminal.
#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use machinefs_protocol::job::{ExitReason, JobSpec};
use machinefs_protocol::joblog::JobLog;
use machinefs_protocol::message::{Failure, Request};
use support::*;

fn tty() -> JobSpec {
    JobSpec { tty: Some((33, 77)), stdin: true, shell: b"sh".into(), ..spec() }
}

/// Reads until the output has that in it.
fn read_until(client: &Client, stream: &Pending, log: &mut JobLog, text: &str) {
    while !stdout(log).contains(text) {
        let frame = stream.next().unwrap();
        log.append_records(&frame.data).unwrap();
        client.credit(stream.tag, frame.data.len() as u64);
    }
}

fn resize(client: &Client, job: u64, rows: u16, cols: u16) -> Result<(), Failure> {
    client.call(&Request::JobResize { job, rows, cols }, &[]).map(|_| ())
}

#[test]
fn a_terminal_of_its_own() {
    let agent = Agent::start();
    let client = agent.client();
    let script = "stty size; tty; test -t 0 -a -t 1 -a -t 2 && echo terminal; echo $TERM; echo error >&2; \
                  : > /dev/tty && echo controlling; stty -a; ps -o pid=,sid=,tpgid= -p $$ | tr -s ' '; echo $$";
    let (end, log) = client.run(1, JobSpec { stdin: false, ..tty() }, script);
    let text = stdout(&log);
    assert_eq!((end.reason, stderr(&log).as_str()), (ExitReason::Code(0), ""), "{text}");
    assert!(text.starts_with("33 77\r\n/dev/pts/"), "{text}");
    assert!(text.contains("terminal\r\nxterm-256color\r\nerror\r\ncontrolling\r\n"), "{text}");
    for mode in ["icanon", "isig", "echo", "icrnl", "opost", "onlcr", "iutf8"] {
        assert!(text.split_whitespace().any(|word| word == mode), "{mode} in {text}");
    }
    for character in ["intr = ^C", "eof = ^D", "erase = ^?"] {
        assert!(text.contains(character), "{character} in {text}");
    }
    let lines: Vec<&str> = text.lines().collect();
    let own = lines.last().unwrap();
    assert_eq!(lines[lines.len() - 2].trim(), format!("{own} {own} {own}"));
    let named = JobSpec { env: vec![b"TERM=vt100".into()], ..tty() };
    assert!(stdout(&client.run(2, named, "echo $TERM").1).contains("vt100"));
}

/// What says that it is ready is what will be interrupted.
const INTERRUPTED: &[u8] =
    b"trap 'echo interrupted' INT; sh -c 'echo ready; exec sleep 1000'; echo code $?; exec sleep 1000";

#[test]
fn what_is_typed() {
    let agent = Agent::start();
    let client = agent.client();
    client.start_spec(1, tty(), b"echo ready; cat; echo over");
    let (input, _) = client.open_stdin(1, 0);
    let output = client.attach(1, 0);
    let mut log = replica();
    read_until(&client, &output, &mut log, "ready");
    client.data(input.tag, b"typed\r");
    read_until(&client, &output, &mut log, "typed\r\ntyped\r\n");
    // In the middle of a line the end needs more than one character.
    client.data(input.tag, b"rest");
    client.data(input.tag, &[]);
    assert_eq!(client.follow(&output, &mut log).reason, ExitReason::Code(0));
    assert_eq!(stdout(&log), "ready\r\ntyped\r\ntyped\r\nrestrestover\r\n");
    // Control characters act as on any terminal.
    client.start_spec(2, tty(), INTERRUPTED);
    let (input, _) = client.open_stdin(2, 0);
    let output = client.attach(2, 0);
    let mut log = replica();
    read_until(&client, &output, &mut log, "ready");
    client.data(input.tag, b"\x03");
    read_until(&client, &output, &mut log, "code 130");
    assert!(stdout(&log).contains("interrupted"), "{}", stdout(&log));
    client.data(input.tag, b"\x1c");
    assert!(matches!(client.follow(&output, &mut log).reason, ExitReason::Signal(3) | ExitReason::Code(131)));
    // A raw terminal has no end of file, and gets none.
    client.start_spec(3, tty(), b"stty raw -echo; echo ready; head -c 3 | od -An -tx1; sleep 1000");
    let (input, _) = client.open_stdin(3, 0);
    let output = client.attach(3, 0);
    let mut log = replica();
    read_until(&client, &output, &mut log, "ready");
    client.data(input.tag, b"\x03\x04\r");
    client.data(input.tag, &[]);
    read_until(&client, &output, &mut log, "03 04 0d");
    assert!(client.job(3).end.is_none());
}

#[test]
fn much_is_typed_and_nothing_lost() {
    let agent = Agent::start();
    let client = agent.client();
    // It does not read at first, so the terminal's own buffers fill up.
    client.start_spec(1, tty(), b"stty raw -echo; echo ready; sleep 0.3; head -c 3000000 | cksum");
    let (input, (_, mut credit, _)) = client.open_stdin(1, 0);
    let output = client.attach(1, 0);
    let mut log = replica();
    read_until(&client, &output, &mut log, "ready");
    let bytes: Vec<u8> = (0..3_000_000u32).map(|at| (at % 251) as u8).collect();
    let mut sent = 0;
    while sent < bytes.len() {
        let len = (bytes.len() - sent).min(credit as usize).min(50_000);
        if len == 0 {
            credit += input.next().unwrap().credit();
            continue;
        }
        client.data(input.tag, &bytes[sent..sent + len]);
        (sent, credit) = (sent + len, credit - len as u64);
    }
    client.follow(&output, &mut log);
    let path = agent.dir.path().join("bytes");
    std::fs::write(&path, &bytes).unwrap();
    let expected = std::process::Command::new("sh").args(["-c", "cksum < \"$0\""]).arg(&path).output().unwrap();
    let expected = String::from_utf8(expected.stdout).unwrap();
    assert!(stdout(&log).contains(expected.trim()), "{} and not {expected}", stdout(&log));
}

#[test]
fn a_new_size_is_seen() {
    let agent = Agent::start();
    let client = agent.client();
    let script = "trap 'stty size' WINCH; echo ready; while :; do sleep 0.01; done";
    client.start_spec(1, tty(), script.as_bytes());
    let output = client.attach(1, 0);
    let mut log = replica();
    read_until(&client, &output, &mut log, "ready");
    resize(&client, 1, 50, 132).unwrap();
    read_until(&client, &output, &mut log, "50 132");
    resize(&client, 1, u16::MAX, 1).unwrap();
    read_until(&client, &output, &mut log, "65535 1");
    client.start(2, "sleep 1000");
    assert_eq!(resize(&client, 2, 1, 1).unwrap_err().errno, libc::ENOTTY);
    assert_eq!(resize(&client, 3, 1, 1).unwrap_err().errno, libc::ENOENT);
    client.call(&Request::JobSignal { job: 1, signal: 9, all: false }, &[]).unwrap();
    client.follow(&output, &mut log);
    assert_eq!(resize(&client, 1, 1, 1).unwrap_err().errno, libc::ESRCH);
}

#[test]
fn a_terminal_outlives_the_link() {
    let agent = Agent::start();
    let client = agent.client();
    client.start_spec(1, tty(), b"stty -echo; echo ready; while read line; do echo \"got $line\"; done");
    let output = client.attach(1, 0);
    let mut log = replica();
    read_until(&client, &output, &mut log, "ready");
    let mut offset = 0;
    for round in 0..5u8 {
        // Another life of the daemon each time.
        let client = agent.client_of(u128::from(round) + 2);
        let (input, (accepted, ..)) = client.open_stdin(1, offset);
        assert_eq!(accepted, offset);
        let line = format!("line {round}\n");
        client.data(input.tag, line.as_bytes());
        offset += line.len() as u64;
        let output = client.attach(1, log.end());
        read_until(&client, &output, &mut log, &format!("got line {round}\r\n"));
        client.stream.shutdown(std::net::Shutdown::Both).unwrap();
    }
    assert!(agent.client().job(1).end.is_none());
}

#[test]
fn the_end_hangs_up() {
    let agent = Agent::start();
    let client = agent.client();
    // One in the background goes on without its terminal, which it finds gone.
    let mark = agent.dir.path().join("mark");
    let script = format!(
        "(trap '' HUP; while echo x; do sleep 0.02; done 2>/dev/null; echo gone > {}) & sleep 0.1; echo over; exit 4",
        mark.display()
    );
    client.start_spec(1, tty(), script.as_bytes());
    assert_eq!(client.ended().1.reason, ExitReason::Code(4));
    wait_until("it sees the end", || mark.exists());
    // A job may close its terminal and open it again.
    let script = "exec </dev/null >/dev/null 2>&1; sleep 0.2; exec >/dev/tty; echo again";
    let (end, log) = client.run(2, tty(), script);
    assert_eq!((end.reason, stdout(&log).as_str()), (ExitReason::Code(0), "again\r\n"));
    // What was printed last arrives, however quick the end.
    for job in 10..60 {
        let (_, log) = client.run(job, tty(), "head -c 3000 /dev/zero | tr '\\0' x; echo end");
        assert!(stdout(&log).len() == 3005 && stdout(&log).ends_with("end\r\n"), "{}", stdout(&log).len());
    }
}
