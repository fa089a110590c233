//! Templates: configuration, environment and secrets that machines begin with. A machine takes a copy when it is made;
//! what changes later in the template is for later machines.

use super::config;
use super::error::MachineError;
use super::registry::Registry;
use super::store::{self, Store, TemplateRow};
use super::vars::Vars;
use super::vault::Vault;
use crate::tree::ops::Caller;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

/// Slots from here on are those of templates; machines' are below.
pub const FIRST_SLOT: u32 = (1 << 24) - (1 << 16);

const LAST_SLOT: u32 = (1 << 24) - 1;

/// Templates that one user may have, root's too.
const MOST: usize = 1000;

/// The template of names that do not name one.
pub const DEFAULT: &str = "default";

/// What comes with the service, in a state directory that is new.
const SHIPPED: &[(&str, &[(&str, &str)])] = &[
    (DEFAULT, &[]),
    ("ubuntu", &[("image", "docker.io/library/ubuntu:24.04")]),
    ("python", &[("image", "docker.io/library/python:3-slim")]),
    ("node", &[("image", "docker.io/library/node:lts-slim")]),
];

/// A template.
pub struct Template {
    slot: u32,
    name: String,
    owner: (u32, u32),
    mount_uid: u32,
    config: Mutex<(BTreeMap<&'static str, String>, SystemTime)>,
    vars: Vars,
    store: Store,
}

impl Template {
    /// Its number, which no machine has.
    pub fn slot(&self) -> u32 {
        self.slot
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// User and group it belongs to.
    pub fn owner(&self) -> (u32, u32) {
        self.owner
    }

    /// Whether everybody may use it, and look at all but its secrets: it is of who runs the service.
    pub fn is_public(&self) -> bool {
        self.owner.0 == 0 || self.owner.0 == self.mount_uid
    }

    /// Environment and secrets.
    pub fn vars(&self) -> &Vars {
        &self.vars
    }

    /// When its configuration was last changed.
    pub fn config_changed(&self) -> SystemTime {
        self.config.lock().1
    }

    /// What it says of a key: its own word, or the key's default.
    pub fn config_get(&self, name: &str) -> Option<String> {
        let key = config::key(name)?;
        Some(self.config.lock().0.get(key.name).cloned().unwrap_or_else(|| key.default.to_string()))
    }

    /// Checks a value.
    ///
    /// # Errors
    /// EINVAL.
    pub fn config_check(&self, name: &str, value: &str) -> Result<(), MachineError> {
        config::known(name)?.check(value)
    }

    /// Sets a key; `default` takes the word back, so that the template `default` has it.
    ///
    /// # Errors
    /// EINVAL.
    pub fn config_set(&self, name: &str, value: &str) -> Result<(), MachineError> {
        let key = config::known(name)?;
        key.check(value)?;
        let mut config = self.config.lock();
        if value == "default" {
            config.0.remove(key.name);
            self.store.delete_config(self.slot, key.name);
        } else {
            config.0.insert(key.name, value.to_string());
            self.store.set_config(self.slot, key.name, value);
        }
        config.1 = SystemTime::now();
        Ok(())
    }

    /// Calls `done`, on another thread, once all that was changed is written down, or could not be.
    pub fn settled(&self, done: impl FnOnce(Result<(), MachineError>) + Send + 'static) {
        self.store.settled(done);
    }

    /// The keys that it has a word on.
    pub(super) fn settings(&self) -> BTreeMap<&'static str, String> {
        self.config.lock().0.clone()
    }

    /// Whether that user may change it.
    ///
    /// # Errors
    /// EACCES.
    pub fn check_owner(&self, caller: Caller) -> Result<(), MachineError> {
        if caller.uid == self.owner.0 || caller.uid == 0 || caller.uid == self.mount_uid {
            return Ok(());
        }
        Err(MachineError::denied(format!("the template belongs to user {}", self.owner.0)))
    }

    pub(super) fn is_of(&self, caller: Caller) -> bool {
        caller.uid == self.owner.0
    }

    fn is_for(&self, caller: Caller) -> bool {
        // Root may look at others' templates, and change them; it does not begin with what they say.
        self.is_public() || self.is_of(caller)
    }
}

/// All templates.
pub struct Templates {
    by_name: Mutex<(BTreeMap<String, Arc<Template>>, SystemTime)>,
    next: Mutex<u32>,
    mount: (u32, u32),
    store: Store,
    vault: Arc<Vault>,
}

impl Templates {
    /// As they were written down; a new state directory gets the shipped ones, which belong to `mount`.
    ///
    /// # Errors
    /// The store cannot be read.
    pub(super) fn load(store: Store, vault: Arc<Vault>, mount: (u32, u32)) -> Result<Templates, MachineError> {
        let (rows, used) = store.query(|db| Ok((store::templates(db)?, store::counter(db, "template")?)))?;
        let next = LAST_SLOT.saturating_sub(u32::try_from(used).unwrap_or(u32::MAX));
        let by_name = Mutex::new((BTreeMap::new(), SystemTime::now()));
        let templates = Templates { by_name, next: Mutex::new(next), mount, store, vault };
        for row in rows {
            templates.enter(row);
        }
        if used == 0 {
            for (name, config) in SHIPPED {
                let config = config.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect();
                templates.make(name, mount, config)?;
            }
        }
        Ok(templates)
    }

    fn enter(&self, row: TemplateRow) -> Arc<Template> {
        let known = |(key, value): (String, String)| Some((config::key(&key)?.name, value));
        let template = Arc::new(Template {
            slot: row.slot,
            name: row.name.clone(),
            owner: (row.uid, row.gid),
            mount_uid: self.mount.0,
            config: Mutex::new((row.config.into_iter().filter_map(known).collect(), SystemTime::now())),
            vars: Vars::load(row.slot, row.vars, self.store.clone(), self.vault.clone()),
            store: self.store.clone(),
        });
        let mut by_name = self.by_name.lock();
        by_name.0.insert(row.name, template.clone());
        by_name.1 = SystemTime::now();
        template
    }

    fn make(
        &self,
        name: &str,
        (uid, gid): (u32, u32),
        config: Vec<(String, String)>,
    ) -> Result<Arc<Template>, MachineError> {
        let mut next = self.next.lock();
        if *next < FIRST_SLOT {
            return Err(MachineError::limit("all numbers of templates of this state directory are used up"));
        }
        let row = TemplateRow { slot: *next, name: name.to_string(), uid, gid, config, vars: Vec::new() };
        let written = row.clone();
        *next -= 1;
        let used = i64::from(LAST_SLOT - *next);
        self.store.write(move |db| {
            store::set_counter(db, "template", used)?;
            store::put_template(db, &written)
        });
        Ok(self.enter(row))
    }

    /// The template of that name.
    pub fn get(&self, name: &[u8]) -> Option<Arc<Template>> {
        self.by_name.lock().0.get(std::str::from_utf8(name).ok()?).cloned()
    }

    /// The template of that number.
    pub fn by_slot(&self, slot: u32) -> Option<Arc<Template>> {
        self.by_name.lock().0.values().find(|template| template.slot == slot).cloned()
    }

    /// All of them, in the order of their names.
    pub fn list(&self) -> Vec<Arc<Template>> {
        self.by_name.lock().0.values().cloned().collect()
    }

    /// When one last came or went.
    pub fn changed(&self) -> SystemTime {
        self.by_name.lock().1
    }

    /// Makes one that has no word on anything.
    ///
    /// # Errors
    /// EINVAL for a bad name, EEXIST, EDQUOT.
    pub fn create(&self, caller: Caller, name: &[u8]) -> Result<Arc<Template>, MachineError> {
        if !Registry::valid_name(name) {
            return Err(MachineError::invalid("a template's name is letters, digits and -, at most 63"));
        }
        let name = String::from_utf8_lossy(name).into_owned();
        if self.get(name.as_bytes()).is_some() {
            return Err(MachineError::exists(format!("there is a template {name} already")));
        }
        if self.list().iter().filter(|template| template.owner.0 == caller.uid).count() >= MOST {
            return Err(MachineError::quota(format!("you have {MOST} templates, which is the most")));
        }
        self.make(&name, (caller.uid, caller.gid), Vec::new())
    }

    /// Removes one. Machines that were made from it keep what they have.
    ///
    /// # Errors
    /// EACCES for another's, EPERM for `default`.
    pub fn remove(&self, caller: Caller, template: &Template) -> Result<(), MachineError> {
        template.check_owner(caller)?;
        if template.name == DEFAULT {
            return Err(MachineError::forbidden("the template default is always there"));
        }
        let mut by_name = self.by_name.lock();
        by_name.0.remove(&template.name);
        by_name.1 = SystemTime::now();
        let slot = template.slot;
        self.store.write(move |db| store::delete_template(db, slot));
        Ok(())
    }

    /// The template that a machine's name asks for: `TEMPLATE.rest`, else `default`.
    ///
    /// # Errors
    /// EINVAL for a name that can be no machine's; ENOENT when there is no such template, or none for this user.
    pub fn for_name(&self, caller: Caller, name: &str) -> Result<Arc<Template>, MachineError> {
        let wanted = match name.split_once('.') {
            None if Registry::valid_name(name.as_bytes()) => DEFAULT,
            Some((template, rest)) if [template, rest].iter().all(|part| Registry::valid_name(part.as_bytes())) => {
                template
            }
            _ => {
                return Err(MachineError::invalid(format!(
                    "bad name \"{}\": letters, digits and -, beginning with a letter or digit, at most 63; or TEMPLATE.REST",
                    name.escape_default()
                )));
            }
        };
        let found = self.get(wanted.as_bytes()).filter(|template| template.is_for(caller));
        found.ok_or_else(|| {
            let names: Vec<String> = self
                .list()
                .iter()
                .filter(|template| template.is_for(caller))
                .map(|template| template.name.clone())
                .collect();
            MachineError::not_found(format!("there is no template {wanted}: there are {}", names.join(" ")))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::vars::VarKind;
    use super::*;
    use crate::errno::Errno;
    use std::thread::JoinHandle;

    const ALICE: Caller = Caller { uid: 1000, gid: 1000, pid: 1 };
    const BOB: Caller = Caller { uid: 1001, gid: 1001, pid: 2 };

    fn open(dir: &std::path::Path) -> (Templates, JoinHandle<()>) {
        let (store, thread) = Store::open(&dir.join("state.db")).unwrap();
        (Templates::load(store, Arc::new(Vault::new(dir.join("key"))), (0, 0)).unwrap(), thread)
    }

    #[test]
    fn shipped_ones_are_there_once_and_changes_outlive_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let thread = {
            let (templates, thread) = open(dir.path());
            let names: Vec<String> = templates.list().iter().map(|template| template.name.clone()).collect();
            assert_eq!(names, ["default", "node", "python", "ubuntu"]);
            for template in templates.list() {
                for (key, value) in template.settings() {
                    template.config_check(key, &value).unwrap();
                }
            }
            templates.remove(Caller::default(), &templates.get(b"node").unwrap()).unwrap();
            let mine = templates.create(ALICE, b"mine").unwrap();
            mine.config_set("memory", "1G").unwrap();
            mine.config_set("cpus", "2").unwrap();
            mine.config_set("cpus", "default").unwrap();
            mine.vars().create(VarKind::Env, b"A").unwrap();
            thread
        };
        thread.join().unwrap();
        let (templates, _thread) = open(dir.path());
        assert!(templates.get(b"node").is_none());
        let mine = templates.get(b"mine").unwrap();
        assert_eq!(mine.settings().into_iter().collect::<Vec<_>>(), [("memory", "1G".to_string())]);
        assert_eq!((mine.owner(), mine.vars().list(VarKind::Env).len()), ((1000, 1000), 1));
        assert!(templates.create(ALICE, b"more").unwrap().slot() < mine.slot());
    }

    #[test]
    fn names_find_templates() {
        let dir = tempfile::tempdir().unwrap();
        let (templates, _thread) = open(dir.path());
        templates.create(ALICE, b"mine").unwrap();
        let found = |caller, name: &str| {
            templates.for_name(caller, name).map(|found| found.name.clone()).map_err(|error| error.errno())
        };
        assert_eq!(found(ALICE, "dev").unwrap(), "default");
        assert_eq!(found(ALICE, "python.a-1").unwrap(), "python");
        assert_eq!(found(ALICE, "mine.a").unwrap(), "mine");
        assert_eq!(found(BOB, "mine.a"), Err(Errno::ENOENT));
        assert_eq!(found(ALICE, "nosuch.a"), Err(Errno::ENOENT));
        for bad in ["", ".", "a.", ".a", "a.b.c", "-a", "a/b", "a b", "python.-", "ä"] {
            assert_eq!(found(ALICE, bad), Err(Errno::EINVAL), "{bad}");
        }
        let shipped = templates.get(b"python").unwrap();
        assert!(shipped.is_public() && shipped.check_owner(ALICE).is_err());
        let default = templates.get(b"default").unwrap();
        assert_eq!(templates.remove(Caller::default(), &default).unwrap_err().errno(), Errno::EPERM);
    }
}
