//! `cargo e2e bench`: the same works, pod to pod, over different networks, in one run.
//!
//! Every round takes every network once, each in namespaces made anew, so that a drift of the
//! machine meets all of them alike; the table shows medians over the rounds.

#![forbid(unsafe_code)]

pub mod baselines;
pub mod measure;
pub mod overlay;
pub mod plot;
pub mod pods;
pub mod report;
pub mod scale;
pub mod workloads;

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use skein_lab::console::Console;
use skein_lab::{Lab, Offloads, Plan, Underlay, registry};
use skein_lab::{cargo, packages};

use overlay::Overlay;
use workloads::Workload;

/// How to measure.
#[derive(Debug, Args)]
pub struct Options {
    /// Rounds; the tables show medians over them.
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Seconds for each workload.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=60))]
    seconds: u32,
    /// Networks to compare: routed, vxlan, skein, wireguard-go, nebula and the variants of Skein
    /// (skein-1-lane, skein-4-lanes, skein-no-busy-poll, skein-no-seccomp, skein-chacha20,
    /// skein-no-uso, skein-no-tso, skein-no-checksum, skein-no-gso, skein-no-gro,
    /// skein-no-bundling, skein-no-offload).
    #[arg(long, value_delimiter = ',', default_value = "routed,vxlan,skein,wireguard-go,nebula")]
    only: Vec<Overlay>,
    /// Works to do.
    #[arg(long = "works", value_enum, value_delimiter = ',', default_values_t = Workload::ALL)]
    workloads: Vec<Workload>,
    /// Underlay: ideal (a veth with all offloads), wire (no segmentation offload, GRO on) or jumbo
    /// (all offloads and an MTU of 9000; the pods keep theirs).
    #[arg(long, value_enum, value_delimiter = ',', default_value = "ideal,wire")]
    modes: Vec<Mode>,
    /// Directory for results.json, results.md and the plots.
    #[arg(long, default_value = "out/bench")]
    out: PathBuf,
    /// Another wireguard-go program than Debian's.
    #[arg(long)]
    wireguard_go: Option<PathBuf>,
    /// Another nebula program than Debian's (nebula-cert beside it).
    #[arg(long)]
    nebula: Option<PathBuf>,
    /// More lines for Nebula's configuration (YAML), for versions with settings of their own.
    #[arg(long)]
    nebula_extra: Option<PathBuf>,
    /// Make the tables and plots of an earlier results.json again, and measure nothing.
    #[arg(long)]
    again: Option<PathBuf>,
}

/// What the underlay can do.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, ValueEnum, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// A veth with all its offloads.
    Ideal,
    /// Without segmentation offload, GRO on.
    Wire,
    /// With an MTU of 9000 and all offloads, between pods whose MTU is as ever.
    Jumbo,
}

impl Mode {
    fn offloads(self) -> Offloads {
        match self {
            Mode::Ideal | Mode::Jumbo => Offloads::Ideal,
            Mode::Wire => Offloads::Wire,
        }
    }

    fn mtu(self) -> u32 {
        match self {
            Mode::Ideal | Mode::Wire => 1500,
            Mode::Jumbo => 9000,
        }
    }
}

/// One workload over one network in one round.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Sample {
    /// From 1.
    pub round: u32,
    /// The underlay.
    pub mode: Mode,
    /// The network.
    pub overlay: Overlay,
    /// What was done.
    #[serde(rename = "work")]
    pub workload: Workload,
    /// What was measured.
    pub values: measure::Values,
}

/// Everything of one run.
#[derive(Debug, Serialize, Deserialize)]
pub struct Results {
    /// The machine and the circumstances.
    pub machine: measure::Machine,
    /// Seconds for each workload.
    pub seconds: u32,
    /// All that was measured.
    pub samples: Vec<Sample>,
    /// What was absent or failed.
    pub notes: Vec<String>,
}

/// Runs the command.
pub fn run(options: &Options) -> Result<()> {
    let results = match &options.again {
        Some(path) => {
            let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
            serde_json::from_str(&text).context("not a results.json of this benchmark")?
        }
        None => measure_all(options)?,
    };
    let table = report::write(&results, &options.out)?;
    println!("{table}");
    println!("Written to {}: results.json, results.md, *.svg", options.out.display());
    if results.samples.is_empty() {
        bail!("nothing was measured");
    }
    Ok(())
}

fn measure_all(options: &Options) -> Result<Results> {
    let preparing = Console::new();
    packages::ensure(&[packages::DEMO], &preparing)?;
    if options.workloads.contains(&Workload::Redis) {
        packages::ensure(&[packages::BENCH], &preparing)?;
    }
    let mut notes = vec![];
    let baselines = [Overlay::WireguardGo, Overlay::Nebula];
    let wanted = options.only.iter().any(|overlay| baselines.contains(overlay));
    if wanted {
        notes.extend(packages::ensure_each(packages::BASELINES, &preparing));
    }
    if options.only.iter().any(|overlay| overlay.is_skein()) {
        preparing.step("building skein-agent (release)");
        preparing.pause(cargo::build_agent)?;
    }
    drop(preparing);

    let tools = baselines::Tools::find(options);
    let mut overlays = options.only.clone();
    overlays.retain(|&overlay| match tools.missing(overlay) {
        None => true,
        Some(what) => {
            notes.push(format!("{overlay} is absent: {what}"));
            false
        }
    });
    let buffers = HostBuffers::raise()?;
    let machine = measure::Machine::here(&overlays, &tools);
    let total = options.rounds as usize * options.modes.len() * overlays.len();
    let console = Console::with_total((total * options.workloads.len()) as u64);
    let mut samples = vec![];
    for round in 1..=options.rounds {
        for &mode in &options.modes {
            for at in 0..overlays.len() {
                // Another one starts in every round.
                let overlay = overlays[(at + round as usize - 1) % overlays.len()];
                let run = Run { round, mode, overlay, options, tools: &tools, console: &console };
                if let Err(error) = run.all(&mut samples) {
                    let note = format!("round {round}, {mode:?}, {overlay}: {error:#}");
                    console.print(&note);
                    notes.push(note);
                }
            }
        }
    }
    drop(buffers);
    Ok(Results { machine, seconds: options.seconds, samples, notes })
}

/// One network in one round.
struct Run<'a> {
    round: u32,
    mode: Mode,
    overlay: Overlay,
    options: &'a Options,
    tools: &'a baselines::Tools,
    console: &'a Console,
}

impl Run<'_> {
    fn all(&self, samples: &mut Vec<Sample>) -> Result<()> {
        let (round, mode, overlay) = (self.round, self.mode, self.overlay);
        let plan = Plan {
            underlay: Underlay::Direct,
            offloads: mode.offloads(),
            mtu: mode.mtu(),
            pod_mtu: overlay.pod_mtu(),
            ..Plan::default()
        };
        self.console.step(&format!("round {round}, {mode:?}, {overlay}"));
        let network = overlay::Network::up(Lab::new(&plan)?, overlay, self.tools)?;
        for &workload in &self.options.workloads {
            self.console.step(&format!("round {round}, {mode:?}, {overlay}: {workload}"));
            let values = workloads::run(workload, &network, self.options.seconds);
            self.console.advance();
            let values = values.with_context(|| format!("{workload}\n{}", network.logs()))?;
            samples.push(Sample { round, mode, overlay, workload, values });
        }
        Ok(())
    }
}

/// Equal and large socket buffers for everybody, also for programs that do not ask for them: most
/// of what is said of lost packets and retransmits is said of a full receive buffer.
struct HostBuffers;

impl HostBuffers {
    fn raise() -> Result<Self> {
        // A program that asks for 8 MiB gets an accounted 16 MiB; give the same to those who do
        // not ask.
        for key in ["rmem_max", "wmem_max", "rmem_default", "wmem_default"] {
            registry::set_host(&format!("net.core.{key}"), &(16 << 20).to_string())?;
        }
        Ok(Self)
    }
}

impl Drop for HostBuffers {
    fn drop(&mut self) {
        registry::restore_settings();
    }
}
