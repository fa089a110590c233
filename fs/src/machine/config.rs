//! A machine's configuration: the values that were set, and what they mean.

use super::command::Allowed;
use super::error::MachineError;
use super::keys::shorten;
pub use super::keys::{Applies, ConfigKey, KEYS, Kind};
use std::collections::BTreeMap;
use std::time::Duration;

/// The key of that name.
pub fn key(name: &str) -> Option<&'static ConfigKey> {
    KEYS.iter().find(|key| key.name == name)
}

/// Bytes of a size: digits and one of K M G T; `max` and `none` are no limit.
pub fn parse_size(text: &str) -> Option<Option<u64>> {
    if matches!(text, "max" | "none") {
        return Some(None);
    }
    let (digits, shift) = match text.as_bytes().last()? {
        b'K' | b'k' => (&text[..text.len() - 1], 10),
        b'M' | b'm' => (&text[..text.len() - 1], 20),
        b'G' | b'g' => (&text[..text.len() - 1], 30),
        b'T' | b't' => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    let number: u64 = decimal(digits)?;
    number.checked_mul(1 << shift).map(Some)
}

/// A time: digits and one of s m h d; `none` and `max` are no limit.
pub fn parse_time(text: &str) -> Option<Option<Duration>> {
    if matches!(text, "max" | "none") {
        return Some(None);
    }
    let (digits, unit) = match text.as_bytes().last()? {
        b's' => (&text[..text.len() - 1], 1),
        b'm' => (&text[..text.len() - 1], 60),
        b'h' => (&text[..text.len() - 1], 3600),
        b'd' => (&text[..text.len() - 1], 86400),
        _ => (text, 1),
    };
    // A century is as good as for ever, and leaves room for sums.
    decimal(digits)?.checked_mul(unit).filter(|secs| *secs <= 3_200_000_000).map(|secs| Some(Duration::from_secs(secs)))
}

pub(super) fn decimal(digits: &str) -> Option<u64> {
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    digits.parse().ok()
}

pub(super) fn parse_cpus(text: &str) -> Option<Option<f64>> {
    if matches!(text, "max" | "none") {
        return Some(None);
    }
    if !text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.') {
        return None;
    }
    text.parse().ok().filter(|cpus: &f64| (0.01..=4096.0).contains(cpus)).map(Some)
}

/// The values that were set for one machine; everything else is the key's default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Config {
    set: BTreeMap<&'static str, String>,
}

impl Config {
    /// Sets a key; `default` takes the setting back.
    ///
    /// # Errors
    /// EINVAL for an unknown key (the message names the keys) and for a bad value.
    pub fn set(&mut self, name: &str, value: &str) -> Result<&'static ConfigKey, MachineError> {
        let key = known(name)?;
        key.check(value)?;
        if value == "default" || value == key.default {
            self.set.remove(key.name);
        } else {
            self.set.insert(key.name, value.to_string());
        }
        Ok(key)
    }

    /// The value in force, as text.
    pub fn get(&self, name: &str) -> Option<&str> {
        let key = key(name)?;
        Some(self.set.get(key.name).map_or(key.default, String::as_str))
    }

    /// What was set, by key.
    pub fn overrides(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.set.iter().map(|(name, value)| (*name, value.as_str()))
    }

    fn text(&self, name: &'static str) -> &str {
        self.get(name).unwrap_or_default()
    }

    /// A size key in bytes; `None` is no limit.
    pub fn size(&self, name: &'static str) -> Option<u64> {
        parse_size(self.text(name)).flatten()
    }

    /// A time key; `None` is no limit.
    pub fn time(&self, name: &'static str) -> Option<Duration> {
        parse_time(self.text(name)).flatten()
    }

    /// A number key; `None` is no limit.
    pub fn count(&self, name: &'static str) -> Option<u64> {
        decimal(self.text(name))
    }

    /// Processors; `None` is no limit.
    pub fn cpus(&self) -> Option<f64> {
        parse_cpus(self.text("cpus")).flatten()
    }

    /// A yes-or-no key.
    pub fn flag(&self, name: &'static str) -> bool {
        self.text(name) == "yes"
    }

    /// A text key, `None` where it is `default` or `none`.
    pub fn given(&self, name: &'static str) -> Option<&str> {
        Some(self.text(name)).filter(|value| !matches!(*value, "default" | "none"))
    }

    /// What exec and jobs may run.
    pub fn allowed(&self) -> Allowed {
        // Checked when it was set; were it not, nothing would be allowed.
        Allowed::parse(self.text("allow_commands")).unwrap_or(Allowed::Names(Vec::new()))
    }
}

/// The key of that name, or the error that lists the keys there are.
pub fn known(name: &str) -> Result<&'static ConfigKey, MachineError> {
    key(name).ok_or_else(|| {
        let names: Vec<&str> = KEYS.iter().map(|key| key.name).collect();
        MachineError::invalid(format!("unknown key \"{}\": the keys are {}", shorten(name), names.join(" ")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_default_is_a_valid_value_and_every_key_is_documented() {
        for key in KEYS {
            key.check(key.default).unwrap();
            assert!(!key.doc.is_empty());
        }
        assert!(KEYS.is_sorted_by_key(|key| key.name));
    }

    #[test]
    fn the_keys_are_those_of_the_design() {
        let design = "backend image cpus memory disk address kernel kernel_args isolation region size network egress repo \
                      workdir user shell command hostname autostart boot_timeout boot_wait exec_timeout idle_timeout on_idle \
                      lifetime restart allow_commands idmap output_limit protect";
        for name in design.split_whitespace() {
            assert!(key(name).is_some(), "{name}");
        }
    }

    #[test]
    fn what_a_backend_cannot_do_is_refused_by_name() {
        let key = key("kernel").unwrap();
        key.check_backend("container", "default").unwrap();
        let error = key.check_backend("container", "/vmlinuz").unwrap_err();
        assert!(error.to_string().contains("qemu") && error.errno() == crate::errno::Errno::EOPNOTSUPP, "{error}");
        key.check_backend("qemu", "/vmlinuz").unwrap();
    }

    #[test]
    fn units_are_what_they_say() {
        assert_eq!(parse_size("2G"), Some(Some(2 << 30)));
        assert_eq!(parse_size("max"), Some(None));
        assert_eq!(parse_size("-1"), None);
        assert_eq!(parse_size("99999999999T"), None);
        assert_eq!(parse_time("30"), Some(Some(Duration::from_secs(30))));
        assert_eq!(parse_time("2m"), Some(Some(Duration::from_secs(120))));
        assert_eq!(parse_time("1.5h"), None);
        assert_eq!(parse_time("30ms"), None);
    }

    #[test]
    fn bad_values_and_unknown_keys_say_what_would_be_right() {
        let mut config = Config::default();
        let error = config.set("memory", "lots").unwrap_err();
        assert!(error.to_string().contains("512M"), "{error}");
        let error = config.set("memroy", "1G").unwrap_err();
        assert!(error.to_string().contains(" memory "), "{error}");
        assert!(config.set("cpus", "0").is_err());
        assert!(config.set("cpus", "NaN").is_err());
        assert!(config.set("hostname", "-x").is_err());
        assert!(config.set("shell", "sh\nrm").is_err());
        assert!(config.set("idle_timeout", "0").is_err());
        assert!(config.set("allow_commands", "ls;rm").is_err());
        config.set("cpus", "0.5").unwrap();
        assert_eq!(config.cpus(), Some(0.5));
        config.set("cpus", "default").unwrap();
        assert_eq!(config.cpus(), None);
    }
}
