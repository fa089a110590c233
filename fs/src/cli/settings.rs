//! The daemon's own configuration: flag, then variable, then file.

use crate::machine::config;
use crate::machine::limits::Limits;
use clap::Args;
use serde::Deserialize;
use std::net::{IpAddr, Ipv4Addr};
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
    /// Where the name servers stand that machines with a network ask [default: /etc/resolv.conf].
    #[arg(long, value_name = "FILE", env = "MACHINEFS_RESOLV_CONF")]
    pub resolv_conf: Option<PathBuf>,
    /// Machines there may be at once [default: 1000].
    #[arg(long, value_name = "NUMBER", env = "MACHINEFS_MAX_MACHINES")]
    pub max_machines: Option<usize>,
    /// Machines that one user may have [default: no limit].
    #[arg(long, value_name = "NUMBER", env = "MACHINEFS_MAX_USER_MACHINES")]
    pub max_user_machines: Option<usize>,
    /// Memory of all machines together, as their `memory` says: 64G, or max [default: max].
    #[arg(long, value_name = "SIZE", env = "MACHINEFS_MAX_MEMORY")]
    pub max_memory: Option<String>,
    /// Memory of one user's machines together [default: max].
    #[arg(long, value_name = "SIZE", env = "MACHINEFS_MAX_USER_MEMORY")]
    pub max_user_memory: Option<String>,
    /// Configuration that machines begin with, before any template: memory=2G. Can be given more than once.
    #[arg(long, value_name = "KEY=VALUE", env = "MACHINEFS_DEFAULT", value_delimiter = ',')]
    pub default: Option<Vec<String>>,
    /// The key that secrets are sealed with: 32 bytes, mode 0600, outside the state directory; made when it is not there
    /// [default: machinefs.key of systemd's credentials, else /etc/machinefs/key, or ~/.config/machinefs/key].
    #[arg(long, value_name = "FILE", env = "MACHINEFS_KEY_FILE")]
    pub key_file: Option<PathBuf>,
    /// Where ports of machines listen on this host: an address; 0.0.0.0 for all [default: 127.0.0.1].
    #[arg(long, value_name = "ADDRESS", env = "MACHINEFS_PORTS_ADDRESS")]
    pub ports_address: Option<IpAddr>,
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
    /// Absolute.
    pub resolv_conf: PathBuf,
    /// How much there may be.
    pub limits: Limits,
    /// Configuration that machines begin with.
    pub defaults: Vec<(String, String)>,
    /// Absolute, and not below the state directory.
    pub key_file: PathBuf,
    /// Where ports of machines listen.
    pub ports_address: IpAddr,
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
        let key_file = absolute(&self.key_file.or(file.key_file).map_or_else(default_key_file, Ok)?)?;
        let state_dir = absolute(&state_dir)?;
        if key_file.starts_with(&state_dir) {
            return Err(format!("key_file: {} is in the state directory: a key is kept apart", key_file.display()));
        }
        let machines = self.max_machines.or(file.max_machines);
        Ok(Settings {
            state_dir,
            runtime: self.runtime.or(file.runtime).unwrap_or_else(|| "crun".into()),
            agent: absolute(&agent)?,
            resolv_conf: absolute(&self.resolv_conf.or(file.resolv_conf).unwrap_or_else(|| "/etc/resolv.conf".into()))?,
            limits: Limits {
                machines: Some(machines.unwrap_or(crate::machine::registry::DEFAULT_MAX_MACHINES)),
                user_machines: self.max_user_machines.or(file.max_user_machines),
                memory: size("max_memory", self.max_memory.or(file.max_memory))?,
                user_memory: size("max_user_memory", self.max_user_memory.or(file.max_user_memory))?,
            },
            defaults: pairs(self.default.or(file.default).unwrap_or_default())?,
            key_file,
            ports_address: self.ports_address.or(file.ports_address).unwrap_or(Ipv4Addr::LOCALHOST.into()),
            noexec: self.noexec.or(file.noexec).unwrap_or(false),
            log: self.log.or(file.log).unwrap_or_else(|| "info".into()),
        })
    }
}

fn size(name: &str, text: Option<String>) -> Result<Option<u64>, String> {
    let Some(text) = text else { return Ok(None) };
    config::parse_size(&text).ok_or_else(|| format!("{name}: bad size \"{text}\": as 64G, or max"))
}

fn pairs(texts: Vec<String>) -> Result<Vec<(String, String)>, String> {
    let split = |text: String| {
        let (key, value) = text.split_once('=').ok_or_else(|| format!("default: \"{text}\" is not KEY=VALUE"))?;
        let known = config::known(key).and_then(|known| known.check(value));
        known.map_err(|error| format!("default: {error}"))?;
        Ok((key.to_string(), value.to_string()))
    };
    texts.into_iter().map(split).collect()
}

fn default_key_file() -> Result<PathBuf, String> {
    // systemd.exec(5): LoadCredentialEncrypted=machinefs.key
    let credential = std::env::var_os("CREDENTIALS_DIRECTORY").map(|dir| Path::new(&dir).join("machinefs.key"));
    if let Some(path) = credential.filter(|path| path.exists()) {
        return Ok(path);
    }
    if rustix::process::geteuid().is_root() {
        return Ok("/etc/machinefs/key".into());
    }
    let base = std::env::var_os("XDG_CONFIG_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let base = base.or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".config")));
    base.map(|base| base.join("machinefs/key")).ok_or_else(|| "no HOME: give --key-file".into())
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
        assert_eq!((settings.limits.machines, settings.runtime), (Some(7), "runc".into()));
        assert_eq!(settings.ports_address, IpAddr::from(Ipv4Addr::LOCALHOST));
    }

    #[test]
    fn a_key_is_not_kept_with_what_it_opens() {
        let args = DaemonArgs {
            state_dir: Some("/state".into()),
            key_file: Some("/state/key".into()),
            ..DaemonArgs::default()
        };
        assert!(args.clone().resolve().unwrap_err().contains("kept apart"));
        let args = DaemonArgs { key_file: Some("/elsewhere/key".into()), ..args };
        assert_eq!(args.resolve().unwrap().key_file, Path::new("/elsewhere/key"));
    }

    #[test]
    fn limits_and_defaults_are_checked() {
        let with = |memory: &str, default: &str| {
            let (max_memory, default) = (Some(memory.to_string()), Some(vec![default.to_string()]));
            DaemonArgs { max_memory, default, ..DaemonArgs::default() }.resolve()
        };
        let settings = with("2G", "memory=1G").unwrap();
        assert_eq!(settings.limits.memory, Some(2 << 30));
        assert_eq!(settings.defaults, [("memory".to_string(), "1G".to_string())]);
        assert!(with("much", "memory=1G").unwrap_err().contains("max_memory"));
        assert!(with("2G", "memory=much").unwrap_err().contains("much"));
        assert!(with("2G", "memroy=1G").unwrap_err().contains("memroy"));
    }
}
