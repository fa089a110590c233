//! Support for the end-to-end tests: a daemon on a real mount, shells and programs that are never waited for without
//! bound, and readers of what the kernel knows about processes.
//!
//! A test is written once and runs twice by [`each_user!`]: against root's daemon and against that of an ordinary user
//! (`mfstest`, made by `scripts/setup test`). All of it goes through child processes of that user, since even root
//! cannot enter an ordinary user's FUSE mount.

pub mod daemon;
pub mod gate;
pub mod image;
pub mod leftovers;
pub mod machine;
pub mod process;
pub mod shell;
pub mod skip;
pub mod stopped;
pub mod user;

pub use daemon::{Daemon, shared};
pub use machine::Machine;
pub use process::{Outcome, Running};
pub use shell::{Shell, shells};
pub use user::User;

/// Repeats and sizes of long tests are multiplied by this: `MACHINEFS_SOAK`, 1 unless `scripts/soak` runs them.
pub fn scale() -> usize {
    std::env::var("MACHINEFS_SOAK").ok().and_then(|text| text.parse().ok()).unwrap_or(1)
}

/// Whether tests that move gigabytes are to be left out (`scripts/test --quick`).
pub fn quick() -> bool {
    std::env::var_os("MACHINEFS_QUICK").is_some()
}

/// Makes two tests, `NAME::root` and `NAME::ordinary`, of one body that gets the shared daemon of that user.
#[macro_export]
macro_rules! each_user {
    ($(#[$meta:meta])* fn $name:ident($daemon:ident) $body:block) => {
        $(#[$meta])*
        mod $name {
            #[allow(unused_imports)]
            use super::*;

            fn body($daemon: &'static $crate::Daemon) $body

            #[test]
            fn root() {
                if let Some(daemon) = $crate::shared($crate::User::Root) {
                    body(daemon);
                }
            }

            #[test]
            fn ordinary() {
                if let Some(daemon) = $crate::shared($crate::User::Ordinary) {
                    body(daemon);
                }
            }
        }
    };
}

/// Like [`each_user!`] for a body that needs a daemon of its own (to kill it, or with options): it gets the user, who
/// can run one here.
#[macro_export]
macro_rules! each_user_alone {
    ($(#[$meta:meta])* fn $name:ident($user:ident) $body:block) => {
        $(#[$meta])*
        mod $name {
            #[allow(unused_imports)]
            use super::*;

            fn body($user: $crate::User) $body

            #[test]
            fn root() {
                if $crate::user::usable($crate::User::Root) {
                    body($crate::User::Root);
                }
            }

            #[test]
            fn ordinary() {
                if $crate::user::usable($crate::User::Ordinary) {
                    body($crate::User::Ordinary);
                }
            }
        }
    };
}

/// Waits until a condition holds, at most `seconds`; whether it came to hold. Bounds a hang, measures nothing.
pub fn eventually(seconds: u64, mut condition: impl FnMut() -> bool) -> bool {
    let end = std::time::Instant::now() + std::time::Duration::from_secs(seconds);
    loop {
        if condition() {
            return true;
        }
        if std::time::Instant::now() > end {
            return false;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}
