//! The tree driven by operations, over machines in memory.

use super::ops::*;
use super::*;
use crate::machine::state::State;
use parking_lot::Mutex;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, channel};

const ME: Caller = Caller { uid: 1000, gid: 1000, pid: 100 };
const OTHER: Caller = Caller { uid: 1001, gid: 1001, pid: 200 };
const A: u64 = 11;
const B: u64 = 12;

struct Reply(std::sync::mpsc::Sender<Outcome>, Arc<Mutex<Option<Arc<dyn Cancel>>>>, bool);

impl Respond for Reply {
    fn respond(self: Box<Self>, answer: Outcome) {
        let _ = self.0.send(answer);
    }
    fn set_cancel(&mut self, cancel: Arc<dyn Cancel>) -> bool {
        *self.1.lock() = Some(cancel);
        !self.2
    }
}

struct Waiting {
    answers: Receiver<Outcome>,
    cancel: Arc<Mutex<Option<Arc<dyn Cancel>>>>,
}

impl Waiting {
    fn is_waiting(&self) -> bool {
        matches!(self.answers.try_recv(), Err(std::sync::mpsc::TryRecvError::Empty))
    }
    fn get(&self) -> Outcome {
        self.answers.recv_timeout(Duration::from_secs(60)).expect("an answer")
    }
    fn data(&self) -> Result<Vec<u8>, Errno> {
        match self.get()? {
            Answer::Data(data) => Ok(data),
            other => panic!("{other:?}"),
        }
    }
    fn cancel(&self) {
        let cancel = self.cancel.lock().clone();
        cancel.expect("can be cancelled").cancel();
    }
}

struct Fs {
    tree: Tree,
    registry: Arc<Registry>,
}

impl Fs {
    fn new() -> Fs {
        let registry = Registry::fake();
        Fs { tree: Tree::new(registry.clone()).unwrap(), registry }
    }
    fn start_as(&self, caller: Caller, op: Op<'_>) -> Waiting {
        let (sender, answers) = channel();
        let cancel = Arc::new(Mutex::new(None));
        self.tree.dispatch(caller, op, Box::new(Reply(sender, cancel.clone(), false)));
        Waiting { answers, cancel }
    }
    fn start(&self, op: Op<'_>) -> Waiting {
        self.start_as(ME, op)
    }
    fn call(&self, op: Op<'_>) -> Outcome {
        self.start(op).get()
    }
    fn entry_as(&self, caller: Caller, path: &str) -> Result<Entry, Errno> {
        let mut node = ROOT;
        let mut last = None;
        for part in path.split('/') {
            match self.start_as(caller, Op::Lookup { parent: node, name: part.as_bytes() }).get()? {
                Answer::Entry(entry) => {
                    node = entry.node;
                    last = Some(entry);
                }
                other => panic!("{other:?}"),
            }
        }
        Ok(last.unwrap())
    }
    fn entry(&self, path: &str) -> Result<Entry, Errno> {
        self.entry_as(ME, path)
    }
    fn node(&self, path: &str) -> u64 {
        if path.is_empty() { ROOT } else { self.entry(path).unwrap_or_else(|e| panic!("{path}: {e}")).node }
    }
    fn stat(&self, path: &str) -> Attr {
        match self.call(Op::GetAttr { node: self.node(path), handle: None }).unwrap() {
            Answer::Attr(attr, _) => attr,
            other => panic!("{other:?}"),
        }
    }
    fn open(&self, path: &str, flags: i32) -> Result<File<'_>, Errno> {
        let node = self.node(path);
        match self.call(Op::Open { node, flags: flags as u32, kill_suidgid: false })? {
            Answer::Opened(opened) => Ok(File { fs: self, node, opened, flags: flags as u32 }),
            other => panic!("{other:?}"),
        }
    }
    fn cat(&self, path: &str) -> Vec<u8> {
        let file = self.open(path, libc::O_RDONLY).unwrap();
        let mut all = Vec::new();
        loop {
            let part = file.read(all.len() as u64, 5).data().unwrap();
            if part.is_empty() {
                file.release().unwrap();
                return all;
            }
            all.extend(part);
        }
    }
    fn echo(&self, path: &str, text: &str) -> Result<(), Errno> {
        let file = self.open(path, libc::O_WRONLY | libc::O_TRUNC)?;
        file.flush(A).unwrap();
        let result = file.write(A, text);
        let flushed = file.flush(A);
        file.release().unwrap();
        result.and(flushed).map(|_| ())
    }
    fn mkdir(&self, name: &str) -> Result<Arc<Machine>, Errno> {
        self.call(Op::MkDir { parent: ROOT, name: name.as_bytes(), mode: 0o777, umask: 0o22 })?;
        Ok(self.registry.get(name.as_bytes()).unwrap())
    }
    fn running(&self, name: &str) -> Arc<Machine> {
        let machine = self.mkdir(name).unwrap();
        machine.set_state(State::Running);
        machine
    }
    fn unlink_as(&self, caller: Caller, dir: u64, name: &str) -> Result<(), Errno> {
        self.start_as(caller, Op::Unlink { parent: dir, name: name.as_bytes() }).get().map(|_| ())
    }
    fn rmdir_as(&self, caller: Caller, dir: u64, name: &str) -> Result<(), Errno> {
        self.start_as(caller, Op::RmDir { parent: dir, name: name.as_bytes() }).get().map(|_| ())
    }
    fn list(&self, node: u64) -> Vec<String> {
        let mut names = Vec::new();
        let mut cookie = 0;
        loop {
            let op = Op::ReadDir { node, handle: 0, cookie, max: 150, plus: true, cost: |len| len + 30 };
            let Answer::Dir(entries) = self.call(op).unwrap() else { panic!() };
            let Some(last) = entries.last() else { return names };
            cookie = last.cookie;
            for entry in entries {
                assert!(entry.entry.is_none_or(|found| found.attr.ino == entry.ino && found.node == entry.ino));
                names.push(String::from_utf8(entry.name.to_vec()).unwrap());
            }
        }
    }
    fn rename(&self, from: (u64, &str), to: (u64, &str), flags: u32) -> Result<(), Errno> {
        self.call(Op::Rename {
            parent: from.0,
            name: from.1.as_bytes(),
            new_parent: to.0,
            new_name: to.1.as_bytes(),
            flags,
        })
        .map(|_| ())
    }
}

struct File<'f> {
    fs: &'f Fs,
    node: u64,
    opened: Opened,
    flags: u32,
}

impl File<'_> {
    fn read(&self, offset: u64, size: u32) -> Waiting {
        self.read_with(offset, size, self.flags, Some(A))
    }
    fn read_with(&self, offset: u64, size: u32, flags: u32, owner: Option<u64>) -> Waiting {
        self.fs.start(Op::Read { node: self.node, handle: self.opened.handle, offset, size, flags, owner })
    }
    fn write(&self, owner: u64, text: &str) -> Result<u32, Errno> {
        self.write_bytes(owner, text.as_bytes())
    }
    fn write_bytes(&self, owner: u64, data: &[u8]) -> Result<u32, Errno> {
        let (node, handle) = (self.node, self.opened.handle);
        let op =
            Op::Write { node, handle, offset: 9, data, flags: self.flags, owner: Some(owner), kill_suidgid: false };
        match self.fs.call(op)? {
            Answer::Count(count) => Ok(count),
            other => panic!("{other:?}"),
        }
    }
    fn flush(&self, owner: u64) -> Outcome {
        self.fs.call(Op::Flush { node: self.node, handle: self.opened.handle, owner })
    }
    fn release(&self) -> Outcome {
        self.fs.call(Op::Release { node: self.node, handle: self.opened.handle, owner: 0 })
    }
    fn poll(&self, waker: Option<Arc<dyn PollWaker>>) -> i16 {
        let op = Op::Poll { node: self.node, handle: self.opened.handle, events: 0xff, waker };
        match self.fs.call(op).unwrap() {
            Answer::Ready(Ready(bits)) => bits as i16,
            other => panic!("{other:?}"),
        }
    }
}

fn scripts(machine: &Machine) -> Vec<String> {
    let jobs = machine.jobs().list().into_iter().filter_map(|number| machine.jobs().get(number));
    jobs.filter_map(|job| job.text.lock().clone()).map(|text| String::from_utf8(text).unwrap()).collect()
}

#[test]
fn six_lines() {
    let fs = Fs::new();
    let machine = fs.mkdir("dev").unwrap();
    let waiting = fs.open("dev/wait/running", libc::O_RDONLY).unwrap();
    assert!(waiting.opened.stream);
    let read = waiting.read(0, 100);
    assert!(read.is_waiting());
    fs.echo("dev/exec", "make\n").unwrap();
    machine.set_state(State::Running);
    assert_eq!(read.data().unwrap(), b"running\n");
    assert_eq!(waiting.read(8, 100).data().unwrap(), b"");
    let (out, exit) = (fs.open("dev/out", libc::O_RDONLY).unwrap(), fs.open("dev/exit", libc::O_RDONLY).unwrap());
    assert_eq!((fs.stat("dev/out").size, fs.stat("dev/exit").size), (1, 1));
    let (first, code) = (out.read(0, 100), exit.read(0, 1));
    let job = machine.jobs().newest().unwrap();
    assert_eq!(job.text.lock().as_deref(), Some(&b"make\n"[..]));
    job.print(b"a\0\xff");
    assert_eq!(first.data().unwrap(), b"a\0\xff");
    let second = out.read(3, 100);
    assert!(second.is_waiting() && code.is_waiting());
    job.finish(Ok(0));
    assert_eq!(second.data().unwrap(), b"");
    assert_eq!(code.data().unwrap(), b"0");
    assert_eq!(exit.read(1, 10).data().unwrap(), b"\n");
    assert_eq!((fs.stat("dev/out").size, fs.stat("dev/exit").size), (3, 2));
    assert_eq!(fs.cat("dev/exit"), b"0\n");
    let late = fs.open("dev/out", libc::O_RDONLY).unwrap();
    assert!(!late.opened.stream);
    assert_eq!(late.read_with(1, 1, 0, None).data().unwrap(), b"\0");
    fs.rmdir_as(ME, ROOT, "dev").unwrap();
    assert_eq!(fs.entry("dev").unwrap_err(), Errno::ENOENT);
    fs.mkdir("dev").unwrap();
}

#[test]
fn before_any_job_out_and_exit_are_empty() {
    let fs = Fs::new();
    fs.running("dev");
    for path in ["dev/out", "dev/exit"] {
        assert_eq!((fs.stat(path).size, fs.cat(path)), (0, vec![]));
    }
}

#[test]
fn writers_of_exec() {
    let fs = Fs::new();
    let machine = fs.running("dev");
    // bash printf 'a\nb\n' > exec, then { cat a; cat b; } > exec
    let file = fs.open("dev/exec", libc::O_WRONLY).unwrap();
    file.flush(A).unwrap();
    file.write(A, "a\n").unwrap();
    assert_eq!(machine.jobs().newest().unwrap().number(), 1, "the number is there from the first write on");
    assert!(scripts(&machine).is_empty());
    file.write(A, "b\n").unwrap();
    file.flush(B).unwrap();
    assert!(scripts(&machine).is_empty());
    file.flush(A).unwrap();
    assert_eq!(scripts(&machine), ["a\nb\n"]);
    file.release().unwrap();
    let file = fs.open("dev/exec", libc::O_WRONLY).unwrap();
    file.write(A, "c").unwrap();
    file.flush(A).unwrap();
    file.write(B, "d").unwrap();
    file.release().unwrap();
    assert_eq!(scripts(&machine), ["a\nb\n", "c", "d"]);
    assert_eq!(fs.tree.table.len(), 0);
    // : > exec
    fs.open("dev/exec", libc::O_WRONLY | libc::O_TRUNC).unwrap().release().unwrap();
    assert_eq!(machine.jobs().list().len(), 3);
    let file = fs.open("dev/exec", libc::O_WRONLY).unwrap();
    file.write(A, "e").unwrap();
    fs.call(Op::Fsync { node: file.node, handle: file.opened.handle, data_only: false }).unwrap();
    assert_eq!(scripts(&machine).len(), 4);
    assert_eq!(fs.stat("dev/exec").blksize, 1 << 20);
}

#[test]
fn too_big_a_script() {
    let fs = Fs::new();
    let machine = fs.running("dev");
    let file = fs.open("dev/exec", libc::O_RDWR).unwrap();
    for _ in 0..16 {
        file.write_bytes(A, &vec![b'x'; 1 << 20]).unwrap();
    }
    assert_eq!(file.write(A, "x"), Err(Errno::E2BIG));
    assert_eq!(file.write(A, "x"), Err(Errno::E2BIG));
    assert!(machine.jobs().newest().unwrap().is_done());
    assert!(scripts(&machine).is_empty());
    assert!(String::from_utf8(file.read(0, 200).data().unwrap()).unwrap().contains("16 MiB"));
    assert_eq!(file.read(0, 200).data().unwrap(), b"");
    file.flush(A).unwrap();
    file.write(A, "y").unwrap();
    file.flush(A).unwrap();
    assert_eq!(scripts(&machine), ["y"]);
    assert!(fs.stat("dev/errors").size > 0);
}

#[test]
fn exec_on_a_stopped_machine() {
    let fs = Fs::new();
    let machine = fs.running("dev");
    machine.set_state(State::Stopped);
    let file = fs.open("dev/exec", libc::O_RDWR).unwrap();
    assert_eq!(file.write(A, "make\n"), Err(Errno::EHOSTDOWN));
    assert_eq!(file.write(A, "make\n"), Err(Errno::EHOSTDOWN));
    let reason = file.read(0, 1000).data().unwrap();
    assert!(reason.ends_with(b"start > ctl\n"), "{reason:?}");
    assert_eq!(file.read(0, 10).data().unwrap(), b"");
    assert!(String::from_utf8(fs.cat("dev/errors")).unwrap().contains("EHOSTDOWN"));
    let wait = fs.open("dev/wait/running", libc::O_RDONLY).unwrap();
    assert_eq!(wait.read(0, 10).data(), Err(Errno::EHOSTDOWN));
    assert_eq!(fs.cat("dev/wait/stopped"), b"stopped\n");
    assert_eq!(fs.stat("dev/wait/stopped").size, 8);
}

#[test]
fn a_machine_that_stops_under_a_text() {
    let fs = Fs::new();
    let machine = fs.running("dev");
    let file = fs.open("dev/exec", libc::O_WRONLY).unwrap();
    file.write(A, "one").unwrap();
    machine.set_state(State::Stopped);
    assert_eq!(file.write(A, "two"), Err(Errno::EHOSTDOWN));
    file.release().unwrap();
    assert!(scripts(&machine).is_empty());
    assert!(machine.jobs().newest().unwrap().is_done());
}

#[test]
fn the_private_form() {
    let fs = Fs::new();
    let machine = fs.running("dev");
    let (mine, yours) = (fs.open("dev/exec", libc::O_RDWR).unwrap(), fs.open("dev/exec", libc::O_RDWR).unwrap());
    assert!(mine.opened.stream);
    assert_eq!(mine.read(0, 10).data().unwrap(), b"");
    mine.write(A, "one\n").unwrap();
    mine.flush(A).unwrap();
    yours.write(B, "two\n").unwrap();
    let (one, two) = (mine.read(0, 100), yours.read(0, 100));
    let jobs: Vec<_> = (1..=2).map(|number| machine.jobs().get(number).unwrap()).collect();
    jobs[1].print(b"from two");
    assert_eq!(two.data().unwrap(), b"from two");
    assert!(one.is_waiting());
    jobs[0].finish(Ok(3));
    assert_eq!(one.data().unwrap(), b"");
    let line: Vec<u8> = (0..7).flat_map(|_| mine.read(0, 1).data().unwrap()).collect();
    assert_eq!(line, b"exit 3\n");
    assert_eq!(mine.read(0, 100).data().unwrap(), b"");
    // The next, and one more before it was read.
    mine.write(A, "three\n").unwrap();
    mine.flush(A).unwrap();
    mine.write(A, "four\n").unwrap();
    mine.flush(A).unwrap();
    let three = mine.read(0, 100);
    machine.jobs().get(4).unwrap().finish(Ok(4));
    assert!(three.is_waiting());
    machine.jobs().get(3).unwrap().finish(Err(crate::machine::error::MachineError::down("lost")));
    assert_eq!(three.data().unwrap(), b"");
    assert_eq!(mine.read(0, 100).data(), Err(Errno::EHOSTDOWN));
    assert_eq!(mine.read(0, 100).data().unwrap(), b"");
    assert_eq!(mine.read(0, 100).data().unwrap(), b"exit 4\n");
    // Closing kills nothing.
    yours.release().unwrap();
    assert!(!jobs[1].is_done());
    assert_eq!(mine.read_with(0, 10, 0, None).data(), Err(Errno::EINVAL));
}

#[test]
fn interrupts_and_nonblocking() {
    let fs = Fs::new();
    let machine = fs.running("dev");
    fs.echo("dev/exec", "x").unwrap();
    for path in ["dev/out", "dev/exit", "dev/wait/stopped", "dev/wait/event", ".sys/wait/event", "dev/jobs/1/stderr"] {
        let file = fs.open(path, libc::O_RDONLY).unwrap();
        assert!(file.opened.stream && file.opened.direct_io, "{path}");
        assert_eq!(fs.stat(path).size, 1, "{path}");
        let read = file.read(0, 100);
        assert!(read.is_waiting(), "{path}");
        read.cancel();
        assert_eq!(read.data(), Err(Errno::EINTR), "{path}");
        assert_eq!(file.read_with(0, 100, libc::O_NONBLOCK as u32, Some(A)).data(), Err(Errno::EAGAIN), "{path}");
        assert_eq!(file.read_with(0, 100, 0, None).data(), Err(Errno::EINVAL), "{path}");
        // An interrupt that came before the wait began.
        let (sender, answers) = channel();
        let reply = Box::new(Reply(sender, Arc::default(), true));
        let op = Op::Read { node: file.node, handle: file.opened.handle, offset: 0, size: 1, flags: 0, owner: Some(A) };
        fs.tree.dispatch(ME, op, reply);
        assert_eq!(answers.recv().unwrap().unwrap_err(), Errno::EINTR);
        file.release().unwrap();
    }
    assert_eq!(machine.jobs().newest().unwrap().watch().waiting(), 0);
    assert_eq!(machine.state_watch().waiting(), 0);
    assert_eq!(machine.events().watch().waiting(), 0);
}

#[test]
fn nothing_is_lost_between_wakes_and_interrupts() {
    let fs = Fs::new();
    let machine = fs.running("dev");
    fs.echo("dev/exec", "x").unwrap();
    let job = machine.jobs().newest().unwrap();
    let file = fs.open("dev/out", libc::O_RDONLY).unwrap();
    let mut all = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for number in 0..2000_u32 {
                job.print(&number.to_be_bytes());
                if number % 7 == 0 {
                    std::thread::yield_now();
                }
            }
            job.finish(Ok(0));
        });
        let mut round = 0;
        loop {
            let read = file.read(0, 3);
            round += 1;
            if round % 2 == 0 && read.cancel.lock().is_some() {
                read.cancel();
            }
            match read.data() {
                Ok(data) if data.is_empty() => break,
                Ok(data) => all.extend(data),
                Err(errno) => assert_eq!(errno, Errno::EINTR),
            }
        }
    });
    assert_eq!(all, (0..2000_u32).flat_map(u32::to_be_bytes).collect::<Vec<_>>());
}

struct Count(AtomicU32);
impl PollWaker for Count {
    fn wake(&self) {
        self.0.fetch_add(1, SeqCst);
    }
}

#[test]
fn poll_is_exact() {
    let fs = Fs::new();
    let machine = fs.running("dev");
    fs.echo("dev/exec", "x").unwrap();
    let job = machine.jobs().newest().unwrap();
    let (out, exit) = (fs.open("dev/out", libc::O_RDONLY).unwrap(), fs.open("dev/exit", libc::O_RDONLY).unwrap());
    let count = Arc::new(Count(AtomicU32::new(0)));
    assert_eq!(out.poll(Some(count.clone())) & libc::POLLIN, 0);
    assert_eq!(exit.poll(None) & libc::POLLIN, 0);
    job.print(b"hello");
    assert_eq!(count.0.load(SeqCst), 1);
    assert_ne!(out.poll(None) & libc::POLLIN, 0);
    assert_eq!(exit.poll(None) & libc::POLLIN, 0);
    assert_eq!(out.read(0, 2).data().unwrap(), b"he");
    assert_ne!(out.poll(None) & libc::POLLIN, 0);
    assert_eq!(out.read(0, 20).data().unwrap(), b"llo");
    assert_eq!(out.poll(Some(count.clone())) & libc::POLLIN, 0);
    job.finish(Ok(1));
    assert_eq!(count.0.load(SeqCst), 2);
    assert_ne!(out.poll(None) & libc::POLLIN, 0);
    assert_ne!(exit.poll(None) & libc::POLLIN, 0);
    assert_eq!(fs.open("dev/exec", libc::O_WRONLY).unwrap().poll(None) & libc::POLLOUT, libc::POLLOUT);
    assert_eq!(fs.open("dev/status", libc::O_RDONLY).unwrap().poll(None) & libc::POLLIN, libc::POLLIN);
    out.poll(Some(count));
    out.release().unwrap();
    assert_eq!(job.watch().waiting(), 0);
}

#[test]
fn values() {
    let fs = Fs::new();
    let machine = fs.running("dev");
    fs.echo("dev/config/memory", "2G\n").unwrap();
    assert_eq!((fs.cat("dev/config/memory"), fs.stat("dev/config/memory").size), (b"2G\n".to_vec(), 3));
    assert_eq!(fs.echo("dev/config/memory", "much\n"), Err(Errno::EINVAL));
    assert_eq!(machine.config_get("memory").as_deref(), Some("2G"));
    let file = fs.open("dev/config/memory", libc::O_RDWR).unwrap();
    assert_eq!(file.read(0, 99).data().unwrap(), b"2G\n");
    assert_eq!(file.write(A, "much\n"), Err(Errno::EINVAL));
    assert!(file.read(0, 99).data().unwrap().starts_with(b"memory: not a size"));
    assert_eq!(file.write(A, "3G\n"), Err(Errno::EINVAL), "until the writer's flush");
    file.flush(A).unwrap();
    file.write(A, "3").unwrap();
    file.write(A, "G\n").unwrap();
    assert_eq!(machine.config_get("memory").as_deref(), Some("2G"));
    file.release().unwrap();
    assert_eq!(machine.config_get("memory").as_deref(), Some("3G"));
    assert_eq!(fs.list(fs.node("dev/config")), [".", "..", "memory", "cpus", "workdir", "protect"]);
    assert_eq!(fs.entry("dev/config/nothing").unwrap_err(), Errno::ENOENT);
}

#[test]
fn commands() {
    let fs = Fs::new();
    let machine = fs.running("dev");
    fs.echo("dev/ctl", "stop 5s\nset a=b\n").unwrap();
    assert_eq!(*machine.commands.lock(), [vec!["stop", "5s"], vec!["set", "a=b"]]);
    assert_eq!(fs.echo("dev/ctl", "strat\n"), Err(Errno::EINVAL));
    assert!(String::from_utf8(fs.cat("dev/errors")).unwrap().contains("unknown control message"));
    assert!(fs.cat("dev/ctl").starts_with(b"# stop [GRACE]"));
    let (node, flags) = (fs.node("dev/ctl"), libc::O_WRONLY as u32);
    let Answer::Opened(opened) = fs.call(Op::Open { node, flags, kill_suidgid: false }).unwrap() else { panic!() };
    let data = b"start";
    let (handle, owner) = (opened.handle, Some(A));
    let op = Op::Write { node, handle, offset: 0, data, flags, owner, kill_suidgid: false };
    assert_eq!(fs.start_as(OTHER, op).get().unwrap_err(), Errno::EACCES);
}

#[test]
fn commands_of_the_root_are_answered_when_they_are_done() {
    let fs = Fs::new();
    fs.registry.deferred.store(true, SeqCst);
    fs.echo("ctl", "create one\n# and\ncreate two memory=2G\nprune\n").unwrap();
    assert_eq!(fs.list(ROOT), [".", "..", "README", ".ignore", "ctl", "index", "index.json", ".sys", "one", "two"]);
    let file = fs.open("ctl", libc::O_RDWR).unwrap();
    assert_eq!(file.write(A, "create three\ncreate one\ncreate four\n"), Ok(13));
    assert_eq!(file.write(A, "create one\ncreate four\n"), Err(Errno::EEXIST));
    assert_eq!(file.read(13, 99).data().unwrap(), b"exists\n");
    assert!(fs.registry.get(b"four").is_none());
    assert_eq!(fs.echo("ctl", "create index\n"), Err(Errno::EEXIST));
}

#[test]
fn rm_r_leaves_a_ghost() {
    let fs = Fs::new();
    let machine = fs.running("dev");
    fs.echo("dev/exec", "x").unwrap();
    let dir = fs.node("dev");
    let names = fs.list(dir);
    assert_eq!(names[..3], [".", "..", "ctl"]);
    fs.unlink_as(ME, dir, "ctl").unwrap();
    assert!(machine.is_destroyed());
    assert!(!fs.list(ROOT).contains(&"dev".to_string()));
    for name in &names[3..] {
        let entry = fs.entry(&format!("dev/{name}")).unwrap();
        if entry.attr.mode & libc::S_IFMT == libc::S_IFDIR {
            fs.call(Op::OpenDir { node: entry.node, flags: 0 }).unwrap();
            assert_eq!(fs.list(entry.node), [".", ".."], "{name}");
            fs.rmdir_as(ME, dir, name).unwrap();
        } else {
            fs.unlink_as(ME, dir, name).unwrap();
        }
    }
    assert_eq!(fs.entry("dev/jobs/1/cmd").unwrap().attr.size, 0);
    assert_eq!(fs.open("dev/status", libc::O_RDONLY).err(), Some(Errno::EHOSTDOWN));
    assert_eq!(fs.mkdir("dev").err(), Some(Errno::EEXIST));
    assert_eq!(fs.echo("ctl", "create dev\n"), Err(Errno::EEXIST));
    fs.rmdir_as(ME, ROOT, "dev").unwrap();
    assert_eq!(fs.entry("dev").unwrap_err(), Errno::ENOENT);
    fs.mkdir("dev").unwrap();
}

#[test]
fn a_late_rmdir_of_a_ghost_touches_no_other_machine() {
    let fs = Fs::new();
    fs.running("dev");
    let dir = fs.node("dev");
    fs.unlink_as(ME, dir, "ctl").unwrap();
    fs.unlink_as(ME, dir, "status").unwrap();
    std::thread::sleep(super::ghost::RESERVED + Duration::from_millis(100));
    let neighbour = Caller { pid: 300, ..ME };
    assert_eq!(fs.entry_as(neighbour, "dev").unwrap_err(), Errno::ENOENT);
    fs.start_as(neighbour, Op::MkDir { parent: ROOT, name: b"dev", mode: 0, umask: 0 }).get().unwrap();
    assert_ne!(fs.entry_as(neighbour, "dev").unwrap().node, dir);
    assert_eq!(fs.entry_as(ME, "dev").unwrap().node, dir);
    fs.rmdir_as(ME, ROOT, "dev").unwrap();
    assert!(fs.registry.get(b"dev").is_some());
    assert_ne!(fs.entry_as(ME, "dev").unwrap().node, dir);
    fs.rmdir_as(ME, ROOT, "dev").unwrap();
    assert!(fs.registry.get(b"dev").is_none());
}

#[test]
fn what_cannot_be_removed_or_made() {
    let fs = Fs::new();
    let machine = fs.running("dev");
    let dir = fs.node("dev");
    assert_eq!(fs.unlink_as(ME, dir, "status"), Err(Errno::EPERM));
    assert_eq!(fs.unlink_as(ME, dir, "nothing"), Err(Errno::ENOENT));
    assert_eq!(fs.unlink_as(ME, ROOT, "dev"), Err(Errno::EISDIR));
    assert_eq!(fs.unlink_as(ME, ROOT, "README"), Err(Errno::EPERM));
    assert_eq!(fs.rmdir_as(ME, dir, "files"), Err(Errno::EPERM));
    assert_eq!(fs.rmdir_as(ME, dir, "status"), Err(Errno::ENOTDIR));
    assert_eq!(fs.rmdir_as(ME, ROOT, ".sys"), Err(Errno::EPERM));
    for parent in [dir, fs.node("dev/jobs"), fs.node("dev/config"), fs.node(".sys")] {
        assert_eq!(fs.call(Op::MkDir { parent, name: b"x", mode: 0, umask: 0 }).unwrap_err(), Errno::EPERM);
        let create = Op::Create { parent, name: b"x", mode: 0, umask: 0, flags: 0 };
        assert_eq!(fs.call(create).unwrap_err(), Errno::EPERM);
        assert_eq!(fs.call(Op::SymLink { parent, name: b"x", target: b"y" }).unwrap_err(), Errno::EPERM);
    }
    assert_eq!(fs.mkdir("a.b").err(), Some(Errno::ENOENT));
    assert_eq!(fs.mkdir("a.b c").err(), Some(Errno::EINVAL));
    assert_eq!(fs.mkdir("README").err(), Some(Errno::EEXIST));
    let node = fs.node("dev/status");
    let set = |set| fs.call(Op::SetAttr { node, handle: None, set }).map(|_| ());
    assert_eq!(set(SetAttr { mode: Some(0o777), ..SetAttr::default() }), Err(Errno::EPERM));
    assert_eq!(set(SetAttr { uid: Some(1), ..SetAttr::default() }), Err(Errno::EPERM));
    assert_eq!(set(SetAttr { size: Some(0), mtime: Some(SetTime::Now), ..SetAttr::default() }), Ok(()));
    // A protected machine stays, and what rm -r would do next in its files is refused.
    machine.protect.store(true, SeqCst);
    fs.echo("dev/config/protect", "yes").unwrap();
    *machine.files.lock() = Some(Arc::new(guest::GuestFiles::fake(7)));
    let files = fs.node("dev/files");
    fs.unlink_as(ME, files, "x").unwrap();
    assert_eq!(fs.unlink_as(ME, dir, "ctl"), Err(Errno::EPERM));
    assert_eq!(fs.unlink_as(ME, files, "x"), Err(Errno::EPERM));
    assert_eq!(fs.unlink_as(ME, fs.node("dev/files/etc"), "x"), Err(Errno::EPERM));
    fs.echo("dev/config/protect", "no").unwrap();
    fs.unlink_as(ME, files, "x").unwrap();
    fs.unlink_as(Caller { pid: 101, ..ME }, files, "x").unwrap();
    assert_eq!(fs.rmdir_as(ME, ROOT, "dev"), Err(Errno::EPERM));
}

#[test]
fn renames() {
    let fs = Fs::new();
    let machine = fs.running("dev");
    fs.running("taken");
    let dir = fs.node("dev");
    let file = fs.open("dev/out", libc::O_RDONLY).unwrap();
    assert_eq!(fs.rename((ROOT, "dev"), (ROOT, "b d"), 0), Err(Errno::EINVAL));
    assert_eq!(fs.rename((ROOT, "dev"), (ROOT, "taken"), 0), Err(Errno::EPERM));
    assert_eq!(fs.rename((ROOT, "dev"), (ROOT, "taken"), libc::RENAME_NOREPLACE), Err(Errno::EEXIST));
    assert_eq!(fs.rename((ROOT, "dev"), (ROOT, "taken"), libc::RENAME_EXCHANGE), Err(Errno::EINVAL));
    assert_eq!(fs.rename((ROOT, "dev"), (fs.node("taken"), "dev"), 0), Err(Errno::EPERM));
    assert_eq!(fs.rename((ROOT, "README"), (ROOT, "x"), 0), Err(Errno::EPERM));
    assert_eq!(fs.rename((dir, "status"), (dir, "x"), 0), Err(Errno::EPERM));
    *machine.files.lock() = Some(Arc::new(guest::GuestFiles::fake(7)));
    *fs.registry.get(b"taken").unwrap().files.lock() = Some(Arc::new(guest::GuestFiles::fake(8)));
    let (one, two) = (fs.node("dev/files"), fs.node("taken/files/etc"));
    assert_eq!(fs.rename((ROOT, "dev"), (one, "x"), 0), Err(Errno::EPERM));
    assert_eq!(fs.rename((ROOT, "dev"), (two, "x"), 0), Err(Errno::EPERM));
    assert_eq!(fs.rename((one, "x"), (ROOT, "x"), 0), Err(Errno::EPERM));
    assert_eq!(fs.rename((one, "x"), (two, "x"), 0), Err(Errno::EXDEV));
    fs.rename((one, "x"), (fs.node("dev/files/etc"), "x"), 0).unwrap();
    let link = Op::Link { node: fs.node("dev/status"), new_parent: one, new_name: b"x" };
    assert_eq!(fs.call(link).unwrap_err(), Errno::EPERM);
    fs.rename((ROOT, "dev"), (ROOT, "prod"), 0).unwrap();
    assert_eq!(fs.node("prod"), dir);
    assert_eq!(fs.entry("dev").unwrap_err(), Errno::ENOENT);
    assert_eq!(file.read(0, 9).data().unwrap(), b"");
}

#[test]
fn files_wait_for_the_boot_at_the_gate() {
    let fs = Fs::new();
    let machine = fs.mkdir("dev").unwrap();
    let node = fs.node("dev/files");
    let gate = fs.start(Op::GetAttr { node, handle: None });
    assert!(gate.is_waiting());
    gate.cancel();
    assert_eq!(gate.get().unwrap_err(), Errno::EINTR);
    // Past the time, it answers, and what is below does not wait.
    fs.stat("dev/files");
    assert_eq!(fs.entry("dev/files/etc").unwrap_err(), Errno::EHOSTDOWN);
    let gate = fs.start(Op::GetAttr { node, handle: None });
    *machine.files.lock() = Some(Arc::new(guest::GuestFiles::fake(7)));
    machine.set_state(State::Running);
    gate.get().unwrap();
    let etc = fs.node("dev/files/etc");
    assert_eq!(etc >> 63, 1);
    let Answer::Opened(dir) = fs.call(Op::OpenDir { node, flags: 0 }).unwrap() else { panic!() };
    assert!(!dir.cache_dir);
    let read = Op::ReadDir { node, handle: dir.handle, cookie: 0, max: 999, plus: false, cost: |len| len };
    let Answer::Dir(entries) = fs.call(read).unwrap() else { panic!() };
    let inos: Vec<u64> = entries.iter().map(|entry| entry.ino).collect();
    assert_eq!(inos, [node, fs.node("dev"), 6]);
    // The machine goes: its nodes are down, then stale.
    *machine.files.lock() = None;
    machine.set_state(State::Stopped);
    assert_eq!(fs.call(Op::GetAttr { node: etc, handle: None }).unwrap_err(), Errno::EHOSTDOWN);
    fs.call(Op::ReleaseDir { node, handle: dir.handle }).unwrap();
    assert_eq!(fs.tree.table.len(), 0);
    *machine.files.lock() = Some(Arc::new(guest::GuestFiles::fake(9)));
    assert_eq!(fs.call(Op::GetAttr { node: etc, handle: None }).unwrap_err(), Errno::ESTALE);
    fs.rmdir_as(ME, ROOT, "dev").unwrap();
    assert_eq!(fs.call(Op::GetAttr { node, handle: None }).unwrap_err(), Errno::ENOENT);
}

#[test]
fn health_is_asked_at_open() {
    let fs = Fs::new();
    fs.running("dev");
    assert_eq!(fs.cat("dev/health"), b"ok 12.21ms\n");
    assert_eq!(fs.stat("dev/health").size, 11);
}

#[test]
fn streams_of_logs() {
    let fs = Fs::new();
    let machine = fs.running("dev");
    machine.events().push("before\n");
    let file = fs.open("dev/wait/event", libc::O_RDONLY).unwrap();
    let read = file.read(0, 100);
    machine.events().push("after\n");
    assert_eq!(read.data().unwrap(), b"after\n");
    assert_eq!(fs.cat("dev/events"), b"before\nafter\n");
    let read = file.read(0, 100);
    fs.rmdir_as(ME, ROOT, "dev").unwrap();
    assert_eq!(read.data().unwrap(), b"");
}

#[test]
fn sizes_are_true_and_reads_change_nothing() {
    let fs = Fs::new();
    let machine = fs.running("dev");
    fs.echo("dev/exec", "make\n").unwrap();
    machine.jobs().newest().unwrap().print(b"text");
    machine.jobs().newest().unwrap().finish(Ok(0));
    fn walk(fs: &Fs, path: &str, seen: &mut u32) {
        for name in fs.list(fs.node(path)).into_iter().skip(2) {
            let path = if path.is_empty() { name } else { format!("{path}/{name}") };
            let attr = fs.stat(&path);
            assert_eq!(attr.ino, fs.node(&path));
            match attr.mode & libc::S_IFMT {
                libc::S_IFDIR if path.ends_with("/files") => {}
                libc::S_IFDIR => walk(fs, &path, seen),
                libc::S_IFLNK => assert_eq!(attr.size, 10),
                _ if path.contains("wait/") && !path.ends_with("running") => assert_eq!(attr.size, 1),
                _ => {
                    *seen += 1;
                    let read = fs.cat(&path).len() as u64;
                    assert_eq!(fs.stat(&path).size, read, "{path}");
                }
            }
            assert_eq!(
                fs.call(Op::GetXattr { node: attr.ino, name: b"security.selinux", max: 0 }).err(),
                Some(Errno::ENODATA)
            );
        }
    }
    let mut seen = 0;
    walk(&fs, "", &mut seen);
    assert!(seen > 30, "{seen}");
    assert_eq!(machine.jobs().list().len(), 1);
    assert_eq!(fs.tree.table.len(), 0);
}

#[test]
fn jobs_are_removed_by_rmdir() {
    let fs = Fs::new();
    let machine = fs.running("dev");
    fs.echo("dev/exec", "x").unwrap();
    fs.echo("dev/exec", "y").unwrap();
    let jobs = fs.node("dev/jobs");
    assert_eq!(fs.list(jobs), [".", "..", "1", "2"]);
    fs.rmdir_as(ME, jobs, "1").unwrap();
    assert_eq!(fs.list(jobs), [".", "..", "2"]);
    assert_eq!(fs.cat("dev/jobs/2/cmd"), b"y");
    assert_eq!(fs.entry("dev/jobs/02").unwrap_err(), Errno::ENOENT);
    assert_eq!(machine.jobs().list(), [2]);
}

#[test]
fn who_may_open_what() {
    let fs = Fs::new();
    fs.running("dev");
    assert_eq!(fs.open("dev/status", libc::O_WRONLY).err(), Some(Errno::EACCES));
    assert_eq!(fs.open("README", libc::O_RDWR).err(), Some(Errno::EACCES));
    assert_eq!(fs.open("dev", libc::O_RDONLY).err(), Some(Errno::EISDIR));
    let attr = fs.stat("dev");
    assert_eq!((attr.mode, attr.uid, attr.gid), (libc::S_IFDIR | 0o700, 1000, 1000));
    assert_eq!(fs.stat("").mode, libc::S_IFDIR | 0o1777);
    let work = fs.node("dev/work");
    let Answer::Data(target) = fs.call(Op::ReadLink { node: work }).unwrap() else { panic!() };
    assert_eq!(target, b"files/root");
}
