//! Traffic with each offload capability forced off, and with UDP_SEGMENT refused at run time.

use std::fs;
use std::io::Write as _;
use std::net::Ipv4Addr;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use skein_lab::agent::{Agent, Cluster};
use skein_lab::checks;
use skein_lab::{Family, Lab, Netns, Offloads, Plan};

/// Names of the offload capabilities.
const CAPABILITIES: [&str; 6] =
    ["tun_uso", "tun_tso", "tun_checksum", "udp_gso", "udp_gro", "udp_ecn"];

/// Returns the state of an offload capability in an agent's report.
fn state(agent: &Agent, capability: &str) -> Result<String> {
    let report = agent.report()?;
    let capabilities = report["capabilities"].as_array().context("no capabilities")?;
    let found = capabilities.iter().find(|found| found["name"] == capability);
    let found = found.with_context(|| format!("no {capability} in {capabilities:?}"))?;
    Ok(found["state"].as_str().context("no state")?.to_owned())
}

/// Returns the offload capabilities that this kernel supports, as `skein-agent check` reports them.
fn possible(agent: &Agent) -> Result<Vec<&'static str>> {
    let checked = agent.run_command(&["check", "-o", "json"])?;
    let probes: Vec<Value> = serde_json::from_str(&checked.stdout).context(checked.stderr)?;
    let works = |capability: &str| {
        let name = if capability == "udp_gso" { "udp_segment" } else { capability };
        probes.iter().any(|probe| probe["name"] == name && probe["ok"] == true)
    };
    Ok(CAPABILITIES.into_iter().filter(|capability| works(capability)).collect())
}

/// Returns the expected state of a capability if those in `off` are forced off.
fn wanted_state(capability: &str, off: &[&str], possible: &[&str]) -> &'static str {
    let without_checksum =
        off.contains(&"tun_checksum") && ["tun_uso", "tun_tso"].contains(&capability);
    if off.contains(&capability) {
        "forced_off"
    } else if without_checksum || !possible.contains(&capability) {
        "unsupported"
    } else {
        "on"
    }
}

/// Runs mixed traffic with the capabilities `off` forced off on `nodes`, and checks the states of
/// all capabilities.
fn without(off: &[&str], nodes: &[usize], plan: &Plan) -> Result<()> {
    let mut cluster = Cluster::prepare(Lab::new(plan)?, Family::V4)?;
    for &node in nodes {
        for capability in off {
            cluster.agents[node].set(&format!("offload.{capability}"), false);
        }
    }
    cluster.start()?;
    let possible = possible(&cluster.agents[0])?;
    for (node, agent) in cluster.agents.iter().enumerate() {
        for capability in CAPABILITIES {
            let off = if nodes.contains(&node) { off } else { &[] };
            let (state, wanted) =
                (state(agent, capability)?, wanted_state(capability, off, &possible));
            ensure!(
                state == wanted,
                "{capability} is {state} instead of {wanted} with {off:?} off."
            );
        }
    }
    checks::mixed_traffic(&cluster.lab, 6 << 20).with_context(|| format!("{off:?} off"))
}

#[test]
fn without_tun_uso() -> Result<()> {
    without(&["tun_uso"], &[0, 1], &Plan::default())
}

#[test]
fn without_tun_tso() -> Result<()> {
    without(&["tun_tso"], &[0, 1], &Plan::default())
}

/// The capabilities tun_uso and tun_tso need tun_checksum, and are unsupported without it.
#[test]
fn without_tun_checksum() -> Result<()> {
    without(&["tun_checksum"], &[0, 1], &Plan::default())
}

#[test]
fn without_tun_uso_and_tso() -> Result<()> {
    without(&["tun_uso", "tun_tso"], &[0, 1], &Plan::default())
}

#[test]
fn without_any_tun_offload() -> Result<()> {
    without(&["tun_uso", "tun_tso", "tun_checksum"], &[0, 1], &Plan::default())
}

#[test]
fn without_udp_gso() -> Result<()> {
    without(&["udp_gso"], &[0, 1], &Plan::default())
}

#[test]
fn without_udp_gro() -> Result<()> {
    without(&["udp_gro"], &[0, 1], &Plan::default())
}

#[test]
fn without_any_offload() -> Result<()> {
    without(&CAPABILITIES, &[0, 1], &Plan::default())
}

#[test]
fn without_any_offload_on_one_side() -> Result<()> {
    without(&CAPABILITIES, &[1], &Plan::default())
}

#[test]
fn without_any_offload_on_a_wire() -> Result<()> {
    without(&CAPABILITIES, &[0], &Plan { offloads: Offloads::Wire, ..Plan::default() })
}

#[test]
fn with_chacha20_one_lane_and_no_bundling() -> Result<()> {
    let mut cluster = Cluster::prepare(Lab::new(&Plan::default())?, Family::V6)?;
    cluster.agents[0].set("dataplane.cipher", "chacha20-poly1305");
    cluster.agents[0].set("dataplane.lanes", 1);
    cluster.agents[1].set("dataplane.lanes", 4);
    cluster.agents[1].set("dataplane.bundling", false);
    cluster.start()?;
    checks::mixed_traffic(&cluster.lab, 6 << 20)
}

/// Method by which sends with UDP_SEGMENT to one node fail with EIO.
enum Refusal {
    /// An IPsec policy on the route; the kernel itself returns EIO.
    Ipsec,
    /// A preloaded sendmmsg, for kernels without ESP. The file contains the refused address.
    Preloaded(PathBuf),
}

/// Parameters of the IPsec states.
const XFRM_PARAMETERS: &str = "proto esp spi 0x100 reqid 1 mode transport enc ecb(cipher_null)";

fn add_state(ns: &Netns, from: &str, to: &str) -> Result<()> {
    let mut command = ns.command("ip");
    command.args(["xfrm", "state", "add", "src", from, "dst", to]);
    skein_lab::process::run(command.args(XFRM_PARAMETERS.split(' ')).arg("")).map(drop)
}

/// Writes the address for which the preloaded library refuses UDP_SEGMENT: an IPv4 address as an
/// integer, or 0 for none. The file is written in place, because the agent's processes have mapped
/// it.
fn set_refused_address(file: &Path, address: i64) -> Result<()> {
    let file = fs::File::options().create(true).truncate(false).write(true).open(file)?;
    Ok(file.write_all_at(&address.to_ne_bytes(), 0)?)
}

impl Refusal {
    /// Prepares the refusal. Call it before the agent starts.
    fn prepare(agent: &mut Agent, directory: &Path) -> Result<Self> {
        let scratch = Netns::create("esp")?;
        if add_state(&scratch, "192.0.2.1", "192.0.2.2").is_ok() {
            return Ok(Self::Ipsec);
        }
        let file = directory.join("refuse-gso");
        set_refused_address(&file, 0)?;
        agent.preload("refuse_gso")?;
        let name = file.to_string_lossy().into_owned();
        agent.environment.push(("SKEIN_REFUSE_GSO".to_owned(), name));
        Ok(Self::Preloaded(file))
    }

    /// Writes the method to the standard error of the process, which the test runner does not
    /// capture.
    fn announce(&self) {
        let who = match self {
            Refusal::Ipsec => "the kernel, by an IPsec (xfrm) policy on the route",
            Refusal::Preloaded(_) => "a preloaded sendmmsg, as this kernel has no ESP",
        };
        let _ = writeln!(std::io::stderr(), "\nEIO comes from {who}");
    }

    /// Starts the refusal of sends from the first node to the second.
    fn start(&self, lab: &Lab) -> Result<()> {
        let (a, b) = (&lab.nodes[0], &lab.nodes[1]);
        let [from, to] = [a, b].map(|node| node.underlay(Family::V4).to_string());
        match self {
            Refusal::Ipsec => {
                add_state(&a.ns, &from, &to)?;
                add_state(&b.ns, &from, &to)?;
                let policy = format!("xfrm policy add dir out src {from} dst {to} proto udp");
                a.ns.ip(&(policy + " tmpl proto esp reqid 1 mode transport")).map(drop)
            }
            Refusal::Preloaded(file) => {
                set_refused_address(file, to.parse::<Ipv4Addr>()?.to_bits().into())
            }
        }
    }

    fn stop(&self, lab: &Lab) -> Result<()> {
        match self {
            Refusal::Ipsec => lab.nodes[0].ns.ip("xfrm policy flush").map(drop),
            Refusal::Preloaded(file) => set_refused_address(file, 0),
        }
    }
}

fn gso_towards(agent: &Agent, peer: &str) -> Result<bool> {
    let report: Value = agent.report()?;
    let peers = report["peers"].as_array().context("no peers")?;
    let found = peers.iter().find(|p| p["name"] == peer).context("no such peer")?;
    found["gso"].as_bool().context("no gso")
}

#[test]
fn gso_refused_by_one_route_loses_no_packet() -> Result<()> {
    // The MTU has space for the headers of IPsec and a full packet of the overlay.
    let plan = Plan { nodes: 3, mtu: 1600, ..Plan::default() };
    let mut cluster = Cluster::prepare(Lab::new(&plan)?, Family::V4)?;
    cluster.agents.iter_mut().for_each(|agent| agent.set("interface.mtu", 1420));
    let directory = cluster.lab.directory().to_owned();
    let refusal = Refusal::prepare(&mut cluster.agents[0], &directory)?;
    refusal.announce();
    cluster.start()?;
    checks::all_reach_all(&cluster.lab)?;
    let (a, b, c) = (cluster.lab.pod(0), cluster.lab.pod(1), cluster.lab.pod(2));
    checks::transfer(a, b, Family::V4, 10 << 20)?;
    let agent = &cluster.agents[0];
    let fallbacks = || agent.metrics().map(|metrics| metrics.sum("skein_gso_fallbacks_total", &[]));
    let before = fallbacks()?;
    ensure!(gso_towards(agent, "node-b")? && gso_towards(agent, "node-c")?);

    refusal.start(&cluster.lab)?;
    let transfer = checks::start_transfer(a, b, Family::V4, 40_000_000, Some(20_000_000))?;
    checks::eventually("GSO is off towards node-b", checks::EVENT_TIMEOUT, || {
        Ok(!gso_towards(agent, "node-b")?)
    })?;
    ensure!(gso_towards(agent, "node-c")?, "GSO is off towards node-c, too.");
    let udp_gso = state(agent, "udp_gso")?;
    ensure!(udp_gso == "degraded", "udp_gso is {udp_gso} instead of degraded.");
    transfer.join()?;
    ensure!(fallbacks()? > before, "No fallback is counted.");
    let lost = agent.metrics()?.sum("skein_drops_total", &["reason=\"send_error\""]);
    ensure!(lost == 0.0, "{lost} packets were dropped.");
    refusal.stop(&cluster.lab)?;
    checks::transfer(a, c, Family::V6, 5 << 20)?;

    checks::eventually("GSO is on again", Duration::from_secs(30), || {
        checks::transfer(a, b, Family::V4, 1 << 20)?;
        gso_towards(agent, "node-b")
    })?;
    let udp_gso = state(agent, "udp_gso")?;
    ensure!(udp_gso == "on", "udp_gso is {udp_gso} instead of on.");
    Ok(())
}
