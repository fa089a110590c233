//! The text of a job: a short one in memory, a long one in a file.

use super::super::error::MachineError;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Commands longer than this are kept in a file, not in memory; in bytes.
pub(super) const COMMAND_IN_MEMORY: usize = 4096;
/// Characters of a longer one that are kept in memory and in the database, for `history`.
pub(super) const COMMAND_HEAD: usize = 1000;

/// The text of a job.
#[derive(Clone, Debug, Default)]
pub(super) struct Command {
    /// All of it, or the beginning of one that is in a file.
    pub(super) head: Vec<u8>,
    /// In bytes.
    pub(super) len: u64,
    pub(super) in_file: bool,
}

impl Command {
    pub(super) fn whole(text: Vec<u8>) -> Command {
        Command { len: text.len() as u64, head: text, in_file: false }
    }

    /// Of a text in a file, which begins like this.
    pub(super) fn filed(start: &[u8], len: u64) -> Command {
        let start = start.get(..COMMAND_HEAD * 4).unwrap_or(start);
        let head: String = String::from_utf8_lossy(start).chars().take(COMMAND_HEAD).collect();
        Command { head: head.into_bytes(), len, in_file: true }
    }
}

/// A complete text, as it comes to a job.
#[derive(Debug)]
pub enum Script {
    /// All of it.
    Text(Vec<u8>),
    /// It is in the file [`Job::command_path`](super::Job::command_path) already.
    File {
        /// How it begins: at least [`COMMAND_HEAD`] characters.
        start: Vec<u8>,
        /// In bytes.
        len: u64,
    },
}

impl Script {
    /// Whether [`Job::keep_script`](super::Job::keep_script) writes it to the disk.
    pub fn is_to_be_filed(&self) -> bool {
        matches!(self, Script::Text(text) if text.len() > COMMAND_IN_MEMORY)
    }
}

/// Reads the text of a job.
#[derive(Debug)]
pub enum CommandReader {
    /// A short one.
    Text(Vec<u8>),
    /// A long one, and its length in bytes.
    File(File, u64),
}

impl CommandReader {
    /// Bytes from an offset on; empty at the end. Reads a file at most (the page cache).
    ///
    /// # Errors
    /// The host's spool cannot be read.
    pub fn read_at(&self, offset: u64, max: usize) -> Result<Vec<u8>, MachineError> {
        match self {
            CommandReader::Text(text) => {
                let from = usize::try_from(offset).unwrap_or(usize::MAX).min(text.len());
                let to = from.saturating_add(max).min(text.len());
                Ok(text.get(from..to).unwrap_or_default().to_vec())
            }
            CommandReader::File(file, len) => {
                let left = usize::try_from(len.saturating_sub(offset)).unwrap_or(usize::MAX);
                let mut bytes = vec![0; max.min(left)];
                let read = file.read_at(&mut bytes, offset).map_err(|error| spool(&error))?;
                bytes.truncate(read);
                Ok(bytes)
            }
        }
    }

    /// In bytes.
    pub fn size(&self) -> u64 {
        match self {
            CommandReader::Text(text) => text.len() as u64,
            CommandReader::File(_, len) => *len,
        }
    }
}

pub(super) fn spool(error: &io::Error) -> MachineError {
    MachineError::no_space(format!("the host's spool: {error}"))
}
