//! The table of configuration keys: their types, units, defaults, and which backends can do what they ask for.

use super::command::Allowed;
use super::config::{decimal, parse_cpus, parse_size, parse_time};
use super::error::MachineError;

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
    /// A time above zero, or `none`.
    Span,
    /// Names of programs, or `*`.
    Programs,
    /// A git repository's address, without a password in it.
    Repository,
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
    /// The backends that can do anything but the default; empty: all.
    pub backends: &'static [&'static str],
}

macro_rules! keys {
    ($($name:literal $kind:expr, $default:literal, $applies:ident, $backends:expr, $doc:literal;)*) => {
        /// All keys, in the order of the listing.
        pub static KEYS: &[ConfigKey] = &[$(ConfigKey {
            name: $name, doc: $doc, kind: $kind, default: $default, applies: Applies::$applies, backends: $backends,
        }),*];
    };
}

const ALL: &[&str] = &[];
const VMS: &[&str] = &["qemu", "firecracker"];
const FLY: &[&str] = &["fly"];
const SSH: &[&str] = &["ssh"];

keys! {
    "address" Kind::Text, "none", AtCreation, SSH, "the host that it is: USER@HOST:PORT";
    "allow_commands" Kind::Programs, "*", Now, ALL, "programs that exec and jobs may run, by name or exact path; with a list there is no shell";
    "autostart" Kind::Flag, "yes", AtCreation, ALL, "start it when it is made";
    "backend" Kind::Word(&["default", "container"]), "default", AtCreation, ALL, "what boots it";
    "boot_timeout" Kind::Time, "60s", Now, ALL, "a boot that takes longer has failed";
    "boot_wait" Kind::Time, "5s", Now, ALL, "how long files/ waits for a boot";
    "command" Kind::Text, "none", NextStart, ALL, "a main process, run as the job main; when it ends for good, the machine stops";
    "cpus" Kind::Cpus, "max", NextStart, ALL, "processors, may be a fraction";
    "disk" Kind::Size, "max", NextStart, &["container", "qemu", "firecracker", "fly"], "size of its own disk; it can grow later, and not shrink";
    "egress" Kind::Text, "*", NextStart, VMS, "names and addresses that it may reach; *: all that network lets it";
    "exec_timeout" Kind::Time, "none", Now, ALL, "jobs that run longer are killed (exit 124)";
    "hostname" Kind::Hostname, "default", NextStart, ALL, "its own name for itself; default: the directory's";
    "idle_timeout" Kind::Span, "none", Now, ALL, "after so long without use, on_idle happens";
    "idmap" Kind::Word(&["owner", "none"]), "owner", NextStart, ALL, "owner: you and the guest's user are the same in files/; none: numbers as they are";
    "image" Kind::Text, "host", AtCreation, ALL, "host, or the path of a root directory or of a tar of one";
    "isolation" Kind::Word(&["any", "vm"]), "any", AtCreation, ALL, "vm: refuse less than a virtual machine";
    "kernel" Kind::Path, "default", NextStart, VMS, "a kernel on the host";
    "kernel_args" Kind::Text, "none", NextStart, VMS, "added to the kernel's command line";
    "lifetime" Kind::Span, "none", Now, ALL, "destroyed so long after it was made";
    "memory" Kind::Size, "max", NextStart, ALL, "memory limit";
    "network" Kind::Word(&["none", "outgoing"]), "default", NextStart, ALL, "none: loopback only; outgoing: it reaches the internet, and nothing near; default: outgoing where this host can, else none";
    "on_idle" Kind::Word(&["stop", "pause", "destroy"]), "stop", Now, ALL, "what happens after idle_timeout; stopped or paused so, it wakes at the next use";
    "output_limit" Kind::Size, "64M", Now, ALL, "output kept of one job; past it the first and the last half stay";
    "pids" Kind::Count, "4096", NextStart, ALL, "processes at once";
    "protect" Kind::Flag, "no", Now, ALL, "yes: refuse every way of destroying it";
    "region" Kind::Text, "default", AtCreation, FLY, "where it is";
    "repo" Kind::Repository, "none", AtCreation, ALL, "a git repository, cloned into workdir at the first boot";
    "restart" Kind::Word(&["no", "on-failure", "always"]), "no", Now, ALL, "whether command, or a machine that was lost, is started again";
    "shell" Kind::Path, "default", Now, ALL, "what runs the texts of exec; default: bash where there is one, else sh";
    "size" Kind::Text, "default", AtCreation, FLY, "the provider's name for cpus and memory";
    "user" Kind::Text, "root", Now, ALL, "the guest's user that jobs run as";
    "workdir" Kind::Path, "/root", Now, ALL, "where jobs start, and where work points";
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

/// Whether git can clone it, and it has no secret in it: it is shown in `config/`, events and `history`.
fn valid_repository(text: &str) -> bool {
    let secret = text.split_once("://").is_some_and(|(scheme, rest)| {
        let user = rest.split('/').next().and_then(|authority| authority.rsplit_once('@')).map(|(user, _)| user);
        // With https, a token can stand alone before the @.
        user.is_some_and(|user| user.contains(':') || scheme.starts_with("http")) || rest.contains('?')
    });
    !text.is_empty() && !text.starts_with('-') && !secret && !text.contains(char::is_whitespace)
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
            Kind::Span => parse_time(value).is_some_and(|time| time.is_none_or(|time| !time.is_zero())),
            Kind::Programs => Allowed::parse(value).is_some(),
            Kind::Repository => valid_repository(value),
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
            Kind::Span => "a time above zero as 30s, 5m, 2h or 1d, or none".into(),
            Kind::Repository => {
                "a git repository, without a password in its address (a token goes to secrets/GITHUB_TOKEN)".into()
            }
            Kind::Programs => "names or exact paths of programs, separated by blanks, or *".into(),
        })
    }

    /// Whether a machine of that backend can have this value.
    ///
    /// # Errors
    /// EOPNOTSUPP, naming the backends that can do it.
    pub fn check_backend(&self, backend: &str, value: &str) -> Result<(), MachineError> {
        let is_default = value == self.default || value == "default";
        if is_default || self.backends.is_empty() || self.backends.contains(&backend) {
            return Ok(());
        }
        let able = self.backends.join(", ");
        Err(MachineError::not_supported(format!(
            "{}: the backend {backend} cannot do that (it takes {able})",
            self.name
        )))
    }

    /// What values it takes, in a word or two.
    pub fn takes(&self) -> String {
        match self.kind {
            Kind::Text => "text".into(),
            Kind::Size => "size K M G T".into(),
            Kind::Time | Kind::Span => "time s m h d".into(),
            Kind::Count => "number".into(),
            Kind::Cpus => "number, may be a fraction".into(),
            Kind::Flag => "yes no".into(),
            Kind::Word(words) => words.join(" "),
            Kind::Hostname => "name".into(),
            Kind::Path => "path".into(),
            Kind::Programs => "names".into(),
            Kind::Repository => "address".into(),
        }
    }
}

pub(super) fn shorten(value: &str) -> String {
    let short: String = value.chars().take(80).flat_map(char::escape_default).collect();
    if value.chars().count() > 80 { short + "…" } else { short }
}
