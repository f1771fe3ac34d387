//! Receiving half of a lane, from the underlay to the TUN device: receives with GRO, opens each
//! datagram in place, checks the replay window, inner source and destination, merges packets of a
//! flow and writes them to the TUN queue.

mod rx_session;

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use skein_core::drop::{Direction, DropCounts, DropReason};
use skein_core::offload::Checksum;
use skein_core::offload::coalesce::{CoalesceConfig, Coalescer, TunPacket};
use skein_core::route::{Owner, PeerId};
use skein_core::tunnel::session::Session;
use skein_core::wire::ecn::Ecn;
use skein_core::wire::header::{Flags, HEADER_LEN, Header, MessageType, TAG_LEN};
use skein_core::wire::ip::IpHeader;
use skein_sys::recv::RecvBatch;
use skein_sys::tun::TunQueue;

use self::rx_session::RxSession;
use super::lane_context::LaneContext;
use super::stats::{Values, add};
use super::tables::Tables;
use super::tap::{Bytes, PacketRef};
use super::write::TunWriter;

/// Maximum length of a control message, bytes; a control message may be a padded ping.
const MAX_CONTROL_LEN: usize = 9216;
/// Messages per recvmmsg(2), each of up to 64 KiB.
const MAX_MESSAGES: usize = 16;

/// Receiving half of a lane. It owns the replay windows of its sessions: all datagrams from one
/// lane of a peer are steered to the same lane of this node.
pub(super) struct Ingress {
    receive: RecvBatch,
    coalescer: Coalescer,
    config: CoalesceConfig,
    writer: TunWriter,
    sessions: Vec<RxSession>,
    /// Index in `sessions` of each receiver index.
    by_index: HashMap<u32, usize>,
    /// Tables whose sessions are in `sessions`.
    adopted: Arc<Tables>,
    /// Receiver index of the last datagram with its index in `sessions`. Consecutive datagrams
    /// usually have the same receiver index.
    last: Option<(u32, usize)>,
    /// Last inner flow whose source and destination were valid: peer, source, destination.
    checked: Option<(PeerId, IpAddr, IpAddr)>,
    /// Last value of the kernel's overflow counter (SO_RXQ_OVFL) of each socket.
    overflow: Vec<u32>,
    drops: DropCounts,
    counts: BatchCounts,
}

/// Receive socket of the lane.
pub(super) struct ReceiveSocket<'a> {
    /// Index of the socket in the lane; one socket for each address family.
    pub(super) index: usize,
    pub(super) fd: BorrowedFd<'a>,
}

/// Outer header of a datagram, as the kernel reports it.
struct Outer {
    source: SocketAddr,
    /// ECN field of the received message that contains the datagram.
    ecn: Ecn,
    /// True if the kernel merged the datagram with others into one message (GRO).
    merged: bool,
}

#[derive(Default)]
struct BatchCounts {
    inner_packets: u64,
    inner_bytes: u64,
    outer_packets: u64,
    outer_bytes: u64,
    segments_per_message: Values,
    inner_per_outer: Values,
}

impl Ingress {
    /// Creates a receiving half without sessions that merges packets as `config` allows.
    pub(super) fn new(config: CoalesceConfig) -> Self {
        Self {
            receive: RecvBatch::new(MAX_MESSAGES),
            coalescer: Coalescer::new(config),
            config,
            writer: TunWriter::default(),
            sessions: Vec::new(),
            by_index: HashMap::new(),
            adopted: Arc::default(),
            last: None,
            checked: None,
            overflow: Vec::new(),
            drops: DropCounts::default(),
            counts: BatchCounts::default(),
        }
    }

    /// Replaces the merging rules for another TUN device and clears the refusals of the previous
    /// device.
    pub(super) fn set_config(&mut self, config: CoalesceConfig) {
        self.config = config;
        self.writer.clear_refusals();
        self.coalescer.set_config(config);
    }

    /// Adopts the sessions of new tables and keeps the replay windows of unchanged sessions. The
    /// cost is one walk over both sorted lists, plus the differences.
    pub(super) fn adopt(&mut self, tables: &Arc<Tables>) {
        self.checked = None;
        self.last = None;
        let adopted = std::mem::replace(&mut self.adopted, Arc::clone(tables));
        let (mut old, mut new) = (adopted.sessions.iter().peekable(), tables.sessions.iter());
        let mut next = new.next();
        while let Some((index, session)) = next {
            match old.next_if(|(before, _)| before <= index) {
                None => self.add(session),
                Some((before, _)) if before < index => {
                    self.remove(*before);
                    continue;
                }
                Some((_, before)) if Arc::ptr_eq(before, session) => {}
                Some((before, _)) => {
                    self.remove(*before);
                    self.add(session);
                }
            }
            next = new.next();
        }
        old.for_each(|(index, _)| self.remove(*index));
    }

    fn add(&mut self, session: &Arc<Session>) {
        self.by_index.insert(session.local_index, self.sessions.len());
        self.sessions.push(RxSession::new(session));
    }

    fn remove(&mut self, index: u32) {
        let Some(at) = self.by_index.remove(&index) else { return };
        self.sessions.swap_remove(at);
        if let Some(moved) = self.sessions.get(at) {
            self.by_index.insert(moved.session.local_index, at);
        }
    }

    /// Receives and writes one batch. Returns whether more messages may be waiting.
    pub(super) fn run(
        &mut self,
        lane: &mut LaneContext,
        tables: &mut Arc<Tables>,
        socket: ReceiveSocket<'_>,
        tun: Option<&TunQueue>,
    ) -> bool {
        let messages = match self.receive.recv(socket.fd) {
            Ok(messages) => messages,
            Err(_) => return false,
        };
        // The manager publishes a session before it answers the handshake. Tables that are read
        // after the receive therefore contain the session of every received datagram.
        if let Some(newer) = lane.newer_tables() {
            self.adopt(&newer);
            *tables = newer;
        }
        self.count_overflow(lane, socket.index);
        let mut datagrams = 0;
        for message in 0..messages {
            let message = self.receive.message(message);
            if message.truncated {
                self.drops.add(DropReason::Truncated);
                lane.report_drop(DropReason::Truncated, Some(message.source), Bytes::Outer(&[]));
                continue;
            }
            let mut segments = 0;
            for range in message.segments() {
                segments += 1;
                let outer =
                    Outer { source: message.source, ecn: message.ecn, merged: message.is_merged() };
                if let Err(reason) = self.datagram(lane, tables, outer, range.clone()) {
                    self.drops.add(reason);
                    let bytes = Bytes::Outer(&self.receive.arena()[range]);
                    lane.report_drop(reason, Some(message.source), bytes);
                }
            }
            self.counts.segments_per_message.observe(segments);
            datagrams += segments;
        }
        self.write(lane, tun);
        self.publish_counts(lane, datagrams);
        messages == MAX_MESSAGES
    }

    /// Opens one datagram and passes its inner packets to the coalescer. `range` is its place in
    /// the receive arena.
    ///
    /// # Errors
    /// The reason of the drop.
    fn datagram(
        &mut self,
        lane: &mut LaneContext,
        tables: &Tables,
        Outer { source, ecn: outer_ecn, merged }: Outer,
        range: Range<usize>,
    ) -> Result<(), DropReason> {
        let datagram = &mut self.receive.arena_mut()[range.clone()];
        let header = Header::parse(datagram)?;
        self.counts.outer_packets += 1;
        self.counts.outer_bytes += datagram.len() as u64;
        if header.kind != MessageType::Data {
            return self.pass_to_manager(lane, tables, header, source, range);
        }
        if self.last.is_none_or(|(receiver, _)| receiver != header.receiver) {
            self.last = self.by_index.get(&header.receiver).map(|&at| (header.receiver, at));
        }
        let Some(rx) = self.last.and_then(|(_, at)| self.sessions.get_mut(at)) else {
            lane.report_unknown_session(source.ip());
            return Err(DropReason::UnknownSession);
        };
        if header.lane % lane.lanes != lane.index {
            return Err(DropReason::WrongLane);
        }
        rx.open_data(lane.age_clock(), header, datagram)?;
        let checksum = match header.flags.contains(Flags::PARTIAL_CHECKSUM) {
            true => Checksum::Partial,
            false => Checksum::Full,
        };
        // A peer without ECN support sends Not-ECT; its outer field has no meaning.
        let outer_ecn = if rx.session.ecn { outer_ecn } else { Ecn::NotEct };
        let (mut at, end) = (range.start + HEADER_LEN, range.end - TAG_LEN);
        if at == end {
            return Err(DropReason::InnerMalformed);
        }
        let first = self.counts.inner_packets;
        while at < end {
            let arena = self.receive.arena_mut();
            let ip = IpHeader::parse(&arena[at..end]).ok_or(DropReason::InnerMalformed)?;
            let packet = at..at + ip.total_len;
            at = packet.end;
            let flow = (rx.session.peer, ip.source, ip.destination);
            if self.checked != Some(flow) {
                let foreign = find_foreign_address(tables, rx.session.peer, &ip);
                if let Some(reason) = foreign {
                    self.drops.add(reason);
                    lane.report_drop(reason, Some(source), Bytes::Inner(&arena[packet]));
                    continue;
                }
                self.checked = Some(flow);
            }
            if outer_ecn != Ecn::NotEct {
                match decapsulate(ip.ecn, outer_ecn, merged) {
                    Some(ecn) if ecn == ip.ecn => {}
                    Some(ecn) => ecn.write(&mut arena[packet.clone()]),
                    None => {
                        let reason = DropReason::InnerNotEct;
                        self.drops.add(reason);
                        lane.report_drop(reason, Some(source), Bytes::Inner(&arena[packet]));
                        continue;
                    }
                }
            }
            self.counts.inner_packets += 1;
            self.counts.inner_bytes += packet.len() as u64;
            rx.packets += 1;
            rx.bytes += packet.len() as u64;
            if lane.captured {
                lane.tap.passed(Direction::Ingress, lane.index, &arena[packet.clone()]);
            }
            self.coalescer.push(arena, packet, &ip, checksum);
        }
        self.counts.inner_per_outer.observe(self.counts.inner_packets - first);
        Ok(())
    }

    /// Queues a handshake or control message for the session manager. First, the layout and mac1 of
    /// a handshake message are checked ([`HandshakeFilter::check`]), and a control message is
    /// authenticated and limited ([`RxSession::check_control`]).
    ///
    /// [`HandshakeFilter::check`]: skein_core::tunnel::HandshakeFilter::check
    ///
    /// # Errors
    /// The reason of the drop: the check fails, a control message is longer than
    /// [`MAX_CONTROL_LEN`], its session is unknown, or the manager's queue is full.
    fn pass_to_manager(
        &mut self,
        lane: &mut LaneContext,
        tables: &Tables,
        header: Header,
        source: SocketAddr,
        range: Range<usize>,
    ) -> Result<(), DropReason> {
        let datagram = &mut self.receive.arena_mut()[range];
        if header.kind != MessageType::Control {
            // The room is checked before mac1, because this check costs less.
            lane.manager.check_room(header.kind)?;
            tables.handshakes.check(header, datagram)?;
            return lane.manager.try_enqueue(header.kind, source, &*datagram);
        }
        // The session manager would keep a copy of any length in its queue.
        if datagram.len() > MAX_CONTROL_LEN {
            return Err(DropReason::ControlTooLong);
        }
        let at = self.by_index.get(&header.receiver);
        let Some(rx) = at.and_then(|&at| self.sessions.get_mut(at)) else {
            lane.report_unknown_session(source.ip());
            return Err(DropReason::UnknownSession);
        };
        // The engine opens the message again, checks its own replay window, and answers.
        let sealed: Box<[u8]> = (&*datagram).into();
        rx.check_control(lane.age_clock(), datagram)?;
        lane.manager.try_enqueue(header.kind, source, sealed)
    }

    /// Writes the merged packets of the batch to the TUN queue.
    fn write(&mut self, lane: &LaneContext, tun: Option<&TunQueue>) {
        let (arena, drops) = (self.receive.arena(), &mut self.drops);
        let before = self.writer.refused();
        let (writer, now) = (&mut self.writer, lane.now());
        let mut written = 0;
        self.coalescer.flush(arena, |packet| {
            let result = match tun {
                Some(tun) => writer.write(tun, arena, &packet, now),
                None => Err(io::ErrorKind::NotConnected.into()),
            };
            match result {
                Ok(()) => written += 1,
                Err(_) => {
                    drops.add_many(DropReason::TunWrite, packet.segments as u64);
                    report_refused(lane, arena, &packet);
                }
            }
        });
        add(&lane.stats.ingress.tun_packets, written);
        self.writer.expire_refusals(lane.now());
        let refused = self.writer.refused();
        if refused != before {
            lane.stats.tun_tcp_refused.store(refused.tcp, Relaxed);
            lane.stats.tun_udp_refused.store(refused.udp, Relaxed);
            self.coalescer.set_config(refused.limit(self.config));
        }
    }

    /// Adds the growth of the kernel's overflow counter. The counter belongs to one socket, wraps,
    /// and is absent from messages while it is 0.
    fn count_overflow(&mut self, lane: &LaneContext, socket: usize) {
        let now = self.receive.overflow();
        if now == 0 {
            return;
        }
        if self.overflow.len() <= socket {
            self.overflow.resize(socket + 1, 0);
        }
        let lost = now.wrapping_sub(std::mem::replace(&mut self.overflow[socket], now));
        add(&lane.stats.receive_queue_overflow, u64::from(lost));
    }

    /// Adds the counts of the batch to the shared counters of the lane and its sessions.
    fn publish_counts(&mut self, lane: &LaneContext, datagrams: u64) {
        let stats = &lane.stats.ingress;
        let mut counts = std::mem::take(&mut self.counts);
        stats.segments_per_message.collect(&mut counts.segments_per_message);
        stats.inner_per_outer.collect(&mut counts.inner_per_outer);
        add(&stats.calls, 1);
        stats.packets_per_call.observe(datagrams);
        add(&stats.inner_packets, counts.inner_packets);
        add(&stats.inner_bytes, counts.inner_bytes);
        add(&stats.outer_packets, counts.outer_packets);
        add(&stats.outer_bytes, counts.outer_bytes);
        for rx in self.sessions.iter_mut().filter(|rx| rx.packets > 0) {
            rx.session.traffic().add_received(rx.packets, rx.bytes);
            (rx.packets, rx.bytes) = (0, 0);
        }
        lane.stats.drops.collect(&mut self.drops);
    }
}

/// Returns the reason to drop a packet of `peer`: the peer does not own the source address, or this
/// node does not own the destination address. `None` if both addresses are valid.
#[inline]
fn find_foreign_address(tables: &Tables, peer: PeerId, ip: &IpHeader) -> Option<DropReason> {
    if tables.routes.lookup(ip.source) != Some(Owner::Peer(peer)) {
        Some(DropReason::InnerSource)
    } else if tables.routes.lookup(ip.destination) != Some(Owner::Local) {
        Some(DropReason::InnerDestination)
    } else {
        None
    }
}

/// Returns the ECN field with which an inner packet leaves the tunnel; `None` if the packet must be
/// dropped (RFC 6040). The outer field of a merged message may come from any of its datagrams
/// ([`Message::ecn`](skein_sys::recv::Message::ecn)), so the outer field is no reason to drop all
/// packets of the message.
fn decapsulate(inner: Ecn, outer: Ecn, merged: bool) -> Option<Ecn> {
    inner.decapsulate(outer).or(merged.then_some(inner))
}

/// Reports to the tap a packet that the TUN device refused.
fn report_refused(lane: &LaneContext, arena: &[u8], packet: &TunPacket<'_>) {
    let whole = packet.payload.first().map_or(&[][..], |slice| slice.of(arena));
    let bytes = Bytes::Inner(if packet.header.is_empty() { whole } else { packet.header });
    let packet_ref =
        PacketRef { lane: Some(lane.index), outer: None, bytes, packets: packet.segments as u64 };
    lane.tap.dropped(DropReason::TunWrite, packet_ref);
}

#[cfg(test)]
mod tests;
