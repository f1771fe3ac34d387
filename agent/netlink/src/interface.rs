//! The overlay's interface: creation, configuration and ownership. An interface of another program
//! or of another node is never changed.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use skein_core::wire::ip::MIN_IPV6_MTU;

use super::address::Address;
use super::advertisement::ForwardingError;
use super::connection::{Netlink, NetlinkError};
use super::error::InterfaceError;
use super::link::{Link, LinkChange};
use super::route::Route;
use super::staged::StagedInterface;
use super::sysctl::{Sysctl, SysctlError};

/// Prefix of the alias (IFLA_IFALIAS) of Skein's interfaces; the node's name follows.
pub const ALIAS_PREFIX: &str = "skein:";

/// Wanted state of the overlay's interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InterfaceSpec {
    /// Interface name.
    pub name: String,
    /// Alias that identifies the interface as this node's.
    pub alias: String,
    /// MTU in bytes.
    pub mtu: u32,
    /// Length of the transmit queue, packets.
    pub txqueuelen: u32,
    /// Overlay addresses of this node.
    pub addresses: Vec<IpAddr>,
    /// Pod prefixes of the other nodes.
    pub routes: Vec<IpNet>,
    /// Route MTUs in bytes that are smaller than the interface's MTU, by prefix. The kernel
    /// notifies the sender of a larger packet.
    pub mtus: BTreeMap<IpNet, u16>,
    /// True to enable IPv4 forwarding, and with `forwarding_ipv6` IPv6 forwarding.
    pub forwarding: bool,
    /// True if this node has IPv6 pod CIDRs. Pod CIDRs of other nodes do not count, because a node
    /// record must not enable forwarding on other nodes.
    pub forwarding_ipv6: bool,
}

/// The existing interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Present {
    /// Interface index.
    pub index: u32,
    /// True if [`InterfaceSpec::ensure_device`] has just created the interface.
    pub created: bool,
}

impl InterfaceSpec {
    /// Creates the device if it does not exist, with its alias and without other settings. If a
    /// device of this node has been renamed, it gets the interface's name back. If another device
    /// of this node already has that name, the renamed device is removed. `links` are all links of
    /// the node.
    ///
    /// # Errors
    /// [`InterfaceError`] if the name belongs to another owner, if the device cannot be created, or
    /// if the kernel refuses a request.
    pub async fn ensure_device(
        &self,
        netlink: &Netlink,
        links: &[Link],
    ) -> Result<Present, InterfaceError> {
        let staged = StagedInterface::new(&self.name, &self.alias);
        let found = links.iter().find(|link| link.name == self.name);
        if let Some(link) = found {
            self.check_owner(link.clone())?;
        }
        let mut index = found.map(|link| link.index);
        for link in self.renamed(links, &staged) {
            let was = &link.name;
            if index.is_some() {
                netlink.delete_link(link.index).await?;
                tracing::warn!(interface = self.name, was, "second interface of this node removed");
                continue;
            }
            self.rename_back(netlink, link).await?;
            tracing::warn!(interface = self.name, was, "interface was renamed: name restored");
            index = Some(link.index);
        }
        if let Some(index) = index {
            return Ok(Present { index, created: false });
        }
        staged.remove(netlink).await?;
        let index = staged.create(netlink, &self.name).await?;
        Ok(Present { index, created: true })
    }

    /// Returns the TUN devices of this node that have neither the name of the interface nor the
    /// name of the staged interface.
    fn renamed<'a>(
        &self,
        links: &'a [Link],
        staged: &StagedInterface,
    ) -> impl Iterator<Item = &'a Link> {
        links.iter().filter(|link| {
            let named = link.name == self.name || link.name == staged.name();
            link.is_tun_of(&self.alias) && !named
        })
    }

    async fn rename_back(&self, netlink: &Netlink, link: &Link) -> Result<(), NetlinkError> {
        let rename = LinkChange { name: Some(self.name.clone()), ..LinkChange::default() };
        match netlink.change_link(link.index, &rename).await {
            // Before Linux 6.2 only a device that is down can be renamed.
            Err(error) if error.errno() == Some(libc::EBUSY) => {
                let down = LinkChange { down: true, ..LinkChange::default() };
                netlink.change_link(link.index, &down).await?;
                netlink.change_link(link.index, &rename).await
            }
            result => result,
        }
    }

    fn check_owner(&self, found: Link) -> Result<(), InterfaceError> {
        let name = self.name.clone();
        match found.alias.strip_prefix(ALIAS_PREFIX) {
            Some(_) if found.kind.as_deref() != Some("tun") => {
                Err(InterfaceError::Foreign { name, found: Box::new(found) })
            }
            Some(_) if found.alias == self.alias => Ok(()),
            Some(node) => Err(InterfaceError::OtherNode { name, node: node.to_owned() }),
            None => Err(InterfaceError::Foreign { name, found: Box::new(found) }),
        }
    }

    /// Configures sysctls, the link, its addresses and its routes as wanted. `addresses` are all
    /// addresses of the node, listed after [`InterfaceSpec::ensure_device`]. Continues after an
    /// error; the report contains all errors and changes.
    pub async fn configure(
        &self,
        netlink: &Netlink,
        index: u32,
        addresses: &[Address],
    ) -> ReconcileReport {
        let mut outcome = ReconcileReport::default();
        if self.forwarding && self.forwarding_ipv6 {
            let forwarding = Sysctl::required("ipv6/conf/all/forwarding", "1");
            match netlink.ensure_ipv6_forwarding(&forwarding).await {
                Ok(changed) => outcome.note_sysctl(&forwarding, Ok(changed)),
                Err(ForwardingError::Sysctl(error)) => outcome.note_sysctl(&forwarding, Err(error)),
                Err(ForwardingError::Netlink(error)) => outcome.errors.push(error.to_string()),
            }
        }
        self.apply_sysctls(&mut outcome);
        if let Err(error) = self.apply_link(netlink, index, &mut outcome).await {
            outcome.errors.push(error.to_string());
        }
        if let Err(error) = self.apply_addresses(netlink, index, addresses, &mut outcome).await {
            outcome.errors.push(error.to_string());
        }
        if let Err(error) = self.apply_routes(netlink, index, &mut outcome).await {
            outcome.errors.push(error.to_string());
        }
        outcome
    }

    fn apply_sysctls(&self, outcome: &mut ReconcileReport) {
        for sysctl in self.sysctls() {
            outcome.note_sysctl(&sysctl, sysctl.ensure());
        }
    }

    fn has_ipv6(&self) -> bool {
        self.addresses.iter().any(IpAddr::is_ipv6)
            || self.routes.iter().any(|route| route.addr().is_ipv6())
    }

    fn sysctls(&self) -> Vec<Sysctl> {
        let name = &self.name;
        let v4 = |key: &str, value| Sysctl::required(format!("ipv4/conf/{name}/{key}"), value);
        let v6 = |key: &str| format!("ipv6/conf/{name}/{key}");
        // The kernel uses the maximum of this value and that of conf/all, so 2 (loose) overrides a
        // strict default.
        let mut sysctls = vec![v4("rp_filter", "2")];
        if self.has_ipv6() {
            sysctls.extend([
                Sysctl::required(v6("disable_ipv6"), "0"),
                // The link has no neighbours and no routers, so solicitation and automatic
                // configuration are useless.
                Sysctl::optional(v6("addr_gen_mode"), "1"),
                Sysctl::optional(v6("accept_dad"), "0"),
                Sysctl::optional(v6("accept_ra"), "0"),
                Sysctl::optional(v6("autoconf"), "0"),
                Sysctl::optional(v6("router_solicitations"), "0"),
            ]);
        }
        if self.forwarding {
            sysctls.extend([Sysctl::required("ipv4/ip_forward", "1"), v4("forwarding", "1")]);
            if self.forwarding_ipv6 {
                sysctls.push(Sysctl::required(v6("forwarding"), "1"));
            }
        }
        sysctls
    }

    async fn apply_link(
        &self,
        netlink: &Netlink,
        index: u32,
        outcome: &mut ReconcileReport,
    ) -> Result<(), NetlinkError> {
        let Some(link) = netlink.link(&self.name).await?.filter(|link| link.index == index) else {
            return Err(NetlinkError {
                what: format!("find interface {}", self.name),
                source: std::io::ErrorKind::NotFound.into(),
            });
        };
        let change = LinkChange {
            name: None,
            alias: None,
            mtu: (link.mtu != self.mtu).then_some(self.mtu),
            txqueuelen: (link.txqueuelen != self.txqueuelen).then_some(self.txqueuelen),
            mac: None,
            // The overlay carries no multicast, and the kernel would send group membership reports.
            no_multicast: link.multicast,
            up: !link.up,
            down: false,
        };
        if change != LinkChange::default() {
            netlink.change_link(index, &change).await?;
            outcome.changes.push(format!("{}: {change}", self.name));
        }
        Ok(())
    }

    async fn apply_addresses(
        &self,
        netlink: &Netlink,
        index: u32,
        addresses: &[Address],
        outcome: &mut ReconcileReport,
    ) -> Result<(), NetlinkError> {
        let present: Vec<_> = addresses.iter().filter(|address| address.index == index).collect();
        let wanted: Vec<IpNet> = self.addresses.iter().map(|ip| IpNet::from(*ip)).collect();
        for net in &wanted {
            if !present.iter().any(|address| address.net == *net) {
                netlink.add_address(index, *net).await?;
                outcome.changes.push(format!("address {net} added"));
            }
        }
        for address in present {
            if !address.link_local && !wanted.contains(&address.net) {
                netlink.delete_address(address).await?;
                outcome.changes.push(format!("address {} removed", address.net));
            }
        }
        Ok(())
    }

    async fn apply_routes(
        &self,
        netlink: &Netlink,
        index: u32,
        outcome: &mut ReconcileReport,
    ) -> Result<(), NetlinkError> {
        // Routes that differ only in their MTU are the same route.
        let by_mtu = |route: Route| (Route { mtu: None, ..route }, route.mtu);
        let present = netlink.routes(Some(index)).await?.into_iter().map(by_mtu);
        let present: BTreeMap<_, _> = present.collect();
        let wanted = self.routes.iter().map(|net| by_mtu(self.route(*net, index)));
        let wanted: BTreeMap<_, _> = wanted.collect();
        for (route, &mtu) in present.iter().filter(|(route, _)| !wanted.contains_key(route)) {
            netlink.delete_route(&Route { mtu, ..*route }).await?;
            outcome.changes.push(format!("route {} removed", route.destination));
        }
        for (route, &mtu) in &wanted {
            let route = &Route { mtu, ..*route };
            match present.get(&Route { mtu: None, ..*route }) {
                Some(found) if *found == mtu => continue,
                Some(_) => {
                    netlink.replace_route(route).await?;
                    let mtu = mtu.map_or("the interface's".to_owned(), |mtu| mtu.to_string());
                    outcome.changes.push(format!("route {}: mtu {mtu}", route.destination));
                    continue;
                }
                None => {}
            }
            // A prefix that another program has a route to must not prevent the other routes.
            match netlink.add_route(route).await {
                Ok(()) => outcome.changes.push(format!("route {} added", route.destination)),
                Err(error) if error.errno() == Some(libc::EEXIST) => {
                    let conflict =
                        RouteConflict { prefix: route.destination, problem: error.to_string() };
                    outcome.conflicts.push(conflict);
                }
                Err(error) => outcome.errors.push(error.to_string()),
            }
        }
        Ok(())
    }

    fn route(&self, destination: IpNet, interface: u32) -> Route {
        let family = |ip: &&IpAddr| ip.is_ipv4() == destination.addr().is_ipv4();
        let source = self.addresses.iter().find(family).copied();
        // The kernel refuses a smaller MTU for IPv6.
        let least = if destination.addr().is_ipv6() { MIN_IPV6_MTU } else { 0 };
        let mtu = self.mtus.get(&destination).map(|mtu| u32::from(*mtu.max(&least)));
        Route { destination, interface, source, mtu, metric: None }
    }
}

/// Result of a configuration pass.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ReconcileReport {
    /// Changes that were made.
    pub changes: Vec<String>,
    /// Errors, each with the operation that failed.
    pub errors: Vec<String>,
    /// Prefixes to which another program has a route.
    pub conflicts: Vec<RouteConflict>,
}

impl ReconcileReport {
    fn note_sysctl(&mut self, sysctl: &Sysctl, result: Result<bool, SysctlError>) {
        match result {
            Ok(true) => self.changes.push(format!("{} = {}", sysctl.key, sysctl.value)),
            Ok(false) => {}
            // A kernel without IPv6, or older than the setting, has no such file.
            Err(SysctlError { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) if sysctl.required => self.errors.push(error.to_string()),
            Err(error) => tracing::debug!(%error, "optional kernel setting not written"),
        }
    }
}

/// A peer's prefix to which another program has a route, so that the overlay does not carry traffic
/// to the prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteConflict {
    /// Destination of the route.
    pub prefix: IpNet,
    /// Error of the kernel.
    pub problem: String,
}

#[cfg(test)]
mod tests;
