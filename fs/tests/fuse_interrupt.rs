//! Signals: a blocked operation ends at once, and no byte is lost by it.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod fuse_support;

use fuse_support::fake::{Content, Fake};
use fuse_support::stream::Stream;
use fuse_support::{Client, End, Mount, errno_of, eventually, handle_usr1};
use machinefs::tree::ops::{Opened, ROOT};
use std::process::{Command, Stdio};
use std::sync::Arc;

/// A mount with a blocking file `s`, from which a read takes at least so many bytes.
fn blocking(at_least: usize, stream_like: bool) -> (Mount, Arc<Stream>) {
    let fake = Fake::new();
    let stream = Stream::new(at_least);
    let node = fake.add(ROOT, b"s", Content::Stream(stream.clone()));
    fake.set(node, |node| node.opened = Opened { direct_io: true, stream: stream_like, ..Opened::default() });
    (Mount::new(fake), stream)
}

/// Opens the file in the client.
fn open(path: &std::ffi::CStr, flags: i32) -> i32 {
    // SAFETY: the path ends with a NUL.
    unsafe { libc::open(path.as_ptr(), flags) }
}

#[test]
fn a_blocked_cat_ends_by_interrupt_and_by_kill_as_a_shell_sees_it() {
    require_fuse!();
    for (signal, code) in [(libc::SIGINT, 130), (libc::SIGTERM, 143), (libc::SIGKILL, 137)] {
        for stream_like in [false, true] {
            let (mount, stream) = blocking(1, stream_like);
            let mut shell = Command::new("sh");
            shell
                .args(["-c", "cat s; exit $?"])
                .current_dir(mount.path(""))
                .stdout(Stdio::null())
                .stderr(Stdio::null());
            let mut child = shell.spawn().unwrap();
            eventually("a reader", || stream.readers() == 1);
            let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", child.id())).unwrap();
            // SAFETY: takes no pointers; the process is alive, it is blocked.
            unsafe { libc::kill(children.trim().parse().unwrap(), signal) };
            assert_eq!(child.wait().unwrap().code(), Some(code));
            eventually("no reader", || stream.readers() == 0);
        }
    }
}

#[test]
fn a_signal_with_a_handler_gives_the_bytes_taken_so_far() {
    require_fuse!();
    // The read wants 100 bytes; it has taken 3 when the signal comes: it must end with these 3.
    let (mount, stream) = blocking(100, true);
    let path = mount.c_path("s");
    let mut client = Client::run(|| {
        handle_usr1();
        let fd = open(&path, libc::O_RDONLY);
        let mut buffer = [0u8; 200];
        // SAFETY: the buffer is as long as is said.
        let first = unsafe { libc::read(fd, buffer.as_mut_ptr().cast(), 200) };
        if first != 3 || &buffer[..3] != b"abc" {
            return 1;
        }
        // SAFETY: as above.
        let second = unsafe { libc::read(fd, buffer.as_mut_ptr().cast(), 200) };
        if second == 4 && &buffer[..4] == b"defg" { 0 } else { 2 }
    });
    eventually("a reader", || stream.readers() == 1);
    stream.push(b"abc");
    eventually("the bytes are taken", || stream.left() == 0);
    client.signal(libc::SIGUSR1);
    eventually("the second read", || stream.reads() == 2);
    stream.push(b"defg");
    stream.end();
    assert_eq!(client.wait(), End::Exit(0));
}

#[test]
fn a_signal_with_a_handler_and_no_bytes_is_eintr_and_the_next_read_goes_on() {
    require_fuse!();
    let (mount, stream) = blocking(1, true);
    let path = mount.c_path("s");
    let mut client = Client::run(|| {
        handle_usr1();
        let fd = open(&path, libc::O_RDONLY);
        let mut buffer = [0u8; 200];
        // SAFETY: the buffer is as long as is said.
        let first = unsafe { libc::read(fd, buffer.as_mut_ptr().cast(), 200) };
        if errno_of(first as i64) != libc::EINTR {
            return 1;
        }
        // SAFETY: as above.
        let second = unsafe { libc::read(fd, buffer.as_mut_ptr().cast(), 200) };
        if second == 2 { 0 } else { 2 }
    });
    eventually("a reader", || stream.readers() == 1);
    client.signal(libc::SIGUSR1);
    eventually("the second read", || stream.reads() == 2);
    stream.push(b"xy");
    assert_eq!(client.wait(), End::Exit(0));
}

#[test]
fn bytes_survive_a_storm_of_signals() {
    require_fuse!();
    const TOTAL: usize = 20_000;
    let (mount, stream) = blocking(7, true);
    let path = mount.c_path("s");
    let mut client = Client::run(|| {
        handle_usr1();
        let fd = open(&path, libc::O_RDONLY);
        let (mut next, mut buffer) = (0usize, [0u8; 64]);
        loop {
            // SAFETY: the buffer is as long as is said.
            let count = unsafe { libc::read(fd, buffer.as_mut_ptr().cast(), buffer.len()) };
            match count {
                0 => return if next == TOTAL { 0 } else { 3 },
                count if count > 0 => {
                    for &byte in &buffer[..count as usize] {
                        if byte != (next % 251) as u8 {
                            return 1;
                        }
                        next += 1;
                    }
                }
                _ if errno_of(-1) == libc::EINTR => {}
                _ => return 2,
            }
        }
    });
    let bytes: Vec<u8> = (0..TOTAL).map(|index| (index % 251) as u8).collect();
    eventually("a reader", || stream.readers() == 1);
    for chunk in bytes.chunks(5) {
        stream.push(chunk);
        client.signal(libc::SIGUSR1);
    }
    stream.end();
    assert_eq!(client.wait(), End::Exit(0));
}

#[test]
fn interrupts_that_come_before_their_request_is_pending_are_not_lost() {
    require_fuse!();
    // Many short-lived readers, each signalled as soon as it may be reading: whichever thread of the server is faster,
    // each must end.
    let (mount, stream) = blocking(1, true);
    let path = mount.c_path("s");
    for round in 0..300 {
        let mut client = Client::run(|| {
            let fd = open(&path, libc::O_RDONLY);
            let mut buffer = [0u8; 8];
            // SAFETY: the buffer is as long as is said.
            unsafe { libc::read(fd, buffer.as_mut_ptr().cast(), 8) };
            0
        });
        for _ in 0..(round % 50) * 20 {
            std::hint::spin_loop();
        }
        if round % 3 == 0 {
            eventually("a reader", || stream.readers() == 1);
        }
        client.signal(if round % 2 == 0 { libc::SIGINT } else { libc::SIGKILL });
        assert!(matches!(client.wait(), End::Signal(_)));
        eventually("no reader is left", || stream.readers() == 0);
    }
}

#[test]
fn a_stopped_and_continued_reader_loses_nothing() {
    require_fuse!();
    let (mount, stream) = blocking(1, true);
    let output = mount.path("").with_extension("out");
    let mut cat = Command::new("cat");
    cat.arg(mount.path("s")).stdout(std::fs::File::create(&output).unwrap());
    let mut client = Client::command(cat);
    eventually("a reader", || stream.readers() == 1);
    client.signal(libc::SIGSTOP);
    eventually("stopped", || client.state() == 'T');
    stream.push(b"whole");
    client.signal(libc::SIGCONT);
    stream.end();
    assert_eq!(client.wait(), End::Exit(0));
    assert_eq!(std::fs::read(&output).unwrap(), b"whole");
    std::fs::remove_file(output).unwrap();
}
