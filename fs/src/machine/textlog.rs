//! Logs that grow: `events`, `console`, `errors`, `history`.

use super::watch::Watch;
use parking_lot::Mutex;
use std::sync::Arc;
use std::time::SystemTime;

struct Kept {
    bytes: Vec<u8>,
    /// Bytes that were appended before those that are kept.
    dropped: u64,
    modified: SystemTime,
}

struct Shared {
    limit: usize,
    kept: Mutex<Kept>,
    watch: Watch,
}

/// A bounded text log. Past its limit the older half goes, at a line's end, as with a rotated file: offsets count
/// from what is kept.
#[derive(Clone)]
pub struct TextLog(Arc<Shared>);

impl TextLog {
    /// An empty log that keeps at most `limit` bytes.
    pub fn new(limit: usize) -> TextLog {
        let kept = Kept { bytes: Vec::new(), dropped: 0, modified: SystemTime::now() };
        TextLog(Arc::new(Shared { limit: limit.max(2), kept: Mutex::new(kept), watch: Watch::new() }))
    }

    /// Appends bytes (whole lines, but for a console) and wakes the readers.
    pub fn append(&self, bytes: &[u8]) {
        self.append_quietly(bytes);
        self.0.watch.notify();
    }

    /// Appends under a lock of the caller's; [`TextLog::watch`] is to be notified once that is released, for the
    /// woken may look at what it guards.
    pub fn append_quietly(&self, bytes: &[u8]) {
        let mut kept = self.0.kept.lock();
        kept.bytes.extend_from_slice(bytes);
        kept.modified = SystemTime::now();
        if kept.bytes.len() > self.0.limit {
            let least = kept.bytes.len() - self.0.limit / 2;
            let line_end = kept.bytes[least..].iter().position(|byte| *byte == b'\n').map_or(0, |at| at + 1);
            let gone = least + line_end;
            kept.bytes.drain(..gone);
            kept.bytes.shrink_to(self.0.limit);
            kept.dropped += gone as u64;
        }
    }

    /// Bytes kept.
    pub fn len(&self) -> u64 {
        self.0.kept.lock().bytes.len() as u64
    }

    /// Whether nothing is kept.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Up to `max` bytes from `offset` on; empty at and past the end.
    pub fn read_at(&self, offset: u64, max: usize) -> Vec<u8> {
        let kept = self.0.kept.lock();
        let from = usize::try_from(offset).unwrap_or(usize::MAX).min(kept.bytes.len());
        let to = from.saturating_add(max).min(kept.bytes.len());
        kept.bytes[from..to].to_vec()
    }

    /// When something was last appended.
    pub fn modified(&self) -> SystemTime {
        self.0.kept.lock().modified
    }

    /// Notified at each append.
    pub fn watch(&self) -> &Watch {
        &self.0.watch
    }

    /// A cursor that begins at the current end.
    pub fn follow(&self) -> LogCursor {
        let kept = self.0.kept.lock();
        LogCursor { log: self.clone(), position: kept.dropped + kept.bytes.len() as u64 }
    }
}

/// A private place in a log; outlives rotation.
pub struct LogCursor {
    log: TextLog,
    /// Counted from the log's first byte ever.
    position: u64,
}

impl LogCursor {
    /// The next bytes; empty when there are none yet. A cursor that was overtaken gets a line `dropped N` first, with
    /// the number of bytes it missed.
    pub fn next(&mut self, max: usize) -> Vec<u8> {
        let kept = self.log.0.kept.lock();
        if self.position < kept.dropped {
            let missed = kept.dropped - self.position;
            self.position = kept.dropped;
            return format!("dropped {missed}\n").into_bytes();
        }
        let from = ((self.position - kept.dropped) as usize).min(kept.bytes.len());
        let to = from.saturating_add(max).min(kept.bytes.len());
        self.position += (to - from) as u64;
        kept.bytes[from..to].to_vec()
    }

    /// Whether [`LogCursor::next`] would give something.
    pub fn is_ready(&self) -> bool {
        let kept = self.log.0.kept.lock();
        self.position < kept.dropped + kept.bytes.len() as u64
    }

    /// The log it reads.
    pub fn log(&self) -> &TextLog {
        &self.log
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rotation_drops_whole_lines_and_tells_the_cursor() {
        let log = TextLog::new(100);
        let mut cursor = log.follow();
        for number in 0..40 {
            log.append(format!("line {number:03}\n").as_bytes());
        }
        assert!(log.len() <= 100);
        assert!(log.read_at(0, 5).starts_with(b"line "));
        let first = String::from_utf8(cursor.next(1000)).unwrap();
        assert!(first.starts_with("dropped "), "{first}");
        let rest = String::from_utf8(cursor.next(1000)).unwrap();
        assert!(rest.ends_with("line 039\n"), "{rest}");
        assert!(cursor.next(10).is_empty());
    }

    #[test]
    fn reading_past_the_end_is_empty() {
        let log = TextLog::new(100);
        log.append(b"abc\n");
        assert_eq!(log.read_at(2, 10), b"c\n");
        assert!(log.read_at(u64::MAX, 10).is_empty());
    }
}
