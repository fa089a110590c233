//! Mounting without root: the set-user-id program fusermount3 mounts, and sends the descriptor of /dev/fuse back over
//! a socket (its number is in `_FUSE_COMMFD`).

use super::mount::{MountError, MountOptions};
use rustix::fd::OwnedFd;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType, recvmsg, socketpair,
};
use std::ffi::OsStr;
use std::io::{IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::path::Path;
use std::process::{Command, Stdio};

const PROGRAM: &str = "fusermount3";

/// Mounts, and gives the descriptor.
pub fn mount(target: &Path, options: &MountOptions) -> Result<OwnedFd, MountError> {
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
        .map_err(|error| MountError::system("socketpair", error))?;
    let mut list = "fsname=machinefs,subtype=machinefs,nosuid,nodev,default_permissions".to_string();
    if options.no_exec {
        list.push_str(",noexec");
    }
    if options.allow_other.unwrap_or(false) {
        list.push_str(",allow_other");
    }
    let mut child = Command::new(PROGRAM)
        .args([OsStr::new("-o"), OsStr::new(&list), OsStr::new("--"), target.as_os_str()])
        .env("_FUSE_COMMFD", "0")
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(program_error)?;
    // The parent's copy of the child's end went with the Command, so this ends when the child does.
    let device = receive(&ours);
    let mut complaint = String::new();
    if let Some(mut stderr) = child.stderr.take() {
        let _ = stderr.read_to_string(&mut complaint);
    }
    let status = child.wait().map_err(|error| MountError::System { call: "wait for fusermount3", error })?;
    match device {
        Ok(Some(device)) if status.success() => Ok(device),
        Err(error) => Err(MountError::system("recvmsg from fusermount3", error)),
        Ok(_) => Err(refusal(&complaint)),
    }
}

/// Unmounts what we mounted. That it is gone already is no error.
pub fn unmount(path: &Path, lazy: bool) -> Result<(), MountError> {
    let mut command = Command::new(PROGRAM);
    command.arg("-u");
    if lazy {
        command.arg("-z");
    }
    let output = command.arg("--").arg(path).stdin(Stdio::null()).output().map_err(program_error)?;
    if output.status.success() {
        return Ok(());
    }
    let complaint = String::from_utf8_lossy(&output.stderr);
    if complaint.contains("busy") {
        return Err(MountError::Busy(path.to_path_buf()));
    }
    Err(refusal(&complaint))
}

fn program_error(error: std::io::Error) -> MountError {
    match error.kind() {
        std::io::ErrorKind::NotFound => MountError::NoFusermount,
        _ => MountError::System { call: "fusermount3", error },
    }
}

fn refusal(complaint: &str) -> MountError {
    let complaint = complaint.trim();
    if complaint.contains("/dev/fuse") && complaint.contains("ermission denied") {
        return MountError::DeviceForbidden;
    }
    if complaint.contains("device not found") {
        return MountError::NoDevice;
    }
    MountError::Fusermount(if complaint.is_empty() { "it gave no reason".into() } else { complaint.into() })
}

/// Receives one descriptor; `None` when the other end closes without one.
fn receive(socket: &OwnedFd) -> rustix::io::Result<Option<OwnedFd>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0u8; 1];
    rustix::io::retry_on_intr(|| {
        recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)
    })?;
    let descriptor = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    Ok(descriptor)
}
