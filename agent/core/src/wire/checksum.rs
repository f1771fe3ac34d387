//! The Internet checksum (RFC 1071).

use std::net::IpAddr;

use crate::wire::ip::UDP;

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

/// Whether the checksum of an IPv4 header without options is right.
#[inline]
pub fn header_is_right(header: &[u8; 20]) -> bool {
    let mut total = 0;
    for at in [0, 4, 8, 12, 16] {
        let [a, b, c, d] = [header[at], header[at + 1], header[at + 2], header[at + 3]];
        total += u64::from(u32::from_ne_bytes([a, b, c, d]));
    }
    // A sum with end-around carry is the remainder by 0xffff; all ones stand for zero. That the
    // total is not zero itself is sure, since a header has a version.
    total % 0xffff == 0
}

/// Folds a sum of 16-bit words to 16 bits by end-around carry.
pub fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// The checksum field for the sum over pseudo-header and transport. UDP sends a zero as all ones,
/// since its zero means that there is none (RFC 768); TCP's zero is kept.
pub fn finish(sum: u16, protocol: u8) -> [u8; 2] {
    match !sum {
        0 if protocol == UDP => [0xff; 2],
        field => field.to_be_bytes(),
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// RFC 1071, section 1, as it is written there.
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
    fn example_of_rfc_1071() {
        assert_eq!(sum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7], 0), 0xddf2);
    }

    #[test]
    fn a_header_is_right_or_not() {
        let mut header = [0x45, 0, 0, 60, 1, 2, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
        assert!(!header_is_right(&header));
        let sum = !naive(&header);
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        assert!(header_is_right(&header));
        for at in 0..20 {
            header[at] ^= 0x10;
            assert!(!header_is_right(&header), "byte {at}");
            header[at] ^= 0x10;
        }
    }

    #[test]
    fn pseudo_header_counts_every_field() {
        let v4 = pseudo_header([1, 2, 3, 4].into(), [5, 6, 7, 8].into(), 17, 9);
        assert_eq!(v4, naive(&[1, 2, 3, 4, 5, 6, 7, 8, 0, 17, 0, 9]));
        let (a, b) = (std::net::Ipv6Addr::LOCALHOST, std::net::Ipv6Addr::UNSPECIFIED);
        let bytes = [&a.octets()[..], &b.octets(), &[0, 6, 0, 20]].concat();
        assert_eq!(pseudo_header(a.into(), b.into(), 6, 20), naive(&bytes));
    }

    proptest! {
        #[test]
        fn agrees_with_the_definition(bytes in prop::collection::vec(any::<u8>(), 0..3000), seed: u16) {
            let expected = fold(u64::from(naive(&bytes)) + u64::from(seed));
            prop_assert_eq!(sum(&bytes, seed), expected);
        }
    }
}
