//! Key rotation under traffic.

use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use skein_lab::agent::{Agent, Cluster, Record};
use skein_lab::checks;
use skein_lab::{Family, Plan};

/// Delay after each step, in which sessions of the old key are replaced.
const STEP_DELAY: Duration = Duration::from_secs(8);

fn stage(agent: &Agent) -> Result<String> {
    let status = agent.status()?;
    Ok(status["key"]["stage"].as_str().context("no stage")?.to_owned())
}

fn reaches_stage(agent: &Agent, wanted: &str) -> Result<()> {
    checks::eventually(wanted, checks::EVENT_TIMEOUT, || Ok(stage(agent)? == wanted)).map(drop)
}

/// Rotates the first node's key in the steps of an operator and returns its final record.
fn change_key(agents: &mut [Agent]) -> Result<Record> {
    let asked = agents[0].run_command(&["rotate-key", "-o", "json"])?;
    ensure!(asked.code == 0, "rotate-key failed: {}", asked.stderr);
    let answer: Value = serde_json::from_str(&asked.stdout)?;
    let next = answer["keys"]["second"].as_str().context("no next key")?.to_owned();
    let again = agents[0].run_command(&["rotate-key"])?;
    let is_refused = again.code == 1 && again.stderr.contains("changed already");
    ensure!(is_refused, "A second rotate-key was not refused: {}", again.stderr);

    let old = agents[0].record.public_key.clone();
    let announced = Record { second_public_key: Some(next.clone()), ..agents[0].record.clone() };
    let changed =
        Record { public_key: next, second_public_key: Some(old), ..agents[0].record.clone() };
    let done = Record { second_public_key: None, ..changed.clone() };
    // The other nodes get each record before the node itself.
    for record in [announced, changed, done.clone()] {
        for agent in agents.iter().rev() {
            agent.put_record(&record)?;
            thread::sleep(Duration::from_millis(700));
        }
        // The control process keeps the state of the rotation on disk, so it survives a kill.
        agents[0].kill_control();
        agents[0].start()?;
        thread::sleep(STEP_DELAY);
    }
    reaches_stage(&agents[0], "steady")?;
    Ok(done)
}

#[test]
fn key_rotation_loses_no_packet() -> Result<()> {
    let mut cluster =
        Cluster::prepare(skein_lab::Lab::new(&Plan { nodes: 3, ..Plan::default() })?, Family::V4)?;
    for agent in &mut cluster.agents {
        agent.set("dataplane.mode", "external");
    }
    let mut dataplanes = Vec::new();
    for agent in &cluster.agents {
        dataplanes.push(agent.start_dataplane()?);
    }
    cluster.start()?;
    checks::all_reach_all(&cluster.lab)?;
    let Cluster { agents, lab, .. } = &mut cluster;
    let pods = [0, 1, 2].map(|index| lab.pod(index));
    let file = checks::start_transfer(pods[0], pods[1], Family::V6, 60_000_000, Some(1_500_000))?;
    let duration = Duration::from_secs(36);
    let (record, outcomes) = thread::scope(|scope| -> Result<_> {
        let pairs = [(0, 1, Family::V4), (1, 0, Family::V4), (2, 0, Family::V6)];
        let flows = pairs.map(|(from, to, family)| {
            let (from, to) = (pods[from], pods[to]);
            scope.spawn(move || checks::datagrams(from, to, family, 100, 500, duration))
        });
        let record = change_key(agents)?;
        let outcomes = flows.map(|flow| flow.join().ok().context("a sender panicked")?);
        Ok((record, outcomes))
    })?;
    for outcome in outcomes {
        let outcome = outcome?;
        ensure!(outcome.sent > 17_000, "Only {} datagrams were sent.", outcome.sent);
        let is_complete = outcome.received == outcome.sent && outcome.corrupt == 0;
        ensure!(is_complete, "Datagrams were lost or corrupted: {outcome:?}");
    }
    let received = file.join()?;
    println!("the transfer during the rotation: {received:?}");

    // No file of the old key remains, and the new key is active.
    let files = std::fs::read_dir(agents[0].records_directory().parent().context("none")?)?;
    let names: Vec<_> = files.flatten().map(|entry| entry.file_name()).collect();
    let is_left = names.iter().any(|name| name.to_string_lossy().contains(".key."));
    ensure!(!is_left, "A file of the rotation is left: {names:?}");
    let status = cluster.agents[0].status()?;
    let (found, key) = (&status["public_key"], record.public_key.as_str());
    ensure!(*found == key, "The public key is {found} instead of {key}.");
    let metrics = cluster.agents[0].metrics()?;
    let steady = metrics.sum("skein_key_rotation", &["stage=\"steady\""]);
    ensure!(steady == 1.0, "The metric does not show the stage steady: {}", metrics.0);
    checks::all_reach_all(&cluster.lab)
}
