//! State that outlives the engine: stored sessions, and the timestamps of handshakes.

use std::collections::BTreeSet;
use std::time::Duration;

use super::{Engine, remember};
use crate::keys::PublicKey;
use crate::time::Time;
use crate::tunnel::message::Timestamp;
use crate::tunnel::peer::PeerKey;
use crate::tunnel::saved::{SavedSession, SessionSlot, SessionStore};
use crate::tunnel::timers::SESSION_LIFETIME;

impl Engine {
    /// Sets the store in which all new sessions are kept. Later initiations carry later timestamps
    /// than those that the store knows.
    pub fn set_session_store(&mut self, store: Box<dyn SessionStore>) {
        self.shared.raise_timestamps(store.latest_timestamp());
        self.shared.store = store;
    }

    /// Makes all later initiations carry timestamps after `floor` (wall clock, since 1970). A node
    /// whose clock was set back needs this, because its peers refuse earlier timestamps.
    pub fn raise_timestamps(&mut self, floor: Duration) {
        self.shared.raise_timestamps(floor);
    }

    /// Makes the engine refuse initiations by a peer's key whose timestamp (since 1970) is
    /// `timestamp` or earlier. A later timestamp that this engine or its store knows stays in
    /// effect. The timestamp of a key without a peer takes effect when [`Engine::upsert_peer`]
    /// gives the key to a peer; up to 65,536 such keys are remembered.
    pub fn raise_seen_timestamp(&mut self, key: &PublicKey, timestamp: Duration) {
        let timestamp = Timestamp::new(timestamp);
        let peer = self.by_key.get(key).and_then(|id| self.peers.get_mut(id));
        let Some(known) = peer.and_then(|peer| peer.key(key)) else {
            return remember(&mut self.unclaimed, key, timestamp);
        };
        if timestamp > known.last_timestamp {
            known.last_timestamp = timestamp;
            self.shared.store.set_seen_timestamp(key, timestamp.wall());
        }
    }

    /// Returns the latest timestamp (since 1970) of an accepted initiation for each peer's key that
    /// has one. The next engine needs them ([`Engine::raise_seen_timestamp`]).
    pub fn seen_timestamps(&self) -> impl Iterator<Item = (PublicKey, Duration)> {
        let keys = self.peers.values().flat_map(|peer| &peer.keys);
        let seen = |key: &PeerKey| (key.public, key.last_timestamp.wall());
        keys.map(seen).filter(|(_, timestamp)| !timestamp.is_zero())
    }

    /// Restores sessions of an earlier process and returns how many were restored.
    ///
    /// Call it after [`Engine::upsert_peer`] for every peer. A session is skipped if it is 180 s
    /// old, if no peer has its key, if its index is in use, or if its parameters are invalid.
    /// Nothing may have been sealed in its epoch ([`SavedSession::epoch`]), and no other process
    /// may use it.
    pub fn restore_sessions(
        &mut self,
        now: Time,
        saved: impl IntoIterator<Item = (SavedSession, Box<dyn SessionSlot>)>,
    ) -> usize {
        let mut taken = 0;
        let mut peers = BTreeSet::new();
        let by_key = &self.by_key;
        self.shared.store.retain_seen_timestamps(&|key| by_key.contains_key(key));
        for (session, slot) in saved {
            let age = now.mono.checked_sub(session.established);
            let Some(age) = age.filter(|age| *age < SESSION_LIFETIME) else { continue };
            let Some(&id) = self.by_key.get(&session.public_key) else { continue };
            let Some(peer) = self.peers.get_mut(&id) else { continue };
            let established =
                Time { mono: session.established, wall: now.wall.saturating_sub(age) };
            if peer.restore(session, slot, established, &mut self.shared) {
                taken += 1;
                peers.insert(id);
            }
        }
        for id in peers {
            let Some(peer) = self.peers.get_mut(&id) else { continue };
            peer.choose_current(now, &mut self.shared);
            if let Some(deadline) = peer.deadline() {
                self.shared.arm(deadline);
            }
        }
        self.arm_tick(now);
        taken
    }
}
