//! The data of open files.

use super::open::OpenFile;
use super::{Cancelled, FileService};
use rustix::buffer::spare_capacity;
use rustix::fs::{FallocateFlags, SeekFrom, copy_file_range, fallocate, fdatasync, fsync, seek, syncfs};
use rustix::io::{Errno, pread, pwrite};
use std::os::fd::OwnedFd;

/// The most one read may ask for, in bytes.
const MAX_READ: u32 = 1 << 20;
/// The most one call copies inside the guest, in bytes: a deadline should be able to end a long copy in between.
const MAX_COPY: u64 = 128 << 20;
/// The piece in which data is copied by hand, in bytes.
const PIECE: usize = 1 << 20;
/// `SEEK_DATA` and `SEEK_HOLE` of lseek(2).
const SEEK_DATA: u32 = 3;
const SEEK_HOLE: u32 = 4;

/// File offsets are signed for the kernel.
fn check_range(offset: u64, len: u64) -> Result<(), Errno> {
    match offset.checked_add(len) {
        Some(end) if i64::try_from(end).is_ok() => Ok(()),
        _ => Err(Errno::INVAL),
    }
}

impl FileService {
    pub(super) fn read(&self, fh: u64, offset: u64, size: u32) -> Result<Vec<u8>, Errno> {
        if size > MAX_READ {
            return Err(Errno::INVAL);
        }
        check_range(offset, size.into())?;
        let file = self.file(fh)?;
        let mut data = Vec::with_capacity(size as usize);
        fill(&file, &mut data, offset, size as usize)?;
        Ok(data)
    }

    pub(super) fn write(&self, fh: u64, offset: u64, data: &[u8], kill_suidgid: bool) -> Result<u32, Errno> {
        check_range(offset, data.len() as u64).map_err(|_| Errno::FBIG)?;
        let file = self.file(fh)?;
        if kill_suidgid {
            self.kill_suidgid(&file.node, &file.fd)?;
        }
        let written = write_all(&file.fd, data, offset)?;
        u32::try_from(written).map_err(|_| Errno::INVAL)
    }

    pub(super) fn fsync(&self, fh: u64, data_only: bool) -> Result<(), Errno> {
        let fd = match self.handles.get(fh).ok_or(Errno::BADF)? {
            super::open::Handle::File(file) => file.fd.clone(),
            super::open::Handle::Dir(dir) => dir.fd.clone(),
        };
        if data_only { fdatasync(&fd) } else { fsync(&fd) }
    }

    /// syncfs(2) of the root's file system.
    pub(super) fn sync_fs(&self) -> Result<(), Errno> {
        syncfs(&self.root_dir)
    }

    pub(super) fn fallocate(&self, fh: u64, offset: u64, len: u64, mode: u32) -> Result<(), Errno> {
        check_range(offset, 0)?;
        check_range(len, 0)?;
        fallocate(&self.file(fh)?.fd, FallocateFlags::from_bits_retain(mode), offset, len)
    }

    pub(super) fn seek(&self, fh: u64, offset: u64, whence: u32) -> Result<u64, Errno> {
        check_range(offset, 0).map_err(|_| Errno::NXIO)?;
        let to = match whence {
            SEEK_DATA => SeekFrom::Data(offset),
            SEEK_HOLE => SeekFrom::Hole(offset),
            _ => return Err(Errno::INVAL),
        };
        // It moves the descriptor's own position, which nothing uses.
        seek(&self.file(fh)?.fd, to)
    }

    /// copy_file_range(2), by hand where the kernel does not do it (between file systems, from procfs).
    pub(super) fn copy_range(
        &self,
        (from, from_offset): (u64, u64),
        (to, to_offset): (u64, u64),
        len: u64,
        cancel: &dyn Cancelled,
    ) -> Result<u32, Errno> {
        let len = len.min(MAX_COPY);
        check_range(from_offset, len)?;
        check_range(to_offset, len)?;
        let (source, target) = (self.file(from)?, self.file(to)?);
        if source.node.id == target.node.id && from_offset < to_offset + len && to_offset < from_offset + len {
            return Err(Errno::INVAL);
        }
        // The kernel takes the size of a file of procfs, 0, for its end.
        if source.node.steady {
            let (mut input, mut output) = (from_offset, to_offset);
            match copy_file_range(&source.fd, Some(&mut input), &target.fd, Some(&mut output), len as usize) {
                Ok(copied) => return u32::try_from(copied).map_err(|_| Errno::INVAL),
                Err(Errno::XDEV | Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS) => {}
                Err(errno) => return Err(errno),
            }
        }
        let mut copied = 0;
        let mut data = Vec::new();
        while copied < len {
            data.clear();
            let piece = PIECE.min((len - copied) as usize);
            data.reserve_exact(piece);
            let moved = fill(&source, &mut data, from_offset + copied, piece)
                .and_then(|()| write_all(&target.fd, &data, to_offset + copied));
            match moved {
                Ok(written) => copied += written as u64,
                Err(errno) if copied == 0 => return Err(errno),
                Err(_) => break,
            }
            if data.is_empty() {
                break;
            }
            if cancel.is_cancelled() {
                if copied == 0 {
                    return Err(Errno::INTR);
                }
                break;
            }
        }
        u32::try_from(copied).map_err(|_| Errno::INVAL)
    }
}

/// Reads `size` bytes into the empty vector, which has room for them, or up to the end of the file.
fn fill(file: &OpenFile, data: &mut Vec<u8>, offset: u64, size: usize) -> Result<(), Errno> {
    while data.len() < size {
        let at = offset + data.len() as u64;
        match pread(&file.fd, spare_capacity(data), at) {
            Ok(0) => break,
            Ok(_) if file.node.steady => break,
            Ok(_) => {}
            Err(errno) if data.is_empty() => return Err(errno),
            // What was read is delivered; the next read meets the error again.
            Err(_) => break,
        }
    }
    // The vector may have had more room than it was asked to.
    data.truncate(size);
    Ok(())
}

/// Writes all of it, or as much as there is room for; an error only when nothing was written.
fn write_all(fd: &OwnedFd, data: &[u8], offset: u64) -> Result<usize, Errno> {
    let mut written = 0;
    loop {
        let rest = data.get(written..).unwrap_or_default();
        match pwrite(fd, rest, offset + written as u64) {
            Ok(0) => return Ok(written),
            Ok(count) => written += count,
            Err(errno) if written == 0 => return Err(errno),
            Err(_) => return Ok(written),
        }
        if written >= data.len() {
            return Ok(written);
        }
    }
}
