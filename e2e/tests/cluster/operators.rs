//! Tools of operators on a cluster: `connectivity-test`, and conditions of an unreachable node.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use skein_cluster::skein::{self, Pod, wait_until_all_reach_all};
use skein_cluster::{Kube, Options};
use skein_lab::agent::binary;
use skein_lab::process;

use crate::skein::{READY_TIMEOUT, skeinnode};

#[test]
#[ignore = "takes a cluster: cargo e2e cluster test"]
fn connectivity_test_and_conditions_show_unreachable_node() -> Result<()> {
    skein::with(&Options::default(), &[], |kube, pods| {
        wait_until_all_reach_all(kube, &pods, Duration::from_secs(10))?;
        check_that_all_pairs_pass(kube)?;
        check_with_a_silent_node(kube, &pods)
    })
}

/// Runs connectivity-test from outside of the cluster and returns its exit code and its result.
fn connectivity(kube: &Kube) -> Result<(i32, Value)> {
    let mut command = kube.command(binary()?);
    command.args(["connectivity-test", "--kubernetes", "--output=json"]);
    let done = process::finish(&mut command, b"", Duration::from_secs(240))?;
    let matrix = serde_json::from_str(&done.stdout);
    Ok((done.code, matrix.with_context(|| format!("{}{}", done.stdout, done.stderr))?))
}

/// Returns the 16 pairs of the matrix of two nodes and two pods: prober, target, and success.
fn pairs(matrix: &Value) -> Result<Vec<(String, String, bool)>> {
    for missing in ["silent", "absent"] {
        let is_empty = matrix[missing].as_object().is_some_and(|all| all.is_empty());
        ensure!(is_empty, "Some probers are {missing}: {matrix}");
    }
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let pairs = matrix["pairs"].as_array().into_iter().flatten();
    let pairs = pairs.map(|pair| (text(&pair["from"]), text(&pair["to"]), pair["ok"] == true));
    let pairs = Vec::from_iter(pairs);
    ensure!(pairs.len() == 16, "The matrix has {} pairs instead of 16: {matrix}", pairs.len());
    Ok(pairs)
}

fn check_that_all_pairs_pass(kube: &mut Kube) -> Result<()> {
    let start = Instant::now();
    let (code, matrix) = connectivity(kube)?;
    let all = pairs(&matrix)?;
    println!("connectivity-test: {} pairs in {:.1} s", all.len(), start.elapsed().as_secs_f64());
    let all_pass = all.iter().all(|pair| pair.2);
    ensure!(code == 0 && all_pass, "Not all pairs pass (exit code {code}): {matrix}");
    for pair in matrix["pairs"].as_array().into_iter().flatten() {
        // Pods get ICMP and UDP probes of two sizes and a TCP probe, nodes only the ICMP probes.
        let probes =
            if pair["to"].as_str().is_some_and(|to| to.starts_with("pod@")) { 5 } else { 2 };
        ensure!(pair["probed"] == probes, "The pair was not probed {probes} times: {pair}");
    }
    kube.wait("the objects of the test are removed", READY_TIMEOUT, |kube| {
        let left = kube.kubectl(&["get", "pods,configmaps", "--output=name"])?;
        Ok(!left.contains("skein-connectivity"))
    })?;
    Ok(())
}

/// Drops all datagrams that the second node receives, but not those that it sends.
fn check_with_a_silent_node(kube: &mut Kube, pods: &[Pod]) -> Result<()> {
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
    kube.wait("both nodes reach each other", READY_TIMEOUT, |kube| both(kube, "True"))?;
    // A node detects an unreachable peer only if it sends to this peer.
    let pings = pods[0].start_pings(kube, pods[1].ips[0], 1800, Duration::from_millis(50))?;
    let rules = "table inet silent { chain input { type filter hook input priority 0; \
                 udp dport 51900 drop; }; }";
    kube.nodes[1].exec(&["nft", rules])?;
    let start = Instant::now();
    let took = kube.wait("both nodes' metrics count the peer", READY_TIMEOUT, |kube| {
        kube.nodes.iter().try_fold(true, |all, node| {
            let silent = skein::metrics(node)?.sum("skein_peers_unreachable", &[]);
            Ok(all && silent == 1.0)
        })
    })?;
    println!("both nodes' metrics count the peer after {:.1} s", took.as_secs_f64());
    kube.wait("PeersReachable is False on both nodes", READY_TIMEOUT, |kube| both(kube, "False"))?;
    println!("PeersReachable is False on both after {:.1} s", start.elapsed().as_secs_f64());
    for (name, other) in [("node1", "node2"), ("node2", "node1")] {
        let condition = reachable(kube, name)?;
        println!("{name}: {condition}");
        let message = condition["message"].as_str().unwrap_or_default();
        let is_named = message.starts_with(&format!("{other} ("));
        ensure!(is_named, "The condition of {name} does not name {other}: {condition}");
    }
    let (code, matrix) = connectivity(kube)?;
    for (from, to, ok) in pairs(&matrix)? {
        let node = |name: &str| name.split('@').next_back().map(str::to_owned);
        let is_local = node(&from) == node(&to);
        ensure!(ok == is_local, "{from} to {to} passes: {ok}, expected {is_local}: {matrix}");
    }
    let probes = matrix["pairs"].as_array().into_iter().flatten();
    let protocols = probes.flat_map(|pair| pair["probes"].as_array().into_iter().flatten());
    let protocols: BTreeSet<_> = protocols.filter_map(|probe| probe["protocol"].as_str()).collect();
    ensure!(protocols == BTreeSet::from(["icmp", "tcp", "udp"]), "The probes use {protocols:?}.");
    ensure!(code == 1, "The exit code is {code} instead of 1: {matrix}");
    kube.nodes[1].exec(&["nft", "delete table inet silent"])?;
    let took =
        kube.wait("both nodes reach each other", READY_TIMEOUT * 2, |kube| both(kube, "True"))?;
    println!("and True again {:.1} s after the end of the fault", took.as_secs_f64());
    pings.wait_until_sent()?;
    wait_until_all_reach_all(kube, pods, Duration::from_secs(10)).map(drop)
}
