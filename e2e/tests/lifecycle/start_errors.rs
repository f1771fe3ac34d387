//! Errors at the start of an agent, each with its cause.

use std::fs;
use std::time::Duration;

use anyhow::{Result, ensure};
use skein_lab::agent::{Agent, Cluster, binary};
use skein_lab::process::{self, Finished};
use skein_lab::{Family, Lab, Plan};

/// An agent that is prepared and not started.
pub(super) fn prepared() -> Result<Cluster> {
    Cluster::prepare(Lab::new(&Plan::default())?, Family::V4)
}

/// It ends soon with this code and says these words; nothing is left in the node.
fn refuses(cluster: &Cluster, finished: &Finished, code: i32, words: &[&str]) -> Result<()> {
    let said = &finished.stderr;
    ensure!(finished.code == code, "exit code {} instead of {code}: {said}", finished.code);
    for word in words {
        ensure!(said.contains(word), "{word:?} is not in: {said}");
    }
    let interfaces = cluster.lab.nodes[0].ns.interfaces()?;
    ensure!(!interfaces.iter().any(|name| name == "skein0"), "left behind: {interfaces:?}");
    ensure!(cluster.agents[0].dataplane_pids().is_empty(), "a data process is left behind");
    Ok(())
}

fn run(agent: &Agent) -> Result<Finished> {
    agent.run_to_end(Duration::from_secs(15))
}

#[test]
fn an_unknown_key_is_named() -> Result<()> {
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
fn a_used_port_is_named() -> Result<()> {
    let cluster = prepared()?;
    let node = &cluster.lab.nodes[0];
    let address = (node.underlay(Family::V4), skein_lab::agent::PORT);
    let _holder = node.ns.run(|| std::net::UdpSocket::bind(address))??;
    refuses(&cluster, &run(&cluster.agents[0])?, 5, &["51900", "underlay"])
}

#[test]
fn an_address_of_another_machine_is_named() -> Result<()> {
    let mut cluster = prepared()?;
    cluster.agents[0].set("underlay.addresses", vec!["198.51.100.7".to_owned()]);
    let finished = run(&cluster.agents[0])?;
    ensure!(finished.code != 0, "it ended with code 0");
    refuses(&cluster, &finished, finished.code, &["198.51.100.7"])
}

#[test]
fn another_programs_interface_is_left_alone() -> Result<()> {
    let cluster = prepared()?;
    let node = &cluster.lab.nodes[0].ns;
    node.ip("link add skein0 type bridge")?;
    let finished = run(&cluster.agents[0])?;
    ensure!(finished.code == 5, "exit code {}: {}", finished.code, finished.stderr);
    ensure!(finished.stderr.contains("skein0"), "{}", finished.stderr);
    let link = node.ip("-d link show skein0")?;
    ensure!(link.contains("bridge"), "the interface was changed: {link}");
    ensure!(cluster.agents[0].dataplane_pids().is_empty(), "a data process is left behind");
    Ok(())
}

#[test]
fn a_missing_tun_device_is_named() -> Result<()> {
    let cluster = prepared()?;
    let config = cluster.agents[0].write_config()?;
    let mut command = cluster.lab.nodes[0].ns.command("unshare");
    let script = "mount -t tmpfs none /dev/net && exec \"$0\" run --config \"$1\"";
    command.args(["--mount", "sh", "-c", script]).arg(binary()?).arg(config);
    let finished = process::finish(&mut command, &[], Duration::from_secs(15))?;
    refuses(&cluster, &finished, 4, &["/dev/net/tun"])
}

#[test]
fn a_missing_privilege_is_named() -> Result<()> {
    let cluster = prepared()?;
    let config = cluster.agents[0].write_config()?;
    let mut command = cluster.lab.nodes[0].ns.command("setpriv");
    command.args(["--bounding-set", "-net_admin"]).arg(binary()?).args(["run", "--config"]);
    let finished = process::finish(command.arg(config), &[], Duration::from_secs(15))?;
    refuses(&cluster, &finished, 3, &["NET_ADMIN"])
}
