//! Handshakes between nodes: convergence, negotiation, retries, endpoints.

use std::net::SocketAddrV6;

use super::*;
use crate::tunnel::session::Cipher;
use crate::tunnel::{EngineError, UnreachableReason};

#[test]
fn first_packet_creates_session_for_both_directions() {
    for (from, to) in [(0, 1), (1, 0)] {
        let mut lab = Lab::new(2);
        lab.nodes[from].engine.poll_tables_changed();
        assert!(!lab.send(from, to, b"first"));
        assert_eq!(lab.state(from, to), PeerState::Connecting);
        lab.run(ms(20));
        assert!(lab.joined(from, to));
        assert!(
            lab.nodes[from].engine.poll_tables_changed()
                && lab.nodes[to].engine.poll_tables_changed()
        );
        let (a, b) = (lab.current(from, to).unwrap(), lab.current(to, from).unwrap());
        assert!(a.initiator && !b.initiator);
        assert_eq!(a.cipher, Cipher::Aes256Gcm);
        assert_eq!((a.local_lanes, a.remote_lanes), (2, 2));
        for (x, y) in [(from, to), (to, from)] {
            assert!(lab.send(x, y, b"hello"));
            lab.run(ms(20));
            assert_eq!(lab.nodes[y].received, [b"hello"]);
            assert_eq!(lab.state(x, y), PeerState::Established);
            assert_eq!(lab.view(x, y).mtu, Some(1440));
        }
        assert_eq!(lab.count(from, HandshakeResult::Initiated), 1);
        assert_eq!(lab.count(from, HandshakeResult::CompletedInitiator), 1);
        assert_eq!(lab.count(to, HandshakeResult::CompletedResponder), 1);
        // The round trip of the simulated underlay is 2 ms.
        assert_eq!(lab.view(from, to).round_trip, Some(ms(2)));
    }
}

#[test]
fn responder_sends_only_in_confirmed_session() {
    let mut lab = Lab::new(2);
    lab.send(0, 1, b"first");
    lab.run(ms(1));
    // The initiation has arrived, the response has not.
    assert!(lab.view(1, 0).current.is_none());
    assert_eq!(lab.view(1, 0).receive.len(), 1);
    assert_eq!(lab.state(1, 0), PeerState::Connecting);
    lab.run(ms(1));
    assert!(lab.view(0, 1).current.is_some());
    assert!(lab.view(1, 0).current.is_none());
    lab.run(ms(1));
    assert!(lab.joined(0, 1));
}

#[test]
fn data_confirms_session_after_lost_first_ping() {
    let mut lab = Lab::new(2);
    lab.send(0, 1, b"first");
    lab.run_until(secs(1), |lab| lab.current(0, 1).is_some());
    lab.wire.clear();
    assert!(lab.view(1, 0).current.is_none());
    assert!(lab.send(0, 1, b"data"));
    lab.run(ms(300));
    assert!(lab.joined(0, 1));
}

#[test]
fn lost_first_ping_is_repeated() {
    let mut lab = Lab::new(2);
    lab.send(0, 1, b"first");
    lab.run_until(secs(1), |lab| lab.current(0, 1).is_some());
    lab.wire.clear();
    lab.run(ms(1500));
    assert!(lab.joined(0, 1));
}

#[test]
fn simultaneous_initiations_converge_on_one_session() {
    for delay in [ms(0), ms(1), ms(40), ms(400)] {
        for skew in [0, 1, 39, 41] {
            for first in [0, 1] {
                let mut lab = Lab::new(2);
                lab.underlay.delay = delay;
                lab.send(first, 1 - first, b"a");
                lab.run(ms(skew));
                lab.send(1 - first, first, b"b");
                lab.run(secs(3));
                assert!(lab.joined(0, 1), "{delay:?} {skew} {first}");
                let initiators = [lab.current(0, 1), lab.current(1, 0)];
                let initiators = initiators.iter().flatten().filter(|s| s.initiator).count();
                assert_eq!(
                    initiators, 1,
                    "Exactly one node must be the initiator, which renews the session."
                );
            }
        }
    }
}

#[test]
fn simultaneous_initiations_with_reordering_connect() {
    for seed in 0..200 {
        let mut lab = Lab::new(2);
        lab.rng = Rng(seed);
        lab.underlay.jitter = ms(30);
        lab.underlay.duplicate_percent = 20;
        lab.send(0, 1, b"a");
        lab.send(1, 0, b"b");
        lab.run(secs(2));
        assert!(lab.send(0, 1, b"a") && lab.send(1, 0, b"b"));
        lab.run(secs(1));
        assert_eq!(lab.nodes[0].received.len(), 1, "seed {seed}");
        assert_eq!(lab.nodes[1].received.len(), 1, "seed {seed}");
    }
}

/// A handshake of a node ends when that of its peer completes, whichever of the two has the greater
/// key.
#[test]
fn session_of_peer_ends_own_handshake() {
    for mute in [0, 1] {
        let mut lab = Lab::new(2);
        lab.underlay.mute = Some((mute, MessageType::Initiation));
        lab.send(mute, 1 - mute, b"a");
        lab.run(ms(100));
        lab.send(1 - mute, mute, b"b");
        lab.run(ms(100));
        assert!(lab.joined(0, 1));
        lab.run(secs(20));
        assert_eq!(lab.count(mute, HandshakeResult::Initiated), 1);
        assert_eq!(lab.count(mute, HandshakeResult::Timeout), 0);
    }
}

#[test]
fn cipher_is_one_that_both_nodes_offer() {
    let chacha = Ciphers { aes256_gcm: false, ..ALL_CIPHERS };
    let aes = Ciphers { chacha20_poly1305: false, ..ALL_CIPHERS };
    let software = Ciphers { aes_hardware: false, ..ALL_CIPHERS };
    for (theirs, expected) in [
        (chacha, Cipher::ChaCha20Poly1305),
        (aes, Cipher::Aes256Gcm),
        (software, Cipher::ChaCha20Poly1305),
    ] {
        let mut lab = Lab::new(2);
        lab.reconfigure(1, |config| config.ciphers = theirs);
        lab.send(0, 1, b"first");
        lab.run(ms(20));
        assert!(lab.joined(0, 1));
        assert_eq!(lab.current(0, 1).unwrap().cipher, expected);
        assert_eq!(lab.current(1, 0).unwrap().cipher, expected);
        assert!(lab.send(1, 0, b"hello"));
        lab.run(ms(20));
        assert_eq!(lab.nodes[0].received, [b"hello"]);
    }
}

#[test]
fn missing_common_cipher_has_its_own_reason() {
    let mut lab = Lab::new(2);
    lab.reconfigure(0, |config| config.ciphers.aes256_gcm = false);
    lab.reconfigure(1, |config| config.ciphers.chacha20_poly1305 = false);
    lab.send(0, 1, b"first");
    lab.run(ms(20));
    assert_eq!(lab.count(1, HandshakeResult::NoCommonCipher), 1);
    assert_eq!(lab.view(1, 0).reason, Some(UnreachableReason::NoCommonCipher));
    assert!(lab.view(0, 1).receive.is_empty() && lab.view(1, 0).receive.is_empty());
}

#[test]
fn lanes_are_negotiated_per_direction() {
    let mut lab = Lab::new(2);
    lab.reconfigure(0, |config| config.lanes = 1);
    lab.reconfigure(1, |config| config.lanes = 64);
    lab.send(0, 1, b"first");
    lab.run(ms(20));
    let (a, b) = (lab.current(0, 1).unwrap(), lab.current(1, 0).unwrap());
    assert_eq!((a.local_lanes, a.remote_lanes), (1, 64));
    assert_eq!((b.local_lanes, b.remote_lanes), (64, 1));
}

#[test]
fn requested_initiations_are_repeated_with_backoff() {
    let mut lab = Lab::new(2);
    lab.underlay.cut.insert((0, 1));
    lab.flow(0, 1, ms(100));
    let mut at = Vec::new();
    for _ in 0..6000 {
        let before = lab.count(0, HandshakeResult::Initiated);
        lab.run(ms(10));
        if lab.count(0, HandshakeResult::Initiated) > before {
            at.push(lab.now.mono);
        }
    }
    let gaps: Vec<_> = at.windows(2).map(|w| w[1] - w[0]).collect();
    assert!(gaps[0] >= ms(980) && gaps[0] <= ms(1300), "{gaps:?}");
    assert!(gaps[1] >= ms(1480) && gaps[1] <= ms(1900), "{gaps:?}");
    assert!(gaps.iter().all(|gap| *gap <= ms(5020)), "{gaps:?}");
    assert!(gaps.iter().skip(4).all(|gap| *gap >= ms(4980)), "{gaps:?}");
    let timeouts = lab.count(0, HandshakeResult::Timeout);
    assert_eq!(timeouts, at.len() as u64 - 1);
    assert_eq!(lab.view(0, 1).reason, Some(UnreachableReason::NoAnswer));
    assert_eq!(lab.state(0, 1), PeerState::Unreachable);

    lab.underlay.cut.clear();
    let took = lab.run_until(secs(6), |lab| lab.joined(0, 1));
    assert!(took <= secs(6));
    assert_eq!(lab.state(0, 1), PeerState::Established);
}

#[test]
fn handshake_without_further_requests_is_abandoned() {
    let mut lab = Lab::new(2);
    lab.underlay.cut.insert((0, 1));
    lab.send(0, 1, b"first");
    lab.run(secs(25));
    let tries = lab.count(0, HandshakeResult::Initiated);
    assert!((4..=8).contains(&tries), "{tries}");
    assert_eq!(lab.count(0, HandshakeResult::Timeout), tries);
    assert_eq!(lab.state(0, 1), PeerState::Idle);
    assert_eq!(
        lab.nodes[0].engine.poll_timeout(),
        None,
        "An abandoned handshake must leave no deadline."
    );
    lab.run(secs(100));
    assert_eq!(lab.count(0, HandshakeResult::Initiated), tries);
}

#[test]
fn initiations_alternate_between_endpoints() {
    let mut lab = Lab::unacquainted(2);
    let dead: Vec<SocketAddr> =
        ["192.0.2.98:51900", "[2001:db8::99]:51900"].map(|a| a.parse().unwrap()).to_vec();
    let live = lab.nodes[1].config.addresses[0];
    let endpoints = vec![dead[0], dead[1], live];
    let config = PeerConfig { public_key: lab.key(1), second_key: None, endpoints };
    lab.nodes[0].engine.upsert_peer(lab.now, config);
    lab.introduce(1, 0);
    lab.flow(0, 1, ms(500));
    lab.run_until(secs(4), |lab| lab.joined(0, 1));
    let tried: Vec<_> = lab.trace.iter().filter(|d| d.from == 0).map(|d| d.destination).collect();
    assert_eq!(tried[..3], [dead[0], dead[1], live]);
    assert_eq!(lab.view(0, 1).endpoint, Some(live));
}

#[test]
fn changed_record_takes_effect_at_once() {
    let mut lab = Lab::joined_pair();
    let new: SocketAddr = "192.0.2.77:51900".parse().unwrap();
    lab.nodes[1].config.addresses = vec![new];
    lab.nodes[0].engine.poll_tables_changed();
    lab.introduce(0, 1);
    lab.collect(0);
    assert!(lab.current(0, 1).is_some(), "The session must stay.");
    lab.run(ms(2));
    assert!(lab.nodes[0].engine.poll_tables_changed());
    assert_eq!(
        lab.view(0, 1).endpoint,
        Some(new),
        "The new endpoint must be used after one round trip."
    );
    assert!(lab.send(0, 1, b"there"));
    lab.run(ms(20));
    assert!(lab.joined(0, 1));
    assert_eq!(lab.nodes[1].received, [b"there"]);
    // The same record again changes nothing.
    lab.nodes[0].engine.poll_tables_changed();
    lab.introduce(0, 1);
    assert!(!lab.nodes[0].engine.poll_tables_changed());
}

#[test]
fn changed_record_redirects_pending_handshake() {
    let mut lab = Lab::unacquainted(2);
    let dead = vec!["192.0.2.98:51900".parse().unwrap()];
    let config = PeerConfig { public_key: lab.key(1), second_key: None, endpoints: dead };
    lab.nodes[0].engine.upsert_peer(lab.now, config);
    lab.introduce(1, 0);
    lab.send(0, 1, b"first");
    lab.run(ms(100));
    let other = "192.0.2.99:51900".parse().unwrap();
    lab.nodes[1].config.addresses.push(other);
    lab.underlay.dead.insert(other);
    lab.introduce(0, 1);
    lab.run(ms(20));
    assert!(lab.joined(0, 1), "The changed record must not wait for the next retry.");
}

#[test]
fn peer_without_endpoints_can_initiate() {
    let mut lab = Lab::unacquainted(2);
    let config = PeerConfig { public_key: lab.key(1), second_key: None, endpoints: Vec::new() };
    let id = lab.nodes[0].engine.upsert_peer(lab.now, config);
    lab.introduce(1, 0);
    lab.nodes[0].engine.request_session(lab.now, id);
    assert!(lab.nodes[0].engine.poll_transmit().is_none());
    assert_eq!(lab.view(0, 1).reason, Some(UnreachableReason::NoEndpoint));
    lab.send(1, 0, b"first");
    lab.run(ms(20));
    assert!(lab.joined(0, 1));
    assert_eq!(lab.view(0, 1).endpoint, Some(lab.nodes[1].config.addresses[0]));
}

#[test]
fn nodes_of_different_clusters_never_connect() {
    let mut lab = Lab::new(2);
    lab.reconfigure(1, |config| config.cluster = "other");
    lab.send(0, 1, b"first");
    lab.run(secs(3));
    assert!(lab.view(0, 1).receive.is_empty() && lab.view(1, 0).receive.is_empty());
    assert!(lab.dropped(1, DropReason::HandshakeInvalid) >= 2);
}

#[test]
fn unknown_key_is_refused() {
    let mut lab = Lab::unacquainted(2);
    lab.introduce(0, 1);
    lab.send(0, 1, b"first");
    lab.run(ms(20));
    assert_eq!(lab.dropped(1, DropReason::HandshakeUnknownPeer), 1);
    assert_eq!(lab.count(1, HandshakeResult::UnknownPeer), 1);
    assert!(
        lab.trace.iter().all(|datagram| datagram.from == 0),
        "A node must not answer an unknown key."
    );
}

#[test]
fn peer_behind_mtu_below_handshake_size_is_unreachable() {
    let mut lab = Lab::new(2);
    lab.underlay.mtu = 160;
    lab.flow(0, 1, ms(200));
    lab.run(secs(20));
    assert_eq!(lab.state(0, 1), PeerState::Unreachable);
    assert_eq!(lab.state(1, 0), PeerState::Idle);
    lab.nodes[0].flow = None;
    lab.run(secs(30));
    assert_eq!(lab.state(0, 1), PeerState::Idle);
    assert_eq!(lab.nodes[0].engine.poll_timeout(), None);
    // Every handshake message fits the smallest MTU of IPv6.
    assert!(lab.trace.iter().all(|datagram| datagram.payload.len() <= 1232));
}

#[test]
fn invalid_settings_are_refused() {
    let config = |lanes, listen_port, aes256_gcm| EngineConfig {
        private_key: PrivateKey::new(&[1; 32]),
        cluster_id: String::new(),
        listen_port,
        lanes,
        ciphers: Ciphers { aes256_gcm, chacha20_poly1305: false, aes_hardware: true },
        mtu: 1440,
        ecn: false,
    };
    let error = |config| Engine::new(config, Box::new(|_| {})).err();
    assert_eq!(error(config(0, 1, true)), Some(EngineError::Lanes(0)));
    assert_eq!(error(config(65, 1, true)), Some(EngineError::Lanes(65)));
    assert_eq!(error(config(64, 0, true)), Some(EngineError::ListenPort));
    assert_eq!(error(config(64, 1, false)), Some(EngineError::NoCipher));
    assert_eq!(error(config(64, 1, true)), None);
}

#[test]
fn session_propagates_ecn_only_if_both_nodes_do() {
    for (here, there) in [(true, true), (true, false), (false, true), (false, false)] {
        let mut lab = Lab::new(2);
        lab.reconfigure(0, |config| config.ecn = here);
        lab.reconfigure(1, |config| config.ecn = there);
        lab.send(0, 1, b"first");
        lab.run(ms(500));
        assert!(lab.joined(0, 1));
        for (node, peer) in [(0, 1), (1, 0)] {
            let session = lab.current(node, peer).unwrap();
            assert_eq!(session.ecn, here && there, "node {node}: {here} here, {there} there");
        }
    }
}

#[test]
fn link_local_endpoint_keeps_its_scope() {
    let mut lab = Lab::unacquainted(2);
    // The same address exists on two links, as two hosts may have it.
    let at = |scope, host| {
        let address = [0xfe80, 0, 0, 0, 0, 0, 0, host].into();
        SocketAddr::from(SocketAddrV6::new(address, PORT, 0, scope))
    };
    for (node, host) in [(0, 1), (1, 2)] {
        lab.reconfigure(node, |config| config.addresses = vec![at(3, host), at(4, host)]);
    }
    lab.introduce(0, 1);
    lab.introduce(1, 0);
    lab.underlay.dead.extend([at(3, 1), at(3, 2)]);
    lab.flow(0, 1, ms(100));
    lab.run(secs(8));
    assert!(lab.joined(0, 1), "The second endpoint must be tried, too.");
    assert_eq!(lab.view(0, 1).endpoint, Some(at(4, 2)));
    assert_eq!(lab.view(1, 0).endpoint, Some(at(4, 1)), "The answer must use the same link.");
}
