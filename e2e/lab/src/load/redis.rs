//! A redis server in one pod and its benchmark in another.

use std::net::IpAddr;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use super::Latency;
use crate::Netns;
use crate::process::{self, Process};
use crate::registry;

const PORT: &str = "6379";

/// A redis server that runs as long as this value exists.
pub struct Server {
    process: Process,
    directory: PathBuf,
}

impl Server {
    /// Starts a server without persistence in a pod and waits until it accepts connections.
    ///
    /// # Errors
    /// If redis cannot be started, exits, or accepts no connection after 30 s.
    pub fn start(pod: &Netns, address: IpAddr) -> Result<Self> {
        let directory = registry::directory("redis")?;
        let mut command = pod.command("redis-server");
        command.args(["--bind", &address.to_string(), "--port", PORT]);
        command.args(["--protected-mode", "no", "--save", "", "--appendonly", "no"]);
        command.arg("--dir").arg(&directory);
        let log = directory.join("server.log");
        let mut server = Self { process: Process::start(&mut command, &log)?, directory };
        let end = Instant::now() + Duration::from_secs(30);
        while !server.process.log_tail(20).contains("Ready to accept connections") {
            server.process.check_alive()?;
            if Instant::now() > end {
                bail!("redis does not start: {}", server.process.log_tail(20));
            }
            thread::sleep(Duration::from_millis(10));
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

/// Result of `redis-benchmark`.
#[derive(Debug, Clone, Copy)]
pub struct Outcome {
    /// Rate of GET requests, requests per second.
    pub per_second: f64,
    /// Total number of requests.
    pub requests: f64,
    /// Latency of a request.
    pub latency: Latency,
}

/// Runs `redis-benchmark` with `requests` GET requests over `clients` connections.
///
/// # Errors
/// If the benchmark fails, or does not exit within 120 s.
pub fn get(from: &Netns, server: IpAddr, clients: u32, requests: u64) -> Result<Outcome> {
    let mut command = from.command("redis-benchmark");
    command.args(["-h", &server.to_string(), "-p", PORT, "-t", "get", "--csv"]);
    command.args(["-c", &clients.to_string(), "-n", &requests.to_string()]);
    let finished = process::finish(&mut command, &[], Duration::from_secs(120))?;
    // "test","rps","avg_latency_ms","min…","p50…","p95…","p99…","max…"
    let line = finished.stdout.lines().find(|line| line.starts_with("\"GET\""));
    let line = line.with_context(|| format!("redis-benchmark: {}", finished.stderr))?;
    let fields: Vec<f64> =
        line.split(',').skip(1).filter_map(|f| f.trim_matches('"').parse().ok()).collect();
    let field = |i: usize| fields.get(i).copied().with_context(|| format!("short line: {line}"));
    Ok(Outcome {
        per_second: field(0)?,
        requests: requests as f64,
        latency: Latency { p50: field(3)? * 1000.0, p99: field(5)? * 1000.0 },
    })
}
