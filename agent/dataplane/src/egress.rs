//! From the TUN to the underlay: read a superpacket, look its owner up, split and seal it into the
//! send arena, and send the arena when it is full or the TUN's queue is dry.

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
use super::pending::PendingPackets;
use super::queue::ToManager;
use super::stats::add;
use super::tables::Tables;
use super::tap::{Bytes, PacketRef};

/// The send arena's size in bytes: four superpackets, a quarter of a usual L2 cache.
const ARENA_LEN: usize = 256 << 10;
/// Packets read before the other direction gets its turn.
const MAX_READS: usize = 64;
/// Full batches sent before the other direction gets its turn: a superpacket of tiny segments fills
/// several.
const MAX_FULL_BATCHES: usize = 2;
/// Runs handed to the sender at a time.
const MAX_RUNS: usize = 64;
/// How long a batch waits for room in a socket's send buffer before it is dropped. A device that takes
/// nothing for so long would hold up what goes to others.
pub(super) const SEND_TIMEOUT: Duration = Duration::from_millis(100);
/// Why a packet can be dropped while it is put into the batch.
const BATCH_DROPS: [DropReason; 3] =
    [DropReason::TooBig, DropReason::CounterExhausted, DropReason::SealFailed];

/// The lane's sending half.
pub(super) struct Egress {
    read_buffer: Box<[u8]>,
    batch: EgressBatch,
    sender: Sender,
    gso: GsoState,
    pending: PendingPackets,
    drops: DropCounts,
    /// Full batches sent since [`Egress::run`] began.
    full_batches: usize,
    /// What of the batch had no room in the send buffer.
    unsent: Option<SendCursor>,
}

/// Where sending goes on.
#[derive(Debug, Clone, Copy)]
struct SendCursor {
    /// Index of the socket that has no room.
    socket: usize,
    /// Runs of its family before that one, all done.
    runs: usize,
    /// Datagrams of that run that are done.
    segment: usize,
    /// Since when nothing went.
    since: Instant,
}

impl SendCursor {
    fn is_at(&self, other: &Self) -> bool {
        (self.socket, self.runs, self.segment) == (other.socket, other.runs, other.segment)
    }
}

/// What became of the TUN queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TunState {
    /// It goes on.
    Alive,
    /// The device is gone; the descriptor is of no more use.
    Gone,
}

impl Egress {
    /// A sender that has sent nothing yet.
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

    /// Moves what the TUN queue holds, up to a bound.
    pub(super) fn run(&mut self, lane: &LaneContext, tables: &Tables, tun: &TunQueue) -> TunState {
        // What waits is older than what is read now.
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
                // One packet that the kernel could not hand out: the queue goes on.
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

    /// Returns true if a run that has read this number of packets may read another one.
    fn may_read(&self, read: usize) -> bool {
        self.unsent.is_none()
            && read < MAX_READS
            && self.full_batches < MAX_FULL_BATCHES
            && !self.batch.is_nearly_full()
    }

    /// Sends what waited for sessions that are there now, and gives up what waited too long.
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

    /// Index of the socket for whose room the batch waits; until then nothing is read from the TUN.
    pub(super) fn blocked_socket(&self) -> Option<usize> {
        self.unsent.map(|unsent| unsent.socket)
    }

    /// Goes on with a batch that had no room; gives it up when that has lasted too long. `writable`:
    /// the socket has room now.
    pub(super) fn resume(&mut self, lane: &LaneContext, writable: bool) {
        let Some(before) = self.unsent.take() else { return };
        self.transmit(lane, before);
        // EAGAIN in spite of room is about the destination (an IPsec association that is being
        // negotiated): the others shall not wait for it.
        let refused = |now: &mut SendCursor| writable && now.is_at(&before);
        if let Some(refused) = self.unsent.take_if(refused) {
            self.skip_run(lane, refused);
        }
        let late = |unsent: &mut SendCursor| lane.now() - unsent.since >= SEND_TIMEOUT;
        if let Some(unsent) = self.unsent.take_if(late) {
            self.drops.add_many(DropReason::SendNoBuffer, self.count_unsent(lane, unsent));
            self.finish(lane);
        }
        lane.stats.drops.collect(&mut self.drops);
    }

    /// Whether packets wait for a session.
    pub(super) fn has_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    fn on_packet(&mut self, lane: &LaneContext, tables: &Tables, length: usize) {
        // The buffer is moved out for the time that `self` is needed beside it: two pointers.
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
        // What waits for this peer goes first, or it would be overtaken.
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

    /// Puts the packets that one packet of the TUN stands for into the batch.
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
            // The middle of a superpacket cannot wait: there is nowhere to keep the rest.
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

    /// Counts a packet of the TUN that goes nowhere.
    fn drop(&mut self, lane: &LaneContext, reason: DropReason, packet: &[u8]) {
        self.drops.add(reason);
        lane.report_drop(reason, None, Bytes::Inner(packet));
    }

    fn hold(&mut self, lane: &LaneContext, peer: PeerId, vnet: VnetHeader, packet: &[u8]) {
        let (accepted, request) = self.pending.push(lane.now(), peer, vnet, packet);
        if !accepted {
            self.drop(lane, DropReason::NoSession, packet);
        }
        if request && lane.manager.try_send_own(ToManager::RequestSession(peer)) {
            self.pending.requested(lane.now(), peer);
        }
    }

    /// Sends what the batch holds and empties it, unless a socket has no room.
    fn flush(&mut self, lane: &LaneContext) {
        if self.unsent.is_some() {
            return;
        }
        if self.batch.is_empty() {
            // Targets may have been looked up for packets that came to nothing; they must not be
            // found by a later batch, which may have other tables.
            self.batch.clear();
        } else {
            self.batch.finish(&mut self.drops);
            let from = SendCursor { socket: 0, runs: 0, segment: 0, since: lane.now() };
            self.transmit(lane, from);
        }
        lane.stats.drops.collect(&mut self.drops);
    }

    /// Sends each address family from its own socket, until all is done or a socket has no room.
    fn transmit(&mut self, lane: &LaneContext, from: SendCursor) {
        let mut at = from;
        while let Some(socket) = lane.send_sockets.get(at.socket) {
            let mut runs = [GsoBatch::EMPTY; MAX_RUNS];
            let mut count = 0;
            for run in runs_of_family(&self.batch, socket.v4).skip(at.runs).take(MAX_RUNS) {
                runs[count] = run;
                count += 1;
            }
            if count == 0 {
                at = SendCursor { socket: at.socket + 1, runs: 0, segment: 0, since: lane.now() };
                continue;
            }
            let from = Position { batch: 0, segment: at.segment };
            let request = SendRequest { arena: self.batch.arena(), batches: &runs[..count], from };
            let (gso, now) = (&mut self.gso, lane.now());
            let before = lane.tap.wants_drops().then(|| self.drops.clone());
            let outcome =
                self.sender.send(socket.socket.as_fd(), &request, gso, &mut self.drops, now);
            if let Some(before) = before {
                report_unsent(lane, &before, &self.drops, &runs[..count]);
            }
            lane.stats.count_sent(&outcome, &self.sender);
            if let Some(datagram) = outcome.too_long {
                lane.report_too_long(datagram);
            }
            lane.stats.note_gso_off(&self.gso, now, outcome.fallbacks > 0);
            let since = if outcome.datagrams > 0 { now } else { at.since };
            match outcome.blocked {
                Some(Position { run, segment }) => {
                    self.unsent = Some(SendCursor { runs: at.runs + run, segment, since, ..at });
                    return;
                }
                None => at = SendCursor { runs: at.runs + count, segment: 0, since, ..at },
            }
        }
        self.finish(lane);
    }

    /// Drops the rest of the run that has no luck, and goes on behind it.
    fn skip_run(&mut self, lane: &LaneContext, at: SendCursor) {
        let Some(socket) = lane.send_sockets.get(at.socket) else { return self.finish(lane) };
        let run = runs_of_family(&self.batch, socket.v4).nth(at.runs);
        let left = run.map_or(0, |run| run.segments.saturating_sub(at.segment));
        self.drops.add_many(DropReason::SendNoBuffer, left as u64);
        self.transmit(lane, SendCursor { runs: at.runs + 1, segment: 0, since: lane.now(), ..at });
    }

    /// The batch is done with.
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

    /// How many datagrams were neither sent nor dropped.
    fn count_unsent(&self, lane: &LaneContext, from: SendCursor) -> u64 {
        let mut left = 0;
        for (index, socket) in lane.send_sockets.iter().enumerate().skip(from.socket) {
            let (done, part) =
                if index == from.socket { (from.runs, from.segment) } else { (0, 0) };
            let segments: usize =
                runs_of_family(&self.batch, socket.v4).skip(done).map(|run| run.segments).sum();
            left += segments.saturating_sub(part) as u64;
        }
        left
    }
}

/// The runs of one address family.
fn runs_of_family(batch: &EgressBatch, v4: bool) -> impl Iterator<Item = GsoBatch<'_>> {
    batch.gso_batches().filter(move |run| run.destination.is_ipv4() == v4)
}

/// Tells whoever looks what the kernel did not send. Which runs they were of it does not say, so that a
/// destination is named only where all have the same.
#[cold]
fn report_unsent(lane: &LaneContext, before: &DropCounts, now: &DropCounts, runs: &[GsoBatch<'_>]) {
    let destination = runs.first().map(|run| run.destination);
    let outer = destination.filter(|one| runs.iter().all(|run| run.destination == *one));
    for (reason, packets) in now.iter() {
        let packets = packets - before.get(reason);
        if packets > 0 {
            let packet_ref =
                PacketRef { lane: Some(lane.index), outer, bytes: Bytes::Outer(&[]), packets };
            lane.tap.dropped(reason, packet_ref);
        }
    }
}

/// Whether a read failed because the device was deleted: polling would report it for ever.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EBADFD | libc::EBADF | libc::EFAULT | libc::EIO))
}

/// Where packets for `peer` go in this batch; `None` without a session or endpoint.
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
#[allow(clippy::unwrap_used)]
mod tests {
    use std::net::UdpSocket;

    use skein_core::offload::vnet::{GSO_TCPV4, NEEDS_CSUM};

    use super::super::queue;
    use super::super::testing::{context, packet, tables};
    use super::*;

    struct Lab {
        egress: Egress,
        lane: LaneContext,
        tables: Tables,
        /// The peer's socket. Nobody reads it, so that the kernel drops what exceeds its buffer.
        _peer: UdpSocket,
    }

    impl Lab {
        fn new(age_clock: Duration) -> Self {
            let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
            let (manager, _) = queue::channel();
            Self {
                egress: Egress::new(true, GsoState::new()),
                lane: context(manager, age_clock),
                tables: tables(peer.local_addr().unwrap()),
                _peer: peer,
            }
        }

        fn route(&mut self, vnet: VnetHeader, mut packet: Vec<u8>) {
            self.egress.route(&self.lane, &self.tables, vnet, &mut packet);
        }

        /// Sends superpackets with this segment size until the run ends. Returns their number.
        fn run_of_superpackets(&mut self, segment: u16) -> usize {
            let vnet = VnetHeader {
                flags: NEEDS_CSUM,
                gso_type: GSO_TCPV4,
                hdr_len: 40,
                gso_size: segment,
                csum_start: 20,
                csum_offset: 16,
            };
            let payload = 65_000 / usize::from(segment) * usize::from(segment);
            let mut read = 0;
            while self.egress.may_read(read) {
                self.route(vnet, packet(0, 1, payload));
                read += 1;
            }
            read
        }
    }

    #[test]
    fn run_of_tiny_segments_ends_after_two_full_batches() {
        let mut lab = Lab::new(Duration::ZERO);
        let read = lab.run_of_superpackets(8);
        assert!(read <= 2, "{read} superpackets of 8,000 segments each hold up the lane.");
        let mut lab = Lab::new(Duration::ZERO);
        assert_eq!(lab.run_of_superpackets(1400), 3, "A run of bulk data fills one batch.");
        assert_eq!(lab.egress.full_batches, 0);
    }

    #[test]
    fn waiting_packets_do_not_end_a_batch() {
        let mut lab = Lab::new(Duration::ZERO);
        lab.route(VnetHeader::default(), packet(0, 1, 10));
        for _ in 0..3 {
            lab.route(VnetHeader::default(), packet(0, 2, 10));
            lab.egress.release_pending(&lab.lane, &lab.tables);
        }
        assert!(lab.egress.has_pending());
        assert!(!lab.egress.batch.is_empty(), "The packet of the first peer waits for more.");
    }

    #[test]
    fn session_ends_after_180_s_without_a_manager() {
        for (age, is_sent) in [(179, true), (180, false)] {
            let mut lab = Lab::new(Duration::from_secs(age));
            lab.route(VnetHeader::default(), packet(0, 1, 10));
            assert_eq!(!lab.egress.batch.is_empty(), is_sent, "{age} s");
            assert_eq!(lab.egress.has_pending(), !is_sent, "{age} s");
        }
    }
}
