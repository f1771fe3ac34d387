//! Metrics and health of an agent.

use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use skein_lab::agent::Cluster;
use skein_lab::{Family, Lab, Plan, checks, process};

#[test]
fn metrics_are_well_formed_and_health_is_told() -> Result<()> {
    let cluster = Cluster::up(&Plan::default(), Family::V4)?;
    checks::mixed_traffic(&cluster.lab, 4 << 20)?;
    for agent in &cluster.agents {
        let metrics = agent.metrics()?;
        let mut promtool = Command::new("promtool");
        promtool.args(["check", "metrics"]);
        let limit = Duration::from_secs(20);
        let finished = process::finish(&mut promtool, metrics.0.as_bytes(), limit)?;
        let said = finished.stdout + &finished.stderr;
        ensure!(finished.code == 0 && said.trim().is_empty(), "promtool: {said}");
        for direction in ["egress", "ingress"] {
            let label = format!("direction=\"{direction}\"");
            let sum = |name: &str| metrics.sum(name, &[&label]);
            let (inner, outer) =
                (sum("skein_inner_packets_total"), sum("skein_outer_packets_total"));
            ensure!(inner > 1000.0 && outer > 100.0, "{direction}: {inner} inner, {outer} outer");
            ensure!(sum("skein_inner_bytes_total") > 8e6, "{direction} bytes");
            ensure!(sum("skein_packets_per_call_count") > 0.0, "{direction} calls");
        }
        ensure!(metrics.sum("skein_capability", &[]) > 0.0, "no capabilities");
        ensure!(metrics.sum("skein_build_info", &[]) == 1.0, "no build info");
        ensure!(!metrics.0.contains("node-b\"") || !metrics.0.contains("peer="), "peer series");
        ensure!(agent.http("/healthz")?.status == 200);
        ensure!(agent.http("/readyz")?.status == 200);
        ensure!(agent.http("/nothing")?.status == 404);
    }
    Ok(())
}

#[test]
fn series_for_each_peer_are_there_where_they_are_asked_for() -> Result<()> {
    let mut cluster = Cluster::prepare(Lab::new(&Plan::default())?, Family::V4)?;
    cluster.agents[0].set("metrics.per_peer", true);
    cluster.start()?;
    checks::transfer(cluster.lab.pod(0), cluster.lab.pod(1), Family::V4, 4 << 20)?;
    let metrics = cluster.agents[0].metrics()?;
    let of_peer = |name: &str, label: &str| metrics.sum(name, &["peer=\"node-b\"", label]);
    ensure!(of_peer("skein_peer_up", "") == 1.0, "{}", metrics.0);
    let sent = of_peer("skein_peer_bytes_total", "direction=\"egress\"");
    ensure!(sent > f64::from(4 << 20), "{sent} bytes sent: {}", metrics.0);
    ensure!(of_peer("skein_peer_packets_total", "direction=\"ingress\"") > 0.0);
    let without = cluster.agents[1].metrics()?;
    ensure!(!without.0.contains("skein_peer_") && !without.0.contains("peer="), "{}", without.0);
    Ok(())
}
