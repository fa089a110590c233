//! Operations on open files.

use super::super::ops::{Answer, NodeId, Opened};
use super::request::{Asking, ok};
use super::{DIR_HANDLE, Guest, MAX_COPY, MAX_READ, Refused, attr, names};
use crate::errno::Errno;
use machinefs_protocol::file::{FileReply, FileRequest};
use machinefs_protocol::message::Notice;
use std::sync::Arc;

/// `SEEK_DATA` and `SEEK_HOLE` of lseek(2); the kernel does the others itself.
const SEEKS: [u32; 2] = [libc::SEEK_DATA as u32, libc::SEEK_HOLE as u32];

impl Guest {
    /// How an open file behaves. `live`: its size says nothing about its content, so reads must reach the guest.
    fn opened(&self, fh: u64, live: bool) -> Result<Opened, Errno> {
        if fh & DIR_HANDLE != 0 {
            return Err(self.lie("a handle out of range"));
        }
        Ok(Opened { handle: fh, direct_io: live, parallel_direct_writes: true, ..Opened::default() })
    }

    fn created(&self, place: Option<(u64, &[u8])>, reply: FileReply) -> Result<Answer, Errno> {
        let FileReply::Created(entry, fh) = reply else { return Err(self.lie("no new file")) };
        if entry.attr.mode & libc::S_IFMT != libc::S_IFREG {
            return Err(self.lie("a new file that is not regular"));
        }
        // Not live: who creates a file reads back what it writes.
        let opened = self.opened(fh, false)?;
        self.fresh.lock().made(entry.node);
        Ok(Answer::Created(self.entry(place, &entry)?, opened))
    }
}

impl Asking<'_> {
    pub fn open(self, node: NodeId, flags: u32, kill_suidgid: bool) -> Result<(), Refused> {
        let node = ok!(self, self.guest.agent_node(node));
        let options = if flags & libc::O_TRUNC as u32 == 0 { self.query() } else { self.change() };
        self.send(FileRequest::Open { node, flags, kill_suidgid }, &[], options, move |guest, reply, _| {
            let FileReply::Opened(fh) = reply else { return Err(guest.lie("no open file")) };
            let live = guest.nodes.lock().is_live(node);
            guest.opened(fh, live).map(Answer::Opened)
        });
        Ok(())
    }

    pub fn create(self, parent: NodeId, name: &[u8], mode: u32, umask: u32, flags: u32) -> Result<(), Refused> {
        let parent = ok!(self, self.guest.agent_node(parent));
        ok!(self, names::check_name(name));
        let (options, owner, owned) = (self.change(), self.owner(), Box::<[u8]>::from(name));
        let request = FileRequest::Create { parent, name, mode, umask, flags, owner };
        self.send(request, &[], options, move |guest, reply, _| guest.created(Some((parent, &owned)), reply));
        Ok(())
    }

    pub fn tmpfile(self, parent: NodeId, mode: u32, umask: u32, flags: u32) -> Result<(), Refused> {
        let parent = ok!(self, self.guest.agent_node(parent));
        let (options, owner) = (self.change(), self.owner());
        let request = FileRequest::TmpFile { parent, mode, umask, flags, owner };
        self.send(request, &[], options, |guest, reply, _| guest.created(None, reply));
        Ok(())
    }

    pub fn read(self, fh: u64, offset: u64, size: u32) -> Result<(), Refused> {
        let (options, size) = (self.query(), size.min(MAX_READ));
        self.send(FileRequest::Read { fh, offset, size }, &[], options, |_, _, body| Ok(Answer::Data(body)));
        Ok(())
    }

    pub fn write(self, fh: u64, offset: u64, data: &[u8], kill_suidgid: bool) -> Result<(), Refused> {
        let (options, len) = (self.change(), data.len());
        self.send(FileRequest::Write { fh, offset, kill_suidgid }, data, options, move |guest, reply, _| {
            guest.count(&reply, len as u64)
        });
        Ok(())
    }

    pub fn flush(self, node: NodeId, fh: u64, owner: u64) -> Result<(), Refused> {
        let node = ok!(self, self.guest.agent_node(node));
        if !self.guest.locks.lock().remove(&(node, owner)) {
            self.responder.respond(Ok(Answer::Ok));
            return Ok(());
        }
        let options = self.change();
        self.send_simple(FileRequest::Flush { fh, owner }, &[], options)
    }

    pub fn release(self, fh: u64, owner: u64) -> Result<(), Refused> {
        self.guest.link.notice(&Notice::Release { fh, owner });
        self.responder.respond(Ok(Answer::Ok));
        Ok(())
    }

    pub fn fsync(self, fh: u64, data_only: bool) -> Result<(), Refused> {
        let options = self.long_change();
        self.send_simple(FileRequest::Fsync { fh, data_only }, &[], options)
    }

    pub fn syncfs(self) -> Result<(), Refused> {
        let options = self.long_change();
        self.send_simple(FileRequest::SyncFs, &[], options)
    }

    pub fn statfs(self, node: NodeId) -> Result<(), Refused> {
        let node = ok!(self, self.guest.agent_node(node));
        let options = self.query();
        self.send(FileRequest::StatFs { node }, &[], options, |guest, reply, _| match reply {
            FileReply::StatFs(stat) => Ok(Answer::StatFs(attr::statfs(&stat))),
            _ => Err(guest.lie("no figures")),
        });
        Ok(())
    }

    pub fn fallocate(self, fh: u64, offset: u64, len: u64, mode: u32) -> Result<(), Refused> {
        if offset.checked_add(len).is_none_or(|end| end > attr::MAX_SIZE) {
            return self.refuse(Errno::EFBIG);
        }
        let options = self.change();
        self.send_simple(FileRequest::Fallocate { fh, offset, len, mode }, &[], options)
    }

    pub fn seek(self, fh: u64, offset: u64, whence: u32) -> Result<(), Refused> {
        if !SEEKS.contains(&whence) || offset > attr::MAX_SIZE {
            return self.refuse(Errno::EINVAL);
        }
        let options = self.query();
        self.send(FileRequest::Seek { fh, offset, whence }, &[], options, |guest, reply, _| match reply {
            FileReply::Offset(offset) if offset <= attr::MAX_SIZE => Ok(Answer::Offset(offset)),
            _ => Err(guest.lie("an offset out of range")),
        });
        Ok(())
    }

    pub fn copy_range(self, from: (u64, u64), to: (u64, u64), len: u64) -> Result<(), Refused> {
        let (options, len) = (self.change(), len.min(MAX_COPY));
        let request = FileRequest::CopyRange { from: from.0, from_offset: from.1, to: to.0, to_offset: to.1, len };
        self.send(request, &[], options, move |guest, reply, _| guest.count(&reply, len));
        Ok(())
    }
}

impl Guest {
    /// A number of bytes, at most as many as were given.
    pub(super) fn count(self: &Arc<Self>, reply: &FileReply, most: u64) -> Result<Answer, Errno> {
        match reply {
            FileReply::Count(count) if u64::from(*count) <= most => Ok(Answer::Count(*count)),
            _ => Err(self.lie("a count out of range")),
        }
    }
}
