//! `.sys/templates/`, names that ask for one, and what goes before what in a configuration.

use machinefs_tests::{Daemon, User, each_user, each_user_alone, user};

each_user_alone! {
    /// `mkdir TEMPLATE.rest` makes a machine from it: configuration, environment, secrets; other names take `default`.
    fn machines_begin_as_their_template_says(user) {
        let d = Daemon::start(user);
        d.bash("for t in default ubuntu python node; do test -d .sys/templates/$t; done
            test \"$(cat .sys/templates/ubuntu/config/image)\" != host
            mkdir .sys/templates/work; cd .sys/templates/work
            echo 300M > config/memory; echo /tmp > config/workdir; echo yes > env/WORK; echo hunter2 > secrets/TOKEN
            test \"$(cat config/memory)\" = 300M; test \"$(cat config/cpus)\" = max; test \"$(cat env/WORK)\" = yes").ok();
        let name = "work.one-1".to_string();
        d.exec(&["mkdir", &name]).ok();
        let m = machinefs_tests::Machine { daemon: &d, name };
        m.until_running();
        assert_eq!(m.read("config/memory"), "300M\n");
        assert_eq!(m.guest("echo $WORK $TOKEN; pwd; uname -n"), "yes hunter2\n/tmp\nwork.one-1");
        assert_eq!(m.info("template"), "work");
        // A copy: what changes later is for later machines, and this one's own changes are its own.
        d.bash("echo no > .sys/templates/work/env/WORK; echo 400M > .sys/templates/work/config/memory").ok();
        assert_eq!(m.guest("echo $WORK"), "yes");
        assert_eq!(m.read("config/memory"), "300M\n");
        // mv to a name of its own template, or a plain one; not to another's.
        d.bash("mv work.one-1 work.two; mv work.two plain; mv plain work.one-1").ok();
        d.bash("mv work.one-1 python.x").fails();
        d.exec(&["mkdir", "nosuch.x"]).fails_with("No such file");
        for bad in ["work.", "work.a.b", "work.-", ".work", "a_b"] {
            d.exec(&["mkdir", bad]).fails_with("Invalid argument");
        }
        let other = d.running("other");
        assert_eq!(other.guest("echo ${WORK-unset} ${TOKEN-unset}"), "unset unset");
        assert_eq!(other.info("template"), "default");
        d.crash();
        assert_eq!(m.info("template"), "work");
        d.bash("rm -r .sys/templates/work; test ! -e .sys/templates/work").ok();
        d.exec(&["mkdir", "work.three"]).fails_with("No such file");
        m.until_running();
    }
}

each_user_alone! {
    /// Arguments of create, then the template, then the template `default`, then the daemon's own word.
    fn precedence(user) {
        let d = Daemon::start_with(user, |_| ["--default", "memory=111M", "--default", "pids=1111"].map(String::from).to_vec());
        d.bash("cd .sys/templates; mkdir t; echo 222M > default/config/memory; echo 222 > default/config/pids
            echo 33 > default/config/exec_timeout; echo 444M > t/config/memory; echo max > t/config/pids
            echo a > default/env/A; echo b > default/env/B; echo c > t/env/B").ok();
        let read = |name: &str| d.bash(&format!("cd '{name}/config'; cat memory pids exec_timeout | tr '\\n' ' '")).text();
        d.bash("echo create t.a autostart=no > ctl; echo create t.b autostart=no memory=555M > ctl; echo create plain autostart=no > ctl").ok();
        assert_eq!(read("t.a").trim(), "444M max 33");
        assert_eq!(read("t.b").trim(), "555M max 33");
        assert_eq!(read("plain").trim(), "222M 222 33");
        d.bash("test \"$(cat t.a/env/A t.a/env/B)\" = \"$(printf 'a\\nc')\"; test \"$(cat plain/env/B)\" = b").ok();
        d.bash("rm .sys/templates/default/config/pids; echo create later autostart=no > ctl").ok();
        assert_eq!(read("later").trim(), "222M 1111 33");
        d.bash("rmdir .sys/templates/default").fails_with("not permitted");
        d.bash("echo nonsense > .sys/templates/t/config/memory").fails_with("Invalid argument");
    }
}

each_user! {
    /// `create` and `set` do all or nothing.
    fn all_or_nothing(d) {
        d.bash("echo 'create half memory=1G nosuchkey=1' > ctl").fails_with("Invalid argument");
        d.bash("echo 'create half memory=1G cpus=-1' > ctl").fails();
        d.bash("echo 'create half kernel=/vmlinuz' > ctl").fails_with("not supported");
        d.bash("test ! -e half").ok();
        let m = d.create("whole", "autostart=no memory=1G");
        m.bash("echo 'set memory=2G idle_timeout=soon' > $D/ctl").fails_with("Invalid argument");
        m.bash("echo 'set memory=2G image=other' > $D/ctl").fails_with("busy");
        assert_eq!(m.read("config/memory"), "1G\n");
        m.bash("echo 'set memory=2G idle_timeout=1h restart=always' > $D/ctl").ok();
        assert_eq!(m.bash("cat $D/config/{memory,idle_timeout,restart}").text(), "2G\n1h\nalways");
        assert!(m.read("events").lines().last().is_some_and(|line| line.ends_with("config key=memory,idle_timeout,restart")));
        m.bash("exec 3<> $D/config/kernel; echo /vmlinuz >&3 || cat <&3 | grep qemu").ok();
    }
}

/// Templates of the one who runs the service are for all to use and to see, but for the secrets; others' are their own.
#[test]
fn another_user() {
    if !user::usable(User::Root) {
        return;
    }
    let Ok(other) = User::Ordinary.identity() else {
        machinefs_tests::skip_part!("there is no second user");
        return;
    };
    let d = Daemon::start(User::Root);
    d.bash("cd .sys/templates; mkdir open; echo v > open/env/V; echo s > open/secrets/S").ok();
    let path = |name: &str| d.path(&format!(".sys/templates/{name}"));
    let sh = |script: &str| d.exec_as(&other, &["sh", "-ec", &format!("cd $M/.sys/templates; {script}")]);
    assert_eq!(sh("cat open/env/V open/config/memory").ok().text(), "v\nmax");
    sh("ls open/secrets").fails_with("Permission denied");
    sh("echo x > open/env/V").fails_with("Permission denied");
    sh("echo x > open/env/W").fails_with("Permission denied");
    sh("rmdir open").fails();
    sh("mkdir mine; echo m > mine/env/M; echo 5m > mine/config/boot_timeout").ok();
    sh("echo 'create mine.a autostart=no' > ../../ctl; test \"$(cat ../../mine.a/env/M)\" = m").ok();
    sh("echo 'create open.a autostart=no' > ../../ctl; test \"$(cat ../../open.a/env/V)\" = v; test -z \"$(ls ../../open.a/secrets)\"").ok();
    // Its owner has the secret, and does not begin with what others' templates say.
    d.bash("echo 'create open.b autostart=no' > ctl; ls open.b/secrets | grep -qx S; rmdir open.b").ok();
    d.bash("mkdir mine.b").fails_with("No such file or directory");
    assert_eq!(d.exec(&["cat", &path("mine/env/M")]).ok().text(), "m", "root may");
    sh("rm -r mine; test ! -e mine; rmdir ../../mine.a ../../open.a").ok();
}
