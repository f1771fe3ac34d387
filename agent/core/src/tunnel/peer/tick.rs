//! Timers of a peer: retries of handshakes, the end of sessions, and the periodic tick that reads
//! the traffic counters.

use std::time::Duration;

use super::{Peer, PeerState, SessionEntry};
use crate::time::Time;
use crate::tunnel::handshake::PendingHandshake;
use crate::tunnel::session::COUNTER_REKEY;
use crate::tunnel::shared::Shared;
use crate::tunnel::timers::{
    REKEY_AFTER_TIME, RENEWAL_SPREAD_TICKS, REQUEST_TIMEOUT, RESPONDER_REKEY_AFTER_TIME,
    RETRY_SLACK, SESSION_LIFETIME,
};

impl Peer {
    /// Returns the earliest deadline of the peer except the tick (monotonic clock).
    pub(crate) fn deadline(&self) -> Option<Duration> {
        let retry = self.pending.as_ref().map(|pending| pending.retry_at);
        // A peer without a session has no ticks that would detect the timeout.
        let connecting = self.view.state == PeerState::Connecting;
        let unanswered =
            self.pending.as_ref().filter(|_| connecting).and_then(PendingHandshake::unanswered_at);
        let proof = self.proven.filter(|_| self.can_send()).map(|(_, at)| at + SESSION_LIFETIME);
        self.entries().map(SessionEntry::ends).chain(retry).chain(unanswered).chain(proof).min()
    }

    /// Handles all deadlines that have passed. `tick` says that the tick is due, too.
    pub(crate) fn on_time(&mut self, now: Time, tick: bool, shared: &mut Shared) {
        self.end_expired_sessions(now, shared);
        self.update_endpoint(now.mono, shared);
        if tick && self.has_sessions() {
            self.tick(now, shared);
        }
        if self.pending.as_ref().is_some_and(|p| p.retry_at <= now.mono + RETRY_SLACK) {
            let requested =
                self.requested.is_some_and(|at| now.mono.saturating_sub(at) < REQUEST_TIMEOUT);
            self.retry_handshake(now, requested, shared);
        }
        self.refresh_state(now);
    }

    pub(super) fn tick(&mut self, now: Time, shared: &mut Shared) {
        let (mut sent, mut received) = (false, false);
        for entry in self.entries_mut() {
            let (tx, rx) = entry.sample();
            sent |= tx;
            received |= rx;
        }
        if sent {
            self.live.on_data_sent(now.mono);
        }
        if received {
            self.live.on_data_received(now.mono);
        }
        if self.next.as_ref().is_some_and(|next| next.session.is_confirmed()) {
            self.confirm_next(now, shared);
        }
        let Some(current) = &self.current else {
            // The session was requested while a handshake of the peer was about to create one.
            if self.requested.is_some_and(|at| now.mono.saturating_sub(at) < REQUEST_TIMEOUT) {
                self.begin_handshake(now, shared);
            }
            return;
        };
        let session = &current.session;
        let limit = if session.initiator { REKEY_AFTER_TIME } else { RESPONDER_REKEY_AFTER_TIME };
        let old =
            now.since(session.established) >= limit || session.counters_used() >= COUNTER_REKEY;
        // Only a few sessions are renewed per tick, because a changed key or MTU may concern a
        // thousand peers.
        let other_key = match current.own {
            Some(own) => own != *shared.own.public(),
            None => shared.second.is_some(),
        };
        let old = old || other_key && shared.chance(RENEWAL_SPREAD_TICKS);
        // Sessions without traffic are renewed, too: lanes refuse packets longer than the peer's
        // known MTU, so that no packet would reach the engine.
        let other_mtu =
            current.told_mtu != shared.params.mtu && shared.chance(RENEWAL_SPREAD_TICKS);
        if other_mtu
            || old && (sent || received)
            || sent && self.live.unreachable_reason(now.mono).is_some()
        {
            self.requested = Some(now.mono);
            self.begin_handshake(now, shared);
        }
        if sent || received {
            self.prove_endpoint(now, shared);
        }
        if self.live.ping_due(now.mono) {
            self.ping(now, shared);
        }
        if self.live.in_use(now.mono) {
            self.probe_path(now, shared);
        }
    }
}
