//! `cargo e2e bench-pods`: time and CPU time of ADD and DEL for many pods at once. Skein's plugin
//! is compared with the reference plugins `ptp` and `host-local`, and with `ip` alone.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use comfy_table::Table;
use comfy_table::presets::UTF8_BORDERS_ONLY;
use serde_json::{Value, json};

use skein_lab::agent::Cluster;
use skein_lab::console::Console;
use skein_lab::load::median;
use skein_lab::process::machine_busy_seconds;
use skein_lab::{Family, Lab, Netns, Plan, cni, process};
use skein_lab::{cargo, packages};

/// Options of `cargo e2e bench-pods`.
#[derive(Debug, Args)]
pub struct Options {
    /// Number of pods that are added and removed at once, 1 to 1000
    #[arg(long, default_value_t = 100)]
    pods: usize,
    /// Number of rounds, over which the table shows medians
    #[arg(long, default_value_t = 5)]
    rounds: usize,
}

const NETWORKS: [Network; 3] = [Network::Kernel, Network::Reference, Network::Skein];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Network {
    /// `ip`, which creates a veth pair and a route, without an address and without a file.
    Kernel,
    /// The plugin `ptp` with `host-local`, of containernetworking-plugins.
    Reference,
    Skein,
}

/// Result of one operation (ADD or DEL) for all pods of a round.
#[derive(Debug, Default)]
struct Outcome {
    /// Time of each pod, sorted, milliseconds.
    each: Vec<f64>,
    /// Time from the first start to the last end, milliseconds.
    all: f64,
    /// CPU time of the whole machine, milliseconds per pod.
    cpu: f64,
}

/// Runs `cargo e2e bench-pods`: measures, and prints a table.
///
/// # Errors
/// If an option is out of range, if a package cannot be installed, if the agents cannot be built or
/// started, or if a plugin fails.
pub fn run(options: &Options) -> Result<()> {
    if !(1..=1000).contains(&options.pods) || options.rounds == 0 {
        bail!("an option is out of range. Use 1 to 1000 for --pods, and 1 or more for --rounds.");
    }
    let console = Console::new();
    packages::ensure(&[packages::DEMO, packages::TEST], &console)?;
    console.step("building skein-agent and skein-cni (release)");
    console.pause(cargo::build_agent)?;
    let lab = Lab::new(&Plan { nodes: 2, pods: 0, ..Plan::default() })?;
    let mut cluster = Cluster::prepare(lab, Family::V4)?;
    cluster.verbose = false;
    for agent in &mut cluster.agents {
        agent.serve_pods()?;
        // The reference plugins are configured for IPv4 only, so Skein serves only IPv4, too.
        agent.record.pod_cidrs.retain(|cidr| !cidr.contains(':'));
    }
    for agent in &cluster.agents {
        cluster.agents.iter().try_for_each(|other| agent.put_record(&other.record))?;
    }
    cluster.start()?;
    let namespaces: Vec<Netns> =
        (0..options.pods).map(|n| Netns::create(&format!("b{n}"))).collect::<Result<_>>()?;
    let mut outcomes: Vec<[Vec<Outcome>; 2]> = NETWORKS.map(|_| [vec![], vec![]]).into();
    for round in 1..=options.rounds {
        for (network, outcomes) in NETWORKS.iter().zip(&mut outcomes) {
            console.step(&format!("round {round}, {network:?}"));
            let bench = Bench { network: *network, cluster: &cluster, namespaces: &namespaces };
            for (operation, outcomes) in ["ADD", "DEL"].iter().zip(outcomes) {
                outcomes.push(bench.run_all(operation)?);
            }
        }
    }
    drop(console);
    println!("Pods at once: {}. Medians over rounds: {}.", options.pods, options.rounds);
    println!("{}", table(&outcomes));
    Ok(())
}

fn table(outcomes: &[[Vec<Outcome>; 2]]) -> Table {
    let mut table = Table::new();
    table.load_preset(UTF8_BORDERS_ONLY);
    table.set_header(["network", "operation", "p50 ms", "p99 ms", "all ms", "CPU ms per pod"]);
    for (network, outcomes) in NETWORKS.iter().zip(outcomes) {
        for (operation, rounds) in ["ADD", "DEL"].iter().zip(outcomes) {
            let of = |pick: &dyn Fn(&Outcome) -> f64| {
                format!("{:.1}", median(rounds.iter().map(pick)).unwrap_or_default())
            };
            let at = |share: f64| {
                move |outcome: &Outcome| {
                    let last = outcome.each.len().saturating_sub(1);
                    outcome.each.get((last as f64 * share).round() as usize).copied().unwrap_or(0.0)
                }
            };
            table.add_row([
                format!("{network:?}"),
                (*operation).to_owned(),
                of(&at(0.5)),
                of(&at(0.99)),
                of(&|outcome| outcome.all),
                of(&|outcome| outcome.cpu),
            ]);
        }
    }
    table
}

struct Bench<'a> {
    network: Network,
    cluster: &'a Cluster,
    namespaces: &'a [Netns],
}

impl Bench<'_> {
    /// Runs one operation for all pods, which start at the same moment.
    fn run_all(&self, operation: &str) -> Result<Outcome> {
        let mut commands = (0..self.namespaces.len())
            .map(|index| self.command(operation, index))
            .collect::<Result<Vec<_>>>()?;
        let start = Barrier::new(commands.len() + 1);
        let (each, all, cpu) = thread::scope(|scope| -> Result<_> {
            let workers: Vec<_> = commands
                .iter_mut()
                .map(|(command, input)| {
                    let start = &start;
                    scope.spawn(move || -> Result<f64> {
                        start.wait();
                        let began = Instant::now();
                        let finished = process::finish(command, input, Duration::from_secs(60))?;
                        let took = began.elapsed().as_secs_f64() * 1e3;
                        if finished.code != 0 {
                            bail!("{}{}", finished.stdout, finished.stderr);
                        }
                        Ok(took)
                    })
                })
                .collect();
            start.wait();
            let (began, busy) = (Instant::now(), machine_busy_seconds());
            let mut each = workers
                .into_iter()
                .map(|worker| worker.join().map_err(|_| anyhow::anyhow!("a worker panicked"))?)
                .collect::<Result<Vec<f64>>>()?;
            each.sort_by(f64::total_cmp);
            let all = began.elapsed().as_secs_f64() * 1e3;
            Ok((each, all, (machine_busy_seconds() - busy) * 1e3))
        })
        .with_context(|| format!("{:?} {operation}", self.network))?;
        Ok(Outcome { cpu: cpu / each.len() as f64, each, all })
    }

    /// Returns the command for one pod and its standard input.
    fn command(&self, operation: &str, index: usize) -> Result<(Command, Vec<u8>)> {
        let node = &self.cluster.lab.nodes[0].ns;
        let (pod, id) = (&self.namespaces[index], format!("b{index}"));
        // `ip netns exec` would also create a mount namespace, which a runtime on the node does not
        // need.
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", cni::path(node)));
        if self.network == Network::Kernel {
            command.args(["ip", "-batch", "-"]);
            let lines = match operation {
                "ADD" => format!(
                    "link add v{index} type veth peer name eth0 netns {pod}\n\
                     link set v{index} up\n\
                     route add 10.9.{high}.{low}/32 dev v{index}\n\
                     netns exec {pod} ip link set eth0 up\n",
                    pod = pod.name(),
                    high = index / 250,
                    low = index % 250 + 1,
                ),
                _ => format!("link delete v{index}\n"),
            };
            return Ok((command, lines.into_bytes()));
        }
        let (program, input) = match self.network {
            Network::Skein => (cni::binary()?, self.skein()?),
            _ => (PathBuf::from("/usr/lib/cni/ptp"), self.reference()),
        };
        command.arg(program);
        command.env("CNI_COMMAND", operation).env("CNI_PATH", "/usr/lib/cni");
        command.env("CNI_CONTAINERID", &id).env("CNI_IFNAME", "eth0");
        command.env("CNI_NETNS", cni::path(pod));
        Ok((command, input.to_string().into_bytes()))
    }

    fn skein(&self) -> Result<Value> {
        let runtime = cni::Runtime::new(&self.cluster.agents[0], &self.cluster.lab.nodes[0])?;
        let mut configuration = runtime.configuration;
        configuration["cniVersion"] = "1.0.0".into();
        Ok(configuration)
    }

    fn reference(&self) -> Value {
        let directory: &Path = self.cluster.lab.directory();
        json!({
            "cniVersion": "1.0.0", "name": "reference", "type": "ptp",
            "ipam": {
                "type": "host-local", "dataDir": directory.join("host-local"),
                "ranges": [[{ "subnet": "10.8.0.0/16" }]], "routes": [{ "dst": "0.0.0.0/0" }],
            },
        })
    }
}
