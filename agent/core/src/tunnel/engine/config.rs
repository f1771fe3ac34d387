//! Configuration of an engine and of its peers.

use std::fmt;
use std::net::SocketAddr;

use zeroize::Zeroizing;

use crate::tunnel::cipher::Ciphers;

/// What an engine needs to know.
pub struct EngineConfig {
    /// This node's identity.
    pub private_key: Zeroizing<[u8; 32]>,
    /// Nodes of different clusters never join.
    pub cluster_id: String,
    /// The UDP port that this node listens on; peers answer to it.
    pub listen_port: u16,
    /// Lanes that this node sends on, 1 to 64.
    pub lanes: u8,
    /// What to params for data.
    pub ciphers: Ciphers,
    /// This node's MTU in bytes, for its peers to know.
    pub mtu: u16,
    /// Propagation of the ECN field between inner and outer headers (RFC 6040). A session uses it
    /// if both ends do ([`Session::ecn`](crate::tunnel::session::Session::ecn)).
    pub ecn: bool,
}

impl fmt::Debug for EngineConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("EngineConfig(hidden: it has the private key)")
    }
}

/// Why there is no engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// The private key is none.
    #[error("the private key is not a valid Curve25519 key")]
    PrivateKey,
    /// Not 1 to 64.
    #[error("{0} lanes: must be 1 to 64")]
    Lanes(u8),
    /// Port 0.
    #[error("the listening port must not be 0")]
    ListenPort,
    /// Neither of the two.
    #[error("no cipher is offered")]
    NoCipher,
}

/// Another node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerConfig {
    /// Its identity.
    pub public_key: [u8; 32],
    /// Another one, while its key changes: the next, or the one before.
    pub second_key: Option<[u8; 32]>,
    /// Where it listens; tried in this order.
    pub endpoints: Vec<SocketAddr>,
}
