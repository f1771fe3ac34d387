//! Router advertisements (RFC 4861): which interfaces depend on them, and the kernel's setting
//! `accept_ra`.
//!
//! A kernel that forwards accepts router advertisements only on interfaces whose `accept_ra` is 2,
//! and ignores them if the value is 1. Skein sets 2 only on interfaces with a learned route: on any
//! other interface, a host such as a container behind a bridge could give this node a default
//! route.

use std::collections::BTreeSet;
use std::io;

use futures_util::TryStreamExt;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::route::{RouteMessage, RouteProtocol};

use super::connection::{Netlink, NetlinkError};
use super::next_hop::named_devices;
use super::sysctl::{Sysctl, SysctlError};

/// Directories below `ipv6/conf` that belong to the network namespace and to no interface.
const COMMON: [&str; 2] = ["all", "default"];

impl Netlink {
    /// Returns the names of the interfaces that have a route learned from a router advertisement.
    ///
    /// # Errors
    /// [`NetlinkError`] if the routes or links cannot be listed.
    async fn advertised_interfaces(&self) -> Result<BTreeSet<String>, NetlinkError> {
        let mut filter = RouteMessage::default();
        filter.header.address_family = AddressFamily::Inet6;
        filter.header.protocol = RouteProtocol::Ra;
        let routes: Vec<RouteMessage> = {
            let _dump = self.dump.lock().await;
            let routes = self.handle.route().get(filter).execute().try_collect().await;
            routes.map_err(|error| NetlinkError::new("list routes", error))?
        };
        // Kernels without strict checking ignore the filter.
        let learned = routes.iter().filter(|route| route.header.protocol == RouteProtocol::Ra);
        let indices: BTreeSet<u32> = learned.flat_map(named_devices).collect();
        let links = self.links().await?.into_iter();
        Ok(links.filter(|link| indices.contains(&link.index)).map(|link| link.name).collect())
    }

    /// Writes `forwarding`, the setting that enables IPv6 forwarding for the whole namespace, and
    /// returns whether it was off. Interfaces with a route learned from a router advertisement keep
    /// the route: their `accept_ra` becomes 2 if it was 1.
    ///
    /// # Errors
    /// [`ForwardingError`] if the learned routes are not known, or if the kernel refuses a setting.
    /// Forwarding stays off if a learned route would be lost.
    pub(super) async fn ensure_ipv6_forwarding(
        &self,
        forwarding: &Sysctl,
    ) -> Result<bool, ForwardingError> {
        if is_forwarding() == Some(false) {
            for interface in self.advertised_interfaces().await? {
                change_accept_ra(&interface, "1", "2")?;
            }
        }
        Ok(forwarding.ensure()?)
    }

    /// Restores the settings that earlier versions changed: `accept_ra` of `all`, `default` and the
    /// interfaces without a route learned from a router advertisement becomes 1 if it is 2. Returns
    /// the names of which `accept_ra` was changed. Does nothing if the kernel does not forward
    /// IPv6, because the earlier version changed the settings when it switched forwarding on.
    ///
    /// # Errors
    /// [`ForwardingError`] if the learned routes are not known, or if the kernel refuses a setting.
    pub async fn restore_accept_ra(&self) -> Result<Vec<String>, ForwardingError> {
        if is_forwarding() != Some(true) {
            return Ok(Vec::new());
        }
        let learned = self.advertised_interfaces().await?;
        let links = self.links().await?.into_iter().map(|link| link.name);
        let names = COMMON.map(str::to_owned).into_iter();
        let names = names.chain(links.filter(|name| !learned.contains(name)));
        let mut changed = Vec::new();
        for name in names {
            if change_accept_ra(&name, "2", "1")? {
                changed.push(name);
            }
        }
        Ok(changed)
    }
}

/// Returns whether the kernel forwards IPv6; `None` without IPv6.
fn is_forwarding() -> Option<bool> {
    Sysctl::read("ipv6/conf/all/forwarding").map(|value| value != "0")
}

/// Sets `accept_ra` of an interface to `to` if the value is `from`. Returns whether the value was
/// changed. An interface that is gone or has no IPv6 is not an error.
fn change_accept_ra(interface: &str, from: &str, to: &'static str) -> Result<bool, SysctlError> {
    let key = format!("ipv6/conf/{interface}/accept_ra");
    if Sysctl::read(&key).as_deref() != Some(from) {
        return Ok(false);
    }
    match Sysctl::required(key, to).ensure() {
        Err(SysctlError { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(false),
        result => result,
    }
}

/// Error of a change of IPv6 forwarding or of `accept_ra`.
#[derive(Debug, thiserror::Error)]
pub enum ForwardingError {
    /// The routes or links cannot be listed.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// The kernel refuses a setting.
    #[error(transparent)]
    Sysctl(#[from] SysctlError),
}

#[cfg(test)]
mod tests;
