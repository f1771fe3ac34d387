//! MTU of the underlay: the smallest MTU of the devices through which datagrams to the peers leave.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::route::{RouteMessage, RouteType};

use super::connection::{Netlink, NetlinkError};
use super::link::Link;
use super::pod::HOST_PREFIX;
use super::route::mtu;

/// MTU of Ethernet in bytes, assumed while no device leads to a peer.
pub const ETHERNET_MTU: u32 = 1500;

/// Addresses of the nodes that an underlay connects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Underlay {
    /// Listening addresses of this node; an unspecified address stands for all addresses of its
    /// family.
    pub addresses: Vec<IpAddr>,
    /// Endpoints of the peers.
    pub peers: BTreeSet<SocketAddr>,
    /// Endpoints of this node.
    pub own: BTreeSet<SocketAddr>,
    /// Name of the overlay's interface, which is never a device of the underlay.
    pub overlay: String,
}

/// MTU of an underlay, and the device that decides it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnderlayMtu {
    /// MTU in bytes.
    pub mtu: u32,
    /// Name of the device.
    pub interface: String,
}

/// A device through which datagrams to peers may leave.
#[derive(Debug, Clone, Copy)]
struct OutgoingDevice {
    /// Index of the device.
    index: u32,
    /// MTU of the route in bytes, if it has one of its own.
    mtu: Option<u32>,
    /// True for IPv6 datagrams.
    ipv6: bool,
}

impl Underlay {
    fn listens(&self, ip: IpAddr) -> bool {
        self.addresses.iter().any(|address| address.is_ipv4() == ip.is_ipv4())
    }

    /// Returns the source of datagrams to `ip`, if the configuration sets one.
    fn source(&self, ip: IpAddr) -> Option<IpAddr> {
        let mut addresses = self.addresses.iter().copied();
        addresses.find(|own| own.is_ipv4() == ip.is_ipv4() && !own.is_unspecified())
    }
}

impl Netlink {
    /// Returns the MTU of the underlay: the smallest MTU of the devices and routes that lead to the
    /// peers' endpoints. If no device leads to a peer, the devices with the listening addresses and
    /// with default routes count, or else those with this node's own endpoints. Every next hop of a
    /// multipath route counts. The overlay's interface and pods' interfaces never count. `None` if
    /// no device remains.
    ///
    /// # Errors
    /// [`NetlinkError`] if the kernel does not list its links, addresses or routes.
    pub async fn underlay_mtu(
        &self,
        underlay: &Underlay,
    ) -> Result<Option<UnderlayMtu>, NetlinkError> {
        let links = self.links().await?.into_iter();
        let links = links
            .filter(|link| link.name != underlay.overlay && !link.name.starts_with(HOST_PREFIX));
        let links: BTreeMap<_, _> = links.map(|link| (link.index, link)).collect();
        if let found @ Some(_) = narrowest(&links, &self.devices_to_peers(underlay).await?) {
            return Ok(found);
        }
        let mut devices = self.devices_of_default_routes(underlay).await?;
        let specified = underlay.addresses.iter().filter(|ip| !ip.is_unspecified()).copied();
        devices.extend(self.holders(&specified.collect()).await?);
        if let found @ Some(_) = narrowest(&links, &devices) {
            return Ok(found);
        }
        let own = underlay.own.iter().map(|endpoint| endpoint.ip().to_canonical());
        let devices = self.holders(&own.filter(|ip| underlay.listens(*ip)).collect()).await?;
        Ok(narrowest(&links, &devices))
    }

    async fn devices_to_peers(
        &self,
        underlay: &Underlay,
    ) -> Result<Vec<OutgoingDevice>, NetlinkError> {
        let mut devices = Vec::new();
        let mut looked_up = BTreeSet::new();
        for endpoint in &underlay.peers {
            let ip = endpoint.ip().to_canonical();
            if !underlay.listens(ip) {
                continue;
            }
            match endpoint {
                // The scope of a link-local address is the index of its device.
                SocketAddr::V6(v6) if v6.scope_id() != 0 => {
                    devices.push(OutgoingDevice { index: v6.scope_id(), mtu: None, ipv6: true });
                }
                _ if looked_up.insert(ip) => {
                    if let Some(route) = self.table_route(ip, underlay.source(ip)).await? {
                        devices.extend(self.devices_of_route(&route)?);
                    }
                }
                _ => {}
            }
        }
        Ok(devices)
    }

    async fn devices_of_default_routes(
        &self,
        underlay: &Underlay,
    ) -> Result<Vec<OutgoingDevice>, NetlinkError> {
        let unspecified = |ipv4| {
            let mut addresses = underlay.addresses.iter();
            addresses.any(|ip| ip.is_unspecified() && ip.is_ipv4() == ipv4)
        };
        let mut devices = Vec::new();
        for route in self.default_routes().await? {
            if unspecified(route.header.address_family == AddressFamily::Inet) {
                devices.extend(self.devices_of_route(&route)?);
            }
        }
        Ok(devices)
    }

    fn devices_of_route(&self, route: &RouteMessage) -> Result<Vec<OutgoingDevice>, NetlinkError> {
        if route.header.kind != RouteType::Unicast {
            return Ok(Vec::new());
        }
        let ipv6 = route.header.address_family == AddressFamily::Inet6;
        let outgoing = |index| OutgoingDevice { index, mtu: mtu(route), ipv6 };
        Ok(self.devices(route)?.into_iter().map(outgoing).collect())
    }

    /// Returns the devices that hold these addresses.
    async fn holders(
        &self,
        addresses: &BTreeSet<IpAddr>,
    ) -> Result<Vec<OutgoingDevice>, NetlinkError> {
        let held = self.addresses(None).await?.into_iter();
        let holders = held.filter(|held| addresses.contains(&held.net.addr()));
        let outgoing = |held: super::address::Address| OutgoingDevice {
            index: held.index,
            mtu: None,
            ipv6: held.net.addr().is_ipv6(),
        };
        Ok(holders.map(outgoing).collect())
    }

    /// Returns the indices of the interfaces of all default routes in the main table, including
    /// routes of other programs. An interface that cannot be determined is 0.
    ///
    /// # Errors
    /// [`NetlinkError`] if the kernel does not list its routes.
    pub async fn default_interfaces(&self) -> Result<Vec<u32>, NetlinkError> {
        let mut interfaces = Vec::new();
        for route in self.default_routes().await? {
            // Nexthop objects are looked up in the namespace of the thread, which may differ from
            // that of the netlink socket.
            let devices = super::next_hop::named_devices(&route);
            interfaces.extend(if devices.is_empty() { vec![0] } else { devices });
        }
        Ok(interfaces)
    }
}

/// Returns the smallest MTU of the `devices` that are in `links`, with the name of the device.
fn narrowest(links: &BTreeMap<u32, Link>, devices: &[OutgoingDevice]) -> Option<UnderlayMtu> {
    let found = devices.iter().filter_map(|device| {
        let link = links.get(&device.index)?;
        let limits = [device.mtu, link.ipv6_mtu.filter(|_| device.ipv6)];
        let mtu = limits.into_iter().flatten().fold(link.mtu, u32::min);
        Some(UnderlayMtu { mtu, interface: link.name.clone() })
    });
    found.min_by(|a, b| (a.mtu, &a.interface).cmp(&(b.mtu, &b.interface)))
}

#[cfg(test)]
mod tests;
