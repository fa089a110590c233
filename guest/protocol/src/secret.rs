//! Secrets on their way into the guest.

use crate::frame::{FrameError, decode_meta};
use serde::{Deserialize, Serialize};

/// Largest encoded set of secrets, in bytes: they must fit into every job's environment.
pub const MAX_SECRETS: usize = 1024 * 1024;

/// A secret. Its value is not shown by `Debug`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Secret<'a> {
    /// The environment variable's name: not empty, without `=` and NUL.
    #[serde(borrow, with = "serde_bytes")]
    pub name: &'a [u8],
    /// Its value, without NUL.
    #[serde(borrow, with = "serde_bytes")]
    pub value: &'a [u8],
}

impl std::fmt::Debug for Secret<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Secret").field("name", &self.name.escape_ascii().to_string()).finish_non_exhaustive()
    }
}

/// The body of [`crate::message::Request::SetSecrets`].
///
/// # Errors
/// [`FrameError::TooLarge`] over [`MAX_SECRETS`].
pub fn encode(secrets: &[Secret<'_>]) -> Result<Vec<u8>, FrameError> {
    let body = postcard::to_stdvec(secrets).map_err(|error| FrameError::Meta(error.to_string()))?;
    if body.len() > MAX_SECRETS { Err(FrameError::TooLarge { meta: 0, data: body.len() }) } else { Ok(body) }
}

/// The secrets in such a body.
///
/// # Errors
/// [`FrameError::TooLarge`], [`FrameError::Meta`] when it is none.
pub fn decode(body: &[u8]) -> Result<Vec<Secret<'_>>, FrameError> {
    if body.len() > MAX_SECRETS {
        return Err(FrameError::TooLarge { meta: 0, data: body.len() });
    }
    decode_meta(body)
}
