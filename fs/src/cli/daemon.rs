//! `machinefs mount` and `umount`.

use super::settings::{DaemonArgs, Settings};
use crate::fuse;
use crate::machine::registry::{Options, Registry};
use crate::tree::Tree;
use machinefs_backends::container::{ContainerBackend, ContainerOptions};
use rustix::fs::FlockOperation;
use rustix::process::{Resource, Rlimit};
use std::fs::File;
use std::io::IsTerminal;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use tokio::signal::unix::{SignalKind, signal};

/// Threads for the control plane: boots, timers. The files' way does not go through them.
const CONTROL_THREADS: usize = 2;

/// When the daemon has served so long, it looks at what the image `host` is made of, which takes seconds of a processor.
const PREPARE_AFTER: std::time::Duration = std::time::Duration::from_secs(3);

/// How long a daemon that was just unmounted or killed may take to end.
const HANDOVER: std::time::Duration = std::time::Duration::from_secs(3);

/// Serves until SIGTERM, SIGINT, `shutdown` in the root's ctl, or an unmount.
pub fn mount(mountpoint: &Path, args: DaemonArgs) -> Result<ExitCode, String> {
    let settings = args.resolve()?;
    let filter = tracing_subscriber::EnvFilter::try_new(&settings.log).map_err(|error| format!("--log: {error}"))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
    guard_memory();
    let _lock = claim(&settings.state_dir)?;
    raise_descriptor_limit();
    give_large_blocks_back();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(CONTROL_THREADS)
        .enable_all()
        .build()
        .map_err(|error| format!("cannot start the runtime: {error}"))?;
    let result = runtime.block_on(serve(mountpoint, &settings));
    // Machines' tasks are left where they are: machines outlive the daemon.
    runtime.shutdown_background();
    result.map(|()| ExitCode::SUCCESS)
}

async fn serve(mountpoint: &Path, settings: &Settings) -> Result<(), String> {
    let (mut terminate, mut interrupt) = (listen(SignalKind::terminate())?, listen(SignalKind::interrupt())?);
    fuse::replace_stale_mount(mountpoint).map_err(|error| error.to_string())?;
    let mountpoint = std::fs::canonicalize(mountpoint).map_err(|error| format!("{}: {error}", mountpoint.display()))?;
    if std::fs::canonicalize(&settings.state_dir).is_ok_and(|state| state.starts_with(&mountpoint)) {
        let path = mountpoint.display();
        return Err(format!(
            "the state directory is in {path}, where the mount would hide it: give another of the two"
        ));
    }
    let backend = Arc::new(container_backend(settings, Some(&mountpoint))?);
    // The first machine shall not wait for the look at this host's files; nor shall a restart, which is to be quick.
    let ahead = backend.clone();
    tokio::spawn(async move {
        tokio::time::sleep(PREPARE_AFTER).await;
        tokio::task::spawn_blocking(move || ahead.prepare());
    });
    let options = Options {
        state_dir: settings.state_dir.clone(),
        limits: settings.limits,
        defaults: settings.defaults.clone(),
        key_file: settings.key_file.clone(),
        ports_address: settings.ports_address,
        backend,
    };
    let registry = Registry::open(options).await.map_err(|error| error.to_string())?;
    let tree = Tree::new(registry.clone()).map_err(|error| format!("cannot start the tree: {error}"))?;
    let mounted = fuse::mount(fuse::MountOptions { no_exec: settings.noexec, ..fuse::MountOptions::new(&mountpoint) })
        .map_err(|error| error.to_string())?;
    let session = mounted.serve(Arc::new(tree)).map_err(|error| error.to_string())?;
    if let Some(expirer) = session.expirer() {
        registry.cache().expire_by(Box::new(move || expirer.expire()));
    }
    tracing::info!(mountpoint = %mountpoint.display(), state_dir = %settings.state_dir.display(), "serving");
    let ended = async {
        while session.is_alive() {
            tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        }
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        () = registry.shutdown_asked() => {}
        () = ended => tracing::info!("unmounted by somebody else"),
    }
    if session.is_alive()
        && let Err(error) = session.unmount(true)
    {
        tracing::warn!(%error, "unmounting");
    }
    registry.flush().await;
    Ok(())
}

fn listen(kind: SignalKind) -> Result<tokio::signal::unix::Signal, String> {
    signal(kind).map_err(|error| format!("cannot listen for signals: {error}"))
}

/// The container backend as the settings have it.
pub fn container_backend(settings: &Settings, mountpoint: Option<&Path>) -> Result<ContainerBackend, String> {
    ContainerBackend::new(ContainerOptions {
        runtime: settings.runtime.clone(),
        mountpoint: mountpoint.map(Path::to_path_buf),
        resolv_conf: settings.resolv_conf.clone(),
        ..ContainerOptions::new(settings.agent.clone(), settings.state_dir.clone())
    })
    .map_err(|error| error.to_string())
}

/// Has the allocator map blocks of megabytes (a script on its way to an agent) apart, and unmap them when they are
/// freed. By itself it would learn from the first one freed to keep such blocks, in each thread's own heap.
fn give_large_blocks_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt(3) takes numbers only; the threads that allocate are started after this.
    if unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, 2 << 20) } == 0 {
        tracing::debug!("the allocator does not take its threshold");
    }
}

/// Makes the state directory ours alone: two daemons on one would tear down each other's machines.
fn claim(state_dir: &Path) -> Result<File, String> {
    use std::os::unix::fs::DirBuilderExt;
    use std::os::unix::fs::PermissionsExt;
    let path = state_dir.display();
    let failed = |error: std::io::Error| format!("{path}: {error}: give a --state-dir you may write");
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(state_dir).map_err(failed)?;
    let is_new = std::fs::read_dir(state_dir).map_err(failed)?.next().is_none();
    if !is_new && !state_dir.join("lock").exists() {
        return Err(format!("{path} is not empty, and no state directory of machinefs: give another --state-dir"));
    }
    // Scripts, output and the machines' disks are in it: whatever modes they have, nobody else gets to them.
    std::fs::set_permissions(state_dir, std::fs::Permissions::from_mode(0o700)).map_err(failed)?;
    let lock = File::create(state_dir.join("lock")).map_err(failed)?;
    let deadline = std::time::Instant::now() + HANDOVER;
    while rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
        if std::time::Instant::now() > deadline {
            return Err(format!("{path} is in use by another machinefs: end it, or give another --state-dir"));
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    Ok(lock)
}

/// Secrets pass through this process: it leaves no core file, and no other process of its user may look into it
/// (PR_SET_DUMPABLE of prctl(2); programs it starts are not concerned).
fn guard_memory() {
    use rustix::process::DumpableBehavior;
    if let Err(error) = rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable) {
        tracing::warn!(%error, "cannot keep this process out of core files");
    }
}

/// A machine takes a handful of descriptors; the soft limit of most hosts is 1024.
fn raise_descriptor_limit() {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, ..limit };
    if let Err(error) = rustix::process::setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}

/// Unmounts a tree of ours.
pub fn umount(mountpoint: &Path, lazy: bool) -> Result<ExitCode, String> {
    fuse::unmount(mountpoint, lazy).map_err(|error| error.to_string())?;
    Ok(ExitCode::SUCCESS)
}
