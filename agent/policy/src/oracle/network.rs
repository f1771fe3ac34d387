//! Evaluation of NetworkPolicies. Their rules only allow connections, and never deny one.

use crate::api::{
    LabelSelector, NetworkPolicy, NetworkPolicySpec, Parsed, Peer, Pod, PolicyPort, PolicyType,
    PortSelector,
};

use super::select::{selects, selects_pod};
use super::{Connection, Reason, Ruling, Side, World, peer_address, serves};

/// Returns the decision of the NetworkPolicies; `None` if no policy isolates the pod.
pub(super) fn decide(
    world: &World<'_>,
    side: Side,
    subject: &Pod,
    connection: &Connection<'_>,
) -> Option<Ruling> {
    let isolates = |policy: &&NetworkPolicy| {
        policy.metadata.namespace == subject.metadata.namespace
            && policy
                .spec
                .valid()
                .is_some_and(|spec| selects_subject(spec, subject) && has_direction(spec, side))
    };
    let isolating: Vec<_> = world.network_policies.iter().filter(isolates).collect();
    if isolating.is_empty() {
        return None;
    }
    if connection.to_own_node && side == Side::Egress {
        return Some(Ruling { allowed: true, reason: Reason::NoPolicy });
    }
    if let (Some(from), Some(to)) = (connection.from, connection.to)
        && from.metadata.namespace == to.metadata.namespace
        && from.metadata.name == to.metadata.name
    {
        return Some(Ruling { allowed: true, reason: Reason::Itself });
    }
    let mut allowing = Vec::new();
    for policy in &isolating {
        for index in allowing_rules(world, policy, side, subject, connection) {
            let metadata = &policy.metadata;
            allowing.push((metadata.namespace.clone(), metadata.name.clone(), index));
        }
    }
    if !allowing.is_empty() {
        return Some(Ruling { allowed: true, reason: Reason::NetworkRules(allowing) });
    }
    let name =
        |policy: &&NetworkPolicy| (policy.metadata.namespace.clone(), policy.metadata.name.clone());
    let reason = Reason::Isolated(isolating.iter().map(name).collect());
    Some(Ruling { allowed: false, reason })
}

fn selects_subject(spec: &NetworkPolicySpec, subject: &Pod) -> bool {
    match &spec.pod_selector {
        None => true,
        Some(Parsed::Valid(selector)) => selects(selector, &subject.metadata.labels),
        Some(Parsed::Invalid(_)) => false,
    }
}

fn has_direction(spec: &NetworkPolicySpec, side: Side) -> bool {
    let mut named = Vec::new();
    if let Some(Parsed::Valid(types)) = &spec.policy_types {
        named.extend(types.iter().filter_map(Parsed::valid));
    }
    match side {
        Side::Ingress => named.is_empty() || named.contains(&&PolicyType::Ingress),
        Side::Egress if named.is_empty() => match &spec.egress {
            None => false,
            Some(Parsed::Valid(rules)) => !rules.is_empty(),
            Some(Parsed::Invalid(_)) => true,
        },
        Side::Egress => named.contains(&&PolicyType::Egress),
    }
}

type List<T> = Option<Parsed<Vec<Parsed<T>>>>;

/// Returns the positions of the rules that allow the connection.
fn allowing_rules(
    world: &World<'_>,
    policy: &NetworkPolicy,
    side: Side,
    subject: &Pod,
    connection: &Connection<'_>,
) -> Vec<usize> {
    let Some(spec) = policy.spec.valid() else { return Vec::new() };
    let allows = |peers: &List<Peer>, ports: &List<PolicyPort>| {
        let mut pairs = entries(peers)
            .into_iter()
            .flat_map(|peer| entries(ports).into_iter().map(move |port| (peer, port)));
        pairs.any(|(peer, port)| {
            let peer_fits = peer.is_none_or(|peer| {
                peer_matches(world, &policy.metadata.namespace, peer, side, connection)
            });
            let port_fits =
                port.is_none_or(|port| port_matches(world, port, side, subject, connection));
            peer_fits && port_fits && !(side == Side::Egress && is_named_port_of_block(peer, port))
        })
    };
    let mut found = Vec::new();
    match side {
        Side::Ingress => {
            let Some(Parsed::Valid(rules)) = &spec.ingress else { return found };
            for (index, rule) in rules.iter().enumerate() {
                if rule.valid().is_some_and(|rule| allows(&rule.from, &rule.ports)) {
                    found.push(index);
                }
            }
        }
        Side::Egress => {
            let Some(Parsed::Valid(rules)) = &spec.egress else { return found };
            for (index, rule) in rules.iter().enumerate() {
                if rule.valid().is_some_and(|rule| allows(&rule.to, &rule.ports)) {
                    found.push(index);
                }
            }
        }
    }
    found
}

/// Returns the readable entries of a list; for an absent or empty list, `None`, which stands for
/// everything.
fn entries<T>(list: &List<T>) -> Vec<Option<&T>> {
    match list {
        None => vec![None],
        Some(Parsed::Invalid(_)) => Vec::new(),
        Some(Parsed::Valid(entries)) if entries.is_empty() => vec![None],
        Some(Parsed::Valid(entries)) => {
            entries.iter().filter_map(Parsed::valid).map(Some).collect()
        }
    }
}

/// Returns whether a named port is combined with an address block. A block has no pods that could
/// declare the name.
fn is_named_port_of_block(peer: Option<&Peer>, port: Option<&PolicyPort>) -> bool {
    let named = port.is_some_and(|port| matches!(port.port, PortSelector::Named(_)));
    named && matches!(peer, Some(Peer::IpBlock(_)))
}

fn peer_matches(
    world: &World<'_>,
    own_namespace: &str,
    peer: &Peer,
    side: Side,
    connection: &Connection<'_>,
) -> bool {
    let address = peer_address(side, connection);
    let pod = world.owner(address);
    match peer {
        Peer::IpBlock(block) => block.valid().is_some_and(|block| {
            let excepted = block.except.iter().any(|except| except.net().contains(&address));
            block.cidr.net().contains(&address) && !excepted
        }),
        Peer::Pods(pods) => pod.zip(pods.valid()).is_some_and(|(pod, pods)| {
            pod.metadata.namespace == own_namespace && selects(pods, &pod.metadata.labels)
        }),
        Peer::Namespaces { namespaces, pods } => {
            let all = LabelSelector::default();
            let pods = match pods {
                None => Some(&all),
                Some(pods) => pods.valid(),
            };
            let (Some(pod), Some(namespaces), Some(pods)) = (pod, namespaces.valid(), pods) else {
                return false;
            };
            selects_pod(world, namespaces, pods, pod)
        }
    }
}

fn port_matches(
    world: &World<'_>,
    entry: &PolicyPort,
    side: Side,
    subject: &Pod,
    connection: &Connection<'_>,
) -> bool {
    let Some((protocol, port)) = connection.transport else { return false };
    protocol == entry.protocol
        && match &entry.port {
            PortSelector::All => true,
            PortSelector::Range(range) => (range.start..=range.end).contains(&port),
            PortSelector::Named(name) => serves(world, side, subject, connection, name),
        }
}
