//! The bytes of handshake and control messages. Each begins with the 16-byte header of every
//! message; all fields are big endian, and what is not named is zero.
//!
//! | initiation | bytes |
//! |---|---|
//! | header: receiver 0, counter 0 | 16 |
//! | index by which the sender will know the session | 4 |
//! | port that the sender listens on: its handshakes leave from another | 2 |
//! | reserved | 2 |
//! | Noise IK message 1: e, es, s, ss, payload | 96 + payload |
//! | first check | 16 |
//! | second check, or zeros | 16 |
//!
//! Its payload: timestamp (seconds, 8; nanoseconds, 4), lanes (1), ciphers (1), MTU (2), features
//! (1; absent from earlier versions). The 24 clear bytes join the handshake's prologue, so that
//! they are authentic once the handshake is.
//!
//! | response | bytes |
//! |---|---|
//! | header: receiver is the initiation's index, counter 0 | 16 |
//! | Noise IK message 2: e, ee, se, payload | 48 + payload |
//! | first check | 16 |
//!
//! Its payload: index (4), lanes (1), ciphers (1), the chosen cipher (1), features (1), MTU (2).
//!
//! Features are bits: 1, the sender propagates the outer ECN field on decapsulation (RFC 6040).
//! Other bits are ignored.
//!
//! | cookie reply | bytes |
//! |---|---|
//! | header: receiver is the initiation's index, counter 0 | 16 |
//! | random salt | 32 |
//! | sealed cookie, associated data: the initiation's first check | 32 |
//!
//! Payloads may be longer: what follows is for later versions and ignored. No answer is longer than
//! what it answers, so a node amplifies nothing.

use std::time::Duration;

use crate::drop::DropReason;
use crate::tunnel::cipher::{Cipher, Ciphers};
use crate::tunnel::cookie::{MAC_LEN, Mac, SALT_LEN, SEALED_LEN};
use crate::tunnel::noise::{INITIATION_OVERHEAD, RESPONSE_OVERHEAD};
use crate::wire::header::{CONTROL_LANE, Flags, HEADER_LEN, Header, MAX_LANES, MessageType};
use crate::wire::ip::MIN_IPV4_MTU;

/// Length of an initiation's clear part in bytes.
pub(crate) const CLEAR_LEN: usize = HEADER_LEN + 8;
/// No handshake message is longer, in bytes: it must cross every underlay, IPv6's least included.
pub(crate) const MAX_HANDSHAKE: usize = 1200;

/// Bit of the features: the sender propagates the outer ECN field on decapsulation.
const FEATURE_ECN: u8 = 1;

const INITIATION_PAYLOAD: usize = 17;
/// Length of an initiation's payload without what later versions added, in bytes.
const MIN_INITIATION_PAYLOAD: usize = 16;
const RESPONSE_PAYLOAD: usize = 10;
const MIN_INITIATION: usize =
    CLEAR_LEN + INITIATION_OVERHEAD + MIN_INITIATION_PAYLOAD + 2 * MAC_LEN;
const MIN_RESPONSE: usize = HEADER_LEN + RESPONSE_OVERHEAD + RESPONSE_PAYLOAD + MAC_LEN;
const COOKIE_REPLY: usize = HEADER_LEN + SALT_LEN + SEALED_LEN;

const _: () = assert!(MIN_RESPONSE <= MIN_INITIATION && COOKIE_REPLY <= MIN_INITIATION);

const INVALID: DropReason = DropReason::HandshakeInvalid;

/// What an end says of itself in a handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Offer {
    pub(crate) lanes: u8,
    pub(crate) ciphers: Ciphers,
    pub(crate) mtu: u16,
    /// The sender propagates the outer ECN field on decapsulation (RFC 6040).
    pub(crate) ecn: bool,
}

impl Offer {
    fn features(self) -> u8 {
        if self.ecn { FEATURE_ECN } else { 0 }
    }

    fn read(lanes: u8, ciphers: u8, mtu: [u8; 2], features: u8) -> Option<Self> {
        let valid = lanes != 0 && usize::from(lanes) <= MAX_LANES;
        valid.then(|| Self {
            lanes,
            ciphers: Ciphers::from_byte(ciphers),
            // What every IPv4 host takes (RFC 791): one who says less wants pods' packets in crumbs.
            mtu: u16::from_be_bytes(mtu).max(MIN_IPV4_MTU),
            ecn: features & FEATURE_ECN != 0,
        })
    }
}

/// When an initiation was made, by its maker's wall clock; compares as time does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(crate) struct Timestamp([u8; 12]);

impl Timestamp {
    pub(crate) fn new(wall: Duration) -> Self {
        let mut bytes = [0; 12];
        bytes[..8].copy_from_slice(&wall.as_secs().to_be_bytes());
        bytes[8..].copy_from_slice(&wall.subsec_nanos().to_be_bytes());
        Self(bytes)
    }

    /// Returns the time since 1970; the longest duration if the sum of seconds and nanoseconds
    /// exceeds it.
    pub(crate) fn wall(self) -> Duration {
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3] = self.0;
        let secs = u64::from_be_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        // The nanoseconds come from a peer and may exceed one second.
        let nanos = Duration::from_nanos(u32::from_be_bytes([n0, n1, n2, n3]).into());
        Duration::from_secs(secs).saturating_add(nanos)
    }

    pub(crate) fn to_bytes(self) -> [u8; 12] {
        self.0
    }

    pub(crate) fn from_bytes(bytes: [u8; 12]) -> Self {
        Self(bytes)
    }
}

/// An initiation's parts, lengths checked and nothing else.
pub(crate) struct Initiation<'a> {
    pub(crate) sender: u32,
    pub(crate) listen_port: u16,
    pub(crate) clear: &'a [u8],
    pub(crate) noise: &'a [u8],
    pub(crate) checked: Checked<'a>,
    pub(crate) second: Mac,
    pub(crate) before_second: &'a [u8],
}

/// What the first check covers, and the check.
pub(crate) struct Checked<'a> {
    pub(crate) message: &'a [u8],
    pub(crate) first: Mac,
}

impl<'a> Checked<'a> {
    fn split(message: &'a [u8]) -> Option<Self> {
        let (message, first) = message.split_last_chunk()?;
        Some(Self { message, first: *first })
    }
}

impl<'a> Initiation<'a> {
    pub(crate) fn parse(header: Header, datagram: &'a [u8]) -> Result<Self, DropReason> {
        if !(MIN_INITIATION..=MAX_HANDSHAKE).contains(&datagram.len())
            || header.receiver != 0
            || header.counter != 0
        {
            return Err(INVALID);
        }
        let (before_second, second) = datagram.split_last_chunk().ok_or(INVALID)?;
        let checked = Checked::split(before_second).ok_or(INVALID)?;
        let (clear, noise) = checked.message.split_at_checked(CLEAR_LEN).ok_or(INVALID)?;
        let (_, fields) = clear.split_last_chunk().ok_or(INVALID)?;
        let [s0, s1, s2, s3, p0, p1, 0, 0] = *fields else { return Err(INVALID) };
        let listen_port = u16::from_be_bytes([p0, p1]);
        if listen_port == 0 {
            return Err(INVALID);
        }
        let sender = u32::from_be_bytes([s0, s1, s2, s3]);
        let second = *second;
        Ok(Self { sender, listen_port, clear, noise, checked, second, before_second })
    }
}

/// The clear bytes that an initiation begins with.
pub(crate) fn initiation_clear(sender: u32, listen_port: u16) -> [u8; CLEAR_LEN] {
    let mut out = [0; CLEAR_LEN];
    out[..HEADER_LEN].copy_from_slice(&header(MessageType::Initiation, 0));
    out[HEADER_LEN..HEADER_LEN + 4].copy_from_slice(&sender.to_be_bytes());
    out[HEADER_LEN + 4..HEADER_LEN + 6].copy_from_slice(&listen_port.to_be_bytes());
    out
}

/// An initiation's payload.
pub(crate) fn initiation_payload(at: Timestamp, offer: Offer) -> [u8; INITIATION_PAYLOAD] {
    let mut out = [0; INITIATION_PAYLOAD];
    out[..12].copy_from_slice(&at.0);
    out[12] = offer.lanes;
    out[13] = offer.ciphers.to_byte();
    out[14..16].copy_from_slice(&offer.mtu.to_be_bytes());
    out[16] = offer.features();
    out
}

/// Reads an initiation's payload.
pub(crate) fn read_initiation_payload(payload: &[u8]) -> Option<(Timestamp, Offer)> {
    let [at @ .., lanes, ciphers, m0, m1] = payload.first_chunk::<MIN_INITIATION_PAYLOAD>()?;
    let features = payload.get(MIN_INITIATION_PAYLOAD).copied().unwrap_or(0);
    Some((Timestamp(*at), Offer::read(*lanes, *ciphers, [*m0, *m1], features)?))
}

/// A response's parts, lengths checked and nothing else.
pub(crate) struct Response<'a> {
    pub(crate) noise: &'a [u8],
    pub(crate) checked: Checked<'a>,
}

impl<'a> Response<'a> {
    pub(crate) fn parse(header: Header, datagram: &'a [u8]) -> Result<Self, DropReason> {
        if !(MIN_RESPONSE..=MAX_HANDSHAKE).contains(&datagram.len()) || header.counter != 0 {
            return Err(INVALID);
        }
        let checked = Checked::split(datagram).ok_or(INVALID)?;
        let noise = checked.message.get(HEADER_LEN..).ok_or(INVALID)?;
        Ok(Self { noise, checked })
    }
}

/// What a responder says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Accept {
    pub(crate) index: u32,
    pub(crate) offer: Offer,
    pub(crate) cipher: Cipher,
}

impl Accept {
    pub(crate) fn to_bytes(self) -> [u8; RESPONSE_PAYLOAD] {
        let mut out = [0; RESPONSE_PAYLOAD];
        out[..4].copy_from_slice(&self.index.to_be_bytes());
        out[4] = self.offer.lanes;
        out[5] = self.offer.ciphers.to_byte();
        out[6] = self.cipher.number();
        out[7] = self.offer.features();
        out[8..].copy_from_slice(&self.offer.mtu.to_be_bytes());
        out
    }

    pub(crate) fn read(payload: &[u8]) -> Option<Self> {
        let [i0, i1, i2, i3, lanes, ciphers, cipher, features, m0, m1] =
            *payload.first_chunk::<RESPONSE_PAYLOAD>()?;
        let cipher = [Cipher::Aes256Gcm, Cipher::ChaCha20Poly1305]
            .into_iter()
            .find(|known| known.number() == cipher)?;
        let offer = Offer::read(lanes, ciphers, [m0, m1], features)?;
        Some(Self { index: u32::from_be_bytes([i0, i1, i2, i3]), offer, cipher })
    }
}

/// A cookie reply.
pub(crate) struct CookieReply {
    pub(crate) salt: [u8; SALT_LEN],
    pub(crate) sealed: [u8; SEALED_LEN],
}

impl CookieReply {
    pub(crate) fn parse(header: Header, datagram: &[u8]) -> Result<Self, DropReason> {
        let (_, body) = datagram.split_at_checked(HEADER_LEN).ok_or(INVALID)?;
        let (salt, sealed) = body.split_first_chunk().ok_or(INVALID)?;
        let sealed = sealed.try_into().map_err(|_| INVALID)?;
        if header.counter != 0 {
            return Err(INVALID);
        }
        Ok(Self { salt: *salt, sealed })
    }

    pub(crate) fn to_bytes(&self, receiver: u32) -> Vec<u8> {
        [&header(MessageType::CookieReply, receiver)[..], &self.salt, &self.sealed].concat()
    }
}

/// The header of a handshake message.
pub(crate) fn header(kind: MessageType, receiver: u32) -> [u8; HEADER_LEN] {
    Header { kind, flags: Flags::default(), lane: CONTROL_LANE, receiver, counter: 0 }.to_bytes()
}

/// The plaintext of a message between engines: a type, then its fields; what follows is ignored.
/// A type that is not known says no more than that the peer lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Control {
    /// Type 1: answer me. Padded with zeros it tells how long a datagram may be.
    Ping {
        /// Grows with every ping of its sender.
        id: u64,
        /// The sender's clock in nanoseconds; means nothing to anybody else.
        sent: u64,
        /// For how many milliseconds the sender has heard nothing authentic.
        silent: u32,
    },
    /// Type 2: the answer to a ping, with its `id` and `sent`.
    Pong {
        /// Of the ping.
        id: u64,
        /// Of the ping.
        sent: u64,
    },
}

impl Control {
    pub(crate) fn read(plaintext: &[u8]) -> Option<Self> {
        let (kind, body) = plaintext.split_first()?;
        let word = |at: usize| -> Option<u64> {
            Some(u64::from_be_bytes(*body.get(at..)?.first_chunk()?))
        };
        match kind {
            1 => {
                let silent = u32::from_be_bytes(*body.get(16..)?.first_chunk()?);
                Some(Control::Ping { id: word(0)?, sent: word(8)?, silent })
            }
            2 => Some(Control::Pong { id: word(0)?, sent: word(8)? }),
            _ => None,
        }
    }

    pub(crate) fn to_bytes(self) -> Vec<u8> {
        match self {
            Control::Ping { id, sent, silent } => {
                [&[1][..], &id.to_be_bytes(), &sent.to_be_bytes(), &silent.to_be_bytes()].concat()
            }
            Control::Pong { id, sent } => {
                [&[2][..], &id.to_be_bytes(), &sent.to_be_bytes()].concat()
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const HARDWARE: Ciphers =
        Ciphers { aes256_gcm: true, chacha20_poly1305: true, aes_hardware: true };

    #[test]
    fn payloads_are_read_as_written_and_may_grow() {
        let offer = Offer { lanes: 64, ciphers: HARDWARE, mtu: 1440, ecn: true };
        let at = Timestamp::new(Duration::new(1_700_000_000, 5));
        let mut payload = initiation_payload(at, offer).to_vec();
        for len in 0..payload.len() - 1 {
            assert_eq!(read_initiation_payload(&payload[..len]), None);
        }
        // An initiation of an earlier version has no features.
        let earlier = Offer { ecn: false, ..offer };
        assert_eq!(read_initiation_payload(&payload[..16]), Some((at, earlier)));
        payload.extend([0xff; 40]);
        assert_eq!(read_initiation_payload(&payload), Some((at, offer)));
        for lanes in [0, 65, 255] {
            payload[12] = lanes;
            assert_eq!(read_initiation_payload(&payload), None);
        }

        let accept = Accept { index: 7, offer, cipher: Cipher::ChaCha20Poly1305 };
        let mut payload = accept.to_bytes().to_vec();
        assert_eq!(Accept::read(&payload[..9]), None);
        payload.push(1);
        assert_eq!(Accept::read(&payload), Some(accept));
        payload[6] = 3;
        assert_eq!(Accept::read(&payload), None, "a cipher that nobody knows");
    }

    #[test]
    fn timestamps_compare_as_time_does() {
        let stamp = |secs, nanos| Timestamp::new(Duration::new(secs, nanos));
        let ordered = [stamp(0, 0), stamp(0, 1), stamp(0, 256), stamp(1, 0), stamp(256, 3)];
        assert!(ordered.is_sorted_by(|a, b| a < b));
        for stamp in ordered {
            assert_eq!(Timestamp::new(stamp.wall()), stamp);
        }
        for odd in [[0xff; 12], [0, 0, 0, 0, 0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff]].map(Timestamp) {
            assert!(Timestamp::new(odd.wall()) >= odd || odd.wall() == Duration::MAX, "{odd:?}");
        }
    }

    #[test]
    fn control_messages_are_read_as_written() {
        let messages = [
            Control::Ping { id: 1, sent: u64::MAX, silent: 3 },
            Control::Pong { id: u64::MAX, sent: 2 },
        ];
        for message in messages {
            let mut bytes = message.to_bytes();
            for len in 0..bytes.len() {
                assert_eq!(Control::read(&bytes[..len]), None);
            }
            bytes.push(9);
            assert_eq!(Control::read(&bytes), Some(message));
        }
        assert_eq!(Control::read(&[4; 30]), None);
    }
}
