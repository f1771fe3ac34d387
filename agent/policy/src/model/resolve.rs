//! Conversion of API objects to [`Policy`], with reports of unreadable parts.

use crate::api::{
    Cidr, ClusterNetworkPolicy, ClusterRule, Defect, EgressPeer, IngressPeer, IpBlock,
    LabelSelector, NamespacedPod, NetworkPolicy, Parsed, Peer, PolicyPort, PolicyTier, PolicyType,
    Port, PortSelector, Protocol, RuleAction, Subject, TransportMatch, TransportProtocol,
};
use crate::model::{Mutation, mutated};
use crate::ranges::{AddressRange, merge, subtract};

use super::policy::{Action, Peers, Policy, PolicyId, PortSpec, Ports, Rule, Tier};
use super::selector::{NamespaceScope, PodTerm};

/// Collector of defects of one object.
struct Reader {
    id: PolicyId,
    /// Namespace of the object; empty if it has none.
    namespace: String,
    defects: Vec<Defect>,
}

impl Reader {
    fn report(&mut self, field: &str, reason: impl Into<String>) {
        let object = self.id.to_string();
        self.defects.push(Defect { object, field: field.to_owned(), reason: reason.into() });
    }

    /// Returns a readable value; reports another.
    fn read<'a, T>(&mut self, field: &str, parsed: &'a Parsed<T>) -> Option<&'a T> {
        match parsed {
            Parsed::Valid(value) => Some(value),
            Parsed::Invalid(reason) => {
                self.report(field, reason);
                None
            }
        }
    }

    /// Returns the readable entries of a list with their positions and field paths.
    fn entries<'a, T>(
        &mut self,
        field: &str,
        list: &'a [Parsed<T>],
    ) -> Vec<(usize, String, &'a T)> {
        let mut entries = Vec::with_capacity(list.len());
        for (index, entry) in list.iter().enumerate() {
            let field = format!("{field}[{index}]");
            if let Some(value) = self.read(&field, entry) {
                entries.push((index, field, value));
            }
        }
        entries
    }
}

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
        policy.subject = pods.map(|pods| own(&object.metadata.namespace, pods));
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
                    .map(|(index, field, rule)| {
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
                    .map(|(index, field, rule)| {
                        let (to, ports) = (rule.to.as_ref(), rule.ports.as_ref());
                        allow(&mut reader, index, &field, "to", to, ports)
                    })
                    .collect(),
            );
        }
    }
    (policy, reader.defects)
}

/// An optional list of entries that may be unreadable.
type List<T> = Parsed<Vec<Parsed<T>>>;

fn list<'a, T>(
    reader: &mut Reader,
    field: &str,
    list: Option<&'a List<T>>,
) -> Vec<(usize, String, &'a T)> {
    let list = list.and_then(|list| reader.read(field, list));
    list.map(|list| reader.entries(field, list)).unwrap_or_default()
}

fn own(namespace: &str, pods: LabelSelector) -> PodTerm {
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
            for (_, field, peer) in list(reader, &field, peers) {
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
                    .map(|(_, _, port)| match &port.port {
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
                own(&reader.namespace, pods)
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

fn labelled(namespaces: LabelSelector, pods: LabelSelector) -> PodTerm {
    PodTerm { namespaces: NamespaceScope::Labelled(namespaces), pods }
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

fn port_list(mut entries: Vec<PortSpec>) -> Ports {
    entries.sort_unstable();
    entries.dedup();
    Ports::List(entries)
}

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

/// Converts the rules of a direction. `add` adds a peer to the union.
fn rules<P>(
    reader: &mut Reader,
    field: &str,
    peers_field: &str,
    rules: &[Parsed<ClusterRule<P>>],
    add: fn(&mut Reader, &str, &P, &mut Peers),
) -> Option<Vec<Rule>> {
    let mut converted = Vec::with_capacity(rules.len());
    for (index, field, rule) in reader.entries(field, rules) {
        let mut peers = Peers::default();
        for unknown in &rule.unknown {
            reader.report(&format!("{field}.{unknown}"), "the field is unknown");
        }
        let peers_field = format!("{field}.{peers_field}");
        if rule.peers.is_empty() {
            reader.report(&peers_field, "a rule without a peer matches nothing");
        }
        for (_, field, peer) in reader.entries(&peers_field, &rule.peers) {
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
            union
                .blocks
                .extend(networks.into_iter().map(|(_, _, cidr)| AddressRange::from(cidr.net())));
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

fn transport_list(
    reader: &mut Reader,
    field: &str,
    protocols: &[Parsed<TransportProtocol>],
) -> Ports {
    if protocols.is_empty() {
        return Ports::Any;
    }
    let mut list = Vec::with_capacity(protocols.len());
    for (_, field, entry) in reader.entries(field, protocols) {
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
