//! Port lists in canonical form.

use std::collections::{BTreeMap, BTreeSet};

use crate::api::{PortRange, Protocol};
use crate::model::{Direction, NamedPort, PortSpec, Ports};

use super::membership::is_named;

/// Brings a list of ports into canonical form: ranges are disjoint and not adjacent, and a protocol
/// that is listed as a whole has no ranges.
///
/// Names of ports of incoming traffic are replaced by the numbers that the pod itself has declared.
pub(super) fn canonical(
    ports: &Ports,
    direction: Direction,
    declared: &BTreeSet<NamedPort>,
) -> Ports {
    let Ports::List(list) = ports else { return Ports::Any };
    let mut whole = BTreeSet::new();
    let mut ranges: BTreeMap<Protocol, Vec<PortRange>> = BTreeMap::new();
    let mut canonical = Vec::new();
    for entry in list {
        match entry {
            PortSpec::Protocol(protocol) => {
                whole.insert(*protocol);
            }
            PortSpec::Range(protocol, range) => ranges.entry(*protocol).or_default().push(*range),
            PortSpec::Named(protocol, name) if direction == Direction::Ingress => {
                for port in declared.iter().filter(|port| is_named(port, name, *protocol)) {
                    let range = PortRange::single(port.number);
                    ranges.entry(port.protocol).or_default().push(range);
                }
            }
            PortSpec::Named(..) => canonical.push(entry.clone()),
        }
    }
    canonical.extend(whole.iter().copied().map(PortSpec::Protocol));
    for (protocol, ranges) in ranges.into_iter().filter(|(one, _)| !whole.contains(one)) {
        let merged = merge(ranges).into_iter();
        canonical.extend(merged.map(|range| PortSpec::Range(protocol, range)));
    }
    canonical.sort_unstable();
    canonical.dedup();
    Ports::List(canonical)
}

/// Sorts ranges and merges those that overlap or are adjacent.
fn merge(mut ranges: Vec<PortRange>) -> Vec<PortRange> {
    ranges.sort_unstable();
    let mut merged: Vec<PortRange> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match merged.last_mut() {
            Some(last) if u32::from(range.start) <= u32::from(last.end) + 1 => {
                last.end = last.end.max(range.end);
            }
            _ => merged.push(range),
        }
    }
    merged
}

/// Returns the names of ports in the policies' lists.
pub(super) fn names(ports: &Ports) -> impl Iterator<Item = &str> {
    let list = match ports {
        Ports::Any => &[][..],
        Ports::List(list) => list,
    };
    list.iter().filter_map(|entry| match entry {
        PortSpec::Named(_, name) => Some(name.as_str()),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adjacent_ranges_merge_up_to_the_last_port() {
        let range = |start, end| PortRange { start, end };
        let merged =
            merge(vec![range(65535, 65535), range(1, 2), range(3, 3), range(65000, 65534)]);
        assert_eq!(merged, [range(1, 3), range(65000, 65535)]);
    }
}
