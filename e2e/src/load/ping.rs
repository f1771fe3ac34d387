//! `ping` between two pods.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::lab::Netns;
use crate::lab::process;

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
    let text = finished.stdout + &finished.stderr;
    let summary = text.lines().find(|line| line.contains("packets transmitted"));
    let summary = summary.with_context(|| format!("ping {to}: {text}"))?;
    let number = |word: &str| -> Option<u32> {
        let before = summary.split(word).next()?.trim().rsplit([' ', ',']).next()?;
        before.parse().ok()
    };
    let mean = text.lines().find(|line| line.starts_with("rtt"));
    let mean = mean.and_then(|line| line.split('=').nth(1)?.trim().split('/').nth(1)?.parse().ok());
    Ok(Answers {
        sent: number(" packets transmitted").unwrap_or(0),
        received: number(" received").unwrap_or(0),
        mean_ms: mean,
        text,
    })
}
