//! Peers fall silent and come back.

use super::*;
use crate::tunnel::Trouble;

#[test]
fn a_dead_peer_is_noticed_within_five_seconds_and_found_again() {
    let mut lab = Lab::joined_pair();
    lab.flow(0, 1, ms(20));
    lab.flow(1, 0, ms(20));
    lab.run(secs(10));
    lab.underlay.cut.extend([(0, 1), (1, 0)]);
    let unreachable = |lab: &mut Lab| {
        lab.state(0, 1) == PeerState::Unreachable && lab.state(1, 0) == PeerState::Unreachable
    };
    let took = lab.run_until(secs(6), unreachable);
    assert!(took >= secs(4) && took <= ms(5050), "{took:?}");
    assert_eq!(lab.view(0, 1).trouble, Some(Trouble::Silent));
    let tries = lab.count(0, HandshakeResult::Initiated);
    lab.run(secs(20));
    assert!(lab.count(0, HandshakeResult::Initiated) > tries, "it goes on trying");
    lab.underlay.cut.clear();
    let took = lab.run_until(secs(6), |lab| {
        lab.state(0, 1) == PeerState::Established && lab.state(1, 0) == PeerState::Established
    });
    // The session is still good: the next packet is enough.
    assert!(took <= ms(1100), "{took:?}");
}

#[test]
fn one_dead_direction_is_noticed_at_both_ends() {
    for flows in [&[0][..], &[1], &[0, 1]] {
        let mut lab = Lab::joined_pair();
        for &node in flows {
            lab.flow(node, 1 - node, ms(20));
        }
        lab.run(secs(10));
        lab.underlay.cut.insert((0, 1));
        let took = lab.run_until(secs(7), |lab| {
            flows.iter().all(|&node| lab.state(node, 1 - node) == PeerState::Unreachable)
        });
        assert!(took <= ms(5050), "{flows:?} {took:?}");
        lab.run(secs(5));
        lab.underlay.cut.clear();
        lab.run_until(secs(6), |lab| {
            lab.state(0, 1) == PeerState::Established && lab.state(1, 0) == PeerState::Established
        });
        let received = lab.nodes.iter().map(|n| n.received.len()).collect::<Vec<_>>();
        lab.run(secs(1));
        for &node in flows {
            assert!(lab.nodes[1 - node].received.len() > received[1 - node] + 40);
        }
    }
}

/// The end that hears everything learns from the other's pings that it is not heard itself.
#[test]
fn the_hearing_end_of_a_dead_direction_is_told() {
    let mut lab = Lab::joined_pair();
    lab.flow(0, 1, ms(20));
    lab.flow(1, 0, ms(20));
    lab.run(secs(10));
    lab.underlay.cut.insert((0, 1));
    lab.run_until(secs(6), |lab| lab.state(0, 1) == PeerState::Unreachable);
    assert_eq!(lab.view(0, 1).trouble, Some(Trouble::Deaf));
}

#[test]
fn one_sided_traffic_keeps_both_ends_well() {
    let mut lab = Lab::joined_pair();
    lab.flow(0, 1, ms(10));
    for _ in 0..400 {
        lab.run(ms(250));
        assert_eq!(lab.state(0, 1), PeerState::Established);
        assert_eq!(lab.state(1, 0), PeerState::Established);
    }
    let pings = lab.trace.iter().filter(|d| d.from == 0 && d.payload[0] == 5).count();
    assert!((60..130).contains(&pings), "about one a second, and the path's: {pings}");
}

#[test]
fn traffic_both_ways_needs_no_pings_but_for_the_path() {
    let mut lab = Lab::joined_pair();
    lab.underlay.delay = ms(25);
    lab.flow(0, 1, ms(10));
    lab.flow(1, 0, ms(10));
    lab.run(secs(100));
    for from in [0, 1] {
        let control = lab.trace.iter().filter(|d| d.from == from && d.payload[0] == 5).count();
        assert!((35..=46).contains(&control), "pings and pongs every 5 s: {control}");
    }
    assert!(lab.view(0, 1).round_trip.unwrap() > ms(30));
    assert_eq!(lab.view(1, 0).round_trip, Some(ms(50)));
    assert!(lab.view(1, 0).last_received.unwrap() >= lab.now.mono - ms(300));
}

#[test]
fn a_second_endpoint_takes_over_where_the_first_dies() {
    let mut lab = Lab::unacquainted(2);
    let second: SocketAddr = "198.51.100.2:51900".parse().unwrap();
    lab.nodes[1].config.addresses.push(second);
    lab.introduce(0, 1);
    lab.introduce(1, 0);
    lab.flow(0, 1, ms(20));
    lab.run(secs(5));
    let first = lab.nodes[1].config.addresses[0];
    assert_eq!(lab.view(0, 1).endpoint, Some(first));
    lab.underlay.dead.insert(first);
    lab.run_until(secs(12), |lab| {
        lab.view(0, 1).endpoint == Some(second) && lab.state(0, 1) == PeerState::Established
    });
    let received = lab.nodes[1].received.len();
    lab.run(secs(1));
    assert!(lab.nodes[1].received.len() > received + 40);
}

#[test]
fn what_came_from_an_unknown_session_starts_one_handshake_in_two_seconds() {
    let mut lab = Lab::new(2);
    let source = lab.nodes[1].config.addresses[0].ip();
    lab.underlay.cut.insert((0, 1));
    for _ in 0..10 {
        lab.nodes[0].engine.unknown_session(lab.now, source);
        lab.nodes[0].engine.unknown_session(lab.now, "203.0.113.1".parse().unwrap());
    }
    lab.collect(0);
    assert_eq!(lab.count(0, HandshakeResult::Initiated), 1);

    // A session that is heard is not disturbed by whoever forges such datagrams.
    let mut lab = Lab::joined_pair();
    lab.flow(0, 1, ms(10));
    lab.flow(1, 0, ms(10));
    let tries = lab.count(0, HandshakeResult::Initiated);
    for _ in 0..1000 {
        lab.nodes[0].engine.unknown_session(lab.now, source);
        lab.run(ms(20));
    }
    assert_eq!(lab.count(0, HandshakeResult::Initiated), tries);
}
