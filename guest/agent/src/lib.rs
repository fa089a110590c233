//! The agent inside a machinefs machine: process 1 in containers and VMs, or a plain process.
//!
//! It inherits a listening unix socket as descriptor [`machinefs_protocol::LISTEN_FD`], serves the host's daemon
//! over it, runs the user's jobs and serves the guest's files.

mod credential;
pub mod files;
mod info;
mod init;
mod jobs;
mod log;
mod secrets;
mod server;
mod session;
mod shutdown;
mod system;

use server::Server;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::process::ExitCode;

const USAGE: &str = "usage: machinefs-agent init [--vm] | serve | credential SOCKET get | --version";

/// How the agent was started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mode {
    /// As the machine's first process.
    pub init: bool,
    /// The machine is a VM: its end is a power-off.
    pub vm: bool,
}

/// The program: reads its arguments, serves until the machine ends.
pub fn main() -> ExitCode {
    let args: Vec<std::ffi::OsString> = std::env::args_os().skip(1).collect();
    let args: Vec<&[u8]> = args.iter().map(|arg| std::os::unix::ffi::OsStrExt::as_bytes(arg.as_os_str())).collect();
    let mode = match args.as_slice() {
        [b"init"] => Mode { init: true, vm: false },
        [b"init", b"--vm"] => Mode { init: true, vm: true },
        [b"serve"] => Mode { init: false, vm: false },
        [b"credential", socket, operation] => return credential::ask(socket, operation),
        [b"--version"] => {
            println!("machinefs-agent {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match run(mode) {
        Ok(never) => match never {},
        Err(error) => {
            log::line(format_args!("cannot start: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn run(mode: Mode) -> std::io::Result<std::convert::Infallible> {
    let listener = listener()?;
    system::prepare()?;
    if mode.init {
        init::bring_up();
    }
    let server = Server::start(mode)?;
    log::line(format_args!("agent {} serves, process {}", env!("CARGO_PKG_VERSION"), std::process::id()));
    server.accept(&listener)
}

/// The inherited socket, kept from the jobs.
fn listener() -> std::io::Result<UnixListener> {
    let fd = machinefs_protocol::LISTEN_FD;
    let named = |error: std::io::Error| {
        std::io::Error::new(error.kind(), format!("no listening socket as descriptor {fd}: {error}"))
    };
    // SAFETY: F_SETFD takes no pointer; a descriptor that is not open gives EBADF.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(named(std::io::Error::last_os_error()));
    }
    // SAFETY: the descriptor is open, as checked, and by the contract of LISTEN_FD it is ours alone.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let listens = rustix::net::sockopt::socket_acceptconn(&socket).map_err(|errno| named(errno.into()))?;
    if !listens {
        return Err(named(std::io::Error::other("it does not listen")));
    }
    let listener = UnixListener::from(socket);
    listener.set_nonblocking(false)?;
    Ok(listener)
}
