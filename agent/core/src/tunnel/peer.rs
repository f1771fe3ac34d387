//! The state of a peer: its keys, its sessions, and the transitions between the sessions.

use std::net::SocketAddr;
use std::time::Duration;

use crate::keys::PublicKey;
use crate::route::PeerId;
use crate::time::Time;
use crate::tunnel::cookie::{Mac, MacKeys};
use crate::tunnel::counts::HandshakeResult;
use crate::tunnel::engine::PER_KEY_RATE;
use crate::tunnel::handshake::PendingHandshake;
use crate::tunnel::liveness::{Liveness, UnreachableReason};
use crate::tunnel::message::Timestamp;
use crate::tunnel::path_mtu::PathMtu;
use crate::tunnel::rate_limit::TokenBucket;
use crate::tunnel::saved::{SavedSession, SessionSlot};
use crate::tunnel::session::{Session, SessionParams};
use crate::tunnel::shared::Shared;
use crate::tunnel::timers::CONFIRM_TIMEOUT;

mod control;
mod endpoint;
mod session_entry;
mod tick;
mod view;

pub(crate) use session_entry::SessionEntry;
pub use view::{NextSession, PeerState, PeerView};

/// Maximum number of sessions with one peer; the oldest ends first.
pub(crate) const MAX_SESSIONS: usize = 4;

/// A public key of a peer.
pub(crate) struct PeerKey {
    pub(crate) public: PublicKey,
    /// MAC keys of messages addressed to this key.
    pub(crate) mac_keys: MacKeys,
    /// Timestamp of the last authentic initiation from this key.
    pub(crate) last_timestamp: Timestamp,
    /// Handshakes that this key may start.
    pub(crate) handshakes: TokenBucket,
}

impl PeerKey {
    fn new(public: &PublicKey) -> Self {
        let mac_keys = MacKeys::new(public);
        Self {
            public: *public,
            mac_keys,
            last_timestamp: Timestamp::default(),
            handshakes: TokenBucket::new(PER_KEY_RATE, Duration::ZERO),
        }
    }
}

/// A peer of the engine. A session that the peer initiated moves from `next` (unconfirmed) to
/// `current` and `previous`; a session that this node initiated begins as `current`. Data is
/// received in all of them.
pub(crate) struct Peer {
    pub(crate) id: PeerId,
    /// Public key of the peer, and a second one during a key rotation.
    pub(crate) keys: Vec<PeerKey>,
    pub(crate) view: PeerView,
    pub(crate) endpoints: Vec<SocketAddr>,
    /// Position of the endpoint for the next handshake, modulo the number of endpoints.
    pub(crate) attempt: usize,
    pub(crate) pending: Option<PendingHandshake>,
    /// Last cookie that the peer sent, and its time (monotonic clock).
    pub(crate) cookie: Option<(Mac, Duration)>,
    /// Time of the last initiation of this node (monotonic clock).
    pub(crate) last_initiation: Option<Duration>,
    /// Time at which a handshake of this node first yielded to one of the peer's since an endpoint
    /// was last proved.
    deferred: Option<Duration>,
    /// Time of the last request for a session (monotonic clock).
    pub(crate) requested: Option<Duration>,
    /// Time of the last handshake that a datagram of an unknown session caused (monotonic clock).
    pub(crate) unknown: Option<Duration>,
    pub(crate) no_common_cipher: bool,
    pub(crate) live: Liveness,
    /// Last address at which the peer answered a handshake, and the time of that answer: the proof
    /// that the peer receives there.
    proven: Option<(SocketAddr, Duration)>,
    path: PathMtu,
    /// Destination to which `path` applies.
    path_to: Option<SocketAddr>,
    current: Option<SessionEntry>,
    next: Option<SessionEntry>,
    /// Earlier sessions, the oldest first.
    previous: Vec<SessionEntry>,
}

impl Peer {
    pub(crate) fn new(id: PeerId, public_key: PublicKey) -> Self {
        Self {
            id,
            keys: vec![PeerKey::new(&public_key)],
            view: PeerView {
                public_key,
                endpoint: None,
                current: None,
                next: None,
                receive: Vec::new(),
                state: PeerState::Idle,
                reason: None,
                round_trip: None,
                last_received: None,
                mtu: None,
                path_mtu: None,
            },
            endpoints: Vec::new(),
            attempt: 0,
            pending: None,
            cookie: None,
            last_initiation: None,
            deferred: None,
            requested: None,
            unknown: None,
            no_common_cipher: false,
            live: Liveness::default(),
            proven: None,
            path: PathMtu::new(),
            path_to: None,
            current: None,
            next: None,
            previous: Vec::new(),
        }
    }

    /// Returns the public keys of the peer, the first one of its record first.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &PublicKey> {
        self.keys.iter().map(|key| &key.public)
    }

    pub(crate) fn key(&mut self, public: &PublicKey) -> Option<&mut PeerKey> {
        self.keys.iter_mut().find(|key| key.public == *public)
    }

    /// Returns true if this node sends to the peer in a session that was made with this key of this
    /// node.
    pub(crate) fn uses(&self, own: &PublicKey) -> bool {
        self.current.as_ref().is_some_and(|entry| entry.own.as_ref() == Some(own))
    }

    /// Replaces the keys of the peer. Sessions and handshakes of other keys end.
    pub(crate) fn set_keys(&mut self, keys: &[PublicKey], shared: &mut Shared) {
        if self.keys().eq(keys) {
            return;
        }
        let mut before = std::mem::take(&mut self.keys);
        let taken = keys.iter().map(|key| {
            let known = before.iter().position(|known| known.public == *key);
            known.map_or_else(|| PeerKey::new(key), |at| before.swap_remove(at))
        });
        self.keys = taken.collect();
        if let Some(first) = keys.first() {
            self.view.public_key = *first;
        }
        if self.pending_key().is_some_and(|key| !keys.contains(key)) {
            self.abandon_handshake(shared);
        }
        self.end_where(|entry| !keys.contains(&entry.remote), shared);
        shared.changed = true;
    }

    /// Installs a session that this node initiated; the peer already has it. `yields` says that
    /// both nodes have initiated at the same time and that the peer's session wins if the peer
    /// confirms it.
    pub(crate) fn install_current(
        &mut self,
        now: Time,
        entry: SessionEntry,
        yields: bool,
        shared: &mut Shared,
    ) {
        self.previous.extend(self.current.take());
        if !yields {
            self.previous.extend(self.next.take());
        }
        self.make_current(now, entry, shared);
        // The peer sends nothing in this session before it has received a datagram in it.
        self.ping(now, shared);
    }

    /// Installs a session that the peer initiated. The peer may not have the response yet.
    pub(crate) fn install_next(&mut self, now: Time, entry: SessionEntry, shared: &mut Shared) {
        // A lane has confirmed the session before, so this node must not return to an older one.
        if self.next.as_ref().is_some_and(|next| next.session.is_confirmed()) {
            self.confirm_next(now, shared);
        }
        self.previous.extend(self.next.take());
        self.next = Some(entry);
        self.sessions_changed(shared);
    }

    fn confirm_next(&mut self, now: Time, shared: &mut Shared) {
        let Some(entry) = self.next.take() else { return };
        self.previous.extend(self.current.take());
        shared.counts.add(HandshakeResult::CompletedResponder);
        // If the session proves no endpoint of the record, a handshake of this node must prove one.
        if self.known_of(&entry).is_some() {
            self.abandon_handshake(shared);
        }
        self.make_current(now, entry, shared);
    }

    fn make_current(&mut self, now: Time, entry: SessionEntry, shared: &mut Shared) {
        if let Some(endpoint) = self.known_of(&entry) {
            self.proven = Some((endpoint, entry.session.established.mono));
            self.deferred = None;
            let there = self.endpoints.iter().position(|e| Some(*e) == entry.endpoint);
            self.attempt = there.unwrap_or(self.attempt);
        }
        self.current = Some(entry);
        self.requested = None;
        self.no_common_cipher = false;
        self.live.on_session(now.mono);
        self.update_endpoint(now.mono, shared);
        self.start_path_mtu_discovery(now, shared);
        self.sessions_changed(shared);
        if self.view.endpoint.is_none_or(|to| !self.endpoints.contains(&to)) {
            self.prove_endpoint(now, shared);
        }
    }

    /// Restores a session of an earlier process; [`Peer::choose_current`] chooses the session to
    /// send with afterwards. Returns false if the session is invalid or its index is in use.
    pub(crate) fn restore(
        &mut self,
        saved: SavedSession,
        slot: Box<dyn SessionSlot>,
        established: Time,
        shared: &mut Shared,
    ) -> bool {
        let (index, endpoint, mtu) = (saved.local_index, saved.endpoint, saved.mtu);
        let timestamp = saved.timestamp;
        let session = Session::new(SessionParams {
            peer: self.id,
            local_index: index,
            remote_index: saved.remote_index,
            cipher: saved.cipher,
            local_lanes: saved.local_lanes,
            remote_lanes: saved.remote_lanes,
            established,
            initiator: saved.initiator,
            epoch: saved.epoch,
            ecn: saved.ecn && shared.params.ecn,
            secrets: saved.secrets,
        });
        let Ok(session) = session else { return false };
        if !shared.claim_index(index, self.id) {
            return false;
        }
        self.view.mtu = Some(mtu);
        // Earlier releases did not store this value.
        let told_mtu = if saved.told_mtu == 0 { shared.params.mtu } else { saved.told_mtu };
        if let Some(key) = self.key(&saved.public_key) {
            key.last_timestamp = key.last_timestamp.max(timestamp);
        }
        self.previous.push(SessionEntry::new(
            session.with_slot(Some(slot)),
            endpoint,
            saved.public_key,
            None,
            told_mtu,
        ));
        true
    }

    /// Chooses the session to send with from the restored ones: the newest that the peer is known
    /// to have.
    pub(crate) fn choose_current(&mut self, now: Time, shared: &mut Shared) {
        self.previous.sort_by_key(|entry| entry.session.established);
        let confirmed = self.previous.iter().rposition(|entry| entry.session.is_confirmed());
        self.next = match self.previous.len() {
            0 => None,
            all if confirmed == Some(all - 1) => None,
            _ => self.previous.pop(),
        };
        match confirmed {
            Some(at) => {
                let entry = self.previous.remove(at);
                self.make_current(now, entry, shared);
            }
            None => self.sessions_changed(shared),
        }
        self.refresh_state(now);
    }

    /// Updates the view after a change of the sessions, and ends the oldest sessions beyond
    /// [`MAX_SESSIONS`].
    fn sessions_changed(&mut self, shared: &mut Shared) {
        let in_use = usize::from(self.current.is_some()) + usize::from(self.next.is_some());
        let excess = (in_use + self.previous.len()).saturating_sub(MAX_SESSIONS);
        self.previous.drain(..excess).for_each(|entry| entry.end(shared));
        self.view.current = self.current.as_ref().map(|entry| entry.session.clone());
        let next = self.next.as_ref();
        let present = self.view.endpoint.filter(|_| self.current.is_some());
        self.view.next = next.map(|entry| NextSession {
            session: entry.session.clone(),
            endpoint: self.known_of(entry).or(present),
        });
        self.view.receive = self.entries().map(|entry| entry.session.clone()).collect();
        shared.changed = true;
    }

    fn entries(&self) -> impl Iterator<Item = &SessionEntry> {
        self.current.iter().chain(&self.next).chain(&self.previous)
    }

    fn entries_mut(&mut self) -> impl Iterator<Item = &mut SessionEntry> {
        self.current.iter_mut().chain(&mut self.next).chain(&mut self.previous)
    }

    pub(crate) fn has_current(&self) -> bool {
        self.current.is_some()
    }

    pub(crate) fn has_sessions(&self) -> bool {
        self.entries().next().is_some()
    }

    /// Returns true if there is a session to send with, and an address to send to.
    pub(crate) fn can_send(&self) -> bool {
        self.view.current.is_some() && self.view.endpoint.is_some()
    }

    /// Ends the pending handshake and all sessions.
    pub(crate) fn end(&mut self, shared: &mut Shared) {
        self.abandon_handshake(shared);
        let entries = [self.current.take(), self.next.take()].into_iter().flatten();
        entries.chain(self.previous.drain(..)).for_each(|entry| entry.end(shared));
        self.sessions_changed(shared);
    }

    fn end_expired_sessions(&mut self, now: Time, shared: &mut Shared) {
        self.end_where(|entry| entry.ends() <= now.mono, shared);
    }

    fn end_where(&mut self, over: impl Fn(&SessionEntry) -> bool, shared: &mut Shared) {
        let over = |entry: &mut SessionEntry| over(entry);
        let ended: Vec<SessionEntry> = self
            .previous
            .extract_if(.., over)
            .chain(self.current.take_if(over))
            .chain(self.next.take_if(over))
            .collect();
        if !ended.is_empty() {
            ended.into_iter().for_each(|entry| entry.end(shared));
            self.sessions_changed(shared);
        }
    }

    /// Starts a handshake unless one is pending, or unless the peer has just initiated a session
    /// that it has to confirm.
    pub(crate) fn begin_handshake(&mut self, now: Time, shared: &mut Shared) {
        let fresh = |entry: &SessionEntry| now.since(entry.session.established) < CONFIRM_TIMEOUT;
        let gives_way = self.next.as_ref().is_some_and(fresh) && self.defers(now);
        if self.pending.is_none() && !gives_way {
            self.start_handshake(now, shared);
        }
    }

    /// Returns true while a handshake of this node yields to one of the peer's: for
    /// [`CONFIRM_TIMEOUT`], and only once until a session has proved an endpoint. A recorded
    /// initiation is indistinguishable from a new one of the peer, and may be repeated.
    pub(crate) fn defers(&mut self, now: Time) -> bool {
        let since = *self.deferred.get_or_insert(now.mono);
        now.mono.saturating_sub(since) < CONFIRM_TIMEOUT
    }

    /// Brings the view's state up to date.
    pub(crate) fn refresh_state(&mut self, now: Time) {
        let unanswered = self.pending.as_ref().is_some_and(|p| p.is_unanswered(now.mono));
        let sends_with = self.current.as_ref().filter(|_| self.view.endpoint.is_some());
        let (state, reason) = match (sends_with, &self.pending) {
            (Some(_), _) => match self.live.unreachable_reason(now.mono) {
                Some(reason) => (PeerState::Unreachable, Some(reason)),
                None => (PeerState::Established, None),
            },
            (None, Some(_)) if unanswered => {
                (PeerState::Unreachable, Some(UnreachableReason::NoAnswer))
            }
            (None, Some(_)) => (PeerState::Connecting, None),
            (None, None) if self.next.is_some() => (PeerState::Connecting, None),
            (None, None) if self.endpoints.is_empty() => {
                (PeerState::Idle, Some(UnreachableReason::NoEndpoint))
            }
            (None, None) => (PeerState::Idle, None),
        };
        let no_cipher = self.current.is_none() && self.no_common_cipher;
        self.view.state = state;
        self.view.reason = if no_cipher { Some(UnreachableReason::NoCommonCipher) } else { reason };
        self.view.round_trip = self.live.round_trip;
        self.view.last_received = self.live.last_received;
    }
}
