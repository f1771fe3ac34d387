//! Sets: definitions, names and elements.

use std::fmt;
use std::net::IpAddr;

use crate::api::{LabelSelector, PortRange, Protocol};
use crate::model::PodTerm;
use crate::name;
use crate::ranges::AddressRange;

/// An address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Returns the family of an address.
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }
}

/// Definition of a set's elements. Sets with equal definitions are the same set.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SetKey {
    /// Addresses of the pods that one of the terms selects.
    Pods(Vec<PodTerm>),
    /// Addresses of all pods: the pod CIDRs.
    AllPods,
    /// Fixed address ranges, of one family.
    Blocks(Vec<AddressRange>),
    /// Addresses of the nodes that one of the selectors selects.
    Nodes(Vec<LabelSelector>),
    /// Address, protocol and number of the named ports of selected pods.
    NamedPorts {
        /// Selected pods; all pods if `None`.
        pods: Option<Vec<PodTerm>>,
        /// Protocol of the ports; every protocol if `None`.
        protocol: Option<Protocol>,
        /// Name of the ports.
        name: String,
    },
    /// Fixed port ranges, disjoint and sorted.
    Ports(Vec<PortRange>),
}

/// A set of one family.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Set {
    /// Definition of the elements.
    pub key: SetKey,
    /// Family of the addresses; `None` for a set of ports.
    pub family: Option<Family>,
}

/// Returns the name of a set in the kernel.
pub fn set_name(set: &Set) -> String {
    let prefix = match set.key {
        SetKey::Pods(_) => 'a',
        SetKey::AllPods => return format!("pods{}", digit(set.family)),
        SetKey::Blocks(_) => 'c',
        SetKey::Nodes(_) => 'h',
        SetKey::NamedPorts { .. } => 'n',
        SetKey::Ports(_) => 'p',
    };
    name::of_content(&format!("{prefix}{}_", digit(set.family)), &set.key)
}

fn digit(family: Option<Family>) -> &'static str {
    match family {
        Some(Family::V4) => "4",
        Some(Family::V6) => "6",
        None => "",
    }
}

/// An element of a set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Element {
    /// An address of a pod or node.
    Address(IpAddr),
    /// A range of addresses.
    Range(AddressRange),
    /// A port of a pod.
    NamedPort(IpAddr, Protocol, u16),
    /// A range of ports.
    Ports(PortRange),
}

impl Element {
    /// Returns the address of a pod or node.
    pub fn address(&self) -> Option<IpAddr> {
        match self {
            Self::Address(address) | Self::NamedPort(address, ..) => Some(*address),
            Self::Range(_) | Self::Ports(_) => None,
        }
    }
}

impl fmt::Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Range(range) => range.fmt(f),
            Self::NamedPort(address, protocol, port) => {
                write!(f, "{address} . {} . {port}", protocol.as_str())
            }
            Self::Ports(range) => range.fmt(f),
        }
    }
}
