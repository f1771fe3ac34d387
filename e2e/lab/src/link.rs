//! Links between network namespaces: veth pairs, bridges, and the offloads of interfaces.

use std::net::{Ipv6Addr, SocketAddrV6};
use std::process::Command;

use anyhow::{Context as _, Result};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::netns::Netns;
use super::process;

/// Offloads of the underlay interfaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Offloads {
    /// All offloads of a veth: superpackets pass unsegmented.
    Ideal,
    /// Offloads of a NIC without overlay offloads: one packet per frame on the link, GRO on
    /// receive.
    Wire,
}

/// Creates a veth pair across two namespaces and sets both ends up.
///
/// # Errors
/// If `ip` fails, for example because an interface of this name exists.
pub fn veth(a: (&Netns, &str), b: (&Netns, &str), mtu: u32) -> Result<()> {
    let ((ns_a, if_a), (ns_b, if_b)) = (a, b);
    let add = format!(
        "link add {if_a} netns {} mtu {mtu} type veth peer name {if_b} netns {} mtu {mtu}",
        ns_a.name(),
        ns_b.name()
    );
    process::run(Command::new("ip").args(add.split(' ')))?;
    ns_a.ip(&format!("link set {if_a} up"))?;
    ns_b.ip(&format!("link set {if_b} up"))?;
    Ok(())
}

/// Sets the offloads of an interface. [`Offloads::Ideal`] changes nothing.
///
/// # Errors
/// If `ethtool` fails.
pub fn set_offloads(ns: &Netns, interface: &str, offloads: Offloads) -> Result<()> {
    match offloads {
        Offloads::Ideal => Ok(()),
        Offloads::Wire => {
            let off = "tso off tx-udp-segmentation off tx-udp_tnl-segmentation off \
                       tx-udp_tnl-csum-segmentation off tx-gre-segmentation off gro on";
            ns.sh(&format!("ethtool -K {interface} {off}")).map(drop)
        }
    }
}

/// Creates a bridge and sets it up.
///
/// # Errors
/// If `ip` fails.
pub fn bridge(ns: &Netns, name: &str) -> Result<()> {
    ns.ip_batch(&[
        format!("link add {name} type bridge forward_delay 0 mcast_snooping 0"),
        format!("link set {name} up"),
    ])
}

/// Makes an interface a port of a bridge.
///
/// # Errors
/// If `ip` fails.
pub fn enslave(ns: &Netns, interface: &str, bridge: &str) -> Result<()> {
    ns.ip(&format!("link set {interface} master {bridge}")).map(drop)
}

/// Returns the Ethernet address of an interface.
///
/// # Errors
/// If the namespace has no such interface.
pub fn mac(ns: &Netns, interface: &str) -> Result<String> {
    let path = format!("/sys/class/net/{interface}/address");
    Ok(ns.sh(&format!("cat {path}"))?.trim().to_owned())
}

/// Sends a router advertisement with a /64 prefix (RFC 4861, section 4.2) three times from an
/// interface that has a link-local address.
///
/// # Errors
/// If the interface does not exist, or if the message cannot be sent.
pub fn advertise_router(ns: &Netns, interface: &str, prefix: Ipv6Addr) -> Result<()> {
    let links = ns.ip(&format!("-o link show {interface}"))?;
    let index: u32 = links.split(':').next().context("no index")?.trim().parse()?;
    let mut message = vec![134, 0, 0, 0, 64, 0, 0x07, 0x08, 0, 0, 0, 0, 0, 0, 0, 0];
    message.extend([3, 4, 64, 0xc0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    message.extend(prefix.octets());
    let all = SockAddr::from(SocketAddrV6::new("ff02::1".parse()?, 0, 0, index));
    ns.run(|| -> Result<()> {
        let socket = Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::ICMPV6))?;
        socket.set_multicast_hops_v6(255)?;
        socket.set_multicast_if_v6(index)?;
        for _ in 0..3 {
            socket.send_to(&message, &all)?;
        }
        Ok(())
    })?
}
