//! The life cycle of sessions: renewal, end, restarts, and many peers.

use super::*;
use crate::tunnel::session::{COUNTER_LIMIT, COUNTER_REKEY};

#[test]
fn session_in_use_is_renewed_at_120_s_without_loss() {
    for loud in [&[0][..], &[1], &[0, 1]] {
        let mut lab = Lab::joined_pair();
        lab.underlay.delay = ms(30);
        lab.underlay.jitter = ms(20);
        let first = lab.current(0, 1).unwrap();
        for &node in loud {
            lab.flow(node, 1 - node, ms(7));
        }
        lab.run(secs(119));
        assert!(Arc::ptr_eq(&lab.current(0, 1).unwrap(), &first));
        lab.run(secs(3));
        let second = lab.current(0, 1).unwrap();
        assert!(!Arc::ptr_eq(&second, &first) && lab.joined(0, 1));
        assert!(second.initiator, "The initiator must renew the session.");
        assert!(!first.is_expired(), "The old session must still accept datagrams in flight.");
        assert_eq!(lab.view(1, 0).receive.len(), 2);
        lab.run(secs(70));
        assert!(first.is_expired());
        assert_eq!(lab.view(0, 1).receive.len(), 1);
        lab.run(secs(1000));
        for &node in loud {
            lab.nodes[node].flow = None;
        }
        lab.run(ms(200));
        for &node in loud {
            assert_eq!(lab.nodes[1 - node].received.len() as u64, lab.nodes[node].sent);
            assert!(lab.nodes[node].sent > 1190 * 140);
        }
        for node in [0, 1] {
            assert!(lab.nodes[node].drops.is_empty());
            assert_eq!(lab.count(node, HandshakeResult::Timeout), 0);
        }
        let renewals = lab.count(0, HandshakeResult::CompletedInitiator);
        assert_eq!((renewals, lab.count(1, HandshakeResult::Initiated)), (10, 0));
    }
}

#[test]
fn responder_renews_if_initiator_does_not() {
    let mut lab = Lab::joined_pair();
    let first = lab.current(1, 0).unwrap();
    lab.underlay.mute = Some((0, MessageType::Initiation));
    lab.flow(1, 0, ms(20));
    lab.run(secs(134));
    assert!(Arc::ptr_eq(&lab.current(1, 0).unwrap(), &first));
    lab.run(secs(3));
    let second = lab.current(1, 0).unwrap();
    assert!(!Arc::ptr_eq(&second, &first) && second.initiator);
    assert!(lab.joined(0, 1));
}

#[test]
fn idle_session_ends_without_datagrams() {
    let mut lab = Lab::joined_pair();
    let session = lab.current(0, 1).unwrap();
    lab.send(0, 1, b"once");
    lab.run(secs(30));
    let sent = lab.trace.len();
    lab.run(secs(160));
    assert_eq!(lab.trace.len(), sent, "An idle session must send no datagram.");
    assert!(session.is_expired());
    for (a, b) in [(0, 1), (1, 0)] {
        assert!(lab.view(a, b).receive.is_empty() && lab.view(a, b).current.is_none());
        assert_eq!(lab.state(a, b), PeerState::Idle);
        assert_eq!(
            lab.nodes[a].engine.poll_timeout(),
            None,
            "A node without sessions must have no tick."
        );
    }
    assert!(!lab.send(1, 0, b"again"));
    lab.run(ms(20));
    assert!(lab.joined(0, 1));
}

#[test]
fn session_without_renewal_ends_at_180_s() {
    let mut lab = Lab::joined_pair();
    let session = lab.current(0, 1).unwrap();
    lab.flow(0, 1, ms(50));
    lab.run(secs(100));
    lab.underlay.cut.extend([(0, 1), (1, 0)]);
    lab.run_until(secs(90), |_| session.is_expired());
    let age = lab.now.since(session.established);
    assert!((secs(180)..secs(180) + ms(20)).contains(&age), "{age:?}");
    assert!(lab.view(0, 1).current.is_none());
    assert_eq!(lab.state(0, 1), PeerState::Unreachable);
    lab.underlay.cut.clear();
    lab.run_until(secs(6), |lab| lab.joined(0, 1));
}

#[test]
fn answer_uses_session_of_its_request() {
    let mut lab = Lab::joined_pair();
    lab.run(secs(30));
    let old = lab.current(1, 0).unwrap();
    lab.restart(0);
    assert!(!lab.send(0, 1, b"wanted"));
    lab.run_until(secs(1), |lab| lab.current(0, 1).is_some());
    // The request overtakes the ping that tells the engine of the new session.
    lab.wire.clear();
    assert!(lab.send(0, 1, b"question"));
    lab.run(ms(1));
    assert_eq!(lab.nodes[1].received.last().unwrap(), b"question");
    assert!(
        Arc::ptr_eq(&lab.current(1, 0).unwrap(), &old),
        "The engine must not know the new session yet."
    );
    // The restarted node can open the answer.
    assert!(lab.send(1, 0, b"answer"));
    lab.run(ms(1));
    assert_eq!(lab.nodes[0].received.last().unwrap(), b"answer");
    lab.run(ms(300));
    assert!(lab.joined(0, 1));
}

#[test]
fn restarted_initiator_reconnects_within_1_s() {
    restart(0, 0, ms(10));
    restart(0, 1, ms(10));
}

#[test]
fn restarted_responder_reconnects_within_1_s() {
    restart(1, 0, ms(10));
    restart(1, 1, ms(10));
}

/// Restarts node `who` while node `loud` sends, and checks that both reconnect.
fn restart(who: usize, loud: usize, interval: Duration) {
    let mut lab = Lab::joined_pair();
    lab.flow(loud, 1 - loud, interval);
    lab.run(secs(30));
    lab.restart(who);
    let took = lab.run_until(secs(3), |lab| lab.joined(0, 1));
    assert!(took <= secs(1), "{took:?}");
    let before = lab.nodes[1 - loud].received.len();
    lab.run(secs(1));
    assert!(lab.nodes[1 - loud].received.len() >= before + 90);
    assert_eq!(lab.state(0, 1), PeerState::Established);
    assert_eq!(lab.state(1, 0), PeerState::Established);
}

#[test]
fn both_restarted_nodes_reconnect() {
    let mut lab = Lab::joined_pair();
    lab.flow(0, 1, ms(10));
    lab.flow(1, 0, ms(10));
    lab.run(secs(5));
    lab.restart(0);
    lab.restart(1);
    let took = lab.run_until(secs(3), |lab| lab.joined(0, 1));
    assert!(took <= secs(1), "{took:?}");
}

#[test]
fn ended_sessions_are_replaced_by_new_ones() {
    let mut lab = Lab::joined_pair();
    lab.flow(0, 1, ms(10));
    lab.flow(1, 0, ms(10));
    lab.run(secs(5));
    let before = lab.current(0, 1).unwrap();
    let now = lab.now;
    lab.nodes[0].engine.end_sessions(now);
    assert!(
        lab.nodes[0].engine.poll_tables_changed(),
        "The lanes must learn that the sessions have ended."
    );
    let view = lab.view(0, 1);
    assert!(view.current.is_none() && view.next.is_none() && view.receive.is_empty());
    assert!(before.is_expired_at(now.mono), "A lane with old tables must not use the session.");
    let took = lab.run_until(secs(3), |lab| lab.joined(0, 1));
    assert!(took <= secs(1), "{took:?}");
    assert_ne!(lab.current(0, 1).unwrap().local_index, before.local_index);
    let received = [0, 1].map(|node| lab.nodes[node].received.len());
    lab.run(secs(1));
    for node in [0, 1] {
        assert!(lab.nodes[node].received.len() >= received[node] + 90);
    }
}

/// The machine is cloned between an initiation and its response. Both clones would create the same
/// session.
#[test]
fn response_to_ended_handshake_creates_no_session() {
    let mut lab = Lab::new(2);
    assert!(!lab.send(0, 1, b"wanted"));
    let now = lab.now;
    lab.nodes[0].engine.end_sessions(now);
    lab.run(secs(1));
    assert!(lab.current(0, 1).is_none());
    assert_eq!(lab.count(0, HandshakeResult::CompletedInitiator), 0);
}

#[test]
fn removed_peer_ends_at_once() {
    let mut lab = Lab::joined_pair();
    let session = lab.current(0, 1).unwrap();
    lab.flow(1, 0, ms(10));
    let id = lab.peer_id(0, 1);
    lab.nodes[0].engine.poll_tables_changed();
    lab.nodes[0].engine.remove_peer(id);
    assert!(session.is_expired() && lab.nodes[0].engine.poll_tables_changed());
    assert_eq!(lab.nodes[0].engine.tables().count(), 0);
    lab.nodes[0].engine.request_session(lab.now, id);
    assert!(lab.nodes[0].engine.poll_transmit().is_none());
    lab.run(secs(10));
    assert_eq!(lab.nodes[0].received.len(), 0);
    assert_eq!(lab.state(1, 0), PeerState::Unreachable);
    assert!(lab.dropped(0, DropReason::HandshakeUnknownPeer) > 0);
    // The peer is added again with another id.
    assert_ne!(lab.introduce(0, 1), id);
    lab.run_until(secs(6), |lab| lab.joined(0, 1));
    // Removing an unknown peer has no effect.
    lab.nodes[0].engine.remove_peer(id);
    assert!(lab.joined(0, 1));
}

#[test]
fn peer_has_at_most_four_sessions() {
    let mut lab = Lab::joined_pair();
    for _ in 0..20 {
        lab.restart(0);
        lab.send(0, 1, b"first");
        lab.run(secs(2));
        assert!(lab.joined(0, 1));
        assert!(lab.view(1, 0).receive.len() <= 4);
    }
    // Handshakes whose responses are all lost must not replace the session in use.
    let current = lab.current(1, 0).unwrap();
    lab.underlay.cut.insert((1, 0));
    for _ in 0..20 {
        lab.restart(0);
        lab.send(0, 1, b"first");
        lab.run(secs(2));
        assert!(Arc::ptr_eq(&lab.current(1, 0).unwrap(), &current));
        assert!(lab.view(1, 0).receive.len() <= 4);
    }
}

#[test]
fn session_is_renewed_before_counter_exhaustion() {
    let mut lab = Lab::joined_pair();
    let first = lab.current(1, 0).unwrap();
    first.sender(0).unwrap().set_counter(COUNTER_REKEY - 5);
    lab.flow(1, 0, ms(50));
    lab.run(ms(200));
    assert!(Arc::ptr_eq(&lab.current(1, 0).unwrap(), &first));
    lab.run(secs(1));
    assert!(!Arc::ptr_eq(&lab.current(1, 0).unwrap(), &first) && lab.joined(0, 1));
    const { assert!(COUNTER_REKEY < COUNTER_LIMIT) };
}

#[test]
fn loss_reordering_and_duplication_keep_sessions_working() {
    for (seed, loss, duplicate) in [(1, 30, 0), (2, 0, 30), (3, 30, 30), (4, 10, 90)] {
        let mut lab = Lab::new(2);
        lab.rng = Rng(seed);
        lab.underlay.loss_percent = loss;
        lab.underlay.duplicate_percent = duplicate;
        lab.underlay.delay = ms(5);
        lab.underlay.jitter = ms(50);
        lab.flow(0, 1, ms(10));
        lab.flow(1, 0, ms(13));
        lab.run(secs(600));
        for (a, b) in [(0, 1), (1, 0)] {
            assert_eq!(lab.state(a, b), PeerState::Established);
            let (sent, received) = (lab.nodes[a].sent, lab.nodes[b].received.len() as u64);
            assert!(received <= sent, "No packet may be received twice.");
            // A duplicated datagram has two chances to arrive, so this is a lower bound.
            let least = sent * (100 - loss) / 100 * 98 / 100;
            assert!(received > least, "seed {seed}: {received} of {sent}");
            let odd = |reason: &&DropReason| **reason != DropReason::Replayed;
            let odd = lab.nodes[b].drops.iter().filter(odd).count();
            assert!(odd < 20, "seed {seed}: {odd}");
        }
        let sessions = lab.count(0, HandshakeResult::CompletedInitiator)
            + lab.count(1, HandshakeResult::CompletedInitiator);
        assert!((5..12).contains(&sessions), "seed {seed}: {sessions}");
    }
}

#[test]
fn many_peers_get_separate_sessions() {
    let mut lab = Lab::new(8);
    for i in 0..8 {
        lab.flow(i, (i + 1) % 8, ms(50));
    }
    lab.run(secs(300));
    for i in 0..8 {
        let to = (i + 1) % 8;
        assert!(lab.joined(i, to));
        let (sent, received) = (lab.nodes[i].sent, lab.nodes[to].received.len() as u64);
        assert!(sent - received <= 1, "{sent} {received}");
        let others = (0..8).filter(|&j| j != i && j != to && j != (i + 7) % 8);
        for other in others {
            assert_eq!(
                lab.state(i, other),
                PeerState::Idle,
                "Only nodes that exchange data may have a session."
            );
        }
    }
}
