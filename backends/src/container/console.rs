//! The machine's console: what its init and the runtime print. The guest writes into a FIFO that both ends keep open
//! for reading and writing, never blocking: at most one pipe buffer (64 KiB) waits there, a full one drops what comes,
//! nobody gets SIGPIPE, and it outlives the daemon. The host moves it into a file of bounded size whenever it looks.

use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat, open};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::Path;

/// The most that is kept, in bytes; of more, the newest half.
const KEEP: usize = 256 * 1024;
const FIFO: &str = "console.fifo";
const LOG: &str = "console.log";

/// Opens the FIFO for both ends, making it when it is not there. `owner` is who may open it anew from within
/// (/dev/stdout and /dev/stderr are links to it).
pub(super) fn open_fifo(dir: &Path, owner: Option<(u32, u32)>) -> io::Result<OwnedFd> {
    let path = dir.join(FIFO);
    match mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => {}
        Err(e) => return Err(e.into()),
    }
    if let Some((uid, gid)) = owner {
        std::os::unix::fs::lchown(&path, Some(uid), Some(gid))?;
    }
    Ok(open(&path, OFlags::RDWR | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?)
}

/// Moves what waits in the FIFO into the file, and gives what is kept. What the guest wrote: any bytes.
pub(super) fn collect(dir: &Path) -> io::Result<Vec<u8>> {
    let mut kept = match fs::read(dir.join(LOG)) {
        Ok(kept) => kept,
        Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(e) => return Err(e),
    };
    let before = kept.len();
    let mut fifo: File = match open(dir.join(FIFO), OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty()) {
        Ok(fifo) => fifo.into(),
        Err(rustix::io::Errno::NOENT) => return Ok(kept),
        Err(e) => return Err(e.into()),
    };
    let mut buffer = [0; 16 * 1024];
    // A guest that writes without pause must not keep us here.
    for _ in 0..16 {
        match fifo.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => kept.extend_from_slice(buffer.get(..n).unwrap_or_default()),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    if kept.len() != before {
        if kept.len() > KEEP {
            kept.drain(..kept.len() - KEEP / 2);
        }
        fs::write(dir.join(LOG), &kept)?;
    }
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn output_is_kept_and_bounded() {
        let tmp = tempfile::tempdir().unwrap();
        assert_eq!(collect(tmp.path()).unwrap(), b"");
        let mut guest = File::from(open_fifo(tmp.path(), None).unwrap());
        guest.write_all(b"hello\0\xff").unwrap();
        assert_eq!(collect(tmp.path()).unwrap(), b"hello\0\xff");
        assert_eq!(collect(tmp.path()).unwrap(), b"hello\0\xff");
        for _ in 0..200 {
            while guest.write(&[b'x'; 4096]).is_ok() {}
            assert!(collect(tmp.path()).unwrap().len() <= KEEP);
        }
    }
}
