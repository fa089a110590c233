//! What outlives the daemon: machines, their configuration, jobs and logs, in SQLite.
//!
//! One thread owns the connection. Writes are handed to it as closures and run in order; those that have queued up
//! meanwhile share one transaction, so that a durable commit (about 0.7 ms) is paid once for all of them.

use super::error::MachineError;
use super::store_more::{SCHEMA as SECOND, put_var, vars};
use super::vars::VarRow;
use rusqlite::{Connection, OptionalExtension, params};
use std::path::Path;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

/// The layout of the tables; a database of another number is refused.
const SCHEMA_VERSION: i64 = 2;

const SCHEMA: &str = "
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

type Work = Box<dyn FnOnce(&Connection) -> Result<(), MachineError> + Send>;
type Done = Box<dyn FnOnce(Result<(), MachineError>) + Send>;

/// The handle to the thread that owns the database. Cheap to clone.
#[derive(Clone)]
pub struct Store {
    queue: mpsc::Sender<(Work, Option<Done>)>,
}

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
    /// Its text.
    pub command: Vec<u8>,
    /// Its name, if it has one beside the number.
    pub name: Option<String>,
}

/// Which log a line belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum LogKind {
    /// `events`.
    Event = 1,
    /// `errors`.
    Error = 2,
    /// `history`.
    History = 3,
}

impl Store {
    /// Opens or makes the database and starts its thread, which ends when the last handle is gone.
    ///
    /// # Errors
    /// The file cannot be opened, is not ours, or is of another version.
    pub fn open(path: &Path) -> Result<(Store, JoinHandle<()>), MachineError> {
        let db = Connection::open(path)
            .map_err(|error| MachineError::internal(format!("cannot open {}: {error}", path.display())))?;
        db.busy_timeout(Duration::from_secs(5))?;
        db.pragma_update(None, "journal_mode", "WAL")?;
        // NORMAL survives a crash of the daemon entirely; a power cut may lose the last commits, never consistency.
        db.pragma_update(None, "synchronous", "NORMAL")?;
        let version: i64 = db.pragma_query_value(None, "user_version", |row| row.get(0))?;
        match version {
            0 => {
                db.execute_batch(&format!("BEGIN; {SCHEMA} {SECOND} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"))?;
            }
            1 => {
                db.execute_batch(&format!("BEGIN; {SECOND} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"))?;
            }
            SCHEMA_VERSION => {}
            other => {
                return Err(MachineError::invalid(format!(
                    "{} has layout {other}, this build knows {SCHEMA_VERSION}: use the machinefs that made it, or another \
                     --state-dir",
                    path.display()
                )));
            }
        }
        let (queue, work) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("store".into())
            .spawn(move || run(&db, &work))
            .map_err(|error| MachineError::internal(format!("cannot start the store's thread: {error}")))?;
        Ok((Store { queue }, thread))
    }

    /// Queues a write; nobody waits for it. A failure is logged loudly.
    pub fn write(&self, work: impl FnOnce(&Connection) -> Result<(), MachineError> + Send + 'static) {
        self.send(Box::new(work), None);
    }

    /// Queues a write; `done` is called on the store's thread once it (and all before it) is durable.
    pub fn write_then(
        &self,
        work: impl FnOnce(&Connection) -> Result<(), MachineError> + Send + 'static,
        done: impl FnOnce(Result<(), MachineError>) + Send + 'static,
    ) {
        self.send(Box::new(work), Some(Box::new(done)));
    }

    /// Runs a query on the store's thread and waits for it. Not for the threads that read requests.
    ///
    /// # Errors
    /// Those of the query.
    pub fn query<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> Result<T, MachineError> + Send + 'static,
    ) -> Result<T, MachineError> {
        let (send, receive) = mpsc::channel();
        self.write(move |db| {
            // The asker may have gone; then nobody wants the answer.
            let _ = send.send(work(db));
            Ok(())
        });
        receive.recv().map_err(|_| MachineError::internal("the store's thread has ended"))?
    }

    /// Waits until everything queued so far is durable.
    pub async fn flush(&self) {
        let (send, receive) = tokio::sync::oneshot::channel();
        self.write_then(
            |_| Ok(()),
            move |_| {
                let _ = send.send(());
            },
        );
        let _ = receive.await;
    }

    fn send(&self, work: Work, done: Option<Done>) {
        if let Err(mpsc::SendError((_, Some(done)))) = self.queue.send((work, done)) {
            done(Err(MachineError::internal("the store's thread has ended")));
        }
    }
}

fn run(db: &Connection, queue: &mpsc::Receiver<(Work, Option<Done>)>) {
    while let Ok(first) = queue.recv() {
        let mut finished: Vec<(Result<(), MachineError>, Option<Done>)> = Vec::new();
        let begun = db.execute_batch("BEGIN");
        let mut next = Some(first);
        while let Some((work, done)) = next {
            // Each write stands alone: one that fails is undone without the others.
            let result = begun
                .as_ref()
                .map_err(|error| MachineError::internal(format!("the state database: {error}")))
                .and_then(|()| {
                    db.execute_batch("SAVEPOINT one")?;
                    let result = work(db);
                    let end = if result.is_ok() { "RELEASE one" } else { "ROLLBACK TO one; RELEASE one" };
                    db.execute_batch(end)?;
                    result
                });
            finished.push((result, done));
            next = if finished.len() < 256 { queue.try_recv().ok() } else { None };
        }
        let committed = if begun.is_ok() { db.execute_batch("COMMIT") } else { Ok(()) };
        if committed.is_err() {
            let _ = db.execute_batch("ROLLBACK");
        }
        for (result, done) in finished {
            let result = result.and_then(|()| {
                committed
                    .as_ref()
                    .copied()
                    .map_err(|error| MachineError::no_space(format!("the state database cannot be written: {error}")))
            });
            if let Err(error) = &result {
                tracing::error!(%error, "a change could not be written down");
            }
            if let Some(done) = done {
                done(result);
            }
        }
    }
}

/// Inserts a machine and gives its slot.
pub fn insert_machine(db: &Connection, row: &MachineRow) -> Result<u32, MachineError> {
    db.prepare_cached(
        "INSERT INTO machine (name, uid, gid, created_ms, state, uid_slot, template) VALUES (?, ?, ?, ?, ?, ?, ?)",
    )?
    .execute(params![row.name, row.uid, row.gid, row.created_ms, row.state, row.uid_slot, row.template])?;
    let slot = u32::try_from(db.last_insert_rowid())
        .ok()
        .filter(|slot| *slot < super::templates::FIRST_SLOT)
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

/// Writes down a machine's state.
pub fn set_state(db: &Connection, slot: u32, state: &str) -> Result<(), MachineError> {
    db.prepare_cached("UPDATE machine SET state = ? WHERE slot = ?")?.execute(params![state, slot])?;
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
    Ok(())
}

/// All machines, those in `destroyed` (to be torn down) too.
pub fn machines(db: &Connection) -> Result<Vec<MachineRow>, MachineError> {
    let mut rows: Vec<MachineRow> = db
        .prepare("SELECT slot, name, uid, gid, created_ms, state, uid_slot, template, idle, jobs, job_ms FROM machine ORDER BY slot")?
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

/// The configuration of a machine or template.
pub fn config(db: &Connection, slot: u32) -> Result<Vec<(String, String)>, MachineError> {
    let rows = db
        .prepare_cached("SELECT key, value FROM config WHERE slot = ?")?
        .query_map(params![slot], |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect::<Result<_, _>>()?;
    Ok(rows)
}

/// Inserts or replaces a job.
pub fn put_job(db: &Connection, slot: u32, row: &JobRow) -> Result<(), MachineError> {
    db.prepare_cached(
        "INSERT OR REPLACE INTO job (slot, number, uid, created_ms, started_ms, ended_ms, end, cpu_micros, max_rss_kib, \
         command, name) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
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
        row.name
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
            "SELECT number, uid, created_ms, started_ms, ended_ms, end, cpu_micros, max_rss_kib, command, name FROM job \
             WHERE slot = ? ORDER BY number",
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

/// The last lines of a log, oldest first; older ones are dropped from the database.
pub fn load_log(db: &Connection, slot: u32, kind: LogKind, most: u32) -> Result<Vec<String>, MachineError> {
    let oldest: Option<i64> = db
        .prepare_cached("SELECT seq FROM log WHERE slot = ? AND kind = ? ORDER BY seq DESC LIMIT 1 OFFSET ?")?
        .query_row(params![slot, kind as u8, most], |row| row.get(0))
        .optional()?;
    if let Some(seq) = oldest {
        db.execute("DELETE FROM log WHERE slot = ? AND kind = ? AND seq <= ?", params![slot, kind as u8, seq])?;
    }
    let lines = db
        .prepare_cached("SELECT line FROM log WHERE slot = ? AND kind = ? ORDER BY seq")?
        .query_map(params![slot, kind as u8], |row| row.get(0))?
        .collect::<Result<_, _>>()?;
    Ok(lines)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn row(name: &str) -> MachineRow {
        MachineRow {
            slot: 0,
            name: name.into(),
            uid: 1000,
            gid: 1000,
            created_ms: 1,
            state: "creating".into(),
            uid_slot: 1,
            config: vec![("memory".into(), "1G".into())],
            template: "default".into(),
            idle: false,
            jobs: (0, 0),
            vars: Vec::new(),
        }
    }

    #[test]
    fn what_is_written_is_there_after_a_restart_and_numbers_are_not_used_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.db");
        let (store, thread) = Store::open(&path).unwrap();
        let first = store.query(|db| insert_machine(db, &row("a"))).unwrap();
        store.write(move |db| delete_machine(db, first));
        let second = store.query(|db| insert_machine(db, &row("b"))).unwrap();
        assert!(second > first);
        store.write(move |db| append_log(db, second, LogKind::Event, "one"));
        drop(store);
        thread.join().unwrap();

        let (store, _thread) = Store::open(&path).unwrap();
        let rows = store.query(machines).unwrap();
        assert_eq!(rows.len(), 1);
        assert_eq!((rows[0].slot, rows[0].config.len()), (second, 1));
        let lines = store.query(move |db| load_log(db, second, LogKind::Event, 10)).unwrap();
        assert_eq!(lines, ["one"]);
    }

    #[test]
    fn a_write_that_fails_is_undone_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (store, _thread) = Store::open(&dir.path().join("state.db")).unwrap();
        let (send, receive) = mpsc::channel();
        store.write(|db| insert_machine(db, &row("kept")).map(drop));
        store.write_then(
            |db| {
                insert_machine(db, &row("undone"))?;
                Err(MachineError::internal("on purpose"))
            },
            move |result| send.send(result.is_err()).unwrap(),
        );
        assert!(receive.recv().unwrap());
        let names: Vec<String> = store.query(machines).unwrap().into_iter().map(|row| row.name).collect();
        assert_eq!(names, ["kept"]);
    }

    #[test]
    fn the_first_layout_is_taken_over() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.db");
        let old = Connection::open(&path).unwrap();
        old.execute_batch(&format!("{SCHEMA} PRAGMA user_version = 1;")).unwrap();
        let insert =
            "INSERT INTO machine (name, uid, gid, created_ms, state, uid_slot) VALUES ('a', 1, 1, 1, 'stopped', 0)";
        old.execute(insert, []).unwrap();
        drop(old);
        let (store, _thread) = Store::open(&path).unwrap();
        let rows = store.query(machines).unwrap();
        assert_eq!((rows[0].name.as_str(), rows[0].template.as_str(), rows[0].idle), ("a", "default", false));
    }

    #[test]
    fn another_layout_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.db");
        Connection::open(&path).unwrap().pragma_update(None, "user_version", 99).unwrap();
        let error = Store::open(&path).err().unwrap();
        assert!(error.to_string().contains("--state-dir"), "{error}");
    }
}
