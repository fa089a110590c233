//! Streams between the host and TCP ports of the guest's loopback, as [`machinefs_protocol::port`] has it. One thread
//! of a connection moves their bytes; it is made with the first of them.

use super::Writer;
use crate::files::Cancelled;
use crate::jobs::errno_text;
use machinefs_protocol::frame::{Kind, encode_meta};
use machinefs_protocol::message::{Credit, Failure};
use machinefs_protocol::port::{INITIAL_CREDIT, MAX_CONNECTIONS};
use parking_lot::Mutex;
use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{AddressFamily, Shutdown, SocketFlags, SocketType, sockopt};
use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a connection may take to come about.
const CONNECT_TIME: Duration = Duration::from_secs(10);
/// How often the thread that waits for it looks whether it was given up.
const LOOK_TIME: Duration = Duration::from_millis(50);
/// Bytes read at a time.
const CHUNK: usize = 64 * 1024;
/// The engine's own token: tags of requests may be any number, so ports have tokens of their own from 1 on.
const WAKE: u64 = 0;

/// The connections to ports of one link.
#[derive(Debug, Default)]
pub struct Ports(Mutex<Table>);

#[derive(Debug, Default)]
struct Table {
    ports: HashMap<u64, Arc<Port>>,
    by_token: HashMap<u64, Arc<Port>>,
    next_token: u64,
    engine: Option<Arc<Engine>>,
    closed: bool,
}

#[derive(Debug)]
struct Engine {
    epoll: OwnedFd,
    wake: OwnedFd,
}

#[derive(Debug)]
struct Port {
    tag: u64,
    token: u64,
    socket: OwnedFd,
    engine: Arc<Engine>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Its request is not answered yet: nothing may be said under its tag.
    held: bool,
    /// Bytes the host still takes.
    credit: u64,
    /// What is to be written, in order.
    queue: VecDeque<Vec<u8>>,
    /// Bytes of the first of them that are written.
    written: usize,
    /// Bytes from the host that it has no new credit for yet.
    outstanding: u64,
    /// Bytes of these that are dealt with.
    taken: u64,
    /// The host's direction has come to its end, and the socket knows.
    host_ended: bool,
    host_shut: bool,
    /// The guest's direction has.
    guest_ended: bool,
    /// Writing failed so; what the other side still has to say is read first.
    broken: Option<i32>,
}

/// What one look at a port comes to.
#[derive(Default)]
struct Outcome {
    credit: u64,
    read: usize,
    ended: bool,
    failed: Option<i32>,
    over: bool,
}

impl Port {
    /// Watches for what can go on now. Each event ends that, so that a port nothing can be done for makes none.
    fn arm(&self, state: &State) {
        let mut flags = EventFlags::empty();
        if !state.held {
            flags.set(EventFlags::IN, state.credit > 0 && !state.guest_ended);
            let to_shut = state.host_ended && !state.host_shut;
            flags.set(EventFlags::OUT, state.broken.is_none() && (!state.queue.is_empty() || to_shut));
            // Also credit for what is dropped after a failure is given by the thread.
            flags.set(EventFlags::OUT, flags.contains(EventFlags::OUT) || state.taken > 0);
        }
        if !flags.is_empty() {
            let data = EventData::new_u64(self.token);
            let _ = epoll::modify(&self.engine.epoll, &self.socket, data, flags | EventFlags::ONESHOT);
        }
    }

    fn write(&self, state: &mut State) {
        while let Some(chunk) = state.queue.front() {
            let rest = chunk.get(state.written..).unwrap_or_default();
            match rustix::net::send(&self.socket, rest, rustix::net::SendFlags::NOSIGNAL) {
                Ok(count) => {
                    state.taken += count as u64;
                    state.written += count;
                    if state.written >= chunk.len() {
                        state.queue.pop_front();
                        state.written = 0;
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(errno) => {
                    state.broken = Some(errno.raw_os_error());
                    state.queue.clear();
                    state.taken = state.outstanding;
                    return;
                }
            }
        }
        if state.host_ended && !state.host_shut {
            state.host_shut = true;
            // A failure shows when it is read from.
            let _ = rustix::net::shutdown(&self.socket, Shutdown::Write);
        }
    }

    /// Writes and reads what can be at once. What was read is to be sent, by the caller, without the lock.
    fn work(&self, buffer: &mut [u8]) -> Outcome {
        let mut state = self.state.lock();
        let mut outcome = Outcome::default();
        if state.broken.is_none() {
            self.write(&mut state);
        }
        if state.taken >= INITIAL_CREDIT / 4 || (state.taken > 0 && state.queue.is_empty()) {
            outcome.credit = std::mem::take(&mut state.taken);
            state.outstanding = state.outstanding.saturating_sub(outcome.credit);
        }
        let room = usize::try_from(state.credit).unwrap_or(usize::MAX).min(buffer.len());
        if room > 0 && !state.guest_ended {
            match rustix::io::read(&self.socket, buffer.get_mut(..room).unwrap_or_default()) {
                Ok(0) => {
                    state.guest_ended = true;
                    outcome.failed = state.broken;
                    outcome.ended = true;
                }
                Ok(count) => {
                    state.credit -= count as u64;
                    outcome.read = count;
                }
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(errno) => outcome.failed = Some(state.broken.unwrap_or(errno.raw_os_error())),
            }
        }
        outcome.over = outcome.failed.is_some() || (state.guest_ended && state.host_shut);
        outcome
    }
}

impl Ports {
    /// Connects, and makes the tag a stream that is silent until [`Ports::release`].
    ///
    /// # Errors
    /// Those of connect(2); EMFILE when there are as many as there may be; EINTR when it was given up.
    pub fn connect(
        self: &Arc<Self>,
        tag: u64,
        port: u16,
        writer: &Arc<Writer>,
        cancelled: &dyn Cancelled,
    ) -> io::Result<()> {
        if self.0.lock().ports.len() >= MAX_CONNECTIONS {
            return Err(Errno::MFILE.into());
        }
        let socket = connect(port, cancelled)?;
        let mut table = self.0.lock();
        if table.closed {
            return Err(Errno::CANCELED.into());
        }
        if table.ports.contains_key(&tag) {
            return Err(Errno::EXIST.into());
        }
        if table.ports.len() >= MAX_CONNECTIONS {
            return Err(Errno::MFILE.into());
        }
        let engine = match &table.engine {
            Some(engine) => engine.clone(),
            None => {
                let engine = self.start(writer)?;
                table.engine.insert(engine).clone()
            }
        };
        table.next_token += 1;
        let token = table.next_token;
        let data = EventData::new_u64(token);
        epoll::add(&engine.epoll, &socket, data, EventFlags::ONESHOT)?;
        let state = State {
            held: true,
            credit: INITIAL_CREDIT,
            queue: VecDeque::new(),
            written: 0,
            outstanding: 0,
            taken: 0,
            host_ended: false,
            host_shut: false,
            guest_ended: false,
            broken: None,
        };
        let port = Arc::new(Port { tag, token, socket, engine, state: Mutex::new(state) });
        table.by_token.insert(token, port.clone());
        table.ports.insert(tag, port);
        Ok(())
    }

    /// The request for that stream is answered.
    pub fn release(&self, tag: u64) {
        self.with(tag, |state| state.held = false);
    }

    /// The host gave credit.
    pub fn credit(&self, tag: u64, bytes: u64) {
        self.with(tag, |state| state.credit = state.credit.saturating_add(bytes));
    }

    /// Takes data for a port, empty for the end of it; what is for none is dropped. `false`: it was over the credit.
    #[must_use]
    pub fn push(&self, tag: u64, data: Vec<u8>) -> bool {
        let mut within = true;
        self.with(tag, |state| {
            if data.is_empty() {
                state.host_ended = true;
                state.host_shut |= state.broken.is_some();
                return;
            }
            if state.host_ended {
                return;
            }
            state.outstanding += data.len() as u64;
            within = state.outstanding <= INITIAL_CREDIT;
            if state.broken.is_some() {
                state.taken = state.outstanding;
            } else if within {
                state.queue.push_back(data);
            }
        });
        within
    }

    fn with(&self, tag: u64, work: impl FnOnce(&mut State)) {
        let port = self.0.lock().ports.get(&tag).cloned();
        if let Some(port) = port {
            let mut state = port.state.lock();
            work(&mut state);
            port.arm(&state);
        }
    }

    /// The host gives a stream up: the other side gets a reset.
    pub fn reset(&self, tag: u64) {
        let port = {
            let mut table = self.0.lock();
            let port = table.ports.remove(&tag);
            port.inspect(|port| {
                table.by_token.remove(&port.token);
            })
        };
        if let Some(port) = port {
            abort(&port);
        }
    }

    /// The link is gone: so are all connections, and the thread.
    pub fn close(&self) {
        let all = {
            let mut table = self.0.lock();
            std::mem::replace(&mut *table, Table { closed: true, ..Table::default() })
        };
        for port in all.ports.values() {
            abort(port);
        }
        if let Some(engine) = all.engine {
            let _ = rustix::io::write(&engine.wake, &1u64.to_ne_bytes());
        }
    }

    fn start(self: &Arc<Self>, writer: &Arc<Writer>) -> io::Result<Arc<Engine>> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        epoll::add(&epoll, &wake, EventData::new_u64(WAKE), EventFlags::IN)?;
        let engine = Arc::new(Engine { epoll, wake });
        let (this, theirs, writer) = (self.clone(), engine.clone(), writer.clone());
        let thread = std::thread::Builder::new().name("ports".into()).stack_size(256 * 1024);
        thread.spawn(move || this.run(&theirs, &writer))?;
        Ok(engine)
    }

    /// The thread's body.
    fn run(&self, engine: &Engine, writer: &Writer) {
        let mut events: Vec<Event> = Vec::with_capacity(64);
        let mut buffer = vec![0; CHUNK];
        loop {
            events.clear();
            match epoll::wait(&engine.epoll, spare_capacity(&mut events), None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => {
                    crate::log::line(format_args!("ports: {errno}"));
                    return self.close();
                }
            }
            for event in &events {
                let token = event.data.u64();
                if token == WAKE {
                    // Only written to by the end.
                    return;
                }
                let port = self.0.lock().by_token.get(&token).cloned();
                if let Some(port) = port
                    && self.serve(&port, &mut buffer, writer).is_err()
                {
                    // The link is broken; who reads it closes the rest.
                    return self.close();
                }
            }
        }
    }

    fn serve(&self, port: &Port, buffer: &mut [u8], writer: &Writer) -> io::Result<()> {
        let outcome = port.work(buffer);
        if outcome.over {
            // Before the last word: the host may use the tag again after that.
            let mut table = self.0.lock();
            table.by_token.remove(&port.token);
            if table.ports.get(&port.tag).is_some_and(|other| other.token == port.token) {
                table.ports.remove(&port.tag);
            }
        }
        let mut meta = Vec::new();
        if outcome.credit > 0 {
            encode_meta(&Credit { bytes: outcome.credit }, &mut meta).map_err(io::Error::other)?;
            writer.send(Kind::Credit, 0, port.tag, &meta, &[])?;
        }
        if outcome.read > 0 {
            writer.send(Kind::Data, 0, port.tag, &[], buffer.get(..outcome.read).unwrap_or_default())?;
        }
        if let Some(errno) = outcome.failed {
            encode_meta(&Failure { errno, message: errno_text(errno) }, &mut meta).map_err(io::Error::other)?;
            writer.send(Kind::Error, 0, port.tag, &meta, &[])?;
        } else if outcome.ended {
            writer.send(Kind::Data, 0, port.tag, &[], &[])?;
        }
        if !outcome.over {
            port.arm(&port.state.lock());
        }
        Ok(())
    }
}

/// Closing the socket is a reset from now on.
fn abort(port: &Port) {
    let _ = sockopt::set_socket_linger(&port.socket, Some(Duration::ZERO));
    let _ = epoll::delete(&port.engine.epoll, &port.socket);
}

fn connect(port: u16, cancelled: &dyn Cancelled) -> io::Result<OwnedFd> {
    match connect_to(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port), cancelled) {
        Err(first @ (Errno::CONNREFUSED | Errno::NETUNREACH | Errno::ADDRNOTAVAIL | Errno::AFNOSUPPORT)) => {
            let second = connect_to(SocketAddr::new(IpAddr::V6(Ipv6Addr::LOCALHOST), port), cancelled);
            // Without IPv6 the first word says more.
            Ok(second.map_err(|_| first)?)
        }
        result => Ok(result?),
    }
}

fn connect_to(address: SocketAddr, cancelled: &dyn Cancelled) -> Result<OwnedFd, Errno> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    sockopt::set_tcp_nodelay(&socket, true)?;
    match rustix::net::connect(&socket, &address) {
        Ok(()) => return Ok(socket),
        Err(Errno::INPROGRESS | Errno::INTR) => {}
        Err(errno) => return Err(errno),
    }
    let until = Instant::now() + CONNECT_TIME;
    while Instant::now() < until {
        if cancelled.is_cancelled() {
            return Err(Errno::INTR);
        }
        let step = Timespec { tv_sec: 0, tv_nsec: i64::from(LOOK_TIME.subsec_nanos()) };
        match rustix::event::poll(&mut [PollFd::new(&socket, PollFlags::OUT)], Some(&step)) {
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) => {
                sockopt::socket_error(&socket)??;
                return Ok(socket);
            }
            Err(errno) => return Err(errno),
        }
    }
    Err(Errno::TIMEDOUT)
}
