//! The state of a peer as forwarding tables and reports read it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::keys::PublicKey;
use crate::tunnel::liveness::UnreachableReason;
use crate::tunnel::session::Session;

/// Connection state of a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PeerState {
    /// There is no session: nothing has been sent yet, or the last session ended without use.
    Idle,
    /// A handshake is pending.
    Connecting,
    /// There is a session, and the peer answers.
    Established,
    /// There is a session or a handshake, but the peer does not answer.
    Unreachable,
}

/// A session that a peer has initiated.
#[derive(Debug, Clone)]
pub struct NextSession {
    /// Keys and counters of the session.
    pub session: Arc<Session>,
    /// Destination of data datagrams in this session; `None` while it is not known.
    pub endpoint: Option<SocketAddr>,
}

/// Sessions, endpoint and liveness of a peer, as forwarding tables and reports read them. The
/// engine updates the value; [`Engine::tables`](crate::Engine::tables) lends it.
#[derive(Debug, Clone)]
pub struct PeerView {
    /// Public key of the peer; the first one of its record during a key rotation.
    pub public_key: PublicKey,
    /// Destination of data datagrams (underlay address and UDP port): with a session, an address at
    /// which the peer has answered a handshake; without a session, the first endpoint of the
    /// record. `None` while no such address is known.
    pub endpoint: Option<SocketAddr>,
    /// Session to send with. The peer is known to have it.
    pub current: Option<Arc<Session>>,
    /// Session that the peer has initiated. It replaces `current` as soon as it is confirmed
    /// ([`Session::is_confirmed`]).
    pub next: Option<NextSession>,
    /// Sessions in which data may arrive, the current one included.
    pub receive: Vec<Arc<Session>>,
    /// Connection state.
    pub state: PeerState,
    /// Reason for a state other than established, if one is known.
    pub reason: Option<UnreachableReason>,
    /// Smoothed round-trip time; `None` before the first measurement.
    pub round_trip: Option<Duration>,
    /// Time of the last authentic datagram (monotonic clock); `None` if there was none.
    pub last_received: Option<Duration>,
    /// MTU that the peer announced in its last handshake, inner bytes.
    pub mtu: Option<u16>,
    /// Maximum plaintext towards this peer in bytes, limited by the path or the peer; `None` if it
    /// is not smaller than this node's MTU.
    pub path_mtu: Option<u16>,
}
