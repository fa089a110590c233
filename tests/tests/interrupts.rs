//! No process is held: a signal ends every blocked read at once, a stopped guest or a boot that takes long holds nobody
//! past a deadline, and nobody stays in state D.

use machinefs_tests::process::{Running, Task, all_tasks};
use machinefs_tests::stopped::Stopped;
use machinefs_tests::{Daemon, Machine, each_user, each_user_alone, eventually, gate, skip, user};
use std::time::{Duration, Instant};

const SIGNALS: [i32; 3] = [libc::SIGINT, libc::SIGKILL, libc::SIGTERM];

/// The process blocks; the signal ends it, by that signal and not by an answer.
#[track_caller]
fn ends_by(mut process: Running, signal: i32, what: &str) {
    process.until_blocked();
    process.signal(signal);
    let outcome = process.wait(15);
    assert_eq!(outcome.signal, Some(signal), "{what}: {outcome:?}");
}

/// Blocking files of a machine that runs a silent job.
fn blocking_files(m: &Machine<'_>) -> Vec<String> {
    let job = m.daemon.exec(&["ls", &m.path("jobs")]).ok().text();
    let mut files: Vec<String> = ["out", "exit", "wait/stopped", "wait/event", "wait/console"].map(String::from).into();
    files.extend(["out", "stdout", "stderr", "exit"].map(|name| format!("jobs/{job}/{name}")));
    files
}

each_user! {
    /// Ctrl-C, SIGTERM and SIGKILL end a read of every blocking file at once.
    fn a_signal_ends_every_blocked_read(d) {
        let m = d.running("signal");
        m.bash("echo 'sleep 1000' > $D/exec").ok();
        for file in blocking_files(&m) {
            for signal in SIGNALS {
                ends_by(m.spawn(&["cat"], &file), signal, &file);
            }
        }
        for signal in SIGNALS {
            ends_by(d.spawn(&["cat", ".sys/wait/event"]), signal, ".sys/wait/event");
            ends_by(m.spawn_bash("exec 3<>$D/exec; echo 'sleep 1000' >&3; exec cat <&3"), signal, "private exec");
        }
    }
}

each_user! {
    /// A signal that a program handles gives EINTR, and no byte is lost by it (SIGWINCH, SIGCHLD, Go's SIGURG).
    fn no_byte_is_lost_by_a_signal(d) {
        let m = d.running("lost");
        m.python(r#"
import signal
caught = []
signal.signal(signal.SIGALRM, lambda *_: caught.append(1))
with open(f'{D}/exec', 'w') as f: f.write('for i in $(seq 1 400); do echo line $i; sleep 0.005; done')
signal.setitimer(signal.ITIMER_REAL, 0.003, 0.003)
got = b''
with open(f'{D}/out', 'rb', buffering=0) as out:
    while piece := out.read(50): got += piece
signal.setitimer(signal.ITIMER_REAL, 0)
assert caught
assert got == b''.join(b'line %d\n' % i for i in range(1, 401)), got
"#).ok();
    }
}

each_user! {
    /// The same with the agent stopped: blocked reads, and `ls files/`, end by the signal.
    fn a_signal_ends_reads_of_a_stopped_agent(d) {
        if !user::am_root() {
            skip!("stopping the agent needs root");
        }
        let m = d.running("hung");
        m.bash("echo 'sleep 1000' > $D/exec").ok();
        let files = blocking_files(&m);
        let _stopped = Stopped::new(&m);
        for signal in SIGNALS {
            for file in &files {
                ends_by(m.spawn(&["cat"], file), signal, file);
            }
            ends_by(m.spawn(&["ls"], "files/root"), signal, "ls files/root");
            ends_by(m.spawn(&["cat"], "files/etc/passwd"), signal, "cat files/etc/passwd");
        }
    }
}

each_user! {
    /// With the agent stopped, stat and ls in files/ fail within their deadline, and say why; when it goes on, so do they.
    fn a_stopped_agent_fails_within_the_deadline(d) {
        if !user::am_root() {
            skip!("stopping the agent needs root");
        }
        let m = d.running("deadline");
        {
            let _stopped = Stopped::new(&m);
            for argv in [["stat"], ["ls"]] {
                let outcome = m.spawn(&argv, "files/usr").wait(30).fails();
                let words = outcome.words();
                assert!(words.contains("No route to host") || words.contains("Connection timed out"), "{words}");
            }
            assert!(!m.read("health").starts_with("ok"), "health: {}", m.read("health"));
        }
        let again = eventually(30, || d.exec(&["ls", &m.path("files/usr")]).code == 0);
        assert!(again, "files/ does not come back: {}", m.read("errors"));
        m.guest("true");
    }
}

each_user! {
    /// While somebody waits for a stopped agent, `df`, `ls` of the mount, its own control files and other machines do not
    /// notice: they are done before the waiter's deadline.
    fn others_do_not_notice(d) {
        if !user::am_root() {
            skip!("stopping the agent needs root");
        }
        let (hung, other) = (d.running("hung"), d.running("other"));
        let _stopped = Stopped::new(&hung);
        let path = d.mount.to_string_lossy().into_owned();
        let others: [(&str, Vec<String>); 6] = [
            ("df", vec!["df".into(), path.clone()]),
            ("ls of the mount", vec!["ls".into(), "-la".into(), path]),
            ("status", vec!["cat".into(), hung.path("status")]),
            ("ls of the machine", vec!["ls".into(), hung.name.clone()]),
            ("ls of another machine", vec!["ls".into(), other.path("files/etc")]),
            ("write in another machine", vec!["cp".into(), "/etc/hostname".into(), other.path("files/root/x")]),
        ];
        for (what, argv) in others {
            // By order, not by time: the waiter still waits when the other is done. Five tries, for a busy host.
            let mut unnoticed = false;
            for _ in 0..5 {
                let mut waiter = hung.spawn(&["stat"], "files/usr/lib");
                let mut asleep = false;
                eventually(2, || {
                    asleep = all_tasks().iter().any(|task| task.group == waiter.pid() && task.name == "stat" && "SD".contains(task.state));
                    asleep || waiter.has_ended()
                });
                let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
                d.exec(&argv).ok();
                unnoticed = asleep && !waiter.has_ended();
                if unnoticed {
                    break;
                }
            }
            assert!(unnoticed, "{what} waited for the stopped agent");
        }
    }
}

/// Each operation as a script on `$D/files`; those that change something work on names of their own.
const OPERATIONS: [(&str, &str); 24] = [
    ("getattr", "stat $D/files/root"),
    ("lookup", "stat $D/files/root/no-such-name"),
    ("readdir", "ls $D/files/usr"),
    ("readdirplus", "ls -l $D/files/root/"),
    ("open and read", "cat $D/files/root/file"),
    ("write", "echo more >> $D/files/root/file"),
    ("truncate", "truncate -s 10 $D/files/root/file"),
    ("create", "echo new > $D/files/root/new"),
    ("mkdir", "mkdir $D/files/root/newdir"),
    ("rmdir", "rmdir $D/files/root/dir"),
    ("unlink", "rm -f $D/files/root/victim"),
    ("rename", "mv $D/files/root/from $D/files/root/to"),
    ("link", "ln $D/files/root/file $D/files/root/hard"),
    ("symlink", "ln -s target $D/files/root/soft"),
    ("readlink", "readlink $D/files/root/link"),
    ("mknod", "mkfifo $D/files/root/fifo"),
    ("chmod", "chmod 600 $D/files/root/file"),
    ("utimens", "touch -m $D/files/root/file"),
    ("statfs", "df $D/files/root"),
    ("getxattr", "getfattr -n user.test $D/files/root/file"),
    ("setxattr", "setfattr -n user.test -v 1 $D/files/root/file"),
    ("fsync", "sync $D/files/root/file"),
    ("flock", "flock -n $D/files/root/file true"),
    ("exec", "echo true > $D/exec; cat $D/exit"),
];

/// Two clients of every operation at once on a machine that does not answer: none is in D past the deadline, all end,
/// and a signal ends those that are not behind a lock of the kernel.
fn two_clients_of_everything(m: &Machine<'_>, what: &str, release: impl FnOnce()) {
    // Twice the deadline of one operation (5 s): a client may stand behind another's, and a busy host is slow.
    let past = Duration::from_secs(25);
    let begin = Instant::now();
    let mut clients: Vec<(&str, Running)> = Vec::new();
    for (name, script) in OPERATIONS {
        for _ in 0..2 {
            clients.push((name, m.spawn_bash(script)));
        }
    }
    let mut stuck: Vec<(String, Task, String)> = Vec::new();
    let all_end = eventually(75, || {
        if begin.elapsed() > past {
            let tasks = all_tasks();
            for (name, client) in &clients {
                for task in tasks.iter().filter(|task| task.group == client.pid() && task.state == 'D') {
                    stuck.push((name.to_string(), task.clone(), task.where_it_sleeps()));
                }
            }
        }
        // `exec` is queued by design: it ends with the boot, or when the agent goes on.
        clients.iter_mut().filter(|(name, _)| *name != "exec").all(|(_, client)| client.has_ended())
    });
    assert!(stuck.is_empty(), "{what}: in D past the deadline: {stuck:?}");
    let pending: Vec<&str> = clients
        .iter_mut()
        .filter_map(|(name, client)| (!client.has_ended() && *name != "exec").then_some(*name))
        .collect();
    assert!(all_end, "{what}: still waiting: {pending:?}");
    release();
    for (name, client) in clients {
        let outcome = client.wait(60);
        if name == "exec" {
            outcome.ok();
        }
    }
}

fn prepare(m: &Machine<'_>) {
    m.guest("cd /root; echo content > file; mkdir dir; touch victim from; ln -s file link");
    m.bash("ls -l $D/files/root > /dev/null; setfattr -n user.test -v 1 $D/files/root/file").ok();
}

each_user! {
    /// Two clients × every operation × the agent stopped.
    fn the_matrix_with_the_agent_stopped(d) {
        if !user::am_root() {
            skip!("stopping the agent needs root");
        }
        let m = d.running("matrix");
        prepare(&m);
        let stopped = Stopped::new(&m);
        two_clients_of_everything(&m, "agent stopped", || drop(stopped));
        assert_eq!(m.status(), "running");
    }
}

each_user_alone! {
    /// Two clients × every operation × the machine booting.
    fn the_matrix_while_booting(user) {
        let d: Daemon = gate::gated(user);
        let m = d.running("matrix");
        prepare(&m);
        m.ctl("stop").ok();
        d.exec(&["cat", &m.path("wait/stopped")]).ok();
        gate::close(&d);
        m.ctl("start").ok();
        two_clients_of_everything(&m, "booting", || gate::open(&d));
        m.until_running();
    }
}

each_user_alone! {
    /// A signal ends who waits for a boot: wait/running, exec's output, the walk into files/.
    fn a_signal_ends_who_waits_for_a_boot(user) {
        let d: Daemon = gate::gated(user);
        gate::close(&d);
        let m = d.machine("slow");
        for signal in SIGNALS {
            ends_by(m.spawn(&["cat"], "wait/running"), signal, "wait/running");
            ends_by(m.spawn(&["ls"], "files/root"), signal, "ls files/root");
            ends_by(m.spawn(&["stat"], "files/etc/passwd"), signal, "stat files/etc/passwd");
        }
        m.bash("echo 'echo queued' > $D/exec").ok();
        for signal in SIGNALS {
            ends_by(m.spawn(&["cat"], "out"), signal, "out");
            ends_by(m.spawn(&["cat"], "exit"), signal, "exit");
        }
        gate::open(&d);
        m.until_running();
        assert_eq!(m.read("out"), "queued\n");
    }
}
