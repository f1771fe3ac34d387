//! Policies with resolved selectors, of both kinds in one form.

use serde::{Deserialize, Serialize};

use crate::api::{LabelSelector, PortRange, Protocol};
use crate::ranges::AddressRange;

use super::selector::PodTerm;

/// Direction of traffic, from the pod's point of view.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Direction {
    /// Traffic to the pod.
    Ingress,
    /// Traffic from the pod.
    Egress,
}

/// Kind and name of a policy.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum PolicyId {
    /// A NetworkPolicy in its namespace.
    NetworkPolicy {
        /// Namespace of the policy.
        namespace: String,
        /// Name of the policy.
        name: String,
    },
    /// A ClusterNetworkPolicy.
    ClusterNetworkPolicy {
        /// Name of the policy.
        name: String,
    },
}

impl std::fmt::Display for PolicyId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NetworkPolicy { namespace, name } => {
                write!(f, "NetworkPolicy {namespace}/{name}")
            }
            Self::ClusterNetworkPolicy { name } => write!(f, "ClusterNetworkPolicy {name}"),
        }
    }
}

/// Tier of a policy, in the order of evaluation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Tier {
    /// ClusterNetworkPolicies of the tier Admin, with their priority.
    Admin(u16),
    /// NetworkPolicies, which have no order.
    NetworkPolicy,
    /// ClusterNetworkPolicies of the tier Baseline, with their priority.
    Baseline(u16),
}

/// A policy of either kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// Kind and name of the policy.
    pub id: PolicyId,
    /// Tier and priority of the policy.
    pub tier: Tier,
    /// Pods that the policy applies to; `None` if no pod can be selected.
    pub subject: Option<PodTerm>,
    /// Rules for incoming traffic; `None` if the policy does not concern it.
    pub ingress: Option<Vec<Rule>>,
    /// Rules for outgoing traffic; `None` if the policy does not concern it.
    pub egress: Option<Vec<Rule>>,
}

impl Policy {
    /// Returns the rules for a direction; `None` if the policy does not concern it.
    pub fn rules(&self, direction: Direction) -> Option<&[Rule]> {
        match direction {
            Direction::Ingress => self.ingress.as_deref(),
            Direction::Egress => self.egress.as_deref(),
        }
    }
}

/// A rule. Rules of a NetworkPolicy accept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    /// Position of the rule in the object's list.
    pub index: usize,
    /// Name of the rule; empty for rules of NetworkPolicies.
    pub name: String,
    /// Verdict for traffic that matches.
    pub action: Action,
    /// Sources or destinations, by direction.
    pub peers: Peers,
    /// Protocols and destination ports.
    pub ports: Ports,
}

/// Verdict of a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Action {
    /// Accepts the traffic in this direction.
    Accept,
    /// Drops the traffic in this direction.
    Deny,
    /// Continues with the next tier.
    Pass,
}

/// The union of a rule's peers, in canonical form.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Peers {
    /// True if every peer is selected, inside and outside the cluster. The other fields are empty
    /// then.
    pub any: bool,
    /// Every pod of the cluster.
    pub all_pods: bool,
    /// Selected pods, sorted.
    pub terms: Vec<PodTerm>,
    /// Address ranges, sorted and disjoint.
    pub blocks: Vec<AddressRange>,
    /// Selected nodes, sorted.
    pub nodes: Vec<LabelSelector>,
}

impl Peers {
    /// Returns the peers that match every address.
    pub fn any() -> Self {
        Self { any: true, ..Self::default() }
    }

    /// Returns whether no packet can match.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Returns the union of two sets of peers.
    pub fn union(&self, other: &Self) -> Self {
        if self.any || other.any {
            return Self::any();
        }
        let mut union = Self {
            any: false,
            all_pods: self.all_pods || other.all_pods,
            terms: [&*self.terms, &*other.terms].concat(),
            blocks: crate::ranges::merge([&*self.blocks, &*other.blocks].concat()),
            nodes: [&*self.nodes, &*other.nodes].concat(),
        };
        union.normalize();
        union
    }

    /// Brings the lists into canonical form.
    pub(super) fn normalize(&mut self) {
        self.all_pods |= self.terms.iter().any(PodTerm::is_all);
        if self.all_pods {
            self.terms.clear();
        }
        self.terms.sort_unstable();
        self.terms.dedup();
        self.nodes.sort_unstable();
        self.nodes.dedup();
    }
}

/// Protocols and destination ports of a rule.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Ports {
    /// Every protocol, including protocols without ports.
    Any,
    /// The union of entries, sorted. An empty list matches nothing.
    List(Vec<PortSpec>),
}

/// An entry of a list of ports.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum PortSpec {
    /// All ports of a protocol.
    Protocol(Protocol),
    /// An inclusive range of ports.
    Range(Protocol, PortRange),
    /// Ports that the destination pod has declared under a name, with this protocol or with any.
    Named(Option<Protocol>, String),
}
