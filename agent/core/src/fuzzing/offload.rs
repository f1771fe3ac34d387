//! Entry points for packets from the TUN and for plaintexts from peers.

use super::merged::{Likeness, check};
use crate::offload::Checksum;
use crate::offload::coalesce::CoalesceConfig;
use crate::offload::segment::segment;
use crate::offload::vnet::VnetHeader;
use crate::wire::header::Header;
use crate::wire::ip::{self, IpHeader};

/// Reads `data` as a virtio_net_hdr and the packet after it, and segments the packet. The segments
/// must be whole packets. Their number must be the announced one, and no segment may be longer than
/// the announced maximum length.
pub fn split_packet(data: &[u8]) {
    let Some(vnet) = VnetHeader::parse(data) else { return };
    let mut packet = data[VnetHeader::LEN..].to_vec();
    let Ok(mut segments) = segment(vnet, &mut packet) else { return };
    let (count, longest) = (segments.count(), segments.max_segment_len());
    let mut seen = 0;
    while let Some(segment) = segments.next_segment() {
        let ip = IpHeader::parse(segment);
        assert!(
            ip.is_some_and(|ip| ip.total_len == segment.len()),
            "A segment is not a whole packet."
        );
        assert!(segment.len() <= longest, "A segment is longer than announced.");
        seen += 1;
    }
    assert_eq!(seen, count, "The number of segments differs from the announced one.");
}

/// Segments a superpacket and coalesces the segments. Segmenting the result must restore the same
/// bytes.
pub fn split_coalesce(data: &[u8]) {
    let Some(vnet) = VnetHeader::parse(data) else { return };
    let mut packet = data[VnetHeader::LEN..].to_vec();
    let mut plaintexts = Vec::new();
    let Ok(mut segments) = segment(vnet, &mut packet) else { return };
    if segments.count() > MAX_PACKETS {
        return;
    }
    let checksum = segments.checksum();
    while let Some(segment) = segments.next_segment() {
        plaintexts.push((segment.to_vec(), checksum));
    }
    check(&plaintexts, ALL, Likeness::Exact);
}

/// Maximum number of packets of one input, because the check takes quadratic time.
const MAX_PACKETS: usize = 400;

const ALL: CoalesceConfig = CoalesceConfig { tcp: true, udp: true, partial_checksum: true };

/// Coalesces packets. The first byte selects the offloads; a byte before each packet gives its
/// checksum state. The writes must contain the pushed packets in order.
pub fn coalesce_packets(data: &[u8]) {
    let Some((&config, mut rest)) = data.split_first() else { return };
    let config = CoalesceConfig {
        tcp: config & 1 != 0,
        udp: config & 2 != 0,
        partial_checksum: config & 4 != 0,
    };
    let mut packets = Vec::new();
    while let Some((&state, tail)) = rest.split_first() {
        let Some(ip) = IpHeader::parse(tail) else { break };
        let state = if state & 1 == 0 { Checksum::Partial } else { Checksum::Full };
        packets.push((tail[..ip.total_len].to_vec(), state));
        rest = &tail[ip.total_len..];
        if packets.len() == MAX_PACKETS {
            break;
        }
    }
    check(&packets, config, Likeness::Merged);
}

/// Iterates over the packets of a plaintext. They must follow each other without a gap up to the
/// first invalid one.
pub fn ip_packets(data: &[u8]) {
    let mut at = 0;
    for packet in ip::packets(data) {
        let Ok((range, ip)) = packet else { return };
        assert_eq!(range.start, at, "gap");
        assert!(ip.header_len <= ip.total_len && ip.total_len == range.len());
        at = range.end;
    }
    assert_eq!(at, data.len(), "rest");
}

/// Parses an outer header. Encoding a valid one must restore its bytes.
pub fn outer_header(data: &[u8]) {
    if let Ok(header) = Header::parse(data) {
        assert_eq!(header.to_bytes(), data[..16]);
    }
}

#[cfg(test)]
mod tests {
    use super::super::{run_corpus, run_variations};
    use super::*;

    type Target = (&'static str, fn(&[u8]));

    const TARGETS: [Target; 5] = [
        ("split_packet", split_packet),
        ("split_coalesce", split_coalesce),
        ("coalesce_packets", coalesce_packets),
        ("ip_packets", ip_packets),
        ("outer_header", outer_header),
    ];

    #[test]
    fn corpora_pass_their_targets() {
        for (target, run) in TARGETS {
            run_corpus(target, run);
        }
    }

    #[test]
    fn variations_of_corpora_pass_their_targets() {
        for (target, run) in TARGETS {
            run_variations(target, 20_000, run);
        }
    }
}
