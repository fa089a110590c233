//! The FUSE layer on a real mount: every operation, as programs use it.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod fuse_support;

use fuse_support::fake::{Content, Fake};
use fuse_support::{Mount, eventually, shell};
use machinefs::tree::ops::{Opened, ROOT};
use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Runs a script below a mount, with `set -e`; its output must be as given.
fn script(mount: &Mount, script: &str, expected: &str) {
    let (output, code) = shell(&format!("set -e; cd '{}'; {script}", mount.path("").display()));
    assert_eq!((output.as_str(), code), (expected, 0), "{script}");
}

#[test]
fn files_directories_and_links() {
    require_fuse!();
    let mount = Mount::new(Fake::new());
    script(&mount, "mkdir d; echo hello > d/f; cat d/f; ls d; stat -c '%s %F' d/f", "hello\nf\n6 regular file\n");
    script(&mount, "mv d/f d/g; ln d/g d/h; ln -s g d/l; readlink d/l; cat d/l; ls d", "g\nhello\ng\nh\nl\n");
    script(&mount, "rm d/h; mkfifo d/p; stat -c %F d/p; rm d/p d/l; echo more >> d/g; cat d/g", "fifo\nhello\nmore\n");
    script(&mount, ": > d/g; stat -c %s d/g; truncate -s 5 d/g; stat -c %s d/g; rm d/g; rmdir d; ls", "0\n5\n");
    script(&mount, "umask 027; touch a; mkdir b; stat -c %a a b", "640\n750\n");
    script(&mount, "chmod 751 a; chown 5:6 a; stat -c '%a %u %g' a", "751 5 6\n");
    script(
        &mount,
        "touch -d '2001-02-03 04:05:06.123456789 UTC' a; TZ=UTC stat -c %y a",
        "2001-02-03 04:05:06.123456789 +0000\n",
    );
    script(&mount, "df --output=size,avail -B4096 . | tail -1 | tr -s ' '", " 1000 400\n");
}

#[test]
fn the_mount_has_our_type_and_is_closed_to_set_user_id_and_devices() {
    require_fuse!();
    let mount = Mount::new(Fake::new());
    let (output, _) =
        shell(&format!("grep ' {} ' /proc/mounts", mount.path("").display().to_string().trim_end_matches('/')));
    for word in ["fuse.machinefs", "nosuid", "nodev", "default_permissions", "allow_other"] {
        assert!(output.contains(word), "{word} in {output}");
    }
}

#[test]
fn extended_attributes() {
    require_fuse!();
    let mount = Mount::new(Fake::new());
    mount.fake.add(ROOT, b"f", Content::File(Vec::new()));
    let python = "import os; f='f'; os.setxattr(f,'user.a',b'1\\0\\xff'); os.setxattr(f,'user.b',b''); \
        print(os.getxattr(f,'user.a'), os.listxattr(f)); os.removexattr(f,'user.a'); print(os.listxattr(f))";
    script(&mount, &format!("python3 -c \"{python}\""), "b'1\\x00\\xff' ['user.a', 'user.b']\n['user.b']\n");
}

#[test]
fn defects_of_the_file_system_become_errors_of_one_request() {
    require_fuse!();
    let mount = Mount::new(Fake::new());
    mount.fake.add(ROOT, b"f", Content::File(b"x".to_vec()));
    let python = "import os,errno\nfor name in 'panic forgotten wild enosys enosys panic panic'.split():\n \
        try: os.getxattr('f','user.'+name)\n except OSError as e: print(errno.errorcode[e.errno])";
    let expected = "EIO\nEIO\nEIO\nEOPNOTSUPP\nEOPNOTSUPP\nEIO\nEIO\n";
    // ENOSYS is turned into EOPNOTSUPP: the kernel would never ask for an attribute again.
    script(&mount, &format!("python3 -c \"{python}\" | sed s/ENOTSUP$/EOPNOTSUPP/"), expected);
    // A copying program would go round in circles.
    let python = "import os,errno\ntry: os.lseek(os.open('f',0),4242,os.SEEK_DATA)\nexcept OSError as e: print(errno.errorcode[e.errno])";
    script(&mount, &format!("python3 -c \"{python}\""), "EIO\n");
    script(&mount, "cat f", "x");
    assert!(mount.session().is_alive());
}

#[test]
fn attributes_that_a_guest_may_not_choose_are_refused_and_nothing_leaks() {
    require_fuse!();
    let mount = Mount::new(Fake::new());
    let change = |name: &[u8], change: fn(&mut machinefs::tree::ops::Attr)| {
        let node = mount.fake.add(ROOT, name, Content::File(b"x".to_vec()));
        mount.fake.set(node, |node| change(&mut node.attr));
        node
    };
    let typeless = change(b"typeless", |attr| attr.mode = 0o644);
    let huge = change(b"huge", |attr| attr.size = u64::MAX);
    change(b"blocks", |attr| attr.blksize = 1 << 31);
    change(b"no-blocks", |attr| attr.blksize = 0);
    let python = "import os,errno\nfor name in 'typeless huge blocks no-blocks'.split():\n \
        try: print(os.stat(name).st_blksize)\n except OSError as e: print(errno.errorcode[e.errno])";
    script(&mount, &format!("python3 -c \"{python}\""), "EIO\nEIO\n1048576\n4096\n");
    for node in [typeless, huge] {
        eventually("its holds are given back", || mount.fake.nodes.lock().get(&node).unwrap().holds == 0);
    }
}

#[test]
fn large_reads_and_writes_arrive_whole() {
    require_fuse!();
    let mount = Mount::new(Fake::new());
    let direct = mount.fake.add(ROOT, b"direct", Content::File(Vec::new()));
    mount.fake.set(direct, |node| node.opened = Opened { direct_io: true, ..Opened::default() });
    let before = mount.fake.transfers.load(Ordering::SeqCst);
    let python = "import os,hashlib; data=os.urandom(1<<20)*3; fd=os.open('direct',os.O_RDWR); \
        print(sum(os.pwrite(fd,data[i<<20:(i+1)<<20],i<<20) for i in range(3))); \
        print(b''.join(os.pread(fd,1<<20,i<<20) for i in range(3))==data); \
        fd=os.open('cached',os.O_RDWR|os.O_CREAT); os.write(fd,data); print(os.pread(fd,len(data),0)==data)";
    script(&mount, &format!("python3 -c \"{python}\""), "3145728\nTrue\nTrue\n");
    // 1 MiB goes at once, or in two when it begins in the middle of a page.
    let transfers = mount.fake.transfers.load(Ordering::SeqCst) - before;
    assert!(transfers < 40, "{transfers} reads and writes");
    script(&mount, "cp direct copy; cmp direct copy; cmp direct cached", "");
}

#[test]
fn a_listing_of_10000_names_is_complete() {
    require_fuse!();
    let fake = Fake::new();
    let directory = fake.add(ROOT, b"d", Content::Directory(BTreeMap::new()));
    for index in 0..10_000 {
        let id = fake.add(directory, format!("entry-{index:05}").as_bytes(), Content::File(Vec::new()));
        fake.set(id, |node| (node.attr_ttl, node.entry_ttl) = (Duration::from_secs(60), Duration::from_secs(60)));
    }
    let mount = Mount::new(fake);
    script(&mount, "ls -l d | grep -c entry-; ls d | sort -u | wc -l; ls d | tail -1", "10000\n10000\nentry-09999\n");
    script(&mount, "find d -type f | wc -l; rm -r d; ls", "10000\n");
}

#[test]
fn names_are_bytes() {
    require_fuse!();
    let mount = Mount::new(Fake::new());
    let python = "import os; n=[b'\\xff\\xfe', b'a b\\nc', b'x'*255]; [open(x,'wb').close() for x in n]; \
        print(sorted(os.listdir(b'.'))==sorted(n)); [os.unlink(x) for x in n]; print(os.listdir(b'.'))";
    script(&mount, &format!("python3 -c \"{python}\""), "True\n[]\n");
}

#[test]
fn holds_and_handles_come_back() {
    require_fuse!();
    let fake = Fake::new();
    let mount = Mount::new(fake.clone());
    script(
        &mount,
        "mkdir d; for i in 1 2 3 4 5 6 7 8 9; do echo $i > d/$i; done; cat d/*; ls -l d > /dev/null; find . > /dev/null",
        "1\n2\n3\n4\n5\n6\n7\n8\n9\n",
    );
    drop(mount);
    assert_eq!(fake.open_handles.load(Ordering::SeqCst), 0, "open files after unmount");
}

#[test]
fn statx_copy_fallocate_seek_tmpfile_rename_flags() {
    require_fuse!();
    let mount = Mount::new(Fake::new());
    mount.fake.add(ROOT, b"f", Content::File(b"0123456789".to_vec()));
    script(&mount, "stat -c '%w %s' f", "- 10\n");
    let python = "import os,ctypes,errno; libc=ctypes.CDLL(None,use_errno=True)\n\
        a=os.open('f',os.O_RDWR); b=os.open('g',os.O_RDWR|os.O_CREAT)\n\
        print(os.copy_file_range(a,b,4,2,3), os.pread(b,100,0))\n\
        os.posix_fallocate(b,0,100); print(os.fstat(b).st_size)\n\
        print(os.lseek(b,5,os.SEEK_DATA), os.lseek(b,5,os.SEEK_HOLE))\n\
        t=os.open('.',os.O_TMPFILE|os.O_RDWR); os.write(t,b'tmp'); print(os.pread(t,9,0), os.fstat(t).st_nlink)\n\
        print(libc.renameat2(-100,b'f',-100,b'g',1), errno.errorcode[ctypes.get_errno()])\n\
        print(libc.renameat2(-100,b'f',-100,b'h',1), sorted(os.listdir('.')))\n\
        import fcntl; fcntl.lockf(b,fcntl.LOCK_EX); fcntl.flock(b,fcntl.LOCK_SH); print('locked')\n\
        try: fcntl.ioctl(b,0x1234)\n\
        except OSError as e: print(errno.errorcode[e.errno])\n\
        os.fsync(b); os.fdatasync(b); d=os.open('.',os.O_RDONLY); os.fsync(d)";
    let expected = "4 b'\\x00\\x00\\x002345'\n100\n5 100\nb'tmp' 0\n-1 EEXIST\n0 ['g', 'h']\nlocked\nENOTTY\n";
    std::fs::write("/tmp/mfs-fuse-basic.py", python).unwrap();
    script(&mount, "python3 /tmp/mfs-fuse-basic.py; rm /tmp/mfs-fuse-basic.py", expected);
}
