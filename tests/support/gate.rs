//! A gate before every boot: an OCI runtime that waits, so that a machine is surely still booting while a test looks.

use crate::daemon::Daemon;
use crate::user::User;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Starts a daemon whose machines boot through a gate; it is open.
pub fn gated(user: User) -> Daemon {
    let daemon = Daemon::start_with(user, |base| {
        let runtime = base.join("runtime");
        write_runtime(&runtime, base).unwrap_or_else(|error| panic!("{}: {error}", runtime.display()));
        vec!["--runtime".into(), runtime.to_string_lossy().into_owned()]
    });
    open(&daemon);
    daemon
}

fn write_runtime(path: &Path, base: &Path) -> std::io::Result<()> {
    let hold = base.join("hold");
    let script = format!(
        "#!/bin/sh\nfor word; do\n  case $word in\n    run|create|start)\n      \
         while [ -e '{}' ]; do sleep 0.02; done\n      break;;\n    kill|delete|state|pause|resume|update|list) break;;\n  \
         esac\ndone\nexec crun \"$@\"\n",
        hold.display()
    );
    std::fs::write(path, script)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755))
}

/// Closes the gate: machines stay in `booting`.
pub fn close(daemon: &Daemon) {
    std::fs::write(daemon.base.join("hold"), "").unwrap_or_else(|error| panic!("the gate: {error}"));
}

/// Opens the gate.
pub fn open(daemon: &Daemon) {
    let _ = std::fs::remove_file(daemon.base.join("hold"));
}
