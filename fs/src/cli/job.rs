//! A job, driven by the files of a mounted tree and nothing else, so that it works over whatever mounts one.

use std::borrow::Cow;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Where trees are mounted unless `MACHINEFS_MOUNT` says otherwise.
const MOUNT: &str = "/sandboxes";
/// How long a daemon that went away is waited for: a restart takes a second or two.
const RESTART: Duration = Duration::from_secs(30);
/// Bytes read at once.
const PIECE: usize = 64 * 1024;

/// The directory of a machine: a path, or a name in the usual mount.
pub fn machine_dir(name: &str) -> Result<PathBuf, String> {
    let mount = std::env::var_os("MACHINEFS_MOUNT").map_or_else(|| PathBuf::from(MOUNT), PathBuf::from);
    let here = PathBuf::from(name);
    let there = mount.join(name);
    for dir in [here, there] {
        if dir.join("jobs").is_dir() && dir.join("exec").exists() {
            // The working directory of whoever asks may change.
            return std::path::absolute(&dir).map_err(|error| format!("{name}: {error}"));
        }
    }
    Err(format!("{name}: no such machine here or in {} (set MACHINEFS_MOUNT, or give a path)", mount.display()))
}

/// A job's directory.
pub struct Job {
    dir: PathBuf,
}

impl Job {
    /// Makes one to be set up; its name begins so.
    pub fn create(machine: &Path, prefix: &str) -> Result<Job, String> {
        let jobs = machine.join("jobs");
        for number in 0..10_000 {
            let dir = jobs.join(format!("{prefix}-{}-{number}", std::process::id()));
            match std::fs::create_dir(&dir) {
                Ok(()) => return Ok(Job { dir }),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(format!("{}: {}", machine.display(), describe(machine, &error))),
            }
        }
        Err(format!("{}: too many jobs", jobs.display()))
    }

    /// One that is there.
    pub fn open(machine: &Path, name: &str) -> Result<Job, String> {
        let dir = machine.join("jobs").join(name);
        if dir.join("exit").exists() { Ok(Job { dir }) } else { Err(format!("{}: no such job", dir.display())) }
    }

    /// Its name.
    pub fn name(&self) -> String {
        self.dir.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
    }

    /// A file of it.
    pub fn path(&self, file: &str) -> PathBuf {
        self.dir.join(file)
    }

    /// Writes a file of it: one text. The error is the tree's own reason.
    pub fn write(&self, file: &str, text: &[u8]) -> Result<(), String> {
        let path = self.path(file);
        let failed = |error: &io::Error| format!("{}: {error}", path.display());
        let mut open = OpenOptions::new().read(true).write(true).open(&path).map_err(|error| failed(&error))?;
        if let Err(error) = open.write_all(text) {
            let mut reason = String::new();
            // What a failed write leaves to read is why it failed.
            let why = open.read_to_string(&mut reason).ok().map(|_| reason.trim_end().to_string());
            return Err(why.filter(|why| !why.is_empty()).unwrap_or_else(|| failed(&error)));
        }
        // Errors of a text that is complete come at its end.
        open.sync_all().map_err(|error| failed(&error))
    }

    /// Opens its input for writing.
    pub fn input(&self) -> Result<File, String> {
        let path = self.path("stdin");
        OpenOptions::new().write(true).open(&path).map_err(|error| format!("{}: {error}", path.display()))
    }

    /// Writes to its input, which is opened anew when the daemon has been away meanwhile.
    fn pass(&self, input: &mut File, mut bytes: &[u8]) -> Result<(), String> {
        let mut lost_at: Option<Instant> = None;
        while !bytes.is_empty() {
            match input.write(bytes) {
                Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error)
                    if self.is_restart(&error) && lost_at.get_or_insert_with(Instant::now).elapsed() < RESTART =>
                {
                    std::thread::sleep(Duration::from_millis(200));
                    if let Ok(again) = self.input() {
                        *input = again;
                    }
                }
                Err(error) => return Err(format!("{}: {error}", self.path("stdin").display())),
            }
        }
        Ok(())
    }

    /// Passes on what is read here, until there is no more (then the input ends) or `look` says to leave. `look` gets each
    /// piece, and gives what is to be passed on. Gives whether it left.
    pub fn pass_stdin(
        &self,
        mut input: File,
        mut look: impl FnMut(&[u8]) -> (Cow<'_, [u8]>, bool),
    ) -> Result<bool, String> {
        let mut buffer = vec![0; PIECE];
        loop {
            let count = match io::stdin().lock().read(&mut buffer) {
                // Closing it is not enough where the daemon that it was opened with has gone.
                Ok(0) => return self.end_input().map(|()| false),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error.to_string()),
            };
            let (bytes, leaves) = look(buffer.get(..count).unwrap_or_default());
            self.pass(&mut input, &bytes)?;
            if leaves {
                return Ok(true);
            }
        }
    }

    /// Ends its input.
    fn end_input(&self) -> Result<(), String> {
        let begun = Instant::now();
        loop {
            match self.ctl("eof") {
                Err(error) if self.is_restart(&error) && begun.elapsed() < RESTART => {
                    std::thread::sleep(Duration::from_millis(200));
                }
                ended => return ended.map_err(|error| format!("{}: {error}", self.path("ctl").display())),
            }
        }
    }

    /// Whether a file says that its daemon is away: dead, or not mounted again yet. Where the tree answers, what is not
    /// there is gone.
    fn is_restart(&self, error: &io::Error) -> bool {
        match error.raw_os_error() {
            Some(libc::ENOTCONN | libc::ECONNABORTED | libc::ENODEV) => true,
            // Its directory is MOUNT/MACHINE/jobs/JOB.
            Some(libc::ENOENT) => !self.dir.ancestors().nth(3).is_some_and(|mount| mount.join("README").exists()),
            _ => false,
        }
    }

    /// Copies a stream of its output to its end; goes on where it was when the daemon comes back meanwhile.
    pub fn copy_output(&self, file: &str, to: &mut dyn Write) -> io::Result<()> {
        let path = self.path(file);
        let mut given: u64 = 0;
        let mut lost_at = None;
        let mut buffer = vec![0; PIECE];
        loop {
            match copy_from(&path, given, to, &mut buffer) {
                Ok(()) => return Ok(()),
                Err((position, error)) if self.is_restart(&error) => {
                    if position > given || lost_at.is_none() {
                        lost_at = Some(Instant::now());
                    }
                    given = position;
                    if lost_at.is_some_and(|at: Instant| at.elapsed() > RESTART) {
                        return Err(error);
                    }
                    std::thread::sleep(Duration::from_millis(200));
                }
                Err((_, error)) => return Err(error),
            }
        }
    }

    /// Its exit code, once it has ended.
    pub fn exit(&self) -> Result<u8, String> {
        let mut text = Vec::new();
        let failed = |error: &io::Error| format!("{}: {error}", self.path("exit").display());
        self.copy_output("exit", &mut text).map_err(|error| failed(&error))?;
        let text = String::from_utf8_lossy(&text);
        text.trim().parse().map_err(|_| format!("{}: says \"{}\"", self.path("exit").display(), text.trim()))
    }

    /// Sends a message to its `ctl`.
    pub fn ctl(&self, message: &str) -> io::Result<()> {
        OpenOptions::new().write(true).open(self.path("ctl"))?.write_all(format!("{message}\n").as_bytes())
    }

    /// Forgets it; it stays in `history`.
    pub fn remove(&self) {
        // One that is gone already is as good.
        let _ = std::fs::remove_dir(&self.dir);
    }
}

/// Copies from byte `from` on; on an error, with how far it came.
fn copy_from(path: &Path, from: u64, to: &mut dyn Write, buffer: &mut [u8]) -> Result<(), (u64, io::Error)> {
    let mut file = File::open(path).map_err(|error| (from, error))?;
    let mut position: u64 = 0;
    let mut given = from;
    loop {
        let count = match file.read(buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err((given, error)),
        };
        let bytes = buffer.get(..count).unwrap_or_default();
        // Streams begin at their first byte, whatever was read of them before.
        let skip = usize::try_from(given.saturating_sub(position)).unwrap_or(usize::MAX).min(count);
        position += count as u64;
        let new = bytes.get(skip..).unwrap_or_default();
        if !new.is_empty() {
            to.write_all(new).and_then(|()| to.flush()).map_err(|error| (given, error))?;
            given += new.len() as u64;
        }
    }
}

/// An error of a machine, with what can be done about it.
fn describe(machine: &Path, error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EHOSTDOWN) => {
            let status = std::fs::read_to_string(machine.join("status")).unwrap_or_default();
            format!("the machine is {}: echo start > {}/ctl", status.trim(), machine.display())
        }
        Some(libc::EACCES) => "it is another user's machine".into(),
        _ => error.to_string(),
    }
}
