//! What the clock does to a link: deadlines, interrupts that wait, the heartbeat.

use super::super::error::LinkError;
use super::super::killed::being_killed;
use super::super::timer::{Micros, NEVER, now};
use super::super::{Interrupt, RequestOptions, Tag};
use super::{GRACE, Pending, Shared};
use machinefs_protocol::message::Request;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

impl Shared {
    /// Has the timer look at this link by then.
    pub(super) fn arm(&self, at: Micros) {
        if at < self.wake_at.load(SeqCst) && at < self.wake_at.fetch_min(at, SeqCst) {
            self.timer.wake_by(at);
        }
    }

    /// Silence after which the agent is asked whether it is there.
    pub(super) fn ping_after(&self) -> Micros {
        (self.op_deadline * 2 / 5).min(2_000_000)
    }

    /// Bytes have come.
    pub fn heard(&self) {
        self.quiet_since.store(now(), SeqCst);
        if self.unresponsive.load(SeqCst) && self.unresponsive.swap(false, SeqCst) {
            tracing::info!(link = self.name, "the agent answers again");
        }
    }

    /// What is due: forgets, deadlines, interrupts, the heartbeat.
    pub fn tick(self: &Arc<Self>) {
        self.wake_at.store(NEVER, SeqCst);
        let mut next = self.flush_forgets();
        let time = now();
        let mut late = Vec::new();
        let mut interrupted = Vec::new();
        let waiting = {
            let table = self.table.lock();
            for (&tag, pending) in table.map.iter().filter(|(_, pending)| pending.done.is_some()) {
                if pending.deadline <= time {
                    late.push(tag);
                } else if pending.look_at <= time {
                    interrupted.push((tag, pending.interrupt));
                } else {
                    next = next.min(pending.deadline).min(pending.look_at);
                }
            }
            table.live > 0
        };
        for tag in late {
            self.end(tag, LinkError::TimedOut, false);
        }
        for (tag, interrupt) in interrupted {
            next = next.min(self.look_at_interrupted(tag, interrupt, time));
        }
        if waiting {
            next = next.min(self.heartbeat(time));
        }
        if next != NEVER {
            // No more than a thousand looks a second.
            self.arm(next.max(now() + 1000));
        }
    }

    fn look_at_interrupted(&self, tag: Tag, interrupt: Interrupt, time: Micros) -> Micros {
        let end = match interrupt {
            Interrupt::Query | Interrupt::Wait => true,
            Interrupt::Change { pid } => being_killed(pid),
        };
        if end {
            self.end(tag, LinkError::Interrupted, false);
            return NEVER;
        }
        let mut table = self.table.lock();
        let Some(pending) = table.map.get_mut(&tag) else { return NEVER };
        pending.look_at = time + GRACE;
        pending.look_at.min(pending.deadline)
    }

    /// Asks a silent agent whether it is there, and gives it up for the time being when it stays silent. Gives when
    /// to look again.
    fn heartbeat(self: &Arc<Self>, time: Micros) -> Micros {
        let quiet_since = self.quiet_since.load(SeqCst);
        if time >= quiet_since.saturating_add(self.op_deadline) {
            self.silence();
            return NEVER;
        }
        if time >= quiet_since.saturating_add(self.ping_after()) {
            self.ping();
            return quiet_since + self.op_deadline;
        }
        quiet_since + self.ping_after()
    }

    /// At most one ping is on the way; it stays until it is answered, so that a stopped agent that goes on says so.
    fn ping(self: &Arc<Self>) {
        if self.pinging.swap(true, SeqCst) {
            return;
        }
        let me = Arc::downgrade(self);
        let done = Box::new(move |_| {
            if let Some(me) = me.upgrade() {
                me.pinging.store(false, SeqCst);
            }
        });
        self.request(self.next_tag(), &Request::Ping, &[], RequestOptions::forever(), done);
    }

    fn silence(self: &Arc<Self>) {
        self.ping();
        let waiting: Vec<Tag> = {
            let table = self.table.lock();
            let hopeless = |p: &Pending| p.done.is_some() && (p.file || p.deadline != NEVER);
            table.map.iter().filter(|(_, p)| hopeless(p)).map(|(&tag, _)| tag).collect()
        };
        if !self.unresponsive.swap(true, SeqCst) {
            tracing::warn!(link = self.name, pending = waiting.len(), "the agent is silent");
        }
        for tag in waiting {
            self.end(tag, LinkError::Unresponsive, false);
        }
    }
}
