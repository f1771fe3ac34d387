//! Firewall of the pod network, in an nftables table of its own: pods' addresses are accepted from
//! the overlay and from their own interfaces only, packets to pods never leave outside the tunnel,
//! and sources that the overlay does not carry are masqueraded.
//!
//! The rules are passed to the `nft` program as text, in one transaction. `nft list table inet
//! skein` shows the same rules as [`rules`]. The table does not change when a pod is created or
//! deleted, because a pod's host route assigns its address to its interface.

pub mod counters;
pub mod forward;
mod legacy;
pub(crate) mod monitor;
mod nft;
pub mod probe;
pub mod reconciler;
pub mod rules;
mod table;

pub use self::nft::FirewallError;
pub use self::reconciler::Firewall;
pub use self::rules::{PodRules, Rules};
pub use self::table::remove;
