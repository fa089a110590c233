//! FUSE: a thin front end. Bytes of `/dev/fuse` become operations of a [`Files`](crate::tree::ops::Files), answers
//! become bytes; nothing here knows what the files are. docs/FUSE.md says why this is not a crate of others,
//! docs/KERNEL-LOCKS.md what the kernel holds while an operation is pending.
//!
//! ```no_run
//! # fn serve(files: std::sync::Arc<dyn machinefs::tree::ops::Files>) -> Result<(), machinefs::fuse::MountError> {
//! use machinefs::fuse;
//! fuse::replace_stale_mount("/sandboxes")?;
//! let session = fuse::mount(fuse::MountOptions::new("/sandboxes"))?.serve(files)?;
//! session.join(); // until it is unmounted
//! # Ok(()) }
//! ```

pub mod abi;
mod connection;
mod fusermount;
mod interrupt;
mod mount;
mod mountinfo;
mod negotiate;
mod notify;
mod poll;
mod reply;
mod request;
mod session;
mod stale;
mod watch;

pub use mount::{MountError, MountOptions, Mounted, Patience, mount, unmount};
pub use notify::{Expirer, Notice, Notifier, QueueFull};
pub use session::Session;
pub use stale::replace_stale_mount;
