//! Classification of packets for coalescing, and comparison of their headers.

use crate::offload::Checksum;
use crate::wire::checksum;
use crate::wire::ip::{self, IpHeader, TCP, UDP};
use crate::wire::tcp::{ACK, ECE, PSH};

/// Layout of headers without IPv4 options and IPv6 extension headers, in which every field has a
/// fixed place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    Tcp4,
    Udp4,
    Tcp6,
    Udp6,
}

/// Role of a packet in its flow.
#[derive(Debug)]
pub(super) enum Class {
    /// A packet that may start or extend a superpacket.
    Candidate(Candidate),
    /// A packet of a protocol without superpackets; written verbatim.
    OtherProtocol,
    /// A packet that is written verbatim and ends the superpacket of its flow, so that no later
    /// packet of the flow overtakes it. TCP segments without payload are among these, as in the
    /// kernel's GRO.
    FlushesFlow(Layout),
    /// A packet that is written verbatim and ends the superpackets of all flows between its
    /// addresses, because its ports are absent or not at their usual place.
    FlushesAddresses,
}

/// Fields of a packet that may start or extend a superpacket.
#[derive(Debug, Clone, Copy)]
pub(super) struct Candidate {
    pub(super) layout: Layout,
    /// Length of IP and transport header in bytes.
    pub(super) headers: usize,
    pub(super) sequence: u32,
    pub(super) psh: bool,
}

impl Candidate {
    /// Creates a candidate from a packet whose headers equal those of a candidate with this layout
    /// and header length. Returns `None` if the packet may not be merged for a reason that the
    /// comparison does not show.
    #[inline(always)]
    pub(super) fn alike(
        layout: Layout,
        headers: usize,
        packet: &[u8],
        checksum: Checksum,
    ) -> Option<Self> {
        let transport = packet.get(layout.network_len()..)?;
        if layout.is_tcp() {
            let head = transport.first_chunk::<20>()?;
            let sequence = u32::from_be_bytes([head[4], head[5], head[6], head[7]]);
            let has_payload = packet.len() > headers;
            has_payload.then_some(Self { layout, headers, sequence, psh: head[13] & PSH != 0 })
        } else {
            match classify_udp(layout, transport, checksum) {
                Class::Candidate(candidate) => Some(candidate),
                _ => None,
            }
        }
    }
}

/// Result of the comparison of two packets of one layout.
#[derive(Debug, Clone, Copy)]
pub(super) struct Difference {
    pub(super) same_flow: bool,
    /// True if all header fields are equal that segmentation would make equal, except the
    /// identification of IPv4 and the options of TCP.
    pub(super) same_headers: bool,
}

/// Classifies a packet with the parsed header `ip`.
#[inline]
pub(super) fn classify(packet: &[u8], ip: &IpHeader, checksum: Checksum) -> Class {
    let plain = !ip.fragment && ip.header_len == if ip.is_v6() { 40 } else { 20 };
    let layout = match (ip.protocol, ip.is_v6()) {
        _ if !plain => return Class::FlushesAddresses,
        (TCP, false) => Layout::Tcp4,
        (TCP, true) => Layout::Tcp6,
        (UDP, false) => Layout::Udp4,
        (UDP, true) => Layout::Udp6,
        (protocol, true) if ip::is_extension_header(protocol) => return Class::FlushesAddresses,
        _ => return Class::OtherProtocol,
    };
    let Some(transport) = packet.get(layout.network_len()..) else {
        return Class::FlushesAddresses;
    };
    match layout {
        Layout::Tcp4 | Layout::Tcp6 => classify_tcp(layout, transport),
        Layout::Udp4 | Layout::Udp6 => classify_udp(layout, transport, checksum),
    }
}

#[inline]
fn classify_tcp(layout: Layout, transport: &[u8]) -> Class {
    let Some(&[_, _, _, _, s0, s1, s2, s3, _, _, _, _, offset, flags, ..]) =
        transport.first_chunk::<20>()
    else {
        return Class::FlushesAddresses;
    };
    let length = usize::from(offset >> 4) * 4;
    // A segment without payload (`length == transport.len()`) may carry SACK blocks or a window
    // update, which data that was sent later must not overtake.
    if length < 20 || length >= transport.len() || flags & !(PSH | ECE) != ACK {
        return Class::FlushesFlow(layout);
    }
    Class::Candidate(Candidate {
        layout,
        headers: layout.network_len() + length,
        sequence: u32::from_be_bytes([s0, s1, s2, s3]),
        psh: flags & PSH != 0,
    })
}

#[inline]
fn classify_udp(layout: Layout, transport: &[u8], checksum: Checksum) -> Class {
    let Some(&[_, _, _, _, l0, l1, c0, c1]) = transport.first_chunk::<8>() else {
        return Class::FlushesAddresses;
    };
    let length = usize::from(u16::from_be_bytes([l0, l1]));
    let unchecked = checksum == Checksum::Full && [c0, c1] == [0, 0];
    if length != transport.len() || length == 8 || unchecked {
        return Class::FlushesFlow(layout);
    }
    let headers = layout.network_len() + 8;
    Class::Candidate(Candidate { layout, headers, sequence: 0, psh: false })
}

impl Layout {
    /// Returns the length of the IP header in bytes.
    pub(super) fn network_len(self) -> usize {
        if self.is_v6() { 40 } else { 20 }
    }

    pub(super) fn is_v6(self) -> bool {
        matches!(self, Layout::Tcp6 | Layout::Udp6)
    }

    pub(super) fn is_tcp(self) -> bool {
        matches!(self, Layout::Tcp4 | Layout::Tcp6)
    }

    /// Returns the offset of the checksum field in the transport header in bytes.
    pub(super) fn checksum_offset(self) -> usize {
        if self.is_tcp() { 16 } else { 6 }
    }

    /// Returns the sum of the pseudo-header without its length: addresses and protocol.
    pub(super) fn pseudo_header(self, packet: &[u8]) -> u16 {
        let addresses = if self.is_v6() { 8..40 } else { 12..20 };
        let protocol = if self.is_tcp() { TCP } else { UDP };
        checksum::sum(&packet[addresses], u16::from(protocol))
    }

    /// Returns a hash of addresses, ports and layout.
    #[inline]
    pub(super) fn hash(self, packet: &[u8]) -> u32 {
        let (addresses, ports) = match (self.is_v6(), packet.first_chunk::<48>()) {
            (false, _) => match packet.first_chunk::<24>() {
                Some(head) => (word(head, 12), word(head, 16) ^ self as u64),
                None => (0, 0),
            },
            (true, Some(head)) => (
                word(head, 8).rotate_left(7)
                    ^ word(head, 16)
                    ^ word(head, 24).rotate_left(13)
                    ^ word(head, 32),
                word(head, 40) & V6_PORTS ^ self as u64,
            ),
            (true, None) => (0, 0),
        };
        let mixed = (addresses ^ ports.rotate_left(29)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (mixed >> 32) as u32
    }

    /// Returns true if two packets with headers of `headers` bytes have the same TCP options.
    #[inline(always)]
    pub(super) fn same_options(self, a: &[u8], b: &[u8], headers: usize) -> bool {
        let at = self.network_len() + 20;
        let (Some(a), Some(b)) = (a.get(at..headers), b.get(at..headers)) else { return true };
        match (<&[u8; 12]>::try_from(a), <&[u8; 12]>::try_from(b)) {
            // The timestamps option with its padding, which nearly every segment has.
            (Ok(a), Ok(b)) => xor((a, b), 0) | xor((a, b), 4) == 0,
            _ => a == b,
        }
    }

    /// Compares the headers of two packets of this layout, a few words at a time.
    #[inline(always)]
    pub(super) fn compare(self, a: &[u8], b: &[u8]) -> Difference {
        match self {
            Layout::Tcp4 => compare_tcp4(a, b),
            Layout::Udp4 => compare_udp4(a, b),
            Layout::Tcp6 => compare_tcp6(a, b),
            Layout::Udp6 => compare_udp6(a, b),
        }
        .unwrap_or(Difference { same_flow: false, same_headers: false })
    }

    /// Returns true if merging hides no corruption: the checksum of the IPv4 header is correct, and
    /// so is a complete transport checksum.
    #[inline(always)]
    pub(super) fn verify(self, packet: &[u8], checksum: Checksum) -> bool {
        let network = self.is_v6() || packet.first_chunk().is_some_and(checksum::is_header_valid);
        network && (checksum == Checksum::Partial || self.verify_transport(packet))
    }

    fn verify_transport(self, packet: &[u8]) -> bool {
        let transport = &packet[self.network_len()..];
        let seed = u64::from(self.pseudo_header(packet)) + transport.len() as u64;
        checksum::sum(transport, checksum::fold(seed)) == 0xffff
    }
}

/// Returns true if both packets have the same addresses and IP version. Both must hold a whole IP
/// header.
pub(super) fn same_addresses(a: &[u8], b: &[u8]) -> bool {
    let version = |packet: &[u8]| packet.first().map(|first| first >> 4);
    let range = if version(a) == Some(6) { 8..40 } else { 12..20 };
    version(a) == version(b)
        && matches!((a.get(range.clone()), b.get(range)), (Some(a), Some(b)) if a == b)
}

const fn mask(bytes: [u8; 8]) -> u64 {
    u64::from_ne_bytes(bytes)
}

// IPv4, bytes 0 to 8: version, header length, type of service, DF and fragment offset; without
// length and identification.
const V4_FIRST: u64 = mask([0xff, 0xff, 0, 0, 0, 0, 0xff, 0xff]);
// IPv4, bytes 8 to 16: TTL; protocol and source; without checksum.
const V4_TTL: u64 = mask([0xff, 0, 0, 0, 0, 0, 0, 0]);
const V4_SOURCE: u64 = mask([0, 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff]);
// IPv6, bytes 0 to 8: version, traffic class, flow label, next header, hop limit; without length.
const V6_FIRST: u64 = mask([0xff, 0xff, 0xff, 0xff, 0, 0, 0xff, 0xff]);
// IPv6, bytes 40 to 48: ports.
const V6_PORTS: u64 = mask([0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]);
// TCP, bytes 4 to 12: acknowledgement; without sequence number.
const TCP_ACK: u64 = mask([0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
// TCP, bytes 12 to 20: data offset, flags except PSH, window, urgent pointer; without checksum.
const TCP_LAST: u64 = mask([0xff, !PSH, 0xff, 0xff, 0, 0, 0xff, 0xff]);

#[inline]
fn word<const N: usize>(bytes: &[u8; N], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_ne_bytes(word)
}

/// Returns the bits in which the words at `at` differ.
#[inline]
fn xor<const N: usize>((a, b): (&[u8; N], &[u8; N]), at: usize) -> u64 {
    word(a, at) ^ word(b, at)
}

#[inline]
fn heads<'a, const N: usize>(a: &'a [u8], b: &'a [u8]) -> Option<(&'a [u8; N], &'a [u8; N])> {
    Some((a.first_chunk()?, b.first_chunk()?))
}

#[inline]
fn network4<const N: usize>(heads: (&[u8; N], &[u8; N])) -> (u64, u64) {
    let middle = xor(heads, 8);
    (middle & V4_SOURCE | xor(heads, 16), xor(heads, 0) & V4_FIRST | middle & V4_TTL)
}

#[inline]
fn network6<const N: usize>(heads: (&[u8; N], &[u8; N])) -> (u64, u64) {
    let addresses = xor(heads, 8) | xor(heads, 16) | xor(heads, 24) | xor(heads, 32);
    (addresses | xor(heads, 40) & V6_PORTS, xor(heads, 0) & V6_FIRST)
}

#[inline]
fn tcp<const N: usize>(heads: (&[u8; N], &[u8; N]), at: usize) -> u64 {
    xor(heads, at + 4) & TCP_ACK | xor(heads, at + 12) & TCP_LAST
}

#[inline(always)]
fn compare_tcp4(a: &[u8], b: &[u8]) -> Option<Difference> {
    let heads = heads::<40>(a, b)?;
    let (flow, headers) = network4(heads);
    Some(Difference { same_flow: flow == 0, same_headers: headers | tcp(heads, 20) == 0 })
}

#[inline(always)]
fn compare_udp4(a: &[u8], b: &[u8]) -> Option<Difference> {
    let (flow, headers) = network4(heads::<24>(a, b)?);
    Some(Difference { same_flow: flow == 0, same_headers: headers == 0 })
}

#[inline(always)]
fn compare_tcp6(a: &[u8], b: &[u8]) -> Option<Difference> {
    let heads = heads::<60>(a, b)?;
    let (flow, headers) = network6(heads);
    Some(Difference { same_flow: flow == 0, same_headers: headers | tcp(heads, 40) == 0 })
}

#[inline(always)]
fn compare_udp6(a: &[u8], b: &[u8]) -> Option<Difference> {
    let (flow, headers) = network6(heads::<48>(a, b)?);
    Some(Difference { same_flow: flow == 0, same_headers: headers == 0 })
}
