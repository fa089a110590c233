//! One connection of the host: frames in and out, requests side by side, streams.

mod connection;
mod execute;
mod frames;
mod ports;
mod requests;
mod stdin;
mod streams;
mod writer;

pub use connection::Connection;
pub use frames::FrameReader;
pub use requests::Interrupter;
pub use stdin::{Over, Pending, Stdin};
pub use streams::Streams;
pub use writer::Writer;
