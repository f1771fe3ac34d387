//! Conversion of NetworkPolicies. [`mutated`] returns true only in tests that activate a deliberate
//! fault.

use crate::api::{
    Cidr, Defect, IpBlock, LabelSelector, NetworkPolicy, Parsed, Peer, PolicyPort, PolicyType,
    PortSelector, Protocol,
};
use crate::model::policy::{Action, Peers, Policy, PolicyId, PortSpec, Ports, Rule, Tier};
use crate::model::selector::{NamespaceScope, PodTerm};
use crate::model::{Mutation, mutated};
use crate::ranges::{AddressRange, merge, subtract};

use super::{Entry, Reader, labelled, port_list};

/// Converts a NetworkPolicy. Returns the policy and the parts that cannot be enforced.
pub fn resolve_network_policy(object: &NetworkPolicy) -> (Policy, Vec<Defect>) {
    let namespace = object.metadata.namespace.clone();
    let id = PolicyId::NetworkPolicy { namespace, name: object.metadata.name.clone() };
    let namespace = object.metadata.namespace.clone();
    let mut reader = Reader { id: id.clone(), namespace, defects: Vec::new() };
    let mut policy =
        Policy { id, tier: Tier::NetworkPolicy, subject: None, ingress: None, egress: None };
    if let Some(spec) = reader.read("spec", &object.spec) {
        let pods = match &spec.pod_selector {
            None => Some(LabelSelector::default()),
            Some(selector) => reader.read("spec.podSelector", selector).cloned(),
        };
        policy.subject = pods.map(|pods| pods_in_namespace(&object.metadata.namespace, pods));
        if let Some(types) = &spec.policy_types
            && let Some(types) = reader.read("spec.policyTypes", types)
        {
            reader.entries("spec.policyTypes", types);
        }
        let both = mutated(Mutation::IsolateBothDirections);
        let isolates = |direction| both || spec.isolates(direction);
        if isolates(PolicyType::Ingress) {
            let rules = list(&mut reader, "spec.ingress", spec.ingress.as_ref());
            policy.ingress = Some(
                rules
                    .into_iter()
                    .map(|Entry { index, field, value: rule }| {
                        let (from, ports) = (rule.from.as_ref(), rule.ports.as_ref());
                        allow(&mut reader, index, &field, "from", from, ports)
                    })
                    .collect(),
            );
        }
        if isolates(PolicyType::Egress) {
            let rules = list(&mut reader, "spec.egress", spec.egress.as_ref());
            policy.egress = Some(
                rules
                    .into_iter()
                    .map(|Entry { index, field, value: rule }| {
                        let (to, ports) = (rule.to.as_ref(), rule.ports.as_ref());
                        allow(&mut reader, index, &field, "to", to, ports)
                    })
                    .collect(),
            );
        }
    }
    (policy, reader.defects)
}

/// A list that may be unreadable, of entries that may be unreadable.
type List<T> = Parsed<Vec<Parsed<T>>>;

fn list<'a, T>(reader: &mut Reader, field: &str, list: Option<&'a List<T>>) -> Vec<Entry<'a, T>> {
    let list = list.and_then(|list| reader.read(field, list));
    list.map(|list| reader.entries(field, list)).unwrap_or_default()
}

fn pods_in_namespace(namespace: &str, pods: LabelSelector) -> PodTerm {
    PodTerm { namespaces: NamespaceScope::Named(namespace.to_owned()), pods }
}

/// Converts a rule of a NetworkPolicy.
fn allow(
    reader: &mut Reader,
    index: usize,
    rule: &str,
    peers_field: &str,
    peers: Option<&List<Peer>>,
    ports: Option<&List<PolicyPort>>,
) -> Rule {
    let field = format!("{rule}.{peers_field}");
    let peers = match peers {
        None => Peers::any(),
        Some(Parsed::Valid(peers)) if peers.is_empty() => Peers::any(),
        peers => {
            let mut union = Peers::default();
            let mut blocks = Vec::new();
            for Entry { field, value: peer, .. } in list(reader, &field, peers) {
                add_peer(reader, &field, peer, &mut union, &mut blocks);
            }
            union.blocks = block_ranges(&blocks);
            union.normalize();
            union
        }
    };
    let field = format!("{rule}.ports");
    let ports = match ports {
        None => any_port(),
        Some(Parsed::Valid(ports)) if ports.is_empty() => any_port(),
        ports => {
            let ports = list(reader, &field, ports);
            port_list(
                ports
                    .into_iter()
                    .map(|Entry { value: port, .. }| match &port.port {
                        PortSelector::All => PortSpec::Protocol(port.protocol),
                        PortSelector::Range(range) => {
                            let mut range = *range;
                            if mutated(Mutation::EndPortExclusive) && range.end > range.start {
                                range.end -= 1;
                            }
                            PortSpec::Range(port.protocol, range)
                        }
                        PortSelector::Named(name) => {
                            let any = mutated(Mutation::NamedPortOfAnyProtocol);
                            PortSpec::Named((!any).then_some(port.protocol), name.clone())
                        }
                    })
                    .collect(),
            )
        }
    };
    Rule { index, name: String::new(), action: Action::Accept, peers, ports }
}

fn add_peer<'a>(
    reader: &mut Reader,
    field: &str,
    peer: &'a Peer,
    union: &mut Peers,
    blocks: &mut Vec<&'a IpBlock>,
) {
    match peer {
        Peer::IpBlock(block) => {
            blocks.extend(reader.read(&format!("{field}.ipBlock"), block));
        }
        Peer::Pods(pods) => {
            let pods = reader.read(&format!("{field}.podSelector"), pods);
            union.terms.extend(pods.cloned().map(|pods| {
                if mutated(Mutation::ForgetOwnNamespace) {
                    let namespaces = NamespaceScope::Labelled(LabelSelector::default());
                    return PodTerm { namespaces, pods };
                }
                pods_in_namespace(&reader.namespace, pods)
            }));
        }
        Peer::Namespaces { namespaces, pods } => {
            let namespaces = reader.read(&format!("{field}.namespaceSelector"), namespaces);
            let pods = match pods {
                None => Some(LabelSelector::default()),
                Some(pods) => reader.read(&format!("{field}.podSelector"), pods).cloned(),
            };
            if let (Some(namespaces), Some(pods)) = (namespaces, pods) {
                union.terms.push(labelled(namespaces.clone(), pods));
            }
        }
    }
}

/// Returns the addresses of blocks. Exceptions apply to their own block.
fn block_ranges(blocks: &[&IpBlock]) -> Vec<AddressRange> {
    let range = |cidr: &Cidr| AddressRange::from(cidr.net());
    let ranges = |block: &IpBlock| {
        let mut excepts: Vec<_> = block.except.iter().map(range).collect();
        if mutated(Mutation::IgnoreExcept) {
            excepts.clear();
        }
        if mutated(Mutation::ShareExcept) {
            excepts = blocks.iter().flat_map(|block| &block.except).map(range).collect();
        }
        subtract(vec![range(&block.cidr)], excepts)
    };
    merge(blocks.iter().flat_map(|block| ranges(block)).collect())
}

fn any_port() -> Ports {
    if mutated(Mutation::NoPortsMeansTransport) {
        let protocols = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
        return Ports::List(protocols.map(PortSpec::Protocol).into());
    }
    Ports::Any
}
