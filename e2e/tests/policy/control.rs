//! `skein-agent policy`, and the section `policy` of the status.

use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use skein_lab::checks::{EVENT_TIMEOUT, eventually};
use skein_lab::{Netns, process};

use crate::support::{attach, directory, ingress_policy, object, put, up};

#[test]
fn policies_are_listed_and_shown() -> Result<()> {
    let policy = ingress_policy("[{from: [{ipBlock: {cidr: 192.0.2.0/33}}], ports: [{port: 80}]}]");
    let cluster = up(1, &(object("web", "web", None) + &policy))?;
    let agent = &cluster.agents[0];
    let _web = attach(&cluster, 0, "web", Netns::create("web")?, &[])?;
    let answer = agent.run_command(&["policy", "list", "-o", "json"])?;
    let list: Value = serde_json::from_str(&answer.stdout).context(answer.stderr)?;
    ensure!(list[0]["name"] == "web" && list[0]["pods"] == 1, "The list is {list}");
    let defects = list[0]["defects"].to_string();
    ensure!(defects.contains("spec.ingress[0].from[0].ipBlock"), "The defects are {defects}");
    let answer = agent.run_command(&["policy", "show", "shop/web"])?;
    let text = answer.stdout;
    for part in ["policies are enforced", "NetworkPolicy shop/web", "from no address, tcp 80"] {
        ensure!(text.contains(part), "{part} is missing in:\n{text}{}", answer.stderr);
    }
    let answer = agent.run_command(&["policy", "show", "shop/none"])?;
    ensure!(answer.code == 1 && answer.stderr.contains("no pod"), "{}", answer.stderr);
    let status = agent.run_command(&["status", "--interval", "0"])?.stdout;
    ensure!(status.contains("policy        enforce, policies: 1, pods: 1"), "{status}");
    let revision =
        || -> Result<u64> { agent.status()?["policy"]["revision"].as_u64().context("no revision") };
    let before = revision()?;
    put(agent, "more.yaml", &policy.replace("name: web", "name: more").replace("/33", "/32"))?;
    eventually("the change is a new revision", EVENT_TIMEOUT, || Ok(revision()? > before))?;
    Ok(())
}

#[test]
fn lint_finds_mistakes_without_an_agent() -> Result<()> {
    let cluster = up(1, "")?;
    let agent = &cluster.agents[0];
    let path = directory(agent).join("lint.txt");
    fs::write(&path, ingress_policy("[{ports: [{port: 80}]}]"))?;
    let file = path.to_string_lossy();
    let lint = || {
        let mut command = Command::new(&agent.program);
        process::finish(command.args(["policy", "lint", &file]), &[], Duration::from_secs(20))
    };
    let answer = lint()?;
    ensure!(answer.code == 0 && answer.stdout.is_empty(), "{}{}", answer.stdout, answer.stderr);
    fs::write(&path, ingress_policy("[{ports: [{port: 80, endPort: 79}]}]"))?;
    let answer = lint()?;
    ensure!(answer.code == 1, "The exit code is {}.", answer.code);
    ensure!(answer.stdout.contains("spec.ingress[0].ports[0]"), "{}", answer.stdout);
    Ok(())
}
