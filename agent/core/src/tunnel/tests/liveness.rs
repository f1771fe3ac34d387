//! Detection of unreachable peers and of their return.

use super::*;
use crate::tunnel::UnreachableReason;

#[test]
fn dead_peer_is_detected_within_5_s_and_recovers() {
    let mut lab = Lab::joined_pair();
    lab.flow(0, 1, ms(20));
    lab.flow(1, 0, ms(20));
    lab.run(secs(10));
    lab.underlay.cut.extend([(0, 1), (1, 0)]);
    let unreachable = |lab: &mut Lab| {
        lab.state(0, 1) == PeerState::Unreachable && lab.state(1, 0) == PeerState::Unreachable
    };
    let took = lab.run_until(secs(6), unreachable);
    assert!(took >= ms(2900) && took <= ms(3550), "{took:?}");
    assert_eq!(lab.view(0, 1).reason, Some(UnreachableReason::Silent));
    let tries = lab.count(0, HandshakeResult::Initiated);
    lab.run(secs(20));
    assert!(lab.count(0, HandshakeResult::Initiated) > tries, "Handshakes must be repeated.");
    lab.underlay.cut.clear();
    let took = lab.run_until(secs(6), |lab| {
        lab.state(0, 1) == PeerState::Established && lab.state(1, 0) == PeerState::Established
    });
    // The session is still valid, so that the next packet suffices.
    assert!(took <= ms(1100), "{took:?}");
}

/// Pattern of traffic between the first two nodes.
#[derive(Debug, Clone, Copy)]
enum Talk {
    OneWay(usize),
    BothWays,
    /// The first node sends requests, the second answers.
    Requests,
}

impl Talk {
    const ALL: [Self; 4] = [Self::OneWay(0), Self::OneWay(1), Self::BothWays, Self::Requests];

    fn begin(self, lab: &mut Lab, interval: Duration) {
        match self {
            Self::OneWay(from) => lab.flow(from, 1 - from, interval),
            Self::BothWays => {
                lab.flow(0, 1, interval);
                lab.flow(1, 0, interval);
            }
            Self::Requests => {
                lab.nodes[1].answers = true;
                lab.flow(0, 1, interval);
            }
        }
    }
}

fn both_are(lab: &Lab, state: PeerState) -> bool {
    lab.state(0, 1) == state && lab.state(1, 0) == state
}

/// The node that receives everything learns from the peer's pings that it is not heard. The node
/// that receives nothing detects this even if it has nothing to send.
#[test]
fn dead_direction_is_detected_at_both_ends_within_5_s() {
    for talk in Talk::ALL {
        for (interval, phase) in [(20, 0), (20, 70), (20, 130), (20, 210), (600, 0), (600, 590)] {
            let mut lab = Lab::joined_pair();
            talk.begin(&mut lab, ms(interval));
            lab.run(secs(10) + ms(phase));
            lab.underlay.cut.insert((0, 1));
            let noticed = |lab: &mut Lab| both_are(lab, PeerState::Unreachable);
            let took = lab.run_until(secs(7), noticed);
            assert!(took <= ms(3600), "{talk:?}, every {interval} ms, {phase} ms on: {took:?}");
            assert_eq!(lab.view(0, 1).reason, Some(UnreachableReason::Deaf), "{talk:?}");
            assert_eq!(lab.view(1, 0).reason, Some(UnreachableReason::Silent), "{talk:?}");
            lab.run(secs(5));
            assert!(both_are(&lab, PeerState::Unreachable), "{talk:?}");
            lab.underlay.cut.clear();
            let took = lab.run_until(secs(6), |lab| both_are(lab, PeerState::Established));
            assert!(took <= ms(1600), "{talk:?}: {took:?}");
        }
    }
}

#[test]
fn peer_without_answers_is_detected_within_5_s() {
    let mut lab = Lab::new(2);
    lab.underlay.cut.insert((0, 1));
    lab.send(0, 1, b"the only one");
    let took = lab.run_until(secs(7), |lab| lab.state(0, 1) == PeerState::Unreachable);
    assert!(took <= ms(3100), "{took:?}");
    assert_eq!(lab.view(0, 1).reason, Some(UnreachableReason::NoAnswer));
}

#[test]
fn ten_percent_loss_makes_no_peer_unreachable() {
    for (seed, talk) in Talk::ALL.into_iter().enumerate() {
        for interval in [100, 1300] {
            let mut lab = Lab::joined_pair();
            lab.rng = Rng(seed as u64 + interval);
            lab.underlay.loss_percent = 10;
            lab.underlay.duplicate_percent = 10;
            lab.underlay.delay = ms(10);
            lab.underlay.jitter = ms(60);
            talk.begin(&mut lab, ms(interval));
            // One hour.
            for _ in 0..36_000 {
                lab.run(ms(100));
                let told = [lab.view(0, 1).reason, lab.view(1, 0).reason];
                assert_eq!(told, [None, None], "{talk:?}, every {interval} ms");
            }
        }
    }
}

/// The end of a conversation costs a few messages; afterwards no datagram is sent.
#[test]
fn end_of_conversation_causes_few_pings() {
    for talk in Talk::ALL {
        let mut lab = Lab::joined_pair();
        talk.begin(&mut lab, ms(20));
        lab.run(secs(30));
        lab.nodes.iter_mut().for_each(|node| node.flow = None);
        let before = lab.trace.len();
        lab.run(secs(3));
        let asked = lab.trace.len() - before;
        assert!((2..=8).contains(&asked), "{talk:?}: {asked} messages, the path's included");
        lab.run(secs(14));
        let before = lab.trace.len();
        lab.run(secs(60));
        assert_eq!(lab.trace.len(), before, "{talk:?}: Idle peers must send nothing.");
        assert!(!both_are(&lab, PeerState::Unreachable));
    }
}

#[test]
fn one_sided_traffic_keeps_both_nodes_established() {
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
fn two_sided_traffic_sends_only_path_probes() {
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
fn second_endpoint_replaces_dead_first_endpoint() {
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
fn unknown_session_starts_one_handshake_per_2_s() {
    let mut lab = Lab::new(2);
    let source = lab.nodes[1].config.addresses[0].ip();
    lab.underlay.cut.insert((0, 1));
    for _ in 0..10 {
        lab.nodes[0].engine.on_unknown_session(lab.now, source);
        lab.nodes[0].engine.on_unknown_session(lab.now, "203.0.113.1".parse().unwrap());
    }
    lab.collect(0);
    assert_eq!(lab.count(0, HandshakeResult::Initiated), 1);
    // The source may be spoofed: 16 bytes must not cause a series of initiations.
    lab.run(secs(30));
    assert_eq!(lab.count(0, HandshakeResult::Initiated), 1);
    lab.nodes[0].engine.on_unknown_session(lab.now, source);
    lab.collect(0);
    assert_eq!(lab.count(0, HandshakeResult::Initiated), 2);

    // A session in which datagrams arrive is not disturbed by spoofed datagrams.
    let mut lab = Lab::joined_pair();
    lab.flow(0, 1, ms(10));
    lab.flow(1, 0, ms(10));
    let tries = lab.count(0, HandshakeResult::Initiated);
    for _ in 0..1000 {
        lab.nodes[0].engine.on_unknown_session(lab.now, source);
        lab.run(ms(20));
    }
    assert_eq!(lab.count(0, HandshakeResult::Initiated), tries);
}
