//! Data plane with settings: the protocol engine and its peers, the tables that the lanes use, and
//! the running lanes.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use skein_core::address;
use skein_core::route::{PeerId, RouteTable};
use skein_core::time::Time;
use skein_core::tunnel::{Engine, EngineConfig, EngineError, PeerConfig};
use skein_core::wire::header::OVERHEAD;
use skein_ipc::keys::{PrivateKey, PublicKey};
use skein_ipc::{NodeIdentity, NodeSettings, Peer, SeenHandshakes, Snapshot, Update};
use skein_sys::send::TooLong;
use skein_sys::udp::LongestPayload;

use super::error::SetupError;
use super::memory::{MemfdStore, RestoredSession};
use super::queue::ToManager;
use super::setup::Running;
use super::stats::DropStats;
use super::tables::{PeerEntry, Tables, TablesHandle};
use super::tap::{Bytes, PacketRef, Tap};
use super::totals::TrafficTotals;

/// A configured data plane. The manager's thread owns it, passes messages to [`Active::handle`] and
/// calls [`Active::drive`] after each batch of them.
pub(super) struct Active {
    pub(super) snapshot: Snapshot,
    pub(super) engine: Engine,
    /// Peers of the engine with their settings, by primary public key.
    pub(super) peers: HashMap<PublicKey, (PeerId, Peer)>,
    routes: Arc<RouteTable>,
    published: Arc<TablesHandle>,
    /// True while a lane may still use tables that were replaced.
    pub(super) has_retired_tables: bool,
    /// Session store that outlives this process; `None` without a keeper, or if the kernel refused
    /// the memfd.
    pub(super) store: Option<MemfdStore>,
    pub(super) running: Running,
    pub(super) drops: DropStats,
    pub(super) totals: TrafficTotals,
    /// Peers whose path MTU is below this node's MTU, each with its longest plaintext in bytes.
    reduced_paths: Vec<(PeerId, u16)>,
    /// True if `reduced_paths` has changed since waiting connections were notified.
    pub(super) reduced_paths_changed: bool,
}

/// Extent of a change that the keeper must receive.
///
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum KeeperUpdate {
    Snapshot,
    All,
}

impl Active {
    /// Creates the engine, restores `sessions` of an earlier process and starts the lanes. `open`
    /// opens the descriptors.
    ///
    /// # Errors
    /// [`SetupError`] if the descriptors cannot be opened, the engine rejects the settings, or the
    /// prefixes of two peers overlap.
    pub(super) fn start(
        now: Time,
        snapshot: Snapshot,
        store: Option<MemfdStore>,
        sessions: Vec<RestoredSession>,
        open: impl FnOnce(&NodeSettings, &Arc<TablesHandle>) -> Result<Running, SetupError>,
    ) -> Result<Self, SetupError> {
        let node = &snapshot.node;
        let published = Arc::new(TablesHandle::default());
        let running = open(node, &published)?;
        let config = EngineConfig {
            private_key: skein_core::PrivateKey::new(node.private_key.as_bytes()),
            cluster_id: node.cluster_id.clone(),
            lanes: node.lanes,
            ciphers: super::setup::ciphers(node.cipher),
            mtu: node.tun.mtu,
            ecn: running.has_ecn(),
            listen_port: node.underlay.port,
        };
        let mut engine = Engine::new(config, Box::new(random)).map_err(invalid)?;
        set_identity(&mut engine, node)?;
        engine.raise_timestamps(Duration::from_secs(snapshot.not_before));
        if let Some(store) = &store {
            engine.set_session_store(Box::new(store.clone()));
        }
        let mut empty = snapshot.clone();
        empty.peers.clear();
        // From now on the engine and its session store hold these timestamps.
        empty.seen_handshakes.clear();
        let mut active = Self {
            snapshot: empty,
            engine,
            peers: HashMap::new(),
            routes: Arc::default(),
            published,
            has_retired_tables: false,
            store,
            running,
            drops: DropStats::default(),
            totals: TrafficTotals::default(),
            reduced_paths: Vec::new(),
            reduced_paths_changed: false,
        };
        active.set_peers(now, snapshot.peers)?;
        active.raise_seen_timestamps(&snapshot.seen_handshakes);
        active.engine.restore_sessions(now, sessions);
        active.publish();
        active.running.start_lanes()?;
        Ok(active)
    }

    /// Returns the active settings with all peers.
    pub(super) fn snapshot(&self) -> Snapshot {
        let peers = self.peers.values().map(|(_, peer)| peer.clone()).collect();
        Snapshot { peers, ..self.snapshot.clone() }
    }

    pub(super) fn identity(&self) -> NodeIdentity {
        let public_key = PublicKey(self.engine.public_key().to_bytes());
        NodeIdentity { name: self.snapshot.node.name.clone(), public_key }
    }

    /// Applies `snapshot` and changes only what differs. Returns what the keeper must receive.
    ///
    /// # Errors
    /// [`SetupError::Fixed`] if `snapshot` changes a setting that only a restart can change.
    /// [`SetupError::Invalid`] if prefixes or keys of peers conflict. A TUN error if the lanes
    /// cannot be attached to a new device. The settings that failed keep their previous values.
    pub(super) fn apply(
        &mut self,
        now: Time,
        snapshot: Snapshot,
    ) -> Result<KeeperUpdate, SetupError> {
        let mut node = snapshot.node.clone();
        node.tun = self.snapshot.node.tun.clone();
        node.private_key = self.snapshot.node.private_key.clone();
        node.second_private_key = self.snapshot.node.second_private_key.clone();
        if node != self.snapshot.node {
            return Err(SetupError::Fixed);
        }
        set_identity(&mut self.engine, &snapshot.node)?;
        self.snapshot.node.private_key = snapshot.node.private_key;
        self.snapshot.node.second_private_key = snapshot.node.second_private_key;
        let mut update = KeeperUpdate::Snapshot;
        self.engine.raise_timestamps(Duration::from_secs(snapshot.not_before));
        self.snapshot.not_before = snapshot.not_before;
        let before = std::mem::replace(&mut self.snapshot.local_cidrs, snapshot.local_cidrs);
        if let Err(error) = self.set_peers(now, snapshot.peers) {
            self.snapshot.local_cidrs = before;
            return Err(error);
        }
        self.raise_seen_timestamps(&snapshot.seen_handshakes);
        let before = std::mem::replace(&mut self.snapshot.node.tun, snapshot.node.tun);
        if before.ifindex != self.snapshot.node.tun.ifindex {
            if let Err(error) = self.running.attach_tun(&self.snapshot.node) {
                self.snapshot.node.tun = before;
                return Err(error);
            }
            update = KeeperUpdate::All;
        }
        if before != self.snapshot.node.tun {
            self.engine.set_mtu(now, self.snapshot.node.tun.mtu);
            self.publish();
        }
        self.snapshot.revision = snapshot.revision;
        Ok(update)
    }

    fn raise_seen_timestamps(&mut self, seen: &SeenHandshakes) {
        for (key, nanos) in seen {
            self.engine.raise_seen_timestamp(&key.0.into(), Duration::from_nanos(*nanos));
        }
    }

    pub(super) fn seen_handshakes(&self) -> SeenHandshakes {
        let nanos = |at: Duration| u64::try_from(at.as_nanos()).unwrap_or(u64::MAX);
        self.engine
            .seen_timestamps()
            .map(|(key, at)| (PublicKey(key.to_bytes()), nanos(at)))
            .collect()
    }

    pub(super) fn update(&mut self, now: Time, update: Update) -> Result<(), SetupError> {
        let changed: HashSet<PublicKey> =
            update.upsert.iter().map(|peer| peer.public_key).chain(update.remove).collect();
        let unchanged = self.peers.values().map(|(_, peer)| peer);
        let peers = unchanged.filter(|peer| !changed.contains(&peer.public_key)).cloned();
        let peers = peers.chain(update.upsert).collect();
        self.set_peers(now, peers)?;
        self.snapshot.revision = update.revision;
        Ok(())
    }

    /// Replaces the set of peers.
    ///
    /// # Errors
    /// [`SetupError::Invalid`] if prefixes overlap or two nodes have the same key; no peer is
    /// changed then.
    fn set_peers(&mut self, now: Time, peers: Vec<Peer>) -> Result<(), SetupError> {
        // Build the routes with provisional peer numbers first, so that an error changes nothing.
        let numbered = (0..).map(PeerId).zip(peers.iter().map(|p| p.pod_cidrs.as_slice()));
        RouteTable::build(&self.snapshot.local_cidrs, numbered).map_err(|conflict| {
            SetupError::Invalid(format!("conflicting pod CIDRs: {conflict}"))
        })?;
        let keys = || peers.iter().flat_map(|peer| [Some(peer.public_key), peer.second_public_key]);
        if keys().flatten().collect::<HashSet<_>>().len() != keys().flatten().count() {
            return Err(SetupError::Invalid("two nodes have the same public key".to_owned()));
        }
        let engine = &mut self.engine;
        let before = std::mem::take(&mut self.peers);
        for peer in peers {
            if let Some((id, known)) = before.get(&peer.public_key)
                && *known == peer
            {
                self.peers.insert(peer.public_key, (*id, peer));
                continue;
            }
            // Earlier releases accepted and stored multicast addresses.
            let usable = |e: &SocketAddr| address::is_endpoint(*e) && self.running.can_reach(*e);
            let endpoints = peer.endpoints.iter().copied().filter(usable).collect();
            let config = PeerConfig {
                public_key: peer.public_key.0.into(),
                second_key: peer.second_public_key.map(|key| key.0.into()),
                endpoints,
            };
            let id = engine.upsert_peer(now, config);
            self.peers.insert(peer.public_key, (id, peer));
        }
        let wanted: HashSet<PeerId> = self.peers.values().map(|(id, _)| *id).collect();
        for (id, _) in before.into_values().filter(|(id, _)| !wanted.contains(id)) {
            engine.remove_peer(id);
        }
        let owners = self.peers.values().map(|(id, peer)| (*id, peer.pod_cidrs.as_slice()));
        let routes = RouteTable::build(&self.snapshot.local_cidrs, owners)
            .map_err(|conflict| SetupError::Invalid(conflict.to_string()))?;
        self.routes = Arc::new(routes);
        engine.poll_tables_changed();
        self.publish();
        Ok(())
    }

    /// Returns whether the device to which the lanes are attached still exists (same name and
    /// index).
    pub(super) fn has_device(&self) -> bool {
        let tun = &self.snapshot.node.tun;
        let found = skein_sys::link::find(&tun.name);
        found.is_ok_and(|link| link.is_some_and(|link| link.index == tun.ifindex))
    }

    pub(super) fn handle(&mut self, now: Time, message: ToManager, tap: &Tap) {
        match message {
            ToManager::RequestSession(peer) => self.engine.request_session(now, peer),
            ToManager::UnknownSession(source) => self.engine.on_unknown_session(now, source),
            ToManager::TooLong(datagram) => self.on_too_long(now, datagram),
            ToManager::Datagram { source, mut datagram, .. } => {
                // Move earlier drops to the totals, so that the engine's counters hold only those
                // of this datagram.
                self.drops.collect(self.engine.drops());
                self.engine.handle_datagram(now, source, &mut datagram);
                for (reason, packets) in self.engine.drops().iter() {
                    let (outer, bytes) = (Some(source), Bytes::Outer(&datagram));
                    tap.dropped(reason, PacketRef { lane: None, outer, bytes, packets });
                }
            }
            ToManager::EndSessions { .. }
            | ToManager::Request { .. }
            | ToManager::TunGone { .. }
            | ToManager::HandOver { .. } => {}
        }
    }

    /// Limits datagrams to `destination` to the size that this host's route carries.
    fn on_too_long(&mut self, now: Time, TooLong { destination, len }: TooLong) {
        let plaintext = |len: usize| u16::try_from(len.saturating_sub(OVERHEAD)).ok();
        let fits = match self.running.longest_payload(destination, len) {
            // The MTU of the route has grown since the refusal.
            LongestPayload::Carries => return,
            LongestPayload::Limit(longest) => plaintext(longest),
            LongestPayload::Unknown => None,
        };
        let size = plaintext(len).unwrap_or(u16::MAX);
        // A refused probe of a larger size does not change the size in use.
        if self.engine.on_send_too_big(now, destination, size, fits) {
            tracing::info!(%destination, size, fits, "datagram longer than the route carries");
        }
    }

    /// Handles expired timers, publishes changed tables and sends the engine's datagrams.
    pub(super) fn drive(&mut self, now: Time) {
        if self.engine.poll_timeout().is_some_and(|due| due.mono <= now.mono) {
            self.engine.handle_timeout(now);
        }
        // Publish before sending, because the answer may arrive as soon as a datagram is sent, and
        // the lane that receives it needs the session.
        if self.engine.poll_tables_changed() {
            self.publish();
        }
        while let Some(transmit) = self.engine.poll_transmit() {
            let sent = self.running.send(transmit.destination, &transmit.payload);
            if let Err(datagram) = sent {
                self.on_too_long(now, datagram);
            }
        }
        // `on_too_long` may have reduced path MTUs.
        if self.engine.poll_tables_changed() {
            self.publish();
        }
        self.drops.collect(self.engine.drops());
        self.has_retired_tables = self.published.free_retired();
    }

    /// Publishes new tables for the lanes from the engine's sessions and the routes, and wakes the
    /// lanes.
    fn publish(&mut self) {
        self.totals.update(self.engine.tables());
        let mut tables = Tables {
            routes: Arc::clone(&self.routes),
            handshakes: self.engine.handshake_filter(),
            ..Tables::default()
        };
        let mtu = self.snapshot.node.tun.mtu;
        for (id, view) in self.engine.tables() {
            let receive = view.receive.iter().map(|session| (session.local_index, session));
            tables.sessions.extend(receive.map(|(index, session)| (index, Arc::clone(session))));
            let entry = PeerEntry {
                endpoint: view.endpoint,
                session: view.current.clone(),
                next: view.next.clone(),
                max_plaintext: [view.mtu, view.path_mtu]
                    .into_iter()
                    .flatten()
                    .fold(mtu, u16::min)
                    .into(),
            };
            tables.peers.insert(id, entry);
        }
        let paths = self.engine.tables().filter_map(|(id, view)| Some((id, view.path_mtu?)));
        let reduced_paths: Vec<_> = paths.collect();
        self.reduced_paths_changed |= reduced_paths != self.reduced_paths;
        self.reduced_paths = reduced_paths;
        tables.sessions.sort_unstable_by_key(|(index, _)| *index);
        self.published.publish(tables);
        self.running.wake_lanes();
    }
}

fn set_identity(engine: &mut Engine, node: &NodeSettings) -> Result<(), SetupError> {
    let key = |key: &PrivateKey| skein_core::PrivateKey::new(key.as_bytes());
    engine
        .set_identity(key(&node.private_key), node.second_private_key.as_ref().map(key))
        .map_err(invalid)
}

fn invalid(error: EngineError) -> SetupError {
    SetupError::Invalid(error.to_string())
}

pub(super) fn random(bytes: &mut [u8]) {
    // `fill` fails only if the kernel has no entropy source. A predictable key would be worse than
    // the end of the process.
    aws_lc_rs::rand::fill(bytes).expect("the system's random generator failed");
}
