//! One task a machine that does what the state machine decided: boots it, watches it, ends it.

use super::error::MachineError;
use super::state::{Action, Event, State};
use super::{Guest, Machine, RunFacts, store};
use crate::link::{Link, LinkError, LinkEvents, LinkOptions, RequestOptions};
use crate::tree::guest::{GuestFiles, GuestView};
use machinefs_backends::{Adopted, Running};
use machinefs_protocol::message::{Event as GuestEvent, GuestInfo, Reply, Request};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;

/// How long a machine that is taken over after a restart is held up by an agent that does not answer.
const TAKE_OVER: Duration = Duration::from_secs(10);
/// While the agent is sought, its machine is looked at so often.
const SEEK: Duration = Duration::from_secs(10);

/// What a machine begins with.
pub(super) enum Begin {
    /// It was just made.
    Create,
    /// The daemon was restarted. Dropped when it is known what became of it meanwhile, so that its state is true.
    Adopt(mpsc::Sender<()>),
}

/// Runs until the machine is torn down.
pub(super) async fn run(machine: Arc<Machine>, mut actions: mpsc::UnboundedReceiver<Action>, begin: Begin) {
    let mut next = match begin {
        Begin::Create => Some(Action::Boot),
        Begin::Adopt(known) => adopt(&machine, known).await,
    };
    loop {
        let action = match next.take() {
            Some(action) => action,
            None => match actions.recv().await {
                Some(action) => action,
                None => return,
            },
        };
        match action {
            Action::None => {}
            Action::Boot => next = boot_or_next(&machine, &mut actions).await,
            Action::Reboot => {
                shut_down(&machine).await;
                next = boot_or_next(&machine, &mut actions).await;
            }
            Action::Shutdown => {
                // A kill that comes meanwhile cuts the grace short.
                next = tokio::select! {
                    () = shut_down(&machine) => None,
                    action = actions.recv() => action,
                };
                if next.is_none() {
                    ended(&machine);
                }
            }
            Action::Kill => {
                kill(&machine).await;
                ended(&machine);
            }
            Action::Pause => {
                let frozen = machine.backend().pause(&machine.spec()).await;
                pause_done(&machine, "pause", frozen.map_err(MachineError::from));
            }
            Action::Resume => {
                let thawed = machine.backend().resume(&machine.spec()).await;
                pause_done(&machine, "resume", thawed.map_err(MachineError::from));
                // Its stream broke while it could not answer.
                if machine.state() == State::Running && machine.link().is_none() {
                    reconnect_behind(&machine, machine.run_number.load(Ordering::SeqCst));
                }
            }
            Action::TearDown => {
                tear_down(&machine).await;
                return;
            }
        }
    }
}

fn ended(machine: &Arc<Machine>) {
    // Refused in no state.
    let _ = machine.fire(Event::Ended);
    machine.wake_if_used();
}

fn pause_done(machine: &Arc<Machine>, verb: &str, result: Result<(), MachineError>) {
    if let Err(error) = result {
        machine.record_error(verb, error.errno(), &error.to_string(), verb);
        let _ = machine.fire(Event::PauseFailed);
    }
}

/// Boots, unless another action comes first: then the boot is dropped, and that action returned (every action that
/// can come while booting ends the machine, and cleans up after a boot that was cut off anywhere).
async fn boot_or_next(machine: &Arc<Machine>, actions: &mut mpsc::UnboundedReceiver<Action>) -> Option<Action> {
    let limit = machine.config.lock().0.time("boot_timeout").unwrap_or(Duration::MAX);
    tokio::select! {
        biased;
        action = actions.recv() => action,
        result = tokio::time::timeout(limit, boot(machine)) => {
            let error = match result {
                Ok(Ok(())) => return None,
                Ok(Err(error)) => error,
                Err(_) => MachineError::timed_out(format!(
                    "it did not come up within boot_timeout ({} s): read console, or set boot_timeout higher",
                    limit.as_secs()
                )),
            };
            boot_failed(machine, &error).await;
            None
        }
    }
}

async fn boot_failed(machine: &Arc<Machine>, error: &MachineError) {
    if let Ok(console) = machine.backend().console(&machine.spec()).await {
        machine.console.append(&console);
    }
    machine.shared.counters.failed_boots.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    machine.record_error("boot", error.errno(), &error.to_string(), "start");
    let _ = machine.fire_because(Event::BootFailed, &error.to_string());
}

async fn boot(machine: &Arc<Machine>) -> Result<(), MachineError> {
    let run = machine.next_run();
    machine.mounts_begin();
    let (backend, spec) = (machine.backend(), machine.spec());
    let config = machine.config.lock().0.clone();
    // What is about to be made is written down first: a crash from here on leaks nothing.
    machine.shared.store.flush().await?;
    if machine.state() == State::Creating {
        std::fs::create_dir_all(&spec.dir)
            .map_err(|error| MachineError::no_space(format!("cannot make {}: {error}", spec.dir.display())))?;
        backend.create(&spec, Arc::new(|_| {})).await?;
        if !config.flag("autostart") {
            let _ = machine.fire(Event::PreparedOnly);
            return Ok(());
        }
        let _ = machine.fire(Event::Prepared);
    }
    *machine.run.lock() = RunFacts { config: Some(config), ..RunFacts::default() };
    let running = backend.start(&spec).await?;
    note_running(machine, running)?;
    let link = connect(machine, run).await?;
    machine.mounts_up(&spec.mounts).await;
    watch_end(machine, run);
    let _ = machine.fire(Event::Booted);
    machine.expect_clone(true);
    // Only now: a machine written down as booting has started no job.
    machine.jobs.connected(machine, &link).await;
    machine.start_clone();
    machine.start_main();
    if machine.link().is_none() {
        reconnect_behind(machine, run);
    }
    Ok(())
}

fn note_running(machine: &Arc<Machine>, running: Running) -> Result<(), MachineError> {
    // SAFETY: an OwnedFd is open and the same until it is dropped, which the AsyncFd does that owns it.
    let pidfd = unsafe { AsyncFd::register_with_interest(running.pidfd, tokio::io::Interest::READABLE) }
        .map_err(|error| MachineError::limit(format!("cannot watch the machine's process: {error}")))?;
    let is_default = machine.config_get("network").as_deref() == Some("default");
    let lacks_network = is_default && running.facts.iter().any(|(key, value)| key == "network" && value == "none");
    let mut run = machine.run.lock();
    run.pidfd = Some(Arc::new(pidfd));
    run.pid = running.pid;
    run.started = Some(process_start(running.pid).unwrap_or_else(SystemTime::now));
    run.facts = running.facts;
    run.warnings = running.warnings.into_iter().map(|warning| warning.0).collect();
    if lacks_network {
        run.warnings.push("it has no network: this host cannot give it one, see machinefs check".into());
    }
    for warning in run.warnings.clone() {
        machine.record_error("start", crate::errno::Errno::EOPNOTSUPP, &warning, "start");
    }
    Ok(())
}

/// When a process started: field 22 of proc_pid_stat(5), in clock ticks since the boot of the host.
fn process_start(pid: u32) -> Option<SystemTime> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = stat.rsplit_once(") ")?;
    let ticks: u64 = fields.split(' ').nth(19)?.parse().ok()?;
    let since_boot = Duration::from_millis(ticks.checked_mul(1000)? / rustix::param::clock_ticks_per_second());
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let now_since_boot = Duration::new(now.tv_sec.try_into().ok()?, now.tv_nsec.try_into().ok()?);
    SystemTime::now().checked_sub(now_since_boot.checked_sub(since_boot)?)
}

/// Seeks the agent and takes its stream into use. Tries until it is dropped (the boot's own time-out bounds it).
async fn connect(machine: &Arc<Machine>, run: u64) -> Result<Arc<Link>, MachineError> {
    let (backend, spec) = (machine.backend(), machine.spec());
    let mut pause = Duration::from_millis(2);
    loop {
        let error = match backend.connect(&spec).await {
            Ok(stream) => {
                let news = Arc::new(AgentNews { machine: Arc::downgrade(machine), run });
                let options = LinkOptions::new(session_id(machine, run), machine.id.clone(), news);
                let link = tokio::task::spawn_blocking(move || Link::connect(stream, options)).await;
                match link.map_err(|_| MachineError::internal("the handshake panicked"))? {
                    Ok(link) => match take_into_use(machine, link).await {
                        Ok(link) => return Ok(link),
                        // An agent that was stopped takes its streams one after the other, each in place of the last.
                        Err(error) => error,
                    },
                    // Trying again does not make a wrong version right.
                    Err(error @ LinkError::Version { .. }) => return Err(unreachable(&error)),
                    Err(error) => unreachable(&error),
                }
            }
            Err(error) => error.into(),
        };
        tracing::debug!(machine = machine.id, %error, "the agent does not answer yet");
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(500));
    }
}

fn unreachable(error: &LinkError) -> MachineError {
    MachineError::unreachable(format!("the agent: {error}"))
}

/// Another life of the daemon, and another run of the machine, is another session: old nodes and handles end with it.
fn session_id(machine: &Machine, run: u64) -> u128 {
    u128::from(machine.shared.life) << 64 | u128::from(machine.slot) << 40 | u128::from(run & 0xff_ffff_ffff)
}

async fn take_into_use(machine: &Arc<Machine>, link: Arc<Link>) -> Result<Arc<Link>, MachineError> {
    let answer = link
        .call(&Request::Info, &[], RequestOptions::within(link.op_deadline()))
        .await
        .map_err(|error| unreachable(&error))?;
    let Reply::Info(info) = answer.reply else {
        return Err(MachineError::unreachable("the agent gave a wrong answer to info"));
    };
    let (files, epoch) = guest_files(machine, &link, &info);
    machine.shared.epochs.insert(epoch, Arc::downgrade(&files));
    *machine.guest.write() = Some(Guest { link: link.clone(), files, info });
    Ok(link)
}

fn guest_files(machine: &Arc<Machine>, link: &Arc<Link>, info: &GuestInfo) -> (Arc<GuestFiles>, u32) {
    let epoch = machine.shared.next_epoch();
    let swap = machine.config_get("idmap").as_deref() != Some("none");
    let view = GuestView {
        slot: machine.slot,
        epoch,
        owner_uid: machine.owner.0,
        owner_gid: machine.owner.1,
        default_user: info.default_user,
        map_owner: swap,
        root_ino: crate::tree::node::files_ino(machine.slot),
        cache: machine.shared.cache(),
        paused: machine.paused.clone(),
    };
    (Arc::new(GuestFiles::new(link.clone(), view)), epoch)
}

/// Fires when the machine's first process (or VMM) ends while nobody has asked it to.
fn watch_end(machine: &Arc<Machine>, run: u64) {
    let machine = machine.clone();
    tokio::spawn(async move {
        gone(&machine).await;
        if machine.is_run(run) && matches!(machine.state(), State::Running | State::Paused) {
            disconnect(&machine);
            machine.record_error("run", crate::errno::Errno::EHOSTDOWN, "its first process ended unasked", "");
            let _ = machine.fire_because(Event::Ended, "its first process ended unasked");
        }
    });
}

/// Returns when the process of the present run has ended.
async fn gone(machine: &Arc<Machine>) {
    let pidfd = machine.run.lock().pidfd.clone();
    if let Some(pidfd) = pidfd {
        // A pidfd becomes readable when its process ends (pidfd_open(2)) and stays so.
        let _ = pidfd.readable().await;
    }
}

/// News from the agent's stream.
struct AgentNews {
    machine: Weak<Machine>,
    run: u64,
}

impl LinkEvents for AgentNews {
    fn event(&self, event: GuestEvent) {
        let Some(machine) = self.machine.upgrade() else { return };
        match event {
            GuestEvent::JobEnded { job, end } => machine.jobs.ended(&machine, job, end),
        }
    }

    fn lost(&self, reason: &LinkError) {
        let Some(machine) = self.machine.upgrade() else { return };
        // One that is being ended takes its link down itself.
        if !machine.is_run(self.run) || !matches!(machine.state(), State::Booting | State::Running | State::Paused) {
            return;
        }
        tracing::warn!(machine = machine.id, %reason, "the agent's stream broke");
        machine.say("agent", &[("stream", "lost")]);
        *machine.guest.write() = None;
        machine.jobs.disconnected();
        // One that boots or is paused is connected anew when that is over.
        if machine.state() == State::Running {
            reconnect_behind(&machine, self.run);
        }
    }
}

/// Seeks the agent for as long as its machine runs: one that was stopped for a while, or is very busy, comes back, and
/// its jobs with it.
async fn reconnect(machine: &Arc<Machine>, run: u64) {
    let wanted = || machine.is_run(run) && machine.state() == State::Running && machine.link().is_none();
    while wanted() {
        // Runs count from 1.
        if machine.seeking.swap(run, Ordering::SeqCst) == run {
            return;
        }
        seek(machine, run).await;
        let _ = machine.seeking.compare_exchange(run, 0, Ordering::SeqCst, Ordering::SeqCst);
    }
}

async fn seek(machine: &Arc<Machine>, run: u64) {
    while machine.is_run(run) && machine.state() == State::Running {
        match tokio::time::timeout(SEEK, connect(machine, run)).await {
            Ok(Ok(link)) => {
                machine.say("agent", &[("stream", "back")]);
                return machine.jobs.connected(machine, &link).await;
            }
            // Trying again does not help.
            Ok(Err(error)) if machine.is_run(run) => {
                machine.record_error("run", error.errno(), &error.to_string(), "");
                let _ = machine.fire_because(Event::AgentLost, &error.to_string());
                return;
            }
            Ok(Err(_)) => return,
            // Whether the machine still runs is looked at from time to time.
            Err(_) => {}
        }
    }
}

fn reconnect_behind(machine: &Arc<Machine>, run: u64) {
    let machine = machine.clone();
    machine.shared.runtime.clone().spawn(async move { reconnect(&machine, run).await });
}

fn disconnect(machine: &Arc<Machine>) {
    let guest = machine.guest.write().take();
    if let Some(guest) = guest {
        guest.link.close();
    }
}

/// Asks the guest to end, waits for the grace, and kills what is left.
async fn shut_down(machine: &Arc<Machine>) {
    let grace = Duration::from_millis(machine.grace_ms.load(Ordering::Relaxed));
    let (backend, spec) = (machine.backend(), machine.spec());
    // A frozen guest could not hear it.
    if let Err(error) = backend.resume(&spec).await {
        tracing::debug!(machine = machine.id, %error, "resume before stop");
    }
    if let Some(link) = machine.link() {
        let request = Request::Shutdown { grace_ms: u32::try_from(grace.as_millis()).unwrap_or(u32::MAX) };
        let asked = link.call(&request, &[], RequestOptions::within(Duration::from_secs(2))).await;
        if asked.is_ok() {
            let _ = tokio::time::timeout(grace + Duration::from_secs(2), gone(machine)).await;
        }
    }
    kill(machine).await;
}

/// Ends the run without asking, and everything that hangs on it.
async fn kill(machine: &Arc<Machine>) {
    machine.next_run();
    machine.mounts_down();
    if let Err(error) = machine.backend().kill(&machine.spec()).await {
        let error = MachineError::from(error);
        machine.record_error("kill", error.errno(), &error.to_string(), "kill");
        tracing::error!(machine = machine.id, %error, "could not clean up after the machine");
    }
    disconnect(machine);
    machine.jobs.machine_ended(machine);
    let mut run = machine.run.lock();
    (run.pid, run.pidfd) = (0, None);
}

/// Removes everything; tried again until it works, for a leak is worse than a wait.
async fn tear_down(machine: &Arc<Machine>) {
    machine.next_run();
    machine.mounts_down();
    disconnect(machine);
    machine.jobs.machine_ended(machine);
    let mut pause = Duration::from_millis(100);
    loop {
        match remove(machine).await {
            Ok(()) => break,
            Err(error) => {
                machine.shared.fault(&machine.id, Some(&format!("cannot be removed: {error}")));
                tracing::error!(machine = machine.id, %error, "could not remove the machine; trying again");
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_secs(60));
    }
    machine.shared.fault(&machine.id, None);
    machine.shared.fault(&machine.silence_subject(), None);
    machine.shared.forget(machine);
    machine.say("gone", &[]);
    let slot = machine.slot;
    machine.shared.store.write(move |db| store::delete_machine(db, slot));
}

async fn remove(machine: &Arc<Machine>) -> Result<(), MachineError> {
    machine.backend().destroy(&machine.spec()).await?;
    match tokio::fs::remove_dir_all(&machine.dir).await {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(MachineError::unreachable(format!("{}: {error}", machine.dir.display()))),
    }
}

/// After a restart of the daemon: takes over what runs, cleans up after what does not. Gives what is to be done next.
async fn adopt(machine: &Arc<Machine>, known: mpsc::Sender<()>) -> Option<Action> {
    match machine.state() {
        State::Creating => Some(Action::Boot),
        State::Destroyed => Some(Action::TearDown),
        State::Stopping => Some(Action::Kill),
        State::Stopped | State::Failed | State::Lost => {
            drop(known);
            // The disk is kept; whatever else is left of a run goes.
            if let Err(error) = machine.backend().kill(&machine.spec()).await {
                tracing::warn!(machine = machine.id, %error, "cleaning up after a restart");
            }
            None
        }
        State::Booting | State::Running | State::Paused => take_over(machine, known).await,
    }
}

async fn take_over(machine: &Arc<Machine>, known: mpsc::Sender<()>) -> Option<Action> {
    let was = machine.state();
    let run = machine.next_run();
    let found = machine.backend().adopt(&machine.spec()).await;
    if let Ok(Adopted::Running(running)) = found {
        // It runs; to find its agent may take long. Its files wait for that, as for a boot.
        machine.adopting.store(true, Ordering::Release);
        drop(known);
        if let Err(error) = note_running(machine, running) {
            tracing::error!(machine = machine.id, %error, "adopting");
        }
        machine.run.lock().config = Some(machine.config.lock().0.clone());
        // A paused agent cannot shake hands: it is thawed for that, and frozen again.
        if was == State::Paused {
            let _ = machine.backend().resume(&machine.spec()).await;
        }
        let found = tokio::time::timeout(TAKE_OVER, connect(machine, run)).await;
        let link = match found {
            Ok(Ok(link)) => Some(link),
            Ok(Err(error)) => {
                machine.record_error("adopt", error.errno(), &error.to_string(), "");
                None
            }
            Err(_) => None,
        };
        if link.is_some() || was != State::Booting {
            machine.mounts_adopted(was == State::Booting).await;
        }
        machine.adopting.store(false, Ordering::Release);
        machine.wake_watchers();
        machine.expect_clone(was == State::Booting);
        if let Some(link) = &link {
            machine.jobs.connected(machine, link).await;
        } else if was != State::Booting {
            let why = "the agent did not answer after the restart of the daemon; it is sought again";
            machine.record_error("adopt", crate::errno::Errno::EHOSTUNREACH, why, "");
        }
        // One that was booting and has no agent yet boots anew.
        if link.is_some() || was != State::Booting {
            if was == State::Paused {
                let frozen = machine.backend().pause(&machine.spec()).await;
                pause_done(machine, "pause", frozen.map_err(MachineError::from));
            }
            watch_end(machine, run);
            let _ = machine.fire(Event::Booted);
            machine.say("adopted", &[]);
            machine.start_clone();
            machine.resume_main();
            if machine.link().is_none() {
                reconnect_behind(machine, run);
            }
            return None;
        }
    }
    if was == State::Booting {
        // It never got as far as to be of use: the boot begins anew.
        if let Err(error) = machine.backend().kill(&machine.spec()).await {
            tracing::warn!(machine = machine.id, %error, "cleaning up after a restart");
        }
        return Some(Action::Boot);
    }
    let why = "it did not survive the daemon's restart";
    machine.record_error("adopt", crate::errno::Errno::EHOSTDOWN, why, "");
    let _ = machine.fire_because(Event::Ended, why);
    None
}
