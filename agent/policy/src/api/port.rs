//! Protocols and destination ports.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Transport protocol of a port.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    /// The Transmission Control Protocol, the default.
    #[default]
    Tcp,
    /// The User Datagram Protocol.
    Udp,
    /// The Stream Control Transmission Protocol.
    Sctp,
}

impl Protocol {
    /// Returns the name of the protocol in lower case, as nft writes it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        }
    }
}

/// An entry of `ports` in a rule of a NetworkPolicy.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "RawPort")]
pub struct PolicyPort {
    /// Protocol of the traffic.
    pub protocol: Protocol,
    /// Destination ports.
    pub port: PortSelector,
}

/// Destination ports of an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PortSelector {
    /// All ports of the protocol.
    All,
    /// An inclusive range of ports.
    Range(PortRange),
    /// The ports that the destination pod has declared under this name, with the same protocol.
    Named(String),
}

/// An inclusive range of port numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "RawRange")]
pub struct PortRange {
    /// Lowest port, at least 1.
    pub start: u16,
    /// Highest port, at least `start`.
    pub end: u16,
}

impl PortRange {
    /// Returns the range of one port.
    pub fn single(port: u16) -> Self {
        Self { start: port, end: port }
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.start == self.end {
            return self.start.fmt(f);
        }
        write!(f, "{}-{}", self.start, self.end)
    }
}

/// Destination port in a rule of a ClusterNetworkPolicy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "RawClusterPort")]
pub struct Port(pub PortRange);

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawPort {
    protocol: Option<Protocol>,
    port: Option<Value>,
    end_port: Option<i64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRange {
    start: i64,
    end: i64,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
enum RawClusterPort {
    Number(i64),
    Range(PortRange),
}

/// Reason why a port or a range of ports cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PortError {
    /// The number is not an integer.
    #[error("port {0} is no number")]
    NotAnInteger(serde_json::Number),
    /// The text has no letter.
    #[error("{0:?} is not the name of a port: a name has a letter")]
    NotAName(String),
    /// `endPort` stands without a number in `port`.
    #[error("endPort needs a port number in port")]
    EndWithoutNumber,
    /// The value is neither a number nor a text.
    #[error("{0} is not a port")]
    NotAPort(Value),
    /// The number is not between 1 and 65535.
    #[error("port {0} is not between 1 and 65535")]
    OutOfRange(i64),
    /// The first port of the range is higher than the last one.
    #[error("port range {start} to {end} is empty")]
    EmptyRange {
        /// First port.
        start: i64,
        /// Last port.
        end: i64,
    },
}

impl TryFrom<RawPort> for PolicyPort {
    type Error = PortError;

    fn try_from(raw: RawPort) -> Result<Self, PortError> {
        let port = match (raw.port, raw.end_port) {
            (None, None) => PortSelector::All,
            (Some(Value::Number(start)), end) => {
                let start = start.as_i64().ok_or(PortError::NotAnInteger(start))?;
                PortSelector::Range(range(start, end.unwrap_or(start))?)
            }
            (Some(Value::String(name)), None) if name.bytes().any(|b| b.is_ascii_lowercase()) => {
                PortSelector::Named(name)
            }
            (Some(Value::String(name)), None) => {
                return Err(PortError::NotAName(name));
            }
            (None | Some(Value::String(_)), Some(_)) => {
                return Err(PortError::EndWithoutNumber);
            }
            (Some(other), _) => return Err(PortError::NotAPort(other)),
        };
        Ok(Self { protocol: raw.protocol.unwrap_or_default(), port })
    }
}

impl TryFrom<RawRange> for PortRange {
    type Error = PortError;

    fn try_from(raw: RawRange) -> Result<Self, PortError> {
        range(raw.start, raw.end)
    }
}

impl TryFrom<RawClusterPort> for Port {
    type Error = PortError;

    fn try_from(raw: RawClusterPort) -> Result<Self, PortError> {
        match raw {
            RawClusterPort::Number(number) => range(number, number).map(Self),
            RawClusterPort::Range(range) => Ok(Self(range)),
        }
    }
}

fn range(start: i64, end: i64) -> Result<PortRange, PortError> {
    let port = |number: i64| {
        let valid = u16::try_from(number).ok().filter(|port| *port > 0);
        valid.ok_or(PortError::OutOfRange(number))
    };
    let range = PortRange { start: port(start)?, end: port(end)? };
    if range.start > range.end {
        return Err(PortError::EmptyRange { start, end });
    }
    Ok(range)
}
