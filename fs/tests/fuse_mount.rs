//! Mounting: as root and as an ordinary user; what a killed server leaves, and how it is replaced.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod fuse_support;

use fuse_support::fake::Fake;
use fuse_support::server::{Server, wait_for_thread};
use fuse_support::{Client, End, Mount, errno_of, shell};
use machinefs::fuse::{self, MountError, MountOptions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Not a test: what [`Server`] starts.
#[test]
#[ignore = "started by the other tests"]
fn server_process() {
    fuse_support::server::serve();
}

fn directory() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("mfs-fuse-").tempdir().unwrap()
}

fn is_mounted(path: &Path) -> bool {
    std::fs::read_to_string("/proc/self/mountinfo").unwrap().contains(path.to_str().unwrap())
}

#[test]
fn a_killed_servers_mount_is_an_error_and_then_replaced() {
    require_fuse!();
    let target = directory();
    let mut first = Server::start(target.path(), &[]);
    assert_eq!(first.line_with("replaced:"), "Ok(false)");
    assert_eq!(first.line_with("mounted:"), "yes");
    assert_eq!(shell(&format!("cat {}/f", target.path().display())), ("served\n".into(), 0));
    // A shell stays in it.
    let mut inside = std::process::Command::new("sleep");
    inside.arg("1000").current_dir(target.path());
    let mut inside = Client::command(inside);
    first.process.signal(libc::SIGKILL);
    assert_eq!(first.process.wait(), End::Signal(libc::SIGKILL));
    let (text, code) = shell(&format!("LC_ALL=C ls {}", target.path().display()));
    assert!(code != 0 && text.contains("Transport endpoint is not connected"), "an error, not an empty list: {text}");

    let mut second = Server::start(target.path(), &[]);
    assert_eq!(second.line_with("replaced:"), "Ok(true)");
    assert_eq!(second.line_with("mounted:"), "yes");
    assert_eq!(shell(&format!("cat {}/f", target.path().display())), ("served\n".into(), 0));
    assert_eq!(second.end(), End::Exit(0));
    assert!(!is_mounted(target.path()));
    inside.signal(libc::SIGKILL);
    inside.wait();
}

#[test]
fn what_is_alive_or_not_ours_is_never_replaced() {
    require_fuse!();
    let mount = Mount::new(Fake::new());
    let target = mount.path("");
    // In another process: the server's own must not touch its mount.
    let mut other = Server::start(&target, &[]);
    assert_eq!(other.line_with("replaced:"), "Ok(false)");
    assert!(other.line_with("failed:").contains("is mounted there already"));
    assert!(mount.session().is_alive());
    drop(other);

    let plain = directory();
    assert!(!fuse::replace_stale_mount(plain.path()).unwrap());
    let (_, code) = shell(&format!("mount -t tmpfs none {}", plain.path().display()));
    assert_eq!(code, 0);
    assert!(!fuse::replace_stale_mount(plain.path()).unwrap());
    assert!(is_mounted(plain.path()), "another's mount stays");
    shell(&format!("umount {}", plain.path().display()));
}

#[test]
fn a_stopped_server_is_not_dead_and_holds_nobody() {
    require_fuse!();
    let target = directory();
    let mut first = Server::start(target.path(), &[]);
    first.line_with("mounted:");
    first.process.signal(libc::SIGSTOP);
    let mut second = Server::start(target.path(), &[]);
    assert_eq!(second.line_with("replaced:"), "Ok(false)");
    assert!(second.line_with("failed:").contains("is mounted there already"));
    first.process.signal(libc::SIGCONT);
    assert_eq!(first.end(), End::Exit(0));
}

#[test]
fn the_session_ends_when_somebody_else_unmounts() {
    require_fuse!();
    let mut mount = Mount::new(Fake::new());
    let session = mount.session.take().unwrap();
    assert!(session.is_alive());
    assert_eq!(shell(&format!("umount {}", mount.path("").display())).1, 0);
    session.join();
}

#[test]
fn a_busy_mount_goes_only_lazily_and_serves_on() {
    require_fuse!();
    let mount = Mount::new(Fake::new());
    let mut inside = std::process::Command::new("sh");
    inside.args(["-c", "read line; echo $line > new; cat new; exit 5"]).current_dir(mount.path(""));
    inside.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
    let (mut inside, mut input, _output) = Client::with_pipes(inside);
    assert!(matches!(mount.session().unmount(false), Err(MountError::Busy(_))));
    mount.session().unmount(true).unwrap();
    assert!(!is_mounted(&mount.path("")));
    assert!(mount.session().is_alive());
    std::io::Write::write_all(&mut input, b"still here\n").unwrap();
    assert_eq!(inside.wait(), End::Exit(5));
}

#[test]
fn unmount_leaves_anothers_mount_on_top() {
    require_fuse!();
    let mount = Mount::new(Fake::new());
    let path = mount.path("").display().to_string();
    assert_eq!(shell(&format!("mount -t tmpfs none {path}")).1, 0);
    assert!(matches!(mount.session().unmount(true), Err(MountError::Covered(_))));
    assert_eq!(shell(&format!("umount {path}")).1, 0);
    mount.session().unmount(false).unwrap();
    mount.session().unmount(false).unwrap();
}

#[test]
fn a_bad_target_is_named_with_a_remedy() {
    require_fuse!();
    let place = directory();
    let missing = fuse::mount(MountOptions::new(place.path().join("no"))).err().unwrap();
    assert!(missing.to_string().contains("make it first"), "{missing}");
    std::fs::write(place.path().join("file"), "").unwrap();
    let file = fuse::mount(MountOptions::new(place.path().join("file"))).err().unwrap();
    assert!(matches!(file, MountError::NotADirectory(_)), "{file}");
}

/// The kernel holds the notifier at the lock of a directory in which an operation is pending; then the server is
/// killed. Everything must end.
#[test]
fn a_server_killed_in_the_middle_of_a_notice_takes_nobody_along() {
    require_fuse!();
    let target = directory();
    let mut server = Server::start(target.path(), &[]);
    server.line_with("mounted:");
    let path = std::ffi::CString::new(target.path().join("slow").as_os_str().as_bytes()).unwrap();
    // SAFETY: the path ends with a NUL.
    let mut client = Client::run(|| errno_of(unsafe { libc::mkdir(path.as_ptr(), 0o755) }.into()));
    fuse_support::eventually("mkdir waits", || client.state() == 'S');
    // The request must be the server's before the notice comes.
    std::thread::sleep(std::time::Duration::from_millis(100));
    server.command("invalidate");
    wait_for_thread(server.process.pid, "fuse-notify", 'D');
    server.process.signal(libc::SIGKILL);
    assert_eq!(client.wait(), End::Exit(libc::ECONNABORTED));
    assert_eq!(server.process.wait(), End::Signal(libc::SIGKILL));
    assert!(fuse::replace_stale_mount(target.path()).unwrap());
    assert!(!is_mounted(target.path()));
}

/// An ordinary user of the tests, and a copy of this program that the user can run.
struct User {
    name: &'static str,
    created: bool,
    home: tempfile::TempDir,
}

impl User {
    fn new(name: &'static str) -> Result<Self, &'static str> {
        if !Path::new("/usr/bin/fusermount3").exists() {
            return Err("skipped: no fusermount3");
        }
        let exists = shell(&format!("id {name}")).1 == 0;
        if !exists && shell(&format!("useradd -r -M {name}")).1 != 0 {
            return Err("skipped: useradd failed");
        }
        // As udev does it everywhere; some containers have 0600.
        std::fs::set_permissions("/dev/fuse", std::fs::Permissions::from_mode(0o666)).unwrap();
        let home = directory();
        std::fs::set_permissions(home.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::copy(std::env::current_exe().unwrap(), home.path().join("program")).unwrap();
        std::fs::create_dir(home.path().join("mnt")).unwrap();
        assert_eq!(shell(&format!("chown -R {name} {}", home.path().display())).1, 0);
        Ok(User { name, created: !exists, home })
    }

    fn target(&self) -> PathBuf {
        self.home.path().join("mnt")
    }

    fn prefix(&self) -> [&'static str; 5] {
        ["setpriv", "--reuid", self.name, "--regid=nogroup", "--clear-groups"]
    }

    fn serve(&self) -> Server {
        Server::start_program(&self.home.path().join("program"), &self.target(), &self.prefix(), |_| {})
    }

    fn shell(&self, command: &str) -> (String, i32) {
        shell(&format!("{} sh -c '{command}'", self.prefix().join(" ")))
    }
}

impl Drop for User {
    fn drop(&mut self) {
        if self.created {
            shell(&format!("userdel {}", self.name));
        }
    }
}

#[test]
fn an_ordinary_user_mounts_unmounts_and_replaces() {
    require_fuse!();
    let user = match User::new("mfs-test-fuse") {
        Ok(user) => user,
        Err(reason) => return println!("{reason}"),
    };
    let target = user.target();
    let read = format!("cat {}/f", target.display());

    let mut first = user.serve();
    assert_eq!(first.line_with("mounted:"), "yes");
    assert_eq!(user.shell(&read), ("served\n".into(), 0));
    assert_ne!(shell(&read).1, 0, "nobody else may come in, not even root");
    let (mounts, _) = shell(&format!("grep ' {} ' /proc/mounts", target.display()));
    for word in ["fuse.machinefs", "nosuid", "nodev", "default_permissions"] {
        assert!(mounts.contains(word), "{word} in {mounts}");
    }
    assert_eq!(first.end(), End::Exit(0));
    assert!(!is_mounted(&target));

    let mut second = user.serve();
    second.line_with("mounted:");
    second.process.signal(libc::SIGKILL);
    second.process.wait();
    assert!(user.shell(&read).0.contains("not connected"));
    let mut third = user.serve();
    assert_eq!(third.line_with("replaced:"), "Ok(true)");
    assert_eq!(third.line_with("mounted:"), "yes");
    assert_eq!(user.shell(&read), ("served\n".into(), 0));
    assert_eq!(third.end(), End::Exit(0));
    assert!(!is_mounted(&target));

    // Without fusermount3 the message says what to install.
    let program = user.home.path().join("program");
    let setpriv = ["/usr/bin/setpriv", "--reuid", user.name, "--regid=nogroup", "--clear-groups"];
    let mut without = Server::start_program(&program, &target, &setpriv, |command| {
        command.env("PATH", "/nonexistent");
    });
    assert!(without.line_with("failed:").contains("install the package fuse3"));
}
