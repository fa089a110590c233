//! Every way a program writes a text: what was written is one job, and it is whole (REFERENCES.md 2, the table of
//! writers).

use machinefs_tests::shell::have;
use machinefs_tests::{Machine, Shell, each_user, shells, skip_part};

/// A script of so many lines that notices when a line of it is missing, doubled or out of order. Each is padded to
/// about `width` bytes.
fn counting(lines: usize, width: usize) -> String {
    let pad = "x".repeat(width.saturating_sub(20));
    let mut text =
        "c=0; n() { c=$((c+1)); [ \"$c\" = \"$1\" ] || { echo \"line $1 came as $c\"; exit 3; }; }\n".to_string();
    for line in 1..=lines {
        text.push_str(&format!("n {line} {pad}\n"));
    }
    text.push_str("echo whole $c\n");
    text
}

/// Puts a text where the shells find it: `$T/NAME`.
fn put(m: &Machine<'_>, name: &str, text: &str) {
    let path = m.daemon.tmp().join(name);
    std::fs::write(&path, text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}

/// Runs a script on the host that writes to `$D/exec`; it must make exactly `jobs` jobs, whose last prints `output`.
#[track_caller]
fn expect(m: &Machine<'_>, shell: Shell, script: &str, jobs: usize, output: &str) {
    let before = m.jobs();
    m.sh(shell, script).ok();
    let printed = m.sh(shell, "cat $D/out; test \"$(cat $D/exit)\" = 0").ok().text();
    assert_eq!(printed, output, "{script} under {shell:?}");
    assert_eq!(m.jobs() - before, jobs, "jobs of {script} under {shell:?}:\n{}", m.read("history"));
}

each_user! {
    /// echo and printf of the shells, of 1, 3 and 3,000 lines.
    fn echo_and_printf(d) {
        let m = d.running("echo");
        for (name, lines) in [("three", 3), ("many", 3000)] {
            put(&m, name, &counting(lines, 24));
        }
        for shell in shells() {
            expect(&m, shell, "echo 'echo one' > $D/exec", 1, "one");
            expect(&m, shell, "echo 'echo one' >> $D/exec", 1, "one");
            expect(&m, shell, "printf 'echo a\\necho b\\n' > $D/exec", 1, "a\nb");
            for (name, lines) in [("three", 3), ("many", 3000)] {
                let whole = format!("whole {lines}");
                expect(&m, shell, &format!("text=$(cat $T/{name}); echo \"$text\" > $D/exec"), 1, &whole);
                expect(&m, shell, &format!("text=$(cat $T/{name}); printf '%s\\n' \"$text\" > $D/exec"), 1, &whole);
                expect(&m, shell, &format!("/usr/bin/printf '%s\\n' \"$(cat $T/{name})\" > $D/exec"), 1, &whole);
            }
        }
    }
}

each_user! {
    /// A heredoc, and groups: `{ echo a; echo b; } > exec` is one text.
    fn heredoc_and_groups(d) {
        let m = d.running("here");
        for shell in shells() {
            expect(&m, shell, "cat > $D/exec <<'END'\nx=1\nfor i in 1 2 3; do\n  x=$((x * 2))\ndone\necho $x\nEND", 1, "8");
            expect(&m, shell, "{ echo 'a=1'; echo 'echo got $a'; } > $D/exec", 1, "got 1");
            expect(&m, shell, "(echo 'a=1'; echo 'echo got $a') > $D/exec", 1, "got 1");
        }
    }
}

each_user! {
    /// Two texts on one open file, by flush: `exec 3>exec; echo a >&3; echo b >&3` are two jobs; so are two `cat`s.
    fn two_texts_on_one_open_file(d) {
        let m = d.running("two");
        put(&m, "a", "echo from-a\n");
        put(&m, "b", "echo from-b\n");
        for shell in shells() {
            let before = m.jobs();
            m.sh(shell, "exec 3> $D/exec; echo 'echo a' >&3; echo 'echo b' >&3; exec 3>&-; cat $D/exit").ok();
            assert_eq!(m.jobs() - before, 2, "exec 3> under {shell:?}\n{}", m.read("history"));
            let before = m.jobs();
            m.sh(shell, "{ cat $T/a; cat $T/b; } > $D/exec; cat $D/exit").ok();
            assert_eq!(m.jobs() - before, 2, "two cats under {shell:?}\n{}", m.read("history"));
        }
    }
}

each_user! {
    /// Programs that copy a text of 300 KB, each in its own pieces.
    fn copying_programs(d) {
        let m = d.running("copy");
        put(&m, "text", &counting(3000, 100));
        let programs = [
            ("cat", "cat $T/text > $D/exec"),
            ("cat", "cat < $T/text >> $D/exec"),
            ("cp", "cp $T/text $D/exec"),
            ("dd", "dd if=$T/text of=$D/exec bs=1000 2>/dev/null"),
            ("dd", "dd if=$T/text of=$D/exec bs=1M conv=notrunc 2>/dev/null"),
            ("tee", "tee $D/exec < $T/text > /dev/null"),
            ("tee", "cat $T/text | tee -a $D/exec > /dev/null"),
            ("sed", "sed -n p $T/text > $D/exec"),
            ("awk", "awk 1 $T/text > $D/exec"),
            ("gawk", "gawk 1 $T/text > $D/exec"),
            ("head", "head -c 10000000 $T/text > $D/exec"),
            ("busybox", "busybox cat $T/text > $D/exec"),
            ("busybox", "busybox cp $T/text $D/exec"),
            ("busybox", "busybox tee $D/exec < $T/text > /dev/null"),
            ("busybox", "busybox sed -n p $T/text > $D/exec"),
            ("busybox", "busybox awk 1 $T/text > $D/exec"),
            ("perl", "perl -pe1 $T/text > $D/exec"),
            ("perl", "perl -e 'open(O, \">\", $ARGV[1]); open(I, $ARGV[0]); print O $_ while <I>; close(O) or die' $T/text $D/exec"),
            ("python3", "python3 -c 'import sys; f = open(sys.argv[2], \"w\"); [f.write(l) for l in open(sys.argv[1])]; f.close()' $T/text $D/exec"),
            ("python3", "python3 -c 'import sys, shutil; shutil.copyfile(*sys.argv[1:])' $T/text $D/exec"),
            ("python3", "python3 -c 'import sys, pathlib as p; p.Path(sys.argv[2]).write_bytes(p.Path(sys.argv[1]).read_bytes())' $T/text $D/exec"),
            ("node", "node -e 'const fs = require(\"fs\"), a = process.argv; fs.writeFileSync(a[2], fs.readFileSync(a[1]))' $T/text $D/exec"),
            ("node", "node -e 'const fs = require(\"fs\"), a = process.argv; fs.createReadStream(a[1]).pipe(fs.createWriteStream(a[2]))' $T/text $D/exec"),
        ];
        for (program, script) in programs {
            if have(program) {
                expect(&m, Shell::Bash, script, 1, "whole 3000");
            } else {
                skip_part!("{program} is not installed");
            }
        }
    }
}

each_user! {
    /// Go, which sets O_NONBLOCK and polls every file: it writes exec and reads out and exit.
    fn go(d) {
        if !have("go") {
            machinefs_tests::skip!("go is not installed");
        }
        let m = d.running("go");
        put(&m, "text", &counting(3000, 100));
        put(&m, "main.go", r#"package main

import ("fmt"; "io"; "os")

func check(err error) { if err != nil { fmt.Fprintln(os.Stderr, err); os.Exit(1) } }

func main() {
    dir := os.Args[1]
    text, err := os.ReadFile(os.Args[2])
    check(err)
    check(os.WriteFile(dir+"/exec", text, 0600))
    out, err := os.Open(dir + "/out")
    check(err)
    _, err = io.Copy(os.Stdout, out)
    check(err)
    code, err := os.ReadFile(dir + "/exit")
    check(err)
    fmt.Printf("exit %s", code)
    // The private form.
    f, err := os.OpenFile(dir+"/exec", os.O_RDWR, 0)
    check(err)
    _, err = f.Write([]byte("sleep 0.2; echo private; exit 4\n"))
    check(err)
    bytes, err := io.ReadAll(f)
    check(err)
    more := make([]byte, 100)
    n, err := f.Read(more)
    check(err)
    fmt.Printf("%s%s", bytes, more[:n])
}
"#);
        m.bash("export HOME=$T GOCACHE=$T/gocache GO111MODULE=off; go build -o $T/gotest $T/main.go").ok();
        let before = m.jobs();
        let printed = m.bash("exec $T/gotest $D $T/text").ok().text();
        assert_eq!(printed, "whole 3000\nexit 0\nprivate\nexit 4");
        assert_eq!(m.jobs() - before, 2, "{}", m.read("history"));
    }
}

each_user! {
    /// A script of 2 MiB by cat, cp, tee, one write(2) of 1 MiB and more, under every shell.
    fn two_mebibytes(d) {
        let m = d.running("large");
        let text = counting(4096, 540);
        assert!(text.len() >= 2 << 20);
        put(&m, "large", &text);
        for shell in shells() {
            for script in ["cat $T/large > $D/exec", "cp $T/large $D/exec", "tee $D/exec < $T/large > /dev/null"] {
                expect(&m, shell, script, 1, "whole 4096");
            }
        }
        expect(
            &m,
            Shell::Bash,
            "python3 -c 'import os, sys; t = open(sys.argv[1], \"rb\").read(); f = os.open(sys.argv[2], os.O_WRONLY); \
             n = os.write(f, t[:(1 << 20) + 77]); os.write(f, t[n:])' $T/large $D/exec",
            1,
            "whole 4096",
        );
    }
}

each_user! {
    /// A text that lies on the same mount: copy_file_range is refused, splice and read do it.
    fn a_script_from_files(d) {
        let m = d.running("inside");
        put(&m, "text", &counting(3000, 100));
        m.bash("cp $T/text $D/files/root/text").ok();
        for script in ["cat $D/files/root/text > $D/exec", "cp $D/files/root/text $D/exec", "busybox cat $D/files/root/text > $D/exec"] {
            expect(&m, Shell::Bash, script, 1, "whole 3000");
        }
    }
}

each_user! {
    /// A text that begins with `#!` is run by that interpreter, with its argument.
    fn interpreters(d) {
        let m = d.running("hashbang");
        put(&m, "python", "#!/usr/bin/env python3\nimport sys\nprint('python', sys.version_info.major)\n");
        put(&m, "perl", "#!/usr/bin/perl -l\nprint 6 * 7;\n");
        put(&m, "strict", "#!/bin/sh -e\nfalse\necho not reached\n");
        for shell in shells() {
            expect(&m, shell, "cat $T/python > $D/exec", 1, "python 3");
            expect(&m, shell, "cp $T/perl $D/exec", 1, "42");
            m.sh(shell, "cat $T/strict > $D/exec; test -z \"$(cat $D/out)\"; test \"$(cat $D/exit)\" = 1").ok();
        }
        m.bash("printf '#!/no/such/interpreter\\n' > $D/exec; test \"$(cat $D/exit)\" = 127").ok();
    }
}

each_user! {
    /// A text of more than 16 MiB is E2BIG, and starts nothing: its job ends with 126, so that `exit` is not that of the
    /// job before.
    fn too_big(d) {
        let m = d.running("toobig");
        m.bash("head -c 17000000 /dev/zero | tr '\\0' '#' > $T/toobig").ok();
        m.bash("cat $T/toobig > $D/exec").fails_with("Argument list too long");
        m.bash("echo 'echo after' > $D/exec; test \"$(cat $D/out)\" = after").ok();
        assert_eq!(m.read("jobs/1/exit"), "126\n");
        assert_eq!(m.jobs(), 2, "{}", m.read("history"));
    }
}
