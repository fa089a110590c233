//! TCP ports of the guest that are open on the host: `ports/PORT`.
//!
//! A port listens while there is something to serve: its machine runs, boots, or rests and can be woken. It has the same
//! number at the next start if that is free then.

use super::Machine;
use super::error::MachineError;
use super::forward::{forward, reset};
use super::state::State;
use super::vars::VarKind;
use super::watch::Wake;
use crate::errno::Errno;
use crate::link::Link;
use crate::tree::ops::Caller;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::task::{AbortHandle, JoinSet};

/// Connections to all ports of a machine at once; its agent takes a few more.
const MOST_CONNECTIONS: usize = 1000;
/// Ports below belong to who may bind them, and are not given to others by a daemon that may.
const FIRST_UNPRIVILEGED: u16 = 1024;
/// What cannot be now (the descriptors are used up, nobody listens yet) is tried again after so long.
const RETRY: Duration = Duration::from_millis(50);
/// A connection that woke its machine, or came while it booted, waits so long for something that listens.
const COMING_UP: Duration = Duration::from_secs(10);
/// A connection to a machine that runs waits so long for an agent that is being sought.
const SEEK: Duration = Duration::from_secs(10);
/// What is waited for is looked at again after so long, told of or not.
const LOOK: Duration = Duration::from_millis(200);

/// What is written down of a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    /// The host's port that the user asked for.
    wish: Option<u16>,
    /// The host's port that it has, or had last.
    host: u16,
}

/// A port that listens. Dropped, it does not, and its connections are reset.
struct Listening {
    listener: TcpListener,
    task: AbortHandle,
}

impl Drop for Listening {
    fn drop(&mut self) {
        // The task's own descriptor is closed a little later; nobody is to connect until then, and the number is free.
        let _ = rustix::net::shutdown(self.listener.as_fd(), rustix::net::Shutdown::Both);
        self.task.abort();
    }
}

/// The ports of a machine.
#[derive(Default)]
pub(super) struct Ports {
    /// By their numbers among the machine's things.
    open: Mutex<BTreeMap<u32, Listening>>,
    connections: Arc<AtomicUsize>,
}

/// One connection in the count.
struct Seat(Arc<AtomicUsize>);

impl Ports {
    fn seat(&self) -> Option<Seat> {
        let before = self.connections.fetch_add(1, Ordering::Relaxed);
        // Counted already: dropping the seat takes it back.
        let seat = Seat(self.connections.clone());
        (before < MOST_CONNECTIONS).then_some(seat)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A port's number, written as it is listed.
pub(super) fn number(text: &[u8]) -> Option<u16> {
    let port: u16 = std::str::from_utf8(text).ok()?.parse().ok()?;
    (port != 0 && port.to_string().as_bytes() == text).then_some(port)
}

/// The address at which one connects to what listens at another.
fn reachable(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        other => other,
    }
}

fn url(address: IpAddr, port: u16) -> String {
    format!("http://{}", SocketAddr::new(reachable(address), port))
}

/// Listens at the port that was asked for; else at the guest's own number, or any that is free.
fn listen(address: IpAddr, guest: u16, wish: Option<u16>) -> io::Result<TcpListener> {
    if let Some(port) = wish {
        return TcpListener::bind((address, port));
    }
    let same = (guest >= FIRST_UNPRIVILEGED).then(|| TcpListener::bind((address, guest)));
    match same {
        Some(Ok(listener)) => Ok(listener),
        _ => TcpListener::bind((address, 0)),
    }
}

fn refused(address: IpAddr, port: Option<u16>, error: &io::Error) -> MachineError {
    let at = port.map_or_else(|| address.to_string(), |port| SocketAddr::new(address, port).to_string());
    match error.kind() {
        io::ErrorKind::AddrInUse => MachineError::in_use(format!("{at} is in use on the host: take another port")),
        io::ErrorKind::PermissionDenied => MachineError::denied(format!("{at} cannot be bound: {error}")),
        io::ErrorKind::AddrNotAvailable => {
            MachineError::invalid(format!("{at} is no address of this host: see the daemon's ports_address"))
        }
        _ => MachineError::limit(format!("{at} cannot be bound: {error}")),
    }
}

/// Wakes what waits for a change of state.
struct Waker(Notify);

impl Wake for Waker {
    fn wake(&self) {
        self.0.notify_one();
    }
}

impl Machine {
    fn port_record(&self, id: u32) -> Record {
        let value = self.vars.value(VarKind::Port, id).unwrap_or_default();
        serde_json::from_slice(&value).unwrap_or_default()
    }

    /// Where a port of the guest is reached: `http://127.0.0.1:8080`.
    pub fn port_url(&self, id: u32) -> Option<String> {
        let record = self.port_record(id);
        (record.host != 0).then(|| url(self.shared.options.ports_address, record.host))
    }

    /// Opens a port of the guest on the host: `touch ports/8080`. Gives its number among the machine's things.
    ///
    /// # Errors
    /// EINVAL for what is no port, EEXIST, EMFILE.
    pub fn open_port(self: &Arc<Self>, caller: Caller, name: &[u8]) -> Result<u32, MachineError> {
        let id = self.vars.create(VarKind::Port, name)?;
        self.bind_port(caller, id, None).inspect_err(|_| {
            self.vars.remove(VarKind::Port, id);
        })?;
        Ok(id)
    }

    /// What is written to a port's file: the host's port, or the URL that is read there.
    ///
    /// # Errors
    /// EINVAL.
    fn wished_port(&self, value: &[u8]) -> Result<u16, MachineError> {
        let value = value.trim_ascii();
        let prefix = url(self.shared.options.ports_address, 0);
        let text = value.strip_prefix(prefix.strip_suffix('0').unwrap_or(&prefix).as_bytes()).unwrap_or(value);
        number(text).ok_or_else(|| MachineError::invalid("not a port of the host: a number from 1 to 65535"))
    }

    /// Looks at a text, without doing what it says.
    ///
    /// # Errors
    /// EINVAL.
    pub fn check_port(&self, value: &[u8]) -> Result<(), MachineError> {
        self.wished_port(value).map(drop)
    }

    /// Sets the host's port.
    ///
    /// # Errors
    /// EINVAL; EADDRINUSE when somebody has it; EACCES for one that the caller could not bind.
    pub fn set_port(self: &Arc<Self>, caller: Caller, id: u32, value: &[u8]) -> Result<(), MachineError> {
        let wish = self.wished_port(value)?;
        self.bind_port(caller, id, Some(wish))
    }

    fn bind_port(self: &Arc<Self>, caller: Caller, id: u32, wish: Option<u16>) -> Result<(), MachineError> {
        let gone = || MachineError::not_found("the port was closed");
        let name = self.vars.name(VarKind::Port, id).ok_or_else(gone)?;
        let guest = number(name.as_bytes()).ok_or_else(gone)?;
        if let Some(port) = wish.filter(|port| *port < FIRST_UNPRIVILEGED)
            && caller.uid != 0
            && caller.uid != self.shared.mount_uid
        {
            return Err(MachineError::denied(format!("port {port} of the host is root's: take one from 1024 on")));
        }
        let address = self.shared.options.ports_address;
        let mut open = self.ports.open.lock();
        let before = self.port_record(id);
        let listener = match open.get(&id) {
            Some(_) if wish == Some(before.host) => None,
            _ => Some(listen(address, guest, wish).map_err(|error| refused(address, wish, &error))?),
        };
        let host = match &listener {
            Some(listener) => listener.local_addr().map_err(|error| refused(address, wish, &error))?.port(),
            None => before.host,
        };
        self.put_port(id, Record { wish, host })?;
        if let Some(listener) = listener
            && self.serves()
        {
            let listening = self.serve_port(listener, guest).map_err(|error| refused(address, wish, &error))?;
            open.insert(id, listening);
        }
        drop(open);
        self.say("port", &[("open", &name), ("host", &host.to_string())]);
        Ok(())
    }

    fn put_port(&self, id: u32, record: Record) -> Result<(), MachineError> {
        let value = serde_json::to_vec(&record).map_err(|error| MachineError::internal(error.to_string()))?;
        self.vars.set(VarKind::Port, id, &value)
    }

    /// Closes a port: `rm ports/8080`. Its connections are reset.
    pub fn close_port(&self, id: u32) {
        let name = self.vars.name(VarKind::Port, id);
        let mut open = self.ports.open.lock();
        let closed = open.remove(&id);
        let was_there = self.vars.remove(VarKind::Port, id);
        drop(open);
        drop(closed);
        if let Some(name) = name.filter(|_| was_there) {
            self.say("port", &[("closed", &name)]);
        }
    }

    /// Whether there is something to serve, or will be.
    fn serves(&self) -> bool {
        self.accepts_jobs()
    }

    /// Opens and closes the machine's ports as its state wants it.
    pub(super) fn follow_ports(self: &Arc<Self>) {
        let mut open = self.ports.open.lock();
        // Looked at within the lock: who comes later knows better.
        if !self.serves() {
            open.clear();
            return;
        }
        for (id, name) in self.vars.list(VarKind::Port) {
            if open.contains_key(&id) {
                continue;
            }
            let Some(guest) = number(name.as_bytes()) else { continue };
            match self.reopen_port(id, guest) {
                Ok(listening) => drop(open.insert(id, listening)),
                Err(error) => {
                    self.record_error("port", error.errno(), &format!("{error}; it stays closed"), &name);
                }
            }
        }
    }

    /// Opens a port that was open before: on the same port of the host if it is free, else on another.
    fn reopen_port(self: &Arc<Self>, id: u32, guest: u16) -> Result<Listening, MachineError> {
        let address = self.shared.options.ports_address;
        let record = self.port_record(id);
        let last = record.wish.or(Some(record.host).filter(|port| *port != 0));
        let listener = match listen(address, guest, last) {
            Ok(listener) => listener,
            Err(error) => {
                let why = refused(address, last, &error);
                let other = listen(address, guest, None).map_err(|error| refused(address, None, &error))?;
                let now = other.local_addr().map(|at| at.port()).unwrap_or_default();
                let message = format!("{why}; it is reached by {} now", url(address, now));
                self.record_error("port", why.errno(), &message, &guest.to_string());
                other
            }
        };
        let host = listener.local_addr().map_err(|error| refused(address, last, &error))?.port();
        if host != record.host {
            self.put_port(id, Record { host, ..record })?;
            self.say("port", &[("open", &guest.to_string()), ("host", &host.to_string())]);
        }
        self.serve_port(listener, guest).map_err(|error| refused(address, last, &error))
    }

    fn serve_port(self: &Arc<Self>, listener: TcpListener, guest: u16) -> io::Result<Listening> {
        listener.set_nonblocking(true)?;
        let _runtime = self.shared.runtime.enter();
        let served = tokio::net::TcpListener::from_std(listener.try_clone()?)?;
        let task = self.shared.runtime.spawn(serve(Arc::downgrade(self), served, guest)).abort_handle();
        Ok(Listening { listener, task })
    }

    /// The link to the agent, as soon as there is one; `None` when there will be none.
    async fn linked(self: &Arc<Self>) -> Option<Arc<Link>> {
        let mut sought = Duration::ZERO;
        loop {
            let waker = Arc::new(Waker(Notify::new()));
            let registered = self.state_watch.register(waker.clone());
            let idle = self.is_idle();
            let link = match self.state() {
                State::Running if !idle => self.link().map(Some),
                State::Paused if !idle => Some(None),
                state if state.takes_jobs() || idle => None,
                _ => Some(None),
            };
            if link.is_some() || sought >= SEEK {
                self.state_watch.unregister(registered);
                return link.flatten();
            }
            if tokio::time::timeout(LOOK, waker.0.notified()).await.is_err() {
                self.state_watch.unregister(registered);
            }
            // A boot has a time-out of its own.
            if self.state() == State::Running {
                sought += LOOK;
            }
        }
    }

    async fn carry(self: Arc<Self>, guest: u16, mut socket: TcpStream, _seat: Seat) {
        // Until both sides have said all, its end is a reset, also where this is given up.
        reset(&socket, true);
        let was_up = self.state() == State::Running && !self.is_idle();
        self.used();
        self.wake();
        let mut waited = Duration::ZERO;
        loop {
            let Some(link) = self.linked().await else { return };
            let error = match forward(&link, guest, &mut socket, || self.used()).await {
                Ok(()) => return,
                Err(error) => error,
            };
            // What is to listen there comes up after its machine.
            let again = !was_up && error.errno() == Errno(libc::ECONNREFUSED) && waited < COMING_UP;
            if !again {
                tracing::debug!(machine = self.id, port = guest, %error, "a connection to a port broke");
                return;
            }
            tokio::time::sleep(RETRY).await;
            waited += RETRY;
        }
    }
}

/// Accepts connections until the port is closed.
async fn serve(machine: Weak<Machine>, listener: tokio::net::TcpListener, guest: u16) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((socket, _)) => {
                    let Some(machine) = machine.upgrade() else { return };
                    match machine.ports.seat() {
                        Some(seat) => drop(connections.spawn(machine.carry(guest, socket, seat))),
                        None => reset(&socket, true),
                    }
                }
                Err(_) => tokio::time::sleep(RETRY).await,
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_written_in_one_way() {
        for (text, port) in [("1", 1), ("80", 80), ("8080", 8080), ("65535", 65535)] {
            assert_eq!(number(text.as_bytes()), Some(port));
        }
        for bad in ["", "0", "65536", "08080", "+80", " 80", "80 ", "-1", "http", "8080\n", "０"] {
            assert_eq!(number(bad.as_bytes()), None, "{bad}");
        }
        assert_eq!(number(b"\xff"), None);
    }

    #[test]
    fn urls() {
        assert_eq!(url(Ipv4Addr::LOCALHOST.into(), 80), "http://127.0.0.1:80");
        assert_eq!(url(Ipv4Addr::UNSPECIFIED.into(), 80), "http://127.0.0.1:80");
        assert_eq!(url(Ipv6Addr::UNSPECIFIED.into(), 80), "http://[::1]:80");
        assert_eq!(url(Ipv4Addr::new(10, 0, 0, 1).into(), 80), "http://10.0.0.1:80");
    }

    #[test]
    fn the_same_number_or_another() {
        let here = IpAddr::from(Ipv4Addr::LOCALHOST);
        let taken = TcpListener::bind((here, 0)).unwrap();
        let port = taken.local_addr().unwrap().port();
        assert_eq!(listen(here, 80, Some(port)).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        let other = listen(here, port, None).unwrap().local_addr().unwrap().port();
        assert_ne!(other, port);
        assert!(listen(here, 80, None).unwrap().local_addr().unwrap().port() >= FIRST_UNPRIVILEGED);
        drop(taken);
        assert_eq!(listen(here, port, None).unwrap().local_addr().unwrap().port(), port);
    }
}
