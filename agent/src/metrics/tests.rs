#![allow(clippy::unwrap_used)]

use std::io::Write;
use std::process::{Command, Stdio};

use prometheus::proto::MetricType;
use skein_core::drop::DropReason;
use skein_core::tunnel::HandshakeResult;
use skein_ipc::keys::PublicKey;
use skein_ipc::{
    Capability, CapabilityName, Confinement, DropReport, HandshakeCount, Mechanism, UnreachablePeer,
};
use skein_netlink::firewall::counters::Counters;
use skein_netlink::firewall::reconciler::FirewallStatus;

use super::*;
use crate::cni;
use crate::control::kubernetes;
use crate::policy::{self, PolicyMetrics, PolicyPackets, PolicyStatus};
use crate::status::RejectedRecords;
use crate::status::tests::peer;

/// Returns a report with values in all parts.
fn report() -> Report {
    let mut lane = LaneReport { gso_fallbacks: 3, ..LaneReport::default() };
    lane.egress.inner_packets = 90;
    lane.egress.outer_packets = 45;
    lane.egress.packets_per_call = HistogramReport { buckets: vec![1; 12], sum: 4000 };
    let other = LaneReport { lane: 1, ..lane.clone() };
    Report {
        tun_queue_drops: 5,
        pid: std::process::id(),
        lanes: vec![lane, other],
        capabilities: vec![Capability {
            name: CapabilityName::UdpGso.into(),
            state: CapabilityState::ForcedOff.into(),
            reason: Some("switched off".to_owned()),
        }],
        drops: DropReason::ALL
            .iter()
            .map(|reason| DropReport { kind: (*reason).into(), packets: 0 })
            .collect(),
        handshakes: vec![HandshakeCount { result: HandshakeResult::Initiated.into(), count: 2 }],
        peers: vec![peer("node-b", PeerState::Established)],
        unreachable: vec![UnreachablePeer {
            name: "node-c".to_owned(),
            reason: UnreachableReason::Deaf.into(),
        }],
        ..Report::default()
    }
}

fn confinement(mechanism: Mechanism, state: ConfinementState) -> Confinement {
    Confinement { mechanism: mechanism.into(), state: state.into(), reason: None }
}

fn input() -> Input {
    let dataplane =
        DataplaneStatus { pid: Some(std::process::id()), restarts: 4, ..Default::default() };
    Input { report: Some(report()), dataplane, ready: true, per_peer: true, ..Default::default() }
}

/// Returns an input with all families and all label values.
pub(super) fn everything() -> Input {
    let mut report = report();
    let on = |name: &CapabilityName| Capability {
        name: (*name).into(),
        state: CapabilityState::On.into(),
        reason: None,
    };
    report.capabilities = CapabilityName::VALUES.iter().map(on).collect();
    let confined = |mechanism: &Mechanism| confinement(*mechanism, ConfinementState::On);
    report.confinement = Mechanism::VALUES.iter().map(confined).collect();
    let count = |result: &HandshakeResult| HandshakeCount { result: (*result).into(), count: 0 };
    report.handshakes = HandshakeResult::ALL.iter().map(count).collect();
    let pool = skein_ipam::PoolUsage {
        cidr: "10.244.1.0/24".parse().unwrap(),
        total: 253,
        in_use: 3,
        quarantined: 1,
    };
    let pods = Pods {
        requests: cni::metrics::Requests::new().unwrap().families(),
        usage: skein_ipam::Usage { pools: vec![pool], leases: 3 },
    };
    let requests = kubernetes::Requests::new().unwrap().families();
    let key = Some(RotationStatus::of(PublicKey([1; 32])));
    let status = FirewallStatus { active: true, ..FirewallStatus::default() };
    let firewall = Some(Firewall { status, counters: Some(Counters::default()) });
    let packets = [("ingress", "rule"), ("egress", "isolated")].map(|(direction, reason)| {
        let (namespace, policy) = ("shop".to_owned(), "web".to_owned());
        PolicyPackets { namespace, policy, direction, reason, packets: 0 }
    });
    let policy = Some(PolicyMetrics {
        status: PolicyStatus { last_commit_age_seconds: Some(1.0), ..PolicyStatus::default() },
        commits: policy::metrics::Commits::new().unwrap().families(),
        packets: Some(packets.into()),
    });
    Input { report: Some(report), pods: Some(pods), requests, key, firewall, policy, ..input() }
}

fn has(text: &str, line: &str) {
    assert!(text.lines().any(|found| found == line), "no line {line:?} in\n{text}");
}

#[test]
fn counters_are_summed_over_lanes() {
    let text = render(&input()).unwrap();
    has(&text, "skein_inner_packets_total{direction=\"egress\"} 180");
    has(&text, "skein_inner_packets_total{direction=\"ingress\"} 0");
    has(&text, "skein_lane_packets_total{lane=\"1\",direction=\"egress\"} 45");
    has(&text, "skein_gso_fallbacks_total 6");
    has(&text, "skein_tun_queue_drops_total 5");
}

#[test]
fn histograms_are_cumulative() {
    let text = render(&input()).unwrap();
    has(&text, "skein_packets_per_call_bucket{direction=\"egress\",le=\"1\"} 2");
    has(&text, "skein_packets_per_call_bucket{direction=\"egress\",le=\"1024\"} 22");
    has(&text, "skein_packets_per_call_bucket{direction=\"egress\",le=\"+Inf\"} 24");
    has(&text, "skein_packets_per_call_count{direction=\"egress\"} 24");
    has(&text, "skein_packets_per_call_sum{direction=\"egress\"} 8000");
    has(&text, "skein_segments_per_message_count{direction=\"ingress\"} 0");
}

#[test]
fn exactly_one_state_is_set() {
    let mut input = input();
    let report = input.report.as_mut().unwrap();
    report.confinement = vec![confinement(Mechanism::Seccomp, ConfinementState::Failed)];
    let text = render(&input).unwrap();
    has(&text, "skein_confinement{mechanism=\"seccomp\",state=\"failed\"} 1");
    has(&text, "skein_confinement{mechanism=\"seccomp\",state=\"on\"} 0");
    has(&text, "skein_capability{capability=\"udp_gso\",state=\"forced_off\"} 1");
    has(&text, "skein_capability{capability=\"udp_gso\",state=\"on\"} 0");
    has(&text, "skein_peers{state=\"established\"} 1");
    has(&text, "skein_peers{state=\"unreachable\"} 0");
    has(&text, "skein_peers_unreachable{reason=\"deaf\"} 1");
    has(&text, "skein_peers_unreachable{reason=\"silent\"} 0");
    has(&text, "skein_narrow_paths 0");
    has(&text, "skein_dataplane_restarts_total 4");
    for reason in DropReason::ALL {
        let (direction, reason) = (reason.direction().label(), reason.label());
        has(
            &text,
            &format!("skein_drops_total{{direction=\"{direction}\",reason=\"{reason}\"}} 0"),
        );
    }
}

#[test]
fn peer_series_need_per_peer_setting() {
    let text = render(&Input { per_peer: false, ..input() }).unwrap();
    assert!(!text.contains("node-b"));
    has(&render(&input()).unwrap(), "skein_peer_up{peer=\"node-b\"} 1");
}

#[test]
fn agent_metrics_exist_without_data_process() {
    let text = render(&Input { report: None, ..input() }).unwrap();
    has(&text, "skein_dataplane_up 0");
    assert!(text.contains("skein_build_info{version="));
    assert!(!text.contains("skein_inner_packets_total"));
}

#[test]
fn usage_of_both_processes_is_exported() {
    let text = render(&input()).unwrap();
    for process in ["control", "dataplane"] {
        let name = format!("skein_process_resident_memory_bytes{{process=\"{process}\"}} ");
        let value = text.lines().find_map(|line| line.strip_prefix(&name)).unwrap();
        assert!(value.parse::<f64>().unwrap() > 1e5);
    }
}

#[test]
fn active_records_and_rejected_files_are_counted() {
    let refused = RejectedRecords { origin: "b.toml".into(), error: "line 1".to_owned() };
    let registry = RegistryStatus { accepted: 7, rejected: vec![refused], ..Default::default() };
    let text = render(&Input { registry, ..input() }).unwrap();
    has(&text, "skein_node_records 7");
    has(&text, "skein_node_record_files_rejected 1");
}

/// Checks conventions of Prometheus that promtool does not check completely: a prefix, a base unit
/// at the end, and `_total` after it on counters only.
#[test]
fn metric_names_end_with_base_unit() {
    for family in families(&everything()) {
        let name = family.name();
        assert!(name.starts_with("skein_"), "{name}");
        let counter = family.get_field_type() == MetricType::COUNTER;
        let bare = name.strip_suffix("_total");
        assert_eq!(bare.is_some(), counter, "{name}");
        let bare = bare.unwrap_or(name);
        for unit in ["seconds", "bytes"] {
            assert!(!bare.contains(unit) || bare.ends_with(&format!("_{unit}")), "{name}");
        }
        for scaled in ["_ms", "_us", "milliseconds", "microseconds", "kib", "ticks"] {
            assert!(!bare.contains(scaled), "{name}");
        }
        let clumsy = name.ends_with("_count") || name.ends_with("_sum") || name.ends_with("_max");
        assert!(!clumsy, "{name}");
    }
}

#[test]
fn promtool_accepts_all_metrics() {
    let mut promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool is missing: install the Debian package prometheus");
    let text = render(&everything()).unwrap();
    promtool.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let output = promtool.wait_with_output().unwrap();
    let complaints = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&complaints));
}
