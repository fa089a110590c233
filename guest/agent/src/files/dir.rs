//! Directory listings, page by page, straight from getdents64(2). A cookie is the kernel's own `d_off`, so that it
//! stays good while the directory changes.

use super::FileService;
use super::attr::{device_of, stat};
use super::nodes::Node;
use super::open::{Handle, Slot};
use machinefs_protocol::file::{DirEntry, DirPage};
use parking_lot::Mutex;
use rustix::fs::{FileType, Mode, OFlags, RawDir, SeekFrom, openat, seek};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

/// The largest page, in bytes.
const MAX_PAGE: u32 = 256 * 1024;
/// What one getdents64(2) may give, in bytes.
const BUFFER: usize = 32 * 1024;
/// More than an encoded entry can take beside its name: numbers take 10 bytes at most.
const PLAIN_SIZE: usize = 32;
/// The same with a node and its attributes.
const PLUS_SIZE: usize = 224;

/// An open directory.
pub(super) struct OpenDir {
    pub(super) node: Arc<Node>,
    pub(super) fd: Arc<OwnedFd>,
    /// Its device, which its entries' inode numbers belong to.
    device: u64,
    state: Mutex<Listing>,
    _slot: Slot,
}

/// How far a directory has been read.
#[derive(Default)]
struct Listing {
    /// The cookie of the last entry that was given.
    position: u64,
    /// What the kernel gave and no page took yet.
    pending: VecDeque<Pending>,
}

struct Pending {
    cookie: u64,
    ino: u64,
    kind: FileType,
    name: Box<[u8]>,
}

impl FileService {
    pub(super) fn open_dir(&self, id: u64, max: u32, plus: bool) -> Result<(u64, DirPage, Vec<u8>), Errno> {
        self.check_room()?;
        let (node, place) = self.directory(id)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = Arc::new(self.with_room(|| openat(&place, c".", flags, Mode::empty()))?);
        let device = device_of(&stat(fd.as_fd())?);
        let dir = Arc::new(OpenDir { node, fd, device, state: Mutex::default(), _slot: Slot::new(&self.open_handles) });
        let (page, body) = self.page(&dir, 0, max, plus)?;
        self.note_open(&dir.node, &dir.fd);
        Ok((self.add_handle(Handle::Dir(dir)), page, body))
    }

    pub(super) fn read_dir(&self, fh: u64, cookie: u64, max: u32, plus: bool) -> Result<(DirPage, Vec<u8>), Errno> {
        match self.handles.get(fh) {
            Some(Handle::Dir(dir)) => self.page(&dir, cookie, max, plus),
            _ => Err(Errno::BADF),
        }
    }

    fn page(&self, dir: &OpenDir, cookie: u64, max: u32, plus: bool) -> Result<(DirPage, Vec<u8>), Errno> {
        let mut state = dir.state.lock();
        if state.position != cookie {
            i64::try_from(cookie).map_err(|_| Errno::INVAL)?;
            state.pending.clear();
            seek(&dir.fd, SeekFrom::Start(cookie))?;
            state.position = cookie;
        }
        let max = max.min(MAX_PAGE) as usize;
        let mut body = Vec::with_capacity(max.min(BUFFER));
        let mut count = 0;
        let end = loop {
            let Some(next) = state.pending.front() else { if dir.fill(&mut state)? { continue } else { break true } };
            if body.len() + next.name.len() + if plus { PLUS_SIZE } else { PLAIN_SIZE } > max {
                if count == 0 {
                    return Err(Errno::INVAL);
                }
                break false;
            }
            self.encode(dir, next, plus, &mut body)?;
            count += 1;
            state.position = next.cookie;
            state.pending.pop_front();
        };
        Ok((DirPage { count, end }, body))
    }

    fn encode(&self, dir: &OpenDir, next: &Pending, plus: bool, body: &mut Vec<u8>) -> Result<(), Errno> {
        let dots = *next.name == *b"." || *next.name == *b"..";
        // One that cannot be looked up (it may be gone already) is still in the listing.
        let entry =
            if plus && !dots { self.hold_name(&dir.node, &dir.fd, &next.name).ok().map(|held| held.1) } else { None };
        let ino = entry.map_or_else(|| self.inodes.number(dir.device, next.ino), |entry| entry.attr.ino);
        let kind = entry.map_or(next.kind, |entry| FileType::from_raw_mode(entry.attr.mode));
        let entry = DirEntry { cookie: next.cookie, ino, kind: dirent_type(kind), name: &next.name, entry };
        let mut buffer = [0; 255 + PLUS_SIZE];
        match postcard::to_slice(&entry, &mut buffer) {
            Ok(bytes) => body.extend_from_slice(bytes),
            Err(_) => {
                if let Some(entry) = entry.entry {
                    self.table.forget(entry.node, 1);
                }
                return Err(Errno::OVERFLOW);
            }
        }
        Ok(())
    }
}

impl OpenDir {
    /// Reads on; false at the end of the directory.
    fn fill(&self, state: &mut Listing) -> Result<bool, Errno> {
        let mut buffer = Vec::with_capacity(BUFFER);
        let buffer: &mut [MaybeUninit<u8>] = buffer.spare_capacity_mut();
        let mut entries = RawDir::new(&self.fd, buffer);
        while let Some(entry) = entries.next() {
            let entry = match entry {
                // The directory was removed: nothing is in it any more.
                Err(Errno::NOENT) => return Ok(false),
                entry => entry?,
            };
            state.pending.push_back(Pending {
                cookie: entry.next_entry_cookie(),
                ino: entry.ino(),
                kind: entry.file_type(),
                name: entry.file_name().to_bytes().into(),
            });
            if entries.is_buffer_empty() {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// `DT_…` of readdir(3).
fn dirent_type(kind: FileType) -> u8 {
    match kind {
        FileType::Fifo => libc::DT_FIFO,
        FileType::CharacterDevice => libc::DT_CHR,
        FileType::Directory => libc::DT_DIR,
        FileType::BlockDevice => libc::DT_BLK,
        FileType::RegularFile => libc::DT_REG,
        FileType::Symlink => libc::DT_LNK,
        FileType::Socket => libc::DT_SOCK,
        _ => libc::DT_UNKNOWN,
    }
}
