//! poll, select and epoll on blocking files wake exactly at a change.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod fuse_support;

use fuse_support::fake::{Content, Fake};
use fuse_support::stream::Stream;
use fuse_support::{Client, End, Mount, eventually};
use machinefs::tree::ops::{Opened, ROOT};
use std::process::Command;
use std::sync::Arc;

fn blocking() -> (Mount, Arc<Stream>) {
    let fake = Fake::new();
    let stream = Stream::new(1);
    let node = fake.add(ROOT, b"s", Content::Stream(stream.clone()));
    fake.set(node, |node| node.opened = Opened { direct_io: true, stream: true, ..Opened::default() });
    (Mount::new(fake), stream)
}

/// Runs Python in the mount.
fn python(mount: &Mount, script: &str) -> Client {
    let mut command = Command::new("python3");
    command.args(["-I", "-c", script]).current_dir(mount.path(""));
    Client::command(command)
}

const WAYS: [(&str, &str); 4] = [
    ("poll", "p=select.poll(); p.register(fd,select.POLLIN); r=p.poll()"),
    ("epoll", "p=select.epoll(); p.register(fd,select.EPOLLIN); r=p.poll()"),
    ("epoll edge", "p=select.epoll(); p.register(fd,select.EPOLLIN|select.EPOLLET); r=p.poll()"),
    ("select", "r=select.select([fd],[],[])[0]"),
];

#[test]
fn a_poller_sleeps_until_something_comes() {
    require_fuse!();
    for (name, wait) in WAYS {
        let (mount, stream) = blocking();
        let script = format!(
            "import os,select,sys\nfd=os.open('s',os.O_RDONLY|os.O_NONBLOCK)\n\
             try: os.read(fd,10); sys.exit(1)\nexcept BlockingIOError: pass\n{wait}\n\
             sys.exit(0 if r and os.read(fd,10)==b'hello' else 2)"
        );
        let mut client = python(&mount, &script);
        eventually(name, || stream.pollers() > 0);
        assert_eq!(client.try_wait(), None, "{name} must wait");
        stream.push(b"hello");
        assert_eq!(client.wait(), End::Exit(0), "{name}");
    }
}

#[test]
fn a_poller_of_what_is_ready_does_not_sleep() {
    require_fuse!();
    for (name, wait) in WAYS {
        let (mount, stream) = blocking();
        stream.push(b"hello");
        let script =
            format!("import os,select,sys\nfd=os.open('s',os.O_RDONLY|os.O_NONBLOCK)\n{wait}\nsys.exit(0 if r else 2)");
        assert_eq!(python(&mount, &script).wait(), End::Exit(0), "{name}");
    }
}

#[test]
fn many_changes_in_a_row_are_all_seen() {
    require_fuse!();
    let (mount, stream) = blocking();
    let script = "import os,select,sys\nfd=os.open('s',os.O_RDONLY|os.O_NONBLOCK)\n\
        p=select.epoll(); p.register(fd,select.EPOLLIN)\nn=0\nwhile n<2000:\n p.poll()\n\
        \n try: n+=len(os.read(fd,100))\n except BlockingIOError: pass\nsys.exit(0 if n==2000 else 1)";
    let mut client = python(&mount, script);
    eventually("a poller", || stream.pollers() > 0);
    for index in 0..2000 {
        stream.push(b"x");
        if index % 100 == 0 {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }
    assert_eq!(client.wait(), End::Exit(0));
}

#[test]
fn a_poller_can_be_killed() {
    require_fuse!();
    for signal in [libc::SIGINT, libc::SIGKILL] {
        let (mount, stream) = blocking();
        let script = "import os,select,signal\nsignal.signal(signal.SIGINT,signal.SIG_DFL)\n\
            fd=os.open('s',os.O_RDONLY)\np=select.poll(); p.register(fd,select.POLLIN); p.poll()";
        let mut client = python(&mount, script);
        eventually("a poller", || stream.pollers() > 0);
        client.signal(signal);
        assert_eq!(client.wait(), End::Signal(signal));
    }
}
