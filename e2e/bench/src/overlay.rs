//! Networks that the benchmark compares.

use std::fmt;
use std::str::FromStr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

use super::baselines::{self, Tools};
use skein_lab::agent::Cluster;
use skein_lab::load::ping::{Ping, ping};
use skein_lab::process::{Process, cpu_seconds};
use skein_lab::{Family, Lab, UNDERLAY};

/// A network between the nodes that the benchmark compares: an overlay, or plain routes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Overlay {
    /// Plain routes without an overlay.
    Routed,
    /// The kernel's VXLAN, without encryption.
    Vxlan,
    /// An agent of Skein on each node.
    Skein(Variant),
    /// WireGuard in user space, the program wireguard-go.
    WireguardGo,
    /// The overlay Nebula, without a lighthouse.
    Nebula,
}

/// Skein with its default configuration, or with changed settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Variant {
    /// Default configuration of the test lab, with no changed setting. The lab sets two lanes.
    Full,
    /// Configuration with one changed setting, an index in [`SETTINGS`].
    With(usize),
    /// Configuration with every switch of [`SETTINGS`] off: offloads, bundling and seccomp. Tables
    /// call it `skein-no-offload`.
    Bare,
}

/// Names of the variants, with the key and the value of the changed setting.
const SETTINGS: [(&str, &str, Setting); 11] = [
    ("skein-no-uso", "offload.tun_uso", Setting::Off),
    ("skein-no-tso", "offload.tun_tso", Setting::Off),
    ("skein-no-checksum", "offload.tun_checksum", Setting::Off),
    ("skein-no-gso", "offload.udp_gso", Setting::Off),
    ("skein-no-gro", "offload.udp_gro", Setting::Off),
    ("skein-no-bundling", "dataplane.bundling", Setting::Off),
    ("skein-no-busy-poll", "dataplane.busy_poll_us", Setting::Number(0)),
    ("skein-no-seccomp", "dataplane.seccomp", Setting::Off),
    ("skein-1-lane", "dataplane.lanes", Setting::Number(1)),
    ("skein-4-lanes", "dataplane.lanes", Setting::Number(4)),
    ("skein-chacha20", "dataplane.cipher", Setting::Text("chacha20-poly1305")),
];

/// Value of a setting in the configuration.
#[derive(Debug, Clone, Copy)]
enum Setting {
    Off,
    Number(i64),
    Text(&'static str),
}

impl Overlay {
    /// Returns whether this is a variant of Skein.
    pub fn is_skein(self) -> bool {
        matches!(self, Overlay::Skein(_))
    }

    /// Returns the largest MTU of pods over an underlay with an MTU of 1500 bytes.
    pub fn pod_mtu(self) -> u32 {
        match self {
            Overlay::Routed => 1500,
            Overlay::Vxlan => 1450,
            // All three add 60 bytes: IPv4 (20), UDP (8), a header (16) and an AEAD tag (16).
            Overlay::Skein(_) | Overlay::WireguardGo | Overlay::Nebula => 1440,
        }
    }
}

impl fmt::Display for Overlay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self {
            Overlay::Routed => "routed",
            Overlay::Vxlan => "vxlan",
            Overlay::WireguardGo => "wireguard-go",
            Overlay::Nebula => "nebula",
            Overlay::Skein(Variant::Full) => "skein",
            Overlay::Skein(Variant::Bare) => "skein-no-offload",
            Overlay::Skein(Variant::With(setting)) => {
                SETTINGS.get(*setting).map_or("skein-?", |(name, ..)| name)
            }
        };
        f.pad(name)
    }
}

impl FromStr for Overlay {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        Ok(match text {
            "routed" => Overlay::Routed,
            "vxlan" => Overlay::Vxlan,
            "wireguard-go" => Overlay::WireguardGo,
            "nebula" => Overlay::Nebula,
            "skein" => Overlay::Skein(Variant::Full),
            "skein-no-offload" => Overlay::Skein(Variant::Bare),
            other => match SETTINGS.iter().position(|(name, ..)| *name == other) {
                Some(setting) => Overlay::Skein(Variant::With(setting)),
                None => return Err(format!("unknown network {other}")),
            },
        })
    }
}

impl TryFrom<String> for Overlay {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Overlay> for String {
    fn from(overlay: Overlay) -> String {
        overlay.to_string()
    }
}

/// A laboratory of two nodes whose pods communicate over one network.
pub struct Network {
    daemons: Vec<Process>,
    /// Laboratory with Skein; `None` for the other networks.
    skein: Option<Cluster>,
    /// Laboratory of a network other than Skein (WireGuard, Nebula, VXLAN, routes); `None` for
    /// Skein, whose laboratory is in `skein`.
    plain: Option<Lab>,
}

impl Network {
    /// Sets up the network and waits until the pods reach each other.
    ///
    /// # Errors
    /// If a route, an interface or a daemon cannot be set up, or if the pods do not reach each
    /// other.
    pub fn up(lab: Lab, overlay: Overlay, tools: &Tools) -> Result<Self> {
        for node in &lab.nodes {
            node.enable_forwarding()?;
        }
        let mut daemons = vec![];
        let mut network = match overlay {
            Overlay::Skein(variant) => {
                let cluster = skein(lab, variant)?;
                Self { daemons, skein: Some(cluster), plain: None }
            }
            _ => {
                match overlay {
                    Overlay::Vxlan => vxlan(&lab)?,
                    Overlay::WireguardGo => daemons = baselines::wireguard_go(&lab, tools)?,
                    Overlay::Nebula => daemons = baselines::nebula(&lab, tools)?,
                    _ => routed(&lab)?,
                }
                Self { daemons, skein: None, plain: Some(lab) }
            }
        };
        network.wait()?;
        Ok(network)
    }

    /// Returns the laboratory of the network.
    pub fn lab(&self) -> &Lab {
        match (&self.skein, &self.plain) {
            (Some(cluster), _) => &cluster.lab,
            (None, Some(lab)) => lab,
            (None, None) => unreachable!("a network has a cluster or a laboratory"),
        }
    }

    /// Returns the CPU time that all daemons have used, seconds.
    pub fn daemon_cpu(&self) -> f64 {
        let mut pids: Vec<i32> = self.daemons.iter().map(Process::pid).collect();
        if let Some(cluster) = &self.skein {
            pids.extend(cluster.agents.iter().flat_map(|agent| agent.pids()));
        }
        cpu_seconds(&pids)
    }

    /// Returns the number of datagrams that each lane of the first node has sent and received;
    /// empty if the network is not Skein.
    pub fn lane_packets(&self) -> Vec<f64> {
        let agent = self.skein.as_ref().and_then(|cluster| cluster.agents.first());
        let Some(Ok(report)) = agent.map(|agent| agent.report()) else { return vec![] };
        let packets = |lane: &serde_json::Value, direction: &str| {
            lane[direction]["outer_packets"].as_f64().unwrap_or(0.0)
        };
        let lanes = report["lanes"].as_array().map_or(&[][..], Vec::as_slice);
        lanes.iter().map(|lane| packets(lane, "egress") + packets(lane, "ingress")).collect()
    }

    /// Returns the ends of the daemons' logs.
    pub fn logs(&self) -> String {
        let own = self.daemons.iter().map(|process| process.log_tail(10));
        let own = own.collect::<Vec<_>>().join("\n");
        self.skein.as_ref().map_or(own, Cluster::logs)
    }

    fn wait(&mut self) -> Result<()> {
        let end = Instant::now() + Duration::from_secs(15);
        loop {
            for daemon in &mut self.daemons {
                daemon.check_alive()?;
            }
            let (a, b) = (self.lab().pod(0), self.lab().pod(1));
            let once = Ping { count: 1, ..Ping::default() };
            let answers = ping(&a.ns, b.address(Family::V4), once)?;
            if answers.complete() {
                return Ok(());
            }
            if Instant::now() > end {
                bail!("the pods do not reach each other: {}\n{}", answers.text, self.logs());
            }
            thread::sleep(Duration::from_millis(50));
        }
    }
}

fn routed(lab: &Lab) -> Result<()> {
    for (node, peer) in pairs(lab) {
        let (cidr, via) = (peer.pod_cidr(Family::V4), peer.underlay(Family::V4));
        node.ns.ip(&format!("route add {cidr} via {via} dev {UNDERLAY}"))?;
    }
    Ok(())
}

fn vxlan(lab: &Lab) -> Result<()> {
    for (node, peer) in pairs(lab) {
        let (local, remote) = (node.underlay(Family::V4), peer.underlay(Family::V4));
        node.ns.ip_batch(&[
            format!(
                "link add vxlan0 mtu 1450 type vxlan id 7 local {local} remote {remote} \
                 dstport 4789 dev {UNDERLAY}"
            ),
            format!("address add 10.244.{}.1/16 dev vxlan0", node.index + 1),
            "link set vxlan0 up".to_owned(),
            format!(
                "route add {} via 10.244.{}.1 dev vxlan0",
                peer.pod_cidr(Family::V4),
                peer.index + 1
            ),
        ])?;
    }
    Ok(())
}

fn skein(lab: Lab, variant: Variant) -> Result<Cluster> {
    let mut cluster = Cluster::prepare(lab, Family::V4)?;
    cluster.verbose = false;
    for agent in &mut cluster.agents {
        match variant {
            Variant::Full => {}
            Variant::With(setting) => {
                let (_, key, value) = SETTINGS[setting];
                match value {
                    Setting::Off => agent.set(key, false),
                    Setting::Number(number) => agent.set(key, number),
                    Setting::Text(text) => agent.set(key, text),
                }
            }
            Variant::Bare => {
                let switches = SETTINGS.iter().filter(|(.., value)| matches!(value, Setting::Off));
                switches.for_each(|(_, key, _)| agent.set(key, false));
            }
        }
    }
    cluster.start().context("cannot start the agents")?;
    Ok(cluster)
}

/// Returns each of two nodes together with the other node.
pub(super) fn pairs(lab: &Lab) -> impl Iterator<Item = (&skein_lab::Node, &skein_lab::Node)> {
    lab.nodes.iter().zip(lab.nodes.iter().rev())
}
