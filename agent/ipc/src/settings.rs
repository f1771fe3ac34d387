//! What the control process wants of a data process: its settings and its peers.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::keys::{PrivateKey, PublicKey};

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

/// Settings that are fixed for the lifetime of a data process. A snapshot with other settings is
/// refused as [`RestartRequired`](crate::ErrorKind::RestartRequired), except for the node's keys, and `tun.ifindex`:
/// a new index makes the lanes attach to the new device.
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
    /// Capabilities that may be used. [`Report::capabilities`](crate::Report::capabilities) has
    /// those in use after probing.
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
#[serde(default, deny_unknown_fields)]
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
    #[serde(skip_serializing_if = "Clone::clone")]
    pub udp_ecn: bool,
}

impl Default for OffloadSettings {
    fn default() -> Self {
        Self::ALL
    }
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
