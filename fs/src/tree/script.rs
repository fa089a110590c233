//! A long script on its way to the host's disk, while it is being written.

use super::text::Held;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

/// Bytes of the beginning that are kept in memory.
const START: usize = 4096;

/// A script in a file. Pieces are added where they come in, and written where the disk may be waited for.
pub struct FiledScript {
    path: PathBuf,
    taken: Mutex<Taken>,
    /// Held while pieces are written, so that they are in order.
    file: Mutex<Option<File>>,
}

#[derive(Default)]
struct Taken {
    start: Vec<u8>,
    len: u64,
    pieces: VecDeque<(Vec<u8>, Held)>,
    failed: bool,
}

impl FiledScript {
    /// Nothing of it yet.
    pub fn new(path: PathBuf) -> FiledScript {
        FiledScript { path, taken: Mutex::default(), file: Mutex::default() }
    }

    /// Adds a piece; writes nothing yet.
    pub fn add(&self, piece: Vec<u8>, held: Held) {
        let mut taken = self.taken.lock();
        let missing = START.saturating_sub(taken.start.len()).min(piece.len());
        let beginning = piece.get(..missing).unwrap_or_default();
        taken.start.extend_from_slice(beginning);
        taken.len += piece.len() as u64;
        taken.pieces.push_back((piece, held));
    }

    /// How it begins, and its length in bytes.
    pub fn described(&self) -> (Vec<u8>, u64) {
        let taken = self.taken.lock();
        (taken.start.clone(), taken.len)
    }

    /// Writes what was added. Waits for the disk.
    ///
    /// # Errors
    /// Those of the disk; from then on always.
    pub fn write_out(&self) -> io::Result<()> {
        let mut file = self.file.lock();
        loop {
            let piece = {
                let mut taken = self.taken.lock();
                if taken.failed {
                    taken.pieces.clear();
                    return Err(io::ErrorKind::StorageFull.into());
                }
                taken.pieces.pop_front()
            };
            let Some((piece, _held)) = piece else { return Ok(()) };
            let written = match &mut *file {
                Some(file) => file.write_all(&piece),
                none => create(&self.path).and_then(|file| none.insert(file).write_all(&piece)),
            };
            if let Err(error) = written {
                self.taken.lock().failed = true;
                return Err(error);
            }
        }
    }
}

fn create(path: &std::path::Path) -> io::Result<File> {
    OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)
}

#[cfg(test)]
mod tests {
    use super::super::text::Text;
    use super::*;

    fn piece(text: &mut Text, bytes: &[u8]) -> (Vec<u8>, Held) {
        text.push(Some(1), bytes).unwrap();
        text.spill()
    }

    #[test]
    fn pieces_are_written_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let script = FiledScript::new(dir.path().join("1.cmd"));
        let mut text = Text::default();
        let mut all = Vec::new();
        for number in 0..50u8 {
            let bytes = vec![number; 1000];
            let (bytes, held) = piece(&mut text, &bytes);
            all.extend_from_slice(&bytes);
            script.add(bytes, held);
            if number % 7 == 0 {
                script.write_out().unwrap();
            }
        }
        script.write_out().unwrap();
        assert_eq!(std::fs::read(dir.path().join("1.cmd")).unwrap(), all);
        assert_eq!(script.described(), (all[..START].to_vec(), all.len() as u64));
    }

    #[test]
    fn after_a_failure_nothing_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let script = FiledScript::new(dir.path().join("missing/1.cmd"));
        let mut text = Text::default();
        let (bytes, held) = piece(&mut text, b"x");
        script.add(bytes, held);
        assert!(script.write_out().is_err());
        std::fs::create_dir(dir.path().join("missing")).unwrap();
        assert!(script.write_out().is_err(), "its beginning is gone");
    }
}
