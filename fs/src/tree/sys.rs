//! `.sys/`: the service itself.

use super::content::Content;
use super::logs::LogRef;
use super::node::Kind;
use crate::machine::registry::Registry;
use std::sync::Arc;
use std::time::SystemTime;

/// Version of the tree as an interface, and of this program.
pub const VERSION: &str = concat!("1 machinefs ", env!("CARGO_PKG_VERSION"), "\n");

/// What is in a file of the directory, and when that last changed.
pub fn content(registry: &Arc<Registry>, kind: Kind) -> Option<(Content, SystemTime)> {
    let log = || LogRef::Service(registry.clone());
    Some(match kind {
        Kind::Version => (Content::Text(VERSION.into()), registry.started()),
        Kind::SysHealth => (Content::Text(registry.health_text().into_bytes()), registry.last_change()),
        Kind::Metrics => (Content::Text(registry.metrics_text().into_bytes()), registry.last_change()),
        Kind::SysEvents => (Content::Log(log()), registry.events().modified()),
        Kind::SysWaitEvent => (Content::Follow(log()), registry.events().modified()),
        _ => return None,
    })
}
