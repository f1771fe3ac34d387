//! Command lines and settings of Kubernetes' programs, as an administrator of physical machines
//! would write them without kubeadm.

use serde_json::{Value, json};

use super::machine::{v4, v6};
use super::pki::Pki;
use super::programs::BUSYBOX;

/// Directory of the files of a node's daemons, on the node.
pub(super) const NODE_FILES: &str = "/etc/kubernetes";

/// Endpoint of containerd's CRI socket.
const RUNTIME: &str = "unix:///run/containerd/containerd.sock";
/// Directory of kubelet's volume plugins. The default directory is on the host's disk.
const VOLUME_PLUGINS: &str = "/var/lib/kubelet/volume-plugins";

/// Address ranges and version of a cluster, which all daemons must share.
#[derive(Debug, Clone)]
pub(super) struct Ranges {
    /// Prefixes of pods, one per address family, separated by commas.
    pub(super) pods: &'static str,
    /// Prefixes of Services, one per address family, separated by commas.
    pub(super) services: &'static str,
    /// Service address of the API server, the first address of `services`.
    pub(super) api: &'static str,
    /// Pods and Services have an address of each family.
    pub(super) dual_stack: bool,
    /// The version is 1.31 or later instead of 1.20.
    pub(super) is_1_31_or_later: bool,
}

impl Ranges {
    pub(super) fn new(dual_stack: bool, is_1_31_or_later: bool) -> Self {
        match dual_stack {
            false => Self {
                pods: "10.244.0.0/16",
                services: "10.96.0.0/16",
                api: "10.96.0.1",
                dual_stack,
                is_1_31_or_later,
            },
            true => Self {
                pods: "10.244.0.0/16,fd00:10:244::/56",
                services: "10.96.0.0/16,fd00:10:96::/112",
                api: "10.96.0.1",
                dual_stack,
                is_1_31_or_later,
            },
        }
    }

    /// Returns the feature gate of dual stack, which is an alpha feature in Kubernetes 1.20.
    fn gates(&self) -> Option<String> {
        (self.dual_stack && !self.is_1_31_or_later)
            .then(|| "--feature-gates=IPv6DualStack=true".to_owned())
    }

    /// Returns the value of kubelet's option `--node-ip`.
    pub(super) fn node_ip(&self, number: u8) -> String {
        match self.dual_stack {
            false => v4(number).to_string(),
            true => format!("{},{}", v4(number), v6(number)),
        }
    }
}

/// Collects the words of a command line.
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
        // The data need not survive a crash of the host.
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
        // Tests wait until a lost node is detected: 20 s instead of 40 s.
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
    if !ranges.is_1_31_or_later {
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

/// Returns the kubelet's configuration file.
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
        // The kernel may refuse a value below that of the process that starts the kubelet.
        "oomScoreAdj": 0,
        "maxOpenFiles": 20000,
        // Imported images cannot be pulled again, so they are never removed.
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        // The disk belongs to the host, so it must not cause evictions on this node.
        "evictionHard": {
            "memory.available": "100Mi", "nodefs.available": "1%", "nodefs.inodesFree": "1%",
            "imagefs.available": "1%",
        },
        "nodeStatusUpdateFrequency": "4s",
        "serializeImagePulls": false,
    });
    if ranges.is_1_31_or_later {
        settings["containerRuntimeEndpoint"] = json!(RUNTIME);
        settings["volumePluginDir"] = json!(VOLUME_PLUGINS);
        // The machines have cgroup version 1.
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
        // These would change settings of the whole host; 0 leaves them as they are.
        "--conntrack-max-per-core=0".to_owned(),
        "--conntrack-min=0".to_owned(),
        "--oom-score-adj=0".to_owned(),
    ]);
    all.extend(ranges.gates());
    all
}
