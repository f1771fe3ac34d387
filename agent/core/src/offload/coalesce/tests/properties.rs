//! Properties that hold for random packets.

use proptest::prelude::*;

use super::*;

proptest! {
    #[test]
    fn random_packets_do_not_panic_or_get_lost(
        packets in prop::collection::vec(
            (prop::collection::vec(any::<u8>(), 20..120), prop::sample::select(vec![0x45u8, 0x46, 0x60]),
             prop::sample::select(vec![6u8, 17, 1]), any::<bool>()), 0..20),
        tcp in any::<bool>(), udp in any::<bool>(), partial_checksum in any::<bool>(),
    ) {
        let packets: Vec<_> = packets.into_iter().map(|(mut bytes, first, protocol, partial)| {
            bytes[0] = first;
            if first == 0x60 {
                bytes.resize(bytes.len().max(40), 0);
                let length = (bytes.len() - 40) as u16;
                bytes[4..6].copy_from_slice(&length.to_be_bytes());
                bytes[6] = protocol;
            } else {
                bytes.resize(bytes.len().max(24), 0);
                let length = bytes.len() as u16;
                bytes[2..4].copy_from_slice(&length.to_be_bytes());
                bytes[9] = protocol;
            }
            (bytes, if partial { Checksum::Partial } else { Checksum::Full })
        }).collect();
        let written = coalesce_with(CoalesceConfig { tcp, udp, partial_checksum }, &packets);
        prop_assert_eq!(written.iter().map(|w| w.segments).sum::<usize>(), packets.len());
    }

    /// Segmenting the writes restores the packets of each flow in their order, for any order of
    /// flows.
    #[test]
    fn every_flow_keeps_its_order(
        steps in prop::collection::vec((0u16..4, 1usize..200, any::<bool>(), 0u8..12), 1..80),
    ) {
        let mut next = [0u32; 4];
        let packets: Vec<Packet> = steps.iter().map(|&(flow, length, psh, special)| {
            let sequence = next[usize::from(flow)];
            next[usize::from(flow)] += length as u32;
            Packet::tcp(sequence, length).with(|p| {
                p.source_port = flow;
                p.flags = ACK | if psh { PSH } else { 0 } | match special { 0 => FIN, 1 => CWR, _ => 0 };
                if special == 2 { p.payload.clear(); p.flags = ACK | URG; }
            })
        }).collect();
        let mut got: [Vec<u8>; 4] = Default::default();
        for written in coalesce(&packets) {
            let flow = usize::from(u16::from_be_bytes([written.bytes[20], written.bytes[21]]));
            got[flow].extend(&written.bytes[52..]);
        }
        let mut expected: [Vec<u8>; 4] = Default::default();
        for packet in &packets {
            expected[usize::from(packet.source_port)].extend(&packet.payload);
        }
        prop_assert_eq!(got, expected);
    }

    /// Several flows of all kinds in any order, mostly in sequence and with some odd packets:
    /// segmenting the writes restores the pushed packets.
    #[test]
    fn written_packets_equal_pushed_packets(
        steps in prop::collection::vec(
            (0u16..4, prop::sample::select(vec![100usize, 100, 100, 100, 33, 1, 0, 101]), 0u8..40),
            1..60,
        ),
        v6 in any::<bool>(),
        full in any::<bool>(),
        tcp in prop::sample::select(vec![true, true, true, false]),
        udp in prop::sample::select(vec![true, true, true, false]),
        partial_checksum in prop::sample::select(vec![true, true, true, false]),
    ) {
        let mut next = [(0u32, 0u16); 4];
        let packets: Vec<_> = steps.iter().map(|&(flow, length, strange)| {
            let (sequence, id) = next[usize::from(flow)];
            next[usize::from(flow)] = (sequence.wrapping_add(length as u32), id.wrapping_add(1));
            let packet = Packet::tcp(sequence, length).with(|p| {
                // Two flows of each protocol, one of each with DF.
                (p.source_port, p.udp, p.dont_fragment) = (flow, flow > 1, flow % 2 == 0);
                (p.v6, p.id) = (v6, id);
                p.checksum = if full && flow % 2 == 0 { Checksum::Full } else { Checksum::Partial };
                match strange {
                    0 => p.flags |= PSH,
                    1 => p.flags |= FIN,
                    2 => p.flags |= ECE,
                    3 => p.flags |= CWR,
                    4 => p.tos ^= 1,
                    5 => p.ttl -= 1,
                    6 => p.ip_options = if v6 { Vec::new() } else { vec![1; 4] },
                    7 => p.more_fragments = true,
                    8 => p.id ^= 5,
                    9 => p.window += 1,
                    10 => p.options[9] ^= 1,
                    11 => p.sequence ^= 64,
                    12 => p.acknowledgement += 1,
                    _ => {}
                }
            });
            let mut bytes = packet.bytes();
            match strange {
                13 => if let Some(last) = bytes.last_mut() { *last ^= 1 },
                14 => bytes[10] ^= 1,
                15 if v6 => bytes[6] = 60,
                _ => {}
            }
            (bytes, packet.checksum)
        }).collect();
        let config = CoalesceConfig { tcp, udp, partial_checksum };
        check(&packets, config, Likeness::Merged);
    }
}
