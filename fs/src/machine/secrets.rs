//! A machine's secrets on their way to its agent, which has them in its memory and gives them to jobs and to git.
//!
//! One set is on its way at a time, and each is read when its turn comes: what the agent has at the end is the newest.

use super::Machine;
use super::error::MachineError;
use crate::link::{Link, LinkError, RequestOptions};
use machinefs_protocol::message::Request;
use machinefs_protocol::secret::{Secret, encode};
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use zeroize::Zeroizing;

/// How far the agent is behind.
#[derive(Default)]
pub(super) struct Delivery {
    /// Counts the changes.
    changes: AtomicU64,
    /// Those that the agent of the present link has.
    given: tokio::sync::Mutex<u64>,
    /// Why the agent does not have them.
    failed: Mutex<Option<MachineError>>,
}

impl Machine {
    /// The agent of this link knows nothing yet.
    ///
    /// # Errors
    /// Those of the link. What is wrong with the secrets themselves is told in `errors`.
    pub(super) async fn give_secrets(&self, link: &Arc<Link>) -> Result<(), LinkError> {
        let mut given = self.delivery.given.lock().await;
        self.deliver(link, RequestOptions::within(link.op_deadline()), &mut given).await
    }

    async fn deliver(&self, link: &Arc<Link>, options: RequestOptions, given: &mut u64) -> Result<(), LinkError> {
        let changes = self.delivery.changes.load(Ordering::SeqCst);
        let result = match self.encoded() {
            Ok(body) => match link.call(&Request::SetSecrets, &body, options).await {
                Err(error @ LinkError::Remote { .. }) => Err(MachineError::internal(format!("the agent: {error}"))),
                Err(error) => return Err(error),
                Ok(_) => Ok(()),
            },
            Err(error) => Err(error),
        };
        *given = changes;
        let is_news = std::mem::replace(&mut *self.delivery.failed.lock(), result.clone().err()).is_none();
        if let Err(error) = result
            && is_news
        {
            self.record_error("secrets", error.errno(), &error.to_string(), "");
        }
        Ok(())
    }

    fn encoded(&self) -> Result<Zeroizing<Vec<u8>>, MachineError> {
        let secrets = self.vars.secrets()?;
        let as_sent: Vec<Secret<'_>> =
            secrets.iter().map(|(name, value)| Secret { name: name.as_bytes(), value }).collect();
        let body = encode(&as_sent).map_err(|error| MachineError::internal(format!("the secrets: {error}")))?;
        Ok(Zeroizing::new(body))
    }

    /// A secret has changed: calls `done` when the agent knows, if there is one that answers.
    pub fn secrets_changed(self: &Arc<Self>, done: impl FnOnce() + Send + 'static) {
        let wanted = self.delivery.changes.fetch_add(1, Ordering::SeqCst) + 1;
        let Some(link) = self.link() else { return done() };
        let (machine, limit) = (self.clone(), link.op_deadline());
        self.shared.runtime.spawn(async move {
            let delivery = tokio::spawn(async move {
                let mut given = machine.delivery.given.lock().await;
                if *given < wanted {
                    // For ever: a frozen agent takes them when it is thawed. A link that breaks is followed by another,
                    // which is given all of them.
                    let _ = machine.deliver(&link, RequestOptions::forever(), &mut given).await;
                }
            });
            // Whoever waits does not wait longer; it goes on without them.
            let _ = tokio::time::timeout(limit, delivery).await;
            done();
        });
    }

    /// Whether jobs have the secrets that they should have.
    ///
    /// # Errors
    /// Why not.
    pub(super) fn check_secrets(&self) -> Result<(), MachineError> {
        self.delivery.failed.lock().clone().map_or(Ok(()), Err)
    }
}
