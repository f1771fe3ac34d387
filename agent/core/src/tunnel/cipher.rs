//! The AEADs for data, and their negotiation.

use std::fmt;

use aws_lc_rs::aead;

/// The AEAD of a session's data. Both have keys of 32 bytes, nonces of 12 bytes and tags of 16
/// bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Cipher {
    /// AES-256 in Galois/counter mode (NIST SP 800-38D).
    Aes256Gcm,
    /// ChaCha20 with Poly1305 (RFC 8439).
    ChaCha20Poly1305,
}

impl Cipher {
    /// All ciphers.
    pub const ALL: [Self; 2] = [Self::Aes256Gcm, Self::ChaCha20Poly1305];

    /// Returns the name in configuration, reports and metrics.
    pub const fn label(self) -> &'static str {
        match self {
            Cipher::Aes256Gcm => "aes256-gcm",
            Cipher::ChaCha20Poly1305 => "chacha20-poly1305",
        }
    }

    /// Returns the number on the wire and in key derivation.
    pub(crate) const fn number(self) -> u8 {
        match self {
            Cipher::Aes256Gcm => 1,
            Cipher::ChaCha20Poly1305 => 2,
        }
    }

    /// Returns the cipher with this number.
    pub(crate) fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|c| c.number() == number)
    }

    pub(crate) fn algorithm(self) -> &'static aead::Algorithm {
        match self {
            Cipher::Aes256Gcm => &aead::AES_256_GCM,
            Cipher::ChaCha20Poly1305 => &aead::CHACHA20_POLY1305,
        }
    }
}

impl fmt::Display for Cipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.label())
    }
}

/// Ciphers that a node offers for data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ciphers {
    /// True if AES-256-GCM is offered.
    pub aes256_gcm: bool,
    /// True if ChaCha20-Poly1305 is offered.
    pub chacha20_poly1305: bool,
    /// True if the machine has AES and carry-less multiplication in hardware.
    pub aes_hardware: bool,
}

impl Ciphers {
    const AES: u8 = 1;
    const CHACHA: u8 = 2;
    const HARDWARE: u8 = 0x80;

    /// Returns the cipher that two nodes use: AES-256-GCM if both have AES in hardware, otherwise
    /// ChaCha20-Poly1305, otherwise the only cipher that both offer. The result is the same for
    /// both nodes.
    pub fn choose(self, other: Ciphers) -> Option<Cipher> {
        let aes = self.aes256_gcm && other.aes256_gcm;
        let chacha = self.chacha20_poly1305 && other.chacha20_poly1305;
        match (aes, chacha) {
            (true, true) if self.aes_hardware && other.aes_hardware => Some(Cipher::Aes256Gcm),
            (_, true) => Some(Cipher::ChaCha20Poly1305),
            (true, false) => Some(Cipher::Aes256Gcm),
            (false, false) => None,
        }
    }

    /// Returns true if `cipher` is offered.
    pub const fn contains(self, cipher: Cipher) -> bool {
        match cipher {
            Cipher::Aes256Gcm => self.aes256_gcm,
            Cipher::ChaCha20Poly1305 => self.chacha20_poly1305,
        }
    }

    pub(crate) fn to_byte(self) -> u8 {
        let bit = |set, bit| if set { bit } else { 0 };
        bit(self.aes256_gcm, Self::AES)
            | bit(self.chacha20_poly1305, Self::CHACHA)
            | bit(self.aes_hardware, Self::HARDWARE)
    }

    pub(crate) fn from_byte(byte: u8) -> Self {
        Self {
            aes256_gcm: byte & Self::AES != 0,
            chacha20_poly1305: byte & Self::CHACHA != 0,
            aes_hardware: byte & Self::HARDWARE != 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: Ciphers =
        Ciphers { aes256_gcm: false, chacha20_poly1305: false, aes_hardware: false };
    const BOTH: Ciphers =
        Ciphers { aes256_gcm: true, chacha20_poly1305: true, aes_hardware: false };
    const HARDWARE: Ciphers = Ciphers { aes_hardware: true, ..BOTH };

    #[test]
    fn both_ends_choose_the_same_cipher() {
        let aes = Ciphers { aes256_gcm: true, ..NONE };
        let chacha = Ciphers { chacha20_poly1305: true, ..NONE };
        let cases = [
            (HARDWARE, HARDWARE, Some(Cipher::Aes256Gcm)),
            (HARDWARE, BOTH, Some(Cipher::ChaCha20Poly1305)),
            (BOTH, BOTH, Some(Cipher::ChaCha20Poly1305)),
            (HARDWARE, aes, Some(Cipher::Aes256Gcm)),
            (aes, aes, Some(Cipher::Aes256Gcm)),
            (HARDWARE, chacha, Some(Cipher::ChaCha20Poly1305)),
            (aes, chacha, None),
            (NONE, HARDWARE, None),
        ];
        for (a, b, expected) in cases {
            assert_eq!(a.choose(b), expected, "{a:?} {b:?}");
            assert_eq!(b.choose(a), expected, "{b:?} {a:?}");
            assert_eq!(Ciphers::from_byte(a.to_byte()), a);
        }
    }
}
