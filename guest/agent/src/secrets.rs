//! The machine's secrets: in this process's memory and in the environment of jobs, nowhere else.

use machinefs_protocol::frame::FrameError;
use machinefs_protocol::secret;
use parking_lot::Mutex;
use std::collections::BTreeSet;
use thiserror::Error;
use zeroize::Zeroizing;

/// The secret that is git's password.
const TOKEN: &[u8] = b"GITHUB_TOKEN";
/// Names further servers the token is for, separated by commas or spaces: `name`, `name:port`, or with `http://` before
/// it for one without TLS.
const HOSTS: &[u8] = b"GITHUB_HOST";
/// The server the token is for in any case.
const DEFAULT_HOST: &str = "github.com";
/// Who another user namespace's users look like, here (`overflowuid` of proc_sys_kernel(5)).
const OVERFLOW_UID: u32 = 65_534;

/// A name and its value, which is wiped after use.
pub type Variable = (Vec<u8>, Zeroizing<Vec<u8>>);

/// The secrets. Never shown, so it has no `Debug`.
pub struct Secrets {
    socket: String,
    values: Mutex<Vec<Variable>>,
    /// Users that have run jobs: these had the secrets in their environment.
    users: Mutex<BTreeSet<u32>>,
}

/// Why a set of secrets is refused. No value is in the message.
#[derive(Debug, Error)]
pub enum SecretError {
    /// The message is damaged.
    #[error("{0}")]
    Frame(#[from] FrameError),
    /// Not a name of an environment variable.
    #[error("{0:?} cannot be the name of an environment variable")]
    Name(String),
    /// Not a value of an environment variable.
    #[error("the value of {0} has a NUL byte or is too long for an environment variable")]
    Value(String),
}

/// Longest environment entry, in bytes, its NUL included (MAX_ARG_STRLEN, execve(2)).
const MAX_ENTRY: usize = 128 * 1024;

impl Secrets {
    /// None yet. `boot` makes the socket's name unique.
    pub fn new(boot: u128) -> Secrets {
        Secrets { socket: format!("machinefs-{boot:032x}"), values: Mutex::default(), users: Mutex::default() }
    }

    /// The name of the abstract socket that git's helper asks at.
    pub fn socket(&self) -> &str {
        &self.socket
    }

    /// Takes these instead of those there were.
    ///
    /// # Errors
    /// [`SecretError`]; nothing has changed then.
    pub fn replace(&self, body: &[u8]) -> Result<(), SecretError> {
        let secrets = secret::decode(body)?;
        for secret in &secrets {
            let name = String::from_utf8_lossy(secret.name).into_owned();
            if secret.name.is_empty() || secret.name.iter().any(|byte| matches!(byte, 0 | b'=')) {
                return Err(SecretError::Name(name));
            }
            if secret.value.contains(&0) || secret.name.len() + secret.value.len() + 2 > MAX_ENTRY {
                return Err(SecretError::Value(name));
            }
        }
        let values =
            secrets.iter().map(|secret| (secret.name.to_vec(), Zeroizing::new(secret.value.to_vec()))).collect();
        *self.values.lock() = values;
        Ok(())
    }

    /// All of them, for a job's environment.
    pub fn variables(&self) -> Vec<Variable> {
        self.values.lock().clone()
    }

    /// A job runs as that user.
    pub fn add_user(&self, uid: u32) {
        self.users.lock().insert(uid);
    }

    /// Whether a process of that user may have the token: it could read it in its own environment.
    pub fn is_user(&self, uid: u32) -> bool {
        // As seen from here, a stranger's process in the same network has that number too.
        uid != OVERFLOW_UID && self.users.lock().contains(&uid)
    }

    fn value(&self, name: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
        self.values.lock().iter().rev().find(|(other, _)| other == name).map(|(_, value)| value.clone())
    }

    /// Where git sends the token: URLs without a path. Empty without a token.
    pub fn token_urls(&self) -> Vec<String> {
        if self.value(TOKEN).is_none_or(|token| token.is_empty()) {
            return Vec::new();
        }
        let hosts = self.value(HOSTS).unwrap_or_default();
        let hosts = String::from_utf8_lossy(&hosts).to_ascii_lowercase();
        let named = hosts.split([',', ' ', '\t', '\n']).filter_map(url_of);
        let mut urls = vec![format!("https://{DEFAULT_HOST}")];
        for url in named {
            if !urls.contains(&url) {
                urls.push(url);
            }
        }
        urls
    }

    /// The token, for a server at that URL.
    pub fn token_for(&self, protocol: &str, host: &str) -> Option<Zeroizing<Vec<u8>>> {
        let asked = format!("{protocol}://{}", host.to_ascii_lowercase());
        if !self.token_urls().contains(&asked) {
            return None;
        }
        // A line break would be the end of it, and what follows another answer.
        self.value(TOKEN)
            .map(|token| Zeroizing::new(token.trim_ascii().to_vec()))
            .filter(|token| !token.contains(&b'\n'))
    }
}

/// The URL for an entry of [`HOSTS`].
fn url_of(entry: &str) -> Option<String> {
    let (scheme, host) = entry.split_once("://").unwrap_or(("https", entry));
    let host = host.trim_end_matches('/');
    let named = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | ':' | '[' | ']');
    let valid = matches!(scheme, "https" | "http") && !host.is_empty() && host.chars().all(named);
    valid.then(|| format!("{scheme}://{host}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use machinefs_protocol::secret::{Secret, encode};

    fn set(secrets: &Secrets, values: &[(&str, &str)]) -> Result<(), SecretError> {
        let values: Vec<Secret<'_>> =
            values.iter().map(|(name, value)| Secret { name: name.as_bytes(), value: value.as_bytes() }).collect();
        secrets.replace(&encode(&values).unwrap())
    }

    #[test]
    fn the_token_is_for_its_servers_only() {
        let secrets = Secrets::new(1);
        assert!(secrets.token_urls().is_empty());
        set(
            &secrets,
            &[("GITHUB_TOKEN", "t1\n"), ("GITHUB_HOST", "Git.Example.com, http://localhost:8080/ x/y file://z")],
        )
        .unwrap();
        assert_eq!(secrets.token_urls(), ["https://github.com", "https://git.example.com", "http://localhost:8080"]);
        assert_eq!(secrets.token_for("https", "GitHub.com").unwrap().as_slice(), b"t1");
        assert_eq!(secrets.token_for("http", "localhost:8080").unwrap().as_slice(), b"t1");
        for (protocol, host) in [
            ("http", "github.com"),
            ("https", "github.com.evil.example"),
            ("https", "evil.example"),
            ("https", "localhost:8080"),
            ("https", "github.com:444"),
            ("", "https://github.com"),
        ] {
            assert!(secrets.token_for(protocol, host).is_none(), "{protocol} {host}");
        }
        set(&secrets, &[("GITHUB_TOKEN", "a\nquit=1")]).unwrap();
        assert!(secrets.token_for("https", "github.com").is_none());
        set(&secrets, &[]).unwrap();
        assert!(secrets.variables().is_empty());
    }

    #[test]
    fn what_cannot_be_a_variable_is_refused() {
        let secrets = Secrets::new(1);
        set(&secrets, &[("A", "1")]).unwrap();
        let long = "x".repeat(MAX_ENTRY);
        for (name, value) in [("", "x"), ("A=B", "x"), ("A\0", "x"), ("A", "x\0"), ("A", long.as_str())] {
            let error = set(&secrets, &[("B", "2"), (name, value)]).unwrap_err().to_string();
            assert!(error.len() < 200, "{error}");
        }
        assert_eq!(secrets.variables(), [(b"A".to_vec(), Zeroizing::new(b"1".to_vec()))]);
        assert!(!secrets.is_user(0));
        secrets.add_user(0);
        secrets.add_user(OVERFLOW_UID);
        assert!(secrets.is_user(0) && !secrets.is_user(OVERFLOW_UID));
    }
}
