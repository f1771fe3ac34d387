//! Cost of changes in a cluster with 1,000 policies and 10,000 pods, of which 100 are this node's.

#![allow(clippy::unwrap_used, missing_docs)]

use divan::Bencher;
use serde_json::json;
use skein_policy::api::{NetworkPolicy, Pod};
use skein_policy::compile::{Families, compile};
use skein_policy::engine::Engine;
use skein_policy::model::PodId;
use skein_policy::program::Program;
use skein_policy::render::{Mode, Table, install};

const PODS: usize = 10_000;
const POLICIES: usize = 1_000;
const NAMESPACES: usize = 50;
const LOCAL: usize = 100;

fn main() {
    divan::main();
}

fn pod(number: usize, version: usize) -> Pod {
    let [high, low] = u16::try_from(number).unwrap().to_be_bytes();
    serde_json::from_value(json!({
        "metadata": {
            "name": format!("pod-{number}"),
            "namespace": format!("ns-{}", number % NAMESPACES),
            "labels": {
                "app": format!("app-{}", number % 200),
                "version": format!("v{version}"),
                "pod": format!("pod-{number}"),
            },
        },
        "spec": { "containers": [{ "ports": [{ "name": "http", "containerPort": 8080 }] }] },
        "status": {
            "phase": "Running",
            "podIPs": [{ "ip": format!("10.1.{high}.{low}") }, { "ip": format!("fd00:1::{number:x}") }],
        },
    }))
    .unwrap()
}

/// A policy that allows connections from an application of the same namespace, and to an
/// application of the namespaces with a label.
fn policy(number: usize, version: usize) -> NetworkPolicy {
    let app = |number: usize| format!("app-{}", number % 200);
    serde_json::from_value(json!({
        "metadata": {
            "name": format!("policy-{number}"), "namespace": format!("ns-{}", number % NAMESPACES),
        },
        "spec": {
            "podSelector": { "matchLabels": { "app": app(number) } },
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{
                "from": [{ "podSelector": { "matchLabels": { "app": app(number + 50) } } }],
                "ports": [{ "port": "http" }],
            }],
            "egress": [{
                "to": [{
                    "namespaceSelector": { "matchLabels": { "team": format!("t{}", number % 10) } },
                    "podSelector": { "matchLabels": { "app": app(number + version) } },
                }],
                "ports": [{ "port": 443 }, { "protocol": "UDP", "port": 53 }],
            }],
        },
    }))
    .unwrap()
}

fn engine() -> Engine {
    let mut engine = Engine::new(Families::BOTH);
    engine.set_pod_networks(&["10.1.0.0/16".parse().unwrap(), "fd00:1::/64".parse().unwrap()], &[]);
    for number in 0..NAMESPACES {
        let labels = json!({ "team": format!("t{}", number % 10) });
        let metadata = json!({ "name": format!("ns-{number}"), "labels": labels });
        engine.upsert_namespace(&serde_json::from_value(json!({ "metadata": metadata })).unwrap());
    }
    (0..PODS).for_each(|number| engine.upsert_pod(&pod(number, 0)));
    for number in 0..POLICIES {
        engine.upsert_network_policy(&policy(number, 0));
    }
    for number in 0..LOCAL {
        let number = number * (PODS / LOCAL);
        let (namespace, name) = (format!("ns-{}", number % NAMESPACES), format!("pod-{number}"));
        engine.attach(&format!("skp{number}"), PodId { namespace, name });
    }
    engine.take_difference();
    engine
}

/// Each iteration changes two labels of a pod: `version`, which no policy selects, and `app`, which
/// policies select. The argument says whether the pod runs on this node.
#[divan::bench(args = ["remote", "local"])]
fn label_of_a_pod_changes(bencher: Bencher<'_, '_>, which: &str) {
    let mut engine = engine();
    let number = if which == "local" { 0 } else { 50 };
    let mut version = 0;
    bencher.bench_local(|| {
        version += 1;
        let mut changed = pod(number, version);
        let app = format!("app-{}", 50 + version % 2);
        changed.metadata.labels.insert("app".to_owned(), app);
        engine.upsert_pod(&changed);
        engine.take_difference()
    });
}

#[divan::bench]
fn pod_comes_and_goes(bencher: Bencher<'_, '_>) {
    let mut engine = engine();
    let pod = pod(PODS, 0);
    let (namespace, name) = (pod.metadata.namespace.clone(), pod.metadata.name.clone());
    let id = PodId { namespace, name };
    bencher.bench_local(|| {
        engine.upsert_pod(&pod);
        let added = engine.take_difference();
        engine.remove_pod(&id);
        (added, engine.take_difference())
    });
}

#[divan::bench]
fn policy_changes(bencher: Bencher<'_, '_>) {
    let mut engine = engine();
    let mut version = 0;
    bencher.bench_local(|| {
        version += 1;
        engine.upsert_network_policy(&policy(0, version % 2));
        engine.take_difference()
    });
}

#[divan::bench(sample_count = 10)]
fn full_compilation(bencher: Bencher<'_, '_>) {
    let engine = engine();
    bencher.bench_local(|| compile(engine.inventory(), Families::BOTH));
}

#[divan::bench(sample_count = 10)]
fn text_of_the_whole_table(bencher: Bencher<'_, '_>) {
    let engine = engine();
    let program: &Program = engine.program();
    let table = Table {
        name: "skein-policy".to_owned(),
        pod_prefix: "skp".to_owned(),
        log_group: 51,
        mode: Mode::Enforce,
    };
    bencher.bench_local(|| install(&table, program));
}
