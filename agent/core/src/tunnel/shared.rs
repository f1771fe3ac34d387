//! State that all peers of an engine share: identities, randomness, local indices, timer, queue of
//! datagrams.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::drop::DropCounts;
use crate::keys::PublicKey;
use crate::route::PeerId;
use crate::time::Time;
use crate::tunnel::cookie::MacKeys;
use crate::tunnel::counts::HandshakeCounts;
use crate::tunnel::message::{Timestamp, TransportParams};
use crate::tunnel::noise::{Identity, Secret};
use crate::tunnel::saved::{NoopStore, SessionStore};

/// Maximum number of queued datagrams. Further ones are discarded, as a network would.
const MAX_QUEUED_DATAGRAMS: usize = 8192;

/// A datagram that the caller must send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transmit {
    /// Underlay address and UDP port of the receiver.
    pub destination: SocketAddr,
    /// UDP payload.
    pub payload: Vec<u8>,
}

/// Cryptographically secure random source. It fills the whole slice.
pub type Random = Box<dyn FnMut(&mut [u8]) + Send>;

/// Key pair of this node, and the MAC keys of messages addressed to it.
pub(crate) struct LocalIdentity {
    pub(crate) identity: Identity,
    pub(crate) mac_keys: Arc<MacKeys>,
}

impl LocalIdentity {
    pub(crate) fn new(identity: Identity) -> Self {
        let mac_keys = Arc::new(MacKeys::new(identity.public()));
        Self { identity, mac_keys }
    }

    pub(crate) fn public(&self) -> &PublicKey {
        self.identity.public()
    }
}

/// State of an engine without its peers.
pub(crate) struct Shared {
    /// Identity with which this node's handshakes begin.
    pub(crate) own: LocalIdentity,
    /// Next or previous identity during a key rotation. Handshakes addressed to it are answered.
    pub(crate) second: Option<LocalIdentity>,
    pub(crate) params: TransportParams,
    pub(crate) listen_port: u16,
    pub(crate) random: Random,
    pub(crate) store: Box<dyn SessionStore>,
    pub(crate) outbox: VecDeque<Transmit>,
    pub(crate) drops: DropCounts,
    pub(crate) counts: HandshakeCounts,
    /// True if the forwarding tables have changed since they were last read.
    pub(crate) changed: bool,
    /// Peer of each local index in use by a session or a pending handshake.
    indices: BTreeMap<u32, PeerId>,
    last_timestamp: Duration,
    /// Time of the next call of [`Engine::handle_timeout`](crate::Engine::handle_timeout)
    /// (monotonic clock), at or before the earliest deadline.
    timeout: Option<Duration>,
}

impl Shared {
    pub(crate) fn new(
        own: LocalIdentity,
        params: TransportParams,
        listen_port: u16,
        random: Random,
    ) -> Self {
        Self {
            own,
            second: None,
            params,
            listen_port,
            random,
            store: Box::new(NoopStore),
            outbox: VecDeque::new(),
            drops: DropCounts::default(),
            counts: HandshakeCounts::default(),
            changed: false,
            indices: BTreeMap::new(),
            last_timestamp: Duration::ZERO,
            timeout: None,
        }
    }

    /// Returns the identities of this node, the active one first.
    pub(crate) fn identities(&self) -> impl Iterator<Item = &LocalIdentity> {
        std::iter::once(&self.own).chain(&self.second)
    }

    pub(crate) fn transmit(&mut self, destination: SocketAddr, payload: Vec<u8>) {
        if self.outbox.len() < MAX_QUEUED_DATAGRAMS {
            self.outbox.push_back(Transmit { destination, payload });
        }
    }

    /// Allocates a random local index for `peer`.
    pub(crate) fn allocate_index(&mut self, peer: PeerId) -> u32 {
        let mut bytes = [0; 4];
        (self.random)(&mut bytes);
        // Counting up from the random value terminates even if the random source always returns the
        // same value.
        let mut index = u32::from_ne_bytes(bytes);
        while index == 0 || self.indices.contains_key(&index) {
            index = index.wrapping_add(1);
        }
        self.indices.insert(index, peer);
        index
    }

    /// Allocates an index that an earlier process has used. Returns `false` if the index is in use.
    pub(crate) fn claim_index(&mut self, index: u32, peer: PeerId) -> bool {
        if index == 0 || self.indices.contains_key(&index) {
            return false;
        }
        self.indices.insert(index, peer);
        true
    }

    pub(crate) fn free_index(&mut self, index: u32) {
        self.indices.remove(&index);
    }

    pub(crate) fn owner(&self, index: u32) -> Option<PeerId> {
        self.indices.get(&index).copied()
    }

    pub(crate) fn secret(&mut self) -> Secret {
        let mut secret = Secret::default();
        (self.random)(secret.as_mut());
        secret
    }

    /// Returns a random time of up to a quarter of `base`.
    pub(crate) fn jitter(&mut self, base: Duration) -> Duration {
        let mut bytes = [0; 2];
        (self.random)(&mut bytes);
        base / 4 * u32::from(u16::from_ne_bytes(bytes)) / u32::from(u16::MAX)
    }

    /// Returns true with the probability 1 / `n`.
    pub(crate) fn chance(&mut self, n: u8) -> bool {
        let mut byte = [0];
        (self.random)(&mut byte);
        byte[0] % n == 0
    }

    /// Returns the timestamp of a new initiation: the wall-clock time, or a later time if a
    /// timestamp at or after it has been used. Peers accept no timestamp twice and none that is
    /// earlier.
    pub(crate) fn timestamp(&mut self, now: Time) -> Timestamp {
        self.last_timestamp = now.wall.max(self.last_timestamp + Duration::from_nanos(1));
        self.store.set_latest_timestamp(self.last_timestamp);
        Timestamp::new(self.last_timestamp)
    }

    /// Makes all further timestamps later than `floor`.
    pub(crate) fn raise_timestamps(&mut self, floor: Duration) {
        self.last_timestamp = self.last_timestamp.max(floor);
    }

    /// Sets the timeout to `at` unless an earlier one is set.
    pub(crate) fn arm(&mut self, at: Duration) {
        self.timeout = Some(self.timeout.map_or(at, |earlier| earlier.min(at)));
    }

    pub(crate) fn disarm(&mut self) {
        self.timeout = None;
    }

    pub(crate) fn timeout(&self) -> Option<Duration> {
        self.timeout
    }
}
