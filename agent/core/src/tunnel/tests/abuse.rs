//! Datagrams of attackers: spoofed, replayed and malformed handshakes, floods, and cookies.

use super::*;
use crate::tunnel::HandshakeFilter;
use crate::tunnel::cookie::{Mac, MacKeys, mac2};
use crate::tunnel::message::CLEAR_LEN;

/// Returns the first datagram of this type in the trace.
fn first_of(lab: &Lab, kind: MessageType) -> Datagram {
    lab.trace.iter().find(|d| d.payload[0] == kind as u8).unwrap().clone()
}

/// Delivers a datagram to `node` and sends the answers.
fn inject(lab: &mut Lab, node: usize, source: SocketAddr, mut payload: Vec<u8>) {
    lab.nodes[node].engine.handle_datagram(lab.now, source, &mut payload);
    lab.collect(node);
}

/// Performs a handshake up to the delivery of the datagram of this type. Returns that datagram and
/// its receiver.
fn intercept(kind: MessageType) -> (Lab, usize, Datagram) {
    let mut lab = Lab::new(2);
    lab.send(0, 1, b"first");
    lab.run_until(secs(1), |lab| lab.trace.iter().any(|d| d.payload[0] == kind as u8));
    let datagram = first_of(&lab, kind);
    lab.wire.clear();
    let to = 1 - datagram.from;
    (lab, to, datagram)
}

#[test]
fn handshake_with_flipped_byte_is_refused() {
    for kind in [MessageType::Initiation, MessageType::Response, MessageType::Control] {
        let (mut lab, to, datagram) = intercept(kind);
        let len = datagram.payload.len();
        // mac2 is not checked while the node is not under load.
        let covered = if kind == MessageType::Initiation { len - 16 } else { len };
        let before = lab.view(to, 1 - to).receive.len();
        for at in 0..covered {
            for bit in [1, 0x10, 0x80] {
                let mut payload = datagram.payload.clone();
                payload[at] ^= bit;
                inject(&mut lab, to, datagram.source, payload);
            }
        }
        assert_eq!(lab.view(to, 1 - to).receive.len(), before, "{kind:?}");
        assert!(lab.view(to, 1 - to).current.is_none());
        let dropped: u64 = lab.nodes[to].engine.drops().drain().map(|(_, n)| n).sum();
        assert_eq!(dropped, covered as u64 * 3);
        assert!(lab.wire.is_empty(), "No changed datagram may be answered.");

        inject(&mut lab, to, datagram.source, datagram.payload);
        lab.run(ms(20));
        assert!(lab.joined(0, 1), "{kind:?}");
    }
}

#[test]
fn handshake_filter_passes_only_messages_with_valid_mac1() {
    for kind in [MessageType::Initiation, MessageType::Response] {
        let (lab, to, datagram) = intercept(kind);
        let check = |filter: &HandshakeFilter, payload: &[u8]| {
            Header::parse(payload).and_then(|header| filter.check(header, payload))
        };
        let filter = lab.nodes[to].engine.handshake_filter();
        assert_eq!(check(&filter, &datagram.payload), Ok(()), "{kind:?}");
        let invalid = Err(DropReason::HandshakeInvalid);
        let others = [lab.nodes[datagram.from].engine.handshake_filter(), Default::default()];
        assert!(others.iter().all(|filter| check(filter, &datagram.payload) == invalid));
        let len = datagram.payload.len();
        // mac2 is outside of mac1.
        let covered = if kind == MessageType::Initiation { len - 16 } else { len };
        for at in 0..covered {
            let mut changed = datagram.payload.clone();
            changed[at] ^= 1;
            assert!(check(&filter, &changed).is_err(), "{kind:?}, byte {at}");
        }
        assert_eq!(check(&filter, &datagram.payload[..len - 1]), invalid);
    }
}

/// The attacker knows the receiver's public key and repairs mac1.
#[test]
fn handshake_with_flipped_byte_and_valid_mac1_is_refused() {
    for kind in [MessageType::Initiation, MessageType::Response] {
        let (mut lab, to, datagram) = intercept(kind);
        let keys = MacKeys::new(&lab.key(to));
        let tail = if kind == MessageType::Initiation { 32 } else { 16 };
        let end = datagram.payload.len() - tail;
        let before = lab.view(to, 1 - to).receive.len();
        for at in 0..end {
            // The interval keeps the node below the load at which it asks for cookies.
            lab.now = lab.now.after(ms(20));
            let mut payload = datagram.payload.clone();
            payload[at] ^= 0x40;
            let check = keys.mac1(&payload[..end]);
            payload[end..end + 16].copy_from_slice(&check);
            inject(&mut lab, to, datagram.source, payload);
        }
        assert_eq!(lab.view(to, 1 - to).receive.len(), before, "{kind:?}");
        let dropped: u64 = lab.nodes[to].engine.drops().drain().map(|(_, n)| n).sum();
        assert_eq!(dropped, end as u64);
        assert!(lab.wire.is_empty());
        inject(&mut lab, to, datagram.source, datagram.payload);
        lab.run(ms(20));
        assert!(lab.joined(0, 1), "{kind:?}");
    }
}

#[test]
fn truncated_and_extended_handshakes_are_refused() {
    for kind in [MessageType::Initiation, MessageType::Response] {
        let (mut lab, to, datagram) = intercept(kind);
        let before = lab.view(to, 1 - to).receive.len();
        for len in 0..datagram.payload.len() {
            inject(&mut lab, to, datagram.source, datagram.payload[..len].to_vec());
        }
        for more in [1, 16, 1000, 60_000] {
            let payload = [&datagram.payload[..], &vec![0; more]].concat();
            inject(&mut lab, to, datagram.source, payload);
        }
        assert_eq!(lab.view(to, 1 - to).receive.len(), before);
        assert!(lab.wire.is_empty());
    }
}

#[test]
fn replayed_initiation_is_refused_after_session_end() {
    let mut lab = Lab::joined_pair();
    let initiation = first_of(&lab, MessageType::Initiation);
    let current = lab.current(1, 0).unwrap();
    let sent = lab.trace.len();
    inject(&mut lab, 1, initiation.source, initiation.payload.clone());
    assert_eq!(lab.count(1, HandshakeResult::Replayed), 1);
    assert_eq!(lab.trace.len(), sent, "A replayed initiation must not be answered.");
    lab.run(secs(300));
    assert!(current.is_expired());
    inject(&mut lab, 1, initiation.source, initiation.payload);
    assert_eq!(lab.count(1, HandshakeResult::Replayed), 2);
    assert_eq!(lab.dropped(1, DropReason::HandshakeReplayed), 2);
    assert!(lab.view(1, 0).receive.is_empty());
}

#[test]
fn stopped_wall_clock_does_not_stop_handshakes() {
    let mut lab = Lab::joined_pair();
    for _ in 0..3 {
        lab.now.wall = lab.now.wall.saturating_sub(secs(1000));
        lab.flow(0, 1, ms(100));
        let sessions = lab.count(1, HandshakeResult::CompletedResponder);
        lab.run(secs(125));
        assert_eq!(lab.count(1, HandshakeResult::CompletedResponder), sessions + 1);
    }
    assert_eq!(lab.count(1, HandshakeResult::Replayed), 0);
}

/// The restarted node has lost its last timestamp; only the stored wall-clock time helps.
#[test]
fn restart_with_earlier_clock_and_stored_time_connects() {
    let mut lab = Lab::joined_pair();
    let before = lab.now.wall;
    lab.now.wall -= secs(5 * 3600);
    lab.restart(0);
    lab.send(0, 1, b"wanted");
    lab.run(secs(3));
    assert!(!lab.joined(0, 1), "Without the stored time the initiation must count as a replay.");
    assert!(lab.count(1, HandshakeResult::Replayed) > 0);
    lab.restart(0);
    lab.nodes[0].engine.raise_timestamps(before + secs(60));
    lab.send(0, 1, b"wanted");
    lab.run(secs(3));
    assert!(lab.joined(0, 1));
}

#[test]
fn replayed_control_message_is_refused() {
    let mut lab = Lab::joined_pair();
    let ping = first_of(&lab, MessageType::Control);
    let sent = lab.trace.len();
    inject(&mut lab, 1, ping.source, ping.payload);
    assert_eq!(lab.dropped(1, DropReason::Replayed), 1);
    assert_eq!(lab.trace.len(), sent);
}

/// Creates initiations with a valid mac1, as a sender makes them that knows only node 1's public
/// key.
fn flood(lab: &mut Lab, count: usize) -> usize {
    let initiation = intercept(MessageType::Initiation).2;
    let keys = MacKeys::new(&lab.key(1));
    let cookies = lab.count(1, HandshakeResult::CookieSent);
    for i in 0..count {
        let mut payload = initiation.payload.clone();
        payload[CLEAR_LEN + 3] ^= i as u8 | 1;
        let end = payload.len() - 32;
        let check = keys.mac1(&payload[..end]);
        payload[end..end + 16].copy_from_slice(&check);
        let source = SocketAddr::new([203, 0, 113, i as u8].into(), 9);
        inject(lab, 1, source, payload);
    }
    (lab.count(1, HandshakeResult::CookieSent) - cookies) as usize
}

/// Returns the cookie that node 1, under load, sends to the sender of this initiation.
fn cookie_for(lab: &mut Lab, source: SocketAddr, mut initiation: Vec<u8>) -> Mac {
    let second_at = initiation.len() - 16;
    initiation[second_at..].fill(0);
    let check: Mac = initiation[second_at - 16..second_at].try_into().unwrap();
    inject(lab, 1, source, initiation);
    let reply = lab.trace.last().unwrap().payload.clone();
    assert_eq!(reply[0], MessageType::CookieReply as u8, "Node 1 is under load.");
    let (salt, sealed) = reply[16..].split_first_chunk().unwrap();
    let keys = MacKeys::new(&lab.key(1));
    keys.open_cookie(salt, sealed.try_into().unwrap(), &check).unwrap()
}

#[test]
fn responder_under_load_sends_cookie_first() {
    let mut lab = Lab::new(2);
    assert_eq!(
        flood(&mut lab, 200),
        200 - 64,
        "Only 64 initiations per second may cost public-key operations."
    );
    lab.wire.clear();
    lab.send(0, 1, b"first");
    lab.run(ms(20));
    assert_eq!(lab.count(0, HandshakeResult::CookieReceived), 1);
    assert!(lab.joined(0, 1), "The node must connect with the cookie at once.");
    assert_eq!(lab.count(0, HandshakeResult::Initiated), 1);
    let drops = lab.dropped(1, DropReason::HandshakeCookieRequired);
    assert_eq!(drops, 200 - 64 + 1);
    // No answer is longer than the message that it answers.
    let initiation = first_of(&lab, MessageType::Initiation).payload.len();
    assert!(lab.trace.iter().filter(|d| d.from == 1).all(|d| d.payload.len() <= initiation));

    // The cookie is valid for later handshakes, which need no further round trip.
    lab.flow(0, 1, ms(100));
    lab.run(secs(100));
    flood(&mut lab, 200);
    lab.run_until(secs(40), |lab| lab.count(0, HandshakeResult::CompletedInitiator) == 2);
    lab.run(secs(1));
    assert!(lab.joined(0, 1));
}

#[test]
fn source_with_cookie_is_rate_limited() {
    let mut lab = Lab::new(2);
    flood(&mut lab, 100);
    lab.wire.clear();
    lab.send(0, 1, b"first");
    lab.run(ms(20));
    let with_cookie = lab.trace.iter().rfind(|d| d.from == 0 && d.payload[0] == 1).unwrap().clone();
    assert_ne!(with_cookie.payload[with_cookie.payload.len() - 16..], [0; 16]);
    flood(&mut lab, 100);
    let invalid = lab.count(1, HandshakeResult::Invalid);
    let cookie = cookie_for(&mut lab, with_cookie.source, with_cookie.payload.clone());
    let keys = MacKeys::new(&lab.key(1));
    let end = with_cookie.payload.len() - 32;
    for number in 0..50_u32 {
        let mut payload = with_cookie.payload.clone();
        payload[CLEAR_LEN..CLEAR_LEN + 4].copy_from_slice(&number.to_be_bytes());
        let check = keys.mac1(&payload[..end]);
        payload[end..end + 16].copy_from_slice(&check);
        let second = mac2(&cookie, &payload[..end + 16]);
        payload[end + 16..].copy_from_slice(&second);
        inject(&mut lab, 1, with_cookie.source, payload);
    }
    assert!(lab.count(1, HandshakeResult::RateLimited) >= 34);
    assert!(lab.count(1, HandshakeResult::Invalid) - invalid <= 16);
    // A cookie of another source is invalid.
    let elsewhere: SocketAddr = "203.0.113.9:9".parse().unwrap();
    flood(&mut lab, 100);
    let before = lab.count(1, HandshakeResult::CookieSent);
    inject(&mut lab, 1, elsewhere, with_cookie.payload);
    assert_eq!(lab.count(1, HandshakeResult::CookieSent), before + 1);
}

#[test]
fn replay_with_cookie_uses_no_token_of_its_sender() {
    let mut lab = Lab::new(2);
    flood(&mut lab, 100);
    lab.wire.clear();
    lab.send(0, 1, b"first");
    lab.run(ms(20));
    let with_cookie = lab.trace.iter().rfind(|d| d.from == 0 && d.payload[0] == 1).unwrap().clone();
    assert_ne!(with_cookie.payload[with_cookie.payload.len() - 16..], [0; 16]);
    let invalid = lab.count(1, HandshakeResult::Invalid);
    for _ in 0..200 {
        inject(&mut lab, 1, with_cookie.source, with_cookie.payload.clone());
    }
    assert_eq!(lab.count(1, HandshakeResult::Replayed), 200, "Each replay is recognised.");
    assert_eq!(lab.count(1, HandshakeResult::RateLimited), 0, "No replay takes a token.");
    assert_eq!(lab.count(1, HandshakeResult::Invalid), invalid, "No replay is decrypted.");
    // The recorded node has lost its sessions and joins again, under load.
    lab.restart(0);
    flood(&mut lab, 200);
    lab.wire.clear();
    lab.send(0, 1, b"again");
    lab.run(ms(20));
    assert!(lab.joined(0, 1), "The recorded node must connect.");
    assert_eq!(
        lab.count(1, HandshakeResult::RateLimited),
        0,
        "The replays must not use up the tokens of the recorded node."
    );
}

/// The attacker answers every cookie from many addresses, for example those of a /16 network.
#[test]
fn sender_with_many_addresses_locks_out_no_node() {
    let mut lab = Lab::new(2);
    flood(&mut lab, 100);
    let initiation = intercept(MessageType::Initiation).2.payload;
    let keys = MacKeys::new(&lab.key(1));
    let end = initiation.len() - 32;
    for i in 0..6000_u32 {
        let mut payload = initiation.clone();
        payload[CLEAR_LEN..CLEAR_LEN + 4].copy_from_slice(&i.to_be_bytes());
        let check = keys.mac1(&payload[..end]);
        payload[end..end + 16].copy_from_slice(&check);
        let [_, _, a, b] = i.to_be_bytes();
        let source = SocketAddr::new([198, 18, a, b].into(), 9);
        inject(&mut lab, 1, source, payload.clone());
        let reply = lab.trace.last().unwrap().payload.clone();
        assert_eq!(reply[0], MessageType::CookieReply as u8);
        let (salt, sealed) = reply[16..].split_first_chunk().unwrap();
        let cookie = keys.open_cookie(salt, sealed.try_into().unwrap(), &check).unwrap();
        let second = mac2(&cookie, &payload[..end + 16]);
        payload[end + 16..].copy_from_slice(&second);
        inject(&mut lab, 1, source, payload);
    }
    let invalid = lab.count(1, HandshakeResult::Invalid);
    assert!(invalid <= 64 + 64, "{invalid} public-key operations");
    assert!(lab.count(1, HandshakeResult::RateLimited) > 5800);
    lab.wire.clear();
    lab.send(0, 1, b"first");
    lab.run(ms(20));
    assert_eq!(lab.count(0, HandshakeResult::CookieReceived), 1);
    assert!(lab.joined(0, 1), "A node at its own address must connect.");
}

/// Creates spoofed responses to `initiation`, as an attacker makes them that knows the initiator's
/// public key and sees the index.
fn forged_responses(lab: &Lab, initiation: &Datagram) -> impl Iterator<Item = Vec<u8>> + use<> {
    let keys = MacKeys::new(&lab.key(initiation.from));
    let index: [u8; 4] = initiation.payload[16..20].try_into().unwrap();
    (0..5000_u32).map(move |number| {
        let mut payload = vec![0; 16 + 48 + 10];
        payload[..4].copy_from_slice(&[MessageType::Response as u8, 0, 0xff, 0]);
        payload[4..8].copy_from_slice(&index);
        payload[16..20].copy_from_slice(&number.to_be_bytes());
        payload.extend(keys.mac1(&payload));
        payload
    })
}

#[test]
fn forged_responses_cost_few_public_key_operations() {
    let mut lab = Lab::new(2);
    lab.underlay.cut.insert((0, 1));
    lab.send(0, 1, b"first");
    let initiation = first_of(&lab, MessageType::Initiation);
    let source = initiation.destination;
    for payload in forged_responses(&lab, &initiation) {
        inject(&mut lab, 0, source, payload);
    }
    let read = lab.count(0, HandshakeResult::Invalid);
    assert_eq!(
        read,
        4 + 64,
        "Each initiation must have 4 tries of its own; 64 per second are shared."
    );
    assert_eq!(lab.count(0, HandshakeResult::RateLimited), 5000 - read);
    assert_eq!(lab.dropped(0, DropReason::HandshakeRateLimited), 5000 - read);
    lab.underlay.cut.clear();
    lab.run_until(secs(2), |lab| lab.joined(0, 1));
}

#[test]
fn response_is_read_during_initiation_flood() {
    let mut lab = Lab::new(2);
    let initiation = intercept(MessageType::Initiation).2;
    lab.send(1, 0, b"first");
    let pending = lab.trace.last().unwrap().clone();
    assert!(flood(&mut lab, 200) > 0, "Initiations must have used up the shared limit.");
    for payload in forged_responses(&lab, &pending).take(3) {
        inject(&mut lab, 1, initiation.destination, payload);
    }
    lab.run(ms(20));
    assert!(lab.joined(0, 1), "The first few responses must be read in any case.");
}

#[test]
fn response_is_read_despite_spoofed_responses() {
    let mut lab = Lab::new(2);
    lab.send(1, 0, b"first");
    let pending = lab.trace.last().unwrap().clone();
    assert!(flood(&mut lab, 200) > 0, "Initiations must have used up the shared limit.");
    let before = lab.count(1, HandshakeResult::Invalid);
    for (number, payload) in forged_responses(&lab, &pending).take(100).enumerate() {
        let source = SocketAddr::new([203, 0, 113, number as u8].into(), PORT);
        inject(&mut lab, 1, source, payload);
    }
    let read = lab.count(1, HandshakeResult::Invalid) - before;
    assert_eq!(read, 4, "All other addresses must share 4 tries.");
    lab.run(ms(20));
    assert!(lab.joined(0, 1), "The peer's address must have tries of its own.");
}

/// The attacker is a pod on the host's network or a user of the node, and receives at ports of its
/// own.
#[test]
fn sender_at_shared_address_locks_out_no_node() {
    let mut lab = Lab::new(2);
    flood(&mut lab, 100);
    let initiation = intercept(MessageType::Initiation).2.payload;
    let keys = MacKeys::new(&lab.key(1));
    let end = initiation.len() - 32;
    let node = lab.nodes[0].config.addresses[0];
    for i in 0..3000_u16 {
        // Every second initiation names the node's port and carries a cookie for the attacker's
        // port.
        let claims = |payload: &mut [u8], port: u16| {
            payload[CLEAR_LEN - 4..CLEAR_LEN - 2].copy_from_slice(&port.to_be_bytes());
            let check = keys.mac1(&payload[..end]);
            payload[end..end + 16].copy_from_slice(&check);
            check
        };
        let source = SocketAddr::new(node.ip(), 1000 + i);
        let mut payload = initiation.clone();
        payload[CLEAR_LEN..CLEAR_LEN + 2].copy_from_slice(&i.to_be_bytes());
        let check = claims(&mut payload, source.port());
        inject(&mut lab, 1, source, payload.clone());
        let reply = lab.trace.last().unwrap();
        assert_eq!((reply.payload[0], reply.destination), (MessageType::CookieReply as u8, source));
        let (salt, sealed) = reply.payload[16..].split_first_chunk().unwrap();
        let cookie = keys.open_cookie(salt, sealed.try_into().unwrap(), &check).unwrap();
        if i % 2 == 0 {
            claims(&mut payload, node.port());
        }
        let second = mac2(&cookie, &payload[..end + 16]);
        payload[end + 16..].copy_from_slice(&second);
        inject(&mut lab, 1, source, payload);
    }
    let invalid = lab.count(1, HandshakeResult::Invalid);
    assert!(invalid <= 64 + 64, "{invalid} public-key operations");
    lab.wire.clear();
    lab.send(0, 1, b"first");
    lab.run(ms(20));
    assert_eq!(lab.count(0, HandshakeResult::CookieReceived), 1);
    assert!(lab.joined(0, 1), "The node must connect at its own port.");
}

#[test]
fn spoofed_and_repeated_cookies_cause_no_datagrams() {
    let mut lab = Lab::new(2);
    flood(&mut lab, 100);
    lab.wire.clear();
    lab.send(0, 1, b"first");
    lab.run(ms(1));
    let cookie = lab.trace.iter().rfind(|d| d.payload[0] == 3).unwrap().clone();
    lab.wire.clear();
    let sent = lab.trace.len();
    for at in 4..cookie.payload.len() {
        let mut payload = cookie.payload.clone();
        payload[at] ^= 1;
        inject(&mut lab, 0, cookie.source, payload);
    }
    assert_eq!(lab.trace.len(), sent);
    for _ in 0..20 {
        inject(&mut lab, 0, cookie.source, cookie.payload.clone());
    }
    assert_eq!(lab.trace.len(), sent + 1);
}

#[test]
fn hostile_peer_changes_its_path_once_per_second() {
    let mut lab = Lab::joined_pair();
    let (mut changes, mut path) = (0, lab.view(1, 0).path_mtu);
    for round in 0..1000 {
        lab.nodes[0].config.mtu = 600 + round;
        lab.restart(0);
        lab.send(0, 1, b"x");
        lab.run(ms(10));
        changes += usize::from(lab.view(1, 0).path_mtu != path);
        path = lab.view(1, 0).path_mtu;
    }
    // A burst of 8, and then one per second for 10 s.
    assert!((9..=20).contains(&changes), "{changes} changes in 1,000 handshakes");
    assert!(lab.dropped(1, DropReason::HandshakeRateLimited) > 900);
    // The next handshake is answered within the usual time of a retry.
    lab.restart(0);
    lab.flow(0, 1, ms(20));
    let took = lab.run_until(secs(5), |lab| lab.joined(0, 1));
    assert!(took < secs(3), "The session took {took:?}.");
}

#[test]
fn random_datagrams_are_dropped_and_counted() {
    let mut lab = Lab::joined_pair();
    let mut rng = Rng(99);
    let source: SocketAddr = "203.0.113.5:5".parse().unwrap();
    lab.nodes[1].engine.drops().drain().for_each(drop);
    let sent = lab.trace.len();
    for i in 0..20_000 {
        let len = (rng.next() % 300) as usize;
        let mut payload = vec![0; len];
        payload.fill_with(|| rng.next() as u8);
        if i % 2 == 0 && len >= 16 {
            let kind = [1, 2, 3, 5][i / 2 % 4];
            payload[..4].copy_from_slice(&[kind, 0, 0xff, 0]);
            if i % 3 == 0 {
                payload[4..8]
                    .copy_from_slice(&lab.current(1, 0).unwrap().local_index.to_be_bytes());
            }
        }
        inject(&mut lab, 1, source, payload);
    }
    let dropped: u64 = lab.nodes[1].engine.drops().drain().map(|(_, n)| n).sum();
    assert_eq!(dropped, 20_000);
    assert_eq!(lab.trace.len(), sent);
    assert!(lab.joined(0, 1));
}
