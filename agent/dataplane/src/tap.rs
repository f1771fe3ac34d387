//! Packet tap: copies of passing and dropped packets for `capture` and `trace --drops`.
//!
//! Without subscribers, a lane pays one relaxed load per round and one per drop. With a subscriber,
//! a packet that matches its request is copied to the subscriber's bounded queue, or counted as
//! missed if the queue is full. No lane ever waits.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use skein_core::drop::{Direction, DropReason};
use skein_core::wire::ip::IpHeader;
use skein_ipc::capture::{CaptureKind, CaptureRequest, CapturedPacket, PacketKind};

const DROPS: u8 = 1;
const PACKETS: u8 = 2;

/// Maximum number of subscribers; each holds up to [`QUEUE_LEN`] packets and a connection.
const MAX_SUBSCRIBERS: usize = 4;
/// Maximum number of packets that wait for a subscriber.
const QUEUE_LEN: usize = 1024;
/// Maximum number of packets in one message to a subscriber.
const MAX_PACKETS_PER_MESSAGE: usize = 128;
/// Maximum number of drops that a subscriber receives within [`REFILL_INTERVAL`]; further ones are
/// counted as missed. Copying a flood of drops would cost the lanes more than the drops do.
const MAX_DROPS_PER_INTERVAL: u32 = 100;
const REFILL_INTERVAL: Duration = Duration::from_millis(100);
/// Maximum number of bytes copied of a packet.
const MAX_SNAP: usize = 65_535;

/// Packet tap of a data process, shared by its lanes and the manager.
#[derive(Default)]
pub(super) struct Tap {
    wanted: AtomicU8,
    subscribers: ArcSwap<Vec<Arc<Subscriber>>>,
    /// Lock of changes to `wanted` and `subscribers`; never taken on the packet path.
    changing: Mutex<()>,
}

struct Subscriber {
    request: CaptureRequest,
    sender: SyncSender<CapturedPacket>,
    /// Drops that the subscriber may still receive in this interval.
    budget: AtomicU32,
    missed: AtomicU64,
}

/// Borrowed packet with its context.
#[derive(Clone, Copy)]
pub(super) struct PacketRef<'a> {
    /// Lane of the packet; `None` for the manager.
    pub(super) lane: Option<u8>,
    /// Address of the other node; `None` if it is not known.
    pub(super) outer: Option<SocketAddr>,
    /// Content of the packet.
    pub(super) bytes: Bytes<'a>,
    /// Number of packets: more than 1 if several packets were dropped together, for example a
    /// superpacket that the TUN device refused.
    pub(super) packets: u64,
}

/// Content of a packet.
#[derive(Clone, Copy)]
pub(super) enum Bytes<'a> {
    /// IP packet of a pod.
    Inner(&'a [u8]),
    /// Payload of a datagram between nodes.
    Outer(&'a [u8]),
}

/// Subscription to the tap; drop ends it.
pub(super) struct Subscription {
    tap: Arc<Tap>,
    subscriber: Arc<Subscriber>,
    receiver: Receiver<CapturedPacket>,
    refilled: Instant,
}

impl Tap {
    /// Returns whether a subscriber wants drops.
    #[inline]
    pub(super) fn wants_drops(&self) -> bool {
        self.wanted.load(Relaxed) & DROPS != 0
    }

    /// Returns whether a subscriber wants passing packets.
    #[inline]
    pub(super) fn wants_packets(&self) -> bool {
        self.wanted.load(Relaxed) & PACKETS != 0
    }

    /// Delivers a drop to the subscribers that want drops.
    #[inline]
    pub(super) fn dropped(&self, reason: DropReason, packet_ref: PacketRef<'_>) {
        if self.wants_drops() {
            self.deliver(&PacketKind::Dropped(reason.into()), &packet_ref);
        }
    }

    /// Delivers a passing inner packet. The caller checks [`Self::wants_packets`] first.
    #[cold]
    pub(super) fn passed(&self, direction: Direction, lane: u8, packet: &[u8]) {
        let bytes = Bytes::Inner(packet);
        let packet_ref = PacketRef { lane: Some(lane), outer: None, bytes, packets: 1 };
        self.deliver(&PacketKind::Forwarded(direction.into()), &packet_ref);
    }

    #[cold]
    fn deliver(&self, kind: &PacketKind, packet_ref: &PacketRef<'_>) {
        let wanted = match kind {
            PacketKind::Dropped(_) => CaptureKind::Drops,
            PacketKind::Forwarded(_) => CaptureKind::Packets,
        };
        for subscriber in self.subscribers.load().iter() {
            if subscriber.request.kind == wanted && subscriber.matches(packet_ref.bytes) {
                subscriber.enqueue(kind, packet_ref);
            }
        }
    }

    /// Adds a subscriber; `None` if there are [`MAX_SUBSCRIBERS`] already.
    pub(super) fn subscribe(self: &Arc<Self>, request: CaptureRequest) -> Option<Subscription> {
        let (sender, receiver) = sync_channel(QUEUE_LEN);
        let subscriber = Arc::new(Subscriber {
            request,
            sender,
            budget: AtomicU32::new(MAX_DROPS_PER_INTERVAL),
            missed: AtomicU64::new(0),
        });
        self.change(|subscribers| {
            if subscribers.len() < MAX_SUBSCRIBERS {
                subscribers.push(Arc::clone(&subscriber));
            }
        });
        let taken = self.subscribers.load().iter().any(|other| Arc::ptr_eq(other, &subscriber));
        let subscription =
            Subscription { tap: Arc::clone(self), subscriber, receiver, refilled: Instant::now() };
        taken.then_some(subscription)
    }

    fn change(&self, change: impl Fn(&mut Vec<Arc<Subscriber>>)) {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        self.subscribers.rcu(|subscribers| {
            let mut subscribers = Vec::clone(subscribers);
            change(&mut subscribers);
            subscribers
        });
        let wanted = self.subscribers.load().iter().fold(0, |wanted, subscriber| {
            wanted | if subscriber.request.kind == CaptureKind::Drops { DROPS } else { PACKETS }
        });
        self.wanted.store(wanted, Relaxed);
    }
}

impl Subscriber {
    fn matches(&self, bytes: Bytes<'_>) -> bool {
        let nets = &self.request.nets;
        if nets.is_empty() {
            return true;
        }
        let Bytes::Inner(packet) = bytes else { return false };
        IpHeader::parse(packet).is_some_and(|ip| {
            nets.iter().any(|net| net.contains(&ip.source) || net.contains(&ip.destination))
        })
    }

    fn enqueue(&self, kind: &PacketKind, packet_ref: &PacketRef<'_>) {
        let spend = |budget: u32| budget.checked_sub(1);
        let is_drop = matches!(kind, PacketKind::Dropped(_));
        if is_drop && self.budget.fetch_update(Relaxed, Relaxed, spend).is_err() {
            self.missed.fetch_add(packet_ref.packets, Relaxed);
            return;
        }
        let (inner, bytes) = match packet_ref.bytes {
            Bytes::Inner(bytes) => (true, bytes),
            Bytes::Outer(bytes) => (false, bytes),
        };
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let snap = (self.request.snap as usize).min(MAX_SNAP).min(bytes.len());
        let captured = CapturedPacket {
            time_ns: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX),
            lane: packet_ref.lane,
            kind: kind.clone(),
            outer: packet_ref.outer,
            inner,
            packets: packet_ref.packets,
            length: u32::try_from(bytes.len()).unwrap_or(u32::MAX),
            bytes: bytes[..snap].to_vec(),
        };
        if self.sender.try_send(captured).is_err() {
            self.missed.fetch_add(packet_ref.packets, Relaxed);
        }
    }
}

impl Subscription {
    /// Waits until packets were captured or `timeout` has passed. Returns the packets, and the
    /// number of packets missed since the last call.
    pub(super) fn next_batch(&mut self, timeout: Duration) -> (Vec<CapturedPacket>, u64) {
        let end = Instant::now() + timeout;
        let mut captured = Vec::new();
        loop {
            if self.refilled.elapsed() >= REFILL_INTERVAL {
                self.refilled = Instant::now();
                self.subscriber.budget.store(MAX_DROPS_PER_INTERVAL, Relaxed);
            }
            let left = end.saturating_duration_since(Instant::now()).min(REFILL_INTERVAL);
            match self.receiver.recv_timeout(left) {
                Ok(first) => {
                    captured.push(first);
                    captured.extend(self.receiver.try_iter().take(MAX_PACKETS_PER_MESSAGE - 1));
                    break;
                }
                Err(RecvTimeoutError::Timeout) if Instant::now() < end => {}
                Err(_) => break,
            }
        }
        (captured, self.subscriber.missed.swap(0, Relaxed))
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.tap.change(|subscribers| {
            subscribers.retain(|other| !Arc::ptr_eq(other, &self.subscriber))
        });
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_millis(1);

    fn packet(destination: u8) -> Vec<u8> {
        let mut packet = vec![0; 40];
        packet[0] = 0x45;
        packet[3] = 40;
        packet[12..16].copy_from_slice(&[10, 244, 1, 2]);
        packet[16..20].copy_from_slice(&[10, 244, destination, 2]);
        packet
    }

    fn inner(bytes: &[u8]) -> PacketRef<'_> {
        PacketRef { lane: Some(1), outer: None, bytes: Bytes::Inner(bytes), packets: 1 }
    }

    fn watch(kind: CaptureKind, nets: &[&str]) -> CaptureRequest {
        CaptureRequest {
            kind,
            nets: nets.iter().map(|net| net.parse().unwrap()).collect(),
            snap: 24,
        }
    }

    #[test]
    fn subscription_gets_matching_packets_only() {
        let tap = Arc::new(Tap::default());
        assert!(!tap.wants_drops() && !tap.wants_packets());
        let mut drops = tap.subscribe(watch(CaptureKind::Drops, &[])).unwrap();
        assert!(tap.wants_drops() && !tap.wants_packets());
        let mut packets = tap.subscribe(watch(CaptureKind::Packets, &["10.244.2.0/24"])).unwrap();
        tap.dropped(DropReason::NoRoute, inner(&packet(9)));
        tap.passed(Direction::Egress, 1, &packet(2));
        tap.passed(Direction::Egress, 1, &packet(3));
        let (captured, missed) = drops.next_batch(TIMEOUT);
        assert_eq!((captured.len(), missed), (1, 0));
        assert_eq!(captured[0].kind.reason(), Some("no_route"));
        assert_eq!((captured[0].length, captured[0].bytes.len()), (40, 24));
        let (captured, _) = packets.next_batch(TIMEOUT);
        assert_eq!(captured.len(), 1);
        assert_eq!(captured[0].bytes[16..20], [10, 244, 2, 2]);
        drop((drops, packets));
        assert!(!tap.wants_drops() && !tap.wants_packets());
    }

    #[test]
    fn packets_beyond_the_limits_are_counted_as_missed() {
        let tap = Arc::new(Tap::default());
        let mut drops = tap.subscribe(watch(CaptureKind::Drops, &[])).unwrap();
        let mut packets = tap.subscribe(watch(CaptureKind::Packets, &[])).unwrap();
        for _ in 0..QUEUE_LEN + 10 {
            tap.dropped(DropReason::NoRoute, inner(&packet(2)));
            tap.passed(Direction::Ingress, 0, &packet(2));
        }
        let told = MAX_DROPS_PER_INTERVAL as usize;
        let (captured, missed) = drops.next_batch(TIMEOUT);
        assert_eq!((captured.len(), missed as usize), (told, QUEUE_LEN + 10 - told));
        assert_eq!(packets.next_batch(TIMEOUT).1, 10);
        std::thread::sleep(REFILL_INTERVAL);
        assert!(drops.next_batch(TIMEOUT).0.is_empty());
        tap.dropped(DropReason::NoRoute, inner(&packet(2)));
        assert_eq!(
            drops.next_batch(TIMEOUT).0.len(),
            1,
            "The budget must be refilled after the interval."
        );
    }

    #[test]
    fn subscription_beyond_the_limit_is_refused() {
        let tap = Arc::new(Tap::default());
        let begin = || tap.subscribe(watch(CaptureKind::Drops, &[]));
        let mut all: Vec<_> = (0..MAX_SUBSCRIBERS).map(|_| begin().unwrap()).collect();
        assert!(begin().is_none());
        all.pop();
        assert!(begin().is_some());
    }
}
