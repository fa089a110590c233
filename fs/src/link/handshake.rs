//! The first frames of a session: who speaks which version.

use super::error::{LinkError, clean};
use machinefs_protocol::frame::{HEADER_LEN, Header, Kind, MAX_META, decode_meta, encode_meta};
use machinefs_protocol::message::Hello;
use machinefs_protocol::{OLDEST_VERSION, VERSION};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Says hello, and reads and checks the agent's. Blocks, at most for `timeout` in all.
pub(super) fn handshake(stream: &UnixStream, session: u128, timeout: Duration) -> Result<Hello, LinkError> {
    let deadline = Instant::now() + timeout;
    let hello = Hello {
        version: VERSION,
        oldest: OLDEST_VERSION,
        features: 0,
        session,
        boot: 0,
        build: concat!("machinefs ", env!("CARGO_PKG_VERSION")).to_string(),
    };
    let mut meta = Vec::new();
    let meta_len = encode_meta(&hello, &mut meta).map_err(|error| LinkError::too_large(&error))?;
    let header = Header { kind: Kind::Hello, flags: 0, meta_len, data_len: 0, seq: 0, deadline_ms: 0, tag: 0 };
    let mut frame = header.encode().to_vec();
    frame.append(&mut meta);
    stream.set_write_timeout(Some(timeout)).map_err(lost)?;
    (&*stream).write_all(&frame).map_err(lost)?;

    let mut header = [0; HEADER_LEN];
    read_exact(stream, &mut header, deadline)?;
    let header = Header::decode(&header).map_err(|error| LinkError::Lie(error.to_string().into()))?;
    if header.kind != Kind::Hello || header.seq != 0 || header.data_len != 0 || header.meta_len as usize > MAX_META {
        return Err(LinkError::Lie("the first frame is not a hello".into()));
    }
    let mut meta = vec![0; header.meta_len as usize];
    read_exact(stream, &mut meta, deadline)?;
    let mut theirs: Hello = decode_meta(&meta).map_err(|error| LinkError::Lie(error.to_string().into()))?;
    theirs.build = clean(&theirs.build, 128);
    if theirs.version < OLDEST_VERSION || theirs.oldest > VERSION {
        let Hello { version, oldest, build, .. } = theirs;
        return Err(LinkError::Version { version, oldest, build: build.into() });
    }
    if theirs.session != session {
        return Err(LinkError::Lie("it serves another session".into()));
    }
    stream.set_read_timeout(None).map_err(lost)?;
    stream.set_write_timeout(None).map_err(lost)?;
    Ok(theirs)
}

fn read_exact(mut stream: &UnixStream, mut buffer: &mut [u8], deadline: Instant) -> Result<(), LinkError> {
    while !buffer.is_empty() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(LinkError::TimedOut);
        }
        stream.set_read_timeout(Some(left)).map_err(lost)?;
        match stream.read(buffer) {
            Ok(0) => return Err(LinkError::Lost("it ended in the handshake".into())),
            Ok(n) => buffer = buffer.get_mut(n..).unwrap_or(&mut []),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                return Err(LinkError::TimedOut);
            }
            Err(error) => return Err(lost(error)),
        }
    }
    Ok(())
}

fn lost(error: io::Error) -> LinkError {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => LinkError::TimedOut,
        _ => LinkError::Lost(error.to_string().into()),
    }
}
