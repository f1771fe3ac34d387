//! Pod traffic never crosses the underlay in clear, whatever route, interface or record is missing.
//!
//! Every node has a default route by a gateway on the underlay, as most machines have, so that a
//! packet without a better route would leave in clear. The tests listen on the switch.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use skein_lab::agent::Agent;
use skein_lab::{Family, Netns, checks};

use crate::scene::{CLUSTER, Scene, remove_record, repaired, unused};

#[test]
fn packets_for_deleted_and_unused_pods_are_refused() -> Result<()> {
    let mut scene = Scene::up(false)?;
    for node in [0, 1] {
        let pod = &scene.cluster.lab.nodes[node].pods[1];
        let gone: Vec<_> = Family::BOTH.map(|family| pod.address(family)).into();
        scene.ns(node).ip(&format!("link del {}", pod.host_interface))?;
        scene.refused(&format!("deleted pod of node {node}"), &gone)?;
    }
    for node in 0..3 {
        scene.refused(&format!("unused address of node {node}"), &unused(node))?;
    }
    checks::all_reach_all(&scene.cluster.lab)
}

/// Checks a removed node with and without `cluster_cidrs`, at run time, over a restart, and while
/// no agent runs.
fn packets_for_a_removed_node_are_refused(cluster_cidrs: bool) -> Result<()> {
    let mut scene = Scene::up(cluster_cidrs)?;
    let gone = scene.pod(2);
    scene.nothing_in_clear("record removed", &gone, |scene| {
        remove_record(&scene.cluster, "node-c")
    })?;
    scene.refused("record gone", &gone)?;
    scene.nothing_in_clear("agent restarted", &gone, |scene| {
        let agent = &mut scene.cluster.agents[0];
        agent.stop()?;
        agent.start()
    })?;
    scene.refused("record gone before the start", &gone)?;
    scene.nothing_in_clear("agent stopped", &gone, |scene| {
        scene.cluster.agents[0].stop().map(drop)
    })?;
    scene.refused("no agent", &gone)?;
    if cluster_cidrs {
        let unowned = ["10.244.77.7".parse()?, "fd00:10:244:77::7".parse()?];
        scene.refused("prefix that no node ever had", &unowned)?;
    }
    // The node comes back.
    for agent in &scene.cluster.agents {
        agent.put_record(&scene.cluster.agents[2].record)?;
    }
    scene.cluster.agents[0].start()?;
    let lab = &scene.cluster.lab;
    for family in Family::BOTH {
        checks::wait_until_reached(lab.pod(0), lab.pod(2), family, Duration::from_secs(10))?;
    }
    Ok(())
}

/// A node with a stolen key adds an address in a removed node's prefix to its endpoints.
#[test]
fn endpoint_of_a_peer_in_a_former_prefix_leaks_nothing() -> Result<()> {
    let mut scene = Scene::up(false)?;
    let gone = scene.pod(2);
    remove_record(&scene.cluster, "node-c")?;
    scene.refused("record gone", &gone)?;
    scene.nothing_in_clear("endpoint in the former prefix", &gone, |scene| {
        let mut record = scene.cluster.agents[1].record.clone();
        record.endpoints.extend(["10.244.3.77:51900".into(), "[fd00:10:244:3::77]:51900".into()]);
        scene.cluster.agents.iter().try_for_each(|agent| agent.put_record(&record))
    })?;
    scene.refused("endpoint in the former prefix", &gone)
}

#[test]
fn packets_for_removed_nodes_are_refused() -> Result<()> {
    packets_for_a_removed_node_are_refused(false)
}

#[test]
fn packets_for_removed_nodes_in_cluster_cidrs_are_refused() -> Result<()> {
    packets_for_a_removed_node_are_refused(true)
}

/// Ways to take the overlay's interface or its routes away from node a.
fn damages(elsewhere: &Netns) -> Vec<(&'static str, Vec<String>)> {
    let one = |line: &str| vec![line.to_owned()];
    vec![
        ("interface down", one("link set skein0 down")),
        ("interface deleted", one("link del skein0")),
        (
            "routes flushed",
            ["route flush dev skein0", "-6 route flush dev skein0"].map(str::to_owned).into(),
        ),
        ("addresses flushed", one("address flush dev skein0")),
        ("interface renamed", one("link set skein0 name skein9")),
        ("interface moved", one(&format!("link set skein0 netns {}", elsewhere.name()))),
        ("loopback down", one("link set lo down")),
    ]
}

#[test]
fn damaged_interface_leaks_nothing() -> Result<()> {
    let mut scene = Scene::up(false)?;
    let elsewhere = Netns::create("elsewhere")?;
    for (what, lines) in damages(&elsewhere) {
        let to = scene.pod(1);
        scene.nothing_in_clear(what, &to, |scene| {
            lines.iter().try_for_each(|line| scene.ns(0).ip(line).map(drop))
        })?;
        scene.ns(0).ip("link set lo up")?;
        repaired(&scene.cluster).with_context(|| what.to_owned())?;
    }
    Ok(())
}

/// The agent is stopped, so that no damage to the interface is repaired.
#[test]
fn damaged_interface_without_agent_leaks_nothing() -> Result<()> {
    let mut scene = Scene::up(false)?;
    let elsewhere = Netns::create("elsewhere")?;
    for (what, lines) in damages(&elsewhere) {
        if what == "loopback down" {
            // The kernel removes the unreachable routes of IPv6; only an agent restores them.
            continue;
        }
        let to = [scene.pod(1), unused(0).into()].concat();
        scene.cluster.agents[0].stop()?;
        scene.nothing_in_clear(&format!("{what} without agent"), &to, |scene| {
            lines.iter().try_for_each(|line| scene.ns(0).ip(line).map(drop))
        })?;
        scene.cluster.agents[0].start()?;
        repaired(&scene.cluster).with_context(|| what.to_owned())?;
    }
    Ok(())
}

/// A kernel that ignores routes by interfaces without carrier takes the next best route.
#[test]
fn stopped_data_process_leaks_nothing_on_linkdown() -> Result<()> {
    let mut scene = Scene::up(false)?;
    for key in ["ipv4.conf.all", "ipv4.conf.skein0", "ipv6.conf.all", "ipv6.conf.skein0"] {
        scene.ns(0).sysctl(&format!("net.{key}.ignore_routes_with_linkdown"), "1")?;
    }
    let to = scene.pod(1);
    scene.nothing_in_clear("data process stopped", &to, |scene| {
        scene.cluster.agents[0].stop().map(drop)
    })?;
    scene.cluster.agents[0].start()?;
    repaired(&scene.cluster)
}

/// Records and configuration change under traffic.
#[test]
fn changed_records_leak_nothing() -> Result<()> {
    let mut scene = Scene::up(false)?;
    let to = [scene.pod(1), scene.pod(2)].concat();
    let record = scene.cluster.agents[2].record.clone();
    let mut moved = record.clone();
    moved.pod_cidrs = vec!["10.245.3.0/24".to_owned(), "fd00:10:245:3::/64".to_owned()];
    scene.nothing_in_clear("record moved to another prefix", &to, |scene| {
        scene.cluster.agents[..2].iter().try_for_each(|agent| agent.put_record(&moved))
    })?;
    let gone = scene.pod(2);
    scene.refused("prefix that its node gave up", &gone)?;
    scene.nothing_in_clear("record moved back", &to, |scene| {
        scene.cluster.agents[..2].iter().try_for_each(|agent| agent.put_record(&record))
    })?;
    scene.nothing_in_clear("another agent takes over", &to, |scene| {
        scene.cluster.agents[0].take_over().map(drop)
    })?;
    scene.nothing_in_clear("broken record", &to, |scene| {
        let path = scene.cluster.agents[0].records_directory().join("node-b.toml");
        Ok(fs::write(path, "name = ")?)
    })?;
    scene.nothing_in_clear("records unreadable", &to, |scene| {
        let path = scene.cluster.agents[0].records_directory();
        fs::rename(&path, path.with_extension("away"))?;
        scene.cluster.agents[0].stop()?;
        scene.cluster.agents[0].start()
    })?;
    repaired(&scene.cluster)
}

/// A node gets other pod CIDRs. Its old pods keep their routes, and their addresses have no other
/// owner.
#[test]
fn former_own_pod_cidr_is_refused() -> Result<()> {
    let mut scene = Scene::up(false)?;
    let mut record = scene.cluster.agents[0].record.clone();
    record.pod_cidrs = vec!["10.245.1.0/24".to_owned(), "fd00:10:245:1::/64".to_owned()];
    scene.nothing_in_clear("own pod CIDR changed", &unused(0), |scene| {
        scene.cluster.agents.iter().try_for_each(|agent| agent.put_record(&record))
    })?;
    // The agent's nftables table drops packets of the pod, because their source is in the former
    // pod CIDR. Only the node's own probes are therefore refused with an ICMP error.
    scene.nothing_in_clear("former pod CIDR of this node", &unused(0), |_| Ok(()))?;
    scene.nothing_in_clear("the same after a restart", &unused(0), |scene| {
        scene.cluster.agents[0].stop()?;
        scene.cluster.agents[0].start()
    })?;
    Ok(())
}

fn unreachable(ns: &Netns) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    for family in ["", "-6 "] {
        let text = ns.ip(&format!("{family}route show type unreachable proto 77"))?;
        let routes = text.lines().filter_map(|line| line.split_whitespace().nth(1));
        lines.extend(routes.map(str::to_owned));
    }
    lines.sort();
    Ok(lines)
}

/// Flushes every route of the protocol number, the unreachable ones included.
fn flush(ns: &Netns) -> Result<()> {
    ns.ip("route flush proto 77")?;
    ns.ip("-6 route flush proto 77").map(drop)
}

#[test]
fn flushed_unreachable_routes_come_back_at_once() -> Result<()> {
    let scene = Scene::up(true)?;
    let ns = scene.ns(0);
    let before = unreachable(ns)?;
    for expected in [CLUSTER[0], CLUSTER[1], "10.244.1.0/24", "fd00:10:244:1::/64"] {
        ensure!(before.iter().any(|route| route == expected), "no {expected} in {before:?}");
    }
    let are_back = || Ok(unreachable(ns)? == before);
    checks::repaired_at_once("routes are back", || flush(ns), are_back)?;
    repaired(&scene.cluster)
}

/// After a boot no route exists. While the agent waits for its records, it adds unreachable routes
/// for the prefixes that it has stored.
#[test]
fn waiting_agent_refuses_packets_to_stored_prefixes() -> Result<()> {
    let mut scene = Scene::up(false)?;
    remove_record(&scene.cluster, "node-c")?;
    checks::eventually("the record is gone", checks::EVENT_TIMEOUT, || {
        Ok(scene.cluster.agents[0].status()?["records"]["accepted"] == 2)
    })?;
    let before = unreachable(scene.ns(0))?;
    scene.cluster.agents[0].stop()?;
    scene.ns(0).ip("link del skein0")?;
    flush(scene.ns(0))?;
    let agent = &mut scene.cluster.agents[0];
    await_records_of_unreachable_server(agent)?;
    agent.launch()?;
    let limit = checks::EVENT_TIMEOUT;
    let ns = scene.ns(0);
    checks::eventually("stored prefixes are refused", limit, || Ok(unreachable(ns)? == before))?;
    ensure!(
        !ns.interfaces()?.contains(&"skein0".to_owned()),
        "The agent did not wait for its records."
    );
    let to = [scene.pod(1), scene.pod(2)].concat();
    scene.refused("agent that waits", &to)
}

/// Makes the agent read its records from an API server that does not exist.
fn await_records_of_unreachable_server(agent: &mut Agent) -> Result<()> {
    let path = agent.records_directory().with_file_name("kubeconfig");
    let text = r#"{ "apiVersion": "v1", "kind": "Config", "current-context": "x",
        "clusters": [{ "name": "x", "cluster": { "server": "http://192.0.2.99:6443" } }],
        "users": [{ "name": "x", "user": {} }],
        "contexts": [{ "name": "x", "context": { "cluster": "x", "user": "x" } }] }"#;
    fs::write(&path, text)?;
    agent.config.remove("nodes");
    agent.set("kubernetes.enabled", true);
    agent.set("kubernetes.kubeconfig", path.to_string_lossy().into_owned());
    Ok(())
}

#[test]
fn cleanup_removes_unreachable_routes() -> Result<()> {
    let mut scene = Scene::up(true)?;
    remove_record(&scene.cluster, "node-c")?;
    ensure!(!unreachable(scene.ns(0))?.is_empty(), "The node has no unreachable routes.");
    scene.cluster.agents[0].stop()?;
    let left = unreachable(scene.ns(0))?;
    ensure!(!left.is_empty(), "The agent removed the unreachable routes when it stopped.");
    let cleaned = scene.cluster.agents[0].run_command(&["cleanup", "--state"])?;
    ensure!(cleaned.code == 0, "cleanup failed: {cleaned:?}");
    ensure!(unreachable(scene.ns(0))?.is_empty(), "left: {:?}", unreachable(scene.ns(0))?);
    Ok(())
}

#[test]
fn unreachable_routes_can_be_switched_off() -> Result<()> {
    let mut scene = Scene::up(true)?;
    let agent = &mut scene.cluster.agents[0];
    agent.stop()?;
    agent.set("interface.unreachable_routes", false);
    agent.start()?;
    let left = unreachable(scene.ns(0))?;
    ensure!(left.is_empty(), "the agent keeps {left:?}");
    repaired(&scene.cluster)
}

#[test]
fn agent_refuses_to_start_with_endpoint_in_cluster_cidrs() -> Result<()> {
    let mut scene = Scene::prepare(false)?;
    let wide = ["10.244.0.0/16", "fd00:10:244::/48", "192.0.2.0/24"];
    let agent = &mut scene.cluster.agents[0];
    agent.set("cluster_cidrs", wide.map(|cidr| toml::Value::from(cidr.to_owned())).to_vec());
    // The agent refuses to start both if it listens on the address and if it listens on all
    // addresses.
    for addresses in [vec!["192.0.2.1".to_owned()], vec!["0.0.0.0".to_owned()]] {
        agent.set("underlay.addresses", addresses);
        let finished = agent.run_to_end(Duration::from_secs(10))?;
        ensure!(finished.code == 2, "The exit code is not 2: {finished:?}");
        let text = &finished.stderr;
        ensure!(
            text.contains("lies in cluster_cidrs (192.0.2.0/24)"),
            "The error names another cause: {text}"
        );
    }
    ensure!(unreachable(scene.ns(0))?.is_empty(), "A refused start left routes.");
    Ok(())
}
