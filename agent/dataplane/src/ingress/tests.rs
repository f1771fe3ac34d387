//! Tests of the receiving half of a lane.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use proptest::prelude::*;
use skein_core::PrivateKey;
use skein_core::time::Time;
use skein_core::tunnel::message::{COOKIE_REPLY_LEN, MIN_RESPONSE_LEN};
use skein_core::tunnel::{Ciphers, Engine, EngineConfig, HandshakeFilter, PeerConfig, SessionSlot};
use skein_core::wire::header::CONTROL_LANE;

use super::rx_session::{CONTROL_RATE, receiver};
use super::*;
use crate::queue::{self, ToManager};
use crate::stats::drop_report;
use crate::testing;

fn session(index: u32) -> Arc<Session> {
    Arc::new(Session::new(testing::session_params(index, true)).unwrap())
}

#[test]
fn data_of_session_older_than_180_s_is_refused() {
    // The session was established at boot, and the manager has not ended it.
    let session = session(1);
    for (age, expected) in [
        (0, None),
        (179, None),
        (180, Some(DropReason::SessionExpired)),
        (205, Some(DropReason::SessionExpired)),
    ] {
        let found = receiver(&session, 0, Duration::from_secs(age)).err();
        assert_eq!(found, expected, "{age} s");
    }
    assert_eq!(receiver(&session, 1, Duration::ZERO).err(), Some(DropReason::WrongLane));
    assert!(!session.is_expired());
}

#[test]
fn control_messages_are_checked_and_limited_by_session() {
    let (ours, other) = (session(7), session(7));
    let theirs = Session::new(testing::session_params(7, false)).unwrap();
    let ping = || {
        let mut out = [0; 53];
        let sender = theirs.sender(CONTROL_LANE).unwrap();
        sender.seal(Flags::default(), &[1; 21], &mut out).unwrap();
        out
    };
    let mut rx = RxSession::new(&ours);
    let at = Duration::from_secs(1);
    let first = ping();
    assert_eq!(rx.check_control(at, &mut first.clone()), Ok(()));
    for _ in 0..1000 {
        let mut forged = ping();
        forged[40] ^= 1;
        assert_eq!(rx.check_control(at, &mut forged), Err(DropReason::AuthFailed));
        assert_eq!(rx.check_control(at, &mut first.clone()), Err(DropReason::Replayed));
    }
    for _ in 1..CONTROL_RATE.burst {
        assert_eq!(rx.check_control(at, &mut ping()), Ok(()));
    }
    assert_eq!(rx.check_control(at, &mut ping()), Err(DropReason::ManagerQueue));
    assert_eq!(RxSession::new(&other).check_control(at, &mut ping()), Ok(()));
    let later = at + Duration::from_millis(16);
    assert_eq!(rx.check_control(later, &mut ping()), Ok(()));
    assert_eq!(rx.check_control(later, &mut ping()), Err(DropReason::ManagerQueue));
    let end = Duration::from_secs(180);
    assert_eq!(rx.check_control(end, &mut ping()), Err(DropReason::SessionExpired));
}

/// A slot that stores the counter of one lane in memory. Clones share the counter.
#[derive(Clone, Default)]
struct MemorySlot(Arc<AtomicU64>);

impl SessionSlot for MemorySlot {
    fn next_counter(&self, _: u8) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    fn set_next_counter(&self, _: u8, next: u64) {
        self.0.store(next, Ordering::Relaxed);
    }
}

#[test]
fn restored_session_refuses_data_of_earlier_process() {
    let slot = MemorySlot::default();
    let restore = || {
        let session = Session::new(testing::session_params(7, true)).unwrap();
        RxSession::new(&Arc::new(session.with_slot(Some(Box::new(slot.clone())))))
    };
    let theirs = Session::new(testing::session_params(7, false)).unwrap();
    let seal = || {
        let mut out = vec![0; 8 + HEADER_LEN + TAG_LEN];
        theirs.sender(0).unwrap().seal(Flags::default(), &[1; 8], &mut out).unwrap();
        out
    };
    let open = |rx: &mut RxSession, datagram: &[u8]| {
        let mut datagram = datagram.to_vec();
        let header = Header::parse(&datagram).unwrap();
        rx.open_data(Duration::from_secs(1), header, &mut datagram)
    };
    let datagrams = [seal(), seal(), seal()];
    let mut earlier = restore();
    for index in [0, 2, 1] {
        assert_eq!(open(&mut earlier, &datagrams[index]), Ok(()), "{index}");
    }
    let mut later = restore();
    for datagram in &datagrams {
        assert_eq!(open(&mut later, datagram), Err(DropReason::Replayed));
    }
    assert_eq!(open(&mut later, &seal()), Ok(()), "A new datagram must pass.");
}

/// Receives `datagrams` in a lane, `age` seconds after the session was established. Returns the
/// drops and the datagrams in the manager's queue; no manager runs.
fn receive(age: u64, datagrams: &[&[u8]]) -> (Vec<DropReason>, Vec<Box<[u8]>>) {
    receive_with(HandshakeFilter::default(), age, datagrams)
}

fn receive_with(
    handshakes: HandshakeFilter,
    age: u64,
    datagrams: &[&[u8]],
) -> (Vec<DropReason>, Vec<Box<[u8]>>) {
    let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let tables = testing::tables(peer.local_addr().unwrap());
    let mut tables = Arc::new(Tables { handshakes, ..tables });
    let (manager, queue) = queue::channel();
    let mut lane = testing::context(manager, Duration::from_secs(age));
    let config = CoalesceConfig { tcp: true, udp: true, partial_checksum: true };
    let mut ingress = Ingress::new(config);
    ingress.adopt(&tables);
    for datagram in datagrams {
        peer.send_to(datagram, socket.local_addr().unwrap()).unwrap();
    }
    ingress.run(&mut lane, &mut tables, ReceiveSocket { index: 0, fd: socket.as_fd() }, None);
    let drops = drop_report(&[&lane.stats.drops]).into_iter();
    let drops = drops.flat_map(|drop| vec![drop.kind.known().unwrap(); drop.packets as usize]);
    let taken = queue.try_iter().map(|message| match message {
        ToManager::Datagram { datagram, .. } => datagram,
        _ => panic!("Only datagrams were sent."),
    });
    (drops.collect(), taken.collect())
}

fn engine(private_key: u8) -> Engine {
    let config = EngineConfig {
        private_key: PrivateKey::new(&[private_key; 32]),
        cluster_id: "test".to_owned(),
        listen_port: 51900,
        lanes: 1,
        ciphers: Ciphers { aes256_gcm: true, chacha20_poly1305: true, aes_hardware: true },
        mtu: 1440,
        ecn: false,
    };
    Engine::new(config, Box::new(move |bytes| bytes.fill(private_key))).unwrap()
}

#[test]
fn manager_gets_no_handshakes_with_wrong_mac1() {
    let (mut initiator, responder) = (engine(1), engine(2));
    let peer = PeerConfig {
        public_key: responder.public_key(),
        second_key: None,
        endpoints: vec!["192.0.2.2:51900".parse().unwrap()],
    };
    let peer = initiator.upsert_peer(Time::default(), peer);
    initiator.request_session(Time::default(), peer);
    let initiation = initiator.poll_transmit().unwrap().payload;
    let mut changed = initiation.clone();
    changed[40] ^= 1;
    let response = [&[2, 0, 255, 0][..], &[0; MIN_RESPONSE_LEN - 4]].concat();
    let short_cookie = [&[3, 0, 255, 0][..], &[0; COOKIE_REPLY_LEN - 5]].concat();
    let cookie = [&[3, 0, 255, 0][..], &[0; COOKIE_REPLY_LEN - 4]].concat();
    let datagrams = [&changed, &response, &short_cookie, &cookie, &initiation];
    let (drops, taken) =
        receive_with(responder.handshake_filter(), 1, &datagrams.map(Vec::as_slice));
    assert_eq!(drops, [DropReason::HandshakeInvalid; 3]);
    assert_eq!(taken, [cookie.into(), initiation.clone().into_boxed_slice()]);
    // The tables before the first publication have no identity.
    assert_eq!(receive(1, &[&initiation]), (vec![DropReason::HandshakeInvalid], Vec::new()));
}

fn seal(lane: u8, plaintext: &[u8]) -> Vec<u8> {
    let mut out = vec![0; plaintext.len() + HEADER_LEN + TAG_LEN];
    let session = testing::session(false);
    session.sender(lane).unwrap().seal(Flags::default(), plaintext, &mut out).unwrap();
    out
}

#[test]
fn session_ends_after_180_s_without_a_manager() {
    let data = seal(0, &testing::packet(1, 0, 10));
    // Packets that pass all checks fail at the TUN device, because there is none.
    assert_eq!(receive(179, &[&data]).0, [DropReason::TunWrite]);
    assert_eq!(receive(180, &[&data]).0, [DropReason::SessionExpired]);
    let control = seal(CONTROL_LANE, &[1; 21]);
    assert_eq!(receive(180, &[&control]), (vec![DropReason::SessionExpired], Vec::new()));
}

#[test]
fn manager_gets_no_spoofed_or_replayed_control_messages() {
    let control = seal(CONTROL_LANE, &[1; 21]);
    let mut forged = control.clone();
    forged[30] ^= 1;
    let mut of_data_lane = control.clone();
    of_data_lane[2] = 0;
    let (drops, taken) = receive(1, &[&forged, &of_data_lane, &control, &control]);
    assert_eq!(drops, [DropReason::OuterHeader, DropReason::AuthFailed, DropReason::Replayed]);
    assert_eq!(taken, [control.into_boxed_slice()], "The engine opens the message again.");
}

#[test]
fn long_control_message_is_dropped_and_no_handshake() {
    let overhead = HEADER_LEN + TAG_LEN;
    let longest = seal(CONTROL_LANE, &vec![1; MAX_CONTROL_LEN - overhead]);
    let longer = seal(CONTROL_LANE, &vec![1; MAX_CONTROL_LEN - overhead + 1]);
    let (drops, taken) = receive(1, &[&longer, &longest]);
    assert_eq!(drops, [DropReason::ControlTooLong]);
    assert_eq!(taken, [longest.into_boxed_slice()]);
    // The counter of handshakes contains the drops with this reason.
    let initiation = [&[1, 0, 255, 0][..], &[0; MAX_CONTROL_LEN]].concat();
    assert_eq!(receive(1, &[&initiation]).0, [DropReason::HandshakeInvalid]);
}

#[test]
fn ecn_mark_of_merged_message_drops_no_packet() {
    let all = [Ecn::NotEct, Ecn::Ect1, Ecn::Ect0, Ecn::Ce];
    for (inner, outer) in all.into_iter().flat_map(|inner| all.map(|outer| (inner, outer))) {
        let (alone, merged) = (decapsulate(inner, outer, false), decapsulate(inner, outer, true));
        assert_eq!(alone, inner.decapsulate(outer), "A single datagram follows RFC 6040.");
        let expected = alone.unwrap_or(inner);
        assert_eq!(merged, Some(expected), "{inner:?} in a message marked {outer:?} must stay.");
    }
    assert_eq!(decapsulate(Ecn::NotEct, Ecn::Ce, false), None, "A marked datagram is dropped.");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// After every change of the tables, exactly the sessions of the last tables are known, and
    /// unchanged sessions keep their windows.
    #[test]
    fn sessions_follow_the_tables(
        steps in prop::collection::vec(prop::collection::btree_map(0u32..12, 0u8..2, 0..10), 1..8),
    ) {
        let all: Vec<[_; 2]> = (0..12).map(|index| [session(index), session(index)]).collect();
        let config = CoalesceConfig { tcp: true, udp: true, partial_checksum: true };
        let mut ingress = Ingress::new(config);
        let mut before = BTreeMap::new();
        for step in steps {
            let pick = |(&index, &which): (&u32, &u8)| {
                (index, Arc::clone(&all[index as usize][usize::from(which)]))
            };
            let sessions = step.iter().map(pick).collect();
            ingress.adopt(&Arc::new(Tables { sessions, ..Tables::default() }));
            prop_assert_eq!(ingress.sessions.len(), step.len());
            prop_assert_eq!(ingress.by_index.len(), step.len());
            for (index, which) in &step {
                let rx = &mut ingress.sessions[ingress.by_index[index]];
                prop_assert!(Arc::ptr_eq(&rx.session, &all[*index as usize][usize::from(*which)]));
                // Packets that are not reported yet mark a session that was kept.
                prop_assert_eq!(rx.packets > 0, before.get(index) == Some(which));
                rx.packets = 1;
            }
            before = step;
        }
    }
}
