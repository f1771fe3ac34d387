//! Canonical forms of addresses. To the kernel an IPv4-mapped IPv6 address (`::ffff:192.0.2.1`, RFC
//! 4291, section 2.5.5.2) is the same as its IPv4 address, but the two compare as different, so
//! that the mapped form could pass checks that the IPv4 address does not. All external addresses
//! are therefore converted to the canonical form when they are parsed.

use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use ipnet::{IpNet, Ipv4Net};

/// Length of the prefix of all IPv4-mapped addresses in bits.
const MAPPED_PREFIX: u8 = 96;

/// An address, or something made of addresses, that has one canonical form.
pub trait Canonical {
    /// Replaces IPv4-mapped IPv6 addresses by the IPv4 addresses that they stand for.
    #[must_use]
    fn canonical(self) -> Self;
}

impl Canonical for IpAddr {
    fn canonical(self) -> Self {
        self.to_canonical()
    }
}

impl Canonical for SocketAddr {
    fn canonical(mut self) -> Self {
        // Changes the address in place, to keep the scope of a link-local address.
        self.set_ip(self.ip().to_canonical());
        self
    }
}

impl Canonical for IpNet {
    fn canonical(self) -> Self {
        let IpNet::V6(net) = self else { return self };
        let bits = net.prefix_len().checked_sub(MAPPED_PREFIX);
        let mapped = net.addr().to_ipv4_mapped().zip(bits);
        mapped.and_then(|(ip, bits)| Ipv4Net::new(ip, bits).ok()).map_or(self, IpNet::V4)
    }
}

impl<T: Canonical> Canonical for Vec<T> {
    fn canonical(self) -> Self {
        self.into_iter().map(T::canonical).collect()
    }
}

/// Parses an address, an address with a port, or a prefix, and returns its canonical form.
///
/// # Errors
/// The error of `T`'s parser if the text is not a valid `T`.
pub fn parse<T: FromStr + Canonical>(text: &str) -> Result<T, T::Err> {
    text.parse().map(T::canonical)
}

/// Returns true if a node can be reached at this address and port: neither unspecified, nor
/// multicast or the broadcast address, nor port 0.
pub fn is_endpoint(address: SocketAddr) -> bool {
    let ip = address.ip().to_canonical();
    let is_broadcast = matches!(ip, IpAddr::V4(v4) if v4.is_broadcast());
    address.port() != 0 && !ip.is_multicast() && !ip.is_unspecified() && !is_broadcast
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn mapped_addresses_are_parsed_as_ipv4() {
        for (text, canonical) in [
            ("::ffff:10.244.2.9", "10.244.2.9"),
            ("::ffff:0af4:0209", "10.244.2.9"),
            ("10.244.2.9", "10.244.2.9"),
            ("2001:db8::1", "2001:db8::1"),
            ("::10.244.2.9", "::10.244.2.9"),
        ] {
            assert_eq!(parse::<IpAddr>(text).unwrap(), canonical.parse::<IpAddr>().unwrap());
            let with_port = SocketAddr::new(text.parse().unwrap(), 51900).to_string();
            let expected = SocketAddr::new(canonical.parse().unwrap(), 51900);
            assert_eq!(parse::<SocketAddr>(&with_port).unwrap(), expected);
        }
        assert!(parse::<IpAddr>("host").is_err());
    }

    #[test]
    fn mapped_prefixes_are_parsed_as_ipv4() {
        for (text, canonical) in [
            ("::ffff:10.244.2.0/120", "10.244.2.0/24"),
            ("::ffff:10.244.2.9/128", "10.244.2.9/32"),
            ("::ffff:0:0/96", "0.0.0.0/0"),
            ("::ffff:0:0/95", "::ffff:0:0/95"),
            ("10.244.2.0/24", "10.244.2.0/24"),
            ("fd00::/64", "fd00::/64"),
        ] {
            assert_eq!(
                parse::<IpNet>(text).unwrap(),
                canonical.parse::<IpNet>().unwrap(),
                "{text}"
            );
        }
    }

    #[test]
    fn scope_of_link_local_address_is_kept() {
        let SocketAddr::V6(address) = parse("[fe80::1%3]:51900").unwrap() else { unreachable!() };
        assert_eq!(address.scope_id(), 3);
    }

    #[test]
    fn multicast_and_unspecified_are_no_endpoints() {
        for text in [
            "224.0.0.1:5",
            "[::ffff:224.0.0.1]:5",
            "[ff02::1]:5",
            "0.0.0.0:5",
            "[::ffff:0.0.0.0]:5",
            "[::]:5",
            "255.255.255.255:5",
            "192.0.2.1:0",
        ] {
            assert!(!is_endpoint(text.parse().unwrap()), "{text}");
        }
        assert!(is_endpoint("192.0.2.1:5".parse().unwrap()));
        assert!(is_endpoint("[2001:db8::1]:5".parse().unwrap()));
    }
}
