//! The scripts in `scripts/examples/` do what they say.

use machinefs_tests::{Daemon, each_user, skip};
use std::path::PathBuf;

fn example(name: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../scripts/examples").join(name);
    std::fs::canonicalize(path).expect("the example is there").display().to_string()
}

/// Runs a script with `$X` an example and a scratch directory of its own as the working directory.
#[track_caller]
fn run(d: &Daemon, name: &str, script: &str) -> machinefs_tests::Outcome {
    let copy = d.tmp().join(format!("example-{name}"));
    // An ordinary user may not be let into the project's directory.
    std::fs::copy(example(name), &copy).expect("the example can be copied");
    d.give(&copy).expect("the example can be given away");
    let preamble =
        format!("export MACHINEFS_MOUNT=$M X={}; W=$(mktemp -d \"$T/{name}-XXXXXX\"); cd \"$W\"", copy.display());
    d.bash(&format!("{preamble}; {script}"))
}

/// Nothing is left of what an example made.
#[track_caller]
fn nothing_left(d: &Daemon, prefix: &str) {
    let names = d.exec(&["ls"]).ok().text();
    assert!(!names.lines().any(|name| name.starts_with(prefix)), "{names}");
}

each_user! {
    /// Builds a project in a fresh machine and brings back the result; a failure is the exit code.
    fn build(d) {
        let outcome = run(d, "build", r#"
            mkdir p; printf 'int main(void) { return 7; }\n' > p/a.c; printf 'a: a.c\n\tcc -o a a.c\n' > p/Makefile
            $X "$W/p" 'make && echo made' a; ./a || echo "ran: $?"; $X "$W/p" 'exit 5' a || echo "code: $?"
        "#).ok();
        assert!(outcome.text().ends_with("made\nran: 7\ncode: 5"), "{}", outcome.words());
        nothing_left(d, "build-");
    }
}

each_user! {
    /// Every command of the queue is run once, with its own exit code.
    fn pool(d) {
        let outcome = run(d, "pool", "for i in $(seq 20); do echo \"exit $i\"; done | $X 3 | sort -n").ok();
        let wanted: Vec<String> = (1..=20).map(|i| format!("{i}\texit {i}")).collect();
        assert_eq!(outcome.text(), wanted.join("\n"));
        nothing_left(d, "pool-");
    }
}

each_user! {
    /// The first bad commit is found.
    fn bisect(d) {
        let outcome = run(d, "bisect", r#"
            git init -q r; cd r
            for i in 1 2 3 4 5 6 7 8; do echo $i > n; git add n; git -c user.name=a -c user.email=a@b commit -qm $i; done
            test "$($X . HEAD~7 HEAD 'test $(cat n) -lt 6')" = "$(git rev-parse HEAD~2)"
        "#);
        outcome.ok();
        nothing_left(d, "bisect-");
    }
}

each_user! {
    /// A script nobody has read has no network and no way out of its limits.
    fn untrusted(d) {
        let outcome = run(d, "untrusted", r#"
            printf '#!/bin/sh\ntail -n +3 /proc/net/dev | cut -d: -f1; exit 9\n' > s; $X s || echo "code: $?"
        "#).ok();
        let lines: Vec<&str> = outcome.stdout.split(|byte| *byte == b'\n').map(|line| std::str::from_utf8(line).unwrap_or("?").trim()).collect();
        assert_eq!(lines, ["lo", "code: 9", ""]);
        nothing_left(d, "untrusted-");
    }
}

each_user! {
    /// A prompt knows what was defined before.
    fn repl(d) {
        let m = d.running("repl");
        let outcome = run(d, "repl", &format!("printf 'x = 20\\nx + 1\\nfor i in range(2): print(i)\\n\\n\"done\"\\n' | $X {}", m.name)).ok();
        assert_eq!(outcome.text(), "21\n0\n1\n'done'");
        if d.exec(&["sh", "-c", "command -v rc"]).code != 0 {
            skip!("Plan 9's shell, Debian's package rc, is not there");
        }
        let outcome = run(d, "repl.rc", &format!("printf 'X=5\\necho $((X + 1))\\n' | $X {}", m.name)).ok();
        assert_eq!(outcome.text(), "6");
        assert_eq!(m.bash("ls $D/jobs").text(), "");
    }
}
