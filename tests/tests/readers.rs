//! Programs that wander in read the true content, change nothing, and do not hang.

use machinefs_tests::shell::have;
use machinefs_tests::{Daemon, Machine, Shell, each_user, image, skip, skip_part};

/// A machine of a small image, so that walking all of it is quick.
fn small<'a>(d: &'a Daemon, prefix: &str) -> Option<Machine<'a>> {
    let image = image::small(d)?;
    let m = d.create(prefix, &format!("image={}", image.display()));
    m.until_running();
    Some(m)
}

macro_rules! small {
    ($d:expr, $prefix:expr) => {
        match small($d, $prefix) {
            Some(machine) => machine,
            None => skip!("busybox is not installed"),
        }
    };
}

each_user! {
    /// stat's size is the true size, and cat, busybox cat, cp, wc -c, tar and mmap-free readers agree to the byte.
    fn sizes_are_true(d) {
        let m = small!(d, "size");
        m.bash("echo 'echo one' > $D/exec; cat $D/exit; ls $D/nothing 2>/dev/null || true; echo bogus > $D/ctl || true").ok();
        for name in ["status", "ctl", "info", "info.json", "errors", "events", "history", "health", "out", "exit", "config/image",
            "config/memory", "jobs/1/cmd", "jobs/1/out", "jobs/1/exit", "jobs/1/status"] {
            let name = if name.starts_with("jobs") {
                name.replacen('1', &d.exec(&["ls", &m.path("jobs")]).ok().text(), 1)
            } else {
                name.to_string()
            };
            let script = format!(r#"
name = f'{{D}}/{name}'
data = open(name, 'rb').read()
size = os.stat(name).st_size
assert size == len(data), (name, size, len(data))
mask = lambda b: b.translate(bytes.maketrans(b'0123456789', b'0000000000'))
readers = dict(cat=['cat', name], bbcat=['busybox', 'cat', name], dd=['dd', 'status=none', 'bs=7', 'if=' + name],
    tar=['sh', '-c', f'tar cf - {{name}} | tar xOf -'], bbtar=['sh', '-c', f'busybox tar cf - {{name}} | tar xOf -'],
    cp=['sh', '-c', f'cp {{name}} $T/copy; cat $T/copy; rm -f $T/copy'], bbcp=['sh', '-c', f'busybox cp {{name}} $T/copy; cat $T/copy; rm -f $T/copy'],
    head=['head', '-c', '1000000', name], tail=['tail', '-c', '+1', name], bash=['bash', '-c', f'printf "%s\\n" "$(<{{name}})"'])
for reader, argv in readers.items():
    done = subprocess.run(argv, capture_output=True)
    assert done.returncode == 0, (reader, name, done)
    if not (reader == 'bash' and not data): assert mask(done.stdout) == mask(data), (reader, name, done.stdout, data)
assert int(subprocess.check_output(['wc', '-c', name]).split()[0]) == len(data), name
assert int(subprocess.check_output(['sh', '-c', f'wc -c < {{name}}'])) == len(data), name
# A read in pieces sees one snapshot.
with open(name, 'rb', buffering=0) as f:
    pieces = b''
    while piece := f.read(3): pieces += piece
assert mask(pieces) == mask(data), name
"#);
            m.python(&script).ok();
        }
        for name in ["README", "ctl", "index", "index.json", ".sys/version", ".sys/health", ".sys/metrics"] {
            d.python(&format!("import os; n = '{name}'; f = open(n, 'rb'); s = os.fstat(f.fileno()).st_size; b = f.read(); assert s == len(b) > 0, (n, s, len(b))")).ok();
        }
    }
}

each_user! {
    /// A stream that still runs reports at least 1 byte, so that nobody takes it for empty.
    fn a_running_stream_is_not_empty(d) {
        let m = small!(d, "stream");
        m.bash("echo 'sleep 1000' > $D/exec; test $(stat -c %s $D/out) -ge 1; test $(stat -c %s $D/exit) -ge 1").ok();
    }
}

each_user! {
    /// find, grep -r, tar, rg, ls -lR, du and wc over the whole mount while a job runs: they end, and change nothing.
    fn wanderers(d) {
        let m = small!(d, "wander");
        m.bash("echo 'echo needle-in-output; sleep 1000' > $D/exec; read -r line < $D/out").ok();
        let stopped = small!(d, "asleep");
        stopped.ctl("stop").ok();
        d.exec(&["cat", &stopped.path("wait/stopped")]).ok();
        let before = (m.read("history"), m.status(), stopped.status(), m.read("events"), stopped.read("events"));
        let own = format!("{} {}", m.name, stopped.name);
        let programs = [
            ("find", format!("find {own} -maxdepth 4 -ls > /dev/null 2>&1 || true")),
            ("ls", format!("ls -lRa {own} --ignore=proc --ignore=sys > /dev/null || true")),
            ("grep", format!("grep -r needle {own} --exclude-dir=files > /dev/null || true")),
            ("tar", format!("tar --exclude=files --exclude=wait --exclude=out --exclude=stdout --exclude=stderr --exclude=exit -cf - {own} 2> /dev/null | cat > /dev/null")),
            ("du", format!("du -s {own} --exclude=files > /dev/null")),
            ("rg", format!("rg needle {own} README > /dev/null || true")),
            ("git", "git hash-object README > /dev/null".to_string()),
        ];
        for (program, script) in programs {
            if have(program) {
                d.bash(&script).ok();
            } else {
                skip_part!("{program} is not installed");
            }
        }
        assert_eq!(m.read("history"), before.0);
        assert_eq!(m.status(), before.1);
        assert_eq!(stopped.status(), before.2);
        assert_eq!(m.read("events"), before.3);
        assert_eq!(stopped.read("events"), before.4);
    }
}

each_user! {
    /// rg over the whole mount, with its `files/`: `.ignore` keeps it from what blocks, and it finds what is there.
    fn ripgrep_over_everything(d) {
        if !have("rg") {
            skip!("rg is not installed");
        }
        let m = small!(d, "rg");
        m.bash("echo 'sleep 1000' > $D/exec; echo needle-4711 > $D/files/root/hay").ok();
        let found = d.exec(&["rg", "--no-messages", "-l", "needle-4711", &m.name]).text();
        assert!(found.lines().any(|line| line.ends_with("files/root/hay")), "{found}");
    }
}

each_user! {
    /// grep -r of control files finds a value under its name; GNU grep, which opens O_NONBLOCK, does not stop at `out`.
    fn grep_finds_values(d) {
        let m = small!(d, "grep");
        m.bash("echo 'sleep 1000' > $D/exec").ok();
        let found = d.bash(&format!("grep -r --exclude-dir=files -l running {} 2>/dev/null || true", m.name)).text();
        assert!(found.lines().any(|line| line == m.path("status")), "{found}");
    }
}

each_user! {
    /// Logs end where they end now, and `tail -f` follows.
    fn logs_end_and_tail_follows(d) {
        let m = small!(d, "log");
        d.exec(&["cat", &m.path("events")]).ok();
        let mut tail = m.spawn_bash("timeout 60 tail -n 0 -f $D/history | head -n 1");
        tail.until_blocked();
        m.bash("echo 'echo followed' > $D/exec; cat $D/exit").ok();
        assert!(tail.wait(90).ok().text().contains("followed"));
    }
}

each_user! {
    /// O_NONBLOCK on what blocks is EAGAIN; splice from a stream (busybox cat into a pipe) is whole.
    fn nonblocking_and_splice(d) {
        let m = small!(d, "splice");
        m.python("
with open(f'{D}/exec', 'w') as f: f.write('until [ -e /root/go ]; do sleep 0.1; done; seq 50000')
fd = os.open(f'{D}/out', os.O_RDONLY | os.O_NONBLOCK)
fails(errno.EAGAIN, os.read, fd, 10)
").ok();
        m.bash("touch $D/files/root/go").ok();
        for shell in [Shell::Bash, Shell::Busybox] {
            m.sh(shell, "seq 50000 > $T/want; busybox cat $D/out | cmp - $T/want; cat $D/out | cmp - $T/want; busybox cat $D/out > $T/got; cmp $T/got $T/want").ok();
        }
    }
}

each_user! {
    /// Inode numbers are stable: for the life of the object, across lookups and a rename.
    fn inode_numbers_are_stable(d) {
        let m = small!(d, "inode");
        let numbers = |name: &str| {
            d.bash(&format!("stat -c %i {name} {name}/status {name}/wait/running {name}/files {name}/files/bin/busybox")).ok().text()
        };
        let before = numbers(&m.name);
        assert_eq!(numbers(&m.name), before);
        let moved = d.name("moved");
        d.exec(&["mv", &m.name, &moved]).ok();
        assert_eq!(numbers(&moved), before);
        d.exec(&["mv", &moved, &m.name]).ok();
        let unique: std::collections::HashSet<&str> = before.lines().collect();
        assert_eq!(unique.len(), 5, "{before}");
    }
}

each_user! {
    /// Modes: directories 0700, values 0600, read-only 0400; owner is who made it; chmod and chown are EPERM, touch is not.
    fn modes_and_owners(d) {
        let m = small!(d, "mode");
        let mode = |file: &str| d.exec(&["stat", "-c", "%a %U", &m.path(file)]).ok().text();
        let owner = &d.identity.name;
        assert_eq!(d.exec(&["stat", "-c", "%a %U", &m.name]).ok().text(), format!("700 {owner}"));
        for (file, bits) in [("ctl", 600), ("status", 400), ("wait", 700), ("exec", 600), ("out", 400), ("exit", 400), ("config", 700), ("config/memory", 600)] {
            assert_eq!(mode(file), format!("{bits} {owner}"), "{file}");
        }
        m.bash("chmod 777 $D/status").fails_with("Operation not permitted");
        m.bash("touch $D/status $D/ctl $D").ok();
        assert_eq!(m.status(), "running");
    }
}

each_user! {
    /// mtime is when the content last changed.
    fn mtime_is_the_last_change(d) {
        let m = small!(d, "mtime");
        let time = || d.exec(&["stat", "-c", "%.Y", &m.path("status")]).ok().text();
        let before = time();
        assert_eq!(time(), before);
        m.ctl("stop").ok();
        d.exec(&["cat", &m.path("wait/stopped")]).ok();
        assert_ne!(time(), before);
    }
}

each_user! {
    /// poll(2) tells what a read would do: nothing yet of a command that is silent, ready with its first byte and at
    /// its end; a file that ends where it ends now is always ready.
    fn poll_is_exact(d) {
        let m = small!(d, "poll");
        m.python(r#"
import select
def open_nonblocking(name): return os.open(f'{D}/{name}', os.O_RDONLY | os.O_NONBLOCK)
def ready(fd, ms):
    p = select.poll(); p.register(fd, select.POLLIN)
    return bool(p.poll(ms))
status = open_nonblocking('status')
assert ready(status, 0)
stopped = open_nonblocking('wait/stopped')
assert not ready(stopped, 100)
with open(f'{D}/exec', 'w') as f: f.write('until [ -e /root/go ]; do sleep 0.05; done; echo printed; until [ -e /root/end ]; do sleep 0.05; done\n')
out, end = open_nonblocking('out'), open_nonblocking('exit')
assert not ready(out, 100) and not ready(end, 0)
try: os.read(out, 1); raise SystemExit('it did not say EAGAIN')
except BlockingIOError: pass
open(f'{D}/files/root/go', 'w').close()
assert ready(out, 20000) and os.read(out, 100) == b'printed\n'
assert not ready(out, 100) and not ready(end, 0)
open(f'{D}/files/root/end', 'w').close()
assert ready(end, 20000) and os.read(end, 100) == b'0\n'
assert ready(out, 20000) and os.read(out, 100) == b''
with open(f'{D}/ctl', 'w') as f: f.write('kill\n')
assert ready(stopped, 20000) and os.read(stopped, 100) == b'stopped\n'
"#).ok();
    }
}

each_user! {
    /// Edges are exact too (Go waits for them): one that looked before anything was written to a private exec hears of
    /// the output of each script.
    fn edges_of_a_private_exec(d) {
        let m = small!(d, "edge");
        m.python(r#"
import select
fd = os.open(f'{D}/exec', os.O_RDWR | os.O_NONBLOCK)
epoll = select.epoll()
epoll.register(fd, select.EPOLLIN | select.EPOLLET)
def read_all():
    got = b''
    while True:
        try: data = os.read(fd, 100)
        except BlockingIOError:
            assert epoll.poll(20), f'nobody woke the reader, who has {got}'
            continue
        if data.startswith(b'exit'): return got, data
        got += data
for round in range(3):
    # What there was is seen: from now on only an edge tells.
    while epoll.poll(0): pass
    os.write(fd, b'sleep 0.3; echo out %d; sleep 0.3; exit %d' % (round, round))
    assert read_all() == (b'out %d\n' % round, b'exit %d\n' % round)
"#).ok();
    }
}
