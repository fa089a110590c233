//! A control group for each job, where the agent may make some: no process gets out of that by leaving its session, its
//! parents or its environment. See cgroups(7); this is version 2 only.

use super::read_bounded;
use parking_lot::Mutex;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Begins the name of every group made here.
const PREFIX: &str = "machinefs.job-";
/// How deep groups that a job has made in its own are looked at.
const MAX_DEPTH: u32 = 8;
/// Longest list of processes, in bytes.
const MAX_LIST: u64 = 4 * 1024 * 1024;

/// Where groups are made.
#[derive(Debug, Default)]
pub struct Groups {
    /// The agent's own group; `None`: none can be made.
    own: Option<PathBuf>,
    /// Groups of jobs that are gone, with processes that were left in them.
    leftover: Mutex<Vec<PathBuf>>,
}

/// The group of a job. It is removed with the value, or when the last process in it has ended.
#[derive(Debug)]
pub struct Group {
    path: PathBuf,
    groups: Arc<Groups>,
}

impl Groups {
    /// Finds out whether groups can be made: the agent is process 1, and its group is not the system's root and was
    /// given to it.
    pub fn find() -> Arc<Groups> {
        let own = if std::process::id() == 1 { own_group() } else { None };
        let groups = Groups { own, leftover: Mutex::default() };
        if let Some(own) = &groups.own {
            // Those of an earlier life of the agent.
            for entry in std::fs::read_dir(own).into_iter().flatten().flatten() {
                if entry.file_name().to_str().is_some_and(|name| name.starts_with(PREFIX)) {
                    remove(&entry.path());
                }
            }
        }
        Arc::new(groups)
    }

    /// A new group for the job of that number, if there can be one; `id` makes it unique.
    pub fn make(self: &Arc<Self>, number: u64, id: u64) -> Option<Group> {
        self.sweep();
        let path = self.own.as_ref()?.join(format!("{PREFIX}{number}.{id}"));
        std::fs::create_dir(&path).ok()?;
        Some(Group { path, groups: self.clone() })
    }

    /// The group of a job that is gone, if there are still processes in it.
    pub fn leftover(self: &Arc<Self>, number: u64) -> Option<Group> {
        let start = format!("{PREFIX}{number}.");
        let mut leftover = self.leftover.lock();
        let its =
            |path: &PathBuf| path.file_name().and_then(|name| name.to_str()).is_some_and(|n| n.starts_with(&start));
        let at = leftover.iter().position(its)?;
        Some(Group { path: leftover.swap_remove(at), groups: self.clone() })
    }

    /// Removes groups that have become empty.
    pub fn sweep(&self) {
        let old = std::mem::take(&mut *self.leftover.lock());
        let still: Vec<PathBuf> = old.into_iter().filter(|path| !remove(path)).collect();
        self.leftover.lock().extend(still);
    }
}

impl Group {
    /// Who writes "0" to this gets into the group. To be done by a new process itself.
    ///
    /// # Errors
    /// Those of open(2).
    pub fn entry(&self) -> io::Result<File> {
        OpenOptions::new().write(true).custom_flags(libc::O_CLOEXEC).open(self.path.join("cgroup.procs"))
    }

    /// Kills all in it at once, also what is being forked. Whether that could be done.
    pub fn kill(&self) -> bool {
        let file = OpenOptions::new().write(true).open(self.path.join("cgroup.kill"));
        file.is_ok_and(|mut file| file.write_all(b"1").is_ok())
    }

    /// The processes in it and in groups below it.
    pub fn processes(&self) -> Vec<i32> {
        let mut found = Vec::new();
        collect(&self.path, MAX_DEPTH, &mut found);
        found
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if !remove(&self.path) {
            self.groups.leftover.lock().push(self.path.clone());
        }
    }
}

fn own_group() -> Option<PathBuf> {
    let own = read_bounded("/proc/self/cgroup", 64 * 1024).ok()?;
    let own = String::from_utf8(own).ok()?;
    let own = own.lines().find_map(|line| line.strip_prefix("0::"))?;
    ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].into_iter().find_map(|mount| {
        let path = Path::new(mount).join(own.trim_start_matches('/'));
        // The root of all groups has no such file.
        let made = path.join(format!("{PREFIX}probe"));
        remove(&made);
        let usable = path.join("cgroup.kill").exists() && std::fs::create_dir(&made).is_ok();
        usable.then(|| {
            remove(&made);
            path
        })
    })
}

/// Removes a group and those below it, if there is no process in them. Whether it is gone.
fn remove(path: &Path) -> bool {
    fn below(path: &Path, depth: u32) {
        if depth == 0 {
            return;
        }
        for entry in std::fs::read_dir(path).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                below(&entry.path(), depth - 1);
                let _ = std::fs::remove_dir(entry.path());
            }
        }
    }
    if std::fs::remove_dir(path).is_ok() {
        return true;
    }
    below(path, MAX_DEPTH);
    let result = std::fs::remove_dir(path);
    result.is_ok() || result.is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}

fn collect(path: &Path, depth: u32, found: &mut Vec<i32>) {
    let list = read_bounded(path.join("cgroup.procs"), MAX_LIST).unwrap_or_default();
    // Processes of foreign namespaces are shown as 0.
    let list = String::from_utf8_lossy(&list);
    found.extend(list.lines().filter_map(|line| line.parse::<i32>().ok()).filter(|pid| *pid > 0));
    if depth == 0 {
        return;
    }
    for entry in std::fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect(&entry.path(), depth - 1, found);
        }
    }
}
