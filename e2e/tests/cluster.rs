//! A real Kubernetes: that the laboratory's cluster works, and leaves nothing. `cargo e2e cluster test`
//! runs these, the usual run does not.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use skein_e2e::cluster::{Kube, Options, programs};
use skein_e2e::lab::{process, registry};

const READY_LIMIT: Duration = Duration::from_secs(60);

/// Gives every node a network of Debian's plugins, which reaches no other node.
fn install_network(kube: &Kube) -> Result<()> {
    for (i, node) in kube.nodes.iter().enumerate() {
        let network = json!({ "cniVersion": "0.4.0", "name": "local", "plugins": [{
            "type": "ptp", "ipMasq": true,
            "ipam": { "type": "host-local", "subnet": format!("10.244.{i}.0/24") },
        }]});
        let to = node.disk_path("/etc/cni/net.d/10-local.conflist");
        // The kubelet never sees half a file.
        fs::write(to.with_extension("new"), network.to_string())?;
        fs::rename(to.with_extension("new"), to)?;
    }
    Ok(())
}

/// A DaemonSet of the local image in the nodes' own network.
fn daemon_set() -> String {
    json!({
        "apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": { "name": "everywhere" },
        "spec": {
            "selector": { "matchLabels": { "app": "everywhere" } },
            "template": {
                "metadata": { "labels": { "app": "everywhere" } },
                "spec": {
                    "hostNetwork": true,
                    "terminationGracePeriodSeconds": 0,
                    "tolerations": [{ "operator": "Exists" }],
                    "containers": [{
                        "name": "main", "image": programs::TOOLS, "imagePullPolicy": "Never",
                        "command": ["sh", "-c", "echo here; exec sleep infinity"],
                    }],
                },
            },
        },
    })
    .to_string()
}

/// The pods of [`daemon_set`] that run, with their nodes.
fn running(kube: &Kube) -> Result<Vec<(String, String)>> {
    let columns = "--output=custom-columns=:metadata.name,:spec.nodeName,:status.phase";
    let text =
        kube.kubectl(&["get", "pods", "--selector=app=everywhere", "--no-headers", columns])?;
    let rows = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let rows = rows.filter(|row| row.last() == Some(&"Running"));
    Ok(rows.map(|row| (row[0].to_owned(), row[1].to_owned())).collect())
}

#[test]
#[ignore = "takes a cluster: cargo e2e cluster test"]
fn nodes_become_ready_with_a_network_and_run_pods() -> Result<()> {
    let before = remains()?;
    let mut kube = Kube::up(&Options::default())?;
    let outcome = ready_and_running(&mut kube).with_context(|| kube.logs());
    drop(kube);
    outcome?;
    let after = remains()?;
    let new: Vec<_> = after.difference(&before).collect();
    ensure!(new.is_empty(), "left behind: {new:?}");
    Ok(())
}

fn ready_and_running(kube: &mut Kube) -> Result<()> {
    kube.wait_ready(&[0, 1], false, READY_LIMIT)?;
    kube.apply(&daemon_set())?;
    // In the nodes' own network they run before there is another.
    kube.wait("a pod runs on each node", READY_LIMIT, |kube| Ok(running(kube)?.len() == 2))?;
    install_network(kube)?;
    kube.wait_ready(&[0, 1], true, READY_LIMIT)?;

    let pods = running(kube)?;
    let nodes: BTreeSet<&str> = pods.iter().map(|(_, node)| node.as_str()).collect();
    ensure!(nodes == BTreeSet::from(["node1", "node2"]), "the pods are on {nodes:?}");
    for (pod, node) in &pods {
        let name = kube.kubectl(&["exec", pod, "--", "hostname"])?;
        ensure!(name.trim() == node, "{pod} on {node} says that it is on {name}");
        let logs = kube.kubectl(&["logs", pod])?;
        ensure!(logs == "here\n", "the log of {pod} is {logs:?}");
    }
    Ok(())
}

/// Everything of the host that a cluster could leave.
fn remains() -> Result<BTreeSet<String>> {
    let own = format!("-{}-", std::process::id());
    let mut all: BTreeSet<String> =
        registry::existing().into_iter().filter(|name| name.contains(&own)).collect();
    for line in fs::read_to_string("/proc/self/mountinfo")?.lines() {
        let path = line.split_whitespace().nth(4).context("mountinfo")?;
        all.insert(format!("mount {path}"));
    }
    for interface in fs::read_dir("/sys/class/net")? {
        all.insert(format!("interface {}", interface?.file_name().display()));
    }
    let processes = process::run(Command::new("ps").args(["-eo", "args", "--no-headers"]))?;
    let of_cluster =
        ["kubelet", "kube-", "etcd", "containerd", "/bin/sleep infinity", "machine.sh"];
    for line in processes.lines() {
        if of_cluster.iter().any(|name| line.contains(name)) {
            all.insert(format!("process {line}"));
        }
    }
    Ok(all)
}
