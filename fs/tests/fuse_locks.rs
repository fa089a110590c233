//! Blocking against the kernel's locks: each operation is left pending, a second client comes, signals come. What
//! waits behind what is in docs/KERNEL-LOCKS.md; `cargo test --test fuse_locks -- --nocapture` prints it anew.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod fuse_support;

use fuse_support::fake::{Content, Fake, Plan};
use fuse_support::ops::{Paths, SUBJECTS, Subject};
use fuse_support::{Client, End, Mount, errno_of, eventually};
use machinefs::tree::ops::{Opened, ROOT};
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Duration;

/// Long enough that it never comes in a test where it should not.
const NEVER: Duration = Duration::from_secs(3600);
/// The pending operation's own deadline, for a file system that does not hear interrupts.
const DEADLINE: Duration = Duration::from_millis(600);
/// How long a client is given to get stuck, if it does. Too short can only hide that it does.
const SETTLE: Duration = Duration::from_millis(120);

fn mount() -> (Mount, Paths) {
    let fake = Fake::new();
    let directory = fake.add(ROOT, b"d", Content::Directory(BTreeMap::new()));
    let plain = fake.add(directory, b"f", Content::File(vec![b'x'; 8192]));
    fake.add(directory, b"g", Content::File(vec![b'y'; 8192]));
    let direct = fake.add(directory, b"direct", Content::File(vec![b'x'; 8192]));
    fake.set(direct, |node| node.opened = Opened { direct_io: true, ..Opened::default() });
    let stream = fake.add(directory, b"stream", Content::File(vec![b'x'; 8192]));
    fake.set(stream, |node| node.opened = Opened { direct_io: true, stream: true, ..Opened::default() });
    fake.add(directory, b"l", Content::Link(b"f".to_vec()));
    fake.add(directory, b"sub", Content::Directory(BTreeMap::new()));
    fake.set(plain, |node| {
        node.xattrs.insert(b"user.a".to_vec(), b"1".to_vec());
    });
    let mount = Mount::new(fake);
    let paths = Paths::new(&mount, [directory, plain, direct, stream]);
    (mount, paths)
}

/// Starts the first client; its operation is pending when this returns.
fn start_pending(mount: &Mount, paths: &Paths, subject: &'static Subject, obeys: bool, deadline: Duration) -> Client {
    let matches = (subject.matches)(paths);
    mount.fake.plan(Plan { matches, obeys, deadline });
    let client = Client::run(|| (subject.run)(paths));
    mount.fake.wait_pending();
    client
}

/// `ls -l` of the directory.
fn list(paths: &Paths) -> i32 {
    // SAFETY: the paths end with NULs, the buffers are as long as is said.
    unsafe {
        let fd = libc::open(paths.directory.as_ptr(), libc::O_RDONLY | libc::O_DIRECTORY);
        if fd < 0 {
            return errno_of(-1);
        }
        let mut buffer = [0u64; 512];
        loop {
            let count = libc::syscall(libc::SYS_getdents64, fd, buffer.as_mut_ptr(), size_of_val(&buffer));
            if count <= 0 {
                break;
            }
        }
        for path in [&paths.file, &paths.other, &paths.link, &paths.sub] {
            let mut data = std::mem::MaybeUninit::<libc::stat>::uninit();
            libc::lstat(path.as_ptr(), data.as_mut_ptr());
        }
        0
    }
}

/// What a second client of one kind does while the first is pending.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Behind {
    /// Goes through.
    Free,
    /// Waits, and ends when it is killed.
    Killable,
    /// Waits, and a kill has no effect until the first is done.
    Stuck,
}

impl std::fmt::Display for Behind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Behind::Free => "free",
            Behind::Killable => "waits, killable",
            Behind::Stuck => "waits in D",
        })
    }
}

/// Lets a second client come, and kills it when it waits.
fn behind(second: &mut Client) -> Behind {
    std::thread::sleep(SETTLE);
    if second.try_wait().is_some() {
        return Behind::Free;
    }
    second.signal(libc::SIGKILL);
    std::thread::sleep(SETTLE);
    if second.try_wait().is_some() { Behind::Killable } else { Behind::Stuck }
}

/// Runs a check for each subject, several at a time; gives the failures of all.
fn for_each_subject(check: impl Fn(&'static Subject) -> Result<(), String> + Sync) {
    let next = Mutex::new(SUBJECTS.iter());
    let failures = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                loop {
                    let Some(subject) = next.lock().unwrap().next() else { break };
                    if let Err(failure) = check(subject) {
                        failures.lock().unwrap().push(format!("{}: {failure}", subject.name));
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().unwrap();
    assert!(failures.is_empty(), "{failures:#?}");
}

/// The first client is interrupted, and the file system obeys: it ends at once, and so does whoever waits behind it.
#[test]
fn an_interrupted_client_ends_at_once_and_frees_who_waits_behind_it() {
    require_fuse!();
    for_each_subject(|subject| {
        for signal in [libc::SIGINT, libc::SIGKILL] {
            for listing in [false, true] {
                let (mount, paths) = mount();
                let mut first = start_pending(&mount, &paths, subject, true, NEVER);
                let mut second = Client::run(|| if listing { list(&paths) } else { (subject.run)(&paths) });
                std::thread::sleep(SETTLE / 4);
                first.signal(signal);
                if subject.waits {
                    let end = first.wait();
                    if end != End::Signal(signal) {
                        return Err(format!("signal {signal}: ended with {end:?}"));
                    }
                } else {
                    first.wait();
                    mount.fake.expire_all();
                }
                // It finds what the first left: any result, but an end.
                second.wait();
                if *mount.fake.pending.lock()[0].timed_out.lock() && subject.waits {
                    return Err("ended by its deadline, not by the interrupt".into());
                }
            }
        }
        Ok(())
    });
}

/// The file system does not hear the interrupt: nobody is in D any more once the operation's own deadline has passed.
/// What waits behind what until then is as it was measured.
#[test]
fn nobody_is_left_in_d_past_the_deadline_and_the_table_of_locks_holds() {
    require_fuse!();
    let rows = Mutex::new(BTreeMap::new());
    for_each_subject(|subject| {
        let mut seen = Vec::new();
        let mut states = Vec::new();
        for signal in [libc::SIGINT, libc::SIGKILL] {
            for listing in [false, true] {
                let (mount, paths) = mount();
                let mut first = start_pending(&mount, &paths, subject, false, DEADLINE);
                let mut second = Client::run(|| if listing { list(&paths) } else { (subject.run)(&paths) });
                if subject.waits && signal == libc::SIGINT && !listing {
                    states.push(first.state());
                }
                first.signal(signal);
                let how = behind(&mut second);
                if subject.waits && !listing {
                    states.push(if first.try_wait().is_some() { '-' } else { first.state() });
                }
                let pending = mount.fake.pending.lock()[0].clone();
                eventually("the deadline", || *pending.timed_out.lock());
                let (first_end, _) = (first.wait(), second.wait());
                if subject.waits && first_end != End::Signal(signal) {
                    return Err(format!("signal {signal}: ended with {first_end:?}"));
                }
                if signal == libc::SIGINT {
                    seen.push(how);
                }
            }
        }
        rows.lock().unwrap().insert(subject.name, (states.iter().collect::<String>(), seen[0], seen[1]));
        let expected = (subject.same, subject.list);
        let allowed = |seen: Behind, most: fuse_support::ops::Wait| match most {
            fuse_support::ops::Wait::Never => seen == Behind::Free,
            fuse_support::ops::Wait::Killable => seen != Behind::Stuck,
            fuse_support::ops::Wait::Stuck => true,
        };
        if !allowed(seen[0], expected.0) || !allowed(seen[1], expected.1) {
            return Err(format!("measured: same {}, ls {}; promised {expected:?}", seen[0], seen[1]));
        }
        Ok(())
    });
    println!(
        "| operation pending | first: before, after SIGINT, after SIGKILL | the same again | ls of the directory |"
    );
    for (name, (states, same, list)) in rows.into_inner().unwrap() {
        println!("| {name} | {states} | {same} | {list} |");
    }
}
