//! What happens to machines by the clock, and by their main process: rest, the end of a lifetime, restarts.
//!
//! *Use* of a machine is: a job that runs (its main process does not count) or is given; an operation on the content
//! or the names of its guest's files, listings and attributes excepted; what its ports carry. What is used for
//! nothing for `idle_timeout` goes to rest.

use super::Machine;
use super::config::Config;
use super::job::Script;
use super::jobs::MAIN;
use super::limits::Share;
use super::registry::Shared;
use super::state::{Event, State};
use crate::tree::ops::Caller;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, SystemTime};

/// How often the clock is looked at.
const TICK: Duration = Duration::from_secs(1);
/// The pause before the first restart; each further one is twice as long, up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// What ran for so long has come up: its restarts are counted anew.
const CAME_UP: Duration = Duration::from_secs(10);

/// Restarts one after the other.
#[derive(Default)]
pub(super) struct Restarts {
    /// Of a machine that was lost.
    lost: u32,
    due: Option<Instant>,
    /// Of its main process.
    main: u32,
}

fn pause(count: u32) -> Duration {
    FIRST_PAUSE.saturating_mul(1 << count.min(16)).min(LONGEST_PAUSE)
}

/// Looks at all machines, and at the clock for them, as long as there is a service.
pub(super) async fn watch(shared: Weak<Shared>) {
    for second in 0.. {
        tokio::time::sleep(TICK).await;
        let Some(shared) = shared.upgrade() else { return };
        let machines: Vec<Arc<Machine>> = shared.slots.iter().map(|machine| machine.clone()).collect();
        for machine in &machines {
            machine.look_after(second);
        }
        let resting = machines.iter().filter(|machine| machine.tick()).count();
        shared.any_idle.store(resting > 0, Ordering::Relaxed);
    }
}

impl Shared {
    /// Milliseconds since the service started.
    pub(super) fn now(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

impl Machine {
    /// It is used now.
    pub fn used(&self) {
        self.last_use.store(self.shared.now(), Ordering::Relaxed);
    }

    /// Whether it is down, or going down, only because nobody used it.
    pub fn is_idle(&self) -> bool {
        self.life.lock().idle
    }

    /// Whether it goes to rest, and will wake at once: it was used meanwhile.
    pub fn is_waking(&self) -> bool {
        let life = self.life.lock();
        life.idle && life.wake
    }

    /// Whether a job may be given to it: it runs, or will.
    pub fn accepts_jobs(&self) -> bool {
        let life = self.life.lock();
        life.state.takes_jobs() || life.idle
    }

    /// What it counts for where machines are limited.
    pub(super) fn share(&self) -> Share {
        Share { uid: self.owner.0, memory: self.config.lock().0.size("memory") }
    }

    /// Wakes it if it rests. Returns at once; the boot goes on behind.
    pub fn wake(self: &Arc<Self>) {
        let event = {
            let mut life = self.life.lock();
            match life.state {
                _ if !life.idle => return,
                State::Stopped => Event::Start,
                State::Paused => Event::Resume,
                _ => {
                    life.wake = true;
                    return;
                }
            }
        };
        // Somebody else may have woken it since: then there is nothing to do.
        let _ = self.fire_because(event, "it is used");
    }

    /// It has come to rest: if it was used meanwhile, that was no rest.
    pub(super) fn wake_if_used(self: &Arc<Self>) {
        let wanted = {
            let life = self.life.lock();
            life.wake && life.state == State::Stopped
        };
        if wanted {
            self.wake();
        }
    }

    /// A user's verb: what rests and is asked to be down is down.
    pub(super) fn end_rest(self: &Arc<Self>, event: Event) {
        if !matches!(event, Event::Stop | Event::Kill | Event::Pause) {
            return;
        }
        let mut life = self.life.lock();
        if life.idle {
            (life.idle, life.wake) = (false, false);
            self.shared.store.set_idle(self.slot, false);
            drop(life);
            self.follow_ports();
        }
    }

    /// Looks at the clock. Gives whether it can rest, or does.
    fn tick(self: &Arc<Self>) -> bool {
        let config = self.config.lock().0.clone();
        let (state, since, idle) = {
            let life = self.life.lock();
            (life.state, life.changed, life.idle)
        };
        if state == State::Destroyed {
            return false;
        }
        let age = self.created.elapsed().unwrap_or_default();
        if config.time("lifetime").is_some_and(|lifetime| age >= lifetime) && !config.flag("protect") {
            self.destroy_because("its lifetime is over");
            return false;
        }
        self.restart_if_lost(state, since, &config);
        let Some(timeout) = config.time("idle_timeout") else { return idle };
        if state == State::Running {
            if self.jobs.unfinished_besides(MAIN) > 0 {
                self.used();
            }
            let unused = self.shared.now().saturating_sub(self.last_use.load(Ordering::Relaxed));
            if u128::from(unused) >= timeout.as_millis() {
                self.rest(&config, timeout);
            }
        }
        true
    }

    fn rest(self: &Arc<Self>, config: &Config, timeout: Duration) {
        let why = format!("nobody used it for {} s", timeout.as_secs());
        let action = config.get("on_idle").unwrap_or("stop");
        // Whatever comes of it, the next try is a time-out from now.
        self.used();
        match action {
            "destroy" if config.flag("protect") => {}
            "destroy" => self.destroy_because(&why),
            "pause" if !self.backend().capabilities(&self.spec()).pause => {
                let message = "on_idle=pause: this host has no freezer control group for the machine";
                self.record_error("idle", crate::errno::Errno::EOPNOTSUPP, message, "");
            }
            // Refused only if somebody did something to it just now: then it is in use.
            action => {
                let event = if action == "pause" { Event::Pause } else { Event::Stop };
                let mut rests = false;
                self.jobs.unless_used(MAIN, || rests = self.step(event, &why, true).unwrap_or(false));
                if rests {
                    self.wake_watchers();
                }
            }
        }
    }

    fn destroy_because(self: &Arc<Self>, why: &str) {
        self.shared.unlist(self);
        // Destroy is refused in no state.
        let _ = self.fire_because(Event::Destroy, why);
    }

    /// A machine that was lost is started again if its policy wants that, after a pause that grows.
    fn restart_if_lost(self: &Arc<Self>, state: State, since: SystemTime, config: &Config) {
        let mut restarts = self.restarts.lock();
        match state {
            State::Running if since.elapsed().is_ok_and(|time| time >= CAME_UP) => restarts.lost = 0,
            State::Lost | State::Failed if config.get("restart") != Some("no") => {
                // One that has never come up needs a change, not another try.
                if state == State::Failed && restarts.lost == 0 {
                    return;
                }
                match restarts.due {
                    None => {
                        restarts.due = Instant::now().checked_add(pause(restarts.lost));
                        restarts.lost += 1;
                    }
                    Some(due) if due <= Instant::now() => {
                        restarts.due = None;
                        drop(restarts);
                        let _ = self.fire_because(Event::Start, "its restart policy");
                    }
                    Some(_) => {}
                }
            }
            _ => restarts.due = None,
        }
    }

    /// Starts the main process, if there is to be one and it does not run.
    pub(super) fn start_main(self: &Arc<Self>) {
        let command = {
            let run = self.run.lock();
            run.config.as_ref().and_then(|config| config.given("command").map(str::to_string))
        };
        let Some(command) = command else { return };
        if self.jobs.find(MAIN.as_bytes()).is_some_and(|job| !job.is_done()) {
            return;
        }
        let owner = Caller { uid: self.owner.0, gid: self.owner.1, pid: 0 };
        match self.jobs.begin_as(owner, Some(MAIN)) {
            Ok(job) => {
                // What becomes of it shows in the job.
                self.jobs.submit(&job, Script::Text(format!("{command}\n").into_bytes()), |_| {});
            }
            Err(error) => self.record_error("start", error.errno(), &error.to_string(), &command),
        }
    }

    /// Goes on after a restart of the daemon, which may have come between any two steps.
    pub(super) fn resume_main(self: &Arc<Self>) {
        let (command, started) = {
            let run = self.run.lock();
            (run.config.as_ref().and_then(|config| config.given("command").map(drop)), run.started)
        };
        // What ended meanwhile was seen already.
        if command.is_none() || self.state() != State::Running || self.restarts.lock().main > 0 {
            return;
        }
        let main = self.jobs.find(MAIN.as_bytes());
        let of_this_run = main.filter(|job| started.is_some_and(|started| job.created() >= started));
        match of_this_run.map(|job| (job.exit(), job.ran(), job.is_done())) {
            Some((Some(Ok(code)), ran, _)) => self.main_ended(code, ran),
            Some((_, _, false)) => {}
            _ => self.start_main(),
        }
    }

    /// The main process has ended: it is started again, or the machine stops.
    pub(super) fn main_ended(self: &Arc<Self>, code: u8, ran: Duration) {
        let policy = self.config_get("restart").unwrap_or_default();
        let again = policy == "always" || (policy == "on-failure" && code != 0);
        self.say("command", &[("exit", &code.to_string()), ("restart", if again { "yes" } else { "no" })]);
        // On its way down, or up again (restart), it ends with the machine: that is no reason for anything.
        if self.state() != State::Running {
            return;
        }
        if !again {
            // Refused only where it is on its way down already.
            let _ = self.fire_because(Event::Stop, "its command has ended");
            return;
        }
        let wait = {
            let mut restarts = self.restarts.lock();
            restarts.main = if ran >= CAME_UP { 0 } else { restarts.main + 1 };
            pause(restarts.main.saturating_sub(1))
        };
        let (machine, run) = (self.clone(), self.run_number.load(Ordering::SeqCst));
        self.shared.runtime.spawn(async move {
            tokio::time::sleep(wait).await;
            if machine.is_run(run) && machine.state().takes_jobs() {
                machine.start_main();
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_an_end() {
        assert_eq!(pause(0), FIRST_PAUSE);
        assert_eq!(pause(1), FIRST_PAUSE * 2);
        assert_eq!(pause(9), Duration::from_millis(51_200));
        assert_eq!(pause(10), LONGEST_PAUSE);
        assert_eq!(pause(u32::MAX), LONGEST_PAUSE);
    }
}
