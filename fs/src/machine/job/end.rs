//! How jobs end: as it is shown, and as it is written down.

use super::Phase;
use machinefs_protocol::job::{ExitReason, JobEnd};

/// The words for how it ended.
pub(super) fn reason_text(reason: ExitReason) -> String {
    match reason {
        ExitReason::Code(_) => "exit".into(),
        ExitReason::Signal(signal) => format!("signal {signal}"),
        ExitReason::Timeout => "timeout".into(),
        ExitReason::OutOfMemory => "out of memory".into(),
        ExitReason::NotStarted(errno) => format!("not started: {}", crate::errno::Errno(errno)),
        ExitReason::Lost => "lost".into(),
    }
}

pub(super) fn format_end(reason: ExitReason) -> String {
    match reason {
        ExitReason::Code(code) => format!("code {code}"),
        ExitReason::Signal(signal) => format!("signal {signal}"),
        ExitReason::Timeout => "timeout".into(),
        ExitReason::OutOfMemory => "memory".into(),
        ExitReason::NotStarted(errno) => format!("notstarted {errno}"),
        ExitReason::Lost => "lost the agent was restarted".into(),
    }
}

pub(super) fn parse_end(end: &str, ended_ms: u64, cpu_micros: u64, max_rss_kib: u64) -> Phase {
    let (word, rest) = end.split_once(' ').unwrap_or((end, ""));
    let reason = match word {
        "code" => ExitReason::Code(rest.parse().unwrap_or(125)),
        "signal" => ExitReason::Signal(rest.parse().unwrap_or(0)),
        "timeout" => ExitReason::Timeout,
        "memory" => ExitReason::OutOfMemory,
        "notstarted" => ExitReason::NotStarted(rest.parse().unwrap_or(0)),
        _ => return Phase::Lost(rest.to_string()),
    };
    Phase::Ended(JobEnd { reason, log_end: 0, cpu_micros, max_rss_kib, ended_ms })
}
