//! The `machinefs` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    machinefs::cli::main()
}
