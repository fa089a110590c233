//! See the library.

fn main() -> std::process::ExitCode {
    machinefs_agent::main()
}
