//! Unreachable routes for pod prefixes. Without a better route, the kernel refuses a packet and
//! notifies the sender, instead of forwarding the packet to the underlay in clear (RFC 4632,
//! section 5.1).
//!
//! The routes have Skein's protocol number, the worst metric and no interface, so they remain when
//! the overlay's interface goes down or is deleted.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use rtnetlink::RouteMessageBuilder;
use rtnetlink::packet_route::route::{
    RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType,
};

use super::connection::{Netlink, NetlinkError};
use super::interface::{ALIAS_PREFIX, ReconcileReport};
use super::route::{PROTOCOL, destination};

/// Metric of the unreachable routes: the maximum, so that every other route to the same prefix
/// wins. (0 would mean 1024 for IPv6, the same metric as that of the overlay's routes.)
pub(crate) const METRIC: u32 = u32::MAX;

/// Returns whether a route is one of the unreachable routes of Skein.
pub(super) fn is_unreachable(route: &RouteMessage) -> bool {
    route.header.kind == RouteType::Unreachable
        && route.header.protocol == RouteProtocol::Other(PROTOCOL)
        && route.attributes.contains(&RouteAttribute::Priority(METRIC))
}

fn message(net: &IpNet) -> Result<RouteMessage, NetlinkError> {
    let builder = RouteMessageBuilder::<IpAddr>::new()
        .destination_prefix(net.network(), net.prefix_len())
        .map_err(|error| NetlinkError {
            what: format!("describe the unreachable route to {net}"),
            source: std::io::Error::other(error.to_string()),
        })?;
    let builder = builder
        .kind(RouteType::Unreachable)
        .protocol(RouteProtocol::Other(PROTOCOL))
        .scope(RouteScope::Universe)
        .priority(METRIC);
    Ok(builder.build())
}

impl Netlink {
    /// Returns the prefixes of Skein's unreachable routes in the main table, of both families.
    ///
    /// # Errors
    ///
    /// [`NetlinkError`] if the kernel refuses the dump.
    pub async fn unreachable_routes(&self) -> Result<BTreeSet<IpNet>, NetlinkError> {
        let mut filter = RouteMessage::default();
        filter.header.protocol = RouteProtocol::Other(PROTOCOL);
        filter.header.kind = RouteType::Unreachable;
        let messages = self.dump_routes(&filter).await?;
        Ok(messages.iter().filter(|route| is_unreachable(route)).filter_map(destination).collect())
    }

    /// Adds an unreachable route; returns whether it was added. An existing route is not an error.
    /// A kernel without the address family forwards none of its packets, and needs no route.
    ///
    /// # Errors
    ///
    /// [`NetlinkError`] if the kernel refuses the route for another reason.
    async fn add_unreachable_route(&self, net: &IpNet) -> Result<bool, NetlinkError> {
        let result = self.handle.route().add(message(net)?).execute().await;
        let result = result.map_err(|error| {
            NetlinkError::new(format_args!("add the unreachable route to {net}"), error)
        });
        match result {
            Err(error)
                if matches!(
                    error.errno(),
                    Some(libc::EEXIST | libc::EAFNOSUPPORT | libc::EOPNOTSUPP)
                ) =>
            {
                Ok(false)
            }
            result => result.map(|()| true),
        }
    }

    /// Removes an unreachable route. A missing route is not an error.
    ///
    /// # Errors
    ///
    /// [`NetlinkError`] if the kernel refuses for another reason.
    pub async fn delete_unreachable_route(&self, net: &IpNet) -> Result<(), NetlinkError> {
        let result = self.handle.route().del(message(net)?).execute().await;
        let result = result.map_err(|error| {
            NetlinkError::new(format_args!("remove the unreachable route to {net}"), error)
        });
        match result {
            Err(error) if error.errno() == Some(libc::ESRCH) => Ok(()),
            result => result,
        }
    }

    /// Adds the unreachable routes that are missing. A failure does not stop the rest.
    pub async fn add_unreachable_routes(&self, wanted: &BTreeSet<IpNet>) -> ReconcileReport {
        match self.unreachable_routes().await {
            Ok(present) => self.add_missing(wanted, &present).await,
            Err(error) => {
                ReconcileReport { errors: vec![error.to_string()], ..ReconcileReport::default() }
            }
        }
    }

    async fn add_missing(
        &self,
        wanted: &BTreeSet<IpNet>,
        present: &BTreeSet<IpNet>,
    ) -> ReconcileReport {
        let mut outcome = ReconcileReport::default();
        for net in wanted.difference(present) {
            match self.add_unreachable_route(net).await {
                Ok(true) => outcome.changes.push(format!("unreachable route {net} added")),
                Ok(false) => {}
                Err(error) => outcome.errors.push(error.to_string()),
            }
        }
        outcome
    }

    /// Makes the unreachable routes equal to `wanted`. Routes are added before others are removed,
    /// and a failure does not stop the rest. A route outside `wanted` is removed in two cases: the
    /// route is in `before`, the routes that this process wanted earlier, or no agent with another
    /// alias than `alias` has an interface here, so that the route belongs to no other agent.
    pub async fn ensure_unreachable_routes(
        &self,
        wanted: &BTreeSet<IpNet>,
        before: &BTreeSet<IpNet>,
        alias: &str,
    ) -> ReconcileReport {
        let present = match self.unreachable_routes().await {
            Ok(present) => present,
            Err(error) => {
                return ReconcileReport {
                    errors: vec![error.to_string()],
                    ..ReconcileReport::default()
                };
            }
        };
        let mut outcome = self.add_missing(wanted, &present).await;
        let stale: Vec<_> = present.difference(wanted).collect();
        if stale.is_empty() {
            return outcome;
        }
        let alone = match self.has_interface_of_another_agent(alias).await {
            Ok(found) => !found,
            Err(error) => {
                outcome.errors.push(error.to_string());
                false
            }
        };
        for net in stale.into_iter().filter(|net| alone || before.contains(net)) {
            match self.delete_unreachable_route(net).await {
                Ok(()) => outcome.changes.push(format!("unreachable route {net} removed")),
                Err(error) => outcome.errors.push(error.to_string()),
            }
        }
        outcome
    }

    /// Returns whether a Skein agent with another node name has its interface in this network
    /// namespace.
    ///
    /// # Errors
    ///
    /// [`NetlinkError`] if the kernel refuses the dump.
    pub async fn has_interface_of_another_agent(&self, alias: &str) -> Result<bool, NetlinkError> {
        let links = self.links().await?;
        Ok(links.iter().any(|link| link.alias.starts_with(ALIAS_PREFIX) && link.alias != alias))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::time::Duration;

    use super::super::monitor::Monitor;
    use super::super::testing::{configure, ensure_device, in_namespace, ip, wanted};
    use super::*;

    const ALIAS: &str = "skein:node-1";

    fn nets(texts: &[&str]) -> BTreeSet<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    /// Returns the interface index of the route to an address; `None` if the kernel refuses packets
    /// to it.
    async fn interface(netlink: &Netlink, to: &str) -> Option<u32> {
        // For IPv4 the kernel answers with an error, for IPv6 with the route.
        let found = netlink.look_up(to.parse().unwrap(), None).await.ok()?;
        found.interface.filter(|_| found.refused.is_none())
    }

    async fn ensure(netlink: &Netlink, wanted: &BTreeSet<IpNet>) -> ReconcileReport {
        netlink.ensure_unreachable_routes(wanted, &BTreeSet::new(), ALIAS).await
    }

    #[test]
    fn unreachable_route_applies_after_interface_is_deleted() {
        in_namespace(|| async {
            let netlink = Netlink::connect().unwrap();
            ip("link set lo up");
            ip("link add dev uplink type bridge");
            ip("link set uplink up");
            ip("route add default dev uplink");
            ip("-6 route add default dev uplink");
            // The prefixes of the routes through the interface, and a wider one.
            let prefixes = nets(&["10.0.0.0/14", "10.2.0.0/24", "fd00::/16", "fd00:2::/64"]);
            assert_eq!(ensure(&netlink, &prefixes).await.changes.len(), 4);
            let overlay = wanted();
            for damage in ["link set sk-test down", "link del sk-test", "route flush dev sk-test"] {
                let present = ensure_device(&overlay, &netlink).await.unwrap();
                let outcome = configure(&overlay, &netlink, present.index).await;
                assert_eq!(outcome.errors, [""; 0]);
                for to in ["10.2.0.5", "fd00:2::5"] {
                    let found = interface(&netlink, to).await;
                    assert_eq!(found, Some(present.index), "{to} is reached by the overlay.");
                }
                for to in ["10.1.9.9", "fd00:9::9"] {
                    assert_eq!(interface(&netlink, to).await, None, "Nobody owns {to}.");
                }
                ip(damage);
                if damage.contains("flush") {
                    ip("-6 route flush dev sk-test");
                }
                for to in ["10.2.0.5", "fd00:2::5"] {
                    let found = interface(&netlink, to).await;
                    assert_eq!(found, None, "{to} must be refused after {damage}.");
                }
                assert!(
                    interface(&netlink, "198.51.100.1").await.is_some(),
                    "Not a pod's address."
                );
                assert_eq!(
                    ensure(&netlink, &prefixes).await,
                    ReconcileReport::default(),
                    "{damage}"
                );
            }
        });
    }

    #[test]
    fn stale_unreachable_routes_are_removed_and_foreign_stay() {
        in_namespace(|| async {
            let netlink = Netlink::connect().unwrap();
            ip("link set lo up");
            ip("route add unreachable 10.50.0.0/16 metric 4294967295");
            ip("route add unreachable 10.51.0.0/16 metric 7 proto 77");
            ensure(&netlink, &nets(&["10.2.0.0/24", "10.3.0.0/24", "fd00:2::/64"])).await;
            let outcome = ensure(&netlink, &nets(&["10.3.0.0/24"])).await;
            assert_eq!(outcome.errors, [""; 0]);
            assert_eq!(netlink.unreachable_routes().await.unwrap(), nets(&["10.3.0.0/24"]));
            let left = ip("route show type unreachable");
            assert!(left.contains("10.50.0.0/16") && left.contains("10.51.0.0/16"), "{left}");
        });
    }

    #[test]
    fn unreachable_routes_of_another_agent_stay() {
        in_namespace(|| async {
            let netlink = Netlink::connect().unwrap();
            ip("link set lo up");
            ip("link add dev sk-other type bridge");
            ip("link set sk-other alias skein:node-2");
            let (theirs, ours) = (nets(&["10.9.0.0/24"]), nets(&["10.2.0.0/24", "10.3.0.0/24"]));
            let all: BTreeSet<_> = theirs.union(&ours).copied().collect();
            assert_eq!(netlink.add_unreachable_routes(&all).await.errors, [""; 0]);
            let now = nets(&["10.2.0.0/24"]);
            let outcome = netlink.ensure_unreachable_routes(&now, &ours, ALIAS).await;
            assert_eq!(outcome.changes, ["unreachable route 10.3.0.0/24 removed"]);
            let left = netlink.unreachable_routes().await.unwrap();
            assert_eq!(left, nets(&["10.2.0.0/24", "10.9.0.0/24"]), "The other agent has one.");
        });
    }

    #[test]
    fn removed_unreachable_route_is_reported() {
        in_namespace(|| async {
            let netlink = Netlink::connect().unwrap();
            ip("link set lo up");
            let monitor = Monitor::start("sk-test").unwrap();
            let prefixes = nets(&["10.2.0.0/24", "fd00:2::/64"]);
            let all = ["route flush proto 77", "-6 route flush proto 77", "link set lo down"];
            for damage in all {
                ensure(&netlink, &prefixes).await;
                let drained = async {
                    loop {
                        monitor.changed().await
                    }
                };
                let _ = tokio::time::timeout(Duration::from_millis(100), drained).await;
                ip(damage);
                let told = tokio::time::timeout(Duration::from_secs(30), monitor.changed()).await;
                assert!(told.is_ok(), "{damage} must be reported.");
                let outcome = ensure(&netlink, &prefixes).await;
                assert_eq!(outcome.errors, [""; 0], "{damage}");
                assert_eq!(netlink.unreachable_routes().await.unwrap(), prefixes, "{damage}");
            }
        });
    }
}
