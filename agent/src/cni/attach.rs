//! One pod's interface: made, checked, put right, taken away.
//!
//! What belongs to Skein is told by the name of the node's end, which follows from the attachment, and by its
//! alias, which says whose it is. So the kernel itself knows every attachment, whatever becomes of files.

use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};

use ipnet::IpNet;
use skein_cni_protocol::{Attached, AttachmentId, Interface, Ip};
use skein_netlink::link::{Link, LinkChange};
use skein_netlink::pod::{GATEWAY_MAC, Neighbour};
use skein_netlink::route::Route;
use skein_netlink::sysctl::Sysctl;
use skein_netlink::{Netlink, NetlinkError};
use skein_sys::netns::in_network_namespace;
use thiserror::Error;

use super::interface::{
    gateway, host_name, host_routes, mac_text, node_settings, pod_mac, pod_routes, pod_settings,
};

/// Why a pod was not attached.
#[derive(Debug, Error)]
pub(super) enum AttachError {
    /// The pod has an interface of that name.
    #[error("the container has an interface {0} already")]
    Exists(String),
    /// The pod has another way out: a default route by somebody else's interface, or by another of Skein's.
    #[error(
        "the container has a default route by another interface already: Skein's is to be its first network"
    )]
    DefaultRoute,
    /// The node's name for it belongs to somebody else.
    #[error(
        "interface {name} of the node belongs to another ({found}): delete it (ip link delete {name})"
    )]
    Foreign {
        /// The name.
        name: String,
        /// What is there.
        found: String,
    },
    /// The kernel refused.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// A setting could not be made.
    #[error("cannot prepare the pod's interface: {0}")]
    Settings(String),
}

/// An attachment that the kernel has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    /// Whose it is.
    pub(super) id: AttachmentId,
    /// Addresses, by their host routes.
    pub(super) addresses: Vec<IpAddr>,
}

/// Properties of the node that its pods' interfaces depend on.
#[derive(Debug, Clone, Copy)]
pub(super) struct NodeSide<'a> {
    /// MTU of pods in bytes.
    pub(super) mtu: u32,
    /// Addresses of the node in its pod CIDRs.
    pub(super) addresses: &'a [IpAddr],
}

/// What the kernel had of all pods at one moment.
#[derive(Debug, Default)]
pub(super) struct Kernel {
    links: Vec<Link>,
    routes: Vec<Route>,
    neighbours: Vec<Neighbour>,
}

/// What all pods of a node have in common.
#[derive(Debug, Clone)]
pub(super) struct Attacher {
    /// What every alias begins with: whose node it is.
    mark: String,
}

impl Attacher {
    /// For the node of that name.
    pub(super) fn new(node: &str) -> Self {
        Self { mark: format!("skein-pod:{node}:") }
    }

    fn alias(&self, id: &AttachmentId) -> String {
        format!("{}{}/{}", self.mark, id.container_id, id.ifname)
    }

    /// Whether the kernel can keep this attachment's mark: IFALIASZ (linux/if.h) is 256 with its terminator.
    pub(super) fn can_mark(&self, id: &AttachmentId) -> bool {
        self.alias(id).len() < 256
    }

    fn owner(&self, link: &Link) -> Option<AttachmentId> {
        let (container_id, ifname) = link.alias.strip_prefix(&self.mark)?.split_once('/')?;
        Some(AttachmentId { container_id: container_id.to_owned(), ifname: ifname.to_owned() })
    }

    /// Attaches a pod: an interface in `namespace` with these addresses, and the way to and from it.
    /// What is there already is put right. What a failure leaves is for [`Attacher::detach`].
    ///
    /// # Errors
    ///
    /// The pod has such an interface or another default route, the name of the node's end is in
    /// use, or the kernel refuses a request.
    pub(super) async fn attach(
        &self,
        netlink: &Netlink,
        namespace: BorrowedFd<'_>,
        id: &AttachmentId,
        addresses: &[IpAddr],
        node: &NodeSide<'_>,
    ) -> Result<Attached, AttachError> {
        let mtu = node.mtu;
        let pod = connect_in(namespace).await?;
        let name = host_name(id);
        let found = netlink.link(&name).await?;
        if let Some(found) = &found {
            self.check_owner(found, id)?;
        }
        let present = pod.link(&id.ifname).await?;
        let own = present.as_ref().map(|link| link.index);
        if pod.default_interfaces().await?.iter().any(|interface| Some(*interface) != own) {
            return Err(AttachError::DefaultRoute);
        }
        match (found, present) {
            // Both ends are there, perhaps made by an agent that was killed before it went on.
            (Some(_), Some(present)) if present.mac == pod_mac(id) => {}
            (_, Some(_)) => return Err(AttachError::Exists(id.ifname.clone())),
            (found, None) => {
                if let Some(found) = found {
                    // Its other end went to another namespace, or has another name now.
                    netlink.delete_link(found.index).await?;
                }
                netlink.add_veth(&name, (&id.ifname, &pod_mac(id)), namespace, mtu).await?;
            }
        }
        let host = missing(netlink.link(&name).await?, &name)?;
        let inner = missing(pod.link(&id.ifname).await?, &id.ifname)?;
        let up = |mtu_now: u32| LinkChange {
            mtu: (mtu_now != mtu).then_some(mtu),
            up: true,
            ..LinkChange::default()
        };
        // Before anything comes in: the kernel's own settings would believe a pod's router advertisements.
        let v6 = addresses.iter().any(IpAddr::is_ipv6);
        let (outside, inside) = (node_settings(&name, v6), pod_settings(&id.ifname));
        beside(namespace, move |namespace| {
            settings(&outside)?;
            if v6 {
                in_network_namespace(namespace, || settings(&inside))
                    .map_err(|error| AttachError::Settings(error.to_string()))??;
            }
            Ok(())
        })
        .await?;
        let marked = LinkChange {
            alias: Some(self.alias(id)),
            mac: (host.mac != GATEWAY_MAC).then_some(GATEWAY_MAC),
            ..up(host.mtu)
        };
        netlink.change_link(host.index, &marked).await?;
        pod.change_link(inner.index, &up(inner.mtu)).await?;
        for &ip in addresses {
            pod.add_address(inner.index, IpNet::from(ip)).await?;
            netlink.set_neighbour(host.index, ip, &pod_mac(id)).await?;
            for route in host_routes(host.index, ip, node.addresses) {
                ensure_host_route(netlink, &route).await?;
            }
        }
        for route in pod_routes(addresses) {
            pod.set_pod_route(inner.index, route.dst, route.gw).await?;
            if let Some(gateway) = route.gw {
                pod.set_neighbour(inner.index, gateway, &GATEWAY_MAC).await?;
            }
        }
        let ip = |&address: &IpAddr| Ip { address: address.into(), gateway: gateway(address) };
        Ok(Attached {
            host: Interface { name, mac: mac_text(&GATEWAY_MAC), mtu },
            container: Interface { name: id.ifname.clone(), mac: mac_text(&pod_mac(id)), mtu },
            ips: addresses.iter().map(ip).collect(),
            routes: pod_routes(addresses),
        })
    }

    /// Takes a pod's interface away; one that is not there is no error, and another's stays.
    pub(super) async fn detach(
        &self,
        netlink: &Netlink,
        id: &AttachmentId,
    ) -> Result<(), AttachError> {
        let name = host_name(id);
        let Some(found) = netlink.link(&name).await? else { return Ok(()) };
        self.check_owner(&found, id)?;
        Ok(Netlink::delete_link_beside(found.index).await?)
    }

    /// What of an attachment is not as it was made; nothing where all is well.
    pub(super) async fn check(
        &self,
        netlink: &Netlink,
        namespace: BorrowedFd<'_>,
        id: &AttachmentId,
        addresses: &[IpAddr],
    ) -> Result<Vec<String>, AttachError> {
        let mut problems = Vec::new();
        let name = host_name(id);
        let pod = connect_in(namespace).await?;
        match netlink.link(&name).await? {
            None => problems.push(format!("the node has no interface {name}")),
            Some(host) if host.alias != self.alias(id) => {
                problems.push(format!("interface {name} of the node is another's ({host})"));
            }
            Some(host) => {
                if !host.up {
                    problems.push(format!("interface {name} of the node is down"));
                }
                if host.mac != GATEWAY_MAC {
                    problems.push(format!(
                        "interface {name} of the node has the hardware address {}: {} is expected",
                        mac_text(&host.mac),
                        mac_text(&GATEWAY_MAC)
                    ));
                }
                let routes = netlink.routes(Some(host.index)).await?;
                for ip in addresses {
                    if !routes.iter().any(|route| route.destination == IpNet::from(*ip)) {
                        problems.push(format!("the node has no route to {ip} by {name}"));
                    }
                }
            }
        }
        let Some(inner) = pod.link(&id.ifname).await? else {
            problems.push(format!("the container has no interface {}", id.ifname));
            return Ok(problems);
        };
        if !inner.up {
            problems.push(format!("interface {} of the container is down", id.ifname));
        }
        if inner.mac != pod_mac(id) {
            let (name, mac) = (&id.ifname, mac_text(&pod_mac(id)));
            problems
                .push(format!("interface {name} of the container has another address than {mac}"));
        }
        let present = pod.addresses(Some(inner.index)).await?;
        for ip in addresses {
            if !present.iter().any(|address| address.net == IpNet::from(*ip)) {
                problems.push(format!("interface {} has lost the address {ip}", id.ifname));
            }
        }
        let neighbours = pod.permanent_neighbours().await?;
        let routes = pod.routes(Some(inner.index)).await?;
        for route in pod_routes(addresses) {
            let known = |ip: IpAddr| {
                let wanted = Neighbour { interface: inner.index, ip, mac: GATEWAY_MAC.to_vec() };
                neighbours.contains(&wanted)
            };
            if route.gw.is_some_and(|gateway| !known(gateway)) {
                problems.push(format!(
                    "the container has lost the neighbour of its route to {}",
                    route.dst
                ));
            }
            if !routes.iter().any(|present| present.destination == route.dst) {
                problems.push(format!("the container has lost its route to {}", route.dst));
            }
        }
        Ok(problems)
    }

    /// What the kernel has of all pods, by a few dumps however many there are.
    pub(super) async fn look(&self, netlink: &Netlink) -> Result<Kernel, NetlinkError> {
        Ok(Kernel {
            links: netlink.links().await?,
            routes: netlink.routes(None).await?,
            neighbours: netlink.permanent_neighbours().await?,
        })
    }

    /// Every attachment of this node that the kernel has.
    pub(super) fn found(&self, kernel: &Kernel) -> Vec<Found> {
        let found = |link: &Link| {
            let routes = kernel.routes.iter().filter(|route| route.interface == link.index);
            let mut addresses: Vec<IpAddr> = routes.map(|route| route.destination.addr()).collect();
            addresses.sort();
            // A pod's address may have two routes.
            addresses.dedup();
            Some(Found { id: self.owner(link)?, addresses })
        };
        kernel.links.iter().filter_map(found).collect()
    }

    /// Returns whether the node's end of an attachment exists, under its name or under one that
    /// another program gave it.
    pub(super) fn is_there(&self, kernel: &Kernel, id: &AttachmentId) -> bool {
        let name = host_name(id);
        kernel.links.iter().any(|link| link.name == name || self.owner(link).as_ref() == Some(id))
    }

    /// Repairs the node's end of an existing attachment: hardware address, link state, routes,
    /// neighbours, settings. The pod's end is left unchanged. Returns the changes, for messages.
    pub(super) async fn heal(
        &self,
        netlink: &Netlink,
        kernel: &Kernel,
        id: &AttachmentId,
        addresses: &[IpAddr],
        node_addresses: &[IpAddr],
    ) -> Result<Vec<String>, AttachError> {
        let name = host_name(id);
        let Some(link) = kernel.links.iter().find(|link| link.name == name) else {
            return Ok(Vec::new());
        };
        self.check_owner(link, id)?;
        let mut changes = Vec::new();
        // The pod sends to this address by a permanent neighbour entry, and the node drops all
        // other frames.
        if link.mac != GATEWAY_MAC {
            let change = LinkChange { mac: Some(GATEWAY_MAC), ..Default::default() };
            netlink.change_link(link.index, &change).await?;
            changes.push(format!("{name}: hardware address restored"));
        }
        if !link.up {
            netlink.change_link(link.index, &LinkChange { up: true, ..Default::default() }).await?;
            changes.push(format!("{name} is up again"));
        }
        for &ip in addresses {
            for route in host_routes(link.index, ip, node_addresses) {
                if !kernel.routes.contains(&route) && ensure_host_route(netlink, &route).await? {
                    changes.push(format!("route to {ip} restored"));
                }
            }
            let wanted = Neighbour { interface: link.index, ip, mac: pod_mac(id).to_vec() };
            if !kernel.neighbours.contains(&wanted) {
                netlink.set_neighbour(link.index, ip, &pod_mac(id)).await?;
                changes.push(format!("the neighbour {ip} is back"));
            }
        }
        let node = node_settings(&name, addresses.iter().any(IpAddr::is_ipv6));
        let changed = tokio::task::spawn_blocking(move || settings(&node)).await;
        let changed = changed.map_err(|error| AttachError::Settings(error.to_string()))??;
        changes.extend(changed.iter().map(|key| format!("{key} restored")));
        Ok(changes)
    }

    fn check_owner(&self, found: &Link, id: &AttachmentId) -> Result<(), AttachError> {
        let veth = found.kind.as_deref() == Some("veth");
        // Without an alias: made by an agent that ended before it could say so.
        if veth && (found.alias == self.alias(id) || found.alias.is_empty()) {
            return Ok(());
        }
        Err(AttachError::Foreign { name: found.name.clone(), found: found.to_string() })
    }
}

/// Adds one of the routes to a pod; returns whether a change was made. The kernel refuses a source
/// address that the node has lost. The next repair adds that route; until then the other route is
/// sufficient.
async fn ensure_host_route(netlink: &Netlink, route: &Route) -> Result<bool, NetlinkError> {
    match netlink.ensure_route(route).await {
        Err(error) if route.source.is_some() && error.is_invalid() => {
            tracing::debug!(%error, "route to pod not added: its source address is missing");
            Ok(false)
        }
        result => result,
    }
}

/// Does what blocks on a thread for such things, with the namespace at hand.
async fn beside<T: Send + 'static>(
    namespace: BorrowedFd<'_>,
    work: impl FnOnce(BorrowedFd<'_>) -> Result<T, AttachError> + Send + 'static,
) -> Result<T, AttachError> {
    let failed = |error: String| AttachError::Settings(error);
    let namespace = namespace.try_clone_to_owned().map_err(|error| failed(error.to_string()))?;
    let done = tokio::task::spawn_blocking(move || work(namespace.as_fd())).await;
    done.map_err(|error| failed(error.to_string()))?
}

async fn connect_in(namespace: BorrowedFd<'_>) -> Result<Netlink, AttachError> {
    beside(namespace, |namespace| Ok(Netlink::connect_in(namespace)?)).await
}

/// Writes the settings that differ and returns their keys.
fn settings(all: &[Sysctl]) -> Result<Vec<String>, AttachError> {
    let mut changed = Vec::new();
    for setting in all {
        match setting.ensure() {
            Err(error) if setting.required => return Err(AttachError::Settings(error.to_string())),
            Err(error) => tracing::debug!(%error, "a setting that is good to have"),
            Ok(true) => changed.push(setting.key.clone()),
            Ok(false) => {}
        }
    }
    Ok(changed)
}

fn missing(link: Option<Link>, name: &str) -> Result<Link, NetlinkError> {
    link.ok_or_else(|| NetlinkError {
        what: format!("find interface {name}"),
        source: std::io::ErrorKind::NotFound.into(),
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn an_alias_says_whose_it_is() {
        let id = AttachmentId { container_id: "c-1".into(), ifname: "eth0".into() };
        let ours = Attacher::new("node-a");
        let link = Link { alias: ours.alias(&id), ..Link::default() };
        assert_eq!(ours.owner(&link), Some(id.clone()));
        assert_eq!(Attacher::new("node-b").owner(&link), None);
        assert!(ours.can_mark(&id));
        assert!(!ours.can_mark(&AttachmentId { container_id: "x".repeat(300), ..id }));
    }
}
