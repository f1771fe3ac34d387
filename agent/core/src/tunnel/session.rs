//! What is left of a handshake once it is done: keys, counters, and who is at the other end.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use zeroize::Zeroizing;

use crate::route::PeerId;
use crate::time::Time;
pub use crate::tunnel::cipher::{Cipher, Ciphers};
use crate::tunnel::lane_key::Derivation;
pub use crate::tunnel::lane_key::{Receiver, Sender};
use crate::tunnel::noise::KEY_LEN;
use crate::tunnel::saved::Kept;
use crate::tunnel::timers::SESSION_LIFE;
use crate::wire::header::{CONTROL_LANE, MAX_LANES};

/// How many counters a sender uses in one life of its process ([`DropReason::CounterExhausted`]): more
/// than a lane sends in a session's 180 s at 20 million datagrams a second. The next life begins
/// behind them, however far this one came.
pub const COUNTER_LIMIT: u64 = 1 << 32;
/// From so many on the engine asks for new keys: far before [`COUNTER_LIMIT`].
pub const COUNTER_REKEY: u64 = 1 << 31;

/// Everything that makes a [`Session`].
pub struct SessionParams {
    /// Who is at the other end.
    pub peer: PeerId,
    /// Index by which the other end addresses this session.
    pub local_index: u32,
    /// Index by which this end addresses it.
    pub remote_index: u32,
    /// AEAD of the data.
    pub cipher: Cipher,
    /// Lanes that this end sends on, 1 to 64.
    pub local_lanes: u8,
    /// Lanes that the other end sends on, 1 to 64.
    pub remote_lanes: u8,
    /// When the handshake was done.
    pub established: Time,
    /// Whether this end sent the initiation.
    pub initiator: bool,
    /// Which life of the session this is; 0 in the process that made it.
    pub life: u32,
    /// Both ends propagate the outer ECN field (RFC 6040).
    pub ecn: bool,
    /// The handshake's split: the key of what the initiator sends, then of what the responder sends.
    pub secret: [Zeroizing<[u8; KEY_LEN]>; 2],
}

/// Why there is no session from [`SessionParams`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// A number of lanes is not in 1..=64.
    #[error("{0} lanes: must be 1 to 64")]
    Lanes(u8),
    /// It was taken up more often than there are counters.
    #[error("its counters are used up")]
    Lives,
    /// The cryptographic library refused.
    #[error("key derivation failed")]
    Derivation,
}

/// Keys and counters between this node and a peer, good for at most 180 seconds.
///
/// Shared by all lanes and immutable but for counters: each (direction, lane) has a key of its own,
/// so lanes neither wait for each other nor touch each other's cache lines.
pub struct Session {
    /// Who is at the other end.
    pub peer: PeerId,
    /// Index by which the other end addresses this session.
    pub local_index: u32,
    /// Index by which this end addresses it.
    pub remote_index: u32,
    /// AEAD of the data.
    pub cipher: Cipher,
    /// Lanes that this end sends on.
    pub local_lanes: u8,
    /// Lanes that the other end sends on.
    pub remote_lanes: u8,
    /// When the handshake was done.
    pub established: Time,
    /// Whether this end sent the initiation.
    pub initiator: bool,
    /// Both ends propagate the outer ECN field (RFC 6040). Otherwise the outer field is Not-ECT,
    /// and is ignored on receipt.
    pub ecn: bool,
    senders: Box<[Sender]>,
    receivers: Box<[Receiver]>,
    control_sender: Sender,
    control_receiver: Receiver,
    traffic: Traffic,
    expired: AtomicBool,
    confirmed: AtomicBool,
    /// Where the next process finds it; forgotten with the session.
    kept: Option<Box<dyn Kept>>,
}

impl Session {
    /// Derives the keys of every lane in use and of the control lane.
    ///
    /// # Errors
    /// [`SessionError::Lanes`] where a number of lanes is impossible.
    pub fn new(params: SessionParams) -> Result<Session, SessionError> {
        for lanes in [params.local_lanes, params.remote_lanes] {
            if lanes == 0 || usize::from(lanes) > MAX_LANES {
                return Err(SessionError::Lanes(lanes));
            }
        }
        let [forward, back] = &params.secret;
        let forward = Derivation::new(forward, params.cipher, 0);
        let back = Derivation::new(back, params.cipher, 1);
        let (out, inward) = if params.initiator { (forward, back) } else { (back, forward) };

        let first = u64::from(params.life) * COUNTER_LIMIT;
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
            // The initiator knows from the response that the other end has it.
            confirmed: AtomicBool::new(params.initiator),
            kept: None,
        })
    }

    /// The same session, kept for the next process. One in which something has come is confirmed.
    #[must_use]
    pub fn kept_by(mut self, kept: Option<Box<dyn Kept>>) -> Self {
        self.kept = kept;
        if (0..self.remote_lanes).chain([CONTROL_LANE]).any(|lane| self.mark(lane) > 0) {
            self.confirm();
        }
        self
    }

    /// One more than the highest counter that came on a lane in lives before, or since.
    pub fn mark(&self, lane: u8) -> u64 {
        self.kept.as_ref().map_or(0, |kept| kept.mark(lane))
    }

    /// Notes the highest counter that came on a lane, before what came with it is handed on: a process
    /// that takes the session up must not take it twice.
    #[inline]
    pub fn set_highest(&self, lane: u8, counter: u64) {
        if let Some(kept) = &self.kept {
            kept.set_mark(lane, counter.saturating_add(1));
        }
    }

    /// The sending half of one of this end's lanes; [`CONTROL_LANE`] is the engine's.
    #[inline]
    pub fn sender(&self, lane: u8) -> Option<&Sender> {
        match lane {
            CONTROL_LANE => Some(&self.control_sender),
            lane => self.senders.get(usize::from(lane)),
        }
    }

    /// The receiving half of one of the other end's lanes; [`CONTROL_LANE`] is the engine's.
    #[inline]
    pub fn receiver(&self, lane: u8) -> Option<&Receiver> {
        match lane {
            CONTROL_LANE => Some(&self.control_receiver),
            lane => self.receivers.get(usize::from(lane)),
        }
    }

    /// What lanes have sent and received; they add to it once a batch.
    #[inline]
    pub fn traffic(&self) -> &Traffic {
        &self.traffic
    }

    /// Whether the session is over: nothing may be sent or accepted by it any more.
    #[inline]
    pub fn is_expired(&self) -> bool {
        self.expired.load(Ordering::Relaxed)
    }

    /// Returns true if the session was ended, or has reached its greatest age by the clock of
    /// [`Time::mono`]. Lanes use this one, so that keys end in time even if the engine's thread
    /// hangs.
    #[inline]
    pub fn is_expired_at(&self, now: Duration) -> bool {
        self.is_expired() || now >= self.established.mono + SESSION_LIFE
    }

    /// Whether the other end is known to have the session: it may be sent with.
    #[inline]
    pub fn is_confirmed(&self) -> bool {
        self.confirmed.load(Ordering::Acquire)
    }

    /// Notes that something authentic came in it. The lane that opens a responder's first datagram
    /// says so before it hands the packet on: the answer to that packet may be back before the
    /// engine has heard of it, and the other end may have no older session to receive it with.
    #[inline]
    pub fn confirm(&self) {
        if !self.is_confirmed() {
            self.confirmed.store(true, Ordering::Release);
        }
    }

    /// Ends the session for every lane that holds it, tables adopted or not.
    pub(crate) fn expire(&self) {
        self.expired.store(true, Ordering::Relaxed);
    }

    /// How many counters the lane that sent most has used in this life.
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

/// What went through a session: inner packets and their bytes, or whatever unit the lanes keep to;
/// the engine looks only at whether they grow.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct Traffic {
    /// Packets sent.
    pub tx_packets: AtomicU64,
    /// Bytes of these.
    pub tx_bytes: AtomicU64,
    /// Authentic packets received.
    pub rx_packets: AtomicU64,
    /// Bytes of these.
    pub rx_bytes: AtomicU64,
}

impl Traffic {
    /// Adds what a batch has sent.
    pub fn sent(&self, packets: u64, bytes: u64) {
        self.tx_packets.fetch_add(packets, Ordering::Relaxed);
        self.tx_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Adds what a batch has received, after it proved authentic.
    pub fn received(&self, packets: u64, bytes: u64) {
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
            life: 0,
            ecn: false,
            secret: [Zeroizing::new([1; 32]), Zeroizing::new([2; 32])],
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
                        assert_eq!(out[n..], [0xaa; 3], "nothing past the datagram is touched");
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
            // The same bytes with the lane forged.
            let mut forged = sealed;
            forged[2] = 1;
            let result = b.receiver(1).unwrap().open(&mut forged).map(drop);
            assert_eq!(result, Err(DropReason::AuthFailed));
            // Reflected to its sender.
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

    /// Computed with Python's hmac and hashlib, straight from RFC 5869.
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
        for age in [Duration::ZERO, SESSION_LIFE - Duration::from_nanos(1)] {
            assert!(!session.is_expired_at(established.mono + age), "{age:?}");
        }
        assert!(session.is_expired_at(established.mono + SESSION_LIFE));
        assert!(session.is_expired_at(established.mono + 205 * second));
        assert!(!session.is_expired(), "The engine has not ended the session.");
        session.expire();
        assert!(session.is_expired_at(established.mono), "A session that was ended is over.");
    }

    /// A slot that keeps marks in memory.
    struct Marks(AtomicU64);

    impl Kept for Marks {
        fn mark(&self, _: u8) -> u64 {
            self.0.load(Ordering::Relaxed)
        }

        fn set_mark(&self, _: u8, mark: u64) {
            self.0.store(mark, Ordering::Relaxed);
        }
    }

    #[test]
    fn next_counter_of_highest_counter_does_not_wrap() {
        let (_, session) = pair(Cipher::Aes256Gcm);
        let session = session.kept_by(Some(Box::new(Marks(AtomicU64::new(0)))));
        session.set_highest(0, u64::MAX);
        assert_eq!(session.mark(0), u64::MAX);
        let mut next = ReplayWindow::after(session.mark(0));
        assert_eq!(next.check_and_set(u64::MAX), Err(DropReason::Replayed));
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
