//! Adapters of aws-lc's primitives to the traits of snow.

use aws_lc_rs::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::agreement::{PrivateKey, UnparsedPublicKey, X25519, agree};
use aws_lc_rs::digest;
use snow::Error;
use snow::params::{CipherChoice, DHChoice, HashChoice};
use snow::resolvers::CryptoResolver;
use snow::types::{Cipher, Dh, Hash, Random};

use crate::keys::KEY_LEN;
use crate::tunnel::noise::Secret;
use crate::wire::header::TAG_LEN;

/// Resolver that gives snow the primitives of aws-lc. The only random value that snow gets is the
/// ephemeral key, which the caller generates.
pub(crate) struct Resolver {
    ephemeral: Secret,
}

impl Resolver {
    pub(crate) fn new(ephemeral: Secret) -> Self {
        Self { ephemeral }
    }
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
            CipherChoice::ChaChaPoly => Some(Box::new(ChaChaPoly::default())),
            _ => None,
        }
    }
}

/// Random source that yields one key and then fails.
struct Ephemeral(Option<Secret>);

impl Random for Ephemeral {
    fn try_fill_bytes(&mut self, dest: &mut [u8]) -> Result<(), Error> {
        let key = self.0.take().filter(|key| key.len() == dest.len()).ok_or(Error::Rng)?;
        dest.copy_from_slice(key.as_ref());
        Ok(())
    }
}

/// Diffie-Hellman function on Curve25519 (RFC 7748).
#[derive(Default)]
pub(crate) struct X25519Pair {
    key: Option<PrivateKey>,
    private: Secret,
    public: [u8; KEY_LEN],
}

impl X25519Pair {
    /// Returns the public key if a private key is set.
    pub(crate) fn public(&self) -> Option<&[u8; KEY_LEN]> {
        self.key.as_ref().map(|_| &self.public)
    }
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

    /// Sets the private key. An invalid key unsets it, and `dh` fails afterwards.
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

    /// Computes the shared secret. Fails for a point of low order, whose product is zero for every
    /// private key.
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

/// ChaCha20-Poly1305 (RFC 8439) with the nonces of Noise: four zero bytes, then the number in
/// little endian.
#[derive(Default)]
pub(crate) struct ChaChaPoly(Option<LessSafeKey>);

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

    /// Encrypts and returns the length of the output. The trait cannot report an error, so a
    /// failure returns 0, and the handshake detects the wrong length. No plaintext is written then.
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
pub(crate) mod tests {
    use super::*;

    pub(crate) fn hex(text: &str) -> Vec<u8> {
        (0..text.len())
            .step_by(2)
            .map(|i| u8::from_str_radix(&text[i..i + 2], 16).unwrap())
            .collect()
    }

    /// Test vector of RFC 7748, section 6.1.
    #[test]
    fn diffie_hellman_matches_rfc_7748() {
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

    /// Examples of FIPS 180-2, and test case 2 of RFC 4231 for the HMAC that snow builds on the
    /// hash.
    #[test]
    fn sha256_and_hmac_match_published_vectors() {
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

    /// The test vector in `handshake_matches_cacophony_vector` has no nonce other than 0. This test
    /// therefore uses another nonce, which must be little endian. Wrong inputs must fail.
    #[test]
    fn cipher_uses_little_endian_nonces_and_rejects_errors() {
        let mut cipher = ChaChaPoly::default();
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
}
