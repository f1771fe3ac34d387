//! Chains of statements, and maps of ports.

use std::collections::BTreeMap;

use crate::api::{PortRange, Protocol};
use crate::model::Direction;
use crate::name;

use super::Family;

/// Statements for one direction, evaluated in order. If no statement matches a packet, the
/// evaluation returns to the chain that has jumped to this one.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Chain {
    /// Direction of the packets. For `Ingress`, a peer's address is the source of a packet; for
    /// `Egress`, the destination.
    pub direction: Direction,
    /// Statements in the order of evaluation.
    pub statements: Vec<Statement>,
}

impl Chain {
    /// Returns the name of the chain, a digest of its content.
    pub fn name(&self) -> String {
        let prefix = match self.direction {
            Direction::Ingress => "in_",
            Direction::Egress => "out_",
        };
        name::of_content(prefix, self)
    }
}

/// A statement: a verdict for packets that meet all conditions.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Statement {
    /// Conditions, all of which must hold.
    pub matches: Vec<Match>,
    /// Name of the counter of the packets that meet the conditions.
    pub counter: Option<String>,
    /// Verdict for these packets.
    pub verdict: Verdict,
}

/// A condition on a packet.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Match {
    /// The peer's address is in the named set, whose elements are addresses of the family.
    Peer(Family, String),
    /// The packet is of a protocol.
    Protocol(Protocol),
    /// The packet is of a protocol, and its destination port is in a range.
    Port(Protocol, PortRange),
    /// The packet is of a protocol, and its destination port is in a set.
    PortSet(Protocol, String),
    /// The combination of destination address, protocol and destination port is in the named set,
    /// whose addresses belong to the family.
    NamedPort(Family, String),
    /// The packet leaves by the interface by which it arrived: a pod's connection to itself through
    /// a Service.
    Hairpin,
}

impl Match {
    /// Returns the name of the address or port set to which the condition refers; `None` for
    /// conditions without a set. Sets are in [`Program::sets`](super::Program::sets).
    pub fn set(&self) -> Option<&str> {
        match self {
            Self::Peer(_, set) | Self::PortSet(_, set) | Self::NamedPort(_, set) => Some(set),
            Self::Protocol(_) | Self::Port(..) | Self::Hairpin => None,
        }
    }
}

/// Verdict of a [`Statement`] or of an entry of an [`InterfaceMap`](super::InterfaceMap).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Verdict {
    /// Accepts the packet in this direction.
    Accept,
    /// Logs and drops the packet. The sender gets no answer (neither an ICMP error nor a TCP
    /// reset).
    Refuse,
    /// Continues in a chain, without return.
    Goto(String),
    /// Looks up the packet's protocol and destination port in the named port map, and jumps to the
    /// chain that the map names. If the map has no entry for them, or if no statement of that chain
    /// matches, the evaluation continues with the next statement of the current chain.
    Dispatch(String),
}

/// Map from protocol and destination port to a chain, for [`Verdict::Dispatch`].
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortMap {
    /// Names of chains by protocol and port.
    pub chains: BTreeMap<(Protocol, u16), String>,
}

impl PortMap {
    /// Returns the name of the map, a digest of its content.
    pub fn name(&self) -> String {
        name::of_content("v_", self)
    }
}
