//! Metric families of the nftables table and of the chains of other programs.

use prometheus::proto::MetricFamily;
use skein_netlink::firewall::counters::{Counters, FamilyCount};
use skein_netlink::firewall::reconciler::FirewallStatus;

use super::family::{Family, Kind};

/// State of the firewall, for a scrape.
#[derive(Debug, Clone, Default)]
pub struct Firewall {
    /// Status of the last comparison.
    pub status: FirewallStatus,
    /// Counters of the drops; `None` without a table.
    pub counters: Option<Counters>,
}

pub(super) fn families(firewall: &Firewall, pods: bool) -> Vec<MetricFamily> {
    let status = &firewall.status;
    let mut active = Family::new(
        "skein_firewall_active",
        "1 if the nftables table of Skein is installed, 0 if not; absent if the configuration disables all rules.",
        Kind::Gauge,
    );
    if status.active || status.error.is_some() {
        active.add(&[], f64::from(u8::from(status.active)));
    }
    let mut chains = Family::new(
        "skein_forward_chains",
        "FORWARD chains of other programs by state: `closed` chains drop packets of pods, the policy of \
         `unknown` chains cannot be read.",
        Kind::Gauge,
    );
    chains.add(&[("state", "closed")], status.closed.len() as f64);
    chains.add(&[("state", "unknown")], status.unknown.len() as f64);
    let drops = |name, help, wanted: bool, count: fn(&Counters) -> FamilyCount| {
        let mut family = Family::new(name, help, Kind::Counter);
        if let Some(counters) = firewall.counters.as_ref().filter(|_| wanted) {
            let FamilyCount { ipv4, ipv6 } = count(counters);
            family.add(&[("family", "ipv4")], ipv4 as f64);
            family.add(&[("family", "ipv6")], ipv6 as f64);
        }
        family.finish()
    };
    let mut link_local = Family::new(
        "skein_pod_link_local_drops_total",
        "Dropped neighbour and router discovery messages of pods, and dropped packets of pods from link-local \
         IPv6 addresses. The kernel of each new pod sends a few.",
        Kind::Counter,
    );
    if let Some(counters) = firewall.counters.as_ref().filter(|_| pods) {
        link_local.add(&[], counters.link_local as f64);
    }
    vec![
        active.finish(),
        chains.finish(),
        drops(
            "skein_pod_source_drops_total",
            "Packets dropped because a pod sent them with a source address that is not its own.",
            pods,
            |counters| counters.forged,
        ),
        link_local.finish(),
        drops(
            "skein_spoofed_source_drops_total",
            "Packets dropped because they had a pod's source address and arrived through an interface that is \
             not the pod's.",
            true,
            |counters| counters.spoofed,
        ),
        drops(
            "skein_cleartext_drops_total",
            "Packets to pods dropped because they would have left the node outside the tunnel.",
            true,
            |counters| counters.cleartext,
        ),
        drops(
            "skein_transit_drops_total",
            "Packets to pods dropped because another machine routed them through the node.",
            true,
            |counters| counters.transit,
        ),
    ]
}
