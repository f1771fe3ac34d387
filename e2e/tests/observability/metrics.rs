//! Metrics and health of an agent.

use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use skein_lab::agent::Cluster;
use skein_lab::{Family, Lab, Plan, checks, process};

#[test]
fn metrics_are_valid_and_health_is_reported() -> Result<()> {
    let cluster = Cluster::up(&Plan::default(), Family::V4)?;
    checks::mixed_traffic(&cluster.lab, 4 << 20)?;
    for agent in &cluster.agents {
        let metrics = agent.metrics()?;
        let mut promtool = Command::new("promtool");
        promtool.args(["check", "metrics"]);
        let limit = Duration::from_secs(20);
        let finished = process::finish(&mut promtool, metrics.0.as_bytes(), limit)?;
        let said = finished.stdout + &finished.stderr;
        ensure!(
            finished.code == 0 && said.trim().is_empty(),
            "promtool refuses the metrics: {said}"
        );
        for direction in ["egress", "ingress"] {
            let label = format!("direction=\"{direction}\"");
            let sum = |name: &str| metrics.sum(name, &[&label]);
            let (inner, outer) =
                (sum("skein_inner_packets_total"), sum("skein_outer_packets_total"));
            ensure!(
                inner > 1000.0 && outer > 100.0,
                "{direction}: Only {inner} inner and {outer} outer packets are counted."
            );
            let bytes = sum("skein_inner_bytes_total");
            ensure!(bytes > 8e6, "{direction}: Only {bytes} inner bytes are counted.");
            let calls = sum("skein_packets_per_call_count");
            ensure!(calls > 0.0, "{direction}: No calls are counted.");
        }
        ensure!(metrics.sum("skein_capability", &[]) > 0.0, "No capability is listed.");
        ensure!(metrics.sum("skein_build_info", &[]) == 1.0, "The build info is missing.");
        let has_peers = metrics.0.contains("node-b\"") && metrics.0.contains("peer=");
        ensure!(!has_peers, "There are series of peers without metrics.per_peer.");
        ensure!(agent.http("/healthz")?.status == 200);
        ensure!(agent.http("/readyz")?.status == 200);
        ensure!(agent.http("/nothing")?.status == 404);
    }
    Ok(())
}

#[test]
fn series_per_peer_exist_only_if_configured() -> Result<()> {
    let mut cluster = Cluster::prepare(Lab::new(&Plan::default())?, Family::V4)?;
    cluster.agents[0].set("metrics.per_peer", true);
    cluster.start()?;
    checks::transfer(cluster.lab.pod(0), cluster.lab.pod(1), Family::V4, 4 << 20)?;
    let metrics = cluster.agents[0].metrics()?;
    let of_peer = |name: &str, label: &str| metrics.sum(name, &["peer=\"node-b\"", label]);
    ensure!(of_peer("skein_peer_up", "") == 1.0, "The peer is not up: {}", metrics.0);
    let sent = of_peer("skein_peer_bytes_total", "direction=\"egress\"");
    ensure!(sent > f64::from(4 << 20), "Only {sent} sent bytes are counted: {}", metrics.0);
    let received = of_peer("skein_peer_packets_total", "direction=\"ingress\"");
    ensure!(received > 0.0, "No received packets are counted: {}", metrics.0);
    let without = cluster.agents[1].metrics()?;
    let has_peers = without.0.contains("skein_peer_") || without.0.contains("peer=");
    ensure!(!has_peers, "There are series of peers without metrics.per_peer: {}", without.0);
    Ok(())
}
