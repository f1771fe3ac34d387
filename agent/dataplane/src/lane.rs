//! A lane: one TUN queue, its UDP sockets and one thread that moves packets both ways, each batch
//! run to completion. Nothing on the packet path is shared with another thread but the immutable
//! tables.
//!
//! One thread serves both directions. On few cores that is level with a thread a direction in
//! throughput and better in latency, and a node that wants more parallelism raises the lanes.

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
/// Full batches received before the other direction gets its turn.
const MAX_RECEIVES: usize = 4;
/// How often packets that wait for a session are looked at.
const PENDING_INTERVAL: Duration = Duration::from_millis(250);
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
    pub(super) published: Arc<TablesHandle>,
    /// The manager's queue.
    pub(super) manager: ToManagerQueue,
    /// For whoever looks.
    pub(super) tap: Arc<Tap>,
}

/// What the manager asks of a running lane.
#[derive(Default)]
struct Mailbox {
    tun: Option<TunReplacement>,
}

/// A queue of a device that was made anew.
pub(super) struct TunReplacement {
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
    /// The socket for whose room the sending half waits. The TUN is not abort_on_error meanwhile.
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
                    // Nothing that a lane does can make epoll fail; do not spin if it does.
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
                    // Done above.
                    SEND_TOKEN => {}
                    socket => self.receive((socket - FIRST_SOCKET_TOKEN) as usize),
                }
            }
            if self.blocked != self.egress.blocked_socket() {
                abort_on_error(self.context.index, self.watch_room());
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
            self.context.manager.try_send_own(ToManager::TunGone { generation: self.generation });
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

/// Ends the process where a descriptor cannot be abort_on_error: the lane would be deaf for good, or never
/// sleep. A new process is there at once.
fn abort_on_error(lane: u8, result: io::Result<()>) {
    if let Err(error) = result {
        tracing::error!(lane, %error, "epoll failed: ending, to begin anew");
        std::process::abort();
    }
}
