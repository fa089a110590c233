//! Destroying and renaming: at once, whole, and never something else.

use machinefs_tests::leftovers::{cgroups_of, machines, mounts_below, namespaces_of, processes_in};
use machinefs_tests::{Machine, Shell, each_user, eventually, shells};
use std::path::PathBuf;

/// All that a running machine consists of on the host.
struct Anatomy {
    init: u32,
    cgroups: Vec<PathBuf>,
    namespaces: Vec<PathBuf>,
    directory: PathBuf,
    /// When it was looked at, in clock ticks since the boot.
    seen: u64,
}

/// When a process started, in clock ticks since the boot (proc_pid_stat(5), field 22).
fn started(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

impl Anatomy {
    fn of(m: &Machine<'_>) -> Anatomy {
        let init = m.init();
        let directory = m.daemon.state.join("machines").join(m.info("id"));
        assert!(directory.is_dir(), "{}", directory.display());
        let namespaces = namespaces_of(init);
        assert!(namespaces.len() >= 6, "{namespaces:?}");
        // A process that starts now.
        let seen = std::process::Command::new("sh").args(["-c", "cut -d')' -f2- /proc/$$/stat"]).output();
        let seen = seen.ok().and_then(|out| String::from_utf8(out.stdout).ok());
        let seen = seen.and_then(|text| text.split_whitespace().nth(19)?.parse().ok()).expect("the time");
        Anatomy { init, cgroups: cgroups_of(init), namespaces, directory, seen }
    }

    /// What of it is still there.
    fn left(&self, m: &Machine<'_>) -> Vec<String> {
        let mut left: Vec<String> =
            self.cgroups.iter().filter(|dir| dir.exists()).map(|dir| dir.display().to_string()).collect();
        // The kernel gives numbers of namespaces out again: what started since is of another machine.
        let older =
            processes_in(&self.namespaces).into_iter().filter(|pid| started(*pid).is_some_and(|at| at <= self.seen));
        left.extend(older.map(|pid| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            format!("process {}", stat.split(' ').take(5).collect::<Vec<_>>().join(" "))
        }));
        left.extend(mounts_below(&self.directory).iter().map(|path| path.display().to_string()));
        if self.directory.exists() {
            left.push(self.directory.display().to_string());
        }
        let needle = self.directory.to_string_lossy().into_owned();
        let daemon = std::fs::read_to_string(format!("/proc/{}/mountinfo", m.daemon.pid())).unwrap_or_default();
        left.extend(
            daemon.lines().filter(|line| line.contains(&needle)).map(|line| format!("the daemon's mount {line}")),
        );
        left
    }

    #[track_caller]
    fn is_gone(&self, m: &Machine<'_>) {
        eventually(30, || self.left(m).is_empty());
        assert_eq!(self.left(m), Vec::<String>::new(), "init was {}", self.init);
    }
}

each_user! {
    /// Every way of removing a machine: it is gone from the listing when the command returns, and soon from the host.
    fn every_way_of_removing(d) {
        for shell in shells() {
            let mut ways = vec!["rmdir NAME", "rm -r NAME", "rm -rf NAME", "echo destroy > NAME/ctl", "rm NAME/ctl; rmdir NAME"];
            if shell == Shell::Bash {
                ways.extend([
                    "busybox rmdir NAME", "busybox rm -r NAME", "busybox rm -rf NAME",
                    "python3 -c 'import shutil; shutil.rmtree(\"NAME\")'",
                    "perl -MFile::Path -e 'File::Path::remove_tree(\"NAME\", {error => \\my $e}); exit scalar @$e'",
                    "node -e 'require(\"fs\").rmSync(\"NAME\", {recursive: true})'",
                    "find NAME -delete",
                    "cd NAME; rmdir ../NAME",
                ]);
            }
            for way in ways {
                let m = d.running("gone");
                m.bash("mkdir $D/files/root/dir; echo x > $D/files/root/dir/file; echo 'sleep 1000' > $D/exec").ok();
                let anatomy = Anatomy::of(&m);
                let outcome = d.sh(shell, &way.replace("NAME", &m.name));
                assert_eq!(outcome.code, 0, "{way} under {shell:?}: {}", outcome.words());
                let there = d.sh(shell, &format!("ls | grep -x {} || true", m.name)).ok().text();
                assert_eq!(there, "", "{way} under {shell:?}: it is still listed");
                d.exec(&["test", "!", "-e", &m.path("status")]).ok();
                anatomy.is_gone(&m);
            }
        }
    }
}

each_user! {
    /// rm -r does not empty the guest's disk file by file: the machine is destroyed first.
    fn rm_r_does_not_walk_the_guest(d) {
        let m = d.running("walk");
        m.guest("mkdir /root/many; cd /root/many; for i in $(seq 2000); do : > $i; done");
        let text = d.exec(&["rm", "-rv", &m.name]).ok().text();
        assert!(!text.contains("files/root"), "{text}");
        assert_eq!(d.exec(&["ls", "-f", "-a", "--", "."]).ok().text().lines().filter(|line| **line == m.name).count(), 0);
    }
}

each_user! {
    /// `ctl` is the first entry of a machine's listing: that is what makes rm -r safe.
    fn ctl_is_listed_first(d) {
        let m = d.running("first");
        let listing = d.exec(&["ls", "-U", &m.name]).ok().text();
        assert_eq!(listing.lines().next(), Some("ctl"), "{listing}");
    }
}

each_user! {
    /// rm of any control file but ctl is EPERM and does nothing; so is making what the tree has no place for.
    fn control_files_stay(d) {
        let m = d.running("stay");
        let names = d.exec(&["ls", "-A", &m.name]).ok().text();
        for name in names.lines().filter(|name| *name != "ctl") {
            let path = m.path(name);
            let way = if d.exec(&["test", "-d", &path]).code == 0 && d.exec(&["test", "-L", &path]).code != 0 { "rmdir" } else { "rm" };
            let outcome = d.exec(&[way, &path]).fails();
            assert!(outcome.words().contains("Operation not permitted"), "{way} {name}: {}", outcome.words());
        }
        for (script, what) in [
            ("mkdir $D/foo", "mkdir"), ("echo x > $D/foo", "create"), ("ln -s x $D/foo", "symlink"), ("mkfifo $D/foo", "mknod"),
            ("mv $D/status $D/state", "rename"), ("ln $D/status $D/foo", "link"), ("rm README", "rm README"), ("rmdir .sys", "rmdir .sys"),
            ("rm ctl", "rm of the top's ctl"), ("echo x > foo", "create at the top"), ("rm $D/config/memory", "rm of a value"),
        ] {
            let outcome = m.bash(script).fails();
            let words = outcome.words();
            assert!(words.contains("Operation not permitted") || words.contains("Permission denied"), "{what}: {words}");
        }
        assert_eq!(m.status(), "running");
        m.guest("true");
    }
}

each_user! {
    /// `config/protect` refuses every way of destroying.
    fn protect(d) {
        let m = d.running("protect");
        m.bash("echo yes > $D/config/protect").ok();
        for way in ["rmdir $D", "rm -r $D", "rm -rf $D", "rm $D/ctl", "echo destroy > $D/ctl", "python3 -c 'import os, shutil; shutil.rmtree(os.environ[\"D\"])'"] {
            m.bash(way).fails();
            assert_eq!(m.status(), "running", "{way}");
        }
        m.guest("true");
        m.bash("echo no > $D/config/protect").ok();
        d.exec(&["rmdir", &m.name]).ok();
    }
}

each_user! {
    /// The name is free again, and a late rmdir of the ghost touches nothing new.
    fn the_name_is_free_again(d) {
        let m = d.running("reuse");
        let first = m.info("id");
        d.bash(&format!("cd {}; rm ctl; cd ..", m.name)).ok();
        // Reserved until the ghost's rmdir, or 2 s.
        let made = eventually(20, || d.exec(&["mkdir", &m.name]).code == 0);
        assert!(made, "the name stays taken");
        m.until_running();
        assert_ne!(m.info("id"), first);
    }
}

each_user! {
    /// mv keeps the inode, the jobs, the open files and the working directory of whoever is inside.
    fn mv_keeps_everything(d) {
        let m = d.running("old");
        let new = d.name("new");
        m.bash("echo 'until [ -e /root/go ]; do sleep 0.05; done; echo done; exit 8' > $D/exec").ok();
        let (id, init) = (m.info("id"), m.init());
        m.python(&format!(r#"
inode = os.stat(D).st_ino
inner = os.stat(f'{{D}}/files/root').st_ino
kept = open(f'{{D}}/files/root/kept', 'w')
out = open(f'{{D}}/out', 'rb', buffering=0)
os.chdir(D)
os.rename(f'../{{D}}', '../{new}')
assert os.stat('../{new}').st_ino == inode
assert os.stat('../{new}/files/root').st_ino == inner
fails(errno.ENOENT, os.stat, f'../{{D}}')
kept.write('written after')
kept.close()
assert open('files/root/kept').read() == 'written after'
open('files/root/go', 'w').close()
assert out.read(100) == b'done\n'
assert open('exit').read() == '8\n'
"#)).ok();
        assert_eq!(d.read(&format!("{new}/status")), "running\n");
        let info = d.read(&format!("{new}/info"));
        assert!(info.lines().any(|line| line.split_whitespace().eq(["id", id.as_str()])), "{info}");
        assert!(info.lines().any(|line| line.split_whitespace().eq(["pid", init.to_string().as_str()])), "{info}");
        assert_eq!(d.read(&format!("{new}/history")).lines().count(), 1);
        d.exec(&["rmdir", &new]).ok();
    }
}

each_user! {
    /// A rename onto or into anything but a free name is EPERM (EEXIST or EINVAL where that says it better), never EXDEV.
    fn renames_that_are_refused(d) {
        let (a, b) = (d.running("a"), d.running("b"));
        a.python(&format!(r#"
B = '{}'
def refused(old, new, *numbers):
    try: os.rename(old, new)
    except OSError as e: assert e.errno in numbers, (old, new, e)
    else: raise AssertionError((old, new))
refused(D, B, errno.EPERM, errno.EEXIST, errno.ENOTEMPTY)
refused(D, f'{{B}}/files/root/x', errno.EPERM)
refused(D, f'{{B}}/x', errno.EPERM)
refused(D, '.sys/x', errno.EPERM, errno.EACCES)
refused(D, 'bad name', errno.EINVAL)
refused(f'{{D}}/files/etc', f'{{B}}/files/etc2', errno.EXDEV, errno.EPERM)
refused('.sys', 'sys', errno.EPERM)
assert open(f'{{D}}/status').read() == open(f'{{B}}/status').read() == 'running\n'
"#, b.name)).ok();
    }
}

each_user! {
    /// While a machine boots it can be destroyed as well, and nothing is left of it.
    fn destroyed_while_it_boots(d) {
        for _ in 0..10 * machinefs_tests::scale() {
            let m = d.machine("early");
            let directory = d.state.join("machines").join(m.info("id"));
            d.exec(&["rmdir", &m.name]).ok();
            d.exec(&["test", "!", "-e", &m.name]).ok();
            eventually(30, || !directory.exists());
            assert!(!directory.exists(), "{} is left; {:?}", directory.display(), machines(&d.state));
        }
    }
}

each_user! {
    /// A reader of a destroyed machine's `out` ends with an error, not a number and not a hang.
    fn readers_of_a_destroyed_machine_end(d) {
        let m = d.running("readers");
        m.bash("echo 'sleep 1000' > $D/exec").ok();
        let mut waiting: Vec<_> = ["out", "exit", "wait/stopped", "wait/event"].map(|file| (file, m.spawn(&["cat"], file))).into();
        for (_, reader) in &mut waiting {
            reader.until_blocked();
        }
        d.exec(&["rmdir", &m.name]).ok();
        for (file, reader) in waiting {
            let outcome = reader.wait(30);
            if file == "exit" {
                assert_eq!((outcome.code == 0, outcome.text()), (false, String::new()), "a lost command has no exit code");
            }
        }
    }
}
