//! The text of `/README` and `/.ignore`, made from the table of nodes, the verbs and the configuration keys.

use super::node::Kind;
use super::table::{self, TABLE};
use crate::machine::jobs::JOB_VERBS;
use crate::machine::{VERBS, Verb, config, root_verbs};
use std::fmt::Write as _;

const INTRODUCTION: &str = "\
Each directory here is a machine.

  mkdir dev                          boots a machine, returns at once
  cat dev/wait/running               blocks until it is up; fails if it cannot come up
  echo 'make -j4 test' > dev/exec    runs it in the machine
  cat dev/out                        streams what it prints, until it ends
  cat dev/exit                       0
  ls dev/files/etc                   the machine's own files
  rmdir dev                          gone; rm -r dev means the same

Names: letters, digits and -, at most 63, not beginning with -. mktemp -d XXXXXX names one for you.
";

const RULES: &str = "\
Everything is text. Discover by ls, learn by cat, act by echo. What is read can be written back.
Only these block: out, stdout, stderr and exit while their job runs, and what is in a wait directory. Ctrl-C ends them;
opened with O_NONBLOCK they give EAGAIN; poll works.
A refused write fails with an error number. The reason can be read on the same open file, and in the machine's errors:
  exec 3<>dev/ctl; echo strat >&3 || cat <&3
A script is all that is written to exec until the writer closes it, up to 16 MiB, and runs in the machine's shell; one
that begins with #! is run by that interpreter. Scripts run side by side; to have an order, read exit in between.
Opened for reading and writing, exec is private: the output of the script to its end, then `exit CODE`, then the next:
  exec 3<>dev/exec; echo make >&3; cat <&3; read _ code <&3
A job that needs more than a script is set up in a directory: its values, its input, and last cmd, which starts it:
  j=$(mktemp -d dev/jobs/XXXXXX); echo /srv > $j/cwd; echo 10m > $j/timeout; exec 3> $j/stdin; echo 'wc -l' > $j/cmd
  seq 5 >&3; exec 3>&-; cat $j/stdout; cat $j/exit; rmdir $j
machinefs exec dev -- PROGRAM ARGUMENT… and machinefs attach dev (a terminal) do that by these files.
exit is 137 for a job that was killed, 124 for one that took too long; the words are in its status.
While a machine boots, exec and files wait for it. On a stopped machine both fail: Host is down.
Lines of ctl: VERB ARGUMENT… KEY=VALUE…; 'it''s' quotes; # begins a comment.
";

/// The text of `README`.
pub fn readme() -> String {
    let mut text = String::from(INTRODUCTION);
    section(&mut text, "Rules");
    text.push_str(RULES);
    section(&mut text, "Files");
    let width = TABLE.iter().map(|row| path(row).len()).max().unwrap_or(0);
    for row in TABLE {
        line(&mut text, &path(row), width, row.doc);
    }
    section(&mut text, "Commands of ctl");
    verbs(&mut text, root_verbs::VERBS);
    section(&mut text, "Commands of NAME/ctl");
    verbs(&mut text, VERBS);
    section(&mut text, "Commands of NAME/jobs/JOB/ctl");
    verbs(&mut text, JOB_VERBS);
    section(&mut text, "Keys of NAME/config");
    let width = config::KEYS.iter().map(|key| key.name.len()).max().unwrap_or(0);
    for key in config::KEYS {
        line(&mut text, key.name, width, &format!("{} [{}; {}]", key.doc, key.takes(), key.default));
    }
    text
}

fn section(text: &mut String, title: &str) {
    // Writing to a String cannot fail.
    let _ = write!(text, "\n{title}\n\n");
}

fn line(text: &mut String, name: &str, width: usize, doc: &str) {
    let _ = writeln!(text, "  {name:width$}  {doc}");
}

fn verbs(text: &mut String, verbs: &[Verb]) {
    let width = verbs.iter().map(|verb| verb.usage.chars().count()).max().unwrap_or(0);
    for verb in verbs {
        line(text, verb.usage, width, verb.doc);
    }
}

/// The path of a table row, with what stands for users' names, and a slash after directories.
fn path(row: &table::Row) -> String {
    let mut path = format!("{}{}", row.name, if row.kind.is_dir() { "/" } else { "" });
    let mut parent = row.parent;
    while let Some(above) = table::of(parent) {
        path = format!("{}/{path}", above.name);
        parent = above.parent;
    }
    path
}

/// The text of `.ignore` (the syntax of gitignore, read by rg, fd and editors): what blocks, and the guest's kernel.
pub fn ignore() -> String {
    format!("{IGNORED}/.sys/wait/\n{}", blocking("/*"))
}

/// The text of a machine's `.ignore`: not every rg looks into the directories above the one it is given.
pub fn machine_ignore() -> String {
    format!("{IGNORED}{}", blocking(""))
}

const IGNORED: &str = "# These files block, or are not files of a project.\n";

/// Patterns of what blocks in a machine whose directory matches `machine`.
fn blocking(machine: &str) -> String {
    let blocking = TABLE.iter().filter(|row| {
        matches!(row.kind, Kind::Out | Kind::Exit | Kind::JobOut | Kind::JobStdout | Kind::JobStderr | Kind::JobExit)
    });
    let mut text = format!("{machine}/wait/\n");
    for row in blocking {
        let _ = writeln!(text, "{}", path(row).replace("NAME", machine).replace("/JOB/", "/*/"));
    }
    let _ = writeln!(text, "{machine}/files/proc/\n{machine}/files/sys/");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_readme_tells_of_every_file_verb_and_key() {
        let text = readme();
        for row in TABLE {
            let line = text.lines().find(|line| line.split_whitespace().next() == Some(path(row).as_str()));
            assert!(line.is_some_and(|line| line.ends_with(row.doc)), "{}", path(row));
        }
        for verb in root_verbs::VERBS.iter().chain(VERBS).chain(JOB_VERBS) {
            assert!(text.contains(verb.usage) && text.contains(verb.doc), "{}", verb.name);
        }
        for key in config::KEYS {
            assert!(text.contains(&format!("  {} ", key.name)), "{}", key.name);
        }
        assert!(text.ends_with('\n') && !text.contains('\t'));
    }

    #[test]
    fn paths() {
        let path_of = |kind| path(table::of(kind).unwrap());
        assert_eq!(path_of(Kind::JobCmd), "NAME/jobs/JOB/cmd");
        assert_eq!(path_of(Kind::SysWait), ".sys/wait/");
        assert_eq!(path_of(Kind::Readme), "README");
    }

    #[test]
    fn what_blocks_is_ignored() {
        let expected = "/.sys/wait/ /*/wait/ /*/out /*/exit /*/jobs/*/out /*/jobs/*/stdout /*/jobs/*/stderr /*/jobs/*/exit \
                        /*/files/proc/ /*/files/sys/";
        assert_eq!(ignore().lines().skip(1).collect::<Vec<_>>().join(" "), expected);
        assert_eq!(
            machine_ignore().lines().skip(1).collect::<Vec<_>>().join(" "),
            expected[12..].replace("/*/", "/").replace("jobs/", "jobs/*/")
        );
    }
}
