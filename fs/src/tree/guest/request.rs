//! One operation on its way to the agent and back.

use super::super::ops::{Answer, Caller, Cancel, Responder};
use super::{Guest, Refused};
use crate::errno::Errno;
use crate::link::{Interrupt, Link, LinkError, RequestOptions, Response, Tag};
use machinefs_protocol::file::{FileReply, FileRequest, Owner};
use machinefs_protocol::message::{Reply, Request};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// An operation, before it is sent.
pub(super) struct Asking<'a> {
    pub guest: &'a Arc<Guest>,
    pub caller: Caller,
    pub responder: Responder,
}

/// Carries an interrupt to the link.
struct Canceller {
    link: Arc<Link>,
    tag: Tag,
    called: AtomicBool,
}

impl Cancel for Canceller {
    fn cancel(&self) {
        self.called.store(true, Ordering::SeqCst);
        self.link.cancel(self.tag);
    }
}

impl Asking<'_> {
    /// For what changes nothing and is quick.
    pub fn query(&self) -> RequestOptions {
        RequestOptions::within(self.guest.link.op_deadline()).interrupt(Interrupt::Query)
    }

    /// For what changes something.
    pub fn change(&self) -> RequestOptions {
        let interrupt = Interrupt::Change { pid: self.caller.pid };
        RequestOptions::within(self.guest.link.op_deadline()).interrupt(interrupt)
    }

    /// For what changes something and may take as long as it takes.
    pub fn long_change(&self) -> RequestOptions {
        RequestOptions { deadline: None, ..self.change() }
    }

    /// Whom a new file belongs to.
    pub fn owner(&self) -> Owner {
        Owner { uid: self.guest.users.to_guest(self.caller.uid), gid: self.guest.groups.to_guest(self.caller.gid) }
    }

    /// Sends the request; `finish` makes the answer of the agent's reply, on the link's reader thread.
    pub fn send<F>(self, request: FileRequest<'_>, body: &[u8], options: RequestOptions, finish: F)
    where
        F: FnOnce(&Arc<Guest>, FileReply, Vec<u8>) -> Result<Answer, Errno> + Send + 'static,
    {
        self.send_watched(request, body, options, |guest, result| {
            let (reply, body) = result?;
            finish(guest, reply, body)
        });
    }

    /// The same for one that has something to do when the request fails.
    pub fn send_watched<F>(mut self, request: FileRequest<'_>, body: &[u8], options: RequestOptions, finish: F)
    where
        F: FnOnce(&Arc<Guest>, Result<(FileReply, Vec<u8>), Errno>) -> Result<Answer, Errno> + Send + 'static,
    {
        let link = &self.guest.link;
        let tag = link.next_tag();
        let canceller = Arc::new(Canceller { link: link.clone(), tag, called: AtomicBool::new(false) });
        if !self.responder.set_cancel(canceller.clone()) {
            return self.responder.respond(Err(Errno::EINTR));
        }
        let (guest, responder) = (self.guest.clone(), self.responder);
        let done = Box::new(move |result: Result<Response, LinkError>| {
            let result = match result {
                Ok(Response { reply: Reply::File(reply), body }) => Ok((reply, body)),
                Ok(_) => Err(guest.lie("no reply of the file service")),
                Err(error) => Err(error.errno()),
            };
            responder.respond(finish(&guest, result));
        });
        link.request_tagged(tag, &Request::File(request), body, options, done);
        // One that came before the link knew the tag.
        if canceller.called.load(Ordering::SeqCst) {
            link.cancel(tag);
        }
    }

    /// The same for a request whose answer has nothing to say.
    pub fn send_simple(self, request: FileRequest<'_>, body: &[u8], options: RequestOptions) -> Result<(), Refused> {
        self.send(request, body, options, |_, _, _| Ok(Answer::Ok));
        Ok(())
    }

    /// Refuses the operation.
    pub fn refuse(self, errno: Errno) -> Result<(), Refused> {
        Err((errno, self.responder))
    }
}

/// Takes a value out of a result, or refuses the operation that is asked.
macro_rules! ok {
    ($asking:ident, $result:expr) => {
        match $result {
            Ok(value) => value,
            Err(errno) => return $asking.refuse(errno),
        }
    };
}
pub(super) use ok;
