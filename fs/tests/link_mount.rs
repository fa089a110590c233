//! Guests that lie, below a real mount: what programs see, that none of them stays in state D, and that neither the
//! host's own files nor another guest notice.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod fuse_support;
mod link_support;

use fuse_support::{Client, End, eventually};
use link_support::guest::{Act, DIR, FILE, LINK, attr, entry, page, serve};
use link_support::host::view;
use link_support::{Agent, Host, OP_DEADLINE, connect, resident};
use machinefs::errno::Errno;
use machinefs::fuse::{self, MountOptions, Session};
use machinefs::tree::guest::{GuestFiles, GuestView};
use machinefs::tree::ops::{self, Answer, Caller, Cancel, Entry, Files, NodeId, Op, Respond, Responder};
use machinefs_protocol::file::{Attr, FileReply, FileRequest};
use rustix::fs::{self, Mode, OFlags};
use std::ffi::CString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The mount's root directory; the nodes of `a` and `b` in it follow.
const ROOT: NodeId = ops::ROOT;
const NAMES: [&[u8]; 2] = [b"a", b"b"];

/// A root directory with two guests in it.
struct Both {
    guests: [Arc<GuestFiles>; 2],
}

impl Both {
    fn directory(node: NodeId) -> Entry {
        let attr =
            ops::Attr { ino: node, mode: libc::S_IFDIR | 0o755, nlink: 2, blksize: 4096, ..ops::Attr::default() };
        Entry { node, generation: 0, attr, entry_ttl: Duration::ZERO, attr_ttl: Duration::ZERO }
    }

    /// Exchanges a guest's directory in this tree for its root.
    fn guest(&self, node: &mut NodeId) -> Option<&Arc<GuestFiles>> {
        let index = match *node {
            2 | 3 => (*node - 2) as usize,
            node if node >> 63 == 1 => GuestFiles::epoch_of(node) as usize - 1,
            _ => return None,
        };
        let guest = self.guests.get(index)?;
        if *node < 4 {
            *node = guest.root();
        }
        Some(guest)
    }
}

/// The directory that stands for a guest's root shows its own attributes.
struct AsRoot(Responder, NodeId);

impl Respond for AsRoot {
    fn respond(self: Box<Self>, answer: Result<Answer, Errno>) {
        let answer = match answer {
            Ok(Answer::Attr(..)) => Ok(Answer::Attr(Both::directory(self.1).attr, Duration::ZERO)),
            other => other,
        };
        self.0.respond(answer);
    }

    fn set_cancel(&mut self, cancel: Arc<dyn Cancel>) -> bool {
        self.0.set_cancel(cancel)
    }
}

impl Files for Both {
    fn dispatch(&self, caller: Caller, mut op: Op<'_>, responder: Responder) {
        let answer = match &mut op {
            Op::Lookup { parent: ROOT, name } => match NAMES.iter().position(|known| known == name) {
                Some(index) => Ok(Answer::Entry(Self::directory(2 + index as NodeId))),
                None => Err(Errno::ENOENT),
            },
            Op::GetAttr { node: node @ (ROOT | 2 | 3), .. } => {
                Ok(Answer::Attr(Self::directory(*node).attr, Duration::ZERO))
            }
            Op::StatFs { node: ROOT | 2 | 3 } => {
                Ok(Answer::StatFs(ops::StatFs { bsize: 4096, ..ops::StatFs::default() }))
            }
            Op::Lookup { parent: node, .. }
            | Op::GetAttr { node, .. }
            | Op::SetAttr { node, .. }
            | Op::ReadLink { node }
            | Op::MkDir { parent: node, .. }
            | Op::Unlink { parent: node, .. }
            | Op::RmDir { parent: node, .. }
            | Op::Create { parent: node, .. }
            | Op::Rename { parent: node, .. }
            | Op::Open { node, .. }
            | Op::Read { node, .. }
            | Op::Write { node, .. }
            | Op::Flush { node, .. }
            | Op::Release { node, .. }
            | Op::Fsync { node, .. }
            | Op::OpenDir { node, .. }
            | Op::ReadDir { node, .. }
            | Op::ReleaseDir { node, .. }
            | Op::GetXattr { node, .. }
            | Op::ListXattr { node, .. }
            | Op::StatFs { node } => {
                let shown = *node;
                match self.guest(node) {
                    Some(guest) => {
                        let guest = guest.clone();
                        if let Op::Rename { new_parent, .. } = &mut op {
                            self.guest(new_parent);
                        }
                        let responder = if shown < 4 { Box::new(AsRoot(responder, shown)) } else { responder };
                        return guest.dispatch(caller, op, responder);
                    }
                    None => Err(Errno::EPERM),
                }
            }
            _ => Err(Errno::EPERM),
        };
        responder.respond(answer);
    }

    fn forget(&self, mut node: NodeId, count: u64) {
        if node >> 63 == 1
            && let Some(guest) = self.guest(&mut node)
        {
            guest.forget(node, count);
        }
    }
}

/// A mount with two guests; `a` lies, `b` is honest.
struct Mounted {
    hosts: [Host; 2],
    session: Option<Session>,
    directory: tempfile::TempDir,
}

impl Mounted {
    fn new(lie: impl FnMut(&mut Agent, u64, &FileRequest<'_>) -> Act + Send + 'static) -> Self {
        let directory = tempfile::Builder::new().prefix("mfs-link-").tempdir().unwrap();
        let target = directory.path().join("m");
        std::fs::create_dir(&target).unwrap();
        std::fs::write(directory.path().join("canary"), "a file of the host\n").unwrap();
        let [(lying, liar), (other, honest)] = [connect(OP_DEADLINE), connect(OP_DEADLINE)];
        serve(liar, lie);
        serve(honest, |_, _, _| Act::Honest);
        let files = |slot, host: &Host| {
            let view = GuestView { owner_uid: 0, owner_gid: 0, ..view(slot) };
            Arc::new(GuestFiles::new(host.link.clone(), view))
        };
        let guests = [files(1, &lying), files(2, &other)];
        let options = MountOptions { readers: Some(4), ..MountOptions::new(&target) };
        let session = fuse::mount(options).unwrap().serve(Arc::new(Both { guests })).unwrap();
        Mounted { hosts: [lying, other], session: Some(session), directory }
    }

    fn path(&self, below: &str) -> PathBuf {
        self.directory.path().join("m").join(below)
    }

    fn c_path(&self, below: &str) -> CString {
        CString::new(self.path(below).into_os_string().into_encoded_bytes()).unwrap()
    }

    /// A shell command at the mount: what it prints, its exit code.
    fn shell(&self, command: &str) -> (String, i32) {
        let script = format!("cd '{}' && {{ {command}; }} 2>&1", self.path("").display());
        let output = Command::new("timeout").args(["60", "sh", "-c", &script]).output().unwrap();
        (String::from_utf8_lossy(&output.stdout).into_owned(), output.status.code().unwrap_or(-1))
    }

    /// What the other guest's user sees: everything as ever.
    fn others_do_not_notice(&self) {
        let (text, code) = self.shell("stat -c %s b/f && ls b && wc -c < b/f && stat -f -c %s . && readlink b/l");
        assert_eq!((text.as_str(), code), ("8192\nd\nf\nl\n8192\n4096\ntarget\n", 0));
        let canary = std::fs::read_to_string(self.directory.path().join("canary")).unwrap();
        assert_eq!(canary, "a file of the host\n");
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        self.hosts.iter().for_each(|host| host.link.close());
        if let Some(session) = self.session.take() {
            session.unmount(true).unwrap();
            session.join();
        }
        assert!(!Path::new(&self.path("a")).exists());
    }
}

fn say(reply: FileReply) -> Act {
    Act::Say(reply, Vec::new())
}

/// The error number of a system call, or 0: for the exit code of a client.
fn code<T>(result: rustix::io::Result<T>) -> i32 {
    result.map_or_else(|errno| errno.raw_os_error(), |_| 0)
}

const UNREACHABLE: &str = "No route to host";

#[test]
fn evil_names_and_listings() {
    require_fuse!();
    for name in [&b"../canary"[..], b"/etc", b"x\0", b"", b"a/b"] {
        let name = name.to_vec();
        let mount = Mounted::new(move |_, _, request| match request {
            FileRequest::OpenDir { .. } => {
                let (page, body) = page(&[(b"f", 1, Some(entry(FILE))), (&name, 2, Some(entry(FILE)))], true);
                Act::Say(FileReply::OpenedDir(7, page), body)
            }
            _ => Act::Honest,
        });
        let (text, code) = mount.shell("ls -l a");
        assert!(code != 0 && text.contains(UNREACHABLE), "{text}");
        let (text, code) = mount.shell("cat a/f | wc -c; rm -r a/d/* ; find a");
        assert!(code != 0 && text.starts_with("8192\n"), "{text}");
        mount.others_do_not_notice();
    }
}

#[test]
fn a_listing_in_a_circle_ends() {
    require_fuse!();
    let mount = Mounted::new(|_, _, request| match request {
        FileRequest::OpenDir { .. } => {
            let (page, body) = page(&[(b"f", 5, Some(entry(FILE)))], false);
            Act::Say(FileReply::OpenedDir(7, page), body)
        }
        FileRequest::ReadDir { .. } => {
            let (page, body) = page(&[(b"f", 5, Some(entry(FILE)))], false);
            Act::Say(FileReply::Dir(page), body)
        }
        _ => Act::Honest,
    });
    assert_eq!(mount.shell("ls a | sort -u"), ("f\n".into(), 0));
    mount.others_do_not_notice();
}

#[test]
fn whoever_walks_a_listing_without_end_can_be_killed() {
    require_fuse!();
    let next = AtomicU64::new(1);
    let mount = Mounted::new(move |_, _, request| {
        let more = || {
            let names: Vec<(Vec<u8>, u64)> = (0..1000)
                .map(|_| next.fetch_add(1, Ordering::SeqCst))
                .map(|n| (format!("n{n}").into_bytes(), n))
                .collect();
            let all: Vec<_> =
                names.iter().map(|(name, n)| (&name[..], *n, Some(link_support::guest::entry(FILE)))).collect();
            page(&all, false)
        };
        match request {
            FileRequest::OpenDir { .. } => {
                let (page, body) = more();
                Act::Say(FileReply::OpenedDir(7, page), body)
            }
            FileRequest::ReadDir { .. } => {
                let (page, body) = more();
                Act::Say(FileReply::Dir(page), body)
            }
            _ => Act::Honest,
        }
    });
    let before = resident();
    let mut command = Command::new("ls");
    command.arg("-U").arg(mount.path("a")).stdout(std::process::Stdio::null());
    let mut client = Client::command(command);
    std::thread::sleep(Duration::from_secs(2));
    mount.others_do_not_notice();
    client.signal(libc::SIGKILL);
    assert_eq!(client.wait(), End::Signal(libc::SIGKILL));
    assert!(resident() < before + (256 << 20), "memory grew");
}

#[test]
fn links_that_climb_out_reach_nothing_of_the_host() {
    require_fuse!();
    for target in ["../../canary", "../../../../../../../../etc/hostname", "d/../../../canary", "/../../canary"] {
        let mount = Mounted::new(move |_, _, request| match request {
            FileRequest::ReadLink { .. } => Act::Say(FileReply::Data, target.into()),
            _ => Act::Honest,
        });
        let (text, code) = mount.shell("cat a/l");
        assert!(code != 0 && !text.contains("a file of the host"), "{target}: {text}");
        let (text, code) = mount.shell("echo overwritten > a/l");
        assert!(code != 0, "{target}: {text}");
        mount.others_do_not_notice();
    }
    let canary = std::env::temp_dir().join(format!("mfs-canary-{}", std::process::id()));
    std::fs::write(&canary, "a file of the host\n").unwrap();
    let absolute = canary.clone().into_os_string().into_encoded_bytes();
    let mount = Mounted::new(move |_, _, request| match request {
        FileRequest::ReadLink { .. } => Act::Say(FileReply::Data, absolute.clone()),
        _ => Act::Honest,
    });
    let (text, code) = mount.shell("cat a/l");
    std::fs::remove_file(canary).unwrap();
    assert!(code != 0 && !text.contains("a file of the host"), "{text}");
}

#[test]
fn types_that_change_and_one_inode_for_two_files() {
    require_fuse!();
    let flip = AtomicU64::new(0);
    let mount = Mounted::new(move |_, _, request| match request {
        // One node for all names, another type each time.
        FileRequest::Lookup { .. } => {
            let kind = [FILE, DIR, LINK][flip.fetch_add(1, Ordering::SeqCst) as usize % 3];
            say(FileReply::Entry(machinefs_protocol::file::Entry { node: 9, ..entry(kind) }))
        }
        FileRequest::GetAttr { .. } => {
            let kind = [DIR, LINK, FILE][flip.fetch_add(1, Ordering::SeqCst) as usize % 3];
            say(FileReply::Attr(attr(kind)))
        }
        _ => Act::Honest,
    });
    for _ in 0..20 {
        mount.shell("stat a/f; cat a/f; ls a/d; cat a/l; stat a/x/y/z; echo x > a/f; ls -lR a; find a -type f | head");
    }
    mount.others_do_not_notice();
}

#[test]
fn sizes_that_are_huge_or_shrink_in_mid_read() {
    require_fuse!();
    let reads = AtomicU64::new(0);
    let mount = Mounted::new(move |_, _, request| match request {
        FileRequest::Lookup { name: b"huge", .. } => {
            let huge = Attr { size: i64::MAX as u64, blocks: 8, ..attr(FILE) };
            say(FileReply::Entry(machinefs_protocol::file::Entry { node: 20, generation: 0, attr: huge }))
        }
        FileRequest::Lookup { name: b"larger", .. } => {
            let larger = Attr { size: 1 << 63, ..attr(FILE) };
            say(FileReply::Entry(machinefs_protocol::file::Entry { node: 21, generation: 0, attr: larger }))
        }
        FileRequest::GetAttr { node: 20, .. } => {
            say(FileReply::Attr(Attr { size: i64::MAX as u64, blocks: 8, ..attr(FILE) }))
        }
        // The first page is whole, then there is less and less.
        FileRequest::Read { size, .. } => {
            let left = 4096 >> reads.fetch_add(1, Ordering::SeqCst).min(20);
            Act::Say(FileReply::Data, vec![b'x'; left.min(*size as usize)])
        }
        _ => Act::Honest,
    });
    let before = resident();
    let (text, _) = mount.shell("cat a/f | wc -c; dd if=a/f bs=1k count=9 2>/dev/null | wc -c");
    assert!(text.lines().all(|line| line.parse::<u64>().unwrap() <= 16_384), "{text}");
    let (text, code) =
        mount.shell("head -c 100000 a/huge | wc -c; tail -c 10 a/huge | wc -c; tac a/huge | head -c 9 | wc -c");
    assert_eq!(code, 0, "{text}");
    let (text, code) = mount.shell("cat a/larger");
    assert!(code != 0 && text.contains(UNREACHABLE), "{text}");
    assert!(resident() < before + (256 << 20), "memory grew");
    mount.others_do_not_notice();
}

#[test]
fn reads_longer_than_asked_end_the_link_and_nothing_else() {
    require_fuse!();
    let mount = Mounted::new(|_, _, request| match request {
        FileRequest::Read { size, .. } => Act::Say(FileReply::Data, vec![b'x'; 2 * *size as usize]),
        _ => Act::Honest,
    });
    for command in ["cat a/f", "cat a/f", "ls a", "stat a/f"] {
        let (text, code) = mount.shell(command);
        assert!(code != 0 && text.contains(UNREACHABLE), "{command}: {text}");
    }
    mount.others_do_not_notice();
}

#[test]
fn malformed_attribute_lists() {
    require_fuse!();
    let mount = Mounted::new(|_, _, request| match request {
        FileRequest::ListXattr { max: 0, .. } => say(FileReply::Count(10)),
        FileRequest::ListXattr { .. } => Act::Say(FileReply::Data, b"no end".to_vec()),
        FileRequest::GetXattr { .. } => say(FileReply::Count(u32::MAX)),
        _ => Act::Honest,
    });
    let python = "import os,sys\nfor f in (lambda: os.listxattr('a/f'), lambda: os.getxattr('a/f', 'user.x')):\n  \
        try: f(); print('no error')\n  except OSError as e: print(e.errno)";
    assert_eq!(mount.shell(&format!("python3 -c \"{python}\"")), ("113\n113\n".into(), 0));
    mount.others_do_not_notice();
}

#[test]
fn silence_ends_within_the_deadline_and_others_do_not_notice() {
    require_fuse!();
    let mount = Mounted::new(|_, _, _| Act::Silence);
    let [file, new, dir] = ["a/f", "a/new", "a"].map(|path| mount.c_path(path));
    let (read, create) = (OFlags::RDONLY, OFlags::WRONLY | OFlags::CREATE);
    let works: [(&str, &dyn Fn() -> i32); 6] = [
        ("stat", &|| code(fs::access(&*file, fs::Access::EXISTS))),
        ("mkdir", &|| code(fs::mkdir(&*new, Mode::RWXU))),
        ("create", &|| code(fs::open(&*new, create, Mode::RWXU))),
        ("unlink", &|| code(fs::unlink(&*file))),
        ("rename", &|| code(fs::rename(&*file, &*new))),
        ("opendir", &|| code(fs::open(&*dir, read | OFlags::DIRECTORY, Mode::empty()))),
    ];
    // Twice: the second of each waits behind the first in the kernel.
    let mut clients: Vec<(&str, Client)> = Vec::new();
    for _ in 0..2 {
        clients.extend(works.iter().map(|(name, work)| (*name, Client::run(work))));
    }
    let mut killed = Client::run(works[0].1);
    mount.others_do_not_notice();
    killed.signal(libc::SIGKILL);
    assert_eq!(killed.wait(), End::Signal(libc::SIGKILL));
    for (name, client) in &mut clients {
        let end = client.wait();
        let allowed = [libc::ETIMEDOUT, libc::EHOSTUNREACH].map(End::Exit);
        assert!(allowed.contains(&end), "{name}: {end:?}");
    }
    mount.others_do_not_notice();
    // From now on at once, as long as it is silent.
    let (text, code) = mount.shell("ls a");
    assert!(code != 0, "{text}");
}

#[test]
fn an_agent_that_ends_in_mid_operation() {
    require_fuse!();
    let mount = Mounted::new(|_, _, request| match request {
        FileRequest::Read { .. } => Act::Hang,
        FileRequest::SetAttr { .. } => Act::Silence,
        _ => Act::Honest,
    });
    let path = mount.c_path("a/f");
    let mut waiting = Client::run(|| code(fs::chmod(&*path, Mode::RUSR)));
    eventually("it waits", || mount.hosts[0].link.pending().0 > 0);
    let (text, code) = mount.shell("cat a/f");
    assert!(code != 0 && text.contains(UNREACHABLE), "{text}");
    let end = waiting.wait();
    assert!([libc::EHOSTUNREACH, libc::ETIMEDOUT].map(End::Exit).contains(&end), "{end:?}");
    mount.others_do_not_notice();
}

#[test]
fn replies_twice_and_of_the_wrong_kind() {
    require_fuse!();
    let mount = Mounted::new(|agent, tag, request| match request {
        FileRequest::GetAttr { .. } => say(FileReply::Opened(5)),
        FileRequest::Lookup { .. } => {
            use machinefs_protocol::message::Reply;
            for tag in [tag + 99, tag] {
                // The host may have closed the stream.
                let _ = agent.reply(tag, &Reply::File(FileReply::Entry(entry(FILE))), &[]);
            }
            Act::Honest
        }
        _ => Act::Honest,
    });
    let (text, code) = mount.shell("cat a/f");
    assert!(code != 0 || text.len() == 8192, "{text}");
    let (text, code) = mount.shell("for i in 1 2 3 4 5 6 7 8 9; do stat -c %s a/f; done");
    assert!(text.contains(UNREACHABLE) || code == 0, "{text}");
    // Too many of them, and nothing is believed any more.
    let (_, code) = mount.shell("i=0; while [ $i -lt 2000 ]; do i=$((i+1)); [ -e a/f ]; done; ls a/f");
    assert_ne!(code, 0);
    mount.others_do_not_notice();
}
