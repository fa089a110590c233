//! The agent's own log: on stderr, and the newest part in memory for the host to read.

use parking_lot::Mutex;
use std::collections::VecDeque;
use std::fmt::Arguments;
use std::io::Write;
use std::time::{SystemTime, UNIX_EPOCH};

/// Bytes of log kept in memory.
const KEPT: usize = 64 * 1024;
/// Longest line; with a pipe as stderr it is written whole or not at all (PIPE_BUF, pipe(7)).
const MAX_LINE: usize = 4096;

static LINES: Mutex<VecDeque<u8>> = Mutex::new(VecDeque::new());

/// Adds a line. Control characters in it are replaced, so that bytes of others cannot forge lines.
pub fn line(text: Arguments<'_>) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut line = format!("{}.{:03} {text}", now.as_secs(), now.subsec_millis());
    let mut cut = line.len().min(MAX_LINE - 1);
    while !line.is_char_boundary(cut) {
        cut -= 1;
    }
    line.truncate(cut);
    line = line.replace(char::is_control, "?");
    line.push('\n');
    let mut lines = LINES.lock();
    lines.extend(line.as_bytes());
    if lines.len() > KEPT {
        let over = lines.len() - KEPT;
        let end = lines.iter().skip(over).position(|byte| *byte == b'\n').map_or(lines.len(), |at| over + at + 1);
        lines.drain(..end);
    }
    if stderr_takes() {
        let _ = std::io::stderr().write_all(line.as_bytes());
    }
}

/// Whether a line can be written to stderr without waiting: nobody may be reading the other end.
fn stderr_takes() -> bool {
    let stderr = std::io::stderr();
    let mut fds = [rustix::event::PollFd::new(&stderr, rustix::event::PollFlags::OUT)];
    let ready = rustix::event::poll(&mut fds, Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 }));
    ready.is_ok_and(|count| count > 0)
}

/// What is kept, oldest first, in whole lines.
pub fn kept() -> Vec<u8> {
    LINES.lock().iter().copied().collect()
}
