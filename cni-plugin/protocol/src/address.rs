//! Canonical forms of addresses. An IPv4-mapped IPv6 address (`::ffff:192.0.2.1`, RFC 4291, section
//! 2.5.5.2) becomes the IPv4 address that it represents, so that every check sees the same address
//! as the kernel.

use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net};
use serde::{Deserialize, Deserializer};

/// Returns the canonical form of an address with a prefix length. A mapped address with a prefix
/// length below 96 stays an IPv6 address.
pub fn canonical_net(net: IpNet) -> IpNet {
    let IpNet::V6(v6) = net else { return net };
    let mapped = v6.addr().to_ipv4_mapped().zip(v6.prefix_len().checked_sub(96));
    mapped.and_then(|(ip, bits)| Ipv4Net::new(ip, bits).ok()).map_or(net, IpNet::V4)
}

/// Deserializes addresses in their canonical form.
pub(crate) fn ips<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<IpAddr>, D::Error> {
    let ips = Vec::<IpAddr>::deserialize(deserializer)?;
    Ok(ips.iter().map(IpAddr::to_canonical).collect())
}

/// Deserializes addresses with prefix lengths in their canonical form.
pub(crate) fn nets<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<IpNet>, D::Error> {
    Ok(Vec::<IpNet>::deserialize(deserializer)?.into_iter().map(canonical_net).collect())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use crate::{Add, Check};

    #[test]
    fn mapped_addresses_in_requests_are_ipv4() {
        let add = r#"{"ifname": "eth0", "container_id": "c", "network": "n",
            "netns": "/n", "ips": ["::ffff:10.1.0.5", "fd00::5"]}"#;
        let add: Add = serde_json::from_str(add).unwrap();
        let ips: Vec<_> = add.ips.iter().map(ToString::to_string).collect();
        assert_eq!(ips, ["10.1.0.5", "fd00::5"]);
        let check = r#"{"ifname": "eth0", "container_id": "c",
            "ips": ["::ffff:10.1.0.5/128", "::ffff:0:0/95", "10.1.0.6/32", "fd00::5/128"]}"#;
        let check: Check = serde_json::from_str(check).unwrap();
        let ips: Vec<_> = check.ips.iter().map(ToString::to_string).collect();
        assert_eq!(ips, ["10.1.0.5/32", "::ffff:0.0.0.0/95", "10.1.0.6/32", "fd00::5/128"]);
    }
}
