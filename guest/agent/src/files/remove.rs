//! Names that go or change: unlink, rmdir, rename.
//!
//! Each looks at what the name means before it goes, since afterwards a file the host still holds can be found no
//! more; it is then pinned by the descriptor of that look.

use super::FileService;
use super::attr::stat;
use super::identity::Key;
use super::nodes::Node;
use super::resolve::check_name;
use rustix::fs::{AtFlags, RenameFlags, renameat_with, unlinkat};
use rustix::io::Errno;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

impl FileService {
    pub(super) fn unlink(&self, parent: u64, name: &[u8], flags: AtFlags) -> Result<(), Errno> {
        check_name(name)?;
        let (dir, dir_fd) = self.directory(parent)?;
        let (fd, key) = self.peek(&dir_fd, name)?;
        unlinkat(&dir_fd, name, flags)?;
        self.gone(&fd, &key, &dir, name);
        Ok(())
    }

    /// renameat2(2). EINVAL for flags it does not know.
    pub(super) fn rename(&self, from: (u64, &[u8]), to: (u64, &[u8]), flags: u32) -> Result<(), Errno> {
        let (name, new_name) = (from.1, to.1);
        check_name(name)?;
        check_name(new_name)?;
        let flags = RenameFlags::from_bits_retain(flags);
        let known = RenameFlags::NOREPLACE | RenameFlags::EXCHANGE | RenameFlags::WHITEOUT;
        if !known.contains(flags) {
            return Err(Errno::INVAL);
        }
        let (dir, dir_fd) = self.directory(from.0)?;
        let (new_dir, new_dir_fd) = self.directory(to.0)?;
        let (_moved_fd, moved) = self.peek(&dir_fd, name)?;
        let other = self.peek(&new_dir_fd, new_name).ok();
        renameat_with(&dir_fd, name, &new_dir_fd, new_name, flags)?;
        if let Some(node) = self.find(&moved) {
            node.set_link(&new_dir, new_name);
        }
        if let Some((fd, key)) = other {
            if flags.contains(RenameFlags::EXCHANGE) {
                if let Some(node) = self.find(&key) {
                    node.set_link(&dir, name);
                }
            } else if key.as_bytes() != moved.as_bytes() {
                // Two names of one file both stay.
                self.gone(&fd, &key, &new_dir, new_name);
            }
        }
        Ok(())
    }

    /// A name of that file has just gone.
    fn gone(&self, fd: &Arc<OwnedFd>, key: &Key, dir: &Arc<Node>, name: &[u8]) {
        let Some(node) = self.find(key) else { return };
        // A directory has one name only, whatever its file system counts.
        if node.is_dir() || stat(fd.as_fd()).map_or(0, |stx| stx.stx_nlink) == 0 {
            self.pin(&node, fd);
            return;
        }
        // It has other names, unknown to us: a path walk finds one if the descriptor should go.
        let mut place = node.place();
        let stale = match &place.link {
            Some(link) if Arc::ptr_eq(&link.parent, dir) && *link.name == *name => place.link.take(),
            _ => None,
        };
        drop(place);
        if stale.is_some() {
            self.cache.put(&node, fd.clone());
        }
    }
}
