//! What may come back for a request: which reply, and how many bytes with it. Everything else is a lie.

use machinefs_protocol::file::{FileReply, FileRequest};
use machinefs_protocol::frame::MAX_BODY;
use machinefs_protocol::job::MAX_LIST;
use machinefs_protocol::message::{Reply, Request};

/// Longest target of a symlink, in bytes (PATH_MAX).
const MAX_TARGET: usize = 4096;
/// A page of a directory may be this much over what was asked, so that one entry always fits.
const PAGE_SLACK: usize = 1024;

/// Which reply answers a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Expect {
    Ok,
    Started,
    Jobs,
    Info,
    Log,
    Stdin,
    FileOk,
    Entry,
    Attr,
    Data,
    Count,
    Offset,
    Opened,
    Created,
    OpenedDir,
    Dir,
    StatFs,
    Lock,
}

/// The reply a request must have, and the most bytes its body may hold.
pub(super) fn expectation(request: &Request<'_>) -> (Expect, usize) {
    match request {
        Request::Ping
        | Request::JobAttach { .. }
        | Request::JobSignal { .. }
        | Request::JobForget { .. }
        | Request::JobResize { .. }
        | Request::Connect { .. }
        | Request::SetSecrets
        | Request::Shutdown { .. }
        | Request::SetClock { .. } => (Expect::Ok, 0),
        Request::JobStart { .. } => (Expect::Started, 0),
        Request::JobStdin { .. } => (Expect::Stdin, 0),
        Request::JobList => (Expect::Jobs, MAX_LIST),
        Request::Info => (Expect::Info, 0),
        Request::ReadLog => (Expect::Log, MAX_BODY),
        Request::File(file) => match file {
            FileRequest::Lookup { .. }
            | FileRequest::SymLink { .. }
            | FileRequest::MkNod { .. }
            | FileRequest::MkDir { .. }
            | FileRequest::Link { .. } => (Expect::Entry, 0),
            FileRequest::GetAttr { .. } | FileRequest::SetAttr { .. } => (Expect::Attr, 0),
            FileRequest::ReadLink { .. } => (Expect::Data, MAX_TARGET),
            FileRequest::Unlink { .. }
            | FileRequest::RmDir { .. }
            | FileRequest::Rename { .. }
            | FileRequest::Flush { .. }
            | FileRequest::Fsync { .. }
            | FileRequest::SetXattr { .. }
            | FileRequest::RemoveXattr { .. }
            | FileRequest::Fallocate { .. }
            | FileRequest::SetLock { .. }
            | FileRequest::SyncFs => (Expect::FileOk, 0),
            FileRequest::Open { .. } => (Expect::Opened, 0),
            FileRequest::Create { .. } | FileRequest::TmpFile { .. } => (Expect::Created, 0),
            FileRequest::Read { size, .. } => (Expect::Data, *size as usize),
            FileRequest::Write { .. } | FileRequest::CopyRange { .. } => (Expect::Count, 0),
            FileRequest::OpenDir { max, .. } => (Expect::OpenedDir, (*max as usize).saturating_add(PAGE_SLACK)),
            FileRequest::ReadDir { max, .. } => (Expect::Dir, (*max as usize).saturating_add(PAGE_SLACK)),
            FileRequest::StatFs { .. } => (Expect::StatFs, 0),
            FileRequest::GetXattr { max: 0, .. } | FileRequest::ListXattr { max: 0, .. } => (Expect::Count, 0),
            FileRequest::GetXattr { max, .. } | FileRequest::ListXattr { max, .. } => (Expect::Data, *max as usize),
            FileRequest::Seek { .. } => (Expect::Offset, 0),
            FileRequest::GetLock { .. } => (Expect::Lock, 0),
        },
    }
}

impl Expect {
    /// Whether this is the reply.
    pub fn accepts(self, reply: &Reply) -> bool {
        self == match reply {
            Reply::Ok => Expect::Ok,
            Reply::Started { .. } => Expect::Started,
            Reply::Jobs => Expect::Jobs,
            Reply::Info(_) => Expect::Info,
            Reply::Data => Expect::Log,
            Reply::Stdin { .. } => Expect::Stdin,
            Reply::File(file) => match file {
                FileReply::Ok => Expect::FileOk,
                FileReply::Entry(_) => Expect::Entry,
                FileReply::Attr(_) => Expect::Attr,
                FileReply::Data => Expect::Data,
                FileReply::Count(_) => Expect::Count,
                FileReply::Offset(_) => Expect::Offset,
                FileReply::Opened(_) => Expect::Opened,
                FileReply::Created(..) => Expect::Created,
                FileReply::OpenedDir(..) => Expect::OpenedDir,
                FileReply::Dir(_) => Expect::Dir,
                FileReply::StatFs(_) => Expect::StatFs,
                FileReply::Lock(_) => Expect::Lock,
            },
        }
    }
}
