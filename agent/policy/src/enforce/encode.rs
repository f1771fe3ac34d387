//! Elements of a program in the kernel's encoding.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use skein_netlink::nftables::{self, Change, ElementVerdict};

use crate::api::Protocol;
use crate::program::{self, Element, Program, Verdict};

/// Bytes of an interface name in a key (IFNAMSIZ).
const INTERFACE_NAME_LENGTH: usize = 16;
/// Alignment of the fields of a concatenation, bytes.
const FIELD_ALIGNMENT: usize = 4;
/// Name of the chain for refusals.
pub(super) const REFUSE: &str = "refuse";
/// Interface maps, with the set of pairs of interfaces.
pub(super) const INTERFACE_MAPS: [&str; 4] = ["from", "to", "to_node", "self"];

/// An element, or the two elements of an interval.
pub(super) type Unit = Vec<nftables::Element>;

/// Replacement of a unit in a set, or its addition or removal. The kernel applies both parts in the
/// same transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Step {
    /// Name of the set or map.
    pub(super) set: String,
    /// Unit to remove.
    pub(super) removed: Option<Unit>,
    /// Unit to add.
    pub(super) added: Option<Unit>,
}

impl Step {
    /// Returns the number of changes in the kernel.
    pub(super) fn len(&self) -> usize {
        let count = |unit: &Option<Unit>| unit.as_ref().map_or(0, Vec::len);
        count(&self.removed) + count(&self.added)
    }

    /// Returns the changes of elements: removals first.
    pub(super) fn changes(self) -> impl Iterator<Item = Change> {
        let Self { set, removed, added } = self;
        let change =
            move |element, added| Change { set: set.clone(), element, added, timeout: None };
        let removed = removed.into_iter().flatten().map(|element| (element, false));
        let added = added.into_iter().flatten().map(|element| (element, true));
        removed.chain(added).map(move |(element, added)| change(element, added))
    }
}

/// Returns the steps from the present units of a set to the wanted ones. A unit with the key of a
/// present one replaces it.
pub(super) fn steps(set: &str, present: BTreeSet<Unit>, wanted: BTreeSet<Unit>) -> Vec<Step> {
    let mut steps: BTreeMap<Vec<u8>, Step> = BTreeMap::new();
    let mut take = |unit: &Unit, added: bool| {
        let Some(first) = unit.first() else { return };
        let step = steps.entry(first.key.clone()).or_insert_with(|| Step {
            set: set.to_owned(),
            removed: None,
            added: None,
        });
        match added {
            true => step.added = Some(unit.clone()),
            false => step.removed = Some(unit.clone()),
        }
    };
    present.difference(&wanted).for_each(|unit| take(unit, false));
    wanted.difference(&present).for_each(|unit| take(unit, true));
    steps.into_values().collect()
}

/// Returns the units of a kernel's set: intervals as pairs, without the element that `nft` adds to
/// mark the space before the first interval.
pub(super) fn units(mut elements: Vec<nftables::Element>) -> BTreeSet<Unit> {
    elements.retain(|element| !element.interval_end || element.key.iter().any(|byte| *byte != 0));
    // The end of an interval is before the start of the next one with the same key.
    elements.sort_by(|a, b| (&a.key, !a.interval_end).cmp(&(&b.key, !b.interval_end)));
    let mut units: Vec<Unit> = Vec::with_capacity(elements.len());
    for element in elements {
        match units.last_mut() {
            Some(unit) if element.interval_end && unit.len() == 1 => unit.push(element),
            _ => units.push(vec![element]),
        }
    }
    units.into_iter().collect()
}

/// Returns the unit of an element of a set.
pub(super) fn unit(element: &Element) -> Unit {
    match element {
        Element::Address(address) => single(octets(*address)),
        Element::NamedPort(address, protocol, port) => {
            let mut key = octets(*address);
            field(&mut key, &[number(*protocol)]);
            field(&mut key, &port.to_be_bytes());
            single(key)
        }
        Element::Range(range) => interval(octets(range.first), octets(range.last)),
        Element::Ports(range) => {
            interval(range.start.to_be_bytes().to_vec(), range.end.to_be_bytes().to_vec())
        }
    }
}

/// Returns the unit of an interface in a verdict map.
pub(super) fn interface(name: &str, verdict: &Verdict) -> Unit {
    let verdict = match verdict {
        Verdict::Accept => ElementVerdict::Accept,
        Verdict::Refuse => ElementVerdict::Goto(REFUSE.to_owned()),
        // The compiler assigns no dispatch to an interface; a packet without a chain is dropped.
        Verdict::Goto(chain) | Verdict::Dispatch(chain) => ElementVerdict::Goto(chain.clone()),
    };
    vec![nftables::Element {
        key: interface_key(name),
        interval_end: false,
        verdict: Some(verdict),
    }]
}

/// Returns the unit of an interface in the set `self`: the pair of the interface with itself.
pub(super) fn pair(name: &str) -> Unit {
    single([interface_key(name), interface_key(name)].concat())
}

fn single(key: Vec<u8>) -> Unit {
    vec![nftables::Element::key(key)]
}

/// Returns the elements of an inclusive interval.
fn interval(first: Vec<u8>, last: Vec<u8>) -> Unit {
    let (mut end, mut is_last) = (last, true);
    // The end is the key behind the last one; an interval up to the highest key has none.
    for byte in end.iter_mut().rev() {
        *byte = byte.wrapping_add(1);
        if *byte != 0 {
            is_last = false;
            break;
        }
    }
    let mut unit = single(first);
    if !is_last {
        unit.push(nftables::Element { key: end, interval_end: true, verdict: None });
    }
    unit
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// Appends a field of a concatenation.
fn field(key: &mut Vec<u8>, value: &[u8]) {
    key.extend(value);
    key.resize(key.len().next_multiple_of(FIELD_ALIGNMENT), 0);
}

fn interface_key(name: &str) -> Vec<u8> {
    let mut key = name.as_bytes().to_vec();
    key.resize(INTERFACE_NAME_LENGTH, 0);
    key
}

/// Returns the protocol number (IANA).
fn number(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => 6,
        Protocol::Udp => 17,
        Protocol::Sctp => 132,
    }
}

/// Returns the protocol with a number (IANA); `None` for a protocol that policies do not know.
pub(super) fn protocol(wanted: u8) -> Option<Protocol> {
    let all = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
    all.into_iter().find(|protocol| number(*protocol) == wanted)
}

/// Returns the key of the packets of a connection in one direction: addresses, protocol and ports.
pub(super) fn flow(protocol: u8, from: (IpAddr, u16), to: (IpAddr, u16)) -> Vec<u8> {
    let mut key = [octets(from.0), octets(to.0)].concat();
    field(&mut key, &[protocol]);
    field(&mut key, &from.1.to_be_bytes());
    field(&mut key, &to.1.to_be_bytes());
    key
}

/// Returns the units of a port map.
pub(super) fn port_map(map: &program::PortMap) -> BTreeSet<Unit> {
    let entries = map.chains.iter().map(|((protocol, port), chain)| {
        let mut key = Vec::new();
        field(&mut key, &[number(*protocol)]);
        field(&mut key, &port.to_be_bytes());
        let verdict = Some(ElementVerdict::Jump(chain.clone()));
        vec![nftables::Element { key, interval_end: false, verdict }]
    });
    entries.collect()
}

/// Returns the units of an interface map of [`INTERFACE_MAPS`].
pub(super) fn interfaces(program: &Program, map: &str) -> BTreeSet<Unit> {
    let entries = match map {
        "to" => &program.to,
        "to_node" => &program.to_node,
        _ => &program.from,
    };
    let entries = entries.iter().map(|(name, verdict)| match map {
        "self" => pair(name),
        _ => interface(name, verdict),
    });
    entries.collect()
}
