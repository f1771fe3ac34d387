//! The Helm chart: rendered objects, dashboards and alerts.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::agent::binary;
use crate::cargo::workspace;
use crate::process::{self, Finished};
use crate::programs;

/// Maximum time of one command.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(120);

/// Returns the directory of the chart.
pub fn path() -> PathBuf {
    workspace().join("charts/skein")
}

/// Runs helm with `settings` (`--set`) and returns its exit code and output.
///
/// # Errors
/// If helm can be neither found nor fetched, or does not exit within 120 s.
pub fn helm(arguments: &[&str], settings: &[&str]) -> Result<Finished> {
    let mut helm = Command::new(programs::helm()?);
    // The user's repositories and plugins must not change the result.
    let home = tempfile::tempdir()?;
    for place in ["HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"] {
        helm.env(place, home.path());
    }
    helm.args(arguments).args(settings.iter().flat_map(|setting| ["--set", setting]));
    process::finish(&mut helm, &[], COMMAND_TIMEOUT)
}

/// Renders the chart for a version of Kubernetes and returns the YAML documents.
///
/// # Errors
/// If helm can be neither found nor fetched, or refuses the settings.
pub fn render(settings: &[&str], version: &str) -> Result<String> {
    let chart = path().to_string_lossy().into_owned();
    let mut arguments = vec!["template", "skein", &chart, "--namespace", "net"];
    arguments.extend(["--kube-version", version]);
    let finished = helm(&arguments, settings)?;
    ensure!(finished.code == 0, "helm template {settings:?}: {}", finished.stderr);
    Ok(finished.stdout)
}

/// Returns the only object of this kind and name.
///
/// # Errors
/// If there is no such object, or more than one.
pub fn object<'a>(objects: &'a [Value], kind: &str, name: &str) -> Result<&'a Value> {
    let of = |object: &&Value| object["kind"] == kind && object["metadata"]["name"] == name;
    let found: Vec<_> = objects.iter().filter(of).collect();
    match found[..] {
        [one] => Ok(one),
        _ => bail!("found {} objects {kind} {name}, expected 1", found.len()),
    }
}

/// Renders the chart for Kubernetes 1.34 and returns its objects.
///
/// # Errors
/// If helm can be neither found nor fetched, or refuses the settings.
pub fn rendered(settings: &[&str]) -> Result<Vec<Value>> {
    programs::yaml(&render(settings, "1.34")?)
}

/// Runs the agent's configuration parser on the rendered `agent.toml`.
///
/// # Errors
///
/// The agent's message if it refuses the configuration; another error if the chart renders no
/// configuration, or if the agent cannot be run.
pub fn agent_takes(objects: &[Value]) -> Result<()> {
    let text = object(objects, "ConfigMap", "skein")?["data"]["agent.toml"].clone();
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("agent.toml");
    fs::write(&path, text.as_str().context("no agent.toml")?)?;
    // The agent parses the whole configuration before it reads the key.
    let mut agent = Command::new(binary()?);
    agent.args(["pubkey", "--config"]).arg(&path);
    let finished = process::finish(&mut agent, &[], COMMAND_TIMEOUT)?;
    let accepted = finished.code == 0 || finished.stderr.contains("the private key file");
    ensure!(accepted, "{}\n{text}", finished.stderr);
    Ok(())
}

/// A dashboard of Grafana.
#[derive(Debug, Clone)]
pub struct Dashboard(pub Value);

impl Dashboard {
    /// Returns the title of the panel and the expression of every query.
    pub fn expressions(&self) -> impl Iterator<Item = (&str, String)> {
        let panels = self.0["panels"].as_array().into_iter().flatten();
        panels.flat_map(|panel| {
            let title = panel["title"].as_str().unwrap_or_default();
            let targets = panel["targets"].as_array().into_iter().flatten();
            targets.filter_map(move |target| Some((title, target["expr"].as_str()?.to_owned())))
        })
    }
}

/// Returns the chart's dashboards in the order of their file names.
///
/// # Errors
/// If a file cannot be read or is not JSON.
pub fn dashboards() -> Result<Vec<Dashboard>> {
    let entries = fs::read_dir(path().join("dashboards"))?;
    let mut files = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    files.sort();
    let parse = |file: &PathBuf| {
        let board = serde_json::from_slice(&fs::read(file)?);
        Ok(Dashboard(board.with_context(|| file.display().to_string())?))
    };
    files.iter().map(parse).collect()
}

/// Returns the rules of the chart's alerts.
///
/// # Errors
/// If the file cannot be read or is not YAML.
pub fn alerts() -> Result<Vec<Value>> {
    let rules = fs::read_to_string(path().join("alerts/skein.yaml"))?;
    let mut rules = programs::yaml(&rules)?.remove(0);
    let groups = rules["groups"].as_array_mut().context("no groups")?;
    let rules = groups.iter_mut().map(|group| group["rules"].take());
    Ok(rules.filter_map(|rules| rules.as_array().cloned()).flatten().collect())
}
