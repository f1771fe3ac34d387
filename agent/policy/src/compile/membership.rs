//! Elements of sets, from the inventory.

use std::collections::BTreeSet;
use std::net::IpAddr;

use crate::api::Protocol;
use crate::model::{Inventory, NamedPort, PodId, PodInfo, PodTerm, matches};
use crate::program::{Element, Family, Set, SetKey};

/// Returns all elements of a set.
pub(crate) fn elements(inventory: &Inventory, set: &Set) -> BTreeSet<Element> {
    let of_family = |address: IpAddr| Some(Family::of(address)) == set.family;
    match &set.key {
        SetKey::Blocks(ranges) => ranges.iter().copied().map(Element::Range).collect(),
        SetKey::Ports(ranges) => ranges.iter().copied().map(Element::Ports).collect(),
        SetKey::AllPods => {
            let ranges = inventory.pod_networks().iter().filter(|range| of_family(range.first));
            ranges.copied().map(Element::Range).collect()
        }
        SetKey::Nodes(selectors) => {
            let selected = inventory
                .nodes()
                .values()
                .filter(|node| selectors.iter().any(|selector| matches(selector, &node.labels)));
            let addresses = selected.flat_map(|node| &node.addresses).copied();
            addresses.filter(|address| of_family(*address)).map(Element::Address).collect()
        }
        SetKey::Pods(terms) | SetKey::NamedPorts { pods: Some(terms), .. } => {
            let candidates = candidates(inventory, terms);
            let selected = candidates.into_iter().filter(|(id, info)| {
                let namespace_labels = inventory.namespace(&id.namespace);
                terms.iter().any(|term| term.matches(&id.namespace, namespace_labels, &info.labels))
            });
            selected.flat_map(|(id, info)| pod_elements(inventory, set, id, info)).collect()
        }
        SetKey::NamedPorts { pods: None, .. } => {
            let pods = inventory.pods();
            pods.flat_map(|(id, info)| pod_elements(inventory, set, id, info)).collect()
        }
    }
}

/// Returns the pods of the namespaces that a term selects.
fn candidates<'a>(inventory: &'a Inventory, terms: &[PodTerm]) -> Vec<(&'a PodId, &'a PodInfo)> {
    let mut pods = Vec::new();
    // A namespace may be named before it is known.
    let mut named: BTreeSet<_> = terms.iter().filter_map(PodTerm::namespace).collect();
    for (namespace, labels) in inventory.namespaces() {
        if terms.iter().any(|term| term.selects_namespace(namespace, Some(labels))) {
            named.remove(namespace);
            pods.extend(inventory.pods_of(namespace));
        }
    }
    pods.extend(named.into_iter().flat_map(|namespace| inventory.pods_of(namespace)));
    pods
}

/// Returns the elements that a selected pod contributes to a set of pods or of named ports: those
/// of the addresses that the pod owns.
pub(crate) fn pod_elements(
    inventory: &Inventory,
    set: &Set,
    id: &PodId,
    info: &PodInfo,
) -> Vec<Element> {
    let owned = |address: &IpAddr| {
        Some(Family::of(*address)) == set.family
            && inventory.owner(*address).is_some_and(|(owner, _)| owner == id)
    };
    let addresses = info.addresses.iter().copied().filter(owned);
    match &set.key {
        SetKey::NamedPorts { name, protocol, .. } => addresses
            .flat_map(|address| {
                let ports = info.ports.iter().filter(|port| is_named(port, name, *protocol));
                ports.map(move |port| Element::NamedPort(address, port.protocol, port.number))
            })
            .collect(),
        _ => addresses.map(Element::Address).collect(),
    }
}

/// Returns whether a declared port has a name and, unless `protocol` is `None`, a protocol.
pub(super) fn is_named(port: &NamedPort, name: &str, protocol: Option<Protocol>) -> bool {
    port.name == name && protocol.is_none_or(|protocol| protocol == port.protocol)
}
