//! Control groups of the host, in the three layouts that are met: v2 (`unified`), v1 (`legacy`), and v1 with a v2
//! hierarchy beside it (`hybrid`). See cgroups(7).
//!
//! A machine's group has the same name in every hierarchy, `/machinefs/NAME`, and the name is never used twice: so
//! what is in it is the machine's, also when the daemon has lost every other trace.

use crate::{MachineSpec, Usage, Warning};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The group below the root of each hierarchy under which all machines are.
const PARENT: &str = "machinefs";

/// Where v2 belongs when it is the only one.
const UNIFIED: &str = "/sys/fs/cgroup";

/// How long an empty group may stay busy after the end of its last process.
const RMDIR_LIMIT: Duration = Duration::from_secs(5);

/// The hierarchies that are mounted.
#[derive(Clone, Debug, Default)]
pub(super) struct Cgroups {
    /// v1: its controllers (or `name=…`), and where.
    v1: Vec<(Vec<String>, PathBuf)>,
    /// v2: where.
    v2: Option<PathBuf>,
}

/// What a limit is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Limit {
    Cpu,
    Memory,
    Pids,
}

impl Limit {
    fn controller(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Memory => "memory",
            Self::Pids => "pids",
        }
    }
}

impl Cgroups {
    /// Looks at what is mounted now.
    pub(super) fn detect() -> io::Result<Self> {
        Ok(Self::parse(&fs::read_to_string("/proc/self/mounts")?))
    }

    fn parse(mounts: &str) -> Self {
        let mut found = Self::default();
        for line in mounts.lines() {
            let mut fields = line.split(' ').skip(1);
            let (Some(at), Some(kind), Some(options)) = (fields.next(), fields.next(), fields.next()) else { continue };
            match kind {
                "cgroup2" => found.v2 = Some(at.into()),
                "cgroup" => {
                    let flags = ["rw", "ro", "nosuid", "nodev", "noexec", "relatime", "noatime", "xattr", "noprefix"];
                    let names = options.split(',').filter(|o| {
                        !flags.contains(o) && (!o.contains('=') || o.starts_with("name=")) && *o != "clone_children"
                    });
                    found.v1.push((names.map(str::to_owned).collect(), at.into()));
                }
                _ => {}
            }
        }
        found
    }

    /// `unified`, `legacy`, `hybrid` or `none`.
    pub(super) fn layout(&self) -> &'static str {
        match (self.v1.is_empty(), &self.v2) {
            (true, None) => "none",
            (true, Some(_)) => "unified",
            (false, None) => "legacy",
            (false, Some(_)) => "hybrid",
        }
    }

    /// The v2 mount that has to be out of the runtime's sight: crun 1.8 starts nothing on a hybrid host.
    pub(super) fn to_detach(&self) -> Option<&Path> {
        self.v2.as_deref().filter(|_| !self.v1.is_empty())
    }

    /// Is there a controller for this limit, and may we use it? `Err` says what is missing.
    pub(super) fn can(&self, limit: Limit) -> Result<(), String> {
        let name = limit.controller();
        if let Some((_, at)) = self.v1.iter().find(|(names, _)| names.iter().any(|n| n == name)) {
            return writable(at).then_some(()).ok_or_else(|| format!("{} is not writable here", at.display()));
        }
        let Some(v2) = self.v2.as_ref().filter(|_| self.v1.is_empty()) else {
            return Err(format!("this host has no {name} controller mounted"));
        };
        let have = fs::read_to_string(v2.join("cgroup.controllers")).unwrap_or_default();
        if !have.split_whitespace().any(|n| n == name) {
            return Err(format!("the {name} controller is not in {}/cgroup.controllers", v2.display()));
        }
        writable(v2).then_some(()).ok_or_else(|| format!("{} is not writable here", v2.display()))
    }

    /// The limits of `spec` that cannot be set, each with its reason.
    pub(super) fn warnings(&self, spec: &MachineSpec) -> Vec<Warning> {
        let wanted = [
            (spec.cpus.map(|c| format!("cpus={c}")), Limit::Cpu),
            (spec.memory.map(|m| format!("memory={m}")), Limit::Memory),
            (spec.pids.map(|p| format!("pids={p}")), Limit::Pids),
        ];
        let unmet = wanted.into_iter().filter_map(|(what, limit)| Some((what?, self.can(limit).err()?)));
        unmet.map(|(what, why)| Warning(format!("the limit {what} does not hold: {why}"))).collect()
    }

    /// Makes the runtime's moving of a process into groups quick, which otherwise takes a third of the whole boot.
    ///
    /// A write to any `cgroup.procs` waits until every processor has passed through the scheduler (16 ms, measured),
    /// unless another such write was a moment ago: the kernel's `cgroup_threadgroup_rwsem` stays prepared for a while.
    /// So this does one ahead of the runtime's, beside all that comes before it. It changes nothing: this process goes
    /// into the group where it is. Where that cannot be, the boot is as slow as it was.
    pub(super) fn hurry(&self) {
        let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        if let Some(group) = self.group_in(&own) {
            let _ = fs::write(group.join("cgroup.procs"), std::process::id().to_string());
        }
    }

    /// One of the groups that /proc/self/cgroup names.
    fn group_in(&self, text: &str) -> Option<PathBuf> {
        text.lines().find_map(|line| {
            let (_, rest) = line.split_once(':')?;
            let (controllers, path) = rest.split_once(':')?;
            let root = if controllers.is_empty() {
                self.v2.as_ref()?
            } else {
                &self.v1.iter().find(|(names, _)| controllers.split(',').any(|c| names.iter().any(|n| n == c)))?.1
            };
            // Outside of what this namespace shows, there are such.
            let path = path.strip_prefix('/').filter(|path| path.split('/').all(|part| part != ".."))?;
            Some(root.join(path))
        })
    }

    /// The group's path as the runtime wants it (`linux.cgroupsPath`).
    pub(super) fn path_for(name: &str) -> String {
        format!("/{PARENT}/{name}")
    }

    /// The group's directories, those that exist.
    pub(super) fn dirs(&self, name: &str) -> Vec<PathBuf> {
        let roots = self.v1.iter().map(|(_, at)| at).chain(&self.v2);
        let mut dirs: Vec<_> = roots.map(|at| at.join(PARENT).join(name)).filter(|d| d.is_dir()).collect();
        dirs.sort();
        dirs.dedup();
        dirs
    }

    fn dir_of(&self, controller: &str, name: &str) -> Option<PathBuf> {
        let v1 = self.v1.iter().find(|(names, _)| names.iter().any(|n| n == controller)).map(|(_, at)| at);
        let root = v1.or(self.v2.as_ref())?;
        Some(root.join(PARENT).join(name)).filter(|d| d.is_dir())
    }

    /// What the group uses; zero where there is no controller to tell.
    pub(super) fn usage(&self, name: &str) -> Usage {
        let mut usage = Usage::default();
        if let Some(dir) = self.dir_of("cpuacct", name).filter(|d| d.join("cpuacct.usage").exists()) {
            usage.cpu_micros = number(&dir.join("cpuacct.usage")) / 1000;
        } else if let Some(dir) = self.dir_of("cpu", name) {
            let text = fs::read_to_string(dir.join("cpu.stat")).unwrap_or_default();
            let value = text.lines().find_map(|l| l.strip_prefix("usage_usec "));
            usage.cpu_micros = value.and_then(|v| v.trim().parse().ok()).unwrap_or(0);
        }
        if let Some(dir) = self.dir_of("memory", name) {
            usage.memory = number(&dir.join("memory.usage_in_bytes")).max(number(&dir.join("memory.current")));
            usage.memory_peak = number(&dir.join("memory.max_usage_in_bytes")).max(number(&dir.join("memory.peak")));
        }
        if let Some(dir) = self.dir_of("pids", name) {
            usage.pids = number(&dir.join("pids.current"));
        }
        usage
    }

    /// The file that freezes the group, if there is one.
    pub(super) fn freezer(&self, name: &str) -> Option<PathBuf> {
        let file = match self.v1.iter().find(|(names, _)| names.iter().any(|n| n == "freezer")) {
            Some((_, at)) => at.join(PARENT).join(name).join("freezer.state"),
            None => self.v2.as_ref()?.join(PARENT).join(name).join("cgroup.freeze"),
        };
        file.exists().then_some(file)
    }

    /// Freezes or thaws the group. `Ok(false)`: there is no freezer, or no group in it.
    pub(super) fn freeze(&self, name: &str, frozen: bool) -> io::Result<bool> {
        let Some(file) = self.freezer(name) else { return Ok(false) };
        if file.ends_with("freezer.state") {
            let word = if frozen { "FROZEN" } else { "THAWED" };
            fs::write(&file, word)?;
            return settled(|| Ok(fs::read_to_string(&file)?.trim() == word));
        }
        fs::write(&file, if frozen { "1" } else { "0" })?;
        let want = format!("frozen {}", u8::from(frozen));
        let events = file.with_file_name("cgroup.events");
        settled(|| Ok(fs::read_to_string(&events)?.lines().any(|l| l == want)))
    }

    /// Kills every process in the group, also one that was left by a start that the daemon did not live to see. They
    /// may still be ending when this returns.
    pub(super) fn kill(&self, name: &str) -> io::Result<()> {
        let dirs = self.dirs(name);
        if dirs.is_empty() {
            return Ok(());
        }
        if let Some(kill) = dirs.iter().map(|d| d.join("cgroup.kill")).find(|f| f.exists()) {
            fs::write(kill, "1")?;
        }
        // v1 has no such file: freeze, so that nothing forks meanwhile, signal all, thaw (a frozen task of v1 dies only
        // when it thaws).
        let mut pids: Vec<u32> = dirs.iter().flat_map(|d| processes(d)).collect();
        if pids.is_empty() {
            return Ok(());
        }
        let frozen = self.freeze(name, true).unwrap_or(false);
        pids.extend(dirs.iter().flat_map(|d| processes(d)));
        pids.sort_unstable();
        pids.dedup();
        for pid in pids {
            if let Some((fd, _)) = super::process::open_pid(pid)? {
                // The pid was read before it was pinned: only what is in the group now is the machine's.
                if dirs.iter().any(|d| processes(d).contains(&pid)) {
                    super::process::kill(std::os::fd::AsFd::as_fd(&fd))?;
                }
            }
        }
        if frozen {
            self.freeze(name, false)?;
        }
        Ok(())
    }

    /// Kills what is in the group and removes it from every hierarchy.
    pub(super) fn remove(&self, name: &str) -> io::Result<()> {
        let deadline = Instant::now() + RMDIR_LIMIT;
        loop {
            let mut busy = None;
            for dir in self.dirs(name) {
                if let Err(e) = remove_tree(&dir) {
                    busy = Some(io::Error::new(e.kind(), format!("{}: {e}", dir.display())));
                }
            }
            let Some(error) = busy else { return Ok(()) };
            if Instant::now() > deadline {
                return Err(error);
            }
            self.kill(name)?;
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// Waits a little for the kernel to carry out what was written; the answer is whether it did.
fn settled(mut done: impl FnMut() -> io::Result<bool>) -> io::Result<bool> {
    let deadline = Instant::now() + Duration::from_secs(2);
    while !done()? {
        if Instant::now() > deadline {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the freezer did not settle"));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(true)
}

/// Groups are empty but for groups: their files cannot be unlinked, and need not be.
fn remove_tree(dir: &Path) -> io::Result<()> {
    let gone = |r: io::Result<()>| match r {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    };
    match fs::read_dir(dir) {
        Ok(entries) => {
            for entry in entries {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    remove_tree(&entry.path())?;
                }
            }
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e),
    }
    gone(fs::remove_dir(dir))
}

fn processes(dir: &Path) -> Vec<u32> {
    let text = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    // 0 stands for a process of another pid namespace, which cannot be ours.
    text.lines().filter_map(|l| l.parse().ok()).filter(|pid| *pid != 0).collect()
}

fn number(file: &Path) -> u64 {
    fs::read_to_string(file).ok().and_then(|t| t.trim().parse().ok()).unwrap_or(0)
}

fn writable(dir: &Path) -> bool {
    rustix::fs::access(dir, rustix::fs::Access::WRITE_OK).is_ok() && dir != Path::new("") && !read_only(dir)
}

fn read_only(dir: &Path) -> bool {
    rustix::fs::statvfs(dir).is_ok_and(|s| s.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY))
}

/// Does the host have v2 alone, where it belongs?
pub(super) fn is_unified() -> bool {
    Path::new(UNIFIED).join("cgroup.controllers").exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_are_told_apart() {
        let v2 = Cgroups::parse("cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0\n");
        assert_eq!((v2.layout(), v2.to_detach()), ("unified", None));
        let v1 = "cgroup /sys/fs/cgroup/cpu cgroup rw,relatime,cpu,cpuacct 0 0\n";
        assert_eq!(Cgroups::parse(v1).layout(), "legacy");
        assert_eq!(Cgroups::parse(v1).v1[0].0, ["cpu", "cpuacct"]);
        let both = Cgroups::parse(&format!("{v1}cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n"));
        assert_eq!((both.layout(), both.to_detach()), ("hybrid", Some(Path::new("/sys/fs/cgroup/unified"))));
        assert_eq!(Cgroups::parse("").layout(), "none");
    }

    #[test]
    fn a_process_is_found_in_its_own_group() {
        let v2 = Cgroups::parse("cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n");
        assert_eq!(v2.group_in("0::/a/b\n"), Some("/sys/fs/cgroup/a/b".into()));
        assert_eq!(v2.group_in("0::/../b\n"), None, "outside of the namespace");
        assert_eq!(v2.group_in(""), None);
        let v1 = Cgroups::parse("cgroup /sys/fs/cgroup/cpu cgroup rw,relatime,cpu,cpuacct 0 0\n");
        assert_eq!(v1.group_in("9:pids:/x\n2:cpu,cpuacct:/\n0::/y\n"), Some("/sys/fs/cgroup/cpu/".into()));
    }
}
