//! A daemon on a mount of its own, started in the foreground, and gone without a trace afterwards.

use crate::leftovers;
use crate::process::{Outcome, PATIENCE, Running, run};
use crate::shell::Shell;
use crate::user::{Identity, User, am_root, become_identity};
use std::fs::File;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock};

/// A daemon, its mount and its state directory.
pub struct Daemon {
    /// Whom it runs as.
    pub user: User,
    /// The same, in numbers.
    pub identity: Identity,
    /// Everything of it lies below this directory.
    pub base: PathBuf,
    /// The mount.
    pub mount: PathBuf,
    /// The state directory.
    pub state: PathBuf,
    arguments: Vec<String>,
    child: Mutex<Option<Child>>,
    names: AtomicUsize,
}

/// The daemon, and the agent it finds beside itself.
const PROGRAMS: [&str; 2] = ["machinefs", "machinefs-agent"];

/// Where `scripts/build` puts the binaries, unless `MACHINEFS_BIN` names the daemon's.
fn binary() -> PathBuf {
    if let Some(path) = std::env::var_os("MACHINEFS_BIN") {
        return path.into();
    }
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map(PathBuf::from)
        .unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target"));
    target.join("release/machinefs")
}

impl Daemon {
    /// Starts a daemon and waits until its mount answers.
    pub fn start(user: User) -> Daemon {
        Daemon::start_with(user, |_| Vec::new())
    }

    /// The same with more arguments, which may refer to the daemon's directory (it exists, with `bin/` in it).
    pub fn start_with(user: User, arguments: impl FnOnce(&Path) -> Vec<String>) -> Daemon {
        let identity = user.identity().unwrap_or_else(|reason| panic!("{reason}"));
        for source in PROGRAMS.map(|name| binary().with_file_name(name)) {
            assert!(source.exists(), "{} is missing: run scripts/build", source.display());
        }
        let parent = std::env::var_os("TMPDIR").unwrap_or_else(|| "/var/tmp".into());
        let base = tempfile::Builder::new()
            .prefix("mfs-")
            .tempdir_in(parent)
            .unwrap_or_else(|error| panic!("a temporary directory: {error}"))
            .keep();
        let daemon = Daemon {
            user,
            mount: base.join("mnt"),
            state: base.join("state"),
            arguments: arguments(&base),
            base,
            identity,
            child: Mutex::new(None),
            names: AtomicUsize::new(0),
        };
        daemon.lay_out().unwrap_or_else(|error| panic!("{}: {error}", daemon.base.display()));
        daemon.boot();
        daemon
    }

    fn lay_out(&self) -> std::io::Result<()> {
        std::fs::set_permissions(&self.base, std::fs::Permissions::from_mode(0o755))?;
        for dir in ["mnt", "bin", "tmp", "run"] {
            std::fs::create_dir_all(self.base.join(dir))?;
            self.give(&self.base.join(dir))?;
        }
        self.give(&self.base)?;
        std::fs::set_permissions(self.base.join("run"), std::fs::Permissions::from_mode(0o700))?;
        // Copies, since the checkout may be where an ordinary user cannot go.
        // By cp: a descriptor of ours that is open for writing would be inherited by what another test starts meanwhile,
        // and "text file busy" be the answer.
        for name in PROGRAMS {
            let mut cp = Command::new("cp");
            cp.arg(binary().with_file_name(name)).arg(self.base.join("bin"));
            run(cp).ok();
        }
        Ok(())
    }

    /// Gives a path to the daemon's user.
    pub fn give(&self, path: &Path) -> std::io::Result<()> {
        if am_root() { chown(path, Some(self.identity.uid), Some(self.identity.gid)) } else { Ok(()) }
    }

    /// A directory of the daemon's user, outside the mount, for the test's own files.
    pub fn tmp(&self) -> PathBuf {
        self.base.join("tmp")
    }

    /// The daemon's binary.
    pub fn program(&self) -> PathBuf {
        self.base.join("bin/machinefs")
    }

    fn child(&self) -> MutexGuard<'_, Option<Child>> {
        self.child.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Starts the daemon (again) and waits until the mount answers.
    #[track_caller]
    pub fn boot(&self) {
        self.launch();
        assert!(self.answers_within(30), "the mount does not answer; the log:\n{}", self.log());
    }

    /// Starts the daemon's process; does not wait for anything.
    pub fn launch(&self) {
        let mut command = self.prepare(Command::new(self.program()));
        command
            .current_dir("/")
            .arg("mount")
            .arg(&self.mount)
            .arg("--state-dir")
            .arg(&self.state)
            .args(&self.arguments);
        let open = || File::options().create(true).append(true).open(self.base.join("log"));
        let (out, err) = (open().expect("the daemon's log"), open().expect("the daemon's log"));
        // The key of secrets is this daemon's own too.
        command.env("MACHINEFS_KEY_FILE", self.base.join("key"));
        command.stdin(Stdio::null()).stdout(out).stderr(err);
        let child = command.spawn().unwrap_or_else(|error| panic!("{}: {error}", self.program().display()));
        let old = self.child().replace(child);
        assert!(old.is_none(), "the daemon runs already");
    }

    fn answers_within(&self, seconds: u64) -> bool {
        crate::eventually(seconds, || {
            let ended = match self.child().as_mut() {
                Some(child) => child.try_wait().ok().flatten(),
                None => None,
            };
            assert!(ended.is_none(), "the daemon ended at once ({ended:?}); the log:\n{}", self.log());
            self.try_exec(&["test", "-e", &self.path("README")]).code == 0
        })
    }

    /// The end of what the daemon has logged.
    pub fn log(&self) -> String {
        let text = std::fs::read(self.base.join("log")).unwrap_or_default();
        String::from_utf8_lossy(&text[text.len().saturating_sub(6000)..]).into_owned()
    }

    /// The daemon's process.
    #[track_caller]
    pub fn pid(&self) -> u32 {
        self.child().as_ref().map(Child::id).expect("the daemon runs")
    }

    /// Ends the daemon by a signal and waits for its end; its exit code (128 and the signal if that killed it).
    #[track_caller]
    pub fn end(&self, signal: i32) -> i32 {
        let mut child = self.child().take().expect("the daemon runs");
        // SAFETY: kill(2) has no memory effects; the process is our child, not yet waited for.
        unsafe { libc::kill(child.id() as i32, signal) };
        let mut status = None;
        let ended = crate::eventually(40, || {
            status = child.try_wait().ok().flatten();
            status.is_some()
        });
        if !ended {
            let pid = child.id();
            let report = crate::process::describe_group(pid);
            *self.child() = Some(child);
            panic!("the daemon {pid} does not end on signal {signal}\n{report}\n{}", self.log());
        }
        let status = status.unwrap_or_default();
        status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
    }

    /// kill -9 of the daemon, nothing else.
    #[track_caller]
    pub fn kill(&self) {
        self.end(libc::SIGKILL);
    }

    /// kill -9 of the daemon, and a new one.
    #[track_caller]
    pub fn crash(&self) {
        self.kill();
        self.boot();
    }

    /// Makes a command run as the daemon's user, in the mount.
    pub fn prepare(&self, mut command: Command) -> Command {
        become_identity(&mut command, &self.identity);
        command.env("TMPDIR", self.tmp()).env("T", self.tmp()).env("M", &self.mount);
        command.env("XDG_RUNTIME_DIR", self.base.join("run"));
        if self.user == User::Ordinary && am_root() {
            command.env("HOME", self.tmp());
        }
        command.current_dir(&self.mount);
        command
    }

    /// Starts a program as the daemon's user, in the mount.
    #[track_caller]
    pub fn spawn(&self, argv: &[&str]) -> Running {
        let mut command = Command::new(argv[0]);
        command.args(&argv[1..]);
        Running::start(self.prepare(command))
    }

    /// Runs a program to its end.
    #[track_caller]
    pub fn exec(&self, argv: &[&str]) -> Outcome {
        self.spawn(argv).wait(PATIENCE)
    }

    /// Runs a program to its end as somebody else, in the mount.
    #[track_caller]
    pub fn exec_as(&self, identity: &Identity, argv: &[&str]) -> Outcome {
        let mut command = Command::new(argv[0]);
        command.args(&argv[1..]);
        become_identity(&mut command, identity);
        command.env("M", &self.mount);
        command.current_dir("/");
        run(command)
    }

    /// Runs a program to its end outside the mount (which may not be there).
    pub fn try_exec(&self, argv: &[&str]) -> Outcome {
        let mut command = Command::new(argv[0]);
        command.args(&argv[1..]);
        let mut command = self.prepare(command);
        command.current_dir("/");
        run(command)
    }

    /// Runs a script in the mount under a shell, with `-eu`. `$T` is a directory outside the mount, `$M` the mount.
    #[track_caller]
    pub fn sh(&self, shell: Shell, script: &str) -> Outcome {
        run(self.prepare(shell.command(script)))
    }

    /// Runs a script under bash.
    #[track_caller]
    pub fn bash(&self, script: &str) -> Outcome {
        self.sh(Shell::Bash, script)
    }

    /// Starts a script under bash.
    #[track_caller]
    pub fn spawn_bash(&self, script: &str) -> Running {
        Running::start(self.prepare(Shell::Bash.command(script)))
    }

    /// Runs a Python script in the mount.
    #[track_caller]
    pub fn python(&self, script: &str) -> Outcome {
        self.exec(&["python3", "-c", script])
    }

    /// Reads a file of the mount, or fails the test.
    #[track_caller]
    pub fn read(&self, path: &str) -> String {
        let outcome = self.exec(&["cat", "--", path]);
        assert_eq!(outcome.code, 0, "cat {path}: {}", outcome.words());
        String::from_utf8_lossy(&outcome.stdout).into_owned()
    }

    /// The path of something in the mount.
    pub fn path(&self, name: &str) -> String {
        self.mount.join(name).to_string_lossy().into_owned()
    }

    /// A name that no machine of this daemon has had.
    pub fn name(&self, prefix: &str) -> String {
        format!("{prefix}{}", self.names.fetch_add(1, Ordering::Relaxed))
    }

    /// Destroys all machines, ends the daemon, removes all of its files; what is left over, one line each.
    pub fn close(&self) -> Vec<String> {
        if !self.base.exists() {
            return Vec::new();
        }
        let mut faults = Vec::new();
        let alive = self.child().as_mut().is_some_and(|child| matches!(child.try_wait(), Ok(None)));
        if !alive {
            // It died, or the test ended it: machines may be left, and only a daemon knows them.
            self.child().take();
            self.launch();
            crate::eventually(20, || self.try_exec(&["test", "-e", &self.path("README")]).code == 0);
        }
        let script = "for m in */; do rmdir \"$m\" || true; done";
        let destroyed = Running::start(self.prepare(Shell::Bash.command(script)));
        // Not `wait`, which would panic, and leave more behind.
        let mut destroyed = destroyed;
        if !crate::eventually(60, || destroyed.has_ended()) {
            faults.push("the machines cannot be destroyed".into());
        }
        drop(destroyed);
        if !crate::eventually(60, || leftovers::machines(&self.state).is_empty()) {
            let left = leftovers::machines(&self.state);
            faults.push(format!("directories of machines: {left:?}; the log:\n{}", self.log()));
        }
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.end(libc::SIGTERM)));
        if ended.is_err() {
            faults.push("the daemon did not end by SIGTERM".into());
            let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.end(libc::SIGKILL)));
        }
        faults.extend(leftovers::of(&self.base));
        leftovers::unmount_below(&self.base);
        if let Err(error) = std::fs::remove_dir_all(&self.base) {
            faults.push(format!("{}: {error}", self.base.display()));
        }
        faults
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let faults = self.close();
        if !faults.is_empty() {
            let report = format!("left behind:\n{}", faults.join("\n"));
            if std::thread::panicking() {
                eprintln!("{report}");
            } else {
                panic!("{report}");
            }
        }
    }
}

static ROOTS: OnceLock<Option<Daemon>> = OnceLock::new();
static ORDINARYS: OnceLock<Option<Daemon>> = OnceLock::new();

/// The daemon that the tests of one file share; `None` (and noted as skipped) when this user cannot run one. It is
/// closed when the test binary exits, and what it leaves behind makes that fail.
pub fn shared(user: User) -> Option<&'static Daemon> {
    static CLOSE: OnceLock<()> = OnceLock::new();
    if !crate::user::usable(user) {
        return None;
    }
    CLOSE.get_or_init(|| {
        // SAFETY: the handler is a plain function; it runs once, on the thread that exits.
        unsafe { libc::atexit(close_shared) };
    });
    let slot = match user {
        User::Root => &ROOTS,
        User::Ordinary => &ORDINARYS,
    };
    let started = slot.get_or_init(|| std::panic::catch_unwind(|| Daemon::start(user)).ok());
    match started {
        Some(daemon) => Some(daemon),
        None => panic!("the daemon that the tests of this file share did not start"),
    }
}

extern "C" fn close_shared() {
    let daemons = [ROOTS.get(), ORDINARYS.get()].into_iter().flatten().flatten();
    let faults: Vec<String> = daemons.flat_map(|daemon| daemon.close()).collect();
    if !faults.is_empty() {
        eprintln!("left behind:\n{}", faults.join("\n"));
        // SAFETY: ends the process at once; atexit handlers may not call exit(3) again.
        unsafe { libc::_exit(102) };
    }
}
