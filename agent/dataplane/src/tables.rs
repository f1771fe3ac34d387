//! What the lanes look at: routes and sessions, immutable, replaced as a whole and adopted by each
//! lane between two batches.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use skein_core::route::{PeerId, RouteTable};
use skein_core::tunnel::session::Session;

/// One state of the routes and sessions.
#[derive(Default)]
pub(super) struct Tables {
    /// Who owns which address.
    pub(super) routes: Arc<RouteTable>,
    /// How to reach each node.
    pub(super) peers: HashMap<PeerId, PeerEntry>,
    /// Every session that may be received with, by its receiver index, in ascending order: a lane
    /// finds what is new by walking two of these side by side, without touching a session.
    pub(super) sessions: Vec<(u32, Arc<Session>)>,
}

impl Tables {
    /// Returns true if packets can be sent to `peer` at `now` (time since boot).
    pub(super) fn is_ready(&self, peer: PeerId, now: Duration) -> bool {
        self.peers.get(&peer).is_some_and(|entry| entry.ready(now).is_some())
    }
}

/// How to reach one node.
#[derive(Clone)]
pub(super) struct PeerEntry {
    /// Where it listens; `None` while no endpoint of a family that this node has is known.
    pub(super) endpoint: Option<SocketAddr>,
    /// The session to send with.
    pub(super) session: Option<Arc<Session>>,
    /// The session to send with once the other end has shown that it has it, and where to.
    pub(super) next: Option<(Arc<Session>, Option<SocketAddr>)>,
    /// The longest plaintext of a datagram to it in bytes: the lesser of both nodes' inner MTUs.
    pub(super) max_plaintext: usize,
}

impl PeerEntry {
    /// Returns the session and the address to send to at `now` (time since boot); `None` if no
    /// session can be used.
    pub(super) fn ready(&self, now: Duration) -> Option<(&Arc<Session>, SocketAddr)> {
        let next = self.next.as_ref().filter(|(next, _)| next.is_confirmed());
        let (session, endpoint) = match next {
            Some((session, endpoint)) => (session, *endpoint),
            None => (self.session.as_ref()?, self.endpoint),
        };
        (!session.is_expired_at(now)).then_some((session, endpoint?))
    }
}

/// The tables in force.
#[derive(Default)]
pub(super) struct TablesHandle {
    /// Grows with each publication, after the tables are in place.
    version: AtomicU64,
    tables: ArcSwap<Tables>,
    /// Tables that lanes may still look at: the last to let go frees thousands of entries, and that is
    /// not to be a lane.
    retired: Mutex<Vec<Arc<Tables>>>,
}

impl TablesHandle {
    /// Puts `tables` in force: a lane that is asked to look at anything afterwards sees them.
    pub(super) fn publish(&self, tables: Tables) {
        let before = self.tables.swap(Arc::new(tables));
        self.version.fetch_add(1, Ordering::Release);
        self.retired.lock().unwrap_or_else(PoisonError::into_inner).push(before);
    }

    /// Frees the tables that no lane looks at any more, and with them the keys of sessions that have
    /// ended. Returns whether some are looked at still.
    pub(super) fn free_retired(&self) -> bool {
        let mut retired = self.retired.lock().unwrap_or_else(PoisonError::into_inner);
        retired.retain(|tables| Arc::strong_count(tables) > 1);
        !retired.is_empty()
    }

    /// The number of the tables in force.
    pub(super) fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// The tables in force.
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
    fn session_past_its_life_is_not_sent_with() {
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
        let next = PeerEntry { session: None, next: Some((session, endpoint)), ..current.clone() };
        for entry in [current, next] {
            assert!(entry.ready(at(279)).is_some());
            assert!(entry.ready(at(280)).is_none());
            assert!(entry.ready(at(305)).is_none());
        }
    }

    #[test]
    fn old_tables_go_as_soon_as_nobody_looks_at_them() {
        let published = TablesHandle::default();
        let lane = published.load();
        let held = Arc::downgrade(&lane);
        published.publish(Tables::default());
        assert!(published.free_retired(), "a lane looks at them");
        drop(lane);
        assert!(held.upgrade().is_some(), "it is not the lane that frees them");
        assert!(!published.free_retired());
        assert!(held.upgrade().is_none());
    }
}
