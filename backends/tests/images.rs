//! What machines of each kind of image see, and what they must not.

#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use machinefs_backends::{Backend, BackendError};
use std::fs::{self, Permissions};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use support::Rig;

/// A thing on the host for the time of a test.
struct OnHost(PathBuf);

impl OnHost {
    fn new(path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        assert!(!path.exists(), "{} is there already", path.display());
        Self(path)
    }
}

impl Drop for OnHost {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.0).or_else(|_| fs::remove_file(&self.0)));
    }
}

fn file(path: &Path, mode: u32, text: &str) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn host_shows_nothing_that_others_cannot_read() {
    need!(root);
    let rig = Rig::new();
    let place = OnHost::new(format!("/usr/local/mfs-private-{}", std::process::id()));
    let top = &place.0;
    fs::create_dir_all(top.join("closed/inner")).unwrap();
    fs::create_dir_all(top.join("searchable")).unwrap();
    for (name, mode) in
        [("secret", 0o600), ("group", 0o640), ("open", 0o644), ("closed/inner/x", 0o644), ("searchable/x", 0o644)]
    {
        file(&top.join(name), mode, "words\n");
    }
    fs::set_permissions(top.join("closed"), Permissions::from_mode(0o750)).unwrap();
    fs::set_permissions(top.join("searchable"), Permissions::from_mode(0o711)).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(top.join("socket")).unwrap();
    let spec = rig.spec("host");
    rig.boot(&spec).await;
    assert_eq!(rig.ok(&spec, &format!("ls -A {}; cat {0}/open", top.display())).await, "open\nwords\n");

    // Every file of the machine that came from the host, as root in it sees it: none is closed to others.
    let closed = "find /usr /opt /var/lib/dpkg -xdev ! -type l \\( ! -perm -004 -o -type d ! -perm -005 \\) | head";
    assert_eq!(rig.ok(&spec, closed).await, "");
    let homes = rig.ok(&spec, "ls -A /root /home /mnt /srv /media; find / -xdev -name '*.sock' 2>/dev/null; ls /etc/ssh /etc/ssl/private 2>&1 | grep -c No").await;
    assert_eq!(homes, "/home:\n\n/media:\n\n/mnt:\n\n/root:\n\n/srv:\n2\n");
    let shadow = rig.ok(&spec, "cut -d: -f2 /etc/shadow | sort -u; stat -c %a /etc/shadow").await;
    assert_eq!(shadow, "*\n640\n");

    // It changes while the machine is stopped, after some of it was changed in the machine.
    rig.ok(&spec, &format!("echo mine > {0}/added; touch /usr/local/added", top.display())).await;
    rig.backend.kill(&spec).await.unwrap();
    fs::set_permissions(top.join("open"), Permissions::from_mode(0o600)).unwrap();
    fs::set_permissions(top.join("group"), Permissions::from_mode(0o644)).unwrap();
    fs::create_dir(top.join("later")).unwrap();
    file(&top.join("later/secret"), 0o600, "x");
    file(&top.join("later/open"), 0o644, "later\n");
    let running = rig.backend.start(&spec).await.unwrap();
    let seen =
        rig.ok(&spec, &format!("cd {}; ls -A . later; cat added later/open; ls /usr/local/added", top.display())).await;
    assert_eq!(seen, ".:\nadded\ngroup\nlater\n\nlater:\nopen\nmine\nlater\n/usr/local/added\n");
    assert_eq!(running.warnings, [], "the disk mounts as before");
    assert!(
        rig.ok(&spec, "ls /usr | wc -l; ls /usr/bin | wc -l")
            .await
            .split_whitespace()
            .all(|n| n.parse::<u32>().unwrap() > 5)
    );
    rig.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn host_has_tools_and_takes_packages() {
    need!(root);
    let rig = Rig::new();
    let spec = rig.spec("host");
    rig.boot(&spec).await;
    let tools = [
        "gcc --version",
        "git --version",
        "perl -e 'use POSIX; print 1'",
        "python3 -c 'import ssl, json; print(1)'",
        "awk 'BEGIN{print 1}'",
        "vi --version",
        "apt-get --version",
        "ls -l /bin/sh",
        "getent passwd root",
        "date",
        "ldconfig -p",
        "openssl version",
        "test -s /etc/ssl/certs/ca-certificates.crt",
        "su daemon -s /bin/sh -c id",
        "touch /tmp/x /var/tmp/x /root/x /home/x",
        "printf 'int main(){return 0;}' > /tmp/a.c && gcc -o /tmp/a /tmp/a.c && /tmp/a",
        "tar --version",
        "ls /dev/shm /dev/pts /dev/null",
    ];
    for tool in tools {
        let (output, code) = rig.run(&spec, tool).await;
        let first = tool.split(' ').next().unwrap_or_default();
        let here = ["test", "ls", "touch", "printf", "echo", "su"].contains(&first)
            || Command::new("sh").args(["-c", &format!("command -v {first}")]).output().unwrap().status.success();
        assert!(code == 0 || !here, "{tool}: {code} {output}");
    }
    if Path::new("/usr/bin/dpkg-deb").exists() {
        let listed = rig.ok(&spec, "dpkg -l | grep -c ^ii; dpkg --audit").await;
        let host = Command::new("sh").args(["-c", "dpkg -l | grep -c ^ii; dpkg --audit"]).output().unwrap();
        assert_eq!(listed, String::from_utf8_lossy(&host.stdout));
        // A package of its own, with another owner, a changed file of the host's, and a script.
        let build = "set -e; mkdir -p /tmp/p/DEBIAN /tmp/p/usr/bin /tmp/p/usr/share/mfs-test; cd /tmp; \
            printf 'Package: mfs-test\\nVersion: 1\\nArchitecture: all\\nMaintainer: t <t@example.org>\\nDescription: test\\n' > p/DEBIAN/control; \
            printf '#!/bin/sh\\nset -e\\nchown daemon /usr/share/mfs-test/data\\necho configured > /var/lib/mfs-test\\n' > p/DEBIAN/postinst; chmod 755 p/DEBIAN/postinst; \
            printf '#!/bin/sh\\necho installed\\n' > p/usr/bin/mfs-test; chmod 755 p/usr/bin/mfs-test; echo data > p/usr/share/mfs-test/data; \
            dpkg-deb --build p p.deb >/dev/null; dpkg -i p.deb >/dev/null; mfs-test; cat /var/lib/mfs-test; stat -c %U /usr/share/mfs-test/data; \
            dpkg -s mfs-test | grep Status; dpkg -r mfs-test >/dev/null; ls /usr/bin/mfs-test 2>&1 | grep -c No";
        let output = rig.ok(&spec, build).await;
        assert_eq!(output, "installed\nconfigured\ndaemon\nStatus: install ok installed\n1\n");
        assert!(!Path::new("/usr/bin/mfs-test").exists());
    }
    // Files of the host can be changed, replaced, renamed and removed; hard links and set-user-ID hold.
    let change = "set -e; echo x >> /usr/share/common-licenses/BSD; mv /usr/bin/awk /usr/bin/awk.old; rm -r /usr/share/doc; \
        ln /usr/bin/env /usr/bin/env2; stat -c %h /usr/bin/env; chown 1000:1000 /usr/bin/env; stat -c %u:%g /usr/bin/env2; echo ok";
    assert_eq!(rig.ok(&spec, change).await, "2\n1000:1000\nok\n");
    rig.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_is_shared_and_not_written() {
    need!(root);
    let rig = Rig::new();
    let image = rig.dir.path().join("image");
    fs::create_dir_all(image.join("etc")).unwrap();
    fs::create_dir_all(image.join("data")).unwrap();
    file(&image.join("etc/motd"), 0o600, "from the image\n");
    std::os::unix::fs::chown(image.join("data"), Some(1000), Some(1000)).unwrap();
    let spec = rig.spec(image.to_str().unwrap());
    rig.boot(&spec).await;
    assert_eq!(rig.ok(&spec, "@read /etc/motd").await, "from the image\n");
    assert_eq!(rig.ok(&spec, "@read /etc/hostname").await, "testhost\n");
    rig.ok(&spec, "@write /etc/motd changed").await;
    assert_eq!(rig.ok(&spec, "@read /etc/motd").await, "changed");
    assert_eq!(fs::read_to_string(image.join("etc/motd")).unwrap(), "from the image\n");
    let mut names: Vec<_> = fs::read_dir(&image).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["data", "etc"], "no mount point is made in the image");
    rig.finish().await;

    // Not even an /etc is needed.
    let rig = Rig::new();
    let image = rig.dir.path().join("empty");
    fs::create_dir(&image).unwrap();
    let spec = rig.spec(image.to_str().unwrap());
    rig.boot(&spec).await;
    assert!(rig.ok(&spec, "@list /").await.contains("proc"));
    rig.finish().await;
}

fn archive(members: impl FnOnce(&mut tar::Builder<Vec<u8>>)) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    members(&mut builder);
    builder.into_inner().unwrap()
}

fn add(builder: &mut tar::Builder<Vec<u8>>, name: &str, kind: tar::EntryType, link: &str, text: &[u8]) {
    let mut header = tar::Header::new_gnu();
    // Written as it is: the crate would refuse the names that a hostile archive has.
    header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
    header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
    header.set_entry_type(kind);
    header.set_size(text.len() as u64);
    header.set_mode(if kind == tar::EntryType::Directory { 0o750 } else { 0o4711 });
    header.set_uid(33);
    header.set_gid(34);
    header.set_mtime(1_000_000_000);
    header.set_cksum();
    builder.append(&header, text).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn tars_of_each_compression_are_unpacked_once() {
    need!(root);
    use tar::EntryType as T;
    let rig = Rig::new();
    let plain = archive(|b| {
        add(b, "./", T::Directory, "", b"");
        add(b, "./etc/", T::Directory, "", b"");
        add(b, "./etc/word", T::Regular, "", b"hello");
        add(b, "./etc/hard", T::Link, "./etc/word", b"");
        add(b, "./etc/soft", T::Symlink, "/etc/word", b"");
        add(b, "./deep/er/still", T::Regular, "", b"x");
        add(b, "./dev/sda", T::Block, "", b"");
    });
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&plain).unwrap();
    let all = [
        ("a.tar", plain.clone()),
        ("b.tar.gz", gzip.finish().unwrap()),
        ("c.tar.zst", zstd::encode_all(&plain[..], 1).unwrap()),
    ];
    for (name, bytes) in all {
        let path = rig.dir.path().join(name);
        fs::write(&path, bytes).unwrap();
        let (one, two) = (rig.spec(path.to_str().unwrap()), rig.spec(path.to_str().unwrap()));
        let (first, second) = tokio::join!(rig.boot(&one), rig.boot(&two));
        let digest =
            |r: &machinefs_backends::Running| r.facts.iter().find(|(k, _)| k == "image_digest").unwrap().1.clone();
        assert_eq!(digest(&first), digest(&second));
        assert!(digest(&first).starts_with("sha256:"));
        assert_eq!(rig.ok(&one, "@read /etc/soft").await, "hello");
        rig.ok(&one, "@write /etc/word one").await;
        assert_eq!(rig.ok(&two, "@read /etc/hard").await, "hello");
        let root = rig.dir.path().join("state/images").join(digest(&first).replace(':', "-"));
        let meta = fs::metadata(root.join("etc/hard")).unwrap();
        assert_eq!(
            (meta.uid(), meta.gid(), meta.mode() & 0o7777, meta.nlink(), meta.mtime()),
            (33, 34, 0o4711, 2, 1_000_000_000)
        );
        let meta = fs::metadata(root.join("etc")).unwrap();
        assert_eq!((meta.mode() & 0o7777, meta.mtime()), (0o750, 1_000_000_000));
        assert!(!root.join("dev/sda").exists());
        // Once made, the image does not need its tar.
        rig.backend.kill(&one).await.unwrap();
        fs::remove_file(&path).unwrap();
        rig.backend.start(&one).await.unwrap();
    }
    rig.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_tars_stay_inside() {
    need!(root);
    use tar::EntryType as T;
    let rig = Rig::new();
    let target = rig.dir.path().join("target");
    fs::create_dir(&target).unwrap();
    file(&target.join("kept"), 0o644, "kept");
    let out = target.to_str().unwrap();
    let up = format!("../../../../../../../..{out}/made");
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("dots", archive(|b| add(b, &up, T::Regular, "", b"x"))),
        ("absolute", archive(|b| add(b, &format!("{out}/made"), T::Regular, "", b"x"))),
        (
            "link",
            archive(|b| {
                add(b, "a", T::Symlink, out, b"");
                add(b, "a/made", T::Regular, "", b"x");
            }),
        ),
        (
            "links",
            archive(|b| {
                add(b, "a", T::Symlink, "../../../../../../..", b"");
                add(b, &format!("a{out}/made"), T::Regular, "", b"x");
            }),
        ),
        (
            "over",
            archive(|b| {
                add(b, "a", T::Symlink, &format!("{out}/kept"), b"");
                add(b, "a", T::Regular, "", b"x");
            }),
        ),
        (
            "hard",
            archive(|b| {
                add(b, "a", T::Link, &format!("{out}/kept"), b"");
                add(b, "a", T::Regular, "", b"x");
            }),
        ),
        ("hard dots", archive(|b| add(b, "a", T::Link, &format!("../../../../../../..{out}/kept"), b""))),
        (
            "hard by link",
            archive(|b| {
                add(b, "d", T::Symlink, out, b"");
                add(b, "a", T::Link, "d/kept", b"");
            }),
        ),
        ("cut", archive(|b| add(b, "a", T::Regular, "", &[b'x'; 5000]))[..2000].to_vec()),
        ("noise", b"root:x:0:0:secret words".repeat(100)),
        ("empty", Vec::new()),
    ];
    for (name, bytes) in cases {
        let path = rig.dir.path().join(name);
        fs::write(&path, bytes).unwrap();
        let spec = rig.spec(path.to_str().unwrap());
        match rig.backend.create(&spec, std::sync::Arc::new(|_| {})).await {
            Ok(()) => println!("{name}: unpacked"),
            Err(BackendError::Image { reason, .. }) => {
                println!("{name}: {reason}");
                assert!(!reason.contains("secret"), "the error quotes the file");
            }
            Err(other) => panic!("{name}: {other}"),
        }
        let seen: Vec<_> = fs::read_dir(&target).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(seen, ["kept"], "{name}");
        let meta = fs::metadata(target.join("kept")).unwrap();
        assert_eq!(
            (fs::read_to_string(target.join("kept")).unwrap().as_str(), meta.nlink(), meta.uid()),
            ("kept", 1, 0),
            "{name}"
        );
        assert!(!rig.dir.path().join("state/images/unpacking").exists(), "{name}: half of it was left");
    }
    rig.finish().await;
}
