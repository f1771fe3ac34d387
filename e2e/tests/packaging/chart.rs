//! Tests of the Helm chart. Kubernetes' schemas and the agent accept the rendered objects. The
//! chart refuses wrong values with a message. The descriptions of the values match the chart.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use skein_lab::agent::binary;
use skein_lab::chart::{self, helm, object, render, rendered};
use skein_lab::{process, programs, skein_image};

/// Sets of values, each for one rendering of the chart. Together the sets change every value of the
/// chart.
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
            "policy.mode=audit",
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
const PROGRAM_TIMEOUT: Duration = Duration::from_secs(120);

#[test]
fn helm_lint_has_no_warning() -> Result<()> {
    for (name, settings) in VARIANTS {
        let linted = helm(&["lint", "--strict", &chart::path().to_string_lossy()], settings)?;
        ensure!(linted.code == 0, "{name}: helm lint failed: {}{}", linted.stdout, linted.stderr);
        let warns = linted.stdout.contains("WARNING");
        ensure!(!warns, "{name}: helm lint has a warning: {}", linted.stdout);
    }
    Ok(())
}

#[test]
fn every_version_of_kubernetes_accepts_the_objects() -> Result<()> {
    let directory = tempfile::tempdir()?;
    for version in VERSIONS {
        let mut files = vec![];
        for (name, settings) in VARIANTS {
            let mut text = render(settings, version)?;
            // The Job skein-cleanup creates a DaemonSet from a ConfigMap. That DaemonSet is
            // checked like the objects that helm creates.
            let cleanup = programs::yaml(&text)?
                .into_iter()
                .find_map(|object| object["data"]["daemonset.yaml"].as_str().map(str::to_owned));
            let has_cleanup = cleanup.is_some();
            ensure!(
                has_cleanup == (name != "bare"),
                "{name}: The chart must render the cleanup DaemonSet in every set except \"bare\"; \
                 it is rendered: {has_cleanup}."
            );
            text.push_str(&cleanup.map(|text| format!("\n---\n{text}")).unwrap_or_default());
            let path = directory.path().join(format!("{name}-{version}.yaml"));
            fs::write(&path, text)?;
            files.push(path);
        }
        files.push(chart::path().join("crds/skeinnodes.yaml"));
        let mut validate =
            Command::new(programs::kubernetes_validate()?.join("kubernetes-validate"));
        validate.args(["--strict", "--kubernetes-version", version]).args(&files);
        let said = process::finish(&mut validate, &[], PROGRAM_TIMEOUT)?;
        let text = format!("{}{}", said.stdout, said.stderr);
        ensure!(said.code == 0, "The schemas of {version} refuse an object: {text}");
        // Unknown kinds pass with a warning. Only kinds of the Prometheus Operator may be unknown.
        let warned = text.lines().filter(|line| line.contains("WARN"));
        let warned: Vec<_> = warned.filter(|w| !w.contains("monitoring.coreos.com")).collect();
        ensure!(warned.is_empty(), "The validation with {version} has warnings: {warned:?}");
        let passed = text.lines().filter(|line| line.contains("passed")).count();
        ensure!(passed > 50, "{version}: Only {passed} objects were validated: {text}");
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
        let (kind, policy) = (&object["kind"], &pod["dnsPolicy"]);
        ensure!(*policy == "Default", "The DNS policy of {kind} is {policy}.");
    }
    Ok(())
}

/// Checks the arguments of the removal Job. By default the Job does not pass `--without-helm`, and
/// `skein-agent uninstall` refuses to remove a DaemonSet that no Helm release owns. The chart value
/// `cleanup.withoutHelm=true` adds the option.
#[test]
fn removal_job_needs_a_release_unless_told_otherwise() -> Result<()> {
    let job = |settings: &[&str]| -> Result<Value> {
        let objects = rendered(settings)?;
        let job = object(&objects, "Job", "skein-cleanup")?;
        let hook = &job["metadata"]["annotations"]["helm.sh/hook"];
        ensure!(*hook == "pre-delete", "The hook of the Job is {hook}.");
        Ok(job["spec"]["template"]["spec"]["containers"][0]["args"].clone())
    };
    let words = |arguments: &Value, word: &str| {
        arguments.as_array().is_some_and(|all| all.contains(&json!(word)))
    };
    let usual = job(&[])?;
    let needs_release = words(&usual, "--configmap=skein") && !words(&usual, "--without-helm");
    ensure!(needs_release, "The Job does not need a release: {usual}");
    let without = job(&["cleanup.withoutHelm=true"])?;
    ensure!(words(&without, "--without-helm"), "The Job needs a release: {without}");
    let objects = rendered(&[])?;
    let rules = object(&objects, "Role", "skein-cleanup")?["rules"].clone();
    let right = json!({
        "apiGroups": [""], "resources": ["configmaps"], "resourceNames": ["skein"],
        "verbs": ["get"],
    });
    let has_right = rules.as_array().is_some_and(|rules| rules.contains(&right));
    ensure!(has_right, "The role does not allow to read the ConfigMap: {rules:#}");
    // `--no-hooks`, for tools that do not know hooks, leaves out the objects of the removal hook
    // and no other object.
    let chart = chart::path().to_string_lossy().into_owned();
    let plain = helm(&["template", "skein", &chart, "--no-hooks", "--include-crds"], &[])?;
    ensure!(plain.code == 0, "helm template failed: {}", plain.stderr);
    let objects = programs::yaml(&plain.stdout)?;
    object(&objects, "DaemonSet", "skein")?;
    object(&objects, "CustomResourceDefinition", "skeinnodes.skein.network")?;
    let hooks = objects.iter().filter(|o| o["metadata"]["name"] == "skein-cleanup").count();
    ensure!(hooks == 0, "{hooks} objects of the hook are rendered with --no-hooks.");
    Ok(())
}

/// The custom resource definition is generated from types in the agent's code.
#[test]
fn definition_equals_output_of_the_agent() -> Result<()> {
    let printed = process::run(Command::new(binary()?).arg("crd"))?;
    let path = chart::path().join("crds/skeinnodes.yaml");
    let remedy = "Run `skein-agent crd > charts/skein/crds/skeinnodes.yaml`.";
    ensure!(fs::read_to_string(path)? == printed, "The chart has another definition. {remedy}");
    Ok(())
}

#[test]
fn pods_have_only_the_rights_that_they_need() -> Result<()> {
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
    let count = containers.len();
    ensure!(count == 2, "The pod has {count} containers instead of 2.");
    for (container, name, add) in [
        (&containers[0], "agent", json!(["NET_ADMIN", "SYS_ADMIN"])),
        (&containers[1], "dataplane", json!(["NET_ADMIN"])),
    ] {
        ensure!(container["name"] == name, "The container is not {name}: {container:#}");
        let context = &container["securityContext"];
        ensure!(*context == rights(add), "{name} has other rights: {context:#}");
        let image = &container["image"];
        ensure!(*image == skein_image::REFERENCE, "{name} has the image {image}.");
    }
    // The Job runs without a pod network, and needs only the API server.
    let job = &object(&objects, "Job", "skein-cleanup")?["spec"]["template"]["spec"];
    ensure!(job["hostNetwork"] == true, "The Job is not in the host network: {job:#}");
    let context = &job["containers"][0]["securityContext"];
    ensure!(
        context["runAsNonRoot"] == true && context["capabilities"] == json!({ "drop": ["ALL"] })
    );
    Ok(())
}

#[test]
fn agents_read_pods_only_for_network_policies() -> Result<()> {
    let readable = |settings: &[&str]| -> Result<BTreeSet<(String, String)>> {
        let rules = object(&rendered(settings)?, "ClusterRole", "skein")?["rules"].clone();
        let mut readable = BTreeSet::new();
        let words = |list: &Value| -> Vec<String> {
            let list = list.as_array().into_iter().flatten().filter_map(Value::as_str);
            list.map(str::to_owned).collect()
        };
        for rule in rules.as_array().context("no rules")? {
            let verbs = words(&rule["verbs"]);
            ensure!(!verbs.iter().any(|verb| verb == "*"), "A rule allows all verbs: {rule:#}");
            if verbs == ["list", "watch"] {
                for group in words(&rule["apiGroups"]) {
                    let resources = words(&rule["resources"]).into_iter();
                    readable.extend(resources.map(|resource| (group.clone(), resource)));
                }
            }
        }
        Ok(readable)
    };
    ensure!(readable(&[])?.is_empty(), "The right to read pods is wider than needed.");
    let expected = [
        ("", "namespaces"),
        ("", "pods"),
        ("networking.k8s.io", "networkpolicies"),
        ("policy.networking.k8s.io", "clusternetworkpolicies"),
    ];
    let expected = expected.map(|(group, resource)| (group.to_owned(), resource.to_owned()));
    for mode in ["audit", "enforce"] {
        let rights = readable(&[&format!("policy.mode={mode}")])?;
        ensure!(
            rights == BTreeSet::from(expected.clone()),
            "{mode} gives other rights: {rights:?}"
        );
    }
    Ok(())
}

#[test]
fn new_pod_starts_before_the_old_one_ends_if_supported() -> Result<()> {
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
        let has_instance = arguments.contains(&json!("--instance=/run/instance/skein"));
        ensure!(has_instance, "The container has no --instance: {container:#}");
        let ports = &container["ports"];
        ensure!(ports.is_null(), "A second pod on a node cannot have the same ports: {ports}");
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
    ensure!(first.as_str().is_some_and(|sum| sum.len() == 64), "{first} is not a SHA-256.");
    ensure!(sum(&["lanes=2"])? != first, "Another number of lanes does not replace the pods.");
    let others = sum(&["cleanup.timeoutSeconds=9", "prometheus.rules.enabled=true"])?;
    ensure!(others == first, "Values that the agents do not read replace the pods.");
    Ok(())
}

/// Probes must not depend on ports or on /run/skein, which two pods of a node share.
#[test]
fn probes_check_the_processes_of_their_own_pod() -> Result<()> {
    let objects = rendered(&["podCidr=10.244.0.0/16"])?;
    let spec = &object(&objects, "DaemonSet", "skein")?["spec"]["template"]["spec"];
    let volumes = spec["volumes"].as_array().context("no volumes")?;
    let own = volumes.iter().find(|volume| volume["name"] == "instance").context("no volume")?;
    ensure!(own["emptyDir"].is_object(), "The volume is not an emptyDir: {own}");
    let containers = spec["containers"].as_array().context("no containers")?;
    let count = containers.len();
    ensure!(count == 2, "The pod has {count} containers instead of 2.");
    for container in containers {
        let name = &container["name"];
        let text = |value: &Value| value.to_string();
        let mounts = container["volumeMounts"].as_array().context("no mounts")?;
        let mount = mounts.iter().find(|mount| mount["name"] == "instance");
        let path = mount.and_then(|mount| mount["mountPath"].as_str()).context("no mount")?;
        let option = format!("--instance={path}/skein");
        let arguments = text(&container["args"]);
        ensure!(arguments.contains(&option), "{name} lacks {option}: {arguments}");
        let policy = &container["terminationMessagePolicy"];
        ensure!(*policy == "FallbackToLogsOnError", "{name} has the message policy {policy}.");
        for probe in ["startupProbe", "livenessProbe", "readinessProbe"] {
            let Some(probe) = container.get(probe) else { continue };
            let is_own = text(&probe["exec"]["command"]).contains(&option);
            ensure!(is_own, "A probe of {name} lacks {option}: {probe}");
            ensure!(probe.get("httpGet").is_none(), "A probe of {name} uses a port: {probe}");
        }
        ensure!(container["livenessProbe"].is_object(), "{name} has no liveness probe.");
    }
    let ready = containers[0]["readinessProbe"]["exec"]["command"].to_string();
    ensure!(ready.contains("--ready"), "The readiness probe lacks --ready: {ready}");
    Ok(())
}

#[test]
fn chart_version_equals_crate_version() -> Result<()> {
    let about = programs::yaml(&fs::read_to_string(chart::path().join("Chart.yaml"))?)?.remove(0);
    for key in ["version", "appVersion"] {
        let (found, expected) = (&about[key], env!("CARGO_PKG_VERSION"));
        ensure!(*found == expected, "{key} of the chart is {found} instead of {expected}.");
    }
    Ok(())
}
