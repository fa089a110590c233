//! Starting a job.

use super::command::{self, Program, Surroundings};
use super::job::{Job, JobError, NewJob, errno_text};
use super::reactor::{Command, Watch};
use super::spawn::{Setup, SpawnError, Stage, spawn};
use super::users::{self, User};
use super::{Jobs, Kill};
use crate::credential::git_config;
use crate::info::unix_millis;
use crate::session::Over;
use machinefs_protocol::job::{ExitReason, JobEnd, JobSpec, Source};
use rustix::fs::{Mode, OFlags};
use rustix::pty::OpenptFlags;
use rustix::termios::{InputModes, OptionalActions, Winsize};
use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// The ends of a job's pipes or terminal: the job's, and the agent's.
struct Channels {
    job: [OwnedFd; 3],
    output: Vec<(Source, OwnedFd)>,
    input: Option<OwnedFd>,
    /// For a terminal: the agent's end once more.
    terminal: Option<OwnedFd>,
}

/// Why a job does not run though it was taken.
struct NotStarted {
    errno: i32,
    message: String,
}

impl From<JobError> for NotStarted {
    fn from(error: JobError) -> NotStarted {
        NotStarted { errno: error.errno(), message: error.to_string() }
    }
}

impl Jobs {
    /// Starts a job. Gives its process, 0 if it could not be started (the job has ended then, and its log says why),
    /// and its start in milliseconds since 1970.
    ///
    /// # Errors
    /// [`JobError::Exists`], [`JobError::Closing`].
    pub fn start(&self, number: u64, spec: &JobSpec, script: &[u8]) -> Result<(u32, u64), JobError> {
        let id = self.next_id();
        let job = Arc::new(Job::new(NewJob {
            number,
            id,
            output_limit: spec.output_limit,
            stdin: spec.stdin.then(Arc::default),
            timeout: (spec.timeout_ms > 0).then(|| Duration::from_millis(spec.timeout_ms)),
            terminal: spec.tty.is_some(),
            oom_kills: self.oom_kills.count(),
            group: self.groups.make(number, id).map(Arc::new),
        }));
        {
            let mut table = self.table.lock();
            if table.closed {
                return Err(JobError::Closing);
            }
            if table.jobs.contains_key(&number) {
                return Err(JobError::Exists(number));
            }
            table.jobs.insert(number, job.clone());
        }
        match self.launch(&job, spec, script) {
            Ok(pid) => Ok((pid as u32, job.info().started_ms)),
            Err(failure) => {
                let now = unix_millis();
                job.set_started(0, now);
                job.append(Source::Stderr, format!("machinefs: {}\n", failure.message).as_bytes());
                if let Some(stdin) = &job.stdin {
                    stdin.close(Over::Unread);
                }
                let reason = ExitReason::NotStarted(failure.errno);
                let log_end = job.log_end();
                self.has_ended(&job, JobEnd { reason, log_end, cpu_micros: 0, max_rss_kib: 0, ended_ms: now });
                Ok((0, now))
            }
        }
    }

    fn launch(&self, job: &Arc<Job>, spec: &JobSpec, script: &[u8]) -> Result<i32, NotStarted> {
        let own = rustix::process::geteuid().as_raw();
        let user = if own != 0 && spec.user.is_empty() {
            users::find(Path::new("/etc"), own.to_string().as_bytes())?
        } else {
            users::find(Path::new("/etc"), &spec.user)?
        };
        let cwd = if spec.cwd.is_empty() { &user.home } else { &spec.cwd };
        let cwd = CString::new(cwd.as_slice()).map_err(|_| JobError::Nul("working directory"))?;
        let surroundings = Surroundings {
            secrets: self.secrets.variables(),
            job: job.number(),
            mark: self.mark(job.number()),
            git: &|count| git_config(&self.secrets, count),
        };
        self.secrets.add_user(user.uid);
        let channels = channels(spec, &user).map_err(|error| JobError::io("making its pipes", &error))?;
        let unique = format!("job-{}.{}-{}", job.number(), std::process::id(), job.id);
        let mut program = {
            // Script::create: nobody may fork meanwhile.
            let _children = self.children.lock();
            command::prepare(spec, script, &user, &surroundings, &unique)?
        };
        let [stdin, stdout, stderr] = &channels.job;
        let entry = job.group.as_ref().and_then(|group| group.entry().ok());
        let setup = Setup {
            program: &program,
            user: (own != user.uid || own == 0).then_some(&user),
            cwd: &cwd,
            other_cwd: spec.cwd.is_empty().then_some(c"/"),
            stdio: [stdin.as_raw_fd(), stdout.as_raw_fd(), stderr.as_raw_fd()],
            terminal: job.terminal,
            group: entry.as_ref().map(AsRawFd::as_raw_fd),
        };
        // Before the fork: the job may have ended by the time this thread goes on.
        let started_ms = unix_millis();
        let mut child = None;
        let spawned = spawn(&setup, |fork| {
            let mut children = self.children.lock();
            let pid = fork()?;
            children.insert(pid, job.clone());
            child = Some(pid);
            Ok(pid)
        });
        let pid = match spawned {
            Ok(pid) => pid,
            Err(error) => {
                if let Some(pid) = child {
                    // It is waited for as an orphan, or was.
                    self.children.lock().retain(|other, owner| *other != pid || !Arc::ptr_eq(owner, job));
                    self.command(Command::Discard(job.id));
                }
                return Err(explain(&error, spec, &program));
            }
        };
        job.keep_script(program.script.take());
        job.keep_terminal(channels.terminal);
        // While the agent has it open too, a job may close its terminal and open it again.
        let held = channels.job.into_iter().next().filter(|_| job.terminal);
        let wanted = job.set_started(pid, started_ms);
        let watch = Watch { job: job.clone(), pid, output: channels.output, input: channels.input, held };
        self.command(Command::Watch(watch));
        if !wanted {
            let _ = self.signal_job(job, libc::SIGKILL, Kill::All);
        }
        Ok(pid)
    }
}

/// One line that says what could not be done, and why.
fn explain(error: &SpawnError, spec: &JobSpec, program: &Program) -> NotStarted {
    let what = match error.stage {
        Stage::Fork => "no process could be made".to_owned(),
        Stage::Setup => "setting up its descriptors".to_owned(),
        Stage::User => format!("becoming user {}", String::from_utf8_lossy(&spec.user)),
        Stage::Directory => format!("working directory {}", String::from_utf8_lossy(&spec.cwd)),
        Stage::Exec => program.name.clone(),
    };
    let text = match error.stage {
        Stage::Exec => command::explain(&program.paths, error.errno),
        _ => None,
    };
    let text = text.unwrap_or_else(|| errno_text(error.errno));
    NotStarted { errno: error.errno, message: format!("{what}: {text}") }
}

fn channels(spec: &JobSpec, user: &User) -> io::Result<Channels> {
    if let Some((rows, columns)) = spec.tty {
        return terminal(rows, columns, user, spec.stdin);
    }
    let (out, out_job) = io::pipe()?;
    let (err, err_job) = io::pipe()?;
    let (input, stdin) = if spec.stdin {
        let (job, agent) = io::pipe()?;
        (Some(OwnedFd::from(agent)), OwnedFd::from(job))
    } else {
        (None, rustix::fs::open("/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?)
    };
    let output: Vec<(Source, OwnedFd)> = vec![(Source::Stdout, out.into()), (Source::Stderr, err.into())];
    for fd in output.iter().map(|(_, fd)| fd).chain(&input) {
        rustix::io::ioctl_fionbio(fd, true)?;
    }
    Ok(Channels { job: [stdin, out_job.into(), err_job.into()], output, input, terminal: None })
}

fn terminal(rows: u16, columns: u16, user: &User, fed: bool) -> io::Result<Channels> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = rustix::pty::openpt(flags)?;
    rustix::pty::unlockpt(&master)?;
    let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags)?;
    // Erasing takes whole characters then; the language of jobs is UTF-8.
    let mut modes = rustix::termios::tcgetattr(&slave)?;
    modes.input_modes |= InputModes::IUTF8;
    rustix::termios::tcsetattr(&slave, OptionalActions::Now, &modes)?;
    let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    rustix::termios::tcsetwinsize(&master, size)?;
    if user.uid != rustix::process::geteuid().as_raw() {
        rustix::fs::fchown(&slave, Some(rustix::fs::Uid::from_raw(user.uid)), None)?;
    }
    rustix::io::ioctl_fionbio(&master, true)?;
    let input = if fed { Some(rustix::io::fcntl_dupfd_cloexec(&master, 3)?) } else { None };
    let terminal = Some(rustix::io::fcntl_dupfd_cloexec(&master, 3)?);
    let job = [slave.try_clone()?, slave.try_clone()?, slave];
    Ok(Channels { job, output: vec![(Source::Stdout, master)], input, terminal })
}
