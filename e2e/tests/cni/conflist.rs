//! The network configuration list: CNI versions, entries and files of other programs, modes and
//! owners.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use skein_lab::agent::Agent;
use skein_lab::pods::{list, list_path, prepared, put_list, runtime, up};
use skein_lab::{checks, newer};

/// Delay that is longer than the interval of the agent's repairs.
const REPAIR_TIME: Duration = Duration::from_secs(11);
/// Maximum time of a repair.
const REPAIR_TIMEOUT: Duration = Duration::from_secs(20);

fn types(list: &Value) -> Vec<&str> {
    let plugins = list["plugins"].as_array().map(Vec::as_slice).unwrap_or_default();
    plugins.iter().filter_map(|plugin| plugin["type"].as_str()).collect()
}

/// Changes the list of plugins in the agent's file.
fn edit(agent: &Agent, change: impl FnOnce(&mut Vec<Value>)) -> Result<()> {
    let mut list = list(agent)?;
    change(list["plugins"].as_array_mut().context("no plugins")?);
    put_list(agent, &list)
}

/// Installs a plugin that answers only VERSION, with `versions`.
fn put_plugin(path: &Path, versions: &[&str]) -> Result<()> {
    let answer = json!({ "cniVersion": "0.4.0", "supportedVersions": versions });
    let new = path.with_extension("new");
    fs::write(&new, format!("#!/bin/sh\necho '{answer}'\n"))?;
    fs::set_permissions(&new, Permissions::from_mode(0o755))?;
    Ok(fs::rename(new, path)?)
}

/// Returns the body of `/readyz` while the agent is not ready.
fn not_ready(agent: &Agent) -> Result<String> {
    let answer = agent.http("/readyz")?;
    Ok(if answer.status == 200 { String::new() } else { answer.body })
}

/// Replaces the system's portmap with that of the newer suite, and restores it.
#[test]
fn old_plugin_limits_the_offered_versions() -> Result<()> {
    let mut cluster = prepared(1, |_| ())?;
    let agent = &mut cluster.agents[0];
    let portmap = agent.cni_directory("bin_dir").join("portmap");
    let new = newer::root()?.join("usr/lib/cni/portmap");
    // Answer of portmap 1.1.1 in Debian 12.
    let old = ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0"];
    put_plugin(&portmap, &old)?;
    agent.start()?;
    let agent = &cluster.agents[0];
    let offers = |newest: &str| {
        checks::eventually(newest, REPAIR_TIMEOUT, || {
            let list = list(agent)?;
            let versions = list["cniVersions"].as_array().context("no cniVersions")?;
            ensure!(
                versions.last().is_some_and(|last| last == newest),
                "The list has other versions: {list}"
            );
            // A runtime with a libcni before 1.2 uses `cniVersion`.
            ensure!(list["cniVersion"] == "1.0.0", "The list has other versions: {list}");
            Ok(true)
        })
    };
    offers("1.0.0")?;
    let log = fs::read_to_string(agent.log())?;
    ensure!(log.contains("CNI versions are limited") && log.contains("bin/portmap supports"));
    let status = agent.status()?;
    let limits = status["cni"]["limits"].to_string();
    ensure!(
        limits.contains("bin/portmap supports 0.3.1, 0.4.0, 1.0.0"),
        "The limit is not reported: {}",
        status["cni"]
    );
    let shown = agent.run_command(&["status", "--interval", "0"])?.stdout;
    ensure!(
        shown.contains("CNI versions  0.3.1 0.4.0 1.0.0\n"),
        "The status shows other versions: {shown}"
    );
    // The agent notices updates and downgrades of a plugin without a restart.
    let beside = portmap.with_extension("new");
    fs::copy(&new, &beside)?;
    fs::rename(&beside, &portmap)?;
    offers("1.1.0")?;
    ensure!(
        agent.status()?["cni"]["limits"] == json!([]),
        "A limit is still reported: {}",
        agent.status()?["cni"]
    );
    put_plugin(&portmap, &old)?;
    offers("1.0.0").map(drop)
}

#[test]
fn no_common_version_keeps_the_node_not_ready() -> Result<()> {
    let mut cluster = prepared(1, |agent| {
        agent.set("cni.chain", toml::Value::from(vec![toml::toml! { type = "ancient" }]));
    })?;
    let agent = &mut cluster.agents[0];
    let plugin = agent.cni_directory("bin_dir").join("ancient");
    put_plugin(&plugin, &["0.1.0", "0.2.0"])?;
    agent.launch()?;
    let agent = &cluster.agents[0];
    checks::eventually("the plugin is named", Duration::from_secs(25), || {
        let reason = not_ready(agent)?;
        Ok(reason.contains("no CNI version suits") && reason.contains("bin/ancient supports"))
    })?;
    ensure!(!list_path(agent).exists(), "The list was installed without a common version.");
    put_plugin(&plugin, &["0.2.0", "0.3.1"])?;
    checks::eventually("the agent becomes ready by itself", REPAIR_TIMEOUT, || {
        Ok(not_ready(agent)?.is_empty() && list_path(agent).exists())
    })?;
    let list = list(agent)?;
    ensure!(
        list["cniVersion"] == "0.3.1" && list["cniVersions"] == json!(["0.3.1"]),
        "The list has other versions: {list}"
    );
    // The list stays while running pods need it for their deletion.
    put_plugin(&plugin, &["0.2.0"])?;
    checks::eventually("the node is not ready", REPAIR_TIMEOUT, || {
        Ok(not_ready(agent)?.contains("no CNI version suits"))
    })?;
    ensure!(list_path(agent).exists(), "The list was removed while pods need it.");
    Ok(())
}

#[test]
fn entries_of_other_programs_survive_repairs() -> Result<()> {
    let mut cluster = up(1, |_| ())?;
    let agent = &cluster.agents[0];
    checks::eventually("the list is there", REPAIR_TIMEOUT, || Ok(list_path(agent).exists()))?;
    let istio = json!({ "type": "istio-cni", "name": "istio-cni", "plugin_log_level": "info" });
    let linkerd = json!({ "type": "linkerd-cni", "policy": { "type": "k8s" } });
    edit(agent, |plugins| plugins.push(istio.clone()))?;
    edit(agent, |plugins| plugins.insert(0, linkerd.clone()))?;
    let order = ["linkerd-cni", "skein-cni", "portmap", "istio-cni"];
    let whole = list(agent)?;
    thread::sleep(REPAIR_TIME);
    ensure!(list(agent)? == whole, "an unchanged list was rewritten: {}", list(agent)?);
    // Skein's entries are repaired; the entries of other programs stay.
    for damage in [
        |plugins: &mut Vec<Value>| drop(plugins.remove(1)),
        |plugins: &mut Vec<Value>| plugins[1]["socket"] = "/elsewhere".into(),
        |plugins: &mut Vec<Value>| plugins[2]["capabilities"] = json!({}),
    ] {
        edit(agent, damage)?;
        checks::eventually("the list is repaired", REPAIR_TIMEOUT, || {
            let now = list(agent)?;
            ensure!(now == whole, "{now} instead of {whole}");
            Ok(true)
        })?;
    }
    // A restart with another chain: the former chain goes, others' entries stay.
    let agent = &mut cluster.agents[0];
    agent.stop()?;
    agent.set("cni.chain", toml::Value::from(vec![toml::toml! { type = "tuning" }]));
    agent.start()?;
    checks::eventually("the chain is replaced", REPAIR_TIMEOUT, || {
        let now = list(agent)?;
        ensure!(
            types(&now) == ["linkerd-cni", "skein-cni", "tuning", "istio-cni"],
            "The list has other plugins: {now}"
        );
        Ok(true)
    })?;
    // istio-cni removes its entry when it ends.
    edit(agent, |plugins| drop(plugins.pop()))?;
    thread::sleep(REPAIR_TIME);
    ensure!(
        types(&list(agent)?) == ["linkerd-cni", "skein-cni", "tuning"],
        "The list has other plugins: {}",
        list(agent)?
    );
    ensure!(types(&whole) == order);
    // A file that is not a list is replaced.
    fs::write(list_path(agent), "{")?;
    checks::eventually("the list is replaced", REPAIR_TIMEOUT, || {
        Ok(types(&list(agent)?) == ["skein-cni", "tuning"])
    })?;
    agent.stop()?;
    let finished = agent.run_command(&["cleanup"])?;
    ensure!(
        finished.code == 0 && !list_path(agent).exists(),
        "cleanup left the list: {}",
        finished.stderr
    );
    Ok(())
}

#[test]
fn exclusive_mode_spares_meta_plugins_and_files_behind() -> Result<()> {
    let mut cluster = prepared(1, |agent| agent.set("cni.exclusive", true))?;
    let agent = &mut cluster.agents[0];
    let directory = agent.cni_directory("conf_dir");
    fs::create_dir_all(&directory)?;
    let bridge = r#"{"cniVersion":"0.4.0","name":"other","plugins":[{"type":"bridge"}]}"#;
    let spared = [
        ("00-multus.conf", r#"{"type":"multus-shim","name":"multus-cni-network"}"#),
        ("02-istio-cni.conflist", r#"{"plugins":[{"type":"skein-cni"},{"type":"istio-cni"}]}"#),
        ("100-crio-bridge.conflist", bridge),
        ("87-podman-bridge.conflist", bridge),
        ("YYY-istio-cni.conf", r#"{"type":"istio-cni"}"#),
    ];
    let networks = ["05-cilium.conflist", "10-flannel.conflist"];
    for (name, text) in spared.into_iter().chain(networks.map(|name| (name, bridge))) {
        fs::write(directory.join(name), text)?;
    }
    // An earlier version of Skein has set this file aside.
    fs::write(directory.join("99-late.conf.skein-aside"), bridge)?;
    agent.start()?;
    let aside = |name: &str| directory.join(format!("{name}.skein-aside"));
    checks::eventually("other networks are set aside", REPAIR_TIMEOUT, || {
        Ok(networks.iter().all(|name| aside(name).exists() && !directory.join(name).exists()))
    })?;
    // A file that is added later is set aside, too.
    fs::write(directory.join(networks[0]), bridge)?;
    checks::eventually("it is set aside again", REPAIR_TIMEOUT, || {
        Ok(!directory.join(networks[0]).exists())
    })?;
    for (name, text) in spared {
        let kept = fs::read_to_string(directory.join(name)).context(name)?;
        ensure!(kept == text, "{name} was changed: {kept}");
    }
    ensure!(
        directory.join("99-late.conf").exists(),
        "The file after Skein's list is not restored."
    );
    agent.stop()?;
    agent.run_command(&["cleanup"])?;
    for name in networks {
        ensure!(directory.join(name).exists(), "{name} is not restored");
    }
    Ok(())
}

#[test]
fn stricter_file_modes_stay() -> Result<()> {
    let cluster = up(1, |_| ())?;
    let agent = &cluster.agents[0];
    let (list, plugin) = (list_path(agent), agent.cni_directory("bin_dir").join("skein-cni"));
    checks::eventually("the list is there", REPAIR_TIMEOUT, || Ok(list.exists()))?;
    let mode =
        |path: &Path| -> Result<u32> { Ok(fs::metadata(path)?.permissions().mode() & 0o777) };
    ensure!((mode(&list)?, mode(&plugin)?) == (0o644, 0o755));
    // The CIS benchmark of Kubernetes, section 1.1.9.
    fs::set_permissions(&list, Permissions::from_mode(0o600))?;
    fs::set_permissions(&plugin, Permissions::from_mode(0o700))?;
    thread::sleep(REPAIR_TIME);
    ensure!((mode(&list)?, mode(&plugin)?) == (0o600, 0o700), "The stricter modes were changed.");
    edit(agent, |plugins| plugins.clear())?;
    fs::set_permissions(&list, Permissions::from_mode(0o600))?;
    checks::eventually("the list is repaired", REPAIR_TIMEOUT, || {
        Ok(types(&self::list(agent)?) == ["skein-cni", "portmap"])
    })?;
    ensure!(mode(&list)? == 0o600, "The repair changed the mode.");
    fs::set_permissions(&list, Permissions::from_mode(0o666))?;
    checks::eventually("a looser mode is repaired", REPAIR_TIMEOUT, || Ok(mode(&list)? == 0o644))?;
    runtime(&cluster, 0)?.pod("a").map(drop)
}

#[test]
fn directory_of_another_user_names_the_remedy() -> Result<()> {
    let mut cluster = prepared(1, |_| ())?;
    let agent = &mut cluster.agents[0];
    let directory = agent.cni_directory("conf_dir");
    fs::create_dir_all(&directory)?;
    std::os::unix::fs::chown(&directory, Some(65_534), Some(65_534))?;
    // Runs as root without CAP_DAC_OVERRIDE, as in a pod.
    let wrapper = cluster.lab.directory().join("confined-agent");
    let agent = &mut cluster.agents[0];
    let program = agent.program.display();
    let drop_it = "setpriv --bounding-set -dac_override --inh-caps -dac_override";
    fs::write(&wrapper, format!("#!/bin/sh\nexec {drop_it} {program} \"$@\"\n"))?;
    fs::set_permissions(&wrapper, Permissions::from_mode(0o755))?;
    agent.program = wrapper;
    agent.launch()?;
    let agent = &cluster.agents[0];
    checks::eventually("the remedy is named", Duration::from_secs(25), || {
        let reason = not_ready(agent)?;
        Ok(["net.d/10-skein.conflist", "DAC_OVERRIDE", "chown root"]
            .iter()
            .all(|part| reason.contains(part)))
    })?;
    let chown = Command::new("chown").arg("root:root").arg(&directory).status()?;
    ensure!(chown.success());
    checks::eventually("the remedy helps", REPAIR_TIMEOUT, || Ok(not_ready(agent)?.is_empty()))
        .map(drop)
}
