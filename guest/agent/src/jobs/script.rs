//! Scripts too long for an argument, or with an interpreter of their own: a file for the time of the job.

use super::{JobError, users::User};
use rustix::fs::{FileType, Gid, MemfdFlags, Mode, OFlags, Uid};
use std::ffi::CString;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};

/// Longest script given as an argument; the kernel's limit is 128 KiB (MAX_ARG_STRLEN, execve(2)).
pub const MAX_ARGUMENT: usize = 64 * 1024;

/// Where script files may be, by preference. Some guests forbid executing in the first ones.
const PLACES: [&str; 4] = ["/run", "/tmp", "/var/tmp", "/dev/shm"];

/// A script in a file. The name goes when this is dropped.
#[derive(Debug)]
pub enum Script {
    /// A file in a directory that only the agent's user writes to.
    File {
        /// The directory.
        dir: OwnedFd,
        /// Its name there.
        name: String,
        /// Its absolute path.
        path: CString,
    },
    /// Where no such directory can be had: a file without a name. The job's processes inherit it.
    Memory {
        /// The descriptor, to be kept open over execve(2).
        fd: OwnedFd,
        /// Its path by that number.
        path: CString,
    },
}

impl Script {
    /// Writes a script that `user` can read and, if `executable`, execute.
    ///
    /// No fork(2) may happen meanwhile: a child would keep the file open for writing, and executing it would fail
    /// with ETXTBSY.
    pub fn create(text: &[u8], unique: &str, user: &User, executable: bool) -> Result<Script, JobError> {
        let mut failure = None;
        for place in PLACES {
            match Script::in_place(place, text, unique, user, executable) {
                Ok(Some(script)) => return Ok(script),
                Ok(None) => {}
                Err(error) => failure = Some(error),
            }
        }
        let in_memory = Script::in_memory(text).map_err(|error| failure.unwrap_or(error));
        in_memory.map_err(|error| JobError::io("the script's file", &error))
    }

    /// Its path.
    pub fn path(&self) -> &CString {
        match self {
            Script::File { path, .. } | Script::Memory { path, .. } => path,
        }
    }

    /// A descriptor the job must inherit.
    pub fn inherited(&self) -> Option<i32> {
        match self {
            Script::File { .. } => None,
            Script::Memory { fd, .. } => Some(fd.as_raw_fd()),
        }
    }

    fn in_place(
        place: &str,
        text: &[u8],
        unique: &str,
        user: &User,
        executable: bool,
    ) -> std::io::Result<Option<Script>> {
        let own = rustix::process::geteuid().as_raw();
        let directory = if own == 0 { format!("{place}/machinefs") } else { format!("{place}/machinefs-{own}") };
        match rustix::fs::mkdir(&directory, Mode::from_raw_mode(0o711)) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(errno) => return Err(errno.into()),
        }
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::RDONLY;
        let dir = rustix::fs::open(&directory, flags, Mode::empty())?;
        let stat = rustix::fs::fstat(&dir)?;
        let foreign = stat.st_uid != own || FileType::from_raw_mode(stat.st_mode) != FileType::Directory;
        if foreign || stat.st_mode & 0o022 != 0 || stat.st_mode & 0o111 != 0o111 {
            return Ok(None);
        }
        let mounted = rustix::fs::fstatvfs(&dir)?;
        if executable && mounted.f_flag.contains(rustix::fs::StatVfsMountFlags::NOEXEC) {
            return Ok(None);
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&dir, unique, flags, Mode::from_raw_mode(0o500))?;
        let path = CString::new(format!("{directory}/{unique}"))?;
        // From here on the name goes with the value.
        let script = Script::File { dir, name: unique.to_owned(), path };
        let mut file = File::from(fd);
        file.write_all(text)?;
        if user.uid != own {
            rustix::fs::fchown(&file, Some(Uid::from_raw(user.uid)), Some(Gid::from_raw(user.gid)))?;
        }
        rustix::fs::fchmod(&file, Mode::from_raw_mode(0o500))?;
        Ok(Some(script))
    }

    fn in_memory(text: &[u8]) -> std::io::Result<Script> {
        // Kernels since 6.3 want to be told that it will be executed; older ones do not know the flag.
        let flags = MemfdFlags::CLOEXEC;
        let fd = rustix::fs::memfd_create("script", flags | MemfdFlags::EXEC)
            .or_else(|_| rustix::fs::memfd_create("script", flags))?;
        let mut file = File::from(fd);
        file.write_all(text)?;
        rustix::fs::fchmod(&file, Mode::from_raw_mode(0o555))?;
        let path = CString::new(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
        Ok(Script::Memory { fd: file.into(), path })
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        if let Script::File { dir, name, .. } = self {
            let _ = rustix::fs::unlinkat(&*dir, name.as_str(), rustix::fs::AtFlags::empty());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    #[test]
    fn the_file_goes_with_the_value() {
        let uid = rustix::process::geteuid().as_raw();
        let user = User { uid, gid: 0, groups: vec![], name: vec![], home: vec![], shell: vec![] };
        let text = b"#!/bin/sh\n\0\xff\n".repeat(100_000);
        let unique = format!("test-{}", std::process::id());
        let script = Script::create(&text, &unique, &user, true).unwrap();
        let path = OsStr::from_bytes(script.path().to_bytes()).to_owned();
        assert_eq!(std::fs::read(&path).unwrap(), text);
        drop(script);
        assert!(!std::path::Path::new(&path).exists());
    }

    #[test]
    fn a_script_in_memory_can_be_opened_by_its_path() {
        let script = Script::in_memory(b"exit 3").unwrap();
        let path = OsStr::from_bytes(script.path().to_bytes()).to_owned();
        assert_eq!(std::fs::read(path).unwrap(), b"exit 3");
    }
}
