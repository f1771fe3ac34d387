//! `cargo e2e bench-pods`: what attaching and detaching pods costs, by the plugins' own binaries,
//! all at once, beside the reference plugins `ptp` and `host-local` and beside what the kernel
//! alone takes.

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

/// How much.
#[derive(Debug, Args)]
pub struct Options {
    /// Pods that come and go at once.
    #[arg(long, default_value_t = 100)]
    pods: usize,
    /// Rounds; medians are shown.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
}

const NETWORKS: [Network; 3] = [Network::Kernel, Network::Reference, Network::Skein];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Network {
    /// `ip` makes a veth pair with an address and a route, and no file.
    Kernel,
    /// ptp with host-local, of containernetworking-plugins.
    Reference,
    Skein,
}

/// One verb over all pods of a round.
#[derive(Debug, Default)]
struct Outcome {
    /// Of each pod, sorted, in milliseconds.
    each: Vec<f64>,
    /// From the first start to the last end, in milliseconds.
    all: f64,
    /// CPU time of the whole machine, in milliseconds a pod.
    cpu: f64,
}

/// Runs the command.
pub fn run(options: &Options) -> Result<()> {
    if !(1..=1000).contains(&options.pods) || options.rounds == 0 {
        bail!("--pods: use 1 to 1000; --rounds: use 1 or more");
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
        // The reference has one family as well.
        agent.record.pod_cidrs.retain(|cidr| !cidr.contains(':'));
    }
    for agent in &cluster.agents {
        cluster.agents.iter().try_for_each(|other| agent.put_record(&other.record))?;
    }
    cluster.start()?;
    let spaces: Vec<Netns> =
        (0..options.pods).map(|n| Netns::create(&format!("b{n}"))).collect::<Result<_>>()?;
    let mut outcomes: Vec<[Vec<Outcome>; 2]> = NETWORKS.map(|_| [vec![], vec![]]).into();
    for round in 1..=options.rounds {
        for (network, outcomes) in NETWORKS.iter().zip(&mut outcomes) {
            console.step(&format!("round {round}, {network:?}"));
            let bench = Bench { network: *network, cluster: &cluster, spaces: &spaces };
            for (verb, outcomes) in ["ADD", "DEL"].iter().zip(outcomes) {
                outcomes.push(bench.all(verb)?);
            }
        }
    }
    drop(console);
    println!("{} pods at once, medians of {} rounds", options.pods, options.rounds);
    println!("{}", table(&outcomes));
    Ok(())
}

fn table(outcomes: &[[Vec<Outcome>; 2]]) -> Table {
    let mut table = Table::new();
    table.load_preset(UTF8_BORDERS_ONLY);
    table.set_header(["network", "verb", "p50 ms", "p99 ms", "all ms", "CPU ms a pod"]);
    for (network, outcomes) in NETWORKS.iter().zip(outcomes) {
        for (verb, rounds) in ["ADD", "DEL"].iter().zip(outcomes) {
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
                (*verb).to_owned(),
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
    spaces: &'a [Netns],
}

impl Bench<'_> {
    /// One verb for all pods, started at the same moment.
    fn all(&self, verb: &str) -> Result<Outcome> {
        let mut commands = (0..self.spaces.len())
            .map(|index| self.command(verb, index))
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
        .with_context(|| format!("{:?} {verb}", self.network))?;
        Ok(Outcome { cpu: cpu / each.len() as f64, each, all })
    }

    /// What is run for one pod, and its standard input.
    fn command(&self, verb: &str, index: usize) -> Result<(Command, Vec<u8>)> {
        let node = &self.cluster.lab.nodes[0].ns;
        let (pod, id) = (&self.spaces[index], format!("b{index}"));
        // Not `ip netns exec`, which makes a mount namespace as well: a runtime is in its node
        // already.
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", cni::path(node)));
        if self.network == Network::Kernel {
            command.args(["ip", "-batch", "-"]);
            let lines = match verb {
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
        command.env("CNI_COMMAND", verb).env("CNI_PATH", "/usr/lib/cni");
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
