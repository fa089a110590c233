//! Streams to TCP ports of the guest.
#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use machinefs_protocol::frame::Kind;
use machinefs_protocol::message::Request;
use machinefs_protocol::port::{INITIAL_CREDIT, MAX_CONNECTIONS};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread::{JoinHandle, spawn};
use std::time::Duration;
use support::*;

/// A server; each of its connections is handled on a thread.
fn server(handle: impl Fn(TcpStream) + Send + Sync + 'static) -> u16 {
    serve(TcpListener::bind("127.0.0.1:0").unwrap(), handle)
}

fn serve(listener: TcpListener, handle: impl Fn(TcpStream) + Send + Sync + 'static) -> u16 {
    let port = listener.local_addr().unwrap().port();
    let handle = std::sync::Arc::new(handle);
    spawn(move || {
        for stream in listener.incoming().flatten() {
            let handle = handle.clone();
            spawn(move || handle(stream));
        }
    });
    port
}

fn echo(mut stream: TcpStream) {
    let mut buffer = vec![0; 50_000];
    while let Ok(count) = stream.read(&mut buffer) {
        if count == 0 || stream.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
}

fn connect(client: &Client, port: u16) -> Pending {
    let pending = client.send(&Request::Connect { port }, &[], 0);
    pending.wait().unwrap();
    pending
}

/// The host's end of a connection.
struct Stream<'a> {
    client: &'a Client,
    pending: Pending,
    granted: u64,
    sent: u64,
    /// How the guest's direction ended.
    end: Option<Result<(), i32>>,
}

impl<'a> Stream<'a> {
    fn new(client: &'a Client, port: u16) -> Self {
        Stream { client, pending: connect(client, port), granted: INITIAL_CREDIT, sent: 0, end: None }
    }

    /// Takes a frame if one comes in time; gives the data in it.
    fn take(&mut self, patience: Duration) -> Vec<u8> {
        let Some(frame) = self.pending.next_within(patience) else { return Vec::new() };
        match frame.header.kind {
            Kind::Credit => self.granted += frame.credit(),
            Kind::Error => self.end = Some(Err(frame.errno())),
            Kind::Data if frame.data.is_empty() => self.end = Some(Ok(())),
            Kind::Data => {
                self.client.credit(self.pending.tag, frame.data.len() as u64);
                return frame.data;
            }
            kind => panic!("{kind:?}"),
        }
        Vec::new()
    }

    fn send(&mut self, data: &[u8]) {
        self.client.data(self.pending.tag, data);
        self.sent += data.len() as u64;
    }

    fn rest(&mut self) -> Vec<u8> {
        let mut all = Vec::new();
        let until = std::time::Instant::now() + PATIENCE;
        while self.end.is_none() {
            assert!(std::time::Instant::now() < until, "no end in time");
            all.extend(self.take(Duration::from_millis(100)));
        }
        all
    }

    /// Sends what may be sent of it from `at` on, then the end, and adds what comes back. Whether it is over.
    fn step(&mut self, bytes: &[u8], at: &mut usize, back: &mut Vec<u8>) -> bool {
        let len = (bytes.len() - *at).min((self.granted - self.sent) as usize).min(60_000);
        if len > 0 {
            self.send(&bytes[*at..*at + len]);
            *at += len;
            if *at == bytes.len() {
                self.send(&[]);
            }
        }
        back.extend(self.take(Duration::from_millis(u64::from(len == 0))));
        self.end.is_some()
    }

    /// Sends all of it and the end, and reads to the end.
    fn exchange(&mut self, bytes: &[u8]) -> Vec<u8> {
        let (mut at, mut back) = (0, Vec::new());
        while !self.step(bytes, &mut at, &mut back) {}
        back
    }
}

fn bytes(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64).map(|at| ((at + seed).wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

/// Open descriptors and threads.
fn size(agent: &Agent) -> (usize, usize) {
    let count = |what: &str| std::fs::read_dir(format!("/proc/{}/{what}", agent.process.id())).unwrap().count();
    (count("fd"), count("task"))
}

#[test]
fn bytes_go_both_ways_and_each_direction_ends_by_itself() {
    let agent = Agent::start();
    let client = agent.client();
    let port = server(echo);
    let all = bytes(1, 20_000_000);
    let mut stream = Stream::new(&client, port);
    assert!(stream.exchange(&all) == all);
    assert_eq!(stream.end, Some(Ok(())));
    assert!(agent.rss() < 64 * 1024);
    // One that answers only when all was said.
    let port = server(|mut stream| {
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        write!(stream, "{} bytes", all.len()).unwrap();
    });
    assert_eq!(Stream::new(&client, port).exchange(&all[..1_000_000]), b"1000000 bytes");
    // One that says all at once, ends, and goes on listening.
    let (sender, receiver) = std::sync::mpsc::channel();
    let sender = std::sync::Mutex::new(sender);
    let port = server(move |mut stream| {
        stream.write_all(b"all I have").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        sender.lock().unwrap().send(all).unwrap();
    });
    let mut stream = Stream::new(&client, port);
    assert_eq!(stream.rest(), b"all I have");
    stream.send(b"heard");
    stream.send(&[]);
    assert_eq!(receiver.recv_timeout(PATIENCE).unwrap(), b"heard");
}

#[test]
fn refusals_come_at_once_and_ipv6_is_tried() {
    let agent = Agent::start();
    let client = agent.client();
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let refused = client.call(&Request::Connect { port: free }, &[]).unwrap_err();
    assert_eq!(refused.errno, libc::ECONNREFUSED);
    assert!(refused.message.contains(&free.to_string()), "{}", refused.message);
    match TcpListener::bind("[::1]:0") {
        Ok(listener) => assert_eq!(Stream::new(&client, serve(listener, echo)).exchange(b"six"), b"six"),
        Err(_) => println!("skipped: no IPv6 here"),
    }
}

#[test]
fn a_hundred_connections_at_once_leave_nothing() {
    let agent = Agent::start();
    let client = agent.client();
    let port = server(echo);
    assert_eq!(Stream::new(&client, port).exchange(b"x"), b"x");
    let (descriptors, threads) = size(&agent);
    for _ in 0..3 {
        let streams: Vec<Stream<'_>> = (0..100).map(|_| Stream::new(&client, port)).collect();
        assert!(size(&agent).1 <= threads + 8, "a thread is not for one connection");
        let all: Vec<Vec<u8>> = (0..100).map(|at| bytes(at, 300_000)).collect();
        let mut open: Vec<_> =
            streams.into_iter().zip(&all).map(|(stream, all)| (stream, all, 0, Vec::new())).collect();
        while !open.is_empty() {
            open.retain_mut(|(stream, all, at, back)| {
                let over = stream.step(all, at, back);
                assert!(!over || back == *all);
                !over
            });
        }
    }
    wait_until("all closed", || size(&agent).0 <= descriptors);
    // More than there may be.
    let open: Vec<Pending> = (0..MAX_CONNECTIONS).map(|_| connect(&client, port)).collect();
    assert_eq!(client.call(&Request::Connect { port }, &[]).unwrap_err().errno, libc::EMFILE);
    for pending in open {
        client.cancel(pending.tag);
    }
    wait_until("all closed", || size(&agent).0 <= descriptors);
    assert_eq!(Stream::new(&client, port).exchange(b"again"), b"again");
}

/// A server that waits for the end of its one connection, and says how that was.
fn waiter() -> (u16, JoinHandle<std::io::Result<usize>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let thread = spawn(move || {
        let mut stream = listener.accept()?.0;
        let mut total = 0;
        let mut buffer = [0; 1000];
        loop {
            match stream.read(&mut buffer)? {
                0 => return Ok(total),
                count => total += count,
            }
        }
    });
    (port, thread)
}

#[test]
fn resets() {
    let agent = Agent::start();
    let client = agent.client();
    // The host's.
    let (port, thread) = waiter();
    let stream = connect(&client, port);
    client.data(stream.tag, b"abc");
    client.ping();
    client.cancel(stream.tag);
    client.data(stream.tag, b"late");
    let error = thread.join().unwrap().unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    // The guest's.
    let port = server(|stream| {
        let _ = rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO));
    });
    let mut stream = Stream::new(&client, port);
    stream.rest();
    assert_eq!(stream.end, Some(Err(libc::ECONNRESET)));
    // One that does not care for what it is told, but answers.
    let port = server(|mut stream| {
        stream.write_all(&[b'a'; 100_000]).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        std::thread::sleep(Duration::from_millis(100));
    });
    let mut stream = Stream::new(&client, port);
    stream.send(&[b'x'; 200_000]);
    assert_eq!(stream.rest(), [b'a'; 100_000]);
    // The link's loss is a reset for all.
    let (port, thread) = waiter();
    let _stream = connect(&client, port);
    let client = agent.client();
    let error = thread.join().unwrap().unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    client.ping();
}

#[test]
fn neither_side_is_flooded() {
    let agent = Agent::start();
    let client = agent.client();
    // A server that sends without end: without credit nothing comes.
    let port = server(|mut stream| while stream.write_all(&[7; 50_000]).is_ok() {});
    let stream = connect(&client, port);
    let mut received = 0;
    while let Some(frame) = stream.next_within(Duration::from_millis(300)) {
        received += frame.data.len() as u64;
    }
    assert_eq!(received, INITIAL_CREDIT);
    client.credit(stream.tag, 10);
    assert_eq!(stream.next().unwrap().data.len(), 10);
    client.cancel(stream.tag);
    // One that reads nothing: no credit comes once its socket is full.
    let port = server(|stream| {
        std::thread::sleep(Duration::from_secs(5));
        drop(stream);
    });
    let stream = connect(&client, port);
    let (mut granted, mut sent) = (INITIAL_CREDIT, 0);
    while sent < granted {
        client.data(stream.tag, &vec![0; (granted - sent).min(100_000) as usize]);
        sent += (granted - sent).min(100_000);
        while let Some(frame) = stream.next_within(Duration::from_millis(if sent == granted { 200 } else { 0 })) {
            granted += frame.credit();
        }
    }
    assert!(agent.rss() < 64 * 1024, "{} KiB", agent.rss());
    assert!(!client.call_closed());
    // More than granted ends the connection.
    client.data(stream.tag, &[0; 1]);
    wait_until("closed", || client.call_closed());
}
