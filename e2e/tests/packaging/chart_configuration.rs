//! Configuration of the agent that the chart renders.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use skein_lab::chart::{agent_takes, object, rendered};

use crate::chart::VARIANTS;

#[test]
fn agent_accepts_every_rendered_configuration() -> Result<()> {
    for (name, settings) in VARIANTS {
        agent_takes(&rendered(settings)?).with_context(|| name.to_owned())?;
    }
    Ok(())
}

/// Pod CIDRs of an IPv4-only, an IPv6-only and a dual-stack cluster.
#[test]
fn every_address_family_gets_a_listener_and_probes() -> Result<()> {
    for settings in [
        &["podCidr=10.244.0.0/16"][..],
        &["podCidrv6=fd00:10:244::/56"],
        &["podCidr=10.244.0.0/16", "podCidrv6=fd00:10:244::/56"],
    ] {
        let objects = rendered(settings)?;
        agent_takes(&objects).with_context(|| format!("{settings:?}"))?;
        let text = &object(&objects, "ConfigMap", "skein")?["data"]["agent.toml"];
        let table: toml::Table = toml::from_str(text.as_str().context("no agent.toml")?)?;
        let cidrs: Vec<_> = settings.iter().filter_map(|s| Some(s.split_once('=')?.1)).collect();
        let table = serde_json::to_value(table)?;
        let found = &table["cluster_cidrs"];
        ensure!(*found == json!(cidrs), "{settings:?}: cluster_cidrs is {found}.");
        let listen = &table["metrics"]["listen"];
        ensure!(*listen == "[::]:9464", "{settings:?}: metrics.listen is {listen}.");
        // A probe with an address would have only one family.
        let pod = &object(&objects, "DaemonSet", "skein")?["spec"]["template"]["spec"];
        for container in pod["containers"].as_array().context("no containers")? {
            for probe in ["startupProbe", "livenessProbe", "readinessProbe"] {
                let host = &container[probe]["httpGet"]["host"];
                ensure!(host.is_null(), "{probe} uses only one address: {host}");
            }
        }
    }
    Ok(())
}

#[test]
fn values_reach_the_configuration() -> Result<()> {
    let parse = |settings: &[&str]| -> Result<Value> {
        let objects = rendered(settings)?;
        let text = object(&objects, "ConfigMap", "skein")?["data"]["agent.toml"].clone();
        let table: toml::Table = toml::from_str(text.as_str().context("no agent.toml")?)?;
        Ok(serde_json::to_value(table)?)
    };
    let variant = |name| VARIANTS.into_iter().find(|v| v.0 == name).context("no such variant");
    let small = parse(variant("small")?.1)?;
    ensure!(small["cluster_id"] == "a \"quoted, one\"", "A value differs: {small:#}");
    ensure!(small["kubernetes"] == json!({ "enabled": true, "endpoint_interface": "eth1" }));
    ensure!(
        small["interface"]["mtu"] == 1400 && small["underlay"]["port"] == 4000,
        "A value differs: {small:#}"
    );
    let dataplane = json!({
        "mode": "external", "socket": "/run/skein/dataplane.sock", "lanes": 3,
        "cipher": "chacha20-poly1305", "bundling": false, "busy_poll_us": 0,
        "require_confinement": true,
    });
    ensure!(small["dataplane"] == dataplane, "A value differs: {small:#}");
    let offload = small["offload"].as_object().context("no offload")?;
    ensure!(
        offload.len() == 6 && offload.values().all(|rung| rung == false),
        "A value differs: {small:#}"
    );
    let metrics = json!({ "listen": "[::1]:9999", "per_peer": true, "hosts": ["a.example"] });
    ensure!(small["metrics"] == metrics, "A value differs: {small:#}");
    ensure!(
        small["status_page"] == json!({ "listen": "[::1]:9998" }),
        "A value differs: {small:#}"
    );
    ensure!(parse(&[])?["status_page"].is_null(), "The status page is on by default.");
    ensure!(small["cluster_cidrs"] == json!(["10.244.0.0/16", "fd00:10:244::/56"]));
    ensure!(small["cni"]["masquerade"] == false, "A value differs: {small:#}");
    let firewall = small["firewall"].as_object().context("no firewall")?;
    ensure!(
        firewall.len() == 5 && firewall.values().all(|on| on == false),
        "A value differs: {small:#}"
    );
    ensure!(small["policy"] == json!({ "mode": "audit" }), "A value differs: {small:#}");
    ensure!(small["log"] == json!({ "level": "skein_agent=debug,info", "format": "text" }));
    let cni = &parse(variant("plugins")?.1)?["cni"];
    // The bandwidth plugin accepts only integers.
    let chain = json!([
        { "type": "portmap", "capabilities": { "portMappings": true } },
        { "type": "bandwidth", "ingressRate": 1_000_000, "shaping": { "on": true }, "names": ["a", "b"] },
    ]);
    ensure!(cni["chain"] == chain, "A value of [cni] differs: {cni:#}");
    ensure!(
        cni["no_masquerade"] == json!(["192.0.2.0/24", "2001:db8::/32"]),
        "A value of [cni] differs: {cni:#}"
    );
    ensure!(cni["forward_accept"] == true, "A value of [cni] differs: {cni:#}");
    ensure!(
        cni["plugin_dirs"] == json!(["/usr/lib/cni", "/opt/other"]),
        "A value of [cni] differs: {cni:#}"
    );
    ensure!(
        cni["exclusive"] == false && cni["conf_dir"] == "/etc/cni/other",
        "A value of [cni] differs: {cni:#}"
    );
    Ok(())
}

/// Keys of agent.toml that the chart writes and that an agent of the first release accepts.
const FIRST_RELEASE_KEYS: [&str; 34] = [
    "cluster_id",
    "cluster_cidrs",
    "key_rotation.every_days",
    "key_rotation.settle_seconds",
    "kubernetes.enabled",
    "kubernetes.endpoint_interface",
    "kubernetes.not_ready_taint",
    "interface.mtu",
    "underlay.port",
    "dataplane.mode",
    "dataplane.socket",
    "dataplane.lanes",
    "dataplane.cipher",
    "dataplane.bundling",
    "dataplane.busy_poll_us",
    "offload.tun_uso",
    "offload.tun_tso",
    "offload.tun_checksum",
    "offload.udp_gso",
    "offload.udp_gro",
    "metrics.listen",
    "metrics.per_peer",
    "status_page.listen",
    "cni.enabled",
    "cni.bin_dir",
    "cni.plugin_dirs",
    "cni.conf_dir",
    "cni.exclusive",
    "cni.no_masquerade",
    "cni.forward_accept",
    "cni.chain",
    "cni.masquerade",
    "log.level",
    "log.format",
];

/// Pods of the earlier release read the same ConfigMap during an upgrade, and their agents refuse a
/// file with an unknown key.
#[test]
fn default_configuration_has_no_key_of_later_releases() -> Result<()> {
    let keys = |settings: &[&str]| -> Result<BTreeSet<String>> {
        let objects = rendered(settings)?;
        let text = object(&objects, "ConfigMap", "skein")?["data"]["agent.toml"].clone();
        let table: toml::Table = toml::from_str(text.as_str().context("no agent.toml")?)?;
        let keys = table.into_iter().flat_map(|(name, value)| match value {
            toml::Value::Table(table) => {
                // An unknown table is refused even without keys.
                let keys = table.keys().map(|key| format!("{name}.{key}")).collect::<Vec<_>>();
                if keys.is_empty() { vec![name] } else { keys }
            }
            _ => vec![name],
        });
        Ok(keys.collect())
    };
    let known = BTreeSet::from(FIRST_RELEASE_KEYS.map(str::to_owned));
    let old =
        ["statusPage.enabled=true,lanes=2,mtu=1400,busyPollMicroseconds=0,podCidr=10.0.0.0/8"];
    for settings in [&[][..], &old[..]] {
        let new: Vec<_> = keys(settings)?.difference(&known).cloned().collect();
        ensure!(new.is_empty(), "{settings:?}: earlier agents refuse {new:?}");
    }
    // Each new key is written alone, if its value is not the agent's default.
    for (setting, key) in [
        ("firewall.dropSpoofed=false", "firewall.drop_spoofed"),
        ("firewall.dropCleartext=false", "firewall.drop_cleartext"),
        ("firewall.dropTransit=false", "firewall.drop_transit"),
        ("firewall.masqueradeForeign=false", "firewall.masquerade_foreign"),
        ("firewall.notrack=false", "firewall.notrack"),
        ("policy.mode=enforce", "policy.mode"),
        ("metrics.hosts={a.example}", "metrics.hosts"),
        ("offload.udpEcn=false", "offload.udp_ecn"),
    ] {
        let new: Vec<_> = keys(&[setting])?.difference(&known).cloned().collect();
        ensure!(new == [key], "{setting} adds {new:?} instead of {key}.");
    }
    Ok(())
}
