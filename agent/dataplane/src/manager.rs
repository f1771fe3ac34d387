//! The session manager: one thread that owns the protocol engine. Lanes hand it handshakes and
//! control messages; it hands them new tables. The packet path never waits for it.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context;
use skein_core::address;
use skein_core::route::{PeerId, RouteTable};
use skein_core::time::Time;
use skein_core::tunnel::{Engine, EngineConfig, EngineError, PeerConfig};
use skein_core::wire::header::OVERHEAD;
use skein_ipc::keys::{PrivateKey, PublicKey};
use skein_ipc::{
    Confinement, ErrorKind, HANDOVER_VERSION, NodeIdentity, NodeSettings, Peer, Request, Response,
    SeenHandshakes, Snapshot, Update,
};
use skein_sys::send::TooLong;
use skein_sys::udp::LongestPayload;

use super::changes::Changes;
use super::channel::KeeperChannel;
use super::error::SetupError;
use super::handover::{self, Estate, HandOver, ToKeeper};
use super::memory::{Resumed, SessionMemory};
use super::queue::{self, ToManager, ToManagerQueue};
use super::report;
use super::setup::{Links, Running};
use super::stats::DropStats;
use super::tables::{PeerEntry, Published, Tables};
use super::tap::{Bytes, Sight, Tap};
use super::totals::Totals;
use super::vm_generation::{ClockWatch, Uevents};
use super::{SetLogLevel, boot_time};

/// How soon to look again whether lanes have let go of old tables.
const SWEEP: Duration = Duration::from_millis(100);
/// Interval between comparisons of the wall clock with the boot clock.
const CLOCK_INTERVAL: Duration = Duration::from_secs(1);
/// Messages dealt with before what they led to is published and sent.
const BATCH: usize = 32;

/// Starts the manager's thread, with what another process has left. It ends when [`Request::Shutdown`]
/// came or every sender is gone.
pub(super) fn start(
    keeper: Option<Arc<KeeperChannel>>,
    left: Option<(HandOver, Estate)>,
    set_log_level: SetLogLevel,
    tap: Arc<Tap>,
    changes: Arc<Changes>,
    confinement: Vec<Confinement>,
) -> std::io::Result<(ToManagerQueue, JoinHandle<()>)> {
    let (sender, receiver) = queue::new();
    // Before sessions are resumed, so that no announcement is missed after that.
    if let Err(error) = Uevents::subscribe().and_then(|uevents| uevents.watch(sender.clone())) {
        tracing::warn!(%error, "sessions do not end if this virtual machine is cloned");
    }
    let mut manager = Manager {
        started: Instant::now(),
        queue: receiver,
        links: Links { to_manager: sender.clone(), tap, keeper },
        set_log_level,
        changes,
        clock: ClockWatch::default(),
        confinement,
        active: None,
    };
    // Before the thread starts, and with it the first handshake.
    if let Some((left, estate)) = left {
        manager.inherit(left, estate);
    }
    let thread =
        std::thread::Builder::new().name("manager".to_owned()).spawn(move || manager.run())?;
    Ok((sender, thread))
}

struct Manager {
    started: Instant,
    queue: Receiver<ToManager>,
    links: Links,
    set_log_level: SetLogLevel,
    changes: Arc<Changes>,
    clock: ClockWatch,
    confinement: Vec<Confinement>,
    /// `None` before the first snapshot.
    active: Option<Active>,
}

/// A data plane at work.
struct Active {
    snapshot: Snapshot,
    engine: Engine,
    /// The names and prefixes of the engine's peers.
    peers: HashMap<PublicKey, (PeerId, Peer)>,
    routes: Arc<RouteTable>,
    published: Arc<Published>,
    /// Whether lanes may still look at tables that are no longer in force.
    unswept: bool,
    /// Where sessions outlive this process; absent where the kernel gives none.
    memory: Option<SessionMemory>,
    running: Running,
    drops: DropStats,
    totals: Totals,
    /// Longest plaintext in bytes of each peer whose path carries less than this node's MTU.
    narrow: Vec<(PeerId, u16)>,
    /// True if `narrow` has changed since the waiting connections were notified.
    narrow_changed: bool,
}

impl Manager {
    fn run(mut self) {
        // The first use of a thread's generator gathers entropy for a fifth of a second: now, rather
        // than in the first handshake.
        random(&mut [0; 32]);
        loop {
            let mut message = match self.timeout() {
                Some(timeout) => match self.queue.recv_timeout(timeout) {
                    Ok(message) => Some(message),
                    Err(RecvTimeoutError::Timeout) => None,
                    Err(RecvTimeoutError::Disconnected) => return,
                },
                None => match self.queue.recv() {
                    Ok(message) => Some(message),
                    Err(_) => return,
                },
            };
            let now = clock();
            if self.clock.has_jumped(now) {
                self.end_sessions(now, "the wall clock has jumped ahead");
            }
            // What came together leads to one publication, however many sessions it makes.
            for _ in 0..BATCH {
                let Some(taken) = message else { break };
                if self.take(now, taken).is_break() {
                    return;
                }
                message = self.queue.try_recv().ok();
            }
            if let Some(taken) = message
                && self.take(now, taken).is_break()
            {
                return;
            }
            if let Some(active) = &mut self.active {
                active.drive(now);
                if std::mem::take(&mut active.narrow_changed) {
                    self.changes.raise();
                }
            }
        }
    }

    /// Deals with one message; breaks where the process is to end.
    fn take(&mut self, now: Time, message: ToManager) -> ControlFlow<()> {
        if let ToManager::Request { request, answer } = message {
            let shutdown = matches!(request, Request::Shutdown);
            let response = self.request(now, request);
            // The asker may have gone; what it asked for is done all the same.
            let _ = answer.send(response);
            return if shutdown { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
        }
        if let ToManager::GiveAway { connection, answer } = message {
            // It works on where it cannot be given away.
            let _ = answer.send(self.give_away(&connection));
            return ControlFlow::Continue(());
        }
        if let ToManager::EndSessions { reason } = message {
            self.end_sessions(now, reason);
            return ControlFlow::Continue(());
        }
        let Some(active) = &mut self.active else { return ControlFlow::Continue(()) };
        if let ToManager::TunGone { generation } = message
            && generation == active.running.generation
            && active.has_device()
        {
            tracing::error!(
                "a queue of the TUN device failed though the device is there: ending, to begin anew"
            );
            return ControlFlow::Break(());
        }
        active.event(now, message, &self.links.tap);
        ControlFlow::Continue(())
    }

    fn timeout(&self) -> Option<Duration> {
        let active = self.active.as_ref()?;
        let due = active.engine.poll_timeout();
        let due = due.map(|due| due.mono.saturating_sub(clock().mono));
        let sweep = active.unswept.then_some(SWEEP);
        due.into_iter().chain(sweep).chain([CLOCK_INTERVAL]).min()
    }

    /// Ends all sessions: a clone of this machine may continue with the same keys and counters.
    fn end_sessions(&mut self, now: Time, reason: &str) {
        let Some(active) = &mut self.active else { return };
        tracing::warn!(reason, "ending all sessions");
        active.engine.end_sessions(now);
    }

    fn request(&mut self, now: Time, request: Request) -> Response {
        let result = match request {
            Request::Hello { version } if version == skein_ipc::PROTOCOL_VERSION => {
                let node = self.active.as_ref().map(Active::identity);
                let pid = std::process::id();
                return Response::Hello { version, pid, node, accepts_seen_handshakes: true };
            }
            Request::Hello { version } => Err(SetupError::Invalid(format!(
                "protocol version {version} is not {}: agent and data plane must be of one release",
                skein_ipc::PROTOCOL_VERSION
            ))),
            Request::Apply { snapshot } => {
                self.apply(now, *snapshot).inspect(|kept| self.keep(*kept)).map(drop)
            }
            Request::Update { update } => match &mut self.active {
                Some(active) => active.update(now, update).inspect(|()| self.keep(Kept::Snapshot)),
                None => Err(SetupError::Invalid("an update came before any snapshot".to_owned())),
            },
            Request::LogLevel { level } => {
                (self.set_log_level)(level.as_deref()).map_err(SetupError::Invalid)
            }
            // The server makes another message of it.
            Request::TakeOver { .. } => {
                let text = format!("what is handed over here has format {HANDOVER_VERSION}");
                Err(SetupError::Invalid(text))
            }
            Request::Report { peers } => {
                let report = self.report(now, peers);
                return Response::Report { report: Box::new(report) };
            }
            Request::SeenHandshakes => {
                let seen = self.active.as_ref().map(Active::seen_handshakes).unwrap_or_default();
                return Response::SeenHandshakes { seen };
            }
            // The connection's thread has it: whoever watches does not burden the manager.
            Request::Capture { .. } | Request::Changes { .. } => {
                Err(SetupError::Invalid("not the manager's".to_owned()))
            }
            Request::Shutdown => Ok(()),
        };
        match result {
            Ok(()) => Response::Applied {
                revision: self.active.as_ref().map_or(0, |active| active.snapshot.revision),
            },
            Err(error) => {
                tracing::error!(%error, "request refused");
                Response::Error { kind: error.kind(), message: error.to_string() }
            }
        }
    }

    fn apply(&mut self, now: Time, snapshot: Snapshot) -> Result<Kept, SetupError> {
        match &mut self.active {
            Some(active) => active.become_like(now, snapshot),
            None => {
                let memory = self.links.keeper.as_ref().and_then(|_| {
                    let made = SessionMemory::create();
                    made.inspect_err(
                        |error| tracing::warn!(%error, "sessions end with this process"),
                    )
                    .ok()
                });
                let open = |node: &NodeSettings, published: &_| {
                    Running::open(node, published, &self.links)
                };
                self.active = Some(Active::start(now, snapshot, memory, Vec::new(), open)?);
                Ok(Kept::All)
            }
        }
    }

    /// Goes on where the process before has left off; where that cannot be, begins anew.
    fn inherit(&mut self, left: HandOver, estate: Estate) {
        let Estate { snapshot, sessions, queues, sockets } = estate;
        let begun = Instant::now();
        let inherit = || -> anyhow::Result<Active> {
            let snapshot = handover::load(snapshot).context("the snapshot")?;
            let (memory, sessions) = SessionMemory::open(sessions).context("the sessions")?;
            let open = |node: &NodeSettings, published: &_| {
                Running::inherit(node, left, queues, sockets, published, &self.links)
            };
            Ok(Active::start(clock(), snapshot, Some(memory), sessions, open)?)
        };
        match inherit() {
            Ok(active) => {
                let sessions =
                    active.engine.tables().map(|(_, view)| view.receive.len()).sum::<usize>();
                let ms = begun.elapsed().as_secs_f64() * 1e3;
                tracing::info!(sessions, ms, "goes on with what the data process before has left");
                self.active = Some(active);
            }
            Err(error) => {
                let error = format!("{error:#}");
                tracing::error!(error, "cannot go on with what the data process before has left");
                // Its copies would keep the device and the port in use.
                let keeper = self.links.keeper.as_ref();
                let forgotten = keeper.map(|keeper| keeper.notify(&ToKeeper::Forget, &[]));
                if let Some(Err(error)) = forgotten {
                    tracing::error!(%error, "the keeper is gone");
                }
            }
        }
    }

    /// Gives the keeper what has changed.
    fn keep(&mut self, what: Kept) {
        let (Some(keeper), Some(active)) = (&self.links.keeper, &self.active) else { return };
        let Some(memory) = &active.memory else { return };
        let keep = || -> std::io::Result<()> {
            let snapshot = handover::store(&active.snapshot())?;
            match what {
                Kept::Snapshot => keeper.notify(&ToKeeper::Snapshot, &[snapshot.as_fd()]),
                Kept::All => {
                    let (left, more) = active.running.leave(&active.snapshot.node);
                    let mut all = vec![snapshot.as_fd(), memory.file()];
                    all.extend(more);
                    keeper.notify(&ToKeeper::Keep { left }, &all)
                }
            }
        };
        if let Err(error) = keep() {
            tracing::error!(%error, "the next data process will begin anew");
        }
    }

    /// Stops the lanes and has the keeper give all away: it then ends this process. Returns why not.
    fn give_away(&mut self, connection: &UnixStream) -> Response {
        let refused = |message: &str| Response::Error {
            kind: ErrorKind::Invalid,
            message: message.to_owned(),
        };
        let (Some(keeper), Some(active)) = (&self.links.keeper, &mut self.active) else {
            return refused("there is nothing to take over yet");
        };
        if active.memory.is_none() {
            return refused("its sessions end with it");
        }
        active.running.stop();
        active.running.stop_ecn_reports();
        match keeper.notify(&ToKeeper::GiveAway, &[connection.as_fd()]) {
            // Whoever kills this process is on the way, also where nobody takes it over.
            Ok(()) => loop {
                std::thread::park();
            },
            Err(error) => {
                tracing::error!(%error, "the keeper is gone: ending, to begin anew");
                std::process::exit(1);
            }
        }
    }

    fn report(&self, now: Time, peers: bool) -> skein_ipc::Report {
        let mut report = skein_ipc::Report {
            pid: std::process::id(),
            uptime_seconds: self.started.elapsed().as_secs_f64(),
            confinement: self.confinement.clone(),
            ..Default::default()
        };
        if let Some(active) = &self.active {
            report.revision = active.snapshot.revision;
            report.tun = Some(active.snapshot.node.tun.name.clone());
            let sources = report::Sources {
                engine: &active.engine,
                running: &active.running,
                drops: &active.drops,
                totals: &active.totals,
            };
            report::fill(&mut report, now, &sources, active.peers.values(), peers);
        }
        report
    }
}

/// What of a data plane the keeper has to be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kept {
    Snapshot,
    All,
}

impl Active {
    /// Begins, with the sessions of a process before; `open` gives the descriptors.
    fn start(
        now: Time,
        snapshot: Snapshot,
        memory: Option<SessionMemory>,
        sessions: Vec<Resumed>,
        open: impl FnOnce(&NodeSettings, &Arc<Published>) -> Result<Running, SetupError>,
    ) -> Result<Self, SetupError> {
        let node = &snapshot.node;
        let published = Arc::new(Published::default());
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
        if let Some(memory) = &memory {
            engine.set_session_store(Box::new(memory.clone()));
        }
        let mut empty = snapshot.clone();
        empty.peers.clear();
        // The engine and the memory of its sessions hold these timestamps from now on.
        empty.seen_handshakes.clear();
        let mut active = Self {
            snapshot: empty,
            engine,
            peers: HashMap::new(),
            routes: Arc::default(),
            published,
            unswept: false,
            memory,
            running,
            drops: DropStats::default(),
            totals: Totals::default(),
            narrow: Vec::new(),
            narrow_changed: false,
        };
        active.set_peers(now, snapshot.peers)?;
        active.raise_seen(&snapshot.seen_handshakes);
        active.engine.restore_sessions(now, sessions);
        active.publish();
        active.running.begin()?;
        Ok(active)
    }

    /// All that is in force.
    fn snapshot(&self) -> Snapshot {
        let peers = self.peers.values().map(|(_, peer)| peer.clone()).collect();
        Snapshot { peers, ..self.snapshot.clone() }
    }

    fn identity(&self) -> NodeIdentity {
        let public_key = PublicKey(self.engine.public_key().to_bytes());
        NodeIdentity { name: self.snapshot.node.name.clone(), public_key }
    }

    /// Goes from what is in force to `snapshot`, touching only what differs.
    fn become_like(&mut self, now: Time, snapshot: Snapshot) -> Result<Kept, SetupError> {
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
        let mut kept = Kept::Snapshot;
        self.engine.raise_timestamps(Duration::from_secs(snapshot.not_before));
        self.snapshot.not_before = snapshot.not_before;
        let before = std::mem::replace(&mut self.snapshot.local_cidrs, snapshot.local_cidrs);
        if let Err(error) = self.set_peers(now, snapshot.peers) {
            self.snapshot.local_cidrs = before;
            return Err(error);
        }
        self.raise_seen(&snapshot.seen_handshakes);
        let before = std::mem::replace(&mut self.snapshot.node.tun, snapshot.node.tun);
        if before.ifindex != self.snapshot.node.tun.ifindex {
            if let Err(error) = self.running.attach_tun(&self.snapshot.node) {
                self.snapshot.node.tun = before;
                return Err(error);
            }
            kept = Kept::All;
        }
        if before != self.snapshot.node.tun {
            self.engine.set_mtu(now, self.snapshot.node.tun.mtu);
            self.publish();
        }
        self.snapshot.revision = snapshot.revision;
        Ok(kept)
    }

    fn raise_seen(&mut self, seen: &SeenHandshakes) {
        for (key, nanos) in seen {
            self.engine.raise_seen_timestamp(&key.0.into(), Duration::from_nanos(*nanos));
        }
    }

    fn seen_handshakes(&self) -> SeenHandshakes {
        let nanos = |at: Duration| u64::try_from(at.as_nanos()).unwrap_or(u64::MAX);
        self.engine
            .seen_timestamps()
            .map(|(key, at)| (PublicKey(key.to_bytes()), nanos(at)))
            .collect()
    }

    fn update(&mut self, now: Time, update: Update) -> Result<(), SetupError> {
        let changed: HashSet<PublicKey> =
            update.upsert.iter().map(|peer| peer.public_key).chain(update.remove).collect();
        let kept = self.peers.values().map(|(_, peer)| peer);
        let peers = kept.filter(|peer| !changed.contains(&peer.public_key)).cloned();
        let peers = peers.chain(update.upsert).collect();
        self.set_peers(now, peers)?;
        self.snapshot.revision = update.revision;
        Ok(())
    }

    /// Makes these the peers. Refuses the whole where prefixes contradict each other.
    fn set_peers(&mut self, now: Time, peers: Vec<Peer>) -> Result<(), SetupError> {
        // Routes are tried with provisional numbers first, so that a refusal changes nothing.
        let numbered = (0..).map(PeerId).zip(peers.iter().map(|p| p.pod_cidrs.as_slice()));
        RouteTable::build(&self.snapshot.local_cidrs, numbered).map_err(|conflict| {
            SetupError::Invalid(format!("contradicting pod CIDRs: {conflict}"))
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
            // Older releases accepted multicast addresses and stored them.
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

    /// Whether the device that the lanes were attached to is there still.
    fn has_device(&self) -> bool {
        let tun = &self.snapshot.node.tun;
        let found = skein_sys::link::find(&tun.name);
        found.is_ok_and(|link| link.is_some_and(|link| link.index == tun.ifindex))
    }

    fn event(&mut self, now: Time, message: ToManager, tap: &Tap) {
        match message {
            ToManager::WantSession(peer) => self.engine.request_session(now, peer),
            ToManager::UnknownSession(source) => self.engine.on_unknown_session(now, source),
            ToManager::TooLong(datagram) => self.too_long(now, datagram),
            ToManager::Datagram { source, mut datagram, .. } => {
                // What was dropped before this one is not its.
                self.drops.collect(self.engine.drops());
                self.engine.handle_datagram(now, source, &mut datagram);
                for (reason, packets) in self.engine.drops().iter() {
                    let (outer, bytes) = (Some(source), Bytes::Outer(&datagram));
                    tap.dropped(reason, Sight { lane: None, outer, bytes, packets });
                }
            }
            ToManager::EndSessions { .. }
            | ToManager::Request { .. }
            | ToManager::TunGone { .. }
            | ToManager::GiveAway { .. } => {}
        }
    }

    /// Makes the engine limit datagrams to the size that this host's route to the destination
    /// carries.
    fn too_long(&mut self, now: Time, TooLong { destination, len }: TooLong) {
        let plaintext = |len: usize| u16::try_from(len.saturating_sub(OVERHEAD)).ok();
        let fits = match self.running.longest_payload(destination, len) {
            // The route has become wider since the refusal.
            LongestPayload::Carries => return,
            LongestPayload::Limit(longest) => plaintext(longest),
            LongestPayload::Unknown => None,
        };
        let size = plaintext(len).unwrap_or(u16::MAX);
        // A refused probe for a larger size does not change the size in use.
        if self.engine.on_send_too_big(now, destination, size, fits) {
            tracing::info!(%destination, size, fits, "datagram longer than the route carries");
        }
    }

    /// Carries out what the engine decided.
    fn drive(&mut self, now: Time) {
        if self.engine.poll_timeout().is_some_and(|due| due.mono <= now.mono) {
            self.engine.handle_timeout(now);
        }
        // Before anything is sent: an answer may arrive as soon as its question has left.
        if self.engine.poll_tables_changed() {
            self.publish();
        }
        while let Some(transmit) = self.engine.poll_transmit() {
            let sent = self.running.send(transmit.destination, &transmit.payload);
            if let Err(datagram) = sent {
                self.too_long(now, datagram);
            }
        }
        // Of what was too long.
        if self.engine.poll_tables_changed() {
            self.publish();
        }
        self.drops.collect(self.engine.drops());
        self.unswept = self.published.sweep();
    }

    fn publish(&mut self) {
        self.totals.follow(self.engine.tables());
        let mut tables = Tables { routes: Arc::clone(&self.routes), ..Tables::default() };
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
        let narrow: Vec<_> = paths.collect();
        self.narrow_changed |= narrow != self.narrow;
        self.narrow = narrow;
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

fn random(bytes: &mut [u8]) {
    // The system's generator fails only where the system is beyond help, and a predictable key would
    // be worse than none.
    aws_lc_rs::rand::fill(bytes).expect("the system's random generator failed");
}

/// Readings of both clocks.
fn clock() -> Time {
    let wall = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Time { mono: boot_time(), wall }
}
