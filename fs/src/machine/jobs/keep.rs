//! Writing a job down that has ended.

use super::super::Machine;
use super::super::error::MachineError;
use super::super::job::Job;
use super::{LONGEST_RETRY, RETRY};
use std::sync::Arc;

/// Writes down a job that has ended, output first. What fails is tried again: until then it is kept in memory.
pub(super) async fn keep(machine: &Arc<Machine>, job: &Arc<Job>) {
    let there = || machine.jobs.get(job.number()).is_some();
    let mut pause = RETRY;
    let mut told = false;
    while there() {
        let saving = job.clone();
        let saved = match tokio::task::spawn_blocking(move || saving.save_log()).await {
            Ok(saved) => saved.map_err(|error| MachineError::no_space(format!("the host's spool: {error}"))),
            Err(_) => return,
        };
        let written = match saved {
            // Put again at each turn: only a row that is there says that the output is.
            Ok(()) if machine.jobs.put(machine, job) => machine.shared.store.flush().await,
            Ok(()) => return,
            Err(error) => Err(error),
        };
        match written {
            Ok(()) => {
                job.set_stored();
                // Only what is safe here may be forgotten there.
                return machine.jobs.forget_there(machine, job);
            }
            Err(error) if !told => {
                told = true;
                let what = format!("job {} cannot be written down yet: {error}", job.number());
                machine.record_error("job", error.errno(), &what, "");
            }
            Err(_) => {}
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_RETRY);
    }
}
