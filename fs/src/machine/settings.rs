//! A machine's configuration, and what the backend and its jobs are told of it.

use super::config::{self, Config};
use super::error::MachineError;
use super::limits::Share;
use super::vars::OpenSecret;
use super::{Machine, store};
use machinefs_backends::MachineSpec;
use machinefs_protocol::job::JobSpec;
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
        let (slot, written) = (self.slot, changed.clone());
        self.shared
            .store
            .write(move |db| written.iter().try_for_each(|(name, value)| store::set_config(db, slot, name, value)));
        let details: Vec<(&str, &str)> = changed.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        self.say("config", &details);
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
        MachineSpec {
            id: self.id.clone(),
            dir: self.dir.join("backend"),
            image: config.get("image").unwrap_or("host").to_string(),
            cpus: config.cpus(),
            memory: config.size("memory"),
            pids: config.count("pids"),
            hostname: self.hostname(),
            uid_slot: self.uid_slot,
        }
    }

    /// What every job gets as its environment: `NAME=value`. To be wiped after use.
    ///
    /// # Errors
    /// EIO when a secret cannot be opened.
    pub fn job_environment(&self) -> Result<Vec<Vec<u8>>, MachineError> {
        self.vars.environment()
    }

    /// The machine's secrets, opened, for the agent's own services.
    ///
    /// # Errors
    /// EIO when one cannot be opened.
    pub fn secrets(&self) -> Result<Vec<OpenSecret>, MachineError> {
        self.vars.secrets()
    }

    /// Whether a text may be given to exec: with `allow_commands` set, it is one line that begins with a name in the
    /// list. What may still go on in another write is looked at when it is complete.
    ///
    /// # Errors
    /// EPERM with the name, EINVAL.
    pub fn check_command(&self, text: &[u8]) -> Result<(), MachineError> {
        self.config.lock().0.allowed().split(text).map(drop)
    }

    /// How a text is run, and what the agent is given as its body. Here, and nowhere else, a job gets its program: what
    /// `allow_commands` has now is what counts.
    ///
    /// # Errors
    /// EPERM and EINVAL as [`Machine::check_command`]; EIO when a secret cannot be opened.
    pub(super) fn job_spec(&self, text: Vec<u8>) -> Result<(JobSpec, Vec<u8>), MachineError> {
        let config = self.config.lock().0.clone();
        let argv = config.allowed().split(&text)?;
        let body = if argv.is_some() { Vec::new() } else { text };
        let text = |name| config.given(name).map(|value| value.as_bytes().to_vec()).unwrap_or_default();
        // The working directory's default is the home of whoever the job runs as.
        let moved = config.overrides().any(|(name, _)| name == "workdir");
        let timeout = config.time("exec_timeout");
        let spec = JobSpec {
            argv: argv.unwrap_or_default(),
            shell: text("shell"),
            cwd: if moved { text("workdir") } else { Vec::new() },
            user: text("user"),
            env: self.job_environment()?,
            timeout_secs: timeout.map_or(0, |time| time.as_secs().clamp(1, u64::from(u32::MAX)) as u32),
            output_limit: config.size("output_limit").unwrap_or(LARGEST_OUTPUT),
            ..JobSpec::default()
        };
        Ok((spec, body))
    }

    /// Bytes of output kept of one job.
    pub(super) fn output_limit(&self) -> u64 {
        self.config.lock().0.size("output_limit").unwrap_or(LARGEST_OUTPUT)
    }
}
