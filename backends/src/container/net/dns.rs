//! Name service for machines: what listens on [`ADDRESS`] in a machine's own network namespace is this daemon, which
//! asks the name servers that the host uses. No way from the machine to the host or to those servers is opened for it,
//! and it works whatever the host's resolver is (one on its loopback, one in a private network).

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;

/// Where a machine's name server is. Not 127.0.0.1, where machines may run one of their own.
pub(super) const ADDRESS: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 53);
const PORT: u16 = 53;

/// How long one name server is waited for: two answer within the five seconds of most resolvers.
const PATIENCE: Duration = Duration::from_millis(2_400);

/// How long a conversation by TCP may last.
const TCP_LIMIT: Duration = Duration::from_secs(20);

/// How many questions of one machine are open at a time; more wait in the socket's buffer, then are dropped.
const OPEN: usize = 64;

/// The largest message by UDP that is passed on, in bytes: more than resolvers offer to take (EDNS, RFC 6891).
const LARGEST: usize = 8 << 10;

/// How many name servers are asked (resolv.conf(5): the C library takes three).
const SERVERS: usize = 3;

/// A machine's name server before anything is answered.
#[derive(Debug)]
pub(super) struct Sockets {
    udp: std::net::UdpSocket,
    tcp: std::net::TcpListener,
}

impl Sockets {
    /// Listens in the network namespace of this thread.
    pub(super) fn bind() -> io::Result<Self> {
        let sockets = Self {
            udp: std::net::UdpSocket::bind((ADDRESS, PORT))?,
            tcp: std::net::TcpListener::bind((ADDRESS, PORT))?,
        };
        sockets.udp.set_nonblocking(true)?;
        sockets.tcp.set_nonblocking(true)?;
        Ok(sockets)
    }

    /// Answers until the process of `pidfd`, the machine's init, ends: an open socket would keep its network namespace
    /// alive. `servers` tells whom to ask.
    pub(super) fn serve(self, pidfd: OwnedFd, servers: Servers, runtime: &tokio::runtime::Handle) -> io::Result<()> {
        let _inside = runtime.enter();
        // SAFETY: the descriptor is given away here, and closed with what has it.
        let end = unsafe { AsyncFd::register_with_interest(pidfd, tokio::io::Interest::READABLE) }?;
        let (udp, tcp) = (Arc::new(UdpSocket::from_std(self.udp)?), TcpListener::from_std(self.tcp)?);
        runtime.spawn(async move {
            let mut open = tokio::task::JoinSet::new();
            let questions = Arc::new(Semaphore::new(OPEN));
            let mut buffer = vec![0; LARGEST];
            loop {
                while open.try_join_next().is_some() {}
                tokio::select! {
                    _ = end.readable() => return,
                    received = udp.recv_from(&mut buffer) => {
                        // An error is about an answer that was not taken, and no matter.
                        let Ok((length, from)) = received else { continue };
                        let Ok(place) = Arc::clone(&questions).try_acquire_owned() else { continue };
                        let question = buffer.get(..length).unwrap_or_default().to_vec();
                        let (udp, servers) = (Arc::clone(&udp), servers.clone());
                        open.spawn(async move {
                            let _place = place;
                            if let Some(answer) = ask(&question, &servers).await {
                                drop(udp.send_to(&answer, from).await);
                            }
                        });
                    }
                    accepted = tcp.accept() => {
                        let Ok((stream, _)) = accepted else {
                            // Out of descriptors, perhaps: not again at once.
                            tokio::time::sleep(Duration::from_millis(100)).await;
                            continue;
                        };
                        let Ok(place) = Arc::clone(&questions).try_acquire_owned() else { continue };
                        let servers = servers.clone();
                        open.spawn(async move {
                            let _place = place;
                            drop(tokio::time::timeout(TCP_LIMIT, relay(stream, &servers)).await);
                        });
                    }
                }
            }
        });
        Ok(())
    }
}

/// Whom to ask.
#[derive(Clone, Debug)]
pub(super) struct Servers(pub(super) Arc<std::path::PathBuf>);

impl Servers {
    /// Those of the host now.
    async fn now(&self) -> Vec<SocketAddr> {
        // A file of some lines in the kernel's memory.
        nameservers(&fs::read_to_string(self.0.as_path()).unwrap_or_default())
    }
}

/// The name servers of a resolv.conf(5); none named means the one on this host.
fn nameservers(text: &str) -> Vec<SocketAddr> {
    let parse = |line: &str| -> Option<SocketAddr> {
        let mut words = line.split_whitespace();
        let address = words.next().filter(|w| *w == "nameserver").and(words.next())?;
        // A link-local address has its interface after a %.
        if let Some((address, scope)) = address.split_once('%') {
            let index = super::link::index(scope).ok().flatten()?;
            return Some(std::net::SocketAddrV6::new(address.parse().ok()?, PORT, 0, index).into());
        }
        Some(SocketAddr::new(address.parse().ok()?, PORT))
    };
    let mut found: Vec<_> = text.lines().filter_map(parse).take(SERVERS).collect();
    if found.is_empty() {
        found.push(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), PORT));
    }
    found
}

/// Puts one question to the servers in turn.
async fn ask(question: &[u8], servers: &Servers) -> Option<Vec<u8>> {
    // The header is 12 bytes; its third has a bit that says what is a question (RFC 1035, 4.1.1).
    if question.len() < 12 || question.get(2).is_none_or(|b| b & 0x80 != 0) {
        return None;
    }
    for server in servers.now().await {
        if let Ok(Ok(answer)) = tokio::time::timeout(PATIENCE, ask_one(question, server)).await {
            return Some(answer);
        }
    }
    let mut failure = question.get(..12)?.to_vec();
    // An answer, recursion available, SERVFAIL; no sections.
    *failure.get_mut(2)? |= 0x80;
    *failure.get_mut(3)? = 0x82;
    failure.get_mut(4..)?.fill(0);
    Some(failure)
}

async fn ask_one(question: &[u8], server: SocketAddr) -> io::Result<Vec<u8>> {
    let any: IpAddr =
        if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { std::net::Ipv6Addr::UNSPECIFIED.into() };
    // A port of its own for each question: who forges an answer has to guess it.
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(server).await?;
    socket.send(question).await?;
    let mut answer = vec![0; LARGEST];
    loop {
        let length = socket.recv(&mut answer).await?;
        let is_answer = answer.get(2).is_some_and(|b| b & 0x80 != 0);
        if length >= 12 && is_answer && answer.get(..2) == question.get(..2) {
            answer.truncate(length);
            return Ok(answer);
        }
    }
}

/// Passes a conversation by TCP to the first server that takes it.
async fn relay(mut inner: TcpStream, servers: &Servers) -> io::Result<()> {
    for server in servers.now().await {
        let Ok(Ok(mut outer)) = tokio::time::timeout(PATIENCE, TcpStream::connect(server)).await else { continue };
        // Question and answer alternate, each with its length before it (RFC 1035, 4.2.2).
        loop {
            let Ok(length) = inner.read_u16().await else { return Ok(()) };
            let mut message = vec![0; usize::from(length)];
            inner.read_exact(&mut message).await?;
            outer.write_u16(length).await?;
            outer.write_all(&message).await?;
            let length = outer.read_u16().await?;
            let mut message = vec![0; usize::from(length)];
            outer.read_exact(&mut message).await?;
            inner.write_u16(length).await?;
            inner.write_all(&message).await?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_servers_are_read() {
        let text = "# x\nnameserver 127.0.0.53\nsearch a.b\nnameserver ::1\nnameserver bad\nnameserver 192.0.2.1 # c\n\
                    nameserver 192.0.2.9\n";
        let found: Vec<_> = nameservers(text).iter().map(ToString::to_string).collect();
        assert_eq!(found, ["127.0.0.53:53", "[::1]:53", "192.0.2.1:53"]);
        assert_eq!(nameservers("nameserver fe80::1%lo\n")[0].to_string(), "[fe80::1%1]:53");
        assert_eq!(nameservers("").len(), 1);
    }

    #[tokio::test]
    async fn no_server_is_an_answer_too() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("resolv.conf");
        fs::write(&file, "nameserver 127.99.99.99\n").unwrap();
        let servers = Servers(Arc::new(file));
        let answer = ask(b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x01x\0\0\x01\0\x01", &servers).await.unwrap();
        assert_eq!(answer, b"\x12\x34\x81\x82\0\0\0\0\0\0\0\0");
        assert_eq!(ask(b"short", &servers).await, None);
        assert_eq!(ask(b"\x12\x34\x81\0\0\0\0\0\0\0\0\0", &servers).await, None, "an answer is no question");
    }
}
