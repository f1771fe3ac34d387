//! What passes and what is dropped, for whoever looks: copies of packets on their way to a watcher.
//!
//! While nobody looks a lane pays one relaxed load a round, and one a drop. While somebody does, a
//! packet that is looked for is copied and put into the watcher's queue, which takes it or counts it
//! as missed: no lane ever waits.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use skein_core::drop::{Direction, DropReason};
use skein_core::wire::ip::IpHeader;
use skein_ipc::capture::{CaptureKind, CaptureRequest, CapturedPacket};

const DROPS: u8 = 1;
const PACKETS: u8 = 2;

/// Watchers at once: each holds up to [`QUEUE`] packets, and a connection.
const WATCHERS: usize = 4;
/// Packets that wait for a watcher.
const QUEUE: usize = 1024;
/// Packets that one message to a watcher holds.
const TOGETHER: usize = 128;
/// Drops that are told within [`REFILL`]; those beyond are counted. A flood of them would cost the lanes
/// more than the drops do.
const DROPS_TOLD: u32 = 100;
const REFILL: Duration = Duration::from_millis(100);
/// The most of a packet that is copied, in bytes.
const MAX_SNAP: usize = 65_535;

/// See the module.
#[derive(Default)]
pub(super) struct Tap {
    wanted: AtomicU8,
    watchers: ArcSwap<Vec<Arc<Watcher>>>,
    /// Held while the two above change together; never on the packet path.
    changing: Mutex<()>,
}

struct Watcher {
    watch: CaptureRequest,
    sender: SyncSender<CapturedPacket>,
    /// How many drops may be told until it is filled again.
    budget: AtomicU32,
    missed: AtomicU64,
}

/// What a lane or the manager has before it.
#[derive(Clone, Copy)]
pub(super) struct Sight<'a> {
    /// The lane; `None` for the manager.
    pub(super) lane: Option<u8>,
    /// The other node's address, where it is known.
    pub(super) outer: Option<SocketAddr>,
    /// What the bytes are.
    pub(super) bytes: Bytes<'a>,
    /// How many packets this stands for.
    pub(super) packets: u64,
}

/// The bytes of a packet.
#[derive(Clone, Copy)]
pub(super) enum Bytes<'a> {
    /// An IP packet of a pod's.
    Inner(&'a [u8]),
    /// The payload of a datagram between nodes.
    Outer(&'a [u8]),
}

/// A watch in progress; it ends when this is dropped.
pub(super) struct Watching {
    tap: Arc<Tap>,
    watcher: Arc<Watcher>,
    receiver: Receiver<CapturedPacket>,
    filled: Instant,
}

impl Tap {
    /// Whether somebody looks at drops.
    #[inline]
    pub(super) fn wants_drops(&self) -> bool {
        self.wanted.load(Relaxed) & DROPS != 0
    }

    /// Whether somebody looks at packets that pass.
    #[inline]
    pub(super) fn wants_packets(&self) -> bool {
        self.wanted.load(Relaxed) & PACKETS != 0
    }

    /// Tells of a drop.
    #[inline]
    pub(super) fn dropped(&self, reason: DropReason, sight: Sight<'_>) {
        if self.wants_drops() {
            self.tell(reason.direction(), Some(reason), &sight);
        }
    }

    /// Tells of an inner packet that passes. The caller has asked [`Self::wants_packets`].
    #[cold]
    pub(super) fn passed(&self, direction: Direction, lane: u8, packet: &[u8]) {
        let bytes = Bytes::Inner(packet);
        let sight = Sight { lane: Some(lane), outer: None, bytes, packets: 1 };
        self.tell(direction, None, &sight);
    }

    #[cold]
    fn tell(&self, direction: Direction, reason: Option<DropReason>, sight: &Sight<'_>) {
        for watcher in self.watchers.load().iter() {
            if (watcher.watch.kind == CaptureKind::Drops) == reason.is_some()
                && watcher.matches(sight.bytes)
            {
                watcher.take(direction, reason, sight);
            }
        }
    }

    /// Begins a watch; `None` where too many are under way.
    pub(super) fn watch(self: &Arc<Self>, watch: CaptureRequest) -> Option<Watching> {
        let (sender, receiver) = sync_channel(QUEUE);
        let watcher = Arc::new(Watcher {
            watch,
            sender,
            budget: AtomicU32::new(DROPS_TOLD),
            missed: AtomicU64::new(0),
        });
        self.change(|watchers| {
            if watchers.len() < WATCHERS {
                watchers.push(Arc::clone(&watcher));
            }
        });
        let taken = self.watchers.load().iter().any(|other| Arc::ptr_eq(other, &watcher));
        let watching =
            Watching { tap: Arc::clone(self), watcher, receiver, filled: Instant::now() };
        taken.then_some(watching)
    }

    fn change(&self, change: impl Fn(&mut Vec<Arc<Watcher>>)) {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        self.watchers.rcu(|watchers| {
            let mut watchers = Vec::clone(watchers);
            change(&mut watchers);
            watchers
        });
        let wanted = self.watchers.load().iter().fold(0, |wanted, watcher| {
            wanted | if watcher.watch.kind == CaptureKind::Drops { DROPS } else { PACKETS }
        });
        self.wanted.store(wanted, Relaxed);
    }
}

impl Watcher {
    fn matches(&self, bytes: Bytes<'_>) -> bool {
        let nets = &self.watch.nets;
        if nets.is_empty() {
            return true;
        }
        let Bytes::Inner(packet) = bytes else { return false };
        IpHeader::parse(packet).is_some_and(|ip| {
            nets.iter().any(|net| net.contains(&ip.source) || net.contains(&ip.destination))
        })
    }

    fn take(&self, direction: Direction, reason: Option<DropReason>, sight: &Sight<'_>) {
        let spend = |budget: u32| budget.checked_sub(1);
        if reason.is_some() && self.budget.fetch_update(Relaxed, Relaxed, spend).is_err() {
            self.missed.fetch_add(sight.packets, Relaxed);
            return;
        }
        let (inner, bytes) = match sight.bytes {
            Bytes::Inner(bytes) => (true, bytes),
            Bytes::Outer(bytes) => (false, bytes),
        };
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let snap = (self.watch.snap as usize).min(MAX_SNAP).min(bytes.len());
        let seen = CapturedPacket {
            time_ns: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX),
            lane: sight.lane,
            direction: direction.label().to_owned(),
            reason: reason.map(|reason| reason.label().to_owned()),
            outer: sight.outer,
            inner,
            packets: sight.packets,
            length: u32::try_from(bytes.len()).unwrap_or(u32::MAX),
            bytes: bytes[..snap].to_vec(),
        };
        if self.sender.try_send(seen).is_err() {
            self.missed.fetch_add(sight.packets, Relaxed);
        }
    }
}

impl Watching {
    /// What was seen, once there is something or `patience` is over; and how many packets were missed.
    pub(super) fn next(&mut self, patience: Duration) -> (Vec<CapturedPacket>, u64) {
        let end = Instant::now() + patience;
        let mut seen = Vec::new();
        loop {
            if self.filled.elapsed() >= REFILL {
                self.filled = Instant::now();
                self.watcher.budget.store(DROPS_TOLD, Relaxed);
            }
            let left = end.saturating_duration_since(Instant::now()).min(REFILL);
            match self.receiver.recv_timeout(left) {
                Ok(first) => {
                    seen.push(first);
                    seen.extend(self.receiver.try_iter().take(TOGETHER - 1));
                    break;
                }
                Err(RecvTimeoutError::Timeout) if Instant::now() < end => {}
                Err(_) => break,
            }
        }
        (seen, self.watcher.missed.swap(0, Relaxed))
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        self.tap.change(|watchers| watchers.retain(|other| !Arc::ptr_eq(other, &self.watcher)));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_millis(1);

    fn packet(destination: u8) -> Vec<u8> {
        let mut packet = vec![0; 40];
        packet[0] = 0x45;
        packet[3] = 40;
        packet[12..16].copy_from_slice(&[10, 244, 1, 2]);
        packet[16..20].copy_from_slice(&[10, 244, destination, 2]);
        packet
    }

    fn inner(bytes: &[u8]) -> Sight<'_> {
        Sight { lane: Some(1), outer: None, bytes: Bytes::Inner(bytes), packets: 1 }
    }

    fn watch(kind: CaptureKind, nets: &[&str]) -> CaptureRequest {
        CaptureRequest {
            kind,
            nets: nets.iter().map(|net| net.parse().unwrap()).collect(),
            snap: 24,
        }
    }

    #[test]
    fn only_what_is_looked_for_is_told() {
        let tap = Arc::new(Tap::default());
        assert!(!tap.wants_drops() && !tap.wants_packets());
        let mut drops = tap.watch(watch(CaptureKind::Drops, &[])).unwrap();
        assert!(tap.wants_drops() && !tap.wants_packets());
        let mut packets = tap.watch(watch(CaptureKind::Packets, &["10.244.2.0/24"])).unwrap();
        tap.dropped(DropReason::NoRoute, inner(&packet(9)));
        tap.passed(Direction::Egress, 1, &packet(2));
        tap.passed(Direction::Egress, 1, &packet(3));
        let (seen, missed) = drops.next(PATIENCE);
        assert_eq!((seen.len(), missed), (1, 0));
        assert_eq!(seen[0].reason.as_deref(), Some("no_route"));
        assert_eq!((seen[0].length, seen[0].bytes.len()), (40, 24));
        let (seen, _) = packets.next(PATIENCE);
        assert_eq!(seen.len(), 1);
        assert_eq!(seen[0].bytes[16..20], [10, 244, 2, 2]);
        drop((drops, packets));
        assert!(!tap.wants_drops() && !tap.wants_packets());
    }

    #[test]
    fn what_is_too_much_is_counted() {
        let tap = Arc::new(Tap::default());
        let mut drops = tap.watch(watch(CaptureKind::Drops, &[])).unwrap();
        let mut packets = tap.watch(watch(CaptureKind::Packets, &[])).unwrap();
        for _ in 0..QUEUE + 10 {
            tap.dropped(DropReason::NoRoute, inner(&packet(2)));
            tap.passed(Direction::Ingress, 0, &packet(2));
        }
        let told = DROPS_TOLD as usize;
        let (seen, missed) = drops.next(PATIENCE);
        assert_eq!((seen.len(), missed as usize), (told, QUEUE + 10 - told));
        assert_eq!(packets.next(PATIENCE).1, 10);
        std::thread::sleep(REFILL);
        assert!(drops.next(PATIENCE).0.is_empty());
        tap.dropped(DropReason::NoRoute, inner(&packet(2)));
        assert_eq!(drops.next(PATIENCE).0.len(), 1, "it may tell again");
    }

    #[test]
    fn few_may_watch_at_once() {
        let tap = Arc::new(Tap::default());
        let begin = || tap.watch(watch(CaptureKind::Drops, &[]));
        let mut all: Vec<_> = (0..WATCHERS).map(|_| begin().unwrap()).collect();
        assert!(begin().is_none());
        all.pop();
        assert!(begin().is_some());
    }
}
