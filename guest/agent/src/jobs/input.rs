//! Writing a job's input to its pipe or terminal.

use crate::session::{Over, Pending};
use rustix::io::Errno;
use rustix::termios::{InputModes, LocalModes, SpecialCodeIndex};
use std::os::fd::OwnedFd;

/// Writes as much as is taken now. Gives how many bytes were, whether that is the end of it, and whether there is more
/// to write when it takes more.
pub fn write(fd: &OwnedFd, pending: &mut Pending, terminal: bool) -> (u64, Option<Over>, bool) {
    let mut taken = 0;
    while let Some(chunk) = pending.chunks.front() {
        let rest = chunk.get(pending.written..).unwrap_or_default();
        match rustix::io::write(fd, rest) {
            Ok(count) => {
                taken += count as u64;
                pending.last = count.checked_sub(1).and_then(|last| rest.get(last).copied()).or(pending.last);
                pending.written += count;
                if pending.written >= chunk.len() {
                    pending.chunks.pop_front();
                    pending.written = 0;
                }
            }
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return (taken, None, true),
            Err(_) => return (taken, Some(Over::Unread), false),
        }
    }
    if !pending.ended {
        return (taken, None, false);
    }
    if terminal {
        let end = end_of_file(fd, pending.last);
        match rustix::io::write(fd, &end) {
            Ok(count) if count < end.len() => {
                // The first of two has ended the line.
                pending.last = None;
                return (taken, None, true);
            }
            Err(Errno::AGAIN | Errno::INTR) => return (taken, None, true),
            Ok(_) | Err(_) => {}
        }
    }
    (taken, Some(Over::Delivered), false)
}

/// What a user would type for the end of file. In the middle of a line the character only sends what there is of the
/// line, so it takes two of them then. A terminal that is not in canonical mode has no such character (termios(3)).
fn end_of_file(terminal: &OwnedFd, last: Option<u8>) -> Vec<u8> {
    let Ok(modes) = rustix::termios::tcgetattr(terminal) else { return Vec::new() };
    if !modes.local_modes.contains(LocalModes::ICANON) {
        return Vec::new();
    }
    let end = modes.special_codes[SpecialCodeIndex::VEOF];
    let mut line_ends = vec![b'\n', end];
    line_ends.extend([SpecialCodeIndex::VEOL, SpecialCodeIndex::VEOL2].map(|index| modes.special_codes[index]));
    if modes.input_modes.contains(InputModes::ICRNL) {
        line_ends.push(b'\r');
    }
    let in_line = last.is_some_and(|last| !line_ends.contains(&last));
    if in_line { vec![end, end] } else { vec![end] }
}
