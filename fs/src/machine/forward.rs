//! One TCP connection of the host, carried to a port of the guest over the agent's stream.
//!
//! Bytes are in flight within the credit of either side, so a slow end slows the other and nothing piles up here. Each
//! direction ends by itself (half-close); a reset of one end is a reset of the other.

use crate::link::{DuplexSink, Link, LinkError, Tag};
use machinefs_protocol::frame::MAX_DATA;
use machinefs_protocol::message::Reply;
use machinefs_protocol::port::INITIAL_CREDIT;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::sync::{mpsc, watch};

/// Bytes read at once.
const PIECE: usize = 64 * 1024;
const _: () = assert!(PIECE <= MAX_DATA);
/// Where too much waits for the agent, it is tried again after so long.
const OVERLOADED: Duration = Duration::from_millis(10);

/// What the agent says of the connection, in order.
enum Heard {
    Opened,
    Data(Vec<u8>),
    End,
}

/// What may be sent to the guest, and whether it still takes any.
#[derive(Clone, Default)]
struct Upward {
    credit: u64,
    ended: Option<Result<(), LinkError>>,
}

struct Sink {
    upward: watch::Sender<Upward>,
    heard: mpsc::UnboundedSender<Heard>,
}

impl Sink {
    fn tell(&self, heard: Heard) {
        // Whoever listened may have gone.
        let _ = self.heard.send(heard);
    }
}

impl DuplexSink for Sink {
    fn opened(&self, _tag: Tag, _reply: &Reply) {
        self.tell(Heard::Opened);
    }

    fn data(&self, data: &[u8]) {
        // Bounded by the window: only what was written is granted anew.
        self.tell(if data.is_empty() { Heard::End } else { Heard::Data(data.to_vec()) });
    }

    fn credit(&self, bytes: u64) {
        self.upward.send_modify(|upward| upward.credit = upward.credit.saturating_add(bytes));
    }

    fn ended(&self, error: Option<LinkError>) {
        self.upward.send_modify(|upward| upward.ended = Some(error.map_or(Ok(()), Err)));
    }
}

/// Gives the stream up when the connection is dropped, however that comes about.
struct Opened<'a> {
    link: &'a Link,
    tag: Tag,
}

impl Drop for Opened<'_> {
    fn drop(&mut self) {
        self.link.give_up(self.tag);
    }
}

/// Carries a connection until both directions have ended, or one end broke. The other end sees a reset when the socket is
/// dropped then, or while this goes on. `used` is called for each piece.
///
/// # Errors
/// ECONNREFUSED when nobody listens on the guest's port: nothing was read from the socket then. Otherwise what broke.
pub async fn forward(link: &Link, port: u16, socket: &mut TcpStream, used: impl Fn()) -> Result<(), LinkError> {
    // What is written there is to be sent, however little it is; where that cannot be set, it is only slower.
    let _ = socket.set_nodelay(true);
    reset(socket, true);
    let (heard_sender, mut heard) = mpsc::unbounded_channel();
    let (upward, mut allowed) = watch::channel(Upward { credit: INITIAL_CREDIT, ended: None });
    let tag = link.open_port(port, Arc::new(Sink { upward, heard: heard_sender }));
    let _opened = Opened { link, tag };
    if !matches!(heard.recv().await, Some(Heard::Opened)) {
        return Err(why(&allowed));
    }
    // Halves that end nothing when they are dropped: a reset must not look like an end.
    let (mut reader, mut writer) = socket.split();
    let carried = {
        let mut back = allowed.clone();
        tokio::try_join!(
            up(link, tag, &mut allowed, &mut reader, &used),
            down(link, tag, &mut heard, &mut back, &mut writer, &used)
        )
    };
    if carried.is_ok() {
        reset(socket, false);
    }
    carried.map(drop)
}

/// From the host to the guest.
async fn up(
    link: &Link,
    tag: Tag,
    allowed: &mut watch::Receiver<Upward>,
    reader: &mut ReadHalf<'_>,
    used: &impl Fn(),
) -> Result<(), LinkError> {
    let mut buffer = vec![0; PIECE];
    let mut sent: u64 = 0;
    let mut granted = INITIAL_CREDIT;
    loop {
        // `credit` is the sum of all that was ever granted.
        if granted == sent {
            let seen = allowed.wait_for(|upward| upward.credit > sent || upward.ended.is_some()).await;
            granted = seen.map_err(|_| LinkError::Closed)?.credit;
            if granted == sent {
                return over(allowed);
            }
        }
        let room = usize::try_from(granted - sent).unwrap_or(usize::MAX).min(PIECE);
        let read = tokio::select! {
            read = reader.read(buffer.get_mut(..room).unwrap_or_default()) => Some(read.map_err(broken)?),
            _ = allowed.wait_for(|upward| upward.ended.is_some()) => None,
        };
        let Some(read) = read else { return over(allowed) };
        if read == 0 {
            return link.send_end(tag);
        }
        used();
        // One frame: it is sent whole, or not at all.
        while let Err(error) = link.send_data(tag, buffer.get(..read).unwrap_or_default()) {
            if !matches!(error, LinkError::Overloaded) {
                return Err(error);
            }
            tokio::time::sleep(OVERLOADED).await;
        }
        sent += read as u64;
    }
}

/// From the guest to the host.
async fn down(
    link: &Link,
    tag: Tag,
    heard: &mut mpsc::UnboundedReceiver<Heard>,
    state: &mut watch::Receiver<Upward>,
    writer: &mut WriteHalf<'_>,
    used: &impl Fn(),
) -> Result<(), LinkError> {
    loop {
        match heard.recv().await {
            Some(Heard::Data(data)) => {
                used();
                writer.write_all(&data).await.map_err(broken)?;
                link.grant(tag, data.len() as u64);
            }
            Some(Heard::End) => return writer.shutdown().await.map_err(broken),
            Some(Heard::Opened) => {}
            None => return Err(why(state)),
        }
    }
}

/// The stream is over, in both directions or by an error.
fn over(state: &watch::Receiver<Upward>) -> Result<(), LinkError> {
    state.borrow().ended.clone().unwrap_or(Ok(()))
}

fn why(state: &watch::Receiver<Upward>) -> LinkError {
    over(state).err().unwrap_or(LinkError::Closed)
}

fn broken(error: io::Error) -> LinkError {
    LinkError::Lost(error.to_string().into())
}

/// Whether closing it is a reset, from now on.
pub(super) fn reset(socket: &TcpStream, is_reset: bool) {
    // Else it is closed in the ordinary way, which says less.
    let _ = rustix::net::sockopt::set_socket_linger(socket, is_reset.then_some(Duration::ZERO));
}
