//! `machinefs attach`: a terminal in a machine, by the files of a job alone.

use super::exec::{SetupArgs, argv};
use super::job::{Job, machine_dir};
use clap::Args;
use rustix::termios::{self, OptionalActions, Termios, Winsize};
use std::borrow::Cow;
use std::io::{self, IsTerminal};
use std::process::ExitCode;
use std::sync::Arc;
use tokio::signal::unix::{SignalKind, signal};

/// Size of a terminal that is none.
const ROWS: u16 = 24;
/// See [`ROWS`].
const COLUMNS: u16 = 80;
/// Ctrl-P, then Ctrl-Q, leave the job alone, as in docker.
const DETACH: [u8; 2] = [0x10, 0x11];
/// The command where none is given: the user's shell, as at a login.
const SHELL: &[u8] = b"exec \"${SHELL:-/bin/sh}\" -l\n";
/// How the names of its jobs begin.
const PREFIX: &str = "attach";
/// What is returned when attaching itself fails.
const FAILED: u8 = 125;

/// What to attach to.
#[derive(Args)]
pub struct AttachArgs {
    /// The machine: its name in /sandboxes (or MACHINEFS_MOUNT), or the path of its directory.
    machine: String,
    /// A program and its arguments; without one, a shell.
    #[arg(last = true)]
    command: Vec<std::ffi::OsString>,
    /// A job that runs already, as it was left with Ctrl-P Ctrl-Q: its name in `jobs`.
    #[arg(long, short, conflicts_with_all = ["command", "user", "workdir", "env", "timeout"])]
    job: Option<String>,
    #[command(flatten)]
    setup: SetupArgs,
}

/// How it ended here.
enum End {
    /// The job has ended, with that code.
    Exit(u8),
    /// The user left.
    Detached,
}

/// Attaches; the exit code is the job's.
pub fn attach(args: &AttachArgs) -> ExitCode {
    match run(args) {
        Ok(code) => code.into(),
        Err(message) => {
            eprintln!("machinefs attach: {message}");
            FAILED.into()
        }
    }
}

fn run(args: &AttachArgs) -> Result<u8, String> {
    let machine = machine_dir(&args.machine)?;
    let job = match &args.job {
        Some(name) => Arc::new(Job::open(&machine, name)?),
        None => Arc::new(Job::create(&machine, PREFIX)?),
    };
    let end = if args.job.is_none() { start(args, &job) } else { Ok(()) }.and_then(|()| serve(&job));
    match end {
        Ok(End::Exit(code)) => {
            // One that was made by other means is for whoever made it to remove.
            if job.name().starts_with(PREFIX) {
                job.remove();
            }
            Ok(code)
        }
        Ok(End::Detached) => {
            eprintln!("\r\nleft; to come back: machinefs attach {} --job {}", args.machine, job.name());
            Ok(0)
        }
        Err(message) => {
            if args.job.is_none() {
                job.remove();
            }
            Err(message)
        }
    }
}

fn start(args: &AttachArgs, job: &Job) -> Result<(), String> {
    let terminal = std::env::var("TERM").ok().map(|term| format!("TERM={term}"));
    args.setup.write_with(job, terminal)?;
    let size = size();
    job.write("tty", format!("{} {}", size.ws_row, size.ws_col).as_bytes())?;
    match args.command.as_slice() {
        [] => job.write("cmd", SHELL),
        command => job.write("argv", &argv(command)),
    }
}

fn size() -> Winsize {
    let fallback = Winsize { ws_row: ROWS, ws_col: COLUMNS, ws_xpixel: 0, ws_ypixel: 0 };
    let size = termios::tcgetwinsize(io::stdin()).or_else(|_| termios::tcgetwinsize(io::stdout())).unwrap_or(fallback);
    if size.ws_row == 0 || size.ws_col == 0 { fallback } else { size }
}

/// The terminal passes every key on, until this is dropped.
struct Raw(Option<Termios>);

impl Raw {
    fn enter() -> Raw {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Raw(None);
        }
        let saved = termios::tcgetattr(&stdin).ok();
        if let Some(saved) = &saved {
            let mut raw = saved.clone();
            raw.make_raw();
            // Where it cannot be set, lines arrive when they are complete.
            let _ = termios::tcsetattr(&stdin, OptionalActions::Drain, &raw);
        }
        Raw(saved)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Some(saved) = &self.0 {
            // Nothing is left to be done about it.
            let _ = termios::tcsetattr(io::stdin(), OptionalActions::Drain, saved);
        }
    }
}

fn serve(job: &Arc<Job>) -> Result<End, String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| format!("cannot start the runtime: {error}"))?;
    let end = runtime.block_on(async {
        let failed = |error: io::Error| format!("cannot wait for signals: {error}");
        let mut resized = signal(SignalKind::window_change()).map_err(failed)?;
        let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
        let mut hangup = signal(SignalKind::hangup()).map_err(failed)?;
        let raw = Raw::enter();
        // Its size may have changed since the start, or since somebody else was here.
        resize(job);
        let (leave, mut left) = tokio::sync::mpsc::unbounded_channel();
        let typed = job.clone();
        // Ends with the process: a read of the terminal cannot be called off.
        std::thread::spawn(move || {
            let Ok(input) = typed.input() else { return };
            let mut keys = Keys::default();
            if typed.pass_stdin(input, |bytes| keys.pass(bytes)) == Ok(true) {
                // Whoever waits for it may have gone.
                let _ = leave.send(());
            }
        });
        let printing = job.clone();
        let mut printed = tokio::task::spawn_blocking(move || printing.copy_output("out", &mut io::stdout()));
        let end = loop {
            tokio::select! {
                copied = &mut printed => {
                    break match copied {
                        Ok(Ok(())) => Ok(None),
                        Ok(Err(error)) => Err(format!("{}: {error}", job.path("out").display())),
                        Err(error) => Err(error.to_string()),
                    };
                }
                // Without anybody who could leave, this is out.
                Some(()) = left.recv() => break Ok(Some(End::Detached)),
                _ = resized.recv() => resize(job),
                _ = terminate.recv() => break Ok(Some(End::Detached)),
                _ = hangup.recv() => break Ok(Some(End::Detached)),
            }
        };
        drop(raw);
        end
    })?;
    // The thread that prints may be waiting for more.
    runtime.shutdown_background();
    match end {
        Some(end) => Ok(end),
        None => job.exit().map(End::Exit),
    }
}

fn resize(job: &Job) {
    let size = size();
    // One that has ended has no size.
    let _ = job.ctl(&format!("winsize {} {}", size.ws_row, size.ws_col));
}

/// Looks for the keys that leave.
#[derive(Default)]
struct Keys {
    /// The first of them was typed, and held back.
    held: bool,
}

impl Keys {
    /// What is to be passed on, and whether the user leaves.
    fn pass(&mut self, typed: &[u8]) -> (Cow<'static, [u8]>, bool) {
        let mut passed = Vec::with_capacity(typed.len() + 1);
        for &key in typed {
            if std::mem::take(&mut self.held) {
                if key == DETACH[1] {
                    return (passed.into(), true);
                }
                passed.push(DETACH[0]);
            }
            if key == DETACH[0] {
                self.held = true;
            } else {
                passed.push(key);
            }
        }
        (passed.into(), false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_keys_leave_and_nothing_else_is_lost() {
        let mut keys = Keys::default();
        assert_eq!(keys.pass(b"a\x10"), (b"a".into(), false));
        assert_eq!(keys.pass(b"b"), (b"\x10b".into(), false));
        assert_eq!(keys.pass(b"\x10\x10"), (b"\x10".into(), false));
        assert_eq!(keys.pass(b"\x11c"), (Cow::default(), true));
    }
}
