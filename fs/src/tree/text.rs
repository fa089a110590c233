//! A text written through one open file: the script of `exec`, the value of a configuration file.
//!
//! A text is all that is written on one open description until the writer who began it closes a descriptor (FLUSH by
//! its lock owner), or the file is released, synchronised or read. Shells duplicate and close descriptors before they
//! write, so a FLUSH with nothing pending, or by another process, ends nothing: `{ echo a; cat b; } > exec` is one
//! text, because the shell that began it is the last to close.
//!
//! After a refused write, further writes fail in the same way until that writer's FLUSH: Python writes its buffer a
//! second time when it closes, and half a text must not be taken for a text.

use crate::errno::Errno;
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Largest text, in bytes.
pub const MAX_TEXT: usize = 16 << 20;

/// Bytes of texts not yet complete that one user may have in memory.
pub const MAX_PENDING: usize = 32 << 20;

/// A lock owner, or `None` where the kernel did not say: that one stands for everybody.
pub type Owner = Option<u64>;

/// Whether they are, or may be, the same.
pub fn same(one: Owner, other: Owner) -> bool {
    one.is_none() || other.is_none() || one == other
}

/// Bytes that count as pending until this is dropped; none by default.
#[derive(Default)]
pub struct Held(Arc<AtomicUsize>, usize);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.fetch_sub(self.1, Ordering::Relaxed);
    }
}

/// The text of one open file.
#[derive(Default)]
pub struct Text {
    bytes: Vec<u8>,
    /// Bytes before these, which were taken out to be kept elsewhere.
    spilled: usize,
    pending: Option<Owner>,
    refused: Option<(Errno, Owner)>,
    budget: Arc<AtomicUsize>,
}

impl Text {
    /// No text yet; `budget` counts the pending bytes of the user.
    pub fn new(budget: Arc<AtomicUsize>) -> Text {
        Text { bytes: Vec::new(), spilled: 0, pending: None, refused: None, budget }
    }

    /// What every write fails with now.
    ///
    /// # Errors
    /// That of the write that was refused.
    pub fn check(&self) -> Result<(), Errno> {
        self.refused.map_or(Ok(()), |(errno, _)| Err(errno))
    }

    /// Takes the bytes in memory out, to be kept elsewhere. They are pending until the second is dropped.
    pub fn spill(&mut self) -> (Vec<u8>, Held) {
        let bytes = std::mem::take(&mut self.bytes);
        self.spilled += bytes.len();
        let held = Held(self.budget.clone(), bytes.len());
        (bytes, held)
    }

    /// Bytes of the text so far.
    pub fn len(&self) -> usize {
        self.spilled + self.bytes.len()
    }

    /// The text so far, but for what was spilled.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Adds to the text.
    ///
    /// # Errors
    /// E2BIG over [`MAX_TEXT`], ENOSPC over [`MAX_PENDING`]. The caller is to refuse the text then.
    pub fn push(&mut self, owner: Owner, data: &[u8]) -> Result<(), Errno> {
        self.check()?;
        if self.spilled + self.bytes.len() + data.len() > MAX_TEXT {
            return Err(Errno::E2BIG);
        }
        if self.budget.fetch_add(data.len(), Ordering::Relaxed) + data.len() > MAX_PENDING {
            self.budget.fetch_sub(data.len(), Ordering::Relaxed);
            return Err(Errno::ENOSPC);
        }
        self.pending.get_or_insert(owner);
        self.bytes.extend_from_slice(data);
        Ok(())
    }

    /// Discards the text; writes fail with `errno` until the writer's FLUSH.
    pub fn refuse(&mut self, owner: Owner, errno: Errno) {
        let writer = self.pending.unwrap_or(owner);
        self.take();
        self.refused = Some((errno, writer));
    }

    /// A descriptor was closed: gives the text if that ends it, but for what was spilled.
    pub fn flush(&mut self, owner: Owner) -> Option<Vec<u8>> {
        if self.refused.is_some_and(|(_, writer)| same(writer, owner)) {
            self.refused = None;
        }
        let ends = self.pending.is_some_and(|writer| same(writer, owner));
        if ends { self.take() } else { None }
    }

    /// Ends the text, whoever began it.
    pub fn end(&mut self) -> Option<Vec<u8>> {
        self.take()
    }

    fn take(&mut self) -> Option<Vec<u8>> {
        self.pending.take()?;
        let bytes = std::mem::take(&mut self.bytes);
        self.spilled = 0;
        self.budget.fetch_sub(bytes.len(), Ordering::Relaxed);
        Some(bytes)
    }
}

impl Drop for Text {
    fn drop(&mut self) {
        self.take();
    }
}

/// Why the last write failed, to be read on the same open file. Its first byte is at the offset of the first read
/// after the failure (where that stands depends on what had been written), and a read before that starts it again.
#[derive(Default)]
pub struct Reason(Mutex<Option<(Vec<u8>, Option<u64>)>>);

impl Reason {
    /// A write failed.
    pub fn set(&self, message: &str) {
        let line = message.replace('\n', " ");
        *self.0.lock() = Some((format!("{line}\n").into_bytes(), None));
    }

    /// A write succeeded since.
    pub fn clear(&self) {
        *self.0.lock() = None;
    }

    /// Bytes at an offset; `None` when nothing failed.
    pub fn read(&self, offset: u64, max: usize) -> Option<Vec<u8>> {
        let mut reason = self.0.lock();
        let (text, base) = reason.as_mut()?;
        let base = *base.insert(base.map_or(offset, |base| base.min(offset)));
        Some(slice(text, offset - base, max).to_vec())
    }

    /// Takes the next bytes, where there are no offsets; `None` when nothing failed or all was taken.
    pub fn take(&self, max: usize) -> Option<Vec<u8>> {
        let mut reason = self.0.lock();
        let (text, given) = reason.as_mut()?;
        let at = given.unwrap_or(0);
        let part = slice(text, at, max).to_vec();
        if part.is_empty() && max > 0 {
            *reason = None;
            return None;
        }
        *given = Some(at + part.len() as u64);
        Some(part)
    }

    /// Whether there is something to read.
    pub fn is_set(&self) -> bool {
        self.0.lock().is_some()
    }
}

/// The part of a text that a read at `offset` gives.
pub fn slice(text: &[u8], offset: u64, max: usize) -> &[u8] {
    let from = usize::try_from(offset).unwrap_or(usize::MAX).min(text.len());
    let to = from.saturating_add(max).min(text.len());
    text.get(from..to).unwrap_or_default()
}

/// Whether a write of so many bytes looks like a full buffer, so that what it ends with may go on in the next write:
/// the buffers of stdio, Python, Perl, Node, cat and tee are multiples of 1 KiB, and the kernel cuts at page ends.
pub fn is_full_buffer(len: usize) -> bool {
    len >= 1024 && (len.is_multiple_of(1024) || len >= 512 * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SHELL: Owner = Some(1);
    const CHILD: Owner = Some(2);

    enum Step {
        Write(Owner, &'static str),
        Flush(Owner),
        Release,
    }
    use Step::{Flush, Release, Write};

    fn texts(steps: &[Step]) -> Vec<String> {
        let mut text = Text::default();
        let mut texts = Vec::new();
        for step in steps {
            let ended = match step {
                Write(owner, data) => {
                    text.push(*owner, data.as_bytes()).unwrap();
                    None
                }
                Flush(owner) => text.flush(*owner),
                Release => text.end(),
            };
            texts.extend(ended.map(|bytes| String::from_utf8(bytes).unwrap()));
        }
        assert_eq!(text.budget.load(Ordering::Relaxed), 0);
        texts
    }

    #[test]
    fn the_writer_table() {
        // echo x > f: the shell duplicates the descriptor and closes the first one before it writes.
        assert_eq!(texts(&[Flush(SHELL), Write(SHELL, "x\n"), Flush(SHELL), Release]), ["x\n"]);
        // bash printf 'a\nb\n' > f
        assert_eq!(texts(&[Flush(SHELL), Write(SHELL, "a\n"), Write(SHELL, "b\n"), Flush(SHELL), Release]), ["a\nb\n"]);
        // { echo a; echo b; } > f
        assert_eq!(texts(&[Flush(SHELL), Write(SHELL, "a\n"), Write(SHELL, "b\n"), Flush(SHELL), Release]), ["a\nb\n"]);
        // exec 3>f; echo a >&3; echo b >&3: the shell duplicates 3 and closes the copy each time.
        assert_eq!(
            texts(&[Write(SHELL, "a\n"), Flush(SHELL), Write(SHELL, "b\n"), Flush(SHELL), Flush(SHELL), Release]),
            ["a\n", "b\n"]
        );
        // { cat a; cat b; } > f: each cat is a process with descriptors of its own.
        assert_eq!(
            texts(&[Write(SHELL, "a"), Flush(SHELL), Write(CHILD, "b"), Flush(CHILD), Flush(Some(9)), Release]),
            ["a", "b"]
        );
        // cat > f, in pieces
        assert_eq!(texts(&[Flush(Some(9)), Write(CHILD, "a"), Write(CHILD, "b"), Flush(CHILD), Release]), ["ab"]);
        // a writer that is killed between its write and its close
        assert_eq!(texts(&[Write(CHILD, "a"), Release]), ["a"]);
        // { echo a; cat b; } > f: the child that writes into the shell's text does not end it.
        assert_eq!(texts(&[Write(SHELL, "a\n"), Write(CHILD, "b\n"), Flush(CHILD), Flush(SHELL), Release]), ["a\nb\n"]);
        // : > f
        assert!(texts(&[Flush(SHELL), Release]).is_empty());
        // A writer that the kernel does not name.
        assert_eq!(texts(&[Write(None, "a"), Flush(SHELL), Release]), ["a"]);
    }

    #[test]
    fn a_text_that_is_too_big_is_discarded_whole() {
        let mut text = Text::default();
        let chunk = vec![b'x'; 1 << 20];
        for _ in 0..16 {
            text.push(SHELL, &chunk).unwrap();
        }
        assert_eq!(text.push(SHELL, b"x"), Err(Errno::E2BIG));
        text.refuse(SHELL, Errno::E2BIG);
        assert_eq!(text.push(SHELL, b"x"), Err(Errno::E2BIG));
        assert_eq!(text.flush(CHILD), None);
        assert_eq!(text.check(), Err(Errno::E2BIG));
        assert_eq!(text.flush(SHELL), None);
        text.push(SHELL, b"y").unwrap();
        assert_eq!(text.flush(SHELL), Some(b"y".to_vec()));
    }

    #[test]
    fn a_user_has_a_budget() {
        let budget = Arc::new(AtomicUsize::new(MAX_PENDING - 1));
        let mut text = Text::new(budget.clone());
        text.push(SHELL, b"x").unwrap();
        assert_eq!(text.push(SHELL, b"y"), Err(Errno::ENOSPC));
        drop(text);
        assert_eq!(budget.load(Ordering::Relaxed), MAX_PENDING - 1);
    }

    #[test]
    fn what_is_spilled_counts_until_it_is_safe() {
        let budget = Arc::new(AtomicUsize::new(0));
        let mut text = Text::new(budget.clone());
        text.push(SHELL, &[b'x'; 1000]).unwrap();
        let (bytes, held) = text.spill();
        assert_eq!((bytes.len(), budget.load(Ordering::Relaxed)), (1000, 1000));
        drop(held);
        assert_eq!(budget.load(Ordering::Relaxed), 0);
        text.push(SHELL, b"y").unwrap();
        let rest = vec![b'z'; MAX_TEXT - 1001];
        text.push(SHELL, &rest).unwrap();
        assert_eq!(text.push(SHELL, b"z"), Err(Errno::E2BIG), "what was spilled is part of it");
        assert_eq!(text.end().map(|bytes| bytes.len()), Some(MAX_TEXT - 1000));
        text.push(SHELL, b"the next begins at nothing").unwrap();
    }

    #[test]
    fn a_reason_begins_where_it_is_first_read() {
        let reason = Reason::default();
        assert_eq!(reason.read(0, 10), None);
        reason.set("no");
        assert_eq!(reason.read(5, 2), Some(b"no".to_vec()));
        assert_eq!(reason.read(7, 9), Some(b"\n".to_vec()));
        assert_eq!(reason.read(8, 9), Some(Vec::new()));
        assert_eq!(reason.read(0, 9), Some(b"no\n".to_vec()));
        reason.set("no");
        assert_eq!(reason.take(1), Some(b"n".to_vec()));
        assert_eq!(reason.take(9), Some(b"o\n".to_vec()));
        assert_eq!(reason.take(9), None);
        assert!(!reason.is_set());
    }

    proptest! {
        #[test]
        fn nothing_is_lost_or_doubled(steps in proptest::collection::vec((0..3_u64, 0..3_u8, ".{0,4}"), 0..40)) {
            let mut text = Text::default();
            let (mut written, mut given) = (String::new(), Vec::new());
            for (owner, what, data) in steps {
                match what {
                    0 => {
                        text.push(Some(owner), data.as_bytes()).unwrap();
                        written.push_str(&data);
                    }
                    1 => given.extend(text.flush(Some(owner)).unwrap_or_default()),
                    _ => given.extend(text.end().unwrap_or_default()),
                }
            }
            given.extend(text.end().unwrap_or_default());
            prop_assert_eq!(given, written.into_bytes());
        }
    }
}
