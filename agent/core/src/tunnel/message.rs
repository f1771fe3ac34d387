//! Layouts of handshake and control messages. All fields are big endian; bytes without a field are
//! zero.
#![cfg_attr(doc, doc = "")]
#![cfg_attr(doc, doc = include_str!("../../../../docs/wire-format.md"))]

use std::time::Duration;

use crate::drop::DropReason;
use crate::tunnel::cipher::{Cipher, Ciphers};
use crate::tunnel::cookie::{MAC_LEN, Mac, SALT_LEN, SEALED_LEN};
use crate::tunnel::noise::{INITIATION_OVERHEAD, RESPONSE_OVERHEAD};
use crate::wire::header::{CONTROL_LANE, Flags, HEADER_LEN, Header, MAX_LANES, MessageType};
use crate::wire::ip::MIN_IPV4_MTU;

/// Length of the unencrypted start of an initiation in bytes.
pub const CLEAR_LEN: usize = HEADER_LEN + 8;
/// Maximum length of a handshake message in bytes. Every underlay carries it, even the smallest
/// underlay of IPv6 (1280 bytes, RFC 8200, section 5).
pub const MAX_HANDSHAKE: usize = 1200;

/// Length of an initiation's payload before encryption in bytes.
pub const INITIATION_PAYLOAD_LEN: usize = 17;
/// Length in bytes of an initiation's payload without the fields of later versions.
const MIN_INITIATION_PAYLOAD_LEN: usize = 16;
/// Length of a response's payload before encryption in bytes.
pub const RESPONSE_PAYLOAD_LEN: usize = 10;
/// Minimum length of an initiation in bytes.
pub const MIN_INITIATION_LEN: usize =
    CLEAR_LEN + INITIATION_OVERHEAD + MIN_INITIATION_PAYLOAD_LEN + 2 * MAC_LEN;
/// Minimum length of a response in bytes.
pub const MIN_RESPONSE_LEN: usize = HEADER_LEN + RESPONSE_OVERHEAD + RESPONSE_PAYLOAD_LEN + MAC_LEN;
/// Length of a cookie reply in bytes.
pub const COOKIE_REPLY_LEN: usize = HEADER_LEN + SALT_LEN + SEALED_LEN;

const _: () =
    assert!(MIN_RESPONSE_LEN <= MIN_INITIATION_LEN && COOKIE_REPLY_LEN <= MIN_INITIATION_LEN);

/// Bit of the features: the sender applies the outer ECN field on decapsulation (RFC 6040).
const FEATURE_ECN: u8 = 1;

const INVALID: DropReason = DropReason::HandshakeInvalid;

/// Transport parameters that a node announces in its handshakes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TransportParams {
    /// Number of lanes on which the node sends, 1 to 64.
    pub lanes: u8,
    /// Ciphers that the node accepts for data.
    pub ciphers: Ciphers,
    /// Inner MTU of the node, bytes; at least [`MIN_IPV4_MTU`].
    pub mtu: u16,
    /// True if the node applies the outer ECN field on decapsulation (RFC 6040).
    pub ecn: bool,
}

impl TransportParams {
    fn features(self) -> u8 {
        if self.ecn { FEATURE_ECN } else { 0 }
    }

    fn read(lanes: u8, ciphers: u8, mtu: [u8; 2], features: u8) -> Option<Self> {
        let is_valid = lanes != 0 && usize::from(lanes) <= MAX_LANES;
        is_valid.then(|| Self {
            lanes,
            ciphers: Ciphers::from_byte(ciphers),
            // Otherwise a peer could make this node send a datagram for every few bytes.
            mtu: u16::from_be_bytes(mtu).max(MIN_IPV4_MTU),
            ecn: features & FEATURE_ECN != 0,
        })
    }
}

/// Wall-clock time of an initiation at its sender. The order of timestamps is that of time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Timestamp([u8; 12]);

impl Timestamp {
    /// Creates a timestamp from the time since 1970.
    pub fn new(wall: Duration) -> Self {
        let mut bytes = [0; 12];
        bytes[..8].copy_from_slice(&wall.as_secs().to_be_bytes());
        bytes[8..].copy_from_slice(&wall.subsec_nanos().to_be_bytes());
        Self(bytes)
    }

    /// Returns the time since 1970; the longest duration if the sum of seconds and nanoseconds
    /// exceeds it.
    pub fn wall(self) -> Duration {
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

/// Fields of an initiation. Lengths and reserved bytes are checked; nothing is authenticated.
pub struct Initiation<'a> {
    /// Index by which the sender will know the session.
    pub sender: u32,
    /// UDP port to which the response is sent; not 0.
    pub listen_port: u16,
    /// Unencrypted start of the message, [`CLEAR_LEN`] bytes.
    pub clear: &'a [u8],
    /// First message of Noise IK.
    pub noise: &'a [u8],
    /// mac1 and the bytes that it covers.
    pub mac1: Mac1Input<'a>,
    /// mac2; zeros if the sender has no cookie.
    pub mac2: Mac,
    /// Bytes that mac2 covers.
    pub mac2_input: &'a [u8],
}

/// mac1 of a message and the bytes that it covers.
pub struct Mac1Input<'a> {
    /// All bytes before mac1.
    pub message: &'a [u8],
    /// Value of mac1 in the message.
    pub mac1: Mac,
}

impl<'a> Mac1Input<'a> {
    fn split(message: &'a [u8]) -> Option<Self> {
        let (message, mac1) = message.split_last_chunk()?;
        Some(Self { message, mac1: *mac1 })
    }
}

impl<'a> Initiation<'a> {
    /// Parses an initiation. `header` is the parsed header of `datagram`.
    ///
    /// # Errors
    /// [`DropReason::HandshakeInvalid`] if the length is not in [`MIN_INITIATION_LEN`] to
    /// [`MAX_HANDSHAKE`], if receiver index, counter or reserved bytes are not zero, or if the port
    /// is 0.
    pub fn parse(header: Header, datagram: &'a [u8]) -> Result<Self, DropReason> {
        if !(MIN_INITIATION_LEN..=MAX_HANDSHAKE).contains(&datagram.len())
            || header.receiver != 0
            || header.counter != 0
        {
            return Err(INVALID);
        }
        let (mac2_input, mac2) = datagram.split_last_chunk().ok_or(INVALID)?;
        let mac1 = Mac1Input::split(mac2_input).ok_or(INVALID)?;
        let (clear, noise) = mac1.message.split_at_checked(CLEAR_LEN).ok_or(INVALID)?;
        let (_, fields) = clear.split_last_chunk().ok_or(INVALID)?;
        let [s0, s1, s2, s3, p0, p1, 0, 0] = *fields else { return Err(INVALID) };
        let listen_port = u16::from_be_bytes([p0, p1]);
        if listen_port == 0 {
            return Err(INVALID);
        }
        let sender = u32::from_be_bytes([s0, s1, s2, s3]);
        Ok(Self { sender, listen_port, clear, noise, mac1, mac2: *mac2, mac2_input })
    }
}

/// Encodes the unencrypted start of an initiation.
pub fn initiation_clear(sender: u32, listen_port: u16) -> [u8; CLEAR_LEN] {
    let mut out = [0; CLEAR_LEN];
    out[..HEADER_LEN].copy_from_slice(&header(MessageType::Initiation, 0));
    out[HEADER_LEN..HEADER_LEN + 4].copy_from_slice(&sender.to_be_bytes());
    out[HEADER_LEN + 4..HEADER_LEN + 6].copy_from_slice(&listen_port.to_be_bytes());
    out
}

/// Encodes the payload of an initiation.
pub fn initiation_payload(
    timestamp: Timestamp,
    params: TransportParams,
) -> [u8; INITIATION_PAYLOAD_LEN] {
    let mut out = [0; INITIATION_PAYLOAD_LEN];
    out[..12].copy_from_slice(&timestamp.0);
    out[12] = params.lanes;
    out[13] = params.ciphers.to_byte();
    out[14..16].copy_from_slice(&params.mtu.to_be_bytes());
    out[16] = params.features();
    out
}

/// Parses the payload of an initiation. Returns `None` if the payload is shorter than 16 bytes or
/// the number of lanes is not 1 to 64.
pub fn read_initiation_payload(payload: &[u8]) -> Option<(Timestamp, TransportParams)> {
    let [timestamp @ .., lanes, ciphers, m0, m1] =
        payload.first_chunk::<MIN_INITIATION_PAYLOAD_LEN>()?;
    let features = payload.get(MIN_INITIATION_PAYLOAD_LEN).copied().unwrap_or(0);
    let params = TransportParams::read(*lanes, *ciphers, [*m0, *m1], features)?;
    Some((Timestamp(*timestamp), params))
}

/// Fields of a response. The length is checked; nothing is authenticated.
pub struct Response<'a> {
    /// Second message of Noise IK.
    pub noise: &'a [u8],
    /// mac1 and the bytes that it covers.
    pub mac1: Mac1Input<'a>,
}

impl<'a> Response<'a> {
    /// Parses a response. `header` is the parsed header of `datagram`.
    ///
    /// # Errors
    /// [`DropReason::HandshakeInvalid`] if the length is not in [`MIN_RESPONSE_LEN`] to
    /// [`MAX_HANDSHAKE`], or if the counter is not zero.
    pub fn parse(header: Header, datagram: &'a [u8]) -> Result<Self, DropReason> {
        if !(MIN_RESPONSE_LEN..=MAX_HANDSHAKE).contains(&datagram.len()) || header.counter != 0 {
            return Err(INVALID);
        }
        let mac1 = Mac1Input::split(datagram).ok_or(INVALID)?;
        let noise = mac1.message.get(HEADER_LEN..).ok_or(INVALID)?;
        Ok(Self { noise, mac1 })
    }
}

/// Payload of a response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResponsePayload {
    /// Index by which the responder will know the session.
    pub index: u32,
    /// Transport parameters of the responder.
    pub params: TransportParams,
    /// Cipher that the responder has chosen for data.
    pub cipher: Cipher,
}

impl ResponsePayload {
    /// Encodes the payload.
    pub fn to_bytes(self) -> [u8; RESPONSE_PAYLOAD_LEN] {
        let mut out = [0; RESPONSE_PAYLOAD_LEN];
        out[..4].copy_from_slice(&self.index.to_be_bytes());
        out[4] = self.params.lanes;
        out[5] = self.params.ciphers.to_byte();
        out[6] = self.cipher.number();
        out[7] = self.params.features();
        out[8..].copy_from_slice(&self.params.mtu.to_be_bytes());
        out
    }

    /// Parses the payload. Returns `None` if it is shorter than [`RESPONSE_PAYLOAD_LEN`], if the
    /// number of lanes is not 1 to 64, or if the cipher is unknown.
    pub fn read(payload: &[u8]) -> Option<Self> {
        let [i0, i1, i2, i3, lanes, ciphers, cipher, features, m0, m1] =
            *payload.first_chunk::<RESPONSE_PAYLOAD_LEN>()?;
        let cipher = Cipher::from_number(cipher)?;
        let params = TransportParams::read(lanes, ciphers, [m0, m1], features)?;
        Some(Self { index: u32::from_be_bytes([i0, i1, i2, i3]), params, cipher })
    }
}

/// Fields of a cookie reply.
pub struct CookieReply {
    /// Random bytes from which the AEAD key of the cookie is derived.
    pub salt: [u8; SALT_LEN],
    /// Encrypted cookie and its tag.
    pub sealed: [u8; SEALED_LEN],
}

impl CookieReply {
    /// Parses a cookie reply. `header` is the parsed header of `datagram`.
    ///
    /// # Errors
    /// [`DropReason::HandshakeInvalid`] if the length is not [`COOKIE_REPLY_LEN`], or if the
    /// counter is not zero.
    pub fn parse(header: Header, datagram: &[u8]) -> Result<Self, DropReason> {
        let (_, body) = datagram.split_at_checked(HEADER_LEN).ok_or(INVALID)?;
        let (salt, sealed) = body.split_first_chunk().ok_or(INVALID)?;
        let sealed = sealed.try_into().map_err(|_| INVALID)?;
        if header.counter != 0 {
            return Err(INVALID);
        }
        Ok(Self { salt: *salt, sealed })
    }

    /// Encodes the message for the sender of the initiation with the index `receiver`.
    pub fn to_bytes(&self, receiver: u32) -> Vec<u8> {
        [&header(MessageType::CookieReply, receiver)[..], &self.salt, &self.sealed].concat()
    }
}

/// Encodes the header of a handshake message.
pub(crate) fn header(kind: MessageType, receiver: u32) -> [u8; HEADER_LEN] {
    Header { kind, flags: Flags::default(), lane: CONTROL_LANE, receiver, counter: 0 }.to_bytes()
}

/// Plaintext of a control message. Bytes after the fields are ignored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Control {
    /// Type 1: a request for a pong. Zeros after the fields make it a probe of the path MTU.
    Ping {
        /// Number of the ping; grows with every ping of its sender.
        id: u64,
        /// Clock of the sender, nanoseconds; opaque to the receiver.
        sent: u64,
        /// Time for which the sender has received nothing authentic, milliseconds.
        silent: u32,
    },
    /// Type 2: the answer to a ping.
    Pong {
        /// Number of the ping.
        id: u64,
        /// Clock value of the ping, nanoseconds.
        sent: u64,
    },
}

impl Control {
    /// Parses a plaintext. Returns `None` if the type is unknown or a field is missing.
    pub fn read(plaintext: &[u8]) -> Option<Self> {
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

    /// Encodes the plaintext without padding.
    pub fn to_bytes(self) -> Vec<u8> {
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
    fn payloads_round_trip_and_may_be_longer() {
        let params = TransportParams { lanes: 64, ciphers: HARDWARE, mtu: 1440, ecn: true };
        let timestamp = Timestamp::new(Duration::new(1_700_000_000, 5));
        let mut payload = initiation_payload(timestamp, params).to_vec();
        for len in 0..payload.len() - 1 {
            assert_eq!(read_initiation_payload(&payload[..len]), None);
        }
        // An initiation of an earlier version has no features.
        let earlier = TransportParams { ecn: false, ..params };
        assert_eq!(read_initiation_payload(&payload[..16]), Some((timestamp, earlier)));
        payload.extend([0xff; 40]);
        assert_eq!(read_initiation_payload(&payload), Some((timestamp, params)));
        for lanes in [0, 65, 255] {
            payload[12] = lanes;
            assert_eq!(read_initiation_payload(&payload), None);
        }

        let response = ResponsePayload { index: 7, params, cipher: Cipher::ChaCha20Poly1305 };
        let mut payload = response.to_bytes().to_vec();
        assert_eq!(ResponsePayload::read(&payload[..9]), None);
        payload.push(1);
        assert_eq!(ResponsePayload::read(&payload), Some(response));
        payload[6] = 3;
        assert_eq!(ResponsePayload::read(&payload), None, "An unknown cipher is refused.");
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
    fn control_messages_round_trip() {
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
