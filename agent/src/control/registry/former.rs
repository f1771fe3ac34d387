//! Prefixes that need an unreachable route: those of the cluster, those of every node, and former
//! ones. Clients may still send to pods of a removed node, because of an earlier name resolution or
//! an established connection.

use std::collections::{BTreeSet, VecDeque};
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::settle::Accepted;

/// Maximum number of former prefixes that are kept; beyond it the oldest are dropped.
const MAX_FORMER: usize = 4096;

/// Prefixes that a node owned and that no node owns any more, the oldest first.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FormerPrefixes(VecDeque<IpNet>);

impl FormerPrefixes {
    /// Follows a change of the owned prefixes from `before` to `now`. A prefix inside `cluster` is
    /// not kept, because the cluster's unreachable route covers it.
    pub(super) fn update(
        &mut self,
        before: &BTreeSet<IpNet>,
        now: &BTreeSet<IpNet>,
        cluster: &[IpNet],
    ) {
        self.add(before.difference(now));
        self.0.retain(|net| !is_covered(net, now) && !is_inside(net, cluster));
        self.0.drain(..self.0.len().saturating_sub(MAX_FORMER));
    }

    /// Adds prefixes as the latest ones. [`FormerPrefixes::update`] bounds their number.
    pub(super) fn add<'a>(&mut self, gone: impl IntoIterator<Item = &'a IpNet>) {
        for gone in gone {
            if !self.0.contains(gone) {
                self.0.push_back(*gone);
            }
        }
    }

    /// The prefixes, the oldest first.
    pub fn iter(&self) -> impl Iterator<Item = &IpNet> {
        self.0.iter()
    }
}

/// Returns the pod CIDRs of all nodes: those of the records, and `local` for this node.
pub(super) fn prefixes(accepted: &Accepted, local: &[IpNet]) -> BTreeSet<IpNet> {
    let recorded = accepted.values().flatten().flat_map(|record| &record.pod_cidrs);
    recorded.chain(local).copied().collect()
}

/// Returns the prefixes that only the overlay carries: those of `cluster`, this node's (`local`), and
/// the owned and former ones that `cluster` does not cover. Two kinds of former prefixes are left
/// out: one inside an owned prefix, because its unreachable route would win over the route to the
/// owner, and one that contains an address in `hosts`, because a node has that address now.
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

    fn former(texts: &[&str]) -> FormerPrefixes {
        FormerPrefixes(texts.iter().map(|text| text.parse().unwrap()).collect())
    }

    #[test]
    fn prefix_of_removed_node_is_kept_until_owned_again() {
        let mut kept = FormerPrefixes::default();
        let (all, one) = (nets(&["10.1.0.0/24", "fd00:2::/64"]), nets(&["10.1.0.0/24"]));
        kept.update(&all, &one, &[]);
        assert_eq!(kept, former(&["fd00:2::/64"]), "The prefix has no owner any more.");
        kept.update(&one, &one, &[]);
        assert_eq!(kept, former(&["fd00:2::/64"]), "A later change does not forget the prefix.");
        kept.update(&one, &nets(&["10.1.0.0/24", "fd00::/16"]), &[]);
        assert_eq!(kept, former(&[]), "The new owner's prefix contains the former one.");
    }

    #[test]
    fn former_prefix_inside_cluster_cidrs_is_not_kept() {
        let cluster = ["10.0.0.0/8".parse().unwrap()];
        let mut kept = FormerPrefixes::default();
        kept.update(&nets(&["10.2.0.0/24", "192.168.7.0/24"]), &nets(&[]), &cluster);
        assert_eq!(kept, former(&["192.168.7.0/24"]), "10.0.0.0/8 covers the other prefix.");
    }

    #[test]
    fn former_prefixes_beyond_maximum_drop_the_oldest() {
        let mut kept = FormerPrefixes::default();
        let net = |number: u32| {
            IpNet::new(std::net::Ipv4Addr::from(0x0a00_0000 + number).into(), 32).unwrap()
        };
        kept.update(&BTreeSet::from([net(0)]), &BTreeSet::new(), &[]);
        let all = (1..=MAX_FORMER as u32).map(net).collect();
        kept.update(&all, &BTreeSet::new(), &[]);
        assert_eq!(kept.0.len(), MAX_FORMER, "The list is bounded.");
        assert_eq!(kept.0[0], "10.0.0.1/32".parse().unwrap(), "The oldest prefix is forgotten.");
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
    fn former_prefix_with_a_node_address_is_left_out() {
        let kept = former(&["10.50.0.0/24", "10.51.0.0/24", "fd00:50::/64"]);
        let hosts = ["10.50.0.9".parse().unwrap(), "fd00:50::9".parse().unwrap()];
        let all = overlay_prefixes(&[], &[], &nets(&[]), &kept, &hosts);
        assert_eq!(all, nets(&["10.51.0.0/24"]), "Nodes listen in the other two prefixes now.");
    }
}
