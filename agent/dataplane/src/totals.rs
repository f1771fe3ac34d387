//! What each peer has sent and received over all of its sessions, also those that have ended.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use skein_core::route::PeerId;
use skein_core::tunnel::{PeerView, Session};

/// Inner packets and bytes of one peer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct PeerTotals {
    /// Packets to it.
    pub(super) tx_packets: u64,
    /// Bytes of these.
    pub(super) tx_bytes: u64,
    /// Packets from it.
    pub(super) rx_packets: u64,
    /// Bytes of these.
    pub(super) rx_bytes: u64,
}

impl PeerTotals {
    fn add(&mut self, session: &Session) {
        let traffic = session.traffic();
        self.tx_packets += traffic.tx_packets.load(Relaxed);
        self.tx_bytes += traffic.tx_bytes.load(Relaxed);
        self.rx_packets += traffic.rx_packets.load(Relaxed);
        self.rx_bytes += traffic.rx_bytes.load(Relaxed);
    }
}

/// See the module.
#[derive(Default)]
pub(super) struct Totals(HashMap<PeerId, Kept>);

#[derive(Default)]
struct Kept {
    ended: PeerTotals,
    alive: Vec<Arc<Session>>,
}

impl Totals {
    /// Takes note of the sessions that are alive; those that no longer are add to what has ended.
    pub(super) fn follow<'a>(&mut self, peers: impl Iterator<Item = (PeerId, &'a PeerView)>) {
        let mut before = std::mem::take(&mut self.0);
        for (id, view) in peers {
            let mut kept = before.remove(&id).unwrap_or_default();
            let ended = &mut kept.ended;
            for session in &kept.alive {
                if !view.receive.iter().any(|alive| Arc::ptr_eq(alive, session)) {
                    ended.add(session);
                }
            }
            kept.alive.clone_from(&view.receive);
            self.0.insert(id, kept);
        }
    }

    /// All that went to and came from a peer.
    pub(super) fn of(&self, peer: PeerId) -> PeerTotals {
        let Some(kept) = self.0.get(&peer) else { return PeerTotals::default() };
        let mut totals = kept.ended;
        for session in &kept.alive {
            totals.add(session);
        }
        totals
    }
}
