//! Reading of API objects, readable and unreadable.

#![allow(clippy::unwrap_used)]

use serde_json::{Value, json};

use super::*;

fn policy(spec: Value) -> NetworkPolicySpec {
    let object = json!({ "metadata": { "name": "p", "namespace": "x" }, "spec": spec });
    let policy: NetworkPolicy = serde_json::from_value(object).unwrap();
    policy.spec.valid().unwrap().clone()
}

fn ingress_peers(peers: Value) -> Vec<Parsed<Peer>> {
    let spec = policy(json!({ "ingress": [{ "from": peers }] }));
    let rules = spec.ingress.unwrap();
    let rule = rules.valid().unwrap()[0].valid().unwrap();
    rule.from.clone().unwrap().valid().unwrap().clone()
}

fn ports(ports: Value) -> Vec<Parsed<PolicyPort>> {
    let spec = policy(json!({ "egress": [{ "ports": ports }] }));
    let rules = spec.egress.unwrap();
    let rule = rules.valid().unwrap()[0].valid().unwrap();
    rule.ports.clone().unwrap().valid().unwrap().clone()
}

fn reason<T>(parsed: &Parsed<T>) -> &str {
    match parsed {
        Parsed::Valid(_) => panic!("the value is readable"),
        Parsed::Invalid(reason) => reason,
    }
}

#[test]
fn absent_policy_types_follow_the_server_default() {
    let isolates = |spec| {
        let spec = policy(spec);
        (spec.isolates(PolicyType::Ingress), spec.isolates(PolicyType::Egress))
    };
    assert_eq!(isolates(json!({})), (true, false));
    assert_eq!(isolates(json!({ "egress": [] })), (true, false));
    assert_eq!(isolates(json!({ "egress": [{}] })), (true, true));
    assert_eq!(isolates(json!({ "policyTypes": [], "egress": null })), (true, false));
    assert_eq!(isolates(json!({ "policyTypes": ["Egress"], "ingress": [{}] })), (false, true));
    assert_eq!(isolates(json!({ "policyTypes": ["Egress", "Sideways"] })), (false, true));
}

#[test]
fn peer_types_differ_by_the_fields_that_are_set() {
    let peers = ingress_peers(json!([
        { "podSelector": {} },
        { "namespaceSelector": {} },
        { "podSelector": {}, "namespaceSelector": {} },
        { "ipBlock": { "cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"] } },
        {},
        { "podSelector": null },
        { "podSelector": {}, "ipBlock": { "cidr": "10.0.0.0/8" } },
        { "podSelector": {}, "serviceAccountSelector": {} },
    ]));
    assert!(matches!(peers[0], Parsed::Valid(Peer::Pods(Parsed::Valid(_)))));
    assert!(matches!(peers[1], Parsed::Valid(Peer::Namespaces { pods: None, .. })));
    assert!(matches!(peers[2], Parsed::Valid(Peer::Namespaces { pods: Some(_), .. })));
    assert!(matches!(peers[3], Parsed::Valid(Peer::IpBlock(Parsed::Valid(_)))));
    for unreadable in &peers[4..] {
        assert!(unreadable.valid().is_none(), "{unreadable:?}");
    }
    assert!(reason(&peers[7]).contains("serviceAccountSelector"), "{}", reason(&peers[7]));
}

#[test]
fn unreadable_selector_leaves_the_other_peers_readable() {
    let selector =
        |expression: Value| json!({ "podSelector": { "matchExpressions": [expression] } });
    let peers = ingress_peers(json!([
        selector(json!({ "key": "a", "operator": "Like", "values": ["b"] })),
        selector(json!({ "key": "a", "operator": "In" })),
        selector(json!({ "key": "a", "operator": "Exists", "values": ["b"] })),
        selector(json!({ "key": "a", "operator": "NotIn", "values": ["b"] })),
        { "podSelector": { "matchFields": {} } },
    ]));
    let selectors: Vec<_> = peers
        .iter()
        .map(|peer| match peer {
            Parsed::Valid(Peer::Pods(selector)) => selector,
            other => panic!("{other:?} is no pod selector"),
        })
        .collect();
    assert_eq!(reason(selectors[0]), "operator \"Like\" of key \"a\" is unknown");
    assert_eq!(reason(selectors[1]), "operator In of key \"a\" needs values");
    assert_eq!(reason(selectors[2]), "operator Exists of key \"a\" takes no values");
    assert!(selectors[3].valid().is_some(), "{:?}", selectors[3]);
    assert!(reason(selectors[4]).contains("matchFields"), "{}", reason(selectors[4]));
}

#[test]
fn cidr_clears_host_bits_and_reads_leading_zeros() {
    let read = |text: &str| text.parse::<Cidr>().map(|cidr| cidr.to_string());
    assert_eq!(read("10.0.0.5/24").unwrap(), "10.0.0.0/24");
    assert_eq!(read("010.001.0.0/016").unwrap(), "10.1.0.0/16");
    assert_eq!(read("2001:db8::1/32").unwrap(), "2001:db8::/32");
    assert_eq!(read("::/0").unwrap(), "::/0");
    assert_eq!(read("::ffff:10.0.0.0/104"), Err(CidrError::Mapped("::ffff:10.0.0.0/104".into())));
    for text in ["", "10.0.0.0", "10.0.0.0/33", "10.0.0/8", "10.0.0.0/+8", "1.2.3.4.5/8", "::/129"]
    {
        assert_eq!(read(text), Err(CidrError::Malformed(text.to_owned())));
    }
}

#[test]
fn block_with_unreadable_exception_is_unreadable() {
    let block = json!({ "cidr": "10.0.0.0/8", "except": ["10.1.0.0/40"] });
    let peers = ingress_peers(json!([{ "ipBlock": block }]));
    let Parsed::Valid(Peer::IpBlock(block)) = &peers[0] else { panic!("{peers:?}") };
    assert!(reason(block).contains("10.1.0.0/40"), "{}", reason(block));
}

#[test]
fn policy_ports_default_to_tcp_and_all_ports() {
    let ports = ports(json!([
        {},
        { "protocol": "UDP", "port": 53 },
        { "protocol": "SCTP", "port": "diameter" },
        { "port": 8000, "endPort": 8010 },
    ]));
    let expected = [
        (Protocol::Tcp, PortSelector::All),
        (Protocol::Udp, PortSelector::Range(PortRange::single(53))),
        (Protocol::Sctp, PortSelector::Named("diameter".to_owned())),
        (Protocol::Tcp, PortSelector::Range(PortRange { start: 8000, end: 8010 })),
    ];
    for (port, (protocol, selector)) in ports.iter().zip(expected) {
        let port = port.valid().unwrap();
        assert_eq!((port.protocol, &port.port), (protocol, &selector));
    }
}

#[test]
fn ports_that_the_server_refuses_are_unreadable() {
    let entries = json!([
        { "protocol": "ICMP" },
        { "port": 0 },
        { "port": 65536 },
        { "port": 1.5 },
        { "port": "80" },
        { "port": "http", "endPort": 90 },
        { "endPort": 90 },
        { "port": 80, "endPort": 79 },
        { "port": true },
        { "port": 80, "icmpType": 8 },
    ]);
    for port in ports(entries) {
        assert!(port.valid().is_none(), "{port:?}");
    }
}

fn cluster_policy(spec: Value) -> Parsed<ClusterNetworkPolicySpec> {
    let object = json!({ "metadata": { "name": "p" }, "spec": spec });
    serde_json::from_value::<ClusterNetworkPolicy>(object).unwrap().spec
}

fn cluster_spec(egress: Value) -> Value {
    let subject = json!({ "namespaces": {} });
    json!({ "tier": "Admin", "priority": 10, "subject": subject, "egress": egress })
}

#[test]
fn cluster_policy_reads_peers_and_protocols() {
    let spec = cluster_policy(cluster_spec(json!([{
        "name": "all",
        "action": "Deny",
        "to": [
            { "namespaces": {} },
            { "pods": { "namespaceSelector": {}, "podSelector": { "matchLabels": { "a": "b" } } } },
            { "nodes": {} },
            { "networks": ["10.0.0.0/8", "2001:db8::/129"] },
        ],
        "protocols": [
            { "tcp": { "destinationPort": { "number": 80 } } },
            { "udp": { "destinationPort": { "range": { "start": 1, "end": 2 } } } },
            { "sctp": {} },
            { "destinationNamedPort": "http" },
        ],
    }])));
    let spec = spec.valid().unwrap();
    let rule = spec.egress[0].valid().unwrap();
    assert!(rule.is_understood(), "an unreadable CIDR is no unknown type: {rule:?}");
    let Parsed::Valid(EgressPeer::Networks(networks)) = &rule.peers[3] else { panic!("{rule:?}") };
    assert_eq!(networks.iter().filter(|cidr| cidr.valid().is_some()).count(), 1);
    assert_eq!(rule.protocols.len(), 4);
}

#[test]
fn unknown_parts_of_cluster_rules_are_not_understood() {
    let rule = |rule: Value| {
        let spec = cluster_policy(cluster_spec(json!([rule])));
        spec.valid().unwrap().egress[0].valid().unwrap().is_understood()
    };
    let peer = json!({ "namespaces": {} });
    assert!(rule(json!({ "action": "Deny", "to": [peer] })));
    for unknown in [json!({}), json!({ "domainNames": ["a.example"] }), json!({ "services": {} })] {
        assert!(!rule(json!({ "action": "Deny", "to": [unknown] })));
    }
    assert!(!rule(json!({ "action": "Deny", "to": [{ "namespaces": {}, "nodes": {} }] })));
    assert!(!rule(json!({ "action": "Deny", "to": [peer], "protocols": [{ "icmp": {} }] })));
    assert!(!rule(json!({ "action": "Deny", "to": [peer], "schedule": "night" })));
    assert!(!rule(json!({ "action": "Deny", "to": [peer], "from": [peer] })));
}

#[test]
fn unreadable_specification_is_kept_with_its_reason() {
    let spec = cluster_spec(json!([]));
    for (field, value) in [("tier", json!("Middle")), ("priority", json!(1001))] {
        let mut spec = spec.clone();
        spec[field] = value;
        assert!(cluster_policy(spec).valid().is_none(), "{field} is readable");
    }
    let unnamed: Result<NetworkPolicy, _> = serde_json::from_value(json!({ "metadata": {} }));
    assert!(unnamed.is_err(), "an object without a name cannot be reported");
}

#[test]
fn pod_reads_sidecars_addresses_and_phase() {
    let pod: Pod = serde_json::from_value(json!({
        "metadata": { "name": "a", "namespace": "x", "labels": null },
        "spec": {
            "containers": [{ "ports": [
                { "name": "http", "containerPort": 80 },
                { "name": "bad", "containerPort": 80, "protocol": "ICMP" },
            ] }],
            "initContainers": [
                { "ports": [{ "name": "init", "containerPort": 81 }] },
                { "restartPolicy": "Always", "ports": [{ "name": "side", "containerPort": 82 }] },
            ],
        },
        "status": { "phase": "Running", "podIPs": [{ "ip": "10.0.0.1" }, { "ip": "fd00::1" }, { "ip": "" }] },
    }))
    .unwrap();
    let names: Vec<_> = pod.ports().filter_map(|port| port.name.as_deref()).collect();
    assert_eq!(names, ["http", "side"]);
    assert_eq!(pod.addresses().count(), 2);
    assert!(pod.is_on_pod_network());
    let ended = PodStatus { phase: "Succeeded".to_owned(), ..PodStatus::default() };
    assert!(!Pod { status: ended, ..Pod::default() }.is_on_pod_network());
}
