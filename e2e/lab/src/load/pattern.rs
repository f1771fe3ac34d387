//! Reproducible byte streams: a receiver detects each wrong byte without a copy of the sent data.

/// Offset of a byte in a stream that differs from the sent byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WrongByte(pub u64);

impl std::fmt::Display for WrongByte {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "byte {} is wrong", self.0)
    }
}

impl std::error::Error for WrongByte {}

/// An endless stream of bytes that depends on its seed only (xorshift64*).
#[derive(Debug, Clone)]
pub struct Pattern {
    state: u64,
    ready: [u8; 8],
    used: usize,
}

impl Pattern {
    /// Creates the stream of this seed, at its start.
    pub fn new(seed: u64) -> Self {
        // The generator's state must not be zero.
        let state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        Self { state, ready: [0; 8], used: 8 }
    }

    /// Fills a buffer with the next bytes of the stream.
    pub fn fill(&mut self, to: &mut [u8]) {
        let mut rest = to;
        while !rest.is_empty() {
            if self.used == 8 {
                self.state ^= self.state >> 12;
                self.state ^= self.state << 25;
                self.state ^= self.state >> 27;
                self.ready = self.state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes();
                self.used = 0;
            }
            let n = rest.len().min(8 - self.used);
            rest[..n].copy_from_slice(&self.ready[self.used..self.used + n]);
            self.used += n;
            rest = &mut rest[n..];
        }
    }

    /// Compares `bytes` with the next bytes of the stream and returns the index of the first
    /// difference.
    pub fn mismatch(&mut self, bytes: &[u8]) -> Option<usize> {
        let mut expected = vec![0; bytes.len()];
        self.fill(&mut expected);
        if expected == bytes {
            return None;
        }
        expected.iter().zip(bytes).position(|(a, b)| a != b)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn pieces_match_stream_and_wrong_byte_is_found() {
        let mut whole = [0; 1000];
        Pattern::new(7).fill(&mut whole);
        let mut pieces = Pattern::new(7);
        for piece in whole.chunks(13) {
            assert_eq!(pieces.mismatch(piece), None);
        }
        whole[500] ^= 1;
        assert_eq!(Pattern::new(7).mismatch(&whole), Some(500));
        assert_eq!(Pattern::new(8).mismatch(&whole), Some(0));
    }
}
