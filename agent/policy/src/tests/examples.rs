//! Single cases: reports of unreadable parts, quarantine, and the size of differences.

use std::collections::BTreeMap;

use serde_json::json;

use super::generate::{address, read};
use crate::api::Pod;
use crate::compile::Families;
use crate::engine::Engine;
use crate::interpret::{Packet, judge_forwarded, judge_to_node};
use crate::model::{Direction, Inventory, PodId};
use crate::program::{Change, Element, Verdict};

#[test]
fn unreadable_parts_are_reported_with_object_and_field() {
    let mut inventory = Inventory::default();
    let (_, defects) = inventory.upsert_network_policy(&read(json!({
        "metadata": { "name": "web", "namespace": "shop" },
        "spec": {
            "podSelector": { "matchExpressions": [{ "key": "a", "operator": "Like" }] },
            "policyTypes": ["Ingress", "Sideways"],
            "ingress": [
                { "from": [{ "podSelector": {} }, { "ipBlock": { "cidr": "10.0.0.0/40" } }, {}] },
                { "ports": [{ "port": 80 }, { "port": 0 }] },
                { "sources": [] },
            ],
        },
    })));
    let fields: Vec<_> = defects.iter().map(|defect| defect.field.as_str()).collect();
    assert_eq!(
        fields,
        [
            "spec.podSelector",
            "spec.policyTypes[1]",
            "spec.ingress[2]",
            "spec.ingress[0].from[2]",
            "spec.ingress[0].from[1].ipBlock",
            "spec.ingress[1].ports[1]",
        ]
    );
    assert_eq!(
        defects[4].to_string(),
        "NetworkPolicy shop/web: spec.ingress[0].from[1].ipBlock: \"10.0.0.0/40\" is not a CIDR"
    );

    let (_, defects) = inventory.upsert_cluster_policy(&read(json!({
        "metadata": { "name": "deny" },
        "spec": {
            "tier": "Admin",
            "priority": 1,
            "subject": { "namespaces": {} },
            "egress": [{
                "action": "Deny",
                "to": [{ "networks": ["10.0.0.0/8", "ten"] }, { "domainNames": ["a.example"] }],
                "protocols": [{ "tcp": { "destinationPort": { "number": 0 } } }, { "icmp": {} }],
                "schedule": "night",
            }],
        },
    })));
    let fields: Vec<_> = defects.iter().map(|defect| defect.field.as_str()).collect();
    assert_eq!(
        fields,
        [
            "spec.egress[0].schedule",
            "spec.egress[0].to[1]",
            "spec.egress[0].to[0].networks[1]",
            "spec.egress[0].protocols[1]",
            "spec.egress[0].protocols[0].tcp.destinationPort",
        ]
    );
}

fn pod(app: &str, ip: &str) -> Pod {
    read(json!({
        "metadata": { "name": app, "namespace": "shop", "labels": { "app": app } },
        "status": { "phase": "Running", "podIPs": [{ "ip": ip }] },
    }))
}

fn id(name: &str) -> PodId {
    PodId { namespace: "shop".to_owned(), name: name.to_owned() }
}

/// Returns an engine with the namespace, and with a policy that lets `front` connect to `web`.
fn engine() -> Engine {
    let mut engine = Engine::new(Families::BOTH);
    engine.upsert_namespace(&read(json!({ "metadata": { "name": "shop" } })));
    engine.upsert_network_policy(&read(json!({
        "metadata": { "name": "web", "namespace": "shop" },
        "spec": {
            "podSelector": { "matchLabels": { "app": "web" } },
            "ingress": [{ "from": [{ "podSelector": { "matchLabels": { "app": "front" } } }] }],
        },
    })));
    engine
}

#[test]
fn unknown_pod_is_in_quarantine_until_its_labels_are_known() {
    let mut engine = engine();
    engine.attach("skp1", id("web"));
    let packet = Packet {
        input: Some("skp1".to_owned()),
        output: Some("skp1".to_owned()),
        source: address("10.1.0.1"),
        destination: address("10.1.0.2"),
        transport: None,
    };
    let forwarded = |engine: &Engine| {
        [Direction::Egress, Direction::Ingress]
            .map(|direction| judge_forwarded(engine.program(), direction, &packet).accepted)
    };
    assert_eq!(forwarded(&engine), [false, false], "labels are not known");
    assert!(judge_to_node(engine.program(), &packet).accepted, "the node is reachable");
    engine.upsert_pod(&pod("web", "10.1.0.1"));
    assert_eq!(forwarded(&engine), [true, true], "a pod may connect to itself");
    engine.remove_pod(&id("web"));
    assert_eq!(forwarded(&engine), [false, false], "the pod is gone, its interface is not");
}

#[test]
fn interface_without_a_profile_is_refused() {
    let packet = Packet {
        input: Some("skp9".to_owned()),
        output: None,
        source: address("10.1.0.1"),
        destination: address("198.51.100.1"),
        transport: None,
    };
    let engine = engine();
    assert!(!judge_forwarded(engine.program(), Direction::Egress, &packet).accepted);
    assert!(judge_forwarded(engine.program(), Direction::Ingress, &packet).accepted);
}

#[test]
fn change_of_a_peer_pod_changes_one_element() {
    let mut engine = engine();
    engine.upsert_pod(&pod("web", "10.1.0.1"));
    engine.attach("skp1", id("web"));
    engine.take_difference();
    engine.upsert_pod(&pod("front", "10.1.0.2"));
    let difference = engine.take_difference();
    let elements: Vec<_> = difference.elements.values().collect();
    let added = BTreeMap::from([(Element::Address(address("10.1.0.2")), true)]);
    assert_eq!(elements, [&added]);
    assert!(difference.chains.is_empty() && difference.from.is_empty() && difference.to.is_empty());

    let mut other = pod("front", "10.1.0.2");
    other.metadata.labels.clear();
    engine.upsert_pod(&other);
    let difference = engine.take_difference();
    let removed = BTreeMap::from([(Element::Address(address("10.1.0.2")), false)]);
    assert_eq!(difference.elements.values().collect::<Vec<_>>(), [&removed]);
    engine.upsert_pod(&other);
    assert!(engine.take_difference().is_empty(), "the same object changes nothing");
}

#[test]
fn change_of_a_policy_replaces_chain_and_map_element() {
    let mut engine = engine();
    engine.upsert_pod(&pod("web", "10.1.0.1"));
    engine.attach("skp1", id("web"));
    engine.take_difference();
    engine.upsert_network_policy(&read(json!({
        "metadata": { "name": "web", "namespace": "shop" },
        "spec": { "podSelector": { "matchLabels": { "app": "web" } }, "ingress": [] },
    })));
    let difference = engine.take_difference();
    assert_eq!(difference.chains.len(), 2, "one chain is new, one is removed: {difference:?}");
    assert!(matches!(difference.to["skp1"], Change::Replaced(Verdict::Goto(_))));
    assert!(difference.from.is_empty(), "the other direction stays: {difference:?}");
}
