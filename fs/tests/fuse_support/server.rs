//! A server in a process of its own, which can be killed: the test program, started once more.

use super::fake::{Content, Fake, Plan};
use super::{Client, eventually};
use machinefs::fuse::{self, MountOptions, Notice};
use machinefs::tree::ops::{Op, ROOT};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout, Command, Stdio};

/// Where the server mounts; set in the server's process only.
const TARGET: &str = "MACHINEFS_TEST_TARGET";

/// A running server.
pub struct Server {
    pub process: Client,
    commands: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Server {
    /// Starts one; `prefix` is a command that runs it as somebody else.
    pub fn start(target: &Path, prefix: &[&str]) -> Self {
        let program = std::env::current_exe().unwrap();
        Self::start_program(&program, target, prefix, |_| {})
    }

    pub fn start_program(program: &Path, target: &Path, prefix: &[&str], change: impl FnOnce(&mut Command)) -> Self {
        let mut words: Vec<std::ffi::OsString> = prefix.iter().map(Into::into).collect();
        words.push(program.into());
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).args(["--ignored", "--exact", "--nocapture", "server_process"]);
        command.env(TARGET, target).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        change(&mut command);
        let (process, child_in, child_out) = Client::with_pipes(command);
        let mut server = Server { process, commands: Some(child_in), answers: BufReader::new(child_out) };
        // What the test harness prints before the test.
        server.line_with("server:");
        server
    }

    /// The next line that has a word in it; without it. Empty at the end.
    pub fn line_with(&mut self, word: &str) -> String {
        loop {
            let mut line = String::new();
            if self.answers.read_line(&mut line).unwrap() == 0 {
                return String::new();
            }
            if let Some(at) = line.find(word) {
                return line[at + word.len()..].trim().to_string();
            }
        }
    }

    pub fn command(&mut self, command: &str) {
        writeln!(self.commands.as_mut().unwrap(), "{command}").unwrap();
    }

    /// Ends it as a daemon ends: it unmounts and exits.
    pub fn end(&mut self) -> super::End {
        self.commands = None;
        self.process.wait()
    }
}

/// Body of the server's process: see the `server_process` test of each file that uses it.
pub fn serve() {
    let Some(target) = std::env::var_os(TARGET).map(PathBuf::from) else {
        println!("skipped: only for the other tests");
        return;
    };
    println!("server: begins");
    let replaced = fuse::replace_stale_mount(&target);
    println!("replaced: {replaced:?}");
    let fake = Fake::new();
    fake.add(ROOT, b"f", Content::File(b"served\n".to_vec()));
    fake.plan(Plan { matches: Box::new(|op| matches!(op, Op::MkDir { name: b"slow", .. })), obeys: false });
    let session = match fuse::mount(MountOptions::new(&target)).and_then(|mounted| mounted.serve(fake.clone())) {
        Ok(session) => session,
        Err(error) => {
            println!("failed: {error}");
            return;
        }
    };
    println!("mounted: yes");
    for command in std::io::stdin().lines() {
        match command.unwrap().as_str() {
            "invalidate" => session
                .notifier()
                .send(Notice::InvalidateEntry { parent: ROOT, name: b"f".as_slice().into(), expire_only: false })
                .unwrap(),
            other => println!("unknown: {other}"),
        }
    }
    session.unmount(true).unwrap();
    session.join();
    println!("unmounted: yes");
}

/// The states of a process's threads, with their names.
pub fn threads(pid: i32) -> Vec<(String, char)> {
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    tasks
        .filter_map(|task| {
            let stat = std::fs::read_to_string(task.ok()?.path().join("stat")).ok()?;
            let (head, tail) = stat.rsplit_once(')')?;
            Some((head.split_once('(')?.1.to_string(), tail.trim().chars().next()?))
        })
        .collect()
}

/// Waits until a thread of a process is in a state.
pub fn wait_for_thread(pid: i32, name: &str, state: char) {
    eventually(&format!("{name} in {state}"), || threads(pid).contains(&(name.to_string(), state)));
}
