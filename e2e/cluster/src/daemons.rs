//! How the programs of Kubernetes are started: as an administrator would on machines of metal,
//! without kubeadm.

use serde_json::{Value, json};

use super::machine::{v4, v6};
use super::pki::Pki;
use super::programs::BUSYBOX;

/// Where every file of a node's daemons lies, on the node.
pub(super) const NODE_FILES: &str = "/etc/kubernetes";

/// Endpoint of containerd.
const RUNTIME: &str = "unix:///run/containerd/containerd.sock";
/// Directory of kubelet's volume plugins: the usual place is on the host's own disk.
const VOLUME_PLUGINS: &str = "/var/lib/kubelet/volume-plugins";

/// What all daemons must agree on.
#[derive(Debug, Clone)]
pub(super) struct Ranges {
    /// Addresses of pods, a range a family.
    pub(super) pods: &'static str,
    /// Addresses of Services.
    pub(super) services: &'static str,
    /// The first of them: the API server's.
    pub(super) api: &'static str,
    /// Two families.
    pub(super) dual_stack: bool,
    /// Kubernetes 1.31 or later instead of 1.20.
    pub(super) current: bool,
}

impl Ranges {
    pub(super) fn new(dual_stack: bool, current: bool) -> Self {
        match dual_stack {
            false => Self {
                pods: "10.244.0.0/16",
                services: "10.96.0.0/16",
                api: "10.96.0.1",
                dual_stack,
                current,
            },
            true => Self {
                pods: "10.244.0.0/16,fd00:10:244::/56",
                services: "10.96.0.0/16,fd00:10:96::/112",
                api: "10.96.0.1",
                dual_stack,
                current,
            },
        }
    }

    /// In Kubernetes 1.20 still an alpha feature.
    fn gates(&self) -> Option<String> {
        (self.dual_stack && !self.current).then(|| "--feature-gates=IPv6DualStack=true".to_owned())
    }

    /// What a node says of its addresses.
    pub(super) fn node_ip(&self, number: u8) -> String {
        match self.dual_stack {
            false => v4(number).to_string(),
            true => format!("{},{}", v4(number), v6(number)),
        }
    }
}

/// A command line.
fn words(words: impl IntoIterator<Item = impl Into<String>>) -> Vec<String> {
    words.into_iter().map(Into::into).collect()
}

pub(super) fn etcd(directory: &str) -> Vec<String> {
    words([
        "etcd".to_owned(),
        format!("--data-dir={directory}"),
        "--listen-client-urls=http://127.0.0.1:2379".to_owned(),
        "--advertise-client-urls=http://127.0.0.1:2379".to_owned(),
        "--listen-peer-urls=http://127.0.0.1:2380".to_owned(),
        // What a laboratory stores is to be fast, not durable.
        "--unsafe-no-fsync".to_owned(),
        "--logger=zap".to_owned(),
    ])
}

pub(super) fn api_server(pki: &Pki, ranges: &Ranges, number: u8) -> Vec<String> {
    let mut all = words([
        "kube-apiserver".to_owned(),
        "--etcd-servers=http://127.0.0.1:2379".to_owned(),
        format!("--advertise-address={}", v4(number)),
        "--allow-privileged=true".to_owned(),
        "--authorization-mode=Node,RBAC".to_owned(),
        "--enable-admission-plugins=NodeRestriction".to_owned(),
        format!("--service-cluster-ip-range={}", ranges.services),
        format!("--client-ca-file={}", pki.text("ca.crt")),
        format!("--tls-cert-file={}", pki.text("api-server.crt")),
        format!("--tls-private-key-file={}", pki.text("api-server.key")),
        format!("--kubelet-certificate-authority={}", pki.text("ca.crt")),
        format!("--kubelet-client-certificate={}", pki.text("api-server-client.crt")),
        format!("--kubelet-client-key={}", pki.text("api-server-client.key")),
        "--kubelet-preferred-address-types=InternalIP".to_owned(),
        "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
        format!("--service-account-key-file={}", pki.text("service-accounts.key")),
        format!("--service-account-signing-key-file={}", pki.text("service-accounts.key")),
        "--v=1".to_owned(),
    ]);
    all.extend(ranges.gates());
    all
}

pub(super) fn controller_manager(pki: &Pki, ranges: &Ranges) -> Vec<String> {
    let mut all = words([
        "kube-controller-manager".to_owned(),
        "--bind-address=127.0.0.1".to_owned(),
        "--leader-elect=false".to_owned(),
        "--allocate-node-cidrs=true".to_owned(),
        format!("--cluster-cidr={}", ranges.pods),
        format!("--service-cluster-ip-range={}", ranges.services),
        format!("--root-ca-file={}", pki.text("ca.crt")),
        format!("--service-account-private-key-file={}", pki.text("service-accounts.key")),
        "--use-service-account-credentials=true".to_owned(),
        // A lost node is to be noticed while a test waits.
        "--node-monitor-period=2s".to_owned(),
        "--node-monitor-grace-period=20s".to_owned(),
    ]);
    all.extend(kubeconfigs(pki, "controller-manager"));
    all.extend(ranges.gates());
    all
}

pub(super) fn scheduler(pki: &Pki) -> Vec<String> {
    let own = ["kube-scheduler", "--bind-address=127.0.0.1", "--leader-elect=false"];
    words(own).into_iter().chain(kubeconfigs(pki, "scheduler")).collect()
}

fn kubeconfigs(pki: &Pki, name: &str) -> [String; 3] {
    let path = pki.text(&format!("{name}.kubeconfig"));
    ["", "authentication-", "authorization-"].map(|kind| format!("--{kind}kubeconfig={path}"))
}

pub(super) fn containerd() -> Vec<String> {
    words(["containerd".to_owned(), format!("--config={NODE_FILES}/containerd.toml")])
}

pub(super) fn kubelet(node: &str, ranges: &Ranges, number: u8) -> Vec<String> {
    let mut all = words([
        "kubelet".to_owned(),
        format!("--config={NODE_FILES}/kubelet.json"),
        format!("--kubeconfig={NODE_FILES}/kubelet.kubeconfig"),
        format!("--hostname-override={node}"),
        format!("--node-ip={}", ranges.node_ip(number)),
        "--v=2".to_owned(),
    ]);
    if !ranges.current {
        all.extend(words([
            "--container-runtime=remote".to_owned(),
            format!("--container-runtime-endpoint={RUNTIME}"),
            format!("--pod-infra-container-image={BUSYBOX}"),
            format!("--volume-plugin-dir={VOLUME_PLUGINS}"),
        ]));
    }
    all.extend(ranges.gates());
    all
}

/// The kubelet's file of settings.
pub(super) fn kubelet_settings(ranges: &Ranges) -> Value {
    let mut settings = json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": { "enabled": false },
            "webhook": { "enabled": true },
            "x509": { "clientCAFile": format!("{NODE_FILES}/ca.crt") },
        },
        "authorization": { "mode": "Webhook" },
        "tlsCertFile": format!("{NODE_FILES}/kubelet.crt"),
        "tlsPrivateKeyFile": format!("{NODE_FILES}/kubelet.key"),
        "cgroupDriver": "cgroupfs",
        "clusterDomain": "cluster.local",
        "resolvConf": "/etc/resolv.conf",
        "failSwapOn": false,
        // It may not lower that of a process of the host's.
        "oomScoreAdj": 0,
        "maxOpenFiles": 20000,
        // What was imported cannot be pulled again.
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        // The disk is the host's: how full it is says nothing about this node.
        "evictionHard": {
            "memory.available": "100Mi", "nodefs.available": "1%", "nodefs.inodesFree": "1%",
            "imagefs.available": "1%",
        },
        "nodeStatusUpdateFrequency": "4s",
        "serializeImagePulls": false,
    });
    if ranges.current {
        settings["containerRuntimeEndpoint"] = json!(RUNTIME);
        settings["volumePluginDir"] = json!(VOLUME_PLUGINS);
        // The machines have cgroups of version 1.
        settings["failCgroupV1"] = json!(false);
        settings["mergeDefaultEvictionSettings"] = json!(false);
    }
    settings
}

pub(super) fn proxy(pki: &Pki, node: &str, ranges: &Ranges) -> Vec<String> {
    let mut all = words([
        "kube-proxy".to_owned(),
        format!("--kubeconfig={}", pki.text("proxy.kubeconfig")),
        format!("--hostname-override={node}"),
        format!("--cluster-cidr={}", ranges.pods),
        "--proxy-mode=iptables".to_owned(),
        // These are settings of the whole host.
        "--conntrack-max-per-core=0".to_owned(),
        "--conntrack-min=0".to_owned(),
        "--oom-score-adj=0".to_owned(),
    ]);
    all.extend(ranges.gates());
    all
}
