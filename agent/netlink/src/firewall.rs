//! Firewall of the pod network, in an nftables table of its own. A packet with a pod's source
//! address is accepted only from the overlay and from the interface of that pod. Packets to pods
//! never leave the node outside the tunnel. Peers drop a packet whose source address is outside of
//! this node's pod CIDRs, so the firewall masquerades such packets before they enter the tunnel.
//!
//! The program `nft` receives the rules as text, in one transaction. `nft list table inet skein`
//! prints the rules that [`rules`] has rendered. The table does not change when a pod is created or
//! deleted, because the rules find the interface of a pod by a lookup in the routing table (`fib`).

pub mod counters;
pub mod forward;
mod legacy;
pub mod probe;
pub mod reconciler;
pub mod rules;
mod table;

pub use self::reconciler::Firewall;
pub use self::rules::{PodRules, Rules};
pub use self::table::remove;
pub use crate::nftables::FirewallError;
