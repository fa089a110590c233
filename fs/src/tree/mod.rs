//! The tree: what is in `/sandboxes`, independent of FUSE or 9P.

pub mod ops;
