//! A tar of a root directory, unpacked once for its content.
//!
//! The members' names are the archive's maker's: each is resolved inside the new root by openat2(2) with
//! RESOLVE_IN_ROOT, so that neither `..`, an absolute name nor a symbolic link made by an earlier member leads out.

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags, chownat, fchmod,
    linkat, mkdirat, mknodat, openat2, symlinkat, unlinkat, utimensat,
};
use sha2::{Digest, Sha256};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read, Seek};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use tar::{Archive, Entry, EntryType};

/// The root unpacked from `archive` in the cache `cache`, and the archive's digest. Unpacks when it is not there.
pub(super) fn unpacked(archive: &Path, cache: &Path) -> io::Result<(PathBuf, String)> {
    let mut file = File::open(archive)?;
    let digest = digest(&mut file)?;
    let root = cache.join(&digest);
    if !root.exists() {
        // One at a time; whoever comes second finds it done.
        let lock = File::create(cache.join("lock"))?;
        lock.lock()?;
        if !root.exists() {
            file.rewind()?;
            unpack_into(&file, cache, &root)?;
        }
    }
    Ok((root, digest.replacen('-', ":", 1)))
}

fn digest(file: &mut File) -> io::Result<String> {
    let mut hash = Sha256::new();
    io::copy(file, &mut hash)?;
    let hex: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(format!("sha256-{hex}"))
}

fn unpack_into(file: &File, cache: &Path, root: &Path) -> io::Result<()> {
    let part = cache.join("unpacking");
    remove(&part)?;
    fs::create_dir(&part)?;
    let result = unpack(decoder(file)?, &part).and_then(|()| {
        // On disk before it has its name: a name that is there is taken for the whole.
        rustix::fs::syncfs(File::open(&part)?)?;
        fs::rename(&part, root)
    });
    if result.is_err() {
        remove(&part)?;
    }
    result
}

fn remove(dir: &Path) -> io::Result<()> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// By the first bytes: gzip (RFC 1952), zstd (RFC 8878), or neither.
fn decoder(mut file: &File) -> io::Result<Box<dyn Read + '_>> {
    let mut magic = [0; 4];
    let n = file.read(&mut magic)?;
    file.rewind()?;
    let buffered = io::BufReader::with_capacity(1 << 17, file);
    Ok(match magic.get(..n).unwrap_or_default() {
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(buffered)),
        [0x28, 0xb5, 0x2f, 0xfd] => Box::new(zstd::Decoder::with_buffer(buffered)?),
        _ => Box::new(buffered),
    })
}

/// A root being filled.
struct Target {
    root: OwnedFd,
    /// Numbers of the archive are set as owners; an ordinary user owns all they unpack.
    owners: bool,
    /// Times of directories, set when nothing is made in them any more.
    times: Vec<(PathBuf, i64)>,
}

fn unpack(stream: impl Read, into: &Path) -> io::Result<()> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(into, flags, Mode::empty())?;
    fs::set_permissions(into, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let mut target = Target { root, owners: rustix::process::geteuid().is_root(), times: Vec::new() };
    let mut archive = Archive::new(stream);
    let mut any = false;
    // The words of the crate quote what it read: in a file that is no tar, a piece of a file of the host.
    let damaged = |e: io::Error| match e.raw_os_error() {
        Some(_) => e,
        None => io::Error::new(io::ErrorKind::InvalidData, "is no tar (plain, gzip or zstd), or a damaged one"),
    };
    for entry in archive.entries()? {
        let mut entry = entry.map_err(damaged)?;
        let name = entry.path_bytes().into_owned();
        let in_member = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", String::from_utf8_lossy(&name)));
        target.member(&mut entry, Path::new(OsStr::from_bytes(&name))).map_err(in_member)?;
        any = true;
    }
    if !any {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "is no tar, or an empty one"));
    }
    for (path, seconds) in std::mem::take(&mut target.times).into_iter().rev() {
        if let Ok(dir) = target.open(&path) {
            set_time(&dir, seconds)?;
        }
    }
    Ok(())
}

fn set_time(fd: &OwnedFd, seconds: i64) -> io::Result<()> {
    let time = Timespec { tv_sec: seconds, tv_nsec: 0 };
    Ok(utimensat(fd, "", &Timestamps { last_access: time, last_modification: time }, AtFlags::EMPTY_PATH)?)
}

impl Target {
    /// Resolves a path inside the root, last component not followed.
    fn open(&self, path: &Path) -> io::Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(openat2(&self.root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS)?)
    }

    /// The directory a member is in, made when the archive did not mention it; and the member's name in it. `None` for
    /// the root itself.
    fn place<'a>(&self, path: &'a Path) -> io::Result<Option<(OwnedFd, &'a OsStr)>> {
        let bad = || io::Error::new(io::ErrorKind::InvalidData, "a name that leads out of the archive");
        let mut parts = Vec::new();
        for part in path.components() {
            match part {
                Component::Normal(name) => parts.push(name),
                Component::CurDir | Component::RootDir => {}
                Component::ParentDir | Component::Prefix(_) => return Err(bad()),
            }
        }
        let Some(name) = parts.pop() else { return Ok(None) };
        let parent: PathBuf = parts.iter().collect();
        let parent = if parent.as_os_str().is_empty() { PathBuf::from(".") } else { parent };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let dir = match openat2(&self.root, &parent, flags, Mode::empty(), resolve) {
            Err(rustix::io::Errno::NOENT) => {
                let (above, name) = self.place(&parent)?.ok_or_else(bad)?;
                match mkdirat(&above, name, Mode::from_raw_mode(0o755)) {
                    Ok(()) | Err(rustix::io::Errno::EXIST) => {}
                    Err(e) => return Err(e.into()),
                }
                openat2(&self.root, &parent, flags, Mode::empty(), resolve)?
            }
            other => other?,
        };
        Ok(Some((dir, name)))
    }

    fn member(&mut self, entry: &mut Entry<'_, impl Read>, path: &Path) -> io::Result<()> {
        let kind = entry.header().entry_type();
        let mode = entry.header().mode()? & 0o7777;
        let Some((dir, name)) = self.place(path)? else {
            let root = self.open(Path::new("."))?;
            return self.finish(&root, entry, mode);
        };
        if kind != EntryType::Directory {
            match unlinkat(&dir, name, AtFlags::empty()) {
                Ok(()) | Err(rustix::io::Errno::NOENT) => {}
                Err(e) => return Err(e.into()),
            }
        }
        match kind {
            EntryType::Directory => {
                match mkdirat(&dir, name, Mode::from_raw_mode(0o700)) {
                    Ok(()) | Err(rustix::io::Errno::EXIST) => {}
                    Err(e) => return Err(e.into()),
                }
                self.times.push((path.to_owned(), seconds(entry)));
            }
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let file = rustix::fs::openat(&dir, name, flags, Mode::from_raw_mode(0o600))?;
                io::copy(entry, &mut File::from(file))?;
            }
            EntryType::Symlink => {
                let link = entry.link_name_bytes().unwrap_or_default();
                symlinkat(link.as_ref(), &dir, name)?;
            }
            EntryType::Link => {
                // Names of hard links are of the archive, as those of members are.
                let link = entry.link_name_bytes().unwrap_or_default().into_owned();
                let Some((from, old)) = self.place(Path::new(OsStr::from_bytes(&link)))? else {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, "a hard link to the root"));
                };
                return Ok(linkat(&from, old, &dir, name, AtFlags::empty())?);
            }
            EntryType::Fifo => mknodat(&dir, name, FileType::Fifo, Mode::from_raw_mode(0o600), 0)?,
            // A machine has the runtime's devices in its own /dev; those of an image would act on the host's.
            EntryType::Char | EntryType::Block => return Ok(()),
            // What is not a member (headers of pax and GNU) has been read by the crate.
            _ => return Ok(()),
        }
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let made = rustix::fs::openat(&dir, name, flags, Mode::empty())?;
        self.finish(&made, entry, mode)
    }

    /// Owner, then mode (a change of owner clears set-user-ID), then the attributes and times.
    fn finish(&self, made: &OwnedFd, entry: &mut Entry<'_, impl Read>, mode: u32) -> io::Result<()> {
        if self.owners {
            let number = |id: u64| u32::try_from(id).ok().filter(|id| *id < u32::MAX).unwrap_or(65534);
            let (uid, gid) = (number(entry.header().uid()?), number(entry.header().gid()?));
            chownat(made, "", Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)), AtFlags::EMPTY_PATH)?;
        }
        let kind = entry.header().entry_type();
        if kind != EntryType::Symlink {
            let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(made));
            if kind == EntryType::Regular || kind == EntryType::Directory {
                let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
                // The link of /proc leads to what was made, whatever its name is by now.
                fchmod(rustix::fs::open(&path, flags, Mode::empty())?, Mode::from_raw_mode(mode))?;
            } else {
                rustix::fs::chmodat(CWD, &path, Mode::from_raw_mode(mode), AtFlags::empty())?;
            }
            if kind == EntryType::Regular {
                self.attributes(entry, &path)?;
            }
        }
        if kind != EntryType::Directory {
            set_time(made, seconds(entry))?;
        }
        Ok(())
    }

    /// File capabilities, which programs such as ping have instead of set-user-ID; other attributes are the host's
    /// business (`trusted.`, `security.selinux`) or nobody's.
    fn attributes(&self, entry: &mut Entry<'_, impl Read>, path: &str) -> io::Result<()> {
        let Some(extensions) = entry.pax_extensions()? else { return Ok(()) };
        for extension in extensions {
            let extension = extension?;
            let Some(name) = extension.key_bytes().strip_prefix(b"SCHILY.xattr.") else { continue };
            let user = name.starts_with(b"user.") && !name.starts_with(b"user.overlay.");
            if user || (self.owners && name == b"security.capability") {
                rustix::fs::setxattr(path, name, extension.value_bytes(), XattrFlags::empty())?;
            }
        }
        Ok(())
    }
}

fn seconds(entry: &Entry<'_, impl Read>) -> i64 {
    entry.header().mtime().ok().and_then(|t| i64::try_from(t).ok()).unwrap_or(0)
}
