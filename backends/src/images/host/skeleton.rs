//! The root directory of the image `host` with a generated `/etc`: what tools need to run, by an allow list of names.
//! Of the host's own files only those are copied that everybody on the host can read and that do not look as if they
//! held a credential.

use super::{seal, short};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

/// Changed whenever what is generated here changes, so that an older one in the cache is not taken for it.
const VERSION: &str = "1";

/// Names in /etc, copied with all below them. A name that ends with `*` stands for all that begin so.
const COPIED: &[&str] = &[
    "adduser.conf",
    "alternatives",
    "apt",
    "bash.bashrc",
    "bash_completion",
    "bash_completion.d",
    "bindresvport.blacklist",
    "ca-certificates",
    "ca-certificates.conf",
    "debconf.conf",
    "debian_version",
    "deluser.conf",
    "dpkg",
    "emacs",
    "environment",
    "ethertypes",
    "fonts",
    "gai.conf",
    "gprofng.rc",
    "groff",
    "host.conf",
    "inputrc",
    "issue",
    "issue.net",
    "java*",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "libaudit.conf",
    "libnl-3",
    "locale.alias",
    "locale.conf",
    "locale.gen",
    "localtime",
    "login.defs",
    "lsb-release",
    "magic",
    "magic.mime",
    "mailcap",
    "manpath.config",
    "maven",
    "mime.types",
    "mke2fs.conf",
    "mysql",
    "nanorc",
    "netconfig",
    "networks",
    "os-release",
    "pam.conf",
    "pam.d",
    "perl",
    "php",
    "pki",
    "postgresql-common",
    "profile",
    "profile.d",
    "protocols",
    "python*",
    "R",
    "rpc",
    "security",
    "services",
    "sgml",
    "shells",
    "skel",
    "ssl/certs",
    "ssl/openssl.cnf",
    "terminfo",
    "texmf",
    "timezone",
    "ucf.conf",
    "vim",
    "wgetrc",
    "xattr.conf",
    "xdg",
    "xml",
    "zsh",
];

/// Paths in /etc that are never copied, whatever their mode.
const REFUSED: &[&str] = &["apt/auth.conf", "apt/auth.conf.d", "security/opasswd", "pki/tls/private", "pki/nssdb"];

/// What a file with a credential in it has, as a rule.
const SUSPICIOUS: &[&str] = &["PRIVATE KEY", "<password>", "_authToken", "_password", "api_key", "secret_key"];

/// A larger file is not configuration.
const LARGEST: u64 = 16 << 20;

/// Empty directories and their modes.
const DIRS: &[(&str, u32)] = &[
    ("boot", 0o755),
    ("dev", 0o755),
    ("etc", 0o755),
    ("etc/opt", 0o755),
    ("etc/default", 0o755),
    ("home", 0o755),
    ("media", 0o755),
    ("mnt", 0o755),
    ("opt", 0o755),
    ("proc", 0o555),
    ("root", 0o700),
    ("run", 0o755),
    ("srv", 0o755),
    ("sys", 0o555),
    ("tmp", 0o1777),
    ("usr", 0o755),
    ("var", 0o755),
    ("var/backups", 0o755),
    ("var/cache", 0o755),
    ("var/cache/apt", 0o755),
    ("var/cache/apt/archives", 0o755),
    ("var/cache/apt/archives/partial", 0o700),
    ("var/cache/debconf", 0o755),
    ("var/cache/ldconfig", 0o700),
    ("var/lib", 0o755),
    ("var/lib/apt", 0o755),
    ("var/lib/apt/lists", 0o755),
    ("var/lib/apt/lists/partial", 0o700),
    ("var/lib/dpkg", 0o755),
    ("var/lib/misc", 0o755),
    ("var/lib/pam", 0o755),
    ("var/lib/systemd", 0o755),
    ("var/local", 0o755),
    ("var/lock", 0o1777),
    ("var/log", 0o755),
    ("var/log/apt", 0o755),
    ("var/mail", 0o2775),
    ("var/opt", 0o755),
    ("var/spool", 0o755),
    ("var/tmp", 0o1777),
];

const WATCHED: WatchFlags = WatchFlags::CREATE
    .union(WatchFlags::CLOSE_WRITE)
    .union(WatchFlags::DELETE)
    .union(WatchFlags::MOVED_TO)
    .union(WatchFlags::MOVED_FROM)
    .union(WatchFlags::ATTRIB)
    .union(WatchFlags::ONLYDIR);

/// The skeleton made last, and a watch on what it was made of.
#[derive(Debug)]
pub(super) struct Skeleton {
    pub(super) path: PathBuf,
    roots: Vec<PathBuf>,
    watch: Option<OwnedFd>,
}

/// What a copy is made of.
enum Source {
    Link(PathBuf),
    File(u32),
    Directory(u32),
}

impl Skeleton {
    /// Made in `dir` when it is not there yet. `roots`: the directories of the host that are mounted in it.
    pub(super) fn new(dir: &Path, roots: &[PathBuf], user: bool) -> io::Result<Self> {
        let watch = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).ok();
        let (sources, complete) = sources(watch.as_ref())?;
        let generated = generated()?;
        let path = dir.join(format!("root-{}", digest(&sources, &generated, roots)?));
        seal(&path, |top| fill(top, &sources, &generated, roots, user))?;
        Ok(Self { path, roots: roots.to_vec(), watch: watch.filter(|_| complete) })
    }

    /// Made anew when something it was made of has changed.
    pub(super) fn refresh(&mut self, dir: &Path, user: bool) -> io::Result<()> {
        let mut buffer = [0; 4096];
        let quiet = |watch: &OwnedFd| matches!(rustix::io::read(watch, &mut buffer), Err(rustix::io::Errno::AGAIN));
        if !self.watch.as_ref().is_some_and(quiet) {
            *self = Self::new(dir, &self.roots, user)?;
        }
        Ok(())
    }
}

/// All that is to be copied, by its path in /etc; and whether all of it is watched.
fn sources(watch: Option<&OwnedFd>) -> io::Result<(BTreeMap<PathBuf, Source>, bool)> {
    let etc = Path::new("/etc");
    let mut complete = watch.is_some_and(|w| inotify::add_watch(w, etc, WATCHED).is_ok());
    let mut found = BTreeMap::new();
    let mut queue = Vec::new();
    for name in COPIED {
        let Some(prefix) = name.strip_suffix('*') else {
            queue.push(PathBuf::from(name));
            continue;
        };
        for entry in fs::read_dir(etc)? {
            let name = entry?.file_name();
            if name.as_bytes().starts_with(prefix.as_bytes()) {
                queue.push(name.into());
            }
        }
    }
    while let Some(path) = queue.pop() {
        let full = etc.join(&path);
        if REFUSED.iter().any(|r| path == Path::new(r)) || !reachable(&path) {
            continue;
        }
        let Ok(meta) = fs::symlink_metadata(&full) else { continue };
        let mode = meta.mode() & 0o7777;
        if meta.is_symlink() {
            found.insert(path, Source::Link(fs::read_link(&full)?));
        } else if meta.is_dir() && mode & 0o005 == 0o005 {
            complete &= watch.is_some_and(|w| inotify::add_watch(w, &full, WATCHED).is_ok());
            for entry in fs::read_dir(&full)? {
                queue.push(path.join(entry?.file_name()));
            }
            found.insert(path, Source::Directory(mode));
        } else if meta.is_file() && mode & 0o004 != 0 && meta.len() <= LARGEST {
            found.insert(path, Source::File(mode & 0o755));
        }
    }
    Ok((found, complete))
}

/// May everybody come to this path of /etc?
fn reachable(path: &Path) -> bool {
    let open = |p: &Path| fs::metadata(Path::new("/etc").join(p)).is_ok_and(|m| m.mode() & 0o001 != 0);
    path.ancestors().skip(1).all(open)
}

fn digest(
    sources: &BTreeMap<PathBuf, Source>,
    generated: &BTreeMap<&str, (u32, u32, String)>,
    roots: &[PathBuf],
) -> io::Result<String> {
    let mut hash = Sha256::new();
    hash.update(format!("{VERSION} {roots:?} {generated:?}"));
    for (path, source) in sources {
        hash.update(path.as_os_str().as_bytes());
        match source {
            Source::Link(target) => hash.update(format!("\0l{target:?}")),
            Source::Directory(mode) => hash.update(format!("\0d{mode}")),
            Source::File(mode) => {
                let m = fs::metadata(Path::new("/etc").join(path));
                let times = m.map(|m| (m.len(), m.ino(), m.mtime(), m.mtime_nsec(), m.ctime(), m.ctime_nsec()));
                hash.update(format!("\0f{mode} {:?}", times.ok()));
            }
        }
    }
    Ok(short(&hash.finalize()))
}

fn fill(
    top: &Path,
    sources: &BTreeMap<PathBuf, Source>,
    generated: &BTreeMap<&str, (u32, u32, String)>,
    roots: &[PathBuf],
    user: bool,
) -> io::Result<()> {
    let mode = |path: &Path, mode| fs::set_permissions(path, Permissions::from_mode(mode));
    mode(top, 0o755)?;
    for (dir, bits) in DIRS {
        fs::create_dir_all(top.join(dir))?;
        mode(&top.join(dir), *bits)?;
    }
    for root in roots {
        fs::create_dir_all(top.join(root.strip_prefix("/").unwrap_or(root)))?;
    }
    for link in ["bin", "sbin", "lib", "lib32", "lib64", "libx32"] {
        if let Ok(target) = fs::read_link(Path::new("/").join(link)) {
            symlink(target, top.join(link))?;
        }
    }
    symlink("/run", top.join("var/run"))?;
    for (path, source) in sources {
        let (from, to) = (Path::new("/etc").join(path), top.join("etc").join(path));
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent)?;
        }
        match source {
            Source::Directory(bits) => {
                fs::create_dir_all(&to)?;
                mode(&to, bits & 0o755 | 0o700)?;
            }
            Source::Link(target) => symlink(target, &to)?,
            Source::File(bits) => {
                if let Some(content) = readable(&from)? {
                    fs::write(&to, content)?;
                    mode(&to, *bits)?;
                }
            }
        }
    }
    for (name, (bits, group, content)) in generated {
        let to = top.join(name);
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent)?;
        }
        match fs::remove_file(&to) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        fs::write(&to, content)?;
        if !user {
            chown(&to, Some(0), Some(*group))?;
        }
        mode(&to, *bits)?;
    }
    if fs::symlink_metadata(top.join("etc/os-release")).is_err() {
        symlink("../usr/lib/os-release", top.join("etc/os-release"))?;
    }
    symlink("/proc/mounts", top.join("etc/mtab"))
}

/// The content of a file that may be copied: it may have changed since it was listed, so what was opened decides.
fn readable(path: &Path) -> io::Result<Option<Vec<u8>>> {
    let file = match fs::File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    let meta = file.metadata()?;
    if !meta.is_file() || meta.mode() & 0o004 == 0 || meta.len() > LARGEST {
        return Ok(None);
    }
    let mut content = Vec::new();
    file.take(LARGEST).read_to_end(&mut content)?;
    Ok(Some(content).filter(|c| !suspicious(c)))
}

fn suspicious(content: &[u8]) -> bool {
    let text = String::from_utf8_lossy(content);
    if SUSPICIOUS.iter().any(|word| text.contains(word)) {
        return true;
    }
    // scheme://user:password@host
    text.split("://").skip(1).any(|rest| {
        let authority = rest.split(['/', ' ', '\n', '\t', '"', '\'']).next().unwrap_or_default();
        authority.split_once('@').is_some_and(|(user, _)| user.contains(':'))
    })
}

/// What is written anew for each host: path, mode, group and text.
fn generated() -> io::Result<BTreeMap<&'static str, (u32, u32, String)>> {
    let (passwd, names) = accounts(&fs::read_to_string("/etc/passwd")?);
    let groups = fs::read_to_string("/etc/group")?;
    let shadow_group = groups.lines().find_map(|l| l.strip_prefix("shadow:")?.split(':').nth(1)?.parse().ok());
    let group: Vec<String> = groups.lines().filter_map(system_group).collect();
    let locked = |name: &String| format!("{name}:*:20000:0:99999:7:::\n");
    let shadow: String = names.iter().map(locked).collect();
    let gshadow: String = group.iter().filter_map(|l| l.split(':').next()).map(|n| format!("{n}:*::\n")).collect();
    let shadow_group = shadow_group.unwrap_or(0);
    let hosts = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n";
    let nsswitch = "passwd: files\ngroup: files\nshadow: files\ngshadow: files\nhosts: files dns\nnetworks: files\n\
                    protocols: files\nservices: files\nethers: files\nrpc: files\nnetgroup: files\n";
    let mut all = BTreeMap::from([
        ("etc/passwd", (0o644, 0, passwd)),
        ("etc/group", (0o644, 0, group.iter().map(|l| format!("{l}\n")).collect())),
        ("etc/shadow", (0o640, shadow_group, shadow)),
        ("etc/gshadow", (0o640, shadow_group, gshadow)),
        ("etc/hosts", (0o644, 0, hosts.to_owned())),
        ("etc/nsswitch.conf", (0o644, 0, nsswitch.to_owned())),
        ("etc/resolv.conf", (0o644, 0, String::new())),
        ("etc/fstab", (0o644, 0, String::new())),
        ("etc/motd", (0o644, 0, String::new())),
        ("etc/subuid", (0o644, 0, String::new())),
        ("etc/subgid", (0o644, 0, String::new())),
    ]);
    if Path::new("/usr/bin/sudo").exists() {
        all.insert("etc/sudoers", (0o440, 0, "root ALL=(ALL:ALL) ALL\n%sudo ALL=(ALL:ALL) ALL\n".to_owned()));
    }
    Ok(all)
}

/// The system's accounts of a passwd(5), without people, comments and passwords; and their names.
fn accounts(passwd: &str) -> (String, Vec<String>) {
    let mut text = String::new();
    let mut names = Vec::new();
    for line in passwd.lines() {
        let fields: Vec<&str> = line.split(':').collect();
        let [name, _, uid, gid, _, home, shell] = fields.as_slice() else { continue };
        if uid.parse().is_ok_and(is_system) && gid.parse().is_ok_and(|g: u32| g < 65536) {
            text.push_str(&match *name {
                "root" => "root:x:0:0:root:/root:/bin/bash\n".to_owned(),
                name => format!("{name}:x:{uid}:{gid}::{home}:{shell}\n"),
            });
            names.push((*name).to_owned());
        }
    }
    (text, names)
}

/// Numbers that Debian and most others give to the system's own accounts, and nobody.
fn is_system(id: u32) -> bool {
    id < 1000 || id == 65534
}

/// A line of group(5) without its members: they may be people.
fn system_group(line: &str) -> Option<String> {
    let mut fields = line.split(':');
    let (name, _, gid) = (fields.next()?, fields.next()?, fields.next()?);
    gid.parse().is_ok_and(is_system).then(|| format!("{name}:x:{gid}:"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn people_and_passwords_stay_outside() {
        let (text, names) = accounts(
            "root:hash:0:0:The Boss:/root:/bin/zsh\nman:x:6:12:man:/var:/bin/sh\njoe:x:1000:1000::/home/joe:/bin/sh\nx\n",
        );
        assert_eq!(text, "root:x:0:0:root:/root:/bin/bash\nman:x:6:12::/var:/bin/sh\n");
        assert_eq!(names, ["root", "man"]);
        assert_eq!(system_group("adm:x:4:joe").as_deref(), Some("adm:x:4:"));
        assert_eq!(system_group("joe:x:1000:"), None);
    }

    #[test]
    fn credentials_are_recognised() {
        assert!(suspicious(b"deb https://me:secret@deb.example.org/ stable main"));
        assert!(suspicious(b"-----BEGIN RSA PRIVATE KEY-----"));
        assert!(!suspicious(b"deb https://deb.debian.org/debian stable main # mail a@b.c"));
    }
}
