//! The send arena: inner packets are sealed into it back to back and leave it as runs of datagrams
//! of one size to one destination, which is what UDP_SEGMENT can send in one pass.
//!
//! Small packets to one peer that are already at hand share a datagram (a *bundle*): one seal and
//! one outer packet for many inner ones. Nothing ever waits for company: [`EgressBatch::finish`]
//! closes what is open, and the lane calls it as soon as the TUN queue is dry.

use std::net::SocketAddr;
use std::sync::Arc;

use crate::drop::{DropCounts, DropReason};
use crate::offload::Checksum;
pub use crate::offload::gso_batch::GsoBatch;
use crate::offload::gso_batch::GsoBatches;
use crate::route::PeerId;
use crate::tunnel::session::Session;
use crate::wire::ecn::Ecn;
use crate::wire::header::{Flags, OVERHEAD};

/// Room that a 64 KiB superpacket takes, split into segments for an MTU of 1500 and sealed.
const FULL_SUPERPACKET: usize = 70 << 10;

/// Where the packets of one peer go: an index into the batch, valid until [`EgressBatch::clear`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchPeer(usize);

/// What a batch held, for the counters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BatchTotals {
    /// Inner packets sealed.
    pub inner_packets: u64,
    /// Their IP lengths.
    pub inner_bytes: u64,
}

/// See the module.
pub struct EgressBatch {
    arena: Box<[u8]>,
    used: usize,
    bundling: bool,
    peers: Vec<PeerEntry>,
    /// Targets beyond this are left over from earlier batches, kept for their staging buffers.
    live_peers: usize,
    last_peer: usize,
    runs: GsoBatches,
    /// Inner packets of each datagram, in the order of sealing.
    fill: Vec<u16>,
    totals: BatchTotals,
}

struct PeerEntry {
    peer: PeerId,
    session: Option<Arc<Session>>,
    lane: u8,
    destination: SocketAddr,
    max_plaintext: usize,
    /// The session propagates the ECN field.
    ecn: bool,
    open_run: Option<usize>,
    /// Plaintext of the open bundle.
    staged: Vec<u8>,
    staged_packets: u16,
    staged_flags: Flags,
    /// ECN field of every packet in the open bundle.
    staged_ecn: Ecn,
    sealed_packets: u64,
    sealed_bytes: u64,
}

impl EgressBatch {
    /// An empty batch of `capacity` bytes. It stays in cache when it is well below the L2's size.
    pub fn new(capacity: usize, bundling: bool) -> Self {
        Self {
            arena: vec![0; capacity].into_boxed_slice(),
            used: 0,
            bundling,
            peers: Vec::with_capacity(16),
            live_peers: 0,
            last_peer: 0,
            runs: GsoBatches::new(),
            fill: Vec::with_capacity(1024),
            totals: BatchTotals::default(),
        }
    }

    /// The peer of `peer` in this batch, if it has one already.
    pub fn find_peer(&mut self, peer: PeerId) -> Option<BatchPeer> {
        let live = &self.peers[..self.live_peers];
        if live.get(self.last_peer).is_some_and(|t| t.peer == peer) {
            return Some(BatchPeer(self.last_peer));
        }
        self.last_peer = live.iter().position(|t| t.peer == peer)?;
        Some(BatchPeer(self.last_peer))
    }

    /// Adds the peer of a peer that [`Self::find_peer`] did not find. `max_plaintext` is the
    /// most that one datagram to it carries, in bytes.
    pub fn add_peer(
        &mut self,
        peer: PeerId,
        session: Arc<Session>,
        lane: u8,
        destination: SocketAddr,
        max_plaintext: usize,
    ) -> BatchPeer {
        let index = self.live_peers;
        if index == self.peers.len() {
            self.peers.push(PeerEntry {
                peer,
                session: None,
                lane,
                destination,
                max_plaintext,
                ecn: false,
                open_run: None,
                staged: Vec::new(),
                staged_packets: 0,
                staged_flags: Flags::default(),
                staged_ecn: Ecn::NotEct,
                sealed_packets: 0,
                sealed_bytes: 0,
            });
        }
        let peer = &mut self.peers[index];
        peer.peer = peer;
        peer.ecn = session.ecn;
        peer.session = Some(session);
        peer.lane = lane;
        peer.destination = destination;
        peer.max_plaintext = max_plaintext;
        peer.open_run = None;
        self.live_peers += 1;
        self.last_peer = index;
        BatchPeer(index)
    }

    /// Whether a packet of `length` bytes fits still, whatever is open.
    pub fn has_room(&self, length: usize) -> bool {
        let open = self.peers[..self.live_peers]
            .iter()
            .filter(|t| t.staged_packets > 0)
            .map(|t| t.staged.len() + OVERHEAD)
            .sum::<usize>();
        self.used + open + length + OVERHEAD <= self.arena.len()
    }

    /// Whether a superpacket of full size may not fit any more.
    pub fn is_nearly_full(&self) -> bool {
        !self.has_room(FULL_SUPERPACKET)
    }

    /// Whether nothing was pushed.
    pub fn is_empty(&self) -> bool {
        self.totals.inner_packets == 0
    }

    /// Takes one whole inner packet. The caller has asked [`Self::has_room`].
    pub fn push(
        &mut self,
        peer: BatchPeer,
        checksum: Checksum,
        packet: &[u8],
        drops: &mut DropCounts,
    ) {
        let flags = match checksum {
            Checksum::Partial => Flags::PARTIAL_CHECKSUM,
            Checksum::Full => Flags::default(),
        };
        let max_plaintext = self.peers[peer.0].max_plaintext;
        if packet.len() > max_plaintext {
            return drops.add(DropReason::TooBig);
        }
        self.totals.inner_packets += 1;
        self.totals.inner_bytes += packet.len() as u64;
        let state = &mut self.peers[peer.0];
        state.sealed_packets += 1;
        state.sealed_bytes += packet.len() as u64;
        // RFC 6040 section 4.1: normal mode, or compatibility mode towards a peer that would lose
        // the marks.
        let ecn = if state.ecn { Ecn::of(packet) } else { Ecn::NotEct };
        let differs = state.staged_flags != flags || state.staged_ecn != ecn;
        if state.staged_packets > 0
            && (differs || state.staged.len() + packet.len() > max_plaintext)
        {
            self.close_bundle(peer, drops);
        }
        let state = &mut self.peers[peer.0];
        if state.staged_packets > 0 || (self.bundling && packet.len() <= max_plaintext / 2) {
            state.staged.extend_from_slice(packet);
            state.staged_packets += 1;
            (state.staged_flags, state.staged_ecn) = (flags, ecn);
        } else {
            self.seal(peer, (flags, ecn), Plaintext::Packet(packet), 1, drops);
        }
    }

    /// Closes every bundle and puts the runs in order. Afterwards [`Self::gso_batches`] may be read.
    pub fn finish(&mut self, drops: &mut DropCounts) {
        for index in 0..self.live_peers {
            self.close_bundle(BatchPeer(index), drops);
            let peer = &mut self.peers[index];
            if let Some(session) = &peer.session {
                session.traffic().sent(peer.sealed_packets, peer.sealed_bytes);
            }
            peer.sealed_packets = 0;
            peer.sealed_bytes = 0;
        }
        self.runs.finish();
    }

    /// The runs, in the order in which their first datagrams were sealed.
    pub fn gso_batches(&self) -> impl Iterator<Item = GsoBatch<'_>> {
        self.runs.iter()
    }

    /// The bytes that the runs point into.
    pub fn arena(&self) -> &[u8] {
        &self.arena[..self.used]
    }

    /// Inner packets of each datagram.
    pub fn fill(&self) -> &[u16] {
        &self.fill
    }

    /// What was pushed since the last [`Self::clear`].
    pub fn totals(&self) -> BatchTotals {
        self.totals
    }

    /// Empties the batch and keeps its memory.
    pub fn clear(&mut self) {
        for peer in &mut self.peers[..self.live_peers] {
            peer.session = None;
        }
        self.live_peers = 0;
        self.used = 0;
        self.runs.clear();
        self.fill.clear();
        self.totals = BatchTotals::default();
    }

    fn close_bundle(&mut self, peer: BatchPeer, drops: &mut DropCounts) {
        let state = &mut self.peers[peer.0];
        let packets = std::mem::take(&mut state.staged_packets);
        if packets > 0 {
            let common = (state.staged_flags, state.staged_ecn);
            self.seal(peer, common, Plaintext::Staged, packets, drops);
            self.peers[peer.0].staged.clear();
        }
    }

    fn seal(
        &mut self,
        peer: BatchPeer,
        (flags, ecn): (Flags, Ecn),
        plaintext: Plaintext<'_>,
        packets: u16,
        drops: &mut DropCounts,
    ) {
        let state = &mut self.peers[peer.0];
        let plaintext = match plaintext {
            Plaintext::Packet(packet) => packet,
            Plaintext::Staged => &state.staged,
        };
        let offset = self.used;
        let sealed = state
            .session
            .as_ref()
            .and_then(|session| session.sender(state.lane))
            .ok_or(DropReason::NoSession)
            .and_then(|sender| sender.seal(flags, plaintext, &mut self.arena[offset..]));
        let length = match sealed {
            Ok(length) => length,
            Err(reason) => return drops.add_many(reason, u64::from(packets)),
        };
        self.used += length;
        self.fill.push(packets);
        state.open_run = self.runs.push(state.open_run, state.destination, ecn, offset, length);
    }
}

enum Plaintext<'a> {
    Packet(&'a [u8]),
    Staged,
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::time::Time;
    use crate::tunnel::session::{Cipher, SessionParams};
    use zeroize::Zeroizing;

    const MTU: usize = 1440;

    fn session(initiator: bool) -> Arc<Session> {
        session_with(initiator, false)
    }

    fn session_with(initiator: bool, ecn: bool) -> Arc<Session> {
        let params = SessionParams {
            peer: PeerId(1),
            local_index: 7,
            remote_index: 7,
            cipher: Cipher::Aes256Gcm,
            local_lanes: 1,
            remote_lanes: 1,
            established: Time::default(),
            initiator,
            epoch: 0,
            ecn,
            secret: [Zeroizing::new([1; 32]), Zeroizing::new([2; 32])],
        };
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
            let bytes: Vec<u8> = run
                .parts
                .iter()
                .flat_map(|&(at, len)| &batch.arena()[at..at + len])
                .copied()
                .collect();
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
        let (batch, _) =
            batch_with(true, &[(1, Partial, 1400), (1, Partial, 1400), (1, Partial, 900)]);
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
                let sizes =
                    batch.gso_batches().map(|run| (run.ecn, run.segments)).collect::<Vec<_>>();
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
}
