//! Answers that come after their request was given up: what they made the agent hold is let go.

use super::super::{RequestOptions, Response};
use super::Shared;
use machinefs_protocol::file::{DirEntry, FileReply, FileRequest, Lock, ROOT};
use machinefs_protocol::message::{Notice, Reply, Request};
use std::sync::Arc;
use std::time::Duration;

impl Shared {
    /// Lets go what that answer made the agent hold.
    pub(super) fn give_back(self: &Arc<Self>, response: &Response, unlock: Option<Box<FileRequest<'static>>>) {
        let Reply::File(reply) = &response.reply else { return };
        let release = |fh| self.notice(&Notice::Release { fh, owner: 0 });
        let forget = |node| {
            if node != ROOT {
                self.forget(&[(node, 1)]);
            }
        };
        match reply {
            FileReply::Entry(entry) => forget(entry.node),
            FileReply::Opened(fh) => release(*fh),
            FileReply::Created(entry, fh) => {
                release(*fh);
                forget(entry.node);
            }
            FileReply::OpenedDir(fh, _) => {
                held_nodes(&response.body).for_each(forget);
                self.notice(&Notice::ReleaseDir { fh: *fh });
            }
            FileReply::Dir(_) => held_nodes(&response.body).for_each(forget),
            FileReply::Ok => {
                if let Some(unlock) = unlock {
                    let options = RequestOptions::within(Duration::from_micros(self.op_deadline));
                    self.request(self.next_tag(), &Request::File(*unlock), &[], options, Box::new(|_| {}));
                }
            }
            FileReply::Attr(_)
            | FileReply::Data
            | FileReply::Count(_)
            | FileReply::Offset(_)
            | FileReply::StatFs(_)
            | FileReply::Lock(_) => {}
        }
    }
}

/// The request that undoes a lock.
pub(super) fn unlock_of(request: &Request<'_>) -> Option<Box<FileRequest<'static>>> {
    const F_UNLCK: u32 = libc::F_UNLCK as u32;
    match request {
        Request::File(FileRequest::SetLock { fh, owner, lock, flock, .. }) if lock.kind != F_UNLCK => {
            let lock = Lock { kind: F_UNLCK, ..*lock };
            Some(Box::new(FileRequest::SetLock { fh: *fh, owner: *owner, lock, flock: *flock, wait: false }))
        }
        _ => None,
    }
}

/// The nodes that a page of a directory makes the host hold; ends at the first byte that is not an entry.
fn held_nodes(mut page: &[u8]) -> impl Iterator<Item = u64> {
    std::iter::from_fn(move || {
        loop {
            let (entry, rest) = postcard::take_from_bytes::<DirEntry<'_>>(page).ok()?;
            page = rest;
            if let Some(entry) = entry.entry {
                return Some(entry.node);
            }
        }
    })
}
