//! `changes`: what differs between a machine's disk and its image.

use machinefs_tests::{each_user, eventually};

each_user! {
    /// Added, modified and deleted, one line a path, whether the machine runs or not; of the right size once it is open.
    fn added_modified_deleted(d) {
        let m = d.running("changes");
        let of = |what: &str| {
            let all = m.read("changes");
            all.lines().filter(|line| line.starts_with(what)).map(str::to_string).collect::<Vec<_>>()
        };
        m.guest("mkdir -p /opt/new/deep; echo x > /opt/new/deep/file; echo more >> /etc/hosts; rm -r /etc/alternatives; ln -s x '/opt/new/a b'");
        m.guest("touch \"$(printf '/opt/new/line\\nbreak\\\\')\"");
        let look = || {
            for line in ["A /opt/new", "A /opt/new/deep", "A /opt/new/deep/file", "A /opt/new/a b", "A /opt/new/line\\012break\\134"] {
                assert!(of("A ").iter().any(|there| there == line), "{line} in\n{}", m.read("changes"));
            }
            assert!(of("M ").iter().any(|line| line == "M /etc/hosts"), "{}", m.read("changes"));
            assert!(of("D ").iter().any(|line| line == "D /etc/alternatives"), "{}", m.read("changes"));
            assert!(!m.read("changes").contains("/etc/passwd"), "{}", m.read("changes"));
            m.bash("awk '!/^[AMD] \\// {exit 1}' $D/changes").ok();
        };
        look();
        m.python("with open(D + '/changes') as f:\n    text = f.read()\n    assert os.fstat(f.fileno()).st_size == len(text.encode())\n").ok();
        m.bash("rm -r $D/files/opt/new; ! grep /opt/new $D/changes").ok();
        m.bash("mkdir -p $D/files/opt/new/deep; echo x > $D/files/opt/new/deep/file; ln -s x \"$D/files/opt/new/a b\"").ok();
        m.guest("touch \"$(printf '/opt/new/line\\nbreak\\\\')\"");
        m.ctl("stop").ok();
        m.until_status("stopped");
        look();
        m.bash("echo x > $D/changes").fails_with("Permission denied");
    }
}

each_user! {
    /// What is mounted in a machine is no change of its own, but for the place it is mounted at.
    fn mounts_are_no_changes(d) {
        let m = d.running("mounted");
        m.bash("mkdir -p $T/shown; echo x > $T/shown/file; echo \"$T/shown rw\" > $D/mounts/shown; echo y > $D/files/shown/other").ok();
        let changes = m.read("changes");
        assert!(changes.contains("A /shown\n") && !changes.contains("/shown/"), "{changes}");
    }
}

each_user! {
    /// Looks are bounded, and a reader that gives up ends its own.
    fn looks_have_an_end(d) {
        let m = d.running("looks");
        m.guest("mkdir /root/many; cd /root/many; seq 20000 | xargs touch");
        m.python("files = [open(D + '/changes') for _ in range(8)]\nfails(errno.EMFILE, open, D + '/changes')\n\
                  assert all(len([1 for line in f if '/root/many/' in line]) == 20000 for f in files)\n\
                  for f in files: f.close()\n").ok();
        let again = eventually(20, || m.bash("cat $D/changes > /dev/null").code == 0);
        assert!(again, "they were given back");
        for _ in 0..20 {
            let mut reader = m.spawn(&["cat"], "changes");
            reader.signal(libc::SIGINT);
            assert!(eventually(20, || reader.has_ended()));
        }
        assert!(eventually(20, || m.bash("cat $D/changes > /dev/null").code == 0));
    }
}
