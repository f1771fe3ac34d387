//! The status document: body of `GET /status` on the control socket, and its parts.

use std::net::IpAddr;
use std::path::PathBuf;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use skein_ipc::keys::{PublicKey, PublicKeys};
use skein_ipc::{Capability, ReducedPath, Report, UnreachablePeer};
use skein_netlink::firewall::reconciler::FirewallStatus;

/// Body of `GET /status` on the control socket.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Document {
    /// Name of the node.
    pub node: String,
    /// Version of the agent.
    pub version: String,
    /// Identity of the node.
    pub public_key: PublicKey,
    /// How old it is, and how far a change of it has come.
    pub key: RotationStatus,
    /// Whether the agent is ready.
    pub ready: bool,
    /// Why it is not.
    pub reasons: Vec<String>,
    /// Defaults of the configuration that this host cannot have.
    #[serde(default)]
    pub notes: Vec<String>,
    /// The interface.
    pub interface: InterfaceStatus,
    /// The node records.
    pub records: RegistryStatus,
    /// State of the nftables table; absent from agents of earlier releases.
    #[serde(default)]
    pub firewall: FirewallStatus,
    /// The data process.
    pub dataplane: DataplaneStatus,
    /// Its counters and states; absent while it is away.
    pub report: Option<Report>,
    /// CNI versions of the network configuration; absent if the agent serves no pods.
    #[serde(default)]
    pub cni: Option<Offer>,
    /// The configuration, as it was validated.
    pub config: serde_json::Value,
}

/// The interface as it is wanted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterfaceStatus {
    /// Interface name.
    pub name: String,
    /// Interface index.
    pub index: u32,
    /// MTU in bytes.
    pub mtu: u16,
    /// Problem and remedy if the underlay or the configuration leaves less than the minimum, which
    /// is used instead.
    #[serde(default)]
    pub mtu_problem: Option<String>,
    /// Addresses of this node.
    pub addresses: Vec<IpAddr>,
    /// Prefixes of the other nodes.
    pub routes: Vec<IpNet>,
    /// Prefixes of this node.
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

/// How far a change of the key has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// There is one key.
    Steady,
    /// The next key is accepted by whoever knows of it.
    Announced,
    /// The new key is in force, and the old one still accepted.
    Changed,
}

impl Stage {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Steady, Self::Announced, Self::Changed];

    /// The value of the metric's label.
    pub fn label(self) -> &'static str {
        match self {
            Stage::Steady => "steady",
            Stage::Announced => "announced",
            Stage::Changed => "changed",
        }
    }
}

/// What the status shows of the key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RotationStatus {
    /// How far a change has come.
    pub stage: Stage,
    /// The key in force, and the next or the one before.
    pub keys: PublicKeys,
    /// Seconds since the key in force was made.
    pub age_seconds: u64,
    /// What has to happen before the change goes on, for people; `None` where there is none.
    pub waits_for: Option<String>,
}

impl RotationStatus {
    /// Of a node with one key.
    pub fn of(key: PublicKey) -> Self {
        Self { stage: Stage::Steady, keys: key.into(), age_seconds: 0, waits_for: None }
    }
}

/// What the status shows of the registry.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegistryStatus {
    /// File or directory, or `kubernetes`.
    pub source: PathBuf,
    /// Records in force, this node's included.
    pub accepted: usize,
    /// Files that are refused.
    pub rejected: Vec<RejectedFile>,
    /// Why the source cannot be read, where it cannot.
    pub source_error: Option<String>,
}

/// A file of records that is refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RejectedFile {
    /// Its path.
    pub file: PathBuf,
    /// What is wrong with it.
    pub error: String,
}

/// What the status shows of the data process.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataplaneStatus {
    /// Whether one is connected and in the wanted state.
    pub up: bool,
    /// Its process id, where it can be seen.
    pub pid: Option<u32>,
    /// How often one has come back after another had gone, since the control process started.
    pub restarts: u64,
    /// The revision in force.
    pub revision: u64,
    /// Why it is not up, or the last change that it refused.
    pub error: Option<String>,
    /// The ladder, as it was seconds ago; the report has it, too.
    #[serde(skip)]
    pub capabilities: Vec<Capability>,
    /// Likewise the paths that carry less than the nodes, in the order of the keys.
    #[serde(skip)]
    pub narrow: Vec<ReducedPath>,
    /// Likewise the ports of its UDP sockets ([`Report::source_ports`]).
    #[serde(skip)]
    pub source_ports: Vec<u16>,
    /// Likewise how many peers may not know this node's new key ([`Report::second_key_peers`]).
    #[serde(skip)]
    pub second_key_peers: usize,
    /// Likewise the peers that are unreachable, by name.
    #[serde(skip)]
    pub unreachable: Vec<UnreachablePeer>,
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
    /// Newest version.
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
