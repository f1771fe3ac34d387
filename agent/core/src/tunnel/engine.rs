//! The protocol engine: handshakes, sessions and liveness of all peers, without sockets and clocks.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use crate::drop::DropCounts;
use crate::keys::{PrivateKey, PublicKey};
use crate::route::PeerId;
use crate::time::Time;
use crate::tunnel::cookie::CookieSecret;
use crate::tunnel::counts::HandshakeResult;
use crate::tunnel::handshake_filter::HandshakeFilter;
use crate::tunnel::message::{Timestamp, TransportParams};
use crate::tunnel::noise::Identity;
use crate::tunnel::peer::{Peer, PeerView};
use crate::tunnel::rate_limit::{PerSourceLimiter, Rate, TokenBucket};
use crate::tunnel::shared::{LocalIdentity, Random, Shared, Transmit};
use crate::tunnel::timers::{TICK_INTERVAL, UNKNOWN_SESSION_INTERVAL, UNKNOWN_SESSION_SILENT_TIME};
use crate::wire::header::MAX_LANES;

mod config;
mod datagram;
mod restore;

pub use config::{EngineConfig, EngineError, PeerConfig};

/// Rate limit of initiations without a valid cookie and of responses beyond the first of each
/// initiation, all sources together. Above the limit the node answers initiations with a cookie
/// reply (WireGuard paper, section 5.4.7).
const NO_COOKIE_RATE: Rate = Rate { per_second: 64, burst: 64 };
/// Rate limit of initiations with a cookie, for each source address or endpoint of a peer.
const PER_SOURCE_RATE: Rate = Rate { per_second: 8, burst: 16 };
/// Rate limit of initiations with a cookie from addresses that are no peer's endpoint, all
/// together, because one sender may receive at very many addresses.
const NON_PEER_RATE: Rate = Rate { per_second: 64, burst: 64 };
/// Rate limit of handshakes that one key of a peer starts. Each makes new tables for the lanes, and
/// may change the path MTU.
pub(super) const PER_KEY_RATE: Rate = Rate { per_second: 1, burst: 8 };
/// Maximum number of peer endpoints with a token bucket of their own, and of keys without a peer
/// whose timestamps are remembered.
const MAX_PEERS: usize = 65_536;
/// Maximum number of source addresses with a token bucket of their own.
const MAX_SOURCES: usize = 4096;

/// The protocol engine of one node.
///
/// # Contract
///
/// The engine has no socket, no clock and no thread. The caller owns these:
///
/// - Input: [`Engine::handle_datagram`] for each received datagram that is not data,
///   [`Engine::handle_timeout`] when [`Engine::poll_timeout`] is due, [`Engine::request_session`]
///   when a packet waits for a session, and [`Engine::on_unknown_session`] and
///   [`Engine::on_send_too_big`] for events of the lanes. Each call gets the current time; `mono`
///   must never decrease.
/// - Output, after each input and each change of the configuration, in this order: if
///   [`Engine::poll_tables_changed`] returns true, the caller gives the new [`Engine::tables`] to
///   the lanes. Then it sends the datagrams of [`Engine::poll_transmit`] until there is none. With
///   the opposite order the peer's answer to a response could arrive before a lane knows its
///   session. Finally it reads [`Engine::poll_timeout`].
/// - Data: the caller seals packets with [`PeerView::current`], or with [`PeerView::next`] once it
///   is confirmed, and opens datagrams with the session of [`PeerView::receive`] whose
///   `local_index` the header names. It checks a replay window for each session and lane, calls
///   [`Session::confirm`](crate::tunnel::Session::confirm) after the first authentic datagram, and
///   adds to [`Session::traffic`](crate::tunnel::Session::traffic), from which the engine learns
///   that a session is in use.
///
/// The engine promises that memory is bounded whatever datagrams arrive, that no datagram makes it
/// panic, that no answer is longer than the message that it answers, and that data has no
/// destination at which the peer has not answered a handshake.
///
/// The [crate documentation](crate) has an example with two engines.
pub struct Engine {
    shared: Shared,
    peers: BTreeMap<PeerId, Peer>,
    by_key: BTreeMap<PublicKey, PeerId>,
    by_address: BTreeMap<IpAddr, BTreeSet<PeerId>>,
    next_id: u32,
    /// Timestamps of keys that belong to no peer ([`Engine::raise_seen_timestamp`]).
    unclaimed: BTreeMap<PublicKey, Timestamp>,
    /// First bytes of the prologue: protocol version and cluster id.
    prologue: Vec<u8>,
    cookies: CookieSecret,
    no_cookie_bucket: TokenBucket,
    /// Limiter of initiations with a cookie from endpoints of peers.
    peer_endpoint_limiter: PerSourceLimiter,
    source_limiter: PerSourceLimiter,
    non_peer_bucket: TokenBucket,
    next_tick: Option<Duration>,
}

impl Engine {
    /// Creates an engine without peers. `random` must be cryptographically secure, because
    /// ephemeral keys and cookies are made from its bytes.
    ///
    /// # Errors
    /// [`EngineError::Lanes`], [`EngineError::ListenPort`], [`EngineError::NoCipher`] or
    /// [`EngineError::PrivateKey`] if that value of `config` is invalid.
    pub fn new(config: EngineConfig, random: Random) -> Result<Engine, EngineError> {
        let EngineConfig { private_key, cluster_id, listen_port, lanes, ciphers, mtu, ecn } =
            config;
        if lanes == 0 || usize::from(lanes) > MAX_LANES {
            return Err(EngineError::Lanes(lanes));
        }
        if listen_port == 0 {
            return Err(EngineError::ListenPort);
        }
        if ciphers.choose(ciphers).is_none() {
            return Err(EngineError::NoCipher);
        }
        let prologue = [b"skein v1", cluster_id.as_bytes()].concat();
        let own = identity(private_key, &prologue)?;
        let params = TransportParams { lanes, ciphers, mtu, ecn };
        Ok(Engine {
            shared: Shared::new(own, params, listen_port, random),
            peers: BTreeMap::new(),
            by_key: BTreeMap::new(),
            by_address: BTreeMap::new(),
            next_id: 0,
            unclaimed: BTreeMap::new(),
            prologue,
            cookies: CookieSecret::default(),
            no_cookie_bucket: TokenBucket::new(NO_COOKIE_RATE, Duration::ZERO),
            peer_endpoint_limiter: PerSourceLimiter::per_endpoint(PER_SOURCE_RATE, MAX_PEERS),
            source_limiter: PerSourceLimiter::new(PER_SOURCE_RATE, MAX_SOURCES),
            non_peer_bucket: TokenBucket::new(NON_PEER_RATE, Duration::ZERO),
            next_tick: None,
        })
    }

    /// Returns the public key of the active identity.
    pub fn public_key(&self) -> PublicKey {
        *self.shared.own.public()
    }

    /// Changes the identity of this node. New handshakes begin with `private_key`; those addressed
    /// to the public key of `second` are answered, too. Sessions stay; sessions in use that another
    /// key made are renewed within seconds.
    ///
    /// # Errors
    /// [`EngineError::PrivateKey`] if a key is invalid. The identity is unchanged then.
    pub fn set_identity(
        &mut self,
        private_key: PrivateKey,
        second: Option<PrivateKey>,
    ) -> Result<(), EngineError> {
        let own = identity(private_key, &self.prologue)?;
        let second = second.map(|key| identity(key, &self.prologue)).transpose()?;
        (self.shared.own, self.shared.second) = (own, second);
        self.shared.changed = true;
        Ok(())
    }

    /// Changes the MTU of this node, inner bytes. Sessions stay. Peers with a session learn the MTU
    /// from a new handshake within seconds, the others from their next handshake.
    pub fn set_mtu(&mut self, now: Time, mtu: u16) {
        if self.shared.params.mtu == mtu {
            return;
        }
        self.shared.params.mtu = mtu;
        self.shared.changed = true;
        for peer in self.peers.values_mut() {
            peer.on_own_mtu(now, &mut self.shared);
        }
    }

    /// Adds a peer, or changes its keys and endpoints at once. A peer that keeps one of its keys
    /// keeps its [`PeerId`] and the sessions of that key; sessions of removed keys end. A key that
    /// another peer had is taken from that peer.
    pub fn upsert_peer(&mut self, now: Time, peer: PeerConfig) -> PeerId {
        let PeerConfig { public_key, second_key, endpoints } = peer;
        let second_key = second_key.filter(|key| *key != public_key);
        let keys: Vec<_> = std::iter::once(public_key).chain(second_key).collect();
        let known = keys.iter().find_map(|key| self.by_key.get(key).copied());
        let id = known.unwrap_or_else(|| {
            let id = PeerId(self.next_id);
            self.next_id += 1;
            self.shared.changed = true;
            self.peers.insert(id, Peer::new(id, public_key));
            id
        });
        for key in &keys {
            if let Some(other) = self.by_key.insert(*key, id).filter(|other| *other != id) {
                self.take_key(other, key);
            }
        }
        if let Some(peer) = self.peers.get_mut(&id) {
            for given_up in peer.keys.iter().filter(|key| !keys.contains(&key.public)) {
                self.by_key.remove(&given_up.public);
                remember(&mut self.unclaimed, &given_up.public, given_up.last_timestamp);
                self.shared.store.set_seen_timestamp(&given_up.public, Duration::ZERO);
            }
            peer.set_keys(&keys, &mut self.shared);
            for key in &mut peer.keys {
                let seen = Timestamp::new(self.shared.store.seen_timestamp(&key.public));
                key.last_timestamp = key.last_timestamp.max(seen);
                let raised = self.unclaimed.remove(&key.public);
                if let Some(raised) = raised.filter(|raised| *raised > key.last_timestamp) {
                    key.last_timestamp = raised;
                    self.shared.store.set_seen_timestamp(&key.public, raised.wall());
                }
            }
            forget_addresses(&mut self.by_address, peer);
            peer.set_endpoints(now, endpoints, &mut self.shared);
            peer.refresh_state(now);
            for endpoint in &peer.endpoints {
                self.by_address.entry(endpoint.ip().to_canonical()).or_default().insert(id);
            }
        }
        id
    }

    /// Removes a key from a peer, because another peer has got it. Removes the peer after its last
    /// key.
    fn take_key(&mut self, id: PeerId, key: &PublicKey) {
        let Some(peer) = self.peers.get_mut(&id) else { return };
        if let Some(taken) = peer.key(key) {
            remember(&mut self.unclaimed, key, taken.last_timestamp);
        }
        let rest: Vec<_> = peer.keys().filter(|other| *other != key).copied().collect();
        match rest.is_empty() {
            true => self.remove_peer(id),
            false => peer.set_keys(&rest, &mut self.shared),
        }
    }

    /// Removes a peer and ends its sessions at once.
    pub fn remove_peer(&mut self, id: PeerId) {
        let Some(mut peer) = self.peers.remove(&id) else { return };
        for key in &peer.keys {
            if self.by_key.get(&key.public) == Some(&id) {
                self.by_key.remove(&key.public);
                remember(&mut self.unclaimed, &key.public, key.last_timestamp);
                self.shared.store.set_seen_timestamp(&key.public, Duration::ZERO);
            }
        }
        forget_addresses(&mut self.by_address, &peer);
        peer.end(&mut self.shared);
        self.shared.changed = true;
    }

    /// Ends all sessions and all pending handshakes of this node. New sessions are created when
    /// lanes request them. Call this method if another process may continue with the same keys and
    /// counters, for example after the virtual machine was cloned or restored.
    pub fn end_sessions(&mut self, now: Time) {
        // The queued datagrams are sealed with the ended sessions.
        self.shared.outbox.clear();
        for peer in self.peers.values_mut() {
            peer.end(&mut self.shared);
            peer.refresh_state(now);
        }
    }

    /// Returns the number of peers to which this node sends in a session of the second identity.
    /// These peers may not know the active identity.
    pub fn peers_on_second_identity(&self) -> usize {
        let Some(second) = &self.shared.second else { return 0 };
        self.peers.values().filter(|peer| peer.uses(second.public())).count()
    }

    /// Returns the peer that has this public key.
    pub fn peer_id(&self, key: &PublicKey) -> Option<PeerId> {
        self.by_key.get(key).copied()
    }

    /// Requests a session with `peer`. Starts a handshake unless one is pending or the peer has
    /// just started one. Retries stop 15 s after the last call, so the caller repeats the call
    /// while packets wait. Has no effect if the peer is unknown or has a current session.
    pub fn request_session(&mut self, now: Time, peer: PeerId) {
        let Some(peer) = self.peers.get_mut(&peer) else { return };
        if !peer.can_send() {
            peer.requested = Some(now.mono);
            peer.begin_handshake(now, &mut self.shared);
            peer.refresh_state(now);
        }
    }

    /// Handles a data or control datagram of an unknown session from this address. A peer with an
    /// endpoint at the address may not know that this node has restarted, so the engine starts a
    /// handshake with it: at most one every 2 s, and none if the peer was heard within 10 s. The
    /// source may be spoofed, so the initiation is not repeated.
    pub fn on_unknown_session(&mut self, now: Time, source: IpAddr) {
        let source = source.to_canonical();
        for id in self.by_address.get(&source).into_iter().flatten() {
            let Some(peer) = self.peers.get_mut(id) else { continue };
            let within =
                |at: Option<Duration>, by| at.is_some_and(|t| now.mono.saturating_sub(t) < by);
            let heard = peer.view.current.is_some()
                && within(peer.live.last_received, UNKNOWN_SESSION_SILENT_TIME);
            if heard || within(peer.unknown, UNKNOWN_SESSION_INTERVAL) {
                continue;
            }
            peer.unknown = Some(now.mono);
            let there = peer.endpoints.iter().position(|e| e.ip().to_canonical() == source);
            if peer.pending.is_none() {
                peer.attempt = there.unwrap_or(peer.attempt);
            }
            peer.begin_handshake(now, &mut self.shared);
            peer.refresh_state(now);
        }
    }

    /// Handles a datagram that this host's route to `destination` refused as too long. `size` is
    /// the length of its plaintext in bytes, `fits` the longest plaintext that the route carries,
    /// if known. Reduces the path MTU of the peers at `destination` at once
    /// ([`PeerView::path_mtu`]). Returns whether a path MTU was reduced.
    pub fn on_send_too_big(
        &mut self,
        now: Time,
        destination: SocketAddr,
        size: u16,
        fits: Option<u16>,
    ) -> bool {
        let mut narrower = false;
        for peer in self.peers.values_mut() {
            narrower |= peer.on_send_too_big(now, destination, size, fits, &mut self.shared);
        }
        narrower
    }

    /// Returns the next datagram to send.
    pub fn poll_transmit(&mut self) -> Option<Transmit> {
        self.shared.outbox.pop_front()
    }

    /// Returns the time of the next call of [`Engine::handle_timeout`]; only `mono` is set. `None`
    /// if no deadline is pending.
    pub fn poll_timeout(&self) -> Option<Time> {
        self.shared.timeout().map(|mono| Time { mono, ..Time::default() })
    }

    /// Handles all deadlines that have passed. A call that is too early or too late does no harm.
    pub fn handle_timeout(&mut self, now: Time) {
        if self.shared.timeout().is_none_or(|at| at > now.mono) {
            return;
        }
        let tick = self.next_tick.is_some_and(|at| at <= now.mono);
        if tick {
            self.next_tick = None;
        }
        self.shared.disarm();
        for peer in self.peers.values_mut() {
            peer.on_time(now, tick, &mut self.shared);
        }
        for deadline in self.peers.values().filter_map(Peer::deadline) {
            self.shared.arm(deadline);
        }
        self.arm_tick(now);
    }

    fn arm_tick(&mut self, now: Time) {
        if self.next_tick.is_none() && self.peers.values().any(Peer::has_sessions) {
            self.next_tick = Some(now.mono + TICK_INTERVAL);
        }
        if let Some(at) = self.next_tick {
            self.shared.arm(at);
        }
    }

    /// Returns true if sessions, endpoints, peers or the identity have changed since the last call.
    /// The lanes need new tables and a new [`Engine::handshake_filter`] then.
    pub fn poll_tables_changed(&mut self) -> bool {
        std::mem::take(&mut self.shared.changed)
    }

    /// Returns the check that a handshake message must pass before it is worth a call of
    /// [`Engine::handle_datagram`], which repeats the check.
    pub fn handshake_filter(&self) -> HandshakeFilter {
        HandshakeFilter::new(self.shared.identities().map(|own| Arc::clone(&own.mac_keys)))
    }

    /// Returns all peers in the order of their [`PeerId`].
    pub fn tables(&self) -> impl Iterator<Item = (PeerId, &PeerView)> {
        self.peers.iter().map(|(&id, peer)| (id, &peer.view))
    }

    /// Returns one peer.
    pub fn peer(&self, id: PeerId) -> Option<&PeerView> {
        self.peers.get(&id).map(|peer| &peer.view)
    }

    /// Returns the counters of datagrams that the engine has dropped. The caller may drain them.
    pub fn drops(&mut self) -> &mut DropCounts {
        &mut self.shared.drops
    }

    /// Returns the number of handshakes by result, including results with zero.
    pub fn handshakes(&self) -> impl Iterator<Item = (HandshakeResult, u64)> + '_ {
        let counts = &self.shared.counts;
        HandshakeResult::ALL.iter().map(|&result| (result, counts.get(result)))
    }

    /// Returns the number of handshakes with this result.
    pub fn handshake_count(&self, result: HandshakeResult) -> u64 {
        self.shared.counts.get(result)
    }
}

fn identity(private: PrivateKey, prologue: &[u8]) -> Result<LocalIdentity, EngineError> {
    let identity = Identity::new(private, prologue.to_vec()).ok_or(EngineError::PrivateKey)?;
    Ok(LocalIdentity::new(identity))
}

/// Keeps the timestamp of a key that belongs to no peer, because a record with this key may return.
fn remember(unclaimed: &mut BTreeMap<PublicKey, Timestamp>, key: &PublicKey, timestamp: Timestamp) {
    if unclaimed.len() < MAX_PEERS || unclaimed.contains_key(key) {
        let known = unclaimed.entry(*key).or_default();
        *known = timestamp.max(*known);
    }
}

fn forget_addresses(by_address: &mut BTreeMap<IpAddr, BTreeSet<PeerId>>, peer: &Peer) {
    for endpoint in &peer.endpoints {
        let address = endpoint.ip().to_canonical();
        if let Some(ids) = by_address.get_mut(&address) {
            ids.remove(&peer.id);
            if ids.is_empty() {
                by_address.remove(&address);
            }
        }
    }
}
