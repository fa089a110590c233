//! `jobs/`: what a user starts, feeds, signals and watches, and the commands `machinefs exec` and `attach` on top of it.

use machinefs_tests::process::{all_tasks, status_field};
use machinefs_tests::{Machine, each_user, each_user_alone, eventually, scale};

/// Runs a shell script with `$D` the machine, `$J` a new job that is being set up, `$M` the machinefs command.
#[track_caller]
fn with_job(m: &Machine<'_>, script: &str) -> machinefs_tests::Outcome {
    let program = m.daemon.program();
    m.bash(&format!("J=$(mktemp -d $D/jobs/XXXXXX); M={}; {script}", program.display()))
}

each_user! {
    /// A job that is set up runs as it was told; what was written reads back; once started nothing of it changes.
    fn set_up_by_files(d) {
        let m = d.running("setup");
        let outcome = with_job(&m, r#"
            echo /tmp > $J/cwd; printf 'A=1\nB=two words\n' > $J/env; echo nobody > $J/user; echo 90 > $J/timeout
            test "$(cat $J/cwd $J/env $J/user $J/timeout $J/tty)" = "$(printf '/tmp\nA=1\nB=two words\nnobody\n90s\nno')"
            grep -q '^state setup$' $J/status
            echo 'pwd; id -un; echo "$A $B"; echo err >&2; exit 3' > $J/cmd
            test "$(cat $J/exit)" = 3
            test "$(cat $J/stdout)" = "$(printf '/tmp\nnobody\n1 two words')"
            test "$(cat $J/stderr)" = err
            for f in cwd cmd argv env user timeout tty; do ! echo x 2>&- > $J/$f || { echo "$f changed"; exit 1; }; done
            cat $J/cmd
        "#).ok();
        assert_eq!(outcome.text(), "pwd; id -un; echo \"$A $B\"; echo err >&2; exit 3");
        assert!(m.read("errors").contains("has started"), "{}", m.read("errors"));
    }
}

each_user! {
    /// Arguments are bytes, and no shell reads them.
    fn arguments_are_exact(d) {
        let m = d.running("argv");
        m.python(r#"
import tempfile
def run(*argv):
    job = tempfile.mkdtemp(dir=f'{D}/jobs')
    with open(job + '/argv', 'wb') as f: f.write(b''.join(word + b'\0' for word in argv))
    return open(job + '/stdout', 'rb').read(), int(open(job + '/exit').read())
words = [b'$HOME', b'`id`', b'a b', b'', b'\xff\xfe', b"it's", b'; exit 1', b'x\ny\n']
assert run(b'printf', b'%s|', *words) == (b''.join(w + b'|' for w in words), 0)
assert run(b'false')[1] == 1
assert run(b'no-such-program')[1] == 127
assert run(b'/etc/passwd')[1] == 126
"#).ok();
    }
}

each_user! {
    /// Bad names, values and messages are refused with words, and nothing is started by them.
    fn bad_input(d) {
        let m = d.running("bad");
        for name in ["7", "main", "-x", ".x", "a b"] {
            m.bash(&format!("mkdir $D/'jobs/{name}'")).fails_with("Invalid argument");
        }
        m.bash("mkdir $D/jobs/twice && mkdir $D/jobs/twice").fails_with("File exists");
        for (file, value) in [("cwd", "relative"), ("env", "novalue"), ("timeout", "soon"), ("tty", "24"), ("argv", "")] {
            m.bash(&format!("printf '%s\\n' '{value}' > $D/jobs/twice/{file}")).fails();
        }
        for line in ["signal NONE", "signal", "winsize 0 80", "eof", "signal TERM", "jump"] {
            m.bash(&format!("echo '{line}' > $D/jobs/twice/ctl")).fails();
        }
        assert!(m.read("jobs/twice/status").starts_with("state setup\n"));
        m.bash("rmdir $D/jobs/twice; ! test -e $D/jobs/twice").ok();
    }
}

each_user! {
    /// 100 MB go in through `stdin` and come out again: what is not read holds the writer back, and neither the daemon
    /// nor the agent keeps it.
    fn input_with_back_pressure(d) {
        let m = d.running("stdin");
        m.python(r#"
import hashlib, tempfile, threading
job = tempfile.mkdtemp(dir=f'{D}/jobs')
size = 100 * 1000 * 1000
block = os.urandom(1000 * 1000)
written = []
def feed(f):
    for _ in range(size // len(block)):
        f.write(block)
        written.append(len(block))
    f.close()
f = open(job + '/stdin', 'wb', buffering=0)
class Whole:
    def write(self, data):
        view = memoryview(data)
        while view: view = view[f.write(view):]
    def close(self): f.close()
feeder = threading.Thread(target=feed, args=[Whole()])
with open(job + '/cmd', 'w') as c: c.write('until [ -e /root/go ]; do sleep 0.05; done; cat; echo done >&2')
feeder.start()
import time
last = -1
while sum(written) != last:
    last = sum(written)
    time.sleep(1)
assert last < 4 * 1000 * 1000, f'{last} bytes were taken that nobody reads'
open(f'{D}/files/root/go', 'w').close()
got = hashlib.sha256()
with open(job + '/stdout', 'rb', buffering=0) as out:
    while data := out.read(1 << 20): got.update(data)
feeder.join()
wanted = hashlib.sha256()
for _ in range(size // len(block)): wanted.update(block)
assert got.digest() == wanted.digest()
assert open(job + '/stderr').read() == 'done\n' and open(job + '/exit').read() == '0\n'
"#).ok();
        let peak = status_field(d.pid(), "VmHWM").expect("VmHWM");
        assert!(peak < 256 * 1024, "the daemon's peak is {peak} KiB");
    }
}

each_user! {
    /// The input ends with its last writer, or when it is told to; one that was never opened is empty; a writer of one
    /// that nobody reads gets EPIPE, and a signal ends a write that waits.
    fn input_ends(d) {
        let m = d.running("eof");
        let outcome = with_job(&m, "(echo one; sleep 0.3; echo two) > $J/stdin & sleep 0.1; echo cat > $J/cmd; cat $J/out").ok();
        assert_eq!(outcome.text(), "one\ntwo");
        assert_eq!(with_job(&m, "echo 'wc -c' > $J/cmd; cat $J/out").ok().text(), "0");
        let kept = "echo keep-stdin > $J/ctl; echo cat > $J/cmd; echo a > $J/stdin; echo b > $J/stdin; echo eof > $J/ctl; cat $J/out";
        assert_eq!(with_job(&m, kept).ok().text(), "a\nb");
        with_job(&m, "exec 3> $J/stdin; echo true > $J/cmd; cat $J/exit; head -c 1000000 /dev/zero >&3").fails_with("Broken pipe");
        let script = "J=$D/jobs/full; mkdir $J; exec 3> $J/stdin; echo 'sleep 1000' > $J/cmd; exec head -c 1000000 /dev/zero >&3";
        let mut writer = m.spawn_bash(script);
        writer.until_blocked();
        writer.signal(libc::SIGINT);
        assert_eq!(writer.wait(15).signal, Some(libc::SIGINT));
    }
}

each_user! {
    /// Every exit code, and every signal that ends a program.
    fn every_end(d) {
        let m = d.running("ends");
        m.python(r#"
import signal
for code in range(256):
    with open(f'{D}/exec', 'w') as f: f.write(f'exit {code}')
    assert open(f'{D}/exit').read() == f'{code}\n', code
ends = [s for s in signal.Signals if s.name not in ('SIGCHLD', 'SIGCONT', 'SIGSTOP', 'SIGTSTP', 'SIGTTIN', 'SIGTTOU', 'SIGURG', 'SIGWINCH')]
for s in ends:
    job = f'{D}/jobs/{s.name}'
    os.mkdir(job)
    with open(job + '/argv', 'wb') as f: f.write(b'sleep\x001000\0')
    # The process group hears it, whatever the program was doing.
    for _ in range(500):
        if 'state running' in open(job + '/status').read(): break
        time.sleep(0.01)
    with open(job + '/ctl', 'w') as f: f.write(f'signal {s.value}\n')
    assert open(job + '/exit').read() == f'{128 + s}\n', s.name
    assert f'signal {s.value}' in open(job + '/status').read()
    os.rmdir(job)
"#).ok();
    }
}

each_user! {
    /// `kill` and rmdir end a job with all its descendants, also those that went their own way; signals reach the group.
    fn descendants_go_too(d) {
        let m = d.running("kill");
        let script = "sleep 7654 & setsid sleep 7655 & (setsid sh -c 'sleep 7656 & exec sleep 7657' &) ; sleep 7658";
        let mine = || {
            let init = m.init();
            let ids: Vec<u32> = all_tasks().iter().filter(|task| task.name == "sleep").map(|task| task.pid).collect();
            ids.into_iter().filter(|pid| std::fs::read_to_string(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.contains("sleep\u{0}765")) && ns(*pid) == ns(init)).count()
        };
        for end in ["echo kill > $D/jobs/k/ctl; test $(cat $D/jobs/k/exit) = 137; rmdir $D/jobs/k", "rmdir $D/jobs/k"] {
            m.bash(&format!("mkdir $D/jobs/k; echo \"{script}\" > $D/jobs/k/cmd")).ok();
            assert!(eventually(20, || mine() == 5), "{} run", mine());
            m.bash(end).ok();
            assert!(eventually(20, || mine() == 0), "{} are left", mine());
        }
    }
}

/// The process namespace that a process is in.
fn ns(pid: u32) -> Option<std::path::PathBuf> {
    std::fs::read_link(format!("/proc/{pid}/ns/pid")).ok()
}

each_user! {
    /// A kill that comes while the start is still on its way is not lost.
    fn killed_at_once(d) {
        let m = d.running("atonce");
        m.python(r#"
for i in range(60):
    job = f'{D}/jobs/k{i}'
    os.mkdir(job)
    with open(job + '/cmd', 'w') as f: f.write('sleep 1000')
    with open(job + '/ctl', 'w') as f: f.write('kill\n')
    assert open(job + '/exit').read() == '137\n'
    os.rmdir(job)
"#).ok();
    }
}

each_user! {
    /// A job that leaves a daemon behind ends when its own process does, and what the daemon prints later is not lost
    /// on it.
    fn a_daemonising_job(d) {
        let m = d.running("daemon");
        let outcome = with_job(&m, "echo 'setsid sleep 1000 >/dev/null 2>&1 & echo started; exit 4' > $J/cmd; cat $J/exit; cat $J/out").ok();
        assert_eq!(outcome.text(), "4\nstarted");
    }
}

each_user! {
    /// What a job that has ended left behind goes with `kill`, and with its directory.
    fn what_is_left_behind_goes_too(d) {
        let m = d.running("behind");
        let left = || m.guest("pgrep -c -f 'sleep 765[0-9]' || true").parse::<usize>().unwrap_or(9);
        for end in ["echo kill > $D/jobs/b/ctl; rmdir $D/jobs/b", "rmdir $D/jobs/b"] {
            m.bash("mkdir $D/jobs/b; echo 'setsid sleep 7651 >/dev/null 2>&1 & exit 4' > $D/jobs/b/cmd; test $(cat $D/jobs/b/exit) = 4").ok();
            assert!(eventually(20, || left() == 1), "{} run", left());
            m.bash(end).ok();
            assert!(eventually(20, || left() == 0), "{} are left", left());
        }
    }
}

each_user_alone! {
    /// `machinefs exec` goes on over a crash of the daemon, with its input to the end.
    fn the_exec_command_over_a_crash(user) {
        let d = machinefs_tests::Daemon::start(user);
        let m = d.running("over");
        let program = d.program();
        let script = format!("(echo a; until [ -e $T/go ]; do sleep 0.1; done; echo b; echo c) | {} exec $D -- sh -c 'cat; echo end; exit 5'", program.display());
        let command = m.spawn_bash(&format!("set -o pipefail; {script}"));
        assert!(eventually(20, || m.bash("grep -l 'state running' $D/jobs/exec-*/status").code == 0));
        d.crash();
        std::fs::write(d.tmp().join("go"), "").expect("a file");
        let outcome = command.wait(60);
        assert_eq!((outcome.code, outcome.text().as_str()), (5, "a\nb\nc\nend"), "{}", outcome.words());
        // A machine that goes is told at once, and is no restart.
        let gone = m.spawn_bash(&format!("exec {} exec -n $D -- sleep 1000", program.display()));
        assert!(eventually(20, || m.bash("grep -l 'state running' $D/jobs/exec-*/status").code == 0));
        m.bash("rmdir $D").ok();
        assert_eq!(gone.wait(15).code, 125);
    }
}

each_user! {
    /// A time is in the unit it says, and kills the descendants too: exit 124, and the status says so.
    fn timeouts(d) {
        let m = d.running("timeout");
        let outcome = with_job(&m, "echo 1s > $J/timeout; echo 'sleep 1000 & sleep 1000' > $J/cmd; cat $J/exit; sed -n 2p $J/status").ok();
        assert_eq!(outcome.text(), "124\nreason timeout");
        let outcome = with_job(&m, "echo 30 > $J/timeout; echo 'sleep 2; echo over' > $J/cmd; cat $J/exit $J/out").ok();
        assert_eq!(outcome.text(), "0\nover");
    }
}

each_user! {
    /// Five ticks arrive as they are printed.
    fn ticks_arrive_as_they_are_printed(d) {
        let m = d.running("ticks");
        m.python(r#"
with open(f'{D}/exec', 'w') as f: f.write('for i in 1 2 3 4 5; do echo tick $i; sleep 1; done')
times = []
with open(f'{D}/out', 'rb', buffering=0) as out:
    while line := out.read(100):
        times.append((time.monotonic(), line))
assert [line for _, line in times] == [b'tick %d\n' % i for i in range(1, 6)], times
# By comparison within the run: had they come at the end, all would be together.
gaps = [b - a for (a, _), (b, _) in zip(times, times[1:])]
assert min(gaps) > max(gaps) / 4, gaps
"#).ok();
    }
}

each_user_alone! {
    /// 1,000 jobs in a row and 100 at once: neither the daemon nor the agent grows by them.
    fn many_jobs_leave_nothing(user) {
        let d = machinefs_tests::Daemon::start(user);
        let m = d.running("many");
        let count = |pid: u32| std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count);
        let round = |jobs: usize| {
            m.python(&format!(r#"
import threading
def one(i):
    with open(f'{{D}}/exec', 'r+b', buffering=0) as f:
        f.write(b'echo out; echo err >&2; exit %d' % (i % 7))
        got = b''
        while data := f.read(4096): got += data
        assert sorted(got.split()) == [b'err', b'out'], got
        assert f.read(100) == b'exit %d\n' % (i % 7)
for i in range({jobs}): one(i)
threads = [threading.Thread(target=one, args=[i]) for i in range(100)]
for t in threads: t.start()
for t in threads: t.join()
"#)).ok();
        };
        // What the first jobs make is made once.
        round(100);
        let agent = m.init();
        let before = [d.pid(), agent].map(|pid| (count(pid), status_field(pid, "VmRSS").unwrap_or(0)));
        round(1000 * scale());
        let settled = eventually(20, || count(d.pid()) <= before[0].0 + 8 && count(agent) <= before[1].0 + 8);
        assert!(settled, "descriptors: {before:?}, then {} and {}", count(d.pid()), count(agent));
        for ((_, rss), pid) in before.into_iter().zip([d.pid(), agent]) {
            let now = status_field(pid, "VmRSS").unwrap_or(0);
            assert!(now < rss + 24 * 1024, "{pid} grew from {rss} to {now} KiB");
        }
        let listed = m.bash("ls $D/jobs | wc -l").ok().text();
        assert!(listed.trim().parse::<usize>().is_ok_and(|count| count <= 101), "{listed} jobs are kept");
        let files: Vec<_> = walk(&d.state).into_iter().filter(|path| path.contains("/jobs/")).collect();
        assert!(files.len() < 500, "{} files", files.len());
    }
}

fn walk(dir: &std::path::Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    entries
        .flatten()
        .flat_map(|entry| {
            let path = entry.path();
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                walk(&path)
            } else {
                vec![path.display().to_string()]
            }
        })
        .collect()
}

each_user! {
    /// A fork bomb stops at `pids`, and the machine is still there for who ends it.
    fn a_fork_bomb_is_contained(d) {
        let m = d.create("bomb", "pids=100");
        m.until_running();
        if m.read("info").lines().any(|line| line.starts_with("warning") && line.contains("pids")) {
            machinefs_tests::skip!("this host does not let this user limit processes, and the machine says so");
        }
        m.bash("mkdir $D/jobs/bomb; echo 'f() { f | f & }; f; sleep 1000' > $D/jobs/bomb/cmd").ok();
        let full = eventually(30, || m.daemon.exec(&["grep", "-q", "running", &m.path("status")]).code == 0);
        assert!(full);
        m.bash("ls $D/files/root; echo kill > $D/jobs/bomb/ctl; cat $D/jobs/bomb/exit").ok();
        let gone = eventually(30, || all_tasks().iter().filter(|task| ns(task.pid) == ns(m.init())).count() < 10);
        assert!(gone, "it goes on");
        assert_eq!(m.guest("echo fine"), "fine");
    }
}

each_user_alone! {
    /// A job that is being set up, one that waits for input, and what it was given, outlive the daemon.
    fn set_ups_and_inputs_outlive_the_daemon(user) {
        let d = machinefs_tests::Daemon::start(user);
        let m = d.running("live");
        m.bash("mkdir $D/jobs/later $D/jobs/fed; echo /tmp > $D/jobs/later/cwd; echo keep-stdin > $D/jobs/fed/ctl; echo 'cat; exit 6' > $D/jobs/fed/cmd; echo before > $D/jobs/fed/stdin").ok();
        m.bash("head -n1 $D/jobs/fed/stdout | grep -q before").ok();
        d.crash();
        let outcome = m.bash("cat $D/jobs/later/cwd; echo pwd > $D/jobs/later/cmd; cat $D/jobs/later/out; echo after > $D/jobs/fed/stdin; echo eof > $D/jobs/fed/ctl; cat $D/jobs/fed/exit $D/jobs/fed/out").ok();
        assert_eq!(outcome.text(), "/tmp\n/tmp\n6\nbefore\nafter");
    }
}

each_user! {
    /// `machinefs exec`: outputs apart, input passed on, exit code, user, directory, environment; signals go there.
    fn the_exec_command(d) {
        let m = d.running("exec");
        let run = |script: &str| with_job(&m, &format!("rmdir $J; {script}"));
        let outcome = run("printf 'a\\0b' | $M exec $D -- sh -c 'cat; echo err >&2; exit 9'");
        assert_eq!((outcome.code, outcome.stdout.as_slice(), outcome.stderr.as_slice()), (9, &b"a\0b"[..], &b"err\n"[..]));
        let outcome = run("$M exec -n -u nobody -w /tmp -e X=1 -e 'Y=a b' $D -- sh -c 'id -un; pwd; echo $X $Y'").ok();
        assert_eq!(outcome.text(), "nobody\n/tmp\n1 a b");
        assert_eq!(run("$M exec -n $D -- no-such-program").code, 127);
        assert_eq!(run("$M exec -n $D -- /etc/passwd").code, 126);
        assert_eq!(run("$M exec -n no-such-machine -- true").code, 125);
        assert_eq!(run("$M exec -n -t 1s $D -- sleep 1000").code, 124);
        // Nobody wants the rest: the command ends as one here would.
        let outcome = run("$M exec -n $D -- yes | head -n1").ok();
        assert_eq!(outcome.text(), "y");
        let program = m.daemon.program();
        let mut waiting = m.spawn_bash(&format!("exec {} exec -n $D -- sleep 1000", program.display()));
        assert!(eventually(20, || m.bash("grep -l 'state running' $D/jobs/exec-*/status").code == 0));
        waiting.until_blocked();
        waiting.signal(libc::SIGTERM);
        assert_eq!(waiting.wait(20).code, 143);
        assert_eq!(m.bash("ls $D/jobs | grep -c exec-").text(), "0", "jobs of commands that ended are left");
    }
}
