//! Numbers: CPU time around a workload, the machine, medians.

use std::fs;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::baselines::Tools;
use super::overlay::{Network, Overlay};
use skein_lab::process::machine_busy_seconds;

/// What one workload brought. A unit of workload is a Gbit, a packet, a round trip or a request.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Values {
    /// Units a second that arrived.
    pub rate: f64,
    /// CPU time of the whole machine in seconds a unit.
    pub total_cpu: f64,
    /// CPU time of the overlay's daemons in seconds a unit.
    pub daemon_cpu: f64,
    /// Median latency in microseconds.
    pub p50: Option<f64>,
    /// 99th percentile of the latency in microseconds.
    pub p99: Option<f64>,
    /// TCP retransmits.
    pub retransmits: Option<f64>,
    /// Datagrams lost, as a share.
    pub lost: Option<f64>,
    /// Share of the first node's datagrams that its busiest lane moved.
    #[serde(default)]
    pub busiest_lane: Option<f64>,
}

/// CPU time from its start on.
pub struct Meter<'a> {
    network: &'a Network,
    daemon: f64,
    machine: f64,
    lanes: Vec<f64>,
    start: Instant,
}

impl<'a> Meter<'a> {
    /// Starts.
    pub fn start(network: &'a Network) -> Self {
        Self {
            network,
            lanes: network.lane_packets(),
            daemon: network.daemon_cpu(),
            machine: machine_busy_seconds(),
            start: Instant::now(),
        }
    }

    /// Ends; `units` of workload were done, at `rate` a second.
    pub fn stop(self, units: f64, rate: f64) -> Values {
        let units = units.max(f64::MIN_POSITIVE);
        let total_cpu = (machine_busy_seconds() - self.machine) / units;
        let daemon_cpu = (self.network.daemon_cpu() - self.daemon) / units;
        let now = self.network.lane_packets();
        let moved: Vec<f64> = now.iter().zip(&self.lanes).map(|(now, then)| now - then).collect();
        let busiest = moved.iter().copied().reduce(f64::max);
        let busiest_lane = busiest.map(|busiest| busiest / moved.iter().sum::<f64>().max(1.0));
        Values { rate, total_cpu, daemon_cpu, busiest_lane, ..Values::default() }
    }

    /// Seconds since the start.
    pub fn seconds(&self) -> f64 {
        self.start.elapsed().as_secs_f64()
    }
}

/// Where and with what it was measured.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Machine {
    /// Model of the processor.
    pub processor: String,
    /// Number of CPUs.
    pub cpus: usize,
    /// Release of the kernel.
    pub kernel: String,
    /// Load average over the last minute before the start.
    pub load: f64,
    /// Versions of the networks' programs.
    pub versions: Vec<(Overlay, String)>,
}

impl Machine {
    /// This one.
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
