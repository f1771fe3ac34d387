//! Errors at the start of an agent, each with its cause.

use std::fs;
use std::time::Duration;

use anyhow::{Result, ensure};
use skein_lab::agent::{Agent, Cluster, binary};
use skein_lab::process::{self, Finished};
use skein_lab::{Family, Lab, Plan};

/// Prepares two nodes whose agents are not started.
pub(super) fn prepared() -> Result<Cluster> {
    Cluster::prepare(Lab::new(&Plan::default())?, Family::V4)
}

/// Checks that the agent ended with `code`, that its error contains `words`, and that no interface
/// and no process is left on the node.
fn refuses(cluster: &Cluster, finished: &Finished, code: i32, words: &[&str]) -> Result<()> {
    let said = &finished.stderr;
    ensure!(finished.code == code, "The exit code is {}, not {code}: {said}", finished.code);
    for word in words {
        ensure!(said.contains(word), "The error does not contain {word:?}: {said}");
    }
    let interfaces = cluster.lab.nodes[0].ns.interfaces()?;
    let is_left = interfaces.iter().any(|name| name == "skein0");
    ensure!(!is_left, "The interface was not removed: {interfaces:?}");
    ensure!(cluster.agents[0].dataplane_pids().is_empty(), "A data process still runs.");
    Ok(())
}

fn run(agent: &Agent) -> Result<Finished> {
    agent.run_to_end(Duration::from_secs(15))
}

#[test]
fn unknown_configuration_key_is_named() -> Result<()> {
    let mut cluster = prepared()?;
    cluster.agents[0].set("underlay.prot", 51900);
    refuses(&cluster, &run(&cluster.agents[0])?, 2, &["prot", "agent.toml"])
}

#[test]
fn overlapping_pod_cidrs_are_named() -> Result<()> {
    let cluster = prepared()?;
    let mut record = cluster.agents[1].record.clone();
    record.pod_cidrs = vec!["10.244.0.0/16".into()];
    cluster.agents[0].put_record(&record)?;
    let words = ["10.244.0.0/16", "10.244.1.0/24", "node-a", "node-b"];
    refuses(&cluster, &run(&cluster.agents[0])?, 2, &words)
}

#[test]
fn bad_keys_are_named() -> Result<()> {
    let mut cluster = prepared()?;
    let mut record = cluster.agents[1].record.clone();
    record.public_key = "c2hvcnQ=".into();
    cluster.agents[0].put_record(&record)?;
    refuses(&cluster, &run(&cluster.agents[0])?, 2, &["public_key", "node-b.toml"])?;

    cluster.agents[0].put_record(&cluster.agents[1].record)?;
    let path = cluster.lab.directory().join("bad.key");
    fs::write(&path, "no key at all\n")?;
    fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    cluster.agents[0].set("private_key_file", path.to_string_lossy().into_owned());
    refuses(&cluster, &run(&cluster.agents[0])?, 2, &["bad.key"])
}

#[test]
fn port_in_use_is_named() -> Result<()> {
    let cluster = prepared()?;
    let node = &cluster.lab.nodes[0];
    let address = (node.underlay(Family::V4), skein_lab::agent::PORT);
    let _holder = node.ns.run(|| std::net::UdpSocket::bind(address))??;
    refuses(&cluster, &run(&cluster.agents[0])?, 5, &["51900", "underlay"])
}

#[test]
fn address_of_another_machine_is_named() -> Result<()> {
    let mut cluster = prepared()?;
    cluster.agents[0].set("underlay.addresses", vec!["198.51.100.7".to_owned()]);
    let finished = run(&cluster.agents[0])?;
    ensure!(finished.code != 0, "The agent ended with code 0.");
    refuses(&cluster, &finished, finished.code, &["198.51.100.7"])
}

#[test]
fn interface_of_another_program_is_not_changed() -> Result<()> {
    let cluster = prepared()?;
    let node = &cluster.lab.nodes[0].ns;
    node.ip("link add skein0 type bridge")?;
    let finished = run(&cluster.agents[0])?;
    let (code, error) = (finished.code, finished.stderr);
    ensure!(code == 5, "The exit code is {code} instead of 5: {error}");
    ensure!(error.contains("skein0"), "The error does not name the interface: {error}");
    let link = node.ip("-d link show skein0")?;
    ensure!(link.contains("bridge"), "The interface was changed: {link}");
    ensure!(cluster.agents[0].dataplane_pids().is_empty(), "A data process still runs.");
    Ok(())
}

#[test]
fn missing_tun_device_is_named() -> Result<()> {
    let cluster = prepared()?;
    let config = cluster.agents[0].write_config()?;
    let mut command = cluster.lab.nodes[0].ns.command("unshare");
    let script = "mount -t tmpfs none /dev/net && exec \"$0\" run --config \"$1\"";
    command.args(["--mount", "sh", "-c", script]).arg(binary()?).arg(config);
    let finished = process::finish(&mut command, &[], Duration::from_secs(15))?;
    refuses(&cluster, &finished, 4, &["/dev/net/tun"])
}

#[test]
fn missing_capability_is_named() -> Result<()> {
    let cluster = prepared()?;
    let config = cluster.agents[0].write_config()?;
    let mut command = cluster.lab.nodes[0].ns.command("setpriv");
    command.args(["--bounding-set", "-net_admin"]).arg(binary()?).args(["run", "--config"]);
    let finished = process::finish(command.arg(config), &[], Duration::from_secs(15))?;
    refuses(&cluster, &finished, 3, &["NET_ADMIN"])
}
