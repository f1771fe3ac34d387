//! Prefixes that need an unreachable route: those of the cluster, those of every node, and former
//! ones. Clients may still send to pods of a removed node, because of an earlier name resolution or
//! an established connection.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::resolve::Accepted;
use crate::config::Config;
use crate::control::endpoint::Endpoint;
use crate::control::records::NodeRecord;

/// Maximum number of former prefixes that are kept; beyond it the node with the most loses its
/// oldest.
const MAX_FORMER: usize = 4096;

/// Names of the nodes by the prefixes that they own.
pub(super) type Owners = BTreeMap<IpNet, String>;

/// Prefixes that a node owned and that no node owns any more.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FormerPrefixes {
    /// The prefixes, the oldest first.
    #[serde(default)]
    former: VecDeque<IpNet>,
    /// Last owners of the prefixes. Prefixes that an earlier version stored have none.
    #[serde(default)]
    former_owners: Owners,
}

impl FormerPrefixes {
    /// Follows a change of the owned prefixes from `before` to `now`. A prefix inside `cluster` is
    /// not kept, because the cluster's unreachable route covers it.
    pub(super) fn update(&mut self, before: &Owners, now: &Owners, cluster: &[IpNet]) {
        for (gone, node) in before.iter().filter(|(net, _)| !now.contains_key(net)) {
            self.add(node, [gone]);
        }
        let now = now.keys().copied().collect();
        self.former.retain(|net| !is_covered(net, &now) && !is_inside(net, cluster));
        self.evict();
        let former: BTreeSet<_> = self.former.iter().collect();
        self.former_owners.retain(|net, _| former.contains(net));
    }

    /// Adds prefixes of `node` as the latest ones. [`FormerPrefixes::update`] bounds their number.
    pub(super) fn add<'a>(&mut self, node: &str, gone: impl IntoIterator<Item = &'a IpNet>) {
        for gone in gone {
            self.former_owners.insert(*gone, node.to_owned());
            if !self.former.contains(gone) {
                self.former.push_back(*gone);
            }
        }
    }

    /// Removes the prefixes beyond [`MAX_FORMER`]: the oldest of the node that has the most. A node
    /// that changes its own record again and again evicts only its own prefixes.
    fn evict(&mut self) {
        let mut counts: BTreeMap<Option<&String>, usize> = BTreeMap::new();
        for net in &self.former {
            *counts.entry(self.former_owners.get(net)).or_default() += 1;
        }
        let mut excess: BTreeMap<Option<String>, usize> = BTreeMap::new();
        for _ in MAX_FORMER..self.former.len() {
            let Some((node, count)) = counts.iter_mut().max_by_key(|(_, count)| **count) else {
                break;
            };
            *count -= 1;
            *excess.entry(node.cloned()).or_default() += 1;
        }
        let owners = &self.former_owners;
        self.former.retain(|net| match excess.get_mut(&owners.get(net).cloned()) {
            Some(left) if *left > 0 => {
                *left -= 1;
                false
            }
            _ => true,
        });
    }

    /// Returns the prefixes, the oldest first.
    pub fn iter(&self) -> impl Iterator<Item = &IpNet> {
        self.former.iter()
    }
}

/// Returns the underlay addresses of this node: those of its configuration and of its record.
pub(super) fn hosts(config: &Config, own: Option<&NodeRecord>) -> Vec<IpAddr> {
    let endpoints = own.into_iter().flat_map(|record| &record.endpoints);
    endpoints.map(Endpoint::ip).chain(config.underlay.addresses.iter().copied()).collect()
}

/// Returns the pod CIDRs of all nodes with their owners: those of the records, and `local` for the
/// node `own`.
pub(super) fn owners(accepted: &Accepted, own: &str, local: &[IpNet]) -> Owners {
    let recorded = accepted
        .values()
        .flatten()
        .flat_map(|record| record.pod_cidrs.iter().map(|net| (*net, record.name.clone())));
    recorded.chain(local.iter().map(|net| (*net, own.to_owned()))).collect()
}

/// Returns the prefixes that only the overlay carries: those of `cluster`, this node's (`local`),
/// and the owned and former ones that `cluster` does not cover. Two kinds of former prefixes are
/// left out: one inside an owned prefix, because its unreachable route would win over the route to
/// the owner, and one that contains an address in `hosts`, the underlay addresses of this node.
/// Addresses of other nodes do not count, because a node chooses the endpoints in its own record,
/// and must not open a prefix on all others.
pub fn overlay_prefixes(
    cluster: &[IpNet],
    local: &[IpNet],
    owned: &BTreeSet<IpNet>,
    former: &FormerPrefixes,
    hosts: &[IpAddr],
) -> BTreeSet<IpNet> {
    let is_free = |net: &&IpNet| !hosts.iter().any(|host| net.contains(host));
    let former = former.iter().filter(|net| !is_covered(net, owned)).filter(is_free);
    let outside = owned.iter().chain(former).filter(|net| !is_inside(net, cluster));
    outside.chain(local).chain(cluster).copied().collect()
}

/// Returns whether `net` or a prefix that contains it is in `set`.
fn is_covered(net: &IpNet, set: &BTreeSet<IpNet>) -> bool {
    std::iter::successors(Some(*net), IpNet::supernet).any(|net| set.contains(&net))
}

fn is_inside(net: &IpNet, cluster: &[IpNet]) -> bool {
    cluster.iter().any(|all| all.contains(net))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn nets(texts: &[&str]) -> BTreeSet<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn owned(texts: &[&str]) -> Owners {
        texts.iter().map(|text| (text.parse().unwrap(), "node-2".to_owned())).collect()
    }

    fn former(texts: &[&str]) -> FormerPrefixes {
        let former = texts.iter().map(|text| text.parse().unwrap()).collect();
        FormerPrefixes { former, former_owners: owned(texts) }
    }

    #[test]
    fn prefix_of_removed_node_is_kept_until_owned_again() {
        let mut kept = FormerPrefixes::default();
        let (all, one) = (owned(&["10.1.0.0/24", "fd00:2::/64"]), owned(&["10.1.0.0/24"]));
        kept.update(&all, &one, &[]);
        assert_eq!(kept, former(&["fd00:2::/64"]), "The prefix has no owner any more.");
        kept.update(&one, &one, &[]);
        assert_eq!(kept, former(&["fd00:2::/64"]), "A later change does not forget the prefix.");
        kept.update(&one, &owned(&["10.1.0.0/24", "fd00::/16"]), &[]);
        assert_eq!(kept, former(&[]), "The new owner's prefix contains the former one.");
    }

    #[test]
    fn former_prefix_inside_cluster_cidrs_is_not_kept() {
        let cluster = ["10.0.0.0/8".parse().unwrap()];
        let mut kept = FormerPrefixes::default();
        kept.update(&owned(&["10.2.0.0/24", "192.168.7.0/24"]), &Owners::new(), &cluster);
        assert_eq!(kept, former(&["192.168.7.0/24"]), "10.0.0.0/8 covers the other prefix.");
    }

    #[test]
    fn former_prefixes_of_node_with_most_are_evicted_first() {
        let net = |number: u32| {
            IpNet::new(std::net::Ipv4Addr::from(0x0a00_0000 + number).into(), 32).unwrap()
        };
        let mut kept = FormerPrefixes::default();
        kept.add("honest", [&net(0)]);
        let of = |range: std::ops::Range<u32>| -> Owners {
            range.map(|number| (net(number), "stolen".to_owned())).collect()
        };
        let many = MAX_FORMER as u32;
        for step in 0..3 {
            let first = 1 + step * many;
            kept.update(&of(first..first + many), &Owners::new(), &[]);
            assert_eq!(kept.former.len(), MAX_FORMER, "The list is bounded.");
            assert_eq!(kept.former_owners.len(), MAX_FORMER, "So are the owners.");
            assert_eq!(kept.former[0], net(0), "The prefix of the other node is kept.");
            assert_eq!(kept.former[1], net(first + 1), "The oldest of the node are forgotten.");
        }
    }

    #[test]
    fn stored_prefixes_without_owners_are_read() {
        let kept: FormerPrefixes =
            serde_json::from_str(r#"{"former": ["10.2.0.0/24", "fd00:2::/64"]}"#).unwrap();
        assert_eq!(kept.iter().count(), 2);
        let text = serde_json::to_string(&former(&["10.2.0.0/24"])).unwrap();
        assert!(text.contains(r#""former":["10.2.0.0/24"]"#), "Earlier versions read it: {text}");
    }

    #[test]
    fn overlay_prefixes_cover_cluster_own_peers_and_former() {
        let local = ["10.1.0.0/24".parse().unwrap()];
        let owned = nets(&["10.1.0.0/24", "10.2.0.0/24", "172.20.0.0/16", "fd00:2::/64"]);
        let kept = former(&["10.9.0.0/24", "172.20.5.0/24", "fd00:9::/64"]);
        let all = overlay_prefixes(&[], &local, &owned, &kept, &[]);
        let expected = nets(&[
            "10.1.0.0/24",
            "10.2.0.0/24",
            "10.9.0.0/24",
            "172.20.0.0/16",
            "fd00:2::/64",
            "fd00:9::/64",
        ]);
        assert_eq!(all, expected, "172.20.5.0/24 would win over the route to its present owner.");
        let cluster = ["10.0.0.0/8".parse().unwrap()];
        let all = overlay_prefixes(&cluster, &local, &owned, &kept, &[]);
        let expected =
            nets(&["10.0.0.0/8", "10.1.0.0/24", "172.20.0.0/16", "fd00:2::/64", "fd00:9::/64"]);
        assert_eq!(all, expected, "The cluster's prefix stands for the peers' prefixes inside it.");
    }

    #[test]
    fn former_prefix_with_own_address_is_left_out() {
        let kept = former(&["10.50.0.0/24", "10.51.0.0/24", "fd00:50::/64"]);
        let hosts = ["10.50.0.9".parse().unwrap(), "fd00:50::9".parse().unwrap()];
        let all = overlay_prefixes(&[], &[], &nets(&[]), &kept, &hosts);
        assert_eq!(all, nets(&["10.51.0.0/24"]), "This node listens in the other two prefixes.");
    }
}
