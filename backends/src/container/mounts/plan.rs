//! The steps of a mount in a machine that runs, in a child of the daemon. Nothing here allocates.

use super::owner::Rights;
use crate::MountMode;
use crate::container::child::{Failed, Step};
use rustix::fs::{
    Access, AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, StatxAttributes, StatxFlags, accessat, chmodat,
    chownat, fstat, fstatfs, mkdirat, openat, openat2, statx,
};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
    fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, mount_change, move_mount, open_tree,
    unmount,
};
use rustix::process::{Gid, Uid, fchdir};
use rustix::thread::{ThreadNameSpaceType, UnshareFlags, move_into_thread_name_spaces, unshare_unsafe};
use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

const DIR: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// Where what is to be mounted comes from.
#[derive(Debug)]
pub(super) enum From {
    /// A path that the owner has to be able to walk.
    Path(CString),
    /// A directory that is open: a volume's. Its path, for an ordinary user's daemon.
    Open(OwnedFd, CString),
}

/// A directory of the machine's for what it changes.
#[derive(Debug)]
pub(super) struct Layer {
    /// `upper`, `work` and `lower` are in it.
    pub(super) dir: CString,
    /// Is `upper` new? Then it gets the owner and the permissions of what it is laid over.
    pub(super) is_new: bool,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Plan<'a> {
    pub(super) from: From,
    pub(super) mode: MountMode,
    pub(super) rights: Option<Rights>,
    /// How owners are shown.
    pub(super) idmap: Option<OwnedFd>,
    pub(super) layer: Option<Layer>,
    /// The machine's init.
    pub(super) machine: BorrowedFd<'a>,
    /// An ordinary user's daemon: first into the machine's user namespace.
    pub(super) is_user: bool,
    /// The host's numbers of the one who acts as the owner there, and of the machine's root.
    pub(super) acting: (Uid, Gid),
    pub(super) root: (Uid, Gid),
    /// Our own file systems, to be off every mount namespace.
    pub(super) fuse: Vec<CString>,
    /// The target, cut after each of its names, with that name.
    pub(super) target: Vec<(CString, CString)>,
}

/// The answer of [`Plan::carry_out`] when owners could not be mapped, beside the mount's number.
pub(super) const UNMAPPED: u64 = 1 << 63;

impl Plan<'_> {
    /// Mounts, and gives the mount's number.
    pub(super) fn carry_out(&self) -> Result<u64, Failed> {
        let source = self.open()?;
        if self.is_user {
            move_into_thread_name_spaces(self.machine, ThreadNameSpaceType::USER)
                .step("entering the machine's user namespace")?;
        }
        if self.is_user || self.layer.is_some() {
            self.mount_namespace()?;
        }
        // A mount of another mount namespace than the thread's cannot be copied.
        let again = if self.is_user || self.layer.is_some() { Some(self.reopen(&source)?) } else { None };
        let (tree, is_mapped) = self.tree(again.as_ref().unwrap_or(&source))?;
        let tree = match &self.layer {
            Some(layer) => self.overlay(layer, &tree)?,
            None => tree,
        };
        move_into_thread_name_spaces(self.machine, ThreadNameSpaceType::MOUNT)
            .step("entering the machine's mount namespace")?;
        let target = self.target()?;
        let number = mount_number(tree.as_fd()).step("looking at the mount")?;
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        move_mount(&tree, c"", &target, c"", flags).step("mounting at the target")?;
        Ok(if is_mapped { number } else { number | UNMAPPED })
    }

    fn open(&self) -> Result<OwnedFd, Failed> {
        let path = match &self.from {
            From::Path(path) => path,
            From::Open(fd, _) => return openat(fd, c".", DIR, Mode::empty()).step("opening the volume"),
        };
        if let Some(rights) = &self.rights {
            rights.take_on().step("taking on the owner's rights")?;
        }
        let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let source = openat2(CWD, path, DIR, Mode::empty(), resolve).step("opening the source")?;
        let wanted = match self.mode {
            MountMode::Rw => Access::READ_OK | Access::WRITE_OK | Access::EXEC_OK,
            MountMode::Ro | MountMode::Cow => Access::READ_OK | Access::EXEC_OK,
        };
        accessat(&source, c".", wanted, AtFlags::EACCESS).step("the owner's rights on the source")?;
        if self.rights.is_some() {
            Rights::put_off().step("putting off the owner's rights")?;
        }
        Ok(source)
    }

    /// A mount namespace of our own, a copy of the host's.
    fn mount_namespace(&self) -> Result<(), Failed> {
        // SAFETY: the child has no other thread.
        unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.step("making a mount namespace")?;
        let private = MountPropagationFlags::REC | MountPropagationFlags::PRIVATE;
        mount_change(c"/", private).step("making mounts private")?;
        for at in &self.fuse {
            // A user namespace may not unmount what it was born with; this one ends in a moment.
            let _ = unmount(at, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
        }
        Ok(())
    }

    /// The source in this mount namespace; it has to be the same directory.
    fn reopen(&self, source: &OwnedFd) -> Result<OwnedFd, Failed> {
        let path = match &self.from {
            From::Path(path) | From::Open(_, path) => path,
        };
        let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let again = openat2(CWD, path, DIR, Mode::empty(), resolve).step("opening the source")?;
        let (one, two) = (fstat(source).step("the source")?, fstat(&again).step("the source")?);
        if (one.st_dev, one.st_ino) != (two.st_dev, two.st_ino) {
            return Err(("the source, which changes", Errno::STALE));
        }
        Ok(again)
    }

    /// The source as a mount that is nowhere yet, and whether owners are mapped in it.
    fn tree(&self, source: &OwnedFd) -> Result<(OwnedFd, bool), Failed> {
        let mut flags =
            OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
        // Mounts below it, which may hide something, cannot be left behind by a user namespace that was born with them.
        if self.is_user {
            flags |= OpenTreeFlags::AT_RECURSIVE;
        }
        let tree = open_tree(source, c"", flags).step("copying the source's mount")?;
        let read_only =
            if self.mode == MountMode::Rw { MountAttrFlags::empty() } else { MountAttrFlags::MOUNT_ATTR_RDONLY };
        let plain = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | read_only;
        set_attributes(&tree, plain, None, self.is_user).step("setting the mount's attributes")?;
        match &self.idmap {
            None => Ok((tree, true)),
            Some(userns) => match set_attributes(&tree, MountAttrFlags::empty(), Some(userns), false) {
                Ok(()) => Ok((tree, true)),
                // The source's file system cannot: owners show as nobody, who has the rights of all others.
                Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::PERM) => Ok((tree, false)),
                Err(e) => Err(("mapping the mount's owners", e)),
            },
        }
    }

    fn overlay(&self, layer: &Layer, below: &OwnedFd) -> Result<OwnedFd, Failed> {
        let dir = openat2(CWD, &layer.dir, DIR, Mode::empty(), ResolveFlags::NO_MAGICLINKS).step("the layer")?;
        fchdir(&dir).step("the layer")?;
        if layer.is_new {
            let stat = fstat(below).step("the source")?;
            if !self.is_user {
                chownat(&dir, c"upper", Some(self.acting.0), Some(self.acting.1), AtFlags::SYMLINK_NOFOLLOW)
                    .step("the layer's owner")?;
            }
            let mode = Mode::from_raw_mode(stat.st_mode) | Mode::RWXU;
            chmodat(&dir, c"upper", mode, AtFlags::empty()).step("the layer's permissions")?;
        }
        move_mount(below, c"", CWD, c"lower", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).step("mounting the source")?;
        let made = fsopen(c"overlay", FsOpenFlags::FSOPEN_CLOEXEC).step("overlay")?;
        if self.is_user {
            fsconfig_set_flag(&made, c"userxattr").step("overlay")?;
        }
        for (key, value) in
            [(c"source", c"machinefs"), (c"lowerdir", c"lower"), (c"upperdir", c"upper"), (c"workdir", c"work")]
        {
            fsconfig_set_string(&made, key, value).step("overlay")?;
        }
        fsconfig_create(&made).step("making the overlay")?;
        let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
        fsmount(&made, FsMountFlags::FSMOUNT_CLOEXEC, attributes).step("mounting the overlay")
    }

    /// The directory to mount on, in the machine's mount namespace; what is missing of it is made.
    fn target(&self) -> Result<OwnedFd, Failed> {
        let open = |path: &CString| {
            openat2(CWD, path, DIR, Mode::empty(), ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS)
        };
        let mut last = openat(CWD, c"/", DIR, Mode::empty()).step("the machine's root")?;
        for (path, name) in &self.target {
            let next = match open(path) {
                Err(Errno::NOENT) => {
                    writable(&last).step("the target")?;
                    mkdirat(&last, name, Mode::from_raw_mode(0o755)).step("making the target")?;
                    if !self.is_user {
                        let (uid, gid) = self.root;
                        chownat(&last, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
                            .step("making the target")?;
                    }
                    open(path).step("the target")?
                }
                other => other.step("the target")?,
            };
            last = next;
        }
        writable(&last).step("the target")?;
        let stat = statx(&last, c"", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS).step("the target")?;
        if stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) {
            return Err(("something is mounted at the target", Errno::EXIST));
        }
        Ok(last)
    }
}

/// Refuses the kernel's own file systems as targets: what programs take for the kernel's word.
fn writable(dir: &OwnedFd) -> rustix::io::Result<()> {
    const PROC: u64 = 0x9fa0;
    const SYSFS: u64 = 0x6265_6572;
    const CGROUP: u64 = 0x0027_e0eb;
    const CGROUP2: u64 = 0x6367_7270;
    let kind = fstatfs(dir)?.f_type as u64;
    if [PROC, SYSFS, CGROUP, CGROUP2].contains(&kind) { Err(Errno::INVAL) } else { Ok(()) }
}

pub(super) fn mount_number(fd: BorrowedFd<'_>) -> rustix::io::Result<u64> {
    Ok(statx(fd, c"", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)?.stx_mnt_id)
}

fn set_attributes(tree: &OwnedFd, set: MountAttrFlags, userns: Option<&OwnedFd>, all: bool) -> rustix::io::Result<()> {
    let idmap = if userns.is_some() { libc::MOUNT_ATTR_IDMAP } else { 0 };
    let attributes = libc::mount_attr {
        attr_set: u64::from(set.bits()) | idmap,
        attr_clr: 0,
        propagation: 0,
        userns_fd: userns.map_or(0, |fd| fd.as_raw_fd() as u64),
    };
    let flags = libc::AT_EMPTY_PATH | if all { libc::AT_RECURSIVE } else { 0 };
    let (fd, size) = (tree.as_raw_fd(), size_of::<libc::mount_attr>());
    // SAFETY: a system call on a descriptor that is open, with a string and a structure that live.
    let result =
        unsafe { libc::syscall(libc::SYS_mount_setattr, fd, c"".as_ptr(), flags, &raw const attributes, size) };
    if result == 0 { Ok(()) } else { Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)) }
}

/// Takes a mount off: the one of that number, at `name` in the directory `parent` (both without symbolic links).
pub(super) fn take_off(
    machine: BorrowedFd<'_>,
    is_user: bool,
    parent: &CString,
    name: &CString,
    number: u64,
) -> Result<u64, Failed> {
    if is_user {
        move_into_thread_name_spaces(machine, ThreadNameSpaceType::USER)
            .step("entering the machine's user namespace")?;
    }
    move_into_thread_name_spaces(machine, ThreadNameSpaceType::MOUNT).step("entering the machine's mount namespace")?;
    let dir = openat2(CWD, parent, DIR, Mode::empty(), ResolveFlags::NO_SYMLINKS).step("the target")?;
    let here = statx(&dir, name, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::MNT_ID | StatxFlags::BASIC_STATS)
        .step("the target")?;
    if here.stx_mnt_id != number || FileType::from_raw_mode(here.stx_mode.into()) != FileType::Directory {
        return Err(("the target, which changes", Errno::STALE));
    }
    fchdir(&dir).step("the target")?;
    unmount(name, UnmountFlags::NOFOLLOW).step("unmounting")?;
    Ok(0)
}
