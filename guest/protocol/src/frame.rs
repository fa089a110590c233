//! Frames: what goes over the stream, byte for byte.
//!
//! ```text
//! 0      1       2          4          8      12            16       24
//! | kind | flags | meta_len | data_len | seq  | deadline_ms | tag    | meta … | data … |
//! ```
//! All numbers are little-endian. `seq` counts the frames of one direction from 0 and is checked: streams have
//! been seen to lose bytes under nested virtualisation, and a lost frame must end the session, not corrupt it.

use thiserror::Error;

/// Size of the encoded header, in bytes.
pub const HEADER_LEN: usize = 24;
/// Largest message part of a frame, in bytes.
pub const MAX_META: usize = 32 * 1024;
/// Largest raw part of one frame, in bytes: what a small request can be made to wait behind.
pub const MAX_DATA: usize = 256 * 1024;
/// Largest body of one request or reply, over all of its frames, in bytes (a job's start is the largest: a script of 16
/// MiB, and [`crate::job::MAX_SPEC`]).
pub const MAX_BODY: usize = 20 * 1024 * 1024;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// First frame of each direction; meta is a [`crate::message::Hello`].
    Hello = 1,
    /// Host to guest: meta is a [`crate::message::Request`], to be answered under the same tag.
    Request = 2,
    /// Guest to host: meta is a [`crate::message::Reply`].
    Reply = 3,
    /// Guest to host: the request failed; meta is a [`crate::message::Failure`].
    Error = 4,
    /// More of the body of a request or reply of this tag (see [`FLAG_MORE`]); no meta.
    Body = 5,
    /// Host to guest: give up the request of this tag. It is still answered, once.
    Cancel = 6,
    /// Bytes of a stream; the tag is the stream's number ([`crate::job`]); meta is empty.
    Data = 7,
    /// The receiver of a stream allows this many more bytes; meta is a [`crate::message::Credit`].
    Credit = 8,
    /// Host to guest: meta is a [`crate::message::Notice`], never answered.
    Notice = 9,
    /// Guest to host: meta is an [`crate::message::Event`], never answered.
    Event = 10,
}

impl Kind {
    /// The kind of that number, if there is one.
    pub fn from_u8(value: u8) -> Option<Kind> {
        Some(match value {
            1 => Kind::Hello,
            2 => Kind::Request,
            3 => Kind::Reply,
            4 => Kind::Error,
            5 => Kind::Body,
            6 => Kind::Cancel,
            7 => Kind::Data,
            8 => Kind::Credit,
            9 => Kind::Notice,
            10 => Kind::Event,
            _ => return None,
        })
    }
}

/// Set on a request, reply or body frame when [`Kind::Body`] frames of the same tag follow.
pub const FLAG_MORE: u8 = 1;

/// The fixed part of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What the frame is.
    pub kind: Kind,
    /// Bits: [`FLAG_MORE`].
    pub flags: u8,
    /// Bytes of meta that follow; at most [`MAX_META`].
    pub meta_len: u16,
    /// Bytes of data after the meta; at most [`MAX_DATA`].
    pub data_len: u32,
    /// This frame's place in its direction of the session, from 0, wrapping.
    pub seq: u32,
    /// For requests: milliseconds the sender will wait for the answer; 0 is for ever.
    pub deadline_ms: u32,
    /// Which request or stream the frame belongs to.
    pub tag: u64,
}

/// Why bytes are not a frame. Each of them ends the session.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum FrameError {
    /// No such kind.
    #[error("frame of unknown kind {0}")]
    Kind(u8),
    /// Over [`MAX_META`] or [`MAX_DATA`].
    #[error("frame too large: meta {meta} bytes, data {data} bytes")]
    TooLarge {
        /// Bytes of meta that were announced.
        meta: usize,
        /// Bytes of data that were announced.
        data: usize,
    },
    /// A frame is missing, doubled or damaged.
    #[error("frame {got} where {want} was due")]
    Sequence {
        /// The number the frame had.
        got: u32,
        /// The number it should have had.
        want: u32,
    },
    /// The meta does not decode.
    #[error("message does not decode: {0}")]
    Meta(String),
}

impl Header {
    /// The header as it goes over the wire.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut out = [0u8; HEADER_LEN];
        out[0] = self.kind as u8;
        out[1] = self.flags;
        out[2..4].copy_from_slice(&self.meta_len.to_le_bytes());
        out[4..8].copy_from_slice(&self.data_len.to_le_bytes());
        out[8..12].copy_from_slice(&self.seq.to_le_bytes());
        out[12..16].copy_from_slice(&self.deadline_ms.to_le_bytes());
        out[16..24].copy_from_slice(&self.tag.to_le_bytes());
        out
    }

    /// Decodes and checks the kind and the lengths (not the sequence, which only the session knows).
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Header, FrameError> {
        let [kind, flags, m0, m1, d0, d1, d2, d3, s0, s1, s2, s3, e0, e1, e2, e3, tag @ ..] = *bytes;
        let header = Header {
            kind: Kind::from_u8(kind).ok_or(FrameError::Kind(kind))?,
            flags,
            meta_len: u16::from_le_bytes([m0, m1]),
            data_len: u32::from_le_bytes([d0, d1, d2, d3]),
            seq: u32::from_le_bytes([s0, s1, s2, s3]),
            deadline_ms: u32::from_le_bytes([e0, e1, e2, e3]),
            tag: u64::from_le_bytes(tag),
        };
        let (meta, data) = (header.meta_len as usize, header.data_len as usize);
        if meta > MAX_META || data > MAX_DATA {
            return Err(FrameError::TooLarge { meta, data });
        }
        Ok(header)
    }
}

/// Encodes a message for the meta part of a frame.
///
/// # Errors
/// [`FrameError::TooLarge`] when it is over [`MAX_META`].
pub fn encode_meta<T: serde::Serialize>(message: &T, buffer: &mut Vec<u8>) -> Result<u16, FrameError> {
    buffer.clear();
    let mut out = std::mem::take(buffer);
    out = postcard::to_extend(message, out).map_err(|error| FrameError::Meta(error.to_string()))?;
    *buffer = out;
    if buffer.len() > MAX_META {
        return Err(FrameError::TooLarge { meta: buffer.len(), data: 0 });
    }
    Ok(buffer.len() as u16)
}

/// Decodes the meta part of a frame; names in it borrow from `bytes`.
///
/// # Errors
/// [`FrameError::Meta`] when the bytes are not such a message, or there are bytes left over.
pub fn decode_meta<'a, T: serde::Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, FrameError> {
    let (message, rest) = postcard::take_from_bytes(bytes).map_err(|error| FrameError::Meta(error.to_string()))?;
    if !rest.is_empty() {
        return Err(FrameError::Meta(format!("{} bytes left over", rest.len())));
    }
    Ok(message)
}
