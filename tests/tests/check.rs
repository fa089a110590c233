//! The command line: `machinefs check`, `mount`, `umount`.

use machinefs_tests::{Daemon, each_user, each_user_alone};

each_user! {
    /// On a host that has all, check is 0 and says what it looked at.
    fn check_finds_all_here(d) {
        let outcome = d.exec(&[&d.program().to_string_lossy(), "check"]).ok();
        for subject in ["crun", "fuse"] {
            assert!(outcome.text().to_lowercase().contains(subject), "{}", outcome.text());
        }
    }
}

each_user! {
    /// What is missing is named, with its remedy, and the exit code says so.
    fn check_names_what_is_missing(d) {
        let outcome = d.bash(&format!("PATH=/nonexistent {} check", d.program().display())).fails();
        let line = outcome.text().lines().find(|line| line.contains("crun")).map(String::from);
        let line = line.unwrap_or_else(|| panic!("{}", outcome.text()));
        assert!(outcome.text().contains("apt"), "no remedy: {line}\n{}", outcome.text());
    }
}

each_user_alone! {
    /// umount takes the mount away; the daemon then ends by itself, and the directory is as it was.
    fn umount(user) {
        let d = Daemon::start(user);
        d.try_exec(&[&d.program().to_string_lossy(), "umount", &d.mount.to_string_lossy()]).ok();
        assert!(machinefs_tests::leftovers::mounts_below(&d.mount).is_empty());
        let pid = d.pid();
        let ended = machinefs_tests::eventually(20, || {
            machinefs_tests::process::all_tasks().iter().all(|task| task.pid != pid || task.state == 'Z')
        });
        assert!(ended, "the daemon goes on without its mount");
        assert_eq!(std::fs::read_dir(&d.mount).map(|dir| dir.count()).unwrap_or(99), 0);
    }
}

each_user! {
    /// Mistakes on the command line are told in one line that says what to do.
    fn mistakes(d) {
        let program = d.program().display().to_string();
        for (arguments, word) in [
            ("mount /no/such/directory --state-dir $T/s1", "/no/such/directory"),
            ("mount $T/file --state-dir $T/s2", "file"),
            ("mount $T --state-dir $T/s3 --config /no/such/file", "/no/such/file"),
            ("mount $T --state-dir $T/s4 --config $T/bad.toml", "nokey"),
            ("mount $T/full --state-dir $T/s5", "not empty"),
            ("mount $T/over --state-dir $T/over/state", "hide"),
            ("mount $T/empty --state-dir $T/full", "no state directory"),
            ("umount $T", "mount"),
            ("frobnicate", "frobnicate"),
        ] {
            let outcome = d.bash(&format!("mkdir -p $T/full/x $T/over $T/empty; echo 'nokey = 1' > $T/bad.toml; : > $T/file; timeout 20 {program} {arguments}")).fails();
            assert!(outcome.code != 124 && outcome.words().contains(word), "{arguments}: {outcome:?}");
        }
    }
}
