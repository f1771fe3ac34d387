//! Requests to the data process and its responses.

use serde::{Deserialize, Serialize};

use crate::capture::{CaptureRequest, CapturedPacket};
use crate::keys::PublicKey;
use crate::report::Report;
use crate::settings::{SeenHandshakes, Snapshot, Update};

/// Version of the protocol. It is raised with every change that an earlier release would
/// misinterpret. Both sides refuse another version ([`Request::Hello`]).
pub const PROTOCOL_VERSION: u32 = 4;

/// A request to the data process: from the control process, from a command, or, for
/// [`Self::TakeOver`], from the next keeper.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Compares protocol versions. The first request on a connection of the control process.
    Hello {
        /// [`PROTOCOL_VERSION`] of the sender.
        version: u32,
    },
    /// Replaces the state of the data process by a snapshot.
    Apply {
        /// Desired state, complete.
        snapshot: Box<Snapshot>,
    },
    /// Adds, changes or removes some peers of the active snapshot.
    Update {
        /// Changed peers, and the revision after the change.
        update: Update,
    },
    /// Requests counters and states.
    Report {
        /// True to include each peer, which takes milliseconds for thousands of peers.
        peers: bool,
    },
    /// Requests the [`SeenHandshakes`], which the control process passes to the next data process.
    SeenHandshakes,
    /// Changes the log filter.
    LogLevel {
        /// Filter directives of `tracing-subscriber`; `None` restores the filter of the start.
        level: Option<String>,
    },
    /// Starts a capture. The responses are [`Response::Captured`], repeated until the client closes
    /// the connection.
    #[serde(rename = "watch")]
    Capture {
        /// Selection of packets.
        #[serde(rename = "watch")]
        capture: CaptureRequest,
    },
    /// Waits at most 1 s for a change to which the control process reacts immediately: a change of
    /// the reduced path MTUs.
    Changes {
        /// Version of the last response; 0 in the first request.
        known: u64,
    },
    /// Stops the data process. The TUN device remains.
    Shutdown,
    /// Stops the data process and requests its descriptors and sessions for the next keeper.
    TakeOver {
        /// [`HANDOVER_VERSION`] of the sender.
        version: u32,
    },
}

/// A response of the data process.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "response", rename_all = "snake_case")]
pub enum Response {
    /// Response to [`Request::Hello`].
    Hello {
        /// [`PROTOCOL_VERSION`] of the data process.
        version: u32,
        /// Process id of the data process.
        pid: u32,
        /// Node that the data process serves; `None` before the first snapshot.
        #[serde(default)]
        node: Option<NodeIdentity>,
        /// True if the data process accepts [`Snapshot::seen_handshakes`]. Earlier releases refuse
        /// a snapshot with this field.
        #[serde(default, rename = "takes_seen_handshakes")]
        accepts_seen_handshakes: bool,
    },
    /// A snapshot or an update is active in every lane.
    Applied {
        /// Active revision.
        revision: u64,
    },
    /// Response to [`Request::Report`].
    Report {
        /// Report of the data process.
        report: Box<Report>,
    },
    /// Response to [`Request::SeenHandshakes`].
    SeenHandshakes {
        /// Timestamps of all peers.
        seen: SeenHandshakes,
    },
    /// Response to [`Request::Changes`].
    Changes {
        /// Version of the state. It differs from the version of the request after a change.
        version: u64,
    },
    /// Responses to [`Request::Capture`], at least one per second.
    #[serde(rename = "seen")]
    Captured {
        /// Captured packets. The packets of one lane are in order.
        #[serde(rename = "seen")]
        packets: Vec<CapturedPacket>,
        /// Number of matching packets since the previous response that were left out, because they
        /// exceeded the rate limit or because the queue was full.
        missed: u64,
    },
    /// Response to [`Request::TakeOver`]. The descriptors of the data plane's lock and of the store
    /// follow (SCM_RIGHTS). The receiver confirms them with one byte, and the sender transfers the
    /// ownership with one byte.
    HandOver,
    /// The request failed. The state from before the request remains active.
    Error {
        /// Kind of the error, which determines the exit code of the agent.
        kind: ErrorKind,
        /// Error and remedy, for users.
        message: String,
    },
}

/// Version of the hand-over between keepers. After a change of version, the next data process
/// starts without the sockets and sessions of the previous one.
pub const HANDOVER_VERSION: u32 = 2;

/// Node that a data process serves. An agent refuses the data process of another node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeIdentity {
    /// Name of the node.
    pub name: String,
    /// Active public key of the node.
    pub public_key: PublicKey,
}

/// Kind of an error of the data process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// The request is invalid: wrong version, conflicting records, or an update before the first
    /// snapshot.
    Invalid,
    /// The snapshot changes a setting that is fixed for the lifetime of a data process. A new data
    /// process accepts the snapshot.
    #[serde(rename = "fixed")]
    RestartRequired,
    /// A device or a kernel feature is missing.
    Missing,
    /// A resource belongs to another program: the UDP port or the interface. Also the limit of
    /// concurrent captures.
    #[serde(rename = "taken")]
    InUse,
    /// The data process lacks a capability (capabilities(7)).
    Privilege,
    /// Any other error.
    Internal,
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::capture::{CaptureKind, CapturedPacket};
    use crate::report::ReducedPath;

    fn document(value: impl Serialize) -> Value {
        serde_json::to_value(value).unwrap()
    }

    #[test]
    fn renamed_items_keep_their_json_keys() {
        let capture = CaptureRequest { kind: CaptureKind::Drops, nets: Vec::new(), snap: 96 };
        let expected = json!({
            "request": "watch", "watch": { "what": "drops", "nets": [], "snap": 96 },
        });
        assert_eq!(document(Request::Capture { capture }), expected);
        let packets: Vec<CapturedPacket> = Vec::new();
        let expected = json!({ "response": "seen", "seen": [], "missed": 3 });
        assert_eq!(document(Response::Captured { packets, missed: 3 }), expected);
        let hello =
            Response::Hello { version: 4, pid: 7, node: None, accepts_seen_handshakes: true };
        assert_eq!(document(hello)["takes_seen_handshakes"], true);
        assert_eq!(document(ErrorKind::RestartRequired), "fixed");
        assert_eq!(document(ErrorKind::InUse), "taken");
        let path = ReducedPath { public_key: PublicKey([1; 32]), mtu: 1280 };
        let report = Report { reduced_paths: vec![path], ..Report::default() };
        assert_eq!(document(report)["narrow"][0]["mtu"], 1280);
    }
}
