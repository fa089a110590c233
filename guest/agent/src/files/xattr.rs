//! Extended attributes, by way of /proc: the calls take no descriptor that is open as a place only.

use super::FileService;
use machinefs_protocol::file::FileReply;
use rustix::buffer::spare_capacity;
use rustix::fs::{XattrFlags, getxattr, getxattr_query, listxattr, listxattr_query, removexattr, setxattr};
use rustix::io::Errno;
use std::os::fd::{AsRawFd, OwnedFd};

/// The largest value, and the largest list of names, in bytes (`XATTR_SIZE_MAX`, `XATTR_LIST_MAX`).
const XATTR_MAX: u32 = 65536;

/// A path that leads to the file behind a descriptor, even when that is a symlink, and no further.
pub(super) fn proc_path(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

fn count(size: usize) -> Result<(FileReply, Vec<u8>), Errno> {
    Ok((FileReply::Count(u32::try_from(size).map_err(|_| Errno::RANGE)?), Vec::new()))
}

impl FileService {
    pub(super) fn get_xattr(&self, id: u64, name: &[u8], max: u32) -> Result<(FileReply, Vec<u8>), Errno> {
        let fd = self.descriptor(&self.node(id)?)?;
        if max == 0 {
            return count(getxattr_query(proc_path(&fd), name)?);
        }
        let mut value = Vec::with_capacity(max.min(XATTR_MAX) as usize);
        getxattr(proc_path(&fd), name, spare_capacity(&mut value))?;
        if value.len() > max as usize { Err(Errno::RANGE) } else { Ok((FileReply::Data, value)) }
    }

    pub(super) fn list_xattr(&self, id: u64, max: u32) -> Result<(FileReply, Vec<u8>), Errno> {
        let fd = self.descriptor(&self.node(id)?)?;
        if max == 0 {
            return count(listxattr_query(proc_path(&fd))?);
        }
        let mut names = Vec::with_capacity(max.min(XATTR_MAX) as usize);
        listxattr(proc_path(&fd), spare_capacity(&mut names))?;
        if names.len() > max as usize { Err(Errno::RANGE) } else { Ok((FileReply::Data, names)) }
    }

    pub(super) fn set_xattr(&self, id: u64, name: &[u8], flags: u32, value: &[u8]) -> Result<(), Errno> {
        let fd = self.descriptor(&self.node(id)?)?;
        setxattr(proc_path(&fd), name, value, XattrFlags::from_bits_retain(flags))
    }

    pub(super) fn remove_xattr(&self, id: u64, name: &[u8]) -> Result<(), Errno> {
        let fd = self.descriptor(&self.node(id)?)?;
        removexattr(proc_path(&fd), name)
    }
}
