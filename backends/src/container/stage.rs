//! The mount namespace in which the runtime is started: everything a machine's root is made of is mounted there, and
//! nowhere else, so it goes when the runtime and the machine are gone, whatever else happens.
//!
//! A [`Stage`] is a list of steps, prepared with all memory they need before the fork and carried out between fork and
//! exec, where only direct system calls are allowed: other threads of the daemon may have held any lock.

use rustix::fd::RawFd;
use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

/// `struct mount_attr` of mount_setattr(2).
#[repr(C)]
struct MountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

/// `struct open_how` of openat2(2).
#[repr(C)]
struct OpenHow {
    flags: u64,
    mode: u64,
    resolve: u64,
}

const MOUNT_ATTR_RDONLY: u64 = 0x1;
const MOUNT_ATTR_NODEV: u64 = 0x4;
const MOUNT_ATTR_IDMAP: u64 = 0x0010_0000;
const OPEN_TREE_CLONE: libc::c_uint = 1;
const OPEN_TREE_CLOEXEC: libc::c_uint = libc::O_CLOEXEC as libc::c_uint;
const FSOPEN_CLOEXEC: libc::c_uint = 1;
const FSMOUNT_CLOEXEC: libc::c_uint = 1;
const FSCONFIG_SET_FLAG: libc::c_uint = 0;
const FSCONFIG_SET_STRING: libc::c_uint = 1;
const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
const MOVE_MOUNT_F_EMPTY_PATH: libc::c_uint = 0x4;
const MOVE_MOUNT_T_EMPTY_PATH: libc::c_uint = 0x40;
const RESOLVE_NO_XDEV: u64 = 0x01;
const RESOLVE_NO_SYMLINKS: u64 = 0x04;
const RESOLVE_BENEATH: u64 = 0x08;

/// An overlay to mount. Its paths are relative to the working directory ([`Stage::enter`]): fsconfig(2) takes 255 bytes.
#[derive(Debug)]
struct Overlay {
    /// `lowerdir`, `upperdir`, `workdir`, and what else cannot be left out.
    options: Vec<(CString, CString)>,
    /// Wanted: `index=on,nfs_export=on`; without them where the file systems below cannot.
    extra: Vec<(CString, CString)>,
    flags: Vec<CString>,
    /// Where: the root of the machine itself, or a directory in it, resolved without leaving it and without links.
    root: CString,
    below: Option<CString>,
}

#[derive(Debug)]
enum Step {
    User { ready: RawFd, go: RawFd, parent: libc::pid_t },
    MountNamespace,
    Detach(CString),
    Cover(CString),
    Enter(CString),
    Attach { source: CString, target: CString, userns: Option<RawFd> },
    Overlay(Box<Overlay>),
    Descriptor { from: RawFd, to: RawFd },
}

/// See the module. Its steps are done in the order in which they were added.
#[derive(Debug, Default)]
pub(super) struct Stage {
    steps: Vec<(Step, CString)>,
}

fn c(path: impl AsRef<Path>) -> io::Result<CString> {
    Ok(CString::new(path.as_ref().as_os_str().as_bytes())?)
}

impl Stage {
    fn add(&mut self, step: Step, label: String) -> io::Result<()> {
        self.steps.push((step, CString::new(label)?));
        Ok(())
    }

    /// A user namespace of its own first (an ordinary user's way): writes its pid to `ready`, and goes on when `x`
    /// comes from `go`, which says that the maps are written; with anything else it ends.
    pub(super) fn user_namespace(&mut self, ready: RawFd, go: RawFd) -> io::Result<()> {
        let parent = rustix::process::getpid().as_raw_nonzero().get();
        self.add(Step::User { ready, go, parent }, "making a user namespace".into())
    }

    /// A private mount namespace; what follows is seen in it only.
    pub(super) fn mount_namespace(&mut self) -> io::Result<()> {
        self.add(Step::MountNamespace, "making a mount namespace".into())
    }

    /// Takes a mount off, if it is there and can be: a user namespace may not unmount what it was born with.
    pub(super) fn detach(&mut self, at: &Path) -> io::Result<()> {
        self.add(Step::Detach(c(at)?), format!("detaching {}", at.display()))
    }

    /// Puts an empty tmpfs over a directory: what a user namespace may not unmount it can still hide.
    pub(super) fn cover(&mut self, at: &Path) -> io::Result<()> {
        self.add(Step::Cover(c(at)?), format!("covering {}", at.display()))
    }

    /// Makes `dir` the working directory.
    pub(super) fn enter(&mut self, dir: &Path) -> io::Result<()> {
        self.add(Step::Enter(c(dir)?), format!("entering {}", dir.display()))
    }

    /// Shows `source`, without what is mounted below it, at `target`, read-only, with its owners mapped by `userns`.
    pub(super) fn attach(&mut self, source: &Path, target: &Path, userns: Option<&OwnedFd>) -> io::Result<()> {
        let userns = userns.map(AsRawFd::as_raw_fd);
        let label = format!("mounting {} at {}", source.display(), target.display());
        self.add(Step::Attach { source: c(source)?, target: c(target)?, userns }, label)
    }

    /// Mounts an overlay: `lower` are paths relative to the working directory, the top one first. `below`: a directory
    /// in the root `root`, which is mounted already. `user`: inside a user namespace.
    pub(super) fn overlay(
        &mut self,
        lower: &[String],
        upper: &str,
        work: &str,
        root: &Path,
        below: Option<&str>,
        user: bool,
    ) -> io::Result<()> {
        let pair = |k: &str, v: &str| Ok::<_, io::Error>((CString::new(k)?, CString::new(v)?));
        let options = vec![
            pair("source", "machinefs")?,
            pair("lowerdir", &lower.join(":"))?,
            pair("upperdir", upper)?,
            pair("workdir", work)?,
        ];
        let extra = vec![pair("index", "on")?, pair("nfs_export", "on")?];
        let flags = if user { vec![CString::new("userxattr")?] } else { Vec::new() };
        let below_c = below.map(CString::new).transpose()?;
        let overlay = Overlay { options, extra, flags, root: c(root)?, below: below_c };
        self.add(Step::Overlay(Box::new(overlay)), format!("mounting the overlay of /{}", below.unwrap_or_default()))
    }

    /// Gives the program the descriptor `from` as its number `to`.
    pub(super) fn descriptor(&mut self, from: RawFd, to: RawFd) -> io::Result<()> {
        self.add(Step::Descriptor { from, to }, format!("passing descriptor {to}"))
    }

    /// Has `command` do these steps before its program begins. Which step failed is written to `notes` (a pipe), and
    /// [`Notes`] reads it.
    pub(super) fn apply(self, command: &mut Command, notes: RawFd) {
        let steps = self.steps;
        // SAFETY: the closure makes direct system calls on memory prepared before the fork; it takes no lock and
        // allocates nothing (an io::Error from a raw number does not).
        unsafe {
            command.pre_exec(move || {
                for (step, label) in &steps {
                    if let Err(error) = step.run() {
                        note(notes, label);
                        return Err(error);
                    }
                }
                Ok(())
            });
        }
    }
}

/// What a stage said: a line for each thing that went otherwise than wanted.
#[derive(Debug)]
pub(super) struct Notes(OwnedFd);

impl Notes {
    /// The end to read, and the end for [`Stage::apply`].
    pub(super) fn pipe() -> io::Result<(Self, OwnedFd)> {
        let flags = rustix::pipe::PipeFlags::CLOEXEC | rustix::pipe::PipeFlags::NONBLOCK;
        let (read, write) = rustix::pipe::pipe_with(flags)?;
        Ok((Self(read), write))
    }

    /// All lines so far.
    pub(super) fn lines(&self) -> Vec<String> {
        let mut buffer = vec![0; 4096];
        let length = rustix::io::read(&self.0, &mut buffer).unwrap_or(0);
        buffer.truncate(length);
        String::from_utf8_lossy(&buffer).lines().map(str::to_owned).collect()
    }
}

fn note(fd: RawFd, text: &CStr) {
    // SAFETY: write(2) of memory that lives; a lost note changes a message only.
    unsafe {
        libc::write(fd, text.as_ptr().cast(), text.count_bytes());
        libc::write(fd, c"\n".as_ptr().cast(), 1);
    }
}

/// A system call's result as an error, without allocating.
fn check(result: libc::c_long) -> io::Result<RawFd> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as RawFd) }
}

impl Step {
    fn run(&self) -> io::Result<()> {
        match self {
            Self::User { ready, go, parent } => enter_user_namespace(*ready, *go, *parent),
            Self::MountNamespace => {
                let root = c"/".as_ptr();
                let flags = libc::MS_REC | libc::MS_PRIVATE;
                // SAFETY: plain system calls with constant strings.
                unsafe {
                    check(libc::unshare(libc::CLONE_NEWNS).into())?;
                    check(libc::mount(std::ptr::null(), root, std::ptr::null(), flags, std::ptr::null()).into())?;
                }
                Ok(())
            }
            Self::Detach(at) => {
                // SAFETY: a system call with a string that lives. Its failure is no matter: what stays is out of the
                // machine's sight with all other mounts of the host when the runtime changes the root.
                unsafe { libc::umount2(at.as_ptr(), libc::MNT_DETACH | libc::UMOUNT_NOFOLLOW) };
                Ok(())
            }
            Self::Cover(at) => {
                let (tmpfs, options) = (c"tmpfs".as_ptr(), c"mode=755,size=4k".as_ptr().cast());
                let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
                // SAFETY: a system call with strings that live.
                check(unsafe { libc::mount(tmpfs, at.as_ptr(), tmpfs, flags, options) }.into()).map(drop)
            }
            // SAFETY: a system call with a string that lives.
            Self::Enter(dir) => check(unsafe { libc::chdir(dir.as_ptr()) }.into()).map(drop),
            Self::Attach { source, target, userns } => attach(source, target, *userns),
            Self::Overlay(overlay) => overlay.mount(),
            Self::Descriptor { from, to } => {
                // SAFETY: system calls on descriptor numbers; `to` is one that nothing in this process uses, see
                // `ContainerBackend`. dup2 of a number to itself keeps close-on-exec, hence the second call.
                unsafe {
                    check(libc::dup2(*from, *to).into())?;
                    check(libc::fcntl(*to, libc::F_SETFD, 0).into())?;
                }
                Ok(())
            }
        }
    }
}

fn enter_user_namespace(ready: RawFd, go: RawFd, parent: libc::pid_t) -> io::Result<()> {
    // SAFETY: plain system calls; the buffers live on this stack and have the lengths given.
    unsafe {
        check(libc::unshare(libc::CLONE_NEWUSER).into())?;
        // Who is to write the maps may die before: nothing else would end the wait, as this process holds both ends of
        // the pipe. After the unshare, which forgets the signal; the parent may have died before it was set.
        check(libc::syscall(libc::SYS_prctl, libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0))?;
        if libc::getppid() != parent {
            libc::_exit(1);
        }
        let pid = libc::getpid().to_ne_bytes();
        check(libc::write(ready, pid.as_ptr().cast(), pid.len()) as libc::c_long)?;
        let mut byte = [0_u8; 1];
        let n = check(libc::read(go, byte.as_mut_ptr().cast(), 1) as libc::c_long)?;
        if n != 1 || byte != *b"x" {
            return Err(io::Error::from_raw_os_error(libc::EPERM));
        }
        check(libc::syscall(libc::SYS_prctl, libc::PR_SET_PDEATHSIG, 0, 0, 0, 0))?;
        // Groups of the user's that are not mapped would go on giving access to the host's files. Where the maps hold
        // one number only, setgroups is denied: then they cannot be dropped (user_namespaces(7)).
        let groups = libc::syscall(libc::SYS_setgroups, 0, 0);
        if groups < 0 && io::Error::last_os_error().raw_os_error() != Some(libc::EPERM) {
            return Err(io::Error::last_os_error());
        }
        check(libc::syscall(libc::SYS_setresgid, 0, 0, 0))?;
        check(libc::syscall(libc::SYS_setresuid, 0, 0, 0))?;
    }
    Ok(())
}

fn attach(source: &CStr, target: &CStr, userns: Option<RawFd>) -> io::Result<()> {
    // SAFETY: system calls with strings and structures that live through them; the descriptor is owned from here on.
    unsafe {
        let flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC;
        let tree = check(libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, source.as_ptr(), flags))?;
        let tree = OwnedFd::from_raw_fd(tree);
        let idmap = if userns.is_some() { MOUNT_ATTR_IDMAP } else { 0 };
        let attr = MountAttr {
            attr_set: MOUNT_ATTR_RDONLY | MOUNT_ATTR_NODEV | idmap,
            attr_clr: 0,
            propagation: 0,
            userns_fd: userns.map_or(0, |fd| fd as u64),
        };
        let (fd, size) = (tree.as_raw_fd(), size_of::<MountAttr>());
        let empty = c"".as_ptr();
        check(libc::syscall(libc::SYS_mount_setattr, fd, empty, libc::AT_EMPTY_PATH, &raw const attr, size))?;
        let to = target.as_ptr();
        let flags = MOVE_MOUNT_F_EMPTY_PATH;
        check(libc::syscall(libc::SYS_move_mount, fd, empty, libc::AT_FDCWD, to, flags))?;
    }
    Ok(())
}

impl Overlay {
    fn mount(&self) -> io::Result<()> {
        let made = match self.make(true) {
            // Which it is the machine's mount table tells.
            Err(_) => self.make(false)?,
            Ok(made) => made,
        };
        let target = self.target()?;
        let empty = c"".as_ptr();
        let flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH;
        let (from, to) = (made.as_raw_fd(), target.as_raw_fd());
        // SAFETY: a system call on descriptors that are open and a constant string.
        check(unsafe { libc::syscall(libc::SYS_move_mount, from, empty, to, empty, flags) }).map(drop)
    }

    fn make(&self, extra: bool) -> io::Result<OwnedFd> {
        let extra = if extra { self.extra.as_slice() } else { &[] };
        // SAFETY: system calls with strings that live through them; descriptors are owned as soon as they are there.
        unsafe {
            let fs = check(libc::syscall(libc::SYS_fsopen, c"overlay".as_ptr(), FSOPEN_CLOEXEC))?;
            let fs = OwnedFd::from_raw_fd(fs);
            let fd = fs.as_raw_fd();
            let config = |command: libc::c_uint, key: *const libc::c_char, value: *const libc::c_char| {
                check(libc::syscall(libc::SYS_fsconfig, fd, command, key, value, 0)).map(drop)
            };
            for flag in &self.flags {
                config(FSCONFIG_SET_FLAG, flag.as_ptr(), std::ptr::null())?;
            }
            for (key, value) in self.options.iter().chain(extra) {
                config(FSCONFIG_SET_STRING, key.as_ptr(), value.as_ptr())?;
            }
            config(FSCONFIG_CMD_CREATE, std::ptr::null(), std::ptr::null())?;
            let mount = check(libc::syscall(libc::SYS_fsmount, fd, FSMOUNT_CLOEXEC, MOUNT_ATTR_NODEV))?;
            Ok(OwnedFd::from_raw_fd(mount))
        }
    }

    fn target(&self) -> io::Result<OwnedFd> {
        let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC;
        // SAFETY: system calls with strings and a structure that live through them.
        unsafe {
            let root = OwnedFd::from_raw_fd(check(libc::open(self.root.as_ptr(), flags).into())?);
            let Some(below) = &self.below else { return Ok(root) };
            // The guest writes in that root between two starts: it may have put a link there.
            let resolve = RESOLVE_NO_XDEV | RESOLVE_NO_SYMLINKS | RESOLVE_BENEATH;
            let how = OpenHow { flags: flags as u64, mode: 0, resolve };
            let (at, size) = (root.as_raw_fd(), size_of::<OpenHow>());
            let fd = check(libc::syscall(libc::SYS_openat2, at, below.as_ptr(), &raw const how, size))?;
            Ok(OwnedFd::from_raw_fd(fd))
        }
    }
}
