//! Configuration of an engine and of its peers.

use std::fmt;
use std::net::SocketAddr;

use crate::keys::{PrivateKey, PublicKey};
use crate::tunnel::cipher::Ciphers;

/// Configuration of an [`Engine`](crate::Engine).
pub struct EngineConfig {
    /// Private key of this node.
    pub private_key: PrivateKey,
    /// Name of the cluster; it is part of the Noise prologue, so that nodes of different clusters
    /// never complete a handshake.
    pub cluster_id: String,
    /// UDP port on which this node listens and to which peers send. Not 0.
    pub listen_port: u16,
    /// Number of lanes on which this node sends, 1 to 64.
    pub lanes: u8,
    /// Ciphers that this node offers for data.
    pub ciphers: Ciphers,
    /// Inner MTU of this node, bytes; peers learn the MTU in handshakes.
    pub mtu: u16,
    /// True if this node propagates the ECN field between inner and outer headers (RFC 6040). A
    /// session uses it if both nodes do ([`Session::ecn`](crate::tunnel::session::Session::ecn)).
    pub ecn: bool,
}

impl fmt::Debug for EngineConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("EngineConfig(hidden: it has the private key)")
    }
}

/// Error of [`Engine::new`](crate::Engine::new) and
/// [`Engine::set_identity`](crate::Engine::set_identity).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// The private key is not a valid Curve25519 key.
    #[error("the private key is not a valid Curve25519 key")]
    PrivateKey,
    /// [`EngineConfig::lanes`] is not 1 to 64.
    #[error("{0} lanes configured, expected 1 to 64")]
    Lanes(u8),
    /// [`EngineConfig::listen_port`] is 0.
    #[error("the listening port must not be 0")]
    ListenPort,
    /// [`EngineConfig::ciphers`] enables no cipher.
    #[error("no cipher is offered")]
    NoCipher,
}

/// Configuration of a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerConfig {
    /// Public key of the peer.
    pub public_key: PublicKey,
    /// Second public key during a key rotation of the peer: the next or the previous one.
    pub second_key: Option<PublicKey>,
    /// Underlay addresses and UDP ports on which the peer listens, in the order in which handshakes
    /// try them. A peer without endpoints can still initiate.
    pub endpoints: Vec<SocketAddr>,
}
