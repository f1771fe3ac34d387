//! Alerts and dashboards of the chart.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use skein_lab::cargo::workspace;
use skein_lab::{chart, process, programs};

/// Returns the names of the metrics in a text, without the suffixes of a histogram's series.
fn metrics(text: &str) -> BTreeSet<&str> {
    let word = |c: char| !(c.is_ascii_alphanumeric() || c == '_');
    let names = text.split(word).filter(|name| name.starts_with("skein_"));
    let base = |name| {
        let mut suffixes = ["_bucket", "_sum", "_count"].into_iter();
        suffixes.find_map(|suffix| str::strip_suffix(name, suffix)).unwrap_or(name)
    };
    names.map(base).collect()
}

/// Compares with docs/metrics.md, which a test of the agent compares with the code.
#[test]
fn alerts_and_dashboards_use_metrics_that_exist() -> Result<()> {
    let reference = fs::read_to_string(workspace().join("docs/metrics.md"))?;
    let known = metrics(&reference);
    let mut texts = vec![fs::read_to_string(chart::path().join("alerts/skein.yaml"))?];
    for dashboard in chart::dashboards()? {
        texts.push(dashboard.expressions().map(|(_, text)| text).collect::<Vec<_>>().join("\n"));
    }
    for text in texts {
        let used = metrics(&text);
        ensure!(used.len() > 10, "Only these metrics are used: {used:?}");
        let unknown: Vec<_> = used.difference(&known).collect();
        ensure!(unknown.is_empty(), "These metrics do not exist: {unknown:?}");
    }
    Ok(())
}

/// Checks that Grafana accepts the dashboards, and that each panel has a title, a unit and a
/// description.
#[test]
fn dashboards_are_complete() -> Result<()> {
    let all = chart::dashboards()?;
    ensure!(all.len() == 2, "The chart has {} dashboards instead of 2.", all.len());
    let mut identities = BTreeSet::new();
    for dashboard in &all {
        let board = &dashboard.0;
        let uid = board["uid"].as_str().context("no uid")?;
        ensure!(identities.insert(uid.to_owned()), "Two dashboards have the uid {uid}.");
        let version = board["schemaVersion"].as_u64();
        ensure!(version >= Some(36), "{uid}: The schema version is {version:?}, below 36.");
        let source = &board["templating"]["list"][0];
        let is_prometheus = source["type"] == "datasource" && source["query"] == "prometheus";
        ensure!(is_prometheus, "{uid}: The first variable is not a Prometheus: {source}");
        let panels = board["panels"].as_array().context("no panels")?;
        let (mut ids, mut places) = (BTreeSet::new(), BTreeSet::new());
        for panel in panels {
            let title = panel["title"].as_str().unwrap_or_default();
            let is_unique = !title.is_empty() && ids.insert(panel["id"].as_u64());
            ensure!(is_unique, "{uid}: A panel has no title or no id of its own: {panel}");
            let at = &panel["gridPos"];
            let is_free = places.insert((at["y"].as_u64(), at["x"].as_u64()));
            ensure!(is_free, "{title}: The panel covers another one.");
            let width = at["x"].as_u64().zip(at["w"].as_u64()).map(|(x, w)| x + w);
            ensure!(width.is_some_and(|width| width <= 24), "{title}: The panel is too wide: {at}");
            if panel["type"] == "row" {
                ensure!(title.ends_with('?'), "{uid}: The row {title:?} is not a question.");
                continue;
            }
            let defaults = &panel["fieldConfig"]["defaults"];
            ensure!(
                defaults["unit"].as_str().is_some_and(|unit| !unit.is_empty()),
                "{title}: The panel has no unit."
            );
            let about = panel["description"].as_str().unwrap_or_default();
            ensure!(about.len() > 10, "{title}: The panel has no description.");
            let source = &panel["datasource"]["uid"];
            ensure!(*source == "${datasource}", "{title}: The data source is {source}.");
            let has_queries = panel["targets"].as_array().is_some_and(|all| !all.is_empty());
            ensure!(has_queries, "{title}: The panel has no query.");
        }
    }
    Ok(())
}

/// Runs promtool with the cases in e2e/tests/observability/alerts.yaml.
#[test]
fn every_alert_fires_only_in_its_cases() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let rules = chart::path().join("alerts/skein.yaml");
    let tests = workspace().join("e2e/tests/observability/alerts.yaml");
    fs::copy(&rules, directory.path().join("skein.yaml"))?;
    fs::copy(&tests, directory.path().join("alerts.yaml"))?;
    for what in [["check", "rules", "skein.yaml"], ["test", "rules", "alerts.yaml"]] {
        process::run(Command::new("promtool").args(what).current_dir(&directory))?;
    }
    let tests = programs::yaml(&fs::read_to_string(&tests)?)?.remove(0);
    let cases = tests["tests"].as_array().context("no tests")?.iter();
    let cases: Vec<_> =
        cases.filter_map(|test| test["alert_rule_test"].as_array()).flatten().collect();
    for alert in chart::alerts()? {
        let name = &alert["alert"];
        let of_it = || cases.iter().filter(|case| case["alertname"] == *name);
        let fires = |case: &&&Value| case["exp_alerts"].as_array().is_some_and(|a| !a.is_empty());
        ensure!(of_it().any(|case| fires(&case)), "{name} fires in no test.");
        ensure!(of_it().any(|case| !fires(&case)), "{name} fires in every test.");
    }
    Ok(())
}

#[test]
fn every_alert_has_a_runbook() -> Result<()> {
    let runbooks = fs::read_to_string(workspace().join("docs/runbooks.md"))?;
    let manifest = fs::read_to_string(workspace().join("Cargo.toml"))?;
    let manifest: toml::Table = manifest.parse()?;
    let repository = manifest["workspace"]["package"]["repository"].as_str().context("none")?;
    let mut names = BTreeSet::new();
    for alert in chart::alerts()? {
        let name = alert["alert"].as_str().context("no name")?.to_owned();
        let anchor = name.to_lowercase();
        let url = format!("{repository}/blob/main/docs/runbooks.md#{anchor}");
        let found = &alert["annotations"]["runbook_url"];
        ensure!(*found == url, "{name}: runbook_url is {found} instead of {url}.");
        for text in ["summary", "description"] {
            ensure!(alert["annotations"][text].is_string(), "{name} has no {text}.");
        }
        let section =
            runbooks.split(&format!("\n## {name}\n")).nth(1).with_context(|| name.clone())?;
        let section = section.split("\n## ").next().unwrap_or_default();
        for part in
            ["**Meaning.**", "**Impact.**", "**Diagnosis.**", "```console", "**Mitigation.**"]
        {
            ensure!(section.contains(part), "The runbook of {name} has no {part}");
        }
        names.insert(name);
    }
    let sections = runbooks.lines().filter_map(|line| line.strip_prefix("## "));
    let others: Vec<_> = sections.filter(|name| !names.contains(*name)).collect();
    ensure!(others.is_empty(), "These sections have no alert: {others:?}");
    Ok(())
}
