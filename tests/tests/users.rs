//! Another user of the host neither sees into a machine nor uses it; the kernel checks.

use machinefs_tests::user::lookup;
use machinefs_tests::{Daemon, User, each_user, each_user_alone, shared, skip};

each_user! {
    /// Machines of others are closed: 0700, for every way in.
    fn another_user_is_kept_out(d) {
        if !machinefs_tests::user::am_root() {
            skip!("being another user needs root");
        }
        let Some(other) = lookup("nobody") else { skip!("there is no user nobody") };
        let m = d.running("private");
        let script = |way: &str| way.replace("DIR", &d.path(&m.name));
        for way in [
            "cat DIR/status", "ls DIR", "ls DIR/files", "cat DIR/files/etc/passwd", "echo true > DIR/exec", "echo stop > DIR/ctl",
            "cd DIR", "rmdir DIR", "mv DIR DIR-mine", "rm -rf DIR", "touch DIR/files/x", "stat DIR/status",
        ] {
            let outcome = d.exec_as(&other, &["sh", "-c", &script(way)]).fails();
            let words = outcome.words();
            assert!(
                ["Permission denied", "Operation not permitted", "can't cd"].iter().any(|denied| words.contains(denied)),
                "{way}: {words}"
            );
        }
        assert_eq!(m.status(), "running");
        assert_eq!(m.jobs(), 0);
    }
}

/// Under root's daemon every user owns what they make: names of others show, and that is all.
#[test]
fn every_user_owns_what_they_make() {
    let Some(d) = shared(User::Root) else { return };
    let Some(other) = lookup(machinefs_tests::user::ORDINARY) else { skip!("there is no user mfstest") };
    let m = d.running("roots");
    let theirs = d.name("theirs");
    let script = format!(
        "set -eu; cd $M; ls | grep -qx {0}; test \"$(stat -c %a {0})\" = 700; mkdir {1}; cat {1}/wait/running > /dev/null; \
         test \"$(stat -c %U {1} {1}/status {1}/files/root | sort -u)\" = {2}; echo 'id -u; exit 3' > {1}/exec; \
         test \"$(cat {1}/out)\" = 0; test \"$(cat {1}/exit)\" = 3; echo mine > {1}/files/root/mine; \
         test \"$(stat -c %U {1}/files/root/mine)\" = {2}",
        m.name, theirs, other.name
    );
    d.exec_as(&other, &["bash", "-c", &script]).ok();
    // History tells who it was.
    let history = d.read(&format!("{theirs}/history"));
    assert_eq!(history.split_whitespace().nth(4), Some(&*other.uid.to_string()), "{history}");
    d.exec_as(&other, &["rmdir", &d.path(&theirs)]).ok();
    d.exec(&["test", "!", "-e", &theirs]).ok();
}

/// `destroy all` of one user leaves the machines of the others.
#[test]
fn destroy_all_is_of_the_callers_machines() {
    let Some(other) = lookup(machinefs_tests::user::ORDINARY) else { skip!("there is no user mfstest") };
    if User::Root.identity().is_err() {
        skip!("the tests do not run as root");
    }
    // Not on the shared daemon, where other tests have machines of this user.
    let d = Daemon::start(User::Root);
    let m = d.running("stays");
    let script = "set -e; cd $M; mkdir goes; cat goes/wait/running; echo 'destroy all' > ctl; test ! -e goes";
    d.exec_as(&other, &["bash", "-c", script]).ok();
    assert_eq!(m.status(), "running");
    m.guest("true");
    // Root's too.
    d.exec_as(&other, &["bash", "-c", "set -e; cd $M; mkdir theirs; cat theirs/wait/running"]).ok();
    d.bash("echo 'stop all' > ctl; echo 'destroy all' > ctl; test ! -e $(ls | grep stays || echo none)").ok();
    assert_eq!(d.exec_as(&other, &["bash", "-c", "cat $M/theirs/status; rmdir $M/theirs"]).ok().text(), "running");
}

/// The daemon's own files are closed to others: state directory, sockets, spools.
#[test]
fn the_state_directory_is_closed() {
    let Some(d) = shared(User::Root) else { return };
    let Some(other) = lookup("nobody") else { skip!("there is no user nobody") };
    let m = d.running("state");
    m.bash("echo 'echo secret-4711' > $D/exec; cat $D/exit").ok();
    let script = format!(
        "find {} -type f -exec grep -l secret-4711 {{}} + 2> /dev/null; find {} -type s -writable 2> /dev/null",
        d.state.display(),
        d.state.display()
    );
    assert_eq!(d.exec_as(&other, &["sh", "-c", &script]).text(), "");
    // By names that are known, not only by what can be listed.
    for file in ["state.db", "state.db-wal", "lock", "machines", "machines/m1"] {
        let path = d.state.join(file).display().to_string();
        d.exec_as(&other, &["sh", "-c", &format!("head -c 1 {path} || ls {path}")]).fails_with("Permission denied");
    }
}

/// The daemon opens an image with its own rights: a path of the host is for its own user and root only.
#[test]
fn an_image_is_no_way_to_the_hosts_files() {
    let Some(d) = shared(User::Root) else { return };
    let Some(other) = lookup(machinefs_tests::user::ORDINARY) else { skip!("there is no user mfstest") };
    let name = d.name("thief");
    for image in ["/etc", "/root", "/etc/shadow"] {
        let script = format!("cd $M; echo 'create {name} image={image}' > ctl");
        d.exec_as(&other, &["bash", "-c", &script]).fails_with("Permission denied");
        d.exec(&["test", "!", "-e", &name]).ok();
    }
}

each_user_alone! {
    /// An image below our own mount is refused, and the daemon can still be ended: it never waits for itself.
    fn an_image_in_the_mount(user) {
        let d = Daemon::start(user);
        d.bash("ln -s $M/looped/files $T/link").ok();
        for image in ["$M/looped/files", "$T/link/usr"] {
            let m = d.bash(&format!("echo \"create looped image={image} boot_wait=none boot_timeout=none\" > ctl"));
            m.ok();
            let failed = machinefs_tests::eventually(20, || d.read("looped/status").trim() == "failed");
            assert!(failed, "{image}: {}", d.read("looped/status"));
            assert!(d.read("looped/errors").contains("machinefs"), "{}", d.read("looped/errors"));
            d.exec(&["rmdir", "looped"]).ok();
        }
        d.kill();
        d.boot();
    }
}
