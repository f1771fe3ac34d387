//! Packets that wait for a session: the first packets to a node start a handshake and leave when it
//! is done, so that nobody's first ping is lost. Few, bounded in number, bytes and age.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use skein_core::offload::vnet::VnetHeader;
use skein_core::route::PeerId;

/// Packets accepted for one peer.
const MAX_PACKETS: usize = 64;
/// Bytes accepted for one peer.
const MAX_PEER_BYTES: usize = 128 << 10;
/// Bytes accepted for all peers of a lane.
const MAX_BYTES: usize = 1 << 20;
/// What waited longer is of no use to its sender any more.
const MAX_AGE: Duration = Duration::from_secs(5);
/// How often the manager is requested for the same session.
const REQUEST_INTERVAL: Duration = Duration::from_millis(500);

/// A packet as it was read from the TUN.
pub(super) struct PendingPacket {
    /// Its virtio_net_hdr.
    pub(super) vnet: VnetHeader,
    /// The (super)packet.
    pub(super) packet: Vec<u8>,
    since: Instant,
}

#[derive(Default)]
struct PeerQueue {
    packets: Vec<PendingPacket>,
    /// Length of `packets` in bytes.
    bytes: usize,
    requested: Option<Instant>,
}

/// See the module.
#[derive(Default)]
pub(super) struct PendingPackets {
    queues: HashMap<PeerId, PeerQueue>,
    bytes: usize,
}

impl PendingPackets {
    /// Whether nothing waits.
    pub(super) fn is_empty(&self) -> bool {
        self.queues.is_empty()
    }

    /// Whether packets for `peer` wait.
    pub(super) fn has_packets(&self, peer: PeerId) -> bool {
        !self.queues.is_empty()
            && self.queues.get(&peer).is_some_and(|queue| !queue.packets.is_empty())
    }

    /// Holds a packet for `peer`. Returns whether it was taken, and whether the manager is to be
    /// requested for a session.
    pub(super) fn push(
        &mut self,
        now: Instant,
        peer: PeerId,
        vnet: VnetHeader,
        packet: &[u8],
    ) -> (bool, bool) {
        let queue = self.queues.entry(peer).or_default();
        let request = queue.requested.is_none_or(|requested| now - requested >= REQUEST_INTERVAL);
        let room = queue.packets.len() < MAX_PACKETS
            && queue.bytes + packet.len() <= MAX_PEER_BYTES
            && self.bytes + packet.len() <= MAX_BYTES;
        if room {
            self.bytes += packet.len();
            queue.bytes += packet.len();
            queue.packets.push(PendingPacket { vnet, packet: packet.to_vec(), since: now });
        }
        (room, request)
    }

    /// Notes that the manager was requested for a session with `peer`.
    pub(super) fn requested(&mut self, now: Instant, peer: PeerId) {
        if let Some(queue) = self.queues.get_mut(&peer) {
            queue.requested = Some(now);
        }
    }

    /// Takes everything that waits for a peer that `ready` accepts.
    pub(super) fn drain_ready(&mut self, ready: impl Fn(PeerId) -> bool) -> Vec<PendingPacket> {
        let mut taken = Vec::new();
        self.queues.retain(|&peer, queue| {
            if ready(peer) {
                taken.append(&mut queue.packets);
                return false;
            }
            true
        });
        self.bytes -= taken.iter().map(|pending| pending.packet.len()).sum::<usize>();
        taken
    }

    /// Gives up what is too old, and all that waits for peers that `known` refuses; returns the
    /// number of packets.
    pub(super) fn expire(&mut self, now: Instant, known: impl Fn(PeerId) -> bool) -> usize {
        let mut expired = 0;
        let bytes = &mut self.bytes;
        self.queues.retain(|&peer, queue| {
            let known = known(peer);
            queue.packets.retain(|pending| {
                let keep = known && now - pending.since < MAX_AGE;
                if !keep {
                    expired += 1;
                    *bytes -= pending.packet.len();
                    queue.bytes -= pending.packet.len();
                }
                keep
            });
            // An empty queue still remembers when the manager was requested.
            known
                && (!queue.packets.is_empty() || queue.requested.is_some_and(|a| now - a < MAX_AGE))
        });
        expired
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn push(pending: &mut PendingPackets, now: Instant, peer: u32, length: usize) -> (bool, bool) {
        let peer = PeerId(peer);
        let (accepted, request) = pending.push(now, peer, VnetHeader::default(), &vec![0; length]);
        if request {
            pending.requested(now, peer);
        }
        (accepted, request)
    }

    #[test]
    fn asks_once_an_interval_and_bounds_what_it_holds() {
        let (mut pending, now) = (PendingPackets::default(), Instant::now());
        assert_eq!(push(&mut pending, now, 1, 100), (true, true));
        assert_eq!(push(&mut pending, now, 1, 100), (true, false));
        assert_eq!(push(&mut pending, now + REQUEST_INTERVAL, 1, 100), (true, true));
        for _ in 3..MAX_PACKETS {
            assert!(push(&mut pending, now, 1, 100).0);
        }
        assert!(!push(&mut pending, now, 1, 100).0, "one more than it may push");
        assert_eq!(pending.drain_ready(|peer| peer == PeerId(1)).len(), MAX_PACKETS);
        assert!(push(&mut pending, now, 1, 100).0, "the room is free again");
    }

    #[test]
    fn peer_fills_its_own_share_only() {
        let (mut pending, now) = (PendingPackets::default(), Instant::now());
        for _ in 0..MAX_PACKETS {
            push(&mut pending, now, 0, 64 << 10);
        }
        assert_eq!(pending.bytes, MAX_PEER_BYTES);
        assert!(push(&mut pending, now, 1, 64 << 10).0, "Another peer has its own share.");
        for peer in 1..20 {
            push(&mut pending, now, peer, MAX_PEER_BYTES);
        }
        assert_eq!(pending.bytes, MAX_BYTES - (64 << 10), "The lane's sum is bounded.");
        pending.expire(now + MAX_AGE, |_| true);
        assert!(push(&mut pending, now + MAX_AGE, 0, MAX_PEER_BYTES).0, "The share is free again.");
    }

    #[test]
    fn gives_up_what_is_old_and_what_nobody_owns() {
        let (mut pending, now) = (PendingPackets::default(), Instant::now());
        push(&mut pending, now, 1, 10);
        push(&mut pending, now + Duration::from_secs(3), 1, 10);
        push(&mut pending, now + Duration::from_secs(3), 2, 10);
        assert_eq!(pending.expire(now + MAX_AGE, |peer| peer == PeerId(1)), 2);
        assert_eq!(pending.drain_ready(|_| true).len(), 1);
        assert_eq!(pending.bytes, 0);
        assert!(pending.is_empty());
    }
}
