//! Skein on a real Kubernetes, installed by its chart. `cargo e2e cluster test` runs these, the usual run
//! does not.

use std::collections::BTreeSet;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use skein_cluster::skein::{self, Pod, agent_pod, wait_until_all_reach_all};
use skein_cluster::{Kube, Options};
use skein_lab::agent::binary;
use skein_lab::process;

const READY_LIMIT: Duration = Duration::from_secs(60);

fn skeinnode(kube: &Kube, name: &str) -> Result<Value> {
    Ok(serde_json::from_str(&kube.kubectl(&["get", "skeinnode", name, "--output=json"])?)?)
}

/// Requests that change something.
fn writes(kube: &Kube, node: usize) -> Result<f64> {
    let metrics = skein::metrics(&kube.nodes[node])?;
    let verbs = ["create", "patch", "delete"];
    let of = |verb| metrics.sum("skein_kubernetes_requests_total", &[&format!("verb=\"{verb}\"")]);
    Ok(verbs.into_iter().map(of).sum())
}

#[test]
#[ignore = "takes a cluster: cargo e2e cluster test"]
fn the_chart_gives_a_cluster_its_network_and_takes_it_back() -> Result<()> {
    let settings =
        ["podCidr=10.244.0.0/16", r"log.level=skein_agent::control::kubernetes=debug\,info"];
    skein::with(&Options::default(), &settings, |kube, pods| {
        let before: Vec<_> = kube.nodes.iter().map(skein::traces).collect::<Result<_>>()?;
        ensure!(before.iter().all(|traces| !traces.is_empty()), "nothing is seen of Skein");
        wait_until_all_reach_all(kube, &pods, Duration::from_secs(10))?;
        println!("{}", kube.kubectl(&["get", "skeinnodes", "--output=wide"])?);
        let rate = pods[0].throughput(kube, &pods[1], pods[1].ips[0], 3)?;
        println!("one TCP connection between pods of two nodes: {rate:.2} Gb/s");
        ensure!(rate > 0.1, "{rate} Gb/s");
        let node = skeinnode(kube, "node1")?;
        ensure!(node["metadata"]["ownerReferences"][0]["kind"] == "Node", "{node}");
        ensure!(node["status"]["conditions"][0]["status"] == "True", "{node}");
        agents_may_do_what_they_do(kube)?;
        service(kube, &pods)?;
        nobody_claims_what_is_outside_of_the_cluster(kube, &pods)?;
        nothing_is_written_again(kube)?;
        upgrade(kube, &pods)?;

        skein::uninstall(kube)?;
        for node in &kube.nodes {
            let left = skein::traces(node)?;
            ensure!(left.is_empty(), "left on {}: {left:#?}", node.name());
        }
        let left = kube.kubectl(&["get", "skeinnodes", "--output=name"])?;
        ensure!(left.is_empty(), "left: {left}");
        kube.wait_ready(&[0, 1], false, READY_LIMIT).map(drop)
    })
}

/// Events are written in trouble only: a right that the role lacks would show then.
fn agents_may_do_what_they_do(kube: &Kube) -> Result<()> {
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
        ensure!(format!("{refused:#}").ends_with("no"), "{refused:#}");
    }
    Ok(())
}

/// A Service whose one endpoint is on the second node, asked from the first.
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
    kube.wait("the Service answers", READY_LIMIT, |kube| asks(kube, &format!("http://{ip}/")))?;
    let host = skein_cluster::v4(kube.nodes[1].number());
    kube.wait("the host port answers", READY_LIMIT, |kube| {
        asks(kube, &format!("http://{host}:8088/"))
    })?;
    kube.kubectl(&["delete", "pod,service", "server"]).map(drop)
}

/// Records of an attacker: one has a prefix of the world, one the key of another node.
fn nobody_claims_what_is_outside_of_the_cluster(kube: &mut Kube, pods: &[Pod]) -> Result<()> {
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
    kube.wait("both are refused, and operators told", READY_LIMIT, |kube| {
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

/// A cluster in which nothing changes is left alone.
fn nothing_is_written_again(kube: &mut Kube) -> Result<()> {
    const WHILE: Duration = Duration::from_secs(70);
    // What belongs to the start.
    thread::sleep(Duration::from_secs(5));
    let before = [writes(kube, 0)?, writes(kube, 1)?];
    thread::sleep(WHILE);
    let after = [writes(kube, 0)?, writes(kube, 1)?];
    println!("writes of each agent in {} s: {before:?} -> {after:?}", WHILE.as_secs());
    ensure!(before == after, "written without a reason: {before:?} -> {after:?}");
    Ok(())
}

/// `helm upgrade` with another value, while a pod pings another.
fn upgrade(kube: &mut Kube, pods: &[Pod]) -> Result<()> {
    let interval = Duration::from_millis(100);
    let pings = pods[0].start_pings(kube, pods[1].ips[0], 600, interval)?;
    let start = Instant::now();
    skein::upgrade(kube, &["podCidr=10.244.0.0/16", "bundling=false"])?;
    println!("helm upgrade took {:.1} s", start.elapsed().as_secs_f64());
    let (sent, received) = pings.end()?;
    println!("during the upgrade {} of {sent} pings (one each 100 ms) were lost", sent - received);
    // Each node's pod ends before the next one starts.
    ensure!(sent - received < 250, "{received} of {sent} pings");
    wait_until_all_reach_all(kube, pods, Duration::from_secs(10))?;
    for node in &kube.nodes {
        let status = node.exec(&["curl", "-s", "127.0.0.1:9464/readyz"])?;
        ensure!(status.trim() == "ready", "{}: {status}", node.name());
    }
    Ok(())
}

#[test]
#[ignore = "takes a cluster: cargo e2e cluster test"]
fn pods_stay_in_touch_whatever_happens_to_the_cluster() -> Result<()> {
    skein::with(&Options::default(), &[], |kube, pods| {
        wait_until_all_reach_all(kube, &pods, Duration::from_secs(10))?;
        the_agent_is_killed(kube, &pods)?;
        the_data_process_is_killed(kube, &pods)?;
        its_container_is_killed(kube, &pods)?;
        a_pod_takes_over_from_another(kube, &pods)?;
        the_api_server_is_away(kube, &pods)?;
        a_node_gets_another_address(kube, &pods)?;
        a_node_is_deleted_and_comes_back(kube)?;
        a_node_loses_power(kube)
    })
}

fn the_agent_is_killed(kube: &mut Kube, pods: &[Pod]) -> Result<()> {
    let pings = pods[0].start_pings(kube, pods[1].ips[0], 100, Duration::from_millis(50))?;
    thread::sleep(Duration::from_millis(500));
    skein::kill(&kube.nodes[0], "run")?;
    let (sent, received) = pings.end()?;
    println!("agent killed: {} of {sent} pings (one each 50 ms) were lost", sent - received);
    ensure!(sent == received, "{received} of {sent}");
    wait_for_agent(kube, 0)
}

fn wait_for_agent(kube: &mut Kube, node: usize) -> Result<()> {
    let took = kube.wait("the agent is ready again", READY_LIMIT, |kube| {
        Ok(skein::page(&kube.nodes[node], "/readyz")?.status == 200)
    })?;
    println!("the agent is ready again after {:.1} s", took.as_secs_f64());
    Ok(())
}

fn the_data_process_is_killed(kube: &mut Kube, pods: &[Pod]) -> Result<()> {
    let pings = pods[0].start_pings(kube, pods[1].ips[0], 300, Duration::from_millis(10))?;
    thread::sleep(Duration::from_millis(500));
    skein::kill(&kube.nodes[0], "dataplane .*--worker")?;
    let (sent, received) = pings.end()?;
    println!("data process killed: {} of {sent} pings (one each 10 ms) were lost", sent - received);
    ensure!(sent - received <= 5, "{received} of {sent}");
    Ok(())
}

fn its_container_is_killed(kube: &mut Kube, pods: &[Pod]) -> Result<()> {
    skein::kill(&kube.nodes[0], "dataplane .*--instance")?;
    thread::sleep(Duration::from_millis(200));
    let took = wait_until_all_reach_all(kube, pods, READY_LIMIT)?;
    println!("its container killed: pods reach each other again after {:.1} s", took.as_secs_f64());
    Ok(())
}

/// What a DaemonSet with maxSurge does, which this Kubernetes has not: a second pod on a node, and then the
/// end of the first. And the same again, by the DaemonSet itself.
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
    kube.wait("the DaemonSet has a pod there again", READY_LIMIT, |kube| {
        Ok(ours(kube).is_ok_and(|name| !name.is_empty() && name != first))
    })?;
    let last = ours(kube)?;
    kube.kubectl(&[&wait[..], &[&last]].concat())?;
    kube.kubectl(&[&delete[..], &["skein-next"]].concat())?;
    println!("two pods took over in {:.1} s", start.elapsed().as_secs_f64());
    let (sent, received) = pings.end()?;
    println!("taken over twice: {} of {sent} pings (one each 10 ms) were lost", sent - received);
    ensure!(sent == received, "{received} of {sent}");
    wait_for_agent(kube, 0)
}

/// Traffic goes on for a minute, and an agent that is killed meanwhile starts by what it kept.
fn the_api_server_is_away(kube: &mut Kube, pods: &[Pod]) -> Result<()> {
    kube.stop_api_server()?;
    let pings = pods[0].start_pings(kube, pods[1].ips[0], 600, Duration::from_millis(100))?;
    thread::sleep(Duration::from_secs(10));
    // Longer each time: kubelet's wait before it starts a container anew.
    skein::kill(&kube.nodes[0], "run")?;
    wait_for_agent(kube, 0)?;
    let up = skein::metrics(&kube.nodes[0])?.sum("skein_node_records_source_up", &[]);
    ensure!(up == 0.0, "the agent does not say that the API server is away");
    let (sent, received) = pings.end()?;
    println!("API server away: {} of {sent} pings were lost", sent - received);
    ensure!(sent == received, "{received} of {sent}");
    let before = [writes(kube, 0)?, writes(kube, 1)?];
    kube.start_api_server()?;
    let took = kube.wait("the agents follow the API server again", READY_LIMIT, |kube| {
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
    // The one that was killed says that it is back; nobody repeats what is there.
    for (before, after) in before.iter().zip(&after) {
        ensure!(after - before <= 5.0, "{before} -> {after}: a storm");
    }
    Ok(())
}

fn a_node_gets_another_address(kube: &mut Kube, pods: &[Pod]) -> Result<()> {
    kube.nodes[1].readdress(77)?;
    let expected = format!("{}:51900", skein_cluster::v4(77));
    // The agent's connections are from the old one: it finds them dead after 65 s.
    let took = kube.wait("the record has the new address", 2 * READY_LIMIT, |kube| {
        Ok(skeinnode(kube, "node2")?["spec"]["endpoints"][0] == expected.as_str())
    })?;
    let again = wait_until_all_reach_all(kube, pods, READY_LIMIT)?;
    println!(
        "address changed: in the record after {:.1} s, pods reach each other {:.1} s later",
        took.as_secs_f64(),
        again.as_secs_f64()
    );
    Ok(())
}

fn a_node_is_deleted_and_comes_back(kube: &mut Kube) -> Result<()> {
    kube.kubectl(&["delete", "node", "node2"])?;
    kube.wait("its record goes with it", READY_LIMIT, |kube| {
        Ok(kube.kubectl(&["get", "skeinnodes", "--output=name"])?.trim()
            == "skeinnode.skein.network/node1")
    })?;
    kube.wait("it is cut off", Duration::from_secs(5), |kube| {
        Ok(skein::metrics(&kube.nodes[0])?.sum("skein_node_records", &[]) == 1.0)
    })?;
    // Its pods are collected after a while; the node gets other pod CIDRs when it comes back.
    kube.wait("its pods are gone", 3 * READY_LIMIT, |kube| {
        let on = "--field-selector=spec.nodeName=node2";
        let left = kube.kubectl(&["get", "pods", "--all-namespaces", "--output=name", on])?;
        Ok(left.trim().is_empty())
    })?;
    // It registers itself at its start.
    kube.nodes[1].restart("kubelet")?;
    kube.wait_ready(&[0, 1], true, READY_LIMIT)?;
    println!("node deleted and back: {:.1} s until pods reach each other", in_touch(kube)?);
    Ok(())
}

/// Seconds until the pods that run on the two nodes by then reach each other.
fn in_touch(kube: &mut Kube) -> Result<f64> {
    let took = kube.wait("pods reach each other again", READY_LIMIT * 2, |kube| {
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
    kube.wait_ready(&[1], false, READY_LIMIT)?;
    kube.nodes[1].power_on()?;
    let took = kube.wait_ready(&[1], true, READY_LIMIT)?;
    println!("power is back: Ready after {:.1} s", took.as_secs_f64());
    // Its pods of before have other namespaces now.
    println!("pods reach each other {:.1} s later", in_touch(kube)?);
    Ok(())
}

#[test]
#[ignore = "takes a cluster: cargo e2e cluster test"]
fn two_families_work_side_by_side() -> Result<()> {
    let options = Options { dual_stack: true, ..Options::default() };
    skein::with(&options, &[], |kube, pods| {
        ensure!(pods.iter().all(|pod| pod.ips.len() == 2), "{pods:?}");
        wait_until_all_reach_all(kube, &pods, Duration::from_secs(10))?;
        for &ip in &pods[1].ips {
            let rate = pods[0].throughput(kube, &pods[1], ip, 2)?;
            println!("one TCP connection to {ip}: {rate:.2} Gb/s");
        }
        Ok(())
    })
}

#[test]
#[ignore = "takes a cluster: cargo e2e cluster test"]
fn operators_see_who_reaches_whom_and_who_is_silent() -> Result<()> {
    skein::with(&Options::default(), &[], |kube, pods| {
        wait_until_all_reach_all(kube, &pods, Duration::from_secs(10))?;
        all_pairs_are_well(kube)?;
        a_node_falls_silent(kube, &pods)
    })
}

/// Runs connectivity-test from outside of the cluster; its exit code and its result.
fn connectivity(kube: &Kube) -> Result<(i32, Value)> {
    let mut command = kube.command(binary()?);
    command.args(["connectivity-test", "--kubernetes", "--output=json"]);
    let done = process::finish(&mut command, b"", Duration::from_secs(240))?;
    let matrix = serde_json::from_str(&done.stdout);
    Ok((done.code, matrix.with_context(|| format!("{}{}", done.stdout, done.stderr))?))
}

/// Whether each pair of the matrix is well, by who probes and who is probed: all of two nodes and two pods.
fn pairs(matrix: &Value) -> Result<Vec<(String, String, bool)>> {
    for missing in ["silent", "absent"] {
        ensure!(matrix[missing].as_object().is_some_and(|all| all.is_empty()), "{matrix}");
    }
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let pairs = matrix["pairs"].as_array().into_iter().flatten();
    let pairs = pairs.map(|pair| (text(&pair["from"]), text(&pair["to"]), pair["ok"] == true));
    let pairs = Vec::from_iter(pairs);
    ensure!(pairs.len() == 16, "{} pairs: {matrix}", pairs.len());
    Ok(pairs)
}

fn all_pairs_are_well(kube: &mut Kube) -> Result<()> {
    let start = Instant::now();
    let (code, matrix) = connectivity(kube)?;
    let all = pairs(&matrix)?;
    println!("connectivity-test: {} pairs in {:.1} s", all.len(), start.elapsed().as_secs_f64());
    ensure!(code == 0 && all.iter().all(|pair| pair.2), "{code}: {matrix}");
    for pair in matrix["pairs"].as_array().into_iter().flatten() {
        // ICMP and UDP, small and full, and TCP; nodes are asked by ICMP only.
        let probes =
            if pair["to"].as_str().is_some_and(|to| to.starts_with("pod@")) { 5 } else { 2 };
        ensure!(pair["probed"] == probes, "{pair}");
    }
    kube.wait("nothing of the test is left", READY_LIMIT, |kube| {
        let left = kube.kubectl(&["get", "pods,configmaps", "--output=name"])?;
        Ok(!left.contains("skein-connectivity"))
    })?;
    Ok(())
}

/// What comes to the second node over the underlay is lost, what it sends is not.
fn a_node_falls_silent(kube: &mut Kube, pods: &[Pod]) -> Result<()> {
    let reachable = |kube: &Kube, name: &str| -> Result<Value> {
        let node = skeinnode(kube, name)?;
        let conditions = node["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let ours = conditions.into_iter().find(|condition| condition["type"] == "PeersReachable");
        ours.with_context(|| format!("no condition PeersReachable: {node}"))
    };
    let both = |kube: &Kube, status: &str| -> Result<bool> {
        let is = |name| Ok::<_, anyhow::Error>(reachable(kube, name)?["status"] == status);
        Ok(is("node1")? && is("node2")?)
    };
    kube.wait("both nodes reach each other", READY_LIMIT, |kube| both(kube, "True"))?;
    // Whoever has nothing to send misses nobody.
    let pings = pods[0].start_pings(kube, pods[1].ips[0], 1800, Duration::from_millis(50))?;
    let rules = "table inet silent { chain input { type filter hook input priority 0; \
                 udp dport 51900 drop; }; }";
    kube.nodes[1].exec(&["nft", rules])?;
    let start = Instant::now();
    let took = kube.wait("both nodes' metrics say so", READY_LIMIT, |kube| {
        kube.nodes.iter().try_fold(true, |all, node| {
            let silent = skein::metrics(node)?.sum("skein_peers_unreachable", &[]);
            Ok(all && silent == 1.0)
        })
    })?;
    println!("both nodes' metrics say so after {:.1} s", took.as_secs_f64());
    ensure!(took < Duration::from_secs(5), "{took:?}");
    kube.wait("both nodes' records say so", READY_LIMIT, |kube| both(kube, "False"))?;
    println!("PeersReachable is False on both after {:.1} s", start.elapsed().as_secs_f64());
    for (name, other) in [("node1", "node2"), ("node2", "node1")] {
        let condition = reachable(kube, name)?;
        println!("{name}: {condition}");
        let message = condition["message"].as_str().unwrap_or_default();
        ensure!(message.starts_with(&format!("{other} (")), "{condition}");
    }
    let (code, matrix) = connectivity(kube)?;
    for (from, to, ok) in pairs(&matrix)? {
        let node = |name: &str| name.split('@').next_back().map(str::to_owned);
        ensure!(ok == (node(&from) == node(&to)), "{from} to {to}: {matrix}");
    }
    let probes = matrix["pairs"].as_array().into_iter().flatten();
    let protocols = probes.flat_map(|pair| pair["probes"].as_array().into_iter().flatten());
    let protocols: BTreeSet<_> = protocols.filter_map(|probe| probe["protocol"].as_str()).collect();
    ensure!(protocols == BTreeSet::from(["icmp", "tcp", "udp"]), "{protocols:?}");
    ensure!(code == 1, "code {code}: {matrix}");
    kube.nodes[1].exec(&["nft", "delete table inet silent"])?;
    let took = kube.wait("all is well again", READY_LIMIT * 2, |kube| both(kube, "True"))?;
    println!("and True again {:.1} s after it is over", took.as_secs_f64());
    pings.end()?;
    wait_until_all_reach_all(kube, pods, Duration::from_secs(10)).map(drop)
}

/// One key by hand, one by its age. The agents wait for five minutes before each of two steps, until all nodes
/// must have read the record.
#[test]
#[ignore = "takes a cluster: cargo e2e cluster test"]
fn keys_change_without_a_loss() -> Result<()> {
    skein::with(&Options::default(), &["keyRotation.everyDays=1"], |kube, pods| {
        wait_until_all_reach_all(kube, &pods, Duration::from_secs(10))?;
        let spec =
            |kube: &Kube, name| Ok::<_, anyhow::Error>(skeinnode(kube, name)?["spec"].clone());
        let names = ["node1", "node2"];
        let olds: Vec<Value> = names
            .iter()
            .map(|name| Ok(spec(kube, name)?["publicKey"].clone()))
            .collect::<Result<_>>()?;
        let pings = pods[0].start_pings(kube, pods[1].ips[0], 7400, Duration::from_millis(100))?;
        let start = Instant::now();
        let agent = agent_pod(kube, 0)?;
        let exec = ["--namespace=kube-system", "exec", &agent, "--container=agent", "--"];
        println!("{}", kube.kubectl(&[&exec[..], &["skein-agent", "rotate-key"]].concat())?);
        kube.nodes[1].exec(&["touch", "--date=2 days ago", "/var/lib/skein/node.key"])?;
        // Of each node: whether its keys are these.
        let are = |kube: &Kube, keys: &dyn Fn(&Value, &Value) -> bool| -> Result<bool> {
            let mut each = names.iter().zip(&olds);
            each.try_fold(true, |all, (name, old)| Ok(all && keys(&spec(kube, name)?, old)))
        };
        let limit = Duration::from_secs(330);
        kube.wait("the next keys are in the records", READY_LIMIT, |kube| {
            are(kube, &|spec, old| spec["publicKey"] == *old && spec["secondPublicKey"].is_string())
        })?;
        println!("the next keys are in the records after {:.0} s", start.elapsed().as_secs_f64());
        kube.wait("the next keys are in force", limit, |kube| {
            are(kube, &|spec, old| spec["publicKey"] != *old && spec["secondPublicKey"] == *old)
        })?;
        println!("they are in force after {:.0} s", start.elapsed().as_secs_f64());
        kube.wait("the old keys are given up", limit, |kube| {
            are(kube, &|spec, old| spec["publicKey"] != *old && spec["secondPublicKey"].is_null())
        })?;
        println!("the old ones are given up after {:.0} s", start.elapsed().as_secs_f64());
        let (sent, received) = pings.end()?;
        println!("meanwhile {} of {sent} pings (one each 100 ms) were lost", sent - received);
        // A busy host may answer one late.
        ensure!(sent - received <= 2, "{received} of {sent}");
        wait_until_all_reach_all(kube, &pods, Duration::from_secs(10)).map(drop)
    })
}
