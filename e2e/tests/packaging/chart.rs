//! The Helm chart: what it renders is taken by Kubernetes' schemas and by the agent; what it refuses,
//! it refuses in words; what it says of itself is true.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use skein_lab::agent::binary;
use skein_lab::cargo::workspace;
use skein_lab::chart::{self, agent_takes, helm, object, render, rendered};
use skein_lab::process;
use skein_lab::{programs, skein_image};

/// Every value changed, in a few sets that go together.
const VARIANTS: [(&str, &[&str]); 6] = [
    ("defaults", &[]),
    (
        "small",
        &[
            "podCidr=10.244.0.0/16",
            "podCidrv6=fd00:10:244::/56",
            "mtu=1400",
            "lanes=3",
            "port=4000",
            "busyPollMicroseconds=0",
            "bundling=false",
            "requireConfinement=true",
            "encryption.cipher=chacha20-poly1305",
            "masquerade=false",
            "firewall.dropSpoofed=false,firewall.dropCleartext=false,firewall.dropTransit=false",
            "firewall.masqueradeForeign=false,firewall.notrack=false",
            "endpointInterface=eth1",
            "notReadyTaint=null",
            "clusterId=a \"quoted\\, one\"",
            "offload.tunUso=false,offload.tunTso=false,offload.tunChecksum=false",
            "offload.udpGso=false,offload.udpGro=false,offload.udpEcn=false",
            "log.level=skein_agent=debug\\,info,log.format=text",
            "metrics.address=::1,metrics.port=9999,metrics.perPeer=true,metrics.hosts={a.example}",
            "statusPage.enabled=true,statusPage.address=::1,statusPage.port=9998",
        ],
    ),
    (
        "plugins",
        &[
            "cni.binDir=/var/lib/cni/bin,cni.confDir=/etc/cni/other,cni.exclusive=false",
            "cni.pluginDirs={/usr/lib/cni,/opt/other}",
            "cni.noMasquerade={192.0.2.0/24,2001:db8::/32},cni.forwardAccept=true",
            "cni.chain[0].type=portmap,cni.chain[0].capabilities.portMappings=true",
            "cni.chain[1].type=bandwidth,cni.chain[1].ingressRate=1000000",
            "cni.chain[1].shaping.on=true,cni.chain[1].names={a,b}",
        ],
    ),
    (
        "monitoring",
        &[
            "prometheus.podMonitor.enabled=true,prometheus.podMonitor.labels.release=prom",
            "prometheus.serviceMonitor.enabled=true,prometheus.serviceMonitor.interval=1m",
            "prometheus.rules.enabled=true,prometheus.rules.labels.release=prom",
            "prometheus.dashboards.enabled=true",
            "metrics.address=127.0.0.1",
        ],
    ),
    (
        "scheduling",
        &[
            "image.repository=registry.example/skein,image.tag=edge,image.pullPolicy=Never",
            "image.pullSecrets[0].name=secret",
            "privileged=true",
            "priorityClassName=critical,tolerations=null,nodeSelector.disk=ssd",
            "affinity.podAffinity.requiredDuringSchedulingIgnoredDuringExecution[0].topologyKey=zone",
            "updateStrategy.type=OnDelete",
            "terminationGracePeriodSeconds=5",
            "labels.team=net,annotations.note=yes,podLabels.a=b,podAnnotations.c=d",
            "extraEnv[0].name=SKEIN_LOG,extraEnv[0].value=debug",
            "serviceAccount.create=false,serviceAccount.name=mine",
            "resources.agent.limits.memory=256Mi,resources.dataplane=null",
        ],
    ),
    (
        "bare",
        &[
            "cleanup.enabled=false,admissionPolicy.enabled=false,updateStrategy.maxUnavailable=10%",
            "image.digest=sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
        ],
    ),
];

/// Versions of Kubernetes whose schemas are asked.
const VERSIONS: [&str; 4] = ["1.25", "1.28", "1.31", "1.34"];

/// How long one program may take.
const LIMIT: Duration = Duration::from_secs(120);

#[test]
fn lint_finds_nothing() -> Result<()> {
    for (name, settings) in VARIANTS {
        let linted = helm(&["lint", "--strict", &chart::path().to_string_lossy()], settings)?;
        ensure!(linted.code == 0, "{name}: {}{}", linted.stdout, linted.stderr);
        ensure!(!linted.stdout.contains("WARNING"), "{name}: {}", linted.stdout);
    }
    Ok(())
}

#[test]
fn every_version_of_kubernetes_takes_what_is_rendered() -> Result<()> {
    let directory = tempfile::tempdir()?;
    for version in VERSIONS {
        let mut files = vec![];
        for (name, settings) in VARIANTS {
            let mut text = render(settings, version)?;
            // What the Job creates is checked as what helm creates.
            let cleanup = programs::yaml(&text)?
                .into_iter()
                .find_map(|object| object["data"]["daemonset.yaml"].as_str().map(str::to_owned));
            ensure!(cleanup.is_some() == (name != "bare"), "{name}: the cleanup's DaemonSet");
            text.push_str(&cleanup.map(|text| format!("\n---\n{text}")).unwrap_or_default());
            let path = directory.path().join(format!("{name}-{version}.yaml"));
            fs::write(&path, text)?;
            files.push(path);
        }
        files.push(chart::path().join("crds/skeinnodes.yaml"));
        let mut validate =
            Command::new(programs::kubernetes_validate()?.join("kubernetes-validate"));
        validate.args(["--strict", "--kubernetes-version", version]).args(&files);
        let said = process::finish(&mut validate, &[], LIMIT)?;
        let text = format!("{}{}", said.stdout, said.stderr);
        ensure!(said.code == 0, "{version}: {text}");
        // Kinds that it does not know pass with a warning: only the Prometheus Operator's may.
        let warned = text.lines().filter(|line| line.contains("WARN"));
        let warned: Vec<_> = warned.filter(|w| !w.contains("monitoring.coreos.com")).collect();
        ensure!(warned.is_empty(), "{version}: {warned:?}");
        let passed = text.lines().filter(|line| line.contains("passed")).count();
        ensure!(passed > 50, "{version}: only {passed} objects were looked at: {text}");
    }
    Ok(())
}

#[test]
fn the_agent_takes_every_rendered_configuration() -> Result<()> {
    for (name, settings) in VARIANTS {
        agent_takes(&rendered(settings)?).with_context(|| name.to_owned())?;
    }
    Ok(())
}

/// The pod CIDRs of an IPv4-only, an IPv6-only and a dual-stack cluster.
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
        ensure!(table["cluster_cidrs"] == json!(cidrs), "{settings:?}: {table:#}");
        ensure!(table["metrics"]["listen"] == "[::]:9464", "{settings:?}: {table:#}");
        // A probe that named an address would be of one family.
        let pod = &object(&objects, "DaemonSet", "skein")?["spec"]["template"]["spec"];
        for container in pod["containers"].as_array().context("no containers")? {
            for probe in ["startupProbe", "livenessProbe", "readinessProbe"] {
                let host = &container[probe]["httpGet"]["host"];
                ensure!(host.is_null(), "{probe} is bound to one address: {container:#}");
            }
        }
    }
    Ok(())
}

#[test]
fn pods_resolve_names_without_the_cluster_dns() -> Result<()> {
    let objects = rendered(&[])?;
    let cleanup = object(&objects, "ConfigMap", "skein-cleanup")?["data"]["daemonset.yaml"].clone();
    let cleanup = programs::yaml(cleanup.as_str().context("no manifest")?)?.remove(0);
    let (agents, job) =
        (object(&objects, "DaemonSet", "skein")?, object(&objects, "Job", "skein-cleanup")?);
    for object in [agents, job, &cleanup] {
        let pod = &object["spec"]["template"]["spec"];
        ensure!(pod["dnsPolicy"] == "Default", "{}: {}", object["kind"], pod["dnsPolicy"]);
    }
    Ok(())
}

/// The removal Job refuses to remove a DaemonSet that no release owns, because `skein-agent
/// uninstall` does.
#[test]
fn removal_job_needs_a_release_unless_told_otherwise() -> Result<()> {
    let job = |settings: &[&str]| -> Result<Value> {
        let objects = rendered(settings)?;
        let job = object(&objects, "Job", "skein-cleanup")?;
        ensure!(job["metadata"]["annotations"]["helm.sh/hook"] == "pre-delete", "{job:#}");
        Ok(job["spec"]["template"]["spec"]["containers"][0]["args"].clone())
    };
    let words = |arguments: &Value, word: &str| {
        arguments.as_array().is_some_and(|all| all.contains(&json!(word)))
    };
    let usual = job(&[])?;
    ensure!(words(&usual, "--configmap=skein") && !words(&usual, "--without-helm"), "{usual}");
    let told = job(&["cleanup.withoutHelm=true"])?;
    ensure!(words(&told, "--without-helm"), "{told}");
    let objects = rendered(&[])?;
    let rules = object(&objects, "Role", "skein-cleanup")?["rules"].clone();
    let right = json!({
        "apiGroups": [""], "resources": ["configmaps"], "resourceNames": ["skein"],
        "verbs": ["get"],
    });
    ensure!(rules.as_array().is_some_and(|rules| rules.contains(&right)), "{rules:#}");
    // Rendered for another tool, the chart lacks only the hook.
    let chart = chart::path().to_string_lossy().into_owned();
    let plain = helm(&["template", "skein", &chart, "--no-hooks", "--include-crds"], &[])?;
    ensure!(plain.code == 0, "{}", plain.stderr);
    let objects = programs::yaml(&plain.stdout)?;
    object(&objects, "DaemonSet", "skein")?;
    object(&objects, "CustomResourceDefinition", "skeinnodes.skein.network")?;
    let hooks = objects.iter().filter(|o| o["metadata"]["name"] == "skein-cleanup").count();
    ensure!(hooks == 0, "{hooks} objects of the hook are rendered with --no-hooks");
    Ok(())
}

/// The definition is made from the types in the agent's code.
#[test]
fn the_definition_is_what_the_agent_prints() -> Result<()> {
    let printed = process::run(Command::new(binary()?).arg("crd"))?;
    let path = chart::path().join("crds/skeinnodes.yaml");
    let how = "write it anew: skein-agent crd > charts/skein/crds/skeinnodes.yaml";
    ensure!(fs::read_to_string(path)? == printed, "the chart has another definition; {how}");
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
    ensure!(small["cluster_id"] == "a \"quoted, one\"", "{small:#}");
    ensure!(small["kubernetes"] == json!({ "enabled": true, "endpoint_interface": "eth1" }));
    ensure!(small["interface"]["mtu"] == 1400 && small["underlay"]["port"] == 4000, "{small:#}");
    let dataplane = json!({
        "mode": "external", "socket": "/run/skein/dataplane.sock", "lanes": 3,
        "cipher": "chacha20-poly1305", "bundling": false, "busy_poll_us": 0,
        "require_confinement": true,
    });
    ensure!(small["dataplane"] == dataplane, "{small:#}");
    let offload = small["offload"].as_object().context("no offload")?;
    ensure!(offload.len() == 6 && offload.values().all(|rung| rung == false), "{small:#}");
    let metrics = json!({ "listen": "[::1]:9999", "per_peer": true, "hosts": ["a.example"] });
    ensure!(small["metrics"] == metrics, "{small:#}");
    ensure!(small["status_page"] == json!({ "listen": "[::1]:9998" }), "{small:#}");
    ensure!(parse(&[])?["status_page"].is_null(), "the page is served without being asked for");
    ensure!(small["cluster_cidrs"] == json!(["10.244.0.0/16", "fd00:10:244::/56"]));
    ensure!(small["cni"]["masquerade"] == false, "{small:#}");
    let firewall = small["firewall"].as_object().context("no firewall")?;
    ensure!(firewall.len() == 5 && firewall.values().all(|on| on == false), "{small:#}");
    ensure!(small["log"] == json!({ "level": "skein_agent=debug,info", "format": "text" }));
    let cni = &parse(variant("plugins")?.1)?["cni"];
    // Whole numbers stay whole: the bandwidth plugin takes no others.
    let chain = json!([
        { "type": "portmap", "capabilities": { "portMappings": true } },
        { "type": "bandwidth", "ingressRate": 1_000_000, "shaping": { "on": true }, "names": ["a", "b"] },
    ]);
    ensure!(cni["chain"] == chain, "{cni:#}");
    ensure!(cni["no_masquerade"] == json!(["192.0.2.0/24", "2001:db8::/32"]), "{cni:#}");
    ensure!(cni["forward_accept"] == true, "{cni:#}");
    ensure!(cni["plugin_dirs"] == json!(["/usr/lib/cni", "/opt/other"]), "{cni:#}");
    ensure!(cni["exclusive"] == false && cni["conf_dir"] == "/etc/cni/other", "{cni:#}");
    Ok(())
}

/// Keys of agent.toml that an agent of the first release takes, as far as the chart writes them.
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
                // A table without keys is as unknown as a key.
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
        ("metrics.hosts={a.example}", "metrics.hosts"),
        ("offload.udpEcn=false", "offload.udp_ecn"),
    ] {
        let new: Vec<_> = keys(&[setting])?.difference(&known).cloned().collect();
        ensure!(new == [key], "{setting}: {new:?}");
    }
    Ok(())
}

#[test]
fn pods_have_the_rights_they_need_and_no_others() -> Result<()> {
    let objects = rendered(&[])?;
    let pod = &object(&objects, "DaemonSet", "skein")?["spec"]["template"]["spec"];
    ensure!(pod["hostNetwork"] == true && pod["tolerations"] == json!([{ "operator": "Exists" }]));
    let containers = pod["containers"].as_array().context("no containers")?;
    let rights = |add: Value| {
        json!({
            "privileged": false, "capabilities": { "drop": ["ALL"], "add": add },
            "readOnlyRootFilesystem": true,
            "seccompProfile": { "type": "RuntimeDefault" }, "runAsUser": 0, "runAsGroup": 0,
        })
    };
    ensure!(containers.len() == 2, "{} containers", containers.len());
    for (container, name, add) in [
        (&containers[0], "agent", json!(["NET_ADMIN", "SYS_ADMIN"])),
        (&containers[1], "dataplane", json!(["NET_ADMIN"])),
    ] {
        ensure!(container["name"] == name, "{container:#}");
        ensure!(container["securityContext"] == rights(add), "{container:#}");
        ensure!(container["image"] == skein_image::REFERENCE, "{container:#}");
    }
    // It runs while there is no network, and needs nothing but the API.
    let job = &object(&objects, "Job", "skein-cleanup")?["spec"]["template"]["spec"];
    ensure!(job["hostNetwork"] == true, "{job:#}");
    let context = &job["containers"][0]["securityContext"];
    ensure!(
        context["runAsNonRoot"] == true && context["capabilities"] == json!({ "drop": ["ALL"] })
    );
    Ok(())
}

#[test]
fn a_new_pod_takes_over_where_kubernetes_starts_it_before_the_old_one_ends() -> Result<()> {
    let strategy = |version: &str, settings: &[&str]| -> Result<Value> {
        let objects = programs::yaml(&render(settings, version)?)?;
        Ok(object(&objects, "DaemonSet", "skein")?["spec"]["updateStrategy"]["rollingUpdate"]
            .clone())
    };
    ensure!(strategy("1.34", &[])? == json!({ "maxSurge": 1, "maxUnavailable": 0 }));
    ensure!(strategy("1.25", &["updateStrategy.maxSurge=10%"])?["maxSurge"] == "10%");
    ensure!(strategy("1.34", &["updateStrategy.maxSurge=0"])? == json!({ "maxUnavailable": 1 }));
    ensure!(strategy("1.24", &[])? == json!({ "maxUnavailable": 1 }));
    let objects = rendered(&[])?;
    let pod = &object(&objects, "DaemonSet", "skein")?["spec"]["template"]["spec"];
    for container in pod["containers"].as_array().context("no containers")? {
        let arguments = container["args"].as_array().context("no arguments")?;
        ensure!(arguments.contains(&json!("--instance=/run/instance/skein")), "{container:#}");
        ensure!(container["ports"].is_null(), "two pods cannot have the same ports of a node");
    }
    Ok(())
}

#[test]
fn pods_are_replaced_when_the_configuration_changes() -> Result<()> {
    let sum = |settings: &[&str]| -> Result<Value> {
        let objects = rendered(settings)?;
        let template = &object(&objects, "DaemonSet", "skein")?["spec"]["template"];
        Ok(template["metadata"]["annotations"]["checksum/config"].clone())
    };
    let first = sum(&[])?;
    ensure!(first.as_str().is_some_and(|sum| sum.len() == 64), "{first}");
    ensure!(sum(&["lanes=2"])? != first, "lanes");
    ensure!(
        sum(&["cleanup.timeoutSeconds=9", "prometheus.rules.enabled=true"])? == first,
        "others"
    );
    Ok(())
}

/// Probes must not depend on ports or on /run/skein, which two pods of a node share.
#[test]
fn probes_ask_the_processes_of_their_own_pod() -> Result<()> {
    let objects = rendered(&["podCidr=10.244.0.0/16"])?;
    let spec = &object(&objects, "DaemonSet", "skein")?["spec"]["template"]["spec"];
    let volumes = spec["volumes"].as_array().context("no volumes")?;
    let own = volumes.iter().find(|volume| volume["name"] == "instance").context("no volume")?;
    ensure!(own["emptyDir"].is_object(), "{own}");
    let containers = spec["containers"].as_array().context("no containers")?;
    ensure!(containers.len() == 2, "{containers:?}");
    for container in containers {
        let name = &container["name"];
        let text = |value: &Value| value.to_string();
        let mounts = container["volumeMounts"].as_array().context("no mounts")?;
        let mount = mounts.iter().find(|mount| mount["name"] == "instance");
        let path = mount.and_then(|mount| mount["mountPath"].as_str()).context("no mount")?;
        let option = format!("--instance={path}/skein");
        ensure!(text(&container["args"]).contains(&option), "{name}: {}", container["args"]);
        ensure!(container["terminationMessagePolicy"] == "FallbackToLogsOnError", "{container}");
        for probe in ["startupProbe", "livenessProbe", "readinessProbe"] {
            let Some(probe) = container.get(probe) else { continue };
            ensure!(text(&probe["exec"]["command"]).contains(&option), "{name}: {probe}");
            ensure!(probe.get("httpGet").is_none(), "{name}: {probe}");
        }
        ensure!(container["livenessProbe"].is_object(), "{name} has no probe");
    }
    let ready = containers[0]["readinessProbe"]["exec"]["command"].to_string();
    ensure!(ready.contains("--ready"), "{ready}");
    Ok(())
}

#[test]
fn versions_agree() -> Result<()> {
    let about = programs::yaml(&fs::read_to_string(chart::path().join("Chart.yaml"))?)?.remove(0);
    ensure!(about["version"] == env!("CARGO_PKG_VERSION"), "{about}");
    ensure!(about["appVersion"] == env!("CARGO_PKG_VERSION"), "{about}");
    Ok(())
}

/// Names of metrics in a text, without what a histogram's series add.
fn metrics(text: &str) -> BTreeSet<&str> {
    let word = |c: char| !(c.is_ascii_alphanumeric() || c == '_');
    let names = text.split(word).filter(|name| name.starts_with("skein_"));
    let base = |name| {
        let mut suffixes = ["_bucket", "_sum", "_count"].into_iter();
        suffixes.find_map(|suffix| str::strip_suffix(name, suffix)).unwrap_or(name)
    };
    names.map(base).collect()
}

/// docs/metrics.md is what the code has, by a test of the agent's.
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
        ensure!(used.len() > 10, "only {used:?}");
        let unknown: Vec<_> = used.difference(&known).collect();
        ensure!(unknown.is_empty(), "no such metrics: {unknown:?}");
    }
    Ok(())
}

/// As Grafana takes them, and as people can read them.
#[test]
fn dashboards_are_complete() -> Result<()> {
    let all = chart::dashboards()?;
    ensure!(all.len() == 2, "{} dashboards", all.len());
    let mut identities = BTreeSet::new();
    for dashboard in &all {
        let board = &dashboard.0;
        let uid = board["uid"].as_str().context("no uid")?;
        ensure!(identities.insert(uid.to_owned()), "{uid} is there twice");
        ensure!(board["schemaVersion"].as_u64() >= Some(36), "{uid}: schemaVersion");
        let source = &board["templating"]["list"][0];
        ensure!(source["type"] == "datasource" && source["query"] == "prometheus", "{source}");
        let panels = board["panels"].as_array().context("no panels")?;
        let (mut ids, mut places) = (BTreeSet::new(), BTreeSet::new());
        for panel in panels {
            let title = panel["title"].as_str().unwrap_or_default();
            ensure!(!title.is_empty() && ids.insert(panel["id"].as_u64()), "{uid}: {panel}");
            let at = &panel["gridPos"];
            ensure!(places.insert((at["y"].as_u64(), at["x"].as_u64())), "{title}: on another");
            let width = at["x"].as_u64().zip(at["w"].as_u64()).map(|(x, w)| x + w);
            ensure!(width.is_some_and(|width| width <= 24), "{title}: {at}");
            if panel["type"] == "row" {
                ensure!(title.ends_with('?'), "{uid}: {title:?} is no question");
                continue;
            }
            let defaults = &panel["fieldConfig"]["defaults"];
            ensure!(
                defaults["unit"].as_str().is_some_and(|unit| !unit.is_empty()),
                "{title}: unit"
            );
            let about = panel["description"].as_str().unwrap_or_default();
            ensure!(about.len() > 10, "{title}: no description");
            ensure!(panel["datasource"]["uid"] == "${datasource}", "{title}: data source");
            ensure!(panel["targets"].as_array().is_some_and(|all| !all.is_empty()), "{title}");
        }
    }
    Ok(())
}

/// What e2e/tests/observability/alerts.yaml says of each alert, by promtool.
#[test]
fn alerts_fire_when_they_should_and_not_otherwise() -> Result<()> {
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
        ensure!(of_it().any(|case| fires(&case)), "{name}: no test in which it fires");
        ensure!(of_it().any(|case| !fires(&case)), "{name}: no test in which it does not");
    }
    Ok(())
}

#[test]
fn every_alert_has_its_runbook() -> Result<()> {
    let runbooks = fs::read_to_string(workspace().join("docs/runbooks.md"))?;
    let manifest = fs::read_to_string(workspace().join("Cargo.toml"))?;
    let manifest: toml::Table = manifest.parse()?;
    let repository = manifest["workspace"]["package"]["repository"].as_str().context("none")?;
    let mut names = BTreeSet::new();
    for alert in chart::alerts()? {
        let name = alert["alert"].as_str().context("no name")?.to_owned();
        let anchor = name.to_lowercase();
        let url = format!("{repository}/blob/main/docs/runbooks.md#{anchor}");
        ensure!(alert["annotations"]["runbook_url"] == url, "{name}: {}", alert["annotations"]);
        for text in ["summary", "description"] {
            ensure!(alert["annotations"][text].is_string(), "{name} has no {text}");
        }
        let section =
            runbooks.split(&format!("\n## {name}\n")).nth(1).with_context(|| name.clone())?;
        let section = section.split("\n## ").next().unwrap_or_default();
        for part in
            ["**Meaning.**", "**Impact.**", "**Diagnosis.**", "```console", "**Mitigation.**"]
        {
            ensure!(section.contains(part), "{name}: no {part}");
        }
        names.insert(name);
    }
    let sections = runbooks.lines().filter_map(|line| line.strip_prefix("## "));
    let others: Vec<_> = sections.filter(|name| !names.contains(*name)).collect();
    ensure!(others.is_empty(), "sections of no alert: {others:?}");
    Ok(())
}
