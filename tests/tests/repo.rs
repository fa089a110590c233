//! `repo`: a repository that is there when the first command runs.

use machinefs_tests::shell::have;
use machinefs_tests::{each_user, eventually, skip_part};

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

/// A token that is in no other test.
const TOKEN: &str = "ghp_firstboot0123456789";

each_user! {
    /// A private repository of github.com is cloned at the first boot with the token in `secrets/GITHUB_TOKEN`, from a
    /// real git-http-backend(1), and can be pushed to; the token is in no log, no file, and not sent before it is asked for.
    fn private_at_the_first_boot(d) {
        if !have("openssl") {
            skip_part!("openssl is not installed");
            return;
        }
        let dir = d.tmp().join(d.name("github"));
        let at = dir.display().to_string();
        // What the machine sees is `shown` alone.
        d.bash(&format!(
            "mkdir -p {at}/shown {at}/srv/me; cd {at}
             openssl req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out shown/ca.pem -days 2 -subj /CN=github.com -addext subjectAltName=DNS:github.com 2> openssl.log
             git init -q --bare -b main srv/me/private.git; git -C srv/me/private.git config http.receivepack true
             git init -q -b main work; cd work; echo hello > README; git add .
             git -c user.name=a -c user.email=a@b commit -qm one; git push -q ../srv/me/private.git main"
        )).ok();
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/git_server.py");
        let text = std::fs::read_to_string(script).expect("the server's text");
        let server = d.spawn(&[
            "python3", "-c", &text, &format!("{at}/shown/proxy"), &format!("{at}/shown/ca.pem"), &format!("{at}/key.pem"),
            &format!("{at}/srv"), TOKEN, &format!("{at}/refused"),
        ]);
        assert!(eventually(40, || dir.join("shown/proxy").exists()), "the server does not start");
        let m = d.create("private", "autostart=no repo=https://github.com/me/private.git workdir=/srv/work network=none");
        m.until_status("stopped");
        m.bash(&format!(
            "echo '{at}/shown rw' > $D/mounts/mnt%2Fgithub
             echo /mnt/github/ca.pem > $D/env/GIT_SSL_CAINFO; echo socks5h://localhost/mnt/github/proxy > $D/env/ALL_PROXY
             echo {TOKEN} > $D/secrets/GITHUB_TOKEN; echo start > $D/ctl; cat $D/wait/running"
        )).ok();
        let (seen, _) = m.run("pwd; cat README");
        assert_eq!(seen.trim_end(), "/srv/work\nhello", "{}\n{}", m.read("errors"), m.read("jobs/clone/out"));
        m.guest("echo more > more; git add more; git -c user.name=a -c user.email=a@b commit -qm two; git push -q origin HEAD:main");
        d.bash(&format!("git -C {at}/srv/me/private.git show main:more | grep -x more")).ok();
        for file in ["events", "errors", "history", "info", "jobs/clone/out"] {
            assert!(!m.read(file).contains(TOKEN), "the token is in {file}");
        }
        assert_eq!(m.run(&format!("grep -r {TOKEN} /srv/work /root /etc /tmp")).1, 1, "it is on the machine's disk");
        // git asks without it first; it was in nothing that it sent then.
        let refused = std::fs::read_to_string(dir.join("refused")).expect("what was refused");
        assert!(refused.contains("/me/private.git/info/refs") && !refused.contains(TOKEN), "{refused}");
        drop(server);
    }
}
