//! Operations on open directories.

use super::super::ops::{Answer, DirEntry, NodeId};
use super::dir::{DirHandle, Listed, Page, Served};
use super::request::{Asking, ok};
use super::{DIR_HANDLE, FIRST_PAGE, Guest, NEXT_PAGE, Refused, ids};
use crate::errno::Errno;
use machinefs_protocol::file::{FileReply, FileRequest, ROOT};
use machinefs_protocol::message::Notice;
use std::sync::Arc;
use std::sync::atomic::Ordering;

impl Guest {
    fn dir(&self, handle: u64) -> Result<Arc<DirHandle>, Errno> {
        self.dirs.lock().get(&handle).cloned().ok_or(Errno::EBADF)
    }

    fn opened_dir(&self, node: u64, reply: FileReply, body: Vec<u8>) -> Result<Answer, Errno> {
        let FileReply::OpenedDir(fh, page) = reply else { return Err(self.lie("no open directory")) };
        let page = Page::parse(0, page, body).map_err(|what| {
            self.link.notice(&Notice::ReleaseDir { fh });
            self.lie(what)
        })?;
        let handle = DIR_HANDLE | self.next_dir.fetch_add(1, Ordering::Relaxed);
        self.dirs.lock().insert(handle, Arc::new(DirHandle::new(fh, node, page)));
        Ok(Answer::Opened(super::super::ops::Opened { handle, ..Default::default() }))
    }

    /// Entries of a page as the host shows them; the kernel then holds their nodes.
    fn listed(&self, dir: &DirHandle, entries: Vec<Listed>) -> Result<Answer, Errno> {
        let entries = entries.into_iter().map(|listed| -> Result<DirEntry, Errno> {
            let ino = match &*listed.name {
                b"." | b".." if dir.node == ROOT => self.view.root_ino,
                _ => ids::ino(self.view.slot, listed.ino),
            };
            let entry = listed.entry.as_ref().map(|entry| self.entry(Some((dir.node, &listed.name)), entry));
            Ok(listed.into_host(ino, entry.transpose()?))
        });
        entries.collect::<Result<_, _>>().map(Answer::Dir)
    }
}

impl Asking<'_> {
    pub fn opendir(self, node: NodeId) -> Result<(), Refused> {
        let node = ok!(self, self.guest.agent_node(node));
        let options = self.query();
        let request = FileRequest::OpenDir { node, max: FIRST_PAGE, plus: true };
        self.send(request, &[], options, move |guest, reply, body| guest.opened_dir(node, reply, body));
        Ok(())
    }

    pub fn readdir(
        self,
        handle: u64,
        cookie: u64,
        max: usize,
        plus: bool,
        cost: fn(usize) -> usize,
    ) -> Result<(), Refused> {
        let dir = ok!(self, self.guest.dir(handle));
        match dir.read(cookie, max, plus, cost) {
            Served::Entries(entries) => {
                self.responder.respond(self.guest.listed(&dir, entries));
                return Ok(());
            }
            Served::TooSmall => return self.refuse(Errno::EINVAL),
            Served::Fetch => {}
        }
        let options = self.query();
        let request = FileRequest::ReadDir { fh: dir.fh, cookie, max: NEXT_PAGE, plus };
        self.send(request, &[], options, move |guest, reply, body| {
            let FileReply::Dir(page) = reply else { return Err(guest.lie("no page")) };
            let page = Page::parse(cookie, page, body).map_err(|what| guest.lie(what))?;
            let (unused, open) = dir.install(page);
            guest.forget_all(unused);
            if !open {
                return Err(Errno::EBADF);
            }
            match dir.read(cookie, max, plus, cost) {
                Served::Entries(entries) => guest.listed(&dir, entries),
                Served::TooSmall => Err(Errno::EINVAL),
                // Another reader of the same open directory was faster, and elsewhere in it.
                Served::Fetch => Err(Errno::EAGAIN),
            }
        });
        Ok(())
    }

    pub fn releasedir(self, handle: u64) -> Result<(), Refused> {
        let dir = self.guest.dirs.lock().remove(&handle);
        if let Some(dir) = dir {
            self.guest.forget_all(dir.close());
            self.guest.link.notice(&Notice::ReleaseDir { fh: dir.fh });
        }
        self.responder.respond(Ok(Answer::Ok));
        Ok(())
    }

    pub fn fsyncdir(self, handle: u64, data_only: bool) -> Result<(), Refused> {
        let dir = ok!(self, self.guest.dir(handle));
        let options = self.long_change();
        self.send_simple(FileRequest::Fsync { fh: dir.fh, data_only }, &[], options)
    }
}
