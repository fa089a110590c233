//! The machine's end.

use crate::jobs::{signal_all, wait_for_children};
use crate::server::Server;
use std::sync::Arc;
use std::time::Duration;

/// Time between SIGTERM and SIGKILL when the agent itself was asked to end by a signal.
pub const SIGNAL_GRACE: Duration = Duration::from_secs(10);
/// How long the processes may take to vanish after SIGKILL, and the host to read the last of their output.
const LAST: Duration = Duration::from_secs(2);

/// Ends every process, then the agent, and with it the container or the VM.
pub fn run(server: &Arc<Server>, grace: Duration) -> ! {
    crate::log::line(format_args!("shutting down, {} ms grace", grace.as_millis()));
    end_all(libc::SIGTERM);
    if !wait_for_children(grace) {
        end_all(libc::SIGKILL);
        wait_for_children(LAST);
    }
    server.jobs().wait_for_ends(LAST);
    if let Some(connection) = server.connection() {
        connection.streams().flush(LAST);
    }
    if server.mode().vm && std::process::id() == 1 {
        rustix::fs::sync();
        let errno = rustix::system::reboot(rustix::system::RebootCommand::PowerOff);
        crate::log::line(format_args!("power off: {errno:?}"));
    }
    std::process::exit(0)
}

/// Sends a signal to all processes: as process 1 to everything in the machine, else to what it started.
fn end_all(signal: i32) {
    if std::process::id() == 1 {
        // SAFETY: kill takes no pointer. -1 is every process but this one, in this pid namespace.
        unsafe {
            libc::kill(-1, signal);
        }
    } else {
        signal_all(signal);
    }
}
