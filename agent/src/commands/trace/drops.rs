//! `trace --drops`: packets while they are dropped, and the number of drops without a packet, from
//! the counters of the data process.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::json;
use skein_ipc::capture::{CaptureKind, CaptureRequest, CapturedPacket, PacketKind};
use skein_ipc::{DropKind, Report};
use tokio::time::Instant;

use crate::commands::packet::describe;
use crate::commands::{Agent, Output, capture_client, print, print_if_open};
use crate::failure::Failure;
use crate::lifecycle::Signals;
use crate::status::{Tone, paint};

/// Bytes of a packet that are captured: sufficient for IP and transport header.
const SNAP_LENGTH: u32 = 96;
/// Interval at which the counters are requested.
const COUNTER_INTERVAL: Duration = Duration::from_secs(1);

/// Bounds of the command; `None` is unlimited.
pub(super) struct Limits {
    pub(super) count: Option<u64>,
    pub(super) duration: Option<Duration>,
}

/// Prints drops until the limits are reached, the reader closes the pipe, or a signal arrives.
pub(super) async fn follow(agent: &Agent, limits: &Limits, output: Output) -> Result<(), Failure> {
    let mut signals =
        Signals::install().map_err(|e| Failure::io("cannot install signal handlers", e))?;
    let status = agent.status().await?;
    let mut counters = capture_client::connect(&status).await?;
    let watch = CaptureRequest { kind: CaptureKind::Drops, nets: Vec::new(), snap: SNAP_LENGTH };
    let mut client = capture_client::start_capture(&status, watch).await?;
    let end = limits.duration.map(|duration| Instant::now() + duration);
    // Counters at the start, counters one interval ago, and the drops that were already printed.
    let start = totals(&counters.report(false).await.map_err(capture_client::failure)?);
    let (mut before, mut printed) = (start.clone(), BTreeMap::<DropKind, u64>::new());
    let (mut requested, mut left) = (Instant::now(), limits.count.unwrap_or(u64::MAX));
    if output == Output::Table {
        print(
            "TIME          DIRECTION  REASON                LANE  NODE                   PACKET\n",
        )?;
    }
    while left > 0 {
        let seen = tokio::select! {
            seen = client.next_captured() => seen.map_err(capture_client::failure)?.0,
            () = signals.terminated() => break,
            () = sleep_until(end) => break,
        };
        for seen in seen {
            if let PacketKind::Dropped(kind) = &seen.kind {
                *printed.entry(kind.clone()).or_default() += seen.packets;
            }
            left = left.saturating_sub(seen.packets);
            if !print_if_open(&packet_line(&seen, output)?)? || left == 0 {
                return Ok(());
            }
        }
        if requested.elapsed() >= COUNTER_INTERVAL {
            requested = Instant::now();
            for (kind, &counted) in &before {
                let counted = counted.saturating_sub(start.get(kind).copied().unwrap_or(0));
                let printed = printed.entry(kind.clone()).or_default();
                let more = counted.saturating_sub(*printed);
                if more > 0 {
                    *printed += more;
                    left = left.saturating_sub(more);
                    if !print_if_open(&remainder_line(kind, more, output)?)? {
                        return Ok(());
                    }
                }
            }
            before = totals(&counters.report(false).await.map_err(capture_client::failure)?);
        }
    }
    Ok(())
}

async fn sleep_until(end: Option<Instant>) {
    match end {
        Some(end) => tokio::time::sleep_until(end).await,
        None => std::future::pending().await,
    }
}

fn totals(report: &Report) -> BTreeMap<DropKind, u64> {
    report.drops.iter().map(|drop| (drop.kind.clone(), drop.packets)).collect()
}

fn packet_line(seen: &CapturedPacket, output: Output) -> Result<String, Failure> {
    let packet = describe(seen);
    let (direction, reason) = (seen.kind.direction(), seen.kind.reason().unwrap_or_default());
    let lane = seen.lane.map_or_else(|| "-".to_owned(), |lane| lane.to_string());
    let node = seen.outer.map_or_else(|| "-".to_owned(), |outer| outer.to_string());
    match output {
        Output::Json => line(&json!({
            "time_ns": seen.time_ns, "direction": direction, "reason": reason,
            "packets": seen.packets, "lane": seen.lane, "node": seen.outer,
            "inner": seen.inner, "packet": packet,
        })),
        Output::Table => Ok(format!(
            "{}  {direction:<9}  {}  {lane:>4}  {node:<21}  {packet}\n",
            time(seen.time_ns),
            paint(&format!("{reason:<20}"), Tone::Bad),
        )),
    }
}

/// Formats the number of drops without a captured packet: too many at once, or drops of which only
/// the number is known.
fn remainder_line(kind: &DropKind, packets: u64, output: Output) -> Result<String, Failure> {
    let (direction, reason) = (kind.direction(), kind.reason());
    match output {
        Output::Json => line(&json!({
            "direction": direction, "reason": reason, "packets": packets,
        })),
        Output::Table => Ok(format!(
            "{:12}  {direction:<9}  {}  {:>4}  {:<21}  and {packets} more\n",
            "",
            paint(&format!("{reason:<20}"), Tone::Bad),
            "",
            "",
        )),
    }
}

fn line(value: &serde_json::Value) -> Result<String, Failure> {
    Ok(format!("{value}\n"))
}

/// Formats nanoseconds since 1970 as the time of day in UTC.
fn time(ns: u64) -> String {
    let (seconds, ms) = (ns / 1_000_000_000, ns / 1_000_000 % 1000);
    let (h, m, s) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{h:02}:{m:02}:{s:02}.{ms:03}")
}
