//! Comparison of the packets pushed into a coalescer with its writes: segmenting the writes must
//! restore every packet exactly once, and no packet may overtake another one of its flow.

use crate::offload::Checksum;
use crate::offload::coalesce::{CoalesceConfig, Coalescer};
use crate::offload::segment::segment;
use crate::offload::vnet::{self, VnetHeader};
use crate::wire::checksum;
use crate::wire::ip::{IpHeader, TCP, UDP, is_extension_header};

/// A whole packet and the state of its checksum.
pub(crate) type Packet = (Vec<u8>, Checksum);

/// Required equality of a restored packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Likeness {
    /// All bytes are equal.
    Exact,
    /// All bytes are equal except those that merging may change: recomputed checksums, and the
    /// identification of packets that may not be fragmented.
    Merged,
}

/// Pushes all packets, flushes, and checks the writes.
pub(crate) fn check(packets: &[Packet], config: CoalesceConfig, likeness: Likeness) {
    let mut arena: Vec<u8> = packets.iter().flat_map(|(bytes, _)| bytes).copied().collect();
    let mut coalescer = Coalescer::new(config);
    let mut at = 0;
    for (bytes, checksum) in packets {
        let range = at..at + bytes.len();
        at = range.end;
        let ip = IpHeader::parse(bytes).filter(|ip| ip.total_len == bytes.len());
        coalescer.push(&mut arena, range, &ip.expect("a whole packet"), *checksum);
    }
    let writes = coalescer.len();
    let mut written: Vec<(VnetHeader, Vec<u8>)> = Vec::new();
    coalescer.flush(&arena, |packet| {
        let mut bytes = packet.header.to_vec();
        for slice in packet.payload {
            bytes.extend(&arena[slice.offset..slice.offset + slice.len]);
        }
        assert_eq!(
            bytes.len(),
            packet.len,
            "The length of a write differs from the announced one."
        );
        assert!(packet.payload.len() <= 1000, "A write has more slices than writev accepts.");
        let vnet = VnetHeader::parse(&packet.vnet).expect("ten bytes");
        assert_eq!(vnet.gso_type != vnet::GSO_NONE, packet.segments > 1);
        if packet.segments > 1 {
            assert!(
                packet.len <= 65_535 && packet.segments <= 128,
                "A superpacket is larger than the kernel accepts."
            );
            assert_eq!(usize::from(vnet.hdr_len), packet.header.len());
        }
        written.push((vnet, bytes));
    });
    assert!(coalescer.is_empty() && written.len() == writes);
    coalescer.flush(&arena, |_| unreachable!("The flush has left a write."));

    let mut taken = vec![false; packets.len()];
    let mut order = Vec::with_capacity(packets.len());
    for (vnet, mut bytes) in written {
        let mut segments = segment(vnet, &mut bytes).expect("what is written can be split");
        let merged = segments.count() > 1;
        let checksum = segments.checksum();
        while let Some(segment) = segments.next_segment() {
            let found = packets.iter().enumerate().position(|(index, packet)| {
                !taken[index] && same(packet, segment, checksum, merged, config, likeness)
            });
            let found = found.expect("every packet that is written was pushed");
            taken[found] = true;
            order.push(found);
        }
    }
    assert!(taken.iter().all(|taken| *taken), "every packet that was pushed is written");
    let traits: Vec<Traits> = packets.iter().map(|(bytes, _)| Traits::of(bytes)).collect();
    for (position, &later) in order.iter().enumerate() {
        for &earlier in &order[position + 1..] {
            let overtaken = earlier < later && traits[earlier].binds(&traits[later]);
            assert!(!overtaken, "packet {later} overtook packet {earlier}");
        }
    }
}

/// Returns true if the written `segment` equals the pushed packet.
fn same(
    (packet, state): &Packet,
    segment: &[u8],
    checksum: Checksum,
    merged: bool,
    config: CoalesceConfig,
    likeness: Likeness,
) -> bool {
    if packet.len() != segment.len() {
        return false;
    }
    if !config.partial_checksum {
        return checksum == Checksum::Full && completed(packet, *state) == segment;
    }
    if !merged || likeness == Likeness::Exact {
        let field = *state == Checksum::Partial && field(packet).is_some();
        return packet == segment && (checksum == Checksum::Partial) == field;
    }
    match (likened(packet, *state), likened(segment, checksum)) {
        (Some(packet), Some(segment)) => packet == segment,
        _ => false,
    }
}

fn field(packet: &[u8]) -> Option<usize> {
    IpHeader::parse(packet)?.checksum_field()
}

/// Returns a packet with its checksum completed, as it is written without checksum offload.
fn completed(packet: &[u8], state: Checksum) -> Vec<u8> {
    let mut packet = packet.to_vec();
    if let (Checksum::Partial, Some(field), Some(ip)) =
        (state, field(&packet), IpHeader::parse(&packet))
    {
        let sum = checksum::sum(&packet[ip.header_len..], 0);
        packet[field..field + 2].copy_from_slice(&checksum::finish(sum, ip.protocol));
    }
    packet
}

/// Returns a packet without the bytes that merging may change; `None` if the packet must not have
/// been merged.
fn likened(packet: &[u8], state: Checksum) -> Option<Vec<u8>> {
    let mut packet = packet.to_vec();
    let ip = IpHeader::parse(&packet)?;
    let field = ip.checksum_field()?;
    if state == Checksum::Full {
        let length = ip.total_len - ip.header_len;
        let seed = checksum::pseudo_header(ip.source, ip.destination, ip.protocol, length);
        if checksum::sum(&packet[ip.header_len..], seed) != 0xffff {
            return None;
        }
    }
    packet[field..field + 2].fill(0);
    if !ip.is_v6() {
        if checksum::sum(&packet[..20], 0) != 0xffff {
            return None;
        }
        if packet[6] & 0x40 != 0 {
            packet[4..6].fill(0);
        }
        packet[10..12].fill(0);
    }
    Some(packet)
}

/// Properties that decide which packets must keep their order, determined without the coalescer's
/// code.
struct Traits {
    addresses: Vec<u8>,
    /// Protocol and ports; `None` if they are hidden, so that the packet may belong to any flow.
    flow: Option<(u8, [u8; 4])>,
}

impl Traits {
    fn of(packet: &[u8]) -> Self {
        let ip = IpHeader::parse(packet).expect("a whole packet");
        let v6 = ip.is_v6();
        let addresses = packet[if v6 { 8..40 } else { 12..20 }].to_vec();
        let transport = &packet[ip.header_len..];
        let plain = !ip.fragment && ip.header_len == if v6 { 40 } else { 20 };
        let least = match ip.protocol {
            TCP => 20,
            UDP => 8,
            _ => 0,
        };
        let hidden = !plain || transport.len() < least || v6 && is_extension_header(ip.protocol);
        let flow = (!hidden).then(|| {
            let mut ports = [0; 4];
            if least > 0 {
                ports.copy_from_slice(&transport[..4]);
            }
            (ip.protocol, ports)
        });
        Self { addresses, flow }
    }

    /// Returns true if the order of the two packets must be kept.
    fn binds(&self, other: &Self) -> bool {
        let related = match (self.flow, other.flow) {
            (Some(a), Some(b)) => a == b,
            _ => true,
        };
        related && self.addresses == other.addresses
    }
}
