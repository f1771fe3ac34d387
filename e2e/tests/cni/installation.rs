//! Installation, repair and removal of the plugin, of its configuration and of the rules for pods.

use std::time::Duration;
use std::{fs, thread};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use skein_lab::agent::Agent;
use skein_lab::load::ping::{Ping, ping};
use skein_lab::pods::{node, prepared, runtime, up};
use skein_lab::{Family, checks};

use crate::support::reach;

#[test]
fn deleted_routes_and_rules_are_restored() -> Result<()> {
    let cluster = up(2, |_| ())?;
    let (first, second) = (runtime(&cluster, 0)?, runtime(&cluster, 1)?);
    let (a, b) = (first.pod("a")?, second.pod("b")?);
    reach(&a, &b)?;
    let home = node(&cluster, 0);
    home.ip(&format!("route delete {}/32", a.v4))?;
    home.ip(&format!("-6 route delete {}/128", a.v6))?;
    home.ip(&format!("neighbour delete {} dev {}", a.v4, a.host_interface))?;
    home.sh("nft delete table inet skein")?;
    checks::eventually("routes and rules are restored", Duration::from_secs(15), || {
        Ok(ping(&a.ns, b.address(Family::V4), Ping { count: 1, ..Ping::default() })?.complete()
            && home.sh("nft list table inet skein").is_ok())
    })?;
    reach(&a, &b)
}

#[test]
fn plugin_is_installed_by_the_agent_and_removed_by_cleanup() -> Result<()> {
    let mut cluster = prepared(1, |_| ())?;
    let directory = cluster.agents[0].state_directory();
    let directory = directory.parent().context("no parent")?.to_owned();
    let (plugin, list) =
        (directory.join("bin/skein-cni"), directory.join("net.d/10-skein.conflist"));
    cluster.start()?;
    checks::eventually("the list is installed", checks::EVENT_TIMEOUT, || Ok(list.is_file()))?;
    ensure!(plugin.is_file(), "The plugin is not installed.");
    let conflist: Value = serde_json::from_slice(&fs::read(&list)?)?;
    let first = &conflist["plugins"][0]["type"];
    ensure!(first == "skein-cni", "The first plugin of the list is {first}.");
    let pod = runtime(&cluster, 0)?.pod("a")?;
    let interfaces = node(&cluster, 0).interfaces()?;
    ensure!(interfaces.contains(&pod.host_interface), "The pod has no interface: {interfaces:?}");
    cluster.agents[0].stop()?;
    ensure!(list.is_file(), "The agent removed the list when it stopped; the node is not ready.");
    let finished = cluster.agents[0].run_command(&["cleanup", "--state"])?;
    ensure!(finished.code == 0, "cleanup failed: {}{}", finished.stdout, finished.stderr);
    ensure!(
        !list.exists() && !plugin.exists(),
        "cleanup left the list or the plugin: {}",
        finished.stdout
    );
    let interfaces = node(&cluster, 0).interfaces()?;
    let are_left = interfaces.iter().any(|name| name.starts_with("skp"));
    ensure!(!are_left, "cleanup left interfaces of pods: {interfaces:?}");
    let table = node(&cluster, 0).sh("nft list table inet skein");
    ensure!(table.is_err(), "cleanup left the table: {table:?}");
    Ok(())
}

#[test]
fn missing_plugin_of_the_chain_keeps_the_node_not_ready() -> Result<()> {
    let mut cluster = prepared(1, |_| ())?;
    let bin = cluster.agents[0].cni_directory("bin_dir");
    let list = cluster.agents[0].cni_directory("conf_dir").join("10-skein.conflist");
    let (portmap, away) = (bin.join("portmap"), bin.join("portmap.away"));
    fs::rename(&portmap, &away)?;
    cluster.agents[0].launch()?;
    let reason = |agent: &Agent| -> Result<Option<String>> {
        let answer = agent.http("/readyz")?;
        Ok((answer.status != 200).then_some(answer.body))
    };
    let named = |agent: &Agent| {
        checks::eventually("the reason names the plugin", Duration::from_secs(25), || {
            let reason = reason(agent)?.unwrap_or_default();
            Ok(reason.contains("portmap") && reason.contains(&*bin.to_string_lossy()))
        })
    };
    named(&cluster.agents[0])?;
    // The wait is longer than the interval of the agent's checks (10 s).
    thread::sleep(Duration::from_secs(11));
    named(&cluster.agents[0])?;
    ensure!(!list.exists(), "The list was installed although a plugin of it is missing.");
    fs::rename(&away, &portmap)?;
    checks::eventually("the agent becomes ready by itself", Duration::from_secs(15), || {
        Ok(reason(&cluster.agents[0])?.is_none() && list.is_file())
    })?;
    runtime(&cluster, 0)?.pod("a")?;
    // From now on, the list stays: the deletion of running pods needs it.
    fs::remove_file(&portmap)?;
    named(&cluster.agents[0])?;
    ensure!(list.is_file(), "The list was removed while a pod needs it.");
    runtime(&cluster, 0)?.del("a", None)
}
