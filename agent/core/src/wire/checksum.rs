//! The Internet checksum (RFC 1071).

use std::net::IpAddr;

use crate::wire::ip::UDP;

/// Returns the sum of `bytes` as big-endian 16-bit words, plus `seed`, folded to 16 bits. An odd
/// last byte is padded with zero.
pub fn sum(bytes: &[u8], seed: u16) -> u16 {
    // RFC 1071, section 2(B): the sum can be taken in native byte order and swapped at the end. The
    // compiler vectorizes additions of 32-bit words to a 64-bit sum.
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

/// Returns true if the checksum of an IPv4 header without options is correct.
#[inline]
pub fn is_header_valid(header: &[u8; 20]) -> bool {
    let mut total = 0;
    for at in [0, 4, 8, 12, 16] {
        let [a, b, c, d] = [header[at], header[at + 1], header[at + 2], header[at + 3]];
        total += u64::from(u32::from_ne_bytes([a, b, c, d]));
    }
    // One's complement addition is addition modulo 0xffff, in which all ones equal zero. A header
    // that is zero throughout would pass, but a header has a version.
    total % 0xffff == 0
}

/// Folds a sum of 16-bit words to 16 bits by end-around carry.
pub fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// Returns the checksum field for a sum over pseudo-header and transport. A zero becomes all ones
/// for UDP, which uses zero for "no checksum" (RFC 768), and stays zero for TCP.
pub fn finish(sum: u16, protocol: u8) -> [u8; 2] {
    match !sum {
        0 if protocol == UDP => [0xff; 2],
        field => field.to_be_bytes(),
    }
}

/// Returns the sum of the pseudo-header (RFC 9293, section 3.1; RFC 8200, section 8.1). `length` is
/// the length of transport header and payload in bytes.
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Computes the sum word by word, as RFC 1071, section 1 defines it.
    fn naive(bytes: &[u8]) -> u16 {
        let mut sum = 0u32;
        for pair in bytes.chunks(2) {
            sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
        }
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum as u16
    }

    #[test]
    fn sum_of_rfc_1071_example_matches() {
        assert_eq!(sum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7], 0), 0xddf2);
    }

    #[test]
    fn header_check_detects_every_changed_byte() {
        let mut header = [0x45, 0, 0, 60, 1, 2, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
        assert!(!is_header_valid(&header));
        let sum = !naive(&header);
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        assert!(is_header_valid(&header));
        for at in 0..20 {
            header[at] ^= 0x10;
            assert!(!is_header_valid(&header), "byte {at}");
            header[at] ^= 0x10;
        }
    }

    #[test]
    fn pseudo_header_sums_every_field() {
        let v4 = pseudo_header([1, 2, 3, 4].into(), [5, 6, 7, 8].into(), 17, 9);
        assert_eq!(v4, naive(&[1, 2, 3, 4, 5, 6, 7, 8, 0, 17, 0, 9]));
        let (a, b) = (std::net::Ipv6Addr::LOCALHOST, std::net::Ipv6Addr::UNSPECIFIED);
        let bytes = [&a.octets()[..], &b.octets(), &[0, 6, 0, 20]].concat();
        assert_eq!(pseudo_header(a.into(), b.into(), 6, 20), naive(&bytes));
    }

    proptest! {
        #[test]
        fn sum_agrees_with_rfc_1071(bytes in prop::collection::vec(any::<u8>(), 0..3000), seed: u16) {
            let expected = fold(u64::from(naive(&bytes)) + u64::from(seed));
            prop_assert_eq!(sum(&bytes, seed), expected);
        }
    }
}
