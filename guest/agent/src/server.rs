//! The agent as a whole: accepts connections, one of which is active at a time.

use crate::Mode;
use crate::files::FileService;
use crate::jobs::Jobs;
use crate::secrets::Secrets;
use crate::session::{Connection, FrameReader, Interrupter, Writer};
use machinefs_protocol::frame::{FrameError, Kind, decode_meta, encode_meta};
use machinefs_protocol::message::Hello;
use machinefs_protocol::{OLDEST_VERSION, VERSION};
use parking_lot::Mutex;
use rustix::fs::{Mode as FileMode, OFlags};
use std::convert::Infallible;
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// How long a new connection may take to say hello.
const HELLO_TIME: Duration = Duration::from_secs(10);
/// How long requests of a connection that is replaced may take to end.
const DRAIN_TIME: Duration = Duration::from_secs(3);
/// Connections in their handshake, at most.
const MAX_HANDSHAKES: usize = 32;

/// The agent.
pub struct Server {
    mode: Mode,
    started: Instant,
    boot: u128,
    files: FileService,
    jobs: Arc<Jobs>,
    interrupter: Arc<Interrupter>,
    active: Mutex<Active>,
    secrets: Arc<Secrets>,
    handshakes: AtomicUsize,
    ending: AtomicBool,
}

#[derive(Default)]
struct Active {
    session: Option<u128>,
    connection: Option<Arc<Connection>>,
}

impl Server {
    /// Starts the agent's own threads.
    ///
    /// # Errors
    /// Those of the descriptors and threads it needs.
    pub fn start(mode: Mode) -> io::Result<Arc<Server>> {
        let root = rustix::fs::open("/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, FileMode::empty())?;
        let interrupter = Arc::new(Interrupter::default());
        let theirs = interrupter.clone();
        spawn("interrupter", move || theirs.run())?;
        let boot = boot_number()?;
        let secrets = Arc::new(Secrets::new(boot));
        let (jobs, reactor) = Jobs::new(boot, secrets.clone())?;
        let theirs = secrets.clone();
        match crate::credential::listen(secrets.socket()) {
            Ok(listener) => spawn("credentials", move || crate::credential::serve(&listener, &theirs))?,
            Err(error) => crate::log::line(format_args!("git gets no credentials: {error}")),
        }
        let server = Arc::new(Server {
            mode,
            started: Instant::now(),
            boot,
            files: FileService::new(root)?,
            jobs,
            interrupter,
            active: Mutex::default(),
            secrets,
            handshakes: AtomicUsize::new(0),
            ending: AtomicBool::new(false),
        });
        let theirs = server.clone();
        spawn("jobs", move || reactor.run(|| theirs.shutdown(crate::shutdown::SIGNAL_GRACE)))?;
        Ok(server)
    }

    /// Accepts connections for ever.
    ///
    /// # Errors
    /// When the listening socket fails.
    pub fn accept(self: &Arc<Self>, listener: &UnixListener) -> io::Result<Infallible> {
        loop {
            let stream = match listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM)) => {
                    crate::log::line(format_args!("accept: {error}"));
                    std::thread::sleep(Duration::from_millis(100));
                    continue;
                }
                Err(error) if error.raw_os_error() == Some(libc::ECONNABORTED) => continue,
                Err(error) => return Err(error),
            };
            if self.handshakes.fetch_add(1, Ordering::AcqRel) >= MAX_HANDSHAKES {
                self.handshakes.fetch_sub(1, Ordering::AcqRel);
                continue;
            }
            let this = self.clone();
            let made = spawn("handshake", move || {
                let result = this.handshake(stream);
                this.handshakes.fetch_sub(1, Ordering::AcqRel);
                if let Err(error) = result {
                    crate::log::line(format_args!("connection refused: {error}"));
                }
            });
            if made.is_err() {
                self.handshakes.fetch_sub(1, Ordering::AcqRel);
            }
        }
    }

    fn handshake(self: &Arc<Self>, stream: UnixStream) -> io::Result<()> {
        stream.set_read_timeout(Some(HELLO_TIME))?;
        stream.set_write_timeout(Some(HELLO_TIME))?;
        let mut reader = FrameReader::new(stream.try_clone()?);
        let writer = Writer::new(stream.try_clone()?);
        let frame = reader.read().map_err(io::Error::other)?;
        if frame.header.kind != Kind::Hello {
            return Err(io::Error::other(format!("{:?} before hello", frame.header.kind)));
        }
        let hello: Hello = decode_meta(&frame.meta).map_err(io::Error::other)?;
        if hello.oldest > VERSION || hello.version < OLDEST_VERSION {
            self.say_hello(&writer, 0)?;
            let (oldest, version) = (hello.oldest, hello.version);
            return Err(io::Error::other(format!("host speaks versions {oldest} to {version}")));
        }
        // Held all the way: of two connections that come at once, the later one replaces the whole earlier one.
        let mut active = self.active.lock();
        if let Some(older) = active.connection.take() {
            older.close();
            if !older.drain(DRAIN_TIME) {
                crate::log::line(format_args!("requests of the older connection are stuck"));
            }
        }
        if active.session != Some(hello.session) {
            active.session = Some(hello.session);
            self.files.reset();
        }
        self.say_hello(&writer, hello.session)?;
        stream.set_read_timeout(None)?;
        stream.set_write_timeout(None)?;
        let connection = Connection::new(self.clone(), stream, reader, writer);
        self.jobs.tell(connection.streams().clone());
        connection.start().inspect_err(|_| connection.close())?;
        active.connection = Some(connection);
        Ok(())
    }

    fn say_hello(&self, writer: &Writer, session: u128) -> io::Result<()> {
        let hello = Hello {
            version: VERSION,
            oldest: OLDEST_VERSION,
            features: 0,
            session,
            boot: self.boot,
            build: format!("machinefs-agent {}", env!("CARGO_PKG_VERSION")),
        };
        let mut meta = Vec::new();
        encode_meta(&hello, &mut meta).map_err(|error: FrameError| io::Error::other(error))?;
        writer.send(Kind::Hello, 0, 0, &meta, &[])
    }

    /// The file service.
    pub fn files(&self) -> &FileService {
        &self.files
    }

    /// The jobs.
    pub fn jobs(&self) -> &Arc<Jobs> {
        &self.jobs
    }

    /// What interrupts cancelled requests.
    pub fn interrupter(&self) -> &Interrupter {
        &self.interrupter
    }

    /// How the agent was started.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Time since the agent's start.
    pub fn uptime(&self) -> Duration {
        self.started.elapsed()
    }

    /// The machine's secrets.
    pub fn secrets(&self) -> &Secrets {
        &self.secrets
    }

    /// The active connection, if there is one.
    pub fn connection(&self) -> Option<Arc<Connection>> {
        self.active.lock().connection.clone()
    }

    /// Ends everything, in a thread of its own. Only the first call has an effect.
    pub fn shutdown(self: &Arc<Self>, grace: Duration) {
        self.jobs.close();
        if self.ending.swap(true, Ordering::AcqRel) {
            return;
        }
        let this = self.clone();
        let made = spawn("shutdown", move || crate::shutdown::run(&this, grace));
        if made.is_err() {
            crate::shutdown::run(self, grace);
        }
    }
}

/// Starts a thread that is never joined.
fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<()> {
    std::thread::Builder::new().name(name.into()).stack_size(512 * 1024).spawn(body)?;
    Ok(())
}

fn boot_number() -> io::Result<u128> {
    let mut bytes = [0u8; 16];
    let mut filled = 0;
    while filled < bytes.len() {
        let rest = bytes.get_mut(filled..).unwrap_or_default();
        match rustix::rand::getrandom(rest, rustix::rand::GetRandomFlags::empty()) {
            Ok(count) => filled += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(u128::from_le_bytes(bytes))
}
