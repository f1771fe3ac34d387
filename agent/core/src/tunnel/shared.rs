//! What all peers of an engine use together: identity, randomness, indices, the queue of datagrams.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::time::Duration;

use zeroize::Zeroizing;

use crate::drop::DropCounts;
use crate::route::PeerId;
use crate::time::Time;
use crate::tunnel::cookie::MacKeys;
use crate::tunnel::counts::HandshakeCounts;
use crate::tunnel::message::{Timestamp, TransportParams};
use crate::tunnel::noise::{Identity, KEY_LEN, Secret};
use crate::tunnel::saved::{Memory, NoopStore};

/// Datagrams that wait to be polled; beyond that they are lost, as on a wire.
const MAX_QUEUED_DATAGRAMS: usize = 8192;

/// A datagram for the caller to send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transmit {
    /// Where to.
    pub destination: SocketAddr,
    /// The UDP payload.
    pub payload: Vec<u8>,
}

/// A source of random bytes that nobody can guess.
pub type Random = Box<dyn FnMut(&mut [u8]) + Send>;

/// An identity of this node, and what messages to it are checked by.
pub(crate) struct LocalIdentity {
    pub(crate) identity: Identity,
    pub(crate) mac_keys: MacKeys,
}

impl LocalIdentity {
    pub(crate) fn new(identity: Identity) -> Self {
        let mac_keys = MacKeys::new(identity.public());
        Self { identity, mac_keys }
    }

    pub(crate) fn public(&self) -> &[u8; KEY_LEN] {
        self.identity.public()
    }
}

pub(crate) struct Shared {
    /// What this node's handshakes begin with.
    pub(crate) own: LocalIdentity,
    /// The next identity or the one before, while the key changes: answered to as well.
    pub(crate) second: Option<LocalIdentity>,
    pub(crate) params: TransportParams,
    pub(crate) listen_port: u16,
    pub(crate) random: Random,
    pub(crate) memory: Box<dyn Memory>,
    pub(crate) outbox: VecDeque<Transmit>,
    pub(crate) drops: DropCounts,
    pub(crate) counts: HandshakeCounts,
    /// Whether what lanes need has changed since they were told.
    pub(crate) changed: bool,
    /// Owner of every local index in use, of a session or of a handshake under way.
    indices: BTreeMap<u32, PeerId>,
    last_timestamp: Duration,
    /// The earliest moment at which anything is to be done, at or after the true one.
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
            memory: Box::new(NoopStore),
            outbox: VecDeque::new(),
            drops: DropCounts::default(),
            counts: HandshakeCounts::default(),
            changed: false,
            indices: BTreeMap::new(),
            last_timestamp: Duration::ZERO,
            timeout: None,
        }
    }

    /// Every identity of this node, the first one first.
    pub(crate) fn identities(&self) -> impl Iterator<Item = &LocalIdentity> {
        std::iter::once(&self.own).chain(&self.second)
    }

    pub(crate) fn transmit(&mut self, destination: SocketAddr, payload: Vec<u8>) {
        if self.outbox.len() < MAX_QUEUED_DATAGRAMS {
            self.outbox.push_back(Transmit { destination, payload });
        }
    }

    /// A new index, owned by `peer` until it is freed.
    pub(crate) fn allocate_index(&mut self, peer: PeerId) -> u32 {
        let mut bytes = [0; 4];
        (self.random)(&mut bytes);
        // Counting on from there terminates even where the random source is stuck.
        let mut index = u32::from_ne_bytes(bytes);
        while index == 0 || self.indices.contains_key(&index) {
            index = index.wrapping_add(1);
        }
        self.indices.insert(index, peer);
        index
    }

    /// An index that was allocated in a life before; `false` where it is taken.
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
        let mut secret = Zeroizing::new([0; 32]);
        (self.random)(secret.as_mut());
        secret
    }

    /// Up to a quarter of `base`.
    pub(crate) fn jitter(&mut self, base: Duration) -> Duration {
        let mut bytes = [0; 2];
        (self.random)(&mut bytes);
        base / 4 * u32::from(u16::from_ne_bytes(bytes)) / u32::from(u16::MAX)
    }

    /// True once in `n` calls, in the mean.
    pub(crate) fn chance(&mut self, n: u8) -> bool {
        let mut byte = [0];
        (self.random)(&mut byte);
        byte[0] % n == 0
    }

    /// The wall clock, or later: a peer takes no timestamp twice and none that goes back.
    pub(crate) fn timestamp(&mut self, now: Time) -> Timestamp {
        self.last_timestamp = now.wall.max(self.last_timestamp + Duration::from_nanos(1));
        self.memory.set_latest_timestamp(self.last_timestamp);
        Timestamp::new(self.last_timestamp)
    }

    /// Timestamps are later than this from now on.
    pub(crate) fn raise_timestamps(&mut self, floor: Duration) {
        self.last_timestamp = self.last_timestamp.max(floor);
    }

    /// Makes sure that the engine is called at `at`.
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
