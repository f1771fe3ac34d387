//! Static Curve25519 keys of nodes (RFC 7748).

use std::fmt;

use snow::types::Dh;
use zeroize::Zeroizing;

use crate::tunnel::primitives::X25519Pair;

/// Length of a private and of a public key in bytes.
pub const KEY_LEN: usize = 32;

/// Public key of a node.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublicKey([u8; KEY_LEN]);

impl PublicKey {
    /// Creates a key from its bytes. Any 32 bytes are accepted; a handshake with a point of low
    /// order fails.
    pub const fn new(bytes: [u8; KEY_LEN]) -> Self {
        Self(bytes)
    }

    /// Returns the bytes of the key.
    pub const fn as_bytes(&self) -> &[u8; KEY_LEN] {
        &self.0
    }

    /// Returns the bytes of the key.
    pub const fn to_bytes(self) -> [u8; KEY_LEN] {
        self.0
    }
}

impl From<[u8; KEY_LEN]> for PublicKey {
    fn from(bytes: [u8; KEY_LEN]) -> Self {
        Self(bytes)
    }
}

impl From<PublicKey> for [u8; KEY_LEN] {
    fn from(key: PublicKey) -> Self {
        key.0
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PublicKey(")?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))?;
        f.write_str(")")
    }
}

/// Private key of a node. The bytes are in a heap buffer that is wiped on drop, so that a move
/// leaves no copy on the stack. The debug form does not show them.
pub struct PrivateKey(Box<Zeroizing<[u8; KEY_LEN]>>);

impl PrivateKey {
    /// Creates a key from a copy of its bytes. [`Engine::new`](crate::Engine::new) and
    /// [`PrivateKey::public_key`] check that they are a valid key.
    pub fn new(bytes: &[u8; KEY_LEN]) -> Self {
        let mut key = Box::new(Zeroizing::new([0; KEY_LEN]));
        key.copy_from_slice(bytes);
        Self(key)
    }

    /// Returns the bytes of the key.
    pub fn as_bytes(&self) -> &[u8; KEY_LEN] {
        &self.0
    }

    /// Computes the public key.
    ///
    /// # Errors
    /// [`InvalidKey`] if the bytes are not a valid Curve25519 key.
    pub fn public_key(&self) -> Result<PublicKey, InvalidKey> {
        let mut pair = X25519Pair::default();
        pair.set(self.as_bytes());
        pair.public().copied().map(PublicKey).ok_or(InvalidKey)
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateKey(..)")
    }
}

/// Error of [`PrivateKey::public_key`]: the bytes are not a valid Curve25519 key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the private key is not a valid Curve25519 key")]
pub struct InvalidKey;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_form_hides_private_key() {
        assert_eq!(format!("{:?}", PrivateKey::new(&[7; KEY_LEN])), "PrivateKey(..)");
        let public = format!("{:?}", PublicKey::new([0xab; KEY_LEN]));
        assert_eq!(public, format!("PublicKey({})", "ab".repeat(KEY_LEN)));
    }
}
