//! The Internet checksum (RFC 1071).

use std::net::IpAddr;

/// Sum of `bytes` as big-endian 16-bit words, folded to 16 bits, on top of `seed`.
pub fn sum(bytes: &[u8], seed: u16) -> u16 {
    // The sum may be taken in native order and swapped at the end (RFC 1071, section 2B), eight
    // bytes at a time in 32-bit halves, which the compiler makes vector additions of.
    let mut total: u64 = 0;
    let mut chunks = bytes.chunks_exact(4);
    for chunk in &mut chunks {
        total += u64::from(u32::from_ne_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]));
    }
    let mut last = [0; 4];
    last[..chunks.remainder().len()].copy_from_slice(chunks.remainder());
    total += u64::from(u32::from_ne_bytes(last));
    let native = fold(total);
    fold(u64::from(u16::from_ne_bytes(native.to_be_bytes())) + u64::from(seed))
}

/// Folds a sum of 16-bit words to 16 bits by end-around carry.
pub fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// Sum of the pseudo-header (RFC 9293 section 3.1, RFC 8200 section 8.1); `length` is that of the
/// transport header and payload in bytes.
pub fn pseudo_header(source: IpAddr, destination: IpAddr, protocol: u8, length: usize) -> u16 {
    let mut seed = u64::from(protocol) + (length as u64 & 0xffff) + (length as u64 >> 16);
    for address in [source, destination] {
        seed += u64::from(match address {
            IpAddr::V4(address) => sum(&address.octets(), 0),
            IpAddr::V6(address) => sum(&address.octets(), 0),
        });
    }
    fold(seed)
}
