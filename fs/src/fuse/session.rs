//! Serving: threads that read requests and hand them on.

use super::connection::{Channel, Connection, guarded};
use super::interrupt::Wait;
use super::mount::{MountError, Mounted, Place};
use super::negotiate::BUFFER;
use super::notify::{self, Expirer, Notifier};
use super::poll::Waker;
use super::reply::{Expect, Responder, log_undelivered, send_error};
use super::request::{self, Request};
use super::watch::{self, Watch};
use crate::errno::Errno;
use crate::tree::ops::{Caller, Files, Op, PollWaker};
use rustix::io;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::Instant;

/// Unexpected errors in a row, with a pause after each, after which a reader gives up.
const MOST_FAILURES: u32 = 100;
const PAUSE: std::time::Duration = std::time::Duration::from_millis(100);

/// A mount that is being served. Unmounts (lazily) when it is dropped.
pub struct Session {
    place: Place,
    readers: Vec<JoinHandle<()>>,
    notifier: Notifier,
    notifier_thread: Option<JoinHandle<()>>,
    expirer: Option<Expirer>,
    connection: Weak<Connection>,
    watch: Option<Watch>,
}

impl Mounted {
    /// Starts to serve: answers INIT and spawns the reader threads. When this returns, the mount answers.
    ///
    /// # Errors
    /// A kernel whose protocol is too old, a mount that is gone already, no more threads. The mount is then undone.
    pub fn serve(self, files: Arc<dyn Files>) -> Result<Session, MountError> {
        let (device, place, options, minor) = self.negotiated()?;
        let connection = Arc::new(Connection::new(Arc::new(device), files, options.patience));
        let (notifier, notifier_thread) =
            notify::start(&connection).map_err(|error| MountError::Threads(error.to_string()))?;
        let mut session = Session {
            place,
            readers: Vec::new(),
            notifier,
            notifier_thread: Some(notifier_thread),
            connection: Arc::downgrade(&connection),
            expirer: None,
            watch: None,
        };
        session.expirer = Expirer::new(&connection, minor);
        let watch = Watch::start(&connection, options.patience);
        session.watch = Some(watch.map_err(|error| MountError::Threads(error.to_string()))?);
        let count =
            options.readers.unwrap_or_else(|| std::thread::available_parallelism().map_or(2, |cpus| cpus.get()).max(2));
        for index in 0..count {
            let channel = Arc::new(Channel::new(connection.clone()));
            let reader = std::thread::Builder::new()
                .name(format!("fuse-{index}"))
                .spawn(move || read_requests(&channel))
                .map_err(|error| MountError::Threads(error.to_string()))?;
            session.readers.push(reader);
        }
        if let Some(kib) = options.read_ahead {
            session.place.set_read_ahead(kib);
        }
        Ok(session)
    }
}

impl Session {
    /// Waits until the file system is unmounted and nobody uses it any more.
    pub fn join(mut self) {
        self.join_threads();
    }

    /// Whether somebody reads requests.
    pub fn is_alive(&self) -> bool {
        self.readers.iter().any(|reader| !reader.is_finished())
    }

    /// Takes the file system out of the directory tree. `lazy`: also when it is in use; those who use it go on, and
    /// are served, until they are done. Does nothing when our mount is not there any more.
    ///
    /// # Errors
    /// EBUSY when it is in use and `lazy` is not set; whatever fusermount3 says.
    pub fn unmount(&self, lazy: bool) -> Result<(), MountError> {
        self.place.unmount(lazy, self.connection.upgrade().is_some_and(|connection| connection.is_connected()))
    }

    /// What tells the kernel of changes.
    pub fn notifier(&self) -> Notifier {
        self.notifier.clone()
    }

    /// What makes the kernel ask for every name again; `None` where it cannot (before Linux 6.16).
    pub fn expirer(&self) -> Option<Expirer> {
        self.expirer.clone()
    }

    fn join_threads(&mut self) {
        for reader in self.readers.drain(..) {
            // A reader ends by return only; a panic outside of the file system's code would show here.
            if reader.join().is_err() {
                tracing::error!("defect: a FUSE reader thread panicked");
            }
        }
        self.notifier.close();
        if let Some(thread) = self.notifier_thread.take() {
            let _ = thread.join();
        }
        self.watch = None;
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if self.is_alive()
            && let Err(error) = self.unmount(true)
        {
            tracing::warn!(%error, "the file system stays mounted");
        }
        self.notifier.close();
    }
}

/// Reads requests and hands them on, until the file system is gone.
fn read_requests(channel: &Arc<Channel>) {
    let connection = &channel.connection;
    let mut buffer = vec![0; BUFFER];
    let mut failures = 0;
    loop {
        match channel.read(&mut buffer) {
            Ok(length) => {
                failures = 0;
                handle(channel, buffer.get(..length).unwrap_or_default());
            }
            // A signal; or a request that was given up while it was being read.
            Err(io::Errno::INTR | io::Errno::NOENT | io::Errno::AGAIN) => {}
            // Unmounted; aborted through fusectl or `umount -f`.
            Err(io::Errno::NODEV | io::Errno::CONNABORTED) => break,
            // Nothing that is known; should it pass, nobody must be left without an answer.
            Err(error) if failures < MOST_FAILURES => {
                failures += 1;
                tracing::error!(%error, failures, "reading /dev/fuse failed");
                std::thread::sleep(PAUSE);
            }
            Err(error) => {
                tracing::error!(%error, "reading /dev/fuse failed, this reader ends");
                break;
            }
        }
        connection.give_back();
    }
    // Nobody waits for what is still pending: let it be given up.
    for cancel in connection.interrupts.drain() {
        guarded("cancel", || cancel.cancel());
    }
}

fn handle(channel: &Arc<Channel>, message: &[u8]) {
    let connection = &channel.connection;
    let Ok((header, body)) = request::split(message) else {
        tracing::error!(length = message.len(), "defect: a request that is not one");
        return;
    };
    let unique = header.unique;
    let caller = Caller { uid: header.uid, gid: header.gid, pid: header.pid };
    let dispatch = |op: Op<'_>, expect: Expect| {
        let until = watch::holds_lock(&op).then(|| Instant::now() + connection.lock_limit);
        let wait = Wait { pid: header.pid, until };
        let responder = Box::new(Responder::new(channel.clone(), unique, expect, wait));
        guarded("dispatch", || connection.files.dispatch(caller, op, responder));
    };
    let refuse = |errno: Errno| {
        if let Err(error) = send_error(channel, unique, errno) {
            log_undelivered(unique, error);
        }
    };
    match request::decode(&header, body) {
        Ok(Request::Op(op, expect)) => dispatch(op, expect),
        Ok(Request::Poll { node, handle, events, kh }) => {
            let waker = kh.map(|kh| -> Arc<dyn PollWaker> { Arc::new(Waker::new(Arc::downgrade(connection), kh)) });
            dispatch(Op::Poll { node, handle, events, waker }, Expect::Ready);
        }
        Ok(Request::Forget { node, count }) => guarded("forget", || connection.files.forget(node, count)),
        Ok(Request::ForgetMany(forgets)) => {
            for (node, count) in forgets {
                guarded("forget", || connection.files.forget(node, count));
            }
        }
        Ok(Request::Interrupt { unique: named }) => {
            if let Some(cancel) = connection.interrupts.interrupted(named) {
                guarded("cancel", || cancel.cancel());
            }
        }
        Ok(Request::Succeed) => {
            if let Err(error) = channel.send(unique, 0, [&[], &[], &[]]) {
                log_undelivered(unique, error);
            }
        }
        // ENOSYS is right for operations that this code does not know, and only for them.
        Ok(Request::Refuse(Errno::ENOSYS)) => {
            if let Err(error) = channel.send(unique, -Errno::ENOSYS.0, [&[], &[], &[]]) {
                log_undelivered(unique, error);
            }
        }
        Ok(Request::Refuse(errno)) => refuse(errno),
        Ok(Request::Ignore) => {}
        Err(request::Malformed) => {
            tracing::error!(opcode = header.opcode, length = message.len(), "defect: a request that cannot be read");
            refuse(Errno::EIO);
        }
    }
}
