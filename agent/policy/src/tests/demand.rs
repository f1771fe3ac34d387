//! Demand for pods: sufficiency for the program, and quarantine while denied peers are unknown.

use std::collections::BTreeSet;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::generate::{Cluster, OVERLAY, POD_NETWORKS, SMALL, address, cluster, pod_id, read};
use crate::api::{LabelSelector, Pod, PodIp};
use crate::compile::Families;
use crate::engine::{Engine, PodScope};
use crate::model::PodId;
use crate::program::Verdict;

/// Returns an engine with everything but pods.
fn engine(cluster: &Cluster) -> Engine {
    let mut engine = Engine::new(Families::BOTH);
    engine.set_pod_networks(&POD_NETWORKS.map(|net| net.parse().unwrap()), &OVERLAY.map(address));
    cluster.namespaces.iter().for_each(|one| engine.upsert_namespace(one));
    cluster.nodes.iter().for_each(|one| engine.upsert_node(one));
    for policy in &cluster.network_policies {
        engine.upsert_network_policy(policy);
    }
    for policy in &cluster.cluster_policies {
        engine.upsert_cluster_policy(policy);
    }
    engine
}

/// Returns whether a pod belongs to one of the scopes, as an API server would decide.
fn is_in(scopes: &BTreeSet<PodScope>, pod: &Pod) -> bool {
    scopes.iter().any(|scope| match scope {
        PodScope::All => true,
        PodScope::Namespace(name) => *name == pod.metadata.namespace,
        PodScope::Labelled(selector) => matches_text(selector, pod),
    })
}

/// Evaluates the text of a `labelSelector`.
fn matches_text(selector: &str, pod: &Pod) -> bool {
    let mut rest = selector;
    let mut requirements = Vec::new();
    while !rest.is_empty() {
        let in_list = rest.find('(').is_some_and(|open| rest.find(',').is_none_or(|at| open < at));
        let end = match in_list {
            true => rest.find(')').unwrap() + 1,
            false => rest.find(',').unwrap_or(rest.len()),
        };
        requirements.push(&rest[..end]);
        rest = rest[end..].trim_start_matches(',');
    }
    requirements.iter().all(|requirement| {
        let value = |key: &str| pod.metadata.labels.get(key).map(String::as_str);
        let list = |text: &str| -> Vec<String> {
            text.trim_matches(['(', ')']).split(',').map(str::to_owned).collect()
        };
        if let Some((key, values)) = requirement.split_once(" in ") {
            return value(key).is_some_and(|value| list(values).iter().any(|one| one == value));
        }
        if let Some((key, values)) = requirement.split_once(" notin ") {
            return value(key).is_none_or(|value| list(values).iter().all(|one| one != value));
        }
        match (requirement.strip_prefix('!'), requirement.split_once('=')) {
            (Some(key), _) => value(key).is_none(),
            (None, Some((key, wanted))) => value(key) == Some(wanted),
            (None, None) => value(requirement).is_some(),
        }
    })
}

/// Gives each pod addresses of its own.
fn separate(cluster: &mut Cluster) {
    for (index, pod) in cluster.pods.iter_mut().enumerate() {
        let ips = [format!("10.1.{index}.1"), format!("fd00:1::{index}:1")];
        let kept = pod.status.pod_ips.len().min(2);
        pod.status.pod_ips = ips.into_iter().take(kept).map(|ip| PodIp { ip }).collect();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn demanded_pods_suffice_for_the_program(
        mut cluster in cluster(SMALL),
        local in prop::collection::vec(prop::bool::weighted(0.4), 6),
        awaits in any::<bool>(),
    ) {
        separate(&mut cluster);
        let is_local = |index: usize| local[index % local.len()];
        let (mut all, mut needed) = (engine(&cluster), engine(&cluster));
        if awaits {
            needed.set_complete(Some(BTreeSet::new()));
        }
        for (index, pod) in cluster.pods.iter().enumerate() {
            all.upsert_pod(pod);
            if is_local(index) {
                needed.upsert_pod(pod);
            }
        }
        for (index, pod) in cluster.pods.iter().enumerate().filter(|(index, _)| is_local(*index)) {
            all.attach(&format!("skp{index}"), pod_id(pod));
            needed.attach(&format!("skp{index}"), pod_id(pod));
        }
        // Rules of a profile that was awaited make a demand of their own.
        for _ in 0..2 {
            if let Some(demand) = needed.take_demand() {
                cluster.pods.iter().filter(|pod| is_in(&demand, pod)).for_each(|pod| {
                    needed.upsert_pod(pod);
                });
                if awaits {
                    needed.set_complete(Some(demand));
                }
            }
        }
        prop_assert_eq!(needed.take_demand(), None, "the demand must not depend on its pods");
        prop_assert_eq!(needed.program(), all.program());
    }
}

fn demand_of(ingress: Value) -> BTreeSet<PodScope> {
    let mut engine = Engine::new(Families::BOTH);
    for (name, team) in [("shop", "a"), ("web", "a"), ("other", "b")] {
        engine.upsert_namespace(&read(json!({
            "metadata": { "name": name, "labels": { "team": team } }
        })));
    }
    engine.upsert_pod(&pod("shop", "one", "10.1.0.1"));
    engine.upsert_network_policy(&read(json!({
        "metadata": { "namespace": "shop", "name": "p" },
        "spec": { "podSelector": {}, "policyTypes": ["Ingress", "Egress"], "ingress": [ingress],
            "egress": [] },
    })));
    engine.attach("skp1", PodId { namespace: "shop".into(), name: "one".into() });
    engine.take_demand().unwrap()
}

fn pod(namespace: &str, name: &str, ip: &str) -> Pod {
    read(json!({
        "metadata": { "namespace": namespace, "name": name },
        "status": { "phase": "Running", "podIPs": [{ "ip": ip }] },
    }))
}

#[test]
fn demand_names_the_narrowest_scopes() {
    let scopes = |names: &[&str]| -> BTreeSet<PodScope> {
        names.iter().map(|name| PodScope::Namespace((*name).into())).collect()
    };
    let cases = [
        (json!({}), BTreeSet::new()),
        (json!({ "from": [{ "namespaceSelector": {} }] }), BTreeSet::new()),
        (json!({ "from": [{ "podSelector": {} }] }), scopes(&["shop"])),
        (
            json!({ "from": [{ "namespaceSelector": { "matchLabels": { "team": "a" } } }] }),
            scopes(&["shop", "web"]),
        ),
        (
            json!({ "from": [{ "namespaceSelector": {}, "podSelector": {
                "matchLabels": { "app": "dns" },
                "matchExpressions": [{ "key": "tier", "operator": "NotIn", "values": ["x", "y"] }],
            } }] }),
            BTreeSet::from([PodScope::Labelled("app=dns,tier notin (x,y)".into())]),
        ),
    ];
    for (rule, expected) in cases {
        assert_eq!(demand_of(rule.clone()), expected, "{rule}");
    }
}

#[test]
fn selector_that_no_request_can_carry_demands_all_pods() {
    let selector = |value: String| {
        json!({ "from": [{ "namespaceSelector": {}, "podSelector": {
            "matchLabels": { "app": value }
        } }] })
    };
    for value in ["a,b".to_owned(), "a)".to_owned(), "x".repeat(2000)] {
        assert_eq!(demand_of(selector(value.clone())), BTreeSet::from([PodScope::All]), "{value}");
    }
    assert_eq!(LabelSelector::default(), read(json!({})));
}

#[test]
fn new_pod_is_in_quarantine_until_denied_peers_are_complete() {
    let mut engine = Engine::new(Families::BOTH);
    engine.set_complete(Some(BTreeSet::new()));
    engine.upsert_namespace(&read(json!({ "metadata": { "name": "shop" } })));
    engine.upsert_namespace(&read(json!({
        "metadata": { "name": "bad", "labels": { "team": "bad" } }
    })));
    engine.upsert_pod(&pod("shop", "one", "10.1.0.1"));
    engine.upsert_pod(&pod("shop", "two", "10.1.0.2"));
    engine.attach("skp1", PodId { namespace: "shop".into(), name: "one".into() });
    assert_eq!(engine.program().to["skp1"], Verdict::Accept, "No policy applies to the pod.");
    engine.upsert_cluster_policy(&read(json!({
        "metadata": { "name": "c" },
        "spec": {
            "tier": "Admin", "priority": 1, "subject": { "namespaces": {} },
            "ingress": [{ "action": "Deny", "from": [
                { "namespaces": { "matchLabels": { "team": "bad" } } }
            ] }],
        },
    })));
    engine.attach("skp2", PodId { namespace: "shop".into(), name: "two".into() });
    assert_eq!(engine.program().to["skp1"], Verdict::Accept, "The present profile stays.");
    assert_eq!(engine.program().to["skp2"], Verdict::Refuse, "The new pod is in quarantine.");
    assert_eq!(engine.program().from["skp2"], Verdict::Accept, "Nothing denies outgoing traffic.");
    let bad = BTreeSet::from([PodScope::Namespace("bad".into())]);
    assert_eq!(engine.take_demand(), Some(bad.clone()));
    engine.upsert_pod(&pod("bad", "three", "10.1.0.3"));
    engine.set_complete(Some(bad));
    for interface in ["skp1", "skp2"] {
        assert!(matches!(engine.program().to[interface], Verdict::Goto(_)), "{interface}");
    }
    assert_eq!(engine.take_demand(), None, "The scope stays in demand.");
    engine.detach("skp1");
    engine.detach("skp2");
    assert_eq!(engine.take_demand(), Some(BTreeSet::new()));
}
