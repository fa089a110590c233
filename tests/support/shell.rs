//! The shells that every promise is kept under.

use std::process::Command;

/// A shell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shell {
    /// GNU bash.
    Bash,
    /// Debian's /bin/sh.
    Dash,
    /// `busybox sh`, with busybox's own echo, cat and printf.
    Busybox,
}

/// Whether a program is on the tests' PATH.
pub fn have(program: &str) -> bool {
    ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"]
        .iter()
        .any(|dir| std::path::Path::new(dir).join(program).exists())
}

/// The shells that are here; what is missing is noted as a skipped part.
pub fn shells() -> Vec<Shell> {
    [Shell::Bash, Shell::Dash, Shell::Busybox]
        .into_iter()
        .filter(|shell| {
            let there = have(shell.program());
            if !there {
                crate::skip_part!("{} is not installed", shell.program());
            }
            there
        })
        .collect()
}

impl Shell {
    /// The program's name.
    pub fn program(self) -> &'static str {
        match self {
            Shell::Bash => "bash",
            Shell::Dash => "dash",
            Shell::Busybox => "busybox",
        }
    }

    /// The command that runs a script, with `-e` and `-u`.
    pub fn command(self, script: &str) -> Command {
        let mut command = Command::new(self.program());
        if self == Shell::Busybox {
            command.arg("sh");
        }
        command.args(["-euc", script]);
        command
    }
}
