//! The two message authentication codes of a handshake message, which cost no public-key operation:
//! mac1 and mac2 of WireGuard (sections 5.3 and 5.4.7 of its paper), with HMAC-SHA256 truncated to
//! 16 bytes instead of BLAKE2s.
//!
//! mac1 proves that the sender knows the receiver's public key, which is the key of the code. mac2
//! is required only under load and proves that the sender receives at its source address. Its key
//! is a cookie: a code of that address, which the receiver can compute again without state.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use aws_lc_rs::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::{constant_time, digest, hmac};
use zeroize::Zeroizing;

use crate::keys::{KEY_LEN, PublicKey};
use crate::wire::header::TAG_LEN;

/// Length of mac1, mac2 and a cookie in bytes.
pub(crate) const MAC_LEN: usize = 16;
/// Length of the random salt of a cookie reply in bytes.
pub(crate) const SALT_LEN: usize = 32;
/// Length of an encrypted cookie in bytes.
pub(crate) const SEALED_LEN: usize = MAC_LEN + TAG_LEN;
/// Validity of a cookie, and age at which the secret of the cookies is replaced.
pub(crate) const COOKIE_LIFETIME: Duration = Duration::from_secs(120);

/// Maximum number of initiations that are remembered as granted under one secret: 10,000 nodes that
/// start six handshakes each, about 2 MiB.
const MAX_GRANTED: usize = 65_536;

/// Value of mac1, mac2 or a cookie.
pub(crate) type Mac = [u8; MAC_LEN];

/// Keys of the codes of messages to one receiver, derived from its public key.
pub(crate) struct MacKeys {
    mac1: hmac::Key,
    cookie: hmac::Key,
}

impl MacKeys {
    /// Derives the keys for the receiver with this public key.
    pub(crate) fn new(public: &PublicKey) -> Self {
        let key = |label: &[u8]| {
            let key =
                digest::digest(&digest::SHA256, &[label, public.as_bytes().as_slice()].concat());
            hmac::Key::new(hmac::HMAC_SHA256, key.as_ref())
        };
        Self { mac1: key(b"skein v1 mac1"), cookie: key(b"skein v1 cookie") }
    }

    /// Returns mac1 of a message. `input` is the part of the message before mac1.
    pub(crate) fn mac1(&self, input: &[u8]) -> Mac {
        mac(&self.mac1, &[input])
    }

    /// Returns true if `check` is mac1 of the message whose part before mac1 is `input`. The
    /// comparison takes constant time.
    pub(crate) fn verify_mac1(&self, input: &[u8], check: &[u8]) -> bool {
        equal(&self.mac1(input), check)
    }

    /// Encrypts a cookie for the sender of the message with this mac1. `salt` must be random,
    /// because the AEAD key is derived from it.
    pub(crate) fn seal_cookie(
        &self,
        cookie: &Mac,
        salt: &[u8; SALT_LEN],
        mac1: &Mac,
    ) -> Option<[u8; SEALED_LEN]> {
        let mut sealed = [0; SEALED_LEN];
        let (ciphertext, tag) = sealed.split_at_mut(MAC_LEN);
        let (nonce, aad) = (Nonce::assume_unique_for_key([0; 12]), Aad::from(mac1));
        let key = self.cookie_aead(salt)?;
        key.seal_out_of_place_scatter(nonce, aad, cookie, ciphertext, &[], tag).ok()?;
        Some(sealed)
    }

    /// Decrypts a cookie that answers the message with this mac1. Returns `None` if the tag is
    /// wrong.
    pub(crate) fn open_cookie(
        &self,
        salt: &[u8; SALT_LEN],
        sealed: &[u8; SEALED_LEN],
        mac1: &Mac,
    ) -> Option<Mac> {
        let mut cookie = Mac::default();
        let (ciphertext, tag) = sealed.split_at(MAC_LEN);
        let (nonce, aad) = (Nonce::assume_unique_for_key([0; 12]), Aad::from(mac1));
        let key = self.cookie_aead(salt)?;
        key.open_separate_gather(nonce, aad, ciphertext, tag, &mut cookie).ok()?;
        Some(cookie)
    }

    fn cookie_aead(&self, salt: &[u8; SALT_LEN]) -> Option<LessSafeKey> {
        let key = hmac::sign(&self.cookie, salt);
        UnboundKey::new(&CHACHA20_POLY1305, key.as_ref()).ok().map(LessSafeKey::new)
    }
}

/// Returns mac2 of a message. `input` is the part of the message before mac2.
pub(crate) fn mac2(cookie: &Mac, input: &[u8]) -> Mac {
    mac(&hmac::Key::new(hmac::HMAC_SHA256, cookie), &[input])
}

/// mac2 of an initiation, with the values that it is computed from.
pub(crate) struct Mac2Check<'a> {
    /// Address that the initiation came from.
    pub(crate) source: SocketAddr,
    /// Address at which the sender claims to receive.
    pub(crate) answer_to: SocketAddr,
    /// Bytes that mac2 covers.
    pub(crate) input: &'a [u8],
    pub(crate) mac2: &'a Mac,
}

/// The secret from which the cookies of this node are derived, replaced after [`COOKIE_LIFETIME`].
#[derive(Default)]
pub(crate) struct CookieSecret {
    current: Option<(hmac::Key, Duration)>,
    /// mac2 of each initiation that was granted a public-key operation under this secret.
    granted: BTreeSet<Mac>,
}

impl CookieSecret {
    /// Returns the cookie of a source that receives at `answer_to`. Draws a new secret if there is
    /// none or the current one is too old. The cookie covers the port at which the source claims to
    /// receive, so a sender that only shares a node's address gets no cookie for that node's port.
    pub(crate) fn cookie(
        &mut self,
        source: SocketAddr,
        answer_to: SocketAddr,
        now: Duration,
        random: &mut dyn FnMut(&mut [u8]),
    ) -> Mac {
        let fresh = |&(_, at): &(_, Duration)| now.saturating_sub(at) < COOKIE_LIFETIME;
        let (key, _) = match self.current.take().filter(fresh) {
            Some(current) => self.current.insert(current),
            None => {
                self.granted.clear();
                let mut secret = Zeroizing::new([0; KEY_LEN]);
                random(secret.as_mut());
                self.current.insert((hmac::Key::new(hmac::HMAC_SHA256, secret.as_ref()), now))
            }
        };
        let octets = |address: SocketAddr| match address.ip().to_canonical() {
            IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
            IpAddr::V6(v6) => v6.octets(),
        };
        let (from, to) = (octets(source), octets(answer_to));
        let ports = [source.port().to_be_bytes(), answer_to.port().to_be_bytes()].concat();
        mac(key, &[&from, &to, &ports])
    }

    /// Returns true if `check.mac2` is the mac2 of the message under the cookie of its source.
    pub(crate) fn verify(
        &mut self,
        check: Mac2Check<'_>,
        now: Duration,
        random: &mut dyn FnMut(&mut [u8]),
    ) -> bool {
        // Zeros stand for a message without mac2.
        let is_present = *check.mac2 != [0; MAC_LEN];
        is_present && {
            let cookie = self.cookie(check.source, check.answer_to, now, random);
            equal(&mac2(&cookie, check.input), check.mac2)
        }
    }

    /// Returns true if an initiation with this mac2 was granted a public-key operation under the
    /// current secret. Another initiation with the same mac2 is a replay.
    pub(crate) fn is_granted(&self, mac2: &Mac) -> bool {
        self.granted.contains(mac2)
    }

    /// Remembers an initiation that was granted a public-key operation. At [`MAX_GRANTED`]
    /// initiations the secret is discarded instead, because a forgotten initiation must not have a
    /// valid cookie.
    pub(crate) fn grant(&mut self, mac2: Mac) {
        if self.granted.len() >= MAX_GRANTED {
            self.granted.clear();
            self.current = None;
            return;
        }
        self.granted.insert(mac2);
    }
}

fn mac(key: &hmac::Key, parts: &[&[u8]]) -> Mac {
    let mut context = hmac::Context::with_key(key);
    parts.iter().for_each(|part| context.update(part));
    let mut out = Mac::default();
    for (to, from) in out.iter_mut().zip(context.sign().as_ref()) {
        *to = *from;
    }
    out
}

fn equal(a: &[u8], b: &[u8]) -> bool {
    constant_time::verify_slices_are_equal(a, b).is_ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// Expected value computed with Python's hmac and hashlib.
    #[test]
    fn mac1_matches_reference_value() {
        let keys = MacKeys::new(&PublicKey::new([9; 32]));
        let check: String = keys.mac1(b"message").iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(check, "c7dcf95d06c6387f040f348fea0c578c");
        assert!(keys.verify_mac1(b"message", &keys.mac1(b"message")));
        assert!(!keys.verify_mac1(b"massage", &keys.mac1(b"message")));
        assert!(!keys.verify_mac1(b"message", &[]));
        assert!(
            !MacKeys::new(&PublicKey::new([8; 32])).verify_mac1(b"message", &keys.mac1(b"message"))
        );
    }

    #[test]
    fn cookie_opens_only_for_the_message_it_answers() {
        let keys = MacKeys::new(&PublicKey::new([9; 32]));
        let (cookie, salt) = ([1; MAC_LEN], [2; SALT_LEN]);
        let sealed = keys.seal_cookie(&cookie, &salt, &[3; MAC_LEN]).unwrap();
        assert_eq!(keys.open_cookie(&salt, &sealed, &[3; MAC_LEN]), Some(cookie));
        assert_eq!(keys.open_cookie(&salt, &sealed, &[4; MAC_LEN]), None);
        assert_eq!(keys.open_cookie(&[0; SALT_LEN], &sealed, &[3; MAC_LEN]), None);
        for i in 0..SEALED_LEN {
            let mut forged = sealed;
            forged[i] ^= 1;
            assert_eq!(keys.open_cookie(&salt, &forged, &[3; MAC_LEN]), None);
        }
    }

    #[test]
    fn cookie_depends_on_addresses_and_time() {
        let mut secret = CookieSecret::default();
        let mut drawn = 0;
        let mut random = |out: &mut [u8]| {
            drawn += 1;
            out.fill(drawn);
        };
        let source: SocketAddr = "192.0.2.1:5".parse().unwrap();
        let other_port: SocketAddr = "192.0.2.1:6".parse().unwrap();
        let other_host: SocketAddr = "192.0.2.2:5".parse().unwrap();
        let mapped: SocketAddr = "[::ffff:192.0.2.1]:5".parse().unwrap();
        let at = Duration::from_secs;
        let cookie = secret.cookie(source, source, at(1), &mut random);
        assert_eq!(secret.cookie(mapped, mapped, at(120), &mut random), cookie);
        for (from, to) in [
            (other_port, source),
            (source, other_port),
            (other_host, other_host),
            (other_host, source),
        ] {
            assert_ne!(secret.cookie(from, to, at(120), &mut random), cookie, "{from} {to}");
        }
        let check = mac2(&cookie, b"message");
        let mut verify = |source, message: &[u8], check: &Mac, seconds| {
            let check = Mac2Check { source, answer_to: source, input: message, mac2: check };
            secret.verify(check, at(seconds), &mut random)
        };
        assert!(verify(source, b"message", &check, 120));
        assert!(!verify(source, b"massage", &check, 120));
        assert!(!verify(other_host, b"message", &check, 120));
        assert!(!verify(source, b"message", &[0; MAC_LEN], 120));
        assert!(!verify(source, b"message", &check, 121), "rotated");
        assert_eq!(drawn, 2);
    }

    #[test]
    fn granted_initiations_are_known_until_new_secret() {
        let mut secret = CookieSecret::default();
        let mut drawn = 0;
        let mut random = |out: &mut [u8]| {
            drawn += 1;
            out.fill(drawn);
        };
        let source: SocketAddr = "192.0.2.1:5".parse().unwrap();
        let at = Duration::from_secs;
        let first = secret.cookie(source, source, at(1), &mut random);
        secret.grant([7; MAC_LEN]);
        secret.cookie(source, source, at(120), &mut random);
        assert!(secret.is_granted(&[7; MAC_LEN]), "The secret is the same.");
        assert!(!secret.is_granted(&[8; MAC_LEN]), "This initiation was not granted.");
        let second = secret.cookie(source, source, at(121), &mut random);
        assert!(!secret.is_granted(&[7; MAC_LEN]), "The new secret makes the cookie invalid.");
        for number in 0..=MAX_GRANTED as u128 {
            secret.grant(number.to_be_bytes());
        }
        assert!(secret.granted.len() <= MAX_GRANTED, "The set is bounded.");
        let third = secret.cookie(source, source, at(122), &mut random);
        assert_ne!(first, second, "A secret is good for 120 s.");
        assert_ne!(second, third, "A full set discards the secret.");
    }
}
