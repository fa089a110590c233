//! Extended attributes. ACLs hold numbers of users, which are mapped.

use super::super::ops::{Answer, NodeId};
use super::request::{Asking, ok};
use super::{MAX_NAME, Refused, acl, fresh};
use crate::errno::Errno;
use machinefs_protocol::file::FileRequest;

/// Largest value and largest list of names, in bytes (`XATTR_SIZE_MAX`, see xattr(7)).
const MAX_VALUE: u32 = 64 * 1024;

/// Checks an attribute's name that comes from the front end.
fn check_name(name: &[u8]) -> Result<(), Errno> {
    match name.len() {
        0 => Err(Errno::EINVAL),
        1..=MAX_NAME if !name.contains(&0) => Ok(()),
        1..=MAX_NAME => Err(Errno::EINVAL),
        _ => Err(Errno::ERANGE),
    }
}

impl Asking<'_> {
    pub fn getxattr(self, node: NodeId, name: &[u8], max: u32) -> Result<(), Refused> {
        let node = ok!(self, self.guest.agent_node(node));
        ok!(self, check_name(name));
        if max == 0 && name == fresh::CAPABILITY && self.guest.fresh.lock().is_first_write(node) {
            return self.refuse(Errno::ENODATA);
        }
        let (options, max, is_acl) = (self.query(), max.min(MAX_VALUE), acl::is_acl(name));
        self.send(FileRequest::GetXattr { node, name, max }, &[], options, move |guest, reply, value| {
            if max == 0 {
                return guest.count(&reply, MAX_VALUE.into());
            }
            if !is_acl {
                return Ok(Answer::Data(value));
            }
            acl::to_host(&value, guest.users, guest.groups).map(Answer::Data).ok_or(Errno::EINVAL)
        });
        Ok(())
    }

    pub fn listxattr(self, node: NodeId, max: u32) -> Result<(), Refused> {
        let node = ok!(self, self.guest.agent_node(node));
        let (options, max) = (self.query(), max.min(MAX_VALUE));
        self.send(FileRequest::ListXattr { node, max }, &[], options, move |guest, reply, names| {
            if max == 0 {
                return guest.count(&reply, MAX_VALUE.into());
            }
            // Names, each ended by NUL; an empty one would be the end of all to some readers.
            let ended = names.is_empty() || (names.ends_with(&[0]) && !names.starts_with(&[0]));
            if !ended || names.windows(2).any(|pair| pair == [0, 0]) {
                return Err(guest.lie("a list of attributes that is none"));
            }
            Ok(Answer::Data(names))
        });
        Ok(())
    }

    pub fn setxattr(self, node: NodeId, name: &[u8], value: &[u8], flags: u32) -> Result<(), Refused> {
        let node = ok!(self, self.guest.agent_node(node));
        ok!(self, check_name(name));
        if value.len() > MAX_VALUE as usize {
            return self.refuse(Errno::E2BIG);
        }
        let options = self.change();
        let request = FileRequest::SetXattr { node, name, flags };
        if !acl::is_acl(name) {
            return self.send_simple(request, value, options);
        }
        let mapped = acl::to_guest(value, self.guest.users, self.guest.groups).ok_or(Errno::EINVAL);
        let mapped = ok!(self, mapped);
        self.send_simple(request, &mapped, options)
    }

    pub fn removexattr(self, node: NodeId, name: &[u8]) -> Result<(), Refused> {
        let node = ok!(self, self.guest.agent_node(node));
        ok!(self, check_name(name));
        let options = self.change();
        self.send_simple(FileRequest::RemoveXattr { node, name }, &[], options)
    }
}
