//! Engines joined by a simulated underlay with a virtual clock: delay, loss, reordering,
//! duplication, an MTU, and one-way failures. Everything follows from a seed.

#![allow(clippy::unwrap_used)]

mod abuse;
mod endpoints;
mod epochs;
mod handshake;
mod liveness;
mod path_mtu;
mod rotation;
mod sessions;
mod stolen_key;
mod wire_format;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::drop::DropReason;
use crate::keys::{PrivateKey, PublicKey};
use crate::route::PeerId;
use crate::time::Time;
use crate::tunnel::replay::ReplayWindow;
use crate::tunnel::session::{Ciphers, Session};
use crate::tunnel::{Engine, EngineConfig, HandshakeResult, PeerConfig, PeerState, PeerView};
use crate::wire::header::{Flags, Header, MessageType, OVERHEAD};

const PORT: u16 = 51900;
/// Source port of handshake and control messages.
const MANAGER_PORT: u16 = 40001;
/// Source port of data.
const LANE_PORT: u16 = 40002;

const ALL_CIPHERS: Ciphers =
    Ciphers { aes256_gcm: true, chacha20_poly1305: true, aes_hardware: true };

fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// SplitMix64: different, repeatable numbers.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.next() % 100 < percent
    }
}

/// Properties of the simulated underlay.
#[derive(Debug, Clone)]
struct Underlay {
    delay: Duration,
    /// Maximum random addition to the delay, which reorders datagrams.
    jitter: Duration,
    loss_percent: u64,
    duplicate_percent: u64,
    /// Maximum UDP payload in bytes.
    mtu: usize,
    /// Pairs of hosts (from, to) between which nothing arrives.
    cut: BTreeSet<(usize, usize)>,
    /// Host and type of messages that never arrive.
    mute: Option<(usize, MessageType)>,
    /// Endpoints at which nothing arrives.
    dead: BTreeSet<SocketAddr>,
}

#[derive(Debug, Clone)]
struct Datagram {
    from: usize,
    source: SocketAddr,
    destination: SocketAddr,
    payload: Vec<u8>,
}

struct Node {
    engine: Engine,
    config: NodeConfig,
    windows: BTreeMap<(u32, u8), ReplayWindow>,
    received: Vec<Vec<u8>>,
    drops: Vec<DropReason>,
    /// Receiver, interval and next time of a flow of data.
    flow: Option<(usize, Duration, Duration)>,
    /// True if the node answers the data of flows.
    answers: bool,
    sent: u64,
}

#[derive(Clone)]
struct NodeConfig {
    key: u8,
    cluster: &'static str,
    ciphers: Ciphers,
    lanes: u8,
    mtu: u16,
    /// True if the node propagates the ECN field.
    ecn: bool,
    addresses: Vec<SocketAddr>,
}

struct Lab {
    now: Time,
    rng: Rng,
    underlay: Underlay,
    nodes: Vec<Node>,
    wire: BTreeMap<(Duration, u64), Datagram>,
    sequence: u64,
    /// All datagrams that were sent, whether lost or not.
    trace: Vec<Datagram>,
}

impl Lab {
    /// Creates `count` nodes that know each other. Node i has the private key [i + 1; 32].
    fn new(count: usize) -> Self {
        let mut lab = Self::unacquainted(count);
        for i in 0..count {
            for j in (0..count).filter(|&j| j != i) {
                lab.introduce(i, j);
            }
        }
        lab
    }

    /// Creates `count` nodes without records of each other.
    fn unacquainted(count: usize) -> Self {
        let underlay = Underlay {
            delay: ms(1),
            jitter: Duration::ZERO,
            loss_percent: 0,
            duplicate_percent: 0,
            mtu: 1472,
            cut: BTreeSet::new(),
            mute: None,
            dead: BTreeSet::new(),
        };
        let now = Time { mono: secs(1000), wall: secs(1_700_000_000) };
        let mut lab = Self {
            now,
            rng: Rng(1),
            underlay,
            nodes: Vec::new(),
            wire: BTreeMap::new(),
            sequence: 0,
            trace: Vec::new(),
        };
        for i in 0..count {
            let addresses = vec![SocketAddr::new([192, 0, 2, i as u8 + 1].into(), PORT)];
            let config = NodeConfig {
                key: i as u8 + 1,
                cluster: "test",
                ciphers: ALL_CIPHERS,
                lanes: 2,
                mtu: 1440,
                ecn: true,
                addresses,
            };
            lab.nodes.push(Node {
                engine: engine(&config, 100 + i as u64),
                config,
                windows: BTreeMap::new(),
                received: Vec::new(),
                drops: Vec::new(),
                flow: None,
                answers: false,
                sent: 0,
            });
        }
        lab
    }

    /// Adds the record of `peer` to `node`.
    fn introduce(&mut self, node: usize, peer: usize) -> PeerId {
        let config = PeerConfig {
            public_key: self.key(peer),
            second_key: None,
            endpoints: self.nodes[peer].config.addresses.clone(),
        };
        self.nodes[node].engine.upsert_peer(self.now, config)
    }

    /// Changes a node's configuration and restarts the node with its records.
    fn reconfigure(&mut self, node: usize, change: impl FnOnce(&mut NodeConfig)) {
        change(&mut self.nodes[node].config);
        self.restart(node);
    }

    /// Restarts a node, which keeps only its key and its records.
    fn restart(&mut self, node: usize) {
        let known: Vec<PeerConfig> = self.nodes[node]
            .engine
            .tables()
            .map(|(_, view)| view.public_key)
            .filter_map(|key| (0..self.nodes.len()).find(|&i| self.key(i) == key))
            .map(|i| PeerConfig {
                public_key: self.key(i),
                second_key: None,
                endpoints: self.nodes[i].config.addresses.clone(),
            })
            .collect();
        let seed = self.rng.next();
        let restarted = &mut self.nodes[node];
        restarted.engine = engine(&restarted.config, seed);
        restarted.windows.clear();
        for peer in known {
            restarted.engine.upsert_peer(self.now, peer);
        }
    }

    fn key(&self, node: usize) -> PublicKey {
        self.nodes[node].engine.public_key()
    }

    fn peer_id(&self, node: usize, peer: usize) -> PeerId {
        self.nodes[node].engine.peer_id(&self.key(peer)).unwrap()
    }

    fn view(&self, node: usize, peer: usize) -> &PeerView {
        self.nodes[node].engine.peer(self.peer_id(node, peer)).unwrap()
    }

    fn state(&self, node: usize, peer: usize) -> PeerState {
        self.view(node, peer).state
    }

    fn current(&self, node: usize, peer: usize) -> Option<Arc<Session>> {
        self.view(node, peer).current.clone()
    }

    fn count(&self, node: usize, result: HandshakeResult) -> u64 {
        self.nodes[node].engine.handshake_count(result)
    }

    fn dropped(&mut self, node: usize, reason: DropReason) -> u64 {
        self.nodes[node].engine.drops().get(reason)
    }

    /// Returns true if both nodes send with the same session.
    fn joined(&self, a: usize, b: usize) -> bool {
        match (self.current(a, b), self.current(b, a)) {
            (Some(x), Some(y)) => {
                x.local_index == y.remote_index && x.remote_index == y.local_index
            }
            _ => false,
        }
    }

    /// Sends a packet as a lane does: seals it with the session that the peer is known to have, or
    /// requests a session. Returns whether the packet was sent.
    fn send(&mut self, from: usize, to: usize, payload: &[u8]) -> bool {
        let (now, id) = (self.now, self.peer_id(from, to));
        let view = self.view(from, to);
        let next = view.next.clone().filter(|next| next.session.is_confirmed());
        let next = next.map(|next| (Some(next.session), next.endpoint));
        let chosen = next.unwrap_or_else(|| (view.current.clone(), view.endpoint));
        let (Some(session), Some(destination)) = chosen else {
            self.nodes[from].engine.request_session(now, id);
            self.collect(from);
            return false;
        };
        let mut out = vec![0; payload.len() + OVERHEAD];
        session.sender(0).unwrap().seal(Flags::default(), payload, &mut out).unwrap();
        session.traffic().add_sent(1, payload.len() as u64);
        self.nodes[from].sent += 1;
        let source = self.source(from, LANE_PORT, destination);
        self.put(Datagram { from, source, destination, payload: out });
        true
    }

    /// Sends the datagrams of a node's engine.
    fn collect(&mut self, node: usize) {
        while let Some(transmit) = self.nodes[node].engine.poll_transmit() {
            let destination = transmit.destination;
            let source = self.source(node, MANAGER_PORT, destination);
            self.put(Datagram { from: node, source, destination, payload: transmit.payload });
        }
    }

    /// Returns the source address of a datagram, with the scope id of the link that it crosses.
    fn source(&self, node: usize, port: u16, destination: SocketAddr) -> SocketAddr {
        let mut source = self.nodes[node].config.addresses[0];
        source.set_port(port);
        if let (SocketAddr::V6(source), SocketAddr::V6(destination)) = (&mut source, destination) {
            source.set_scope_id(destination.scope_id());
        }
        source
    }

    fn put(&mut self, datagram: Datagram) {
        self.trace.push(datagram.clone());
        let to = self.host(datagram.destination);
        let lost = datagram.payload.len() > self.underlay.mtu
            || self.underlay.mute.is_some_and(|(from, kind)| {
                from == datagram.from && kind as u8 == datagram.payload[0]
            })
            || self.underlay.dead.contains(&datagram.destination)
            || to.is_none_or(|to| self.underlay.cut.contains(&(datagram.from, to)));
        let copies = 1 + u64::from(self.rng.chance(self.underlay.duplicate_percent));
        for _ in 0..copies {
            if lost || self.rng.chance(self.underlay.loss_percent) {
                continue;
            }
            let jitter = self.underlay.jitter.as_micros() as u64;
            let jitter = if jitter == 0 { 0 } else { self.rng.next() % jitter };
            let at = self.now.mono + self.underlay.delay + Duration::from_micros(jitter);
            self.sequence += 1;
            self.wire.insert((at, self.sequence), datagram.clone());
        }
    }

    fn host(&self, address: SocketAddr) -> Option<usize> {
        self.nodes.iter().position(|node| node.config.addresses.contains(&address))
    }

    fn deliver(&mut self, datagram: Datagram) {
        let Some(to) = self.host(datagram.destination) else { return };
        let Datagram { from, source, mut payload, .. } = datagram;
        let now = self.now;
        let node = &mut self.nodes[to];
        match Header::parse(&payload) {
            Ok(header) if header.kind == MessageType::Data => {
                let ours = |s: &&Arc<Session>| s.local_index == header.receiver;
                let found = {
                    let mut sessions = node.engine.tables().flat_map(|(_, view)| &view.receive);
                    sessions.find(ours).cloned()
                };
                let Some(session) = found else {
                    node.drops.push(DropReason::UnknownSession);
                    node.engine.on_unknown_session(now, source.ip());
                    return self.collect(to);
                };
                assert!(!session.is_expired());
                let result = session.receiver(header.lane).unwrap().open(&mut payload);
                let result = result.and_then(|(header, plaintext)| {
                    let window = (session.local_index, header.lane);
                    let next = session.next_counter(header.lane);
                    let window = node.windows.entry(window);
                    let window = window.or_insert_with(|| ReplayWindow::after(next));
                    window.check_and_set(header.counter)?;
                    session.set_next_counter(header.lane, window.next_counter());
                    Ok(plaintext.to_vec())
                });
                match result {
                    Ok(plaintext) => {
                        session.confirm();
                        session.traffic().add_received(1, plaintext.len() as u64);
                        let asked = node.answers && plaintext == b"flow";
                        node.received.push(plaintext);
                        if asked {
                            self.send(to, from, b"answer");
                        }
                    }
                    Err(reason) => node.drops.push(reason),
                }
            }
            _ => {
                node.engine.handle_datagram(now, source, &mut payload);
                self.collect(to);
            }
        }
    }

    /// Starts a flow of data from `from` to `to` with a packet per interval.
    fn flow(&mut self, from: usize, to: usize, interval: Duration) {
        self.nodes[from].flow = Some((to, interval, self.now.mono));
    }

    /// Advances the clock by `by` and handles all events on the way.
    fn run(&mut self, by: Duration) {
        let end = self.now.mono + by;
        let mut steps = 0u64;
        loop {
            let arrival = self.wire.keys().next().map(|(at, _)| *at);
            let timers = self.nodes.iter().filter_map(|n| n.engine.poll_timeout());
            let flows = self.nodes.iter().filter_map(|n| n.flow).map(|(_, _, at)| at);
            let next = arrival.into_iter().chain(timers.map(|t| t.mono)).chain(flows).min();
            let Some(at) = next.filter(|&at| at <= end) else { break };
            self.advance_to(at.max(self.now.mono));
            self.step();
            steps += 1;
            assert!(steps < 2_000_000, "The simulation must advance.");
        }
        self.advance_to(end);
    }

    fn advance_to(&mut self, mono: Duration) {
        self.now = self.now.after(mono - self.now.mono);
    }

    fn step(&mut self) {
        let now = self.now;
        let due: VecDeque<_> =
            self.wire.keys().take_while(|(at, _)| *at <= now.mono).copied().collect();
        for key in due {
            if let Some(datagram) = self.wire.remove(&key) {
                self.deliver(datagram);
            }
        }
        for i in 0..self.nodes.len() {
            if self.nodes[i].engine.poll_timeout().is_some_and(|at| at.mono <= now.mono) {
                self.nodes[i].engine.handle_timeout(now);
                self.collect(i);
            }
            if let Some((to, interval, at)) = self.nodes[i].flow
                && at <= now.mono
            {
                self.nodes[i].flow = Some((to, interval, at + interval));
                self.send(i, to, b"flow");
            }
        }
    }

    /// Advances the clock until `done` returns true. Returns the time that this took, and panics
    /// after `limit`.
    fn run_until(&mut self, limit: Duration, mut done: impl FnMut(&mut Lab) -> bool) -> Duration {
        let start = self.now.mono;
        while !done(self) {
            assert!(self.now.mono - start < limit, "The condition must hold within {limit:?}.");
            self.run(ms(1));
        }
        self.now.mono - start
    }

    /// Creates two nodes with a session that both have confirmed.
    fn joined_pair() -> Lab {
        let mut lab = Lab::new(2);
        assert!(!lab.send(0, 1, b"first"));
        lab.run(ms(20));
        assert!(lab.joined(0, 1));
        lab
    }
}

fn engine(config: &NodeConfig, seed: u64) -> Engine {
    let mut rng = Rng(seed);
    let random = move |out: &mut [u8]| out.fill_with(|| rng.next() as u8);
    let config = EngineConfig {
        private_key: PrivateKey::new(&[config.key; 32]),
        cluster_id: config.cluster.to_owned(),
        listen_port: PORT,
        lanes: config.lanes,
        ciphers: config.ciphers,
        mtu: config.mtu,
        ecn: config.ecn,
    };
    Engine::new(config, Box::new(random)).unwrap()
}
