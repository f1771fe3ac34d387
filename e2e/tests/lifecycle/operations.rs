//! Repair and removal by the agent, several agents on one host, memory of the data process.

use anyhow::{Context as _, Result, ensure};
use skein_lab::agent::{Agent, Cluster, Record};
use skein_lab::process::resident_bytes;
use skein_lab::{Family, Plan, checks};

use crate::start_errors::prepared;

#[test]
fn two_agents_run_in_one_network_namespace() -> Result<()> {
    let mut cluster = Cluster::up(&Plan::default(), Family::V4)?;
    checks::all_reach_all(&cluster.lab)?;
    let mut second = vec![];
    for node in &cluster.lab.nodes {
        let mut agent = Agent::prepare(&cluster.lab, node, Family::V4, 1)?;
        agent.record.pod_cidrs = vec![format!("10.99.{}.0/24", node.index)];
        second.push(agent);
    }
    for agent in &second {
        second.iter().try_for_each(|other| agent.put_record(&other.record))?;
    }
    for agent in &mut second {
        agent.start()?;
    }
    // Pings between the nodes' addresses on the second overlay; the first overlay is not disturbed.
    let ping = "ping -n -c 3 -i 0.1 -W 2 10.99.1.1";
    let reached = || Ok(cluster.lab.nodes[0].ns.sh(ping).is_ok());
    checks::eventually("the second overlay works", checks::EVENT_TIMEOUT, reached)?;
    checks::mixed_traffic(&cluster.lab, 1 << 20)?;
    for agent in &mut second {
        agent.stop()?;
    }
    checks::all_reach_all(&cluster.lab)?;
    for agent in &mut cluster.agents {
        agent.stop()?;
    }
    Ok(())
}

#[test]
fn routes_addresses_and_interface_are_repaired() -> Result<()> {
    let cluster = Cluster::up(&Plan::default(), Family::V4)?;
    checks::all_reach_all(&cluster.lab)?;
    let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
    let node = &cluster.lab.nodes[0].ns;
    for damage in [
        "route del 10.244.2.0/24",
        "-6 route del fd00:10:244:2::/64",
        "link set skein0 down",
        "link set skein0 mtu 1300",
        "address flush dev skein0",
        "link del skein0",
    ] {
        node.ip(damage).with_context(|| damage.to_owned())?;
        for family in Family::BOTH {
            let limit = checks::EVENT_TIMEOUT;
            checks::wait_until_reached(a, b, family, limit)
                .with_context(|| format!("after `{damage}`"))?;
        }
    }
    let link = node.ip("link show skein0")?;
    ensure!(link.contains("mtu 1440"), "The MTU of skein0 is not 1440: {link}");
    checks::mixed_traffic(&cluster.lab, 1 << 20)
}

#[test]
fn cleanup_removes_interface_routes_and_processes() -> Result<()> {
    let mut cluster = Cluster::up(&Plan::default(), Family::V4)?;
    checks::all_reach_all(&cluster.lab)?;
    let before = cluster.agents[0].run_command(&["cleanup"])?;
    ensure!(before.code != 0, "cleanup succeeded while the agent runs: {}", before.stdout);
    checks::all_reach_all(&cluster.lab)?;
    cluster.agents[0].stop()?;
    let finished = cluster.agents[0].run_command(&["cleanup"])?;
    ensure!(finished.code == 0, "cleanup failed: {}", finished.stderr);
    let node = &cluster.lab.nodes[0].ns;
    let interfaces = node.interfaces()?;
    let is_left = interfaces.iter().any(|name| name == "skein0");
    ensure!(!is_left, "cleanup left the interface: {interfaces:?}");
    for routes in [node.ip("route show table all")?, node.ip("-6 route show table all")?] {
        let are_left = routes.contains("skein0") || routes.contains("10.244.2.0/24");
        ensure!(!are_left, "cleanup left routes: {routes}");
    }
    ensure!(cluster.agents[0].dataplane_pids().is_empty(), "A data process still runs.");
    // A cleanup with nothing to remove succeeds.
    let repeated = cluster.agents[0].run_command(&["cleanup"])?;
    ensure!(repeated.code == 0, "A repeated cleanup failed: {}", repeated.stderr);
    cluster.agents[0].start()?;
    checks::all_reach_all(&cluster.lab)
}

#[test]
fn data_process_with_100_peers_uses_less_than_64_mib() -> Result<()> {
    let mut cluster = prepared()?;
    for number in 0..100_u16 {
        let key = cluster.lab.directory().join(format!("peer-{number}.key"));
        let record = Record {
            name: format!("peer-{number}"),
            public_key: skein_lab::agent::new_key(&key)?,
            second_public_key: None,
            endpoints: vec![format!("192.0.2.{}:51900", 100 + number)],
            pod_cidrs: vec![
                format!("10.245.{number}.0/24"),
                format!("fd00:10:245:{number:x}::/64"),
            ],
        };
        cluster.agents[0].put_record(&record)?;
    }
    cluster.start()?;
    checks::mixed_traffic(&cluster.lab, 20 << 20)?;
    let report = cluster.agents[0].report()?;
    let count = report["peers"].as_array().map_or(0, Vec::len);
    ensure!(count == 101, "The report has {count} peers instead of 101.");
    let pid = *cluster.agents[0].dataplane_pids().first().context("no data process")?;
    let mebibytes = resident_bytes(pid)? >> 20;
    ensure!(mebibytes < 64, "The data process uses {mebibytes} MiB of memory.");
    Ok(())
}
