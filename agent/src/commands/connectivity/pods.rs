//! Kubernetes objects of the test: their creation and their interpretation, without requests.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use flate2::Compression;
use flate2::read::{GzDecoder, GzEncoder};
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::ObjectMeta;
use serde_json::{Value, json};
use skein_core::address;

use super::matrix::Target;
use crate::control::kubernetes::resource::SkeinNode;
use crate::control::records::first_host;

/// Label of all pods of the test. The value identifies the run.
pub(super) const LABEL: &str = "skein.network/connectivity-test";
/// Mount point of the list of targets in a probing pod.
const TARGETS_DIRECTORY: &str = "/targets";
/// File name of the list of targets.
const TARGETS_FILE: &str = "targets.gz";

/// Properties of all pods of one run.
#[derive(Debug)]
pub(super) struct Template {
    pub(super) run: String,
    pub(super) image: String,
    pub(super) pull: Option<String>,
    /// Maximum run time, after which a pod ends even if the command was killed.
    pub(super) lifetime: Duration,
}

impl Template {
    pub(super) fn name(&self, kind: &str, index: usize) -> String {
        format!("skein-connectivity-{}-{kind}-{index}", self.run)
    }

    /// Returns a pod on `node` that answers probes on `port`.
    pub(super) fn answering_pod(
        &self,
        index: usize,
        node: &str,
        port: u16,
    ) -> serde_json::Result<Pod> {
        let arguments = json!(["probe", "--answer", port.to_string()]);
        self.pod(&self.name("answer", index), node, false, arguments, None)
    }

    /// Returns a pod that probes all targets within `time`, in the pod network or, with `host`, in
    /// the network of the node.
    pub(super) fn probing_pod(
        &self,
        name: &str,
        node: &str,
        host: bool,
        time: Duration,
    ) -> serde_json::Result<Pod> {
        let time = time.as_secs_f64().to_string();
        let file = format!("{TARGETS_DIRECTORY}/{TARGETS_FILE}");
        let arguments = json!(["probe", "--timeout", time, "--targets", file]);
        self.pod(name, node, host, arguments, Some(&self.run))
    }

    fn pod(
        &self,
        name: &str,
        node: &str,
        host: bool,
        arguments: Value,
        targets: Option<&str>,
    ) -> serde_json::Result<Pod> {
        // ICMP probes need CAP_NET_RAW.
        let capabilities = Vec::from_iter(targets.map(|_| "NET_RAW"));
        let volume = targets
            .map(|run| json!({ "name": "targets", "configMap": { "name": targets_name(run) } }));
        let mount =
            volume.as_ref().map(|_| json!({ "name": "targets", "mountPath": TARGETS_DIRECTORY }));
        serde_json::from_value(json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": { "name": name, "labels": { LABEL: self.run } },
            "spec": {
                "nodeName": node,
                "hostNetwork": host,
                "restartPolicy": "Never",
                "terminationGracePeriodSeconds": 0,
                "automountServiceAccountToken": false,
                "activeDeadlineSeconds": self.lifetime.as_secs(),
                "tolerations": [{ "operator": "Exists" }],
                "volumes": Vec::from_iter(volume),
                "containers": [{
                    "name": "probe",
                    "image": self.image,
                    "imagePullPolicy": self.pull,
                    "command": ["/usr/bin/skein-agent"],
                    "args": arguments,
                    "volumeMounts": Vec::from_iter(mount),
                    "securityContext": {
                        "allowPrivilegeEscalation": false,
                        "readOnlyRootFilesystem": true,
                        "capabilities": { "drop": ["ALL"], "add": capabilities },
                    },
                }],
            },
        }))
    }

    /// Returns the ConfigMap with the list of targets, which is too long for a command line.
    /// Kubernetes removes the ConfigMap together with `owner`, a pod of the run.
    pub(super) fn targets(&self, targets: &[Target], owner: &Pod) -> io::Result<ConfigMap> {
        let owner = OwnerReference {
            api_version: "v1".to_owned(),
            kind: "Pod".to_owned(),
            name: owner.metadata.name.clone().unwrap_or_default(),
            uid: owner.metadata.uid.clone().unwrap_or_default(),
            ..OwnerReference::default()
        };
        Ok(ConfigMap {
            metadata: ObjectMeta {
                name: Some(targets_name(&self.run)),
                owner_references: Some(vec![owner]),
                ..ObjectMeta::default()
            },
            binary_data: Some(BTreeMap::from([(
                TARGETS_FILE.to_owned(),
                ByteString(pack(targets)?),
            )])),
            ..ConfigMap::default()
        })
    }
}

fn targets_name(run: &str) -> String {
    format!("skein-connectivity-{run}")
}

fn pack(targets: &[Target]) -> io::Result<Vec<u8>> {
    let text = serde_json::to_vec(targets)?;
    let mut packed = Vec::new();
    GzEncoder::new(&text[..], Compression::default()).read_to_end(&mut packed)?;
    Ok(packed)
}

/// Reads a list of targets that [`pack`] wrote.
pub(super) fn unpack(packed: impl Read) -> io::Result<Vec<Target>> {
    let mut text = Vec::new();
    GzDecoder::new(packed).read_to_end(&mut text)?;
    Ok(serde_json::from_slice(&text)?)
}

pub(super) fn phase(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or("Unknown")
}

/// Returns whether all containers of a pod have terminated.
pub(super) fn has_ended(pod: &Pod) -> bool {
    matches!(phase(pod), "Succeeded" | "Failed")
}

/// Describes why a pod does not run or has failed.
pub(super) fn failure_reason(pod: &Pod) -> String {
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    let status = pod.status.as_ref();
    let containers = status.and_then(|status| status.container_statuses.as_ref());
    let states = || containers.into_iter().flatten().filter_map(|one| one.state.as_ref());
    let waiting = || {
        let waiting = states().find_map(|state| state.waiting.as_ref())?;
        joined(&waiting.reason, &waiting.message)
    };
    let terminated = || {
        let terminated = states().find_map(|state| state.terminated.as_ref())?;
        let code = format!("exit code {}", terminated.exit_code);
        joined(&terminated.reason, &terminated.message)
            .map(|why| format!("{why}, {code}"))
            .or(Some(code))
    };
    let whole = || status.and_then(|status| joined(&status.reason, &status.message));
    let conditions = status.and_then(|status| status.conditions.as_ref());
    let condition = || conditions.into_iter().flatten().find_map(|one| one.message.clone());
    match waiting().or_else(whole).or_else(terminated).or_else(condition) {
        Some(why) => format!("{name} is {}: {why}", phase(pod)),
        None => format!("{name} is {}", phase(pod)),
    }
}

fn joined(reason: &Option<String>, message: &Option<String>) -> Option<String> {
    let parts = [reason, message].into_iter().flatten().filter(|text| !text.is_empty());
    let parts: Vec<&str> = parts.map(String::as_str).collect();
    (!parts.is_empty()).then(|| parts.join(": "))
}

/// Describes why a pod failed: the last line of its log, if there is one, and the status of the
/// pod.
pub(super) fn failure_with_log(pod: &Pod, log: anyhow::Result<String>) -> String {
    let reason = failure_reason(pod);
    match log {
        Ok(log) => match log.lines().last() {
            Some(line) => format!("{line} ({reason})"),
            None => format!("{reason}; its log is empty"),
        },
        Err(error) => format!("{reason}; {error:#}"),
    }
}

/// Returns the addresses of a running pod, or the reason that it has none.
pub(super) fn addresses(pod: &Pod) -> anyhow::Result<Vec<IpAddr>> {
    if phase(pod) != "Running" {
        bail!(failure_reason(pod));
    }
    let ips = pod.status.as_ref().and_then(|status| status.pod_ips.as_ref());
    let ips = ips.into_iter().flatten().filter_map(|ip| address::parse(&ip.ip).ok());
    match Vec::from_iter(ips) {
        none if none.is_empty() => bail!("the pod has no address"),
        ips => Ok(ips),
    }
}

/// Returns the overlay addresses of a node, or the reason that it has none.
pub(super) fn own_addresses(node: Option<&SkeinNode>) -> anyhow::Result<Vec<IpAddr>> {
    let node = node.context("the node has no SkeinNode. Check that an agent runs on the node.")?;
    let cidrs = node.spec.pod_cidrs.iter().map(|cidr| match address::parse(cidr) {
        Ok(cidr) => Ok(first_host(&cidr)),
        Err(error) => Err(anyhow!("podCIDRs of its SkeinNode: {cidr}: {error}")),
    });
    cidrs.collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// Maximum size of a ConfigMap in bytes (API server).
    const MAX_CONFIG_MAP: usize = 1 << 20;

    #[test]
    fn targets_of_5000_dual_stack_nodes_fit_config_map() {
        let node = |n: u32| {
            let name = format!("ip-10-{}-{}.eu-central-1.compute.internal", n >> 8, n & 255);
            let v4 = |host: u32| IpAddr::from(((10 << 24) | (n << 8) | host).to_be_bytes());
            let v6 = |host| IpAddr::from([0xfd00, 0x10, 0x244, n as u16, 0, 0, 0, host]);
            // Pods have random addresses of their node's range.
            let (a, b) = (n.wrapping_mul(2_654_435_761), n.wrapping_mul(40_503));
            let target = move |kind: &str, address, port| Target {
                name: format!("{kind}@{name}"),
                address,
                port,
            };
            [
                target("pod", v4(a >> 24), Some(8080)),
                target("pod", v6(b as u16), Some(8080)),
                target("node", v4(1), None),
                target("node", v6(1), None),
            ]
        };
        let targets: Vec<Target> = (0..5_000).flat_map(node).collect();
        let packed = pack(&targets).unwrap();
        assert!(packed.len() < MAX_CONFIG_MAP / 2, "{} bytes", packed.len());
        assert_eq!(unpack(&packed[..]).unwrap(), targets);
    }

    fn pod(status: Value) -> Pod {
        let pod = json!({ "metadata": { "name": "p" }, "spec": null, "status": status });
        serde_json::from_value(pod).unwrap()
    }

    fn container(state: Value) -> Value {
        json!([{
            "name": "probe", "ready": false, "restartCount": 0, "image": "", "imageID": "",
            "state": state,
        }])
    }

    #[test]
    fn pod_without_address_has_reason() {
        let why = |status: Value| addresses(&pod(status)).unwrap_err().to_string();
        let waiting = container(json!({ "waiting": { "reason": "ImagePullBackOff" } }));
        assert_eq!(
            why(json!({ "phase": "Pending", "containerStatuses": waiting })),
            "p is Pending: ImagePullBackOff"
        );
        assert_eq!(why(json!({})), "p is Unknown");
        assert_eq!(why(json!({ "phase": "Running" })), "the pod has no address");
        let ips = json!([{ "ip": "10.1.0.2" }, { "ip": "fd00::2" }]);
        let pod = pod(json!({ "phase": "Running", "podIPs": ips }));
        assert_eq!(addresses(&pod).unwrap().len(), 2);
    }

    #[test]
    fn failed_pod_has_reason_without_log() {
        let evicted = pod(json!({
            "phase": "Failed", "reason": "Evicted", "message": "the node was low on memory",
            "containerStatuses": container(json!({ "terminated": { "exitCode": 137 } })),
        }));
        assert_eq!(
            failure_with_log(&evicted, Err(anyhow!("no log"))),
            "p is Failed: Evicted: the node was low on memory; no log"
        );
        let failed = pod(json!({
            "phase": "Failed",
            "containerStatuses": container(json!({ "terminated": { "reason": "Error", "exitCode": 2 } })),
            "conditions": [{ "type": "Ready", "status": "False", "message": "not ready" }],
        }));
        let why = "p is Failed: Error, exit code 2";
        assert_eq!(
            failure_with_log(&failed, Ok(String::new())),
            format!("{why}; its log is empty")
        );
        assert_eq!(failure_with_log(&failed, Ok("a\nb\n".to_owned())), format!("b ({why})"));
    }

    #[test]
    fn only_probing_pods_have_net_raw() {
        let template = Template {
            run: "r".to_owned(),
            image: "i".to_owned(),
            pull: None,
            lifetime: Duration::from_secs(1),
        };
        let added = |pod: Pod| {
            json!(pod)["spec"]["containers"][0]["securityContext"]["capabilities"]["add"].clone()
        };
        assert_eq!(added(template.answering_pod(0, "n", 1).unwrap()), json!([]));
        let probes = template.probing_pod("p", "n", true, Duration::from_secs(1)).unwrap();
        assert_eq!(added(probes), json!(["NET_RAW"]));
    }
}
