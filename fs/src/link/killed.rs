//! Whether a process is being killed: the only case in which a change that is under way may be given up.

/// SIGKILL in the masks of /proc/PID/status, see proc(5).
const SIGKILL_BIT: u64 = 1 << (libc::SIGKILL - 1);

/// Whether the thread has SIGKILL pending, or is gone already. `false` when that cannot be known (`pid` 0: a process
/// of another pid namespace).
pub fn being_killed(pid: u32) -> bool {
    if pid == 0 {
        return false;
    }
    match std::fs::read(format!("/proc/{pid}/status")) {
        Ok(status) => says_killed(&status),
        Err(error) => matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)),
    }
}

fn says_killed(status: &[u8]) -> bool {
    status.split(|&b| b == b'\n').any(|line| {
        let Some(colon) = line.iter().position(|&b| b == b':') else { return false };
        let (key, value) = line.split_at(colon);
        let value = value.get(1..).unwrap_or(&[]).trim_ascii();
        match key {
            b"State" => value.starts_with(b"Z") || value.starts_with(b"X"),
            b"SigPnd" | b"ShdPnd" => std::str::from_utf8(value)
                .ok()
                .and_then(|hex| u64::from_str_radix(hex, 16).ok())
                .is_some_and(|mask| mask & SIGKILL_BIT != 0),
            _ => false,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pending_kills_and_zombies_count() {
        let status = |state: &str, thread: &str, shared: &str| {
            format!("Name:\tcat\nState:\t{state}\nSigPnd:\t{thread}\nShdPnd:\t{shared}\n").into_bytes()
        };
        let none = "0000000000000000";
        assert!(!says_killed(&status("D (disk sleep)", none, "0000000000010000")), "SIGCHLD is harmless");
        assert!(says_killed(&status("D (disk sleep)", "0000000000000100", none)));
        assert!(says_killed(&status("D (disk sleep)", none, "0000000000000100")));
        assert!(says_killed(&status("Z (zombie)", none, none)));
        assert!(!says_killed(b"garbage\n\xff:\xff\n"));
    }

    #[test]
    fn the_living_are_not_killed_and_the_gone_are() {
        assert!(!being_killed(std::process::id()));
        assert!(!being_killed(0));
        assert!(being_killed(u32::MAX - 1));
    }
}
