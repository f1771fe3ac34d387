//! Repairs by the agent after other programs have changed its interface, routes or settings.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use skein_lab::agent::{Agent, Cluster};
use skein_lab::checks;
use skein_lab::cni::Runtime;
use skein_lab::load::ping::{Ping, ping};
use skein_lab::{Family, Lab, Netns, Plan};

/// Maximum time of a repair by the agent's timer.
const TIMED_REPAIR_TIMEOUT: Duration = Duration::from_secs(15);

fn setting(ns: &Netns, key: &str) -> Result<String> {
    Ok(ns.sh(&format!("cat /proc/sys/net/{key}"))?.trim().to_owned())
}

fn reached(cluster: &Cluster, from: usize, to: usize) -> Result<()> {
    let (from, to) = (cluster.lab.pod(from), cluster.lab.pod(to));
    for family in Family::BOTH {
        checks::wait_until_reached(from, to, family, Duration::from_secs(10))?;
    }
    Ok(())
}

#[test]
fn forwarding_switched_off_is_repaired_at_once() -> Result<()> {
    let cluster = Cluster::up(&Plan::default(), Family::V4)?;
    let ns = &cluster.lab.nodes[0].ns;
    for key in ["ipv4/ip_forward", "ipv6/conf/all/forwarding", "ipv4/conf/skein0/forwarding"] {
        let switch_off = || ns.sysctl(&format!("net.{}", key.replace('/', ".")), "0").map(drop);
        let is_on = || Ok(setting(ns, key)? == "1");
        checks::repaired_at_once(&format!("{key} is on"), switch_off, is_on)?;
    }
    checks::all_reach_all(&cluster.lab)
}

#[test]
fn foreign_route_is_a_conflict_of_one_peer() -> Result<()> {
    let plan = Plan { nodes: 3, ..Plan::default() };
    let mut cluster = Cluster::prepare(Lab::new(&plan)?, Family::V4)?;
    let foreign = "route add 10.244.2.0/24 dev eth0";
    cluster.lab.nodes[0].ns.ip(foreign)?;
    // `start` waits until every agent is ready.
    cluster.start()?;
    reached(&cluster, 0, 2)?;
    let agent = &cluster.agents[0];
    let status = agent.status()?;
    ensure!(status["ready"] == true, "The node is not ready: {}", status["reasons"]);
    let conflicts = &status["interface"]["conflicts"];
    let is_single = conflicts.as_array().is_some_and(|all| all.len() == 1);
    ensure!(is_single, "There is not exactly one conflict: {conflicts}");
    ensure!(conflicts[0]["peer"] == "node-b" && conflicts[0]["prefix"] == "10.244.2.0/24");
    let metric = || Ok::<_, anyhow::Error>(agent.metrics()?.sum("skein_route_conflicts", &[]));
    ensure!(metric()? == 1.0, "{} conflicts are counted instead of 1.", metric()?);
    let text = agent.run_command(&["status", "--interval", "0"])?.stdout;
    ensure!(
        text.contains("node-b: ") && text.contains("another program has one"),
        "The status does not show the conflict: {text}"
    );
    // The other family of that peer, and every other peer, are not affected.
    let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
    checks::wait_until_reached(a, b, Family::V6, checks::EVENT_TIMEOUT)?;
    cluster.lab.nodes[0].ns.ip(&foreign.replace("add", "del"))?;
    checks::wait_until_reached(a, b, Family::V4, TIMED_REPAIR_TIMEOUT)?;
    let is_resolved = || Ok(metric()? == 0.0);
    checks::eventually("the conflict is resolved", TIMED_REPAIR_TIMEOUT, is_resolved).map(drop)
}

/// Returns the names of the TUN devices of an agent.
fn devices(cluster: &Cluster, agent: &Agent) -> Result<Vec<String>> {
    let text = cluster.lab.nodes[0].ns.ip("-o -details link show type tun")?;
    let mark = format!("skein:{}", agent.record.name);
    let name = |line: &str| line.split(": ").nth(1).map(str::to_owned);
    Ok(text.lines().filter(|line| line.contains(&mark)).filter_map(name).collect())
}

#[test]
fn renamed_interface_leaves_no_orphan() -> Result<()> {
    let mut cluster = Cluster::up(&Plan::default(), Family::V4)?;
    let rename = |cluster: &Cluster, from: &str, to: &str| {
        cluster.lab.nodes[0].ns.ip(&format!("link set {from} name {to}")).map(drop)
    };
    let only = |cluster: &Cluster, name: &str| {
        Ok::<_, anyhow::Error>(devices(cluster, &cluster.agents[0])? == [name])
    };
    let rename_it = || rename(&cluster, "skein0", "elsewhere");
    checks::repaired_at_once("the name is back", rename_it, || only(&cluster, "skein0"))?;
    reached(&cluster, 0, 1)?;

    // Renames the interface while no agent runs.
    cluster.agents[0].stop()?;
    rename(&cluster, "skein0", "elsewhere")?;
    cluster.agents[0].start()?;
    ensure!(only(&cluster, "skein0")?, "left: {:?}", devices(&cluster, &cluster.agents[0])?);
    reached(&cluster, 0, 1)?;

    // Renames the interface by the configuration.
    cluster.agents[0].stop()?;
    cluster.agents[0].set("interface.name", "skein7");
    cluster.agents[0].start()?;
    ensure!(only(&cluster, "skein7")?, "left: {:?}", devices(&cluster, &cluster.agents[0])?);
    reached(&cluster, 0, 1)?;

    cluster.agents[0].stop()?;
    rename(&cluster, "skein7", "elsewhere")?;
    let cleaned = cluster.agents[0].run_command(&["cleanup"])?;
    ensure!(cleaned.code == 0, "cleanup failed: {cleaned:?}");
    let left = devices(&cluster, &cluster.agents[0])?;
    ensure!(left.is_empty(), "cleanup left these devices: {left:?}");
    Ok(())
}

/// Returns the source that a program of the node gets for a packet to a pod.
fn source(ns: &Netns, to: std::net::IpAddr) -> Result<String> {
    let text = ns.ip(&format!("route get {to}"))?;
    let mut words = text.split_whitespace().skip_while(|word| *word != "src");
    Ok(words.nth(1).with_context(|| format!("no source: {text}"))?.to_owned())
}

#[test]
fn address_on_loopback_is_no_source_for_own_pods() -> Result<()> {
    let plan = Plan { pods: 0, ..Plan::default() };
    let mut cluster = Cluster::prepare(Lab::new(&plan)?, Family::V4)?;
    cluster.agents[0].serve_pods()?;
    cluster.start()?;
    let ns = &cluster.lab.nodes[0].ns;
    ns.ip("address add 203.0.113.7/32 dev lo")?;
    ns.ip("address add 2001:db8:7::7/128 dev lo nodad")?;
    let runtime = Runtime::new(&cluster.agents[0], &cluster.lab.nodes[0])?;
    let (a, b) = (runtime.pod("a")?, runtime.pod("b")?);
    let own = |family| match family {
        Family::V4 => "10.244.1.1",
        Family::V6 => "fd00:10:244:1::1",
    };
    for family in Family::BOTH {
        let found = source(ns, a.address(family))?;
        ensure!(found == own(family), "A program of the node sends from {found}.");
        let answers = ping(ns, a.address(family), Ping::default())?;
        ensure!(answers.complete(), "Not every ping was answered: {}", answers.text);
    }
    // The kernel removes routes together with their source address: pods must stay reachable.
    ns.ip("link del skein0")?;
    for family in Family::BOTH {
        let answers = ping(&a.ns, b.address(family), Ping { count: 20, ..Ping::default() })?;
        ensure!(answers.complete(), "Pods of one node lost packets: {}", answers.text);
        checks::eventually("the source is back", TIMED_REPAIR_TIMEOUT, || {
            Ok(source(ns, a.address(family))? == own(family))
        })?;
    }
    Ok(())
}
