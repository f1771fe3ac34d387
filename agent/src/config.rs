//! The agent's configuration: a TOML file, parsed and validated once into one [`Config`], which is
//! logged at start. It holds paths of secrets, never secrets.

mod cidr;
mod cni;
mod file;
mod kubernetes;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use skein_cni_protocol::excerpt::{excerpt, message_excerpt};
use skein_ipc::{CipherChoice, OffloadSettings, UnderlaySettings};
use skein_netlink::interface::ALIAS_PREFIX;

pub use self::cidr::{check_disjoint, check_inside, check_outside, check_pod_cidr, overlap};
pub(crate) use self::cni::DEFAULT_INTERFACE;
use crate::failure::Failure;
use crate::logging::Log;

/// Where the configuration lies if the command line does not say.
pub const DEFAULT_PATH: &str = "/etc/skein/agent.toml";

/// The node's private key in its state directory.
pub const KEY: &str = "node.key";

/// The UDP port of Skein, where a record or the configuration names none.
pub const DEFAULT_PORT: u16 = 51900;

/// Everything that the agent was told, validated.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Config {
    /// Name of this node.
    pub name: String,
    /// Nodes of different clusters never join.
    pub cluster_id: String,
    /// Key, last good records, lock.
    pub state_dir: PathBuf,
    /// The private key's file, where it is not in the state directory.
    pub private_key_file: Option<PathBuf>,
    /// When and how the key is changed.
    pub key_rotation: KeyRotation,
    /// File or directory of node records.
    pub nodes: PathBuf,
    /// What this node owns; `None`: what its own record says.
    pub pod_cidrs: Option<Vec<IpNet>>,
    /// What the pod CIDRs of every node lie in; empty: anywhere.
    pub cluster_cidrs: Vec<IpNet>,
    /// The TUN device.
    pub interface: Interface,
    /// The UDP side.
    pub underlay: UnderlaySettings,
    /// The data process.
    pub dataplane: Dataplane,
    /// Which rungs of the ladder may be used.
    pub offload: OffloadSettings,
    /// Prometheus metrics, health, readiness.
    pub metrics: Metrics,
    /// The status page.
    pub status_page: StatusPage,
    /// The status socket.
    pub control: Control,
    /// Pods.
    pub cni: Cni,
    /// Protections of the pod network by nftables.
    pub firewall: Firewall,
    /// The Kubernetes API.
    pub kubernetes: Kubernetes,
    /// Logging.
    pub log: Log,
    /// Defaults that this host cannot have, one sentence each, for the log and the status.
    pub notes: Vec<String>,
}

/// When and how this node's key is changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct KeyRotation {
    /// The age at which it is changed; `None`: when somebody asks for it.
    pub every: Option<Duration>,
    /// How long the other nodes are given to read this node's record before the next step.
    pub settle: Duration,
}

/// The TUN device and what comes with it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Interface {
    /// Interface name, at most 15 bytes.
    pub name: String,
    /// MTU in bytes; `None`: the underlay's less the overhead.
    pub mtu: Option<u16>,
    /// Packets that may wait in each of the TUN's queues.
    pub txqueuelen: u32,
    /// Addresses of the node on the interface; `None`: the first of each of its pod CIDRs.
    pub addresses: Option<Vec<IpAddr>>,
    /// Whether to switch on forwarding of IPv4 and IPv6 in this network namespace.
    pub forwarding: bool,
    /// True if pod prefixes get unreachable routes, so that packets without a better route are
    /// refused.
    pub unreachable_routes: bool,
}

/// The data process.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Dataplane {
    /// Who starts it.
    pub mode: Mode,
    /// The unix socket that it listens on.
    pub socket: PathBuf,
    /// Number of lanes, 1 to 64.
    pub lanes: u8,
    /// Which AEAD to offer.
    pub cipher: CipherChoice,
    /// Whether small packets may share a datagram.
    pub bundling: bool,
    /// For how many microseconds a lane polls before it sleeps, 0 to 1000; `None`: 50, or 0 under a
    /// CPU quota.
    pub busy_poll_us: Option<u32>,
    /// Whether it goes on when the control process is told to end.
    pub keep_on_exit: bool,
    /// Whether it is confined to the system calls and files that it needs, where the control process starts it.
    pub seccomp: bool,
    /// Whether a data process that seccomp and Landlock do not confine is refused.
    pub require_confinement: bool,
}

/// Who starts the data process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// The control process, as its child.
    #[default]
    Spawn,
    /// Somebody else: a second container, a service manager.
    External,
}

/// Metrics, health and readiness over HTTP.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Metrics {
    /// Where to listen; `None`: nowhere.
    pub listen: Option<SocketAddr>,
    /// Whether to have series for each peer.
    pub per_peer: bool,
    /// Host names that `/metrics` accepts, in addition to IP addresses, `localhost` and the node's
    /// name.
    pub hosts: Vec<String>,
}

/// The status page over HTTP.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StatusPage {
    /// Where to listen; `None`: nowhere.
    pub listen: Option<SocketAddr>,
}

/// The status socket.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Control {
    /// Its path.
    pub socket: PathBuf,
}

/// Pods: what the agent does for the CNI plugin.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Cni {
    /// Whether pods are attached at all.
    pub enabled: bool,
    /// The unix socket that the plugin asks on.
    pub socket: PathBuf,
    /// Where the plugin leaves a DEL that the agent could not take.
    pub spool: PathBuf,
    /// Where to install the plugin; `None`: nowhere.
    pub bin_dir: Option<PathBuf>,
    /// Where else the runtime looks for plugins.
    pub plugin_dirs: Vec<PathBuf>,
    /// Where to write the network configuration; `None`: nowhere.
    pub conf_dir: Option<PathBuf>,
    /// Name of that file.
    pub conf_file: String,
    /// The plugin's binary that is installed; `None`: `skein-cni` beside the agent's own.
    pub plugin: Option<PathBuf>,
    /// Name of the network.
    pub network: String,
    /// Whether other networks' configurations are set aside.
    pub exclusive: bool,
    /// Plugins that come after Skein's in the chain.
    pub chain: Vec<serde_json::Value>,
    /// Whether others' chains that drop what they have no rule for get a rule for pods.
    pub forward_accept: bool,
    /// Whether pods reach the outside by the node's address.
    pub masquerade: bool,
    /// Destinations beside the cluster's pod CIDRs for which a pod keeps its own address.
    pub no_masquerade: Vec<IpNet>,
    /// Name of the nftables table.
    pub table: String,
}

/// Protections of the pod network by nftables, with or without the CNI plugin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Firewall {
    /// Drop packets that have a pod's source and arrive by an interface that is not the pod's.
    pub drop_spoofed: bool,
    /// Drop packets to pods that would leave the node outside the tunnel.
    pub drop_cleartext: bool,
    /// Drop packets that other machines route to pods through this node.
    pub drop_transit: bool,
    /// Masquerade packets that enter the overlay with a source outside the node's pod CIDRs.
    pub masquerade_foreign: bool,
    /// Exempt the overlay's datagrams from connection tracking.
    pub notrack: bool,
}

impl Default for Firewall {
    fn default() -> Self {
        Self {
            drop_spoofed: true,
            drop_cleartext: true,
            drop_transit: true,
            masquerade_foreign: true,
            notrack: true,
        }
    }
}

/// The Kubernetes API as the source of node records.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Kubernetes {
    /// Whether the records are SkeinNodes, and not files.
    pub enabled: bool,
    /// Which cluster, and as whom; `None`: that of this pod, by its service account.
    pub kubeconfig: Option<PathBuf>,
    /// The interface whose addresses the other nodes send to; `None`: the Node's InternalIPs.
    pub endpoint_interface: Option<String>,
    /// Key of a taint that is removed from the Node once pods have a network.
    pub not_ready_taint: Option<String>,
}

impl Config {
    /// Reads and validates a file. `name` overrides the node's.
    pub fn load(path: &Path, name: Option<&str>) -> Result<Self, Failure> {
        let text = std::fs::read_to_string(path).map_err(|error| {
            Failure::Usage(format!(
                "cannot read the configuration {}: {error}: name the file with --config",
                path.display()
            ))
        })?;
        let mut config = Self::parse(&text).map_err(|error| {
            Failure::Usage(format!("configuration {}: {error}", path.display()))
        })?;
        if let Some(name) = name {
            check_node_name(name).map_err(|error| Failure::Usage(format!("--name: {error}")))?;
            config.name = name.to_owned();
        }
        Ok(config)
    }

    /// Validates the text of a configuration file.
    pub fn parse(text: &str) -> Result<Self, Invalid> {
        let file: file::File =
            toml::from_str(text).map_err(|error| Invalid(toml_error(text, &error)))?;
        file.validate()
    }

    /// Where the private key lies.
    pub fn key_path(&self) -> PathBuf {
        self.private_key_file.clone().unwrap_or_else(|| self.state_dir.join(KEY))
    }

    /// What the interface is marked with (IFLA_IFALIAS), so that it is told from a stranger's.
    pub fn alias(&self) -> String {
        format!("{ALIAS_PREFIX}{}", self.name)
    }
}

/// What is wrong with a configuration: the key, the value, the remedy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Invalid(String);

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A value of the configuration may be of any length.
        f.write_str(&message_excerpt(&self.0))
    }
}

impl std::error::Error for Invalid {}

/// A parser's complaint about `text` on one line, with the place.
pub fn toml_error(text: &str, error: &toml::de::Error) -> String {
    let before = error.span().and_then(|span| text.get(..span.start));
    let Some(number) = before.map(|before| before.matches('\n').count()) else {
        return message_excerpt(error.message()).into_owned();
    };
    let line = excerpt(text.lines().nth(number).unwrap_or_default().trim());
    format!("line {} ({line}): {}", number + 1, message_excerpt(error.message()))
}

/// Whether `name` can be the name of a node.
pub fn check_node_name(name: &str) -> Result<(), Invalid> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
    if name.is_empty() || name.len() > 200 || !name.chars().all(plain) {
        let name = excerpt(name);
        let text = format!("name = {name:?}: use 1 to 200 letters, digits, '-', '.' and '_'");
        return Err(Invalid(text));
    }
    Ok(())
}

/// Returns the unspecified addresses of the families for which `supported` returns true, and a note
/// for each family that is left out.
fn wildcard(supported: impl Fn(IpAddr) -> bool) -> (Vec<IpAddr>, Vec<String>) {
    let all = [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)];
    let (addresses, absent): (Vec<_>, Vec<_>) = all.into_iter().partition(|ip| supported(*ip));
    if addresses.is_empty() {
        // The error of binding these addresses names the cause.
        return (all.to_vec(), Vec::new());
    }
    let note = |ip: IpAddr| {
        let family = if ip.is_ipv4() { "IPv4" } else { "IPv6" };
        format!("underlay.addresses: this host has no {family}: {ip} is left out of the default")
    };
    (addresses, absent.into_iter().map(note).collect())
}
