//! Values of the chart: each is documented, and a wrong value is refused with its name.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use skein_lab::chart::{self, agent_takes, helm};
use skein_lab::programs;

#[test]
fn wrong_value_is_refused_with_its_name() -> Result<()> {
    for (setting, words) in [
        ("prot=1", "additional properties 'prot' not allowed"),
        ("cni.bindir=/x", "at '/cni': additional properties 'bindir' not allowed"),
        ("port=0", "at '/port': minimum: got 0, want 1"),
        ("seccomp=false,requireConfinement=true", "at '/seccomp': value must be true"),
        ("port=four", "at '/port': got string, want integer"),
        ("lanes=65", "at '/lanes': maximum: got 65, want 64"),
        ("mtu=100", "at '/mtu': minimum: got 100, want 576"),
        ("encryption.cipher=none", "must be one of 'auto', 'aes256-gcm', 'chacha20-poly1305'"),
        ("podCidr=10.0.0.0", "at '/podCidr': '10.0.0.0' does not match"),
        ("podCidrv6=10.0.0.0/8", "at '/podCidrv6': '10.0.0.0/8' does not match"),
        ("cni.chain[0].kind=x", "missing property 'type'"),
        ("cni.binDir=opt", "at '/cni/binDir': 'opt' does not match"),
        ("updateStrategy.maxsurge=1", "additional properties 'maxsurge' not allowed"),
        ("updateStrategy.maxSurge=-1", "at '/updateStrategy/maxSurge': minimum: got -1, want 0"),
        ("capabilities.agent={net-admin}", "at '/capabilities/agent/0'"),
        ("policy.mode=on", "must be one of 'off', 'audit', 'enforce'"),
        ("log.format=xml", "must be one of 'text', 'json'"),
        ("privileged=1", "at '/privileged': got number, want boolean"),
        ("podCidr=10.999.0.0/16", "at '/podCidr': '10.999.0.0/16' does not match"),
        ("podCidr=0.0.0.0/0", "at '/podCidr': '0.0.0.0/0' does not match"),
        ("podCidrv6=fd00::1::/64", "at '/podCidrv6': 'fd00::1::/64' does not match"),
        ("podCidrv6=fd00::/129", "at '/podCidrv6': 'fd00::/129' does not match"),
        ("cni.noMasquerade={192.0.2.256/32}", "at '/cni/noMasquerade/0'"),
        ("metrics.address=10.0.0", "at '/metrics/address': '10.0.0' does not match"),
        ("statusPage.address=fd00::g", "at '/statusPage/address': 'fd00::g' does not match"),
        ("log.level=loud", "one of 'off', 'error', 'warn', 'info', 'debug', 'trace'"),
        ("log.level=skein_agent=loud", "at '/log/level': 'skein_agent=loud' does not match"),
        ("cni.chain[0].type=a,cni.chain[0].list={b,null}", "at '/cni/chain/0/list/1': got null"),
        ("podCidr=10.244.0.1/16", "podCidr=10.244.0.1/16 has host bits set: write 10.244.0.0/16"),
        ("podCidr=10.245.255.0/15", "write 10.244.0.0/15"),
        ("podCidrv6=fd00:10:244:ff::/56", "write fd00:10:244::/56"),
        ("podCidrv6=fd00::8:0:0:1/80", "write fd00:0:0:0:8::/80"),
        (
            "cni.noMasquerade={192.0.2.0/24,2001:db8::1/32}",
            "cni.noMasquerade[1]=2001:db8::1/32 has host bits set: write 2001:db8::/32",
        ),
        ("podCidr=127.0.0.0/8", "podCidr=127.0.0.0/8 cannot hold pods"),
        ("podCidrv6=fe80::/64", "podCidrv6=fe80::/64 cannot hold pods"),
    ] {
        let refused = helm(&["template", "skein", &chart::path().to_string_lossy()], &[setting])?;
        ensure!(refused.code != 0, "{setting} was accepted.");
        let is_named = refused.stderr.contains(words);
        ensure!(is_named, "{setting}: The error does not contain {words:?}: {}", refused.stderr);
    }
    Ok(())
}

#[test]
fn upper_case_log_level_renders() -> Result<()> {
    for setting in ["log.level=INFO", "log.level=OFF", "log.level=skein_agent=DEBUG\\,WARN"] {
        let finished = helm(&["template", "skein", &chart::path().to_string_lossy()], &[setting])?;
        ensure!(finished.code == 0, "{setting} was refused: {}", finished.stderr);
        agent_takes(&programs::yaml(&finished.stdout)?).with_context(|| setting.to_owned())?;
    }
    Ok(())
}

/// Helm removes a value that is set to null, so that a template would render nothing in its place.
#[test]
fn null_value_is_refused_by_name_or_renders() -> Result<()> {
    let values = programs::yaml(&fs::read_to_string(chart::path().join("values.yaml"))?)?.remove(0);
    let mut paths = BTreeSet::new();
    leaves("", &values, &mut paths);
    for leaf in paths.clone() {
        let parents = leaf.match_indices('.').map(|(at, _)| leaf[..at].to_owned());
        paths.extend(parents.filter(|path| values.pointer(&pointer(path)).is_some()));
    }
    let readme = fs::read_to_string(chart::path().join("README.md"))?;
    let values_section = readme.split("## Values").nth(1).context("no section of values")?;
    let named = values_section.split("\n|").next().unwrap_or_default();
    let (mut refused, chart) = (0, chart::path().to_string_lossy().into_owned());
    for path in &paths {
        let setting = format!("{}=null", path.replace("kubernetes.io", r"kubernetes\.io"));
        let finished = helm(&["template", "skein", &chart, "--namespace", "net"], &[&setting])?;
        let (table, name) = path.rsplit_once('.').unwrap_or(("", path));
        let words = format!("at '{}': missing property '{name}'", pointer(table));
        match finished.code {
            0 => {
                agent_takes(&programs::yaml(&finished.stdout)?)
                    .with_context(|| format!("{path} = null renders"))?;
                let is_named = values.pointer(&pointer(path)).is_some_and(Value::is_null)
                    || named.contains(&format!("`{path}`"))
                    || [
                        "labels",
                        "Labels",
                        "annotations",
                        "Annotations",
                        "labels.grafana_dashboard",
                    ]
                    .iter()
                    .any(|suffix| path.ends_with(suffix))
                    || path.starts_with("nodeSelector.")
                    || path.starts_with("resources.");
                ensure!(is_named, "The README does not say that {path} can be null.");
            }
            _ => ensure!(
                finished.stderr.contains(&words),
                "{path}: The error does not contain {words:?}: {}",
                finished.stderr
            ),
        }
        refused += i32::from(finished.code != 0);
    }
    ensure!(refused >= 45, "Only {refused} of {} values were refused.", paths.len());
    Ok(())
}

/// Returns the JSON pointer of a value's path.
fn pointer(path: &str) -> String {
    path.split('.').filter(|part| !part.is_empty()).map(|part| format!("/{part}")).collect()
}

/// Collects the paths of all values that are not maps, and of empty maps.
fn leaves(path: &str, value: &Value, all: &mut BTreeSet<String>) {
    match value.as_object().filter(|map| !map.is_empty()) {
        Some(map) => map.iter().for_each(|(key, value)| {
            let dot = if path.is_empty() { "" } else { "." };
            leaves(&format!("{path}{dot}{key}"), value, all);
        }),
        None => drop(all.insert(path.to_owned())),
    }
}

#[test]
fn readme_lists_every_value_once_with_its_default() -> Result<()> {
    let values = programs::yaml(&fs::read_to_string(chart::path().join("values.yaml"))?)?.remove(0);
    let mut missing = BTreeSet::new();
    leaves("", &values, &mut missing);
    let readme = fs::read_to_string(chart::path().join("README.md"))?;
    let table = readme.split("## Values").nth(1).context("no table of values")?;
    for row in table.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<_> = row.splitn(4, '|').map(|cell| cell.trim().trim_matches('`')).collect();
        let (path, default) = (cells[1], cells[2]);
        let pointer = format!("/{}", path.replace('.', "/"));
        let value = values.pointer(&pointer).with_context(|| format!("no value {path}"))?;
        let shown: Value = serde_json::from_str(default).with_context(|| row.to_owned())?;
        ensure!(*value == shown, "{path} is {value}, but the README says {default}.");
        let before = missing.len();
        missing.retain(|leaf| leaf != path && !leaf.starts_with(&format!("{path}.")));
        ensure!(missing.len() < before, "{path} has two rows.");
    }
    ensure!(missing.is_empty(), "The table lacks these values: {missing:?}");
    Ok(())
}
