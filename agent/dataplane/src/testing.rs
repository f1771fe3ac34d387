//! Fixtures for unit tests of lanes: a lane without a thread, a session, tables and packets.

#![allow(clippy::unwrap_used)]

use std::cell::Cell;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use skein_core::route::{PeerId, RouteTable};
use skein_core::time::Time;
use skein_core::tunnel::HandshakeFilter;
use skein_core::tunnel::session::{Cipher, Session, SessionParams, TransportSecrets};

use super::lane_context::{LaneContext, SendSocket};
use super::queue::ToManagerQueue;
use super::tables::{PeerEntry, Tables};

/// Returns the context of the only lane of a node, `age_clock` after boot. Its send socket is on
/// the loopback interface.
pub(super) fn context(manager: ToManagerQueue, age_clock: Duration) -> LaneContext {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_nonblocking(true).unwrap();
    LaneContext {
        index: 0,
        lanes: 1,
        stats: Arc::default(),
        send_sockets: vec![SendSocket { v4: true, socket }],
        tap: Arc::default(),
        captured: false,
        published: Arc::default(),
        tables_version: 0,
        manager,
        now: Instant::now(),
        age_clock,
        unknown_session_reported: None,
        too_long_reported: Cell::new(None),
    }
}

/// Returns the parameters of a session of peer 1 with one lane, established at boot.
pub(super) fn session_params(index: u32, initiator: bool) -> SessionParams {
    SessionParams {
        peer: PeerId(1),
        local_index: index,
        remote_index: 7,
        cipher: Cipher::Aes256Gcm,
        local_lanes: 1,
        remote_lanes: 1,
        established: Time::default(),
        initiator,
        epoch: 0,
        ecn: false,
        secrets: TransportSecrets::new([1; 32], [2; 32]),
    }
}

/// Returns a session with the index 7 at both ends, established at boot.
pub(super) fn session(initiator: bool) -> Arc<Session> {
    Arc::new(Session::new(session_params(7, initiator)).unwrap())
}

/// Returns tables with the pod CIDRs 10.N.0.0/16 of two peers, the first of which has a session.
pub(super) fn tables(endpoint: SocketAddr) -> Tables {
    let cidrs = ["10.0.0.0/16", "10.1.0.0/16", "10.2.0.0/16"].map(|text| [text.parse().unwrap()]);
    let peers = [(PeerId(1), &cidrs[1][..]), (PeerId(2), &cidrs[2][..])];
    let entry =
        |session| PeerEntry { endpoint: Some(endpoint), session, next: None, max_plaintext: 1440 };
    Tables {
        routes: Arc::new(RouteTable::build(&cidrs[0], peers).unwrap()),
        peers: [(PeerId(1), entry(Some(session(true)))), (PeerId(2), entry(None))].into(),
        sessions: vec![(7, session(true))],
        handshakes: HandshakeFilter::default(),
    }
}

/// Returns a TCP packet over IPv4 between 10.FROM.0.1 and 10.TO.0.1, with 40 bytes of headers.
pub(super) fn packet(from: u8, to: u8, payload: usize) -> Vec<u8> {
    let mut packet = vec![0; 40 + payload];
    (packet[0], packet[8], packet[9]) = (0x45, 64, 6);
    let length = (packet.len() as u16).to_be_bytes();
    packet[2..4].copy_from_slice(&length);
    packet[12..20].copy_from_slice(&[10, from, 0, 1, 10, to, 0, 1]);
    (packet[32], packet[33]) = (0x50, 0x10);
    packet
}
