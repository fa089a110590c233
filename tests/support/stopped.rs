//! A machine whose agent does not answer.

use crate::process::all_tasks;
use crate::{Machine, eventually};

/// A machine's init, stopped (SIGSTOP) for as long as this lives: an agent that does not answer.
pub struct Stopped(u32);

impl Stopped {
    /// Stops it.
    pub fn new(m: &Machine<'_>) -> Stopped {
        let pid = m.init();
        // SAFETY: kill(2) has no memory effects; the process is the init of the test's own machine.
        assert_eq!(unsafe { libc::kill(pid as i32, libc::SIGSTOP) }, 0);
        let stopped =
            eventually(10, || all_tasks().iter().filter(|task| task.pid == pid).all(|task| task.state == 'T'));
        assert!(stopped, "the agent does not stop");
        Stopped(pid)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // SAFETY: as above.
        unsafe { libc::kill(self.0 as i32, libc::SIGCONT) };
    }
}
