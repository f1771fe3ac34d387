//! Conversion of ClusterNetworkPolicies.

use crate::api::{
    ClusterNetworkPolicy, ClusterRule, Defect, EgressPeer, IngressPeer, LabelSelector,
    NamespacedPod, Parsed, PolicyTier, Port, Protocol, RuleAction, Subject, TransportMatch,
    TransportProtocol,
};
use crate::model::policy::{Action, Peers, Policy, PolicyId, PortSpec, Ports, Rule, Tier};
use crate::model::selector::PodTerm;
use crate::model::{Mutation, mutated};
use crate::ranges::{AddressRange, merge};

use super::{Entry, Reader, labelled, port_list};

/// Converts a ClusterNetworkPolicy. Returns the policy and the parts that cannot be enforced.
pub fn resolve_cluster_policy(object: &ClusterNetworkPolicy) -> (Policy, Vec<Defect>) {
    let id = PolicyId::ClusterNetworkPolicy { name: object.metadata.name.clone() };
    let mut reader = Reader { id: id.clone(), namespace: String::new(), defects: Vec::new() };
    let mut policy =
        Policy { id, tier: Tier::Admin(0), subject: None, ingress: None, egress: None };
    if let Some(spec) = reader.read("spec", &object.spec) {
        let priority = if mutated(Mutation::IgnorePriority) { 0 } else { spec.priority.0 };
        policy.tier = match spec.tier {
            PolicyTier::Admin => Tier::Admin(priority),
            PolicyTier::Baseline => Tier::Baseline(priority),
        };
        policy.subject = subject(&mut reader, &spec.subject);
        policy.ingress = rules(&mut reader, "spec.ingress", "from", &spec.ingress, ingress_peer);
        policy.egress = rules(&mut reader, "spec.egress", "to", &spec.egress, egress_peer);
    }
    (policy, reader.defects)
}

fn subject(reader: &mut Reader, subject: &Parsed<Subject>) -> Option<PodTerm> {
    match reader.read("spec.subject", subject)? {
        Subject::Namespaces(namespaces) => {
            let namespaces = reader.read("spec.subject.namespaces", namespaces)?;
            Some(labelled(namespaces.clone(), LabelSelector::default()))
        }
        Subject::Pods(pods) => {
            let pods = reader.read("spec.subject.pods", pods)?;
            Some(labelled(pods.namespace_selector.clone(), pods.pod_selector.clone()))
        }
    }
}

/// Converts the rules of one direction. `add` adds one peer of a rule to the set of all peers that
/// the rule selects.
fn rules<P>(
    reader: &mut Reader,
    field: &str,
    peers_field: &str,
    rules: &[Parsed<ClusterRule<P>>],
    add: fn(&mut Reader, &str, &P, &mut Peers),
) -> Option<Vec<Rule>> {
    let mut converted = Vec::with_capacity(rules.len());
    for Entry { index, field, value: rule } in reader.entries(field, rules) {
        let mut peers = Peers::default();
        for unknown in &rule.unknown {
            reader.report(&format!("{field}.{unknown}"), "the field is unknown");
        }
        let peers_field = format!("{field}.{peers_field}");
        if rule.peers.is_empty() {
            reader.report(&peers_field, "a rule without a peer matches nothing");
        }
        for Entry { field, value: peer, .. } in reader.entries(&peers_field, &rule.peers) {
            add(reader, &field, peer, &mut peers);
        }
        peers.blocks = merge(std::mem::take(&mut peers.blocks));
        peers.normalize();
        let mut ports = transport_list(reader, &format!("{field}.protocols"), &rule.protocols);
        let mut action = match rule.action {
            RuleAction::Accept => Action::Accept,
            RuleAction::Deny => Action::Deny,
            RuleAction::Pass => Action::Pass,
        };
        if !rule.is_understood() && !mutated(Mutation::UnknownPeerIsIgnored) {
            if action != Action::Accept {
                (action, peers, ports) = (Action::Deny, Peers::any(), Ports::Any);
            } else if !rule.unknown.is_empty() {
                peers = Peers::default();
            }
        }
        converted.push(Rule { index, name: rule.name.clone(), action, peers, ports });
    }
    (!converted.is_empty()).then_some(converted)
}

fn ingress_peer(reader: &mut Reader, field: &str, peer: &IngressPeer, union: &mut Peers) {
    match peer {
        IngressPeer::Namespaces(namespaces) => add_namespaces(reader, field, namespaces, union),
        IngressPeer::Pods(pods) => add_pods(reader, field, pods, union),
    }
}

fn egress_peer(reader: &mut Reader, field: &str, peer: &EgressPeer, union: &mut Peers) {
    match peer {
        EgressPeer::Namespaces(namespaces) => add_namespaces(reader, field, namespaces, union),
        EgressPeer::Pods(pods) => add_pods(reader, field, pods, union),
        EgressPeer::Nodes(nodes) => {
            union.nodes.extend(reader.read(&format!("{field}.nodes"), nodes).cloned());
        }
        EgressPeer::Networks(networks) => {
            let networks = reader.entries(&format!("{field}.networks"), networks);
            let ranges = networks.into_iter().map(|cidr| AddressRange::from(cidr.value.net()));
            union.blocks.extend(ranges);
        }
    }
}

fn add_namespaces(
    reader: &mut Reader,
    field: &str,
    namespaces: &Parsed<LabelSelector>,
    union: &mut Peers,
) {
    let namespaces = reader.read(&format!("{field}.namespaces"), namespaces).cloned();
    union.terms.extend(namespaces.map(|one| labelled(one, LabelSelector::default())));
}

fn add_pods(reader: &mut Reader, field: &str, pods: &Parsed<NamespacedPod>, union: &mut Peers) {
    let pods = reader.read(&format!("{field}.pods"), pods).cloned();
    union.terms.extend(pods.map(|pods| labelled(pods.namespace_selector, pods.pod_selector)));
}

/// Converts the `protocols` of a rule, with their destination ports. An empty list matches packets
/// of any protocol. Entries that cannot be read are reported and left out.
fn transport_list(
    reader: &mut Reader,
    field: &str,
    protocols: &[Parsed<TransportProtocol>],
) -> Ports {
    if protocols.is_empty() {
        return Ports::Any;
    }
    let mut list = Vec::with_capacity(protocols.len());
    for Entry { field, value: entry, .. } in reader.entries(field, protocols) {
        let (protocol, key, transport) = match entry {
            TransportProtocol::Tcp(transport) => (Protocol::Tcp, "tcp", transport),
            TransportProtocol::Udp(transport) => (Protocol::Udp, "udp", transport),
            TransportProtocol::Sctp(transport) => (Protocol::Sctp, "sctp", transport),
            TransportProtocol::DestinationNamedPort(name) => {
                list.push(PortSpec::Named(None, name.clone()));
                continue;
            }
        };
        let TransportMatch { destination_port } = transport;
        match destination_port {
            None => list.push(PortSpec::Protocol(protocol)),
            Some(port) => {
                let field = format!("{field}.{key}.destinationPort");
                let range = |Port(range): &Port| PortSpec::Range(protocol, *range);
                list.extend(reader.read(&field, port).map(range));
            }
        }
    }
    port_list(list)
}
