//! The configuration file as it is written, and its way to a valid [`Config`].

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use serde::Deserialize;
use skein_core::address;
use skein_core::wire::header::MAX_LANES;
use skein_core::wire::ip::{MAX_MTU, MIN_IPV4_MTU, MIN_IPV6_MTU};
use skein_ipc::{CipherChoice, OffloadSettings, UnderlaySettings};
use skein_netlink::pod::HOST_PREFIX;
use skein_sys::udp::family_supported;

use super::cni::{CniTable, DEFAULT_INTERFACE};
use super::kubernetes::KubernetesTable;
use super::{
    Config, Control, DEFAULT_PORT, Dataplane, Firewall, Interface, Invalid, KeyRotation, Metrics,
    Mode, StatusPage, check_disjoint, check_inside, check_node_name, check_outside, check_pod_cidr,
    wildcard,
};
use crate::logging::{self, Log, LogFormat};

/// Values of `interface.mtu`, in bytes.
const MTU: std::ops::RangeInclusive<u16> = MIN_IPV4_MTU..=MAX_MTU;

/// A dead watch is noticed within 95 seconds, and a session of the old key lives for 180.
const SETTLE: std::ops::RangeInclusive<u32> = 300..=86_400;

const BUFFERS: std::ops::RangeInclusive<usize> = 65_536..=1 << 30;

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct File {
    name: Option<String>,
    cluster_id: String,
    state_dir: PathBuf,
    private_key_file: Option<PathBuf>,
    key_rotation: KeyRotationTable,
    nodes: Option<PathBuf>,
    pod_cidrs: Option<Vec<String>>,
    cluster_cidrs: Vec<String>,
    interface: InterfaceTable,
    underlay: UnderlayTable,
    dataplane: DataplaneTable,
    offload: OffloadTable,
    metrics: MetricsTable,
    status_page: StatusPageTable,
    control: ControlTable,
    cni: CniTable,
    firewall: Firewall,
    kubernetes: KubernetesTable,
    log: LogTable,
}

impl Default for File {
    fn default() -> Self {
        Self {
            name: None,
            cluster_id: "default".to_owned(),
            state_dir: "/var/lib/skein".into(),
            private_key_file: None,
            key_rotation: KeyRotationTable::default(),
            nodes: None,
            pod_cidrs: None,
            cluster_cidrs: Vec::new(),
            interface: InterfaceTable::default(),
            underlay: UnderlayTable::default(),
            dataplane: DataplaneTable::default(),
            offload: OffloadTable::default(),
            metrics: MetricsTable::default(),
            status_page: StatusPageTable::default(),
            control: ControlTable::default(),
            cni: CniTable::default(),
            firewall: Firewall::default(),
            kubernetes: KubernetesTable::default(),
            log: LogTable::default(),
        }
    }
}

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct KeyRotationTable {
    every_days: u32,
    settle_seconds: u32,
}

impl Default for KeyRotationTable {
    fn default() -> Self {
        Self { every_days: 0, settle_seconds: 300 }
    }
}

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct InterfaceTable {
    name: String,
    mtu: Option<u16>,
    txqueuelen: u32,
    addresses: Option<Vec<String>>,
    forwarding: bool,
    unreachable_routes: bool,
}

impl Default for InterfaceTable {
    fn default() -> Self {
        Self {
            name: DEFAULT_INTERFACE.to_owned(),
            mtu: None,
            txqueuelen: 1000,
            addresses: None,
            forwarding: true,
            unreachable_routes: true,
        }
    }
}

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct UnderlayTable {
    addresses: Option<Vec<String>>,
    port: u16,
    receive_buffer: usize,
    send_buffer: usize,
}

impl Default for UnderlayTable {
    fn default() -> Self {
        Self { addresses: None, port: DEFAULT_PORT, receive_buffer: 8 << 20, send_buffer: 4 << 20 }
    }
}

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct DataplaneTable {
    mode: Mode,
    socket: PathBuf,
    lanes: Option<u8>,
    cipher: CipherChoice,
    bundling: bool,
    busy_poll_us: Option<u32>,
    keep_on_exit: bool,
    seccomp: bool,
    require_confinement: bool,
}

impl Default for DataplaneTable {
    fn default() -> Self {
        Self {
            mode: Mode::default(),
            socket: "/run/skein/dataplane.sock".into(),
            lanes: None,
            cipher: CipherChoice::default(),
            bundling: true,
            busy_poll_us: None,
            keep_on_exit: false,
            seccomp: true,
            require_confinement: false,
        }
    }
}

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct OffloadTable {
    tun_uso: bool,
    tun_tso: bool,
    tun_checksum: bool,
    udp_gso: bool,
    udp_gro: bool,
    udp_ecn: bool,
}

impl Default for OffloadTable {
    fn default() -> Self {
        let OffloadSettings { tun_uso, tun_tso, tun_checksum, udp_gso, udp_gro, udp_ecn } =
            OffloadSettings::ALL;
        Self { tun_uso, tun_tso, tun_checksum, udp_gso, udp_gro, udp_ecn }
    }
}

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct MetricsTable {
    listen: String,
    per_peer: bool,
    hosts: Vec<String>,
}

impl Default for MetricsTable {
    fn default() -> Self {
        Self { listen: "127.0.0.1:9464".to_owned(), per_peer: false, hosts: Vec::new() }
    }
}

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct StatusPageTable {
    listen: String,
}

impl Default for StatusPageTable {
    fn default() -> Self {
        Self { listen: "off".to_owned() }
    }
}

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct ControlTable {
    socket: PathBuf,
}

impl Default for ControlTable {
    fn default() -> Self {
        Self { socket: "/run/skein/control.sock".into() }
    }
}

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct LogTable {
    level: String,
    format: LogFormat,
}

impl Default for LogTable {
    fn default() -> Self {
        Self { level: "info".to_owned(), format: LogFormat::default() }
    }
}

/// The longest path of a unix socket in bytes: sun_path (unix(7)) less its terminator.
const SOCKET_PATH: usize = 107;

impl File {
    pub(super) fn validate(self) -> Result<Config, Invalid> {
        let name = match self.name {
            Some(name) => name,
            None => host_name()?,
        };
        check_node_name(&name)?;
        if self.cluster_id.is_empty() || self.cluster_id.len() > 200 {
            return Err(Invalid("cluster_id: use 1 to 200 bytes".to_owned()));
        }
        let pod_cidrs = self.pod_cidrs.map(|texts| cidrs("pod_cidrs", &texts)).transpose()?;
        if pod_cidrs.as_ref().is_some_and(Vec::is_empty) {
            return Err(Invalid(
                "pod_cidrs is empty: give a prefix, or leave it out to use the node's record"
                    .to_owned(),
            ));
        }
        let cluster_cidrs = cidrs("cluster_cidrs", &self.cluster_cidrs)?;
        check_inside(pod_cidrs.as_deref().unwrap_or_default(), &cluster_cidrs)
            .map_err(|error| Invalid(format!("pod_cidrs: {error}")))?;
        let interface = self.interface.validate(pod_cidrs.as_deref())?;
        for (key, path) in [
            ("state_dir", Some(&self.state_dir)),
            ("private_key_file", self.private_key_file.as_ref()),
            ("nodes", self.nodes.as_ref()),
            ("dataplane.socket", Some(&self.dataplane.socket)),
            ("control.socket", Some(&self.control.socket)),
            ("cni.socket", Some(&self.cni.socket)),
            ("cni.spool", Some(&self.cni.spool)),
        ] {
            if path.is_some_and(|path| path.as_os_str().is_empty()) {
                return Err(Invalid(format!("{key} is empty: give a path or leave it out")));
            }
        }
        let sockets = [
            ("dataplane.socket", &self.dataplane.socket),
            ("control.socket", &self.control.socket),
            ("cni.socket", &self.cni.socket),
        ];
        for (index, (key, path)) in sockets.iter().enumerate() {
            let length = path.as_os_str().len();
            if length > SOCKET_PATH {
                return Err(Invalid(format!(
                    "{key} is {length} bytes long: a socket's path has at most {SOCKET_PATH}"
                )));
            }
            if let Some((other, _)) = sockets[..index].iter().find(|(_, taken)| taken == path) {
                return Err(Invalid(format!(
                    "{other} and {key} are both {}: give each its own",
                    path.display()
                )));
            }
        }
        let kubernetes = self.kubernetes.validate()?;
        let (underlay, notes) = self.underlay.validate()?;
        if kubernetes.enabled && self.nodes.is_some() {
            return Err(Invalid(
                "nodes: with kubernetes.enabled the records are SkeinNodes: leave nodes out"
                    .to_owned(),
            ));
        }
        check_outside(underlay.addresses.iter().copied(), &cluster_cidrs)
            .map_err(|error| Invalid(format!("underlay.addresses: {error}")))?;
        Ok(Config {
            name,
            cluster_id: self.cluster_id,
            state_dir: self.state_dir,
            private_key_file: self.private_key_file,
            key_rotation: self.key_rotation.validate(kubernetes.enabled)?,
            nodes: self.nodes.unwrap_or_else(|| "/etc/skein/nodes.d".into()),
            pod_cidrs,
            cluster_cidrs,
            underlay,
            dataplane: self.dataplane.validate()?,
            offload: OffloadSettings {
                tun_uso: self.offload.tun_uso,
                tun_tso: self.offload.tun_tso,
                tun_checksum: self.offload.tun_checksum,
                udp_gso: self.offload.udp_gso,
                udp_gro: self.offload.udp_gro,
                udp_ecn: self.offload.udp_ecn,
            },
            metrics: self.metrics.validate()?,
            status_page: StatusPage {
                listen: listen("status_page.listen", &self.status_page.listen, 9465)?,
            },
            control: Control { socket: self.control.socket },
            cni: self.cni.validate(&interface.name)?,
            firewall: self.firewall,
            interface,
            kubernetes,
            log: self.log.validate()?,
            notes,
        })
    }
}

impl KeyRotationTable {
    fn validate(self, writes_record: bool) -> Result<KeyRotation, Invalid> {
        let Self { every_days, settle_seconds } = self;
        if every_days > 0 && !writes_record {
            return Err(Invalid(format!(
                "key_rotation.every_days = {every_days}: an agent changes its key on its own only where \
                 it writes the node records (kubernetes.enabled): use skein-agent rotate-key"
            )));
        }
        if !SETTLE.contains(&settle_seconds) {
            let (least, most) = (SETTLE.start(), SETTLE.end());
            return Err(Invalid(format!(
                "key_rotation.settle_seconds = {settle_seconds}: use {least} to {most}"
            )));
        }
        let every = Duration::from_secs(u64::from(every_days) * 86_400);
        Ok(KeyRotation {
            every: (every_days > 0).then_some(every),
            settle: Duration::from_secs(settle_seconds.into()),
        })
    }
}

impl InterfaceTable {
    fn validate(self, pod_cidrs: Option<&[IpNet]>) -> Result<Interface, Invalid> {
        let printable = |c: char| c.is_ascii_graphic() && !matches!(c, '/' | ':' | '%');
        let possible = (1..=15).contains(&self.name.len()) && self.name.chars().all(printable);
        if self.name.starts_with(HOST_PREFIX) || self.name.contains(['"', '*']) {
            return Err(Invalid(format!(
                "interface.name = {:?}: names that begin with {HOST_PREFIX} are pods', and '\"' and '*' \
                 are not allowed",
                self.name
            )));
        }
        // The kernel keeps these for its settings of all interfaces.
        if !possible || matches!(self.name.as_str(), "." | ".." | "all" | "default" | "lo") {
            return Err(Invalid(format!(
                "interface.name = {:?}: use 1 to 15 printable characters without '/', ':' and '%'",
                self.name
            )));
        }
        if let Some(mtu) = self.mtu.filter(|mtu| !MTU.contains(mtu)) {
            let (least, most) = (MTU.start(), MTU.end());
            return Err(Invalid(format!("interface.mtu = {mtu}: use {least} to {most}")));
        }
        let v6 = pod_cidrs.and_then(|cidrs| cidrs.iter().find(|cidr| cidr.addr().is_ipv6()));
        if let (Some(mtu), Some(cidr)) = (self.mtu.filter(|&mtu| mtu < MIN_IPV6_MTU), v6) {
            return Err(Invalid(format!(
                "interface.mtu = {mtu}: IPv6 ({cidr}) needs {MIN_IPV6_MTU} or more"
            )));
        }
        if !(1..=1_000_000).contains(&self.txqueuelen) {
            return Err(Invalid("interface.txqueuelen: use 1 to 1000000 packets".to_owned()));
        }
        let addresses = self.addresses.map(|texts| addresses("interface.addresses", &texts));
        Ok(Interface {
            name: self.name,
            mtu: self.mtu,
            txqueuelen: self.txqueuelen,
            addresses: addresses.transpose()?,
            forwarding: self.forwarding,
            unreachable_routes: self.unreachable_routes,
        })
    }
}

impl UnderlayTable {
    fn validate(self) -> Result<(UnderlaySettings, Vec<String>), Invalid> {
        let (addresses, notes) = match &self.addresses {
            None => wildcard(family_supported),
            Some(texts) => (addresses("underlay.addresses", texts)?, Vec::new()),
        };
        if addresses.is_empty() {
            return Err(Invalid(
                "underlay.addresses is empty: give an address or leave it out to listen on all"
                    .to_owned(),
            ));
        }
        for (index, address) in addresses.iter().enumerate() {
            let earlier = &addresses[..index];
            if earlier.iter().any(|other| other.is_ipv4() == address.is_ipv4()) {
                return Err(Invalid(format!(
                    "underlay.addresses: {address} is a second address of its family: give one"
                )));
            }
            if matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local()) {
                return Err(Invalid(format!(
                    "underlay.addresses: {address} is a link-local address, which cannot be bound: \
                     use \"::\""
                )));
            }
        }
        if self.port == 0 {
            return Err(Invalid("underlay.port = 0: use 1 to 65535".to_owned()));
        }
        for (key, bytes) in
            [("receive_buffer", self.receive_buffer), ("send_buffer", self.send_buffer)]
        {
            if !BUFFERS.contains(&bytes) {
                let (least, most) = (BUFFERS.start(), BUFFERS.end());
                let text = format!("underlay.{key} = {bytes}: use {least} to {most} bytes");
                return Err(Invalid(text));
            }
        }
        let settings = UnderlaySettings {
            addresses,
            port: self.port,
            receive_buffer: self.receive_buffer,
            send_buffer: self.send_buffer,
        };
        Ok((settings, notes))
    }
}

impl DataplaneTable {
    fn validate(self) -> Result<Dataplane, Invalid> {
        let lanes = self.lanes.unwrap_or_else(default_lanes);
        if !(1..=MAX_LANES).contains(&usize::from(lanes)) {
            return Err(Invalid(format!("dataplane.lanes = {lanes}: use 1 to {MAX_LANES}")));
        }
        if let Some(us @ 1001..) = self.busy_poll_us {
            return Err(Invalid(format!("dataplane.busy_poll_us = {us}: use 0 to 1000")));
        }
        if self.require_confinement && !self.seccomp {
            return Err(Invalid(
                "dataplane.require_confinement = true contradicts dataplane.seccomp = false: \
                 remove one of them"
                    .to_owned(),
            ));
        }
        Ok(Dataplane {
            mode: self.mode,
            socket: self.socket,
            lanes,
            cipher: self.cipher,
            bundling: self.bundling,
            busy_poll_us: self.busy_poll_us,
            keep_on_exit: self.keep_on_exit,
            seccomp: self.seccomp,
            require_confinement: self.require_confinement,
        })
    }
}

impl MetricsTable {
    fn validate(self) -> Result<Metrics, Invalid> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
        let wrong = |host: &&String| host.is_empty() || !host.chars().all(allowed);
        if let Some(host) = self.hosts.iter().find(wrong) {
            return Err(Invalid(format!(
                "metrics.hosts: {host:?} is not a host name: use letters, digits, '-', '.' and '_'"
            )));
        }
        Ok(Metrics {
            listen: listen("metrics.listen", &self.listen, 9464)?,
            per_peer: self.per_peer,
            hosts: self.hosts,
        })
    }
}

impl LogTable {
    fn validate(self) -> Result<Log, Invalid> {
        logging::parse(&self.level).map_err(|error| Invalid(format!("log.level = {error}")))?;
        Ok(Log { level: self.level, format: self.format })
    }
}

/// An address and a port, or `off`; `port` is for the example.
fn listen(key: &str, text: &str, port: u16) -> Result<Option<SocketAddr>, Invalid> {
    if text == "off" {
        return Ok(None);
    }
    address::parse(text).map(Some).map_err(|_| {
        let example = format!("an address and a port (127.0.0.1:{port}) or \"off\"");
        Invalid(format!("{key} = {text:?}: use {example}"))
    })
}

fn cidrs(key: &str, texts: &[String]) -> Result<Vec<IpNet>, Invalid> {
    let wrong = |error: Invalid| Invalid(format!("{key}: {error}"));
    let mut cidrs = Vec::with_capacity(texts.len());
    for text in texts {
        let cidr: IpNet = address::parse(text).map_err(|_| {
            let example = "use an address and a length, as 10.1.0.0/24";
            Invalid(format!("{key}: {text:?} is not a prefix: {example}"))
        })?;
        check_pod_cidr(&cidr).map_err(wrong)?;
        cidrs.push(cidr);
    }
    check_disjoint(&cidrs).map_err(wrong)?;
    Ok(cidrs)
}

fn addresses(key: &str, texts: &[String]) -> Result<Vec<IpAddr>, Invalid> {
    let parse = |text: &String| {
        let address: IpAddr = address::parse(text)
            .map_err(|_| Invalid(format!("{key}: {text:?} is not an IP address, as 192.0.2.1")))?;
        match address.is_multicast() {
            true => Err(Invalid(format!("{key}: {address}: use a unicast address"))),
            false => Ok(address),
        }
    };
    texts.iter().map(parse).collect()
}

fn default_lanes() -> u8 {
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    cores.clamp(1, 4) as u8
}

fn host_name() -> Result<String, Invalid> {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map_err(|error| Invalid(format!("name: no host name ({error}): set name")))?;
    Ok(name.trim().to_owned())
}
