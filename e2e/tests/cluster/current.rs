//! Tests on a current Kubernetes: DaemonSets surge, tokens are bound to pods, and the API server
//! has admission policies. `SKEIN_KUBERNETES` names the directory of its programs; only `cargo e2e
//! cluster test` runs these tests.

use std::collections::BTreeSet;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use skein_cluster::skein::{self, NAMESPACE, Pings, Pod, agent_pod};
use skein_cluster::{Kube, Options};
use skein_lab::cargo;
use skein_lab::process;

/// Chart value that every installation sets.
const POD_CIDR: &str = "podCidr=10.244.0.0/16";
/// Maximum time of a rollout.
const ROLLOUT_TIMEOUT: Duration = Duration::from_secs(120);
/// Interval between two pings.
const PING_INTERVAL: Duration = Duration::from_millis(20);
/// Time during which an upgrade with a wrong value must make no progress.
const OBSERVATION_TIME: Duration = Duration::from_secs(20);

/// Installs Skein on three nodes.
fn with(work: impl FnOnce(&mut Kube, Vec<Pod>) -> Result<()>) -> Result<()> {
    skein::with(&Options { nodes: 3, ..Options::default() }, &[POD_CIDR], work)
}

fn get(kube: &Kube, what: &[&str]) -> Result<Value> {
    let words = [&["get", "--output=json"], what].concat();
    Ok(serde_json::from_str(&kube.kubectl(&words)?)?)
}

/// A pod of the DaemonSet.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Agent {
    name: String,
    node: String,
    ready: bool,
}

fn agents(kube: &Kube) -> Result<BTreeSet<Agent>> {
    let pods = get(
        kube,
        &["pods", "--namespace", NAMESPACE, "--selector=app.kubernetes.io/component=agent"],
    )?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let agent = |pod: &Value| {
        let mut conditions = pod["status"]["conditions"].as_array().into_iter().flatten();
        Agent {
            name: text(&pod["metadata"]["name"]),
            node: text(&pod["spec"]["nodeName"]),
            ready: conditions.any(|of| of["type"] == "Ready" && of["status"] == "True"),
        }
    };
    Ok(pods["items"].as_array().into_iter().flatten().map(agent).collect())
}

/// Runs `helm upgrade` with one more value, without waiting for the pods.
fn upgrade(kube: &Kube, value: &str) -> Result<()> {
    let chart = cargo::workspace().join("charts/skein");
    let chart = chart.to_string_lossy();
    let values = ["image.pullPolicy=Never", POD_CIDR, value];
    let mut words = vec!["upgrade", "skein", &*chart, "--namespace", NAMESPACE];
    words.extend(values.iter().flat_map(|value| ["--set", value]));
    kube.helm(&words).map(drop)
}

fn roll_back(kube: &Kube) -> Result<()> {
    kube.helm(&["rollback", "skein", "--namespace", NAMESPACE]).map(drop)
}

/// Waits until the rollout is complete and only the new pods remain.
fn wait_for_rollout(kube: &mut Kube) -> Result<()> {
    let status = ["--namespace", NAMESPACE, "rollout", "status", "daemonset/skein"];
    kube.kubectl(&[&status[..], &["--timeout=120s"]].concat())?;
    let nodes = kube.nodes.len();
    kube.wait("each node has one ready pod of Skein", ROLLOUT_TIMEOUT, |kube| {
        let agents = agents(kube)?;
        Ok(agents.len() == nodes && agents.iter().all(|agent| agent.ready))
    })
    .map(drop)
}

/// Starts pings from each pod to the pod of the next node.
fn start_pings(kube: &Kube, pods: &[Pod]) -> Result<Vec<Pings>> {
    let next = pods.iter().cycle().skip(1);
    let pairs = pods.iter().zip(next);
    let all = pairs.map(|(from, to)| from.start_pings(kube, to.ips[0], 60_000, PING_INTERVAL));
    let all = all.collect::<Result<_>>()?;
    thread::sleep(Duration::from_secs(1));
    Ok(all)
}

fn check_no_loss(what: &str, pings: Vec<Pings>) -> Result<()> {
    thread::sleep(Duration::from_secs(1));
    for (pair, pings) in pings.into_iter().enumerate() {
        let loss = pings.stop()?;
        println!("{what}, pair {}: {loss}", pair + 1);
        ensure!(loss.lost == 0, "{what}: Packets were lost: {loss}");
    }
    Ok(())
}

/// Wrong values, and the reason that the new pod reports for each.
const WRONG: [(&str, &str); 3] = [
    ("podCidr=10.99.0.0/16", "is outside of cluster_cidrs (10.99.0.0/16)"),
    ("endpointInterface=eth/0", "kubernetes.endpoint_interface = \"eth/0\""),
    ("metrics.port=10250", ":10250: the port is in use"),
];

#[test]
#[ignore = "takes a cluster: cargo e2e cluster test"]
fn wrong_value_stops_at_the_first_node() -> Result<()> {
    with(|kube, pods| WRONG.iter().try_for_each(|wrong| stops(kube, &pods, *wrong)))
}

fn stops(kube: &mut Kube, pods: &[Pod], (value, reason): (&str, &str)) -> Result<()> {
    let old = agents(kube)?;
    let pings = start_pings(kube, pods)?;
    upgrade(kube, value)?;
    let mut new = None;
    kube.wait(&format!("{value}: a new pod reports the reason"), ROLLOUT_TIMEOUT, |kube| {
        new = agents(kube)?.into_iter().find(|agent| !old.iter().any(|old| old.name == agent.name));
        new.as_ref().map_or(Ok(false), |new| Ok(report(kube, &new.name)?.contains(reason)))
    })?;
    let name = new.context("no new pod")?.name;
    thread::sleep(OBSERVATION_TIME);
    let now = agents(kube)?;
    let others: BTreeSet<_> = now.iter().filter(|agent| agent.name != name).cloned().collect();
    ensure!(others == old, "{value}: The upgrade continued: {now:#?}");
    let is_ready = now.iter().any(|agent| agent.name == name && agent.ready);
    ensure!(!is_ready, "{value}: The pod {name} is Ready.");
    kube.wait_ready(&[0, 1, 2], true, Duration::ZERO)?;
    roll_back(kube)?;
    wait_for_rollout(kube)?;
    ensure!(agents(kube)? == old, "{value}: The rollback replaced a pod.");
    check_no_loss(value, pings)
}

/// Returns the messages of a pod's ended containers and the messages of its events, as `kubectl
/// describe pod` shows them.
fn report(kube: &Kube, pod: &str) -> Result<String> {
    let namespace = format!("--namespace={NAMESPACE}");
    let status = get(kube, &["pod", pod, &namespace])?["status"]["containerStatuses"].take();
    let states = status.as_array().into_iter().flatten();
    let states = states.flat_map(|status| [&status["state"], &status["lastState"]]);
    let mut texts: Vec<_> = states
        .filter_map(|state| state["terminated"]["message"].as_str())
        .map(str::to_owned)
        .collect();
    let of = format!("--field-selector=involvedObject.name={pod}");
    let events = get(kube, &["events", &namespace, &of])?["items"].take();
    let messages = events.as_array().into_iter().flatten();
    texts.extend(messages.filter_map(|event| event["message"].as_str()).map(str::to_owned));
    Ok(texts.join("\n"))
}

#[test]
#[ignore = "takes a cluster: cargo e2e cluster test"]
fn upgrades_and_rollbacks_in_succession_lose_no_packet() -> Result<()> {
    with(|kube, pods| {
        for delay in [0, 1, 3, 10] {
            let pings = start_pings(kube, &pods)?;
            upgrade(kube, &format!("podAnnotations.delay=after-{delay}"))?;
            thread::sleep(Duration::from_secs(delay));
            roll_back(kube)?;
            thread::sleep(Duration::from_secs(1));
            wait_for_rollout(kube)?;
            check_no_loss(&format!("rollback {delay} s after an upgrade"), pings)?;
        }
        Ok(())
    })
}

#[test]
#[ignore = "takes a cluster: cargo e2e cluster test"]
fn applied_rendering_with_hooks_does_not_remove_skein() -> Result<()> {
    with(|kube, pods| {
        let chart = cargo::workspace().join("charts/skein");
        let words = [
            "template",
            "skein",
            &chart.to_string_lossy(),
            "--namespace",
            NAMESPACE,
            "--include-crds",
            "--kube-version=1.36",
            "--set=image.pullPolicy=Never",
            "--set",
            POD_CIDR,
        ];
        let objects = kube.helm(&words)?;
        ensure!(objects.contains("kind: Job"), "The rendered objects have no Job.");
        let file = kube.directory().join("rendered.yaml");
        std::fs::write(&file, objects)?;
        let pings = start_pings(kube, &pods)?;
        let file = file.to_string_lossy();
        kube.kubectl(&["apply", "--server-side", "--force-conflicts", "--filename", &file])?;
        let job = format!("--namespace={NAMESPACE}");
        kube.wait("the Job has failed", ROLLOUT_TIMEOUT, |kube| {
            let job = get(kube, &["job", "skein-cleanup", &job])?;
            let mut conditions = job["status"]["conditions"].as_array().into_iter().flatten();
            Ok(conditions.any(|of| of["type"] == "Failed" && of["status"] == "True"))
        })?;
        let log = kube.kubectl(&["logs", &job, "job/skein-cleanup"])?;
        ensure!(log.contains("refused to uninstall"), "The Job did not refuse: {log}");
        wait_for_rollout(kube)?;
        check_no_loss("rendered objects applied", pings)
    })
}

/// A request with the token of an agent, and the expected decision of the API server.
struct Request {
    accepted: bool,
    resource: &'static str,
    /// Name of the object's node: `node1`, the agent's own, or another node.
    name: &'static str,
    status: bool,
    change: Value,
}

fn request(accepted: bool, resource: &'static str, name: &'static str, change: Value) -> Request {
    Request { accepted, resource, name, status: change.get("status").is_some(), change }
}

/// Returns changes of the Node and of the record that an agent makes, and changes that it must not
/// make.
fn requests(node: &Value, record: &Value) -> Vec<Request> {
    let owner = &record["metadata"]["ownerReferences"][0];
    let mut blocking = owner.clone();
    blocking["blockOwnerDeletion"] = json!(true);
    let foreign = json!({ "apiVersion": "v1", "kind": "ConfigMap", "name": "a", "uid": "1" });
    let condition = |kind: &str, status: &str| {
        json!({ "status": { "conditions": [
            { "type": kind, "status": status, "reason": "Test", "message": "a test" },
        ] } })
    };
    let taint = |key: &str| json!({ "key": key, "effect": "PreferNoSchedule" });
    let metadata = |key: &str, value: Value| {
        let mut change = json!({ "metadata": {} });
        change["metadata"][key] = value;
        change
    };
    let mut all = vec![
        request(true, "node", "node1", condition("NetworkUnavailable", "False")),
        request(false, "node", "node1", condition("NetworkUnavailable", "True")),
        request(false, "node", "node1", condition("Ready", "False")),
        request(false, "node", "node2", condition("NetworkUnavailable", "False")),
        request(false, "node", "node1", json!({ "spec": { "taints": null } })),
        request(
            false,
            "node",
            "node1",
            json!({ "spec": { "taints": [taint("example.com/a"), taint("b")] } }),
        ),
        request(false, "node", "node1", json!({ "spec": { "unschedulable": null } })),
        request(false, "node", "node2", json!({ "spec": { "unschedulable": true } })),
        request(
            false,
            "node",
            "node1",
            json!({ "status": { "addresses": [
            { "type": "InternalIP", "address": "192.0.2.1" },
        ] } }),
        ),
        request(true, "skeinnode", "node1", json!({ "spec": record["spec"] })),
        request(true, "skeinnode", "node1", json!({ "status": { "version": "0.1.0" } })),
        request(false, "skeinnode", "node1", metadata("ownerReferences", json!([owner, foreign]))),
        request(false, "skeinnode", "node1", metadata("ownerReferences", json!([blocking]))),
        request(false, "skeinnode", "node1", metadata("ownerReferences", json!([]))),
        request(false, "skeinnode", "node2", json!({ "spec": record["spec"] })),
        request(false, "skeinnode", "node2", json!({ "status": { "version": "0.1.0" } })),
    ];
    let uid = &node["metadata"]["uid"];
    let itself = json!([{ "apiVersion": "v1", "kind": "Node", "name": "node1", "uid": uid }]);
    all.push(request(false, "node", "node1", metadata("ownerReferences", itself)));
    for resource in ["node", "skeinnode"] {
        for key in ["labels", "annotations"] {
            all.push(request(false, resource, "node1", metadata(key, json!({ "a": "b" }))));
        }
        let finalizers = metadata("finalizers", json!(["example.com/a"]));
        all.push(request(false, resource, "node1", finalizers));
    }
    all
}

#[test]
#[ignore = "takes a cluster: cargo e2e cluster test"]
fn agents_token_writes_only_what_an_agent_writes() -> Result<()> {
    with(|kube, _| {
        // The administrator sets a taint and cordons the node, which the agent's token must not
        // undo.
        kube.kubectl(&["taint", "node", "node1", "example.com/a=:PreferNoSchedule"])?;
        kube.kubectl(&["cordon", "node1"])?;
        let pod = get(kube, &["pod", &agent_pod(kube, 0)?, "--namespace", NAMESPACE])?;
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let (name, uid) = (text(&pod["metadata"]["name"]), text(&pod["metadata"]["uid"]));
        let create = ["create", "token", "skein", "--namespace", NAMESPACE];
        let bound = ["--bound-object-kind=Pod", "--bound-object-name", &name];
        let bound = [&create[..], &bound, &["--bound-object-uid", &uid]].concat();
        let bound = kube.kubectl(&bound)?.trim().to_owned();
        let unbound = kube.kubectl(&create)?.trim().to_owned();

        let (node, record) = (get(kube, &["node", "node1"])?, get(kube, &["skeinnode", "node1"])?);
        let requests = requests(&node, &record);
        for request in &requests {
            check(kube, &bound, request, request.accepted)?;
            // A token that is not bound to a pod contains no node.
            check(kube, &unbound, request, false)?;
        }
        println!("{} requests with each of two tokens", requests.len());
        dataplane_has_no_token(kube)
    })
}

/// Sends a request with a token, and checks that the API server accepts it, or that the chart's
/// policy refuses it.
fn check(kube: &Kube, token: &str, request: &Request, accepted: bool) -> Result<()> {
    let Request { resource, name, status, change, .. } = request;
    let path = match *resource {
        "node" => "/api/v1/nodes",
        _ => "/apis/skein.network/v1alpha1/skeinnodes",
    };
    let subresource = if *status { "/status" } else { "" };
    let kind = match (*resource, *status) {
        ("node", true) => "strategic-merge-patch",
        _ => "merge-patch",
    };
    let url = format!("{}{path}/{name}{subresource}", server(kube)?);
    // kubectl would read the object first, and the agent is not allowed to.
    let mut command = kube.command("curl");
    command.args(["--silent", "--show-error", "--insecure", "--request", "PATCH"]);
    command.args(["--header", &format!("Authorization: Bearer {token}")]);
    command.args(["--header", &format!("Content-Type: application/{kind}+json")]);
    let text = process::run(command.args(["--data", &change.to_string(), &url]))?;
    let answer: Value = serde_json::from_str(&text)?;
    let what = format!("{resource} {name}{subresource}: {change}");
    match answer["kind"] == "Status" {
        false => ensure!(accepted, "{what} was accepted."),
        true => {
            let message = answer["message"].as_str().unwrap_or_default();
            ensure!(!accepted, "{what} was refused: {message}");
            let policy = "ValidatingAdmissionPolicy 'skein-own-node'";
            ensure!(message.contains(policy), "{what} was not refused by the policy: {message}");
        }
    }
    Ok(())
}

/// Returns the address of the API server.
fn server(kube: &Kube) -> Result<String> {
    let config: Value =
        serde_json::from_str(&kube.kubectl(&["config", "view", "--output=json"])?)?;
    let server = config["clusters"][0]["cluster"]["server"].as_str();
    Ok(server.context("no server in the kubeconfig")?.to_owned())
}

/// Checks that only the container `agent` has the token.
fn dataplane_has_no_token(kube: &Kube) -> Result<()> {
    for node in &kube.nodes {
        for (argument, expected) in [("run", 1), ("dataplane", 0)] {
            let count = format!(
                "for pid in $(pgrep -f '^(/usr/bin/)?skein-agent {argument} '); do \
                 ls /proc/$pid/root/var/run/secrets/kubernetes.io/serviceaccount/token; done"
            );
            let found = node.exec(&["sh", "-c", &format!("{count} 2>/dev/null | wc -l")])?;
            let found: usize = found.trim().parse()?;
            let name = node.name();
            ensure!(
                found.min(1) == expected,
                "{found} processes `skein-agent {argument}` on {name} have the token."
            );
        }
    }
    Ok(())
}
