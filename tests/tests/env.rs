//! `env/`, `secrets/`, `tags/`: files that users make, each with one value.

use machinefs_tests::{Daemon, each_user, each_user_alone, shells};

each_user! {
    /// A variable is made by writing, read back, changed, removed by rm; every job started then has it. In every shell.
    fn variables_reach_jobs(d) {
        let m = d.running("env");
        for (number, shell) in shells().into_iter().enumerate() {
            let name = format!("V{number}");
            m.sh(shell, &format!("echo 'one two' > $D/env/{name}; test \"$(cat $D/env/{name})\" = 'one two'")).ok();
            assert_eq!(m.guest(&format!("printf %s \"${name}\"")), "one two");
            m.sh(shell, &format!("echo three > $D/env/{name}; ls $D/env | grep -qx {name}")).ok();
            assert_eq!(m.guest(&format!("printf %s \"${name}\"")), "three");
            m.sh(shell, &format!("rm $D/env/{name}; ! test -e $D/env/{name}")).ok();
            assert_eq!(m.guest(&format!("printf %s \"${{{name}-unset}}\"")), "unset");
        }
        // More than one line, quotes, other bytes, an empty one; the mode is 0600; inode numbers differ.
        m.python(r#"
for name, value in (('A', 'x\ny'), ('B', '$(id) `id` \'"'), ('_C1', ''), ('D', 'ä')):
    open(f'{D}/env/{name}', 'w').write(value + '\n')
    assert open(f'{D}/env/{name}').read() == value + '\n'
    facts = os.stat(f'{D}/env/{name}')
    assert stat.S_IMODE(facts.st_mode) == 0o600 and facts.st_size == len(value.encode()) + 1, facts
open(f'{D}/env/BYTES', 'wb').write(b'\xff\x01')
open(f'{D}/env/F', 'w').close()
assert sorted(os.listdir(f'{D}/env')) == ['A', 'B', 'BYTES', 'D', 'F', '_C1'], os.listdir(f'{D}/env')
assert len({os.stat(f'{D}/env/{name}').st_ino for name in os.listdir(f'{D}/env')}) == 6
"#).ok();
        let seen = m.guest("printf '%s|%s|%s|%s|' \"$A\" \"$B\" \"$_C1\" \"$D\"; printf %s \"$BYTES\" | od -An -tx1; env | grep -c '^F=$'");
        assert_eq!(seen, "x\ny|$(id) `id` '\"||ä| ff 01\n1");
    }
}

each_user! {
    /// Bad names and values are refused where they are written; nothing else can be made there.
    fn refusals(d) {
        let m = d.running("badenv");
        for name in ["1A", "A-B", "A.B", "A=B"] {
            m.bash(&format!("echo x > '{}/env/{name}'", m.name)).fails_with("Invalid argument");
            m.bash(&format!("echo x > '{}/secrets/{name}'", m.name)).fails_with("Invalid argument");
        }
        m.bash("printf 'a\\0b' > $D/env/NUL").fails_with("Invalid argument");
        m.bash("printf 'two\\nlines\\n' > $D/tags/lines").fails_with("Invalid argument");
        m.bash("echo x > $D/tags/.swp").fails_with("Invalid argument");
        m.bash("mkdir $D/env/DIR").fails_with("not permitted");
        m.bash("ln -s x $D/env/LINK").fails_with("not permitted");
        m.bash("echo x > $D/nosuch").fails_with("not permitted");
        m.bash("rm $D/env/NOSUCH").fails_with("No such file");
        m.bash("touch $D/env/A; mv $D/env/A $D/env/B").fails_with("not permitted");
        m.bash("set -C; echo x > $D/env/A").fails();
        let errors = m.read("errors");
        assert!(errors.contains("A-B") && errors.contains("NUL"), "{errors}");
    }
}

each_user! {
    /// A secret reaches jobs, is listed by name, and can be read by nobody, root included.
    fn secrets_are_written_and_never_read(d) {
        let m = d.running("secret");
        m.bash("echo hunter2-first > $D/secrets/TOKEN; echo hunter2-word > $D/secrets/TOKEN; ls $D/secrets | grep -qx TOKEN").ok();
        assert_eq!(m.guest("printf %s \"$TOKEN\""), "hunter2-word");
        m.bash("cat $D/secrets/TOKEN").fails_with("Permission denied");
        m.python("assert stat.S_IMODE(os.stat(f'{D}/secrets/TOKEN').st_mode) == 0o200\nassert os.stat(f'{D}/secrets/TOKEN').st_size == 0").ok();
        m.bash("exec 3<> $D/secrets/TOKEN").fails();
        // It goes before a variable of its name.
        m.bash("echo plain > $D/env/TOKEN").ok();
        assert_eq!(m.guest("printf %s \"$TOKEN\""), "hunter2-word");
        m.bash("rm $D/secrets/TOKEN").ok();
        assert_eq!(m.guest("printf %s \"$TOKEN\""), "plain");
    }
}

each_user_alone! {
    /// After use, a secret is nowhere: the daemon's log, its state directory, the tree's own files, its process's memory
    /// for others, the guest's disk. The key is outside the state directory, 0600, and without it nothing opens.
    fn a_secret_is_nowhere(user) {
        let d = Daemon::start_with(user, |_| vec!["--log".into(), "trace".into()]);
        let m = d.running("nowhere");
        // Put together here, so that no command line has it.
        let secret = ["zq7", "Plover", "41"].concat();
        let file = d.tmp().join("secret");
        std::fs::write(&file, &secret).expect("a file");
        d.give(&file).expect("chown");
        m.bash("cat $T/secret > $D/secrets/TOKEN; printf 'x\\0%s' \"$(cat $T/secret)\" > $D/secrets/TOKEN 2> /dev/null || true; rm $T/secret").ok();
        assert_eq!(m.guest("printf %s \"$TOKEN\" | wc -c"), secret.len().to_string());
        m.bash("cat $D/{info,info.json,events,errors,history,console,usage} .sys/{events,metrics,health} index > $T/seen; ls -lR $D/secrets >> $T/seen").ok();
        let hits = |path: &std::path::Path| {
            let mut grep = std::process::Command::new("grep");
            grep.args(["-r", "-l", "-a", "-F", "-e", &secret]).arg(path);
            String::from_utf8_lossy(&grep.output().expect("grep").stdout).into_owned()
        };
        let state = d.state.clone();
        for path in [d.base.join("log"), state, d.tmp()] {
            assert_eq!(hits(&path), "", "in {}", path.display());
        }
        // No core file, and no look into its memory by others of its user: what is so in /proc is root's (proc(5)).
        if user == machinefs_tests::User::Ordinary {
            let owner = std::fs::metadata(format!("/proc/{}/environ", d.pid())).expect("environ");
            assert_eq!(std::os::unix::fs::MetadataExt::uid(&owner), 0, "the daemon's memory can be dumped");
        }
        let key = d.base.join("key");
        let mode = std::os::unix::fs::PermissionsExt::mode(&key.metadata().expect("the key").permissions());
        assert_eq!(mode & 0o777, 0o600);
        // It is there after a crash, sealed with that key.
        d.crash();
        m.until_running();
        assert_eq!(m.guest("printf %s \"$TOKEN\" | wc -c"), secret.len().to_string());
        d.kill();
        std::fs::remove_file(&key).expect("the key");
        d.boot();
        let (_, code) = m.run("true");
        assert_eq!(code, 126, "a job does not run with half of its environment");
        assert!(m.read("errors").contains("key"), "{}", m.read("errors"));
        m.bash("rm $D/secrets/TOKEN").ok();
        m.guest("true");
    }
}

each_user! {
    /// git in the machine has the token of `secrets/GITHUB_TOKEN` for github.com, and for no other server.
    fn git_has_the_token(d) {
        let m = d.running("git");
        if m.run("command -v git").1 != 0 {
            println!("skipped: no git in the machine");
            return;
        }
        let ask = |host: &str| {
            m.run(&format!("export GIT_TERMINAL_PROMPT=0; printf 'protocol=https\\nhost={host}\\n\\n' | git credential fill 2>&1")).0
        };
        assert!(!ask("github.com").contains("password="));
        m.bash("echo ghp_first > $D/secrets/GITHUB_TOKEN; echo ghp_second > $D/secrets/GITHUB_TOKEN").ok();
        assert!(ask("github.com").contains("password=ghp_second"), "{}", ask("github.com"));
        assert!(!ask("example.com").contains("password="));
        // It is there after a stop and a start, and gone when it is removed.
        m.ctl("restart").ok();
        m.bash("cat $D/wait/running").ok();
        m.until_running();
        assert!(ask("github.com").contains("password=ghp_second"), "{}", ask("github.com"));
        m.bash("rm $D/secrets/GITHUB_TOKEN").ok();
        assert!(!ask("github.com").contains("password="));
    }
}

each_user! {
    /// Tags are in info; events have their names.
    fn tags(d) {
        let m = d.running("tag");
        m.bash("echo 'blue team' > $D/tags/team; touch $D/tags/v1.0-rc; test \"$(cat $D/tags/team)\" = 'blue team'").ok();
        assert!(m.read("info").lines().any(|line| line == "tag team blue team"), "{}", m.read("info"));
        assert!(m.read("events").lines().any(|line| line.ends_with("tag set=team")), "{}", m.read("events"));
        m.python("import json; assert json.load(open(f'{D}/info.json'))['tag'] == ['team blue team', 'v1.0-rc ']").ok();
        m.bash("rm $D/tags/team").ok();
        assert!(!m.read("info").contains("team"), "{}", m.read("info"));
    }
}

each_user_alone! {
    /// All of it outlives a crash of the daemon, with its inode numbers; another user sees none of it.
    fn they_outlive_the_daemon(user) {
        let d = Daemon::start(user);
        let m = d.running("outlive");
        m.bash("echo 1 > $D/env/A; echo 2 > $D/env/B; echo 3 > $D/env/C; rm $D/env/B; echo t > $D/tags/t").ok();
        let numbers = m.bash("stat -c '%n %i' $D/env/* $D/tags/*").text();
        d.crash();
        m.until_running();
        assert_eq!(m.bash("stat -c '%n %i' $D/env/* $D/tags/*").text(), numbers);
        assert_eq!(m.guest("echo $A$B$C"), "13");
        m.bash("rm -r $D; test ! -e $D").ok();
    }
}
