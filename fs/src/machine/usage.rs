//! `usage`: what a machine takes of the host. Numbers are padded with blanks, so that the size that stat shows is that
//! of what is read, and a shell reads them as decimal.

use super::Machine;
use machinefs_backends::Usage;
use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::Ordering;

fn text(usage: &Usage, (jobs, job_millis): (u64, u64), uptime: u64) -> String {
    let mut text = String::new();
    let seconds = |micros: u64| format!("{}.{:06}", micros / 1_000_000, micros % 1_000_000);
    let rows = [
        ("cpu_seconds", seconds(usage.cpu_micros)),
        ("memory_bytes", usage.memory.to_string()),
        ("memory_peak_bytes", usage.memory_peak.to_string()),
        ("processes", usage.pids.to_string()),
        ("disk_bytes", usage.disk.to_string()),
        ("uptime_seconds", uptime.to_string()),
        ("jobs", jobs.to_string()),
        ("job_seconds", format!("{}.{:03}", job_millis / 1000, job_millis % 1000)),
    ];
    for (name, value) in rows {
        // Writing to a String cannot fail. 21 digits hold every u64, with a point.
        let _ = writeln!(text, "{name:17} {value:>22}");
    }
    text
}

impl Machine {
    /// What it uses: asked of the backend, quickly. A machine that is down uses its disk.
    pub fn usage(self: &Arc<Self>, done: Box<dyn FnOnce(String) + Send>) {
        let machine = self.clone();
        self.shared.runtime.spawn(async move {
            let usage = machine.backend().usage(&machine.spec()).await.unwrap_or_default();
            let jobs = *machine.ended_jobs.lock();
            done(text(&usage, jobs, machine.uptime_secs()));
        });
    }

    /// A job has ended.
    pub(super) fn count_job(&self, millis: u64) {
        {
            let mut ended = self.ended_jobs.lock();
            *ended = (ended.0.saturating_add(1), ended.1.saturating_add(millis));
            // Within the lock, so that the newer sum is written last.
            self.shared.store.set_sums(self.slot, *ended);
        }
        let counters = &self.shared.counters;
        counters.jobs.fetch_add(1, Ordering::Relaxed);
        counters.job_millis.fetch_add(millis, Ordering::Relaxed);
    }

    /// Length of [`Machine::usage`], in bytes.
    pub fn usage_size() -> u64 {
        text(&Usage::default(), (0, 0), 0).len() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn its_size_does_not_depend_on_the_numbers() {
        let most = u64::MAX;
        let usage = Usage { cpu_micros: most, memory: most, memory_peak: most, pids: most, disk: most };
        let full = text(&usage, (most, most), most);
        assert_eq!(full.len() as u64, Machine::usage_size());
        assert!(full.lines().all(|line| line.split_whitespace().count() == 2), "{full}");
        assert!(text(&Usage::default(), (3, 1500), 0).contains(" 1.500\n"));
    }
}
