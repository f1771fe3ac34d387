//! Loss, duplication and delay of datagrams on the underlay.

use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use skein_lab::agent::Cluster;
use skein_lab::checks;
use skein_lab::load::ping::{Ping, ping};
use skein_lab::relay::{Impairments, Relay};
use skein_lab::{Family, Offloads, Plan};

/// Checks traffic over an impaired link. Lost and duplicated datagrams must cause losses only:
/// pings are lost at about the rate of the underlay, and TCP transfers are complete.
fn check_traffic_with(impairments: Impairments, bytes: u64) -> Result<()> {
    let plan = Plan { offloads: Offloads::Wire, ..Plan::default() };
    let cluster = Cluster::up(&plan, Family::V4)?;
    let relay = Relay::start(&cluster.lab, 1)?;
    checks::all_reach_all(&cluster.lab)?;
    let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
    relay.set(impairments);
    let expected = {
        let passes = 1.0 - impairments.loss_percent as f64 / 100.0;
        (1.0 - passes * passes) * 100.0
    };
    let (mut sent, mut received) = (0, 0);
    for family in Family::BOTH {
        let many = Ping { count: 400, interval_ms: 5, ..Ping::default() };
        let answers = ping(&a.ns, b.address(family), many)?;
        ensure!(
            !answers.text.contains("duplicate"),
            "A duplicate passed the tunnel: {}",
            answers.text
        );
        (sent, received) = (sent + answers.sent, received + answers.received);
    }
    let lost = f64::from(sent - received) / f64::from(sent) * 100.0;
    // The duration covers several path MTU probes.
    let long = Duration::from_secs(if impairments.loss_percent < 10 { 2 } else { 16 });
    let datagrams = checks::datagrams(a, b, Family::V6, 1000, 1000, long)?;
    let mut seconds = vec![];
    for (from, to, family) in [(a, b, Family::V4), (b, a, Family::V6)] {
        let received = checks::transfer(from, to, family, bytes);
        let received = received.with_context(|| format!("TCP over {family}"))?;
        seconds.push(format!("{:.1}", received.seconds));
    }
    let counts = relay.counts();
    let [seen, gone, doubled, late] =
        [&counts.seen, &counts.lost, &counts.duplicated, &counts.delayed]
            .map(|c| c.load(Ordering::Relaxed));
    let metrics = cluster.agents[1].metrics()?;
    let replayed = metrics.sum("skein_drops_total", &["reason=\"replay"]);
    println!(
        "{impairments:?}: of {seen} datagrams {gone} lost, {doubled} duplicated, {late} late; pings lost \
         {lost:.1} % (expected {expected:.1}), UDP {} of {}, {} out of order; {} MiB of TCP in {} s; \
         {replayed} replays dropped",
        datagrams.received,
        datagrams.sent,
        datagrams.reordered,
        bytes >> 20,
        seconds.join(" and "),
    );
    ensure!((lost - expected).abs() <= 2.0 + expected * 0.5, "{lost} % of the pings were lost.");
    let is_intact = datagrams.corrupt == 0 && datagrams.doubled == 0;
    ensure!(is_intact, "Datagrams were corrupted or duplicated: {datagrams:?}");
    ensure!(impairments.duplicate_percent == 0 || replayed > 0.0, "No replay was dropped.");
    for (kind, percent, count) in [
        ("lost", impairments.loss_percent, gone),
        ("duplicated", impairments.duplicate_percent, doubled),
        ("late", impairments.delay_percent, late),
    ] {
        let is_expected = (percent > 0) == (count > 0);
        ensure!(is_expected, "{count} datagrams were {kind} with {percent} percent.");
    }
    for agent in &cluster.agents {
        let metrics = agent.metrics()?;
        let narrow = metrics.sum("skein_narrow_paths", &[]);
        ensure!(narrow == 0.0, "The losses reduced the path MTU.");
        let away = metrics.sum("skein_peers", &["state=\"unreachable\""]);
        ensure!(away == 0.0, "The losses made the peer unreachable.");
    }
    relay.set(Impairments::default());
    checks::transfer(a, b, Family::V4, 8 << 20)?;
    checks::all_reach_all(&cluster.lab)?;
    relay.stop()
}

#[test]
fn traffic_survives_loss_of_1_percent() -> Result<()> {
    check_traffic_with(Impairments { loss_percent: 1, ..Impairments::default() }, 32 << 20)
}

#[test]
fn traffic_survives_loss_of_10_percent() -> Result<()> {
    check_traffic_with(Impairments { loss_percent: 10, ..Impairments::default() }, 8 << 20)
}

#[test]
fn traffic_survives_reordered_datagrams() -> Result<()> {
    let max_delay = Duration::from_millis(5);
    check_traffic_with(
        Impairments { delay_percent: 20, max_delay, ..Impairments::default() },
        32 << 20,
    )
}

#[test]
fn traffic_survives_duplicated_datagrams() -> Result<()> {
    check_traffic_with(Impairments { duplicate_percent: 10, ..Impairments::default() }, 32 << 20)
}

#[test]
fn traffic_survives_all_impairments_at_once() -> Result<()> {
    let max_delay = Duration::from_millis(5);
    check_traffic_with(
        Impairments { loss_percent: 10, duplicate_percent: 10, delay_percent: 20, max_delay },
        8 << 20,
    )
}
