//! The intermediate form: what the kernel's table contains, independent of its syntax.
//!
//! A [`Program`] has verdict maps from interfaces to chains, the chains, and the sets that the
//! chains refer to. Pods to which the same policies apply share their chains, which form a profile.
//! Chains and port maps never change: their names are digests of their content. Sets change when
//! pods come, go or change their labels.

mod attribution;
mod chain;
mod difference;
mod set;

use std::collections::{BTreeMap, BTreeSet};

pub use attribution::{Attribution, RuleRef};
pub use chain::{Chain, Match, PortMap, Statement, Verdict};
pub(crate) use difference::change;
pub use difference::{Change, Changes, Difference};
pub use set::{Element, Family, Set, SetKey, set_name};

use crate::model::Direction;

/// Interfaces of this node's pods with the verdicts for their traffic.
pub type InterfaceMap = BTreeMap<String, Verdict>;

/// Contents of the kernel's table.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Program {
    /// Definitions of sets, by name.
    pub sets: BTreeMap<String, Set>,
    /// Elements of the sets. A set without elements has no entry.
    pub elements: BTreeMap<String, BTreeSet<Element>>,
    /// Counters by name, with the rules or policies that they count.
    pub counters: BTreeMap<String, Attribution>,
    /// Chains of all profiles, by name.
    pub chains: BTreeMap<String, Chain>,
    /// Maps from ports to chains, by name.
    pub port_maps: BTreeMap<String, PortMap>,
    /// Verdicts for forwarded packets from pods, by input interface.
    pub from: InterfaceMap,
    /// Verdicts for forwarded packets to pods, by output interface.
    pub to: InterfaceMap,
    /// Verdicts for packets from pods to this node, by input interface. An interface that is absent
    /// is accepted: NetworkPolicy does not concern this traffic.
    pub to_node: InterfaceMap,
}

impl Program {
    /// Returns the elements of a set.
    pub fn elements_of(&self, set: &str) -> impl Iterator<Item = &Element> {
        self.elements.get(set).into_iter().flatten()
    }

    /// Returns the map that has the verdicts of a direction.
    pub fn interfaces(&self, direction: Direction) -> &InterfaceMap {
        match direction {
            Direction::Ingress => &self.to,
            Direction::Egress => &self.from,
        }
    }
}
