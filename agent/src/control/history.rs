//! Counters of the data process in the last five minutes, for the charts of the status page. They
//! are part of the heartbeat's reports, so that they need no requests of their own.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use skein_core::drop::{Direction, DropReason};
use skein_ipc::{DirectionReport, DropReport, LaneReport, Report};

/// Maximum number of samples; the oldest one is removed first. At one report per second they cover
/// 319 s.
const MAX_SAMPLES: usize = 320;

/// Names of the numbers in a [`Sample`]. All but the first two are totals since the data process's
/// start.
pub const COLUMNS: [&str; 15] = [
    "time_ms", // since 1970
    "process",
    "out_inner_packets",
    "out_inner_bytes",
    "out_tun_packets",
    "out_outer_packets",
    "out_calls",
    "in_inner_packets",
    "in_inner_bytes",
    "in_tun_packets",
    "in_outer_packets",
    "in_calls",
    "drops",
    // Drops that a sender without a session key cannot cause.
    "out_lost",
    "in_lost",
];

/// Counters at one time, summed over lanes, in the order of [`COLUMNS`].
pub type Sample = [u64; COLUMNS.len()];

/// Ring of the latest samples. Cheap to clone; clones share the ring.
#[derive(Debug, Clone, Default)]
pub struct CounterRing(Arc<Mutex<VecDeque<Sample>>>);

impl CounterRing {
    /// Adds the counters of a report, and removes the oldest sample if the ring is full.
    pub(super) fn push(&self, report: &Report) {
        self.push_at(now_ms(), report);
    }

    fn push_at(&self, time_ms: u64, report: &Report) {
        let mut samples = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // All samples are discarded if the wall clock was set back, because samples must stay in
        // the order of their times.
        if samples.back().is_some_and(|last| last[0] >= time_ms) {
            samples.clear();
        }
        samples.push_back(sample(time_ms, report));
        if samples.len() > MAX_SAMPLES {
            samples.pop_front();
        }
    }

    /// Returns the samples after `time_ms` in their order. Returns all samples if `time_ms` is
    /// later than the last one, because the wall clock was set back since.
    pub fn since(&self, time_ms: u64) -> Vec<Sample> {
        let samples = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_set_back = samples.back().is_some_and(|last| last[0] < time_ms);
        samples.iter().filter(|sample| is_set_back || sample[0] > time_ms).copied().collect()
    }
}

/// Returns the time of the wall clock in milliseconds since 1970, as in samples.
pub fn now_ms() -> u64 {
    // A time before 1970 means that the clock was never set.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    now.as_millis().try_into().unwrap_or(u64::MAX)
}

fn sample(time_ms: u64, report: &Report) -> Sample {
    let sum = |counter: fn(&LaneReport) -> u64| report.lanes.iter().map(counter).sum::<u64>();
    let direction = |side: fn(&LaneReport) -> &DirectionReport| {
        let counters: [fn(&DirectionReport) -> u64; 5] = [
            |side| side.inner_packets,
            |side| side.inner_bytes,
            |side| side.tun_packets,
            |side| side.outer_packets,
            |side| side.calls,
        ];
        counters.map(|counter| report.lanes.iter().map(|lane| counter(side(lane))).sum())
    };
    let drops = |which: &dyn Fn(&DropReport) -> bool| -> u64 {
        report.drops.iter().filter(|drop| which(drop)).map(|drop| drop.packets).sum()
    };
    let lost = |direction: Direction| {
        drops(&|drop| {
            // A reason that this release does not know counts, as in the alert SkeinPacketsDropped.
            drop.kind.direction() == direction.label()
                && !drop.kind.known().is_some_and(DropReason::is_possible_without_key)
        })
    };
    let [a, b, c, d, e] = direction(|lane| &lane.egress);
    let [f, g, h, i, j] = direction(|lane| &lane.ingress);
    let all = drops(&|_| true) + sum(|lane| lane.receive_queue_overflow) + report.tun_queue_drops;
    let lost = [lost(Direction::Egress) + report.tun_queue_drops, lost(Direction::Ingress)];
    [time_ms, u64::from(report.pid), a, b, c, d, e, f, g, h, i, j, all, lost[0], lost[1]]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::supervisor::HEARTBEAT_INTERVAL;
    use skein_ipc::DropKind;

    fn report(packets: u64) -> Report {
        let mut lane = LaneReport { receive_queue_overflow: 2, ..LaneReport::default() };
        lane.egress.inner_packets = packets;
        lane.ingress.calls = 7;
        let drop = |direction: &str, reason: &str, packets| DropReport {
            kind: DropKind::from_texts(direction, reason),
            packets,
        };
        let drops = vec![
            drop("egress", "no_route", 3),
            drop("ingress", "handshake_invalid", 100),
            drop("ingress", "tun_write", 4),
            drop("ingress", "unheard_of", 5),
        ];
        let lanes = vec![lane.clone(), lane];
        Report { pid: 42, lanes, drops, tun_queue_drops: 6, ..Report::default() }
    }

    #[test]
    fn lanes_are_summed_in_named_columns() {
        let history = CounterRing::default();
        history.push_at(1000, &report(5));
        let sample = history.since(0)[0];
        let value = |name| sample[COLUMNS.iter().position(|column| *column == name).unwrap_or(99)];
        assert_eq!((value("time_ms"), value("process")), (1000, 42));
        assert_eq!((value("out_inner_packets"), value("in_inner_packets")), (10, 0));
        assert_eq!((value("in_calls"), value("drops")), (14, 122));
        assert_eq!((value("out_lost"), value("in_lost")), (9, 9));
    }

    #[test]
    fn oldest_samples_are_removed_and_newer_ones_returned() {
        let history = CounterRing::default();
        (1..=500).for_each(|n| history.push_at(n * 2000, &report(n)));
        assert_eq!(history.since(0).len(), MAX_SAMPLES);
        assert_eq!(history.since(499 * 2000).len(), 1);
        assert_eq!(history.since(500 * 2000).len(), 0);
    }

    #[test]
    fn samples_cover_the_five_minutes_of_the_charts() {
        let history = CounterRing::default();
        let interval_ms = HEARTBEAT_INTERVAL.as_secs() * 1000;
        (1..=1000).for_each(|n| history.push_at(n * interval_ms, &report(n)));
        let samples = history.since(0);
        assert!(samples[samples.len() - 1][0] - samples[0][0] >= 300_000);
    }

    #[test]
    fn clock_set_back_restarts_the_samples() {
        let history = CounterRing::default();
        history.push_at(10_000, &report(1));
        history.push_at(4_000, &report(2));
        assert_eq!(history.since(0).len(), 1);
        assert_eq!(history.since(10_000).len(), 1, "a client with later times gets all samples");
    }
}
