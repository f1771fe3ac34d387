//! The report of a data process: counters, offload capabilities, confinement and peers.

use std::fmt;
use std::net::SocketAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use skein_core::tunnel::{Cipher, HandshakeResult, UnreachableReason};

use crate::keys::PublicKey;
use crate::reported::{DropKind, ReportValue, Reported};

/// Defines an enum whose values have fixed texts in reports.
macro_rules! report_values {
    (
        $(#[$doc:meta])*
        $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $text:literal,)* }
    ) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $name { $($(#[$variant_doc])* $variant,)* }

        impl ReportValue for $name {
            const VALUES: &'static [Self] = &[$(Self::$variant,)*];

            fn text(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }
        }
    };
}

/// Counters and states of a data process. Counters are 0 at the start of the process, except
/// [`Self::tun_queue_drops`].
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Report {
    /// Process id of the data process.
    pub pid: u32,
    /// Seconds since the process started.
    pub uptime_seconds: f64,
    /// Active revision ([`Snapshot::revision`](crate::Snapshot::revision)); 0 before the first
    /// snapshot.
    pub revision: u64,
    /// Offload capabilities with their states.
    pub capabilities: Vec<Capability>,
    /// Mechanisms that confine the data process; empty if it is of an earlier release.
    #[serde(default)]
    pub confinement: Vec<Confinement>,
    /// Counters of each lane, in the order of lane numbers.
    pub lanes: Vec<LaneReport>,
    /// Ports of the UDP sockets of the data process, ascending and without duplicates. They are the
    /// source ports of all datagrams that the process sends. Empty before the first snapshot and in
    /// reports of earlier releases.
    #[serde(default)]
    pub source_ports: Vec<u16>,
    /// Packets that the kernel dropped because a queue of the TUN device was full, since the
    /// creation of the device, which outlives data processes.
    #[serde(default)]
    pub tun_queue_drops: u64,
    /// Drops by direction and reason, sum of all lanes and the session manager. Every known reason
    /// has an entry.
    pub drops: Vec<DropReport>,
    /// Handshakes by result. Every known result has an entry.
    pub handshakes: Vec<HandshakeCount>,
    /// Number of peers with a session of the node's
    /// [second private key](crate::NodeSettings::second_private_key). During a key rotation, these
    /// peers may not know the new key yet.
    #[serde(default)]
    pub second_key_peers: usize,
    /// Peers with a path MTU below this node's MTU, in no particular order.
    #[serde(rename = "narrow")]
    pub reduced_paths: Vec<ReducedPath>,
    /// Unreachable peers, sorted by name. Present in every report, even without
    /// [`Self::peers`].
    #[serde(default)]
    pub unreachable: Vec<UnreachablePeer>,
    /// Peers, sorted by name; empty unless requested
    /// ([`Request::Report`](crate::Request::Report)).
    pub peers: Vec<PeerReport>,
    /// Name of the TUN device. The name is not part of the JSON document. The thread that answers a
    /// client of the control socket uses the name to fill in [`Self::tun_queue_drops`].
    #[serde(skip)]
    pub tun: Option<String>,
}

/// A kernel mechanism that confines the data process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Confinement {
    /// Mechanism of the kernel.
    pub mechanism: Reported<Mechanism>,
    /// State of the mechanism.
    pub state: Reported<ConfinementState>,
    /// Reason for a state other than [`ConfinementState::On`].
    pub reason: Option<String>,
}

report_values! {
    /// Kernel mechanism that can confine a data process.
    Mechanism {
        /// Landlock, which forbids access to files (landlock(7)).
        Landlock = "landlock",
        /// Seccomp, which limits the system calls (seccomp(2)).
        Seccomp = "seccomp",
    }
}

report_values! {
    /// State of a [`Confinement`].
    ConfinementState {
        /// The mechanism is active.
        On = "on",
        /// The kernel does not support the mechanism.
        Unsupported = "unsupported",
        /// The kernel supports the mechanism and returned an error.
        Failed = "failed",
        /// The configuration disables the mechanism (`dataplane.seccomp = false`).
        ForcedOff = "forced_off",
    }
}

impl Report {
    /// Returns a text for users that lists the mechanisms that do not confine the data process,
    /// with states and reasons. Returns `None` if every mechanism confines the data process.
    pub fn unconfined(&self) -> Option<String> {
        if self.confinement.is_empty() {
            return Some(
                "the data process is an earlier release, which does not report its confinement"
                    .to_owned(),
            );
        }
        let missing = self.confinement.iter().filter(|c| c.state != ConfinementState::On);
        let missing: Vec<_> = missing.map(ToString::to_string).collect();
        (!missing.is_empty()).then(|| missing.join(", "))
    }
}

impl fmt::Display for ConfinementState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ConfinementState::ForcedOff => "forced off",
            state => state.text(),
        })
    }
}

impl fmt::Display for Confinement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.mechanism.text(), self.state)?;
        self.reason.iter().try_for_each(|reason| write!(f, " ({reason})"))
    }
}

/// A peer with a reduced path MTU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ReducedPath {
    /// Active public key of the peer.
    pub public_key: PublicKey,
    /// Path MTU towards the peer: length of the longest inner packet in bytes.
    pub mtu: u16,
}

/// State of one offload capability.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capability {
    /// Name of the capability.
    pub name: Reported<CapabilityName>,
    /// State of the capability.
    pub state: Reported<CapabilityState>,
    /// Reason for a state other than [`CapabilityState::On`].
    pub reason: Option<String>,
}

report_values! {
    /// Name of an offload capability. The first six are the fields of
    /// [`OffloadSettings`](crate::OffloadSettings).
    CapabilityName {
        /// UDP superpackets on the TUN device.
        TunUso = "tun_uso",
        /// TCP superpackets on the TUN device.
        TunTso = "tun_tso",
        /// Partial checksums on the TUN device.
        TunChecksum = "tun_checksum",
        /// GSO batches on send (UDP_SEGMENT).
        UdpGso = "udp_gso",
        /// Merged datagrams on receive (UDP_GRO).
        UdpGro = "udp_gro",
        /// Copies of the ECN field between inner and outer headers (RFC 6040).
        UdpEcn = "udp_ecn",
        /// Distribution of datagrams to the lanes' sockets by their lane byte.
        ReuseportSteering = "reuseport_steering",
    }
}

report_values! {
    /// State of a [`Capability`].
    CapabilityState {
        /// The capability is in use.
        On = "on",
        /// The capability is in use, except for some destinations (`udp_gso`) or in one direction
        /// (`udp_ecn`).
        Degraded = "degraded",
        /// The kernel or the device does not support the capability.
        Unsupported = "unsupported",
        /// The configuration disables the capability.
        ForcedOff = "forced_off",
    }
}

impl CapabilityName {
    /// Returns whether the capability belongs to the TUN device, and not to the UDP sockets.
    pub fn is_of_tun(self) -> bool {
        matches!(self, Self::TunUso | Self::TunTso | Self::TunChecksum)
    }
}

impl fmt::Display for CapabilityState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            CapabilityState::ForcedOff => "forced off",
            state => state.text(),
        })
    }
}

/// Counters of one lane. Inner packets are counted as segments, as a pod would see them on a wire,
/// and their bytes are IP lengths. Outer packets are datagrams on the underlay, and their bytes are
/// UDP payload lengths.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct LaneReport {
    /// Lane number, 0 to 63.
    pub lane: u8,
    /// Counters of the direction from the TUN device to the underlay.
    pub egress: DirectionReport,
    /// Counters of the direction from the underlay to the TUN device.
    pub ingress: DirectionReport,
    /// Datagrams that the kernel dropped because the receive queue of the lane's socket was full
    /// (SO_RXQ_OVFL).
    pub receive_queue_overflow: u64,
    /// Number of waits that ended during busy polling.
    pub waits_polled: u64,
    /// Number of waits in which the lane blocked in epoll.
    pub waits_slept: u64,
    /// UDP_SEGMENT messages that the kernel refused and the lane sent as single datagrams.
    pub gso_fallbacks: u64,
    /// Current number of destinations with UDP_SEGMENT disabled.
    pub gso_off_destinations: u64,
}

/// Counters of one direction of a lane.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct DirectionReport {
    /// Inner packets, each segment of a superpacket counted.
    pub inner_packets: u64,
    /// Sum of the IP lengths of the inner packets, bytes.
    pub inner_bytes: u64,
    /// Reads from or writes to the TUN device; a superpacket counts once.
    pub tun_packets: u64,
    /// Datagrams on the underlay.
    pub outer_packets: u64,
    /// Sum of the UDP payload lengths of the datagrams, bytes.
    pub outer_bytes: u64,
    /// System calls on the underlay socket that moved data.
    pub calls: u64,
    /// Outer datagrams per system call.
    pub packets_per_call: HistogramReport,
    /// Outer datagrams per GSO or GRO message; 1 for a single datagram.
    pub segments_per_message: HistogramReport,
    /// Inner packets per outer datagram; above 1 for a bundle.
    pub inner_per_outer: HistogramReport,
}

/// A histogram with the upper bounds 1, 2, 4, … 1024 and infinity. `buckets[i]` counts the values
/// above bound `i - 1` and up to bound `i`; the counts are not cumulative.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct HistogramReport {
    /// Number of values in each of the 12 buckets; empty if there are no values.
    pub buckets: Vec<u64>,
    /// Sum of all values.
    pub sum: u64,
}

impl HistogramReport {
    /// Upper bounds of the first 11 buckets. The last bucket has no upper bound.
    pub const BOUNDS: [u64; 11] = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024];

    /// Returns the number of values.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }
}

/// Counter of the packets that were dropped in one direction for one reason: an entry of
/// [`Report::drops`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DropReport {
    /// Direction of the packets, and the reason of their drop.
    #[serde(flatten)]
    pub kind: DropKind,
    /// Number of packets.
    pub packets: u64,
}

/// Number of handshakes with one result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandshakeCount {
    /// Result of the handshakes.
    pub result: Reported<HandshakeResult>,
    /// Number of handshakes with this result. If the result describes one message, for example a
    /// cookie reply, the number of such messages.
    pub count: u64,
}

/// State of one peer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PeerReport {
    /// Name of the node.
    pub name: String,
    /// Active public key of the peer.
    pub public_key: PublicKey,
    /// Current destination of data datagrams; `None` while no endpoint is known.
    pub endpoint: Option<SocketAddr>,
    /// Prefixes that the peer owns.
    pub pod_cidrs: Vec<IpNet>,
    /// Connection state.
    pub state: Reported<PeerState>,
    /// Reason for a state other than [`PeerState::Established`], if one is known.
    pub reason: Option<Reported<UnreachableReason>>,
    /// Cipher of the current session; `None` without a session.
    pub cipher: Option<Reported<Cipher>>,
    /// Number of the peer's lanes in the current session; `None` without a session.
    pub lanes: Option<u8>,
    /// Age of the current session in seconds; `None` without a session.
    pub handshake_age_seconds: Option<f64>,
    /// Time that has passed since the last authentic datagram from the peer, in seconds. The value
    /// is a duration, not a time of day. `None` before the first datagram.
    pub last_received_seconds: Option<f64>,
    /// Smoothed round-trip time in microseconds; `None` before the first measurement.
    pub rtt_us: Option<u64>,
    /// Length of the longest inner packet that the path carries, bytes; `None` unless it is below
    /// this node's MTU.
    pub path_mtu: Option<u16>,
    /// True if UDP_SEGMENT is in use towards the peer.
    pub gso: bool,
    /// Inner packets to the peer.
    pub tx_packets: u64,
    /// Inner bytes to the peer (IP lengths).
    pub tx_bytes: u64,
    /// Inner packets from the peer.
    pub rx_packets: u64,
    /// Inner bytes from the peer (IP lengths).
    pub rx_bytes: u64,
}

/// A peer in the state [`PeerState::Unreachable`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnreachablePeer {
    /// Name of the node.
    pub name: String,
    /// Reason why the peer is unreachable.
    pub reason: Reported<UnreachableReason>,
}

report_values! {
    /// Connection state of a peer.
    #[derive(Serialize, Deserialize)]
    #[serde(rename_all = "snake_case")]
    PeerState {
        /// No session and no handshake: there was no traffic yet, or the last session expired
        /// unused.
        Idle = "idle",
        /// A handshake is pending, and the peer is not counted as unreachable.
        Connecting = "connecting",
        /// A session exists, and the peer answers.
        Established = "established",
        /// A session or a pending handshake exists, and the peer does not answer.
        Unreachable = "unreachable",
    }
}

impl fmt::Display for PeerState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text())
    }
}
