//! Noise IK (revision 34 of the Noise protocol), by snow's state machine over aws-lc's primitives.
//!
//! The suite is fixed: `Noise_IK_25519_ChaChaPoly_SHA256`. ChaCha20-Poly1305 here says nothing of
//! the cipher of the data, which the two ends choose by what they have in hardware; two messages
//! every two minutes are not worth a second suite. Of snow's state machine only the handshake is
//! used: the data's keys come from its split, and counters, windows and rekeying are ours.

use aws_lc_rs::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::agreement::{PrivateKey, UnparsedPublicKey, X25519, agree};
use aws_lc_rs::digest;
use snow::params::{CipherChoice, DHChoice, HashChoice, NoiseParams};
use snow::resolvers::CryptoResolver;
use snow::types::{Cipher, Dh, Hash, Random};
use snow::{Builder, Error, HandshakeState};
use zeroize::Zeroizing;

use crate::wire::header::TAG_LEN;

/// Length of a private or public key in bytes.
pub(crate) const KEY_LEN: usize = 32;
/// What message 1 is longer than its payload: ephemeral key, sealed static key, tag.
pub(crate) const INITIATION_OVERHEAD: usize = KEY_LEN + (KEY_LEN + TAG_LEN) + TAG_LEN;
/// What message 2 is longer than its payload: ephemeral key, tag.
pub(crate) const RESPONSE_OVERHEAD: usize = KEY_LEN + TAG_LEN;

const SUITE: &str = "Noise_IK_25519_ChaChaPoly_SHA256";

/// 32 secret bytes.
pub(crate) type Secret = Zeroizing<[u8; KEY_LEN]>;
/// The key of what the initiator sends, then of what the responder sends.
pub(crate) type Split = [Secret; 2];

/// A handshake message that is not what it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NoiseError;

impl From<Error> for NoiseError {
    fn from(_: Error) -> Self {
        NoiseError
    }
}

/// This node's key pair, and what both ends of a handshake must agree on beforehand.
pub(crate) struct Identity {
    private: Secret,
    public: [u8; KEY_LEN],
    prologue: Vec<u8>,
}

impl Identity {
    /// `None` where `private` is no key.
    pub(crate) fn new(private: Secret, prologue: Vec<u8>) -> Option<Self> {
        let mut pair = X25519Pair::default();
        pair.set(private.as_ref());
        pair.key.as_ref()?;
        Some(Self { private, public: pair.public, prologue })
    }

    /// The public half.
    pub(crate) fn public(&self) -> &[u8; KEY_LEN] {
        &self.public
    }

    /// `clear`, what went with the handshake's first message unencrypted, is bound to it by joining
    /// the prologue.
    fn builder<'a>(
        &'a self,
        prologue: &'a [u8],
        ephemeral: Secret,
    ) -> Result<Builder<'a>, NoiseError> {
        let params: NoiseParams = SUITE.parse()?;
        let builder = Builder::with_resolver(params, Box::new(Resolver { ephemeral }));
        Ok(builder.local_private_key(self.private.as_ref())?.prologue(prologue)?)
    }

    fn prologue(&self, clear: &[u8]) -> Vec<u8> {
        [&self.prologue, clear].concat()
    }
}

/// A handshake that this node started.
pub(crate) struct Initiator(HandshakeState);

impl Initiator {
    /// Appends message 1 to `out`.
    pub(crate) fn start(
        identity: &Identity,
        responder: &[u8; KEY_LEN],
        ephemeral: Secret,
        clear: &[u8],
        payload: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<Self, NoiseError> {
        let prologue = identity.prologue(clear);
        let builder = identity.builder(&prologue, ephemeral)?;
        let mut state = builder.remote_public_key(responder)?.build_initiator()?;
        append(&mut state, payload, INITIATION_OVERHEAD, out)?;
        Ok(Self(state))
    }

    /// Reads message 2: its payload's length, and the keys. A message that fails changes nothing:
    /// the real one may still come.
    pub(crate) fn finish(
        &mut self,
        message: &[u8],
        payload: &mut [u8],
    ) -> Result<(usize, Split), NoiseError> {
        let length = self.0.read_message(message, payload)?;
        Ok((length, split(&mut self.0)?))
    }
}

/// A handshake that another node started, its message 1 read.
pub(crate) struct Responder {
    state: HandshakeState,
    /// The initiator's proven public key.
    pub(crate) initiator: [u8; KEY_LEN],
}

impl Responder {
    /// Reads message 1: the handshake, and its payload's length.
    pub(crate) fn read(
        identity: &Identity,
        ephemeral: Secret,
        clear: &[u8],
        message: &[u8],
        payload: &mut [u8],
    ) -> Result<(Self, usize), NoiseError> {
        let prologue = identity.prologue(clear);
        let mut state = identity.builder(&prologue, ephemeral)?.build_responder()?;
        let length = state.read_message(message, payload)?;
        let initiator = state.get_remote_static().ok_or(NoiseError)?;
        let initiator = initiator.try_into().map_err(|_| NoiseError)?;
        Ok((Self { state, initiator }, length))
    }

    /// Appends message 2 to `out`.
    pub(crate) fn reply(mut self, payload: &[u8], out: &mut Vec<u8>) -> Result<Split, NoiseError> {
        append(&mut self.state, payload, RESPONSE_OVERHEAD, out)?;
        split(&mut self.state)
    }
}

fn append(
    state: &mut HandshakeState,
    payload: &[u8],
    overhead: usize,
    out: &mut Vec<u8>,
) -> Result<(), NoiseError> {
    let start = out.len();
    out.resize(start + overhead + payload.len(), 0);
    let written = state.write_message(payload, &mut out[start..])?;
    if start + written != out.len() {
        return Err(NoiseError);
    }
    Ok(())
}

fn split(state: &mut HandshakeState) -> Result<Split, NoiseError> {
    // The raw split itself does not look.
    if !state.is_handshake_finished() {
        return Err(NoiseError);
    }
    let (forward, back) = state.dangerously_get_raw_split();
    Ok([Zeroizing::new(forward), Zeroizing::new(back)])
}

/// Hands aws-lc's primitives to snow, and the one ephemeral key that the caller drew.
struct Resolver {
    ephemeral: Secret,
}

impl CryptoResolver for Resolver {
    fn resolve_rng(&self) -> Option<Box<dyn Random>> {
        Some(Box::new(Ephemeral(Some(self.ephemeral.clone()))))
    }

    fn resolve_dh(&self, choice: &DHChoice) -> Option<Box<dyn Dh>> {
        match choice {
            DHChoice::Curve25519 => Some(Box::new(X25519Pair::default())),
            _ => None,
        }
    }

    fn resolve_hash(&self, choice: &HashChoice) -> Option<Box<dyn Hash>> {
        match choice {
            HashChoice::SHA256 => Some(Box::new(Sha256(digest::Context::new(&digest::SHA256)))),
            _ => None,
        }
    }

    fn resolve_cipher(&self, choice: &CipherChoice) -> Option<Box<dyn Cipher>> {
        match choice {
            CipherChoice::ChaChaPoly => Some(Box::new(ChaChaPoly(None))),
            _ => None,
        }
    }
}

/// A source of randomness that is spent after one key.
struct Ephemeral(Option<Secret>);

impl Random for Ephemeral {
    fn try_fill_bytes(&mut self, dest: &mut [u8]) -> Result<(), Error> {
        let key = self.0.take().filter(|key| key.len() == dest.len()).ok_or(Error::Rng)?;
        dest.copy_from_slice(key.as_ref());
        Ok(())
    }
}

/// Diffie-Hellman on Curve25519 (RFC 7748).
#[derive(Default)]
struct X25519Pair {
    key: Option<PrivateKey>,
    private: Secret,
    public: [u8; KEY_LEN],
}

impl Dh for X25519Pair {
    fn name(&self) -> &'static str {
        "25519"
    }

    fn pub_len(&self) -> usize {
        KEY_LEN
    }

    fn priv_len(&self) -> usize {
        KEY_LEN
    }

    /// Without a key afterwards where `private` is none: `dh` then fails.
    fn set(&mut self, private: &[u8]) {
        *self = Self::default();
        let Ok(key) = PrivateKey::from_private_key(&X25519, private) else { return };
        let Ok(public) = key.compute_public_key() else { return };
        if public.as_ref().len() == KEY_LEN && private.len() == KEY_LEN {
            self.public.copy_from_slice(public.as_ref());
            self.private.copy_from_slice(private);
            self.key = Some(key);
        }
    }

    fn generate(&mut self, rng: &mut dyn Random) -> Result<(), Error> {
        let mut private = Secret::default();
        rng.try_fill_bytes(private.as_mut())?;
        self.set(private.as_ref());
        self.key.as_ref().map(|_| ()).ok_or(Error::Rng)
    }

    fn pubkey(&self) -> &[u8] {
        &self.public
    }

    fn privkey(&self) -> &[u8] {
        self.private.as_ref()
    }

    /// Fails on a point of low order, whose product is zero whatever the private key.
    fn dh(&self, public: &[u8], out: &mut [u8]) -> Result<(), Error> {
        let key = self.key.as_ref().ok_or(Error::Dh)?;
        let public = UnparsedPublicKey::new(&X25519, public.get(..KEY_LEN).ok_or(Error::Dh)?);
        let out = out.get_mut(..KEY_LEN).ok_or(Error::Dh)?;
        agree(key, public, Error::Dh, |product| {
            if product.len() != KEY_LEN {
                return Err(Error::Dh);
            }
            out.copy_from_slice(product);
            Ok(())
        })
    }
}

struct Sha256(digest::Context);

impl Hash for Sha256 {
    fn name(&self) -> &'static str {
        "SHA256"
    }

    fn block_len(&self) -> usize {
        64
    }

    fn hash_len(&self) -> usize {
        32
    }

    fn reset(&mut self) {
        self.0 = digest::Context::new(&digest::SHA256);
    }

    fn input(&mut self, data: &[u8]) {
        self.0.update(data);
    }

    fn result(&mut self, out: &mut [u8]) {
        let context = std::mem::replace(&mut self.0, digest::Context::new(&digest::SHA256));
        if let Some(out) = out.get_mut(..32) {
            out.copy_from_slice(context.finish().as_ref());
        }
    }
}

/// ChaCha20-Poly1305 (RFC 8439) with Noise's nonces: four zero bytes, the number little endian.
struct ChaChaPoly(Option<LessSafeKey>);

impl ChaChaPoly {
    fn nonce(number: u64) -> Nonce {
        let mut bytes = [0; 12];
        bytes[4..].copy_from_slice(&number.to_le_bytes());
        Nonce::assume_unique_for_key(bytes)
    }
}

impl Cipher for ChaChaPoly {
    fn name(&self) -> &'static str {
        "ChaChaPoly"
    }

    fn set(&mut self, key: &[u8; KEY_LEN]) {
        self.0 = UnboundKey::new(&CHACHA20_POLY1305, key).ok().map(LessSafeKey::new);
    }

    /// snow has no way to hear of a failure here, so the message comes out short: [`append`]
    /// notices, and nothing of the plaintext was written.
    fn encrypt(&self, nonce: u64, authtext: &[u8], plaintext: &[u8], out: &mut [u8]) -> usize {
        let mut sealed = || {
            let out = out.get_mut(..plaintext.len() + TAG_LEN)?;
            let (ciphertext, tag) = out.split_at_mut(plaintext.len());
            let (nonce, aad) = (Self::nonce(nonce), Aad::from(authtext));
            let key = self.0.as_ref()?;
            key.seal_out_of_place_scatter(nonce, aad, plaintext, ciphertext, &[], tag).ok()?;
            Some(plaintext.len() + TAG_LEN)
        };
        sealed().unwrap_or(0)
    }

    fn decrypt(
        &self,
        nonce: u64,
        authtext: &[u8],
        ciphertext: &[u8],
        out: &mut [u8],
    ) -> Result<usize, Error> {
        let length = ciphertext.len().checked_sub(TAG_LEN).ok_or(Error::Decrypt)?;
        let (ciphertext, tag) = ciphertext.split_at(length);
        let out = out.get_mut(..length).ok_or(Error::Decrypt)?;
        let (nonce, aad) = (Self::nonce(nonce), Aad::from(authtext));
        let key = self.0.as_ref().ok_or(Error::Decrypt)?;
        key.open_separate_gather(nonce, aad, ciphertext, tag, out).map_err(|_| Error::Decrypt)?;
        Ok(length)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn hex(text: &str) -> Vec<u8> {
        (0..text.len())
            .step_by(2)
            .map(|i| u8::from_str_radix(&text[i..i + 2], 16).unwrap())
            .collect()
    }

    fn key(text: &str) -> Secret {
        Zeroizing::new(hex(text).try_into().unwrap())
    }

    /// The vector of cacophony (the Noise implementation in Haskell) for this suite: every byte of
    /// both messages, and the transport keys by what they seal.
    #[test]
    fn published_vector() {
        let prologue = hex("4a6f686e2047616c74");
        let (start, end) = prologue.split_at(4);
        let us = "e61ef9919cde45dd5f82166404bd08e38bceb5dfdfded0a34c8df7ed542214d1";
        let them = "4a3acbfdb163dec651dfa3194dece676d437029c62a408b4c5ea9114246e4893";
        let initiator = Identity::new(key(us), start.to_vec()).unwrap();
        let responder = Identity::new(key(them), start.to_vec()).unwrap();
        let public = "31e0303fd6418d2f8c0e78b91f22e8caed0fbe48656dcf4767e4834f701b8f62";
        assert_eq!(responder.public()[..], hex(public));

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
        for (secret, (plain, sealed)) in ours.iter().zip(sealed_by) {
            let mut cipher = ChaChaPoly(None);
            cipher.set(secret);
            let mut out = [0; 64];
            let n = cipher.encrypt(0, &[], &hex(plain), &mut out);
            assert_eq!(out[..n], hex(sealed));
        }
    }

    /// RFC 7748, section 6.1.
    #[test]
    fn diffie_hellman_vector() {
        let mut bob = X25519Pair::default();
        bob.set(&hex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb"));
        let public = "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f";
        assert_eq!(bob.pubkey(), hex(public));
        let alice = hex("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a");
        let mut shared = [0; 56];
        bob.dh(&alice, &mut shared).unwrap();
        let expected = "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742";
        assert_eq!(shared[..32], hex(expected));
        assert_eq!(shared[32..], [0; 24]);
        // Points of low order: 0, 1, and p - 1 (RFC 7748, section 7).
        let last = hex("ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f");
        let one: Vec<u8> = (0..32).map(|i| u8::from(i == 0)).collect();
        for point in [vec![0; 32], one, last] {
            assert!(bob.dh(&point, &mut shared).is_err(), "{point:?}");
        }
    }

    /// FIPS 180-2's example, and RFC 4231's test case 2 for the HMAC that snow builds on it.
    #[test]
    fn hash_vectors() {
        let mut hash = Sha256(digest::Context::new(&digest::SHA256));
        let mut out = [0; 32];
        hash.input(b"to be forgotten");
        hash.reset();
        hash.input(b"ab");
        hash.input(b"c");
        hash.result(&mut out);
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(out[..], hex(expected));
        hash.hmac(b"Jefe", b"what do ya want for nothing?", &mut out);
        let expected = "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843";
        assert_eq!(out[..], hex(expected));
    }

    /// What the published handshake cannot show, as its numbers are all zero: nonces are little
    /// endian, and everything that can be wrong fails.
    #[test]
    fn cipher_consistency() {
        let mut cipher = ChaChaPoly(None);
        assert_eq!(cipher.encrypt(0, b"ad", b"text", &mut [0; 20]), 0, "no key");
        cipher.set(&[7; 32]);
        assert_eq!(cipher.encrypt(0, b"ad", b"text", &mut [0; 19]), 0, "no room");
        let (mut sealed, mut opened) = ([0; 20], [0; 4]);
        assert_eq!(cipher.encrypt(0x0102, b"ad", b"text", &mut sealed), 20);
        assert_eq!(cipher.decrypt(0x0102, b"ad", &sealed, &mut opened), Ok(4));
        assert_eq!(&opened, b"text");
        assert!(cipher.decrypt(0x0201, b"ad", &sealed, &mut opened).is_err());
        assert!(cipher.decrypt(0x0102, b"da", &sealed, &mut opened).is_err());
        assert!(cipher.decrypt(0x0102, b"ad", &sealed[..15], &mut opened).is_err());
        assert!(cipher.decrypt(0x0102, b"ad", &sealed, &mut opened[..3]).is_err());

        let key = LessSafeKey::new(UnboundKey::new(&CHACHA20_POLY1305, &[7; 32]).unwrap());
        let nonce = Nonce::assume_unique_for_key([0, 0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(key.open_in_place(nonce, Aad::from(b"ad"), &mut sealed).unwrap(), b"text");
    }

    #[test]
    fn messages_of_another_cluster_or_with_other_clear_bytes_do_not_open() {
        let a = Identity::new(Zeroizing::new([1; 32]), b"one".to_vec()).unwrap();
        let b = Identity::new(Zeroizing::new([2; 32]), b"one".to_vec()).unwrap();
        let c = Identity::new(Zeroizing::new([2; 32]), b"two".to_vec()).unwrap();
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
        assert!(!result(&b, b"clear", &mut read[..4]), "no room for the payload");
    }

    #[test]
    fn keys_come_only_from_a_finished_handshake() {
        let a = Identity::new(Zeroizing::new([1; 32]), Vec::new()).unwrap();
        let mut first = Vec::new();
        let secret = Zeroizing::new([3; 32]);
        let mut state = Initiator::start(&a, &[9; 32], secret, &[], &[], &mut first).unwrap();
        assert_eq!(split(&mut state.0), Err(NoiseError));
    }
}
