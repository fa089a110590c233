//! What differs between a machine's disk and its image: `changes`.

use super::Machine;
use super::error::MachineError;
use machinefs_backends::Change;
use parking_lot::Mutex;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Looks at one machine at once: each is a file on the host's disk, as long as somebody has it open.
const MOST: usize = 8;

/// Looks at a machine's changes.
#[derive(Default)]
pub(super) struct Looks {
    open: Arc<AtomicUsize>,
    /// Length of the last one.
    size: AtomicU64,
}

/// One look in the count.
struct Seat(Arc<AtomicUsize>);

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What one look has found: lines in a file without a name.
pub struct Look {
    file: File,
    len: u64,
    _seat: Seat,
}

impl Look {
    /// Bytes at an offset.
    ///
    /// # Errors
    /// EIO.
    pub fn read_at(&self, offset: u64, max: usize) -> Result<Vec<u8>, MachineError> {
        let left = usize::try_from(self.len.saturating_sub(offset)).unwrap_or(usize::MAX);
        let mut bytes = vec![0; max.min(left)];
        self.file.read_exact_at(&mut bytes, offset).map_err(|error| MachineError::internal(error.to_string()))?;
        Ok(bytes)
    }

    /// Its length.
    pub fn size(&self) -> u64 {
        self.len
    }
}

/// A path on a line: bytes that would end it, and the backslash, as `\NNN` in octal.
fn escaped(path: &[u8]) -> Vec<u8> {
    let mut text = Vec::with_capacity(path.len());
    for byte in path {
        match byte {
            0..0x20 | 0x7f | b'\\' => text.extend_from_slice(format!("\\{byte:03o}").as_bytes()),
            _ => text.push(*byte),
        }
    }
    text
}

/// `A /path`; for a directory that was moved, a tab and where it was follow.
fn line(change: &Change) -> Vec<u8> {
    let mut line = vec![change.kind.letter() as u8, b' '];
    line.extend(escaped(&change.path));
    if let Some(from) = &change.moved_from {
        line.push(b'\t');
        line.extend(escaped(from));
    }
    line.push(b'\n');
    line
}

struct Lines {
    file: BufWriter<File>,
    len: u64,
    failed: Option<io::Error>,
}

impl Machine {
    /// What the last look at its changes was long; at least 1.
    pub fn changes_size(&self) -> u64 {
        self.looks.size.load(Ordering::Relaxed).max(1)
    }

    /// Looks at what differs from the image. It ends early when `wanted` says no.
    pub fn look_at_changes(
        self: &Arc<Self>,
        wanted: impl Fn() -> bool + Send + Sync + 'static,
        done: Box<dyn FnOnce(Result<Look, MachineError>) + Send>,
    ) {
        let machine = self.clone();
        self.shared.runtime.spawn(async move {
            let looked = machine.look(wanted).await.inspect_err(|error| {
                machine.record_error("changes", error.errno(), &error.to_string(), "");
            });
            done(looked);
        });
    }

    async fn look(self: &Arc<Self>, wanted: impl Fn() -> bool + Send + Sync + 'static) -> Result<Look, MachineError> {
        let (backend, spec) = (self.backend(), self.spec());
        if !backend.capabilities(&spec).changes {
            return Err(MachineError::not_supported(format!("machines of {} do not tell changes", backend.name())));
        }
        let before = self.looks.open.fetch_add(1, Ordering::Relaxed);
        // Counted already: dropping the seat takes it back.
        let seat = Seat(self.looks.open.clone());
        if before >= MOST {
            return Err(MachineError::limit(format!("{MOST} have this file open, which is the most")));
        }
        let full = |error: io::Error| MachineError::no_space(format!("{}: {error}", self.dir.display()));
        let file = tempfile::tempfile_in(&self.dir).map_err(full)?;
        let lines = Arc::new(Mutex::new(Lines { file: BufWriter::new(file), len: 0, failed: None }));
        let of_sink = lines.clone();
        let sink = Box::new(move |change: Change| {
            let line = line(&change);
            let mut lines = of_sink.lock();
            match lines.file.write_all(&line) {
                Ok(()) => lines.len += line.len() as u64,
                Err(error) => lines.failed = Some(error),
            }
            lines.failed.is_none() && wanted()
        });
        backend.changes(&spec, sink).await?;
        let mut lines = lines.lock();
        if let Some(error) = lines.failed.take() {
            return Err(full(error));
        }
        lines.file.flush().map_err(full)?;
        let file = lines.file.get_ref().try_clone().map_err(full)?;
        self.looks.size.store(lines.len, Ordering::Relaxed);
        Ok(Look { file, len: lines.len, _seat: seat })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use machinefs_backends::ChangeKind;

    #[test]
    fn one_line_a_path() {
        let text = |kind, path: &[u8], from: Option<&[u8]>| {
            line(&Change { kind, path: path.to_vec(), moved_from: from.map(<[u8]>::to_vec) })
        };
        assert_eq!(text(ChangeKind::Added, b"/a b", None), b"A /a b\n");
        assert_eq!(text(ChangeKind::Modified, b"/a\n\\\xff", None), b"M /a\\012\\134\xff\n");
        assert_eq!(text(ChangeKind::Deleted, b"/\x7f\t", None), b"D /\\177\\011\n");
        assert_eq!(text(ChangeKind::Added, b"/new", Some(b"/old")), b"A /new\t/old\n");
    }
}
