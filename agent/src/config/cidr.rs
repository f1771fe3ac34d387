//! Rules for the prefixes of pods and of the cluster.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::Invalid;

/// Prefixes that no pod CIDR may overlap: "this network", loopback, link-local, multicast, the
/// limited broadcast address and IPv4-mapped addresses (RFC 6890).
const RESERVED: [IpNet; 9] = [
    v4([0, 0, 0, 0], 8),
    v4([127, 0, 0, 0], 8),
    v4([169, 254, 0, 0], 16),
    v4([224, 0, 0, 0], 4),
    v4([255, 255, 255, 255], 32),
    v6(0, 0, 127),
    v6(0, 0xffff, 96),
    v6(0xfe80, 0, 10),
    v6(0xff00, 0, 8),
];

const fn v4([a, b, c, d]: [u8; 4], length: u8) -> IpNet {
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), length))
}

/// Returns a prefix by the first and the sixth group of its address; the other groups are zero.
const fn v6(first: u16, sixth: u16, length: u8) -> IpNet {
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::new(first, 0, 0, 0, 0, sixth, 0, 0), length))
}

/// Checks that `cidr` can be a pod CIDR.
///
/// # Errors
/// Host bits are set, or the prefix overlaps a reserved one.
pub fn check_pod_cidr(cidr: &IpNet) -> Result<(), Invalid> {
    if cidr.trunc() != *cidr {
        let text = format!("{cidr} has host bits set. Use {}.", cidr.trunc());
        return Err(Invalid(text));
    }
    if let Some(reserved) = RESERVED.iter().find(|reserved| overlap(cidr, reserved)) {
        return Err(Invalid(format!(
            "{cidr} cannot be a pod CIDR, because it overlaps {reserved}. Use another unicast \
             prefix."
        )));
    }
    Ok(())
}

/// Checks that no two of `cidrs` overlap.
///
/// # Errors
/// Two prefixes overlap. The error names them.
pub fn check_disjoint(cidrs: &[IpNet]) -> Result<(), Invalid> {
    // Two prefixes are nested or disjoint, so a prefix that overlaps another overlaps its neighbour
    // in sorted order.
    let mut sorted = cidrs.to_vec();
    sorted.sort_unstable();
    match sorted.windows(2).find(|pair| overlap(&pair[0], &pair[1])) {
        Some(pair) => {
            Err(Invalid(format!("{} and {} overlap. Keep one of them.", pair[0], pair[1])))
        }
        None => Ok(()),
    }
}

/// Checks that each of `cidrs` is inside a prefix of `cluster`. An empty `cluster` allows all.
///
/// # Errors
/// A prefix is outside of `cluster`. The error names it.
pub fn check_inside(cidrs: &[IpNet], cluster: &[IpNet]) -> Result<(), Invalid> {
    let inside = |cidr: &&IpNet| cluster.iter().any(|all| all.contains(*cidr));
    match cidrs.iter().find(|cidr| !cluster.is_empty() && !inside(cidr)) {
        Some(cidr) => {
            let all: Vec<_> = cluster.iter().map(IpNet::to_string).collect();
            Err(Invalid(format!("{cidr} is outside of cluster_cidrs ({})", all.join(", "))))
        }
        None => Ok(()),
    }
}

/// Checks that none of `addresses` is inside a prefix of `cluster`. The unreachable route of such a
/// prefix would make the address unreachable for this node.
///
/// # Errors
/// An address is inside a prefix. The error names both.
pub fn check_outside(
    addresses: impl IntoIterator<Item = IpAddr>,
    cluster: &[IpNet],
) -> Result<(), Invalid> {
    for address in addresses {
        if let Some(net) = cluster.iter().find(|net| net.contains(&address)) {
            return Err(Invalid(format!(
                "{address} lies in cluster_cidrs ({net}), so that this node could not reach the \
                 address. Set cluster_cidrs to prefixes that only pods use."
            )));
        }
    }
    Ok(())
}

/// Returns whether two prefixes have an address in common.
pub fn overlap(a: &IpNet, b: &IpNet) -> bool {
    a.contains(b) || b.contains(a)
}
