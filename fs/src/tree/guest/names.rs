//! Operations on names: lookup, making, removing, renaming; attributes and links.

use super::super::ops::{Answer, NodeId, SetAttr};
use super::request::{Asking, ok};
use super::{Guest, MAX_NAME, Refused, attr, symlink};
use crate::errno::Errno;
use machinefs_protocol::file::{FileReply, FileRequest};
use std::time::Instant;

/// `RENAME_EXCHANGE` of renameat2(2).
const RENAME_EXCHANGE: u32 = 2;

/// Checks a name that comes from the front end.
pub(super) fn check_name(name: &[u8]) -> Result<(), Errno> {
    if name.len() > MAX_NAME {
        return Err(Errno::ENAMETOOLONG);
    }
    if name.is_empty() || name == b"." || name == b".." || name.contains(&b'/') || name.contains(&0) {
        return Err(Errno::EINVAL);
    }
    Ok(())
}

/// The handle as the agent has it, where it has one.
fn agent_handle(handle: Option<u64>) -> Option<u64> {
    handle.filter(|handle| handle & super::DIR_HANDLE == 0)
}

type Finish = Result<Answer, Errno>;

impl Guest {
    fn answer_entry(&self, parent: u64, name: &[u8], kind: Option<u32>, reply: FileReply) -> Finish {
        let FileReply::Entry(entry) = reply else { return Err(self.lie("no entry")) };
        if kind.is_some_and(|kind| entry.attr.mode & libc::S_IFMT != kind) {
            return Err(self.lie("a new file of another type"));
        }
        self.entry(Some((parent, name)), &entry).map(Answer::Entry)
    }

    fn answer_attr(&self, node: u64, reply: FileReply) -> Finish {
        let FileReply::Attr(given) = reply else { return Err(self.lie("no attributes")) };
        attr::check(&given).map_err(|what| self.lie(what))?;
        self.nodes.lock().seen(node, &given);
        let (attr, ttl) = self.attr(node, &given);
        Ok(Answer::Attr(attr, ttl))
    }
}

impl Asking<'_> {
    pub fn lookup(self, parent: NodeId, name: &[u8]) -> Result<(), Refused> {
        let parent = ok!(self, self.guest.agent_node(parent));
        if name == b"." || name == b".." {
            // Only an NFS server asks so, for a file that it knows by handle alone.
            return self.refuse(Errno::ESTALE);
        }
        ok!(self, check_name(name));
        let (options, owned) = (self.query(), Box::<[u8]>::from(name));
        self.send_watched(FileRequest::Lookup { parent, name }, &[], options, move |guest, result| match result {
            Ok((reply, _)) => guest.answer_entry(parent, &owned, None, reply),
            Err(errno) => {
                if errno == Errno::ENOENT {
                    guest.nodes.lock().gone(parent, &owned, Instant::now());
                }
                Err(errno)
            }
        });
        Ok(())
    }

    pub fn getattr(self, node: NodeId, handle: Option<u64>) -> Result<(), Refused> {
        let node = ok!(self, self.guest.agent_node(node));
        let (options, fh) = (self.query(), agent_handle(handle));
        self.send(FileRequest::GetAttr { node, fh }, &[], options, move |guest, reply, _| {
            guest.answer_attr(node, reply)
        });
        Ok(())
    }

    pub fn setattr(self, node: NodeId, handle: Option<u64>, set: &SetAttr) -> Result<(), Refused> {
        let node = ok!(self, self.guest.agent_node(node));
        if set.size.is_some_and(|size| size > attr::MAX_SIZE) {
            return self.refuse(Errno::EFBIG);
        }
        let set = attr::set_to_guest(set, self.guest.users, self.guest.groups);
        let (options, fh) = (self.change(), agent_handle(handle));
        self.send(FileRequest::SetAttr { node, fh, set }, &[], options, move |guest, reply, _| {
            guest.answer_attr(node, reply)
        });
        Ok(())
    }

    pub fn readlink(self, node: NodeId) -> Result<(), Refused> {
        let node = ok!(self, self.guest.agent_node(node));
        let options = self.query();
        self.send(FileRequest::ReadLink { node }, &[], options, move |guest, _, target| {
            if target.is_empty() || target.contains(&0) {
                return Err(guest.lie("a target that is none"));
            }
            let depth = guest.nodes.lock().depth(node, Instant::now());
            symlink::contain(&target, depth).map(Answer::Data)
        });
        Ok(())
    }

    pub fn symlink(self, parent: NodeId, name: &[u8], target: &[u8]) -> Result<(), Refused> {
        let owner = self.owner();
        self.make(parent, name, libc::S_IFLNK, |parent| FileRequest::SymLink { parent, name, target, owner })
    }

    pub fn mknod(self, parent: NodeId, name: &[u8], mode: u32, umask: u32, rdev: u64) -> Result<(), Refused> {
        let owner = self.owner();
        let kind = match mode & libc::S_IFMT {
            0 => libc::S_IFREG,
            kind => kind,
        };
        self.make(parent, name, kind, |parent| FileRequest::MkNod { parent, name, mode, umask, rdev, owner })
    }

    pub fn mkdir(self, parent: NodeId, name: &[u8], mode: u32, umask: u32) -> Result<(), Refused> {
        let owner = self.owner();
        self.make(parent, name, libc::S_IFDIR, |parent| FileRequest::MkDir { parent, name, mode, umask, owner })
    }

    fn make<'n>(
        self,
        parent: NodeId,
        name: &'n [u8],
        kind: u32,
        request: impl FnOnce(u64) -> FileRequest<'n>,
    ) -> Result<(), Refused> {
        let parent = ok!(self, self.guest.agent_node(parent));
        ok!(self, check_name(name));
        let (options, owned) = (self.change(), Box::<[u8]>::from(name));
        self.send(request(parent), &[], options, move |guest, reply, _| {
            guest.answer_entry(parent, &owned, Some(kind), reply)
        });
        Ok(())
    }

    pub fn link(self, node: NodeId, new_parent: NodeId, new_name: &[u8]) -> Result<(), Refused> {
        let node = ok!(self, self.guest.agent_node(node));
        let new_parent = ok!(self, self.guest.agent_node(new_parent));
        ok!(self, check_name(new_name));
        let (options, owned) = (self.change(), Box::<[u8]>::from(new_name));
        self.send(FileRequest::Link { node, new_parent, new_name }, &[], options, move |guest, reply, _| {
            guest.answer_entry(new_parent, &owned, None, reply)
        });
        Ok(())
    }

    pub fn remove(self, parent: NodeId, name: &[u8], directory: bool) -> Result<(), Refused> {
        let parent = ok!(self, self.guest.agent_node(parent));
        ok!(self, check_name(name));
        let options = self.change();
        let request =
            if directory { FileRequest::RmDir { parent, name } } else { FileRequest::Unlink { parent, name } };
        let owned = Box::<[u8]>::from(name);
        self.send(request, &[], options, move |guest, _, _| {
            guest.nodes.lock().gone(parent, &owned, Instant::now());
            Ok(Answer::Ok)
        });
        Ok(())
    }

    pub fn rename(self, from: (NodeId, &[u8]), to: (NodeId, &[u8]), flags: u32) -> Result<(), Refused> {
        let (parent, name) = (ok!(self, self.guest.agent_node(from.0)), from.1);
        let (new_parent, new_name) = (ok!(self, self.guest.agent_node(to.0)), to.1);
        ok!(self, check_name(name));
        ok!(self, check_name(new_name));
        let options = self.change();
        let (old, new) = (Box::<[u8]>::from(name), Box::<[u8]>::from(new_name));
        let request = FileRequest::Rename { parent, name, new_parent, new_name, flags };
        self.send(request, &[], options, move |guest, _, _| {
            let exchanged = flags & RENAME_EXCHANGE != 0;
            guest.nodes.lock().renamed((parent, &old), (new_parent, &new), exchanged, Instant::now());
            Ok(Answer::Ok)
        });
        Ok(())
    }
}
