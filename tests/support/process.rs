//! Child processes that are never waited for without bound, and what /proc tells of them.

use std::io::Read;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// After so many seconds a child counts as hung, unless the test says otherwise.
pub const PATIENCE: u64 = 90;

/// How a program ended, and what it said.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Exit code, or 128 and the signal.
    pub code: i32,
    /// The signal that killed it.
    pub signal: Option<i32>,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
}

impl Outcome {
    /// Standard output as text, without the newlines at its end.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim_end_matches('\n').to_string()
    }

    /// Standard error as text.
    pub fn words(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// Itself, if the code was 0; else the test fails with what it said.
    #[track_caller]
    pub fn ok(self) -> Outcome {
        assert_eq!(self.code, 0, "stdout: {}\nstderr: {}", self.text(), self.words());
        self
    }

    /// Itself, if the code was not 0.
    #[track_caller]
    pub fn fails(self) -> Outcome {
        assert_ne!(self.code, 0, "it succeeded\nstdout: {}\nstderr: {}", self.text(), self.words());
        self
    }

    /// Itself, if it failed and its standard error names this error (as strerror(3) words it).
    #[track_caller]
    pub fn fails_with(self, words: &str) -> Outcome {
        let outcome = self.fails();
        assert!(outcome.words().contains(words), "expected \"{words}\" in: {}", outcome.words());
        outcome
    }
}

/// A child in a process group of its own, whose output is being collected.
pub struct Running {
    child: Child,
    what: String,
    stdout: Receiver<Vec<u8>>,
    stderr: Receiver<Vec<u8>>,
    ended: Option<ExitStatus>,
}

fn collect(stream: Option<impl Read + Send + 'static>) -> Receiver<Vec<u8>> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut stream) = stream {
            let _ = stream.read_to_end(&mut bytes);
        }
        let _ = sender.send(bytes);
    });
    receiver
}

impl Running {
    /// Starts the command; its standard input is /dev/null.
    #[track_caller]
    pub fn start(mut command: Command) -> Running {
        let what = format!("{command:?}").chars().take(600).collect();
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{what}: {error}"));
        let stdout = collect(child.stdout.take());
        let stderr = collect(child.stderr.take());
        Running { child, what, stdout, stderr, ended: None }
    }

    /// Its process number, which is also that of its group.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal to its whole group.
    pub fn signal(&self, signal: i32) {
        // SAFETY: kill(2) has no memory effects; the group is our child's, not yet waited for.
        unsafe { libc::kill(-(self.pid() as i32), signal) };
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().ok().flatten();
        }
        self.ended.is_some()
    }

    /// Waits for its end, at most so many seconds. A child that hangs fails the test with what the kernel says it does.
    #[track_caller]
    pub fn wait(mut self, seconds: u64) -> Outcome {
        let end = Instant::now() + Duration::from_secs(seconds);
        let mut pause = Duration::from_micros(500);
        while !self.has_ended() {
            if Instant::now() > end {
                let report = describe_group(self.pid());
                self.signal(libc::SIGKILL);
                let dies = crate::eventually(5, || self.has_ended());
                panic!(
                    "hung for {seconds} s{}: {}\n{report}",
                    if dies { "" } else { " and survives SIGKILL" },
                    self.what
                );
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(20));
        }
        let status = self.ended.take().unwrap_or_default();
        let left = Duration::from_secs(seconds.max(5));
        let missing = |stream: &str| -> Vec<u8> {
            panic!(
                "{} has ended, but something still holds its {stream}\n{}",
                self.what,
                describe_group(self.child.id())
            )
        };
        let stdout = self.stdout.recv_timeout(left).unwrap_or_else(|_| missing("stdout"));
        let stderr = self.stderr.recv_timeout(left).unwrap_or_else(|_| missing("stderr"));
        Outcome {
            code: status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)),
            signal: status.signal(),
            stdout,
            stderr,
        }
    }

    /// Waits until every task of its group sleeps in a system call (state S), so that it blocks on what it reads.
    #[track_caller]
    pub fn until_blocked(&mut self) {
        let mut asleep = 0;
        let pid = self.pid();
        let blocked = crate::eventually(20, || {
            assert!(!self.has_ended(), "it was to block, but ended: {}", self.what);
            let tasks = group(pid);
            // It has become the program that was asked for, and stays asleep.
            let now = !tasks.is_empty() && tasks.iter().all(|task| task.state == 'S');
            asleep = if now { asleep + 1 } else { 0 };
            asleep > 10
        });
        assert!(blocked, "it does not block: {}\n{}", self.what, describe_group(pid));
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.has_ended() {
            self.signal(libc::SIGKILL);
            crate::eventually(10, || self.has_ended());
        }
    }
}

/// Runs the command to its end within [`PATIENCE`].
#[track_caller]
pub fn run(command: Command) -> Outcome {
    Running::start(command).wait(PATIENCE)
}

/// A task (thread) as /proc tells of it.
#[derive(Clone, Debug)]
pub struct Task {
    /// Process.
    pub pid: u32,
    /// Thread.
    pub tid: u32,
    /// Process group.
    pub group: u32,
    /// Parent process.
    pub parent: u32,
    /// Name.
    pub name: String,
    /// `R`, `S`, `D`, `T`, `Z` …, as in proc(5).
    pub state: char,
}

impl Task {
    fn read(pid: u32, tid: u32) -> Option<Task> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/stat")).ok()?;
        let (name, rest) = stat.split_once(") ")?;
        let mut fields = rest.split(' ');
        let state = fields.next()?.chars().next()?;
        let parent = fields.next()?.parse().ok()?;
        let group = fields.next()?.parse().ok()?;
        let name = name.split_once('(')?.1.to_string();
        Some(Task { pid, tid, group, parent, name, state })
    }

    /// The kernel function it sleeps in, and its system call's number.
    pub fn where_it_sleeps(&self) -> String {
        let read = |file: &str| std::fs::read_to_string(format!("/proc/{}/task/{}/{file}", self.pid, self.tid));
        let call = read("syscall").unwrap_or_default();
        format!(
            "{} (system call {})",
            read("wchan").unwrap_or_default(),
            call.split_whitespace().next().unwrap_or("unknown")
        )
    }
}

/// All tasks of all processes.
pub fn all_tasks() -> Vec<Task> {
    let numbers = |path: String| -> Vec<u32> {
        std::fs::read_dir(path)
            .map(|dir| dir.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
            .unwrap_or_default()
    };
    numbers("/proc".into())
        .into_iter()
        .flat_map(|pid| numbers(format!("/proc/{pid}/task")).into_iter().filter_map(move |tid| Task::read(pid, tid)))
        .collect()
}

/// The tasks of a process group.
pub fn group(group: u32) -> Vec<Task> {
    all_tasks().into_iter().filter(|task| task.group == group && task.state != 'Z').collect()
}

/// What the tasks of a group are doing, for people.
pub fn describe_group(number: u32) -> String {
    group(number)
        .iter()
        .map(|task| format!("  {} {} {}: {}\n", task.tid, task.name, task.state, task.where_it_sleeps()))
        .collect()
}

/// A field of /proc/PID/status, such as `VmHWM`, in its own unit (KiB).
pub fn status_field(pid: u32, name: &str) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text.lines().find(|line| line.split(':').next() == Some(name))?;
    line.split_whitespace().nth(1)?.parse().ok()
}
