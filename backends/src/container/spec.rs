//! The runtime's description of a machine: `config.json` of the OCI runtime-spec, as far as it is used here.

use super::seccomp::{self, Seccomp};
use super::userns::RANGE;
use crate::MachineSpec;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::Path;

/// Where the agent's binary is in a machine: on the tmpfs of /run, so that it works with any root, an empty one too,
/// and leaves no trace in the machine's disk.
pub(super) const AGENT: &str = "/run/.machinefs/agent";

/// What root in the machine may do: within its user namespace only, so over what is the machine's own.
/// This is a part of what Docker gives; left out: NET_RAW, and MKNOD, which a user namespace cannot use anyhow.
const CAPABILITIES: &[&str] = &[
    // Package managers, archives and the agent's file service act on files of all the machine's users.
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_SETFCAP",
    // Jobs run as the machine's users; su, sudo and daemons change theirs.
    "CAP_SETUID",
    "CAP_SETGID",
    // The agent signals jobs of all users.
    "CAP_KILL",
    // Sessions drop what they do not need.
    "CAP_SETPCAP",
    // Servers on ports below 1024, in the machine's own network.
    "CAP_NET_BIND_SERVICE",
    // Package builds, mail and FTP servers confine themselves.
    "CAP_SYS_CHROOT",
    // PAM reports sessions; sudo complains where it may not.
    "CAP_AUDIT_WRITE",
];

/// Paths of /proc and /sys that tell of the host or act on it.
const MASKED: &[&str] = &[
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];

const READ_ONLY: &[&str] = &["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// The period of the processor limit, in microseconds (the kernel's own default).
const CPU_PERIOD: u64 = 100_000;

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Config<'a> {
    oci_version: &'static str,
    hostname: &'a str,
    root: Root<'a>,
    process: Process,
    mounts: Vec<Mount<'a>>,
    linux: Linux,
    annotations: BTreeMap<&'static str, &'a str>,
}

#[derive(Debug, Serialize)]
struct Root<'a> {
    path: &'a Path,
    readonly: bool,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Process {
    terminal: bool,
    user: User,
    args: [&'static str; 2],
    env: &'static [&'static str],
    cwd: &'static str,
    capabilities: Capabilities,
    rlimits: Vec<Rlimit>,
    no_new_privileges: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    oom_score_adj: Option<i32>,
}

#[derive(Debug, Serialize)]
struct User {
    uid: u32,
    gid: u32,
}

#[derive(Debug, Serialize)]
struct Capabilities {
    bounding: &'static [&'static str],
    effective: &'static [&'static str],
    permitted: &'static [&'static str],
}

#[derive(Debug, Serialize)]
struct Rlimit {
    #[serde(rename = "type")]
    kind: &'static str,
    soft: u64,
    hard: u64,
}

#[derive(Debug, Serialize)]
struct Mount<'a> {
    destination: &'static str,
    #[serde(rename = "type")]
    kind: &'static str,
    source: &'a Path,
    options: Vec<&'static str>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Linux {
    namespaces: Vec<Namespace>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    uid_mappings: Vec<Mapping>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    gid_mappings: Vec<Mapping>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cgroups_path: Option<String>,
    resources: Resources,
    seccomp: Seccomp,
    masked_paths: &'static [&'static str],
    readonly_paths: &'static [&'static str],
}

#[derive(Debug, Serialize)]
struct Namespace {
    #[serde(rename = "type")]
    kind: &'static str,
}

#[derive(Debug, Serialize)]
struct Mapping {
    #[serde(rename = "containerID")]
    container_id: u32,
    #[serde(rename = "hostID")]
    host_id: u32,
    size: u32,
}

#[derive(Debug, Default, Serialize)]
struct Resources {
    #[serde(skip_serializing_if = "Option::is_none")]
    memory: Option<Memory>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cpu: Option<Cpu>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pids: Option<Pids>,
}

#[derive(Debug, Serialize)]
struct Memory {
    limit: i64,
}

#[derive(Debug, Serialize)]
struct Cpu {
    quota: i64,
    period: u64,
}

#[derive(Debug, Serialize)]
struct Pids {
    limit: i64,
}

/// What a [`Config`] is made of beside the machine's own settings.
#[derive(Debug)]
pub(super) struct Input<'a> {
    /// The root, mounted, where the runtime sees it.
    pub(super) root: &'a Path,
    /// The agent's binary, where the runtime sees it.
    pub(super) agent: &'a Path,
    /// First number of the machine's users on the host. `None`: the runtime is in the machine's user namespace already.
    pub(super) uid_base: Option<u32>,
    /// Are there users beside root in the machine?
    pub(super) has_users: bool,
    /// The control group; `None`: the runtime is to make none.
    pub(super) cgroup: Option<String>,
    /// Which limits can be set.
    pub(super) limits: Limits,
    /// The seccomp profile as a program, in base64, for crun.
    pub(super) filter: Option<&'a str>,
}

/// Which limits can be set here.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Limits {
    pub(super) cpu: bool,
    pub(super) memory: bool,
    pub(super) pids: bool,
}

fn mount<'a>(destination: &'static str, kind: &'static str, source: &'a str, options: &[&'static str]) -> Mount<'a> {
    Mount { destination, kind, source: Path::new(source), options: options.to_vec() }
}

fn mounts<'a>(input: &Input<'a>) -> Vec<Mount<'a>> {
    let mut pts = vec!["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"];
    if input.has_users {
        pts.push("gid=5");
    }
    let mut all = vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount("/dev/pts", "devpts", "devpts", &pts),
        mount("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
        mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
        mount("/run", "tmpfs", "tmpfs", &["nosuid", "nodev", "mode=755", "size=20%"]),
    ];
    if input.cgroup.is_some() {
        all.push(mount("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", "ro"]));
    }
    let options = vec!["bind", "ro", "nosuid", "nodev"];
    all.push(Mount { destination: AGENT, kind: "bind", source: input.agent, options });
    all
}

fn resources(spec: &MachineSpec, limits: Limits) -> Resources {
    let signed = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    Resources {
        memory: spec.memory.filter(|_| limits.memory).map(|m| Memory { limit: signed(m) }),
        // The kernel takes a quota of 1 ms at least.
        cpu: spec
            .cpus
            .filter(|c| limits.cpu && *c > 0.0)
            .map(|c| Cpu { quota: ((c * CPU_PERIOD as f64).ceil() as i64).max(1000), period: CPU_PERIOD }),
        pids: spec.pids.filter(|_| limits.pids).map(|p| Pids { limit: signed(p) }),
    }
}

fn rlimits() -> Vec<Rlimit> {
    // Only who has CAP_SYS_RESOURCE may raise a hard limit, and not every daemon does.
    let own = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let hard = own.maximum.unwrap_or(1 << 20).min(1 << 20);
    // A core_pattern with a pipe starts a program of the host's, as its root, whatever the limit, but for 1, which is
    // how the kernel keeps such a program's own crash from starting another (fs/coredump.c); to a file it writes none.
    vec![Rlimit { kind: "RLIMIT_NOFILE", soft: hard, hard }, Rlimit { kind: "RLIMIT_CORE", soft: 1, hard: 1 }]
}

/// A machine's score is never below 0, and not below the daemon's own: that would need CAP_SYS_RESOURCE.
fn oom_score_adj() -> Option<i32> {
    let own = std::fs::read_to_string("/proc/self/oom_score_adj").ok()?;
    own.trim().parse::<i32>().ok().map(|own| own.max(0))
}

impl<'a> Config<'a> {
    /// For this machine.
    pub(super) fn new(spec: &'a MachineSpec, input: &Input<'a>) -> Self {
        let map = input.uid_base.map(|base| Mapping { container_id: 0, host_id: base, size: RANGE });
        let gid_map = input.uid_base.map(|base| Mapping { container_id: 0, host_id: base, size: RANGE });
        let mut kinds = vec!["pid", "mount", "network", "ipc", "uts", "cgroup"];
        if input.uid_base.is_some() {
            kinds.push("user");
        }
        Self {
            oci_version: "1.0.2",
            hostname: &spec.hostname,
            root: Root { path: input.root, readonly: false },
            process: Process {
                terminal: false,
                user: User { uid: 0, gid: 0 },
                args: [AGENT, "init"],
                env: &[
                    "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                    "HOME=/root",
                    "container=machinefs",
                ],
                cwd: "/",
                capabilities: Capabilities { bounding: CAPABILITIES, effective: CAPABILITIES, permitted: CAPABILITIES },
                rlimits: rlimits(),
                // su and sudo in the machine gain the machine's root, which the user namespace keeps harmless.
                no_new_privileges: false,
                oom_score_adj: oom_score_adj(),
            },
            mounts: mounts(input),
            annotations: input.filter.map(|f| ("run.oci.seccomp_bpf_data", f)).into_iter().collect(),
            linux: Linux {
                namespaces: kinds.into_iter().map(|kind| Namespace { kind }).collect(),
                uid_mappings: map.into_iter().collect(),
                gid_mappings: gid_map.into_iter().collect(),
                cgroups_path: input.cgroup.clone(),
                resources: resources(spec, input.limits),
                seccomp: seccomp::profile(),
                masked_paths: MASKED,
                readonly_paths: READ_ONLY,
            },
        }
    }
}
