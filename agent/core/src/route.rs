//! Who owns an address: the routes of egress and the source check of ingress are one table.

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;

/// Number of a peer within this process; never used again for another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerId(pub u32);

/// Who owns an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// This node.
    Local,
    /// Another one.
    Peer(PeerId),
}

/// Two owners claim the same addresses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{first_prefix} of {} overlaps {second_prefix} of {}", Named(*.first), Named(*.second))]
pub struct RouteConflict {
    /// One of the two.
    pub first: Owner,
    /// What it claims.
    pub first_prefix: IpNet,
    /// The other one.
    pub second: Owner,
    /// What that claims.
    pub second_prefix: IpNet,
}

struct Named(Owner);

impl fmt::Display for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Owner::Local => f.write_str("this node"),
            Owner::Peer(PeerId(number)) => write!(f, "peer {number}"),
        }
    }
}

/// An immutable table of disjoint address ranges, sorted: a look-up is a binary search and touches
/// no more than the logarithm of their number in cache lines.
#[derive(Debug, Default)]
pub struct RouteTable {
    v4: Vec<(u32, u32, Owner)>,
    v6: Vec<(u128, u128, Owner)>,
}

impl RouteTable {
    /// Builds the table. Prefixes of different owners may not overlap.
    pub fn build<'a>(
        local: &[IpNet],
        peers: impl IntoIterator<Item = (PeerId, &'a [IpNet])>,
    ) -> Result<RouteTable, RouteConflict> {
        let mut prefixes: Vec<(IpNet, Owner)> =
            local.iter().map(|prefix| (prefix.trunc(), Owner::Local)).collect();
        for (peer, claimed) in peers {
            prefixes.extend(claimed.iter().map(|prefix| (prefix.trunc(), Owner::Peer(peer))));
        }
        // By family, then by first address, the widest first: an overlap is then with a neighbour.
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
                    table.v4.push((p.network().into(), p.broadcast().into(), owner));
                }
                IpNet::V6(p) => {
                    table.v6.push((p.network().into(), p.broadcast().into(), owner));
                }
            }
        }
        Ok(table)
    }

    /// Who owns `address`.
    pub fn lookup(&self, address: IpAddr) -> Option<Owner> {
        match address {
            IpAddr::V4(address) => search(&self.v4, address.into()),
            IpAddr::V6(address) => search(&self.v6, address.into()),
        }
    }
}

fn search<T: Ord + Copy>(ranges: &[(T, T, Owner)], address: T) -> Option<Owner> {
    let after = ranges.partition_point(|(first, _, _)| *first <= address);
    let (_, last, owner) = ranges.get(after.checked_sub(1)?)?;
    (address <= *last).then_some(*owner)
}
