//! Sealing and opening of datagrams: one AEAD key and one nonce counter for each direction and lane
//! of a session, derived with HKDF-SHA256 (RFC 5869) from the secrets of the Noise handshake.

use std::sync::atomic::{AtomicU64, Ordering};

use aws_lc_rs::aead::{Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::hkdf::{HKDF_SHA256, Prk, Salt};
use zeroize::Zeroizing;

use crate::drop::DropReason;
use crate::keys::KEY_LEN;
use crate::tunnel::cipher::Cipher;
use crate::tunnel::session::{COUNTER_LIMIT, SessionError};
use crate::wire::header::{
    CONTROL_LANE, Flags, HEADER_LEN, Header, MessageType, OVERHEAD, TAG_LEN,
};

const KEY_SALT: &[u8] = b"skein v1 transport";
const KEY_LABEL: &[u8] = b"skein v1 lane key";

/// The sending half of one lane. The alignment keeps the counters of two lanes on different cache
/// lines, and in different pairs of lines that the prefetcher loads together.
#[repr(align(128))]
pub struct Sender {
    counter: AtomicU64,
    /// First nonce counter of this epoch, `epoch << 32`.
    first: u64,
    /// Exclusive upper bound of this epoch's counters, `first + COUNTER_LIMIT`.
    limit: u64,
    key: LessSafeKey,
    receiver: u32,
    lane: u8,
    kind: MessageType,
}

impl Sender {
    pub(super) fn new(
        key: LessSafeKey,
        lane: u8,
        receiver: u32,
        first: u64,
    ) -> Result<Self, SessionError> {
        let kind = if lane == CONTROL_LANE { MessageType::Control } else { MessageType::Data };
        let limit = first.checked_add(COUNTER_LIMIT).ok_or(SessionError::EpochsExhausted)?;
        Ok(Self { counter: AtomicU64::new(first), first, limit, key, receiver, lane, kind })
    }

    /// Seals `plaintext` into one datagram at the start of `out`: header (16 bytes), ciphertext,
    /// tag (16 bytes). Returns the length in bytes, `plaintext.len() + OVERHEAD`.
    ///
    /// # Errors
    /// [`DropReason::SealFailed`] if `out` is shorter than that, or if the AEAD fails.
    /// [`DropReason::CounterExhausted`] after [`COUNTER_LIMIT`] datagrams in this epoch.
    #[inline]
    pub fn seal(
        &self,
        flags: Flags,
        plaintext: &[u8],
        out: &mut [u8],
    ) -> Result<usize, DropReason> {
        let length = plaintext.len() + OVERHEAD;
        let Some(out) = out.get_mut(..length) else { return Err(DropReason::SealFailed) };
        // Relaxed ordering suffices, because two datagrams must only get different numbers.
        let counter = self.counter.fetch_add(1, Ordering::Relaxed);
        if counter >= self.limit {
            return Err(DropReason::CounterExhausted);
        }
        let header =
            Header { kind: self.kind, flags, lane: self.lane, receiver: self.receiver, counter };
        let (head, rest) = out.split_at_mut(HEADER_LEN);
        head.copy_from_slice(&header.to_bytes());
        let (ciphertext, tag) = rest.split_at_mut(plaintext.len());
        self.key
            .seal_out_of_place_scatter(
                nonce(counter),
                Aad::from(&*head),
                plaintext,
                ciphertext,
                &[],
                tag,
            )
            .map_err(|_| DropReason::SealFailed)?;
        Ok(length)
    }

    pub(super) fn used(&self) -> u64 {
        self.counter.load(Ordering::Relaxed) - self.first
    }

    #[cfg(test)]
    pub(crate) fn set_counter(&self, counter: u64) {
        self.counter.store(self.first + counter, Ordering::Relaxed);
    }
}

/// The receiving half of one lane.
pub struct Receiver {
    pub(super) key: LessSafeKey,
    pub(super) lane: u8,
}

impl Receiver {
    /// Decrypts a datagram in place and returns its header and plaintext. The caller must check for
    /// replays afterwards ([`ReplayWindow::check_and_set`](crate::ReplayWindow::check_and_set)).
    ///
    /// # Errors
    /// [`DropReason::OuterHeader`] if the header is invalid or the datagram too short,
    /// [`DropReason::WrongLane`] if the header names another lane or type,
    /// [`DropReason::AuthFailed`] if the tag is wrong. The bytes of the datagram are undefined
    /// then.
    #[inline]
    pub fn open<'a>(&self, datagram: &'a mut [u8]) -> Result<(Header, &'a mut [u8]), DropReason> {
        let header = Header::parse(datagram)?;
        let kind = if self.lane == CONTROL_LANE { MessageType::Control } else { MessageType::Data };
        if header.lane != self.lane || header.kind != kind {
            return Err(DropReason::WrongLane);
        }
        if datagram.len() < HEADER_LEN + TAG_LEN {
            return Err(DropReason::OuterHeader);
        }
        let (head, sealed) = datagram.split_at_mut(HEADER_LEN);
        let plaintext = self
            .key
            .open_in_place(nonce(header.counter), Aad::from(&*head), sealed)
            .map_err(|_| DropReason::AuthFailed)?;
        Ok((header, plaintext))
    }
}

/// Returns the nonce: four zero bytes, then the counter in big endian.
fn nonce(counter: u64) -> Nonce {
    let mut bytes = [0; 12];
    bytes[4..].copy_from_slice(&counter.to_be_bytes());
    Nonce::assume_unique_for_key(bytes)
}

/// Derivation of lane keys from the secret of one direction with HKDF-SHA256 (RFC 5869).
pub(super) struct Derivation {
    prk: Prk,
    cipher: Cipher,
    direction: u8,
}

impl Derivation {
    pub(super) fn new(secret: &[u8; KEY_LEN], cipher: Cipher, direction: u8) -> Self {
        let prk = Salt::new(HKDF_SHA256, KEY_SALT).extract(secret);
        Self { prk, cipher, direction }
    }

    pub(super) fn bytes(&self, lane: u8) -> Result<Zeroizing<[u8; KEY_LEN]>, SessionError> {
        let mut key = Zeroizing::new([0; KEY_LEN]);
        let info = [KEY_LABEL, &[self.cipher.number(), self.direction, lane]];
        self.prk
            .expand(&info, HKDF_SHA256)
            .and_then(|okm| okm.fill(key.as_mut()))
            .map_err(|_| SessionError::Derivation)?;
        Ok(key)
    }

    pub(super) fn key(&self, lane: u8) -> Result<LessSafeKey, SessionError> {
        UnboundKey::new(self.cipher.algorithm(), self.bytes(lane)?.as_ref())
            .map(LessSafeKey::new)
            .map_err(|_| SessionError::Derivation)
    }
}
