//! The command line: `machinefs mount`, `umount`, `check`, `exec`, `attach`.

mod attach;
mod check;
mod daemon;
mod exec;
mod job;
mod settings;

use clap::{Parser, Subcommand};
use settings::DaemonArgs;
use std::path::PathBuf;
use std::process::ExitCode;

/// A file system whose directories are machines.
#[derive(Parser)]
#[command(name = "machinefs", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Mount the tree and serve it, in the foreground. SIGTERM unmounts; machines run on.
    Mount {
        /// An empty directory.
        mountpoint: PathBuf,
        #[command(flatten)]
        args: DaemonArgs,
    },
    /// Unmount a tree of ours: its daemon ends, its machines run on.
    Umount {
        /// Where it is mounted.
        mountpoint: PathBuf,
        /// Also when files of it are in use.
        #[arg(long, short)]
        lazy: bool,
    },
    /// Run a command in a machine: outputs apart, input passed on, its exit code (125: this failed, 126: it cannot be
    /// run, 127: there is no such program).
    Exec(exec::ExecArgs),
    /// Open a terminal in a machine: a shell, a command, or a job that was left with Ctrl-P Ctrl-Q.
    Attach(attach::AttachArgs),
    /// Tell what each backend needs and lacks on this host: one line a finding, with its remedy.
    Check {
        #[command(flatten)]
        args: DaemonArgs,
    },
}

/// Runs the command that the process was given.
pub fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Mount { mountpoint, args } => daemon::mount(&mountpoint, args),
        Command::Umount { mountpoint, lazy } => daemon::umount(&mountpoint, lazy),
        Command::Exec(args) => Ok(exec::exec(&args)),
        Command::Attach(args) => Ok(attach::attach(&args)),
        Command::Check { args } => check::check(args),
    };
    match result {
        Ok(code) => code,
        Err(message) => {
            eprintln!("machinefs: {message}");
            ExitCode::FAILURE
        }
    }
}
