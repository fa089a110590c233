//! The six lines at the top of DESIGN.md, under every shell, as root and as an ordinary user.

use machinefs_tests::{each_user, shells};

each_user! {
    /// mkdir, wait/running, exec, out, exit, an edit of files/etc/hosts, rmdir.
    fn six_lines(d) {
        for shell in shells() {
            let name = d.name("six");
            let script = r#"
                mkdir NAME
                cat NAME/wait/running > /dev/null
                echo 'echo "made by $((6 * 7))"; echo to-stderr >&2; hostname' > NAME/exec
                cat NAME/out > "$T/NAME"
                grep -qx 'made by 42' "$T/NAME"
                grep -qx to-stderr "$T/NAME"
                test "$(cat NAME/exit)" = 0
                test "$(cat NAME/status)" = running
                echo '192.0.2.7 example.test' >> NAME/files/etc/hosts
                echo 'grep -c example.test /etc/hosts' > NAME/exec
                test "$(cat NAME/out)" = 1
                rmdir NAME
                test ! -e NAME
            "#;
            d.sh(shell, &script.replace("NAME", &name)).ok();
        }
    }
}

each_user! {
    /// Output streams: what the command has printed can be read while it still runs.
    fn out_streams_while_the_command_runs(d) {
        let m = d.running("stream");
        for shell in shells() {
            m.guest("rm -f /root/go");
            // The command ends only after what it printed first was read here.
            m.sh(shell, r#"
                echo 'echo first; until [ -e /root/go ]; do sleep 0.05; done; echo last; exit 3' > $D/exec
                { read -r line; test "$line" = first; touch $D/files/root/go; read -r line; test "$line" = last; } < $D/out
                test "$(cat $D/exit)" = 3
            "#).ok();
        }
    }
}

each_user! {
    /// `exit "$(cat dev/exit)"`: the number alone, also for a signal (128 and its number).
    fn exit_is_the_number_alone(d) {
        let m = d.running("exit");
        for shell in shells() {
            for (script, code) in [("true", 0), ("exit 3", 3), ("kill -9 $$", 137), ("kill -TERM $$", 143), ("no-such-program", 127)] {
                let outcome = m.sh(shell, &format!("echo '{script}' > $D/exec; exit \"$(cat $D/exit)\""));
                assert_eq!(outcome.code, code, "{script} under {shell:?}: {}", outcome.words());
            }
        }
    }
}

each_user! {
    /// `out` can be read any number of times, from its first byte; before any job `out` and `exit` are empty.
    fn out_is_read_again_from_its_first_byte(d) {
        let m = d.running("again");
        assert_eq!(m.read("out"), "");
        assert_eq!(m.read("exit"), "");
        m.bash("echo 'echo one; echo two' > $D/exec; cat $D/exit").ok();
        for _ in 0..3 {
            assert_eq!(m.read("out"), "one\ntwo\n");
            assert_eq!(m.read("exit"), "0\n");
        }
    }
}

each_user! {
    /// `work` is a symlink to files/ and the working directory.
    fn work_leads_into_files(d) {
        let m = d.running("work");
        m.bash("test -L $D/work; test -d $D/work/; readlink $D/work | grep -q ^files/").ok();
        m.bash("echo here > $D/work/note").ok();
        assert_eq!(m.guest("cat note"), "here", "a job starts in the working directory");
    }
}

each_user! {
    /// The tree describes itself: README names every file of a machine, `ctl` reads as comments, `ls` shows it all.
    fn the_tree_describes_itself(d) {
        let m = d.running("tree");
        let wanted = "ctl status wait info info.json errors events health console exec out exit history jobs config files work";
        let listing = d.exec(&["ls", "-a", &m.name]).ok().text();
        let readme = d.read("README");
        for name in wanted.split(' ') {
            assert!(listing.lines().any(|line| line == name), "ls has no {name}:\n{listing}");
            assert!(readme.contains(name), "README says nothing of {name}");
        }
        for name in ["README", "ctl", "index", "index.json", ".sys"] {
            d.exec(&["test", "-e", name]).ok();
        }
        for name in ["version", "health", "metrics", "events", "wait/event"] {
            d.exec(&["test", "-f", &format!(".sys/{name}")]).ok();
        }
        for name in ["running", "stopped", "event", "console"] {
            d.exec(&["test", "-f", &m.path(&format!("wait/{name}"))]).ok();
        }
        for ctl in ["ctl".to_string(), m.path("ctl")] {
            let text = d.read(&ctl);
            assert!(!text.is_empty() && text.lines().all(|line| line.starts_with('#')), "{ctl} reads:\n{text}");
            // Copying it does nothing.
            d.bash(&format!("cat {ctl} > \"$T/ctl\"; cat \"$T/ctl\" > {ctl}")).ok();
        }
        assert_eq!(m.status(), "running");
        assert!(d.read("index").lines().any(|line| line.starts_with(&m.name) && line.contains("running")));
        m.python("import json; facts = json.load(open(f'{D}/info.json')); assert facts['id'] and facts['backend'] == 'container' and facts['pid'] > 1 and facts['uptime'] >= 0").ok();
        d.python("import json; assert all(m['uptime'] >= 0 for m in json.load(open('index.json')))").ok();
        assert!(m.read("health").starts_with("ok"));
    }
}

each_user! {
    /// jobs/N holds every exec: cmd, out, stdout, stderr, exit, status.
    fn every_exec_is_a_job(d) {
        let m = d.running("jobs");
        m.bash("echo 'echo to-out; echo to-err >&2; exit 5' > $D/exec; cat $D/exit").ok();
        let job = d.exec(&["ls", &m.path("jobs")]).ok().text();
        let file = |name: &str| m.read(&format!("jobs/{job}/{name}"));
        assert_eq!(file("cmd"), "echo to-out; echo to-err >&2; exit 5\n");
        assert_eq!(file("stdout"), "to-out\n");
        assert_eq!(file("stderr"), "to-err\n");
        assert_eq!(file("out").len(), "to-out\nto-err\n".len());
        assert_eq!(file("exit"), "5\n");
        assert!(!file("status").is_empty());
        let history = m.read("history");
        let line = history.lines().next().unwrap_or_default();
        let fields: Vec<&str> = line.split_whitespace().collect();
        assert_eq!(fields[0], job, "{history}");
        assert_eq!(fields[3], "5", "{history}");
        assert_eq!(fields[4], d.identity.uid.to_string(), "{history}");
        assert!(line.contains("to-out"), "{history}");
    }
}
