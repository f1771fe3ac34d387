//! From the underlay to the TUN: receive with GRO, open every datagram in place, check replay,
//! inner source and destination, merge what belongs together and write it while it is in cache.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use skein_core::drop::{Direction, DropCounts, DropReason};
use skein_core::offload::Checksum;
use skein_core::offload::coalesce::{CoalesceConfig, Coalescer, TunPacket};
use skein_core::route::{Owner, PeerId};
use skein_core::tunnel::rate_limit::{Rate, TokenBucket};
use skein_core::tunnel::replay::ReplayWindow;
use skein_core::tunnel::session::{Receiver, Session};
use skein_core::wire::ecn::Ecn;
use skein_core::wire::header::{CONTROL_LANE, Flags, HEADER_LEN, Header, MessageType, TAG_LEN};
use skein_core::wire::ip::IpHeader;
use skein_sys::recv::RecvBatch;
use skein_sys::tun::TunQueue;

use super::lane_context::LaneContext;
use super::stats::{Values, add};
use super::tables::Tables;
use super::tap::{Bytes, Sight};
use super::write::TunWriter;

/// The longest handshake in bytes, and the longest control message, which may be a padded ping.
const MAX_HANDSHAKE: usize = 2048;
const MAX_CONTROL: usize = 9216;
/// Control messages of one session that a lane hands to the session manager. The protocol needs fewer
/// than 16 per second.
const CONTROL_RATE: Rate = Rate { per_second: 64, burst: 64 };
/// Messages a system call, each of up to 64 KiB.
const MESSAGES: usize = 16;

/// The lane's receiving half.
pub(super) struct Ingress {
    receive: RecvBatch,
    coalescer: Coalescer,
    config: CoalesceConfig,
    writer: TunWriter,
    sessions: Vec<RxSession>,
    /// Where in `sessions` each receiver index is.
    by_index: HashMap<u32, usize>,
    /// The tables that `sessions` follows.
    adopted: Arc<Tables>,
    /// The receiver index of the last datagram, and where that is: most come in trains.
    last: Option<(u32, usize)>,
    /// The last inner flow that passed the source and destination check.
    checked: Option<(PeerId, IpAddr, IpAddr)>,
    /// The kernel's overflow counter of each socket as last seen.
    overflow: Vec<u32>,
    drops: DropCounts,
    totals: Totals,
}

/// Outer header of a datagram, as the kernel reports it.
struct Outer {
    source: SocketAddr,
    /// ECN field of the message that the datagram came in.
    ecn: Ecn,
    /// True if the kernel merged the datagram with others into one message.
    merged: bool,
}

/// A session as one worker receives with it. The windows are the worker's own: the steering gives
/// every (peer, lane) to one worker for good.
struct RxSession {
    session: Arc<Session>,
    windows: Vec<Option<Box<ReplayWindow>>>,
    control_window: Option<Box<ReplayWindow>>,
    control_bucket: TokenBucket,
    packets: u64,
    bytes: u64,
}

impl RxSession {
    fn new(session: &Arc<Session>) -> Self {
        Self {
            session: Arc::clone(session),
            windows: (0..session.remote_lanes).map(|_| None).collect(),
            control_window: None,
            control_bucket: TokenBucket::new(CONTROL_RATE, Duration::ZERO),
            packets: 0,
            bytes: 0,
        }
    }

    /// Checks that a control message is authentic, new, and within [`CONTROL_RATE`]. Forged and
    /// repeated messages thus cost the session manager nothing, and use up no part of the rate.
    /// `now` is the time since boot. Decrypts the datagram.
    fn check_control(&mut self, now: Duration, datagram: &mut [u8]) -> Result<(), DropReason> {
        let (header, _) = receiver(&self.session, CONTROL_LANE, now)?.open(datagram)?;
        let begin = || Box::new(ReplayWindow::after(self.session.next_counter(CONTROL_LANE)));
        self.control_window.get_or_insert_with(begin).check_and_set(header.counter)?;
        match self.control_bucket.try_acquire(CONTROL_RATE, now) {
            true => Ok(()),
            false => Err(DropReason::ManagerQueue),
        }
    }
}

#[derive(Default)]
struct Totals {
    inner_packets: u64,
    inner_bytes: u64,
    outer_packets: u64,
    outer_bytes: u64,
    segments_per_message: Values,
    inner_per_outer: Values,
}

impl Ingress {
    /// A receiver that merges what `config` allows.
    pub(super) fn new(config: CoalesceConfig) -> Self {
        Self {
            receive: RecvBatch::new(MESSAGES),
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
            totals: Totals::default(),
        }
    }

    /// Begins anew with another device.
    pub(super) fn set_config(&mut self, config: CoalesceConfig) {
        self.config = config;
        self.writer.forgive_all();
        self.coalescer.set_config(config);
    }

    /// Takes over the sessions of new tables; replay windows of those that stay are kept. Costs a
    /// walk over both lists, and more only for what differs.
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

    /// Receives one batch. Returns whether there may be more.
    pub(super) fn run(
        &mut self,
        lane: &mut LaneContext,
        tables: &mut Arc<Tables>,
        (index, socket): (usize, BorrowedFd<'_>),
        tun: Option<&TunQueue>,
    ) -> bool {
        let messages = match self.receive.recv(socket) {
            Ok(messages) => messages,
            Err(_) => return false,
        };
        // A session is published before its handshake is answered, so tables that are looked at
        // after the receive hold the session of everything that was received.
        if let Some(newer) = lane.newer_tables() {
            self.adopt(&newer);
            *tables = newer;
        }
        self.count_overflow(lane, index);
        let mut datagrams = 0;
        for message in 0..messages {
            let message = self.receive.message(message);
            if message.truncated {
                self.drops.add(DropReason::Truncated);
                lane.dropped(DropReason::Truncated, Some(message.source), Bytes::Outer(&[]));
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
                    lane.dropped(reason, Some(message.source), bytes);
                }
            }
            self.totals.segments_per_message.observe(segments);
            datagrams += segments;
        }
        self.write(lane, tun);
        self.account(lane, datagrams);
        messages == MESSAGES
    }

    fn datagram(
        &mut self,
        lane: &mut LaneContext,
        tables: &Tables,
        Outer { source, ecn: outer_ecn, merged }: Outer,
        range: Range<usize>,
    ) -> Result<(), DropReason> {
        let datagram = &mut self.receive.arena_mut()[range.clone()];
        let header = Header::parse(datagram)?;
        self.totals.outer_packets += 1;
        self.totals.outer_bytes += datagram.len() as u64;
        if header.kind != MessageType::Data {
            // Nothing that the manager reads is longer; a queue of longer ones would be memory lost.
            let longest = match header.kind {
                MessageType::Control => MAX_CONTROL,
                _ => MAX_HANDSHAKE,
            };
            if datagram.len() > longest {
                return Err(DropReason::HandshakeInvalid);
            }
            if header.kind != MessageType::Control {
                return lane.manager.hand_on(header.kind, source, &*datagram);
            }
            let at = self.by_index.get(&header.receiver);
            let Some(rx) = at.and_then(|&at| self.sessions.get_mut(at)) else {
                lane.unknown_session(source.ip());
                return Err(DropReason::UnknownSession);
            };
            // The engine opens the message again: it answers, and its replay window decides.
            let sealed: Box<[u8]> = (&*datagram).into();
            rx.check_control(lane.age_clock(), datagram)?;
            return lane.manager.hand_on(header.kind, source, sealed);
        }
        if self.last.is_none_or(|(receiver, _)| receiver != header.receiver) {
            self.last = self.by_index.get(&header.receiver).map(|&at| (header.receiver, at));
        }
        let Some(rx) = self.last.and_then(|(_, at)| self.sessions.get_mut(at)) else {
            lane.unknown_session(source.ip());
            return Err(DropReason::UnknownSession);
        };
        if header.lane % lane.lanes != lane.index {
            return Err(DropReason::WrongLane);
        }
        receiver(&rx.session, header.lane, lane.age_clock())?.open(datagram)?;
        let window = rx.windows.get_mut(usize::from(header.lane)).ok_or(DropReason::WrongLane)?;
        let begin = || Box::new(ReplayWindow::after(rx.session.next_counter(header.lane)));
        let window = window.get_or_insert_with(begin);
        window.check_and_set(header.counter)?;
        if window.next_counter() == header.counter {
            rx.session.set_next_counter(header.lane, header.counter);
        }
        rx.session.confirm();
        let checksum = match header.flags.contains(Flags::PARTIAL_CHECKSUM) {
            true => Checksum::Partial,
            false => Checksum::Full,
        };
        // A peer that does not propagate the field has sent Not-ECT.
        let outer_ecn = if rx.session.ecn { outer_ecn } else { Ecn::NotEct };
        let (mut at, end) = (range.start + HEADER_LEN, range.end - TAG_LEN);
        if at == end {
            return Err(DropReason::InnerMalformed);
        }
        let first = self.totals.inner_packets;
        while at < end {
            let arena = self.receive.arena_mut();
            let ip = IpHeader::parse(&arena[at..end]).ok_or(DropReason::InnerMalformed)?;
            let packet = at..at + ip.total_len;
            at = packet.end;
            let flow = (rx.session.peer, ip.source, ip.destination);
            if self.checked != Some(flow) {
                let foreign =
                    if tables.routes.lookup(ip.source) != Some(Owner::Peer(rx.session.peer)) {
                        Some(DropReason::InnerSource)
                    } else if tables.routes.lookup(ip.destination) != Some(Owner::Local) {
                        Some(DropReason::InnerDestination)
                    } else {
                        None
                    };
                if let Some(reason) = foreign {
                    self.drops.add(reason);
                    lane.dropped(reason, Some(source), Bytes::Inner(&arena[packet]));
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
                        lane.dropped(reason, Some(source), Bytes::Inner(&arena[packet]));
                        continue;
                    }
                }
            }
            self.totals.inner_packets += 1;
            self.totals.inner_bytes += packet.len() as u64;
            rx.packets += 1;
            rx.bytes += packet.len() as u64;
            if lane.captured {
                lane.tap.passed(Direction::Ingress, lane.index, &arena[packet.clone()]);
            }
            self.coalescer.push(arena, packet, &ip, checksum);
        }
        self.totals.inner_per_outer.observe(self.totals.inner_packets - first);
        Ok(())
    }

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
                    refuse(lane, arena, &packet);
                }
            }
        });
        add(&lane.stats.ingress.tun_packets, written);
        self.writer.forgive(lane.now());
        let refused = self.writer.refused();
        if refused != before {
            lane.stats.tun_tcp_refused.store(refused.tcp, Relaxed);
            lane.stats.tun_udp_refused.store(refused.udp, Relaxed);
            self.coalescer.set_config(refused.limit(self.config));
        }
    }

    /// The kernel's counter is one a socket, says nothing while it is zero, and wraps.
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

    fn account(&mut self, lane: &LaneContext, datagrams: u64) {
        let stats = &lane.stats.ingress;
        let mut totals = std::mem::take(&mut self.totals);
        stats.segments_per_message.collect(&mut totals.segments_per_message);
        stats.inner_per_outer.collect(&mut totals.inner_per_outer);
        add(&stats.calls, 1);
        stats.packets_per_call.observe(datagrams);
        add(&stats.inner_packets, totals.inner_packets);
        add(&stats.inner_bytes, totals.inner_bytes);
        add(&stats.outer_packets, totals.outer_packets);
        add(&stats.outer_bytes, totals.outer_bytes);
        for rx in self.sessions.iter_mut().filter(|rx| rx.packets > 0) {
            rx.session.traffic().add_received(rx.packets, rx.bytes);
            (rx.packets, rx.bytes) = (0, 0);
        }
        lane.stats.drops.collect(&mut self.drops);
    }
}

/// Returns the ECN field that an inner packet leaves the tunnel with, or `None` if the packet must be
/// dropped. The outer field of a merged message may be the mark of any datagram in it
/// ([`Message::ecn`](skein_sys::recv::Message::ecn)), which is no reason to drop all of them.
fn decapsulate(inner: Ecn, outer: Ecn, merged: bool) -> Option<Ecn> {
    inner.decapsulate(outer).or(merged.then_some(inner))
}

/// Returns the receiving half of a lane of the session. `now` is the time since boot.
fn receiver(session: &Session, lane: u8, now: Duration) -> Result<&Receiver, DropReason> {
    let receiver = session.receiver(lane).ok_or(DropReason::WrongLane)?;
    // The age is checked here as well, because the manager, which ends sessions, may hang.
    match session.is_expired_at(now) {
        true => Err(DropReason::SessionExpired),
        false => Ok(receiver),
    }
}

/// Tells whoever looks what the TUN did not take.
fn refuse(lane: &LaneContext, arena: &[u8], packet: &TunPacket<'_>) {
    let whole = packet.payload.first().map_or(&[][..], |slice| slice.of(arena));
    let bytes = Bytes::Inner(if packet.header.is_empty() { whole } else { packet.header });
    let sight =
        Sight { lane: Some(lane.index), outer: None, bytes, packets: packet.segments as u64 };
    lane.tap.dropped(DropReason::TunWrite, sight);
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::net::UdpSocket;
    use std::os::fd::AsFd;

    use super::super::queue::{self, ToManager};
    use super::super::stats::drop_report;
    use super::super::testing;
    use super::*;
    use proptest::prelude::*;
    use skein_core::tunnel::session::{Cipher, SessionParams, TransportSecrets};
    use std::collections::BTreeMap;

    fn params(index: u32) -> SessionParams {
        SessionParams {
            peer: PeerId(1),
            local_index: index,
            remote_index: 7,
            cipher: Cipher::Aes256Gcm,
            local_lanes: 1,
            remote_lanes: 1,
            established: Default::default(),
            initiator: true,
            epoch: 0,
            ecn: false,
            secrets: TransportSecrets::new([1; 32], [2; 32]),
        }
    }

    fn session(index: u32) -> Arc<Session> {
        Arc::new(Session::new(params(index)).unwrap())
    }

    #[test]
    fn data_of_a_session_past_its_life_is_refused() {
        // The session was established at boot, and the manager has not ended it.
        let session = session(1);
        for (age, expected) in [
            (0, None),
            (179, None),
            (180, Some(DropReason::SessionExpired)),
            (205, Some(DropReason::SessionExpired)),
        ] {
            let found = receiver(&session, 0, Duration::from_secs(age)).err();
            assert_eq!(found, expected, "{age} s");
        }
        assert_eq!(receiver(&session, 1, Duration::ZERO).err(), Some(DropReason::WrongLane));
        assert!(!session.is_expired());
    }

    #[test]
    fn control_messages_are_checked_and_limited_by_session() {
        let (ours, other) = (session(7), session(7));
        let theirs = Session::new(SessionParams { initiator: false, ..params(7) }).unwrap();
        let ping = || {
            let mut out = [0; 53];
            let sender = theirs.sender(CONTROL_LANE).unwrap();
            sender.seal(Flags::default(), &[1; 21], &mut out).unwrap();
            out
        };
        let mut rx = RxSession::new(&ours);
        let at = Duration::from_secs(1);
        let first = ping();
        assert_eq!(rx.check_control(at, &mut first.clone()), Ok(()));
        for _ in 0..1000 {
            let mut forged = ping();
            forged[40] ^= 1;
            assert_eq!(rx.check_control(at, &mut forged), Err(DropReason::AuthFailed));
            assert_eq!(rx.check_control(at, &mut first.clone()), Err(DropReason::Replayed));
        }
        for _ in 1..CONTROL_RATE.burst {
            assert_eq!(rx.check_control(at, &mut ping()), Ok(()));
        }
        assert_eq!(rx.check_control(at, &mut ping()), Err(DropReason::ManagerQueue));
        assert_eq!(RxSession::new(&other).check_control(at, &mut ping()), Ok(()));
        let later = at + Duration::from_millis(16);
        assert_eq!(rx.check_control(later, &mut ping()), Ok(()));
        assert_eq!(rx.check_control(later, &mut ping()), Err(DropReason::ManagerQueue));
        let end = Duration::from_secs(180);
        assert_eq!(rx.check_control(end, &mut ping()), Err(DropReason::SessionExpired));
    }

    /// Receives what `peer` sends to a lane `age` after the session was established. Returns the
    /// drops and what the manager gets; no manager runs.
    fn receive(age: u64, datagrams: &[&[u8]]) -> (Vec<String>, Vec<Box<[u8]>>) {
        let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let mut tables = Arc::new(testing::tables(peer.local_addr().unwrap()));
        let (manager, queue) = queue::new();
        let mut lane = testing::context(manager, Duration::from_secs(age));
        let config = CoalesceConfig { tcp: true, udp: true, partial_checksum: true };
        let mut ingress = Ingress::new(config);
        ingress.adopt(&tables);
        for datagram in datagrams {
            peer.send_to(datagram, socket.local_addr().unwrap()).unwrap();
        }
        ingress.run(&mut lane, &mut tables, (0, socket.as_fd()), None);
        let drops = drop_report(&[&lane.stats.drops]).into_iter();
        let drops = drops.flat_map(|drop| vec![drop.reason; drop.packets as usize]).collect();
        let taken = queue.try_iter().map(|message| match message {
            ToManager::Datagram { datagram, .. } => datagram,
            _ => panic!("Only datagrams were sent."),
        });
        (drops, taken.collect())
    }

    fn seal(lane: u8, plaintext: &[u8]) -> Vec<u8> {
        let mut out = vec![0; plaintext.len() + HEADER_LEN + TAG_LEN];
        let session = testing::session(false);
        session.sender(lane).unwrap().seal(Flags::default(), plaintext, &mut out).unwrap();
        out
    }

    #[test]
    fn session_ends_after_180_s_without_a_manager() {
        let data = seal(0, &testing::packet(1, 0, 10));
        // Packets that pass all checks fail at the TUN device, because there is none.
        assert_eq!(receive(179, &[&data]).0, ["tun_write"]);
        assert_eq!(receive(180, &[&data]).0, ["session_expired"]);
        let control = seal(CONTROL_LANE, &[1; 21]);
        assert_eq!(receive(180, &[&control]), (vec!["session_expired".to_owned()], Vec::new()));
    }

    #[test]
    fn manager_gets_no_forged_or_repeated_control_messages() {
        let control = seal(CONTROL_LANE, &[1; 21]);
        let mut forged = control.clone();
        forged[30] ^= 1;
        let mut of_data_lane = control.clone();
        of_data_lane[2] = 0;
        let (drops, taken) = receive(1, &[&forged, &of_data_lane, &control, &control]);
        assert_eq!(drops, ["outer_header", "auth_failed", "replayed"]);
        assert_eq!(taken, [control.into_boxed_slice()], "The engine opens the message again.");
    }

    #[test]
    fn mark_of_merged_run_drops_no_packet_of_it() {
        let all = [Ecn::NotEct, Ecn::Ect1, Ecn::Ect0, Ecn::Ce];
        for (inner, outer) in all.into_iter().flat_map(|inner| all.map(|outer| (inner, outer))) {
            let (alone, merged) =
                (decapsulate(inner, outer, false), decapsulate(inner, outer, true));
            assert_eq!(alone, inner.decapsulate(outer), "A single datagram follows RFC 6040.");
            let expected = alone.unwrap_or(inner);
            assert_eq!(merged, Some(expected), "{inner:?} in a run marked {outer:?} stays.");
        }
        assert_eq!(decapsulate(Ecn::NotEct, Ecn::Ce, false), None, "A marked datagram is dropped.");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Whatever comes and goes: exactly the sessions of the last tables are known, and those that
        /// stay keep their windows.
        #[test]
        fn sessions_follow_the_tables(
            steps in prop::collection::vec(prop::collection::btree_map(0u32..12, 0u8..2, 0..10), 1..8),
        ) {
            let all: Vec<[_; 2]> = (0..12).map(|index| [session(index), session(index)]).collect();
            let config = CoalesceConfig { tcp: true, udp: true, partial_checksum: true };
            let mut ingress = Ingress::new(config);
            let mut before = BTreeMap::new();
            for step in steps {
                let pick = |(&index, &which): (&u32, &u8)| {
                    (index, Arc::clone(&all[index as usize][usize::from(which)]))
                };
                let sessions = step.iter().map(pick).collect();
                ingress.adopt(&Arc::new(Tables { sessions, ..Tables::default() }));
                prop_assert_eq!(ingress.sessions.len(), step.len());
                prop_assert_eq!(ingress.by_index.len(), step.len());
                for (index, which) in &step {
                    let rx = &mut ingress.sessions[ingress.by_index[index]];
                    prop_assert!(Arc::ptr_eq(&rx.session, &all[*index as usize][usize::from(*which)]));
                    // The packets not yet reported stand for what a session keeps.
                    prop_assert_eq!(rx.packets > 0, before.get(index) == Some(which));
                    rx.packets = 1;
                }
                before = step;
            }
        }
    }
}
