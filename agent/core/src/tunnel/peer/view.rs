//! The state of a peer as forwarding tables and reports read it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::tunnel::liveness::Trouble;
use crate::tunnel::session::Session;

/// How a peer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PeerState {
    /// No session: nothing was sent yet, or the last one ended unused.
    Idle,
    /// A handshake is under way.
    Connecting,
    /// A session, and answers come.
    Established,
    /// A session or a handshake, but no answer.
    Unreachable,
}

/// What lanes and reports need to know of a peer.
#[derive(Debug, Clone)]
pub struct PeerView {
    /// Its identity.
    pub public_key: [u8; 32],
    /// Address that data is sent to: in a session, one at which the peer has answered a handshake;
    /// without a session, the first one of the record.
    pub endpoint: Option<SocketAddr>,
    /// The session to send with; the peer is known to have it too.
    pub current: Option<Arc<Session>>,
    /// A session that the peer has started: the one to send with as soon as it is confirmed
    /// ([`Session::is_confirmed`]), and where to.
    pub next: Option<(Arc<Session>, Option<SocketAddr>)>,
    /// Every session that data may come in, the current one too.
    pub receive: Vec<Arc<Session>>,
    /// How it is.
    pub state: PeerState,
    /// Why it is not well, where it is not.
    pub trouble: Option<Trouble>,
    /// Smoothed round-trip time.
    pub round_trip: Option<Duration>,
    /// When something authentic last came, by the monotonic clock.
    pub last_received: Option<Duration>,
    /// The MTU that the peer named in its last handshake, in bytes.
    pub mtu: Option<u16>,
    /// The longest plaintext that the path and the peer take, in bytes, where that is less than this node's
    /// MTU.
    pub path: Option<u16>,
}
