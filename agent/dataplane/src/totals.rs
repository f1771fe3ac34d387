//! Traffic of each peer over all of its sessions, including sessions that have ended.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use skein_core::route::PeerId;
use skein_core::tunnel::{PeerView, Session};

/// Inner packets and bytes of one peer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct PeerTotals {
    /// Packets sent to the peer.
    pub(super) tx_packets: u64,
    /// Bytes of the sent packets.
    pub(super) tx_bytes: u64,
    /// Packets received from the peer.
    pub(super) rx_packets: u64,
    /// Bytes of the received packets.
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

/// Traffic of all peers.
#[derive(Default)]
pub(super) struct TrafficTotals(HashMap<PeerId, PeerSessions>);

#[derive(Default)]
struct PeerSessions {
    ended: PeerTotals,
    active: Vec<Arc<Session>>,
}

impl TrafficTotals {
    /// Updates the active sessions; adds the traffic of sessions that have ended to the totals.
    pub(super) fn update<'a>(&mut self, peers: impl Iterator<Item = (PeerId, &'a PeerView)>) {
        let mut before = std::mem::take(&mut self.0);
        for (id, view) in peers {
            let mut sessions = before.remove(&id).unwrap_or_default();
            let ended = &mut sessions.ended;
            for session in &sessions.active {
                if !view.receive.iter().any(|active| Arc::ptr_eq(active, session)) {
                    ended.add(session);
                }
            }
            sessions.active.clone_from(&view.receive);
            self.0.insert(id, sessions);
        }
    }

    /// Returns the traffic of a peer.
    pub(super) fn of(&self, peer: PeerId) -> PeerTotals {
        let Some(sessions) = self.0.get(&peer) else { return PeerTotals::default() };
        let mut totals = sessions.ended;
        for session in &sessions.active {
            totals.add(session);
        }
        totals
    }
}
