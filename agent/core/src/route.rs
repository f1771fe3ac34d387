//! The owners of inner addresses. Egress routing and the source check of ingress use the same
//! table.

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;

/// Identifier of a peer within this process. An identifier is never reused for another peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerId(pub u32);

/// Owner of an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// This node.
    Local,
    /// A peer.
    Peer(PeerId),
}

/// Overlapping prefixes of two owners.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{first_prefix} of {} overlaps {second_prefix} of {}", OwnerName(*.first), OwnerName(*.second))]
pub struct RouteConflict {
    /// Owner of `first_prefix`.
    pub first: Owner,
    /// The wider of the two prefixes.
    pub first_prefix: IpNet,
    /// Owner of `second_prefix`.
    pub second: Owner,
    /// The prefix that lies in `first_prefix`.
    pub second_prefix: IpNet,
}

struct OwnerName(Owner);

impl fmt::Display for OwnerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Owner::Local => f.write_str("this node"),
            Owner::Peer(PeerId(number)) => write!(f, "peer {number}"),
        }
    }
}

/// An immutable, sorted table of disjoint address ranges. A lookup is a binary search.
#[derive(Debug, Default)]
pub struct RouteTable {
    v4: Vec<OwnedRange<u32>>,
    v6: Vec<OwnedRange<u128>>,
}

/// Addresses of one prefix, as numbers.
#[derive(Debug)]
struct OwnedRange<T> {
    first: T,
    last: T,
    owner: Owner,
}

impl RouteTable {
    /// Builds the table from the prefixes of this node and of its peers. Host bits are ignored.
    ///
    /// # Errors
    /// [`RouteConflict`] if prefixes of two owners overlap.
    pub fn build<'a>(
        local: &[IpNet],
        peers: impl IntoIterator<Item = (PeerId, &'a [IpNet])>,
    ) -> Result<RouteTable, RouteConflict> {
        let mut prefixes: Vec<(IpNet, Owner)> =
            local.iter().map(|prefix| (prefix.trunc(), Owner::Local)).collect();
        for (peer, claimed) in peers {
            prefixes.extend(claimed.iter().map(|prefix| (prefix.trunc(), Owner::Peer(peer))));
        }
        // The order is by family, first address, and length with the widest prefix first, so that a
        // prefix can only overlap the one before it.
        prefixes.sort_by_key(|(prefix, _)| (prefix.network(), prefix.prefix_len()));
        let mut kept: Vec<(IpNet, Owner)> = Vec::with_capacity(prefixes.len());
        for (prefix, owner) in prefixes {
            match kept.last() {
                Some((last, other)) if last.contains(&prefix) => {
                    if *other != owner {
                        return Err(RouteConflict {
                            first: *other,
                            first_prefix: *last,
                            second: owner,
                            second_prefix: prefix,
                        });
                    }
                }
                _ => kept.push((prefix, owner)),
            }
        }
        let mut table = RouteTable::default();
        for (prefix, owner) in kept {
            match prefix {
                IpNet::V4(p) => {
                    let (first, last) = (p.network().into(), p.broadcast().into());
                    table.v4.push(OwnedRange { first, last, owner });
                }
                IpNet::V6(p) => {
                    let (first, last) = (p.network().into(), p.broadcast().into());
                    table.v6.push(OwnedRange { first, last, owner });
                }
            }
        }
        Ok(table)
    }

    /// Returns the owner of `address`, if any.
    pub fn lookup(&self, address: IpAddr) -> Option<Owner> {
        match address {
            IpAddr::V4(address) => search(&self.v4, address.into()),
            IpAddr::V6(address) => search(&self.v6, address.into()),
        }
    }

    /// Returns true if this node owns `address`.
    pub fn is_local(&self, address: IpAddr) -> bool {
        self.lookup(address) == Some(Owner::Local)
    }
}

fn search<T: Ord + Copy>(ranges: &[OwnedRange<T>], address: T) -> Option<Owner> {
    let after = ranges.partition_point(|range| range.first <= address);
    let range = ranges.get(after.checked_sub(1)?)?;
    (address <= range.last).then_some(range.owner)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn table(local: &[&str], peers: &[&[&str]]) -> Result<RouteTable, RouteConflict> {
        let peers: Vec<_> = peers.iter().map(|prefixes| nets(prefixes)).collect();
        let numbered = (0..).map(PeerId).zip(peers.iter().map(Vec::as_slice));
        RouteTable::build(&nets(local), numbered)
    }

    fn owner(table: &RouteTable, address: &str) -> Option<Owner> {
        table.lookup(address.parse().unwrap())
    }

    #[test]
    fn lookup_finds_owner_up_to_last_address() {
        let table = table(
            &["10.0.1.0/24", "fd00:1::/64"],
            &[&["10.0.0.0/24", "fd00:2::/64"], &["10.0.2.0/24", "10.0.3.7/32"]],
        )
        .unwrap();
        let peer = |number| Some(Owner::Peer(PeerId(number)));
        for (address, expected) in [
            ("10.0.0.0", peer(0)),
            ("10.0.0.255", peer(0)),
            ("10.0.1.0", Some(Owner::Local)),
            ("10.0.2.255", peer(1)),
            ("10.0.3.0", None),
            ("10.0.3.7", peer(1)),
            ("10.0.3.8", None),
            ("9.255.255.255", None),
            ("255.255.255.255", None),
            ("fd00:1::1", Some(Owner::Local)),
            ("fd00:2::ffff:ffff:ffff:ffff", peer(0)),
            ("fd00:2:0:1::", None),
            ("::", None),
        ] {
            assert_eq!(owner(&table, address), expected, "{address}");
            let local = table.is_local(address.parse().unwrap());
            assert_eq!(local, expected == Some(Owner::Local), "{address}");
        }
    }

    #[test]
    fn overlap_of_two_owners_is_refused_with_both_names() {
        let conflict = table(&["10.0.0.0/16"], &[&["10.0.5.0/24"]]).unwrap_err();
        assert_eq!(conflict.to_string(), "10.0.0.0/16 of this node overlaps 10.0.5.0/24 of peer 0");
        assert!(table(&[], &[&["10.0.0.0/24"], &["10.0.0.0/24"]]).is_err());
        assert!(table(&[], &[&["fd00::/16"], &["10.0.0.0/8"], &["fd00::/64"]]).is_err());
    }

    #[test]
    fn repeated_prefixes_and_host_bits_are_accepted() {
        let table = table(&[], &[&["10.0.0.0/16", "10.0.5.9/24", "10.0.5.0/24"]]).unwrap();
        assert_eq!(owner(&table, "10.0.5.1"), Some(Owner::Peer(PeerId(0))));
        assert_eq!(owner(&table, "10.0.6.1"), Some(Owner::Peer(PeerId(0))));
    }

    #[test]
    fn default_routes_cover_all_addresses() {
        let table = table(&[], &[&["0.0.0.0/0", "::/0"]]).unwrap();
        assert!(owner(&table, "255.255.255.255").is_some() && owner(&table, "::").is_some());
    }

    proptest! {
        #[test]
        fn lookup_agrees_with_linear_search(
            prefixes in prop::collection::vec((any::<u32>(), 4u8..=32), 0..30),
            addresses in prop::collection::vec(any::<u32>(), 0..50),
        ) {
            let prefixes: Vec<Vec<IpNet>> = prefixes
                .into_iter()
                .map(|(address, length)| vec![ipnet::Ipv4Net::new(address.into(), length).unwrap().into()])
                .collect();
            let numbered = (0..).map(PeerId).zip(prefixes.iter().map(Vec::as_slice));
            let overlap = prefixes.iter().enumerate().any(|(i, a)| {
                prefixes[..i].iter().any(|b| a[0].contains(&b[0]) || b[0].contains(&a[0]))
            });
            match RouteTable::build(&[], numbered) {
                Err(_) => prop_assert!(overlap),
                Ok(table) => {
                    prop_assert!(!overlap);
                    let inside = prefixes.iter().map(|p| p[0].addr());
                    for address in addresses.into_iter().map(|a| IpAddr::V4(a.into())).chain(inside) {
                        let expected = prefixes.iter().position(|p| p[0].contains(&address));
                        let expected = expected.map(|n| Owner::Peer(PeerId(n as u32)));
                        prop_assert_eq!(table.lookup(address), expected);
                    }
                }
            }
        }
    }
}
