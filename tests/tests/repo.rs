//! `repo`: a repository that is there when the first command runs.

use machinefs_tests::{each_user, eventually};

each_user! {
    /// It is cloned at the first boot and only then, into an empty working directory and into a home that has files; the
    /// first command finds it; its progress is on `events`.
    fn cloned_at_the_first_boot(d) {
        let source = d.tmp().join("repo-source").display().to_string();
        d.bash(&format!("git init -q -b trunk {source}; cd {source}; seq 1000 > numbers; head -c 30000000 /dev/urandom > large; git add .; git -c user.name=a -c user.email=a@b commit -qm one; chmod -R go+rX .")).ok();
        for workdir in ["/srv/work", "/root"] {
            let m = d.create("repo", &format!("autostart=no repo=file:///mnt/source workdir={workdir}"));
            m.until_status("stopped");
            m.bash(&format!("echo '{source} ro' > $D/mounts/mnt%2Fsource; echo start > $D/ctl; cat $D/wait/running")).ok();
            // It waits for the clone, whatever that takes.
            assert_eq!(m.guest("pwd; tail -n1 numbers; git branch --show-current"), format!("{workdir}\n1000\ntrunk"), "{}", m.read("errors"));
            let events = m.read("events");
            assert!(events.contains(" clone state=started") && events.contains(" clone exit=0"), "{events}");
            assert!(events.lines().any(|line| line.contains(" clone phase=") && line.contains("percent=")), "{events}");
            m.bash("echo gone > $D/work/numbers; echo restart > $D/ctl").ok();
            assert!(eventually(40, || m.read("events").matches("to=running").count() == 2), "{}", m.read("events"));
            assert_eq!(m.guest("cat numbers"), "gone");
            assert_eq!(m.read("history").matches("git clone").count(), 1, "{}", m.read("history"));
        }
    }
}

each_user! {
    /// A failure stands in `errors` with git's own words, holds nothing up, and the next boot tries again. A token in
    /// the address is refused.
    fn failures_are_told(d) {
        let m = d.create("norepo", "repo=/no/such/repository workdir=/srv/work");
        m.until_running();
        assert_eq!(m.guest("pwd"), "/srv/work");
        let errors = m.read("errors");
        assert!(errors.contains("was not cloned") && errors.contains("/no/such/repository"), "{errors}");
        m.ctl("restart").ok();
        assert!(eventually(40, || m.read("errors").matches("was not cloned").count() == 2), "{}", m.read("errors"));
        for repo in ["https://token@example.com/x", "https://u:p@example.com/x", "ssh://u:p@example.com/x", "https://example.com/x?access_token=token@", "-x"] {
            d.bash(&format!("echo 'create bad repo={repo}' > ctl")).fails_with("Invalid argument");
        }
        assert!(!d.bash("cat .sys/events").ok().text().contains("token@"));
    }
}
