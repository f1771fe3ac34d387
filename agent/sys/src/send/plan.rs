//! Selection of the messages of a sendmmsg(2) call, and reactions to its errors.
//!
//! A cursor points to the first datagram that is neither sent nor dropped. Each call is planned
//! from the cursor. The kernel accepts some of the messages, or refuses the first one. The cursor
//! moves behind each message that was accepted or dropped, so that no datagram is sent twice or
//! skipped.

use std::net::SocketAddr;
use std::time::Instant;

use skein_core::drop::{DropCounts, DropReason};
use skein_core::wire::ecn::Ecn;

use super::gso::GsoState;
use super::{GsoBatch, Position, SendOutcome, SendRequest, TooLong};

/// Maximum number of messages in one call.
pub(super) const MAX_MESSAGES: usize = 64;

/// Maximum number of datagrams in one message (UDP_MAX_SEGMENTS, 64 before Linux 6.9). A message of
/// 65,000 bytes has only 46 datagrams of 1,400 bytes.
pub(super) const MAX_DATAGRAMS_PER_MESSAGE: usize = 64;

/// Maximum length of a message with several datagrams, bytes. The kernel segments messages near the
/// protocol's limit (65,507 bytes) in software.
pub(super) const MAX_MESSAGE_LEN: usize = 65_000;

/// Message of a sendmmsg(2) call: a range of datagrams of one batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Message {
    /// Index of the batch.
    pub(super) batch: usize,
    /// Index of the first datagram in the batch.
    pub(super) first: usize,
    /// Number of datagrams, at least 1.
    pub(super) segments: usize,
    /// Offset of the first datagram in the batch, bytes.
    pub(super) start: usize,
    /// Length of the message in bytes.
    pub(super) len: usize,
    /// Segment size in bytes for UDP_SEGMENT; `None` for a single datagram.
    pub(super) gso: Option<u16>,
    /// ECN field of the outer header; `NotEct` needs no control message.
    pub(super) ecn: Ecn,
}

/// A message that the kernel refused as invalid. Its datagrams are sent singly.
#[derive(Debug, Clone, Copy)]
struct RefusedMessage {
    batch: usize,
    /// Index behind the last datagram of the message.
    end: usize,
    errno: i32,
    /// True if one of the single datagrams failed, too.
    failed: bool,
}

/// Use of the control messages that set the outer ECN field (IP_TOS, IPV6_TCLASS).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum EcnUse {
    #[default]
    On,
    /// The kernel refused a datagram with the control message. The datagram is sent again without
    /// it. The result shows whether the control message was the cause.
    Trial,
    /// The kernel refuses the control message.
    Refused,
}

/// Buffers of a plan, which calls reuse, and the use of the ECN control message.
#[derive(Debug, Default)]
pub(super) struct Plan {
    messages: Vec<Message>,
    datagrams_per_call: Vec<u32>,
    segments_per_message: Vec<u32>,
    ecn: EcnUse,
}

impl Plan {
    /// Sends the datagrams of `request` by calls of `send`, until all are sent or dropped, or the
    /// socket has no space. `send` executes one sendmmsg(2) with the given messages. It returns the
    /// number of accepted messages, or the errno of the first message.
    pub(super) fn execute(
        &mut self,
        request: &SendRequest<'_>,
        gso: &mut GsoState,
        drops: &mut DropCounts,
        now: Instant,
        send: impl FnMut(&[Message]) -> Result<usize, i32>,
    ) -> SendOutcome {
        self.datagrams_per_call.clear();
        self.segments_per_message.clear();
        let mut execution = Execution {
            plan: self,
            batches: request.batches,
            arena_len: request.arena.len(),
            gso,
            drops,
            now,
            cursor: request.from,
            refused: None,
            outcome: SendOutcome::default(),
        };
        execution.execute(send);
        execution.outcome
    }

    pub(super) fn datagrams_per_call(&self) -> &[u32] {
        &self.datagrams_per_call
    }

    /// Returns true if the kernel refuses the control message of the ECN field.
    pub(super) fn ecn_refused(&self) -> bool {
        self.ecn == EcnUse::Refused
    }

    pub(super) fn segments_per_message(&self) -> &[u32] {
        &self.segments_per_message
    }
}

struct Execution<'a> {
    plan: &'a mut Plan,
    batches: &'a [GsoBatch<'a>],
    arena_len: usize,
    gso: &'a mut GsoState,
    drops: &'a mut DropCounts,
    now: Instant,
    cursor: Position,
    refused: Option<RefusedMessage>,
    outcome: SendOutcome,
}

/// Continuation after an error of a message.
enum NextStep {
    /// Sends the remaining messages of the plan.
    Continue,
    /// Plans a new call from the cursor, because the error changes the messages.
    Replan,
    /// Stops, because the send buffer of the socket is full.
    Wait,
}

impl Execution<'_> {
    fn execute(&mut self, mut send: impl FnMut(&[Message]) -> Result<usize, i32>) {
        loop {
            self.plan_call();
            let mut at = 0;
            if self.plan.messages.is_empty() {
                return;
            }
            while let Some(&first) = self.plan.messages.get(at) {
                self.outcome.calls += 1;
                match send(&self.plan.messages[at..]) {
                    // A kernel that accepts no message and returns no error must not cause an
                    // endless loop.
                    Ok(0) => {
                        self.drop_datagrams(&first, DropReason::SendError);
                        at += 1;
                    }
                    Ok(taken) => {
                        let end = self.plan.messages.len().min(at + taken);
                        self.on_sent(at, end);
                        at = end;
                    }
                    Err(libc::EINTR) => {}
                    Err(errno) => match self.on_error(&first, errno) {
                        NextStep::Continue => at += 1,
                        NextStep::Replan => break,
                        NextStep::Wait => {
                            let Message { batch, first: segment, .. } = first;
                            self.outcome.blocked = Some(Position { batch, segment });
                            return;
                        }
                    },
                }
            }
        }
    }

    /// Plans a call of at most [`MAX_MESSAGES`] messages from the cursor.
    fn plan_call(&mut self) {
        self.plan.messages.clear();
        let mut at = self.cursor;
        while self.plan.messages.len() < MAX_MESSAGES {
            let Some(batch) = self.batches.get(at.batch) else { break };
            if at.segment == 0 && !self.is_valid(batch) {
                // The messages before an invalid batch are sent first, because the cursor may only
                // pass datagrams that are sent or dropped.
                if !self.plan.messages.is_empty() {
                    break;
                }
                self.drops.add_many(DropReason::SendError, batch.segments as u64);
                self.outcome.dropped += batch.segments as u64;
                at = Position { batch: at.batch + 1, segment: 0 };
                self.cursor = at;
                continue;
            }
            if at.segment >= batch.segments {
                at = Position { batch: at.batch + 1, segment: 0 };
                continue;
            }
            let message = self.next_message(at, batch);
            at.segment += message.segments;
            self.plan.messages.push(message);
        }
    }

    /// Returns whether the description of a batch is consistent: its length fits the number and
    /// size of datagrams, no datagram is empty, the last is not longer than the others, and the
    /// parts are inside the arena.
    fn is_valid(&self, batch: &GsoBatch<'_>) -> bool {
        if batch.segments == 0 {
            return true;
        }
        let before_last = (batch.segments - 1).checked_mul(batch.segment_size);
        let last = before_last.and_then(|before| batch.byte_len().checked_sub(before));
        let fits = |&(offset, len): &(usize, usize)| {
            offset.checked_add(len).is_some_and(|end| end <= self.arena_len)
        };
        last.is_some_and(|last| last > 0 && (batch.segments == 1 || last <= batch.segment_size))
            && batch.parts.iter().all(fits)
    }

    /// Returns the longest message that starts at `at`.
    fn next_message(&self, at: Position, batch: &GsoBatch<'_>) -> Message {
        let remaining = batch.segments - at.segment;
        let is_refused = self
            .refused
            .is_some_and(|refused| refused.batch == at.batch && at.segment < refused.end);
        let most = match u16::try_from(batch.segment_size) {
            Ok(1..)
                if remaining > 1
                    && !is_refused
                    && self.gso.allowed(batch.destination, self.now) =>
            {
                MAX_DATAGRAMS_PER_MESSAGE.min(MAX_MESSAGE_LEN / batch.segment_size)
            }
            _ => 1,
        };
        let segments = remaining.min(most.max(1));
        let start = at.segment * batch.segment_size;
        let end = match remaining - segments {
            0 => batch.byte_len(),
            _ => start + segments * batch.segment_size,
        };
        Message {
            batch: at.batch,
            first: at.segment,
            segments,
            start,
            len: end - start,
            gso: u16::try_from(batch.segment_size).ok().filter(|_| segments > 1),
            ecn: if self.plan.ecn == EcnUse::On { batch.ecn } else { Ecn::NotEct },
        }
    }

    /// Handles the accepted messages `at..end` of the planned call.
    fn on_sent(&mut self, at: usize, end: usize) {
        let mut datagrams = 0;
        for i in at..end {
            let message = self.plan.messages[i];
            datagrams += message.segments as u32;
            self.plan.segments_per_message.push(message.segments as u32);
            self.outcome.bytes += message.len as u64;
            if message.gso.is_some() {
                self.outcome.gso_messages += 1;
                self.gso.on_sent(self.destination(&message));
            }
            self.advance(&message, false);
        }
        if self.plan.ecn == EcnUse::Trial {
            self.plan.ecn = EcnUse::Refused;
        }
        self.outcome.datagrams += u64::from(datagrams);
        self.plan.datagrams_per_call.push(datagrams);
    }

    /// Handles the error of a message: drops it, or changes the state so that the next plan
    /// differs.
    fn on_error(&mut self, message: &Message, errno: i32) -> NextStep {
        if errno == libc::EAGAIN {
            return NextStep::Wait;
        }
        if message.gso.is_some() {
            let destination = self.destination(message);
            match errno {
                // The route does not support UDP_SEGMENT (IPsec; a device without checksum offload
                // before Linux 6.11), or the kernel does not.
                libc::EIO | libc::EOPNOTSUPP | libc::ENOPROTOOPT => {
                    self.gso.pause(destination, errno, self.now);
                    self.outcome.fallbacks += 1;
                    return NextStep::Replan;
                }
                // The message is invalid: too many segments for this kernel, a short last one, or
                // segments above the route's MTU. The single datagrams show which of them fail.
                libc::EINVAL | libc::EMSGSIZE => {
                    let end = message.first + message.segments;
                    self.refused =
                        Some(RefusedMessage { batch: message.batch, end, errno, failed: false });
                    self.outcome.fallbacks += 1;
                    return NextStep::Replan;
                }
                _ => {}
            }
        }
        if errno == libc::EMSGSIZE {
            let destination = self.destination(message);
            self.outcome.too_long = Some(TooLong { destination, len: message.len });
        }
        if errno == libc::EINVAL && message.ecn != Ecn::NotEct {
            self.plan.ecn = EcnUse::Trial;
            return NextStep::Replan;
        }
        if self.plan.ecn == EcnUse::Trial {
            self.plan.ecn = EcnUse::On;
            self.drop_datagrams(message, drop_reason(errno));
            return NextStep::Replan;
        }
        self.drop_datagrams(message, drop_reason(errno));
        NextStep::Continue
    }

    fn drop_datagrams(&mut self, message: &Message, reason: DropReason) {
        self.drops.add_many(reason, message.segments as u64);
        self.outcome.dropped += message.segments as u64;
        self.advance(message, true);
    }

    /// Moves the cursor behind a message that was sent or, if `failed`, dropped.
    fn advance(&mut self, message: &Message, failed: bool) {
        let end = message.first + message.segments;
        self.cursor = Position { batch: message.batch, segment: end };
        let Some(refused) = &mut self.refused else { return };
        if refused.batch == message.batch && end <= refused.end {
            refused.failed |= failed;
            if end < refused.end {
                return;
            }
            let RefusedMessage { errno, failed, .. } = *refused;
            self.refused = None;
            // If a single datagram failed as well, the error does not concern UDP_SEGMENT.
            if !failed {
                self.gso.on_refused(self.destination(message), errno, self.now);
            }
        }
    }

    fn destination(&self, message: &Message) -> SocketAddr {
        self.batches[message.batch].destination
    }
}

fn drop_reason(errno: i32) -> DropReason {
    match errno {
        libc::EMSGSIZE => DropReason::SendTooBig,
        libc::ENETUNREACH | libc::EHOSTUNREACH | libc::EADDRNOTAVAIL | libc::ENETDOWN => {
            DropReason::SendUnreachable
        }
        libc::EPERM | libc::EACCES => DropReason::SendDenied,
        libc::ENOBUFS | libc::ENOMEM => DropReason::SendNoBuffer,
        _ => DropReason::SendError,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
