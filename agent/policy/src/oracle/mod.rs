//! The oracle: an evaluation of policies directly on the API objects, for tests and for `lint`.
//!
//! The oracle shares no code with the compiler; it imports the API types only. It judges one
//! connection at a time and is slow.

mod cluster;
mod network;
mod select;

use std::net::IpAddr;

use crate::api::{ClusterNetworkPolicy, Namespace, NetworkPolicy, Node, Pod, Protocol};

/// All objects of a cluster.
#[derive(Debug, Clone, Copy, Default)]
pub struct World<'a> {
    /// Namespaces with their labels.
    pub namespaces: &'a [Namespace],
    /// Pods, including pods that have ended or use their node's network.
    pub pods: &'a [Pod],
    /// Nodes with their addresses.
    pub nodes: &'a [Node],
    /// NetworkPolicies of all namespaces.
    pub network_policies: &'a [NetworkPolicy],
    /// ClusterNetworkPolicies of both tiers.
    pub cluster_policies: &'a [ClusterNetworkPolicy],
}

/// A connection, behind destination NAT.
#[derive(Debug, Clone, Copy)]
pub struct Connection<'a> {
    /// Pod that opens the connection; `None` outside the pod network.
    pub from: Option<&'a Pod>,
    /// Pod that accepts the connection; `None` outside the pod network.
    pub to: Option<&'a Pod>,
    /// Source address of the connection.
    pub source: IpAddr,
    /// Destination address behind destination NAT.
    pub destination: IpAddr,
    /// Protocol and destination port; `None` for protocols without ports.
    pub transport: Option<(Protocol, u16)>,
    /// True if the destination is the node of `from`. NetworkPolicies do not judge such
    /// connections.
    pub to_own_node: bool,
}

/// Decision about one direction of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ruling {
    /// True if the connection is allowed in this direction.
    pub allowed: bool,
    /// Ground of the decision.
    pub reason: Reason,
}

/// Ground of a decision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    /// No policy concerns the connection.
    NoPolicy,
    /// A rule of a ClusterNetworkPolicy decides: its name and the position of the rule.
    ClusterRule(String, usize),
    /// All rules of NetworkPolicies that allow the connection: namespace, name and position.
    NetworkRules(Vec<(String, String, usize)>),
    /// No rule of the NetworkPolicies that isolate the pod allows the connection: namespace and
    /// name of each.
    Isolated(Vec<(String, String)>),
    /// The pod connects to itself.
    Itself,
}

/// Direction of a decision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Ingress,
    Egress,
}

impl World<'_> {
    /// Returns the decision of the source's policies.
    pub fn egress(&self, connection: &Connection<'_>) -> Ruling {
        match connection.from {
            Some(subject) => self.judge(Side::Egress, subject, connection),
            None => Ruling { allowed: true, reason: Reason::NoPolicy },
        }
    }

    /// Returns the decision of the destination's policies.
    pub fn ingress(&self, connection: &Connection<'_>) -> Ruling {
        match connection.to {
            Some(subject) => self.judge(Side::Ingress, subject, connection),
            None => Ruling { allowed: true, reason: Reason::NoPolicy },
        }
    }

    fn judge(&self, side: Side, subject: &Pod, connection: &Connection<'_>) -> Ruling {
        let tier = |admin| cluster::decide(self, admin, side, subject, connection);
        if let Some(ruling) = tier(true) {
            return ruling;
        }
        if let Some(ruling) = network::decide(self, side, subject, connection) {
            return ruling;
        }
        tier(false).unwrap_or(Ruling { allowed: true, reason: Reason::NoPolicy })
    }

    /// Returns the pod that owns an address: the running pod that started last.
    fn owner(&self, address: IpAddr) -> Option<&Pod> {
        let mut owner: Option<&Pod> = None;
        for pod in self.pods {
            if !pod.is_on_pod_network() || !pod.addresses().any(|one| one == address) {
                continue;
            }
            let age = |pod: &Pod| {
                let name = (pod.metadata.namespace.clone(), pod.metadata.name.clone());
                (pod.status.start_time.clone(), name)
            };
            if owner.is_none_or(|other| age(other) < age(pod)) {
                owner = Some(pod);
            }
        }
        owner
    }

    fn namespace_of(&self, pod: &Pod) -> Option<&Namespace> {
        self.namespaces.iter().find(|one| one.metadata.name == pod.metadata.namespace)
    }
}

/// Returns the peer's address.
fn peer_address(side: Side, connection: &Connection<'_>) -> IpAddr {
    match side {
        Side::Ingress => connection.source,
        Side::Egress => connection.destination,
    }
}

/// Returns whether the destination pod has declared the port of the connection under a name.
fn serves(
    world: &World<'_>,
    side: Side,
    subject: &Pod,
    connection: &Connection<'_>,
    name: &str,
) -> bool {
    let pod = match side {
        Side::Ingress => Some(subject),
        Side::Egress => world.owner(connection.destination),
    };
    let Some((pod, (protocol, port))) = pod.zip(connection.transport) else { return false };
    pod.ports().any(|declared| {
        declared.name.as_deref() == Some(name)
            && declared.protocol == protocol
            && declared.container_port == port
    })
}
