"""The measurements behind scripts/bench: machinefs beside crun, podman, ssh, sshfs, libfuse's and fuser's passthroughs.

Everything runs on this host, in one run, in directories and on ports of its own, and is gone afterwards. The candidates
of a row take turns, so that what else the host does falls on all of them alike. Standard library only.
"""

import argparse
import contextlib
import ctypes
import getpass
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_table import Table, ms, us

LIBC = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNS = 0x0002_0000


def spawn(*argv, stderr=subprocess.DEVNULL):
    """Starts a server, in a session of its own: Ctrl-C is for us, who then end it."""
    return subprocess.Popen([str(a) for a in argv], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr,
                            start_new_session=True)


class Unavailable(Exception):
    """A candidate that cannot be measured here, and why."""


def run(*argv, **options):
    """Runs a program to its end; raises with its own words when it fails."""
    done = subprocess.run([str(a) for a in argv], stdin=subprocess.DEVNULL, capture_output=True, timeout=600, **options)
    if done.returncode:
        words = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
        raise Unavailable(f"{Path(argv[0]).name}: {words[-1] if words else f'exit {done.returncode}'}")
    return done.stdout


def until(what, condition, seconds=60):
    """Waits until the condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise Unavailable(f"{what} did not come up")
        time.sleep(0.002)


def drop_caches():
    """Forgets what the kernel has cached of every file system."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def unmount(path):
    """Takes a mount away, whoever made it."""
    for argv in (["umount", path], ["fusermount3", "-u", path], ["umount", "-l", path]):
        if subprocess.run(argv, capture_output=True, check=False).returncode == 0:
            return


class Worker:
    """A child in a mount namespace of its own, without the v2 part of a hybrid cgroup layout: crun 1.8 refuses there.

    It times commands that are sent to it, so that making the namespace is no part of the figure.
    """

    def __init__(self):
        self.near, far = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            self.near.close()
            with contextlib.suppress(BaseException):
                self.serve(far)
            os._exit(0)
        far.close()
        self.lines = self.near.makefile("rw")

    @staticmethod
    def serve(far):
        if LIBC.unshare(CLONE_NEWNS) == 0:
            subprocess.run(["mount", "--make-rprivate", "/"], capture_output=True, check=False)
            subprocess.run(["umount", "/sys/fs/cgroup/unified"], capture_output=True, check=False)
        lines = far.makefile("rw")
        for line in lines:
            argv = json.loads(line)
            try:
                answer = {"seconds": first_byte(argv)}
            except Unavailable as error:
                answer = {"error": str(error)}
            lines.write(json.dumps(answer) + "\n")
            lines.flush()

    def time(self, argv):
        """Seconds until the command's first byte of output."""
        self.lines.write(json.dumps([str(a) for a in argv]) + "\n")
        self.lines.flush()
        answer = json.loads(self.lines.readline() or '{"error": "the worker died"}')
        if "error" in answer:
            raise Unavailable(answer["error"])
        return answer["seconds"]

    def close(self):
        self.near.shutdown(socket.SHUT_RDWR)
        os.waitpid(self.pid, 0)


def first_byte(argv):
    """Starts a command; seconds until its first byte of output. Waits for its end."""
    begin = time.perf_counter()
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        byte = os.read(child.stdout.fileno(), 1)
        seconds = time.perf_counter() - begin
        _, words = child.communicate(timeout=120)
        if not byte or child.returncode:
            last = words.decode(errors="replace").strip().splitlines()
            raise Unavailable(f"{Path(argv[0]).name}: {last[-1] if last else f'exit {child.returncode}'}")
    return seconds


def timed(action, *arguments):
    """Seconds that a call takes."""
    begin = time.perf_counter()
    action(*arguments)
    return time.perf_counter() - begin


def shell(script):
    """Seconds that a shell takes for a script, with its own start."""
    return timed(lambda: run("sh", "-euc", script))


class Bench:
    """The servers under measurement, and the table."""

    def __init__(self, options):
        self.options = options
        self.root = os.geteuid() == 0
        self.stack = contextlib.ExitStack()
        self.base = Path(tempfile.mkdtemp(prefix="mfs-bench.", dir=os.environ.get("TMPDIR", "/var/tmp")))
        self.base.chmod(0o755)
        self.table = Table()
        self.mount = self.base / "sandboxes"
        self.state = self.base / "state"
        self.daemon = None
        self.sshd = None
        self.worker = None

    # Servers

    def start_machinefs(self):
        self.mount.mkdir()
        self.stack.callback(self.stop_machinefs)
        self.spawn_machinefs()

    def spawn_machinefs(self):
        with open(self.base / "daemon.log", "ab") as log:
            self.daemon = spawn(self.options.machinefs, "mount", self.mount, "--state-dir", self.state, stderr=log)
        until("the mount", lambda: self.daemon.poll() is not None or (self.mount / "README").exists())
        if self.daemon.poll() is not None:
            sys.exit("bench: the daemon ended: " + (self.base / "daemon.log").read_text()[-2000:])

    def stop_machinefs(self):
        if self.daemon is None:
            return
        # Machines outlive a daemon that died: its successor takes them down.
        if self.daemon.poll() is not None:
            self.spawn_machinefs()
        for machine in self.mount.iterdir():
            if machine.name != ".sys" and machine.is_dir():
                with contextlib.suppress(OSError):
                    machine.rmdir()
        with contextlib.suppress(Exception):
            until("", lambda: not any((self.state / "machines").glob("*")), 20)
        self.daemon.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.daemon.wait(20)
        self.daemon.kill()
        self.daemon.wait()
        if os.path.ismount(self.mount):
            unmount(self.mount)

    def start_sshd(self):
        """An sshd of our own: loopback, own keys, own configuration, one shared connection."""
        sshd = shutil.which("sshd", path="/usr/sbin:/sbin:" + os.environ["PATH"])
        if not sshd:
            raise Unavailable("there is no sshd")
        home = self.base / "ssh"
        home.mkdir(mode=0o700)
        for key in ("host", "user"):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", home / key)
        shutil.copy(home / "user.pub", home / "authorized")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        sftp = shutil.which("sftp-server", path="/usr/lib/openssh:/usr/libexec/openssh") or "internal-sftp"
        (home / "sshd_config").write_text(
            f"Port {port}\nListenAddress 127.0.0.1\nHostKey {home}/host\nAuthorizedKeysFile {home}/authorized\n"
            f"StrictModes no\nUsePAM no\nPermitRootLogin prohibit-password\nPasswordAuthentication no\n"
            f"PidFile none\nMaxSessions 100\n"
            # Else bash, run by sshd, reads the user's .bashrc, whatever that does.
            f"SetEnv SHLVL=1\nSubsystem sftp {sftp}\n")
        if self.root:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        self.sshd = spawn(sshd, "-D", "-e", "-f", home / "sshd_config")
        self.stack.callback(self.stop, self.sshd)
        (home / "config").write_text(
            f"Host bench\n HostName 127.0.0.1\n Port {port}\n User {getpass.getuser()}\n IdentityFile {home}/user\n"
            f" IdentitiesOnly yes\n UserKnownHostsFile {home}/known\n StrictHostKeyChecking accept-new\n"
            f" BatchMode yes\n ControlPath {home}/control\n LogLevel ERROR\n")
        self.ssh_config = home / "config"

        def answers():
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        until("sshd", answers, 20)
        master = spawn("ssh", "-F", self.ssh_config, "-M", "-N", "bench")
        self.stack.callback(self.stop, master)
        until("the shared connection", (home / "control").exists, 20)

    @staticmethod
    def stop(process):
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    @contextlib.contextmanager
    def fuse(self, kind, source):
        """Mounts `source` with one of the peers and yields where; unmounts it."""
        where = Path(tempfile.mkdtemp(prefix=f"{kind}.", dir=self.base))
        child = None
        try:
            if kind == "sshfs":
                if self.sshd is None:
                    raise Unavailable("no sshd")
                run("sshfs", "-F", self.ssh_config, "-o", "ControlPath=none", f"bench:{source}", where)
            else:
                program = self.passthrough if kind == "passthrough_ll" else self.options.fuser
                if not program or not os.path.exists(program):
                    raise Unavailable("it is not built")
                argv = ([program, "-f", "-o", f"source={source}", where] if kind == "passthrough_ll"
                        else [program, source, where])
                child = spawn(*argv)
                until(kind, lambda: os.path.ismount(where) or child.poll() is not None, 20)
                if child.poll() is not None:
                    raise Unavailable(f"it ended with {child.returncode}")
            yield where
        finally:
            if os.path.ismount(where):
                unmount(where)
            if child:
                self.stop(child)
            where.rmdir()

    def build_passthrough(self):
        """libfuse's own example, as Debian ships its source."""
        self.passthrough = None
        source = "/usr/share/doc/libfuse3-dev/examples/passthrough_ll.c"
        if not os.path.exists(source):
            self.table.note("passthrough_ll: its source is not installed (libfuse3-dev's examples)")
            return
        flags = run("pkg-config", "fuse3", "--cflags", "--libs").decode().split()
        run("cc", "-O2", "-o", self.base / "passthrough_ll", source, *flags)
        self.passthrough = self.base / "passthrough_ll"

    def make_image(self):
        """A small root directory that machinefs, crun and podman all boot: busybox and the libraries it needs."""
        image = self.base / "image"
        for name in ("bin", "etc", "proc", "sys", "dev", "tmp", "run", "root", "usr"):
            (image / name).mkdir(parents=True)
        busybox = shutil.which("busybox")
        shutil.copy(busybox, image / "bin/busybox")
        for word in subprocess.run(["ldd", busybox], capture_output=True, text=True, check=False).stdout.split():
            if word.startswith("/"):
                goal = image / word[1:]
                goal.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(word, goal)
        for name in run(busybox, "--list").decode().split():
            if name != "busybox":
                (image / "bin" / name).symlink_to("busybox")
        (image / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
        (image / "etc/group").write_text("root:x:0:\n")
        return image

    def crun_bundle(self, image):
        bundle = self.base / "bundle"
        bundle.mkdir()
        run("crun", "spec", cwd=bundle)
        spec = json.loads((bundle / "config.json").read_text())
        spec["root"] = {"path": str(image), "readonly": True}
        spec["process"]["terminal"] = False
        spec["process"]["args"] = ["sh", "-c", "echo hello"]
        (bundle / "config.json").write_text(json.dumps(spec))
        return bundle

    # The table

    def row(self, work, unit, candidates, aims=None, runs=None):
        """Measures the candidates in turn. Each is a name and a function that gives one figure in seconds.

        `aims`: how many times as fast as a peer machinefs is to be, by the peer's name.
        """
        if self.options.rows and not any(word in work for word in self.options.rows):
            return
        runs = runs or self.options.runs
        figures = {name: [] for name, _ in candidates}
        lost = set()
        self.table.load()
        print(f"bench: {work}", file=sys.stderr)
        # The first turn warms up what is no part of the question (the programs' own pages).
        for turn in range(runs + 1):
            for name, measure in candidates:
                figure = None
                if name not in lost:
                    try:
                        figure = measure()
                    except (Unavailable, OSError, subprocess.SubprocessError) as error:
                        lost.add(name)
                        self.table.note(f"Not measured: {work}, {name}: {error}")
                if turn:
                    figures[name].append(figure)
        self.table.add(work, unit, figures, aims or {})

    # The rows

    def containers(self):
        image = self.make_image()
        counter = iter(range(10**9))
        bundle = self.crun_bundle(image)
        with open("/proc/self/mountinfo", encoding="utf-8") as mounts:
            hybrid = " /sys/fs/cgroup/unified " in mounts.read()
        self.worker = Worker()
        self.stack.callback(self.worker.close)

        def machine(make):
            def measure():
                name = self.mount / f"b{next(counter)}"
                begin = time.perf_counter()
                make(name)
                try:
                    (name / "exec").write_text("echo hello\n")
                    with open(name / "out", "rb", buffering=0) as out:
                        if not out.read(1):
                            raise Unavailable("no output: " + (name / "errors").read_text()[-200:])
                    return time.perf_counter() - begin
                finally:
                    name.rmdir()
                    # Tearing down goes on behind rmdir; the next figure must not pay for it.
                    with contextlib.suppress(Unavailable):
                        until("", lambda: not any((self.state / "machines").glob("*")), 5)
            return measure

        def create(name):
            (self.mount / "ctl").write_text(f"create {name.name} image={image}\n")

        def crun():
            return self.worker.time(["crun", "run", "--bundle", bundle, f"mfs-bench-{os.getpid()}-{next(counter)}"])

        podman_base = ["podman", "--root", self.base / "podman", "--runroot", self.base / "podman-run"]
        # podman's defaults are above what a daemon without CAP_SYS_RESOURCE may set.
        limits = ["--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024"]

        def podman():
            return self.worker.time([*podman_base, "run", "--rm", "--network=none", "--log-driver=none",
                                     *limits, "--rootfs", f"{image}:O", "sh", "-c", "echo hello"])

        self.row("mkdir to the first byte of out", ms, [
            ("machinefs", machine(create)), ("crun run", crun), ("podman run", podman),
            ("machinefs, image host", machine(Path.mkdir))], {"crun run": 1 / 1.5, "podman run": 5})
        if hybrid:
            self.table.note("crun and podman ran without the v2 cgroup mount: crun refuses this host's hybrid layout.")

        dev = self.mount / "bench"
        dev.mkdir()
        state = run("cat", dev / "wait/running").decode().strip()
        print(f"bench: machine {state}", file=sys.stderr)

        def by_hand():
            (dev / "exec").write_text("true\n")
            return (dev / "exit").read_text()

        pod = f"mfs-bench-{os.getpid()}"

        def podman_exec():
            return self.worker.time([*podman_base, "exec", pod, "sh", "-c", "true; echo 0"])

        def podman_remove():
            with contextlib.suppress(Unavailable):
                self.worker.time([*podman_base, "rm", "-f", "-t", "0", pod])

        with contextlib.suppress(Unavailable):
            self.worker.time([*podman_base, "run", "-d", "--name", pod, "--network=none", *limits,
                              "--rootfs", f"{image}:O", "sleep", "100000"])
            self.stack.callback(podman_remove)
        self.row("echo true > exec; cat exit", ms, [
            ("machinefs", lambda: shell(f"echo true > {dev}/exec; cat {dev}/exit")),
            ("ssh, shared connection", lambda: shell(f"ssh -F {self.ssh_config} bench true; echo $?")),
            ("podman exec", podman_exec),
            ("machinefs, without a shell", lambda: timed(by_hand))],
            {"ssh, shared connection": 3, "podman exec": 10}, runs=3 * self.options.runs)
        return dev

    def guest(self, dev, script):
        """Runs a script in the machine."""
        (dev / "exec").write_text(script)
        code = (dev / "exit").read_text().strip()
        if code != "0":
            raise Unavailable(f"exit {code} in the machine: " + (dev / "out").read_text()[-300:])

    def real_files(self, dev):
        files = self.options.files
        source = self.base / "files"
        make = (f"mkdir -p TREE && cd TREE && for d in $(seq 0 99); do mkdir d$d; "
                f"for f in $(seq 1 {files // 100}); do echo $d $f > d$d/f$f; done; done")
        run("sh", "-c", make.replace("TREE", str(source)))
        self.guest(dev, make.replace("TREE", "/var/bench"))
        ours = dev / "files/var/bench"

        def machinefs_cold(action):
            def measure():
                drop_caches()
                # What lies below is warm for everyone; what is cold is the way to it.
                self.guest(dev, "find /var/bench -type f -exec cat {} + > /dev/null; ls -lR /var/bench > /dev/null")
                return action(ours)
            return measure

        def peer_cold(kind, action):
            def measure():
                with self.fuse(kind, source) as where:
                    drop_caches()
                    run("sh", "-c", f"find {source} -type f -exec cat {{}} + > /dev/null; ls -lR {source} > /dev/null")
                    return action(where)
            return measure

        def find(where):
            return shell(f"test $(find {where} -type f -printf '%s\\n' | wc -l) = {files // 100 * 100}")

        def tar(where):
            # Not to /dev/null itself: GNU tar then reads no file.
            return timed(lambda: run("bash", "-o", "pipefail", "-c", f"tar -C {where} -cf - . | cat > /dev/null"))

        def create(where):
            goal = where / f"made{random.getrandbits(40)}"
            goal.mkdir()
            try:
                return timed(create_files, goal, files)
            finally:
                shutil.rmtree(goal)

        def candidates(action, kinds):
            return [("machinefs", machinefs_cold(action)), *((kind, peer_cold(kind, action)) for kind in kinds)]

        few = max(3, self.options.runs // 2)
        every = ("passthrough_ll", "fuser", "sshfs")
        self.row(f"cold: find with stat of {files:,} files", ms, candidates(find, every),
                 {"passthrough_ll": 1, "sshfs": 2})
        self.row(f"cold: tar c of {files:,} small files", ms, candidates(tar, every), {"sshfs": 4}, runs=few)
        self.row(f"create, write, close {files:,} files", ms, candidates(create, every), {"sshfs": 4}, runs=few)

        size = self.options.mib
        run("dd", "if=/dev/urandom", f"of={source}/big", "bs=1M", f"count={size}")
        self.guest(dev, f"dd if=/dev/urandom of=/var/bench/big bs=1M count={size} 2>/dev/null")

        def read(where):
            subprocess.run(["dd", f"if={where}/big", "iflag=nocache", "count=0"], capture_output=True, check=False)
            return shell(f"dd if={where}/big of=/dev/null bs=1M 2>/dev/null")

        def write(where):
            try:
                return shell(f"dd if=/dev/zero of={where}/new bs=1M count={size} conv=fsync 2>/dev/null")
            finally:
                (where / "new").unlink(missing_ok=True)

        def plain(action, kinds):
            def mounted(kind):
                def measure():
                    with self.fuse(kind, source) as where:
                        return action(where)
                return measure
            return [("machinefs", lambda: action(ours)), *((kind, mounted(kind)) for kind in kinds)]

        def rate(seconds):
            return f"{size / seconds:,.0f} MiB/s"

        self.row(f"read one file of {size} MiB", rate, plain(read, every),
                 {"passthrough_ll": 0.8, "sshfs": 3}, runs=few)
        self.row(f"write one file of {size} MiB, fsync", rate, plain(write, every),
                 {"passthrough_ll": 0.8, "sshfs": 3}, runs=few)
        self.row("stat of an open file, from its server", us, plain(stat_each, every), {"passthrough_ll": 1 / 1.5})
        self.row("read of 4 KiB, not cached", us, plain(read_each, every), {"passthrough_ll": 1 / 1.5})

    def measure(self):
        self.start_machinefs()
        try:
            self.start_sshd()
        except Unavailable as error:
            self.table.note(f"Not measured: ssh and sshfs: {error}")
        self.build_passthrough()
        dev = self.containers()
        if self.root:
            self.real_files(dev)
        else:
            self.table.note("Not measured: the rows of files, because dropping the kernel's caches needs root")

    def main(self):
        with self.stack:
            self.stack.callback(lambda: shutil.rmtree(self.base, ignore_errors=True))
            try:
                self.measure()
            finally:
                # What is being taken down is not to be left half done.
                signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.table.load()
        print(self.table.text(self.options.runs))
        if self.options.write:
            self.table.write(self.options.write, self.options.runs)


def create_files(goal, count):
    """As tar x and git checkout do it: relative to the directory."""
    directory = os.open(goal, os.O_PATH | os.O_DIRECTORY)
    try:
        for number in range(count):
            fd = os.open(str(number), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644, dir_fd=directory)
            os.write(fd, b"some bytes\n")
            os.close(fd)
    finally:
        os.close(directory)


def stat_each(where, count=5_000):
    """Seconds of one statx(2) that must ask the server (AT_STATX_FORCE_SYNC) of an open file."""
    empty_path, force_sync, basic = 0x1000, 0x2000, 0x7FF
    buffer = ctypes.create_string_buffer(256)
    fd = os.open(where / "big", os.O_RDONLY)
    try:
        begin = time.perf_counter()
        for _ in range(count):
            if LIBC.statx(fd, b"", empty_path | force_sync, basic, buffer):
                raise OSError(ctypes.get_errno(), "statx")
        return (time.perf_counter() - begin) / count
    finally:
        os.close(fd)


def read_each(where, count=5_000):
    """Seconds of one 4 KiB read of a page that is not in the kernel's cache; no read-ahead."""
    fd = os.open(where / "big", os.O_RDONLY)
    try:
        pages = random.sample(range(os.fstat(fd).st_size // 4096), count)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        begin = time.perf_counter()
        for page in pages:
            os.pread(fd, 4096, page * 4096)
        return (time.perf_counter() - begin) / count
    finally:
        os.close(fd)


def arguments():
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__.splitlines()[0])
    parser.add_argument("--machinefs", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--fuser", help=argparse.SUPPRESS)
    parser.add_argument("--runs", type=int, default=11, help="turns of each row (default %(default)s)")
    parser.add_argument("--files", type=int, default=10_000, help="small files (default %(default)s)")
    parser.add_argument("--mib", type=int, default=1024, help="size of the large file (default %(default)s)")
    parser.add_argument("--write", metavar="FILE", help="also put the table into this document, between its marks")
    parser.add_argument("rows", nargs="*", help="only rows whose name contains one of these words")
    return parser.parse_args()


if __name__ == "__main__":
    # Both end the run by an exception, so that what was started is stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    Bench(arguments()).main()
