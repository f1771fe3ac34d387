//! Counters and states that a data process reports.

use std::fmt;
use std::net::SocketAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::keys::PublicKey;

/// Counters and states of a data process. Counters start at zero with the process.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Report {
    /// Process id.
    pub pid: u32,
    /// Seconds since the process started.
    pub uptime_seconds: f64,
    /// The revision in force; 0 before the first snapshot.
    pub revision: u64,
    /// The ladder.
    pub capabilities: Vec<Capability>,
    /// Mechanisms that confine the data process; empty if it is of an earlier release.
    #[serde(default)]
    pub confinement: Vec<Confinement>,
    /// Counters of each lane.
    pub lanes: Vec<LaneReport>,
    /// Ports of the process's UDP sockets, in order, each once: source ports of all its datagrams.
    /// Empty before the first snapshot and in reports of earlier releases.
    #[serde(default)]
    pub source_ports: Vec<u16>,
    /// Packets that the kernel dropped because a queue of the TUN device was full, since the
    /// creation of the device, which outlives data processes.
    #[serde(default)]
    pub tun_queue_drops: u64,
    /// Drops by direction and reason, all lanes and the manager; every known reason is listed.
    pub drops: Vec<DropReport>,
    /// Handshakes by result; every known result is listed.
    pub handshakes: Vec<HandshakeCount>,
    /// Peers with a session of the node's
    /// [second private key](crate::NodeSettings::second_private_key). While the key changes, these
    /// peers may not know the new key.
    #[serde(default)]
    pub second_key_peers: usize,
    /// Peers whose path carries less than this node's MTU, in no order.
    #[serde(rename = "narrow")]
    pub reduced_paths: Vec<ReducedPath>,
    /// Peers that are unreachable, by name: also in a report without peers.
    #[serde(default)]
    pub unreachable: Vec<UnreachablePeer>,
    /// Peers, in the order of their names.
    pub peers: Vec<PeerReport>,
    /// Name of the TUN device, for the connection's thread, which adds the device's own counters.
    #[serde(skip)]
    pub tun: Option<String>,
}

/// A mechanism of the kernel that confines the data process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Confinement {
    /// `seccomp` or `landlock`.
    pub mechanism: String,
    /// Whether the mechanism is active.
    pub state: ConfinementState,
    /// Reason for another state than [`ConfinementState::On`].
    pub reason: Option<String>,
}

/// State of a [`Confinement`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ConfinementState {
    /// The mechanism is active.
    On,
    /// The kernel does not have the mechanism.
    Unsupported,
    /// The kernel has the mechanism, and refused it.
    Failed,
    /// The configuration switches the mechanism off.
    ForcedOff,
}

impl Report {
    /// Returns why the data process is not confined by every mechanism; `None` if it is.
    pub fn unconfined(&self) -> Option<String> {
        if self.confinement.is_empty() {
            return Some("it is of an earlier release, which does not report it".to_owned());
        }
        let missing = self.confinement.iter().filter(|c| c.state != ConfinementState::On);
        let missing: Vec<_> = missing.map(ToString::to_string).collect();
        (!missing.is_empty()).then(|| missing.join(", "))
    }
}

impl fmt::Display for Confinement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match self.state {
            ConfinementState::On => "on",
            ConfinementState::Unsupported => "unsupported",
            ConfinementState::Failed => "failed",
            ConfinementState::ForcedOff => "forced off",
        };
        write!(f, "{} {state}", self.mechanism)?;
        self.reason.iter().try_for_each(|reason| write!(f, " ({reason})"))
    }
}

/// A path that carries less than the nodes at its ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ReducedPath {
    /// To whom it leads.
    pub public_key: PublicKey,
    /// The longest inner packet that it carries, in bytes.
    pub mtu: u16,
}

/// One rung of the ladder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capability {
    /// `tun_uso`, `tun_tso`, `tun_checksum`, `udp_gso`, `udp_gro`, `udp_ecn`, `reuseport_steering`.
    pub name: String,
    /// What it is now.
    pub state: CapabilityState,
    /// Why it is not [`CapabilityState::On`].
    pub reason: Option<String>,
}

/// State of a rung.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CapabilityState {
    /// In use.
    On,
    /// In use, but not everywhere (GSO off for some destinations).
    Degraded,
    /// The kernel or the device does not have it.
    Unsupported,
    /// The configuration forbids it.
    ForcedOff,
}

impl fmt::Display for CapabilityState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            CapabilityState::On => "on",
            CapabilityState::Degraded => "degraded",
            CapabilityState::Unsupported => "unsupported",
            CapabilityState::ForcedOff => "forced off",
        })
    }
}

/// Counters of one lane. "Inner" is what crosses the TUN as the pods would see it on a wire
/// (segments), "outer" are datagrams on the underlay; bytes are IP lengths for inner packets and
/// UDP payload lengths for outer ones.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct LaneReport {
    /// Number of the lane.
    pub lane: u8,
    /// From the TUN to the underlay.
    pub egress: DirectionReport,
    /// From the underlay to the TUN.
    pub ingress: DirectionReport,
    /// Datagrams that the kernel dropped because this lane's receive queue was full (SO_RXQ_OVFL).
    pub receive_queue_overflow: u64,
    /// Waits for packets that busy polling ended.
    pub waits_polled: u64,
    /// Waits for packets that the lane slept through.
    pub waits_slept: u64,
    /// Sends that fell back from UDP_SEGMENT to single datagrams.
    pub gso_fallbacks: u64,
    /// Destinations for which GSO is off now.
    pub gso_off_destinations: u64,
}

/// Counters of one direction of a lane.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct DirectionReport {
    /// Inner packets (segments).
    pub inner_packets: u64,
    /// Bytes of these.
    pub inner_bytes: u64,
    /// Packets as the TUN gave or took them (a superpacket counts once).
    pub tun_packets: u64,
    /// Outer datagrams.
    pub outer_packets: u64,
    /// Bytes of these.
    pub outer_bytes: u64,
    /// System calls on the underlay socket that moved data.
    pub calls: u64,
    /// Outer datagrams per system call.
    pub packets_per_call: HistogramReport,
    /// Outer datagrams per GSO or GRO message (1 where nothing was batched).
    pub segments_per_message: HistogramReport,
    /// Inner packets per outer datagram (above 1 where small packets were bundled).
    pub inner_per_outer: HistogramReport,
}

/// A histogram with the upper bounds 1, 2, 4, … 1024 and infinity: `buckets[i]` counts values above
/// the bound before and up to bound i (not cumulative).
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct HistogramReport {
    /// 12 counts.
    pub buckets: Vec<u64>,
    /// Sum of all values.
    pub sum: u64,
}

impl HistogramReport {
    /// Upper bounds of the buckets but the last.
    pub const BOUNDS: [u64; 11] = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024];

    /// Number of values.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }
}

/// Drops of one reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DropReport {
    /// `egress` or `ingress`.
    pub direction: String,
    /// Label of the reason (`skein_core::drop::DropReason::label`).
    pub reason: String,
    /// Packets.
    pub packets: u64,
}

/// Handshakes of one result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandshakeCount {
    /// `initiated`, `completed_initiator`, `completed_responder`, `timeout`, …
    pub result: String,
    /// How many.
    pub count: u64,
}

/// State of one peer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PeerReport {
    /// Name of the node.
    pub name: String,
    /// Its identity.
    pub public_key: PublicKey,
    /// Where packets to it go now.
    pub endpoint: Option<SocketAddr>,
    /// What it owns.
    pub pod_cidrs: Vec<IpNet>,
    /// How it is.
    pub state: PeerState,
    /// Why it is not well, where it is not.
    pub reason: Option<String>,
    /// Cipher of the current session.
    pub cipher: Option<String>,
    /// Lanes of the peer in the current session.
    pub lanes: Option<u8>,
    /// Seconds since the current session's handshake.
    pub handshake_age_seconds: Option<f64>,
    /// Seconds since anything authentic came.
    pub last_received_seconds: Option<f64>,
    /// Smoothed round-trip time in microseconds.
    pub rtt_us: Option<u64>,
    /// The longest inner packet that its path carries, in bytes, where that is less than this node's.
    pub path_mtu: Option<u16>,
    /// Whether UDP_SEGMENT is in use towards it.
    pub gso: bool,
    /// Inner packets to it.
    pub tx_packets: u64,
    /// Inner bytes to it.
    pub tx_bytes: u64,
    /// Inner packets from it.
    pub rx_packets: u64,
    /// Inner bytes from it.
    pub rx_bytes: u64,
}

/// A peer that packets go to and nothing authentic comes back from, or the other way round.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct UnreachablePeer {
    /// Name of the node.
    pub name: String,
    /// What is wrong.
    pub reason: String,
}

/// How a peer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PeerState {
    /// No session: nothing was sent yet, or the last one ended unused.
    Idle,
    /// A handshake is under way.
    Connecting,
    /// A session, and answers come.
    Established,
    /// A session or handshake, but no answer.
    Unreachable,
}

impl fmt::Display for PeerState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            PeerState::Idle => "idle",
            PeerState::Connecting => "connecting",
            PeerState::Established => "established",
            PeerState::Unreachable => "unreachable",
        })
    }
}
