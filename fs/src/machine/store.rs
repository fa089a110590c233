//! What outlives the daemon: machines, their configuration, jobs and logs, in SQLite.
//!
//! One thread owns the connection. What changes often (states, values, jobs, log lines) is put into [`Changes`], where
//! a newer value takes the place of an older one: however fast somebody makes changes, what waits to be written is
//! bounded, and so is the time until a barrier ([`Store::settled`]) is reached. Other writes are handed over as closures
//! and run in order. All that has come up meanwhile shares one transaction, so that a commit is paid once for all.
//!
//! Changes that cannot be written (the disk is full) are kept and tried again.

mod changes;
mod named;
mod tables;

use super::error::MachineError;
use super::vars::{VarKind, VarRow};
use changes::{Changes, Trims};
pub use named::{TemplateRow, delete_template, put_template, templates, vars};
use parking_lot::Mutex;
use rusqlite::Connection;
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;
pub use tables::{
    JobRow, LogKind, MachineRow, counter, delete_machine, insert_machine, jobs, jobs_counter, load_log, machines,
    set_counter, set_name,
};
use tables::{SCHEMA, SCHEMA_VERSION, SECOND};

/// After a failure the changes are tried again so often.
const RETRY: Duration = Duration::from_secs(1);
/// Writes that share one transaction, at most.
const BATCH: usize = 256;
/// Size the write-ahead log is cut back to after a burst, in bytes.
const WAL_KEPT: i64 = 4 << 20;
/// Pages given back to the file system at once.
const VACUUM_PAGES: u32 = 256;

type Work = Box<dyn FnOnce(&Connection) -> Result<(), MachineError> + Send>;
type Done = Box<dyn FnOnce(Result<(), MachineError>) + Send>;

enum Item {
    /// A write, and who is told of it.
    Work(Work, Option<Done>),
    /// Told when all changes made before are committed.
    Barrier(Done),
    /// There are changes.
    Wake,
}

/// The handle to the thread that owns the database. Cheap to clone.
#[derive(Clone)]
pub struct Store {
    queue: mpsc::Sender<Item>,
    changes: Arc<Mutex<Changes>>,
    fault: Arc<Mutex<Option<String>>>,
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
        // Before the first table: later it takes a VACUUM.
        db.pragma_update(None, "auto_vacuum", "INCREMENTAL")?;
        db.pragma_update(None, "journal_mode", "WAL")?;
        // NORMAL survives a crash of the daemon entirely; a power cut may lose the last commits, never consistency.
        db.pragma_update(None, "synchronous", "NORMAL")?;
        db.pragma_update(None, "journal_size_limit", WAL_KEPT)?;
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
        named::drop_orphans(&db)?;
        let (queue, items) = mpsc::channel();
        let store = Store { queue, changes: Arc::default(), fault: Arc::default() };
        let writer = Writer { db, changes: store.changes.clone(), fault: store.fault.clone(), trims: Trims::default() };
        let thread = std::thread::Builder::new()
            .name("store".into())
            .spawn(move || writer.run(&items))
            .map_err(|error| MachineError::internal(format!("cannot start the store's thread: {error}")))?;
        Ok((store, thread))
    }

    /// Queues a write; nobody waits for it. A failure is logged loudly.
    pub fn write(&self, work: impl FnOnce(&Connection) -> Result<(), MachineError> + Send + 'static) {
        self.send(Item::Work(Box::new(work), None));
    }

    /// Queues a write; `done` is called on the store's thread once it (and all before it) is committed.
    pub fn write_then(
        &self,
        work: impl FnOnce(&Connection) -> Result<(), MachineError> + Send + 'static,
        done: impl FnOnce(Result<(), MachineError>) + Send + 'static,
    ) {
        self.send(Item::Work(Box::new(work), Some(Box::new(done))));
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

    /// Calls `done` on the store's thread once all changes made before are committed, or could not be. In the latter
    /// case they are tried again all the same.
    pub fn settled(&self, done: impl FnOnce(Result<(), MachineError>) + Send + 'static) {
        self.send(Item::Barrier(Box::new(done)));
    }

    /// Waits until everything so far is committed.
    ///
    /// # Errors
    /// It could not be written, and will be tried again.
    pub async fn flush(&self) -> Result<(), MachineError> {
        let (send, receive) = tokio::sync::oneshot::channel();
        self.settled(move |result| {
            let _ = send.send(result);
        });
        receive.await.unwrap_or_else(|_| Err(MachineError::internal("the store's thread has ended")))
    }

    /// Why nothing can be written now.
    pub fn fault(&self) -> Option<String> {
        self.fault.lock().clone()
    }

    /// A machine's state.
    pub fn set_state(&self, slot: u32, state: &'static str) {
        self.change(|changes| changes.set_state(slot, state));
    }

    /// Whether a machine is down because nobody used it.
    pub fn set_idle(&self, slot: u32, idle: bool) {
        self.change(|changes| changes.set_idle(slot, idle));
    }

    /// How many jobs of a machine have ended, ever, and their milliseconds.
    pub fn set_sums(&self, slot: u32, sums: (u64, u64)) {
        self.change(|changes| changes.set_sums(slot, sums));
    }

    /// A value of a machine's or a template's configuration.
    pub fn set_config(&self, slot: u32, key: &str, value: &str) {
        self.change(|changes| changes.set_config(slot, key, Some(value)));
    }

    /// A value of a configuration is taken back.
    pub fn delete_config(&self, slot: u32, key: &str) {
        self.change(|changes| changes.set_config(slot, key, None));
    }

    /// A variable, secret or tag as it is now.
    pub fn put_var(&self, slot: u32, row: VarRow) {
        self.change(|changes| changes.put_var(slot, row));
    }

    /// A variable, secret or tag is forgotten.
    pub fn delete_var(&self, slot: u32, kind: VarKind, id: u32) {
        self.change(|changes| changes.delete_var(slot, kind, id));
    }

    /// A job as it is now.
    pub fn put_job(&self, slot: u32, row: JobRow) {
        self.change(|changes| changes.put_job(slot, row));
    }

    /// A job is forgotten.
    pub fn delete_job(&self, slot: u32, number: u64) {
        self.change(|changes| changes.delete_job(slot, number));
    }

    /// A counter that goes on over restarts; it never goes back.
    pub fn set_counter(&self, name: &str, value: i64) {
        self.change(|changes| changes.set_counter(name, value));
    }

    /// A line for a log; the service's own log is slot 0.
    pub fn log(&self, slot: u32, kind: LogKind, line: &str) {
        self.change(|changes| changes.log(slot, kind, line));
    }

    fn change(&self, make: impl FnOnce(&mut Changes)) {
        let first = {
            let mut changes = self.changes.lock();
            let first = changes.is_empty();
            make(&mut changes);
            first
        };
        if first {
            self.send(Item::Wake);
        }
    }

    fn send(&self, item: Item) {
        if let Err(mpsc::SendError(Item::Work(_, Some(done)) | Item::Barrier(done))) = self.queue.send(item) {
            done(Err(MachineError::internal("the store's thread has ended")));
        }
    }
}

struct Writer {
    db: Connection,
    changes: Arc<Mutex<Changes>>,
    fault: Arc<Mutex<Option<String>>>,
    trims: Trims,
}

impl Writer {
    fn run(mut self, queue: &mpsc::Receiver<Item>) {
        let mut failed = false;
        loop {
            let first = if failed {
                match queue.recv_timeout(RETRY) {
                    Ok(first) => first,
                    Err(mpsc::RecvTimeoutError::Timeout) => Item::Wake,
                    Err(mpsc::RecvTimeoutError::Disconnected) => break,
                }
            } else {
                match queue.recv() {
                    Ok(first) => first,
                    Err(mpsc::RecvError) => break,
                }
            };
            failed = !self.batch(first, queue);
        }
    }

    /// One transaction; whether all changes were committed.
    fn batch(&mut self, first: Item, queue: &mpsc::Receiver<Item>) -> bool {
        let begun = self.db.execute_batch("BEGIN").map_err(MachineError::from);
        let mut state = begun.clone();
        let mut applied = Changes::default();
        let mut finished: Vec<(Result<(), MachineError>, Option<Done>)> = Vec::new();
        let mut next = Some(first);
        let mut count = 0;
        while let Some(item) = next {
            // A write must find what was changed before it was queued.
            if state.is_ok() {
                let changes = std::mem::take(&mut *self.changes.lock());
                if !changes.is_empty() {
                    state = in_savepoint(&self.db, |db| changes.write(db, &mut self.trims));
                    if state.is_ok() {
                        applied.add(changes);
                    } else {
                        self.changes.lock().restore(changes);
                    }
                }
            }
            match item {
                // Each write stands alone: one that fails is undone without the others.
                Item::Work(work, done) => {
                    finished.push((begun.clone().and_then(|()| in_savepoint(&self.db, work)), done));
                }
                Item::Barrier(done) => finished.push((state.clone(), Some(done))),
                Item::Wake => {}
            }
            count += 1;
            next = if count < BATCH { queue.try_recv().ok() } else { None };
        }
        let committed = begun.and_then(|()| {
            self.db
                .execute_batch("COMMIT")
                .map_err(|error| MachineError::no_space(format!("the state database cannot be written: {error}")))
        });
        if committed.is_err() {
            let _ = self.db.execute_batch("ROLLBACK");
            self.changes.lock().restore(applied);
        }
        let outcome = state.and_then(|()| committed.clone());
        self.note(outcome.as_ref().err());
        for (result, done) in finished {
            let result = result.and_then(|()| committed.clone());
            match done {
                Some(done) => done(result),
                None => {
                    if let Err(error) = result {
                        tracing::error!(%error, "a change could not be written down");
                    }
                }
            }
        }
        if outcome.is_ok() && self.trims.take_trimmed() {
            // What was freed goes back to the file system, a little at a time. Failing, it is freed later.
            let _ = self.db.execute_batch(&format!("PRAGMA incremental_vacuum({VACUUM_PAGES})"));
        }
        outcome.is_ok()
    }

    fn note(&self, error: Option<&MachineError>) {
        let mut fault = self.fault.lock();
        match (error, &*fault) {
            (Some(error), None) => tracing::error!(%error, "changes cannot be written down; trying again"),
            (None, Some(_)) => tracing::info!("changes are written down again"),
            _ => {}
        }
        *fault = error.map(|error| format!("{error}; what changes is kept in memory and tried again"));
    }
}

fn in_savepoint(
    db: &Connection,
    work: impl FnOnce(&Connection) -> Result<(), MachineError>,
) -> Result<(), MachineError> {
    db.execute_batch("SAVEPOINT one")?;
    let result = work(db);
    let end = if result.is_ok() { "RELEASE one" } else { "ROLLBACK TO one; RELEASE one" };
    // A full disk may have rolled the whole transaction back already; what the work said is the better reason.
    let ended = db.execute_batch(end);
    result.and(ended.map_err(MachineError::from))
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
        store.log(second, LogKind::Event, "one");
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

    #[test]
    fn logs_and_values_do_not_make_the_database_grow() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.db");
        let (store, thread) = Store::open(&path).unwrap();
        for round in 0..20_000 {
            store.log(1, LogKind::Event, &format!("{round} {}", "x".repeat(1000)));
            store.set_config(1, "workdir", &"y".repeat(4000));
            if round % 50 == 0 {
                // So that lines are written and do not only take each other's place in memory.
                store.query(|_| Ok(())).unwrap();
            }
        }
        let lines = store.query(|db| load_log(db, 1, LogKind::Event, 1000)).unwrap();
        assert_eq!(lines.len(), 1000);
        assert!(lines.last().unwrap().starts_with("19999 "));
        drop(store);
        thread.join().unwrap();
        let size: u64 =
            std::fs::read_dir(dir.path()).unwrap().map(|file| file.unwrap().metadata().unwrap().len()).sum();
        assert!(size < 8 << 20, "{size} bytes");
    }

    #[test]
    fn a_barrier_comes_after_what_was_changed_before_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.db");
        let (store, _thread) = Store::open(&path).unwrap();
        let slot = store.query(|db| insert_machine(db, &row("a"))).unwrap();
        for round in 0..200 {
            let text = format!("/{round}");
            store.set_config(slot, "workdir", &text);
            let (send, receive) = mpsc::channel();
            store.settled(move |result| send.send(result).unwrap());
            receive.recv().unwrap().unwrap();
            // Read by a connection of its own: what is committed.
            let seen: String = Connection::open(&path)
                .unwrap()
                .query_row("SELECT value FROM config WHERE key = 'workdir'", [], |row| row.get(0))
                .unwrap();
            assert_eq!(seen, text);
        }
    }

    #[test]
    fn changes_that_cannot_be_written_are_told_and_tried_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.db");
        let (store, _thread) = Store::open(&path).unwrap();
        let pages: i64 = store.query(|db| Ok(db.pragma_query_value(None, "page_count", |row| row.get(0))?)).unwrap();
        let limit = move |pages: i64| {
            move |db: &Connection| Ok(db.pragma_update_and_check(None, "max_page_count", pages, |_| Ok(()))?)
        };
        store.query(limit(pages)).unwrap();
        store.log(1, LogKind::Event, &"x".repeat(4000));
        for round in 0..50 {
            store.set_config(round, "workdir", &"y".repeat(4000));
        }
        let (send, receive) = mpsc::channel();
        store.settled(move |result| send.send(result).unwrap());
        let error = receive.recv().unwrap().unwrap_err();
        assert_eq!(error.errno(), crate::errno::Errno::ENOSPC);
        assert!(store.fault().is_some());
        store.query(limit(1 << 20)).unwrap();
        // The first answers may be of a try that began before there was room.
        let settled = (0..100).any(|_| {
            let (send, receive) = mpsc::channel();
            store.settled(move |result| send.send(result).unwrap());
            receive.recv().unwrap().is_ok()
        });
        assert!(settled);
        let count: i64 =
            store.query(|db| Ok(db.query_row("SELECT count(*) FROM config", [], |row| row.get(0))?)).unwrap();
        let lines = store.query(|db| load_log(db, 1, LogKind::Event, 10)).unwrap();
        assert_eq!((count, lines.len(), store.fault()), (50, 1, None));
    }
}
