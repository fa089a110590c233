//! machinefs: a file system whose directories are machines.
//!
//! `tree` is the namespace; `fuse` a thin front end that turns bytes into operations on it and back; `machine` the
//! machines with their life, jobs and logs; `link` the stream to the agent in each; `cli` the command.

pub mod cli;
pub mod errno;
pub mod fuse;
pub mod link;
pub mod machine;
pub mod tree;
