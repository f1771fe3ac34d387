//! Skein on a real Kubernetes, installed by its chart. Only `cargo e2e cluster test` runs these
//! tests.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use skein_cluster::skein::{self, Pod, agent_pod, wait_until_all_reach_all};
use skein_cluster::{Kube, Options};

/// Maximum time until nodes are ready, or an expected state is reached.
pub(super) const READY_TIMEOUT: Duration = Duration::from_secs(60);

pub(super) fn skeinnode(kube: &Kube, name: &str) -> Result<Value> {
    Ok(serde_json::from_str(&kube.kubectl(&["get", "skeinnode", name, "--output=json"])?)?)
}

/// Returns the number of write requests of a node's agent.
fn writes(kube: &Kube, node: usize) -> Result<f64> {
    let metrics = skein::metrics(&kube.nodes[node])?;
    let verbs = ["create", "patch", "delete"];
    let of = |verb| metrics.sum("skein_kubernetes_requests_total", &[&format!("verb=\"{verb}\"")]);
    Ok(verbs.into_iter().map(of).sum())
}

#[test]
#[ignore = "takes a cluster: cargo e2e cluster test"]
fn chart_installs_and_removes_the_network_of_a_cluster() -> Result<()> {
    let settings =
        ["podCidr=10.244.0.0/16", r"log.level=skein_agent::control::kubernetes=debug\,info"];
    skein::with(&Options::default(), &settings, |kube, pods| {
        let before: Vec<_> = kube.nodes.iter().map(skein::traces).collect::<Result<_>>()?;
        ensure!(
            before.iter().all(|traces| !traces.is_empty()),
            "A node has no traces of Skein: {before:?}"
        );
        wait_until_all_reach_all(kube, &pods, Duration::from_secs(10))?;
        println!("{}", kube.kubectl(&["get", "skeinnodes", "--output=wide"])?);
        let rate = pods[0].throughput(kube, &pods[1], pods[1].ips[0], 3)?;
        println!("one TCP connection between pods of two nodes: {rate:.2} Gb/s");
        ensure!(rate > 0.1, "The rate is only {rate} Gb/s.");
        let node = skeinnode(kube, "node1")?;
        let owner = &node["metadata"]["ownerReferences"][0]["kind"];
        ensure!(*owner == "Node", "The owner of the record is a {owner}: {node}");
        let condition = &node["status"]["conditions"][0];
        ensure!(condition["status"] == "True", "The condition is not True: {condition}");
        agents_have_needed_rights_only(kube)?;
        service(kube, &pods)?;
        foreign_records_are_refused(kube, &pods)?;
        nothing_is_written_again(kube)?;
        upgrade(kube, &pods)?;

        skein::uninstall(kube)?;
        for node in &kube.nodes {
            let left = skein::traces(node)?;
            ensure!(left.is_empty(), "Uninstallation left on {}: {left:#?}", node.name());
        }
        let left = kube.kubectl(&["get", "skeinnodes", "--output=name"])?;
        ensure!(left.is_empty(), "Uninstallation left records: {left}");
        kube.wait_ready(&[0, 1], false, READY_TIMEOUT).map(drop)
    })
}

/// Checks the rights of the agents' role: the needed rights exist, and others do not. Agents write
/// Events only about problems, so no other part of the test uses that right.
fn agents_have_needed_rights_only(kube: &Kube) -> Result<()> {
    let may = |what: &str| {
        let account = "--as=system:serviceaccount:kube-system:skein";
        let words = ["auth", "can-i"].into_iter().chain(what.split(' ')).chain([account]);
        kube.kubectl(&words.collect::<Vec<_>>())
    };
    for right in [
        "watch nodes",
        "patch nodes",
        "patch nodes --subresource=status",
        "patch skeinnodes.skein.network",
        "patch skeinnodes.skein.network --subresource=status",
        "create events --namespace=default",
    ] {
        may(right).with_context(|| right.to_owned())?;
    }
    for right in [
        "delete nodes",
        "get secrets",
        "delete skeinnodes.skein.network",
        "create pods",
        "create events --namespace=kube-system",
    ] {
        let refused = may(right).err().with_context(|| format!("agents may {right}"))?;
        let is_refused = format!("{refused:#}").ends_with("no");
        ensure!(is_refused, "can-i {right} failed for another reason: {refused:#}");
    }
    Ok(())
}

/// Checks that the first node reaches a Service whose only endpoint is on the second node.
fn service(kube: &mut Kube, pods: &[Pod]) -> Result<()> {
    let server = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "name": "server", "labels": { "app": "server" } },
        "spec": {
            "nodeName": kube.nodes[1].name(), "terminationGracePeriodSeconds": 0,
            "containers": [{
                "name": "main", "image": skein_cluster::programs::TOOLS,
                "imagePullPolicy": "Never",
                "command": ["sh", "-c", "mkdir /w; echo served >/w/index.html; exec httpd -f -p 80 -h /w"],
                "ports": [{ "containerPort": 80, "hostPort": 8088 }],
            }],
        },
    });
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": "server" },
        "spec": { "selector": { "app": "server" }, "ports": [{ "port": 80 }] },
    });
    kube.apply(&server.to_string())?;
    kube.apply(&service.to_string())?;
    let ip = kube.kubectl(&["get", "service", "server", "--output=jsonpath={.spec.clusterIP}"])?;
    let asks = |kube: &mut Kube, url: &str| -> Result<bool> {
        Ok(pods[0].run(kube, &["curl", "-s", "--max-time", "2", url])? == "served\n")
    };
    kube.wait("the Service answers", READY_TIMEOUT, |kube| asks(kube, &format!("http://{ip}/")))?;
    let host = skein_cluster::v4(kube.nodes[1].number());
    kube.wait("the host port answers", READY_TIMEOUT, |kube| {
        asks(kube, &format!("http://{host}:8088/"))
    })?;
    kube.kubectl(&["delete", "pod,service", "server"]).map(drop)
}

/// Checks that two records of an attacker are refused: one has a prefix outside of the cluster, one
/// the key of another node.
fn foreign_records_are_refused(kube: &mut Kube, pods: &[Pod]) -> Result<()> {
    let key = skeinnode(kube, "node1")?["spec"]["publicKey"].clone();
    let record = |name: &str, key: Value, prefix: &str| {
        json!({
            "apiVersion": "skein.network/v1alpha1", "kind": "SkeinNode", "metadata": { "name": name },
            "spec": { "publicKey": key, "endpoints": ["192.0.2.9:51900"], "podCIDRs": [prefix] },
        })
    };
    let other = "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=";
    kube.apply(&record("a-thief", json!(other), "198.51.100.0/24").to_string())?;
    kube.apply(&record("a-twin", key, "10.244.99.0/24").to_string())?;
    kube.wait("both records are refused and reported", READY_TIMEOUT, |kube| {
        let events = kube.kubectl(&["get", "events", "--output=jsonpath={.items[*].message}"])?;
        let refused = |node| {
            let metrics = skein::metrics(node)?;
            Ok::<_, anyhow::Error>(metrics.sum("skein_node_record_files_rejected", &[]) == 2.0)
        };
        Ok(events.contains("198.51.100.0/24 is outside of cluster_cidrs (10.244.0.0/16)")
            && refused(&kube.nodes[0])?
            && refused(&kube.nodes[1])?)
    })?;
    wait_until_all_reach_all(kube, pods, Duration::from_secs(1))?;
    kube.kubectl(&["delete", "skeinnodes", "a-thief", "a-twin"]).map(drop)
}

/// Checks that the agents write nothing while nothing changes.
fn nothing_is_written_again(kube: &mut Kube) -> Result<()> {
    const OBSERVATION_TIME: Duration = Duration::from_secs(70);
    // Writes after the start do not count.
    thread::sleep(Duration::from_secs(5));
    let before = [writes(kube, 0)?, writes(kube, 1)?];
    thread::sleep(OBSERVATION_TIME);
    let after = [writes(kube, 0)?, writes(kube, 1)?];
    let seconds = OBSERVATION_TIME.as_secs();
    println!("writes of each agent in {seconds} s: {before:?} -> {after:?}");
    ensure!(before == after, "Agents wrote without a change: {before:?} -> {after:?}");
    Ok(())
}

/// Runs `helm upgrade` with another value while a pod pings another.
fn upgrade(kube: &mut Kube, pods: &[Pod]) -> Result<()> {
    let interval = Duration::from_millis(100);
    let pings = pods[0].start_pings(kube, pods[1].ips[0], 600, interval)?;
    let start = Instant::now();
    skein::upgrade(kube, &["podCidr=10.244.0.0/16", "bundling=false"])?;
    println!("helm upgrade took {:.1} s", start.elapsed().as_secs_f64());
    let (sent, received) = pings.wait_until_sent()?;
    println!("during the upgrade {} of {sent} pings (one per 100 ms) were lost", sent - received);
    // The old pod of a node ends before its new one starts.
    ensure!(sent - received < 250, "Only {received} of {sent} pings were answered.");
    wait_until_all_reach_all(kube, pods, Duration::from_secs(10))?;
    for node in &kube.nodes {
        let status = node.exec(&["curl", "-s", "127.0.0.1:9464/readyz"])?;
        ensure!(status.trim() == "ready", "{} is not ready: {status}", node.name());
    }
    Ok(())
}

#[test]
#[ignore = "takes a cluster: cargo e2e cluster test"]
fn pods_reach_each_other_after_faults_of_the_cluster() -> Result<()> {
    skein::with(&Options::default(), &[], |kube, pods| {
        wait_until_all_reach_all(kube, &pods, Duration::from_secs(10))?;
        the_agent_is_killed(kube, &pods)?;
        the_data_process_is_killed(kube, &pods)?;
        the_dataplane_container_is_killed(kube, &pods)?;
        a_pod_takes_over_from_another(kube, &pods)?;
        the_api_server_is_stopped(kube, &pods)?;
        a_node_gets_another_address(kube, &pods)?;
        a_node_is_deleted_and_comes_back(kube)?;
        a_node_loses_power(kube)
    })
}

fn the_agent_is_killed(kube: &mut Kube, pods: &[Pod]) -> Result<()> {
    let pings = pods[0].start_pings(kube, pods[1].ips[0], 100, Duration::from_millis(50))?;
    thread::sleep(Duration::from_millis(500));
    skein::kill(&kube.nodes[0], "run")?;
    let (sent, received) = pings.wait_until_sent()?;
    println!("agent killed: {} of {sent} pings (one per 50 ms) were lost", sent - received);
    ensure!(sent == received, "Only {received} of {sent} pings were answered.");
    wait_for_agent(kube, 0)
}

fn wait_for_agent(kube: &mut Kube, node: usize) -> Result<()> {
    let took = kube.wait("the agent is ready again", READY_TIMEOUT, |kube| {
        Ok(skein::page(&kube.nodes[node], "/readyz")?.status == 200)
    })?;
    println!("the agent is ready again after {:.1} s", took.as_secs_f64());
    Ok(())
}

fn the_data_process_is_killed(kube: &mut Kube, pods: &[Pod]) -> Result<()> {
    let pings = pods[0].start_pings(kube, pods[1].ips[0], 300, Duration::from_millis(10))?;
    thread::sleep(Duration::from_millis(500));
    skein::kill(&kube.nodes[0], "dataplane .*--worker")?;
    let (sent, received) = pings.wait_until_sent()?;
    println!("data process killed: {} of {sent} pings (one per 10 ms) were lost", sent - received);
    ensure!(sent - received <= 5, "Only {received} of {sent} pings were answered.");
    Ok(())
}

fn the_dataplane_container_is_killed(kube: &mut Kube, pods: &[Pod]) -> Result<()> {
    skein::kill(&kube.nodes[0], "dataplane .*--instance")?;
    thread::sleep(Duration::from_millis(200));
    let took = wait_until_all_reach_all(kube, pods, READY_TIMEOUT)?;
    println!(
        "data plane container killed: pods reach each other again after {:.1} s",
        took.as_secs_f64()
    );
    Ok(())
}

/// Imitates a DaemonSet with maxSurge, which this Kubernetes does not have: starts a second pod on
/// a node and deletes the first. Then the DaemonSet's own new pod takes over in the same way.
fn a_pod_takes_over_from_another(kube: &mut Kube, pods: &[Pod]) -> Result<()> {
    let get = ["--namespace=kube-system", "get", "daemonset", "skein", "--output=json"];
    let set: Value = serde_json::from_str(&kube.kubectl(&get)?)?;
    let mut spec = set["spec"]["template"]["spec"].clone();
    spec["nodeName"] = json!(kube.nodes[0].name());
    let next = json!({
        "apiVersion": "v1", "kind": "Pod", "spec": spec,
        "metadata": { "name": "skein-next", "namespace": "kube-system", "labels": { "app": "next" } },
    });
    let ours = |kube: &Kube| agent_pod(kube, 0);
    let wait = ["--namespace=kube-system", "wait", "--for=condition=Ready", "--timeout=60s", "pod"];
    let delete = ["--namespace=kube-system", "delete", "pod"];
    let first = ours(kube)?;
    let pings = pods[0].start_pings(kube, pods[1].ips[0], 3000, Duration::from_millis(10))?;
    let start = Instant::now();
    kube.apply(&next.to_string())?;
    kube.kubectl(&[&wait[..], &["skein-next"]].concat())?;
    kube.kubectl(&[&delete[..], &[&first]].concat())?;
    kube.wait("the DaemonSet has a pod there again", READY_TIMEOUT, |kube| {
        Ok(ours(kube).is_ok_and(|name| !name.is_empty() && name != first))
    })?;
    let last = ours(kube)?;
    kube.kubectl(&[&wait[..], &[&last]].concat())?;
    kube.kubectl(&[&delete[..], &["skein-next"]].concat())?;
    println!("two pods took over in {:.1} s", start.elapsed().as_secs_f64());
    let (sent, received) = pings.wait_until_sent()?;
    println!("two take-overs: {} of {sent} pings (one per 10 ms) were lost", sent - received);
    ensure!(sent == received, "Only {received} of {sent} pings were answered.");
    wait_for_agent(kube, 0)
}

/// Checks that traffic continues for a minute without an API server. An agent that is killed during
/// this minute must start with its stored records.
fn the_api_server_is_stopped(kube: &mut Kube, pods: &[Pod]) -> Result<()> {
    kube.stop_api_server()?;
    let pings = pods[0].start_pings(kube, pods[1].ips[0], 600, Duration::from_millis(100))?;
    thread::sleep(Duration::from_secs(10));
    // kubelet waits longer before each restart of a container.
    skein::kill(&kube.nodes[0], "run")?;
    wait_for_agent(kube, 0)?;
    let up = skein::metrics(&kube.nodes[0])?.sum("skein_node_records_source_up", &[]);
    ensure!(up == 0.0, "The agent does not report the loss of the API server.");
    let (sent, received) = pings.wait_until_sent()?;
    println!("API server stopped: {} of {sent} pings were lost", sent - received);
    ensure!(sent == received, "Only {received} of {sent} pings were answered.");
    let before = [writes(kube, 0)?, writes(kube, 1)?];
    kube.start_api_server()?;
    let took = kube.wait("the agents follow the API server again", READY_TIMEOUT, |kube| {
        let up = |node| {
            Ok::<_, anyhow::Error>(skein::metrics(node)?.sum("skein_node_records_source_up", &[]))
        };
        Ok(up(&kube.nodes[0])? == 1.0 && up(&kube.nodes[1])? == 1.0)
    })?;
    let after = [writes(kube, 0)?, writes(kube, 1)?];
    println!(
        "API server back: followed after {:.1} s, writes {before:?} -> {after:?}",
        took.as_secs_f64()
    );
    // The restarted agent writes its state; no agent writes objects that already match.
    for (before, after) in before.iter().zip(&after) {
        ensure!(after - before <= 5.0, "An agent wrote {} times.", after - before);
    }
    Ok(())
}

fn a_node_gets_another_address(kube: &mut Kube, pods: &[Pod]) -> Result<()> {
    kube.nodes[1].readdress(77)?;
    let expected = format!("{}:51900", skein_cluster::v4(77));
    // The agent's connections have the old source address, and time out after 65 s.
    let took = kube.wait("the record has the new address", 2 * READY_TIMEOUT, |kube| {
        Ok(skeinnode(kube, "node2")?["spec"]["endpoints"][0] == expected.as_str())
    })?;
    let again = wait_until_all_reach_all(kube, pods, READY_TIMEOUT)?;
    println!(
        "address changed: in the record after {:.1} s, pods reach each other {:.1} s later",
        took.as_secs_f64(),
        again.as_secs_f64()
    );
    Ok(())
}

fn a_node_is_deleted_and_comes_back(kube: &mut Kube) -> Result<()> {
    kube.kubectl(&["delete", "node", "node2"])?;
    kube.wait("the record is deleted", READY_TIMEOUT, |kube| {
        Ok(kube.kubectl(&["get", "skeinnodes", "--output=name"])?.trim()
            == "skeinnode.skein.network/node1")
    })?;
    kube.wait("the peer is removed", READY_TIMEOUT, |kube| {
        Ok(skein::metrics(&kube.nodes[0])?.sum("skein_node_records", &[]) == 1.0)
    })?;
    // The node gets other pod CIDRs when it registers again, so its pods must be deleted first.
    kube.wait("the pods of the node are deleted", 3 * READY_TIMEOUT, |kube| {
        let on = "--field-selector=spec.nodeName=node2";
        let left = kube.kubectl(&["get", "pods", "--all-namespaces", "--output=name", on])?;
        Ok(left.trim().is_empty())
    })?;
    // kubelet registers the node when it starts.
    kube.nodes[1].restart("kubelet")?;
    kube.wait_ready(&[0, 1], true, READY_TIMEOUT)?;
    let seconds = time_until_reached(kube)?;
    println!("node deleted and registered again: {seconds:.1} s until pods reach each other");
    Ok(())
}

/// Waits until the current pods of the two nodes reach each other, and returns the time in seconds.
fn time_until_reached(kube: &mut Kube) -> Result<f64> {
    let took = kube.wait("pods reach each other again", READY_TIMEOUT * 2, |kube| {
        let pods = skein::running(kube)?;
        let on = |node| pods.iter().find(|pod| pod.node == node);
        match (on(0), on(1)) {
            (Some(a), Some(b)) => Ok(a.reaches(kube, b.ips[0])? && b.reaches(kube, a.ips[0])?),
            _ => Ok(false),
        }
    })?;
    Ok(took.as_secs_f64())
}

fn a_node_loses_power(kube: &mut Kube) -> Result<()> {
    kube.nodes[1].power_off();
    kube.wait_ready(&[1], false, READY_TIMEOUT)?;
    kube.nodes[1].power_on()?;
    let took = kube.wait_ready(&[1], true, READY_TIMEOUT)?;
    println!("power is back: Ready after {:.1} s", took.as_secs_f64());
    // The node's pods have new network namespaces.
    println!("pods reach each other {:.1} s later", time_until_reached(kube)?);
    Ok(())
}

#[test]
#[ignore = "takes a cluster: cargo e2e cluster test"]
fn pods_of_two_families_reach_each_other() -> Result<()> {
    let options = Options { dual_stack: true, ..Options::default() };
    skein::with(&options, &[], |kube, pods| {
        let have_two = pods.iter().all(|pod| pod.ips.len() == 2);
        ensure!(have_two, "A pod does not have two addresses: {pods:?}");
        wait_until_all_reach_all(kube, &pods, Duration::from_secs(10))?;
        for &ip in &pods[1].ips {
            let rate = pods[0].throughput(kube, &pods[1], ip, 2)?;
            println!("one TCP connection to {ip}: {rate:.2} Gb/s");
        }
        Ok(())
    })
}
