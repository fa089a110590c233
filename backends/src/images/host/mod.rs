//! The image `host`: a machine with this host's tools and no download.
//!
//! It is made of the host's `/usr`, what merges into it, `/opt` and the package manager's database, without what
//! ordinary users cannot read ([`scan`], [`mask`]), and of a root with a generated `/etc` ([`skeleton`]). No home
//! directory, no credential and no socket of the host is in it. Other file systems mounted below these directories are
//! not a part of it.
//!
//! What is on disk here (`mask-…`, `root-…`) is named by its content, never changed once made, and used by machines as
//! they run.

mod mask;
mod scan;
mod skeleton;

use super::{Root, Tree, io_error};
use crate::BackendError;
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// Directories of the host that a machine has, where they are; those that are links into `/usr` come with it.
const ROOTS: &[&str] = &["/usr", "/opt", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/var/lib/dpkg"];

/// See the module.
#[derive(Debug)]
pub(super) struct Host {
    dir: PathBuf,
    user: bool,
    state: Mutex<Option<State>>,
}

#[derive(Debug)]
struct State {
    roots: Vec<PathBuf>,
    scan: scan::Scan,
    trees: Vec<Tree>,
    skeleton: skeleton::Skeleton,
}

impl Host {
    /// Nothing is done before [`Host::current`].
    pub(super) fn new(dir: PathBuf, user: bool) -> Self {
        Self { dir, user, state: Mutex::new(None) }
    }

    /// The image as the host is now. The first call looks at all files (about half a second for 150,000), a later one
    /// only at what changed.
    pub(super) fn current(&self) -> Result<Root, BackendError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.dir)
            .map_err(io_error(format_args!("making {}", self.dir.display())))?;
        let what = "looking at the host's files for the image `host`";
        let state = match &mut *state {
            Some(state) => {
                if state.scan.refresh().map_err(io_error(what))? {
                    let (scan, roots) = (&state.scan, &state.roots);
                    state.trees = mask::trees(&self.dir, roots, scan, self.user).map_err(io_error(what))?;
                }
                state.skeleton.refresh(&self.dir, self.user).map_err(io_error(what))?;
                state
            }
            empty => empty.insert(self.first().map_err(io_error(what))?),
        };
        let mut trees = vec![Tree::new("", vec![state.skeleton.path.clone()]).map_err(io_error(what))?];
        trees.extend(state.trees.iter().cloned());
        let generation =
            |t: &Tree| t.lower.first().and_then(|p| p.file_name()).map(|n| n.to_string_lossy().into_owned());
        let digest = trees.first().and_then(generation).unwrap_or_default();
        Ok(Root { trees, digest })
    }

    fn first(&self) -> io::Result<State> {
        let is_root = |p: &&&str| fs::symlink_metadata(p).is_ok_and(|m| m.is_dir());
        let roots: Vec<PathBuf> = ROOTS.iter().filter(is_root).map(PathBuf::from).collect();
        let scan = scan::Scan::new(&roots)?;
        let trees = mask::trees(&self.dir, &roots, &scan, self.user)?;
        let skeleton = skeleton::Skeleton::new(&self.dir, &roots, self.user)?;
        Ok(State { roots, scan, trees, skeleton })
    }
}

/// Makes the directory `path`, when it is not there, whole or not at all: filled under another name, then renamed. What
/// a crash left under such a name is removed first.
fn seal(path: &Path, fill: impl FnOnce(&Path) -> io::Result<()>) -> io::Result<()> {
    if path.exists() {
        return Ok(());
    }
    let lock = fs::File::create(path.with_file_name("lock"))?;
    lock.lock()?;
    if path.exists() {
        return Ok(());
    }
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".part");
    let part = path.with_file_name(name);
    match fs::remove_dir_all(&part) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    fs::create_dir(&part)?;
    fill(&part)?;
    fs::rename(&part, path)
}

/// The first 64 bits of a digest in hexadecimal: enough for names that only this host's own files compete for.
fn short(digest: &[u8]) -> String {
    digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}
