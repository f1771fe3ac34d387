//! Prometheus metrics, generated for each scrape from the report of the data process.
//!
//! The data process has plain counters and no metrics library. This module converts the counters to
//! metric families. Every possible series exists from the start with the value zero.

mod family;
mod firewall;
mod policy;

use std::time::Duration;

use prometheus::proto::MetricFamily;
use prometheus::{Encoder, TextEncoder};
use skein_core::drop::Direction;
use skein_core::tunnel::UnreachableReason;
use skein_ipc::{
    CapabilityState, ConfinementState, DirectionReport, HistogramReport, LaneReport, PeerState,
    Report, ReportValue,
};

use self::family::{Family, Kind};
pub use self::firewall::Firewall;
use crate::policy::PolicyMetrics;
use crate::status::{DataplaneStatus, RegistryStatus, RotationStatus, Stage};

/// Input of a scrape.
#[derive(Debug, Clone, Default)]
pub struct Input {
    /// Counters of the data process; `None` while it is not available.
    pub report: Option<Report>,
    /// State of the data process, as the supervisor knows it.
    pub dataplane: DataplaneStatus,
    /// State of the node records.
    pub registry: RegistryStatus,
    /// Readiness of the agent.
    pub ready: bool,
    /// Prefixes of peers to which another program has a route.
    pub conflicts: usize,
    /// State of this node's key; `None` before it is known.
    pub key: Option<RotationStatus>,
    /// Enables series for each peer (`metrics.per_peer`).
    pub per_peer: bool,
    /// Families of the requests to the Kubernetes API server.
    pub requests: Vec<MetricFamily>,
    /// State of the pods; `None` if the agent serves no pods.
    pub pods: Option<Pods>,
    /// State of the nftables table; `None` before the first attempt to install it.
    pub firewall: Option<Firewall>,
    /// State of the network policies; `None` if the policies have no effect.
    pub policy: Option<PolicyMetrics>,
}

/// Requests and address usage of pods.
#[derive(Debug, Clone, Default)]
pub struct Pods {
    /// Families of the CNI plugin's requests.
    pub requests: Vec<MetricFamily>,
    /// Usage of the address pools.
    pub usage: skein_ipam::Usage,
}

/// Encodes all metrics in the Prometheus text format.
///
/// # Errors
/// The encoder refuses a family, for example one without a name.
pub fn render(input: &Input) -> prometheus::Result<String> {
    let mut families = families(input);
    families.retain(|family| !family.get_metric().is_empty());
    families.sort_by(|a, b| a.name().cmp(b.name()));
    let mut text = Vec::new();
    TextEncoder::new().encode(&families, &mut text)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

fn families(input: &Input) -> Vec<MetricFamily> {
    let mut families = control(input);
    families.extend(input.requests.clone());
    if let Some(pods) = &input.pods {
        families.extend(pod_families(pods));
    }
    if let Some(firewall) = &input.firewall {
        families.extend(firewall::families(firewall, input.pods.is_some()));
    }
    if let Some(policy) = &input.policy {
        families.extend(policy::families(policy));
    }
    if let Some(report) = &input.report {
        families.extend(traffic(report));
        families.extend(histograms(report));
        families.extend(lanes(report));
        families.extend(capabilities(report));
        families.extend(outcomes(report));
        families.extend(peers(report));
        if input.per_peer {
            families.extend(each_peer(report));
        }
    }
    families
}

fn control(input: &Input) -> Vec<MetricFamily> {
    let mut build = Family::new("skein_build_info", "Version of the agent; always 1.", Kind::Gauge);
    build.add(&[("version", env!("CARGO_PKG_VERSION"))], 1.0);
    let mut ready = Family::new(
        "skein_ready",
        "1 if the node is ready to carry traffic, 0 if not.",
        Kind::Gauge,
    );
    ready.add(&[], f64::from(u8::from(input.ready)));
    let mut up =
        Family::new("skein_dataplane_up", "1 if the data process answers, 0 if not.", Kind::Gauge);
    up.add(&[], f64::from(u8::from(input.report.is_some())));
    let mut restarts = Family::new(
        "skein_dataplane_restarts_total",
        "Data processes that replaced one that had ended.",
        Kind::Counter,
    );
    restarts.add(&[], input.dataplane.restarts as f64);
    let mut records = Family::new("skein_node_records", "Active node records.", Kind::Gauge);
    records.add(&[], input.registry.accepted as f64);
    let mut rejected = Family::new(
        "skein_node_record_files_rejected",
        "Refused node records, counted by file or SkeinNode; their last valid versions stay active.",
        Kind::Gauge,
    );
    rejected.add(&[], input.registry.rejected.len() as f64);
    let mut source = Family::new(
        "skein_node_records_source_up",
        "1 if the source of the node records (files, or the API server) can be read, 0 if not.",
        Kind::Gauge,
    );
    source.add(&[], f64::from(u8::from(input.registry.source_error.is_none())));
    let mut conflicts = Family::new(
        "skein_route_conflicts",
        "Prefixes of peers to which another program has a route, so that the overlay carries no traffic to them.",
        Kind::Gauge,
    );
    conflicts.add(&[], input.conflicts as f64);
    let mut families = vec![build, ready, up, restarts, records, rejected, source, conflicts];
    families.extend(input.key.iter().flat_map(key));
    families.extend(processes(input.dataplane.pid));
    families.into_iter().map(Family::finish).collect()
}

fn key(status: &RotationStatus) -> [Family; 2] {
    let mut age = Family::new(
        "skein_key_age_seconds",
        "Age of this node's active private key in seconds, from the modification time of the key file.",
        Kind::Gauge,
    );
    age.add(&[], status.age_seconds as f64);
    let mut rotation = Family::new(
        "skein_key_rotation",
        "Stage of the rotation of this node's key: 1 for the current stage, 0 for the others.",
        Kind::Gauge,
    );
    for stage in Stage::ALL {
        rotation.add(&[("stage", stage.label())], f64::from(u8::from(stage == status.stage)));
    }
    [age, rotation]
}

fn pod_families(pods: &Pods) -> Vec<MetricFamily> {
    let mut addresses = Family::new(
        "skein_ipam_addresses",
        "Pod addresses by pool and state; `resting` addresses were released less than 30 s ago and are allocated last.",
        Kind::Gauge,
    );
    for pool in &pods.usage.pools {
        let cidr = pool.cidr.to_string();
        for (state, count) in [
            ("used", pool.in_use as f64),
            ("free", pool.total as f64 - pool.in_use as f64 - pool.quarantined as f64),
            ("resting", pool.quarantined as f64),
        ] {
            addresses.add(&[("cidr", cidr.as_str()), ("state", state)], count);
        }
    }
    let mut families = pods.requests.clone();
    families.push(addresses.finish());
    families
}

fn processes(dataplane: Option<u32>) -> [Family; 2] {
    let mut cpu = Family::new(
        "skein_process_cpu_seconds_total",
        "CPU time of each process of Skein in seconds.",
        Kind::Counter,
    );
    let mut memory = Family::new(
        "skein_process_resident_memory_bytes",
        "Resident memory of each process of Skein in bytes.",
        Kind::Gauge,
    );
    for (process, pid) in [("control", Some(std::process::id())), ("dataplane", dataplane)] {
        let Some(usage) = pid.and_then(usage) else { continue };
        cpu.add(&[("process", process)], usage.cpu.as_secs_f64());
        memory.add(&[("process", process)], usage.resident_bytes as f64);
    }
    [cpu, memory]
}

struct Usage {
    cpu: Duration,
    resident_bytes: u64,
}

/// Reads /proc/PID/… (proc(5)). Returns `None` if the process does not exist.
fn usage(pid: u32) -> Option<Usage> {
    // USER_HZ, the unit of times in stat, is 100 on every Linux architecture that Rust supports.
    const TICK_MS: u64 = 10;
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field, the command, can contain spaces and parentheses; the later fields cannot.
    let fields: Vec<_> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
    let cpu =
        Duration::from_millis((ticks(14)?.saturating_add(ticks(15)?)).saturating_mul(TICK_MS));
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = resident.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(Usage { cpu, resident_bytes: kib * 1024 })
}

/// Sums one counter over all lanes, for both directions.
fn both(
    report: &Report,
    name: &str,
    help: &str,
    counter: impl Fn(&DirectionReport) -> u64,
) -> MetricFamily {
    let mut family = Family::new(name, help, Kind::Counter);
    for (direction, side) in DIRECTIONS {
        let sum: u64 = report.lanes.iter().map(|lane| counter(side(lane))).sum();
        family.add(&[("direction", direction)], sum as f64);
    }
    family.finish()
}

const EGRESS: &str = Direction::Egress.label();
const INGRESS: &str = Direction::Ingress.label();
type Side = fn(&LaneReport) -> &DirectionReport;
const DIRECTIONS: [(&str, Side); 2] =
    [(EGRESS, |lane| &lane.egress), (INGRESS, |lane| &lane.ingress)];

fn traffic(report: &Report) -> Vec<MetricFamily> {
    vec![
        both(
            report,
            "skein_inner_packets_total",
            "Packets of pods; each segment of a superpacket counts.",
            |side| side.inner_packets,
        ),
        both(report, "skein_inner_bytes_total", "IP bytes of packets of pods.", |side| {
            side.inner_bytes
        }),
        both(
            report,
            "skein_tun_packets_total",
            "Packets read from and written to the TUN device; a superpacket counts once.",
            |side| side.tun_packets,
        ),
        both(report, "skein_outer_packets_total", "Datagrams on the underlay.", |side| {
            side.outer_packets
        }),
        both(
            report,
            "skein_outer_bytes_total",
            "UDP payload bytes of datagrams on the underlay.",
            |side| side.outer_bytes,
        ),
        both(
            report,
            "skein_underlay_calls_total",
            "System calls on underlay sockets that moved data.",
            |side| side.calls,
        ),
    ]
}

fn histograms(report: &Report) -> Vec<MetricFamily> {
    type Pick = fn(&DirectionReport) -> &HistogramReport;
    let families: [(&str, &str, Pick); 3] = [
        ("skein_packets_per_call", "Datagrams sent or received by one system call.", |side| {
            &side.packets_per_call
        }),
        (
            "skein_segments_per_message",
            "Datagrams in one GSO or GRO message; 1 without batching.",
            |side| &side.segments_per_message,
        ),
        (
            "skein_inner_packets_per_datagram",
            "Packets of pods in one datagram; more than 1 if small packets were bundled.",
            |side| &side.inner_per_outer,
        ),
    ];
    let family = |(name, help, pick): (&str, &str, Pick)| {
        let mut family = Family::new(name, help, Kind::Histogram);
        for (direction, side) in DIRECTIONS {
            let mut sum = HistogramReport { buckets: vec![0; BUCKETS], sum: 0 };
            for histogram in report.lanes.iter().map(|lane| pick(side(lane))) {
                sum.sum += histogram.sum;
                for (total, count) in sum.buckets.iter_mut().zip(&histogram.buckets) {
                    *total += count;
                }
            }
            family.add_histogram(&[("direction", direction)], &sum);
        }
        family.finish()
    };
    families.into_iter().map(family).collect()
}

const BUCKETS: usize = HistogramReport::BOUNDS.len() + 1;

fn lanes(report: &Report) -> Vec<MetricFamily> {
    let mut packets = Family::new(
        "skein_lane_packets_total",
        "Datagrams on the underlay by lane.",
        Kind::Counter,
    );
    for lane in &report.lanes {
        let number = lane.lane.to_string();
        for (direction, side) in DIRECTIONS {
            let labels = [("lane", number.as_str()), ("direction", direction)];
            packets.add(&labels, side(lane).outer_packets as f64);
        }
    }
    let mut waits = Family::new(
        "skein_lane_waits_total",
        "Waits of lanes for packets by result: `polled` if busy polling found packets, `slept` if the lane blocked.",
        Kind::Counter,
    );
    let sum = |count: fn(&LaneReport) -> u64| report.lanes.iter().map(count).sum::<u64>() as f64;
    waits.add(&[("result", "polled")], sum(|lane| lane.waits_polled));
    waits.add(&[("result", "slept")], sum(|lane| lane.waits_slept));
    let mut tun_queue = Family::new(
        "skein_tun_queue_drops_total",
        "Packets that the kernel dropped because a queue of the TUN device was full.",
        Kind::Counter,
    );
    tun_queue.add(&[], report.tun_queue_drops as f64);
    let total = |name: &str, help: &str, kind: Kind, counter: fn(&LaneReport) -> u64| {
        let mut family = Family::new(name, help, kind);
        family.add(&[], report.lanes.iter().map(counter).sum::<u64>() as f64);
        family.finish()
    };
    vec![
        packets.finish(),
        waits.finish(),
        total(
            "skein_receive_queue_overflow_total",
            "Datagrams that the kernel dropped because a socket's receive queue was full.",
            Kind::Counter,
            |lane| lane.receive_queue_overflow,
        ),
        tun_queue.finish(),
        total(
            "skein_gso_fallbacks_total",
            "UDP_SEGMENT messages that were sent again as single datagrams.",
            Kind::Counter,
            |lane| lane.gso_fallbacks,
        ),
        total(
            "skein_gso_off_destinations",
            "Destinations for which UDP_SEGMENT is disabled now, summed over lanes.",
            Kind::Gauge,
            |lane| lane.gso_off_destinations,
        ),
    ]
}

fn capabilities(report: &Report) -> Vec<MetricFamily> {
    let help = "State of each offload: 1 for the current state, 0 for the others.";
    let mut family = Family::new("skein_capability", help, Kind::Gauge);
    for capability in &report.capabilities {
        for state in CapabilityState::VALUES {
            let labels = [("capability", capability.name.text()), ("state", state.text())];
            family.add(&labels, f64::from(u8::from(capability.state == *state)));
        }
    }
    vec![family.finish(), confinement(report)]
}

fn confinement(report: &Report) -> MetricFamily {
    let help = "State of each mechanism that confines the data process: 1 for the current state, 0 \
                for the others.";
    let mut family = Family::new("skein_confinement", help, Kind::Gauge);
    for confinement in &report.confinement {
        for state in ConfinementState::VALUES {
            let labels = [("mechanism", confinement.mechanism.text()), ("state", state.text())];
            family.add(&labels, f64::from(u8::from(confinement.state == *state)));
        }
    }
    family.finish()
}

fn outcomes(report: &Report) -> Vec<MetricFamily> {
    let mut drops =
        Family::new("skein_drops_total", "Packets dropped by direction and reason.", Kind::Counter);
    for drop in &report.drops {
        let labels = [("direction", drop.kind.direction()), ("reason", drop.kind.reason())];
        drops.add(&labels, drop.packets as f64);
    }
    let mut handshakes =
        Family::new("skein_handshakes_total", "Handshakes by result.", Kind::Counter);
    for handshake in &report.handshakes {
        handshakes.add(&[("result", handshake.result.text())], handshake.count as f64);
    }
    vec![drops.finish(), handshakes.finish()]
}

fn peers(report: &Report) -> Vec<MetricFamily> {
    let mut states = Family::new("skein_peers", "Peers by state.", Kind::Gauge);
    for state in PeerState::VALUES {
        let count = report.peers.iter().filter(|peer| peer.state == *state).count();
        states.add(&[("state", state.text())], count as f64);
    }
    let mut unreachable =
        Family::new("skein_peers_unreachable", "Unreachable peers by reason.", Kind::Gauge);
    for reason in UnreachableReason::OF_UNREACHABLE {
        let count = report.unreachable.iter().filter(|peer| peer.reason == reason).count();
        unreachable.add(&[("reason", reason.label())], count as f64);
    }
    let ages = || report.peers.iter().filter_map(|peer| peer.handshake_age_seconds);
    let mut sessions = Family::new("skein_sessions", "Peers with a session.", Kind::Gauge);
    sessions.add(&[], ages().count() as f64);
    let mut oldest = Family::new(
        "skein_session_max_age_seconds",
        "Age of the oldest current session in seconds; 0 without a session.",
        Kind::Gauge,
    );
    oldest.add(&[], ages().fold(0.0, f64::max));
    let mut narrow = Family::new(
        "skein_narrow_paths",
        "Peers whose path MTU is smaller than this node's MTU.",
        Kind::Gauge,
    );
    narrow.add(&[], report.reduced_paths.len() as f64);
    [states, unreachable, sessions, oldest, narrow].map(Family::finish).into()
}

fn each_peer(report: &Report) -> Vec<MetricFamily> {
    let gauge = |name: &str, help: &str| Family::new(name, help, Kind::Gauge);
    let counter = |name: &str, help: &str| Family::new(name, help, Kind::Counter);
    let mut up = gauge("skein_peer_up", "1 if the peer is established, 0 if not.");
    let mut age = gauge("skein_peer_session_age_seconds", "Age of the current session in seconds.");
    let mut rtt = gauge("skein_peer_rtt_seconds", "Smoothed round-trip time in seconds.");
    let mut packets = counter("skein_peer_packets_total", "Packets of pods by peer.");
    let mut bytes = counter("skein_peer_bytes_total", "IP bytes of packets of pods by peer.");
    for peer in &report.peers {
        let name = ("peer", peer.name.as_str());
        up.add(&[name], f64::from(u8::from(peer.state == PeerState::Established)));
        if let Some(seconds) = peer.handshake_age_seconds {
            age.add(&[name], seconds);
        }
        if let Some(us) = peer.rtt_us {
            rtt.add(&[name], us as f64 / 1e6);
        }
        for (direction, count, length) in
            [(EGRESS, peer.tx_packets, peer.tx_bytes), (INGRESS, peer.rx_packets, peer.rx_bytes)]
        {
            packets.add(&[name, ("direction", direction)], count as f64);
            bytes.add(&[name, ("direction", direction)], length as f64);
        }
    }
    [up, age, rtt, packets, bytes].map(Family::finish).into()
}

#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;
