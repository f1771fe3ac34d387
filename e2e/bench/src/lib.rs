//! `cargo e2e bench`: comparison of networks by the same workloads between two pods.
//!
//! A round measures every network once, each in new namespaces. Results show medians over the
//! rounds, so that a drift of the machine's speed affects all networks alike.

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

/// Options of `cargo e2e bench`.
#[derive(Debug, Args)]
pub struct Options {
    /// Number of rounds, over which the tables show medians
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Seconds for each workload
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=60))]
    seconds: u32,
    /// Networks to compare: routed, vxlan, skein, wireguard-go, nebula and the variants of Skein
    /// (skein-1-lane, skein-4-lanes, skein-no-busy-poll, skein-no-seccomp, skein-chacha20,
    /// skein-no-uso, skein-no-tso, skein-no-checksum, skein-no-gso, skein-no-gro,
    /// skein-no-bundling, skein-no-offload)
    #[arg(long, value_delimiter = ',', default_value = "routed,vxlan,skein,wireguard-go,nebula")]
    only: Vec<Overlay>,
    /// Workloads to run
    #[arg(long = "works", value_enum, value_delimiter = ',', default_values_t = Workload::ALL)]
    workloads: Vec<Workload>,
    /// Underlays: ideal (a veth with all offloads), wire (no segmentation offload, GRO on) or jumbo
    /// (all offloads and an MTU of 9000 with the usual MTU of pods)
    #[arg(long, value_enum, value_delimiter = ',', default_value = "ideal,wire")]
    modes: Vec<Mode>,
    /// Directory for results.json, results.md and the plots
    #[arg(long, default_value = "out/bench")]
    out: PathBuf,
    /// Path of a wireguard-go program to use instead of Debian's
    #[arg(long)]
    wireguard_go: Option<PathBuf>,
    /// Path of a nebula program to use instead of Debian's, with nebula-cert in the same directory
    #[arg(long)]
    nebula: Option<PathBuf>,
    /// File with further lines for Nebula's configuration (YAML)
    #[arg(long)]
    nebula_extra: Option<PathBuf>,
    /// Earlier results.json to print as tables and plots again, without a measurement
    #[arg(long)]
    again: Option<PathBuf>,
}

/// Properties of the underlay.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, ValueEnum, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// A veth with all offloads
    Ideal,
    /// No segmentation offload, GRO on
    Wire,
    /// An MTU of 9000 and all offloads, with the usual MTU of pods
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

/// Result of one workload over one network in one round.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Sample {
    /// Number of the round, from 1.
    pub round: u32,
    /// Underlay of the network.
    pub mode: Mode,
    /// Network that was measured.
    pub overlay: Overlay,
    /// Kind of traffic.
    #[serde(rename = "work")]
    pub workload: Workload,
    /// Measured values of the workload.
    pub values: measure::Values,
}

/// All results of a run, the content of results.json.
#[derive(Debug, Serialize, Deserialize)]
pub struct Results {
    /// Machine on which the run was made.
    pub machine: measure::Machine,
    /// Duration of each workload, seconds.
    pub seconds: u32,
    /// Results of all workloads.
    pub samples: Vec<Sample>,
    /// Messages about networks that could not be measured.
    pub notes: Vec<String>,
}

/// Runs `cargo e2e bench`: measures, and writes tables and plots.
///
/// # Errors
/// If a package cannot be installed, if the agent cannot be built, if the files cannot be read or
/// written, or if no workload could be measured. The failure of one network is a note in the
/// results.
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
        bail!("no workload could be measured");
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
    let packaged = [Overlay::WireguardGo, Overlay::Nebula];
    if options.only.iter().any(|overlay| packaged.contains(overlay)) {
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
                // Each round starts with another network.
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

/// Measurement of one network in one round.
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

/// Guard that raises the host's socket buffers, so that all programs have equal, large buffers,
/// whether they request them or not. A full receive buffer would cause most losses and retransmits.
struct HostBuffers;

impl HostBuffers {
    fn raise() -> Result<Self> {
        // The kernel doubles a requested buffer of 8 MiB, such as Nebula's, to 16 MiB. Programs
        // that request none get the same by default.
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
