//! Watching packets and drops: what is asked, and what is told until the asker closes the connection.

use std::net::SocketAddr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// What to look at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CaptureRequest {
    /// Drops, or packets that pass.
    #[serde(rename = "what")]
    pub kind: CaptureKind,
    /// Only inner packets from or to one of these; empty: all.
    #[serde(deserialize_with = "crate::address::canonical")]
    pub nets: Vec<IpNet>,
    /// How much of each packet to copy, in bytes.
    pub snap: u32,
}

/// What can be looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CaptureKind {
    /// Packets that are dropped.
    Drops,
    /// Inner packets as they cross the tunnel: behind the split and before the seal on the way out,
    /// behind all checks and before the merge on the way in.
    Packets,
}

/// A packet that was seen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CapturedPacket {
    /// Nanoseconds since 1970.
    pub time_ns: u64,
    /// The lane; `None`: the session manager.
    pub lane: Option<u8>,
    /// `egress` or `ingress`.
    pub direction: String,
    /// Why it was dropped (`skein_core::drop::DropReason::label`); `None`: it passed.
    pub reason: Option<String>,
    /// The other node's address, where it is known.
    pub outer: Option<SocketAddr>,
    /// Whether the bytes are an inner IP packet; otherwise they are the payload of an outer datagram.
    pub inner: bool,
    /// How many packets this one stands for.
    pub packets: u64,
    /// Its whole length in bytes.
    pub length: u32,
    /// Its first bytes.
    #[serde(serialize_with = "to_base64", deserialize_with = "from_base64")]
    pub bytes: Vec<u8>,
}

fn to_base64<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&BASE64.encode(bytes))
}

fn from_base64<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
    let text = String::deserialize(deserializer)?;
    BASE64.decode(text).map_err(serde::de::Error::custom)
}
