//! Secrets at rest: sealed with a key that is kept apart from the state directory, so that a stolen disk of states, or
//! a backup of one, tells nothing.

use super::error::MachineError;
use chacha20poly1305::aead::{Aead, KeyInit, Payload};
use chacha20poly1305::{Key, XChaCha20Poly1305, XNonce};
use parking_lot::Mutex;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use zeroize::Zeroizing;

/// Length of the key, in bytes.
const KEY: usize = 32;
/// Length of the nonce that stands before what is sealed: long enough to be random for every value (XChaCha20).
const NONCE: usize = 24;

/// Seals and opens secrets. The key is read when it is first needed.
pub struct Vault {
    path: PathBuf,
    cipher: Mutex<Option<XChaCha20Poly1305>>,
}

impl Vault {
    /// With the key in that file; it is made when something is first sealed and it is not there.
    pub fn new(path: PathBuf) -> Vault {
        Vault { path, cipher: Mutex::new(None) }
    }

    /// Seals a value; `label` is needed again to open it, and is not secret.
    ///
    /// # Errors
    /// EIO when the key cannot be read or made.
    pub fn seal(&self, label: &str, value: &[u8]) -> Result<Vec<u8>, MachineError> {
        let mut sealed = vec![0; NONCE];
        random(&mut sealed)?;
        let payload = Payload { msg: value, aad: label.as_bytes() };
        let body = self.with_cipher(true, |cipher| cipher.encrypt(XNonce::from_slice(&sealed), payload))?;
        sealed.extend(body.map_err(|_| MachineError::internal("a secret could not be sealed"))?);
        Ok(sealed)
    }

    /// Opens what was sealed under that label.
    ///
    /// # Errors
    /// EIO when the key is gone or another, or the bytes are not what was sealed.
    pub fn open(&self, label: &str, sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, MachineError> {
        let wrong = || {
            MachineError::internal(format!(
                "{label} was sealed with another key than {}: restore that file, or write the secret again",
                self.path.display()
            ))
        };
        let (nonce, body) = sealed.split_at_checked(NONCE).ok_or_else(wrong)?;
        let payload = Payload { msg: body, aad: label.as_bytes() };
        let opened = self.with_cipher(false, |cipher| cipher.decrypt(XNonce::from_slice(nonce), payload))?;
        opened.map(Zeroizing::new).map_err(|_| wrong())
    }

    fn with_cipher<T>(&self, make: bool, work: impl FnOnce(&XChaCha20Poly1305) -> T) -> Result<T, MachineError> {
        let mut cipher = self.cipher.lock();
        let cipher = match &mut *cipher {
            Some(cipher) => cipher,
            none => {
                let key = self.key(make)?;
                none.insert(XChaCha20Poly1305::new(Key::from_slice(&*key)))
            }
        };
        Ok(work(cipher))
    }

    fn key(&self, make: bool) -> Result<Zeroizing<[u8; KEY]>, MachineError> {
        let failed = |error: std::io::Error| {
            MachineError::internal(format!("the key of secrets, {}: {error}", self.path.display()))
        };
        match read_key(&self.path) {
            Err(error) if make && error.kind() == std::io::ErrorKind::NotFound => {
                make_key(&self.path)?;
                read_key(&self.path).map_err(failed)
            }
            other => other.map_err(failed),
        }
    }
}

fn read_key(path: &Path) -> std::io::Result<Zeroizing<[u8; KEY]>> {
    let mut file = File::open(path)?;
    let facts = file.metadata()?;
    if facts.mode() & 0o077 != 0 {
        return Err(std::io::Error::other("others than its owner may read it: chmod 600"));
    }
    let mut key = Zeroizing::new([0; KEY]);
    if facts.len() != KEY as u64 {
        return Err(std::io::Error::other(format!("is not a key: it has {} bytes, not {KEY}", facts.len())));
    }
    file.read_exact(&mut *key)?;
    Ok(key)
}

/// Makes the file whole or not at all; one that somebody else made meanwhile stays.
fn make_key(path: &Path) -> Result<(), MachineError> {
    let mut key = Zeroizing::new([0; KEY]);
    random(&mut *key)?;
    let dir = path.parent().unwrap_or(Path::new("/"));
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).and_then(|()| {
        // Of mode 0600, as tempfile makes them.
        let mut file = tempfile::NamedTempFile::new_in(dir)?;
        file.write_all(&*key)?;
        file.as_file().sync_all()?;
        match file.persist_noclobber(path) {
            Err(error) if error.error.kind() != std::io::ErrorKind::AlreadyExists => Err(error.error),
            _ => Ok(()),
        }
    });
    made.map_err(|error| {
        MachineError::no_space(format!(
            "cannot make the key of secrets, {}: {error}: give a --key-file",
            path.display()
        ))
    })
}

fn random(bytes: &mut [u8]) -> Result<(), MachineError> {
    let wanted = bytes.len();
    let got = rustix::rand::getrandom(bytes, rustix::rand::GetRandomFlags::empty())
        .map_err(|error| MachineError::internal(format!("no random numbers: {error}")))?;
    // getrandom(2): up to 256 bytes are always given in full.
    if got == wanted { Ok(()) } else { Err(MachineError::internal("too few random numbers")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn what_is_sealed_is_opened_with_the_same_key_and_label_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/key");
        let vault = Vault::new(path.clone());
        let sealed = vault.seal("TOKEN", b"hunter2").unwrap();
        assert!(!sealed.windows(7).any(|part| part == b"hunter2"));
        assert_ne!(vault.seal("TOKEN", b"hunter2").unwrap(), sealed, "each has a nonce of its own");
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        let later = Vault::new(path.clone());
        assert_eq!(*later.open("TOKEN", &sealed).unwrap(), b"hunter2");
        assert!(later.open("OTHER", &sealed).is_err());
        assert!(later.open("TOKEN", &sealed[..10]).is_err());
        std::fs::remove_file(&path).unwrap();
        let lost = Vault::new(path.clone());
        assert!(lost.open("TOKEN", &sealed).is_err());
        assert!(!path.exists(), "opening makes no key");
        lost.seal("TOKEN", b"").unwrap();
        assert!(lost.open("TOKEN", &sealed).unwrap_err().to_string().contains("another key"));
    }

    #[test]
    fn a_key_that_others_may_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        std::fs::write(&path, [1; KEY]).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        assert!(Vault::new(path.clone()).seal("A", b"x").unwrap_err().to_string().contains("chmod 600"));
        std::fs::write(&path, "short").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        assert!(Vault::new(path).seal("A", b"x").unwrap_err().to_string().contains("not a key"));
    }
}
