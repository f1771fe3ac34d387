//! The veth pair of one attachment: creation, check, repair and removal.
//!
//! The name of the node's end follows from the attachment, and its alias names the node, the
//! container and the interface. The agent can therefore list its attachments from the kernel alone,
//! also after its files are lost.

use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};

use ipnet::IpNet;
use skein_cni_protocol::{Attached, AttachmentId, Interface, Ip};
use skein_netlink::link::{Link, LinkChange};
use skein_netlink::pod::{GATEWAY_MAC, Neighbour, PodEnd};
use skein_netlink::route::Route;
use skein_netlink::sysctl::Sysctl;
use skein_netlink::{Netlink, NetlinkError};
use skein_sys::netns::in_network_namespace;
use thiserror::Error;

use super::interface::{
    gateway, host_name, host_routes, mac_text, node_settings, pod_mac, pod_routes, pod_settings,
};

/// Failure to attach, detach, check or repair a pod's interface.
#[derive(Debug, Error)]
pub(super) enum AttachError {
    /// The pod has an interface of that name.
    #[error(
        "the container already has an interface {0}. Delete it, or choose another interface name."
    )]
    Exists(String),
    /// The pod has a default route through another interface.
    #[error(
        "the container already has a default route through another interface. Configure Skein as \
         the first network of the pod."
    )]
    DefaultRoute,
    /// The name of the node's end belongs to an interface of another owner.
    #[error(
        "interface {name} of the node belongs to another owner ({found}). Delete it: ip link delete \
         {name}"
    )]
    Foreign {
        /// Name of the interface.
        name: String,
        /// Kind and alias of the interface, for the message.
        found: String,
    },
    /// The kernel refused a netlink request.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// A required sysctl could not be written, or the namespace could not be entered.
    #[error("cannot prepare the pod's interface: {0}")]
    Settings(String),
}

/// An attachment of this node, as the kernel shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct FoundAttachment {
    /// Container and interface, from the alias.
    pub(super) id: AttachmentId,
    /// Pod addresses, from the host routes through the interface, sorted.
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

/// Links, routes and permanent neighbours of the node at one moment.
#[derive(Debug, Default)]
pub(super) struct KernelSnapshot {
    links: Vec<Link>,
    routes: Vec<Route>,
    neighbours: Vec<Neighbour>,
}

/// Creates, checks, repairs and removes the interfaces of a node's pods.
#[derive(Debug, Clone)]
pub(super) struct Attacher {
    /// First part of the alias of every interface: `skein-pod:`, the node's name, and a colon.
    alias_prefix: String,
}

impl Attacher {
    /// Returns the attacher of the node `node`.
    pub(super) fn new(node: &str) -> Self {
        Self { alias_prefix: format!("skein-pod:{node}:") }
    }

    fn alias(&self, id: &AttachmentId) -> String {
        format!("{}{}/{}", self.alias_prefix, id.container_id, id.ifname)
    }

    /// Returns whether the alias of an attachment fits into the kernel's limit: IFALIASZ
    /// (linux/if.h) is 256 bytes with the terminator.
    pub(super) fn alias_fits(&self, id: &AttachmentId) -> bool {
        self.alias(id).len() < 256
    }

    fn owner(&self, link: &Link) -> Option<AttachmentId> {
        let (container_id, ifname) =
            link.alias.strip_prefix(&self.alias_prefix)?.split_once('/')?;
        Some(AttachmentId { container_id: container_id.to_owned(), ifname: ifname.to_owned() })
    }

    /// Attaches a pod: creates the veth pair, and configures addresses, routes, neighbours and
    /// sysctls of both ends. An incomplete attachment is completed. Parts of a new attachment may
    /// remain after an error; the caller removes them with [`Attacher::detach`].
    ///
    /// # Errors
    /// [`AttachError::Exists`] or [`AttachError::DefaultRoute`] if the pod has such an interface or
    /// another default route; nothing is changed in that case. [`AttachError::Foreign`] if the name
    /// of the node's end is in use. Otherwise the kernel has refused a request or a sysctl.
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
            // Both ends exist: an earlier request was complete, or an agent was killed during it.
            (Some(_), Some(present)) if present.mac == pod_mac(id) => {}
            (_, Some(_)) => return Err(AttachError::Exists(id.ifname.clone())),
            (found, None) => {
                if let Some(found) = found {
                    // The other end was moved to another namespace or renamed.
                    netlink.delete_link(found.index).await?;
                }
                let end = PodEnd { name: &id.ifname, mac: &pod_mac(id), namespace };
                netlink.add_veth(&name, end, mtu).await?;
            }
        }
        let host = missing(netlink.link(&name).await?, &name)?;
        let inner = missing(pod.link(&id.ifname).await?, &id.ifname)?;
        let up = |mtu_now: u32| LinkChange {
            mtu: (mtu_now != mtu).then_some(mtu),
            up: true,
            ..LinkChange::default()
        };
        // Set while the interfaces are down: with the kernel's defaults the node would accept
        // router advertisements of a pod.
        let v6 = addresses.iter().any(IpAddr::is_ipv6);
        let (outside, inside) = (node_settings(&name, v6), pod_settings(&id.ifname));
        run_blocking(namespace, move |namespace| {
            ensure_settings(&outside)?;
            if v6 {
                in_network_namespace(namespace, || ensure_settings(&inside))
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

    /// Deletes the interface of a pod, if it exists.
    ///
    /// # Errors
    /// [`AttachError::Foreign`] if the interface belongs to another owner, which is not deleted.
    /// [`AttachError::Netlink`] if the kernel refuses a request.
    pub(super) async fn detach(
        &self,
        netlink: &Netlink,
        id: &AttachmentId,
    ) -> Result<(), AttachError> {
        let name = host_name(id);
        let Some(found) = netlink.link(&name).await? else { return Ok(()) };
        self.check_owner(&found, id)?;
        Ok(Netlink::delete_link_on_thread(found.index).await?)
    }

    /// Returns the differences between an attachment and its desired state, one text each; empty if
    /// they are equal.
    ///
    /// # Errors
    /// [`AttachError`] if the namespace cannot be entered or the kernel refuses a request.
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
                problems.push(format!("interface {name} of the node has another owner ({host})"));
            }
            Some(host) => {
                if !host.up {
                    problems.push(format!("interface {name} of the node is down"));
                }
                if host.mac != GATEWAY_MAC {
                    problems.push(format!(
                        "interface {name} of the node has the hardware address {}, expected {}",
                        mac_text(&host.mac),
                        mac_text(&GATEWAY_MAC)
                    ));
                }
                let routes = netlink.routes(Some(host.index)).await?;
                for ip in addresses {
                    if !routes.iter().any(|route| route.destination == IpNet::from(*ip)) {
                        problems.push(format!("the node has no route to {ip} through {name}"));
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
            let found = mac_text(&inner.mac);
            problems.push(format!(
                "interface {name} of the container has the hardware address {found}, expected {mac}"
            ));
        }
        let present = pod.addresses(Some(inner.index)).await?;
        for ip in addresses {
            if !present.iter().any(|address| address.net == IpNet::from(*ip)) {
                problems
                    .push(format!("interface {} of the container has no address {ip}", id.ifname));
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
                    "the container has no neighbour entry for the gateway of its route to {}",
                    route.dst
                ));
            }
            if !routes.iter().any(|present| present.destination == route.dst) {
                problems.push(format!("the container has no route to {}", route.dst));
            }
        }
        Ok(problems)
    }

    /// Reads links, routes and neighbours of the node with three dumps.
    ///
    /// # Errors
    /// [`NetlinkError`] if the kernel refuses a dump.
    pub(super) async fn read_kernel(
        &self,
        netlink: &Netlink,
    ) -> Result<KernelSnapshot, NetlinkError> {
        Ok(KernelSnapshot {
            links: netlink.links().await?,
            routes: netlink.routes(None).await?,
            neighbours: netlink.permanent_neighbours().await?,
        })
    }

    /// Returns every attachment of this node in `kernel`.
    pub(super) fn attachments(&self, kernel: &KernelSnapshot) -> Vec<FoundAttachment> {
        let found = |link: &Link| {
            let routes = kernel.routes.iter().filter(|route| route.interface == link.index);
            let mut addresses: Vec<IpAddr> = routes.map(|route| route.destination.addr()).collect();
            addresses.sort();
            // A pod's address has two routes if the node has an address in its pod CIDRs.
            addresses.dedup();
            Some(FoundAttachment { id: self.owner(link)?, addresses })
        };
        kernel.links.iter().filter_map(found).collect()
    }

    /// Returns whether the node's end of an attachment exists, under its name or under one that
    /// another program gave it.
    pub(super) fn has_host_interface(&self, kernel: &KernelSnapshot, id: &AttachmentId) -> bool {
        let name = host_name(id);
        kernel.links.iter().any(|link| link.name == name || self.owner(link).as_ref() == Some(id))
    }

    /// Repairs the node's end of an existing attachment: hardware address, link state, routes,
    /// neighbours, sysctls. The pod's end is left unchanged. Returns the changes, for messages.
    ///
    /// # Errors
    /// [`AttachError::Foreign`] if the interface belongs to another owner. Otherwise the kernel has
    /// refused a request or a sysctl.
    pub(super) async fn repair(
        &self,
        netlink: &Netlink,
        kernel: &KernelSnapshot,
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
            changes.push(format!("{name} set up"));
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
                changes.push(format!("neighbour {ip} restored"));
            }
        }
        let node = node_settings(&name, addresses.iter().any(IpAddr::is_ipv6));
        let changed = tokio::task::spawn_blocking(move || ensure_settings(&node)).await;
        let changed = changed.map_err(|error| AttachError::Settings(error.to_string()))??;
        changes.extend(changed.iter().map(|key| format!("{key} restored")));
        Ok(changes)
    }

    fn check_owner(&self, found: &Link, id: &AttachmentId) -> Result<(), AttachError> {
        let veth = found.kind.as_deref() == Some("veth");
        // No alias: the agent that created the interface ended before it set the alias.
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

/// Runs `work` with a copy of the namespace's descriptor on a thread that may block.
async fn run_blocking<T: Send + 'static>(
    namespace: BorrowedFd<'_>,
    work: impl FnOnce(BorrowedFd<'_>) -> Result<T, AttachError> + Send + 'static,
) -> Result<T, AttachError> {
    let failed = |error: String| AttachError::Settings(error);
    let namespace = namespace.try_clone_to_owned().map_err(|error| failed(error.to_string()))?;
    let done = tokio::task::spawn_blocking(move || work(namespace.as_fd())).await;
    done.map_err(|error| failed(error.to_string()))?
}

async fn connect_in(namespace: BorrowedFd<'_>) -> Result<Netlink, AttachError> {
    run_blocking(namespace, |namespace| Ok(Netlink::connect_in(namespace)?)).await
}

/// Writes the sysctls that differ and returns their keys. A failure of one that is not required is
/// logged.
fn ensure_settings(all: &[Sysctl]) -> Result<Vec<String>, AttachError> {
    let mut changed = Vec::new();
    for setting in all {
        match setting.ensure() {
            Err(error) if setting.required => return Err(AttachError::Settings(error.to_string())),
            Err(error) => tracing::debug!(%error, "optional sysctl not set"),
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
    fn alias_names_node_container_and_interface() {
        let id = AttachmentId { container_id: "c-1".into(), ifname: "eth0".into() };
        let ours = Attacher::new("node-a");
        let link = Link { alias: ours.alias(&id), ..Link::default() };
        assert_eq!(ours.owner(&link), Some(id.clone()));
        assert_eq!(Attacher::new("node-b").owner(&link), None);
        assert!(ours.alias_fits(&id));
        assert!(!ours.alias_fits(&AttachmentId { container_id: "x".repeat(300), ..id }));
    }
}
