//! Chains of a profile: Admin rules, then NetworkPolicies or, for a pod that is not isolated,
//! Baseline rules.

use std::collections::BTreeMap;

use crate::api::Protocol;
use crate::model::{Action, Direction, Mutation, Peers, Policy, PortSpec, Ports, mutated};
use crate::program::{Attribution, Match, RuleRef, Statement, Verdict};

use super::Tiers;
use super::profile::Builder;

/// Maximum number of rules with equal ports that keep a counter of their own. More rules are
/// merged, so that the cost of a packet does not grow with the number of policies.
pub(super) const MAX_SEPARATE_RULES: usize = 8;
/// Maximum number of port lists that a packet is compared with one by one.
pub(super) const MAX_PORT_LISTS: usize = 8;
/// Maximum number of ports of a range that become entries of a port map.
const MAX_EXPANDED_PORTS: u16 = 8;

/// Compiles the chains. Returns two verdicts: the first one for forwarded packets, the second one
/// for packets to this node itself. The second verdict exists only for outgoing traffic, and only
/// if a rule of a ClusterNetworkPolicy can match an address of a node ([`concerns_nodes`]).
pub(super) fn compile(builder: &mut Builder<'_>) -> (Verdict, Option<Verdict>) {
    let policies = builder.key.policies.clone();
    let tiers = Tiers::of(&policies);
    let baseline = if tiers.baseline.is_empty() {
        Verdict::Accept
    } else {
        let mut statements = cluster_statements(builder, &tiers.baseline, &Verdict::Accept);
        statements.push(always(None, Verdict::Accept));
        builder.chain(statements)
    };
    let rest = if tiers.network.is_empty() {
        baseline.clone()
    } else {
        let statements = network_statements(builder, &tiers.network, &baseline);
        builder.chain(statements)
    };
    let entry = admin(builder, &tiers.admin, &rest);
    if builder.key.direction == Direction::Ingress || !concerns_nodes(&tiers) {
        return (entry, None);
    }
    let to_node = if tiers.network.is_empty() { baseline } else { Verdict::Accept };
    let to_node = admin(builder, &tiers.admin, &to_node);
    (entry, Some(to_node))
}

/// Returns whether an outgoing rule of a ClusterNetworkPolicy can match an address of a node.
fn concerns_nodes(tiers: &Tiers<'_>) -> bool {
    let policies = tiers.admin.iter().chain(&tiers.baseline);
    let mut rules = policies.flat_map(|policy| policy.rules(Direction::Egress).unwrap_or(&[]));
    rules
        .any(|rule| rule.peers.any || !rule.peers.blocks.is_empty() || !rule.peers.nodes.is_empty())
}

/// Compiles the Admin tier in front of the verdict of the next tier.
fn admin(builder: &mut Builder<'_>, policies: &[&Policy], next: &Verdict) -> Verdict {
    if policies.is_empty() {
        return next.clone();
    }
    // Only tests activate mutations, which are deliberate faults.
    let pass = match mutated(Mutation::PassSkipsNetworkPolicies) {
        true => Verdict::Accept,
        false => next.clone(),
    };
    let mut statements = cluster_statements(builder, policies, &pass);
    statements.push(always(None, next.clone()));
    builder.chain(statements)
}

fn always(counter: Option<String>, verdict: Verdict) -> Statement {
    Statement { matches: Vec::new(), counter, verdict }
}

/// Returns the statements of ClusterNetworkPolicies in their order.
fn cluster_statements(
    builder: &mut Builder<'_>,
    policies: &[&Policy],
    pass: &Verdict,
) -> Vec<Statement> {
    let mut statements = Vec::new();
    for policy in policies {
        for rule in policy.rules(builder.key.direction).unwrap_or(&[]) {
            let verdict = match rule.action {
                Action::Accept => &Verdict::Accept,
                Action::Deny => &Verdict::Refuse,
                Action::Pass => pass,
            };
            let reference = reference(policy, rule.index, &rule.name);
            let ports = builder.canonical(&rule.ports);
            statements.extend(builder.statements(vec![reference], &rule.peers, &ports, verdict));
        }
    }
    statements
}

fn reference(policy: &Policy, index: usize, name: &str) -> RuleRef {
    RuleRef { policy: policy.id.clone(), index, name: name.to_owned() }
}

/// A rule of a NetworkPolicy, or several with the same ports.
struct Allow {
    rules: Vec<RuleRef>,
    peers: Peers,
}

/// Returns the statements of the NetworkPolicies that isolate a pod.
fn network_statements(
    builder: &mut Builder<'_>,
    policies: &[&Policy],
    baseline: &Verdict,
) -> Vec<Statement> {
    let direction = builder.key.direction;
    let mut lists: BTreeMap<Ports, Vec<Allow>> = BTreeMap::new();
    for policy in policies {
        for rule in policy.rules(direction).unwrap_or(&[]) {
            let ports = builder.canonical(&rule.ports);
            if ports != Ports::List(Vec::new()) && !rule.peers.is_empty() {
                let rules = vec![reference(policy, rule.index, &rule.name)];
                let allow = Allow { rules, peers: rule.peers.clone() };
                lists.entry(ports).or_default().push(allow);
            }
        }
    }
    // No NetworkPolicy can block the connection of a pod to itself.
    let hairpin =
        Statement { counter: None, matches: vec![Match::Hairpin], verdict: Verdict::Accept };
    let mut statements = vec![hairpin];
    if lists.len() > MAX_PORT_LISTS {
        let (by_port, rest) = split(lists);
        lists = rest;
        let chains = by_port.into_iter().map(|(port, allows)| {
            let statements = allow_statements(builder, allows, &Ports::Any);
            (port, builder.add_chain(statements))
        });
        let chains = chains.collect();
        statements.push(always(None, Verdict::Dispatch(builder.port_map(chains))));
    }
    for (ports, allows) in lists {
        statements.extend(allow_statements(builder, allows, &ports));
    }
    if mutated(Mutation::BaselineForIsolated) && *baseline != Verdict::Accept {
        statements.push(always(None, baseline.clone()));
    }
    let isolating = policies.iter().map(|policy| policy.id.clone()).collect();
    let counter = builder.counter(Attribution::Isolated(direction, isolating));
    statements.push(always(Some(counter), Verdict::Refuse));
    statements
}

/// Returns the statements of rules with equal ports; many rules are merged into one.
fn allow_statements(
    builder: &mut Builder<'_>,
    mut allows: Vec<Allow>,
    ports: &Ports,
) -> Vec<Statement> {
    if allows.len() > MAX_SEPARATE_RULES {
        let mut merged = Allow { rules: Vec::new(), peers: Peers::default() };
        for allow in allows {
            merged.rules.extend(allow.rules);
            merged.peers = merged.peers.union(&allow.peers);
        }
        allows = vec![merged];
    }
    let allows = allows.into_iter();
    let of = |allow: Allow| builder.statements(allow.rules, &allow.peers, ports, &Verdict::Accept);
    allows.flat_map(of).collect()
}

/// Rules by single port.
type ByPort = BTreeMap<(Protocol, u16), Vec<Allow>>;

/// Splits port lists into single ports, which a map can dispatch, and the rest.
fn split(lists: BTreeMap<Ports, Vec<Allow>>) -> (ByPort, BTreeMap<Ports, Vec<Allow>>) {
    let (mut by_port, mut rest) = (ByPort::new(), BTreeMap::<_, Vec<_>>::new());
    for (ports, allows) in lists {
        let Ports::List(entries) = ports else {
            rest.insert(ports, allows);
            continue;
        };
        let is_short = |entry: &PortSpec| match entry {
            PortSpec::Range(_, range) => range.end - range.start < MAX_EXPANDED_PORTS,
            PortSpec::Protocol(_) | PortSpec::Named(..) => false,
        };
        let (short, long): (Vec<_>, Vec<_>) = entries.into_iter().partition(is_short);
        for allow in allows {
            for entry in &short {
                let PortSpec::Range(protocol, range) = entry else { continue };
                for port in range.start..=range.end {
                    let Allow { rules, peers } = &allow;
                    let allow = Allow { rules: rules.clone(), peers: peers.clone() };
                    by_port.entry((*protocol, port)).or_default().push(allow);
                }
            }
            if !long.is_empty() {
                rest.entry(Ports::List(long.clone())).or_default().push(allow);
            }
        }
    }
    (by_port, rest)
}
