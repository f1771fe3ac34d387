//! Packets from the TUN and plaintexts from peers, whatever they contain.

use crate::offload::Checksum;
use crate::offload::coalesce::{CoalesceConfig, Coalescer};
use crate::offload::split::split;
use crate::offload::vnet::VnetHeader;
use crate::wire::header::Header;
use crate::wire::ip::{self, IpHeader};

/// A virtio_net_hdr and a packet as the TUN may give them: segments are whole packets, as many and
/// as long as announced.
pub fn split_packet(data: &[u8]) {
    let Some(vnet) = VnetHeader::parse(data) else { return };
    let mut packet = data[VnetHeader::LEN..].to_vec();
    let Ok(mut segments) = split(vnet, &mut packet) else { return };
    let (count, longest) = (segments.count(), segments.max_segment_len());
    let mut seen = 0;
    while let Some(segment) = segments.next_segment() {
        let ip = IpHeader::parse(segment);
        assert!(ip.is_some_and(|ip| ip.total_len == segment.len()), "not a whole packet");
        assert!(segment.len() <= longest, "longer than announced");
        seen += 1;
    }
    assert_eq!(seen, count, "as many as announced");
}

/// What was split is merged again: nothing is lost, nothing is added.
pub fn split_coalesce(data: &[u8]) {
    let Some(vnet) = VnetHeader::parse(data) else { return };
    let mut packet = data[VnetHeader::LEN..].to_vec();
    let mut plaintexts = Vec::new();
    let Ok(mut segments) = split(vnet, &mut packet) else { return };
    let checksum = segments.checksum();
    while let Some(segment) = segments.next_segment() {
        plaintexts.push((segment.to_vec(), checksum));
    }
    let total: usize = plaintexts.iter().map(|(segment, _)| segment.len()).sum();
    let (segments, bytes) = coalesce_all(&plaintexts, ALL);
    assert_eq!(segments, plaintexts.len(), "every segment is written once");
    assert!(bytes <= total, "merging never adds");
}

const ALL: CoalesceConfig = CoalesceConfig { tcp: true, udp: true, partial_checksum: true };

/// Plaintexts of several datagrams: the first byte chooses what the TUN can take, then each packet
/// is led by a byte for its checksum's state. Every packet is written once, none longer than the
/// kernel takes.
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
    }
    let (segments, _) = coalesce_all(&packets, config);
    assert_eq!(segments, packets.len(), "every packet is written once");
}

/// Pushes all and flushes twice; returns the segments and bytes written.
fn coalesce_all(packets: &[(Vec<u8>, Checksum)], config: CoalesceConfig) -> (usize, usize) {
    let mut arena: Vec<u8> = packets.iter().flat_map(|(bytes, _)| bytes).copied().collect();
    let mut coalescer = Coalescer::new(config);
    let mut at = 0;
    for (bytes, checksum) in packets {
        let range = at..at + bytes.len();
        at = range.end;
        if let Some(ip) = IpHeader::parse(bytes) {
            coalescer.push(&mut arena, range, &ip, *checksum);
        }
    }
    let (mut segments, mut written) = (0, 0);
    coalescer.flush(&arena, |packet| {
        let payload: usize = packet
            .payload
            .iter()
            .map(|slice| arena[slice.offset..slice.offset + slice.len].len())
            .sum();
        assert_eq!(packet.header.len() + payload, packet.len, "as long as announced");
        assert!(packet.len <= 65_535 && packet.payload.len() <= 1000, "more than the kernel takes");
        segments += packet.segments;
        written += packet.len;
    });
    coalescer.flush(&arena, |_| unreachable!("flushed already"));
    (segments, written)
}

/// A plaintext: packets follow each other without a gap, up to the first that is none.
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

/// A header that is accepted is written again the same.
pub fn outer_header(data: &[u8]) {
    if let Ok(header) = Header::parse(data) {
        assert_eq!(header.to_bytes(), data[..16]);
    }
}

#[cfg(test)]
mod tests {
    use super::super::run_corpus;
    use super::*;

    #[test]
    fn corpora() {
        run_corpus("split_packet", split_packet);
        run_corpus("split_coalesce", split_coalesce);
        run_corpus("coalesce_packets", coalesce_packets);
        run_corpus("ip_packets", ip_packets);
        run_corpus("outer_header", outer_header);
    }
}
