//! `machinefs check`.

use super::daemon::container_backend;
use super::settings::DaemonArgs;
use machinefs_backends::{Backend, Finding, Level};
use std::process::ExitCode;

/// Prints one line a finding, and fails when no machine could run.
pub fn check(args: DaemonArgs) -> Result<ExitCode, String> {
    let settings = args.resolve()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("cannot start the runtime: {error}"))?;
    let backend = container_backend(&settings, None)?;
    let mut worst = Level::Ok;
    for finding in fuse_findings() {
        worst = worst.max(finding.level);
        print("fuse", &finding);
    }
    for finding in runtime.block_on(backend.check()) {
        worst = worst.max(finding.level);
        print(backend.name(), &finding);
    }
    Ok(if worst == Level::Missing { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn print(part: &str, finding: &Finding) {
    let word = match finding.level {
        Level::Ok => "ok",
        Level::Limited => "limited",
        Level::Missing => "missing",
    };
    let remedy = if finding.remedy.is_empty() { String::new() } else { format!("; remedy: {}", finding.remedy) };
    println!("{word} {part} {}: {}{remedy}", finding.subject, finding.message);
}

fn fuse_findings() -> Vec<Finding> {
    let device = match std::fs::OpenOptions::new().read(true).write(true).open("/dev/fuse") {
        Ok(_) => finding("/dev/fuse", Level::Ok, "can be opened", ""),
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            finding("/dev/fuse", Level::Missing, "may not be opened by you", "chmod 0666 /dev/fuse (as root)")
        }
        Err(error) => finding("/dev/fuse", Level::Missing, &error.to_string(), "modprobe fuse (as root)"),
    };
    let mut findings = vec![device];
    if !rustix::process::geteuid().is_root() {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let there = std::env::split_paths(&path).any(|dir| dir.join("fusermount3").is_file());
        findings.push(if there {
            finding("fusermount3", Level::Ok, "found", "")
        } else {
            finding("fusermount3", Level::Missing, "is not in PATH", "apt-get install fuse3")
        });
    }
    // Linux 6.15 and later; when it is set, the kernel aborts the whole mount on one request that is older.
    let timeout = std::fs::read_to_string("/proc/sys/fs/fuse/default_request_timeout").unwrap_or_default();
    if !matches!(timeout.trim(), "" | "0") {
        findings.push(finding(
            "fs.fuse.default_request_timeout",
            Level::Limited,
            &format!("is {} s: a blocked read that lasts longer ends the whole mount", timeout.trim()),
            "sysctl fs.fuse.default_request_timeout=0",
        ));
    }
    findings
}

fn finding(subject: &str, level: Level, message: &str, remedy: &str) -> Finding {
    Finding { subject: subject.into(), level, message: message.into(), remedy: remedy.into() }
}
