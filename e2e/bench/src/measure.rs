//! Measured values: CPU time during a workload, and properties of the machine.

use std::fs;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::baselines::Tools;
use super::overlay::{Network, Overlay};
use skein_lab::process::machine_busy_seconds;

/// Result of a workload. Its unit of work is a Gbit, a packet, a round trip or a request
/// ([`Workload::units`](super::workloads::Workload::units)).
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Values {
    /// Rate of received units, per second.
    pub rate: f64,
    /// CPU time of the whole machine, seconds per unit.
    pub total_cpu: f64,
    /// CPU time of the overlay's daemons, seconds per unit.
    pub daemon_cpu: f64,
    /// Median latency, microseconds; `None` if the workload does not measure latencies.
    pub p50: Option<f64>,
    /// 99th percentile of the latency, microseconds.
    pub p99: Option<f64>,
    /// Number of TCP retransmits; `None` for other workloads than TCP throughput.
    pub retransmits: Option<f64>,
    /// Share of lost datagrams, 0 to 1; `None` for other workloads than UDP.
    pub lost: Option<f64>,
    /// Share of the busiest lane in the first node's datagrams, 0 to 1; `None` without lanes.
    #[serde(default)]
    pub busiest_lane: Option<f64>,
}

/// Meter of the CPU time and of the lanes' datagrams since its start.
pub struct Meter<'a> {
    network: &'a Network,
    daemon: f64,
    machine: f64,
    lanes: Vec<f64>,
    start: Instant,
}

impl<'a> Meter<'a> {
    /// Starts the measurement.
    pub fn start(network: &'a Network) -> Self {
        Self {
            network,
            lanes: network.lane_packets(),
            daemon: network.daemon_cpu(),
            machine: machine_busy_seconds(),
            start: Instant::now(),
        }
    }

    /// Ends the measurement of a workload that completed `units` units at `rate` units per second.
    pub fn stop(self, units: f64, rate: f64) -> Values {
        let units = units.max(f64::MIN_POSITIVE);
        let total_cpu = (machine_busy_seconds() - self.machine) / units;
        let daemon_cpu = (self.network.daemon_cpu() - self.daemon) / units;
        let now = self.network.lane_packets();
        let datagrams: Vec<f64> =
            now.iter().zip(&self.lanes).map(|(now, start)| now - start).collect();
        let busiest = datagrams.iter().copied().reduce(f64::max);
        let busiest_lane = busiest.map(|busiest| busiest / datagrams.iter().sum::<f64>().max(1.0));
        Values { rate, total_cpu, daemon_cpu, busiest_lane, ..Values::default() }
    }

    /// Returns the time since the start, seconds.
    pub fn seconds(&self) -> f64 {
        self.start.elapsed().as_secs_f64()
    }
}

/// Properties of the machine on which a run was made.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Machine {
    /// Model of the processor.
    pub processor: String,
    /// Number of available CPUs.
    pub cpus: usize,
    /// Release of the kernel.
    pub kernel: String,
    /// Load average over the last minute before the start.
    pub load: f64,
    /// Versions of the other overlays' programs.
    pub versions: Vec<(Overlay, String)>,
}

impl Machine {
    /// Describes this machine, with the versions of the programs of `overlays`.
    pub fn here(overlays: &[Overlay], tools: &Tools) -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = cpuinfo.lines().find(|line| line.starts_with("model name"));
        let model = model.and_then(|line| line.split(": ").nth(1)).unwrap_or("unknown");
        let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let version = |&overlay: &Overlay| Some((overlay, tools.version(overlay)?));
        Self {
            processor: model.to_owned(),
            cpus: std::thread::available_parallelism().map_or(0, usize::from),
            kernel: kernel.trim().to_owned(),
            load: load.split(' ').next().and_then(|n| n.parse().ok()).unwrap_or(0.0),
            versions: overlays.iter().filter_map(version).collect(),
        }
    }
}
