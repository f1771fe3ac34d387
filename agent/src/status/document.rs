//! The status document: body of `GET /status` on the control socket, and its parts.

use std::net::IpAddr;
use std::path::PathBuf;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use skein_ipc::Report;
use skein_ipc::keys::{PublicKey, PublicKeys};
use skein_netlink::firewall::reconciler::FirewallStatus;

use crate::policy::PolicyStatus;

/// Body of `GET /status` on the control socket.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Document {
    /// Name of the node.
    pub node: String,
    /// Version of the agent.
    pub version: String,
    /// Identity of the node.
    pub public_key: PublicKey,
    /// Age of the key and progress of a key rotation.
    pub key: RotationStatus,
    /// Readiness of the agent.
    pub ready: bool,
    /// Reasons that the agent is not ready; empty if it is ready.
    pub reasons: Vec<String>,
    /// Defaults of the configuration that this host does not support, one sentence each.
    #[serde(default)]
    pub notes: Vec<String>,
    /// Desired state of the overlay's interface.
    pub interface: InterfaceStatus,
    /// State of the node records.
    pub records: RegistryStatus,
    /// State of the nftables table; absent from agents of earlier releases.
    #[serde(default)]
    pub firewall: FirewallStatus,
    /// State of the network policies; absent if they have no effect.
    #[serde(default)]
    pub policy: Option<PolicyStatus>,
    /// State of the data process, as the control process knows it.
    pub dataplane: DataplaneStatus,
    /// Counters and states of the data process; absent while it is not available.
    pub report: Option<Report>,
    /// CNI versions of the network configuration; absent if the agent serves no pods.
    #[serde(default)]
    pub cni: Option<Offer>,
    /// Validated configuration of the agent.
    pub config: serde_json::Value,
}

/// Desired state of the overlay's interface.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterfaceStatus {
    /// Name of the network interface.
    pub name: String,
    /// Index of the network interface.
    pub index: u32,
    /// MTU of the interface in bytes.
    pub mtu: u16,
    /// Problem and remedy if the underlay or the configuration leaves less than the minimum, which
    /// is used instead.
    #[serde(default)]
    pub mtu_problem: Option<String>,
    /// Addresses of this node.
    pub addresses: Vec<IpAddr>,
    /// Pod CIDRs of the peers, which have routes to the interface.
    pub routes: Vec<IpNet>,
    /// Pod CIDRs of this node.
    pub local_cidrs: Vec<IpNet>,
    /// Prefixes of peers to which another program has a route.
    #[serde(default)]
    pub conflicts: Vec<PeerConflict>,
}

/// A peer's prefix to which another program of this node has a route, so that the overlay does not
/// carry it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerConflict {
    /// Name of the peer.
    pub peer: String,
    /// Pod CIDR of the peer.
    pub prefix: IpNet,
    /// The failure and its remedy.
    pub problem: String,
}

/// Stage of a key rotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// The node has one key.
    Steady,
    /// The record contains the next key. Peers that have read it accept both keys.
    Announced,
    /// The new key is active, and peers still accept the old one.
    Changed,
}

impl Stage {
    /// All stages in their order.
    pub const ALL: [Self; 3] = [Self::Steady, Self::Announced, Self::Changed];

    /// Returns the value of the metric label `stage`.
    pub fn label(self) -> &'static str {
        match self {
            Stage::Steady => "steady",
            Stage::Announced => "announced",
            Stage::Changed => "changed",
        }
    }
}

/// State of this node's key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RotationStatus {
    /// Stage of the key rotation.
    pub stage: Stage,
    /// Active key, and during a rotation the next or the previous key.
    pub keys: PublicKeys,
    /// Age of the active key in seconds.
    pub age_seconds: u64,
    /// Event that the rotation waits for, as text; `None` if no rotation is in progress.
    pub waits_for: Option<String>,
}

impl RotationStatus {
    /// Returns the state of a node with one key of age 0.
    pub fn of(key: PublicKey) -> Self {
        Self { stage: Stage::Steady, keys: key.into(), age_seconds: 0, waits_for: None }
    }
}

/// State of the node records.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegistryStatus {
    /// Path of the file or directory, or `kubernetes`.
    pub source: PathBuf,
    /// Number of active records, this node's included.
    pub accepted: usize,
    /// Rejected records, by file or SkeinNode.
    pub rejected: Vec<RejectedRecords>,
    /// Error of the last attempt to read the source; `None` after a success.
    pub source_error: Option<String>,
}

/// Rejected records of one file, or of one SkeinNode.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RejectedRecords {
    /// Path of the file, or `skeinnodes/` and the name of the SkeinNode.
    #[serde(rename = "file")]
    pub origin: PathBuf,
    /// Error in the records, with its remedy.
    pub error: String,
}

/// State of the data process, as the control process knows it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataplaneStatus {
    /// A data process is connected and has the desired state.
    pub up: bool,
    /// Process id; `None` if it is not visible in this process namespace.
    pub pid: Option<u32>,
    /// Number of data processes that replaced a lost one since the control process started.
    pub restarts: u64,
    /// Revision of the active desired state.
    pub revision: u64,
    /// Reason that the data process is not up, or the last change that it refused.
    pub error: Option<String>,
}

/// CNI versions of the network configuration, and the plugins that limit them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// Versions that every plugin supports, oldest first; empty before the configuration is
    /// written.
    pub versions: Vec<String>,
    /// Sentences about the plugins that exclude a newer version, one for each.
    pub limits: Vec<String>,
}

impl Offer {
    /// Returns the newest version; empty before the configuration is written.
    pub fn newest(&self) -> &str {
        self.versions.last().map_or("", String::as_str)
    }

    /// Newest version that a libcni before 1.2 accepts. Such a libcni takes `cniVersion` only, and
    /// refuses a version that it does not know.
    pub(crate) fn conservative(&self) -> &str {
        let old = self.versions.iter().rev().find(|version| version.as_str() <= "1.0.0");
        old.map_or(self.newest(), String::as_str)
    }
}
