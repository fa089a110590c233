//! What the host's kernel may remember of the guests' files.

use std::sync::OnceLock;
use std::time::Duration;

/// How long names and attributes are remembered, where what a job changed can be expired when it ends.
const REMEMBERED: Duration = Duration::from_secs(1);

type Expire = Box<dyn Fn() + Send + Sync>;

/// The host kernel's memory of the guests' names and attributes.
///
/// Order is kept: what a job did shows on the host before its end does. So every end of a job expires everything;
/// where the kernel cannot do that, nothing is remembered at all.
#[derive(Default)]
pub struct HostCache {
    expire: OnceLock<Expire>,
}

impl HostCache {
    /// Says how to expire everything. Must be quick and take no lock; counts once.
    pub fn expire_by(&self, expire: Expire) {
        // A second mount of one tree there is not.
        let _ = self.expire.set(expire);
    }

    /// How long a name and its attributes may be remembered from now on.
    pub fn ttl(&self) -> Duration {
        if self.expire.get().is_some() { REMEMBERED } else { Duration::ZERO }
    }

    /// Guests have changed behind the kernel's back.
    pub fn expire(&self) {
        if let Some(expire) = self.expire.get() {
            expire();
        }
    }
}
