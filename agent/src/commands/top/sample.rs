//! Rates and mean batch sizes between two readings of the agent's status.

use std::time::Duration;

use serde::Serialize;
use skein_core::drop::Direction;
use skein_ipc::{DirectionReport, HistogramReport, LaneReport, PeerState, Report, Reported};

use crate::commands::peers::Rates;
use crate::status::Document;

/// State of the data plane at the second of two readings, with the rates since the first one.
#[derive(Debug, Serialize)]
pub(super) struct Sample {
    pub(super) node: String,
    pub(super) ready: bool,
    /// Time between the two readings.
    pub(super) seconds: f64,
    pub(super) uptime_seconds: f64,
    /// Outgoing traffic, sum of all lanes.
    pub(super) out: Flow,
    #[serde(rename = "in")]
    pub(super) r#in: Flow,
    pub(super) lanes: Vec<Lane>,
    /// Drops in descending order of their rate, then of their total. Reasons without a drop are
    /// left out.
    pub(super) drops: Vec<Drop>,
    /// Peers in descending order of their bit rate.
    pub(super) peers: Vec<Peer>,
}

/// Rates and mean batch sizes of one direction.
#[derive(Debug, Default, PartialEq, Serialize)]
pub(super) struct Flow {
    pub(super) inner_packets_per_second: f64,
    pub(super) outer_packets_per_second: f64,
    /// Rate of inner bytes, in bits.
    pub(super) bits_per_second: f64,
    pub(super) calls_per_second: f64,
    /// Mean number of datagrams per system call; `None` without a call.
    pub(super) packets_per_call: Option<f64>,
    pub(super) segments_per_message: Option<f64>,
    pub(super) inner_per_outer: Option<f64>,
}

#[derive(Debug, Serialize)]
pub(super) struct Lane {
    pub(super) lane: u8,
    pub(super) out: Flow,
    #[serde(rename = "in")]
    pub(super) r#in: Flow,
}

#[derive(Debug, PartialEq, Serialize)]
pub(super) struct Drop {
    pub(super) direction: String,
    pub(super) reason: String,
    pub(super) packets_per_second: f64,
    pub(super) packets: u64,
}

#[derive(Debug, Serialize)]
pub(super) struct Peer {
    pub(super) name: String,
    pub(super) state: Reported<PeerState>,
    pub(super) rtt_us: Option<u64>,
    pub(super) rates: Option<Rates>,
}

impl Sample {
    pub(super) fn between(before: &Document, now: &Document, time: Duration) -> Self {
        // The counters of a new data process start at zero. The counter of the TUN device
        // continues.
        let tun_queue_drops = now.report.as_ref().map_or(0, |report| report.tun_queue_drops);
        let nothing = Report { tun_queue_drops, ..Report::default() };
        let report = now.report.as_ref().unwrap_or(&nothing);
        let before = before.report.as_ref().filter(|before| before.pid == report.pid);
        let before = before.unwrap_or(&nothing);
        let seconds = time.as_secs_f64();
        let zero = LaneReport::default();
        let lanes: Vec<_> = report
            .lanes
            .iter()
            .map(|lane| (before.lanes.iter().find(|l| l.lane == lane.lane).unwrap_or(&zero), lane))
            .collect();
        let flow = |side: fn(&LaneReport) -> &DirectionReport| {
            let sides = lanes.iter().map(|(then, lane)| (side(then), side(lane)));
            Flow::between(sides, seconds)
        };
        Self {
            node: now.node.clone(),
            ready: now.ready,
            seconds,
            uptime_seconds: report.uptime_seconds,
            out: flow(|lane| &lane.egress),
            r#in: flow(|lane| &lane.ingress),
            lanes: lanes
                .iter()
                .map(|(then, lane)| Lane {
                    lane: lane.lane,
                    out: Flow::between([(&then.egress, &lane.egress)].into_iter(), seconds),
                    r#in: Flow::between([(&then.ingress, &lane.ingress)].into_iter(), seconds),
                })
                .collect(),
            drops: drops(before, report, seconds),
            peers: peers(before, report, time),
        }
    }
}

impl Flow {
    fn between<'a>(
        sides: impl Iterator<Item = (&'a DirectionReport, &'a DirectionReport)> + Clone,
        seconds: f64,
    ) -> Self {
        let rate = |of: fn(&DirectionReport) -> u64| {
            let more = sides.clone().map(|(then, now)| of(now).saturating_sub(of(then)));
            more.sum::<u64>() as f64 / seconds
        };
        let mean = |of: fn(&DirectionReport) -> &HistogramReport| {
            let (mut count, mut sum) = (0, 0);
            for (then, now) in sides.clone() {
                count += of(now).count().saturating_sub(of(then).count());
                sum += of(now).sum.saturating_sub(of(then).sum);
            }
            (count > 0).then(|| sum as f64 / count as f64)
        };
        Self {
            inner_packets_per_second: rate(|side| side.inner_packets),
            outer_packets_per_second: rate(|side| side.outer_packets),
            bits_per_second: 8.0 * rate(|side| side.inner_bytes),
            calls_per_second: rate(|side| side.calls),
            packets_per_call: mean(|side| &side.packets_per_call),
            segments_per_message: mean(|side| &side.segments_per_message),
            inner_per_outer: mean(|side| &side.inner_per_outer),
        }
    }
}

impl Drop {
    /// Returns the drops of one reason from the totals at both samples, `seconds` apart.
    fn between(direction: &str, reason: &str, [then, now]: [u64; 2], seconds: f64) -> Self {
        Self {
            direction: direction.to_owned(),
            reason: reason.to_owned(),
            packets_per_second: now.saturating_sub(then) as f64 / seconds,
            packets: now,
        }
    }
}

fn drops(before: &Report, now: &Report, seconds: f64) -> Vec<Drop> {
    let mut drops: Vec<Drop> = now
        .drops
        .iter()
        .map(|drop| {
            let same = |other: &&skein_ipc::DropReport| other.kind == drop.kind;
            let then = before.drops.iter().find(same).map_or(0, |drop| drop.packets);
            Drop::between(drop.kind.direction(), drop.kind.reason(), [then, drop.packets], seconds)
        })
        // The kernel drops these packets before Skein receives them.
        .chain([{
            let sum = |report: &Report| report.lanes.iter().map(|l| l.receive_queue_overflow).sum();
            let (direction, counts) = (Direction::Ingress.label(), [sum(before), sum(now)]);
            Drop::between(direction, "receive_queue_overflow", counts, seconds)
        }])
        .chain([{
            let counts = [before.tun_queue_drops, now.tun_queue_drops];
            Drop::between(Direction::Egress.label(), "tun_queue_full", counts, seconds)
        }])
        .filter(|drop| drop.packets > 0)
        .collect();
    let order = |a: &Drop, b: &Drop| {
        b.packets_per_second.total_cmp(&a.packets_per_second).then(b.packets.cmp(&a.packets))
    };
    drops.sort_by(order);
    drops
}

fn peers(before: &Report, now: &Report, time: Duration) -> Vec<Peer> {
    let mut peers: Vec<Peer> = now
        .peers
        .iter()
        .map(|peer| Peer {
            name: peer.name.clone(),
            state: peer.state.clone(),
            rtt_us: peer.rtt_us,
            rates: Rates::between(before, peer, time),
        })
        .collect();
    let traffic = |peer: &Peer| {
        peer.rates.map_or(0.0, |rates| rates.tx_bits_per_second + rates.rx_bits_per_second)
    };
    // The sort is stable: peers without traffic keep the order of their names, unreachable peers
    // first.
    peers.sort_by_key(|peer| peer.state != PeerState::Unreachable);
    peers.sort_by(|a, b| traffic(b).total_cmp(&traffic(a)));
    peers
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::status::tests::{document, peer};
    use skein_core::drop::DropReason;
    use skein_ipc::DropReport;

    fn samples() -> (Document, Document) {
        let (mut before, mut now) = (document(1000), document(3000));
        let quiet = peer("quiet", PeerState::Established);
        let mut busy = peer("busy", PeerState::Established);
        let lost = peer("z-lost", PeerState::Unreachable);
        before.report.as_mut().unwrap().peers = vec![busy.clone(), lost.clone(), quiet.clone()];
        busy.tx_bytes += 500;
        let report = now.report.as_mut().unwrap();
        report.peers = vec![quiet, lost, busy];
        let lane = &mut report.lanes[0];
        lane.receive_queue_overflow = 7;
        lane.egress.packets_per_call = HistogramReport { buckets: vec![0, 10], sum: 20 };
        report.drops.push(DropReport { kind: DropReason::NoRoute.into(), packets: 100 });
        (before, now)
    }

    #[test]
    fn rates_and_means_use_differences_of_counters() {
        let (before, now) = samples();
        let sample = Sample::between(&before, &now, Duration::from_secs(2));
        assert_eq!(sample.out.inner_packets_per_second, 1000.0);
        assert_eq!(sample.out.packets_per_call, Some(2.0));
        assert_eq!(sample.out.segments_per_message, None);
        assert_eq!(sample.r#in, Flow { ..Flow::default() });
        let reasons: Vec<_> = sample.drops.iter().map(|drop| drop.reason.as_str()).collect();
        assert_eq!(reasons, ["no_route", "receive_queue_overflow", "replayed"]);
        assert_eq!(sample.drops[0].packets_per_second, 50.0);
        assert_eq!(sample.drops[2].packets_per_second, 0.0);
        let names: Vec<_> = sample.peers.iter().map(|peer| peer.name.as_str()).collect();
        assert_eq!(names, ["busy", "z-lost", "quiet"]);
    }
}
