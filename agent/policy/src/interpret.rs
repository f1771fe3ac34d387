//! Interpreter of [`Program`]: the verdict of the kernel's table for a packet.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::api::{PortRange, Protocol};
use crate::model::Direction;
use crate::program::{Attribution, Chain, Element, Family, InterfaceMap, Match, Program, Verdict};
use crate::ranges::AddressRange;

/// A packet in the original direction of a connection, as it is after destination NAT.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet {
    /// Input interface, if it belongs to a pod of this node.
    pub input: Option<String>,
    /// Output interface, if it belongs to a pod of this node.
    pub output: Option<String>,
    /// Source address of the connection.
    pub source: IpAddr,
    /// Destination address after destination NAT.
    pub destination: IpAddr,
    /// Protocol and destination port; `None` for protocols without ports.
    pub transport: Option<(Protocol, u16)>,
}

/// Verdict of one direction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Judgement<'a> {
    /// True if the packet passes.
    pub accepted: bool,
    /// Rules or policies whose statement decided; `None` if no policy concerns the packet.
    pub attribution: Option<&'a Attribution>,
}

/// Returns the verdict of a direction for a forwarded packet. The verdict of [`Direction::Egress`]
/// depends on the packet's input interface, that of [`Direction::Ingress`] on the output interface.
/// If this interface belongs to no pod of this node, the packet is accepted.
pub fn judge_forwarded<'a>(
    program: &'a Program,
    direction: Direction,
    packet: &Packet,
) -> Judgement<'a> {
    let interface = match direction {
        Direction::Ingress => &packet.output,
        Direction::Egress => &packet.input,
    };
    judge(program, program.interfaces(direction), interface.as_deref(), direction, packet)
}

/// Returns the verdict for a packet from a pod to the pod's own node.
pub fn judge_to_node<'a>(program: &'a Program, packet: &Packet) -> Judgement<'a> {
    let interface = packet.input.as_deref().filter(|name| program.to_node.contains_key(*name));
    judge(program, &program.to_node, interface, Direction::Egress, packet)
}

fn judge<'a>(
    program: &'a Program,
    map: &'a InterfaceMap,
    interface: Option<&str>,
    direction: Direction,
    packet: &Packet,
) -> Judgement<'a> {
    let Some(interface) = interface else { return Judgement { accepted: true, attribution: None } };
    let refused = Judgement { accepted: false, attribution: None };
    let Some(verdict) = map.get(interface) else { return refused };
    let evaluation = Evaluation { program, direction, packet };
    // Every chain that a map leads to ends with a verdict; the base chain drops what returns.
    evaluation.decide(verdict, None).unwrap_or(refused)
}

struct Evaluation<'a, 'p> {
    program: &'a Program,
    direction: Direction,
    packet: &'p Packet,
}

impl<'a> Evaluation<'a, '_> {
    fn decide(&self, verdict: &Verdict, counter: Option<&str>) -> Option<Judgement<'a>> {
        let attribution = counter.and_then(|counter| self.program.counters.get(counter));
        match verdict {
            Verdict::Accept => Some(Judgement { accepted: true, attribution }),
            Verdict::Refuse => Some(Judgement { accepted: false, attribution }),
            Verdict::Goto(chain) => self.chain(self.program.chains.get(chain)?),
            Verdict::Dispatch(map) => {
                let port = self.packet.transport?;
                let chain = self.program.port_maps.get(map)?.chains.get(&port)?;
                self.chain(self.program.chains.get(chain)?)
            }
        }
    }

    fn chain(&self, chain: &'a Chain) -> Option<Judgement<'a>> {
        for statement in &chain.statements {
            if !statement.matches.iter().all(|condition| self.meets(condition)) {
                continue;
            }
            let judgement = self.decide(&statement.verdict, statement.counter.as_deref());
            if judgement.is_some() || !matches!(statement.verdict, Verdict::Dispatch(_)) {
                return judgement;
            }
        }
        None
    }

    fn meets(&self, condition: &Match) -> bool {
        let packet = self.packet;
        let elements = |set: &str| self.program.elements.get(set).into_iter();
        match condition {
            Match::Peer(family, set) => {
                let peer = match self.direction {
                    Direction::Ingress => packet.source,
                    Direction::Egress => packet.destination,
                };
                Family::of(peer) == *family
                    && elements(set).any(|elements| contains_address(elements, peer))
            }
            Match::Protocol(protocol) => packet.transport.is_some_and(|(one, _)| one == *protocol),
            Match::Port(protocol, range) => packet.transport.is_some_and(|(one, port)| {
                one == *protocol && range.start <= port && port <= range.end
            }),
            Match::PortSet(protocol, set) => packet.transport.is_some_and(|(one, port)| {
                one == *protocol && elements(set).any(|elements| contains_port(elements, port))
            }),
            Match::NamedPort(_, set) => packet.transport.is_some_and(|(protocol, port)| {
                let wanted = Element::NamedPort(packet.destination, protocol, port);
                elements(set).any(|elements| elements.contains(&wanted))
            }),
            Match::Hairpin => packet.input.is_some() && packet.input == packet.output,
        }
    }
}

/// Returns whether a set of addresses or of disjoint ranges contains an address.
fn contains_address(elements: &BTreeSet<Element>, address: IpAddr) -> bool {
    let last = match address {
        IpAddr::V4(_) => Ipv4Addr::BROADCAST.into(),
        IpAddr::V6(_) => Ipv6Addr::from_bits(u128::MAX).into(),
    };
    let highest = Element::Range(AddressRange { first: address, last });
    elements.contains(&Element::Address(address))
        || elements.range(..=highest).next_back().is_some_and(
            |element| matches!(element, Element::Range(range) if range.contains(address)),
        )
}

/// Returns whether a set of disjoint ranges of ports contains a port.
fn contains_port(elements: &BTreeSet<Element>, port: u16) -> bool {
    let highest = Element::Ports(PortRange { start: port, end: u16::MAX });
    elements.range(..=highest).next_back().is_some_and(
        |element| matches!(element, Element::Ports(range) if range.start <= port && port <= range.end),
    )
}
