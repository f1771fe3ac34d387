//! The tunnel protocol: handshakes, sessions, liveness and path MTU discovery.
//!
//! The [`engine::Engine`] creates and renews the [`session::Session`]s. Lanes seal and open data
//! with the sessions and never wait for the engine. The [`message`] module defines the layouts of
//! handshake and control messages, [`timers`] the timeouts and intervals.

mod cipher;
mod cookie;
mod counts;
pub mod engine;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzz_access;
mod handshake;
mod handshake_filter;
mod lane_key;
mod liveness;
pub mod message;
mod noise;
mod path_mtu;
mod peer;
pub(crate) mod primitives;
pub mod rate_limit;
pub mod replay;
pub mod saved;
pub mod session;
mod shared;
pub mod timers;

pub use counts::HandshakeResult;
pub use engine::{Engine, EngineConfig, EngineError, PeerConfig};
pub use handshake_filter::HandshakeFilter;
pub use liveness::UnreachableReason;
pub use peer::{NextSession, PeerState, PeerView};
pub use replay::ReplayWindow;
pub use saved::{SAVED_LEN, SavedSession, SessionSlot, SessionStore};
pub use session::{Cipher, Ciphers, Session, SessionParams, TransportSecrets};
pub use shared::{Random, Transmit};

#[cfg(test)]
mod tests;
