//! Links between namespaces.

use anyhow::Result;

use super::netns::Netns;
use super::process;
use std::process::Command;

/// What the underlay's interfaces can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Offloads {
    /// As a veth has them: superpackets cross whole.
    Ideal,
    /// As a NIC without offloads for overlays: one packet a frame on the link, GRO on receive.
    Wire,
}

/// Makes a veth pair across two namespaces, both ends up.
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

/// Gives an interface the offloads of `offloads`.
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

/// Makes a bridge that is up.
pub fn bridge(ns: &Netns, name: &str) -> Result<()> {
    ns.ip_batch(&[
        format!("link add {name} type bridge forward_delay 0 mcast_snooping 0"),
        format!("link set {name} up"),
    ])
}

/// Makes an interface a port of a bridge.
pub fn enslave(ns: &Netns, interface: &str, bridge: &str) -> Result<()> {
    ns.ip(&format!("link set {interface} master {bridge}")).map(drop)
}

/// The Ethernet address of an interface.
pub fn mac(ns: &Netns, interface: &str) -> Result<String> {
    let path = format!("/sys/class/net/{interface}/address");
    Ok(ns.sh(&format!("cat {path}"))?.trim().to_owned())
}
