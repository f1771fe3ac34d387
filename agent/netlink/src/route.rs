//! Routes of Skein, identified by their protocol number.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures_util::TryStreamExt;
use ipnet::IpNet;
use rtnetlink::RouteMessageBuilder;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteMetric, RouteProtocol,
    RouteScope, RouteType,
};

use super::connection::{Netlink, NetlinkError};

/// Protocol number (rtm_protocol) of Skein's routes. Neither iproute2's rt_protos nor the routing
/// daemons use it.
pub(crate) const PROTOCOL: u8 = 77;

/// Route through one interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Route {
    /// Destination prefix.
    pub destination: IpNet,
    /// Index of the interface.
    pub interface: u32,
    /// Source address for local programs; `None` lets the kernel select one.
    pub source: Option<IpAddr>,
    /// MTU in bytes; `None` for the interface's.
    pub mtu: Option<u32>,
    /// Metric; `None` is the kernel's default (0 for IPv4, 1024 for IPv6).
    pub metric: Option<u32>,
}

/// Default metric of IPv6 routes (IP6_RT_PRIO_USER, linux/ipv6_route.h).
const DEFAULT_IPV6_METRIC: u32 = 1024;

impl Route {
    fn message(&self) -> Result<RouteMessage, NetlinkError> {
        let wrong = |error: String| NetlinkError {
            what: format!("describe the route to {}", self.destination),
            source: std::io::Error::other(error),
        };
        let mut message = RouteMessageBuilder::<IpAddr>::new()
            .destination_prefix(self.destination.network(), self.destination.prefix_len())
            .map_err(|error| wrong(error.to_string()))?
            .output_interface(self.interface)
            .protocol(RouteProtocol::Other(PROTOCOL))
            .scope(match self.destination {
                // Peers are on the link. The kernel has no scopes for IPv6.
                IpNet::V4(_) => RouteScope::Link,
                IpNet::V6(_) => RouteScope::Universe,
            });
        if let Some(source) = self.source {
            message = message.pref_source(source).map_err(|error| wrong(error.to_string()))?;
        }
        if let Some(metric) = self.metric {
            message = message.priority(metric);
        }
        let mut message = message.build();
        let mtu = self.mtu.map(|mtu| RouteAttribute::Metrics(vec![RouteMetric::Mtu(mtu)]));
        message.attributes.extend(mtu);
        Ok(message)
    }

    fn parse(message: &RouteMessage) -> Option<Self> {
        if message.header.protocol != RouteProtocol::Other(PROTOCOL) {
            return None;
        }
        let (destination, interface) = parse(message)?;
        let source = message.attributes.iter().find_map(|attribute| match attribute {
            RouteAttribute::PrefSource(source) => address(source),
            _ => None,
        });
        let metric = message.attributes.iter().find_map(|attribute| match attribute {
            RouteAttribute::Priority(metric) => Some(*metric),
            _ => None,
        });
        let default = if destination.addr().is_ipv6() { DEFAULT_IPV6_METRIC } else { 0 };
        let metric = metric.filter(|metric| *metric != default);
        Some(Self { destination, interface, source, mtu: mtu(message), metric })
    }
}

/// Returns the destination and the interface of a unicast route of the main table; `None` for other
/// routes.
fn parse(message: &RouteMessage) -> Option<(IpNet, u32)> {
    let header = &message.header;
    if header.table != RouteHeader::RT_TABLE_MAIN || header.kind != RouteType::Unicast {
        return None;
    }
    let interface = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => Some(*index),
        _ => None,
    });
    Some((destination(message)?, interface?))
}

/// Returns the destination prefix of a route; a default route has no such attribute.
pub(super) fn destination(message: &RouteMessage) -> Option<IpNet> {
    let mut ip = match message.header.address_family {
        AddressFamily::Inet => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        AddressFamily::Inet6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        _ => return None,
    };
    for attribute in &message.attributes {
        if let RouteAttribute::Destination(found) = attribute {
            ip = address(found)?;
        }
    }
    IpNet::new(ip, message.header.destination_prefix_length).ok()
}

/// Returns the MTU of a route in bytes; `None` if the route has none of its own.
pub(super) fn mtu(message: &RouteMessage) -> Option<u32> {
    message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Metrics(metrics) => metrics.iter().find_map(|metric| match metric {
            RouteMetric::Mtu(mtu) => Some(*mtu),
            _ => None,
        }),
        _ => None,
    })
}

pub(super) fn address(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some(IpAddr::V4(*ip)),
        RouteAddress::Inet6(ip) => Some(IpAddr::V6(*ip)),
        _ => None,
    }
}

impl Netlink {
    /// Returns Skein's routes through an interface, or through all.
    ///
    /// # Errors
    /// [`NetlinkError`] if the kernel refuses the dump.
    pub async fn routes(&self, interface: Option<u32>) -> Result<Vec<Route>, NetlinkError> {
        let mut filter = RouteMessage::default();
        filter.header.protocol = RouteProtocol::Other(PROTOCOL);
        filter.attributes.extend(interface.map(RouteAttribute::Oif));
        let messages = self.dump_routes(&filter).await?;
        let mut routes: Vec<_> = messages.iter().filter_map(Route::parse).collect();
        routes.retain(|route| interface.is_none_or(|index| route.interface == index));
        Ok(routes)
    }

    /// Returns the unicast default routes of the main table, of both families.
    pub(super) async fn default_routes(&self) -> Result<Vec<RouteMessage>, NetlinkError> {
        let mut messages = self.dump_routes(&RouteMessage::default()).await?;
        // Kernels without strict checking answer with the routes of all tables.
        messages.retain(|RouteMessage { header, .. }| {
            header.destination_prefix_length == 0
                && header.table == RouteHeader::RT_TABLE_MAIN
                && header.kind == RouteType::Unicast
        });
        Ok(messages)
    }

    /// Returns the routes of the main table of both families that match `filter`, as far as the
    /// kernel supports filters.
    ///
    /// # Errors
    /// [`NetlinkError`] if the kernel refuses a dump.
    pub(super) async fn dump_routes(
        &self,
        filter: &RouteMessage,
    ) -> Result<Vec<RouteMessage>, NetlinkError> {
        let _dump = self.dump.lock().await;
        let mut all = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut filter = filter.clone();
            filter.header.address_family = family;
            filter.header.table = RouteHeader::RT_TABLE_MAIN;
            let messages = self.handle.route().get(filter).execute().try_collect::<Vec<_>>().await;
            all.extend(messages.map_err(|error| NetlinkError::new("list routes", error))?);
        }
        Ok(all)
    }

    /// Adds a route that may exist already; returns whether a change was made. A different route of
    /// Skein through the same interface is replaced.
    ///
    /// # Errors
    ///
    /// [`NetlinkError`] if another program has a route to the prefix, or if the kernel refuses it.
    pub async fn ensure_route(&self, route: &Route) -> Result<bool, NetlinkError> {
        let error = match self.add_route(route).await {
            Err(error) if error.errno() == Some(libc::EEXIST) => error,
            result => return result.map(|()| true),
        };
        let present = self.routes(Some(route.interface)).await?;
        if present.contains(route) {
            return Ok(false);
        }
        let key = |route: &Route| (route.destination, route.metric);
        match present.iter().any(|other| key(other) == key(route)) {
            true => self.replace_route(route).await.map(|()| true),
            false => Err(error),
        }
    }

    /// Adds a route.
    ///
    /// # Errors
    /// [`NetlinkError`] if the kernel refuses the route; EEXIST if another program has a route to
    /// the prefix.
    pub(crate) async fn add_route(&self, route: &Route) -> Result<(), NetlinkError> {
        let result = self.handle.route().add(route.message()?).execute().await;
        result.map_err(|error| {
            let error =
                NetlinkError::new(format_args!("add the route to {}", route.destination), error);
            match error.errno() {
                Some(libc::EEXIST) => NetlinkError {
                    what: format!(
                        "{}, because another program has one (ip route show {}): remove it or \
                         change the pod CIDR",
                        error.what, route.destination
                    ),
                    ..error
                },
                _ => error,
            }
        })
    }

    /// Replaces a route that differs in its MTU or source. A route to the prefix exists at any
    /// time.
    ///
    /// # Errors
    /// [`NetlinkError`] if the kernel refuses the route.
    pub(crate) async fn replace_route(&self, route: &Route) -> Result<(), NetlinkError> {
        let result = self.handle.route().add(route.message()?).replace().execute().await;
        result.map_err(|error| {
            NetlinkError::new(format_args!("change the route to {}", route.destination), error)
        })
    }

    /// Removes a route. A missing route is not an error.
    ///
    /// # Errors
    /// [`NetlinkError`] if the kernel refuses for another reason.
    pub(crate) async fn delete_route(&self, route: &Route) -> Result<(), NetlinkError> {
        let result = self.handle.route().del(route.message()?).execute().await;
        let result = result.map_err(|error| {
            NetlinkError::new(format_args!("remove the route to {}", route.destination), error)
        });
        match result {
            Err(error) if error.errno() == Some(libc::ESRCH) => Ok(()),
            result => result,
        }
    }
}
