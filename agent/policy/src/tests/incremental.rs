//! Equality of incremental and full compilation.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::generate::{
    OVERLAY, POD_NETWORKS, SMALL, address, cluster_policy, interface, namespace_name,
    network_policy, pod, read,
};
use crate::api::Pod;
use crate::compile::{Families, compile};
use crate::engine::Engine;
use crate::model::{PodId, PolicyId};
use crate::program::{Difference, Program};

/// A change of the cluster. Objects have a small number as their name.
#[derive(Debug, Clone)]
pub(super) enum Step {
    Pod(u8, Value),
    RemovePod(u8, usize),
    Namespace(usize, Value),
    RemoveNamespace(usize),
    Node(u8, Value),
    RemoveNode(u8),
    NetworkPolicy(u8, Value),
    RemoveNetworkPolicy(u8, usize),
    ClusterPolicy(u8, Value),
    RemoveClusterPolicy(u8),
    Attach(usize, u8, usize),
    Accept(usize),
    Detach(usize),
    Networks(bool),
}

pub(super) fn step() -> impl Strategy<Value = Step> {
    let labels = || prop::collection::btree_map("k[01]", "v[01]", 0..3).prop_map(|all| json!(all));
    prop_oneof![
        8 => (0..6_u8, pod()).prop_map(|(name, pod)| Step::Pod(name, pod)),
        2 => (0..6_u8, 0..3_usize).prop_map(|(name, namespace)| Step::RemovePod(name, namespace)),
        3 => (0..3_usize, labels()).prop_map(|(name, labels)| Step::Namespace(name, labels)),
        1 => (0..3_usize).prop_map(Step::RemoveNamespace),
        1 => (0..2_u8, labels()).prop_map(|(name, labels)| Step::Node(name, labels)),
        1 => (0..2_u8).prop_map(Step::RemoveNode),
        6 => (0..4_u8, network_policy(SMALL)).prop_map(|(name, one)| Step::NetworkPolicy(name, one)),
        2 => (0..4_u8, 0..3_usize).prop_map(|(name, at)| Step::RemoveNetworkPolicy(name, at)),
        4 => (0..3_u8, cluster_policy()).prop_map(|(name, one)| Step::ClusterPolicy(name, one)),
        2 => (0..3_u8).prop_map(Step::RemoveClusterPolicy),
        6 => (0..4_usize, 0..6_u8, 0..3_usize).prop_map(|(at, pod, ns)| Step::Attach(at, pod, ns)),
        1 => (0..4_usize).prop_map(Step::Accept),
        1 => (0..4_usize).prop_map(Step::Detach),
        1 => any::<bool>().prop_map(Step::Networks),
    ]
}

fn named(mut object: Value, name: u8) -> Value {
    object["metadata"]["name"] = json!(format!("o{name}"));
    object
}

fn pod_id(name: u8, namespace: usize) -> PodId {
    PodId { namespace: namespace_name(namespace).to_owned(), name: format!("o{name}") }
}

/// Applies `step` to `engine`.
pub(super) fn take(engine: &mut Engine, step: Step) {
    match step {
        Step::Pod(name, pod) => engine.upsert_pod(&read::<Pod>(named(pod, name))),
        Step::RemovePod(name, namespace) => engine.remove_pod(&pod_id(name, namespace)),
        Step::Namespace(name, labels) => engine.upsert_namespace(&read(json!({
            "metadata": { "name": namespace_name(name), "labels": labels }
        }))),
        Step::RemoveNamespace(name) => engine.remove_namespace(namespace_name(name)),
        Step::Node(name, labels) => engine.upsert_node(&read(json!({
            "metadata": { "name": format!("o{name}"), "labels": labels },
            "status": { "addresses": [{ "address": format!("192.0.2.{name}") }] },
        }))),
        Step::RemoveNode(name) => engine.remove_node(&format!("o{name}")),
        Step::NetworkPolicy(name, policy) => {
            engine.upsert_network_policy(&read(named(policy, name)));
        }
        Step::RemoveNetworkPolicy(name, namespace) => {
            let namespace = namespace_name(namespace).to_owned();
            engine.remove_policy(&PolicyId::NetworkPolicy { namespace, name: format!("o{name}") });
        }
        Step::ClusterPolicy(name, policy) => {
            engine.upsert_cluster_policy(&read(named(policy, name)));
        }
        Step::RemoveClusterPolicy(name) => {
            engine.remove_policy(&PolicyId::ClusterNetworkPolicy { name: format!("o{name}") });
        }
        Step::Attach(at, pod, namespace) => {
            engine.attach(&interface(at), pod_id(pod, namespace));
        }
        Step::Accept(at) => engine.accept(&interface(at)),
        Step::Detach(at) => engine.detach(&interface(at)),
        Step::Networks(all) => {
            let networks = POD_NETWORKS.map(|net| net.parse().unwrap());
            let networks = if all { &networks[..] } else { &networks[..1] };
            engine.set_pod_networks(networks, &OVERLAY.map(address));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn differences_in_order_give_the_full_program(
        steps in prop::collection::vec((step(), any::<bool>()), 1..40),
    ) {
        let mut engine = Engine::new(Families::BOTH);
        let mut applied = Program::default();
        for (step, commit) in steps {
            take(&mut engine, step);
            let full = compile(engine.inventory(), Families::BOTH);
            prop_assert_eq!(engine.program(), &full, "the engine's program is not the full one");
            if commit {
                let difference = engine.take_difference();
                let expected = Difference::between(&applied, &full);
                prop_assert_eq!(&difference, &expected, "the difference is not the smallest");
                applied.apply(&difference);
                prop_assert_eq!(&applied, &full, "the difference does not lead to the program");
            }
        }
    }
}
