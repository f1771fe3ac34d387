//! Successful and failing upgrades on a real Kubernetes while pods ping each other. Only `cargo e2e
//! cluster test` runs these tests.
//!
//! A DaemonSet of Kubernetes before 1.25 has no surge: the second pod on a node is made by the
//! test, from the DaemonSet's own template.

use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use skein_cluster::skein::{self, NAMESPACE, Pod, agent_pod, wait_until_all_reach_all};
use skein_cluster::{Kube, Options};

/// Maximum time of an operation of kubelet.
const KUBELET_TIMEOUT: Duration = Duration::from_secs(90);
/// Interval between two pings.
const PING_INTERVAL: Duration = Duration::from_millis(10);
/// Name of the second pod, and of its ConfigMap.
const NEXT: &str = "skein-next";

#[test]
#[ignore = "takes a cluster: cargo e2e cluster test"]
fn second_pod_takes_over_only_with_valid_configuration() -> Result<()> {
    skein::with(&Options::default(), &["podCidr=10.244.0.0/16"], |kube, pods| {
        wait_until_all_reach_all(kube, &pods, Duration::from_secs(10))?;
        for wrong in &WRONG {
            wrong_value_takes_nothing_over(kube, &pods, wrong)?;
        }
        for delay in DELETION_DELAYS_MS {
            deleted_pod_gives_the_node_back(kube, &pods, Duration::from_millis(delay))?;
        }
        for delay in [0, 1, 3, 10] {
            upgrade_and_rollback(kube, &pods, Duration::from_secs(delay))?;
        }
        Ok(())
    })
}

/// A wrong value of the configuration and its consequence.
struct Wrong {
    /// Line of agent.toml that is replaced.
    line: &'static str,
    instead: &'static str,
    /// Exit code of the agent; `None` if the agent waits.
    code: Option<i64>,
    /// Reason that the pod reports.
    reason: &'static str,
}

const WRONG: [Wrong; 3] = [
    Wrong {
        line: "cluster_cidrs = [\"10.244.0.0/16\"]",
        instead: "cluster_cidrs = [\"10.99.0.0/16\"]",
        code: None,
        reason: "is outside of cluster_cidrs (10.99.0.0/16)",
    },
    Wrong {
        line: "cluster_cidrs = [\"10.244.0.0/16\"]",
        instead: "cluster_cidrs = [\"10.999.0.0/16\"]",
        code: Some(2),
        reason: "10.999.0.0/16",
    },
    Wrong {
        line: ":9464\"",
        instead: ":10250\"",
        code: Some(5),
        reason: ":10250: the port is in use",
    },
];

/// Times between the start and the deletion of a pod, milliseconds.
const DELETION_DELAYS_MS: [u64; 8] = [0, 300, 600, 1000, 1500, 2500, 4000, 8000];

fn get(kube: &Kube, what: &[&str]) -> Result<Value> {
    let words = [&["--namespace", NAMESPACE, "get", "--output=json"], what].concat();
    Ok(serde_json::from_str(&kube.kubectl(&words)?)?)
}

/// Creates a second pod on the first node, with a changed configuration.
fn start_next(kube: &Kube, change: impl FnOnce(String) -> String) -> Result<()> {
    let text = get(kube, &["configmap", "skein"])?["data"]["agent.toml"].clone();
    let text = text.as_str().context("no agent.toml")?.to_owned();
    let config = json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": NEXT, "namespace": NAMESPACE },
        "data": { "agent.toml": change(text) },
    });
    kube.apply(&config.to_string())?;
    let mut spec = get(kube, &["daemonset", "skein"])?["spec"]["template"]["spec"].clone();
    spec["nodeName"] = json!(kube.nodes[0].name());
    let volumes = spec["volumes"].as_array_mut().context("no volumes")?;
    let volume = volumes.iter_mut().find(|volume| volume["name"] == "config");
    volume.context("no configuration")?["configMap"]["name"] = json!(NEXT);
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "spec": spec,
        "metadata": { "name": NEXT, "namespace": NAMESPACE, "labels": { "app": "next" } },
    });
    kube.apply(&pod.to_string()).map(drop)
}

fn delete_next(kube: &Kube) -> Result<()> {
    kube.kubectl(&["--namespace", NAMESPACE, "delete", "pod", NEXT]).map(drop)
}

fn is_ready(kube: &Kube, pod: &str) -> Result<bool> {
    let pod = get(kube, &["pod", pod])?;
    let conditions = pod["status"]["conditions"].as_array().cloned().unwrap_or_default();
    Ok(conditions.iter().any(|of| of["type"] == "Ready" && of["status"] == "True"))
}

/// Returns the state of the second pod's agent, and the text of its events.
fn state_and_events(kube: &Kube) -> Result<(Value, String)> {
    let pod = get(kube, &["pod", NEXT])?;
    let statuses = pod["status"]["containerStatuses"].as_array().cloned().unwrap_or_default();
    let agent = statuses.into_iter().find(|status| status["name"] == "agent").unwrap_or_default();
    let of = format!("--field-selector=involvedObject.name={NEXT}");
    let events = get(kube, &["events", &of])?["items"].to_string();
    Ok((agent, events))
}

fn wrong_value_takes_nothing_over(kube: &mut Kube, pods: &[Pod], wrong: &Wrong) -> Result<()> {
    let Wrong { line, instead, code, reason } = *wrong;
    let old = agent_pod(kube, 0)?;
    let pings = pods[0].start_pings(kube, pods[1].ips[0], 60_000, PING_INTERVAL)?;
    start_next(kube, |text| text.replace(line, instead))?;
    kube.wait(&format!("{instead}: the pod reports the reason"), KUBELET_TIMEOUT, |kube| {
        let (agent, events) = state_and_events(kube)?;
        let ended = [&agent["lastState"]["terminated"], &agent["state"]["terminated"]];
        let mut messages = ended.iter().map(|ended| ended["message"].to_string());
        Ok(match code {
            None => events.contains(reason),
            Some(code) => {
                ended.iter().any(|ended| ended["exitCode"] == code)
                    && messages.any(|message| message.contains(reason))
            }
        })
    })?;
    thread::sleep(Duration::from_secs(5));
    ensure!(!is_ready(kube, NEXT)?, "{instead}: The new pod is Ready.");
    ensure!(is_ready(kube, &old)?, "{instead}: The old pod is not Ready.");
    let node = skein::page(&kube.nodes[0], "/readyz")?;
    ensure!(node.status == 200, "{instead}: The node is not ready: {}", node.body);
    delete_next(kube)?;
    ensure!(is_ready(kube, &old)?, "{instead}: The old pod is no longer Ready.");
    let loss = pings.stop()?;
    println!("{instead}: {loss}");
    ensure!(loss.lost == 0, "{instead}: Packets were lost: {loss}");
    Ok(())
}

fn deleted_pod_gives_the_node_back(kube: &mut Kube, pods: &[Pod], moment: Duration) -> Result<()> {
    let old = agent_pod(kube, 0)?;
    let pings = pods[0].start_pings(kube, pods[1].ips[0], 60_000, PING_INTERVAL)?;
    start_next(kube, |text| text)?;
    thread::sleep(moment);
    delete_next(kube)?;
    kube.wait("the old pod has the node", KUBELET_TIMEOUT, |kube| {
        Ok(skein::page(&kube.nodes[0], "/readyz").is_ok_and(|page| page.status == 200))
    })?;
    let loss = pings.stop()?;
    println!("deleted after {} ms: {loss}", moment.as_millis());
    ensure!(loss.lost == 0, "Deletion after {moment:?} lost packets: {loss}");
    ensure!(is_ready(kube, &old)?, "The old pod is not Ready.");
    Ok(())
}

/// Upgrades the first node to the pod `skein-next`, and deletes the DaemonSet's pod. Then rolls
/// back: the DaemonSet creates a new pod, which takes over from `skein-next`, and `skein-next` is
/// deleted.
fn upgrade_and_rollback(kube: &mut Kube, pods: &[Pod], delay: Duration) -> Result<()> {
    let pings = pods[0].start_pings(kube, pods[1].ips[0], 60_000, PING_INTERVAL)?;
    start_next(kube, |text| text)?;
    let wait = ["--namespace", NAMESPACE, "wait", "--for=condition=Ready", "--timeout=90s", "pod"];
    kube.kubectl(&[&wait[..], &[NEXT]].concat())?;
    let old = agent_pod(kube, 0)?;
    kube.kubectl(&["--namespace", NAMESPACE, "delete", "pod", &old, "--wait=false"])?;
    thread::sleep(delay);
    kube.wait("the DaemonSet has a new pod on the node", KUBELET_TIMEOUT, |kube| {
        Ok(agent_pod(kube, 0).is_ok_and(|name| !name.is_empty() && name != old))
    })?;
    let last = agent_pod(kube, 0)?;
    kube.kubectl(&[&wait[..], &[&last]].concat())?;
    delete_next(kube)?;
    let loss = pings.stop()?;
    println!("upgrade, and rollback after {} s: {loss}", delay.as_secs());
    ensure!(loss.lost == 0, "A rollback after {delay:?} lost packets: {loss}");
    ensure!(is_ready(kube, &last)?, "The last pod is not Ready.");
    Ok(())
}
