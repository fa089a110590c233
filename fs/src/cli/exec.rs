//! `machinefs exec`: runs a command in a machine as if it were one here: outputs apart, input passed on, its exit code.

use super::job::{Job, machine_dir};
use clap::Args;
use std::io;
use std::process::ExitCode;
use tokio::signal::unix::{SignalKind, signal};

/// What `docker exec` and `env` return when they fail themselves.
const FAILED: u8 = 125;

/// How to run it.
#[derive(Args)]
pub struct ExecArgs {
    /// The machine: its name in /sandboxes (or MACHINEFS_MOUNT), or the path of its directory.
    machine: String,
    /// The program and its arguments, as they are: no shell reads them.
    #[arg(last = true, required = true)]
    command: Vec<std::ffi::OsString>,
    /// Do not read the standard input (in loops that read theirs).
    #[arg(long, short = 'n')]
    no_stdin: bool,
    #[command(flatten)]
    setup: SetupArgs,
}

/// What a job begins with.
#[derive(Args)]
pub struct SetupArgs {
    /// The user in the machine: a name or a number, USER or USER:GROUP.
    #[arg(long, short)]
    user: Option<String>,
    /// The directory in the machine to start in.
    #[arg(long, short)]
    workdir: Option<String>,
    /// A variable of its environment, NAME=VALUE; can be given more than once.
    #[arg(long, short)]
    env: Vec<String>,
    /// Kill it after this time (30s, 5m); its exit code is then 124.
    #[arg(long, short)]
    timeout: Option<String>,
}

impl SetupArgs {
    /// Writes them into a job that is being set up.
    pub fn write(&self, job: &Job) -> Result<(), String> {
        self.write_with(job, None)
    }

    /// The same, with a variable that goes before those that were given.
    pub fn write_with(&self, job: &Job, variable: Option<String>) -> Result<(), String> {
        for (file, value) in [("user", &self.user), ("cwd", &self.workdir), ("timeout", &self.timeout)] {
            if let Some(value) = value {
                job.write(file, value.as_bytes())?;
            }
        }
        let env: Vec<String> = variable.into_iter().chain(self.env.iter().cloned()).collect();
        // Values may have lines, so a NUL ends each.
        let env: String = env.into_iter().map(|variable| variable + "\0").collect();
        if !env.is_empty() {
            job.write("env", env.as_bytes())?;
        }
        Ok(())
    }
}

/// The program and its arguments, as `argv` takes them.
pub fn argv(command: &[std::ffi::OsString]) -> Vec<u8> {
    use std::os::unix::ffi::OsStrExt;
    command.iter().flat_map(|word| [word.as_bytes(), b"\0"].concat()).collect()
}

/// Runs it; the exit code is the command's.
pub fn exec(args: &ExecArgs) -> ExitCode {
    match run(args) {
        Ok(code) => code.into(),
        Err(message) => {
            eprintln!("machinefs exec: {message}");
            FAILED.into()
        }
    }
}

fn run(args: &ExecArgs) -> Result<u8, String> {
    let machine = machine_dir(&args.machine)?;
    let job = std::sync::Arc::new(Job::create(&machine, "exec")?);
    let result = start(args, &job).and_then(|()| follow(&job));
    job.remove();
    result
}

fn start(args: &ExecArgs, job: &std::sync::Arc<Job>) -> Result<(), String> {
    args.setup.write(job)?;
    // Opened before the start: a job whose input was never opened reads from /dev/null.
    let input = if args.no_stdin { None } else { Some(job.input()?) };
    job.write("argv", &argv(&args.command))?;
    if let Some(input) = input {
        let job = job.clone();
        // Ends with the process at the latest: a read of the terminal cannot be called off.
        std::thread::spawn(move || {
            // A job that does not read all of it is not at fault.
            let _ = job.pass_stdin(input, |bytes| (bytes.into(), false));
        });
    }
    Ok(())
}

/// Copies what it prints until it ends.
fn follow(job: &std::sync::Arc<Job>) -> Result<u8, String> {
    forward_signals(job)?;
    let errors = {
        let job = job.clone();
        std::thread::spawn(move || copy(&job, "stderr", &mut io::stderr()))
    };
    copy(job, "stdout", &mut io::stdout().lock())?;
    errors.join().unwrap_or(Ok(()))?;
    job.exit()
}

fn copy(job: &Job, what: &str, to: &mut dyn io::Write) -> Result<(), String> {
    match job.copy_output(what, to) {
        // Whoever read it has enough: what that does to a command here, it does to this one.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
            // One that has ended needs no signal.
            let _ = job.ctl("signal PIPE");
            Ok(())
        }
        copied => copied.map_err(|error| format!("{}: {error}", job.path(what).display())),
    }
}

/// What would end a command here is passed on to it there.
fn forward_signals(job: &std::sync::Arc<Job>) -> Result<(), String> {
    let job = job.clone();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| format!("cannot start the runtime: {error}"))?;
    let signals = [
        (SignalKind::interrupt(), "INT"),
        (SignalKind::terminate(), "TERM"),
        (SignalKind::hangup(), "HUP"),
        (SignalKind::quit(), "QUIT"),
    ];
    let streams: io::Result<Vec<_>> = {
        let _entered = runtime.enter();
        signals.into_iter().map(|(kind, name)| signal(kind).map(|stream| (stream, name))).collect()
    };
    let streams = streams.map_err(|error| format!("cannot wait for signals: {error}"))?;
    std::thread::spawn(move || {
        runtime.block_on(async {
            let waiting = streams.into_iter().map(|(mut stream, name)| {
                let job = job.clone();
                tokio::spawn(async move {
                    while stream.recv().await.is_some() {
                        // One that has ended needs none.
                        let _ = job.ctl(&format!("signal {name}"));
                    }
                })
            });
            for one in waiting.collect::<Vec<_>>() {
                let _ = one.await;
            }
        });
    });
    Ok(())
}
