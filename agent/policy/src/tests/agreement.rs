//! Agreement of the oracle and the interpreter for every connection of a cluster.

use std::net::IpAddr;

use proptest::prelude::*;
use proptest::test_runner::{TestCaseError, TestCaseResult};

use super::generate::{CROWDED, Cluster, OUTSIDE, OVERLAY, PORTS, SMALL, Size, address, cluster};
use crate::api::{Pod, Protocol};
use crate::compile::{Families, compile};
use crate::interpret::{Judgement, Packet, judge_forwarded, judge_to_node};
use crate::model::{Direction, PolicyId};
use crate::oracle::{Connection, Reason, Ruling};
use crate::program::{Attribution, Program};

/// An end of a connection: a pod of this node with its interface, or an address elsewhere.
pub(super) type End<'a> = (Option<(String, &'a Pod)>, IpAddr);

/// Returns all ends of connections.
pub(super) fn ends(cluster: &Cluster) -> Vec<End<'_>> {
    let mut ends = Vec::new();
    for (interface, pod) in cluster.local() {
        ends.extend(pod.addresses().map(|address| (Some((interface.clone(), pod)), address)));
    }
    let ended = cluster.pods.iter().filter(|pod| !pod.is_on_pod_network());
    let nodes = cluster.nodes.iter().flat_map(|node| node.addresses());
    let elsewhere = OUTSIDE.iter().chain(&OVERLAY).map(|text| address(text));
    let others = ended.flat_map(Pod::addresses).chain(nodes).chain(elsewhere);
    ends.extend(others.map(|address| (None, address)));
    ends
}

/// Returns the transports to try: all protocols with each port, and a protocol without ports.
pub(super) fn transports(size: Size) -> Vec<Option<(Protocol, u16)>> {
    let mut ports = PORTS.to_vec();
    ports.extend(83..83 + size.extra_ports);
    let mut transports = vec![None];
    for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
        transports.extend(ports.iter().map(|port| Some((protocol, *port))));
    }
    transports
}

/// Compares oracle and interpreter for every pair of ends, protocol and port.
pub(super) fn check(cluster: &Cluster, program: &Program, size: Size) -> TestCaseResult {
    let ends = ends(cluster);
    let own_node: Vec<_> = cluster.nodes[0].addresses().collect();
    for (from, source) in &ends {
        for (to, destination) in &ends {
            if source.is_ipv4() != destination.is_ipv4() || (from.is_none() && to.is_none()) {
                continue;
            }
            for transport in transports(size) {
                let to_own_node = to.is_none() && own_node.contains(destination);
                let connection = Connection {
                    from: from.as_ref().map(|(_, pod)| *pod),
                    to: to.as_ref().map(|(_, pod)| *pod),
                    source: *source,
                    destination: *destination,
                    transport,
                    to_own_node,
                };
                let packet = Packet {
                    input: from.as_ref().map(|(interface, _)| interface.clone()),
                    output: to.as_ref().map(|(interface, _)| interface.clone()),
                    source: *source,
                    destination: *destination,
                    transport,
                };
                compare(cluster, program, &connection, &packet)?;
            }
        }
    }
    Ok(())
}

fn compare(
    cluster: &Cluster,
    program: &Program,
    connection: &Connection<'_>,
    packet: &Packet,
) -> TestCaseResult {
    let world = cluster.world();
    let egress = match connection.to_own_node {
        true => judge_to_node(program, packet),
        false => judge_forwarded(program, Direction::Egress, packet),
    };
    let ingress = judge_forwarded(program, Direction::Ingress, packet);
    let pairs = [
        ("egress", world.egress(connection), egress),
        ("ingress", world.ingress(connection), ingress),
    ];
    for (direction, ruling, judgement) in pairs {
        if ruling.allowed != judgement.accepted || !agrees(&ruling, &judgement) {
            return Err(TestCaseError::fail(format!(
                "{direction} of {packet:?}: the oracle says {ruling:?}, the interpreter {judgement:?}"
            )));
        }
    }
    Ok(())
}

/// Returns whether the interpreter names the same rules or policies as the oracle.
fn agrees(ruling: &Ruling, judgement: &Judgement<'_>) -> bool {
    match (&ruling.reason, judgement.attribution) {
        (Reason::NoPolicy | Reason::Itself, None) => true,
        // A `Pass` of the last tier accepts; the oracle does not name the rule.
        (Reason::NoPolicy, Some(Attribution::Rules(_, rules))) => {
            rules.iter().all(|rule| matches!(rule.policy, PolicyId::ClusterNetworkPolicy { .. }))
        }
        (Reason::ClusterRule(name, index), Some(Attribution::Rules(_, rules))) => {
            let policy = PolicyId::ClusterNetworkPolicy { name: name.clone() };
            rules.len() == 1 && rules[0].policy == policy && rules[0].index == *index
        }
        (Reason::NetworkRules(allowing), Some(Attribution::Rules(_, rules))) => {
            rules.iter().any(|rule| match &rule.policy {
                PolicyId::NetworkPolicy { namespace, name } => {
                    allowing.contains(&(namespace.clone(), name.clone(), rule.index))
                }
                PolicyId::ClusterNetworkPolicy { .. } => false,
            })
        }
        (Reason::Isolated(isolating), Some(Attribution::Isolated(_, policies))) => {
            let same = |(namespace, name): &(String, String)| {
                let (namespace, name) = (namespace.clone(), name.clone());
                policies.contains(&PolicyId::NetworkPolicy { namespace, name })
            };
            isolating.len() == policies.len() && isolating.iter().all(same)
        }
        _ => false,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn interpreter_agrees_with_oracle(cluster in cluster(SMALL)) {
        let program = compile(&cluster.inventory(), Families::BOTH);
        check(&cluster, &program, SMALL)?;
    }

    #[test]
    fn merged_and_dispatched_rules_agree_with_oracle(cluster in cluster(CROWDED)) {
        let program = compile(&cluster.inventory(), Families::BOTH);
        check(&cluster, &program, CROWDED)?;
    }
}

#[test]
fn crowded_clusters_have_merged_rules_and_port_maps() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;

    let mut runner = TestRunner::deterministic();
    let (mut merged, mut dispatched) = (0, 0);
    for _ in 0..32 {
        let cluster = cluster(CROWDED).new_tree(&mut runner).unwrap().current();
        let program = compile(&cluster.inventory(), Families::BOTH);
        let is_merged = |counted: &Attribution| match counted {
            Attribution::Rules(_, rules) => rules.len() > 1,
            Attribution::Isolated(..) => false,
        };
        merged += usize::from(program.counters.values().any(is_merged));
        dispatched += usize::from(!program.port_maps.is_empty());
    }
    assert!(merged > 3 && dispatched > 3, "{merged} with merged rules, {dispatched} with maps");
}
