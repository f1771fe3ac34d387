//! A session with its replay window and the values that the engine samples from it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::keys::PublicKey;
use crate::tunnel::replay::ReplayWindow;
use crate::tunnel::session::Session;
use crate::tunnel::shared::Shared;
use crate::tunnel::timers::SESSION_LIFETIME;
use crate::wire::header::CONTROL_LANE;

/// A session with its state in the engine.
pub(crate) struct SessionEntry {
    pub(crate) session: Arc<Session>,
    /// Address that the handshake of this session proved, if the peer's record names it.
    pub(crate) endpoint: Option<SocketAddr>,
    /// Public key of the peer in the handshake.
    pub(super) remote: PublicKey,
    /// Public key of this node in the handshake; `None` for a restored session.
    pub(super) own: Option<PublicKey>,
    /// MTU of this node that the handshake carried, inner bytes.
    pub(super) told_mtu: u16,
    pub(super) window: ReplayWindow,
    /// Value of the sent packets' counter at the last tick.
    seen_tx: u64,
    /// Value of the received packets' counter at the last tick.
    seen_rx: u64,
}

impl SessionEntry {
    pub(crate) fn new(
        session: Session,
        endpoint: Option<SocketAddr>,
        remote: PublicKey,
        own: Option<PublicKey>,
        told_mtu: u16,
    ) -> Self {
        let window = ReplayWindow::after(session.next_counter(CONTROL_LANE));
        let session = Arc::new(session);
        Self { session, endpoint, remote, own, told_mtu, window, seen_tx: 0, seen_rx: 0 }
    }

    /// Returns the time at which the session ends (monotonic clock).
    pub(super) fn ends(&self) -> Duration {
        self.session.established.mono + SESSION_LIFETIME
    }

    /// Returns whether lanes have sent and received since the last call.
    pub(super) fn sample(&mut self) -> (bool, bool) {
        let traffic = self.session.traffic();
        let tx = traffic.tx_packets.load(Ordering::Relaxed);
        let rx = traffic.rx_packets.load(Ordering::Relaxed);
        let grown = (tx != self.seen_tx, rx != self.seen_rx);
        (self.seen_tx, self.seen_rx) = (tx, rx);
        grown
    }

    /// Ends the session and frees its index.
    pub(super) fn end(self, shared: &mut Shared) {
        self.session.expire();
        shared.free_index(self.session.local_index);
        shared.changed = true;
    }
}
