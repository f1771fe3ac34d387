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
mod monitor;
mod nft;
pub mod probe;
pub mod reconciler;
pub mod rules;
mod table;

pub use self::nft::FirewallError;
pub use self::reconciler::Firewall;
pub use self::rules::{PodRules, Rules};
pub use self::table::remove;

/// Fuzzing entry point of the parsers of `nft -j` output.
#[doc(hidden)]
pub fn fuzz_printed(text: &str) {
    let _ = counters::parse(text);
    forward::fuzz_printed(text);
}

/// Fuzzing entry point of the parser of nftables notifications.
#[doc(hidden)]
pub fn fuzz_notifications(data: &[u8]) {
    monitor::fuzz_notifications(data);
}
