//! What container machines need of a host, and what of that is there: `machinefs check`.

use super::{Inner, cgroup};
use crate::{Finding, Level};
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

/// Free space below which a machine is likely to run out of it, in bytes.
const LITTLE_SPACE: u64 = 1 << 30;

fn finding(subject: &str, level: Level, message: impl Into<String>, remedy: &str) -> Finding {
    let remedy = if level == Level::Ok { "" } else { remedy };
    Finding { subject: subject.into(), level, message: message.into(), remedy: remedy.into() }
}

impl Inner {
    /// One finding for each thing.
    pub(super) fn findings(&self) -> Vec<Finding> {
        let mut all = vec![self.runtime_finding(), self.agent(), overlay(), user_namespaces()];
        match &self.maps {
            None => all.push(self.id_mapped()),
            Some(maps) => {
                all.push(helpers());
                all.push(match maps.has_range() {
                    true => finding("subuid", Level::Ok, format!("{} user numbers a machine", maps.users()), ""),
                    false => finding(
                        "subuid",
                        Level::Limited,
                        "no range in /etc/subuid and /etc/subgid: root is the only user in a machine",
                        "as root: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 USER",
                    ),
                });
            }
        }
        all.extend(self.control_groups());
        all.push(watches());
        all.push(self.space());
        all
    }

    fn runtime_finding(&self) -> Finding {
        let name = self.runtime_name();
        let output = Command::new(&self.options.runtime).arg("--version").stdin(Stdio::null()).output();
        match output {
            Ok(output) if output.status.success() => {
                let text = String::from_utf8_lossy(&output.stdout);
                finding(&name, Level::Ok, text.lines().next().unwrap_or_default(), "")
            }
            Ok(output) => finding(
                &name,
                Level::Missing,
                format!("does not run: {}", String::from_utf8_lossy(&output.stderr).trim()),
                "apt-get install --reinstall crun",
            ),
            Err(e) => finding(&name, Level::Missing, format!("cannot be run: {e}"), "apt-get install crun"),
        }
    }

    fn agent(&self) -> Finding {
        let path = &self.options.agent;
        let remedy = "run scripts/build, which makes it";
        match fs::read(path) {
            Err(e) => finding("agent", Level::Missing, format!("{}: {e}", path.display()), remedy),
            Ok(binary) => match is_static(&binary) {
                Some(true) => finding("agent", Level::Ok, format!("{}, {} bytes", path.display(), binary.len()), ""),
                Some(false) => {
                    let text = format!("{} needs a dynamic linker, which a machine may lack", path.display());
                    finding("agent", Level::Limited, text, remedy)
                }
                None => finding("agent", Level::Missing, format!("{} is no ELF program", path.display()), remedy),
            },
        }
    }

    fn id_mapped(&self) -> Finding {
        let remedy = "the image `host` and root directories need a kernel from 5.12 on and a file system that can be \
                      id-mapped (ext4, xfs, btrfs; not an overlay, so not inside most containers)";
        let made = super::userns::mapped(super::userns::base(0).unwrap_or(1 << 30)).and_then(|userns| {
            let mut stage = super::stage::Stage::default();
            stage.mount_namespace()?;
            stage.attach(Path::new("/usr"), &self.options.run_dir.join("rootfs"), Some(&userns))?;
            self.carry_out(Command::new("true"), stage, None).map_err(|(e, _)| e)
        });
        match made {
            Ok(_) => finding("id-mapped mounts", Level::Ok, "work on /usr", ""),
            Err(e) => finding("id-mapped mounts", Level::Missing, format!("do not work on /usr: {e}"), remedy),
        }
    }

    fn control_groups(&self) -> Vec<Finding> {
        let layout = self.cgroups.layout();
        if self.maps.is_some() {
            let text = "limits are not set for machines of ordinary users";
            return vec![finding("control groups", Level::Limited, text, "run the daemon as root to have limits")];
        }
        let mut all = vec![match layout {
            "none" => {
                finding("control groups", Level::Limited, "none are mounted", "mount -t cgroup2 none /sys/fs/cgroup")
            }
            "unified" if !cgroup::is_unified() => {
                finding("control groups", Level::Limited, "v2 is not at /sys/fs/cgroup", "mount it there")
            }
            _ => finding("control groups", Level::Ok, layout, ""),
        }];
        for (name, limit) in
            [("cpus", cgroup::Limit::Cpu), ("memory", cgroup::Limit::Memory), ("pids", cgroup::Limit::Pids)]
        {
            all.push(match self.cgroups.can(limit) {
                Ok(()) => finding(&format!("limit {name}"), Level::Ok, "can be set", ""),
                Err(why) => finding(
                    &format!("limit {name}"),
                    Level::Limited,
                    format!("cannot be set: {why}"),
                    "enable the controller on the kernel's command line or in the parent group",
                ),
            });
        }
        all
    }

    fn space(&self) -> Finding {
        let dir = &self.options.state_dir;
        match rustix::fs::statvfs(dir) {
            Ok(stat) => {
                let free = stat.f_bavail.saturating_mul(stat.f_frsize);
                let level = if free < LITTLE_SPACE { Level::Limited } else { Level::Ok };
                finding("disk space", level, format!("{} MiB free in {}", free >> 20, dir.display()), "make room there")
            }
            Err(e) => {
                finding("disk space", Level::Missing, format!("{}: {e}", dir.display()), "choose another --state-dir")
            }
        }
    }
}

fn overlay() -> Finding {
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if known.lines().any(|l| l.ends_with("\toverlay")) || Path::new("/sys/module/overlay").exists() {
        return finding("overlay", Level::Ok, "known to the kernel", "");
    }
    finding("overlay", Level::Missing, "the kernel does not know it (yet)", "modprobe overlay")
}

fn user_namespaces() -> Finding {
    let remedy = "sysctl user.max_user_namespaces=10000 (and kernel.unprivileged_userns_clone=1, \
                  kernel.apparmor_restrict_unprivileged_userns=0 where the host has these, for ordinary users)";
    let read = |path: &str| fs::read_to_string(path).ok().and_then(|t| t.trim().parse::<u64>().ok());
    if !Path::new("/proc/self/ns/user").exists() || read("/proc/sys/user/max_user_namespaces") == Some(0) {
        return finding("user namespaces", Level::Missing, "are switched off", remedy);
    }
    if !rustix::process::geteuid().is_root() {
        let closed = read("/proc/sys/kernel/unprivileged_userns_clone") == Some(0)
            || read("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") == Some(1);
        if closed {
            return finding("user namespaces", Level::Missing, "are closed to ordinary users", remedy);
        }
    }
    finding("user namespaces", Level::Ok, "can be made", "")
}

/// newuidmap and newgidmap, which give an ordinary user's namespace its ranges.
fn helpers() -> Finding {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let is_there = |name: &str| std::env::split_paths(&path).any(|dir| dir.join(name).is_file());
    let missing: Vec<_> = ["newuidmap", "newgidmap"].into_iter().filter(|name| !is_there(name)).collect();
    if missing.is_empty() {
        return finding("newuidmap", Level::Ok, "and newgidmap are there", "");
    }
    let text = format!("not in PATH: {}", missing.join(", "));
    finding("newuidmap", Level::Missing, text, "apt-get install uidmap")
}

/// Following the host's files takes a watch for each of their directories.
fn watches() -> Finding {
    let path = "/proc/sys/fs/inotify/max_user_watches";
    let most = fs::read_to_string(path).ok().and_then(|t| t.trim().parse::<u64>().ok()).unwrap_or(0);
    let level = if most < 32768 { Level::Limited } else { Level::Ok };
    finding("inotify watches", level, format!("{most} a user"), "sysctl fs.inotify.max_user_watches=131072")
}

/// Is this ELF program static, that is without an interpreter (elf(5), PT_INTERP)? `None`: no 64-bit little-endian ELF.
fn is_static(binary: &[u8]) -> Option<bool> {
    const PT_INTERP: u32 = 3;
    let u16_at = |at: usize| Some(u16::from_le_bytes(binary.get(at..at + 2)?.try_into().ok()?));
    let u32_at = |at: usize| Some(u32::from_le_bytes(binary.get(at..at + 4)?.try_into().ok()?));
    if binary.get(..6)? != b"\x7fELF\x02\x01" {
        return None;
    }
    let table = usize::try_from(u64::from_le_bytes(binary.get(32..40)?.try_into().ok()?)).ok()?;
    let (size, count) = (usize::from(u16_at(54)?), usize::from(u16_at(56)?));
    let kinds = (0..count).map(|i| u32_at(table.checked_add(i * size)?));
    Some(!kinds.into_iter().any(|kind| kind == Some(PT_INTERP)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn static_programs_are_told_from_others() {
        assert_eq!(is_static(&fs::read("/proc/self/exe").unwrap()), Some(false));
        assert_eq!(is_static(b"#!/bin/sh\n"), None);
        assert_eq!(is_static(b"\x7fELF\x02\x01"), None, "cut short");
    }
}
