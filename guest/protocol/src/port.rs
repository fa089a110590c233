//! Streams to the guest's TCP ports.
//!
//! After [`crate::message::Request::Connect`] was answered, [`crate::frame::Kind::Data`] frames under its tag go both
//! ways, each side within the credit the other gives. An empty data frame is the end of that direction; the other goes
//! on. When both have ended the tag is free. The guest's [`crate::frame::Kind::Error`] and the host's
//! [`crate::frame::Kind::Cancel`] are a reset: nothing more comes or is taken under the tag. A lost link resets all.

/// Bytes each side may send before the first credit arrives.
pub const INITIAL_CREDIT: u64 = 256 * 1024;
/// Connections of one link at once, at most; one more is EMFILE.
pub const MAX_CONNECTIONS: usize = 1024;
