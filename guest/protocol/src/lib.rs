//! The protocol between the machinefs daemon (the *host*) and the agent in a machine (the *guest*).
//!
//! One byte stream carries many requests at once. A frame is a fixed header ([`frame::Header`]), a small
//! postcard-encoded message ([`message`]) and raw bytes ([`frame`] has the limits). The host asks, the guest
//! answers under the tag of the request; job output flows in streams with credit ([`job`]).
//!
//! Each side treats what it reads as hostile: limits are checked before memory is taken for a frame.

pub mod file;
pub mod frame;
pub mod job;
pub mod joblog;
pub mod message;
pub mod port;
pub mod secret;

/// The protocol's version, exchanged in [`message::Hello`] before anything else.
///
/// Messages are only ever appended to their enums, so that a newer side can talk to an older one down to
/// [`OLDEST_VERSION`].
pub const VERSION: u32 = 1;

/// The oldest version this build still speaks.
pub const OLDEST_VERSION: u32 = 1;

/// The descriptor number on which the agent inherits its listening unix socket (in the manner of systemd's
/// `LISTEN_FDS`, see sd_listen_fds(3)).
pub const LISTEN_FD: i32 = 3;
