//! `repo`: a git repository that is cloned into the working directory at the first boot, by the job `clone`. Other jobs
//! wait for it, so that the first command finds it there.

use super::Machine;
use super::job::{Job, Script};
use super::output::{Chunk, Output};
use super::state::State;
use crate::errno::Errno;
use crate::tree::ops::Caller;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// The name of the job.
pub(super) const CLONE: &str = "clone";
/// The file in the machine's directory that says that it was done.
const DONE: &str = "cloned";
/// How often its progress is looked at.
const LOOK: Duration = Duration::from_millis(100);
/// Bytes of its output looked at.
const PIECE: usize = 64 * 1024;

/// Clones `$1` into `$2`, which may have files already (a home directory has). The arguments are never read by a shell.
const SCRIPT: &str = r#"
set -e
export GIT_TERMINAL_PROMPT=0
mkdir -p -- "$2"
cd -- "$2"
if [ -z "$(ls -A)" ]; then
    exec git clone --progress -- "$1" .
fi
git init --quiet
git remote add origin "$1" 2>/dev/null || git remote set-url origin "$1"
git fetch --progress origin
git remote set-head origin --auto >/dev/null
branch=$(git symbolic-ref --short refs/remotes/origin/HEAD)
git checkout --quiet --track -B "${branch#origin/}" "$branch"
"#;

impl Machine {
    fn repository(&self) -> Option<String> {
        let config = self.config.lock();
        config.0.given("repo").filter(|repo| *repo != "none").map(str::to_string)
    }

    fn clone_marker(&self) -> std::path::PathBuf {
        self.dir.join(DONE)
    }

    fn running_clone(&self) -> Option<Arc<Job>> {
        self.jobs.find(CLONE.as_bytes()).filter(|job| !job.is_done())
    }

    /// Called before jobs are given to the agent: whether they are to wait for the repository.
    pub(super) fn expect_clone(&self, boots: bool) {
        let due = self.repository().is_some() && !self.clone_marker().exists();
        let waits = due && (boots || self.running_clone().is_some());
        self.cloning.store(waits, Ordering::Release);
    }

    /// Whether a job has to wait for the repository.
    pub(super) fn holds_back(&self, job: &Job) -> bool {
        self.cloning.load(Ordering::Acquire) && job.name() != Some(CLONE)
    }

    /// Begins it, if it is due.
    pub(super) fn start_clone(self: &Arc<Self>) {
        if !self.cloning.load(Ordering::Acquire) {
            return;
        }
        if let Some(job) = self.running_clone() {
            return self.tell_progress(job);
        }
        let Some(repository) = self.repository() else { return self.end_clone() };
        let workdir = String::from_utf8_lossy(&self.workdir()).into_owned();
        let argv = ["sh", "-c", SCRIPT, CLONE, &repository, &workdir].map(|word| word.as_bytes().to_vec());
        let owner = Caller { uid: self.owner.0, gid: self.owner.1, pid: 0 };
        match self.jobs.begin_as(owner, Some(CLONE)) {
            Ok(job) => {
                job.give_argv(argv.to_vec());
                // Not its address: the log of all machines is open to everybody.
                self.say(CLONE, &[("state", "started")]);
                let line =
                    format!("git clone {} {}\n", super::events::quote(&repository), super::events::quote(&workdir));
                // What becomes of it shows in the job.
                self.jobs.submit(&job, Script::Text(line.into_bytes()), |_| {});
                self.tell_progress(job);
            }
            Err(error) => {
                self.record_error(CLONE, error.errno(), &error.to_string(), &repository);
                self.end_clone();
            }
        }
    }

    /// Its end, with the exit code if it has one.
    pub(super) fn clone_ended(self: &Arc<Self>, job: &Arc<Job>, code: Option<u8>) {
        // Told on the link's reader thread; this goes to the disk.
        let (machine, job) = (self.clone(), job.clone());
        self.shared.runtime.spawn_blocking(move || machine.note_clone(&job, code));
    }

    fn note_clone(self: &Arc<Self>, job: &Arc<Job>, code: Option<u8>) {
        if code == Some(0) {
            // Where it cannot be written down, the next boot finds the repository there, and fetches.
            let _ = std::fs::write(self.clone_marker(), "");
        } else if let Some(code) = code {
            let why = format!("the repository was not cloned: exit {code}: {}", last_words(job));
            self.record_error(CLONE, Errno::EHOSTUNREACH, &why, &self.repository().unwrap_or_default());
        }
        let code = code.map_or("none".to_string(), |code| code.to_string());
        self.say(CLONE, &[("exit", &code)]);
        self.end_clone();
    }

    fn end_clone(self: &Arc<Self>) {
        self.cloning.store(false, Ordering::Release);
        self.jobs.start_queued(self);
    }

    /// Turns git's percentages into events, in steps of ten.
    fn tell_progress(self: &Arc<Self>, job: Arc<Job>) {
        let machine = self.clone();
        self.shared.runtime.spawn(async move {
            let mut reader = job.reader(Output::Stderr);
            let mut told = (String::new(), 0);
            // Its end is told elsewhere, and is the last of it.
            while machine.state() == State::Running && !job.is_done() {
                match reader.next(PIECE) {
                    Ok(Chunk::Data(data)) => {
                        let text = String::from_utf8_lossy(&data);
                        for (phase, percent) in text.split(['\r', '\n']).filter_map(progress) {
                            let now = (phase.to_string(), percent / 10);
                            if now != told && percent > 0 {
                                machine.say(CLONE, &[("phase", phase), ("percent", &percent.to_string())]);
                                told = now;
                            }
                        }
                    }
                    Ok(Chunk::Pending) => tokio::time::sleep(LOOK).await,
                    Ok(Chunk::End) | Err(_) => return,
                }
            }
        });
    }
}

/// A line of git's progress: `Receiving objects:  45% (9/20), …`.
fn progress(line: &str) -> Option<(&str, u32)> {
    let (phase, rest) = line.split_once(": ")?;
    let percent = rest.trim_start().split_once('%')?.0.parse().ok()?;
    let phase = phase.strip_prefix("remote: ").unwrap_or(phase);
    // The guest wrote it.
    let plain = !phase.is_empty() && phase.len() <= 40 && phase.chars().all(|c| c.is_ascii_alphanumeric() || c == ' ');
    (plain && percent <= 100).then_some((phase, percent))
}

/// The last line that it printed.
fn last_words(job: &Arc<Job>) -> String {
    let mut reader = job.reader(Output::Stderr);
    let mut text = Vec::new();
    while let Ok(Chunk::Data(data)) = reader.next(PIECE) {
        text.extend_from_slice(&data);
        let surplus = text.len().saturating_sub(PIECE);
        text.drain(..surplus);
    }
    let text = String::from_utf8_lossy(&text);
    let line = text.split(['\r', '\n']).map(str::trim).rfind(|line| !line.is_empty()).unwrap_or("it said nothing");
    line.chars().take(300).filter(|c| !c.is_control()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentages_of_git() {
        assert_eq!(progress("Receiving objects:  45% (9/20), 1.2 MiB | 3 MiB/s"), Some(("Receiving objects", 45)));
        assert_eq!(progress("Resolving deltas: 100% (3/3), done."), Some(("Resolving deltas", 100)));
        for other in ["Cloning into 'x'...", "fatal: a: b", "x=\u{7}: 5% ", "a: 500%", ""] {
            assert_eq!(progress(other), None, "{other}");
        }
    }
}
