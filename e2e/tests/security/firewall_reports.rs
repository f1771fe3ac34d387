//! Reports about the firewall: `check`, CHECK, status, metrics.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use skein_lab::agent::Cluster;
use skein_lab::cni::{self, Runtime};
use skein_lab::{Family, Lab, Netns, Plan, checks};

use crate::border::Border;

/// Without `nft` the overlay works, and the status names the missing program.
#[test]
fn agent_without_nft_runs_and_reports_it() -> Result<()> {
    let lab = Lab::new(&Plan::default())?;
    let programs = lab.directory().join("programs");
    std::fs::create_dir_all(&programs)?;
    std::os::unix::fs::symlink("/sbin/ip", programs.join("ip")).context("/sbin/ip")?;
    let mut cluster = Cluster::prepare(lab, Family::V4)?;
    let path = programs.to_string_lossy().into_owned();
    cluster.agents[0].environment.push(("PATH".to_owned(), path));
    cluster.start()?;
    checks::all_reach_all(&cluster.lab)?;
    let status = cluster.agents[0].status()?;
    ensure!(
        status["firewall"]["active"] == false,
        "The firewall is active without nft: {status:#}"
    );
    let error = status["firewall"]["error"].as_str().unwrap_or_default();
    ensure!(error.contains("install nftables"), "The error has no remedy: {error}");
    ensure!(
        cluster.agents[0].metrics()?.sum("skein_firewall_active", &[]) == 0.0,
        "The metric shows an active firewall."
    );
    let text = cluster.agents[0].run_command(&["status", "--interval", "0"])?.stdout;
    ensure!(
        text.contains("missing: no program nft"),
        "The status does not name the missing program: {text}"
    );
    let status = cluster.agents[1].status()?;
    ensure!(status["firewall"]["active"] == true, "The firewall is not active: {status:#}");
    Ok(())
}

/// CHECK of a pod names the table that cannot be restored.
#[test]
fn check_reports_a_missing_table() -> Result<()> {
    let lab = Lab::new(&Plan { nodes: 1, pods: 0, ..Plan::default() })?;
    let programs = lab.directory().join("programs");
    let (nft, broken) = (programs.join("nft"), lab.directory().join("broken"));
    std::fs::create_dir_all(&programs)?;
    // The program fails at every change while the file exists, as with a missing kernel module.
    let script = format!(
        "#!/bin/sh\n[ -e {} ] && [ \"$1\" = -f ] && {{ echo broken >&2; exit 1; }}\n\
         exec /usr/sbin/nft \"$@\"\n",
        broken.display()
    );
    std::fs::write(&nft, script)?;
    std::fs::set_permissions(&nft, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let mut cluster = Cluster::prepare(lab, Family::V4)?;
    cluster.agents[0].serve_pods()?;
    let path = format!("{}:{}", programs.display(), std::env::var("PATH")?);
    cluster.agents[0].environment.push(("PATH".to_owned(), path));
    cluster.start()?;
    let runtime = Runtime::new(&cluster.agents[0], &cluster.lab.nodes[0])?;
    let ns = Netns::create("checked")?;
    let result = runtime.add("checked", &ns)?;
    let path = cni::path(&ns);
    let with = Some(cni::attachment("checked", Some(&path)));
    runtime.done("CHECK", with, json!({ "prevResult": result }))?;
    std::fs::write(&broken, "")?;
    cluster.lab.nodes[0].ns.nft("delete table inet skein")?;
    let (code, text) = runtime.refused("CHECK", with, json!({ "prevResult": result }))?;
    ensure!(code == 100 && text.contains("nft"), "The plugin returned code {code}: {text}");
    std::fs::remove_file(&broken)?;
    checks::eventually("CHECK succeeds again", Duration::from_secs(15), || {
        Ok(runtime.done("CHECK", with, json!({ "prevResult": result })).is_ok())
    })?;
    runtime.del("checked", Some(&ns))
}

/// Status, metrics and `check` report a FORWARD policy of drop, with the remedy. Only `check` can
/// read the policy of legacy iptables.
#[test]
fn closed_forward_chain_is_reported_with_the_remedy() -> Result<()> {
    for cni in [true, false] {
        let border = Border::up(cni, |_| ())?;
        let (node, agent) = (border.node(0), &border.cluster.agents[0]);
        let name = if cni { "skp+" } else { "skein0" };
        let chains = |state: &str, expected: f64| -> Result<()> {
            let label = format!("state=\"{state}\"");
            checks::eventually("the chains are counted", Duration::from_secs(15), || {
                Ok(agent.metrics()?.sum("skein_forward_chains", &[&label]) == expected)
            })
            .map(drop)
        };
        let check = |expected: &str| -> Result<()> {
            let text = agent.run_command(&["check"])?.stdout;
            let line = text.lines().find(|line| line.contains("forward_chains"));
            ensure!(
                line.is_some_and(|line| line.contains(expected)),
                "The line of the chains lacks {expected:?}: {text}"
            );
            Ok(())
        };
        chains("closed", 0.0)?;
        check(" ok ")?;
        for (iptables, state) in [("iptables-nft", "closed"), ("iptables-legacy", "unknown")] {
            node.sh(&format!("{iptables} -P FORWARD DROP"))?;
            chains(state, 1.0)?;
            let text = agent.run_command(&["status", "--interval", "0"])?.stdout;
            let line = text.lines().find(|line| line.trim().starts_with(state));
            let line = line.with_context(|| format!("no line {state}: {text}"))?;
            let remedy = match state {
                "closed" => format!("-i {name} -j ACCEPT"),
                _ => format!("{iptables} -S FORWARD"),
            };
            ensure!(line.contains(&remedy), "The line lacks the remedy: {line}");
            check(&format!("-A FORWARD -o {name} -j ACCEPT"))?;
            // The remedy.
            for direction in ["-i", "-o"] {
                node.sh(&format!("{iptables} -A FORWARD {direction} {name} -j ACCEPT"))?;
            }
            chains("closed", 0.0)?;
            check(" ok ")?;
            for family in Family::BOTH {
                checks::reaches(border.pod(0), border.pod(1), family)?;
            }
        }
        let check = agent.run_command(&["check"])?.stdout;
        ensure!(
            check.contains("the kernel accepts Skein's nftables table"),
            "check does not report the accepted table: {check}"
        );
    }
    Ok(())
}

/// Without a configuration, `check` assumes the default interface and pods that the CNI plugin
/// attaches, and reports the assumption. An invalid configuration is reported and does not end the
/// other probes.
#[test]
fn check_reports_a_missing_or_invalid_configuration() -> Result<()> {
    let border = Border::up(true, |_| ())?;
    let node = border.node(0);
    let program = border.cluster.agents[0].program.display().to_string();
    let line = |path: &str| -> Result<String> {
        let text = node.sh(&format!("{program} check --config {path}"))?;
        ensure!(text.contains("udp_segment"), "the other probes are missing: {text}");
        let line = text.lines().find(|line| line.contains("forward_chains"));
        Ok(line.with_context(|| text.clone())?.to_owned())
    };
    let missing = line("/nonexistent/agent.toml")?;
    ensure!(
        missing.contains("ok") && missing.contains("before installation: no chain"),
        "{missing}"
    );
    let invalid = line("/proc/version")?;
    ensure!(
        invalid.contains("not examined: configuration /proc/version"),
        "The invalid configuration is not reported: {invalid}"
    );
    Ok(())
}
