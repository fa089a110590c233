//! The tables of the state database: rows in and out.

use super::super::error::MachineError;
use super::super::templates;
use super::super::vars::VarRow;
use super::named::{put_var, vars};
use rusqlite::{Connection, OptionalExtension, params};

/// The layout of the tables; a database of another number is refused.
pub(super) const SCHEMA_VERSION: i64 = 2;

/// The first layout.
pub(super) const SCHEMA: &str = "
CREATE TABLE machine (
    slot INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL,
    uid INTEGER NOT NULL, gid INTEGER NOT NULL,
    created_ms INTEGER NOT NULL,
    state TEXT NOT NULL,
    uid_slot INTEGER NOT NULL
);
CREATE TABLE config (slot INTEGER NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY (slot, key)) WITHOUT ROWID;
CREATE TABLE job (
    slot INTEGER NOT NULL, number INTEGER NOT NULL,
    uid INTEGER NOT NULL, created_ms INTEGER NOT NULL,
    started_ms INTEGER, ended_ms INTEGER,
    end TEXT, cpu_micros INTEGER NOT NULL DEFAULT 0, max_rss_kib INTEGER NOT NULL DEFAULT 0,
    command BLOB NOT NULL,
    PRIMARY KEY (slot, number)
) WITHOUT ROWID;
CREATE TABLE log (seq INTEGER PRIMARY KEY AUTOINCREMENT, slot INTEGER NOT NULL, kind INTEGER NOT NULL, line TEXT NOT NULL);
CREATE INDEX log_by_machine ON log (slot, kind, seq);
CREATE TABLE counter (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
";

/// What the second layout has beyond the first.
pub(super) const SECOND: &str = "
CREATE TABLE var (
    slot INTEGER NOT NULL, kind INTEGER NOT NULL, id INTEGER NOT NULL,
    name TEXT NOT NULL, value BLOB NOT NULL,
    PRIMARY KEY (slot, kind, id)
) WITHOUT ROWID;
CREATE TABLE template (slot INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, uid INTEGER NOT NULL, gid INTEGER NOT NULL);
ALTER TABLE machine ADD COLUMN template TEXT NOT NULL DEFAULT 'default';
ALTER TABLE machine ADD COLUMN idle INTEGER NOT NULL DEFAULT 0;
ALTER TABLE machine ADD COLUMN jobs INTEGER NOT NULL DEFAULT 0;
ALTER TABLE machine ADD COLUMN job_ms INTEGER NOT NULL DEFAULT 0;
ALTER TABLE job ADD COLUMN name TEXT;
ALTER TABLE job ADD COLUMN setup BLOB;
";

/// A machine as it is written down.
#[derive(Clone, Debug)]
pub struct MachineRow {
    /// Its number, never used again.
    pub slot: u32,
    /// Its name.
    pub name: String,
    /// Its owner.
    pub uid: u32,
    /// Its owner's group.
    pub gid: u32,
    /// Milliseconds since 1970.
    pub created_ms: i64,
    /// The word of its state.
    pub state: String,
    /// Its range of user numbers.
    pub uid_slot: u32,
    /// Its configuration.
    pub config: Vec<(String, String)>,
    /// The template it was made from.
    pub template: String,
    /// It is down because nobody used it.
    pub idle: bool,
    /// Jobs that have ended, ever, and their milliseconds.
    pub jobs: (u64, u64),
    /// Environment, secrets, tags.
    pub vars: Vec<VarRow>,
}

/// A job as it is written down.
#[derive(Clone, Debug)]
pub struct JobRow {
    /// Its number within the machine.
    pub number: u64,
    /// Who gave it.
    pub uid: u32,
    /// Milliseconds since 1970.
    pub created_ms: i64,
    /// When it started, if it did.
    pub started_ms: Option<i64>,
    /// When it ended, if it did.
    pub ended_ms: Option<i64>,
    /// How it ended, as `jobs.rs` writes it.
    pub end: Option<String>,
    /// Processor time, in microseconds.
    pub cpu_micros: i64,
    /// Largest resident size, in KiB.
    pub max_rss_kib: i64,
    /// Its text, or the beginning of one that is in a file.
    pub command: Vec<u8>,
    /// Its name, if it has one beside the number.
    pub name: Option<String>,
    /// How it was set up, as `setup.rs` writes it.
    pub setup: Vec<u8>,
}

/// Which log a line belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum LogKind {
    /// `events`.
    Event = 1,
    /// `errors`.
    Error = 2,
    /// `history`.
    History = 3,
}

/// Inserts a machine and gives its slot.
pub fn insert_machine(db: &Connection, row: &MachineRow) -> Result<u32, MachineError> {
    db.prepare_cached(
        "INSERT INTO machine (name, uid, gid, created_ms, state, uid_slot, template) VALUES (?, ?, ?, ?, ?, ?, ?)",
    )?
    .execute(params![row.name, row.uid, row.gid, row.created_ms, row.state, row.uid_slot, row.template])?;
    let slot = u32::try_from(db.last_insert_rowid())
        .ok()
        .filter(|slot| *slot < templates::FIRST_SLOT)
        .ok_or_else(|| MachineError::limit("all 16 million machine numbers of this state directory are used up"))?;
    for (key, value) in &row.config {
        set_config(db, slot, key, value)?;
    }
    for var in &row.vars {
        put_var(db, slot, var)?;
    }
    Ok(slot)
}

/// Sets or replaces one value of a machine's configuration.
pub fn set_config(db: &Connection, slot: u32, key: &str, value: &str) -> Result<(), MachineError> {
    db.prepare_cached("INSERT OR REPLACE INTO config (slot, key, value) VALUES (?, ?, ?)")?
        .execute(params![slot, key, value])?;
    Ok(())
}

/// Takes a configuration value back.
pub fn delete_config(db: &Connection, slot: u32, key: &str) -> Result<(), MachineError> {
    db.prepare_cached("DELETE FROM config WHERE slot = ? AND key = ?")?.execute(params![slot, key])?;
    Ok(())
}

/// The configuration of a machine or template.
pub fn config(db: &Connection, slot: u32) -> Result<Vec<(String, String)>, MachineError> {
    let rows = db
        .prepare_cached("SELECT key, value FROM config WHERE slot = ?")?
        .query_map(params![slot], |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect::<Result<_, _>>()?;
    Ok(rows)
}

/// Writes down a machine's state.
pub fn set_state(db: &Connection, slot: u32, state: &str) -> Result<(), MachineError> {
    db.prepare_cached("UPDATE machine SET state = ? WHERE slot = ?")?.execute(params![state, slot])?;
    Ok(())
}

/// Writes down whether a machine is down because nobody used it.
pub fn set_idle(db: &Connection, slot: u32, idle: bool) -> Result<(), MachineError> {
    db.prepare_cached("UPDATE machine SET idle = ? WHERE slot = ?")?.execute(params![idle, slot])?;
    Ok(())
}

/// Writes down how many jobs of a machine have ended, and their milliseconds.
pub fn set_sums(db: &Connection, slot: u32, (jobs, millis): (u64, u64)) -> Result<(), MachineError> {
    let number = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
    db.prepare_cached("UPDATE machine SET jobs = ?, job_ms = ? WHERE slot = ?")?.execute(params![
        number(jobs),
        number(millis),
        slot
    ])?;
    Ok(())
}

/// Renames a machine.
pub fn set_name(db: &Connection, slot: u32, name: &str) -> Result<(), MachineError> {
    db.prepare_cached("UPDATE machine SET name = ? WHERE slot = ?")?.execute(params![name, slot])?;
    Ok(())
}

/// Forgets a machine whose resources are gone.
pub fn delete_machine(db: &Connection, slot: u32) -> Result<(), MachineError> {
    for table in ["config", "var", "job", "log", "machine"] {
        db.execute(&format!("DELETE FROM {table} WHERE slot = ?"), params![slot])?;
    }
    db.execute("DELETE FROM counter WHERE name = ?", params![jobs_counter(slot)])?;
    Ok(())
}

/// All machines, those in `destroyed` (to be torn down) too.
pub fn machines(db: &Connection) -> Result<Vec<MachineRow>, MachineError> {
    let mut rows: Vec<MachineRow> = db
        .prepare(
            "SELECT slot, name, uid, gid, created_ms, state, uid_slot, template, idle, jobs, job_ms FROM machine \
             ORDER BY slot",
        )?
        .query_map([], |row| {
            Ok(MachineRow {
                slot: row.get(0)?,
                name: row.get(1)?,
                uid: row.get(2)?,
                gid: row.get(3)?,
                created_ms: row.get(4)?,
                state: row.get(5)?,
                uid_slot: row.get(6)?,
                config: Vec::new(),
                template: row.get(7)?,
                idle: row.get(8)?,
                jobs: (row.get::<_, i64>(9)?.max(0) as u64, row.get::<_, i64>(10)?.max(0) as u64),
                vars: Vec::new(),
            })
        })?
        .collect::<Result<_, _>>()?;
    for row in &mut rows {
        row.config = config(db, row.slot)?;
        row.vars = vars(db, row.slot)?;
    }
    Ok(rows)
}

/// Inserts or replaces a job.
pub fn put_job(db: &Connection, slot: u32, row: &JobRow) -> Result<(), MachineError> {
    db.prepare_cached(
        "INSERT OR REPLACE INTO job (slot, number, uid, created_ms, started_ms, ended_ms, end, cpu_micros, max_rss_kib, \
         command, name, setup) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
    )?
    .execute(params![
        slot,
        row.number as i64,
        row.uid,
        row.created_ms,
        row.started_ms,
        row.ended_ms,
        row.end,
        row.cpu_micros,
        row.max_rss_kib,
        row.command,
        row.name,
        row.setup
    ])?;
    Ok(())
}

/// Forgets a job.
pub fn delete_job(db: &Connection, slot: u32, number: u64) -> Result<(), MachineError> {
    db.prepare_cached("DELETE FROM job WHERE slot = ? AND number = ?")?.execute(params![slot, number as i64])?;
    Ok(())
}

/// The jobs of a machine, in the order of their numbers.
pub fn jobs(db: &Connection, slot: u32) -> Result<Vec<JobRow>, MachineError> {
    let rows = db
        .prepare_cached(
            "SELECT number, uid, created_ms, started_ms, ended_ms, end, cpu_micros, max_rss_kib, command, name, \
             setup FROM job WHERE slot = ? ORDER BY number",
        )?
        .query_map(params![slot], |row| {
            Ok(JobRow {
                number: row.get::<_, i64>(0)? as u64,
                uid: row.get(1)?,
                created_ms: row.get(2)?,
                started_ms: row.get(3)?,
                ended_ms: row.get(4)?,
                end: row.get(5)?,
                cpu_micros: row.get(6)?,
                max_rss_kib: row.get(7)?,
                command: row.get(8)?,
                name: row.get(9)?,
                setup: row.get::<_, Option<Vec<u8>>>(10)?.unwrap_or_default(),
            })
        })?
        .collect::<Result<_, _>>()?;
    Ok(rows)
}

/// Appends a line to a log; the service's own log is slot 0.
pub fn append_log(db: &Connection, slot: u32, kind: LogKind, line: &str) -> Result<(), MachineError> {
    db.prepare_cached("INSERT INTO log (slot, kind, line) VALUES (?, ?, ?)")?
        .execute(params![slot, kind as u8, line])?;
    Ok(())
}

/// Drops the older lines of a log from the database.
pub fn trim_log(db: &Connection, slot: u32, kind: LogKind, most: u32) -> Result<(), MachineError> {
    let oldest: Option<i64> = db
        .prepare_cached("SELECT seq FROM log WHERE slot = ? AND kind = ? ORDER BY seq DESC LIMIT 1 OFFSET ?")?
        .query_row(params![slot, kind as u8, most], |row| row.get(0))
        .optional()?;
    if let Some(seq) = oldest {
        db.prepare_cached("DELETE FROM log WHERE slot = ? AND kind = ? AND seq <= ?")?
            .execute(params![slot, kind as u8, seq])?;
    }
    Ok(())
}

/// The last lines of a log, oldest first; older ones are dropped from the database.
pub fn load_log(db: &Connection, slot: u32, kind: LogKind, most: u32) -> Result<Vec<String>, MachineError> {
    trim_log(db, slot, kind, most)?;
    let lines = db
        .prepare_cached("SELECT line FROM log WHERE slot = ? AND kind = ? ORDER BY seq")?
        .query_map(params![slot, kind as u8], |row| row.get(0))?
        .collect::<Result<_, _>>()?;
    Ok(lines)
}

/// The counter of the numbers of a machine's jobs.
pub fn jobs_counter(slot: u32) -> String {
    format!("jobs/{slot}")
}

/// A counter that goes on over restarts: its value, 0 at first.
pub fn counter(db: &Connection, name: &str) -> Result<i64, MachineError> {
    let value = db.query_row("SELECT value FROM counter WHERE name = ?", params![name], |row| row.get(0)).optional()?;
    Ok(value.unwrap_or(0))
}

/// Writes a counter.
pub fn set_counter(db: &Connection, name: &str, value: i64) -> Result<(), MachineError> {
    db.prepare_cached("INSERT OR REPLACE INTO counter (name, value) VALUES (?, ?)")?.execute(params![name, value])?;
    Ok(())
}
