//! Which jobs there are, by number and by name.

use super::super::job::Job;
use crate::link::Link;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::SystemTime;

/// Finished jobs kept a machine.
const KEEP: usize = 100;
/// Bytes of finished jobs' output kept a machine.
const KEEP_BYTES: u64 = 256 << 20;

pub(super) struct Table {
    pub(super) jobs: BTreeMap<u64, Arc<Job>>,
    /// The newest of each name.
    pub(super) names: BTreeMap<String, u64>,
    pub(super) next: u64,
    /// The agent, when jobs can be given to it.
    pub(super) link: Option<Arc<Link>>,
    pub(super) unfinished: usize,
    pub(super) changed: SystemTime,
    /// Removed jobs that the agent is still to forget.
    pub(super) owed: BTreeSet<u64>,
}

impl Table {
    pub(super) fn insert(&mut self, job: Arc<Job>) {
        if let Some(name) = job.name() {
            self.names.insert(name.to_string(), job.number());
        }
        self.jobs.insert(job.number(), job);
    }

    /// Whether it was there.
    pub(super) fn remove(&mut self, number: u64) -> bool {
        let Some(job) = self.jobs.remove(&number) else { return false };
        if self.goes_by_name(&job) {
            job.name().map(|name| self.names.remove(name));
        }
        true
    }

    /// How many run or wait to, those of a name not counted.
    pub(super) fn unfinished_besides(&self, name: &str) -> usize {
        let named = self.names.get(name).and_then(|number| self.jobs.get(number)).is_some_and(|job| !job.is_done());
        let in_setup = self.jobs.values().filter(|job| job.is_being_set_up()).count();
        self.unfinished.saturating_sub(usize::from(named) + in_setup)
    }

    /// Whether its name is its own, and not a newer one's.
    pub(super) fn goes_by_name(&self, job: &Job) -> bool {
        job.name().is_some_and(|name| self.names.get(name) == Some(&job.number()))
    }
}

/// The oldest finished jobs beyond what is kept.
pub(super) fn surplus(table: &Table) -> Vec<Arc<Job>> {
    let finished: Vec<&Arc<Job>> = table.jobs.values().filter(|job| job.is_done()).collect();
    let (mut count, mut bytes) = (0, 0);
    let mut gone = Vec::new();
    for job in finished.into_iter().rev() {
        count += 1;
        bytes += job.disk();
        if count > KEEP || (bytes > KEEP_BYTES && count > 1) {
            gone.push(job.clone());
        }
    }
    gone
}
