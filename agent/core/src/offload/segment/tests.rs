use proptest::prelude::*;

use super::super::testing::*;
use super::super::{Checksum, vnet};
use super::*;
use crate::wire::tcp::{ACK, ECE};

fn segments(vnet: VnetHeader, bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut bytes = bytes.to_vec();
    let mut segments = segment(vnet, &mut bytes).unwrap();
    let mut all = Vec::new();
    while let Some(segment) = segments.next_segment() {
        all.push(segment.to_vec());
    }
    assert_eq!(all.len(), segments.count());
    assert_eq!(all.iter().map(Vec::len).max(), Some(segments.max_segment_len()));
    all
}

fn refused(vnet: VnetHeader, bytes: &[u8]) -> DropReason {
    segment(vnet, &mut bytes.to_vec()).map(|s| s.count()).unwrap_err()
}

fn flags_of(segments: &[Vec<u8>]) -> Vec<u8> {
    segments.iter().map(|s| s[20 + 13]).collect()
}

#[test]
fn segments_equal_individually_sent_packets() {
    for v6 in [false, true] {
        let whole = Packet::tcp(1000, 2500).flags(ACK | PSH).with(|p| p.v6 = v6);
        let split = segments(whole.vnet(1000), &whole.bytes());
        for (i, segment) in split.iter().enumerate() {
            let expected = whole.clone().with(|p| {
                p.sequence += i as u32 * 1000;
                p.id += i as u16;
                p.payload = whole.payload[i * 1000..(i * 1000 + 1000).min(2500)].to_vec();
                p.flags = if i == 2 { ACK | PSH } else { ACK };
            });
            assert_eq!(*segment, expected.bytes(), "segment {i}, v6 {v6}");
        }
    }
}

#[test]
fn udp_segments_are_whole_datagrams() {
    for v6 in [false, true] {
        let whole = Packet::udp(2500).with(|p| p.v6 = v6);
        let split = segments(whole.vnet(1000), &whole.bytes());
        for (i, segment) in split.iter().enumerate() {
            let expected = whole.clone().with(|p| {
                p.id += i as u16;
                p.payload = whole.payload[i * 1000..(i * 1000 + 1000).min(2500)].to_vec();
            });
            assert_eq!(*segment, expected.bytes());
        }
    }
}

#[test]
fn cwr_is_set_on_first_segment_only() {
    let whole = Packet::tcp(0, 300).flags(ACK | CWR | ECE);
    let vnet = VnetHeader { gso_type: vnet::GSO_TCPV4 | vnet::GSO_ECN, ..whole.vnet(100) };
    assert_eq!(flags_of(&segments(vnet, &whole.bytes())), [ACK | CWR | ECE, ACK | ECE, ACK | ECE]);
}

#[test]
fn fin_and_psh_are_set_on_last_segment_only() {
    let whole = Packet::tcp(0, 300).flags(ACK | FIN | PSH);
    assert_eq!(flags_of(&segments(whole.vnet(100), &whole.bytes())), [ACK, ACK, ACK | FIN | PSH]);
}

#[test]
fn ipv4_id_grows_by_one_and_wraps() {
    let whole = Packet::tcp(0, 300).with(|p| p.id = 0xffff);
    let split = segments(whole.vnet(100), &whole.bytes());
    let ids: Vec<_> = split.iter().map(|s| u16::from_be_bytes([s[4], s[5]])).collect();
    assert_eq!(ids, [0xffff, 0, 1]);
}

#[test]
fn congestion_experienced_is_copied_to_all_segments() {
    let whole = Packet::tcp(0, 300).with(|p| p.tos = 0x03);
    assert!(segments(whole.vnet(100), &whole.bytes()).iter().all(|s| s[1] == 3));
}

#[test]
fn sequence_numbers_wrap() {
    let whole = Packet::tcp(u32::MAX - 50, 300);
    let split = segments(whole.vnet(100), &whole.bytes());
    assert_eq!(split[1][24..28], (49u32).to_be_bytes());
}

#[test]
fn segments_shorter_than_headers_are_intact() {
    for gso_size in [1, 7, 51, 52, 53] {
        let whole = Packet::tcp(5, 120);
        let split = segments(whole.vnet(gso_size), &whole.bytes());
        let payload: Vec<u8> = split.iter().flat_map(|s| &s[whole.headers()..]).copied().collect();
        assert_eq!(payload, whole.payload, "gso_size {gso_size}");
        for (i, segment) in split.iter().enumerate() {
            assert_eq!(segment[20..24], split[0][20..24]);
            let sequence = 5 + i as u32 * u32::from(gso_size);
            assert_eq!(segment[24..28], sequence.to_be_bytes());
        }
    }
}

#[test]
fn invalid_vnet_headers_are_refused() {
    let tcp = Packet::tcp(0, 300);
    let udp = Packet::udp(300);
    let change = |p: &Packet, change: &dyn Fn(&mut VnetHeader)| {
        let mut vnet = p.vnet(100);
        change(&mut vnet);
        refused(vnet, &p.bytes())
    };
    let ecn = vnet::GSO_ECN;
    for reason in [
        change(&tcp, &|v| v.gso_size = 0),
        change(&tcp, &|v| v.gso_type = vnet::GSO_UDP),
        change(&tcp, &|v| v.gso_type = 77),
        change(&tcp, &|v| v.gso_type = vnet::GSO_TCPV6),
        change(&tcp, &|v| v.gso_type = vnet::GSO_UDP_L4),
        change(&udp, &|v| v.gso_type |= ecn),
        change(&udp, &|v| v.gso_type = vnet::GSO_TCPV4),
        change(&tcp, &|v| v.flags = 0),
        change(&tcp, &|v| v.csum_start = 5000),
        change(&tcp, &|v| v.csum_offset = 5000),
        change(&udp, &|v| v.gso_size = 2),
        refused(
            VnetHeader {
                flags: vnet::NEEDS_CSUM,
                csum_start: 65535,
                csum_offset: 65535,
                ..VnetHeader::default()
            },
            &tcp.bytes(),
        ),
    ] {
        assert_eq!(reason, DropReason::VnetHeader);
    }
}

#[test]
fn packets_with_wrong_lengths_are_refused() {
    let bytes = Packet::tcp(0, 300).bytes();
    let vnet = Packet::tcp(0, 300).vnet(100);
    let mut longer = bytes.clone();
    longer.push(0);
    let mut short_offset = bytes.clone();
    short_offset[32] = 0x40;
    let mut long_offset = Packet::tcp(0, 5).with(|p| p.options.clear()).bytes();
    long_offset[32] = 0xf0;
    for bytes in
        [&[][..], &bytes[..19], &bytes[..bytes.len() - 1], &longer, &short_offset, &long_offset]
    {
        assert_eq!(refused(vnet, bytes), DropReason::EgressMalformed);
    }
}

#[test]
fn udp_segments_beyond_kernel_limit_are_refused() {
    let fits = Packet::udp(128 * 10);
    assert_eq!(segments(fits.vnet(10), &fits.bytes()).len(), 128);
    let more = Packet::udp(128 * 10 + 1);
    assert_eq!(refused(more.vnet(10), &more.bytes()), DropReason::VnetHeader);
}

#[test]
fn partial_checksum_at_usual_place_is_kept() {
    for packet in [Packet::tcp(0, 100), Packet::udp(100), Packet::udp(100).with(|p| p.v6 = true)] {
        let vnet = VnetHeader { gso_type: vnet::GSO_NONE, gso_size: 0, ..packet.vnet(0) };
        let mut bytes = packet.bytes();
        let before = bytes.clone();
        let mut segments = segment(vnet, &mut bytes).unwrap();
        assert_eq!(segments.checksum(), Checksum::Partial);
        assert_eq!(segments.next_segment().unwrap(), before);
        assert!(segments.next_segment().is_none());
    }
}

#[test]
fn partial_checksum_at_other_place_is_completed() {
    // The packet is encapsulated, and the checksum covers the bytes from 28.
    let packet = Packet::udp(100).with(|p| p.checksum = Checksum::Full);
    let mut bytes = packet.bytes();
    bytes[44..46].copy_from_slice(&[0, 0]);
    let vnet = VnetHeader {
        flags: vnet::NEEDS_CSUM,
        csum_start: 28,
        csum_offset: 16,
        ..VnetHeader::default()
    };
    let mut segments = segment(vnet, &mut bytes).unwrap();
    assert_eq!(segments.checksum(), Checksum::Full);
    assert_eq!(checksum::sum(&segments.next_segment().unwrap()[28..], 0), 0xffff);
}

#[test]
fn checksum_start_in_ip_header_is_refused() {
    let bytes = Packet::udp(100).bytes();
    for (csum_start, csum_offset) in [(0, 0), (0, 26), (12, 8), (19, 16)] {
        let flags = vnet::NEEDS_CSUM;
        let vnet = VnetHeader { flags, csum_start, csum_offset, ..VnetHeader::default() };
        assert_eq!(refused(vnet, &bytes), DropReason::VnetHeader);
    }
}

#[test]
fn full_checksum_is_unchanged_even_if_wrong() {
    let mut bytes = Packet::tcp(0, 100).with(|p| p.checksum = Checksum::Full).bytes();
    bytes[36] ^= 0x55;
    assert_eq!(segments(VnetHeader::default(), &bytes), [bytes]);
}

#[test]
fn packets_of_other_protocols_pass_unchanged() {
    for protocol in [1, 47, 132] {
        let mut bytes = Packet::udp(100).bytes();
        bytes[9] = protocol;
        assert_eq!(segments(VnetHeader::default(), &bytes), [bytes]);
    }
}

#[test]
fn checksum_field_in_ip_header_is_refused() {
    for packet in [Packet::udp(100), Packet::udp(100).with(|p| p.v6 = true)] {
        let header = packet.headers() as u16 - 8;
        for start in [0, 10, header - 1] {
            let vnet = VnetHeader {
                flags: vnet::NEEDS_CSUM,
                csum_start: start,
                csum_offset: 0,
                ..VnetHeader::default()
            };
            assert_eq!(refused(vnet, &packet.bytes()), DropReason::VnetHeader, "start {start}");
        }
    }
}

#[test]
fn tcp_segments_beyond_limit_are_refused() {
    // Segments of 7 bytes would exceed `MAX_TCP_SEGMENTS`, which is 65,536 / 8. Segments of 8 bytes
    // are the smallest that Linux sends.
    let long = Packet::tcp(0, 60_000);
    assert_eq!(refused(long.vnet(7), &long.bytes()), DropReason::VnetHeader);
    assert_eq!(segments(long.vnet(8), &long.bytes()).len(), 7500);
}

/// Inserts destination options of 8 bytes between the IPv6 header and the transport.
fn with_extension(packet: &Packet) -> Vec<u8> {
    let mut bytes = packet.bytes();
    let extension = [bytes[6], 0, 1, 4, 0, 0, 0, 0];
    bytes.splice(40..40, extension);
    let length = u16::from_be_bytes([bytes[4], bytes[5]]) + 8;
    bytes[4..6].copy_from_slice(&length.to_be_bytes());
    bytes[6] = 60;
    bytes
}

#[test]
fn checksums_after_extension_headers_are_computed() {
    for udp in [false, true] {
        let whole =
            Packet::tcp(1000, 2500).with(|p| (p.v6, p.udp, p.flags) = (true, udp, ACK | PSH));
        let vnet = VnetHeader { csum_start: 48, ..whole.vnet(1000) };
        let mut bytes = with_extension(&whole);
        let mut segments = segment(vnet, &mut bytes).unwrap();
        assert_eq!((segments.count(), segments.checksum()), (3, Checksum::Full));
        assert_eq!(segments.max_segment_len(), whole.headers() + 8 + 1000);
        for i in 0..3 {
            let expected = whole.clone().with(|p| {
                p.sequence += i as u32 * 1000;
                p.payload = whole.payload[i * 1000..(i * 1000 + 1000).min(2500)].to_vec();
                p.flags = if i == 2 { ACK | PSH } else { ACK };
                p.checksum = Checksum::Full;
            });
            assert_eq!(segments.next_segment().unwrap(), with_extension(&expected), "{i} {udp}");
        }
    }
}

#[test]
fn extension_header_without_transport_is_refused() {
    let whole = Packet::tcp(0, 300).with(|p| p.v6 = true);
    let vnet = VnetHeader { csum_start: 48, ..whole.vnet(100) };
    assert_eq!(refused(whole.vnet(100), &with_extension(&whole)), DropReason::VnetHeader);
    // A fragment, another protocol, a header that exceeds the packet.
    for (at, value) in [(6, 44), (40, 17), (41, 200)] {
        let mut bytes = with_extension(&whole);
        bytes[at] = value;
        assert_eq!(refused(vnet, &bytes), DropReason::VnetHeader, "{value} at {at}");
    }
    let mut single = with_extension(&whole);
    let vnet = VnetHeader { gso_type: vnet::GSO_NONE, gso_size: 0, ..vnet };
    let mut segments = segment(vnet, &mut single).unwrap();
    assert_eq!(segments.checksum(), Checksum::Full);
    let full = whole.clone().with(|p| p.checksum = Checksum::Full);
    assert_eq!(segments.next_segment().unwrap(), with_extension(&full));
}

#[test]
fn segments_keep_ip_options() {
    let whole = Packet::tcp(0, 250).with(|p| p.ip_options = vec![1; 8]);
    let split = segments(whole.vnet(100), &whole.bytes());
    for (i, segment) in split.iter().enumerate() {
        let expected = whole.clone().with(|p| {
            (p.id, p.sequence) = (p.id + i as u16, i as u32 * 100);
            p.payload = whole.payload[i * 100..(i * 100 + 100).min(250)].to_vec();
        });
        assert_eq!(*segment, expected.bytes());
    }
}

proptest! {
    #[test]
    fn random_input_does_not_panic(
        header in prop::array::uniform10(any::<u8>()),
        first in prop::sample::select(vec![0x45u8, 0x46, 0x60, 0x4f, 0x00]),
        bytes in prop::collection::vec(any::<u8>(), 0..300),
        fix_length in any::<bool>(),
        gso in prop::sample::select(vec![0u8, 1, 3, 4, 5, 0x81, 0x85]),
    ) {
        let mut packet = bytes;
        if !packet.is_empty() { packet[0] = first; }
        if fix_length && packet.len() >= 40 {
            let length = packet.len() as u16;
            packet[2..4].copy_from_slice(&length.to_be_bytes());
            if first == 0x60 { packet[4..6].copy_from_slice(&(length - 40).to_be_bytes()); }
        }
        let mut vnet = VnetHeader::parse(&header).unwrap();
        vnet.gso_type = gso;
        if let Ok(mut segments) = segment(vnet, &mut packet) {
            let (count, longest) = (segments.count(), segments.max_segment_len());
            let mut seen = 0;
            while let Some(segment) = segments.next_segment() {
                prop_assert!(segment.len() <= longest && !segment.is_empty());
                seen += 1;
            }
            prop_assert_eq!(seen, count);
        }
    }

    #[test]
    fn segmenting_then_coalescing_restores_bytes(
        udp in any::<bool>(),
        v6 in any::<bool>(),
        gso_size in 1u16..3000,
        extra in 1usize..2000,
        whole_segments in 0usize..40,
        psh in any::<bool>(),
        sequence in any::<u32>(),
        id in any::<u16>(),
        tos in any::<u8>(),
    ) {
        let length = usize::from(gso_size) * whole_segments + extra.min(usize::from(gso_size));
        let packet = Packet::tcp(sequence, 0).with(|p| {
            p.udp = udp;
            p.v6 = v6;
            p.id = id;
            p.tos = tos;
            p.payload = (0..length).map(|i| (i * 7 + usize::from(id)) as u8).collect();
            p.flags = if psh { ACK | PSH } else { ACK };
        });
        prop_assume!(packet.headers() + length <= 65_535);
        let bytes = packet.bytes();
        let split: Vec<_> = segments(packet.vnet(gso_size), &bytes)
            .into_iter()
            .map(|segment| (segment, Checksum::Partial))
            .collect();
        let written = coalesce_with(ALL, &split);
        prop_assert_eq!(written.len(), 1);
        prop_assert_eq!(&written[0].bytes, &bytes);
        prop_assert_eq!(written[0].segments, split.len());
        if split.len() > 1 {
            let expected = VnetHeader { hdr_len: packet.headers() as u16, ..packet.vnet(gso_size) };
            prop_assert_eq!(written[0].vnet, expected);
        }
    }
}
