//! One pod CIDR as a range of addresses that can be given out.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// How full a pool is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// The pool.
    pub cidr: IpNet,
    /// Addresses that can be given out at all; `u64::MAX` where there are more.
    pub total: u64,
    /// Addresses in use.
    pub used: u64,
    /// Addresses that were given back a moment ago.
    pub resting: u64,
}

/// Addresses from `first` to `last`, as numbers, less those that are reserved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pool {
    pub(super) cidr: IpNet,
    first: u128,
    last: u128,
    reserved: HashSet<IpAddr>,
    /// Where the next search begins: next-fit, so that what was just freed comes last.
    pub(super) cursor: IpAddr,
}

impl Pool {
    /// A pool that gives out neither the network's and the broadcast address (RFC 919, for prefixes
    /// up to /30), nor the subnet-router anycast address (RFC 4291, 2.6.1; up to /126), nor what is reserved.
    pub(super) fn new(cidr: IpNet, reserved: &[IpAddr]) -> Self {
        let (mut first, mut last) = (number(cidr.network()), number(cidr.broadcast()));
        let host_bits = cidr.max_prefix_len() - cidr.prefix_len();
        if host_bits >= 2 {
            first += 1;
            last -= u128::from(cidr.addr().is_ipv4());
        }
        let reserved = reserved.iter().copied().filter(|ip| cidr.contains(ip)).collect();
        Self { cidr, first, last, reserved, cursor: address(first, cidr.addr().is_ipv4()) }
    }

    /// Whether this address can be given out from here.
    pub(super) fn has(&self, ip: IpAddr) -> bool {
        ip.is_ipv4() == self.cidr.addr().is_ipv4()
            && (self.first..=self.last).contains(&number(ip))
            && !self.reserved.contains(&ip)
    }

    /// Addresses that can be given out.
    pub(super) fn total(&self) -> u64 {
        let all = self.last - self.first + 1;
        let inside =
            self.reserved.iter().filter(|ip| (self.first..=self.last).contains(&number(**ip)));
        u64::try_from(all - inside.count() as u128).unwrap_or(u64::MAX)
    }

    /// The first address from the cursor on, around once, that `free` accepts. Tries at most
    /// `limit` of them.
    pub(super) fn find(&self, limit: u64, free: impl Fn(IpAddr) -> bool) -> Option<IpAddr> {
        let v4 = self.cidr.addr().is_ipv4();
        let start = number(self.cursor).clamp(self.first, self.last);
        let around = (start..=self.last).chain(self.first..start);
        let tries = usize::try_from(limit).unwrap_or(usize::MAX);
        around.take(tries).map(|n| address(n, v4)).find(|&ip| self.has(ip) && free(ip))
    }

    /// Lets the next search begin behind `ip`.
    pub(super) fn advance(&mut self, ip: IpAddr) {
        let next = match number(ip) {
            last if last >= self.last => self.first,
            other => other + 1,
        };
        self.cursor = address(next, ip.is_ipv4());
    }

    /// How many addresses are set aside: a search that tries one more than are used, resting and these
    /// finds one if there is one.
    pub(super) fn reserved(&self) -> u64 {
        self.reserved.len() as u64
    }
}

fn number(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(ip) => u128::from(u32::from(ip)),
        IpAddr::V6(ip) => ip.into(),
    }
}

fn address(number: u128, v4: bool) -> IpAddr {
    match v4 {
        // Made of a 32-bit address by adding what stays in its prefix.
        true => IpAddr::V4(Ipv4Addr::from(number as u32)),
        false => IpAddr::V6(Ipv6Addr::from(number)),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn pool(cidr: &str, reserved: &[&str]) -> Pool {
        let reserved: Vec<IpAddr> = reserved.iter().map(|ip| ip.parse().unwrap()).collect();
        Pool::new(cidr.parse().unwrap(), &reserved)
    }

    fn all(mut pool: Pool) -> Vec<String> {
        let mut found: Vec<IpAddr> = Vec::new();
        while let Some(ip) = pool.find(1000, |ip| !found.contains(&ip)) {
            found.push(ip);
            pool.advance(ip);
        }
        found.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn what_is_special_is_not_given_out() {
        assert_eq!(all(pool("10.0.0.0/29", &["10.0.0.1", "10.9.9.9"])).len(), 5);
        assert_eq!(all(pool("10.0.0.0/30", &[])), ["10.0.0.1", "10.0.0.2"]);
        assert_eq!(all(pool("10.0.0.0/31", &[])), ["10.0.0.0", "10.0.0.1"]);
        assert_eq!(all(pool("10.0.0.7/32", &[])), ["10.0.0.7"]);
        assert_eq!(all(pool("fd00::/126", &["fd00::1"])), ["fd00::2", "fd00::3"]);
        assert_eq!(all(pool("fd00::/127", &[])), ["fd00::", "fd00::1"]);
        assert_eq!(all(pool("255.255.255.252/30", &[])).len(), 2, "the end of all addresses");
    }

    #[test]
    fn totals_are_what_can_be_given_out() {
        for (cidr, reserved, total) in [
            ("10.0.0.0/29", &["10.0.0.1"][..], 5),
            ("10.0.0.0/24", &[], 254),
            ("10.0.0.0/24", &["10.0.0.0"], 254),
            ("fd00::/60", &["fd00::1"], u64::MAX),
            ("::/0", &[], u64::MAX),
        ] {
            assert_eq!(pool(cidr, reserved).total(), total, "{cidr}");
        }
    }

    #[test]
    fn the_search_goes_on_behind_the_last_and_around() {
        let mut pool = pool("10.0.0.0/29", &[]);
        pool.advance("10.0.0.5".parse().unwrap());
        let found = |pool: &Pool| pool.find(1000, |_| true).unwrap().to_string();
        assert_eq!(found(&pool), "10.0.0.6");
        pool.advance("10.0.0.6".parse().unwrap());
        assert_eq!(found(&pool), "10.0.0.1");
    }
}
