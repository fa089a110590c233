//! Files that belong to the caller on the host, mapped into the guest, and not to the agent's root.

use machinefs_protocol::file::Owner;
use rustix::io::Errno;
use std::marker::PhantomData;

/// This thread's file system identity, set to another's until dropped (setfsuid(2), setfsgid(2): both are the
/// thread's own, and ownership, quotas, set-group-id directories and default ACLs then follow the kernel's rules).
struct Identity {
    uid: u32,
    gid: u32,
    /// It belongs to the thread that made it.
    not_send: PhantomData<*const ()>,
}

fn set_fsuid(uid: u32) -> u32 {
    // SAFETY: a system call on a number; it changes this thread only (the C library has no wrapper that spreads it).
    unsafe { libc::syscall(libc::SYS_setfsuid, uid) as u32 }
}

fn set_fsgid(gid: u32) -> u32 {
    // SAFETY: as above.
    unsafe { libc::syscall(libc::SYS_setfsgid, gid) as u32 }
}

impl Identity {
    /// EOVERFLOW for a user or group that this user namespace does not have.
    fn assume(owner: Owner) -> Result<Identity, Errno> {
        // The calls do not tell whether they worked; asking again, by setting it again, does.
        let gid = set_fsgid(owner.gid);
        let uid = set_fsuid(owner.uid);
        let identity = Identity { uid, gid, not_send: PhantomData };
        if set_fsuid(owner.uid) != owner.uid || set_fsgid(owner.gid) != owner.gid {
            return Err(Errno::OVERFLOW);
        }
        Ok(identity)
    }
}

impl Drop for Identity {
    fn drop(&mut self) {
        // Back to the thread's effective numbers, which is always allowed.
        set_fsuid(self.uid);
        set_fsgid(self.gid);
    }
}

/// What `create` made, and whether it was made as root, so that it is still to be given to its owner.
///
/// As another user than root the kernel checks permissions again, which the host has done already, with the caller's
/// groups, of which this thread knows nothing. So what is refused is done again as root.
pub(super) fn create_as<T>(owner: Owner, create: impl Fn() -> Result<T, Errno>) -> Result<(T, bool), Errno> {
    if owner.uid == 0 && owner.gid == 0 {
        return Ok((create()?, false));
    }
    let identity = Identity::assume(owner)?;
    let result = create();
    drop(identity);
    match result {
        Err(Errno::ACCESS | Errno::PERM) => Ok((create()?, true)),
        result => Ok((result?, false)),
    }
}
