//! Volumes: directories of the state directory that outlive machines, for mounts.
//!
//! `NAME/` is its owner's and closed to others; below it `data/` is what machines see. Numbers of owners in it are those
//! in the machines: a volume holds files of all of a machine's users, and no user of the host can come to them.

use crate::Owner;
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, chown};
use std::path::{Path, PathBuf};

/// The volumes of a state directory.
#[derive(Clone, Debug)]
pub struct Volumes {
    dir: PathBuf,
}

/// A volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// Its name.
    pub name: String,
    /// Whose it is.
    pub uid: u32,
    /// That user's group.
    pub gid: u32,
}

const DATA: &str = "data";

fn invalid(name: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, format!("`{name}` is no name of a volume"))
}

/// Names as machines have: letters, digits and `-`, 63 at most.
fn is_name(name: &str) -> bool {
    let bytes = name.as_bytes();
    bytes.first().is_some_and(u8::is_ascii_alphanumeric)
        && bytes.len() <= 63
        && bytes.iter().all(|b| b.is_ascii_alphanumeric() || *b == b'-')
}

impl Volumes {
    /// Those of a backend's state directory.
    pub fn new(state_dir: &Path) -> Self {
        Self { dir: state_dir.join("volumes") }
    }

    fn path(&self, name: &str) -> io::Result<PathBuf> {
        if is_name(name) { Ok(self.dir.join(name)) } else { Err(invalid(name)) }
    }

    /// Makes a volume for a user.
    ///
    /// # Errors
    /// `InvalidInput` for a bad name, `AlreadyExists`, and those of the file system.
    pub fn create(&self, name: &str, uid: u32, gid: u32) -> io::Result<()> {
        let path = self.path(name)?;
        DirBuilder::new().recursive(true).mode(0o700).create(&self.dir)?;
        // Filled aside: a volume that is there is complete. A name of a volume has no dot.
        let part = self.dir.join(format!(".{name}"));
        match fs::remove_dir_all(&part) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        DirBuilder::new().mode(0o700).create(&part)?;
        DirBuilder::new().mode(0o755).create(part.join(DATA))?;
        fs::set_permissions(part.join(DATA), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        if rustix::process::geteuid().is_root() {
            chown(&part, Some(uid), Some(gid))?;
        }
        let flags = rustix::fs::RenameFlags::NOREPLACE;
        let moved = rustix::fs::renameat_with(rustix::fs::CWD, &part, rustix::fs::CWD, &path, flags);
        if moved.is_err() {
            fs::remove_dir_all(&part)?;
        }
        Ok(moved?)
    }

    /// A volume, if it is there.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn get(&self, name: &str) -> io::Result<Option<Volume>> {
        let Ok(path) = self.path(name) else { return Ok(None) };
        match fs::symlink_metadata(&path) {
            Ok(meta) => Ok(Some(Volume { name: name.into(), uid: meta.uid(), gid: meta.gid() })),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// All volumes, by name.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn list(&self) -> io::Result<Vec<Volume>> {
        let mut all = Vec::new();
        let entries = match fs::read_dir(&self.dir) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(all),
            other => other?,
        };
        for entry in entries {
            let name = entry?.file_name();
            if let Some(volume) = name.to_str().map(|name| self.get(name)).transpose()? {
                all.extend(volume);
            }
        }
        all.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(all)
    }

    /// Removes a volume with what is in it. The caller knows that no machine has it mounted: one that does keeps what
    /// is open. Success when it is not there.
    ///
    /// # Errors
    /// `InvalidInput` for a bad name, and those of the file system.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        let path = self.path(name)?;
        let gone = self.dir.join(format!(".removed-{name}"));
        // An earlier removal may have been cut short: its directory has the name that this one needs.
        crate::container::remove_contents(&gone)?;
        match fs::rename(&path, &gone) {
            Err(e) if e.kind() == io::ErrorKind::NotFound && !gone.exists() => return Ok(()),
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        crate::container::remove_contents(&gone)?;
        fs::remove_dir(&gone)
    }

    /// The directory of a volume that machines see.
    ///
    /// # Errors
    /// `PermissionDenied` when it is another user's, `NotFound`, `InvalidInput` for a bad name.
    pub(crate) fn open(&self, name: &str, owner: &Owner) -> io::Result<OwnedFd> {
        let path = self.path(name)?;
        let volume = self.get(name)?.ok_or(io::ErrorKind::NotFound)?;
        if rustix::process::geteuid().is_root() && owner.uid != 0 && volume.uid != owner.uid {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = rustix::fs::open(&self.dir, flags, Mode::empty())?;
        let below = Path::new(path.file_name().unwrap_or_default()).join(DATA);
        let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::BENEATH;
        Ok(openat2(dir, below, flags, Mode::empty(), resolve)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_are_made_listed_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let volumes = Volumes::new(dir.path());
        assert_eq!(volumes.list().unwrap(), []);
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        volumes.create("cache", uid, gid).unwrap();
        assert_eq!(volumes.create("cache", uid, gid).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        for bad in ["", "..", "a/b", ".x", "-a", "a.b", &"a".repeat(64)] {
            assert_eq!(volumes.create(bad, uid, gid).unwrap_err().kind(), io::ErrorKind::InvalidInput, "{bad}");
            assert_eq!(volumes.remove(bad).unwrap_err().kind(), io::ErrorKind::InvalidInput, "{bad}");
            assert_eq!(volumes.get(bad).unwrap(), None);
        }
        assert_eq!(volumes.list().unwrap(), [Volume { name: "cache".into(), uid, gid }]);
        let owner = Owner { uid, gid, ..Owner::default() };
        drop(volumes.open("cache", &owner).unwrap());
        fs::write(dir.path().join("volumes/cache/data/file"), "x").unwrap();
        volumes.remove("cache").unwrap();
        volumes.remove("cache").unwrap();
        assert_eq!(fs::read_dir(dir.path().join("volumes")).unwrap().count(), 0);
        assert_eq!(volumes.open("cache", &owner).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
