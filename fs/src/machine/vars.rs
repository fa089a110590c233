//! What the user names: variables of the environment, secrets, tags; of a machine, or of a template.

use super::error::MachineError;
use super::registry::Registry;
use super::store::Store;
use super::vault::Vault;
use super::{mounts, ports};
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::SystemTime;
use zeroize::Zeroizing;

/// Longest value: execve(2) takes no string over 128 KiB.
const LONGEST: usize = 100 * 1024;
/// Environment and secrets together: execve(2) takes 2 MiB by default, of which the arguments want some.
const MOST_BYTES: usize = 1 << 20;
/// Things of one kind that one machine may have.
const MOST: usize = 1000;
/// The same of ports and of mounts, which take descriptors and mounts of the host.
const MOST_OPEN: usize = 100;

/// What kind of thing it is; the number is written down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum VarKind {
    /// `env/NAME`
    Env = 1,
    /// `secrets/NAME`
    Secret = 2,
    /// `tags/NAME`
    Tag = 3,
    /// `ports/PORT`; the value is as `ports.rs` writes it.
    Port = 4,
    /// `mounts/PATH`; the value is as `mounts.rs` writes it.
    Mount = 5,
    /// `.sys/volumes/NAME`; the value is as `volumes.rs` writes it.
    Volume = 6,
}

impl VarKind {
    /// The kind of that number.
    pub(super) fn from_number(number: u8) -> Option<VarKind> {
        let all = [VarKind::Env, VarKind::Secret, VarKind::Tag, VarKind::Port, VarKind::Mount, VarKind::Volume];
        all.into_iter().find(|kind| *kind as u8 == number)
    }

    fn word(self) -> &'static str {
        match self {
            VarKind::Env => "env",
            VarKind::Secret => "secret",
            VarKind::Tag => "tag",
            VarKind::Port => "port",
            VarKind::Mount => "mount",
            VarKind::Volume => "volume",
        }
    }

    /// How many of this kind there may be of one holder.
    fn most(self) -> usize {
        match self {
            VarKind::Env | VarKind::Secret | VarKind::Tag => MOST,
            VarKind::Port | VarKind::Mount => MOST_OPEN,
            VarKind::Volume => usize::MAX,
        }
    }

    /// Whether jobs get it.
    fn is_for_jobs(self) -> bool {
        matches!(self, VarKind::Env | VarKind::Secret)
    }

    /// Checks a name: `[A-Za-z_][A-Za-z0-9_]*` for what jobs get, letters, digits and `_.-` for a tag; at most 255.
    /// The others have names of their own kinds.
    ///
    /// # Errors
    /// EINVAL.
    pub fn check_name(self, name: &[u8]) -> Result<(), MachineError> {
        let first =
            |byte: &u8| byte.is_ascii_alphabetic() || *byte == b'_' || (self == VarKind::Tag && byte.is_ascii_digit());
        let rest = |byte: &u8| {
            byte.is_ascii_alphanumeric() || *byte == b'_' || (self == VarKind::Tag && matches!(byte, b'.' | b'-'))
        };
        let other = match self {
            VarKind::Env | VarKind::Secret | VarKind::Tag => None,
            VarKind::Port => Some(ports::number(name).map(drop).ok_or("a port is a number from 1 to 65535")),
            VarKind::Mount => Some(mounts::target(name).map(drop)),
            VarKind::Volume => {
                Some(Registry::valid_name(name).then_some(()).ok_or("letters, digits and -, at most 63"))
            }
        };
        if let Some(checked) = other {
            let shown = String::from_utf8_lossy(name).escape_default().to_string();
            return checked
                .map_err(|why| MachineError::invalid(format!("bad name for {} {shown}: {why}", self.word())));
        }
        if name.len() <= 255 && name.first().is_some_and(first) && name.iter().all(rest) {
            return Ok(());
        }
        Err(MachineError::invalid(format!(
            "bad name for {} {}",
            self.word(),
            String::from_utf8_lossy(name).escape_default()
        )))
    }

    /// Checks a value: bytes without NUL; for a tag, one line of text.
    ///
    /// # Errors
    /// EINVAL. The message does not quote the value: it may be a secret.
    pub fn check_value(self, value: &[u8]) -> Result<(), MachineError> {
        if value.contains(&0) {
            return Err(MachineError::invalid("a NUL byte ends a value: there can be none in it"));
        }
        if value.len() > LONGEST {
            return Err(MachineError::invalid(format!("a value has at most {LONGEST} bytes")));
        }
        let is_line =
            || std::str::from_utf8(value).is_ok_and(|text| text.len() <= 4096 && !text.contains(char::is_control));
        if self == VarKind::Tag && !is_line() {
            return Err(MachineError::invalid("a tag is one line of at most 4096 bytes, without control characters"));
        }
        Ok(())
    }
}

/// A secret's name and value, wiped after use.
pub type OpenSecret = (String, Zeroizing<Vec<u8>>);

/// A thing, as it is written down. The value of a secret is sealed.
#[derive(Clone, Debug)]
pub struct VarRow {
    /// What it is.
    pub kind: VarKind,
    /// Its number among those of its holder: never used again while the daemon lives.
    pub id: u32,
    /// Its name.
    pub name: String,
    /// Its value.
    pub value: Vec<u8>,
}

struct Var {
    name: String,
    value: Vec<u8>,
    modified: SystemTime,
}

struct Inner {
    vars: BTreeMap<(VarKind, u32), Var>,
    next: u32,
    changed: SystemTime,
}

/// The things of one machine or template.
pub struct Vars {
    slot: u32,
    store: Store,
    vault: Arc<Vault>,
    inner: Mutex<Inner>,
}

impl Vars {
    /// As they were written down under that slot.
    pub(super) fn load(slot: u32, rows: Vec<VarRow>, store: Store, vault: Arc<Vault>) -> Vars {
        let now = SystemTime::now();
        let next = rows.iter().map(|row| row.id + 1).max().unwrap_or(1);
        let vars = rows
            .into_iter()
            .map(|row| ((row.kind, row.id), Var { name: row.name, value: row.value, modified: now }))
            .collect();
        Vars { slot, store, vault, inner: Mutex::new(Inner { vars, next, changed: now }) }
    }

    /// Numbers and names of a kind, in the order in which they were made.
    pub fn list(&self, kind: VarKind) -> Vec<(u32, String)> {
        let inner = self.inner.lock();
        inner.vars.iter().filter(|((of, _), _)| *of == kind).map(|((_, id), var)| (*id, var.name.clone())).collect()
    }

    /// The number of a name.
    pub fn find(&self, kind: VarKind, name: &[u8]) -> Option<u32> {
        let inner = self.inner.lock();
        let found = inner.vars.iter().find(|((of, _), var)| *of == kind && var.name.as_bytes() == name);
        found.map(|((_, id), _)| *id)
    }

    /// The name of a number.
    pub fn name(&self, kind: VarKind, id: u32) -> Option<String> {
        self.inner.lock().vars.get(&(kind, id)).map(|var| var.name.clone())
    }

    /// The value, of anything but a secret.
    pub fn value(&self, kind: VarKind, id: u32) -> Option<Vec<u8>> {
        let inner = self.inner.lock();
        inner.vars.get(&(kind, id)).filter(|_| kind != VarKind::Secret).map(|var| var.value.clone())
    }

    /// When a value was last set.
    pub fn modified(&self, kind: VarKind, id: u32) -> SystemTime {
        self.inner.lock().vars.get(&(kind, id)).map_or(SystemTime::UNIX_EPOCH, |var| var.modified)
    }

    /// When something last came or went.
    pub fn changed(&self) -> SystemTime {
        self.inner.lock().changed
    }

    /// Makes one, with an empty value.
    ///
    /// # Errors
    /// EINVAL for a bad name, EEXIST, EMFILE when there are too many.
    pub fn create(&self, kind: VarKind, name: &[u8]) -> Result<u32, MachineError> {
        kind.check_name(name)?;
        let name = String::from_utf8_lossy(name).into_owned();
        let value = self.seal(kind, &name, b"")?;
        let mut inner = self.inner.lock();
        let mut there = inner.vars.iter().filter(|((of, _), _)| *of == kind);
        if there.any(|(_, var)| var.name == name) {
            return Err(MachineError::exists(format!("there is a {} {name} already", kind.word())));
        }
        if inner.vars.keys().filter(|(of, _)| *of == kind).count() >= kind.most() {
            return Err(MachineError::limit(format!("there are {} of them, which is the most", kind.most())));
        }
        let id = inner.next;
        inner.next += 1;
        inner.changed = SystemTime::now();
        inner.vars.insert((kind, id), Var { name: name.clone(), value: value.clone(), modified: SystemTime::now() });
        self.write(VarRow { kind, id, name, value });
        Ok(id)
    }

    /// Sets a value.
    ///
    /// # Errors
    /// EINVAL for a bad value, ENOENT when it is gone, ENOSPC when there is too much in all.
    pub fn set(&self, kind: VarKind, id: u32, value: &[u8]) -> Result<(), MachineError> {
        kind.check_value(value)?;
        let name = self.name(kind, id).ok_or_else(|| MachineError::not_found("it was removed"))?;
        let value = self.seal(kind, &name, value)?;
        let mut inner = self.inner.lock();
        let others = inner.vars.iter().filter(|((of, number), _)| of.is_for_jobs() && (*of, *number) != (kind, id));
        let bytes: usize = others.map(|(_, var)| var.name.len() + var.value.len() + 2).sum();
        if kind.is_for_jobs() && bytes + name.len() + value.len() > MOST_BYTES {
            return Err(MachineError::no_space(format!("env and secrets have at most {MOST_BYTES} bytes together")));
        }
        let var = inner.vars.get_mut(&(kind, id)).ok_or_else(|| MachineError::not_found("it was removed"))?;
        (var.value, var.modified) = (value.clone(), SystemTime::now());
        self.write(VarRow { kind, id, name, value });
        Ok(())
    }

    /// Removes one; whether it was there.
    pub fn remove(&self, kind: VarKind, id: u32) -> bool {
        let mut inner = self.inner.lock();
        let gone = inner.vars.remove(&(kind, id)).is_some();
        if gone {
            inner.changed = SystemTime::now();
            self.store.delete_var(self.slot, kind, id);
        }
        gone
    }

    /// Everything, as it is written down: for a machine that takes it over.
    pub(super) fn rows(&self) -> Vec<VarRow> {
        let inner = self.inner.lock();
        let row = |(key, var): (&(VarKind, u32), &Var)| VarRow {
            kind: key.0,
            id: key.1,
            name: var.name.clone(),
            value: var.value.clone(),
        };
        inner.vars.iter().map(row).collect()
    }

    /// The environment of jobs: `NAME=value`, without what a secret of the same name goes before.
    pub fn environment(&self) -> Vec<Vec<u8>> {
        let inner = self.inner.lock();
        let of = |wanted: VarKind| inner.vars.iter().filter(move |((kind, _), _)| *kind == wanted).map(|(_, var)| var);
        let secrets: BTreeSet<&str> = of(VarKind::Secret).map(|var| var.name.as_str()).collect();
        of(VarKind::Env)
            .filter(|var| !secrets.contains(var.name.as_str()))
            .map(|var| [var.name.as_bytes(), b"=", var.value.as_slice()].concat())
            .collect()
    }

    /// The secrets, opened: name and value.
    ///
    /// # Errors
    /// EIO when one cannot be opened.
    pub fn secrets(&self) -> Result<Vec<OpenSecret>, MachineError> {
        let inner = self.inner.lock();
        let secrets = inner.vars.iter().filter(|((kind, _), _)| *kind == VarKind::Secret);
        secrets.map(|(_, var)| Ok((var.name.clone(), self.vault.open(&var.name, &var.value)?))).collect()
    }

    fn seal(&self, kind: VarKind, name: &str, value: &[u8]) -> Result<Vec<u8>, MachineError> {
        if kind == VarKind::Secret { self.vault.seal(name, value) } else { Ok(value.to_vec()) }
    }

    fn write(&self, row: VarRow) {
        self.store.put_var(self.slot, row);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::store::{TemplateRow, put_template};
    use std::thread::JoinHandle;

    fn vars(dir: &std::path::Path) -> (Vars, Store) {
        let (vars, store, _thread) = vars_and_thread(dir);
        (vars, store)
    }

    fn vars_and_thread(dir: &std::path::Path) -> (Vars, Store, JoinHandle<()>) {
        let (store, thread) = Store::open(&dir.join("state.db")).unwrap();
        let vault = Arc::new(Vault::new(dir.join("key")));
        // What belongs to nobody is forgotten.
        let (config, vars) = (Vec::new(), Vec::new());
        let holder = TemplateRow { slot: 7, name: "t".into(), uid: 0, gid: 0, config, vars };
        store.query(move |db| put_template(db, &holder)).unwrap();
        let rows = store.query(|db| crate::machine::store::vars(db, 7)).unwrap();
        (Vars::load(7, rows, store.clone(), vault), store, thread)
    }

    fn environment(vars: &Vars) -> Vec<String> {
        vars.environment().into_iter().map(|line| String::from_utf8(line).unwrap()).collect()
    }

    fn secrets(vars: &Vars) -> Vec<(String, String)> {
        let text = |value: &[u8]| String::from_utf8_lossy(value).into_owned();
        vars.secrets().unwrap().iter().map(|(name, value)| (name.clone(), text(value))).collect()
    }

    #[test]
    fn values_reach_jobs_and_outlive_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let thread = {
            let (vars, _, thread) = vars_and_thread(dir.path());
            let path = vars.create(VarKind::Env, b"A").unwrap();
            vars.set(VarKind::Env, path, b"1 2\n3").unwrap();
            let token = vars.create(VarKind::Secret, b"TOKEN").unwrap();
            vars.set(VarKind::Secret, token, b"hunter2").unwrap();
            let tag = vars.create(VarKind::Tag, b"team.x").unwrap();
            vars.set(VarKind::Tag, tag, b"blue").unwrap();
            assert_eq!(vars.value(VarKind::Secret, token), None);
            thread
        };
        thread.join().unwrap();
        let (vars, store) = vars(dir.path());
        assert_eq!(environment(&vars), ["A=1 2\n3"]);
        assert_eq!(secrets(&vars), [("TOKEN".to_string(), "hunter2".to_string())]);
        assert_eq!(vars.list(VarKind::Tag).len(), 1);
        let rows = store.query(|db| crate::machine::store::vars(db, 7)).unwrap();
        assert!(rows.iter().all(|row| !row.value.windows(7).any(|part| part == b"hunter2")));
        let id = vars.find(VarKind::Secret, b"TOKEN").unwrap();
        assert!(vars.remove(VarKind::Secret, id) && !vars.remove(VarKind::Secret, id));
        assert!(secrets(&vars).is_empty());
    }

    #[test]
    fn a_secret_goes_before_a_variable_of_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let (vars, _) = vars(dir.path());
        for (kind, value) in [(VarKind::Secret, &b"s"[..]), (VarKind::Env, b"e")] {
            let id = vars.create(kind, b"X").unwrap();
            vars.set(kind, id, value).unwrap();
        }
        assert!(environment(&vars).is_empty());
        assert_eq!(secrets(&vars), [("X".to_string(), "s".to_string())]);
    }

    #[test]
    fn names_and_values_are_checked() {
        let dir = tempfile::tempdir().unwrap();
        let (vars, _) = vars(dir.path());
        for bad in [&b""[..], b"1A", b"A-B", b"A.B", b"A=B", b"\xff", b"A\n"] {
            assert!(vars.create(VarKind::Env, bad).is_err(), "{bad:?}");
        }
        assert!(VarKind::Tag.check_name(b"1.0-rc").is_ok() && VarKind::Tag.check_name(b".swp").is_err());
        let id = vars.create(VarKind::Env, b"A").unwrap();
        assert!(vars.create(VarKind::Env, b"A").is_err());
        assert!(vars.set(VarKind::Env, id, b"a\0b").is_err());
        assert!(vars.set(VarKind::Env, id, &vec![b'x'; LONGEST + 1]).is_err());
        assert!(VarKind::Tag.check_value(b"a\nb").is_err());
        let names: Vec<String> = (0..12).map(|number| format!("B{number}")).collect();
        let full = names.iter().any(|name| {
            let id = vars.create(VarKind::Env, name.as_bytes()).unwrap();
            vars.set(VarKind::Env, id, &vec![b'x'; LONGEST]).is_err()
        });
        assert!(full, "there is an end to it");
    }
}
