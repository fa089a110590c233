//! Whether the kernel killed processes for want of memory.

use super::read_bounded;
use std::path::PathBuf;

/// The counter of such kills in the machine's control group.
#[derive(Debug)]
pub struct OomKills {
    file: Option<PathBuf>,
}

impl OomKills {
    /// Finds the counter: `memory.events` of cgroup v2 or `memory.oom_control` of v1.
    pub fn find() -> OomKills {
        let groups = read_bounded("/proc/self/cgroup", 64 * 1024).unwrap_or_default();
        let groups = String::from_utf8_lossy(&groups).into_owned();
        let mut files = Vec::new();
        for line in groups.lines() {
            let mut fields = line.splitn(3, ':').skip(1);
            let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
            if controllers.is_empty() {
                for root in ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"] {
                    files.push(format!("{root}{path}/memory.events"));
                    files.push(format!("{root}/memory.events"));
                }
            } else if controllers.split(',').any(|name| name == "memory") {
                files.push(format!("/sys/fs/cgroup/memory{path}/memory.oom_control"));
                files.push("/sys/fs/cgroup/memory/memory.oom_control".to_owned());
            }
        }
        let file = files.into_iter().map(PathBuf::from).find(|file| count(file).is_some());
        OomKills { file }
    }

    /// How many there were; 0 where it cannot be known.
    pub fn count(&self) -> u64 {
        self.file.as_ref().and_then(count).unwrap_or_default()
    }
}

fn count(file: &PathBuf) -> Option<u64> {
    let text = read_bounded(file, 64 * 1024).ok()?;
    parse(&String::from_utf8_lossy(&text))
}

fn parse(text: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    #[test]
    fn both_layouts() {
        assert_eq!(super::parse("low 0\nhigh 0\nmax 9\noom 4\noom_kill 3\noom_group_kill 0\n"), Some(3));
        assert_eq!(super::parse("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"), Some(2));
        assert_eq!(super::parse("oom_kill_disable 0\nunder_oom 0\n"), None);
    }
}
