//! `mounts/` and `.sys/volumes/`: directories of the host, and those that outlive machines, in a machine.

use machinefs_tests::user::{self, lookup};
use machinefs_tests::{Daemon, User, each_user, each_user_alone, eventually, gate, shared, skip};

each_user! {
    /// ro, rw and cow in a machine that runs, live in both directions; cat gives back what was written; rm takes it off.
    fn three_ways(d) {
        let m = d.running("ways");
        m.bash("mkdir -p $T/ways/dir; echo one > $T/ways/file
            for mode in ro rw cow; do echo \"$T/ways $mode\" > $D/mounts/$mode; test \"$(cat $D/mounts/$mode)\" = \"$T/ways $mode\"; done
            echo \"$T/ways\" > $D/mounts/srv%2Fdeep%2Fplain; test \"$(cat $D/mounts/srv%2Fdeep%2Fplain)\" = \"$T/ways\"
            test \"$(ls $D/mounts | sort | tr '\\n' ' ')\" = 'cow ro rw srv%2Fdeep%2Fplain '").ok();
        let seen = "cat /ro/file /rw/file /cow/file /srv/deep/plain/file | tr '\\n' ' '";
        assert_eq!(m.guest(seen), "one one one one ");
        m.bash("echo two > $T/ways/file").ok();
        assert_eq!(m.guest("cat /ro/file /rw/file /srv/deep/plain/file | tr '\\n' ' '"), "two two two ");
        m.guest("! echo x > /ro/file; echo three > /rw/file; echo four > /cow/file; rm -r /cow/dir; echo new > /srv/deep/plain/new");
        m.bash("test \"$(cat $T/ways/file)\" = three; test -d $T/ways/dir; test \"$(cat $T/ways/new)\" = new").ok();
        assert_eq!(m.guest("cat /cow/file; ls /cow | tr '\\n' ' '"), "four\nfile new ");
        // Through files/ too, and what is made belongs to the owner on the host.
        m.bash("echo five > $D/files/rw/file; test \"$(cat $T/ways/file)\" = five; test -O $T/ways/new; ! echo x 2> /dev/null > $D/files/ro/file").ok();
        // One in place of another; and off.
        m.bash("mkdir $T/other; echo \"$T/other ro\" > $D/mounts/rw").ok();
        m.guest("test -z \"$(ls /rw)\"; ! touch /rw/x");
        m.bash("rm $D/mounts/ro $D/mounts/rw $D/mounts/cow $D/mounts/srv%2Fdeep%2Fplain; test -z \"$(ls $D/mounts)\"").ok();
        m.guest("test -z \"$(ls /ro /rw /cow /srv/deep/plain | grep -v :)\"");
        m.bash("test \"$(cat $T/ways/file)\" = five").ok();
        let events = m.read("events");
        assert!(events.contains(" mount set=ro") && events.contains(" mount removed=cow"), "{events}");
        assert!(!events.contains("/tmp"), "what is private stays so: {events}");
        // A path with a blank, without a newline at its end.
        m.bash("mkdir \"$T/a b\"; touch \"$T/a b/x\"; printf \"'%s' ro\" \"$T/a b\" > $D/mounts/blank; cat $D/mounts/blank").ok();
        m.guest("test -e /blank/x");
    }
}

each_user! {
    /// What cannot be mounted is refused where it is written, with its reason.
    fn refusals(d) {
        let m = d.running("refused");
        let refused = |text: &str, words: &str| {
            m.bash(&format!("echo \"{text}\" > $D/mounts/x")).fails_with(words);
        };
        m.bash("mkdir -p $T/fine; touch $T/plain; ln -sfn $T/fine $T/link; ln -sfn $M/$D/files $T/into").ok();
        refused("$T/nosuch", "No such file");
        refused("$T/plain ro", "Invalid argument");
        refused("$T/fine readwrite", "Invalid argument");
        refused("$T/fine ro now", "Invalid argument");
        refused("fine ro", "Invalid argument");
        refused("volume:nosuch", "No such file");
        refused("$M ro", "Invalid argument");
        refused("$M/$D/files ro", "Invalid argument");
        refused("$T/into ro", "Invalid argument");
        m.bash("exec 3<> $D/mounts/x; echo $T/nosuch >&3 || cat <&3 | grep -q 'nosuch: No such file'").ok();
        let errors = m.read("errors");
        assert!(errors.contains(" mount ENOENT ") && errors.contains("machinefs itself"), "{errors}");
        assert_eq!(m.read("mounts/x"), "", "nothing is mounted there");
        for bad in ["proc", "sys%2Ffs", "dev%2Fshm", "..", "%2Fx", "x%2F", "a%2F%2Fb", "a%2F..%2Fb", "50%", "%2f"] {
            if bad != ".." {
                m.bash(&format!("echo \"$T/fine\" > $D/mounts/{bad}")).fails_with("Invalid argument");
            }
        }
        // A link is followed once, when it is written.
        m.bash("echo \"$T/link ro\" > $D/mounts/x; touch $T/fine/seen; rm $T/link").ok();
        m.guest("test -e /x/seen");
        // What is used cannot be taken off; what it would hide neither put over.
        m.daemon.exec(&["bash", "-c", "echo 'cd /x; exec sleep 1000' > $0/exec", &m.name]).ok();
        assert!(eventually(60, || m.run("grep -l . /proc/[0-9]*/comm > /dev/null; for p in /proc/[0-9]*; do test \"$(readlink $p/cwd)\" = /x && exit 0; done; exit 1").1 == 0));
        m.bash("rm $D/mounts/x").fails_with("resource busy");
        m.bash("echo \"$T ro\" > $D/mounts/x").fails_with("resource busy");
        assert!(m.read("errors").contains("a process in the machine uses it"), "{}", m.read("errors"));
        m.guest("test -e /x/seen; pkill -x sleep");
        assert!(eventually(60, || m.bash("rm $D/mounts/x").code == 0));
        m.bash("echo \"$T/fine ro\" > $D/mounts/a%2Fb").ok();
        m.bash("echo \"$T/fine ro\" > $D/mounts/a").fails_with("resource busy");
    }
}

each_user! {
    /// Mounts are there from a machine's start on, before its first process; also what was written while it booted.
    fn at_each_start(d) {
        let m = d.create("start", "autostart=no");
        m.bash("mkdir -p $T/start; echo here > $T/start/file; echo \"$T/start ro\" > $D/mounts/src").ok();
        m.until_status("stopped");
        m.bash("echo 'cat /src/file > /root/seen; sleep 1000' > $D/config/command; echo start > $D/ctl; cat $D/wait/running").ok();
        assert!(eventually(60, || m.run("grep -qx here /root/seen").1 == 0));
        m.bash("echo \"$T/start cow\" > $D/mounts/src").ok();
        m.guest("echo mine > /src/file");
        m.ctl("stop").ok();
        m.until_status("stopped");
        m.bash("echo start > $D/ctl; cat $D/wait/running").ok();
        assert_eq!(m.guest("cat /src/file"), "mine", "what is its own stays");
        m.ctl("stop").ok();
        m.until_status("stopped");
        m.bash("rm $D/mounts/src; echo \"$T/start\" > $D/mounts/late; echo start > $D/ctl; cat $D/wait/running").ok();
        assert_eq!(m.guest("cat /late/file; ls /src"), "here");
        // One that boots.
        let fresh = d.machine("fresh");
        fresh.bash("echo \"$T/start ro\" > $D/mounts/src").ok();
        fresh.until_running();
        assert_eq!(fresh.guest("cat /src/file"), "here");
    }
}

each_user_alone! {
    /// What is written and removed in the midst of a boot is so when the machine is up.
    fn in_the_midst_of_a_boot(user) {
        let d = gate::gated(user);
        gate::close(&d);
        let m = d.create("boot", "");
        m.bash("mkdir $T/one $T/two; touch $T/one/1 $T/two/2; while test $(cat $D/status) = creating; do sleep 0.05; done
            echo \"$T/one\" > $D/mounts/gone; echo \"$T/two\" > $D/mounts/there; echo \"$T/one ro\" > $D/mounts/there; rm $D/mounts/gone; test $(cat $D/status) = booting").ok();
        gate::open(&d);
        m.until_running();
        m.guest("test -e /there/1; ! test -e /gone/1");
    }
}

each_user! {
    /// A source that is gone keeps its machine from starting, with words; without it the machine starts.
    fn a_source_that_is_gone(d) {
        let m = d.create("gone", "autostart=no");
        m.until_status("stopped");
        m.bash("mkdir -p $T/soon; echo \"$T/soon ro\" > $D/mounts/src; rmdir $T/soon; echo start > $D/ctl").ok();
        m.until_status("failed");
        assert!(m.read("errors").contains("/src"), "{}", m.read("errors"));
        m.bash("rm $D/mounts/src; echo start > $D/ctl; cat $D/wait/running").ok();
    }
}

each_user_alone! {
    /// Mounts outlive the daemon: after kill -9 they are as they were, and can be changed.
    fn they_outlive_the_daemon(user) {
        let d = Daemon::start(user);
        let m = d.running("crash");
        m.bash("mkdir $T/src; echo \"$T/src rw\" > $D/mounts/src; mkdir .sys/volumes/v; echo volume:v > $D/mounts/v; stat -c %i $D/mounts/* .sys/volumes/v .sys/volumes/v/info > $T/before").ok();
        d.crash();
        m.until_running();
        m.bash("stat -c %i $D/mounts/* .sys/volumes/v .sys/volumes/v/info | cmp - $T/before; test \"$(cat $D/mounts/src)\" = \"$T/src rw\"").ok();
        m.guest("echo x > /src/x; echo y > /v/y");
        m.bash("test -e $T/src/x; rmdir .sys/volumes/v").fails_with("resource busy");
        m.bash("rm $D/mounts/src $D/mounts/v").ok();
        m.guest("test -z \"$(ls /src /v | grep -v :)\"");
        m.bash("rmdir .sys/volumes/v; echo \"$T/src ro\" > $D/mounts/src").ok();
        m.guest("test -e /src/x");
        // In the midst of changes.
        for _ in 0..3 {
            let mut writer = m.spawn_bash("while :; do echo \"$T/src ro\" > $D/mounts/w; echo \"$T/src rw\" > $D/mounts/w; rm $D/mounts/w; done");
            std::thread::sleep(std::time::Duration::from_millis(300));
            d.kill();
            writer.signal(libc::SIGKILL);
            eventually(20, || writer.has_ended());
            d.boot();
            m.until_running();
            m.bash("! test -e $D/mounts/w || rm $D/mounts/w; echo \"$T/src rw\" > $D/mounts/w").ok();
            m.guest("echo z > /w/z; test $(grep -c ' /w ' /proc/self/mountinfo) = 1");
            m.bash("rm $D/mounts/w").ok();
            m.guest("! test -e /w/z");
        }
    }
}

each_user! {
    /// Volumes outlive machines; one that is mounted stays; each has its owner's name on it.
    fn volumes(d) {
        let (name, other) = (d.name("vol"), d.name("vol"));
        let (m, n) = (d.running("volume"), d.running("volume"));
        m.bash(&format!("mkdir .sys/volumes/{name}; ls .sys/volumes | grep -qx {name}; test $(stat -c %a .sys/volumes/{name}) = 700
            grep -qx 'name {name}' .sys/volumes/{name}/info; grep -qx \"uid $(id -u)\" .sys/volumes/{name}/info
            echo 'volume:{name} rw' > $D/mounts/data; grep -qx \"machine $D\" .sys/volumes/{name}/info")).ok();
        m.guest("echo kept > /data/file; chown 1:1 /data/file; mkdir /data/dir");
        n.bash(&format!("echo volume:{name} ro > $D/mounts/data")).ok();
        n.guest("grep -qx kept /data/file; ! touch /data/x");
        m.guest("echo more >> /data/file");
        n.guest("grep -qx more /data/file");
        m.bash(&format!("mkdir .sys/volumes/{name}")).fails_with("File exists");
        for bad in ["a.b", "-a", "a_b", ".x"] {
            m.bash(&format!("mkdir .sys/volumes/{bad}")).fails_with("Invalid argument");
        }
        m.bash(&format!("rmdir .sys/volumes/{name}")).fails_with("resource busy");
        m.bash(&format!("rmdir .sys/volumes/{other}")).fails_with("No such file");
        m.bash(&format!("rm .sys/volumes/{name}/info")).fails_with("not permitted");
        m.bash(&format!("touch .sys/volumes/{name}/x")).fails_with("not permitted");
        m.bash("rmdir $D").ok();
        n.bash("rm $D/mounts/data").ok();
        // The one that had it last may be on its way out still.
        let third = d.running("volume");
        third.bash(&format!("echo volume:{name} > $D/mounts/data")).ok();
        assert_eq!(third.guest("cat /data/file; stat -c %u /data/file"), "kept\nmore\n1");
        third.bash("rm -r $D").ok();
        d.bash(&format!("rmdir .sys/volumes/{name}; ! test -e .sys/volumes/{name}; ! ls .sys/volumes | grep -qx {name}")).ok();
        // A new one of that name is empty.
        let made = eventually(20, || d.bash(&format!("mkdir .sys/volumes/{name}")).code == 0);
        assert!(made);
        n.bash(&format!("echo volume:{name} > $D/mounts/data")).ok();
        n.guest("test -z \"$(ls /data)\"");
        n.bash(&format!("rm $D/mounts/data; rmdir .sys/volumes/{name}")).ok();
    }
}

each_user! {
    /// Destroying a machine, by rmdir or rm -r, takes its mounts off and touches nothing in them.
    fn destroying_spares_what_is_mounted(d) {
        for way in ["rmdir", "rm -r"] {
            let m = d.running("spared");
            m.bash("mkdir -p $T/spared/dir; echo x > $T/spared/dir/file; echo \"$T/spared rw\" > $D/mounts/src").ok();
            m.guest("test -e /src/dir/file");
            m.bash(&format!("{way} $D; test -e $T/spared/dir/file")).ok();
        }
        std::thread::sleep(std::time::Duration::from_millis(500));
        d.bash("test -e $T/spared/dir/file").ok();
    }
}

each_user! {
    /// Only what the owner may read (ro, cow), or write (rw), on the host.
    fn rights(d) {
        let m = d.running("rights");
        if d.user == User::Ordinary {
            m.bash("echo '/etc rw' > $D/mounts/etc").fails_with("Permission denied");
            m.bash("echo '/root ro' > $D/mounts/etc").fails_with("Permission denied");
            m.bash("echo '/etc ro' > $D/mounts/etc").ok();
        }
        if user::am_root() && d.user == User::Root {
            m.bash("echo '/root ro' > $D/mounts/etc").ok();
        }
    }
}

/// Under root's daemon, a user's machine shows what that user may see, and no more; volumes of others are closed.
#[test]
fn rights_of_another_user() {
    let Some(d) = shared(User::Root) else { return };
    let Some(other) = lookup(user::ORDINARY) else { skip!("there is no user mfstest") };
    let (theirs, volume) = (d.name("theirs"), d.name("vol"));
    let base = d.tmp().join("shared");
    let shown = base.display();
    d.bash(&format!(
        "mkdir -p {shown}/readable {shown}/private {shown}/mine; echo x > {shown}/readable/file; chmod 700 {shown}/private; \
         echo secret > {shown}/readable/closed; chmod 600 {shown}/readable/closed; chown {}:{} {shown}/mine; chmod 755 $T {shown}; mkdir .sys/volumes/{volume}",
        other.uid, other.gid
    ))
    .ok();
    let script = format!(
        "set -eu; cd $M; mkdir {theirs}; cat {theirs}/wait/running > /dev/null
         put() {{ echo \"$1\" > {theirs}/mounts/$2; }}
         ! put '{shown}/private ro' a; grep -q 'mount EACCES' {theirs}/errors
         ! put '{shown}/private/deeper ro' a
         ! put '{shown}/readable rw' a; ! put '{shown}/readable' a
         ! put '/root ro' a
         ! put 'volume:{volume} ro' a; ! rmdir .sys/volumes/{volume}; ! cat .sys/volumes/{volume}/info
         put '{shown}/readable ro' readable; put '{shown}/mine' mine
         echo 'cat /readable/file; cat /readable/closed 2> /dev/null; echo y > /mine/y; exit 0' > {theirs}/exec
         test \"$(cat {theirs}/out)\" = x; test \"$(stat -c %u {shown}/mine/y)\" = {}
         rmdir {theirs}",
        other.uid
    );
    d.exec_as(&other, &["bash", "-c", &script]).ok();
    d.bash(&format!("rmdir .sys/volumes/{volume}")).ok();
}
