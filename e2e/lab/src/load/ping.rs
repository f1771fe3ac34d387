//! `ping` between two pods.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::Signal;

use crate::Netns;
use crate::process::{self, Process};

/// How to ping.
#[derive(Debug, Clone, Copy)]
pub struct Ping {
    /// Echo requests.
    pub count: u32,
    /// Time between two, in milliseconds.
    pub interval_ms: u32,
    /// Payload in bytes (without ICMP's 8 and the IP header).
    pub payload: u32,
    /// Forbid fragments (DF), also those that this host would make.
    pub whole: bool,
}

impl Default for Ping {
    fn default() -> Self {
        Self { count: 3, interval_ms: 50, payload: 56, whole: false }
    }
}

/// What came back.
#[derive(Debug, Clone)]
pub struct Answers {
    /// Requests sent.
    pub sent: u32,
    /// Answers received.
    pub received: u32,
    /// Mean round trip in milliseconds, where there was any.
    pub mean_ms: Option<f64>,
    /// What ping printed.
    pub text: String,
}

impl Answers {
    /// Whether every request was answered.
    pub fn complete(&self) -> bool {
        self.sent > 0 && self.sent == self.received
    }
}

/// Pings `to` from inside a namespace. No answer is no error.
pub fn ping(from: &Netns, to: IpAddr, ping: Ping) -> Result<Answers> {
    let mut command = from.command("ping");
    command.args(["-n", "-c", &ping.count.to_string(), "-s", &ping.payload.to_string()]);
    command.args(["-i", &format!("{:.3}", f64::from(ping.interval_ms) / 1000.0), "-W", "1"]);
    command.args(["-M", if ping.whole { "do" } else { "dont" }]).arg(to.to_string());
    let limit = Duration::from_millis(u64::from(ping.count * ping.interval_ms)) * 2;
    let finished = process::finish(&mut command, &[], limit + Duration::from_secs(20))?;
    Answers::parse(finished.stdout + &finished.stderr).with_context(|| format!("ping {to}"))
}

/// A running `ping`.
#[derive(Debug)]
pub struct Pings {
    process: Process,
    interval: Duration,
}

impl Pings {
    /// Starts to ping `to` from inside a namespace every `interval`; the output goes to the file
    /// `log`.
    ///
    /// # Errors
    /// `ping` cannot be started.
    pub fn start(from: &Netns, to: IpAddr, interval: Duration, log: &Path) -> Result<Self> {
        let mut command = from.command("ping");
        command.args(["-n", "-i", &format!("{:.3}", interval.as_secs_f64())]).arg(to.to_string());
        Ok(Self { process: Process::start(&mut command, log)?, interval })
    }

    /// Ends the pings; returns the number of lost pings and the longest time without an answer.
    ///
    /// # Errors
    /// `ping` does not end within thirty seconds, or no request was answered.
    pub fn end(mut self) -> Result<Loss> {
        // Waits for answers that are still on their way.
        std::thread::sleep(Duration::from_millis(200));
        self.process.signal(Signal::INT)?;
        let end = Instant::now() + Duration::from_secs(30);
        while self.process.exited().is_none() {
            ensure!(Instant::now() < end, "ping does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
        Loss::parse(&std::fs::read_to_string(self.process.log())?, self.interval)
    }
}

/// Pings that were lost between the first and the last that was answered.
#[derive(Debug, Clone, Copy)]
pub struct Loss {
    /// Echo requests.
    pub sent: u32,
    /// Requests without an answer.
    pub lost: u32,
    /// Duration of the longest series of lost requests.
    pub longest: Duration,
}

impl Loss {
    /// Parses the output of a `ping` that sent one request per `interval`.
    ///
    /// # Errors
    /// No request was answered.
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
        write!(f, "{lost} of {sent} pings lost, {} ms in a row", longest.as_millis())
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
