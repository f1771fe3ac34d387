use super::*;
use crate::testing::session_params;
use crate::tunnel::session::SessionParams;

const MTU: usize = 1440;

fn session(initiator: bool) -> Arc<Session> {
    session_with(initiator, false)
}

fn session_with(initiator: bool, ecn: bool) -> Arc<Session> {
    let params = SessionParams { ecn, ..session_params(initiator) };
    Arc::new(Session::new(params).unwrap())
}

fn endpoint(port: u16) -> SocketAddr {
    ([192, 0, 2, 1], port).into()
}

/// GsoBatches as (port, segment size, segments, parts).
fn shape(batch: &EgressBatch) -> Vec<(u16, usize, usize, usize)> {
    batch
        .gso_batches()
        .map(|run| (run.destination.port(), run.segment_size, run.segments, run.parts.len()))
        .collect()
}

/// Opens every datagram of every run and returns the plaintexts in the order of sending.
fn opened(batch: &EgressBatch) -> Vec<Vec<u8>> {
    let receiver = session(false);
    let receiver = receiver.receiver(0).unwrap();
    let mut plaintexts = Vec::new();
    for run in batch.gso_batches() {
        let bytes: Vec<u8> =
            run.parts.iter().flat_map(|&(at, len)| &batch.arena()[at..at + len]).copied().collect();
        assert_eq!(bytes.len().div_ceil(run.segment_size), run.segments);
        for datagram in bytes.chunks(run.segment_size) {
            let mut datagram = datagram.to_vec();
            plaintexts.push(receiver.open(&mut datagram).unwrap().1.to_vec());
        }
    }
    plaintexts
}

fn batch_with(bundling: bool, packets: &[(u32, Checksum, usize)]) -> (EgressBatch, DropCounts) {
    let mut batch = EgressBatch::new(64 << 10, bundling);
    let mut drops = DropCounts::default();
    let sending = session(true);
    for (number, &(peer, checksum, length)) in (0..).zip(packets) {
        assert!(batch.has_room(length));
        let peer = batch.find_peer(PeerId(peer)).unwrap_or_else(|| {
            let port = 1000 + u16::try_from(peer).unwrap();
            batch.add_peer(PeerId(peer), Arc::clone(&sending), 0, endpoint(port), MTU)
        });
        batch.push(peer, checksum, &vec![number; length], &mut drops);
    }
    batch.finish(&mut drops);
    (batch, drops)
}

use Checksum::{Full, Partial};

#[test]
fn equal_segments_and_short_tail_form_one_batch() {
    let (batch, _) = batch_with(true, &[(1, Partial, 1400), (1, Partial, 1400), (1, Partial, 900)]);
    assert_eq!(shape(&batch), [(1001, 1432, 3, 1)]);
    assert_eq!(opened(&batch).iter().map(Vec::len).collect::<Vec<_>>(), [1400, 1400, 900]);
}

#[test]
fn short_tail_ends_its_batch() {
    let (batch, _) =
        batch_with(true, &[(1, Full, 1400), (1, Full, 900), (1, Full, 900), (1, Full, 1400)]);
    assert_eq!(shape(&batch), [(1001, 1432, 2, 1), (1001, 932, 1, 1), (1001, 1432, 1, 1)]);
}

#[test]
fn alternating_destinations_form_one_batch_each() {
    let packets = [(1, Full, 1400), (2, Full, 1400), (1, Full, 1400), (2, Full, 1400)];
    let (batch, _) = batch_with(true, &packets);
    assert_eq!(shape(&batch), [(1001, 1432, 2, 2), (1002, 1432, 2, 2)]);
    let numbers: Vec<u8> = opened(&batch).iter().map(|plaintext| plaintext[0]).collect();
    assert_eq!(numbers, [0, 2, 1, 3]);
}

#[test]
fn small_packets_share_datagrams_in_order() {
    let packets: Vec<_> = (0..30).map(|_| (1, Full, 100)).collect();
    let (batch, _) = batch_with(true, &packets);
    assert_eq!(batch.fill(), [14, 14, 2]);
    let bytes: Vec<u8> = opened(&batch).concat();
    let expected: Vec<u8> = (0..30).flat_map(|n| vec![n; 100]).collect();
    assert_eq!(bytes, expected);
    assert_eq!(batch.totals(), BatchTotals { inner_packets: 30, inner_bytes: 3000 });
}

#[test]
fn large_packet_does_not_overtake_bundle() {
    let (batch, _) = batch_with(true, &[(1, Full, 100), (1, Full, 1400), (1, Full, 100)]);
    let numbers: Vec<u8> = opened(&batch).iter().map(|plaintext| plaintext[0]).collect();
    assert_eq!(numbers, [0, 1, 2]);
}

#[test]
fn different_checksum_states_share_no_datagram() {
    let (batch, _) = batch_with(true, &[(1, Full, 100), (1, Partial, 100), (1, Partial, 100)]);
    assert_eq!(batch.fill(), [1, 2]);
}

/// An IPv4 or IPv6 packet with this ECN field.
fn marked(v6: bool, ecn: Ecn, length: usize) -> Vec<u8> {
    let mut packet = vec![0; length];
    packet[0] = if v6 { 0x60 } else { 0x45 };
    ecn.write(&mut packet);
    packet
}

fn batch_of(ecn: bool, packets: &[Vec<u8>]) -> EgressBatch {
    let (mut batch, mut drops) = (EgressBatch::new(64 << 10, true), DropCounts::default());
    let peer = batch.add_peer(PeerId(1), session_with(true, ecn), 0, endpoint(1001), MTU);
    for packet in packets {
        batch.push(peer, Full, packet, &mut drops);
    }
    batch.finish(&mut drops);
    assert_eq!(drops.iter().count(), 0);
    batch
}

#[test]
fn different_ecn_fields_share_no_bundle_or_batch() {
    for v6 in [false, true] {
        for length in [100, 1400] {
            let fields = [Ecn::Ect0, Ecn::Ect0, Ecn::Ce, Ecn::Ect1, Ecn::NotEct, Ecn::Ect0];
            let packets: Vec<_> = fields.map(|ecn| marked(v6, ecn, length)).into();
            let batch = batch_of(true, &packets);
            let bundled = length == 100;
            let sizes = batch.gso_batches().map(|run| (run.ecn, run.segments)).collect::<Vec<_>>();
            let first = if bundled { 1 } else { 2 };
            let singles = [Ecn::Ce, Ecn::Ect1, Ecn::NotEct, Ecn::Ect0].map(|ecn| (ecn, 1));
            let expected = [&[(Ecn::Ect0, first)][..], &singles].concat();
            assert_eq!(sizes, expected, "v6 {v6}, packets of {length} bytes");
            assert_eq!(opened(&batch).concat(), packets.concat(), "the order is kept");
        }
    }
}

#[test]
fn outer_ecn_field_is_not_ect_without_negotiation() {
    let packets = [Ecn::Ect0, Ecn::Ce, Ecn::NotEct].map(|ecn| marked(false, ecn, 100));
    let batch = batch_of(false, &packets);
    assert_eq!(batch.fill(), [3], "they share a bundle");
    assert!(batch.gso_batches().all(|run| run.ecn == Ecn::NotEct));
    assert_eq!(opened(&batch).concat(), packets.concat(), "the inner fields are kept");
}

#[test]
fn disabled_bundling_sends_one_packet_per_datagram() {
    let (batch, _) = batch_with(false, &[(1, Full, 100), (1, Full, 100)]);
    assert_eq!(shape(&batch), [(1001, 132, 2, 1)]);
    assert_eq!(batch.fill(), [1, 1]);
}

#[test]
fn packet_beyond_mtu_is_dropped_alone() {
    let (batch, drops) = batch_with(true, &[(1, Full, MTU + 1), (1, Full, MTU)]);
    assert_eq!(drops.get(DropReason::TooBig), 1);
    assert_eq!(opened(&batch).len(), 1);
}

#[test]
fn has_room_counts_open_bundles() {
    let mut batch = EgressBatch::new(1000, true);
    let peer = batch.add_peer(PeerId(1), session(true), 0, endpoint(1), MTU);
    batch.push(peer, Full, &[0; 400], &mut DropCounts::default());
    assert!(batch.has_room(1000 - 400 - 2 * OVERHEAD));
    assert!(!batch.has_room(1000 - 400 - 2 * OVERHEAD + 1));
}

#[test]
fn cleared_batch_is_empty() {
    let (mut batch, mut drops) = batch_with(true, &[(1, Full, 100), (2, Full, 1400)]);
    batch.clear();
    assert!(batch.is_empty() && batch.find_peer(PeerId(1)).is_none());
    batch.finish(&mut drops);
    assert_eq!(batch.gso_batches().count(), 0);
    assert_eq!(batch.arena().len(), 0);
}
