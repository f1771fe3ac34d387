//! Arithmetic on address ranges.

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// An inclusive range of addresses of one family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct AddressRange {
    /// Lowest address of the range.
    pub first: IpAddr,
    /// Highest address, of the family of `first`.
    pub last: IpAddr,
}

impl From<IpNet> for AddressRange {
    fn from(net: IpNet) -> Self {
        Self { first: net.network(), last: net.broadcast() }
    }
}

impl From<IpAddr> for AddressRange {
    fn from(address: IpAddr) -> Self {
        Self { first: address, last: address }
    }
}

impl AddressRange {
    /// Returns whether the range contains an address.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.first <= address && address <= self.last
    }
}

impl fmt::Display for AddressRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            return self.first.fmt(f);
        }
        write!(f, "{}-{}", self.first, self.last)
    }
}

/// Sorts ranges and merges those that overlap or are adjacent.
pub fn merge(mut ranges: Vec<AddressRange>) -> Vec<AddressRange> {
    ranges.sort_unstable();
    let mut merged: Vec<AddressRange> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match merged.last_mut() {
            Some(last) if joins(last, &range) => last.last = last.last.max(range.last),
            _ => merged.push(range),
        }
    }
    merged
}

/// Returns whether `next`, which does not start before `range`, overlaps it or follows at once.
fn joins(range: &AddressRange, next: &AddressRange) -> bool {
    range.first.is_ipv4() == next.first.is_ipv4()
        && (next.first <= range.last || successor(range.last) == Some(next.first))
}

/// Returns the part of `ranges` that is in none of `excepts`, sorted and merged.
pub fn subtract(ranges: Vec<AddressRange>, excepts: Vec<AddressRange>) -> Vec<AddressRange> {
    let excepts = merge(excepts);
    let mut rest = Vec::new();
    for range in merge(ranges) {
        let mut start = Some(range.first);
        for except in excepts.iter().filter(|except| overlap(&range, except)) {
            if let Some(first) = start
                && let Some(last) = predecessor(except.first)
                && first <= last
            {
                rest.push(AddressRange { first, last });
            }
            start = successor(except.last).filter(|next| *next <= range.last);
        }
        rest.extend(start.map(|first| AddressRange { first, last: range.last }));
    }
    rest
}

fn overlap(a: &AddressRange, b: &AddressRange) -> bool {
    a.first <= b.last && b.first <= a.last
}

/// Returns the next address of the same family.
fn successor(address: IpAddr) -> Option<IpAddr> {
    match address {
        IpAddr::V4(v4) => v4.to_bits().checked_add(1).map(|bits| IpAddr::V4(bits.into())),
        IpAddr::V6(v6) => v6.to_bits().checked_add(1).map(|bits| IpAddr::V6(bits.into())),
    }
}

/// Returns the previous address of the same family.
fn predecessor(address: IpAddr) -> Option<IpAddr> {
    match address {
        IpAddr::V4(v4) => v4.to_bits().checked_sub(1).map(|bits| IpAddr::V4(bits.into())),
        IpAddr::V6(v6) => v6.to_bits().checked_sub(1).map(|bits| IpAddr::V6(bits.into())),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn net(text: &str) -> AddressRange {
        text.parse::<IpNet>().unwrap().into()
    }

    fn texts(ranges: &[AddressRange]) -> Vec<String> {
        ranges.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn ranges_at_the_ends_of_the_families_stay_apart() {
        let all = vec![net("::/0"), net("0.0.0.0/0")];
        let last4 = vec![net("255.255.255.255/32"), net("::/128")];
        assert_eq!(
            texts(&subtract(all.clone(), last4)),
            ["0.0.0.0-255.255.255.254", "::1-ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"]
        );
        assert_eq!(subtract(all.clone(), all), []);
    }

    fn range() -> impl Strategy<Value = AddressRange> {
        (any::<bool>(), 0..40_u8, 0..12_u8).prop_map(|(v4, first, length)| {
            let address = |last| match v4 {
                true => IpAddr::from([255, 255, 255, 255 - last]),
                false => IpAddr::from([0, 0, 0, 0, 0, 0, 0, u16::from(last)]),
            };
            let (one, other) = (address(first), address(first + length));
            AddressRange { first: one.min(other), last: one.max(other) }
        })
    }

    proptest! {
        #[test]
        fn subtraction_agrees_with_each_address(
            ranges in prop::collection::vec(range(), 0..5),
            excepts in prop::collection::vec(range(), 0..5),
        ) {
            let rest = subtract(ranges.clone(), excepts.clone());
            let within = |ranges: &[AddressRange], address| {
                ranges.iter().any(|range| range.contains(address))
            };
            for last in 0..60_u8 {
                let v6 = [0, 0, 0, 0, 0, 0, 0, u16::from(last)];
                for address in [IpAddr::from([255, 255, 255, 255 - last]), IpAddr::from(v6)] {
                    let expected = within(&ranges, address) && !within(&excepts, address);
                    prop_assert_eq!(within(&rest, address), expected, "{}", address);
                }
            }
            for pair in rest.windows(2) {
                prop_assert!(!joins(&pair[0], &pair[1]), "{:?} are not disjoint", pair);
                prop_assert!(pair[0].last < pair[1].first, "{:?} are not sorted", pair);
            }
        }
    }
}
