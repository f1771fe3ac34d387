//! Lane: one TUN queue, its UDP sockets and one thread that moves packets in both directions. Each
//! batch is completed before the next one starts. The immutable tables and the sessions in them are
//! the only data of the packet path that threads share.
//!
//! One thread serves both directions. On few cores its throughput equals that of one thread per
//! direction, and its latency is lower. A node that needs more parallelism has more lanes.

use std::cell::Cell;
use std::io;
use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use skein_core::offload::coalesce::CoalesceConfig;
use skein_sys::poll::{Poller, Waker};
use skein_sys::send::GsoState;
use skein_sys::tun::TunQueue;
use skein_sys::udp::LaneSockets;

use super::busy_poll::BusyPoll;
use super::clock::boot_time;
use super::egress::{Egress, SEND_TIMEOUT, TunState};
use super::ingress::{Ingress, ReceiveSocket};
use super::lane_context::{LaneContext, SendSocket};
use super::queue::{ToManager, ToManagerQueue};
use super::stats::LaneStats;
use super::tables::{Tables, TablesHandle};
use super::tap::Tap;

const WAKE_TOKEN: u32 = 0;
const TUN_TOKEN: u32 = 1;
const SEND_TOKEN: u32 = 2;
const FIRST_SOCKET_TOKEN: u32 = 3;
/// Maximum number of full batches received before the sending half runs again.
const MAX_RECEIVES: usize = 4;
/// Interval at which a lane with pending packets checks for sessions.
const PENDING_INTERVAL: Duration = Duration::from_millis(250);

/// Parts of a lane. A lane can be built from any descriptors, so that a process can continue with
/// those of its predecessor.
pub(super) struct LaneParts {
    /// Lane number.
    pub(super) index: u8,
    /// Number of lanes of the node.
    pub(super) lanes: u8,
    /// TUN queue of the lane.
    pub(super) tun: TunQueue,
    /// Kinds of superpackets and checksums that may be written to the TUN queue.
    pub(super) coalesce: CoalesceConfig,
    /// UDP sockets, one pair for each address family.
    pub(super) sockets: Vec<LaneSockets>,
    /// Destinations for which UDP_SEGMENT may be used.
    pub(super) gso: GsoState,
    /// True if small packets may share a datagram.
    pub(super) bundling: bool,
    /// Maximum duration of one busy-polling period; 0 disables busy polling.
    pub(super) busy_poll: Duration,
    /// Handle to the tables that the session manager published last. The lane loads them from this
    /// handle when their version has changed.
    pub(super) published: Arc<TablesHandle>,
    /// Queue of the session manager.
    pub(super) manager: ToManagerQueue,
    /// Packet tap for `capture` and `trace --drops`.
    pub(super) tap: Arc<Tap>,
}

/// Requests of the manager to a running lane.
#[derive(Default)]
struct Mailbox {
    tun: Option<TunReplacement>,
}

/// Queue of a TUN device that was created again.
pub(super) struct TunReplacement {
    /// TUN queue of the lane.
    pub(super) tun: TunQueue,
    /// Kinds of superpackets and checksums that may be written to the queue.
    pub(super) coalesce: CoalesceConfig,
    /// Generation of the device.
    pub(super) generation: u32,
}

struct Shared {
    waker: Waker,
    mailbox: Mutex<Mailbox>,
    stop: AtomicBool,
}

/// Handle of a running lane. Drop stops the thread and joins it.
///
/// The owner publishes tables before it starts a lane, and calls [`LaneHandle::wake`] after each
/// later publication. The lane owns its descriptors and adopts new tables between two batches. The
/// process aborts if the thread panics.
pub(super) struct LaneHandle {
    pub(super) stats: Arc<LaneStats>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl LaneHandle {
    /// Creates the event descriptors and starts the thread `lane-N`.
    ///
    /// # Errors
    /// The kernel's error if epoll, the waker or the thread cannot be created.
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

    /// Wakes the lane, so that it adopts new tables and handles requests.
    pub(super) fn wake(&self) {
        self.shared.waker.wake();
    }

    /// Attaches the lane to another TUN queue.
    pub(super) fn replace_tun(&self, new: TunReplacement) {
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
            // `join` cannot return an error here: `AbortOnPanic` aborts the process if the lane
            // thread panics.
            let _ = thread.join();
        }
    }
}

/// Guard that aborts the process if a lane panics. Without it, the queue and sockets of the lane
/// would close one by one, and the steering of the other lanes would be wrong. The keeper starts a
/// new process at once.
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
    /// Generation of the TUN device.
    generation: u32,
    /// Index of the send socket that has no room. The TUN queue is not polled while it is `Some`.
    blocked: Option<usize>,
    receive_sockets: Vec<UdpSocket>,
    tables: Arc<Tables>,
    egress: Egress,
    ingress: Ingress,
}

impl Lane {
    fn new(parts: LaneParts, stats: Arc<LaneStats>, shared: Arc<Shared>) -> io::Result<Self> {
        let mut poller = Poller::new()?;
        poller.add(shared.waker.as_fd(), WAKE_TOKEN)?;
        poller.add(parts.tun.as_fd(), TUN_TOKEN)?;
        let mut send_sockets = Vec::new();
        let mut receive_sockets = Vec::new();
        for (token, pair) in (FIRST_SOCKET_TOKEN..).zip(parts.sockets) {
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
                tables_version: 0,
                manager: parts.manager,
                now: Instant::now(),
                age_clock: boot_time(),
                unknown_session_reported: None,
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
                Some(_) => Some(SEND_TIMEOUT),
                None => self.egress.has_pending().then_some(PENDING_INTERVAL),
            };
            ready.clear();
            match busy_poll.wait(&mut self.poller, timeout, &self.context.stats) {
                Ok(tokens) => ready.extend_from_slice(tokens),
                Err(error) => {
                    // No error of epoll_wait(2) is expected here. The pause limits the log if an
                    // error occurs in every round.
                    tracing::error!(lane = self.context.index, %error, "epoll failed");
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
            self.context.now = Instant::now();
            self.context.age_clock = boot_time();
            self.context.captured = self.context.tap.wants_packets();
            self.adopt_newer_tables();
            if self.blocked.is_some() {
                self.egress.resume(&self.context, ready.contains(&SEND_TOKEN));
            }
            self.egress.release_pending(&self.context, &self.tables);
            for &token in &ready {
                match token {
                    WAKE_TOKEN => self.on_mail(),
                    TUN_TOKEN => self.send(),
                    // `resume` above has handled this event.
                    SEND_TOKEN => {}
                    socket => self.receive((socket - FIRST_SOCKET_TOKEN) as usize),
                }
            }
            if self.blocked != self.egress.blocked_socket() {
                abort_on_error(self.context.index, self.update_epoll_registration());
            }
        }
    }

    fn send(&mut self) {
        let Some(tun) = &self.tun else { return };
        if self.egress.run(&self.context, &self.tables, tun) == TunState::Gone {
            tracing::warn!(lane = self.context.index, "TUN device deleted, waiting for a new one");
            self.context.manager.try_send_own(ToManager::TunGone { generation: self.generation });
            if let Some(tun) = self.tun.take() {
                // Closing the queue also removes it from epoll.
                let _ = self.poller.remove(tun.as_fd());
            }
        }
    }

    /// Changes the registration in epoll after the blocked send socket has changed. While a send
    /// socket is blocked, epoll reports room in this socket and no packets of the TUN queue. While
    /// no send socket is blocked, epoll reports packets of the TUN queue.
    ///
    /// # Errors
    /// The error of epoll_ctl(2).
    fn update_epoll_registration(&mut self) -> io::Result<()> {
        let (before, now) = (self.blocked, self.egress.blocked_socket());
        self.blocked = now;
        let socket = |index: usize| self.context.send_sockets[index].socket.as_fd();
        if let Some(before) = before {
            self.poller.remove(socket(before))?;
        }
        if let Some(now) = now {
            self.poller.add_writable(socket(now), SEND_TOKEN)?;
        }
        match &self.tun {
            Some(tun) if before.is_none() => self.poller.remove(tun.as_fd()),
            Some(tun) if now.is_none() => self.poller.add(tun.as_fd(), TUN_TOKEN),
            _ => Ok(()),
        }
    }

    fn receive(&mut self, index: usize) {
        let Some(socket) = self.receive_sockets.get(index) else { return };
        let (context, tables) = (&mut self.context, &mut self.tables);
        for _ in 0..MAX_RECEIVES {
            let tun = self.tun.as_ref();
            let socket = ReceiveSocket { index, fd: socket.as_fd() };
            if !self.ingress.run(context, tables, socket, tun) {
                break;
            }
        }
    }

    fn adopt_newer_tables(&mut self) {
        if let Some(newer) = self.context.newer_tables() {
            self.ingress.adopt(&newer);
            self.tables = newer;
        }
    }

    fn on_mail(&mut self) {
        self.shared.waker.drain();
        let mail = {
            let mut mailbox = self.shared.mailbox.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut *mailbox)
        };
        if let Some(TunReplacement { tun, coalesce, generation }) = mail.tun {
            self.generation = generation;
            if let Some(old) = self.tun.take() {
                let _ = self.poller.remove(old.as_fd());
            }
            if self.blocked.is_none() {
                abort_on_error(self.context.index, self.poller.add(tun.as_fd(), TUN_TOKEN));
            }
            self.ingress.set_config(coalesce);
            self.context.stats.tun_tcp_refused.store(false, Ordering::Relaxed);
            self.context.stats.tun_udp_refused.store(false, Ordering::Relaxed);
            self.tun = Some(tun);
        }
    }
}

/// Aborts the process if epoll_ctl(2) has failed, because the lane would never receive again, or
/// never sleep. The keeper starts a new process at once.
fn abort_on_error(lane: u8, result: io::Result<()>) {
    if let Err(error) = result {
        tracing::error!(lane, %error, "epoll failed, aborting the data process");
        std::process::abort();
    }
}
