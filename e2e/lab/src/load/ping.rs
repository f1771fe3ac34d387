//! ICMP echo requests between two pods, sent by `ping`.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::Signal;

use crate::Netns;
use crate::process::{self, Process};

/// Parameters of a series of pings.
#[derive(Debug, Clone, Copy)]
pub struct Ping {
    /// Number of echo requests.
    pub count: u32,
    /// Interval between two requests, milliseconds.
    pub interval_ms: u32,
    /// Payload, bytes, without the ICMP header (8 bytes) and the IP header.
    pub payload: u32,
    /// Forbids fragmentation (DF), also by this host.
    pub whole: bool,
}

impl Default for Ping {
    fn default() -> Self {
        Self { count: 3, interval_ms: 50, payload: 56, whole: false }
    }
}

/// Result of a series of pings.
#[derive(Debug, Clone)]
pub struct Answers {
    /// Number of requests.
    pub sent: u32,
    /// Number of answers.
    pub received: u32,
    /// Mean round-trip time, milliseconds; `None` without an answer.
    pub mean_ms: Option<f64>,
    /// Output of `ping`.
    pub text: String,
}

impl Answers {
    /// Returns whether requests were sent and all were answered.
    pub fn complete(&self) -> bool {
        self.sent > 0 && self.sent == self.received
    }
}

/// Pings `to` from a namespace. A lost ping is not an error.
///
/// # Errors
/// If `ping` cannot be started, sends nothing, or does not exit.
pub fn ping(from: &Netns, to: IpAddr, ping: Ping) -> Result<Answers> {
    let mut command = from.command("ping");
    command.args(["-n", "-c", &ping.count.to_string(), "-s", &ping.payload.to_string()]);
    command.args(["-i", &format!("{:.3}", f64::from(ping.interval_ms) / 1000.0), "-W", "1"]);
    command.args(["-M", if ping.whole { "do" } else { "dont" }]).arg(to.to_string());
    let limit = Duration::from_millis(u64::from(ping.count * ping.interval_ms)) * 2;
    let finished = process::finish(&mut command, &[], limit + Duration::from_secs(20))?;
    Answers::parse(finished.stdout + &finished.stderr).with_context(|| format!("ping {to}"))
}

/// A running `ping`, which sends requests until [`Pings::end`].
#[derive(Debug)]
pub struct Pings {
    process: Process,
    interval: Duration,
}

impl Pings {
    /// Starts to ping `to` from a namespace at every `interval`. The output goes to the file `log`.
    ///
    /// # Errors
    /// If `ping` cannot be started.
    pub fn start(from: &Netns, to: IpAddr, interval: Duration, log: &Path) -> Result<Self> {
        let mut command = from.command("ping");
        command.args(["-n", "-i", &format!("{:.3}", interval.as_secs_f64())]).arg(to.to_string());
        Ok(Self { process: Process::start(&mut command, log)?, interval })
    }

    /// Stops `ping` and returns the number of lost pings and the longest time without an answer.
    ///
    /// # Errors
    /// If `ping` does not exit within 30 s, or if no request was answered.
    pub fn end(mut self) -> Result<Loss> {
        // Waits for answers that are still on their way.
        std::thread::sleep(Duration::from_millis(200));
        self.process.signal(Signal::INT)?;
        let end = Instant::now() + Duration::from_secs(30);
        while self.process.exited().is_none() {
            ensure!(Instant::now() < end, "ping did not exit within 30 s");
            std::thread::sleep(Duration::from_millis(10));
        }
        Loss::parse(&std::fs::read_to_string(self.process.log())?, self.interval)
    }
}

/// Lost pings between the first and the last answered one.
#[derive(Debug, Clone, Copy)]
pub struct Loss {
    /// Number of requests from the first to the last answered one.
    pub sent: u32,
    /// Number of requests without an answer.
    pub lost: u32,
    /// Duration of the longest series of lost requests.
    pub longest: Duration,
}

impl Loss {
    /// Parses the output of a `ping` that sent one request per `interval`.
    ///
    /// # Errors
    /// If no request was answered.
    pub fn parse(text: &str, interval: Duration) -> Result<Self> {
        let number = |line: &str| line.split("icmp_seq=").nth(1)?.split(' ').next()?.parse().ok();
        let answered: BTreeSet<u32> =
            text.lines().filter(|line| line.contains("time=")).filter_map(number).collect();
        let (Some(first), Some(last)) = (answered.first(), answered.last()) else {
            bail!("no answer: {text}");
        };
        let gaps = answered.iter().zip(answered.iter().skip(1)).map(|(a, b)| b - a - 1);
        Ok(Self {
            sent: last - first + 1,
            lost: gaps.clone().sum(),
            longest: interval * gaps.max().unwrap_or(0),
        })
    }
}

impl std::fmt::Display for Loss {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { sent, lost, longest } = self;
        write!(
            f,
            "{lost} of {sent} pings lost, longest series of lost pings: {} ms",
            longest.as_millis()
        )
    }
}

impl Answers {
    /// Parses the output of `ping`.
    fn parse(text: String) -> Result<Self> {
        let summary = text.lines().find(|line| line.contains("packets transmitted"));
        let summary = summary.with_context(|| text.clone())?;
        let number = |word: &str| -> Option<u32> {
            let before = summary.split(word).next()?.trim().rsplit([' ', ',']).next()?;
            before.parse().ok()
        };
        let mean = text.lines().find(|line| line.starts_with("rtt"));
        let mean =
            mean.and_then(|line| line.split('=').nth(1)?.trim().split('/').nth(1)?.parse().ok());
        Ok(Self {
            sent: number(" packets transmitted").unwrap_or(0),
            received: number(" received").unwrap_or(0),
            mean_ms: mean,
            text,
        })
    }
}
