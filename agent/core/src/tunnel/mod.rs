//! The tunnel: how two nodes come to share keys, and what they do with them.
//!
//! [`engine::Engine`] makes and keeps the [`session::Session`]s; lanes seal and open data with them
//! and never wait for it. Handshake messages are laid out in `message.rs`, durations in
//! [`timers`].

mod cipher;
mod cookie;
mod counts;
pub mod engine;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzz_access;
mod handshake;
mod lane_key;
mod liveness;
pub mod message;
mod noise;
mod path_mtu;
mod peer;
mod primitives;
mod rate_limit;
pub mod replay;
pub mod saved;
pub mod session;
mod shared;
pub mod timers;

pub use counts::HandshakeResult;
pub use engine::{Engine, EngineConfig, EngineError, PeerConfig};
pub use liveness::UnreachableReason;
pub use peer::{PeerState, PeerView};
pub use replay::ReplayWindow;
pub use saved::{SAVED_LEN, SavedSession, SessionSlot, SessionStore};
pub use session::{Cipher, Ciphers, Session, SessionParams};
pub use shared::{Random, Transmit};

#[cfg(test)]
mod tests;
