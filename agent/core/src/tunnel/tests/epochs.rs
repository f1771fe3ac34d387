//! Restarts of a killed process with its sessions restored from the store.

use std::sync::Mutex;

use super::*;
use crate::tunnel::saved::{SAVED_LEN, SavedSession, SessionSlot, SessionStore};
use crate::wire::header::CONTROL_LANE;

type Record = ([u8; SAVED_LEN], BTreeMap<u8, u64>);

/// A store that outlives the engine.
#[derive(Clone, Default)]
struct TestStore(Arc<Mutex<BTreeMap<usize, Record>>>, Arc<Mutex<Times>>);

#[derive(Default)]
struct Times {
    latest: Duration,
    seen: BTreeMap<PublicKey, Duration>,
}

struct TestSlot(TestStore, usize);

impl TestStore {
    fn put(&self, bytes: [u8; SAVED_LEN], counters: BTreeMap<u8, u64>) -> Box<dyn SessionSlot> {
        let mut records = self.0.lock().unwrap();
        let index = records.keys().last().map_or(0, |last| last + 1);
        records.insert(index, (bytes, counters));
        Box::new(TestSlot(self.clone(), index))
    }

    /// Returns the records that a killed process leaves; it does not drop its slots.
    fn records(&self) -> Vec<Record> {
        self.0.lock().unwrap().values().cloned().collect()
    }
}

impl SessionStore for TestStore {
    fn insert(&mut self, session: &SavedSession) -> Option<Box<dyn SessionSlot>> {
        Some(self.put(*session.to_bytes(), BTreeMap::new()))
    }

    fn latest_timestamp(&self) -> Duration {
        self.1.lock().unwrap().latest
    }

    fn set_latest_timestamp(&mut self, timestamp: Duration) {
        self.1.lock().unwrap().latest = timestamp;
    }

    fn seen_timestamp(&self, key: &PublicKey) -> Duration {
        self.1.lock().unwrap().seen.get(key).copied().unwrap_or_default()
    }

    fn set_seen_timestamp(&mut self, key: &PublicKey, timestamp: Duration) {
        self.1.lock().unwrap().seen.insert(*key, timestamp);
    }

    fn retain_seen_timestamps(&mut self, is_known: &dyn Fn(&PublicKey) -> bool) {
        self.1.lock().unwrap().seen.retain(|key, _| is_known(key));
    }
}

impl SessionSlot for TestSlot {
    fn next_counter(&self, lane: u8) -> u64 {
        let records = self.0.0.lock().unwrap();
        records[&self.1].1.get(&lane).copied().unwrap_or(0)
    }

    fn set_next_counter(&self, lane: u8, next: u64) {
        self.0.0.lock().unwrap().get_mut(&self.1).unwrap().1.insert(lane, next);
    }
}

impl Drop for TestSlot {
    fn drop(&mut self) {
        self.0.0.lock().unwrap().remove(&self.1);
    }
}

impl Lab {
    fn attach_store(&mut self, node: usize) -> TestStore {
        self.attach(node, TestStore::default())
    }

    fn attach(&mut self, node: usize, store: TestStore) -> TestStore {
        self.nodes[node].engine.set_session_store(Box::new(store.clone()));
        store
    }

    /// Kills the process of a node and starts the next one with the store. Returns the number of
    /// restored sessions.
    fn kill_process(&mut self, node: usize, store: &mut TestStore) -> usize {
        let records = store.records();
        let memory = TestStore(Arc::default(), store.1.clone());
        self.restart_with_store(node, Some(memory.clone()));
        *store = memory;
        let next = records.into_iter().map(|(bytes, counters)| {
            let mut saved = SavedSession::from_bytes(&bytes).unwrap();
            saved.epoch += 1;
            let slot = store.put(*saved.to_bytes(), counters);
            (saved, slot)
        });
        let next = next.collect::<Vec<_>>();
        let now = self.now;
        let restored = self.nodes[node].engine.restore_sessions(now, next);
        self.collect(node);
        restored
    }

    /// Starts a new engine. It gets the store before its peers.
    fn restart_with_store(&mut self, node: usize, memory: Option<TestStore>) {
        let known: Vec<_> = (0..self.nodes.len())
            .filter(|&peer| self.nodes[node].engine.peer_id(&self.key(peer)).is_some())
            .collect();
        let seed = self.rng.next();
        let restarted = &mut self.nodes[node];
        restarted.engine = engine(&restarted.config, seed);
        restarted.windows.clear();
        if let Some(memory) = memory {
            restarted.engine.set_session_store(Box::new(memory));
        }
        for peer in known {
            self.introduce(node, peer);
        }
    }

    /// Creates two nodes in traffic, of which the first stores its sessions.
    fn stored_pair() -> (Lab, TestStore) {
        let mut lab = Lab::new(2);
        let store = lab.attach_store(0);
        lab.flow(0, 1, ms(3));
        lab.flow(1, 0, ms(5));
        lab.run(secs(1));
        assert!(lab.joined(0, 1));
        (lab, store)
    }

    fn handshakes(&self) -> u64 {
        (0..2).map(|node| self.count(node, HandshakeResult::Initiated)).sum()
    }
}

#[test]
fn repeated_kills_keep_the_same_session() {
    let (mut lab, mut store) = Lab::stored_pair();
    let before = lab.count(1, HandshakeResult::Initiated);
    let index = lab.current(0, 1).unwrap().local_index;
    let mut nonces = BTreeSet::new();
    for life in 1..5 {
        assert_eq!(lab.kill_process(0, &mut store), 1);
        assert_eq!(lab.state(0, 1), PeerState::Established);
        let (received, sent) = (lab.nodes[0].received.len(), lab.nodes[1].sent);
        lab.run(secs(1));
        let session = lab.current(0, 1).unwrap();
        assert_eq!(session.local_index, index);
        assert!(lab.nodes[0].received.len() >= received + 198, "{:?}", lab.nodes[0].drops);
        assert!(lab.nodes[1].sent > sent);
        assert!(lab.nodes[0].drops.is_empty(), "life {life}: {:?}", lab.nodes[0].drops);
    }
    assert!(lab.nodes[1].drops.is_empty(), "{:?}", lab.nodes[1].drops);
    lab.nodes[0].flow = None;
    lab.run(ms(10));
    assert_eq!(lab.nodes[1].received.len() as u64, lab.nodes[0].sent, "No packet may be lost.");
    assert_eq!(
        lab.count(0, HandshakeResult::Initiated),
        0,
        "The restarted process must start no handshake."
    );
    assert_eq!(lab.count(1, HandshakeResult::Initiated), before);
    for datagram in lab.trace.iter().filter(|datagram| datagram.from == 0) {
        let header = Header::parse(&datagram.payload).unwrap();
        if matches!(header.kind, MessageType::Data | MessageType::Control) {
            assert!(
                nonces.insert((header.receiver, header.lane, header.counter)),
                "No nonce may be used twice."
            );
        }
    }
}

#[test]
fn datagrams_of_earlier_epoch_are_not_accepted_again() {
    let (mut lab, mut store) = Lab::stored_pair();
    lab.nodes[0].flow = None;
    lab.nodes[1].flow = None;
    lab.run(secs(1));
    lab.kill_process(0, &mut store);
    let old: Vec<_> = lab.trace.iter().filter(|datagram| datagram.from == 1).cloned().collect();
    let received = lab.nodes[0].received.len();
    for datagram in old {
        lab.deliver(datagram);
    }
    assert_eq!(lab.nodes[0].received.len(), received);
    assert!(lab.nodes[0].drops.len() > 150);
    let refused = [DropReason::Replayed, DropReason::ReplayWindow];
    assert!(
        lab.nodes[0].drops.iter().all(|drop| refused.contains(drop)),
        "{:?}",
        lab.nodes[0].drops
    );
    // Initiations and control messages are replayed, too.
    let after = lab.dropped(0, DropReason::Replayed) + lab.dropped(0, DropReason::ReplayWindow);
    assert!(after > 0);
    assert_eq!(lab.view(0, 1).receive.len(), 1, "No initiation may be accepted twice.");
}

/// The wall clock is set back by one hour before the process restarts. The new process reads the
/// last timestamp from its session store, and needs no lower bound from a control process.
#[test]
fn timestamps_increase_after_clock_was_set_back() {
    let mut lab = Lab::new(2);
    let mut store = lab.attach_store(0);
    lab.flow(0, 1, ms(3));
    lab.run(secs(1));
    lab.now.wall -= secs(3600);
    assert_eq!(lab.kill_process(0, &mut store), 1);
    let sessions = lab.count(1, HandshakeResult::CompletedResponder);
    lab.run(secs(130));
    assert!(
        lab.count(1, HandshakeResult::CompletedResponder) > sessions,
        "The session must have been renewed."
    );
    assert_eq!(lab.count(1, HandshakeResult::Replayed), 0);
}

#[test]
fn unconfirmed_session_stays_unconfirmed_after_restart() {
    let mut lab = Lab::new(2);
    let mut store = lab.attach_store(0);
    // The initiator never receives the response, so it sends nothing in the session.
    lab.underlay.mute = Some((0, MessageType::Response));
    lab.send(1, 0, b"first");
    lab.run(ms(20));
    assert!(lab.view(0, 1).next.is_some());
    assert_eq!(lab.kill_process(0, &mut store), 1);
    assert!(lab.view(0, 1).current.is_none() && lab.view(0, 1).next.is_some());
    lab.underlay.mute = None;
    lab.send(1, 0, b"again");
    lab.run(secs(2));
    assert!(lab.joined(0, 1));
}

#[test]
fn restored_sessions_are_renewed_and_end_in_time() {
    let (mut lab, mut store) = Lab::stored_pair();
    let first = lab.current(0, 1).unwrap();
    lab.run(secs(110));
    assert_eq!(lab.kill_process(0, &mut store), 1);
    lab.run(secs(15));
    assert_ne!(
        lab.current(0, 1).unwrap().local_index,
        first.local_index,
        "The session must be renewed in time."
    );
    assert_eq!(store.records().len(), 2);
    assert_eq!(
        lab.kill_process(0, &mut store),
        2,
        "The old session must be restored for datagrams in flight."
    );
    assert!(lab.joined(0, 1));
    lab.run(secs(70));
    assert_eq!(store.records().len(), 1, "An expired session must be removed from the store.");
    assert!(lab.nodes[1].drops.is_empty() && lab.nodes[0].drops.is_empty());
    // Without traffic, the session is not renewed. It expires and is removed from the store.
    let records = store.records();
    assert_eq!(records.len(), 1);
    lab.nodes[0].flow = None;
    lab.nodes[1].flow = None;
    lab.run(secs(300));
    assert_eq!(store.records().len(), 0);
}

#[test]
fn expired_or_foreign_sessions_are_not_restored() {
    let (mut lab, store) = Lab::stored_pair();
    let records = store.records();
    let restore = |lab: &mut Lab, change: &dyn Fn(&mut SavedSession)| {
        lab.restart(0);
        let mut saved = SavedSession::from_bytes(&records[0].0).unwrap();
        saved.epoch += 1;
        change(&mut saved);
        let slot = TestStore::default().put(records[0].0, BTreeMap::from([(CONTROL_LANE, 1)]));
        let now = lab.now;
        lab.nodes[0].engine.restore_sessions(now, [(saved, slot)])
    };
    assert_eq!(restore(&mut lab, &|_| {}), 1);
    assert_eq!(restore(&mut lab, &|saved| saved.public_key = PublicKey::new([9; 32])), 0);
    assert_eq!(restore(&mut lab, &|saved| saved.established = Duration::ZERO), 0);
    assert_eq!(restore(&mut lab, &|saved| saved.established += secs(100)), 0);
    assert_eq!(restore(&mut lab, &|saved| saved.local_lanes = 65), 0);
    assert_eq!(restore(&mut lab, &|saved| saved.epoch = u32::MAX), 0);
    assert!(lab.handshakes() > 0);
}

/// Delivers every initiation of node 0 in the trace to node 1 again.
fn replay_initiations(lab: &mut Lab) {
    let recorded: Vec<_> =
        lab.trace.iter().filter(|d| d.from == 0 && d.payload[0] == 1).cloned().collect();
    assert!(!recorded.is_empty());
    for datagram in recorded {
        lab.deliver(datagram);
    }
}

#[test]
fn recorded_initiations_are_refused_in_next_process() {
    let mut lab = Lab::new(2);
    let mut store = lab.attach_store(1);
    lab.send(0, 1, b"first");
    lab.run(secs(1));
    assert!(lab.joined(0, 1));
    // The store has no session from which the last timestamp could be derived.
    lab.run(secs(300));
    assert_eq!(store.records().len(), 0);
    assert_eq!(lab.kill_process(1, &mut store), 0);
    replay_initiations(&mut lab);
    assert_eq!(lab.count(1, HandshakeResult::Replayed), 1);
    assert!(lab.view(1, 0).receive.is_empty(), "A recorded initiation must create no session.");
    lab.send(0, 1, b"wanted");
    lab.run(secs(1));
    assert!(lab.joined(0, 1), "A new initiation must be answered.");
}

#[test]
fn recorded_initiations_are_refused_after_restart() {
    let mut lab = Lab::joined_pair();
    let seen: Vec<_> = lab.nodes[1].engine.seen_timestamps().collect();
    assert_eq!(seen.len(), 1);
    assert_eq!(seen[0].0, lab.key(0));
    lab.restart(1);
    assert_eq!(lab.nodes[1].engine.seen_timestamps().count(), 0);
    for (key, timestamp) in seen.iter().chain(&[(PublicKey::new([9; 32]), secs(7))]) {
        lab.nodes[1].engine.raise_seen_timestamp(key, *timestamp);
    }
    assert_eq!(lab.nodes[1].engine.seen_timestamps().collect::<Vec<_>>(), seen);
    // An earlier timestamp has no effect.
    lab.nodes[1].engine.raise_seen_timestamp(&seen[0].0, secs(1));
    replay_initiations(&mut lab);
    assert_eq!(lab.count(1, HandshakeResult::Replayed), 1);
    assert!(lab.view(1, 0).receive.is_empty());
}

#[test]
fn recorded_initiations_are_refused_if_peer_is_added_late() {
    let mut lab = Lab::joined_pair();
    let seen: Vec<_> = lab.nodes[1].engine.seen_timestamps().collect();
    lab.restart(1);
    let id = lab.peer_id(1, 0);
    lab.nodes[1].engine.remove_peer(id);
    for (key, timestamp) in &seen {
        lab.nodes[1].engine.raise_seen_timestamp(key, *timestamp);
        lab.nodes[1].engine.raise_seen_timestamp(key, secs(1));
    }
    assert_eq!(lab.nodes[1].engine.seen_timestamps().count(), 0, "The key must have no peer.");
    lab.introduce(1, 0);
    assert_eq!(lab.nodes[1].engine.seen_timestamps().collect::<Vec<_>>(), seen);
    replay_initiations(&mut lab);
    assert_eq!(lab.count(1, HandshakeResult::Replayed), 1);
    assert!(lab.view(1, 0).receive.is_empty(), "A recorded initiation must create no session.");
}

#[test]
fn recorded_initiations_are_refused_after_record_returns() {
    let mut lab = Lab::joined_pair();
    lab.run(secs(300));
    let (a, b) = (lab.key(0), PublicKey::new([9; 32]));
    let endpoints = lab.nodes[0].config.addresses.clone();
    let record = |lab: &mut Lab, public_key, second_key| {
        let now = lab.now;
        let config = PeerConfig { public_key, second_key, endpoints: endpoints.clone() };
        lab.nodes[1].engine.upsert_peer(now, config)
    };
    // The record is deleted and created again.
    let id = lab.peer_id(1, 0);
    lab.nodes[1].engine.remove_peer(id);
    record(&mut lab, a, None);
    replay_initiations(&mut lab);
    assert_eq!(lab.count(1, HandshakeResult::Replayed), 1);
    // A change of the key is taken back.
    for (first, second) in [(a, Some(b)), (b, Some(a)), (b, None), (b, Some(a)), (a, None)] {
        record(&mut lab, first, second);
    }
    replay_initiations(&mut lab);
    assert_eq!(lab.count(1, HandshakeResult::Replayed), 2);
    // The key moves to the record of another node.
    record(&mut lab, b, Some(a));
    record(&mut lab, PublicKey::new([8; 32]), Some(a));
    replay_initiations(&mut lab);
    assert_eq!(lab.count(1, HandshakeResult::Replayed), 3);
    assert!(lab.nodes[1].engine.tables().all(|(_, view)| view.receive.is_empty()));
}

#[test]
fn mtu_changed_between_processes_reaches_peer() {
    let (mut lab, mut store) = Lab::stored_pair();
    assert_eq!(lab.view(1, 0).mtu, Some(1440));
    lab.nodes[0].config.mtu = 1360;
    assert_eq!(lab.kill_process(0, &mut store), 1);
    lab.run(secs(10));
    assert_eq!(lab.view(1, 0).mtu, Some(1360), "The peer must learn the MTU within seconds.");
    let before = lab.count(0, HandshakeResult::Initiated);
    assert!(lab.kill_process(0, &mut store) > 0, "The renewed session must be stored.");
    lab.run(secs(10));
    let now = lab.count(0, HandshakeResult::Initiated);
    assert_eq!((before, now), (1, 0), "A process with the same MTU must start no handshake.");
}

#[test]
fn timestamp_of_key_is_deleted_with_its_record() {
    let mut lab = Lab::new(2);
    let store = lab.attach_store(1);
    lab.send(0, 1, b"first");
    lab.run(secs(1));
    let key = lab.key(0);
    assert!(store.seen_timestamp(&key) > Duration::ZERO);
    let id = lab.peer_id(1, 0);
    lab.nodes[1].engine.remove_peer(id);
    assert_eq!(store.seen_timestamp(&key), Duration::ZERO);
    // The next process detects a record that was removed while no process ran.
    store.clone().set_seen_timestamp(&key, secs(5));
    let now = lab.now;
    lab.nodes[1].engine.restore_sessions(now, []);
    assert_eq!(store.seen_timestamp(&key), Duration::ZERO);
}

#[test]
fn replays_do_not_stop_own_handshake() {
    // Both the node with the greater and the node with the lesser key are flooded.
    for (sender, victim) in [(0, 1), (1, 0)] {
        let mut lab = Lab::new(2);
        let mut recorded = Vec::new();
        for _ in 0..30 {
            lab.restart(sender);
            lab.send(sender, victim, b"first");
            lab.run(secs(2));
            let initiation = lab.trace.iter().rfind(|d| d.from == sender && d.payload[0] == 1);
            recorded.push(initiation.unwrap().clone());
        }
        lab.restart(sender);
        // The node has lost the timestamps that it has accepted.
        lab.restart(victim);
        let begun = lab.now.mono;
        lab.flow(victim, sender, ms(20));
        // Replays arrive every 990 ms. This interval is just below CONFIRM_TIMEOUT and
        // MIN_RETRY_INTERVAL (1 s each), after which the victim may start or repeat its own
        // handshake.
        for datagram in recorded {
            lab.deliver(datagram);
            let next = lab.now.mono + ms(990);
            while lab.now.mono < next && !lab.joined(0, 1) {
                lab.run(ms(1));
            }
        }
        let took = lab.now.mono - begun;
        assert!(lab.joined(0, 1) && took <= ms(2500), "The session took {took:?}.");
    }
}
