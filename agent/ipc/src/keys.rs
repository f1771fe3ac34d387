//! Identity of a node: a Curve25519 key pair (RFC 7748). The text form of a key is base64, as in
//! WireGuard.

use std::fmt;
use std::str::FromStr;

use aws_lc_rs::agreement;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Serialize, Serializer};
use thiserror::Error;
use zeroize::Zeroizing;

/// Error of a key in text form or of an operation on a key.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum KeyError {
    /// The text is not standard base64 with padding.
    #[error("key is not base64")]
    Encoding,
    /// The decoded key has this number of bytes instead of 32.
    #[error("key has {0} bytes, expected 32")]
    Length(usize),
    /// The cryptographic library refuses the key, or cannot generate one.
    #[error("key is not a valid Curve25519 key")]
    Value,
}

/// A public key: 32 bytes of a Curve25519 u-coordinate. Not checked to be a point of the curve.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PublicKey(pub [u8; 32]);

/// A private key of 32 bytes in a heap buffer that is wiped on drop. A move copies only the
/// pointer, so that no copy of the key stays on the stack. `Debug` does not print the key.
#[derive(Deserialize)]
#[serde(try_from = "Zeroizing<String>")]
pub struct PrivateKey(Box<Zeroizing<[u8; 32]>>);

impl Clone for PrivateKey {
    fn clone(&self) -> Self {
        let mut bytes = zeroed();
        bytes.copy_from_slice(self.as_bytes());
        Self(bytes)
    }
}

fn zeroed() -> Box<Zeroizing<[u8; 32]>> {
    Box::new(Zeroizing::new([0; 32]))
}

/// Public keys of a node: the active one, and a second one during a key rotation. Peers accept
/// both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublicKeys {
    /// Active key of the node.
    pub first: PublicKey,
    /// Next or previous key during a key rotation.
    pub second: Option<PublicKey>,
}

impl PublicKeys {
    /// Returns the active key, then the second one.
    pub fn iter(self) -> impl Iterator<Item = PublicKey> {
        std::iter::once(self.first).chain(self.second)
    }
}

impl From<PublicKey> for PublicKeys {
    fn from(first: PublicKey) -> Self {
        Self { first, second: None }
    }
}

impl PrivateKey {
    /// Generates a random key.
    ///
    /// # Errors
    /// [`KeyError::Value`] if the random source fails.
    pub fn generate() -> Result<Self, KeyError> {
        let mut bytes = zeroed();
        aws_lc_rs::rand::fill(&mut **bytes).map_err(|_| KeyError::Value)?;
        Ok(Self(bytes))
    }

    /// Returns the 32 secret bytes. The caller must not leave copies in memory.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Computes the public key (X25519 with the base point, RFC 7748, section 6.1).
    ///
    /// # Errors
    /// [`KeyError::Value`] if the cryptographic library refuses the private key.
    pub fn public(&self) -> Result<PublicKey, KeyError> {
        let key = agreement::PrivateKey::from_private_key(&agreement::X25519, self.as_bytes())
            .map_err(|_| KeyError::Value)?;
        let public = key.compute_public_key().map_err(|_| KeyError::Value)?;
        Ok(PublicKey(public.as_ref().try_into().map_err(|_| KeyError::Value)?))
    }

    /// Returns the text form for the key file: 44 characters of base64. The buffer is wiped on drop
    /// and has room for a line end.
    pub fn to_base64(&self) -> Zeroizing<String> {
        // The capacity suffices for the text and a line end, because a string that grows leaves a
        // copy.
        let mut text = Zeroizing::new(String::with_capacity(64));
        // `encode_string` keeps an unwiped buffer on its stack. `encode_slice` writes to the wiped
        // buffer `encoded`.
        let mut encoded = Box::new(Zeroizing::new([0; 44]));
        if BASE64.encode_slice(self.as_bytes(), &mut **encoded).is_ok() {
            text.push_str(std::str::from_utf8(&**encoded).unwrap_or_default());
        }
        text
    }
}

fn decode(text: &str) -> Result<Box<Zeroizing<[u8; 32]>>, KeyError> {
    // The buffer is also wiped if only the end of the text is malformed.
    let mut bytes = Zeroizing::new(Vec::with_capacity(64));
    BASE64.decode_vec(text.trim(), &mut bytes).map_err(|_| KeyError::Encoding)?;
    let mut array = zeroed();
    match bytes.len() {
        32 => array.copy_from_slice(&bytes),
        length => return Err(KeyError::Length(length)),
    }
    Ok(array)
}

impl FromStr for PublicKey {
    type Err = KeyError;
    fn from_str(text: &str) -> Result<Self, KeyError> {
        decode(text).map(|bytes| Self(**bytes))
    }
}

impl FromStr for PrivateKey {
    type Err = KeyError;
    fn from_str(text: &str) -> Result<Self, KeyError> {
        decode(text).map(Self)
    }
}

impl TryFrom<String> for PublicKey {
    type Error = KeyError;
    fn try_from(text: String) -> Result<Self, KeyError> {
        text.parse()
    }
}

impl TryFrom<Zeroizing<String>> for PrivateKey {
    type Error = KeyError;
    fn try_from(text: Zeroizing<String>) -> Result<Self, KeyError> {
        text.parse()
    }
}

impl From<PublicKey> for String {
    fn from(key: PublicKey) -> String {
        key.to_string()
    }
}

impl Serialize for PrivateKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.to_base64())
    }
}

impl PartialEq for PrivateKey {
    fn eq(&self, other: &Self) -> bool {
        aws_lc_rs::constant_time::verify_slices_are_equal(self.as_bytes(), other.as_bytes()).is_ok()
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&BASE64.encode(self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateKey(hidden)")
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn public_key_matches_rfc_7748() {
        // RFC 7748, section 6.1: Alice.
        let private = PrivateKey(Box::new(Zeroizing::new([
            0x77, 0x07, 0x6d, 0x0a, 0x73, 0x18, 0xa5, 0x7d, 0x3c, 0x16, 0xc1, 0x72, 0x51, 0xb2,
            0x66, 0x45, 0xdf, 0x4c, 0x2f, 0x87, 0xeb, 0xc0, 0x99, 0x2a, 0xb1, 0x77, 0xfb, 0xa5,
            0x1d, 0xb9, 0x2c, 0x2a,
        ])));
        let public = private.public().unwrap();
        assert_eq!(public.0[..4], [0x85, 0x20, 0xf0, 0x09]);
        assert_eq!(public.0[28..], [0xaa, 0x9b, 0x4e, 0x6a]);
    }

    #[test]
    fn text_form_round_trips_and_debug_hides_key() {
        let private = PrivateKey::generate().unwrap();
        let text = private.to_base64();
        assert_eq!(text.parse::<PrivateKey>().unwrap(), private);
        assert!(!format!("{private:?}").contains(&text[..8]));
        assert_eq!("AAAA".parse::<PublicKey>(), Err(KeyError::Length(3)));
        assert_eq!("!".parse::<PublicKey>(), Err(KeyError::Encoding));
    }
}
