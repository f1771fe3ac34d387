//! Fuzzing entry points for the tunnel protocol, its replay window and its saved sessions. The
//! attackers are of three kinds: senders without a key, peers, and the underlay.

use std::collections::{BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::time::Duration;

use crate::drop::DropReason;
use crate::keys::PrivateKey;
use crate::route::PeerId;
use crate::time::Time;
use crate::tunnel::fuzz_access::{check_payloads, repair_mac1};
use crate::tunnel::session::COUNTER_LIMIT;
use crate::tunnel::{
    Cipher, Ciphers, Engine, EngineConfig, PeerConfig, ReplayWindow, SAVED_LEN, SavedSession,
    Session, SessionParams, SessionSlot, TransportSecrets,
};
use crate::wire::header::{
    CONTROL_LANE, Flags, HEADER_LEN, Header, MAX_LANES, MessageType, OVERHEAD,
};

/// Maximum number of steps; more steps only repeat earlier ones.
const MAX_STEPS: usize = 200;

/// Runs two engines over an underlay that the input drives. The underlay delivers, changes,
/// repeats, invents and loses datagrams, lets time pass, and adds and removes peers.
pub fn engine_datagrams(data: &[u8]) {
    let mut simulation = Simulation::new();
    let mut input = Input(data);
    for _ in 0..MAX_STEPS {
        let Some(step) = input.byte() else { break };
        simulation.step(step, &mut input);
        simulation.check();
    }
}

/// Gives a datagram to every lane of a session of each cipher. It must not open. The same bytes
/// sealed by the other end must open once, unchanged.
pub fn open_datagram(data: &[u8]) {
    for cipher in [Cipher::Aes256Gcm, Cipher::ChaCha20Poly1305] {
        let (Some(ours), Some(theirs)) = (session(cipher, true), session(cipher, false)) else {
            unreachable!("fixed parameters are valid")
        };
        for lane in (0..MAX_LANES as u8).chain([CONTROL_LANE]) {
            let Some(receiver) = ours.receiver(lane) else { continue };
            assert!(receiver.open(&mut data.to_vec()).is_err(), "forged");
            let Some(sender) = theirs.sender(lane) else { continue };
            let mut sealed = vec![0; data.len() + OVERHEAD];
            assert_eq!(sender.seal(Flags::default(), data, &mut sealed), Ok(sealed.len()));
            if let Some(&at) = data.first() {
                let mut forged = sealed.clone();
                let at = usize::from(at) % forged.len();
                forged[at] ^= 1 << (data.len() % 8);
                assert!(receiver.open(&mut forged).is_err(), "changed at {at}");
            }
            let opened = receiver.open(&mut sealed).map(|(header, text)| (header, text.to_vec()));
            assert!(opened.is_ok_and(|(header, text)| header.lane == lane && text == data));
        }
    }
}

/// Parses payloads of handshake and control messages. Encoding a valid one must restore it.
pub fn handshake_payloads(data: &[u8]) {
    check_payloads(data);
}

/// Restores a session from untrusted bytes. A record that can be parsed must stay the same when it
/// is encoded and parsed again. The engine then restores the session or skips the record.
pub fn saved_session(data: &[u8]) {
    let Some(bytes) = data.first_chunk::<SAVED_LEN>() else { return };
    let Some(saved) = SavedSession::from_bytes(bytes) else { return };
    let written = saved.to_bytes();
    let again = SavedSession::from_bytes(&written).expect("an encoded session can be parsed");
    assert_eq!(again.to_bytes(), written);
    let mut engine = engine(0);
    engine.upsert_peer(
        Time::default(),
        PeerConfig { public_key: saved.public_key, second_key: None, endpoints: vec![address(1)] },
    );
    let now = Time { mono: saved.established, wall: Duration::ZERO };
    let taken = engine.restore_sessions(now, [(saved, Box::new(Nowhere) as Box<dyn SessionSlot>)]);
    let sessions: usize = engine.tables().map(|(_, view)| view.receive.len()).sum();
    assert_eq!(sessions, taken);
    engine.handle_timeout(now);
    while engine.poll_transmit().is_some() {}
}

/// A slot that stores nothing.
struct Nowhere;

impl SessionSlot for Nowhere {
    fn next_counter(&self, _: u8) -> u64 {
        u64::MAX
    }

    fn set_next_counter(&self, _: u8, _: u64) {}
}

/// Compares the replay window with a set of all counters. Each 3 bytes are a step back or ahead.
pub fn replay_window(data: &[u8]) {
    let (mut window, mut seen) = (ReplayWindow::new(), BTreeSet::new());
    let mut highest = 0u64;
    for step in data.chunks_exact(3) {
        let distance = u64::from(u16::from_be_bytes([step[1], step[2]]));
        let counter = match step[0] % 4 {
            0 => highest.saturating_sub(distance),
            1 => highest.saturating_add(distance),
            2 => highest.saturating_add(distance << 16),
            _ => distance << (step[0] % 49),
        };
        let expected = if counter <= highest && highest - counter >= ReplayWindow::WIDTH {
            Err(DropReason::ReplayWindow)
        } else if !seen.insert(counter) {
            Err(DropReason::Replayed)
        } else {
            Ok(())
        };
        assert_eq!(window.check_and_set(counter), expected, "{counter} after {highest}");
        highest = highest.max(counter);
    }
}

fn session(cipher: Cipher, initiator: bool) -> Option<Session> {
    Session::new(SessionParams {
        peer: PeerId(0),
        local_index: 1,
        remote_index: 1,
        cipher,
        local_lanes: 2,
        remote_lanes: 2,
        established: Time::default(),
        initiator,
        epoch: 0,
        ecn: false,
        secrets: TransportSecrets::new([1; 32], [2; 32]),
    })
    .ok()
}

/// A reader of the input.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn byte(&mut self) -> Option<u8> {
        let (&first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(first)
    }

    fn number(&mut self) -> usize {
        self.byte().unwrap_or(0).into()
    }

    /// Returns as many bytes as the next byte says.
    fn bytes(&mut self) -> &'a [u8] {
        let length = self.number().min(self.0.len());
        let (bytes, rest) = self.0.split_at(length);
        self.0 = rest;
        bytes
    }
}

/// Two engines and the underlay between them.
struct Simulation {
    now: Time,
    engines: [Engine; 2],
    /// Datagrams in transit, with the index of the receiving engine.
    wire: VecDeque<(usize, Vec<u8>)>,
    /// Earlier datagrams, for replays.
    old: Vec<(usize, Vec<u8>)>,
}

impl Simulation {
    fn new() -> Self {
        let now = Time { mono: Duration::from_secs(1), wall: Duration::from_secs(1_700_000_000) };
        let mut simulation =
            Self { now, engines: [engine(0), engine(1)], wire: VecDeque::new(), old: Vec::new() };
        simulation.introduce(0, &[1]);
        simulation.introduce(1, &[0]);
        simulation
    }

    fn introduce(&mut self, node: usize, hosts: &[u8]) {
        let config = PeerConfig {
            public_key: self.engines[1 - node].public_key(),
            second_key: None,
            endpoints: hosts.iter().map(|&host| address(host)).collect(),
        };
        self.engines[node].upsert_peer(self.now, config);
    }

    fn step(&mut self, step: u8, input: &mut Input<'_>) {
        let node = usize::from(step >> 7);
        let other_key = self.engines[1 - node].public_key();
        match step % 14 {
            0 | 1 => {
                if let Some((to, datagram)) = self.next_datagram() {
                    self.deliver(to, datagram);
                }
            }
            2 => drop(self.next_datagram()),
            3 => {
                if let Some((to, mut datagram)) = self.next_datagram() {
                    change(&mut datagram, input);
                    self.deliver(to, datagram);
                }
            }
            // The sender knows the receiver's public key.
            4 => {
                if let Some((to, mut datagram)) = self.next_datagram() {
                    change(&mut datagram, input);
                    repair_mac1(&self.engines[to].public_key(), &mut datagram);
                    self.deliver(to, datagram);
                }
            }
            5 => {
                let at = input.number();
                if let Some((to, datagram)) = self.old.get(at % self.old.len().max(1)).cloned() {
                    self.deliver(to, datagram);
                }
            }
            6 => self.deliver(node, input.bytes().to_vec()),
            // The header is valid and names an index that may exist.
            7 => {
                let mut datagram = vec![[1, 2, 3, 5][input.number() % 4], 0, CONTROL_LANE, 0];
                let index = self.engines[node]
                    .tables()
                    .flat_map(|(_, view)| &view.receive)
                    .map(|session| session.local_index)
                    .next();
                datagram.extend(index.unwrap_or(0).to_be_bytes());
                datagram.extend([0; 7]);
                datagram.push(input.byte().unwrap_or(0));
                datagram.extend(input.bytes());
                self.deliver(node, datagram);
            }
            8 => {
                let tenths = input.number() as u32;
                self.now = self.now.after(Duration::from_millis(100) * tenths);
                for engine in &mut self.engines {
                    engine.handle_timeout(self.now);
                }
            }
            9 => {
                if let Some(id) = self.engines[node].peer_id(&other_key) {
                    self.engines[node].request_session(self.now, id);
                }
            }
            10 => {
                let host = input.byte().unwrap_or(0);
                self.engines[node].on_unknown_session(self.now, address(host).ip());
            }
            11 => {
                let amount = input.number() as u64;
                for (_, view) in self.engines[node].tables() {
                    for session in &view.receive {
                        session.traffic().add_received(amount & 0xf, 1);
                    }
                    if let Some(session) = &view.current {
                        session.traffic().add_sent(amount >> 4, 1);
                    }
                }
            }
            12 => self.introduce(node, input.bytes()),
            _ => {
                if let Some(id) = self.engines[node].peer_id(&other_key) {
                    self.engines[node].remove_peer(id);
                }
            }
        }
        self.collect();
    }

    /// Removes the oldest datagram from the wire, and keeps a copy for replays.
    fn next_datagram(&mut self) -> Option<(usize, Vec<u8>)> {
        let taken = self.wire.pop_front()?;
        self.old.push(taken.clone());
        Some(taken)
    }

    fn deliver(&mut self, to: usize, mut datagram: Vec<u8>) {
        let source = address(1 - to as u8);
        let length = datagram.len();
        self.engines[to].handle_datagram(self.now, source, &mut datagram);
        // All answers to a datagram together have at most twice the datagram's length, and at most
        // 400 bytes for a datagram of less than 200 bytes.
        let mut answered = 0;
        while let Some(transmit) = self.engines[to].poll_transmit() {
            answered += transmit.payload.len();
            self.wire.push_back((1 - to, transmit.payload));
        }
        assert!(answered <= 2 * length.max(200), "{answered} bytes for {length}");
    }

    fn collect(&mut self) {
        for (node, engine) in self.engines.iter_mut().enumerate() {
            while let Some(transmit) = engine.poll_transmit() {
                self.wire.push_back((1 - node, transmit.payload));
            }
        }
    }

    fn check(&mut self) {
        for (_, datagram) in &self.wire {
            let header = Header::parse(datagram);
            // Only padded pings may be longer.
            let longest = match header.map(|header| header.kind) {
                Ok(MessageType::Control) => 9000 + OVERHEAD,
                _ => 1200,
            };
            assert!(datagram.len() <= longest && header.is_ok());
        }
        for engine in &mut self.engines {
            engine.handle_timeout(self.now);
            let due = engine.poll_timeout();
            assert!(
                due.is_none_or(|due| due.mono > self.now.mono),
                "The next deadline must be in the future."
            );
            for (id, view) in engine.tables() {
                assert!(view.receive.len() <= 4);
                assert!(
                    view.receive.is_empty() || due.is_some(),
                    "A session must have a deadline."
                );
                for session in &view.receive {
                    assert!(session.peer == id && !session.is_expired());
                    assert!(session.counters_used() < COUNTER_LIMIT);
                }
                let known =
                    |current| view.receive.iter().any(|s| std::sync::Arc::ptr_eq(s, current));
                assert!(view.current.as_ref().is_none_or(known));
            }
        }
        self.collect();
    }
}

fn change(datagram: &mut [u8], input: &mut Input<'_>) {
    let (at, with) = (input.number(), input.byte().unwrap_or(1));
    let length = datagram.len().max(HEADER_LEN);
    if let Some(byte) = datagram.get_mut(at % length) {
        *byte ^= with;
    }
}

fn address(host: u8) -> SocketAddr {
    SocketAddr::new([192, 0, 2, host].into(), 51900)
}

fn engine(node: u8) -> Engine {
    let mut state = u64::from(node) + 1;
    let random = move |out: &mut [u8]| {
        out.fill_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 56) as u8
        });
    };
    let config = EngineConfig {
        private_key: PrivateKey::new(&[node + 1; 32]),
        cluster_id: "fuzz".to_owned(),
        listen_port: 51900,
        lanes: 2,
        ciphers: Ciphers { aes256_gcm: true, chacha20_poly1305: true, aes_hardware: true },
        mtu: 1440,
        ecn: false,
    };
    match Engine::new(config, Box::new(random)) {
        Ok(engine) => engine,
        Err(error) => unreachable!("fixed parameters are valid: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuzzing::run_corpus;

    #[test]
    fn engine_datagrams_corpus_passes() {
        run_corpus("engine_datagrams", engine_datagrams);
    }

    #[test]
    fn open_datagram_corpus_passes() {
        run_corpus("open_datagram", open_datagram);
    }

    #[test]
    fn handshake_payloads_corpus_passes() {
        run_corpus("handshake_payloads", handshake_payloads);
    }

    #[test]
    fn saved_session_corpus_passes() {
        run_corpus("saved_session", saved_session);
    }

    #[test]
    fn replay_window_corpus_passes() {
        run_corpus("replay_window", replay_window);
    }

    /// The steps are the first five of the seed `session`: a request for a session and four
    /// deliveries. Both engines must then have a current session.
    #[test]
    fn simulation_establishes_sessions() {
        let mut simulation = Simulation::new();
        for step in [9, 0, 0, 0, 0] {
            simulation.step(step, &mut Input(&[]));
            simulation.check();
        }
        for engine in &simulation.engines {
            assert!(engine.tables().all(|(_, view)| view.current.is_some()));
        }
    }
}
