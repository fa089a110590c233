//! Images: what a machine's root is made of.
//!
//! An image is resolved into a [`Root`]: one or more trees of the host, read-only, each under an overlay of the
//! machine's own. Nothing here knows of containers; a VM's disk can be made from the same trees.
//!
//! - `host` ([`host`]): this host's own programs, nothing private.
//! - an absolute path of a directory: that directory is the root.
//! - an absolute path of a tar ([`tar`]), plain, gzip or zstd: unpacked once for its content's digest, then as above.

pub mod host;
mod place;
mod tar;

use crate::{BackendError, MachineSpec};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

/// The root of a machine before anything was written in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Root {
    /// Its trees, the root directory first, then what is mounted in it.
    pub trees: Vec<Tree>,
    /// What identifies the content: `sha256:…` for a tar, the path for a directory, a generation for `host`.
    pub digest: String,
}

/// A directory of the machine that is an overlay of its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tree {
    /// Where, without a leading `/`; empty for the root.
    pub at: String,
    /// A name for it that is one path component.
    pub name: String,
    /// Directories of the host, the top one first; what is mounted below them is not a part of it.
    pub lower: Vec<PathBuf>,
    /// Permissions and owner (numbers as in the machine) of its top directory.
    pub mode: u32,
    /// See `mode`.
    pub uid: u32,
    /// See `mode`.
    pub gid: u32,
}

impl Tree {
    /// A tree of these directories, with the top one's attributes.
    pub(crate) fn new(at: &str, lower: Vec<PathBuf>) -> io::Result<Self> {
        let top = lower.first().map(fs::metadata).transpose()?;
        let (mode, uid, gid) = top.map_or((0o755, 0, 0), |m| (m.mode() & 0o7777, m.uid(), m.gid()));
        let name = if at.is_empty() { "root".into() } else { at.replace('/', "-") };
        Ok(Self { at: at.into(), name, lower, mode, uid, gid })
    }
}

/// The images of this host.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    host: host::Host,
}

/// The name of the image of this host.
pub const HOST: &str = "host";

impl Store {
    /// Keeps what is made from images in `dir` (0700). `user`: run by an ordinary user, who owns all they make.
    ///
    /// # Errors
    /// When `dir` cannot be made.
    pub fn new(dir: PathBuf, user: bool) -> io::Result<Self> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir)?;
        Ok(Self { host: host::Host::new(dir.join("host"), user), dir })
    }

    /// What the image of `spec` is made of now. May take long: the first tar is unpacked here.
    ///
    /// # Errors
    /// [`BackendError::Image`] says what is wrong with the image, [`BackendError::Io`] what went wrong on the way.
    pub fn resolve(&self, spec: &MachineSpec) -> Result<Root, BackendError> {
        let bad = |reason: String| BackendError::Image { image: spec.image.clone(), reason };
        if spec.image == HOST {
            return self.host.current();
        }
        let path = Path::new(&spec.image);
        if !path.is_absolute() {
            return Err(bad("must be `host`, or the absolute path of a root directory or of a tar of one".into()));
        }
        let failed = |e: io::Error| {
            bad(match e.kind() {
                io::ErrorKind::NotFound => "there is no such file or directory on this host".into(),
                io::ErrorKind::CrossesDevices => "lies in a machinefs: copy it out first".into(),
                _ => format!("cannot be looked at: {e}"),
            })
        };
        let real = place::resolve(path).map_err(failed)?;
        let meta = fs::symlink_metadata(&real).map_err(failed)?;
        if meta.is_dir() {
            if real == Path::new("/") {
                return Err(bad("is this host's own root, which holds private files: use the image `host`".into()));
            }
            let digest = real.display().to_string();
            let tree = Tree::new("", vec![real]).map_err(|e| bad(e.to_string()))?;
            return Ok(Root { trees: vec![tree], digest });
        }
        if !meta.is_file() {
            return Err(bad("is neither a directory nor a tar".into()));
        }
        let (root, digest) = tar::unpacked(&real, &self.dir).map_err(|e| bad(e.to_string()))?;
        let tree = Tree::new("", vec![root]).map_err(|e| bad(e.to_string()))?;
        Ok(Root { trees: vec![tree], digest })
    }

    /// Is a root that [`Store::resolve`] gave still what a machine may see? False when the host's files changed in a
    /// way that would let a machine read what it must not. (The root directory of `host` is a copy and always holds.)
    ///
    /// # Errors
    /// As [`Store::resolve`].
    pub fn holds(&self, spec: &MachineSpec, root: &Root) -> Result<bool, BackendError> {
        Ok(spec.image != HOST || self.host.current()?.trees.iter().skip(1).eq(root.trees.iter().skip(1)))
    }

    /// Looks at the host ahead of the first machine of the image `host`.
    pub fn prepare(&self) {
        if let Err(error) = self.host.current() {
            tracing::warn!(%error, "the image `host` cannot be made");
        }
    }
}

/// An I/O error with what was being done.
fn io_error(what: impl std::fmt::Display) -> impl FnOnce(io::Error) -> BackendError {
    let what = what.to_string();
    move |source| BackendError::Io { what, source }
}
