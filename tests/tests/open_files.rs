//! Operations on files that are open already, while the agent does not answer: nobody is held past the deadline.

use machinefs_tests::stopped::Stopped;
use machinefs_tests::{Machine, Running, each_user, eventually, skip, user};

/// Starts a script that opens what it needs, makes `$T/$D-ready`, and goes on when `$T/$D-go` is there.
fn prepared(m: &Machine<'_>, script: &str) -> Running {
    m.bash("rm -f $T/$D-*").ok();
    let running = m.spawn_python(script);
    assert!(eventually(60, || m.daemon.tmp().join(format!("{}-ready", m.name)).exists()), "the script opens nothing");
    running
}

fn go(m: &Machine<'_>) {
    m.bash("touch $T/$D-go").ok();
}

const HEAD: &str = r#"
R = f'{D}/files/root'
def wait_for_go():
    open(f'{T}/{D}-ready', 'w').close()
    while not os.path.exists(f'{T}/{D}-go'): time.sleep(0.02)
def state(pid):
    try: return open(f'/proc/{pid}/stat').read().rsplit(') ', 1)[1][0]
    except OSError: return 'gone'
"#;

each_user! {
    /// Two clients × every operation on an open descriptor × the agent stopped: each ends, none is in D past the
    /// deadline (5 s; here 25 s, since one may stand behind others and a busy host is slow).
    fn the_matrix_of_open_files(d) {
        if !user::am_root() {
            skip!("stopping the agent needs root");
        }
        let m = d.running("open");
        m.guest("cd /root; for i in 0 1 2 3; do head -c 8388608 /dev/urandom > big$i; done; mkdir many; cd many; touch $(seq 300)");
        let script = format!("{HEAD}{}", r#"
def pread(f): os.posix_fadvise(f, 0, 0, os.POSIX_FADV_DONTNEED); os.pread(f, 65536, 4 << 20)
def mapped(f): return mmap.mmap(f, 8 << 20, prot=mmap.PROT_READ)[6 << 20]
def map_write(f): m = mmap.mmap(f, 8 << 20); m[5 << 20] = 1; m.flush()
operations = dict(read=pread, mmap=mapped, map_write=map_write, write=lambda f: os.pwrite(f, b'x' * 200000, 1 << 20), fsync=os.fsync,
    fdatasync=os.fdatasync, ftruncate=lambda f: os.ftruncate(f, 5), fstat=os.fstat, fchmod=lambda f: os.fchmod(f, 0o600),
    fchown=lambda f: os.fchown(f, os.getuid(), os.getgid()), utimens=lambda f: os.utime(f), lockf=lambda f: fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB),
    flock=lambda f: fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB), seek=lambda f: os.lseek(f, 0, os.SEEK_HOLE), fallocate=lambda f: os.posix_fallocate(f, 0, 9 << 20),
    getxattr=lambda f: os.getxattr(f, 'user.x'), listxattr=os.listxattr, setxattr=lambda f: os.setxattr(f, 'user.x', b'1'), statvfs=os.fstatvfs,
    close=os.close, copy_range=None, sendfile=None, readdir=None, exit=None)
reading, writing = os.pipe()
left = {}
for name, call in operations.items():
    for client in range(2):
        pid = os.fork()
        if pid: left[pid] = name; continue
        os.close(writing)
        f, g = os.open(f'{R}/big{client}', os.O_RDWR), os.open(f'{R}/big{2 + client}', os.O_RDWR)
        many = os.open(f'{R}/many', os.O_RDONLY | os.O_DIRECTORY)
        if name in ('write', 'fsync', 'exit', 'close'): os.pwrite(f, b'd' * 100, 0)
        print(name, flush=True)
        os.read(reading, 1)
        try:
            if name == 'copy_range': os.copy_file_range(f, g, 1 << 20)
            elif name == 'sendfile': os.sendfile(g, f, 0, 1 << 20)
            elif name == 'readdir': os.listdir(many)
            elif name != 'exit': call(f)
        except OSError: pass
        os._exit(0)
time.sleep(1)
wait_for_go()
begin = time.monotonic()
os.close(reading); os.close(writing)
held = {}
while left and time.monotonic() < begin + 75:
    late = time.monotonic() > begin + 25
    for pid in list(left):
        now = state(pid)
        if now == 'Z': os.waitpid(pid, 0); del left[pid]
        elif now == 'D' and late: held[pid] = left[pid]
    time.sleep(0.05)
for pid in left: os.kill(pid, 9)
assert not held, ('in D past the deadline', held)
assert not left, ('still waiting', left)
"#);
        let client = prepared(&m, &script);
        let stopped = Stopped::new(&m);
        go(&m);
        client.wait(100).ok();
        drop(stopped);
        m.guest("true");
        assert_eq!(m.status(), "running");
    }
}

each_user! {
    /// A hung machine whose readers fill the connection's background slots does not starve another's reads: while
    /// they all wait, the other machine's files are read.
    fn background_slots_are_shared(d) {
        if !user::am_root() {
            skip!("stopping the agent needs root");
        }
        let (hung, other) = (d.running("full"), d.running("reads"));
        for m in [&hung, &other] {
            m.guest("cd /root; for i in $(seq 100); do head -c 1048576 /dev/urandom > f$i; done; cat f* | sha256sum > sum");
        }
        let script = format!("{HEAD}{}", r#"
files = [os.open(f'{R}/f{i}', os.O_RDONLY) for i in range(1, 101)]
wait_for_go()
began = threading.Semaphore(0)
def read(f):
    began.release()
    try: os.pread(f, 131072, 0)
    except OSError: pass
threads = [threading.Thread(target=read, args=(f,)) for f in files]
for t in threads: t.start()
for t in threads: began.acquire()
open(f'{T}/{D}-reading', 'w').close()
for t in threads: t.join()
open(f'{T}/{D}-ended', 'w').close()
"#);
        let client = prepared(&hung, &script);
        let stopped = Stopped::new(&hung);
        go(&hung);
        assert!(eventually(30, || d.tmp().join(format!("{}-reading", hung.name)).exists()), "the readers do not begin");
        other.bash("cat $D/files/root/f* | sha256sum | cmp - $D/files/root/sum").ok();
        assert!(!d.tmp().join(format!("{}-ended", hung.name)).exists(), "the other's 100 MiB came only after the hung machine's readers had given up");
        client.wait(90).ok();
        drop(stopped);
    }
}
