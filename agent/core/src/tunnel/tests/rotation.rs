//! Rotation of a node's key under traffic.

use super::*;

/// First bytes of the private keys of node 0: the old and the new one.
const OLD: u8 = 1;
const NEW: u8 = 77;

fn public(private: u8) -> PublicKey {
    engine(&NodeConfig { key: private, ..Lab::new(1).nodes[0].config.clone() }, 1).public_key()
}

impl Lab {
    /// Sets the private keys of node 0.
    fn hold(&mut self, first: u8, second: Option<u8>) {
        let key = |byte| PrivateKey::new(&[byte; 32]);
        self.nodes[0].engine.set_identity(key(first), second.map(key)).unwrap();
    }

    /// Adds a record of node 0 with the public keys of these private keys to `node`.
    fn record(&mut self, node: usize, first: u8, second: Option<u8>) -> PeerId {
        let config = PeerConfig {
            public_key: public(first),
            second_key: second.map(public),
            endpoints: self.nodes[0].config.addresses.clone(),
        };
        self.nodes[node].engine.upsert_peer(self.now, config)
    }
}

#[test]
fn handshake_filter_follows_the_identities() {
    let mut lab = Lab::joined_pair();
    let initiation = |to: u8| {
        let mut other = engine(&NodeConfig { key: 9, ..Lab::new(1).nodes[0].config.clone() }, 1);
        let endpoints = vec!["192.0.2.9:51900".parse().unwrap()];
        let peer = PeerConfig { public_key: public(to), second_key: None, endpoints };
        let peer = other.upsert_peer(Time::default(), peer);
        other.request_session(Time::default(), peer);
        other.poll_transmit().unwrap().payload
    };
    let (old, new) = (initiation(OLD), initiation(NEW));
    let passes = |lab: &Lab, payload: &[u8]| {
        let header = Header::parse(payload).unwrap();
        lab.nodes[0].engine.handshake_filter().check(header, payload).is_ok()
    };
    for (first, second, expected) in
        [(OLD, None, [true, false]), (OLD, Some(NEW), [true, true]), (NEW, None, [false, true])]
    {
        lab.nodes[0].engine.poll_tables_changed();
        lab.hold(first, second);
        assert!(lab.nodes[0].engine.poll_tables_changed(), "The lanes need the new filter.");
        assert_eq!([passes(&lab, &old), passes(&lab, &new)], expected, "{first} {second:?}");
    }
}

#[test]
fn key_rotation_under_traffic_loses_no_packet() {
    let mut lab = Lab::joined_pair();
    lab.underlay.delay = ms(20);
    lab.underlay.jitter = ms(10);
    lab.flow(0, 1, ms(5));
    lab.flow(1, 0, ms(7));
    let id = lab.peer_id(1, 0);
    // The rotation has three steps: announce the new key, switch to it, remove the old one. Records
    // and keys change in every possible order.
    lab.hold(OLD, Some(NEW));
    lab.run(secs(5));
    assert_eq!(lab.record(1, OLD, Some(NEW)), id);
    lab.run(secs(5));
    let first = lab.current(0, 1).unwrap();
    lab.hold(NEW, Some(OLD));
    lab.run(secs(10));
    let second = lab.current(0, 1).unwrap();
    assert!(!Arc::ptr_eq(&first, &second), "The session of the old key must be renewed at once.");
    assert_eq!(lab.record(1, NEW, Some(OLD)), id);
    lab.run(secs(10));
    assert_eq!(lab.record(1, NEW, None), id);
    assert!(!second.is_expired() && lab.joined(0, 1));
    lab.run(secs(1));
    lab.hold(NEW, None);
    lab.run(secs(300));
    for node in [0, 1] {
        lab.nodes[node].flow = None;
    }
    lab.run(secs(1));
    for node in [0, 1] {
        assert_eq!(lab.nodes[1 - node].received.len() as u64, lab.nodes[node].sent);
        assert!(lab.nodes[node].drops.is_empty(), "{:?}", lab.nodes[node].drops);
        assert_eq!(lab.count(node, HandshakeResult::Timeout), 0);
    }
    assert_eq!(lab.view(1, 0).public_key, public(NEW));
}

#[test]
fn key_rotation_spreads_renewals_over_time() {
    let mut lab = Lab::new(33);
    for peer in 1..33 {
        lab.send(0, peer, b"first");
    }
    lab.run(ms(100));
    for peer in 1..33 {
        lab.record(peer, OLD, Some(NEW));
        lab.flow(peer, 0, ms(50));
    }
    lab.run(secs(1));
    let begun = lab.count(0, HandshakeResult::Initiated);
    lab.hold(NEW, Some(OLD));
    lab.run(ms(300));
    let soon = lab.count(0, HandshakeResult::Initiated) - begun;
    assert!(soon < 16, "{soon} of 32 in the first ticks");
    lab.run(secs(15));
    assert_eq!(lab.count(0, HandshakeResult::Initiated) - begun, 32);
}

#[test]
fn peer_with_old_record_connects_by_other_key() {
    // The peer knows the new key only; the node still begins with the old one.
    let mut lab = Lab::new(2);
    lab.record(1, OLD, Some(NEW));
    lab.hold(NEW, None);
    lab.flow(1, 0, ms(100));
    let took = lab.run_until(secs(5), |lab| lab.joined(0, 1));
    assert!(took >= secs(1), "The first key must be tried first.");
    // The peer knows the old key only.
    let mut lab = Lab::new(2);
    lab.hold(NEW, Some(OLD));
    lab.flow(0, 1, ms(100));
    let id = lab.nodes[1].engine.peer_id(&public(OLD)).unwrap();
    lab.run_until(secs(5), |lab| lab.nodes[1].engine.peer(id).unwrap().current.is_some());
    assert!(lab.dropped(1, DropReason::HandshakeUnknownPeer) > 0);
}

#[test]
fn sessions_of_removed_key_end_at_once() {
    let mut lab = Lab::joined_pair();
    let session = lab.current(1, 0).unwrap();
    let id = lab.peer_id(1, 0);
    assert_eq!(lab.record(1, OLD, Some(NEW)), id);
    assert!(!session.is_expired());
    lab.nodes[1].engine.poll_tables_changed();
    assert_eq!(lab.record(1, NEW, None), id);
    assert!(session.is_expired() && lab.nodes[1].engine.poll_tables_changed());
    assert!(lab.nodes[1].engine.peer_id(&public(OLD)).is_none());
    // A holder of the old key, for example a thief, is an unknown sender.
    lab.flow(0, 1, ms(100));
    lab.run(secs(10));
    assert!(lab.dropped(1, DropReason::HandshakeUnknownPeer) > 0);
    assert!(lab.nodes[1].received.is_empty());
}

/// A thief of a key can make the owner's handshakes with that key look old, but not those with the
/// next key.
#[test]
fn removed_key_loses_its_timestamp() {
    let mut lab = Lab::joined_pair();
    let wall = lab.now.wall;
    lab.now.wall += secs(10_000_000);
    lab.restart(0);
    lab.send(0, 1, b"from the future");
    lab.run(secs(1));
    lab.now.wall = wall + secs(60);
    lab.restart(0);
    lab.flow(0, 1, ms(100));
    lab.run(secs(5));
    assert!(lab.dropped(1, DropReason::HandshakeReplayed) > 0);
    lab.hold(NEW, None);
    lab.record(1, NEW, None);
    lab.run_until(secs(6), |lab| lab.joined(0, 1));
}

#[test]
fn peers_on_second_identity_are_counted() {
    let mut lab = Lab::new(2);
    lab.hold(NEW, Some(OLD));
    lab.flow(0, 1, ms(100));
    lab.run(secs(5));
    assert_eq!(
        lab.nodes[0].engine.peers_on_second_identity(),
        1,
        "its record has the old key alone"
    );
    lab.record(1, NEW, Some(OLD));
    lab.run(secs(8));
    assert_eq!(lab.nodes[0].engine.peers_on_second_identity(), 0);
}

#[test]
fn key_belongs_to_one_peer() {
    let mut lab = Lab::new(3);
    let (one, two) = (lab.peer_id(2, 0), lab.peer_id(2, 1));
    // The only key of the second peer becomes the second key of the first peer, which removes the
    // second peer.
    let config =
        PeerConfig { public_key: lab.key(0), second_key: Some(lab.key(1)), endpoints: Vec::new() };
    assert_eq!(lab.nodes[2].engine.upsert_peer(lab.now, config), one);
    assert!(lab.nodes[2].engine.peer(two).is_none());
    assert_eq!(lab.nodes[2].engine.peer_id(&lab.key(1)), Some(one));
}
