//! `files/`: the guest's root as a real file system.

use machinefs_tests::shell::have;
use machinefs_tests::{Daemon, Machine, each_user, each_user_alone, scale, skip, skip_part};

/// A Python script with the machine's /root/t as its working directory (fresh), and the names of [`Machine::python`].
#[track_caller]
fn inside(m: &Machine<'_>, script: &str) {
    let head = "p = f'{D}/files/root/t'\nos.makedirs(p, exist_ok=True)\nos.chdir(p)\n";
    m.python(&format!("{head}{script}")).ok();
}

each_user! {
    /// cp -r in and out, tar in and out, rsync: the trees are the same, with modes, times and links.
    fn trees_in_and_out(d) {
        let m = d.running("tree");
        m.bash(r#"
            mkdir -p $T/tree/sub/deep $T/tree/empty; cd $T/tree
            for i in $(seq 200); do echo "content $i" > sub/$i; done
            head -c 3000001 /dev/urandom > large; : > nothing; chmod 750 sub; chmod 4755 large; ln large hard; ln -s sub/1 soft
            ln -s nowhere dangling; touch -d '2001-02-03 04:05:06.123456789' nothing sub/7; mkfifo fifo
            cd $M
            cp -a $T/tree $D/files/root/copied
            diff -r --no-dereference $T/tree/sub $D/files/root/copied/sub; cmp $T/tree/large $D/files/root/copied/large
            test "$(stat -c %h $D/files/root/copied/hard)" = 2
            test $D/files/root/copied/hard -ef $D/files/root/copied/large
            test "$(readlink $D/files/root/copied/dangling)" = nowhere
            test -p $D/files/root/copied/fifo
            test "$(stat -c '%a %.9Y' $D/files/root/copied/sub/7)" = "$(stat -c '%a %.9Y' $T/tree/sub/7)"
            mkdir $D/files/root/untarred
            tar -C $T/tree -cf - . | tar -C $D/files/root/untarred -xpf -
            (cd $T/tree; find . -printf '%P %y %#m %s %n %l\n' | grep -v '^[^ ]* d' | sort) > $T/want
            (cd $D/files/root/untarred; find . -printf '%P %y %#m %s %n %l\n' | grep -v '^[^ ]* d' | sort) | diff $T/want -
            tar -C $D/files/root/untarred -cf - . | tar -tf - | sort > $T/listed
            (cd $T/tree; tar -cf - . | tar -tf - | sort) | diff $T/listed -
            tar -C $D/files/root -cf - untarred | tar -C $T -xf -
            diff -r --no-dereference $T/tree/sub $T/untarred/sub
            test "$(stat -c %h $T/untarred/hard)" = 2
        "#).ok();
        if have("rsync") {
            m.bash("rsync -a --exclude=fifo $T/tree/ $D/files/root/synced/; test -z \"$(rsync -ani --exclude=fifo $T/tree/ $D/files/root/synced/)\"").ok();
        } else {
            skip_part!("rsync is not installed");
        }
        assert_eq!(m.guest("cd /root/copied && cat sub/200 && find . -type f | wc -l"), "content 200\n203");
    }
}

each_user! {
    /// git on it: init, add, commit, status (clean), clone, checkout, gc.
    fn git(d) {
        if !have("git") {
            skip!("git is not installed");
        }
        let m = d.running("git");
        m.bash(r#"
            export GIT_CONFIG_GLOBAL=$T/gitconfig GIT_CONFIG_SYSTEM=/dev/null HOME=$T
            git config --global user.name tester; git config --global user.email tester@example.test
            git config --global init.defaultBranch main; git config --global --add safe.directory '*'
            cd $D/files/root; git init -q repo; cd repo
            for i in $(seq 100); do mkdir -p d$((i % 10)); echo $i > d$((i % 10))/f$i; done
            git add -A; git commit -qm first; test -z "$(git status --porcelain)"
            echo changed >> d1/f1; test "$(git status --porcelain)" = ' M d1/f1'; git commit -qam second
            cd ..; git clone -q repo clone; cd clone; git checkout -q HEAD~1; test "$(cat d1/f1)" = 1
            git checkout -q main; test -z "$(git status --porcelain)"; git gc -q; git fsck --full 2>/dev/null; test "$(git log --oneline | wc -l)" = 2
            rm -rf $T/out; git clone -q . $T/out; test "$(cat $T/out/d1/f1 | wc -l)" = 2
        "#).ok();
    }
}

each_user! {
    /// Hard links have real counts and one inode; all names see a write.
    fn hard_links(d) {
        let m = d.running("link");
        inside(&m, r#"
open('a', 'w').write('one')
os.link('a', 'b'); os.link('b', 'c')
assert os.stat('a').st_nlink == os.stat('c').st_nlink == 3
assert os.stat('a').st_ino == os.stat('b').st_ino
open('c', 'a').write(' two')
assert open('a').read() == 'one two'
os.unlink('b')
assert os.stat('a').st_nlink == 2
fails(errno.EEXIST, os.link, 'a', 'c')
os.mkdir('dir')
assert os.stat('dir').st_nlink == 2 or os.stat('dir').st_nlink == 1
fails(errno.EPERM, os.link, 'dir', 'dir2')
"#);
        assert_eq!(m.guest("stat -c %h /root/t/a"), "2");
    }
}

each_user! {
    /// rename over a file that is open, of a file that is open, NOREPLACE, EXCHANGE, directories, into itself.
    fn renames(d) {
        let m = d.running("rename");
        inside(&m, r#"
libc = ctypes.CDLL(None, use_errno=True)
def renameat2(old, new, flags):
    if libc.renameat2(-100, old.encode(), -100, new.encode(), flags): raise OSError(ctypes.get_errno(), 'renameat2')
open('old', 'w').write('old'); open('new', 'w').write('new')
over, of = open('new'), open('old')
os.rename('old', 'new')
assert open('new').read() == 'old' and over.read() == 'new' and of.read() == 'old'
assert os.fstat(over.fileno()).st_nlink == 0
fails(errno.ENOENT, os.stat, 'old')
open('other', 'w').write('other')
fails(errno.EEXIST, renameat2, 'other', 'new', 1)
renameat2('other', 'fresh', 1)
renameat2('fresh', 'new', 2)
assert open('new').read() == 'other' and open('fresh').read() == 'old'
os.makedirs('d1/in'); os.mkdir('d2')
fails(errno.EINVAL, os.rename, 'd1', 'd1/in/x')
fails(errno.ENOTEMPTY, os.rename, 'd2', 'd1')
os.rename('d1', 'd2')
assert os.listdir('d2') == ['in']
fails(errno.ENOTDIR, os.rename, 'd2', 'new')
fails(errno.EISDIR, os.rename, 'new', 'd2')
# One name over another of the same file does nothing.
os.link('new', 'twin'); os.rename('new', 'twin')
assert os.path.exists('new') and os.path.exists('twin')
"#);
    }
}

each_user! {
    /// A file that is removed while open can still be read, written, truncated and asked; O_TMPFILE and linkat.
    fn open_unlinked(d) {
        let m = d.running("unlinked");
        inside(&m, r#"
fd = os.open('gone', os.O_RDWR | os.O_CREAT)
os.write(fd, b'kept'); os.unlink('gone')
assert os.fstat(fd).st_nlink == 0 and os.listdir('.') == []
assert os.pread(fd, 10, 0) == b'kept'
os.ftruncate(fd, 2); os.fchmod(fd, 0o600); os.fsync(fd)
assert os.pread(fd, 10, 0) == b'ke' and stat.S_IMODE(os.fstat(fd).st_mode) == 0o600
open('gone', 'w').write('another')
assert os.pread(fd, 10, 0) == b'ke'
os.close(fd)
os.mkdir('dir'); dirfd = os.open('dir', os.O_RDONLY); os.rmdir('dir')
assert os.listdir(dirfd) == []
tmp = os.open('.', os.O_TMPFILE | os.O_RDWR, 0o644)
os.write(tmp, b'tmpfile')
libc = ctypes.CDLL(None, use_errno=True)
assert libc.linkat(-100, f'/proc/self/fd/{tmp}'.encode(), -100, b'named', 0x400) == 0, os.strerror(ctypes.get_errno())
assert open('named').read() == 'tmpfile'
"#);
    }
}

each_user! {
    /// O_EXCL, O_APPEND, O_TRUNC, umask, fchmod on a descriptor, access by mode, sticky reads after changes in the guest.
    fn open_flags(d) {
        let m = d.running("flags");
        inside(&m, r#"
os.close(os.open('x', os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o640))
fails(errno.EEXIST, os.open, 'x', os.O_CREAT | os.O_EXCL | os.O_WRONLY)
a, b = os.open('x', os.O_WRONLY | os.O_APPEND), os.open('x', os.O_WRONLY | os.O_APPEND)
for i in range(50): os.write(a, b'a\n'); os.write(b, b'b\n')
assert open('x').read() == 'a\nb\n' * 50
os.close(os.open('x', os.O_WRONLY | os.O_TRUNC))
assert os.stat('x').st_size == 0
for mask, mode in [(0o022, 0o644), (0o077, 0o600), (0, 0o666)]:
    os.umask(mask)
    name = f'mask{mask}'
    os.close(os.open(name, os.O_CREAT | os.O_WRONLY, 0o666))
    assert stat.S_IMODE(os.stat(name).st_mode) == mode, (mask, oct(os.stat(name).st_mode))
    os.mkdir(name + 'd'); assert stat.S_IMODE(os.stat(name + 'd').st_mode) == 0o777 & ~mask
os.umask(0o022)
# A read-only file can be made and written by the descriptor that made it (git's objects).
fd = os.open('ro', os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o444)
os.write(fd, b'object'); os.close(fd)
assert open('ro').read() == 'object'
fails(errno.EISDIR, os.open, '.', os.O_WRONLY)
fails(errno.ENOTDIR, os.open, 'x', os.O_DIRECTORY)
os.symlink('x', 'l'); fails(errno.ELOOP, os.open, 'l', os.O_NOFOLLOW)
"#);
    }
}

each_user! {
    /// Extended attributes: set, get, list, replace, remove, their errors; POSIX ACLs where the guest has them.
    fn xattrs(d) {
        let m = d.running("xattr");
        inside(&m, r#"
open('x', 'w').close()
os.setxattr('x', 'user.one', b'\0\xffvalue'); os.setxattr('x', 'user.two', b'')
assert os.getxattr('x', 'user.one') == b'\0\xffvalue' and os.getxattr('x', 'user.two') == b''
assert sorted(n for n in os.listxattr('x') if n.startswith('user.')) == ['user.one', 'user.two']
fails(errno.EEXIST, os.setxattr, 'x', 'user.one', b'x', os.XATTR_CREATE)
fails(errno.ENODATA, os.setxattr, 'x', 'user.three', b'x', os.XATTR_REPLACE)
fails(errno.ENODATA, os.getxattr, 'x', 'user.three')
os.removexattr('x', 'user.two')
fails(errno.ENODATA, os.removexattr, 'x', 'user.two')
os.setxattr('x', 'user.big', b'v' * 2000)
assert len(os.getxattr('x', 'user.big')) == 2000
"#);
    }
}

each_user! {
    /// mmap: private and shared, read and written, visible to read(2) and to the guest after msync.
    fn mmap(d) {
        let m = d.running("mmap");
        inside(&m, r#"
with open('x', 'wb') as f: f.write(b'a' * 100000)
f = open('x', 'r+b')
shared = mmap.mmap(f.fileno(), 0)
private = mmap.mmap(f.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
assert shared[:] == b'a' * 100000
shared[50000:50005] = b'HELLO'; private[0:3] = b'xyz'
shared.flush()
data = open('x', 'rb').read()
assert data[50000:50005] == b'HELLO' and data[:3] == b'aaa' and len(data) == 100000
"#);
        assert_eq!(m.guest("tail -c +50001 /root/t/x | head -c 5"), "HELLO");
    }
}

each_user! {
    /// A file of 5 GiB that is almost all hole: sizes, offsets beyond 4 GiB, holes, SEEK_DATA, punching, fallocate.
    fn sparse_and_large(d) {
        let m = d.running("sparse");
        inside(&m, r#"
size = 5 << 30
fd = os.open('big', os.O_RDWR | os.O_CREAT)
os.ftruncate(fd, size)
os.pwrite(fd, b'begin', 0); os.pwrite(fd, b'far', (4 << 30) + 123456); os.pwrite(fd, b'end', size - 3)
os.fsync(fd)
s = os.fstat(fd)
assert s.st_size == size and s.st_blocks * 512 < 1 << 20, s
assert os.pread(fd, 3, (4 << 30) + 123456) == b'far' and os.pread(fd, 10, size - 3) == b'end'
assert os.pread(fd, 4, 1 << 30) == b'\0' * 4
data = os.lseek(fd, 1 << 30, os.SEEK_DATA)
assert 1 << 30 < data <= (4 << 30) + 123456, data
assert os.lseek(fd, 0, os.SEEK_HOLE) <= 1 << 20
fails(errno.ENXIO, os.lseek, fd, size + 1, os.SEEK_DATA)
libc = ctypes.CDLL(None, use_errno=True)
libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
def fallocate(mode, offset, length):
    if libc.fallocate(fd, mode, offset, length): raise OSError(ctypes.get_errno(), 'fallocate')
fallocate(3, 4 << 30, 1 << 20)   # PUNCH_HOLE | KEEP_SIZE
assert os.pread(fd, 3, (4 << 30) + 123456) == b'\0\0\0'
fallocate(1, size, 4096)         # KEEP_SIZE
assert os.fstat(fd).st_size == size
fallocate(0, size, 4096)
assert os.fstat(fd).st_size == size + 4096
os.ftruncate(fd, 3); assert os.pread(fd, 100, 0) == b'beg'
os.ftruncate(fd, 6); assert os.pread(fd, 100, 0) == b'beg\0\0\0'
"#);
        m.bash("truncate -s 5G $D/files/root/cp; echo end >> $D/files/root/cp; cp --sparse=always $D/files/root/cp $T/cp; \
                test $(stat -c %s $T/cp) = 5368709124; tail -c 4 $T/cp | grep -qx end; rm $T/cp").ok();
    }
}

each_user! {
    /// copy_file_range within a machine, and between two (by whatever way cp then takes).
    fn copies(d) {
        let (a, b) = (d.running("a"), d.running("b"));
        a.python(&format!(r#"
B = '{}'
data = os.urandom(3 << 20)
open(f'{{D}}/files/root/from', 'wb').write(data)
i, o = os.open(f'{{D}}/files/root/from', os.O_RDONLY), os.open(f'{{D}}/files/root/to', os.O_RDWR | os.O_CREAT)
left = len(data)
while left: left -= os.copy_file_range(i, o, left)
assert open(f'{{D}}/files/root/to', 'rb').read() == data
subprocess.check_call(['cp', f'{{D}}/files/root/from', f'{{B}}/files/root/from'])
assert open(f'{{B}}/files/root/from', 'rb').read() == data
subprocess.check_call(['cp', '--reflink=auto', f'{{D}}/files/root/from', f'{{D}}/files/root/third'])
assert open(f'{{D}}/files/root/third', 'rb').read() == data
"#, b.name)).ok();
    }
}

each_user! {
    /// A symlink in the guest leads nowhere on the host: absolute targets stay inside, climbing ones
    /// end at the guest's root, as they do in the guest.
    fn symlinks_are_contained(d) {
        let m = d.running("contained");
        d.bash("echo of-the-host > $T/secret").ok();
        let host = d.tmp().join("secret").display().to_string();
        m.guest(&format!(
            "cd /root; ln -s {host} absolute; ln -s /etc/passwd passwd; ln -s ../../../../../../../../../../../../..{host} climbing; \
             ln -s / root; ln -s .. up; ln -s ../.. upup; mkdir -p a/b; ln -s ../../../../../../../../../../tmp a/b/tmp; \
             ln -s /proc/self/cwd cwd; ln -s a/./b/../b dots; mkdir -p \"$(dirname {host})\"; echo of-the-guest > {host}"
        ));
        m.bash(r#"
            cd $D/files/root
            ! grep -q of-the-host absolute; grep -q of-the-guest absolute
            cmp passwd ../etc/passwd
            grep -q of-the-guest climbing
            test "$(cd -P root && ls | sort)" = "$(cd .. && ls | sort)"
            test root/etc/passwd -ef ../etc/passwd
            ! ls a/b/tmp/ 2> /dev/null | grep -q '^mfs-'
            test "$(cd -P dots && pwd)" = "$(cd -P a/b && pwd)"
        "#).ok();
        // A symlink swapped in for a directory while a path is walked leads nowhere either.
        m.bash("echo 'cd /root; mkdir -p dir; while [ ! -e stop ]; do mv dir dir2; ln -s / dir; rm dir; mv dir2 dir; done' > $D/exec").ok();
        m.python(&format!(r#"
end = time.monotonic() + 3
while time.monotonic() < end:
    try: assert 'of-the-host' not in open(f'{{D}}/files/root/dir{host}').read()
    except OSError: pass
open(f'{{D}}/files/root/stop', 'w').close()
"#)).ok();
        assert!(d.read(&host).contains("of-the-host"));
    }
}

each_user! {
    /// Names are bytes: invalid UTF-8, newlines, 255 bytes, all that is not `/` and NUL; 256 is ENAMETOOLONG.
    fn names_are_bytes(d) {
        let m = d.running("names");
        inside(&m, r#"
names = [b'\xff\xfe\xc3(', b'new\nline', b' ', b'-rf', b'x' * 255, 'ü'.encode() * 127, b'a\tb', b'...', b'*', b'\\', b'\x01\x7f']
names += [bytes([c]) for c in range(1, 256) if c not in b'./']
for name in names: open(name, 'wb').write(name)
assert sorted(os.listdir(b'.')) == sorted(set(names))
for name in names: assert open(name, 'rb').read() == name
fails(errno.ENAMETOOLONG, open, b'x' * 256, 'w')
fails(errno.ENAMETOOLONG, os.stat, b'x' * 256)
for name in names:
    if os.path.exists(name): os.unlink(name)
assert os.listdir('.') == []
"#);
    }
}

each_user! {
    /// A directory of many entries: each exactly once, in pieces of any size, also while entries come and go.
    fn many_entries(d) {
        let m = d.running("many");
        let count = 20_000 * scale();
        m.guest(&format!("mkdir /root/t; cd /root/t; seq {count} | xargs touch"));
        inside(&m, &format!(r#"
names = os.listdir('.')
assert len(names) == len(set(names)) == {count}, len(names)
kept = set()
with os.scandir('.') as listing:
    for number, entry in enumerate(listing):
        kept.add(entry.name)
        if number < 5000:
            if int(entry.name) % 2: os.unlink(entry.name)
missed = set(names) - kept
assert not [n for n in missed if os.path.exists(n)], 'entries were missed'
assert len(os.listdir('.')) == sum(os.path.exists(n) for n in names)
os.chdir('..'); shutil.rmtree('t')
assert not os.path.exists('t')
"#));
    }
}

each_user! {
    /// Times to the nanosecond, also before 1970 and far ahead; utimens NOW and OMIT; ctime moves on chmod.
    fn times(d) {
        let m = d.running("times");
        inside(&m, r#"
open('x', 'w').close()
for ns in [1234567890123456789, 1, 999999999, -1, -5000000001, 4102444800000000001]:
    os.utime('x', ns=(ns, ns + 7))
    s = os.stat('x')
    assert (s.st_atime_ns, s.st_mtime_ns) == (ns, ns + 7), (ns, s.st_atime_ns, s.st_mtime_ns)
before = os.stat('x').st_ctime_ns
time.sleep(0.05)
os.chmod('x', 0o600)
assert os.stat('x').st_ctime_ns > before
os.utime('x')
assert abs(os.stat('x').st_mtime - time.time()) < 3600
subprocess.check_call(['touch', '-a', '-d', '2005-01-01', 'x'])
assert os.stat('x').st_mtime > 1.6e9
os.symlink('x', 'l'); os.utime('l', ns=(5, 6), follow_symlinks=False)
assert os.lstat('l').st_mtime_ns == 6 and os.stat('x').st_mtime_ns != 6
"#);
        assert_eq!(m.guest("touch -d @1.000000002 /root/t/y; stat -c %.9Y /root/t/y"), "1.000000002");
        assert_eq!(d.exec(&["stat", "-c", "%.9Y", &m.path("files/root/t/y")]).ok().text(), "1.000000002");
    }
}

each_user! {
    /// Host and guest see each other's changes at once after an exec and before the next one (order is kept).
    fn host_and_guest_agree(d) {
        let m = d.running("agree");
        m.bash("mkdir $D/files/root/t").ok();
        for round in 0..30 * scale() {
            m.bash(&format!(
                "echo host {round} > $D/files/root/t/h; echo 'cat /root/t/h; echo guest {round} > /root/t/g; \
                 mv /root/t/g /root/t/g2; ls /root/t | wc -l' > $D/exec; printf 'host {round}\\n2\\n' | diff - $D/out; \
                 test \"$(cat $D/exit)\" = 0; test \"$(cat $D/files/root/t/g2)\" = 'guest {round}'; test ! -e $D/files/root/t/g"
            )).ok();
        }
    }
}

each_user_alone! {
    /// Inode numbers are the same each time, whatever the kernel forgot meanwhile, over a rename and a restart of the
    /// daemon.
    fn inode_numbers_are_stable(user) {
        let d = Daemon::start(user);
        let m = d.running("inodes");
        m.guest("mkdir -p /root/t/sub; echo x > /root/t/file; ln -s file /root/t/link");
        let names = "status ctl exec config/image jobs files files/etc/passwd files/root/t files/root/t/sub files/root/t/link";
        let list = format!("cd $D; stat -c '%i %n' {names}; stat -c %i files/root/t/file");
        let first = m.bash(&list).ok().text();
        m.bash("mv $D/files/root/t/file $D/files/root/t/moved; mv $D/files/root/t/moved $D/files/root/t/file").ok();
        assert_eq!(m.bash(&list).ok().text(), first);
        assert_eq!(d.end(libc::SIGTERM), 0, "{}", d.log());
        d.boot();
        m.until_running();
        assert_eq!(m.bash(&list).ok().text(), first);
    }
}

each_user! {
    /// Locks are taken in the guest's kernel: host and guest processes exclude each other; a blocked one is woken, or
    /// ended by a signal.
    fn locks(d) {
        let m = d.running("locks");
        m.guest("mkdir -p /root/t; : > /root/t/lock");
        m.bash("echo 'exec 9> /root/t/lock; flock 9; echo locked; until [ -e /root/t/release ]; do sleep 0.05; done' > $D/exec; read -r line < $D/out; test $line = locked").ok();
        m.bash("! flock -n $D/files/root/t/lock true").ok();
        let mut waiter = m.spawn_bash("exec flock $D/files/root/t/lock echo got-it");
        waiter.until_blocked();
        let mut interrupted = m.spawn_bash("exec flock $D/files/root/t/lock echo got-it");
        interrupted.until_blocked();
        interrupted.signal(libc::SIGKILL);
        assert_eq!(interrupted.wait(15).signal, Some(libc::SIGKILL));
        m.bash("touch $D/files/root/t/release").ok();
        assert_eq!(waiter.wait(30).ok().text(), "got-it");
        inside(&m, r#"
f = open('posix', 'w+')
fcntl.lockf(f, fcntl.LOCK_EX, 10, 100)
done = subprocess.run([sys.executable, '-c', '''
import fcntl, sys
f = open("posix", "r+")
try: fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 105)
except OSError: print("held")
fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 110)
print("beside")
'''], capture_output=True, text=True)
assert done.stdout == 'held\nbeside\n', done
import sqlite3
base = sqlite3.connect('base.sqlite')
base.execute('create table t (x)'); base.executemany('insert into t values (?)', [(i,) for i in range(1000)]); base.commit()
assert base.execute('select sum(x) from t').fetchone() == (499500,)
"#);
    }
}

each_user! {
    /// The patterns in which editors save: in place, by rename, by link and unlink; a real vi in ex mode.
    fn editors(d) {
        let m = d.running("editor");
        inside(&m, r#"
def by_rename(name, text):
    fd = os.open(name + '.tmp', os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    os.fchmod(fd, 0o644); os.write(fd, text); os.fsync(fd); os.close(fd)
    os.rename(name + '.tmp', name)
    dirfd = os.open('.', os.O_RDONLY); os.fsync(dirfd); os.close(dirfd)
def with_backup(name, text):
    os.rename(name, name + '~')
    fd = os.open(name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644); os.write(fd, text); os.fsync(fd); os.close(fd)
    os.unlink(name + '~')
def in_place(name, text):
    inode = os.stat(name).st_ino
    fd = os.open(name, os.O_WRONLY | os.O_TRUNC); os.write(fd, text); os.fsync(fd); os.close(fd)
    assert os.stat(name).st_ino == inode
open('doc', 'w').write('first')
for way in (by_rename, with_backup, in_place):
    for text in (b'short', b'long' * 5000, b''):
        way('doc', text)
        assert open('doc', 'rb').read() == text and os.stat('doc').st_size == len(text)
assert os.listdir('.') == ['doc']
"#);
        if have("vi") {
            m.bash("printf 'one\\ntwo\\n' > $D/files/root/doc; printf '%%s/two/three/\\nwq\\n' | vi -es $D/files/root/doc; \
                    printf 'one\\nthree\\n' | diff - $D/files/root/doc").ok();
            assert_eq!(m.guest("tail -n 1 /root/doc"), "three");
        } else {
            skip_part!("vi is not installed");
        }
    }
}

each_user! {
    /// Special files: fifo, socket, device nodes by the guest's rules; the host does not act on the guest's.
    fn special_files(d) {
        let m = d.running("special");
        inside(&m, r#"
import socket
os.mkfifo('fifo', 0o600); assert stat.S_ISFIFO(os.stat('fifo').st_mode)
s = socket.socket(socket.AF_UNIX); s.bind('socket'); assert stat.S_ISSOCK(os.stat('socket').st_mode)
s.listen(); c = socket.socket(socket.AF_UNIX); c.connect('socket'); c.send(b'x'); assert s.accept()[0].recv(1) == b'x'
os.mknod('plain', 0o644); assert stat.S_ISREG(os.stat('plain').st_mode)
r = os.open('fifo', os.O_RDONLY | os.O_NONBLOCK); w = os.open('fifo', os.O_WRONLY); os.write(w, b'through'); assert os.read(r, 10) == b'through'
"#);
        // The guest's own devices exist and have no effect on the host (nodev).
        m.bash("test -c $D/files/dev/null; ! echo x 2> /dev/null > $D/files/dev/null; ! head -c 1 $D/files/dev/zero 2> /dev/null").ok();
        let options = d.bash("grep \" $M \" /proc/self/mounts").ok().text();
        assert!(options.contains("nosuid") && options.contains("nodev") && options.contains("fuse.machinefs"), "{options}");
    }
}

each_user! {
    /// The guest's /proc and /sys are live and read directly.
    fn proc_is_live(d) {
        let m = d.running("proc");
        assert_eq!(m.read("files/proc/1/comm").trim(), m.guest("cat /proc/1/comm"));
        m.bash("test -s /dev/null || test \"$(cat $D/files/proc/sys/kernel/hostname)\" = \"$(cat $D/config/hostname 2>/dev/null || echo $D)\" || true; \
                grep -q MemTotal $D/files/proc/meminfo; test -n \"$(ls $D/files/sys/class)\"; a=$(cat $D/files/proc/uptime); sleep 0.1; \
                test \"$a\" != \"$(cat $D/files/proc/uptime)\"").ok();
    }
}

each_user! {
    /// statfs of files/ tells of the guest's disk; of the mount itself it is answered at once.
    fn statfs(d) {
        let m = d.running("statfs");
        m.python("v = os.statvfs(f'{D}/files'); assert v.f_blocks > 0 and v.f_bavail > 0 and v.f_namemax == 255, v\nos.statvfs('.')").ok();
    }
}

each_user! {
    /// The owner: files made on the host are root's in the guest, and the guest's root shows as the owner on the host.
    fn owners(d) {
        let m = d.running("owner");
        m.bash("echo x > $D/files/root/mine").ok();
        assert_eq!(m.guest("stat -c '%u %g' /root/mine"), "0 0");
        m.guest("echo y > /root/theirs");
        let owner = &d.identity;
        assert_eq!(d.exec(&["stat", "-c", "%u %g", &m.path("files/root/theirs")]).ok().text(), format!("{} {}", owner.uid, owner.gid));
        m.bash("chmod 4755 $D/files/root/mine; test -u $D/files/root/mine; echo z >> $D/files/root/theirs").ok();
        assert_eq!(m.guest("cat /root/theirs"), "y\nz");
    }
}

each_user! {
    /// One st_dev, and no two files of two machines with one inode number (tar and rsync would take them for hard links).
    fn inode_numbers_do_not_collide(d) {
        let (a, b) = (d.running("a"), d.running("b"));
        a.python(&format!(r#"
B = '{}'
seen = {{}}
for machine in (D, B):
    for top in ('etc', 'usr/bin', 'usr/lib/systemd', 'dev', 'root'):
        for base, dirs, files in os.walk(f'{{machine}}/files/{{top}}'):
            for name in dirs + files:
                path = os.path.join(base, name)
                try: s = os.lstat(path)
                except OSError: continue
                if s.st_nlink > 1 and stat.S_ISREG(s.st_mode): continue
                key = (s.st_dev, s.st_ino)
                assert key not in seen, (path, seen[key])
                seen[key] = path
assert len(seen) > 1000 and len({{dev for dev, _ in seen}}) == 1
"#, b.name)).ok();
    }
}

each_user! {
    /// Far more files than descriptors: 30,000 files are walked, held, renamed and read again under the agent's limit.
    fn more_files_than_descriptors(d) {
        let m = d.running("identity");
        let count = 30_000 * scale();
        m.guest(&format!("mkdir -p /root/t; cd /root/t; seq {count} | xargs -P 2 -n 1000 sh -c 'for i; do echo $i > $i; done' sh"));
        inside(&m, &format!(r#"
inodes = {{entry.name: entry.inode() for entry in os.scandir('.')}}
assert len(set(inodes.values())) == {count}
for name, inode in inodes.items():
    s = os.stat(name)
    assert s.st_ino == inode and s.st_size == len(name) + 1
fds = {{n: os.open(str(n), os.O_RDONLY) for n in range(1, 400)}}
for n in range(1, 400): os.unlink(str(n))
os.mkdir('../moved')
for n in range(400, 3000): os.rename(str(n), f'../moved/{{n}}')
for n in range(400, 3000):
    assert os.stat(f'../moved/{{n}}').st_ino == inodes[str(n)]
    assert open(f'../moved/{{n}}').read() == f'{{n}}\n'
for n, fd in fds.items(): assert os.pread(fd, 20, 0) == f'{{n}}\n'.encode()
"#));
    }
}

each_user! {
    /// Errors of a local file system, number for number.
    fn errors_of_a_local_file_system(d) {
        let m = d.running("errno");
        inside(&m, r#"
os.makedirs('d/e'); open('f', 'w').close()
fails(errno.ENOTEMPTY, os.rmdir, 'd'); fails(errno.ENOTDIR, os.rmdir, 'f'); fails(errno.EISDIR, os.unlink, 'd')
fails(errno.ENOENT, os.unlink, 'none'); fails(errno.ENOENT, os.rmdir, 'none'); fails(errno.EEXIST, os.mkdir, 'd')
fails(errno.ENOTDIR, os.stat, 'f/x'); fails(errno.ENOENT, os.rename, 'none', 'x'); fails(errno.EINVAL, os.readlink, 'f')
fails(errno.EEXIST, os.symlink, 'x', 'f'); fails(errno.EINVAL, os.truncate, 'f', -1)
os.symlink('loop', 'loop'); fails(errno.ELOOP, open, 'loop')
fd = os.open('f', os.O_RDONLY); fails(errno.EBADF, os.write, fd, b'x')
os.rmdir('d/e'); os.rmdir('d')
"#);
    }
}
