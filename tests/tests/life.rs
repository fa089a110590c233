//! What happens to machines by the clock and by their main process, and how much of them there may be.

use machinefs_tests::{Daemon, Machine, User, each_user, each_user_alone, eventually, user};

fn waits_for(m: &Machine<'_>, event: &str) {
    let there = eventually(40, || m.read("events").lines().any(|line| line.contains(event)));
    assert!(there, "no {event} in\n{}", m.read("events"));
}

each_user! {
    /// After idle_timeout without use it stops, and says so; reading does not wake it, exec does. A stop by its owner is
    /// a stop.
    fn idle_and_awake(d) {
        let m = d.create("idle", "idle_timeout=2s");
        m.until_running();
        m.bash("echo kept > $D/files/root/kept").ok();
        waits_for(&m, "nobody used it");
        m.until_status("stopped");
        assert_eq!(m.info("idle"), "yes");
        m.bash("ls $D/files/").fails_with("Host is down");
        m.bash("cat $D/files/root/kept").fails_with("Host is down");
        m.bash("ls -lR $D > /dev/null 2>&1 || true; find $D -maxdepth 2 > /dev/null 2>&1 || true; cat $D/wait/running 2> /dev/null || true").ok();
        assert_eq!(m.status(), "stopped", "reading does not wake it");
        assert_eq!(m.guest("cat /root/kept"), "kept");
        assert_eq!((m.info("idle").as_str(), m.status().as_str()), ("no", "running"));
        m.ctl("stop").ok();
        m.until_status("stopped");
        assert_eq!(m.info("idle"), "no");
        m.bash("echo true > $D/exec").fails_with("Host is down");
    }
}

each_user! {
    /// Opening for writing below files/ wakes it, in every way that a program opens; the boot is waited for.
    fn writing_wakes(d) {
        let m = d.create("wake", "idle_timeout=1s boot_wait=1m");
        for script in ["echo one > $D/files/root/a", "echo two >> $D/files/root/b", "mkdir $D/files/root/dir", "rm $D/files/root/a"] {
            m.until_running();
            let rests = eventually(40, || m.status() == "stopped");
            assert!(rests, "{}", m.read("events"));
            m.bash("head -c1 $D/files/root/b").fails_with("Host is down");
            m.bash(script).ok();
        }
        assert_eq!(m.guest("cat /root/b; ls /root"), "two\nb\ndir");
    }
}

each_user! {
    /// A job that runs is use; a job given while it goes to rest runs when it is awake again.
    fn a_job_is_use(d) {
        let m = d.create("use", "idle_timeout=1s");
        m.until_running();
        assert_eq!(m.guest("sleep 4; echo done"), "done");
        assert!(!m.read("events").contains("nobody used it"));
        // Slow to stop: it asks a process that will not go.
        m.bash("echo 'trap \"\" TERM; (trap \"\" TERM; sleep 1000) > /dev/null 2>&1 < /dev/null & ' > $D/exec; cat $D/exit").ok();
        let stops = eventually(40, || ["stopping", "stopped"].contains(&m.status().as_str()));
        assert!(stops, "{}", m.read("events"));
        assert_eq!(m.guest("echo awake"), "awake");
        assert_eq!(m.status(), "running");
    }
}

each_user! {
    /// on_idle: pause freezes and thaws, where the host can; destroy destroys, but not what is protected.
    fn other_ways_to_rest(d) {
        let m = d.create("pause", "idle_timeout=1s on_idle=pause");
        m.until_running();
        m.bash("echo kept > $D/files/root/kept").ok();
        let ended = eventually(40, || m.status() == "paused" || m.read("errors").contains("freezer"));
        assert!(ended, "{}", m.read("events"));
        if m.status() == "paused" {
            m.bash("cat $D/files/root/kept").fails_with("Host is down");
            assert_eq!(m.status(), "paused");
            assert_eq!(m.guest("cat /root/kept"), "kept");
            m.until_status("paused");
            m.bash("echo more >> $D/files/root/kept").ok();
            assert_eq!(m.guest("cat /root/kept"), "kept\nmore");
        } else {
            machinefs_tests::skip_part!("this host cannot freeze machines");
        }
        let gone = d.create("gone", "idle_timeout=1s on_idle=destroy");
        let kept = d.create("kept", "idle_timeout=1s on_idle=destroy protect=yes lifetime=2s");
        assert!(eventually(40, || d.exec(&["test", "-e", &gone.name]).code != 0), "{}", d.read("index"));
        assert_eq!(kept.status(), "running");
        kept.bash("echo no > $D/config/protect").ok();
        assert!(eventually(40, || d.exec(&["test", "-e", &kept.name]).code != 0), "its lifetime is over");
    }
}

each_user! {
    /// The main process is the job `main`; when it ends for good, the machine stops; restart wants it again.
    fn the_main_process(d) {
        let m = d.create("main", "restart=on-failure autostart=no");
        m.until_status("stopped");
        m.bash("echo 'echo started; test -e /root/fail && exit 3; exec sleep 1000' > $D/config/command; echo start > $D/ctl").ok();
        m.until_running();
        let runs = eventually(40, || d.exec(&["grep", "-q", "state running", &m.path("jobs/main/status")]).code == 0);
        assert!(runs, "{}", m.read("events"));
        assert_eq!(m.bash("ls $D/jobs").text(), "main");
        assert_eq!(m.guest("echo mine"), "mine");
        assert_eq!(m.read("out"), "mine\n", "out is of what exec was given");
        m.guest("touch /root/fail; pkill -x sleep");
        let failed = eventually(40, || m.read("history").lines().filter(|line| line.contains(" 3 ")).count() >= 2);
        assert!(failed, "it is tried again:\n{}", m.read("history"));
        m.guest("rm /root/fail");
        let again = eventually(60, || d.exec(&["grep", "-q", "state running", &m.path("jobs/main/status")]).code == 0);
        assert!(again, "{}", m.read("history"));
        m.ctl("set restart=no").ok();
        // The machine stops under it.
        m.bash("echo 'pkill -x sleep' > $D/exec").ok();
        m.until_status("stopped");
        waits_for(&m, "command");
        m.ctl("start").ok();
        m.until_running();
        let main_runs = || d.exec(&["grep", "-q", "state running", &m.path("jobs/main/status")]).code == 0;
        assert!(eventually(40, main_runs));
        // It ends with a restart of the machine, which is no reason to stop that.
        let init = m.info("pid");
        m.ctl("restart").ok();
        let anew = eventually(60, || m.status() == "running" && m.info("pid") != init && main_runs());
        assert!(anew, "{} {}", m.status(), m.read("events"));
    }
}

each_user! {
    /// A machine that was lost comes back where its policy wants that.
    fn a_lost_machine_comes_back(d) {
        let (m, other) = (d.create("lost", "restart=always"), d.running("left"));
        m.until_running();
        let kill = |m: &Machine<'_>| {
            let init = m.init().to_string();
            d.exec(&["kill", "-9", &init]);
            init
        };
        let before = kill(&m);
        kill(&other);
        let back = eventually(40, || m.status() == "running" && m.info("pid") != before);
        assert!(back, "{}\n{}", m.status(), m.read("events"));
        other.until_status("lost");
        m.ctl("stop").ok();
        m.until_status("stopped");
    }
}

each_user_alone! {
    /// Machines and memory, in all and of one user: EDQUOT, ENOSPC, with the limit's name where the reason can be read.
    fn limits(user) {
        let d = Daemon::start_with(user, |_| {
            ["--max-machines", "3", "--max-user-memory", "1G", "--default", "memory=200M"].map(String::from).to_vec()
        });
        d.bash("for n in a b; do echo create $n autostart=no > ctl; done").ok();
        d.bash("echo create c memory=700M > ctl").fails_with("Disk quota exceeded");
        d.bash("exec 3<> ctl; echo create c memory=700M >&3 || cat <&3 | grep max_user_memory").ok();
        d.bash("echo create c memory=max > ctl").fails_with("Invalid argument");
        d.bash("echo set memory=900M > a/ctl").fails_with("Disk quota exceeded");
        d.bash("echo 900M > a/config/memory").fails_with("Disk quota exceeded");
        d.bash("echo set memory=800M > a/ctl; echo 200M > a/config/memory; echo create c memory=600M autostart=no > ctl").ok();
        d.exec(&["mkdir", "d"]).fails_with("No space left");
        assert!(d.read(".sys/events").lines().any(|line| line.contains(" d refused ") && line.contains("max_machines")));
        // At once: no more than there is room for.
        d.bash("rmdir c; for n in $(seq 20); do mkdir p$n 2> /dev/null & done; wait; set -- p*; test $# = 1").ok();
    }
}

each_user! {
    /// `usage`: key and number a line, true sizes, and it counts.
    fn usage(d) {
        let m = d.running("usage");
        m.guest("i=0; while test $i -lt 100000; do i=$((i+1)); done");
        m.guest("sleep 1");
        m.bash("test \"$(stat -c %s $D/usage)\" = \"$(cat $D/usage | wc -c)\"; awk 'NF != 2 || $2 !~ /^[0-9.]+$/ {exit 1}' $D/usage").ok();
        let value = |key: &str| m.bash(&format!("awk '$1 == \"{key}\" {{print $2}}' $D/usage")).text().parse::<f64>().expect("a number");
        assert_eq!(value("jobs"), 2.0);
        assert!(value("job_seconds") >= 1.0);
        assert!(value("uptime_seconds") >= 1.0);
        assert!(value("cpu_seconds") > 0.0 || user::am_root() && d.user == User::Ordinary, "{}", m.read("usage"));
    }
}

each_user! {
    /// `.sys/metrics` is OpenMetrics, for a real parser.
    fn metrics(d) {
        let m = d.running("metrics");
        m.guest("true");
        let parser = "from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse\n\
                      import sys\n\
                      families = {family.name: family for family in parse(open(sys.argv[1]).read())}\n\
                      states = {s.labels['state']: s.value for s in families['machinefs_machines'].samples}\n\
                      assert states['running'] >= 1, states\n\
                      assert families['machinefs_jobs_ended'].type == 'counter'\n\
                      assert families['machinefs_jobs_ended'].samples[0].value >= 1\n\
                      assert families['machinefs_uptime_seconds'].unit == 'seconds'\n";
        let python = std::env::var("MACHINEFS_TEST_PYTHON").unwrap_or_else(|_| "python3".into());
        let copy = d.tmp().join("metrics");
        d.bash("cat .sys/metrics > $T/metrics").ok();
        let text = std::fs::read_to_string(&copy).expect("metrics");
        assert!(text.ends_with("# EOF\n"), "{text}");
        let mut have = std::process::Command::new(&python);
        have.args(["-c", "import prometheus_client"]).stderr(std::process::Stdio::null());
        if !have.status().is_ok_and(|status| status.success()) {
            machinefs_tests::skip_part!("python3-prometheus-client is not installed");
            return;
        }
        let output = std::process::Command::new(&python).args(["-c", parser]).arg(&copy).output().expect("python");
        assert!(output.status.success(), "{}\n{text}", String::from_utf8_lossy(&output.stderr));
    }
}

each_user! {
    /// Each line of `history` and `events` has its promised form.
    fn history_and_events_are_tables(d) {
        let m = d.running("tables");
        m.guest("echo 'it'\\''s' && exit 0");
        let (_, code) = m.run("exit 7");
        assert_eq!(code, 7);
        assert_eq!(m.jobs(), 2);
        m.bash("awk '$1 != NR || $2 !~ /^20..-..-..T..:..:..\\....Z$/ || $3 !~ /^[0-9]+\\.[0-9][0-9][0-9]$/ || $4 !~ /^[0-9]+$/ || $5 != u {exit 1}' \
            u=$(id -u) $D/history").ok();
        assert_eq!(m.bash("awk '{print $4}' $D/history | tr '\\n' ' '").text().trim(), "0 7");
        m.bash("awk '$1 !~ /^[0-9]+$/ || $1+0 <= last+0 || $2 !~ /Z$/ || $3 != n || $4 !~ /^[a-z]+$/ {exit 1} {last=$1}' n=$D $D/events").ok();
    }
}

each_user_alone! {
    /// The verbs of the top's ctl: a usage line each; `stop all`, `prune` and `destroy all` leave out what is protected.
    fn verbs_for_all(user) {
        let d = Daemon::start(user);
        let usage = d.read("ctl");
        for verb in ["create NAME", "stop all", "destroy all", "prune", "shutdown"] {
            assert!(usage.lines().any(|line| line.starts_with(&format!("# {verb}"))), "{usage}");
        }
        d.bash("cat ctl > $T/ctl; cat $T/ctl > ctl").ok();
        for bad in ["stop", "stop everything", "destroy", "prune all", "shutdown now", "create", "create a b"] {
            d.bash(&format!("echo '{bad}' > ctl")).fails_with("Invalid argument");
        }
        d.bash("echo create a > ctl; echo create b protect=yes > ctl; echo create c autostart=no > ctl; cat a/wait/running b/wait/running
            echo prune > ctl; test ! -e c; test -e a
            echo 'stop all' > ctl; cat a/wait/stopped b/wait/stopped; echo 'stop all' > ctl
            echo prune > ctl; test ! -e a; test -e b
            echo 'destroy all' > ctl; test -e b; echo no > b/config/protect; echo 'destroy all' > ctl; echo 'destroy all' > ctl; test ! -e b").ok();
        let gone = || std::fs::read_dir(d.state.join("machines")).is_ok_and(|left| left.count() == 0);
        assert!(eventually(40, gone), "they are removed behind");
        d.bash("echo shutdown > ctl").ok();
        assert!(eventually(20, || d.try_exec(&["test", "-e", &d.path("README")]).code != 0));
    }
}

each_user! {
    /// Every key of config/ has a file, its default reads back, and README names its type.
    fn every_key(d) {
        let m = d.create("keys", "autostart=no");
        let readme = d.read("README");
        let keys = m.bash("ls $D/config").text();
        for key in "backend image cpus memory disk address kernel kernel_args isolation region size network egress repo workdir \
            user shell command hostname autostart boot_timeout boot_wait exec_timeout idle_timeout on_idle lifetime restart \
            allow_commands idmap output_limit protect".split_whitespace() {
            assert!(keys.lines().any(|line| line == key), "{key}");
            assert!(readme.lines().any(|line| line.trim_start().starts_with(&format!("{key} "))), "{key}");
        }
        m.until_status("stopped");
        m.bash("for f in $D/config/*; do value=$(cat $f); test -n \"$value\"; echo \"$value\" > $f; test \"$(cat $f)\" = \"$value\"; done").ok();
    }
}
