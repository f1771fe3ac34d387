//! Benchmarks of the packet path without kernel and AEAD.

use std::net::{IpAddr, Ipv6Addr};

use divan::counter::{BytesCount, ItemsCount};
use divan::{Bencher, black_box};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use skein_core::offload::Checksum;
use skein_core::offload::coalesce::{CoalesceConfig, Coalescer};
use skein_core::offload::segment::segment;
use skein_core::offload::vnet::{GSO_TCPV4, NEEDS_CSUM, VnetHeader};
use skein_core::route::{PeerId, RouteTable};
use skein_core::wire::checksum;
use skein_core::wire::ip::IpHeader;

const MSS: usize = 1388;
const SEGMENTS: usize = 45;
const HEADERS: usize = 52;
const VNET: VnetHeader = VnetHeader {
    flags: NEEDS_CSUM,
    gso_type: GSO_TCPV4,
    hdr_len: HEADERS as u16,
    gso_size: MSS as u16,
    csum_start: 20,
    csum_offset: 16,
};

fn main() {
    divan::main();
}

/// Returns a TCP superpacket of 45 segments with a timestamps option.
fn superpacket() -> Vec<u8> {
    let mut packet = vec![0; HEADERS + MSS * SEGMENTS];
    let length = packet.len() as u16;
    packet[..10].copy_from_slice(&[0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, 6]);
    packet[2..4].copy_from_slice(&length.to_be_bytes());
    packet[12..20].copy_from_slice(&[10, 244, 1, 5, 10, 244, 2, 6]);
    packet[32..34].copy_from_slice(&[0x80, 0x10]);
    packet[40..44].copy_from_slice(&[1, 1, 8, 10]);
    packet
}

#[divan::bench]
fn memcpy_64k(bencher: Bencher<'_, '_>) {
    let source = superpacket();
    let mut target = source.clone();
    bencher
        .counter(BytesCount::new(source.len()))
        .bench_local(|| black_box(&mut target).copy_from_slice(black_box(&source)));
}

#[divan::bench]
fn split_64k(bencher: Bencher<'_, '_>) {
    let template = superpacket();
    let mut packet = template.clone();
    bencher.counter(ItemsCount::new(SEGMENTS)).bench_local(|| {
        // Segmentation overwrites payload with headers but reads only the first headers, so only
        // these are restored.
        packet[..HEADERS].copy_from_slice(&template[..HEADERS]);
        let mut segments = segment(VNET, &mut packet).expect("a superpacket");
        while let Some(segment) = segments.next_segment() {
            black_box(segment);
        }
    });
}

/// Returns the segments of one superpacket back to back, as datagrams lie in the receive arena.
fn split_arena() -> Vec<u8> {
    let mut packet = superpacket();
    let mut arena = Vec::new();
    let mut segments = segment(VNET, &mut packet).expect("a superpacket");
    while let Some(segment) = segments.next_segment() {
        arena.extend_from_slice(segment);
    }
    arena
}

fn coalesce(bencher: Bencher<'_, '_>, mut arena: Vec<u8>, packets: usize, checksum: Checksum) {
    let config = CoalesceConfig { tcp: true, udp: true, partial_checksum: true };
    let mut coalescer = Coalescer::new(config);
    bencher.counter(ItemsCount::new(packets)).bench_local(|| {
        let mut at = 0;
        while at < arena.len() {
            let ip = IpHeader::parse(&arena[at..]).expect("a packet");
            let end = at + ip.total_len;
            coalescer.push(&mut arena, at..end, &ip, checksum);
            at = end;
        }
        coalescer.flush(&arena, |written| {
            black_box(written.len);
        });
    });
}

#[divan::bench]
fn coalesce_45_segments(bencher: Bencher<'_, '_>) {
    coalesce(bencher, split_arena(), SEGMENTS, Checksum::Partial);
}

/// Benchmark with complete checksums, as from a sender without checksum offload: each is verified.
#[divan::bench]
fn coalesce_45_segments_with_full_checksums(bencher: Bencher<'_, '_>) {
    let mut arena = split_arena();
    for packet in arena.chunks_mut(HEADERS + MSS) {
        let sum = checksum::finish(checksum::sum(&packet[20..], 0), 6);
        packet[36..38].copy_from_slice(&sum);
    }
    coalesce(bencher, arena, SEGMENTS, Checksum::Full);
}

/// Benchmark of the worst order: four streams whose packets alternate.
#[divan::bench]
fn coalesce_45_segments_of_4_flows_in_turn(bencher: Bencher<'_, '_>) {
    let mut arena = split_arena();
    for (index, packet) in arena.chunks_mut(HEADERS + MSS).enumerate() {
        let (flow, turn) = (index % 4, index / 4);
        packet[20] = flow as u8;
        packet[24..28].copy_from_slice(&((turn * MSS) as u32).to_be_bytes());
    }
    coalesce(bencher, arena, SEGMENTS, Checksum::Partial);
}

/// Benchmark of the requests of 50 clients, none of which merge.
#[divan::bench]
fn coalesce_50_small_packets_of_50_flows(bencher: Bencher<'_, '_>) {
    let mut arena = Vec::new();
    for flow in 0..50 {
        let mut packet = superpacket()[..HEADERS + 40].to_vec();
        packet[2..4].copy_from_slice(&(HEADERS as u16 + 40).to_be_bytes());
        (packet[20], packet[33]) = (flow, 0x18);
        arena.extend(packet);
    }
    coalesce(bencher, arena, 50, Checksum::Partial);
}

#[divan::bench]
fn checksum_1400(bencher: Bencher<'_, '_>) {
    let bytes = vec![0x5a; 1400];
    bencher.counter(BytesCount::new(1400_usize)).bench(|| checksum::sum(black_box(&bytes), 0));
}

#[divan::bench]
fn memcpy_1400(bencher: Bencher<'_, '_>) {
    let source = vec![0x5a_u8; 1400];
    let mut target = source.clone();
    bencher
        .counter(BytesCount::new(1400_usize))
        .bench_local(|| black_box(&mut target).copy_from_slice(black_box(&source)));
}

const NODES: u32 = 5000;

/// Returns a table in which every node has one prefix of each family.
fn routes() -> RouteTable {
    let prefixes: Vec<[IpNet; 2]> = (0..NODES)
        .map(|node| {
            let v4 = Ipv4Net::new((0x0a00_0000 | node << 8).into(), 24).expect("below 33");
            let v6 = Ipv6Net::new(v6(node, 0), 64).expect("below 129");
            [v4.into(), v6.into()]
        })
        .collect();
    let owners = prefixes.iter().enumerate().map(|(n, p)| (PeerId(n as u32), p.as_slice()));
    RouteTable::build(&[], owners).expect("disjoint prefixes")
}

fn v6(node: u32, host: u64) -> Ipv6Addr {
    (0xfd00_u128 << 112 | u128::from(node) << 64 | u128::from(host)).into()
}

/// Returns numbers far apart, which the branch predictor cannot learn.
fn scattered() -> impl FnMut() -> u32 {
    let mut state = 0u32;
    move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state >> 8
    }
}

#[divan::bench]
fn route_lookup_among_5000_nodes_v4(bencher: Bencher<'_, '_>) {
    let (table, mut number) = (routes(), scattered());
    bencher
        .bench_local(|| table.lookup(IpAddr::V4((0x0a00_0000 | (number() % (NODES << 8))).into())));
}

#[divan::bench]
fn route_lookup_among_5000_nodes_v6(bencher: Bencher<'_, '_>) {
    let (table, mut number) = (routes(), scattered());
    bencher.bench_local(|| table.lookup(IpAddr::V6(v6(number() % NODES, 9))));
}
