//! Requests of the control process, and the data process's responses.

use serde::{Deserialize, Serialize};

use crate::capture::{CaptureRequest, CapturedPacket};
use crate::keys::PublicKey;
use crate::report::Report;
use crate::settings::{SeenHandshakes, Snapshot, Update};

/// Raised with every change that an older peer would misread.
pub const PROTOCOL_VERSION: u32 = 4;

/// From the control process.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// First on every connection.
    Hello {
        /// [`PROTOCOL_VERSION`] of the sender.
        version: u32,
    },
    /// Become exactly this.
    Apply {
        /// The whole wanted state.
        snapshot: Box<Snapshot>,
    },
    /// Change some peers and leave the rest.
    Update {
        /// What to change.
        update: Update,
    },
    /// Ask for counters and states.
    Report {
        /// Also those of each peer: with thousands of them this takes milliseconds.
        peers: bool,
    },
    /// Ask for [`SeenHandshakes`], to pass them to the next data process.
    SeenHandshakes,
    /// Log other things from now on.
    LogLevel {
        /// A filter of `tracing`; `None`: what it was started with.
        level: Option<String>,
    },
    /// Look at packets: the answers, [`Response::Captured`], go on until the asker closes the connection.
    #[serde(rename = "watch")]
    Capture {
        /// At which.
        #[serde(rename = "watch")]
        capture: CaptureRequest,
    },
    /// Wait at most a second for a change to which the control process reacts at once.
    Changes {
        /// Version of the last answer; 0 at first.
        known: u64,
    },
    /// End the data process in an orderly way (the TUN device stays).
    Shutdown,
    /// Stop, and give all descriptors and sessions to whoever asks.
    TakeOver {
        /// [`HANDOVER_VERSION`] of who asks.
        version: u32,
    },
}

/// From the data process.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "response", rename_all = "snake_case")]
pub enum Response {
    /// Answer to [`Request::Hello`].
    Hello {
        /// [`PROTOCOL_VERSION`] of the data process.
        version: u32,
        /// Its process id.
        pid: u32,
        /// The node that it works for; `None` before its first snapshot.
        #[serde(default)]
        node: Option<NodeIdentity>,
        /// True if the data process accepts [`Snapshot::seen_handshakes`]; older releases refuse a
        /// snapshot with this field.
        #[serde(default, rename = "takes_seen_handshakes")]
        accepts_seen_handshakes: bool,
    },
    /// A snapshot or an update is in force in every lane.
    Applied {
        /// The revision now in force.
        revision: u64,
    },
    /// Answer to [`Request::Report`].
    Report {
        /// Counters and states.
        report: Box<Report>,
    },
    /// Answer to [`Request::SeenHandshakes`].
    SeenHandshakes {
        /// Timestamps of every peer.
        seen: SeenHandshakes,
    },
    /// Answer to [`Request::Changes`].
    Changes {
        /// Version of the state; differs from the previous answer after a change.
        version: u64,
    },
    /// Answers to [`Request::Capture`], at least one a second.
    #[serde(rename = "seen")]
    Captured {
        /// What was seen, lane by lane in order.
        #[serde(rename = "seen")]
        packets: Vec<CapturedPacket>,
        /// Packets that were to be told and were too many, since the last answer.
        missed: u64,
    },
    /// Answer to [`Request::TakeOver`]. The descriptors of the data plane's lock and of the store
    /// follow. The receiver confirms their receipt with one byte; the sender then passes the
    /// ownership on with one byte.
    HandOver,
    /// The request could not be carried out; what was in force before still is.
    Error {
        /// What kind of thing failed, for the exit code.
        kind: ErrorKind,
        /// What failed and how to mend it.
        message: String,
    },
}

/// What is of another version cannot be taken up: the next data process begins anew.
pub const HANDOVER_VERSION: u32 = 2;

/// Which node a data process works for, so that an agent does not take another's for its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeIdentity {
    /// Name of the node.
    pub name: String,
    /// Its identity.
    pub public_key: PublicKey,
}

/// What kind of thing failed in the data process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// The request makes no sense (version, contradicting records, an update before a snapshot).
    Invalid,
    /// What is wanted differs in what a data process cannot change: another one can.
    #[serde(rename = "fixed")]
    RestartRequired,
    /// A device or a feature of the kernel is missing.
    Missing,
    /// Something belongs to somebody else: the port, the interface.
    #[serde(rename = "taken")]
    InUse,
    /// A privilege is missing.
    Privilege,
    /// Anything else.
    Internal,
}
