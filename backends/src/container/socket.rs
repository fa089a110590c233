//! The agent's listening socket. It is made by the host, in a directory that no guest can reach, and handed down: a
//! path in the guest's reach could be replaced by a symbolic link.
//!
//! A unix socket's path may be 108 bytes at most (unix(7)); state directories are longer at times. So the directory is
//! opened, and the socket named through /proc/self/fd.

use rustix::fs::{Mode, OFlags, open};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with};
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

/// Connections that may wait for the agent's accept.
const BACKLOG: i32 = 128;

fn address(dir: &OwnedFd, name: &str) -> io::Result<(SocketAddrUnix, PathBuf)> {
    let path = PathBuf::from(format!("/proc/self/fd/{}/{name}", dir.as_raw_fd()));
    Ok((SocketAddrUnix::new(&path)?, path))
}

fn open_dir(dir: &Path) -> io::Result<OwnedFd> {
    Ok(open(dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

/// Makes a listening socket `name` in `dir`, mode 0600; one that is there already is replaced.
pub(super) fn listen_at(dir: &Path, name: &str) -> io::Result<OwnedFd> {
    let at = open_dir(dir)?;
    let (address, path) = address(&at, name)?;
    match fs::remove_file(&path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    bind(&socket, &address)?;
    // Nobody can get here before the mode is set: the directory is 0700.
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
    listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// Connects to the socket `name` in `dir`; never waits: a full backlog is EAGAIN.
pub(super) fn connect_at(dir: &Path, name: &str) -> io::Result<UnixStream> {
    let at = open_dir(dir)?;
    let (address, _) = address(&at, name)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &address)?;
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_long_path_works() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = tmp.path().join("d".repeat(100)).join("e".repeat(100));
        fs::create_dir_all(&dir).unwrap();
        assert!(connect_at(&dir, "s").is_err());
        drop(listen_at(&dir, "s").unwrap());
        assert_eq!(connect_at(&dir, "s").unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        let listener = UnixListener::from(listen_at(&dir, "s").unwrap());
        let mut client = connect_at(&dir, "s").unwrap();
        let (mut server, _) = listener.accept().unwrap();
        client.write_all(b"x").unwrap();
        let mut byte = [0];
        server.read_exact(&mut byte).unwrap();
        assert_eq!(fs::metadata(dir.join("s")).unwrap().permissions().mode() & 0o777, 0o600);
    }
}
