//! The egress batch: seals inner packets back to back into an arena and groups the datagrams into
//! GSO batches, each of which UDP_SEGMENT can send in one message.
//!
//! Small packets for the same peer that are already queued share one datagram (a *bundle*): one
//! seal and one outer packet for many inner packets. A packet is never delayed to fill a datagram,
//! because the lane calls [`EgressBatch::finish`], which closes all bundles, as soon as the TUN
//! queue is empty.

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

/// Arena bytes of a 64 KiB superpacket that has been segmented (MTU 1500) and sealed.
const FULL_SUPERPACKET: usize = 70 << 10;

/// Index of a peer in the batch, valid until [`EgressBatch::clear`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchPeer(usize);

/// Totals of a batch for the traffic counters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BatchTotals {
    /// Number of inner packets pushed.
    pub inner_packets: u64,
    /// Sum of the IP lengths of these packets in bytes.
    pub inner_bytes: u64,
}

/// A batch of packets on their way from the TUN to the underlay.
///
/// The caller repeats this order of calls: [`Self::find_peer`] or [`Self::add_peer`], and
/// [`Self::push`] for each packet after [`Self::has_room`]; then [`Self::finish`] once;
/// [`Self::gso_batches`] and [`Self::arena`] to send; [`Self::clear`].
pub struct EgressBatch {
    arena: Box<[u8]>,
    used: usize,
    bundling: bool,
    /// Peers of this batch in `..live_peers`; further entries are unused and keep their buffers.
    peers: Vec<PeerEntry>,
    live_peers: usize,
    last_peer: usize,
    batches: GsoBatches,
    /// Number of inner packets in each datagram, in the order of sealing.
    fill: Vec<u16>,
    totals: BatchTotals,
}

struct PeerEntry {
    peer: PeerId,
    session: Option<Arc<Session>>,
    lane: u8,
    destination: SocketAddr,
    max_plaintext: usize,
    /// True if the session propagates the ECN field.
    ecn: bool,
    /// GSO batch that may grow.
    open_batch: Option<usize>,
    /// Plaintext of the open bundle.
    staged: Vec<u8>,
    staged_packets: u16,
    /// Header fields of every packet in the open bundle.
    staged_fields: OuterFields,
    /// Inner packets pushed since the last [`EgressBatch::finish`]. Packets that are still staged
    /// or that could not be sealed are included.
    pushed_packets: u64,
    /// Sum of the IP lengths of these packets in bytes.
    pushed_bytes: u64,
}

/// Fields of the outer headers that all packets of a datagram share.
#[derive(Clone, Copy, PartialEq, Eq)]
struct OuterFields {
    flags: Flags,
    ecn: Ecn,
}

impl EgressBatch {
    /// Creates an empty batch with an arena of `capacity` bytes. An arena well below the size of
    /// the L2 cache stays in the cache.
    pub fn new(capacity: usize, bundling: bool) -> Self {
        Self {
            arena: vec![0; capacity].into_boxed_slice(),
            used: 0,
            bundling,
            peers: Vec::with_capacity(16),
            live_peers: 0,
            last_peer: 0,
            batches: GsoBatches::new(),
            fill: Vec::with_capacity(1024),
            totals: BatchTotals::default(),
        }
    }

    /// Returns the index of `peer` if the batch has packets for the peer.
    pub fn find_peer(&mut self, peer: PeerId) -> Option<BatchPeer> {
        let live = &self.peers[..self.live_peers];
        if live.get(self.last_peer).is_some_and(|entry| entry.peer == peer) {
            return Some(BatchPeer(self.last_peer));
        }
        self.last_peer = live.iter().position(|entry| entry.peer == peer)?;
        Some(BatchPeer(self.last_peer))
    }

    /// Adds a peer that [`Self::find_peer`] did not find. `max_plaintext` is the maximum plaintext
    /// of one datagram to the peer in bytes.
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
                open_batch: None,
                staged: Vec::new(),
                staged_packets: 0,
                staged_fields: OuterFields { flags: Flags::default(), ecn: Ecn::NotEct },
                pushed_packets: 0,
                pushed_bytes: 0,
            });
        }
        let entry = &mut self.peers[index];
        entry.peer = peer;
        entry.ecn = session.ecn;
        entry.session = Some(session);
        entry.lane = lane;
        entry.destination = destination;
        entry.max_plaintext = max_plaintext;
        entry.open_batch = None;
        self.live_peers += 1;
        self.last_peer = index;
        BatchPeer(index)
    }

    /// Returns true if the arena has room for the open bundles and a packet of `length` bytes.
    pub fn has_room(&self, length: usize) -> bool {
        let open = self.peers[..self.live_peers]
            .iter()
            .filter(|entry| entry.staged_packets > 0)
            .map(|entry| entry.staged.len() + OVERHEAD)
            .sum::<usize>();
        self.used + open + length + OVERHEAD <= self.arena.len()
    }

    /// Returns true if a superpacket of maximum size may not fit.
    pub fn is_nearly_full(&self) -> bool {
        !self.has_room(FULL_SUPERPACKET)
    }

    /// Returns true if no packet has been pushed since the last [`Self::clear`].
    pub fn is_empty(&self) -> bool {
        self.totals.inner_packets == 0
    }

    /// Adds one whole inner packet, for which [`Self::has_room`] was true. Packets that are too
    /// long for the peer or that cannot be sealed are counted in `drops`.
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
        let entry = &mut self.peers[peer.0];
        entry.pushed_packets += 1;
        entry.pushed_bytes += packet.len() as u64;
        // RFC 6040, section 4.1: normal mode, or compatibility mode for a peer that would ignore
        // the marks.
        let ecn = if entry.ecn { Ecn::of(packet) } else { Ecn::NotEct };
        let fields = OuterFields { flags, ecn };
        if entry.staged_packets > 0
            && (entry.staged_fields != fields || entry.staged.len() + packet.len() > max_plaintext)
        {
            self.close_bundle(peer, drops);
        }
        let entry = &mut self.peers[peer.0];
        if entry.staged_packets > 0 || (self.bundling && packet.len() <= max_plaintext / 2) {
            entry.staged.extend_from_slice(packet);
            entry.staged_packets += 1;
            entry.staged_fields = fields;
        } else {
            self.seal(peer, fields, Plaintext::Packet(packet), 1, drops);
        }
    }

    /// Closes all bundles and completes the GSO batches, which [`Self::gso_batches`] then returns.
    pub fn finish(&mut self, drops: &mut DropCounts) {
        for index in 0..self.live_peers {
            self.close_bundle(BatchPeer(index), drops);
            let entry = &mut self.peers[index];
            if let Some(session) = &entry.session {
                session.traffic().add_sent(entry.pushed_packets, entry.pushed_bytes);
            }
            entry.pushed_packets = 0;
            entry.pushed_bytes = 0;
        }
        self.batches.finish();
    }

    /// Returns the GSO batches, in the order in which their first datagrams were sealed.
    pub fn gso_batches(&self) -> impl Iterator<Item = GsoBatch<'_>> {
        self.batches.iter()
    }

    /// Returns the bytes to which [`GsoBatch::parts`] refers.
    pub fn arena(&self) -> &[u8] {
        &self.arena[..self.used]
    }

    /// Returns the fill of each sealed datagram, in the order of sealing: the number of inner
    /// packets that the datagram contains.
    pub fn fill(&self) -> &[u16] {
        &self.fill
    }

    /// Returns the totals since the last [`Self::clear`].
    pub fn totals(&self) -> BatchTotals {
        self.totals
    }

    /// Removes all packets and peers and keeps the memory.
    pub fn clear(&mut self) {
        for entry in &mut self.peers[..self.live_peers] {
            entry.session = None;
        }
        self.live_peers = 0;
        self.used = 0;
        self.batches.clear();
        self.fill.clear();
        self.totals = BatchTotals::default();
    }

    fn close_bundle(&mut self, peer: BatchPeer, drops: &mut DropCounts) {
        let entry = &mut self.peers[peer.0];
        let packets = std::mem::take(&mut entry.staged_packets);
        if packets > 0 {
            let fields = entry.staged_fields;
            self.seal(peer, fields, Plaintext::Staged, packets, drops);
            self.peers[peer.0].staged.clear();
        }
    }

    fn seal(
        &mut self,
        peer: BatchPeer,
        fields: OuterFields,
        plaintext: Plaintext<'_>,
        packets: u16,
        drops: &mut DropCounts,
    ) {
        let entry = &mut self.peers[peer.0];
        let plaintext = match plaintext {
            Plaintext::Packet(packet) => packet,
            Plaintext::Staged => &entry.staged,
        };
        let offset = self.used;
        let sealed = entry
            .session
            .as_ref()
            .and_then(|session| session.sender(entry.lane))
            .ok_or(DropReason::NoSession)
            .and_then(|sender| sender.seal(fields.flags, plaintext, &mut self.arena[offset..]));
        let length = match sealed {
            Ok(length) => length,
            Err(reason) => return drops.add_many(reason, u64::from(packets)),
        };
        self.used += length;
        self.fill.push(packets);
        let open = entry.open_batch;
        entry.open_batch = self.batches.push(open, entry.destination, fields.ecn, offset, length);
    }
}

/// Plaintext of a datagram.
enum Plaintext<'a> {
    /// Packet that is sealed from its place in the read buffer.
    Packet(&'a [u8]),
    /// The open bundle of the peer.
    Staged,
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
