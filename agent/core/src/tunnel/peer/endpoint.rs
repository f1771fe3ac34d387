//! The addresses of a peer: the endpoints of its record, and the one at which it has proved that it
//! receives.

use std::net::SocketAddr;
use std::time::Duration;

use super::{Peer, SessionEntry};
use crate::time::Time;
use crate::tunnel::shared::Shared;
use crate::tunnel::timers::{RESPONDER_REKEY_AFTER_TIME, SESSION_LIFETIME};

impl Peer {
    /// Replaces the endpoints of the peer's record. The current address stays in use until the peer
    /// has answered a handshake at a new endpoint, because a record does not prove that the peer
    /// receives there.
    pub(crate) fn set_endpoints(
        &mut self,
        now: Time,
        endpoints: Vec<SocketAddr>,
        shared: &mut Shared,
    ) {
        if endpoints == self.endpoints {
            return;
        }
        self.endpoints = endpoints;
        self.attempt = 0;
        if self.endpoints.is_empty() {
            self.proven = None;
        }
        self.update_endpoint(now.mono, shared);
        // The time of the last initiation concerns the previous addresses only.
        self.last_initiation = None;
        if let Some(pending) = &mut self.pending {
            pending.retry_at = now.mono;
            shared.arm(now.mono);
        }
        self.prove_endpoint(now, shared);
    }

    /// Updates the address that data is sent to.
    pub(super) fn update_endpoint(&mut self, now: Duration, shared: &mut Shared) {
        let age = |at| now.saturating_sub(at);
        let endpoint = match self.current {
            Some(_) => self.proven.filter(|(_, at)| age(*at) < SESSION_LIFETIME).map(|(to, _)| to),
            None => self.handshake_endpoint(),
        };
        if self.view.endpoint != endpoint {
            self.view.endpoint = endpoint;
            shared.changed = true;
        }
    }

    /// Returns the address that the next handshake is sent to.
    pub(crate) fn handshake_endpoint(&self) -> Option<SocketAddr> {
        match self.endpoints.len() {
            0 => self.proven.map(|(endpoint, _)| endpoint),
            n => self.endpoints.get(self.attempt % n).copied(),
        }
    }

    /// Starts a handshake if data has no destination, or if the record does not name the
    /// destination, or if the proof of the destination is about to end.
    pub(super) fn prove_endpoint(&mut self, now: Time, shared: &mut Shared) {
        let renewed = |at| now.mono.saturating_sub(at) < RESPONDER_REKEY_AFTER_TIME;
        let (proven, endpoints) = (self.proven, &self.endpoints);
        let is_good = proven.is_some_and(|(to, at)| renewed(at) && endpoints.contains(&to));
        if self.current.is_some() && !endpoints.is_empty() && !is_good {
            self.requested = Some(now.mono);
            self.begin_handshake(now, shared);
        }
    }

    /// Returns the endpoint of the peer's record with this address and port.
    pub(crate) fn recorded_endpoint(&self, address: SocketAddr) -> Option<SocketAddr> {
        let ip = address.ip().to_canonical();
        let scope = |address: &SocketAddr| match address {
            SocketAddr::V4(_) => 0,
            SocketAddr::V6(v6) => v6.scope_id(),
        };
        let is_same = |known: &&SocketAddr| {
            known.ip().to_canonical() == ip
                && known.port() == address.port()
                && scope(known) == scope(&address)
        };
        self.endpoints.iter().find(is_same).copied()
    }

    /// Returns the recorded endpoint for an address that a response is sent to; the address itself
    /// if the record names no endpoints.
    pub(crate) fn known_endpoint(&self, address: SocketAddr) -> Option<SocketAddr> {
        match self.endpoints.is_empty() {
            true => Some(address),
            false => self.recorded_endpoint(address),
        }
    }

    /// Returns the address that a session's handshake proved, unless the peer's record has changed
    /// meanwhile and no longer names it.
    pub(super) fn known_of(&self, entry: &SessionEntry) -> Option<SocketAddr> {
        entry.endpoint.filter(|there| self.endpoints.is_empty() || self.endpoints.contains(there))
    }
}
