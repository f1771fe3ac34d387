//! Messages of `skein-agent capture` and `trace --drops`: the request for packets or drops, and the
//! captured packets.

use std::net::SocketAddr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use skein_core::drop::Direction;

use crate::reported::{DropKind, Reported};

/// A request for packets or drops, up to the end of the connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CaptureRequest {
    /// Selects dropped packets or forwarded packets.
    #[serde(rename = "what")]
    pub kind: CaptureKind,
    /// Prefixes of which one must contain the inner source or destination address; empty selects
    /// every packet.
    #[serde(deserialize_with = "crate::address::canonical")]
    pub nets: Vec<IpNet>,
    /// Maximum number of bytes to copy from each packet. The data process has an upper limit of its
    /// own.
    pub snap: u32,
}

/// Kind of packets of a capture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CaptureKind {
    /// Dropped packets, inner and outer ones.
    Drops,
    /// Forwarded inner packets. Egress packets are captured after segmentation and before
    /// encryption, ingress packets after all checks and before coalescing.
    Packets,
}

/// A captured packet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CapturedPacket {
    /// Time of the capture (wall clock), nanoseconds since 1970-01-01 UTC.
    pub time_ns: u64,
    /// Lane that processed the packet; `None` for the session manager.
    pub lane: Option<u8>,
    /// Direction of the packet, and the reason if the packet was dropped.
    #[serde(flatten)]
    pub kind: PacketKind,
    /// Underlay address and port of the other node; `None` if unknown.
    pub outer: Option<SocketAddr>,
    /// True if `bytes` begin with an inner IP header, false if they are the payload of an outer
    /// datagram.
    pub inner: bool,
    /// Number of packets: more than 1 if several packets were dropped together, for example a
    /// superpacket that the TUN device refused.
    pub packets: u64,
    /// Length of the whole packet in bytes.
    pub length: u32,
    /// First bytes of the packet, at most [`CaptureRequest::snap`]; base64 on the socket.
    #[serde(serialize_with = "to_base64", deserialize_with = "from_base64")]
    pub bytes: Vec<u8>,
}

/// Direction of a captured packet, and the reason if the packet was dropped. The JSON form has the
/// keys `direction` and `reason`; `reason` is null for a forwarded packet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "PacketLabels", into = "PacketLabels")]
pub enum PacketKind {
    /// A forwarded packet.
    Forwarded(Reported<Direction>),
    /// A dropped packet.
    Dropped(DropKind),
}

impl PacketKind {
    /// Returns the text of the direction.
    pub fn direction(&self) -> &str {
        match self {
            Self::Forwarded(direction) => direction.text(),
            Self::Dropped(kind) => kind.direction(),
        }
    }

    /// Returns the text of the drop reason; `None` for a forwarded packet.
    pub fn reason(&self) -> Option<&str> {
        match self {
            Self::Forwarded(_) => None,
            Self::Dropped(kind) => Some(kind.reason()),
        }
    }
}

/// JSON form of a [`PacketKind`].
#[derive(Serialize, Deserialize)]
struct PacketLabels {
    direction: String,
    reason: Option<String>,
}

impl From<PacketLabels> for PacketKind {
    fn from(labels: PacketLabels) -> Self {
        match labels.reason {
            Some(reason) => Self::Dropped(DropKind::from_texts(labels.direction, reason)),
            None => Self::Forwarded(Reported::from_text(labels.direction)),
        }
    }
}

impl From<PacketKind> for PacketLabels {
    fn from(kind: PacketKind) -> Self {
        let reason = kind.reason().map(str::to_owned);
        Self { direction: kind.direction().to_owned(), reason }
    }
}

fn to_base64<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&BASE64.encode(bytes))
}

fn from_base64<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
    let text = String::deserialize(deserializer)?;
    BASE64.decode(text).map_err(serde::de::Error::custom)
}
