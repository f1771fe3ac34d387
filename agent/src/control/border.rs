//! Input for the rules of the nftables table: prefixes of pods, and networks of this node.

use std::collections::BTreeSet;

use ipnet::IpNet;
use skein_netlink::address::Address;
use skein_netlink::firewall::{PodRules, Rules};
use skein_netlink::link::Link;
use skein_netlink::pod::HOST_PREFIX;

use super::desired::Desired;
use crate::config::{Config, overlap};

/// Returns the rules of the nftables table. `networks` are the prefixes of this node's addresses on
/// interfaces of other programs. A prefix of a present or former peer that overlaps one of them is
/// left out, because the record must not cut this node off from a network of its own.
/// `source_ports` are the ports of the data process.
pub(super) fn firewall_rules(
    config: &Config,
    desired: &Desired,
    networks: &[IpNet],
    source_ports: &[u16],
) -> Rules {
    let peers = || desired.peers.iter();
    let is_certain =
        |net: &IpNet| config.cluster_cidrs.contains(net) || desired.local_cidrs.contains(net);
    let is_pods =
        |net: &&IpNet| is_certain(net) || !networks.iter().any(|network| overlap(net, network));
    let settings = config.firewall;
    Rules {
        table: config.cni.table.clone(),
        interface: config.interface.name.clone(),
        port: config.underlay.port,
        pods: config.cni.enabled.then(|| PodRules {
            masquerade: config.cni.masquerade,
            no_masquerade: config.cni.no_masquerade.clone(),
            forward_accept: config.cni.forward_accept,
        }),
        local: desired.local_cidrs.clone(),
        cluster: desired.overlay.iter().filter(is_pods).copied().collect(),
        peers: peers().flat_map(|peer| peer.endpoints.clone()).collect(),
        source_ports: source_ports.to_vec(),
        drop_spoofed: settings.drop_spoofed,
        drop_cleartext: settings.drop_cleartext,
        drop_transit: settings.drop_transit,
        masquerade_foreign: settings.masquerade_foreign,
        notrack: settings.notrack,
    }
}

/// Returns the prefixes of this node's addresses, in ascending order. Addresses of Skein's
/// interface and of interfaces to pods are left out, and so are link-local addresses.
pub(super) fn networks(links: &[Link], addresses: &[Address], config: &Config) -> Vec<IpNet> {
    let is_ours = |name: &str| name == config.interface.name || name.starts_with(HOST_PREFIX);
    let ours: BTreeSet<_> =
        links.iter().filter(|link| is_ours(&link.name)).map(|link| link.index).collect();
    let others =
        addresses.iter().filter(|address| !address.link_local && !ours.contains(&address.index));
    let mut networks: Vec<_> = others.map(|address| address.net).collect();
    networks.sort_unstable();
    networks.dedup();
    networks
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn own_network_inside_peer_prefix_is_not_a_pod_prefix() {
        let nets = |texts: &[&str]| texts.iter().map(|net| net.parse().unwrap()).collect();
        let config = Config::parse("cluster_cidrs = ['10.244.0.0/16']").unwrap();
        let desired = Desired {
            mtu: 1400,
            mtu_problem: None,
            local_cidrs: nets(&["10.244.1.0/24"]),
            peers: Vec::new(),
            addresses: Vec::new(),
            peer_addresses: Vec::new(),
            overlay: ["10.244.0.0/16", "10.244.1.0/24", "10.9.0.0/16", "fd00:9::/64"]
                .map(|net| net.parse().unwrap())
                .into(),
            unreachable: BTreeSet::new(),
            unresolved: Vec::new(),
        };
        // The second is an address of a bridge for pods of this node.
        let networks: Vec<_> = nets(&["10.9.3.7/24", "10.244.1.1/24"]);
        let rules = firewall_rules(&config, &desired, &networks, &[]);
        let expected: Vec<_> = nets(&["10.244.0.0/16", "10.244.1.0/24", "fd00:9::/64"]);
        assert_eq!(rules.cluster, expected, "The node reaches its own network 10.9.3.0/24.");
    }
}
