//! What the packet path costs beside the kernel and the AEAD.
//!
//! `cargo bench -p skein-core --bench offload`

use divan::counter::{BytesCount, ItemsCount};
use divan::{Bencher, black_box};
use ipnet::{IpNet, Ipv4Net};
use skein_core::offload::Checksum;
use skein_core::offload::coalesce::{CoalesceConfig, Coalescer};
use skein_core::offload::split::split;
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

/// A TCP superpacket of 45 segments with a time stamp option.
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
        // Splitting stamps over payloads but begins by reading the headers: only they are renewed.
        packet[..HEADERS].copy_from_slice(&template[..HEADERS]);
        let mut segments = split(VNET, &mut packet).expect("a superpacket");
        while let Some(segment) = segments.next_segment() {
            black_box(segment);
        }
    });
}

#[divan::bench]
fn coalesce_45_segments(bencher: Bencher<'_, '_>) {
    let mut packet = superpacket();
    let mut arena = Vec::new();
    let mut segments = split(VNET, &mut packet).expect("a superpacket");
    while let Some(segment) = segments.next_segment() {
        arena.extend_from_slice(segment);
    }
    let config = CoalesceConfig { tcp: true, udp: true, partial_checksum: true };
    let mut coalescer = Coalescer::new(config);
    bencher.counter(ItemsCount::new(SEGMENTS)).bench_local(|| {
        let mut at = 0;
        while at < arena.len() {
            let ip = IpHeader::parse(&arena[at..]).expect("a packet");
            let end = at + ip.total_len;
            coalescer.push(&mut arena, at..end, &ip, Checksum::Partial);
            at = end;
        }
        coalescer.flush(&arena, |written| {
            black_box(written.len);
        });
    });
}

#[divan::bench]
fn checksum_1400(bencher: Bencher<'_, '_>) {
    let bytes = vec![0x5a; 1400];
    bencher.counter(BytesCount::new(1400_usize)).bench(|| checksum::sum(black_box(&bytes), 0));
}

#[divan::bench]
fn route_lookup_among_5000_nodes(bencher: Bencher<'_, '_>) {
    let prefixes: Vec<[IpNet; 1]> = (0..5000u32)
        .map(|node| {
            let network = (0x0a00_0000 | node << 8).into();
            [Ipv4Net::new(network, 24).expect("a length below 33").into()]
        })
        .collect();
    let owners = prefixes.iter().enumerate().map(|(n, p)| (PeerId(n as u32), p.as_slice()));
    let table = RouteTable::build(&[], owners).expect("disjoint prefixes");
    let mut address = 0u32;
    bencher.bench_local(|| {
        // Far apart, so that no branch is learnt.
        address = (address.wrapping_mul(1_664_525).wrapping_add(1_013_904_223)) % (5000 << 8);
        table.lookup(std::net::IpAddr::V4((0x0a00_0000 | address).into()))
    });
}
