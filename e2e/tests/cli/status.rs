//! `status`, `check` and `log` of `skein-agent`.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use skein_lab::agent::Cluster;
use skein_lab::{Family, Lab, Plan, checks};

#[test]
fn status_shows_peers_lanes_and_offloads() -> Result<()> {
    let cluster = Cluster::up(&Plan::default(), Family::V4)?;
    checks::mixed_traffic(&cluster.lab, 1 << 20)?;
    let agent = &cluster.agents[0];
    let report = agent.report()?;
    let lanes = report["lanes"].as_array().map_or(0, Vec::len);
    ensure!(lanes == 2, "The report has {lanes} lanes instead of 2: {report}");
    let peer = &report["peers"][0];
    let is_established = peer["name"] == "node-b" && peer["state"] == "established";
    ensure!(is_established, "node-b is not established: {peer}");
    ensure!(peer["rx_bytes"].as_u64() > Some(1 << 20), "Less than 1 MiB is counted: {peer}");
    let is_recent = peer["handshake_age_seconds"].as_f64().is_some_and(|age| age < 60.0);
    ensure!(is_recent, "The handshake is 60 s old or older: {peer}");
    let key = &cluster.agents[1].record.public_key;
    ensure!(peer["public_key"] == **key, "The public key is not {key}: {peer}");
    let table = agent.run_command(&["status"])?;
    ensure!(table.code == 0, "status failed: {}", table.stderr);
    for word in ["node-b", "192.0.2.2:51900", "established", "tun_uso", "udp_gso"] {
        let is_shown = table.stdout.contains(word);
        ensure!(is_shown, "The output does not contain {word}:\n{}", table.stdout);
    }
    Ok(())
}

#[test]
fn check_succeeds_and_leaves_no_interface() -> Result<()> {
    let cluster = Cluster::prepare(Lab::new(&Plan::default())?, Family::V4)?;
    let finished = cluster.agents[0].run_command(&["check"])?;
    ensure!(finished.code == 0, "check failed: {}{}", finished.stdout, finished.stderr);
    let finished = cluster.agents[0].run_command(&["check", "-o", "json"])?;
    serde_json::from_str::<serde_json::Value>(&finished.stdout).context("check -o json")?;
    let interfaces = cluster.lab.nodes[0].ns.interfaces()?;
    let are_left = interfaces.iter().any(|name| name.starts_with("skein"));
    ensure!(!are_left, "check left interfaces: {interfaces:?}");
    Ok(())
}

#[test]
fn log_level_is_changed_at_run_time() -> Result<()> {
    let cluster = Cluster::up(&Plan::default(), Family::V4)?;
    let agent = &cluster.agents[0];
    let set = |level: &[&str]| {
        let finished = agent.run_command(&[&["log-level"], level].concat())?;
        ensure!(finished.code == 0, "log-level failed: {}", finished.stderr);
        Ok(())
    };
    let lines_with = |text: &str| -> Result<usize> {
        Ok(fs::read_to_string(agent.log())?.lines().filter(|line| line.contains(text)).count())
    };
    // Removes a record and adds it again, which the agent logs at level info.
    let change = || -> Result<()> {
        let number = |wanted| {
            let status = agent.status()?;
            Ok(status["records"]["accepted"].as_u64() == Some(wanted))
        };
        agent.remove_record(&cluster.agents[1].record.name)?;
        checks::eventually("one record", checks::EVENT_TIMEOUT, || number(1))?;
        agent.put_record(&cluster.agents[1].record)?;
        checks::eventually("two records", checks::EVENT_TIMEOUT, || number(2)).map(drop)
    };
    let (level, records) = ("log level changed", "node records have changed");
    set(&["debug"])?;
    let count = lines_with(level)?;
    ensure!(count == 2, "{count} processes instead of 2 changed the level.\n{}", cluster.logs());
    change()?;
    let before = lines_with(records)?;
    ensure!(before >= 2, "Only {before} changes of records were logged.\n{}", cluster.logs());
    set(&["error"])?;
    change()?;
    let counts = (lines_with(level)?, lines_with(records)?);
    ensure!(counts == (2, before), "Level error: {counts:?} lines.\n{}", cluster.logs());
    set(&[])?;
    change()?;
    let counts = (lines_with(level)?, lines_with(records)?);
    ensure!(counts == (4, before + 2), "Level reset: {counts:?} lines.\n{}", cluster.logs());

    let refused = agent.run_command(&["log-level", "skein_agent=loud"])?;
    let is_refused = refused.code == 2 && refused.stderr.contains("Use error, warn");
    ensure!(is_refused, "The wrong level was not refused: {}", refused.stderr);
    Ok(())
}
