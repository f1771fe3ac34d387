//! Kubernetes network policies for the pods of a node: API types, compiler and oracle.
//!
//! The crate is pure except for [`enforce`]: the other modules open no sockets, start no programs
//! and read no clock. The crate links neither kube nor k8s-openapi.
//!
//! - [`api`]: the objects as the API server serves them. Parts that cannot be read match nothing;
//!   parts of unknown types fail closed.
//! - [`model`]: policies with resolved selectors, and the inventory of pods, namespaces and nodes.
//! - [`compile`]: the inventory becomes a [`program`], the intermediate form of the kernel's table.
//! - [`engine`]: incremental compilation; each change becomes a small difference.
//! - [`render`]: text for `nft -f -`.
//! - [`enforce`]: installation of a program in the kernel, and its changes.
//! - [`interpret`]: the verdict of a program for a packet.
//! - [`oracle`]: the verdict of the API objects for a connection, without the compiler.
//!
//! # Semantics
//!
//! A connection needs the permission of the source's egress policies and of the destination's
//! ingress policies. Each direction is judged on the pod's own node, in three tiers: rules of
//! ClusterNetworkPolicies of the tier Admin, in the order of priority and name; NetworkPolicies,
//! if one isolates the pod in this direction; otherwise the tier Baseline. What no tier decides is
//! accepted. Replies and related ICMP messages pass without judgement.
//!
//! NetworkPolicies never refuse a pod's connection to itself through a Service.
//! ClusterNetworkPolicies of both tiers judge such a connection. Packets from a pod to its own node
//! are judged by ClusterNetworkPolicies only, and packets from the node to its pods never.
//!
//! An address belongs to the running pod that started last. `namespaceSelector: {}` without a pod
//! selector stands for the pod CIDRs, without the overlay addresses of nodes in them.
//!
//! # Program
//!
//! Interface maps lead from a pod's host interface to the profile for a direction. A profile is a
//! chain that all pods with the same policies share. Chains are named by their content and never
//! change: a new policy makes a new chain, and the map's element moves. Pods that come, go or
//! change their labels change elements of sets only. A pod whose labels are not known is in
//! quarantine: its forwarded traffic is refused.
//!
//! Up to 8 rules of NetworkPolicies with equal ports keep a counter of their own; more rules become
//! one rule with the union of the peers. More than 8 port lists are dispatched by a map from
//! protocol and port to chains. The cost of a packet therefore does not grow with the number of
//! policies, except for long ranges of ports.

#![forbid(unsafe_code)]
#![warn(clippy::missing_errors_doc)]

pub mod api;
pub mod compile;
pub mod enforce;
pub mod engine;
pub mod interpret;
pub mod model;
mod name;
pub mod oracle;
pub mod program;
pub mod ranges;
pub mod render;
#[cfg(test)]
mod tests;
