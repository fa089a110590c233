//! Encoding: an answer becomes bytes, and goes to the descriptor through which its request came.

use super::abi;
use super::connection::{Channel, Undelivered};
use super::interrupt::Wait;
use crate::errno::Errno;
use crate::tree::ops::{Answer, Attr, Cancel, DirEntry, Entry, NodeId, Opened, ROOT, Respond, StatFs};
use rustix::io;
use std::sync::Arc;
use std::time::Duration;
use zerocopy::IntoBytes;

/// The kernel takes link targets up to one page, less the NUL that it appends.
const LONGEST_LINK: usize = 4095;

/// The longest name that any guest's file system has (NAME_MAX).
const LONGEST_NAME: usize = 255;

/// Limits of `st_blksize`: programs make buffers of that size, so it must not be a guest's to choose.
const BLOCK_SIZES: std::ops::RangeInclusive<u32> = 512..=1024 * 1024;

/// The form that the answer to a request must have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the limits are those of the request")]
pub enum Expect {
    Nothing,
    Entry,
    Attr,
    Statx,
    Link,
    Opened { node: NodeId },
    OpenedDir { node: NodeId },
    Created,
    Data { max: u32 },
    Written { max: u32 },
    Copied { max: u64 },
    Copied64 { max: u64 },
    Dir { max: usize, plus: bool },
    StatFs,
    Xattr { max: u32 },
    Offset { from: u64 },
    Lock,
    Ready,
}

/// Where the answer to one request goes.
pub struct Responder {
    channel: Arc<Channel>,
    unique: u64,
    expect: Expect,
    /// The request is in the table of those that can be interrupted.
    registered: bool,
    answered: bool,
    /// How long it may be left pending.
    wait: Wait,
}

impl Responder {
    /// For the request with that number, read through that channel.
    pub fn new(channel: Arc<Channel>, unique: u64, expect: Expect, wait: Wait) -> Self {
        Responder { channel, unique, expect, registered: false, answered: false, wait }
    }

    fn answer(&mut self, answer: Result<Answer, Errno>) {
        self.answered = true;
        if self.registered {
            self.channel.connection.interrupts.finished(self.unique);
        }
        let delivered = match answer {
            Ok(answer) => self.encode(answer),
            Err(errno) => self.send_error(errno),
        };
        if let Err(error) = delivered {
            log_undelivered(self.unique, error);
        }
    }

    fn send(&self, parts: [&[u8]; 3]) -> io::Result<()> {
        self.channel.send(self.unique, 0, parts)
    }

    fn send_error(&self, errno: Errno) -> io::Result<()> {
        send_error(&self.channel, self.unique, errno)
    }

    /// Sends what gives something to the kernel; it is taken back when the kernel does not want it any more.
    fn send_or_keep<const N: usize>(&self, parts: [&[u8]; 3], gives: [Option<Undelivered>; N]) -> io::Result<()> {
        let result = self.send(parts);
        if result.is_err() {
            self.channel.connection.give_back_later(gives.into_iter().flatten());
        }
        result
    }

    fn encode(&self, answer: Answer) -> io::Result<()> {
        match (self.expect, answer) {
            (Expect::Nothing, Answer::Ok) => self.send([&[], &[], &[]]),
            (Expect::Entry, Answer::Entry(entry)) if entry.node == 0 || is_valid(&entry.attr) => {
                self.send_or_keep([entry_out(&entry).as_bytes(), &[], &[]], [hold(&entry)])
            }
            (Expect::Attr, Answer::Attr(attr, ttl)) if is_valid(&attr) => {
                let (attr_valid, attr_valid_nsec) = split_ttl(ttl);
                let out = abi::GetAttrOut { attr_valid, attr_valid_nsec, dummy: 0, attr: attr_out(&attr) };
                self.send([out.as_bytes(), &[], &[]])
            }
            (Expect::Statx, Answer::Attr(attr, ttl)) if is_valid(&attr) => {
                self.send([statx_out(&attr, ttl).as_bytes(), &[], &[]])
            }
            (Expect::Link, Answer::Data(target)) if target.len() <= LONGEST_LINK => self.send([&target, &[], &[]]),
            (Expect::Link, Answer::Data(_)) => self.send_error(Errno::ENAMETOOLONG),
            (Expect::Opened { node }, Answer::Opened(opened)) => self
                .send_or_keep([open_out(&opened).as_bytes(), &[], &[]], [Some(Undelivered::File(node, opened.handle))]),
            (Expect::OpenedDir { node }, Answer::Opened(opened)) => self.send_or_keep(
                [open_out(&opened).as_bytes(), &[], &[]],
                [Some(Undelivered::Directory(node, opened.handle))],
            ),
            (Expect::Created, Answer::Created(entry, opened)) if is_file(&entry) => self.send_or_keep(
                [entry_out(&entry).as_bytes(), open_out(&opened).as_bytes(), &[]],
                [Some(Undelivered::File(entry.node, opened.handle)), hold(&entry)],
            ),
            (Expect::Data { max }, Answer::Data(data)) if data.len() <= max as usize => self.send([&data, &[], &[]]),
            (Expect::Written { max }, Answer::Count(size)) if size <= max => {
                self.send([abi::WriteOut { size, padding: 0 }.as_bytes(), &[], &[]])
            }
            (Expect::Copied { max }, Answer::Count(size)) if u64::from(size) <= max => {
                self.send([abi::WriteOut { size, padding: 0 }.as_bytes(), &[], &[]])
            }
            (Expect::Copied64 { max }, Answer::Count(size)) if u64::from(size) <= max => {
                self.send([abi::CopyFileRangeOut { bytes_copied: u64::from(size) }.as_bytes(), &[], &[]])
            }
            (Expect::Dir { max, plus }, Answer::Dir(entries)) => self.send_listing(max, plus, &entries),
            (Expect::StatFs, Answer::StatFs(figures)) => self.send([statfs_out(&figures).as_bytes(), &[], &[]]),
            (Expect::Xattr { max: 0 }, Answer::Count(size)) => {
                self.send([abi::GetXattrOut { size, padding: 0 }.as_bytes(), &[], &[]])
            }
            (Expect::Xattr { max: 0 }, Answer::Data(value)) => {
                let size = u32::try_from(value.len()).unwrap_or(u32::MAX);
                self.send([abi::GetXattrOut { size, padding: 0 }.as_bytes(), &[], &[]])
            }
            (Expect::Xattr { max }, Answer::Data(value)) if value.len() <= max as usize => {
                self.send([&value, &[], &[]])
            }
            (Expect::Xattr { .. }, Answer::Data(_)) => self.send_error(Errno::ERANGE),
            // Going backwards would lead a copying program round in circles.
            (Expect::Offset { from }, Answer::Offset(offset)) if offset >= from => {
                self.send([abi::LSeekOut { offset }.as_bytes(), &[], &[]])
            }
            (Expect::Lock, Answer::Lock(lock)) => {
                let lk = abi::FileLock { start: lock.start, end: lock.end, kind: lock.kind, pid: lock.pid };
                self.send([abi::LkOut { lk }.as_bytes(), &[], &[]])
            }
            (Expect::Ready, Answer::Ready(ready)) => {
                self.send([abi::PollOut { revents: ready.0, padding: 0 }.as_bytes(), &[], &[]])
            }
            (expect, answer) => {
                tracing::error!(?expect, answer = form(&answer), "defect: an answer that does not fit its request");
                self.channel.connection.give_back_later(self.given_by(&answer));
                self.send_error(Errno::EIO)
            }
        }
    }

    /// What an answer gives to the kernel: it is not there to give it back, when the kernel does not get to see it, or
    /// refuses it.
    fn given_by(&self, answer: &Answer) -> Vec<Undelivered> {
        match (self.expect, answer) {
            (_, Answer::Entry(entry)) => hold(entry).into_iter().collect(),
            (_, Answer::Created(entry, opened)) => {
                [Some(Undelivered::File(entry.node, opened.handle)), hold(entry)].into_iter().flatten().collect()
            }
            (_, Answer::Dir(entries)) => {
                entries.iter().filter_map(|entry| entry.entry.as_ref().and_then(hold)).collect()
            }
            (Expect::Opened { node }, Answer::Opened(opened)) => vec![Undelivered::File(node, opened.handle)],
            (Expect::OpenedDir { node }, Answer::Opened(opened)) => vec![Undelivered::Directory(node, opened.handle)],
            _ => Vec::new(),
        }
    }

    /// Sends the entries that fit; holds on what the kernel does not get or does not count are given back.
    fn send_listing(&self, max: usize, plus: bool, entries: &[DirEntry]) -> io::Result<()> {
        let cost = if plus { abi::dirent_plus_cost } else { abi::dirent_cost };
        let wanted: usize = entries.iter().map(|entry| cost(entry.name.len())).sum();
        let mut buffer = Vec::with_capacity(wanted.min(max));
        let mut not_taken = Vec::new();
        let mut full = false;
        for entry in entries {
            full = full || buffer.len() + cost(entry.name.len()) > max;
            // One bad name would make the kernel refuse the whole listing.
            let length_is_bad = entry.name.is_empty() || entry.name.len() > LONGEST_NAME;
            let bad = length_is_bad || entry.name.iter().any(|&byte| byte == b'/' || byte == 0);
            if bad {
                tracing::error!(name = %entry.name.escape_ascii(), "defect: a listing with an impossible name");
            }
            // The kernel takes no hold by these two names, whatever the entry says.
            let dots = matches!(&*entry.name, b"." | b"..");
            if full || bad || dots {
                not_taken.extend(entry.entry.as_ref().and_then(hold));
            }
            if full || bad {
                continue;
            }
            let dirent = abi::Dirent {
                ino: entry.ino,
                off: entry.cookie,
                namelen: entry.name.len() as u32,
                kind: u32::from(entry.kind),
            };
            if plus {
                let entry = entry.entry.as_ref().filter(|_| !dots).map(entry_out).unwrap_or_default();
                buffer.extend_from_slice(abi::DirentPlus { entry, dirent }.as_bytes());
            } else {
                buffer.extend_from_slice(dirent.as_bytes());
            }
            buffer.extend_from_slice(&entry.name);
            buffer.resize(abi::align(buffer.len()), 0);
        }
        let result = self.send([&buffer, &[], &[]]);
        if result.is_err() {
            not_taken = entries.iter().filter_map(|entry| entry.entry.as_ref().and_then(hold)).collect();
        }
        if !not_taken.is_empty() {
            self.channel.connection.give_back_later(not_taken);
        }
        result
    }
}

impl Respond for Responder {
    fn respond(mut self: Box<Self>, answer: Result<Answer, Errno>) {
        self.answer(answer);
    }

    fn set_cancel(&mut self, cancel: Arc<dyn Cancel>) -> bool {
        self.registered = true;
        self.channel.connection.interrupts.register(self.unique, cancel, self.wait)
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        if !self.answered {
            tracing::error!(unique = self.unique, expect = ?self.expect, "defect: a request was dropped unanswered");
            self.answer(Err(Errno::EIO));
        }
    }
}

/// Answers with an error.
pub fn send_error(channel: &Channel, unique: u64, errno: Errno) -> io::Result<()> {
    channel.send(unique, -wire_errno(errno).0, [&[], &[], &[]])
}

/// Writing an answer failed. Without its request (ENOENT) there is nobody to tell: it was aborted.
pub fn log_undelivered(unique: u64, error: io::Errno) {
    match error {
        io::Errno::NOENT | io::Errno::NODEV | io::Errno::PERM | io::Errno::NOTCONN | io::Errno::CONNABORTED => {
            tracing::debug!(unique, %error, "an answer came too late");
        }
        _ => tracing::error!(unique, %error, "defect: the kernel refused an answer"),
    }
}

/// The kernel ignores answers with other numbers than 1 to 511, and the request would wait for ever; ENOSYS it
/// remembers for the whole mount. A guest must not be able to cause either.
fn wire_errno(errno: Errno) -> Errno {
    match errno {
        Errno::ENOSYS => Errno::EOPNOTSUPP,
        Errno(1..=511) => errno,
        Errno(number) => {
            tracing::error!(number, "defect: not an error number");
            Errno::EIO
        }
    }
}

/// The form of an answer, for the log, which must not hold its bytes.
fn form(answer: &Answer) -> &'static str {
    match answer {
        Answer::Ok => "Ok",
        Answer::Entry(_) => "Entry",
        Answer::Attr(..) => "Attr",
        Answer::Opened(_) => "Opened",
        Answer::Created(..) => "Created",
        Answer::Data(_) => "Data (or too much of it)",
        Answer::Count(_) => "Count",
        Answer::Offset(_) => "Offset",
        Answer::Dir(_) => "Dir",
        Answer::StatFs(_) => "StatFs",
        Answer::Lock(_) => "Lock",
        Answer::Ready(_) => "Ready",
    }
}

fn hold(entry: &Entry) -> Option<Undelivered> {
    // A negative entry holds nothing; the root is never forgotten.
    (entry.node != 0 && entry.node != ROOT).then_some(Undelivered::Hold(entry.node))
}

/// Whether the kernel takes these attributes: others it answers with EIO, and forgets what it was given with them.
fn is_valid(attr: &Attr) -> bool {
    use libc::{S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFMT, S_IFREG, S_IFSOCK};
    let kinds = [S_IFREG, S_IFDIR, S_IFLNK, S_IFIFO, S_IFSOCK, S_IFCHR, S_IFBLK];
    kinds.contains(&(attr.mode & S_IFMT)) && i64::try_from(attr.size).is_ok()
}

/// Whether the kernel takes this as the answer to CREATE.
fn is_file(entry: &Entry) -> bool {
    entry.node > ROOT && is_valid(&entry.attr) && entry.attr.mode & libc::S_IFMT == libc::S_IFREG
}

/// 0 leaves it to the kernel.
fn block_size(wanted: u32) -> u32 {
    if wanted == 0 { 0 } else { wanted.clamp(*BLOCK_SIZES.start(), *BLOCK_SIZES.end()) }
}

fn split_ttl(ttl: Duration) -> (u64, u32) {
    (ttl.as_secs(), ttl.subsec_nanos())
}

fn attr_out(attr: &Attr) -> abi::AttrOut {
    abi::AttrOut {
        ino: attr.ino,
        size: attr.size,
        blocks: attr.blocks,
        atime: attr.atime.secs as u64,
        mtime: attr.mtime.secs as u64,
        ctime: attr.ctime.secs as u64,
        atimensec: attr.atime.nanos,
        mtimensec: attr.mtime.nanos,
        ctimensec: attr.ctime.nanos,
        mode: attr.mode,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        rdev: abi::encode_device(attr.rdev),
        blksize: block_size(attr.blksize),
        flags: 0,
    }
}

fn entry_out(entry: &Entry) -> abi::EntryOut {
    let (entry_valid, entry_valid_nsec) = split_ttl(entry.entry_ttl);
    let (attr_valid, attr_valid_nsec) = split_ttl(entry.attr_ttl);
    abi::EntryOut {
        node: entry.node,
        generation: entry.generation,
        entry_valid,
        attr_valid,
        entry_valid_nsec,
        attr_valid_nsec,
        attr: attr_out(&entry.attr),
    }
}

fn statx_out(attr: &Attr, ttl: Duration) -> abi::StatxOut {
    let time = |at: crate::tree::ops::Timestamp| abi::StatxTime { secs: at.secs, nanos: at.nanos, reserved: 0 };
    let (attr_valid, attr_valid_nsec) = split_ttl(ttl);
    let stat = abi::StatxAttr {
        mask: libc::STATX_BASIC_STATS,
        blksize: block_size(attr.blksize),
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        mode: attr.mode as u16,
        ino: attr.ino,
        size: attr.size,
        blocks: attr.blocks,
        atime: time(attr.atime),
        ctime: time(attr.ctime),
        mtime: time(attr.mtime),
        rdev_major: (attr.rdev >> 32) as u32,
        rdev_minor: attr.rdev as u32,
        ..Default::default()
    };
    abi::StatxOut { attr_valid, attr_valid_nsec, flags: 0, spare: [0; 2], stat }
}

fn open_out(opened: &Opened) -> abi::OpenOut {
    use abi::fopen;
    let flags = [
        (opened.direct_io, fopen::DIRECT_IO),
        (opened.keep_cache, fopen::KEEP_CACHE),
        (opened.stream, fopen::STREAM),
        (opened.parallel_direct_writes, fopen::PARALLEL_DIRECT_WRITES),
        (opened.cache_dir, fopen::CACHE_DIR),
        (opened.no_flush, fopen::NOFLUSH),
    ];
    let open_flags = flags.iter().filter(|(set, _)| *set).fold(0, |all, (_, flag)| all | flag);
    abi::OpenOut { fh: opened.handle, open_flags, backing_id: 0 }
}

fn statfs_out(figures: &StatFs) -> abi::StatFsOut {
    abi::StatFsOut {
        blocks: figures.blocks,
        bfree: figures.bfree,
        bavail: figures.bavail,
        files: figures.files,
        ffree: figures.ffree,
        bsize: figures.bsize,
        namelen: figures.namelen,
        frsize: figures.frsize,
        padding: 0,
        spare: [0; 6],
    }
}
