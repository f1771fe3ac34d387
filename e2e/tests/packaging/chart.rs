//! Helm chart: Kubernetes' schemas and the agent accept the rendered objects, wrong values are
//! refused with a message, and the descriptions are true.

use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use skein_lab::agent::binary;
use skein_lab::chart::{self, helm, object, render, rendered};
use skein_lab::{process, programs, skein_image};

/// Sets of values that can be combined and together change every value.
pub(super) const VARIANTS: [(&str, &[&str]); 6] = [
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

/// Versions of Kubernetes whose schemas are used.
const VERSIONS: [&str; 4] = ["1.25", "1.28", "1.31", "1.34"];

/// Maximum time of one program.
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
            // The object that the Job creates is checked like those that helm creates.
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
        // Unknown kinds pass with a warning. Only kinds of the Prometheus Operator may be unknown.
        let warned = text.lines().filter(|line| line.contains("WARN"));
        let warned: Vec<_> = warned.filter(|w| !w.contains("monitoring.coreos.com")).collect();
        ensure!(warned.is_empty(), "{version}: {warned:?}");
        let passed = text.lines().filter(|line| line.contains("passed")).count();
        ensure!(passed > 50, "{version}: only {passed} objects were looked at: {text}");
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

/// Checks that the removal Job does not remove a DaemonSet without a release, because `skein-agent
/// uninstall` refuses to.
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
    // If another tool than helm renders the chart, only the hook is missing.
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

/// The custom resource definition is generated from types in the agent's code.
#[test]
fn the_definition_is_what_the_agent_prints() -> Result<()> {
    let printed = process::run(Command::new(binary()?).arg("crd"))?;
    let path = chart::path().join("crds/skeinnodes.yaml");
    let how = "write it anew: skein-agent crd > charts/skein/crds/skeinnodes.yaml";
    ensure!(fs::read_to_string(path)? == printed, "the chart has another definition; {how}");
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
    // The Job runs without a pod network, and needs only the API server.
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
