//! Configuration table `[interface]`: settings of the TUN device.

use std::net::IpAddr;
use std::ops::RangeInclusive;

use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize};
use skein_core::wire::ip::{MAX_MTU, MIN_IPV4_MTU, MIN_IPV6_MTU};
use skein_netlink::pod::HOST_PREFIX;

use super::{Invalid, parse};

/// Default name of the overlay's interface.
pub(crate) const DEFAULT_INTERFACE: &str = "skein0";

/// Range of `mtu`, in bytes.
const MTU_RANGE: RangeInclusive<u16> = MIN_IPV4_MTU..=MAX_MTU;

/// Settings of the TUN device, its addresses and its routes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Interface {
    /// Name of the interface, at most 15 bytes.
    pub name: String,
    /// MTU in bytes. `None` means the underlay's MTU minus the overhead of a datagram.
    pub mtu: Option<u16>,
    /// Length of each queue of the TUN device, packets, 1 to 1,000,000.
    pub txqueuelen: u32,
    /// Addresses of the node on the interface. `None` means the first host of each of its pod
    /// CIDRs.
    #[serde(deserialize_with = "addresses")]
    pub addresses: Option<Vec<IpAddr>>,
    /// Enables IPv4 and IPv6 forwarding in this network namespace.
    pub forwarding: bool,
    /// Adds unreachable routes for pod prefixes, so that packets without a more specific route are
    /// refused.
    pub unreachable_routes: bool,
}

impl Default for Interface {
    fn default() -> Self {
        Self {
            name: DEFAULT_INTERFACE.to_owned(),
            mtu: None,
            txqueuelen: 1000,
            addresses: None,
            forwarding: true,
            unreachable_routes: true,
        }
    }
}

impl Interface {
    /// Checks the values. `pod_cidrs` are the node's prefixes, if the configuration contains them.
    pub(super) fn check(&self, pod_cidrs: Option<&[IpNet]>) -> Result<(), Invalid> {
        self.check_name()?;
        if let Some(mtu) = self.mtu.filter(|mtu| !MTU_RANGE.contains(mtu)) {
            let (least, most) = (MTU_RANGE.start(), MTU_RANGE.end());
            return Err(Invalid(format!("interface.mtu = {mtu}: use {least} to {most}")));
        }
        let v6 = pod_cidrs.and_then(|cidrs| cidrs.iter().find(|cidr| cidr.addr().is_ipv6()));
        if let (Some(mtu), Some(cidr)) = (self.mtu.filter(|&mtu| mtu < MIN_IPV6_MTU), v6) {
            return Err(Invalid(format!(
                "interface.mtu = {mtu}: IPv6 ({cidr}) needs {MIN_IPV6_MTU} or more"
            )));
        }
        if !(1..=1_000_000).contains(&self.txqueuelen) {
            return Err(Invalid("interface.txqueuelen: use 1 to 1000000 packets".to_owned()));
        }
        Ok(())
    }

    fn check_name(&self) -> Result<(), Invalid> {
        let printable = |c: char| c.is_ascii_graphic() && !matches!(c, '/' | ':' | '%');
        let possible = (1..=15).contains(&self.name.len()) && self.name.chars().all(printable);
        if self.name.starts_with(HOST_PREFIX) || self.name.contains(['"', '*']) {
            return Err(Invalid(format!(
                "interface.name = {:?}: names that begin with {HOST_PREFIX} are reserved for pods, and \
                 '\"' and '*' are not allowed",
                self.name
            )));
        }
        // The kernel uses these names in /proc/sys/net for all interfaces and for the loopback
        // device.
        if !possible || matches!(self.name.as_str(), "." | ".." | "all" | "default" | "lo") {
            return Err(Invalid(format!(
                "interface.name = {:?}: use 1 to 15 printable characters without '/', ':' and '%'",
                self.name
            )));
        }
        Ok(())
    }
}

fn addresses<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<IpAddr>>, D::Error> {
    parse::addresses("interface.addresses", deserializer).map(Some)
}
