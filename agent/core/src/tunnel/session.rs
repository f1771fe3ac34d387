//! Transport sessions: per-lane AEAD keys and nonce counters, derived from a completed Noise
//! handshake. A session ends [`SESSION_LIFETIME`] (180 s) after the handshake.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crate::route::PeerId;
use crate::time::Time;
pub use crate::tunnel::cipher::{Cipher, Ciphers};
use crate::tunnel::lane_key::Derivation;
pub use crate::tunnel::lane_key::{Receiver, Sender};
pub use crate::tunnel::noise::TransportSecrets;
use crate::tunnel::saved::SessionSlot;
use crate::tunnel::timers::SESSION_LIFETIME;
use crate::wire::header::{CONTROL_LANE, MAX_LANES};

/// Number of nonce counters that a sender has in one process epoch
/// ([`DropReason::CounterExhausted`](crate::DropReason::CounterExhausted)): more than a lane uses
/// in the 180 s of a session at 20 million datagrams per second. The next epoch begins after them.
pub const COUNTER_LIMIT: u64 = 1 << 32;
/// Number of used counters at which the engine starts a new handshake: half of [`COUNTER_LIMIT`].
pub const COUNTER_REKEY: u64 = 1 << 31;

/// Parameters of a new [`Session`].
pub struct SessionParams {
    /// Peer at the other end.
    pub peer: PeerId,
    /// Index by which the peer addresses this session.
    pub local_index: u32,
    /// Index by which this node addresses the session at the peer.
    pub remote_index: u32,
    /// AEAD of the data.
    pub cipher: Cipher,
    /// Number of lanes on which this node sends, 1 to 64.
    pub local_lanes: u8,
    /// Number of lanes on which the peer sends, 1 to 64.
    pub remote_lanes: u8,
    /// Time of the handshake.
    pub established: Time,
    /// True if this node sent the initiation.
    pub initiator: bool,
    /// Process epoch of the session; 0 in the process that made it.
    pub epoch: u32,
    /// True if both nodes propagate the outer ECN field (RFC 6040).
    pub ecn: bool,
    /// Secrets that the handshake has yielded.
    pub secrets: TransportSecrets,
}

/// Error of [`Session::new`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// A number of lanes is not 1 to 64.
    #[error("{0} lanes: must be 1 to 64")]
    Lanes(u8),
    /// The epoch is too high: the session has been restored more often than there are counters.
    #[error("the nonce counters of the session are exhausted")]
    EpochsExhausted,
    /// The cryptographic library failed to derive a key.
    #[error("key derivation failed")]
    Derivation,
}

/// Keys and counters between this node and a peer, valid for at most 180 s.
///
/// All lanes share the session. It is immutable except for its counters. Each direction and lane
/// has its own key, so that lanes neither wait for each other nor share cache lines.
pub struct Session {
    /// Peer at the other end.
    pub peer: PeerId,
    /// Index by which the peer addresses this session.
    pub local_index: u32,
    /// Index by which this node addresses the session at the peer.
    pub remote_index: u32,
    /// AEAD of the data.
    pub cipher: Cipher,
    /// Number of lanes on which this node sends, 1 to 64.
    pub local_lanes: u8,
    /// Number of lanes on which the peer sends, 1 to 64.
    pub remote_lanes: u8,
    /// Time of the handshake.
    pub established: Time,
    /// True if this node sent the initiation.
    pub initiator: bool,
    /// True if both nodes propagate the outer ECN field (RFC 6040). Otherwise the outer field is
    /// Not-ECT, and is ignored on receipt.
    pub ecn: bool,
    senders: Box<[Sender]>,
    receivers: Box<[Receiver]>,
    control_sender: Sender,
    control_receiver: Receiver,
    traffic: Traffic,
    expired: AtomicBool,
    confirmed: AtomicBool,
    /// Slot in the store from which the next process restores the session.
    slot: Option<Box<dyn SessionSlot>>,
}

impl Session {
    /// Derives the keys of all lanes and of the control lane.
    ///
    /// # Errors
    /// [`SessionError::Lanes`] if a number of lanes is not 1 to 64,
    /// [`SessionError::EpochsExhausted`] if the epoch has no counters, [`SessionError::Derivation`]
    /// if the cryptographic library fails.
    pub fn new(params: SessionParams) -> Result<Session, SessionError> {
        for lanes in [params.local_lanes, params.remote_lanes] {
            if lanes == 0 || usize::from(lanes) > MAX_LANES {
                return Err(SessionError::Lanes(lanes));
            }
        }
        let forward = Derivation::new(&params.secrets.from_initiator, params.cipher, 0);
        let back = Derivation::new(&params.secrets.from_responder, params.cipher, 1);
        let (out, inward) = if params.initiator { (forward, back) } else { (back, forward) };

        let first = u64::from(params.epoch) * COUNTER_LIMIT;
        let sender = |lane| Sender::new(out.key(lane)?, lane, params.remote_index, first);
        let receiver = |lane| Ok(Receiver { key: inward.key(lane)?, lane });
        Ok(Session {
            peer: params.peer,
            local_index: params.local_index,
            remote_index: params.remote_index,
            cipher: params.cipher,
            local_lanes: params.local_lanes,
            remote_lanes: params.remote_lanes,
            established: params.established,
            initiator: params.initiator,
            ecn: params.ecn,
            senders: (0..params.local_lanes).map(sender).collect::<Result<_, _>>()?,
            receivers: (0..params.remote_lanes).map(receiver).collect::<Result<_, _>>()?,
            control_sender: sender(CONTROL_LANE)?,
            control_receiver: receiver(CONTROL_LANE)?,
            traffic: Traffic::default(),
            expired: AtomicBool::new(false),
            // The response proves to the initiator that the peer has the session.
            confirmed: AtomicBool::new(params.initiator),
            slot: None,
        })
    }

    /// Attaches the slot in which the session is stored. A session in which a datagram has been
    /// accepted, in this or an earlier epoch, becomes confirmed.
    #[must_use]
    pub fn with_slot(mut self, slot: Option<Box<dyn SessionSlot>>) -> Self {
        self.slot = slot;
        if (0..self.remote_lanes).chain([CONTROL_LANE]).any(|lane| self.next_counter(lane) > 0) {
            self.confirm();
        }
        self
    }

    /// Returns one more than the highest counter accepted on a lane, in this or an earlier epoch; 0
    /// if none was accepted or if the session has no slot.
    pub fn next_counter(&self, lane: u8) -> u64 {
        self.slot.as_ref().map_or(0, |slot| slot.next_counter(lane))
    }

    /// Stores one more than the highest counter accepted on a lane
    /// ([`ReplayWindow::next_counter`](crate::ReplayWindow::next_counter)). Call this method before
    /// the packets of the datagram are handed on, because a process that restores the session must
    /// not accept the datagram again.
    #[inline]
    pub fn set_next_counter(&self, lane: u8, next: u64) {
        if let Some(slot) = &self.slot {
            slot.set_next_counter(lane, next);
        }
    }

    /// Returns the sending half of a lane of this node. [`CONTROL_LANE`] belongs to the engine.
    #[inline]
    pub fn sender(&self, lane: u8) -> Option<&Sender> {
        match lane {
            CONTROL_LANE => Some(&self.control_sender),
            lane => self.senders.get(usize::from(lane)),
        }
    }

    /// Returns the receiving half of a lane of the peer. [`CONTROL_LANE`] belongs to the engine.
    #[inline]
    pub fn receiver(&self, lane: u8) -> Option<&Receiver> {
        match lane {
            CONTROL_LANE => Some(&self.control_receiver),
            lane => self.receivers.get(usize::from(lane)),
        }
    }

    /// Returns the traffic counters, to which lanes add once per batch.
    #[inline]
    pub fn traffic(&self) -> &Traffic {
        &self.traffic
    }

    /// Returns true if the engine has ended the session. Nothing may be sent or accepted with it
    /// any more.
    #[inline]
    pub fn is_expired(&self) -> bool {
        self.expired.load(Ordering::Relaxed)
    }

    /// Returns true if the engine has ended the session, or if its age at `now` (monotonic clock)
    /// is [`SESSION_LIFETIME`] or more. Lanes use this method, so that keys end in time even if the
    /// engine's thread hangs.
    #[inline]
    pub fn is_expired_at(&self, now: Duration) -> bool {
        self.is_expired() || now >= self.established.mono + SESSION_LIFETIME
    }

    /// Returns true if the peer is known to have the session. Only then may data be sent with it.
    #[inline]
    pub fn is_confirmed(&self) -> bool {
        self.confirmed.load(Ordering::Acquire)
    }

    /// Records that an authentic datagram arrived in the session. A lane that opens the first
    /// datagram of a responder's session calls this method before it hands the packet on: the
    /// answer to that packet may leave before the engine knows, and the peer may have no older
    /// session.
    #[inline]
    pub fn confirm(&self) {
        if !self.is_confirmed() {
            self.confirmed.store(true, Ordering::Release);
        }
    }

    /// Ends the session for all lanes, including those that still use older tables.
    pub(crate) fn expire(&self) {
        self.expired.store(true, Ordering::Relaxed);
    }

    /// Returns the number of counters that the busiest lane has used in this epoch.
    pub(crate) fn counters_used(&self) -> u64 {
        self.senders.iter().map(Sender::used).max().unwrap_or(0)
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session")
            .field("peer", &self.peer)
            .field("local_index", &self.local_index)
            .field("remote_index", &self.remote_index)
            .field("cipher", &self.cipher)
            .field("initiator", &self.initiator)
            .finish_non_exhaustive()
    }
}

/// Traffic of a session, in inner packets and bytes or in another unit of the lanes. The engine
/// only checks that the counters grow.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct Traffic {
    /// Number of packets sent.
    pub tx_packets: AtomicU64,
    /// Bytes of the packets sent.
    pub tx_bytes: AtomicU64,
    /// Number of authentic packets received.
    pub rx_packets: AtomicU64,
    /// Bytes of the packets received.
    pub rx_bytes: AtomicU64,
}

impl Traffic {
    /// Adds the packets and bytes that a batch has sent.
    pub fn add_sent(&self, packets: u64, bytes: u64) {
        self.tx_packets.fetch_add(packets, Ordering::Relaxed);
        self.tx_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Adds the authentic packets and bytes that a batch has received.
    pub fn add_received(&self, packets: u64, bytes: u64) {
        self.rx_packets.fetch_add(packets, Ordering::Relaxed);
        self.rx_bytes.fetch_add(bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::drop::DropReason;
    use crate::tunnel::replay::ReplayWindow;
    use crate::wire::header::{Flags, OVERHEAD};

    const CIPHERS: [Cipher; 2] = [Cipher::Aes256Gcm, Cipher::ChaCha20Poly1305];

    fn params(cipher: Cipher, initiator: bool) -> SessionParams {
        let (local_lanes, remote_lanes) = if initiator { (3, 2) } else { (2, 3) };
        SessionParams {
            peer: PeerId(7),
            local_index: if initiator { 0x1111 } else { 0x2222 },
            remote_index: if initiator { 0x2222 } else { 0x1111 },
            cipher,
            local_lanes,
            remote_lanes,
            established: Time::default(),
            initiator,
            epoch: 0,
            ecn: false,
            secrets: TransportSecrets::new([1; 32], [2; 32]),
        }
    }

    fn pair(cipher: Cipher) -> (Session, Session) {
        (Session::new(params(cipher, true)).unwrap(), Session::new(params(cipher, false)).unwrap())
    }

    #[test]
    fn sealed_datagram_opens_at_other_end() {
        for cipher in CIPHERS {
            let (a, b) = pair(cipher);
            for (from, to) in [(&a, &b), (&b, &a)] {
                for lane in (0..from.local_lanes).chain([CONTROL_LANE]) {
                    for (counter, len) in [0, 1, 15, 16, 64, 1400, 9000].into_iter().enumerate() {
                        let plaintext: Vec<u8> = (0..len).map(|i| i as u8).collect();
                        let mut out = vec![0xaa; len + OVERHEAD + 3];
                        let sender = from.sender(lane).unwrap();
                        let n = sender.seal(Flags::default(), &plaintext, &mut out).unwrap();
                        assert_eq!(n, len + OVERHEAD);
                        assert_eq!(
                            out[n..],
                            [0xaa; 3],
                            "The bytes after the datagram must stay unchanged."
                        );
                        let (header, opened) =
                            to.receiver(lane).unwrap().open(&mut out[..n]).unwrap();
                        assert_eq!(header.counter, counter as u64);
                        assert_eq!(header.receiver, to.local_index);
                        assert_eq!(header.lane, lane);
                        assert_eq!(opened, plaintext);
                    }
                }
            }
        }
    }

    #[test]
    fn every_flipped_bit_is_detected() {
        for cipher in CIPHERS {
            let (a, b) = pair(cipher);
            let mut sealed = [0; 40 + OVERHEAD];
            let n = a.sender(1).unwrap().seal(Flags::PARTIAL_CHECKSUM, &[5; 40], &mut sealed);
            assert_eq!(n, Ok(sealed.len()));
            for bit in 0..sealed.len() * 8 {
                let mut datagram = sealed;
                datagram[bit / 8] ^= 1 << (bit % 8);
                assert!(b.receiver(1).unwrap().open(&mut datagram).is_err(), "bit {bit}");
            }
            for len in 0..sealed.len() {
                let mut datagram = sealed;
                assert!(b.receiver(1).unwrap().open(&mut datagram[..len]).is_err(), "{len} bytes");
            }
            assert!(b.receiver(1).unwrap().open(&mut sealed).is_ok());
        }
    }

    #[test]
    fn lanes_and_directions_have_separate_keys() {
        for cipher in CIPHERS {
            let (a, b) = pair(cipher);
            let mut sealed = [0; 8 + OVERHEAD];
            a.sender(0).unwrap().seal(Flags::default(), &[5; 8], &mut sealed).unwrap();
            let result = b.receiver(1).unwrap().open(&mut sealed.clone()).map(drop);
            assert_eq!(result, Err(DropReason::WrongLane));
            // The same bytes with another lane in the header.
            let mut forged = sealed;
            forged[2] = 1;
            let result = b.receiver(1).unwrap().open(&mut forged).map(drop);
            assert_eq!(result, Err(DropReason::AuthFailed));
            // The datagram reflected to its sender.
            let result = a.receiver(0).unwrap().open(&mut sealed.clone()).map(drop);
            assert_eq!(result, Err(DropReason::AuthFailed));
            assert!(a.sender(3).is_none() && a.receiver(2).is_none() && b.sender(2).is_none());
        }
    }

    #[test]
    fn derived_keys_are_all_different() {
        let mut keys = Vec::new();
        for (direction, secret) in [(0, [1; 32]), (1, [2; 32]), (0, [3; 32]), (1, [1; 32])] {
            for cipher in CIPHERS {
                for lane in (0..64).chain([CONTROL_LANE]) {
                    let key = Derivation::new(&secret, cipher, direction).bytes(lane).unwrap();
                    assert!(!keys.contains(&*key));
                    keys.push(*key);
                }
            }
        }
    }

    /// Expected values computed with Python's hmac and hashlib directly from RFC 5869.
    #[test]
    fn derived_keys_match_reference_values() {
        let key = |secret: u8, cipher, direction, lane| {
            let bytes = Derivation::new(&[secret; 32], cipher, direction).bytes(lane).unwrap();
            bytes.iter().map(|b| format!("{b:02x}")).collect::<String>()
        };
        assert_eq!(
            key(1, Cipher::Aes256Gcm, 0, 0),
            "8da066b1bfa423e9e90f831823884d9159fb0c6f7efe43beff1981f2f64bc3ca"
        );
        assert_eq!(
            key(2, Cipher::ChaCha20Poly1305, 1, CONTROL_LANE),
            "4df4845e2e0bded55cfff52f9c48f7c0991d8e87da3195de39e58732489fdf95"
        );
    }

    #[test]
    fn exhausted_counter_seals_nothing() {
        let (a, b) = pair(Cipher::Aes256Gcm);
        let sender = a.sender(0).unwrap();
        sender.set_counter(COUNTER_LIMIT - 1);
        assert_eq!(a.counters_used(), COUNTER_LIMIT - 1);
        let mut out = [0; 4 + OVERHEAD];
        assert_eq!(sender.seal(Flags::default(), &[0; 4], &mut out), Ok(out.len()));
        assert_eq!(b.receiver(0).unwrap().open(&mut out).unwrap().0.counter, COUNTER_LIMIT - 1);
        for _ in 0..3 {
            let result = sender.seal(Flags::default(), &[0; 4], &mut out);
            assert_eq!(result, Err(DropReason::CounterExhausted));
        }
    }

    #[test]
    fn session_expires_by_age_without_its_engine() {
        let second = Duration::from_secs(1);
        let established = Time { mono: 100 * second, wall: Duration::ZERO };
        let params = SessionParams { established, ..params(Cipher::Aes256Gcm, true) };
        let session = Session::new(params).unwrap();
        for age in [Duration::ZERO, SESSION_LIFETIME - Duration::from_nanos(1)] {
            assert!(!session.is_expired_at(established.mono + age), "{age:?}");
        }
        assert!(session.is_expired_at(established.mono + SESSION_LIFETIME));
        assert!(session.is_expired_at(established.mono + 205 * second));
        assert!(!session.is_expired(), "The engine must not have ended the session.");
        session.expire();
        assert!(session.is_expired_at(established.mono), "An ended session must count as expired.");
    }

    /// A slot that stores its value in memory.
    struct Marks(AtomicU64);

    impl SessionSlot for Marks {
        fn next_counter(&self, _: u8) -> u64 {
            self.0.load(Ordering::Relaxed)
        }

        fn set_next_counter(&self, _: u8, next: u64) {
            self.0.store(next, Ordering::Relaxed);
        }
    }

    #[test]
    fn next_counter_of_highest_counter_does_not_wrap() {
        let (_, session) = pair(Cipher::Aes256Gcm);
        let session = session.with_slot(Some(Box::new(Marks(AtomicU64::new(0)))));
        let mut window = ReplayWindow::new();
        assert_eq!(window.check_and_set(u64::MAX), Ok(()));
        session.set_next_counter(0, window.next_counter());
        let mut restored = ReplayWindow::after(session.next_counter(0));
        assert_eq!(restored.check_and_set(u64::MAX), Err(DropReason::Replayed));
    }

    #[test]
    fn short_buffer_consumes_no_counter() {
        let (a, _) = pair(Cipher::Aes256Gcm);
        let sender = a.sender(0).unwrap();
        let mut out = [0; 4 + OVERHEAD];
        let result = sender.seal(Flags::default(), &[0; 5], &mut out);
        assert_eq!(result, Err(DropReason::SealFailed));
        assert_eq!(sender.used(), 0);
    }

    #[test]
    fn invalid_numbers_of_lanes_are_refused() {
        for lanes in [0, 65, 255] {
            let bad = SessionParams { local_lanes: lanes, ..params(Cipher::Aes256Gcm, true) };
            assert_eq!(Session::new(bad).unwrap_err(), SessionError::Lanes(lanes));
            let bad = SessionParams { remote_lanes: lanes, ..params(Cipher::Aes256Gcm, true) };
            assert_eq!(Session::new(bad).unwrap_err(), SessionError::Lanes(lanes));
        }
    }
}
