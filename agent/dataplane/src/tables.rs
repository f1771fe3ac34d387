//! Tables of the lanes: routes and sessions. Tables are immutable; the manager replaces them as a
//! whole, and each lane adopts the new ones between two batches.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use skein_core::route::{PeerId, RouteTable};
use skein_core::tunnel::session::Session;
use skein_core::tunnel::{HandshakeFilter, NextSession};

/// Routes and sessions at one time.
#[derive(Default)]
pub(super) struct Tables {
    /// Owner of each address.
    pub(super) routes: Arc<RouteTable>,
    /// Endpoint and sessions of each peer.
    pub(super) peers: HashMap<PeerId, PeerEntry>,
    /// All sessions with which datagrams may be received, sorted by receiver index. A lane finds
    /// the changes by one walk over the old and the new list, without access to a session.
    pub(super) sessions: Vec<(u32, Arc<Session>)>,
    /// Filter with which lanes drop handshake messages that the session manager would refuse.
    pub(super) handshakes: HandshakeFilter,
}

impl Tables {
    /// Returns whether packets can be sent to `peer` at `now` (time since boot).
    pub(super) fn is_ready(&self, peer: PeerId, now: Duration) -> bool {
        self.peers.get(&peer).is_some_and(|entry| entry.ready(now).is_some())
    }
}

/// Endpoint and sessions of one peer.
#[derive(Clone)]
pub(super) struct PeerEntry {
    /// Endpoint of the peer; `None` while no endpoint of a usable address family is known.
    pub(super) endpoint: Option<SocketAddr>,
    /// Session for sending.
    pub(super) session: Option<Arc<Session>>,
    /// Session for sending once the peer has confirmed it.
    pub(super) next: Option<NextSession>,
    /// Longest plaintext of a datagram to the peer, bytes: the minimum of both nodes' inner MTUs
    /// and the path MTU.
    pub(super) max_plaintext: usize,
}

impl PeerEntry {
    /// Returns the session and the endpoint to send to at `now` (time since boot); `None` if no
    /// session is usable.
    pub(super) fn ready(&self, now: Duration) -> Option<(&Arc<Session>, SocketAddr)> {
        let next = self.next.as_ref().filter(|next| next.session.is_confirmed());
        let (session, endpoint) = match next {
            Some(next) => (&next.session, next.endpoint),
            None => (self.session.as_ref()?, self.endpoint),
        };
        (!session.is_expired_at(now)).then_some((session, endpoint?))
    }
}

/// Handle of the current tables. The manager publishes tables. A lane loads the tables when
/// [`TablesHandle::version`] has changed.
#[derive(Default)]
pub(super) struct TablesHandle {
    /// Number of publications. It is incremented after the tables are replaced.
    version: AtomicU64,
    tables: ArcSwap<Tables>,
    /// Replaced tables that lanes may still use. The manager frees them, because freeing thousands
    /// of entries would delay a lane.
    retired: Mutex<Vec<Arc<Tables>>>,
}

impl TablesHandle {
    /// Replaces the tables. A lane that loads the tables after this call gets `tables`.
    pub(super) fn publish(&self, tables: Tables) {
        let before = self.tables.swap(Arc::new(tables));
        self.version.fetch_add(1, Ordering::Release);
        self.retired.lock().unwrap_or_else(PoisonError::into_inner).push(before);
    }

    /// Frees replaced tables that no lane uses, and with them the keys of ended sessions. Returns
    /// whether some are still in use.
    pub(super) fn free_retired(&self) -> bool {
        let mut retired = self.retired.lock().unwrap_or_else(PoisonError::into_inner);
        retired.retain(|tables| Arc::strong_count(tables) > 1);
        !retired.is_empty()
    }

    /// Returns the version of the current tables.
    pub(super) fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// Returns the current tables.
    pub(super) fn load(&self) -> Arc<Tables> {
        self.tables.load_full()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use skein_core::time::Time;
    use skein_core::tunnel::session::SessionParams;

    use super::super::testing::session_params;
    use super::*;

    #[test]
    fn session_older_than_180_s_is_not_used_for_sending() {
        let at = Duration::from_secs;
        let established = Time { mono: at(100), wall: at(0) };
        let session = Session::new(SessionParams { established, ..session_params(1, true) });
        let session = Arc::new(session.unwrap());
        let endpoint = Some("192.0.2.1:51900".parse().unwrap());
        let current = PeerEntry {
            endpoint,
            session: Some(Arc::clone(&session)),
            next: None,
            max_plaintext: 1440,
        };
        let next = Some(NextSession { session, endpoint });
        let next = PeerEntry { session: None, next, ..current.clone() };
        for entry in [current, next] {
            assert!(entry.ready(at(279)).is_some());
            assert!(entry.ready(at(280)).is_none());
            assert!(entry.ready(at(305)).is_none());
        }
    }

    #[test]
    fn replaced_tables_are_freed_after_their_last_use() {
        let published = TablesHandle::default();
        let lane = published.load();
        let held = Arc::downgrade(&lane);
        published.publish(Tables::default());
        assert!(published.free_retired(), "Tables in use must be kept.");
        drop(lane);
        assert!(held.upgrade().is_some(), "The manager must free the tables, not the lane.");
        assert!(!published.free_retired());
        assert!(held.upgrade().is_none());
    }
}
