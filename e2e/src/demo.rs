//! `cargo e2e demo`: a demonstration of the encrypted overlay with two nodes and two pods, which
//! are removed at the end.

use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use clap::Args;
use comfy_table::presets::UTF8_BORDERS_ONLY;
use comfy_table::{CellAlignment, Table};
use serde_json::Value;

use skein_lab::agent::{Cluster, Metrics};
use skein_lab::console::Console;
use skein_lab::load::iperf::{self, Flow};
use skein_lab::load::ping::{Ping, ping};
use skein_lab::{Family, Lab, Plan, registry};
use skein_lab::{cargo, packages};

/// Options of `cargo e2e demo`.
#[derive(Debug, Args)]
pub struct Options {
    /// Seconds for each throughput test
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=60))]
    seconds: u32,
}

/// Inner MTU over an IPv4 underlay of 1500 bytes.
const POD_MTU: u32 = 1440;

/// Runs `cargo e2e demo`.
///
/// # Errors
/// If a package cannot be installed, if the agents cannot be built or started, if traffic does not
/// arrive, or if something is left on the host.
pub fn run(options: &Options) -> Result<()> {
    let start = Instant::now();
    let console = Console::new();
    packages::ensure(&[packages::DEMO], &console)?;
    console.step("building skein-agent (release)");
    console.pause(cargo::build_agent_without_kubernetes)?;
    registry::prepare();
    console.step("creating two nodes and two pods (network namespaces)");
    let lab = Lab::new(&Plan { pod_mtu: POD_MTU, ..Plan::default() })?;
    console.step("starting an agent on each node");
    let mut cluster = Cluster::prepare(lab, Family::V4)?;
    cluster.verbose = false;
    cluster.start()?;

    console.print(&layout(&cluster));
    console.step("pinging between the pods, both directions");
    console.print(&pings(&cluster).with_context(|| cluster.logs())?);
    console.step("measuring TCP between the pods, both directions");
    console.print(&throughput(&cluster, options.seconds).with_context(|| cluster.logs())?);
    console.print(&offloads(&cluster)?);
    console.print(&packets(&cluster)?);

    console.step("removing everything");
    let agents_ended = cluster.agents.iter_mut().map(|agent| agent.stop());
    for code in agents_ended.collect::<Result<Vec<_>>>()? {
        if code != 0 {
            bail!("an agent ended with code {code}\n{}", cluster.logs());
        }
    }
    drop(cluster);
    let own = format!("-{}-", std::process::id());
    let left: Vec<String> = registry::existing().into_iter().filter(|n| n.contains(&own)).collect();
    if !left.is_empty() {
        bail!("left behind: {}", left.join(", "));
    }
    let seconds = start.elapsed().as_secs();
    console.print(&format!("The demonstration succeeded and removed everything ({seconds} s)."));
    Ok(())
}

fn layout(cluster: &Cluster) -> String {
    let mut lines = vec![
        "Two nodes on one switch, one pod on each; every packet between the \
                          pods is encrypted.\n"
            .to_owned(),
    ];
    for (node, agent) in cluster.lab.nodes.iter().zip(&cluster.agents) {
        let pod = &node.pods[0];
        lines.push(format!(
            "  {}  underlay {}  pods {} and {}\n          key {}\n          pod {} and {}",
            node.name,
            agent.record.endpoints[0],
            agent.record.pod_cidrs[0],
            agent.record.pod_cidrs[1],
            agent.record.public_key,
            pod.v4,
            pod.v6,
        ));
    }
    lines.join("\n") + "\n"
}

/// Returns the indexes of the sending and the receiving node for both directions, with a text.
fn directions(cluster: &Cluster) -> [(usize, usize, String); 2] {
    let name = |i: usize| format!("pod on {}", cluster.lab.nodes[i].name);
    [(0, 1), (1, 0)].map(|(from, to)| (from, to, format!("{} → {}", name(from), name(to))))
}

fn pings(cluster: &Cluster) -> Result<String> {
    let mut table = new_table(&["ping", "IPv4", "IPv6"]);
    for (from, to, way) in directions(cluster) {
        let mut row = vec![way];
        for family in Family::BOTH {
            let (from, to) = (cluster.lab.pod(from), cluster.lab.pod(to));
            // The first ping waits for the handshake.
            ping(&from.ns, to.address(family), Ping { count: 1, ..Ping::default() })?;
            let answers = ping(&from.ns, to.address(family), Ping { count: 5, ..Ping::default() })?;
            if !answers.complete() {
                bail!("pings to {} were lost: {}", to.address(family), answers.text);
            }
            row.push(format!("{:.3} ms", answers.mean_ms.unwrap_or(0.0)));
        }
        table.add_row(row);
    }
    Ok(right_aligned(table))
}

fn throughput(cluster: &Cluster, seconds: u32) -> Result<String> {
    let mut table = new_table(&["TCP, 1 stream", "IPv4", "IPv6"]);
    for (from, to, way) in directions(cluster) {
        let (from, to) = (cluster.lab.pod(from), cluster.lab.pod(to));
        let _server = iperf::Server::start(&to.ns)?;
        let mut row = vec![way];
        for family in Family::BOTH {
            let flow = Flow::Tcp { streams: 1 };
            let outcome = iperf::run(&from.ns, to.address(family), flow, seconds, false)?;
            let rate = outcome.bits_per_second * 1e-9;
            row.push(format!("{rate:.2} Gb/s, {} retransmits", outcome.retransmits));
        }
        table.add_row(row);
    }
    Ok(right_aligned(table))
}

fn offloads(cluster: &Cluster) -> Result<String> {
    let mut table = new_table(&["offload", "node-a", "node-b"]);
    let reports = cluster.agents.iter().map(|agent| agent.report()).collect::<Result<Vec<_>>>()?;
    let capabilities =
        |report: &Value| report["capabilities"].as_array().cloned().unwrap_or_default();
    let (a, b) = (capabilities(&reports[0]), capabilities(&reports[1]));
    if a.is_empty() {
        bail!("no capabilities in the agent's report: {}", reports[0]);
    }
    let text = |capability: &Value| {
        let state = capability["state"].as_str().unwrap_or("?").replace('_', " ");
        capability["reason"].as_str().map_or(state.clone(), |reason| format!("{state} ({reason})"))
    };
    for (a, b) in a.iter().zip(&b) {
        table.add_row([a["name"].as_str().unwrap_or("?").to_owned(), text(a), text(b)]);
    }
    Ok(table.to_string())
}

fn packets(cluster: &Cluster) -> Result<String> {
    let title = ["since the start", "inner packets", "outer packets", "calls", "per call"];
    let mut table = new_table(&title);
    for agent in &cluster.agents {
        let metrics = agent.metrics()?;
        for (direction, label) in [("egress", "sent"), ("ingress", "received")] {
            let row = Row::of(&metrics, direction);
            if row.inner == 0.0 || row.outer == 0.0 {
                bail!("the metrics of {} count no {direction} packets", agent.record.name);
            }
            table.add_row([
                format!("{} {label}", agent.record.name),
                format!("{}", row.inner),
                format!("{}", row.outer),
                format!("{}", row.calls),
                format!("{:.1}", row.outer / row.calls.max(1.0)),
            ]);
        }
    }
    Ok(right_aligned(table))
}

/// Packet counters of one direction.
struct Row {
    /// Packets in the tunnel.
    inner: f64,
    /// Datagrams on the underlay.
    outer: f64,
    /// System calls that sent or received datagrams.
    calls: f64,
}

impl Row {
    fn of(metrics: &Metrics, direction: &str) -> Self {
        let label = format!("direction=\"{direction}\"");
        let sum = |name: &str| metrics.sum(name, &[&label]);
        Self {
            inner: sum("skein_inner_packets_total"),
            outer: sum("skein_outer_packets_total"),
            calls: sum("skein_packets_per_call_count"),
        }
    }
}

fn new_table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(UTF8_BORDERS_ONLY).set_header(header);
    table
}

fn right_aligned(mut table: Table) -> String {
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}
