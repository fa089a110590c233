//! A small guest: `f` (a file of 8192 bytes), `d` (a directory with nothing in it) and `l` (a symlink). It answers
//! honestly what a test does not answer in its place.

use super::{Agent, Frame};
use machinefs_protocol::file::{Attr, DirEntry, DirPage, Entry, FileReply, FileRequest, ROOT, StatFs};
use machinefs_protocol::frame::decode_meta;
use machinefs_protocol::message::{Reply, Request};
use std::thread::JoinHandle;

pub const FILE: u64 = 2;
pub const DIR: u64 = 3;
pub const LINK: u64 = 4;
pub const SIZE: u64 = 8192;

pub fn attr(node: u64) -> Attr {
    let (mode, size) = match node {
        ROOT | DIR => (libc::S_IFDIR | 0o755, 4096),
        LINK => (libc::S_IFLNK | 0o777, 6),
        _ => (libc::S_IFREG | 0o644, SIZE),
    };
    Attr { ino: node, size, blocks: size.div_ceil(512), mode, nlink: 1, blksize: 4096, ..Attr::default() }
}

pub fn entry(node: u64) -> Entry {
    Entry { node, generation: 0, attr: attr(node) }
}

/// A page of a directory: names, cookies, entries.
pub fn page(entries: &[(&[u8], u64, Option<Entry>)], end: bool) -> (DirPage, Vec<u8>) {
    let mut body = Vec::new();
    for &(name, cookie, entry) in entries {
        let kind = entry.map_or(libc::DT_UNKNOWN, |entry| (entry.attr.mode >> 12) as u8);
        let listed = DirEntry { cookie, ino: cookie, kind, name, entry };
        body = postcard::to_extend(&listed, body).unwrap();
    }
    (DirPage { count: entries.len() as u32, end }, body)
}

/// What an honest guest says.
pub fn honest(request: &FileRequest<'_>) -> Result<(FileReply, Vec<u8>), i32> {
    let plain = |reply| Ok((reply, Vec::new()));
    match *request {
        FileRequest::Lookup { parent: ROOT, name } => match name {
            b"f" => plain(FileReply::Entry(entry(FILE))),
            b"d" => plain(FileReply::Entry(entry(DIR))),
            b"l" => plain(FileReply::Entry(entry(LINK))),
            _ => Err(libc::ENOENT),
        },
        FileRequest::Lookup { .. } => Err(libc::ENOENT),
        FileRequest::GetAttr { node, .. } | FileRequest::SetAttr { node, .. } => plain(FileReply::Attr(attr(node))),
        FileRequest::ReadLink { .. } => Ok((FileReply::Data, b"target".to_vec())),
        FileRequest::Open { node, .. } => plain(FileReply::Opened(100 + node)),
        FileRequest::Read { offset, size, .. } => {
            let len = SIZE.saturating_sub(offset).min(size.into());
            Ok((FileReply::Data, vec![b'x'; len as usize]))
        }
        FileRequest::OpenDir { node, .. } => {
            let all: &[(&[u8], u64, Option<Entry>)] = if node == ROOT {
                &[(b"f", 1, Some(entry(FILE))), (b"d", 2, Some(entry(DIR))), (b"l", 3, Some(entry(LINK)))]
            } else {
                &[]
            };
            let (page, body) = page(all, true);
            Ok((FileReply::OpenedDir(200 + node, page), body))
        }
        FileRequest::ReadDir { .. } => Ok((FileReply::Dir(DirPage { count: 0, end: true }), Vec::new())),
        FileRequest::StatFs { .. } => {
            plain(FileReply::StatFs(StatFs { blocks: 100, bsize: 4096, frsize: 4096, ..StatFs::default() }))
        }
        FileRequest::GetXattr { .. } | FileRequest::ListXattr { .. } => Err(libc::EOPNOTSUPP),
        FileRequest::Flush { .. } | FileRequest::Fsync { .. } | FileRequest::SyncFs => plain(FileReply::Ok),
        FileRequest::SetLock { .. } => plain(FileReply::Ok),
        FileRequest::Write { .. } => Err(libc::ENOSPC),
        _ => Err(libc::EOPNOTSUPP),
    }
}

/// What a test does with a request.
pub enum Act {
    /// What the honest guest does.
    Honest,
    /// This answer.
    Say(FileReply, Vec<u8>),
    /// This failure.
    Fail(i32),
    /// Nothing: the test has answered itself, or never will.
    Silence,
    /// It ends the stream.
    Hang,
}

/// Answers all that comes, until the host closes the stream; `lie` is asked first.
pub fn serve(
    mut agent: Agent,
    mut lie: impl FnMut(&mut Agent, u64, &FileRequest<'_>) -> Act + Send + 'static,
) -> JoinHandle<()> {
    std::thread::spawn(move || {
        while let Some(Frame { header, meta, .. }) = agent.next_request() {
            // A longer body than one frame is taken for what comes before the next request.
            let request: Request<'_> = decode_meta(&meta).unwrap();
            let sent = match &request {
                Request::File(file) => match lie(&mut agent, header.tag, file) {
                    Act::Honest => answer(&mut agent, header.tag, honest(file)),
                    Act::Say(reply, body) => answer(&mut agent, header.tag, Ok((reply, body))),
                    Act::Fail(errno) => answer(&mut agent, header.tag, Err(errno)),
                    Act::Silence => Ok(()),
                    Act::Hang => return,
                },
                _ => agent.reply(header.tag, &Reply::Ok, &[]),
            };
            if sent.is_err() {
                return;
            }
        }
    })
}

fn answer(agent: &mut Agent, tag: u64, answer: Result<(FileReply, Vec<u8>), i32>) -> std::io::Result<()> {
    match answer {
        Ok((reply, body)) => agent.reply(tag, &Reply::File(reply), &body),
        Err(errno) => agent.failure(tag, errno),
    }
}
