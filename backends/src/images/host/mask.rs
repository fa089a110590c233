//! The layer above the host's trees that hides what a machine must not see: overlay's whiteouts, character devices
//! 0:0 (Documentation/filesystems/overlayfs in the kernel's source).

use super::scan::Scan;
use super::seal;
use crate::images::Tree;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// The package manager's.
const DATABASE: &str = "/var/lib/dpkg";

/// Attributes of a directory of the mask: an overlay shows those of its top layer.
type Attributes = (u32, u32, u32);

/// The trees `roots` under a mask that hides what `scan` found, made in `dir` when it is not there yet.
///
/// `user`: for an ordinary user, who cannot map the owners of the host's files. Then the mask has every directory, as
/// the user's own, who is root in the machine and so may add, replace and remove files everywhere.
pub(super) fn trees(dir: &Path, roots: &[PathBuf], scan: &Scan, user: bool) -> io::Result<Vec<Tree>> {
    let hidden = &scan.hidden;
    // What is in a hidden directory needs no whiteout of its own, and could not have one.
    let inner = |path: &PathBuf| path.ancestors().skip(1).any(|p| hidden.contains(p));
    let hidden = &hidden.iter().filter(|p| !inner(p)).cloned().collect::<BTreeSet<_>>();
    let mut dirs = BTreeMap::new();
    for path in hidden {
        for parent in path.ancestors().skip(1).take_while(|p| roots.iter().any(|r| p.starts_with(r))) {
            if !dirs.contains_key(parent)
                && let Ok(meta) = fs::symlink_metadata(parent)
            {
                dirs.insert(parent.to_owned(), (meta.mode() & 0o7777, meta.uid(), meta.gid()));
            }
        }
    }
    let is_shown = |p: &&PathBuf| user && p.ancestors().all(|a| !hidden.contains(a));
    for path in scan.directories().filter(is_shown) {
        if let Ok(meta) = fs::symlink_metadata(path) {
            dirs.insert(path.clone(), (meta.mode() & 0o7777, meta.uid(), meta.gid()));
        }
    }
    let mask = dir.join(format!("mask-{}", digest(&dirs, hidden)));
    seal(&mask, |top| fill(top, &dirs, hidden, user))?;
    let tree = |root: &PathBuf| {
        let below = root.strip_prefix("/").unwrap_or(root);
        if scan.closed.contains(root) {
            let nothing = dir.join("nothing");
            seal(&nothing, |top| fs::set_permissions(top, Permissions::from_mode(0o755)))?;
            return Tree::new(&below.to_string_lossy(), vec![nothing]);
        }
        let masked = mask.join(below);
        let own = (user && root == Path::new(DATABASE)).then(|| database(dir)).transpose()?;
        let lower = [own, masked.is_dir().then_some(masked), Some(root.clone())];
        Tree::new(&below.to_string_lossy(), lower.into_iter().flatten().collect())
    };
    roots.iter().map(tree).collect()
}

/// A copy of the files at the top of the package manager's database, the list of what is installed among them, as the
/// user's own: dpkg makes hard links of these, which needs files whose owner the machine knows.
fn database(dir: &Path) -> io::Result<PathBuf> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(DATABASE)? {
        let entry = entry?;
        let meta = entry.metadata()?;
        if meta.is_file() && meta.mode() & 0o004 != 0 {
            files.insert(entry.file_name(), (meta.len(), meta.ino(), meta.mtime(), meta.mtime_nsec()));
        }
    }
    let name = super::short(&Sha256::digest(format!("{files:?}")));
    let made = dir.join(format!("dpkg-{name}"));
    seal(&made, |top| {
        for name in files.keys() {
            fs::copy(Path::new(DATABASE).join(name), top.join(name))?;
        }
        fs::set_permissions(top, Permissions::from_mode(0o755))
    })?;
    Ok(made)
}

fn digest(dirs: &BTreeMap<PathBuf, Attributes>, hidden: &BTreeSet<PathBuf>) -> String {
    let mut hash = Sha256::new();
    for (path, attributes) in dirs {
        hash.update(format!("{attributes:?}"));
        hash.update(path.as_os_str().as_bytes());
        hash.update([0]);
    }
    hash.update([1]);
    for path in hidden {
        hash.update(path.as_os_str().as_bytes());
        hash.update([0]);
    }
    super::short(&hash.finalize())
}

fn fill(top: &Path, dirs: &BTreeMap<PathBuf, Attributes>, hidden: &BTreeSet<PathBuf>, user: bool) -> io::Result<()> {
    let place = |path: &Path| top.join(path.strip_prefix("/").unwrap_or(path));
    for (path, (mode, uid, gid)) in dirs {
        let at = place(path);
        fs::create_dir_all(&at)?;
        if !user {
            std::os::unix::fs::chown(&at, Some(*uid), Some(*gid))?;
        }
        fs::set_permissions(&at, Permissions::from_mode(*mode))?;
    }
    for path in hidden {
        let at = place(path);
        if at.parent().is_some_and(Path::is_dir) {
            mknodat(CWD, &at, FileType::CharacterDevice, Mode::empty(), 0)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_closed_tree_nothing_is_shown() {
        let tmp = tempfile::tempdir().unwrap();
        let (root, dir) = (tmp.path().join("root"), tmp.path().join("dir"));
        fs::create_dir(&root).unwrap();
        fs::create_dir(&dir).unwrap();
        fs::write(root.join("file"), "x").unwrap();
        let lower = |mode| {
            fs::set_permissions(tmp.path(), Permissions::from_mode(mode)).unwrap();
            let scan = Scan::new(std::slice::from_ref(&root)).unwrap();
            trees(&dir, std::slice::from_ref(&root), &scan, false).unwrap().remove(0).lower
        };
        assert_eq!(lower(0o755), std::slice::from_ref(&root));
        assert_eq!(lower(0o700), [dir.join("nothing")]);
        assert_eq!(fs::read_dir(dir.join("nothing")).unwrap().count(), 0);
    }
}
