//! A lane: one TUN queue, its UDP sockets and one thread that moves packets both ways, each batch
//! run to completion. Nothing on the packet path is shared with another thread but the immutable
//! tables.
//!
//! One thread serves both directions. On few cores that is level with a thread a direction in
//! throughput and better in latency, and a node that wants more parallelism raises the lanes.

use std::cell::Cell;
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use skein_core::drop::DropReason;
use skein_core::offload::coalesce::CoalesceConfig;
use skein_sys::poll::{Poller, Waker};
use skein_sys::send::{GsoState, TooLong};
use skein_sys::tun::TunQueue;
use skein_sys::udp::LaneSockets;

use super::boot_time;
use super::busy_poll::BusyPoll;
use super::egress::{Egress, SEND_PATIENCE, TunState};
use super::ingress::Ingress;
use super::queue::{ToManager, ToManagerQueue};
use super::stats::LaneStats;
use super::tables::{Published, Tables};
use super::tap::{Bytes, Sight, Tap};

const WAKE: u32 = 0;
const TUN: u32 = 1;
const SEND: u32 = 2;
const FIRST_SOCKET: u32 = 3;
/// Full batches received before the other direction gets its turn.
const RECEIVES: usize = 4;
/// How often packets that wait for a session are looked at.
const PENDING_TICK: Duration = Duration::from_millis(250);
/// Minimum interval between two reports of a lane about datagrams that were too long for their
/// route.
const TOO_LONG_INTERVAL: Duration = Duration::from_millis(20);
/// How often one lane reports datagrams of unknown sessions.
const UNKNOWN_SESSION_INTERVAL: Duration = Duration::from_millis(100);

/// Everything that a lane is made of. A lane can be built from any descriptors, so that one process
/// can hand its own to the next.
pub(super) struct LaneParts {
    /// Number of this lane.
    pub(super) index: u8,
    /// Number of lanes of this node.
    pub(super) lanes: u8,
    /// The TUN queue.
    pub(super) tun: TunQueue,
    /// What may be written to it.
    pub(super) coalesce: CoalesceConfig,
    /// Sockets, one pair a family.
    pub(super) sockets: Vec<LaneSockets>,
    /// Whether and where UDP_SEGMENT may be used.
    pub(super) gso: GsoState,
    /// Whether small packets may share a datagram.
    pub(super) bundling: bool,
    /// How long to poll for more before sleeping.
    pub(super) busy_poll: Duration,
    /// The tables in force.
    pub(super) published: Arc<Published>,
    /// The manager's queue.
    pub(super) manager: ToManagerQueue,
    /// For whoever looks.
    pub(super) tap: Arc<Tap>,
}

/// What the packet path of a lane needs beside its two halves.
pub(super) struct LaneContext {
    /// Number of this lane.
    pub(super) index: u8,
    /// Number of lanes of this node.
    pub(super) lanes: u8,
    /// Counters.
    pub(super) stats: Arc<LaneStats>,
    /// Sockets to send from, one a family.
    pub(super) send_sockets: Vec<SendSocket>,
    /// For whoever looks.
    pub(super) tap: Arc<Tap>,
    /// Whether somebody looked at packets when this round began.
    pub(super) captured: bool,
    published: Arc<Published>,
    epoch: u64,
    /// The manager's queue.
    pub(super) manager: ToManagerQueue,
    now: Instant,
    age_clock: Duration,
    unknown_session_told: Option<Instant>,
    too_long_reported: Cell<Option<Instant>>,
}

/// A socket to send from.
pub(super) struct SendSocket {
    /// Whether it is of IPv4.
    pub v4: bool,
    /// Itself; nonblocking.
    pub(super) socket: UdpSocket,
}

/// What the manager asks of a running lane.
#[derive(Default)]
struct Mailbox {
    tun: Option<NewTun>,
}

/// A queue of a device that was made anew.
pub(super) struct NewTun {
    /// The queue.
    pub(super) tun: TunQueue,
    /// What may be written to it.
    pub(super) coalesce: CoalesceConfig,
    /// Of the device.
    pub(super) generation: u32,
}

struct Shared {
    waker: Waker,
    mailbox: Mutex<Mailbox>,
    stop: AtomicBool,
}

/// A running lane; dropping it stops and joins the thread.
pub(super) struct LaneHandle {
    /// Its counters.
    pub(super) stats: Arc<LaneStats>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl LaneHandle {
    /// Starts the lane's thread.
    pub(super) fn start(parts: LaneParts) -> io::Result<Self> {
        let stats = Arc::new(LaneStats::default());
        let shared = Arc::new(Shared {
            waker: Waker::new()?,
            mailbox: Mutex::default(),
            stop: AtomicBool::new(false),
        });
        let lane = Lane::new(parts, Arc::clone(&stats), Arc::clone(&shared))?;
        let thread = std::thread::Builder::new()
            .name(format!("lane-{}", lane.context.index))
            .spawn(move || {
                let _guard = AbortOnPanic;
                lane.run();
            })?;
        Ok(Self { stats, shared, thread: Some(thread) })
    }

    /// Makes the lane look at what is new: tables or mail.
    pub(super) fn wake(&self) {
        self.shared.waker.wake();
    }

    /// Gives the lane another TUN queue.
    pub(super) fn replace_tun(&self, new: NewTun) {
        let mut mailbox = self.shared.mailbox.lock().unwrap_or_else(PoisonError::into_inner);
        mailbox.tun = Some(new);
        drop(mailbox);
        self.wake();
    }
}

impl Drop for LaneHandle {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.waker.wake();
        if let Some(thread) = self.thread.take() {
            // A panic has ended the process already.
            let _ = thread.join();
        }
    }
}

/// Ends the process when a lane panics. Its queue and sockets would close one by one, and the
/// steering of the other lanes would be wrong; a new process is there at once.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            std::process::abort();
        }
    }
}

struct Lane {
    context: LaneContext,
    shared: Arc<Shared>,
    poller: Poller,
    busy_poll: Duration,
    tun: Option<TunQueue>,
    /// Of the device.
    generation: u32,
    /// The socket for whose room the sending half waits. The TUN is not watched meanwhile.
    blocked: Option<usize>,
    receive_sockets: Vec<UdpSocket>,
    tables: Arc<Tables>,
    egress: Egress,
    ingress: Ingress,
}

impl Lane {
    fn new(parts: LaneParts, stats: Arc<LaneStats>, shared: Arc<Shared>) -> io::Result<Self> {
        let mut poller = Poller::new()?;
        poller.add(shared.waker.as_fd(), WAKE)?;
        poller.add(parts.tun.as_fd(), TUN)?;
        let mut send_sockets = Vec::new();
        let mut receive_sockets = Vec::new();
        for (token, pair) in (FIRST_SOCKET..).zip(parts.sockets) {
            poller.add(pair.receive.as_fd(), token)?;
            receive_sockets.push(pair.receive);
            let v4 = pair.send.local_addr()?.is_ipv4();
            send_sockets.push(SendSocket { v4, socket: pair.send });
        }
        let tables = parts.published.load();
        let mut ingress = Ingress::new(parts.coalesce);
        ingress.adopt(&tables);
        Ok(Self {
            context: LaneContext {
                index: parts.index,
                lanes: parts.lanes,
                stats,
                send_sockets,
                tap: parts.tap,
                captured: false,
                published: parts.published,
                epoch: 0,
                manager: parts.manager,
                now: Instant::now(),
                age_clock: boot_time(),
                unknown_session_told: None,
                too_long_reported: Cell::new(None),
            },
            shared,
            poller,
            busy_poll: parts.busy_poll,
            tun: Some(parts.tun),
            generation: 0,
            blocked: None,
            receive_sockets,
            tables,
            egress: Egress::new(parts.bundling, parts.gso),
            ingress,
        })
    }

    fn run(mut self) {
        let mut ready = Vec::with_capacity(8);
        let mut busy_poll = BusyPoll::new(self.busy_poll);
        while !self.shared.stop.load(Ordering::Acquire) {
            let timeout = match self.blocked {
                Some(_) => Some(SEND_PATIENCE),
                None => self.egress.has_pending().then_some(PENDING_TICK),
            };
            ready.clear();
            match busy_poll.wait(&mut self.poller, timeout, &self.context.stats) {
                Ok(tokens) => ready.extend_from_slice(tokens),
                Err(error) => {
                    // Nothing that a lane does can make epoll fail; do not spin if it does.
                    tracing::error!(lane = self.context.index, %error, "epoll failed");
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
            self.context.now = Instant::now();
            self.context.age_clock = boot_time();
            self.context.captured = self.context.tap.wants_packets();
            self.adopt_newer();
            if self.blocked.is_some() {
                self.egress.resume(&self.context, ready.contains(&SEND));
            }
            self.egress.release_pending(&self.context, &self.tables);
            for &token in &ready {
                match token {
                    WAKE => self.read_mail(),
                    TUN => self.send(),
                    // Done above.
                    SEND => {}
                    socket => self.receive((socket - FIRST_SOCKET) as usize),
                }
            }
            if self.blocked != self.egress.blocked_socket() {
                watched(self.context.index, self.watch_room());
            }
        }
    }

    fn send(&mut self) {
        let Some(tun) = &self.tun else { return };
        if self.egress.run(&self.context, &self.tables, tun) == TunState::Gone {
            tracing::warn!(
                lane = self.context.index,
                "the TUN device is gone; waiting for another"
            );
            self.context.manager.tell(ToManager::TunGone { generation: self.generation });
            if let Some(tun) = self.tun.take() {
                // Closing would remove it as well; a failure here changes nothing.
                let _ = self.poller.remove(tun.as_fd());
            }
        }
    }

    /// Watches the socket that has no room instead of the TUN, or the TUN again.
    fn watch_room(&mut self) -> io::Result<()> {
        let (before, now) = (self.blocked, self.egress.blocked_socket());
        self.blocked = now;
        let socket = |index: usize| self.context.send_sockets[index].socket.as_fd();
        if let Some(before) = before {
            self.poller.remove(socket(before))?;
        }
        if let Some(now) = now {
            self.poller.add_writable(socket(now), SEND)?;
        }
        match &self.tun {
            Some(tun) if before.is_none() => self.poller.remove(tun.as_fd()),
            Some(tun) if now.is_none() => self.poller.add(tun.as_fd(), TUN),
            _ => Ok(()),
        }
    }

    fn receive(&mut self, index: usize) {
        let Some(socket) = self.receive_sockets.get(index) else { return };
        let (context, tables) = (&mut self.context, &mut self.tables);
        for _ in 0..RECEIVES {
            let tun = self.tun.as_ref();
            if !self.ingress.run(context, tables, (index, socket.as_fd()), tun) {
                break;
            }
        }
    }

    fn adopt_newer(&mut self) {
        if let Some(newer) = self.context.newer_tables() {
            self.ingress.adopt(&newer);
            self.tables = newer;
        }
    }

    fn read_mail(&mut self) {
        self.shared.waker.drain();
        let mail = {
            let mut mailbox = self.shared.mailbox.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut *mailbox)
        };
        if let Some(NewTun { tun, coalesce, generation }) = mail.tun {
            self.generation = generation;
            if let Some(old) = self.tun.take() {
                let _ = self.poller.remove(old.as_fd());
            }
            if self.blocked.is_none() {
                watched(self.context.index, self.poller.add(tun.as_fd(), TUN));
            }
            self.ingress.set_config(coalesce);
            self.context.stats.tun_tcp_refused.store(false, Ordering::Relaxed);
            self.context.stats.tun_udp_refused.store(false, Ordering::Relaxed);
            self.tun = Some(tun);
        }
    }
}

/// Ends the process where a descriptor cannot be watched: the lane would be deaf for good, or never
/// sleep. A new process is there at once.
fn watched(lane: u8, result: io::Result<()>) {
    if let Err(error) = result {
        tracing::error!(lane, %error, "epoll failed: ending, to begin anew");
        std::process::abort();
    }
}

impl LaneContext {
    /// The time at which this round began.
    pub(super) fn now(&self) -> Instant {
        self.now
    }

    /// Returns the time since boot at which this round began, the clock of the sessions' ages.
    pub(super) fn age_clock(&self) -> Duration {
        self.age_clock
    }

    /// Tells whoever looks of a drop.
    #[inline]
    pub(super) fn dropped(&self, reason: DropReason, outer: Option<SocketAddr>, bytes: Bytes<'_>) {
        self.tap.dropped(reason, Sight { lane: Some(self.index), outer, bytes, packets: 1 });
    }

    /// The tables in force, if they are not those that this lane has.
    pub(super) fn newer_tables(&mut self) -> Option<Arc<Tables>> {
        let epoch = self.published.epoch();
        if epoch == self.epoch {
            return None;
        }
        self.epoch = epoch;
        Some(self.published.load())
    }

    /// Reports a datagram that was too long for its route to the manager, which reduces the peer's
    /// path MTU.
    pub(super) fn too_long(&self, datagram: TooLong) {
        let due = |at: Instant| self.now - at >= TOO_LONG_INTERVAL;
        if self.too_long_reported.get().is_none_or(due)
            && self.manager.tell(ToManager::TooLong(datagram))
        {
            self.too_long_reported.set(Some(self.now));
        }
    }

    /// Notes that `source` sent a datagram of a session that is not known here.
    pub(super) fn unknown_session(&mut self, source: IpAddr) {
        if self.unknown_session_told.is_none_or(|t| self.now - t >= UNKNOWN_SESSION_INTERVAL) {
            self.unknown_session_told = Some(self.now);
            self.manager.tell(ToManager::UnknownSession(source));
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(super) mod tests {
    use super::*;
    use skein_core::route::{PeerId, RouteTable};
    use skein_core::time::Time;
    use skein_core::tunnel::session::{Cipher, Session, SessionParams, TransportSecrets};

    use crate::tables::PeerEntry;

    /// The only lane of a node, `age_clock` after the boot. Its send socket is on the loopback
    /// interface.
    pub(crate) fn context(manager: ToManagerQueue, age_clock: Duration) -> LaneContext {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_nonblocking(true).unwrap();
        LaneContext {
            index: 0,
            lanes: 1,
            stats: Arc::default(),
            send_sockets: vec![SendSocket { v4: true, socket }],
            tap: Arc::default(),
            captured: false,
            published: Arc::default(),
            epoch: 0,
            manager,
            now: Instant::now(),
            age_clock,
            unknown_session_told: None,
            too_long_reported: Cell::new(None),
        }
    }

    /// Session with the index 7 at both ends, established at boot.
    pub(crate) fn session(initiator: bool) -> Arc<Session> {
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
            ecn: false,
            secrets: TransportSecrets::new([1; 32], [2; 32]),
        };
        Arc::new(Session::new(params).unwrap())
    }

    /// Tables with the pod CIDRs 10.N.0.0/16 of two peers, the first of which has a session.
    pub(crate) fn tables(endpoint: SocketAddr) -> Tables {
        let cidrs =
            ["10.0.0.0/16", "10.1.0.0/16", "10.2.0.0/16"].map(|text| [text.parse().unwrap()]);
        let peers = [(PeerId(1), &cidrs[1][..]), (PeerId(2), &cidrs[2][..])];
        let entry = |session| PeerEntry {
            endpoint: Some(endpoint),
            session,
            next: None,
            max_plaintext: 1440,
        };
        Tables {
            routes: Arc::new(RouteTable::build(&cidrs[0], peers).unwrap()),
            peers: [(PeerId(1), entry(Some(session(true)))), (PeerId(2), entry(None))].into(),
            sessions: vec![(7, session(true))],
        }
    }

    /// An IPv4 packet between 10.FROM.0.1 and 10.TO.0.1: TCP, with a header of 40 bytes.
    pub(crate) fn packet(from: u8, to: u8, payload: usize) -> Vec<u8> {
        let mut packet = vec![0; 40 + payload];
        (packet[0], packet[8], packet[9]) = (0x45, 64, 6);
        let length = (packet.len() as u16).to_be_bytes();
        packet[2..4].copy_from_slice(&length);
        packet[12..20].copy_from_slice(&[10, from, 0, 1, 10, to, 0, 1]);
        (packet[32], packet[33]) = (0x50, 0x10);
        packet
    }
}
