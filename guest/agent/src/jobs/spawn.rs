//! Starting a process: fork(2), and in the child everything up to execve(2).

use super::command::Program;
use super::users::User;
use crate::system;
use std::cell::Cell;
use std::ffi::{CStr, CString};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};

/// How the process is set up.
pub struct Setup<'a> {
    /// What to execute.
    pub program: &'a Program,
    /// Whom it runs as; `None` leaves the agent's user (which is not root then).
    pub user: Option<&'a User>,
    /// Working directory.
    pub cwd: &'a CStr,
    /// Where to go when that is missing; `None`: it must not be.
    pub other_cwd: Option<&'a CStr>,
    /// Standard input, output, error; above 2 each.
    pub stdio: [RawFd; 3],
    /// Standard input is a terminal, to be the controlling one.
    pub terminal: bool,
    /// The list of the control group to be in.
    pub group: Option<RawFd>,
}

/// How far the child came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Making the process itself.
    Fork,
    /// Descriptors, terminal, session.
    Setup,
    /// Becoming the user.
    User,
    /// The working directory.
    Directory,
    /// Executing the program.
    Exec,
}

/// Why a process could not be started.
#[derive(Clone, Copy, Debug)]
pub struct SpawnError {
    /// At what.
    pub stage: Stage,
    /// The kernel's reason.
    pub errno: i32,
}

/// Child's report of a failure: stage and errno.
const REPORT: usize = 8;

/// All that the child needs, made before the fork: it may not allocate.
struct Child {
    paths: Vec<*const libc::c_char>,
    argv: Vec<*const libc::c_char>,
    /// For a program the kernel does not know the format of: a shell script without `#!`.
    shell_argv: Vec<Cell<*const libc::c_char>>,
    env: Vec<*const libc::c_char>,
    report: RawFd,
    inherited: Option<RawFd>,
    open_files: Option<libc::rlimit>,
    mask: libc::sigset_t,
}

/// Starts the process in a session of its own. Returns once it executes its program.
///
/// `fork` is called to fork, so that the caller can register the child before anybody waits for it; it gets a
/// function that does it and gives the child's number. A child that fails afterwards ends with code 127 and must be
/// waited for like any other.
///
/// # Errors
/// [`SpawnError`]; a child may have been made.
pub fn spawn(
    setup: &Setup<'_>,
    fork: impl FnOnce(&dyn Fn() -> io::Result<i32>) -> io::Result<i32>,
) -> Result<i32, SpawnError> {
    let failed =
        |error: io::Error| SpawnError { stage: Stage::Fork, errno: error.raw_os_error().unwrap_or(libc::EAGAIN) };
    let (mut reader, writer) = io::pipe().map_err(failed)?;
    let pointers = |strings: &[CString]| -> Vec<*const libc::c_char> {
        strings.iter().map(|string| string.as_ptr()).chain([std::ptr::null()]).collect()
    };
    let program = setup.program;
    // The second entry is left free for the program's path.
    let mut shell_argv = vec![c"sh".as_ptr(), std::ptr::null()];
    shell_argv.extend(pointers(program.argv.get(1..).unwrap_or_default()));
    let shell_argv = shell_argv.into_iter().map(Cell::new).collect();
    let child = Child {
        paths: pointers(&program.paths),
        argv: pointers(&program.argv),
        shell_argv,
        env: pointers(&program.env),
        report: writer.as_raw_fd(),
        inherited: program.script.as_ref().and_then(super::script::Script::inherited),
        open_files: system::original_open_files(),
        mask: system::signal_set(&[]),
    };
    let make = || {
        // SAFETY: the agent has threads, so the child only calls what is async-signal-safe (signal-safety(7)): system
        // calls on memory that was prepared above and that it has a copy of.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()),
            // SAFETY: this is the child; all pointers in `child` and `setup` are valid C strings and arrays that end
            // with a null pointer.
            0 => unsafe { child_main(&child, setup) },
            pid => Ok(pid),
        }
    };
    let pid = fork(&make).map_err(failed)?;
    drop(writer);
    let mut report = Vec::with_capacity(REPORT);
    let _ = reader.read_to_end(&mut report);
    let words = report.first_chunk::<REPORT>().map(|bytes| {
        let [s0, s1, s2, s3, errno @ ..] = *bytes;
        (i32::from_ne_bytes([s0, s1, s2, s3]), i32::from_ne_bytes(errno))
    });
    match words {
        None => Ok(pid),
        Some((stage, errno)) => {
            let stage = match stage {
                1 => Stage::Setup,
                2 => Stage::User,
                3 => Stage::Directory,
                _ => Stage::Exec,
            };
            Err(SpawnError { stage, errno })
        }
    }
}

/// The child. Never returns.
///
/// # Safety
/// To be called right after fork(2), in the child, with pointers as [`spawn`] makes them.
unsafe fn child_main(child: &Child, setup: &Setup<'_>) -> ! {
    // SAFETY: only async-signal-safe calls on prepared memory, see `spawn`.
    unsafe {
        let stage = match enter(child, setup) {
            Ok(()) => {
                execute(child);
                Stage::Exec
            }
            Err(stage) => stage,
        };
        let errno = *libc::__errno_location();
        let words = [stage as i32, errno];
        libc::write(child.report, words.as_ptr().cast(), REPORT);
        libc::_exit(127)
    }
}

/// Everything before the execve. The errno tells why it failed.
///
/// # Safety
/// As [`child_main`].
unsafe fn enter(child: &Child, setup: &Setup<'_>) -> Result<(), Stage> {
    let ok = |result: libc::c_long, stage: Stage| if result < 0 { Err(stage) } else { Ok(()) };
    // SAFETY: as `child_main`.
    unsafe {
        for signal in 1..=64 {
            // Ignored signals would stay ignored over the execve. The bare call, as glibc keeps two to itself; all zeros
            // are SIG_DFL, no flags and an empty mask.
            let default = [0u64; 4];
            libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), std::ptr::null_mut::<u64>(), 8);
        }
        libc::sigprocmask(libc::SIG_SETMASK, &child.mask, std::ptr::null_mut());
        ok(libc::setsid().into(), Stage::Setup)?;
        if let Some(group) = setup.group {
            // Without it the job is found by other means.
            libc::write(group, c"0".as_ptr().cast(), 1);
        }
        for (number, fd) in setup.stdio.iter().enumerate() {
            ok(libc::dup2(*fd, number as RawFd).into(), Stage::Setup)?;
        }
        if setup.terminal {
            ok(libc::ioctl(0, libc::TIOCSCTTY, 0).into(), Stage::Setup)?;
        }
        // All of the agent's descriptors close by themselves; this is for those of libraries, and of older kernels
        // there is nothing to be asked.
        libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC);
        if let Some(fd) = child.inherited {
            ok(libc::fcntl(fd, libc::F_SETFD, 0).into(), Stage::Setup)?;
        }
        let score = libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        if score >= 0 {
            libc::write(score, c"0".as_ptr().cast(), 1);
            libc::close(score);
        }
        if let Some(limit) = &child.open_files {
            libc::setrlimit(libc::RLIMIT_NOFILE, limit);
        }
        libc::umask(0o022);
        if let Some(user) = setup.user {
            // The bare calls: glibc's change all threads of a process, of which there is only this one.
            let groups = user.groups.as_ptr();
            ok(libc::syscall(libc::SYS_setgroups, user.groups.len(), groups), Stage::User)?;
            ok(libc::syscall(libc::SYS_setresgid, user.gid, user.gid, user.gid), Stage::User)?;
            ok(libc::syscall(libc::SYS_setresuid, user.uid, user.uid, user.uid), Stage::User)?;
        }
        if libc::chdir(setup.cwd.as_ptr()) < 0 {
            let other = setup.other_cwd.ok_or(Stage::Directory)?;
            ok(libc::chdir(other.as_ptr()).into(), Stage::Directory)?;
        }
    }
    Ok(())
}

/// Tries the paths in turn, as execvp(3) does. Returns with the errno to report.
///
/// # Safety
/// As [`child_main`].
unsafe fn execute(child: &Child) {
    let mut denied = false;
    let mut errno = libc::ENOENT;
    for path in child.paths.iter().copied().take_while(|path| !path.is_null()) {
        // SAFETY: as `child_main`.
        unsafe {
            libc::execve(path, child.argv.as_ptr(), child.env.as_ptr());
            errno = *libc::__errno_location();
            if errno == libc::ENOEXEC
                && let Some(entry) = child.shell_argv.get(1)
            {
                entry.set(path);
                libc::execve(c"/bin/sh".as_ptr(), child.shell_argv.as_ptr().cast(), child.env.as_ptr());
                errno = *libc::__errno_location();
            }
        }
        match errno {
            libc::EACCES => denied = true,
            libc::ENOENT | libc::ENOTDIR | libc::ESTALE | libc::ENODEV | libc::ETIMEDOUT => {}
            _ => break,
        }
    }
    if denied && matches!(errno, libc::ENOENT | libc::ENOTDIR) {
        errno = libc::EACCES;
    }
    // SAFETY: errno of this thread.
    unsafe { *libc::__errno_location() = errno };
}
