//! Sending half of a lane, from the TUN device to the underlay: reads superpackets, looks up the
//! peer, segments and seals into the send arena, and sends the arena when it is full or the TUN
//! queue is empty.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use skein_core::drop::{Direction, DropCounts, DropReason};
use skein_core::offload::batch::{BatchPeer, EgressBatch};
use skein_core::offload::segment::segment;
use skein_core::offload::vnet::VnetHeader;
use skein_core::route::{Owner, PeerId};
use skein_core::wire::ip::IpHeader;
use skein_sys::send::{GsoBatch, GsoState, Position, SendRequest, Sender};
use skein_sys::tun::TunQueue;

use super::lane_context::LaneContext;
use super::pending::{Admission, PendingPackets};
use super::queue::ToManager;
use super::stats::add;
use super::tables::Tables;
use super::tap::{Bytes, PacketRef};

/// Size of the send arena in bytes: four superpackets, a quarter of a typical L2 cache.
const ARENA_LEN: usize = 256 << 10;
/// Maximum number of packets read before the receiving half runs again.
const MAX_READS: usize = 64;
/// Maximum number of full batches sent before the receiving half runs again. A superpacket with
/// tiny segments fills several.
const MAX_FULL_BATCHES: usize = 2;
/// Maximum number of GSO batches in one call of the sender.
const MAX_GSO_BATCHES: usize = 64;
/// Maximum time that a batch waits for room in a socket's send buffer. A device that accepts
/// nothing for that time would delay packets to other destinations.
pub(super) const SEND_TIMEOUT: Duration = Duration::from_millis(100);
/// Drop reasons that can occur while a packet is added to the batch.
const BATCH_DROPS: [DropReason; 3] =
    [DropReason::TooBig, DropReason::CounterExhausted, DropReason::SealFailed];

/// Sending half of a lane. [`Egress::run`] reads until a bound is reached or a socket has no room.
/// If a socket has no room ([`Egress::blocked_socket`]), the lane stops reading the TUN queue,
/// waits until the socket is writable or [`SEND_TIMEOUT`] has passed, and calls [`Egress::resume`].
pub(super) struct Egress {
    read_buffer: Box<[u8]>,
    batch: EgressBatch,
    sender: Sender,
    gso: GsoState,
    pending: PendingPackets,
    drops: DropCounts,
    /// Full batches sent in the current [`Egress::run`].
    full_batches: usize,
    /// Position at which sending stopped because a socket had no room.
    unsent: Option<SendCursor>,
}

/// Position in the batch at which sending continues.
#[derive(Debug, Clone, Copy)]
struct SendCursor {
    /// Index of the socket that has no room.
    socket: usize,
    /// Number of GSO batches of the socket's family that are completely sent or dropped.
    gso_batches: usize,
    /// Number of datagrams of the next GSO batch that are sent or dropped.
    segment: usize,
    /// Time since which no datagram was sent.
    since: Instant,
}

impl SendCursor {
    fn is_at(&self, other: &Self) -> bool {
        (self.socket, self.gso_batches, self.segment)
            == (other.socket, other.gso_batches, other.segment)
    }
}

/// State of a TUN queue after a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TunState {
    /// The queue is usable.
    Alive,
    /// The device was deleted; the descriptor is unusable.
    Gone,
}

impl Egress {
    /// Creates a sending half with an empty batch. `bundling` allows several small packets in one
    /// datagram.
    pub(super) fn new(bundling: bool, gso: GsoState) -> Self {
        Self {
            read_buffer: vec![0; VnetHeader::LEN + 65_536].into_boxed_slice(),
            batch: EgressBatch::new(ARENA_LEN, bundling),
            sender: Sender::new(),
            gso,
            pending: PendingPackets::default(),
            drops: DropCounts::default(),
            full_batches: 0,
            unsent: None,
        }
    }

    /// Reads and sends packets of the TUN queue, up to [`MAX_READS`] packets and
    /// [`MAX_FULL_BATCHES`] full batches.
    pub(super) fn run(&mut self, lane: &LaneContext, tables: &Tables, tun: &TunQueue) -> TunState {
        // Pending packets are older than packets in the queue.
        self.release_pending(lane, tables);
        let mut read = 0;
        let mut state = TunState::Alive;
        self.full_batches = 0;
        while self.may_read(read) {
            match tun.read(&mut self.read_buffer) {
                Ok(length) => {
                    read += 1;
                    self.on_packet(lane, tables, length);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if is_gone(&error) => {
                    state = TunState::Gone;
                    break;
                }
                // The kernel could not deliver one packet; the queue stays usable.
                Err(_) => {
                    read += 1;
                    self.drops.add(DropReason::TunRead);
                }
            }
        }
        if read > 0 {
            add(&lane.stats.egress.tun_packets, read as u64);
        }
        self.flush(lane);
        state
    }

    /// Returns whether a run that has read `read` packets may read another one.
    fn may_read(&self, read: usize) -> bool {
        self.unsent.is_none()
            && read < MAX_READS
            && self.full_batches < MAX_FULL_BATCHES
            && !self.batch.is_nearly_full()
    }

    /// Sends pending packets of peers that have a session now, and drops packets that have waited
    /// too long.
    pub(super) fn release_pending(&mut self, lane: &LaneContext, tables: &Tables) {
        if self.pending.is_empty() || self.unsent.is_some() {
            return;
        }
        let now = lane.now();
        let released = self.pending.drain_ready(|peer| tables.is_ready(peer, lane.age_clock()));
        if !released.is_empty() {
            for mut waiting in released {
                self.route(lane, tables, waiting.vnet, &mut waiting.packet);
            }
            self.flush(lane);
        }
        let expired = self.pending.expire(now, |peer| tables.peers.contains_key(&peer));
        self.drops.add_many(DropReason::NoSession, expired as u64);
        lane.stats.drops.collect(&mut self.drops);
    }

    /// Returns the index of the socket without room. While it is `Some`, the lane must not call
    /// [`Egress::run`].
    pub(super) fn blocked_socket(&self) -> Option<usize> {
        self.unsent.map(|unsent| unsent.socket)
    }

    /// Continues to send a blocked batch. Drops the rest of the batch after [`SEND_TIMEOUT`]
    /// without progress. `writable` is true if the socket has reported room.
    pub(super) fn resume(&mut self, lane: &LaneContext, writable: bool) {
        let Some(before) = self.unsent.take() else { return };
        self.transmit(lane, before);
        // The socket is writable, so EAGAIN concerns only this destination (for example, its IPsec
        // SA is being negotiated). Drop the rest of its GSO batch and continue with the next one.
        let refused = |now: &mut SendCursor| writable && now.is_at(&before);
        if let Some(refused) = self.unsent.take_if(refused) {
            self.skip_gso_batch(lane, refused);
        }
        let late = |unsent: &mut SendCursor| lane.now() - unsent.since >= SEND_TIMEOUT;
        if let Some(unsent) = self.unsent.take_if(late) {
            self.drops.add_many(DropReason::SendNoBuffer, self.count_unsent(lane, unsent));
            self.finish(lane);
        }
        lane.stats.drops.collect(&mut self.drops);
    }

    /// Returns whether packets wait for a session.
    pub(super) fn has_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    fn on_packet(&mut self, lane: &LaneContext, tables: &Tables, length: usize) {
        // Moves the buffer out while `self` is borrowed; this moves two words.
        let mut buffer = std::mem::take(&mut self.read_buffer);
        match buffer[..length].split_at_mut_checked(VnetHeader::LEN) {
            Some((header, packet)) => match VnetHeader::parse(header) {
                Some(vnet) => self.route(lane, tables, vnet, packet),
                None => self.drop(lane, DropReason::VnetHeader, packet),
            },
            None => self.drop(lane, DropReason::VnetHeader, &[]),
        }
        self.read_buffer = buffer;
    }

    fn route(&mut self, lane: &LaneContext, tables: &Tables, vnet: VnetHeader, packet: &mut [u8]) {
        let Some(ip) = IpHeader::parse(packet) else {
            return self.drop(lane, DropReason::EgressMalformed, packet);
        };
        let Some(Owner::Peer(peer)) = tables.routes.lookup(ip.destination) else {
            return self.drop(lane, DropReason::NoRoute, packet);
        };
        // Send pending packets of this peer first, to keep the order of its packets.
        if self.pending.has_packets(peer) && tables.is_ready(peer, lane.age_clock()) {
            self.release_pending(lane, tables);
        }
        if self.pending.has_packets(peer)
            || find_or_add_peer(&mut self.batch, lane, tables, peer).is_none()
        {
            return self.hold(lane, peer, vnet, packet);
        }
        if let Err(reason) = self.push(lane, tables, peer, vnet, packet) {
            self.drop(lane, reason, packet);
        }
    }

    /// Segments a packet of the TUN device and adds the segments to the batch.
    ///
    /// # Errors
    /// The drop reason of a packet that cannot be segmented.
    fn push(
        &mut self,
        lane: &LaneContext,
        tables: &Tables,
        peer: PeerId,
        vnet: VnetHeader,
        packet: &mut [u8],
    ) -> Result<(), DropReason> {
        let mut segments = segment(vnet, packet)?;
        let (checksum, told) = (segments.checksum(), lane.tap.wants_drops());
        while let Some(segment) = segments.next_segment() {
            if self.unsent.is_none() && !self.batch.has_room(segment.len()) {
                self.full_batches += 1;
                self.flush(lane);
            }
            // The rest of a superpacket cannot wait, because it has no buffer of its own.
            if self.unsent.is_some() {
                self.drops.add(DropReason::SendNoBuffer);
                continue;
            }
            if lane.captured {
                lane.tap.passed(Direction::Egress, lane.index, segment);
            }
            let Some(target) = find_or_add_peer(&mut self.batch, lane, tables, peer) else {
                self.drops.add(DropReason::NoSession);
                lane.report_drop(DropReason::NoSession, None, Bytes::Inner(segment));
                continue;
            };
            let before = told.then(|| BATCH_DROPS.map(|reason| self.drops.get(reason)));
            self.batch.push(target, checksum, segment, &mut self.drops);
            for (reason, before) in BATCH_DROPS.into_iter().zip(before.into_iter().flatten()) {
                if self.drops.get(reason) > before {
                    lane.report_drop(reason, None, Bytes::Inner(segment));
                }
            }
        }
        Ok(())
    }

    /// Counts and reports the drop of a packet of the TUN device.
    fn drop(&mut self, lane: &LaneContext, reason: DropReason, packet: &[u8]) {
        self.drops.add(reason);
        lane.report_drop(reason, None, Bytes::Inner(packet));
    }

    fn hold(&mut self, lane: &LaneContext, peer: PeerId, vnet: VnetHeader, packet: &[u8]) {
        let Admission { accepted, request_session } =
            self.pending.push(lane.now(), peer, vnet, packet);
        if !accepted {
            self.drop(lane, DropReason::NoSession, packet);
        }
        if request_session && lane.manager.try_send_own(ToManager::RequestSession(peer)) {
            self.pending.mark_requested(lane.now(), peer);
        }
    }

    /// Sends the batch and clears it, unless a socket has no room.
    fn flush(&mut self, lane: &LaneContext) {
        if self.unsent.is_some() {
            return;
        }
        if self.batch.is_empty() {
            // Forget peers that were added without a packet, because a later batch may use other
            // tables.
            self.batch.clear();
        } else {
            self.batch.finish(&mut self.drops);
            let from = SendCursor { socket: 0, gso_batches: 0, segment: 0, since: lane.now() };
            self.transmit(lane, from);
        }
        lane.stats.drops.collect(&mut self.drops);
    }

    /// Sends the GSO batches of each address family from that family's socket, until all are sent
    /// or a socket has no room.
    fn transmit(&mut self, lane: &LaneContext, from: SendCursor) {
        let mut at = from;
        while let Some(socket) = lane.send_sockets.get(at.socket) {
            let mut batches = [GsoBatch::EMPTY; MAX_GSO_BATCHES];
            let mut count = 0;
            for batch in gso_batches_of_family(&self.batch, socket.v4)
                .skip(at.gso_batches)
                .take(MAX_GSO_BATCHES)
            {
                batches[count] = batch;
                count += 1;
            }
            if count == 0 {
                at = SendCursor {
                    socket: at.socket + 1,
                    gso_batches: 0,
                    segment: 0,
                    since: lane.now(),
                };
                continue;
            }
            let from = Position { batch: 0, segment: at.segment };
            let request =
                SendRequest { arena: self.batch.arena(), batches: &batches[..count], from };
            let (gso, now) = (&mut self.gso, lane.now());
            let before = lane.tap.wants_drops().then(|| self.drops.clone());
            let outcome =
                self.sender.send(socket.socket.as_fd(), &request, gso, &mut self.drops, now);
            if let Some(before) = before {
                report_send_drops(lane, &before, &self.drops, &batches[..count]);
            }
            lane.stats.count_sent(&outcome, &self.sender);
            if let Some(datagram) = outcome.too_long {
                lane.report_too_long(datagram);
            }
            lane.stats.note_gso_off(&self.gso, now, outcome.fallbacks > 0);
            let since = if outcome.datagrams > 0 { now } else { at.since };
            match outcome.blocked {
                Some(Position { batch, segment }) => {
                    self.unsent = Some(SendCursor {
                        gso_batches: at.gso_batches + batch,
                        segment,
                        since,
                        ..at
                    });
                    return;
                }
                None => {
                    at = SendCursor { gso_batches: at.gso_batches + count, segment: 0, since, ..at }
                }
            }
        }
        self.finish(lane);
    }

    /// Drops the rest of the GSO batch at `at` and continues with the next one.
    fn skip_gso_batch(&mut self, lane: &LaneContext, at: SendCursor) {
        let Some(socket) = lane.send_sockets.get(at.socket) else { return self.finish(lane) };
        let batch = gso_batches_of_family(&self.batch, socket.v4).nth(at.gso_batches);
        let left = batch.map_or(0, |batch| batch.segments.saturating_sub(at.segment));
        self.drops.add_many(DropReason::SendNoBuffer, left as u64);
        self.transmit(
            lane,
            SendCursor { gso_batches: at.gso_batches + 1, segment: 0, since: lane.now(), ..at },
        );
    }

    /// Publishes the counts of the batch and clears it.
    fn finish(&mut self, lane: &LaneContext) {
        let stats = &lane.stats.egress;
        let totals = self.batch.totals();
        add(&stats.inner_packets, totals.inner_packets);
        add(&stats.inner_bytes, totals.inner_bytes);
        for packets in self.batch.fill().chunk_by(|a, b| a == b) {
            stats.inner_per_outer.observe_many(u64::from(packets[0]), packets.len() as u64);
        }
        self.batch.clear();
    }

    /// Returns the number of datagrams from `from` on that are neither sent nor dropped.
    fn count_unsent(&self, lane: &LaneContext, from: SendCursor) -> u64 {
        let mut left = 0;
        for (index, socket) in lane.send_sockets.iter().enumerate().skip(from.socket) {
            let (done, part) =
                if index == from.socket { (from.gso_batches, from.segment) } else { (0, 0) };
            let segments: usize = gso_batches_of_family(&self.batch, socket.v4)
                .skip(done)
                .map(|batch| batch.segments)
                .sum();
            left += segments.saturating_sub(part) as u64;
        }
        left
    }
}

/// Returns the GSO batches of one address family.
fn gso_batches_of_family(batch: &EgressBatch, v4: bool) -> impl Iterator<Item = GsoBatch<'_>> {
    batch.gso_batches().filter(move |batch| batch.destination.is_ipv4() == v4)
}

/// Reports to the tap the datagrams that a send has dropped. The sender's counters do not name the
/// GSO batch, so the destination is reported only if all GSO batches have the same destination.
#[cold]
fn report_send_drops(
    lane: &LaneContext,
    before: &DropCounts,
    now: &DropCounts,
    batches: &[GsoBatch<'_>],
) {
    let destination = batches.first().map(|batch| batch.destination);
    let outer = destination.filter(|one| batches.iter().all(|batch| batch.destination == *one));
    for (reason, packets) in now.iter() {
        let packets = packets - before.get(reason);
        if packets > 0 {
            let packet_ref =
                PacketRef { lane: Some(lane.index), outer, bytes: Bytes::Outer(&[]), packets };
            lane.tap.dropped(reason, packet_ref);
        }
    }
}

/// Returns whether a read failed because the device was deleted. Polling would report the
/// descriptor as ready forever.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EBADFD | libc::EBADF | libc::EFAULT | libc::EIO))
}

/// Returns the entry of `peer` in this batch and adds it if needed; `None` without a usable session
/// or endpoint.
fn find_or_add_peer(
    batch: &mut EgressBatch,
    lane: &LaneContext,
    tables: &Tables,
    peer: PeerId,
) -> Option<BatchPeer> {
    batch.find_peer(peer).or_else(|| {
        let entry = tables.peers.get(&peer)?;
        let (session, endpoint) = entry.ready(lane.age_clock())?;
        let session = Arc::clone(session);
        Some(batch.add_peer(peer, session, lane.index, endpoint, entry.max_plaintext))
    })
}

#[cfg(test)]
mod tests;
