//! Encrypted overlays in user space with which Skein is compared. They are configured as their
//! manuals recommend, with the same buffers and MTU as Skein.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use super::Options;
use super::overlay::{Overlay, pairs};
use skein_lab::packages;
use skein_lab::process::{self, Process};
use skein_lab::{Family, Lab};

/// Paths of the other overlays' programs; `None` if a program is missing.
#[derive(Debug, Default)]
pub struct Tools {
    wireguard_go: Option<PathBuf>,
    wg: Option<PathBuf>,
    nebula: Option<PathBuf>,
    nebula_cert: Option<PathBuf>,
    /// Lines (YAML) that are appended to Nebula's configuration; not a program.
    nebula_extra: String,
}

impl Tools {
    /// Finds the programs: those of the options, otherwise those that are installed.
    pub fn find(options: &Options) -> Self {
        let nebula = options.nebula.clone().or_else(|| packages::find("nebula"));
        let beside = options.nebula.as_ref().map(|path| path.with_file_name("nebula-cert"));
        let extra = options.nebula_extra.as_ref().map(fs::read_to_string);
        Self {
            wireguard_go: options.wireguard_go.clone().or_else(|| packages::find("wireguard-go")),
            wg: packages::find("wg"),
            nebula,
            nebula_cert: beside
                .filter(|path| path.is_file())
                .or_else(|| packages::find("nebula-cert")),
            nebula_extra: extra.and_then(Result::ok).unwrap_or_default(),
        }
    }

    /// Returns a message for users if a program that the network needs is missing, for example
    /// "no nebula"; `None` if no program is missing.
    pub fn missing(&self, overlay: Overlay) -> Option<&'static str> {
        let absent = |path: &Option<PathBuf>| !path.as_ref().is_some_and(|path| path.is_file());
        match overlay {
            Overlay::WireguardGo if absent(&self.wireguard_go) => Some("no wireguard-go"),
            Overlay::WireguardGo if absent(&self.wg) => Some("no wg (package wireguard-tools)"),
            Overlay::Nebula if absent(&self.nebula) => Some("no nebula"),
            Overlay::Nebula if absent(&self.nebula_cert) => Some("no nebula-cert"),
            _ => None,
        }
    }

    /// Returns the version that a network's program prints; `None` for Skein and the kernel's
    /// networks.
    pub fn version(&self, overlay: Overlay) -> Option<String> {
        let (program, argument) = match overlay {
            Overlay::WireguardGo => (self.wireguard_go.as_ref()?, "--version"),
            Overlay::Nebula => (self.nebula.as_ref()?, "-version"),
            _ => return None,
        };
        let output = Command::new(program).arg(argument).output().ok()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        Some(text.lines().next()?.trim().to_owned())
    }
}

/// Starts a process of wireguard-go on each node and returns the processes.
///
/// # Errors
/// If a program is missing or fails, or if an interface does not appear.
pub fn wireguard_go(lab: &Lab, tools: &Tools) -> Result<Vec<Process>> {
    let program = tools.wireguard_go.as_deref().context("no wireguard-go")?;
    let wg = tools.wg.as_deref().context("no wg")?;
    let keys = lab.nodes.iter().map(|_| wireguard_key(wg)).collect::<Result<Vec<_>>>()?;
    let mut daemons = vec![];
    for (node, peer) in pairs(lab) {
        // The control socket of wireguard-go has the name of the interface and is in a directory
        // that all network namespaces share.
        let interface = format!("w{}{}", std::process::id(), node.index);
        let log = lab.directory().join(format!("wireguard-{}.log", node.index));
        let mut command = node.ns.command(program);
        command.args(["--foreground", &interface]).env("WG_PROCESS_FOREGROUND", "1");
        let mut daemon = Process::start(&mut command, &log)?;
        wait_for_interface(&node.ns, &interface, &mut daemon)?;
        daemons.push(daemon);

        let (own, other) = (&keys[usize::from(node.index)], &keys[usize::from(peer.index)]);
        let config = format!(
            "[Interface]\nPrivateKey = {}\nListenPort = 51820\n\n[Peer]\nPublicKey = {}\n\
             Endpoint = {}:51820\nAllowedIPs = {}, {}\n",
            own.0,
            other.1,
            peer.underlay(Family::V4),
            peer.pod_cidr(Family::V4),
            peer.pod_cidr(Family::V6)
        );
        let path = lab.directory().join(format!("wireguard-{}.conf", node.index));
        fs::write(&path, config)?;
        process::run(node.ns.command(wg).args(["setconf", &interface]).arg(&path))?;
        node.ns.ip_batch(&[
            format!("address add 10.244.{}.1/32 dev {interface}", node.index + 1),
            format!("link set {interface} mtu 1440 txqueuelen 1000 up"),
            format!("route add {} dev {interface}", peer.pod_cidr(Family::V4)),
        ])?;
    }
    Ok(daemons)
}

fn wireguard_key(wg: &Path) -> Result<(String, String)> {
    let private = process::run(Command::new(wg).arg("genkey"))?;
    let public = process::run_with_input(Command::new(wg).arg("pubkey"), private.as_bytes())?;
    Ok((private.trim().to_owned(), public.trim().to_owned()))
}

/// Starts Nebula on both nodes and returns the processes. The certificates contain the prefixes of
/// the pods as subnets.
///
/// # Errors
/// If a program is missing or fails, or if an interface does not appear.
pub fn nebula(lab: &Lab, tools: &Tools) -> Result<Vec<Process>> {
    let program = tools.nebula.as_deref().context("no nebula")?;
    let cert = tools.nebula_cert.as_deref().context("no nebula-cert")?;
    let directory = lab.directory().join("nebula");
    fs::create_dir_all(&directory)?;
    let sign = |arguments: &[&str]| {
        process::run(Command::new(cert).args(arguments).current_dir(&directory))
    };
    sign(&["ca", "-name", "laboratory"])?;
    let mut daemons = vec![];
    for (node, peer) in pairs(lab) {
        let (own, other) = (node.index + 1, peer.index + 1);
        let cidr = node.pod_cidr(Family::V4);
        let ip = format!("10.99.0.{own}/24");
        sign(&["sign", "-name", &node.name, "-ip", &ip, "-subnets", &cidr])?;
        let file = |suffix: &str| directory.join(format!("{}.{suffix}", node.name));
        let config = format!(
            r#"pki: {{ca: "{ca}", cert: "{cert}", key: "{key}"}}
static_host_map: {{"10.99.0.{other}": ["{endpoint}:4242"]}}
lighthouse: {{am_lighthouse: false, hosts: []}}
listen: {{host: 0.0.0.0, port: 4242, read_buffer: 8388608, write_buffer: 8388608}}
punchy: {{punch: false}}
tun:
  dev: nebula0
  mtu: 1440
  tx_queue: 1000
  unsafe_routes:
    - {{route: {route}, via: 10.99.0.{other}, mtu: 1440}}
logging: {{level: warning, format: text}}
firewall:
  default_local_cidr_any: true
  conntrack: {{tcp_timeout: 12m, udp_timeout: 3m, default_timeout: 10m}}
  outbound: [{{port: any, proto: any, host: any}}]
  inbound: [{{port: any, proto: any, host: any}}]
{extra}"#,
            ca = directory.join("ca.crt").display(),
            cert = file("crt").display(),
            key = file("key").display(),
            endpoint = peer.underlay(Family::V4),
            route = peer.pod_cidr(Family::V4),
            extra = tools.nebula_extra,
        );
        fs::write(file("yml"), config)?;
        let mut command = node.ns.command(program);
        command.arg("-config").arg(file("yml"));
        let mut daemon = Process::start(&mut command, &file("log"))?;
        wait_for_interface(&node.ns, "nebula0", &mut daemon)?;
        daemons.push(daemon);
    }
    Ok(daemons)
}

fn wait_for_interface(ns: &skein_lab::Netns, interface: &str, daemon: &mut Process) -> Result<()> {
    let end = std::time::Instant::now() + std::time::Duration::from_secs(10);
    loop {
        daemon.check_alive()?;
        if ns.interfaces()?.iter().any(|name| name == interface) {
            return Ok(());
        }
        if std::time::Instant::now() > end {
            anyhow::bail!("the interface {interface} did not appear: {}", daemon.log_tail(10));
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}
