mod properties;

use super::*;
use crate::fuzzing::merged::{Likeness, check};
use crate::offload::testing::*;
use crate::offload::vnet;
use crate::wire::tcp::{ACK, CWR, ECE, FIN, PSH, RST, SYN, URG};

const S: usize = 100;

/// Returns consecutive packets of one flow.
fn train(count: usize) -> Vec<Packet> {
    (0..count).map(|i| Packet::tcp((i * S) as u32, S).with(|p| p.id = i as u16)).collect()
}

fn datagrams(count: usize) -> Vec<Packet> {
    (0..count).map(|i| Packet::udp(S).with(|p| p.id = i as u16)).collect()
}

/// Returns consecutive packets of one flow, of which one is changed.
fn changed(count: usize, index: usize, change: impl FnOnce(&mut Packet)) -> Vec<Packet> {
    let mut packets = train(count);
    change(&mut packets[index]);
    packets
}

#[test]
fn consecutive_tcp_segments_merge() {
    for v6 in [false, true] {
        let packets: Vec<_> = train(5).into_iter().map(|p| p.with(|p| p.v6 = v6)).collect();
        let written = coalesce(&packets);
        assert_eq!(written.len(), 1);
        let whole = packets[0].clone().with(|p| {
            p.payload = packets.iter().flat_map(|p| p.payload.clone()).collect();
        });
        assert_eq!(written[0].bytes, whole.bytes());
        assert_eq!(usize::from(written[0].vnet.hdr_len), whole.headers());
    }
}

#[test]
fn equal_datagrams_merge() {
    let written = coalesce(&datagrams(4));
    assert_eq!(written.len(), 1);
    assert_eq!((written[0].vnet.gso_type, written[0].vnet.gso_size), (vnet::GSO_UDP_L4, 100));
}

#[test]
fn special_flags_are_verbatim_and_flush_flow() {
    for flag in [SYN, FIN, RST, URG, CWR] {
        let packets = changed(4, 1, |p| p.flags |= flag);
        assert_eq!(shape(&packets), [1, 1, 2], "flag {flag:#x}");
        assert_eq!(coalesce(&packets)[1].bytes, packets[1].bytes());
        // A segment without payload does not advance the sequence number, so only the flush keeps
        // the order.
        for v6 in [false, true] {
            let mut packets = train(2);
            packets.insert(1, Packet::tcp(100, 0).flags(ACK | flag));
            let packets: Vec<_> = packets.into_iter().map(|p| p.with(|p| p.v6 = v6)).collect();
            assert_eq!(shape(&packets), [1, 1, 1], "flag {flag:#x}, v6 {v6}");
        }
    }
    let mut packets = train(2);
    packets.insert(1, Packet::tcp(100, 0).flags(0));
    assert_eq!(shape(&packets), [1, 1, 1], "A segment without ACK must flush its flow, too.");
}

#[test]
fn empty_datagram_is_verbatim_and_flushes_flow() {
    let mut packets = datagrams(4);
    packets[1].payload.clear();
    assert_eq!(shape(&packets), [1, 1, 2]);
}

#[test]
fn empty_segment_is_verbatim_and_flushes_flow() {
    for (v6, flags) in [(false, ACK), (true, ACK), (false, ACK | ECE), (true, ACK | PSH)] {
        let mut packets = train(4);
        packets.insert(2, Packet::tcp(200, 0).flags(flags));
        let packets: Vec<_> = packets.into_iter().map(|p| p.with(|p| p.v6 = v6)).collect();
        assert_eq!(shape(&packets), [2, 1, 2], "flags {flags:#x}, v6 {v6}");
        assert_eq!(coalesce(&packets)[1].bytes, packets[2].bytes());
    }
    assert_eq!(shape(&[Packet::tcp(0, 0), Packet::tcp(0, 0)]), [1, 1]);
}

#[test]
fn sack_blocks_are_written_before_later_data() {
    // A SACK option of 8 bytes (RFC 2018) after two NOPs, between data of the same flow.
    let sack = Packet::tcp(100, 0).with(|p| {
        p.options = vec![1, 1, 5, 10, 0, 0, 3, 232, 0, 0, 7, 208];
    });
    let packets = [Packet::tcp(0, S), sack.clone(), Packet::tcp(100, S), Packet::tcp(200, S)];
    let written = coalesce(&packets);
    assert_eq!(written.iter().map(|w| w.segments).collect::<Vec<_>>(), [1, 1, 2]);
    assert_eq!(written[1].bytes, sack.bytes(), "The SACK blocks must arrive unchanged.");
    let others = |p: Packet| p.with(|p| p.source_port = 9);
    let packets = [Packet::tcp(0, S), others(sack), Packet::tcp(100, S)];
    assert_eq!(shape(&packets), [2, 1], "An empty segment of another flow must flush nothing.");
}

#[test]
fn ece_merges_only_with_ece() {
    let all: Vec<_> = train(3).into_iter().map(|p| p.flags(ACK | ECE)).collect();
    assert_eq!(shape(&all), [3]);
    assert_eq!(shape(&changed(3, 1, |p| p.flags |= ECE)), [1, 1, 1]);
}

#[test]
fn psh_segment_merges_and_flushes_flow() {
    let packets = changed(4, 1, |p| p.flags |= PSH);
    assert_eq!(shape(&packets), [2, 2]);
    let written = coalesce(&packets);
    assert_eq!(written[0].bytes[33] & PSH, PSH);
    assert_eq!(written[1].bytes[33] & PSH, 0);
}

#[test]
fn different_headers_never_merge() {
    type Change = (&'static str, fn(&mut Packet));
    let changes: [Change; 9] = [
        ("dscp", |p| p.tos = 0x28),
        ("ecn", |p| p.tos = 0x01),
        ("ttl", |p| p.ttl = 63),
        ("df", |p| p.dont_fragment = false),
        ("ack", |p| p.acknowledgement = 100),
        ("window", |p| p.window = 501),
        ("options", |p| p.options[11] = 9),
        ("port", |p| p.source_port = 1001),
        ("sequence", |p| p.sequence += 1),
    ];
    for (name, change) in changes {
        assert_eq!(shape(&changed(2, 1, change)), [1, 1], "{name}");
    }
    for (name, change) in &changes[..3] {
        let both = |p: Packet| p.with(|p| p.v6 = true);
        let packets: Vec<_> = changed(2, 1, change).into_iter().map(both).collect();
        assert_eq!(shape(&packets), [1, 1], "{name} of IPv6");
    }
}

#[test]
fn different_flow_labels_never_merge() {
    let packets: Vec<_> = train(2).into_iter().map(|p| p.with(|p| p.v6 = true)).collect();
    let mut bytes: Vec<_> = packets.iter().map(|p| (p.bytes(), p.checksum)).collect();
    bytes[1].0[3] ^= 1;
    assert_eq!(coalesce_with(ALL, &bytes).len(), 2);
}

#[test]
fn ect0_and_ect1_never_merge() {
    let packets = [Packet::tcp(0, S).with(|p| p.tos = 2), Packet::tcp(100, S).with(|p| p.tos = 1)];
    let tos: Vec<_> = coalesce(&packets).iter().map(|w| w.bytes[1]).collect();
    assert_eq!(tos, [2, 1]);
}

#[test]
fn short_tail_flushes_and_longer_packet_starts_new() {
    let tail = [Packet::tcp(0, 100), Packet::tcp(100, 1), Packet::tcp(101, 100)];
    assert_eq!(shape(&tail), [2, 1]);
    let longer = [Packet::tcp(0, 50), Packet::tcp(50, 100), Packet::tcp(150, 100)];
    assert_eq!(shape(&longer), [1, 2]);
    let odd = [Packet::tcp(0, 33), Packet::tcp(33, 33), Packet::tcp(66, 7)];
    assert_eq!(shape(&odd), [3]);
}

#[test]
fn psh_in_middle_gives_two_superpackets() {
    let packets = [
        Packet::tcp(1, 100),
        Packet::tcp(101, 100).flags(ACK | PSH),
        Packet::tcp(201, 100),
        Packet::tcp(301, 100),
    ];
    assert_eq!(shape(&packets), [2, 2]);
}

#[test]
fn ids_must_be_consecutive_without_df() {
    let ids = |ids: [u16; 3]| -> Vec<Packet> {
        let packets = train(3).into_iter().zip(ids);
        packets.map(|(p, id)| p.with(|p| (p.dont_fragment, p.id) = (false, id))).collect()
    };
    assert_eq!(shape(&ids([0xffff, 0, 1])), [3]);
    assert_eq!(shape(&ids([4, 6, 7])), [1, 2]);
    assert_eq!(
        shape(&changed(3, 1, |p| p.id = 999)),
        [3],
        "Any identification must merge with DF."
    );
}

#[test]
fn ip_options_and_fragments_are_verbatim_and_flush() {
    // Datagrams have no sequence number, so only the flush keeps their order.
    let change_second = |change: &dyn Fn(&mut Packet)| {
        let mut packets = datagrams(4);
        change(&mut packets[1]);
        packets
    };
    let options = change_second(&|p| p.ip_options = vec![1; 4]);
    assert_eq!(shape(&options), [1, 1, 2]);
    assert_eq!(coalesce(&options)[1].bytes, options[1].bytes());
    let first = change_second(&|p| (p.dont_fragment, p.more_fragments) = (false, true));
    assert_eq!(shape(&first), [1, 1, 2]);
    assert_eq!(coalesce(&first)[1].vnet, VnetHeader::default());
    let mut last: Vec<_> = datagrams(4).iter().map(|p| (p.bytes(), p.checksum)).collect();
    last[1].0[7] = 9;
    assert_eq!(coalesce_with(ALL, &last).len(), 3);
}

#[test]
fn ipv6_extension_headers_are_verbatim_and_flush() {
    let packets: Vec<_> = datagrams(4).into_iter().map(|p| p.with(|p| p.v6 = true)).collect();
    for header in [0, 43, 44, 51, 60, 135, 139, 140] {
        let mut bytes: Vec<_> = packets.iter().map(|p| (p.bytes(), p.checksum)).collect();
        bytes[1].0[6] = header;
        let written = coalesce_with(ALL, &bytes);
        let shape: Vec<_> = written.iter().map(|w| w.segments).collect();
        assert_eq!(shape, [1, 1, 2], "next header {header}");
        assert_eq!((written[1].vnet, &written[1].bytes), (VnetHeader::default(), &bytes[1].0));
    }
}

#[test]
fn retransmission_stays_in_place() {
    let packets = [Packet::tcp(0, S), Packet::tcp(100, S), Packet::tcp(0, S)];
    let written = coalesce(&packets);
    assert_eq!(written.iter().map(|w| w.segments).collect::<Vec<_>>(), [2, 1]);
    assert_eq!(written[1].bytes, packets[2].bytes());
}

#[test]
fn full_checksum_merges_only_if_correct() {
    let full = |p: Packet| p.with(|p| p.checksum = Checksum::Full);
    let packets: Vec<_> = train(4).into_iter().map(full).collect();
    assert_eq!(shape(&packets), [4]);
    let mut bytes: Vec<_> = packets.iter().map(|p| (p.bytes(), p.checksum)).collect();
    for wrong in 0..4 {
        let mut bytes = bytes.clone();
        bytes[wrong].0[60] ^= 1;
        let written = coalesce_with(ALL, &bytes);
        let alone: Vec<_> = written.iter().filter(|w| w.bytes == bytes[wrong].0).collect();
        assert_eq!(alone.len(), 1, "Packet {wrong} must be written verbatim.");
        assert_eq!(alone[0].vnet, VnetHeader::default());
    }
    // Partial and complete checksums never merge.
    bytes[2] = (train(4)[2].bytes(), Checksum::Partial);
    assert_eq!(coalesce_with(ALL, &bytes).len(), 3);
}

#[test]
fn ipv4_udp_checksum_of_zero_stays_zero() {
    let mut packet = Packet::udp(S).with(|p| p.checksum = Checksum::Full).bytes();
    packet[26..28].copy_from_slice(&[0, 0]);
    let written =
        coalesce_with(ALL, &[(packet.clone(), Checksum::Full), (packet.clone(), Checksum::Full)]);
    assert_eq!(written.len(), 2);
    assert!(written.iter().all(|w| w.bytes == packet && w.vnet == VnetHeader::default()));
}

#[test]
fn single_packet_header_names_partial_checksum_place() {
    for (packet, start, offset) in [
        (Packet::tcp(0, 0), 20, 16),
        (Packet::udp(5), 20, 6),
        (Packet::udp(5).with(|p| p.v6 = true), 40, 6),
        (Packet::tcp(0, 9).with(|p| p.ip_options = vec![1; 8]), 28, 16),
    ] {
        let written = coalesce(std::slice::from_ref(&packet));
        let expected = VnetHeader {
            flags: vnet::NEEDS_CSUM,
            csum_start: start,
            csum_offset: offset,
            ..VnetHeader::default()
        };
        assert_eq!(written[0].vnet, expected);
        assert_eq!(written[0].bytes, packet.bytes());
    }
}

#[test]
fn impossible_partial_checksum_is_ignored() {
    let mut icmp = Packet::udp(20).bytes();
    icmp[9] = 1;
    let fragment = Packet::udp(20).with(|p| (p.dont_fragment, p.more_fragments) = (false, true));
    let short = [0x45, 0, 0, 24, 0, 0, 0, 0, 64, 6, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0];
    for bytes in [icmp, fragment.bytes(), short.to_vec()] {
        let written = coalesce_with(ALL, &[(bytes.clone(), Checksum::Partial)]);
        assert_eq!(written[0].vnet, VnetHeader::default());
        assert_eq!(written[0].bytes, bytes);
    }
}

#[test]
fn disabled_checksum_offload_completes_and_never_merges() {
    let config = CoalesceConfig { partial_checksum: false, ..ALL };
    for packets in [train(3), datagrams(3)] {
        let bytes: Vec<_> = packets.iter().map(|p| (p.bytes(), Checksum::Partial)).collect();
        let written = coalesce_with(config, &bytes);
        for (written, packet) in written.iter().zip(packets) {
            let expected = packet.with(|p| p.checksum = Checksum::Full).bytes();
            assert_eq!(written.bytes, expected);
            assert_eq!(written.vnet, VnetHeader::default());
        }
    }
}

#[test]
fn computed_udp_checksum_of_zero_becomes_all_ones() {
    // Searches a payload whose checksum is zero.
    let packet = (0..=u16::MAX)
        .map(|word| Packet::udp(2).with(|p| p.payload = word.to_be_bytes().to_vec()))
        .find(|p| {
            let bytes = p.bytes();
            checksum::sum(&bytes[20..], 0) == 0xffff
        });
    let packet = packet.expect("one of 65,536 words complements the rest");
    let config = CoalesceConfig { partial_checksum: false, ..ALL };
    let written = coalesce_with(config, &[(packet.bytes(), Checksum::Partial)]);
    assert_eq!(written[0].bytes[26..28], [0xff, 0xff]);
}

#[test]
fn each_protocol_can_be_disabled() {
    let only = |tcp, udp| CoalesceConfig { tcp, udp, partial_checksum: true };
    let bytes = |packets: Vec<Packet>| -> Vec<_> {
        packets.iter().map(|p| (p.bytes(), p.checksum)).collect()
    };
    assert_eq!(coalesce_with(only(false, true), &bytes(train(3))).len(), 3);
    assert_eq!(coalesce_with(only(true, false), &bytes(train(3))).len(), 1);
    assert_eq!(coalesce_with(only(true, false), &bytes(datagrams(3))).len(), 3);
}

#[test]
fn superpackets_stay_within_kernel_limits() {
    let large: Vec<_> = (0..60).map(|i| Packet::tcp(i * 1400, 1400)).collect();
    let written = coalesce(&large);
    assert!(written.iter().all(|w| w.bytes.len() <= 65_535));
    assert_eq!(written.iter().map(|w| w.segments).sum::<usize>(), 60);
    let many = coalesce(&datagrams(300));
    assert_eq!(many.iter().map(|w| w.segments).collect::<Vec<_>>(), [64, 64, 64, 64, 44]);
}

#[test]
fn alternating_flows_merge_separately() {
    let flow = |port: u16| move |p: Packet| p.with(|p| p.source_port = port);
    let packets: Vec<_> =
        train(4).into_iter().flat_map(|p| [1, 2, 3].map(|port| flow(port)(p.clone()))).collect();
    assert_eq!(shape(&packets), [4, 4, 4]);
}

#[test]
fn other_protocols_are_written_verbatim() {
    for protocol in [1u8, 47, 132] {
        let mut bytes = Packet::udp(S).bytes();
        bytes[9] = protocol;
        let written = coalesce_with(ALL, &[(bytes.clone(), Checksum::Full)]);
        assert_eq!((written[0].vnet, &written[0].bytes), (VnetHeader::default(), &bytes));
    }
}

#[test]
fn wrong_ip_header_checksum_is_not_merged_or_repaired() {
    for checksum in [Checksum::Partial, Checksum::Full] {
        for wrong in 0..3 {
            let right = |p: Packet| p.with(|p| p.checksum = checksum);
            let mut packets: Vec<_> =
                train(3).into_iter().map(|p| (right(p).bytes(), checksum)).collect();
            packets[wrong].0[10] ^= 1;
            let written = coalesce_with(ALL, &packets);
            assert!(written.iter().any(|w| w.bytes == packets[wrong].0), "packet {wrong}");
        }
    }
}

#[test]
fn packet_with_wrong_length_is_not_merged() {
    let packets = train(3);
    for (from, to) in [(0, 1), (0, -1), (0, -140), (1, 0)] {
        let mut arena = packets.iter().flat_map(Packet::bytes).collect::<Vec<u8>>();
        let mut coalescer = Coalescer::new(ALL);
        for index in 0..3usize {
            let whole = index * 152..index * 152 + 152;
            let ip = IpHeader::parse(&arena[whole.clone()]).unwrap();
            let at = match index {
                1 => whole.start + from..whole.end.wrapping_add_signed(to),
                _ => whole,
            };
            coalescer.push(&mut arena, at, &ip, Checksum::Partial);
        }
        let mut segments = Vec::new();
        coalescer.flush(&arena, |packet| segments.push((packet.segments, packet.len)));
        let middle = (152 - from as isize + to) as usize;
        assert_eq!(segments, [(1, 152), (1, middle), (1, 152)]);
    }
}

#[test]
fn flushed_flow_does_not_affect_other_flows() {
    let other = |p: Packet| p.with(|p| p.source_port = 9);
    for flag in [SYN, FIN, RST, URG, CWR] {
        let packets =
            [Packet::tcp(0, S), other(Packet::tcp(0, S)).flags(ACK | flag), Packet::tcp(100, S)];
        assert_eq!(shape(&packets), [2, 1], "flag {flag:#x}");
    }
    let unchecked = Packet::udp(S).with(|p| p.source_port = 9);
    let mut bytes: Vec<_> = train(2).iter().map(|p| (p.bytes(), Checksum::Partial)).collect();
    bytes.insert(1, (unchecked.bytes(), Checksum::Full));
    bytes[1].0[26..28].fill(0);
    assert_eq!(coalesce_with(ALL, &bytes).len(), 2);
}

#[test]
fn fragment_flushes_all_flows_of_its_addresses() {
    let fragment = Packet::udp(S).with(|p| {
        (p.dont_fragment, p.more_fragments, p.source_port) = (false, true, 77);
    });
    assert_eq!(shape(&[Packet::tcp(0, S), fragment, Packet::tcp(100, S)]), [1, 1, 1]);
}

#[test]
fn short_header_is_not_merged() {
    for (v6, udp, transport) in
        [(false, false, 19), (false, true, 7), (true, false, 19), (true, true, 7)]
    {
        let whole = Packet::tcp(0, S).with(|p| (p.v6, p.udp, p.options) = (v6, udp, Vec::new()));
        let ip = if v6 { 40 } else { 20 };
        let mut bytes = whole.bytes()[..ip + transport].to_vec();
        let (field, length) = if v6 { (4, transport) } else { (2, ip + transport) };
        bytes[field..field + 2].copy_from_slice(&(length as u16).to_be_bytes());
        for checksum in [Checksum::Partial, Checksum::Full] {
            let written =
                coalesce_with(ALL, &[(bytes.clone(), checksum), (bytes.clone(), checksum)]);
            assert_eq!(written.len(), 2);
            assert!(written.iter().all(|w| w.bytes == bytes && w.vnet == VnetHeader::default()));
        }
    }
}

#[test]
fn changed_configuration_keeps_order() {
    let mut coalescer = Coalescer::new(ALL);
    let packets = datagrams(3);
    let mut arena = packets.iter().flat_map(Packet::bytes).collect::<Vec<u8>>();
    for (index, udp) in [true, false, true].into_iter().enumerate() {
        coalescer.set_config(CoalesceConfig { udp, ..ALL });
        let at = index * 128..index * 128 + 128;
        let ip = IpHeader::parse(&arena[at.clone()]).unwrap();
        coalescer.push(&mut arena, at, &ip, Checksum::Partial);
    }
    assert_eq!(coalescer.len(), 3);
    let mut ids = Vec::new();
    coalescer.flush(&arena, |packet| ids.push(arena[packet.payload[0].offset + 5]));
    assert_eq!(ids, [0, 1, 2]);
}
