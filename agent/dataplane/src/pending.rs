//! Packets that wait for a session. The first packets to a peer start a handshake and are sent when
//! it is complete, so that they are not lost. Number, size and age of the packets are bounded.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use skein_core::offload::vnet::VnetHeader;
use skein_core::route::PeerId;

/// Maximum number of pending packets for one peer.
const MAX_PACKETS: usize = 64;
/// Maximum size of pending packets for one peer, bytes.
const MAX_PEER_BYTES: usize = 128 << 10;
/// Maximum size of pending packets for all peers of a lane, bytes.
const MAX_BYTES: usize = 1 << 20;
/// Age at which a packet is dropped, because the sender has sent the data again by then.
const MAX_AGE: Duration = Duration::from_secs(5);
/// Minimum interval between two requests for the same session.
const REQUEST_INTERVAL: Duration = Duration::from_millis(500);

/// Packet as it was read from the TUN queue.
pub(super) struct PendingPacket {
    /// Segmentation of the packet (virtio_net_hdr).
    pub(super) vnet: VnetHeader,
    /// IP packet or superpacket.
    pub(super) packet: Vec<u8>,
    since: Instant,
}

/// Result of [`PendingPackets::push`].
pub(super) struct Admission {
    /// True if the packet was added.
    pub(super) accepted: bool,
    /// True if the caller must request a session with the peer.
    pub(super) request_session: bool,
}

#[derive(Default)]
struct PeerQueue {
    packets: Vec<PendingPacket>,
    /// Total length of `packets`, bytes.
    bytes: usize,
    requested_at: Option<Instant>,
}

/// Packets of a lane that wait for sessions: at most 64 packets and 128 KiB per peer, 1 MiB per
/// lane, for 5 s.
#[derive(Default)]
pub(super) struct PendingPackets {
    queues: HashMap<PeerId, PeerQueue>,
    bytes: usize,
}

impl PendingPackets {
    /// Returns whether no packet waits and no request is remembered.
    pub(super) fn is_empty(&self) -> bool {
        self.queues.is_empty()
    }

    /// Returns whether packets for `peer` wait.
    pub(super) fn has_packets(&self, peer: PeerId) -> bool {
        !self.queues.is_empty()
            && self.queues.get(&peer).is_some_and(|queue| !queue.packets.is_empty())
    }

    /// Adds a packet for `peer` if the bounds allow it.
    pub(super) fn push(
        &mut self,
        now: Instant,
        peer: PeerId,
        vnet: VnetHeader,
        packet: &[u8],
    ) -> Admission {
        let queue = self.queues.entry(peer).or_default();
        let request = queue.requested_at.is_none_or(|at| now - at >= REQUEST_INTERVAL);
        let accepted = queue.packets.len() < MAX_PACKETS
            && queue.bytes + packet.len() <= MAX_PEER_BYTES
            && self.bytes + packet.len() <= MAX_BYTES;
        if accepted {
            self.bytes += packet.len();
            queue.bytes += packet.len();
            queue.packets.push(PendingPacket { vnet, packet: packet.to_vec(), since: now });
        }
        Admission { accepted, request_session: request }
    }

    /// Records that a session with `peer` was requested at `now`.
    pub(super) fn mark_requested(&mut self, now: Instant, peer: PeerId) {
        if let Some(queue) = self.queues.get_mut(&peer) {
            queue.requested_at = Some(now);
        }
    }

    /// Removes and returns the packets of all peers that `ready` accepts, in order for each peer.
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

    /// Removes packets that are too old, and all packets of peers that `known` rejects. Returns
    /// their number.
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
            // An empty queue remembers the time of the last request.
            known
                && (!queue.packets.is_empty()
                    || queue.requested_at.is_some_and(|at| now - at < MAX_AGE))
        });
        expired
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn push(pending: &mut PendingPackets, now: Instant, peer: u32, length: usize) -> (bool, bool) {
        let peer = PeerId(peer);
        let packet = vec![0; length];
        let Admission { accepted, request_session } =
            pending.push(now, peer, VnetHeader::default(), &packet);
        if request_session {
            pending.mark_requested(now, peer);
        }
        (accepted, request_session)
    }

    #[test]
    fn pending_packets_are_bounded_and_request_once_per_interval() {
        let (mut pending, now) = (PendingPackets::default(), Instant::now());
        assert_eq!(push(&mut pending, now, 1, 100), (true, true));
        assert_eq!(push(&mut pending, now, 1, 100), (true, false));
        assert_eq!(push(&mut pending, now + REQUEST_INTERVAL, 1, 100), (true, true));
        for _ in 3..MAX_PACKETS {
            assert!(push(&mut pending, now, 1, 100).0);
        }
        assert!(!push(&mut pending, now, 1, 100).0, "A packet beyond the limit must be refused.");
        assert_eq!(pending.drain_ready(|peer| peer == PeerId(1)).len(), MAX_PACKETS);
        assert!(push(&mut pending, now, 1, 100).0, "Drained packets must free their room.");
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
    fn old_packets_and_those_of_unknown_peers_expire() {
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
