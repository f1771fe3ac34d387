//! Nodes and pods: network namespaces with the links, addresses and routes of a container network.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::Result;

use super::Family;
use super::link;
use super::netns::Netns;

/// Name of a node's interface on the underlay.
pub const UNDERLAY: &str = "eth0";

/// Name of a pod's interface inside the pod.
pub const POD_INTERFACE: &str = "eth0";

const GATEWAY_V4: &str = "169.254.1.1";
const GATEWAY_V6: &str = "fe80::1";
const GATEWAY_MAC: &str = "ee:ee:ee:ee:ee:ee";

/// Congestion control of pods, an option of the routes: CUBIC, the default of Linux, whatever the
/// host uses. After an interruption of seconds, BBR estimates a rate of a few hundred bits per
/// second and recovers slowly. A route sets the algorithm even if the host does not let a namespace
/// set it by sysctl.
const CONGESTION: &str = "congctl cubic";

/// A machine of the laboratory.
#[derive(Debug)]
pub struct Node {
    /// Name of the node: `node-a`, `node-b` and so on.
    pub name: String,
    /// Index of the node in its laboratory, from 0.
    pub index: u8,
    /// Pods of the node. The field stands before `ns`, because pods must be dropped before it.
    pub pods: Vec<Pod>,
    /// Network namespace of the node.
    pub ns: Netns,
}

/// A pod on a node.
#[derive(Debug)]
pub struct Pod {
    /// Network namespace of the pod.
    pub ns: Netns,
    /// IPv4 address of the pod.
    pub v4: Ipv4Addr,
    /// IPv6 address of the pod.
    pub v6: Ipv6Addr,
    /// Name of the node's end of the pod's veth pair.
    pub host_interface: String,
}

impl Node {
    /// Creates a node without pods that is not connected to an underlay.
    pub(super) fn create(index: u8) -> Result<Self> {
        let name = format!("node-{}", char::from(b'a' + index % 26));
        let ns = Netns::create(&name)?;
        Ok(Self { name, index, pods: vec![], ns })
    }

    /// Returns the node's address on the underlay.
    pub fn underlay(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => Ipv4Addr::new(192, 0, 2, self.index + 1).into(),
            Family::V6 => {
                Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, u16::from(self.index) + 1).into()
            }
        }
    }

    /// Returns the prefix of the addresses of the node's pods.
    pub fn pod_cidr(&self, family: Family) -> String {
        match family {
            Family::V4 => format!("10.244.{}.0/24", self.index + 1),
            Family::V6 => format!("fd00:10:244:{:x}::/64", self.index + 1),
        }
    }

    /// Adds the node's addresses to its underlay interface.
    pub(super) fn address_underlay(&self) -> Result<()> {
        self.ns.ip_batch(&[
            format!("address add {}/24 dev {UNDERLAY}", self.underlay(Family::V4)),
            format!("address add {}/64 dev {UNDERLAY} nodad", self.underlay(Family::V6)),
        ])
    }

    /// Enables forwarding of IPv4 and IPv6 packets on the node.
    ///
    /// # Errors
    /// If the kernel refuses one of the settings.
    pub fn enable_forwarding(&self) -> Result<()> {
        self.ns.sysctl("net.ipv4.ip_forward", "1")?;
        self.ns.sysctl("net.ipv6.conf.all.forwarding", "1")
    }

    /// Adds a pod with a /32 and a /128 address. Its gateways have permanent neighbour entries.
    pub(super) fn add_pod(&mut self, mtu: u32) -> Result<()> {
        let number = self.pods.len() as u8;
        let letter = self.name.trim_start_matches("node-");
        let ns = Netns::create(&format!("pod-{letter}{number}"))?;
        let v4 = Ipv4Addr::new(10, 244, self.index + 1, number + 10);
        let subnet = u16::from(self.index) + 1;
        let v6 = Ipv6Addr::new(0xfd00, 0x10, 0x244, subnet, 0, 0, 0, u16::from(number) + 0x10);
        let host_interface = format!("pod{number}");
        let mac = format!("02:00:00:00:{:02x}:{number:02x}", self.index);

        link::veth((&ns, POD_INTERFACE), (&self.ns, &host_interface), mtu)?;
        ns.ip_batch(&[
            format!("link set {POD_INTERFACE} address {mac}"),
            format!("address add {v4}/32 dev {POD_INTERFACE}"),
            format!("address add {v6}/128 dev {POD_INTERFACE} nodad"),
            format!("neighbour replace {GATEWAY_V4} lladdr {GATEWAY_MAC} dev {POD_INTERFACE}"),
            format!("neighbour replace {GATEWAY_V6} lladdr {GATEWAY_MAC} dev {POD_INTERFACE}"),
            format!("route add default via {GATEWAY_V4} dev {POD_INTERFACE} onlink {CONGESTION}"),
            format!("route add default via {GATEWAY_V6} dev {POD_INTERFACE} onlink {CONGESTION}"),
        ])?;
        self.ns.ip_batch(&[
            format!("link set {host_interface} address {GATEWAY_MAC}"),
            format!("neighbour replace {v4} lladdr {mac} dev {host_interface}"),
            format!("neighbour replace {v6} lladdr {mac} dev {host_interface}"),
            format!("route add {v4}/32 dev {host_interface}"),
            format!("route add {v6}/128 dev {host_interface}"),
        ])?;
        self.pods.push(Pod { ns, v4, v6, host_interface });
        Ok(())
    }
}

impl Pod {
    /// Returns the pod's address of one family.
    pub fn address(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => self.v4.into(),
            Family::V6 => self.v6.into(),
        }
    }
}
