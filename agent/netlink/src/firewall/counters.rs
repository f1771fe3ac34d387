//! Counters of the table's drops.

use serde_json::Value;

use crate::nftables::nft;

/// Packets of each address family.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FamilyCount {
    /// Number of IPv4 packets.
    pub ipv4: u64,
    /// Number of IPv6 packets.
    pub ipv6: u64,
}

/// Packets that the table has dropped since its creation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Packets that a pod sent from an address that is not its own.
    pub forged: FamilyCount,
    /// Neighbour and router messages of pods, and packets that pods sent from link-local or
    /// unspecified IPv6 addresses.
    pub link_local: u64,
    /// Packets with a pod's source that arrived by an interface that is not the pod's.
    pub spoofed: FamilyCount,
    /// Packets to a pod that would have left outside the tunnel.
    pub cleartext: FamilyCount,
    /// Packets to a pod that another machine routed through this node.
    pub transit: FamilyCount,
}

/// Reads the counters; `None` without a table or without `nft`.
pub async fn read(table: &str) -> Option<Counters> {
    parse(&nft(&["-j", "list", "counters", "table", "inet", table], "").await.ok()?)
}

pub(crate) fn parse(text: &str) -> Option<Counters> {
    let document: Value = serde_json::from_str(text).ok()?;
    let packets = |name: &str| {
        let objects = document["nftables"].as_array()?.iter();
        let mut counters = objects.filter_map(|object| object.get("counter"));
        counters.find(|counter| counter["name"] == name)?["packets"].as_u64()
    };
    let family = |name: &str| {
        Some(FamilyCount {
            ipv4: packets(&format!("{name}_ipv4"))?,
            ipv6: packets(&format!("{name}_ipv6"))?,
        })
    };
    Some(Counters {
        forged: family("forged")?,
        link_local: packets("link_local")?,
        spoofed: family("spoofed")?,
        cleartext: family("cleartext")?,
        transit: family("transit")?,
    })
}
