//! Workloads of the benchmark, and their measurement.

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Result;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::measure::{Meter, Values};
use super::overlay::Network;
use skein_lab::Family;
use skein_lab::load::{iperf, redis, rr, udp};

/// A kind of traffic.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, ValueEnum, Serialize, Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum Workload {
    /// One TCP connection at full speed
    Tcp1,
    /// Four TCP connections at full speed
    Tcp4,
    /// UDP with 64 bytes, 100,000 datagrams per second
    Udp64,
    /// UDP with 64 bytes at full speed
    Udp64Flood,
    /// UDP with 1000 bytes, 50,000 datagrams per second
    Udp1000,
    /// UDP with 1000 bytes at full speed
    Udp1000Flood,
    /// Round trips of one byte over one TCP connection, one at a time
    RequestResponse,
    /// GET requests to redis by 50 clients
    Redis,
}

impl Workload {
    /// All workloads in the order of their declaration.
    pub const ALL: [Self; 8] = [
        Self::Tcp1,
        Self::Tcp4,
        Self::Udp64,
        Self::Udp64Flood,
        Self::Udp1000,
        Self::Udp1000Flood,
        Self::RequestResponse,
        Self::Redis,
    ];

    /// Returns the title of the workload in tables.
    pub fn title(self) -> &'static str {
        match self {
            Workload::Tcp1 => "TCP, 1 stream",
            Workload::Tcp4 => "TCP, 4 streams",
            Workload::Udp64 => "UDP 64 B, 100 kpps offered",
            Workload::Udp64Flood => "UDP 64 B, flood",
            Workload::Udp1000 => "UDP 1000 B, 50 kpps offered",
            Workload::Udp1000Flood => "UDP 1000 B, flood",
            Workload::RequestResponse => "TCP request/response",
            Workload::Redis => "redis GET, 50 clients",
        }
    }

    /// Returns the unit of the rate and of the CPU time in tables, each with the factor by which a
    /// value of [`Values`] is multiplied: (rate, factor, CPU time, factor).
    pub fn units(self) -> (&'static str, f64, &'static str, f64) {
        match self {
            Workload::Tcp1 | Workload::Tcp4 => ("Gb/s", 1.0, "s/Gbit", 1.0),
            Workload::RequestResponse => ("kops", 1e-3, "µs/op", 1e6),
            Workload::Redis => ("kops", 1e-3, "µs/op", 1e6),
            _ => ("kpps", 1e-3, "µs/packet", 1e6),
        }
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.title())
    }
}

/// Runs a workload of `seconds` from the first node's pod to the second's.
///
/// # Errors
/// If a program cannot be started or fails, or if data arrives changed over TCP.
pub fn run(workload: Workload, network: &Network, seconds: u32) -> Result<Values> {
    match workload {
        Workload::Tcp1 => tcp(network, 1, seconds),
        Workload::Tcp4 => tcp(network, 4, seconds),
        Workload::Udp64 => datagrams(network, 64, Some(100_000), seconds),
        Workload::Udp64Flood => datagrams(network, 64, None, seconds),
        Workload::Udp1000 => datagrams(network, 1000, Some(50_000), seconds),
        Workload::Udp1000Flood => datagrams(network, 1000, None, seconds),
        Workload::RequestResponse => request_response(network, seconds),
        Workload::Redis => redis_get(network, seconds),
    }
}

fn tcp(network: &Network, streams: u32, seconds: u32) -> Result<Values> {
    let (a, b) = (network.lab().pod(0), network.lab().pod(1));
    let _server = iperf::Server::start(&b.ns)?;
    let meter = Meter::start(network);
    let flow = iperf::Flow::Tcp { streams };
    let outcome = iperf::run(&a.ns, b.address(Family::V4), flow, seconds, false)?;
    let values = meter.stop(outcome.bytes * 8e-9, outcome.bits_per_second * 1e-9);
    Ok(Values { retransmits: Some(outcome.retransmits), ..values })
}

fn datagrams(network: &Network, payload: usize, rate: Option<u64>, seconds: u32) -> Result<Values> {
    let (a, b) = (network.lab().pod(0), network.lab().pod(1));
    let to = SocketAddr::new(b.address(Family::V4), 7000);
    let load = udp::Load { payload, rate, duration: Duration::from_secs(seconds.into()) };
    let meter = Meter::start(network);
    let outcome = udp::run(&a.ns, &b.ns, to, load)?;
    let received = outcome.received as f64;
    let values = meter.stop(received, received / outcome.seconds);
    Ok(Values { lost: Some(1.0 - received / outcome.sent.max(1) as f64), ..values })
}

fn request_response(network: &Network, seconds: u32) -> Result<Values> {
    let (a, b) = (network.lab().pod(0), network.lab().pod(1));
    let to = SocketAddr::new(b.address(Family::V4), 7001);
    let meter = Meter::start(network);
    let outcome = rr::run(&a.ns, &b.ns, to, Duration::from_secs(seconds.into()))?;
    // The count excludes the first tenth of the duration.
    let rate = outcome.count as f64 / (0.9 * f64::from(seconds));
    let count = rate * meter.seconds();
    let values = meter.stop(count, rate);
    let latency = outcome.latency;
    Ok(Values { p50: Some(latency.p50), p99: Some(latency.p99), ..values })
}

fn redis_get(network: &Network, seconds: u32) -> Result<Values> {
    let (a, b) = (network.lab().pod(0), network.lab().pod(1));
    let address = b.address(Family::V4);
    let _server = redis::Server::start(&b.ns, address)?;
    let meter = Meter::start(network);
    let outcome = redis::get(&a.ns, address, 50, 40_000 * u64::from(seconds))?;
    let values = meter.stop(outcome.requests, outcome.per_second);
    let latency = outcome.latency;
    Ok(Values { p50: Some(latency.p50), p99: Some(latency.p99), ..values })
}
