//! A node's identity: a Curve25519 key pair in base64, as WireGuard writes them.

use std::fmt;
use std::str::FromStr;

use aws_lc_rs::agreement;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Serialize, Serializer};
use thiserror::Error;
use zeroize::Zeroizing;

/// Why a key was refused.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum KeyError {
    /// Not base64.
    #[error("not base64")]
    Encoding,
    /// Not 32 bytes.
    #[error("{0} bytes long, where a key has 32")]
    Length(usize),
    /// No key in the mathematical sense.
    #[error("not a valid Curve25519 key")]
    Value,
}

/// The public half; 32 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PublicKey(pub [u8; 32]);

/// The private half; 32 bytes, wiped when dropped, never printed. They stay where they are when it is moved: a
/// copy left on the stack would get into whatever is made there next.
#[derive(Deserialize)]
#[serde(try_from = "Zeroizing<String>")]
pub struct PrivateKey(Box<Zeroizing<[u8; 32]>>);

impl Clone for PrivateKey {
    fn clone(&self) -> Self {
        let mut bytes = nothing();
        bytes.copy_from_slice(self.as_bytes());
        Self(bytes)
    }
}

/// Room for a key.
fn nothing() -> Box<Zeroizing<[u8; 32]>> {
    Box::new(Zeroizing::new([0; 32]))
}

/// The public halves of a node's keys: the one in force, and another while it changes, which is accepted as
/// well.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublicKeys {
    /// The key in force.
    pub first: PublicKey,
    /// The next, or the one before.
    pub second: Option<PublicKey>,
}

impl PublicKeys {
    /// Both.
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
    /// A new random key.
    pub fn generate() -> Result<Self, KeyError> {
        let mut bytes = nothing();
        aws_lc_rs::rand::fill(&mut **bytes).map_err(|_| KeyError::Value)?;
        Ok(Self(bytes))
    }

    /// The secret itself.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The public half.
    pub fn public(&self) -> Result<PublicKey, KeyError> {
        let key = agreement::PrivateKey::from_private_key(&agreement::X25519, self.as_bytes())
            .map_err(|_| KeyError::Value)?;
        let public = key.compute_public_key().map_err(|_| KeyError::Value)?;
        Ok(PublicKey(public.as_ref().try_into().map_err(|_| KeyError::Value)?))
    }

    /// The text form, for the key file.
    pub fn to_base64(&self) -> Zeroizing<String> {
        // Room for all of it, and for a line's end: what grows leaves copies behind.
        let mut text = Zeroizing::new(String::with_capacity(64));
        // Into a place that is wiped: the encoder's own would stay behind on the stack.
        let mut encoded = Box::new(Zeroizing::new([0; 44]));
        if BASE64.encode_slice(self.as_bytes(), &mut **encoded).is_ok() {
            text.push_str(std::str::from_utf8(&**encoded).unwrap_or_default());
        }
        text
    }
}

fn decode(text: &str) -> Result<Box<Zeroizing<[u8; 32]>>, KeyError> {
    // Wiped also where only the end turns out to be wrong.
    let mut bytes = Zeroizing::new(Vec::with_capacity(64));
    BASE64.decode_vec(text.trim(), &mut bytes).map_err(|_| KeyError::Encoding)?;
    let mut array = nothing();
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
    fn public_half_is_that_of_rfc_7748() {
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
    fn text_form_round_trips_and_hides_the_secret() {
        let private = PrivateKey::generate().unwrap();
        let text = private.to_base64();
        assert_eq!(text.parse::<PrivateKey>().unwrap(), private);
        assert!(!format!("{private:?}").contains(&text[..8]));
        assert_eq!("AAAA".parse::<PublicKey>(), Err(KeyError::Length(3)));
        assert_eq!("!".parse::<PublicKey>(), Err(KeyError::Encoding));
    }
}
