//! Whom a daemon and its clients run as.

use crate::skip::{What, note};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

/// The ordinary user that `scripts/setup test` makes.
pub const ORDINARY: &str = "mfstest";

/// Whom a daemon and its clients run as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum User {
    /// Root.
    Root,
    /// An ordinary user: `mfstest` when the tests run as root, else whoever runs them.
    Ordinary,
}

/// Numbers and home of a user, as in passwd(5).
#[derive(Clone, Debug)]
pub struct Identity {
    /// User number.
    pub uid: u32,
    /// Group number.
    pub gid: u32,
    /// Name.
    pub name: String,
    /// Home directory.
    pub home: PathBuf,
}

/// Whether the tests themselves run as root.
pub fn am_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Looks a name up in /etc/passwd.
pub fn lookup(name: &str) -> Option<Identity> {
    passwd(|fields| fields.first() == Some(&name))
}

fn passwd(wanted: impl Fn(&[&str]) -> bool) -> Option<Identity> {
    let text = std::fs::read_to_string("/etc/passwd").ok()?;
    text.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        if fields.len() < 6 || !wanted(&fields) {
            return None;
        }
        Some(Identity {
            uid: fields[2].parse().ok()?,
            gid: fields[3].parse().ok()?,
            name: fields[0].to_string(),
            home: PathBuf::from(fields[5]),
        })
    })
}

impl User {
    /// Who that is here; the error is why there is none.
    pub fn identity(self) -> Result<Identity, String> {
        let me = rustix::process::geteuid().as_raw().to_string();
        let myself =
            || passwd(|fields| fields.get(2) == Some(&me.as_str())).ok_or_else(|| format!("uid {me} has no name"));
        match (self, am_root()) {
            (User::Root, true) | (User::Ordinary, false) => myself(),
            (User::Root, false) => Err("needs root".into()),
            (User::Ordinary, true) => {
                lookup(ORDINARY).ok_or_else(|| format!("there is no user {ORDINARY}: run scripts/setup test"))
            }
        }
    }

    /// What keeps this user from running a daemon here, if anything does.
    fn obstacle(self) -> Option<String> {
        let identity = match self.identity() {
            Ok(identity) => identity,
            Err(reason) => return Some(reason),
        };
        if self == User::Root {
            return None;
        }
        let fuse = std::os::unix::fs::MetadataExt::mode(&std::fs::metadata("/dev/fuse").ok()?);
        if fuse & 0o006 != 0o006 {
            return Some("/dev/fuse is closed to ordinary users: run scripts/setup test".into());
        }
        for file in ["/etc/subuid", "/etc/subgid"] {
            let text = std::fs::read_to_string(file).unwrap_or_default();
            if !text.lines().any(|line| line.starts_with(&format!("{}:", identity.name))) {
                return Some(format!("{} has no range in {file}: run scripts/setup test", identity.name));
            }
        }
        None
    }
}

/// Whether this user can run a daemon here; if not, the test is noted as skipped.
pub fn usable(user: User) -> bool {
    match user.obstacle() {
        None => true,
        Some(reason) => {
            note(What::Test, &reason);
            false
        }
    }
}

/// Makes the command run as that identity, with an environment of its own.
pub fn become_identity(command: &mut Command, identity: &Identity) {
    command.env_clear();
    command.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    command.env("HOME", &identity.home).env("USER", &identity.name).env("LOGNAME", &identity.name);
    command.env("LANG", "C.UTF-8");
    if !am_root() || identity.uid == 0 {
        return;
    }
    // Without supplementary groups. Before the change of directory, unlike what pre_exec does: root is kept out of the
    // mounts of others.
    command.uid(identity.uid).gid(identity.gid);
}
