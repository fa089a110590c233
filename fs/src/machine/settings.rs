//! A machine's configuration, and what the backend and its jobs are told of it.

use super::Machine;
use super::command::{self, Allowed};
use super::config::{self, Config};
use super::error::MachineError;
use super::limits::Share;
use machinefs_backends::{MachineSpec, Network, Owner};
use machinefs_protocol::job::JobSpec;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

/// Output kept of a job where `output_limit` says `max`.
const LARGEST_OUTPUT: u64 = 1 << 40;

/// Longest host name that Linux takes.
const HOSTNAME: usize = 64;

impl Machine {
    /// The value of a key in force, as text.
    pub fn config_get(&self, key: &str) -> Option<String> {
        self.config.lock().0.get(key).map(str::to_string)
    }

    /// When the configuration was last changed.
    pub fn config_changed(&self) -> SystemTime {
        self.config.lock().1
    }

    /// Checks values without setting them.
    ///
    /// # Errors
    /// EINVAL for an unknown key or a bad value; EBUSY for a key that can only be given at creation; EOPNOTSUPP for what
    /// the backend cannot do; ENOSPC and EDQUOT for more memory than there may be.
    pub fn config_check(&self, name: &str, value: &str) -> Result<(), MachineError> {
        self.trial(&[(name.to_string(), value.to_string())]).map(drop)
    }

    fn trial(&self, pairs: &[(String, String)]) -> Result<Config, MachineError> {
        let now = self.config.lock().0.clone();
        let mut trial = now.clone();
        for (name, value) in pairs {
            let key = config::known(name)?;
            if now.get(name) == Some(value.as_str()) {
                continue;
            }
            if key.applies == config::Applies::AtCreation {
                return Err(MachineError::busy(format!(
                    "{name} can only be given when a machine is made: echo 'create NAME {name}=VALUE' > ../ctl"
                )));
            }
            trial.set(name, value)?;
            key.check_backend(self.backend().name(), value)?;
        }
        if trial.size("memory") != now.size("memory") {
            let share = Share { uid: self.owner.0, memory: trial.size("memory") };
            self.shared.check_limits(self, share)?;
        }
        Ok(trial)
    }

    /// Sets a key. One that waits for the next start is accepted, and pending in `info`.
    ///
    /// # Errors
    /// As [`Machine::config_check`].
    pub fn config_set(self: &Arc<Self>, name: &str, value: &str) -> Result<(), MachineError> {
        self.config_set_all(&[(name.to_string(), value.to_string())])
    }

    /// Sets keys, all of them or none.
    ///
    /// # Errors
    /// As [`Machine::config_check`].
    pub fn config_set_all(self: &Arc<Self>, pairs: &[(String, String)]) -> Result<(), MachineError> {
        let changed: Vec<(String, String)> = {
            // Two at once could each find room for themselves, or undo the other's keys.
            let _one = self.shared.changing.lock();
            let trial = self.trial(pairs)?;
            let mut config = self.config.lock();
            let changed: Vec<_> =
                pairs.iter().filter(|(name, value)| config.0.get(name) != Some(value.as_str())).cloned().collect();
            if changed.is_empty() {
                return Ok(());
            }
            *config = (trial, SystemTime::now());
            changed
        };
        for (name, value) in &changed {
            self.shared.store.set_config(self.slot, name, value);
        }
        // Not the values: the log of all machines is open to everybody.
        let keys: Vec<&str> = changed.iter().map(|(name, _)| name.as_str()).collect();
        self.say("config", &[("key", &keys.join(","))]);
        // A time that begins now does not count what was before.
        if changed.iter().any(|(name, _)| name == "idle_timeout") {
            self.used();
        }
        Ok(())
    }

    /// Where jobs start: an absolute path in the guest.
    pub fn workdir(&self) -> Vec<u8> {
        self.config_get("workdir").unwrap_or_default().into_bytes()
    }

    fn hostname(&self) -> String {
        if let Some(name) = self.config.lock().0.given("hostname") {
            return name.to_string();
        }
        let name = self.name();
        match name.split_once('.') {
            Some((_, rest)) if name.len() > HOSTNAME => rest.to_string(),
            _ => name,
        }
    }

    /// What the backend needs to know.
    pub(super) fn spec(&self) -> MachineSpec {
        let config = self.config.lock().0.clone();
        let spec = MachineSpec {
            id: self.id.clone(),
            dir: self.dir.join("backend"),
            image: config.get("image").unwrap_or("host").to_string(),
            cpus: config.cpus(),
            memory: config.size("memory"),
            pids: config.count("pids"),
            hostname: self.hostname(),
            uid_slot: self.uid_slot,
            network: Network::None,
            disk: config.size("disk"),
            owner: self.owner_in(&config),
            mounts: self.mount_specs(),
            from: None,
            resume: false,
            kernel: config.given("kernel").map(PathBuf::from),
            kernel_args: config.given("kernel_args").map(str::to_string),
        };
        let network = match config.get("network") {
            Some("outgoing") => Network::Outgoing,
            Some("default") if self.backend().capabilities(&spec).outgoing => Network::Outgoing,
            _ => Network::None,
        };
        MachineSpec { network, ..spec }
    }

    /// Who it belongs to on the host, and who acts as that user in it.
    fn owner_in(&self, config: &Config) -> Owner {
        let (uid, gid) = self.owner;
        let number = |part: Option<&str>| part.and_then(|part| part.parse().ok());
        let mut parts = config.get("user").unwrap_or_default().split(':');
        // A name means something in the guest only; until that is asked, its root acts for the owner.
        let guest_uid = number(parts.next()).unwrap_or(0);
        let guest_gid = number(parts.next()).unwrap_or(guest_uid);
        Owner { uid, gid, guest_uid, guest_gid }
    }

    /// Whether a text may be so long, in bytes.
    ///
    /// # Errors
    /// E2BIG with `allow_commands` set.
    pub fn check_command_length(&self, len: u64) -> Result<(), MachineError> {
        if self.allowed() == Allowed::All { Ok(()) } else { command::check_length(len) }
    }

    /// Whether a text may be given to exec: with `allow_commands` set, it is one line that begins with a name in the
    /// list. What may still go on in another write is looked at when it is complete.
    ///
    /// # Errors
    /// EPERM with the name, EINVAL.
    pub fn check_command(&self, text: &[u8]) -> Result<(), MachineError> {
        self.allowed().split(text).map(drop)
    }

    /// What exec and jobs may run.
    pub(super) fn allowed(&self) -> Allowed {
        self.config.lock().0.allowed()
    }

    /// How a job is run: this program, or, without one, a script.
    ///
    /// # Errors
    /// EIO when the machine has secrets that its agent could not be given.
    pub(super) fn job_spec(&self, argv: Vec<Vec<u8>>) -> Result<JobSpec, MachineError> {
        self.check_secrets()?;
        let config = self.config.lock().0.clone();
        let text = |name| config.given(name).map(|value| value.as_bytes().to_vec()).unwrap_or_default();
        // The working directory's default is the home of whoever the job runs as.
        let moved = config.overrides().any(|(name, _)| name == "workdir");
        let timeout = config.time("exec_timeout");
        Ok(JobSpec {
            argv,
            shell: text("shell"),
            cwd: if moved { text("workdir") } else { Vec::new() },
            user: text("user"),
            env: self.vars.environment(),
            timeout_ms: timeout.map_or(0, |time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX).max(1)),
            output_limit: config.size("output_limit").unwrap_or(LARGEST_OUTPUT),
            ..JobSpec::default()
        })
    }

    /// Bytes of output kept of one job.
    pub(super) fn output_limit(&self) -> u64 {
        self.config.lock().0.size("output_limit").unwrap_or(LARGEST_OUTPUT)
    }
}
