//! The data process's counters of the last minutes, for charts. They come with the signs of life that it is
//! asked for anyway, so that they cost nothing.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use skein_core::drop::{Direction, DropReason};
use skein_ipc::{DirectionReport, DropReport, LaneReport, Report};

/// Samples that are kept: five minutes and a little more, at one every two seconds.
const MAX_SAMPLES: usize = 160;

/// What the numbers of a [`Sample`] are. All but the first two are totals since the data process's start.
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
    // Of these, those that no stranger can cause.
    "out_lost",
    "in_lost",
];

/// One look at the counters, summed over lanes.
pub type Sample = [u64; COLUMNS.len()];

/// Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct CounterRing(Arc<Mutex<VecDeque<Sample>>>);

impl CounterRing {
    /// Keeps what a report counts; the oldest goes.
    pub(super) fn push(&self, report: &Report) {
        self.push_at(now_ms(), report);
    }

    fn push_at(&self, time_ms: u64, report: &Report) {
        let mut samples = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // The clock was set back: what comes now would seem older than what is there.
        if samples.back().is_some_and(|last| last[0] >= time_ms) {
            samples.clear();
        }
        samples.push_back(sample(time_ms, report));
        if samples.len() > MAX_SAMPLES {
            samples.pop_front();
        }
    }

    /// Those taken after a time, in their order; all, where that time is still to come: the clock was set back
    /// since.
    pub fn since(&self, time_ms: u64) -> Vec<Sample> {
        let samples = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let anew = samples.back().is_some_and(|last| last[0] < time_ms);
        samples.iter().filter(|sample| anew || sample[0] > time_ms).copied().collect()
    }
}

/// The time that samples are marked with.
pub fn now_ms() -> u64 {
    // A clock before 1970 is a clock that nobody has set.
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
            // A reason that only a newer data process knows counts, as in the alert.
            let known = DropReason::from_labels(&drop.direction, &drop.reason);
            drop.direction == direction.label()
                && !known.is_some_and(DropReason::is_possible_without_key)
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

    fn report(packets: u64) -> Report {
        let mut lane = LaneReport { receive_queue_overflow: 2, ..LaneReport::default() };
        lane.egress.inner_packets = packets;
        lane.ingress.calls = 7;
        let drop = |direction: &str, reason: &str, packets| DropReport {
            direction: direction.to_owned(),
            reason: reason.to_owned(),
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
    fn lanes_are_summed_under_their_names() {
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
    fn old_samples_go_and_the_new_ones_are_given() {
        let history = CounterRing::default();
        (1..=500).for_each(|n| history.push_at(n * 2000, &report(n)));
        assert_eq!(history.since(0).len(), MAX_SAMPLES);
        assert_eq!(history.since(499 * 2000).len(), 1);
        assert_eq!(history.since(500 * 2000).len(), 0);
    }

    #[test]
    fn a_clock_that_was_set_back_begins_anew() {
        let history = CounterRing::default();
        history.push_at(10_000, &report(1));
        history.push_at(4_000, &report(2));
        assert_eq!(history.since(0).len(), 1);
        assert_eq!(history.since(10_000).len(), 1, "who knows later ones begins anew, too");
    }
}
