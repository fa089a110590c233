//! `.sys/metrics`: counters of the service, in the text form of OpenMetrics 1.0.

use super::registry::Registry;
use super::state::State;
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};

/// A family of metrics.
struct Family {
    name: &'static str,
    kind: &'static str,
    unit: &'static str,
    help: &'static str,
    /// Suffix, labels and value of each sample.
    samples: Vec<(&'static str, String, String)>,
}

fn gauge(name: &'static str, unit: &'static str, help: &'static str, value: String) -> Family {
    Family { name, kind: "gauge", unit, help, samples: vec![("", String::new(), value)] }
}

fn counter(name: &'static str, unit: &'static str, help: &'static str, value: String) -> Family {
    Family { name, kind: "counter", unit, help, samples: vec![("_total", String::new(), value)] }
}

fn text(families: &[Family]) -> String {
    let mut text = String::new();
    for Family { name, kind, unit, help, samples } in families {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "# TYPE {name} {kind}");
        if !unit.is_empty() {
            let _ = writeln!(text, "# UNIT {name} {unit}");
        }
        let _ = writeln!(text, "# HELP {name} {help}");
        for (suffix, labels, value) in samples {
            let _ = writeln!(text, "{name}{suffix}{labels} {value}");
        }
    }
    text.push_str("# EOF\n");
    text
}

impl Registry {
    /// Counters, as OpenMetrics text. Numbers are fixed-width, so that a size asked for before a read is right.
    pub fn metrics_text(&self) -> String {
        let machines = self.list();
        let states: Vec<State> = machines.iter().map(|machine| machine.state()).collect();
        let by_state = State::ALL.into_iter().filter(|state| *state != State::Destroyed).map(|state| {
            let count = states.iter().filter(|other| **other == state).count();
            ("", format!("{{state=\"{state}\"}}"), format!("{count:06}"))
        });
        let unfinished: usize = machines.iter().map(|machine| machine.jobs().unfinished()).sum();
        let resting = machines.iter().filter(|machine| machine.is_idle()).count();
        let memory = machines.iter().filter_map(|machine| machine.share().memory).fold(0, u64::saturating_add);
        let counters = &self.shared.counters;
        let count = |counter: &AtomicU64| format!("{:012}", counter.load(Ordering::Relaxed));
        let millis = counters.job_millis.load(Ordering::Relaxed);
        let uptime = self.started().elapsed().map_or(0, |time| time.as_secs());
        text(&[
            Family {
                name: "machinefs_machines",
                kind: "gauge",
                unit: "",
                help: "Machines by state.",
                samples: by_state.collect(),
            },
            gauge("machinefs_machines_resting", "", "Machines that nobody used for long.", format!("{resting:06}")),
            gauge(
                "machinefs_memory_limit_bytes",
                "bytes",
                "Sum of the machines' memory limits.",
                format!("{memory:020}"),
            ),
            gauge("machinefs_jobs_unfinished", "", "Jobs that have not ended.", format!("{unfinished:06}")),
            counter("machinefs_machines_made", "", "Machines made.", count(&counters.created)),
            counter("machinefs_machines_refused", "", "Machines that were not made.", count(&counters.refused)),
            counter("machinefs_boots_failed", "", "Boots that failed.", count(&counters.failed_boots)),
            counter("machinefs_jobs_ended", "", "Jobs that ended.", count(&counters.jobs)),
            counter(
                "machinefs_jobs_run_seconds",
                "seconds",
                "Time that they ran.",
                format!("{:012}.{:03}", millis / 1000, millis % 1000),
            ),
            counter(
                "machinefs_events",
                "",
                "Events since the state directory was made.",
                format!("{:012}", self.last_event()),
            ),
            gauge("machinefs_uptime_seconds", "seconds", "Time since the daemon started.", format!("{uptime:010}")),
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_the_ends_of_names_and_counters_are_totals() {
        let text = text(&[gauge("a_bytes", "bytes", "A.", "1".into()), counter("b", "", "B.", "2".into())]);
        assert_eq!(
            text,
            "# TYPE a_bytes gauge\n# UNIT a_bytes bytes\n# HELP a_bytes A.\na_bytes 1\n# TYPE b counter\n# HELP b \
             B.\nb_total 2\n# EOF\n"
        );
    }
}
