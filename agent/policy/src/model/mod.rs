//! The cluster as the compiler sees it: policies with resolved selectors, pods with their addresses
//! and named ports, and the pods of this node with their interfaces.

mod index;
mod inventory;
mod mutation;
mod policy;
mod resolve;
mod selector;

pub(crate) use index::TermIndex;
pub use inventory::{Inventory, NamedPort, NodeInfo, PodId, PodInfo};
#[cfg(test)]
pub(crate) use mutation::with as with_mutation;
pub(crate) use mutation::{Mutation, mutated};
pub use policy::{Action, Direction, Peers, Policy, PolicyId, PortSpec, Ports, Rule, Tier};
pub use resolve::{resolve_cluster_policy, resolve_network_policy};
pub(crate) use selector::matches;
pub use selector::{NamespaceScope, PodTerm};
