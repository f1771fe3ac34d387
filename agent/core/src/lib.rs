//! The packet and protocol core of Skein: encryption between nodes, offloads, and packet formats.
//!
//! The core has no socket, no clock and no random source. Time ([`Time`]) and random bytes are
//! arguments, and datagrams to send are polled. Tests can therefore connect two engines by a
//! simulated link with a virtual clock, and fuzzers reach every byte that a sender without a key
//! controls.
//!
//! - [`Engine`] performs handshakes and keeps sessions with peers; its documentation has the
//!   contract between engine and caller.
//! - [`Session`] seals and opens data. Each lane of a node has its own keys and counters, so that
//!   threads share a session without a lock. [`ReplayWindow`] refuses replays.
//! - [`offload`] segments superpackets from a TUN device, batches sealed datagrams for UDP_SEGMENT,
//!   and coalesces received packets into superpackets.
//! - [`RouteTable`] maps inner addresses to the nodes that own them.
//! - [`tunnel::message`] and [`wire`] define every byte between nodes.
//!
//! # Example
//!
//! Two engines perform a handshake over a link that this example simulates. The initiator then
//! encrypts a packet, and the responder decrypts it.
//!
//! ```
//! use std::time::Duration;
//!
//! use skein_core::wire::header::{Flags, OVERHEAD};
//! use skein_core::{
//!     Ciphers, Engine, EngineConfig, PeerConfig, PrivateKey, ReplayWindow, Time,
//! };
//!
//! fn engine(key: u8) -> Engine {
//!     let config = EngineConfig {
//!         private_key: PrivateKey::new(&[key; 32]),
//!         cluster_id: "example".to_owned(),
//!         listen_port: 51900,
//!         lanes: 1,
//!         ciphers: Ciphers { aes256_gcm: true, chacha20_poly1305: true, aes_hardware: false },
//!         mtu: 1440,
//!         ecn: true,
//!     };
//!     // A real program uses a cryptographically secure random source.
//!     let mut state = u64::from(key);
//!     let random = move |out: &mut [u8]| {
//!         out.fill_with(|| {
//!             state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
//!             (state >> 56) as u8
//!         });
//!     };
//!     Engine::new(config, Box::new(random)).expect("the configuration is valid")
//! }
//!
//! let addresses = ["192.0.2.1:51900", "192.0.2.2:51900"].map(|text| text.parse().unwrap());
//! let mut engines = [engine(1), engine(2)];
//! let now = Time { mono: Duration::from_secs(1), wall: Duration::from_secs(1_700_000_000) };
//!
//! let keys = [engines[0].public_key(), engines[1].public_key()];
//! let [responder, _] = [0, 1].map(|node| {
//!     engines[node].upsert_peer(now, PeerConfig {
//!         public_key: keys[1 - node],
//!         second_key: None,
//!         endpoints: vec![addresses[1 - node]],
//!     })
//! });
//! engines[0].request_session(now, responder);
//!
//! // The link delivers every datagram to the other engine.
//! loop {
//!     let Some((from, datagram)) = (0..2)
//!         .find_map(|node| engines[node].poll_transmit().map(|datagram| (node, datagram)))
//!     else {
//!         break;
//!     };
//!     let mut payload = datagram.payload;
//!     engines[1 - from].handle_datagram(now, addresses[from], &mut payload);
//! }
//!
//! // The initiator seals a packet on its lane 0.
//! let sending = engines[0].peer(responder).unwrap().current.clone().unwrap();
//! let packet = b"an inner IP packet";
//! let mut datagram = vec![0; packet.len() + OVERHEAD];
//! sending.sender(0).unwrap().seal(Flags::default(), packet, &mut datagram)?;
//!
//! // The responder opens the datagram and refuses its replay.
//! let initiator = engines[1].peer_id(&keys[0]).unwrap();
//! let receiving = engines[1].peer(initiator).unwrap().current.clone().unwrap();
//! let mut window = ReplayWindow::new();
//! let (header, plaintext) = receiving.receiver(0).unwrap().open(&mut datagram)?;
//! window.check_and_set(header.counter)?;
//! assert_eq!(plaintext, packet);
//! assert!(window.check_and_set(header.counter).is_err());
//! # Ok::<(), skein_core::DropReason>(())
//! ```

#![forbid(unsafe_code)]
#![warn(clippy::missing_errors_doc)]

pub mod address;
pub mod drop;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
pub mod keys;
pub mod offload;
pub mod route;
#[cfg(test)]
mod testing;
pub mod time;
pub mod tunnel;
pub mod wire;

pub use drop::{Direction, DropCounts, DropReason};
pub use keys::{InvalidKey, PrivateKey, PublicKey};
pub use route::{Owner, PeerId, RouteConflict, RouteTable};
pub use time::Time;
pub use tunnel::session::{Receiver, Sender, SessionError};
pub use tunnel::{
    Cipher, Ciphers, Engine, EngineConfig, EngineError, HandshakeResult, NextSession, PeerConfig,
    PeerState, PeerView, Random, ReplayWindow, SavedSession, Session, SessionParams, SessionSlot,
    SessionStore, Transmit, TransportSecrets, UnreachableReason,
};
