//! Parsed headers of inner IP packets.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::Range;

use crate::drop::DropReason;
use crate::wire::ecn::Ecn;

/// Size of the largest packet that every IPv4 host must accept, in bytes (RFC 791): the smallest
/// inner MTU.
pub const MIN_IPV4_MTU: u16 = 576;
/// Smallest MTU of a link that carries IPv6, in bytes (RFC 8200, section 5).
pub const MIN_IPV6_MTU: u16 = 1280;
/// Largest inner MTU in bytes. A packet of this size, with the overhead of the tunnel, fits into
/// one UDP datagram.
pub const MAX_MTU: u16 = 65_000;

/// IP protocol number of TCP (IANA).
pub const TCP: u8 = 6;
/// IP protocol number of UDP (IANA).
pub const UDP: u8 = 17;
/// IPv6 next header of a fragment (RFC 8200, section 4.5).
const FRAGMENT: u8 = 44;

/// Returns true if this IPv6 next header is an extension header (IANA registry "IPv6 Extension
/// Header Types", without ESP, which hides everything after it).
pub const fn is_extension_header(protocol: u8) -> bool {
    matches!(protocol, 0 | 43 | FRAGMENT | 51 | 60 | 135 | 139 | 140)
}

/// The checked header of an IP packet (RFC 791, RFC 8200).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IpHeader {
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// Length of the header in bytes: with options for IPv4, always 40 for IPv6. IPv6 extension
    /// headers are part of the payload.
    pub header_len: usize,
    /// Length of the packet in bytes, including the header. At least `header_len`, and at most the
    /// length of the parsed buffer.
    pub total_len: usize,
    /// IPv4 protocol or IPv6 next header.
    pub protocol: u8,
    /// True for a fragment of IPv4. A fragment of IPv6 has the `protocol` 44 instead.
    pub fragment: bool,
    /// ECN field of the type of service (IPv4) or traffic class (IPv6).
    pub ecn: Ecn,
}

impl IpHeader {
    /// Parses the packet at the start of `bytes`; bytes may follow the packet. Returns `None` if
    /// the version is neither 4 nor 6, or if a length exceeds the buffer.
    #[inline]
    pub fn parse(bytes: &[u8]) -> Option<IpHeader> {
        match bytes.first()? >> 4 {
            4 => Self::parse_v4(bytes),
            6 => Self::parse_v6(bytes),
            _ => None,
        }
    }

    /// Returns true for IPv6.
    #[inline]
    pub fn is_v6(&self) -> bool {
        self.source.is_ipv6()
    }

    /// Returns the protocol and the offset in bytes of the transport header. Skips the IPv6
    /// extension headers hop-by-hop options, routing and destination options (RFC 8200, section 4).
    /// `packet` is the packet that was parsed. Returns `None` for fragments and if a header exceeds
    /// the packet.
    pub fn transport(&self, packet: &[u8]) -> Option<(u8, usize)> {
        if self.fragment {
            return None;
        }
        let (mut protocol, mut at) = (self.protocol, self.header_len);
        while self.is_v6() && matches!(protocol, 0 | 43 | 60) {
            let [next, length] = *packet.get(at..self.total_len)?.first_chunk()?;
            protocol = next;
            at += (usize::from(length) + 1) * 8;
        }
        (at <= self.total_len && protocol != FRAGMENT).then_some((protocol, at))
    }

    /// Returns the offset in bytes of the TCP or UDP checksum field if the transport header follows
    /// the IP header directly. A partial checksum can cross the tunnel only at this offset.
    #[inline]
    pub fn checksum_field(&self) -> Option<usize> {
        let (offset, min_len) = match self.protocol {
            TCP => (16, 20),
            UDP => (6, 8),
            _ => return None,
        };
        let has_header = !self.fragment && self.total_len >= self.header_len + min_len;
        has_header.then_some(self.header_len + offset)
    }

    #[inline]
    fn parse_v4(bytes: &[u8]) -> Option<IpHeader> {
        let head: &[u8; 20] = bytes.first_chunk()?;
        let header_len = usize::from(head[0] & 0xf) * 4;
        let total_len = usize::from(u16::from_be_bytes([head[2], head[3]]));
        if header_len < 20 || total_len < header_len || total_len > bytes.len() {
            return None;
        }
        Some(IpHeader {
            source: IpAddr::V4(Ipv4Addr::new(head[12], head[13], head[14], head[15])),
            destination: IpAddr::V4(Ipv4Addr::new(head[16], head[17], head[18], head[19])),
            header_len,
            total_len,
            protocol: head[9],
            // More fragments (MF) or an offset.
            fragment: u16::from_be_bytes([head[6], head[7]]) & 0x3fff != 0,
            ecn: Ecn::from_tos(head[1]),
        })
    }

    fn parse_v6(bytes: &[u8]) -> Option<IpHeader> {
        let head: &[u8; 40] = bytes.first_chunk()?;
        let total_len = 40 + usize::from(u16::from_be_bytes([head[4], head[5]]));
        if total_len > bytes.len() {
            return None;
        }
        let (_, addresses) = head.split_last_chunk::<32>()?;
        let (source, destination) = addresses.split_first_chunk::<16>()?;
        Some(IpHeader {
            source: IpAddr::V6(Ipv6Addr::from(*source)),
            destination: IpAddr::V6(Ipv6Addr::from(*destination.first_chunk::<16>()?)),
            header_len: 40,
            total_len,
            protocol: head[6],
            fragment: false,
            ecn: Ecn::from_tos(head[1] >> 4),
        })
    }
}

/// Iterates over the packets of a plaintext, each as long as its length field says. The last item
/// is an error if the plaintext does not end with a packet.
pub fn packets(
    plaintext: &[u8],
) -> impl Iterator<Item = Result<(Range<usize>, IpHeader), DropReason>> + '_ {
    let mut at = 0;
    std::iter::from_fn(move || {
        let rest = plaintext.get(at..).filter(|rest| !rest.is_empty())?;
        let Some(ip) = IpHeader::parse(rest) else {
            at = plaintext.len();
            return Some(Err(DropReason::InnerMalformed));
        };
        let range = at..at + ip.total_len;
        at = range.end;
        Some(Ok((range, ip)))
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn v4(total: u16, header_len: u8) -> Vec<u8> {
        let mut bytes = vec![0; usize::from(total)];
        bytes[0] = 0x40 | (header_len / 4);
        bytes[2..4].copy_from_slice(&total.to_be_bytes());
        bytes[9] = TCP;
        bytes[12..20].copy_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2]);
        bytes
    }

    fn v6(payload: u16) -> Vec<u8> {
        let mut bytes = vec![0; 40 + usize::from(payload)];
        bytes[0] = 0x60;
        bytes[4..6].copy_from_slice(&payload.to_be_bytes());
        bytes[6] = UDP;
        bytes[23] = 1;
        bytes[39] = 2;
        bytes
    }

    #[test]
    fn both_ip_versions_are_parsed() {
        let ip = IpHeader::parse(&v4(60, 24)).unwrap();
        assert_eq!((ip.header_len, ip.total_len, ip.protocol, ip.fragment), (24, 60, TCP, false));
        assert_eq!(ip.destination.to_string(), "10.0.0.2");
        let ip = IpHeader::parse(&v6(8)).unwrap();
        assert_eq!((ip.header_len, ip.total_len, ip.protocol, ip.is_v6()), (40, 48, UDP, true));
        assert_eq!(ip.source.to_string(), "::1");
    }

    #[test]
    fn ipv4_fragments_are_recognized() {
        for (bytes, fragment) in [([0x20, 0], true), ([0, 1], true), ([0x40, 0], false)] {
            let mut packet = v4(40, 20);
            packet[6..8].copy_from_slice(&bytes);
            assert_eq!(IpHeader::parse(&packet).unwrap().fragment, fragment);
        }
    }

    #[test]
    fn lengths_beyond_the_buffer_are_refused() {
        assert!(IpHeader::parse(&[]).is_none());
        assert!(IpHeader::parse(&v4(60, 20)[..59]).is_none());
        assert!(IpHeader::parse(&v4(40, 16)).is_none());
        let mut short = v4(60, 20);
        short[3] = 19;
        assert!(IpHeader::parse(&short).is_none());
        assert!(IpHeader::parse(&v6(8)[..47]).is_none());
        assert!(IpHeader::parse(&[0x50; 60]).is_none());
    }

    #[test]
    fn transport_header_is_found_after_extension_headers() {
        let plain = v6(8);
        assert_eq!(IpHeader::parse(&plain).unwrap().transport(&plain), Some((UDP, 40)));
        let mut packet = v6(8 + 16 + 20);
        // Hop-by-hop options of 8 bytes, destination options of 16 bytes, TCP.
        (packet[6], packet[40], packet[48], packet[49]) = (0, 60, TCP, 1);
        let ip = IpHeader::parse(&packet).unwrap();
        assert_eq!(ip.transport(&packet), Some((TCP, 64)));
        assert_eq!(ip.checksum_field(), None);
        packet[48] = FRAGMENT;
        assert_eq!(ip.transport(&packet), None);
        (packet[48], packet[49]) = (60, 200);
        assert_eq!(ip.transport(&packet), None);
        let mut fragment = v4(40, 20);
        fragment[6] = 0x20;
        assert_eq!(IpHeader::parse(&fragment).unwrap().transport(&fragment), None);
    }

    #[test]
    fn checksum_field_follows_the_ip_header() {
        for (packet, field) in
            [(v4(40, 20), Some(36)), (v4(44, 24), Some(40)), (v4(39, 20), None), (v6(8), Some(46))]
        {
            assert_eq!(IpHeader::parse(&packet).unwrap().checksum_field(), field);
        }
    }

    #[test]
    fn bundle_is_iterated_to_its_end() {
        let bundle = [v4(40, 20), v6(8), v4(21, 20)].concat();
        let ranges: Vec<_> = packets(&bundle).map(|p| p.unwrap().0).collect();
        assert_eq!(ranges, [0..40, 40..88, 88..109]);
        let mut cut = packets(&bundle[..108]);
        assert!(cut.next().unwrap().is_ok() && cut.next().unwrap().is_ok());
        assert_eq!(cut.next(), Some(Err(DropReason::InnerMalformed)));
        assert_eq!(cut.next(), None);
    }

    proptest! {
        #[test]
        fn random_extension_headers_do_not_panic(
            mut bytes in prop::collection::vec(any::<u8>(), 40..200),
            headers in prop::collection::vec(prop::sample::select(vec![0u8, 43, 60, 44, 6]), 5),
        ) {
            bytes[0] = 0x60;
            let length = (bytes.len() - 40) as u16;
            bytes[4..6].copy_from_slice(&length.to_be_bytes());
            for (at, header) in [6, 40, 48, 56, 64].into_iter().zip(headers) {
                if at < bytes.len() { bytes[at] = header; }
            }
            let ip = IpHeader::parse(&bytes).unwrap();
            if let Some((_, at)) = ip.transport(&bytes) {
                prop_assert!((40..=bytes.len()).contains(&at));
            }
        }

        #[test]
        fn random_bundles_yield_contiguous_ranges(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut at = 0;
            for packet in packets(&bytes) {
                let Ok((range, ip)) = packet else { break };
                prop_assert_eq!(range.start, at);
                prop_assert!(ip.header_len <= ip.total_len && ip.total_len == range.len());
                at = range.end;
            }
            prop_assert!(at <= bytes.len());
        }
    }
}
