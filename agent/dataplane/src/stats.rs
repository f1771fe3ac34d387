//! Counters of the packet path. A lane counts a batch in plain memory and adds the result here, so
//! that the packet path pays one relaxed addition per counter and batch.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use skein_core::drop::{DropCounts, DropReason};
use skein_ipc::{DirectionReport, DropReport, HistogramReport, LaneReport};
use skein_sys::send::{GsoState, SendOutcome, Sender};

/// Shared histogram with the bounds of [`HistogramReport`].
#[derive(Debug, Default)]
pub(super) struct Histogram {
    buckets: [AtomicU64; 12],
    sum: AtomicU64,
}

impl Histogram {
    /// Counts one value.
    pub(super) fn observe(&self, value: u64) {
        self.observe_many(value, 1);
    }

    /// Counts `times` equal values.
    pub(super) fn observe_many(&self, value: u64, times: u64) {
        add(&self.buckets[bucket(value)], times);
        add(&self.sum, value * times);
    }

    /// Adds the values of a batch and clears them.
    pub(super) fn collect(&self, values: &mut Values) {
        for (bucket, count) in self.buckets.iter().zip(values.buckets) {
            if count > 0 {
                add(bucket, count);
            }
        }
        if values.sum > 0 {
            add(&self.sum, values.sum);
        }
        *values = Values::default();
    }

    fn report(&self) -> HistogramReport {
        HistogramReport {
            buckets: self.buckets.iter().map(|b| b.load(Relaxed)).collect(),
            sum: self.sum.load(Relaxed),
        }
    }
}

/// Values of a batch, before they are added to a [`Histogram`].
#[derive(Debug, Default)]
pub(super) struct Values {
    buckets: [u64; 12],
    sum: u64,
}

impl Values {
    /// Counts one value.
    pub(super) fn observe(&mut self, value: u64) {
        self.buckets[bucket(value)] += 1;
        self.sum += value;
    }
}

/// Returns the bucket of a value: 0 and 1 → 0, 2 → 1, 3 and 4 → 2, …, above 1024 → 11.
fn bucket(value: u64) -> usize {
    (u64::BITS - value.saturating_sub(1).leading_zeros()).min(11) as usize
}

/// Counters of one direction of a lane, with the meaning of [`DirectionReport`].
#[derive(Debug, Default)]
#[allow(missing_docs)]
pub(super) struct DirectionStats {
    pub(super) inner_packets: AtomicU64,
    pub(super) inner_bytes: AtomicU64,
    pub(super) tun_packets: AtomicU64,
    pub(super) outer_packets: AtomicU64,
    pub(super) outer_bytes: AtomicU64,
    pub(super) calls: AtomicU64,
    pub(super) packets_per_call: Histogram,
    pub(super) segments_per_message: Histogram,
    pub(super) inner_per_outer: Histogram,
}

impl DirectionStats {
    fn report(&self) -> DirectionReport {
        DirectionReport {
            inner_packets: self.inner_packets.load(Relaxed),
            inner_bytes: self.inner_bytes.load(Relaxed),
            tun_packets: self.tun_packets.load(Relaxed),
            outer_packets: self.outer_packets.load(Relaxed),
            outer_bytes: self.outer_bytes.load(Relaxed),
            calls: self.calls.load(Relaxed),
            packets_per_call: self.packets_per_call.report(),
            segments_per_message: self.segments_per_message.report(),
            inner_per_outer: self.inner_per_outer.report(),
        }
    }
}

/// Adds `amount` to a counter.
pub(super) fn add(counter: &AtomicU64, amount: u64) {
    counter.fetch_add(amount, Relaxed);
}

/// Shared drop counters, one per reason.
#[derive(Debug)]
pub(super) struct DropStats(Vec<AtomicU64>);

impl Default for DropStats {
    fn default() -> Self {
        Self(DropReason::ALL.iter().map(|_| AtomicU64::new(0)).collect())
    }
}

impl DropStats {
    /// Adds the drops of a batch and clears them.
    pub(super) fn collect(&self, counts: &mut DropCounts) {
        for (reason, packets) in counts.drain() {
            add(&self.0[reason as usize], packets);
        }
    }

    /// Returns the number of drops for this reason.
    pub(super) fn get(&self, reason: DropReason) -> u64 {
        self.0[reason as usize].load(Relaxed)
    }
}

/// Returns the sums of several [`DropStats`], with an entry for every reason.
pub(super) fn drop_report(all: &[&DropStats]) -> Vec<DropReport> {
    DropReason::ALL
        .iter()
        .map(|&reason| DropReport {
            kind: reason.into(),
            packets: all.iter().map(|stats| stats.get(reason)).sum(),
        })
        .collect()
}

/// Counters of one lane.
#[derive(Debug, Default)]
#[repr(align(128))] // two cache lines: neighbours are fetched in pairs
pub(super) struct LaneStats {
    /// Counters of the direction from the TUN device to the underlay.
    pub(super) egress: DirectionStats,
    /// Counters of the direction from the underlay to the TUN device.
    pub(super) ingress: DirectionStats,
    /// Drops of both directions.
    pub(super) drops: DropStats,
    /// Datagrams that the kernel dropped because a receive buffer was full (SO_RXQ_OVFL), all
    /// sockets of the lane.
    pub(super) receive_queue_overflow: AtomicU64,
    /// Waits that ended during busy polling.
    pub(super) polled: AtomicU64,
    /// Waits that blocked in epoll.
    pub(super) slept: AtomicU64,
    /// GSO batches that were sent again as single datagrams.
    pub(super) gso_fallbacks: AtomicU64,
    /// True while the TUN device refuses TCP superpackets.
    pub(super) tun_tcp_refused: AtomicBool,
    /// True while the TUN device refuses UDP superpackets.
    pub(super) tun_udp_refused: AtomicBool,
    /// True if the kernel refused the ancillary data of sendmsg(2) that sets the outer ECN field.
    pub(super) ecn_refused: AtomicBool,
    /// Destinations for which GSO is off, each with the end of the pause. The mutex is locked only
    /// if there are such destinations.
    gso_off: Mutex<Vec<(SocketAddr, Instant)>>,
    any_gso_off: AtomicBool,
}

impl LaneStats {
    /// Returns the destinations for which GSO is off now.
    pub(super) fn gso_off(&self) -> Vec<SocketAddr> {
        let now = Instant::now();
        let off = self.gso_off.lock().unwrap_or_else(PoisonError::into_inner);
        off.iter().filter(|(_, until)| *until > now).map(|(destination, _)| *destination).collect()
    }

    /// Counts the result of a send.
    pub(super) fn count_sent(&self, outcome: &SendOutcome, sender: &Sender) {
        let stats = &self.egress;
        add(&stats.outer_packets, outcome.datagrams);
        add(&stats.outer_bytes, outcome.bytes);
        add(&stats.calls, outcome.calls);
        for &datagrams in sender.datagrams_per_call() {
            stats.packets_per_call.observe(u64::from(datagrams));
        }
        for &segments in sender.segments_per_message() {
            stats.segments_per_message.observe(u64::from(segments));
        }
        if sender.ecn_refused() {
            self.ecn_refused.store(true, Relaxed);
        }
        if outcome.fallbacks > 0 {
            add(&self.gso_fallbacks, outcome.fallbacks);
        }
    }

    /// Updates the destinations for which GSO is off. Does nothing if `changed` is false and no
    /// destination is stored, because no pause can have ended then.
    pub(super) fn note_gso_off(&self, gso: &GsoState, now: Instant, changed: bool) {
        if !changed && !self.any_gso_off.load(Relaxed) {
            return;
        }
        let off: Vec<_> = gso.off(now).map(|off| (off.destination, off.until)).collect();
        self.any_gso_off.store(!off.is_empty(), Relaxed);
        *self.gso_off.lock().unwrap_or_else(PoisonError::into_inner) = off;
    }

    /// Returns the counters as a report.
    pub(super) fn report(&self, lane: u8) -> LaneReport {
        LaneReport {
            lane,
            egress: self.egress.report(),
            ingress: self.ingress.report(),
            receive_queue_overflow: self.receive_queue_overflow.load(Relaxed),
            waits_polled: self.polled.load(Relaxed),
            waits_slept: self.slept.load(Relaxed),
            gso_fallbacks: self.gso_fallbacks.load(Relaxed),
            gso_off_destinations: self.gso_off().len() as u64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histogram_values_fall_under_their_bounds() {
        for (value, bucket) in
            [(0, 0), (1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (1024, 10), (1025, 11)]
        {
            let histogram = Histogram::default();
            histogram.observe(value);
            assert_eq!(histogram.report().buckets[bucket], 1, "{value}");
            if let Some(bound) = HistogramReport::BOUNDS.get(bucket) {
                assert!(value <= *bound);
            }
        }
        let histogram = Histogram::default();
        histogram.observe(u64::MAX >> 8);
        assert_eq!(histogram.report().count(), 1);
    }

    #[test]
    fn every_drop_reason_is_reported() {
        let (lane, manager) = (DropStats::default(), DropStats::default());
        let mut counts = DropCounts::default();
        counts.add(DropReason::NoRoute);
        lane.collect(&mut counts);
        counts.add(DropReason::NoRoute);
        manager.collect(&mut counts);
        let report = drop_report(&[&lane, &manager]);
        assert_eq!(report.len(), DropReason::ALL.len());
        let no_route = report.iter().find(|drop| drop.kind.known() == Some(DropReason::NoRoute));
        assert_eq!(no_route.map(|drop| drop.packets), Some(2));
    }
}
