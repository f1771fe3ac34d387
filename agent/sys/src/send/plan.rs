//! What goes into a sendmmsg, and what becomes of it when the kernel objects.
//!
//! A cursor goes through the batches, datagram by datagram. The messages of a call are planned from
//! the cursor on; the kernel takes some of them, or objects to the first. Either way the next call
//! begins behind what was taken, so nothing is sent twice and nothing is passed over.

use std::net::SocketAddr;
use std::time::Instant;

use skein_core::drop::{DropCounts, DropReason};
use skein_core::wire::ecn::Ecn;

use super::gso::GsoState;
use super::{GsoBatch, Position, SendOutcome, SendRequest, TooLong};

/// Messages in one call at most.
pub(super) const MAX_MESSAGES: usize = 64;

/// Datagrams in one message at most: Linux allows 64 before 6.9, and a full message of 1,400-byte
/// datagrams has fewer.
pub(super) const MAX_DATAGRAMS_PER_MESSAGE: usize = 64;

/// Bytes in one message of several datagrams at most: near the protocol's limit (65,507) the
/// kernel segments in software.
pub(super) const MAX_MESSAGE_LEN: usize = 65_000;

/// One message of a call: a range of one batch's datagrams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Message {
    /// Index of the batch.
    pub(super) batch: usize,
    /// Its first datagram in the batch.
    pub(super) first: usize,
    /// How many datagrams.
    pub(super) segments: usize,
    /// Where it begins in the batch, in bytes.
    pub(super) start: usize,
    /// How many bytes.
    pub(super) len: usize,
    /// The segment size, if the kernel is to split it.
    pub(super) gso: Option<u16>,
    /// ECN field of the outer header; `NotEct` needs no control message.
    pub(super) ecn: Ecn,
}

/// A message that the kernel called invalid, whose datagrams go one by one for now.
#[derive(Debug, Clone, Copy)]
struct RefusedMessage {
    batch: usize,
    /// Behind its last datagram.
    end: usize,
    errno: i32,
    /// Whether one of its datagrams failed alone, too.
    failed: bool,
}

/// Use of the control messages that set the outer ECN field (IP_TOS, IPV6_TCLASS).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum EcnUse {
    #[default]
    On,
    /// A datagram with the control message was refused and is sent again without it. The result
    /// shows whether the control message was the cause.
    Trial,
    /// The kernel refuses the control message.
    Refused,
}

/// Buffers of the decisions, kept from call to call.
#[derive(Debug, Default)]
pub(super) struct Plan {
    messages: Vec<Message>,
    datagrams_per_call: Vec<u32>,
    segments_per_message: Vec<u32>,
    ecn: EcnUse,
}

impl Plan {
    /// Sends what there is to send, by as many calls of `send` as it takes. `send` gets the messages
    /// of one call and returns how many the kernel took, or the error (errno) of the first.
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

    /// Returns whether the kernel refuses the control message of the ECN field, so that every
    /// datagram is Not-ECT.
    pub(super) fn ecn_refused(&self) -> bool {
        self.ecn == EcnUse::RefusedMessage
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

/// What an objection to a message calls for.
enum NextStep {
    /// The rest of the planned call stands.
    Continue,
    /// Something was learnt that changes the plan.
    Replan,
    /// The socket has no room for it, nor for what follows.
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
                    // Taking nothing without an error must not go on for ever.
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

    /// Plans a call from the cursor on.
    fn plan_call(&mut self) {
        self.plan.messages.clear();
        let mut at = self.cursor;
        while self.plan.messages.len() < MAX_MESSAGES {
            let Some(batch) = self.batches.get(at.batch) else { break };
            if at.segment == 0 && !self.is_valid(batch) {
                // Malformed: whatever was planned before it goes first, so that the cursor stays
                // behind everything that is settled.
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

    /// Whether a batch is what it says.
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

    /// The longest message from a datagram on.
    fn next_message(&self, at: Position, batch: &GsoBatch<'_>) -> Message {
        let left = batch.segments - at.segment;
        let is_refused = self
            .refused
            .is_some_and(|refused| refused.batch == at.batch && at.segment < refused.end);
        let most = match u16::try_from(batch.segment_size) {
            Ok(1..) if left > 1 && !is_refused && self.gso.allowed(batch.destination, self.now) => {
                MAX_DATAGRAMS_PER_MESSAGE.min(MAX_MESSAGE_LEN / batch.segment_size)
            }
            _ => 1,
        };
        let segments = left.min(most.max(1));
        let start = at.segment * batch.segment_size;
        let end = match left - segments {
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

    /// The kernel took the messages `at..end` of the planned call.
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

    fn on_error(&mut self, message: &Message, errno: i32) -> NextStep {
        if errno == libc::EAGAIN {
            return NextStep::Wait;
        }
        if message.gso.is_some() {
            let destination = self.destination(message);
            match errno {
                // Of the route: IPsec, no checksum offload before 6.11. Of the kernel: no
                // UDP_SEGMENT at all.
                libc::EIO | libc::EOPNOTSUPP | libc::ENOPROTOOPT => {
                    self.gso.pause(destination, errno, self.now);
                    self.outcome.fallbacks += 1;
                    return NextStep::Replan;
                }
                // Of this message: too many segments for this kernel, a short tail, or a segment
                // longer than the route's MTU, which the datagrams will then meet alone.
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

    /// A message was sent or dropped: the cursor moves behind it.
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
            // What fails alone, too, says nothing of UDP_SEGMENT.
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
#[path = "plan_tests.rs"]
mod tests;
