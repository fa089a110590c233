//! Changes that wait to be written: the newest value of each, and the newest lines of each log.

use super::super::error::MachineError;
use super::super::vars::{VarKind, VarRow};
use super::named;
use super::tables::{self, JobRow, LogKind};
use rusqlite::Connection;
use std::collections::{BTreeMap, HashMap, VecDeque};

/// Lines of a machine's log that are kept.
const LINES: usize = 1000;
/// Lines of the service's own log that are kept.
const SERVICE_LINES: usize = 2000;
/// So many lines of one log are written between two trims of it.
const TRIM_EVERY: usize = 250;
/// Bytes of a line that are written down.
const LONGEST_LINE: usize = 4096;

fn most_lines(slot: u32) -> usize {
    if slot == 0 { SERVICE_LINES } else { LINES }
}

#[derive(Default)]
pub(super) struct Changes {
    states: BTreeMap<u32, &'static str>,
    idle: BTreeMap<u32, bool>,
    sums: BTreeMap<u32, (u64, u64)>,
    /// `None`: it is taken back.
    config: BTreeMap<(u32, String), Option<String>>,
    /// `None`: it is forgotten.
    vars: BTreeMap<(u32, VarKind, u32), Option<VarRow>>,
    /// `None`: it is forgotten.
    jobs: BTreeMap<(u32, u64), Option<JobRow>>,
    counters: BTreeMap<String, i64>,
    logs: BTreeMap<(u32, LogKind), VecDeque<String>>,
}

impl Changes {
    pub fn is_empty(&self) -> bool {
        self.states.is_empty()
            && self.idle.is_empty()
            && self.sums.is_empty()
            && self.config.is_empty()
            && self.vars.is_empty()
            && self.jobs.is_empty()
            && self.counters.is_empty()
            && self.logs.is_empty()
    }

    pub fn set_state(&mut self, slot: u32, state: &'static str) {
        self.states.insert(slot, state);
    }

    pub fn set_idle(&mut self, slot: u32, idle: bool) {
        self.idle.insert(slot, idle);
    }

    pub fn set_sums(&mut self, slot: u32, sums: (u64, u64)) {
        self.sums.insert(slot, sums);
    }

    pub fn set_config(&mut self, slot: u32, key: &str, value: Option<&str>) {
        self.config.insert((slot, key.to_string()), value.map(str::to_string));
    }

    pub fn put_var(&mut self, slot: u32, row: VarRow) {
        self.vars.insert((slot, row.kind, row.id), Some(row));
    }

    pub fn delete_var(&mut self, slot: u32, kind: VarKind, id: u32) {
        self.vars.insert((slot, kind, id), None);
    }

    pub fn put_job(&mut self, slot: u32, row: JobRow) {
        self.jobs.insert((slot, row.number), Some(row));
    }

    pub fn delete_job(&mut self, slot: u32, number: u64) {
        self.jobs.insert((slot, number), None);
    }

    pub fn set_counter(&mut self, name: &str, value: i64) {
        let now = self.counters.entry(name.to_string()).or_insert(value);
        *now = value.max(*now);
    }

    /// Lines that would be dropped again by the next trim are not written at all.
    pub fn log(&mut self, slot: u32, kind: LogKind, line: &str) {
        let mut end = line.len().min(LONGEST_LINE);
        while !line.is_char_boundary(end) {
            end -= 1;
        }
        let lines = self.logs.entry((slot, kind)).or_default();
        lines.push_back(line.get(..end).unwrap_or(line).to_string());
        if lines.len() > most_lines(slot) {
            lines.pop_front();
        }
    }

    /// Writes all of it.
    pub fn write(&self, db: &Connection, trims: &mut Trims) -> Result<(), MachineError> {
        for (slot, state) in &self.states {
            tables::set_state(db, *slot, state)?;
        }
        for (slot, idle) in &self.idle {
            tables::set_idle(db, *slot, *idle)?;
        }
        for (slot, sums) in &self.sums {
            tables::set_sums(db, *slot, *sums)?;
        }
        for ((slot, key), value) in &self.config {
            match value {
                Some(value) => tables::set_config(db, *slot, key, value)?,
                None => tables::delete_config(db, *slot, key)?,
            }
        }
        for ((slot, kind, id), row) in &self.vars {
            match row {
                Some(row) => named::put_var(db, *slot, row)?,
                None => named::delete_var(db, *slot, *kind, *id)?,
            }
        }
        for ((slot, number), row) in &self.jobs {
            match row {
                Some(row) => tables::put_job(db, *slot, row)?,
                None => tables::delete_job(db, *slot, *number)?,
            }
        }
        for (name, value) in &self.counters {
            tables::set_counter(db, name, *value)?;
        }
        for ((slot, kind), lines) in &self.logs {
            for line in lines {
                tables::append_log(db, *slot, *kind, line)?;
            }
            trims.count(db, *slot, *kind, lines.len())?;
        }
        Ok(())
    }

    /// Adds newer changes.
    pub fn add(&mut self, newer: Changes) {
        self.states.extend(newer.states);
        self.idle.extend(newer.idle);
        self.sums.extend(newer.sums);
        self.config.extend(newer.config);
        self.vars.extend(newer.vars);
        self.jobs.extend(newer.jobs);
        for (name, value) in newer.counters {
            self.set_counter(&name, value);
        }
        for ((slot, kind), lines) in newer.logs {
            for line in lines {
                self.log(slot, kind, &line);
            }
        }
    }

    /// Takes older changes back, which could not be written.
    pub fn restore(&mut self, mut older: Changes) {
        older.add(std::mem::take(self));
        *self = older;
    }
}

/// When each log is to be trimmed.
#[derive(Default)]
pub(super) struct Trims {
    written: HashMap<(u32, LogKind), usize>,
    trimmed: bool,
}

impl Trims {
    fn count(&mut self, db: &Connection, slot: u32, kind: LogKind, lines: usize) -> Result<(), MachineError> {
        let written = self.written.entry((slot, kind)).or_default();
        *written += lines;
        if *written >= TRIM_EVERY {
            *written = 0;
            self.trimmed = true;
            tables::trim_log(db, slot, kind, most_lines(slot) as u32)?;
        }
        Ok(())
    }

    /// Whether something was freed since this was asked last.
    pub fn take_trimmed(&mut self) -> bool {
        if self.trimmed && self.written.len() > 10_000 {
            // Logs of machines that are long gone.
            self.written.clear();
        }
        std::mem::take(&mut self.trimmed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_newest_value_waits_and_logs_are_bounded() {
        let mut changes = Changes::default();
        for number in 0..10_000 {
            changes.set_config(1, "workdir", Some(&format!("/{number}")));
            changes.log(1, LogKind::Event, &"x".repeat(10_000));
            changes.set_counter("event", number);
        }
        assert_eq!(changes.config.len(), 1);
        assert_eq!(changes.config[&(1, "workdir".to_string())].as_deref(), Some("/9999"));
        let lines = &changes.logs[&(1, LogKind::Event)];
        assert_eq!(lines.len(), LINES);
        assert!(lines.iter().all(|line| line.len() <= LONGEST_LINE));
    }

    #[test]
    fn what_could_not_be_written_does_not_replace_what_is_newer() {
        let mut older = Changes::default();
        older.set_state(1, "running");
        older.set_state(2, "running");
        older.log(1, LogKind::Event, "first");
        older.set_counter("event", 7);
        let mut now = Changes::default();
        now.set_state(1, "stopped");
        now.log(1, LogKind::Event, "second");
        now.restore(older);
        assert_eq!((now.states[&1], now.states[&2], now.counters["event"]), ("stopped", "running", 7));
        assert_eq!(now.logs[&(1, LogKind::Event)], ["first", "second"]);
    }
}
