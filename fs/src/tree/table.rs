//! The one table of control files: what is where, who may do what with it, and the line that the README says of it.

use super::node::Kind;

/// An entry of the table.
#[derive(Debug)]
pub struct Row {
    /// The directory it is in.
    pub parent: Kind,
    /// Its name; for things that users name or number, what stands for the name (`NAME`, `N`, `KEY`).
    pub name: &'static str,
    /// What it is.
    pub kind: Kind,
    /// Permission bits.
    pub mode: u32,
    /// What the README says of it.
    pub doc: &'static str,
}

const fn row(parent: Kind, name: &'static str, kind: Kind, mode: u32, doc: &'static str) -> Row {
    Row { parent, name, kind, mode, doc }
}

/// Every control file. The order in a directory is that of its listing: `ctl` is a machine's first entry, because
/// unlinking it is what makes `rm -r` destroy the machine before it comes to `files/`.
#[rustfmt::skip]
pub static TABLE: &[Row] = &[
    row(Kind::Root, "README", Kind::Readme, 0o444, "this text"),
    row(Kind::Root, ".ignore", Kind::Ignore, 0o444, "keeps rg and editors out of the files that block"),
    row(Kind::Root, "ctl", Kind::RootCtl, 0o666, "commands for the whole service, one a line"),
    row(Kind::Root, "index", Kind::Index, 0o444, "a table: one line a machine"),
    row(Kind::Root, "index.json", Kind::IndexJson, 0o444, "the same as JSON"),
    row(Kind::Root, ".sys", Kind::Sys, 0o555, "the service itself"),
    row(Kind::Root, "NAME", Kind::Machine, 0o700, "a machine: mkdir makes and boots it, rmdir destroys it, mv renames it"),

    row(Kind::Sys, "version", Kind::Version, 0o444, "version of this interface"),
    row(Kind::Sys, "health", Kind::SysHealth, 0o444, "ok, or one line a fault with its remedy"),
    row(Kind::Sys, "metrics", Kind::Metrics, 0o444, "counters, as OpenMetrics text"),
    row(Kind::Sys, "events", Kind::SysEvents, 0o444, "a log of all machines' events"),
    row(Kind::Sys, "wait", Kind::SysWait, 0o555, "files that block"),
    row(Kind::Sys, "templates", Kind::Templates, 0o1777, "what machines begin with: mkdir TEMPLATE.REST takes it from there, other names from default"),
    row(Kind::Templates, "TEMPLATE", Kind::Template, 0o700, "a template: mkdir makes one, rmdir removes it; a machine takes a copy"),
    row(Kind::Template, "config", Kind::TemplateConfig, 0o700, "configuration, as in a machine; default takes a value back"),
    row(Kind::Template, "env", Kind::TemplateEnv, 0o700, "environment, as in a machine"),
    row(Kind::Template, "secrets", Kind::TemplateSecrets, 0o700, "secrets, as in a machine"),
    row(Kind::TemplateConfig, "KEY", Kind::TemplateKey, 0o600, "a value"),
    row(Kind::TemplateEnv, "VARIABLE", Kind::TemplateVar, 0o600, "a variable"),
    row(Kind::TemplateSecrets, "SECRET", Kind::TemplateSecret, 0o200, "a secret"),
    row(Kind::Sys, "volumes", Kind::Volumes, 0o1777, "directories that outlive machines, for mounts"),
    row(Kind::Volumes, "VOLUME", Kind::Volume, 0o700, "a volume: mkdir makes one, rmdir removes it with what is in it; echo 'volume:VOLUME' > NAME/mounts/PATH"),
    row(Kind::Volume, "info", Kind::VolumeInfo, 0o400, "facts, one a line: name, owner, when it was made, the machines that have it mounted"),
    row(Kind::SysWait, "event", Kind::SysWaitEvent, 0o444, "streams the events of all machines from now on"),

    row(Kind::Machine, "ctl", Kind::Ctl, 0o600, "commands for the machine, one a line; rm ctl destroys the machine"),
    row(Kind::Machine, ".ignore", Kind::MachineIgnore, 0o400, "keeps rg and editors out of the files that block"),
    row(Kind::Machine, "status", Kind::Status, 0o400, "one word: creating booting running paused stopping stopped failed lost"),
    row(Kind::Machine, "wait", Kind::Wait, 0o700, "files that block until something is so"),
    row(Kind::Machine, "info", Kind::Info, 0o400, "facts, one a line: id, backend, image, addresses, times, pending configuration"),
    row(Kind::Machine, "info.json", Kind::InfoJson, 0o400, "the same as JSON"),
    row(Kind::Machine, "errors", Kind::Errors, 0o400, "the last errors, newest last, each with its reason and the command"),
    row(Kind::Machine, "events", Kind::Events, 0o400, "a log of the machine's events"),
    row(Kind::Machine, "health", Kind::Health, 0o400, "asks the agent in the machine: ok and the round trip, or why not"),
    row(Kind::Machine, "usage", Kind::Usage, 0o400, "what it takes of the host: processor, memory, disk, jobs"),
    row(Kind::Machine, "console", Kind::Console, 0o400, "a log of boot and serial output"),
    row(Kind::Machine, "exec", Kind::Exec, 0o600, "a script written here runs in the machine; opened for reading and writing it is private (see below)"),
    row(Kind::Machine, "out", Kind::Out, 0o400, "what the newest job prints, from its first byte; blocks until the job ends"),
    row(Kind::Machine, "exit", Kind::Exit, 0o400, "exit code of the newest job, the number alone; blocks until the job ends"),
    row(Kind::Machine, "history", Kind::History, 0o400, "one line a command: job, start, seconds, exit code, who, the command"),
    row(Kind::Machine, "jobs", Kind::Jobs, 0o700, "every script that was run"),
    row(Kind::Machine, "config", Kind::Config, 0o700, "configuration, one value a file"),
    row(Kind::Machine, "env", Kind::Env, 0o700, "environment of every job, one file a variable: write to make one, rm to remove it"),
    row(Kind::Machine, "secrets", Kind::Secrets, 0o700, "the same for what is never shown: a secret can be written, and not read"),
    row(Kind::Machine, "tags", Kind::Tags, 0o700, "labels of your own, one a file; shown in info"),
    row(Kind::Machine, "ports", Kind::Ports, 0o700, "TCP ports of the machine that are open on the host: touch 8080 opens one, rm closes it"),
    row(Kind::Machine, "mounts", Kind::Mounts, 0o700, "directories of the host, and volumes, in the machine: echo '/home/me/proj cow' > src, rm takes it off"),
    row(Kind::Machine, "changes", Kind::Changes, 0o400, "what differs from the image, one line a path: A added, M modified, D deleted; a tab and the old path follow where a directory was moved"),
    row(Kind::Machine, "files", Kind::Files, 0o700, "the root directory of the machine"),
    row(Kind::Machine, "work", Kind::Work, 0o777, "a symbolic link to the working directory, in files"),

    row(Kind::Wait, "running", Kind::WaitRunning, 0o400, "blocks until the machine runs; fails when it no longer can"),
    row(Kind::Wait, "stopped", Kind::WaitStopped, 0o400, "blocks until the machine no longer runs, then says how: stopped failed lost destroyed"),
    row(Kind::Wait, "event", Kind::WaitEvent, 0o400, "streams the machine's events from now on"),
    row(Kind::Wait, "console", Kind::WaitConsole, 0o400, "streams the console from now on"),

    row(Kind::Config, "KEY", Kind::ConfigKey, 0o600, "a value; write it to change it"),

    row(Kind::Env, "VARIABLE", Kind::EnvVar, 0o600, "a variable; one newline at the end is not part of it"),
    row(Kind::Secrets, "SECRET", Kind::Secret, 0o200, "a secret, sealed on the host's disk"),
    row(Kind::Tags, "TAG", Kind::Tag, 0o600, "a label"),
    row(Kind::Ports, "PORT", Kind::Port, 0o600, "the URL at which it is reached; write a number to choose the host's port"),
    row(Kind::Mounts, "PATH", Kind::Mount, 0o600, "a directory of the host or volume:VOLUME, and ro, rw (if you do not say) or cow; PATH is from the machine's root, %2F is a slash in it"),

    row(Kind::Jobs, "JOB", Kind::Job, 0o700, "a job: mkdir makes one to be set up; rmdir kills it and forgets it"),
    row(Kind::Job, "cmd", Kind::JobCmd, 0o600, "the script; writing it starts the job"),
    row(Kind::Job, "argv", Kind::JobArgv, 0o600, "instead of a script, a program and its arguments, a NUL behind each; writing it starts the job"),
    row(Kind::Job, "cwd", Kind::JobCwd, 0o600, "where it starts: an absolute path in the machine"),
    row(Kind::Job, "env", Kind::JobEnv, 0o600, "variables for it alone, NAME=value, a line each"),
    row(Kind::Job, "user", Kind::JobUser, 0o600, "the machine's user it runs as"),
    row(Kind::Job, "timeout", Kind::JobTimeout, 0o600, "how long it may run (30s, 5m); then it is killed, and exit is 124"),
    row(Kind::Job, "tty", Kind::JobTty, 0o600, "no, yes, or ROWS COLUMNS: it gets a terminal"),
    row(Kind::Job, "stdin", Kind::JobStdin, 0o200, "its input, if it is opened before the start; ends when its last writer closes it"),
    row(Kind::Job, "ctl", Kind::JobCtl, 0o600, "signals and more, one a line"),
    row(Kind::Job, "out", Kind::JobOut, 0o400, "stdout and stderr as they came; blocks until the job ends"),
    row(Kind::Job, "stdout", Kind::JobStdout, 0o400, "standard output; blocks until the job ends"),
    row(Kind::Job, "stderr", Kind::JobStderr, 0o400, "standard error; blocks until the job ends"),
    row(Kind::Job, "exit", Kind::JobExit, 0o400, "exit code, the number alone; blocks until the job ends"),
    row(Kind::Job, "status", Kind::JobStatus, 0o400, "state, and how it ended in words"),
];

/// Whether entries of this kind have names of their own, which the table only stands for.
pub fn is_named_by_user(kind: Kind) -> bool {
    matches!(
        kind,
        Kind::Machine
            | Kind::ConfigKey
            | Kind::Job
            | Kind::EnvVar
            | Kind::Secret
            | Kind::Tag
            | Kind::Port
            | Kind::Mount
            | Kind::Volume
            | Kind::Template
            | Kind::TemplateKey
            | Kind::TemplateVar
            | Kind::TemplateSecret
    )
}

/// The fixed entries of a directory, in the order of its listing, each with its place in the table (a cookie for
/// listings).
pub fn entries(parent: Kind) -> impl Iterator<Item = (u64, &'static Row)> {
    (0_u64..).zip(TABLE).filter(move |(_, row)| row.parent == parent && !is_named_by_user(row.kind))
}

/// The fixed entry of that name.
pub fn find(parent: Kind, name: &[u8]) -> Option<&'static Row> {
    entries(parent).map(|(_, row)| row).find(|row| row.name.as_bytes() == name)
}

/// The directory that a kind is in, and its permission bits.
pub fn of(kind: Kind) -> Option<&'static Row> {
    TABLE.iter().find(|row| row.kind == kind)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn each_kind_is_in_the_table_once() {
        for kind in Kind::ALL {
            let count = TABLE.iter().filter(|row| row.kind == *kind).count();
            assert_eq!(count, usize::from(*kind != Kind::Root), "{kind:?}");
        }
    }

    #[test]
    fn names_are_unique_and_descriptions_are_one_line() {
        let mut seen = HashSet::new();
        for row in TABLE {
            assert!(seen.insert((row.parent, row.name)), "{} twice", row.name);
            assert!(row.parent.is_dir());
            assert!(!row.doc.is_empty() && !row.doc.contains('\n') && !row.doc.ends_with('.'), "{}", row.name);
        }
    }

    #[test]
    fn ctl_is_the_first_entry_of_a_machine() {
        assert_eq!(entries(Kind::Machine).next().map(|(_, row)| row.name), Some("ctl"));
    }

    #[test]
    fn modes_follow_the_rules() {
        for row in TABLE {
            let public = matches!(row.parent, Kind::Root | Kind::Sys | Kind::SysWait) && row.kind != Kind::Machine;
            let allowed: &[u32] = match (public, row.kind.is_dir()) {
                (_, _) if row.kind == Kind::Work => &[0o777],
                // As /tmp: everybody makes, each removes their own.
                (_, _) if matches!(row.kind, Kind::Templates | Kind::Volumes) => &[0o1777],
                (true, true) => &[0o555],
                (true, false) => &[0o444, 0o666],
                (false, true) => &[0o700],
                (false, false) => &[0o600, 0o400, 0o200],
            };
            assert!(allowed.contains(&row.mode), "{} {:o}", row.name, row.mode);
        }
    }

    /// The names of DESIGN.md 1 that this version has; what is in the design and not here is named in the second list.
    #[test]
    fn the_table_is_the_design() {
        let names = |parent| -> HashSet<&str> { TABLE.iter().filter(|r| r.parent == parent).map(|r| r.name).collect() };
        let design_root: HashSet<&str> =
            ["README", ".ignore", "ctl", "index", "index.json", ".sys", "NAME"].into_iter().collect();
        let design_sys: HashSet<&str> =
            ["version", "health", "metrics", "events", "wait", "templates", "volumes"].into_iter().collect();
        let design_machine: HashSet<&str> = [
            "ctl",
            ".ignore",
            "status",
            "wait",
            "info",
            "info.json",
            "errors",
            "events",
            "console",
            "health",
            "usage",
            "env",
            "secrets",
            "tags",
            "ports",
            "mounts",
            "changes",
            "exec",
            "out",
            "exit",
            "history",
            "jobs",
            "config",
            "files",
            "work",
        ]
        .into_iter()
        .collect();
        let later = ["snapshots"];
        assert_eq!(names(Kind::Root), design_root);
        assert_eq!(names(Kind::Sys), design_sys);
        assert_eq!(names(Kind::Machine), design_machine);
        assert!(later.iter().all(|name| !design_machine.contains(name)));
        assert_eq!(names(Kind::Wait), ["running", "stopped", "event", "console"].into_iter().collect());
        let job = "cmd argv cwd env user timeout tty stdin stdout stderr out exit status ctl";
        assert_eq!(names(Kind::Job), job.split(' ').collect());
    }
}
