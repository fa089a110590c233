//! Event lines: `seq time machine verb key=value…`, one for every change.

use super::store::{self, LogKind, Store};
use super::textlog::TextLog;
use parking_lot::Mutex;
use std::borrow::Cow;
use std::fmt::Write;
use std::time::SystemTime;

/// Bytes of the service's own event log that are kept for readers.
const SERVICE_LOG: usize = 1 << 20;
/// Characters of a value that stand in a line.
const LONGEST_VALUE: usize = 200;

/// A time as all our logs show it: RFC 3339, UTC, milliseconds; always of the same width.
pub fn stamp(time: SystemTime) -> String {
    humantime::format_rfc3339_millis(time).to_string()
}

/// Quotes a value for a log line when it needs it: rc quoting, and no byte that would break the line.
pub fn quote(value: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:@%+,".contains(c);
    if !value.is_empty() && value.chars().all(plain) {
        return value.to_string();
    }
    let mut quoted = String::with_capacity(value.len() + 2);
    quoted.push('\'');
    for c in value.chars() {
        match c {
            '\'' => quoted.push_str("''"),
            c if c.is_control() => quoted.extend(c.escape_default()),
            c => quoted.push(c),
        }
    }
    quoted.push('\'');
    quoted
}

/// A value as a log line has it: a long one is cut, since logs are bounded and a line of them tells what happened.
fn shorten(value: &str) -> Cow<'_, str> {
    match value.char_indices().nth(LONGEST_VALUE) {
        Some((end, _)) => Cow::Owned(format!("{}…", value.get(..end).unwrap_or_default())),
        None => Cow::Borrowed(value),
    }
}

/// Where events go: the service's log, the machine's, and the store.
pub struct Events {
    store: Store,
    all: TextLog,
    next: Mutex<u64>,
}

impl Events {
    /// Goes on after the last event that was written down.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn load(store: Store) -> Result<Events, super::error::MachineError> {
        let (lines, last) =
            store.query(|db| Ok((store::load_log(db, 0, LogKind::Event, 2000)?, store::counter(db, "event")?)))?;
        let all = TextLog::new(SERVICE_LOG);
        for line in lines {
            all.append(format!("{line}\n").as_bytes());
        }
        Ok(Events { store, all, next: Mutex::new(last as u64 + 1) })
    }

    /// The events of all machines.
    pub fn all(&self) -> &TextLog {
        &self.all
    }

    /// The number of the last event.
    pub fn last(&self) -> u64 {
        *self.next.lock() - 1
    }

    /// Says that something happened; `slot` and `log` are the machine's, `machine` its name (`-` for the service).
    pub fn say(&self, slot: u32, machine: &str, log: Option<&TextLog>, verb: &str, details: &[(&str, &str)]) {
        self.say_quietly(slot, machine, log, verb, details);
        self.wake(log);
    }

    /// Wakes the readers of what was said quietly.
    pub fn wake(&self, log: Option<&TextLog>) {
        if let Some(log) = log {
            log.watch().notify();
        }
        self.all.watch().notify();
    }

    /// As [`Events::say`], without waking anybody: for callers that hold a lock.
    pub fn say_quietly(&self, slot: u32, machine: &str, log: Option<&TextLog>, verb: &str, details: &[(&str, &str)]) {
        // The lock is held over the appends: lines stand in the order of their numbers.
        let mut next = self.next.lock();
        let seq = *next;
        *next += 1;
        let mut line = format!("{seq:010} {} {machine} {verb}", stamp(SystemTime::now()));
        for (key, value) in details {
            // Writing to a String cannot fail.
            let _ = write!(line, " {key}={}", quote(&shorten(value)));
        }
        let with_end = format!("{line}\n");
        if let Some(log) = log {
            log.append_quietly(with_end.as_bytes());
        }
        self.all.append_quietly(with_end.as_bytes());
        self.store.set_counter("event", seq as i64);
        if slot != 0 {
            self.store.log(slot, LogKind::Event, &line);
        }
        self.store.log(0, LogKind::Event, &line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_cannot_break_a_line() {
        assert_eq!(quote("running"), "running");
        assert_eq!(quote("it's"), "'it''s'");
        assert_eq!(quote("a\nb"), "'a\\nb'");
        assert_eq!(quote(""), "''");
    }

    #[test]
    fn long_values_are_cut() {
        assert_eq!(shorten("short"), "short");
        assert_eq!(shorten(&"ä".repeat(200)), "ä".repeat(200));
        assert_eq!(shorten(&"ä".repeat(201)), format!("{}…", "ä".repeat(200)));
    }

    #[test]
    fn numbers_go_on_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let (store, _thread) = Store::open(&dir.path().join("s.db")).unwrap();
        let events = Events::load(store.clone()).unwrap();
        events.say(0, "-", None, "started", &[("version", "0.1")]);
        let again = Events::load(store).unwrap();
        again.say(0, "-", None, "started", &[]);
        let text = String::from_utf8(again.all().read_at(0, 1000)).unwrap();
        let numbers: Vec<&str> = text.lines().map(|line| &line[..10]).collect();
        assert_eq!(numbers, ["0000000001", "0000000002"]);
    }
}
