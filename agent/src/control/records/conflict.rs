//! Contradictions among node records: names and keys that two records have, prefixes that overlap,
//! and endpoints inside a prefix.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use ipnet::IpNet;
use skein_ipc::keys::PublicKey;

use super::node::NodeRecord;
use crate::config::overlap;

/// Two records that contradict each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conflict<S> {
    /// Sources of the two records.
    pub between: (S, S),
    /// The key that both records have, if that is the contradiction.
    pub key: Option<PublicKey>,
    /// The contradiction and the remedy.
    pub message: String,
}

/// Source of a record, and the record's number in the source.
type Position<S> = (S, usize);
/// Position of a record, and the number of a key, prefix or endpoint in the record.
type Place<S> = (Position<S>, usize);

/// A property that only one record may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Identity<'a> {
    Name(&'a str),
    Key(PublicKey),
}

/// Node records and the contradictions among them. The caller inserts records, requests the first
/// contradiction, and removes one of its two sides, until no contradiction is left. Each step costs
/// a few look-ups in ordered maps, so that the cost of all steps grows with the number of records,
/// not with its square.
///
/// `S` is the source of a record. The order of sources and of the records in a source decides which
/// contradiction is the first.
#[derive(Debug, Default)]
pub struct Conflicts<'a, S> {
    records: BTreeMap<Position<S>, &'a NodeRecord>,
    /// Places of each name and key. A name has the number 0, keys have the numbers from 1.
    holders: HashMap<Identity<'a>, BTreeSet<Place<S>>>,
    /// Names and keys with several holders, by the place of the second one.
    shared: BTreeMap<Place<S>, Identity<'a>>,
    /// Places of each prefix. Two prefixes are disjoint, or one contains the other. In this order a
    /// prefix precedes the prefixes inside it, so that it overlaps the next prefix if it contains
    /// any other.
    prefixes: BTreeMap<IpNet, BTreeSet<Place<S>>>,
    /// Prefixes that have several places or overlap the next prefix.
    overlapping: BTreeSet<IpNet>,
    /// Places of each endpoint's address.
    endpoints: BTreeMap<IpAddr, BTreeSet<Place<S>>>,
    /// Places of the endpoints that have not been compared with all prefixes.
    unchecked: BTreeSet<Place<S>>,
    /// Prefixes that were inserted since the last check. The endpoints inside them have not been
    /// added to `unchecked` yet.
    new_prefixes: Vec<IpNet>,
}

impl<'a, S: Copy + Ord> Conflicts<'a, S> {
    /// Inserts the record with the number `index` of a source. The place must be free.
    pub fn insert(&mut self, source: S, index: usize, record: &'a NodeRecord) {
        let position = (source, index);
        self.records.insert(position, record);
        for (number, identity) in identities(record) {
            self.with_holders(identity, |holders| holders.insert((position, number)));
        }
        for (number, prefix) in prefixes(record) {
            self.prefixes.entry(prefix).or_default().insert((position, number));
            self.update_overlaps(prefix);
            self.new_prefixes.push(prefix);
        }
        for (number, endpoint) in record.endpoints.iter().enumerate() {
            let place = (position, number);
            self.endpoints.entry(endpoint.ip()).or_default().insert(place);
            self.unchecked.insert(place);
        }
    }

    /// Removes the record with the number `index` of a source, if it was inserted.
    pub fn remove(&mut self, source: S, index: usize) {
        let position = (source, index);
        let Some(record) = self.records.remove(&position) else { return };
        for (number, identity) in identities(record) {
            self.with_holders(identity, |holders| holders.remove(&(position, number)));
        }
        for (number, prefix) in prefixes(record) {
            remove_place(&mut self.prefixes, prefix, (position, number));
            self.update_overlaps(prefix);
        }
        for (number, endpoint) in record.endpoints.iter().enumerate() {
            remove_place(&mut self.endpoints, endpoint.ip(), (position, number));
            self.unchecked.remove(&(position, number));
        }
    }

    /// Returns the first contradiction: of names and keys, then of prefixes, then of endpoints.
    pub fn first(&mut self) -> Option<Conflict<S>> {
        let conflict = self.first_shared().or_else(|| self.first_overlap());
        conflict.or_else(|| self.first_endpoint_in_prefix())
    }

    fn first_shared(&self) -> Option<Conflict<S>> {
        let (second, identity) = self.shared.first_key_value()?;
        let first = self.holders.get(identity)?.first()?;
        let between = (first.0.0, second.0.0);
        let name = self.name(second);
        Some(match identity {
            Identity::Name(_) => {
                let message = format!("there are two records of node {name}. Keep one.");
                Conflict { between, key: None, message }
            }
            Identity::Key(key) => {
                let message = format!(
                    "public_key: nodes {} and {name} have the same key {key}. Every node needs its own \
                     key (skein-agent keygen).",
                    self.name(first)
                );
                Conflict { between, key: Some(*key), message }
            }
        })
    }

    fn first_overlap(&self) -> Option<Conflict<S>> {
        let a = self.overlapping.first()?;
        let mut places = self
            .prefixes
            .range(a..)
            .flat_map(|(prefix, places)| places.iter().map(move |place| (prefix, place)));
        let ((_, at_a), (b, at_b)) = (places.next()?, places.next()?);
        let message = format!(
            "pod_cidrs: {a} of node {} and {b} of node {} overlap. Give every node its own prefixes.",
            self.name(at_a),
            self.name(at_b)
        );
        Some(Conflict { between: (at_a.0.0, at_b.0.0), key: None, message })
    }

    /// Finds an endpoint inside a prefix. Datagrams to this endpoint would enter the overlay that
    /// they carry. The prefixes must be disjoint.
    fn first_endpoint_in_prefix(&mut self) -> Option<Conflict<S>> {
        for prefix in self.new_prefixes.drain(..) {
            if self.prefixes.contains_key(&prefix) {
                let inside = self.endpoints.range(prefix.network()..=prefix.broadcast());
                self.unchecked.extend(inside.flat_map(|(_, places)| places));
            }
        }
        while let Some(place) = self.unchecked.first() {
            let ip = self.records.get(&place.0)?.endpoints.get(place.1)?.ip();
            let owner = self.prefixes.range(..=IpNet::from(ip)).next_back();
            if let Some((prefix, owners)) = owner.filter(|(prefix, _)| prefix.contains(&ip)) {
                let owner = owners.first()?;
                let message = format!(
                    "pod_cidrs: {prefix} of node {} has the address {ip}, where node {} listens. Give \
                     pods prefixes that contain no node's address.",
                    self.name(owner),
                    self.name(place)
                );
                return Some(Conflict { between: (place.0.0, owner.0.0), key: None, message });
            }
            self.unchecked.pop_first();
        }
        None
    }

    fn name(&self, place: &Place<S>) -> &'a str {
        self.records.get(&place.0).map_or("", |record| &record.name)
    }

    /// Changes the holders of a name or key, and enters them in `shared` if there are several.
    fn with_holders(
        &mut self,
        identity: Identity<'a>,
        change: impl FnOnce(&mut BTreeSet<Place<S>>) -> bool,
    ) {
        let holders = self.holders.entry(identity).or_default();
        if let Some(second) = holders.iter().nth(1) {
            self.shared.remove(second);
        }
        change(holders);
        if let Some(second) = holders.iter().nth(1) {
            self.shared.insert(*second, identity);
        }
    }

    /// Updates `overlapping` after a change of the places of `prefix`.
    fn update_overlaps(&mut self, prefix: IpNet) {
        let before = self.prefixes.range(..prefix).next_back().map(|(before, _)| *before);
        for prefix in before.into_iter().chain([prefix]) {
            let mut from = self.prefixes.range(prefix..);
            let places = from.next().filter(|(found, _)| **found == prefix).map(|(_, at)| at);
            let overlaps = places.is_some_and(|places| {
                places.len() > 1 || from.next().is_some_and(|(next, _)| overlap(&prefix, next))
            });
            match overlaps {
                true => self.overlapping.insert(prefix),
                false => self.overlapping.remove(&prefix),
            };
        }
    }
}

fn identities(record: &NodeRecord) -> impl Iterator<Item = (usize, Identity<'_>)> {
    let keys = record.keys().iter().map(Identity::Key);
    std::iter::once(Identity::Name(&record.name)).chain(keys).enumerate()
}

fn prefixes(record: &NodeRecord) -> impl Iterator<Item = (usize, IpNet)> {
    record.pod_cidrs.iter().map(IpNet::trunc).enumerate()
}

fn remove_place<K: Ord, S: Ord>(
    map: &mut BTreeMap<K, BTreeSet<Place<S>>>,
    key: K,
    place: Place<S>,
) {
    if let Some(places) = map.get_mut(&key) {
        places.remove(&place);
        if places.is_empty() {
            map.remove(&key);
        }
    }
}

/// Returns the first contradiction among records of one source.
pub fn first_conflict(records: &[NodeRecord]) -> Option<Conflict<()>> {
    let mut conflicts = Conflicts::default();
    for (index, record) in records.iter().enumerate() {
        conflicts.insert((), index, record);
    }
    conflicts.first()
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::super::tests::record;
    use super::*;

    /// Returns whether and how two records contradict each other, by comparing all pairs of names,
    /// keys, prefixes and endpoints. The order of the result is that of [`Conflicts::first`].
    pub(crate) fn reference<'a, S: Copy>(
        records: impl Iterator<Item = (S, &'a NodeRecord)>,
    ) -> Option<(S, S, Option<PublicKey>)> {
        let records: Vec<_> = records.collect();
        for (index, (source, record)) in records.iter().enumerate() {
            let before = &records[..index];
            if let Some((twin, _)) = before.iter().find(|(_, other)| other.name == record.name) {
                return Some((*twin, *source, None));
            }
            for key in record.keys().iter() {
                let has = |other: &NodeRecord| other.keys().iter().any(|held| held == key);
                if let Some((twin, _)) = before.iter().find(|(_, other)| has(other)) {
                    return Some((*twin, *source, Some(key)));
                }
            }
        }
        let owned = |(source, record): &(S, &'a NodeRecord)| {
            let source = *source;
            record.pod_cidrs.iter().map(move |cidr| (*cidr, source)).collect::<Vec<_>>()
        };
        let mut cidrs: Vec<_> = records.iter().flat_map(owned).collect();
        cidrs.sort_by_key(|(cidr, _)| *cidr);
        for (index, (a, at_a)) in cidrs.iter().enumerate() {
            if let Some((_, at_b)) = cidrs[index + 1..].iter().find(|(b, _)| overlap(a, b)) {
                return Some((*at_a, *at_b, None));
            }
        }
        for (source, record) in &records {
            for endpoint in &record.endpoints {
                let inside = |(cidr, _): &&(IpNet, S)| cidr.contains(&endpoint.ip());
                if let Some((_, owner)) = cidrs.iter().find(inside) {
                    return Some((*source, *owner, None));
                }
            }
        }
        None
    }

    proptest! {
        #[test]
        fn neighbours_suffice_to_find_overlaps(
            nets in prop::collection::vec((any::<u32>(), 1u8..=32), 1..12),
        ) {
            let records: Vec<_> = (1..).zip(nets).map(|(n, (address, length))| {
                let net = IpNet::new(std::net::Ipv4Addr::from(address).into(), length).expect("valid");
                NodeRecord { pod_cidrs: vec![net.trunc()], endpoints: Vec::new(), ..record(n, &[]) }
            }).collect();
            let expected = reference(records.iter().map(|record| ((), record))).is_some();
            prop_assert_eq!(first_conflict(&records).is_some(), expected);
        }
    }
}
