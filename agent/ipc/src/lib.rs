//! What the control process and the data process say to each other over the data plane's unix
//! socket: one JSON document a frame, each frame led by its length (u32, big endian).
//!
//! Requests are answered in order, one answer a request. A [`Snapshot`] is idempotent: the data
//! process compares it with what it does already and changes only what differs, so a new control
//! process sends its whole view and disturbs nothing.

#![forbid(unsafe_code)]

pub mod address;
pub mod instance;
pub mod keys;
pub mod watch;

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use self::watch::{Seen, Watch};
use crate::keys::{PrivateKey, PublicKey};

/// Raised with every change that an older peer would misread.
pub const PROTOCOL_VERSION: u32 = 4;

/// The longest frame accepted, in bytes: a snapshot of 5,000 nodes takes about 2 MiB.
pub const MAX_FRAME: usize = 64 << 20;

/// So much of a frame's body is made room for at first.
const FIRST_READ: usize = 64 << 10;

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
    /// Look at packets: the answers, [`Response::Seen`], go on until the asker closes the connection.
    Watch {
        /// At which.
        watch: Watch,
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
        #[serde(default)]
        takes_seen_handshakes: bool,
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
    /// Answers to [`Request::Watch`], at least one a second.
    Seen {
        /// What was seen, lane by lane in order.
        seen: Vec<Seen>,
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
    Fixed,
    /// A device or a feature of the kernel is missing.
    Missing,
    /// Something belongs to somebody else: the port, the interface.
    Taken,
    /// A privilege is missing.
    Privilege,
    /// Anything else.
    Internal,
}

/// Latest timestamp of an accepted handshake initiation by each public key, in nanoseconds since
/// 1970. A recorded initiation is recognised by its timestamp.
pub type SeenHandshakes = BTreeMap<PublicKey, u64>;

/// The whole wanted state of a data process.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Snapshot {
    /// Grows with every change; reported back.
    pub revision: u64,
    /// What cannot change while the process lives.
    pub node: NodeSettings,
    /// Handshakes carry later times than this, in seconds since 1970; 0 where the clock is right.
    // Left out where it says nothing, so that a data process of before takes the rest.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub not_before: u64,
    /// Destinations of this node: packets from peers to anything else are dropped.
    #[serde(deserialize_with = "crate::address::canonical")]
    pub local_cidrs: Vec<IpNet>,
    /// Every other node.
    pub peers: Vec<Peer>,
    /// Initiations by these keys must carry later times.
    // Left out if empty, as above.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub seen_handshakes: SeenHandshakes,
}

/// Settings that are fixed for the life of a data process. A snapshot with others is refused as
/// [`ErrorKind::Fixed`], but for the node's keys, and `tun.ifindex`, whose change makes the lanes attach
/// anew.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeSettings {
    /// Name of this node, for logs.
    pub name: String,
    /// Mixed into the handshake, so that nodes of two clusters never join.
    pub cluster_id: String,
    /// This node's identity.
    pub private_key: PrivateKey,
    /// Another one that is answered to, while the key changes: the next, or the one before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub second_private_key: Option<PrivateKey>,
    /// The device, which the control process has made already.
    pub tun: TunSettings,
    /// Where to listen.
    pub underlay: UnderlaySettings,
    /// Number of lanes, 1 to 64.
    pub lanes: u8,
    /// Which AEAD to offer.
    pub cipher: CipherChoice,
    /// Whether small packets may share a datagram.
    pub bundling: bool,
    /// For how many microseconds a lane polls before it sleeps; `None`: the data process decides.
    pub busy_poll_us: Option<u32>,
    /// What may be used; what is in use after probing is in [`Report::capabilities`].
    pub offload: OffloadSettings,
}

/// The TUN device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TunSettings {
    /// Interface name.
    pub name: String,
    /// Interface index, so that a device that was deleted and made again is told from the old one.
    pub ifindex: u32,
    /// Its MTU in bytes: the longest inner packet.
    pub mtu: u16,
}

/// The UDP side.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UnderlaySettings {
    /// Addresses to bind; the unspecified ones where it does not matter. At most one a family.
    #[serde(deserialize_with = "crate::address::canonical")]
    pub addresses: Vec<IpAddr>,
    /// The listening port.
    pub port: u16,
    /// SO_RCVBUF of each lane's socket in bytes.
    pub receive_buffer: usize,
    /// SO_SNDBUF of each lane's socket in bytes.
    pub send_buffer: usize,
}

/// Which AEAD a node offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CipherChoice {
    /// AES-256-GCM where both nodes have it in hardware, else ChaCha20-Poly1305.
    #[default]
    Auto,
    /// AES-256-GCM only.
    Aes256Gcm,
    /// ChaCha20-Poly1305 only.
    Chacha20Poly1305,
}

/// Which rungs of the ladder may be used: `false` forces one off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OffloadSettings {
    /// UDP segmentation between the kernel and the TUN (TUN_F_USO4|USO6, Linux 6.2).
    pub tun_uso: bool,
    /// TCP segmentation between the kernel and the TUN (TUN_F_TSO4|TSO6).
    pub tun_tso: bool,
    /// Partial checksums between the kernel and the TUN (TUN_F_CSUM); the two above need it.
    pub tun_checksum: bool,
    /// UDP_SEGMENT on send (Linux 4.18).
    pub udp_gso: bool,
    /// UDP_GRO on receive (Linux 5.0).
    pub udp_gro: bool,
    /// Copies of the ECN field between inner and outer headers (RFC 6040).
    // Left out if it is on, so that a data process of an earlier release accepts the rest.
    #[serde(default = "on", skip_serializing_if = "Clone::clone")]
    pub udp_ecn: bool,
}

fn on() -> bool {
    true
}

impl OffloadSettings {
    /// Everything allowed.
    pub const ALL: Self = Self {
        tun_uso: true,
        tun_tso: true,
        tun_checksum: true,
        udp_gso: true,
        udp_gro: true,
        udp_ecn: true,
    };
}

/// Another node, as its record has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Peer {
    /// Name, for people.
    pub name: String,
    /// Identity.
    pub public_key: PublicKey,
    /// Another one, while its key changes: the next, or the one before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub second_public_key: Option<PublicKey>,
    /// Where it listens; tried in this order.
    #[serde(deserialize_with = "crate::address::canonical")]
    pub endpoints: Vec<SocketAddr>,
    /// What it owns.
    #[serde(deserialize_with = "crate::address::canonical")]
    pub pod_cidrs: Vec<IpNet>,
}

/// A small change.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Update {
    /// The revision that this update leads to.
    pub revision: u64,
    /// New or changed nodes.
    pub upsert: Vec<Peer>,
    /// Nodes that are gone; their sessions end at once.
    pub remove: Vec<PublicKey>,
}

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
    /// Counters of each lane.
    pub lanes: Vec<LaneReport>,
    /// Packets that the kernel dropped because a queue of the TUN device was full, since the
    /// creation of the device, which outlives data processes.
    #[serde(default)]
    pub tun_queue_drops: u64,
    /// Drops by direction and reason, all lanes and the manager; every known reason is listed.
    pub drops: Vec<DropReport>,
    /// Handshakes by result; every known result is listed.
    pub handshakes: Vec<HandshakeCount>,
    /// Peers that are sent to in a session which [`NodeSettings::second_private_key`] made: while the key
    /// changes, those that may not know the new one.
    #[serde(default)]
    pub second_key_peers: usize,
    /// Peers whose path carries less than this node's MTU, in no order.
    pub narrow: Vec<NarrowPath>,
    /// Peers that are unreachable, by name: also in a report without peers.
    #[serde(default)]
    pub unreachable: Vec<UnreachablePeer>,
    /// Peers, in the order of their names.
    pub peers: Vec<PeerReport>,
    /// Name of the TUN device, for the connection's thread, which adds the device's own counters.
    #[serde(skip)]
    pub tun: Option<String>,
}

/// A path that carries less than the nodes at its ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct NarrowPath {
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

/// Writes one frame.
pub fn write_frame<T: Serialize>(to: &mut impl Write, value: &T) -> io::Result<()> {
    to.write_all(&encode_frame(value)?)
}

/// The bytes of one frame.
pub fn encode_frame<T: Serialize>(value: &T) -> io::Result<Zeroizing<Vec<u8>>> {
    // It may hold a private key. A vector that grew would leave copies of it in memory.
    let mut length = Count(0);
    serde_json::to_writer(&mut length, value)?;
    let mut frame = Zeroizing::new(Vec::with_capacity(4 + length.0));
    frame.extend([0; 4]);
    serde_json::to_writer(&mut *frame, value)?;
    let length = u32::try_from(frame.len() - 4).ok().filter(|&n| n as usize <= MAX_FRAME);
    let length = length.ok_or_else(|| io::Error::other("frame too long"))?;
    frame[..4].copy_from_slice(&length.to_be_bytes());
    Ok(frame)
}

fn is_zero(value: &u64) -> bool {
    *value == 0
}

/// Counts what is written to it.
struct Count(usize);

impl Write for Count {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads one frame; `None` where the other side has closed between two frames.
pub fn read_frame<T: DeserializeOwned>(from: &mut impl Read) -> io::Result<Option<T>> {
    let mut length = [0; 4];
    match from.read(&mut length)? {
        0 => return Ok(None),
        n => from.read_exact(&mut length[n..])?,
    }
    let length = frame_length(length)?;
    // Read as it comes rather than reserve what a stranger claims. It may hold a private key: what
    // it outgrows is wiped, too.
    let mut body = Zeroizing::new(Vec::new());
    while body.len() < length {
        let start = body.len();
        let end = length.min((2 * start).max(FIRST_READ));
        let mut larger = Zeroizing::new(vec![0; end]);
        larger[..start].copy_from_slice(&body);
        from.read_exact(&mut larger[start..])?;
        body = larger;
    }
    Ok(Some(serde_json::from_slice(&body)?))
}

/// Reads frames up to the first malformed one, for fuzzers. A message that was read can be written
/// and read again.
///
/// # Panics
/// If a message that was read cannot be written, or cannot be read again.
#[doc(hidden)]
pub fn fuzz_frames<T: Serialize + DeserializeOwned>(mut data: &[u8]) {
    while let Ok(Some(message)) = read_frame::<T>(&mut data) {
        let frame = encode_frame(&message).expect("it came in a frame");
        let again = read_frame::<T>(&mut &frame[..]);
        assert!(again.is_ok_and(|again| again.is_some()));
    }
}

/// The body's length that a frame's first four bytes announce.
pub fn frame_length(prefix: [u8; 4]) -> io::Result<usize> {
    let length = u32::from_be_bytes(prefix) as usize;
    if length > MAX_FRAME {
        let text = format!("frame of {length} bytes is longer than {MAX_FRAME}");
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    Ok(length)
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn frames_round_trip_and_end_cleanly() {
        let mut bytes = Vec::new();
        write_frame(&mut bytes, &Request::Hello { version: 7 }).unwrap();
        write_frame(&mut bytes, &Request::Report { peers: true }).unwrap();
        let mut from = &bytes[..];
        assert!(matches!(read_frame(&mut from).unwrap(), Some(Request::Hello { version: 7 })));
        assert!(matches!(read_frame(&mut from).unwrap(), Some(Request::Report { peers: true })));
        assert!(read_frame::<Request>(&mut from).unwrap().is_none());
    }

    #[test]
    fn mapped_addresses_in_messages_are_ipv4() {
        let peer = |endpoint: &str, cidr: &str| -> Peer {
            let key = "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=";
            serde_json::from_value(serde_json::json!({
                "name": "node-a", "public_key": key, "endpoints": [endpoint], "pod_cidrs": [cidr],
            }))
            .unwrap()
        };
        let mapped = peer("[::ffff:192.0.2.1]:51900", "::ffff:10.1.0.0/120");
        assert_eq!(mapped, peer("192.0.2.1:51900", "10.1.0.0/24"));
        let underlay = |address: &str| -> UnderlaySettings {
            serde_json::from_value(serde_json::json!({
                "addresses": [address], "port": 1, "receive_buffer": 2, "send_buffer": 3,
            }))
            .unwrap()
        };
        assert_eq!(underlay("::ffff:192.0.2.1"), underlay("192.0.2.1"));
        let watch = r#"{"what": "drops", "nets": ["::ffff:10.1.0.0/120"], "snap": 0}"#;
        let watch: Watch = serde_json::from_str(watch).unwrap();
        assert_eq!(watch.nets, ["10.1.0.0/24".parse().unwrap()]);
    }

    #[test]
    fn bad_frames_are_errors() {
        assert!(read_frame::<Request>(&mut &[0xff, 0xff, 0xff, 0xff][..]).is_err());
        assert!(read_frame::<Request>(&mut &[0, 0][..]).is_err());
        assert!(read_frame::<Request>(&mut &[0, 0, 0, 9, b'{'][..]).is_err());
        assert!(read_frame::<Request>(&mut &[0, 0, 0, 2, b'{', b'}'][..]).is_err());
    }

    #[test]
    fn frames_of_every_length_arrive_whole() {
        for length in [0, 1, FIRST_READ - 2, FIRST_READ, 10 * FIRST_READ + 7] {
            let sent = "x".repeat(length);
            let frame = encode_frame(&sent).unwrap();
            // As a socket gives it: in parts.
            let (head, tail) = frame.split_at(frame.len().min(100));
            assert_eq!(read_frame::<String>(&mut head.chain(tail)).unwrap(), Some(sent));
            assert!(read_frame::<String>(&mut &frame[..frame.len() - 1]).is_err(), "{length}");
        }
    }
}
