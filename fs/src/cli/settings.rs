//! The daemon's own configuration: flag, then variable, then file.

use clap::Args;
use serde::Deserialize;
use std::path::{Path, PathBuf};

/// The file that is read unless another is named; it need not exist.
const DEFAULT_FILE: &str = "/etc/machinefs.toml";

/// Every key is a flag, a variable and a key of the file.
#[derive(Args, Deserialize, Debug, Default, Clone)]
#[serde(deny_unknown_fields, default)]
pub struct DaemonArgs {
    /// Where machines and the database are kept (/var/lib/machinefs, or ~/.local/state/machinefs).
    #[arg(long, value_name = "DIR", env = "MACHINEFS_STATE_DIR")]
    pub state_dir: Option<PathBuf>,
    /// The daemon's configuration file [default: /etc/machinefs.toml].
    #[arg(long, value_name = "FILE", env = "MACHINEFS_CONFIG")]
    #[serde(skip)]
    pub config: Option<PathBuf>,
    /// The OCI runtime that boots containers [default: crun].
    #[arg(long, value_name = "PROGRAM", env = "MACHINEFS_RUNTIME")]
    pub runtime: Option<PathBuf>,
    /// The agent's binary [default: machinefs-agent beside this program].
    #[arg(long, value_name = "FILE", env = "MACHINEFS_AGENT")]
    pub agent: Option<PathBuf>,
    /// Machines there may be at once [default: 1000].
    #[arg(long, value_name = "NUMBER", env = "MACHINEFS_MAX_MACHINES")]
    pub max_machines: Option<usize>,
    /// Programs in files/ cannot be run on the host.
    #[arg(long, env = "MACHINEFS_NOEXEC", num_args = 0..=1, default_missing_value = "true", value_name = "true|false")]
    pub noexec: Option<bool>,
    /// What to log: error, warn, info, debug, trace, or a filter as of tracing-subscriber's EnvFilter [default: info].
    #[arg(long, value_name = "FILTER", env = "MACHINEFS_LOG")]
    pub log: Option<String>,
}

/// The settings in force.
#[derive(Debug)]
pub struct Settings {
    /// Absolute.
    pub state_dir: PathBuf,
    /// A program's name or path.
    pub runtime: PathBuf,
    /// Absolute.
    pub agent: PathBuf,
    /// Machines there may be at once.
    pub max_machines: usize,
    /// Mount with `noexec`.
    pub noexec: bool,
    /// For tracing.
    pub log: String,
}

impl DaemonArgs {
    /// Fills what was not given from the file, and the rest from the defaults.
    ///
    /// # Errors
    /// The file is missing though named, or has a key or value that is not known (the message names the line).
    pub fn resolve(self) -> Result<Settings, String> {
        let file = match &self.config {
            Some(path) => read(path)?.ok_or_else(|| format!("{}: no such file", path.display()))?,
            None => read(Path::new(DEFAULT_FILE))?.unwrap_or_default(),
        };
        let state_dir = self.state_dir.or(file.state_dir).map_or_else(default_state_dir, Ok)?;
        let agent = self.agent.or(file.agent).map_or_else(default_agent, Ok)?;
        Ok(Settings {
            state_dir: absolute(&state_dir)?,
            runtime: self.runtime.or(file.runtime).unwrap_or_else(|| "crun".into()),
            agent: absolute(&agent)?,
            max_machines: self
                .max_machines
                .or(file.max_machines)
                .unwrap_or(crate::machine::registry::DEFAULT_MAX_MACHINES),
            noexec: self.noexec.or(file.noexec).unwrap_or(false),
            log: self.log.or(file.log).unwrap_or_else(|| "info".into()),
        })
    }
}

fn absolute(path: &Path) -> Result<PathBuf, String> {
    std::path::absolute(path).map_err(|error| format!("{}: {error}", path.display()))
}

fn read(path: &Path) -> Result<Option<DaemonArgs>, String> {
    match std::fs::read_to_string(path) {
        Ok(text) => toml::from_str(&text).map(Some).map_err(|error| format!("{}: {error}", path.display())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(format!("{}: {error}", path.display())),
    }
}

fn default_state_dir() -> Result<PathBuf, String> {
    if rustix::process::geteuid().is_root() {
        return Ok("/var/lib/machinefs".into());
    }
    let base = std::env::var_os("XDG_STATE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let base = base.or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".local/state")));
    base.map(|base| base.join("machinefs")).ok_or_else(|| "no HOME: give --state-dir".into())
}

fn default_agent() -> Result<PathBuf, String> {
    let program = std::env::current_exe().map_err(|error| format!("cannot find this program: {error}"))?;
    Ok(program.with_file_name("machinefs-agent"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_key_is_an_error_that_names_the_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("machinefs.toml");
        std::fs::write(&path, "max_machines = 5\nmax_machine = 6\n").unwrap();
        let error = DaemonArgs { config: Some(path), ..DaemonArgs::default() }.resolve().unwrap_err();
        assert!(error.contains("line 2") && error.contains("max_machine"), "{error}");
    }

    #[test]
    fn a_flag_goes_before_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("machinefs.toml");
        std::fs::write(&path, "max_machines = 5\nruntime = \"runc\"\n").unwrap();
        let args = DaemonArgs { config: Some(path), max_machines: Some(7), ..DaemonArgs::default() };
        let settings = args.resolve().unwrap();
        assert_eq!((settings.max_machines, settings.runtime), (7, "runc".into()));
    }
}
