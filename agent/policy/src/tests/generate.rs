//! Random clusters with policies, as JSON that the API types read.

use std::net::IpAddr;

use proptest::prelude::*;
use serde_json::{Value, json};

use crate::api::{ClusterNetworkPolicy, Namespace, NetworkPolicy, Node, Pod};
use crate::model::{Inventory, PodId};
use crate::oracle;

/// Pod CIDRs of all generated clusters.
pub(super) const POD_NETWORKS: [&str; 2] = ["10.1.0.0/16", "fd00:1::/64"];
/// Addresses of nodes in the pod CIDRs.
pub(super) const OVERLAY: [&str; 4] = ["10.1.255.0", "fd00:1::ff00", "10.1.255.1", "fd00:1::ff01"];
/// Addresses outside the cluster.
pub(super) const OUTSIDE: [&str; 2] = ["198.51.100.7", "2001:db8:f::7"];
/// Ports of generated policies and connections.
pub(super) const PORTS: [u16; 4] = [80, 81, 82, 8080];

/// A generated cluster.
#[derive(Debug, Clone)]
pub(super) struct Cluster {
    pub(super) namespaces: Vec<Namespace>,
    pub(super) pods: Vec<Pod>,
    pub(super) nodes: Vec<Node>,
    pub(super) network_policies: Vec<NetworkPolicy>,
    pub(super) cluster_policies: Vec<ClusterNetworkPolicy>,
}

/// Numbers of generated objects.
#[derive(Debug, Clone, Copy)]
pub(super) struct Size {
    pub(super) pods: usize,
    pub(super) network_policies: usize,
    pub(super) cluster_policies: usize,
    /// Number of ports, from 80 on, that policies refer to in addition to [`PORTS`]. With extra
    /// ports, all policies isolate all pods of the first namespace.
    pub(super) extra_ports: u16,
}

/// A few objects of each kind.
pub(super) const SMALL: Size =
    Size { pods: 6, network_policies: 4, cluster_policies: 3, extra_ports: 0 };
/// Many policies for few pods, so that the compiler merges rules and dispatches by port.
pub(super) const CROWDED: Size =
    Size { pods: 3, network_policies: 40, cluster_policies: 0, extra_ports: 14 };

impl Cluster {
    pub(super) fn world(&self) -> oracle::World<'_> {
        oracle::World {
            namespaces: &self.namespaces,
            pods: &self.pods,
            nodes: &self.nodes,
            network_policies: &self.network_policies,
            cluster_policies: &self.cluster_policies,
        }
    }

    /// Returns an inventory in which all pods of the pod network are pods of this node.
    pub(super) fn inventory(&self) -> Inventory {
        let mut inventory = Inventory::default();
        let networks = POD_NETWORKS.map(|net| net.parse().unwrap());
        inventory.set_pod_networks(&networks, &OVERLAY.map(|address| address.parse().unwrap()));
        self.namespaces.iter().for_each(|one| inventory.upsert_namespace(one));
        self.nodes.iter().for_each(|one| inventory.upsert_node(one));
        self.pods.iter().for_each(|one| inventory.upsert_pod(one));
        for policy in &self.network_policies {
            inventory.upsert_network_policy(policy);
        }
        for policy in &self.cluster_policies {
            inventory.upsert_cluster_policy(policy);
        }
        for (interface, pod) in self.local() {
            inventory.attach(&interface, pod_id(pod));
        }
        inventory
    }

    /// Returns the pods of this node with their interfaces.
    pub(super) fn local(&self) -> impl Iterator<Item = (String, &Pod)> {
        let local = self.pods.iter().enumerate().filter(|(_, pod)| pod.is_on_pod_network());
        local.map(|(index, pod)| (interface(index), pod))
    }
}

pub(super) fn interface(pod: usize) -> String {
    format!("skp{pod}")
}

pub(super) fn pod_id(pod: &Pod) -> PodId {
    PodId { namespace: pod.metadata.namespace.clone(), name: pod.metadata.name.clone() }
}

/// Reads an object from JSON.
pub(super) fn read<T: serde::de::DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).unwrap()
}

pub(super) fn cluster(size: Size) -> impl Strategy<Value = Cluster> {
    let namespaces = prop::collection::vec(labels(), 3);
    let pods = prop::collection::vec(pod(), 1..=size.pods);
    let nodes = prop::collection::vec(labels(), 2);
    let is_crowded = size.extra_ports > 0;
    let least = if is_crowded { size.network_policies / 2 } else { 0 };
    let network = prop::collection::vec(network_policy(size), least..=size.network_policies);
    let cluster = prop::collection::vec(cluster_policy(), 0..=size.cluster_policies);
    (namespaces, pods, nodes, network, cluster).prop_map(
        move |(namespaces, mut pods, nodes, network, cluster)| {
            if is_crowded {
                pods[0]["metadata"]["namespace"] = json!(namespace_name(0));
            }
            Cluster {
                namespaces: namespaces.into_iter().enumerate().map(namespace).collect(),
                pods: pods.into_iter().enumerate().map(finish_pod).collect(),
                nodes: nodes.into_iter().enumerate().map(node).collect(),
                network_policies: named(network),
                cluster_policies: named(cluster),
            }
        },
    )
}

fn named<T: serde::de::DeserializeOwned>(policies: Vec<Value>) -> Vec<T> {
    let finish = |(index, mut policy): (usize, Value)| {
        policy["metadata"]["name"] = json!(format!("p{index}"));
        read(policy)
    };
    policies.into_iter().enumerate().map(finish).collect()
}

pub(super) fn namespace_name(index: usize) -> &'static str {
    ["x", "y", "z"][index % 3]
}

fn namespace((index, labels): (usize, Value)) -> Namespace {
    read(json!({ "metadata": { "name": namespace_name(index), "labels": labels } }))
}

fn node((index, labels): (usize, Value)) -> Node {
    let mut addresses = vec![
        json!({ "address": format!("node-{index}") }),
        json!({ "address": format!("192.0.2.{index}") }),
    ];
    addresses.push(json!({ "address": format!("2001:db8::{index}") }));
    for overlay in &OVERLAY[index * 2..index * 2 + 2] {
        addresses.push(json!({ "address": overlay }));
    }
    let name = format!("node-{index}");
    read(
        json!({ "metadata": { "name": name, "labels": labels }, "status": { "addresses": addresses } }),
    )
}

fn finish_pod((index, mut pod): (usize, Value)) -> Pod {
    pod["metadata"]["name"] = json!(format!("pod-{index}"));
    read(pod)
}

fn labels() -> impl Strategy<Value = Value> {
    prop::collection::btree_map("k[01]", "v[01]", 0..3).prop_map(|labels| json!(labels))
}

fn protocol() -> impl Strategy<Value = &'static str> {
    prop_oneof![Just("TCP"), Just("UDP"), Just("SCTP")]
}

fn port(extra: u16) -> impl Strategy<Value = u16> {
    let first = prop::sample::select(&PORTS[..]);
    match extra {
        0 => first.boxed(),
        extra => prop_oneof![1 => first, 4 => 80..80 + extra].boxed(),
    }
}

fn port_name() -> impl Strategy<Value = &'static str> {
    prop_oneof![3 => Just("http"), 3 => Just("dns"), 1 => Just("nobody")]
}

fn container_port() -> impl Strategy<Value = Value> {
    (port_name(), protocol(), port(0)).prop_map(|(name, protocol, port)| {
        json!({ "name": name, "protocol": protocol, "containerPort": port })
    })
}

/// A pod without a name. The addresses of pods may collide.
pub(super) fn pod() -> impl Strategy<Value = Value> {
    let ports = prop::collection::vec(container_port(), 0..3);
    let sidecar = prop::collection::vec(container_port(), 0..2);
    let restart = prop_oneof![Just(json!("Always")), Just(Value::Null)];
    let spec = (ports, sidecar, restart, prop::bool::weighted(0.05)).prop_map(
        |(ports, sidecar, restart, host)| {
            json!({
                "hostNetwork": host,
                "containers": [{ "ports": ports }],
                "initContainers": [{ "restartPolicy": restart, "ports": sidecar }],
            })
        },
    );
    let families = prop_oneof![3 => Just(3_u8), 1 => Just(1), 1 => Just(2)];
    let phase = prop_oneof![9 => Just("Running"), 1 => Just("Succeeded"), 1 => Just("Failed")];
    let all = (0..3_usize, labels(), spec, families, 0..12_u8, phase, 0..3_u8);
    all.prop_map(|(namespace, labels, spec, families, host, phase, start)| {
        let (v4, v6) = match (spec["hostNetwork"].as_bool(), phase) {
            (Some(true), _) => ("192.0.2.1".to_owned(), "2001:db8::1".to_owned()),
            // The pod CIDRs stand for all pods: no address of an ended pod may be in them.
            (_, "Running") => (format!("10.1.0.{host}"), format!("fd00:1::{host}")),
            _ => (format!("10.9.0.{host}"), format!("fd00:9::{host}")),
        };
        let mut addresses = Vec::new();
        if families & 1 != 0 {
            addresses.push(json!({ "ip": v4 }));
        }
        if families & 2 != 0 {
            addresses.push(json!({ "ip": v6 }));
        }
        json!({
            "metadata": { "namespace": namespace_name(namespace), "labels": labels },
            "spec": spec,
            "status": {
                "phase": phase,
                "podIPs": addresses,
                "startTime": format!("2026-12-01T00:00:0{start}Z"),
            },
        })
    })
}

fn requirement() -> impl Strategy<Value = Value> {
    let values = prop::collection::btree_set("v[01]", 1..3);
    ("k[01]", 0..4_u8, values).prop_map(|(key, operator, values)| match operator {
        0 => json!({ "key": key, "operator": "In", "values": values }),
        1 => json!({ "key": key, "operator": "NotIn", "values": values }),
        2 => json!({ "key": key, "operator": "Exists" }),
        _ => json!({ "key": key, "operator": "DoesNotExist" }),
    })
}

fn selector() -> impl Strategy<Value = Value> {
    prop_oneof![
        4 => Just(json!({})),
        4 => labels().prop_map(|labels| json!({ "matchLabels": labels })),
        5 => prop::collection::vec(requirement(), 1..3)
            .prop_map(|all| json!({ "matchExpressions": all })),
        1 => Just(json!({ "matchExpressions": [{ "key": "k0", "operator": "Like" }] })),
    ]
}

fn namespace_selector() -> impl Strategy<Value = Value> {
    prop_oneof![
        4 => selector(),
        1 => (0..3_usize).prop_map(|index| {
            json!({ "matchLabels": { "kubernetes.io/metadata.name": namespace_name(index) } })
        }),
    ]
}

const CIDRS: [&str; 13] = [
    "0.0.0.0/0",
    "10.1.0.0/16",
    "10.1.0.0/30",
    "10.1.0.6/31",
    "10.1.0.9/29",
    "198.51.100.0/24",
    "192.0.2.0/32",
    "10.1.255.0/24",
    "::/0",
    "fd00:1::/125",
    "fd00:1::4/126",
    "2001:db8::/32",
    "10.1.0.0/99",
];

fn cidr() -> impl Strategy<Value = &'static str> {
    prop::sample::select(&CIDRS[..])
}

fn peer() -> impl Strategy<Value = Value> {
    let excepts = prop::collection::vec(cidr(), 0..3);
    prop_oneof![
        5 => selector().prop_map(|pods| json!({ "podSelector": pods })),
        3 => namespace_selector().prop_map(|one| json!({ "namespaceSelector": one })),
        3 => (namespace_selector(), selector()).prop_map(|(namespaces, pods)| {
            json!({ "namespaceSelector": namespaces, "podSelector": pods })
        }),
        4 => (cidr(), excepts).prop_map(|(cidr, except)| {
            json!({ "ipBlock": { "cidr": cidr, "except": except } })
        }),
        1 => Just(json!({})),
        1 => Just(json!({ "podSelector": {}, "serviceAccount": "a" })),
    ]
}

fn policy_port(size: Size) -> impl Strategy<Value = Value> {
    let extra = size.extra_ports;
    prop_oneof![
        1 => protocol().prop_map(|protocol| json!({ "protocol": protocol })),
        5 => (protocol(), port(extra)).prop_map(|(protocol, port)| {
            json!({ "protocol": protocol, "port": port })
        }),
        2 => port(extra).prop_map(|port| json!({ "port": port })),
        2 => (protocol(), port(extra), prop::sample::select(&[0_u16, 1, 2, 30][..])).prop_map(
            |(protocol, port, more)| {
                json!({ "protocol": protocol, "port": port, "endPort": port + more })
            }
        ),
        4 => (protocol(), port_name()).prop_map(|(protocol, name)| {
            json!({ "protocol": protocol, "port": name })
        }),
        1 => Just(json!({ "port": 0 })),
    ]
}

fn list(entry: impl Strategy<Value = Value>) -> impl Strategy<Value = Value> {
    prop_oneof![
        1 => Just(Value::Null),
        1 => Just(json!([])),
        6 => prop::collection::vec(entry, 1..4).prop_map(Value::from),
    ]
}

fn rules(size: Size, peers: &'static str) -> impl Strategy<Value = Value> {
    let rule = (list(peer()), list(policy_port(size)))
        .prop_map(move |(list, ports)| json!({ peers: list, "ports": ports }));
    prop_oneof![
        1 => Just(Value::Null),
        6 => prop::collection::vec(rule, 0..3).prop_map(Value::from),
    ]
}

/// A NetworkPolicy without a name.
pub(super) fn network_policy(size: Size) -> impl Strategy<Value = Value> {
    let types = prop_oneof![
        Just(Value::Null),
        Just(json!(["Ingress"])),
        Just(json!(["Egress"])),
        Just(json!(["Ingress", "Egress"])),
        Just(json!(["Sideways"])),
    ];
    let all = (0..3_usize, selector(), types, rules(size, "from"), rules(size, "to"));
    all.prop_map(move |(mut namespace, mut pods, mut types, ingress, egress)| {
        if size.extra_ports > 0 {
            (namespace, pods) = (0, json!({}));
            types = json!(["Ingress", "Egress"]);
        }
        json!({
            "metadata": { "namespace": namespace_name(namespace) },
            "spec": {
                "podSelector": pods,
                "policyTypes": types,
                "ingress": ingress,
                "egress": egress,
            },
        })
    })
}

fn namespaced() -> impl Strategy<Value = Value> {
    prop_oneof![
        namespace_selector().prop_map(|one| json!({ "namespaces": one })),
        (namespace_selector(), selector()).prop_map(|(namespaces, pods)| {
            json!({ "pods": { "namespaceSelector": namespaces, "podSelector": pods } })
        }),
    ]
}

fn cluster_peer(egress: bool) -> impl Strategy<Value = Value> {
    let address = prop_oneof![
        prop::collection::vec(cidr(), 1..3).prop_map(|all| json!({ "networks": all })),
        selector().prop_map(|nodes| json!({ "nodes": nodes })),
    ];
    let weight = if egress { 4 } else { 1 };
    prop_oneof![
        6 => namespaced(),
        weight => address,
        1 => Just(json!({ "domainNames": ["a.example"] })),
    ]
}

fn transport() -> impl Strategy<Value = Value> {
    let key = prop_oneof![Just("tcp"), Just("udp"), Just("sctp")];
    prop_oneof![
        2 => key.clone().prop_map(|key| json!({ key: {} })),
        4 => (key.clone(), port(0)).prop_map(|(key, port)| {
            json!({ key: { "destinationPort": { "number": port } } })
        }),
        2 => key.prop_map(|key| {
            json!({ key: { "destinationPort": { "range": { "start": 81, "end": 9000 } } } })
        }),
        3 => port_name().prop_map(|name| json!({ "destinationNamedPort": name })),
        1 => Just(json!({ "tcp": { "destinationPort": { "number": 0 } } })),
        1 => Just(json!({ "icmp": {} })),
    ]
}

fn cluster_rules(egress: bool) -> impl Strategy<Value = Value> {
    let action = prop_oneof![Just("Accept"), Just("Deny"), Just("Pass")];
    let peers = prop::collection::vec(cluster_peer(egress), 0..3);
    let protocols = prop_oneof![
        Just(Value::Null),
        prop::collection::vec(transport(), 1..3).prop_map(Value::from),
    ];
    let rule = (action, peers, protocols).prop_map(move |(action, peers, protocols)| {
        let field = if egress { "to" } else { "from" };
        json!({ "action": action, field: peers, "protocols": protocols })
    });
    prop::collection::vec(rule, 0..4).prop_map(Value::from)
}

/// A ClusterNetworkPolicy without a name.
pub(super) fn cluster_policy() -> impl Strategy<Value = Value> {
    let tier = prop_oneof![Just("Admin"), Just("Baseline")];
    let all = (tier, 0..3_u16, namespaced(), cluster_rules(false), cluster_rules(true));
    all.prop_map(|(tier, priority, subject, ingress, egress)| {
        json!({
            "metadata": {},
            "spec": {
                "tier": tier,
                "priority": priority,
                "subject": subject,
                "ingress": ingress,
                "egress": egress,
            },
        })
    })
}

/// Returns an address from its text.
pub(super) fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}
