//! Node records that change while an agent runs.

use std::time::Duration;
use std::{fs, thread};

use anyhow::{Context as _, Result, ensure};
use skein_lab::agent::{Cluster, Record};
use skein_lab::{Family, Plan, checks};

use crate::start_errors::prepared;

/// The node keeps its old address until the change has taken effect, so that only the record makes
/// the peer use the new address. No datagram is lost.
#[test]
fn changed_endpoint_takes_effect_without_loss() -> Result<()> {
    let mut cluster = prepared()?;
    // Node b listens on all addresses, also on addresses that are added later.
    let any = vec!["0.0.0.0".to_owned()];
    cluster.agents[1].set("underlay.addresses", any);
    cluster.start()?;
    checks::all_reach_all(&cluster.lab)?;
    let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
    let mut moved = cluster.agents[1].record.clone();
    moved.endpoints = vec!["192.0.2.77:51900".into()];
    let node = &cluster.lab.nodes[1].ns;
    node.sysctl("net.ipv4.conf.all.promote_secondaries", "1")?;
    node.ip("address add 192.0.2.77/24 dev eth0")?;
    let agent = &cluster.agents[0];
    let is_used = || {
        let report = agent.report()?;
        Ok(report["peers"][0]["endpoint"].as_str() == Some("192.0.2.77:51900"))
    };
    ensure!(!is_used()?, "The endpoint has changed before its record.");
    let outcome = thread::scope(|scope| -> Result<_> {
        let duration = Duration::from_secs(4);
        let sender = scope.spawn(move || checks::datagrams(a, b, Family::V4, 100, 1000, duration));
        agent.put_record(&moved)?;
        checks::eventually("the new endpoint is used", checks::EVENT_TIMEOUT, is_used)?;
        sender.join().ok().context("the sender panicked")?
    })?;
    ensure!(outcome.received == outcome.sent, "Datagrams were lost: {outcome:?}");
    node.ip("address del 192.0.2.2/24 dev eth0")?;
    checks::reaches(a, b, Family::V4)
}

/// All records are in one file, which is written in place or replaced.
#[test]
fn changes_of_a_single_records_file_take_effect() -> Result<()> {
    let mut cluster = prepared()?;
    let records: Vec<Record> = cluster.agents.iter().map(|a| a.record.clone()).collect();
    let file = cluster.lab.directory().join("nodes.toml");
    fs::write(&file, Record::all_to_toml(&records))?;
    for agent in &mut cluster.agents {
        agent.set("nodes", file.to_string_lossy().into_owned());
    }
    cluster.start()?;
    checks::all_reach_all(&cluster.lab)?;
    let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
    let peers = |count: usize| {
        let agent = &cluster.agents[0];
        let now = || Ok(agent.report()?["peers"].as_array().map(Vec::len) == Some(count));
        checks::eventually("the change is active", checks::EVENT_TIMEOUT, now)
    };

    fs::write(&file, Record::all_to_toml(&records[..1]))?;
    peers(0)?;
    checks::does_not_reach(a, b, Family::V4)?;

    let new = file.with_extension("new");
    fs::write(&new, Record::all_to_toml(&records))?;
    fs::rename(&new, &file)?;
    peers(1)?;
    checks::wait_until_reached(a, b, Family::V4, checks::EVENT_TIMEOUT)?;
    Ok(())
}

#[test]
fn invalid_record_at_run_time_is_reported_and_ignored() -> Result<()> {
    let cluster = Cluster::up(&Plan::default(), Family::V4)?;
    checks::all_reach_all(&cluster.lab)?;
    let path = cluster.agents[0].records_directory().join("node-b.toml");
    fs::write(&path, "name = \"node-b\"\npublic_key = 7\n")?;
    thread::sleep(Duration::from_millis(1500));
    checks::all_reach_all(&cluster.lab)?;
    let log = fs::read_to_string(cluster.agents[0].log())?;
    ensure!(log.contains("node-b.toml"), "The log does not name the file.");
    Ok(())
}
