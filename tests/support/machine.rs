//! A machine of a test's own.

use crate::daemon::Daemon;
use crate::process::{self, Outcome, Running};
use crate::shell::Shell;

/// A machine, destroyed when the test is done with it.
pub struct Machine<'a> {
    /// Whose it is.
    pub daemon: &'a Daemon,
    /// Its name: its directory in the mount.
    pub name: String,
}

impl Daemon {
    /// Makes a machine by mkdir and does not wait for it.
    #[track_caller]
    pub fn machine(&self, prefix: &str) -> Machine<'_> {
        let machine = Machine { daemon: self, name: self.name(prefix) };
        self.exec(&["mkdir", &machine.name]).ok();
        machine
    }

    /// Makes a machine and waits until it is up.
    #[track_caller]
    pub fn running(&self, prefix: &str) -> Machine<'_> {
        let machine = self.machine(prefix);
        machine.until_running();
        machine
    }

    /// Makes a machine by a line to `ctl`: `create NAME ARGUMENTS`.
    #[track_caller]
    pub fn create(&self, prefix: &str, arguments: &str) -> Machine<'_> {
        let machine = Machine { daemon: self, name: self.name(prefix) };
        self.bash(&format!("echo 'create {} {arguments}' > ctl", machine.name)).ok();
        machine
    }
}

impl Machine<'_> {
    /// A path in the machine's directory, relative to the mount.
    pub fn path(&self, file: &str) -> String {
        format!("{}/{file}", self.name)
    }

    /// Waits until it is up; fails the test with the machine's own words when it cannot come up.
    #[track_caller]
    pub fn until_running(&self) {
        let outcome = self.daemon.exec(&["cat", &self.path("wait/running")]);
        if outcome.code != 0 {
            panic!(
                "{} does not come up: {}\nerrors: {}\nlog: {}",
                self.name,
                outcome.words(),
                self.daemon.exec(&["cat", &self.path("errors")]).text(),
                self.daemon.log()
            );
        }
    }

    /// Reads one of its files.
    #[track_caller]
    pub fn read(&self, file: &str) -> String {
        self.daemon.read(&self.path(file))
    }

    /// Its status, one word.
    #[track_caller]
    pub fn status(&self) -> String {
        self.read("status").trim_end().to_string()
    }

    /// Waits until its status is that word.
    #[track_caller]
    pub fn until_status(&self, word: &str) {
        let there = crate::eventually(40, || self.status() == word);
        assert!(there, "{} is {}, not {word}\n{}", self.name, self.status(), self.read("errors"));
    }

    /// A value of `info`.
    #[track_caller]
    pub fn info(&self, key: &str) -> String {
        let info = self.read("info");
        let line = info.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("info has no {key}:\n{info}")).trim().to_string()
    }

    /// The process of its init on the host.
    #[track_caller]
    pub fn init(&self) -> u32 {
        self.info("pid").parse().unwrap_or_else(|_| panic!("pid in info: {}", self.info("pid")))
    }

    /// Writes a line to its `ctl`.
    #[track_caller]
    pub fn ctl(&self, line: &str) -> Outcome {
        self.daemon.exec(&["bash", "-c", "printf '%s\\n' \"$2\" > \"$1\"", "ctl", &self.path("ctl"), line])
    }

    /// Runs a script in the machine by `exec`'s private form: its output, and its exit code.
    #[track_caller]
    pub fn run(&self, script: &str) -> (String, i32) {
        let outcome = self.daemon.exec(&[
            "bash",
            "-euc",
            "exec 3<>\"$1\"; printf '%s' \"$2\" >&3; cat <&3; read -r word code <&3; test \"$word\" = exit; exit \"$code\"",
            "run",
            &self.path("exec"),
            script,
        ]);
        assert!(outcome.stderr.is_empty(), "{}", outcome.words());
        (outcome.text(), outcome.code)
    }

    /// Runs a script in the machine that must succeed; its output.
    #[track_caller]
    pub fn guest(&self, script: &str) -> String {
        let (output, code) = self.run(script);
        assert_eq!(code, 0, "{script}\n{output}");
        output
    }

    fn with_name(&self, mut command: std::process::Command) -> std::process::Command {
        command = self.daemon.prepare(command);
        command.env("D", &self.name);
        command
    }

    /// Runs a script on the host, in the mount, under a shell, with `-eu`; `$D` is the machine's name.
    #[track_caller]
    pub fn sh(&self, shell: Shell, script: &str) -> Outcome {
        process::run(self.with_name(shell.command(script)))
    }

    /// The same under bash.
    #[track_caller]
    pub fn bash(&self, script: &str) -> Outcome {
        self.sh(Shell::Bash, script)
    }

    /// Starts a script on the host under bash; `$D` is the machine's name.
    #[track_caller]
    pub fn spawn_bash(&self, script: &str) -> Running {
        Running::start(self.with_name(Shell::Bash.command(script)))
    }

    /// Starts a program on the host, in the mount, with the path of one of the machine's files as its last argument.
    #[track_caller]
    pub fn spawn(&self, argv: &[&str], file: &str) -> Running {
        let path = self.path(file);
        let argv: Vec<&str> = argv.iter().copied().chain([path.as_str()]).collect();
        self.daemon.spawn(&argv)
    }

    /// Runs a Python script on the host, in the mount; `D` is the machine's name, and usual modules are imported.
    #[track_caller]
    pub fn python(&self, script: &str) -> Outcome {
        process::run(self.python_command(script))
    }

    /// Starts such a script.
    #[track_caller]
    pub fn spawn_python(&self, script: &str) -> Running {
        Running::start(self.python_command(script))
    }

    fn python_command(&self, script: &str) -> std::process::Command {
        let head = "import ctypes, errno, fcntl, mmap, os, select, shutil, stat, subprocess, sys, threading, time\n\
                    D = os.environ['D']\nT = os.environ['T']\n\
                    def fails(number, call, *arguments):\n    \
                    try: call(*arguments)\n    \
                    except OSError as e: assert e.errno == number, (call, arguments, e); return e\n    \
                    raise AssertionError(('it succeeded', call, arguments))\n";
        let mut command = std::process::Command::new("python3");
        command.args(["-c", &format!("{head}{script}")]);
        self.with_name(command)
    }

    /// How many jobs it has had. They are in `history` once they have ended, so this waits for those there are.
    #[track_caller]
    pub fn jobs(&self) -> usize {
        let count = self.bash("cat $D/jobs/*/exit > /dev/null 2>&1 || true; wc -l < $D/history").ok().text();
        count.trim().parse().unwrap_or_else(|_| panic!("wc -l: {count}"))
    }
}

impl Drop for Machine<'_> {
    fn drop(&mut self) {
        // It may be gone already: that was the test's business. Not waited for without bound either.
        if let Ok(mut gone) = std::panic::catch_unwind(|| self.daemon.spawn(&["rmdir", &self.name])) {
            crate::eventually(30, || gone.has_ended());
        }
    }
}

impl std::panic::RefUnwindSafe for Daemon {}
