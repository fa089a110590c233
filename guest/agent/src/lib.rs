//! The agent inside a machine: its parts, so that they can be tested without one.

pub mod files;
