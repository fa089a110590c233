//! A machine's disk: for each tree of its image a directory for what it changes (`upper/NAME`), overlay's own
//! directory beside it (`work/NAME`), and `root.json`, which says what is below.

use super::{etc, remove};
use crate::images::{HOST, Root, Store, Tree};
use crate::{BackendError, MachineSpec};
use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

const RECORD: &str = "root.json";

/// Writes a file whole or not at all. `durable`: also when the host itself crashes, which takes a flush of its disk.
pub(super) fn write_whole(path: &Path, content: &[u8], durable: bool) -> io::Result<()> {
    let part = path.with_extension("part");
    let mut file = fs::File::create(&part)?;
    file.write_all(content)?;
    if durable {
        file.sync_data()?;
    }
    fs::rename(&part, path)
}

/// The root that was recorded at the last create or start.
pub(super) fn recorded(dir: &Path) -> io::Result<Option<Root>> {
    match fs::read(dir.join(RECORD)) {
        Ok(text) => Ok(Some(serde_json::from_slice(&text)?)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

/// What the machine's root is made of at this start, with all directories of its disk there. `base`: the first number
/// of its users; `None`: all it has is the daemon's user's. `disk`: where what it writes is.
pub(super) fn prepare(
    spec: &MachineSpec,
    disk: &Path,
    images: &Store,
    base: Option<u32>,
) -> Result<Root, BackendError> {
    let dir = &spec.dir;
    let failed = |what: &'static str| {
        move |source| BackendError::Io { what: format!("{what} the disk of the machine in {}", dir.display()), source }
    };
    let old = recorded(dir).map_err(failed("reading"))?;
    let kept = old.as_ref().and_then(|r| r.trees.first()).filter(|t| t.lower.iter().all(|p| p.is_dir()));
    let root = match (&old, kept) {
        // An image is looked up once: what a machine was made from stays below it. Only the host's own files are
        // what they are now, and so is what must be hidden of them.
        (Some(old), Some(_)) if spec.image != HOST => old.clone(),
        (Some(old), Some(top)) => {
            let mut now = images.resolve(spec)?;
            if let Some(first) = now.trees.first_mut() {
                first.clone_from(top);
            }
            Root { digest: old.digest.clone(), ..now }
        }
        _ => images.resolve(spec)?,
    };
    if old.as_ref() == Some(&root) {
        return Ok(root);
    }
    for tree in &root.trees {
        let before = old.as_ref().and_then(|o| o.trees.iter().find(|t| t.name == tree.name));
        make(spec, disk, tree, base).map_err(failed("making"))?;
        if let Some(before) = before.filter(|b| b.lower != tree.lower) {
            let (upper, index) =
                (disk.join("upper").join(&tree.name), disk.join("work").join(&tree.name).join("index"));
            rebase(&upper, &index, &before.lower, &tree.lower).map_err(failed("changing"))?;
        }
    }
    let text = serde_json::to_vec(&root).map_err(|e| failed("recording")(e.into()))?;
    write_whole(&dir.join(RECORD), &text, true).map_err(failed("recording"))?;
    Ok(root)
}

fn make(spec: &MachineSpec, disk: &Path, tree: &Tree, base: Option<u32>) -> io::Result<()> {
    let (upper, work) = (disk.join("upper").join(&tree.name), disk.join("work").join(&tree.name));
    fs::create_dir_all(&work)?;
    if upper.is_dir() {
        return Ok(());
    }
    // Filled aside and renamed: an upper directory that is there is complete.
    let part = disk.join("upper.part");
    fs::create_dir_all(disk.join("upper"))?;
    fs::create_dir_all(&part)?;
    remove::remove_contents(&part)?;
    let own = |path: &Path, uid: u32, gid: u32, mode: u32| {
        if let Some(base) = base {
            let number = |id: u32| base + if id < super::userns::RANGE { id } else { 65534 };
            chown(path, Some(number(uid)), Some(number(gid)))?;
        }
        fs::set_permissions(path, Permissions::from_mode(mode))
    };
    if tree.at.is_empty() {
        let etc = tree.lower.iter().map(|l| l.join("etc")).find_map(|p| fs::symlink_metadata(p).ok());
        if let Some(etc) = etc.filter(fs::Metadata::is_dir) {
            let dir = part.join("etc");
            fs::create_dir(&dir)?;
            own(&dir, etc.uid(), etc.gid(), etc.mode() & 0o7777)?;
            let name = &spec.hostname;
            for (file, content) in [("hostname", etc::hostname(name)), ("hosts", etc::hosts(name))] {
                fs::write(dir.join(file), content)?;
                own(&dir.join(file), 0, 0, 0o644)?;
            }
        }
    }
    own(&part, tree.uid, tree.gid, tree.mode)?;
    fs::rename(part, upper)
}

/// Lets an upper directory accept other layers below. With nfs_export=on overlay remembers for each directory which one
/// it was copied from (an attribute, and an entry of that name in its index), and merges it with no other; a directory
/// without that memory it takes as it is. Only directories that one of the layers (all but the last: the mask) has of
/// its own are concerned. The machine does not run now.
fn rebase(upper: &Path, index: &Path, before: &[PathBuf], after: &[PathBuf]) -> io::Result<()> {
    let mut concerned = BTreeSet::from([PathBuf::new()]);
    for layer in [before, after].iter().flat_map(|l| l.split_last().map_or(&[][..], |(_, rest)| rest)) {
        let mut queue = vec![PathBuf::new()];
        while let Some(below) = queue.pop() {
            let Ok(entries) = fs::read_dir(layer.join(&below)) else { continue };
            for entry in entries {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    queue.push(below.join(entry.file_name()));
                }
            }
            concerned.insert(below);
        }
    }
    for below in concerned {
        // The guest's link must not lead us elsewhere: every component has to be a directory of the upper one.
        if below.ancestors().all(|a| fs::symlink_metadata(upper.join(a)).is_ok_and(|m| m.is_dir())) {
            forget_origin(&upper.join(below), index)?;
        }
    }
    Ok(())
}

fn forget_origin(dir: &Path, index: &Path) -> io::Result<()> {
    for name in ["trusted.overlay.origin", "user.overlay.origin"] {
        let mut origin = vec![0; 256];
        match rustix::fs::lgetxattr(dir, name, &mut origin[..]) {
            Ok(length) => origin.truncate(length),
            Err(rustix::io::Errno::NODATA | rustix::io::Errno::PERM) => continue,
            Err(e) => return Err(e.into()),
        }
        let entry: String = origin.iter().map(|byte| format!("{byte:02x}")).collect();
        match fs::remove_dir(index.join(entry)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        rustix::fs::lremovexattr(dir, name)?;
    }
    Ok(())
}
