//! The agent's configuration: a TOML file, parsed and validated once into one [`Config`], which is
//! logged at start. It holds paths of secrets, never secrets.

mod cni;
mod file;
mod kubernetes;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};
use skein_cni_protocol::excerpt::{excerpt, message_excerpt};
use skein_ipc::{CipherChoice, OffloadSettings, UnderlaySettings};
use skein_netlink::interface::ALIAS_PREFIX;

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

/// Prefixes that no pod CIDR may overlap: "this network", loopback, link-local, multicast, the limited
/// broadcast address and IPv4-mapped addresses (RFC 6890).
const RESERVED: [IpNet; 9] = [
    v4([0, 0, 0, 0], 8),
    v4([127, 0, 0, 0], 8),
    v4([169, 254, 0, 0], 16),
    v4([224, 0, 0, 0], 4),
    v4([255, 255, 255, 255], 32),
    v6(0, 0, 127),
    v6(0, 0xffff, 96),
    v6(0xfe80, 0, 10),
    v6(0xff00, 0, 8),
];

const fn v4([a, b, c, d]: [u8; 4], length: u8) -> IpNet {
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), length))
}

/// Returns a prefix by the first and the sixth group of its address; the other groups are zero.
const fn v6(first: u16, sixth: u16, length: u8) -> IpNet {
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::new(first, 0, 0, 0, 0, sixth, 0, 0), length))
}

/// Checks that `cidr` can be a pod CIDR.
///
/// # Errors
/// Host bits are set, or the prefix overlaps a reserved one.
pub fn check_pod_cidr(cidr: &IpNet) -> Result<(), Invalid> {
    if cidr.trunc() != *cidr {
        let text = format!("{cidr} has host bits set: write {}", cidr.trunc());
        return Err(Invalid(text));
    }
    if let Some(reserved) = RESERVED.iter().find(|reserved| overlap(cidr, reserved)) {
        return Err(Invalid(format!(
            "{cidr} cannot be a pod CIDR, because it overlaps {reserved}: use a unicast prefix of its \
             own"
        )));
    }
    Ok(())
}

/// Names the first two of `cidrs` that overlap.
pub fn check_disjoint(cidrs: &[IpNet]) -> Result<(), Invalid> {
    // Prefixes nest or are disjoint: one that overlaps any other overlaps its neighbour.
    let mut sorted = cidrs.to_vec();
    sorted.sort_unstable();
    match sorted.windows(2).find(|pair| overlap(&pair[0], &pair[1])) {
        Some(pair) => {
            Err(Invalid(format!("{} and {} overlap: keep one of them", pair[0], pair[1])))
        }
        None => Ok(()),
    }
}

/// Names the first of `cidrs` that lies outside of the cluster's, where those are known.
pub fn check_inside(cidrs: &[IpNet], cluster: &[IpNet]) -> Result<(), Invalid> {
    let inside = |cidr: &&IpNet| cluster.iter().any(|all| all.contains(*cidr));
    match cidrs.iter().find(|cidr| !cluster.is_empty() && !inside(cidr)) {
        Some(cidr) => {
            let all: Vec<_> = cluster.iter().map(IpNet::to_string).collect();
            Err(Invalid(format!("{cidr} is outside of cluster_cidrs ({})", all.join(", "))))
        }
        None => Ok(()),
    }
}

/// Refuses cluster prefixes that contain an address outside the pod network. The unreachable route
/// of such a prefix would cut this node off from the address.
///
/// # Errors
///
/// A message that names both if one of `addresses` lies in one of `cluster`.
pub fn check_outside(
    addresses: impl IntoIterator<Item = IpAddr>,
    cluster: &[IpNet],
) -> Result<(), Invalid> {
    for address in addresses {
        if let Some(net) = cluster.iter().find(|net| net.contains(&address)) {
            return Err(Invalid(format!(
                "{address} lies in cluster_cidrs ({net}), which would cut this node off from it: give \
                 cluster_cidrs prefixes that only pods have"
            )));
        }
    }
    Ok(())
}

/// Whether two prefixes share an address.
pub fn overlap(a: &IpNet, b: &IpNet) -> bool {
    a.contains(b) || b.contains(a)
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::logging::LogFormat;

    fn error(text: &str) -> String {
        Config::parse(text).unwrap_err().to_string()
    }

    #[test]
    fn every_key_has_a_default() {
        let config = Config::parse("").unwrap();
        assert!(!config.name.is_empty());
        assert_eq!(config.interface.name, "skein0");
        assert_eq!(config.underlay.port, 51900);
        assert_eq!(config.underlay.addresses[0], IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        assert!((1..=4).contains(&config.dataplane.lanes));
        assert_eq!(config.offload, OffloadSettings::ALL);
        assert_eq!(config.metrics.listen, Some("127.0.0.1:9464".parse().unwrap()));
        assert_eq!(config.status_page.listen, None, "what it shows is for root, unless configured");
        assert_eq!(config.key_path(), Path::new("/var/lib/skein/node.key"));
    }

    #[test]
    fn default_underlay_leaves_absent_families_out() {
        let (addresses, notes) = wildcard(|ip| ip.is_ipv4());
        assert_eq!(addresses, [IpAddr::V4(Ipv4Addr::UNSPECIFIED)]);
        assert_eq!(notes.len(), 1, "one family is absent: {notes:?}");
        assert!(notes[0].contains("no IPv6") && notes[0].contains("::"), "{notes:?}");
        let (addresses, notes) = wildcard(|_| true);
        assert_eq!((addresses.len(), notes.len()), (2, 0));
        let (addresses, _) = wildcard(|_| false);
        assert_eq!(addresses.len(), 2, "binding must report a host without any family");
        let explicit = Config::parse("[underlay]\naddresses = ['0.0.0.0', '::']").unwrap();
        assert_eq!(explicit.underlay.addresses.len(), 2, "explicit addresses must be kept");
        assert!(explicit.notes.is_empty());
    }

    #[test]
    fn the_reference_shows_the_defaults() {
        let reference = include_str!("../../docs/configuration.md");
        let block = reference.split("```toml").nth(1).and_then(|rest| rest.split("```").next());
        let shown = Config::parse(block.unwrap()).unwrap();
        let mut defaults = Config::parse("name = 'node-a'").unwrap();
        defaults.dataplane.lanes = shown.dataplane.lanes;
        defaults.underlay.addresses = shown.underlay.addresses.clone();
        defaults.notes = shown.notes.clone();
        assert_eq!(shown, defaults);
    }

    #[test]
    fn every_key_is_taken() {
        let config = Config::parse(
            r#"
            name = "node-a"
            cluster_id = "prod"
            state_dir = "/tmp/state"
            private_key_file = "/tmp/key"
            nodes = "/tmp/nodes"
            pod_cidrs = ["10.1.0.0/24", "fd00::/64"]
            cluster_cidrs = ["10.0.0.0/8", "fd00::/16"]
            [interface]
            name = "sk1"
            mtu = 1400
            txqueuelen = 2000
            addresses = ["10.1.0.7"]
            forwarding = false
            unreachable_routes = false
            [underlay]
            addresses = ["192.0.2.1", "2001:db8::1"]
            port = 4000
            receive_buffer = 100000
            send_buffer = 200000
            [dataplane]
            mode = "external"
            socket = "/tmp/d.sock"
            lanes = 7
            cipher = "chacha20-poly1305"
            bundling = false
            keep_on_exit = true
            [offload]
            udp_gso = false
            [metrics]
            listen = "off"
            per_peer = true
            hosts = ["node-a.example"]
            [status_page]
            listen = "[::1]:9465"
            [control]
            socket = "/tmp/c.sock"
            [log]
            level = "debug"
            format = "json"
            "#,
        )
        .unwrap();
        assert_eq!(config.alias(), "skein:node-a");
        assert_eq!(config.cluster_cidrs.len(), 2);
        assert_eq!(config.interface.mtu, Some(1400));
        assert_eq!(config.interface.addresses, Some(vec!["10.1.0.7".parse().unwrap()]));
        assert!(!config.interface.unreachable_routes);
        assert_eq!(config.dataplane.mode, Mode::External);
        assert_eq!(config.dataplane.cipher, CipherChoice::Chacha20Poly1305);
        assert_eq!(config.offload, OffloadSettings { udp_gso: false, ..OffloadSettings::ALL });
        assert_eq!(config.metrics.listen, None);
        assert_eq!(config.metrics.hosts, ["node-a.example"]);
        assert_eq!(config.status_page.listen, Some("[::1]:9465".parse().unwrap()));
        assert_eq!(config.log.format, LogFormat::Json);
    }

    #[test]
    fn required_confinement_contradicts_seccomp_off() {
        let parse = |text: &str| Config::parse(&format!("name = \"a\"\n[dataplane]\n{text}"));
        assert!(parse("require_confinement = true").unwrap().dataplane.require_confinement);
        assert!(!parse("seccomp = false").unwrap().dataplane.require_confinement);
        let error = parse("seccomp = false\nrequire_confinement = true").unwrap_err().to_string();
        assert!(error.contains("dataplane.require_confinement"), "{error}");
    }

    #[test]
    fn mapped_addresses_are_taken_as_ipv4() {
        let config = Config::parse(
            r#"
            name = "node-a"
            pod_cidrs = ["::ffff:10.1.0.0/120"]
            cluster_cidrs = ["::ffff:10.0.0.0/104"]
            [interface]
            addresses = ["::ffff:10.1.0.7"]
            [underlay]
            addresses = ["::ffff:192.0.2.1"]
            [metrics]
            listen = "[::ffff:127.0.0.1]:9464"
            [status_page]
            listen = "[::ffff:127.0.0.1]:9465"
            [cni]
            no_masquerade = ["::ffff:198.51.100.0/120"]
            "#,
        )
        .unwrap();
        assert_eq!(config.pod_cidrs, Some(vec!["10.1.0.0/24".parse().unwrap()]));
        assert_eq!(config.cluster_cidrs, ["10.0.0.0/8".parse().unwrap()]);
        assert_eq!(config.interface.addresses, Some(vec!["10.1.0.7".parse().unwrap()]));
        assert_eq!(config.underlay.addresses, ["192.0.2.1".parse::<IpAddr>().unwrap()]);
        assert_eq!(config.metrics.listen, Some("127.0.0.1:9464".parse().unwrap()));
        assert_eq!(config.status_page.listen, Some("127.0.0.1:9465".parse().unwrap()));
        assert_eq!(config.cni.no_masquerade, ["198.51.100.0/24".parse().unwrap()]);
        let twice = error("[underlay]\naddresses = ['192.0.2.2', '::ffff:192.0.2.1']");
        assert!(twice.contains("second address of its family"), "{twice}");
        let multicast = error("[underlay]\naddresses = ['::ffff:224.0.0.1']");
        assert!(multicast.contains("unicast"), "{multicast}");
    }

    #[test]
    fn unknown_keys_are_named() {
        assert!(error("nmae = 'a'").contains("nmae"));
        assert!(error("[underlay]\nprot = 1").contains("prot"));
        assert!(error("[offload]\ntun_gso = true").contains("tun_gso"));
    }

    #[test]
    fn bad_values_are_named_with_a_remedy() {
        for (text, key, remedy) in [
            ("name = 'a b'", "name", "letters"),
            ("cluster_id = ''", "cluster_id", "1 to"),
            ("pod_cidrs = ['10.1.0.7/24']", "pod_cidrs", "10.1.0.0/24"),
            ("pod_cidrs = ['10.1.0.0']", "pod_cidrs", "10.1.0.0/24"),
            ("pod_cidrs = ['10.1.0.0/16', '10.1.2.0/24']", "pod_cidrs", "overlap"),
            ("pod_cidrs = ['0.0.0.0/0']", "pod_cidrs", "unicast"),
            ("pod_cidrs = ['::/0']", "pod_cidrs", "unicast"),
            ("pod_cidrs = ['168.0.0.0/7']", "pod_cidrs", "overlaps 169.254.0.0/16"),
            ("pod_cidrs = ['126.0.0.0/7']", "pod_cidrs", "overlaps 127.0.0.0/8"),
            ("pod_cidrs = ['192.0.0.0/2']", "pod_cidrs", "overlaps 224.0.0.0/4"),
            ("pod_cidrs = ['127.1.0.0/16']", "pod_cidrs", "overlaps 127.0.0.0/8"),
            ("pod_cidrs = ['fe00::/8']", "pod_cidrs", "overlaps fe80::/10"),
            ("cluster_cidrs = ['f000::/4']", "cluster_cidrs", "overlaps fe80::/10"),
            ("pod_cidrs = ['::/1']", "pod_cidrs", "overlaps ::/127"),
            ("pod_cidrs = ['::fffe:0:0/95']", "pod_cidrs", "overlaps ::ffff:0.0.0.0/96"),
            ("cluster_cidrs = ['10.1.0.7/24']", "cluster_cidrs", "10.1.0.0/24"),
            ("cluster_cidrs = ['10.1.0.0/16', '10.1.2.0/24']", "cluster_cidrs", "overlap"),
            (
                "pod_cidrs = ['10.1.0.0/24']\ncluster_cidrs = ['10.2.0.0/16']",
                "pod_cidrs",
                "outside of cluster_cidrs (10.2.0.0/16)",
            ),
            (
                "cluster_cidrs = ['192.0.2.0/24']\n[underlay]\naddresses = ['192.0.2.1']",
                "underlay.addresses",
                "192.0.2.1 lies in cluster_cidrs (192.0.2.0/24)",
            ),
            ("[interface]\nname = 'a-very-long-name'", "interface.name", "15"),
            ("[interface]\nname = 'a/b'", "interface.name", "15"),
            ("[interface]\nmtu = 100", "interface.mtu", "576"),
            ("pod_cidrs = ['fd00::/64']\n[interface]\nmtu = 1279", "interface.mtu", "1280"),
            ("[interface]\naddresses = ['x']", "interface.addresses", "IP address"),
            ("[interface]\ntxqueuelen = 0", "interface.txqueuelen", "1 to"),
            ("[underlay]\naddresses = []", "underlay.addresses", "leave it out"),
            ("[underlay]\naddresses = ['192.0.2.1', '192.0.2.2']", "underlay.addresses", "one"),
            ("[underlay]\naddresses = ['239.0.0.1']", "underlay.addresses", "unicast"),
            ("[underlay]\naddresses = ['fe80::1']", "underlay.addresses", "link-local"),
            ("[underlay]\nport = 0", "underlay.port", "1 to 65535"),
            ("[underlay]\nport = 70000", "port", "70000"),
            ("[underlay]\nreceive_buffer = 10", "underlay.receive_buffer", "65536"),
            ("[dataplane]\nlanes = 0", "dataplane.lanes", "1 to 64"),
            ("[dataplane]\nlanes = 65", "dataplane.lanes", "1 to 64"),
            ("[dataplane]\nbusy_poll_us = 1001", "dataplane.busy_poll_us", "0 to 1000"),
            ("[dataplane]\nmode = 'thread'", "mode", "spawn"),
            ("[dataplane]\ncipher = 'none'", "cipher", "aes256-gcm"),
            ("[dataplane]\nsocket = ''", "dataplane.socket", "path"),
            ("[dataplane]\nsocket = '/x'\n[control]\nsocket = '/x'", "control.socket", "its own"),
            (&format!("[control]\nsocket = '/{}'", "x".repeat(107)), "control.socket", "107"),
            ("[metrics]\nlisten = '9464'", "metrics.listen", "127.0.0.1:9464"),
            ("[metrics]\nhosts = ['a b']", "metrics.hosts", "host name"),
            ("[status_page]\nlisten = ':9465'", "status_page.listen", "127.0.0.1:9465"),
            ("[log]\nlevel = 'a=b=c'", "log.level", "info"),
        ] {
            let error = error(text);
            assert!(error.contains(key), "{text}: {error}");
            assert!(error.contains(remedy), "{text}: {error}");
        }
    }
}
