//! Throughput between two pods, measured by iperf3.

use std::net::IpAddr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::Netns;
use crate::process::{self, Process};
use crate::registry;

/// Kind of traffic that iperf3 sends.
#[derive(Debug, Clone, Copy)]
pub enum Flow {
    /// TCP on parallel connections.
    Tcp {
        /// Number of connections.
        streams: u32,
    },
    /// UDP at a fixed rate.
    Udp {
        /// Payload of a datagram, bytes.
        payload: u32,
        /// Rate, megabits per second.
        megabits: u32,
    },
}

/// Result of a run of iperf3.
#[derive(Debug, Clone, Copy)]
pub struct Outcome {
    /// Rate of received data, bits per second.
    pub bits_per_second: f64,
    /// Number of bytes that were received.
    pub bytes: f64,
    /// Number of TCP retransmits; 0 for UDP.
    pub retransmits: f64,
    /// Lost UDP datagrams, percent; 0 for TCP.
    pub lost_percent: f64,
}

/// An iperf3 server that runs as long as this value exists.
pub struct Server {
    process: Process,
    directory: std::path::PathBuf,
}

impl Server {
    /// Starts `iperf3 --server` in a pod and waits until it listens.
    ///
    /// # Errors
    /// If iperf3 cannot be started, exits, or does not listen after 30 s.
    pub fn start(pod: &Netns) -> Result<Self> {
        let directory = registry::directory("iperf")?;
        let mut command = pod.command("iperf3");
        command.args(["--server", "--forceflush"]);
        let log = directory.join("server.log");
        let mut server = Self { process: Process::start(&mut command, &log)?, directory };
        let end = Instant::now() + Duration::from_secs(30);
        while !server.process.log_tail(5).contains("Server listening") {
            server.process.check_alive()?;
            if Instant::now() > end {
                bail!("iperf3 does not listen: {}", server.process.log_tail(5));
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.process.kill();
        registry::remove_directory(&self.directory);
    }
}

/// Returns the socket buffer to request: 2 MiB, or the host's maximum if that is less. iperf3
/// refuses to run with a smaller buffer than requested.
fn udp_window() -> u64 {
    let limit = |name: &str| {
        let text = std::fs::read_to_string(format!("/proc/sys/net/core/{name}")).ok()?;
        text.trim().parse::<u64>().ok()
    };
    [limit("rmem_max"), limit("wmem_max")].into_iter().flatten().fold(2 << 20, u64::min)
}

/// Sends from a pod to a [`Server`] at `to` for `seconds`. If `reverse` is true, the server sends.
///
/// # Errors
/// If iperf3 fails, or does not exit within 20 s after the end of the measurement.
pub fn run(from: &Netns, to: IpAddr, flow: Flow, seconds: u32, reverse: bool) -> Result<Outcome> {
    let mut command = from.command("iperf3");
    command.args(["--json", "--client", &to.to_string(), "--time", &seconds.to_string()]);
    command.args(["--connect-timeout", "5000"]);
    match flow {
        Flow::Tcp { streams } => {
            command.args(["--parallel", &streams.to_string()]);
        }
        Flow::Udp { payload, megabits } => {
            command.args(["--udp", "--length", &payload.to_string()]);
            command.args(["--bitrate", &format!("{megabits}M")]);
            // The default buffer holds 20 ms of traffic: a receiver that waits longer for a CPU
            // would lose datagrams that the network has delivered.
            command.args(["--window", &udp_window().to_string()]);
        }
    }
    if reverse {
        command.arg("--reverse");
    }
    let limit = Duration::from_secs(u64::from(seconds) + 20);
    let finished = process::finish(&mut command, &[], limit)?;
    let json: Value = serde_json::from_str(&finished.stdout)
        .with_context(|| format!("iperf3 wrote no JSON: {}", finished.stderr))?;
    if let Some(error) = json["error"].as_str() {
        bail!("iperf3 to {to}: {error}");
    }
    let end = &json["end"];
    let number = |value: &Value| value.as_f64().unwrap_or(0.0);
    match flow {
        Flow::Tcp { .. } => Ok(Outcome {
            bits_per_second: number(&end["sum_received"]["bits_per_second"]),
            bytes: number(&end["sum_received"]["bytes"]),
            retransmits: number(&end["sum_sent"]["retransmits"]),
            lost_percent: 0.0,
        }),
        Flow::Udp { .. } => {
            // "sum" counts the datagrams of the sender, "lost_percent" those that the receiver
            // missed.
            let lost = number(&end["sum"]["lost_percent"]);
            let received = 1.0 - lost / 100.0;
            Ok(Outcome {
                bits_per_second: number(&end["sum"]["bits_per_second"]) * received,
                bytes: number(&end["sum"]["bytes"]) * received,
                retransmits: 0.0,
                lost_percent: lost,
            })
        }
    }
}
