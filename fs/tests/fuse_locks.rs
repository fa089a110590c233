//! Blocking against the kernel's locks: each operation is left pending, a second client comes, signals come. What
//! waits behind what is in docs/KERNEL-LOCKS.md; `cargo test --test fuse_locks -- --nocapture` prints it anew.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod fuse_support;

use fuse_support::fake::{Content, Fake, Pending, Plan};
use fuse_support::ops::{First, Nodes, Paths, SUBJECTS, Second, Subject, Wait, use_another_machine};
use fuse_support::{Client, End, Mount, errno_of, eventually, handle_usr1};
use machinefs::fuse::Patience;
use machinefs::tree::ops::{Opened, ROOT};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// How long a client is given to get stuck, if it does. Too short can only hide that it does.
const SETTLE: Duration = Duration::from_millis(150);

/// The layer must not answer in the place of the file system.
const PATIENT: Patience = Patience { after_signal: Duration::from_secs(3600), holding_lock: Duration::from_secs(3600) };

fn mount(patience: Patience) -> (Mount, Paths) {
    let fake = Fake::new();
    let directory = fake.add(ROOT, b"d", Content::Directory(BTreeMap::new()));
    let file = |name: &[u8]| fake.add(directory, name, Content::File(vec![b'x'; 8192]));
    let opens = |node, opened| fake.set(node, |node| node.opened = opened);
    let plain = file(b"f");
    file(b"g");
    let (direct, stream, kept) = (file(b"direct"), file(b"stream"), file(b"kept"));
    opens(direct, Opened { direct_io: true, ..Opened::default() });
    opens(stream, Opened { direct_io: true, stream: true, ..Opened::default() });
    opens(kept, Opened { keep_cache: true, ..Opened::default() });
    opens(file(b"parallel"), Opened { direct_io: true, parallel_direct_writes: true, ..Opened::default() });
    fake.add(directory, b"l", Content::Link(b"f".to_vec()));
    fake.add(directory, b"sub", Content::Directory(BTreeMap::new()));
    fake.set(plain, |node| {
        node.xattrs.insert(b"user.a".to_vec(), b"1".to_vec());
    });
    let elsewhere = fake.add(ROOT, b"e", Content::Directory(BTreeMap::new()));
    fake.add(elsewhere, b"f", Content::File(vec![b'y'; 8192]));
    let mount = Mount::with(fake, |options| options.patience = patience);
    let paths = Paths::new(&mount, Nodes { directory, file: plain, direct, stream, kept });
    (mount, paths)
}

/// A signal to the first client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Signal {
    /// SIGUSR1, which it handles.
    Handled,
    Interrupt,
    Kill,
}

impl Signal {
    const ALL: [Signal; 3] = [Signal::Handled, Signal::Interrupt, Signal::Kill];

    fn number(self) -> i32 {
        match self {
            Signal::Handled => libc::SIGUSR1,
            Signal::Interrupt => libc::SIGINT,
            Signal::Kill => libc::SIGKILL,
        }
    }

    fn is_right_end(self, subject: &Subject, end: End) -> bool {
        match self {
            // poll(2) reports the error as a state of the file.
            Signal::Handled if subject.name == "poll" => end == End::Exit(0),
            Signal::Handled => end == End::Exit(libc::EINTR),
            fatal => end == End::Signal(fatal.number()),
        }
    }
}

/// Starts the first client; its operation is pending when this returns.
fn start_pending(mount: &Mount, paths: &Paths, subject: &'static Subject, obeys: bool) -> (Client, Arc<Pending>) {
    if subject.warm() {
        Client::run(|| (subject.run)(paths)).wait();
    }
    let (matches, nodes) = (subject.matches, paths.nodes);
    mount.fake.plan(Plan { matches: Box::new(move |op| matches(op, nodes)), obeys });
    let client = Client::run(|| {
        handle_usr1();
        (subject.run)(paths)
    });
    let pending = mount.fake.wait_pending();
    (client, pending)
}

/// Waits until the client sleeps, in whatever way, or has ended.
fn asleep(client: &mut Client) -> char {
    eventually("sleep", || client.try_wait().is_some() || matches!(client.state(), 'S' | 'D'));
    if client.try_wait().is_some() { '-' } else { client.state() }
}

/// Runs a check for each subject, several at a time; gives the failures of all.
fn for_each_subject(check: impl Fn(&'static Subject) -> Result<(), String> + Sync) {
    let next = Mutex::new(SUBJECTS.iter());
    let failures = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..8 {
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

/// The file system obeys interrupts: the first client ends at once, and so does whoever waits behind it. Where the
/// client waits for a page there is no interrupt: a fatal signal ends the client all the same, but who comes later
/// waits until the READ is answered.
#[test]
fn an_interrupted_client_ends_at_once_and_frees_who_waits_behind_it() {
    require_fuse!();
    for_each_subject(|subject| {
        for signal in Signal::ALL {
            for second in [Second::Same, Second::List] {
                let (mount, paths) = mount(PATIENT);
                let (mut first, pending) = start_pending(&mount, &paths, subject, true);
                let mut second = Client::run(|| subject.second(second, &paths));
                std::thread::sleep(SETTLE / 4);
                first.signal(signal.number());
                match subject.first {
                    First::Interruptible => {
                        let end = first.wait();
                        if !signal.is_right_end(subject, end) {
                            return Err(format!("{signal:?}: ended with {end:?}"));
                        }
                        eventually("the interrupt", || *pending.cancelled.lock());
                    }
                    First::Page if signal != Signal::Handled => {
                        let end = first.wait();
                        if !signal.is_right_end(subject, end) || *pending.cancelled.lock() {
                            return Err(format!("{signal:?}: ended with {end:?}; or was interrupted, after all"));
                        }
                        pending.expire();
                    }
                    _ => pending.expire(),
                }
                first.wait();
                // It finds what the first left: any result, but an end.
                second.wait();
                if *pending.timed_out.lock() && subject.first == First::Interruptible {
                    return Err(format!("{signal:?}: ended by its deadline, not by the interrupt"));
                }
            }
        }
        Ok(())
    });
}

/// Lets a second client come, and kills it when it waits longer than it may. Gives how it waits, and its state.
fn behind(second: &mut Client, at_most: Wait) -> Result<(Wait, char), String> {
    if at_most == Wait::Free {
        // However slow this machine is: nothing holds it up.
        second.wait();
        return Ok((Wait::Free, '-'));
    }
    std::thread::sleep(SETTLE);
    if second.try_wait().is_some() {
        return Ok((Wait::Free, '-'));
    }
    let state = second.state();
    second.signal(libc::SIGKILL);
    if at_most == Wait::Killable {
        second.wait();
        return Ok((Wait::Killable, state));
    }
    std::thread::sleep(SETTLE);
    Ok((if second.try_wait().is_some() { Wait::Killable } else { Wait::Stuck }, state))
}

/// The file system does not hear the interrupt: nobody is in D any more once the operation's own deadline has passed,
/// and another machine notices nothing before. What waits behind what until then is as it was measured.
#[test]
fn nobody_is_left_in_d_past_the_deadline_and_the_table_of_locks_holds() {
    require_fuse!();
    let rows = Mutex::new(BTreeMap::new());
    for_each_subject(|subject| {
        let mut states = String::new();
        for signal in Signal::ALL {
            let (mount, paths) = mount(PATIENT);
            let (mut first, pending) = start_pending(&mount, &paths, subject, false);
            states.push(if subject.first == First::Free { '-' } else { asleep(&mut first) });
            first.signal(signal.number());
            // Another machine goes on as if nothing were.
            let other = Client::run(|| use_another_machine(&paths)).wait();
            if other != End::Exit(0) {
                return Err(format!("{signal:?}: another machine: {other:?}"));
            }
            if subject.first == First::Interruptible {
                eventually("the interrupt", || *pending.cancelled.lock());
            } else {
                std::thread::sleep(SETTLE);
            }
            states.push(asleep(&mut first));
            pending.expire();
            let end = first.wait();
            let is_right = match (subject.first, signal) {
                (First::Free, _) => true,
                // With a handler it gets the answer, which is its deadline's.
                (_, Signal::Handled) => matches!(end, End::Exit(_)),
                _ => signal.is_right_end(subject, end),
            };
            if !is_right {
                return Err(format!("{signal:?}: ended with {end:?}"));
            }
        }
        let mut seen = Vec::new();
        for (second, at_most) in Second::ALL.into_iter().zip(subject.second) {
            let (mount, paths) = mount(PATIENT);
            let (mut first, pending) = start_pending(&mount, &paths, subject, false);
            let mut client = Client::run(|| subject.second(second, &paths));
            let (how, state) = behind(&mut client, at_most)?;
            pending.expire();
            first.wait();
            client.wait();
            seen.push(match how {
                Wait::Free => "free".into(),
                Wait::Killable => format!("waits ({state}), killable"),
                Wait::Stuck => "waits in D".into(),
            });
            if how > at_most {
                return Err(format!("{second:?}: {how:?}, promised {at_most:?}"));
            }
        }
        rows.lock().unwrap().insert(subject.name, (states, seen));
        Ok(())
    });
    println!("| pending | first: handled, SIGINT, SIGKILL (before, after) | same | node | ls -l | create |");
    for (name, (states, seen)) in rows.into_inner().unwrap() {
        println!("| {name} | {states} | {} |", seen.join(" | "));
    }
}

/// The file system never answers, and obeys no interrupt. The layer answers in its place: the first client ends when it
/// is killed, and whoever waits behind it, signal or none, ends too.
#[test]
fn an_operation_that_is_never_answered_holds_nobody() {
    require_fuse!();
    let patience = Patience { after_signal: Duration::from_millis(200), holding_lock: Duration::from_secs(3600) };
    for_each_subject(|subject| {
        for signal in Signal::ALL {
            if subject.first != First::Interruptible {
                continue;
            }
            let (mount, paths) = mount(patience);
            let (mut first, pending) = start_pending(&mount, &paths, subject, false);
            let mut second = Client::run(|| subject.second(Second::Same, &paths));
            std::thread::sleep(SETTLE / 4);
            first.signal(signal.number());
            let mut end_by = signal;
            if signal == Signal::Handled {
                // It may be an operation that rightly takes long; and the kernel sends no second interrupt.
                eventually("the interrupt", || *pending.cancelled.lock());
                std::thread::sleep(patience.after_signal * 2);
                if first.try_wait().is_some() {
                    return Err("ended though nobody killed it".into());
                }
                end_by = Signal::Kill;
                first.signal(end_by.number());
            }
            let end = first.wait();
            if !end_by.is_right_end(subject, end) {
                return Err(format!("{signal:?}: ended with {end:?}"));
            }
            second.wait();
            // The late answer does no harm.
            pending.expire();
            let other = Client::run(|| use_another_machine(&paths)).wait();
            if other != End::Exit(0) {
                return Err(format!("{signal:?}: another machine: {other:?}"));
            }
        }
        Ok(())
    });
    // No signal: what the kernel holds a lock for ends all the same.
    let patience = Patience { after_signal: Duration::from_secs(3600), holding_lock: Duration::from_millis(200) };
    for_each_subject(|subject| {
        for (second, wait) in Second::ALL.into_iter().zip(subject.second) {
            if wait == Wait::Free || subject.may_take_long() {
                continue;
            }
            let (mount, paths) = mount(patience);
            let (mut first, pending) = start_pending(&mount, &paths, subject, false);
            let mut second = Client::run(|| subject.second(second, &paths));
            first.wait();
            second.wait();
            eventually("the file system is told", || *pending.cancelled.lock());
        }
        Ok(())
    });
}

/// Two threads (here: processes) that share an open file: the kernel's lock of the file position holds the second in
/// D, unless the file is a stream.
#[test]
fn who_shares_an_open_file_waits_in_d_unless_it_is_a_stream() {
    require_fuse!();
    for name in ["read, direct", "read, stream"] {
        let subject = SUBJECTS.iter().find(|subject| subject.name == name).unwrap();
        let (mount, paths) = mount(PATIENT);
        let path = if name == "read, stream" { &paths.stream } else { &paths.direct };
        let (matches, nodes) = (subject.matches, paths.nodes);
        mount.fake.plan(Plan { matches: Box::new(move |op| matches(op, nodes)), obeys: false });
        // SAFETY: the path ends with a NUL, the buffer is as long as is said; the child ends by _exit.
        let mut second = Client::run(|| unsafe {
            handle_usr1();
            let fd = libc::open(path.as_ptr(), libc::O_RDONLY);
            let first = libc::fork();
            if first > 0 {
                libc::pause();
            }
            let mut buffer = [0u8; 16];
            let result = libc::read(fd, buffer.as_mut_ptr().cast(), buffer.len());
            if first == 0 {
                libc::_exit(0);
            }
            errno_of(result as i64)
        });
        let pending = mount.fake.wait_pending();
        eventually("pause", || second.state() == 'S');
        second.signal(libc::SIGUSR1);
        if name == "read, stream" {
            assert_eq!(second.wait(), End::Exit(0));
            assert!(!*pending.timed_out.lock());
        } else {
            eventually("the lock of the position", || second.state() == 'D');
        }
        pending.expire();
        assert_eq!(second.wait(), End::Exit(0));
    }
}
