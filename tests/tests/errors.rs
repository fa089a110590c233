//! The table of errors of DESIGN.md 3, and that a reason can be read where the error was.

use machinefs_tests::{Daemon, each_user, each_user_alone, gate};

each_user! {
    /// Unknown verbs, keys, values: EINVAL from write, the reason readable on the same descriptor, and kept in `errors`.
    fn the_reason_of_an_einval(d) {
        let m = d.running("einval");
        for (file, text, word) in [
            ("ctl", "bogus", "bogus"), ("ctl", "set nokey=1", "nokey"), ("ctl", "set memory=lots", "lots"),
            ("ctl", "stop 'unclosed", "unclosed"), ("config/memory", "lots", "lots"), ("config/cpus", "-3", "-3"),
            ("config/protect", "perhaps", "perhaps"), ("config/boot_timeout", "soon", "soon"),
        ] {
            m.python(&format!(r#"
path = f'{{D}}/{file}'
fd = os.open(path, os.O_RDWR)
before = open(f'{{D}}/errors').read()
text = b'''{text}\n'''
try:
    os.write(fd, text)
    os.fsync(fd)
except OSError as e: assert e.errno == errno.EINVAL, e
else: raise AssertionError(path + ' took it')
reason = os.pread(fd, 4096, 0).decode()
assert '''{word}''' in reason and len(reason.splitlines()) == 1, reason
os.close(fd)
new = open(f'{{D}}/errors').read()[len(before):]
assert 'EINVAL' in new and '''{word}''' in new, new
"#)).ok();
        }
        assert_eq!(m.status(), "running");
    }
}

each_user! {
    /// The same at the top: the error of `create` is readable on the descriptor that failed.
    fn the_reason_at_the_top(d) {
        for (line, word) in [("create", "create"), ("create bad_name", "bad_name"), ("create x nokey=1", "nokey"), ("frobnicate", "frobnicate")] {
            d.python(&format!(r#"
import os, errno
fd = os.open('ctl', os.O_RDWR)
try: os.write(fd, b'{line}\n')
except OSError as e: assert e.errno == errno.EINVAL, e
else: raise AssertionError('it took it')
reason = os.read(fd, 4096).decode()
assert '{word}' in reason, reason
"#)).ok();
        }
    }
}

each_user! {
    /// Several lines in a write: what comes before the bad one is done, the write is cut there, the retry has the errno,
    /// further writes fail until the flush.
    fn a_bad_line_among_good_ones(d) {
        let m = d.running("lines");
        m.python(r#"
fd = os.open(f'{D}/ctl', os.O_WRONLY)
good = b'# a comment\nset memory=300M\n'
text = good + b'bogus\nset memory=400M\n'
assert os.write(fd, text) == len(good)
fails(errno.EINVAL, os.write, fd, text[len(good):])
fails(errno.EINVAL, os.write, fd, b'set memory=500M\n')
assert open(f'{D}/config/memory').read() == '300M\n'
os.close(os.dup(fd))
assert os.write(fd, b'set memory=600M\n')
assert open(f'{D}/config/memory').read() == '600M\n'
"#).ok();
    }
}

each_user! {
    /// Bad names: EINVAL from mkdir, ENOENT from lookup; a name with a dot needs its template; a taken one is EEXIST.
    fn names(d) {
        let m = d.running("name");
        m.python(r#"
for name in ['-x', '_x', 'a_b', 'a b', 'ä', 'x' * 64, 'a:b', ' ', '.x']:
    fails(errno.EINVAL, os.mkdir, name)
    fails(errno.ENOENT, os.stat, name)
fails(errno.ENOENT, os.mkdir, 'no-such-template.x')
fails(errno.EEXIST, os.mkdir, D)
fails(errno.EEXIST, os.mkdir, 'README')
fails(errno.ENOENT, os.stat, 'unknown')
fails(errno.ENOENT, os.rmdir, 'unknown')
fails(errno.ENOENT, os.stat, f'{D}/unknown')
fails(errno.ENOENT, os.stat, f'{D}/jobs/4711')
name = 'x' * 63
os.mkdir(name)
os.rmdir(name)
"#).ok();
    }
}

each_user! {
    /// Wrong state for a verb: EBUSY, kept in `errors`.
    fn wrong_state(d) {
        let m = d.running("busy");
        m.ctl("stop").ok();
        d.exec(&["cat", &m.path("wait/stopped")]).ok();
        for verb in ["pause", "resume"] {
            m.ctl(verb).fails_with("Device or resource busy");
            let errors = m.read("errors");
            let last = errors.lines().last().unwrap_or_default();
            assert!(last.contains("EBUSY") && last.contains(verb), "{last}");
        }
    }
}

each_user! {
    /// What cannot be written or read says so at open: the kernel checks modes.
    fn modes_are_checked(d) {
        let m = d.running("mode");
        if d.user == machinefs_tests::User::Root {
            // Root passes every mode; the tree still refuses.
            m.bash("echo x > $D/status").fails();
        } else {
            m.bash("echo x > $D/status").fails_with("Permission denied");
        }
        m.bash("cat $D/config").fails_with("Is a directory");
        m.bash("ls $D/status/x").fails_with("Not a directory");
        assert_eq!(m.status(), "running");
    }
}

each_user! {
    /// Never ENOSYS for what depends on the machine: what one file refuses still works on another afterwards.
    fn no_operation_is_remembered_as_missing(d) {
        let m = d.running("enosys");
        m.python(r#"
status = f'{D}/status'
def tried(call, *arguments):
    try: call(*arguments)
    except OSError as e: assert e.errno != errno.ENOSYS, (call, e)
fd = os.open(f'{D}/ctl', os.O_RDWR)
inside = f'{D}/files/root/x'
open(inside, 'w').write('x' * 10000)
tried(os.getxattr, status, 'user.x'), tried(os.setxattr, status, 'user.x', b'1'), tried(os.listxattr, status)
tried(os.posix_fallocate, fd, 0, 100), tried(os.lseek, fd, 0, os.SEEK_DATA), tried(os.fsync, fd)
tried(os.copy_file_range, os.open(inside, os.O_RDONLY), fd, 10)
tried(fcntl.flock, fd, fcntl.LOCK_EX | fcntl.LOCK_NB), tried(fcntl.lockf, fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
tried(os.rename, status, status + '2'), tried(os.link, status, status + '2')
os.setxattr(inside, 'user.x', b'1')
assert os.getxattr(inside, 'user.x') == b'1' and 'user.x' in os.listxattr(inside)
g = os.open(inside, os.O_RDWR)
os.posix_fallocate(g, 0, 20000)
assert os.fstat(g).st_size == 20000
assert os.lseek(g, 0, os.SEEK_DATA) == 0
os.fsync(g)
fcntl.flock(g, fcntl.LOCK_EX | fcntl.LOCK_NB)
"#).ok();
    }
}

each_user_alone! {
    /// A boot past boot_timeout fails with ETIMEDOUT in errors, and wait/running fails.
    fn boot_timeout(user) {
        let d: Daemon = gate::gated(user);
        gate::close(&d);
        let m = d.create("late", "boot_timeout=1s");
        d.exec(&["cat", &m.path("wait/running")]).fails();
        m.until_status("failed");
        let errors = m.read("errors");
        assert!(errors.contains("ETIMEDOUT"), "{errors}");
        gate::open(&d);
        m.ctl("start").ok();
        m.until_running();
    }
}

each_user_alone! {
    /// More machines than there may be: a limit's errno (EMFILE, ENOSPC or EDQUOT), and the next works when one is gone.
    fn too_many_machines(user) {
        let d = Daemon::start_with(user, |_| vec!["--max-machines".into(), "2".into()]);
        let (a, _b) = (d.running("a"), d.running("b"));
        let words = d.exec(&["mkdir", "third"]).fails().words();
        let limits = ["Too many open files", "No space left", "Disk quota exceeded"];
        assert!(limits.iter().any(|limit| words.contains(limit)), "{words}");
        d.exec(&["rmdir", &a.name]).ok();
        d.exec(&["mkdir", "third"]).ok();
        d.exec(&["cat", "third/wait/running"]).ok();
    }
}
