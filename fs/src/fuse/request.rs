//! Decoding: the bytes of a request become an operation. Every length is checked, though the kernel is trusted: a
//! mistake here should be an error of one request.

use super::abi::{self, Opcode};
use super::reply::Expect;
use crate::errno::Errno;
use crate::tree::ops::{Lock, NodeId, Op, SetAttr, SetTime, Timestamp};
use zerocopy::FromBytes;

/// What is to be done with a request.
pub enum Request<'a> {
    /// An operation of the file system, and the form of its answer.
    Op(Op<'a>, Expect),
    /// As [`Op::Poll`]; `kh` is there when the poller wants a notice.
    Poll { node: NodeId, handle: u64, events: u32, kh: Option<u64> },
    /// The kernel gives up holds on one node. Not answered.
    Forget { node: NodeId, count: u64 },
    /// The same for many nodes. Not answered.
    ForgetMany(Forgets<'a>),
    /// A pending request is not wanted any more. Not answered.
    Interrupt { unique: u64 },
    /// Answered with success by this layer.
    Succeed,
    /// Answered with an error by this layer.
    Refuse(Errno),
    /// Not answered.
    Ignore,
}

/// The request is not as the protocol has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malformed;

/// The nodes of a BATCH_FORGET.
pub struct Forgets<'a>(&'a [u8]);

impl Iterator for Forgets<'_> {
    type Item = (NodeId, u64);

    fn next(&mut self) -> Option<Self::Item> {
        let (one, rest) = abi::ForgetOne::read_from_prefix(self.0).ok()?;
        self.0 = rest;
        Some((one.node, one.nlookup))
    }
}

/// What is left of a request's body.
struct Body<'a>(&'a [u8]);

impl<'a> Body<'a> {
    fn take<T: FromBytes>(&mut self) -> Result<T, Malformed> {
        let (value, rest) = T::read_from_prefix(self.0).map_err(|_| Malformed)?;
        self.0 = rest;
        Ok(value)
    }

    /// A string that ends with a NUL.
    fn text(&mut self) -> Result<&'a [u8], Malformed> {
        let end = self.0.iter().position(|&byte| byte == 0).ok_or(Malformed)?;
        let (text, rest) = self.0.split_at_checked(end).ok_or(Malformed)?;
        self.0 = rest.get(1..).unwrap_or_default();
        Ok(text)
    }

    /// A name in a directory.
    fn name(&mut self) -> Result<&'a [u8], Malformed> {
        let name = self.text()?;
        if name.is_empty() || name.contains(&b'/') { Err(Malformed) } else { Ok(name) }
    }

    fn bytes(&mut self, count: u32) -> Result<&'a [u8], Malformed> {
        let (bytes, rest) = self.0.split_at_checked(count as usize).ok_or(Malformed)?;
        self.0 = rest;
        Ok(bytes)
    }
}

/// Splits a message into header and body, without the extensions at its end (none are asked for).
pub fn split(message: &[u8]) -> Result<(abi::InHeader, &[u8]), Malformed> {
    let (header, body) = abi::InHeader::read_from_prefix(message).map_err(|_| Malformed)?;
    if header.len as usize != message.len() {
        return Err(Malformed);
    }
    let length = body.len().checked_sub(usize::from(header.total_extlen) * 8).ok_or(Malformed)?;
    Ok((header, body.get(..length).ok_or(Malformed)?))
}

/// Decodes a request.
pub fn decode<'a>(header: &abi::InHeader, body: &'a [u8]) -> Result<Request<'a>, Malformed> {
    let Some(opcode) = Opcode::from_number(header.opcode) else {
        // Newer kernels try operations that this code does not know: they do without when they hear ENOSYS.
        tracing::debug!(opcode = header.opcode, "an operation that is not known");
        return Ok(Request::Refuse(Errno::ENOSYS));
    };
    let node = header.node;
    let mut body = Body(body);
    let request = match opcode {
        Opcode::Lookup => Request::Op(Op::Lookup { parent: node, name: body.name()? }, Expect::Entry),
        Opcode::Forget => Request::Forget { node, count: body.take::<abi::ForgetIn>()?.nlookup },
        Opcode::BatchForget => {
            let count = body.take::<abi::BatchForgetIn>()?.count;
            let length = count.checked_mul(size_of::<abi::ForgetOne>() as u32).ok_or(Malformed)?;
            Request::ForgetMany(Forgets(body.bytes(length)?))
        }
        Opcode::GetAttr => {
            let input: abi::GetAttrIn = body.take()?;
            let handle = (input.getattr_flags & abi::GETATTR_FH != 0).then_some(input.fh);
            Request::Op(Op::GetAttr { node, handle }, Expect::Attr)
        }
        Opcode::Statx => {
            let input: abi::StatxIn = body.take()?;
            let handle = (input.getattr_flags & abi::GETATTR_FH != 0).then_some(input.fh);
            Request::Op(Op::GetAttr { node, handle }, Expect::Statx)
        }
        Opcode::SetAttr => {
            let input: abi::SetAttrIn = body.take()?;
            let handle = (input.valid & abi::fattr::FH != 0).then_some(input.fh);
            Request::Op(Op::SetAttr { node, handle, set: set_attr(&input) }, Expect::Attr)
        }
        Opcode::ReadLink => Request::Op(Op::ReadLink { node }, Expect::Link),
        Opcode::SymLink => {
            let name = body.name()?;
            Request::Op(Op::SymLink { parent: node, name, target: body.text()? }, Expect::Entry)
        }
        Opcode::MkNod => {
            let input: abi::MkNodIn = body.take()?;
            let rdev = abi::decode_device(input.rdev);
            let op = Op::MkNod { parent: node, name: body.name()?, mode: input.mode, umask: input.umask, rdev };
            Request::Op(op, Expect::Entry)
        }
        Opcode::MkDir => {
            let input: abi::MkDirIn = body.take()?;
            let op = Op::MkDir { parent: node, name: body.name()?, mode: input.mode, umask: input.umask };
            Request::Op(op, Expect::Entry)
        }
        Opcode::Unlink => Request::Op(Op::Unlink { parent: node, name: body.name()? }, Expect::Nothing),
        Opcode::RmDir => Request::Op(Op::RmDir { parent: node, name: body.name()? }, Expect::Nothing),
        Opcode::Rename => {
            let input: abi::RenameIn = body.take()?;
            rename(node, input.new_dir, 0, &mut body)?
        }
        Opcode::Rename2 => {
            let input: abi::Rename2In = body.take()?;
            rename(node, input.new_dir, input.flags, &mut body)?
        }
        Opcode::Link => {
            let input: abi::LinkIn = body.take()?;
            let op = Op::Link { node: input.old_node, new_parent: node, new_name: body.name()? };
            Request::Op(op, Expect::Entry)
        }
        Opcode::Open => {
            let input: abi::OpenIn = body.take()?;
            let kill_suidgid = input.open_flags & abi::OPEN_KILL_SUIDGID != 0;
            Request::Op(Op::Open { node, flags: input.flags, kill_suidgid }, Expect::Opened { node })
        }
        Opcode::OpenDir => {
            let input: abi::OpenIn = body.take()?;
            Request::Op(Op::OpenDir { node, flags: input.flags }, Expect::OpenedDir { node })
        }
        Opcode::Create => {
            let input: abi::CreateIn = body.take()?;
            let abi::CreateIn { flags, mode, umask, .. } = input;
            Request::Op(Op::Create { parent: node, name: body.name()?, mode, umask, flags }, Expect::Created)
        }
        Opcode::TmpFile => {
            // A name follows, which the kernel made up and which means nothing.
            let input: abi::CreateIn = body.take()?;
            let abi::CreateIn { flags, mode, umask, .. } = input;
            Request::Op(Op::TmpFile { parent: node, mode, umask, flags }, Expect::Created)
        }
        Opcode::Read => {
            let input: abi::ReadIn = body.take()?;
            let owner = (input.read_flags & abi::READ_LOCKOWNER != 0).then_some(input.lock_owner);
            let abi::ReadIn { fh: handle, offset, size, flags, .. } = input;
            Request::Op(Op::Read { node, handle, offset, size, flags, owner }, Expect::Data { max: size })
        }
        Opcode::Write => {
            let input: abi::WriteIn = body.take()?;
            let owner = (input.write_flags & abi::WRITE_LOCKOWNER != 0).then_some(input.lock_owner);
            let kill_suidgid = input.write_flags & abi::WRITE_KILL_SUIDGID != 0;
            let abi::WriteIn { fh: handle, offset, size, flags, .. } = input;
            let data = body.bytes(size)?;
            Request::Op(
                Op::Write { node, handle, offset, data, flags, owner, kill_suidgid },
                Expect::Written { max: size },
            )
        }
        Opcode::Flush => {
            let input: abi::FlushIn = body.take()?;
            Request::Op(Op::Flush { node, handle: input.fh, owner: input.lock_owner }, Expect::Nothing)
        }
        Opcode::Release => {
            let input: abi::ReleaseIn = body.take()?;
            Request::Op(Op::Release { node, handle: input.fh, owner: input.lock_owner }, Expect::Nothing)
        }
        Opcode::ReleaseDir => {
            let input: abi::ReleaseIn = body.take()?;
            Request::Op(Op::ReleaseDir { node, handle: input.fh }, Expect::Nothing)
        }
        Opcode::Fsync | Opcode::FsyncDir => {
            let input: abi::FsyncIn = body.take()?;
            let (handle, data_only) = (input.fh, input.fsync_flags & abi::FSYNC_FDATASYNC != 0);
            let op = match opcode {
                Opcode::Fsync => Op::Fsync { node, handle, data_only },
                _ => Op::FsyncDir { node, handle, data_only },
            };
            Request::Op(op, Expect::Nothing)
        }
        Opcode::ReadDir | Opcode::ReadDirPlus => {
            let input: abi::ReadIn = body.take()?;
            let plus = opcode == Opcode::ReadDirPlus;
            let (max, cost): (usize, fn(usize) -> usize) =
                (input.size as usize, if plus { abi::dirent_plus_cost } else { abi::dirent_cost });
            let op = Op::ReadDir { node, handle: input.fh, cookie: input.offset, max, plus, cost };
            Request::Op(op, Expect::Dir { max, plus })
        }
        Opcode::StatFs => Request::Op(Op::StatFs { node }, Expect::StatFs),
        Opcode::GetXattr => {
            let max = body.take::<abi::GetXattrIn>()?.size;
            Request::Op(Op::GetXattr { node, name: body.text()?, max }, Expect::Xattr { max })
        }
        Opcode::ListXattr => {
            let max = body.take::<abi::GetXattrIn>()?.size;
            Request::Op(Op::ListXattr { node, max }, Expect::Xattr { max })
        }
        Opcode::SetXattr => {
            let input: abi::SetXattrIn = body.take()?;
            let name = body.text()?;
            let value = body.bytes(input.size)?;
            Request::Op(Op::SetXattr { node, name, value, flags: input.flags }, Expect::Nothing)
        }
        Opcode::RemoveXattr => Request::Op(Op::RemoveXattr { node, name: body.text()? }, Expect::Nothing),
        Opcode::Fallocate => {
            let input: abi::FallocateIn = body.take()?;
            let abi::FallocateIn { fh: handle, offset, length: len, mode, .. } = input;
            Request::Op(Op::Fallocate { node, handle, offset, len, mode }, Expect::Nothing)
        }
        Opcode::LSeek => {
            let input: abi::LSeekIn = body.take()?;
            let abi::LSeekIn { fh: handle, offset, whence, .. } = input;
            Request::Op(Op::Seek { node, handle, offset, whence }, Expect::Offset { from: offset })
        }
        Opcode::CopyFileRange => copy_range(node, body.take()?, u64::from(u32::MAX), |max| Expect::Copied { max }),
        Opcode::CopyFileRange64 => copy_range(node, body.take()?, u64::MAX, |max| Expect::Copied64 { max }),
        Opcode::GetLk | Opcode::SetLk | Opcode::SetLkW => {
            let input: abi::LkIn = body.take()?;
            let abi::FileLock { start, end, kind, pid } = input.lk;
            let lock = Lock { start, end, kind, pid };
            let (handle, owner) = (input.fh, input.owner);
            if opcode == Opcode::GetLk {
                Request::Op(Op::GetLock { node, handle, owner, lock }, Expect::Lock)
            } else {
                let (flock, wait) = (input.lk_flags & abi::LK_FLOCK != 0, opcode == Opcode::SetLkW);
                Request::Op(Op::SetLock { node, handle, owner, lock, flock, wait }, Expect::Nothing)
            }
        }
        Opcode::Poll => {
            let input: abi::PollIn = body.take()?;
            let kh = (input.flags & abi::POLL_SCHEDULE_NOTIFY != 0).then_some(input.kh);
            Request::Poll { node, handle: input.fh, events: input.events, kh }
        }
        Opcode::Interrupt => Request::Interrupt { unique: body.take::<abi::InterruptIn>()?.unique },
        Opcode::SyncFs => Request::Op(Op::SyncFs { node }, Expect::Nothing),
        // Not sent with default_permissions, where the kernel checks by itself; nor is there anything to destroy.
        Opcode::Access | Opcode::Destroy => Request::Succeed,
        Opcode::IoCtl => Request::Refuse(Errno::ENOTTY),
        Opcode::BMap => Request::Refuse(Errno::EINVAL),
        Opcode::SetupMapping | Opcode::RemoveMapping => Request::Refuse(Errno::EOPNOTSUPP),
        // INIT comes once, before the readers start.
        Opcode::Init => Request::Refuse(Errno::EPROTO),
        Opcode::NotifyReply => Request::Ignore,
    };
    Ok(request)
}

fn rename<'a>(parent: NodeId, new_parent: NodeId, flags: u32, body: &mut Body<'a>) -> Result<Request<'a>, Malformed> {
    let name = body.name()?;
    let new_name = body.name()?;
    Ok(Request::Op(Op::Rename { parent, name, new_parent, new_name, flags }, Expect::Nothing))
}

fn copy_range<'a>(node: NodeId, input: abi::CopyFileRangeIn, most: u64, expect: fn(u64) -> Expect) -> Request<'a> {
    let len = input.len.min(most);
    let op = Op::CopyRange {
        from: node,
        from_handle: input.fh_in,
        from_offset: input.off_in,
        to: input.node_out,
        to_handle: input.fh_out,
        to_offset: input.off_out,
        len,
    };
    Request::Op(op, expect(len))
}

fn set_attr(input: &abi::SetAttrIn) -> SetAttr {
    use abi::fattr;
    let has = |bit: u32| input.valid & bit != 0;
    let time = |set: u32, now: u32, secs: u64, nanos: u32| match (has(now), has(set)) {
        (true, _) => Some(SetTime::Now),
        (false, true) => Some(SetTime::At(Timestamp { secs: secs as i64, nanos })),
        (false, false) => None,
    };
    SetAttr {
        mode: has(fattr::MODE).then_some(input.mode),
        uid: has(fattr::UID).then_some(input.uid),
        gid: has(fattr::GID).then_some(input.gid),
        size: has(fattr::SIZE).then_some(input.size),
        atime: time(fattr::ATIME, fattr::ATIME_NOW, input.atime, input.atimensec),
        mtime: time(fattr::MTIME, fattr::MTIME_NOW, input.mtime, input.mtimensec),
        kill_suidgid: has(fattr::KILL_SUIDGID),
    }
}
