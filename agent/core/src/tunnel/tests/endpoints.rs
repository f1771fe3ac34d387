//! Destinations of data: only addresses at which the peer has answered a handshake.

use super::*;

fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

impl Lab {
    /// Adds a record of `peer` with these endpoints to `node`.
    fn record_at(&mut self, node: usize, peer: usize, endpoints: Vec<SocketAddr>) {
        let config = PeerConfig { public_key: self.key(peer), second_key: None, endpoints };
        self.nodes[node].engine.upsert_peer(self.now, config);
        self.collect(node);
    }

    /// Returns the types of all messages from `node` to an address.
    fn sent_to(&self, node: usize, to: SocketAddr) -> Vec<u8> {
        let sent = self.trace.iter().filter(|d| d.from == node && d.destination == to);
        sent.map(|datagram| datagram.payload[0]).collect()
    }

    /// Asserts that `node` has sent only initiations to an address. Returns their number.
    fn assert_only_initiations(&self, node: usize, to: SocketAddr) -> usize {
        let sent = self.sent_to(node, to);
        assert!(sent.iter().all(|kind| *kind == MessageType::Initiation as u8), "{sent:?}");
        sent.len()
    }
}

#[test]
fn data_goes_only_to_addresses_that_answered() {
    let mut lab = Lab::unacquainted(2);
    let victim = address("203.0.113.7:51900");
    lab.record_at(0, 1, vec![victim]);
    lab.introduce(1, 0);
    // An attacker controls node 1 and has written the victim's address into the record of node 1.
    // The session starts from node 1's real address. Node 0 must not send data to the victim.
    lab.flow(1, 0, ms(20));
    lab.flow(0, 1, ms(5));
    lab.run(secs(200));
    let handshakes = lab.assert_only_initiations(0, victim);
    assert!((10..60).contains(&handshakes), "{handshakes} handshakes in 200 s");
    assert!(lab.current(0, 1).is_some(), "There must be a session nevertheless.");
    assert_eq!(lab.view(0, 1).endpoint, None);
    assert_eq!(lab.state(0, 1), PeerState::Unreachable);
    assert_eq!(lab.nodes[1].received.len(), 0);
}

#[test]
fn address_of_stolen_node_is_left_within_180_seconds() {
    let mut lab = Lab::joined_pair();
    lab.flow(0, 1, ms(20));
    lab.run(secs(5));
    // The address now belongs to another host; the stolen node starts sessions from an address that
    // its record lacks.
    let before = lab.nodes[1].config.addresses[0];
    lab.nodes[1].config.addresses = vec![address("198.51.100.1:51900"), before];
    lab.underlay.dead.insert(before);
    lab.flow(1, 0, ms(20));
    for _ in 0..12 {
        lab.restart(1);
        lab.run(secs(15));
    }
    let sent = lab.trace.len();
    for _ in 0..4 {
        lab.restart(1);
        lab.run(secs(15));
    }
    let later = lab.trace.split_off(sent);
    lab.trace = later;
    assert!(lab.assert_only_initiations(0, before) > 3);
}

#[test]
fn changed_record_moves_data_without_loss() {
    for delay in [ms(1), ms(40)] {
        let mut lab = Lab::joined_pair();
        lab.underlay.delay = delay;
        lab.flow(0, 1, ms(3));
        lab.flow(1, 0, ms(5));
        lab.run(secs(3));
        let (old, new) = (lab.nodes[1].config.addresses[0], address("192.0.2.77:51900"));
        lab.nodes[1].config.addresses.push(new);
        lab.record_at(0, 1, vec![new]);
        lab.run(delay * 2 - ms(1));
        assert_eq!(
            lab.assert_only_initiations(0, new),
            1,
            "Only the handshake may be sent before its answer."
        );
        assert_eq!(lab.view(0, 1).endpoint, Some(old));
        lab.run(ms(2));
        assert_eq!(lab.view(0, 1).endpoint, Some(new));
        lab.run(secs(400));
        for node in [0, 1] {
            lab.nodes[node].flow = None;
        }
        lab.run(secs(1));
        for node in [0, 1] {
            assert_eq!(lab.nodes[1 - node].received.len() as u64, lab.nodes[node].sent);
            assert!(lab.nodes[node].drops.is_empty(), "{:?}", lab.nodes[node].drops);
        }
        assert!(lab.joined(0, 1));
    }
}

#[test]
fn changed_record_with_dead_address_costs_one_round_trip() {
    let mut lab = Lab::joined_pair();
    lab.underlay.delay = ms(20);
    lab.flow(0, 1, ms(2));
    lab.run(ms(500));
    let (old, new) = (lab.nodes[1].config.addresses[0], address("192.0.2.77:51900"));
    lab.underlay.dead.insert(old);
    lab.nodes[1].config.addresses.push(new);
    lab.record_at(0, 1, vec![new]);
    let took = lab.run_until(secs(1), |lab| lab.view(0, 1).endpoint == Some(new));
    assert!(took <= ms(42), "{took:?}");
    let lost = lab.nodes[0].sent - lab.nodes[1].received.len() as u64;
    lab.run(secs(5));
    assert!(lost <= 45, "{lost} packets of a round trip");
    let in_all = lab.nodes[0].sent - lab.nodes[1].received.len() as u64;
    assert!(in_all <= 45, "{in_all} packets lost");
}

#[test]
fn current_address_stays_until_session_ends() {
    let mut lab = Lab::joined_pair();
    lab.flow(0, 1, ms(50));
    lab.run(secs(1));
    let (old, nowhere) = (lab.nodes[1].config.addresses[0], address("203.0.113.7:51900"));
    lab.record_at(0, 1, vec![nowhere]);
    lab.run(secs(170));
    assert_eq!(lab.view(0, 1).endpoint, Some(old));
    assert_eq!(lab.state(0, 1), PeerState::Established);
    lab.run(secs(20));
    assert_eq!(lab.view(0, 1).endpoint, None, "The proof of the old address must have expired.");
    assert_eq!(lab.state(0, 1), PeerState::Unreachable);
    let sent = lab.sent_to(0, old).len();
    lab.run(secs(20));
    let later = &lab.sent_to(0, old)[sent..];
    assert!(later.iter().all(|kind| *kind <= 3), "Only handshakes may be sent there: {later:?}");
    assert!(
        lab.assert_only_initiations(0, nowhere) > 30,
        "Handshakes with the new address must be repeated."
    );
    // From now on a node answers at the new address.
    lab.nodes[1].config.addresses.push(nowhere);
    lab.run_until(secs(6), |lab| lab.view(0, 1).endpoint == Some(nowhere));
    lab.run(secs(1));
    assert!(lab.joined(0, 1));
}

/// The packets of the nodes leave from addresses that their records do not name.
#[test]
fn unlisted_sources_prove_listed_addresses() {
    let mut lab = Lab::unacquainted(2);
    let listed = [address("192.0.2.101:51900"), address("192.0.2.102:51900")];
    for node in [0, 1] {
        lab.nodes[node].config.addresses.push(listed[node]);
    }
    lab.record_at(0, 1, vec![listed[1]]);
    lab.record_at(1, 0, vec![listed[0]]);
    lab.flow(0, 1, ms(20));
    lab.run(ms(50));
    lab.flow(1, 0, ms(20));
    lab.run(secs(20));
    for (node, peer) in [(0, 1), (1, 0)] {
        assert_eq!(lab.view(node, peer).endpoint, Some(listed[peer]));
        assert_eq!(lab.state(node, peer), PeerState::Established);
        let unlisted = lab.nodes[peer].config.addresses[0];
        let sent = lab.sent_to(node, unlisted);
        assert!(sent.iter().all(|kind| *kind <= 3), "Only handshakes may be sent there: {sent:?}");
    }
    let before = lab.handshakes_begun();
    lab.run(secs(600));
    let begun = lab.handshakes_begun() - before;
    assert!((5..=14).contains(&begun), "{begun} handshakes in 600 s");
    for node in [0, 1] {
        lab.nodes[node].flow = None;
    }
    lab.run(secs(1));
    for node in [0, 1] {
        assert_eq!(lab.nodes[1 - node].received.len() as u64, lab.nodes[node].sent);
    }
}

impl Lab {
    fn handshakes_begun(&self) -> u64 {
        (0..2).map(|node| self.count(node, HandshakeResult::Initiated)).sum()
    }
}
