//! API types of networking.k8s.io/v1 NetworkPolicy and policy.networking.k8s.io/v1alpha2
//! ClusterNetworkPolicy, and the fields of Pod, Namespace and Node that policies refer to.
//!
//! The types read JSON and YAML of any server version. A part that cannot be read is kept as
//! [`Parsed::Invalid`] in its place, so that it affects neither the rest of the object nor the
//! other objects. Only an object without a readable `metadata` is an error of the parser.

mod cidr;
mod cluster_network_policy;
mod defect;
mod label;
mod network_policy;
mod object;
mod parsed;
mod port;
#[cfg(test)]
mod tests;

pub use cidr::{Cidr, CidrError, IpBlock};
pub use cluster_network_policy::{
    ClusterNetworkPolicy, ClusterNetworkPolicySpec, ClusterRule, EgressPeer, IngressPeer,
    NamespacedPod, PolicyTier, Priority, PriorityError, RuleAction, Subject, TransportMatch,
    TransportProtocol,
};
pub use defect::Defect;
pub use label::{LabelSelector, Labels, METADATA_NAME, Operator, Requirement, RequirementError};
pub use network_policy::{
    EgressRule, IngressRule, NetworkPolicy, NetworkPolicySpec, Peer, PolicyType,
};
pub use object::{
    Container, ContainerPort, Namespace, Node, NodeAddress, NodeStatus, ObjectMeta, Pod, PodIp,
    PodSpec, PodStatus,
};
pub use parsed::Parsed;
pub use port::{PolicyPort, Port, PortError, PortRange, PortSelector, Protocol};
