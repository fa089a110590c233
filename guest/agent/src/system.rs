//! What the agent asks of its own process, before it has threads.

use std::io;
use std::sync::OnceLock;

/// What the agent was started with and jobs get back.
static OPEN_FILES: OnceLock<libc::rlimit> = OnceLock::new();

/// Signals the job thread reads from a signalfd; blocked in every thread of the agent.
pub const SIGNALS: [libc::c_int; 3] = [libc::SIGCHLD, libc::SIGTERM, libc::SIGINT];

/// The signal that makes a blocked system call of a cancelled request return.
pub const INTERRUPT: libc::c_int = libc::SIGUSR1;

/// Sets up signals, descriptors, limits and memory priority. To be called before the first thread is made.
pub fn prepare() -> io::Result<()> {
    open_standard_descriptors()?;
    let set = signal_set(&SIGNALS);
    // Whoever started the agent may have blocked or ignored anything. With SIGCHLD ignored no end of a child could be
    // waited for, with the others of these ignored they would be lost.
    // SAFETY: `set` is initialised; no old set is asked for; the numbers are valid signals.
    unsafe {
        let errno = libc::pthread_sigmask(libc::SIG_SETMASK, &set, std::ptr::null_mut());
        if errno != 0 {
            return Err(io::Error::from_raw_os_error(errno));
        }
        for signal in SIGNALS {
            libc::signal(signal, libc::SIG_DFL);
        }
    }
    install_interrupt()?;
    raise_open_files();
    // Being killed first would take all jobs along. Without CAP_SYS_RESOURCE the score cannot be lowered: then it
    // stays what it was.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-500");
    // The secrets are in the memory of this process: it leaves no core file, and no other process of its user reads it,
    // not even root's in a machine, which has no CAP_SYS_PTRACE (PR_SET_DUMPABLE(2const)).
    // SAFETY: PR_SET_DUMPABLE takes a number.
    unsafe {
        libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0);
    }
    // Orphans of jobs come to the agent also where it is not process 1.
    if let Err(error) = rustix::process::set_child_subreaper(rustix::process::Pid::from_raw(1)) {
        crate::log::line(format_args!("cannot become a subreaper: {error}"));
    }
    Ok(())
}

/// The limits on open files a job gets: those the agent was started with.
pub fn original_open_files() -> Option<libc::rlimit> {
    OPEN_FILES.get().copied()
}

/// A set of these signals.
pub fn signal_set(signals: &[libc::c_int]) -> libc::sigset_t {
    let mut set = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initialises the set; the numbers are valid signals.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in signals {
            libc::sigaddset(set.as_mut_ptr(), *signal);
        }
        set.assume_init()
    }
}

/// The kernel's number of the calling thread.
pub fn thread_id() -> libc::pid_t {
    thread_local! {
        static ID: libc::pid_t = rustix::thread::gettid().as_raw_nonzero().get();
    }
    ID.with(|id| *id)
}

/// Interrupts a system call of a thread of this process. Harmless when it is in none.
pub fn interrupt(thread: libc::pid_t) {
    // SAFETY: tgkill takes no pointer; INTERRUPT has a handler that does nothing.
    unsafe {
        libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, INTERRUPT);
    }
}

/// Descriptors 0 to 2 must be taken, or a socket could end up as a job's stderr.
fn open_standard_descriptors() -> io::Result<()> {
    for fd in 0..3 {
        // SAFETY: F_GETFD takes no pointer.
        if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
            // SAFETY: the path is a C string. The lowest free number is `fd`, as all below are taken.
            if unsafe { libc::open(c"/dev/null".as_ptr(), libc::O_RDWR) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
    }
    Ok(())
}

fn install_interrupt() -> io::Result<()> {
    extern "C" fn nothing(_: libc::c_int) {}
    // SAFETY: a zeroed sigaction is valid; without SA_RESTART interrupted calls return EINTR, which is the purpose.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as libc::sighandler_t;
        libc::sigaction(INTERRUPT, &action, std::ptr::null_mut())
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn raise_open_files() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is valid for the time of both calls.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) == 0 {
            let _ = OPEN_FILES.set(limit);
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &limit);
        }
    }
}
