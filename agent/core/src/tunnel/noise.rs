//! The Noise IK handshake (revision 34 of the Noise protocol framework) with snow's state machine
//! and the primitives of aws-lc.
//!
//! The suite is always `Noise_IK_25519_ChaChaPoly_SHA256`. Its AEAD is independent of the cipher
//! for data, which both nodes negotiate, because two messages every two minutes do not justify a
//! second suite. Only the handshake of snow is used. Keys for data are derived from the split;
//! counters, replay windows and rekeying are Skein's own.
//!
//! snow does not wipe its handshake states, from whose chaining key the keys of a session follow.
//! [`State`] therefore overwrites them.

use std::fmt;
use std::hint::black_box;

use snow::params::NoiseParams;
use snow::{Builder, Error, HandshakeState};
use zeroize::Zeroizing;

use crate::keys::{KEY_LEN, PrivateKey, PublicKey};
use crate::tunnel::primitives::Resolver;
use crate::wire::header::TAG_LEN;

/// Length of message 1 beyond its payload in bytes: ephemeral key, encrypted static key with tag,
/// tag of the payload.
pub(crate) const INITIATION_OVERHEAD: usize = KEY_LEN + (KEY_LEN + TAG_LEN) + TAG_LEN;
/// Length of message 2 beyond its payload in bytes: ephemeral key, tag of the payload.
pub(crate) const RESPONSE_OVERHEAD: usize = KEY_LEN + TAG_LEN;

const SUITE: &str = "Noise_IK_25519_ChaChaPoly_SHA256";
/// Suite of the states that overwrite used states. The handshake of this suite needs no keys.
const BLANK_SUITE: &str = "Noise_NN_25519_ChaChaPoly_SHA256";

/// A secret of 32 bytes, wiped on drop.
pub(crate) type Secret = Zeroizing<[u8; KEY_LEN]>;
/// Secrets of the two directions: from initiator to responder, and back.
#[derive(Clone, PartialEq, Eq)]
pub struct TransportSecrets {
    /// Secret of the datagrams that the initiator sends.
    pub from_initiator: Zeroizing<[u8; KEY_LEN]>,
    /// Secret of the datagrams that the responder sends.
    pub from_responder: Zeroizing<[u8; KEY_LEN]>,
}

impl TransportSecrets {
    /// Creates the secrets from their bytes.
    pub fn new(from_initiator: [u8; KEY_LEN], from_responder: [u8; KEY_LEN]) -> Self {
        Self {
            from_initiator: Zeroizing::new(from_initiator),
            from_responder: Zeroizing::new(from_responder),
        }
    }
}

impl fmt::Debug for TransportSecrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TransportSecrets(..)")
    }
}

/// A handshake message is malformed, does not decrypt, or does not fit its buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("invalid Noise message")]
pub(crate) struct NoiseError;

impl From<Error> for NoiseError {
    fn from(_: Error) -> Self {
        NoiseError
    }
}

/// A key pair of this node, and the prologue of its handshakes.
pub(crate) struct Identity {
    private: PrivateKey,
    public: PublicKey,
    prologue: Vec<u8>,
}

impl Identity {
    /// Creates an identity. Returns `None` if `private` is not a valid Curve25519 key.
    pub(crate) fn new(private: PrivateKey, prologue: Vec<u8>) -> Option<Self> {
        let public = private.public_key().ok()?;
        Some(Self { private, public, prologue })
    }

    pub(crate) fn public(&self) -> &PublicKey {
        &self.public
    }

    /// Creates a handshake builder with this identity's static key and the one ephemeral key that
    /// the caller drew.
    fn builder<'a>(
        &'a self,
        prologue: &'a [u8],
        ephemeral: Secret,
    ) -> Result<Builder<'a>, NoiseError> {
        let params: NoiseParams = SUITE.parse()?;
        let builder = Builder::with_resolver(params, Box::new(Resolver::new(ephemeral)));
        Ok(builder.local_private_key(self.private.as_bytes())?.prologue(prologue)?)
    }

    fn prologue(&self, clear: &[u8]) -> Vec<u8> {
        [&self.prologue, clear].concat()
    }
}

/// A handshake state of snow, overwritten on drop. It is boxed before it holds secrets, so that a
/// move leaves no copy of them.
struct State(Box<HandshakeState>);

impl State {
    fn initiator(builder: Builder<'_>) -> Result<Self, NoiseError> {
        Ok(Self(Box::new(builder.build_initiator()?)))
    }

    fn responder(builder: Builder<'_>) -> Result<Self, NoiseError> {
        Ok(Self(Box::new(builder.build_responder()?)))
    }

    fn read(&mut self, message: &[u8], payload: &mut [u8]) -> Result<usize, NoiseError> {
        Ok(self.0.read_message(message, payload)?)
    }

    /// Appends a message of `overhead` bytes beyond `payload` to `out`.
    fn append(
        &mut self,
        payload: &[u8],
        overhead: usize,
        out: &mut Vec<u8>,
    ) -> Result<(), NoiseError> {
        let start = out.len();
        out.resize(start + overhead + payload.len(), 0);
        let written = self.0.write_message(payload, &mut out[start..])?;
        if start + written != out.len() {
            return Err(NoiseError);
        }
        Ok(())
    }

    fn split(&mut self) -> Result<TransportSecrets, NoiseError> {
        // snow's raw split does not check that the handshake has finished.
        if !self.0.is_handshake_finished() {
            return Err(NoiseError);
        }
        let (from_initiator, from_responder) = self.0.dangerously_get_raw_split();
        Ok(TransportSecrets::new(from_initiator, from_responder))
    }
}

impl Drop for State {
    fn drop(&mut self) {
        let builder = BLANK_SUITE.parse().map(|params| {
            Builder::with_resolver(params, Box::new(Resolver::new(Secret::default())))
        });
        // Building fails for no input, because the suite is constant.
        if let Ok(Ok(blank)) = builder.map(Builder::build_initiator) {
            *self.0 = blank;
            // Otherwise the compiler may omit writes to memory that is freed next.
            black_box(&mut self.0);
        }
    }
}

/// State of a handshake that this node has initiated.
pub(crate) struct Initiator(State);

impl Initiator {
    /// Starts a handshake and appends message 1 to `out`. The unencrypted bytes `clear` become part
    /// of the prologue, so that the handshake authenticates them.
    ///
    /// # Errors
    /// [`NoiseError`] if the responder's public key has low order.
    pub(crate) fn start(
        identity: &Identity,
        responder: &PublicKey,
        ephemeral: Secret,
        clear: &[u8],
        payload: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<Self, NoiseError> {
        let prologue = identity.prologue(clear);
        let builder = identity.builder(&prologue, ephemeral)?;
        let mut state = State::initiator(builder.remote_public_key(responder.as_bytes())?)?;
        state.append(payload, INITIATION_OVERHEAD, out)?;
        Ok(Self(state))
    }

    /// Reads message 2 and writes its payload to `payload`. Returns the payload's length and the
    /// secrets.
    ///
    /// # Errors
    /// [`NoiseError`] if the message does not decrypt. The state is unchanged then, so that the
    /// genuine message can still arrive.
    pub(crate) fn finish(
        &mut self,
        message: &[u8],
        payload: &mut [u8],
    ) -> Result<(usize, TransportSecrets), NoiseError> {
        let length = self.0.read(message, payload)?;
        Ok((length, self.0.split()?))
    }
}

/// State of a handshake whose message 1 has been read.
pub(crate) struct Responder {
    state: State,
    /// Public key of the initiator; the message proves that its sender has the private key.
    pub(crate) initiator: PublicKey,
}

impl Responder {
    /// Reads message 1 and writes its payload to `payload`. Returns the state and the payload's
    /// length. `clear` are the unencrypted bytes before the message.
    ///
    /// # Errors
    /// [`NoiseError`] if the message does not decrypt.
    pub(crate) fn read(
        identity: &Identity,
        ephemeral: Secret,
        clear: &[u8],
        message: &[u8],
        payload: &mut [u8],
    ) -> Result<(Self, usize), NoiseError> {
        let prologue = identity.prologue(clear);
        let mut state = State::responder(identity.builder(&prologue, ephemeral)?)?;
        let length = state.read(message, payload)?;
        let initiator = state.0.get_remote_static().ok_or(NoiseError)?;
        let initiator: [u8; KEY_LEN] = initiator.try_into().map_err(|_| NoiseError)?;
        let initiator = PublicKey::new(initiator);
        Ok((Self { state, initiator }, length))
    }

    /// Appends message 2 to `out` and returns the secrets.
    ///
    /// # Errors
    /// [`NoiseError`] if the initiator's ephemeral key has low order.
    pub(crate) fn reply(
        mut self,
        payload: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<TransportSecrets, NoiseError> {
        self.state.append(payload, RESPONSE_OVERHEAD, out)?;
        self.state.split()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt as _;

    use aws_lc_rs::hmac::{HMAC_SHA256, Key, sign};
    use snow::types::Cipher;

    use super::*;
    use crate::tunnel::primitives::ChaChaPoly;
    use crate::tunnel::primitives::tests::hex;

    fn private(text: &str) -> PrivateKey {
        PrivateKey::new(&key(text))
    }

    fn key(text: &str) -> Secret {
        Zeroizing::new(hex(text).try_into().unwrap())
    }

    /// Test vector of cacophony, the Noise implementation in Haskell, for this suite. It fixes
    /// every byte of both messages, and the transport keys by two encrypted payloads.
    #[test]
    fn handshake_matches_cacophony_vector() {
        let prologue = hex("4a6f686e2047616c74");
        let (start, end) = prologue.split_at(4);
        let us = "e61ef9919cde45dd5f82166404bd08e38bceb5dfdfded0a34c8df7ed542214d1";
        let them = "4a3acbfdb163dec651dfa3194dece676d437029c62a408b4c5ea9114246e4893";
        let initiator = Identity::new(private(us), start.to_vec()).unwrap();
        let responder = Identity::new(private(them), start.to_vec()).unwrap();
        let public = "31e0303fd6418d2f8c0e78b91f22e8caed0fbe48656dcf4767e4834f701b8f62";
        assert_eq!(responder.public().as_bytes()[..], hex(public));

        let ephemeral = key("893e28b9dc6ca8d611ab664754b8ceb7bac5117349a4439a6b0569da977c464a");
        let payload = hex("4c756477696720766f6e204d69736573");
        let mut first = vec![9];
        let state =
            Initiator::start(&initiator, responder.public(), ephemeral, end, &payload, &mut first);
        let mut state = state.unwrap();
        assert_eq!(
            first[1..],
            hex(
                "ca35def5ae56cec33dc2036731ab14896bc4c75dbb07a61f879f8e3afa4c7944718da798efbcd9152\
                 8520204f904b9bd6c7413dccdc214d951e15253e39987f18146e8cd0873654207148333479d4d16c28\
                 9f0294b29960a72f48e0b7bba2e89083169825e59642148d492020664ccf7"
            )
        );

        let ephemeral = key("bbdb4cdbd309f1a1f2e1456967fe288cadd6f712d65dc7b7793d5e63da6b375b");
        let mut read = [0; 64];
        let (other, n) =
            Responder::read(&responder, ephemeral, end, &first[1..], &mut read).unwrap();
        assert_eq!(read[..n], payload);
        assert_eq!(&other.initiator, initiator.public());
        let mut second = Vec::new();
        let theirs = other.reply(&hex("4d757272617920526f746862617264"), &mut second).unwrap();
        assert_eq!(
            second,
            hex(
                "95ebc60d2b1fa672c1f46a8aa265ef51bfe38e7ccb39ec5be34069f1448088435361e70b2ed446e6c9\
                 ec387d1d6b3b840f194e373979d241b203c4acafccf5"
            )
        );
        let (n, ours) = state.finish(&second, &mut read).unwrap();
        assert_eq!(read[..n], hex("4d757272617920526f746862617264"));
        assert_eq!(ours, theirs);

        let sealed_by = [
            ("462e20412e20486179656b", "050e9f3c8fac16b68dbce8f8c4bfbf6617c897f9ada4aa29aa19c8"),
            ("4361726c204d656e676572", "344233a6cabb7141d80f3da2fedc311d9646bbb0f505afe403a667"),
        ];
        for (secret, (plain, sealed)) in
            [&ours.from_initiator, &ours.from_responder].into_iter().zip(sealed_by)
        {
            let mut cipher = ChaChaPoly::default();
            cipher.set(secret);
            let mut out = [0; 64];
            let n = cipher.encrypt(0, &[], &hex(plain), &mut out);
            assert_eq!(out[..n], hex(sealed));
        }
    }

    #[test]
    fn message_with_other_prologue_or_clear_bytes_fails() {
        let a = Identity::new(PrivateKey::new(&[1; 32]), b"one".to_vec()).unwrap();
        let b = Identity::new(PrivateKey::new(&[2; 32]), b"one".to_vec()).unwrap();
        let c = Identity::new(PrivateKey::new(&[2; 32]), b"two".to_vec()).unwrap();
        let mut first = Vec::new();
        let secret = Zeroizing::new([3; 32]);
        Initiator::start(&a, b.public(), secret.clone(), b"clear", b"hello", &mut first).unwrap();
        let mut read = [0; 64];
        let result = |id: &Identity, clear: &[u8], read: &mut [u8]| {
            Responder::read(id, secret.clone(), clear, &first, read).is_ok()
        };
        assert!(result(&b, b"clear", &mut read));
        assert!(!result(&c, b"clear", &mut read));
        assert!(!result(&b, b"cleaR", &mut read));
        assert!(!result(&a, b"clear", &mut read));
        assert!(
            !result(&b, b"clear", &mut read[..4]),
            "A payload that does not fit its buffer is refused."
        );
    }

    #[test]
    fn secrets_require_finished_handshake() {
        let a = Identity::new(PrivateKey::new(&[1; 32]), Vec::new()).unwrap();
        let mut first = Vec::new();
        let secret = Zeroizing::new([3; 32]);
        let mut state =
            Initiator::start(&a, &PublicKey::new([9; 32]), secret, &[], &[], &mut first).unwrap();
        assert_eq!(state.0.split(), Err(NoiseError));
    }

    /// The bytes of this process at `address`, freed or not.
    fn memory(address: usize, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        let memory = File::open("/proc/self/mem").unwrap();
        memory.read_exact_at(&mut bytes, address as u64).unwrap();
        bytes
    }

    #[test]
    fn chaining_key_is_overwritten_when_state_ends() {
        let a = Identity::new(PrivateKey::new(&[1; 32]), Vec::new()).unwrap();
        let b = Identity::new(PrivateKey::new(&[2; 32]), Vec::new()).unwrap();
        let secret = |byte| Zeroizing::new([byte; 32]);
        let (mut first, mut second, mut read) = (Vec::new(), Vec::new(), [0; 64]);
        let state = Initiator::start(&a, b.public(), secret(3), &[], &[], &mut first);
        let mut state = state.unwrap();
        let (other, _) = Responder::read(&b, secret(4), &[], &first, &mut read).unwrap();
        let forward = other.reply(&[], &mut second).unwrap().from_initiator;
        state.finish(&second, &mut read).unwrap();

        // The session's first secret is HKDF-SHA256 of the chaining key (Noise, section 5.2).
        let is_chaining_key = |window: &[u8]| {
            let key = sign(&Key::new(HMAC_SHA256, window), &[]);
            sign(&Key::new(HMAC_SHA256, key.as_ref()), &[1]).as_ref() == &forward[..]
        };
        let boxed: &HandshakeState = &state.0.0;
        let (address, length) = (std::ptr::from_ref(boxed).addr(), size_of_val(boxed));
        let before = memory(address, length);
        let at = before.windows(KEY_LEN).position(is_chaining_key);
        let at = at.expect("The state holds the chaining key.");
        drop(state);
        let after = memory(address, length);
        assert_ne!(after[at..at + KEY_LEN], before[at..at + KEY_LEN]);
        assert_eq!(after.windows(KEY_LEN).position(is_chaining_key), None);
    }
}
