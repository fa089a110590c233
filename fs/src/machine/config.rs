//! A machine's configuration: one table of keys, their types, and the values that were set.

use super::error::MachineError;
use std::collections::BTreeMap;
use std::time::Duration;

/// What a value may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Any text of one line.
    Text,
    /// Bytes, with the suffixes K M G T (powers of 1024), or `max`.
    Size,
    /// A time, with the suffixes s m h d (seconds without), or `none`.
    Time,
    /// A whole number, or `max`.
    Count,
    /// Processors, may be a fraction; or `max`.
    Cpus,
    /// `yes` or `no`.
    Flag,
    /// One of these words.
    Word(&'static [&'static str]),
    /// A host name.
    Hostname,
    /// An absolute path in the guest, or `default`.
    Path,
}

/// When a change takes effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Applies {
    /// At once.
    Now,
    /// At the next start; until then `info` shows it as pending.
    NextStart,
    /// Never: it can only be given when the machine is made.
    AtCreation,
}

/// A key of `config/`.
#[derive(Debug)]
pub struct ConfigKey {
    /// Its file's name.
    pub name: &'static str,
    /// One line for the README.
    pub doc: &'static str,
    /// What values it takes.
    pub kind: Kind,
    /// Its value when nobody set one.
    pub default: &'static str,
    /// When a change takes effect.
    pub applies: Applies,
}

macro_rules! keys {
    ($($name:literal $kind:expr, $default:literal, $applies:ident, $doc:literal;)*) => {
        /// All keys, in the order of the listing.
        pub static KEYS: &[ConfigKey] = &[$(ConfigKey {
            name: $name, doc: $doc, kind: $kind, default: $default, applies: Applies::$applies,
        }),*];
    };
}

keys! {
    "autostart" Kind::Flag, "yes", AtCreation, "start it when it is made";
    "backend" Kind::Word(&["default", "container"]), "default", AtCreation, "what boots it";
    "boot_timeout" Kind::Time, "60s", Now, "a boot that takes longer has failed";
    "boot_wait" Kind::Time, "5s", Now, "how long files/ waits for a boot";
    "cpus" Kind::Cpus, "max", NextStart, "processors, may be a fraction";
    "exec_timeout" Kind::Time, "none", Now, "jobs that run longer are killed (exit 124)";
    "hostname" Kind::Hostname, "default", NextStart, "its own name for itself; default: the directory's";
    "idmap" Kind::Word(&["owner", "none"]), "owner", NextStart, "owner: you and the guest's user are the same in files/; none: numbers as they are";
    "image" Kind::Text, "host", AtCreation, "host, or the path of a root directory or of a tar of one";
    "isolation" Kind::Word(&["any", "vm"]), "any", AtCreation, "vm: refuse less than a virtual machine";
    "memory" Kind::Size, "max", NextStart, "memory limit";
    "network" Kind::Word(&["none"]), "none", NextStart, "none: loopback only";
    "output_limit" Kind::Size, "64M", Now, "output kept of one job; past it the first and the last half stay";
    "pids" Kind::Count, "4096", NextStart, "processes at once";
    "protect" Kind::Flag, "no", Now, "yes: refuse every way of destroying it";
    "shell" Kind::Path, "default", Now, "what runs the texts of exec; default: bash where there is one, else sh";
    "user" Kind::Text, "root", Now, "the guest's user that jobs run as";
    "workdir" Kind::Path, "/root", Now, "where jobs start, and where work points";
}

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

fn decimal(digits: &str) -> Option<u64> {
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    digits.parse().ok()
}

fn parse_cpus(text: &str) -> Option<Option<f64>> {
    if matches!(text, "max" | "none") {
        return Some(None);
    }
    if !text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.') {
        return None;
    }
    text.parse().ok().filter(|cpus: &f64| (0.01..=4096.0).contains(cpus)).map(Some)
}

/// Whether it can be a host name (RFC 1123): letters, digits, `-` and `.`, 1 to 64 bytes.
fn valid_hostname(text: &str) -> bool {
    let label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    text.len() <= 64 && text.split('.').all(label)
}

impl ConfigKey {
    /// Checks a value.
    ///
    /// # Errors
    /// EINVAL, saying what the key takes.
    pub fn check(&self, value: &str) -> Result<(), MachineError> {
        let wrong = |takes: String| {
            Err(MachineError::invalid(format!("{}: bad value \"{}\": it takes {takes}", self.name, shorten(value))))
        };
        if value.len() > 4096 || value.chars().any(char::is_control) {
            return wrong("one line of at most 4096 bytes, without control characters".into());
        }
        if value == "default" || value == self.default {
            return Ok(());
        }
        let ok = match self.kind {
            Kind::Text => !value.is_empty(),
            Kind::Size => parse_size(value).is_some_and(|size| size != Some(0)),
            Kind::Time => parse_time(value).is_some(),
            Kind::Count => value == "max" || decimal(value).is_some_and(|count| count > 0),
            Kind::Cpus => parse_cpus(value).is_some(),
            Kind::Flag => matches!(value, "yes" | "no"),
            Kind::Word(words) => words.contains(&value),
            Kind::Hostname => valid_hostname(value),
            Kind::Path => value.starts_with('/'),
        };
        if ok {
            return Ok(());
        }
        wrong(match self.kind {
            Kind::Text => "a text".into(),
            Kind::Size => "a size as 512M or 2G, or max".into(),
            Kind::Time => "a time as 30s, 5m, 2h or 1d, or none".into(),
            Kind::Count => "a number above 0, or max".into(),
            Kind::Cpus => "a number of processors as 2 or 0.5, or max".into(),
            Kind::Flag => "yes or no".into(),
            Kind::Word(words) => format!("one of: {}", words.join(", ")),
            Kind::Hostname => "a host name of letters, digits, - and .".into(),
            Kind::Path => "an absolute path, or default".into(),
        })
    }
}

fn shorten(value: &str) -> String {
    let short: String = value.chars().take(80).flat_map(char::escape_default).collect();
    if value.chars().count() > 80 { short + "…" } else { short }
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

    /// A text key, `None` where it is `default`.
    pub fn given(&self, name: &'static str) -> Option<&str> {
        Some(self.text(name)).filter(|value| *value != "default")
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
        config.set("cpus", "0.5").unwrap();
        assert_eq!(config.cpus(), Some(0.5));
        config.set("cpus", "default").unwrap();
        assert_eq!(config.cpus(), None);
    }
}
