//! INIT: what the kernel and we agree on when a mount begins.

use super::abi::{self, Opcode, init};
use super::connection::send;
use super::mount::{MountError, MountOptions};
use super::request;
use crate::errno::Errno;
use rustix::fd::BorrowedFd;
use rustix::io;
use zerocopy::{FromBytes, IntoBytes};

/// Largest WRITE and READ, in bytes. More needs `fs.fuse.max_pages_limit` raised.
pub const MAX_WRITE: u32 = 1024 * 1024;

/// Bytes for one request: the data of a WRITE, and room for its header.
pub const BUFFER: usize = MAX_WRITE as usize + 4096;

/// One mount serves all machines: the read-ahead of one that hangs must not take all the places.
const MAX_BACKGROUND: u16 = 8192;
const CONGESTION_THRESHOLD: u16 = 6144;

/// What is asked for, each where the kernel has it.
///
/// Left out on purpose: WRITEBACK_CACHE (the kernel would own size and mtime of files that a guest writes too),
/// no-open and no-opendir (they are answers with ENOSYS, kept for the whole mount), CREATE_SUPP_GROUP (its group has
/// no place in an operation: the guest's kernel sets groups), SETXATTR_EXT, POSIX_ACL (access is checked by mode
/// only; ACLs pass as attributes), SPLICE (answers come from memory).
fn wanted(options: &MountOptions) -> u64 {
    let symlinks = if options.cache_symlinks { init::CACHE_SYMLINKS } else { 0 };
    init::ASYNC_READ
        | init::POSIX_LOCKS
        | init::ATOMIC_O_TRUNC
        | init::EXPORT_SUPPORT
        | init::BIG_WRITES
        | init::DONT_MASK
        | init::FLOCK_LOCKS
        | init::AUTO_INVAL_DATA
        | init::DO_READDIRPLUS
        | init::READDIRPLUS_AUTO
        | init::ASYNC_DIO
        | init::PARALLEL_DIROPS
        | init::ABORT_ERROR
        | init::MAX_PAGES
        | symlinks
        | init::HANDLE_KILLPRIV_V2
        | init::INIT_EXT
        | init::HAS_EXPIRE_ONLY
        | init::DIRECT_IO_ALLOW_MMAP
        | init::HAS_RESEND
}

/// Reads INIT, which the kernel sends with the mount, and answers it. Gives the kernel's minor version.
pub fn negotiate(device: BorrowedFd<'_>, options: &MountOptions) -> Result<u32, MountError> {
    let mut buffer = vec![0; BUFFER];
    let length = loop {
        match io::read(device, &mut buffer) {
            Ok(length) => break length,
            Err(io::Errno::INTR | io::Errno::AGAIN | io::Errno::NOENT) => {}
            Err(error) => return Err(MountError::system("read of /dev/fuse", error)),
        }
    };
    let message = buffer.get(..length).unwrap_or_default();
    let (header, body) = request::split(message).map_err(|_| MountError::Protocol("a request of a wrong length"))?;
    if Opcode::from_number(header.opcode) != Some(Opcode::Init) {
        return Err(MountError::Protocol("another request before INIT"));
    }
    let (input, rest) =
        abi::InitIn::read_from_prefix(body).map_err(|_| MountError::Protocol("INIT of a wrong length"))?;
    if input.major != abi::MAJOR || input.minor < abi::OLDEST_MINOR {
        let _ = send(device, header.unique, -Errno::EPROTO.0, [&[], &[], &[]]);
        return Err(MountError::KernelTooOld { major: input.major, minor: input.minor });
    }
    let mut offered = u64::from(input.flags);
    if offered & init::INIT_EXT != 0
        && let Ok((ext, _)) = abi::InitInExt::read_from_prefix(rest)
    {
        offered |= u64::from(ext.flags2) << 32;
    }
    let agreed = offered & wanted(options);
    let out = abi::InitOut {
        major: abi::MAJOR,
        minor: abi::MINOR.min(input.minor),
        max_readahead: input.max_readahead,
        flags: agreed as u32,
        max_background: MAX_BACKGROUND,
        congestion_threshold: CONGESTION_THRESHOLD,
        max_write: MAX_WRITE,
        time_gran: 1,
        max_pages: (MAX_WRITE as usize / rustix::param::page_size()) as u16,
        flags2: (agreed >> 32) as u32,
        ..Default::default()
    };
    send(device, header.unique, 0, [out.as_bytes(), &[], &[]])
        .map_err(|error| MountError::system("answer to INIT", error))?;
    tracing::debug!(
        kernel = format_args!("{}.{}", input.major, input.minor),
        missing = format_args!("{:#x}", wanted(options) & !offered),
        "FUSE session begins"
    );
    Ok(input.minor)
}
