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
    ensure!(*addresses == serde_json::json!(["0.0.0.0"]), "The agent listens on {addresses}.");
    let note = status["notes"][0].as_str().unwrap_or_default();
    ensure!(note.contains("this host has no IPv6"), "The status has no note: {status}");
    let shown = cluster.agents[0].run_command(&["status", "--interval", "0"])?;
    ensure!(shown.stdout.contains(note), "The table has no note: {}", shown.stdout);
    let log = std::fs::read_to_string(cluster.agents[0].log())?;
    ensure!(log.contains(note), "The log has no note: {log}");
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
    ensure!(
        *addresses == serde_json::json!(["0.0.0.0", "::"]),
        "The agent listens on {addresses}."
    );
    let notes = &status["notes"];
    ensure!(*notes == serde_json::json!([]), "The status has notes: {notes}");
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
    let (code, error) = (finished.code, finished.stderr);
    ensure!(code == 2, "The exit code is {code} instead of 2: {error}");
    ensure!(error.contains("this host has no IPv6"), "The error names another cause: {error}");
    Ok(())
}

#[test]
fn check_without_ipv6_reports_the_missing_family() -> Result<()> {
    let mut cluster = prepared()?;
    let ipv6 = |agent: &Agent| -> Result<Value> {
        let finished = agent.run_command(&["check", "-o", "json"])?;
        ensure!(finished.code == 0, "check failed: {}", finished.stderr);
        let probes: Value = serde_json::from_str(&finished.stdout)?;
        let mut all = probes.as_array().into_iter().flatten();
        all.find(|probe| probe["name"] == "ipv6").cloned().context("check has no probe ipv6")
    };
    let usual = ipv6(&cluster.agents[0])?;
    ensure!(usual["ok"] == true, "This host has no IPv6, which the tests need: {usual}");
    cluster.agents[0].preload("no_ipv6")?;
    let missing = ipv6(&cluster.agents[0])?;
    let is_optional = missing["ok"] == false && missing["required"] == false;
    ensure!(is_optional, "IPv6 is not reported as missing and optional: {missing}");
    Ok(())
}
