//! What the tests of the FUSE layer share: a fake file system, a mount of it, and clients in processes of their own.

#![allow(dead_code, reason = "each test file uses its part")]

pub mod fake;
pub mod ops;
pub mod server;
pub mod stream;

use fake::Fake;
use machinefs::fuse::{self, MountOptions, Session};
use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Why a test cannot run here, if it cannot.
pub fn unable() -> Option<&'static str> {
    if !rustix::process::geteuid().is_root() {
        return Some("skipped: needs root to mount");
    }
    if !Path::new("/dev/fuse").exists() {
        return Some("skipped: no /dev/fuse");
    }
    None
}

/// Leaves the test, saying why, where it cannot run.
#[macro_export]
macro_rules! require_fuse {
    () => {
        if let Some(reason) = $crate::fuse_support::unable() {
            println!("{reason}");
            return;
        }
    };
}

/// A mounted fake. This process never touches what is below it: clients do.
pub struct Mount {
    pub fake: Arc<Fake>,
    pub session: Option<Session>,
    directory: tempfile::TempDir,
}

impl Mount {
    pub fn new(fake: Arc<Fake>) -> Self {
        Self::with(fake, |_| {})
    }

    pub fn with(fake: Arc<Fake>, change: impl FnOnce(&mut MountOptions)) -> Self {
        let directory = tempfile::Builder::new().prefix("mfs-fuse-").tempdir().unwrap();
        let mut options = MountOptions::new(directory.path());
        change(&mut options);
        let session = fuse::mount(options).unwrap().serve(fake.clone()).unwrap();
        Mount { fake, session: Some(session), directory }
    }

    pub fn path(&self, below: &str) -> PathBuf {
        self.directory.path().join(below)
    }

    pub fn c_path(&self, below: &str) -> CString {
        CString::new(self.path(below).as_os_str().as_bytes()).unwrap()
    }

    pub fn session(&self) -> &Session {
        self.session.as_ref().unwrap()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        self.fake.expire_all();
        if let Some(session) = self.session.take() {
            session.unmount(true).unwrap();
            session.join();
        }
    }
}

/// A process that uses the mount. Killed and collected when dropped.
pub struct Client {
    pub pid: i32,
    ended: Option<i32>,
}

/// How a client ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// With that code.
    Exit(i32),
    /// By that signal.
    Signal(i32),
}

impl Client {
    /// Runs `work` in a child; its value is the exit code. `work` may only make system calls and use memory that is
    /// there already.
    pub fn run(work: impl FnOnce() -> i32) -> Self {
        // SAFETY: the child makes system calls only, and leaves by _exit.
        let pid = unsafe { libc::fork() };
        assert!(pid >= 0, "fork");
        if pid == 0 {
            // SAFETY: as above. The child must not hold the server's descriptors.
            unsafe {
                libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0);
                let code = work();
                libc::_exit(code);
            }
        }
        Client { pid, ended: None }
    }

    /// A command, as a shell would start it.
    #[allow(clippy::zombie_processes, reason = "collected by try_wait")]
    pub fn command(mut command: std::process::Command) -> Self {
        let child = command.spawn().unwrap();
        Client { pid: child.id() as i32, ended: None }
    }

    /// The same, with pipes to its input and from its output.
    #[allow(clippy::zombie_processes, reason = "collected by try_wait")]
    pub fn with_pipes(mut command: std::process::Command) -> (Self, ChildStdin, ChildStdout) {
        let mut child = command.spawn().unwrap();
        let (input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        (Client { pid: child.id() as i32, ended: None }, input, output)
    }

    pub fn signal(&self, signal: i32) {
        if self.ended.is_none() {
            // SAFETY: takes no pointers; the process is our child and not yet collected.
            unsafe { libc::kill(self.pid, signal) };
        }
    }

    /// The letter in `/proc/PID/stat`.
    pub fn state(&self) -> char {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
        stat.rsplit(')').next().and_then(|rest| rest.trim().chars().next()).unwrap_or('-')
    }

    /// The end, if it has come.
    pub fn try_wait(&mut self) -> Option<End> {
        if self.ended.is_none() {
            let mut status = 0;
            // SAFETY: the pointer is to a live integer.
            let pid = unsafe { libc::waitpid(self.pid, &raw mut status, libc::WNOHANG) };
            if pid == self.pid {
                self.ended = Some(status);
            }
        }
        self.ended.map(|status| {
            if libc::WIFSIGNALED(status) {
                End::Signal(libc::WTERMSIG(status))
            } else {
                End::Exit(libc::WEXITSTATUS(status))
            }
        })
    }

    /// Waits for the end. The limit only turns a hang into a failure.
    pub fn wait(&mut self) -> End {
        let mut end = None;
        eventually(&format!("end of {} (state {})", self.pid, self.state()), || {
            end = self.try_wait();
            end.is_some()
        });
        end.unwrap()
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        if self.try_wait().is_none() {
            self.signal(libc::SIGKILL);
            let start = Instant::now();
            while self.try_wait().is_none() && start.elapsed() < Duration::from_secs(10) {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
    }
}

/// Waits until something is so. The limit only turns a hang into a failure.
pub fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < Duration::from_secs(60), "never came: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The error number of the system call that just failed, or 0: for the exit code of a client.
pub fn errno_of(result: i64) -> i32 {
    // SAFETY: the location is the calling thread's.
    if result < 0 { unsafe { *libc::__errno_location() } } else { 0 }
}

/// Runs a shell command; gives its output and exit code.
pub fn shell(command: &str) -> (String, i32) {
    let output = std::process::Command::new("sh").args(["-c", command]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (text, output.status.code().unwrap_or(-1))
}

/// A handler that does nothing, without SA_RESTART, for SIGUSR1.
pub fn handle_usr1() {
    extern "C" fn nothing(_: i32) {}
    // SAFETY: the structure is valid when zeroed; the handler does nothing.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as *const () as usize;
        libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut());
    }
}
