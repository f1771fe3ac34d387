//! Names, addresses, routes and settings of a pod's interface, as pure functions of its attachment.

use std::fmt::Write as _;
use std::net::IpAddr;

use aws_lc_rs::digest;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use skein_cni_protocol::{AttachmentId, Route as PodRoute};
use skein_netlink::pod::{GATEWAY_V4, GATEWAY_V6, HOST_PREFIX};
use skein_netlink::route::Route;
use skein_netlink::sysctl::Sysctl;

/// Metric of the routes to pods that have no source address, worse than the defaults of both
/// address families.
const FALLBACK_METRIC: u32 = 2048;

/// Returns the name of the node's end: [`HOST_PREFIX`] and 44 bits of a hash of the attachment,
/// 14 characters in all.
pub(super) fn host_name(id: &AttachmentId) -> String {
    let mut name = HOST_PREFIX.to_owned();
    for byte in &hash(id)[..6] {
        let _ = write!(name, "{byte:02x}");
    }
    name.truncate(14);
    name
}

/// Returns the hardware address of the pod's end: locally administered, from a hash of the
/// attachment, so that the node knows it without a request to the pod.
pub(super) fn pod_mac(id: &AttachmentId) -> [u8; 6] {
    let hash = hash(id);
    [0x02, hash[6], hash[7], hash[8], hash[9], hash[10]]
}

fn hash(id: &AttachmentId) -> Vec<u8> {
    let whole = format!("{}/{}", id.container_id, id.ifname);
    digest::digest(&digest::SHA256, whole.as_bytes()).as_ref().to_vec()
}

/// Returns the routes to a pod's address through its interface. The first route makes the node's
/// programs send from the node's address in its pod CIDRs, and not from an address of the loopback
/// interface. The kernel removes an IPv4 route together with its source address; the second route,
/// with a worse metric, keeps the pod reachable.
pub(super) fn host_routes(interface: u32, ip: IpAddr, node_addresses: &[IpAddr]) -> Vec<Route> {
    let plain = Route { destination: ip.into(), interface, source: None, mtu: None, metric: None };
    let source = node_addresses.iter().find(|address| address.is_ipv4() == ip.is_ipv4());
    match source {
        Some(source) => vec![
            Route { metric: Some(FALLBACK_METRIC), ..plain },
            Route { source: Some(*source), ..plain },
        ],
        None => vec![plain],
    }
}

pub(super) fn gateway(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(_) => GATEWAY_V4.into(),
        IpAddr::V6(_) => GATEWAY_V6.into(),
    }
}

/// Returns the routes of a pod: for each address family a default route through the gateway. The
/// IPv4 gateway gets a route of its own, because it is in no prefix of the interface.
pub(super) fn pod_routes(addresses: &[IpAddr]) -> Vec<PodRoute> {
    let mut routes = Vec::new();
    if addresses.iter().any(IpAddr::is_ipv4) {
        routes.push(PodRoute { dst: IpNet::from(IpAddr::V4(GATEWAY_V4)), gw: None });
        routes.push(PodRoute { dst: Ipv4Net::default().into(), gw: Some(GATEWAY_V4.into()) });
    }
    if addresses.iter().any(IpAddr::is_ipv6) {
        routes.push(PodRoute { dst: Ipv6Net::default().into(), gw: Some(GATEWAY_V6.into()) });
    }
    routes
}

/// Returns the sysctls of the node's end. The reverse path filter is off, because the firewall
/// checks and counts sources; automatic configuration is off.
pub(super) fn node_settings(name: &str, v6: bool) -> Vec<Sysctl> {
    let mut settings = vec![
        Sysctl::required(format!("ipv4/conf/{name}/rp_filter"), "0"),
        Sysctl::required(format!("ipv4/conf/{name}/forwarding"), "1"),
        // The kernel ignores a pod's ARP requests, which would fill the neighbour table of the
        // node: both ends have permanent entries. The second setting switches proxy ARP off even if
        // it is on for all interfaces.
        Sysctl::required(format!("ipv4/conf/{name}/arp_ignore"), "8"),
        Sysctl::required(format!("ipv4/conf/{name}/medium_id"), "-1"),
    ];
    let key = |key: &str| format!("ipv6/conf/{name}/{key}");
    match v6 {
        true => settings.extend([
            Sysctl::required(key("disable_ipv6"), "0"),
            Sysctl::required(key("forwarding"), "1"),
            // A pod must not become a router of the node.
            Sysctl::required(key("accept_ra"), "0"),
            Sysctl::required(key("accept_redirects"), "0"),
            Sysctl::optional(key("accept_dad"), "0"),
        ]),
        // A kernel without IPv6 has no such setting.
        false => settings.push(Sysctl::optional(key("disable_ipv6"), "1")),
    }
    settings
}

/// Returns the sysctls of the pod's end, for a pod with an IPv6 address.
pub(super) fn pod_settings(name: &str) -> Vec<Sysctl> {
    vec![
        Sysctl::required(format!("ipv6/conf/{name}/disable_ipv6"), "0"),
        Sysctl::optional(format!("ipv6/conf/{name}/accept_ra"), "0"),
        Sysctl::optional(format!("ipv6/conf/{name}/accept_dad"), "0"),
    ]
}

pub(super) fn mac_text(mac: &[u8]) -> String {
    let parts: Vec<String> = mac.iter().map(|byte| format!("{byte:02x}")).collect();
    parts.join(":")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_and_differ() {
        let name = |container: &str, ifname: &str| {
            host_name(&AttachmentId { container_id: container.into(), ifname: ifname.into() })
        };
        let names = [name("a", "eth0"), name("b", "eth0"), name("a", "eth1")];
        assert!(names.iter().all(|name| name.len() == 14 && name.starts_with("skp")), "{names:?}");
        assert!(names[0] != names[1] && names[0] != names[2]);
        assert_eq!(name("a", "eth0"), names[0]);
    }

    #[test]
    fn host_routes_have_a_source_and_a_fallback() {
        let (ip, v6) = ("10.1.0.7".parse().unwrap(), "fd00::1".parse().unwrap());
        let node: [IpAddr; 2] = [v6, "10.1.0.1".parse().unwrap()];
        let routes = host_routes(7, ip, &node);
        let found: Vec<_> = routes.iter().map(|route| (route.source, route.metric)).collect();
        assert_eq!(found, [(None, Some(FALLBACK_METRIC)), (Some(node[1]), None)]);
        let routes = host_routes(7, ip, &[v6]);
        assert_eq!(routes.len(), 1, "The node has no address of the family.");
    }
}
