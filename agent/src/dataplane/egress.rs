//! From the TUN to the underlay: read a superpacket, look its owner up, split and seal it into the
//! send arena, and send the arena when it is full or the TUN's queue is dry.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use skein_core::drop::{DropCounts, DropReason};
use skein_core::offload::batch::{EgressBatch, Target};
use skein_core::offload::split::split;
use skein_core::offload::vnet::VnetHeader;
use skein_core::route::{Owner, PeerId};
use skein_core::wire::ip::IpHeader;

use super::lane::LaneContext;
use super::manager::ToManager;
use super::pending::Pending;
use super::stats::add;
use super::tables::Tables;
use crate::sys::send::{GsoState, Sender};
use crate::sys::tun::TunQueue;

/// The send arena's size in bytes: four superpackets, a quarter of a usual L2 cache.
const ARENA: usize = 256 << 10;
/// Packets read before the other direction gets its turn.
const READS: usize = 64;

/// The lane's sending half.
pub(super) struct Egress {
    read_buffer: Box<[u8]>,
    batch: EgressBatch,
    sender: Sender,
    gso: GsoState,
    pending: Pending,
    drops: DropCounts,
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
            batch: EgressBatch::new(ARENA, bundling),
            sender: Sender::new(),
            gso,
            pending: Pending::default(),
            drops: DropCounts::default(),
        }
    }

    /// Moves what the TUN queue holds, up to a bound.
    pub(super) fn run(&mut self, lane: &LaneContext, tables: &Tables, tun: &TunQueue) -> TunState {
        // What waits is older than what is read now.
        self.release_pending(lane, tables);
        let mut read = 0;
        let mut state = TunState::Alive;
        // A send may wait for room in the socket's buffer, and the other direction waits with it:
        // one arena a turn.
        while read < READS && !self.batch.is_nearly_full() {
            match tun.read(&mut self.read_buffer) {
                Ok(length) => {
                    read += 1;
                    self.take(lane, tables, length);
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

    /// Sends what waited for sessions that are there now, and gives up what waited too long.
    pub(super) fn release_pending(&mut self, lane: &LaneContext, tables: &Tables) {
        if self.pending.is_empty() {
            return;
        }
        let now = lane.now();
        let ready = |peer| tables.peers.get(&peer).is_some_and(|entry| entry.ready().is_some());
        for mut held in self.pending.take_ready(ready) {
            self.route(lane, tables, held.vnet, &mut held.packet);
        }
        self.flush(lane);
        let expired = self.pending.expire(now, |peer| tables.peers.contains_key(&peer));
        self.drops.add_many(DropReason::NoSession, expired as u64);
        lane.stats.drops.collect(&mut self.drops);
    }

    /// Whether packets wait for a session.
    pub(super) fn has_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    fn take(&mut self, lane: &LaneContext, tables: &Tables, length: usize) {
        // The buffer is moved out for the time that `self` is needed beside it: two pointers.
        let mut buffer = std::mem::take(&mut self.read_buffer);
        match buffer[..length].split_at_mut_checked(VnetHeader::LEN) {
            Some((header, packet)) => match VnetHeader::parse(header) {
                Some(vnet) => self.route(lane, tables, vnet, packet),
                None => self.drops.add(DropReason::VnetHeader),
            },
            None => self.drops.add(DropReason::VnetHeader),
        }
        self.read_buffer = buffer;
    }

    fn route(&mut self, lane: &LaneContext, tables: &Tables, vnet: VnetHeader, packet: &mut [u8]) {
        let Some(ip) = IpHeader::parse(packet) else {
            return self.drops.add(DropReason::EgressMalformed);
        };
        let Some(Owner::Peer(peer)) = tables.routes.lookup(ip.destination) else {
            return self.drops.add(DropReason::NoRoute);
        };
        if target(&mut self.batch, lane, tables, peer).is_none() {
            return self.hold(lane, peer, vnet, packet);
        }
        let mut segments = match split(vnet, packet) {
            Ok(segments) => segments,
            Err(reason) => return self.drops.add(reason),
        };
        let checksum = segments.checksum();
        while let Some(segment) = segments.next_segment() {
            if !self.batch.has_room(segment.len()) {
                flush(lane, &mut self.batch, &mut self.sender, &mut self.gso, &mut self.drops);
            }
            match target(&mut self.batch, lane, tables, peer) {
                Some(target) => self.batch.push(target, checksum, segment, &mut self.drops),
                None => self.drops.add(DropReason::NoSession),
            }
        }
    }

    fn hold(&mut self, lane: &LaneContext, peer: PeerId, vnet: VnetHeader, packet: &[u8]) {
        let (held, ask) = self.pending.hold(lane.now(), peer, vnet, packet);
        if !held {
            self.drops.add(DropReason::NoSession);
        }
        if ask && lane.tell(ToManager::WantSession(peer)) {
            self.pending.asked(lane.now(), peer);
        }
    }

    fn flush(&mut self, lane: &LaneContext) {
        flush(lane, &mut self.batch, &mut self.sender, &mut self.gso, &mut self.drops);
        lane.stats.drops.collect(&mut self.drops);
    }
}

/// Sends what the batch holds, each address family from its own socket, and empties it.
fn flush(
    lane: &LaneContext,
    batch: &mut EgressBatch,
    sender: &mut Sender,
    gso: &mut GsoState,
    drops: &mut DropCounts,
) {
    if batch.is_empty() {
        // Targets may have been looked up for packets that came to nothing; they must not be found
        // by a later batch, which may have other tables.
        batch.clear();
        return;
    }
    batch.finish(drops);
    let stats = &lane.stats.egress;
    for socket in &lane.send_sockets {
        let runs: Vec<_> =
            batch.runs().filter(|run| run.destination.is_ipv4() == socket.v4).collect();
        if runs.is_empty() {
            continue;
        }
        let fd = socket.socket.as_fd();
        let outcome = sender.send(fd, batch.arena(), &runs, gso, drops, lane.now());
        add(&stats.outer_packets, outcome.datagrams);
        add(&stats.outer_bytes, outcome.bytes);
        add(&stats.calls, outcome.calls);
        for &datagrams in sender.datagrams_per_call() {
            stats.packets_per_call.observe(u64::from(datagrams));
        }
        for &segments in sender.segments_per_message() {
            stats.segments_per_message.observe(u64::from(segments));
        }
        if outcome.fallbacks > 0 {
            add(&lane.stats.gso_fallbacks, outcome.fallbacks);
        }
        lane.stats.note_gso_off(gso, lane.now(), outcome.fallbacks > 0);
    }
    let totals = batch.totals();
    add(&stats.inner_packets, totals.inner_packets);
    add(&stats.inner_bytes, totals.inner_bytes);
    for packets in batch.fill().chunk_by(|a, b| a == b) {
        stats.inner_per_outer.observe_many(u64::from(packets[0]), packets.len() as u64);
    }
    batch.clear();
}

/// Whether a read failed because the device was deleted: polling would report it for ever.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EBADFD | libc::EBADF | libc::EFAULT | libc::EIO))
}

/// Where packets for `peer` go in this batch; `None` without a session or endpoint.
fn target(
    batch: &mut EgressBatch,
    lane: &LaneContext,
    tables: &Tables,
    peer: PeerId,
) -> Option<Target> {
    batch.find_target(peer).or_else(|| {
        let entry = tables.peers.get(&peer)?;
        let (session, endpoint) = entry.ready()?;
        let session = Arc::clone(session);
        Some(batch.add_target(peer, session, lane.index, endpoint, entry.max_plaintext))
    })
}
