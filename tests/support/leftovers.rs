//! What a daemon or a machine could leave behind: mounts, processes, cgroups, directories.

use std::path::{Path, PathBuf};

/// Directories of machines in a daemon's state directory.
pub fn machines(state: &Path) -> Vec<PathBuf> {
    let dir = std::fs::read_dir(state.join("machines"));
    dir.map(|entries| entries.flatten().map(|entry| entry.path()).collect()).unwrap_or_default()
}

/// Processes of the host: number and what their /proc file says.
fn processes(file: &str) -> Vec<(u32, String)> {
    let Ok(dir) = std::fs::read_dir("/proc") else { return Vec::new() };
    dir.flatten()
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let bytes = std::fs::read(entry.path().join(file)).ok()?;
            Some((pid, String::from_utf8_lossy(&bytes).replace('\0', " ")))
        })
        .collect()
}

/// Where something is mounted at or below a directory, in this mount namespace; the newest first.
pub fn mounts_below(base: &Path) -> Vec<PathBuf> {
    let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut found: Vec<PathBuf> = text
        .lines()
        .filter_map(|line| line.split(' ').nth(4).map(PathBuf::from))
        .filter(|path| path.starts_with(base))
        .collect();
    found.reverse();
    found
}

/// Takes away what is mounted below a directory, so that removing it does not go into a mount.
pub fn unmount_below(base: &Path) {
    for path in mounts_below(base) {
        let _ = std::process::Command::new("umount").arg("-l").arg(&path).status();
        if mounts_below(&path).contains(&path) {
            let _ = std::process::Command::new("fusermount3").arg("-uz").arg(&path).status();
        }
    }
}

/// Processes that have to do with a path: their command line, or their mounts, name it.
pub fn processes_of(path: &Path) -> Vec<String> {
    let needle = path.to_string_lossy().into_owned();
    let me = std::process::id();
    let mut found = Vec::new();
    for file in ["cmdline", "mountinfo"] {
        for (pid, text) in processes(file) {
            // Everyone sees the mounts of the host's namespace: only other namespaces count here.
            let ours = || {
                std::fs::read_link(format!("/proc/{pid}/ns/mnt")).ok() == std::fs::read_link("/proc/self/ns/mnt").ok()
            };
            if pid != me && text.contains(&needle) && !(file == "mountinfo" && ours()) {
                let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
                found.push(format!("process {pid} ({}) by its {file}", name.trim_end()));
            }
        }
    }
    found
}

/// The directories of a process's cgroups that exist below /sys/fs/cgroup and are not everybody's.
pub fn cgroups_of(pid: u32) -> Vec<PathBuf> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    let own = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let mut found = Vec::new();
    for line in text.lines() {
        if own.lines().any(|other| other == line) {
            continue;
        }
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let path = path.trim_start_matches('/');
        let hierarchy = controllers.trim_start_matches("name=");
        for root in ["".into(), "unified".into(), hierarchy.to_string()] {
            let dir = Path::new("/sys/fs/cgroup").join(root).join(path);
            if !path.is_empty() && dir.is_dir() && !found.contains(&dir) {
                found.push(dir);
            }
        }
    }
    found
}

/// The namespaces of a process that are not ours.
pub fn namespaces_of(pid: u32) -> Vec<PathBuf> {
    let Ok(dir) = std::fs::read_dir(format!("/proc/{pid}/ns")) else { return Vec::new() };
    dir.flatten()
        .filter_map(|entry| {
            let theirs = std::fs::read_link(entry.path()).ok()?;
            let ours = std::fs::read_link(Path::new("/proc/self/ns").join(entry.file_name())).ok()?;
            (theirs != ours).then_some(theirs)
        })
        .collect()
}

/// Processes that live in one of these namespaces.
pub fn processes_in(namespaces: &[PathBuf]) -> Vec<u32> {
    let Ok(dir) = std::fs::read_dir("/proc") else { return Vec::new() };
    dir.flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| namespaces_of(*pid).iter().any(|namespace| namespaces.contains(namespace)))
        .collect()
}

/// What is left of a daemon whose files were below `base`, after some patience for what ends on its own.
pub fn of(base: &Path) -> Vec<String> {
    let look = || {
        let mut found = processes_of(base);
        found.extend(mounts_below(base).iter().map(|path| format!("a mount on {}", path.display())));
        found
    };
    crate::eventually(10, || look().is_empty());
    look()
}
