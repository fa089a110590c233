//! The top directory: its files, and machines by name.

use super::content::Content;
use super::ctl::{Commands, Done, usage};
use super::ghost::Ghosts;
use super::node::Kind;
use super::ops::Caller;
use super::{readme, table};
use crate::errno::Errno;
use crate::machine::error::MachineError;
use crate::machine::registry::Registry;
use crate::machine::root_verbs::VERBS;
use std::sync::Arc;
use std::time::SystemTime;

/// What is in a file of the directory, and when that last changed.
pub fn content(registry: &Arc<Registry>, kind: Kind) -> Option<(Content, SystemTime)> {
    Some(match kind {
        Kind::Readme => (Content::Text(readme::readme().into_bytes()), registry.started()),
        Kind::Ignore => (Content::Text(readme::ignore().into_bytes()), registry.started()),
        Kind::RootCtl => (Content::RootCtl(usage(VERBS).into_bytes()), registry.started()),
        Kind::Index => (Content::Text(registry.index_text().into_bytes()), registry.last_change()),
        Kind::IndexJson => (Content::Text(registry.index_json().into_bytes()), registry.last_change()),
        _ => return super::sys::content(registry, kind),
    })
}

/// Whether a machine may be made, or moved, to this name: no file of ours and no ghost has it.
///
/// # Errors
/// EEXIST.
pub fn check_free(ghosts: &Ghosts, name: &[u8]) -> Result<(), MachineError> {
    if table::find(Kind::Root, name).is_some() {
        return Err(MachineError::exists(format!("{} is a file of machinefs", String::from_utf8_lossy(name))));
    }
    if ghosts.is_reserved(name) {
        return Err(MachineError::exists("a machine of that name is just being removed: try again in 2 s"));
    }
    Ok(())
}

/// Lines of the root's `ctl`.
pub struct RootCommands {
    /// The service.
    pub registry: Arc<Registry>,
    /// Names that are not free.
    pub ghosts: Arc<Ghosts>,
}

impl Commands for RootCommands {
    fn run(&self, caller: Caller, words: &[String], done: Done) {
        if let [verb, name, ..] = words
            && verb == "create"
            && let Err(error) = check_free(&self.ghosts, name.as_bytes())
        {
            return done(Err(error));
        }
        self.registry.ctl(caller, words, done);
    }

    fn failed(&self, verb: &str, errno: Errno, message: &str, _line: &str) {
        // The service has no `errors` that a user could read; who wrote the line reads the reason where it was written.
        tracing::debug!(verb, errno = %errno.name(), message, "a line of the root's ctl was refused");
    }
}
