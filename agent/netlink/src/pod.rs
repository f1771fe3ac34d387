//! Link of a pod: a veth pair with one end on the node and the other in the pod's network
//! namespace, with its neighbours and routes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, BorrowedFd};

use futures_util::TryStreamExt;
use ipnet::IpNet;
use rtnetlink::packet_route::link::{InfoData, InfoVeth, LinkAttribute};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::route::{RouteProtocol, RouteScope};
use rtnetlink::{LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder};
use skein_sys::netns::in_network_namespace;

use super::connection::{Netlink, NetlinkError};
use super::route::PROTOCOL;

/// Prefix of the name of every pod's interface on the node.
pub const HOST_PREFIX: &str = "skp";

/// Gateway of every pod. The address is link-local (RFC 3927), so it uses no address of the
/// cluster, and pods have a permanent neighbour entry for it.
pub const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
/// IPv6 gateway of every pod.
pub const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
/// Hardware address of the node's end of every pod's link: locally administered, and the same
/// everywhere, because a veth pair has only two ends.
pub const GATEWAY_MAC: [u8; 6] = [0xee; 6];

/// Neighbour entry of a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbour {
    /// Index of the link.
    pub interface: u32,
    /// Address of the neighbour.
    pub ip: IpAddr,
    /// Hardware address of the neighbour.
    pub mac: Vec<u8>,
}

/// The end of a veth pair in the pod's network namespace.
#[derive(Debug, Clone, Copy)]
pub struct PodEnd<'a> {
    /// Name of the interface in the pod.
    pub name: &'a str,
    /// Hardware address.
    pub mac: &'a [u8; 6],
    /// Network namespace of the pod.
    pub namespace: BorrowedFd<'a>,
}

impl Netlink {
    /// Connects to rtnetlink in another network namespace.
    ///
    /// # Errors
    /// [`NetlinkError`] if the thread cannot enter the namespace, or if the socket cannot be
    /// created.
    pub fn connect_in(namespace: BorrowedFd<'_>) -> Result<Self, NetlinkError> {
        let runtime = tokio::runtime::Handle::current();
        let connect = || {
            // The socket belongs to the pod's namespace, but the task of the connection runs on
            // this runtime.
            let _entered = runtime.enter();
            Netlink::connect()
        };
        in_network_namespace(namespace, connect).map_err(|source| NetlinkError {
            what: "enter the pod's network namespace".to_owned(),
            source,
        })?
    }

    /// Creates a veth pair, both ends down: `host` in the network namespace of this connection, and
    /// `pod`. `mtu` is in bytes.
    ///
    /// # Errors
    /// [`NetlinkError`] if the kernel refuses the pair, for example because a name is in use.
    pub async fn add_veth(
        &self,
        host: &str,
        pod: PodEnd<'_>,
        mtu: u32,
    ) -> Result<(), NetlinkError> {
        let PodEnd { name: container, mac, namespace } = pod;
        let mut peer = LinkMessageBuilder::<LinkUnspec>::default()
            .name(container.to_owned())
            .mtu(mtu)
            .address(mac.to_vec())
            .build();
        peer.attributes.push(LinkAttribute::NetNsFd(namespace.as_raw_fd()));
        let message = LinkMessageBuilder::<LinkVeth>::new(host, container)
            .mtu(mtu)
            .address(GATEWAY_MAC.to_vec())
            .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
            .build();
        let result = self.handle.link().add(message).execute().await;
        result.map_err(|error| {
            NetlinkError::new(format_args!("create the veth pair {host} and {container}"), error)
        })
    }

    /// Deletes a link from a thread of its own. A missing link is not an error.
    ///
    /// The kernel answers a deletion after an RCU grace period, 20 ms or more, and handles no other
    /// request of the socket meanwhile. With several threads the waits overlap.
    ///
    /// # Errors
    /// [`NetlinkError`] if the kernel refuses the deletion, or if the connection cannot be created.
    pub async fn delete_link_on_thread(index: u32) -> Result<(), NetlinkError> {
        let delete = move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build();
            let runtime = runtime.map_err(|source| NetlinkError {
                what: format!("delete interface {index}"),
                source,
            })?;
            runtime.block_on(async { Netlink::connect()?.delete_link(index).await })
        };
        tokio::task::spawn_blocking(delete).await.map_err(|error| NetlinkError {
            what: format!("delete interface {index}"),
            source: std::io::Error::other(error),
        })?
    }

    /// Sets the permanent neighbour `ip` of a link.
    ///
    /// # Errors
    /// [`NetlinkError`] if the kernel refuses the entry.
    pub async fn set_neighbour(
        &self,
        index: u32,
        ip: IpAddr,
        mac: &[u8],
    ) -> Result<(), NetlinkError> {
        let request = self
            .handle
            .neighbours()
            .add(index, ip)
            .link_layer_address(mac)
            .state(NeighbourState::Permanent)
            .replace();
        let result = request.execute().await;
        result.map_err(|error| NetlinkError::new(format_args!("set the neighbour {ip}"), error))
    }

    /// Returns the permanent neighbours of all links.
    ///
    /// # Errors
    /// [`NetlinkError`] if the kernel refuses the dump.
    pub async fn permanent_neighbours(&self) -> Result<Vec<Neighbour>, NetlinkError> {
        let _dump = self.dump.lock().await;
        let messages = self.handle.neighbours().get().execute().try_collect::<Vec<_>>().await;
        let messages = messages.map_err(|error| NetlinkError::new("list neighbours", error))?;
        let parse = |message: NeighbourMessage| {
            let permanent = message.header.state == NeighbourState::Permanent;
            let (mut ip, mut mac) = (None, None);
            for attribute in message.attributes {
                match attribute {
                    NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => {
                        ip = Some(IpAddr::V4(v4));
                    }
                    NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => {
                        ip = Some(IpAddr::V6(v6));
                    }
                    NeighbourAttribute::LinkLayerAddress(address) => mac = Some(address),
                    _ => {}
                }
            }
            let interface = message.header.ifindex;
            permanent.then_some(Neighbour { interface, ip: ip?, mac: mac?.to_vec() })
        };
        Ok(messages.into_iter().filter_map(parse).collect())
    }

    /// Sets a route of a pod to `destination`, on the link or by `gateway`.
    ///
    /// # Errors
    /// [`NetlinkError`] if the kernel refuses the route.
    pub async fn set_pod_route(
        &self,
        index: u32,
        destination: IpNet,
        gateway: Option<IpAddr>,
    ) -> Result<(), NetlinkError> {
        let what = format!("set the pod's route to {destination}");
        let wrong = |error: String| NetlinkError {
            what: what.clone(),
            source: std::io::Error::other(error),
        };
        let mut message = RouteMessageBuilder::<IpAddr>::new()
            .destination_prefix(destination.network(), destination.prefix_len())
            .map_err(|error| wrong(error.to_string()))?
            .output_interface(index)
            .protocol(RouteProtocol::Other(PROTOCOL));
        if let Some(gateway) = gateway {
            message = message.gateway(gateway).map_err(|error| wrong(error.to_string()))?;
        } else if destination.addr().is_ipv4() {
            message = message.scope(RouteScope::Link);
        }
        let result = self.handle.route().add(message.build()).replace().execute().await;
        result.map_err(|error| NetlinkError::new(&what, error))
    }
}
