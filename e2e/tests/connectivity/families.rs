//! Hosts that lack an address family.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use skein_lab::agent::{Agent, Cluster};
use skein_lab::checks;
use skein_lab::load::http;
use skein_lab::{Family, Lab, Plan};

/// Two nodes; the first has the default underlay addresses and the chart's metrics listener.
fn prepared() -> Result<Cluster> {
    let mut cluster = Cluster::prepare(Lab::new(&Plan::default())?, Family::V4)?;
    let agent = &mut cluster.agents[0];
    let underlay = agent.config["underlay"].as_table_mut().context("no [underlay]")?;
    underlay.remove("addresses");
    agent.set("metrics.listen", "[::]:9464");
    Ok(cluster)
}

#[test]
fn default_configuration_without_ipv6_runs_with_a_note() -> Result<()> {
    let mut cluster = prepared()?;
    cluster.agents[0].preload("no_ipv6")?;
    cluster.start()?;
    checks::all_reach_all(&cluster.lab)?;
    let status: Value = cluster.agents[0].status()?;
    let addresses = &status["config"]["underlay"]["addresses"];
    ensure!(*addresses == serde_json::json!(["0.0.0.0"]), "the agent listens on {addresses}");
    let note = status["notes"][0].as_str().unwrap_or_default();
    ensure!(note.contains("this host has no IPv6"), "the status has no note: {status}");
    let shown = cluster.agents[0].run_command(&["status", "--interval", "0"])?;
    ensure!(shown.stdout.contains(note), "the table has no note: {}", shown.stdout);
    let log = std::fs::read_to_string(cluster.agents[0].log())?;
    ensure!(log.contains(note), "the log has no note: {log}");
    // The listener on all addresses falls back to those of IPv4.
    let address = (cluster.lab.nodes[0].underlay(Family::V4), 9464).into();
    let answer = cluster.lab.nodes[1].ns.run(move || http::get(address, "/healthz"))??;
    ensure!(answer.status == 200, "/healthz answers {}", answer.status);
    Ok(())
}

#[test]
fn default_configuration_with_ipv6_listens_on_both_families() -> Result<()> {
    let mut cluster = prepared()?;
    cluster.start()?;
    let status: Value = cluster.agents[0].status()?;
    let addresses = &status["config"]["underlay"]["addresses"];
    ensure!(*addresses == serde_json::json!(["0.0.0.0", "::"]), "the agent listens on {addresses}");
    ensure!(status["notes"] == serde_json::json!([]), "{}", status["notes"]);
    for family in Family::BOTH {
        let address = (cluster.lab.nodes[0].underlay(family), 9464).into();
        let answer = cluster.lab.nodes[1].ns.run(move || http::get(address, "/healthz"))??;
        ensure!(answer.status == 200, "{address}: /healthz answers {}", answer.status);
    }
    Ok(())
}

#[test]
fn configured_ipv6_address_without_ipv6_is_refused() -> Result<()> {
    let mut cluster = prepared()?;
    let agent = &mut cluster.agents[0];
    agent.set("underlay.addresses", vec!["0.0.0.0".to_owned(), "::".to_owned()]);
    agent.preload("no_ipv6")?;
    agent.set("metrics.listen", "127.0.0.1:9464");
    let finished = agent.run_to_end(Duration::from_secs(15))?;
    ensure!(finished.code == 2, "exit code {}: {}", finished.code, finished.stderr);
    ensure!(finished.stderr.contains("this host has no IPv6"), "{}", finished.stderr);
    Ok(())
}

#[test]
fn check_without_ipv6_reports_the_missing_family() -> Result<()> {
    let mut cluster = prepared()?;
    let ipv6 = |agent: &Agent| -> Result<Value> {
        let finished = agent.run_command(&["check", "-o", "json"])?;
        ensure!(finished.code == 0, "exit code {}: {}", finished.code, finished.stderr);
        let probes: Value = serde_json::from_str(&finished.stdout)?;
        let mut all = probes.as_array().into_iter().flatten();
        all.find(|probe| probe["name"] == "ipv6").cloned().context("check has no probe ipv6")
    };
    let usual = ipv6(&cluster.agents[0])?;
    ensure!(usual["ok"] == true, "this host must have IPv6 for the tests: {usual}");
    cluster.agents[0].preload("no_ipv6")?;
    let missing = ipv6(&cluster.agents[0])?;
    ensure!(missing["ok"] == false && missing["required"] == false, "{missing}");
    Ok(())
}
