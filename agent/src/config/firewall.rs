//! Configuration table `[firewall]`: protections of the pod network.

use serde::{Deserialize, Serialize};

/// Protections of the pod network with nftables. They do not need the CNI plugin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Firewall {
    /// Drop packets with a pod's source address that arrive by another interface than the pod's.
    pub drop_spoofed: bool,
    /// Drop packets to pods that would leave the node outside the tunnel.
    pub drop_cleartext: bool,
    /// Drop packets that other machines route to pods through this node.
    pub drop_transit: bool,
    /// Masquerade packets that enter the overlay with a source outside the node's pod CIDRs.
    pub masquerade_foreign: bool,
    /// Exempt the overlay's datagrams from connection tracking.
    pub notrack: bool,
}

impl Default for Firewall {
    fn default() -> Self {
        Self {
            drop_spoofed: true,
            drop_cleartext: true,
            drop_transit: true,
            masquerade_foreign: true,
            notrack: true,
        }
    }
}
