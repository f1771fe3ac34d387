//! Protocol between the control process and the data process over the data plane's unix socket: the
//! messages, their codec and the types in them. The crate is synchronous. Only [`instance`] uses
//! files and sockets; the codec works on any reader and writer.
//!
//! - A connection carries frames: a length (u32, big endian) and a JSON document ([`read_frame`],
//!   [`write_frame`]).
//! - The data process sends one [`Response`] for each [`Request`], in order. [`Request::Capture`]
//!   is the exception: its responses continue until the connection ends.
//! - [`Request::Hello`] is the first request of a control process.
//! - A [`Snapshot`] is idempotent. The data process changes only the differences to its current
//!   state, so that a new control process can send its whole state without an interruption.
//!
//! JSON keys are the interface between releases. A renamed Rust item keeps its key by
//! `#[serde(rename)]`.

#![forbid(unsafe_code)]
#![warn(clippy::missing_errors_doc)]

pub mod address;
pub mod capture;
mod codec;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod instance;
pub mod keys;
pub mod log_limit;
mod message;
mod report;
mod reported;
mod settings;

pub use codec::{MAX_FRAME, encode_frame, frame_length, read_frame, write_frame};
pub use message::{ErrorKind, HANDOVER_VERSION, NodeIdentity, PROTOCOL_VERSION, Request, Response};
pub use report::{
    Capability, CapabilityName, CapabilityState, Confinement, ConfinementState, DirectionReport,
    DropReport, HandshakeCount, HistogramReport, LaneReport, Mechanism, PeerReport, PeerState,
    ReducedPath, Report, UnreachablePeer,
};
pub use reported::{DropKind, ReportValue, Reported};
pub use settings::{
    CipherChoice, NodeSettings, OffloadSettings, Peer, SeenHandshakes, Snapshot, TunSettings,
    UnderlaySettings, Update,
};
