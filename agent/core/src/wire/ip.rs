//! Views of inner IP headers: parsed once, then trusted.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::Range;

use crate::drop::DropReason;

/// IP protocol number of TCP (IANA).
pub const TCP: u8 = 6;
/// IP protocol number of UDP (IANA).
pub const UDP: u8 = 17;

/// What is known of one IP packet after its header was checked (RFC 791, RFC 8200).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IpHeader {
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// Bytes before the payload: with IPv4 options; 40 for IPv6, whose extension headers count as
    /// payload.
    pub header_len: usize,
    /// Length of the whole packet in bytes; at least `header_len`, at most that of the buffer.
    pub total_len: usize,
    /// IPv4 protocol or IPv6 next header.
    pub protocol: u8,
    /// Whether it is a fragment (IPv4 only; an IPv6 fragment has `protocol` 44).
    pub fragment: bool,
}

impl IpHeader {
    /// Parses the packet at the start of `bytes`, which may go on behind it.
    pub fn parse(bytes: &[u8]) -> Option<IpHeader> {
        match bytes.first()? >> 4 {
            4 => Self::parse_v4(bytes),
            6 => Self::parse_v6(bytes),
            _ => None,
        }
    }

    /// Whether this is IPv6.
    pub fn is_v6(&self) -> bool {
        self.source.is_ipv6()
    }

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
            // MF, or an offset
            fragment: u16::from_be_bytes([head[6], head[7]]) & 0x3fff != 0,
        })
    }

    fn parse_v6(bytes: &[u8]) -> Option<IpHeader> {
        let head: &[u8; 40] = bytes.first_chunk()?;
        let total_len = 40 + usize::from(u16::from_be_bytes([head[4], head[5]]));
        if total_len > bytes.len() {
            return None;
        }
        let address = |at: usize| {
            let octets: [u8; 16] = head[at..at + 16].try_into().ok()?;
            Some(IpAddr::V6(Ipv6Addr::from(octets)))
        };
        Some(IpHeader {
            source: address(8)?,
            destination: address(24)?,
            header_len: 40,
            total_len,
            protocol: head[6],
            fragment: false,
        })
    }
}

/// Walks the packets of a plaintext: each as long as its length field says, no rest allowed.
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
