//! The rights of a machine's owner on the host.

use crate::Owner;
use rustix::process::{Gid, Uid};
use std::ffi::CStr;
use std::io;
use std::path::{Path, PathBuf};

/// A user with all their groups.
#[derive(Clone, Debug)]
pub(super) struct Rights {
    uid: Uid,
    gid: Gid,
    groups: Vec<Gid>,
}

impl Rights {
    /// Those of a machine's owner, as the host's user database has them. `None`: they are the daemon's own.
    pub(super) fn of(owner: &Owner) -> Option<Self> {
        if !rustix::process::geteuid().is_root() || owner.uid == 0 {
            return None;
        }
        let (uid, gid) = (Uid::from_raw(owner.uid), Gid::from_raw(owner.gid));
        Some(Self { uid, gid, groups: groups(owner).into_iter().map(Gid::from_raw).collect() })
    }

    /// Takes them on, for this thread only, and in a way that [`Rights::put_off`] can undo. Allocates nothing.
    pub(super) fn take_on(&self) -> rustix::io::Result<()> {
        let root = Uid::ROOT;
        rustix::thread::set_thread_groups(&self.groups)?;
        rustix::thread::set_thread_res_gid(self.gid, self.gid, self.gid)?;
        rustix::thread::set_thread_res_uid(root, self.uid, root)
    }

    /// Back to root's.
    pub(super) fn put_off() -> rustix::io::Result<()> {
        let (root, group) = (Uid::ROOT, Gid::ROOT);
        rustix::thread::set_thread_res_uid(root, root, root)?;
        rustix::thread::set_thread_res_gid(group, group, group)?;
        rustix::thread::set_thread_groups(&[])
    }
}

fn groups(owner: &Owner) -> Vec<u32> {
    let mut buffer = vec![0; 16 << 10];
    let mut entry = std::mem::MaybeUninit::<libc::passwd>::uninit();
    let mut found = std::ptr::null_mut();
    // SAFETY: pointers to memory of the lengths given, which lives through the call.
    let failed = unsafe {
        libc::getpwuid_r(owner.uid, entry.as_mut_ptr(), buffer.as_mut_ptr().cast(), buffer.len(), &raw mut found)
    };
    if failed != 0 || found.is_null() {
        return vec![owner.gid];
    }
    // SAFETY: the call has filled the entry, and its name is a string in the buffer.
    let name = unsafe { CStr::from_ptr((*found).pw_name) };
    let mut groups = vec![0; 1024];
    let mut count = i32::try_from(groups.len()).unwrap_or(0);
    // SAFETY: a string and an array of the length given, which live through the call.
    unsafe { libc::getgrouplist(name.as_ptr(), owner.gid, groups.as_mut_ptr(), &raw mut count) };
    groups.truncate(usize::try_from(count).unwrap_or(0));
    groups
}

/// The directory that a path means to a machine's owner: absolute, without symbolic links, as
/// [`MountSource::Host`](crate::MountSource::Host) wants it. To be asked when the owner names it, and kept: a link that is
/// changed later (a machine that has a mount may do so) then leads nowhere.
///
/// For a thread that may block; the path must not lead into the daemon's own file system.
///
/// # Errors
/// Those of the file system, with the owner's rights; ENOTDIR for what is no directory.
pub fn canonical_source(owner: &Owner, path: &Path) -> io::Result<PathBuf> {
    if !path.is_absolute() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the path has to be absolute"));
    }
    let rights = Rights::of(owner);
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            if let Some(rights) = &rights {
                rights.take_on()?;
            }
            let real = path.canonicalize()?;
            if !real.metadata()?.is_dir() {
                return Err(io::Error::from_raw_os_error(libc::ENOTDIR));
            }
            Ok(real)
        });
        thread.join().unwrap_or_else(|_| Err(io::Error::other("a thread ended")))
    })
}
