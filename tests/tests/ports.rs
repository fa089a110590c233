//! `ports/`: TCP ports of the machine that are open on the host.

use machinefs_tests::user::{self, lookup};
use machinefs_tests::{Daemon, Machine, User, each_user, each_user_alone, eventually, shared, skip};
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

/// A client that waits for nothing without bound.
fn connect(at: SocketAddr) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect(at)?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    stream.set_write_timeout(Some(Duration::from_secs(60)))?;
    Ok(stream)
}

/// Where the URL in a port's file leads.
#[track_caller]
fn at(m: &Machine<'_>, port: u16) -> SocketAddr {
    let text = m.read(&format!("ports/{port}"));
    let url = text.strip_suffix('\n').unwrap_or_else(|| panic!("one line: {text:?}"));
    let address = url.strip_prefix("http://").unwrap_or_else(|| panic!("a URL: {url}"));
    address.parse().unwrap_or_else(|_| panic!("an address: {url}"))
}

/// Opens a port of the machine on one of the host that no other test is given: what it frees stays free.
#[track_caller]
fn expose(m: &Machine<'_>, port: u16) -> SocketAddr {
    static LAST: AtomicU16 = AtomicU16::new(0);
    let number = 20_000 + (std::process::id() % 200) as u16 * 50 + LAST.fetch_add(1, Ordering::Relaxed);
    m.bash(&format!("echo {number} > $D/ports/{port}")).ok();
    at(m, port)
}

/// Starts a Python program in the machine, as a job that goes on. `listener` listens at port 8080 of its loopback.
#[track_caller]
fn serve(m: &Machine<'_>, program: &str) {
    let head = "import os, socket, struct, threading, time\n\
                listener = socket.create_server(('127.0.0.1', 8080), backlog=2000)\n\
                def read(s):\n    \
                    parts = []\n    \
                    while part := s.recv(65536): parts.append(part)\n    \
                    return b''.join(parts)\n\
                def reset(s):\n    \
                    s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))\n    \
                    s.close()\n";
    let script = format!("#!/usr/bin/env python3\n{head}{program}");
    m.daemon.exec(&["bash", "-c", "printf '%s' \"$2\" > \"$1\"", "serve", &m.path("exec"), &script]).ok();
    let listens = eventually(60, || m.run("grep -q ':1F90 .* 0A ' /proc/net/tcp").1 == 0);
    assert!(listens, "{}", m.read("history"));
}

/// What answers once, when it can be reached at all: a machine on its way up resets what comes too early.
fn answer(at: SocketAddr, question: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut stream = connect(at)?;
    stream.write_all(question)?;
    stream.shutdown(Shutdown::Write)?;
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// What is open ends: by its program's end, or by a reset.
#[track_caller]
fn ends(stream: &mut TcpStream) {
    match stream.read(&mut [0; 1]) {
        Ok(0) => {}
        Ok(_) => panic!("it said something"),
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
    }
}

const ECHO: &str = "
def one(s):
    s.sendall(read(s))
    s.close()
while True: threading.Thread(target=one, args=(listener.accept()[0],)).start()
";

fn pattern(seed: usize, len: usize) -> Vec<u8> {
    (0..len).map(|at| ((at * 31 + at / 251 + seed * 7) % 256) as u8).collect()
}

each_user! {
    /// touch opens, cat tells the URL, rm closes; a real HTTP server answers a real client. In every shell.
    fn touch_cat_rm(d) {
        let m = d.running("web");
        m.daemon.exec(&["bash", "-c", "echo 'cd /etc; exec python3 -m http.server 8080 --bind 127.0.0.1' > $0/exec", &m.name]).ok();
        for shell in machinefs_tests::shells() {
            m.sh(shell, "touch $D/ports/8080; test \"$(ls $D/ports)\" = 8080").ok();
            let get = "import sys, time, urllib.request\n\
                       url = open(D + '/ports/8080').read().strip()\n\
                       assert os.stat(D + '/ports/8080').st_size == len(url) + 1\n\
                       for _ in range(600):\n    \
                           try: body = urllib.request.urlopen(url + '/hostname', timeout=30).read()\n    \
                           except OSError: time.sleep(0.1)\n    \
                           else: break\n\
                       assert body.decode().strip() == D, body\n";
            m.python(get).ok();
            assert!(at(&m, 8080).ip().is_loopback());
            let url = expose(&m, 8080);
            assert!(connect(url).is_ok());
            m.sh(shell, "rm $D/ports/8080; ! test -e $D/ports/8080; test -z \"$(ls $D/ports)\"").ok();
            assert_eq!(connect(url).expect_err("it is closed").kind(), ErrorKind::ConnectionRefused);
        }
        let events = m.read("events");
        assert!(events.contains(" port open=8080 host=") && events.contains(" port closed=8080"), "{events}");
    }
}

each_user! {
    /// The host's port: the same number if it is free, the one that is asked for, or an error that says why.
    fn the_hosts_port(d) {
        let m = d.running("host");
        serve(&m, ECHO);
        let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
        let number = taken.local_addr().expect("its number").port();
        m.bash(&format!("touch $D/ports/{number} $D/ports/80 $D/ports/8080")).ok();
        assert_ne!(at(&m, number).port(), number, "somebody has it");
        assert!(at(&m, 80).port() >= 1024);
        m.bash(&format!("echo {number} > $D/ports/8080")).fails_with("Address already in use");
        m.bash(&format!("exec 3<> $D/ports/8080; echo {number} >&3 || cat <&3 | grep -q 'in use'")).ok();
        assert!(m.read("errors").contains(" port EADDRINUSE "), "{}", m.read("errors"));
        assert_ne!(at(&m, 8080).port(), number, "what was there is there still");
        drop(taken);
        m.bash(&format!("echo {number} > $D/ports/8080; test \"$(cat $D/ports/8080)\" = http://127.0.0.1:{number}")).ok();
        assert_eq!(answer(at(&m, 8080), b"hello").expect("an answer"), b"hello");
        // What is read can be written, by any writer.
        m.bash("url=$(cat $D/ports/8080); echo \"$url\" > $D/ports/8080; printf %s \"$url\" > $D/ports/8080; test \"$(cat $D/ports/8080)\" = \"$url\"").ok();
        m.bash(&format!("printf {number} > $D/ports/8080; test \"$(cat $D/ports/8080)\" = http://127.0.0.1:{number}")).ok();
        assert_eq!(answer(at(&m, 8080), b"again").expect("an answer"), b"again");
        for bad in ["0", "65536", "http", "-1", "80 90", "http://127.0.0.1:x", "http://10.0.0.1:80"] {
            m.bash(&format!("echo '{bad}' > $D/ports/8080")).fails_with("Invalid argument");
        }
        for bad in ["0", "08080", "+80", "65536", "http", "8080x", "99999999999"] {
            m.bash(&format!("touch $D/ports/{bad}")).fails_with("Invalid argument");
        }
        m.bash("set -C; echo 3000 > $D/ports/8080").fails();
        m.bash("mkdir $D/ports/81").fails_with("not permitted");
        m.bash("mv $D/ports/80 $D/ports/81").fails_with("not permitted");
        m.bash("rm $D/ports/82").fails_with("No such file");
        assert!(m.read("errors").contains("EINVAL") && m.read("errors").contains("08080"), "{}", m.read("errors"));
    }
}

each_user! {
    /// Both directions are whole, each ends by itself, and a hundred connections at once do not mix.
    fn half_close_and_a_hundred_at_once(d) {
        let m = d.running("hundred");
        m.bash("touch $D/ports/8080").ok();
        serve(&m, ECHO);
        let at = at(&m, 8080);
        let clients: Vec<_> = (0..100)
            .map(|number| {
                std::thread::spawn(move || {
                    let data = pattern(number, 200_000 + number);
                    let mut stream = connect(at).expect("a connection");
                    let mut writer = stream.try_clone().expect("a second handle");
                    let sent = data.clone();
                    let writing = std::thread::spawn(move || {
                        writer.write_all(&sent).expect("sending");
                        writer.shutdown(Shutdown::Write).expect("the end of one direction");
                    });
                    let mut back = Vec::new();
                    stream.read_to_end(&mut back).expect("receiving");
                    writing.join().expect("the writer");
                    assert!(back == data, "connection {number}: {} of {} bytes", back.len(), data.len());
                })
            })
            .collect();
        for client in clients {
            client.join().expect("a client");
        }
        // The other way round: the guest ends first, and reads on.
        m.bash("touch $D/ports/8081").ok();
        let program = "
late = socket.create_server(('127.0.0.1', 8081))
s = late.accept()[0]
s.sendall(b'first')
s.shutdown(socket.SHUT_WR)
open('/root/heard', 'wb').write(read(s))
";
        m.daemon.exec(&["bash", "-c", "printf '#!/usr/bin/env python3\\nimport socket\\ndef read(s): return s.recv(65536) + (read(s) if s.recv(1, socket.MSG_PEEK) else b\"\")\\n%s' \"$2\" > \"$1\"", "serve", &m.path("exec"), program]).ok();
        let at = self::at(&m, 8081);
        let answers = eventually(60, || m.run("grep -q ':1F91 .* 0A ' /proc/net/tcp").1 == 0);
        assert!(answers);
        let mut stream = connect(at).expect("a connection");
        let mut first = Vec::new();
        stream.read_to_end(&mut first).expect("the guest's end");
        assert_eq!(first, b"first");
        stream.write_all(b"second").expect("the other direction is open");
        stream.shutdown(Shutdown::Write).expect("its end");
        assert!(eventually(60, || m.run("grep -qx second /root/heard").1 == 0));
    }
}

each_user! {
    /// A reset of one end is a reset of the other; where nobody listens it is one too.
    fn resets(d) {
        let m = d.running("reset");
        m.bash("touch $D/ports/8080 $D/ports/8081").ok();
        serve(&m, "
s = listener.accept()[0]
s.recv(1)
reset(s)
s = listener.accept()[0]
s.recv(1)
try: s.recv(1); end = 'closed'
except ConnectionResetError: end = 'reset'
open('/root/end', 'w').write(end)
");
        let mut stream = connect(at(&m, 8080)).expect("a connection");
        stream.write_all(b"x").expect("a byte");
        assert_eq!(stream.read(&mut [0; 1]).expect_err("a reset").kind(), ErrorKind::ConnectionReset);
        m.python("import socket, struct\n\
                  host, port = open(D + '/ports/8080').read().strip()[7:].split(':')\n\
                  s = socket.create_connection((host, int(port)))\n\
                  s.sendall(b'x')\n\
                  time.sleep(0.5)\n\
                  s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))\n\
                  s.close()\n").ok();
        assert!(eventually(60, || m.run("test -s /root/end").1 == 0));
        assert_eq!(m.guest("cat /root/end"), "reset");
        let mut stream = connect(at(&m, 8081)).expect("a connection");
        assert_eq!(stream.read(&mut [0; 1]).expect_err("nobody listens").kind(), ErrorKind::ConnectionReset);
    }
}

each_user! {
    /// Who does not read makes the other end wait, in both directions; nothing is lost, and nothing piles up between.
    fn back_pressure(d) {
        let m = d.running("pressure");
        m.bash("touch $D/ports/8080").ok();
        serve(&m, "
s = listener.accept()[0]
while not os.path.exists('/root/go'): time.sleep(0.05)
open('/root/count', 'w').write(str(len(read(s))))
s.close()
s = listener.accept()[0]
s.setblocking(False)
sent, last = 0, time.monotonic()
while time.monotonic() < last + 1:
    try: sent += s.send(bytes(65536)); last = time.monotonic()
    except BlockingIOError: time.sleep(0.05)
open('/root/sent', 'w').write(str(sent))
s.close()
");
        let at = at(&m, 8080);
        let mut stream = connect(at).expect("a connection");
        stream.set_write_timeout(Some(Duration::from_secs(1))).expect("a time-out");
        let (block, mut sent) = (vec![7_u8; 65536], 0);
        let full = loop {
            match stream.write(&block) {
                Ok(count) => sent += count,
                Err(error) => break error,
            }
            assert!(sent < 64 << 20, "it takes more and more");
        };
        assert!(matches!(full.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{full}");
        m.guest("touch /root/go");
        stream.shutdown(Shutdown::Write).expect("the end");
        assert!(eventually(60, || m.run("test -s /root/count").1 == 0));
        assert_eq!(m.guest("cat /root/count"), sent.to_string());
        // And from the guest.
        let mut stream = connect(at).expect("a connection");
        assert!(eventually(60, || m.run("test -s /root/sent").1 == 0), "it is to block");
        let sent: usize = m.guest("cat /root/sent").parse().expect("a number");
        assert!(sent < 64 << 20, "{sent} bytes piled up");
        let mut all = Vec::new();
        stream.read_to_end(&mut all).expect("all of it");
        assert_eq!(all.len(), sent);
    }
}

each_user! {
    /// A stopped machine refuses connections; after its start the same URL answers. What it is destroyed with is reset.
    fn with_the_machine(d) {
        let m = d.create("life", "autostart=no");
        m.until_status("stopped");
        let url = expose(&m, 8080);
        assert_eq!(connect(url).expect_err("it is stopped").kind(), ErrorKind::ConnectionRefused);
        m.ctl("start").ok();
        m.until_running();
        serve(&m, ECHO);
        assert_eq!(answer(url, b"one").expect("an answer"), b"one");
        let mut open = connect(url).expect("a connection");
        m.ctl("restart").ok();
        ends(&mut open);
        m.until_running();
        serve(&m, ECHO);
        assert_eq!(answer(url, b"two").expect("an answer"), b"two");
        m.ctl("stop").ok();
        m.until_status("stopped");
        assert_eq!(connect(url).expect_err("it is stopped").kind(), ErrorKind::ConnectionRefused);
        // Somebody takes its port meanwhile.
        let taken = TcpListener::bind(url).expect("it is free");
        m.ctl("start").ok();
        m.until_running();
        let other = at(&m, 8080);
        assert_ne!(other, url);
        assert!(m.read("errors").contains(&format!("it is reached by http://{other} now")), "{}", m.read("errors"));
        drop(taken);
        let other = expose(&m, 8080);
        serve(&m, ECHO);
        let mut open = connect(other).expect("a connection");
        open.write_all(b"x").expect("a byte");
        m.bash("rmdir $D").ok();
        ends(&mut open);
        assert_eq!(connect(other).expect_err("it is gone").kind(), ErrorKind::ConnectionRefused);
    }
}

each_user! {
    /// A connection wakes a machine that rests, stopped or frozen, and waits for it. What connections carry is use.
    fn a_connection_wakes(d) {
        let program = "import socketserver\nclass Echo(socketserver.StreamRequestHandler):\n    def handle(self): self.wfile.write(self.rfile.readline())\n\
                       socketserver.ThreadingTCPServer.allow_reuse_address = True\nsocketserver.ThreadingTCPServer((\"127.0.0.1\", 8080), Echo).serve_forever()\n";
        for way in ["stop", "pause"] {
            let m = d.create("wake", &format!("autostart=no on_idle={way}"));
            m.until_status("stopped");
            m.bash("touch $D/ports/8080; echo start > $D/ctl; cat $D/wait/running").ok();
            m.python(&format!("open(f'{{D}}/files/root/echo.py', 'w').write({program:?})")).ok();
            m.ctl("stop").ok();
            m.until_status("stopped");
            m.bash("echo 'python3 /root/echo.py' > $D/config/command; echo start > $D/ctl; cat $D/wait/running").ok();
            let url = expose(&m, 8080);
            let line = |text: &[u8]| answer(url, text);
            assert!(eventually(60, || line(b"up\n").is_ok_and(|back| back == b"up\n")), "{}", m.read("history"));
            // Traffic keeps it awake longer than it may be unused.
            m.bash("echo 2s > $D/config/idle_timeout").ok();
            for _ in 0..10 {
                assert_eq!(line(b"busy\n").expect("an answer"), b"busy\n");
                std::thread::sleep(Duration::from_millis(500));
            }
            assert_eq!(m.status(), "running");
            let lacks_freezer = || m.read("errors").contains("on_idle=pause");
            let is_down = || m.info("idle") == "yes" && ["stopped", "paused"].contains(&m.status().as_str());
            let rests = eventually(60, || is_down() || lacks_freezer()) && is_down();
            if lacks_freezer() {
                machinefs_tests::skip_part!("no freezer for machines of this user here");
                continue;
            }
            assert!(rests, "{} {}", m.status(), m.read("errors"));
            assert_eq!(line(b"awake\n").expect("the first connection waits"), b"awake\n");
            assert_eq!(m.status(), "running");
            // One that its owner stopped stays stopped.
            m.ctl("stop").ok();
            m.until_status("stopped");
            assert_eq!(connect(url).expect_err("it is stopped").kind(), ErrorKind::ConnectionRefused);
        }
    }
}

each_user_alone! {
    /// Ports outlive the daemon: the same URL answers after kill -9, and files keep their inode numbers. One whose number
    /// somebody has taken meanwhile gets another, and says so.
    fn they_outlive_the_daemon(user) {
        let d = Daemon::start(user);
        let m = d.running("crash");
        let (url, other) = (expose(&m, 8080), expose(&m, 8081));
        m.bash("stat -c %i $D/ports/* > $T/before").ok();
        serve(&m, ECHO);
        d.kill();
        assert_eq!(connect(url).expect_err("no daemon").kind(), ErrorKind::ConnectionRefused);
        let taken = TcpListener::bind(other).expect("it is free");
        d.boot();
        m.until_running();
        assert_eq!(at(&m, 8080), url);
        assert_eq!(answer(url, b"still there").expect("an answer"), b"still there");
        assert_ne!(at(&m, 8081), other);
        assert!(m.read("errors").contains(" port EADDRINUSE "), "{}", m.read("errors"));
        drop(taken);
        m.bash("stat -c %i $D/ports/* | cmp - $T/before").ok();
        m.bash("rm $D/ports/8080").ok();
        d.crash();
        m.until_running();
        m.bash("test \"$(ls $D/ports)\" = 8081").ok();
        assert_eq!(connect(url).expect_err("it was closed").kind(), ErrorKind::ConnectionRefused);
    }
}

each_user_alone! {
    /// Bound to 127.0.0.1, unless the daemon is told otherwise.
    fn the_address(user) {
        for (arguments, elsewhere) in [(&[][..], false), (&["--ports-address", "0.0.0.0"][..], true)] {
            let d = Daemon::start_with(user, |_| arguments.iter().map(|word| word.to_string()).collect());
            let m = d.running("address");
            m.bash("touch $D/ports/8080").ok();
            let url = at(&m, 8080);
            assert_eq!(url.ip().to_string(), "127.0.0.1");
            assert!(connect(url).is_ok());
            let other = connect(SocketAddr::new([127, 0, 0, 2].into(), url.port()));
            assert_eq!(other.is_ok(), elsewhere, "{other:?}");
        }
    }
}

each_user! {
    /// There is an end to ports and to connections of a machine; who is refused does not disturb the others.
    fn limits(d) {
        let m = d.running("many");
        m.bash("for n in $(seq 8080 8179); do touch $D/ports/$n; done; test $(ls $D/ports | wc -l) = 100").ok();
        m.bash("touch $D/ports/9000").fails_with("Too many open files");
        m.bash("rm $D/ports/8179; touch $D/ports/9000").ok();
        serve(&m, "
import selectors
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (4000, 4000))
watch = selectors.DefaultSelector()
watch.register(listener, selectors.EVENT_READ)
while True:
    for key, _ in watch.select():
        if key.fileobj is listener:
            watch.register(listener.accept()[0], selectors.EVENT_READ)
        else:
            data = key.fileobj.recv(100)
            if data: key.fileobj.sendall(data)
            else: watch.unregister(key.fileobj); key.fileobj.close()
");
        m.python("
import resource, socket
resource.setrlimit(resource.RLIMIT_NOFILE, (4000, 4000))
host, port = open(D + '/ports/8080').read().strip()[7:].split(':')
def ask(s):
    try:
        s.sendall(b'x')
        return s.recv(1) == b'x'
    except ConnectionError:
        return False
def new():
    try: s = socket.create_connection((host, int(port)), timeout=60)
    except ConnectionError: return None, False
    return s, ask(s)
good = []
for number in range(1000):
    s, answers = new()
    assert answers, number
    good.append(s)
extra = [new()[1] for _ in range(20)]
assert not any(extra), extra
assert all(map(ask, good))
for s in good[:10]: s.close()
for _ in range(600):
    if new()[1]: break
    time.sleep(0.1)
else: raise AssertionError('there is room again')
").ok();
    }
}

/// Under root's daemon, users get no port of the host's that is root's.
#[test]
fn ports_of_root_are_roots() {
    let Some(d) = shared(User::Root) else { return };
    let Some(other) = lookup(user::ORDINARY) else { skip!("there is no user mfstest") };
    let theirs = d.name("theirs");
    let script = format!(
        "set -eu; cd $M; mkdir {theirs}; touch {theirs}/ports/80; ! echo 80 > {theirs}/ports/80; \
         grep -q 'port EACCES' {theirs}/errors; grep -q ':[1-9][0-9][0-9][0-9]' {theirs}/ports/80; rmdir {theirs}"
    );
    d.exec_as(&other, &["bash", "-c", &script]).ok();
    let m = d.running("roots");
    m.bash("touch $D/ports/8080; for n in 1001 1002 1003 1004; do echo $n > $D/ports/8080 && exit; done; exit 1").ok();
    assert!(at(&m, 8080).port() < 1024);
}
