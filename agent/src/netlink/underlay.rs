//! The MTU of the underlay.

use std::net::IpAddr;

use futures_util::TryStreamExt;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::route::{RouteAttribute, RouteHeader, RouteMessage};

use super::link::Link;
use super::{Netlink, NetlinkError};

/// What Ethernet carries, where nothing better is known.
const ETHERNET_MTU: u32 = 1500;

impl Netlink {
    /// The smallest MTU, in bytes, of the interfaces that hold `addresses`; for an unspecified
    /// address, of those with a default route, or else of every interface that is up. `except` is
    /// the overlay's own interface.
    pub async fn underlay_mtu(
        &self,
        addresses: &[IpAddr],
        except: &str,
    ) -> Result<u32, NetlinkError> {
        let links: Vec<_> =
            self.links().await?.into_iter().filter(|link| link.name != except).collect();
        let held = self.addresses(None).await?;
        let mut indices = Vec::new();
        for address in addresses {
            if address.is_unspecified() {
                indices.extend(self.default_route_interfaces(*address).await?);
            } else {
                let holders = held.iter().filter(|held| held.net.addr() == *address);
                indices.extend(holders.map(|held| held.index));
            }
        }
        let smallest = |wanted: &dyn Fn(&Link) -> bool| {
            links.iter().filter(|link| wanted(link)).map(|link| link.mtu).min()
        };
        Ok(smallest(&|link| indices.contains(&link.index))
            .or_else(|| smallest(&|link| link.up && !link.loopback))
            .unwrap_or(ETHERNET_MTU))
    }

    async fn default_route_interfaces(&self, family: IpAddr) -> Result<Vec<u32>, NetlinkError> {
        let mut filter = RouteMessage::default();
        filter.header.address_family = match family {
            IpAddr::V4(_) => AddressFamily::Inet,
            IpAddr::V6(_) => AddressFamily::Inet6,
        };
        filter.header.table = RouteHeader::RT_TABLE_MAIN;
        let routes = self.handle.route().get(filter).execute().try_collect::<Vec<_>>().await;
        let routes = routes.map_err(|error| NetlinkError::new("list routes", error))?;
        let default = routes.iter().filter(|route| route.header.destination_prefix_length == 0);
        let attributes = default.flat_map(|route| &route.attributes);
        Ok(attributes
            .filter_map(|attribute| match attribute {
                RouteAttribute::Oif(index) => Some(*index),
                _ => None,
            })
            .collect())
    }
}
