//! `status`, `check` and `log` of `skein-agent`.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use skein_lab::agent::Cluster;
use skein_lab::{Family, Lab, Plan, checks};

#[test]
fn status_tells_people_and_programs() -> Result<()> {
    let cluster = Cluster::up(&Plan::default(), Family::V4)?;
    checks::mixed_traffic(&cluster.lab, 1 << 20)?;
    let agent = &cluster.agents[0];
    let report = agent.report()?;
    ensure!(report["lanes"].as_array().is_some_and(|lanes| lanes.len() == 2), "{report}");
    let peer = &report["peers"][0];
    ensure!(peer["name"] == "node-b" && peer["state"] == "established", "{report}");
    ensure!(peer["rx_bytes"].as_u64() > Some(1 << 20), "{report}");
    ensure!(peer["handshake_age_seconds"].as_f64().is_some_and(|age| age < 60.0), "{report}");
    ensure!(peer["public_key"] == *cluster.agents[1].record.public_key, "{report}");
    let table = agent.run_command(&["status"])?;
    ensure!(table.code == 0, "{}", table.stderr);
    for word in ["node-b", "192.0.2.2:51900", "established", "tun_uso", "udp_gso"] {
        ensure!(table.stdout.contains(word), "{word} is not in:\n{}", table.stdout);
    }
    Ok(())
}

#[test]
fn check_tells_what_this_machine_can_do() -> Result<()> {
    let cluster = Cluster::prepare(Lab::new(&Plan::default())?, Family::V4)?;
    let finished = cluster.agents[0].run_command(&["check"])?;
    ensure!(finished.code == 0, "{}{}", finished.stdout, finished.stderr);
    let finished = cluster.agents[0].run_command(&["check", "-o", "json"])?;
    serde_json::from_str::<serde_json::Value>(&finished.stdout).context("check -o json")?;
    let interfaces = cluster.lab.nodes[0].ns.interfaces()?;
    ensure!(!interfaces.iter().any(|name| name.starts_with("skein")), "{interfaces:?}");
    Ok(())
}

#[test]
fn what_is_logged_is_changed_at_run_time() -> Result<()> {
    let cluster = Cluster::up(&Plan::default(), Family::V4)?;
    let agent = &cluster.agents[0];
    let set = |level: &[&str]| {
        let finished = agent.run_command(&[&["log-level"], level].concat())?;
        ensure!(finished.code == 0, "{}", finished.stderr);
        Ok(())
    };
    let said = |text: &str| -> Result<usize> {
        Ok(fs::read_to_string(agent.log())?.lines().filter(|line| line.contains(text)).count())
    };
    // A record that comes and goes: the agent says so where it may.
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
    ensure!(said(level)? == 2, "not by both processes\n{}", cluster.logs());
    change()?;
    let before = said(records)?;
    ensure!(before >= 2, "{}", cluster.logs());
    set(&["error"])?;
    change()?;
    ensure!((said(level)?, said(records)?) == (2, before), "{}", cluster.logs());
    set(&[])?;
    change()?;
    ensure!((said(level)?, said(records)?) == (4, before + 2), "{}", cluster.logs());

    let refused = agent.run_command(&["log-level", "skein_agent=loud"])?;
    ensure!(refused.code == 2 && refused.stderr.contains("Use error, warn"), "{}", refused.stderr);
    Ok(())
}
