//! The command line: `machinefs mount`, `umount`, `check`.

mod check;
mod daemon;
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
