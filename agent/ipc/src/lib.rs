//! What the control process and the data process say to each other over the data plane's unix
//! socket: one JSON document a frame, each frame led by its length (u32, big endian).
//!
//! Requests are answered in order, one answer a request. A [`Snapshot`] is idempotent: the data
//! process compares it with what it does already and changes only what differs, so a new control
//! process sends its whole view and disturbs nothing.

#![forbid(unsafe_code)]

pub mod address;
pub mod capture;
mod codec;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod instance;
pub mod keys;
mod message;
mod report;
mod settings;

pub use codec::{MAX_FRAME, encode_frame, frame_length, read_frame, write_frame};
pub use message::{ErrorKind, HANDOVER_VERSION, NodeIdentity, PROTOCOL_VERSION, Request, Response};
pub use report::{
    Capability, CapabilityState, Confinement, ConfinementState, DirectionReport, DropReport,
    HandshakeCount, HistogramReport, LaneReport, PeerReport, PeerState, ReducedPath, Report,
    UnreachablePeer,
};
pub use settings::{
    CipherChoice, NodeSettings, OffloadSettings, Peer, SeenHandshakes, Snapshot, TunSettings,
    UnderlaySettings, Update,
};
