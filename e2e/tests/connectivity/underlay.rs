//! Effects of the underlay: overflowing queues, link-local endpoints, interfaces that appear late.

use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use skein_lab::agent::{Agent, Cluster, PORT};
use skein_lab::{Family, Lab, Plan, UNDERLAY, checks};

#[test]
fn drops_in_the_queue_of_the_tun_device_are_counted() -> Result<()> {
    let mut cluster = Cluster::prepare(Lab::new(&Plan::default())?, Family::V4)?;
    cluster.agents[0].set("interface.txqueuelen", 50);
    cluster.start()?;
    checks::all_reach_all(&cluster.lab)?;
    let (lab, agent) = (&cluster.lab, &cluster.agents[0]);
    let drops = || Ok::<_, anyhow::Error>(agent.metrics()?.sum("skein_tun_queue_drops_total", &[]));
    // The kernel also drops packets that it sends itself while no process has the queues open.
    let before = drops()?;
    let to = SocketAddr::new(lab.pod(1).address(Family::V4), 9);
    let pid = agent.dataplane_pids().into_iter().next().and_then(Pid::from_raw);
    let pid = pid.context("no data process")?;
    kill_process(pid, Signal::STOP)?;
    let flood = || -> Result<()> {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        for _ in 0..1000 {
            socket.send_to(&[0; 64], to)?;
        }
        Ok(())
    };
    let flooded = lab.pod(0).ns.run(flood);
    kill_process(pid, Signal::CONT)?;
    flooded??;
    let link = lab.nodes[0].ns.sh("ip -j -s link show dev skein0")?;
    let link: serde_json::Value = serde_json::from_str(&link)?;
    let by_the_kernel = link[0]["stats64"]["tx"]["dropped"].as_f64().context("no counter")?;
    ensure!(
        by_the_kernel >= before + 800.0,
        "The queue of 50 packets dropped only {by_the_kernel}."
    );
    // Metrics may show a report that is up to one second old.
    let same = || Ok(drops()? == by_the_kernel);
    checks::eventually("the metric has the device's counter", checks::EVENT_TIMEOUT, same)?;
    let status = agent.run_command(&["status", "--interval", "0"])?;
    let is_shown = status.stdout.contains("tun_queue_full");
    ensure!(is_shown, "The status does not show the drops: {}", status.stdout);
    Ok(())
}

/// Nodes whose records name link-local addresses, with the interface that they belong to.
fn on_link_local_addresses(interface: &str) -> Result<Cluster> {
    let mut cluster = Cluster::prepare(Lab::new(&Plan::default())?, Family::V6)?;
    let Cluster { agents, lab, .. } = &mut cluster;
    for (index, (agent, node)) in agents.iter_mut().zip(&lab.nodes).enumerate() {
        let address = format!("fe80::aaaa:{}", index + 1);
        node.ns.ip(&format!("address add {address}/64 dev {UNDERLAY} nodad"))?;
        agent.set("underlay.addresses", vec!["::"]);
        agent.record.endpoints = vec![format!("[{address}%{interface}]:{PORT}")];
    }
    for agent in agents.iter() {
        agents.iter().try_for_each(|other| agent.put_record(&other.record))?;
    }
    cluster.start()?;
    Ok(cluster)
}

fn endpoint(agent: &Agent) -> Result<String> {
    let report = agent.report()?;
    Ok(report["peers"][0]["endpoint"].as_str().unwrap_or_default().to_owned())
}

#[test]
fn nodes_join_over_link_local_addresses() -> Result<()> {
    let cluster = on_link_local_addresses(UNDERLAY)?;
    let (lab, agents) = (&cluster.lab, &cluster.agents);
    checks::all_reach_all(lab)?;
    checks::transfer(lab.pod(0), lab.pod(1), Family::V4, 4 << 20)?;
    for agent in agents {
        let endpoint = endpoint(agent)?;
        let is_scoped = endpoint.starts_with("[fe80::aaaa:") && endpoint.contains('%');
        ensure!(is_scoped, "The endpoint is not link-local: {endpoint}");
    }
    // Sessions and the scope of their endpoints are in the session store, which outlives the
    // process.
    let handshakes =
        || agents[0].metrics().map(|m| m.sum("skein_handshakes_total", &["completed"]));
    let before = endpoint(&agents[0])?;
    let pid = agents[0].dataplane_pids().into_iter().next().and_then(Pid::from_raw);
    kill_process(pid.context("no data process")?, Signal::KILL)?;
    let back = || Ok(checks::reaches(lab.pod(0), lab.pod(1), Family::V4).is_ok());
    checks::eventually("the pods reach each other", Duration::from_secs(10), back)?;
    let reports = || Ok(endpoint(&agents[0]).is_ok());
    checks::eventually("the data process reports", checks::EVENT_TIMEOUT, reports)?;
    let after = endpoint(&agents[0])?;
    ensure!(after == before, "The endpoint changed from {before} to {after}.");
    let completed = handshakes()?;
    ensure!(completed == 0.0, "{completed} new handshakes were completed.");
    checks::all_reach_all(lab)
}

#[test]
fn endpoint_of_a_missing_interface_is_used_once_it_appears() -> Result<()> {
    let cluster = on_link_local_addresses("later0")?;
    let (lab, agents) = (&cluster.lab, &cluster.agents);
    let log = std::fs::read_to_string(agents[0].log())?;
    ensure!(
        log.contains("this node has no interface later0"),
        "The log does not name the interface:\n{log}"
    );
    let endpoint_now = endpoint(&agents[0])?;
    ensure!(endpoint_now.is_empty(), "An endpoint without its interface is used: {endpoint_now}");
    for node in &lab.nodes {
        node.ns.ip("link add later0 type veth peer name later1")?;
        node.ns.ip("link set later0 up")?;
    }
    let used = || Ok(endpoint(&agents[0])?.contains('%'));
    checks::eventually("the endpoint is used", Duration::from_secs(15), used)?;
    ensure!(
        agents[0].http("/readyz")?.status == 200,
        "The node is not ready because of one endpoint."
    );
    Ok(())
}
