//! Desired state of a data process: its settings and its peers.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::keys::{PrivateKey, PublicKey};

/// Timestamp of the last accepted initiation of each public key (the initiator's wall clock),
/// nanoseconds since 1970-01-01 UTC. An initiation with an earlier or equal timestamp is a replay.
pub type SeenHandshakes = BTreeMap<PublicKey, u64>;

/// Complete desired state of a data process.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Snapshot {
    /// Number of the state, which grows with every change. [`Response::Applied`] and reports repeat
    /// it.
    ///
    /// [`Response::Applied`]: crate::Response::Applied
    pub revision: u64,
    /// Settings of this node.
    pub node: NodeSettings,
    /// Lower bound of the timestamps in this node's initiations, seconds since 1970-01-01 UTC; 0
    /// for no bound. A node whose wall clock was set back needs it.
    // Omitted if 0: earlier releases of the data process refuse unknown fields.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub not_before: u64,
    /// Prefixes of this node. The data process drops packets from peers to other destinations.
    #[serde(deserialize_with = "crate::address::canonical")]
    pub local_cidrs: Vec<IpNet>,
    /// All peers of this node.
    pub peers: Vec<Peer>,
    /// Timestamps that a previous data process accepted: later initiations must have later
    /// timestamps.
    // Omitted if empty: earlier releases of the data process refuse unknown fields.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub seen_handshakes: SeenHandshakes,
}

/// Settings that are fixed for the lifetime of a data process, except for the node's keys and
/// `tun.ifindex`. The data process refuses a snapshot with other settings as
/// [`RestartRequired`](crate::ErrorKind::RestartRequired). A new interface index makes the lanes
/// attach to the new device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeSettings {
    /// Name of this node.
    pub name: String,
    /// Identifier of the cluster. It is an input of the handshake, so that a handshake between
    /// nodes of two clusters fails.
    pub cluster_id: String,
    /// Active private key of this node.
    pub private_key: PrivateKey,
    /// Next or previous private key during a key rotation. The node answers handshakes to both
    /// keys.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub second_private_key: Option<PrivateKey>,
    /// TUN device, which the control process has created.
    pub tun: TunSettings,
    /// UDP sockets.
    pub underlay: UnderlaySettings,
    /// Number of lanes, 1 to 64.
    pub lanes: u8,
    /// AEADs to offer in handshakes.
    pub cipher: CipherChoice,
    /// True to allow bundles: several small packets in one datagram.
    pub bundling: bool,
    /// Duration of busy polling before a lane blocks, microseconds; `None` lets the data process
    /// choose.
    pub busy_poll_us: Option<u32>,
    /// Offload capabilities that the data process may use.
    /// [`Report::capabilities`](crate::Report::capabilities) has their states after probing.
    pub offload: OffloadSettings,
}

/// Settings of the TUN device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TunSettings {
    /// Interface name.
    pub name: String,
    /// Interface index. It distinguishes a device that was deleted and created again from the old
    /// one.
    pub ifindex: u32,
    /// MTU of the device: length of the longest inner packet in bytes.
    pub mtu: u16,
}

/// Settings of the UDP sockets.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UnderlaySettings {
    /// Addresses to bind, at most one per address family. The unspecified address binds all
    /// addresses of its family.
    #[serde(deserialize_with = "crate::address::canonical")]
    pub addresses: Vec<IpAddr>,
    /// UDP port on which all lanes receive.
    pub port: u16,
    /// Receive buffer of each receive socket in bytes (SO_RCVBUF, before the kernel doubles it).
    pub receive_buffer: usize,
    /// Send buffer of each send socket in bytes (SO_SNDBUF, before the kernel doubles it).
    pub send_buffer: usize,
}

/// AEADs that a node offers in handshakes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CipherChoice {
    /// Both. The nodes use AES-256-GCM if both have AES instructions, otherwise ChaCha20-Poly1305.
    #[default]
    Auto,
    /// Only AES-256-GCM (RFC 5116).
    Aes256Gcm,
    /// Only ChaCha20-Poly1305 (RFC 8439).
    Chacha20Poly1305,
}

/// Permission for each offload capability: `false` disables the capability, `true` permits it if
/// the kernel supports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OffloadSettings {
    /// UDP superpackets on the TUN device (TUN_F_USO4, TUN_F_USO6; Linux 6.2).
    pub tun_uso: bool,
    /// TCP superpackets on the TUN device (TUN_F_TSO4, TUN_F_TSO6).
    pub tun_tso: bool,
    /// Partial checksums on the TUN device (TUN_F_CSUM). `tun_uso` and `tun_tso` require it.
    pub tun_checksum: bool,
    /// GSO batches on send (UDP_SEGMENT, Linux 4.18).
    pub udp_gso: bool,
    /// Merged datagrams on receive (UDP_GRO, Linux 5.0).
    pub udp_gro: bool,
    /// Copies of the ECN field between inner and outer headers (RFC 6040).
    // Omitted if true: earlier releases of the data process refuse unknown fields.
    #[serde(skip_serializing_if = "Clone::clone")]
    pub udp_ecn: bool,
}

impl Default for OffloadSettings {
    fn default() -> Self {
        Self::ALL
    }
}

impl OffloadSettings {
    /// Permits every offload capability.
    pub const ALL: Self = Self {
        tun_uso: true,
        tun_tso: true,
        tun_checksum: true,
        udp_gso: true,
        udp_gro: true,
        udp_ecn: true,
    };
}

/// A peer, from its node record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Peer {
    /// Name of the node, for reports and logs.
    pub name: String,
    /// Active public key of the node.
    pub public_key: PublicKey,
    /// Next or previous public key during a key rotation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub second_public_key: Option<PublicKey>,
    /// Underlay addresses and UDP ports of the node, in the order of attempts.
    #[serde(deserialize_with = "crate::address::canonical")]
    pub endpoints: Vec<SocketAddr>,
    /// Prefixes that the node owns.
    #[serde(deserialize_with = "crate::address::canonical")]
    pub pod_cidrs: Vec<IpNet>,
}

/// Difference between two revisions: changes of peers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Update {
    /// Revision after the update.
    pub revision: u64,
    /// Added or changed peers.
    pub upsert: Vec<Peer>,
    /// Active public keys of the removed peers. Their sessions end immediately.
    pub remove: Vec<PublicKey>,
}

fn is_zero(value: &u64) -> bool {
    *value == 0
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::capture::CaptureRequest;

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
        let watch: CaptureRequest = serde_json::from_str(watch).unwrap();
        assert_eq!(watch.nets, ["10.1.0.0/24".parse().unwrap()]);
    }
}
